"""--help of every command, as it is printed: it ends well and names every flag with its default."""

import re
import sys
from dataclasses import fields

import pytest

import bench
import evaluate
import prior
import toy
import train
import visualize

# command -> the settings whose flags it must name
COMMANDS = {
    "train.py": (train, [train.TrainArguments, prior.PriorSettings]),
    "prior.py": (prior, [prior.PriorArguments]),
    "evaluate.py": (evaluate, [evaluate.EvaluateArguments]),
    "evaluate.py compare": (evaluate, []),
    "toy.py": (toy, [toy.ToyArguments]),
    "visualize.py": (visualize, []),
    "visualize.py run": (visualize, []),
    "visualize.py enrichment": (visualize, []),
    "visualize.py sample": (visualize, [visualize.SampleArguments, prior.PriorSettings]),
    "visualize.py prior": (visualize, []),
    "bench.py": (bench, []),
    "bench.py step": (bench, []),
    "bench.py grow": (bench, []),
    "bench.py prior": (bench, []),
}
DEFAULTS = {  # one of each, by hand
    "train.py": ("--learning_rate", "5e-06"),
    "prior.py": ("--frames", "16"),
    "evaluate.py": ("--temperature", "0.0"),
    "evaluate.py compare": ("--seed", "0"),
    "toy.py": ("--seed", "0"),
    "visualize.py sample": ("--cfr_weight", "3.0"),
    "visualize.py enrichment": ("--output", "enrichment.html"),
    "visualize.py prior": ("--items", "6"),
    "bench.py step": ("--steps", "2"),
    "bench.py grow": ("--plot", "growth.png"),
    "bench.py prior": ("--clip", "ViT-B-32"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, monkeypatch, capsys):
    module, settings = COMMANDS[command]
    monkeypatch.setattr(sys, "argv", [*command.split(), "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        module.main()
    told = capsys.readouterr().out
    assert not ended.value.code and told.startswith(f"usage: {command}")
    flags = told[told.index("\noptions:") :]
    for setting in (setting for kind in settings for setting in fields(kind)):
        assert f"--{setting.name}" in flags
    assert "(default: None)" not in told and "%" not in re.sub(r"\d+ %", "", flags)
    if command in DEFAULTS:
        name, value = DEFAULTS[command]
        (text,) = re.findall(rf"^  {name}\b.*?(?=^  -|\Z)", flags, re.DOTALL | re.MULTILINE)
        assert f"(default: {value})" in text
