"""Drawn matplotlib artists of the pages of visualize.py against values derived by hand."""

import json

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from common import plots, run_page, sample_page
from common.data import Prior

NAN = float("nan")


def drawn(plot, *rest):
    """-> axes on which plot(axes, *rest) has drawn."""
    axes = Figure().add_subplot()
    plot(axes, *rest)
    return axes


def pixels_of(figure):
    """Lay a figure out and draw it -> (height, width, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def plain(*colours, size=(9, 16)):
    """Pictures of one colour each, (h, w, 3)."""
    return [np.full((*size, 3), colour, np.uint8) for colour in colours]


def band_ends(axes, places):
    """Lowest and highest value of a band at each place."""
    corners = axes.collections[0].get_paths()[0].vertices
    return [sorted(set(corners[corners[:, 0] == place, 1])) for place in places]


def test_heading_and_legend():
    """Names in their colours, also with an underscore; nothing stands on something else."""
    heading = "A long question about a clip? " * 6
    figure = plots.new_figure(8, 4, heading, ["text", "_one"], "A note. " * 40)
    axes = figure.subplots()
    axes.plot([0, 1])
    pixels_of(figure)
    (legend,) = figure.legends
    assert [entry.get_text().strip() for entry in legend.get_texts()] == ["text", "_one"]
    assert [line.get_color() for line in legend.get_lines()] == plots.COLOURS[:2]
    assert legend.get_title().get_text().split() == heading.split()
    assert heading[:20] in figure.get_label() and "A note." in figure.get_label()
    note = next(text for text in figure.texts if text.get_text().startswith("A note."))
    boxes = [part.get_window_extent() for part in (legend, note)] + [axes.get_tightbbox()]
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1


def test_long_labels_are_whole():
    """Wrapped between words, a path where it must be; inside the figure, apart from the charts."""
    names = ["λ = 3, attention of layer 1, seeds 0, 1 and 2 of a run", "runs/" * 12 + "grpo"]
    figure = plots.new_figure(8, 4, "Training dynamics", names, "A note.")
    axes = figure.subplots()
    pixels_of(figure)
    (legend,) = figure.legends
    shown = [entry.get_text().strip() for entry in legend.get_texts()]
    assert " ".join(shown[0].split()) == names[0] and "".join(shown[1].split()) == names[1]
    boxes = [legend.get_window_extent(), axes.get_tightbbox()]
    assert not boxes[0].overlaps(boxes[1])
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


# ---------------------------------------------------------------------------------------- run page


def run_of(values, first=0):
    """A run as read_run() gives it."""
    return {("grpo", step): {"loss/kl": value} for step, value in enumerate(values, first)}, {}


def metric_axes(groups):
    return drawn(run_page.plot_metric, "loss/kl", groups)


def test_gaps_are_counted():
    """Steps 10 to 15; the third, fifth and last are not numbers; windows of three."""
    axes = metric_axes({"x": [run_of([1.0, 2.0, NAN, 6.0, -float("inf"), float("inf")], 10)]})
    dots, line = axes.lines
    assert axes.get_title("left") == "loss/kl, 3 not a number"
    assert list(dots.get_xdata()) == list(line.get_xdata()) == [10, 11, 12, 13, 14, 15]
    np.testing.assert_equal(dots.get_ydata(), [1, 2, NAN, 6, NAN, NAN])
    np.testing.assert_equal(line.get_ydata(), [1.5, 1.5, NAN, 6, NAN, NAN])
    # The fourth stands alone: no line shows it, its dot does.
    assert dots.get_marker() == "." and dots.get_alpha() < 1


def test_groups_have_their_colours_and_a_band():
    axes = metric_axes({"x": [run_of([NAN, NAN, NAN])], "y": [run_of([5.0, 3.0, 4.0])]})
    assert [(line.get_marker(), line.get_color()) for line in axes.lines] == [
        (".", plots.COLOURS[0]),
        ("None", plots.COLOURS[0]),
        (".", plots.COLOURS[1]),
        ("None", plots.COLOURS[1]),
    ]
    assert axes.lines[3].get_ydata().tolist() == [5, 3, 4]
    assert axes.get_ylim()[0] > 2 and axes.get_title("left") == "loss/kl, 3 not a number"
    axes = metric_axes({"x": [run_of([1.0, 2.0, 3.0]), run_of([5.0, 4.0, 9.0])]})
    assert band_ends(axes, range(3)) == [[1, 5], [2, 4], [3, 9]]
    *dots, line = axes.lines
    assert [list(run.get_ydata()) for run in dots] == [[1, 2, 3], [5, 4, 9]]
    assert line.get_ydata().tolist() == [3, 3, 6] and axes.get_title("left") == "loss/kl"


def test_both_scores_have_one_scale(tmp_path, monkeypatch):
    record = {"stage": "grpo", "step": 0, "loss/kl": 9.0, "reward/new": 1.0}
    record |= {"consensus/score": 0.5, "consensus/paper_score": 0.1, "unknown": 3.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    monkeypatch.setattr(run_page, "write_page", lambda *arguments: arguments[3][""])
    figure = run_page.run_report([tmp_path])
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["consensus/score", "consensus/paper_score", "loss/kl", "reward/new"]
    limits = [axes.get_ylim() for axes in figure.axes]
    assert limits[0] == limits[1] and limits[0][0] < 0.1 and 0.5 < limits[0][1] < limits[2][0]


# ------------------------------------------------------------------------------------------- prior


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
    figure, (more,) = plots.prior_figure(row, frames, more=[1])
    pixels = pixels_of(figure)
    film, scene, semantic, prior, last = figure.axes
    assert more is last and figure.legends[0].get_title().get_text() == "q?"
    height, width = size
    for place in range(12):
        centre = prior.transData.transform((place, 0))[0]
        middle = (film.bbox.y0 + film.bbox.y1) / 2
        colour = pixels[len(pixels) - round(middle), round(centre)]
        np.testing.assert_allclose(colour, [20 * place, 0, 255 - place], atol=3)
    assert film.bbox.height * 12 / film.bbox.width == pytest.approx(height / width, rel=0.02)
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
    assert [label.get_text() for label in last.get_xticklabels()][:3] == ["0.0 s", "0.5 s", "1.0 s"]


def test_two_frames_without_scores():
    """Room for eight frames, no empty charts."""
    row = prior_row(2, scene=[0], semantic=[], scene_scores=[], semantic_scores=[])
    figure, more = plots.prior_figure(row, plain(0, 100))
    assert [axes.get_ylabel() for axes in figure.axes] == ["", "P"] and more == []
    assert figure.axes[0].get_xlim() == (-0.5, 7.5)


def test_prior_of_many_frames_can_be_drawn():
    """300 frames: the picture is at most 60 inches wide, and the times do not overlap."""
    row = prior_row(300, scene=[], semantic=[], scene_scores=[], semantic_scores=[])
    figure, _ = plots.prior_figure(row, plain(*[0] * 300))
    pixels_of(figure)
    boxes = [label.get_window_extent() for label in figure.axes[-1].get_xticklabels()]
    assert figure.get_figwidth() <= 60 and len(boxes) > 50
    assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:], strict=False))


# ------------------------------------------------------------------------------------------ sample


def made(name, uses, maps):
    uses = {score: torch.tensor(use) for score, use in uses.items()}
    maps = {score: torch.tensor(own).view(3, 1, 1) for score, own in maps.items()}
    return sample_page.Answer(name, "", 1, uses, maps)


def over(share, grey):
    """The heat map's colour: magma, seven tenths, over a grey thumbnail."""
    return 0.7 * 255 * np.array(matplotlib.colormaps["magma"](float(share))[:3]) + 0.3 * grey


def test_use_and_maps_are_the_numbers():
    """Five frames in three slots; only the second model has attention.

    Each model's line is drawn in its own colour, each row of heat maps on its own scale.
    """
    row = prior_row(5, prior=[0.1, 0.2, 0.3, 0.1, 0.3], scene_scores=[], semantic_scores=[])
    frames = plain(*(40 * place for place in range(5)))
    one = made("a", {"hidden": [0.2, 0.5, 0.3]}, {"hidden": [0.0, 1.0, 4.0]})
    uses = {"hidden": [0.1, 0.1, 0.8], "attention": [1.0, 0.0, 0.0]}
    two = made("b", uses, {"hidden": [8.0, 2.0, 5.0], "attention": [9.0, 1.0, 5.0]})
    figure = sample_page.draw_answers(row, frames, [one, two])
    names = [axes.get_ylabel() for axes in figure.axes]
    assert names == ["", "P", "hidden", "a", "b", "attention", "a", "b"]
    hidden, first, second, attention, empty, third = figure.axes[2:]
    steps = [patch.get_data() for patch in hidden.patches]
    values = [[0.3, 0.4, 0.3], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]  # P, then the models
    np.testing.assert_allclose([np.array(data.values) for data in steps], values, atol=1e-6)
    assert all(list(data.edges) == [-0.5, 1.5, 3.5, 4.5] for data in steps)
    assert to_hex(attention.patches[1].get_edgecolor()) == plots.COLOURS[1].lower()
    assert list(hidden.lines[0].get_ydata()) == [1 / 3, 1 / 3] and not empty.images
    pixels = pixels_of(figure)
    for axes, shares in (
        (first, (0, 1 / 4, 1)),
        (second, (1, 0, 1 / 2)),
        (third, (1, 0, 1 / 2)),
    ):
        for place in range(5):
            x, y = axes.transData.transform((place, axes.get_ylim()[1] / 2))
            colour = pixels[len(pixels) - round(y), round(x)]
            np.testing.assert_allclose(colour, over(shares[place // 2], 40 * place), atol=3)
