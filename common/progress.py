"""How long a run will take, said when it begins and at each of its stages."""

import time

import torch

from common.ranks import log_main

# Seconds of probe() on the machine where the expected seconds of stages were measured.
PROBE_SECONDS = 0.062


def probe():
    """Seconds that a fixed piece of work takes here, the fastest of three."""
    states = torch.ones(2048, 128)
    weights = torch.ones(128, 384)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(20):
            states @ weights
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def minutes(seconds):
    """100 -> "1:40"."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


class Progress:
    """Stages of a run, and the seconds that each is expected to take.

    The first estimate scales what the stages took elsewhere by the speed of this machine; later
    ones by what the finished stages took here.
    """

    def __init__(self, stages):
        """stages: {name: seconds elsewhere; None where the stage's own bar will tell}, in order."""
        self.left = dict(stages)
        self.count = len(stages)
        self.factor = probe() / PROBE_SECONDS
        self.current = None  # name, expected seconds and beginning of the running stage
        self.spent = 0.0
        self.expected = 0.0  # of the stages that took `spent`
        parts = [f"{name}{self.estimate(' {}', [seconds])}" for name, seconds in stages.items()]
        total = self.estimate("about {} in all: ", stages.values())
        log_main(f"{total}{', '.join(parts)}")

    def estimate(self, words, expected):
        """The words with the minutes that stages take here; "" if one's seconds are unknown."""
        expected = list(expected)
        return "" if None in expected else words.format(minutes(sum(expected) * self.factor))

    def start(self, name):
        """Ends the running stage and begins one of those that are left, if it is."""
        if name not in self.left:
            return
        now = time.perf_counter()
        if self.current and self.current[1]:
            self.spent += now - self.current[2]
            self.expected += self.current[1]
            self.factor = self.spent / self.expected
        number = self.count - len(self.left) + 1
        left = self.estimate("; {} left in all", self.left.values())
        expected = self.left.pop(name)
        self.current = (name, expected, now)
        log_main(f"stage {number} of {self.count}, {name}{self.estimate(': {}', [expected])}{left}")
