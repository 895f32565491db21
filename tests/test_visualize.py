"""visualize.py run, answers and prior, in this process: the pages' numbers are the files'."""

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
from common import plots, prior_page, run_page
from common.data import Prior
from common.media import read_frames
from common.video import open_video

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that tags nest; collects pictures, table rows and text."""

    def __init__(self, text):
        super().__init__()
        self.stack = []
        self.images = []
        self.links = []
        self.ids = []
        self.rows = []
        self.words = ""
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert "srcset" not in attributes
        # Nothing but places in the page itself.
        if "href" in attributes:
            assert attributes["href"].startswith("#")
            self.links.append(attributes["href"][1:])
        if "id" in attributes:
            self.ids.append(attributes["id"])
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


def write_run(folder, seed=0, steps=12, change=lambda record: record, result=True, rollouts=()):
    """A run as train.py writes it. -> its result."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    rows = [{"stage": "sft", "step": step, "loss/sft": 3 / (1 + step)} for step in range(steps)]
    names = [name for name in run_page.UNITS if name != "loss/sft"]
    for step in range(steps):
        values = {name: rng.random() for name in names}
        rows.append(change({"stage": "grpo", "step": step, **values}))
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "rollouts.jsonl", rollouts)
    settings = {"seed": seed, "recipe": "cfgrpo", "command": [str(folder)]}
    (folder / "run.json").write_text(json.dumps({**settings, "output_dir": str(folder)}))
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
    assert page.rows[0] == ["before → after GRPO", "plain", label]
    assert page.rows[-2:] == [["setting", *folders], ["seed", "0", "1", "2"]]
    assert sorted(table.keys() - {"setting", "seed"})[1:] == sorted(results[0]["after"])
    for name in ("greedy", "evidence_use", "length"):
        parts = []
        for part in ("before", "after"):
            low, high = sorted(result[part][name] for result in results[:2])
            parts.append(f"{(low + high) / 2:.3f} ({low:.3f} to {high:.3f})")
        alone = [f"{results[2][part][name]:.3f}" for part in ("before", "after")]
        assert table[name] == [" → ".join(parts), " → ".join(alone)]
    assert "--output out/compare.html" in page.words and "band:" in page.images[0]["alt"]
    assert page.words.count(label) == 2  # in the table, in the command
    assert "before → after" in chromium(tmp_path / "out/compare.html")


def test_train_writes_the_report(first_run, chromium):
    output, _ = first_run
    words = chromium(output / "report.html")
    after = json.loads((output / "result.json").read_text())["after"]["greedy"]
    assert f"→ {after:.3f}" in words and "train.py" in words
    assert (output / "report.png").is_file() and (output / "report.svg").is_file()


def test_a_run_that_goes_on(tmp_path, monkeypatch, capsys):
    """No result yet, NaN in three steps, a line that is still being written, a term of no list."""
    monkeypatch.chdir(tmp_path)
    figures = []
    write = run_page.write_page

    def kept(*arguments):
        figures.append(arguments[3][""])
        return write(*arguments)

    monkeypatch.setattr(run_page, "write_page", kept)

    def change(record):
        value = math.nan if 3 <= record["step"] < 6 else 0.5
        return {**record, "reward/accuracy": value, "reward/novelty": 0.25}

    write_run(tmp_path / "a", change=change, result=False)
    with open(tmp_path / "a/metrics.jsonl", "a") as file:
        file.write('{"stage": "grpo", "st')
    assert command(monkeypatch, capsys, "run", "a") == (0, "a/report.html\n", "")
    _, table = read(tmp_path / "a/report.html")
    assert table == {}
    titles = [axes.get_title("left") for axes in figures[0].axes]
    names = list(run_page.UNITS)
    assert titles == ["reward/accuracy, 3 not a number", *names[1:], "reward/novelty"]


def rollout(step, name, total, text, **more):
    """A line of rollouts.jsonl; four frames, two slots."""
    return {
        "step": step,
        "problem_id": name,
        "question": f"What of {name}?",
        "options": ["A. x", "B. y"],
        "text": text,
        "answer": "B",
        "truncated": False,
        "rewards": {"accuracy": total - 1, "total": total},
        "prior": [0.125, 0.25, 0.5, 0.125],
        "use": [0.31, 0.69],
        **more,
    }


def test_what_the_model_wrote(tmp_path, monkeypatch, capsys, chromium):
    """The best and the worst of each group in the first, the middle and the last step."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for step in range(12):
        for name in ("q", "Q"):
            for place, total in enumerate((1.5, 2.0, 1.25)):
                text = f"<think>{step} {name} {place}</think>"
                rows.append(rollout(step, name, total, text, truncated=place == 2))
    # A picture has no frames to choose from.
    rows.append(rollout(11, "picture", 1.0, "one", prior=None, use=None))
    result = write_run(tmp_path / "a", rollouts=rows)
    causes = {"skipped_by_cause": {"<no> such file": 2}, "heldout_skipped": {"x": "gone"}}
    (tmp_path / "a/result.json").write_text(json.dumps({**result, **causes}))
    assert command(monkeypatch, capsys, "run", "a")[0] == 0
    page, table = read(tmp_path / "a/report.html")
    shown = re.findall(r"<think>(.*?)</think>", page.words)
    expected = []
    for step in (0, 6, 11):
        # The best is the second, the worst the third.
        expected += [f"{step} {name} {place}" for name in "Qq" for place in (1, 2)]
    assert sorted(shown) == sorted(expected)
    assert page.words.count("Worst of 3, cut at --max_completion_length") == 6
    assert "Best of 3\n" in page.words and "Best of 1\n" in page.words
    assert page.rows.count(["0.000", "1.000"]) == 2  # the picture, best and worst
    assert page.rows.count(["1.000", "2.000"]) == 6 and page.rows.count(["0.250", "1.250"]) == 6
    assert table["prior, of frames"] == ["0.12", "0.25", "0.50", "0.12"]
    assert table["use, of slots"] == ["0.31", "0.69"]
    assert "2: <no> such file" in page.words and "held-out questions: 1" in page.words
    assert "settings that differ" not in page.words.lower()
    assert "What of picture?" in chromium(tmp_path / "a/report.html")


def test_one_step(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", steps=1)
    words = ["run", tmp_path / "a", "--output", tmp_path / "one.html"]
    assert command(monkeypatch, capsys, *words)[0] == 0
    read(tmp_path / "one.html")


def test_series_by_hand():
    first = {("grpo", 0): {"x": 1.0}, ("grpo", 1): {"x": 3.0}, ("grpo", 3): {"x": math.nan}}
    second = {("grpo", 0): {"x": 2}, ("grpo", 1): {}, ("grpo", 2): {"x": math.inf}}
    second["sft", 5] = {"x": 7.0}
    steps, values, broken = run_page.series([(first, {}), (second, {})], "x")
    assert steps == [0, 1, 2, 3] and broken == 2
    nan = math.nan
    np.testing.assert_equal(values, [[1, 3, nan, nan], [2, nan, nan, nan]])
    # Three steps or fewer: a window of one; four: a window of three.
    np.testing.assert_allclose(run_page.running_means(np.array([[0.0, 3.0, nan]])), [[0, 3, nan]])
    means = run_page.running_means(np.array([[0.0, 3.0, nan, 6.0], [nan, 1.0, 2.0, 6.0]]))
    np.testing.assert_allclose(means, [[1.5, 1.5, nan, 6.0], [nan, 1.5, 3.0, 4.0]])


def test_names_are_short_and_different():
    names = plots.name_paths(["/x/y/a/output/grpo", "/x/y/b/output/grpo"])
    assert names == ["a/output/grpo", "b/output/grpo"]
    assert plots.name_paths(["runs/first", "runs/other"]) == ["first", "other"]
    assert plots.name_paths(["/long/way/o-0", "/long/way/o-1/"]) == ["o-0", "o-1"]
    assert plots.name_paths(["Qwen/Qwen2-VL-2B"]) == ["Qwen2-VL-2B"]
    assert plots.name_paths(["a", "b"], ["x", "x"]) == ["x", "x"]


def test_runs_that_cannot_be_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "good")
    step = '{"stage": "grpo", "step": 0}\n'
    for name, text in (("empty", ""), ("broken", f"{step}nonsense\n"), ("other", step)):
        write_run(tmp_path / name)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    (tmp_path / "none").mkdir()
    for flags, words in (
        (["nowhere"], "nowhere is no --output_dir of train.py, it has no metrics.jsonl"),
        (["none"], "none is no --output_dir of train.py, it has no metrics.jsonl"),
        (["empty"], "none of the metrics to be drawn yet"),
        (["broken"], "metrics.jsonl line 2 is not a JSON record"),
        (["other"], "none of the metrics to be drawn yet"),
        (["good", "good/../good"], "a path is given twice"),
        (["good", "--label", "a", "--label", "b"], "2 --label for 1 paths"),
        (["good", "--output", "x.png"], "must end in .html"),
        (["good", "--output", "good/result.json/x.html"], "good/result.json"),
    ):
        assert words in refused(monkeypatch, capsys, "run", *flags)
    assert not (tmp_path / "nowhere").exists()
    status, _, err = command(monkeypatch, capsys, "run", "good", "--lable", "x")
    assert status == 2 and "unrecognized arguments" in err


# ----------------------------------------------------------------------------------------- answers


def answered(name, letter, **more):
    """A line of predictions; B is right."""
    row = {
        "problem_id": name,
        "problem": f"Which <b> of {name}?",
        "problem_type": "multiple choice",
        "options": ["A. x", "B. y"],
        "solution": "B",
        "output": f"<think>{name}</think><answer>{letter}</answer>",
        "error": None,
    }
    return {**row, **more}


def sections(file):
    """{heading of a page: text below it}."""
    parts = re.split(r"<h2.*?>(.*?)</h2>", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {
        " ".join(head.split()): text for head, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def test_from_a_number_to_its_answers(tmp_path, monkeypatch, capsys, chromium):
    first = [answered("a", "A"), answered("b", "B"), answered("c", "B", task="count")]
    first += [answered("d", "", output="", error="unreadable media: gone"), answered("e", "B")]
    second = [answered("a", "B"), answered("b", "A"), answered("c", "B", task="count")]
    second += [answered("d", "A"), answered("f", "B")]
    files = [write_lines(tmp_path / "1.jsonl", first), write_lines(tmp_path / "2.jsonl", second)]
    words = ["--predictions", *files, "--label", "SFT", "--label", "GRPO"]
    output = tmp_path / "out/x.html"
    done = command(monkeypatch, capsys, "answers", *words, "--output", output)
    assert done == (0, f"{output}\n", "")
    page = Page(output.read_text(encoding="utf-8"))
    assert page.rows == [
        ["SFT → GRPO", "right → right", "right → wrong", "wrong → right", "wrong → wrong"],
        ["count", "1", "0", "0", "0"],
        ["multiple choice", "0", "1", "1", "1"],
    ]
    # Every number leads to its answers.
    assert len(set(page.links)) == 8 and set(page.links) == set(page.ids)
    lists = sections(output)
    assert list(lists)[:5] == [
        "count, right → right: 1 of 1",
        "count, right → wrong: 0 of 0",
        "count, wrong → right: 0 of 0",
        "count, wrong → wrong: 0 of 0",
        "multiple choice, right → right: 0 of 0",
    ]
    gained = lists["multiple choice, wrong → right: 1 of 1"]
    assert "Which &lt;b&gt; of a?" in gained and gained.count("&lt;think&gt;a&lt;") == 2
    assert gained.index("SFT, 0.000") < gained.index("GRPO, 1.000")
    assert "unreadable media: gone" in lists["multiple choice, wrong → wrong: 1 of 1"]
    assert "SFT: 5 questions. GRPO: 5 questions." in page.words
    assert "4 are in every file" in page.words
    assert "wrong → right" in chromium(output, drawn=False)


def test_one_file_of_many_answers(tmp_path, monkeypatch, capsys):
    rows = [answered(str(index), "B") for index in range(103)]
    rows += [answered("odd", "", output="<answer>who knows</answer>")]
    path = write_lines(tmp_path / "p.jsonl", rows)
    output = tmp_path / "x.html"
    words = ["--predictions", path, "--output", output]
    assert command(monkeypatch, capsys, "answers", *words)[0] == 0
    lists = sections(output)
    assert lists["multiple choice, right: 100 of 103"].count("<details>") == 100
    assert "unread: " in lists["multiple choice, wrong: 1 of 1"]


def test_answers_that_cannot_be_listed(tmp_path, monkeypatch, capsys):
    path = write_lines(tmp_path / "p.jsonl", [answered("a", "B")])
    other = write_lines(tmp_path / "q.jsonl", [answered("a", "A", solution="A")])
    alone = write_lines(tmp_path / "r.jsonl", [answered("z", "B")])
    for files, words in (
        ([tmp_path / "none.jsonl"], "none.jsonl not found"),
        ([path, other], "problem_id a is another question in each file"),
        ([path, alone], "the two files share no problem_id"),
        ([path, path], "given twice"),
        ([path, "--output", "x.png"], "must end in .html"),
    ):
        assert words in refused(monkeypatch, capsys, "answers", "--predictions", *files)


# ------------------------------------------------------------------------------------------- prior


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
    page, table = read(output, "-4")
    assert table["rows of videos"] == ["4"]
    assert table["rows of one frame (images), not drawn"] == ["1"]
    assert page.words.count("settings of 2 rows") == 2
    assert table["settings of 1 rows"] == ['{"frames": 4, "scene": "content"}']
    # Four rows with their frames.
    alts = [image["alt"] for image in page.images]
    assert len(alts) == 4 and sum(alt.startswith("What <b> a?.") for alt in alts) == 1
    assert "rows of videos" in chromium(output)
    # Frames are those of the row.
    frames = prior_page.row_frames(Prior(**rows[0]), toy_folder)
    _, _, truth = read_frames(open_video(str(files[0])), rows[0]["frames"])
    np.testing.assert_array_equal(frames, truth)


def test_prior_page_without_media(toy_folder, tmp_path, monkeypatch, capsys):
    rows = made_rows(["videos/gone.mp4", "../../etc/x.mp4"])
    path = write_lines(tmp_path / "p.jsonl", rows)
    words = ["--priors", path, "--output", tmp_path / "prior.html"]
    status, _, err = command(monkeypatch, capsys, "prior", *words)
    assert status == 0 and err.count("\n") == 1
    assert "warning: videos that cannot be shown: 4 of 4; the first: " in err
    page = Page((tmp_path / "prior.html").read_text())
    assert page.images == [] and "videos that cannot be shown" in page.words
    assert not list(tmp_path.glob("*.png"))
    video = sorted(toy_folder.glob("videos/*_0*.mp4"))[0]
    row = Prior(**prior_row("a", video.name, [1], [2], times=[0.0, 1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="at other times"):
        prior_page.row_frames(row, video.parent)
    with pytest.raises(ValueError, match="outside the media root"):
        prior_page.row_frames(Prior(**rows[1]), tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        prior_page.row_frames(Prior(**rows[0]), tmp_path)


def test_priors_that_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    def error(row, *more):
        path = write_lines(tmp_path / "p.jsonl", [row] if row else [])
        return refused(monkeypatch, capsys, "prior", "--priors", path, *more)

    good = prior_row("a", "x.mp4", [1], [2])
    nowhere = tmp_path / "nowhere.jsonl"
    assert "nowhere.jsonl not found" in refused(monkeypatch, capsys, "prior", "--priors", nowhere)
    assert "has no row of a video" in error(None)
    image = {"problem_id": "i", "frames": [0], "times": [0.0], "prior": [1.0]}
    assert "has no row of a video" in error(image)
    assert "line 1" in error({**good, "prior": [0.5] * 4})
    assert "must end in .html" in error(good, "--output", "x.png")
