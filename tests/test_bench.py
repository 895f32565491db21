"""bench.py: one smallest run of each command, what a side that fails leaves, and bad flags."""

import contextlib
import importlib.util
import io
import json
import multiprocessing
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pebble import ProcessExpired
from transformers import AutoModelForImageTextToText

import bench
import toy
from common.data import Example

SMALL = {
    "visual_tokens": 18,
    "num_generations": 2,
    "completion_length": 3,
    "repeats": 1,
    "steps": 1,
}


PHASES = ["rollout", "reference", "policy", "optimizer", "step"]


def small(**changes):
    return bench.Arguments(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def step_run():
    """The smallest `bench.py step` of all sides -> sides, what it prints."""
    sides = ["packed", "repeated", "deepspeed", "lora", "graph"]
    if importlib.util.find_spec("trl") is not None:
        sides.append("trl")
    flags = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    printed = io.StringIO()
    # Processes that have imported torch already (warm.py).
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("OMP_NUM_THREADS", "1")
        own = SimpleNamespace(get_context=lambda method: context)
        patch.setattr(bench, "multiprocessing", own)
        patch.setattr(sys, "argv", ["bench.py", "step", *flags, "--sides", *sides])
        bench.main()
    return sides, printed.getvalue()


def test_smallest_step_prints_phases_and_ratios(step_run):
    sides, out = step_run
    assert "frames=0, visual_tokens=18, num_generations=2, completion_length=3" in out
    assert "cores" in out and "torch " in out
    cells = {side: {} for side in sides}
    for side, phase, seconds, megabytes in re.findall(
        r"^(\w+) +(\w+) +([\d.]+) s +(\d+) MB$", out, re.M
    ):
        cells[side][phase] = (float(seconds), float(megabytes))
    for side, phases in cells.items():
        assert list(phases) == (["step"] if side == "trl" else PHASES)
        assert all(seconds > 0 and megabytes > 0 for seconds, megabytes in phases.values())
        if side != "trl":
            # A step is its phases.
            parts = [phases[name] for name in PHASES[:-1]]
            assert phases["step"][0] == pytest.approx(sum(part[0] for part in parts), abs=0.003)
            assert phases["step"][1] == max(part[1] for part in parts)
    for column, title in enumerate(("step", "memory")):
        for side in sides[1:]:
            words = re.search(rf"^{title}, {side} / packed +(\S+) \((\S+) to (\S+)\)$", out, re.M)
            ratio, low, high = (float(value) for value in words.groups())
            # The cells are rounded.
            of_cells = cells[side]["step"][column] / cells["packed"]["step"][column]
            assert ratio == low == high == pytest.approx(of_cells, rel=0.15)


def test_a_video_has_its_slots_and_visual_tokens(tmp_path):
    for frames, asked, rows, tokens in (
        (0, 2048, 32, 2048),
        (16, 1024, 8, 1024),
        (64, 4096, 8, 4096),
        (64, 16, 1, 64),
        (1, 18, 3, 18),
    ):
        arguments = bench.Arguments(frames=frames, visual_tokens=asked)
        assert (arguments.rows, arguments.visual_tokens) == (rows, tokens)
    arguments = small(frames=5, visual_tokens=25)
    bench.write_checkpoint(arguments, tmp_path)
    medium = bench.write_medium(arguments, tmp_path)
    assert medium.kind == "video"
    example = Example("0", "Which ball is red?", [], "numerical", "1", [medium])
    item = bench.load_encoder(arguments, tmp_path).encode(example)
    assert item.grid_thw.tolist() == [[3, 4, 8]]
    config = json.loads((tmp_path / "config.json").read_text())
    visual = sum(token == config["video_token_id"] for token in item.input_ids.tolist())
    assert visual == arguments.visual_tokens == 24
    costs = bench.GroupStep(arguments, "packed", tmp_path, medium).run()
    assert list(costs) == PHASES and min(costs["step"]) > 0


@pytest.mark.parametrize("shape, weights", [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_shapes_are_the_released_ones(shape, weights, toy_processor):
    config = bench.released_config(toy.make_model(toy_processor, seed=0).config, shape)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) == weights
    tokenizer = toy_processor.tokenizer
    assert config.video_token_id == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.model.visual.config.window_size == 112


def test_a_shape_is_saved_in_the_dtype_it_is_loaded_in(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "DTYPE", torch.bfloat16)
    sizes = {**bench.SHAPES["7b"], "hidden_size": 256, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    monkeypatch.setitem(bench.SHAPES, "3b", {**sizes, "vocab_size": 3000})
    released_config = bench.released_config

    def shallow(*arguments):
        # The vision tower alone has 0.6 billion weights.
        config = released_config(*arguments)
        config.vision_config.depth = 1
        return config

    monkeypatch.setattr(bench, "released_config", shallow)
    bench.write_checkpoint(small(shape="3b"), tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight.shape == (3000, 256)
    assert model.lm_head.weight is not model.get_input_embeddings().weight


COSTS = {
    "rollout": [3, 7],
    "reference": [2, 7],
    "policy": [4, 7],
    "optimizer": [1, 7],
    "step": [10, 7],
}


def test_a_side_that_fails_is_named_and_left_out(monkeypatch, capsys):
    killed = ProcessExpired("abnormal termination", code=-signal.SIGKILL)
    outcomes = {
        "packed": COSTS,
        "repeated": killed,
        "deepspeed": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        "graph": RuntimeError("no luck"),
    }
    asked = []

    class Pool(contextlib.nullcontext):
        """Stands in for a pool of one process, and for its task."""

        def __init__(self, *arguments, **settings):
            super().__init__(self)

        def schedule(self, function, args):
            asked.append(args[1])
            return self

        def result(self):
            outcome = outcomes[asked[-1]]
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

    monkeypatch.setattr(bench, "prepare", lambda *_: "medium")
    monkeypatch.setattr(bench, "ProcessPool", Pool)
    bench.bench_step(small(repeats=2, sides=["packed", "repeated", "deepspeed"]))
    assert asked == ["packed", "repeated", "deepspeed", "packed"]
    out = capsys.readouterr().out
    assert re.search("^repeated failed: .*abnormal termination.*-9", out, re.M)
    assert re.search("^deepspeed failed: .*CUDA out of memory", out, re.M)
    assert re.search(r"^packed +step +10.0000 s +7 MB$", out, re.M)
    # Nothing to compare with.
    assert "/ packed" not in out
    # Any other error stops the run.
    with pytest.raises(RuntimeError, match="no luck"):
        bench.bench_step(small(sides=["graph"]))


def parts_run(output, only=None):
    """bench.py gpu with its functions replaced -> names of the parts that ran."""
    ran = []

    def part(name):
        def run(arguments, folder):
            ran.append(name)
            if name == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return {"seconds_a_step": 2.5, "end": "many lines"}

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "GPU_PARTS", {name: part(name) for name in bench.GPU_PARTS})
        bench.bench_gpu(small(output_dir=str(output), only=only))
    return ran


def test_parts_of_a_gpu_day_are_kept_and_go_on(tmp_path, monkeypatch):
    everything = list(bench.GPU_PARTS)
    assert parts_run(tmp_path) == everything
    made = json.loads((tmp_path / "capture.json").read_text())
    assert made["result"]["seconds_a_step"] == 2.5 and made["arguments"]["visual_tokens"] == 18
    assert "out of memory" in json.loads((tmp_path / "memory.json").read_text())["result"]["error"]
    (tmp_path / "default.json").unlink()
    # What failed is tried again, the rest when it is asked for.
    assert parts_run(tmp_path) == ["memory", "default"]
    assert parts_run(tmp_path, ["capture", "tests"]) == ["capture", "tests"]


def test_a_checkpoint_is_written_once_and_whole(tmp_path, monkeypatch):
    written = []

    def write(function, arguments, folder):
        written.append(Path(folder).name)
        Path(folder, "videos").mkdir(parents=True)
        if len(written) == 1:
            raise RuntimeError("no space")

    monkeypatch.setattr(bench, "run_apart", write)
    with pytest.raises(RuntimeError, match="no space"):
        bench.prepare(small(), f"{tmp_path}/3b")
    for _ in range(2):
        medium = bench.prepare(small(), f"{tmp_path}/3b")
        assert Path(medium.path).parent == tmp_path / "3b"
    assert written == ["3b.part"] * 2


def test_a_side_can_be_written_as_json(tmp_path, monkeypatch):
    asked = []

    def run_apart(*words):
        asked.append(words)
        function, *words = words
        return function(*words)

    steps = iter([{"step": (9.0, 0.0)}, {"step": (0.5, 2000.0)}, {"step": (1.5, 1000.0)}])
    step = SimpleNamespace(run=lambda: next(steps))
    monkeypatch.setattr(bench, "prepare", lambda arguments, folder: "medium")
    monkeypatch.setattr(bench, "run_apart", run_apart)
    monkeypatch.setattr(bench, "GroupStep", lambda *words: step)
    made = bench.GPU_PARTS["7b_64_lora"](small(steps=2), "there")
    # The first step is not timed.
    assert json.loads(json.dumps(made)) == {"step": [1.0, 1500.0]}
    function, arguments, *words = asked[0]
    assert function is bench.run_side and words == ["lora", "there/small", "medium"]
    assert arguments.frames == arguments.visual_tokens == 64  # at least one a slot


def test_the_page_has_the_numbers_and_a_gap_where_one_is_owed(tmp_path, monkeypatch):
    page = tmp_path / "docs/performance.md"
    page.parent.mkdir()
    page.write_text("before <!-- gpu --> old <!-- /gpu --> after")
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    # A folder without measurements, such as a wrong one, does not empty the page.
    with pytest.raises(bench.DataError, match="has no part"):
        bench.bench_page(small(output_dir=str(tmp_path)))
    assert " old " in page.read_text()
    costs = {name: [0.5, 2000.0] for name in PHASES}
    results = {
        "3b_16_packed": costs,
        "3b_16_repeated": {"error": "OutOfMemoryError('CUDA out of memory')"},
        "3b_16_lora": {"error": "ProcessExpired('killed')"},
        "3b_picture_trl": {"step": [3.0, 4000.0]},
        "kernels": {"prefill": {"all": [900, 60.25], "a kernel": [3, 20.5]}},
        "capture": {"logp_difference": 0.125},
    }
    for name, result in results.items():
        made = {"device": "card", "torch": "2", "transformers": "5", "date": "d", "commit": "c"}
        made |= {"seconds": 61.4, "result": result}
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    bench.bench_page(small(output_dir=str(tmp_path)))
    text = page.read_text()
    assert text.startswith("before <!-- gpu -->") and text.endswith("<!-- /gpu --> after")
    assert " old " not in text and text.count("card, torch 2, transformers 5, d, commit c.") == 1
    assert "| capture | 61 | logp_difference 0.125 |" in text and "| default | owed | |" in text
    lines = text.partition("3b, 16:")[2].splitlines()[2:9]
    assert lines[0] == f"| | {' | '.join(PHASES)} |"
    assert f"| packed {'| 0.50 s, 2.0 GB ' * 5}|" in lines
    assert f"| repeated {'| no memory ' * 5}|" in lines
    assert f"| deepspeed {'| owed ' * 5}|" in lines
    assert f"| lora {'| failed ' * 5}|" in lines
    assert "| kernels | 61 | prefill 60.25 ms |" in text
    assert f"| trl {'|  ' * 4}| 3.00 s, 4.0 GB |" in text


@pytest.mark.parametrize("part", ["capture", "kernels", "lengths"])
def test_parts_run_on_a_cpu_in_small_shapes(part, tmp_path, monkeypatch):
    # In this process.
    monkeypatch.setattr(bench, "run_apart", lambda function, *words: function(*words))
    result = bench.GPU_PARTS[part](small(visual_tokens=32), tmp_path)
    if part == "capture":
        assert result["same_tokens"] == 1 and result["logp_difference"] < 1e-4
    if part == "kernels":
        assert list(result) == ["prefill", "prefill and 64 steps"]
        for kernels in result.values():
            (first, (calls, _)), *others = kernels.items()
            assert first == "all" and calls > len(others) == 11
            times = [milliseconds for _, milliseconds in kernels.values()]
            assert times == sorted(times, reverse=True) and times[0] > 0
    if part == "lengths":
        seen = [f"{tokens} tokens, turn {turn}" for turn in (1, 2) for tokens in (32, 4, 16, 8, 24)]
        assert list(result) == seen and all(seconds > 0 for seconds in result.values())


@pytest.mark.parametrize(
    "flags, words",
    [
        ("grow", "invalid choice: 'grow'"),
        ("step --sides packed vllm", "invalid choice: 'vllm'"),
        ("step --batch 3", "unrecognized arguments: --batch"),
        ("step --frames 4 --sides packed trl", "TRL scores no videos"),
        ("step --shape 14b", "invalid choice: '14b'"),
        ("prior", "invalid choice: 'prior'"),
        ("gpu --only 3b_16", "--only: invalid choice: '3b_16' (choose from "),
    ],
)
def test_bad_flags(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert words in printed.err and "Traceback" not in printed.err
