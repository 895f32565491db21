"""bench.py by subprocess: the smallest configurations print their comparisons, and bad flags end with one sentence."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402

SMALL = ["--visual_tokens", "18", "--num_generations", "2", "--completion_length", "3", "--hidden", "128", "--layers", "1",
         "--repeats", "1", "--steps", "1"]


def run_bench(*flags, timeout=300):
    done = subprocess.run([sys.executable, "bench.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_smallest_step_prints_phases_and_ratios():
    sides = ["packed", "repeated", "zero3"] + ["trl"] * (importlib.util.find_spec("trl") is not None)
    out = run_bench("step", *SMALL, "--sides", *sides)
    lines = out.splitlines()
    assert all(words in out for words in ("18 visual tokens, 2 completions of 3 tokens", "width 128, 1 layers", "cores", "torch "))
    assert next(line for line in lines if line.startswith("   ")).split() == sides
    cells = {}
    for phase in ("rollout", "reference", "policy", "optimizer", "step"):
        found = re.findall(r"([\d.]+) s +(\d+) MB", [line for line in lines if line.startswith(f"{phase}  ")][-1])
        assert len(found) == len(sides) if phase == "step" else 3
        cells[phase] = [(float(seconds), float(megabytes)) for seconds, megabytes in found]
        assert all(seconds > 0 and megabytes > 0 for seconds, megabytes in cells[phase])
    for place in range(3):  # a step is its phases
        assert cells["step"][place][0] == pytest.approx(sum(cells[phase][place][0] for phase in list(cells)[:-1]), abs=0.003)
        assert cells["step"][place][1] == max(cells[phase][place][1] for phase in list(cells)[:-1])
    for title, phase, side, column in (("memory, repeated / packed", "step", 1, 1), ("policy, repeated / packed", "policy", 1, 0),
                                       ("memory, TRL / packed", "step", 3, 1))[: len(sides) - 1]:
        ratio, low, high = (float(value) for value in re.search(title + r" +([\d.]+) \(([\d.]+) to ([\d.]+)\)", out).groups())
        assert ratio == low == high == pytest.approx(cells[phase][side][column] / cells[phase][0][column], rel=0.15)  # rounded cells
    if not torch.cuda.is_available():  # in bf16 both are wider
        equal, apart = re.search(r"([\d.]+)% of the sampled tokens equal, log-probs (\S+) apart", out).groups()
        assert float(equal) == 100 and float(apart) < 1e-4


def test_growth_prints_tables_and_draws_them(tmp_path, monkeypatch, capsys):
    asked = []

    def sides(arguments, sides):  # seconds = G * visual tokens of every side, times its place
        asked.append((arguments.num_generations, arguments.visual_tokens))
        value = arguments.num_generations * arguments.visual_tokens / 1024
        return {side: [{"step": [value * place, 100 * value * place]}] for place, side in enumerate(sides, 1)}

    monkeypatch.setattr(bench, "time_sides", sides)
    monkeypatch.setattr(sys, "argv", ["bench.py", "grow", "--plot", str(tmp_path / "growth.png"), "--sides", "packed", "zero3", "repeated"])
    bench.main()
    out = capsys.readouterr().out
    assert asked == [(2, 2048), (4, 2048), (8, 2048), (16, 2048), (8, 256), (8, 512), (8, 1024), (8, 2048), (8, 4096)]
    assert "| completions G | packed, s | packed, MB | repeated, s | repeated, MB |" in out
    assert "| 16 | 32.00 | 3,200 | 64.00 | 6,400 |" in out and "| 256 | 2.00 | 200 | 4.00 | 400 |" in out
    assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"


def test_smallest_prior_prints_ratios():
    flags = ["--videos", "3", "--seconds", "1", "--width", "64", "--height", "48", "--frames", "4", "--repeats", "1",
             "--memory_videos", "20", "--clip", "ViT-S-32-alt"]
    out = run_bench("prior", *flags)
    for title in ("hsv + uniform priors / get_batch", "one worker / two workers", "  get_batch alone, one process / two",
                  "CLIP (ViT-S-32-alt) / decoding", "all / the slower of the two"):
        line = next(line for line in out.splitlines() if line.startswith(title))
        ratio, low, high = (float(value) for value in re.search(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)$", line).groups())
        assert 0 < ratio == low == high
    used = [float(value) for value in out.rpartition(": ")[2].split()]
    assert len(used) == 10 and all(value > 100 for value in used)


@pytest.mark.parametrize("flags, words", [
    (("step", "--num_generations", "1"), "--num_generations 1 is too small"),
    (("grow", "--visual_tokens", "1"), "--visual_tokens 1 is too small"),
    (("step", "--sides", "packed", "vllm"), "invalid choice: 'vllm'"),
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
