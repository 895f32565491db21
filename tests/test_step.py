"""train.py: what is sampled at once of a step or of held-out questions; that changes no sample."""

from types import SimpleNamespace

import pytest
import torch
from conftest import video_row

import train
from common.data import load_examples
from common.media import Encoder, PromptFlags
from common.policy import Policy


@pytest.fixture(scope="module")
def forwards(toy_folder, toy_processor):
    """A video with its control; an image; a text; another video."""
    examples = load_examples(toy_folder / "train.json")
    by_path = {example.path: example for example in examples if example.video}
    first, second = list(by_path.values())[:2]
    image = next(example for example in examples if example.media_type == "image")
    text = train.replace(image, id="text", media=[], question="Which letter is red?")
    encoder = Encoder(toy_processor, PromptFlags(min_pixels=3136, max_pixels=3136))
    row = video_row([0, 10, 20, 30])

    def ready(place, example, order=None):
        row_or_none = row if example.video else None
        control = None if order is None else encoder.encode(example, row, shuffle=order)
        inputs = encoder.encode(example, row_or_none)
        return train.Ready(place, example, row_or_none, order, inputs, control)

    return [
        [ready(7, first, [3, 0, 2, 1])],
        [ready(8, image)],
        [ready(9, text)],
        [ready(10, second, [1, 0, 3, 2])],
    ]


def sampled(forwards, talker, toy_processor, monkeypatch, **changes):
    """Rollouts of the forwards, and the completions of each call that sampled them."""
    args = train.TrainArguments(num_generations=4, max_completion_length=10, **changes)
    run = SimpleNamespace(args=args, processor=toy_processor)
    calls = []
    sample_texts = train.sample_texts

    def counted(*arguments):
        calls.append(sum(arguments[3]))
        return sample_texts(*arguments)

    monkeypatch.setattr(train, "sample_texts", counted)
    rollouts = []
    with torch.no_grad():
        for part in train.fitting(args, forwards, 6):
            rollouts += train.sample(run, talker, part)
    monkeypatch.undo()
    return rollouts, calls


@pytest.mark.parametrize("freeze", [False, True])
def test_a_step_is_sampled_at_once_or_in_parts_alike(
    forwards, talker, toy_processor, monkeypatch, freeze
):
    setting = (forwards, talker, toy_processor, monkeypatch)
    whole, calls = sampled(*setting, freeze_vision=freeze)
    assert calls == [4 * 4 + 2 * 2]
    # 6 completions are counted for a question
    two, calls = sampled(*setting, freeze_vision=freeze, rollout_batch_size=18)
    assert calls == [3 * 4 + 2, 4 + 2]
    each, calls = sampled(*setting, freeze_vision=freeze, rollout_batch_size=1)
    assert calls == [6, 4, 4, 6]
    for parts in (two, each):
        for one, other in zip(whole, parts, strict=True):
            assert one.completions.shape == other.completions.shape
            assert torch.equal(one.mask, other.mask)
            assert torch.equal(one.completions[one.mask], other.completions[one.mask])
            assert torch.equal(one.truncated, other.truncated)
            torch.testing.assert_close(one.logp, other.logp, atol=1e-5, rtol=0)
            assert one.texts == other.texts and one.control_texts == other.control_texts
            assert [len(texts) for texts in one.texts] == [4] * len(one.examples)
            assert torch.equal(one.prompts.input_ids, other.prompts.input_ids)
            pairs = zip(one.prompts.features or [], other.prompts.features or [], strict=True)
            for found, expected in pairs:
                tokens = int(one.prompts.visual.sum())
                torch.testing.assert_close(found[:tokens], expected[:tokens], atol=1e-5, rtol=0)
    assert [texts is None for one in whole for texts in one.control_texts] == [0, 1, 1, 0]
    # what was sampled can be scored, with a frozen tower's features or without
    for one in whole:
        with torch.no_grad():
            scored = Policy(talker)(one.prompts, one.completions, one.mask)
        torch.testing.assert_close(scored.logp * one.mask, one.logp, atol=3e-5, rtol=0)


def test_long_prompts_are_sampled_apart(monkeypatch):
    def ready(length):
        return train.Ready(0, None, None, inputs=SimpleNamespace(input_ids=[0] * length))

    lengths = [8000, 8000, 100, 100, 9000, 16384, 20000]
    args = train.TrainArguments()
    parts = train.fitting(args, [[ready(length)] for length in lengths], 1)
    # the longest of a part times its prompts, 16,384 tokens at most; alone everything fits
    found = [[len(one.inputs.input_ids) for (one,) in part] for part in parts]
    assert found == [[8000, 8000], [100, 100], [9000], [16384], [20000]]
    short = [[ready(100)] for _ in range(200)]
    assert [len(part) for part in train.fitting(args, short, 1)] == [128, 72]
