"""What one answer looks at (visualize.py sample): the prior's cues over the sampled frames, frame use by the paper's score and by
attention, heat maps within the frames, the slot that each token leans on, and the answer's rewards. For one model, or two side by side.

Letters in shapes: K frames, t temporal slots of h x w = M visual tokens (after merging), L tokens of the answer, D hidden size.
"""

import json
import os
import sys
import textwrap
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as hf_logging

import reward
from common.data import DataError, Example, read_template
from common.media import Encoder, decode_frames, open_video
from common.pages import panels_html, table_html, write_report
from common.plots import (
    CUES,
    DASHES,
    DPI,
    SHEETS,
    Panel,
    data_url,
    draw,
    jpeg,
    short_names,
    shorten,
    thumbnail,
)
from common.policy import FAMILIES, Policy, collate
from common.rollout import Sampling, sample_texts
from grpo import rollout_frame_use, token_frame_use
from prior import PriorSettings, load_clip, make_prior


@dataclass
class Look:
    """What one model's answer looks at: t slots of h x w patches (after merging), L tokens of the answer."""

    name: str
    text: str
    pieces: list[str]  # (L,) the text of each token
    uses: dict  # (score, tau or None) -> frame use (t,)
    tokens: dict  # score -> what each token makes of each slot (L, t): cosine, or share of its attention
    maps: dict  # score -> (t, h, w): what each patch adds to the slot's score


def token_pieces(ids, tokenizer):
    """Token ids (L,) -> the text that each adds; a character of several tokens goes to its last."""
    pieces, done = [], ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        whole = text if count == len(ids) or not text.endswith("\ufffd") else done
        pieces.append(whole[len(done) :])
        done = whole
    return pieces


def patch_contributions(response, patches, pool):
    """What each visual token adds to its slot's score S_i = mean_t cos(h_t, f_i) (Eq. 3-4): (L, D), (t, M, D) -> (t, M), S_i summed over M.
    Under max pooling a channel belongs to the token that has its largest value; under mean pooling to all of them."""
    frames = reward.pool_frames(patches, pool)  # (t, D)
    direction = torch.nn.functional.normalize(response.float(), dim=-1).mean(0)  # (D,)
    own = patches.float() / patches.shape[1]
    if pool == "max":
        winners = patches.float().argmax(1, keepdim=True)  # (t, 1, D)
        own = torch.zeros_like(own).scatter(1, winners, frames[:, None])
    return own @ direction / frames.norm(dim=-1, keepdim=True)


def check_model(arguments, settings, path):
    """DataError for what is no checkpoint, of a family whose frame use is not known, or without the layers to be read. -> sentences about
    settings that the training run beside the checkpoint had otherwise."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no checkpoint: {str(error).splitlines()[0]}") from error
    if config.model_type not in FAMILIES:
        raise DataError(
            f"{path} is a {config.model_type} checkpoint; frame use is known for {', '.join(FAMILIES)}"
        )
    layers = config.get_text_config().num_hidden_layers
    if not -1 <= arguments.hidden_layer <= layers or not 1 <= arguments.attention_layer <= layers:
        raise DataError(
            f"{path} has layers 1 to {layers} (--attention_layer), and hidden states 0 to {layers} or -1 (--hidden_layer)"
        )
    file, asked = Path(path).parent / "run.json", vars(arguments) | vars(settings)
    trained = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return [
        f"{path} was trained with --{name} {trained[name]}, here it is {asked[name]}"
        for name in (
            "frames",
            "min_pixels",
            "max_pixels",
            "frame_times",
            "prompt_template",
            "system_prompt",
        )
        if trained.get(name, asked[name]) != asked[name]
    ]


@torch.no_grad()
def look(arguments, name, path, example, row):
    """The answer of one checkpoint to the example, and what it looks at."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = (
            AutoModelForImageTextToText.from_pretrained(
                path,
                dtype=torch.bfloat16 if device == "cuda" else torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
            )
            .to(device)
            .eval()
        )
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
    policy = Policy(model)
    encoder = Encoder(
        processor,
        arguments.min_pixels,
        arguments.max_pixels,
        len(row["frames"]),
        read_template(arguments.prompt_template),
        cache_gb=0,
        frame_times=arguments.frame_times,
        system_prompt=arguments.system_prompt,
    )
    item = encoder.encode(example, row)
    prompts = collate([item], model).to(device)
    merge = model.config.vision_config.spatial_merge_size
    slots, height, width = (item["grid_thw"] // torch.tensor([1, merge, merge])).tolist()
    if slots < 2:
        raise DataError(
            f"{example.media}: {len(row['frames'])} sampled frames make one slot of the model, with nothing to choose from"
        )
    settings = Sampling(arguments.max_completion_length, arguments.temperature)
    tokens, mask, _, (text,) = sample_texts(
        model, processor, prompts, [1], [arguments.seed], settings
    )
    _, _, hidden, attention, _ = policy(
        prompts,
        tokens[:, None],
        mask[:, None],
        hidden_layers=(arguments.hidden_layer,),
        attention_layer=arguments.attention_layer if policy.packs else None,
    )
    states = hidden[arguments.hidden_layer]
    if not states.isfinite().all():
        raise DataError(f"{path}: its hidden states of this video are not finite numbers")
    columns = prompts.visual[0].nonzero().squeeze(1)
    patches, response = (
        states[0, columns].view(slots, height * width, -1),
        states[0, -tokens.shape[1] :],
    )
    uses, each, maps = {}, {}, {}
    for pool in ("max", "mean"):
        each[pool] = token_frame_use(prompts, 0, mask[0], states, pool=pool).cpu()
        maps[pool] = patch_contributions(response, patches, pool).view(slots, height, width).cpu()
        for tau in (0.1, 1.0):
            uses[pool, tau] = rollout_frame_use(prompts, mask[:, None], states, tau=tau, pool=pool)[
                0
            ][0].cpu()
    if attention is not None:
        uses["attention", None] = rollout_frame_use(prompts, mask[:, None], attention=attention)[0][
            0
        ].cpu()
        each["attention"] = token_frame_use(prompts, 0, mask[0], attention=attention).cpu()
        maps["attention"] = (
            attention[0, 0][:, columns].float().mean(0).view(slots, height, width).cpu()
        )
    return Look(name, text, token_pieces(tokens[0].tolist(), processor.tokenizer), uses, each, maps)


def score_name(score, layers):
    return {
        "max": "max pooling",
        "mean": "mean pooling",
        "attention": f"attention, layer {layers[1]}",
    }[score]


def reward_rows(arguments, example, row, looks):
    """Rows of the table: every reward that one answer has by itself. The temporal term takes a group of them."""
    merged = {
        len(use): reward.merge_prior(torch.tensor(row["prior"]), len(use))
        for one in looks
        for use in one.uses.values()
    }
    consensus = [
        {key: reward.consensus_frame_reward(merged[len(use)], use) for key, use in one.uses.items()}
        for one in looks
    ]
    rows = [
        ("answer", *(escape(reward.extract_answer(one.text)) or "–" for one in looks)),
        (
            "tokens",
            *(
                f"{len(one.pieces)}{', cut' if len(one.pieces) == arguments.max_completion_length else ''}"
                for one in looks
            ),
        ),
    ]
    for key in dict.fromkeys(key for one in consensus for key in one):
        score, tau = key
        told = score_name(score, (arguments.hidden_layer, arguments.attention_layer)) + (
            f", τ = {tau:g}" if tau else ""
        )
        paper = " (the paper's)" if key == ("max", 0.1) and arguments.hidden_layer == -1 else ""
        rows.append(
            (
                f"R_cf, {told}{paper}",
                *(f"{one[key]:.3f}" if key in one else "–" for one in consensus),
            )
        )
    rows.append(("R_cf of even use", *(f"{1 / len(one.uses['max', 0.1]):.3f}" for one in looks)))
    rows.append(
        (
            "R_cf of use of the best slot alone",
            *(f"{merged[len(one.uses['max', 0.1])].max():.3f}" for one in looks),
        )
    )
    right = [
        reward.accuracy_reward(one.text, example.answer, example.problem_type)
        if example.answer
        else None
        for one in looks
    ]
    terms = {
        "accuracy": right,
        "format": [reward.format_reward(one.text) for one in looks],
        "length": [
            None if value is None else reward.length_reward(len(one.pieces), value)
            for one, value in zip(looks, right, strict=True)
        ],
        f"consensus, {arguments.cfr_weight:g} × accuracy × R_cf (max pooling, τ = 0.1)": [
            None if value is None else arguments.cfr_weight * reward.gate(value) * one["max", 0.1]
            for one, value in zip(consensus, right, strict=True)
        ],
    }
    terms["total, without the temporal term"] = [
        None if None in column else sum(column) for column in zip(*terms.values(), strict=True)
    ]
    return rows + [
        (f"reward: {name}", *("–" if value is None else f"{value:.3f}" for value in column))
        for name, column in terms.items()
    ]


def time_ticks(axes, times):
    """Frames stand side by side on the x axis, named by their times, as many of them as fit. Returns every how many are named."""
    step = -(
        -len(times) // max(2, int(axes.get_position().width * axes.figure.get_figwidth() / 0.62))
    )
    axes.set(xlim=(-0.5, len(times) - 0.5), xticks=range(0, len(times), step))
    axes.set_xticklabels([f"{time:.1f} s" for time in times[::step]])
    return step


def prior_parts(row):
    """{cue: (K,)}: what uniform coverage, the scene cue and the semantic cue add to each frame's P (Eq. 1-2); their sum is P."""
    settings, count = PriorSettings(**row["settings"]), len(row["prior"])
    weights = {
        "prior": np.full(count, settings.w_base),
        "scene": np.zeros(count),
        "semantic": np.zeros(count),
    }
    weights["scene"][row["scene"]] = settings.w_scene * settings.has_scene
    weights["semantic"][row["semantic"]] = settings.w_sem * settings.has_semantic
    return {name: weight / sum(weights.values()).sum() for name, weight in weights.items()}


def plot_prior(axes, sheet, row):
    """P, each bar made of its three cues' parts."""
    bottom, parts = np.zeros(len(row["prior"])), prior_parts(row)
    for (name, part), hatch in zip(parts.items(), ("", "//", ".."), strict=True):
        axes.bar(
            range(len(part)),
            part,
            bottom=bottom,
            width=0.8,
            color=sheet.lines[CUES[name]],
            hatch=hatch,
        )
        bottom += part
    axes.set_ylabel("P")
    time_ticks(axes, row["times"])
    return "Frames: " + ", ".join(
        f"{time:.1f} s {value:.3f}" for time, value in zip(row["times"], row["prior"], strict=True)
    )


def plot_cue(axes, sheet, row, name, unit, threshold=None):
    """The K scores of a cue; those of the chosen frames are filled. Cosines are dots, since their zero means nothing."""
    scores, chosen, colour = row[f"{name}_scores"], row[name], sheet.lines[CUES[name]]
    faces = [colour if position in chosen else sheet.back for position in range(len(scores))]
    if name == "semantic":
        axes.scatter(
            range(len(scores)), scores, s=60, color=faces, edgecolor=colour, linewidth=1.4, zorder=3
        )
        axes.margins(y=0.15)
    else:
        axes.bar(
            range(len(scores)), scores, width=0.8, color=faces, edgecolor=colour, linewidth=1.2
        )
    if threshold is not None:
        axes.axhline(threshold, color=sheet.text, linestyle="--", linewidth=1)
    axes.set_ylabel(unit)
    time_ticks(axes, row["times"])
    return "Frames: " + ", ".join(
        f"{time:.1f} s {score:.3f}{' chosen' if position in chosen else ''}"
        for position, (time, score) in enumerate(zip(row["times"], scores, strict=True))
    )


def plot_use(axes, sheet, row, looks, score):
    """Frame use over slots of every model, P merged into them (dotted) behind."""
    told = []
    for index, one in enumerate(looks):
        for (name, tau), use in one.uses.items():
            if name != score:
                continue
            patch = -(-len(row["times"]) // len(use))  # frames in a slot
            edges = [min(patch * slot, len(row["times"])) - 0.5 for slot in range(len(use) + 1)]
            if not told:
                merged = reward.merge_prior(torch.tensor(row["prior"]), len(use))
                axes.stairs(merged, edges, fill=True, color=sheet.lines[CUES["prior"]], alpha=0.25)
                axes.stairs(
                    merged,
                    edges,
                    color=sheet.lines[CUES["prior"]],
                    linestyle=(0, (1, 1)),
                    linewidth=1.5,
                )
                axes.axhline(1 / len(use), color=sheet.text, linewidth=0.8)
            axes.stairs(
                use,
                edges,
                baseline=None,
                color=sheet.lines[index],
                linewidth=3 - 1.4 * index,  # the second within the first
                linestyle=(0, DASHES[1]) if tau == 1 else "-",
            )
            told.append(
                f"{one.name}{f', τ = {tau:g}' if tau else ''}: {', '.join(f'{value:.3f}' for value in use.tolist())}"
            )
    axes.set(ylabel="share of use", ylim=(0, None))
    time_ticks(axes, row["times"])
    return f"Share of each slot. {'; '.join(told)}."


def sample_panels(arguments, row, looks):
    panels, layers = [], (arguments.hidden_layer, arguments.attention_layer)
    if row["settings"]["scene"] == "hsv":
        caption = "How much a frame's colours differ from the one before; filled: begins a scene; dashed: the least score of a cut."
        threshold = PriorSettings(**row["settings"]).hsv_threshold
    else:
        caption, threshold = (
            f"1 where PySceneDetect's {row['settings']['scene']} detector finds a cut.",
            None,
        )
    panels.append(
        Panel(
            "Scene cue",
            caption,
            lambda axes, sheet: plot_cue(axes, sheet, row, "scene", "distance", threshold),
        )
    )
    if row["semantic_scores"]:
        caption = f"Cosine of question and frame (CLIP); filled: the {len(row['semantic'])} frames most like the question."
        panels.append(
            Panel(
                "Semantic cue",
                caption,
                lambda axes, sheet: plot_cue(axes, sheet, row, "semantic", "cosine"),
            )
        )
    left = (
        f" --prior {row['settings']['prior']} leaves a cue out."
        if row["settings"]["prior"] != "full"
        else ""
    )
    caption = f"Eq. 1-2: every frame some weight, and that of each cue that names it, in its colour.{left}"
    panels.append(Panel("Prior P", caption, lambda axes, sheet: plot_prior(axes, sheet, row)))
    of = "the last layer" if layers[0] == -1 else f"hidden states {layers[0]}"
    captions = {
        "max": f"Eq. 3-5 of {of}, channel-wise max over a frame's tokens.",
        "mean": f"The same with their mean ({of}).",
        "attention": f"The answer's attention to each slot in layer {layers[1]}, mean over heads.",
    }
    for score in captions:
        if any(score == name for one in looks for name, _ in one.uses):
            panels.append(
                Panel(
                    f"Frame use, {score_name(score, layers)}",
                    captions[score],
                    lambda axes, sheet, score=score: plot_use(axes, sheet, row, looks, score),
                )
            )
    return panels


def plot_strip(axes, thumbs, times):
    """As many of the frames (K, h, w, 3) as fit in a row, each over the bars of those that it stands for."""
    step, (inches, high), (height, width) = (
        time_ticks(axes, times),
        axes.bbox.size / axes.figure.dpi,
        thumbs[0].shape[:2],
    )
    across = (
        0.96 * step
    )  # of the room that a shown frame has, in frames; less where it would be higher than the strip
    tall = across * inches / len(thumbs) * height / width / high
    across, tall = across / max(tall, 1.0), min(tall, 1.0)
    for position in range(0, len(thumbs), step):
        share = min(1.0, (len(thumbs) - position) / step)  # the last one may stand for fewer
        left = position - 0.5 + share * (step - across) / 2
        axes.imshow(
            thumbs[position], extent=(left, left + share * across, 0, share * tall), aspect="auto"
        )
    axes.set(xlim=(-0.5, len(thumbs) - 0.5), ylim=(0, 1), yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return f"{len(thumbs[::step])} of {len(thumbs)} frames."


def heat(values, low, high, thumb, strength=0.75):
    """(h, w) values over a grey thumbnail (H, W, 3): magma from low to high, one flat cell a patch."""
    scaled = ((values - low) / max(float(high - low), 1e-12)).clamp(0, 1).numpy()
    colours = (matplotlib.colormaps["magma"](scaled)[..., :3] * 255).astype(np.uint8)
    colours = cv2.resize(colours, thumb.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    grey = cv2.cvtColor(cv2.cvtColor(thumb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(colours, strength, grey, 1 - strength, 0)


def slot_maps(one, thumbs):
    """{score: the slots' heat maps (t, H, W, 3)} over the first frame of each slot; one colour scale a score."""
    found = {}
    for score, maps in one.maps.items():
        patch = -(-len(thumbs) // len(maps))
        found[score] = [
            heat(values, maps.min(), maps.max(), thumbs[slot * patch])
            for slot, values in enumerate(maps)
        ]
    return found


def maps_figure(looks, thumbs, times, layers, across=8):
    """Slots side by side, `across` in a line; under each its frame, and a heat map per model and score."""
    slots = max(len(one.uses["max", 0.1]) for one in looks)
    patch, across = -(-len(thumbs) // slots), min(across, slots)
    rows, drawn = (
        [("frame", [thumbs[slot * patch] for slot in range(slots)])],
        [slot_maps(one, thumbs) for one in looks],
    )
    for score in dict.fromkeys(score for maps in drawn for score in maps):
        for one, maps in zip(looks, drawn, strict=True):
            if score in maps:
                name = score_name(score, layers)
                rows.append(
                    (f"{name}\n{shorten(one.name, 22)}" if len(looks) > 1 else name, maps[score])
                )
    blocks, shape = -(-slots // across), thumbs[0].shape
    wide, left = 1.35, 1.9  # inches
    high, gap = wide * shape[0] / shape[1], 0.08
    block = len(rows) * (high + gap) + 0.35
    across_inches = left + across * (wide + gap) + 0.1
    heading = "What each patch adds to its slot's score: black least, pale yellow most, one colour scale a row"
    heading = textwrap.wrap(heading, int(9 * across_inches))
    top = 0.25 + 0.25 * len(heading)
    size = across_inches, top + blocks * block
    sheet = SHEETS["light"]
    figure = Figure(size, dpi=DPI, facecolor=sheet.back)
    FigureCanvasAgg(figure)
    figure.text(
        0.15 / size[0],
        1 - 0.12 / size[1],
        "\n".join(heading),
        fontsize=13,
        fontweight="bold",
        va="top",
        color=sheet.text,
    )
    for slot in range(slots):
        line, column = divmod(slot, across)
        for index, (name, pictures) in enumerate(rows):
            y = size[1] - top - line * block - 0.25 - (index + 1) * (high + gap)
            axes = figure.add_axes(
                (
                    (left + column * (wide + gap)) / size[0],
                    y / size[1],
                    wide / size[0],
                    high / size[1],
                )
            )
            if slot < len(pictures):
                axes.imshow(pictures[slot])
            axes.set_axis_off()
            if index == 0:
                axes.set_title(f"{times[slot * patch]:.1f} s", fontsize=11, color=sheet.text, pad=3)
            if column == 0:
                figure.text(
                    (left - 0.12) / size[0],
                    (y + high / 2) / size[1],
                    name,
                    ha="right",
                    va="center",
                    fontsize=11,
                    color=sheet.text,
                    parse_math=False,
                )
    figure.canvas.draw()
    return figure


def slot_colours(slots):
    """Colours of the slots in time order, dark to bright: (background, readable text) each."""
    backs = [matplotlib.colormaps["cividis"](slot / max(slots - 1, 1))[:3] for slot in range(slots)]
    return [
        (
            matplotlib.colors.to_hex(back),
            "#000" if np.dot(back, (0.3, 0.59, 0.11)) > 0.5 else "#fff",
        )
        for back in backs
    ]


def text_html(one, score, times):
    """The answer, each token on the colour of the slot that it leans on most; where that changes, the slot's number follows."""
    best, colours, parts = (
        one.tokens[score].argmax(1).tolist(),
        slot_colours(one.tokens[score].shape[1]),
        [],
    )
    patch = -(-len(times) // len(colours))
    shown = [(piece, slot) for piece, slot in zip(one.pieces, best, strict=True) if piece]
    for index, (piece, slot) in enumerate(shown):
        back, text = colours[slot]
        mark = (
            f"<sub>{slot + 1}</sub>"
            if index + 1 == len(shown) or shown[index + 1][1] != slot
            else ""
        )
        parts.append(
            f'<span style="background:{back};color:{text}" title="slot {slot + 1}, {times[slot * patch]:.1f} s">'
            f"{escape(piece)}{mark}</span>"
        )
    return f'<div class="text">{"".join(parts)}</div>'


def sample_html(arguments, example, row, looks, thumbs, panels, legend, note):
    """The page's body."""
    times, layers = row["times"], (arguments.hidden_layer, arguments.attention_layer)
    slots = len(looks[0].uses["max", 0.1])
    patch, colours = -(-len(times) // slots), slot_colours(slots)
    asked = "<br>".join(map(escape, [example.question, *example.options]))
    parts = [
        f"<p><b>{asked}</b></p>",
        f"<p>Right answer: {escape(example.answer)}</p>" if example.answer else "",
        table_html(["", *(one.name for one in looks)], reward_rows(arguments, example, row, looks)),
        f"<h2>The {len(times)} frames</h2>",
        f"<p>Number: the model's temporal slot ({patch} frames each), in the colour that it has below.</p>",
        '<div class="frames">',
    ]
    for position, thumb in enumerate(thumbs):
        back, text = colours[position // patch]
        cues = [name for name in ("scene", "semantic") if position in row[name]]
        told = f"{times[position]:.1f} s, P {row['prior'][position]:.3f}{''.join(f', {cue}' for cue in cues)}"
        caption = f"{position // patch + 1} · {told}".replace(", ", "<br>")
        parts.append(
            f'<figure><img src="{data_url(jpeg(thumb), "jpeg")}" width="{thumb.shape[1]}" height="{thumb.shape[0]}" '
            f'alt="Frame at {told}"><figcaption style="background:{back};color:{text}">{caption}</figcaption></figure>'
        )
    parts += [
        "</div>",
        f"<h2>Prior and frame use</h2><p>{escape(note)}</p>",
        panels_html(panels, legend),
    ]
    for one in looks:
        parts.append(
            f"<h2>What {escape(one.name)} says, and the slot that each token leans on</h2>"
            "<p>The small number after a run of tokens is their slot.</p>"
        )
        for score in one.tokens:
            what = "largest share of its attention" if score == "attention" else "largest cosine"
            parts.append(
                f"<p>By {escape(score_name(score, layers))} ({what}):</p>{text_html(one, score, times)}"
            )
    for one in looks:
        maps, patch = slot_maps(one, thumbs), -(-len(times) // len(one.uses["max", 0.1]))
        order = ", ".join(score_name(score, layers) for score in maps)
        parts += [
            f"<h2>Where {escape(one.name)} looks within the frames</h2><p>From left to right: the frame; {escape(order)}. "
            "What a patch adds to its slot's score: black least, pale yellow most, one colour scale a score. Of a slot, the first "
            "frame.</p>",
            '<div class="maps">',
        ]
        for slot in range(len(one.uses["max", 0.1])):
            tile = np.concatenate(
                [
                    thumbs[slot * patch],
                    *(
                        np.pad(pictures[slot], ((0, 0), (6, 0), (0, 0)), constant_values=255)
                        for pictures in maps.values()
                    ),
                ],
                axis=1,
            )
            told = f"slot {slot + 1}, {times[slot * patch]:.1f} s; use " + ", ".join(
                f"{score_name(name, layers)}: {use[slot]:.3f}"
                for (name, tau), use in one.uses.items()
                if tau != 1
            )
            parts.append(
                f'<figure><img src="{data_url(jpeg(tile), "jpeg")}" width="{tile.shape[1]}" height="{tile.shape[0]}" '
                f'alt="Heat maps of {told}"><figcaption>{told}</figcaption></figure>'
            )
        parts.append("</div>")
    return "\n".join(parts)


def sample_report(arguments, settings, command):
    """The report of `visualize.py sample`. Returns its path."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    example = Example(
        "0",
        arguments.question,
        arguments.options,
        arguments.problem_type,
        arguments.answer or "",
        os.path.abspath(arguments.video),
        "video",
    )
    paths = [arguments.model_name_or_path, *([arguments.compare] if arguments.compare else [])]
    told = [words for path in paths for words in check_model(arguments, settings, path)]
    open_video(example.media)  # what cannot be read is said before CLIP is loaded
    for words in told:
        print(f"visualize.py: warning: {words}", file=sys.stderr)
    row = make_prior(
        example,
        load_clip(settings.clip, settings.clip_pretrained) if settings.has_semantic else None,
        settings,
    )
    thumbs = [thumbnail(frame, 240) for frame in decode_frames(example.media, row["frames"])[0]]
    looks = []
    for name, path in zip(short_names(paths), paths, strict=True):
        print(f"{path} is asked", file=sys.stderr)
        looks.append(look(arguments, name, path, example, row))
    panels, layers = (
        sample_panels(arguments, row, looks),
        (arguments.hidden_layer, arguments.attention_layer),
    )
    answers = "; ".join(
        f"{one.name} answers {reward.extract_answer(one.text) or 'nothing'}" for one in looks
    )
    right = f"; right is {example.answer}" if example.answer else ""
    note = (
        f"{answers}{right}. Filled: frames that a cue names; dashed: the least score of a scene cut. P: the consensus prior (arXiv "
        "2606.18441, Eq. 1-2), below summed over the frames of each of the model's temporal slots. Frame use (Eq. 3-5): how much the "
        "answer leans on each slot, softmax of its similarity / τ, or its share of the attention. Thin line: even use."
        + "".join(f" {words[0].upper()}{words[1:]}." for words in told)
    )
    legend = [("P, summed over the frames of a slot", CUES["prior"], (1, 1))]
    legend += [
        entry
        for index, one in enumerate(looks)
        for entry in (
            (f"{one.name}, τ = 0.1, or attention", index, DASHES[0]),
            (f"{one.name}, τ = 1", index, DASHES[1]),
        )
    ]
    strip = Panel("", "", lambda axes, sheet: plot_strip(axes, thumbs, row["times"]), height=1.8)
    wide = [strip, *(replace(panel, height=2.1) for panel in panels)]
    figure = draw(wide, SHEETS["light"], arguments.question, legend, 1, 12, note)[0]
    maps = maps_figure(looks, thumbs, row["times"], layers)
    return write_report(
        arguments.output,
        f"Where the answer looks: {os.path.basename(arguments.video)}",
        sample_html(arguments, example, row, looks, thumbs, panels, legend, note),
        command,
        {"": figure, "-maps": maps},
    )
