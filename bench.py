"""Times the code that train.py and prior.py run against named baselines, in alternating turns.

    python bench.py step                           # a random small Qwen2.5-VL
    python bench.py step --sides packed repeated zero3 trl              # after pip install trl
    python bench.py step --shape 7b --frames 16 --visual_tokens 1024 --completion_length 512 \\
        --sides packed graph                       # random weights of that size, on a GPU
    python bench.py prior                          # random videos, CLIP with random weights

`step`: one question about a picture, or with --frames a video: sampling, reference, policy, update.
AdamW, float32 on a CPU, bfloat16 (its moments, too) on a GPU. All sides have the same weights,
medium, group and lengths; each turn of a side is a process. Sides:
    packed    the group in one row, the prompt encoded once, as in train.py
    repeated  the prompt repeated for every completion, as in the releases
    zero3     packed, under DeepSpeed's ZeRO-3 on one rank
    trl       TRL's GRPOTrainer, which scores no videos
    graph     packed, sampled in fixed shapes, on a GPU as one CUDA graph
Memory is the peak of a phase over that of the process with its libraries, on a GPU that of torch's
allocator. FLOPs are those that torch's FlopCounterMode counts in an untimed step: matmuls,
convolutions and attention in full squares; recomputed work counts again, a graph's empty columns do
not.

`prior`: priors without CLIP against decord's get_batch of the same frames; with CLIP, all of it
against its slower half alone (decoding and preprocessing in a worker, or CLIP on one thread).
"""

import importlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import signal
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import decord
import numpy as np
import open_clip
import torch
import transformers
from pebble import ProcessExpired, ProcessPool
from PIL import Image
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as hf_logging

import prior
import toy
import train
from common.data import DataError, Example
from common.engine import start_engine
from common.flags import Parser, flag
from common.media import Encoder
from common.policy import Policy, collate, load_model, vision_tokens
from common.ranks import start_ranks
from common.rollout import Sampling, rollout, sampling, stop_tokens
from grpo import group_advantages, policy_loss

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32

SIDES = ["packed", "repeated", "zero3", "trl", "graph"]
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

# torch 2.14 has no formula for the CPU's attention kernel. Shapes are (B, heads, S, d).
ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, *_, **__: 4 * math.prod(query) * key[2]
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, *_, **__: 10 * math.prod(query) * key[2]
    ),
}


@dataclass
class Arguments:
    """Flags of both commands."""

    repeats: int = flag(3, "timed turns", group="step and prior")
    model_name_or_path: str | None = flag(
        None, "folder of a checkpoint, instead of random weights", group="step"
    )
    shape: str = flag(
        "small",
        "size of the random model: width 256 and 6 layers, or those of Qwen2.5-VL-3B or -7B",
        choices=["small", *SHAPES],
    )
    sides: list[str] | None = flag(None, "default: packed, repeated and zero3", choices=SIDES)
    frames: int = flag(0, "of a video, two a temporal slot; 0: a picture")
    visual_tokens: int = flag(2048, "of the medium; rounded to 2 n^2 a temporal slot")
    num_generations: int = flag(8, "completions of the question")
    completion_length: int = flag(128, "tokens of every completion")
    steps: int = flag(2, "timed steps of a process, after one that is not timed")
    clip: str = flag("ViT-B-32", "architecture of open_clip, with random weights", group="prior")
    videos: int = flag(32, "videos to make, at least 2")
    width: int = flag(640, "pixels")
    height: int = flag(360, "pixels")

    def __post_init__(self):
        self.sides = self.sides or ["packed", "repeated", "zero3"]
        if "trl" in self.sides and self.frames:
            raise DataError("TRL scores no videos: leave out --frames, or trl of --sides")
        slots = max(1, math.ceil(self.frames / 2))
        # A slot is n rows of 2 n tokens.
        self.rows = max(1, round((self.visual_tokens / slots / 2) ** 0.5))
        self.visual_tokens = slots * 2 * self.rows**2


class Cost(NamedTuple):
    """What a phase of a step took."""

    seconds: float
    megabytes: float  # at the peak
    flops: int = 0


# ---- A step ----


def make_toy():
    """Make a random small Qwen2.5-VL and its processor, whose tokenizer learns a toy question."""
    scenes = toy.plan_video(np.random.default_rng(0))
    question = toy.make_question("colour", scenes, random.Random(0), biased=False)
    with tempfile.TemporaryDirectory() as folder:
        rows = json.dumps([{**question, "path": "none.mp4"}])
        Path(folder, "train_cot.json").write_text(rows, encoding="utf-8")
        processor = toy.make_processor(Path(folder))
    return toy.make_model(processor, seed=0, hidden=256, layers=6, group=4), processor


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


def prepare(arguments, folder):
    """Write the random checkpoint, unless there is one, and the random medium.

    Returns:
        The checkpoint's folder and the medium's path.
    """
    checkpoint = arguments.model_name_or_path
    if checkpoint is None:
        checkpoint = str(folder)
        model, processor = make_toy()
        if arguments.shape != "small":
            torch.manual_seed(0)
            config = released_config(model.config, arguments.shape)
            model = AutoModelForImageTextToText.from_config(config, dtype=DTYPE)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    vision = AutoConfig.from_pretrained(checkpoint).vision_config
    height = vision.patch_size * vision.spatial_merge_size * arguments.rows
    shape = (arguments.frames or 1, height, 2 * height, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if arguments.frames:
        medium = f"{folder}/video.mp4"
        toy.write_video(medium, pixels, fps=2)
    else:
        medium = f"{folder}/picture.png"
        Image.fromarray(pixels[0]).save(medium)
    return checkpoint, medium


def measure_matmul():
    """Return the TFLOP/s of a large matmul."""
    side = 8192 if GPU else 1536
    square = torch.randn(side, side, device=DEVICE, dtype=DTYPE)
    threads = torch.get_num_threads()
    timer = Timer("square @ square", globals={"square": square}, num_threads=threads)
    return 2e-12 * side**3 / timer.timeit(10).mean


def resident(line):
    """Return bytes of this process: VmRSS now, VmHWM the most since the last reset."""
    # getrusage's maximum would begin with that of the parent.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{line}:\s+(\d+) kB", status)[1])


@contextmanager
def phase(costs, name, base, counting=False):
    """Measure the block: costs[name] becomes its Cost.

    Args:
        base: bytes to subtract from the peak of memory.
        counting: count FLOPs, too, which slows it down.
    """
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    # VmHWM becomes VmRSS.
    Path("/proc/self/clear_refs").write_text("5")
    begin = time.perf_counter()
    with counter if counting else nullcontext():
        yield
    if GPU:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if GPU else resident("VmHWM")
    costs[name] = Cost(seconds, (peak - base) / 1e6, counter.get_total_flops())


class PlainEngine:
    """A policy and AdamW behind the calls of a DeepSpeed engine."""

    def __init__(self, policy):
        self.module = policy
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)

    def __call__(self, *inputs, **settings):
        return self.module(*inputs, **settings)

    def backward(self, loss):
        loss.backward()

    def step(self):
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 5.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def our_steps(arguments, side, folder, medium, base=0):
    """Run GRPO steps with this project's code, as train.py does.

    Args:
        side: any of SIDES but trl.
        folder, medium: what prepare() has written.
        base: see phase().
    Yields:
        {phase: Cost} of a step; the first step alone counts FLOPs.
    """
    if side == "zero3":
        start_ranks()
        config = str(Path(__file__).with_name("ds_zero3.json"))
        settings = train.TrainArguments(deepspeed=config, output_dir=None)
        reference = start_engine(settings, folder)
        engine = start_engine(settings, folder, learning_rate=1e-6)
    else:
        reference = Policy(load_model(folder)[0])
        engine = PlainEngine(Policy(load_model(folder)[0]).train())
    model = engine.module.model
    if side == "graph" and not engine.module.packs:
        raise DataError("this family samples without a graph: leave graph out of --sides")
    processor = unlimited(AutoProcessor.from_pretrained(folder))
    encoder = Encoder(processor, 0, 1 << 40, arguments.frames)
    kind = "video" if arguments.frames else "image"
    example = Example("0", "Which ball is red?", [], "numerical", "1", medium, kind)
    stops = stop_tokens(model, processor)
    group = arguments.num_generations
    packed = side != "repeated"
    for step in itertools.count():
        # The first step counts FLOPs. A graph's replays cannot be counted, so it has none.
        counting = step == 0
        costs = {}
        # No completion ends early.
        banned = vision_tokens(model.config) + stops
        use_graph = side == "graph" and not counting
        settings = Sampling(
            arguments.completion_length, graph=use_graph, eos_ids=stops, banned_ids=banned
        )
        with phase(costs, "rollout", base, counting), sampling(engine) as bare:
            prompts = collate([encoder.encode(example)], bare).to(DEVICE)
            rows = prompts if packed else prompts.repeat([group])
            counts = [group] if packed else [1] * group
            samples = rollout(bare, rows, counts, range(group), settings)
        completions = samples.tokens[None]  # (1, G, T)
        mask = samples.mask[None]  # (1, G, T)
        with phase(costs, "reference", base, counting), torch.no_grad():
            ref_logp = reference(prompts, completions, mask, packed).logp[0]  # (G, T)
        with phase(costs, "policy", base, counting):
            # The last layer's states are what the consensus reward reads.
            logp = engine(prompts, completions, mask, packed, hidden_layers=(-1,)).logp[0]  # (G, T)
            advantages = group_advantages(torch.rand(1, group))[0].to(DEVICE)  # (G,)
            loss, _ = policy_loss(logp, logp.detach(), advantages, mask[0], ref_logp)
            engine.backward(loss)
        with phase(costs, "optimizer", base, counting):
            engine.step()
        seconds, megabytes, flops = zip(*costs.values(), strict=True)
        costs["step"] = Cost(sum(seconds), max(megabytes), sum(flops))
        yield costs


def unlimited(processor):
    """Remove the processor's limits of size, so that a picture keeps its own."""
    processor.image_processor.size = {"shortest_edge": 1, "longest_edge": 1 << 40}
    return processor


def trl_step(arguments, folder, medium, base):
    """Return the Cost of a step of TRL's GRPOTrainer, which runs its own loop."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    prompt = [{"role": "user", "content": "Which ball is red?"}]
    rows = datasets.Dataset.from_list([{"prompt": prompt, "image": medium}] * 4)
    costs = {}
    with tempfile.TemporaryDirectory() as output, phase(costs, "all", base):
        config = GRPOConfig(
            output_dir=output,
            max_steps=arguments.steps + 1,
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
            processing_class=unlimited(AutoProcessor.from_pretrained(folder)),
            callbacks=[Clock()],
            reward_funcs=lambda completions, **_: [random.random() for _ in completions],
            train_dataset=rows.cast_column("image", datasets.Image()),
        ).train()
    return Cost(float(np.median(np.diff(ends))), costs["all"].megabytes)


def run_side(arguments, side, folder, medium):
    """Measure a side in this process.

    Returns:
        {phase: Cost, the median over the steps}, and the TFLOP/s of a large matmul.
    """
    # A CPU computes with denormal numbers a hundred times slower.
    torch.set_flush_denormal(True)
    if side == "trl":
        # Libraries are not part of the peak.
        importlib.import_module("trl.trainer.grpo_trainer")
    base = 0 if GPU else resident("VmRSS")
    tflops = measure_matmul()
    if side == "trl":
        return {"step": trl_step(arguments, folder, medium, base)}, tflops
    # The first step counts; a graph's second step takes longer, since it is captured.
    untimed = 2 if side == "graph" else 1
    steps = our_steps(arguments, side, folder, medium, base)
    steps = list(itertools.islice(steps, untimed + arguments.steps))
    medians = {}
    for name in PHASES:
        seconds, megabytes, _ = np.median([costs[name] for costs in steps[untimed:]], axis=0)
        medians[name] = Cost(seconds, megabytes, steps[0][name].flops)
    return medians, tflops


def time_sides(arguments):
    """Run every side in processes, in alternating turns.

    Returns:
        {side: list of what run_side() returned in each turn}; the list ends with None where the
        memory was not enough.
    """
    results = {side: [] for side in arguments.sides}
    with tempfile.TemporaryDirectory() as temporary:
        job = prepare(arguments, temporary)
        for side in tqdm(arguments.sides * arguments.repeats, desc="turns"):
            if None in results[side]:
                continue
            # A process a turn: memory that another one has left behind is not in its peak.
            with ProcessPool(1, context=multiprocessing.get_context("spawn")) as pool:
                turn = pool.schedule(run_side, args=(arguments, side, *job))
                try:
                    results[side].append(turn.result())
                except (ProcessExpired, RuntimeError) as error:
                    # The kernel kills a process that takes too much.
                    killed = getattr(error, "exitcode", None) == -signal.SIGKILL
                    if not killed and "out of memory" not in str(error).lower():
                        raise
                    results[side].append(None)
    return results


def turn_costs(turns, name):
    """Return (turns, 3): seconds, MB and FLOPs of a phase in every turn of a side."""
    return np.array([costs[name] for costs, _ in turns])


def side_cells(arguments, turns, tflops):
    """Format what a side took: {title of the row: cell}. tflops: what FLOPs are a share of."""
    if None in turns:
        return dict.fromkeys(PHASES, "out of memory")
    cells = {}
    for name in turns[0][0]:
        seconds, megabytes, flops = np.median(turn_costs(turns, name), axis=0)
        cells[name] = f"{seconds:10.4f} s{megabytes:7.0f} MB"
        if flops:
            share = flops / 1e12 / seconds / tflops
            cells[f"FLOPs, {name}"] = f"{flops / 1e12:.4g} TFLOP{share:7.1%}"
        if name in ("rollout", "step"):
            tokens = arguments.num_generations * arguments.completion_length
            cells[f"tokens/s, {name}"] = f"{tokens / seconds:,.1f}"
    return cells


def print_ratio(title, ratios):
    """Print the median of ratios (turns,) and their range."""
    print(f"{title:44s}{np.median(ratios):8.2f} ({np.min(ratios):.2f} to {np.max(ratios):.2f})")


def machine():
    name = f"{torch.cuda.get_device_name()}, " if GPU else ""
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{name}{platform.machine()} CPU, {cores}; torch {torch.__version__}"


def bench_step(arguments):
    """Time a step on every side; print the table of phases and the ratios to `packed`."""
    results = time_sides(arguments)
    model = arguments.model_name_or_path or f"random Qwen2.5-VL, {arguments.shape}"
    medium = f"a video of {arguments.frames} frames" if arguments.frames else "a picture"
    print(
        f"machine     {machine()}, transformers {transformers.__version__}\n"
        f"model       {model}\n"
        f"step        {medium} of {arguments.visual_tokens} visual tokens, "
        f"{arguments.num_generations} completions of {arguments.completion_length} tokens\n"
        f"timing      median of {arguments.repeats} alternating turns of processes, "
        f"{arguments.steps} steps each; seconds and MB at the peak of a phase\n"
    )
    measured = [turn[1] for turns in results.values() for turn in turns if turn]
    tflops = max(measured, default=math.nan)
    columns = [side_cells(arguments, turns, tflops) for turns in results.values()]
    print(" " * 20 + "".join(f"{side:>24s}" for side in results))
    for kind in ("", "FLOPs, ", "tokens/s, "):
        for name in PHASES:
            row = "".join(f"{column.get(kind + name, ''):>24s}" for column in columns)
            if row.strip():
                print(f"{kind + name:20s}{row}".rstrip())
    print(f"\nFLOPs: attention in full squares; share of {tflops:.4g} TFLOP/s (a large matmul)\n")
    packed = results.get("packed", [None])
    for side, turns in results.items():
        if side == "packed" or None in turns + packed:
            continue
        ratios = turn_costs(turns, "step") / turn_costs(packed, "step")
        print_ratio(f"step, {side} / packed", ratios[:, 0])
        print_ratio(f"memory, {side} / packed", ratios[:, 1])


# ---- Priors ----


def make_videos(arguments, folder):
    """Write random videos: 10 s at 24 fps, four scenes of drifting coarse colours.

    Returns:
        Their Examples.
    """
    size = (arguments.width, arguments.height)
    examples = []
    for index in range(arguments.videos):
        rng = np.random.default_rng(index)
        scenes = rng.integers(0, 232, (4, 9, 16, 3), dtype=np.uint8)
        # Grain costs a decoder what the detail of a real video costs.
        grain = rng.integers(0, 24, (*size[::-1], 3), dtype=np.uint8)
        frames = []
        for step in range(240):
            picture = cv2.resize(scenes[step // 60], size) + grain
            frames.append(np.roll(picture, 3 * step, axis=1))
        path = f"{folder}/{index}.mp4"
        toy.write_video(path, np.stack(frames), fps=24)
        examples.append(Example(str(index), "what is seen", [], "free-form", "a", path, "video"))
    return examples


def steady(results):
    """Return the seconds an item from the first result on."""
    next(results)
    begin = time.perf_counter()
    count = sum(1 for _ in results)
    return (time.perf_counter() - begin) / count


def bench_prior(arguments):
    """Time the building of priors and print its ratios."""
    if arguments.clip not in open_clip.list_models():
        raise DataError(f"--clip {arguments.clip} is no architecture of open_clip")
    torch.manual_seed(0)
    # CLIP on one thread leaves a core to the worker.
    torch.set_num_threads(1)
    model, _, preprocess = open_clip.create_model_and_transforms(arguments.clip, device=DEVICE)
    tokenizer = open_clip.get_tokenizer(arguments.clip)
    clip = prior.Clip(model.eval(), preprocess, tokenizer, DEVICE)
    hsv = prior.PriorSettings(prior="no_semantic")
    full = prior.PriorSettings()

    def get_batch():
        for _, path in groups:
            reader = decord.VideoReader(path, num_threads=1)
            yield reader.get_batch(prior.uniform_frames(len(reader), full.frames)).asnumpy()

    def decode(settings, workers, preprocess=None):
        return prior.all_cues(groups, settings, preprocess, workers)

    def build(media_cues, settings, clip=None):
        for medium, cues in media_cues:
            yield prior.media_rows(groups[medium], cues, clip, settings)

    seconds = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        groups = prior.group_by_medium(make_videos(arguments, folder))
        decoded = list(decode(full, 0, preprocess))
        for _ in tqdm(range(arguments.repeats), desc="turns"):
            seconds["get_batch"].append(steady(get_batch()))
            seconds["hsv"].append(steady(build(decode(hsv, 0), hsv)))
            seconds["decoding"].append(steady(decode(full, 1, preprocess)))
            seconds["CLIP"].append(steady(build(iter(decoded), full, clip)))
            seconds["all"].append(steady(build(decode(full, 1, preprocess), full, clip)))
    print(
        f"machine     {machine()}; CLIP {arguments.clip} on {DEVICE}\n"
        f"videos      {arguments.videos}, {arguments.width}x{arguments.height}, "
        f"10 s at 24 fps, MPEG-4; {full.frames} frames of each\n"
        f"timing      median of {arguments.repeats} alternating turns (lowest to highest)\n"
    )
    seconds = {name: np.array(values) for name, values in seconds.items()}
    slower = np.maximum(seconds["decoding"], seconds["CLIP"])
    print_ratio("hsv + uniform priors / get_batch", seconds["hsv"] / seconds["get_batch"])
    print_ratio("all / the slower of decoding and CLIP", seconds["all"] / slower)


def main():
    hf_logging.set_verbosity_error()
    parser = Parser(Arguments, description=__doc__)
    parser.add_argument("work", choices=["step", "prior"], help="what is timed")
    flags = vars(parser.parse_args())
    work = flags.pop("work")
    try:
        arguments = Arguments(**flags)
        if work == "step":
            bench_step(arguments)
        else:
            bench_prior(arguments)
    # OSError: a folder that is not a checkpoint.
    except (DataError, OSError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
