"""Times a step of train.py against named baselines, in alternating turns.

    python bench.py step                           # a random small Qwen2.5-VL
    python bench.py step --sides packed repeated deepspeed trl          # after pip install trl
    python bench.py step --shape 7b --frames 16 --visual_tokens 1024 --completion_length 512 \\
        --sides packed graph                       # random weights of that size, on a GPU
    python bench.py gpu --output_dir gpu                        # all that is owed on one GPU
    python bench.py page --output_dir gpu                       # its section of docs/performance.md

`step`: one question about a picture, or with --frames a video: sampling, reference, policy, update.
AdamW, float32 on a CPU, bfloat16 (its moments, too) on a GPU. All sides have the same weights,
medium, group and lengths; each turn of a side is a process. Sides:
    packed    the group in one row, the prompt encoded once, as in train.py
    repeated  the prompt repeated for every completion, as in the releases
    deepspeed packed, in train.py's engine, on one process ZeRO-2 (captured as graph on a GPU)
    lora      the same with adapters of rank 64 on every layer (pip install peft), no second model
    trl       TRL's GRPOTrainer, which scores no videos
    graph     packed, sampled in fixed shapes, on a GPU as one CUDA graph
Memory is the peak of a phase over that of the process with its libraries, on a GPU that of torch's
allocator. A side that fails in the middle, for want of memory mostly, is named and left out.

`gpu`: the parts of GPU_PARTS in order, each in a process, into OUTPUT_DIR/PART.json; good
ones stay, so that an interrupted day goes on. Without a GPU the same parts run in small shapes.
"""

import gc
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import psutil
import torch
import transformers
from jinja2 import Template
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import toy
import train
from common.data import DataError, Example, Medium, read_document
from common.engine import (
    end_engine,
    hookless_twin,
    sampling,
    score_without_adapters,
    start_engine,
)
from common.flags import Parser, exit_codes, flag
from common.media import Encoder, PromptFlags
from common.policy import Policy, collate, load_model, vision_tokens
from common.ranks import start_ranks
from common.rollout import Sampling, rollout, stop_tokens
from common.workers import write_json
from grpo import group_advantages, policy_loss

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32

SIDES = ["packed", "repeated", "deepspeed", "lora", "trl", "graph"]
PHASES = ["rollout", "reference", "policy", "optimizer", "step"]

# Text configurations of the released Qwen2.5-VL.
SHAPES = {
    "3b": {
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11008,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


# ---- A step ----


def released_config(config, shape):
    """Return the toy's configuration, token ids included, in the sizes of a released Qwen2.5-VL."""
    sizes = config.to_dict()
    text = SHAPES[shape]
    sizes["tie_word_embeddings"] = text["tie_word_embeddings"]
    # Layer types are made anew for the number of layers.
    sizes["text_config"] |= {"layer_types": None, "initializer_range": 0.02, **text}
    sizes["text_config"]["rope_parameters"]["mrope_section"] = [16, 24, 24]
    # The other sizes of the vision tower are the class's defaults.
    sizes["vision_config"] = {"hidden_size": 1280, "out_hidden_size": text["hidden_size"]}
    return type(config).from_dict(sizes)


def write_medium(arguments, folder):
    """Write a random picture or video of --visual_tokens into a folder -> Medium."""
    # A visual token is 28 x 28 pixels.
    shape = (arguments.frames or 1, 28 * arguments.rows, 56 * arguments.rows, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = f"{folder}/{arguments.visual_tokens}"
    if arguments.frames:
        toy.write_video(f"{path}.mp4", pixels, fps=2)
        return Medium("video", f"{path}.mp4")
    cv2.imwrite(f"{path}.png", pixels[0])
    return Medium("image", f"{path}.png")


def write_checkpoint(arguments, folder):
    """Write a random checkpoint of --shape into a folder."""
    # The tokenizer learns a toy's questions.
    toy.make_dataset(Path(folder), toy.ToyArguments(train_videos=1, heldout_videos=0))
    processor = toy.make_processor(Path(folder))
    processor.save_pretrained(folder)
    model = toy.make_model(processor, seed=0, hidden=256, layers=6, group=4)
    if arguments.shape != "small":
        torch.manual_seed(0)
        config = released_config(model.config, arguments.shape)
        # A CPU would draw seven billion numbers for minutes.
        with torch.device(DEVICE):
            model = AutoModelForImageTextToText.from_config(config, dtype=DTYPE)
    model.save_pretrained(folder)


def prepare(arguments, folder):
    """Write a checkpoint, if none is there, and a random medium into a folder -> Medium."""
    if not Path(folder).exists():
        part = f"{folder}.part"
        shutil.rmtree(part, ignore_errors=True)
        # In a process, so that no memory of a GPU stays with this one.
        run_apart(write_checkpoint, arguments, part)
        Path(part).rename(folder)
    return write_medium(arguments, folder)


def device_name():
    return torch.cuda.get_device_name() if GPU else platform.machine()


def memory_in_use():
    """Return bytes in use: those of torch's allocator on a GPU, else those of the process."""
    return torch.cuda.memory_allocated() if GPU else psutil.Process().memory_info().rss


@contextmanager
def phase(costs, name, base):
    """Measure the block: costs[name] becomes its seconds, and MB at the peak above base (bytes)."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    # VmHWM becomes the memory in use.
    Path("/proc/self/clear_refs").write_text("5")
    begin = time.perf_counter()
    yield
    # A GPU is still at work when the call returns.
    if GPU:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    # getrusage's maximum would begin with that of the parent.
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    if GPU:
        peak = torch.cuda.max_memory_allocated()
    costs[name] = (seconds, (peak - base) / 1e6)


class PlainEngine:
    """The policy of a checkpoint and AdamW behind the calls of a DeepSpeed engine."""

    def __init__(self, folder):
        self.module = Policy(load_model(folder)[0]).train()
        self.twin = hookless_twin(self.module.model)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-6, fused=True)

    def __call__(self, *inputs, **settings):
        return self.module(*inputs, **settings)

    def backward(self, loss):
        loss.backward()

    def step(self):
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 5.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def load_encoder(arguments, folder):
    """Load an Encoder without limits of size, so that a medium keeps its own."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": 1, "longest_edge": 1 << 40}
    flags = PromptFlags(frames=max(1, arguments.frames), min_pixels=1, max_pixels=1 << 40)
    return Encoder(processor, flags)


class GroupStep:
    """A GRPO step on one question with this project's code, as train.py runs it.

    Args:
        side: any of SIDES but trl.
        folder, medium: checkpoint and Medium that prepare() has written.
    """

    def __init__(self, arguments, side, folder, medium):
        self.base = memory_in_use()
        if side in ("deepspeed", "lora"):
            start_ranks()
            config = str(Path(__file__).parent / arguments.deepspeed)
            rank = 64 if side == "lora" else 0
            settings = train.TrainArguments(deepspeed=config, output_dir=None, lora_rank=rank)
            self.engine = start_engine(settings, folder, learning_rate=1e-6)
            # As train_grpo(): with adapters the reference is the model without them.
            self.reference = partial(score_without_adapters, self.engine, {})
            if side == "deepspeed":
                self.reference = start_engine(settings, folder)
        else:
            self.reference = Policy(load_model(folder)[0])
            self.engine = PlainEngine(folder)
        self.encoder = load_encoder(arguments, folder)
        model = self.engine.module.model
        stops = stop_tokens(model, self.encoder.processor)
        # No completion ends early.
        banned = vision_tokens(model.config) + stops
        # train.py captures the decode step on every GPU.
        graph = side == "graph" or GPU and side in ("deepspeed", "lora")
        self.settings = Sampling(
            arguments.completion_length, graph=graph, eos_ids=stops, banned_ids=banned
        )
        self.medium = medium
        self.group = arguments.num_generations
        self.packed = side != "repeated"

    def sample(self, settings):
        """Sample the group -> Prompts, Samples."""
        example = Example("0", "Which ball is red?", [], "numerical", "1", [self.medium])
        with sampling(self.engine) as bare:
            prompts = collate([self.encoder.encode(example)], bare).to(DEVICE)
            rows = prompts if self.packed else prompts.repeat([self.group])
            counts = [self.group] if self.packed else [1] * self.group
            return prompts, rollout(bare, rows, counts, range(self.group), settings)

    def run(self):
        """Run the step -> {phase: (seconds, MB)}; self.difference: its largest logp_difference."""
        costs = {}
        with phase(costs, "rollout", self.base):
            prompts, samples = self.sample(self.settings)
        completions = samples.tokens[None]  # (1, G, T)
        mask = samples.mask[None]  # (1, G, T)
        with phase(costs, "reference", self.base), torch.no_grad():
            ref_logp = self.reference(prompts, completions, mask, self.packed).logp[0]  # (G, T)
        with phase(costs, "policy", self.base):
            # The last layer's states are what the consensus reward reads.
            scored = self.engine(prompts, completions, mask, self.packed, hidden_layers=(-1,))
            logp = scored.logp[0]  # (G, T)
            advantages = group_advantages(torch.rand(1, self.group))[0].to(DEVICE)  # (G,)
            loss, _ = policy_loss(logp, logp.detach(), advantages, mask[0], ref_logp)
            self.engine.backward(loss)
        with phase(costs, "optimizer", self.base):
            self.engine.step()
        seconds, megabytes = zip(*costs.values(), strict=True)
        costs["step"] = (sum(seconds), max(megabytes))
        self.difference = (samples.logp - logp.detach()).abs().max().item()
        return costs


def trl_step(arguments, folder, medium):
    """Run TRL's GRPOTrainer, which has its own loop -> {"step": (seconds, MB)}."""
    # Neither is needed by anything else: pip install trl.
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    times = []

    def reward(completions, **_):
        # Called once a step: from one call to the next it is a step.
        times.append(time.perf_counter())
        return [random.random() for _ in completions]

    prompt = [{"role": "user", "content": "Which ball is red?"}]
    rows = datasets.Dataset.from_list([{"prompt": prompt, "image": medium.path}] * 4)
    costs = {}
    with tempfile.TemporaryDirectory() as output, phase(costs, "all", memory_in_use()):
        config = GRPOConfig(
            output_dir=output,
            max_steps=arguments.steps + 2,
            per_device_train_batch_size=arguments.num_generations,
            num_generations=arguments.num_generations,
            max_completion_length=arguments.completion_length,
            generation_kwargs={"min_new_tokens": arguments.completion_length},
            beta=0.04,
            gradient_checkpointing=False,
            use_cpu=not GPU,
            bf16=GPU,
            save_strategy="no",
            model_init_kwargs={"dtype": DTYPE, "attn_implementation": "sdpa"},
        )
        GRPOTrainer(
            model=folder,
            args=config,
            processing_class=load_encoder(arguments, folder).processor,
            reward_funcs=reward,
            train_dataset=rows.cast_column("image", datasets.Image()),
        ).train()
    # The first is not timed, as in run_side().
    return {"step": (np.median(np.diff(times)[1:]), costs["all"][1])}


def run_side(arguments, side, folder, medium):
    """Measure a side in this process -> {phase: [seconds, MB]}, medians over the steps."""
    # A CPU computes with denormal numbers a hundred times slower.
    torch.set_flush_denormal(True)
    if side == "trl":
        return trl_step(arguments, folder, medium)
    step = GroupStep(arguments, side, folder, medium)
    step.run()  # not timed
    runs = [step.run() for _ in range(arguments.steps)]
    return {name: np.median([costs[name] for costs in runs], axis=0).tolist() for name in runs[0]}


def bench_step(arguments):
    """Time a step on every side, in processes, in alternating turns.

    It prints the phases of each side, and ratios to `packed`; sides that fail are left out.
    """
    results = {side: [] for side in arguments.sides}
    with tempfile.TemporaryDirectory() as folder:
        folder = f"{folder}/{arguments.shape}"
        medium = prepare(arguments, folder)
        for _ in tqdm(range(arguments.repeats), desc="turns"):
            for side in list(results):
                # A process a turn: memory that another one has left behind is not in its peak.
                try:
                    turn = run_apart(run_side, arguments, side, folder, medium)
                    results[side].append(turn)
                except (ProcessExpired, torch.OutOfMemoryError) as error:
                    # The kernel kills a process that takes too much.
                    print(f"{side} failed: {error!r} {vars(error)}")
                    del results[side]
    print("medians; MB at the peak of a phase")
    for side, turns in results.items():
        for name in turns[0]:
            seconds, megabytes = np.median([costs[name] for costs in turns], axis=0)
            print(f"{side:10s}{name:10s}{seconds:10.4f} s{megabytes:8.0f} MB")
    if "packed" not in results:
        return
    # Turns are paired: each ratio compares processes that ran one after the other.
    divisors = np.array([costs["step"] for costs in results.pop("packed")])  # (turns, 2)
    for side, turns in results.items():
        ratios = np.array([costs["step"] for costs in turns]) / divisors  # (turns, 2)
        for title, values in zip(("step", "memory"), ratios.T, strict=True):
            span = f"{min(values):.2f} to {max(values):.2f}"
            print(f"{title}, {side} / packed {np.median(values):.2f} ({span})")


# ---- A day with a GPU ----


def run_command(*words):
    """Run a Python command in this folder -> the last line that it prints.

    Raises:
        RuntimeError: it fails; with the end of its output.
    """
    run = subprocess.run(
        [sys.executable, *words],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if run.returncode:
        raise RuntimeError(f"exit code {run.returncode}: {run.stdout[-4000:]}")
    return run.stdout.strip().rpartition("\n")[2]


def gpu_tests(arguments, folder):
    """Run the tests that need a real device."""
    # Skipped tests exit with 0, too: the last line says so.
    return {"last line": run_command("-m", "pytest", "-q", "-n", "0", "tests/test_device.py")}


def gpu_default(arguments, folder):
    """Make the default run, in bfloat16 where there is a GPU; an interrupted one goes on."""
    output = Path(arguments.output_dir) / "default"
    launch = ["-m", "deepspeed.launcher.runner", "train.py", "--deepspeed", "ds_zero3.json"]
    launch += ["--resume_from_checkpoint", "auto", "--output_dir", str(output.resolve())]
    run_command(*launch)
    result = read_document(output / "result.json")
    steps = read_document(output / "metrics.jsonl")
    return {
        "greedy before": result["before"]["greedy"],
        "greedy after": result["after"]["greedy"],
        "logp_difference": max(step.get("rollout/logp_difference", 0) for step in steps),
    }


def gpu_capture(*asked):
    """Sample by one captured decode step; compare its tokens and log-probs with other ways."""
    step = GroupStep(*asked)
    _, plain = step.sample(replace(step.settings, graph=False))
    _, captured = step.sample(step.settings)
    step.run()
    same = (plain.tokens == captured.tokens).float().mean().item()
    return {"logp_difference": step.difference, "same_tokens": same}


def gpu_kernels(*asked):
    """Give calls and milliseconds of what runs longest in prefill, and in 64 steps behind it."""
    step = GroupStep(*asked)
    seen = {}
    device = torch.autograd.DeviceType.CUDA if GPU else torch.autograd.DeviceType.CPU
    for name, tokens in (("prefill", 1), ("prefill and 64 steps", 65)):
        settings = replace(step.settings, max_new_tokens=tokens)
        step.sample(settings)  # not profiled: the first call loads kernels
        with torch.profiler.profile() as profile:
            step.sample(settings)
        kernels = {}  # calls and milliseconds of each
        for event in profile.key_averages():
            if event.device_type == device:
                time = event.self_device_time_total if GPU else event.self_cpu_time_total
                kernels[event.key] = (event.count, time / 1000)
        calls, times = zip(*kernels.values(), strict=True)
        kernels["all"] = (sum(calls), sum(times))
        longest = sorted(kernels.items(), key=lambda kernel: -kernel[1][1])
        seen[name] = dict(longest[:12])
    return seen


def gpu_lengths(arguments, side, folder, medium):
    """Time steps over prompts of five lengths, twice: a kernel may plan anew for every shape."""
    step = GroupStep(arguments, side, folder, medium)
    step.run()
    found = {}
    for turn in (1, 2):
        for share in (1, 1 / 8, 1 / 2, 1 / 4, 3 / 4):
            tokens = round(arguments.visual_tokens * share)
            step.medium = write_medium(replace(arguments, visual_tokens=tokens), folder)
            seconds, _ = step.run()["step"]
            found[f"{tokens} tokens, turn {turn}"] = round(seconds, 3)
    return found


def gpu_memory(*asked):
    """Give MB after loading, at the peak of each phase, and after all is let go."""
    step = GroupStep(*asked)
    found = {"loaded": round((memory_in_use() - step.base) / 1e6)}
    for name, (_, megabytes) in step.run().items():
        found[name] = round(megabytes)
    end_engine(step.engine)
    step.reference = None
    gc.collect()
    found["let go"] = round((memory_in_use() - step.base) / 1e6)
    return found


def run_apart(function, *arguments):
    """Call a function in a process -> its value; errors: as it raises, ProcessExpired if killed."""
    with ProcessPool(1, context=multiprocessing.get_context("spawn")) as pool:
        return pool.schedule(function, args=arguments).result()


def gpu_part(work, shape, frames, side, arguments, folder):
    """Call run_side() or one of these four in a process; without a GPU in the small shape."""
    # A picture keeps --visual_tokens.
    tokens = 64 * frames if GPU and frames else arguments.visual_tokens
    shape = shape if GPU else "small"
    arguments = replace(arguments, shape=shape, frames=frames, visual_tokens=tokens)
    folder = f"{folder}/{shape}"
    medium = prepare(arguments, folder)
    return run_apart(work, arguments, side, folder, medium)


GPU_SIDES = ["graph", "packed", "repeated", "lora"]

# Steps of random weights: shape, frames and sides. ZeRO has 18 bytes a weight: no 7B on one GPU.
GPU_STEPS = {
    "3b_16": ("3b", 16, [*GPU_SIDES, "deepspeed"]),
    "7b_16": ("7b", 16, GPU_SIDES),
    "3b_64": ("3b", 64, [*GPU_SIDES, "deepspeed"]),
    "7b_64": ("7b", 64, GPU_SIDES),
    "3b_picture": ("3b", 0, ["graph", "trl"]),
}

STEP_PARTS = {
    f"{name}_{side}": partial(gpu_part, run_side, shape, frames, side)
    for name, (shape, frames, sides) in GPU_STEPS.items()
    for side in sides
}

# What teaches most comes first.
GPU_PARTS = {
    "tests": gpu_tests,
    # These leave memory of the device behind, so each has a process.
    "capture": partial(gpu_part, gpu_capture, "3b", 0, "graph"),
    "kernels": partial(gpu_part, gpu_kernels, "3b", 0, "graph"),
    "lengths": partial(gpu_part, gpu_lengths, "3b", 0, "graph"),
    "memory": partial(gpu_part, gpu_memory, "3b", 0, "deepspeed"),
    "default": gpu_default,
    **STEP_PARTS,
}


def read_part(arguments, name):
    """Read what a part has written, {} before it has run."""
    file = Path(arguments.output_dir) / f"{name}.json"
    return read_document(file) if file.exists() else {}


def is_good(part):
    """Whether a part has run and not failed."""
    return "result" in part and "error" not in part["result"]


def bench_gpu(arguments):
    """Run the parts of GPU_PARTS that have no good file yet; a failure is named in its file."""
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    # Checkpoints are written once for all parts.
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only or GPU_PARTS:
            if not arguments.only and is_good(read_part(arguments, name)):
                print(f"{name}: is there")
                continue
            begin = time.perf_counter()
            try:
                result = GPU_PARTS[name](arguments, folder)
            except Exception as error:
                # Whatever it is, the other parts go on.
                result = {"error": repr(error)}
            made = {
                "part": name,
                "device": device_name(),
                "commit": train.revision(),
                "date": time.strftime("%Y-%m-%d"),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "arguments": vars(arguments),
                "seconds": time.perf_counter() - begin,
                "result": result,
            }
            write_json(output / f"{name}.json", made)
            words = "" if is_good(made) else ", failed"
            print(f"{name}: {made['seconds']:.0f} s{words}", flush=True)


# Jinja: a row for each part, then a table for each of GPU_STEPS; what has no number is owed.
GPU_PAGE = """<!-- gpu -->
{% for machine in machines | unique %}
{{ machine }}
{% endfor %}

| part | seconds | result |
|---|---|---|
{% for name, part in parts.items() if name not in of_steps %}
| {{ name }} | {{ "%.0f" | format(part.seconds) if part else "owed" }} |
{%- for key, value in (part.result or {}).items() %}
{% set shown = "%.2f ms" | format(value.all[1]) if value is mapping else value %}
 {{ (key ~ " " ~ shown) | truncate | replace("|", "/") }}{{ "," if not loop.last }}
{%- endfor %} |
{% endfor %}
{% for step, (_, _, sides) in steps.items() %}

{{ step | replace("_", ", ") }}:

| | {{ phases | join(" | ") }} |
|---|---|---|---|---|---|
{% for side in sides %}
{% set result = parts[step ~ "_" ~ side].result %}
| {{ side }} |
{%- for phase in phases %}
{% if result and phase in result %}
 {{ "%.2f s, %.1f GB" | format(result[phase][0], result[phase][1] / 1000) }} |
{%- elif result and "OutOfMemory" in result.error %}
 no memory |
{%- else %}
 {{ "owed" if not result else "failed" if result.error else "" }} |
{%- endif %}
{% endfor %}

{% endfor %}
{% endfor %}
<!-- /gpu -->"""


def bench_page(arguments):
    """Write the parts' numbers into docs/performance.md, between its two gpu marks."""
    parts = {name: read_part(arguments, name) for name in GPU_PARTS}
    words = "{device}, torch {torch}, transformers {transformers}, {date}, commit {commit}."
    machines = [words.format(**part) for part in parts.values() if part]
    if not machines:
        raise DataError(f"{arguments.output_dir} has no part that `bench.py gpu` measured")
    template = Template(GPU_PAGE, trim_blocks=True, lstrip_blocks=True)
    text = template.render(
        parts=parts, steps=GPU_STEPS, of_steps=STEP_PARTS, phases=PHASES, machines=machines
    )
    page = Path(__file__).parent / "docs/performance.md"
    before, _, after = re.split("<!-- /?gpu -->", page.read_text(encoding="utf-8"))
    page.write_text(f"{before}{text}{after}", encoding="utf-8")


@dataclass
class Arguments:
    """Flags of all commands."""

    repeats: int = flag(3, "timed turns", group="step")
    shape: str = flag(
        "small",
        "size of the random model: width 256 and 6 layers, or those of Qwen2.5-VL-3B or -7B",
        choices=["small", *SHAPES],
    )
    sides: list[str] | None = flag(None, "default: packed, repeated and deepspeed", choices=SIDES)
    frames: int = flag(0, "of a video, two a temporal slot; 0: a picture")
    visual_tokens: int = flag(2048, "of the medium; rounded to 2 n^2 a temporal slot")
    num_generations: int = flag(8, "completions of the question")
    completion_length: int = flag(128, "tokens of every completion")
    steps: int = flag(2, "timed steps of a process, after one that is not timed")
    output_dir: str = flag("gpu", "folder of the results, a file a part", group="gpu and page")
    only: list[str] | None = flag(
        None, "parts to run, again if they are there", choices=list(GPU_PARTS), metavar="PART"
    )
    deepspeed: str = flag("ds_zero3.json", "of the sides deepspeed and lora; beside bench.py")

    def __post_init__(self):
        self.sides = self.sides or ["packed", "repeated", "deepspeed"]
        if "trl" in self.sides and self.frames:
            raise DataError("TRL scores no videos: leave out --frames, or trl of --sides")
        slots = max(1, math.ceil(self.frames / 2))
        # A slot is n rows of 2 n tokens.
        self.rows = max(1, round((self.visual_tokens / slots / 2) ** 0.5))
        self.visual_tokens = slots * 2 * self.rows**2


def main():
    works = {"step": bench_step, "gpu": bench_gpu, "page": bench_page}
    parser = Parser(Arguments, __doc__)
    parser.add_argument("work", choices=list(works), help="what is done")
    flags = vars(parser.parse_args())
    bench = works[flags.pop("work")]
    with exit_codes("bench.py", "bench.py gpu goes on with the same command"):
        arguments = Arguments(**flags)
        print(
            f"{device_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
            f"torch {torch.__version__}, transformers {transformers.__version__}\n{arguments}"
        )
        bench(arguments)


if __name__ == "__main__":
    main()
