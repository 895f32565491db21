"""The drawn matplotlib artists of report.py, figures.py and look.py against values derived by hand."""

import base64
import io
import re
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from common import figures, look, plots, run_page
from common.data import Example

SHEET = plots.SHEETS["light"]
NAN = float("nan")


def drawn(plot, *rest):
    """-> axes on which plot(axes, sheet, *rest) has drawn."""
    axes = Figure().add_subplot()
    plot(axes, SHEET, *rest)
    return axes


def lines(axes, marker=None, dots=None):
    """Lines with this marker, or dotted ones (chance), by their points (n, 2)."""
    return [
        line.get_xydata()
        for line in axes.lines
        if len(line.get_xdata())
        and (
            line.get_linestyle() == ":"
            if dots
            else line.get_linestyle() != ":" and line.get_marker() == (marker or "None")
        )
    ]


def shown(axes):
    """Images of the axes: (left, right, bottom, top) in pixels on the figure, their colour; each the right way up."""
    assert not axes.yaxis_inverted() and not axes.xaxis_inverted()
    found = []
    for image in axes.images:
        left, right, bottom, top = image.get_extent()
        assert left < right and bottom < top and image.origin == "upper"
        (x0, y0), (x1, y1) = axes.transData.transform([(left, bottom), (right, top)])
        found.append(((x0, x1, y0, y1), tuple(np.asarray(image.get_array())[0, 0])))
    return found


def plain(*colours, size=(9, 16)):
    """Pictures of one colour each, (h, w, 3)."""
    return [np.full((*size, 3), colour, np.uint8) for colour in colours]


def jpegs(page):
    found = re.findall(r'image/jpeg;base64,(.*?)"', page)
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(content))), float) for content in found
    ]


# ------------------------------------------------------------------------------------------------------------------- report


def run_of(values, first=0):
    return run_page.Run(
        "a", {"grpo": {step: {"loss/kl": value} for step, value in enumerate(values, first)}}, None
    )


METRIC = ("grpo", "loss/kl", "KL", "nats", "", "")


def test_crosses_gaps_and_chance():
    """Steps 10 to 15, the third, fifth and last no numbers: crosses there; windows of three; the fourth stands alone, a dot."""
    axes = drawn(
        run_page.plot_metric,
        METRIC,
        {"x": [run_of([1.0, 2.0, NAN, 6.0, None, float("inf")], 10)]},
        0.25,
    )
    cross, faint, line, chance = axes.lines
    assert cross.get_marker() == "x" and cross.get_xdata().tolist() == [12, 14, 15]
    pixels = cross.get_transform().transform(cross.get_xydata())
    np.testing.assert_allclose(
        pixels[:, 0], axes.transData.transform([(x, 0) for x in (12, 14, 15)])[:, 0]
    )
    assert all(axes.bbox.contains(*point) for point in pixels)
    assert (
        pixels[:, 1] < axes.bbox.y0 + 0.1 * axes.bbox.height
    ).all()  # at the bottom, wherever the values are
    for one, values in ((faint, [1, 2, NAN, 6, NAN, NAN]), (line, [1.5, 1.5, NAN, 6, NAN, NAN])):
        assert one.get_xdata().tolist() == [10, 11, 12, 13, 14, 15]
        np.testing.assert_equal(np.ma.filled(one.get_ydata(), NAN), values)
    assert (
        line.get_markevery() == [3]
        and line.get_marker() == "o"
        and line.get_alpha() is None
        and faint.get_alpha() < 0.5
    )
    assert (
        chance.get_linestyle() == ":"
        and list(chance.get_ydata()) == [0.25, 0.25]
        and axes.get_ylim()[0] <= 0.25
    )


def test_crosses_of_no_number_and_of_groups():
    """Two labels in their colours: one with no number at all has crosses alone, the other its line; without chance no dotted line."""
    axes = drawn(
        run_page.plot_metric,
        METRIC,
        {"x": [run_of([NAN, NAN, NAN])], "y": [run_of([5.0, 3.0, 4.0])]},
        None,
    )
    assert [(line.get_marker(), line.get_color()) for line in axes.lines] == [
        ("x", SHEET.lines[0]),
        ("None", SHEET.lines[1]),
        ("o", SHEET.lines[1]),
    ]
    assert axes.lines[0].get_xdata().tolist() == [0, 1, 2] and axes.lines[
        2
    ].get_ydata().tolist() == [5, 3, 4]
    assert axes.get_ylim()[0] > 2  # the crosses stand at the bottom, not at 0.03
    both = drawn(
        run_page.plot_metric,
        METRIC,
        {"x": [run_of([1.0, 2.0, 3.0]), run_of([5.0, 4.0, 9.0])]},
        None,
    )
    corners = both.collections[0].get_paths()[0].vertices
    assert [sorted(set(corners[corners[:, 0] == step, 1])) for step in range(3)] == [
        [1, 5],
        [2, 4],
        [3, 9],
    ]


def test_a_single_step_is_a_dot():
    """Step 7 with 0.5: a visible marker in the middle of the axes."""
    axes = drawn(run_page.plot_metric, METRIC, {"x": [run_of([0.5], 7)]}, None)
    line = axes.lines[-1]
    assert (
        line.get_xydata().tolist() == [[7, 0.5]]
        and line.get_markevery() == [0]
        and line.get_marker() == "o"
    )
    assert sum(axes.get_xlim()) == 14 and axes.get_ylim()[0] < 0.5 < axes.get_ylim()[1]


def test_shared_limits_are_joined():
    """0..1 and -5..-2 on one axis: both -5..1; a third panel keeps its own 20..30; one with crosses alone has no limits to give."""

    def panel(low, high, shared):
        def plot(axes, sheet):
            axes.plot([0, 1], [low, high])
            axes.set_ylim(low, high)

        return plots.Panel("t", "", plot, shared)

    crosses = plots.Panel(
        "t",
        "",
        lambda axes, sheet: axes.plot([3], [0.03], "x", transform=axes.get_xaxis_transform()),
        "s",
    )
    figure = plots.draw([panel(2, 3, "s"), panel(20, 30, ""), panel(5, 6, "s"), crosses], SHEET)[0]
    assert [axes.get_ylim() for axes in figure.axes] == [(2, 6), (20, 30), (2, 6), (2, 6)]
    figure = plots.draw([panel(0, 1, "s"), panel(-5, -2, "s")], SHEET)[0]
    assert [axes.get_ylim() for axes in figure.axes] == [(-5, 1), (-5, 1)]
    assert plots.draw([crosses], SHEET)[0].axes[0].get_ylim()[1] < 1  # alone: left as it is


def test_panels_are_cut_where_they_are_drawn():
    """Three panels of two heights in two columns under a heading: each cut is what the panel looks like alone."""
    faces = ["#ff0000", "#00aa00", "#0000ff"]

    def panel(index, height):
        return plots.Panel(
            f"Panel {index}",
            "",
            lambda axes, sheet: axes.set_facecolor(faces[index]),
            height=height,
        )

    legend = [("one", 1, plots.DASHES[0]), ("text", None, plots.DASHES[1])]
    figure, pixels, cut, alts = plots.draw(
        [panel(0, 2), panel(1, 3), panel(2, 2.5)], SHEET, "Heading", legend, columns=2
    )
    assert len(cut) == 3 and [alt.split(".")[0] for alt in alts] == [
        "Panel 0",
        "Panel 1",
        "Panel 2",
    ]
    for index, (one, high) in enumerate(
        zip(cut, (3, 3, 2.5), strict=True)
    ):  # a row is as high as its highest
        assert one.shape == (high * plots.DPI, plots.WIDTH * plots.DPI, 3)
        alone = plots.draw([panel(index, high)], SHEET)[1]
        assert alone.shape == one.shape and (alone == one).mean() > 0.999  # antialiasing
        inside = (one == np.round(np.array(to_rgb(faces[index])) * 255)).all(-1)
        assert inside.mean() > 0.4
    rows, columns = np.nonzero((pixels == (0, 0, 255)).all(-1))  # the third stands below the first
    red_rows, red_columns = np.nonzero((pixels == (255, 0, 0)).all(-1))
    assert rows.min() > red_rows.max() and columns.min() == red_columns.min()
    entries = figure.legends[0]
    assert [entry.get_text() for entry in entries.get_texts()] == ["one", "text"]
    assert [line.get_color() for line in entries.get_lines()] == [SHEET.lines[1], SHEET.text]


# --------------------------------------------------------------------------------------------------------------- enrichment


def answer(tokens, slots, pairs, consensus, correct=True, name="a"):
    return {
        "problem_id": name,
        "events": sorted(token * slots + slot for token, slot in pairs),
        "tokens": tokens,
        "slots": slots,
        "consensus": consensus,
        "correct": correct,
    }


# 3 of 4 events on half of the slots: 1.5 and 0.5; both of two on a fifth: 5 and 0. The 95 % interval of two answers: from one to the other
FIRST = answer(10, 4, [(0, 1), (2, 0), (7, 3), (9, 1)], [1, 3])
SECOND = answer(3, 5, [(1, 4), (2, 4)], [4], correct=False, name="b")


def events(label, *answers):
    return figures.Events(label, list(answers), 0, 0, "attention, layer 1")


def test_sides_are_means_with_intervals():
    """Consensus 1.5 and 5, others 0.5 and 0; the second file has one answer: 1.5 and 0.5, no interval."""
    axes = drawn(figures.plot_sides, [events("x", FIRST, SECOND), events("y", FIRST)])
    handles, names = axes.get_legend_handles_labels()
    marks = {name: handle.get_marker() for handle, name in zip(handles, names, strict=True)}
    dots = {
        name: [line for line in axes.lines if line.get_marker() == mark and len(line.get_xdata())]
        for name, mark in marks.items()
    }
    points = {
        name: [(float(line.get_xdata()[0]), round(float(line.get_ydata()[0]))) for line in own]
        for name, own in dots.items()
    }
    assert points == {
        "consensus slots": [(3.25, 0), (1.5, 1)],
        "other slots": [(0.25, 0), (0.5, 1)],
    }
    bars = [bar for bar in lines(axes) if np.isfinite(bar).all()]
    assert [bar[:, 0].tolist() for bar in bars] == [[1.5, 5], [0, 0.5]]
    for bar, name in zip(
        bars, ("consensus slots", "other slots"), strict=True
    ):  # through its marker
        assert set(bar[:, 1]) == {dots[name][0].get_ydata()[0]}
    pixel = {
        name: axes.transData.transform(own[0].get_xydata())[0, 1] for name, own in dots.items()
    }
    assert pixel["consensus slots"] > pixel["other slots"]  # the upper one
    for handle, name in zip(
        handles, names, strict=True
    ):  # filled in the legend, filled in the drawing
        assert (handle.get_markerfacecolor() == SHEET.back) == (
            dots[name][0].get_markerfacecolor() == SHEET.back
        )
    assert (
        dots["consensus slots"][0].get_markerfacecolor()
        != SHEET.back
        == dots["other slots"][0].get_markerfacecolor()
    )
    assert [line.get_color() for line in dots["consensus slots"]] == SHEET.lines[:2]
    assert [(text.get_text(), text.xy[0]) for text in axes.texts] == [
        ("3.25", 3.25),
        ("0.25", 0.25),
        ("1.50", 1.5),
        ("0.50", 0.5),
    ]
    assert [label.get_text().split("\n")[0] for label in axes.get_yticklabels()] == [
        "x",
        "y",
    ] and list(axes.get_yticks()) == [0, 1]
    assert [set(line[:, 0]) for line in lines(axes, dots=True)] == [{1}]
    low, high = axes.get_xlim()
    assert low < 0 and high > 5


def test_positions_of_events():
    """Halves of two answers: 1 of 2 and 2 of 2 events of FIRST on consensus slots, none and 2 of 2 of SECOND; a quarter of resamples has
    one of them alone, so the band's ends are theirs."""
    files = [events("x", FIRST, SECOND), events("y", SECOND)]
    axes = drawn(figures.plot_positions, files, 2, "enrichment")
    line, one = lines(axes, "o")
    np.testing.assert_allclose(line, [[25, 1 / 1], [75, 4 / (2 * 0.5 + 2 * 0.2)]])
    np.testing.assert_allclose(one, [[25, NAN], [75, 5]])  # SECOND has no event in its first half
    corners = axes.collections[0].get_paths()[0].vertices
    ends = [sorted(set(np.round(corners[corners[:, 0] == x, 1], 9))) for x in (25, 75)]
    assert ends == [[1], [2, 5]]
    assert [set(chance[:, 1]) for chance in lines(axes, dots=True)] == [
        {1}
    ] and axes.get_xlim() == (0, 100)
    # four of FIRST's events: tokens 0, 2, 7, 9 of 10; SECOND's: tokens 1 and 2 of 3, middles at 1/2 and 5/6
    axes = drawn(figures.plot_positions, files, 5, "share")
    line, one = lines(axes, "o")
    np.testing.assert_allclose(
        line,
        np.transpose([[10, 30, 50, 70, 90], np.array([1 / 4, 1 / 4, 1 / 2, 1 / 4, 3 / 4]) / 2]),
    )
    np.testing.assert_allclose(one[:, 1], [0, 0, 0.5, 0, 0.5])
    assert [set(chance[:, 1]) for chance in lines(axes, dots=True)] == [
        {0.2}
    ] and not axes.collections
    assert [one.get_color() for one in axes.lines[:2]] == SHEET.lines[:2] and axes.get_ylim()[
        0
    ] == 0


def test_violins_are_the_answers():
    """40 answers of ten events, h of them on half of the slots: enrichment h / 5; the last four wrong ones are dots."""
    hits = [4] * 5 + [5] * 25 + [7] * 4 + [10] * 2 + [6, 8, 9, 9]
    answers = [
        answer(10, 4, [(token, 1 if token < hit else 0) for token in range(10)], [1, 3], index < 36)
        for index, hit in enumerate(hits)
    ]
    axes = drawn(figures.plot_violins, events("x", *answers), 1)
    bodies = [body.get_paths()[0].vertices for body in axes.collections]
    assert [round(body[:, 0].mean()) for body in bodies] == [0, 1, 2]  # none of the few wrong ones
    np.testing.assert_allclose(
        [(body[:, 1].min(), body[:, 1].max()) for body in bodies], [(0.8, 2), (0, 1.2), (0.8, 2)]
    )
    widest = [body[body[:, 0].argmax(), 1] for body in bodies]
    np.testing.assert_allclose(widest, [1, 1, 1], atol=0.06)  # 25 of 40
    bars = [(round(bar[:, 0].mean()), *bar[:, 1]) for bar in lines(axes)]
    np.testing.assert_allclose(
        bars, [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1.7, 1.7)]
    )  # the last of 6, 8, 9, 9
    (dots,) = lines(axes, "o")
    np.testing.assert_allclose(dots[:, 1], [1.2, 1.6, 1.8, 1.8])
    assert 2.5 < dots[:, 0].min() < dots[:, 0].max() < 3.5 and [
        set(line[:, 1]) for line in lines(axes, dots=True)
    ] == [{1}]
    names = [label.get_text().split("\n") for label in axes.get_xticklabels()]
    assert names == [["consensus", "40"], ["others", "40"], ["if right", "36"], ["if wrong", "4"]]
    assert {to_hex(body.get_facecolor()[0]).lower() for body in axes.collections} == {
        SHEET.lines[1].lower()
    }


# -------------------------------------------------------------------------------------------------------------------- prior


def test_mass_is_in_order():
    """Two rows of four frames with these sums: halves of them, at eighths of the video."""
    told = figures.Priors(0, {4: [2, np.array([0.2, 0.4, 0.6, 0.8])]}, [], [], [], [], {}, [])
    axes = drawn(figures.plot_mass, told, 4)
    bars = [
        (bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height()) for bar in axes.patches
    ]
    np.testing.assert_allclose(bars, [(12.5, 0.1), (37.5, 0.2), (62.5, 0.3), (87.5, 0.4)])
    assert all(0 < bar.get_width() < 25 and bar.get_y() == 0 for bar in axes.patches)
    assert [set(line[:, 1]) for line in lines(axes, dots=True)] == [{0.25}] and axes.get_xlim() == (
        0,
        100,
    )


def test_histogram_steps():
    """Twentieths of 0..1: a third of `scene` in the 4th, the rest (one above 1 by rounding) in the last; `neither` in the first."""
    named = {
        "scene": [0.17, 0.99, 1.0000001],
        "semantic": [0.02, 0.51, 0.52, 0.53],
        "neither": [0.01],
    }
    wanted = np.zeros((3, 20))
    wanted[0, [3, 19]], wanted[1, [0, 10]], wanted[2, 0] = [1 / 3, 2 / 3], [1 / 4, 3 / 4], 1
    axes = drawn(figures.plot_histogram, named, 0, 1, "mass of P")
    outlines = [patch for patch in axes.patches if not patch.get_fill()]
    assert [patch.get_label() for patch in outlines] == list(named)
    for patch, values in zip(outlines, wanted, strict=True):
        np.testing.assert_allclose(patch.get_data().edges, np.arange(21) / 20)
        np.testing.assert_allclose(np.nan_to_num(patch.get_data().values), values)
    (filled,) = (patch for patch in axes.patches if patch.get_fill())
    np.testing.assert_allclose(filled.get_data().values, wanted[0])
    colours = [SHEET.lines[plots.CUES["scene"]], SHEET.lines[plots.CUES["semantic"]], SHEET.text]
    assert [to_hex(patch.get_edgecolor()).lower() for patch in outlines] == [
        colour.lower() for colour in colours
    ]
    assert (
        axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 1 and axes.get_xlim() == (0, 1)
    )  # the highest is not the first
    axes = drawn(
        figures.plot_histogram, {"x": [-0.95, -0.55, 0.5]}, -1, 1, "rank correlation"
    )  # tenths of -1..1
    data = axes.patches[0].get_data()
    assert np.flatnonzero(np.nan_to_num(data.values)).tolist() == [0, 4, 15]
    np.testing.assert_allclose(data.edges, np.arange(-10, 11) / 10, atol=1e-12)
    assert [set(line.get_xdata()) for line in axes.lines] == [{-0.55}]  # the median


def test_overlap_bars_and_diamonds():
    """Found 2, 2, 0, 1 in common. By chance two of four and three of four have 1 or 2 (twice); one of eight and two 0 of 3/4, 1 of 1/4;
    one of four and two 0 or 1."""
    axes = drawn(figures.plot_overlap, [(2, 4, 2, 3), (2, 4, 2, 3), (0, 8, 1, 2), (1, 4, 1, 2)])
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches]
    np.testing.assert_allclose(bars, [(0, 0.25), (1, 0.25), (2, 0.5)])
    (diamonds,) = lines(axes, "D")
    np.testing.assert_allclose(diamonds, [(0, 1.25 / 4), (1, 1.75 / 4), (2, 1 / 4)])
    assert (
        axes.patches[0] in axes.containers[0]
        and axes.containers[0].get_label() == "rows"
        and list(axes.get_xticks()) == [0, 1, 2]
    )
    assert {label.get_text() for label in axes.get_legend().get_texts()} == {"rows", "chance"}


def strip_row(frames=20):
    """P of frame i is proportional to i + 1; a cue names the frames 1 and 17, another 17 and 18."""
    return {
        "problem_id": "v",
        "question": "q?",
        "media": "v.mp4",
        "times": [place / 2 for place in range(frames)],
        "scene": [1, 17],
        "semantic": [17, 18],
        "prior": [(place + 1) / 1000 for place in range(frames)],
    }


def check_strip(axes, row, pictures, start, largest):
    """One line of the sheet against the row: pictures, bars, frames of the cues, times."""
    places = range(start, min(start + 16, len(pictures)))
    found = shown(axes)
    assert [colour for _, colour in found] == [tuple(pictures[place][0, 0]) for place in places]
    centres = [
        axes.transData.inverted().transform(((x0 + x1) / 2, y0)) for (x0, x1, y0, _), _ in found
    ]
    np.testing.assert_allclose([x for x, _ in centres], range(len(places)), atol=1e-9)
    bars = [patch for patch in axes.patches if patch.get_fill()]
    np.testing.assert_allclose(
        [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in bars],
        [(x, row["prior"][place] / largest) for x, place in enumerate(places)],
    )
    assert min(y for _, y in centres) > 1  # above the highest bar
    cues = {SHEET.lines[plots.CUES[name]].lower(): name for name in ("scene", "semantic")}
    frames = {name: [] for name in cues.values()}
    for patch in axes.patches:
        if patch.get_fill():
            continue
        x = patch.get_x() + patch.get_width() / 2
        frames[cues[to_hex(patch.get_edgecolor()).lower()]].append(round(x) + start)
        left, right, bottom, top = axes.images[round(x)].get_extent()
        assert (
            abs(x - round(x)) < 1e-9
            and patch.get_x() <= left + 1e-9
            and patch.get_x() + patch.get_width() >= right - 1e-9
        )
        assert patch.get_y() <= bottom + 1e-9 and patch.get_y() + patch.get_height() >= top - 1e-9
        assert bottom - patch.get_y() < 0.2 and top < axes.get_ylim()[1]
    assert frames == {
        name: [place for place in row[name] if place in places] for name in cues.values()
    }
    told = {(round(text.get_position()[0]) + start, text.get_text()) for text in axes.texts}
    assert told == {
        (place, f"{row['prior'][place]:.2f}")
        for place in places
        if place in row["scene"] + row["semantic"]
    }
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        f"{row['times'][place]:.1f} s" for place in places
    ]
    assert list(axes.get_xticks()) == list(range(len(places)))


@pytest.mark.parametrize("start", [0, 16])
def test_strip_pictures_stand_on_their_bars(start):
    """20 frames: 16 in a line, four in the next; bars in parts of `largest` 0.04, not of the row's own 0.02."""
    row, pictures = strip_row(), plain(*((10 * place, 0, 255 - place) for place in range(20)))
    axes = drawn(figures.plot_strip, row, pictures, start, 2.0, 0.04)
    check_strip(axes, row, pictures, start, 0.04)
    assert (
        axes.get_xlim() == (-0.5, 15.5) and axes.get_ylim()[0] == 0
    )  # the last line's pictures are no wider


def test_sheet_of_two_rows():
    """A row of 20 frames and one of two, twice as likely at most: three lines, one scale; pictures keep their shape, 16 : 9 and 1 : 2."""
    first, second = (
        strip_row(),
        {**strip_row(2), "scene": [0], "semantic": [], "prior": [0.04, 0.01]},
    )
    wide = plain(*((place, 50, 0) for place in range(20)))
    tall = plain((0, 0, 200), (0, 0, 100), size=(16, 8))
    figure = plots.draw(
        figures.strip_panels([(first, wide), (second, tall)], 12), SHEET, "x", columns=1, width=12
    )[0]
    for axes, told in zip(
        figure.axes, ((first, wide, 0), (first, wide, 16), (second, tall, 0)), strict=True
    ):
        check_strip(axes, *told, 0.04)
        for (x0, x1, y0, y1), _ in shown(axes):
            high, across = told[1][0].shape[:2]
            assert (x1 - x0) / (y1 - y0) == pytest.approx(across / high, rel=0.02)


def test_strip_html_bars():
    """P 0.25, 0.5 and 0.05 of `largest` 0.5: 50, 100 and 10 %; the frames' own pictures; dashed by scene, solid by semantic."""
    row = {
        "problem_id": "v",
        "media": "v.mp4",
        "times": [0.0, 1.0, 2.0],
        "prior": [0.25, 0.5, 0.05],
        "scene": [1],
        "semantic": [1, 2],
    }
    page = figures.strip_html(row, plain((250, 0, 0), (0, 250, 0), (0, 0, 250)), 0.5)
    assert re.findall(r"width:(\d+)%", page) == ["50", "100", "10"]
    np.testing.assert_allclose(
        [picture.mean((0, 1)) for picture in jpegs(page)], 250 * np.eye(3), atol=5
    )
    styles = re.findall(r'<img [^>]*style="(.*?)"', page)
    assert [("dashed" in style, "solid" in style) for style in styles] == [
        (False, False),
        (True, True),
        (False, True),
    ]
    assert (
        f"solid var(--c{plots.CUES['semantic']})" in styles[2]
        and f"dashed var(--c{plots.CUES['scene']})" in styles[1]
    )
    assert (
        re.findall(r'alt="(.*?)"', page)[1]
        == "Frame at 1.0 s, P 0.500, named by scene and semantic"
    )


# ------------------------------------------------------------------------------------------------------------------- sample


@pytest.mark.parametrize(("size", "fills"), [((10, 12), False), ((60, 10), True)])
def test_thumbnails_that_fit(size, fills):
    """12 frames in 4 inches: 6 names of 0.62 inches, so every second frame, in the room of its two; high pictures fill the height."""
    thumbs = plain(*((20 * place, 100, 0) for place in range(12)), size=size)
    figure = Figure((8, 4))
    axes = figure.add_axes((0.25, 0.25, 0.5, 0.25))
    look.plot_strip(axes, thumbs, [place / 2 for place in range(12)])
    found = shown(axes)
    assert [colour for _, colour in found] == [(20 * place, 100, 0) for place in range(0, 12, 2)]
    for place, ((x0, x1, y0, y1), _) in zip(range(0, 12, 2), found, strict=True):
        (left, bottom), (right, top) = axes.transData.transform(
            [(place - 0.5, 0), (place + 1.5, 1)]
        )
        assert left <= x0 < x1 <= right and y0 == pytest.approx(bottom) and y1 <= top + 1e-6
        assert (x1 - x0) / (y1 - y0) == pytest.approx(size[1] / size[0])
        assert y1 == pytest.approx(top) if fills else x1 - x0 > 0.9 * (right - left)
    assert list(axes.get_xticks()) == [0, 2, 4, 6, 8, 10]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "0.0 s",
        "1.0 s",
        "2.0 s",
        "3.0 s",
        "4.0 s",
        "5.0 s",
    ]
    assert (axes.get_xlim(), axes.get_ylim()) == ((-0.5, 11.5), (0, 1))
    few = Figure((8, 4)).add_axes((0.25, 0.25, 0.5, 0.25))
    look.plot_strip(few, thumbs[:3], [0.0, 1.0, 2.0])
    assert [colour[0] for _, colour in shown(few)] == [0, 20, 40]


def made_look(name, maps):
    """maps: {score: value of each slot}, one patch a slot."""
    slots, patches = (
        len(next(iter(maps.values()))),
        {score: torch.tensor(own).view(-1, 1, 1) for score, own in maps.items()},
    )
    use = torch.arange(1.0, slots + 1) / sum(range(1, slots + 1))
    return look.Look(
        name,
        "<answer>A</answer>",
        ["A"],
        {("max", tau): use for tau in (0.1, 1.0)},
        {score: torch.eye(1, slots) for score in maps},
        patches,
    )


def over(share, grey):
    """The heat map's colour: magma, three quarters, over a grey thumbnail."""
    return 0.75 * 255 * np.array(matplotlib.colormaps["magma"](float(share))[:3]) + 0.25 * grey


def test_maps_lie_at_their_slots():
    """Six frames, three slots, two in a line: frames 0, 2, 4; a row a score and model, each on its own scale from least to most."""
    thumbs, times = plain(*(40 * place for place in range(6))), [place / 2 for place in range(6)]
    looks = [
        made_look("one", {"max": [0.0, 1.0, 4.0], "mean": [9.0, 1.0, 5.0]}),
        made_look("two", {"max": [8.0, 2.0, 5.0]}),
    ]
    shares = [(0, 1 / 4, 1), (1, 0, 1 / 2), (1, 0, 1 / 2)]  # max of one; max of two; mean of one
    figure = look.maps_figure(looks, thumbs, times, (-1, 2), across=2)
    boxes = [axes.get_position() for axes in figure.axes]
    lefts, tops = (
        sorted({round(box.x0, 6) for box in boxes}),
        sorted({round(box.y0, 6) for box in boxes}, reverse=True),
    )
    assert len(lefts) == 2 and len(tops) == 8 and len(figure.axes) == 12
    cells = {
        (tops.index(round(box.y0, 6)), lefts.index(round(box.x0, 6))): axes
        for box, axes in zip(boxes, figure.axes, strict=True)
    }
    for slot in range(3):
        line, column = divmod(slot, 2)
        own = [cells[4 * line + row, column] for row in range(4)]
        arrays = [np.asarray(axes.images[0].get_array(), float) for axes in own]
        assert all(np.ptp(array, (0, 1)).max() == 0 for array in arrays)
        wanted = [[80 * slot] * 3, *(over(share[slot], 80 * slot) for share in shares)]
        np.testing.assert_allclose([array[0, 0] for array in arrays], wanted, atol=2)
        assert [axes.get_title() for axes in own] == [
            f"{slot:.1f} s",
            "",
            "",
            "",
        ]  # frame 2 of a slot is a second later
        for axes in own:
            box = axes.bbox
            assert (
                figure.bbox.x0 < box.x0
                and box.x1 < figure.bbox.x1
                and figure.bbox.y0 < box.y0
                and box.y1 < figure.bbox.y1
            )
            assert axes.yaxis_inverted() and box.width / box.height == pytest.approx(
                16 / 9
            )  # imshow's way up
    names = ["frame", "max pooling\none", "max pooling\ntwo", "mean pooling\none"]
    for text in figure.texts[1:]:
        (row,) = (
            row
            for row in range(8)
            if cells[row, 0].get_position().y0
            < text.get_position()[1]
            < cells[row, 0].get_position().y1
        )
        assert text.get_text() == names[row % 4] and text.get_position()[0] < lefts[0]
    assert len(figure.texts) == 1 + 8


def test_page_tiles_are_the_slots():
    """Four frames, two slots: a tile is the slot's first frame, then its map per score; the four frames stand in order, two a slot."""
    thumbs = plain(0, 60, 120, 180, size=(32, 32))
    looks = [
        made_look("one", {"max": [0.0, 3.0], "mean": [7.0, 2.0]}),
        made_look("two", {"max": [3.0, 0.0]}),
    ]
    row = {
        "times": [0.0, 1.0, 2.0, 3.0],
        "prior": [0.1, 0.2, 0.3, 0.4],
        "scene": [2],
        "semantic": [0, 2],
    }
    arguments = SimpleNamespace(
        hidden_layer=-1, attention_layer=1, cfr_weight=1.0, max_completion_length=9
    )
    page = look.sample_html(
        arguments,
        Example("0", "q", [], "free-form", "", "", "video"),
        row,
        looks,
        thumbs,
        [plots.Panel("t", "", lambda axes, sheet: "")],
        [],
        "",
    )
    pictures = jpegs(page)
    assert len(pictures) == 4 + 2 + 2
    np.testing.assert_allclose(
        [picture.mean() for picture in pictures[:4]], [0, 60, 120, 180], atol=3
    )
    for tile, slot, shares in zip(
        pictures[4:], (0, 1, 0, 1), ((0, 1), (1, 0), (1,), (0,)), strict=True
    ):
        grey, step = 120 * slot, 32 + 6  # six white columns between them
        assert tile.shape == (32, 32 + step * len(shares), 3)
        np.testing.assert_allclose(tile[8:24, 8:24].mean((0, 1)), [grey] * 3, atol=6)
        for index, share in enumerate(shares, 1):
            np.testing.assert_allclose(
                tile[8:24, index * step + 8 : index * step + 24].mean((0, 1)),
                over(share, grey),
                atol=6,
            )
            assert tile[:, index * step - 4 : index * step - 2].mean() > 225
    captions = re.findall(
        r'<figcaption style="background:(#\w+);color:#\w+">(.*?)</figcaption>', page
    )
    back = [colour for colour, _ in look.slot_colours(2)]
    assert captions == [
        (back[0], "1 · 0.0 s<br>P 0.100<br>semantic"),
        (back[0], "1 · 1.0 s<br>P 0.200"),
        (back[1], "2 · 2.0 s<br>P 0.300<br>scene<br>semantic"),
        (back[1], "2 · 3.0 s<br>P 0.400"),
    ]
