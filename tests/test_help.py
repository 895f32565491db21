"""--help of every command, as it is printed: it names every flag with its default."""

import re
import sys
from dataclasses import dataclass, fields

import pytest

import ablation
import bench
import evaluate
import prior
import toy
import train
import visualize
from common.flags import Parser, flag

# command -> the settings whose flags it must name
COMMANDS = {
    "train.py": (train, [train.TrainArguments]),
    "prior.py": (prior, [prior.PriorArguments]),
    "evaluate.py": (evaluate, [evaluate.EvaluateArguments]),
    "evaluate.py compare": (evaluate, []),
    "toy.py": (toy, [toy.ToyArguments]),
    "visualize.py": (visualize, []),
    "visualize.py run": (visualize, []),
    "visualize.py answers": (visualize, []),
    "visualize.py sample": (visualize, [visualize.SampleArguments]),
    "visualize.py prior": (visualize, []),
    "bench.py": (bench, [bench.Arguments]),
    "ablation.py": (ablation, []),
}
DEFAULTS = {  # one of each, by hand
    "train.py": ("--learning_rate", "5e-06"),
    "prior.py": ("--frames", "16"),
    "evaluate.py": ("--temperature", "0.0"),
    "evaluate.py compare": ("--seed", "0"),
    "toy.py": ("--seed", "0"),
    "visualize.py sample": ("--w_sem", "3.0"),
    "visualize.py answers": ("--output", "answers.html"),
    "visualize.py prior": ("--items", "6"),
    "bench.py": ("--visual_tokens", "2048"),
    "ablation.py": ("--output_dir", "ablation"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, monkeypatch, capsys):
    module, settings = COMMANDS[command]
    monkeypatch.setattr(sys, "argv", [*command.split(), "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        module.main()
    text = capsys.readouterr().out
    assert not ended.value.code and text.startswith(f"usage: {command}")
    flags = text[text.index("\noptions:") :]
    for kind in settings:
        for setting in fields(kind):
            assert f"--{setting.name}" in flags
            assert setting.metadata.get("help"), f"--{setting.name} has no help"
    assert "(default: None)" not in text and "%" not in re.sub(r"\d+ %", "", flags)
    if command in DEFAULTS:
        name, value = DEFAULTS[command]
        (text,) = re.findall(rf"^  {name}\b.*?(?=^  -|\Z)", flags, re.DOTALL | re.MULTILINE)
        assert f"(default: {value})" in text


@dataclass
class Settings:
    model: str = flag("x", "Checkpoint.", group="Model and data")
    frames: int = flag(16, "Frames of a video.", choices=[8, 16])
    seed: int = flag(0, "Random seed.", group="Run", aliases=["--random_seed"])


def test_flags_stand_under_their_headings():
    # twice: the first parser leaves the headings to the second
    for _ in range(2):
        parser = Parser(Settings, "Makes something.")
        lines = [line.strip() for line in parser.format_help().splitlines()]
        places = [lines.index("Model and data:"), lines.index("Run:")]
        for name in ("--model", "--frames", "--seed"):
            (place,) = [index for index, line in enumerate(lines) if line.startswith(name)]
            places.append(place)
        first, run, model, frames, seed = places
        assert first < model < frames < run < seed
    assert vars(parser.parse_args(["--random_seed", "3"])) == {
        "model": "x",
        "frames": 16,
        "seed": 3,
    }


@pytest.mark.parametrize("arguments", [["--mod", "y"], ["--frames", "9"], ["--no_such", "1"]])
def test_wrong_flags_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        Parser(Settings, "Makes something.").parse_args(arguments)
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err


def test_a_flag_needs_its_help():
    with pytest.raises(TypeError):
        flag(16)
