"""Stage 3: the group-relative policy optimisation of CF-GRPO (arXiv 2606.18441, Eq. 9-10) for Qwen-VL checkpoints.

The maths are pure functions: group_advantages, policy_loss, token_weights. The model side is one module, Policy, and two functions:
rollout() samples a group (vision encoder and prefill once, one KV cache a prompt) and Policy scores it with the group packed in
one row, [prompt | c_1 | ... | c_G], where a completion sees the prompt and itself only (Prefix Grouper, arXiv 2506.05433).

Letters in shapes: B prompts, G completions of each, P prompt tokens (left-padded), T completion tokens (right-padded), S = P + G*T,
D hidden size, V vocabulary, K frames, t temporal slots of M visual tokens.
"""

import math
from bisect import bisect_left, bisect_right

import torch


def group_advantages(rewards, eps=1e-4, scale=True, anchors=None):
    """Advantages within each question's group (Eq. 9): (r - mean) / (std + eps). rewards (B, G) -> (B, G).

    std is unbiased (G - 1), as in the release; scale=False leaves the division out (Dr. GRPO). Equal rewards give zeros, but for rounding;
    with anchors (B,), a virtual rollout's reward joins the mean and the std of such groups (after TW-GRPO's SOVA), so that one whose
    rollouts are all right, or all wrong, still says so.
    """
    if scale and rewards.shape[1] < 2:
        raise ValueError(
            "a group needs at least two rollouts for its standard deviation (--num_generations)"
        )
    mean, std = rewards.mean(dim=1, keepdim=True), rewards.std(dim=1, keepdim=True)
    if anchors is not None:
        equal = rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True) < 1e-6
        more = torch.cat([rewards, anchors[:, None]], dim=1)
        mean, std = (
            torch.where(equal, more.mean(dim=1, keepdim=True), mean),
            torch.where(equal, more.std(dim=1, keepdim=True), std),
        )
    return (rewards - mean) / (std + eps) if scale else rewards - mean


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
    """Clipped policy loss with a k3 KL penalty (Eq. 10). logp, old_logp, ref_logp, mask, weights (N, T), advantages (N,).

    Per token: -min(ratio*A, clip(ratio, 1-clip_low, 1+clip_high)*A) + beta*(exp(d) - d - 1), ratio = exp(logp - old_logp),
    d = ref_logp - logp clamped to +-10 (Schulman's k3 estimator). Reductions: 'sequence' mean over a completion's tokens, then over
    completions (GRPO); 'token' sum over all tokens / number of tokens (TW-GRPO, DAPO); 'constant' sum / (N * T) (Dr. GRPO).
    Masked positions may hold anything, NaN too. Returns the loss and stats: kl, ratio, clip_fraction (floats, means over tokens).
    """
    mask = mask.bool()
    logp, old_logp = logp.masked_fill(~mask, 0.0), old_logp.masked_fill(~mask, 0.0)
    ratio = torch.exp(logp - old_logp)  # (N, T)
    advantages = advantages[:, None]  # (N, 1)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    token_loss = -torch.min(ratio * advantages, clipped * advantages)  # (N, T)
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
    with torch.no_grad():
        outside = torch.where(advantages > 0, ratio > 1 + clip_high, ratio < 1 - clip_low) & mask
        mean = lambda values: (values * mask).sum().item() / max(tokens.item(), 1)  # noqa: E731
        stats = {"kl": mean(kl), "ratio": mean(ratio), "clip_fraction": mean(outside.float())}
    return loss, stats


def token_weights(logits, mask, alpha=1.7):
    """TW-GRPO's weight of each position from how much the group's next-token distributions differ there (arXiv 2505.24718).

    logits (G, T, V), mask (G, T) -> (G, T) in [1, alpha], the same row for every rollout: weights_of_divergence(group_divergence).
    """
    return weights_of_divergence(
        group_divergence(torch.log_softmax(logits.float(), dim=-1), mask), mask, alpha
    )


@torch.no_grad()
def group_divergence(logp, mask):
    """How much the group's next-token distributions differ at each position: logp (..., G, T, V), mask (..., G, T) -> (..., T).

    mean_g sum_v exp(d) - d - 1 with d = m - log p_g clamped to +-11, m the mean of the log-probabilities, p_g uniform where rollout g has
    ended. Each position stands alone, so any chunk of T can be computed by itself.
    """
    d = torch.where(mask.bool()[..., None], logp, -math.log(logp.shape[-1]))  # (..., G, T, V)
    d = (d.mean(dim=-3, keepdim=True) - d).clamp_(-11, 11)
    return (torch.exp(d) - d - 1).sum(dim=-1).mean(dim=-2)


@torch.no_grad()
def weights_of_divergence(divergence, mask, alpha=1.7):
    """Divergence (T,) of one group, mask (G, T) -> weights (G, T): 1 + (alpha - 1) * divergence, min-max scaled over the positions that any
    rollout reaches; the others get 1."""
    mask = mask.bool()
    reached = mask.any(dim=0)
    if not reached.any():
        return torch.ones_like(mask, dtype=torch.float32)
    low, high = divergence[reached].min(), divergence[reached].max()
    scaled = torch.where(
        reached, (divergence - low) / (high - low).clamp(min=1e-8), torch.zeros_like(divergence)
    )
    return (1 + (alpha - 1) * scaled)[None].expand(mask.shape)


@torch.no_grad()
def answer_likelihoods(tokenizer, completions, mask, logp):
    """GRPO-CARE's likelihood of the answers (arXiv 2506.16141): exp(mean log-prob of the tokens inside the last answer block).

    completions, mask, logp (N, T), logp by the reference model -> (N,), NaN without an answer block or with nothing in it.
    """
    rows = []
    for tokens, valid, values in zip(completions, mask, logp, strict=True):
        ids = tokens[valid.bool()].tolist()
        decode = lambda count: tokenizer.decode(ids[:count])  # noqa: B023, E731
        text = tokenizer.decode(ids)
        end = text.rfind("</answer>")
        begin = text.rfind("<answer>", 0, max(end, 0)) + len("<answer>")
        if begin < len("<answer>") or begin == end:
            rows.append(torch.tensor(float("nan")))
            continue
        borders = range(
            len(ids) + 1
        )  # a text that ends within a character is shorter or other than the whole
        first = bisect_right(borders, begin, key=lambda count: len(decode(count))) - 1  # noqa: B023  the last border not after the tag
        last = bisect_left(borders, True, key=lambda count: decode(count).startswith(text[:end]))  # noqa: B023
        rows.append(values[first:last].float().mean().exp().cpu())
    return torch.stack(rows)


def __getattr__(name):
    # common.rollout imports this file: found when it is asked for, not before.
    if name == "rollout":
        from common.rollout import rollout

        return rollout
    raise AttributeError(name)
