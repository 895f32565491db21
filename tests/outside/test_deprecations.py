"""Names that transformers is about to remove are used only where it has no new ones."""

import copy
import warnings
from types import SimpleNamespace

import pytest

from common.policy import Policy, cache_argument, checkpoint_activations, collate
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
