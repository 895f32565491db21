"""Names that transformers is about to remove are used only where it has no new ones."""

import copy
import warnings
from types import SimpleNamespace

import pytest
from transformers.models.qwen2_vl import video_processing_qwen2_vl

from common.data import load_examples
from common.media import Encoder, PromptFlags
from common.policy import Policy, cache_argument, checkpoint_activations, collate, load_processor
from common.rollout import Sampling, rollout


@pytest.mark.parametrize("graph", [False, True])
def test_sampling_calls_nothing_that_is_deprecated(talker, items, graph):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        prompts = collate(items[:1], talker)
        samples = rollout(talker, prompts, [2], [0, 1], Sampling(3, graph=graph))
    assert samples.tokens.shape == (2, 3)


def test_checkpointing_calls_nothing_that_is_deprecated(talker):
    model = copy.deepcopy(talker)
    layer = model.model.language_model.layers[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        Policy(model)
        checkpoint_activations(model)
        assert layer.gradient_checkpointing
        checkpoint_activations(model, on=False)
    assert not layer.gradient_checkpointing


def test_a_video_is_encoded_without_a_warning_that_it_may_be_resized(
    checkpoint, toy_folder, monkeypatch
):
    warned = []
    monkeypatch.setattr(video_processing_qwen2_vl.logger, "warning_once", warned.append)
    flags = PromptFlags(min_pixels=56 * 56, max_pixels=56 * 56)
    examples = load_examples(toy_folder / "train_cot.json")
    video = next(example for example in examples if example.media_type == "video")
    encoded = Encoder(load_processor(checkpoint), flags).encode(video)
    assert encoded.grid_thw.tolist() == [[8, 4, 4]]
    assert warned == []


def test_older_transformers_are_called_by_their_names():
    def forward(inputs_embeds, past_key_values):
        raise AssertionError

    assert cache_argument(SimpleNamespace(forward=forward), 7) == {"past_key_values": 7}
    calls = []
    older = SimpleNamespace(
        gradient_checkpointing_enable=lambda: calls.append("on"),
        gradient_checkpointing_disable=lambda: calls.append("off"),
    )
    checkpoint_activations(older)
    checkpoint_activations(older, on=False)
    assert calls == ["on", "off"]
