"""The model card of a saved model, read back by huggingface_hub."""

import json
import re

import pytest
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.utils import validate_repo_id

from common.card import write_cards

RUN = {
    "model_name_or_path": "base",
    "dataset_name": "DATA/train.json",
    "eval_dataset_name": "DATA/heldout.json",
    "toy_dir": None,
    "recipe": "tgrpo",
    "lora_rank": 0,
    "seed": 3,
    "ranks": 2,
    "revision": None,
    "command": ["train.py", "--seed", "3"],
    "frames": 16,
    "max_pixels": 784,
}
RESULT = {
    "skipped": {"a": "broken", "b": "broken"},
    "heldout_skipped": {"c": "broken"},
    "heldout_questions": 300,
    "before": {"greedy": 0.70666, "greedy/count": 0.5},
    "after": {"greedy": 0.96, "greedy/count": 1.0},
}


@pytest.fixture
def output(tmp_path, monkeypatch):
    """A finished run of both stages beside its base model, whose own card has the given lines."""
    monkeypatch.chdir(tmp_path)

    def make(lines=None, result=RESULT, **changed):
        for name in ("base", "out/sft", "out/grpo"):
            (tmp_path / name).mkdir(parents=True)
        if lines:
            text = "\n".join(["---", *lines, "---", "# Base"])
            (tmp_path / "base/README.md").write_text(text, encoding="utf-8")
        (tmp_path / "out/run.json").write_text(json.dumps({**RUN, **changed}))
        write_cards(tmp_path / "out", result)
        return tmp_path / "out"

    return make


def table(card):
    """{measure: numbers} of a card's table."""
    lines = re.findall(r"^\| (.*) \|$", card.text, re.MULTILINE)
    assert lines[0].startswith("measure")
    cells = [line.split(" | ") for line in lines[1:]]
    return {name: [float(number) for number in numbers] for name, *numbers in cells}


def test_what_the_hub_reads(output):
    lines = ["license: other", "license_name: qwen-research", "license_link: https://x.org/LICENSE"]
    folder = output([*lines, "base_model: Qwen/Qwen2.5-VL-3B-Instruct"])
    for stage in ("sft", "grpo"):
        assert metadata_load(folder / stage / "README.md") == {
            "base_model": "Qwen/Qwen2.5-VL-3B-Instruct",
            "library_name": "transformers",
            "license": "other",
            "license_name": "qwen-research",
            "license_link": "https://x.org/LICENSE",
            "pipeline_tag": "video-text-to-text",
            "tags": ["videocfr", "tgrpo"],
        }
    card = ModelCard.load(folder / "grpo/README.md")
    validate_repo_id(card.data.base_model)
    assert "Licence of the base:\n  other, qwen-research, https://x.org/LICENSE." in card.text
    assert table(card) == {"accuracy, greedy": [0.7067, 0.96], "greedy/count": [0.5, 1.0]}
    # The SFT model is what GRPO started from.
    before = table(ModelCard.load(folder / "sft/README.md"))
    assert before == {"accuracy, greedy": [0.7067], "greedy/count": [0.5]}


def test_what_people_read(output):
    text = ModelCard.load(output() / "grpo/README.md").text
    for words in (
        "# base, trained by CF-GRPO",
        "Recipe: `tgrpo`, seed 3, 2 rank(s), code unknown.",
        "Command: `train.py --seed 3`",
        "Data: `DATA/train.json`.",
        "300 questions of `DATA/heldout.json`",
        "1 more could not be used",
        "2 training question(s) could not be used",
        "at most 16\n  frames of at most 784 pixels",
    ):
        assert words in text
    # Nothing is left of the template, and the settings are those of the run.
    assert "{%" not in text and "{{" not in text
    (settings,) = re.findall(r"```json\n(.*)\n```", text, re.DOTALL)
    assert json.loads(settings) == RUN


def test_a_folder_without_a_card(output):
    """A folder's name is no hub id, and a licence is not guessed."""
    card = ModelCard.load(output(lora_rank=8) / "grpo/README.md")
    assert card.data.base_model is None and card.data.license is None
    assert "Licence of the base:\n  unknown, see the base model." in card.text
    assert "`tgrpo`, LoRA of rank 8, merged, seed 3" in card.text


def test_a_hub_id(output, monkeypatch):
    """Offline, its card is not there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = output(model_name_or_path="Qwen/Qwen2.5-VL-7B-Instruct")
    card = ModelCard.load(folder / "grpo/README.md")
    assert card.data.base_model == "Qwen/Qwen2.5-VL-7B-Instruct" and card.data.license is None


def test_without_held_out_questions(output):
    text = ModelCard.load(
        output(result={**RESULT, "before": {}, "after": {}}) / "grpo/README.md"
    ).text
    assert "None were given" in text and "| measure |" not in text
