"""Stage 3: the group-relative policy optimisation of CF-GRPO (arXiv 2606.18441, Eq. 9-10) for Qwen-VL checkpoints.

The maths are pure functions: group_advantages, policy_loss, token_weights. The model side is one module, Policy, and two functions:
rollout() samples a group (vision encoder and prefill once, one KV cache a prompt) and Policy scores it with the group packed in
one row, [prompt | c_1 | ... | c_G], where a completion sees the prompt and itself only (Prefix Grouper, arXiv 2506.05433).

Letters in shapes: B prompts, G completions of each, P prompt tokens (left-padded), T completion tokens (right-padded), S = P + G*T,
D hidden size, V vocabulary, K frames, t temporal slots of M visual tokens.
"""

import inspect
import math
import re
from bisect import bisect_left, bisect_right
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from itertools import accumulate

import deepspeed
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

import reward

logger = logging.get_logger(__name__)

# ------------------------------------------------------------------------------------------------------ pure functions


def group_advantages(rewards, eps=1e-4, scale=True, anchors=None):
    """Advantages within each question's group (Eq. 9): (r - mean) / (std + eps). rewards (B, G) -> (B, G).

    std is unbiased (G - 1), as in the release; scale=False leaves the division out (Dr. GRPO). Equal rewards give zeros, but for rounding;
    with anchors (B,), a virtual rollout's reward joins the mean and the std of such groups (after TW-GRPO's SOVA), so that one whose
    rollouts are all right, or all wrong, still says so.
    """
    if scale and rewards.shape[1] < 2:
        raise ValueError("a group needs at least two rollouts for its standard deviation (--num_generations)")
    mean, std = rewards.mean(dim=1, keepdim=True), rewards.std(dim=1, keepdim=True)
    if anchors is not None:
        equal = rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True) < 1e-6
        more = torch.cat([rewards, anchors[:, None]], dim=1)
        mean, std = torch.where(equal, more.mean(dim=1, keepdim=True), mean), torch.where(equal, more.std(dim=1, keepdim=True), std)
    return (rewards - mean) / (std + eps) if scale else rewards - mean


def policy_loss(logp, old_logp, advantages, mask, ref_logp=None, beta=0.04, clip_low=0.2, clip_high=0.2, reduction="sequence",
                weights=None):
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
    return weights_of_divergence(group_divergence(torch.log_softmax(logits.float(), dim=-1), mask), mask, alpha)


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
    scaled = torch.where(reached, (divergence - low) / (high - low).clamp(min=1e-8), torch.zeros_like(divergence))
    return (1 + (alpha - 1) * scaled)[None].expand(mask.shape)


# ----------------------------------------------------------------------------------------------------------- the model


@dataclass
class Prompts:
    """A batch of encoded prompts, left-padded; what travels between the stages of a step."""

    input_ids: torch.Tensor  # (B, P)
    mask: torch.Tensor  # (B, P) bool, False on padding
    position_ids: torch.Tensor  # (3, B, P) rotary positions in time, height, width
    visual: torch.Tensor  # (B, P) bool, True on visual tokens
    pixel_values: torch.Tensor | None  # (patches, C) of all media, in batch order; None when the whole batch is text
    grid_thw: torch.Tensor | None  # (media, 3) patches in time, height, width
    slots: list[int]  # temporal slots of each row's medium, 0 for text
    features: tuple | None = None  # Policy.encode's, when the vision tower is frozen and has seen these media

    def to(self, device):
        moved = {f.name: getattr(self, f.name) for f in fields(self)}  # features are made on the device
        return Prompts(**{name: value.to(device) if torch.is_tensor(value) else value for name, value in moved.items()})

    def padding(self):
        """(B,) columns of padding before each prompt."""
        return (~self.mask).sum(1).tolist()

    def repeat(self, times):
        """Row b times[b] times in a row, its medium too: what the releases do."""
        again = lambda tensor, dim: tensor.repeat_interleave(torch.tensor(times, device=tensor.device), dim)  # noqa: E731
        pixels, grid, features = self.pixel_values, self.grid_thw, self.features
        if pixels is not None:
            media = [count for count, slots in zip(times, self.slots, strict=True) if slots]

            def copies(tensor, sizes):
                return torch.cat([part for part, count in zip(tensor.split(sizes), media, strict=True) for _ in range(count)])

            patches, tokens = grid.prod(1).tolist(), [count for count in self.visual.sum(1).tolist() if count]
            pixels, grid = copies(pixels, patches), copies(grid, 1)
            features = features and tuple(copies(feature, tokens) for feature in features)
        return replace(
            self, input_ids=again(self.input_ids, 0), mask=again(self.mask, 0), position_ids=again(self.position_ids, 1),
            visual=again(self.visual, 0), pixel_values=pixels, grid_thw=grid, features=features,
            slots=[slots for slots, count in zip(self.slots, times, strict=True) for _ in range(count)])


def continue_positions(position_ids, kinds, mask):
    """Rotary positions (3, B, P) in which every run of one kind (text, image, video) begins one behind the largest position before it, as
    the Qwen-VL models were trained. transformers from 5.3 on puts the words behind a video at its start plus max(height, width), which is
    inside the video where its time axis is the longest (huggingface/transformers issue 45381)."""
    position_ids = position_ids.clone()
    for row in range(len(kinds)):
        columns = mask[row].nonzero().squeeze(1)
        _, lengths = torch.unique_consecutive(kinds[row, columns], return_counts=True)
        largest = -1
        for run in columns.split(lengths.tolist()):
            position_ids[:, row, run] += largest + 1 - position_ids[0, row, run[0]]
            largest = position_ids[:, row, run].max()
    return position_ids


def collate(items, model):
    """Encoded examples (data.Encoder.encode) -> Prompts. `model` gives token ids and the family's own rotary positions."""
    config, core = model.config, model.model
    lengths = [len(item["input_ids"]) for item in items]
    padded = max(lengths)
    input_ids = torch.full((len(items), padded), config.text_config.pad_token_id or 0)
    mask = torch.zeros(len(items), padded, dtype=torch.bool)
    for row, item in enumerate(items):
        input_ids[row, padded - lengths[row] :] = item["input_ids"]
        mask[row, padded - lengths[row] :] = True
    kinds = (input_ids == config.image_token_id).long() + 2 * (input_ids == config.video_token_id).long()
    kinds = kinds * mask  # (B, P): 0 text, 1 image, 2 video
    media = [item for item in items if item["grid_thw"] is not None]
    is_video = [bool((item["input_ids"] == config.video_token_id).any()) for item in media]
    grid = torch.stack([item["grid_thw"] for item in media]) if media else None
    grids = {name: grid[[v is video for v in is_video]] if media and video in is_video else None
             for name, video in (("image_grid_thw", False), ("video_grid_thw", True))}
    seconds = torch.tensor([item["second_per_grid"] for item, video in zip(media, is_video, strict=True) if video])
    position_ids, _ = core.get_rope_index(input_ids, mm_token_type_ids=kinds.int(), attention_mask=mask.long(), **grids,
                                          second_per_grid_ts=seconds if len(seconds) else None)
    position_ids = continue_positions(position_ids, kinds, mask)
    return Prompts(
        input_ids=input_ids, mask=mask, position_ids=position_ids, visual=kinds > 0,
        pixel_values=torch.cat([item["pixel_values"] for item in media]) if media else None, grid_thw=grid,
        slots=[int(item["grid_thw"][0]) if item["grid_thw"] is not None else 0 for item in items])


@dataclass
class Layout:
    """What group_attention has to know of its rows, [padding | prompt | c_1 | ... | c_G]; the language model hands it through."""

    padding: list[int]  # (B,) columns before each prompt
    group: int = 0  # G, 0: prompts alone
    length: int = 0  # T
    layer: int | None = None  # whose attention is recorded, 1 is the first
    recorded: torch.Tensor | None = None  # (B, G, T, P) of completion tokens to prompt tokens, mean over heads, no gradient
    checkpointed: bool = False  # whole layers are, so that nothing inside needs to be


def group_attention(module, query, key, value, attention_mask, layout=None, scaling=None, dropout=0.0, **kwargs):
    """transformers' attention function "group": a completion sees its prompt and itself. query (B, heads, S, d), key and value
    (B, key heads, S, d) -> (B, S, heads, d), None. There is no (S, S) mask: the prompt attends to itself and then every completion to
    [prompt | itself], both causal by position alone, so that padding on the right is never seen; padding on the left is cut off.

    Without a layout it is sdpa, but where there is a mask, the query heads of a key head become rows: sdpa would repeat the keys.
    """
    if layout is None:
        shared = query.shape[1] // key.shape[1]
        if attention_mask is None or shared == 1:
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        rows = query.unflatten(1, (-1, shared)).flatten(2, 3)  # (B, key heads, shared * S, d)
        attended = scaled_dot_product_attention(rows, key, value, attention_mask.repeat(1, 1, shared, 1), dropout, scale=scaling)
        return attended.unflatten(2, (shared, -1)).flatten(1, 2).transpose(1, 2), None
    attend = partial(scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=True)
    ends, rows, recorded = layout.group * layout.length, [], []
    for padding, *row in zip(layout.padding, query, key, value, strict=True):
        prompt, tail = zip(*(states[None, :, padding:].split([states.shape[1] - padding - ends, ends], 2) for states in row), strict=True)
        parts = [attend(*prompt, is_causal=True)]  # (1, heads, prompt, d)
        if layout.group:
            own = [states[0].unflatten(1, (layout.group, layout.length)).transpose(0, 1) for states in tail]  # (G, heads, T, d)
            both = attend_to_both if layout.checkpointed else partial(checkpoint, attend_to_both, use_reentrant=False)  # keeps no G copies
            parts.append(both(attend, *own, *prompt[1:]).transpose(0, 1).flatten(1, 2)[None])
            if layout.layer == module.layer_idx + 1:
                recorded.append(pad(prompt_weights(own[0], own[1], prompt[1], scaling), (padding, 0)))
        rows.append(pad(torch.cat(parts, 2), (0, 0, padding, 0)))  # (1, heads, S, d)
    if recorded:
        layout.recorded = torch.stack(recorded)
    return torch.cat(rows).transpose(1, 2), None


LOWER_RIGHT = causal_lower_right(1, 2)  # made here, for its class cannot be made within a dispatch mode such as a FLOP counter


def attend_to_both(attend, query, key, value, prompt_key, prompt_value):
    """Completions (G, heads, T, d) to [prompt (1, heads, P, d) | themselves] -> (G, heads, T, d)."""
    keys, values = (torch.cat([prompt.expand(len(own), -1, -1, -1), own], 2) for prompt, own in ((prompt_key, key), (prompt_value, value)))
    length, columns = query.shape[2], keys.shape[2]
    if not query.is_cuda:
        return attend(query, keys, values, torch.ones(length, columns, dtype=torch.bool).tril(columns - length))
    LOWER_RIGHT.seq_len_q, LOWER_RIGHT.seq_len_kv = length, columns
    return attend(query, keys, values, LOWER_RIGHT)  # a mask would rule out the flash kernel


@torch.no_grad()
def prompt_weights(query, key, prompt_key, scaling):
    """Attention of completions (G, heads, T, d) to their prompt (1, key heads, P, d) -> (G, T, P), mean over heads."""
    shared, rows = query.shape[1] // key.shape[1], []
    for queries, keys in zip(query, key, strict=True):  # one completion's scores at a time
        keys = torch.cat([prompt_key[0], keys], 1).repeat_interleave(shared, 0).float()  # (heads, P + T, d)
        scores = queries.float() @ keys.transpose(1, 2) * scaling
        own = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).tril(prompt_key.shape[2])
        rows.append(scores.masked_fill(~own, float("-inf")).softmax(-1)[..., : prompt_key.shape[2]].mean(0))
    return torch.stack(rows)


ALL_ATTENTION_FUNCTIONS.register("group", group_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("group", sdpa_mask)

CHUNK_LOGITS = 1 << 25  # float32 values of (tokens, vocabulary) that exist at a time: 128 MiB


class ScoringHead(torch.nn.Linear):
    """The model's lm_head, which can also score tokens without all their logits. One module call, so that ZeRO-3 gathers its weight once,
    whatever the number of chunks: ranks differ in it."""

    def forward(self, hidden, targets=None, mask=None, divergence=False):
        """hidden (..., D) -> logits; with targets, mask (B, G, T): hidden (B, G, T, D) -> logp, entropy (B, G, T), and if asked for the
        group_divergence (B, T); in chunks of T under activation checkpointing, if there are several."""
        if targets is None:
            return super().forward(hidden)
        size = max(1, CHUNK_LOGITS // (targets.shape[0] * targets.shape[1] * self.out_features))
        chunks = list(zip(hidden.split(size, 2), targets.split(size, 2), mask.split(size, 2), strict=True))
        parts = [checkpoint(self.score, *chunk, divergence, use_reentrant=False) if len(chunks) > 1 else self.score(*chunk, divergence)
                 for chunk in chunks]
        logp, entropy, differences = zip(*parts, strict=True)
        return torch.cat(logp, 2), torch.cat(entropy, 2), torch.cat(differences, 1) if divergence else None

    def score(self, hidden, targets, mask, divergence):
        normalised = torch.log_softmax(super().forward(hidden).float(), dim=-1)  # (B, G, t, V)
        logp = normalised.gather(-1, targets[..., None]).squeeze(-1)
        with torch.no_grad():
            entropy = -torch.linalg.vecdot(normalised.exp(), normalised)
            return logp, entropy, group_divergence(normalised, mask) if divergence else None


PACKED_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILIES = (*PACKED_FAMILIES, "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


class Policy(torch.nn.Module):
    """A Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint behind one forward, so that ZeRO-3 sees one entry and image and video rows run the
    vision tower once, in the same order on every rank."""

    def __init__(self, model):
        super().__init__()
        if type(model.lm_head) is torch.nn.Linear:
            model.lm_head.__class__ = ScoringHead
        if not isinstance(model.lm_head, ScoringHead):
            raise ValueError(f"the head must be a plain Linear layer, not {type(model.lm_head).__name__}")
        text = model.model.language_model.config
        self.packs = (model.config.model_type in PACKED_FAMILIES and text._attn_implementation in ("sdpa", "group")
                      and not getattr(text, "use_sliding_window", False))
        if self.packs:
            text._attn_implementation = "group"  # the language model's alone, and in memory alone
        else:
            logger.warning_once(f"{model.config.model_type} with {text._attn_implementation} attention: groups are not packed, every "
                                f"completion repeats its prompt (packed: {', '.join(PACKED_FAMILIES)} with sdpa)")
        self.model = model

    def encode(self, prompts):
        """The vision tower's features of all media, (visual tokens, D) each: its output, and for Qwen3-VL those of its DeepStack layers."""
        pixels, grid = prompts.pixel_values, prompts.grid_thw
        if pixels is None:  # text alone: a blank image keeps this rank's ZeRO-3 gathers in step with the ranks that have videos
            vision = self.model.config.vision_config
            side, device = vision.spatial_merge_size, prompts.input_ids.device
            pixels = torch.zeros(side * side, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2, device=device)
            grid = torch.tensor([[1, side, side]], device=device)
        output = self.model.model.visual(pixels, grid_thw=grid)
        features = (output.pooler_output, *(getattr(output, "deepstack_features", None) or ()))
        if prompts.pixel_values is not None and len(features[0]) != int(prompts.visual.sum()):
            raise ValueError(f"{int(prompts.visual.sum())} visual tokens in the prompts, {len(features[0])} features from the vision tower")
        return features

    def embed(self, prompts):
        """-> (B, P, D) token embeddings with the vision tower's features on the visual tokens, and what else the language model needs."""
        embeds = self.model.get_input_embeddings()(prompts.input_ids)
        features = self.encode(prompts) if prompts.features is None else prompts.features
        features = [feature.to(embeds.dtype) for feature in features]
        if prompts.pixel_values is None:
            return embeds + 0 * sum(feature.sum() for feature in features), {}
        deeper = {"visual_pos_masks": prompts.visual, "deepstack_visual_embeds": features[1:]} if features[1:] else {}
        return embeds.masked_scatter(prompts.visual[..., None], features[0]), deeper

    def forward(self, prompts, completions, completion_mask, packed=True, hidden_layers=(), attention_layer=None, weight_alpha=None):
        """completions, completion_mask (B, G, T) -> logp (B, G, T) of the completion tokens, entropy (B, G, T),
        hidden {layer: (B, S, D)} of `hidden_layers` (0 embeddings ... -1 after the last norm), without gradient,
        attention (B, G, T, P) of completion tokens to prompt tokens in `attention_layer` (1 is the first), mean over heads, or None,
        weights (B, G, T): TW-GRPO's token_weights with alpha `weight_alpha`, or None.

        packed: a group is one row; otherwise a row [prompt | completion] each, the oracle and the way of models that cannot pack. Shapes
        and numbers are the same.
        """
        (batch, group, length), prompt_length = completions.shape, prompts.input_ids.shape[1]
        packed = packed and self.packs
        rows, share = (prompts, group) if packed else (prompts.repeat([group] * batch), 1)  # share: completions in a row
        tail, valid = (tensor.reshape(-1, share * length) for tensor in (completions, completion_mask))
        embeds, more = self.embed(rows)
        embeds = torch.cat([embeds, self.model.get_input_embeddings()(tail)], dim=1)  # (B, S, D)
        if more:
            more["visual_pos_masks"] = pad(rows.visual, (0, share * length))  # (B, S)
        start = rows.position_ids.amax(dim=(0, 2)) + 1  # (B,) every completion restarts right after the prompt
        steps = torch.arange(length, device=tail.device).repeat(share)  # (G*T,)
        positions = torch.cat([rows.position_ids, (start[:, None] + steps)[None].expand(3, -1, -1)], dim=2)  # (3, B, S)
        layers = self.model.config.text_config.num_hidden_layers
        if attention_layer is not None and not (self.packs and 1 <= attention_layer <= layers):
            raise ValueError(f"no attention of layer {attention_layer}: the model has layers 1 to {layers}, and packs: {self.packs}")
        checkpointed = self.model.training and self.model.model.language_model.layers[0].gradient_checkpointing
        layout = Layout(rows.padding(), share, length, attention_layer, checkpointed=checkpointed)
        more |= {"layout": layout} if self.packs else {"attention_mask": torch.cat([rows.mask, valid], dim=1).long()}
        output = self.model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False,
                                                 output_hidden_states=any(layer != -1 for layer in hidden_layers), **more)
        hidden = output.last_hidden_state  # (B, S, D)
        index = torch.arange(share * length, device=tail.device)
        source = torch.where(index % length == 0, prompt_length - 1, prompt_length + index - 1)  # the token before; t=0: the prompt's last
        scored = hidden[:, source].view(*completions.shape, -1)
        logp, entropy, divergence = self.model.lm_head(scored, completions, completion_mask, weight_alpha is not None)
        weights = None
        if weight_alpha is not None:
            weights = torch.stack([weights_of_divergence(*one, weight_alpha) for one in zip(divergence, completion_mask, strict=True)])
        states = {layer: (hidden if layer == -1 else output.hidden_states[layer]).detach() for layer in hidden_layers}
        if not packed:  # the prompt's states are the same in every copy
            apart = {layer: values.view(batch, group, prompt_length + length, -1) for layer, values in states.items()}
            states = {layer: torch.cat([values[:, 0, :prompt_length], values[:, :, prompt_length:].flatten(1, 2)], dim=1)
                      for layer, values in apart.items()}
        attention = None if layout.recorded is None else layout.recorded.view(batch, group, length, prompt_length)
        return logp, entropy, states, attention, weights


# ------------------------------------------------------------------------------------------------------------ rollouts


def sample_tokens(logits, uniform, temperature=1.0, top_p=1.0, top_k=0):
    """Inverse-CDF sampling: logits (N, V), uniform (N,) in [0, 1) -> (N,). temperature 0 is greedy; top_k keeps the k likeliest (0: all),
    top_p then the nucleus of their distribution, as in transformers."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, order = torch.softmax(logits.float() / temperature, dim=-1).sort(dim=-1, descending=True)
    if top_k:
        probs, order = probs[:, :top_k] / probs[:, :top_k].sum(dim=-1, keepdim=True), order[:, :top_k]
    cumulative = probs.cumsum(dim=-1)
    probs = probs.masked_fill(cumulative - probs >= top_p, 0.0)  # the token that crosses top_p stays
    cumulative = probs.cumsum(dim=-1)
    chosen = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(dim=-1).clamp(max=probs.shape[-1] - 1)
    return order.gather(-1, chosen[:, None]).squeeze(-1)


def row_uniforms(seeds, length):
    """One stream of random numbers per row, from its own seed: (N, length). A row's sample does not depend on its neighbours or rank."""
    return torch.stack([torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class RoomyLayer(DynamicLayer):
    """A layer of the KV cache with room for tokens to come: transformers' copies the whole cache for every one of them."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Appends (B, key heads, n, d) each -> all keys, all values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = [states[:, :, :0] for states in (key_states, value_states)]
        before = self.get_seq_length()
        after = before + key_states.shape[2]
        if after > self.room[0].shape[2]:
            self.room = [pad(states[:, :, :before], (0, 0, 0, after - before + 1024)) for states in self.room]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, before:after] = states
        self.keys, self.values = (room[:, :, :after] for room in self.room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx):
        self.room = [states[beam_idx] for states in self.room]


class FixedLayer(DynamicLayer):
    """A layer of the KV cache as large as it will ever be, written at the columns that a tensor names: a CUDA graph can replay it."""

    def __init__(self, prompt, room, columns):
        super().__init__()
        self.keys, self.values = (pad(states, (0, 0, 0, room)) for states in (prompt.keys, prompt.values))
        self.columns, self.is_initialized = columns, True

    def update(self, key_states, value_states, *args, **kwargs):
        for room, states in ((self.keys, key_states), (self.values, value_states)):
            room.index_copy_(2, self.columns, states)
        return self.keys, self.values


def replay(step, steps, going, device):
    """Calls step() `steps` times, or until going() is false, which is asked every 16 steps. On a GPU from the fourth time on as one CUDA
    graph: no kernel is launched by itself then, and nothing waited for between two questions. RuntimeError if it cannot be captured."""
    for done in range(steps):
        if done % 16 == 0 and not going():
            return
        if done == 3 and device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # records the step; other threads, NCCL's, may go on
                    step()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError("the decode step cannot be captured as a CUDA graph; --cuda_graph false samples without one") from error
            step = graph.replay
        step()


def sample_fixed(model, cache, hidden, prompt_mask, position, counts, uniforms, choose, eos):
    """What rollout() does after the prompt, in shapes that never change: what has ended goes on until all have. hidden (B, 1, D),
    prompt_mask (B, P), position (B,), uniforms (N, steps), choose as rollout()'s -> tokens (N, steps), log-probs, lengths (N,)."""
    device, (batch, prompt), width, steps = hidden.device, prompt_mask.shape, max(counts), uniforms.shape[1]
    there = torch.arange(width, device=device) < torch.tensor(counts, device=device)[:, None]  # (B, W)
    spread = torch.zeros(batch, width, steps, device=device).masked_scatter(there[..., None], uniforms)
    tokens, logps = torch.full(spread.shape, eos[0].item(), device=device), torch.zeros_like(spread)
    alive, lengths = there.clone(), torch.zeros_like(there, dtype=torch.long)
    at, own = torch.zeros(1, dtype=torch.long, device=device), torch.arange(width, device=device)
    columns = own + prompt
    for index, layer in enumerate(cache.layers):  # one by one, so that the old ones go
        cache.layers[index] = FixedLayer(layer, width * (steps - 1), columns)
    seen = pad(prompt_mask[:, None, None].expand(-1, 1, width, -1), (0, width * (steps - 1)))  # (B, 1, W, all columns)
    cached = cache_argument(model.model.language_model, cache)

    def pick(hidden):
        logits = model.lm_head(hidden).flatten(0, 1)  # (B*W, V)
        token, logp = choose(logits, spread.index_select(2, at).flatten())
        tokens.index_copy_(2, at, token.view(batch, width, 1))
        logps.index_copy_(2, at, logp.view(batch, width, 1))
        lengths.add_(alive)
        alive.logical_and_((token[:, None] != eos).all(1).view(batch, width))  # isin sorts where there are many, and waits

    def step():
        columns.copy_(prompt + at * width + own)
        seen.scatter_(3, columns.expand(batch, 1, -1)[..., None], True)
        embeds = model.get_input_embeddings()(tokens.index_select(2, at).squeeze(2))
        output = model.model.language_model(inputs_embeds=embeds, attention_mask=seen, use_cache=True, **cached,
                                            position_ids=(position + at)[None, :, None].expand(3, -1, width))
        at.add_(1)
        pick(output.last_hidden_state)

    pick(hidden.expand(-1, width, -1))
    replay(step, steps - 1, lambda: bool(alive.any()), device)
    ended = torch.arange(steps, device=device) >= lengths[..., None]
    return tokens.masked_fill(ended, eos[0])[there], logps.masked_fill(ended, 0.0)[there], lengths[there]


def cache_argument(language, cache):
    """{name: cache} of a language model's forward: past_key_values, which transformers 5.24 calls cache and 5.40 ends."""
    return {"cache" if "cache" in inspect.signature(language.forward).parameters else "past_key_values": cache}


def checkpoint_activations(model, on=True):
    """Recompute activations in the backward pass, or no longer; the methods whose name has gradient end with transformers 6."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_{'enable' if on else 'disable'}")()


@torch.no_grad()
def rollout(model, prompts, counts, seeds, max_new_tokens, eos_ids, banned_ids=(), temperature=1.0, top_p=0.95, top_k=0,
            return_logp=False, graph=False):
    """Sample `counts[b]` completions of prompt b: encode and prefill once; all completions of a prompt then read the one KV cache.

    A step appends one column a completion to its prompt's cache, [prompt | first tokens | second tokens | ...], and a completion sees the
    prompt and its own columns. So the prompt's keys and values exist once, not once a completion, and what has ended just leaves.
    seeds: one int per completion (sum of counts). banned_ids are never sampled (vision placeholders break the next forward). graph: the
    same in shapes that never change, on a GPU as one CUDA graph, if the family packs; False shrinks with what has ended, kernel by kernel.
    Returns completions (N, T) right-padded with eos, mask (N, T), and with return_logp the model's log-probabilities (N, T) of the tokens
    (0 where masked): before temperature, top-k, top-p and bans, as a forward on the completions gives them.
    """
    policy = Policy(model)
    if not policy.packs:
        prompts, counts = prompts.repeat(counts), [1] * sum(counts)
    language, device = model.model.language_model, prompts.input_ids.device
    cache = DynamicCache(config=language.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    embeds, more = policy.embed(prompts)
    more |= {"layout": Layout(prompts.padding())} if policy.packs else {"attention_mask": prompts.mask.long()}
    cached = cache_argument(language, cache)
    output = language(inputs_embeds=embeds, position_ids=prompts.position_ids, use_cache=True, **cached, **more)
    position, mask, uniforms = prompts.position_ids.amax(dim=(0, 2)) + 1, prompts.mask, row_uniforms(seeds, max_new_tokens).to(device)
    eos, banned = torch.tensor(eos_ids, device=device), torch.tensor(list(banned_ids), dtype=torch.long, device=device)

    def choose(logits, uniform):  # (n, V), (n,) -> tokens, their log-probs (n,)
        token = sample_tokens(logits.index_fill(-1, banned, float("-inf")), uniform, temperature, top_p, top_k)
        return token, torch.log_softmax(logits.float(), dim=-1).gather(-1, token[:, None]).squeeze(-1)

    def finish(tokens, logps, lengths):
        longest = int(lengths.max())
        valid = torch.arange(longest, device=device)[None] < lengths[:, None]
        return (tokens[:, :longest], valid, logps[:, :longest]) if return_logp else (tokens[:, :longest], valid)

    if graph and policy.packs:
        return finish(*sample_fixed(model, cache, output.last_hidden_state[:, -1:], mask, position, counts, uniforms, choose, eos))
    active = torch.full((len(counts), max(counts)), -1, device=device)  # (B, W): the completion that a query belongs to, -1: none
    for row, (count, before) in enumerate(zip(counts, accumulate(counts, initial=0), strict=False)):
        active[row, :count] = torch.arange(before, before + count, device=device)
    hidden = output.last_hidden_state[:, -1:].expand(-1, active.shape[1], -1)  # (B, W, D)
    owners = active[:, :0]  # (B, cached columns)
    tokens = torch.full((sum(counts), max_new_tokens), eos_ids[0], device=device)
    lengths, logps = torch.zeros(sum(counts), dtype=torch.long, device=device), torch.zeros(sum(counts), max_new_tokens, device=device)
    for step in range(max_new_tokens):
        alive = active >= 0
        rows = active[alive]  # (n,) completions
        logits = model.lm_head(hidden[alive])  # (n, V)
        token, logps[rows, step] = choose(logits, uniforms[rows, step])
        tokens[rows, step], lengths[rows] = token, step + 1
        rows = rows.masked_fill(torch.isin(token, eos), -1)
        if step + 1 == max_new_tokens or bool((rows < 0).all()):
            break
        inputs = torch.zeros_like(active)
        inputs[alive], active[alive] = token, rows
        order = (active < 0).int().argsort(dim=1, stable=True)[:, : int((active >= 0).sum(1).max())]  # what has ended goes to the end
        active, inputs = active.gather(1, order), inputs.gather(1, order)
        going = (active >= 0).any(1)
        if int(going.sum()) * 2 <= len(going):  # prompts whose completions have all ended leave the batch
            keep = going.nonzero().squeeze(1)
            cache.reorder_cache(keep)  # which every kind of layer has
            active, inputs, position, mask, owners = (tensor[keep] for tensor in (active, inputs, position, mask, owners))
        owners = torch.cat([owners, active], dim=1)
        own = (owners[:, None] == active[..., None]) & (active >= 0)[..., None]  # (B, W, columns)
        seen = torch.cat([mask[:, None].expand(-1, active.shape[1], -1), own], dim=2)  # (B, W, P + columns)
        seen = seen[:, None] if policy.packs else seen[:, 0].long()
        output = language(inputs_embeds=model.get_input_embeddings()(inputs), attention_mask=seen, **cached,
                          position_ids=(position + step)[None, :, None].expand(3, -1, active.shape[1]), use_cache=True)
        hidden = output.last_hidden_state
    return finish(tokens, logps, lengths)


@dataclass(frozen=True)
class Turn:
    """How a checkpoint's chat template frames what the assistant says."""

    opening: str  # what the prompt says already: "<think>\n" for templates that think first, else ""
    end: int  # id of the token that ends the turn: the template's, else the tokenizer's end of sequence


@cache
def read_turn(processor):
    """The assistant's turn of a checkpoint, read off its chat template once -> Turn."""
    tokenizer = processor.tokenizer
    user = {"role": "user", "content": [{"type": "text", "text": "question"}]}
    prompt = processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    opening = re.search(r"<think>\s*$", prompt)
    # what the template writes behind an answer; its first token, if it is a special one, ends the turn
    assistant = {"role": "assistant", "content": [{"type": "text", "text": "an answer"}]}
    dialogue = processor.apply_chat_template([user, assistant], tokenize=False)
    behind = tokenizer(dialogue.rpartition("an answer")[2], add_special_tokens=False).input_ids
    added = tokenizer.added_tokens_decoder
    ends = bool(behind) and behind[0] in added and added[behind[0]].special
    return Turn(opening.group() if opening else "", behind[0] if ends else tokenizer.eos_token_id)


def stop_tokens(model, processor):
    """Ids that end a completion: those of the generation config, the tokenizer's and the end of the template's turn, without repeats."""
    told = model.generation_config.eos_token_id
    told = told if isinstance(told, list) else [told]
    wanted = [*told, processor.tokenizer.eos_token_id, read_turn(processor).end]
    return list(dict.fromkeys(token for token in wanted if token is not None))


def special_tokens(model, processor):
    """-> ids that end a completion, and the vision placeholders that none may contain."""
    config = model.config
    banned = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]
    return stop_tokens(model, processor), banned


def sample_texts(model, processor, prompts, counts, seeds, max_new_tokens, temperature=1.0, top_p=0.95, top_k=0, return_logp=False,
                 graph=False):
    """rollout() with the checkpoint's own stop and vision tokens -> completions (N, T), mask (N, T), texts[, log-probs (N, T)].

    The texts begin with what the prompt says in the assistant's place (Turn.opening), so that a think block is whole.
    """
    stop_and_banned = special_tokens(model, processor)
    tokens, mask, *logp = rollout(model, prompts, counts, seeds, max_new_tokens, *stop_and_banned, temperature, top_p, top_k, return_logp,
                                  graph)
    opening = read_turn(processor).opening
    texts = [opening + processor.tokenizer.decode(row[valid], skip_special_tokens=True) for row, valid in zip(tokens, mask, strict=True)]
    return tokens, mask, texts, *logp


@contextmanager
def sampling(engine):
    """The bare model for a rollout phase: ZeRO-3 parameters gathered once, its hooks and its torch.nn.functional.linear (an autograd
    function that binds a signature on every call) off; all put back on leaving."""
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)  # an engine for inference has it in the optimizer's place
    model = engine.module.model
    training = model.training
    model.eval()
    try:
        if not hasattr(offload, "setup_zero_stage3_hooks"):  # not ZeRO-3
            yield model
        else:
            with deepspeed.zero.GatheredParameters(list(model.parameters())):
                offload._remove_module_hooks()
                offload.forward_hooks.clear()
                offload.backward_hooks.clear()
                linear, torch.nn.functional.linear = torch.nn.functional.linear, torch._C._nn.linear
                try:
                    yield model
                finally:
                    torch.nn.functional.linear = linear
                    offload.setup_zero_stage3_hooks()
    finally:
        model.train(training)


# ----------------------------------------------------------------------------------------------------------- frame use


def rollout_frame_use(prompts, completion_mask, hidden=None, attention=None, tau=0.1, order="mean_softmax", pool="max"):
    """Frame use per temporal slot (Eq. 3-5, or attention) of every rollout -> list of B lists of G tensors (slots,).

    hidden (B, S, D) or attention (B, G, T, P) as Policy.forward returns them, in the packed layout. Rows without a video of two slots
    or more (images, text) give None: there is nothing to choose between.
    """
    batch, group, length = completion_mask.shape
    prompt_length = prompts.input_ids.shape[1]
    rows = []
    for b in range(batch):
        slots, columns = prompts.slots[b], prompts.visual[b].nonzero().squeeze(1)  # (t*M,)
        if slots < 2:
            rows.append([None] * group)
            continue
        uses = []
        frames = reward.pool_frames(hidden[b, columns].float().view(slots, -1, hidden.shape[-1]), pool) if hidden is not None else None
        for g in range(group):
            valid = completion_mask[b, g].bool()
            if hidden is not None:
                begin = prompt_length + g * length
                uses.append(reward.frame_use(hidden[b, begin : begin + length][valid].float(), frames, tau, order))
            else:
                uses.append(reward.attention_use(attention[b, g][valid][None][..., columns], slots))  # (1, L, t*M)
        rows.append(uses)
    return rows


def token_frame_use(prompts, row, valid, hidden=None, attention=None, pool="max"):
    """What each token of a row's only completion makes of each temporal slot: its cosine with the slot's pooled state, or its attention to
    it. valid (T,) bool, hidden (B, S, D) or attention (B, 1, T, P) as Policy.forward returns them -> (L, slots)."""
    columns, slots = prompts.visual[row].nonzero().squeeze(1), prompts.slots[row]
    if attention is not None:
        return attention[row, 0][valid][:, columns].float().unflatten(1, (slots, -1)).sum(-1)
    frames = reward.pool_frames(hidden[row, columns].unflatten(0, (slots, -1)), pool)
    return torch.cosine_similarity(hidden[row, -len(valid) :][valid].float()[:, None], frames[None], dim=-1)


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
        borders = range(len(ids) + 1)  # a text that ends within a character is shorter or other than the whole
        first = bisect_right(borders, begin, key=lambda count: len(decode(count))) - 1  # noqa: B023  the last border not after the tag
        last = bisect_left(borders, True, key=lambda count: decode(count).startswith(text[:end]))  # noqa: B023
        rows.append(values[first:last].float().mean().exp().cpu())
    return torch.stack(rows)


def slot_shares(times, intervals, slots):
    """(slots,) share of each temporal slot's frames whose time lies in one of the intervals (start s, end s)."""
    inside = torch.tensor([float(any(start <= t < end for start, end in intervals)) for t in times])
    return torch.stack([chunk.mean() for chunk in inside.split(-(-len(inside) // slots))])
