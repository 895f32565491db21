"""Stage 3: the algorithm of CF-GRPO (arXiv 2606.18441) without the machinery.

Rewards of a group of rollouts (Eq. 3-8), advantages (Eq. 9) and the clipped loss (Eq. 10), as
train.py runs them:

    terms = rewards(rollouts, uses, tokenizer, args)   # {name: (B, G)}: add a reward term there
    advantages = group_advantages(terms["total"])      # (B, G)
    loss, stats = policy_loss(logp, old_logp, advantages, mask, ref_logp)

Letters in shapes: B questions, G completions of each, N = B * G, P prompt tokens (left-padded),
T completion tokens (right-padded), L of one completion, S = P + G * T, D hidden size,
V vocabulary, K frames, t temporal slots of M visual tokens.
"""

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial

import torch

import reward

# ------------------------------------------------------------------ advantages and loss (Eq. 9-10)


def group_advantages(rewards, eps=1e-4, scale=True):
    """Advantages within each question's group (Eq. 9): (r - mean) / (std + eps).

    std is unbiased (G - 1), as in the release. Equal rewards give zeros up to rounding.

    Args:
        rewards: (B, G).
        scale: False leaves the division out (Dr. GRPO).
    Returns:
        (B, G).
    Errors: ValueError for groups of one, which have no std.
    """
    if scale and rewards.shape[1] < 2:
        raise ValueError(
            "a group needs at least two rollouts for its standard deviation (--num_generations)"
        )
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if not scale:
        return centred
    return centred / (rewards.std(dim=1, keepdim=True) + eps)


def all_equal(rewards):
    """(B, G) -> (B,) bool: the group's rewards are equal, so they carry no signal."""
    return rewards.amax(dim=1) - rewards.amin(dim=1) < 1e-6


def policy_loss(
    logp,
    old_logp,
    advantages,
    mask,
    ref_logp=None,
    beta=0.04,
    clip_low=0.2,
    clip_high=0.2,
    reduction="sequence",
    weights=None,
):
    """Clipped policy loss with a KL penalty (Eq. 10).

    Per token: -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) + beta * k3, where
    ratio = exp(logp - old_logp), k3 = exp(d) - d - 1 (Schulman's estimator) and
    d = ref_logp - logp, clamped to +-10.

    Args:
        logp, old_logp, ref_logp, weights: (N, T). Masked positions may hold anything, even NaN.
        advantages: (N,).
        mask: (N, T), 1 on completion tokens.
        reduction: "sequence", the mean over a completion's tokens, then over completions (GRPO);
            "token", the sum over all tokens / their number (TW-GRPO, DAPO);
            "constant", the sum / (N * T) (Dr. GRPO).
    Returns:
        loss, and means over tokens as floats: {"kl", "ratio", "clip_fraction"}.
    """
    mask = mask.bool()
    logp = logp.masked_fill(~mask, 0.0)
    old_logp = old_logp.masked_fill(~mask, 0.0)
    advantages = advantages[:, None]  # (N, 1)

    # The clipped objective.
    ratio = torch.exp(logp - old_logp)  # (N, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    token_loss = -torch.min(ratio * advantages, clipped * advantages)  # (N, T)

    # The penalty for leaving the reference.
    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        d = (ref_logp.masked_fill(~mask, 0.0) - logp).clamp(-10, 10)
        kl = torch.exp(d) - d - 1
        token_loss = token_loss + beta * kl

    if weights is not None:
        token_loss = token_loss * weights.masked_fill(~mask, 0.0)
    token_loss = token_loss * mask
    tokens = mask.sum()
    if reduction == "sequence":
        loss = (token_loss.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()
    elif reduction == "token":
        loss = token_loss.sum() / tokens.clamp(min=1)
    elif reduction == "constant":
        loss = token_loss.sum() / mask.numel()
    else:
        raise ValueError(f"reduction {reduction!r} is not one of sequence, token, constant")

    def token_mean(values):
        return (values * mask).sum().item() / max(tokens.item(), 1)

    # The clip is active where it stops an update that would go further.
    active = torch.where(advantages > 0, ratio > 1 + clip_high, ratio < 1 - clip_low)
    fraction = token_mean(active)
    return loss, {"kl": token_mean(kl), "ratio": token_mean(ratio), "clip_fraction": fraction}


def token_weights(logits, mask, alpha=1.7):
    """TW-GRPO's weight of each position (arXiv 2505.24718): larger where the group disagrees.

    Args:
        logits: (G, T, V) of one group.
        mask: (G, T).
    Returns:
        (G, T) in [1, alpha], the same row for every rollout.
    """
    logp = torch.log_softmax(logits.float(), dim=-1)
    return weights_of_divergence(group_divergence(logp, mask), mask, alpha)


@torch.no_grad()
def group_divergence(logp, mask):
    """How much the next-token distributions of a group differ at each position.

    mean_g sum_v exp(d) - d - 1, with d = m - log p_g clamped to +-11 and m the mean of the
    log-probabilities; p_g is uniform where rollout g has ended. Positions are independent, so any
    chunk of T can be computed by itself.

    Args:
        logp: (..., G, T, V) log-probabilities.
        mask: (..., G, T).
    Returns:
        (..., T).
    """
    # A rollout that has ended says nothing about the next token.
    uniform = -math.log(logp.shape[-1])
    d = torch.where(mask.bool()[..., None], logp, uniform)  # (..., G, T, V)
    d = (d.mean(dim=-3, keepdim=True) - d).clamp_(-11, 11)
    return (torch.exp(d) - d - 1).sum(dim=-1).mean(dim=-2)


@torch.no_grad()
def weights_of_divergence(divergence, mask, alpha=1.7):
    """Token weights 1 + (alpha - 1) * divergence, min-max scaled over a group's positions.

    Args:
        divergence: (..., T) of each group.
        mask: (..., G, T).
    Returns:
        (..., G, T) in [1, alpha]; positions past the end of every rollout get 1.
    """
    # Positions that no rollout reaches neither set the scale nor get a weight other than 1.
    reached = mask.bool().any(dim=-2)  # (..., T)
    low = divergence.masked_fill(~reached, math.inf).amin(dim=-1, keepdim=True)
    high = divergence.masked_fill(~reached, -math.inf).amax(dim=-1, keepdim=True)
    scaled = (divergence - low) / (high - low).clamp(min=1e-8)
    scaled = torch.where(reached, scaled, 0.0)
    return (1 + (alpha - 1) * scaled)[..., None, :].expand(mask.shape)


# --------------------------------------------------------------- from rollouts to rewards (Eq. 3-8)


@dataclass
class Rollouts:
    """One forward's worth of questions and their samples; the loop fills in the rest."""

    examples: list  # B Examples
    priors: list  # B Priors; None for text
    prompts: object  # policy.Prompts
    completions: torch.Tensor  # (B, G, T) token ids
    mask: torch.Tensor  # (B, G, T) bool, True on completion tokens
    truncated: torch.Tensor  # (B, G) bool, cut at --max_completion_length
    logp: torch.Tensor  # (B, G, T) log-probabilities of the tokens when they were sampled
    texts: list  # B lists of G
    control_texts: list  # B lists of G/2 texts from shuffled frames; None without the control
    spare: bool = False  # another rank's: this one takes part in a forward, and learns nothing
    learned: torch.Tensor | None = None  # (B, G, T) bool, tokens that count in the loss
    share: float = 1.0  # weight of this forward's loss in the step's
    old_logp: torch.Tensor | None = None  # (B, G, T) of Eq. 10
    reference_logp: torch.Tensor | None = None  # (B, G, T) by the reference model
    rewards: dict = field(default_factory=dict)  # {term: (B, G)}
    advantages: torch.Tensor | None = None  # (B, G)
    dropped: torch.Tensor | None = None  # (B,) bool, groups that are left out of the loss

    @property
    def lengths(self):
        """(B, G) tokens of each completion."""
        return self.mask.sum(-1)


def rollout_frame_use(
    prompts,
    completion_mask,
    hidden=None,
    attention=None,
    tau=0.1,
    order="mean_softmax",
    pool="max",
):
    """Frame use per temporal slot of every rollout: Eq. 3-5, or its counterpart by attention.

    Args:
        prompts: policy.Prompts of B questions.
        completion_mask: (B, G, T).
        hidden: (B, S, D) states of one layer in the packed layout (policy.Scored); or
        attention: (B, G, T, P) of completion tokens to prompt tokens.
        tau, order, pool: of reward.frame_use and reward.pool_frames; the defaults are the paper's.
    Returns:
        B lists of G tensors (t,), each summing to 1; None in place of a tensor for questions
        without a video of at least two slots, where there is nothing to choose.
    """
    group, length = completion_mask.shape[1:]
    uses = []
    for b, slots in enumerate(prompts.slots):
        row = [None] * group
        uses.append(row)
        # An image or a text: nothing to choose.
        if slots < 2:
            continue
        columns = (prompts.kinds[b] == 2).nonzero().squeeze(1)  # (t * M,)
        if hidden is not None:
            visual = hidden[b, columns].unflatten(0, (slots, -1))  # (t, M, D)
            frames = reward.pool_frames(visual, pool)  # (t, D), Eq. 3
            responses = hidden[b, -group * length :].unflatten(0, (group, length))  # (G, T, D)
        for g, valid in enumerate(completion_mask[b].bool()):
            if hidden is not None:
                row[g] = reward.frame_use(responses[g, valid], frames, tau, order)  # Eq. 4-5
            else:
                weights = attention[b, g][valid][:, columns]  # (L, t * M)
                row[g] = reward.attention_use(weights.unflatten(1, (slots, -1))[None])
    return uses


def token_frame_use(prompts, row, valid, hidden=None, attention=None):
    """What each token of a row's only completion makes of each temporal slot.

    Args:
        valid: (T,) bool, completion tokens of the row.
        hidden: (B, S, D); a token's value is its cosine with the slot's pooled state; or
        attention: (B, 1, T, P); its attention to the slot.
    Returns:
        (L, t).
    """
    columns = (prompts.kinds[row] == 2).nonzero().squeeze(1)  # (t * M,)
    shape = (prompts.slots[row], -1)
    if attention is not None:
        weights = attention[row, 0][valid][:, columns].float()  # (L, t * M)
        return weights.unflatten(1, shape).sum(-1)
    frames = reward.pool_frames(hidden[row, columns].unflatten(0, shape))  # (t, D)
    response = hidden[row, -len(valid) :][valid].float()  # (L, D)
    return torch.cosine_similarity(response[:, None], frames[None], dim=-1)


def overlaps(prior, uses):
    """R_cf of one question's rollouts (Eq. 6), list of G floats.

    Args:
        prior: data.Prior of the question.
        uses: G tensors (t,) of rollout_frame_use.
    """
    scores = []
    for use in uses:
        # The prior is over frames, the use over the model's temporal slots.
        slots = reward.merge_prior(torch.tensor(prior.prior), len(use))  # (t,)
        scores.append(reward.consensus_frame_reward(slots, use.cpu()))
    return scores


def slot_shares(times, intervals, slots):
    """Share of each temporal slot's frames whose time lies in one of the intervals.

    Args:
        times: (K,) seconds of the frames.
        intervals: (start, end) pairs, seconds.
    Returns:
        (slots,) in [0, 1].
    """
    inside = torch.zeros(len(times))  # (K,)
    for index, time in enumerate(times):
        inside[index] = float(any(start <= time < end for start, end in intervals))
    frames = math.ceil(len(times) / slots)  # of a slot; the last one may have fewer
    return torch.stack([chunk.mean() for chunk in inside.split(frames)])


def evidence_shares(example, prior, uses):
    """Mass of one question's frame uses on its known evidence, list of G floats in [0, 1]."""
    shares = slot_shares(prior.times, example.evidence, len(uses[0]))  # (t,)
    return [float(use.cpu() @ shares) for use in uses]


@torch.no_grad()
def answer_likelihoods(tokenizer, completions, mask, logp):
    """GRPO-CARE's likelihood of the answers (arXiv 2506.16141).

    exp(mean log-probability of the tokens inside the last answer block).

    Args:
        completions, mask: (N, T).
        logp: (N, T) by the reference model.
    Returns:
        (N,), NaN where there is no answer block or nothing in it.
    """
    likelihoods = []
    # One by one: spans of answers are found on the characters of a text.
    for tokens, valid, values in zip(completions, mask, logp, strict=True):
        ids = tokens[valid.bool()].tolist()
        first, last = answer_span(tokenizer, ids)
        likelihoods.append(values[first:last].float().mean().exp().cpu())  # NaN if it is empty
    return torch.stack(likelihoods)


def answer_span(tokenizer, ids):
    """First and last + 1 position of the tokens inside the last answer block; (0, 0) without one.

    A token that straddles the tag's end belongs to the answer.
    """
    # Up to the end of the last answer; without an end tag nothing.
    text, _, _ = tokenizer.decode(ids).rpartition("</answer>")
    before, tag, inside = text.rpartition("<answer>")
    if not tag or not inside:
        return 0, 0

    def length_of(count):
        return len(tokenizer.decode(ids[:count]))

    def reaches_end(count):
        # A text that ends within a character decodes to other or fewer characters.
        return tokenizer.decode(ids[:count]).startswith(text)

    borders = range(len(ids) + 1)
    # The last border that is not behind the tag.
    first = bisect_right(borders, len(before + tag), key=length_of) - 1
    last = bisect_left(borders, True, key=reaches_end)
    return first, last


def accuracies(example, texts):
    """Accuracy reward of every text as an answer to one question."""
    return [reward.accuracy_reward(text, example.answer, example.problem_type) for text in texts]


def rewards(rollouts, uses, tokenizer, args):
    """Every reward term of Eq. 7 by name, "total" last. The one place where a term is added.

    Metrics, rollouts.jsonl and the report's panels take their names from the keys.

    Args:
        rollouts: with reference_logp if args.consistency_coef.
        uses: rollout_frame_use of these rollouts.
        args: settings with the constants of the terms (train.TrainArguments).
    Returns:
        {name: (B, G) float64}.
    """
    new_term = partial(torch.zeros, rollouts.truncated.shape, dtype=torch.float64)  # (B, G)
    terms = defaultdict(new_term)
    more = defaultdict(new_term)  # of the siblings, and yours: on top of the paper's sum
    scores = new_term()  # R_cf
    lengths = rollouts.lengths.tolist()
    for b, example in enumerate(rollouts.examples):
        answers = accuracies(example, rollouts.texts[b])
        shuffled = accuracies(example, rollouts.control_texts[b] or [])
        # Eq. 6: an image is one frame, nothing to choose, so it earns no consensus reward.
        if uses[b][0] is not None:
            scores[b] = torch.tensor(overlaps(rollouts.priors[b], uses[b]), dtype=torch.float64)
        for g, text in enumerate(rollouts.texts[b]):
            # What the answer, its form and its length earn.
            accuracy = answers[g]
            terms["accuracy"][b, g] = accuracy
            terms["format"][b, g] = reward.format_reward(text)
            terms["length"][b, g] = reward.length_reward(
                lengths[b][g], accuracy, args.length_low, args.length_high, args.length_bonus
            )
            terms["temporal"][b, g] = temporal_term(accuracy, answers, shuffled, args)
            if args.alignment_weight:
                gate = reward.gate(accuracy, args.gate)  # an LLM in Video-R2
                aligned = alignment(text, example, args)
                more["alignment"][b, g] = args.alignment_weight * gate * aligned
        if args.consistency_coef:
            likelihoods = answer_likelihoods(
                tokenizer, rollouts.completions[b], rollouts.mask[b], rollouts.reference_logp[b]
            )  # (G,)
            more["consistency"][b] = reward.consistency_bonus(
                terms["accuracy"][b],
                likelihoods,
                args.consistency_coef,
                margin=args.consistency_margin,
            )

    # Eq. 7, the paper's sum.
    structure = terms["format"] + terms["length"]
    total = reward.total_reward(
        terms["accuracy"], structure, scores, terms["temporal"], args.cfr_weight, args.gate
    )
    # As it entered the sum: weighted and gated.
    terms["consensus"] = total - (terms["accuracy"] + structure + terms["temporal"])
    return {**terms, **more, "total": sum(more.values(), total)}


def temporal_term(accuracy, answers, shuffled, args):
    """T-GRPO's reward of a completion: is its question answered better with its frames in order?

    Args:
        answers, shuffled: accuracies of the question's completions, and of those with shuffled
            frames; without any of these it is 0.
    """
    if not shuffled:
        return 0.0
    # Means over a question, never over the batch.
    ordered = sum(answers) / len(answers)
    control = sum(shuffled) / len(shuffled)
    return reward.temporal_reward(
        accuracy, ordered, control, args.temporal_gamma, args.temporal_ratio
    )


def alignment(text, example, args):
    """Video-R2's alignment in time of a completion's reasoning with the known events, in [0, 1]."""
    return reward.temporal_alignment_reward(
        reward.parse_claims(reward.extract_think(text)),
        example.grounding,
        buffer=args.alignment_buffer,
        threshold=args.alignment_threshold,
    )


def __getattr__(name):
    # common.rollout imports this file: looked up when it is asked for, not before.
    if name == "rollout":
        from common.rollout import rollout

        return rollout
    raise AttributeError(name)
