"""Ports of runs under the deepspeed launcher, which gives every run on a machine the same one."""

import multiprocessing
import os
from types import SimpleNamespace

import pytest
import torch

from common import ranks

LAUNCHED = {"CROSS_SIZE": "1", "WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "29500"}


def processes(launcher):
    """psutil whose process was started by a shell in a launcher of DeepSpeed."""
    command = ["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "train.py"]
    parents = [
        SimpleNamespace(
            pid=launcher + 1, create_time=lambda: 2.5, cmdline=lambda: ["bash", "-c", "train.py"]
        ),
        SimpleNamespace(pid=launcher, create_time=lambda: 1.5, cmdline=lambda: command),
    ]
    return SimpleNamespace(Process=lambda: SimpleNamespace(parents=lambda: parents))


def run_rank(rank, launcher, folder, queue):
    os.environ.update(LAUNCHED, RANK=str(rank))
    ranks.psutil = processes(launcher)
    ranks.tempfile.tempdir = str(folder)
    queue.put((launcher, ranks.own_port(ranks.launcher_file())))


def test_ranks_of_a_launcher_agree_and_launchers_differ(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [
        context.Process(target=run_rank, args=(rank, launcher, tmp_path, queue))
        for rank in (1, 0)  # rank 0 comes last, the others wait for it
        for launcher in (70_000_001, 70_000_011)
    ]
    for rank in ranks:
        rank.start()
    ports = {}
    for _ in ranks:
        launcher, port = queue.get(timeout=60)
        ports.setdefault(launcher, []).append(port)
    for rank in ranks:
        rank.join()
    first, second = ports.values()
    assert first[0] == first[1] != second[0] == second[1]
    assert 1024 < int(first[0]) < 65536 and "29500" not in (first[0], second[0])
    assert len(list(tmp_path.iterdir())) == 2  # start_ranks() removes them


def start(rank, port, folder, queue):
    os.environ.update(LAUNCHED, RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    ranks.psutil = processes(70_000_021)
    ranks.tempfile.tempdir = str(folder)
    ranks.start_ranks()
    torch.distributed.barrier()
    queue.put((os.environ["MASTER_PORT"] != port, list(folder.iterdir())))
    torch.distributed.destroy_process_group()


def test_started_ranks_leave_no_file(tmp_path):
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    started = []
    for rank in range(2):
        process = context.Process(target=start, args=(rank, "29500", tmp_path, queue))
        process.start()
        started.append(process)
    # DeepSpeed may have to compile an op first.
    assert [queue.get(timeout=300) for _ in started] == [(True, [])] * 2
    for process in started:
        process.join()


@pytest.mark.parametrize(
    "change", [{"MASTER_PORT": "29501"}, {"CROSS_SIZE": "2"}, {"CROSS_SIZE": None}]
)
def test_a_port_that_was_given_stays(change, monkeypatch, tmp_path):
    monkeypatch.setattr(ranks.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(ranks, "psutil", processes(70_000_001))
    for name, value in (LAUNCHED | {"WORLD_SIZE": "1"} | change).items():
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    assert ranks.launcher_file() is None and not list(tmp_path.iterdir())
