"""What one answer looks at: the report of `visualize.py sample`, of one model or two side by side.

Letters in shapes: K frames, t temporal slots of h x w = M visual tokens (after merging), L tokens
of the answer, D hidden size.
"""

import json
import os
import textwrap
from dataclasses import dataclass
from html import escape
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from transformers import AutoConfig

import reward
from common.data import DataError, read_template
from common.media import Encoder, decode_frames
from common.pages import table_html, wide_html, write_report
from common.plots import (
    CUES,
    NOTE,
    RC,
    Key,
    add_words,
    draw_prior,
    line_key,
    new_figure,
    pixels_of,
    prior_size,
    show_film,
    thumbnail,
)
from common.policy import FAMILIES, Policy, collate, load_model
from common.rollout import Sampling, sample_texts
from grpo import rollout_frame_use, token_frame_use
from prior import PriorSettings


@dataclass
class Answer:
    """One model's answer and what it looks at, by "hidden" (the paper's score) and "attention"."""

    name: str  # of the model
    text: str
    pieces: list[str]  # (L,) text of each token
    uses: dict  # score -> frame use (t,)
    tokens: dict  # score -> cosine or share of attention of each token and slot (L, t)
    maps: dict  # score -> what each patch adds to its slot's score (t, h, w)


def token_pieces(ids, tokenizer):
    """Token ids (L,) -> text that each adds; a character of several tokens goes to its last."""
    pieces = []
    done = ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        # A character that is not whole yet is decoded as U+FFFD.
        whole = done if text.endswith("\ufffd") and count < len(ids) else text
        pieces.append(whole[len(done) :])
        done = whole
    return pieces


def patch_contributions(response, patches):
    """What each visual token adds to its slot's score S_i = mean_t cos(h_t, f_i) (Eq. 3-4).

    A channel of the max-pooled frame vector belongs to the token that has its largest value.

    Args:
        response: (L, D) states of the answer.
        patches: (t, M, D) states of the visual tokens.
    Returns:
        (t, M); its sum over M is S_i.
    """
    frames = reward.pool_frames(patches)  # (t, D)
    direction = torch.nn.functional.normalize(response.float(), dim=-1).mean(0)  # (D,)
    winners = patches.float().argmax(1, keepdim=True)  # (t, 1, D)
    own = torch.zeros_like(patches.float()).scatter(1, winners, frames[:, None])  # (t, M, D)
    return own @ direction / frames.norm(dim=-1, keepdim=True)


def check_model(arguments, settings, path):
    """Check that a checkpoint can be read, and has the layers to be drawn.

    Args:
        arguments: visualize.SampleArguments.
        settings: prior.PriorSettings.
    Returns:
        Sentences on settings that differ from those of the training run beside the checkpoint.
    Raises:
        DataError: no checkpoint, an unknown family, or too few layers.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a checkpoint: {str(error).splitlines()[0]}") from error
    if config.model_type not in FAMILIES:
        raise DataError(
            f"{path} is a {config.model_type} checkpoint; frame use is known for "
            f"{', '.join(FAMILIES)}"
        )
    layers = config.get_text_config().num_hidden_layers
    if not -1 <= arguments.hidden_layer <= layers or not 1 <= arguments.attention_layer <= layers:
        raise DataError(
            f"{path} has layers 1 to {layers} (--attention_layer), "
            f"and hidden states 0 to {layers} or -1 (--hidden_layer)"
        )
    # A model that was trained on other frames or prompts answers badly; the reader should know.
    file = Path(path).parent / "run.json"
    if not file.is_file():
        return []
    trained = json.loads(file.read_text(encoding="utf-8"))
    asked = vars(arguments) | vars(settings)
    names = "frames min_pixels max_pixels frame_times prompt_template system_prompt".split()
    return [
        f"{path} was trained with --{name} {trained[name]}, here it is {asked[name]}"
        for name in names
        if trained.get(name, asked[name]) != asked[name]
    ]


@torch.no_grad()
def answer_question(arguments, name, path, example, prior):
    """Let one checkpoint answer, and record what the answer looks at.

    Args:
        name: what the page calls the model at `path`.
        example, prior: the question (data.Example) and its data.Prior.
    Returns:
        Answer.
    """
    # 1. Frames and prompt as in training.
    model, processor = load_model(path)
    policy = Policy(model)
    encoder = Encoder(
        processor,
        arguments.min_pixels,
        arguments.max_pixels,
        len(prior.frames),
        read_template(arguments.prompt_template),
        cache_gb=0,
        frame_times=arguments.frame_times,
        system_prompt=arguments.system_prompt,
    )
    item = encoder.encode(example, prior)
    prompts = collate([item], model).to(model.device)
    merge = model.config.vision_config.spatial_merge_size
    slots, height, width = (item.grid_thw // torch.tensor([1, merge, merge])).tolist()
    if slots < 2:
        raise DataError(
            f"{example.media}: {len(prior.frames)} sampled frames make one slot of the model, "
            "with nothing to choose from"
        )
    # 2. The answer, and one forward over it for what it looks at.
    sampling = Sampling(arguments.max_completion_length, arguments.temperature)
    samples = sample_texts(model, processor, prompts, [1], [arguments.seed], sampling)
    tokens = samples.tokens  # (1, L)
    mask = samples.mask  # (1, L)
    scored = policy(
        prompts,
        tokens[:, None],
        mask[:, None],
        hidden_layers=(arguments.hidden_layer,),
        attention_layer=arguments.attention_layer if policy.packs else None,
    )
    states = scored.hidden[arguments.hidden_layer]  # (1, P + L, D)
    if not states.isfinite().all():
        raise DataError(f"{path}: its hidden states of this video are not finite numbers")
    # 3. Frame use by both scores: of the whole answer, of each token, and of each patch.
    columns = prompts.visual[0].nonzero().squeeze(1)  # (t M,)
    patches = states[0, columns].view(slots, height * width, -1)  # (t, M, D)
    sources = {"hidden": {"hidden": states}}
    maps = {"hidden": patch_contributions(states[0, -tokens.shape[1] :], patches)}  # (t, M)
    # Models whose groups cannot be packed give no attention.
    if scored.attention is not None:
        sources["attention"] = {"attention": scored.attention}
        maps["attention"] = scored.attention[0, 0][:, columns].float().mean(0)  # (t M,)
    uses = {}
    each = {}
    for score, source in sources.items():
        uses[score] = rollout_frame_use(prompts, mask[:, None], **source)[0][0].cpu()
        each[score] = token_frame_use(prompts, 0, mask[0], **source).cpu()
        maps[score] = maps[score].view(slots, height, width).cpu()
    pieces = token_pieces(tokens[0].tolist(), processor.tokenizer)
    return Answer(name, samples.texts[0], pieces, uses, each, maps)


def score_names(arguments):
    """{score of frame use: its name on the page}."""
    hidden = f"hidden states {arguments.hidden_layer}"
    if arguments.hidden_layer == -1:
        hidden = "the paper's score"
    return {"hidden": hidden, "attention": f"attention, layer {arguments.attention_layer}"}


def reward_rows(arguments, example, prior, answer):
    """{row of the table: text} of one answer; the temporal term needs a group of answers."""
    length = len(answer.pieces)
    cut = ", cut" if length == arguments.max_completion_length else ""
    rows = {"answer": escape(reward.extract_answer(answer.text)) or "–", "tokens": f"{length}{cut}"}
    slots = len(answer.uses["hidden"])
    merged = reward.merge_prior(torch.tensor(prior.prior), slots)  # (t,)
    for score, name in score_names(arguments).items():
        rows[f"R_cf, {name}"] = "–"
        if score in answer.uses:
            consensus = reward.consensus_frame_reward(merged, answer.uses[score])
            rows[f"R_cf, {name}"] = f"{consensus:.3f}"
    rows["R_cf of even use"] = f"{1 / slots:.3f}"
    rows["reward: format"] = f"{reward.format_reward(answer.text):.3f}"
    # Without the right answer there is no accuracy, and no term that depends on it.
    if example.answer:
        right = reward.accuracy_reward(answer.text, example.answer, example.problem_type)
        hidden = reward.consensus_frame_reward(merged, answer.uses["hidden"])
        terms = {
            "accuracy": right,
            "length": reward.length_reward(length, right),
            f"consensus, {arguments.cfr_weight:g} × accuracy × first R_cf": (
                arguments.cfr_weight * reward.gate(right) * hidden
            ),
        }
        total = reward.format_reward(answer.text) + sum(terms.values())
        for name, value in {**terms, "total, without the temporal term": total}.items():
            rows[f"reward: {name}"] = f"{value:.3f}"
    return rows


def plot_use(axes, prior, answers, score):
    """Draw every model's frame use over the slots, before P summed over the frames of a slot."""
    words = []
    drawn = [answer for answer in answers if score in answer.uses]
    for index, answer in enumerate(answers):
        if answer not in drawn:
            continue
        use = answer.uses[score]
        patch = -(-len(prior.times) // len(use))  # frames in a slot
        ends = [min(patch * slot, len(prior.times)) - 0.5 for slot in range(len(use) + 1)]
        # P and even use are the same for all models.
        if answer is drawn[0]:
            merged = reward.merge_prior(torch.tensor(prior.prior), len(use))
            axes.stairs(merged, ends, fill=True, color=CUES["prior"], alpha=0.3)
            axes.axhline(1 / len(use), color="black", linestyle="dotted", linewidth=1)
        key = line_key("", index)
        style = {"color": key.colour, "linestyle": key.style, "linewidth": 2.5}
        axes.stairs(use, ends, baseline=None, **style)
        words.append(f"{answer.name}: {', '.join(f'{value:.3f}' for value in use.tolist())}")
    axes.set_ylim(bottom=0)
    return "; ".join(words)


@matplotlib.rc_context(RC)
def draw_use(arguments, prior, frames, answers, threshold):
    """Draw frames, cues, P and frame use. Returns the figure and its alt text."""
    names = score_names(arguments)
    scores = [score for score in names if any(score in answer.uses for answer in answers)]
    figure = new_figure(*prior_size(max(len(frames), 8), frames[0], 3 + len(scores)))
    keys = [line_key(answer.name, index) for index, answer in enumerate(answers)]
    keys.append(Key("P, summed over the frames of a slot", CUES["prior"]))
    note = f"{NOTE} Frame use (Eq. 3-5): share of each slot in what the answer looks at; dotted:"
    add_words(figure, arguments.question, keys, f"{note} even use.")
    more, alt = draw_prior(figure, prior, frames, None, threshold, len(scores))
    for axes, score in zip(more, scores, strict=True):
        alt += f" Use by {names[score]}: {plot_use(axes, prior, answers, score)}."
        axes.set_ylabel(textwrap.fill(names[score], 12), fontsize=9)
    return figure, alt


def heat(values, low, high, frame):
    """Lay values (h, w), dark at `low` and bright at `high`, over a grey frame (H, W, 3)."""
    scaled = ((values - low) / max(float(high - low), 1e-12)).clamp(0, 1).numpy()
    # One flat cell a patch, so that nothing is read into the transitions.
    colours = (matplotlib.colormaps["magma"](scaled)[..., :3] * 255).astype(np.uint8)
    colours = cv2.resize(colours, frame.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    grey = cv2.cvtColor(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(colours, 0.75, grey, 0.25, 0)


@matplotlib.rc_context(RC)
def draw_maps(arguments, prior, frames, answers):
    """Draw the first frame of each slot above the heat maps of each score and model."""
    slots = len(answers[0].uses["hidden"])
    patch = -(-len(frames) // slots)
    firsts = frames[::patch]
    films = {"frame": firsts}
    for score, name in score_names(arguments).items():
        for answer in answers:
            if score in answer.maps:
                # One colour scale over all slots.
                maps = answer.maps[score]
                low = maps.min()
                high = maps.max()
                films[f"{name}\n{answer.name}"] = [
                    heat(values, low, high, frame)
                    for values, frame in zip(maps, firsts, strict=True)
                ]
    # Inches, as in plots.prior_size.
    height = 1.4 * firsts[0].shape[0] / firsts[0].shape[1]
    figure = new_figure(min(1.3 * max(slots, 6) + 2, 60), len(films) * height + 1.5)
    note = "What each patch adds to its slot's score: black least, pale yellow most in a row."
    add_words(figure, f"Where the answer looks within the frames: {arguments.question}", [], note)
    axes = figure.subplots(len(films), 1, sharex=True)
    for one, (name, pictures) in zip(axes, films.items(), strict=True):
        show_film(one, pictures)
        one.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    times = [f"slot {slot + 1}\n{time:.1f} s" for slot, time in enumerate(prior.times[::patch])]
    axes[-1].set_xticks(range(slots), times, fontsize=9)
    return figure, f"Heat maps of {slots} slots: {', '.join(films)}."


def slot_colours(slots):
    """Colours of the slots in time order, dark to bright: (background, readable text) each."""
    colours = []
    for slot in range(slots):
        back = matplotlib.colormaps["cividis"](slot / max(slots - 1, 1))[:3]
        bright = np.dot(back, (0.3, 0.59, 0.11)) > 0.5
        colours.append((matplotlib.colors.to_hex(back), "#000" if bright else "#fff"))
    return colours


def text_html(answer, score):
    """The answer, each token in the colour of the slot that it looks at most.

    Where the slot changes, its number follows.
    """
    # Special tokens add no text.
    best = answer.tokens[score].argmax(1).tolist()  # (L,)
    colours = slot_colours(answer.tokens[score].shape[1])
    shown = [(piece, slot) for piece, slot in zip(answer.pieces, best, strict=True) if piece]
    following = [slot for _, slot in shown[1:]] + [None]
    parts = []
    for (piece, slot), after in zip(shown, following, strict=True):
        back, text = colours[slot]
        mark = f"<sub>{slot + 1}</sub>" if slot != after else ""
        style = f"background:{back};color:{text}"
        parts.append(f'<span style="{style}" title="slot {slot + 1}">{escape(piece)}{mark}</span>')
    return f'<div class="text">{"".join(parts)}</div>'


def sample_report(arguments, example, prior, models, notes, command):
    """Let the models answer, and write the page.

    Args:
        arguments: visualize.SampleArguments.
        example, prior: the question (data.Example) and its data.Prior.
        models: {name on the page: checkpoint}.
        notes: sentences that the page shows.
        command: shown at the end of the page.
    Returns:
        Path of the page; FILE.png, FILE-maps.png and their SVG lie beside it.
    """
    frames = [thumbnail(frame, 240) for frame in decode_frames(example.media, prior.frames)[0]]
    answers = []
    for name, path in models.items():
        answers.append(answer_question(arguments, name, path, example, prior))
    # Other detectors give 0 or 1, without a threshold to draw.
    settings = PriorSettings(**prior.settings)
    threshold = settings.hsv_threshold if settings.scene == "hsv" else None
    use_figure, use_alt = draw_use(arguments, prior, frames, answers, threshold)
    maps_figure, maps_alt = draw_maps(arguments, prior, frames, answers)
    # One column a model.
    rows = [reward_rows(arguments, example, prior, answer) for answer in answers]
    rows = [(name, *(row[name] for row in rows)) for name in rows[0]]
    asked = "<br>".join(escape(line) for line in [example.question, *example.options])
    body = [f"<p><b>{asked}</b></p>"]
    if example.answer:
        body.append(f"<p>Right answer: {escape(example.answer)}</p>")
    body += [f"<p>{escape(note)}.</p>" for note in notes]
    body.append(table_html(["", *models], rows))
    body += ["<h2>Prior and frame use</h2>", wide_html(pixels_of(use_figure), use_alt)]
    for answer in answers:
        body.append(f"<h2>Answer of {escape(answer.name)}, and the slot of each token</h2>")
        for score, name in score_names(arguments).items():
            if score in answer.tokens:
                body.append(
                    f"<p>By {escape(name)}; a small number ends the tokens that look at that slot "
                    "most, and their colour goes from dark (first slot) to bright (last).</p>"
                )
                body.append(text_html(answer, score))
    body += ["<h2>Within the frames</h2>", wide_html(pixels_of(maps_figure), maps_alt)]
    heading = f"Where the answer looks: {os.path.basename(arguments.video)}"
    figures = {"": use_figure, "-maps": maps_figure}
    return write_report(arguments.output, heading, "\n".join(body), command, figures)
