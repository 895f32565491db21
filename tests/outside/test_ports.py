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
        SimpleNamespace(pid=launcher + 1, cmdline=lambda: ["bash", "-c", "train.py"]),
        SimpleNamespace(pid=launcher, cmdline=lambda: command),
    ]
    return SimpleNamespace(Process=lambda: SimpleNamespace(parents=lambda: parents))


@pytest.fixture
def port(monkeypatch):
    """port(launcher, **changes): MASTER_PORT of a rank that this launcher started."""

    def own(launcher, **changes):
        monkeypatch.setattr(ranks, "psutil", processes(launcher))
        for name, value in (LAUNCHED | changes).items():
            monkeypatch.setenv(name, value or "")
            if value is None:
                monkeypatch.delenv(name)
        ranks.own_port()
        return os.environ["MASTER_PORT"]

    return own


def test_ranks_of_a_launcher_agree_and_launchers_differ(port):
    first = port(70_000_001)
    assert port(70_000_001, RANK="1") == first != port(70_000_011)
    assert 20_000 <= int(first) < 32_000


@pytest.mark.parametrize(
    "change", [{"MASTER_PORT": "29501"}, {"CROSS_SIZE": "2"}, {"CROSS_SIZE": None}]
)
def test_a_port_that_was_given_stays(change, port):
    assert port(70_000_001, **change) == change.get("MASTER_PORT", "29500")


def start(rank, queue):
    os.environ.update(LAUNCHED, RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    ranks.psutil = processes(70_000_021)
    ranks.start_ranks()
    torch.distributed.barrier()
    queue.put(os.environ["MASTER_PORT"])
    torch.distributed.destroy_process_group()


def test_ranks_start_on_their_own_port():
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    started = []
    for rank in range(2):
        process = context.Process(target=start, args=(rank, queue))
        process.start()
        started.append(process)
    # DeepSpeed may have to compile an op first.
    first, second = [queue.get(timeout=300) for _ in started]
    assert first == second != "29500"
    for process in started:
        process.join()
