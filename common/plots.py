"""Shared by the figures of visualize.py and prior.py: colours, headings, names, one prior."""

import math
import os
import textwrap

import cv2
import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.lines import Line2D

from common.data import DataError

# Okabe and Ito's colours, safe for the colour-blind; the line style is a second cue.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]
STYLES = ["solid", "dashed", "dotted"]
DOTTED = {"color": "black", "linestyle": "dotted", "linewidth": 1.2}  # chance
NOTE = (
    "Scene cue: distance of a frame's colours from the frame before, or 1 at a detected cut; "
    "semantic cue: cosine of frame and question. Filled: frames that the cue chooses. "
    "P: consensus prior, Eq. 1-2 of arXiv 2606.18441."
)

# Questions come in any language: fonts with Chinese and Japanese characters, where installed.
ASIAN = ["Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "PingFang SC"]
matplotlib.rcParams.update(
    {
        "font.family": ["DejaVu Sans", *sorted(set(ASIAN) & set(get_font_names()))],
        "font.size": 11,
        "text.parse_math": False,
        "axes.grid": True,
        "grid.color": "#d9dde2",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "videocfr",  # the same figure gives the same file
    }
)


def line_style(index):
    """How the index-th run, file or model is drawn, as keyword arguments of plot()."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": STYLES[index % len(STYLES)],
        "linewidth": 2,
    }


def name_paths(paths, labels=None):
    """Names for a legend: the labels, or the paths from the folder that they have in common.

    >>> name_paths(["runs/a/grpo", "runs/b/grpo"])
    ['a/grpo', 'b/grpo']
    """
    if labels and len(labels) != len(paths):
        raise DataError(f"{len(labels)} --label for {len(paths)} paths; give one a path, or none")
    if len(set(map(os.path.realpath, paths))) < len(paths):
        raise DataError(f"a path is given twice: {', '.join(paths)}")
    if labels:
        return labels
    # Their parents, since a single path is its own common path.
    paths = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, root) for path in paths]


def new_figure(width, height, heading, names, note):
    """An empty figure with a heading and a legend at its top, and a note at its bottom.

    Args:
        width, height: inches.
        names: of the lines, which are drawn in the line_style() of their positions.
    Returns:
        The figure. Its label is the alt text.
    """
    heading = textwrap.fill(heading, int(8 * width))
    note = textwrap.fill(note, int(13 * width))
    # Long questions and notes make the figure higher, not its charts lower.
    lines = (heading + note).count("\n")
    figure = Figure((width, height + 0.25 * lines), dpi=160, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    figure.set_label(f"{heading}. {note}")
    handles = [Line2D([], [], **line_style(index)) for index in range(len(names))]
    # The heading is the legend's title, so that both are laid out as one.
    figure.legend(
        handles,
        # matplotlib leaves out names that begin with an underscore.
        [f" {textwrap.fill(name, 40)}" for name in names],
        title=heading,
        title_fontproperties={"size": 14, "weight": "bold"},
        loc="outside upper left",
        alignment="left",
        ncols=max(1, int(width / 4)),
        frameon=False,
    )
    figure.supxlabel(note, x=0.01, ha="left", fontsize=10)
    return figure


def show_film(axes, frames, maps=None):
    """Show frames side by side, the i-th from i - 0.5 to i + 0.5 on the x axis.

    Args:
        frames: K of (H, W, 3) uint8.
        maps: heat maps (K, h, w) to lay over grey frames, or None.
    """
    for place, frame in enumerate(frames):
        height = frame.shape[0] / frame.shape[1]
        extent = (place - 0.49, place + 0.49, 0, height)
        # Files hold no more pixels than can be seen.
        small = cv2.resize(frame, (160, round(160 * height)), interpolation=cv2.INTER_AREA)
        if maps is None:
            axes.imshow(small, extent=extent)
        else:
            axes.imshow(small.mean(2), "gray", vmin=0, vmax=255, extent=extent)
            # One scale over all frames: dark is least, pale yellow most.
            scale = {"vmin": maps.min(), "vmax": maps.max(), "alpha": 0.7}
            axes.imshow(maps[place], "magma", extent=extent, **scale)
    axes.set(yticks=[], ylim=(0, height))
    axes.grid(False)
    axes.spines[:].set_visible(False)


def prior_figure(prior, frames, names=(), note="", more=()):
    """Draw one video's frames above the scores of both cues and P, under its question.

    Args:
        prior: data.Prior of K frames.
        frames: K of (H, W, 3) uint8.
        names, note: of new_figure(); the note follows that on the cues.
        more: heights of empty charts to add below, in parts of a chart's.
    Returns:
        The figure, and the added axes.
    """
    count = len(frames)
    columns = max(count, 8)
    # Name, values, chosen frames, colour.
    charts = [
        ("scene cue", prior.scene_scores, prior.scene, COLOURS[2]),
        ("semantic cue", prior.semantic_scores, prior.semantic, COLOURS[3]),
        ("P", prior.prior, range(count), COLOURS[4]),
    ]
    # Without CLIP there are no semantic scores.
    charts = [chart for chart in charts if chart[1]]
    ratios = [frames[0].shape[0] / frames[0].shape[1], *[1] * len(charts), *more]
    # matplotlib draws nothing wider than 65,536 pixels.
    size = (min(0.8 * columns + 1, 60), 1.1 * sum(ratios) + 1)
    figure = new_figure(*size, prior.question or prior.problem_id, names, f"{NOTE} {note}")
    # The film's row has the height of its frames; all rows share the axis of time.
    film, *axes = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    show_film(film, frames)
    for one, (name, values, chosen, colour) in zip(axes, charts, strict=False):
        # Dots, since the zero of a cosine means nothing.
        plot = one.scatter if name == "semantic cue" else one.bar
        faces = [colour if place in chosen else "white" for place in range(count)]
        # The highest dot is drawn whole.
        plot(range(count), values, color=faces, edgecolor=colour, clip_on=False)
        one.set_ylabel(name)
    step = math.ceil(count / 70)  # of many frames not every time fits
    times = [f"{time:.1f} s" for time in prior.times[::step]]
    film.set_xticks(range(0, count, step), times, fontsize=9)
    film.set_xlim(-0.5, columns - 0.5)
    return figure, axes[len(charts) :]
