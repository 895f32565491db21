"""Ranks of a run: how they start, talk and agree."""

import math
import os
import socket
import tempfile
from pathlib import Path

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from tqdm import tqdm

from common.data import DataError


def is_main():
    return dist.get_rank() == 0


def say(text):
    if is_main():
        tqdm.write(text)


named = set()  # what name_skipped() has said


def name_skipped(causes):
    """Says what cannot be used, {problem_id: cause}: each once a run, whatever stage, epoch or file it comes from."""
    for problem, cause in causes.items():
        if (problem, cause) not in named:
            named.add((problem, cause))
            say(f"skipped {problem}: {cause}")


def share_skipped(found, skipped):
    """Adds what every rank has just found to be unusable, {problem_id: cause}, to `skipped` on all of them, and names it."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    for causes in everyone:
        skipped.update(causes)
        name_skipped(causes)


def agree(count, device):
    """-> (fewest, all) usable examples over the ranks, so that every rank skips a micro-batch or none does."""
    fewest, total = torch.tensor([count], device=device), torch.tensor([count], device=device)
    dist.all_reduce(fewest, op=dist.ReduceOp.MIN)
    dist.all_reduce(total)
    return int(fewest), int(total)


def average(values, device):
    """Means over the values of all ranks.

    Args:
        values: {name: list of this rank's values}; ranks may have different names.
    Returns:
        {name: mean}, in the order of rank 0; names without a value are left out.
    """
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, list(values))
    names = list(dict.fromkeys(name for own in everyone for name in own))
    table = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for row, name in enumerate(names):
        own = values.get(name, [])
        table[row] = torch.tensor([sum(own), len(own)], dtype=torch.float64)
    dist.all_reduce(table)
    means = {}
    for name, (total, count) in zip(names, table.tolist(), strict=True):
        if count > 0:
            means[name] = total / count
    return means


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def own_port():
    """A free port for the ranks of one deepspeed launcher on one machine.

    The launcher gives every run the same port unless --master_port says another. The ranks of a run
    agree on one of their own in a file named after their launcher's process.

    Returns:
        str, or None: another launcher, more than one machine, or a port that the user chose.
    """
    default = str(TORCH_DISTRIBUTED_DEFAULT_PORT)
    if os.environ.get("CROSS_SIZE") != "1" or os.environ["MASTER_PORT"] != default:
        return None
    parents = psutil.Process().parents()
    launchers = [one for one in parents if "deepspeed.launcher.launch" in one.cmdline()]
    if not launchers:
        return None
    name = f"ranks-{launchers[0].pid}-{launchers[0].create_time()}"
    file = Path(tempfile.gettempdir()) / name
    # The store removes its file when the last rank lets go of it.
    store = dist.FileStore(str(file), int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] == "0":
        store.set("port", free_port())
    return store.get("port").decode()


def start_ranks():
    """One process alone is a world of one, on any free port; the deepspeed launcher or torchrun set these variables themselves."""
    # Ranks that something else started without a port have to guess the same one.
    port = "29511" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else free_port()
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", port),
    ):
        os.environ.setdefault(name, value)
    os.environ["MASTER_PORT"] = own_port() or os.environ["MASTER_PORT"]
    if torch.cuda.is_available():
        torch.cuda.set_device(
            int(os.environ["LOCAL_RANK"])
        )  # NCCL's first collective comes before any engine
    deepspeed.init_distributed()
    if not torch.cuda.is_available():
        torch.set_flush_denormal(
            True
        )  # a CPU computes with denormal numbers a hundred times slower
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(
                max(
                    1,
                    os.cpu_count()
                    // int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())),
                )
            )


def on_main_first(work):
    """work() on rank 0, then on the others, which find what it made. An error on rank 0 ends all ranks with its message."""
    outcome = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except DataError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise DataError(outcome[1])
    return outcome[0]


def check_finite(value, what):
    if not math.isfinite(value):
        raise FloatingPointError(f"the {what} is {value}")
