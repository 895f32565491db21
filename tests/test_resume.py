"""Runs that are killed, stopped, fed with rubbish or out of disk: train.py in a few steps on a
small toy.
"""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import cv2
import numpy as np
import pytest
from conftest import BIN, ENV, ROOT, complain, launch, metrics, run_script, weights
from PIL import Image
from transformers import AutoModelForImageTextToText
from warm import Script

import train
from common import checkpoints
from common.data import DataError

FLAGS = ["--num_generations", 4, "--max_completion_length", 12, "--gate", "none", "--save_steps", 2]


def start(*flags, ranks=1):
    """train.py, to be waited for."""
    return Script("train.py", "--deepspeed", "ds_zero3.json", *flags, ranks=ranks, report=False)


def start_launcher(*flags, ranks):
    """deepspeed train.py as a user types it, in a session of its own, its output in a pipe."""
    command = [BIN / "deepspeed", "--num_gpus", ranks, "train.py", "--deepspeed", "ds_zero3.json"]
    env = {name: value for name, value in ENV.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [str(word) for word in (*command, *flags)],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def lines(file):
    return file.read_text().count("\n") if file.exists() else 0


def wait_for(process, ready, seconds=240):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end and process.poll() is None, "ended, or too slow"
        time.sleep(0.02)


def facts(output):
    """What a run says, but for its times."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    records = [
        {name: value for name, value in record.items() if not name.startswith("time/")}
        for record in records
    ]
    return records, [
        json.loads(line) for line in (output / "rollouts.jsonl").read_text().splitlines()
    ]


def assert_same_run(one, other):
    (records, rollouts), (others, other_rollouts) = facts(one), facts(other)
    assert [(record["stage"], record["step"]) for record in records] == [
        (record["stage"], record["step"]) for record in others
    ]
    for a, b in zip(records, others, strict=True):
        assert {name: value for name, value in a.items() if name != "stage"} == pytest.approx(
            {name: value for name, value in b.items() if name != "stage"}, abs=1e-6
        )
    assert [row["text"] for row in rollouts] == [row["text"] for row in other_rollouts]
    a, b = (json.loads((output / "result.json").read_text()) for output in (one, other))
    assert a["before"] == pytest.approx(b["before"], abs=1e-6) and a["after"] == pytest.approx(
        b["after"], abs=1e-6
    )
    a, b = weights(one / "grpo"), weights(other / "grpo")
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-6


@pytest.mark.parametrize(("ranks", "moments"), [(1, (2, 6)), (2, (5,))])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(small_toy, tmp_path, ranks, moments):
    flags = [
        "--toy_dir",
        small_toy,
        *FLAGS,
        "--sft_max_steps",
        3,
        "--sft_per_device_batch_size",
        8 // ranks,
        "--max_steps",
        4,
        "--per_device_train_batch_size",
        4 // ranks,
        "--recipe",
        "care",
        "--beta",
        0.1,
        "--ema_steps",
        2,
        "--ema_decay",
        0.5,
    ]
    launch(*flags, "--output_dir", tmp_path / "whole", ranks=ranks)
    output, rng = tmp_path / "killed", random.Random(ranks)
    for lines_before in moments:  # of metrics.jsonl
        process = start(
            *flags, "--output_dir", output, "--resume_from_checkpoint", "auto", ranks=ranks
        )
        wait_for(process, lambda: lines(output / "metrics.jsonl") >= lines_before)  # noqa: B023
        time.sleep(rng.random() * 0.5)  # somewhere in a step, or in a checkpoint
        process.kill()
        for folder in output.glob("checkpoint-*[0-9]"):
            AutoModelForImageTextToText.from_pretrained(folder)
    launch(*flags, "--output_dir", output, "--resume_from_checkpoint", "auto", ranks=ranks)
    assert_same_run(tmp_path / "whole", output)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [
        "checkpoint-grpo-2",
        "checkpoint-grpo-4",
    ]  # --save_total_limit 2
    assert not list(output.glob("*.unfinished"))
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    done = launch(*flags, "--output_dir", output, "--resume_from_checkpoint", "auto", ranks=ranks)
    assert "holds a finished run" in done.stdout + done.stderr and before == {
        path: path.stat().st_mtime_ns for path in output.rglob("*")
    }
    if (
        ranks == 1
    ):  # from an older one, which has to go on from there and not from what came after it
        (output / "result.json").unlink()
        done = launch(
            *flags,
            "--output_dir",
            output,
            "--resume_from_checkpoint",
            output / "checkpoint-grpo-2",
            "--decode_timeout",
            99,
        )
        assert (
            "removing" in done.stdout
            and "--decode_timeout 99.0, before it was 300.0" in done.stdout
        )
        assert_same_run(tmp_path / "whole", output)
        (output / "result.json").unlink()
        for more, words in (
            (["--seed", 1], "was written with another --seed (0)"),
            (["--output_dir", tmp_path / "x"], "belongs to the run"),
        ):
            assert words in complain(
                *flags,
                "--output_dir",
                output,
                "--resume_from_checkpoint",
                output / "checkpoint-grpo-2",
                *more,
            )


def test_sigterm_saves_and_the_run_goes_on(small_toy, first_run, tmp_path):
    flags = [
        "--toy_dir",
        small_toy,
        "--model_name_or_path",
        first_run[0] / "sft",
        *FLAGS,
        "--save_steps",
        0,
        "--max_steps",
        6,
        "--per_device_train_batch_size",
        2,
    ]
    launch(*flags, "--output_dir", tmp_path / "whole", ranks=2)
    output = tmp_path / "stopped"
    process = start_launcher(*flags, "--output_dir", output, ranks=2)
    wait_for(process, lambda: lines(output / "metrics.jsonl") >= 2)
    os.killpg(
        process.pid, signal.SIGTERM
    )  # as a scheduler does; DeepSpeed's launcher then sends its ranks another
    said, _ = process.communicate(timeout=120)
    (folder,) = output.glob("checkpoint-*")
    step = int(folder.name.rpartition("-")[2])
    assert (
        f"stopped by SIGTERM after step {step} of 6 of grpo; --resume_from_checkpoint auto goes on"
        in said
        and 2 <= step < 6
    )
    assert "holds an earlier run" in complain(*flags, "--output_dir", output)
    assert "was written by 2 processes" in complain(
        *flags, "--output_dir", output, "--resume_from_checkpoint", folder
    )
    assert "is not a checkpoint" in complain(
        *flags, "--output_dir", tmp_path / "no", "--resume_from_checkpoint", first_run[0] / "sft"
    )
    launch(*flags, "--output_dir", output, "--resume_from_checkpoint", folder, ranks=2)
    assert_same_run(tmp_path / "whole", output)


def test_a_full_disk_leaves_the_checkpoint_before(small_toy, first_run, tmp_path):
    output = tmp_path / "out"
    process = start(
        "--toy_dir",
        small_toy,
        "--model_name_or_path",
        first_run[0] / "sft",
        *FLAGS,
        "--max_steps",
        60,
        "--output_dir",
        output,
        "--per_device_train_batch_size",
        2,
    )
    wait_for(process, lambda: (output / "checkpoint-grpo-2").exists())
    # From now on no file gets longer than 1 MB.
    (rank,) = process.processes
    resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    done = process.wait(timeout=120)
    assert done.returncode == 2
    message = next(
        line for line in done.stderr.splitlines() if line.startswith("train.py: error: checkpoint ")
    )
    assert "could not be written" in message and "the last whole checkpoint is" in message
    kept = list(output.glob("checkpoint-*"))
    assert not list(output.glob("*.unfinished"))
    assert (
        kept
        and f"{sorted(kept, key=lambda path: int(path.name.rpartition('-')[2]))[-1]}" in message
    )
    for folder in kept:
        AutoModelForImageTextToText.from_pretrained(folder)


def test_a_loss_that_is_no_number_ends_the_run(small_toy, first_run, tmp_path):
    line = complain(
        "--toy_dir",
        small_toy,
        "--model_name_or_path",
        first_run[0] / "sft",
        *FLAGS,
        "--max_steps",
        6,
        "--output_dir",
        tmp_path / "out",
        "--per_device_train_batch_size",
        2,
        "--learning_rate",
        1e30,
        "--max_grad_norm",
        0,
    )
    assert (
        " is nan in step" in line and "questions " in line and "there is no checkpoint yet" in line
    )


def videos(small_toy, count):
    return [
        row
        for row in json.loads((small_toy / "train.json").read_text())
        if row["data_type"] == "video" and row["options"]
    ][:count]


def test_every_third_item_broken_in_another_way(small_toy, first_run, tmp_path):
    good = videos(small_toy, 8)
    root = tmp_path / "media"
    shutil.copytree(small_toy, root)
    whole = (root / good[0]["path"]).read_bytes()
    for name, content in (
        ("truncated.mp4", whole[: len(whole) // 2]),
        ("empty.mp4", b""),
        ("text.mp4", b"no video " * 99),
    ):
        (root / name).write_bytes(content)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(root / "picture.png")
    breaks = [  # 20 of them, with what the summary calls them
        ({"path": "absent.mp4"}, "no such file"),
        ({"path": "truncated.mp4"}, "not a readable video"),
        ({"path": "empty.mp4"}, "empty file"),
        ({"path": "text.mp4"}, "not a readable video"),
        ({"path": "picture.png"}, "an image where a video was promised"),
        ({"problem": ""}, "has no problem"),
        ({"problem_type": "riddle"}, "has problem_type 'riddle'"),
        ({"solution": ""}, "has no solution"),
        ({"solution": float("nan")}, "has a solution that is neither text nor number"),
        ({"solution": "Z"}, "solution ... names none of the options"),
        (
            {"problem_type": "numerical", "solution": "50%"},
            "has the solution ..., which is not a number",
        ),
        (
            {"problem_type": "regression", "solution": 0},
            "its own solution ... scores ... as regression",
        ),
        ({"problem": "why \ud83d"}, "has no valid Unicode in problem"),
        ({"problem": "why " * 300}, "the prompt has ... tokens (--max_prompt_length ...)"),
    ]
    rows, expected = [], {}
    for index in range(60):
        row = {**good[index % len(good)], "problem_id": f"item {index}"}
        if index % 3 == 2:
            change, cause = breaks[index // 3 % len(breaks)]
            row |= change
            expected[cause] = expected.get(cause, 0) + 1
        rows.append(row)
    (root / "data.json").write_text(json.dumps(rows))
    done = launch(
        "--dataset_name",
        root / "data.json",
        "--model_name_or_path",
        first_run[0] / "sft",
        *FLAGS,
        "--save_steps",
        0,
        "--max_pixels",
        3136,
        "--min_pixels",
        3136,
        "--max_prompt_length",
        400,
        "--prior",
        "no_semantic",
        "--decode_workers",
        1,
        "--output_dir",
        tmp_path / "out",
        "--per_device_train_batch_size",
        5,
        ranks=2,
    )
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    found = {}
    for cause, count in result["skipped_by_cause"].items():
        key = next(words for words in expected if words in cause)
        found[key] = found.get(key, 0) + count
        assert f"{count} skipped: {cause}" in done.stdout
    assert found == expected and sum(found.values()) == len(result["skipped"]) == 20
    assert metrics(tmp_path / "out", "grpo")[-1]["data/skipped"] == 20


def test_images_and_videos_of_all_sizes_do_not_hang(small_toy, first_run, tmp_path):
    rows, rng = [], np.random.default_rng(0)
    shutil.copytree(small_toy, tmp_path / "media")
    for index, row in enumerate(videos(small_toy, 8)):
        picture, clip, size = (
            f"picture{index}.png",
            f"clip{index}.mp4",
            (64 + 32 * (index % 3), 160 - 32 * (index % 4)),
        )
        writer = cv2.VideoWriter(
            str(tmp_path / "media" / clip), cv2.VideoWriter_fourcc(*"mp4v"), 4, size
        )
        for _ in range(16 + 8 * index):  # 4 to 18 seconds
            writer.write(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        writer.release()
        Image.fromarray(
            rng.integers(0, 256, (40 + 30 * index, 200 - 20 * index, 3), dtype=np.uint8)
        ).save(tmp_path / "media" / picture)
        rows += [
            {**row, "problem_id": f"v{index}", "path": clip},
            {**row, "problem_id": f"i{index}", "data_type": "image", "path": picture},
        ]
    (tmp_path / "media" / "data.json").write_text(json.dumps(rows))
    flags = [
        "--dataset_name",
        tmp_path / "media" / "data.json",
        "--model_name_or_path",
        first_run[0] / "sft",
        *FLAGS,
        "--save_steps",
        0,
        "--min_pixels",
        784,
        "--max_pixels",
        12544,
        "--prior",
        "no_semantic",
        "--fps",
        0.5,
        "--decode_workers",
        0,
        "--gradient_accumulation_steps",
        8,
    ]
    # One step with all of them: later a rounding could decide about a token.
    launch(*flags, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", 2)
    launch(*flags, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", 1, ranks=2)
    (one,) = metrics(tmp_path / "one", "grpo")
    (two,) = metrics(tmp_path / "two", "grpo")
    lines = (tmp_path / "one" / "priors_training.jsonl").read_text().splitlines()
    assert len({len(json.loads(line)["frames"]) for line in lines}) >= 3
    for name in ("loss/policy", "reward/total", "loss/grad_norm"):
        assert one[name] == pytest.approx(two[name], abs=1e-4), name


def test_inputs_from_workers_are_those_of_this_process(small_toy, first_run):
    code = """if True:
        import multiprocessing, sys, time, torch
        from common.inputs import Inputs, Ready
        from transformers import AutoProcessor
        from common.media import Encoder, PromptFlags
        from common.data import Prior, load_examples

        class Hangs(Encoder):
            def encode(self, *args, **kwargs):
                time.sleep(100)

        if __name__ == "__main__":
            flags = PromptFlags(min_pixels=3136, max_pixels=3136)
            encoder = Encoder(AutoProcessor.from_pretrained(sys.argv[2]), flags)
            examples = load_examples(sys.argv[1] + "/train.json")[:8]
            row = Prior("0", frames=[0, 20, 40, 60], times=[0.0, 5.0, 10.0, 15.0], prior=[0.25] * 4)
            rows = [row if one.media_type == "video" else None for one in examples]
            orders = [[2, 0, 3, 1] if row else None for row in rows]
            requests = [Ready(*all) for all in zip(range(8), examples, rows, orders)]
            others = [Ready(*all) for all in zip(range(8), examples, rows, orders)]
            inputs, alone = (Inputs(encoder, workers, 60) for workers in (2, 0))
            parts = [requests[:5], requests[5:]]
            taken = [inputs.take(batch) for batch in inputs.each(parts)]
            assert taken == [(part, {}) for part in parts]
            for batch in alone.each([others]):
                alone.take(batch)
            for one, other in zip(requests, others):
                for a, b in ((one.inputs, other.inputs), (one.control, other.control)):
                    assert (a is None) == (b is None)
                    for key, value in (vars(b) if b else {}).items():
                        own = getattr(a, key)
                        assert torch.equal(own, value) if torch.is_tensor(value) else own == value
            for one in requests:
                one.inputs = None
            inputs = Inputs(encoder, 2, 60)
            for batch in inputs.each([requests]):
                time.sleep(0.2)
                for child in multiprocessing.active_children():
                    # as a signal to the whole job does: a worker that dies costs no medium
                    child.terminate()
                assert not inputs.take(batch)[1]
            for one in requests:
                assert one.inputs.times is not None
            slow = Inputs(Hangs(encoder.processor, flags), 1, 0.5)
            for batch in slow.each([requests[:1]]):
                (cause,) = slow.take(batch)[1].values()
                print("not decoded within 0.5 s" in cause)"""
    file = first_run[0].parent / "inputs.py"  # workers import the main module from its file
    file.write_text(code)
    done = run_script(file, small_toy, first_run[0] / "sft")
    assert done.stdout.splitlines()[-1] == "True"


def test_causes_are_counted_without_names_and_numbers():
    causes = {
        "/d/my video 1.mp4: no such file": "no such file",
        "DATA/a b.mp4: no such file": "no such file",
        "/d/x.mp4: not a readable video (Error reading /d/x.mp4...)": (
            "not a readable video (Error reading ..."
        ),
        "row 3 (problem_id a b) has no problem": "has no problem",
        "/d/x.mp4: the prompt has 1,234 tokens (--max_prompt_length 400)": (
            "the prompt has ... tokens (--max_prompt_length ...)"
        ),
    }
    for cause, plain in causes.items():
        assert train.plain_cause(cause) == plain


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (["--len_control", "true"], "--length_bonus"),
        (["--use_vllm=true"], "it samples itself"),
        (["--report_to", "wandb"], '"wandb"'),
        (["--attn_implementation", "flash_attention_2"], "sdpa"),
        (["--aplha", "1"], "unknown: --aplha"),
        (["--num_generations", "1"], "at least 2"),
    ],
)
def test_flags_of_the_releases_are_answered(flag, words):
    assert words in complain(*flag)


def test_the_release_s_own_flags_work(small_toy, first_run, tmp_path):
    launch(
        "--dataset_name",
        small_toy / "train.json",
        "--model_name_or_path",
        first_run[0] / "sft",
        "--output_dir",
        tmp_path / "out",
        "--max_prompt_length",
        16384,
        "--max_completion_length",
        12,
        "--per_device_train_batch_size",
        1,
        "--gradient_accumulation_steps",
        2,
        "--learning_rate",
        1e-6,
        "--beta",
        0.04,
        "--max_grad_norm",
        5,
        "--num_generations",
        2,
        "--temporal",
        "true",
        "--max_pixels",
        401408,
        "--max_steps",
        1,
        "--prior",
        "no_semantic",
        "--decode_workers",
        2,
        ranks=2,
    )
    (record,) = metrics(tmp_path / "out", "grpo")
    assert record["rollout/length"] <= 12
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["ranks"] == 2 and run["versions"]["torch"] and run["command"][0].endswith("train.py")


def test_a_checkpoint_older_than_a_setting_had_its_default(monkeypatch):
    lines = []
    monkeypatch.setattr(checkpoints, "log_main", lines.append)
    arguments = train.TrainArguments(seed=3)
    settings = dataclasses.asdict(arguments)
    del settings["sft_gradient_accumulation_steps"]
    state = {"stage": "sft", "settings": settings}
    checkpoints.compare_settings("folder", state, arguments)
    assert lines == []
    older = {"stage": "sft", "settings": settings | {"packed": False}}
    checkpoints.compare_settings("folder", older, arguments)
    assert lines == ["the checkpoint's --packed False is no setting any more"]
    other = dataclasses.replace(arguments, sft_questions_per_medium=4)
    with pytest.raises(DataError, match=r"another --sft_questions_per_medium \(1\)"):
        checkpoints.compare_settings("folder", state, other)
    other = dataclasses.replace(arguments, sft_gradient_accumulation_steps=2)
    with pytest.raises(DataError, match=r"another --sft_gradient_accumulation_steps \(1\)"):
        checkpoints.compare_settings("folder", state, other)
