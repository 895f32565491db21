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

import fcntl
import importlib.metadata
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from argparse import Namespace
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from accelerate.utils import set_seed  # transformers' one imports peft
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.utils import logging as hf_logging

import prior
import toy
from common.card import write_cards
from common.checkpoints import LOGS, Checkpoints, checkpoints, find_checkpoint, save_model
from common.data import (
    DataError,
    differences,
    invert_question,
    load_examples,
    plain_ids,
    read_document,
    target_text,
)
from common.engine import (
    Tracker,
    check_deepspeed_file,
    end_engine,
    sampling,
    score_without_adapters,
    set_learning_rate,
    start_engine,
    update_averages,
    write_shards,
)
from common.flags import Parser, check_least, exit_codes, flag
from common.inputs import Inputs, Ready, run_seed
from common.lora import base_checkpoint, check_peft
from common.media import Encoder, RunFlags
from common.policy import Policy, Prompts, collate, load_processor, read_config
from common.progress import Progress
from common.ranks import (
    average,
    gather,
    is_main,
    lend,
    log_main,
    name_skipped,
    on_main_first,
    start_ranks,
    wait_for_all,
)
from common.rollout import (
    Sampling,
    answer_inputs,
    read_turn,
    sample_texts,
)
from common.run_page import run_report
from common.workers import start_server, to_line, write_json, write_lines, writing
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
)

# Accuracy and format alone; the prior only says which frames are shown.
PLAIN = dict(cfr_weight=0.0, temporal=False, length_bonus=0.0, prior="uniform")
# What the code of all releases sets.
RELEASED = dict(learning_rate=1e-6, top_k=50)
# What each recipe changes in the defaults below.
RECIPES = {
    "cfgrpo": {},
    "grpo": PLAIN,
    "tgrpo": dict(RELEASED, cfr_weight=0.0, prior="uniform"),
    "care": dict(PLAIN, **RELEASED, consistency_coef=0.5, ema_decay=0.995, beta=0.0),
    "tw": dict(
        PLAIN,
        **RELEASED,
        token_weight_alpha=1.7,
        reduction="token",
        clip_high=0.28,
        invert_questions=0.5,
        beta=0.0,
        top_p=1.0,
        freeze_vision=True,
        max_completion_length=4096,
        max_grad_norm=20.0,
    ),
    "video_r2": dict(
        PLAIN,
        **RELEASED,
        alignment_weight=1.0,
        temperature=0.9,
        top_p=1.0,
        freeze_vision=True,
        frames=32,
        fps=2.0,
        max_completion_length=1024,
        max_grad_norm=1.0,
    ),
    "release": dict(
        RELEASED,
        cfr_weight=5.0,
        gate="hard",
        frame_use="hidden",
        frame_use_layer=-1,
        tau=0.5,
        use_order="softmax_mean",
        temporal_ratio=0.8,
    ),
}


@dataclass
class TrainArguments(RunFlags, prior.PriorSettings):
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
        "Held-out questions, scored before and after GRPO, or once after --stage sft; never "
        "trained on. The toy brings its own.",
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
        "Priors file of the held-out questions; what it lacks is computed.",
    )
    toy_dir: str | None = flag(None, "Folder of the toy. Default: toy-seedN, made on first use.")
    max_pixels: int = flag(128 * 28 * 28, "Most pixels of a frame.")
    image_max_pixels: int | None = flag(512 * 28 * 28, "Most pixels of a picture (Video-R1's).")
    max_prompt_length: int = flag(
        16384, "Questions with more prompt tokens, visual ones included, are skipped."
    )

    max_completion_length: int = flag(
        768, "Most tokens of a completion.", group="Sampling of rollouts and held-out answers"
    )
    temperature: float = flag(1.0, "Sampling temperature.")
    top_p: float = flag(0.95, "Nucleus.")
    rollout_batch_size: int = flag(
        128,
        "Most completions sampled at a time, controls included; fewer where prompts are long. It "
        "changes the memory, not the samples.",
    )
    cuda_graph: bool = flag(
        torch.cuda.is_available(),
        "Sample in fixed shapes by one CUDA graph, captured once a rollout and replayed every "
        "token. Default: on with a GPU.",
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
    sft_questions_per_medium: int = flag(
        1,
        "Most demonstrations of one medium that follow each other; those of a forward share its "
        "tokens in one row.",
    )

    priors: str | None = flag(
        None,
        "Priors file made by prior.py for the training questions; what it lacks is computed.",
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
        "Groups of equal rewards: keep (their KL alone), drop (no KL either).",
        choices=["keep", "drop"],
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
    lora_rank: int = flag(
        0,
        "Train adapters of this rank (LoRA, pip install peft) beside frozen weights; the reference "
        "is the model without them. 0: train the weights.",
    )
    lora_alpha: float | None = flag(
        None, "The adapters' scale, times their rank. Default: the rank, as Video-R2."
    )
    lora_targets: str = flag(
        "",
        "Ends of the names of the layers that get adapters (q_proj,v_proj). Default: all linear "
        "ones that would be trained, but the head.",
    )
    gradient_checkpointing: bool = flag(
        False, "Recompute activations in the backward pass: less memory, a third more time."
    )
    deepspeed: str = flag(
        "ds_zero3.json", "DeepSpeed configuration; 'auto' values are filled from the flags."
    )

    output_dir: str = flag("output", "Folder for everything the run writes.", group="Run")
    save_steps: int = flag(100, "Steps between two checkpoints; 0: write the final model alone.")
    save_total_limit: int = flag(2, "Checkpoints to keep, 0: all; older ones are deleted.")
    resume_from_checkpoint: str | None = flag(
        None, "Folder of a checkpoint, or auto: the newest one in the output folder, if any."
    )


# Settings of a recipe that the toy does not take: sizes for billions of parameters, and the prior,
# which its frame use is compared with.
NOT_FOR_THE_TOY = "learning_rate max_grad_norm frames fps max_completion_length prior".split()


def toy_defaults(folder, world_size):
    """Defaults of the toy; any flag on the command line wins over them.

    Global batches are 16 with any number of ranks that divides it. Frame use comes from the
    attention of the first layer: on the toy's known evidence it was above chance on every
    checkpoint that was checked (evaluate.py --frame_use_check), while the paper's lies at chance;
    the paper's is computed and logged beside it. Beta is higher because at a learning rate that a
    1.0 M-parameter model needs to move in 50 steps, whatever no reward asks for drifts.
    """
    batch = max(1, 16 // world_size)
    return dict(
        dataset_name=f"{folder}/train.json",
        eval_dataset_name=f"{folder}/heldout.json",
        model_name_or_path=f"{folder}/model",
        toy_dir=folder,
        clip=f"local-dir:{folder}/clip",
        max_pixels=28 * 28,
        image_max_pixels=28 * 28,
        max_completion_length=64,
        length_bonus=0.0,
        frame_use="attention",
        frame_use_layer=1,
        sft_learning_rate=2e-3,
        sft_max_steps=400,
        sft_per_device_batch_size=batch,
        learning_rate=3e-4,
        beta=0.1,
        max_steps=50,
        per_device_train_batch_size=batch,
        max_grad_norm=1.0,
    )


# ------------------------------------------------------------------------- what the stages share


@dataclass
class Questions:
    """Examples of a stage or of the held-out set, with their priors."""

    # Those that can be used; of a stage in the order of training, with repeats.
    examples: list = field(default_factory=list)
    source: Path | None = None  # their file
    priors: dict = field(default_factory=dict)  # {problem_id: Prior}
    skipped: dict = field(default_factory=dict)  # {problem_id: cause} of those that cannot
    differences: dict = field(default_factory=dict)  # {what is not as the rows say: how often}

    def request(self, place):
        """The example at a place, to be decoded."""
        example = self.examples[place]
        return Ready(place, example, self.priors.get(example.id))

    def leave_out(self, causes):
        """Names unusable examples {problem_id: cause} and takes them out."""
        self.skipped.update(causes)
        name_skipped(self.skipped)
        self.examples = [e for e in self.examples if e.id not in self.skipped]


@dataclass
class Run:
    """What a run has read, and where it writes."""

    args: TrainArguments
    processor: object  # of the checkpoint that the run starts from
    encoder: Encoder
    heldout: Questions
    result: dict  # result.json so far; checkpoints keep it
    progress: Progress
    demonstrations: Questions = field(default_factory=Questions)  # of SFT, if it is to be run
    training: Questions = field(default_factory=Questions)  # of GRPO
    checkpoint: object = None  # Checkpoints
    tracker: object = None  # Tracker

    def write(self, name, records):
        """Appends records to a file of LOGS."""
        if is_main():
            path = Path(self.args.output_dir) / name
            with writing(path), open(path, "ab") as file:
                file.writelines(map(to_line, records))


@dataclass
class Schedule:
    """How a stage goes through its examples."""

    max_steps: int  # -1: `epochs` decides
    epochs: float
    batch: int  # examples per rank and forward
    accumulation: int  # forwards per step
    learning_rate: float  # its peak

    @property
    def per_step(self):
        return self.batch * self.accumulation * dist.get_world_size()

    def order(self, examples, seed, together=1):
        """The examples in the order of training, shuffled anew in every epoch.

        A longer run begins with the examples of a shorter one.

        Args:
            together: how many of the next examples of a medium follow one at once.
        """
        count = int(self.epochs * len(examples))
        if self.max_steps > 0:
            count = self.max_steps * self.per_step
        # All of it is drawn at once, so that a resumed run finds its place by the step alone.
        rng = random.Random(seed)
        order = []
        while examples and len(order) < count:
            bundles = defaultdict(list)
            drawn = Counter()  # of each medium; a text is one by itself
            for example in rng.sample(examples, len(examples)):
                media = tuple(example.media) or id(example)
                bundles[media, drawn[media] // together].append(example)
                drawn[media] += 1
            order += chain.from_iterable(bundles.values())
        return order[:count]

    def steps(self, questions):
        """Number of steps. Errors: DataError if the examples are too few for one."""
        usable = len(questions.examples)
        if usable < self.per_step:
            raise DataError(
                f"{usable} usable questions of {questions.source} ({len(questions.skipped)} "
                f"skipped) are fewer than one step's {self.per_step}"
            )
        return usable // self.per_step


# Flags of each stage, in the order of Schedule.
SCHEDULES = {
    "sft": (
        "sft_max_steps",
        "sft_num_train_epochs",
        "sft_per_device_batch_size",
        "sft_gradient_accumulation_steps",
        "sft_learning_rate",
    ),
    "grpo": (
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
    ),
}


def schedule(args, stage):
    """The Schedule of "sft" or "grpo"."""
    return Schedule(*[getattr(args, name) for name in SCHEDULES[stage]])


class StepLog:
    """Values of one step by metric; the record of the step has their means over all ranks."""

    def __init__(self, stage, step):
        self.stage = stage
        self.step = step
        self.values = defaultdict(list)
        self.begin = now()

    def add(self, name, values):
        """Adds a list or tensor of values to a metric."""
        # One transfer from the device for the whole tensor.
        if torch.is_tensor(values):
            values = values.flatten().tolist()
        self.values[name] += values

    @contextmanager
    def seconds(self, name):
        """Adds the seconds of a block to time/NAME."""
        begin = now()
        yield
        key = f"time/{name}"
        self.values[key] = [sum(self.values[key]) + now() - begin]


def now():
    """Seconds of a clock that waits until the device has done what it was given."""
    deepspeed.get_accelerator().synchronize()
    return time.perf_counter()


# Mean over a step's completions from which on sampling and scoring seem to be different models.
# bfloat16 logits between 16 and 32 are 0.125 apart, so that rounding alone gives up to 0.05.
LOGP_DIFFERENCE = 0.1


# Metrics on the progress bar.
SHOWN = ("loss/sft", "reward/total", "reward/accuracy", "consensus/score", "data/skipped")


def check_finite(run, log, examples, value, what):
    """Ends the run if a number is nan or infinite, before it reaches a checkpoint.

    Errors: DataError with the step, the rank and the questions.
    """
    if not math.isfinite(value):
        names = ", ".join(dict.fromkeys(example.id for example in examples))
        raise DataError(
            f"the {what} is {value} in step {log.step} of {log.stage} (rank {dist.get_rank()}, "
            f"questions {names}); {run.checkpoint.newest_checkpoint_text()}"
        )


def step_requests(run, name, questions, step):
    """This rank's examples of a step, list of Ready in the order of its forwards."""
    plan = schedule(run.args, name)
    requests = []
    for micro in range(plan.accumulation):
        # Ranks take turns, so that the order does not depend on their number.
        number = step * plan.accumulation + micro
        first = (number * dist.get_world_size() + dist.get_rank()) * plan.batch
        for place in range(first, first + plan.batch):
            one = questions.request(place)
            if name == "grpo" and run.args.temporal and one.example.video:
                # The control's order of frames depends on the question's place alone.
                frames = range(len(one.prior.frames))
                one.order = random.Random(run_seed(run.args, place)).sample(frames, len(frames))
            requests.append(one)
    return requests


def take_usable(inputs, requests, args, skipped):
    """Inputs.take() on all ranks at the same time: those that have their inputs.

    Args:
        skipped: {problem_id: cause}, gets what all ranks cannot use, which is logged.
    """
    found, broken = inputs.take(requests, args.max_prompt_length)
    for causes in gather(broken):
        skipped.update(causes)
        name_skipped(causes)
    return found


def stage_steps(run, name, engine, questions, done, kept):
    """Goes through the steps of a stage that are left; logs and saves each when its turn is over.

    Args:
        name: "sft" or "grpo".
        questions: Questions in the order of training.
        done, kept: of Checkpoints.load.
    Yields:
        StepLog; the step's forwards on this rank, a list of Ready each.
    Errors: DataError if no question could be used.
    """
    args = run.args
    plan = schedule(args, name)
    steps = plan.steps(questions)
    inputs = Inputs(run.encoder, args.decode_workers, args.decode_timeout)
    # What the interrupted run could not use; a checkpoint keeps the same dictionary.
    questions.skipped.update(kept.get("skipped", {}))
    kept["skipped"] = questions.skipped

    # Workers decode the next step while this one trains.
    left = (step_requests(run, name, questions, step) for step in range(done, steps))
    decoded = inputs.each(left)
    bar = tqdm(decoded, name.upper(), steps, initial=done, disable=not is_main())
    for step, requests in enumerate(bar, done):
        log = StepLog(name, step)
        forwards = []
        for first in range(0, len(requests), plan.batch):
            part = requests[first : first + plan.batch]
            with log.seconds("media"):
                usable = take_usable(inputs, part, args, questions.skipped)
            # Collectives must match: a rank without a question borrows one.
            counts = gather(len(usable))
            if 0 in counts and any(counts):
                lent = lend(usable[:1], counts.index(max(counts)))
                usable = usable or [replace(lent[0], spare=True)]
            if usable:
                forwards.append(usable)
                kept["trained"] = True
        set_learning_rate(engine, step, steps, plan.learning_rate, args.warmup_ratio)
        yield log, forwards
        # The caller has trained: a line of metrics.jsonl, the bar, a checkpoint if it is time to.
        log.add("time/step", [now() - log.begin])
        log.add("train/learning_rate", engine.get_lr()[:1])
        log.add("data/skipped", [len(questions.skipped)])
        record = {"stage": name, "step": step, **average(log.values)}
        run.write("metrics.jsonl", [record])
        run.tracker.show(record)
        difference = record.get("rollout/logp_difference", 0)
        if difference > LOGP_DIFFERENCE:
            log_main(
                f"step {step}: rollout/logp_difference is {difference:.2f}, rounding gives less "
                f"than {LOGP_DIFFERENCE}: sampling and scoring compute different models"
            )
        shown = {metric: record[metric] for metric in SHOWN if metric in record}
        bar.set_postfix(shown, refresh=False)
        run.checkpoint.after_step(engine, name, step + 1, steps, kept)
    # Otherwise the starting model would be saved as trained.
    if not kept.get("trained", done > 0):
        cause = next(iter(questions.skipped.values()))
        raise DataError(f"no question of {questions.source} can be used; the first: {cause}")


def finish_stage(run, name, engine, when=None):
    """Saves the model of a stage and scores it, by the engine that has it: another would not fit.

    Args:
        when: "before" or "after" GRPO, the score's place in run.result; None: no score.
    """
    run.checkpoint.release()
    save_model(engine, run.processor, Path(run.args.output_dir) / name)
    if when:
        score(run, engine, when)
    end_engine(engine)


# ------------------------------------------------------------------------------------------- SFT


@dataclass
class Demonstrations:
    """One forward's demonstrations, R rows [medium | question, answer | question, answer | ...]."""

    prompts: Prompts  # the R media
    completions: torch.Tensor  # (R, G, T) questions and answers, at most G of a medium
    mask: torch.Tensor  # (R, G, T) bool, False on padding
    learned: torch.Tensor  # (R, G, T) bool, True on answers


def answer_ids(example, processor):
    """Token ids (T,) that SFT learns for a demonstration, the end of the turn included.

    What the chat template has already put in the assistant's place is left out.
    """
    turn = read_turn(processor)
    text = target_text(example).removeprefix(turn.opening.strip())
    return torch.tensor([*plain_ids(processor.tokenizer, text), turn.end])


def pack_demonstrations(ready, processor, model, together):
    """Neighbouring demonstrations of one medium share its tokens in a row.

    Args:
        ready: list of Ready.
        together: most demonstrations of a row. Neighbours by chance stay apart at 1: one row of two
            would leave a place empty in every other row.
    Returns:
        Demonstrations.
    """
    rows = []
    for one in ready:
        shown = one.example.media
        full = not rows or len(rows[-1]) == together
        if full or not shown or rows[-1][0].example.media != shown:
            rows.append([])
        rows[-1].append(one)
    group = max(len(row) for row in rows)

    # Behind the medium: a question with the header of the answer, and the answer.
    media = []
    branches = []
    kinds = []  # 0 on a question, 1 on an answer
    for row in rows:
        inputs = row[0].inputs
        media.append(replace(inputs, input_ids=inputs.input_ids[: inputs.shared]))
        for one in row:
            question = one.inputs.input_ids[one.inputs.shared :]
            answer = answer_ids(one.example, processor)
            branches.append(torch.cat([question, answer]))
            kinds.append(torch.cat([torch.zeros_like(question), torch.ones_like(answer)]))
        # Rows of fewer demonstrations end in empty ones.
        empty = [answer[:0]] * (group - len(row))
        branches += empty
        kinds += empty

    def stack(parts, padding):
        padded = pad_sequence(parts, True, padding)  # (R * G, T)
        return padded.unflatten(0, (len(rows), group)).to(model.device)

    kinds = stack(kinds, -1)  # (R, G, T)
    prompts = collate(media, model).to(model.device)
    learned = (kinds > 0) & (not ready[0].spare)
    return Demonstrations(prompts, stack(branches, 0), kinds >= 0, learned)


def train_sft(run):
    """Cold start: reasoning and answer as target, prompt masked, mean over all ranks' tokens."""
    args = run.args
    engine = start_engine(
        args,
        args.model_name_or_path,
        args.sft_per_device_batch_size,
        args.sft_gradient_accumulation_steps,
        args.sft_learning_rate,
    )
    resumed = run.checkpoint.load(engine, "sft")
    for log, forwards in stage_steps(run, "sft", engine, run.demonstrations, *resumed):
        if forwards:
            sft_step(run, engine, forwards, log)
    # GRPO's own engine scores the model that it starts from.
    finish_stage(run, "sft", engine, "before" if args.stage == "sft" else None)


def sft_step(run, engine, forwards, log):
    """One optimizer step of SFT: the mean over the tokens of all its forwards and ranks."""
    world = dist.get_world_size()
    # The tokens of the whole step on all ranks: every token weighs the same, however it is split.
    model = engine.module.model
    together = run.args.sft_questions_per_medium
    packs = [pack_demonstrations(ready, run.processor, model, together) for ready in forwards]
    tokens = sum(pack.learned.sum() for pack in packs)
    dist.all_reduce(tokens)

    # One forward and backward each; the optimizer steps at the last.
    total = 0.0
    for number, (ready, pack) in enumerate(zip(forwards, packs, strict=True)):
        engine.set_gradient_accumulation_boundary(number == len(forwards) - 1)
        logp = engine(pack.prompts, pack.completions, pack.mask).logp  # (R, G, T)
        loss = -(logp * pack.learned).sum() / tokens
        total += loss.item()
        check_finite(run, log, [one.example for one in ready], total, "loss")
        # DeepSpeed averages over ranks and forwards; the loss is their sum.
        engine.backward(loss * world * run.args.sft_gradient_accumulation_steps)
        engine.step()
    log.add("loss/sft", [total * world])
    check_norm(run, engine, log, [one.example for one in chain.from_iterable(forwards)])


def check_norm(run, engine, log, examples):
    """Logs the norm of the step's gradient before clipping; ends the run if it is not finite."""
    norm = engine.get_global_grad_norm()
    # ZeRO stage 0 knows none in float32: the weights that it has updated tell.
    if norm is None:
        trained = filter(lambda weight: weight.requires_grad, engine.parameters())
        norm = sum(weight.detach().abs().max() for weight in trained)
    else:
        log.values["loss/grad_norm"] = [float(norm)]
    check_finite(run, log, examples, float(norm), "norm of the gradient")


# ------------------------------------------------------------------------------------------ GRPO


# Most prompt tokens, padding included, of the questions that are sampled from at a time: with their
# controls 2 GB of a 7B model's KV cache, and twice as much in its vision tower.
PROMPT_TOKENS = 1 << 14


def fitting(args, forwards, each):
    """Yields the forwards in parts that can be sampled at once: decoding reads the weights once for
    a whole part.

    Args:
        forwards: lists of Ready.
        each: completions of a question.
    """
    part = []
    lengths = []
    for ready in forwards:
        own = [len(one.inputs.input_ids) for one in ready]
        count = len(lengths) + len(own)
        tokens = count * max(lengths + own)
        if part and (count * each > args.rollout_batch_size or tokens > PROMPT_TOKENS):
            yield part
            part = []
            lengths = []
        part.append(ready)
        lengths += own
    yield part


def sample(run, model, forwards):
    """Samples rollouts in one batch with their controls.

    G completions of every question and, with --temporal, G/2 of every video's with its frames
    shuffled.

    Args:
        model: the bare model of sampling().
        forwards: lists of Ready.
    Returns:
        Rollouts of each forward.
    """
    args = run.args
    group = args.num_generations
    half = max(1, group // 2)
    ready = list(chain.from_iterable(forwards))
    shuffled = [one for one in ready if one.control is not None]

    # A row's random numbers depend on its place in the run alone, not on its neighbours or rank.
    counts = [group] * len(ready) + [half] * len(shuffled)
    seeds = []
    for one, count in zip(ready + shuffled, counts, strict=True):
        first = run_seed(args, one.place) * 1_009
        seeds += range(first, first + count)

    # One batch for rollouts and controls: the weights are read once for both.
    device = model.get_input_embeddings().weight.device
    inputs = [one.inputs for one in ready] + [one.control for one in shuffled]
    prompts = collate(inputs, model).to(device)
    if args.freeze_vision:
        # A frozen tower gives the same features in sampling, reference and policy: run it once.
        with torch.no_grad():
            prompts.features = Policy(model).encode(prompts)
    samples = sample_texts(
        model, run.processor, prompts, counts, seeds, sampling_settings(args, args.temperature)
    )

    # Behind the questions' texts come the controls', half a group each.
    left = iter(samples.texts)
    texts = [list(islice(left, group)) for _ in ready]
    control_texts = {one.place: list(islice(left, half)) for one in shuffled}
    visual = [0, *prompts.visual.sum(1).cumsum(0).tolist()]  # visual tokens before each question
    rollouts = []
    begin = 0
    for part in forwards:
        end = begin + len(part)
        rows = slice(begin * group, end * group)
        # Cut to the longest completion of the forward.
        longest = int(samples.mask[rows].sum(-1).max())
        shape = (len(part), group, longest)
        own_prompts = collate([one.inputs for one in part], model).to(device)
        if args.freeze_vision:
            shown = slice(visual[begin], visual[end])
            own_prompts.features = [feature[shown] for feature in prompts.features]
        rollouts.append(
            Rollouts(
                examples=[one.example for one in part],
                priors=[one.prior for one in part],
                prompts=own_prompts,
                completions=samples.tokens[rows, :longest].reshape(shape),
                mask=samples.mask[rows, :longest].reshape(shape),
                truncated=~samples.ended[rows].view(shape[:2]),
                logp=samples.logp[rows, :longest].reshape(shape),
                texts=texts[begin:end],
                control_texts=[control_texts.get(one.place) for one in part],
                spare=part[0].spare,
            )
        )
        begin = end
    return rollouts


def sampling_settings(args, temperature):
    """How the run samples, at a temperature."""
    length = args.max_completion_length
    return Sampling(length, temperature, args.top_p, args.top_k, args.cuda_graph)


def asked_layers(args):
    """Arguments of the policy's forward that make it return what frame_uses() reads."""
    if args.frame_use == "attention":
        return {"hidden_layers": (-1,), "attention_layer": args.frame_use_layer}
    return {"hidden_layers": tuple({-1, args.frame_use_layer})}


def frame_uses(args, prompts, mask, scored):
    """Frame use (rollout_frame_use) by the run's settings, and the paper's (Eq. 3-5) for the log.

    Returns:
        {"": the run's, "paper_": the paper's}; the keys are prefixes of metrics.
    """
    # Without states it is read from the attention.
    states = scored.hidden.get(args.frame_use_layer)
    settings = (args.tau, args.use_order, args.pool)
    return {
        "": rollout_frame_use(prompts, mask, states, scored.attention, *settings),
        "paper_": rollout_frame_use(prompts, mask, scored.hidden[-1]),
    }


def weigh_forwards(args, step_rollouts):
    """Sets each forward's learned tokens and the share of its loss in the step's.

    A step's gradient is the same however it is split into forwards and ranks: a forward's loss is
    a mean over its completions (sequence, constant) or its tokens (token), so it counts as many as
    it has of those on all ranks; DeepSpeed then divides by the ranks and by the forwards of a
    step. "constant" (Dr. GRPO) divides by --max_completion_length, not by the longest completion
    at hand.
    """
    for rollouts in step_rollouts:
        rollouts.learned = rollouts.mask
        if args.mask_truncated_completions:
            rollouts.learned = rollouts.mask & ~rollouts.truncated[..., None]
        rollouts.share = rollouts.truncated.numel()
        if args.reduction == "token":
            rollouts.share = rollouts.learned.sum().item()
        if rollouts.spare:
            rollouts.share = 0
    total = sum(gather(sum(rollouts.share for rollouts in step_rollouts)))
    splits = dist.get_world_size() * args.gradient_accumulation_steps
    for rollouts in step_rollouts:
        if args.reduction == "constant":
            rollouts.share *= rollouts.mask.shape[2] / args.max_completion_length
        rollouts.share = rollouts.share * splits / max(total, 1)


def grpo_step(run, engine, reference, forwards, log):
    """One step of CF-GRPO (Eq. 3-10): sample, score, reward, learn.

    Args:
        reference: engine of the reference model, or what scores like it; None without one.
        forwards: lists of Ready.
        log: StepLog.
    """
    args = run.args

    # 1. Sample. The whole step before anything is learned: one gathering of the parameters.
    with log.seconds("rollout"), sampling(engine) as model:
        step_rollouts = []
        for part in fitting(args, forwards, args.num_generations * 3 // 2):
            step_rollouts += sample(run, model, part)
    weigh_forwards(args, step_rollouts)

    for _ in range(args.num_iterations):
        for number, rollouts in enumerate(step_rollouts, 1):
            engine.set_gradient_accumulation_boundary(number == len(step_rollouts))
            learn(run, engine, reference, rollouts, log)
            with log.seconds("update"):
                engine.step()
        examples = chain.from_iterable(rollouts.examples for rollouts in step_rollouts)
        check_norm(run, engine, log, examples)


def learn(run, engine, reference, rollouts, log):
    """Score, reward and learn from one forward's rollouts; from the second time on learn alone."""
    args = run.args
    first_time = rollouts.advantages is None
    packed = (rollouts.prompts, rollouts.completions, rollouts.mask)
    # What the forward returns beside log-probabilities and entropy.
    asked = asked_layers(args) if first_time else {}
    if args.token_weight_alpha != 1:
        asked["weight_alpha"] = args.token_weight_alpha
    if first_time:
        with log.seconds("reference"), torch.no_grad():
            if reference is not None:
                rollouts.reference_logp = reference(*packed).logp
    with log.seconds("policy"):
        # 2. Score: one packed forward gives log-probabilities and what frame use is read from.
        scored = engine(*packed, **asked)
        # 3. Reward (Eq. 3-8), advantages (Eq. 9).
        if first_time:
            reward_rollouts(run, rollouts, scored, log)
        # 4. Learn (Eq. 10).
        loss = rollouts_loss(run, rollouts, scored, log)
        engine.backward(loss * rollouts.share)


def reward_rollouts(run, rollouts, scored, log):
    """Rewards and advantages of one forward's rollouts, logged (Eq. 3-9)."""
    args = run.args
    logp = scored.logp.detach()  # (B, G, T)
    summed = logp[rollouts.mask].sum().item()
    check_finite(run, log, rollouts.examples, summed, "policy's log-probability")
    uses = frame_uses(args, rollouts.prompts, rollouts.mask, scored)
    terms = rewards(rollouts, uses[""], run.processor.tokenizer, args)

    # Eq. 9, in float32 on the device as the loss.
    total = terms["total"].float().to(logp.device)  # (B, G)
    rollouts.rewards = terms
    rollouts.advantages = group_advantages(total, scale=args.scale_rewards)
    # The policy has not moved since it sampled, so its own forward gives the old log-probabilities.
    rollouts.old_logp = logp
    degenerate = all_equal(total)  # (B,)
    rollouts.dropped = degenerate & (args.degenerate == "drop")  # (B,)
    if rollouts.spare:
        return

    # Metrics are named after the terms: a new term needs no second list.
    for name, values in terms.items():
        log.add(f"reward/{name}", values)
    names = ("consensus/{}score", "consensus/{}evidence_use")
    log_frame_use(log, *names, rollouts.examples, rollouts.priors, uses)
    for example, texts in zip(rollouts.examples, rollouts.control_texts, strict=True):
        if texts:
            log.add("rollout/shuffled_accuracy", accuracies(example, texts))
    log.add("loss/zero_variance_groups", degenerate)
    log.add("rollout/length", rollouts.lengths)
    log.add("rollout/truncated", rollouts.truncated)
    log.add("rollout/entropy", per_token(scored.entropy, rollouts))
    log.add("rollout/logp_difference", per_token((rollouts.logp - logp).abs(), rollouts))
    run.write("rollouts.jsonl", rollout_lines(rollouts, uses[""], log.step))


def per_token(values, rollouts):
    """(B, G, T) -> (B, G), mean over each completion's tokens."""
    return (values * rollouts.mask).sum(-1) / rollouts.lengths


def log_frame_use(log, score, evidence, examples, rows, uses):
    """Logs the consensus (Eq. 6) and the mass on known evidence of every rollout's frame use.

    Args:
        score, evidence: metrics of the two, with {} for the prefix.
        uses: of frame_uses.
    """
    for prefix, own in uses.items():
        for example, row, use in zip(examples, rows, own, strict=True):
            if use[0] is None:
                continue
            log.add(score.format(prefix), overlaps(row, use))
            if example.evidence:
                # The data set knows where the answer is: how much of the looking was there?
                log.add(evidence.format(prefix), evidence_shares(example, row, use))


def rollouts_loss(run, rollouts, scored, log):
    """Eq. 10 of one forward: a scalar, logged."""
    args = run.args
    # --degenerate drop: groups without a signal weigh 0, their KL too.
    weights = scored.weights
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
    check_finite(run, log, rollouts.examples, loss.item(), "loss")
    # Counted once a question, so that the means over forwards of different sizes are right.
    count = 0 if rollouts.spare else len(rollouts.examples)
    for name, value in {**stats, "policy": loss.item()}.items():
        log.add(f"loss/{name}", [value] * count)
    return loss


def rollout_lines(rollouts, uses, step):
    """Yields the lines of rollouts.jsonl: a rollout's text, rewards, prior and frame use."""
    for b, example in enumerate(rollouts.examples):
        for g, text in enumerate(rollouts.texts[b]):
            use = uses[b][g]
            yield {
                "step": step,
                "problem_id": example.id,
                "question": example.question,
                "options": example.options,
                "text": text,
                "answer": example.answer,
                "truncated": rollouts.truncated[b, g].item(),
                "rewards": {name: values[b, g].item() for name, values in rollouts.rewards.items()},
                "prior": None if use is None else rollouts.priors[b].prior,
                "use": None if use is None else [round(value, 4) for value in use.tolist()],
            }


def train_grpo(run, model_path):
    """CF-GRPO with the starting checkpoint as reference."""
    args = run.args
    engine = start_engine(
        args,
        model_path,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.learning_rate,
    )
    if "before" not in run.result:
        score(run, engine, "before")
    run.progress.start("GRPO")
    # The reference is loaded only if a term asks it.
    reference = None
    asked = args.beta > 0 or args.consistency_coef
    if asked and not args.lora_rank:
        reference = start_engine(args, model_path)
    done, kept = run.checkpoint.load(engine, "grpo")
    averages = kept.setdefault("averages", {})  # of what is trained, with --ema_decay
    moves = asked and args.ema_decay < 1
    if moves and not averages:
        update_averages(averages, engine, args.ema_decay)
    if reference is not None:
        write_shards(reference, averages)
    if asked and args.lora_rank:
        # The policy has the reference within: no second model.
        reference = partial(score_without_adapters, engine, averages)

    for log, forwards in stage_steps(run, "grpo", engine, run.training, done, kept):
        done = log.step + 1
        if forwards:
            grpo_step(run, engine, reference, forwards, log)
        if moves and done % args.ema_steps == 0:
            update_averages(averages, engine, args.ema_decay)
            if not args.lora_rank:
                write_shards(reference, averages)
        if run.heldout.examples and args.eval_steps and done % args.eval_steps == 0:
            for name, value in score_heldout(run, engine).items():
                log.add(f"eval/{name}", [value])
    finish_stage(run, "grpo", engine, "after")


# --------------------------------------------------------------------------------- held-out score


def score(run, engine, when):
    """Puts score_heldout "before" or "after" GRPO into run.result; {} without questions."""
    run.progress.start(f"score {when} GRPO")
    run.result[when] = score_heldout(run, engine) if run.heldout.examples else {}


HELDOUT_BATCH = 50  # questions decoded at a time on each rank, no more than --rollout_batch_size


def score_heldout(run, engine):
    """Scores answers to questions that are never trained on, every rank its share.

    The first scoring leaves out questions with a broken medium or too long a prompt, so that all
    scorings are of the same questions.

    Returns:
        {name: mean over all ranks}.
    Errors: DataError if a question that was scored before can no longer be.
    """
    args = run.args
    heldout = run.heldout
    log = StepLog("heldout", 0)
    inputs = Inputs(run.encoder, args.decode_workers, args.decode_timeout)
    unusable = {}
    world = dist.get_world_size()
    count = len(heldout.examples)
    places = range(dist.get_rank(), count, world)  # of this rank
    batch = min(HELDOUT_BATCH, args.rollout_batch_size)
    starts = range(0, math.ceil(count / world), batch)  # the same on all ranks
    # Made at their turn, since they keep what is decoded.
    requests = (list(map(heldout.request, places[start : start + batch])) for start in starts)
    decoded = inputs.each(requests)
    with sampling(engine) as model:
        for mine in tqdm(decoded, "held-out", len(starts), disable=not is_main(), leave=False):
            ready = take_usable(inputs, mine, args, unusable)
            if ready:
                score_answers(run, model, ready, log)
    if unusable and "before" in run.result:
        raise DataError(
            f"{len(unusable)} held-out question(s) scored before GRPO can no longer be; the "
            f"first: {next(iter(unusable.values()))}"
        )
    heldout.leave_out(unusable)
    log_main(f"held-out: {len(heldout.examples)} question(s); unusable: {len(heldout.skipped)}")
    return average(log.values)


def score_answers(run, model, ready, log):
    """Logs greedy and sampled answers to a batch of held-out questions.

    Frame use is read on the sampled answers. "conflict" are the questions whose asked and most
    salient evidence differ.
    """
    args = run.args
    inputs = [one.inputs for one in ready]
    seeds = [run_seed(args, one.place) for one in ready]
    # The same prompts answered greedily and sampled; frame use is read on the latter.
    kinds = (("greedy", 0.0, {}), ("sampled", args.temperature, asked_layers(args)))
    for decoding, temperature, layers in kinds:
        settings = sampling_settings(args, temperature)
        for answers in answer_inputs(model, run.processor, inputs, seeds, settings, **layers):
            asked = [ready[place] for place in answers.places]
            for one, text in zip(asked, answers.samples.texts, strict=True):
                example = one.example
                accuracy = accuracies(example, [text])
                # The toy's own kind, elsewhere the problem type.
                kind = example.extra.get("kind", example.problem_type)
                log.add(decoding, accuracy)
                log.add(f"{decoding}/{kind}", accuracy)
                if example.extra.get("salient_is_asked") is False:
                    log.add(f"{decoding}/conflict", accuracy)
            if not layers:
                continue
            # Length and frame use of the sampled ones.
            mask = answers.samples.mask
            log.add("length", mask.sum(-1))
            uses = frame_uses(args, answers.prompts, mask[:, None], answers.scored)
            examples = [one.example for one in asked]
            rows = [one.prior for one in asked]
            log_frame_use(log, "{}consensus", "{}evidence_use", examples, rows, uses)
            for example, row, use in zip(examples, rows, uses[""], strict=True):
                if example.evidence and use[0] is not None:
                    shares = slot_shares(row.times, example.evidence, len(use[0]))
                    log.add("evidence_chance", [float(shares.mean())])  # uniform use's mass


def print_table(args, result):
    """The end of a run, for people; result.json holds the same numbers."""
    # Rows in the order in which a reader wants them: accuracy, its parts, where it looked.
    use = f"{args.frame_use}, layer {args.frame_use_layer}"
    kinds = result["after"].keys() - {"greedy/conflict"}
    lines = {
        "greedy": "held-out accuracy, greedy",
        "greedy/conflict": "  asked and salient evidence differ",
        # The kinds of questions, without "greedy/".
        **{name: f"  {name[7:]}" for name in sorted(kinds) if "greedy/" in name},
        "sampled": "held-out accuracy, sampled",
        "sampled/conflict": "  asked and salient evidence differ",
        "consensus": f"consensus score ({use})",
        "evidence_use": f"frame use on the true evidence ({use})",
        "paper_consensus": "consensus score (the paper's)",
        "paper_evidence_use": "frame use on the true evidence (paper's)",
        "evidence_chance": "  chance (uniform use)",
        "length": "completion length, tokens",
    }
    log_main(f"\n{'':52s}{'before GRPO':>12s}{'after':>10s}")
    for name, text in lines.items():
        if name in result["after"]:
            log_main(f"{text:52s}{result['before'][name]:12.3f}{result['after'][name]:10.3f}")


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
    examples = load_examples(path, args.media_root, errors)
    questions = Questions(examples, path, differences=differences(examples))
    causes = {error["problem_id"]: error["cause"] for error in errors}
    # A question that cannot be won teaches nothing.
    for example in questions.examples:
        cause = unearnable(example) if scored else None
        if cause:
            causes[example.id] = cause
    questions.leave_out(causes)
    return questions


def load_demonstrations(args, data):
    """Rows of a data set file that have reasoning, in the order in which SFT takes them."""
    questions = load_questions(args, data, scored=False)
    # SFT imitates; a row without reasoning has nothing to imitate.
    reasoned = [example for example in questions.examples if example.reasoning]
    if not reasoned:
        raise DataError(f"{data} has no reasoning traces (field `process`) for --stage sft")
    rows = len(questions.examples) + len(questions.skipped)
    plan = schedule(args, "sft")
    questions.examples = plan.order(reasoned, args.seed, args.sft_questions_per_medium)
    log_main(
        f"SFT: {len(reasoned)} of {rows} rows have reasoning, {plan.steps(questions)} step(s) of "
        f"{plan.per_step}"
    )
    return questions


def load_training(args):
    """GRPO's questions in the order of training; refused here if that is too few, or useless."""
    questions = load_questions(args, args.dataset_name)
    plan = schedule(args, "grpo")
    questions.examples = plan.order(questions.examples, args.seed)
    plan.steps(questions)
    if args.alignment_weight and not any(example.grounding for example in questions.examples):
        raise DataError(
            "--alignment_weight needs claims to compare with, and no question of "
            f"{questions.source} has the field grounding"
        )
    return questions


def add_priors(args, questions, name, file, resume):
    """Reads the priors of the questions, or computes them; leaves out unreadable media.

    Args:
        name: "training" or "held-out".
        file: priors file of the command line, or None.
        resume: state of the checkpoint that this run continues, {} without one.
    """
    made = Path(args.output_dir) / f"priors_{name}.jsonl"
    examples = list({e.id: e for e in questions.examples}.values())  # without the stream's repeats

    def compute():
        """What neither the given file nor that of the run that goes on has."""
        old = []
        done = {}
        if file is not None:
            done = prior.load_priors(file, examples, args)
        if made.is_file() and (resume or str(made) == file):
            old = list(prior.read_priors(made))
            done.update(prior.load_priors(made, examples, args))
        left = [e for e in examples if e.media and e.id not in done]
        rows, errors = compute_priors(args, left, name)
        if rows or not old:
            write_lines(made, [*old, *rows])
        return errors

    # Rank 0 reads and writes, the others are told; then every rank reads the files.
    errors = on_main_first(compute)
    questions.leave_out({error["problem_id"]: error["cause"] for error in errors})
    for source in [made] if file is None else [file, made]:
        questions.priors.update(prior.load_priors(source, questions.examples, args))


def compute_priors(settings, examples, name):
    """Priors of video and image examples: list of Prior, error lines of unreadable media."""
    # The release's field frame_sets comes before our own cues.
    with_sets = [e for e in examples if "frame_sets" in e.extra]
    others = [e for e in examples if "frame_sets" not in e.extra]
    rows, errors = prior.frame_set_rows(with_sets, settings)
    if others:
        log_main(f"computing the priors of {len(others)} {name} questions (prior.py does it ahead)")
        clip = None
        if settings.has_semantic and any(e.video for e in others):
            device = deepspeed.get_accelerator().current_device_name()
            clip = prior.load_clip(settings.clip, settings.clip_pretrained, device)
        how = (settings.decode_workers, settings.decode_timeout)
        computed, unreadable = prior.build_priors(others, clip, settings, *how)
        rows += computed
        errors += unreadable
    return rows, errors


# ----------------------------------------------------------------------------------------- a run


def run(args):
    """SFT, GRPO or both, with the held-out score before and after.

    Args:
        args: TrainArguments.
    Errors: DataError, one sentence, for everything that a user can mend.
    """
    output = Path(args.output_dir)
    if args.decode_workers:
        start_server()
    resume = on_main_first(lambda: find_start(output, args))
    if resume is None:
        return
    check_deepspeed_file(args, resume.get("folder"))
    set_seed(args.seed)
    progress = Progress(stages_ahead(args, resume))
    this = read_inputs(args, resume, progress)
    # From here on the output folder is written.
    shown = on_main_first(lambda: prepare_output(output, args, resume))
    result = this.result
    # A resumed run leaves out the same questions, so that the others keep their places.
    result["heldout_skipped"] = this.heldout.skipped
    result["without_prior"] = dict(this.training.skipped)
    result["wandb_run_id"] = resume.get("wandb_run_id") or uuid.uuid4().hex[:8]
    if resume.get("stage") == "grpo":
        result["before"] = resume["before"]
    this.checkpoint = Checkpoints(args, this.processor, resume, result)
    this.tracker = Tracker(args, result["wandb_run_id"], shown)

    # SFT, the score between the two, GRPO, the score after it.
    model_path = args.model_name_or_path
    if args.stage != "grpo":
        model_path = output / "sft"
    if this.demonstrations.examples:
        progress.start("SFT")
        train_sft(this)
    if this.training.examples:
        train_grpo(this, model_path)
    # Without GRPO both columns of the table are the same.
    result.setdefault("after", result["before"])
    finish_run(this)


def stages_ahead(args, resume):
    """{stage: expected seconds} of what is left of a run, see Progress."""
    begins = resume.get("stage") != "grpo"
    scored = bool(args.eval_dataset_name)
    learns = args.stage != "sft"
    # The toy's seconds on 2 CPU cores (2026-11-27), and whether the stage is still to be run.
    stages = {
        "toy": (21, args.toy_dir and not toy.is_made(args.toy_dir)),
        "priors": (16, True),
        "SFT": (70, args.stage != "grpo" and begins),
        "score before GRPO": (5, scored and begins),
        "GRPO": (68, learns),
        "score after GRPO": (5, scored and learns),
    }
    # Other data take their own time; their progress bars tell it.
    known = bool(args.toy_dir)
    return {name: known * seconds for name, (seconds, ahead) in stages.items() if ahead}


def read_inputs(args, resume, progress):
    """Reads and checks everything that a run needs; says what will be trained. Returns the Run."""
    sft_data = args.dataset_name
    # The toy is made on first use; its demonstrations are a file of their own.
    if args.toy_dir:
        progress.start("toy")
        on_main_first(lambda: toy.make_toy(args.toy_dir, seed=args.seed))
        sft_data = f"{args.toy_dir}/train_cot.json"
    # The checkpoint's own processor makes the model inputs.
    model_path = args.model_name_or_path
    layer = {f"{args.frame_use}_layer": args.frame_use_layer}
    read_config(model_path, needs_attention=args.frame_use == "attention", **layer)
    if base_checkpoint(model_path) != model_path:
        raise DataError(f"{model_path} is an adapter; train the merged model, one folder above it")
    processor = load_processor(model_path)
    encoder = Encoder(processor, args)
    # result.json gets its further entries in run().
    result = {"command": sys.argv, "seed": args.seed}
    this = Run(args, processor, encoder, Questions(), result, progress)
    # Questions of every stage, before the slow part.
    if args.eval_dataset_name:
        this.heldout = load_questions(args, args.eval_dataset_name)
        # What could not be read before stays out.
        this.heldout.leave_out(resume.get("heldout_skipped", {}))
    if args.stage != "grpo" and resume.get("stage") != "grpo":
        this.demonstrations = load_demonstrations(args, sft_data)
    if args.stage != "sft":
        this.training = load_training(args)
    # Priors, the slow part where they are not given.
    progress.start("priors")
    if args.eval_dataset_name:
        add_priors(args, this.heldout, "held-out", args.eval_priors, resume)
    if this.training.examples:
        read_training_priors(this, resume)
    return this


def read_training_priors(run, resume):
    """Priors of GRPO's questions, inversion of a share of them, and what will be trained."""
    args = run.args
    training = run.training
    wanted = len(training.examples)
    # What could not be read before stays out, so that the other questions keep their places.
    training.leave_out(resume.get("without_prior", {}))
    add_priors(args, training, "training", args.priors, resume)
    # TW-GRPO's question-answer inversion of a share of them, in place.
    counts = {"inverted": 0, "not_invertible": 0}
    for place, example in enumerate(training.examples):
        rng = random.Random(f"{args.seed}-{place}")
        if rng.random() < args.invert_questions:
            new = invert_question(example, rng)
            counts["inverted" if new else "not_invertible"] += 1
            training.examples[place] = new or example
    run.result.update(counts)
    plan = schedule(args, "grpo")
    log_main(
        f"GRPO: {plan.steps(training)} of {wanted // plan.per_step} planned step(s) of "
        f"{plan.per_step} question(s); {len(training.skipped)} unusable, "
        f"{counts['inverted']} inverted, {counts['not_invertible']} not invertible"
    )


def finish_run(run):
    """Writes result.json, model cards and the report; prints the table and what was skipped."""
    output = Path(run.args.output_dir)
    result = run.result
    result["skipped"] = run.demonstrations.skipped | run.training.skipped
    # Equal causes are counted together, the most frequent one first.
    causes = Counter(plain_cause(cause) for cause in result["skipped"].values())
    result["skipped_by_cause"] = dict(causes.most_common())
    result["heldout_questions"] = len(run.heldout.examples)
    everything = (run.heldout, run.demonstrations, run.training)
    result["differences"] = {
        str(one.source): one.differences for one in everything if one.differences
    }
    for cause, count in causes.most_common():
        log_main(f"{count} skipped: {cause}")
    if run.heldout.examples:
        print_table(run.args, result)
    if is_main():
        write_json(output / "result.json", result)
        try:
            write_cards(output, result)
            run_report([output])
        except (DataError, OSError) as error:  # the run itself is whole
            log_main(f"no report.html or no model card: {error}")
    log_main(f"\nall of it is in {output}/, docs/metrics.md describes the files")


def plain_cause(cause):
    """A cause without its names, numbers and solutions, so that equal causes count together."""
    cause = re.sub(r"(?<=solution )(['\"]).*\1|[^\s:]*/[^\s:]*|\d[\d,.]*", "...", cause)
    return re.sub(r"^row \S+ (\(problem_id .*?\))?:? ?|^.*?: ", "", cause)


# Settings that say how many steps there are.
LENGTHS = ("max_steps", "num_train_epochs", "sft_max_steps", "sft_num_train_epochs")


def hold(output):
    """Keeps other runs out of an output folder until this process ends.

    Errors: DataError if one is in it.
    """
    # Never closed here: the lock ends with the process, which a worker that it forks may outlive.
    held = [os.open(output, os.O_RDONLY)]
    # Closed once: to the worker's own children the number may be another file.
    os.register_at_fork(after_in_child=lambda: held and os.close(held.pop()))
    try:
        fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"another run writes to --output_dir {output}; choose another") from error
    except OSError:
        log_main(f"--output_dir {output} cannot be locked; start no second run in it")


def find_start(output, args):
    """Finds where a run begins.

    Returns:
        state.json of the checkpoint to continue from, with its folder; {} at the beginning; None if
        there is nothing to do.
    Errors: DataError if the folder holds an earlier run, which is never overwritten, or cannot be
        made.
    """
    with writing(f"--output_dir {output}"):
        output.mkdir(parents=True, exist_ok=True)
    hold(output)
    # A start that was refused before its first step is no earlier run.
    log = output / "metrics.jsonl"
    if args.resume_from_checkpoint is None and log.is_file() and log.stat().st_size > 0:
        raise DataError(
            f"{output} holds an earlier run; remove it, choose another --output_dir, or "
            "--resume_from_checkpoint auto"
        )
    # A finished run goes on only if it was made longer.
    if args.resume_from_checkpoint == "auto" and (output / "result.json").is_file():
        settings = read_document(output / "run.json")
        as_long = all(settings.get(name) == getattr(args, name) for name in LENGTHS)
        if as_long or not checkpoints(output):
            log_main(f"{output} holds a finished run, as long or without checkpoints")
            return None
    return find_checkpoint(args)


def prepare_output(output, args, resume):
    """Makes the output folder with run.json, its files as they were at the checkpoint (resume).

    Returns:
        number of steps in metrics.jsonl.
    """
    (output / "result.json").unlink(missing_ok=True)  # from here on the run is not finished
    # Checkpoints of after the one to continue from belong to a run that will not have been.
    later = []
    if resume:
        found = checkpoints(output)
        later = found[found.index(output / Path(resume["folder"]).name) + 1 :]
    for old in (*later, *output.glob("*.unfinished")):
        log_main(f"removing {old}, of after the checkpoint that this run goes on from")
        shutil.rmtree(old)
    for name in LOGS:
        with open(output / name, "ab") as file:
            file.truncate(min(file.tell(), resume.get("sizes", {}).get(name, 0)))
    # Every setting, and what the numbers may depend on beside them.
    packages = ["torch", "transformers", "deepspeed", "open_clip_torch", "av"]
    if args.lora_rank:
        packages.append("peft")
    facts = {
        **asdict(args),
        "command": sys.argv,
        "ranks": dist.get_world_size(),
        "revision": revision(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    write_json(output / "run.json", facts)
    return (output / "metrics.jsonl").read_bytes().count(b"\n")


def revision():
    """git's name of this code; None without git, or outside of a repository."""
    # The shell says that git is missing, too.
    folder = shlex.quote(str(Path(__file__).parent))
    status, text = subprocess.getstatusoutput(f"git -C {folder} describe --always --dirty")
    return text if status == 0 else None


# ------------------------------------------------------------------------------------ command line


# Flags of the releases' launch scripts, and what to give here in their place.
FOREIGN_FLAGS = {
    "--len_control": "--length_bonus 0.2 turns it on, --length_bonus 0 off",
    "--bf16": '"bf16" in the DeepSpeed configuration, on by itself on a GPU',
    "--attn_implementation": "none, it is sdpa, with its flash kernel on a GPU",
    "--use_vllm": "none, it samples itself",
    "--report_to": '"tensorboard" or "wandb" in the DeepSpeed configuration',
}


def parse_arguments():
    """The command line over the recipe's defaults over the toy's over those of TrainArguments.

    Returns:
        TrainArguments.
    """
    parser = Parser(
        TrainArguments,
        f"{__doc__}\nThe defaults are those for a checkpoint; --recipe changes some, and so does "
        "the toy. run.json has what a run used.",
    )
    # None for what the command line does not give: which default is right depends on the rest.
    absent = Namespace(**dict.fromkeys(vars(TrainArguments())))
    first, unknown = parser.parse_known_args(namespace=absent)
    if unknown:
        hint = FOREIGN_FLAGS.get(unknown[0].partition("=")[0], "python train.py --help lists all")
        raise DataError(f"unknown: {' '.join(unknown)}; here: {hint}")

    given = {name: value for name, value in vars(first).items() if value is not None}

    # Without data: the toy.
    recipe = dict(RECIPES[first.recipe or "cfgrpo"])
    stage = "grpo" if first.model_name_or_path else "both"
    settings = {"stage": stage}
    if first.dataset_name is None:
        if stage == "both" and first.stage == "grpo":
            raise DataError(
                "--stage grpo without a model would train an untrained toy; give "
                "--model_name_or_path or leave --stage out"
            )
        folder = first.toy_dir or f"toy-seed{first.seed or 0}"
        settings |= toy_defaults(folder, int(os.environ.get("WORLD_SIZE", 1)))
        for name in NOT_FOR_THE_TOY:
            recipe.pop(name, None)
    elif stage == "both" or first.stage == "both" or first.toy_dir:
        raise DataError(
            "--dataset_name needs --model_name_or_path (a Qwen2-VL, Qwen2.5-VL or Qwen3-VL "
            "checkpoint) and --stage sft, then --stage grpo; --toy_dir and both are for the toy"
        )
    if first.priors is not None:
        recipe.pop("prior", None)  # the file's cues are there to be looked at
    args = TrainArguments(**settings | recipe | given)
    check_arguments(args, given)
    return args


# Flags of at least 1, and of at least 0.
COUNTS = """per_device_train_batch_size gradient_accumulation_steps sft_per_device_batch_size
    sft_gradient_accumulation_steps sft_questions_per_medium max_completion_length
    max_prompt_length rollout_batch_size num_iterations ema_steps""".split()
NOT_NEGATIVE = """lora_rank learning_rate sft_learning_rate weight_decay temperature beta
    save_total_limit""".split()
# Flags from 0 to this.
AT_MOST = {
    "ema_decay": 1,
    "invert_questions": 1,
    "warmup_ratio": 1,
    "clip_low": math.inf,
    "clip_high": math.inf,
    "max_grad_norm": math.inf,
}


def check_arguments(args, given):
    """Errors: DataError for settings that do not go together, or `given` ones of another stage."""
    if args.frame_use == "attention" and args.frame_use_layer < 1:
        raise DataError(
            "--frame_use attention needs --frame_use_layer 1 (the first layer) or higher"
        )
    if args.cuda_graph and not torch.cuda.is_available():
        raise DataError("--cuda_graph needs a GPU")
    check_least(args, **dict.fromkeys(COUNTS, 1), num_generations=2)
    check_least(args, **dict.fromkeys(NOT_NEGATIVE, 0), tau=1e-6, top_p=1e-6)
    for name, most in AT_MOST.items():
        if not 0 <= getattr(args, name) <= most:
            raise DataError(f"--{name} must be from 0 to {most}")
    if args.freeze_vision and args.train_only_merger:
        raise DataError("--freeze_vision freezes the mergers too; give it or --train_only_merger")
    if args.lora_rank:
        check_peft("--lora_rank")
    # The two stages have a flag of the same meaning under two names.
    for sft, grpo in zip(*SCHEDULES.values(), strict=True):
        if args.stage == "sft" and grpo in given:
            raise DataError(f"--stage sft does not read --{grpo}; its own is --{sft}")
        if args.stage == "grpo" and sft in given:
            raise DataError(f"--stage grpo does not read --{sft}; its own is --{grpo}")
    # The others stand under the heading of their stage.
    heading = ""
    for setting in fields(TrainArguments):
        heading = setting.metadata.get("group", heading)
        if args.stage == "sft" and heading.startswith("GRPO") and setting.name in given:
            raise DataError(f"--stage sft does not read --{setting.name}: it is GRPO's")
        if args.stage == "grpo" and heading == "SFT" and setting.name in given:
            raise DataError(f"--stage grpo does not read --{setting.name}: it is SFT's")


def main():
    # transformers repeats warnings at every load.
    hf_logging.set_verbosity_error()
    with exit_codes("train.py", "--resume_from_checkpoint auto goes on from its last checkpoint"):
        args = parse_arguments()
        start_ranks()
        run(args)
        wait_for_all()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
