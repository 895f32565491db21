"""What every picture shares."""

import base64
import io
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


@dataclass
class Sheet:
    """The colours of a page: Okabe and Ito's lines, safe for the colour-blind, brighter on dark; dashes are a second cue."""

    back: str
    text: str
    faint: str
    lines: list[str]


SHEETS = {
    "light": Sheet(
        "#ffffff",
        "#22262b",
        "#d9dde2",
        ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"],
    ),
    "dark": Sheet(
        "#15181d",
        "#e4e7eb",
        "#3a414b",
        ["#56B4E9", "#E69F00", "#1FBF92", "#E295BE", "#F0E442", "#4A90D9"],
    ),
}

CUES = {"scene": 2, "semantic": 3, "prior": 4}  # their lines; models and runs have the first ones

DASHES = [(1, 0), (5, 1.5), (6, 1.5, 1.5, 1.5), (2, 1)]

WIDTH, HEIGHT, DPI = 4.0, 2.75, 160  # a panel, inches


@dataclass
class Panel:
    """One picture: plot(axes, sheet) draws it and returns its alt text."""

    title: str
    caption: str
    plot: Callable
    shared: str = ""  # panels that name the same axis have the same y limits
    height: float = HEIGHT  # inches


FONTS = [
    "DejaVu Sans",
    *(
        name
        for name in (
            "Noto Sans CJK JP",
            "Noto Sans CJK SC",
            "WenQuanYi Zen Hei",
            "PingFang SC",
            "Microsoft YaHei",
            "Arial Unicode MS",
        )
        if name in get_font_names()
    ),
]  # questions may be in any language


def shorten(text, length):
    """The text, or its beginning and end: names of models and folders differ at either."""
    return (
        text
        if len(text) <= length
        else f"{text[: length // 2]}…{text[len(text) - (length - 1) // 2 :]}"
    )


def short_names(paths):
    """The ends of paths, as many of their parts as tell them apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(paths):
            return names
    return paths


def draw(panels, sheet, heading="", legend=(), columns=3, width=WIDTH, note=""):
    """Panels in a grid, under a heading, a legend and a note. legend: (name, index of its colour or None for the text's, dashes) each.
    -> the figure, its pixels (H, W, 3), the panels cut out of them, their alt texts."""
    columns = min(columns, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights, across = (
        [max(panel.height for panel in row) for row in rows],
        columns * width,
    )  # inches
    widths = [0.75 + 0.08 * len(name) for name, *_ in legend]
    wide = (
        len(legend) if sum(widths) < across else max(1, int(across / max(widths)))
    )  # legend entries in a line
    keys, lines = (
        0.25 * -(-len(legend) // wide) if legend else 0.0,
        textwrap.wrap(note, int(13 * across)),
    )  # inches, lines
    top = 0.5 + keys + 0.19 * len(lines) if heading else 0.0
    height = sum(heights) + top
    settings = {
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"),
            sheet.text,
        ),
        "grid.color": sheet.faint,
        "axes.facecolor": sheet.back,
        "font.size": 11,
        "font.family": FONTS,
        "text.parse_math": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "hatch.color": sheet.back,
    }
    with matplotlib.rc_context(settings):
        figure = Figure((across, height), dpi=DPI, facecolor=sheet.back)
        canvas, axes, places, below = (
            FigureCanvasAgg(figure),
            [],
            [],
            height - top,
        )  # inches to the bottom of the row
        left, right = 0.92, 0.2  # inches
        for row, high in zip(rows, heights, strict=True):
            below -= high
            for column in range(len(row)):
                axes.append(
                    figure.add_axes(
                        (
                            (column * width + left) / across,
                            (below + 0.6) / height,
                            (width - left - right) / across,
                            (high - 1) / height,
                        )
                    )
                )
                places.append((column * width, height - below - high, high))
        alts = []
        for one, panel in zip(axes, panels, strict=True):
            one.set_title(
                shorten(panel.title, int(9.6 * (width - left))),
                loc="left",
                fontsize=12,
                fontweight="bold",
            )
            alts.append(f"{panel.title}. {panel.plot(one, sheet)}")
        for shared in {panel.shared for panel in panels if panel.shared}:
            members = [
                one for one, panel in zip(axes, panels, strict=True) if panel.shared == shared
            ]
            limits = [
                one.get_ylim() for one in members if np.isfinite(one.dataLim.intervaly).all()
            ]  # of those with a number
            for one in members if limits else []:
                one.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        figure.text(
            0.15 / across,
            1 - 0.12 / height,
            shorten(heading, int(8.5 * across)),
            fontsize=14,
            fontweight="bold",
            va="top",
        )
        if heading and note:
            figure.text(
                0.15 / across,
                1 - (0.44 + keys) / height,
                "\n".join(lines),
                fontsize=10,
                va="top",
                linespacing=1.35,
            )
        if heading and legend:
            handles = [
                Line2D(
                    [],
                    [],
                    color=sheet.text if index is None else sheet.lines[index % 6],
                    dashes=dashes,
                    linewidth=2,
                )
                for _, index, dashes in legend
            ]
            box = figure.legend(
                handles,
                ["."] * len(legend),
                loc="upper left",
                bbox_to_anchor=(0.15 / across, 1 - 0.42 / height),
                ncols=wide,
                frameon=False,
                handlelength=2.6,
                borderpad=0,
                borderaxespad=0,
            )
            for entry, (name, *_) in zip(
                box.get_texts(), legend, strict=True
            ):  # afterwards: a name may begin with an underscore
                entry.set_text(name)
        canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    cut = [
        pixels[round(y * DPI) : round((y + high) * DPI), round(x * DPI) : round((x + width) * DPI)]
        for x, y, high in places
    ]
    return figure, pixels, cut, alts


def png(pixels, colours=200):
    """(H, W, 3) uint8 -> bytes of a PNG file with at most this many colours; None: as many as there are."""
    buffer, picture = io.BytesIO(), Image.fromarray(pixels)
    (picture.quantize(colours) if colours else picture).save(buffer, "png")
    return buffer.getvalue()


def jpeg(pixels):
    """(H, W, 3) uint8 -> bytes of a JPEG file, for photographs."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


def thumbnail(frame, side):
    """(H, W, 3) uint8 -> the same, shrunk to at most `side` pixels on the longer side."""
    height, width = (
        max(1, round(length * min(1, side / max(frame.shape[:2])))) for length in frame.shape[:2]
    )
    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)


def data_url(content, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
