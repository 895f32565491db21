"""How long a run will take, said when it begins and at each of its stages."""

import time
import timeit
from statistics import median

import torch

from common.ranks import log_main

# Seconds of probe() on the machine where the expected seconds of stages were measured.
PROBE_SECONDS = 0.00017


def probe():
    """Seconds that a fixed piece of work takes on one core here, the median of 60.

    Several threads would wait for each other where anything else runs, workers that start, too.
    """
    numbers = torch.ones(1 << 14)  # too few for a second thread
    return median(timeit.repeat(numbers.exp, number=20, repeat=60))


def minutes(seconds):
    """100 -> "1:40"."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


class Progress:
    """Stages of a run, and the seconds that each is expected to take.

    The first estimate scales what the stages took elsewhere by the speed of this machine; later
    ones by what the finished stages took here.
    """

    def __init__(self, stages):
        """stages: {name: seconds elsewhere; 0 where the stage's own bar will tell}, in order."""
        self.left = dict(stages)
        self.count = len(stages)
        self.factor = probe() / PROBE_SECONDS
        self.begin = 0.0  # of the first stage
        self.expected = 0  # seconds elsewhere of the stages since then
        parts = [f"{name}{self.here(' {}', seconds)}" for name, seconds in stages.items()]
        total = self.here("about {} in all: ", sum(stages.values()))
        log_main(f"{total}{', '.join(parts)}")

    def here(self, words, seconds):
        """The words with the minutes that seconds elsewhere are here; "" for 0."""
        return words.format(minutes(seconds * self.factor)) if seconds else ""

    def start(self, name):
        """Ends the running stage and begins one of those that are left, if it is."""
        if name not in self.left:
            return
        now = time.perf_counter()
        if self.expected:
            self.factor = (now - self.begin) / self.expected
        else:
            self.begin = now
        number = self.count - len(self.left) + 1
        left = self.here("; {} left in all", sum(self.left.values()))
        seconds = self.left.pop(name)
        self.expected += seconds
        log_main(f"stage {number} of {self.count}, {name}{self.here(': {}', seconds)}{left}")
