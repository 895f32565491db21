"""visualize.py by subprocess on made-up runs: the pictures open, the page parses, its numbers are the files', bad input gets a sentence."""

import base64
import io
import json
import os
import random
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import visualize
from common import plots, run_page

ROOT = Path(__file__).resolve().parents[1]

VOID = {"meta", "img", "source", "line"}
PAPER = "consensus/paper_score"


class Page(HTMLParser):
    """Checks that tags nest; collects pictures, table rows, text and attributes."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.images, self.rows, self.sources, self.words = [], [], [], [], ""
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "img":
            self.images.append(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        self.sources += [
            value for name, value in attributes.items() if name in ("src", "srcset", "href")
        ]

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words += data
        if {"th", "td"} & set(self.stack):
            self.rows[-1][-1] += data


def write_run(folder, seed=0, steps=12, change=lambda record: record, result=True):
    """A run as train.py writes it. -> its result."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    lines = [{"stage": "sft", "step": step, "loss/sft": 3 / (1 + step)} for step in range(steps)]
    names = [name for stage, name, *_ in run_page.METRICS if stage == "grpo"]
    lines += [
        change({"stage": "grpo", "step": step, **{name: rng.random() for name in names}})
        for step in range(steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = (
        "greedy",
        "greedy/conflict",
        "greedy/colour",
        "sampled",
        "consensus",
        "evidence_use",
        "evidence_chance",
        "length",
    )
    result = (
        {
            "before": {name: rng.random() for name in names},
            "after": {name: rng.random() for name in names},
        }
        if result
        else None
    )
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    return result


def run(*flags, cwd):
    return subprocess.run(
        [sys.executable, ROOT / "visualize.py", "run", *map(str, flags)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
    )


def read(file):
    """The report and its pictures, each opened; nothing is fetched from elsewhere."""
    page = Page(file.read_text(encoding="utf-8"))
    assert page.sources and all(
        source.startswith("data:image/png;base64,") for source in page.sources
    )
    for source in page.sources:
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True)))
        assert len(picture.getcolors(256)) > 20  # axes, text and lines: not empty
    assert all(image["alt"] and int(image["width"]) > 300 for image in page.images)
    assert Image.open(file.with_suffix(".png")).size[0] >= 640
    return page


def test_three_runs_two_arms(tmp_path, chromium):
    results = [
        write_run(tmp_path / name, seed) for seed, name in enumerate(("a0", "a1", 'b <&> "$x$"'))
    ]
    label = '_<b>"λ & $3$'
    done = run(
        *(tmp_path / name for name in ("a0", "a1", 'b <&> "$x$"')),
        "--label",
        "plain",
        "--label",
        "plain",
        "--label",
        label,
        "--output",
        "out/compare.html",
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (0, "out/compare.html\n") and done.stderr == ""
    page = read(tmp_path / "out/compare.html")
    assert len(page.images) == len(run_page.METRICS) and len(page.sources) == 2 * len(
        run_page.METRICS
    )  # light and dark
    assert page.rows[0] == ["measure", "plain (2 runs)", label]
    told = {row[0]: row[1:] for row in page.rows[1:]}
    assert list(told)[:3] == [
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
        assert told[words] == [
            " → ".join(parts),
            f"{results[2]['before'][name]:.3f} → {results[2]['after'][name]:.3f}",
        ]
    assert (
        "python " in page.words
        and "--output out/compare.html" in page.words
        and "Band:" in page.words
    )
    assert page.words.count(label) >= 2 and f"{label}: " in page.images[0]["alt"]
    assert "Held-out questions" in chromium(tmp_path / "out/compare.html")


def test_train_writes_the_report(first_run, chromium):
    output, _ = first_run
    words = chromium(output / "report.html")
    after = json.loads((output / "result.json").read_text())["after"]["greedy"]
    assert (
        f"→ {after:.3f}" in words
        and f"python visualize.py run {output}" in words
        and f"# {output}: train.py" in words
    )
    assert (output / "common.plots.png").is_file() and (output / "report.svg").is_file()


def test_nan_gap_truncated_line_and_zero_term(tmp_path):
    def change(record):
        values = {
            "reward/accuracy": float("nan") if 3 <= record["step"] < 6 else 0.5,
            PAPER: float("nan"),
            "loss/kl": float("inf"),
            "reward/length": 0.0,
        }
        return {**record, **values}

    write_run(tmp_path / "a", change=change, result=False)
    with open(tmp_path / "a/metrics.jsonl", "a") as file:
        file.write('{"stage": "grpo", "st')  # the run is still writing
    done = run("a", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    page = read(tmp_path / "a/report.html")
    assert len(page.images) == len(run_page.METRICS) - 1 and page.rows == []
    assert (
        "Zero throughout, so not drawn: Reward term: length." in page.words
        and "not a number" in page.words
    )
    assert "Without result.json yet: a." in page.words


def test_one_step(tmp_path):
    write_run(tmp_path / "a", steps=1)
    done = run("a", "--output", "one.html", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    page = read(tmp_path / "one.html")
    value = json.loads((tmp_path / "a/metrics.jsonl").read_text().splitlines()[1])[
        "reward/accuracy"
    ]
    assert f"a: {value:.3g} at step 0" in page.images[0]["alt"]


def test_curves_by_hand():
    runs = [
        run_page.Run("a", {"grpo": {0: {"x": 1.0}, 1: {"x": 3.0}, 3: {"x": float("nan")}}}, None),
        run_page.Run("b", {"grpo": {0: {"x": 2}, 1: {}, 2: {"x": None}}}, None),
    ]
    steps, values, means, broken = run_page.curves(runs, "grpo", "x")
    assert steps.tolist() == [0, 1, 2, 3] and sorted(broken) == [2, 3]
    nan = float("nan")
    np.testing.assert_equal(values, [[1, 3, nan, nan], [2, nan, nan, nan]])
    np.testing.assert_equal(
        means, [[1, 3, nan, nan], [2, nan, nan, nan]]
    )  # three steps: a window of one
    np.testing.assert_allclose(
        run_page.running_mean(np.array([0.0, 3.0, nan, 6.0])), [1.5, 1.5, nan, 6.0]
    )  # four: window of three


def test_stage_bars_are_the_medians():
    """Two labels: a of one run, b of two; bars end to end in the order of the stages."""
    step = lambda *seconds: {
        f"time/{name}": value for name, value in zip(run_page.STAGES, seconds, strict=True)
    }  # noqa: E731
    one = run_page.Run(
        "a",
        {"grpo": {0: step(1, 2, 3, 0.5), 1: step(3, 2, 5, 0.5), 2: step(2, 2, 100, float("nan"))}},
        None,
    )
    two = run_page.Run("b", {"grpo": {0: step(4, 0, 6, 1)}}, None)
    axes = Figure().add_subplot()
    alt = run_page.plot_stages(axes, plots.SHEETS["light"], {"a": [one], "b": [one, two]})
    bars = [(bar.get_x(), bar.get_width(), round(bar.get_y() + 0.3)) for bar in axes.patches]
    assert bars == [
        (0, 2, 0),
        (2, 2, 0),
        (4, 5, 0),
        (9, 0.5, 0),
        (0, 2.5, 1),
        (2.5, 2, 1),
        (4.5, 5.5, 1),
        (10, 0.5, 1),
    ]
    assert "a: rollout 2, reference 2, policy 5, update 0.5; b: rollout 2.5" in alt


def test_curve_is_the_file(tmp_path):
    """The drawn lines of a metric: every value faint, the running mean over it, a band of two runs."""
    for seed, name in enumerate(("a", "b")):
        write_run(tmp_path / name, seed)
    runs, axes = [run_page.read_run(tmp_path / name) for name in ("a", "b")], Figure().add_subplot()
    metric = next(metric for metric in run_page.METRICS if metric[1] == "loss/kl")
    run_page.plot_metric(axes, plots.SHEETS["light"], metric, {"x": runs}, None)
    kl = np.array(
        [
            [
                json.loads(line)["loss/kl"]
                for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
                if '"loss/kl"' in line
            ]
            for name in ("a", "b")
        ]
    )  # (2, 12)
    faint, line = (one.get_ydata() for one in axes.lines)
    np.testing.assert_allclose(faint, kl.mean(0))
    np.testing.assert_allclose(line[5], kl[:, 4:7].mean())  # 12 steps: windows of three
    np.testing.assert_allclose(line[0], kl[:, :2].mean())
    low, high = kl[:, 4:7].mean(1).min(), kl[:, 4:7].mean(1).max()
    corners = axes.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose(sorted(corners[corners[:, 0] == 5, 1]), [low, high])


def test_a_run_that_ended_early_moves_no_mean():
    """Two seeds of one label, 2 and 0 throughout; the second stops after two steps: the mean stays 1 and ends there."""
    runs = [
        run_page.Run("a", {"grpo": {step: {"x": 2.0} for step in range(9)}}, None),
        run_page.Run("b", {"grpo": {step: {"x": 0.0} for step in range(2)}}, None),
    ]
    axes = Figure().add_subplot()
    alt = run_page.plot_metric(
        axes, plots.SHEETS["light"], ("grpo", "x", "X", "unit", "", ""), {"s": runs}, None
    )
    for line in axes.lines:
        assert (
            np.ma.filled(line.get_ydata(), np.nan)[:2].tolist() == [1, 1]
            and np.isnan(np.ma.filled(line.get_ydata(), np.nan)[2:]).all()
        )
    assert "s: 1 at step 0, 1 at step 1" in alt


def test_names_are_short_and_different():
    assert plots.short_names(["/x/y/a/output/grpo", "/x/y/b/output/grpo"]) == [
        "a/output/grpo",
        "b/output/grpo",
    ]
    assert plots.short_names(["runs/first", "runs/other"]) == [
        "first",
        "other",
    ] and plots.short_names(["a", "b"]) == ["a", "b"]
    assert plots.short_names(["/long/way/to/output-0", "/long/way/to/output-1/"]) == [
        "output-0",
        "output-1",
    ]
    assert (
        plots.shorten("Qwen2.5-VL-7B-seed0", 9) == "Qwen…eed0"
        and plots.shorten("short", 9) == "short"
    )


def test_bad_input_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "good")
    step = '{"stage": "grpo", "step": 0}\n'
    for name, text in (("empty", ""), ("broken", f"{step}nonsense\n"), ("other", step)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    (tmp_path / "none").mkdir()
    write_run(tmp_path / "odd", result=False)
    (tmp_path / "odd/result.json").write_text('{"before": 3}')
    write_run(tmp_path / "null", result=False)
    (tmp_path / "null/result.json").write_text(
        '{"before": {"greedy": 0.5}, "after": {"evidence_chance": null}}'
    )
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
        monkeypatch.setattr(sys, "argv", ["visualize.py", "run", *flags])
        with pytest.raises(SystemExit) as stop:
            visualize.main()
        told = capsys.readouterr()
        assert stop.value.code == 2 and told.out == ""
        assert (
            told.err.startswith("visualize.py: error: ")
            and words in told.err
            and told.err.count("\n") == 1
        )
    done = run("good", "--lable", "x", cwd=tmp_path)
    assert (
        done.returncode == 2
        and "unrecognized arguments" in done.stderr
        and "Traceback" not in done.stderr
    )
