"""bench.py by subprocess: the smallest configuration prints both comparisons, and bad flags end with one sentence."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402


def test_smallest_step_prints_ratios():
    flags = ["--num_generations", "2", "--completion_length", "3", "--frames", "2", "--repeats", "1"]
    done = subprocess.run([sys.executable, "bench.py", "step", *flags], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    for title in ("policy forward + backward", "rollout"):
        line = next(line for line in done.stdout.splitlines() if line.startswith(title))
        first, second = (float(value) for value in re.findall(r"([\d.]+) s", line))
        ratio, low, high = (float(value) for value in re.search(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)", line).groups())
        assert first > 0 and second > 0
        assert ratio == low == high == pytest.approx(second / first, rel=0.05)  # one pair; seconds are rounded to 0.1 ms
    assert all(words in done.stdout for words in ("2 completions of 3 tokens", "2 frames", "held equal", "cores", "torch "))
    if "float32" in done.stdout:  # on a GPU it is bf16, where both are wider
        assert float(re.search(r"log-probs differ by (\S+) at most", done.stdout).group(1)) < 1e-4
        assert "100.0% of tokens equal" in done.stdout


def test_smallest_prior_prints_ratios():
    flags = ["--videos", "3", "--seconds", "1", "--width", "64", "--height", "48", "--frames", "4", "--repeats", "1",
             "--memory_videos", "20", "--clip", "ViT-S-32-alt"]
    done = subprocess.run([sys.executable, "bench.py", "prior", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    for title in ("hsv + uniform priors / get_batch", "one worker / two workers", "  get_batch alone, one process / two",
                  "CLIP (ViT-S-32-alt) / decoding", "all / the slower of the two"):
        line = next(line for line in done.stdout.splitlines() if line.startswith(title))
        ratio, low, high = (float(value) for value in re.search(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)$", line).groups())
        assert 0 < ratio == low == high
    used = [float(value) for value in done.stdout.rpartition(": ")[2].split()]
    assert len(used) == 10 and all(value > 100 for value in used)


@pytest.mark.parametrize("flags, words", [
    (("step", "--num_generations", "1"), "--num_generations 1 is too small"),
    (("step", "--frame_size", "50"), "--frame_size 50 is not a multiple of 28"),
    (("step", "--model_name_or_path", "no/such/folder"), "no/such/folder is not a folder with a checkpoint"),
    (("step", "--batch", "3"), "unrecognized arguments: --batch"),
    (("prior", "--videos", "1"), "--videos 1 is too small"),
    (("prior", "--clip", "ViT"), "--clip ViT is no architecture of open_clip"),
])
def test_bad_flags(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    told = capsys.readouterr()
    assert stop.value.code == 2 and told.out == "" and words in told.err and "Traceback" not in told.err


def test_smallest_step_against_trl():
    pytest.importorskip("trl")
    flags = ["--visual_tokens", "18", "--completion_length", "3", "--hidden", "128", "--layers", "1", "--repeats", "1", "--steps", "1"]
    done = subprocess.run([sys.executable, "bench.py", "trl", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert "picture of 18 visual tokens, 8 completions of 3 tokens" in done.stdout and "trl 1." in done.stdout
    lines = [re.match(r"([\d.]+) against TRL's ([\d.]+) .*? ([\d.]+) \(", line) for line in done.stdout.splitlines()[-2:]]
    (_, _, speed), (ours, theirs, memory) = (map(float, line.groups()) for line in lines)
    assert speed > 0 and memory == pytest.approx(theirs / ours, rel=0.05)  # one pair
