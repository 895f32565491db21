"""Drawn matplotlib artists of the pages of visualize.py against values derived by hand."""

from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from common import enrichment_page, plots, prior_page, run_page, sample_page
from common.data import Prior

NAN = float("nan")


def drawn(plot, *rest):
    """-> axes on which plot(axes, *rest) has drawn."""
    axes = Figure().add_subplot()
    plot(axes, *rest)
    return axes


def lines(axes, marker="None"):
    """Points (n, 2) of the lines with this marker, without dotted lines (chance) and legends."""
    found = []
    for line in axes.lines:
        if line.get_marker() == marker and line.get_linestyle() != ":" and len(line.get_xdata()):
            found.append(line.get_xydata())
    return found


def chance_levels(axes):
    return [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"]


def plain(*colours, size=(9, 16)):
    """Pictures of one colour each, (h, w, 3)."""
    return [np.full((*size, 3), colour, np.uint8) for colour in colours]


# ---------------------------------------------------------------------------------------- run page


def run_of(values, first=0):
    records = {step: {"loss/kl": value} for step, value in enumerate(values, first)}
    return run_page.Run("a", {"grpo": records}, None)


def metric_axes(groups, chance=None):
    metric = run_page.Metric("KL", "nats")
    return drawn(run_page.plot_metric, "loss/kl", metric, groups, chance)


def test_crosses_gaps_and_chance():
    """Steps 10 to 15; the third, fifth and last are not numbers: crosses; windows of three."""
    run = run_of([1.0, 2.0, NAN, 6.0, None, float("inf")], 10)
    axes = metric_axes({"x": [run]}, 0.25)
    cross, dots, line, chance = axes.lines
    assert cross.get_marker() == "x" and cross.get_xdata().tolist() == [12, 14, 15]
    pixels = cross.get_transform().transform(cross.get_xydata())
    # At the bottom, wherever the values are.
    assert all(axes.bbox.contains(*point) for point in pixels)
    assert (pixels[:, 1] < axes.bbox.y0 + 0.1 * axes.bbox.height).all()
    assert dots.get_xdata().tolist() == line.get_xdata().tolist() == [10, 11, 12, 13, 14, 15]
    np.testing.assert_equal(dots.get_ydata(), [1, 2, NAN, 6, NAN, NAN])
    np.testing.assert_equal(line.get_ydata(), [1.5, 1.5, NAN, 6, NAN, NAN])
    # The fourth stands alone: no line shows it, its dot does.
    assert dots.get_marker() == "." and dots.get_alpha() < 1
    assert list(chance.get_ydata()) == [0.25, 0.25] and axes.get_ylim()[0] <= 0.25


def test_groups_have_their_colours_and_a_band():
    axes = metric_axes({"x": [run_of([NAN, NAN, NAN])], "y": [run_of([5.0, 3.0, 4.0])]})
    assert [(line.get_marker(), line.get_color()) for line in axes.lines] == [
        ("x", plots.LINES[0]),
        (".", plots.LINES[1]),
        ("None", plots.LINES[1]),
    ]
    assert axes.lines[2].get_ydata().tolist() == [5, 3, 4]
    assert axes.get_ylim()[0] > 2  # the crosses stand at the bottom, not at 0.03
    both = metric_axes({"x": [run_of([1.0, 2.0, 3.0]), run_of([5.0, 4.0, 9.0])]})
    corners = both.collections[0].get_paths()[0].vertices
    ends = [sorted(set(corners[corners[:, 0] == step, 1])) for step in range(3)]
    assert ends == [[1, 5], [2, 4], [3, 9]]


def test_shared_limits_and_cuts():
    """Two of three panels share their limits; each picture shows its own panel's colour."""
    faces = ["#ff0000", "#00aa00", "#0000ff"]

    def panel(index, low, high, shared):
        def plot(axes):
            axes.plot([0, 1], [low, high], color="white")
            axes.set_facecolor(faces[index])
            return "drawn"

        return plots.Panel(f"Panel {index}", "", plot, shared)

    panels = [panel(0, 2, 3, "s"), panel(1, 20, 30, ""), panel(2, 5, 6, "s")]
    keys = [plots.line_key("_one", 1), plots.Key("text", "black", "dotted")]
    figure = plots.draw_panels(panels, "Heading", keys, "Note")
    limits = [cell.axes[0].get_ylim() for cell in figure.subfigs]
    assert limits[0] == limits[2] and limits[0][0] < 2 and limits[0][1] > 6 and limits[1][0] > 18
    for one, face in zip(panels, faces, strict=True):
        inside = (one.picture == np.round(np.array(to_rgb(face)) * 255)).all(-1)
        assert inside.mean() > 0.4 and one.alt == f"{one.title}. drawn"
    (legend,) = figure.legends
    assert [entry.get_text() for entry in legend.get_texts()] == ["_one", "text"]
    assert [line.get_color() for line in legend.get_lines()] == [plots.LINES[1], "black"]
    # Nothing of the page stands on something else.
    boxes = [legend.get_window_extent(), *(cell.axes[0].get_tightbbox() for cell in figure.subfigs)]
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])


# -------------------------------------------------------------------------------------- enrichment


def answer(tokens, slots, pairs, consensus, correct=True, name="a"):
    events = sorted(token * slots + slot for token, slot in pairs)
    return enrichment_page.Answer(name, events, tokens, slots, consensus, correct)


# 3 of 4 events on half of the slots: 1.5 and 0.5; both of two on a fifth: 5 and 0.
# The 95 % interval of two answers goes from one to the other.
FIRST = answer(10, 4, [(0, 1), (2, 0), (7, 3), (9, 1)], [1, 3])
SECOND = answer(3, 5, [(1, 4), (2, 4)], [4], correct=False, name="b")


def events(label, *answers):
    return enrichment_page.Events(label, list(answers), 0, 0, "attention, layer 1", 0)


def test_sides_are_means_with_intervals():
    """Consensus 1.5 and 5, others 0.5 and 0; the second file has one answer, so no interval."""
    axes = drawn(enrichment_page.plot_sides, [events("x", FIRST, SECOND), events("y", FIRST)])
    consensus = [(line[0, 0], round(line[0, 1])) for line in lines(axes, "o")]
    others = [(line[0, 0], round(line[0, 1])) for line in lines(axes, "s")]
    assert consensus == [(3.25, 0), (1.5, 1)] and others == [(0.25, 0), (0.5, 1)]
    bars = [bar[:, 0].tolist() for bar in lines(axes) if np.isfinite(bar).all()]
    assert bars == [[1.5, 5], [0, 0.5]]
    texts = [(text.get_text(), text.get_position()[0]) for text in axes.texts]
    assert texts == [("3.25", 3.25), ("0.25", 0.25), ("1.50", 1.5), ("0.50", 0.5)]
    names = [label.get_text().split("\n")[0] for label in axes.get_yticklabels()]
    assert names == ["x", "y"] and list(axes.get_yticks()) == [0, 1]


def test_positions_of_events():
    """Halves: 1 of 2 and 2 of 2 events of FIRST on consensus slots, none and 2 of 2 of SECOND.

    A quarter of the resamples has one of them alone, so the band's ends are theirs.
    """
    files = [events("x", FIRST, SECOND), events("y", SECOND)]
    axes = drawn(enrichment_page.plot_positions, files, 2, "enrichment")
    line, one = lines(axes, "o")
    np.testing.assert_allclose(line, [[25, 1 / 1], [75, 4 / (2 * 0.5 + 2 * 0.2)]])
    np.testing.assert_allclose(one, [[25, NAN], [75, 5]])  # SECOND has no event in its first half
    corners = axes.collections[0].get_paths()[0].vertices
    ends = [sorted(set(np.round(corners[corners[:, 0] == x, 1], 9))) for x in (25, 75)]
    assert ends == [[1], [2, 5]] and chance_levels(axes) == [1]
    # FIRST's events: tokens 0, 2, 7, 9 of 10; SECOND's: tokens 1 and 2 of 3, middles 1/2 and 5/6.
    axes = drawn(enrichment_page.plot_positions, files, 5, "share of events")
    line, one = lines(axes, "o")
    np.testing.assert_allclose(line[:, 0], [10, 30, 50, 70, 90])
    np.testing.assert_allclose(line[:, 1], np.array([1 / 4, 1 / 4, 1 / 2, 1 / 4, 3 / 4]) / 2)
    np.testing.assert_allclose(one[:, 1], [0, 0, 0.5, 0, 0.5])
    assert chance_levels(axes) == [0.2] and not axes.collections


# ------------------------------------------------------------------------------------------- prior


def test_mass_is_in_order():
    axes = drawn(prior_page.plot_mass, np.arange(1, 17) / 136)
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches]
    wanted = [(100 * (place + 0.5) / 16, (place + 1) / 136) for place in range(16)]
    np.testing.assert_allclose(bars, wanted)
    assert chance_levels(axes) == [1 / 16] and axes.get_xlim() == (0, 100)


def test_histogram_steps():
    """A third of `scene` in the 4th twentieth, the rest (one above 1 by rounding) in the last."""
    named = {"scene": [0.17, 0.99, 1.0000001], "semantic": [0.02, 0.51], "neither": [0.01]}
    axes = drawn(prior_page.plot_shares, named, "mass of P")
    outlines = {patch.get_label(): patch for patch in axes.patches}
    assert list(outlines) == list(named)
    wanted = np.zeros(20)
    wanted[[3, 19]] = [1 / 3, 2 / 3]
    corners = outlines["scene"].get_xy()
    np.testing.assert_allclose(corners[1:-1:2, 1], wanted, atol=1e-12)
    assert to_hex(outlines["scene"].get_edgecolor()) == plots.CUES["scene"].lower()
    assert axes.get_ylim()[1] > 1 and axes.get_xlim() == (0, 1)  # the highest is not the first


def prior_row(frames=12, **more):
    """P of frame i is proportional to i + 1; the cues choose 1 and 7, and 7 and 8."""
    row = {
        "problem_id": "v",
        "question": "q?",
        "frames": list(range(frames)),
        "times": [place / 2 for place in range(frames)],
        "scene": [1, 7],
        "semantic": [7, 8],
        "scene_scores": [0.1 + 0.01 * place for place in range(frames)],
        "semantic_scores": [-0.1 + 0.02 * place for place in range(frames)],
        "prior": [(place + 1) / 1000 for place in range(frames)],
    }
    return Prior(**{**row, **more})


@pytest.mark.parametrize("size", [(90, 160), (160, 90)])
def test_frames_stand_above_their_bars(size):
    """Pictures in order and of their shape, each above its bars; what a cue chose is filled."""
    row = prior_row()
    frames = plain(*((20 * place, 0, 255 - place) for place in range(12)), size=size)
    figure, (more,), alt = plots.prior_figure(row, frames, 0.2, more=1)
    figure.canvas.draw()
    film, scene, semantic, prior, last = figure.axes
    assert more is last and "0.5 s P 0.002 scene, 1.0 s P 0.003," in alt and "q?" not in alt
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    height, width = size
    for place in range(12):
        centre = prior.transData.transform((place, 0))[0]
        middle = (film.bbox.y0 + film.bbox.y1) / 2
        colour = pixels[len(pixels) - round(middle), round(centre)]
        np.testing.assert_allclose(colour, [20 * place, 0, 255 - place], atol=3)
    shape = film.bbox.height * 12 / film.bbox.width
    assert shape == pytest.approx(height / (width + 4 * max(size) / 160), rel=0.02)
    for axes, values in ((scene, row.scene_scores), (prior, row.prior)):
        bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches]
        np.testing.assert_allclose(bars, list(enumerate(values)), atol=1e-12)
    filled = [to_hex(bar.get_facecolor()) != "#ffffff" for bar in scene.patches]
    assert np.flatnonzero(filled).tolist() == [1, 7]
    np.testing.assert_allclose(
        semantic.collections[0].get_offsets(), list(enumerate(row.semantic_scores))
    )
    faces = [to_hex(face) != "#ffffff" for face in semantic.collections[0].get_facecolors()]
    assert np.flatnonzero(faces).tolist() == [7, 8]
    assert [line.get_ydata()[0] for line in scene.lines] == [0.2]
    assert [label.get_text() for label in last.get_xticklabels()][:3] == ["0.0 s", "0.5 s", "1.0 s"]


def test_sheet_of_two_rows():
    """A row of 12 frames above one of two without scores: frames of both are equally wide."""
    first = prior_row()
    second = prior_row(2, scene=[0], semantic=[], scene_scores=[], semantic_scores=[])
    strips = [(first, plain(*range(12))), (second, plain(0, 100))]
    figure, pictures = prior_page.draw_sheet(strips, "Rows")
    assert len(pictures) == 2 and "0.5 s P 0.002" in pictures[1]
    films = [cell.axes[0] for cell in figure.subfigs]
    assert [len(cell.axes) for cell in figure.subfigs] == [4, 2]
    assert [axes.get_xlim() for axes in films] == [(-0.5, 11.5)] * 2
    widths = [axes.bbox.width for axes in films]
    assert widths[0] == pytest.approx(widths[1], rel=0.03)


def test_prior_of_many_frames_can_be_drawn():
    """768 frames: the picture is at most 60 inches wide, and the times do not overlap."""
    row = prior_row(768, scene=[], semantic=[], scene_scores=[], semantic_scores=[])
    figure, _, _ = plots.prior_figure(row, plain(*[0] * 768))
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in figure.axes[-1].get_xticklabels()]
    assert figure.get_figwidth() <= 60 and len(boxes) > 50
    assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:], strict=False))


# ------------------------------------------------------------------------------------------ sample


def test_use_steps_are_the_numbers():
    """Five frames in three slots; the second model's line is drawn in its own colour."""
    row = prior_row(5, prior=[0.1, 0.2, 0.3, 0.1, 0.3])
    one = SimpleNamespace(name="a", uses={"hidden": torch.tensor([0.2, 0.5, 0.3])})
    two = SimpleNamespace(
        name="b",
        uses={"hidden": torch.tensor([0.1, 0.1, 0.8]), "attention": torch.tensor([1.0, 0.0, 0.0])},
    )
    axes = Figure().add_subplot()
    alt = sample_page.plot_use(axes, row, [one, two], "hidden")
    steps = [patch.get_data() for patch in axes.patches]
    values = [[0.3, 0.4, 0.3], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]  # P, then the models
    np.testing.assert_allclose([np.array(data.values) for data in steps], values, atol=1e-6)
    assert all(data.edges.tolist() == [-0.5, 1.5, 3.5, 4.5] for data in steps)
    assert alt == "a: 0.200, 0.500, 0.300; b: 0.100, 0.100, 0.800"
    axes = Figure().add_subplot()
    sample_page.plot_use(axes, row, [one, two], "attention")
    assert to_hex(axes.patches[1].get_edgecolor()) == plots.LINES[1].lower()


def over(share, grey):
    """The heat map's colour: magma, three quarters, over a grey thumbnail."""
    return 0.75 * 255 * np.array(matplotlib.colormaps["magma"](float(share))[:3]) + 0.25 * grey


def test_maps_lie_at_their_slots():
    """Six frames, three slots: frames 0, 2, 4; each row on its own scale from least to most."""
    row = prior_row(6)
    frames = plain(*(40 * place for place in range(6)))

    def made(name, **maps):
        maps = {score: torch.tensor(own).view(3, 1, 1) for score, own in maps.items()}
        return sample_page.Answer(name, "", [], {"hidden": torch.ones(3) / 3}, {}, maps)

    answers = [
        made("one", hidden=[0.0, 1.0, 4.0], attention=[9.0, 1.0, 5.0]),
        made("two", hidden=[8.0, 2.0, 5.0]),
    ]
    arguments = SimpleNamespace(hidden_layer=-1, attention_layer=2, question="q?")
    figure, alt = sample_page.draw_maps(arguments, row, frames, answers)
    names = [axes.get_ylabel() for axes in figure.axes]
    assert names == [
        "frame",
        "the paper's score\none",
        "the paper's score\ntwo",
        "attention, layer 2\none",
    ]
    labels = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
    assert labels == ["slot 1\n0.0 s", "slot 2\n1.0 s", "slot 3\n2.0 s"]
    wanted = [[[80 * slot] * 3 for slot in range(3)]]
    for shares in ((0, 1 / 4, 1), (1, 0, 1 / 2), (1, 0, 1 / 2)):
        wanted.append([over(share, 80 * slot) for slot, share in enumerate(shares)])
    for axes, colours in zip(figure.axes, wanted, strict=True):
        film = np.asarray(axes.images[0].get_array(), float)
        middles = [film[4, 20 * slot + 10] for slot in range(3)]  # 16 pixels and 4 white ones
        np.testing.assert_allclose(middles, colours, atol=2)
    assert "3 slots" in alt
