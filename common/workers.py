"""Worker processes, and JSON-lines files that several ranks write."""

import json
import multiprocessing
import os
import signal
import socket
import threading
from pathlib import Path

import cv2
import torch

CORE_CLAIM = "videocfr-prior-core-"  # and its number: who decodes there


def take_core():
    """Keeps this process on one core that no other worker has, if one is left; not under a quota of cores, which does not say which ones.

    Why: decord decodes in a thread of its own. Where the scheduler moves the threads of two workers over the cores, both took 1.6 times as
    long (README, Building priors). Other containers of the machine are not seen (--pin_workers).
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else []  # Linux only
    for core in sorted(cores) if len(cores) == cv2.getNumberOfCPUs() else []:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(
                f"\0{CORE_CLAIM}{core}"
            )  # an abstract name: one process has it, until it ends
        except OSError:
            claim.close()
            continue
        claim.detach()
        os.sched_setaffinity(0, {core})
        return


def start_worker(pin=True):
    """A decoding process: one thread a library, and no life without the process that it works for."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if pin:
        take_core()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that it works for
    threading.Thread(
        target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True
    ).start()


def write_whole(path, parts):
    """A file of these bytes, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(f"{path}.tmp")
    with open(unfinished, "wb") as file:
        file.writelines(parts)
    unfinished.replace(path)


def write_lines(path, rows):
    """Rows -> JSON lines, whole or not at all."""
    write_whole(path, (f"{json.dumps(row)}\n".encode() for row in rows))


def append_lines(file, rows):
    """Rows at the end of an unbuffered binary file."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    while lines:
        lines = lines[file.write(lines) :]


def shards(path):
    """What ranks have written aside for a file."""
    return sorted(
        file for file in path.parent.iterdir() if file.name.startswith(f"{path.name}.shard")
    )


def join_shards(path):
    """A file and its shards -> one file of whole lines: a kill can have torn the last one of each."""
    lines, aside = {}, shards(path)
    if not aside and not path.exists():
        return
    for file in (path, *aside):
        text = file.read_bytes() if file.exists() else b""
        lines.update(dict.fromkeys(text[: text.rfind(b"\n") + 1].splitlines(keepends=True)))
    write_whole(path, lines)
    for file in aside:
        file.unlink()
