"""Times the code that train.py and prior.py run against named baselines, in alternating turns.

    python bench.py step                           # a random small Qwen2.5-VL
    python bench.py step --sides packed repeated zero3 trl              # after pip install trl
    python bench.py step --shape 7b --frames 16 --visual_tokens 1024 --completion_length 512 \\
        --sides packed graph                       # random weights of that size, on a GPU
    python bench.py sft --visual_tokens 1024 --completion_length 300
    python bench.py prior --videos toy-seed0/videos/*.mp4

`step`: one question about a picture, or with --frames a video: sampling, reference, policy, update.
AdamW, float32 on a CPU, bfloat16 (its moments, too) on a GPU. All sides have the same weights,
medium, group and lengths; each turn of a side is a process. Sides:
    packed    the group in one row, the prompt encoded once, as in train.py
    repeated  the prompt repeated for every completion, as in the releases
    zero3     packed, under DeepSpeed's ZeRO-3 on one rank
    trl       TRL's GRPOTrainer, which scores no videos
    graph     packed, sampled in fixed shapes, on a GPU as one CUDA graph
Memory is the peak of a phase over that of the process with its libraries, on a GPU that of torch's
allocator. A side that fails in the middle, for want of memory mostly, is named and left out.

`sft`: a step of SFT on --num_generations demonstrations of one medium, `together` in one row, or
`apart` in a row each.

`prior`: exact decoding of videos, and priors without CLIP, against decord's get_batch of the same
frames.
"""

import itertools
import math
import multiprocessing
import os
import platform
import random
import re
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import transformers
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import prior
import toy
import train
from common.data import DataError, Example, Medium
from common.engine import hookless_twin, start_engine
from common.flags import Parser, flag
from common.media import Encoder, sample_video
from common.policy import Policy, collate, load_model, vision_tokens
from common.ranks import start_ranks
from common.rollout import Sampling, rollout, sampling, stop_tokens
from grpo import group_advantages, policy_loss

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32

SIDES = ["packed", "repeated", "zero3", "trl", "graph"]
SFT_SIDES = ["together", "apart"]

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


@dataclass
class Arguments:
    """Flags of all commands."""

    repeats: int = flag(3, "timed turns", group="step, sft and prior")
    shape: str = flag(
        "small",
        "size of the random model: width 256 and 6 layers, or those of Qwen2.5-VL-3B or -7B",
        group="step and sft",
        choices=["small", *SHAPES],
    )
    sides: list[str] | None = flag(None, "default: packed, repeated and zero3", choices=SIDES)
    frames: int = flag(0, "of a video, two a temporal slot; 0: a picture")
    visual_tokens: int = flag(2048, "of the medium; rounded to 2 n^2 a temporal slot")
    num_generations: int = flag(8, "completions of the question; demonstrations of the medium")
    completion_length: int = flag(128, "tokens of every completion")
    steps: int = flag(2, "timed steps of a process, after one that is not timed")
    videos: list[str] | None = flag(None, "paths of videos", group="prior")

    def __post_init__(self):
        self.sides = self.sides or ["packed", "repeated", "zero3"]
        if "trl" in self.sides and self.frames:
            raise DataError("TRL scores no videos: leave out --frames, or trl of --sides")
        slots = max(1, math.ceil(self.frames / 2))
        # A slot is n rows of 2 n tokens.
        self.rows = max(1, round((self.visual_tokens / slots / 2) ** 0.5))
        self.visual_tokens = slots * 2 * self.rows**2


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


def prepare(arguments, folder):
    """Write a random checkpoint and a random medium into a folder -> path of the medium."""
    # The tokenizer learns a toy's questions.
    toy.make_dataset(Path(folder), toy.ToyArguments(train_videos=1, heldout_videos=0))
    processor = toy.make_processor(Path(folder))
    processor.save_pretrained(folder)
    model = toy.make_model(processor, seed=0, hidden=256, layers=6, group=4)
    if arguments.shape != "small":
        torch.manual_seed(0)
        config = released_config(model.config, arguments.shape)
        model = AutoModelForImageTextToText.from_config(config, dtype=DTYPE)
    model.save_pretrained(folder)
    # A visual token is 28 x 28 pixels.
    shape = (arguments.frames or 1, 28 * arguments.rows, 56 * arguments.rows, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    medium = f"{folder}/picture.png"
    if arguments.frames:
        medium = f"{folder}/video.mp4"
        toy.write_video(medium, pixels, fps=2)
    else:
        cv2.imwrite(medium, pixels[0])
    return medium


def resident(line):
    """Return bytes of this process: VmRSS now, VmHWM the most since the last reset."""
    # getrusage's maximum would begin with that of the parent.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{line}:\s+(\d+) kB", status)[1])


def memory_in_use():
    """Return bytes that the process has before a side begins: its libraries."""
    return 0 if GPU else resident("VmRSS")


@contextmanager
def phase(costs, name, base):
    """Measure the block: costs[name] becomes its seconds, and MB at the peak above base (bytes)."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    # VmHWM becomes VmRSS.
    Path("/proc/self/clear_refs").write_text("5")
    begin = time.perf_counter()
    yield
    # A GPU is still at work when the call returns.
    if GPU:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if GPU else resident("VmHWM")
    costs[name] = (seconds, (peak - base) / 1e6)


class PlainEngine:
    """A policy and AdamW behind the calls of a DeepSpeed engine."""

    def __init__(self, policy):
        self.module = policy
        self.twin = hookless_twin(policy.model)
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)

    def __call__(self, *inputs, **settings):
        return self.module(*inputs, **settings)

    def backward(self, loss):
        loss.backward()

    def step(self):
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 5.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def load_processor(folder):
    """Load a processor without its limits of size, so that a picture keeps its own."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": 1, "longest_edge": 1 << 40}
    return processor


def our_steps(arguments, side, folder, medium):
    """Run GRPO steps with this project's code, as train.py does.

    Args:
        side: any of SIDES but trl.
        folder, medium: checkpoint and path that prepare() has written.
    Yields:
        {phase: (seconds, MB)} of a step.
    """
    base = memory_in_use()
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
    processor = load_processor(folder)
    encoder = Encoder(processor, 0, 1 << 40, arguments.frames)
    kind = "video" if arguments.frames else "image"
    example = Example("0", "Which ball is red?", [], "numerical", "1", [Medium(kind, medium)])
    stops = stop_tokens(model, processor)
    # No completion ends early.
    banned = vision_tokens(model.config) + stops
    settings = Sampling(
        arguments.completion_length, graph=side == "graph", eos_ids=stops, banned_ids=banned
    )
    group = arguments.num_generations
    packed = side != "repeated"
    while True:
        costs = {}
        with phase(costs, "rollout", base), sampling(engine) as bare:
            prompts = collate([encoder.encode(example)], bare).to(DEVICE)
            rows = prompts if packed else prompts.repeat([group])
            counts = [group] if packed else [1] * group
            samples = rollout(bare, rows, counts, range(group), settings)
        completions = samples.tokens[None]  # (1, G, T)
        mask = samples.mask[None]  # (1, G, T)
        with phase(costs, "reference", base), torch.no_grad():
            ref_logp = reference(prompts, completions, mask, packed).logp[0]  # (G, T)
        with phase(costs, "policy", base):
            # The last layer's states are what the consensus reward reads.
            logp = engine(prompts, completions, mask, packed, hidden_layers=(-1,)).logp[0]  # (G, T)
            advantages = group_advantages(torch.rand(1, group))[0].to(DEVICE)  # (G,)
            loss, _ = policy_loss(logp, logp.detach(), advantages, mask[0], ref_logp)
            engine.backward(loss)
        with phase(costs, "optimizer", base):
            engine.step()
        seconds, megabytes = zip(*costs.values(), strict=True)
        costs["step"] = (sum(seconds), max(megabytes))
        yield costs


def sft_steps(arguments, side, folder, medium):
    """Run SFT steps as train.py does; see our_steps(), the side is one of SFT_SIDES."""
    base = memory_in_use()
    engine = PlainEngine(Policy(load_model(folder)[0]).train())
    processor = load_processor(folder)
    encoder = Encoder(processor, 0, 1 << 40, arguments.frames)
    media = [Medium("video" if arguments.frames else "image", medium)]
    # Letters that the toy's tokenizer does not join; the tags, the answer and the end are six.
    reasoning = "z" * (arguments.completion_length - 6)
    ready = []
    for number in range(arguments.num_generations):
        question = f"Which ball is {number}?"
        example = Example("0", question, [], "numerical", "1", media, reasoning=reasoning)
        ready.append(train.Ready(number, example, None, inputs=encoder.encode(example)))
    group = arguments.num_generations if side == "together" else 1
    while True:
        costs = {}
        with phase(costs, "step", base):
            pack = train.pack_demonstrations(ready, processor, engine.module.model, group)
            logp = engine(pack.prompts, pack.completions, pack.mask).logp  # (R, G, T)
            engine.backward(-(logp * pack.learned).sum() / pack.learned.sum())
            engine.step()
        yield costs


def trl_step(arguments, folder, medium):
    """Return seconds and MB of a step of TRL's GRPOTrainer, which runs its own loop."""
    # Neither is needed by anything else: pip install trl.
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    times = []

    def reward(completions, **_):
        # Called once a step: from one call to the next it is a step.
        times.append(time.perf_counter())
        return [random.random() for _ in completions]

    prompt = [{"role": "user", "content": "Which ball is red?"}]
    rows = datasets.Dataset.from_list([{"prompt": prompt, "image": medium}] * 4)
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
            processing_class=load_processor(folder),
            reward_funcs=reward,
            train_dataset=rows.cast_column("image", datasets.Image()),
        ).train()
    # The first is not timed, as in run_side().
    return np.median(np.diff(times)[1:]), costs["all"][1]


def run_side(arguments, side, folder, medium):
    """Measure a side in this process -> {phase: [seconds, MB]}, medians over the steps."""
    # A CPU computes with denormal numbers a hundred times slower.
    torch.set_flush_denormal(True)
    if side == "trl":
        return {"step": trl_step(arguments, folder, medium)}
    run = sft_steps if side in SFT_SIDES else our_steps
    steps = run(arguments, side, folder, medium)
    # The first step is not timed.
    steps = list(itertools.islice(steps, 1, 1 + arguments.steps))
    return {name: np.median([costs[name] for costs in steps], axis=0) for name in steps[0]}


def time_sides(arguments):
    """Run every side in processes, in alternating turns.

    Returns:
        {side: list of what run_side() returned in each turn}, without sides that failed.
    """
    results = {side: [] for side in arguments.sides}
    with tempfile.TemporaryDirectory() as folder:
        medium = prepare(arguments, folder)
        for _ in tqdm(range(arguments.repeats), desc="turns"):
            for side in list(results):
                # A process a turn: memory that another one has left behind is not in its peak.
                with ProcessPool(1, context=multiprocessing.get_context("spawn")) as pool:
                    turn = pool.schedule(run_side, args=(arguments, side, folder, medium))
                    try:
                        results[side].append(turn.result())
                    except (ProcessExpired, torch.OutOfMemoryError) as error:
                        # The kernel kills a process that takes too much.
                        print(f"{side} failed: {error!r} {vars(error)}")
                        del results[side]
    return results


def print_ratio(title, ratios):
    """Print the median of ratios (turns,) and their range."""
    print(f"{title:44s}{np.median(ratios):8.2f} ({np.min(ratios):.2f} to {np.max(ratios):.2f})")


def bench_step(arguments):
    """Time a step on every side; print the phases of each and ratios."""
    results = time_sides(arguments)
    print("medians; MB at the peak of a phase")
    for side, turns in results.items():
        for name in turns[0]:
            seconds, megabytes = np.median([costs[name] for costs in turns], axis=0)
            print(f"{side:10s}{name:10s}{seconds:10.4f} s{megabytes:8.0f} MB")
    base = "together" if "together" in arguments.sides else "packed"
    if base not in results:
        return
    # Turns are paired: each ratio compares processes that ran one after the other.
    divisors = np.array([costs["step"] for costs in results.pop(base)])  # (turns, 2)
    for side, turns in results.items():
        ratios = np.array([costs["step"] for costs in turns]) / divisors
        print_ratio(f"step, {side} / {base}", ratios[:, 0])
        print_ratio(f"memory, {side} / {base}", ratios[:, 1])


def bench_sft(arguments):
    """Time an SFT step with a medium's demonstrations in one row and apart; print the ratios."""
    arguments.sides = SFT_SIDES
    bench_step(arguments)


# ---- Priors ----


def bench_prior(arguments):
    """Time exact decoding, and priors without CLIP, against decord's get_batch; print ratios."""
    import decord  # needed for nothing else: pip install decord

    if not arguments.videos:
        raise DataError("prior needs --videos")
    settings = prior.PriorSettings(prior="no_semantic")
    examples = []
    for path in arguments.videos:
        examples.append(
            Example(path, "what is seen", [], "free-form", "a", [Medium("video", path)])
        )
    turns = []
    for _ in tqdm(range(arguments.repeats), desc="turns"):
        times = [time.perf_counter()]
        for path in arguments.videos:
            # One thread, as in prior.py.
            reader = decord.VideoReader(path, num_threads=1)
            reader.get_batch(prior.uniform_frames(len(reader), settings.frames)).asnumpy()
        times.append(time.perf_counter())
        for path in arguments.videos:
            sample_video(path, settings.frames)
        times.append(time.perf_counter())
        prior.build_priors(examples, None, settings)
        times.append(time.perf_counter())
        turns.append(np.diff(times))
    turns = np.array(turns)  # (turns, 3) seconds
    print_ratio("exact frames / get_batch", turns[:, 1] / turns[:, 0])
    print_ratio("hsv + uniform priors / get_batch", turns[:, 2] / turns[:, 0])


def main():
    parser = Parser(Arguments, description=__doc__)
    parser.add_argument("work", choices=["step", "sft", "prior"], help="what is timed")
    flags = vars(parser.parse_args())
    works = {"step": bench_step, "sft": bench_sft, "prior": bench_prior}
    bench = works[flags.pop("work")]
    device = torch.cuda.get_device_name() if GPU else platform.machine()
    try:
        arguments = Arguments(**flags)
        print(
            f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
            f"torch {torch.__version__}, transformers {transformers.__version__}\n{arguments}"
        )
        bench(arguments)
    except DataError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
