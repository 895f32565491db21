"""common/progress.py: estimates by hand."""

from types import SimpleNamespace

import pytest

from common import progress as progress_module
from common.progress import Progress, minutes


@pytest.fixture
def lines(monkeypatch):
    """What is logged; the machine is half as fast as the one that the seconds are of."""
    logged = []
    monkeypatch.setattr(progress_module, "log_main", logged.append)
    monkeypatch.setattr(progress_module, "probe", lambda: 2 * progress_module.PROBE_SECONDS)
    return logged


def at(monkeypatch, second):
    clock = SimpleNamespace(perf_counter=lambda: second)
    monkeypatch.setattr(progress_module, "time", clock)


def test_minutes():
    assert [minutes(seconds) for seconds in (0, 59.4, 59.6, 100)] == [
        "0:00",
        "0:59",
        "1:00",
        "1:40",
    ]


def test_a_run_says_at_once_how_long_it_will_take_and_corrects_itself(lines, monkeypatch):
    progress = Progress({"toy": 10, "SFT": 50, "score": 5})
    at(monkeypatch, 100.0)
    progress.start("toy")
    at(monkeypatch, 130.0)  # three times as long as elsewhere
    progress.start("GRPO")  # no stage of this run
    progress.start("SFT")
    at(monkeypatch, 190.0)  # 60 s for SFT's 50: 90 s for 60 in all
    progress.start("score")
    assert lines == [
        "about 2:10 in all: toy 0:20, SFT 1:40, score 0:10",
        "stage 1 of 3, toy: 0:20; 2:10 left in all",
        "stage 2 of 3, SFT: 2:30; 2:45 left in all",
        "stage 3 of 3, score: 0:08; 0:08 left in all",
    ]


def test_stages_of_unknown_length_are_named(lines, monkeypatch):
    progress = Progress({"priors": 0, "GRPO": 0})
    progress.start("priors")
    progress.start("GRPO")
    assert lines == ["priors, GRPO", "stage 1 of 2, priors", "stage 2 of 2, GRPO"]
