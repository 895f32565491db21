"""docs/own_data.md: its rows load, can earn a reward and are encoded."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

import toy
import train
from common.data import PROBLEM_TYPES, load_examples
from common.media import Encoder, PromptFlags


def test_the_rows_of_the_page_are_a_data_set(tmp_path, toy_processor):
    page = (Path(__file__).parents[2] / "docs" / "own_data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (tmp_path / "data.json").write_text(block, encoding="utf-8")
    (tmp_path / "clips").mkdir()
    (tmp_path / "pictures").mkdir()
    toy.write_video(tmp_path / "clips/kitchen.mp4", np.full((20, 48, 64, 3), 90, np.uint8))
    Image.new("RGB", (64, 48), "red").save(tmp_path / "pictures/sign.png")
    examples = load_examples(tmp_path / "data.json")
    assert {example.problem_type for example in examples} == set(PROBLEM_TYPES)
    assert {example.media_type for example in examples} == {"video", "image", "text"}
    answers = {example.id: example.answer for example in examples}
    assert answers["choice"] == "B"
    assert answers["bare options"] == "A"
    assert answers["several letters"] == "A,B"
    encoder = Encoder(toy_processor, PromptFlags(min_pixels=56 * 56, max_pixels=56 * 56))
    for example in examples:
        assert train.unearnable(example) is None
        assert len(encoder.encode(example).input_ids)
