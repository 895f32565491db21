"""Times the same code the stages run (grpo.py, prior.py) against named baselines, in turns that alternate in one run.

    python bench.py step                                         # a random small Qwen2.5-VL; with TRL beside it after pip install trl
    python bench.py step --model_name_or_path Qwen2.5-VL-3B-Instruct --visual_tokens 4096 --completion_length 512
    python bench.py step --shape 7b --frames 16 --visual_tokens 1024 --completion_length 512 --sides packed graph   # random weights, a GPU
    python bench.py grow --plot growth.png                       # the same for more completions and for more visual tokens, half an hour
    python bench.py prior                                        # random videos, a random ViT-B-32, some minutes
    python bench.py prior --memory_videos 2000

`step`: one question about a picture, or with --frames a video (TRL scores none): sampling, reference, policy, update. Sides: `packed`,
the group in one row and the prompt encoded once; `repeated`, the prompt repeated for every completion; `zero3`, packed under
DeepSpeed's ZeRO-3 on one rank; `trl`, TRL's GRPOTrainer; `graph`, packed and sampled in fixed shapes, on a GPU as one CUDA graph. The
same weights, medium, group and lengths; each side in processes of its own, in turns; AdamW, in float32 on a CPU and bfloat16 on a GPU.
Memory is the peak of a phase over what the process had with its libraries loaded, on a GPU that of torch's allocator; a side that finds
too little says so in its column. AdamW's moments are in the weights' type, not in float32 as under DeepSpeed.
FLOPs are those of torch's FlopCounterMode: matmuls and convolutions, attention in full squares, causal or not, with a graph's empty
columns, and again what is computed again. tokens/s are sampled tokens. A step of decoding takes at least the time to read the weights:
the bound knows no cache.
`prior`: building priors without CLIP against decord's get_batch of the same frames; two workers against one; with CLIP, the whole
against its slower half alone (decoding and preprocessing, or CLIP). On a CPU, CLIP has one thread, so that one worker has a core too.
Processes that decode keep to a core each, those that only call get_batch too.
`--memory_videos N` then builds N priors and prints the memory of all processes on the way.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import cv2
import decord
import numpy as np
import open_clip
import psutil
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as hf_logging

import prior
import toy
import train
from common.data import DataError, Example
from common.engine import start_engine
from common.flags import Help
from common.media import Encoder
from common.policy import FAMILIES, PACKED_FAMILIES, Policy, collate, vision_tokens
from common.ranks import start_ranks
from common.rollout import Sampling, replay, rollout, sampling, stop_tokens
from grpo import group_advantages, policy_loss

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
SIDES = ("packed", "repeated", "zero3", "trl", "graph")
PHASES = (
    "prefill",
    "rollout",
    "reference",
    "policy",
    "optimizer",
    "step",
)  # prefill: a rollout of one token, beside the step
STEP_FLAGS = {  # default, least, help
    "num_generations": (8, 2, "completions of the question"),
    "completion_length": (128, 2, "tokens of every completion"),
    "visual_tokens": (2048, 16, "of the whole picture or video; rounded to 2 n^2 a temporal slot"),
    "frames": (
        0,
        0,
        "of a video, two a slot; 0: a picture; people train with 16 frames of 1024 visual tokens in all, 64 of 4096",
    ),
    "hidden": (256, 128, "width of the random model, a multiple of 128"),
    "layers": (6, 1, "of the random model"),
    "steps": (2, 1, "timed steps of a process, after one that is not"),
    "repeats": (3, 1, "timed turns"),
    "seed": (0, 0, "of everything random"),
}
SPEED_FLAGS = {
    "peak_tflops": (
        0.0,
        0,
        "what utilisation is a share of; 0: the rate of a large matmul, measured",
    ),
    "bandwidth_gbs": (
        0.0,
        0,
        "GB/s of the memory that the weights are in; 0: the better of a large sum and a large copy, measured",
    ),
}
PRIOR_FLAGS = {
    "videos": (32, 3, "videos to make and build the priors of"),
    "seconds": (10, 1, "length of a video, at 24 frames a second"),
    "width": (640, 32, "pixels"),
    "height": (360, 32, "pixels"),
    "frames": (16, 2, "K, frames sampled from a video"),
    "repeats": (5, 1, "timed turns"),
    "memory_videos": (0, 0, "0: without the memory figures"),
    "seed": (0, 0, "of everything random"),
}
SHAPES = {  # width, layers, heads, key heads, intermediate width, vocabulary, tied embeddings: Qwen2.5-VL's language models
    "3b": (2048, 36, 16, 2, 11008, 151936, True),
    "7b": (3584, 28, 28, 4, 18944, 152064, False),
}
# The same in every version of torch: some count no attention on a CPU, some refuse fewer key heads. Shapes (B, heads, S, d).
ATTENTION_FLOPS = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{end}"): formula
    for kernel in (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
    )
    for end, formula in (
        ("", lambda query, key, *_, **__: 4 * math.prod(query) * key[2]),
        ("_backward", lambda _, query, key, *__, **___: 10 * math.prod(query) * key[2]),
    )
}


def make_toy(seed, **size):
    """A random tiny Qwen2.5-VL and its processor; the tokenizer learns from toy questions, no video is made."""
    rng, rows = random.Random(seed), []
    for index in range(60):
        plan = toy.plan_video(np.random.default_rng([seed, index]))
        rows += [
            {**toy.make_question(kind, plan, rng, biased=False), "path": "none.mp4"}
            for kind in ("colour", "count", "order")
        ]
    with tempfile.TemporaryDirectory() as folder:
        rows = [{**row, "problem_id": index} for index, row in enumerate(rows)]
        (Path(folder) / "train_cot.json").write_text(json.dumps(rows), encoding="utf-8")
        processor = toy.make_processor(Path(folder))
    return toy.make_model(processor, seed, **size), processor


def released_config(small, shape):
    """The toy's configuration, with its token ids, in the sizes of a released Qwen2.5-VL."""
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
    )
    sizes, (*numbers, tied) = small.to_dict(), SHAPES[shape]
    sizes["text_config"] |= {
        **dict(zip(names, numbers, strict=True)),
        "tie_word_embeddings": tied,
        "layer_types": None,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    }
    sizes["vision_config"] |= {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "out_hidden_size": numbers[0],
        "tokens_per_second": 2,
        "initializer_range": 0.02,
    }
    return type(small).from_dict({**sizes, "tie_word_embeddings": tied})


def time_turns(works, repeats):
    """Seconds of each, (repeats, works), alternating; one untimed round before."""
    seconds = np.zeros((repeats + 1, len(works)))
    for row in seconds:
        for column, work in enumerate(works):
            begin = time.perf_counter()
            work()
            if GPU:
                torch.cuda.synchronize()
            row[column] = time.perf_counter() - begin
    return seconds[1:]


def slots_and_rows(arguments):
    """Temporal slots of the medium, and n: a slot has n rows of 2n visual tokens."""
    slots = max(1, math.ceil(arguments.frames / 2))
    return slots, max(1, round((arguments.visual_tokens / slots / 2) ** 0.5))


def prepare(arguments, folder):
    """The random model, unless there is a checkpoint, and the medium; -> the checkpoint's folder and the medium's path."""
    path = Path(arguments.model_name_or_path or folder)
    if arguments.model_name_or_path is None:
        model, processor = make_toy(
            arguments.seed, hidden=arguments.hidden, layers=arguments.layers, group=4
        )
        if arguments.shape:
            model = AutoModelForImageTextToText.from_config(
                released_config(model.config, arguments.shape), dtype=DTYPE
            )
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    elif not (path / "config.json").is_file():
        raise DataError(f"{path} is not a folder with a checkpoint (--model_name_or_path)")
    config = AutoConfig.from_pretrained(path)
    if config.model_type not in FAMILIES:
        raise DataError(
            f"{path} is a {config.model_type} checkpoint, not one of {', '.join(FAMILIES)}"
        )
    if "graph" in arguments.sides and config.model_type not in PACKED_FAMILIES:
        raise DataError(
            f"{config.model_type} is not packed and samples without a graph: leave graph out of --sides"
        )
    side = (
        config.vision_config.patch_size
        * config.vision_config.spatial_merge_size
        * slots_and_rows(arguments)[1]
    )
    pixels = np.random.default_rng(arguments.seed).integers(
        0, 256, (arguments.frames or 1, side, 2 * side, 3), dtype=np.uint8
    )
    medium = str(Path(folder) / ("video.mp4" if arguments.frames else "picture.png"))
    if arguments.frames:
        toy.write_video(medium, pixels, fps=2)
    else:
        Image.fromarray(pixels[0]).save(medium)
    return str(path), medium


def measure():
    """TFLOP/s of a large matmul, GB/s of a large sum (reads) and of a large copy (reads and writes); the best of ten each."""
    side, size = (8192, 1 << 30) if GPU else (1536, 1 << 26)
    square, large = (
        torch.randn(side, side, device=DEVICE, dtype=DTYPE),
        torch.ones(size, device=DEVICE, dtype=DTYPE),
    )
    other = torch.empty_like(large)
    seconds = time_turns((lambda: square @ square, large.sum, lambda: other.copy_(large)), 10).min(
        0
    )
    return [
        2e-12 * side**3 / seconds[0],
        1e-9 * large.nbytes / seconds[1],
        2e-9 * large.nbytes / seconds[2],
    ]


def weight_bytes(model):
    """What a step of decoding reads of the weights: layers, final norm and head. The embedding table counts as the head that it may be."""
    layers = (
        weight
        for name, weight in model.model.language_model.named_parameters()
        if not name.startswith("embed_tokens.")
    )
    return sum(weight.nbytes for weight in layers) + model.lm_head.weight.nbytes


def reset_peak():
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM <- VmRSS


def peak():
    """Bytes, the most since reset_peak: of the GPU's memory if there is one, else of this process's."""
    if GPU:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return (
        int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    )  # ru_maxrss inherits the parent's


@contextmanager
def phase(found, name, base, count=False):
    """found[name] <- [seconds, MB at the peak, FLOPs if they are counted] of the block."""
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
    launch = patch(
        "common.rollout.replay", lambda *work: replay(*work[:-1], torch.device("cpu"))
    )  # no CUDA graph, whose replays nothing counts
    reset_peak()
    begin = time.perf_counter()
    with counter if count else nullcontext(), launch if count else nullcontext():
        yield
    top = peak()  # waits for the GPU
    found[name] = [time.perf_counter() - begin, (top - base) / 1e6, counter.get_total_flops()]


def our_steps(arguments, side, base):
    """Yields ({phase: [seconds, MB, FLOPs]}, log-probs, tokens and weight_bytes) of every whole step of ours; FLOPs of the first alone."""
    zero3, group = side == "zero3", arguments.num_generations
    if zero3:
        start_ranks()
        settings = train.TrainArguments(
            deepspeed=str(Path(__file__).with_name("ds_zero3.json")), output_dir=None
        )
        reference = start_engine(settings, arguments.folder)
        policy = start_engine(settings, arguments.folder, learning_rate=1e-6)
        model = policy.module.model
    else:
        policy, reference = (
            Policy(
                AutoModelForImageTextToText.from_pretrained(
                    arguments.folder, dtype=DTYPE, attn_implementation="sdpa"
                )
            ).to(DEVICE)
            for _ in range(2)
        )
        reference.eval()
        model, optimizer = policy.model, torch.optim.AdamW(policy.parameters(), lr=1e-6)
    processor = big_pictures(AutoProcessor.from_pretrained(arguments.folder))
    encoder = Encoder(processor, 0, 1 << 40, arguments.frames)
    eos = stop_tokens(model, processor)
    banned = vision_tokens(model.config) + eos
    packed = side != "repeated"
    example = Example(
        "0",
        "Which ball is red?",
        [],
        "numerical",
        "1",
        arguments.medium,
        "video" if arguments.frames else "image",
    )
    for count in itertools.chain([True], itertools.repeat(False)):
        found = {}
        for name, length in (("prefill", 1), ("rollout", arguments.completion_length)):
            with (
                phase(found, name, base, count),
                sampling(policy) if zero3 else nullcontext(model.eval()) as bare,
            ):
                prompts = collate([encoder.encode(example)], model).to(DEVICE)
                rows, numbers = (
                    (prompts, [group]) if packed else (prompts.repeat([group]), [1] * group)
                )
                settings = Sampling(length, graph=side == "graph", eos_ids=eos, banned_ids=banned)
                tokens, mask, *_ = rollout(bare, rows, numbers, range(group), settings)
                read = weight_bytes(bare)
        model.train()
        completions, mask = tokens[None], mask[None]
        with phase(found, "reference", base, count), torch.no_grad():
            ref_logp = reference(prompts, completions, mask, packed)[0][0]
        with phase(found, "policy", base, count):
            logp = policy(prompts, completions, mask, packed, hidden_layers=(-1,))[0][0]
            loss, _ = policy_loss(
                logp,
                logp.detach(),
                group_advantages(torch.rand(1, group))[0].to(DEVICE),
                mask[0],
                ref_logp,
            )
            policy.backward(loss) if zero3 else loss.backward()
        with phase(found, "optimizer", base, count):
            if zero3:
                policy.step()
            else:
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        seconds, tops, flops = zip(*(found[name] for name in PHASES[1:-1]), strict=True)
        found["step"] = [sum(seconds), max(tops), sum(flops)]
        yield (
            found,
            {
                "logp": logp.flatten().tolist(),
                "tokens": tokens.flatten().tolist(),
                "weight_bytes": read,
            },
        )


def big_pictures(processor):
    """The processor without limits: the picture keeps its size."""
    processor.image_processor.size = {"shortest_edge": 1, "longest_edge": 1 << 40}
    return processor


def trl_steps(arguments, base):
    """{"step": [seconds, MB]} of TRL's GRPOTrainer, which runs its own loop."""
    from datasets import Dataset
    from datasets import Image as Picture
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ends, length = [], arguments.completion_length
    clock = type(
        "Clock",
        (TrainerCallback,),
        {"on_step_end": lambda self, *_, **__: ends.append(time.perf_counter())},
    )
    question = {
        "prompt": [{"role": "user", "content": "Which ball is red?"}],
        "image": arguments.medium,
    }
    reset_peak()
    with tempfile.TemporaryDirectory() as output:
        GRPOTrainer(
            model=arguments.folder,
            processing_class=big_pictures(AutoProcessor.from_pretrained(arguments.folder)),
            callbacks=[clock()],
            reward_funcs=lambda completions, **_: [random.random() for _ in completions],
            train_dataset=Dataset.from_list([question] * 4).cast_column("image", Picture()),
            args=GRPOConfig(
                output_dir=output,
                max_steps=arguments.steps + 1,
                per_device_train_batch_size=arguments.num_generations,
                num_generations=arguments.num_generations,
                max_completion_length=length,
                beta=0.04,
                learning_rate=1e-6,
                generation_kwargs={"min_new_tokens": length},
                save_strategy="no",
                report_to=[],
                use_cpu=not GPU,
                bf16=GPU,
                gradient_checkpointing=False,
                disable_tqdm=True,
                logging_strategy="no",
                model_init_kwargs={
                    "dtype": str(DTYPE).removeprefix("torch."),
                    "attn_implementation": "sdpa",
                },
            ),
        ).train()
    return {"step": [float(np.median(np.diff(ends))), (peak() - base) / 1e6]}


def run_side(arguments):
    """One process: {phase: [seconds, MB, FLOPs]}, medians over its steps, and measure()'s rates."""
    if arguments.side == "trl":  # not part of the peak
        from datasets import Dataset  # noqa: F401
        from trl import GRPOTrainer  # noqa: F401
    base = 0 if GPU else psutil.Process().memory_info().rss
    if arguments.side == "trl":
        return trl_steps(arguments, base)
    rates = measure()
    torch.cuda.empty_cache()
    untimed = 1 + (
        arguments.side == "graph"
    )  # FLOPs are counted without the graph, whose first capture takes longer
    (counted, first), *steps = itertools.islice(
        our_steps(arguments, arguments.side, base), arguments.steps + untimed
    )
    steps = steps[untimed - 1 :]
    medians = {
        name: np.median([found[name][:2] for found, _ in steps], axis=0).tolist() for name in PHASES
    }
    return {
        **{name: [*medians[name], counted[name][2]] for name in PHASES},
        **first,
        "rates": rates,
    }


def time_sides(arguments, sides):
    """{side: list of what its processes printed}, in `repeats` turns; the last is {} where the memory did not suffice."""
    results = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(arguments.seed)
        checkpoint, medium = prepare(arguments, folder)
        flags = [
            value for name in STEP_FLAGS for value in (f"--{name}", str(getattr(arguments, name)))
        ]
        for side in [*sides] * arguments.repeats:
            if {} in results[side]:
                continue
            command = [
                sys.executable,
                __file__,
                "step",
                *flags,
                "--side",
                side,
                "--folder",
                checkpoint,
                "--medium",
                medium,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            full = (
                done.returncode == -signal.SIGKILL or "out of memory" in done.stderr.lower()
            )  # SIGKILL: the kernel's way to say so
            if done.returncode and not full:
                raise DataError(
                    f"the process of {side} failed: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1]}"
                )
            results[side].append(
                json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else {}
            )
    return results


def phase_values(results, side, phase, column):
    """(turns,) seconds (column 0) or MB (column 1) of a phase; NaN where the memory did not suffice."""
    return np.array([found[phase][column] if found else np.nan for found in results[side]])


def shown(results, side, phase, form, full="out of memory"):
    """A phase's seconds and MB in a format, or that the memory was full, or nothing for a phase that the side does not tell apart."""
    if {} in results[side]:
        return full
    return (
        form.format(*(np.median(phase_values(results, side, phase, column)) for column in (0, 1)))
        if phase in results[side][0]
        else ""
    )


def print_row(title, cells):
    print((f"{title:20s}" + "".join(f"{cell:>24s}" for cell in cells)).rstrip())


def machine():
    gpu = f"{torch.cuda.get_device_name()}, " if GPU else ""
    return (
        f"{gpu}{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )


def bench_step(arguments):
    sides = arguments.sides
    results = time_sides(arguments, sides)
    sizes = (
        f"the sizes of Qwen2.5-VL-{arguments.shape.upper()}"
        if arguments.shape
        else f"width {arguments.hidden}, {arguments.layers} layers, 4 query heads a key head"
    )
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "transformers", "trl")
        if name != "trl" or "trl" in sides
    )
    slots, rows = slots_and_rows(arguments)
    medium = (
        f"a video of {arguments.frames} frames, {slots} slots," if arguments.frames else "a picture"
    )
    print(
        f"machine     {machine()}; {versions}\n"
        f"model       {arguments.model_name_or_path or f'random Qwen2.5-VL, {sizes}'}\n"
        f"step        {medium} of {slots * 2 * rows**2} visual tokens, {arguments.num_generations} completions of "
        f"{arguments.completion_length} tokens\n"
        f"timing      median of {arguments.repeats} alternating turns of processes, {arguments.steps} steps each; seconds and MB at the "
        f"peak of a phase\n"
    )
    print_row("", sides)
    for phase in PHASES:
        print_row(phase, [shown(results, side, phase, "{:10.4f} s{:7.0f} MB") for side in sides])
    print_speeds(arguments, results)
    fit = [side for side in sides if {} not in results[side]]
    for title, side, phase, column in (
        ("step, TRL / packed", "trl", "step", 0),
        ("memory, TRL / packed", "trl", "step", 1),
        ("step, repeated / packed", "repeated", "step", 0),
        ("memory, repeated / packed", "repeated", "step", 1),
        ("policy, repeated / packed", "repeated", "policy", 0),
        ("rollout, repeated / packed", "repeated", "rollout", 0),
        ("rollout, zero3 / packed", "zero3", "rollout", 0),
        ("rollout, graph / packed", "graph", "rollout", 0),
    ):
        if side in fit and "packed" in fit:
            print_ratio(
                title,
                phase_values(results, side, phase, column)
                / phase_values(results, "packed", phase, column),
            )
    if {"packed", "repeated"} <= set(fit):
        one, two = (results[side][0] for side in ("packed", "repeated"))
        apart = (
            np.abs(np.array(one["logp"]) - np.array(two["logp"])).max()
            if one["tokens"] == two["tokens"]
            else float("nan")
        )
        equal = np.mean(np.array(one["tokens"]) == np.array(two["tokens"]))
        print(
            f"packed and repeated: {equal:.1%} of the sampled tokens equal, log-probs {apart:.0e} apart at most"
        )


def print_speeds(arguments, results):
    """FLOPs, utilisation and sampled tokens/s of every side by the medians of its seconds, and what they are shares of."""
    ours = [found for processes in results.values() for found in processes if "rates" in found]
    matmul, summed, copied = np.max([found["rates"] for found in ours] or [[np.nan] * 3], axis=0)
    roof, of = (
        (arguments.peak_tflops, "--peak_tflops")
        if arguments.peak_tflops
        else (matmul, "a large matmul")
    )
    bandwidth, at = max((summed, "a large sum"), (copied, "a large copy"))
    bandwidth, at = (
        (arguments.bandwidth_gbs, "--bandwidth_gbs") if arguments.bandwidth_gbs else (bandwidth, at)
    )
    group, columns = arguments.num_generations, []
    sampled = group * arguments.completion_length
    for side, processes in results.items():
        seconds = (
            {}
            if {} in processes
            else {
                name: np.median(phase_values(results, side, name, 0))
                for name in PHASES
                if name in processes[0]
            }
        )
        column = {
            f"tokens/s, {name}": f"{sampled / seconds[name]:,.1f}"
            for name in ("rollout", "step")
            if name in seconds
        }
        if "rollout" in seconds:
            flops = {name: processes[0][name][2] / 1e12 for name in PHASES if name != "optimizer"}
            column = {
                f"FLOPs, {name}": f"{count:.4g} TFLOP{count / seconds[name] / roof:7.1%}"
                for name, count in flops.items()
            } | column
            decoding = seconds["rollout"] - seconds["prefill"]
            rate = (
                (sampled - group) / decoding if decoding > 0 else np.nan
            )  # a few tokens can be lost in the prefill's noise
            bound = group * bandwidth * 1e9 / processes[0]["weight_bytes"]
            column |= {
                "tokens/s, decoding": f"{rate:,.1f}",
                "its bound": f"{bound:,.1f}",
                "share of the bound": f"{rate / bound:.1%}",
            }
        columns.append(column)
    print()
    for title in dict.fromkeys(title for column in columns for title in column):
        print_row(title, [column.get(title, "") for column in columns])
    if ours:
        print(
            f"\nFLOPs       of an untimed step, attention in full squares (a causal kernel does half); % of {roof:.4g} TFLOP/s ({of})\n"
            f"decoding    rollout without prefill (one token, beside the step); its bound reads {ours[0]['weight_bytes'] / 1e9:.4g} GB "
            f"of weights a step at {bandwidth:.4g} GB/s ({at})"
        )
    print()


def bench_grow(arguments):
    """The step's seconds and MB for several sizes of the group and of the picture, as Markdown tables and a plot."""
    import matplotlib.pyplot as plt

    sides = [side for side in arguments.sides if side != "zero3"]
    colours = {
        "packed": "#0072B2",
        "repeated": "#D55E00",
        "trl": "#009E73",
        "graph": "#E69F00",
    }  # Okabe and Ito's
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    print(f"{machine()}; median of {arguments.repeats} turns of {arguments.steps} steps\n")
    for row, (name, label, sizes) in enumerate(
        (
            ("num_generations", "completions G", (2, 4, 8, 16)),
            ("visual_tokens", "visual tokens", (256, 512, 1024, 2048, 4096)),
        )
    ):
        table = {
            size: time_sides(argparse.Namespace(**{**vars(arguments), name: size}), sides)
            for size in sizes
        }
        print(
            f"| {label} | "
            + " | ".join(f"{side}, s | {side}, MB" for side in sides)
            + " |\n|"
            + "---|" * (2 * len(sides) + 1)
        )
        for size, results in table.items():
            cells = [
                shown(results, side, "step", "{:.2f} | {:,.0f}", "out of memory | ")
                for side in sides
            ]
            print(f"| {size:,} | {' | '.join(cells)} |", flush=True)
        print()
        for column, unit in enumerate(("seconds a step", "MB at the peak")):
            for side in sides:
                values = [
                    np.median(phase_values(results, side, "step", column))
                    for results in table.values()
                ]
                axes[row, column].plot(
                    sizes, values, "o-", color=colours[side], label={"trl": "TRL"}.get(side, side)
                )
            axes[row, column].set(xlabel=label, ylabel=unit, ylim=0, xticks=sizes[:1] + sizes[-3:])
            axes[row, column].spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    figure.savefig(arguments.plot, dpi=150)


def make_videos(arguments, folder):
    """Example of every random video: four scenes of drifting coarse colours, MPEG-4 with a key frame every half second."""
    examples, size = [], (arguments.width, arguments.height)
    for index in range(arguments.videos):
        rng, path = (
            np.random.default_rng([arguments.seed, index]),
            str(Path(folder) / f"{index}.mp4"),
        )
        writer, count = (
            cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), 24, size),
            24 * arguments.seconds,
        )
        for scene in np.array_split(np.arange(count), 4):
            picture = cv2.resize(
                rng.integers(0, 256, (9, 16, 3)).astype(np.uint8),
                size,
                interpolation=cv2.INTER_CUBIC,
            )
            grain = rng.integers(0, 24, picture.shape).astype(np.uint8)
            for step in range(len(scene)):
                writer.write(np.roll(cv2.add(picture, grain), 3 * step, axis=1))
        writer.release()
        examples.append(
            Example(str(index), f"what is in video {index}", [], "free-form", "a", path, "video")
        )
    return examples


def get_batch(path, frames):
    reader = decord.VideoReader(path, num_threads=1)
    reader.get_batch(prior.uniform_frames(len(reader), frames)).asnumpy()


def steady(results, workers=1):
    """Seconds an item from every worker's first result on: without their start."""
    for _ in range(workers):
        next(results)
    begin = time.perf_counter()
    count = sum(1 for _ in results)
    return (time.perf_counter() - begin) / count


def bench_prior(arguments):
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)
    model, _, preprocess = open_clip.create_model_and_transforms(
        arguments.clip, pretrained=None, device=DEVICE
    )  # random weights
    clip = prior.Clip(
        model.eval(),
        preprocess,
        lambda texts: torch.ones(len(texts), model.context_length, dtype=torch.long),
        DEVICE,
    )
    hsv, full = (
        prior.PriorSettings(frames=arguments.frames, prior=name) for name in ("no_semantic", "full")
    )
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        examples = make_videos(arguments, folder)
        groups = prior.group_by_medium(examples)

        def bare(workers=0):
            """decord's get_batch alone, of every video; in plain worker processes if there are some."""
            paths = [example.media for example in examples]
            if workers == 0:
                return [get_batch(path, arguments.frames) for path in paths]
            with ProcessPoolExecutor(
                workers, mp_context=context, initializer=workers.start_worker
            ) as pool:
                return steady(
                    pool.map(get_batch, 3 * paths, itertools.repeat(arguments.frames)), workers
                )

        def rows(settings, workers, model=None, media=groups):
            """What prior.py does with every video."""
            for medium, cues in prior.all_cues(
                media, settings, model and model.preprocess, workers
            ):
                yield prior.media_rows(groups[medium], cues, model, settings)

        pixels = [cues[-1] for _, cues in prior.all_cues(groups, full, preprocess)]

        def encode():
            for one in pixels:
                yield prior.encode_texts(["x"], clip) @ prior.encode_pixels(one, clip).T

        print(
            f"machine     {platform.machine()} CPU, {os.cpu_count()} cores; CLIP on {DEVICE}; torch {torch.__version__}\n"
            f"videos      {len(examples)}, {arguments.width}x{arguments.height}, {arguments.seconds} s at 24 fps, MPEG-4; "
            f"{arguments.frames} frames of each\n"
            f"timing      median of {arguments.repeats} alternating turns (lowest to highest); workers from their first results on\n"
        )
        seconds = time_turns((bare, lambda: list(rows(hsv, 0))), arguments.repeats)
        print_ratio("hsv + uniform priors / get_batch", seconds[:, 1] / seconds[:, 0])
        seconds = np.array(
            [
                [
                    *(
                        steady(rows(hsv, workers, media=3 * list(groups)), workers)
                        for workers in (1, 2)
                    ),
                    bare(1),
                    bare(2),
                ]
                for _ in range(arguments.repeats)
            ]
        )
        print_ratio("one worker / two workers", seconds[:, 0] / seconds[:, 1])
        print_ratio("  get_batch alone, one process / two", seconds[:, 2] / seconds[:, 3])
        seconds = np.array(
            [
                [
                    steady(prior.all_cues(groups, full, preprocess, 1)),
                    steady(encode()),
                    steady(rows(full, 1, clip)),
                ]
                for _ in range(arguments.repeats)
            ]
        )
        print_ratio(f"CLIP ({arguments.clip}) / decoding", seconds[:, 1] / seconds[:, 0])
        print_ratio("all / the slower of the two", seconds[:, 2] / seconds[:, :2].max(1))
        if arguments.memory_videos:
            memory(
                rows(
                    full,
                    2,
                    clip,
                    itertools.islice(itertools.cycle(groups), arguments.memory_videos),
                ),
                arguments.memory_videos,
            )


def memory(results, count):
    """Prints the resident memory of this process and its workers while `count` results come."""
    used, process = [], psutil.Process()
    for done, _ in enumerate(results, 1):
        if done % max(1, count // 10) == 0:
            used.append(
                sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
                / 1e6
            )
    print(
        f"memory of all processes over {count} videos, MB after every tenth of them: {' '.join(f'{value:.0f}' for value in used)}"
    )


def print_ratio(title, ratios):
    print(f"{title:44s}{np.median(ratios):8.2f} ({ratios.min():.2f} to {ratios.max():.2f})")


def main():
    hf_logging.set_verbosity_error()
    known_flags = {"step": STEP_FLAGS | SPEED_FLAGS, "grow": STEP_FLAGS, "prior": PRIOR_FLAGS}
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True)
    add = functools.partial(commands.add_parser, allow_abbrev=False, formatter_class=Help)
    step = add("step", help="a whole step: packed, repeated, under ZeRO-3, TRL's, by a CUDA graph")
    grow = add(
        "grow", help="the same over the size of the group and of the picture; tables and a plot"
    )
    build = add("prior", help="building priors, against decord alone; workers; overlap; memory")
    build.add_argument(
        "--clip",
        default="ViT-B-32",
        help="open_clip's name of the architecture, with random weights",
    )
    grow.add_argument("--plot", default="growth.png", help="file of the plot")
    trl = ["trl"] if importlib.util.find_spec("trl") else []
    for command in (step, grow):
        model = command.add_mutually_exclusive_group()
        model.add_argument(
            "--model_name_or_path",
            help="folder of a checkpoint; without one a random small Qwen2.5-VL",
        )
        model.add_argument(
            "--shape", choices=SHAPES, help="random weights in the sizes of Qwen2.5-VL-3B or -7B"
        )
        command.add_argument(
            "--sides",
            nargs="+",
            choices=SIDES,
            help="default: all, but graph on a GPU alone, trl if it is installed and there is a picture",
        )
    for name in ("side", "folder", "medium"):
        step.add_argument(f"--{name}", help=argparse.SUPPRESS)  # of the processes that it starts
    for command, known in zip((step, grow, build), known_flags.values(), strict=True):
        for name, (default, _, text) in known.items():
            command.add_argument(f"--{name}", type=type(default), default=default, help=text)
    arguments = parser.parse_args()
    try:
        for name, (_, least, _) in known_flags[arguments.command].items():
            if getattr(arguments, name) < least:
                raise DataError(
                    f"--{name} {getattr(arguments, name)} is too small; at least {least}"
                )
        if arguments.command == "prior":
            if arguments.clip not in open_clip.list_models():
                raise DataError(f"--clip {arguments.clip} is no architecture of open_clip")
            return bench_prior(arguments)
        if arguments.command == "step" and arguments.side:
            return print(json.dumps(run_side(arguments)))
        if arguments.shape and (arguments.hidden, arguments.layers) != (
            STEP_FLAGS["hidden"][0],
            STEP_FLAGS["layers"][0],
        ):
            raise DataError(
                f"--shape {arguments.shape} has a width and layers of its own: leave out --hidden and --layers"
            )
        arguments.sides = arguments.sides or [
            *SIDES[:3],
            *([] if arguments.frames else trl),
            *(["graph"] if GPU else []),
        ]
        if "trl" in arguments.sides and arguments.frames:
            raise DataError("TRL scores no videos: leave out --frames, or trl of --sides")
        if "trl" in arguments.sides and not trl:
            raise DataError("TRL is not installed (pip install trl)")
        return bench_step(arguments) if arguments.command == "step" else bench_grow(arguments)
    except DataError as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # as train.py; here, for it holds for the whole process
    main()
