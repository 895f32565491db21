"""Shared by the figures of visualize.py and prior.py: colours, panels in a grid, a prior."""

import base64
import io
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.lines import Line2D
from PIL import Image

# Okabe and Ito's colours, safe for the colour-blind; the line style is a second cue.
LINES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]
STYLES = ["solid", "dashed", "dotted"]  # names that CSS knows, too
CUES = {"scene": LINES[2], "semantic": LINES[3], "prior": LINES[4]}
LABELS = {"scene": "scene cue", "semantic": "semantic cue", "prior": "P"}
NOTE = (
    "Scene cue: distance of a frame's colours from the frame before, or 1 at a detected cut; "
    "semantic cue: cosine of frame and question. Filled: frames that the cue chooses. "
    "P: consensus prior, Eq. 1-2 of arXiv 2606.18441."
)

# Questions come in any language: fonts with Chinese and Japanese characters, where installed.
ASIAN = ["Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "PingFang SC"]
RC = {
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


@dataclass
class Panel:
    """One chart of a grid.

    Attributes:
        plot: plot(axes) draws the chart and returns its alt text.
        shared: panels that name the same axis share their y limits.
        alt, picture: alt text and (H, W, 3) uint8 pixels, filled in by `draw_panels`.
    """

    title: str
    caption: str
    plot: Callable
    shared: str = ""
    alt: str = ""
    picture: np.ndarray | None = None


@dataclass
class Key:
    """One entry of a legend."""

    name: str
    colour: str
    style: str = "solid"


def line_key(name, index):
    """Legend entry of the index-th run, file or model."""
    return Key(name, LINES[index % len(LINES)], STYLES[index % len(STYLES)])


def shorten(text, length):
    """Cut the middle out of a text that is too long: names of models differ at either end."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"


def short_names(paths):
    """Shortest ends of paths that differ from each other."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(paths):
            return names
    return paths


def new_figure(width, height):
    """An empty figure (inches) that lays itself out."""
    figure = Figure((width, height), dpi=160, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    FigureCanvasAgg(figure)
    return figure


def pixels_of(figure):
    """Draw a figure -> (H, W, 3) uint8."""
    figure.canvas.draw()
    # The layout takes most of the time; the files are drawn with the same one.
    figure.set_layout_engine("none")
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def add_words(figure, heading, keys, note):
    """Put a heading and a legend (list of Key) on top of a figure, and a note at its bottom."""
    width = figure.get_figwidth()
    lines = [Line2D([], [], color=key.colour, linestyle=key.style, lw=2) for key in keys]
    # The heading is the legend's title, so that both are laid out as one.
    legend = figure.legend(
        lines,
        ["."] * len(keys),
        loc="outside upper left",
        ncols=max(1, int(width / 4)),
        title=shorten(heading, int(8.5 * width)),
        title_fontproperties={"size": 14, "weight": "bold"},
        alignment="left",
        frameon=False,
    )
    # Names are set afterwards: a legend leaves out those that begin with an underscore.
    for text, key in zip(legend.get_texts(), keys, strict=True):
        text.set_text(key.name)
    note = textwrap.fill(note, int(13 * width))
    figure.supxlabel(note, x=0.01, ha="left", fontsize=10)


@matplotlib.rc_context(RC)
def draw_panels(panels, heading, keys, note):
    """Draw panels in a grid of up to three columns, under a heading and a legend, above a note.

    Fills in `alt` and `picture` of every panel.

    Args:
        keys: list of Key.
    Returns:
        The figure.
    """
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4 * columns, 2.75 * rows + 1 + len(note) / (50 * columns))
    add_words(figure, heading, keys, note)
    cells = figure.subfigures(rows, columns, squeeze=False).ravel()
    first = {}  # axes whose y limits the others share
    for panel, cell in zip(panels, cells, strict=False):
        axes = cell.add_subplot(sharey=first.get(panel.shared))
        if panel.shared:
            first.setdefault(panel.shared, axes)
        axes.set_title(shorten(panel.title, 30), loc="left", fontsize=12, weight="bold")
        panel.alt = f"{panel.title}. {panel.plot(axes)}"
    # Cut out, so that a page can arrange the panels by its own width.
    pixels = pixels_of(figure)
    for panel, cell in zip(panels, cells, strict=False):
        panel.picture = cut(pixels, cell)
    return figure


def cut(pixels, cell):
    """The part of a figure's pixels that shows one of its subfigures."""
    left, bottom, right, top = cell.bbox.extents.round().astype(int)
    return pixels[len(pixels) - top : len(pixels) - bottom, left:right]


# ------------------------------------------------------------------------------------- one prior


def thumbnail(frame, side=160):
    """Shrink a frame (H, W, 3) uint8 to at most `side` pixels on the longer side."""
    scale = min(1, side / max(frame.shape[:2]))
    height, width = (max(1, round(length * scale)) for length in frame.shape[:2])
    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)


def show_film(axes, pictures):
    """Show pictures (N, H, W, 3) side by side, the i-th from i - 0.5 to i + 0.5 on the x axis."""
    pictures = np.stack(pictures)
    height, width = pictures.shape[1:3]
    gap = ((0, 0), (0, 0), (2, 2), (0, 0))  # white columns between them
    film = np.concatenate(np.pad(pictures, gap, constant_values=255), axis=1)  # (H, N (W + 4), 3)
    axes.imshow(film, extent=(-0.5, len(pictures) - 0.5, 0, height / (width + 4)))
    axes.grid(False)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def prior_size(columns, frame, charts=3):
    """Inches (width, height) of what `draw_prior` draws, with room for `columns` frames."""
    # matplotlib draws nothing wider than 65,536 pixels.
    return min(0.8 * columns + 1, 60), 1.1 * frame.shape[0] / frame.shape[1] + 1.1 * charts + 1


@matplotlib.rc_context(RC)
def prior_figure(prior, frames, threshold=None, more=0):
    """A figure of one video's prior, under its question.

    Args, see `draw_prior`. Returns:
        The figure, list of the added axes, alt text.
    """
    figure = new_figure(*prior_size(max(len(frames), 8), frames[0], 3 + more))
    add_words(figure, prior.question or prior.problem_id, [], NOTE)
    return figure, *draw_prior(figure, prior, frames, None, threshold, more)


def draw_prior(figure, prior, frames, columns=None, threshold=None, more=0):
    """Draw one video's frames above the scores of both cues and P; what a cue chose is filled.

    Args:
        figure: figure or subfigure with constrained layout, of `prior_size` inches.
        prior: data.Prior of K frames.
        frames: K of (H, W, 3) uint8.
        columns: frames that would fit in a line; None: K, and at least 8.
        threshold: least score of a scene cut, drawn as a dashed line.
        more: number of empty charts to add below, on the same x axis.
    Returns:
        list of the added axes, alt text.
    """
    count = len(frames)
    columns = columns or max(count, 8)
    charts = {"scene": prior.scene_scores, "semantic": prior.semantic_scores, "prior": prior.prior}
    # Without CLIP there are no semantic scores.
    charts = {name: values for name, values in charts.items() if values}
    ratios = [frames[0].shape[0] / frames[0].shape[1], *[1] * (len(charts) + more)]
    film, *axes = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    show_film(film, [thumbnail(frame) for frame in frames])
    film.tick_params(labelbottom=True)
    for one, (name, values) in zip(axes, charts.items(), strict=False):
        colour = CUES[name]
        chosen = getattr(prior, name) if name in ("scene", "semantic") else range(count)
        faces = [colour if place in chosen else "white" for place in range(count)]
        if name == "semantic":
            # Dots, since the zero of a cosine means nothing.
            one.scatter(range(count), values, s=50, color=faces, edgecolor=colour)
            one.margins(y=0.15)
        else:
            one.bar(range(count), values, color=faces, edgecolor=colour)
        if name == "scene" and threshold is not None:
            one.axhline(threshold, color="black", ls="dashed", lw=1, label="least score of a cut")
            one.legend(fontsize=9, frameon=False)
        one.set_ylabel(LABELS[name])
    step = math.ceil(count / 70)  # of many frames not every time fits
    times = [f"{time:.1f} s" for time in prior.times[::step]]
    film.set_xticks(range(0, count, step), times, fontsize=9)
    film.set_xlim(-0.5, columns - 0.5)
    words = []
    for place, (time, value) in enumerate(zip(prior.times, prior.prior, strict=True)):
        names = [name for name in ("scene", "semantic") if place in getattr(prior, name)]
        words.append(" ".join([f"{time:.1f} s P {value:.3f}", *names]))
    return axes[len(charts) :], f"Frames: {', '.join(words)}."


def data_url(pixels, kind):
    """(H, W, 3) uint8 -> address of the picture itself. kind: png for charts, jpeg for frames."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def ratio_interval(hits, chance, samples=1000, seed=0):
    """(R, parts) each -> sum of hits over sum of chance, and ends of its 95 % bootstrap interval.

    Rows are resampled. Returns (parts,) each; NaN where chance has nothing, no interval of one row.
    """
    rng = np.random.default_rng(seed)
    rows = len(hits)
    ratios = np.full((1 + samples, hits.shape[1]), np.nan)
    for sample, ratio in enumerate(ratios):
        times = np.ones(rows)  # how often a row counts; the first sample is the data itself
        if sample:
            times = np.bincount(rng.integers(rows, size=rows), minlength=rows)
        np.divide(times @ hits, times @ chance, out=ratio, where=times @ chance > 0)
    ends = np.full((2, hits.shape[1]), np.nan)
    known = chance.sum(0) > 0
    if rows > 1:
        ends[:, known] = np.nanquantile(ratios[1:, known], [0.025, 0.975], axis=0)
    return ratios[0], *ends
