"""Stage 4: SFT cold start and GRPO with the consensus frame reward (CF-GRPO, arXiv 2606.18441).

    # the embedded toy: SFT, then GRPO, on 2 CPU cores
    deepspeed train.py --deepspeed ds_zero3.json
    # your own data
    deepspeed train.py --deepspeed ds_zero3.json --stage sft \\
        --model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct \\
        --dataset_name Video-R1-COT-165k.json --media_root DATA --output_dir out/sft
    deepspeed train.py --deepspeed ds_zero3.json --stage grpo --model_name_or_path out/sft/sft \\
        --dataset_name Video-R1-260k.json --media_root DATA --output_dir out/grpo

grpo_step() is the algorithm: sample, score, reward, learn.
"""

import importlib.metadata
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor, set_seed
from transformers.utils import logging as hf_logging

import prior
import toy
from common.checkpoints import LENGTHS, Checkpoints, checkpoints, find_checkpoint, save_model
from common.data import (
    DataError,
    Example,
    invert_question,
    load_examples,
    plain_ids,
    read_template,
    target_text,
)
from common.engine import (
    Inputs,
    Tracker,
    check_deepspeed_file,
    set_learning_rate,
    start_engine,
    update_reference,
    write_shards,
)
from common.flags import Parser, flag
from common.media import Encoder, ModelInputs
from common.policy import FAMILIES, PACKED_FAMILIES, Policy, collate
from common.ranks import (
    average,
    check_finite,
    fewest_on_any_rank,
    is_main,
    log_main,
    name_skipped,
    on_main_first,
    start_ranks,
)
from common.rollout import Sampling, read_turn, sample_texts, sampling, stop_tokens
from common.run_page import run_report
from common.workers import append_lines, write_lines
from grpo import (
    Rollouts,
    accuracies,
    all_equal,
    evidence_shares,
    group_advantages,
    overlaps,
    policy_loss,
    rewards,
    rollout_frame_use,
    slot_shares,
    virtual_anchors,
)

# Accuracy and format alone; no prior is needed.
PLAIN = dict(cfr_weight=0.0, temporal=False, length_bonus=0.0, prior="uniform")
# What each recipe changes in the defaults above.
RECIPES = {
    "cfgrpo": {},
    "grpo": PLAIN,
    "tgrpo": dict(cfr_weight=0.0, prior="uniform", learning_rate=1e-6, top_k=50),
    "care": dict(
        PLAIN, consistency_coef=0.5, ema_decay=0.995, beta=0.0, learning_rate=1e-6, top_k=50
    ),
    "tw": dict(
        PLAIN,
        token_weight_alpha=1.7,
        reduction="token",
        clip_high=0.28,
        invert_questions=0.5,
        beta=0.0,
        learning_rate=1e-6,
        top_p=1.0,
        top_k=50,
        freeze_vision=True,
        max_completion_length=4096,
    ),
    "video_r2": dict(
        PLAIN,
        alignment_weight=1.0,
        learning_rate=1e-6,
        temperature=0.9,
        top_p=1.0,
        top_k=50,
        freeze_vision=True,
        frames=32,
        fps=2.0,
        max_completion_length=1024,
    ),
    "release": dict(
        cfr_weight=5.0,
        gate="hard",
        frame_use="hidden",
        frame_use_layer=-1,
        tau=0.5,
        use_order="softmax_mean",
        temporal_ratio=0.8,
        learning_rate=1e-6,
        top_k=50,
    ),
}


@dataclass
class TrainArguments:
    """Settings of a run; run.json in its output folder has their values."""

    model_name_or_path: str | None = flag(
        None,
        "Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint, folder or hub id. None: the toy model.",
        group="Model and data",
    )
    dataset_name: str | None = flag(
        None,
        "Training questions, Video-R1 JSON (SFT needs reasoning in `process`). None: the toy's.",
    )
    eval_dataset_name: str | None = flag(
        None,
        "Held-out questions, scored before and after; never trained on. The toy brings its own.",
    )
    media_root: str | None = flag(
        None, "Folder that media paths start from. Default: the data set file's folder."
    )
    stage: str | None = flag(
        None,
        "Default: both for the toy model, grpo for a checkpoint.",
        choices=["sft", "grpo", "both"],
    )
    recipe: str = flag(
        "cfgrpo",
        "System whose terms and constants are the defaults; any other flag on the command line "
        "wins over it (the README has a table).",
        choices=list(RECIPES),
    )
    eval_priors: str | None = flag(
        None,
        "Priors file of the held-out questions. None: their rows in --priors, else computed.",
    )
    toy_dir: str | None = flag(None, "Folder of the toy. Default: toy-seedN, made on first use.")
    prompt_template: str | None = flag(
        None, "Text file with {question} and {instruction}; replaces our wording."
    )
    system_prompt: str | None = flag(
        None,
        "Text of a system turn before every question. None: the chat template's default.",
    )

    min_pixels: int = flag(16 * 28 * 28, "Fewest pixels of a frame.", group="Frames")
    max_pixels: int = flag(128 * 28 * 28, "Most pixels of a frame.")
    frame_times: str = flag(
        "none",
        "How the model gets the frames' times: text (a line before the question), drawn (on the "
        "frames), none.",
        choices=["none", "text", "drawn"],
    )
    media_cache_gb: float = flag(2.0, "Memory for decoded media, per process that decodes.")
    decode_workers: int = flag(
        2, "Processes per rank that decode the next step's media; 0: none. Default for the toy: 0."
    )
    decode_timeout: float = flag(300.0, "Seconds after which a medium is given up (with workers).")
    max_prompt_length: int = flag(
        16384, "Questions with more prompt tokens, visual ones included, are skipped."
    )

    max_completion_length: int = flag(
        768, "Most tokens of a completion.", group="Sampling of rollouts and held-out answers"
    )
    temperature: float = flag(1.0, "Sampling temperature.")
    top_p: float = flag(0.95, "Nucleus.")
    top_k: int = flag(0, "Number of likeliest tokens to choose from; 0: all.")
    cuda_graph: bool = flag(
        torch.cuda.is_available(),
        "Sample in fixed shapes by one CUDA graph, captured once a rollout and replayed every "
        "token. Default: on with a GPU (not run on one yet).",
    )
    frame_use: str = flag(
        "hidden",
        "Where a response looks: hidden, by its hidden states (the paper, Eq. 3-5), or attention.",
        choices=["hidden", "attention"],
        group="Frame use",
    )
    frame_use_layer: int = flag(
        -1,
        "Layer that frame use is read at. hidden: 0 embeddings ... -1 last; attention: 1 is the "
        "first layer.",
    )
    pool: str = flag("max", "Pooling of a frame's tokens, Eq. 3.", choices=["max", "mean"])
    tau: float = flag(0.1, "Temperature of the softmax over frames, Eq. 5.")
    use_order: str = flag(
        "mean_softmax",
        "mean_softmax (the paper) or softmax_mean (the release, with --tau 0.5).",
        choices=["mean_softmax", "softmax_mean"],
    )

    sft_learning_rate: float = flag(1e-5, "Peak learning rate of SFT.", group="SFT")
    sft_max_steps: int = flag(-1, "SFT steps; -1: --sft_num_train_epochs.")
    sft_num_train_epochs: float = flag(1.0, "SFT epochs, when --sft_max_steps is -1.")
    sft_per_device_batch_size: int = flag(1, "Demonstrations per device and forward.")
    sft_gradient_accumulation_steps: int = flag(1, "Forwards per SFT step.")

    priors: str | None = flag(
        None,
        "Priors file made by prior.py for the training questions. None: computed first.",
        group="GRPO: questions and rollouts",
    )
    num_generations: int = flag(8, "G, rollouts per question.")
    per_device_train_batch_size: int = flag(1, "Questions per device and forward.")
    gradient_accumulation_steps: int = flag(1, "Forwards per optimizer step.")
    max_steps: int = flag(-1, "GRPO steps; -1: --num_train_epochs.")
    num_train_epochs: float = flag(1.0, "GRPO epochs, when --max_steps is -1.")
    invert_questions: float = flag(
        0.0,
        "TW-GRPO: share of the questions to invert (negated; right and wrong options exchanged).",
    )
    eval_steps: int = flag(
        0,
        "GRPO steps between two scorings of the held-out questions; 0: before and after training "
        "only.",
    )

    cfr_weight: float = flag(
        3.0,
        "Lambda of the consensus frame reward, Eq. 7 (the release has 5).",
        group="GRPO: rewards",
    )
    gate: str = flag(
        "soft",
        "How accuracy gates the consensus reward: soft (times accuracy), hard (accuracy > 0.01, "
        "the release), none (Eq. 7).",
        choices=["soft", "hard", "none"],
    )
    temporal: bool = flag(True, "Temporal reward: G/2 rollouts with shuffled frames (T-GRPO).")
    temporal_gamma: float = flag(0.3, "Temporal reward of a correct completion.")
    temporal_ratio: float = flag(
        1.0, "Rho: ordered accuracy must reach rho times shuffled accuracy (the release has 0.8)."
    )
    length_low: int = flag(320, "Fewest tokens that earn the length bonus.")
    length_high: int = flag(512, "Most tokens that earn the length bonus.")
    length_bonus: float = flag(0.2, "Length bonus of a correct completion; 0 turns it off.")
    consistency_coef: float = flag(
        0.0,
        "GRPO-CARE: bonus of an answer that the reference finds likely after its reasoning (CARE "
        "has 0.5).",
    )
    consistency_margin: float = flag(
        0.01,
        "GRPO-CARE: how far an answer's likelihood may lie below the mean of the selected (0 for "
        "SEED-Bench-R1).",
    )
    consistency_dense: bool = flag(
        False, "GRPO-CARE: coef * accuracy * likelihood for every answer, without the selection."
    )
    alignment_weight: float = flag(
        0.0,
        "Video-R2: weight of the temporal alignment reward, gated like the consensus reward.",
    )
    alignment_threshold: float = flag(
        0.75,
        "Video-R2: least similarity of two matching claims; words are compared, not meanings.",
    )
    alignment_buffer: float = flag(
        2.0, "Video-R2: seconds by which both intervals are widened on each side."
    )

    learning_rate: float = flag(
        5e-6, "Peak learning rate of GRPO (the release has 1e-6).", group="GRPO: loss"
    )
    beta: float = flag(
        0.04,
        "Weight of the KL penalty to the reference, Eq. 10; 0 loads no reference, unless the "
        "consistency bonus needs it.",
    )
    ema_decay: float = flag(
        1.0, "Reference <- decay * reference + (1 - decay) * policy; 1: frozen (CARE has 0.995)."
    )
    ema_steps: int = flag(10, "Steps between two such updates.")
    clip_low: float = flag(0.2, "Epsilon below, Eq. 10.")
    clip_high: float = flag(0.2, "Epsilon above, Eq. 10.")
    token_weight_alpha: float = flag(
        1.0, "TW-GRPO: greatest weight of a token; 1: all have weight 1 (TW-GRPO has 1.7)."
    )
    reduction: str = flag(
        "sequence",
        "Mean over tokens: sequence (GRPO), token (TW-GRPO, DAPO), constant (Dr. GRPO).",
        choices=["sequence", "token", "constant"],
    )
    scale_rewards: bool = flag(True, "Divide advantages by the group's standard deviation.")
    degenerate: str = flag(
        "keep",
        "Groups of equal rewards: keep (their KL alone), drop (no KL either), virtual_anchor (a "
        "virtual rollout of the other accuracy joins mean and deviation, TW-GRPO).",
        choices=["keep", "drop", "virtual_anchor"],
    )
    mask_truncated_completions: bool = flag(
        False, "Leave completions cut at --max_completion_length out of the loss (DAPO)."
    )
    num_iterations: int = flag(
        1, "Updates on the same rollouts; from the second on the ratio of Eq. 10 is not 1."
    )

    weight_decay: float = flag(0.01, "AdamW's.", group="Optimisation")
    max_grad_norm: float = flag(5.0, "Gradient clipping.")
    warmup_ratio: float = flag(
        0.05,
        "Share of the steps in which the learning rate rises; over the last 30 %% it falls to a "
        "tenth.",
    )
    freeze_vision: bool = flag(
        False,
        "Do not train the vision tower. Rollouts, reference and policy then share one pass "
        "through it.",
    )
    train_only_merger: bool = flag(
        False, "Train the layers between vision tower and language model alone (the mergers)."
    )
    gradient_checkpointing: bool = flag(
        False, "Recompute activations in the backward pass: less memory, a third more time."
    )
    deepspeed: str = flag(
        "ds_zero3.json", "DeepSpeed configuration; 'auto' values are filled from the flags."
    )

    output_dir: str = flag("output", "Folder for everything the run writes.", group="Run")
    save_steps: int = flag(100, "Steps between two checkpoints; 0: write the final model alone.")
    save_total_limit: int = flag(2, "Checkpoints to keep; older ones are deleted.")
    resume_from_checkpoint: str | None = flag(
        None, "Folder of a checkpoint, or auto: the newest one in the output folder, if any."
    )
    seed: int = flag(0, "Random seed.")
    local_rank: int = flag(-1, "Set by the deepspeed launcher.")


# Settings of a recipe that are meant for billions of parameters; the toy keeps its own.
NOT_FOR_THE_TOY = ("learning_rate", "frames", "fps", "max_completion_length", "prior")


def toy_defaults(folder, world_size):
    """Defaults of the toy; any flag on the command line wins over them.

    Global batches do not depend on the number of ranks. Frame use comes from the attention of the
    first layer: on the toy's known evidence it was above chance on every checkpoint that was
    checked (evaluate.py --frame_use_check), while the paper's lies at chance; the paper's is
    computed and logged beside it. Beta is higher because at a learning rate that a 1.2 M-parameter
    model needs to move in 80 steps, whatever no reward asks for drifts.
    """
    return dict(
        toy_dir=folder,
        clip=f"local-dir:{folder}/clip",
        min_pixels=56 * 56,
        max_pixels=56 * 56,
        decode_workers=0,
        max_completion_length=96,
        length_bonus=0.0,
        frame_use="attention",
        frame_use_layer=1,
        sft_learning_rate=2e-3,
        sft_max_steps=600,
        sft_per_device_batch_size=max(1, 32 // world_size),
        learning_rate=2e-4,
        beta=0.1,
        max_steps=80,
        per_device_train_batch_size=max(1, 16 // world_size),
        max_grad_norm=1.0,
    )


# ------------------------------------------------------------------------- what the stages share


@dataclass
class Run:
    """What every stage of a run uses."""

    args: TrainArguments
    processor: object  # of the checkpoint that the run starts from
    encoder: Encoder
    checkpoint: Checkpoints
    tracker: Tracker
    files: dict  # {name: open file} on rank 0, else {}

    def log(self, record):
        """A line of metrics.jsonl, and the trackers that the DeepSpeed file names."""
        self.write("metrics.jsonl", [record])
        self.tracker.show(record)

    def write(self, name, records):
        if is_main():
            self.files[name].writelines(json.dumps(record) + "\n" for record in records)
            self.files[name].flush()


@dataclass
class Questions:
    """Examples of a stage or of the held-out set, with their priors."""

    examples: list  # those that can be used; of GRPO in the order of training, with repeats
    source: Path | None = None  # their file
    priors: dict = field(default_factory=dict)  # {problem_id: Prior}
    skipped: dict = field(default_factory=dict)  # {problem_id: cause} of those that cannot


@dataclass
class Ready:
    """An example whose turn it is, with what the processor made of it."""

    place: int  # in the run's order of examples; seeds what is random about it
    example: Example
    prior: object  # Prior; None for text and for demonstrations
    inputs: ModelInputs
    control: ModelInputs | None  # the same with shuffled frames


class Batches:
    """This rank's examples, step by step: decoded ahead, with as many forwards on every rank."""

    def __init__(self, run, questions, steps, batch, accumulation, shuffle=False):
        args = run.args
        self.run = run
        self.questions = questions
        self.steps = steps
        self.batch = batch
        self.accumulation = accumulation
        self.shuffle = shuffle  # a control with shuffled frames goes with every video
        self.lost = 0  # examples of this run that could not be used, on all ranks
        self.inputs = Inputs(run.encoder, args.decode_workers, args.decode_timeout)

    def requests(self, step):
        """What to decode for each forward of a step: (place, example, prior, frame order) each."""
        forwards = []
        if step >= self.steps:
            return forwards
        for micro in range(self.accumulation):
            # Ranks take turns, so that the order does not depend on their number.
            number = (step * self.accumulation + micro) * dist.get_world_size() + dist.get_rank()
            begin = number * self.batch
            part = []
            for place in range(begin, begin + self.batch):
                example = self.questions.examples[place]
                row = self.questions.priors.get(example.id)
                # The control's order of frames depends on the question's place alone.
                order = None
                if self.shuffle and example.media_type == "video":
                    frames = range(len(row.frames))
                    order = random.Random(run_seed(self.run.args, place)).sample(
                        frames, len(frames)
                    )
                part.append((place, example, row, order))
            forwards.append(part)
        return forwards

    def ahead(self, step):
        """Starts the decoding of a step."""
        for part in self.requests(step):
            self.inputs.ahead(part)

    def take(self, step, device):
        """Lists of Ready, one a forward; one in which a rank has nothing is left out on all."""
        # Workers decode the next step while this one trains.
        self.ahead(step + 1)
        forwards = []
        for part in self.requests(step):
            usable = self.inputs.usable(
                part, self.run.args.max_prompt_length, self.questions.skipped
            )
            # Collectives must match: a forward that one rank cannot fill is left out on all.
            fewest, everywhere = fewest_on_any_rank(len(usable), device)
            self.lost += self.batch * dist.get_world_size() - everywhere
            if fewest > 0:
                priors = self.questions.priors
                forwards.append(
                    [
                        Ready(place, example, priors.get(example.id), inputs, control)
                        for place, example, inputs, control in usable
                    ]
                )
        return forwards

    def stop(self):
        self.inputs.stop()


class StepLog:
    """Values of one step by metric; the record of the step has their means over all ranks."""

    def __init__(self, stage, step):
        self.stage = stage
        self.step = step
        self.values = defaultdict(list)
        self.begin = time.perf_counter()

    def add(self, name, values):
        """Adds a list or tensor of values to a metric."""
        # One transfer from the device for the whole tensor.
        if torch.is_tensor(values):
            values = values.flatten().tolist()
        self.values[name] += values

    @contextmanager
    def seconds(self, name):
        """Adds the seconds of a block to time/NAME."""
        begin = time.perf_counter()
        yield
        spent = time.perf_counter() - begin
        self.values[f"time/{name}"] = [sum(self.values[f"time/{name}"]) + spent]

    def means(self, device):
        """{metric: mean over the values of all ranks}."""
        self.values["time/step"] = [time.perf_counter() - self.begin]
        return average(self.values, device)


def run_seed(args, place):
    """Seed of what is random about one example, wherever it is sampled."""
    return args.seed * 1_000_003 + place


# ------------------------------------------------------------------------------------------- SFT


def batch_targets(examples, processor):
    """Demonstrations as groups of one: completions, mask (B, 1, T).

    A target leaves out what the chat template has already put in the assistant's place, and ends
    with the end of the turn, which is learned too.
    """
    turn = read_turn(processor)
    targets = []
    for example in examples:
        text = target_text(example).removeprefix(turn.opening.strip())
        targets.append([*plain_ids(processor.tokenizer, text), turn.end])
    # Right-padded with the end of the turn, which the mask leaves out.
    length = max(len(ids) for ids in targets)
    completions = torch.full((len(targets), 1, length), turn.end)
    mask = torch.zeros(len(targets), 1, length, dtype=torch.bool)
    for row, ids in enumerate(targets):
        completions[row, 0, : len(ids)] = torch.tensor(ids)
        mask[row, 0, : len(ids)] = True
    return completions, mask


def sft_steps(args, count):
    """Optimizer steps of SFT on `count` demonstrations, and demonstrations of a step.

    Errors: DataError if there are too few for one step.
    """
    forward = args.sft_per_device_batch_size * dist.get_world_size()
    per_step = forward * args.sft_gradient_accumulation_steps
    if per_step > count:
        raise DataError(f"SFT has {count} usable demonstrations, fewer than one step of {per_step}")
    if args.sft_max_steps > 0:
        return args.sft_max_steps, per_step
    return max(1, int(args.sft_num_train_epochs * count) // per_step), per_step


def in_epochs(examples, count, seed):
    """The first `count` of the examples, shuffled anew in every epoch.

    A longer run begins with the examples of a shorter one.
    """
    # The whole order is drawn at once, so that a resumed run finds its place by the step alone.
    rng = random.Random(seed)
    order = []
    while examples and len(order) < count:
        order += rng.sample(examples, len(examples))
    return order


def train_sft(run, model_path, demonstrations):
    """Cold start: reasoning and answer as target, prompt masked, mean over the tokens of all ranks.

    Returns the folder of the trained checkpoint.
    """
    args = run.args
    accumulation = args.sft_gradient_accumulation_steps
    batch = args.sft_per_device_batch_size
    steps, per_step = sft_steps(args, len(demonstrations.examples))
    engine = start_engine(args, model_path, batch, accumulation, args.sft_learning_rate)
    done, state = run.checkpoint.load(engine, "sft")

    # The order of all steps, and what an interrupted run had counted.
    order = in_epochs(demonstrations.examples, steps * per_step, args.seed)
    demonstrations = replace(demonstrations, examples=order)
    batches = Batches(run, demonstrations, steps, batch, accumulation)
    if state:
        batches.lost = state["lost"]
        demonstrations.skipped.update(state["skipped"])

    batches.ahead(done)
    bar = progress_bar("sft", done, steps)
    for step in bar:
        log = StepLog("sft", step)
        forwards = batches.take(step, engine.device)
        if forwards:
            set_learning_rate(engine, step, steps, args.sft_learning_rate, args.warmup_ratio)
            sft_step(run, engine, forwards, log)
            record = step_record(log, engine, batches.lost)
            run.log(record)
            show_metrics(bar, record)
        run.checkpoint.after_step(
            engine, "sft", step + 1, steps, skipped=demonstrations.skipped, lost=batches.lost
        )
    batches.stop()
    return finish_stage(run, engine, "sft")


def sft_step(run, engine, forwards, log):
    """One optimizer step of SFT: the mean over the tokens of all its forwards and ranks."""
    world = dist.get_world_size()
    # The tokens of the whole step on all ranks: every token weighs the same, however it is split.
    targets = []
    tokens = torch.zeros((), device=engine.device)
    for ready in forwards:
        completions, mask = batch_targets([one.example for one in ready], run.processor)
        targets.append((completions.to(engine.device), mask.to(engine.device)))
        tokens += mask.sum()
    dist.all_reduce(tokens)

    # One forward and backward each; the optimizer steps at the last.
    total = 0.0
    for number, (ready, (completions, mask)) in enumerate(zip(forwards, targets, strict=True)):
        engine.set_gradient_accumulation_boundary(number == len(forwards) - 1)
        prompts = collate([one.inputs for one in ready], engine.module.model).to(engine.device)
        logp = engine(prompts, completions, mask).logp  # (B, 1, T)
        loss = -(logp * mask).sum() / tokens
        total += loss.item()
        with run.checkpoint.stop_on_nan("sft", log.step, [one.example for one in ready]):
            check_finite(loss.item(), "loss")
        # DeepSpeed averages over ranks and forwards; the loss is their sum.
        engine.backward(loss * world * run.args.sft_gradient_accumulation_steps)
        engine.step()
    log.add("loss/sft", [total * world])
    log_norm(engine, log)


def log_norm(engine, log):
    """Logs and returns the norm of the step's gradient before clipping; 0 under ZeRO stage 0."""
    norm = float(engine.get_global_grad_norm() or 0)
    if norm:
        log.values["loss/grad_norm"] = [norm]
    return norm


def finish_stage(run, engine, stage):
    """Saves the model of a stage; returns its folder."""
    run.checkpoint.release()
    folder = Path(run.args.output_dir) / stage
    save_model(engine, run.processor, folder)
    engine.destroy()
    return folder


def step_record(log, engine, lost):
    """A step's line of metrics.jsonl."""
    metrics = log.means(engine.device)
    metrics["train/learning_rate"] = engine.get_lr()[0]
    return {"stage": log.stage, "step": log.step, **metrics, "data/skipped": lost}


def progress_bar(stage, done, steps):
    return tqdm(
        range(done, steps),
        desc=stage.upper(),
        unit="step",
        mininterval=1,
        initial=done,
        total=steps,
        disable=not is_main(),
    )


# ------------------------------------------------------------------------------------------ GRPO


def sample(run, model, ready):
    """Samples one forward's rollouts, in one batch with their controls.

    G completions of every question and, with --temporal, G/2 of every video's with its frames
    shuffled.

    Args:
        model: the bare model of sampling().
        ready: list of B Ready.
    Returns:
        Rollouts.
    """
    args = run.args
    group = args.num_generations
    half = max(1, group // 2)
    inputs = [one.inputs for one in ready]
    controls = [b for b, one in enumerate(ready) if one.control is not None]

    # A row's random numbers depend on its place in the run alone, not on its neighbours or rank.
    counts = [group] * len(ready) + [half] * len(controls)
    seeds = []
    for b, count in zip([*range(len(ready)), *controls], counts, strict=True):
        first = run_seed(args, ready[b].place) * 1_009
        seeds += range(first, first + count)

    # One batch for rollouts and controls: the weights are read once for both.
    device = model.get_input_embeddings().weight.device
    prompts = collate([*inputs, *(ready[b].control for b in controls)], model).to(device)
    if args.freeze_vision:
        # A frozen tower gives the same features in sampling, reference and policy: run it once.
        with torch.no_grad():
            prompts.features = Policy(model).encode(prompts)
    tokens, mask, logp, texts = sample_texts(
        model, run.processor, prompts, counts, seeds, sampling_settings(args)
    )

    # The group's own rows come first; they are cut to their longest completion.
    rows = len(ready) * group
    mask = mask[:rows]  # (B * G, T)
    longest = int(mask.sum(-1).max())
    shape = (len(ready), group, longest)
    # A completion without a stop token was cut at the limit.
    stop = torch.tensor(stop_tokens(model, run.processor), device=device)
    ended = torch.isin(tokens[:rows], stop) & mask
    own_prompts = collate(inputs, model)
    if prompts.features is not None:
        own_prompts.features = own_features(prompts, len(ready))
    # Behind the group's rows come the controls', half a group each.
    control_texts = [None] * len(ready)
    for number, b in enumerate(controls):
        control_texts[b] = texts[rows + number * half : rows + (number + 1) * half]
    return Rollouts(
        examples=[one.example for one in ready],
        priors=[one.prior for one in ready],
        prompts=own_prompts.to(device),
        completions=tokens[:rows, :longest].reshape(shape),
        mask=mask[:, :longest].reshape(shape),
        truncated=~ended.any(dim=-1).view(shape[:2]),
        logp=logp[:rows, :longest].reshape(shape),
        texts=[texts[begin : begin + group] for begin in range(0, rows, group)],
        control_texts=control_texts,
    )


def sampling_settings(args):
    """How the run samples its rollouts."""
    return Sampling(
        args.max_completion_length, args.temperature, args.top_p, args.top_k, args.cuda_graph
    )


def own_features(prompts, count):
    """The frozen vision tower's features of the first `count` prompts, without the controls'."""
    visual = int(prompts.visual[:count].sum())
    if visual == 0:  # text alone: the features are of a blank image
        return prompts.features
    return [feature[:visual] for feature in prompts.features]


def asked_layers(args):
    """Arguments of the policy's forward that make it return what frame_uses() reads."""
    if args.frame_use == "attention":
        return {"hidden_layers": (-1,), "attention_layer": args.frame_use_layer}
    return {"hidden_layers": tuple({-1, args.frame_use_layer})}


def frame_uses(args, prompts, mask, scored):
    """Frame use as the run's settings have it and, for the log, as the paper has it (Eq. 3-5).

    Two results of rollout_frame_use.
    """
    paper = rollout_frame_use(prompts, mask, scored.hidden[-1])
    if args.frame_use == "attention":
        return rollout_frame_use(prompts, mask, attention=scored.attention), paper
    states = scored.hidden[args.frame_use_layer]
    own = rollout_frame_use(
        prompts, mask, states, tau=args.tau, order=args.use_order, pool=args.pool
    )
    return own, paper


def weigh_forwards(args, step_rollouts, device):
    """Sets each forward's learned tokens and the share of its loss in the step's.

    A step's gradient is the same however it is split into forwards and ranks: a forward's loss is
    a mean over its completions (sequence, constant) or its tokens (token), so it counts as many as
    it has of those on all ranks; DeepSpeed then divides by the ranks and by the forwards of a
    step. "constant" (Dr. GRPO) divides by --max_completion_length, not by the longest completion
    at hand.
    """
    counts = []
    for rollouts in step_rollouts:
        rollouts.learned = rollouts.mask
        if args.mask_truncated_completions:
            rollouts.learned = rollouts.mask & ~rollouts.truncated[..., None]
        if args.reduction == "token":
            counts.append(float(rollouts.learned.sum()))
        else:
            counts.append(float(rollouts.truncated.numel()))
    total = torch.tensor(sum(counts), device=device)
    dist.all_reduce(total)
    splits = dist.get_world_size() * args.gradient_accumulation_steps
    for rollouts, count in zip(step_rollouts, counts, strict=True):
        scale = 1.0
        if args.reduction == "constant":
            scale = rollouts.mask.shape[2] / args.max_completion_length
        rollouts.share = count * scale * splits / max(total.item(), 1.0)


def grpo_step(run, engine, reference, forwards, log):
    """One step of CF-GRPO (Eq. 3-10): sample, score, reward, learn.

    Args:
        reference: engine of the reference model, or None.
        forwards: lists of Ready.
        log: StepLog.
    """
    args = run.args

    # 1. Sample. The whole step before anything is learned: one gathering of the parameters.
    with log.seconds("rollout"), sampling(engine) as model:
        step_rollouts = [sample(run, model, ready) for ready in forwards]
    weigh_forwards(args, step_rollouts, engine.device)

    for _ in range(args.num_iterations):
        for number, rollouts in enumerate(step_rollouts, 1):
            engine.set_gradient_accumulation_boundary(number == len(step_rollouts))
            with run.checkpoint.stop_on_nan("grpo", log.step, rollouts.examples):
                learn(run, engine, reference, rollouts, log)
                with log.seconds("update"):
                    engine.step()
                check_finite(log_norm(engine, log), "norm of the gradient")


def learn(run, engine, reference, rollouts, log):
    """Score, reward and learn from one forward's rollouts; from the second time on learn alone."""
    args = run.args
    first_time = rollouts.advantages is None
    asked = {}
    if args.token_weight_alpha != 1:
        asked["weight_alpha"] = args.token_weight_alpha
    if first_time:
        asked.update(asked_layers(args))
        with log.seconds("reference"):
            rollouts.reference_logp = reference_logps(reference, rollouts)
    with log.seconds("policy"):
        # 2. Score: one packed forward gives log-probabilities and what frame use is read from.
        scored = engine(rollouts.prompts, rollouts.completions, rollouts.mask, **asked)
        # 3. Reward (Eq. 3-8), advantages (Eq. 9).
        if first_time:
            reward_rollouts(run, rollouts, scored, log)
        # 4. Learn (Eq. 10).
        loss = rollouts_loss(args, rollouts, scored, log)
        engine.backward(loss * rollouts.share)


def reference_logps(reference, rollouts):
    """(B, G, T) log-probabilities of the completions by the reference model; None without one."""
    if reference is None:
        return None
    with torch.no_grad():
        return reference(rollouts.prompts, rollouts.completions, rollouts.mask).logp


def reward_rollouts(run, rollouts, scored, log):
    """Rewards and advantages of one forward's rollouts, logged (Eq. 3-9)."""
    args = run.args
    logp = scored.logp.detach()  # (B, G, T)
    check_finite(logp[rollouts.mask].sum().item(), "policy's log-probability")
    uses, paper_uses = frame_uses(args, rollouts.prompts, rollouts.mask, scored)
    terms = rewards(rollouts, uses, run.processor.tokenizer, args)

    # Eq. 9, in float32 on the device as the loss.
    total = terms["total"].float().to(logp.device)  # (B, G)
    anchors = None
    if args.degenerate == "virtual_anchor":
        anchors = virtual_anchors(terms).float().to(logp.device)  # (B,)
    rollouts.rewards = terms
    rollouts.advantages = group_advantages(total, scale=args.scale_rewards, anchors=anchors)
    # The policy has not moved since it sampled, so its own forward gives the old log-probabilities.
    rollouts.old_logp = logp
    degenerate = all_equal(total)  # (B,)
    rollouts.dropped = torch.zeros_like(degenerate)  # (B,)
    if args.degenerate == "drop":
        rollouts.dropped = degenerate

    # Metrics are named after the terms: a new term needs no second list.
    for name, values in terms.items():
        log.add(f"reward/{name}", values)
    rows = rollouts.priors
    # The paper's frame use is logged beside the run's own.
    names = ("consensus/score", "consensus/evidence_use")
    log_frame_use(log, names, rollouts.examples, rows, uses)
    names = ("consensus/paper_score", "consensus/paper_evidence_use")
    log_frame_use(log, names, rollouts.examples, rows, paper_uses)
    for example, texts in zip(rollouts.examples, rollouts.control_texts, strict=True):
        if texts:
            log.add("rollout/shuffled_accuracy", accuracies(example, texts))
    log.add("loss/zero_variance_groups", degenerate.float())
    log.add("rollout/length", rollouts.lengths)
    log.add("rollout/truncated", rollouts.truncated.float())
    log.add("rollout/entropy", per_token(scored.entropy, rollouts))
    log.add("rollout/logp_difference", per_token((rollouts.logp - logp).abs(), rollouts))
    run.write("rollouts.jsonl", rollout_lines(rollouts, uses, log.step))


def per_token(values, rollouts):
    """(B, G, T) -> (B, G), mean over each completion's tokens."""
    return (values * rollouts.mask).sum(-1) / rollouts.lengths


def log_frame_use(log, names, examples, rows, uses):
    """Logs the consensus (Eq. 6) and the mass on known evidence of every rollout's frame use.

    Args:
        names: metrics of the two.
        uses: of rollout_frame_use.
    """
    score_name, evidence_name = names
    for example, row, use in zip(examples, rows, uses, strict=True):
        if use[0] is None:
            continue
        log.add(score_name, overlaps(row, use))
        if example.evidence:
            # The data set knows where the answer is: how much of the looking was there?
            log.add(evidence_name, evidence_shares(example, row, use))


def rollouts_loss(args, rollouts, scored, log):
    """Eq. 10 of one forward: a scalar, logged."""
    # --degenerate drop: groups without a signal weigh 0, their KL too.
    weights = scored.weights
    if rollouts.dropped.any():
        if weights is None:
            weights = torch.ones_like(scored.logp)
        weights = weights * ~rollouts.dropped[:, None, None]

    def flat(tensor):  # (B, G, T) -> (N, T)
        return None if tensor is None else tensor.flatten(0, 1)

    loss, stats = policy_loss(
        flat(scored.logp),
        flat(rollouts.old_logp),
        rollouts.advantages.flatten(),
        flat(rollouts.learned),
        flat(rollouts.reference_logp),
        args.beta,
        args.clip_low,
        args.clip_high,
        args.reduction,
        flat(weights),
    )
    check_finite(loss.item(), "loss")
    # Counted once a question, so that the means over forwards of different sizes are right.
    count = len(rollouts.examples)
    for name, value in {**stats, "policy": loss.item()}.items():
        log.add(f"loss/{name}", [value] * count)
    return loss


def rollout_lines(rollouts, uses, step):
    """Lines of rollouts.jsonl: one a rollout, with its text, rewards, prior and frame use."""
    lines = []
    for b, example in enumerate(rollouts.examples):
        for g, text in enumerate(rollouts.texts[b]):
            use = uses[b][g]
            lines.append(
                {
                    "step": step,
                    "problem_id": example.id,
                    "question": example.question,
                    "options": example.options,
                    "text": text,
                    "answer": example.answer,
                    "rewards": {
                        name: rollouts.rewards[name][b, g].item() for name in rollouts.rewards
                    },
                    "prior": None if use is None else rollouts.priors[b].prior,
                    "use": None if use is None else [round(value, 4) for value in use.tolist()],
                }
            )
    return lines


def train_grpo(run, model_path, questions, heldout):
    """CF-GRPO with the starting checkpoint as reference. Returns the trained one's folder.

    Args:
        questions: Questions in the order of training.
        heldout: Questions that --eval_steps scores.
    """
    args = run.args
    batch = args.per_device_train_batch_size
    accumulation = args.gradient_accumulation_steps
    steps = len(questions.examples) // (batch * accumulation * dist.get_world_size())
    engine = start_engine(args, model_path, batch, accumulation, args.learning_rate)
    # The reference is loaded only if a term asks it.
    reference = None
    if args.beta > 0 or args.consistency_coef:
        reference = start_engine(args, model_path)
    batches = Batches(run, questions, steps, batch, accumulation, shuffle=args.temporal)
    batches.lost = len(questions.skipped)
    averages = {}  # of the reference's parameters, with --ema_decay
    done, state = run.checkpoint.load(engine, "grpo")
    if state:
        # A longer run may have come to further questions that cannot be used.
        new = questions.skipped.keys() - state["skipped"].keys()
        batches.lost = state["lost"] + len(new)
        questions.skipped.update(state["skipped"])
        averages = state["averages"]
        if averages:
            write_shards(reference, averages)

    batches.ahead(done)
    bar = progress_bar("grpo", done, steps)
    for step in bar:
        log = StepLog("grpo", step)
        set_learning_rate(engine, step, steps, args.learning_rate, args.warmup_ratio)
        with log.seconds("rollout"):
            forwards = batches.take(step, engine.device)
        if forwards:
            grpo_step(run, engine, reference, forwards, log)
        if reference is not None and args.ema_decay < 1 and (step + 1) % args.ema_steps == 0:
            update_reference(reference, engine, averages, args.ema_decay)
        record = step_record(log, engine, batches.lost)
        if heldout.examples and args.eval_steps and (step + 1) % args.eval_steps == 0:
            scores = score_heldout(run, engine, heldout)
            record.update({f"eval/{name}": value for name, value in scores.items()})
        run.log(record)
        show_metrics(bar, record)
        run.checkpoint.after_step(
            engine,
            "grpo",
            step + 1,
            steps,
            skipped=questions.skipped,
            lost=batches.lost,
            averages=averages,
        )
    batches.stop()
    return finish_stage(run, engine, "grpo")


# Short names on the progress bar.
SHOWN = {
    "loss": "loss/sft",
    "reward": "reward/total",
    "acc": "reward/accuracy",
    "cfr": "consensus/score",
    "len": "rollout/length",
    "kl": "loss/kl",
    "same": "loss/zero_variance_groups",
    "skipped": "data/skipped",
}


def show_metrics(bar, record):
    shown = {}
    for short, name in SHOWN.items():
        if name in record:
            shown[short] = f"{record[name]:.3g}"
    bar.set_postfix(shown, refresh=False)


# --------------------------------------------------------------------------------- held-out score


def score_checkpoint(run, model_path, heldout):
    """score_heldout of a saved model; {} without held-out questions."""
    if not heldout.examples:
        return {}
    engine = start_engine(run.args, model_path)
    scores = score_heldout(run, engine, heldout)
    engine.destroy()
    return scores


HELDOUT_BATCH = 32  # questions answered at a time: the cache of the toy's answers stays small


def drop_unusable_heldout(args, encoder, heldout, resume):
    """Leaves out held-out questions with a broken medium or too long a prompt.

    Asked once, before the first scoring, so that all scorings of a run are of the same questions.

    Errors: DataError if no question is left, or if one that was scored before can no longer be.
    """
    # Every rank decodes its share; all of them learn what the others could not use.
    inputs = Inputs(encoder, args.decode_workers, args.decode_timeout)
    world = dist.get_world_size()
    unusable = {}
    requests = []
    for place, example in enumerate(heldout.examples):
        requests.append((place, example, heldout.priors.get(example.id), None))
    starts = range(0, len(requests), HELDOUT_BATCH * world)
    for start in tqdm(starts, desc="held-out", unit="batch", disable=not is_main(), leave=False):
        mine = requests[start : start + HELDOUT_BATCH * world][dist.get_rank() :: world]
        inputs.ahead(mine)
        inputs.usable(mine, args.max_prompt_length, unusable)
    inputs.stop()

    # The score before GRPO is not repeated: the one after must be of the same questions.
    if unusable and resume.get("stage") == "grpo" and "heldout_skipped" in resume:
        raise DataError(
            f"{len(unusable)} held-out question(s) scored before GRPO can no longer be; the "
            f"first: {next(iter(unusable.values()))}"
        )
    heldout.examples = [e for e in heldout.examples if e.id not in unusable]
    heldout.skipped.update(unusable)
    if not heldout.examples:
        first = next(iter(heldout.skipped.values()))
        raise DataError(f"no question of {heldout.source} can be used; the first: {first}")
    log_main(f"held-out: {len(heldout.examples)} question(s); unusable: {len(heldout.skipped)}")


@torch.no_grad()
def score_heldout(run, engine, heldout):
    """Greedy and sampled answers to questions that are never trained on, every rank its share.

    Frame use is read on the sampled answers. "conflict" are the questions whose asked and most
    salient evidence differ.

    Returns:
        {name: mean over all ranks}.
    """
    args = run.args
    log = StepLog("heldout", 0)
    mine = list(enumerate(heldout.examples))[dist.get_rank() :: dist.get_world_size()]
    starts = range(0, len(mine), HELDOUT_BATCH)
    bar = tqdm(starts, desc="held-out", unit="batch", disable=not is_main(), leave=False)
    with sampling(engine) as model:
        for start in bar:
            places, examples = zip(*mine[start : start + HELDOUT_BATCH], strict=True)
            rows = [heldout.priors.get(example.id) for example in examples]
            inputs = [
                run.encoder.encode(example, row)
                for example, row in zip(examples, rows, strict=True)
            ]
            # The same prompts answered greedily and sampled; frame use is read on the latter.
            prompts = collate(inputs, model).to(engine.device)
            seeds = [run_seed(args, place) for place in places]
            for decoding, temperature in (("greedy", 0.0), ("sampled", args.temperature)):
                settings = replace(sampling_settings(args), temperature=temperature)
                tokens, mask, _, texts = sample_texts(
                    model, run.processor, prompts, [1] * len(examples), seeds, settings
                )
                log_answers(log, decoding, examples, texts)
            log.add("length", mask.sum(-1))
            mask = mask[:, None]  # (B, 1, T)
            scored = Policy(model)(prompts, tokens[:, None], mask, **asked_layers(args))
            uses, paper_uses = frame_uses(args, prompts, mask, scored)
            log_frame_use(log, ("consensus", "evidence_use"), examples, rows, uses)
            names = ("paper_consensus", "paper_evidence_use")
            log_frame_use(log, names, examples, rows, paper_uses)
            for example, row, use in zip(examples, rows, uses, strict=True):
                if example.evidence and use[0] is not None:
                    shares = slot_shares(row.times, example.evidence, len(use[0]))
                    log.add("evidence_chance", [float(shares.mean())])  # uniform use's mass
    return average(log.values, engine.device)


def log_answers(log, decoding, examples, texts):
    """Accuracy of answers to the held-out questions: all, by kind, and of conflicts."""
    for example, text in zip(examples, texts, strict=True):
        accuracy = accuracies(example, [text])
        log.add(decoding, accuracy)
        log.add(f"{decoding}/{kind(example)}", accuracy)
        if example.extra.get("salient_is_asked") is False:
            log.add(f"{decoding}/conflict", accuracy)


def kind(example):
    """A question's row in the table: the toy's own kind, elsewhere its problem type."""
    return example.extra.get("kind", example.problem_type)


def print_table(args, before, after, seconds):
    """The end of a run, for people; result.json holds the same numbers."""
    # Rows in the order in which a reader wants them: accuracy, its parts, where it looked.
    use = f"{args.frame_use}, layer {args.frame_use_layer}"
    lines = {"greedy": "held-out accuracy, greedy"}
    lines["greedy/conflict"] = "  asked and salient evidence differ"
    for name in sorted(after):
        if name.startswith("greedy/") and name not in lines:
            lines[name] = f"  {name.partition('/')[2]}"
    lines["sampled"] = "held-out accuracy, sampled"
    lines["sampled/conflict"] = "  asked and salient evidence differ"
    lines["consensus"] = f"consensus score ({use})"
    lines["evidence_use"] = f"frame use on the true evidence ({use})"
    lines["paper_consensus"] = "consensus score (the paper's)"
    lines["paper_evidence_use"] = "frame use on the true evidence (paper's)"
    lines["evidence_chance"] = "  chance (uniform use)"
    lines["length"] = "completion length, tokens"
    log_main(f"\n{'':52s}{'before GRPO':>12s}{'after':>10s}")
    for name, text in lines.items():
        if name in after:
            log_main(f"{text:52s}{before[name]:12.3f}{after[name]:10.3f}")
    log_main(
        "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()) + "\n"
    )


# ------------------------------------------------------------------------- questions and priors


def unearnable(example):
    """Cause why no answer to a question can earn anything, None if one can.

    Its own solution scores 0, such as "50%" as numerical or 0 as regression.
    """
    (accuracy,) = accuracies(example, [f"<answer>{example.answer}</answer>"])
    if accuracy > 0:
        return None
    return (
        f"its own solution {example.answer[:60]!r} scores 0 as {example.problem_type}, so no "
        "answer can earn it"
    )


def load_questions(args, path, scored=True):
    """Questions of a data set file, without priors yet; unusable rows are named and skipped.

    Args:
        scored: whether answers will be scored; then questions that no answer can earn are skipped.
    """
    errors = []
    questions = Questions([], path)
    examples = load_examples(path, args.media_root, errors)
    for error in errors:
        questions.skipped[error["problem_id"]] = error["cause"]
    for example in examples:
        cause = unearnable(example) if scored else None
        if cause:
            questions.skipped[example.id] = cause
        else:
            questions.examples.append(example)
    name_skipped(questions.skipped)
    return questions


def questions_per_step(args):
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return batch * dist.get_world_size()


def questions_wanted(args, count):
    """Questions that GRPO takes, with repeats, from a data set of `count`."""
    if args.max_steps > 0:
        return args.max_steps * questions_per_step(args)
    return int(args.num_train_epochs * count)


def question_stream(args, examples):
    """GRPO's questions in order, shuffled epoch by epoch."""
    wanted = questions_wanted(args, len(examples))
    return in_epochs(examples, wanted, args.seed)[:wanted]


def check_stream(args, questions):
    """Errors: DataError if too few questions are left for a step, or alignment has no reference."""
    per_step = questions_per_step(args)
    stream = questions.examples
    if len(stream) < per_step:
        raise DataError(
            f"{len(stream)} usable questions ({len(questions.skipped)} skipped) are fewer than one "
            f"step's {per_step}"
        )
    if args.alignment_weight and not any(example.grounding for example in stream):
        raise DataError(
            "--alignment_weight needs claims to compare with, and no question of "
            f"{questions.source} has the field grounding"
        )


def grpo_plan(args, count, stream, skipped):
    """Sentence about what GRPO will do; steps and questions that go missing are counted."""
    per_step = questions_per_step(args)
    planned = questions_wanted(args, count) // per_step
    steps = len(stream) // per_step
    left_over = len(stream) % per_step
    words = f"GRPO: {steps} step(s) "
    if steps < planned:
        words += f"instead of {planned} "
    words += f"of {per_step} question(s)"
    if skipped:
        words += f"; {len(skipped)} question(s) unusable"
    if left_over:
        words += f"; {left_over} left over, too few for a step"
    return words


def invert_share(stream, share, seed):
    """TW-GRPO's question-answer inversion of a share of the stream, in place.

    Returns:
        number of inverted questions, number of chosen ones that cannot be inverted.
    """
    inverted = 0
    unchanged = 0
    for place, example in enumerate(stream if share else []):
        rng = random.Random(f"{seed}-{place}")
        if rng.random() < share:
            new = invert_question(example, rng)
            if new is None:
                unchanged += 1
            else:
                inverted += 1
                stream[place] = new
    return inverted, unchanged


def priors_for(args, settings, questions, name, resume, file=None, shared=None):
    """Adds the priors of the questions, and to `skipped` those whose medium cannot be read.

    Args:
        settings: prior.PriorSettings.
        name: "training" or "held-out".
        resume: state of the checkpoint that this run continues, {} without one.
        file: a priors file that has all of them. Without one they are collected and computed into
            output/priors_NAME.jsonl (see collect_priors).
        shared: a priors file that may have some.
    """
    made = Path(args.output_dir) / f"priors_{name}.jsonl"
    asked = {e.id: e for e in questions.examples if e.id not in questions.skipped}
    asked = list(asked.values())  # each once: a stream repeats them

    def look_for_missing():
        return prior.check_missing(file, asked, settings, args.decode_workers, args.decode_timeout)

    def collect():
        return collect_priors(made, settings, asked, name, resume, shared)

    # Rank 0 reads and writes, the others are told; then every rank reads the file.
    errors = on_main_first(look_for_missing if file else collect)
    for error in errors:
        questions.skipped[error["problem_id"]] = error["cause"]
    skipped = questions.skipped
    name_skipped({e.id: skipped[e.id] for e in questions.examples if e.id in skipped})
    questions.examples = [e for e in questions.examples if e.id not in skipped]
    questions.priors = prior.load_priors(file or made, questions.examples, settings)


def collect_priors(made, settings, examples, name, resume, shared):
    """Writes the examples' priors to a file, each from the first of these sources that has it.

    1. that file, of the run that this run continues;
    2. `shared`, a priors file that may have some;
    3. the examples' own frame_sets, the release's field;
    4. that file, of a start that was refused;
    5. computed now.

    Returns:
        error lines of examples whose medium cannot be read.
    """
    # 1.
    old = list(prior.read_priors(made)) if made.is_file() else []
    done = prior.load_priors(made, examples, settings) if resume and old else {}
    left = [e for e in examples if e.media_type != "text" and e.id not in done]
    new = []

    # 2.
    if shared is not None:
        rows = prior.rows_for(shared, left)
        new += prior.load_priors(shared, [e for e in left if e.id in rows], settings).values()
        left = [e for e in left if e.id not in rows]

    # 3.
    rows, errors = prior.frame_set_rows([e for e in left if "frame_sets" in e.extra], settings)
    new += rows
    left = [e for e in left if "frame_sets" not in e.extra]

    # 4.
    if old and not resume:
        rows = prior.rows_for(made, left)
        for problem, row in list(rows.items()):
            if row.settings != prior.settings_of(settings):
                del rows[problem]
        new += rows.values()
        left = [e for e in left if e.id not in rows]

    # 5.
    if left:
        log_main(
            f"computing the priors of {len(left)} {name} questions (prior.py does this ahead, "
            "--priors or --eval_priors reuses it)"
        )
        videos = [e for e in left if e.media_type == "video"]
        clip = None
        # CLIP is loaded only if there is a video that can be read.
        if settings.has_semantic and prior.look_at(videos, settings)[1] is not None:
            device = deepspeed.get_accelerator().current_device_name()
            clip = prior.load_clip(settings.clip, settings.clip_pretrained, device)
        rows, more_errors = prior.build_priors(left, clip, settings)
        new += rows
        errors += more_errors
    write_lines(made, [*(old if resume else []), *new])
    with open(f"{made}.errors.jsonl", "ab" if resume else "wb", buffering=0) as file:
        append_lines(file, errors)
    return errors


# ----------------------------------------------------------------------------------------- a run


@dataclass
class Plan:
    """What a run reads, all of it known to be good before the first byte is written."""

    model_path: str | Path
    demonstrations: Questions | None  # of SFT, when it is to be run
    training: Questions | None  # of GRPO
    heldout: Questions
    steps: int = 0  # of the last stage
    without_prior: dict = field(default_factory=dict)  # {problem_id: cause} of GRPO's questions
    result: dict = field(default_factory=dict)  # beginning of result.json


class Laps:
    """Seconds of each stage of a run."""

    def __init__(self):
        self.seconds = {}
        self.begin = time.perf_counter()

    def end(self, name):
        now = time.perf_counter()
        self.seconds[name] = now - self.begin
        self.begin = now


def run(args, settings):
    """SFT, GRPO or both, with the held-out score before and after.

    Args:
        args: TrainArguments.
        settings: prior.PriorSettings.
    Errors: DataError, one sentence, for everything that a user can mend.
    """
    laps = Laps()
    output = Path(args.output_dir)
    check_deepspeed_file(args)
    resume = on_main_first(lambda: find_start(output, args))
    if resume is None:
        return
    set_seed(args.seed)
    plan, processor, encoder = read_inputs(args, settings, resume, laps)
    last_stage = "grpo" if plan.training else "sft"
    if resume.get("finished") and resume["stage"] == last_stage and resume["step"] >= plan.steps:
        log_main(
            f"{output} holds a finished run of {resume['step']} {last_stage} steps, this command "
            f"has {plan.steps}; nothing to do"
        )
        return
    if plan.heldout.examples:
        drop_unusable_heldout(args, encoder, plan.heldout, resume)

    # From here on the output folder is written.
    on_main_first(lambda: prepare_output(output, args, settings, resume))
    files = {}
    if is_main():
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            files[name] = open(output / name, "a", encoding="utf-8")
    checkpoint = Checkpoints(args, processor, files, resume)
    checkpoint.shared["heldout_skipped"] = plan.heldout.skipped
    checkpoint.shared["without_prior"] = plan.without_prior
    this = Run(args, processor, encoder, checkpoint, Tracker(args), files)

    # SFT, the score between the two, GRPO, the score after it.
    model_path = plan.model_path
    skipped = {}
    if args.stage in ("sft", "both"):
        if plan.demonstrations:
            model_path = train_sft(this, model_path, plan.demonstrations)
            skipped.update(plan.demonstrations.skipped)
        else:
            model_path = output / "sft"
        laps.end("SFT")
    if resume.get("stage") == "grpo":
        before = resume["before"]
    else:
        before = score_checkpoint(this, model_path, plan.heldout)
    checkpoint.shared["before"] = before
    laps.end("scoring before")
    after = before
    if plan.training:
        model_path = train_grpo(this, model_path, plan.training, plan.heldout)
        skipped.update(plan.training.skipped)
        laps.end("GRPO")
        after = score_checkpoint(this, model_path, plan.heldout)
        laps.end("scoring after")
    result = {**plan.result, "before": before, "after": after, "seconds": laps.seconds}
    finish_run(args, result, skipped, plan.heldout)


def read_inputs(args, settings, resume, laps):
    """Reads and checks everything that a run needs; says what will be trained.

    Returns:
        Plan, processor, Encoder.
    """
    # Your data, or the toy's, which is made on first use.
    data = args.dataset_name
    sft_data = data
    heldout_data = args.eval_dataset_name
    model_path = args.model_name_or_path
    if data is None:
        folder = Path(args.toy_dir)
        on_main_first(
            lambda: toy.make_toy(toy.ToyArguments(output_dir=str(folder), seed=args.seed))
        )
        sft_data = folder / "train_cot.json"
        data = folder / "train.json"
        heldout_data = heldout_data or folder / "heldout.json"
        model_path = model_path or folder / "model"
        laps.end("toy")
    if args.eval_priors and not heldout_data:
        raise DataError("--eval_priors without held-out questions; give --eval_dataset_name")
    # The checkpoint's own processor makes the model inputs.
    processor = load_processor(args, model_path)
    encoder = Encoder(
        processor,
        args.min_pixels,
        args.max_pixels,
        frames=settings.frames,
        template=read_template(args.prompt_template),
        cache_gb=args.media_cache_gb,
        frame_times=args.frame_times,
        system_prompt=args.system_prompt,
    )
    # Questions of every stage, before the slow part.
    heldout = Questions([])
    if heldout_data:
        heldout = load_questions(args, heldout_data)
    plan = Plan(model_path, None, None, heldout)
    plan.result = {"command": sys.argv, "seed": args.seed}
    if args.stage in ("sft", "both") and resume.get("stage") != "grpo":
        plan.demonstrations = load_demonstrations(args, sft_data)
        plan.steps, _ = sft_steps(args, len(plan.demonstrations.examples))
    count = 0
    if args.stage in ("grpo", "both"):
        plan.training = load_questions(args, data)
        count = len(plan.training.examples) + len(plan.training.skipped)
        plan.training.examples = question_stream(args, plan.training.examples)
        check_stream(args, plan.training)
    # Priors, the slow part where they are not given.
    if heldout_data:
        heldout.skipped.update(resume.get("heldout_skipped", {}))
        priors_for(args, settings, heldout, "held-out", resume, args.eval_priors, args.priors)
        laps.end("held-out priors")
    if plan.training:
        read_training_priors(args, settings, plan, resume, count)
        laps.end("training priors")
    return plan, processor, encoder


def load_demonstrations(args, data):
    """Rows of a data set file that have reasoning, for SFT."""
    demonstrations = load_questions(args, data, scored=False)
    rows = len(demonstrations.examples) + len(demonstrations.skipped)
    demonstrations.examples = [e for e in demonstrations.examples if e.reasoning]
    if not demonstrations.examples:
        raise DataError(f"{data} has no reasoning traces (field `process`) for --stage sft")
    steps, per_step = sft_steps(args, len(demonstrations.examples))
    log_main(
        f"SFT: {len(demonstrations.examples)} of {rows} rows have reasoning, {steps} step(s) of "
        f"{per_step}"
    )
    return demonstrations


def read_training_priors(args, settings, plan, resume, count):
    """Priors of GRPO's questions, inversion of a share of them, and what will be trained.

    Args:
        count: rows of the data set.
    """
    training = plan.training
    malformed = dict(training.skipped)
    training.skipped.update(resume.get("without_prior", {}))
    priors_for(args, settings, training, "training", resume, args.priors)
    for problem, cause in training.skipped.items():
        if problem not in malformed:
            plan.without_prior[problem] = cause
    inverted, unchanged = invert_share(training.examples, args.invert_questions, args.seed)
    plan.result["inverted"] = inverted
    plan.result["not_invertible"] = unchanged
    check_stream(args, training)
    if args.invert_questions and not inverted:
        raise DataError(
            f"--invert_questions: none of the chosen questions of {training.source} can be inverted"
        )
    if args.alignment_weight:
        claims = sum(bool(example.grounding) for example in training.examples)
        log_main(f"{claims} of {len(training.examples)} questions have timed claims (grounding)")
    if args.invert_questions:
        log_main(
            f"{inverted} questions are inverted; {unchanged} chosen ones cannot be and stay as "
            "they are"
        )
    plan.steps = len(training.examples) // questions_per_step(args)
    log_main(grpo_plan(args, count, training.examples, training.skipped))


def finish_run(args, result, skipped, heldout):
    """Writes result.json and the report, prints the table; counts what was skipped on all ranks."""
    output = Path(args.output_dir)
    # A rank knows only what it came across itself.
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, skipped)
    result["skipped"] = {}
    for causes in everyone:
        result["skipped"].update(causes)
    causes = Counter(plain_cause(cause) for cause in result["skipped"].values())
    result["skipped_by_cause"] = dict(causes.most_common())
    result["heldout_skipped"] = heldout.skipped
    for cause, count in causes.most_common():
        log_main(f"{count} skipped: {cause}")
    if heldout.examples:
        print_table(args, result["before"], result["after"], result["seconds"])
    if is_main():
        text = json.dumps(result, indent=1)
        (output / "result.json").write_text(text, encoding="utf-8")
        try:
            run_report([output], command=f"python visualize.py run {shlex.quote(str(output))}")
        except (DataError, OSError) as error:  # the run itself is whole
            log_main(f"no report.html: {error}")
    log_main(
        f"all of it is in {output}/: report.html, result.json, metrics.jsonl, rollouts.jsonl, "
        "checkpoints"
    )


def plain_cause(cause):
    """Why something was skipped, without its names, numbers and solutions, so that equal causes
    count together."""
    cause = re.sub(r"solution (['\"]).*\1", "solution ...", cause)
    if cause.startswith("row "):
        cause = re.sub(r"^row \d+ (\(problem_id .*?\))?:? ?", "", cause)
    else:
        cause = cause.partition(": ")[2] or cause
    cause = re.sub(r"\S*/\S*", "FILE", cause)
    return re.sub(r"\d[\d,.]*", "N", cause)


def find_start(output, args):
    """Finds where a run begins.

    Returns:
        state.json of the checkpoint to continue from, with its folder and whether that run is
        finished; {} at the beginning; None if there is nothing to do.
    Errors: DataError if the folder holds an earlier run, which is never overwritten, or cannot be
        written.
    """
    resume_from = args.resume_from_checkpoint
    finished = (output / "result.json").is_file()
    log = output / "metrics.jsonl"
    begun = log.is_file() and log.stat().st_size > 0
    if resume_from is None and (finished or begun or checkpoints(output)):
        raise DataError(
            f"{output} holds an earlier run; remove it, choose another --output_dir, or "
            "--resume_from_checkpoint auto"
        )
    # The first parent that exists must be a folder that can be written to.
    candidates = (output.resolve(), *output.resolve().parents)
    existing = next(folder for folder in candidates if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise DataError(
            f"--output_dir {output}: {existing} is no folder that this program can write to"
        )
    # A finished run goes on only if it was made longer.
    if finished and resume_from == "auto":
        settings = json.loads((output / "run.json").read_text(encoding="utf-8"))
        if all(settings.get(name) == getattr(args, name) for name in LENGTHS):
            log_main(f"{output} holds a finished run (result.json); nothing to do")
            return None
        if not checkpoints(output):
            raise DataError(
                f"{output} holds a finished run without checkpoints (--save_steps 0): there is "
                "none to go on from"
            )
    resume = find_checkpoint(args)
    return {**resume, "finished": finished} if resume else {}


def prepare_output(output, args, settings, resume):
    """Makes the output folder with run.json, its files as they were at the checkpoint (resume)."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "result.json").unlink(missing_ok=True)  # from here on the run is not finished
    # Checkpoints of after the one to continue from belong to a run that will not have been.
    names = [path.name for path in checkpoints(output)]
    later = []
    if resume:
        later = names[names.index(Path(resume["folder"]).name) + 1 :]
    for old in (*(output / name for name in later), *output.glob("*.unfinished")):
        log_main(f"removing {old}, of after the checkpoint that this run goes on from")
        shutil.rmtree(old)
    # The logs are cut to their length at the checkpoint.
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with open(output / name, "ab") as file:
            file.truncate(min(file.tell(), resume.get("sizes", {}).get(name, 0)))
    # Every setting, and what the numbers may depend on beside them.
    packages = ("torch", "transformers", "deepspeed", "open_clip_torch", "decord")
    facts = {
        **asdict(args),
        **asdict(settings),
        "command": sys.argv,
        "ranks": dist.get_world_size(),
        "revision": revision(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    (output / "run.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def revision():
    """git's name of this code; None without git, or outside of a repository."""
    if shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    git = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return git.stdout.strip() or None


def load_processor(args, model_path):
    """The checkpoint's processor.

    Errors: DataError if the checkpoint cannot be found or its family is unknown.
    """
    try:
        processor = AutoProcessor.from_pretrained(model_path)
        family = AutoConfig.from_pretrained(model_path).model_type
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())[:300]
        raise DataError(f"model {model_path} cannot be loaded: {words}") from error
    if family not in FAMILIES:
        raise DataError(f"{model_path} is a {family} checkpoint, not one of {', '.join(FAMILIES)}")
    if args.frame_use == "attention" and family not in PACKED_FAMILIES:
        families = ", ".join(PACKED_FAMILIES)
        raise DataError(f"--frame_use attention works with {families}, not with {family}")
    return processor


# ------------------------------------------------------------------------------------ command line


# Flags of the releases' launch scripts, and what to give here in their place.
FOREIGN_FLAGS = {
    "--len_control": "--length_bonus 0.2 turns it on, --length_bonus 0 off",
    "--model_name": "--model_name_or_path",
    "--bf16": '"bf16" in the DeepSpeed configuration, on by itself on a GPU',
    "--torch_dtype": '"bf16" in the DeepSpeed configuration',
    "--attn_implementation": "none, it is sdpa, with its flash kernel on a GPU",
    "--use_vllm": "none, it samples itself",
    "--vllm_device": "none, it samples itself",
    "--report_to": '"tensorboard" or "wandb" in the DeepSpeed configuration',
    "--logging_steps": "none, every step is in metrics.jsonl",
    "--run_name": '"wandb" in the DeepSpeed configuration',
    "--lr_scheduler_type": "none, see --warmup_ratio",
    "--save_only_model": "--save_steps 0 keeps the final model alone",
    "--frames_num": "--frames",
    "--nframes": "--frames",
    "--dataset_path": "--dataset_name",
    "--eval_strategy": "--eval_dataset_name",
    "--alpha": "--token_weight_alpha",
    "--epsilon": "--clip_low and --clip_high",
    "--epsilon_high": "--clip_high",
    "--per_device_eval_batch_size": "none, held-out questions come 32 at a time",
    "--data_seed": "--seed",
}
# GRPO's flags whose namesakes SFT reads.
SFT_FLAGS = {
    "learning_rate": "sft_learning_rate",
    "max_steps": "sft_max_steps",
    "num_train_epochs": "sft_num_train_epochs",
    "per_device_train_batch_size": "sft_per_device_batch_size",
    "gradient_accumulation_steps": "sft_gradient_accumulation_steps",
}


def flags_of(stage):
    """Names of the settings under the headings that begin with a stage, "SFT" or "GRPO"."""
    names = []
    heading = ""
    for setting in fields(TrainArguments):
        heading = setting.metadata.get("group", heading)
        if heading.startswith(stage):
            names.append(setting.name)
    return names


def refuse_unread_flags(stage, given):
    """Errors: DataError for a flag of the command line that this stage does not read."""
    of_sft = {ours: grpo for grpo, ours in SFT_FLAGS.items()}
    for name in given:
        if stage == "sft" and name in SFT_FLAGS:
            raise DataError(f"--stage sft does not read --{name}; its own is --{SFT_FLAGS[name]}")
        if stage == "sft" and name in flags_of("GRPO"):
            raise DataError(f"--stage sft does not read --{name}: it is GRPO's")
        if stage == "grpo" and name in of_sft:
            raise DataError(f"--stage grpo does not read --{name}; its own is --{of_sft[name]}")


def parse_arguments():
    """The command line over the recipe's defaults over the toy's over those of TrainArguments.

    Returns:
        TrainArguments, prior.PriorSettings.
    """
    parser = Parser(
        (TrainArguments, prior.PriorSettings),
        f"{__doc__}\nThe defaults are those for a checkpoint; --recipe changes some, and so does "
        "the toy. run.json has what a run used.",
    )
    # A first look: which defaults are right depends on the model, the data and the recipe.
    first, unknown = parser.parse_known_args()
    for word in unknown:
        name = word.partition("=")[0]
        if name in FOREIGN_FLAGS:
            raise DataError(f"{name} is a flag of the releases; here: {FOREIGN_FLAGS[name]}")
    if unknown:
        words = " ".join(unknown)
        raise DataError(f"unknown: {words} (python train.py --help lists the flags)")

    # Without data: the toy.
    recipe = dict(RECIPES[first.recipe])
    if first.dataset_name is None:
        if first.model_name_or_path is None and first.stage == "grpo":
            raise DataError(
                "--stage grpo without a model would train an untrained toy; give "
                "--model_name_or_path or leave --stage out"
            )
        folder = first.toy_dir or f"toy-seed{first.seed}"
        parser.set_defaults(**toy_defaults(folder, int(os.environ.get("WORLD_SIZE", 1))))
        for name in NOT_FOR_THE_TOY:
            recipe.pop(name, None)
    elif first.model_name_or_path is None:
        raise DataError(
            "--dataset_name needs --model_name_or_path (a Qwen2-VL, Qwen2.5-VL or Qwen3-VL "
            "checkpoint)"
        )
    elif first.stage == "both":
        raise DataError(
            "--stage both is for the toy; with your own data run --stage sft, then --stage grpo"
        )
    if first.priors is not None:
        recipe.pop("prior", None)  # the file's cues are there to be looked at
    parser.set_defaults(**recipe)
    args, settings = parser.parse_args_into_dataclasses()
    if args.stage is None:
        args.stage = "both" if args.model_name_or_path is None else "grpo"
    check_arguments(args)
    return args, settings


def check_arguments(args):
    """Errors: DataError for settings that do not go together."""
    if args.frame_use == "attention" and args.frame_use_layer < 1:
        raise DataError(
            "--frame_use attention needs --frame_use_layer 1 (the first layer) or higher"
        )
    if args.cuda_graph and not torch.cuda.is_available():
        raise DataError("--cuda_graph needs a GPU")
    if args.num_generations < 2 or args.save_total_limit < 1:
        raise DataError("--num_generations must be at least 2 and --save_total_limit at least 1")
    if args.freeze_vision and args.train_only_merger:
        raise DataError("--freeze_vision freezes the mergers too; give it or --train_only_merger")
    given = []
    for word in sys.argv[1:]:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            given.append(name.removeprefix("no_"))
    refuse_unread_flags(args.stage, given)


def main():
    hf_logging.set_verbosity_error()
    try:
        args, settings = parse_arguments()
        start_ranks()
        run(args, settings)
        dist.barrier()
        dist.destroy_process_group()
    except DataError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
