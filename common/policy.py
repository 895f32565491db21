"""A Qwen-VL checkpoint behind one forward: the packed group, the scoring head, where a response looks."""

import os
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from common.data import DataError
from grpo import group_divergence, weights_of_divergence

logger = logging.get_logger(__name__)


@dataclass
class Prompts:
    """A batch of encoded prompts, left-padded; what travels between the stages of a step."""

    input_ids: torch.Tensor  # (B, P)
    mask: torch.Tensor  # (B, P) bool, False on padding
    position_ids: torch.Tensor  # (3, B, P) rotary positions in time, height, width
    visual: torch.Tensor  # (B, P) bool, True on visual tokens
    pixel_values: (
        torch.Tensor | None
    )  # (patches, C) of all media, in batch order; None when the whole batch is text
    grid_thw: torch.Tensor | None  # (media, 3) patches in time, height, width
    slots: list[int]  # temporal slots of each row's medium, 0 for text
    features: tuple | None = (
        None  # Policy.encode's, when the vision tower is frozen and has seen these media
    )

    def to(self, device):
        moved = {
            f.name: getattr(self, f.name) for f in fields(self)
        }  # features are made on the device
        return Prompts(
            **{
                name: value.to(device) if torch.is_tensor(value) else value
                for name, value in moved.items()
            }
        )

    def padding(self):
        """(B,) columns of padding before each prompt."""
        return (~self.mask).sum(1).tolist()

    def repeat(self, times):
        """Row b times[b] times in a row, its medium too: what the releases do."""
        again = lambda tensor, dim: tensor.repeat_interleave(
            torch.tensor(times, device=tensor.device), dim
        )  # noqa: E731
        pixels, grid, features = self.pixel_values, self.grid_thw, self.features
        if pixels is not None:
            media = [count for count, slots in zip(times, self.slots, strict=True) if slots]

            def copies(tensor, sizes):
                return torch.cat(
                    [
                        part
                        for part, count in zip(tensor.split(sizes), media, strict=True)
                        for _ in range(count)
                    ]
                )

            patches, tokens = (
                grid.prod(1).tolist(),
                [count for count in self.visual.sum(1).tolist() if count],
            )
            pixels, grid = copies(pixels, patches), copies(grid, 1)
            features = features and tuple(copies(feature, tokens) for feature in features)
        return replace(
            self,
            input_ids=again(self.input_ids, 0),
            mask=again(self.mask, 0),
            position_ids=again(self.position_ids, 1),
            visual=again(self.visual, 0),
            pixel_values=pixels,
            grid_thw=grid,
            features=features,
            slots=[
                slots for slots, count in zip(self.slots, times, strict=True) for _ in range(count)
            ],
        )


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
    kinds = (input_ids == config.image_token_id).long() + 2 * (
        input_ids == config.video_token_id
    ).long()
    kinds = kinds * mask  # (B, P): 0 text, 1 image, 2 video
    media = [item for item in items if item["grid_thw"] is not None]
    is_video = [bool((item["input_ids"] == config.video_token_id).any()) for item in media]
    grid = torch.stack([item["grid_thw"] for item in media]) if media else None
    grids = {
        name: grid[[v is video for v in is_video]] if media and video in is_video else None
        for name, video in (("image_grid_thw", False), ("video_grid_thw", True))
    }
    seconds = torch.tensor(
        [item["second_per_grid"] for item, video in zip(media, is_video, strict=True) if video]
    )
    position_ids, _ = core.get_rope_index(
        input_ids,
        mm_token_type_ids=kinds.int(),
        attention_mask=mask.long(),
        **grids,
        second_per_grid_ts=seconds if len(seconds) else None,
    )
    position_ids = continue_positions(position_ids, kinds, mask)
    return Prompts(
        input_ids=input_ids,
        mask=mask,
        position_ids=position_ids,
        visual=kinds > 0,
        pixel_values=torch.cat([item["pixel_values"] for item in media]) if media else None,
        grid_thw=grid,
        slots=[int(item["grid_thw"][0]) if item["grid_thw"] is not None else 0 for item in items],
    )


@dataclass
class Layout:
    """What group_attention has to know of its rows, [padding | prompt | c_1 | ... | c_G]; the language model hands it through."""

    padding: list[int]  # (B,) columns before each prompt
    group: int = 0  # G, 0: prompts alone
    length: int = 0  # T
    layer: int | None = None  # whose attention is recorded, 1 is the first
    recorded: torch.Tensor | None = (
        None  # (B, G, T, P) of completion tokens to prompt tokens, mean over heads, no gradient
    )
    checkpointed: bool = False  # whole layers are, so that nothing inside needs to be


def group_attention(
    module, query, key, value, attention_mask, layout=None, scaling=None, dropout=0.0, **kwargs
):
    """transformers' attention function "group": a completion sees its prompt and itself. query (B, heads, S, d), key and value
    (B, key heads, S, d) -> (B, S, heads, d), None. There is no (S, S) mask: the prompt attends to itself and then every completion to
    [prompt | itself], both causal by position alone, so that padding on the right is never seen; padding on the left is cut off.

    Without a layout it is sdpa, but where there is a mask, the query heads of a key head become rows: sdpa would repeat the keys.
    """
    if layout is None:
        shared = query.shape[1] // key.shape[1]
        if attention_mask is None or shared == 1:
            return sdpa_attention_forward(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                **kwargs,
            )
        rows = query.unflatten(1, (-1, shared)).flatten(2, 3)  # (B, key heads, shared * S, d)
        attended = scaled_dot_product_attention(
            rows, key, value, attention_mask.repeat(1, 1, shared, 1), dropout, scale=scaling
        )
        return attended.unflatten(2, (shared, -1)).flatten(1, 2).transpose(1, 2), None
    attend = partial(
        scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    ends, rows, recorded = layout.group * layout.length, [], []
    for padding, *row in zip(layout.padding, query, key, value, strict=True):
        prompt, tail = zip(
            *(
                states[None, :, padding:].split([states.shape[1] - padding - ends, ends], 2)
                for states in row
            ),
            strict=True,
        )
        parts = [attend(*prompt, is_causal=True)]  # (1, heads, prompt, d)
        if layout.group:
            own = [
                states[0].unflatten(1, (layout.group, layout.length)).transpose(0, 1)
                for states in tail
            ]  # (G, heads, T, d)
            both = (
                attend_to_both
                if layout.checkpointed
                else partial(checkpoint, attend_to_both, use_reentrant=False)
            )  # keeps no G copies
            parts.append(both(attend, *own, *prompt[1:]).transpose(0, 1).flatten(1, 2)[None])
            if layout.layer == module.layer_idx + 1:
                recorded.append(
                    pad(prompt_weights(own[0], own[1], prompt[1], scaling), (padding, 0))
                )
        rows.append(pad(torch.cat(parts, 2), (0, 0, padding, 0)))  # (1, heads, S, d)
    if recorded:
        layout.recorded = torch.stack(recorded)
    return torch.cat(rows).transpose(1, 2), None


LOWER_RIGHT = causal_lower_right(
    1, 2
)  # made here, for its class cannot be made within a dispatch mode such as a FLOP counter


def attend_to_both(attend, query, key, value, prompt_key, prompt_value):
    """Completions (G, heads, T, d) to [prompt (1, heads, P, d) | themselves] -> (G, heads, T, d)."""
    keys, values = (
        torch.cat([prompt.expand(len(own), -1, -1, -1), own], 2)
        for prompt, own in ((prompt_key, key), (prompt_value, value))
    )
    length, columns = query.shape[2], keys.shape[2]
    if not query.is_cuda:
        return attend(
            query,
            keys,
            values,
            torch.ones(length, columns, dtype=torch.bool).tril(columns - length),
        )
    LOWER_RIGHT.seq_len_q, LOWER_RIGHT.seq_len_kv = length, columns
    return attend(query, keys, values, LOWER_RIGHT)  # a mask would rule out the flash kernel


@torch.no_grad()
def prompt_weights(query, key, prompt_key, scaling):
    """Attention of completions (G, heads, T, d) to their prompt (1, key heads, P, d) -> (G, T, P), mean over heads."""
    shared, rows = query.shape[1] // key.shape[1], []
    for queries, keys in zip(query, key, strict=True):  # one completion's scores at a time
        keys = (
            torch.cat([prompt_key[0], keys], 1).repeat_interleave(shared, 0).float()
        )  # (heads, P + T, d)
        scores = queries.float() @ keys.transpose(1, 2) * scaling
        own = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).tril(
            prompt_key.shape[2]
        )
        rows.append(
            scores.masked_fill(~own, float("-inf")).softmax(-1)[..., : prompt_key.shape[2]].mean(0)
        )
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
        chunks = list(
            zip(hidden.split(size, 2), targets.split(size, 2), mask.split(size, 2), strict=True)
        )
        parts = [
            checkpoint(self.score, *chunk, divergence, use_reentrant=False)
            if len(chunks) > 1
            else self.score(*chunk, divergence)
            for chunk in chunks
        ]
        logp, entropy, differences = zip(*parts, strict=True)
        return (
            torch.cat(logp, 2),
            torch.cat(entropy, 2),
            torch.cat(differences, 1) if divergence else None,
        )

    def score(self, hidden, targets, mask, divergence):
        normalised = torch.log_softmax(super().forward(hidden).float(), dim=-1)  # (B, G, t, V)
        logp = normalised.gather(-1, targets[..., None]).squeeze(-1)
        with torch.no_grad():
            entropy = -torch.linalg.vecdot(normalised.exp(), normalised)
            return logp, entropy, group_divergence(normalised, mask) if divergence else None


PACKED_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

FAMILIES = (*PACKED_FAMILIES, "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


class Scored(NamedTuple):
    """What one forward of the policy says about B groups of G completions."""

    logp: torch.Tensor  # (B, G, T) log-probabilities of the completion tokens
    entropy: torch.Tensor  # (B, G, T) of the next-token distributions, nats
    hidden: dict  # {layer: (B, S, D)} of the asked layers, packed layout, no gradient
    attention: torch.Tensor | None  # (B, G, T, P) of the asked layer, mean over heads
    weights: torch.Tensor | None  # (B, G, T) TW-GRPO's token weights


class Policy(torch.nn.Module):
    """A Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint behind one forward, so that ZeRO-3 sees one entry and image and video rows run the
    vision tower once, in the same order on every rank."""

    def __init__(self, model):
        super().__init__()
        if type(model.lm_head) is torch.nn.Linear:
            model.lm_head.__class__ = ScoringHead
        if not isinstance(model.lm_head, ScoringHead):
            raise ValueError(
                f"the head must be a plain Linear layer, not {type(model.lm_head).__name__}"
            )
        text = model.model.language_model.config
        self.packs = (
            model.config.model_type in PACKED_FAMILIES
            and text._attn_implementation in ("sdpa", "group")
            and not getattr(text, "use_sliding_window", False)
        )
        if self.packs:
            text._attn_implementation = "group"  # the language model's alone, and in memory alone
        else:
            logger.warning_once(
                f"{model.config.model_type} with {text._attn_implementation} attention: groups are not packed, every "
                f"completion repeats its prompt (packed: {', '.join(PACKED_FAMILIES)} with sdpa)"
            )
        self.model = model

    def encode(self, prompts):
        """The vision tower's features of all media, (visual tokens, D) each: its output, and for Qwen3-VL those of its DeepStack layers."""
        pixels, grid = prompts.pixel_values, prompts.grid_thw
        if (
            pixels is None
        ):  # text alone: a blank image keeps this rank's ZeRO-3 gathers in step with the ranks that have videos
            vision = self.model.config.vision_config
            side, device = vision.spatial_merge_size, prompts.input_ids.device
            pixels = torch.zeros(
                side * side,
                vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
                device=device,
            )
            grid = torch.tensor([[1, side, side]], device=device)
        output = self.model.model.visual(pixels, grid_thw=grid)
        features = (output.pooler_output, *(getattr(output, "deepstack_features", None) or ()))
        if prompts.pixel_values is not None and len(features[0]) != int(prompts.visual.sum()):
            raise ValueError(
                f"{int(prompts.visual.sum())} visual tokens in the prompts, {len(features[0])} features from the vision tower"
            )
        return features

    def embed(self, prompts):
        """-> (B, P, D) token embeddings with the vision tower's features on the visual tokens, and what else the language model needs."""
        embeds = self.model.get_input_embeddings()(prompts.input_ids)
        features = self.encode(prompts) if prompts.features is None else prompts.features
        features = [feature.to(embeds.dtype) for feature in features]
        if prompts.pixel_values is None:
            return embeds + 0 * sum(feature.sum() for feature in features), {}
        deeper = (
            {"visual_pos_masks": prompts.visual, "deepstack_visual_embeds": features[1:]}
            if features[1:]
            else {}
        )
        return embeds.masked_scatter(prompts.visual[..., None], features[0]), deeper

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
        """completions, completion_mask (B, G, T) -> logp (B, G, T) of the completion tokens, entropy (B, G, T),
        hidden {layer: (B, S, D)} of `hidden_layers` (0 embeddings ... -1 after the last norm), without gradient,
        attention (B, G, T, P) of completion tokens to prompt tokens in `attention_layer` (1 is the first), mean over heads, or None,
        weights (B, G, T): TW-GRPO's token_weights with alpha `weight_alpha`, or None.

        packed: a group is one row; otherwise a row [prompt | completion] each, the oracle and the way of models that cannot pack. Shapes
        and numbers are the same.
        """
        (batch, group, length), prompt_length = completions.shape, prompts.input_ids.shape[1]
        packed = packed and self.packs
        rows, share = (
            (prompts, group) if packed else (prompts.repeat([group] * batch), 1)
        )  # share: completions in a row
        tail, valid = (
            tensor.reshape(-1, share * length) for tensor in (completions, completion_mask)
        )
        embeds, more = self.embed(rows)
        embeds = torch.cat([embeds, self.model.get_input_embeddings()(tail)], dim=1)  # (B, S, D)
        if more:
            more["visual_pos_masks"] = pad(rows.visual, (0, share * length))  # (B, S)
        start = (
            rows.position_ids.amax(dim=(0, 2)) + 1
        )  # (B,) every completion restarts right after the prompt
        steps = torch.arange(length, device=tail.device).repeat(share)  # (G*T,)
        positions = torch.cat(
            [rows.position_ids, (start[:, None] + steps)[None].expand(3, -1, -1)], dim=2
        )  # (3, B, S)
        layers = self.model.config.text_config.num_hidden_layers
        if attention_layer is not None and not (self.packs and 1 <= attention_layer <= layers):
            raise ValueError(
                f"no attention of layer {attention_layer}: the model has layers 1 to {layers}, and packs: {self.packs}"
            )
        checkpointed = (
            self.model.training and self.model.model.language_model.layers[0].gradient_checkpointing
        )
        layout = Layout(rows.padding(), share, length, attention_layer, checkpointed=checkpointed)
        more |= (
            {"layout": layout}
            if self.packs
            else {"attention_mask": torch.cat([rows.mask, valid], dim=1).long()}
        )
        output = self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=positions,
            use_cache=False,
            output_hidden_states=any(layer != -1 for layer in hidden_layers),
            **more,
        )
        hidden = output.last_hidden_state  # (B, S, D)
        index = torch.arange(share * length, device=tail.device)
        source = torch.where(
            index % length == 0, prompt_length - 1, prompt_length + index - 1
        )  # the token before; t=0: the prompt's last
        scored = hidden[:, source].view(*completions.shape, -1)
        logp, entropy, divergence = self.model.lm_head(
            scored, completions, completion_mask, weight_alpha is not None
        )
        weights = None
        if weight_alpha is not None:
            weights = torch.stack(
                [
                    weights_of_divergence(*one, weight_alpha)
                    for one in zip(divergence, completion_mask, strict=True)
                ]
            )
        states = {
            layer: (hidden if layer == -1 else output.hidden_states[layer]).detach()
            for layer in hidden_layers
        }
        if not packed:  # the prompt's states are the same in every copy
            apart = {
                layer: values.view(batch, group, prompt_length + length, -1)
                for layer, values in states.items()
            }
            states = {
                layer: torch.cat(
                    [values[:, 0, :prompt_length], values[:, :, prompt_length:].flatten(1, 2)],
                    dim=1,
                )
                for layer, values in apart.items()
            }
        attention = (
            None
            if layout.recorded is None
            else layout.recorded.view(batch, group, length, prompt_length)
        )
        return Scored(logp, entropy, states, attention, weights)


def checkpoint_activations(model, on=True):
    """Recompute activations in the backward pass, or no longer; the methods whose name has gradient end with transformers 6."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_{'enable' if on else 'disable'}")()


# Names that transformers up to 5.24 gave the weights of a Qwen that ZeRO-3 had partitioned, and what
# they should be.
MISNAMED = {
    r"^model\.model\.": "model.",
    r"^model\.language_model\.model\.": "model.language_model.",
}


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


def load_model(path):
    """Load a checkpoint for inference, without DeepSpeed.

    Args:
        path: folder, or model id of the hub.
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
    try:
        processor = AutoProcessor.from_pretrained(path)
    except OSError as error:
        raise DataError(f"{path} has no processor: {str(error).splitlines()[0]}") from error
    return load_weights(path, dtype).to(device).eval(), processor
