"""What one answer looks at: the report of `visualize.py sample`, of one model or two side by side.

Letters in shapes: K frames, t temporal slots of h x w = M visual tokens (after merging), L tokens
of the answer, D hidden size.
"""

import math
import sys
import textwrap
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch

import reward
from common.data import DataError, load_examples, typed_example
from common.media import Encoder, sample_medium
from common.pages import columns_html, page_path, write_page
from common.plots import COLOURS, DOTTED, line_style, name_paths, prior_figure, show_film
from common.policy import Policy, load_model, read_config
from common.rollout import Sampling, answer_inputs
from common.run_page import read_object
from common.video import open_medium
from grpo import overlaps, rollout_frame_use
from prior import load_here, make_prior

NOTE = (
    "Lines: frame use (Eq. 3-5), the share of each slot in what the answer looks at; dotted: even "
    "use; filled: P of the slot's frames. Heat maps: what each patch adds to its slot's score, "
    "dark least, pale yellow most."
)


@dataclass
class Answer:
    """One model's answer, and what it looks at by {name of the score: ...}."""

    name: str  # of the model
    text: str
    length: int  # L
    uses: dict  # frame use (t,)
    maps: dict  # what each visual token adds to its slot's score (t, h, w)


def patch_contributions(response, patches):
    """What each visual token adds to its slot's score S_i = mean_t cos(h_t, f_i) (Eq. 3-4).

    A channel of the max-pooled frame vector belongs to the token that has its largest value.

    Args:
        response: (L, D) states of the answer.
        patches: (t, M, D) states of the visual tokens.
    Returns:
        (t, M); its sum over M is S_i.
    """
    patches = patches.float()
    frames = reward.pool_frames(patches)  # (t, D)
    direction = torch.nn.functional.normalize(response.float(), dim=-1).mean(0)  # (D,)
    winners = patches.argmax(1, keepdim=True)  # (t, 1, D)
    own = torch.zeros_like(patches).scatter(1, winners, frames[:, None])  # (t, M, D)
    return own @ direction / frames.norm(dim=-1, keepdim=True)


def check_model(arguments, path):
    """Check that a checkpoint can be read, and has the layers to be drawn.

    Args:
        arguments: visualize.SampleArguments.
    Returns:
        Sentences on settings that differ from those of the training run beside the checkpoint.
    Raises:
        DataError: no checkpoint, an unknown family, or too few layers.
    """
    read_config(path, attention_layer=arguments.attention_layer)
    # A model that was trained on other frames or prompts answers badly; the reader should know.
    trained = read_object(Path(path.removesuffix("/adapter")).parent, "run.json")
    notes = []
    for name in ("frames", "min_pixels", "max_pixels", "frame_times", "prompt_template"):
        here = getattr(arguments, name)
        if trained.get(name, here) != here:
            notes.append(f"{path} was trained with --{name} {trained[name]}, here it is {here}")
    return notes


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
    item = Encoder(processor, arguments).encode(example, prior)
    if item.slots < 2:
        raise DataError(f"{example.path}: its frames make one slot, with nothing to choose from")
    # 2. The answer, and one forward over it for what it looks at.
    sampling = Sampling(arguments.max_completion_length, temperature=0.0)
    layers = {"hidden_layers": (-1,)}
    # Models whose groups cannot be packed give no attention.
    if Policy(model).packs:
        layers["attention_layer"] = arguments.attention_layer
    [answer] = answer_inputs(model, processor, [item], [0], sampling, **layers)
    prompts = answer.prompts
    mask = answer.samples.mask[:, None]  # (1, 1, L)
    states = answer.scored.hidden[-1]  # (1, P + L, D)
    if not states.isfinite().all():
        raise DataError(f"{path}: its hidden states of this video are not finite numbers")
    # 3. Frame use by both scores, and what each visual token adds to it.
    columns = prompts.visual[0].nonzero().squeeze(1)  # (t M,)
    merge = model.config.vision_config.spatial_merge_size
    shape = (item.grid_thw[0] // torch.tensor([1, merge, merge])).tolist()  # t, h, w
    patches = states[0, columns].unflatten(0, (shape[0], -1))  # (t, M, D)
    paper = "the paper's score"
    length = mask.shape[2]
    uses = {paper: rollout_frame_use(prompts, mask, states)}
    maps = {paper: patch_contributions(states[0, -length:], patches)}
    weights = answer.scored.attention  # (1, 1, L, P)
    if weights is not None:
        attention = f"attention, layer {arguments.attention_layer}"
        uses[attention] = rollout_frame_use(prompts, mask, attention=weights)
        maps[attention] = weights[0, 0][:, columns].float().mean(0)  # (t M,)
    uses = {score: use[0][0].cpu() for score, use in uses.items()}
    maps = {score: values.view(shape).cpu() for score, values in maps.items()}
    return Answer(name, answer.samples.texts[0], length, uses, maps)


def reward_column(example, prior, answer):
    """{measure: what the table shows of an answer}; the temporal term needs a group of answers."""
    column = {
        "model": answer.name,
        "answer": reward.split_output(answer.text)[1] or "–",
        "tokens": answer.length,
        "format reward": reward.format_reward(answer.text),
    }
    # Without the right answer there is no accuracy, and no term that depends on it.
    if example.answer:
        right = reward.accuracy_reward(answer.text, example.answer, example.problem_type)
        column["accuracy reward"] = f"{right:.3f}"
        column["length reward"] = reward.length_reward(answer.length, right)
    for score, use in answer.uses.items():
        [consensus] = overlaps(prior, [use])
        column[f"R_cf, {score}"] = f"{consensus:.3f}"
        column["R_cf of even use"] = f"{1 / len(use):.3f}"
    return column


def draw_answers(prior, frames, answers):
    """Draw frames, cues and P; below them, for each score, frame use and its heat maps."""
    # There are one or two answers.
    scores = list(answers[0].uses | answers[-1].uses)
    names = [answer.name for answer in answers]
    # A chart of frame use for each score, above a film of heat maps for each model.
    heights = [1, *[frames[0].shape[0] / frames[0].shape[1]] * len(answers)]
    figure, axes = prior_figure(prior, frames, names, NOTE, heights * len(scores))
    axes = iter(axes)
    slots = len(answers[0].uses[scores[0]])
    patch = math.ceil(len(frames) / slots)  # frames in a slot
    ends = [min(patch * slot, len(frames)) - 0.5 for slot in range(slots + 1)]
    merged = reward.merge_prior(torch.tensor(prior.prior), slots)  # (t,)
    for score in scores:
        chart = next(axes)
        chart.stairs(merged, ends, fill=True, color=COLOURS[4], alpha=0.3)
        chart.axhline(1 / slots, **DOTTED)
        chart.set_ylabel(textwrap.fill(score, 12), fontsize=9)
        for index, answer in enumerate(answers):
            film = next(axes)
            film.set_ylabel(textwrap.fill(answer.name, 12), fontsize=9)
            if score in answer.uses:
                chart.stairs(answer.uses[score], ends, baseline=None, **line_style(index))
                # A slot's map lies over each of its frames.
                maps = answer.maps[score].repeat_interleave(patch, 0)  # (K, h, w)
                show_film(film, frames, maps.numpy())
        # Only now, since it ends the scaling to what is drawn.
        chart.set_ylim(bottom=0)
    return figure


def find_example(arguments):
    """The question of --dataset_name and --problem_id. Raises DataError without it."""
    path = arguments.dataset_name
    for example in load_examples(path, arguments.media_root, []):
        if example.id == arguments.problem_id and example.media == [example.video]:
            return example
    raise DataError(
        f"{path} has no usable row of --problem_id {arguments.problem_id} about one video alone"
    )


def sample_report(arguments):
    """Let the models answer, and write the page.

    Args:
        arguments: visualize.SampleArguments.
    Returns:
        Path of the page; FILE.png and FILE.svg lie beside it.
    """
    # Everything that can be wrong is named before anything slow begins.
    output = page_path(arguments.output)
    paths = [path for path in (arguments.model_name_or_path, arguments.compare) if path]
    names = name_paths(paths)
    notes = sum([check_model(arguments, path) for path in paths], [])
    if arguments.dataset_name:
        example = find_example(arguments)
    else:
        example = typed_example(
            arguments.question, arguments.options, arguments.video, answer=arguments.answer
        )
    open_medium(example.medium, arguments)
    for note in notes:
        print(f"visualize.py: warning: {note}", file=sys.stderr)
    prior = make_prior(example, load_here(arguments), arguments)
    answers = []
    for name, path in zip(names, paths, strict=True):
        answers.append(answer_question(arguments, name, path, example, prior))
    body = [f"<p>{escape(text)}</p>" for text in example.options + notes]
    # A model that gives no attention has fewer rows.
    body.append(columns_html([reward_column(example, prior, answer) for answer in answers]))
    for answer in answers:
        body.append(f"<h2>Answer of {escape(answer.name)}</h2><pre>{escape(answer.text)}</pre>")
    frames = sample_medium(example.medium, arguments).frames  # (K, H, W, 3)
    figures = {"": draw_answers(prior, frames, answers)}
    return write_page(output, example.question, "\n".join(body), figures)
