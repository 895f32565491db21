"""grpo.py: hand-derived numbers for its maths, and plain Hugging Face forwards, generate and eager attention as oracles for the rest."""

import copy
import math
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import NO_EOS, banned_ids
from torch.utils._python_dispatch import TorchDispatchMode

from common import policy as policy_module
from common.policy import Layout, Policy, Prompts, checkpoint_activations, collate, group_attention
from common.rollout import rollout, row_uniforms, sample_texts, sample_tokens
from grpo import (
    answer_likelihoods,
    group_advantages,
    policy_loss,
    rollout_frame_use,
    slot_shares,
    token_weights,
)

NAN, INF = float("nan"), float("inf")
ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------------------- advantages


def test_advantages_use_the_unbiased_std_and_eps():
    # (0, 2, 4): mean 2, unbiased variance (4 + 0 + 4) / 2 = 4, std 2 (the biased one would be 1.633)
    rewards = torch.tensor([[0.0, 2.0, 4.0], [10.0, 10.0, 13.0]])
    # (10, 10, 13): mean 11, variance (1 + 1 + 4) / 2 = 3
    second = torch.tensor([-1.0, -1.0, 2.0])
    expected = torch.stack(
        [torch.tensor([-2.0, 0.0, 2.0]) / 2.0001, second / (math.sqrt(3) + 1e-4)]
    )
    torch.testing.assert_close(group_advantages(rewards), expected)
    expected = torch.stack([torch.tensor([-2.0, 0.0, 2.0]) / 2.5, second / (math.sqrt(3) + 0.5)])
    torch.testing.assert_close(group_advantages(rewards, eps=0.5), expected)


def test_advantages_without_scale_are_centred_rewards():
    rewards = torch.tensor([[0.0, 2.0, 4.0], [10.0, 10.0, 13.0]])
    assert group_advantages(rewards, scale=False).tolist() == [[-2, 0, 2], [-1, -1, 2]]


@pytest.mark.parametrize("value", [0.0, 1.0, 2.5])
def test_advantages_of_equal_rewards_are_zero(value):
    assert group_advantages(torch.full((2, 8), value)).tolist() == [[0.0] * 8] * 2


@pytest.mark.parametrize("value", [0.1, 0.7, 1.3, 2.8123])
def test_advantages_of_equal_rewards_that_round_are_zero_too(value):
    # float32's mean of seven 0.7 is not 0.7; the rounding error must not be blown up by 1 / eps
    assert group_advantages(torch.full((1, 7), value)).abs().max() < 2e-3


def test_an_anchor_joins_groups_of_equal_rewards_only():
    # (2, 2) with 1: mean 5/3, std sqrt((1/9 + 1/9 + 4/9) / 2) = 1/sqrt(3); (0, 0) with 1 is its negative; (0, 2): mean 1, std sqrt(2)
    rewards, anchors = torch.tensor([[2.0, 2], [0, 0], [0, 2]]), torch.tensor([1.0, 1, 9])
    third, half = 3**-0.5, 2**-0.5
    torch.testing.assert_close(
        group_advantages(rewards, 0, anchors=anchors),
        torch.tensor([[third] * 2, [-third] * 2, [-half, half]]),
    )
    expected = torch.tensor([[1 / 3, 1 / 3], [-1 / 3, -1 / 3], [-1, 1]])
    torch.testing.assert_close(group_advantages(rewards, scale=False, anchors=anchors), expected)


def test_advantages_of_a_group_of_one_are_an_error():
    with pytest.raises(ValueError, match="two rollouts"):
        group_advantages(torch.tensor([[1.0], [2.0]]))


# --------------------------------------------------------------------------------------------------------- policy loss

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
ADVANTAGES = torch.tensor([1.0, -3.0])


def test_loss_at_ratio_one_in_each_reduction():
    logp = torch.full((2, 3), -1.5)
    # every token's loss is -A: row 1 has two of -1, row 2 one of +3
    for reduction, expected in (
        ("sequence", (-1 + 3) / 2),
        ("token", (-1 - 1 + 3) / 3),
        ("constant", (-1 - 1 + 3) / 6),
    ):
        loss, stats = policy_loss(logp, logp, ADVANTAGES, MASK, reduction=reduction)
        assert loss.item() == pytest.approx(expected)
        assert stats == {"kl": 0, "ratio": 1, "clip_fraction": 0}


def test_loss_with_token_weights():
    logp, weights = torch.zeros(2, 3), torch.tensor([[2.0, 1.0, 9.0], [4.0, 9.0, 9.0]])
    # row 1: -2, -1; row 2: +12
    for reduction, expected in (
        ("sequence", (-1.5 + 12) / 2),
        ("token", 9 / 3),
        ("constant", 9 / 6),
    ):
        assert policy_loss(logp, logp, ADVANTAGES, MASK, reduction=reduction, weights=weights)[
            0
        ].item() == pytest.approx(expected)


def test_loss_clips_on_both_sides_only_where_it_helps():
    logp = torch.log(torch.tensor([[1.5], [1.5], [0.5], [0.5]])).requires_grad_()
    advantages, mask = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.ones(4, 1).bool()
    # 1.5, A=1: min(1.5, 1.2); 1.5, A=-1: min(-1.5, -1.2); 0.5, A=1: min(0.5, 0.8); 0.5, A=-1: min(-0.5, -0.8)
    loss, stats = policy_loss(logp, torch.zeros(4, 1), advantages, mask)
    assert loss.item() == pytest.approx((-1.2 + 1.5 - 0.5 + 0.8) / 4)
    assert stats["ratio"] == pytest.approx(1.0) and stats["clip_fraction"] == 0.5
    loss.backward()
    torch.testing.assert_close(
        logp.grad, torch.tensor([[0.0], [1.5], [-0.5], [0.0]]) / 4
    )  # d(-ratio*A)/dlogp = -ratio*A
    loss, _ = policy_loss(logp, torch.zeros(4, 1), advantages, mask, clip_low=0.1, clip_high=0.28)
    assert loss.item() == pytest.approx((-1.28 + 1.5 - 0.5 + 0.9) / 4)


@pytest.mark.parametrize(
    ("d", "kl"),
    [
        (math.log(2), 2 - math.log(2) - 1),
        (-math.log(2), 0.5 + math.log(2) - 1),
        (0.0, 0.0),
        (50.0, math.exp(10) - 11),
        (-50.0, math.exp(-10) + 10 - 1),
    ],
)
def test_loss_adds_the_clamped_k3_divergence(d, kl):
    logp = torch.full((1, 2), -3.0)
    loss, stats = policy_loss(
        logp, logp, torch.zeros(1), torch.ones(1, 2).bool(), ref_logp=logp + d, beta=0.5
    )
    assert loss.item() == pytest.approx(0.5 * kl, rel=1e-5, abs=1e-6)
    assert stats["kl"] == pytest.approx(kl, rel=1e-5, abs=1e-6)


def test_kl_gradient_pulls_to_the_reference():
    logp = torch.tensor([[-1.0]], requires_grad=True)
    loss, _ = policy_loss(
        logp,
        logp.detach(),
        torch.zeros(1),
        torch.ones(1, 1).bool(),
        ref_logp=logp.detach() + math.log(2),
        beta=0.5,
    )
    loss.backward()
    assert logp.grad.item() == pytest.approx(0.5 * (1 - 2))  # d k3 / d logp = 1 - exp(d)


def test_gradient_at_ratio_one_is_minus_advantage_over_length():
    logp = torch.full((2, 3), -2.0, requires_grad=True)
    policy_loss(logp, logp.detach(), ADVANTAGES, MASK)[0].backward()
    torch.testing.assert_close(
        logp.grad, torch.tensor([[-1 / 2, -1 / 2, 0], [3.0, 0, 0]]) / 2
    )  # / 2: mean over two completions


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_padding_may_hold_anything(reduction, poison):
    generator = torch.Generator().manual_seed(0)
    clean = [
        torch.rand(2, 3, generator=generator) for _ in range(4)
    ]  # logp, old_logp, ref_logp, weights
    outcomes = []
    for fill in (0.0, poison):
        logp, old, ref, weights = (values.masked_fill(~MASK, fill) for values in clean)
        logp.requires_grad_()
        loss, stats = policy_loss(
            logp, old, ADVANTAGES, MASK, ref, reduction=reduction, weights=weights
        )
        loss.backward()
        outcomes.append((loss.item(), logp.grad.tolist(), stats))
    assert outcomes[0] == outcomes[1]
    assert math.isfinite(outcomes[0][0])


def test_loss_refuses_an_unknown_reduction():
    with pytest.raises(ValueError, match="median"):
        policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), ADVANTAGES, MASK, reduction="median")


# ------------------------------------------------------------------------------------------------------- token weights


def two_rollouts():
    """Distributions over two tokens: position 0 both (.5, .5); position 1 (.8, .2) and (.2, .8); position 2 (.9, .1), ended; 3 nobody."""
    probs = torch.tensor(
        [
            [[0.5, 0.5], [0.8, 0.2], [0.9, 0.1], [0.9, 0.1]],
            [[0.5, 0.5], [0.2, 0.8], [0.7, 0.3], [0.2, 0.8]],
        ]
    )
    return probs.log() + 3, torch.tensor(
        [[1, 1, 1, 0], [1, 1, 0, 0]]
    )  # + 3: logits are not normalised


def test_token_weights_by_hand():
    logits, mask = two_rollouts()
    # position 0: m = own, divergence 0.
    # position 1: m = (ln .4, ln .4); d = -ln 2, ln 2 for both rollouts: (.5 + ln 2 - 1) + (2 - ln 2 - 1) = 0.5.
    # position 2: second is uniform. First: d = ln(.5/.9)/2, ln(.5/.1)/2 -> exp = sqrt(5)/3, sqrt(5), sum of d = ln(25/9)/2 = ln(5/3):
    #   first = 4 sqrt(5)/3 - ln(5/3) - 2; second has -d: exp = 3/sqrt(5), 1/sqrt(5): 4/sqrt(5) + ln(5/3) - 2; mean = 0.385139
    first, second = (
        4 * math.sqrt(5) / 3 - math.log(5 / 3) - 2,
        4 / math.sqrt(5) + math.log(5 / 3) - 2,
    )
    third = (first + second) / 2 / 0.5
    assert third == pytest.approx(0.770278, abs=1e-6)
    expected = torch.tensor([1.0, 1.7, 1 + 0.7 * third, 1.0])
    torch.testing.assert_close(token_weights(logits, mask), expected.expand(2, 4))
    expected = torch.tensor([1.0, 3.0, 1 + 2 * third, 1.0])
    torch.testing.assert_close(token_weights(logits, mask, alpha=3.0), expected.expand(2, 4))


def test_token_weights_clamp_the_difference():
    # position 1: logits (40, 0) and (0, 40): log p = 0, -40 and -40, 0; m = -20; d = -20, 20 -> -11, 11 for both.
    # position 2: (30, 0) and (0, 30): d = -15, 15 -> the same -11, 11. Unclamped they would differ by e^5.
    logits = torch.tensor(
        [[[0.0, 0.0], [40.0, 0.0], [30.0, 0.0]], [[0.0, 0.0], [0.0, 40.0], [0.0, 30.0]]]
    )
    torch.testing.assert_close(
        token_weights(logits, torch.ones(2, 3)), torch.tensor([[1.0, 1.7, 1.7]]).expand(2, 3)
    )


def test_token_weights_range_and_poison():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 6, 9, generator=generator)
    mask = torch.arange(6)[None] < torch.tensor([6, 2, 4, 3])[:, None]
    weights = token_weights(logits, mask, alpha=1.7)
    assert weights.min() == 1 and weights.max() == pytest.approx(1.7)
    for poison in (NAN, INF, -INF):
        assert torch.equal(
            token_weights(logits.masked_fill(~mask[..., None], poison), mask), weights
        )


def test_token_weights_of_equal_rollouts_or_none_are_one():
    logits = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1)
    torch.testing.assert_close(token_weights(logits, torch.ones(4, 3)), torch.ones(4, 3))
    assert torch.equal(token_weights(logits, torch.zeros(4, 3)), torch.ones(4, 3))


# ------------------------------------------------------------------------------------------------------------ sampling

PROBS = torch.tensor(
    [0.15, 0.5, 0.05, 0.3]
)  # sorted: tokens 1, 3, 0, 2 with cumulative .5, .8, .95, 1


def draw(uniforms, **settings):
    return sample_tokens(
        PROBS.log().expand(len(uniforms), -1), torch.tensor(uniforms), **settings
    ).tolist()


def test_sample_tokens_inverts_the_cumulative_distribution():
    assert draw([0.0, 0.49, 0.51, 0.79, 0.81, 0.94, 0.96, 1 - 2**-24]) == [1, 1, 3, 3, 0, 0, 2, 2]


def test_sample_tokens_greedy_and_temperature():
    assert draw([0.0, 0.99], temperature=0) == [1, 1]
    # temperature .5 squares: .25, .09, .0225, .0025 over .365 -> cumulative .6849, .9315, .9932
    assert draw([0.68, 0.69, 0.93, 0.935, 0.99, 0.995], temperature=0.5) == [1, 3, 3, 0, 0, 2]


def test_top_p_keeps_the_token_that_crosses_it():
    # .6: token 1 (.5) does not reach it, token 3 crosses it and stays; over .8 the border is .5 / .8 = .625
    assert draw([0.0, 0.62, 0.63, 1 - 2**-24], top_p=0.6) == [1, 1, 3, 3]
    assert draw([0.0, 1 - 2**-24], top_p=0.4) == [1, 1]  # the first token always stays
    assert draw([0.94, 1 - 2**-24], top_p=0.9) == [0, 0]


def test_top_k_keeps_the_likeliest_and_top_p_their_nucleus():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    uniforms = [0.0, 0.3, 0.56, 0.58, 0.99]
    pick = lambda **settings: [
        sample_tokens(logits, torch.tensor([u]), **settings).item() for u in uniforms
    ]  # noqa: E731
    assert pick(top_k=2) == [0, 0, 0, 1, 1]  # 4/7 = 0.571 and 3/7
    assert pick(top_k=9) == [0, 0, 1, 1, 3] == pick()
    assert pick(top_k=3, top_p=0.75) == [
        0,
        0,
        0,
        1,
        1,
    ]  # of 4/9, 3/9, 2/9 the first two reach 0.75; without top_k three would stay
    assert pick(top_k=1) == [0] * 5


def test_banned_tokens_are_never_sampled():
    logits = PROBS.log().clone()
    logits[[1, 2]] = -INF
    uniforms = torch.linspace(0, 1 - 2**-24, 1001)
    sampled = sample_tokens(logits.expand(1001, -1), uniforms)
    assert set(sampled.tolist()) == {0, 3}
    assert (sampled == 3).float().mean().item() == pytest.approx(
        2 / 3, abs=0.002
    )  # .3 / (.3 + .15)


def test_row_uniforms_depend_on_their_own_seed_only():
    rows = row_uniforms([7, 8, 7], 20)
    assert rows.shape == (3, 20) and rows.min() >= 0 and rows.max() < 1
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    assert torch.equal(row_uniforms([8], 20)[0], rows[1])
    state = torch.get_rng_state()
    row_uniforms([7], 5)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------- slots, frame use, the mask


def test_slot_shares_by_hand():
    # frames at 0 1 2 3 4 s, inside [1, 3): 0 1 1 0 0; two frames a slot, the last slot has one
    assert slot_shares([0, 1, 2, 3, 4], [(1, 3)], 3).tolist() == [0.5, 0.5, 0]
    assert slot_shares([0, 1, 2, 3], [(0, 1), (2, 9)], 2).tolist() == [0.5, 1]
    assert slot_shares([0, 1, 2], [], 3).tolist() == [0, 0, 0]


def test_group_attention_sees_what_a_mask_by_hand_allows():
    # two rows, 4 query heads on 2 key heads; columns: p0 p1 p2 a0 a1 b0 b1, p0 of the second row is padding
    causal = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 1, 0, 0],
            [1, 1, 1, 0, 0, 1, 0],  # b0: not a
            [1, 1, 1, 0, 0, 1, 1],
        ]
    ).bool()
    allowed = torch.stack([causal, causal])[:, None].clone()
    allowed[1, :, 1:, 0] = False
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 7, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)
    )
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    weights = scores.masked_fill(~allowed, -INF).softmax(-1)
    expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)  # (B, S, heads, d)
    valid = torch.ones(2, 7, 1, 1)
    valid[1, 0] = 0
    probe = torch.randn(2, 7, 4, 8, generator=generator) * valid
    grads = torch.autograd.grad((expected * probe).sum(), (query, key, value))
    module = SimpleNamespace(layer_idx=1)
    for checkpointed in (False, True):
        layout = Layout([0, 1], group=2, length=2, layer=2, checkpointed=checkpointed)
        with torch.no_grad():
            key[1, :, 0], value[1, :, 0] = 99.0, NAN  # padding holds poison
        attended, _ = group_attention(module, query, key, value, None, layout, scaling=0.3)
        torch.testing.assert_close(attended * probe, expected * probe)
        for one, two in zip(
            torch.autograd.grad((attended * probe).sum(), (query, key, value)), grads, strict=True
        ):
            torch.testing.assert_close(one[0], two[0], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(one[1, :, 1:], two[1, :, 1:], atol=1e-6, rtol=1e-5)
            assert one[1, :, 0].abs().max() == 0
        shares = weights.mean(1)[:, 3:, :3].unflatten(1, (2, 2))  # (B, G, T, P)
        torch.testing.assert_close(layout.recorded, shares.detach())
        assert layout.recorded[1, :, :, 0].abs().max() == 0 and not layout.recorded.requires_grad


def test_group_attention_of_a_masked_step_folds_the_query_heads():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, columns, 8, generator=generator)
        for heads, columns in ((4, 3), (2, 6), (2, 6))
    )
    allowed = torch.rand(2, 1, 3, 6, generator=generator) < 0.6
    allowed[..., 0] = True
    expected = (
        (query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3)
        .masked_fill(~allowed, -INF)
        .softmax(-1)
    )
    attended, _ = group_attention(SimpleNamespace(), query, key, value, allowed, scaling=0.3)
    torch.testing.assert_close(attended, (expected @ value.repeat_interleave(2, 1)).transpose(1, 2))


def prompts_of(visual, slots):
    """Prompts with what rollout_frame_use reads: visual (B, P) 0/1 and slots."""
    visual = torch.tensor(visual).bool()
    nothing = torch.zeros(visual.shape, dtype=torch.long)
    return Prompts(
        nothing, torch.ones_like(visual), nothing.expand(3, -1, -1), visual, None, None, slots
    )


def test_frame_use_from_hidden_states_by_hand():
    # row 0: visual columns 1, 2 are slots (1, 0) and (0, 1). c_1 = (5, 0), padding; c_2 = (1, 1), (2, 2). Rows 1, 2: image and text.
    prompts = prompts_of([[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], [2, 1, 0])
    row = torch.tensor([[9.0, 9], [1, 0], [0, 1], [9, -9], [5, 0], [NAN, NAN], [1, 1], [2, 2]])
    hidden = torch.stack([row, row, row])
    mask = torch.tensor([[[1, 0], [1, 1]]] * 3).bool()
    uses = rollout_frame_use(prompts, mask, hidden)
    # cosines of c_1: 1, 0 -> softmax(10, 0); of c_2: equal
    torch.testing.assert_close(
        uses[0][0], torch.tensor([1 / (1 + math.exp(-10)), 1 / (1 + math.exp(10))])
    )
    torch.testing.assert_close(uses[0][1], torch.tensor([0.5, 0.5]))
    assert uses[1:] == [[None, None], [None, None]]
    uses = rollout_frame_use(prompts, mask, hidden, tau=1.0)
    torch.testing.assert_close(uses[0][0], torch.tensor([math.e / (1 + math.e), 1 / (1 + math.e)]))


def test_frame_use_pools_the_tokens_of_a_slot():
    # slots of two tokens: (1, 0), (0, 1) -> max (1, 1), mean (.5, .5); (1, 0), (-1, 0) -> max (1, 0), mean (0, 0). One response (1, 0).
    prompts, mask = prompts_of([[1, 1, 1, 1]], [2]), torch.ones(1, 1, 1).bool()
    hidden = torch.tensor([[[1.0, 0], [0, 1], [1, 0], [-1, 0], [1, 0]]])
    expected = torch.tensor([math.sqrt(0.5), 1.0])
    torch.testing.assert_close(
        rollout_frame_use(prompts, mask, hidden)[0][0], torch.softmax(expected / 0.1, 0)
    )
    expected = torch.tensor([math.sqrt(0.5), 0.0])
    torch.testing.assert_close(
        rollout_frame_use(prompts, mask, hidden, pool="mean")[0][0],
        torch.softmax(expected / 0.1, 0),
    )


def test_frame_use_order_of_mean_and_softmax():
    # responses (1, 0) and (-1, 0) to frames (1, 0), (0, 1): the mean cosine is 0, 0; per token softmax(1, 0) and softmax(-1, 0)
    prompts, mask = prompts_of([[1, 1]], [2]), torch.ones(1, 1, 2).bool()
    hidden = torch.tensor([[[1.0, 0], [0, 1], [1, 0], [-1, 0]]])
    torch.testing.assert_close(
        rollout_frame_use(prompts, mask, hidden, tau=0.5)[0][0], torch.tensor([0.5, 0.5])
    )
    hidden = torch.tensor([[[1.0, 0], [0, 1], [1, 0], [0.6, 0.8]]])  # cosines (1, 0), (.6, .8)
    expected = (
        torch.softmax(torch.tensor([2.0, 0]), 0) + torch.softmax(torch.tensor([1.2, 1.6]), 0)
    ) / 2
    torch.testing.assert_close(
        rollout_frame_use(prompts, mask, hidden, tau=0.5, order="softmax_mean")[0][0], expected
    )


def test_frame_use_from_attention_by_hand():
    prompts = prompts_of([[0, 1, 1, 0], [0, 0, 1, 0]], [2, 1])
    # c_1: visual mass .3 and .1; c_2: (.1 + .1) and (.2 + .4); text columns and padding do not count
    weights = torch.tensor(
        [[[0.6, 0.3, 0.1, 0.0], [NAN] * 4], [[0.7, 0.1, 0.2, 0.0], [0.1, 0.1, 0.4, 0.4]]]
    )
    mask = torch.tensor([[[1, 0], [1, 1]]] * 2).bool()
    uses = rollout_frame_use(prompts, mask, attention=torch.stack([weights, weights]))
    torch.testing.assert_close(uses[0][0], torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(uses[0][1], torch.tensor([0.25, 0.75]))
    assert uses[1] == [None, None]


# --------------------------------------------------------------------------------------------- the model, against plain HF


@pytest.fixture(scope="module")
def group(items, toy_model):
    """(prompts, completions (4, 3, 5), mask) of random tokens with different lengths."""
    prompts = collate(items, toy_model)
    assert len({len(item["input_ids"]) for item in items}) >= 3 and prompts.slots == [3, 1, 3, 0]
    completions = torch.randint(0, 256, (4, 3, 5), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([[5, 2, 4], [1, 5, 3], [4, 4, 2], [3, 1, 5]])
    return prompts, completions, torch.arange(5) < lengths[..., None]


def hf_inputs(item, model, completion=None):
    """What a user of transformers alone would pass to the model for one unpadded row."""
    ids = item["input_ids"] if completion is None else torch.cat([item["input_ids"], completion])
    is_image, is_video = ids == model.config.image_token_id, ids == model.config.video_token_id
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    if item["grid_thw"] is None:
        return inputs
    inputs["mm_token_type_ids"] = (is_image.int() + 2 * is_video.int())[None]
    if is_image.any():
        return {
            **inputs,
            "pixel_values": item["pixel_values"],
            "image_grid_thw": item["grid_thw"][None],
        }
    return {
        **inputs,
        "pixel_values_videos": item["pixel_values"],
        "video_grid_thw": item["grid_thw"][None],
        "second_per_grid_ts": torch.tensor([item["second_per_grid"]]),
    }


def hf_logps(model, items, completions, mask):
    """(B, G, T) log-probs from one plain forward a rollout; 0 on padding."""
    rows = []
    for b, item in enumerate(items):
        for g in range(completions.shape[1]):
            completion = completions[b, g][mask[b, g]]
            logits = model(**hf_inputs(item, model, completion)).logits[
                0, len(item["input_ids"]) - 1 : -1
            ]  # (L, V)
            logp = torch.log_softmax(logits.float(), -1).gather(-1, completion[:, None]).squeeze(1)
            rows.append(torch.cat([logp, logp.new_zeros(completions.shape[2] - len(completion))]))
    return torch.stack(rows).view(completions.shape)


def gradients(model, loss):
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameters[name]) if grad is None else grad
        for name, grad in zip(parameters, grads, strict=True)
    }


@contextmanager
def checkpointing(model, on):
    """The model in train mode with its layers checkpointed, or as it is."""
    if on:
        checkpoint_activations(model)
        model.train()
    yield
    checkpoint_activations(model, on=False)
    model.eval()


def assert_same_gradients(one, other, atol=1e-5):
    for name in one:
        scale = max(1.0, one[name].abs().max().item())
        torch.testing.assert_close(
            other[name] / scale,
            one[name] / scale,
            atol=atol,
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_collate_gives_hf_positions(items, toy_model):
    prompts = collate(items, toy_model)
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert (
            prompts.mask[row].tolist()
            == [False] * (prompts.mask.shape[1] - length) + [True] * length
        )
        assert torch.equal(prompts.input_ids[row, -length:], item["input_ids"])
        inputs = hf_inputs(item, toy_model)
        if item["grid_thw"] is None:
            expected = torch.arange(length).expand(3, -1)
        else:
            expected = toy_model.model.get_rope_index(
                **{name: value for name, value in inputs.items() if "pixel" not in name}
            )[0][:, 0]
        assert torch.equal(prompts.position_ids[:, row, -length:], expected)


def test_packed_repeated_and_plain_forward_agree(items, group, toy_model):
    prompts, completions, mask = group
    policy = Policy(toy_model)
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2)) * mask
    expected = hf_logps(toy_model, items, completions, mask)
    expected_grads = gradients(toy_model, (expected * weights).sum())
    assert all(
        grad.abs().max() > 1e-3 for name, grad in expected_grads.items() if name.endswith("weight")
    )  # the comparison says something
    for packed, on in product((True, False), (True, False)):
        with checkpointing(toy_model, on):
            logp = policy(prompts, completions, mask, packed=packed)[0]
            assert logp.shape == mask.shape
            torch.testing.assert_close(logp * mask, expected, atol=1e-5, rtol=0)
            assert_same_gradients(expected_grads, gradients(toy_model, (logp * weights).sum()))


def test_entropy_is_that_of_the_plain_forward(items, group, toy_model):
    prompts, completions, mask = group
    with torch.no_grad():
        entropy = Policy(toy_model)(prompts, completions, mask)[1]
        completion = completions[0, 2][mask[0, 2]]
        logits = toy_model(**hf_inputs(items[0], toy_model, completion)).logits[
            0, len(items[0]["input_ids"]) - 1 : -1
        ]
    torch.testing.assert_close(
        entropy[0, 2][mask[0, 2]],
        torch.distributions.Categorical(logits=logits).entropy(),
        atol=1e-4,
        rtol=1e-4,
    )


def test_token_weights_of_the_forward_are_those_of_each_groups_logits(items, group, toy_model):
    prompts, completions, mask = group
    with torch.no_grad():
        packed, repeated = (
            Policy(toy_model)(prompts, completions, mask, one, weight_alpha=1.7)[4]
            for one in (True, False)
        )
        assert Policy(toy_model)(prompts, completions, mask)[4] is None
        for b, item in enumerate(items):
            logits = torch.full(
                (3, 5, toy_model.config.text_config.vocab_size), NAN
            )  # poison where a rollout has ended
            for g in range(3):
                completion = completions[b, g][mask[b, g]]
                plain = toy_model(**hf_inputs(item, toy_model, completion)).logits[
                    0, len(item["input_ids"]) - 1 : -1
                ]
                logits[g, : len(completion)] = plain
            expected = token_weights(logits, mask[b], alpha=1.7)
            assert expected.max() == pytest.approx(1.7) and expected[
                :, mask[b].any(0)
            ].min() == pytest.approx(1)
            torch.testing.assert_close(packed[b], expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(repeated[b], expected, atol=1e-4, rtol=0)


class Letters:
    """A tokenizer whose token i is the i-th piece."""

    pieces = [
        "<think>",
        "so",
        "</think>",
        "<answer>",
        "B",
        " C",
        "</answer>",
        "<ans",
        "wer>A",
        "</",
        "answer>.",
        "é",
    ]

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def test_texts_begin_with_what_the_prompt_has_said(talker, toy_processor, items):
    thinking = copy.copy(toy_processor)
    thinking.chat_template = toy_processor.chat_template.replace(
        "assistant\n", "assistant\n<think>\n"
    )
    sampled = [
        sample_texts(talker, one, collate([items[3]], talker), [2], [0, 1], 6)
        for one in (toy_processor, thinking)
    ]
    (tokens, _, plain), (same, _, opened) = sampled
    assert torch.equal(tokens, same)
    assert opened == [f"<think>\n{text}" for text in plain]


@pytest.mark.parametrize(
    ("ids", "inside"),
    [
        (
            [0, 1, 2, 3, 4, 5, 6],
            [4, 5],
        ),  # <think>so</think><answer>B C</answer>: the tokens B and C
        ([3, 4, 6, 1, 3, 5, 6], [5]),  # the last of two blocks
        ([11, 7, 8, 9, 10], [2]),  # tags and answer share tokens: the token that holds the A
        ([3, 4, 6, 3, 5], [1]),  # a block that is not closed is none; the one before it is
        ([3, 6], []),
        ([0, 1, 2], []),
        ([4, 6], []),
        ([3, 4], []),
        ([6, 3, 4], []),
    ],
)
def test_answer_likelihoods(ids, inside):
    logp = -torch.arange(1.0, 9.0)  # of token t: -(t + 1)
    row = torch.tensor([ids + [1] * (8 - len(ids))])
    mask = torch.arange(8)[None] < len(ids)
    (value,) = answer_likelihoods(Letters(), row, mask, logp.masked_fill(~mask[0], NAN)[None])
    expected = torch.tensor([-(t + 1.0) for t in inside]).mean().exp()  # of nothing: NaN
    torch.testing.assert_close(value, expected, equal_nan=True)


@pytest.mark.parametrize("answer", ["B", "é", "a é", "日本", "😀", "12.5"])
def test_answer_likelihoods_with_a_real_tokenizer(toy_processor, answer):
    tokenizer, text = (
        toy_processor.tokenizer,
        f"<think>0s red 2. é</think><answer>{answer}</answer>",
    )
    encoded = tokenizer(
        text, return_offsets_mapping=True
    )  # characters in two tokens: both have its offsets
    begin = text.index("<answer>") + len("<answer>")
    inside = [
        place
        for place, (start, end) in enumerate(encoded["offset_mapping"])
        if end > begin and start < begin + len(answer)
    ]
    logp = torch.tensor([[-0.01 * place**2 for place in range(len(encoded["input_ids"]))]])
    (value,) = answer_likelihoods(
        tokenizer, torch.tensor([encoded["input_ids"]]), torch.ones_like(logp), logp
    )
    torch.testing.assert_close(value, logp[0, inside].mean().exp())


def test_hidden_states_and_attention_agree_with_repeated_and_eager(items, group, toy_model):
    prompts, completions, mask = group
    layers = {"hidden_layers": (0, 2, -1), "attention_layer": 2}
    with torch.no_grad():
        _, _, hidden, attention, _ = Policy(toy_model)(prompts, completions, mask, **layers)
        _, _, hidden_repeated, attention_repeated, _ = Policy(toy_model)(
            prompts, completions, mask, packed=False, **layers
        )
    assert set(hidden) == {0, 2, -1} and not any(states.requires_grad for states in hidden.values())
    valid = torch.cat([prompts.mask, mask.flatten(1)], dim=1)
    for layer in hidden:
        torch.testing.assert_close(
            hidden[layer][valid], hidden_repeated[layer][valid], atol=2e-5, rtol=0
        )
    torch.testing.assert_close(attention[mask], attention_repeated[mask], atol=1e-5, rtol=0)

    eager = copy.deepcopy(toy_model)
    eager.set_attn_implementation("eager")
    prompt_length = prompts.mask.shape[1]
    for b, item in enumerate(items):
        for g in range(3):
            completion, length = completions[b, g][mask[b, g]], len(item["input_ids"])
            with torch.no_grad():
                output = eager(
                    **hf_inputs(item, eager, completion),
                    output_attentions=True,
                    output_hidden_states=True,
                )
            expected = output.attentions[1][0].mean(0)[length:, :length]  # (L, prompt)
            recorded = attention[b, g][mask[b, g]]
            torch.testing.assert_close(
                recorded[:, prompt_length - length :], expected, atol=1e-5, rtol=0
            )
            assert (
                recorded[:, : prompt_length - length].abs().max() == 0
                if prompt_length > length
                else True
            )
            begin = prompt_length + g * 5
            for layer in (0, 2, -1):
                states = hidden[layer][b, begin : begin + 5][mask[b, g]]
                torch.testing.assert_close(
                    states, output.hidden_states[layer][0, length:], atol=2e-5, rtol=0
                )
                states = hidden[layer][b, prompt_length - length : prompt_length]
                torch.testing.assert_close(
                    states, output.hidden_states[layer][0, :length], atol=2e-5, rtol=0
                )


@pytest.mark.parametrize("packed", [True, False])
def test_padding_tokens_change_nothing(group, toy_model, packed):
    prompts, completions, mask = group
    other = copy.copy(prompts)
    other.input_ids = torch.where(prompts.mask, prompts.input_ids, torch.tensor(77))
    poisoned = torch.where(mask, completions, torch.tensor(99))
    results = []
    for inputs in ((prompts, completions), (other, poisoned)):
        logp, _, hidden, attention, _ = Policy(toy_model)(
            *inputs, mask, packed=packed, hidden_layers=(-1,), attention_layer=1
        )
        valid = torch.cat([prompts.mask, mask.flatten(1)], dim=1)
        results.append(
            (logp[mask], hidden[-1][valid], attention[mask], gradients(toy_model, logp[mask].sum()))
        )
    for one, two in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)
    assert_same_gradients(results[0][3], results[1][3])


def test_text_alone_keeps_the_vision_tower_in_the_graph(items, toy_model):
    prompts = collate([items[3], items[3]], toy_model)
    assert prompts.pixel_values is None
    completions, mask = (
        torch.randint(0, 256, (2, 2, 3), generator=torch.Generator().manual_seed(0)),
        torch.ones(2, 2, 3).bool(),
    )
    logp = Policy(toy_model)(prompts, completions, mask)[0]
    torch.testing.assert_close(
        logp, hf_logps(toy_model, [items[3]] * 2, completions, mask), atol=1e-5, rtol=0
    )
    vision = [parameter for name, parameter in toy_model.named_parameters() if ".visual." in name]
    grads = torch.autograd.grad(
        logp.sum(), vision
    )  # raises if one is unused: ZeRO-3 would then wait for ranks that use it
    assert all(grad.abs().max() == 0 for grad in grads)


def test_other_kernels_repeat_the_prompt_and_say_so(items, group, toy_model, talker, monkeypatch):
    said = []
    monkeypatch.setattr(policy_module.logger, "warning_once", said.append)
    prompts, completions, mask = group
    eager = copy.deepcopy(toy_model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        logp, _, hidden, attention, _ = Policy(eager)(
            prompts, completions, mask, hidden_layers=(-1,)
        )
        expected, _, states, *_ = Policy(toy_model)(prompts, completions, mask, hidden_layers=(-1,))
    assert len(said) == 1 and "eager" in said[0] and "repeats its prompt" in said[0]
    torch.testing.assert_close(logp[mask], expected[mask], atol=1e-5, rtol=0)
    valid = torch.cat([prompts.mask, mask.flatten(1)], dim=1)
    torch.testing.assert_close(hidden[-1][valid], states[-1][valid], atol=2e-5, rtol=0)
    assert attention is None
    with pytest.raises(ValueError, match="no attention of layer 1"):
        Policy(eager)(prompts, completions, mask, attention_layer=1)

    eager = copy.deepcopy(talker)
    eager.set_attn_implementation("eager")
    counts, seeds = [2, 1, 3, 1], list(range(7))
    ours, same = (
        rollout(model, prompts, counts, seeds, 6, list(range(100)), banned_ids(model))
        for model in (eager, talker)
    )
    assert (
        torch.equal(ours[0], same[0])
        and torch.equal(ours[1], same[1])
        and len({int(row.sum()) for row in ours[1]}) > 1
    )


def test_a_packing_model_still_generates_alone_and_saves_no_trace(
    items, toy_model, talker, tmp_path
):
    plain = copy.deepcopy(talker)
    plain.model.language_model.config._attn_implementation = "sdpa"
    packing = Policy(copy.deepcopy(plain)).model
    ids = torch.tensor([[0, 0, 40, 41, 42], [50, 51, 52, 53, 54]])
    options = dict(
        attention_mask=torch.tensor([[0, 0, 1, 1, 1], [1] * 5]), max_new_tokens=4, do_sample=False
    )
    assert torch.equal(packing.generate(ids, **options), plain.generate(ids, **options))
    packing.save_pretrained(tmp_path)
    assert '"group"' not in (tmp_path / "config.json").read_text()


def test_other_families_agree_with_their_plain_forward(other_family):
    model, family_items = other_family
    prompts = collate(family_items, model)
    completions = torch.randint(0, 256, (3, 2, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(4) < torch.tensor([[4, 2], [3, 4], [1, 4]])[..., None]
    rows = []
    for b, item in enumerate(family_items):
        for completion, valid in zip(completions[b], mask[b], strict=True):
            inputs = hf_inputs(item, model, completion[valid])
            inputs.pop("second_per_grid_ts", None)
            logits = model(**inputs).logits[0, len(item["input_ids"]) - 1 : -1]
            logp = torch.log_softmax(logits, -1).gather(-1, completion[valid][:, None]).squeeze(1)
            rows.append(torch.nn.functional.pad(logp, (0, 4 - len(logp))))
    expected = torch.stack(rows).view(3, 2, 4)
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2)) * mask
    grads = gradients(model, (expected * weights).sum())
    assert all(grad.abs().max() > 1e-4 for name, grad in grads.items() if name.endswith("weight"))
    policy, atol = (
        Policy(model),
        1e-4 if model.config.model_type == "qwen3_5" else 1e-5,
    )  # its recurrence adds up in another order
    assert policy.packs == (model.config.model_type in ("qwen2_vl", "qwen3_vl"))
    layer = 1 if policy.packs else None
    for packed, on in product((True, False), (True, False)):
        with checkpointing(model, on):
            logp, _, hidden, attention, _ = policy(
                prompts, completions, mask, packed, hidden_layers=(-1,), attention_layer=layer
            )
            torch.testing.assert_close(logp * mask, expected, atol=1e-5, rtol=0)
            assert_same_gradients(grads, gradients(model, (logp * weights).sum()), atol)
        uses = [rollout_frame_use(prompts, mask, hidden[-1])]
        uses += [rollout_frame_use(prompts, mask, attention=attention)] if policy.packs else []
        assert all(len(use[0][0]) == 3 and use[1] == use[2] == [None, None] for use in uses)


def test_other_families_sample_what_their_plain_forward_likes_best(other_family):
    model, family_items = other_family
    tokens, mask = rollout(
        model, collate(family_items, model), [1, 1, 1], [0, 1, 2], 5, [NO_EOS], temperature=0
    )
    assert mask.all()
    for item, row in zip(family_items, tokens, strict=True):
        inputs = hf_inputs(item, model, row)
        inputs.pop("second_per_grid_ts", None)
        with torch.no_grad():
            assert torch.equal(
                model(**inputs).logits[0, len(item["input_ids"]) - 1 : -1].argmax(-1), row
            )


def test_rows_of_other_families_that_have_ended_leave_the_batch(other_family):
    model, family_items = other_family
    ends = list(range(0, model.config.text_config.vocab_size, 6))

    def sample(which, seeds):
        prompts = collate([family_items[index] for index in which], model)
        return rows_of(
            *rollout(model, prompts, [1] * len(which), seeds, 12, ends, banned_ids(model))
        )

    together = sample([0, 1, 2, 0, 1, 2], range(6))
    assert len({len(row) for row in together}) > 2
    assert together == [sample([number % 3], [number])[0] for number in range(6)]


@pytest.mark.parametrize("packed", [True, False])
def test_chunks_of_the_vocabulary_change_nothing(group, toy_model, packed, monkeypatch):
    prompts, completions, mask = group
    results = []
    for size in (
        1 << 25,
        4 * 3 * 2 * toy_model.config.text_config.vocab_size,
    ):  # one chunk; chunks of two positions, the last of one
        monkeypatch.setattr(policy_module, "CHUNK_LOGITS", size)
        logp, entropy, _, _, weights = Policy(toy_model)(
            prompts, completions, mask, packed, weight_alpha=1.7
        )
        results.append((logp, entropy, weights, gradients(toy_model, (logp * mask).sum())))
    for one, two in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)
    assert_same_gradients(results[0][3], results[1][3])


def test_no_tensor_of_all_logits_lives(toy_model, group, monkeypatch):
    prompts, completions, mask = group
    vocabulary, largest = toy_model.config.text_config.vocab_size, 0
    monkeypatch.setattr(policy_module, "CHUNK_LOGITS", 4 * 3 * vocabulary)  # one position

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, (tuple, list)) else [output]:
                if (
                    torch.is_tensor(tensor)
                    and tensor.shape[-1:] == (vocabulary,)
                    and tensor.shape != toy_model.lm_head.weight.T.shape
                ):
                    largest = max(largest, tensor.numel())
            return output

    with Watch():
        logp, *_, weights = Policy(toy_model)(prompts, completions, mask, weight_alpha=1.7)
        (logp * weights)[mask].sum().backward()
    assert largest == policy_module.CHUNK_LOGITS


PEAK = """
import re, sys, torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from common.policy import Policy, Prompts
from grpo import policy_loss
memory = lambda name: int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024 / 1e9
text = dict(vocab_size=151936, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            pad_token_id=None, eos_token_id=None, bos_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]})
vision = dict(depth=1, hidden_size=64, num_heads=4, intermediate_size=128, out_hidden_size=256)
config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
prompts = Prompts(torch.randint(20, 9999, (1, 512)), torch.ones(1, 512).bool(), torch.arange(512).expand(3, 1, -1),
                  torch.zeros(1, 512).bool(), None, None, [0])
completions, mask = torch.randint(20, 9999, (1, 8, 512)), torch.ones(1, 8, 512).bool()
before = memory("VmRSS")
logp, *_, weights = Policy(model)(prompts, completions, mask, weight_alpha=1.7)
logp, mask, weights = logp[0], mask[0], weights[0]
policy_loss(logp, logp.detach(), torch.randn(8), mask, weights=weights)[0].backward()
assert model.lm_head.weight.grad.abs().max() > 0
print("GB over the model:", memory("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux only")
def test_peak_memory_of_a_large_vocabulary():
    # 4,096 tokens x 151,936 x 4 bytes are 2.5 GB once; the logits, their log-softmax and two gradients would be four times that
    done = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    assert float(done.stdout.split("model:")[1]) < 2.5


@pytest.mark.parametrize("packed", [True, False])
def test_features_of_a_frozen_tower_are_shared(group, toy_model, packed):
    prompts, completions, mask = group
    with torch.no_grad():
        features = Policy(toy_model).encode(prompts)
        expected = Policy(toy_model)(prompts, completions, mask)[0]
        shared = replace(
            prompts, features=features, pixel_values=torch.full_like(prompts.pixel_values, NAN)
        )  # not read again
        torch.testing.assert_close(
            Policy(toy_model)(shared, completions, mask, packed)[0], expected, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("graph", [False, True])
def test_a_prompt_is_encoded_and_prefilled_once(items, talker, graph):
    towers, inputs, model = [], [], copy.deepcopy(talker)
    model.model.visual.register_forward_pre_hook(
        lambda tower, args, kwargs: towers.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    model.model.language_model.register_forward_pre_hook(
        lambda language, args, kwargs: inputs.append(kwargs["inputs_embeds"].shape[:2]),
        with_kwargs=True,
    )
    prompts = collate(items, model)
    rollout(model, prompts, [3, 1, 2, 2], range(8), 5, [NO_EOS], banned_ids(model), graph=graph)
    assert towers == [3]  # two videos and an image, whatever the number of completions
    assert inputs == [prompts.input_ids.shape] + 4 * [
        (4, 3)
    ]  # then a token a completion; prompts of fewer are filled up


def test_one_step_moves_every_parameter(group, toy_model):
    prompts, completions, mask = group
    model = copy.deepcopy(toy_model).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    logp = Policy(model)(prompts, completions, mask)[0].flatten(0, 1)
    advantages = group_advantages(torch.arange(12.0).view(4, 3)).flatten()
    loss, _ = policy_loss(logp, logp.detach(), advantages, mask.flatten(0, 1), logp.detach() - 0.1)
    loss.backward()
    optimizer.step()
    still = [
        name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])
    ]
    assert not still, f"did not move: {still}"
    after = Policy(model)(prompts, completions, mask)[0].flatten(0, 1)
    assert (
        policy_loss(after, logp.detach(), advantages, mask.flatten(0, 1), logp.detach() - 0.1)[0]
        < loss
    )


@pytest.mark.parametrize("layer", [-1, 0, 5])
def test_a_layer_that_does_not_exist_is_an_error(group, toy_model, layer):
    # train.py's default --frame_use_layer is -1, which with --frame_use attention would match no layer and record nothing
    prompts, completions, mask = group
    with pytest.raises((ValueError, IndexError)), torch.no_grad():
        recorded = Policy(toy_model)(prompts, completions, mask, attention_layer=layer)[3]
        assert recorded is not None, "no attention was recorded, and nothing said so"


# ------------------------------------------------------------------------------------------------------------- rollouts


def rows_of(tokens, mask):
    return [row[valid].tolist() for row, valid in zip(tokens, mask, strict=True)]


def test_greedy_rollout_is_hf_generate(items, talker):
    prompts = collate(items, talker)
    eos = talker.config.text_config.eos_token_id
    tokens, mask = rollout(
        talker, prompts, [1, 2, 1, 1], [0] * 5, 12, [eos], banned_ids(talker), temperature=0
    )
    rows = rows_of(tokens, mask)
    assert rows[1] == rows[2]
    assert len({token for row in rows for token in row}) > 10  # not one token over and over
    for item, row in zip(items, [rows[0], rows[1], rows[3], rows[4]], strict=True):
        inputs = hf_inputs(item, talker)
        generated = talker.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=12,
            suppress_tokens=banned_ids(talker),
            eos_token_id=eos,
            pad_token_id=0,
        )
        expected = generated[0, len(item["input_ids"]) :].tolist()
        assert row == expected


def test_sampled_logps_are_those_of_the_packed_forward(items, talker):
    """A sampled token's uniform must fall in that token's interval of the packed forward's distribution (top_p 1): cache = no cache."""
    prompts = collate(items, talker)
    tokens, mask = rollout(
        talker, prompts, [2] * 4, list(range(8)), 6, [NO_EOS], banned_ids(talker), top_p=1.0
    )
    with torch.no_grad():
        for index, row in enumerate(tokens):
            item = items[index // 2]
            logits = (
                talker(**hf_inputs(item, talker, row))
                .logits[0, len(item["input_ids"]) - 1 : -1]
                .clone()
            )
            logits[:, banned_ids(talker)] = -INF
            probs, order = logits.softmax(-1).sort(-1, descending=True)
            above = (
                (probs.cumsum(-1))
                .gather(-1, (order == row[:, None]).long().argmax(-1, keepdim=True))
                .squeeze(1)
            )
            below = above - logits.softmax(-1).gather(-1, row[:, None]).squeeze(1)
            uniform = row_uniforms([index], 6)[0]
            assert ((below - 1e-4 <= uniform) & (uniform <= above + 1e-4)).all()


def test_rollout_gives_the_log_probs_of_a_forward(items, talker):
    prompts, ends = (
        collate(items, talker),
        list(range(0, talker.config.text_config.vocab_size, 5)),
    )  # rows end at different steps
    plain = rollout(
        talker,
        prompts,
        [2] * 4,
        range(8),
        8,
        ends,
        banned_ids(talker),
        temperature=0.7,
        top_p=0.9,
        top_k=50,
    )
    tokens, mask, logp = rollout(
        talker,
        prompts,
        [2] * 4,
        range(8),
        8,
        ends,
        banned_ids(talker),
        0.7,
        0.9,
        50,
        return_logp=True,
    )
    assert (
        torch.equal(tokens, plain[0])
        and torch.equal(mask, plain[1])
        and len(set(mask.sum(1).tolist())) > 2
    )
    with torch.no_grad():
        expected = Policy(talker)(prompts, tokens.view(4, 2, -1), mask.view(4, 2, -1))[0].flatten(
            0, 1
        )
    torch.testing.assert_close(
        logp[mask], expected[mask], atol=1e-5, rtol=0
    )  # at temperature 1, over the whole vocabulary
    assert (logp[~mask] == 0).all() and (logp[mask] < -0.01).any()


@pytest.mark.parametrize("steps", [1, 20])
def test_fixed_shapes_sample_the_same(items, talker, steps):
    """Rows that end at different steps, of prompts of different lengths and numbers of completions."""
    prompts, ends = collate(items, talker), list(range(0, talker.config.text_config.vocab_size, 12))
    options = dict(temperature=0.7, top_p=0.9, top_k=50, return_logp=True)
    rows = prompts, [3, 1, 2, 2], range(8), steps, ends, banned_ids(talker)
    tokens, mask, logp = rollout(talker, *rows, **options)
    assert steps == 1 or len(set(mask.sum(1).tolist())) > 3
    fixed = rollout(talker, *rows, **options, graph=True)
    assert torch.equal(fixed[0], tokens) and torch.equal(fixed[1], mask)
    torch.testing.assert_close(fixed[2], logp, atol=1e-4, rtol=0)


def test_other_families_sample_the_same_in_fixed_shapes(other_family):
    model, family_items = other_family
    rows = collate(family_items, model), [2, 1, 2], range(5), 6, [NO_EOS], banned_ids(model)
    assert torch.equal(rollout(model, *rows)[0], rollout(model, *rows, graph=True)[0])


def test_a_row_depends_on_its_own_seed_only(items, talker):
    many_ends = list(
        range(0, talker.config.text_config.vocab_size, 12)
    )  # rows end at different steps and leave the batch

    def sample(which, counts, seeds):
        return rows_of(
            *rollout(
                talker,
                collate([items[i] for i in which], talker),
                counts,
                seeds,
                20,
                many_ends,
                banned_ids(talker),
            )
        )

    together = sample([0, 1, 2, 3], [3, 1, 2, 2], [10, 11, 12, 20, 30, 31, 40, 41])
    assert len({len(row) for row in together}) >= 4 and len({tuple(row) for row in together}) == 8
    owners = [0, 0, 0, 1, 2, 2, 3, 3]
    for row, owner, seed in zip(together, owners, [10, 11, 12, 20, 30, 31, 40, 41], strict=True):
        assert sample([owner], [1], [seed]) == [row]
    assert sample([3, 2, 0], [1, 1, 2], [41, 30, 12, 10]) == [
        together[7],
        together[4],
        together[2],
        together[0],
    ]


def test_rollout_stops_at_eos_and_pads_with_it(items, talker):
    prompts = collate(items[:1], talker)
    free, _ = rollout(talker, prompts, [4], [1, 2, 3, 4], 16, [NO_EOS], banned_ids(talker))
    eos = [int(free[0, 3]), int(free[1, 7])]  # by construction at least two rows end
    tokens, mask = rollout(talker, prompts, [4], [1, 2, 3, 4], 16, eos, banned_ids(talker))
    assert tokens.shape == mask.shape and mask.dtype == torch.bool
    for row, full, valid in zip(tokens, free, mask, strict=True):
        ends = torch.isin(full, torch.tensor(eos)).nonzero()
        length = int(ends[0]) + 1 if len(ends) else 16
        assert valid.tolist() == [True] * length + [False] * (mask.shape[1] - length)
        assert torch.equal(row[:length], full[:length])
        assert (row[length:] == eos[0]).all()
    assert mask[0].sum() <= 4 and mask[1].sum() <= 8


def test_rollout_is_no_longer_than_its_longest_row(items, talker):
    prompts = collate(items[:1], talker)
    free, _ = rollout(talker, prompts, [1], [1], 16, [NO_EOS], temperature=0)
    eos = int(free[0, 2])
    tokens, mask = rollout(talker, prompts, [2], [1, 2], 16, [eos], temperature=0)
    length = free[0].tolist().index(eos) + 1
    assert tokens.shape == (2, length) and mask.all()


def test_banned_ids_never_appear(items, talker):
    prompts = collate(items[:2], talker)
    free, _ = rollout(talker, prompts, [4, 4], list(range(8)), 10, [NO_EOS], temperature=0)
    favourites = sorted(set(free.flatten().tolist()))
    for temperature in (0, 1.0):
        tokens, _ = rollout(
            talker,
            prompts,
            [4, 4],
            list(range(8)),
            10,
            [NO_EOS],
            favourites,
            temperature=temperature,
        )
        assert not set(tokens.flatten().tolist()) & set(favourites)


@pytest.mark.parametrize(
    "place", ["parameter_offload", "optimizer"]
)  # an engine that trains, one for inference
def test_sampling_takes_hooks_and_linear_off_and_puts_them_back(toy_model, place, monkeypatch):
    hooks = []
    offload = SimpleNamespace(
        setup_zero_stage3_hooks=lambda: hooks.append("on"),
        _remove_module_hooks=lambda: hooks.append("off"),
        forward_hooks=[1],
        backward_hooks=[2],
    )
    engine = SimpleNamespace(
        module=SimpleNamespace(model=toy_model),
        optimizer=SimpleNamespace(parameter_offload=offload)
        if place == "parameter_offload"
        else offload,
    )
    plain = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda *args: plain(*args)
    )  # as DeepSpeed's zero.Init leaves it
    wrapped = torch.nn.functional.linear
    for error in (None, RuntimeError("out of memory")):
        toy_model.train()
        with (
            pytest.raises(RuntimeError, match="out of memory") if error else nullcontext(),
            rollout.sampling(engine) as bare,
        ):
            assert bare is toy_model and not bare.training and torch.nn.functional.linear is plain
            assert hooks[-1] == "off" and offload.forward_hooks == offload.backward_hooks == []
            if error:
                raise error
        assert hooks[-1] == "on" and torch.nn.functional.linear is wrapped and toy_model.training
    toy_model.eval()
