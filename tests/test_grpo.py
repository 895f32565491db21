"""grpo.py: its pure functions against numbers derived by hand."""

import math

import pytest
import torch

from common.policy import Prompts
from grpo import (
    answer_likelihoods,
    group_advantages,
    policy_loss,
    rollout_frame_use,
    slot_shares,
    token_weights,
)

NAN, INF = float("nan"), float("inf")

# ------------------------------------------------------------------------------------ advantages


def test_advantages_use_the_unbiased_std_and_eps():
    # (0, 2, 4): mean 2, unbiased variance (4 + 0 + 4) / 2 = 4, std 2 (the biased one would be
    # 1.633)
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


def test_advantages_of_a_group_of_one_are_an_error():
    with pytest.raises(ValueError, match="two rollouts"):
        group_advantages(torch.tensor([[1.0], [2.0]]))


# ----------------------------------------------------------------------------------- policy loss
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
    # 1.5, A=1: min(1.5, 1.2); 1.5, A=-1: min(-1.5, -1.2); 0.5, A=1: min(0.5, 0.8); 0.5, A=-1:
    # min(-0.5, -0.8)
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


# --------------------------------------------------------------------------------- token weights


def two_rollouts():
    """Distributions over two tokens: position 0 both (.5, .5); position 1 (.8, .2) and (.2, .8);
    position 2 (.9, .1), ended; 3 nobody.
    """
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
    # position 1: m = (ln .4, ln .4); d = -ln 2, ln 2 for both rollouts: (.5 + ln 2 - 1) + (2 - ln 2
    # - 1) = 0.5.
    # position 2: second is uniform. First: d = ln(.5/.9)/2, ln(.5/.1)/2 -> exp = sqrt(5)/3,
    # sqrt(5), sum of d = ln(25/9)/2 = ln(5/3):
    #   first = 4 sqrt(5)/3 - ln(5/3) - 2; second has -d: exp = 3/sqrt(5), 1/sqrt(5): 4/sqrt(5) +
    # ln(5/3) - 2; mean = 0.385139
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
    # position 1: logits (40, 0) and (0, 40): log p = 0, -40 and -40, 0; m = -20; d = -20, 20 ->
    # -11, 11 for both.
    # position 2: (30, 0) and (0, 30): d = -15, 15 -> the same -11, 11. Unclamped they would differ
    # by e^5.
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


# ---------------------------------------------------------------------------- answer likelihoods


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


# ------------------------------------------------------------------------------------- frame use


def test_slot_shares_by_hand():
    # frames at 0 1 2 3 4 s, inside [1, 3): 0 1 1 0 0; two frames a slot, the last slot has one
    assert slot_shares([0, 1, 2, 3, 4], [(1, 3)], 3).tolist() == [0.5, 0.5, 0]
    assert slot_shares([0, 1, 2, 3], [(0, 1), (2, 9)], 2).tolist() == [0.5, 1]
    assert slot_shares([0, 1, 2], [], 3).tolist() == [0, 0, 0]


def prompts_of(visual, slots):
    """Prompts with what rollout_frame_use reads: visual (B, P) 0/1 and slots."""
    visual = torch.tensor(visual).bool()
    nothing = torch.zeros(visual.shape, dtype=torch.long)
    return Prompts(
        nothing,
        torch.ones_like(visual),
        nothing.expand(3, -1, -1),
        2 * visual,
        None,
        None,
        [1] * len(slots),
        slots,
    )


def test_frame_use_from_hidden_states_by_hand():
    # row 0: visual columns 1, 2 are slots (1, 0) and (0, 1). c_1 = (5, 0), padding; c_2 = (1, 1),
    # (2, 2). Rows 1, 2: image and text.
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
    # slots of two tokens: (1, 0), (0, 1) -> max (1, 1), mean (.5, .5); (1, 0), (-1, 0) -> max (1,
    # 0), mean (0, 0). One response (1, 0).
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
    # responses (1, 0) and (-1, 0) to frames (1, 0), (0, 1): the mean cosine is 0, 0; per token
    # softmax(1, 0) and softmax(-1, 0)
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
    # c_1: visual mass .3 and .1; c_2: (.1 + .1) and (.2 + .4); text columns and padding do not
    # count
    weights = torch.tensor(
        [[[0.6, 0.3, 0.1, 0.0], [NAN] * 4], [[0.7, 0.1, 0.2, 0.0], [0.1, 0.1, 0.4, 0.4]]]
    )
    mask = torch.tensor([[[1, 0], [1, 1]]] * 2).bool()
    uses = rollout_frame_use(prompts, mask, attention=torch.stack([weights, weights]))
    torch.testing.assert_close(uses[0][0], torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(uses[0][1], torch.tensor([0.25, 0.75]))
    assert uses[1] == [None, None]
