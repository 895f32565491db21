"""One pool of worker processes, and JSON-lines files that one or several ranks extend.

pool = Pool(workers=8, timeout=300.0)
task = pool.submit(function, *args)                  # and later pool.result(task, path), or
for medium, value in pool.each(function, media):     # results as they finish
    ...
pool.stop()

rank, world = join_ranks()
lines = ShardedLines("output.jsonl", rank, world)    # with what an earlier run left
lines.append(rows)
lines.close()                                        # rank 0 joins the shards of all ranks
"""

import atexit
import glob
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from multiprocessing import forkserver
from pathlib import Path

import cv2
import torch
import torch.distributed as dist
from pebble import ProcessExpired, ProcessPool

from common.data import DataError, MediaError

# Slow imports of the workers, done once in the process that they fork from.
PRELOAD = ["av", "cv2", "open_clip", "pebble", "scenedetect", "torch", "transformers"]
# A worker imports the main module; these only where that has them.
PRELOAD_IF_LOADED = ["accelerate", "deepspeed", "matplotlib.figure", "tokenizers", "torchvision"]

TASKS_PER_WORKER = 1000  # then it is replaced, since decoders leak memory


def start_server():
    """Starts the process that workers fork from, which has neither threads nor CUDA.

    Its imports take as long as those of this process; called early, they are done meanwhile.
    """
    loaded = [name for name in PRELOAD_IF_LOADED if name in sys.modules]
    forkserver.set_forkserver_preload(PRELOAD + loaded)
    forkserver.ensure_running()


def exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def start_worker(initializer):
    """Prepares a worker process: one thread per library; it exits with its parent."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    # Ctrl-C reaches the parent, which stops the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    if initializer is not None:
        initializer()


@dataclass(eq=False)
class Task:
    """A call under way in a worker (future), or, without workers, to be made for its result."""

    function: Callable
    args: tuple
    future: Future | None = None
    processes: ProcessPool | None = None


class Pool:
    """Worker processes that decode; one that hangs or dies costs its medium and is replaced.

    Args:
        workers: number of processes; 0: calls run in this process, without a timeout.
        timeout: seconds that a call may take.
        initializer: function that is called once in every worker.
    """

    def __init__(self, workers, timeout, initializer=None):
        self.workers = workers
        self.timeout = timeout
        self.initializer = initializer
        self.processes = None
        self.lock = threading.Lock()
        if workers > 0:
            self.start()
        elif initializer is not None:
            initializer()

    def start(self):
        start_server()
        self.processes = ProcessPool(
            self.workers,
            max_tasks=TASKS_PER_WORKER,
            initializer=start_worker,
            initargs=[self.initializer],
            context=multiprocessing.get_context("forkserver"),
        )

    def submit(self, function, *args):
        """Begins a call of function(*args); returns its Task."""
        task = Task(function, args)
        if self.processes is not None:
            self.begin(task)
        return task

    def begin(self, task):
        # pebble gives up a pool in which a worker dies between two calls. Any thread may call.
        with self.lock:
            if not self.processes.active:
                self.stop()
                self.start()
        task.processes = self.processes
        task.future = self.processes.schedule(task.function, task.args, timeout=self.timeout)

    def wait(self, tasks):
        """Waits until one of the tasks ends; returns those that have, all without workers.

        Tasks that a lost pool never took begin again.
        """
        if self.processes is None:
            return tasks
        while True:
            futures = [task.future for task in tasks]
            wait(futures, timeout=1.0, return_when=FIRST_COMPLETED)
            done = [task for task in tasks if task.future.done()]
            if done:
                return done
            for task in tasks:
                if not task.processes.active:
                    self.begin(task)

    def result(self, task, medium):
        """Waits for a task and returns its value.

        Args:
            medium: path that messages name.
        Errors: MediaError if the call took too long or its worker died twice; what the call raised.
        """
        if task.future is None:
            return task.function(*task.args)
        deaths = 0  # of its worker
        losses = 0  # of the whole pool, which is not the medium's doing
        while True:
            self.wait([task])
            try:
                return task.future.result()
            except TimeoutError as error:
                raise MediaError(
                    f"{medium}: not decoded within {self.timeout:g} s (--decode_timeout)"
                ) from error
            except ProcessExpired as error:
                # Killed by the medium, or by a signal to the whole job: try once more.
                deaths += 1
                if deaths == 2:
                    raise MediaError(
                        f"{medium}: the decoder died of it (exit code {error.exitcode})"
                    ) from error
            except BrokenProcessPool:
                losses += 1
                if losses == 3:
                    raise
            self.begin(task)

    def each(self, function, media, *args):
        """Calls function(medium, *args) for every Medium, then stops the workers.

        Yields:
            (medium, value or MediaError) in the order in which the calls finish.
        """
        media = iter(media)
        running = {}
        try:
            while True:
                # Enough that no worker idles, few enough to hold their results in memory.
                for medium in islice(media, self.workers + 2 - len(running)):
                    running[self.submit(function, medium, *args)] = medium
                if not running:
                    return
                for task in self.wait(list(running)):
                    medium = running.pop(task)
                    try:
                        value = self.result(task, medium.path)
                    except MediaError as error:
                        value = error
                    yield medium, value
        finally:
            self.stop()

    def stop(self):
        """Ends the workers, whatever they are doing."""
        if self.processes is not None:
            self.processes.stop()
            self.processes.join()


@contextmanager
def writing(path):
    """Names the file that a block writes: the error of a full disk does not.

    Errors: DataError in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error


def write_whole(path, parts):
    """Writes chunks of bytes to a file, which has all of them or does not change."""
    unfinished = Path(f"{path}.tmp")
    with writing(path):
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            file.writelines(parts)
        unfinished.replace(path)


def write_json(path, document):
    """Writes a dict as indented JSON by write_whole."""
    write_whole(path, [json.dumps(document, indent=1).encode()])


def to_line(row):
    """A line of JSON as bytes; a dataclass becomes an object of its fields in order."""
    return f"{json.dumps(row, default=vars)}\n".encode()


def write_lines(path, rows):
    """Writes rows (dicts or dataclasses) as JSON lines by write_whole."""
    write_whole(path, map(to_line, rows))


def join_shards(path):
    """Moves the lines of a file's shards into it, drops repeated lines and a torn last one.

    Errors: DataError if it is some other file, which stays as it is.
    """
    shards = sorted(path.parent.glob(f"{glob.escape(path.name)}.shard*"))
    if not shards and not path.exists():
        return
    lines = {}  # in order, each once
    for file in (path, *shards):
        text = file.read_bytes() if file.exists() else b""
        if text[:2] not in (b"", b"{", b'{"'):
            raise DataError(f"{file} is there, but not of this program; choose another --output")
        whole = text[: text.rfind(b"\n") + 1]
        lines.update(dict.fromkeys(whole.splitlines(keepends=True)))
    write_whole(path, lines)
    for file in shards:
        file.unlink()


# Where launchers say how many processes they started: srun, Open MPI, and MPICH with its kin.
STARTED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def check_launcher():
    """Errors: DataError if a launcher started processes that would be a run each, in one folder."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    for name in STARTED:
        count = int(os.environ.get(name, 1))
        if count > ranks:
            raise DataError(
                f"{count} processes were started ({name}), each a run of {ranks} rank(s) by "
                "itself: start ranks by torchrun (srun torchrun, docs/training.md) or deepspeed"
            )


def join_ranks():
    """Joins the ranks that torchrun or deepspeed started, for the barriers of ShardedLines.

    Returns:
        rank, number of ranks; 0, 1 for one process.
    Errors: DataError if another launcher started several.
    """
    check_launcher()
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if "MASTER_ADDR" not in os.environ:
            raise DataError(
                "RANK and WORLD_SIZE are set without MASTER_ADDR; start ranks by torchrun or "
                "deepspeed"
            )
        # Ranks finish at different times.
        dist.init_process_group("gloo", timeout=timedelta(days=30))
        atexit.register(dist.destroy_process_group)
    return rank, world


class ShardedLines:
    """A JSON-lines file that a run of one or several ranks extends, also one that a kill cut short.

    Several ranks append to one shard each; rank 0 joins them into the file. All ranks construct,
    replace and close it together.

    Args:
        path: file of the joined lines.
        rank, world: as join_ranks returns them.
    """

    def __init__(self, path, rank, world):
        self.path = Path(path)
        self.rank = rank
        self.world = world
        self.shard = self.path
        if world > 1:
            self.shard = Path(f"{path}.shard{rank}")
        self.file = None
        # An earlier run may have left shards.
        if rank == 0:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            join_shards(self.path)
        self.barrier()

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def replace(self, rows):
        """Replaces all rows of the file by rank 0's `rows`, when every rank has read it."""
        self.barrier()
        if self.rank == 0:
            write_lines(self.path, rows)
        self.barrier()

    def append(self, rows):
        """Adds rows of this rank; they survive a kill from the moment it returns."""
        with writing(self.shard):
            # Kept open, so that a rank whose launcher was killed does not make a shard anew.
            if self.file is None:
                self.file = open(self.shard, "ab", buffering=0)
            lines = b"".join(map(to_line, rows))
            # An unbuffered file may take a part.
            while lines:
                lines = lines[self.file.write(lines) :]

    def close(self):
        """Waits for the other ranks; then rank 0 joins the shards."""
        if self.file is not None:
            self.file.close()
        self.barrier()
        if self.rank == 0 and self.world > 1:
            join_shards(self.path)


def check_settings(path, made_with, settings, remedy):
    """Compares a row's recorded settings with this run's.

    Errors: DataError with the first of `settings` that differs, and the remedy.
    """
    for name, value in settings.items():
        made = made_with.get(name)
        if made != value:
            raise DataError(f"{path} was made with --{name} {made}, this run has {value}; {remedy}")
