"""A Qwen-VL checkpoint behind one forward: the packed group, the scoring head, checkpoint loading.

    policy = Policy(model)
    prompts = collate([encoder.encode(example)], model)
    scored = policy(prompts, completions, completion_mask)  # (B, G, T) each -> Scored

Letters in shapes: B prompts, G completions of each, P prompt tokens (left-padded), T completion
tokens (right-padded), S = P + G*T, D hidden size, V vocabulary.
"""

import inspect
import os
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from common.data import DataError
from common.lora import base_checkpoint, load_adapter
from grpo import group_divergence, weights_of_divergence

logger = logging.get_logger(__name__)

# It would plan anew for every length of a row, for seconds a step.
torch.backends.cuda.enable_cudnn_sdp(False)

# ------------------------------------------------------------------ one seam per model family
#
# What a forward needs to know of families and of versions of transformers stands in this section;
# names and layouts of weights are in MISNAMED below and in common/checkpoints.py. To add a
# family: add its config's model_type to one of the two tuples. If its placeholders, vision tower or
# positions work otherwise, change the function below that deals with them. Then add a tiny model of
# it to other_family in tests/conftest.py: the tests compare it with its plain forward.

# A group can be one row: all layers are plain attention, without recurrence or routed experts.
PACKED_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# These repeat the prompt for every completion.
FAMILIES = (*PACKED_FAMILIES, "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


def vision_tokens(config):
    """Ids of the vision placeholders, which no completion may contain."""
    return [
        config.image_token_id,
        config.video_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
    ]


def encode_media(model, pixels, grid):
    """Run the vision tower: pixels (patches, C), grid (media, 3) -> list of (visual tokens, D).

    The first are its output; with DeepStack (Qwen3-VL), one more for each language layer it feeds.
    """
    output = model.model.visual(pixels, grid_thw=grid)
    deeper = getattr(output, "deepstack_features", None) or []
    return [output.pooler_output, *deeper]


def blank_image(config, device):
    """Pixels (patches, C) and grid (1, 3) of the smallest image, all black."""
    vision = config.vision_config
    side = vision.spatial_merge_size
    channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.zeros(side * side, channels, device=device)
    return pixels, torch.tensor([[1, side, side]], device=device)


def rotary_positions(model, input_ids, mask, kinds, grids, videos, seconds):
    """Rotary positions (3, B, P) in time, height and width, as the families were trained.

    Args:
        input_ids, mask: (B, P).
        kinds: (B, P) 0 text, 1 image, 2 video.
        grids: (media, 3) patches of all media in batch order.
        videos: (media,) bool, True for a video, of which a row has one at most.
        seconds: (B,) of a temporal slot, which Qwen2.5-VL's time axis counts.
    """
    position_ids, _ = model.model.get_rope_index(
        input_ids,
        mm_token_type_ids=kinds.int(),
        attention_mask=mask.long(),
        image_grid_thw=grids[~videos],
        video_grid_thw=grids[videos],
        second_per_grid_ts=seconds[(kinds == 2).any(1)],
    )
    return continue_positions(position_ids, kinds, mask)


def continue_positions(position_ids, kinds, mask):
    """Move each run of one kind of token to one behind the largest position before it.

    The Qwen-VL models were trained so. transformers from 5.3 on puts the words behind a video at
    its start plus max(height, width), which is inside the video where its time axis is the longest
    (huggingface/transformers issue 45381).

    Args:
        position_ids: (3, B, P).
        kinds: (B, P) 0 text, 1 image, 2 video.
        mask: (B, P) bool, False on padding.
    Returns:
        New position_ids (3, B, P).
    """
    position_ids = position_ids.clone()
    for row in range(len(kinds)):
        columns = mask[row].nonzero().squeeze(1)
        _, lengths = torch.unique_consecutive(kinds[row, columns], return_counts=True)
        largest = -1
        for run in columns.split(lengths.tolist()):
            position_ids[:, row, run] += largest + 1 - position_ids[0, row, run[0]]
            largest = position_ids[:, row, run].max()
    return position_ids


def cache_argument(language, cache):
    """{name: cache} for a language model's forward: transformers 5.24 renames past_key_values."""
    names = inspect.signature(language.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def checkpoint_activations(model, on=True):
    """Recompute activations in the backward pass, or stop; transformers 6 drops the older names."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_{'enable' if on else 'disable'}")()


# -------------------------------------------------------------------------------------- prompts


@dataclass
class Prompts:
    """A batch of encoded prompts, left-padded; what travels between the stages of a step."""

    input_ids: torch.Tensor  # (B, P)
    mask: torch.Tensor  # (B, P) bool, False on padding
    position_ids: torch.Tensor  # (3, B, P) rotary positions in time, height, width
    kinds: torch.Tensor  # (B, P) 0 text, 1 token of an image, 2 of a video
    pixel_values: torch.Tensor | None  # (patches, C) of all media in batch order, None: all text
    grid_thw: torch.Tensor  # (media, 3) patches in time, height, width
    media: list[int]  # media of each row
    slots: list[int]  # temporal slots of each row's video, 1 for images alone, 0 for text
    features: list | None = None  # Policy.encode's, where a frozen tower has seen these media

    @property
    def visual(self):
        """(B, P) bool, True on visual tokens."""
        return self.kinds > 0

    def to(self, device):
        """Move all tensors but the features, which are made on their device."""
        tensors = {k: value.to(device) for k, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **tensors)

    def repeat(self, times):
        """Repeat row b times[b] times, with its media, as trainers that do not pack a group do.

        Args:
            times: list of B ints.
        Returns:
            Prompts of sum(times) rows.
        """
        rows = torch.arange(len(times)).repeat_interleave(torch.tensor(times))  # source rows
        repeated = replace(
            self,
            input_ids=self.input_ids[rows],
            mask=self.mask[rows],
            position_ids=self.position_ids[:, rows],
            kinds=self.kinds[rows],
            media=[self.media[row] for row in rows],
            slots=[self.slots[row] for row in rows],
        )
        if self.pixel_values is None:
            return repeated

        def select(tensor, sizes):
            """The parts of a tensor that belong to `rows`; every prompt has one of sizes[b]."""
            parts = tensor.split(sizes)
            return torch.cat([parts[row] for row in rows])

        patches = [int(grids.prod(1).sum()) for grids in self.grid_thw.split(self.media)]
        repeated.pixel_values = select(self.pixel_values, patches)
        repeated.grid_thw = select(self.grid_thw, self.media)
        if self.features is not None:
            tokens = self.visual.sum(1).tolist()
            repeated.features = [select(feature, tokens) for feature in self.features]
        return repeated


def collate(items, model):
    """Batch encoded examples (list of media.ModelInputs) into Prompts for the model."""
    config = model.config
    rows = [item.input_ids for item in items]
    ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")  # (B, P)
    mask = ids >= 0
    input_ids = ids.masked_fill(~mask, config.text_config.pad_token_id or 0)
    shown = [item for item in items if item.kinds]
    grids = torch.cat([torch.zeros(0, 3, dtype=torch.long), *(item.grid_thw for item in shown)])
    videos = torch.tensor([kind == "video" for item in items for kind in item.kinds]).bool()
    # (B, P) 0 text, 1 image, 2 video
    kinds = (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
    seconds = torch.tensor([item.second_per_grid for item in items])
    return Prompts(
        input_ids=input_ids,
        mask=mask,
        position_ids=rotary_positions(model, input_ids, mask, kinds, grids, videos, seconds),
        kinds=kinds,
        pixel_values=torch.cat([item.pixel_values for item in shown]) if shown else None,
        grid_thw=grids,
        media=[len(item.kinds) for item in items],
        slots=[item.slots for item in items],
    )


# ------------------------------------------------------------------------------ the packed group


@dataclass
class Layout:
    """Where things are in rows [padding | prompt | c_1 | ... | c_G]; read by group_attention."""

    padding: list[int]  # (B,) columns before each prompt
    group: int  # G, 0: prompts alone
    length: int  # T
    layer: int | None  # whose attention is recorded, 1 is the first
    checkpointed: bool  # whole layers are, so that nothing inside needs to be
    # for each row (G, T, P) attention of completion to prompt tokens, mean over heads, no gradient
    recorded: list = field(default_factory=list)


# Values of a group's copies of its prompt's keys, from which on the backward makes them again.
KEPT_COPIES = 1 << 22


def group_attention(
    module, query, key, value, attention_mask, layout=None, scaling=None, dropout=0.0, **kwargs
):
    """Attention in which a completion sees its prompt and itself: transformers' function "group".

    There is no (S, S) mask: the prompt attends to itself, then every completion to
    [prompt | itself], both causal by position alone. So padding on the right is never seen; on the
    left it is cut off. In a cached step of rollout.py it is attend_apart, in generate sdpa.

    Args:
        query: (B, heads, S, d).
        key, value: (B, key heads, S, d).
    Returns:
        (B, S, heads, d), and None, as transformers expects.
    """
    if isinstance(key, tuple):
        return attend_apart(query, key, value, attention_mask, scaling), None
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    attend = partial(
        scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    begin = query.shape[2] - layout.group * layout.length  # of the completions
    attend_completions = attend_to_both
    copies = layout.group * begin * key.shape[1] * key.shape[3]  # values of a row's keys
    if copies > KEPT_COPIES and not layout.checkpointed:
        # the G copies of the prompt's keys and values are not kept for the backward
        attend_completions = partial(checkpoint, attend_to_both, use_reentrant=False)
    rows = []
    for row, padding in enumerate(layout.padding):
        # (1, heads, prompt, d) each
        prompt = [states[row, None, :, padding:begin] for states in (query, key, value)]
        attended = [attend(*prompt, is_causal=True)]
        if layout.group:
            # (G, heads, T, d) each
            own = [
                states[row, :, begin:].unflatten(1, (layout.group, -1)).transpose(0, 1)
                for states in (query, key, value)
            ]
            completions = attend_completions(attend, *own, *prompt[1:])  # (G, heads, T, d)
            attended.append(completions.transpose(0, 1).flatten(1, 2)[None])
            if layout.layer == module.layer_idx + 1:
                weights = prompt_weights(own[0], own[1], prompt[1], scaling)
                layout.recorded.append(pad(weights, (padding, 0)))
        rows.append(pad(torch.cat(attended, 2), (0, 0, padding, 0)))  # (1, heads, S, d)
    return torch.cat(rows).transpose(1, 2), None


def attend_apart(query, keys, values, seen, scaling):
    """Attention of the newest token of W completions to [prompt | own tokens].

    The prompt's keys and values are read once for all its completions, the own ones once each.

    Args:
        query: (B, heads, W, d).
        keys, values: pairs of the prompt's (B, key heads, P, d), the completions' (B, key heads, W,
            t, d).
        seen: (B, 1, 1, P + t) bool, or of one column, where nothing is hidden.
    Returns:
        (B, W, heads, d).
    """
    prompt, own = keys
    # (B, key heads, W, shared, d)
    rows = query.unflatten(1, (prompt.shape[1], -1)).transpose(2, 3)
    places = rows.shape[2:4]
    to_prompt = products(rows.flatten(2, 3), prompt).unflatten(2, places)
    scores = torch.cat([to_prompt, products(rows, own)], -1)  # (..., shared, P + t)
    # in place: on a CPU the scores' memory is half of the time
    scores.mul_(scaling)
    if seen.shape[-1] > 1:
        scores.masked_fill_(~seen[:, None], float("-inf"))
    weights = torch.softmax(scores, -1, out=scores).to(query.dtype)
    to_prompt, to_own = weights.split([prompt.shape[2], own.shape[3]], -1)
    attended = (to_prompt.flatten(2, 3) @ values[0]).unflatten(2, places) + to_own @ values[1]
    return attended.transpose(1, 2).flatten(2, 3)


def products(rows, columns):
    """Inner products of (..., n, d) and (..., m, d): (..., n, m) in float32."""
    if rows.dtype != torch.bfloat16 or not rows.is_cuda:
        return rows.float() @ columns.float().mT
    # a float32 copy of the keys would be read twice
    flat = torch.bmm(rows.flatten(0, -3), columns.flatten(0, -3).mT, out_dtype=torch.float32)
    return flat.unflatten(0, rows.shape[:-2])


# made here because its class cannot be made within a dispatch mode such as a FLOP counter
LOWER_RIGHT = causal_lower_right(1, 2)


def attend_to_both(attend, query, key, value, prompt_key, prompt_value):
    """Attention of completions to [prompt | themselves].

    Args:
        query, key, value: (G, heads, T, d).
        prompt_key, prompt_value: (1, heads, P, d).
    Returns:
        (G, heads, T, d).
    """
    group, _, length, _ = query.shape
    keys = torch.cat([prompt_key.expand(group, -1, -1, -1), key], 2)  # (G, heads, P + T, d)
    values = torch.cat([prompt_value.expand(group, -1, -1, -1), value], 2)
    columns = keys.shape[2]
    if query.is_cuda:
        # a mask would rule out the flash kernel
        LOWER_RIGHT.seq_len_q = length
        LOWER_RIGHT.seq_len_kv = columns
        return attend(query, keys, values, LOWER_RIGHT)
    mask = torch.ones(length, columns, dtype=torch.bool).tril(columns - length)
    return attend(query, keys, values, mask)


@torch.no_grad()
def prompt_weights(query, key, prompt_key, scaling):
    """Attention of completions to their prompt, mean over heads.

    Args:
        query, key: (G, heads, T, d).
        prompt_key: (1, key heads, P, d).
    Returns:
        (G, T, P).
    """
    shared = query.shape[1] // key.shape[1]
    prompt = prompt_key.shape[2]
    rows = []
    # one completion's scores at a time
    for queries, keys in zip(query, key, strict=True):
        keys = torch.cat([prompt_key[0], keys], 1).repeat_interleave(shared, 0)
        scores = queries.float() @ keys.float().transpose(1, 2) * scaling  # (heads, T, P + T)
        seen = torch.ones_like(scores[0], dtype=torch.bool).tril(prompt)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        rows.append(weights[..., :prompt].mean(0))
    return torch.stack(rows)


ALL_ATTENTION_FUNCTIONS.register("group", group_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("group", sdpa_mask)

# ------------------------------------------------------------------------------ the vision tower


def window_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs
):
    """Attention within the windows of a vision tower: transformers' function "flash_windows".

    Windows of one length are one batch; transformers itself calls sdpa once a window, thousands of
    times for a video. It hands over the bounds to functions with "flash" in their name.

    Args:
        query, key, value: (1, heads, N, d).
        cu_seq_lens_q: (windows + 1,) where windows begin and end.
    Returns:
        (1, N, heads, d), and None, as transformers expects.
    """
    begins = cu_seq_lens_q[:-1]
    lengths = cu_seq_lens_q.diff()
    rows = query.new_zeros(query.shape[2], query.shape[1], query.shape[3])  # (N, heads, d)
    for length in lengths.unique().tolist():
        window = torch.arange(length, device=begins.device)
        columns = begins[lengths == length, None] + window  # (windows, length)
        # (windows, heads, length, d) each
        batch = [states[0][:, columns].transpose(0, 1) for states in (query, key, value)]
        rows[columns] = scaled_dot_product_attention(*batch, scale=scaling).transpose(1, 2)
    return rows[None], None


ALL_ATTENTION_FUNCTIONS.register("flash_windows", window_attention)


class PatchEmbedding(torch.nn.Conv3d):
    """A vision tower's patch embedding: its kernel is a whole patch, so it is one product."""

    def forward(self, patches):
        """(N, C, t, h, w) -> (N, D)."""
        return torch.nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def speed_up_vision(model):
    """Let the model's vision tower use the two above; its numbers stay the same."""
    visual = model.model.visual
    embedding = visual.patch_embed.proj
    if type(embedding) is torch.nn.Conv3d and embedding.stride == embedding.kernel_size:
        embedding.__class__ = PatchEmbedding
    if visual.config._attn_implementation == "sdpa":
        visual.config._attn_implementation = "flash_windows"  # not saved


# ------------------------------------------------------------------------------------ the policy

CHUNK_LOGITS = 1 << 25  # float32 values of (tokens, vocabulary) that exist at a time: 128 MiB


class ScoringHead(torch.nn.Linear):
    """The model's lm_head, which can also score tokens without all their logits.

    One module call, so that ZeRO-3 gathers its weight once, whatever the number of chunks, in which
    ranks differ.
    """

    def forward(self, hidden, targets=None, mask=None, divergence=False):
        """hidden (..., D) -> logits (..., V); with targets, score them in chunks of T.

        Several chunks run under activation checkpointing.

        Args:
            hidden: (B, G, T, D) states before each target.
            targets, mask: (B, G, T).
            divergence: whether to compute grpo.group_divergence.
        Returns:
            [log-probs (B, G, T), entropy (B, G, T), divergence (B, T) if asked].
        """
        if targets is None:
            return super().forward(hidden)
        batch, group, length = targets.shape
        size = max(1, CHUNK_LOGITS // (batch * group * self.out_features))
        score = self.score
        if length > size:
            score = partial(checkpoint, self.score, use_reentrant=False)
        chunks = zip(
            hidden.split(size, 2), targets.split(size, 2), mask.split(size, 2), strict=True
        )
        parts = [score(*chunk, divergence) for chunk in chunks]
        return [torch.cat(values, -1) for values in zip(*parts, strict=True)]

    def score(self, hidden, targets, mask, divergence):
        normalised = torch.log_softmax(super().forward(hidden).float(), dim=-1)  # (B, G, t, V)
        logp = normalised.gather(-1, targets[..., None]).squeeze(-1)
        with torch.no_grad():
            entropy = -torch.linalg.vecdot(normalised.exp(), normalised)
        if divergence:
            return logp, entropy, group_divergence(normalised, mask)
        return logp, entropy


class Scored(NamedTuple):
    """What one forward of the policy says about B groups of G completions."""

    logp: torch.Tensor  # (B, G, T) log-probabilities of the completion tokens
    entropy: torch.Tensor  # (B, G, T) of the next-token distributions, nats
    hidden: dict  # {layer: (B, S, D)} of the asked layers, packed layout, no gradient
    attention: torch.Tensor | None  # (B, G, T, P) of the asked layer, mean over heads
    weights: torch.Tensor | None  # (B, G, T) TW-GRPO's token weights


class Policy(torch.nn.Module):
    """A checkpoint of one of FAMILIES behind one forward.

    ZeRO-3 sees one entry, and image and video rows run the vision tower once, in the same order on
    every rank.
    """

    def __init__(self, model):
        super().__init__()
        head = type(model.lm_head)
        if head not in (torch.nn.Linear, ScoringHead):
            raise ValueError(f"the head must be a plain Linear layer, not {head.__name__}")
        model.lm_head.__class__ = ScoringHead
        family = model.config.model_type
        text = model.model.language_model.config
        kernel = text._attn_implementation
        self.packs = (
            family in PACKED_FAMILIES
            and kernel in ("sdpa", "group")
            and not getattr(text, "use_sliding_window", False)
        )
        if self.packs:
            text._attn_implementation = "group"  # of the language model alone, not saved
        else:
            logger.warning_once(
                f"{family} with {kernel} attention: groups are not packed, every completion "
                f"repeats its prompt (packed: {', '.join(PACKED_FAMILIES)} with sdpa)"
            )
        speed_up_vision(model)
        self.model = model

    def encode(self, prompts):
        """The vision tower's features of all media: list of (visual tokens, D), see encode_media.

        Raises:
            ValueError: their number is not that of the prompts' visual tokens.
        """
        if prompts.pixel_values is None:
            # keeps this rank's ZeRO-3 gathers in step with the ranks that have media
            blank = blank_image(self.model.config, prompts.input_ids.device)
            return encode_media(self.model, *blank)
        features = encode_media(self.model, prompts.pixel_values, prompts.grid_thw)
        visual = int(prompts.visual.sum())
        if len(features[0]) != visual:
            raise ValueError(
                f"{visual} visual tokens in the prompts, {len(features[0])} features from the "
                "vision tower"
            )
        return features

    def forward(
        self,
        prompts,
        completions,
        completion_mask,
        packed=True,
        hidden_layers=(),
        attention_layer=None,
        weight_alpha=None,
    ):
        """Score groups of completions.

        Args:
            prompts: Prompts of B rows.
            completions, completion_mask: (B, G, T).
            packed: a group is one row. Otherwise every completion repeats its prompt, as families
                that cannot pack do: the same shapes and numbers.
            hidden_layers: whose states are returned, 0 embeddings ... -1 after the last norm.
            attention_layer: layer whose attention is returned, 1 is the first; packing models only.
            weight_alpha: alpha of TW-GRPO's token weights, None for no weights.
        Returns:
            Scored.
        Raises:
            ValueError: the model cannot return the attention of that layer.
        """
        batch, group, length = completions.shape
        prompt_length = prompts.input_ids.shape[1]
        # 1. rows: a whole group in each, or one completion
        packed = packed and self.packs
        share = group if packed else 1  # completions in a row
        rows = prompts if packed else prompts.repeat([group] * batch)
        # 2. the language model
        output = self.run(
            rows,
            completions.reshape(-1, share, length),
            completion_mask.reshape(-1, share, length),
            attention_layer,
            use_cache=False,
            output_hidden_states=any(layer != -1 for layer in hidden_layers),
        )
        hidden = output.last_hidden_state  # (rows, S, D)
        # 3. a token's score is in the state before it; before the first is the prompt's last
        source = torch.arange(share * length, device=hidden.device) + prompt_length - 1
        source[::length] = prompt_length - 1
        before = hidden[:, source].view(batch, group, length, -1)
        logp, entropy, *divergence = self.model.lm_head(
            before, completions, completion_mask, weight_alpha is not None
        )
        # 4. what else was asked for
        states = {}
        for layer in hidden_layers:
            values = (hidden if layer == -1 else output.hidden_states[layer]).detach()
            if not packed:
                # the prompt's states are the same in every copy
                values = values.unflatten(0, (batch, group))
                tails = values[:, :, prompt_length:].flatten(1, 2)  # (B, G*T, D)
                values = torch.cat([values[:, 0, :prompt_length], tails], dim=1)
            states[layer] = values  # (B, S, D)
        attention = None
        if attention_layer is not None:
            if not output.attentions:
                raise ValueError(
                    f"no attention of layer {attention_layer}: the model packs: {self.packs}, "
                    f"its layers: 1 to {len(self.model.model.language_model.layers)}"
                )
            attention = torch.stack(output.attentions).view(batch, group, length, prompt_length)
        weights = None
        if weight_alpha is not None:
            weights = weights_of_divergence(*divergence, completion_mask, weight_alpha)
        return Scored(logp, entropy, states, attention, weights)

    def run(self, rows, tails, tails_mask, layer=None, **options):
        """The language model's output of [prompt | completions].

        Args:
            rows: Prompts.
            tails, tails_mask: (rows, G, T) each row's completions; G is 0 for prompts alone.
            layer: whose attention of completions to prompts is read, 1 is the first.
            options: more arguments of the language model's forward.
        Returns:
            Its output; `attentions` is a list of (G, T, P), one a row, empty if there is no such
            layer or the model does not pack.
        """
        language = self.model.model.language_model
        embed = self.model.get_input_embeddings()
        embeds = torch.cat([embed(rows.input_ids), embed(tails.flatten(1))], dim=1)  # (rows, S, D)
        # features stand in for the visual tokens; those of a blank image only join the graph
        group, length = tails.shape[1:]
        visual = pad(rows.visual, (0, group * length))  # (rows, S)
        features = self.encode(rows) if rows.features is None else rows.features
        features = [feature.to(embeds.dtype) for feature in features]
        embeds = embeds.masked_scatter(visual[..., None], features[0])
        # every completion starts right behind the prompt
        start = rows.position_ids.amax(dim=(0, 2)) + 1  # (rows,)
        steps = torch.arange(length, device=tails.device).repeat(group)  # (G*T,)
        later = (start[:, None] + steps)[None].expand(3, -1, -1)
        positions = torch.cat([rows.position_ids, later], dim=2)  # (3, rows, S)
        # one completion, of which the last states are asked: plain causal attention, with the
        # padding behind the row instead of before it
        padding = (~rows.mask).sum(1).tolist()  # columns before each prompt
        plain = self.packs and group == 1 and not (layer or options.get("output_hidden_states"))
        checkpointed = self.model.training and language.layers[0].gradient_checkpointing
        layout = Layout(padding, group, length, layer, checkpointed)
        if plain:
            behind = [-columns for columns in padding]
            embeds = roll_rows(embeds, behind)
            visual = roll_rows(visual, behind)
            positions = torch.stack([roll_rows(axis, behind) for axis in positions])
        elif self.packs:
            options["layout"] = layout
        else:
            options["attention_mask"] = torch.cat([rows.mask, tails_mask.flatten(1)], 1).long()
        if len(features) > 1:
            options |= dict(visual_pos_masks=visual, deepstack_visual_embeds=features[1:])
        output = language(inputs_embeds=embeds, position_ids=positions, **options)
        if plain:
            output.last_hidden_state = roll_rows(output.last_hidden_state, padding)
        output.attentions = layout.recorded
        return output


def roll_rows(values, shifts):
    """Roll row b of values (B, S, ...) by shifts[b] columns to the right."""
    pairs = zip(values, shifts, strict=True)
    return torch.stack([row.roll(shift, 0) for row, shift in pairs])


# ------------------------------------------------------------------------------------- loading

# Names that transformers up to 5.24 gave the weights of a Qwen that ZeRO-3 had partitioned, and
# what they should be.
MISNAMED = {
    r"^model\.model\.": "model.",
    r"^model\.language_model\.model\.": "model.language_model.",
}


def read_config(path, hidden_layer=-1, attention_layer=1, needs_attention=False):
    """Read a checkpoint's config, before anything slow; an adapter's is that of its base.

    Args:
        hidden_layer, attention_layer: layers that will be read.
        needs_attention: whether a family without attention to read is refused.
    Raises:
        DataError: no checkpoint, none of FAMILIES, too few layers, or attention of a family that
            does not pack.
    """
    try:
        config = AutoConfig.from_pretrained(base_checkpoint(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a checkpoint, neither a folder with config.json (of a run: its sft or "
            "grpo) nor a model of the hub that can be downloaded: "
            f"{str(error).splitlines()[0]}"
        ) from error
    family = config.model_type
    if family not in FAMILIES:
        raise DataError(f"{path} is a {family} checkpoint, not one of {', '.join(FAMILIES)}")
    if needs_attention and family not in PACKED_FAMILIES:
        families = ", ".join(PACKED_FAMILIES)
        raise DataError(f"frame use by attention works with {families}, not with {family}")
    layers = config.get_text_config().num_hidden_layers
    if not -1 <= hidden_layer <= layers or not 1 <= attention_layer <= layers:
        raise DataError(
            f"{path} has layers 1 to {layers}, and hidden states 0 to {layers} or -1 (after the "
            "last norm)"
        )
    return config


def load_weights(path, dtype):
    """Load a checkpoint's model; under ZeRO-3 (HfDeepSpeedConfig) it is partitioned while it loads.

    Args:
        path: folder, or model id of the hub.
        dtype: torch.dtype of the weights in memory.
    Raises:
        DataError: the files cannot be read, or lack weights of the model.
    """
    try:
        model, found = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            key_mapping=MISNAMED,
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
    # transformers would start these at random and go on.
    missing = sorted(found["missing_keys"])
    if missing:
        raise DataError(
            f"{path} lacks {len(missing)} weights of a {model.config.model_type} model, "
            f"the first is {missing[0]}"
        )
    return model


def load_processor(path):
    """Load a checkpoint's processor.

    Raises:
        DataError: it has none.
    """
    try:
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} has no processor: {str(error).splitlines()[0]}") from error
    # Frames come in settled sizes; unset, transformers warns that it will cap them.
    processor.video_processor.cap_pixels_per_frame = False
    return processor


def load_model(path):
    """Load a checkpoint for inference, without DeepSpeed.

    Args:
        path: folder, or model id of the hub; the folder of an adapter is merged into its base.
    Returns:
        The model in eval mode on this rank's device (bfloat16 on a GPU, else float32), and its
        processor.
    Raises:
        DataError: the files cannot be read, or lack weights of the model.
    """
    device = "cpu"
    dtype = torch.float32
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        dtype = torch.bfloat16
    base = base_checkpoint(path)
    processor = load_processor(base)
    model = load_weights(base, dtype)
    if base != path:
        model = load_adapter(model, path)
    return model.to(device).eval(), processor
