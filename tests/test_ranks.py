"""common/ranks.py on two ranks that arrive apart, and under launchers that it does not know."""

import json
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from conftest import complain
from warm import run_script

import prior
import train
from common import ranks, workers
from common.data import DataError, Example, Medium, Prior

LIMIT = 3  # seconds that collectives wait in these tests, 10 minutes elsewhere


def main(folder):
    """Each rank writes what it has seen to a file of its own."""
    start = partial(ranks.deepspeed.init_distributed, timeout=timedelta(seconds=LIMIT))
    ranks.deepspeed.init_distributed = start
    ranks.start_ranks()
    folder = Path(folder)
    main_rank = ranks.is_main()
    seen = {}

    # Rank 0 computes priors for longer than collectives wait.
    example = Example("q", "?", [], "free-form", "a", [Medium("image", "p.png")])
    row = Prior("q", question="?", frames=[0], times=[0.0], prior=[1.0])

    def compute(settings, examples, name):
        time.sleep(LIMIT + 2)
        return [row], []

    train.compute_priors = compute
    prior.other_question = lambda *_: False
    args = train.TrainArguments(output_dir=str(folder))
    for name in ("long", "late"):
        # The second time the file of the first is there before rank 1 asks.
        questions = train.Questions([example])
        if name == "late" and not main_rank:
            time.sleep(LIMIT + 2)
        train.add_priors(args, questions, "x", None, {"step": 1})
        seen[name] = list(questions.priors)
    # Rank 0 saves for longer than that.
    if main_rank:
        time.sleep(LIMIT + 2)
    ranks.wait_for_all()
    seen["saved"] = True
    # The waits above were longer than the other collectives bear.
    if main_rank:
        time.sleep(LIMIT + 2)
    try:
        ranks.gather(1)
        seen["gather"] = "waited"
    except RuntimeError:
        seen["gather"] = "gave up"
    (folder / f"rank{ranks.dist.get_rank()}.json").write_text(json.dumps(seen))
    sys.stdout.flush()


def test_ranks_wait_for_rank_0_and_for_each_other(tmp_path):
    run_script(__file__, tmp_path, ranks=2, timeout=120)
    first, second = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for seen in (first, second):
        assert seen["long"] == seen["late"] == ["q"] and seen["saved"]
    assert second["gather"] == "gave up"


@pytest.mark.parametrize("name", workers.STARTED)
def test_several_processes_without_ranks_are_refused(name, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "8")
    with pytest.raises(DataError, match=f"8 processes were started \\({name}\\).*srun torchrun"):
        workers.join_ranks()
    # srun of one torchrun a node: two nodes of eight
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv(name, "2")
    workers.check_launcher()
    # one process alone, within a job
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv(name, "1")
    assert workers.join_ranks() == (0, 1)


def test_train_says_so_in_one_sentence(tmp_path, monkeypatch):
    output = tmp_path / "out"
    done = complain("--output_dir", output, env={"SLURM_STEP_NUM_TASKS": "2"})
    assert "2 processes were started (SLURM_STEP_NUM_TASKS)" in done and not output.exists()


if __name__ == "__main__":
    main(sys.argv[1])
