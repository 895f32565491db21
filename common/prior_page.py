"""What a priors file says: where P lies, how concentrated it is, whether its cues agree, some rows.

The report of `visualize.py prior`.
"""

import json
import random
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from tqdm import tqdm

from common.data import DataError, MediaError, resolve_media
from common.media import decode_frames
from common.pages import check_output, panels_html, table_html, wide_html, write_report
from common.plots import (
    CUES,
    LINES,
    NOTE,
    RC,
    Panel,
    add_words,
    cut,
    draw_panels,
    draw_prior,
    new_figure,
    pixels_of,
    prior_size,
    ratio_interval,
    shorten,
    thumbnail,
)
from prior import read_priors

PARTS = 16  # of a video, for the mean of P over videos of different K


@dataclass
class Priors:
    """Summary of a priors file; rows of one frame (images) are counted apart."""

    images: int = 0
    frames: Counter = field(default_factory=Counter)  # K -> rows
    mass: np.ndarray = field(default_factory=lambda: np.zeros(PARTS))  # sum of P over rows
    effective: list = field(default_factory=list)  # exp(entropy of P) / K; 1 is uniform
    shares: list = field(default_factory=list)  # mass on the scene set, semantic set, neither
    both: list = field(default_factory=list)  # (frames in both sets, expected by chance)
    settings: dict = field(default_factory=lambda: defaultdict(Counter))  # name -> value -> rows
    chosen: list = field(default_factory=list)  # rows drawn at random, for the sheet

    def rows(self):
        return len(self.effective)


def effective_share(prior):
    """P (K,) -> exp(entropy) / K: share of the frames of a uniform P with the same entropy."""
    positive = np.array([value for value in prior if value > 0])
    return float(np.exp(-np.sum(positive * np.log(positive)))) / len(prior)


def part_masses(prior):
    """P (K,) -> (PARTS,) mass in equal parts; a frame that lies in two parts is divided."""
    ends = np.linspace(0, 1, PARTS + 1)
    # The mass up to a point is linear within a frame.
    frame_ends = np.linspace(0, 1, len(prior) + 1)
    return np.diff(np.interp(ends, frame_ends, [0, *np.cumsum(prior)]))


def set_shares(row):
    """Mass of P on the scene set, on the semantic set, and on the frames of neither."""
    neither = set(range(len(row.prior))) - set(row.scene) - set(row.semantic)
    return tuple(
        sum(row.prior[place] for place in places) for places in (row.scene, row.semantic, neither)
    )


def summarise_priors(path, items, seed=0):
    """Read a priors file once -> Priors with `items` rows drawn at random."""
    summary = Priors()
    rng = random.Random(seed)
    for row in tqdm(read_priors(path), desc="read", unit="row", delay=2):
        count = len(row.prior)
        for name, value in row.settings.items():
            summary.settings[name][value if isinstance(value, str) else json.dumps(value)] += 1
        # P of a single frame is 1, whatever the cues.
        if count == 1:
            summary.images += 1
            continue
        if not set(row.scene + row.semantic) <= set(range(count)):
            raise DataError(
                f"priors file {path}: the row of {row.problem_id} has sets that are not positions "
                f"among its {count} frames; build it again"
            )
        summary.frames[count] += 1
        summary.mass += part_masses(row.prior)
        summary.effective.append(effective_share(row.prior))
        if (row.scene or row.scene_scores) and (row.semantic or row.semantic_scores):
            summary.shares.append(set_shares(row))
        # By chance, sets of m and n of K frames share m n / K.
        if row.scene and row.semantic:
            both = len(set(row.scene) & set(row.semantic))
            summary.both.append((both, len(row.scene) * len(row.semantic) / count))
        # Every row so far is as likely to be among the chosen ones.
        place = rng.randrange(summary.rows())
        if len(summary.chosen) < items:
            summary.chosen.append(row)
        elif place < items:
            summary.chosen[place] = row
    if not summary.rows():
        images = f"has no row of a video, only {summary.images} of images"
        raise DataError(f"priors file {path} {images if summary.images else 'is empty'}")
    return summary


def plot_mass(axes, mass):
    """Draw the mean P (PARTS,) over the length of the videos."""
    middles = (np.arange(PARTS) + 0.5) / PARTS * 100
    axes.bar(middles, mass, 86 / PARTS, color=LINES[0])
    axes.axhline(1 / PARTS, color="black", linestyle="dotted", linewidth=1.2)
    axes.set(xlabel="position in the video, %", ylabel="mean of P", xlim=(0, 100))
    axes.grid(axis="x", visible=False)
    words = ", ".join(f"{value:.3f}" for value in mass)
    return f"Mean P in {PARTS} parts: {words}; uniform {1 / PARTS:.3f}."


def plot_shares(axes, named, xlabel):
    """Draw histograms of values in [0, 1], each {name: values} as an outline."""
    words = []
    styles = ["solid", "dashed", "dotted"]
    for (name, values), style in zip(named.items(), styles, strict=False):
        # The mass of neither set has no cue's colour.
        colour = CUES.get(name, "black")
        # Heights are shares of rows.
        weights = np.full(len(values), 1 / len(values))
        # Rounding can make a share 1.0000001.
        values = np.clip(values, 0, 1)
        axes.hist(
            values,
            bins=20,
            range=(0, 1),
            weights=weights,
            histtype="step",
            color=colour,
            linestyle=style,
            linewidth=2,
            label=name,
        )
        words.append(
            f"{name}: mean {np.mean(values):.3f}, median {np.median(values):.3f}, n = {len(values)}"
        )
    if len(named) > 1:
        axes.margins(y=0.2)
        axes.legend(ncols=3, fontsize=9, frameon=False, loc="upper left", columnspacing=1)
    axes.set(xlabel=xlabel, ylabel="share of rows", xlim=(0, 1))
    return f"{'; '.join(words)}."


def read_frames(row, media_root):
    """Frames of a row as small pictures, K of (h, w, 3) uint8. Raises DataError with the cause."""
    if not row.media:
        raise MediaError(f"the row of {row.problem_id} names no medium")
    path = resolve_media(row.media, media_root, f"the row of {row.problem_id}")
    frames, times = decode_frames(path, row.frames)
    if not np.allclose(times, row.times, atol=0.02):
        raise MediaError(f"{path}: its frames were taken at other times than the row's")
    return [thumbnail(frame) for frame in frames]


@matplotlib.rc_context(RC)
def draw_sheet(strips, title):
    """Draw rows with their frames below each other.

    Args:
        strips: list of (row, frames).
    Returns:
        The figure, and the HTML of each row's picture.
    """
    # Frames of all rows are equally wide.
    columns = max(8, *(len(frames) for _, frames in strips))
    sizes = [prior_size(columns, frames[0]) for _, frames in strips]
    heights = [height for _, height in sizes]
    figure = new_figure(sizes[0][0], sum(heights) + 1)
    add_words(figure, title, [], NOTE)
    cells = figure.subfigures(len(strips), 1, height_ratios=heights, squeeze=False).ravel()
    alts = []
    for (row, frames), cell in zip(strips, cells, strict=True):
        # As much of the question as fits in a line.
        question = shorten(f"{row.problem_id}: {row.question or ''}", 8 * columns)
        cell.suptitle(question, x=0.01, ha="left", fontsize=11, weight="bold")
        alts.append(draw_prior(cell, row, frames, columns)[1])
    # The page shows each row by itself, since wide ones are scrolled.
    pixels = pixels_of(figure)
    pictures = []
    for cell, alt in zip(cells, alts, strict=True):
        pictures.append(wide_html(cut(pixels, cell), alt))
    return figure, pictures


def prior_table(summary):
    """Everything in numbers, and the settings that made the rows, as HTML."""
    counts = sorted(summary.frames)
    frames = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
    numbers = [
        ("rows of videos", summary.rows()),
        ("rows of one frame (images), not drawn", summary.images),
        ("frames of a video, K", frames),
        ("effective frames, exp(entropy) / K, mean", f"{np.mean(summary.effective):.3f}"),
    ]
    names = ("the scene set", "the semantic set", "neither")
    for name, values in zip(names, zip(*summary.shares, strict=True), strict=False):
        mean = f"{np.mean(values):.3f}, n = {len(values)}"
        numbers.append((f"mass of P on {name}, mean", mean))
    # How far the cues agree, in one number.
    if summary.both:
        both, chance = np.array(summary.both, float).T[..., None]  # (R, 1) each
        ratio, low, high = (float(value[0]) for value in ratio_interval(both, chance))
        interval = f" ({low:.3f} to {high:.3f})" if len(both) > 1 else ""
        words = f"{ratio:.3f}{interval}, n = {len(both)}"
        numbers.append(("frames that both cues choose, over chance", words))
    # Rows of one file can have been made with several settings.
    made = []
    for name, values in summary.settings.items():
        words = [f"{value} ({count} rows)" for value, count in values.most_common()]
        words = "; ".join(words) if len(values) > 1 else next(iter(values))
        made.append((f"--{name}", escape(words)))
    settings = "<p>The file does not record the settings that made it.</p>"
    if made:
        settings = f"<h2>Settings that made them</h2>{table_html(['setting', 'value'], made)}"
    return f"<h2>Numbers</h2>\n{table_html(['measure', 'value'], numbers)}\n{settings}"


def prior_panels(summary):
    """Charts of the whole file."""
    panels = [
        Panel(
            "Where in the video",
            f"Mean P over {summary.rows()} videos in {PARTS} equal parts; dotted: uniform.",
            lambda axes: plot_mass(axes, summary.mass / summary.rows()),
        ),
        Panel(
            "Concentration of P",
            "exp(entropy of P) / K: 1 is uniform, 1 / K a single frame.",
            lambda axes: plot_shares(
                axes, {"effective frames": summary.effective}, "effective frames / K"
            ),
        ),
    ]
    if summary.shares:
        names = ("scene", "semantic", "neither")
        shares = dict(zip(names, zip(*summary.shares, strict=True), strict=True))
        panels.append(
            Panel(
                "Mass by cue",
                "P's mass on the frames of each set; a frame of both sets counts in both.",
                lambda axes: plot_shares(axes, shares, "mass of P"),
            )
        )
    return panels


def prior_report(arguments, command=""):
    """Write the report of a priors file.

    Args:
        arguments: priors (path), media_root or None, items (rows drawn), seed, output (the page).
        command: shown at the end of the page.
    Returns:
        Path of the page; FILE-sheet.png and .svg show the rows drawn at random.
    """
    media_root = arguments.media_root or Path(arguments.priors).parent
    check_output(arguments.output)
    if arguments.items < 0:
        raise DataError("--items must be at least 0")
    summary = summarise_priors(arguments.priors, arguments.items, arguments.seed)
    # Media that cannot be read are counted and named; the page is written without them.
    strips = []
    causes = []
    for row in tqdm(summary.chosen, desc="decode", unit="video", delay=2):
        try:
            strips.append((row, read_frames(row, media_root)))
        except DataError as error:
            causes.append(str(error))
    note = (
        "P: the consensus prior over a video's K sampled frames (arXiv 2606.18441, Eq. 1-2). "
        f"{summary.rows()} rows of videos"
    )
    note += (
        f"; {summary.images} of images, one frame each, are left out." if summary.images else "."
    )
    # What is left out is counted and named.
    without = summary.rows() - len(summary.both)
    if without:
        note += (
            f" Rows without both sets: {summary.rows() - len(summary.shares)}; with an empty one, "
            f"so not asked whether the cues agree: {without}."
        )
    several = [name for name, values in summary.settings.items() if len(values) > 1]
    if several:
        note += f" The rows were made with several settings: {', '.join(several)}."
    if causes:
        warning = (
            f"{len(causes)} of {len(summary.chosen)} videos of the sheet cannot be shown "
            f"(--media_root {media_root}); the first: {causes[0]}"
        )
        print(f"visualize.py: warning: {warning}", file=sys.stderr)
        note += f" {warning}."
    heading = f"Priors of {Path(arguments.priors).name}"
    panels = prior_panels(summary)
    figures = {"": draw_panels(panels, heading, [], note)}
    body = [f"<p>{escape(note)}</p>", panels_html(panels), prior_table(summary)]
    if strips:
        title = f"{len(strips)} of {summary.rows()} rows, drawn at random"
        figures["-sheet"], pictures = draw_sheet(strips, title)
        body += [f"<h2>{title}</h2><p>{escape(NOTE)}</p>", *pictures]
    return write_report(arguments.output, heading, "\n".join(body), command, figures)
