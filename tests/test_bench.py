"""bench.py: one smallest run of each command, FLOPs by hand, and bad flags."""

import contextlib
import importlib.util
import io
import json
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from pebble import ProcessExpired
from torch.nn.attention import bias
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor

import bench
from common.data import DataError, Example
from common.media import Encoder
from common.policy import Policy, collate, load_model
from common.rollout import Sampling, rollout

SMALL = {
    "visual_tokens": 18,
    "num_generations": 2,
    "completion_length": 3,
    "repeats": 1,
    "steps": 1,
}


def small(**changes):
    return bench.Arguments(**{**SMALL, **changes})


def encoded(arguments, folder):
    """Prepare the small checkpoint and medium -> their paths, the prompt as the model sees it."""
    checkpoint, medium = bench.prepare(arguments, folder)
    kind = "video" if arguments.frames else "image"
    example = Example("0", "Which ball is red?", [], "numerical", "1", medium, kind)
    processor = AutoProcessor.from_pretrained(checkpoint)
    item = Encoder(processor, 0, 1 << 40, arguments.frames).encode(example)
    return checkpoint, medium, item


@pytest.fixture(scope="module")
def step_run():
    """The smallest `bench.py step` of all sides -> sides, what it prints, what it has measured."""
    sides = ["packed", "repeated", "zero3", "graph"]
    if importlib.util.find_spec("trl") is not None:
        sides.append("trl")
    flags = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    printed = io.StringIO()
    results = {}
    time_sides = bench.time_sides

    def keep(arguments):
        results.update(time_sides(arguments))
        return results

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(bench, "time_sides", keep)
        patch.setattr(sys, "argv", ["bench.py", "step", *flags, "--sides", *sides])
        bench.main()
    return sides, printed.getvalue(), results


def test_smallest_step_prints_phases_and_ratios(step_run):
    sides, out, _ = step_run
    assert "a picture of 18 visual tokens, 2 completions of 3 tokens" in out
    assert "cores" in out and "torch " in out
    lines = out.splitlines()
    assert next(line for line in lines if line.startswith("   ")).split() == sides
    cells = {}
    for phase in bench.PHASES:
        # The head has a line "step", too.
        line = [line for line in lines if line.startswith(f"{phase}  ")][-1]
        found = re.findall(r"([\d.]+) s +(\d+) MB", line)
        assert len(found) == len(sides) if phase == "step" else 4
        cells[phase] = [(float(seconds), float(megabytes)) for seconds, megabytes in found]
        assert all(seconds > 0 and megabytes > 0 for seconds, megabytes in cells[phase])
    # A step is its phases.
    for place in range(4):
        parts = [cells[phase][place] for phase in bench.PHASES[:-1]]
        assert cells["step"][place][0] == pytest.approx(sum(part[0] for part in parts), abs=0.003)
        assert cells["step"][place][1] == max(part[1] for part in parts)
    for column, title in enumerate(("step", "memory")):
        for place, side in enumerate(sides[1:], 1):
            words = re.search(rf"^{title}, {side} / packed +(\S+) \((\S+) to (\S+)\)$", out, re.M)
            ratio, low, high = (float(value) for value in words.groups())
            # The cells are rounded.
            of_cells = cells["step"][place][column] / cells["step"][0][column]
            assert ratio == low == high == pytest.approx(of_cells, rel=0.15)
    for title in ("FLOPs, rollout", "FLOPs, step", "tokens/s, rollout"):
        (line,) = [line for line in lines if line.startswith(title)]
        pattern = r"[\d.]+ TFLOP +[\d.]+%" if "FLOPs" in title else r"[\d.,]+"
        assert len(re.findall(pattern, line.removeprefix(title))) == 4
    (line,) = [line for line in lines if line.startswith("tokens/s, step")]
    assert len(line.split()) == 2 + len(sides)


def flops_by_hand(arguments, item, checkpoint, packed=True):
    """FLOPs by the toy's sizes: two a weight and token, attention in full squares."""
    sizes = json.loads((Path(checkpoint) / "config.json").read_text())["text_config"]
    width = sizes["hidden_size"]
    layers = sizes["num_hidden_layers"]
    group = arguments.num_generations
    length = arguments.completion_length
    prompt = len(item.input_ids)
    times = 1 if packed else group
    patches = int(item.grid_thw.prod())
    slots = int(item.grid_thw[0])
    # the patch embedding
    pixels = 2 * patches * 3 * 2 * 14 * 14 * 64
    # two blocks, the merger
    tower = 2 * patches * 2 * (4 * 64 * 64 + 3 * 64 * 128)
    tower += 2 * patches // 4 * (256 * 256 + 256 * width)
    # their attention, a slot by itself
    views = 2 * 4 * slots * (patches // slots) ** 2 * 64
    # one token; 4 query heads a key head
    layer = 2 * layers * (2 * width * width + 2 * width * width // 4 + 3 * width * 3 * width)
    head = 2 * width * sizes["vocab_size"]
    square = 4 * layers * prompt**2 * width
    own = 4 * layers * group * length * (prompt + length) * width
    encode = times * (pixels + tower + views + prompt * layer + square)
    decoding = 0
    for token in range(1, length):
        columns = prompt + token * (group if packed else 1)
        decoding += group * (layer + head + 4 * layers * columns * width)
    forward = encode + group * length * (layer + head) + own
    attention = times * (views + square) + own
    # pixels need no gradient
    backward = 2 * (forward - attention) + 5 * attention // 2 - times * pixels
    return {
        "rollout": encode + group * head + decoding,
        "reference": forward,
        # group_attention computes the completions' attention again
        "policy": forward + backward + own,
    }


def assert_flops(costs, by_hand):
    # Exact but for transformers before 5.23, whose rotary angles are a matmul.
    flops = {name: costs[name][2] for name in by_hand}
    assert flops == pytest.approx(by_hand, rel=2e-4)
    assert costs["optimizer"][2] == 0 and costs["step"][2] == sum(flops.values())


def test_flops_are_those_by_hand(step_run, tmp_path):
    checkpoint, _, item = encoded(small(), tmp_path)
    for side in ("packed", "zero3", "graph", "repeated"):
        ((costs, _),) = step_run[2][side]
        assert_flops(costs, flops_by_hand(small(), item, checkpoint, side != "repeated"))


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
    checkpoint, medium, item = encoded(arguments, tmp_path)
    assert item.grid_thw.tolist() == [3, 4, 8]
    config = json.loads((tmp_path / "config.json").read_text())
    visual = sum(token == config["video_token_id"] for token in item.input_ids.tolist())
    assert visual == arguments.visual_tokens == 24
    costs = next(bench.our_steps(arguments, "packed", checkpoint, medium))
    assert_flops(costs, flops_by_hand(arguments, item, checkpoint))


def test_counting_changes_neither_tokens_nor_log_probs(tmp_path):
    checkpoint, _, item = encoded(small(), tmp_path)
    runs = []
    for count in (False, True):
        policy = Policy(load_model(checkpoint)[0])
        prompts = collate([item], policy.model)
        costs = {}
        with bench.phase(costs, "all", 0, count):
            samples = rollout(policy.model, prompts, [2], [0, 1], Sampling(3, eos_ids=[0]))
            logp = policy(prompts, samples.tokens[None], samples.mask[None]).logp
            logp.sum().backward()
        assert (costs["all"].flops > 0) is count
        runs.append([samples.tokens, logp, *(weight.grad for weight in policy.parameters())])
    for place, (one, two) in enumerate(zip(*runs, strict=True)):
        # Its hooks change the order in which gradients are added; some are as large as 1.
        tolerance = 1e-5 if place > 1 else 0
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


def test_every_kernel_of_attention_is_counted():
    """A GPU's flash kernel, of causal_lower_right, and the CPU's; fewer key heads than queries'."""
    mask = torch.ones(3, 8, dtype=torch.bool).tril(5)
    for device, own in (("cpu", mask), ("meta", bias.causal_lower_right(3, 8))):
        query = torch.randn(2, 8, 3, 32, device=device, requires_grad=True)
        key = torch.randn(2, 2, 8, 32, device=device, requires_grad=True)
        value = torch.randn(2, 2, 8, 32, device=device, requires_grad=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bias, "can_use_flash_attention", lambda *_: True)
            with FlopCounterMode(display=False, custom_mapping=bench.ATTENTION_FLOPS) as counter:
                output = torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, own, enable_gqa=True
                )
                forward = counter.get_total_flops()
                output.sum().backward()
        kernels = counter.get_flop_counts()["Global"]
        assert all(("for_cpu" in str(kernel)) is (device == "cpu") for kernel in kernels)
        assert forward == 4 * 2 * 8 * 3 * 8 * 32
        assert counter.get_total_flops() - forward == 10 * 2 * 8 * 3 * 8 * 32


@pytest.mark.parametrize("shape, weights", [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_shapes_are_the_released_ones(shape, weights):
    toy_model, processor = bench.make_toy()
    config = bench.released_config(toy_model.config, shape)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) == weights
    tokenizer = processor.tokenizer
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
    folder, _ = bench.prepare(small(shape="3b"), tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight.shape == (3000, 256)
    assert model.lm_head.weight is not model.get_input_embeddings().weight


COSTS = {
    "rollout": [3, 7, 6e12],
    "reference": [2, 7, 4e12],
    "policy": [4, 7, 12e12],
    "optimizer": [1, 7, 0],
    "step": [10, 7, 22e12],
}


def print_step(results, monkeypatch, capsys):
    """What bench.py step prints of these results -> {first words of a line: the rest}."""
    monkeypatch.setattr(bench, "time_sides", lambda *_: results)
    bench.bench_step(small(sides=list(results)))
    lines = capsys.readouterr().out.splitlines()
    return {line[:20].strip(): line[20:].split() for line in lines}


def test_shares_by_hand(monkeypatch, capsys):
    rows = print_step({"packed": [(COSTS, 4.0), (COSTS, 2.0)]}, monkeypatch, capsys)
    # of the best, 4 TFLOP/s
    assert rows["FLOPs, rollout"] == ["6", "TFLOP", "50.0%"]
    assert rows["FLOPs, step"] == ["22", "TFLOP", "55.0%"]
    assert rows["tokens/s, rollout"] == ["2.0"]
    assert rows["tokens/s, step"] == ["0.6"]


def test_what_does_not_fit_is_out_of_memory_in_its_column(monkeypatch, capsys):
    killed = ProcessExpired("abnormal termination", code=-signal.SIGKILL)
    outcomes = {
        "packed": (COSTS, 4.0),
        "repeated": killed,
        "zero3": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        "graph": RuntimeError("no luck"),
        "trl": ProcessExpired("abnormal termination", code=-signal.SIGSEGV),
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

    monkeypatch.setattr(bench, "prepare", lambda *_: ("folder", "medium"))
    monkeypatch.setattr(bench, "ProcessPool", Pool)
    results = bench.time_sides(small(repeats=2, sides=["packed", "repeated", "zero3"]))
    assert asked == ["packed", "repeated", "zero3", "packed"]
    assert results["packed"] == 2 * [outcomes["packed"]]
    assert results["repeated"] == results["zero3"] == [None]
    with pytest.raises(RuntimeError, match="no luck"):
        bench.time_sides(small(sides=["graph"]))
    with pytest.raises(ProcessExpired):
        bench.time_sides(small(sides=["trl"]))
    rows = print_step(results, monkeypatch, capsys)
    assert rows["step"] == "10.0000 s 7 MB out of memory out of memory".split()
    assert rows["tokens/s, step"] == ["0.6"]
    # Nothing to compare with.
    assert not [title for title in rows if "/ packed" in title]


def test_smallest_prior_prints_ratios(monkeypatch, capsys):
    flags = ["--videos", "3", "--width", "64", "--height", "48", "--repeats", "1"]
    flags += ["--clip", "ViT-S-32-alt"]
    monkeypatch.setattr(sys, "argv", ["bench.py", "prior", *flags])
    bench.main()
    out = capsys.readouterr().out
    for title in ("hsv + uniform priors / get_batch", "all / the slower of decoding and CLIP"):
        (line,) = [line for line in out.splitlines() if line.startswith(title)]
        words = re.search(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)$", line).groups()
        ratio, low, high = (float(value) for value in words)
        assert 0 < ratio == low == high


@pytest.mark.parametrize(
    "flags, words",
    [
        ("grow", "invalid choice: 'grow'"),
        ("step --sides packed vllm", "invalid choice: 'vllm'"),
        ("step --model_name_or_path no/such/folder", "no/such/folder"),
        ("step --batch 3", "unrecognized arguments: --batch"),
        ("step --frames 4 --sides packed trl", "TRL scores no videos"),
        ("step --shape 14b", "invalid choice: '14b'"),
        ("prior --clip ViT", "--clip ViT is no architecture of open_clip"),
    ],
)
def test_bad_flags(flags, words, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out
    assert words in printed.err and "Traceback" not in printed.err


def test_a_family_without_graphs_is_refused(tmp_path, monkeypatch):
    checkpoint, medium = bench.prepare(small(), tmp_path)
    monkeypatch.setattr("common.policy.PACKED_FAMILIES", ())
    with pytest.raises(DataError, match="samples without a graph"):
        next(bench.our_steps(small(), "graph", checkpoint, medium))
