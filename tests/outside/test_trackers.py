"""What W&B and TensorBoard hold after a run, read back from their own files.

The run has the DeepSpeed file with the most offloading, as Video-R1 has it: a real run of that too.
"""

import json
import os
import struct
from types import SimpleNamespace

import pytest
from conftest import SMALL, launch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_deepspeed_files import FILES
from wandb.proto import wandb_internal_pb2

from common import engine


@pytest.fixture(scope="module")
def run(small_toy, tmp_path_factory):
    """Folder with out/ (two steps of SFT, two of GRPO), tb/, csv/ and wandb/; the run's words."""
    folder = tmp_path_factory.mktemp("trackers")
    config = FILES["both offloaded, as Video-R1's zero3_offload"] | {
        "tensorboard": {"enabled": True, "output_path": str(folder / "tb"), "job_name": "run"},
        "csv_monitor": {"enabled": True, "output_path": str(folder / "csv"), "job_name": "run"},
        "wandb": {"enabled": True, "project": "frames"},
    }
    (folder / "file.json").write_text(json.dumps(config))
    done = launch(
        "--toy_dir",
        small_toy,
        "--output_dir",
        folder / "out",
        *SMALL,
        "--per_device_train_batch_size",
        4,
        "--ema_decay",
        0.9,
        "--ema_steps",
        1,
        "--deepspeed",
        folder / "file.json",
        env={"WANDB_MODE": "offline", "WANDB_DIR": str(folder)},
    )
    return folder, done.stdout + done.stderr


@pytest.fixture(scope="module")
def expected(run):
    """{label: [(step, value)]} by hand: SFT's two steps are 0 and 1, GRPO's 2 and 3."""
    table = {}
    for line in (run[0] / "out" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record["step"] + {"sft": 0, "grpo": 2}[record["stage"]]
        for name in record.keys() - {"stage", "step"}:
            table.setdefault(f"{record['stage']}/{name}", []).append((step, record[name]))
    assert [step for step, _ in table["sft/loss/sft"]] == [0, 1]
    assert [step for step, _ in table["grpo/reward/total"]] == [2, 3]
    return table


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for label, points in expected.items():
        assert [step for step, _ in found[label]] == [step for step, _ in points], label
        assert [value for _, value in found[label]] == pytest.approx(
            [value for _, value in points], rel=1e-5
        ), label


def test_tensorboard_has_one_file_with_every_metric(run, expected):
    (file,) = (run[0] / "tb").rglob("events.out.*")
    events = EventAccumulator(str(file)).Reload()
    assert_same(
        {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        },
        expected,
    )


def test_csv_files_have_every_metric(run, expected):
    found = {}
    for label in expected:
        _, *lines = (run[0] / "csv" / "run" / f"{label.replace('/', '_')}.csv").read_text().split()
        found[label] = [
            (int(step), float(value)) for step, value in (line.split(",") for line in lines)
        ]
    assert_same(found, expected)


def wandb_records(file):
    """Of a W&B file: LevelDB's log format after 7 bytes of its own.

    A record's pieces are whole (1), first (2), middle (3) or last (4).
    """
    data = file.read_bytes()
    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # no room for a header at the end of a block
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb_has_one_run_with_every_metric(run, expected):
    (file,) = (run[0] / "wandb").glob("offline-run-*/*.wandb")
    records = list(wandb_records(file))
    (start,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    (file,) = (run[0] / "out").glob("checkpoint-grpo-*/state.json")
    state = json.loads(file.read_text())
    assert (start.run_id, start.project) == (state["wandb_run_id"], "frames")
    found = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or item.nested_key[0]: json.loads(item.value_json)
                for item in record.history.item
            }
            for label, value in values.items():
                if not label.startswith("_"):
                    found.setdefault(label, []).append((values["_step"], value))
    assert_same(found, expected)
    assert "step must" not in run[1].lower() and "monoton" not in run[1]


def test_the_learning_rate_is_in_every_record(run, expected):
    """Of two steps the warm-up and the fall take one each, and both begin with the peak."""
    settings = json.loads((run[0] / "out" / "run.json").read_text())
    for stage, peak in (
        ("sft", settings["sft_learning_rate"]),
        ("grpo", settings["learning_rate"]),
    ):
        rates = [rate for _, rate in expected[f"{stage}/train/learning_rate"]]
        assert rates == pytest.approx([peak, peak], rel=1e-6)


class Recorder:
    """In place of DeepSpeed's MonitorMaster."""

    def __init__(self, config):
        self.events = []

    def write_events(self, events):
        self.events += events


def test_a_run_that_goes_on_keeps_its_wandb_run_and_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "MonitorMaster", Recorder)
    (tmp_path / "file.json").write_text(json.dumps({"wandb": {"enabled": True}}))
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.setenv(name, "")  # monkeypatch takes it back after the test
        monkeypatch.delenv(name)
    # from the checkpoint after GRPO's first step, with SFT's three steps before it
    tracker = engine.Tracker(SimpleNamespace(deepspeed=tmp_path / "file.json"), "abc", 4)
    for step in (1, 2):
        tracker.show({"stage": "grpo", "step": step, "loss/x": float(step)})
    assert (os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"]) == ("abc", "allow")
    assert tracker.monitor.events == [("grpo/loss/x", 1.0, 4), ("grpo/loss/x", 2.0, 5)]
