"""SFT: the order of demonstrations, and those of one medium in one row."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import hf_inputs

import train
from common.data import Example, Medium
from common.policy import Policy


def example(name, media, reasoning="It rolls."):
    shown = [Medium("video", media)] if media else []
    return Example(name, "What?", [], "free-form", "a ball", shown, reasoning=reasoning)


def order(examples, count, together=1):
    plan = train.Schedule(count, 1.0, batch=1, accumulation=1, learning_rate=1e-3)
    return plan.order(examples, 3, together)


def test_demonstrations_of_a_medium_come_together(alone):
    names = ["a0", "a1", "a2", "b0", "b1", "t0", "t1"]
    media = {"a": "a.mp4", "b": "b.mp4", "t": ""}
    examples = [example(name, media[name[0]]) for name in names]

    # One by one: the plain shuffle.
    alone = order(examples, 14)
    rng = random.Random(3)
    assert alone == rng.sample(examples, 7) + rng.sample(examples, 7)

    # Two by two: where the first of a pair stands in the shuffle, the second follows.
    shuffled = [one.id for one in alone[:7]]
    bundled = [one.id for one in order(examples, 7, 2)]
    assert sorted(bundled) == sorted(names)
    of_a = [name for name in shuffled if name[0] == "a"]
    of_b = [name for name in shuffled if name[0] == "b"]
    pairs = {of_a[0]: of_a[:2], of_a[2]: of_a[2:], of_b[0]: of_b}
    expected = []
    for name in shuffled:
        if name[0] == "t":
            expected.append(name)
        else:
            expected += pairs.get(name, [])
    assert bundled == expected

    # A longer run begins as a shorter one.
    assert order(examples, 20, 2)[:7] == order(examples, 7, 2)


def ready_rows(model, items):
    """Three demonstrations of a video, two of an image, two of text, of different lengths."""
    video, image, text = items
    rows = []
    for item, medium, count in ((video, "v.mp4", 3), (image, "i.png", 2), (text, "", 2)):
        for number in range(count):
            # Another question: other tokens behind the medium.
            ids = torch.cat([item.input_ids, torch.arange(70, 70 + 3 * number)])
            one = example(f"{medium}{number}", medium, reasoning="rolls " * (number + 1))
            inputs = replace(item, input_ids=ids)
            if not medium:
                inputs.shared = len(ids)
            rows.append(train.Ready(len(rows), one, None, inputs=inputs))
    return rows


def sft_gradients(policy, packs):
    """Loss per token of all packs, and the gradient of every parameter."""
    policy.zero_grad()
    tokens = sum(pack.learned.sum() for pack in packs)
    total = 0.0
    for pack in packs:
        logp = policy(pack.prompts, pack.completions, pack.mask).logp
        loss = -(logp * pack.learned).sum() / tokens
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in policy.named_parameters()}


def plain_gradients(model, rows, processor):
    """The same by transformers alone, one unpadded row after the other."""
    model.zero_grad()
    answers = [train.answer_ids(one.example, processor) for one in rows]
    tokens = sum(len(answer) for answer in answers)
    total = 0.0
    for one, answer in zip(rows, answers, strict=True):
        logits = model(**hf_inputs(one.inputs, model, answer)).logits[0, -len(answer) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, answer, reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients[f"model.{name}"] = parameter.grad.clone()
    return total, gradients


def compare(first, second):
    assert first[0] == pytest.approx(second[0], abs=1e-5)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], atol=1e-5, rtol=1e-4, msg=name)


def check_rows(model, items, processor):
    rows = ready_rows(model, items)
    pack = train.pack_demonstrations(rows, processor, model, together=4)
    # A row for the video, one for the image, one for each text.
    assert pack.completions.shape[:2] == (4, 3)
    assert pack.mask.any(-1).sum(-1).tolist() == [3, 2, 1, 1]
    policy = Policy(model)
    together = sft_gradients(policy, [pack])
    alone = [train.pack_demonstrations([one], processor, model, 4) for one in rows]
    assert all(pack.completions.shape[:2] == (1, 1) for pack in alone)
    compare(together, sft_gradients(policy, alone))
    # At most two a row: the video's third begins another.
    pairs = train.pack_demonstrations(rows, processor, model, 2)
    assert pairs.mask.any(-1).sum(-1).tolist() == [2, 1, 2, 1, 1]
    compare(together, sft_gradients(policy, [pairs]))
    # Rows of one demonstration each, padded to a common length: plain causal attention.
    apart = train.pack_demonstrations(rows, processor, model, 1)
    assert apart.completions.shape[:2] == (7, 1)
    compare(together, sft_gradients(policy, [apart]))
    return together, rows


def test_a_shared_medium_gives_the_gradients_of_separate_rows(talker, items, toy_processor):
    together, rows = check_rows(talker, [items[0], items[1], items[3]], toy_processor)
    compare(together, plain_gradients(talker, rows, toy_processor))


def test_in_other_families_too(other_family, toy_processor):
    model, family_items = other_family
    together, rows = check_rows(model, family_items, toy_processor)
    compare(together, plain_gradients(model, rows, toy_processor))


def test_what_is_learned_is_the_answer(talker, items, toy_processor):
    rows = ready_rows(talker, [items[0], items[1], items[3]])
    pack = train.pack_demonstrations(rows, toy_processor, talker, 4)
    second = pack.completions[0, 1]
    learned = toy_processor.tokenizer.decode(second[pack.learned[0, 1]])
    assert learned == "<think>rolls rolls </think><answer>a ball</answer><|im_end|>"
    question = second[pack.mask[0, 1] & ~pack.learned[0, 1]]
    assert question.tolist() == rows[1].inputs.input_ids[rows[1].inputs.shared :].tolist()
    assert len(pack.prompts.input_ids[0]) >= rows[1].inputs.shared
