"""Ranks of a run, one process per accelerator: how they start, log and decide together.

start_ranks()
log_main(f"{count} questions")                 # rank 0 alone
metrics = average(values)                      # over all ranks
"""

import os
from datetime import timedelta
from itertools import chain

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from tqdm import tqdm

from common.data import DataError
from common.workers import check_launcher


def is_main():
    return dist.get_rank() == 0


def log_main(text):
    """Prints a line on rank 0, above its progress bars."""
    if is_main():
        tqdm.write(text)


named = set()  # (problem_id, cause) of name_skipped()


def name_skipped(causes):
    """Logs unusable examples {problem_id: cause}, each once in the life of the process."""
    for problem, cause in causes.items():
        if (problem, cause) not in named:
            named.add((problem, cause))
            log_main(f"skipped {problem}: {cause}")


# Group of all ranks that waits for rank 0's long work; None is the group of all collectives, which
# gives a silent rank up after some minutes.
patient = None


def gather(value, group=None):
    """List of every rank's value, on all ranks; any object that pickle takes."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value, group)
    return everyone


def lend(value, source):
    """The value of rank `source`, on all ranks; not by way of their accelerators."""
    box = [value]
    dist.broadcast_object_list(box, source, patient)
    return box[0]


def wait_for_all():
    """Returns when all ranks have come here, however long rank 0 has worked alone."""
    dist.barrier(patient)


def average(values):
    """Means over the values of all ranks.

    Args:
        values: {name: list of this rank's numbers}; ranks may have different names.
    Returns:
        {name: mean} of the names with at least one value, in rank 0's order, then the other ranks'.
    """
    everyone = gather(values)
    means = {}
    for name in dict.fromkeys(chain.from_iterable(everyone)):
        # Sums of the ranks in their order, so that the mean is the same on all of them.
        parts = [own.get(name, []) for own in everyone]
        count = sum(map(len, parts))
        if count > 0:
            means[name] = sum(map(sum, parts)) / count
    return means


def own_port():
    """Sets a port that the ranks of one deepspeed launcher share and other runs do not.

    Without --master_port the launcher gives every run on a machine the same port.
    """
    default = str(TORCH_DISTRIBUTED_DEFAULT_PORT)
    if os.environ.get("CROSS_SIZE") == "1" and os.environ["MASTER_PORT"] == default:
        for parent in psutil.Process().parents():
            if "deepspeed.launcher.launch" in parent.cmdline():
                # Below the ports that systems hand out.
                os.environ["MASTER_PORT"] = str(20_000 + parent.pid % 12_000)


def start_ranks():
    """Joins the ranks that deepspeed or torchrun started; one process alone is one rank.

    Errors: DataError if another launcher started several.
    """
    global patient
    check_launcher()
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        # 0: some port that nobody listens on.
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    own_port()
    if torch.cuda.is_available():
        # NCCL's first collective comes before any engine.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    if torch.cuda.is_available():
        return
    # A CPU computes with denormal numbers a hundred times slower.
    torch.set_flush_denormal(True)
    if "OMP_NUM_THREADS" not in os.environ:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        torch.set_num_threads(max(1, os.cpu_count() // ranks))


def on_main_first(work):
    """Calls work() on rank 0 while the others wait, hours if need be.

    Returns:
        What it returned, on all ranks.
    Errors: DataError on all ranks if it raised one.
    """
    # A message instead of an exception, which would leave the other ranks waiting.
    value = None
    message = None
    if is_main():
        try:
            value = work()
        except DataError as error:
            message = str(error)
    value, message = gather((value, message), patient)[0]
    if message is not None:
        raise DataError(message)
    return value
