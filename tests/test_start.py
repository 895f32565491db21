"""What train.py does before its first step: what it refuses, what it says, what it skips, and that
a refusal leaves no trace. In this
process: train.run() is the real one, its two trainers and the answering are stand-ins."""

import json
import os
import random
import shutil
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from conftest import ROOT, metrics, run_script, zero_stage
from PIL import Image

import prior
import train
from common import ranks, workers
from common.data import DataError, load_examples

NO_CLIP = ["--prior", "no_semantic"]


@pytest.fixture
def place(alone, toy_folder, checkpoint, tmp_path, monkeypatch, capsys):
    """A folder with the media of a toy, a data set file made of given rows, and start(*flags):
    train.py's run(), as a new process has it.

    calls: what the stand-ins for training and scoring were given. clips: how often a CLIP
    model was loaded.
    """
    videos = [
        row
        for row in json.loads((toy_folder / "train_cot.json").read_text())
        if row["data_type"] == "video"
    ]
    by_path = {}
    for row in videos:
        by_path.setdefault(row["path"], []).append(row)
    by_path = list(by_path.values())  # the questions of each video
    shutil.copytree(toy_folder / "videos", tmp_path / "videos")
    here = SimpleNamespace(
        folder=tmp_path, output=tmp_path / "out", questions=by_path, calls=[], clips=[]
    )

    def write(name, rows):
        (tmp_path / name).write_text(json.dumps(rows))
        return tmp_path / name

    def start(*flags):
        ranks.named.clear()
        words = [
            "train.py",
            "--deepspeed",
            ROOT / "ds_zero3.json",
            "--model_name_or_path",
            checkpoint,
            "--output_dir",
            here.output,
            "--min_pixels",
            3136,
            "--max_pixels",
            3136,
            "--decode_workers",
            0,
            *flags,
        ]
        words += [] if "sft" in flags else ["--beta", 0]  # SFT does not read it
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        train.run(train.parse_arguments())
        return capsys.readouterr().out

    def train_sft(run):
        here.calls.append(("sft", [example.id for example in run.demonstrations.examples]))
        run.write("metrics.jsonl", [{"stage": "sft", "step": 0}])
        train.score(run, None, "before")

    def train_grpo(run, model):
        if "before" not in run.result:
            train.score(run, None, "before")
        here.calls.append(("grpo", [example.id for example in run.training.examples]))
        here.rows = run.training.priors
        run.write("metrics.jsonl", [{"stage": "grpo", "step": 0}])
        steps = len(run.training.examples)  # with one question a step
        if run.args.save_steps:
            folder = here.output / f"checkpoint-grpo-{steps}"
            state = {
                "stage": "grpo",
                "step": steps,
                "ranks": 1,
                "settings": asdict(run.args),
                **run.checkpoint.shared,
            }
            folder.mkdir()
            (folder / "state.json").write_text(json.dumps(state))
        train.score(run, None, "after")

    def score_answers(run, model, ready, log):
        here.calls.append(("score", [one.example.id for one in ready]))
        here.heldout_rows = run.heldout.priors
        log.add("greedy", [0.5])

    def load_clip(*names):
        here.clips.append(names)

    here.write, here.start = write, start
    monkeypatch.setattr(train, "train_sft", train_sft)
    monkeypatch.setattr(train, "train_grpo", train_grpo)
    monkeypatch.setattr(train, "sampling", nullcontext)
    monkeypatch.setattr(train, "Tracker", lambda *_: None)  # DeepSpeed's ranks are not started
    monkeypatch.setattr(train, "hold", lambda folder: None)  # until the process ends
    monkeypatch.setattr(train, "score_answers", score_answers)
    monkeypatch.setattr(prior, "load_clip", load_clip)
    return here


def refused(place, *flags):
    with pytest.raises(DataError) as told:
        place.start(*flags)
    return str(told.value)


def result(place):
    return json.loads((place.output / "result.json").read_text())


def priors_of(place, rows, name="p.jsonl", **settings):
    """A priors file of these rows, as prior.py --prior no_semantic makes it."""
    data = place.write("for_priors.json", rows)
    made, _ = prior.build_priors(
        load_examples(data), None, prior.PriorSettings(prior="no_semantic", **settings)
    )
    workers.write_lines(place.folder / name, made)
    return place.folder / name


def absent(row, name="absent.mp4"):
    return {**row, "path": name}


# ------------------------------------------------------------------------------------------ priors


def test_an_example_without_a_row_is_looked_at(place):
    a, b, c, d = (questions[0] for questions in place.questions)
    file = priors_of(place, [a, b, c])
    data = place.write(
        "data.json", [a, b, absent(c), absent(d)]
    )  # c's row is of its own video, d has none
    assert f"{c['problem_id']} is another question there, or about another file" in refused(
        place, "--dataset_name", data, "--priors", file, *NO_CLIP
    )
    data = place.write("data.json", [a, b, c, absent(d)])
    said = place.start("--dataset_name", data, "--priors", file, *NO_CLIP)
    assert said.count(f"skipped {d['problem_id']}: ") == 1 and "absent.mp4: no such file" in said
    assert "GRPO: 3 of 4 planned step(s) of 1 question(s); 1 unusable" in said
    assert list(result(place)["skipped"]) == [d["problem_id"]] and sorted(
        place.calls[0][1]
    ) == sorted(row["problem_id"] for row in (a, b, c))
    shutil.rmtree(place.output)
    # the same file, but the video is there: its prior is computed
    data = place.write("data.json", [a, absent(b), d])
    workers.write_lines(
        file, [row for row in prior.read_priors(file) if row.problem_id == a["problem_id"]]
    )
    said = place.start("--dataset_name", data, "--priors", file, *NO_CLIP)
    assert "computing the priors of 2 training questions" in said
    assert set(place.rows) == {a["problem_id"], d["problem_id"]}
    assert list(result(place)["skipped"]) == [b["problem_id"]]


def test_rows_without_frame_sets_are_computed_and_load_clip(place):
    a, b, c, d = (questions[0] for questions in place.questions)
    sets = {"uniform": [0, 20, 40, 60], "scene": [20], "semantic": [40]}
    data = place.write("data.json", [{**a, "frame_sets": sets}, {**b, "frame_sets": sets}])
    place.start("--dataset_name", data, "--frames", 4)
    assert place.clips == []
    # Eq. 1-2 by hand: weights 0.1, 0.1 + 1, 0.1 + 3, 0.1 and their sum 4.4
    assert place.rows[a["problem_id"]].prior == pytest.approx(
        [0.1 / 4.4, 1.1 / 4.4, 3.1 / 4.4, 0.1 / 4.4]
    )
    shutil.rmtree(place.output)
    data = place.write("data.json", [{**a, "frame_sets": sets}, absent(b), c])
    said = place.start("--dataset_name", data, "--frames", 4)
    assert said.count(f"skipped {b['problem_id']}: ") == 1
    assert len(place.clips) == 1 and set(place.rows) == {a["problem_id"], c["problem_id"]}


def test_images_and_texts_need_no_clip(place, toy_folder, monkeypatch, capsys):
    Image.new("RGB", (64, 64), (200, 30, 30)).save(place.folder / "picture.png")
    row = place.questions[0][0]
    rows = [
        {**row, "problem_id": "i", "data_type": "image", "path": "picture.png"},
        {**row, "problem_id": "t", "data_type": "text", "path": ""},
    ]
    data = place.write("data.json", rows)
    place.start("--dataset_name", data)
    assert (
        place.clips == []
        and sorted(place.calls[0][1]) == ["i", "t"]
        and place.rows["i"].prior == [1.0]
    )
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "prior.py",
            "--dataset_name",
            str(data),
            "--output",
            str(place.folder / "i.jsonl"),
            "--workers",
            "0",
        ],
    )
    prior.main()
    assert place.clips == [] and "1 priors are in" in capsys.readouterr().out


def test_prior_refuses_other_settings_before_it_deletes_the_list_of_errors(
    place, monkeypatch, capsys
):
    data = place.write("data.json", [place.questions[0][0], absent(place.questions[1][0])])
    command = [
        "prior.py",
        "--dataset_name",
        str(data),
        "--output",
        str(place.folder / "p.jsonl"),
        "--workers",
        "0",
    ]
    monkeypatch.setattr(sys, "argv", [*command, *NO_CLIP])
    prior.main()
    errors = (place.folder / "p.jsonl.errors.jsonl").read_text()
    assert "absent.mp4" in errors
    monkeypatch.setattr(sys, "argv", [*command, *NO_CLIP, "--frames", "8"])
    with pytest.raises(SystemExit):
        prior.main()
    assert "has 16 frames of" in (said := capsys.readouterr().err) and "--frames 8" in said
    assert (place.folder / "p.jsonl.errors.jsonl").read_text() == errors


def test_held_out_priors_are_given_or_computed(place, monkeypatch):
    a, b, c, d = (questions[0] for questions in place.questions)
    data = place.write("data.json", [a, b])
    # d under a's id: another question than the training one of that id
    heldout = place.write("heldout.json", [c, {**d, "problem_id": a["problem_id"]}])
    flags = ["--dataset_name", data, "--eval_dataset_name", heldout, *NO_CLIP]
    own = priors_of(place, [c, {**d, "problem_id": a["problem_id"]}], "held.jsonl")
    flags += ["--priors", priors_of(place, [a, b]), "--eval_priors", own]
    decoded, read_cues = [], prior.read_cues
    monkeypatch.setattr(
        prior,
        "read_cues",
        lambda medium, *others: (
            decoded.append(os.path.basename(medium.path)) or read_cues(medium, *others)
        ),
    )
    place.start(*flags)
    made = {row.problem_id: row for row in prior.read_priors(own)}
    assert decoded == [] and place.heldout_rows == made
    shutil.rmtree(place.output)
    workers.write_lines(own, [made[c["problem_id"]]])
    said = place.start(*flags)
    assert decoded == [os.path.basename(d["path"])] and place.heldout_rows == made
    assert "computing the priors of 1 held-out questions" in said


# ---------------------------------------------------------------------------------------- held out


def test_held_out_questions_that_cannot_be_asked_are_skipped_before_and_after(place):
    a, b, c, d = (questions[0] for questions in place.questions)
    long = {**b, "problem_id": "long", "problem": "why " * 300}
    (place.folder / "torn.mp4").write_bytes((place.folder / d["path"]).read_bytes()[:2000])
    heldout = place.write(
        "heldout.json",
        [
            long,
            absent(c),
            {**c, "problem_id": "no type", "problem_type": "riddle"},
            {**d, "problem_id": "torn", "path": "torn.mp4"},
            {**d, "subtitle": "He says yes."},
        ],
    )
    data = place.write("data.json", [a])
    said = place.start(
        "--dataset_name", data, "--eval_dataset_name", heldout, "--max_prompt_length", 400, *NO_CLIP
    )
    assert [call for call in place.calls if call[0] == "score"] == [
        ("score", [d["problem_id"]])
    ] * 2
    skipped = result(place)["heldout_skipped"]
    told = {"rows have subtitle, which no prompt shows": 1}
    assert result(place)["differences"] == {str(heldout): told}
    assert {"long", c["problem_id"], "no type", "torn"} == set(skipped) and result(place)[
        "skipped"
    ] == {}
    assert (
        "(--max_prompt_length 400)" in skipped["long"]
        and "no such file" in skipped[c["problem_id"]]
    )
    assert "held-out: 1 question(s); unusable: 4" in said
    assert all(said.count(f"skipped {problem}: ") == 1 for problem in skipped)
    shutil.rmtree(place.output)
    heldout = place.write("heldout.json", [long])
    flags = ["--eval_dataset_name", heldout, "--max_prompt_length", 400, *NO_CLIP]
    said = place.start("--dataset_name", data, *flags)
    assert "held-out: 0 question(s); unusable: 1" in said
    assert result(place)["before"] == result(place)["after"] == {}


# ---------------------------------------------------------------------- refusals, and what is said


def test_a_refused_start_leaves_nothing_behind(place, monkeypatch, tmp_path):
    a, b = place.questions[0][:2]
    data = place.write("data.json", [a, b])
    good = ["--dataset_name", data, *NO_CLIP]
    empty = place.write("p.jsonl", [])
    bad = {  # flags -> words of the refusal
        ("--deepspeed", tmp_path / "none.json"): "DeepSpeed configuration",
        (
            "--model_name_or_path",
            tmp_path / "none",
        ): f"{tmp_path / 'none'} is not a checkpoint, ",
        ("--eval_dataset_name", tmp_path / "none.json"): "not found",
        ("--prompt_template", tmp_path / "none.txt"): "not found",
        ("--priors", tmp_path / "none.jsonl"): "not found",
        ("--priors", empty): "is not an object",
        (
            "--per_device_train_batch_size",
            3,
        ): f"2 usable questions of {data} (0 skipped) are fewer than one step's 3",
        ("--stage", "sft", "--sft_per_device_batch_size", 3): "are fewer than one step's 3",
        ("--output_dir", data): f"--output_dir {data} cannot be written: File exists",
        ("--per_device_train_batch_size", 0): "--per_device_train_batch_size must be at least 1",
        ("--learning_rate", -1): "--learning_rate must be at least 0",
        ("--save_total_limit", -1): "--save_total_limit must be at least 0",
        ("--max_grad_norm", "nan"): "--max_grad_norm must be from 0 to inf",
        ("--max_prompt_length", 0): "--max_prompt_length must be at least 1",
        ("--clip_low", -1): "--clip_low must be from 0 to inf",
        ("--ema_decay", 2): "--ema_decay must be from 0 to 1",
        ("--warmup_ratio", 3): "--warmup_ratio must be from 0 to 1",
        ("--frame_use_layer", 99): "has layers 1 to 3, and hidden states 0 to 3",
    }
    for flags, words in bad.items():
        assert words in refused(place, *good, *flags), flags
        assert not place.output.exists() or not list(place.output.iterdir()), flags
    # terms that could give nothing, and priors of other frames
    rows = [row for questions in place.questions for row in questions if not row["options"]]
    rows = [{key: value for key, value in row.items() if key != "grounding"} for row in rows]
    plain = place.write("plain.json", rows)
    assert "no question of" in refused(
        place, "--dataset_name", plain, *NO_CLIP, "--recipe", "video_r2"
    )
    other = priors_of(place, [a, b], frames=8)
    message = refused(place, *good, "--priors", other)
    assert "has 8 frames of" in message and "--frames 16" in message
    assert not list(place.output.iterdir())
    said = place.start("--dataset_name", plain, "--recipe", "tw")
    assert "0 inverted, 0 not invertible" not in said and ", 0 inverted, " in said
    shutil.rmtree(place.output)  # with the priors that it computed
    # refused with its priors computed, then for want of a model's weights: neither is an
    # earlier run, and its priors file may be given to another one
    broken = place.write("data.json", [a, absent(b)])
    assert f"1 usable questions of {broken} (1 skipped)" in refused(
        place, "--dataset_name", broken, *NO_CLIP, "--per_device_train_batch_size", 2
    )
    made = place.output / "priors_training.jsonl"
    assert list(place.output.iterdir()) == [made]

    def fails(*_):
        raise OSError("no weights")

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_grpo", fails)
        with pytest.raises(OSError, match="no weights"):
            place.start(*good)
    assert (place.output / "run.json").is_file()
    place.write("data.json", [a, b])
    said = place.start(*good, "--priors", made)
    assert "computing the priors of 1 training questions" in said  # b's, which was broken
    assert set(place.rows) == {
        a["problem_id"],
        b["problem_id"],
    } and "holds an earlier run" in refused(place, *good)


def test_priors_of_a_refused_start_are_computed_again(place):
    """With the settings of the new start."""
    a, b = place.questions[0][:2]
    data = place.write("data.json", [a, b])
    place.output.mkdir()
    workers.write_lines(
        place.output / "priors_training.jsonl",
        prior.read_priors(priors_of(place, [a, b], frames=8)),
    )
    place.start("--dataset_name", data, *NO_CLIP, "--frames", 4)
    assert {len(row.frames) for row in place.rows.values()} == {4}
    assert len(list(prior.read_priors(place.output / "priors_training.jsonl"))) == 2


def test_what_will_be_trained_is_said_first(place, monkeypatch):
    rows = [row for questions in place.questions for row in questions][:12]
    rows = [row if index < 2 else {**row, "process": ""} for index, row in enumerate(rows)] + [
        {"problem_id": "x"}
    ]
    data, said = place.write("data.json", rows), []
    monkeypatch.setattr(train, "log_main", lambda text: said.append((text, len(place.calls))))
    place.start("--dataset_name", data, "--stage", "sft", "--sft_per_device_batch_size", 2)
    assert ("SFT: 2 of 13 rows have reasoning, 1 step(s) of 2", 0) in said
    shutil.rmtree(place.output)
    place.calls.clear()
    place.start("--dataset_name", data, "--per_device_train_batch_size", 5, *NO_CLIP)
    assert (
        "GRPO: 2 of 2 planned step(s) of 5 question(s); 1 unusable, 0 inverted, 0 not invertible",
        0,
    ) in said


def test_a_row_is_named_once(alone, capsys):
    ranks.named.clear()
    for _ in range(2):
        ranks.name_skipped({"a": "a.mp4: no such file"})
    ranks.name_skipped({"a": "a.mp4: no such file", "b": "row 1 has no problem"})
    assert capsys.readouterr().out.splitlines() == [
        "skipped a: a.mp4: no such file",
        "skipped b: row 1 has no problem",
    ]


def test_without_git_there_is_no_revision(monkeypatch, tmp_path):
    assert train.revision() is not None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert train.revision() is None


def test_a_second_run_in_one_folder_is_refused(alone, tmp_path):
    """Before either has logged a step."""
    args = train.TrainArguments(output_dir=str(tmp_path))
    assert train.find_start(tmp_path, args) == {}
    with pytest.raises(DataError, match="another run writes to --output_dir"):
        train.find_start(tmp_path, args)
    assert list(tmp_path.iterdir()) == []

    # A worker that is forked does not keep the lock, so that it ends with the run.
    def holds():
        opened = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        return os.path.realpath(tmp_path) in opened

    assert holds()
    before = set(os.listdir("/proc/self/fd"))
    worker = os.fork()
    if worker == 0:
        kept = holds()
        # The numbers that became free are those of other files now; a child of it keeps them.
        files = [os.open("/dev/null", os.O_RDONLY) for _ in before]
        child = os.fork()
        if child == 0:
            os._exit(int(not all(os.path.exists(f"/proc/self/fd/{file}") for file in files)))
        os._exit(int(kept or os.waitpid(child, 0)[1] != 0))
    assert os.waitpid(worker, 0)[1] == 0


# ------------------------------------------------------------------------------- a run made longer


def test_a_longer_run_begins_with_the_questions_of_a_shorter_one(toy_folder, alone):
    examples = load_examples(toy_folder / "train.json")[:5]
    lengths = [
        dict(max_steps=2),
        dict(max_steps=9),
        dict(max_steps=-1, num_train_epochs=1.4),
        dict(max_steps=-1, num_train_epochs=3.0),
    ]
    streams = []
    for length in lengths:
        arguments = replace(train.TrainArguments(), per_device_train_batch_size=2, **length)
        order = train.schedule(arguments, "grpo").order(examples, 0)
        streams.append([example.id for example in order])
    assert [len(stream) for stream in streams] == [4, 18, 7, 15]
    for stream in streams:
        assert streams[1][: len(stream)] == stream
    rng, order = random.Random(0), []
    for _ in range(4):
        order += [example.id for example in rng.sample(examples, 5)]
    assert order[:18] == streams[1]


def test_a_finished_run_is_planned_again(place):
    a, b, c, d = (questions[0] for questions in place.questions)
    data = place.write("data.json", [a, b, c, absent(d)])
    heldout = place.write("heldout.json", [place.questions[0][1], absent(place.questions[1][1])])
    flags = ["--dataset_name", data, "--eval_dataset_name", heldout, *NO_CLIP]
    more = [*flags, "--resume_from_checkpoint", "auto"]
    place.start(*flags, "--max_steps", 4)
    (_, asked), (_, first), _ = place.calls  # the scoring before, the training
    assert len(first) == 3 and (place.output / "checkpoint-grpo-3").is_dir()
    state = {path: path.read_bytes() for path in place.output.rglob("*") if path.is_file()}
    place.calls.clear()
    assert "holds a finished run, as long" in place.start(*more, "--max_steps", 4)
    assert {path: path.read_bytes() for path in place.output.rglob("*") if path.is_file()} == state
    assert place.calls == [] and (place.output / "result.json").is_file()
    # what could not be read stays out, also when it can be by now: the questions that were
    # trained keep their places
    shutil.copyfile(place.folder / d["path"], place.folder / "absent.mp4")
    said = place.start(*more, "--max_steps", -1, "--num_train_epochs", 2)
    assert "going on with --num_train_epochs 2.0, before it was 1.0" in said
    (_, second), (_, after) = place.calls  # the scores before are those of the first run
    assert (
        len(second) == 6
        and second[:3] == first
        and after == asked == [place.questions[0][1]["problem_id"]]
    )
    assert d["problem_id"] in result(place)["skipped"] and list(
        result(place)["heldout_skipped"]
    ) == [place.questions[1][1]["problem_id"]]
    (place.folder / place.questions[0][0]["path"]).unlink()
    assert "1 held-out question(s) scored before GRPO can no longer be" in refused(
        place, *more, "--num_train_epochs", 3
    )
    shutil.rmtree(place.output)
    place.calls.clear()
    place.start("--dataset_name", place.write("data.json", [b, c]), *NO_CLIP, "--save_steps", 0)
    place.calls.clear()
    more = ["--dataset_name", data, *NO_CLIP, "--resume_from_checkpoint", "auto"]
    said = place.start(*more, "--num_train_epochs", 2)
    assert "holds a finished run, as long or without checkpoints" in said
    assert place.calls == []


def test_a_run_under_another_zero_stage_does_not_go_on(place):
    data = place.write("data.json", [questions[0] for questions in place.questions])
    flags = ["--dataset_name", data, *NO_CLIP]
    place.start(*flags, "--max_steps", 2)
    before = {path: path.read_bytes() for path in place.output.rglob("*") if path.is_file()}
    more = [*flags, "--max_steps", 4, "--resume_from_checkpoint", "auto"]
    keeps = place.folder / "keeps_zero_3.json"
    keeps.write_text(json.dumps(zero_stage(3)))
    folder = place.output / "checkpoint-grpo-2"
    said = refused(place, *more, "--deepspeed", keeps)
    assert f"{folder} was written under ZeRO-2 or less, which ZeRO-3 of this run cannot" in said
    # What one process wrote before it ran ZeRO-2 in the place of ZeRO-3.
    part = folder / "deepspeed" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    part.parent.mkdir()
    part.touch()
    said = refused(place, *more)
    assert f"{folder} was written under ZeRO-3, which ZeRO-2 of this run cannot read" in said
    assert '"offload_param": {"device": "none"}' in said
    part.unlink()
    after = {path: path.read_bytes() for path in place.output.rglob("*") if path.is_file()}
    assert after == before


def test_a_longer_run_computes_the_priors_that_it_lacks(place):
    rows = [questions[0] for questions in place.questions]
    flags = ["--dataset_name", place.write("data.json", rows), *NO_CLIP]
    place.start(*flags, "--max_steps", 2)
    made = (place.output / "priors_training.jsonl").read_text()
    said = place.start(*flags, "--max_steps", 4, "--resume_from_checkpoint", "auto")
    assert "computing the priors of 2 training questions" in said and len(made.splitlines()) == 2
    assert (place.output / "priors_training.jsonl").read_text().startswith(made) and len(
        place.rows
    ) == 4


def test_a_finished_run_is_made_longer(small_toy, first_run, tmp_path):
    """first_run's GRPO of 2 steps of 4 questions goes on to 3."""
    output = tmp_path / "out"
    shutil.copytree(first_run[0], output)
    before = {
        name: (output / name).read_text()
        for name in ("metrics.jsonl", "rollouts.jsonl", "priors_training.jsonl")
    }
    flags = [
        "--toy_dir",
        small_toy,
        "--output_dir",
        output,
        "--sft_max_steps",
        2,
        "--sft_per_device_batch_size",
        4,
        "--num_generations",
        4,
        "--max_completion_length",
        12,
        "--gate",
        "none",
        "--weight_decay",
        0,
        "--per_device_train_batch_size",
        4,
        "--resume_from_checkpoint",
        "auto",
    ]
    done = run_script("train.py", *flags, "--max_steps", 3, report=False)
    said = done.stdout + done.stderr
    assert "going on with --max_steps 3, before it was 2" in said
    assert "going on after step 2 of grpo" in said
    assert [record["step"] for record in metrics(output, "grpo")] == [0, 1, 2] and len(
        metrics(output, "sft")
    ) == 2
    for name, text in before.items():
        assert (output / name).read_text().startswith(text)
    asked = {
        json.loads(line)["problem_id"]
        for line in (output / "rollouts.jsonl").read_text().splitlines()
    }
    rows = [
        json.loads(line)["problem_id"]
        for line in (output / "priors_training.jsonl").read_text().splitlines()
    ]
    assert len(rows) == len(set(rows)) == 12 and asked == set(rows)
    old, new = (
        json.loads((folder / "result.json").read_text()) for folder in (first_run[0], output)
    )
    assert new["before"] == old["before"] and new["after"] != old["after"]
