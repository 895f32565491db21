"""Times the same code the stages run (grpo.py, prior.py) against named baselines, in turns that alternate in one run.

    python bench.py step --num_generations 8 --completion_length 64 --frames 16             # a random tiny Qwen2.5-VL, about a minute
    python bench.py step --model_name_or_path Qwen2.5-VL-7B-Instruct --frames 16 --frame_size 224      # a checkpoint's folder
    python bench.py prior                                                                   # random videos, a random ViT-B-32, some minutes
    python bench.py prior --memory_videos 2000
    python bench.py trl                                                                     # a whole step against TRL's (pip install trl)

`step`: policy forward and backward, group packed in one row against the prompt repeated for every completion; and rollout, prompt encoded
once against repeated. Pixels and questions are random. One process, without DeepSpeed, which would add the same to both sides.
`prior`: building priors without CLIP against decord's get_batch of the same frames; two workers against one; with CLIP, the whole
against its slower half alone (decoding and preprocessing, or CLIP). On a CPU, CLIP has one thread, so that one worker has a core too.
Processes that decode keep to a core each, those that only call get_batch too.
`trl`: sampling, reference, policy, update of one question about a picture (TRL scores no videos), against TRL's GRPOTrainer with the same
weights, picture, group and lengths. Each side in processes of its own, in turns; both without DeepSpeed, with AdamW in float32 on the CPU.
`--memory_videos N` then builds N priors and prints the memory of all processes on the way.
"""

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import decord
import numpy as np
import open_clip
import psutil
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as hf_logging

import prior
import toy
from data import DataError, Encoder, Example, chat_text
from grpo import FAMILIES, Policy, collate, group_advantages, policy_loss, rollout, special_tokens

FLAGS = {  # default, least, help
    "num_generations": (8, 2, "completions of a question"), "completion_length": (64, 1, "tokens of every completion"),
    "frames": (16, 2, "frames of a video"), "frame_size": (56, 28, "pixels a side, a multiple of 28"),
    "questions": (1, 1, "questions in a forward"), "repeats": (5, 1, "timed pairs"), "seed": (0, 0, "of everything random")}

PRIOR_FLAGS = {
    "videos": (32, 3, "videos to make and build the priors of"), "seconds": (10, 1, "length of a video, at 24 frames a second"),
    "width": (640, 32, "pixels"), "height": (360, 32, "pixels"), "frames": (16, 2, "K, frames sampled from a video"),
    "repeats": (5, 1, "timed turns"), "memory_videos": (0, 0, "0: without the memory figures"), "seed": (0, 0, "of everything random")}


TRL_FLAGS = {
    "num_generations": (8, 2, "completions of a question"), "completion_length": (128, 1, "tokens of every completion"),
    "visual_tokens": (2048, 16, "of the picture, 28x28 pixels each; rounded to 2 n^2"), "hidden": (256, 128, "width, a multiple of 128"),
    "layers": (6, 1, "of the model"), "steps": (2, 1, "timed steps of a process, after one that is not"), "repeats": (3, 1, "timed pairs"),
    "seed": (0, 0, "of everything random")}


def make_toy(seed, **size):
    """A random tiny Qwen2.5-VL and its processor; the tokenizer learns from toy questions, no video is made."""
    rng, rows = random.Random(seed), []
    for index in range(60):
        plan = toy.plan_video(np.random.default_rng([seed, index]))
        rows += [{**toy.make_question(kind, plan, rng, biased=False), "path": "none.mp4"} for kind in ("colour", "count", "order")]
    with tempfile.TemporaryDirectory() as folder:
        rows = [{**row, "problem_id": index} for index, row in enumerate(rows)]
        (Path(folder) / "train_cot.json").write_text(json.dumps(rows), encoding="utf-8")
        processor = toy.make_processor(Path(folder))
    return toy.make_model(processor, seed, **size), processor


def load_model(arguments, device):
    """-> model in train mode (bf16 on a GPU, fp32 on the CPU, as train.py has it) and processor."""
    dtype, folder = torch.bfloat16 if device == "cuda" else torch.float32, arguments.model_name_or_path
    if folder is None:
        model, processor = make_toy(arguments.seed)
        return model.to(device, dtype).train(), processor
    if not (Path(folder) / "config.json").is_file():
        raise DataError(f"{folder} is not a folder with a checkpoint (--model_name_or_path)")
    if (family := AutoConfig.from_pretrained(folder).model_type) not in FAMILIES:
        raise DataError(f"{folder} is a {family} checkpoint, not one of {', '.join(FAMILIES)}")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True)
    return model.to(device).train(), AutoProcessor.from_pretrained(folder)


def make_prompts(arguments, model, processor):
    """Random questions about random pixels, through the stages' own encoder and collate."""
    rng, generator = random.Random(arguments.seed), torch.Generator().manual_seed(arguments.seed)
    encoder, items, words = Encoder(processor, 0, 0), [], [*toy.COLOURS, *toy.TEXTURES, *toy.WORDS]
    for index in range(arguments.questions):
        example = Example(str(index), " ".join(rng.choices(words, k=30)) + "?", [], "numerical", "1", "", "video")
        shape = (arguments.frames, 3, arguments.frame_size, arguments.frame_size)
        frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        items.append(encoder.process(example, chat_text(processor, example), frames, {"fps": 1.0, "times": list(range(arguments.frames))}))
    return collate(items, model).to(model.device)


def time_turns(works, repeats):
    """Seconds of each, (repeats, works), alternating; one untimed round before."""
    seconds = np.zeros((repeats + 1, len(works)))
    for row in seconds:
        for column, work in enumerate(works):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            begin = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            row[column] = time.perf_counter() - begin
    return seconds[1:]


def report(title, names, seconds, agreement):
    ratios, medians = seconds[:, 1] / seconds[:, 0], np.median(seconds, axis=0)
    sides = "".join(f"{name:>13s} {value:8.4f} s" for name, value in zip(names, medians, strict=True))
    print(f"{title:26s}{sides}{np.median(ratios):8.2f} ({ratios.min():.2f} to {ratios.max():.2f})   {agreement}")


def bench_step(arguments):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)
    model, processor = load_model(arguments, device)
    prompts = make_prompts(arguments, model, processor)
    questions, group = arguments.questions, arguments.num_generations
    seeds = list(range(questions * group))
    eos, banned = special_tokens(model, processor)
    banned += eos  # every completion reaches its full length
    sampled = {}

    def sample(name, rows, counts):
        model.eval()
        sampled[name] = rollout(model, rows, counts, seeds, arguments.completion_length, eos, banned)[0]
        model.train()

    rollouts = time_turns((lambda: sample("once", prompts, [group] * questions),
                           lambda: sample("repeated", prompts.repeat([group] * questions), [1] * len(seeds))), arguments.repeats)
    completions = sampled["once"].view(questions, group, -1)  # (B, G, T)
    mask, policy, logps = torch.ones_like(completions, dtype=torch.bool), Policy(model), {}
    advantages = group_advantages(torch.rand(questions, group)).flatten().to(device)

    def update(packed):
        model.zero_grad(set_to_none=True)
        logp = policy(prompts, completions, mask, packed)[0].flatten(0, 1)  # (N, T)
        policy_loss(logp, logp.detach(), advantages, mask.flatten(0, 1))[0].backward()
        logps[packed] = logp.detach()

    updates = time_turns((lambda: update(True), lambda: update(False)), arguments.repeats)
    machine = f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"machine     {machine}; torch {torch.__version__}, transformers {transformers.__version__}\n"
          f"model       {arguments.model_name_or_path or 'random toy model'}, {parameters:.1f} M parameters, {str(model.dtype)[6:]}\n"
          f"batch       {questions} x {prompts.input_ids.shape[1]} prompt tokens ({int(prompts.visual[0].sum())} visual, "
          f"{arguments.frames} frames), {group} completions of {arguments.completion_length} tokens each\n"
          "held equal  weights, pixels, prompts, sampling seeds, completions and their length\n"
          f"timing      median of {arguments.repeats} alternating pairs after a warm-up; ratio second / first, median "
          "(lowest to highest)\n\n"
          f"{'':26s}{'first':>24s}{'second':>24s}{'ratio':>8s}")
    report("policy forward + backward", ("packed", "repeated"), updates,
           f"log-probs differ by {(logps[True] - logps[False]).abs().max():.0e} at most")
    report("rollout", ("encoded once", "repeated"), rollouts,
           f"{(sampled['once'] == sampled['repeated']).float().mean():.1%} of tokens equal")


def our_steps(arguments, processor, path):
    """Yields after every whole step of ours: the picture, rollouts, reference, one packed forward, loss, AdamW."""
    model, reference = (AutoModelForImageTextToText.from_pretrained(arguments.folder, dtype=torch.float32, attn_implementation="sdpa")
                        for _ in range(2))
    policy, group = Policy(model), arguments.num_generations
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    eos, banned = special_tokens(model, processor)
    while True:
        item = Encoder(processor, 0, 1 << 40).encode(Example("0", "Which ball is red?", [], "numerical", "1", path, "image"))
        prompts = collate([item], model)
        model.eval()
        tokens, mask = rollout(model, prompts, [group], list(range(group)), arguments.completion_length, eos, banned + eos)
        model.train()
        completions, mask = tokens[None], mask[None]
        with torch.no_grad():
            ref_logp = Policy(reference.eval())(prompts, completions, mask)[0][0]
        logp = policy(prompts, completions, mask, hidden_layers=(-1,))[0][0]
        advantages = group_advantages(torch.rand(1, group))[0]
        policy_loss(logp, logp.detach(), advantages, mask[0], ref_logp)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def trl_steps(arguments, processor, path):
    """Seconds of the timed steps of TRL's GRPOTrainer, which runs its own loop."""
    from datasets import Dataset
    from datasets import Image as Picture
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ends = []
    clock = type("Clock", (TrainerCallback,), {"on_step_end": lambda self, *_, **__: ends.append(time.perf_counter())})
    question = {"prompt": [{"role": "user", "content": "Which ball is red?"}], "image": path}
    length = arguments.completion_length
    with tempfile.TemporaryDirectory() as output:
        GRPOTrainer(
            model=arguments.folder, processing_class=processor, callbacks=[clock()],
            reward_funcs=lambda completions, **_: [random.random() for _ in completions],
            train_dataset=Dataset.from_list([question] * 4).cast_column("image", Picture()),
            args=GRPOConfig(output_dir=output, max_steps=arguments.steps + 1, per_device_train_batch_size=arguments.num_generations,
                            num_generations=arguments.num_generations, max_completion_length=length, beta=0.04, learning_rate=1e-6,
                            generation_kwargs={"min_new_tokens": length}, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
                            gradient_checkpointing=False, disable_tqdm=True, logging_strategy="no",
                            model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"})).train()
    return np.diff(ends).tolist()


def run_side(arguments, side):
    """One process: prints the seconds of its steps and its peak memory over what it had with its libraries loaded."""
    if side == "trl":  # not part of the peak
        from datasets import Dataset  # noqa: F401
        from trl import GRPOTrainer  # noqa: F401
    processor, path = AutoProcessor.from_pretrained(arguments.folder), str(Path(arguments.folder) / "picture.png")
    processor.image_processor.size = {"shortest_edge": 1, "longest_edge": 1 << 40}
    before = psutil.Process().memory_info().rss
    if side == "trl":
        seconds = trl_steps(arguments, processor, path)
    else:
        steps, ends = our_steps(arguments, processor, path), []
        for _ in range(arguments.steps + 1):
            next(steps)
            ends.append(time.perf_counter())
        seconds = np.diff(ends).tolist()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # of this process; ru_maxrss inherits
    print(json.dumps({"seconds": float(np.median(seconds)), "MB": (peak - before) / 1e6}))


def bench_trl(arguments):
    torch.manual_seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        model, processor = make_toy(arguments.seed, hidden=arguments.hidden, layers=arguments.layers, group=4)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        side = 28 * round((arguments.visual_tokens / 2) ** 0.5)
        pixels = np.random.default_rng(arguments.seed).integers(0, 256, (side, 2 * side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path(folder) / "picture.png")
        flags = [value for name in TRL_FLAGS for value in (f"--{name}", str(getattr(arguments, name)))]
        results = {"ours": [], "trl": []}
        for _ in range(arguments.repeats):
            for side, found in results.items():
                command = [sys.executable, __file__, "trl", *flags, "--side", side, "--folder", folder]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise DataError(f"the process of {side} failed: {done.stderr.strip().splitlines()[-1]}")
                found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    import trl
    print(f"machine     {platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads; torch {torch.__version__}, "
          f"transformers {transformers.__version__}, trl {trl.__version__}\n"
          f"step        {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters, 4 query heads a key head; a "
          f"picture of {arguments.visual_tokens} visual tokens, {arguments.num_generations} completions of {arguments.completion_length} "
          "tokens\n"
          f"timing      median of {arguments.repeats} alternating pairs of processes, {arguments.steps} steps each; ratio TRL / ours "
          "(lowest to highest)\n")
    for name, unit in (("seconds", "s a step"), ("MB", "MB, peak over the loaded libraries")):
        ours, theirs = (np.array([found[name] for found in results[side]]) for side in ("ours", "trl"))
        print_ratio(f"{np.median(ours):.1f} against TRL's {np.median(theirs):.1f} {unit}", theirs / ours)


def make_videos(arguments, folder):
    """Example of every random video: four scenes of drifting coarse colours, MPEG-4 with a key frame every half second."""
    examples, size = [], (arguments.width, arguments.height)
    for index in range(arguments.videos):
        rng, path = np.random.default_rng([arguments.seed, index]), str(Path(folder) / f"{index}.mp4")
        writer, count = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), 24, size), 24 * arguments.seconds
        for scene in np.array_split(np.arange(count), 4):
            picture = cv2.resize(rng.integers(0, 256, (9, 16, 3)).astype(np.uint8), size, interpolation=cv2.INTER_CUBIC)
            grain = rng.integers(0, 24, picture.shape).astype(np.uint8)
            for step in range(len(scene)):
                writer.write(np.roll(cv2.add(picture, grain), 3 * step, axis=1))
        writer.release()
        examples.append(Example(str(index), f"what is in video {index}", [], "free-form", "a", path, "video"))
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _, preprocess = open_clip.create_model_and_transforms(arguments.clip, pretrained=None, device=device)  # random weights
    clip = prior.Clip(model.eval(), preprocess, lambda texts: torch.ones(len(texts), model.context_length, dtype=torch.long), device)
    hsv, full = (prior.PriorSettings(frames=arguments.frames, prior=name) for name in ("no_semantic", "full"))
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        examples = make_videos(arguments, folder)
        groups = prior.group_by_medium(examples)

        def bare(workers=0):
            """decord's get_batch alone, of every video; in plain worker processes if there are some."""
            paths = [example.media for example in examples]
            if workers == 0:
                return [get_batch(path, arguments.frames) for path in paths]
            with ProcessPoolExecutor(workers, mp_context=context, initializer=prior.start_worker) as pool:
                return steady(pool.map(get_batch, 3 * paths, itertools.repeat(arguments.frames)), workers)

        def rows(settings, workers, model=None, media=groups):
            """What prior.py does with every video."""
            for medium, cues in prior.all_cues(media, settings, model and model.preprocess, workers):
                yield prior.media_rows(groups[medium], cues, model, settings)

        pixels = [cues[-1] for _, cues in prior.all_cues(groups, full, preprocess)]

        def encode():
            for one in pixels:
                yield prior.encode_texts(["x"], clip) @ prior.encode_pixels(one, clip).T

        print(f"machine     {platform.machine()} CPU, {os.cpu_count()} cores; CLIP on {device}; torch {torch.__version__}\n"
              f"videos      {len(examples)}, {arguments.width}x{arguments.height}, {arguments.seconds} s at 24 fps, MPEG-4; "
              f"{arguments.frames} frames of each\n"
              f"timing      median of {arguments.repeats} alternating turns (lowest to highest); workers from their first results on\n")
        seconds = time_turns((bare, lambda: list(rows(hsv, 0))), arguments.repeats)
        print_ratio("hsv + uniform priors / get_batch", seconds[:, 1] / seconds[:, 0])
        seconds = np.array([[*(steady(rows(hsv, workers, media=3 * list(groups)), workers) for workers in (1, 2)), bare(1), bare(2)]
                            for _ in range(arguments.repeats)])
        print_ratio("one worker / two workers", seconds[:, 0] / seconds[:, 1])
        print_ratio("  get_batch alone, one process / two", seconds[:, 2] / seconds[:, 3])
        seconds = np.array([[steady(prior.all_cues(groups, full, preprocess, 1)), steady(encode()), steady(rows(full, 1, clip))]
                            for _ in range(arguments.repeats)])
        print_ratio(f"CLIP ({arguments.clip}) / decoding", seconds[:, 1] / seconds[:, 0])
        print_ratio("all / the slower of the two", seconds[:, 2] / seconds[:, :2].max(1))
        if arguments.memory_videos:
            memory(rows(full, 2, clip, itertools.islice(itertools.cycle(groups), arguments.memory_videos)), arguments.memory_videos)


def memory(results, count):
    """Prints the resident memory of this process and its workers while `count` results come."""
    used, process = [], psutil.Process()
    for done, _ in enumerate(results, 1):
        if done % max(1, count // 10) == 0:
            used.append(sum(one.memory_info().rss for one in (process, *process.children(recursive=True))) / 1e6)
    print(f"memory of all processes over {count} videos, MB after every tenth of them: {' '.join(f'{value:.0f}' for value in used)}")


def print_ratio(title, ratios):
    print(f"{title:44s}{np.median(ratios):8.2f} ({ratios.min():.2f} to {ratios.max():.2f})")


def main():
    hf_logging.set_verbosity_error()
    known_flags = {"step": FLAGS, "prior": PRIOR_FLAGS, "trl": TRL_FLAGS}
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", allow_abbrev=False, help="policy update and rollout, shared prompt against repeated prompt")
    step.add_argument("--model_name_or_path", help="folder of a Qwen2-VL or Qwen2.5-VL checkpoint; without one a random tiny model")
    build = commands.add_parser("prior", allow_abbrev=False, help="building priors, against decord alone; workers; overlap; memory")
    build.add_argument("--clip", default="ViT-B-32", help="open_clip's name of the architecture, with random weights (default ViT-B-32)")
    against = commands.add_parser("trl", allow_abbrev=False, help="a whole step, against TRL's GRPOTrainer")
    for name in ("side", "folder"):
        against.add_argument(f"--{name}", help=argparse.SUPPRESS)  # of the processes that it starts
    for command, known in zip((step, build, against), known_flags.values(), strict=True):
        for name, (default, _, text) in known.items():
            command.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    arguments = parser.parse_args()
    try:
        for name, (_, least, _) in known_flags[arguments.command].items():
            if getattr(arguments, name) < least:
                raise DataError(f"--{name} {getattr(arguments, name)} is too small; at least {least}")
        if arguments.command == "prior":
            if arguments.clip not in open_clip.list_models():
                raise DataError(f"--clip {arguments.clip} is no architecture of open_clip")
            return bench_prior(arguments)
        if arguments.command == "trl":
            if importlib.util.find_spec("trl") is None:
                raise DataError("TRL is not installed (pip install trl)")
            return run_side(arguments, arguments.side) if arguments.side else bench_trl(arguments)
        if arguments.frame_size % 28:
            raise DataError(f"--frame_size {arguments.frame_size} is not a multiple of 28, the pixels of a visual token")
        bench_step(arguments)
    except DataError as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # as train.py; here, for it holds for the whole process
    main()
