"""visualize.py enrichment and prior: their numbers by hand, the pages' numbers recomputed, bad input gets a sentence."""

import base64
import doctest
import io
import json
import math
import random
import sys

import numpy as np
import pytest
from PIL import Image
from test_visualize import Page

import visualize
from common import figures, scores
from common.media import decode_frames


def command(monkeypatch, capsys, *words):
    """visualize.py in this process -> exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, words)])
    status = 0
    try:
        visualize.main()
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def refused(monkeypatch, capsys, *words):
    """The one sentence of a command with bad input."""
    status, out, err = command(monkeypatch, capsys, *words)
    assert (
        (status, out) == (2, "")
        and err.startswith("visualize.py: error: ")
        and err.count("\n") == 1
    )
    return err


def read(file, figure=""):
    """The page, whose pictures open and come from nowhere else, and its table {row name: cells}; PNG and SVG lie beside it."""
    page = Page(file.read_text(encoding="utf-8"))
    assert page.sources and all(
        source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
        for source in page.sources
    )
    for source in page.sources:
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))).load()
    assert all(image["alt"] for image in page.images)
    picture = file.with_name(f"{file.stem}{figure}.png")
    assert len(Image.open(picture).convert("RGB").getcolors(1 << 24)) > 20
    assert picture.with_suffix(".svg").read_text().rstrip().endswith("</svg>")
    return page, {row[0]: row[1:] for row in page.rows}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_doctests():
    for module in (figures, scores):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed


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


def test_numbers_of_events_by_hand():
    first = answer(
        10, 4, [(0, 1), (2, 0), (7, 3), (9, 1)], [1, 3]
    )  # three of four events on half of the slots
    second = answer(3, 5, [(1, 4), (2, 4)], [4], correct=False, name="b")  # all on a fifth
    consensus, others = figures.sides([first, second])
    assert consensus == pytest.approx([1.5, 5]) and others == pytest.approx([0.5, 0])
    hits, events, chance = figures.by_position(
        [first, second], 2
    )  # of three tokens the middle one lies in the second half
    assert hits.tolist() == [[1, 2], [0, 2]] and events.tolist() == [[2, 2], [0, 2]]
    np.testing.assert_allclose(chance, [[1, 1], [0, 0.4]])
    assert figures.by_position([first], 10)[1].tolist() == [[1, 0, 1, 0, 0, 0, 0, 1, 0, 1]]
    groups = figures.groups_of(figures.Events("x", [first, second], 0, 0, ""))
    assert {name: values.tolist() for name, values in groups.items()} == {
        "consensus": [1.5, 5],
        "others": [0.5, 0],
        "if right": [1.5],
        "if wrong": [5],
    }
    before = figures.Events(
        "y",
        [answer(10, 4, [(5, 1), (5, 2)], [1, 3]), answer(4, 4, [(0, 0)], [0], name="c")],
        0,
        0,
        "",
    )
    assert figures.changes(before, figures.Events("x", [first, second], 0, 0, "")).tolist() == [
        0.5
    ]  # of the one they share: 1.5 - 1


def test_pooled_ratio_and_its_interval():
    ratio, low, high = figures.pooled(
        np.array([[1, 0, 2], [3, 0, 2]]), np.array([[0.25, 0, 1], [2, 0, 1]])
    )
    np.testing.assert_allclose(ratio, [4 / 2.25, np.nan, 2])  # not the mean of 4 and 1.5
    np.testing.assert_allclose(
        [low, high], [[1.5, np.nan, 2], [4, np.nan, 2]]
    )  # either row twice, a quarter of the time each
    assert np.isnan(
        figures.pooled(np.array([[1]]), np.array([[2]]))[1:]
    ).all()  # a single row has no interval
    assert figures.told(np.array([1.5])) == "1.500, n = 1" and figures.told(np.array([])) == "–"
    assert figures.told(np.array([1.0, 1.0]), "+") == "+1.000 (+1.000 to +1.000), n = 2"


def prediction(name, rng, slots=8, consensus=(2, 5), tokens=None, right=True, bonus=0.0):
    """A line of predictions, as evaluate.py writes it, and its scores (L, t)."""
    tokens = tokens or rng.randrange(30, 60)
    each = np.array(
        [
            [rng.random() + bonus * (slot in consensus) for slot in range(slots)]
            for _ in range(tokens)
        ]
    )
    strongest = np.argsort(-each.ravel())[: max(1, round(0.05 * each.size))]
    use = {
        "slots": [1 / slots] * slots,
        "interval": [0, 1],
        "evidence": None,
        "chance": None,
        "consensus": 0.1,
        "enrichment": 1.0,
        "events": sorted(strongest.tolist()),
        "tokens": tokens,
        "consensus_slots": list(consensus),
    }
    return {
        "problem_id": name,
        "problem": "Which?",
        "problem_type": "multiple choice",
        "options": ["A. x", "B. y"],
        "solution": "A",
        "output": f"<think>.</think><answer>{'A' if right else 'B'}</answer>",
        "error": None,
        "frame_use": use,
        "settings": {"frame_use": "attention", "frame_use_layer": 2},
    }, each


def enrichment_of(row, each):
    """Event enrichment by loops over tokens and slots."""
    bound, chosen = (
        np.sort(each.ravel())[-max(1, round(0.05 * each.size))],
        row["frame_use"]["consensus_slots"],
    )
    found = [slot in chosen for token in each for slot, score in enumerate(token) if score >= bound]
    return np.mean(found) / (len(chosen) / each.shape[1])


def test_enrichment_page(tmp_path, monkeypatch, capsys, chromium):
    rng, made = random.Random(0), {}
    for file, bonus in (("before", 0.0), ("after", 0.2)):
        made[file] = [
            prediction(f"q{index}", rng, right=index % 3 > 0, bonus=bonus) for index in range(12)
        ]
        others = [
            prediction("all", rng, consensus=range(8))[0],
            prediction("none", rng, consensus=())[0],
            {**prediction("image", rng)[0], "frame_use": None},
        ]
        write_lines(
            tmp_path / f"{file}.predictions.jsonl", [*(row for row, _ in made[file]), *others]
        )
    words = [
        "--predictions",
        tmp_path / "before.predictions.jsonl",
        tmp_path / "after.predictions.jsonl",
    ]
    assert command(
        monkeypatch, capsys, "enrichment", *words, "--output", tmp_path / "out/e.html"
    ) == (0, f"{tmp_path}/out/e.html\n", "")
    page, table = read(tmp_path / "out/e.html")
    assert (
        len(page.images) == 5
        and len(page.sources) == 10
        and table["measure"] == ["before", "after"]
    )  # light and dark
    assert (
        table["answers counted"] == ["12", "12"]
        and table["frame use by"] == ["attention, layer 2"] * 2
    )
    assert (
        table["not counted: all or no slots are consensus slots"] == ["2", "2"]
        and "consensus slots: 4 answers." in page.words
    )
    assert table["without events: no video of two slots, no prior, or no answer"] == ["1", "1"]
    values = {file: [enrichment_of(*pair) for pair in made[file]] for file in made}
    for column, (file, numbers) in enumerate(values.items()):
        low, high = scores.paired_bootstrap(numbers, samples=2000)
        told = f"{np.mean(numbers):.3f} ({low:.3f} to {high:.3f}), n = 12"
        assert (
            table["enrichment of the consensus slots"][column] == told
            and f"{file}: consensus slots {told}" in page.images[0]["alt"]
        )
        rest = [
            (1 - number / 4) / 0.75 for number in numbers
        ]  # a quarter of the slots are consensus slots
        assert table["… of the other slots"][column].startswith(f"{np.mean(rest):.3f} (")
        wrong = [number for index, number in enumerate(numbers) if index % 3 == 0]
        assert table["… of the consensus slots, wrong answers"][column].startswith(
            f"{np.mean(wrong):.3f} ("
        )
        assert table["… of the consensus slots, right answers"][column].endswith(", n = 8")
        assert table["… of the consensus slots, median"][column] == f"{np.median(numbers):.3f}"
    change = np.mean(values["after"]) - np.mean(values["before"])
    assert change > 0.5 and table["consensus slots, change from before on the same questions"][
        1
    ].startswith(f"{change:+.3f} (+")
    assert (
        f"visualize.py enrichment --predictions {words[1]}" in page.words
        and "Made by" in page.words
    )
    assert "enrichment of the consensus slots" in chromium(tmp_path / "out/e.html")


def test_one_answer_and_odd_labels(tmp_path, monkeypatch, capsys):
    row = prediction("q", random.Random(0), tokens=4, right=False)[0]
    (tmp_path / "report.json").write_text(
        json.dumps({"results": [row], "settings": {"frame_use": "hidden", "frame_use_layer": -1}})
    )
    label = '_<b>"λ & $3$'
    words = [
        "--predictions",
        tmp_path / "report.json",
        "--label",
        label,
        "--output",
        tmp_path / "e.html",
    ]
    assert command(monkeypatch, capsys, "enrichment", *words)[0] == 0
    page, table = read(tmp_path / "e.html")
    assert f"n = 1, so no interval: {label}." in page.words and table["measure"] == [label]
    assert table["frame use by"] == ["hidden, layer -1"]
    assert (
        table["enrichment of the consensus slots"][0].endswith(", n = 1")
        and "(" not in table["enrichment of the consensus slots"][0]
    )
    assert (
        table["… of the consensus slots, right answers"] == ["–"]
        and "In 4 equal parts" in page.images[1]["alt"]
    )  # four tokens


def test_predictions_that_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    good, _ = prediction("q", random.Random(0))

    def told(use, *more):
        rows = [{**good, "frame_use": None if use is None else {**good["frame_use"], **use}}]
        return refused(
            monkeypatch,
            capsys,
            "enrichment",
            "--predictions",
            write_lines(tmp_path / "p.jsonl", rows),
            *more,
        )

    assert "nowhere.jsonl not found" in refused(
        monkeypatch, capsys, "enrichment", "--predictions", tmp_path / "nowhere.jsonl"
    )
    empty = write_lines(tmp_path / "empty.jsonl", [])
    assert "holds no predictions" in refused(
        monkeypatch, capsys, "enrichment", "--predictions", empty
    )
    assert "has no events; evaluate.py --frame_use attention --priors FILE stores them" in told(
        None
    )
    old = {
        name: value
        for name, value in good["frame_use"].items()
        if name not in ("events", "tokens", "consensus_slots")
    }
    rows = [{**good, "frame_use": old}]
    assert "has no events" in refused(
        monkeypatch, capsys, "enrichment", "--predictions", write_lines(tmp_path / "p.jsonl", rows)
    )
    assert "the frame_use of q has slots that are not finite numbers" in told(
        {"slots": [math.nan] * 8}
    )
    assert "events that are not ascending indices below 80" in told({"tokens": 10})
    assert "events that are not ascending indices" in told(
        {"events": [3, 3]}
    ) and "no event" in told({"events": []})
    assert "consensus_slots that are not ascending indices below 8" in told(
        {"consensus_slots": [8]}
    )
    assert "tokens that are no number above 0" in told({"tokens": None})
    assert "no answer that counts: the consensus slots of 1 are all or none" in told(
        {"consensus_slots": list(range(8))}
    )
    assert "2 labels for 1 prediction files" in told({}, "--label", "a", "--label", "b")
    assert "must end in .html" in told({}, "--output", "e.png")
    assert "given twice" in told({}, tmp_path / "p.jsonl")


# -------------------------------------------------------------------------------------------------------------------- prior


def test_numbers_of_priors_by_hand():
    assert figures.effective_share([0.25] * 4) == pytest.approx(1) and figures.effective_share(
        [1.0, 0, 0, 0]
    ) == pytest.approx(0.25)
    assert figures.effective_share([0.5, 0.5, 0, 0]) == pytest.approx(0.5)
    row = {"prior": [0.1, 0.2, 0.3, 0.4], "scene": [1, 2], "semantic": [2]}
    assert figures.set_shares(row) == pytest.approx((0.5, 0.3, 0.5))
    assert figures.rank_correlation([1, 2, 3], [10, 30, 20]) == pytest.approx(0.5)
    assert figures.rank_correlation([1, 5, 5, 2], [4, 1, 1, 3]) == pytest.approx(
        -1
    )  # equals share a rank
    assert (
        figures.rank_correlation([], []) is None
        and figures.rank_correlation([1, 2], [0, 0]) is None
    )
    # two of four frames and three of four: 4 equally likely triples, each has one or two of the two
    assert dict(figures.chance_overlaps([(4, 2, 3)])) == pytest.approx({1: 0.5, 2: 0.5})
    assert dict(figures.chance_overlaps([(4, 1, 2), (8, 1, 2)])) == pytest.approx(
        {0: (0.5 + 0.75) / 2, 1: (0.5 + 0.25) / 2}
    )
    assert figures.overlap_ratio([(1, 4, 1, 2), (0, 8, 1, 2)])[0] == pytest.approx(1 / (0.5 + 0.25))
    assert figures.binned_mass({2: [1, np.array([0.7, 0.3])]}, 4) == pytest.approx(
        [0.35, 0.35, 0.15, 0.15]
    )
    mixed = {
        2: [1, np.array([0.7, 0.3])],
        3: [2, np.array([0.0, 0.0, 2.0])],
    }  # three frames in two parts: the middle one is divided
    assert figures.binned_mass(mixed, 2) == pytest.approx([0.7 / 3, 2.3 / 3])
    assert figures.binned_mass({3: [1, np.array([0.2, 0.4, 0.4])]}, 2) == pytest.approx([0.4, 0.6])


def prior_row(name, media, scene, semantic, **more):
    weights = np.array([0.1 + (place in scene) + 3 * (place in semantic) for place in range(4)])
    return {
        "problem_id": name,
        "question": f"What <b> {name}?",
        "media": media,
        "frames": [0, 21, 42, 63],
        "times": [0.0, 5.25, 10.5, 15.75],
        "scene_scores": [0.0, 0.4, 0.1, 0.3],
        "semantic_scores": [0.1, 0.3, 0.2, 0.4],
        "settings": {"frames": 4, "scene": "hsv"},
        "scene": scene,
        "semantic": semantic,
        "prior": (weights / weights.sum()).tolist(),
        **more,
    }


def made_rows(media):
    """Two rows of videos with both cues, one without a scene, one of a bare file, an image."""
    bare = {
        name: prior_row("bare", media[1], [], [])[name]
        for name in ("problem_id", "frames", "times", "prior", "media")
    }
    image = {**bare, "problem_id": "image", "frames": [0], "times": [0.0], "prior": [1.0]}
    return [
        prior_row("a", media[0], [1, 3], [3]),
        prior_row("b", media[1], [1], [2]),
        prior_row("c", media[0], [], [0]),
        bare,
        image,
    ]


def test_prior_page(toy_folder, tmp_path, monkeypatch, capsys, chromium):
    media = sorted(
        str(file.relative_to(toy_folder)) for file in toy_folder.glob("videos/*_0*.mp4")
    )[:2]
    rows = made_rows(media)
    rows[1]["settings"] = {"frames": 4, "scene": "content"}
    words = [
        "--priors",
        write_lines(tmp_path / "p.jsonl", rows),
        "--output",
        tmp_path / "out/prior.html",
    ]
    assert command(monkeypatch, capsys, "prior", *words, "--media_root", toy_folder) == (
        0,
        f"{tmp_path}/out/prior.html\n",
        "",
    )
    page, table = read(tmp_path / "out/prior.html")
    assert table["rows of videos"] == ["4"] and table["rows of one frame (images), not drawn"] == [
        "1"
    ]
    assert table["frames of a video, K"] == ["4"]
    videos = rows[:4]
    entropies = [-sum(p * math.log(p) for p in row["prior"]) for row in videos]
    assert table["effective frames, exp(entropy) / K, mean"] == [
        f"{np.mean(np.exp(entropies)) / 4:.3f}"
    ]
    # weights 0.1 1.1 0.1 4.1 | 0.1 1.1 3.1 0.1 | 3.1 0.1 0.1 0.1; the bare row has no sets
    assert table["mass of P on the scene set, mean"] == [
        f"{(5.2 / 5.4 + 1.1 / 4.4 + 0) / 3:.3f}, n = 3"
    ]
    assert table["mass of P on the semantic set, mean"] == [
        f"{(4.1 / 5.4 + 3.1 / 4.4 + 3.1 / 3.4) / 3:.3f}, n = 3"
    ]
    assert table["mass of P on neither, mean"] == [
        f"{(0.2 / 5.4 + 0.2 / 4.4 + 0.3 / 3.4) / 3:.3f}, n = 3"
    ]
    assert table["rows whose cues name a frame in common"] == ["0.500, n = 2"]
    assert table["frames that both cues name, over chance"][0].startswith(
        f"{1 / (2 / 4 + 1 / 4):.3f} ("
    )
    # ranks 1 4 2 3 and 1 3 2 4 differ by 0 1 0 1: 1 - 6 * 2 / (4 * 15)
    assert table["rank correlation of the cues' scores, mean"] == ["0.800, n = 3"]
    assert table["--scene"] == ["hsv (2 rows); content (1 rows)"] and table["--frames"] == ["4"]
    assert (
        "made with several settings: scene." in page.words
        and "without both sets: 1; with an empty one" in page.words
    )
    mean = np.mean([row["prior"] for row in videos], axis=0)
    assert (
        f"Mean P in 4 parts: {', '.join(f'{value:.3f}' for value in mean)}; uniform 0.250."
        in page.images[0]["alt"]
    )
    assert (
        "0: 0.500 (0.625), 1: 0.500 (0.375). n = 2." in page.images[3]["alt"]
    )  # 1 - 2/4 and 1 - 1/4 by chance
    # the sheet: all rows, each frame where it belongs
    pictures = [image for image in page.images if image["src"].startswith("data:image/jpeg")]
    assert len(pictures) == 4 * 4 and len(page.images) == 5 + 16
    assert (
        pictures[3]["alt"] == f"Frame at 15.8 s, P {4.1 / 5.4:.3f}, named by scene and semantic"
        and "named" not in pictures[0]["alt"]
    )
    truth, _ = decode_frames(str(toy_folder / media[0]), rows[0]["frames"])
    for place, image in enumerate(pictures[:4]):
        shown = np.asarray(
            Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))), float
        )
        errors = [np.abs(shown - frame).mean() for frame in truth]
        assert int(np.argmin(errors)) == place and min(errors) < 10
    read(tmp_path / "out/prior.html", "-sheet")
    assert "rows, drawn at random" in chromium(tmp_path / "out/prior.html")


def test_photographs_leave_the_lines_their_colours(tmp_path):
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 255, (20, 90, 160, 3), dtype=np.uint8))  # 20 frames: two strips
    row = prior_row(
        "a", "x.mp4", [1, 3], [3], times=[float(place) for place in range(20)], prior=[0.05] * 20
    )
    panels = figures.strip_panels([(row, pictures)], 12)
    sheet = figures.draw(panels, figures.SHEETS["light"], "x", columns=1, width=12)[0]
    figures.write_report(tmp_path / "x.html", "x", "", "x", {"-sheet": sheet})
    colours = {
        colour
        for _, colour in Image.open(tmp_path / "x-sheet.png").convert("RGB").getcolors(1 << 24)
    }
    assert (
        len(panels) == 2
        and {(0, 0x9E, 0x73), (0xCC, 0x79, 0xA7)} <= colours
        and len(colours) > 1000
    )


def test_rows_are_drawn_by_the_seed(tmp_path):
    path = write_lines(
        tmp_path / "p.jsonl", [prior_row(str(index), "x.mp4", [1], [2]) for index in range(40)]
    )
    drawn = [
        [row["problem_id"] for row in figures.summarise_priors(path, 3, seed).chosen]
        for seed in range(200)
    ]
    assert (
        drawn[0] == [row["problem_id"] for row in figures.summarise_priors(path, 3, 0).chosen]
        and len(set(map(tuple, drawn))) > 100
    )
    times = np.bincount([int(name) for names in drawn for name in names], minlength=40)
    assert (
        all(len(set(names)) == 3 for names in drawn) and times.min() > 3 and times.max() < 35
    )  # 15 expected


def test_prior_page_without_media(toy_folder, tmp_path, monkeypatch, capsys):
    rows = made_rows(["videos/gone.mp4", "../../etc/x.mp4"])
    words = [
        "--priors",
        write_lines(tmp_path / "p.jsonl", rows),
        "--output",
        tmp_path / "prior.html",
    ]
    status, _, err = command(monkeypatch, capsys, "prior", *words)
    assert (
        status == 0
        and err.count("\n") == 1
        and f"4 of 4 videos of the sheet cannot be shown (--media_root {tmp_path})" in err
    )
    assert err.rstrip().endswith("videos/gone.mp4: no such file")
    page, _ = read(tmp_path / "prior.html")
    assert len(page.images) == 5 and "4 of 4 videos of the sheet cannot be shown" in page.words
    assert not (tmp_path / "prior-sheet.png").exists()
    video = sorted(toy_folder.glob("videos/*_0*.mp4"))[0]
    strip = prior_row("a", video.name, [1], [2], times=[0.0, 1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="at other times"):
        figures.read_strip(strip, video.parent)
    with pytest.raises(ValueError, match="outside the media root"):
        figures.read_strip(rows[1], tmp_path)


def test_priors_that_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    def told(row, *more):
        path = write_lines(tmp_path / "p.jsonl", [row] if row else [])
        return refused(monkeypatch, capsys, "prior", "--priors", path, *more)

    good = prior_row("a", "x.mp4", [1], [2])
    assert "nowhere.jsonl not found" in refused(
        monkeypatch, capsys, "prior", "--priors", tmp_path / "nowhere.jsonl"
    )
    assert "p.jsonl is empty" in told(None)
    image = {"problem_id": "i", "frames": [0], "times": [0.0], "prior": [1.0]}
    assert "no row of a video, only 1 of images" in told(image)
    assert "line 1 has a prior that is none" in told({**good, "prior": [0.5] * 4})
    assert "the row of a has a scene set that is not positions among its 4 frames" in told(
        {**good, "scene": [4]}
    )
    assert "semantic_scores that are not 4 finite numbers" in told(
        {**good, "semantic_scores": [0.1, math.nan, 0.2, 0.3]}
    )
    assert "scene_scores that are not 4 finite numbers" in told({**good, "scene_scores": [0.1]})
    assert "--items must be at least 0" in told(
        good, "--items", "-1"
    ) and "must end in .html" in told(good, "--output", "x.png")
