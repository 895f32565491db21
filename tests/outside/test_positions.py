"""Rotary positions against published numbers: huggingface/transformers issue 45381, as transformers
5.2 and vLLM print them.
"""

import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
)

from common.media import ModelInputs
from common.policy import collate

TEXT = dict(
    vocab_size=160000,
    hidden_size=4,
    intermediate_size=4,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
)
VISION = dict(depth=1, hidden_size=4, num_heads=1)


def qwen2_vl():
    config = Qwen2VLConfig(text_config=TEXT, vision_config=dict(VISION, embed_dim=4))
    return Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl():
    vision = dict(VISION, out_hidden_size=4, intermediate_size=4, tokens_per_second=2)
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config)


@pytest.mark.parametrize(
    "make, step",
    [
        (qwen2_5_vl, 4),  # the issue's: 2 s a slot, 2 positions a second
        (qwen2_vl, 1),  # by hand: its time axis counts slots
    ],
)
def test_words_stand_behind_the_video_as_in_transformers_5_2(make, step, monkeypatch):
    """15 words, a video of grid (84, 24, 32) at 2 s a slot, 10 words: 84 * 12 * 16 video tokens."""
    # conftest.py mends it for the other tests
    for module in (Qwen2VLModel, Qwen2_5_VLModel):
        monkeypatch.setattr(module, "get_rope_index", module.get_rope_index.unchanged)
    small = make()
    video = small.config.video_token_id
    ids = torch.tensor([7] * 15 + [video] * (84 * 12 * 16) + [7] * 10)
    item = ModelInputs(ids, torch.zeros(1, 4), torch.tensor([[84, 24, 32]]), 2.0, [], 0, ["video"])
    text = ModelInputs(torch.tensor([7] * 40), None, None, 1.0, [])
    positions = collate([text, item], small).position_ids  # (3, 2, P)
    assert positions[:, 1, :15].tolist() == [list(range(15))] * 3
    inside = positions[:, 1, 15:-10]
    last = 15 + 83 * step
    assert [(int(axis.min()), int(axis.max())) for axis in inside] == [
        (15, last),
        (15, 26),
        (15, 30),
    ]
    assert positions[:, 1, -10:].tolist() == [list(range(last + 1, last + 11))] * 3
    assert positions[:, 0, -40:].tolist() == [list(range(40))] * 3
