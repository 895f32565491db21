"""bench.py by subprocess: the smallest configurations print their comparisons, and bad flags end with one sentence."""

import contextlib
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import bias
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor

import bench
from common.data import DataError, Example
from common.media import Encoder
from common.policy import Policy, collate
from common.rollout import Sampling, replay, rollout

ROOT = Path(__file__).resolve().parents[1]

SMALL = [
    "--visual_tokens",
    "18",
    "--num_generations",
    "2",
    "--completion_length",
    "3",
    "--hidden",
    "128",
    "--layers",
    "1",
    "--repeats",
    "1",
    "--steps",
    "1",
]


def run_bench(*flags, timeout=300):
    done = subprocess.run(
        [sys.executable, "bench.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def small(**changes):
    """What main() makes of SMALL."""
    flags = {
        name: default for name, (default, *_) in {**bench.STEP_FLAGS, **bench.SPEED_FLAGS}.items()
    }
    flags |= dict(
        zip((flag.removeprefix("--") for flag in SMALL[::2]), map(int, SMALL[1::2]), strict=True)
    )
    return Namespace(
        **{"model_name_or_path": None, "shape": None, "sides": ["packed"], **flags, **changes}
    )


def encoded(arguments, folder):
    """bench's checkpoint and medium -> arguments as its processes have them, the prompt as the model sees it."""
    arguments.folder, arguments.medium = bench.prepare(arguments, folder)
    example = Example(
        "0",
        "Which ball is red?",
        [],
        "numerical",
        "1",
        arguments.medium,
        "video" if arguments.frames else "image",
    )
    return arguments, Encoder(
        AutoProcessor.from_pretrained(arguments.folder), 0, 1 << 40, arguments.frames
    ).encode(example)


@pytest.fixture(scope="module")
def step_run():
    """The smallest `bench.py step` of all sides -> sides, what it prints, what its processes have measured."""
    sides = ["packed", "repeated", "zero3", "graph"] + ["trl"] * (
        importlib.util.find_spec("trl") is not None
    )
    told, results, time_sides = io.StringIO(), {}, bench.time_sides
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(
            bench, "time_sides", lambda *asked: results.update(time_sides(*asked)) or results
        )
        patch.setattr(sys, "argv", ["bench.py", "step", *SMALL, "--sides", *sides])
        bench.main()
    return sides, told.getvalue(), results


def test_smallest_step_prints_phases_and_ratios(step_run):
    sides, out, _ = step_run
    lines = out.splitlines()
    assert all(
        words in out
        for words in (
            "18 visual tokens, 2 completions of 3 tokens",
            "width 128, 1 layers",
            "cores",
            "torch ",
        )
    )
    assert next(line for line in lines if line.startswith("   ")).split() == sides
    cells = {}
    for phase in ("rollout", "reference", "policy", "optimizer", "step"):
        found = re.findall(
            r"([\d.]+) s +(\d+) MB", [line for line in lines if line.startswith(f"{phase}  ")][-1]
        )
        assert len(found) == len(sides) if phase == "step" else 4
        cells[phase] = [(float(seconds), float(megabytes)) for seconds, megabytes in found]
        assert all(seconds > 0 and megabytes > 0 for seconds, megabytes in cells[phase])
    for place in range(4):  # a step is its phases
        assert cells["step"][place][0] == pytest.approx(
            sum(cells[phase][place][0] for phase in list(cells)[:-1]), abs=0.003
        )
        assert cells["step"][place][1] == max(cells[phase][place][1] for phase in list(cells)[:-1])
    for title, phase, side, column in (
        ("memory, repeated / packed", "step", 1, 1),
        ("policy, repeated / packed", "policy", 1, 0),
        ("memory, TRL / packed", "step", 4, 1),
    )[: len(sides) - 2]:
        ratio, low, high = (
            float(value)
            for value in re.search(title + r" +([\d.]+) \(([\d.]+) to ([\d.]+)\)", out).groups()
        )
        assert (
            ratio
            == low
            == high
            == pytest.approx(cells[phase][side][column] / cells[phase][0][column], rel=0.15)
        )  # rounded cells
    if not torch.cuda.is_available():  # in bf16 both are wider
        equal, apart = re.search(
            r"([\d.]+)% of the sampled tokens equal, log-probs (\S+) apart", out
        ).groups()
        assert float(equal) == 100 and float(apart) < 1e-4
    for title in (
        "FLOPs, prefill",
        "FLOPs, step",
        "tokens/s, rollout",
        "tokens/s, decoding",
        "its bound",
        "share of the bound",
    ):
        line = next(line for line in lines if line.startswith(title))
        assert (
            len(
                re.findall(
                    r"[\d.]+ TFLOP +[\d.]+%" if "FLOPs" in title else r"[\d.,]+|nan",
                    line.removeprefix(title),
                )
            )
            == 4
        )
    assert len(
        next(line for line in lines if line.startswith("tokens/s, step")).split()
    ) == 2 + len(sides)


def flops_by_hand(arguments, item, packed=True, fixed=False):
    """FLOPs of the phases, from the toy's sizes alone: two a weight and token, attention in full squares."""
    group, length, width, prompt = (
        arguments.num_generations,
        arguments.completion_length,
        arguments.hidden,
        len(item["input_ids"]),
    )
    vocabulary = json.loads((Path(arguments.folder) / "config.json").read_text())["text_config"][
        "vocab_size"
    ]
    patches, slots, times = (
        int(item["grid_thw"].prod()),
        int(item["grid_thw"][0]),
        1 if packed else group,
    )
    pixels = 2 * patches * 3 * 2 * 14 * 14 * 64  # the patch embedding
    tower = 2 * patches * 2 * (4 * 64 * 64 + 3 * 64 * 128) + 2 * patches // 4 * (
        256 * 256 + 256 * width
    )  # two blocks, the merger
    views = 2 * 4 * slots * (patches // slots) ** 2 * 64  # their attention, a slot by itself
    layer = 2 * (
        2 * width * width + 2 * width * width // 4 + 3 * width * 3 * width
    )  # of one token; 4 query heads a key head
    head, own = 2 * width * vocabulary, group * length * (prompt + length)
    prefill = (
        times * (pixels + tower + views + prompt * layer + 4 * prompt**2 * width) + group * head
    )
    columns = [
        prompt + (group * (length - 1 if fixed else t) if packed else t) for t in range(1, length)
    ]
    forward = (
        times * (pixels + tower + views + prompt * layer + 4 * prompt**2 * width)
        + group * length * (layer + head)
        + 4 * own * width
    )
    attention = times * (views + 4 * prompt**2 * width) + 4 * own * width
    backward = (
        2 * (forward - attention) + 5 * attention // 2 - times * pixels
    )  # pixels need no gradient
    return {
        "prefill": prefill,
        "rollout": prefill + sum(group * (layer + head + 4 * seen * width) for seen in columns),
        "reference": forward,
        "policy": forward + backward + 4 * own * width,
    }  # group_attention computes the completions' again


def test_flops_are_those_of_a_one_layer_model_by_hand(step_run, tmp_path):
    arguments, item = encoded(small(), tmp_path)
    for side in ("packed", "zero3", "graph", "repeated"):
        (found,) = step_run[2][side]
        by_hand = flops_by_hand(arguments, item, side != "repeated", side == "graph")
        counted = {name: found[name][2] for name in by_hand}
        assert counted == pytest.approx(by_hand, rel=2e-4), (
            side
        )  # exact but for transformers before 5.23, whose rotary angles are a matmul
        assert found["optimizer"][2] == 0 and found["step"][2] == sum(
            found[name][2] for name in ("rollout", "reference", "policy")
        )


def test_a_video_has_its_slots_and_visual_tokens(tmp_path):
    for frames, visual_tokens, legal in (
        (0, 2048, (1, 32)),
        (16, 1024, (8, 8)),
        (64, 4096, (32, 8)),
        (64, 16, (32, 1)),
        (1, 18, (1, 3)),
    ):
        assert bench.slots_and_rows(small(frames=frames, visual_tokens=visual_tokens)) == legal
    arguments, item = encoded(small(frames=5, visual_tokens=25), tmp_path)
    assert (
        item["grid_thw"].tolist() == [3, 4, 8]
        and len(item["times"]) == 5
        and item["second_per_grid"] == 1
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert (item["input_ids"] == config["video_token_id"]).sum() == 24
    found, first = next(bench.our_steps(arguments, "packed", 0))
    by_hand = flops_by_hand(arguments, item)
    assert {name: found[name][2] for name in by_hand} == pytest.approx(
        by_hand, rel=2e-4
    )  # as above
    assert len(first["tokens"]) == len(first["logp"]) == 6


def test_counting_changes_neither_tokens_nor_log_probs(tmp_path):
    arguments, item = encoded(small(), tmp_path)
    told = []
    for count in (False, True):
        policy, found = (
            Policy(
                AutoModelForImageTextToText.from_pretrained(
                    arguments.folder, attn_implementation="sdpa"
                )
            ),
            {},
        )
        prompts = collate([item], policy.model)
        with bench.phase(found, "all", 0, count):
            settings = Sampling(3, eos_ids=[0])
            tokens, mask, *_ = rollout(policy.model, prompts, [2], [0, 1], settings)
            logp = policy(prompts, tokens[None], mask[None])[0]
            logp.sum().backward()
        assert (found["all"][2] > 0) is count
        told.append([tokens, logp, *(weight.grad for weight in policy.parameters())])
    assert all(
        torch.equal(one, two) for one, two in zip(*(values[:2] for values in told), strict=True)
    )
    for one, two in zip(*told, strict=True):
        torch.testing.assert_close(
            one, two, rtol=0, atol=1e-5
        )  # its hooks change the order in which gradients are added


def test_every_kernel_of_attention_is_counted():
    """A GPU's flash kernel, which causal_lower_right takes, on tensors without data; the CPU's; fewer key heads than query heads."""
    mask, counts = torch.ones(3, 8, dtype=torch.bool).tril(5), []
    for device, own in (("cpu", mask), ("meta", bias.causal_lower_right(3, 8))):
        query, key, value = (
            torch.randn(2, heads, rows, 32, device=device, requires_grad=True)
            for heads, rows in ((8, 3), (2, 8), (2, 8))
        )
        for work in (
            lambda: torch.nn.functional.scaled_dot_product_attention(
                query, key, value, own, enable_gqa=True
            ),  # noqa: B023
            lambda: output.sum().backward(),
        ):  # noqa: B023
            with (
                FlopCounterMode(display=False, custom_mapping=bench.ATTENTION_FLOPS) as counter,
                pytest.MonkeyPatch.context() as patch,
            ):
                patch.setattr(bias, "can_use_flash_attention", lambda *_: True)
                output = work()
            (kernel,) = counter.get_flop_counts()["Global"]
            assert ("for_cpu" in str(kernel)) is (device == "cpu")
            counts.append(counter.get_total_flops())
    assert counts == 2 * [4 * 2 * 8 * 3 * 8 * 32, 10 * 2 * 8 * 3 * 8 * 32]


def test_steps_of_a_cuda_graph_are_launched_to_be_counted():
    square, found = torch.ones(4, 4), {}
    with bench.phase(found, "all", 0, count=True):
        replay(lambda: square @ square, 6, lambda: True, torch.device("cuda"))
    assert found["all"][2] == 6 * 2 * 4**3


@pytest.mark.parametrize(
    "shape, weights, table", [("3b", 3_754_622_976, 0), ("7b", 8_292_166_656, 152064 * 3584)]
)
def test_shapes_are_the_released_ones(shape, weights, table):
    toy_model, processor = bench.make_toy(0)
    config = bench.released_config(toy_model.config, shape)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) == weights
    seen = sum(weight.numel() for weight in model.model.visual.parameters())
    assert bench.weight_bytes(model) == 2 * (weights - seen - table)  # an untied table is not read
    assert (
        config.video_token_id
        == processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
        < len(processor.tokenizer)
        < 2000
    )
    assert (
        model.model.visual.config.window_size == 112
        and model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    )


def test_a_shape_is_saved_in_the_dtype_it_is_loaded_in(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "DTYPE", torch.bfloat16)
    monkeypatch.setitem(bench.SHAPES, "3b", (256, 1, 2, 1, 64, 3000, False))
    released = bench.released_config

    def shallow(*asked):  # the vision tower alone has 0.6 billion weights
        config = released(*asked)
        config.vision_config.depth = 1
        return config

    monkeypatch.setattr(bench, "released_config", shallow)
    folder, _ = bench.prepare(small(shape="3b"), tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert (
        model.lm_head.weight.shape == (3000, 256)
        and model.lm_head.weight is not model.get_input_embeddings().weight
    )


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_that_a_step_reads_by_hand(tied):
    config = bench.make_toy(0, hidden=128, layers=2, group=4)[0].config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    model = AutoModelForImageTextToText.from_config(config)
    layer = (
        128 * 128 + 128 + 2 * (128 * 32 + 32) + 128 * 128 + 3 * 128 * 384 + 2 * 128
    )  # q, k and v with their biases, o, mlp, norms
    head = 128 * config.text_config.vocab_size
    assert bench.weight_bytes(model) == 4 * (2 * layer + 128 + head)
    assert sum(
        weight.nbytes for weight in model.model.language_model.parameters()
    ) == bench.weight_bytes(model)  # with the table
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied


MEASURED = {
    "prefill": [1, 7, 1e12],
    "rollout": [3, 7, 6e12],
    "reference": [2, 7, 4e12],
    "policy": [4, 7, 12e12],
    "optimizer": [1, 7, 0],
    "step": [10, 7, 22e12],
    "rates": [4, 20, 10],
    "weight_bytes": 5e9,
    "tokens": [1] * 6,
    "logp": [0] * 6,
}


def print_step(results, monkeypatch, capsys, **changes):
    """What bench.py step prints of these results -> {first words of a line: the rest}."""
    monkeypatch.setattr(bench, "time_sides", lambda *_: results)
    bench.bench_step(small(sides=list(results), **changes))
    return {line[:20].strip(): line[20:].split() for line in capsys.readouterr().out.splitlines()}


def test_shares_by_hand(monkeypatch, capsys):
    told = print_step({"packed": [MEASURED, {**MEASURED, "rates": [2, 5, 8]}]}, monkeypatch, capsys)
    assert told["FLOPs, rollout"] == ["6", "TFLOP", "50.0%"] and told["FLOPs, step"] == [
        "22",
        "TFLOP",
        "55.0%",
    ]  # of the best, 4 TFLOP/s
    assert told["tokens/s, rollout"] == ["2.0"] and told["tokens/s, step"] == ["0.6"]
    assert (
        told["tokens/s, decoding"] == ["2.0"]
        and told["its bound"] == ["8.0"]
        and told["share of the bound"] == ["25.0%"]
    )
    told = print_step(
        {"packed": [MEASURED]}, monkeypatch, capsys, peak_tflops=8.0, bandwidth_gbs=40.0
    )
    assert (
        told["FLOPs, rollout"][2] == "25.0%"
        and told["its bound"] == ["16.0"]
        and told["share of the bound"] == ["12.5%"]
    )


def test_what_does_not_fit_is_out_of_memory_in_its_column(monkeypatch, capsys):
    asked, chained = (
        [],
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.\n\nRuntimeError: no graph",
    )
    seen = {
        "packed": (0, json.dumps(MEASURED), "a warning: out of memory"),
        "repeated": (-signal.SIGKILL, "", ""),
        "zero3": (1, "", chained),
        "graph": (1, "", "torch.SomeOtherError: no luck"),
    }

    def run(command, **_):
        asked.append(command[command.index("--side") + 1])
        code, out, told = seen[asked[-1]]
        return subprocess.CompletedProcess(command, code, f"some library speaks\n{out}\n", told)

    monkeypatch.setattr(bench, "prepare", lambda *_: ("folder", "medium"))
    monkeypatch.setattr(subprocess, "run", run)
    results = bench.time_sides(small(repeats=2), ["packed", "repeated", "zero3"])
    assert results == {"packed": 2 * [MEASURED], "repeated": [{}], "zero3": [{}]} and asked == [
        "packed",
        "repeated",
        "zero3",
        "packed",
    ]
    with pytest.raises(
        DataError, match="the process of graph failed: torch.SomeOtherError: no luck"
    ):
        bench.time_sides(small(), ["graph", "packed"])
    told = print_step(results, monkeypatch, capsys)
    assert told["step"] == "10.0000 s 7 MB out of memory out of memory".split() and told[
        "tokens/s, step"
    ] == ["0.6"]
    assert not [title for title in told if "packed" in title]  # nothing to compare with


def test_growth_prints_tables_and_draws_them(tmp_path, monkeypatch, capsys):
    asked = []

    def sides(arguments, sides):  # seconds = G * visual tokens of every side, times its place
        asked.append((arguments.num_generations, arguments.visual_tokens))
        if arguments.num_generations == 16:
            return {"packed": [{"step": [32, 3200]}], "repeated": [{}]}
        value = arguments.num_generations * arguments.visual_tokens / 1024
        return {
            side: [{"step": [value * place, 100 * value * place]}]
            for place, side in enumerate(sides, 1)
        }

    monkeypatch.setattr(bench, "time_sides", sides)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "bench.py",
            "grow",
            "--plot",
            str(tmp_path / "growth.png"),
            "--sides",
            "packed",
            "zero3",
            "repeated",
        ],
    )
    bench.main()
    out = capsys.readouterr().out
    assert asked == [
        (2, 2048),
        (4, 2048),
        (8, 2048),
        (16, 2048),
        (8, 256),
        (8, 512),
        (8, 1024),
        (8, 2048),
        (8, 4096),
    ]
    assert "| completions G | packed, s | packed, MB | repeated, s | repeated, MB |" in out
    assert (
        "| 16 | 32.00 | 3,200 | out of memory |  |" in out
        and "| 256 | 2.00 | 200 | 4.00 | 400 |" in out
    )
    assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"


def test_smallest_prior_prints_ratios():
    flags = [
        "--videos",
        "3",
        "--seconds",
        "1",
        "--width",
        "64",
        "--height",
        "48",
        "--frames",
        "4",
        "--repeats",
        "1",
        "--memory_videos",
        "20",
        "--clip",
        "ViT-S-32-alt",
    ]
    out = run_bench("prior", *flags)
    for title in (
        "hsv + uniform priors / get_batch",
        "one worker / two workers",
        "  get_batch alone, one process / two",
        "CLIP (ViT-S-32-alt) / decoding",
        "all / the slower of the two",
    ):
        line = next(line for line in out.splitlines() if line.startswith(title))
        ratio, low, high = (
            float(value)
            for value in re.search(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)$", line).groups()
        )
        assert 0 < ratio == low == high
    used = [float(value) for value in out.rpartition(": ")[2].split()]
    assert len(used) == 10 and all(value > 100 for value in used)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("step", "--num_generations", "1"), "--num_generations 1 is too small"),
        (("grow", "--visual_tokens", "1"), "--visual_tokens 1 is too small"),
        (("step", "--sides", "packed", "vllm"), "invalid choice: 'vllm'"),
        (
            ("step", "--model_name_or_path", "no/such/folder"),
            "no/such/folder is not a folder with a checkpoint",
        ),
        (("step", "--batch", "3"), "unrecognized arguments: --batch"),
        (("step", "--frames", "-1"), "--frames -1 is too small"),
        (("step", "--frames", "4", "--sides", "packed", "trl"), "TRL scores no videos"),
        (("step", "--shape", "14b"), "invalid choice: '14b'"),
        (("step", "--shape", "3b", "--model_name_or_path", "x"), "not allowed with argument"),
        (
            ("step", "--shape", "3b", "--layers", "2"),
            "--shape 3b has a width and layers of its own",
        ),
        (("step", "--peak_tflops", "-1"), "--peak_tflops -1.0 is too small"),
        (("grow", "--bandwidth_gbs", "1"), "unrecognized arguments: --bandwidth_gbs"),
        (("prior", "--videos", "1"), "--videos 1 is too small"),
        (("prior", "--clip", "ViT"), "--clip ViT is no architecture of open_clip"),
    ],
)
def test_bad_flags(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    told = capsys.readouterr()
    assert (
        stop.value.code == 2
        and told.out == ""
        and words in told.err
        and "Traceback" not in told.err
    )
