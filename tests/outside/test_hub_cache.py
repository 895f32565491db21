"""A hub model in the cache of Hugging Face is found without a network, as from_pretrained does."""

import shutil

import pytest
from huggingface_hub import constants
from transformers import AutoModelForImageTextToText

from common.data import DataError
from common.policy import load_processor, read_config


def test_a_cached_model_is_found_offline_and_one_that_is_not_is_one_sentence(
    checkpoint, tmp_path, monkeypatch
):
    # As huggingface_hub lays it out: models--OWNER--NAME/{refs/main, snapshots/COMMIT/files}.
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hub" / "models--own--tiny"
    shutil.copytree(checkpoint, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    # What HF_HOME and HF_HUB_OFFLINE=1 set when it is imported.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    read_config("own/tiny")
    processor = load_processor("own/tiny")
    model = AutoModelForImageTextToText.from_pretrained("own/tiny", use_safetensors=True)
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    for name in ("own/none", "no/such/folder"):
        with pytest.raises(DataError, match=f"^{name} is not a checkpoint, "):
            read_config(name)
