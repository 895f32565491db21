"""visualize.py run, enrichment and prior, in this process: the pages' numbers are the files'."""

import base64
import io
import json
import math
import random
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import visualize
from common import enrichment_page, plots, prior_page, run_page, scores
from common.data import Prior
from common.media import decode_frames

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that tags nest; collects pictures, table rows and text."""

    def __init__(self, text):
        super().__init__()
        self.stack = []
        self.images = []
        self.rows = []
        self.words = ""
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert "href" not in attributes and "srcset" not in attributes
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "img":
            self.images.append(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words += data
        if {"th", "td"} & set(self.stack):
            self.rows[-1][-1] += data


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
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("visualize.py: error: ")
    return err


def read(file, figure=""):
    """The page, and its table {row name: cells}.

    Its pictures open and come from nowhere else; PNG and SVG lie beside it.
    """
    page = Page(file.read_text(encoding="utf-8"))
    for image in page.images:
        kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", image["src"]).groups()
        picture = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
        assert picture.format.lower() == kind
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20  # not empty
        assert image["alt"] and int(image["width"]) > 250
    picture = file.with_name(f"{file.stem}{figure}.png")
    assert Image.open(picture).width >= 640
    assert picture.with_suffix(".svg").read_text().rstrip().endswith("</svg>")
    return page, {row[0]: row[1:] for row in page.rows}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --------------------------------------------------------------------------------------------- run


def write_run(folder, seed=0, steps=12, change=lambda record: record, result=True):
    """A run as train.py writes it. -> its result."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    rows = [{"stage": "sft", "step": step, "loss/sft": 3 / (1 + step)} for step in range(steps)]
    names = [name for name, metric in run_page.METRICS.items() if metric.stage == "grpo"]
    for step in range(steps):
        values = {name: rng.random() for name in names}
        rows.append(change({"stage": "grpo", "step": step, **values}))
    write_lines(folder / "metrics.jsonl", rows)
    if not result:
        return None
    names = "greedy greedy/colour greedy/conflict consensus evidence_use evidence_chance length"
    result = {}
    for part in ("before", "after"):
        result[part] = {name: rng.random() for name in names.split()}
    (folder / "result.json").write_text(json.dumps(result))
    return result


def test_three_runs_two_arms(tmp_path, monkeypatch, capsys, chromium):
    monkeypatch.chdir(tmp_path)
    folders = ["a0", "a1", 'b <&> "$x$"']
    results = [write_run(tmp_path / name, seed) for seed, name in enumerate(folders)]
    label = '_<b>"λ & $3$'
    words = [*folders, "--label", "plain", "--label", "plain", "--label", label]
    done = command(monkeypatch, capsys, "run", *words, "--output", "out/compare.html")
    assert done == (0, "out/compare.html\n", "")
    page, table = read(tmp_path / "out/compare.html")
    assert len(page.images) == len(run_page.METRICS)
    assert page.rows[0] == ["measure", "plain (2 runs)", label]
    assert list(table)[1:4] == [
        "Held-out accuracy, greedy",
        "Held-out accuracy, greedy: colour",
        "Held-out accuracy, greedy: asked and salient evidence differ",
    ]
    for name, words in (
        ("greedy", "Held-out accuracy, greedy"),
        ("evidence_use", "Evidence use, the run's score"),
        ("length", "Completion length, tokens"),
    ):
        parts = []
        for part in ("before", "after"):
            low, high = sorted(result[part][name] for result in results[:2])
            parts.append(f"{(low + high) / 2:.3f} ({low:.3f} to {high:.3f})")
        alone = [f"{results[2][part][name]:.3f}" for part in ("before", "after")]
        assert table[words] == [" → ".join(parts), " → ".join(alone)]
    assert "--output out/compare.html" in page.words and "Band:" in page.words
    assert page.words.count(label) >= 2 and f"{label}: " in page.images[0]["alt"]
    assert "Held-out questions" in chromium(tmp_path / "out/compare.html")


def test_train_writes_the_report(first_run, chromium):
    output, _ = first_run
    words = chromium(output / "report.html")
    after = json.loads((output / "result.json").read_text())["after"]["greedy"]
    assert f"→ {after:.3f}" in words and f"# {output}: train.py" in words
    assert f"python visualize.py run {output}" in words
    assert (output / "report.png").is_file() and (output / "report.svg").is_file()


def test_odd_values_and_a_new_term(tmp_path, monkeypatch, capsys):
    """NaN, a gap, a line that is still being written, a zero term, a term of no list."""
    monkeypatch.chdir(tmp_path)

    def change(record):
        values = {
            "reward/accuracy": math.nan if 3 <= record["step"] < 6 else 0.5,
            "consensus/paper_score": math.nan,
            "loss/kl": math.inf,
            "reward/length": 0.0,
            "reward/novelty": 0.25,
        }
        return {**record, **values}

    write_run(tmp_path / "a", change=change, result=False)
    with open(tmp_path / "a/metrics.jsonl", "a") as file:
        file.write('{"stage": "grpo", "st')
    assert command(monkeypatch, capsys, "run", "a") == (0, "a/report.html\n", "")
    page, table = read(tmp_path / "a/report.html")
    assert len(page.images) == len(run_page.METRICS) and table == {}
    assert "Zero throughout, so not drawn: Reward term: length." in page.words
    assert "not a number" in page.words and "Without result.json yet: a." in page.words
    assert any(
        image["alt"].startswith("Reward term: novelty. reward, running mean. a: 0.25 at step 0")
        for image in page.images
    )


def test_one_step(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", steps=1)
    words = ["run", tmp_path / "a", "--output", tmp_path / "one.html"]
    assert command(monkeypatch, capsys, *words)[0] == 0
    page, _ = read(tmp_path / "one.html")
    line = (tmp_path / "a/metrics.jsonl").read_text().splitlines()[1]
    assert f"a: {json.loads(line)['reward/accuracy']:.3g} at step 0" in page.images[0]["alt"]


def test_series_by_hand():
    first = {0: {"x": 1.0}, 1: {"x": 3.0}, 3: {"x": math.nan}}
    second = {0: {"x": 2}, 1: {}, 2: {"x": None}}
    runs = [run_page.Run("a", {"grpo": first}, None), run_page.Run("b", {"grpo": second}, None)]
    steps, values, broken = run_page.series(runs, "grpo", "x")
    assert steps.tolist() == [0, 1, 2, 3] and sorted(broken) == [2, 3]
    nan = math.nan
    np.testing.assert_equal(values, [[1, 3, nan, nan], [2, nan, nan, nan]])
    # Three steps or fewer: a window of one; four: a window of three.
    np.testing.assert_allclose(run_page.running_mean(np.array([0.0, 3.0, nan])), [0, 3, nan])
    means = run_page.running_mean(np.array([0.0, 3.0, nan, 6.0]))
    np.testing.assert_allclose(means, [1.5, 1.5, nan, 6.0])


def test_names_are_short_and_different():
    names = plots.short_names(["/x/y/a/output/grpo", "/x/y/b/output/grpo"])
    assert names == ["a/output/grpo", "b/output/grpo"]
    assert plots.short_names(["runs/first", "runs/other"]) == ["first", "other"]
    assert plots.short_names(["a", "b"]) == ["a", "b"]
    assert plots.short_names(["/long/way/o-0", "/long/way/o-1/"]) == ["o-0", "o-1"]
    assert plots.shorten("Qwen2.5-VL-7B-seed0", 9) == "Qwen…eed0"
    assert plots.shorten("short", 9) == "short"


def test_runs_that_cannot_be_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "good")
    step = '{"stage": "grpo", "step": 0}\n'
    for name, text in (("empty", ""), ("broken", f"{step}nonsense\n"), ("other", step)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    (tmp_path / "none").mkdir()
    null = '{"before": {"greedy": 0.5}, "after": {"evidence_chance": null}}'
    for name, text in (("odd", '{"before": 3}'), ("null", null)):
        write_run(tmp_path / name, result=False)
        (tmp_path / name / "result.json").write_text(text)
    for flags, words in (
        (["nowhere"], "nowhere is not a folder"),
        (["none"], "none has no metrics.jsonl"),
        (["empty"], "holds no step yet"),
        (["broken"], "metrics.jsonl line 2 is not a JSON record"),
        (["other"], "none of the metrics that this report draws"),
        (["odd"], "odd/result.json is not the result of a run"),
        (["null"], "null/result.json is not the result of a run"),
        (["good", "good/../good"], "a directory is given twice"),
        (["good", "--label", "a", "--label", "b"], "2 --label for 1 directories"),
        (["good", "--output", "x.png"], "must end in .html"),
        (["good", "--output", "good/result.json/x.html"], "nothing can be written in"),
    ):
        assert words in refused(monkeypatch, capsys, "run", *flags)
    status, _, err = command(monkeypatch, capsys, "run", "good", "--lable", "x")
    assert status == 2 and "unrecognized arguments" in err


# -------------------------------------------------------------------------------------- enrichment


def answer(tokens, slots, pairs, consensus, correct=True, name="a"):
    events = sorted(token * slots + slot for token, slot in pairs)
    return enrichment_page.Answer(name, events, tokens, slots, consensus, correct)


def events(*answers):
    return enrichment_page.Events("x", list(answers), 0, 0, "", 0)


def test_numbers_of_events_by_hand():
    # Three of four events on half of the slots; all on a fifth.
    first = answer(10, 4, [(0, 1), (2, 0), (7, 3), (9, 1)], [1, 3])
    second = answer(3, 5, [(1, 4), (2, 4)], [4], correct=False, name="b")
    # Of three tokens the middle one lies in the second half.
    hits, counts, chance = enrichment_page.by_position([first, second], 2)
    assert hits.tolist() == [[1, 2], [0, 2]] and counts.tolist() == [[2, 2], [0, 2]]
    np.testing.assert_allclose(chance, [[1, 1], [0, 0.4]])
    tenths = enrichment_page.by_position([first], 10)[1].tolist()
    assert tenths == [[1, 0, 1, 0, 0, 0, 0, 1, 0, 1]]
    groups = events(first, second).groups()
    assert {name: values.tolist() for name, values in groups.items()} == {
        "consensus": [1.5, 5],
        "others": [0.5, 0],
        "if right": [1.5],
        "if wrong": [5],
    }
    pair = [answer(10, 4, [(5, 1), (5, 2)], [1, 3]), answer(4, 4, [(0, 0)], [0], name="c")]
    # Of the one question that they share: 1.5 - 1.
    change = enrichment_page.changes(events(*pair), events(first, second))
    assert change.tolist() == [0.5]


def test_pooled_ratio_and_its_interval():
    hits = np.array([[1, 0, 2], [3, 0, 2]])
    chance = np.array([[0.25, 0, 1], [2, 0, 1]])
    ratio, low, high = plots.ratio_interval(hits, chance)
    np.testing.assert_allclose(ratio, [4 / 2.25, np.nan, 2])  # not the mean of 4 and 1.5
    # Either row twice, a quarter of the time each.
    np.testing.assert_allclose([low, high], [[1.5, np.nan, 2], [4, np.nan, 2]])
    single = plots.ratio_interval(np.array([[1]]), np.array([[2]]))
    assert np.isnan(single[1:]).all()
    assert enrichment_page.mean_text(np.array([1.5])) == "1.500, n = 1"
    assert enrichment_page.mean_text(np.array([])) == "–"
    text = enrichment_page.mean_text(np.array([1.0, 1.0]), "+")
    assert text == "+1.000 (+1.000 to +1.000), n = 2"


def prediction(name, rng, slots=8, consensus=(2, 5), tokens=None, right=True, bonus=0.0):
    """A line of predictions, as evaluate.py writes it, and its scores (L, t)."""
    tokens = tokens or rng.randrange(30, 60)
    each = np.array([[rng.random() for _ in range(slots)] for _ in range(tokens)])
    each[:, list(consensus)] += bonus
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
    row = {
        "problem_id": name,
        "problem": "Which?",
        "problem_type": "multiple choice",
        "options": ["A. x", "B. y"],
        "solution": "A",
        "output": f"<think>.</think><answer>{'A' if right else 'B'}</answer>",
        "error": None,
        "frame_use": use,
        "settings": {"frame_use": "attention", "frame_use_layer": 2},
    }
    return row, each


def enrichment_of(row, each):
    """Event enrichment by loops over tokens and slots."""
    bound = np.sort(each.ravel())[-max(1, round(0.05 * each.size))]
    chosen = row["frame_use"]["consensus_slots"]
    hits = []
    for token in each:
        hits += [slot in chosen for slot, score in enumerate(token) if score >= bound]
    return np.mean(hits) / (len(chosen) / each.shape[1])


def test_enrichment_page(tmp_path, monkeypatch, capsys, chromium):
    rng = random.Random(0)
    values = {}
    for file, bonus in (("before", 0.0), ("after", 0.2)):
        made = []
        for index in range(12):
            made.append(prediction(f"q{index}", rng, right=index % 3 > 0, bonus=bonus))
        values[file] = [enrichment_of(*pair) for pair in made]
        others = [
            prediction("all", rng, consensus=range(8))[0],
            prediction("none", rng, consensus=())[0],
            {**prediction("image", rng)[0], "frame_use": None},
        ]
        rows = [row for row, _ in made]
        write_lines(tmp_path / f"{file}.predictions.jsonl", [*rows, *others])
    files = [tmp_path / f"{file}.predictions.jsonl" for file in values]
    words = ["--predictions", *files, "--output", tmp_path / "out/e.html"]
    done = command(monkeypatch, capsys, "enrichment", *words)
    assert done == (0, f"{tmp_path}/out/e.html\n", "")
    page, table = read(tmp_path / "out/e.html")
    assert len(page.images) == 3 and table["measure"] == ["before", "after"]
    assert table["answers counted"] == ["12", "12"]
    assert table["frame use by"] == ["attention, layer 2"] * 2
    assert table["not counted: all or no slots are consensus slots"] == ["2", "2"]
    assert "consensus slots: 4 answers." in page.words
    without = table["without events: no video of two slots, no prior, or no answer"]
    assert without == ["1", "1"]
    for column, (file, numbers) in enumerate(values.items()):
        low, high = scores.paired_bootstrap(numbers, samples=2000)
        text = f"{np.mean(numbers):.3f} ({low:.3f} to {high:.3f}), n = 12"
        assert table["enrichment of the consensus slots"][column] == text
        assert f"{file}: consensus slots {text}" in page.images[0]["alt"]
        # A quarter of the slots are consensus slots.
        rest = np.mean([(1 - number / 4) / 0.75 for number in numbers])
        assert table["… of the other slots"][column].startswith(f"{rest:.3f} (")
        wrong = np.mean(numbers[::3])
        cell = table["… of the consensus slots, wrong answers"][column]
        assert cell.startswith(f"{wrong:.3f} (")
        cell = table["… of the consensus slots, right answers"][column]
        assert cell.endswith(", n = 8")
    change = np.mean(values["after"]) - np.mean(values["before"])
    cell = table["consensus slots, change from before on the same questions"][1]
    assert change > 0.5 and cell.startswith(f"{change:+.3f} (+")
    assert f"visualize.py enrichment --predictions {files[0]}" in page.words
    assert "enrichment of the consensus slots" in chromium(tmp_path / "out/e.html")


def test_one_answer_and_odd_labels(tmp_path, monkeypatch, capsys):
    row = prediction("q", random.Random(0), tokens=4, right=False)[0]
    report = {"results": [row], "settings": {"frame_use": "hidden", "frame_use_layer": -1}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    label = '_<b>"λ & $3$'
    words = ["--predictions", tmp_path / "report.json", "--label", label]
    words += ["--output", tmp_path / "e.html"]
    assert command(monkeypatch, capsys, "enrichment", *words)[0] == 0
    page, table = read(tmp_path / "e.html")
    assert label in page.words and table["measure"] == [label]
    assert table["frame use by"] == ["hidden, layer -1"]
    cell = table["enrichment of the consensus slots"][0]
    assert cell.endswith(", n = 1") and "(" not in cell
    assert table["… of the consensus slots, right answers"] == ["–"]
    assert "In 4 equal parts" in page.images[1]["alt"]  # four tokens


def test_predictions_that_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    good, _ = prediction("q", random.Random(0))
    file = tmp_path / "p.jsonl"

    def error(use, *more):
        row = {**good, "frame_use": use if use is None else {**good["frame_use"], **use}}
        path = write_lines(file, [row])
        return refused(monkeypatch, capsys, "enrichment", "--predictions", path, *more)

    words = ["enrichment", "--predictions"]
    assert "nowhere.jsonl not found" in refused(
        monkeypatch, capsys, *words, tmp_path / "nowhere.jsonl"
    )
    empty = write_lines(tmp_path / "empty.jsonl", [])
    assert "holds no predictions" in refused(monkeypatch, capsys, *words, empty)
    assert "has no events; evaluate.py --frame_use attention --priors FILE" in error(None)
    assert "the frame_use of q is malformed (indices are not ascending below 80)" in error(
        {"tokens": 10}
    )
    assert "indices are not ascending" in error({"events": [3, 3]})
    assert "no event" in error({"events": []})
    assert "indices are not ascending below 8" in error({"consensus_slots": [8]})
    assert "the frame_use of q is malformed" in error({"tokens": None})
    assert "the consensus slots of 1 are all or none" in error({"consensus_slots": list(range(8))})
    assert "2 labels for 1 prediction files" in error({}, "--label", "a", "--label", "b")
    assert "must end in .html" in error({}, "--output", "e.png")
    assert "given twice" in error({}, file)


# ------------------------------------------------------------------------------------------- prior


def test_numbers_of_priors_by_hand():
    assert prior_page.effective_share([0.25] * 4) == pytest.approx(1)
    assert prior_page.effective_share([1.0, 0, 0, 0]) == pytest.approx(0.25)
    assert prior_page.effective_share([0.5, 0.5, 0, 0]) == pytest.approx(0.5)
    prior = [0.1, 0.2, 0.3, 0.4]
    sets = {"scene": [1, 2], "semantic": [2]}
    row = Prior("a", frames=[0, 1, 2, 3], times=[0.0] * 4, prior=prior, **sets)
    assert prior_page.set_shares(row) == pytest.approx((0.5, 0.3, 0.5))
    assert prior_page.part_masses([0.7, 0.3]) == pytest.approx([0.7 / 8] * 8 + [0.3 / 8] * 8)
    # Of three frames, the 6th of 16 parts holds a third of the second: 16 / 3 = 5.33.
    parts = prior_page.part_masses([0.0, 1.0, 0.0])
    assert parts[:7] == pytest.approx([0, 0, 0, 0, 0, (2 / 3) / (16 / 3), 1 / (16 / 3)])
    assert parts.sum() == pytest.approx(1)


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
    """Two rows of videos with both cues, one without a scene, one without cues, an image."""
    bare = prior_row("bare", media[1], [], [])
    bare = {name: bare[name] for name in ("problem_id", "frames", "times", "prior", "media")}
    image = {**bare, "problem_id": "image", "frames": [0], "times": [0.0], "prior": [1.0]}
    return [
        prior_row("a", media[0], [1, 3], [3]),
        prior_row("b", media[1], [1], [2]),
        prior_row("c", media[0], [], [0]),
        bare,
        image,
    ]


def test_prior_page(toy_folder, tmp_path, monkeypatch, capsys, chromium):
    files = sorted(toy_folder.glob("videos/*_0*.mp4"))[:2]
    rows = made_rows([str(file.relative_to(toy_folder)) for file in files])
    rows[1]["settings"] = {"frames": 4, "scene": "content"}
    output = tmp_path / "out/prior.html"
    words = ["--priors", write_lines(tmp_path / "p.jsonl", rows), "--output", output]
    done = command(monkeypatch, capsys, "prior", *words, "--media_root", toy_folder)
    assert done == (0, f"{output}\n", "")
    page, table = read(output)
    assert table["rows of videos"] == ["4"] and table["frames of a video, K"] == ["4"]
    assert table["rows of one frame (images), not drawn"] == ["1"]
    entropies = [-sum(p * math.log(p) for p in row["prior"]) for row in rows[:4]]
    mean = f"{np.mean(np.exp(entropies)) / 4:.3f}"
    assert table["effective frames, exp(entropy) / K, mean"] == [mean]
    # weights 0.1 1.1 0.1 4.1 | 0.1 1.1 3.1 0.1 | 3.1 0.1 0.1 0.1; the bare row has no sets
    for name, values in (
        ("the scene set", (5.2 / 5.4, 1.1 / 4.4, 0)),
        ("the semantic set", (4.1 / 5.4, 3.1 / 4.4, 3.1 / 3.4)),
        ("neither", (0.2 / 5.4, 0.2 / 4.4, 0.3 / 3.4)),
    ):
        assert table[f"mass of P on {name}, mean"] == [f"{sum(values) / 3:.3f}, n = 3"]
    ratio = f"{1 / (2 / 4 + 1 / 4):.3f} ("
    assert table["frames that both cues choose, over chance"][0].startswith(ratio)
    assert table["--scene"] == ["hsv (2 rows); content (1 rows)"] and table["--frames"] == ["4"]
    assert "made with several settings: scene." in page.words
    assert "without both sets: 1; with an empty one, so not asked" in page.words
    mean = np.mean([row["prior"] for row in rows[:4]], axis=0) / 4
    first = ", ".join([f"{mean[0]:.3f}"] * 4 + [f"{mean[1]:.3f}"] * 4)
    assert f"Mean P in 16 parts: {first}" in page.images[0]["alt"]
    # Three charts, four rows with their frames.
    assert len(page.images) == 3 + 4
    alts = [image["alt"] for image in page.images[3:]]
    assert any(alt.endswith(f"15.8 s P {4.1 / 5.4:.3f} scene semantic.") for alt in alts)
    read(output, "-sheet")
    assert "rows, drawn at random" in chromium(output)
    # Frames are those of the row.
    frames = prior_page.read_frames(Prior(**rows[0]), toy_folder)
    truth, _ = decode_frames(str(files[0]), rows[0]["frames"])
    np.testing.assert_array_equal(frames, truth)


def test_rows_are_drawn_by_the_seed(tmp_path):
    rows = [prior_row(str(index), "x.mp4", [1], [2]) for index in range(40)]
    path = write_lines(tmp_path / "p.jsonl", rows)

    def names(seed):
        return [row.problem_id for row in prior_page.summarise_priors(path, 3, seed).chosen]

    drawn = [names(seed) for seed in range(200)]
    assert drawn[0] == names(0) and len(set(map(tuple, drawn))) > 100
    assert all(len(set(row)) == 3 for row in drawn)
    times = np.bincount([int(name) for row in drawn for name in row], minlength=40)
    assert times.min() > 3 and times.max() < 35  # 15 expected


def test_prior_page_without_media(toy_folder, tmp_path, monkeypatch, capsys):
    rows = made_rows(["videos/gone.mp4", "../../etc/x.mp4"])
    path = write_lines(tmp_path / "p.jsonl", rows)
    words = ["--priors", path, "--output", tmp_path / "prior.html"]
    status, _, err = command(monkeypatch, capsys, "prior", *words)
    assert status == 0 and err.count("\n") == 1
    assert f"4 of 4 videos of the sheet cannot be shown (--media_root {tmp_path})" in err
    assert "videos/gone.mp4: no such file" in err
    page, _ = read(tmp_path / "prior.html")
    assert len(page.images) == 3 and "4 of 4 videos of the sheet cannot be shown" in page.words
    assert not (tmp_path / "prior-sheet.png").exists()
    video = sorted(toy_folder.glob("videos/*_0*.mp4"))[0]
    row = Prior(**prior_row("a", video.name, [1], [2], times=[0.0, 1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="at other times"):
        prior_page.read_frames(row, video.parent)
    with pytest.raises(ValueError, match="outside the media root"):
        prior_page.read_frames(Prior(**rows[1]), tmp_path)


def test_priors_that_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    def error(row, *more):
        path = write_lines(tmp_path / "p.jsonl", [row] if row else [])
        return refused(monkeypatch, capsys, "prior", "--priors", path, *more)

    good = prior_row("a", "x.mp4", [1], [2])
    nowhere = tmp_path / "nowhere.jsonl"
    assert "nowhere.jsonl not found" in refused(monkeypatch, capsys, "prior", "--priors", nowhere)
    assert "p.jsonl is empty" in error(None)
    image = {"problem_id": "i", "frames": [0], "times": [0.0], "prior": [1.0]}
    assert "no row of a video, only 1 of images" in error(image)
    assert "line 1" in error({**good, "prior": [0.5] * 4})
    assert "the row of a has sets that are not positions among its 4" in error(
        {**good, "scene": [4]}
    )
    assert "--items must be at least 0" in error(good, "--items", "-1")
    assert "must end in .html" in error(good, "--output", "x.png")
