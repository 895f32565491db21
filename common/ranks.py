"""Ranks of a run, one process per accelerator: how they start, log and decide together.

start_ranks()
log_main(f"{count} questions")                 # rank 0 alone
metrics = average(values, device)              # over all ranks
"""

import math
import os
import socket
import tempfile
from itertools import chain
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


def log_main(text):
    """Prints a line on rank 0, above its progress bars."""
    if is_main():
        tqdm.write(text)


named = set()  # (problem_id, cause) of name_skipped()


def name_skipped(causes):
    """Logs unusable questions {problem_id: cause}, each once in the life of the process."""
    for problem, cause in causes.items():
        if (problem, cause) not in named:
            named.add((problem, cause))
            log_main(f"skipped {problem}: {cause}")


def share_skipped(found, skipped):
    """Adds the questions that any rank found unusable to `skipped` on all ranks, and logs them.

    Args:
        found: {problem_id: cause} of this rank; all ranks call at the same time.
        skipped: {problem_id: cause} of the run.
    """
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    for causes in everyone:
        skipped.update(causes)
        name_skipped(causes)


def fewest_on_any_rank(count, device):
    """Smallest count of usable examples of any rank: all ranks skip a micro-batch, or none does.

    Returns:
        fewest, total: ints over the ranks.
    """
    fewest = torch.tensor([count], device=device)
    total = fewest.clone()
    dist.all_reduce(fewest, op=dist.ReduceOp.MIN)
    dist.all_reduce(total)
    return int(fewest), int(total)


def average(values, device):
    """Means over the values of all ranks.

    Args:
        values: {name: list of this rank's numbers}; ranks may have different names.
    Returns:
        {name: mean} of the names with at least one value, in rank 0's order, then the other ranks'.
    """
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, list(values))
    names = list(dict.fromkeys(chain(*everyone)))
    rows = []
    for name in names:
        numbers = values.get(name, [])
        rows.append([sum(numbers), len(numbers)])
    table = torch.tensor(rows, dtype=torch.float64, device=device)  # (names, 2)
    dist.all_reduce(table)
    means = {}
    for name, (total, count) in zip(names, table.tolist(), strict=True):
        if count > 0:
            means[name] = total / count
    return means


def free_port():
    """A port of this machine that nobody listens on, as text."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launcher_file():
    """File through which the ranks of one deepspeed launcher on one machine agree on a port.

    Without --master_port the launcher gives every run the same port.

    Returns:
        Path named after the launcher's process; None under another launcher, on several machines,
        or if the user chose a port.
    """
    default = str(TORCH_DISTRIBUTED_DEFAULT_PORT)
    if os.environ.get("CROSS_SIZE") != "1" or os.environ["MASTER_PORT"] != default:
        return None
    parents = psutil.Process().parents()
    launchers = [one for one in parents if "deepspeed.launcher.launch" in one.cmdline()]
    if not launchers:
        return None
    name = f"ranks-{launchers[0].pid}-{launchers[0].create_time()}"
    return Path(tempfile.gettempdir()) / name


def own_port(file):
    """Port that rank 0 found free and the others read from the file, as text."""
    # Without a number of workers the store leaves its file: two ranks that let go of it at once
    # may both leave it anyway.
    store = dist.FileStore(str(file))
    if os.environ["RANK"] == "0":
        store.set("port", free_port())
    return store.get("port").decode()


def start_ranks():
    """Joins the ranks that deepspeed or torchrun started; one process alone is one rank."""
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=free_port())
    file = launcher_file()
    if file is not None:
        os.environ["MASTER_PORT"] = own_port(file)
    if torch.cuda.is_available():
        # NCCL's first collective comes before any engine.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    # All ranks are there, so all have read the port.
    if file is not None and is_main():
        file.unlink(missing_ok=True)
    if torch.cuda.is_available():
        return
    # A CPU computes with denormal numbers a hundred times slower.
    torch.set_flush_denormal(True)
    if "OMP_NUM_THREADS" not in os.environ:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        torch.set_num_threads(max(1, os.cpu_count() // ranks))


def on_main_first(work):
    """Calls work() on rank 0 while the others wait.

    Returns:
        What it returned, on all ranks.
    Errors: DataError on all ranks if it raised one.
    """
    outcome = [None, None]  # value, message
    if is_main():
        try:
            outcome[0] = work()
        except DataError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    value, message = outcome
    if message is not None:
        raise DataError(message)
    return value


def check_finite(value, what):
    """FloatingPointError if a number is nan or infinite."""
    if not math.isfinite(value):
        raise FloatingPointError(f"the {what} is {value}")
