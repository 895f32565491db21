"""ablation.py: its commands are read by the commands they call, the numbers of what they write are
stored, and the table is what is stored. All runs here are made by hand."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import ablation
from common.data import DataError, Example, Medium, Prior
from common.flags import Parser
from prior import PriorArguments, PriorSettings, load_priors

HARD = ablation.SETTINGS["hard"]

# What an arm changes in the settings of `full`.
PAPER = {"frame_use": "hidden", "frame_use_layer": -1}
CHANGES = {
    "full": {},
    "hidden": PAPER,
    "uniform_prior": {"priors": "x/uniform_prior.jsonl"},
    "no_scene": {"priors": "x/no_scene.jsonl"},
    "no_semantic": {"priors": "x/no_semantic.jsonl"},
    "shuffled_prior": {"priors": "x/shuffled_prior.jsonl"},
    "mean_pool": {**PAPER, "pool": "mean"},
    "tau_1": {**PAPER, "tau": 1.0},
    "softmax_mean": {**PAPER, "use_order": "softmax_mean"},
    "gate_soft": {},
    "gate_hard": {"gate": "hard"},
    "gate_none": {"gate": "none"},
    "lambda_0": {"cfr_weight": 0.0},
    "lambda_1": {"cfr_weight": 1.0},
    "lambda_3": {},
    "lambda_10": {"cfr_weight": 10.0},
    "no_temporal": {"temporal": False},
    "grpo": {"recipe": "grpo", "cfr_weight": 0.0, "temporal": False},
    "tgrpo": {"recipe": "tgrpo", "cfr_weight": 0.0, "top_k": 50},
    "care": {
        "recipe": "care",
        "cfr_weight": 0.0,
        "temporal": False,
        "top_k": 50,
        "consistency_coef": 0.5,
        "ema_decay": 0.995,
        "beta": 0.0,
    },
    "tw": {
        "recipe": "tw",
        "cfr_weight": 0.0,
        "temporal": False,
        "top_k": 50,
        "token_weight_alpha": 1.7,
        "reduction": "token",
        "clip_high": 0.28,
        "invert_questions": 0.5,
        "beta": 0.0,
        "top_p": 1.0,
        "freeze_vision": True,
    },
    "video_r2": {
        "recipe": "video_r2",
        "cfr_weight": 0.0,
        "temporal": False,
        "top_k": 50,
        "alignment_weight": 1.0,
        "temperature": 0.9,
        "top_p": 1.0,
        "freeze_vision": True,
    },
}


def parsed(monkeypatch, command):
    """Settings that train.py reads from a command."""
    import train

    monkeypatch.setattr(sys, "argv", command.split())
    return asdict(train.parse_arguments())


def test_every_arm_is_a_train_command_that_changes_what_it_says(monkeypatch):
    full = parsed(monkeypatch, ablation.arm_steps("x", HARD, 3, "full")["full"])
    assert full["stage"] == "grpo" and full["model_name_or_path"] == "x/sft/sft"
    assert full["dataset_name"] == "x/toy/train.json" and full["seed"] == 3
    assert full["priors"] == "x/full.jsonl" and full["eval_priors"] == "x/heldout.jsonl"
    assert full["frames"] == 24 and full["max_pixels"] == 3136
    assert full["cfr_weight"] == 3 and full["gate"] == "soft" and full["frame_use"] == "attention"
    assert list(CHANGES) == list(ablation.ARMS)
    for arm, changes in CHANGES.items():
        settings = parsed(monkeypatch, ablation.arm_steps("x", HARD, 3, arm)[arm])
        differ = {name: settings[name] for name in settings if settings[name] != full[name]}
        assert differ.pop("output_dir", "x/full") == f"x/{arm}"
        assert differ == changes, arm


@pytest.mark.parametrize("name", list(ablation.SETTINGS))
def test_the_other_commands_are_read_too(monkeypatch, name):
    import evaluate
    import toy

    setting = ablation.SETTINGS[name]
    steps = ablation.shared_steps("x", setting, 3)
    assert list(steps)[:4] == ["toy", "priors", "heldout", "sft"]
    made = toy.ToyArguments(**vars(Parser(toy.ToyArguments).parse_args(steps["toy"].split()[1:])))
    assert made.output_dir == "x/toy" and made.seed == 3
    sft = parsed(monkeypatch, steps["sft"])
    assert sft["stage"] == "sft" and sft["output_dir"] == "x/sft"
    assert sft["toy_dir"] == "x/toy" and sft["eval_dataset_name"] == "x/toy/heldout.json"
    for step, file in (("priors", "full"), ("heldout", "heldout")):
        words = steps[step].split()
        assert words[0] == "prior.py"
        priors = PriorArguments(**vars(Parser(PriorArguments).parse_args(words[1:])))
        assert priors.output == f"x/{file}.jsonl" and priors.frames == sft["frames"]
    steps |= ablation.arm_steps("x", setting, 3, "tw")
    asked = {}
    for step, command in steps.items():
        if command.startswith("evaluate.py"):
            parser = Parser(evaluate.EvaluateArguments)
            flags = vars(parser.parse_args(command.split()[1:]))
            asked[step] = evaluate.EvaluateArguments(**flags)
            assert asked[step].frames == sft["frames"]
            assert asked[step].max_pixels == sft["max_pixels"]
            assert asked[step].max_completion_length == sft["max_completion_length"]
    assert {step: one.model_name_or_path for step, one in asked.items()} == {
        "sft-looks": "x/sft/sft",
        "sft-shuffled": "x/sft/sft",
        "sft-blind": "x/sft/sft",
        "check": "x/sft/sft",
        "tw-looks": "x/tw/grpo",
        "tw-shuffled": "x/tw/grpo",
        "tw-blind": "x/tw/grpo",
    }
    assert asked["tw-looks"].priors == "x/heldout.jsonl" and asked["check"].frame_use_check
    assert asked["tw-shuffled"].control == "shuffled"
    assert asked["tw-blind"].control == "question_only"


# ------------------------------------------------------------------------------------ priors


def rows_of(*sizes):
    """Priors of made-up questions of so many frames, every P another one."""
    rows = []
    for number, size in enumerate(sizes):
        prior = np.arange(1, size + 1) + 10 * number
        row = Prior(
            f"q{number}",
            frames=[number + place for place in range(size)],
            times=[number / 2 + place for place in range(size)],
            prior=(prior / prior.sum()).tolist(),
            scene=[1],
            semantic=[2],
            settings={"prior": "full"},
        )
        rows.append(row)
    return rows


def test_a_shuffled_prior_is_never_the_questions_own_and_of_as_many_frames():
    rows = rows_of(*[4] * 7, *[3] * 5)
    own = {row.problem_id: row for row in rows}
    orders = set()
    for seed in range(5):
        changed = ablation.change_priors(rows, None, seed)
        assert sorted(row.problem_id for row in changed) == sorted(own)
        for row in changed:
            before = own[row.problem_id]
            assert (row.frames, row.times) == (before.frames, before.times)
            assert row.prior != before.prior and len(row.prior) == len(row.frames)
        # Every prior goes to one question.
        assert sorted(row.prior for row in changed) == sorted(row.prior for row in rows)
        orders.add(tuple(tuple(row.prior) for row in sorted(changed, key=lambda r: r.problem_id)))
        assert ablation.change_priors(rows, None, seed) == changed
    assert len(orders) > 1
    assert rows == rows_of(*[4] * 7, *[3] * 5)  # the shared rows stay


def test_priors_of_other_cues():
    rows = rows_of(4)
    (uniform,) = ablation.change_priors(rows, "uniform", 0)
    assert uniform.prior == [0.25] * 4
    # w_base 0.1, and 3 on frame 2 or 1 on frame 1.
    (no_scene,) = ablation.change_priors(rows, "no_scene", 0)
    assert no_scene.prior == pytest.approx([0.1 / 3.4, 0.1 / 3.4, 3.1 / 3.4, 0.1 / 3.4])
    (no_semantic,) = ablation.change_priors(rows, "no_semantic", 0)
    assert no_semantic.prior == pytest.approx([0.1 / 1.4, 1.1 / 1.4, 0.1 / 1.4, 0.1 / 1.4])


def test_train_accepts_changed_priors(tmp_path):
    examples = []
    for row in rows_of(16, 16):
        media = [Medium("video", "clip.mp4")]
        examples.append(Example(row.problem_id, "Why?", [], "numerical", "1", media))
    for kind in (None, "uniform"):
        rows = ablation.change_priors(rows_of(16, 16), kind, 0)
        ablation.write_lines(tmp_path / "priors.jsonl", rows)
        found = load_priors(tmp_path / "priors.jsonl", examples, PriorSettings())
        assert {name: row.prior for name, row in found.items()} == {
            row.problem_id: row.prior for row in rows
        }


# --------------------------------------------------------------------------------------- run


def write_run(folder, greedy=0.5, accuracies=()):
    """Make what train.py writes."""
    folder.mkdir(parents=True, exist_ok=True)
    after = {"greedy": greedy, "greedy/conflict": greedy / 2, "sampled": 0.5, "length": 40.0}
    after |= {"paper_consensus": 0.12, "paper_evidence_use": 0.28}
    (folder / "result.json").write_text(json.dumps({"before": {}, "after": after}))
    (folder / "run.json").write_text(json.dumps({"revision": "1a2b3c", "versions": {"torch": "2"}}))
    lines = [{"stage": "sft", "step": 0, "loss/sft": 1.0}]
    for step, accuracy in enumerate(accuracies):
        lines.append({"stage": "grpo", "step": step, "reward/accuracy": accuracy})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def write_report(file, evidence=0.3):
    """Make what evaluate.py writes."""
    reports = {
        "looks": {"frame_use": {"all": {"consensus": 0.14, "evidence": evidence}}},
        "shuffled": {"accuracy": 0.4},
        "blind": {"accuracy": 0.25},
        "check": {"frame_use": {"attention, layer 1": [0.5, 1.25], "chance": [0.3, 1.0]}},
    }
    file.write_text(json.dumps(reports[file.stem.split("-")[-1]]))


class Commands:
    """In place of subprocess.run: keeps the commands; those with a word of `broken` fail."""

    def __init__(self):
        self.ran = []
        self.broken = []
        self.greedy = 0.5

    def __call__(self, words, stdout, stderr, env):
        assert env["OMP_NUM_THREADS"] == "1" and stderr == subprocess.STDOUT
        command = " ".join(words[1:])
        self.ran.append(command)
        stdout.write("some output")
        stdout.flush()
        if any(word in command for word in self.broken):
            return subprocess.CompletedProcess(words, 3)
        if words[1] == "train.py":
            write_run(Path(words[words.index("--output_dir") + 1]), self.greedy)
        elif words[1] == "prior.py":
            ablation.write_lines(words[words.index("--output") + 1], rows_of(4, 4, 4))
        elif words[1] == "evaluate.py":
            write_report(Path(words[words.index("--output") + 1]))
        return subprocess.CompletedProcess(words, 0)


@pytest.fixture
def commands(monkeypatch):
    fake = Commands()
    monkeypatch.setattr(ablation.subprocess, "run", fake)
    return fake


def main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["ablation.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        ablation.main()
    return end.value.code


def words_of(tmp_path, *more):
    """A call of run in a folder."""
    runs = ["--runs", tmp_path / "runs.jsonl", "--output_dir", tmp_path]
    return ["run", "--settings", "easy", *runs, *more]


def test_what_is_stored_is_not_run_again(tmp_path, monkeypatch, capsys, commands):
    arms = ["full", "gate_soft", "mean_pool", "shuffled_prior"]
    words = words_of(tmp_path, "--seeds", 0, "--jobs", 2, "--arms", *arms)
    assert main(monkeypatch, *words) == 0
    # The shared steps come first; gate_soft is full, and in `easy` mean_pool is hidden.
    assert [command.split()[0] for command in commands.ran[:8]] == [
        "toy.py",
        "prior.py",
        "prior.py",
        "train.py",
        *["evaluate.py"] * 4,
    ]
    trained = [command for command in commands.ran[8:] if command.startswith("train.py")]
    assert len(trained) == 2 and len(commands.ran) == 8 + 2 * 4
    printed = capsys.readouterr().out.splitlines()
    assert sorted(printed) == sorted(f"python {command}" for command in commands.ran)
    folder = tmp_path / "easy/seed0"
    assert len((folder / "shuffled_prior.jsonl").read_text().splitlines()) == 3

    # One line for each, with its numbers and the code that made it.
    runs = tmp_path / "runs.jsonl"
    lines = [json.loads(line) for line in runs.read_text().splitlines()]
    assert [line["arm"] for line in lines[:2]] == ["check", "sft"]
    assert sorted(line["arm"] for line in lines[2:]) == ["full", "shuffled_prior"]
    assert {(line["setting"], line["seed"], line["revision"]) for line in lines} == {
        ("easy", 0, "1a2b3c")
    }
    assert lines[0]["numbers"]["chance"] == [0.3, 1.0]
    assert lines[2]["numbers"]["greedy"] == 0.5 and lines[2]["numbers"]["no video"] == 0.25

    # Nothing is left to run, in this folder or in another one.
    commands.ran.clear()
    assert main(monkeypatch, *words) == 0
    assert main(monkeypatch, *words, "--output_dir", tmp_path / "other") == 0
    assert commands.ran == []
    assert f"easy, seed 0, full: in {runs}" in capsys.readouterr().out

    # An arm that is not stored: an interrupted command, whose log does not end, runs again.
    runs.write_text("".join(json.dumps(line) + "\n" for line in lines if line["arm"] != "full"))
    (folder / "full.log").write_text("half of the out")
    assert main(monkeypatch, *words) == 0
    (again,) = commands.ran
    assert again in trained and "--resume_from_checkpoint auto" in again
    assert len(runs.read_text().splitlines()) == 4


def test_arms_of_another_sft_checkpoint_are_not_stored_beside(
    tmp_path, monkeypatch, capsys, commands
):
    words = words_of(tmp_path, "--seeds", 0, "--arms")
    assert main(monkeypatch, *words, "full") == 0
    stored = (tmp_path / "runs.jsonl").read_text()
    commands.greedy = 0.625
    commands.ran.clear()
    other = ["lambda_0", "--output_dir", tmp_path / "other"]
    assert main(monkeypatch, *words, *other) == 1
    assert not any("--stage grpo" in command for command in commands.ran)
    assert (tmp_path / "runs.jsonl").read_text() == stored
    error = f"SFT of {tmp_path}/other/easy/seed0 is not that of {tmp_path}/runs.jsonl"
    assert error in capsys.readouterr().err


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys, commands):
    words = words_of(tmp_path, "--seeds", 0, 1, "--jobs", 1, "--arms", "full", "lambda_0")
    # One arm of a seed, and what all arms of the other seed need.
    commands.broken = ["seed0/lambda_0 ", "seed1/sft "]
    assert main(monkeypatch, *words) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        f"sft failed with exit code 3, see {tmp_path}/easy/seed1/sft.log",
        f"lambda_0 failed with exit code 3, see {tmp_path}/easy/seed0/lambda_0.log",
    ]
    ran = [command for command in commands.ran if "stage grpo" in command]
    assert len(ran) == 2 and all("seed0" in command for command in ran)
    assert "some output" in (tmp_path / "easy/seed0/lambda_0.log").read_text()
    assert any("seed0/full-blind.json" in command for command in commands.ran)
    # A broken model is not evaluated; the next call tries again.
    assert not any("seed0/lambda_0-" in command for command in commands.ran)
    commands.broken = []
    assert main(monkeypatch, *words) == 0
    assert any("seed1/lambda_0-blind.json" in command for command in commands.ran)


def test_a_run_of_another_command_is_refused(tmp_path, monkeypatch, capsys, commands):
    words = words_of(tmp_path, "--seeds", 0, "--arms", "full")
    assert main(monkeypatch, *words) == 0
    (tmp_path / "runs.jsonl").unlink()
    monkeypatch.setitem(ablation.ARMS, "full", "--tau 0.2")
    commands.ran.clear()
    assert main(monkeypatch, *words) == 1
    assert commands.ran == []
    assert "full.log is of another command" in capsys.readouterr().err


def test_stored_runs_of_other_flags_are_refused(tmp_path, monkeypatch, capsys, commands):
    words = words_of(tmp_path, "--seeds", 0, "--arms", "full")
    assert main(monkeypatch, *words) == 0
    commands.ran.clear()
    runs = tmp_path / "runs.jsonl"
    with monkeypatch.context() as patch:
        patch.setitem(ablation.ARMS, "full", "--tau 0.2")
        assert main(patch, *words) == 2
        assert main(patch, "table", "--runs", runs) == 2
    # The toy of a setting, too.
    monkeypatch.setitem(ablation.SETTINGS, "easy", ablation.Setting("--dense_share 0.5"))
    assert main(monkeypatch, *words, "--output_dir", tmp_path / "other") == 2
    assert commands.ran == []
    errors = capsys.readouterr().err
    assert errors.count(f"{runs} has full with --dense_share 0.6 --frames 16") == 2
    assert f"{runs} has check with" in errors
    assert main(monkeypatch, *words, "--runs", tmp_path / "runs.json") == 2
    assert "must end in .jsonl" in capsys.readouterr().err and not (tmp_path / "runs.json").exists()


@pytest.mark.parametrize("line", ['{"problem_id": "0"}', '["a"]', '{"setting": "x", "seed": 0}'])
def test_a_file_of_something_else_is_no_file_of_runs(line, tmp_path, monkeypatch, capsys):
    (tmp_path / "priors.jsonl").write_text(f"{line}\n")
    assert main(monkeypatch, "table", "--runs", tmp_path / "priors.jsonl") == 2
    assert "priors.jsonl is no file of runs" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- table


def test_the_quantiles_are_students():
    for index, quantile in enumerate(ablation.T95):
        freedom = index + 1
        x = np.linspace(0, quantile, 200_001)
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
        density = (
            scale / math.sqrt(freedom * math.pi) * (1 + x**2 / freedom) ** -((freedom + 1) / 2)
        )
        assert np.trapezoid(density, x) == pytest.approx(0.475, abs=5e-6)


def test_steps_to_80_percent():
    curve = [0.5, 0.6, 0.7, 0.9, 0.9, 0.9, 0.9, 0.4]
    # Means of five: 0.72, 0.8, 0.86.
    assert ablation.steps_to([*curve[:5], 0.9, 0.9]) == 6
    assert ablation.steps_to([0.9] * 7) == 5
    assert ablation.steps_to([0.1] * 7) == 7


def store(folder, seed, name, greedy, evidence=0.3, accuracies=()):
    """Store the numbers of an arm that ended."""
    world = ablation.World("easy", seed, folder / f"easy/seed{seed}")
    write_run(world.folder / name, greedy, accuracies)
    for kind in ablation.EVALUATIONS:
        write_report(world.folder / f"{name}-{kind}.json", evidence)
    ablation.store(folder / "runs.jsonl", world, name, ablation.read_arm(world.folder, name))


@pytest.fixture
def stored(tmp_path):
    """full on three seeds, lambda_0 on two and a third of another seed, SFT on one; checks."""
    store(tmp_path, 0, "sft", 0.6)
    for seed, greedy in enumerate([0.9, 0.8, 0.7]):
        store(tmp_path, seed, "full", greedy, 0.4 + 0.1 * seed, [0.5] * 4 + [0.9] * 8)
        check = {"attention, layer 1": [0.5 + seed / 10, 1.25], "chance": [0.3, 1.0]}
        world = ablation.World("easy", seed, tmp_path / "easy/seed0")
        ablation.store(tmp_path / "runs.jsonl", world, "check", check)
    store(tmp_path, 0, "lambda_0", 0.8, 0.3, [0.5] * 12)
    store(tmp_path, 1, "lambda_0", 0.9, 0.3, [0.9] * 12)
    store(tmp_path, 7, "lambda_0", 0.1)
    return tmp_path


def test_an_arm_without_one_of_its_evaluations_is_not_stored(tmp_path):
    store(tmp_path, 0, "full", 0.9)
    folder = tmp_path / "easy/seed0"
    (folder / "full-blind.json").unlink()
    with pytest.raises(DataError, match="full-blind.json not found"):
        ablation.read_arm(folder, "full")


def test_a_setting_without_runs_has_no_table(stored, monkeypatch, capsys):
    words = ["table", "--settings", "hard", "--runs", stored / "runs.jsonl"]
    assert main(monkeypatch, *words) == 2
    assert "runs.jsonl has no run of hard" in capsys.readouterr().err


def test_the_table_of_stored_runs(stored, monkeypatch, capsys):
    words = ["table", "--settings", "easy", "--output_dir", stored / "new", "--seeds", 0, 1, 2]
    words += ["--runs", stored / "runs.jsonl"]
    assert main(monkeypatch, *words) == 0
    printed, errors = capsys.readouterr()
    summary = json.loads((stored / "new/ablation.json").read_text())["easy"]
    assert summary["greedy"]["full"]["mean"] == pytest.approx(0.8)
    assert summary["greedy"]["full"]["half"] == 0
    # Differences -0.1 and 0.1: sd 0.141, over the root of two 0.1, times t of 1 degree of freedom.
    arm = summary["greedy"]["lambda_0"]
    assert arm["values"] == {"0": 0.8, "1": 0.9}
    assert arm["mean"] == pytest.approx(0.85) and arm["difference"] == pytest.approx(0)
    assert arm["half"] == pytest.approx(1.27062)
    # 0.3 against 0.4 and 0.5.
    arm = summary["evidence, attention"]["lambda_0"]
    assert arm["difference"] == pytest.approx(-0.15) and arm["half"] == pytest.approx(0.63531)
    # Means of five: 0.74 after step 7, 0.82 after step 8.
    assert summary["steps to 80 %"]["full"]["mean"] == 8
    assert summary["steps to 80 %"]["lambda_0"]["values"] == {"0": 12, "1": 5}
    # Names of the same runs have the same numbers.
    assert summary["greedy"]["lambda_3"] == summary["greedy"]["gate_soft"]
    assert summary["greedy"]["lambda_3"] == summary["greedy"]["full"]
    # One seed has a mean and no interval; no GRPO, no steps.
    assert summary["greedy"]["sft"]["half"] is None and "sft" not in summary["steps to 80 %"]
    # Argmax inside the scene: 0.2, 0.3 and 0.4 above chance, sd 0.1.
    check = summary["argmax inside"]["attention, layer 1"]
    assert check["difference"] == pytest.approx(0.3)
    assert check["half"] == pytest.approx(4.3027 * 0.1 / 3**0.5)

    lines = printed.splitlines()
    answers, looks = [line for line in lines if line.startswith("| lambda_0 |")]
    assert answers.startswith("| lambda_0 | 2 | 0.850 (+0.000 ± 1.271) | 0.425 (")
    assert answers.endswith("| 8.5 (+0.5 ± 44.5) |")
    assert looks.split(" | ")[4] == "0.300 (-0.150 ± 0.635)" and looks.endswith(
        "| 40.0 (+0.0 ± 0.0) |"
    )
    (line, _) = [line for line in lines if line.startswith("| full |")]
    assert line.startswith("| full | 3 | 0.800 | 0.400 |")
    (line,) = [line for line in lines if line.startswith("| attention, layer 1 |")]
    assert line == "| attention, layer 1 | 3 | 0.600 (+0.300 ± 0.248) | 1.250 (+0.250 ± 0.000) |"
    # Every arm that is not there is named with its seeds.
    missing = errors.splitlines()
    assert {"missing: easy, lambda_0, seeds 2", "missing: easy, sft, seeds 1 2"} < set(missing)
    assert "missing: easy, tw, seeds 0 1 2" in missing
    # All arms but full and its two names, and SFT.
    assert len(missing) == len(ablation.ARMS) - 3 + 1

    # Again to the digit.
    files = [stored / f"new/ablation.{suffix}" for suffix in ("json", "svg", "png")]
    before = [file.read_bytes() for file in files]
    assert main(monkeypatch, *words) == 0
    assert [file.read_bytes() for file in files] == before
    assert capsys.readouterr().out == printed
