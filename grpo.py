"""Stage 3: the group-relative policy optimisation of CF-GRPO (arXiv 2606.18441, Eq. 9-10) for Qwen-VL checkpoints.

The maths are pure functions: group_advantages, policy_loss, token_weights. The model side is one module, Policy, and two functions:
rollout() samples a group (vision encoder and prefill once, one KV cache a prompt) and group_logps() scores it with the group packed in
one row, [prompt | c_1 | ... | c_G], where a completion sees the prompt and itself only (Prefix Grouper, arXiv 2506.05433).

Letters in shapes: B prompts, G completions of each, P prompt tokens (left-padded), T completion tokens (right-padded), S = P + G*T,
D hidden size, V vocabulary, K frames, t temporal slots of M visual tokens.
"""

import math
from bisect import bisect_left, bisect_right
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import deepspeed
import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import reward

# ------------------------------------------------------------------------------------------------------ pure functions


def group_advantages(rewards, eps=1e-4, scale=True):
    """Advantages within each question's group (Eq. 9): (r - mean) / (std + eps). rewards (B, G) -> (B, G).

    std is unbiased (G - 1), as in the release; scale=False leaves the division out (Dr. GRPO). Equal rewards give zeros, but for rounding.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if not scale:
        return centred
    if rewards.shape[1] < 2:
        raise ValueError("a group needs at least two rollouts for its standard deviation (--num_generations)")
    return centred / (rewards.std(dim=1, keepdim=True) + eps)


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

    def repeat(self, times):
        """Every row `times` times in a row, its media too: what the releases do, kept as the oracle of the tests."""
        pixels, grid = [], []
        if self.pixel_values is not None:
            for patches, thw in zip(self.pixel_values.split(self.grid_thw.prod(1).tolist()), self.grid_thw, strict=True):
                pixels += [patches] * times
                grid += [thw] * times
        return replace(
            self, input_ids=self.input_ids.repeat_interleave(times, 0), mask=self.mask.repeat_interleave(times, 0),
            position_ids=self.position_ids.repeat_interleave(times, 1), visual=self.visual.repeat_interleave(times, 0),
            pixel_values=torch.cat(pixels) if pixels else None, grid_thw=torch.stack(grid) if grid else None, features=None,
            slots=[count for count in self.slots for _ in range(times)])


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
    return Prompts(
        input_ids=input_ids, mask=mask, position_ids=position_ids, visual=kinds > 0,
        pixel_values=torch.cat([item["pixel_values"] for item in media]) if media else None, grid_thw=grid,
        slots=[int(item["grid_thw"][0]) if item["grid_thw"] is not None else 0 for item in items])


def group_mask(prompt_mask, completion_mask):
    """Who sees whom in [prompt | c_1 | ... | c_G]. (B, P), (B, G, T) -> (B, 1, S, S) bool: causal, own completion only, no padding."""
    batch, group, length = completion_mask.shape
    prompt_length = prompt_mask.shape[1]
    device = prompt_mask.device
    segment = torch.cat([torch.zeros(prompt_length, dtype=torch.long, device=device),
                         1 + torch.arange(group, device=device).repeat_interleave(length)])  # (S,) 0 prompt, g completion
    order = torch.arange(len(segment), device=device)
    allowed = (order[:, None] >= order[None]) & ((segment[:, None] == segment[None]) | (segment[None] == 0))  # (S, S)
    valid = torch.cat([prompt_mask, completion_mask.reshape(batch, -1)], dim=1).bool()  # (B, S)
    allowed = allowed[None] & valid[:, None, :]
    return (allowed | torch.eye(len(segment), dtype=torch.bool, device=device))[:, None]  # padding sees itself: no empty softmax row


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


class Policy(torch.nn.Module):
    """A Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint behind one forward, so that ZeRO-3 sees one entry and image and video rows run the
    vision tower once, in the same order on every rank."""

    def __init__(self, model):
        super().__init__()
        kernel = model.model.language_model.config._attn_implementation
        if kernel != "sdpa":
            raise ValueError(f"the group mask needs attn_implementation='sdpa', the model was loaded with {kernel!r}")
        if type(model.lm_head) is torch.nn.Linear:
            model.lm_head.__class__ = ScoringHead
        if not isinstance(model.lm_head, ScoringHead):
            raise ValueError(f"the head must be a plain Linear layer, not {type(model.lm_head).__name__}")
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

    def forward(self, prompts, completions, completion_mask, hidden_layers=(), attention_layer=None, weight_alpha=None, group_size=None):
        """completions, completion_mask (B, G, T) -> logp (B, G, T) of the completion tokens, entropy (B, G, T),
        hidden {layer: (B, S, D)} of `hidden_layers` (0 embeddings ... -1 after the last norm), without gradient,
        attention (B, G, T, P) of completion tokens to prompt tokens in `attention_layer` (1 is the first), mean over heads, or None,
        weights (B, G, T): TW-GRPO's token_weights with alpha `weight_alpha`, or None. group_size: G where rows hold one completion each.
        """
        batch, group, length = completions.shape
        prompt_length = prompts.input_ids.shape[1]
        tail = completions.reshape(batch, group * length)
        embeds, deeper = self.embed(prompts)
        embeds = torch.cat([embeds, self.model.get_input_embeddings()(tail)], dim=1)  # (B, S, D)
        if deeper:
            deeper["visual_pos_masks"] = torch.nn.functional.pad(prompts.visual, (0, group * length))  # (B, S)
        start = prompts.position_ids.amax(dim=(0, 2)) + 1  # (B,) every completion restarts right after the prompt
        steps = torch.arange(length, device=tail.device).repeat(group)  # (G*T,)
        positions = torch.cat([prompts.position_ids, (start[:, None] + steps)[None].expand(3, -1, -1)], dim=2)  # (3, B, S)
        mask = group_mask(prompts.mask, completion_mask)
        recorder = nullcontext({})
        if attention_layer is not None:
            recorder = record_attention(self.model, attention_layer, mask, prompt_length, group)
        with recorder as recorded:
            output = self.model.model.language_model(
                inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False,
                output_hidden_states=any(layer != -1 for layer in hidden_layers), **deeper)
        hidden = output.last_hidden_state  # (B, S, D)
        index = torch.arange(group * length, device=tail.device)
        source = torch.where(index % length == 0, prompt_length - 1, prompt_length + index - 1)  # the token before; t=0: the prompt's last
        groups = (-1, group_size or group, length)
        scored = hidden[:, source].view(*groups, hidden.shape[-1])
        valid = completion_mask.view(groups)
        logp, entropy, divergence = self.model.lm_head(scored, completions.view(groups), valid, weight_alpha is not None)
        weights = None
        if weight_alpha is not None:
            weights = torch.stack([weights_of_divergence(*one, weight_alpha) for one in zip(divergence, valid, strict=True)])
            weights = weights.view(completions.shape)
        states = {layer: (hidden if layer == -1 else output.hidden_states[layer]).detach() for layer in hidden_layers}
        return logp.view(completions.shape), entropy.view(completions.shape), states, recorded.get("weights"), weights


@contextmanager
def record_attention(model, layer, mask, prompt_length, group):
    """While open, the attention of `layer` (1 is the first) from completion tokens to prompt tokens is computed beside the model's own
    kernel, from that layer's queries and keys after rotary. Yields a dict whose 'weights' is (B, G, T, P), mean over heads, no gradient."""
    layers = model.config.text_config.num_hidden_layers
    if not 1 <= layer <= layers:
        raise ValueError(f"attention layer {layer} does not exist: the model has layers 1 to {layers}")
    name = model.model.language_model.config._attn_implementation
    kernel, local, recorded = ALL_ATTENTION_FUNCTIONS[name], ALL_ATTENTION_FUNCTIONS._local_mapping, {}
    before = local.get(name)

    def attention(module, query, key, value, attention_mask, **kwargs):
        if getattr(module, "layer_idx", None) == layer - 1:
            with torch.no_grad():  # query (B, heads, S, d), key (B, kv heads, S, d)
                keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).float().transpose(2, 3)
                parts = []
                for rows in torch.arange(prompt_length, query.shape[2], device=query.device).chunk(group):
                    scores = query[:, :, rows].float() @ keys * kwargs["scaling"]  # (B, heads, T, S)
                    scores = scores.masked_fill(~mask[:, :, rows], float("-inf"))
                    parts.append(scores.softmax(-1)[..., :prompt_length].mean(1))  # (B, T, P)
                recorded["weights"] = torch.stack(parts, dim=1)
        return kernel(module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        yield recorded
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if before is not None:
            ALL_ATTENTION_FUNCTIONS[name] = before


def group_logps(policy, prompts, completions, completion_mask, packed=True, **layers):
    """Policy.forward on a group: packed, or with the prompt repeated for every completion (the oracle). Same shapes and numbers."""
    if packed:
        return policy(prompts, completions, completion_mask, **layers)
    batch, group, length = completions.shape
    flat = (batch * group, 1, length)
    logp, entropy, hidden, attention, weights = policy(
        prompts.repeat(group), completions.view(flat), completion_mask.view(flat), group_size=group, **layers)
    prompt_length = prompts.input_ids.shape[1]
    for layer, states in hidden.items():  # back to the packed layout; the prompt's states are the same in every copy
        states = states.view(batch, group, prompt_length + length, -1)
        hidden[layer] = torch.cat([states[:, 0, :prompt_length], states[:, :, prompt_length:].flatten(1, 2)], dim=1)
    attention = None if attention is None else attention.view(batch, group, length, prompt_length)
    weights = None if weights is None else weights.view(batch, group, length)
    return logp.view(batch, group, length), entropy.view(batch, group, length), hidden, attention, weights


# ------------------------------------------------------------------------------------------------------------ rollouts


def sample_tokens(logits, uniform, temperature=1.0, top_p=1.0):
    """Inverse-CDF sampling: logits (N, V), uniform (N,) in [0, 1) -> (N,). temperature 0 is greedy; top_p keeps the nucleus."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, order = torch.softmax(logits.float() / temperature, dim=-1).sort(dim=-1, descending=True)
    cumulative = probs.cumsum(dim=-1)
    probs = probs.masked_fill(cumulative - probs >= top_p, 0.0)  # the token that crosses top_p stays
    cumulative = probs.cumsum(dim=-1)
    chosen = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
    return order.gather(-1, chosen[:, None]).squeeze(-1)


def row_uniforms(seeds, length):
    """One stream of random numbers per row, from its own seed: (N, length). A row's sample does not depend on its neighbours or rank."""
    return torch.stack([torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def rollout(model, prompts, counts, seeds, max_new_tokens, eos_ids, banned_ids=(), temperature=1.0, top_p=0.95):
    """Sample `counts[b]` completions of prompt b: encode and prefill once; all completions of a prompt then read the one KV cache.

    A step appends one column a completion to its prompt's cache, [prompt | first tokens | second tokens | ...], and a completion sees the
    prompt and its own columns. So the prompt's keys and values exist once, not once a completion, and what has ended just leaves.
    seeds: one int per completion (sum of counts). banned_ids are never sampled (vision placeholders break the next forward).
    Returns completions (N, T) right-padded with eos, mask (N, T).
    """
    policy = Policy(model)
    language, device = model.model.language_model, prompts.input_ids.device
    cache = DynamicCache(config=language.config)
    embeds, deeper = policy.embed(prompts)
    output = language(inputs_embeds=embeds, position_ids=prompts.position_ids, attention_mask=prompts.mask.long(), past_key_values=cache,
                      use_cache=True, **deeper)
    active = torch.full((len(counts), max(counts)), -1, device=device)  # (B, W): the completion that a query belongs to, -1: none
    for row, (count, before) in enumerate(zip(counts, accumulate(counts, initial=0), strict=False)):
        active[row, :count] = torch.arange(before, before + count, device=device)
    hidden = output.last_hidden_state[:, -1:].expand(-1, active.shape[1], -1)  # (B, W, D)
    position, mask, owners = prompts.position_ids.amax(dim=(0, 2)) + 1, prompts.mask, active[:, :0]  # owners (B, cached columns)
    uniforms = row_uniforms(seeds, max_new_tokens).to(device)
    eos, banned = torch.tensor(eos_ids, device=device), torch.tensor(list(banned_ids), dtype=torch.long, device=device)
    tokens = torch.full((sum(counts), max_new_tokens), eos_ids[0], device=device)
    lengths = torch.zeros(sum(counts), dtype=torch.long, device=device)
    for step in range(max_new_tokens):
        alive = active >= 0
        rows = active[alive]  # (n,) completions
        logits = model.lm_head(hidden[alive]).index_fill(-1, banned, float("-inf"))  # (n, V)
        token = sample_tokens(logits, uniforms[rows, step], temperature, top_p)
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
            cache.batch_select_indices(keep)
            active, inputs, position, mask, owners = (tensor[keep] for tensor in (active, inputs, position, mask, owners))
        owners = torch.cat([owners, active], dim=1)
        own = (owners[:, None] == active[..., None]) & (active >= 0)[..., None]  # (B, W, columns)
        seen = torch.cat([mask[:, None].expand(-1, active.shape[1], -1), own], dim=2)  # (B, W, P + columns)
        output = language(inputs_embeds=model.get_input_embeddings()(inputs), attention_mask=seen[:, None], past_key_values=cache,
                          position_ids=(position + step)[None, :, None].expand(3, -1, active.shape[1]), use_cache=True)
        hidden = output.last_hidden_state
    longest = int(lengths.max())
    return tokens[:, :longest], torch.arange(longest, device=device)[None] < lengths[:, None]


def special_tokens(model, processor):
    """The checkpoint's own token ids: those that end a completion, and the vision placeholders that none may contain."""
    config, eos = model.config, model.generation_config.eos_token_id
    eos = processor.tokenizer.eos_token_id if eos is None else eos
    banned = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]
    return eos if isinstance(eos, list) else [eos], banned


def sample_texts(model, processor, prompts, counts, seeds, max_new_tokens, temperature=1.0, top_p=0.95):
    """rollout() with the checkpoint's own stop and vision tokens -> completions (N, T), mask (N, T), decoded texts."""
    tokens, mask = rollout(model, prompts, counts, seeds, max_new_tokens, *special_tokens(model, processor), temperature, top_p)
    texts = [processor.tokenizer.decode(row[valid], skip_special_tokens=True) for row, valid in zip(tokens, mask, strict=True)]
    return tokens, mask, texts


@contextmanager
def sampling(engine):
    """The bare model for a rollout phase: ZeRO-3 parameters gathered once and its hooks off, both put back on leaving."""
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
                try:
                    yield model
                finally:
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
