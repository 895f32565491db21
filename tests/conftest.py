"""What the tests share: the repository root on the path, and a small toy world (4 + 2 videos, no CLIP) made once per session."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """train_cot.json, train.json, heldout.json, other_types.json and videos/ (112x112, 16 s at 4 fps) of a toy with six videos."""
    import toy

    folder = tmp_path_factory.mktemp("toy") / "toy"
    toy.make_dataset(folder, toy.ToyArguments(output_dir=str(folder), train_videos=4, heldout_videos=2))
    return folder


@pytest.fixture(scope="session")
def toy_processor(toy_folder):
    import toy

    return toy.make_processor(toy_folder)


@pytest.fixture(scope="session")
def toy_model(toy_processor):
    """Untrained Qwen2.5-VL in eval mode; shared, so tests that change it take a copy.deepcopy."""
    import toy

    model = toy.make_model(toy_processor, seed=0).eval()
    model.requires_grad_(True)
    return model
