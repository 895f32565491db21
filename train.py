"""Stage 4: SFT cold start and GRPO with the consensus frame reward (CF-GRPO, arXiv 2606.18441), under DeepSpeed ZeRO-3.

    deepspeed train.py --deepspeed ds_zero3.json                     # the embedded toy: SFT, then GRPO; about 10 minutes on 2 CPU cores
    deepspeed train.py --deepspeed ds_zero3.json --stage sft  --model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct \\
        --dataset_name Video-R1-COT-165k.json --media_root DATA --output_dir out/sft
    deepspeed train.py --deepspeed ds_zero3.json --stage grpo --model_name_or_path out/sft/sft \\
        --dataset_name Video-R1-260k.json --media_root DATA --output_dir out/grpo

Per question (Eq. 3-10): sample G completions (and G/2 with the frames shuffled) -> rewards that need text only -> one packed forward
gives log-probs and frame use -> consensus reward -> advantages -> loss -> step.
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor, HfArgumentParser, set_seed
from transformers.utils import logging as hf_logging

import prior
import reward
import toy
from common import workers
from common.checkpoints import LENGTHS, Checkpoints, checkpoints, find_checkpoint, save_model
from common.data import (
    DataError,
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
from common.flags import Help
from common.media import Encoder
from common.policy import (
    FAMILIES,
    PACKED_FAMILIES,
    Policy,
    Prompts,
    collate,
    rollout_frame_use,
    slot_shares,
)
from common.ranks import (
    agree,
    average,
    check_finite,
    is_main,
    name_skipped,
    on_main_first,
    say,
    start_ranks,
)
from common.rollout import read_turn, sample_texts, sampling, stop_tokens
from common.run_page import run_report
from grpo import answer_likelihoods, group_advantages, policy_loss


def flag(default, text, **more):
    return field(default=default, metadata={"help": text, **more})


@dataclass
class TrainArguments:
    # what to train on what
    model_name_or_path: str | None = flag(
        None, "Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint, folder or hub id. None: the toy model."
    )
    dataset_name: str | None = flag(
        None,
        "Training questions, Video-R1 JSON (SFT needs reasoning in `process`). Without one: the toy's.",
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
        "sft, grpo, or both. Default: both for the toy model, grpo for a checkpoint.",
        choices=["sft", "grpo", "both"],
    )
    output_dir: str = flag("output", "Everything the run writes.")
    priors: str | None = flag(
        None,
        "Priors file made by prior.py for the training questions. Without one they are computed first.",
    )
    eval_priors: str | None = flag(
        None,
        "Priors file of the held-out questions. Without one: their rows in --priors, else computed.",
    )
    toy_dir: str | None = flag(None, "Folder of the toy. Default: toy-seedN, made on first use.")
    prompt_template: str | None = flag(
        None, "Text file with {question} and {instruction}; replaces our wording."
    )
    system_prompt: str | None = flag(
        None,
        "Text of a system turn before every question. None: what the chat template does by itself.",
    )
    # frames
    min_pixels: int = flag(16 * 28 * 28, "Fewest pixels a frame.")
    max_pixels: int = flag(128 * 28 * 28, "Most pixels a frame.")
    frame_times: str = flag(
        "none",
        "How frames say when they were taken: text (a line before the question), drawn (on the frames), none.",
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
    # SFT
    sft_learning_rate: float = flag(1e-5, "Peak learning rate of SFT.")
    sft_max_steps: int = flag(-1, "SFT steps; -1: --sft_num_train_epochs.")
    sft_num_train_epochs: float = flag(1.0, "SFT epochs, when --sft_max_steps is -1.")
    sft_per_device_batch_size: int = flag(1, "Demonstrations per device and forward.")
    sft_gradient_accumulation_steps: int = flag(1, "Forwards per SFT step.")
    # rollouts
    num_generations: int = flag(8, "G, rollouts per question.")
    max_completion_length: int = flag(768, "Most tokens of a completion.")
    temperature: float = flag(1.0, "Sampling temperature of rollouts.")
    top_p: float = flag(0.95, "Nucleus of rollouts.")
    top_k: int = flag(0, "Likeliest tokens that rollouts choose from, 0: all.")
    cuda_graph: bool = flag(
        torch.cuda.is_available(),
        "Sample in fixed shapes by a CUDA graph, captured once a rollout and replayed "
        "every step; on by itself on a GPU, where it has not been run yet; false launches kernel by kernel.",
    )
    # rewards
    recipe: str = flag(
        "cfgrpo",
        "Which system's terms and constants are the defaults; any other flag on the command line wins over it. "
        "The README has a table.",
        choices=["cfgrpo", "grpo", "tgrpo", "care", "tw", "video_r2", "release"],
    )
    cfr_weight: float = flag(
        3.0, "Lambda of the consensus frame reward, Eq. 7 (the release has 5)."
    )
    gate: str = flag(
        "soft",
        "What conditions it: soft (times accuracy), hard (accuracy > 0.01, the release), none (Eq. 7).",
        choices=["soft", "hard", "none"],
    )
    frame_use: str = flag(
        "hidden",
        "Frame use from hidden states (the paper, Eq. 3-5) or from attention.",
        choices=["hidden", "attention"],
    )
    frame_use_layer: int = flag(
        -1,
        "Layer it is read at. hidden: 0 embeddings ... -1 last; attention: 1 is the first layer.",
    )
    pool: str = flag("max", "Pooling of a frame's tokens, Eq. 3.", choices=["max", "mean"])
    tau: float = flag(0.1, "Sharpness of frame use, Eq. 5.")
    use_order: str = flag(
        "mean_softmax",
        "mean_softmax (the paper) or softmax_mean (the release, with --tau 0.5).",
        choices=["mean_softmax", "softmax_mean"],
    )
    temporal: bool = flag(True, "Temporal reward: G/2 rollouts with shuffled frames (T-GRPO).")
    temporal_gamma: float = flag(0.3, "Temporal reward of a correct completion.")
    temporal_ratio: float = flag(
        1.0, "Rho: ordered accuracy must reach rho times shuffled accuracy (the release has 0.8)."
    )
    length_low: int = flag(320, "Fewest tokens that earn the length bonus.")
    length_high: int = flag(512, "Most tokens that earn it.")
    length_bonus: float = flag(0.2, "Length bonus of a correct completion; 0 turns it off.")
    consistency_coef: float = flag(
        0.0,
        "GRPO-CARE: bonus of an answer that the reference finds likely after its reasoning (CARE has 0.5).",
    )
    consistency_margin: float = flag(
        0.01, "How far its likelihood may lie below the mean of the selected (0 for SEED-Bench-R1)."
    )
    consistency_dense: bool = flag(
        False, "The bonus is coef * accuracy * likelihood for every answer, without the selection."
    )
    alignment_weight: float = flag(
        0.0,
        "Video-R2: weight of the temporal alignment reward; gated as the consensus is (there by an LLM).",
    )
    alignment_threshold: float = flag(
        0.75, "Least similarity of two matching claims; words are compared, not meanings."
    )
    alignment_buffer: float = flag(2.0, "Seconds by which both intervals are widened on each side.")
    invert_questions: float = flag(
        0.0,
        "TW-GRPO: share of the questions to be inverted (negated, right and wrong options exchanged).",
    )
    # optimisation
    learning_rate: float = flag(5e-6, "Peak learning rate of GRPO (the release has 1e-6).")
    weight_decay: float = flag(0.01, "AdamW's.")
    max_grad_norm: float = flag(5.0, "Gradient clipping.")
    warmup_ratio: float = flag(
        0.05,
        "Share of the steps in which the learning rate rises; over the last 30 %% it falls to a tenth.",
    )
    beta: float = flag(
        0.04,
        "Weight of the KL penalty to the reference, Eq. 10; 0 loads none, unless the consistency bonus needs it.",
    )
    ema_decay: float = flag(
        1.0,
        "Reference <- decay * reference + (1 - decay) * policy; 1: frozen (GRPO-CARE has 0.995).",
    )
    ema_steps: int = flag(10, "Steps between two such updates.")
    token_weight_alpha: float = flag(
        1.0, "TW-GRPO: greatest weight of a token; 1: all have weight 1 (TW-GRPO has 1.7)."
    )
    clip_low: float = flag(0.2, "Epsilon below, Eq. 10.")
    clip_high: float = flag(0.2, "Epsilon above.")
    degenerate: str = flag(
        "keep",
        "Groups of equal rewards: keep (their KL alone), drop (no KL either), virtual_anchor (a virtual "
        "rollout of the other accuracy joins mean and deviation).",
        choices=["keep", "drop", "virtual_anchor"],
    )
    reduction: str = flag(
        "sequence",
        "Token losses to one, a step: sequence (GRPO), token (TW-GRPO, DAPO), constant (Dr. GRPO).",
        choices=["sequence", "token", "constant"],
    )
    scale_rewards: bool = flag(True, "Divide advantages by the group's standard deviation.")
    mask_truncated_completions: bool = flag(
        False, "Leave completions that were cut at --max_completion_length out of the loss (DAPO)."
    )
    per_device_train_batch_size: int = flag(1, "Questions per device and forward.")
    gradient_accumulation_steps: int = flag(1, "Forwards per optimizer step.")
    max_steps: int = flag(-1, "GRPO steps; -1: num_train_epochs.")
    num_train_epochs: float = flag(1.0, "GRPO epochs.")
    packed: bool = flag(
        True,
        "Score a group in one packed row; false repeats the prompt, as the releases do (same numbers, slower).",
    )
    old_logp: str = flag(
        "forward",
        "Old log-probabilities of Eq. 10: the policy's forward on the rollouts before its first update, or "
        "sampled, those of sampling; they differ by rounding.",
        choices=["forward", "sampled"],
    )
    num_iterations: int = flag(
        1, "Updates on the same rollouts; from the second on the ratio of Eq. 10 is not 1."
    )
    freeze_vision: bool = flag(
        False,
        "Do not train the vision tower. Rollouts, reference and policy then share one pass through it.",
    )
    train_only_merger: bool = flag(
        False, "Train the layers between vision tower and language model alone (the mergers)."
    )
    gradient_checkpointing: bool = flag(
        False, "Recompute activations in the backward pass: less memory, a third more time."
    )
    # checkpoints
    save_steps: int = flag(
        100, "Steps between checkpoints, from which a run can go on; 0: none but the final model."
    )
    eval_steps: int = flag(
        0,
        "GRPO steps between scorings of the held-out questions; 0: before and after training only.",
    )
    save_total_limit: int = flag(2, "Checkpoints that are kept; the oldest leave.")
    resume_from_checkpoint: str | None = flag(
        None, "Folder of a checkpoint, or auto: the output folder's last one, if there is one."
    )
    seed: int = flag(0, "Of everything random.")
    deepspeed: str = flag(
        "ds_zero3.json", "DeepSpeed configuration; 'auto' values are filled from the flags."
    )
    local_rank: int = flag(-1, "Set by the deepspeed launcher.")


PLAIN = dict(
    cfr_weight=0.0, temporal=False, length_bonus=0.0, prior="uniform"
)  # accuracy and format alone; no prior is needed
RECIPES = {  # what each changes in the defaults above
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


def toy_defaults(world_size):
    """What the toy changes in the defaults above; any flag on the command line still wins. Global batches do not depend on the ranks.

    Frame use comes from the attention of the first layer: on the toy's known evidence it was above chance on every checkpoint checked
    (evaluate.py --frame_use_check), while the paper's lies at chance; the paper's is computed and logged beside it. Beta is higher
    because at a learning rate that a 1.2 M-parameter model needs to move in 80 steps, what no reward asks for drifts.
    """
    return dict(
        clip="local-dir:{toy}/clip",
        min_pixels=56 * 56,
        max_pixels=56 * 56,
        max_completion_length=96,
        length_bonus=0.0,
        sft_learning_rate=2e-3,
        sft_max_steps=600,
        sft_per_device_batch_size=max(1, 32 // world_size),
        learning_rate=2e-4,
        beta=0.1,
        max_steps=80,
        per_device_train_batch_size=max(1, 16 // world_size),
        max_grad_norm=1.0,
        frame_use="attention",
        frame_use_layer=1,
        decode_workers=0,
    )


# ----------------------------------------------------------------------------------------------------------------- SFT


def batch_targets(examples, processor):
    """Demonstrations as groups of one: completions, mask (B, 1, T).

    What the prompt says already in the assistant's place is not said again; the end of the turn is part of what is learned.
    """
    turn = read_turn(processor)
    said = turn.opening.strip()
    targets = []
    for example in examples:
        text = target_text(example).removeprefix(said)
        targets.append([*plain_ids(processor.tokenizer, text), turn.end])
    length = max(map(len, targets))
    completions = torch.tensor([[ids + [turn.end] * (length - len(ids))] for ids in targets])
    mask = torch.tensor([[[True] * len(ids) + [False] * (length - len(ids))] for ids in targets])
    return completions, mask


def sft_steps(arguments, count):
    """-> optimizer steps of SFT on `count` demonstrations, demonstrations of a step. DataError when there are too few for one."""
    forward = arguments.sft_per_device_batch_size * dist.get_world_size()
    per_step = forward * arguments.sft_gradient_accumulation_steps
    if per_step > count:
        raise DataError(f"SFT has {count} usable demonstrations, fewer than one step of {per_step}")
    if arguments.sft_max_steps > 0:
        return arguments.sft_max_steps, per_step
    return max(1, int(arguments.sft_num_train_epochs * count) // per_step), per_step


def train_sft(arguments, model_path, processor, encoder, examples, skipped, checkpoint, writer):
    """Cold start: reasoning and answer as target, prompt masked, mean over the tokens of all ranks. Returns the checkpoint's folder."""
    world, rank = dist.get_world_size(), dist.get_rank()
    batch = arguments.sft_per_device_batch_size
    accumulation = arguments.sft_gradient_accumulation_steps
    engine = start_engine(arguments, model_path, batch, accumulation, arguments.sft_learning_rate)
    device = engine.device
    model, (done, kept) = engine.module.model, checkpoint.load(engine, "sft")
    lost = 0
    if kept:
        lost = kept["lost"]
        skipped.update(kept["skipped"])
    steps, per_step = sft_steps(arguments, len(examples))
    rng, order = random.Random(arguments.seed), []
    while len(order) < steps * per_step:
        order += rng.sample(examples, len(examples))
    inputs = Inputs(encoder, arguments.decode_workers, arguments.decode_timeout)

    def requests(step):
        """This rank's demonstrations of a step, forward by forward: lists of (place in the run, example, None)."""
        parts = []
        for micro in range(accumulation if step < steps else 0):
            start = ((step * accumulation + micro) * world + rank) * batch
            part = order[start : start + batch]
            parts.append([(start + index, example, None) for index, example in enumerate(part)])
        return parts

    inputs.ahead(request for part in requests(done) for request in part)
    progress = tqdm(
        range(done, steps),
        desc="SFT",
        unit="step",
        mininterval=1,
        initial=done,
        total=steps,
        disable=not is_main(),
    )
    for step in progress:
        begin = time.perf_counter()
        inputs.ahead(request for part in requests(step + 1) for request in part)
        # 1. the step's demonstrations; a forward in which a rank has nothing to do is left out on all of them
        forwards = []
        for part in requests(step):
            usable = inputs.usable(part, arguments.max_prompt_length, skipped)
            fewest, everywhere = agree(len(usable), device)
            lost += batch * world - everywhere
            if fewest > 0:
                _, chosen, items, _ = zip(*usable, strict=True)
                completions, mask = batch_targets(chosen, processor)
                forwards.append((chosen, items, completions.to(device), mask.to(device)))
        kept = dict(skipped=skipped, lost=lost)
        if not forwards:
            checkpoint.after_step(engine, "sft", step + 1, steps, **kept)
            continue
        # 2. the loss: mean over the tokens of all forwards and ranks, however the step is split into them
        tokens = torch.tensor(float(sum(mask.sum() for *_, mask in forwards)), device=device)
        dist.all_reduce(tokens)
        set_learning_rate(engine, step, steps, arguments.sft_learning_rate, arguments.warmup_ratio)
        total = 0.0
        for number, (chosen, items, completions, mask) in enumerate(forwards, 1):
            engine.set_gradient_accumulation_boundary(number == len(forwards))
            logp, *_ = engine(collate(items, model).to(device), completions, mask)
            loss = -(logp * mask).sum() / tokens
            total += loss.item()
            with checkpoint.guard("sft", step, chosen):
                check_finite(loss.item(), "loss")
            engine.backward(
                loss * world * accumulation
            )  # DeepSpeed averages over ranks and forwards
            engine.step()
        values = {"loss/sft": [total * world], "time/step": [time.perf_counter() - begin]}
        metrics = average(values, tuple(values), device)
        metrics["loss/grad_norm"] = float(
            engine.get_global_grad_norm() or 0
        )  # before clipping; stage 0 computes none
        metrics["train/learning_rate"] = engine.get_lr()[0]
        record = {"stage": "sft", "step": step, **metrics, "data/skipped": lost}
        writer(record)
        progress.set_postfix(loss=f"{metrics['loss/sft']:.3f}", refresh=False)
        checkpoint.after_step(engine, "sft", step + 1, steps, **kept)
    inputs.stop()
    checkpoint.release()
    folder = Path(arguments.output_dir) / "sft"
    save_model(engine, processor, folder)
    engine.destroy()
    return folder


# ---------------------------------------------------------------------------------------------------------------- GRPO


def use_scores(example, row, use):
    """Consensus (Eq. 6) of one rollout's frame use, and its mass on the true evidence, None where that is not known."""
    consensus = reward.consensus_frame_reward(
        reward.merge_prior(torch.tensor(row["prior"]), len(use)), use.cpu()
    )
    evidence = (
        float(use.cpu() @ slot_shares(row["times"], example.evidence, len(use)))
        if example.evidence
        else None
    )
    return consensus, evidence


def use_layers(arguments):
    """What a forward must return for frame_uses()."""
    if arguments.frame_use == "attention":
        return {"hidden_layers": (-1,), "attention_layer": arguments.frame_use_layer}
    return {"hidden_layers": tuple({-1, arguments.frame_use_layer})}


def frame_uses(arguments, prompts, mask, hidden, attention):
    """The run's frame use and, beside it, the paper's (last layer, max pool, tau 0.1): two lists as rollout_frame_use returns them."""
    paper = rollout_frame_use(prompts, mask, hidden[-1])
    if arguments.frame_use == "attention":
        return rollout_frame_use(prompts, mask, attention=attention), paper
    chosen = hidden[arguments.frame_use_layer]
    return rollout_frame_use(
        prompts, mask, chosen, None, arguments.tau, arguments.use_order, arguments.pool
    ), paper


def accuracies(example, texts):
    return [reward.accuracy_reward(text, example.answer, example.problem_type) for text in texts]


def unearnable(example):
    """Why no answer to a question can earn anything: its own solution scores 0 ("50%" as numerical, 0 as regression). None if one can."""
    (accuracy,) = accuracies(example, [f"<answer>{example.answer}</answer>"])
    if accuracy > 0:
        return None
    return f"its own solution {example.answer[:60]!r} scores 0 as {example.problem_type}, so no answer can earn it"


def text_rewards(arguments, example, texts, lengths, shuffled):
    """The terms that need text only: {name: G values}. shuffled: accuracies of the control with shuffled frames, None without one."""
    accuracy = accuracies(example, texts)
    terms = {
        "accuracy": accuracy,
        "format": [reward.format_reward(text) for text in texts],
        "length": [
            reward.length_reward(
                length, value, arguments.length_low, arguments.length_high, arguments.length_bonus
            )
            for length, value in zip(lengths, accuracy, strict=True)
        ],
        "temporal": [0.0] * len(texts),
    }
    if arguments.alignment_weight:
        terms["alignment"] = [
            arguments.alignment_weight
            * reward.gate(right, arguments.gate)
            * reward.temporal_alignment_reward(
                reward.parse_claims(reward.extract_think(text)),
                example.grounding,
                buffer=arguments.alignment_buffer,
                threshold=arguments.alignment_threshold,
            )
            for text, right in zip(texts, accuracy, strict=True)
        ]
    if shuffled is not None:  # means over this question's own rollouts, never over the batch
        means = sum(accuracy) / len(accuracy), sum(shuffled) / len(shuffled)
        terms["temporal"] = [
            reward.temporal_reward(
                value, *means, arguments.temporal_gamma, arguments.temporal_ratio
            )
            for value in accuracy
        ]
    return terms


def run_seed(arguments, place):
    """Of what is random about one question of the run, wherever it is sampled."""
    return arguments.seed * 1_000_003 + place


@dataclass
class Rollouts:
    """One forward's worth of questions and what was sampled for them."""

    examples: tuple
    prompts: Prompts
    completions: torch.Tensor  # (B, G, T)
    mask: torch.Tensor  # (B, G, T)
    truncated: torch.Tensor  # (B, G) bool, cut at the limit before their end
    logp: torch.Tensor  # (B, G, T) of the sampled tokens
    texts: list  # B lists of G
    control_texts: dict  # {index of the question: texts with shuffled frames}


def sample_groups(arguments, model, processor, usable):
    """G completions of every question and, with --temporal, G/2 of every video's with shuffled frames, in one batch -> Rollouts.

    model: the bare one of sampling(); usable: (place in the run, which seeds it, example, model inputs, the control's or None).
    """
    places, examples, items, shuffled = zip(*usable, strict=True)
    group, half, device = (
        arguments.num_generations,
        max(1, arguments.num_generations // 2),
        model.get_input_embeddings().weight.device,
    )
    seeds = [run_seed(arguments, place) for place in places]
    controls = {index: control for index, control in enumerate(shuffled) if control is not None}
    counts = [group] * len(items) + [half] * len(controls)
    row_seeds = [
        seeds[index] * 1_009 + number
        for index, count in zip([*range(len(items)), *controls], counts, strict=True)
        for number in range(count)
    ]
    prompts = collate([*items, *controls.values()], model).to(device)
    if arguments.freeze_vision:
        with torch.no_grad():
            prompts.features = Policy(model).encode(prompts)
    tokens, mask, texts, logp = sample_texts(
        model,
        processor,
        prompts,
        counts,
        row_seeds,
        arguments.max_completion_length,
        arguments.temperature,
        arguments.top_p,
        arguments.top_k,
        True,
        arguments.cuda_graph,
    )
    own = len(items) * group
    longest = int(mask[:own].sum(-1).max())
    shape, visual = (len(items), group, longest), int(prompts.visual[: len(items)].sum())
    features = prompts.features and tuple(
        feature[:visual] if visual else feature for feature in prompts.features
    )  # 0: text, a blank image
    shaped = lambda tensor: tensor[:own, :longest].reshape(shape)  # noqa: E731
    ended = (
        torch.isin(tokens[:own], torch.tensor(stop_tokens(model, processor), device=device))
        & mask[:own]
    )
    truncated = ~ended.any(dim=-1)
    return Rollouts(
        examples,
        replace(collate(items, model), features=features),
        shaped(tokens),
        shaped(mask),
        truncated.view(shape[:2]),
        shaped(logp),
        [texts[start : start + group] for start in range(0, own, group)],
        {
            index: texts[own + place * half : own + (place + 1) * half]
            for place, index in enumerate(controls)
        },
    )


METRICS = (
    *(
        f"reward/{name}"
        for name in (
            "total",
            "accuracy",
            "format",
            "length",
            "temporal",
            "alignment",
            "consensus",
            "consistency",
        )
    ),
    *(
        f"consensus/{name}"
        for name in ("score", "evidence_use", "paper_score", "paper_evidence_use")
    ),
    *(
        f"loss/{name}"
        for name in ("policy", "kl", "ratio", "clip_fraction", "zero_variance_groups")
    ),
    *(
        f"rollout/{name}"
        for name in ("length", "truncated", "entropy", "logp_difference", "shuffled_accuracy")
    ),
    *(f"time/{name}" for name in ("rollout", "reference", "policy", "update", "step")),
)


def spend(values, name, begin):
    """Adds the seconds since `begin` to a stage of this step; -> now."""
    now = time.perf_counter()
    values[f"time/{name}"] = [sum(values[f"time/{name}"]) + now - begin]
    return now


def grpo_micro_batch(arguments, engine, reference, processor, rollouts, rows, share, values):
    """One forward's worth of rollouts: score, advantages, loss, backward. Adds to `values` ({metric: list}).

    share: what this loss counts in the mean of DeepSpeed. -> a log line per rollout, and what another update on these rollouts needs.
    """
    examples, texts, completions, mask = (
        rollouts.examples,
        rollouts.texts,
        rollouts.completions,
        rollouts.mask,
    )
    lengths = mask.sum(-1)  # (B, G)

    # 1. log-probs of the reference, then one packed policy forward: log-probs and frame use
    clock = time.perf_counter()
    prompts, ref_logp = rollouts.prompts.to(engine.device), None
    if reference is not None:
        with torch.no_grad():
            ref_logp = reference(prompts, completions, mask, arguments.packed)[0]  # (B, G, T)
    clock = spend(values, "reference", clock)
    logp, entropy, hidden, attention, weights = engine(
        prompts,
        completions,
        mask,
        arguments.packed,
        weight_alpha=weight_alpha(arguments),
        **use_layers(arguments),
    )
    check_finite(logp.detach()[mask].sum().item(), "policy's log-probability")
    uses, paper_uses = frame_uses(arguments, prompts, mask, hidden, attention)

    # 2. rewards (Eq. 6-8)
    totals, anchors, lines = [], [], []
    for index, example in enumerate(examples):
        shuffled = (
            accuracies(example, rollouts.control_texts[index])
            if index in rollouts.control_texts
            else None
        )
        terms = text_rewards(arguments, example, texts[index], lengths[index].tolist(), shuffled)
        values["rollout/shuffled_accuracy"] += shuffled or []
        consensus = [0.0] * len(
            texts[index]
        )  # an image is one frame: nothing to choose, no consensus reward
        if uses[index][0] is not None:
            for names, group in (
                (("score", "evidence_use"), uses[index]),
                (("paper_score", "paper_evidence_use"), paper_uses[index]),
            ):
                scores = [use_scores(example, rows[example.id], use) for use in group]
                for name, column in zip(names, zip(*scores, strict=True), strict=True):
                    values[f"consensus/{name}"] += [value for value in column if value is not None]
                consensus = [score for score, _ in scores] if names[0] == "score" else consensus
        terms["consensus"] = [
            arguments.cfr_weight * reward.gate(right, arguments.gate) * score
            for right, score in zip(terms["accuracy"], consensus, strict=True)
        ]
        if arguments.consistency_coef:
            likelihoods = answer_likelihoods(
                processor.tokenizer, completions[index], mask[index], ref_logp[index]
            )  # (G,)
            terms["consistency"] = reward.consistency_bonus(
                torch.tensor(terms["accuracy"]),
                likelihoods,
                arguments.consistency_coef,
                margin=arguments.consistency_margin,
                dense=arguments.consistency_dense,
            ).tolist()
        terms["total"] = [sum(column) for column in zip(*terms.values(), strict=True)]
        totals.append(terms["total"])
        anchors.append(terms["total"][0] + 1 - 2 * sum(terms["accuracy"]) / len(terms["accuracy"]))
        for name, column in terms.items():
            values[f"reward/{name}"] += column
        for number, text in enumerate(texts[index]):
            use = uses[index][number]
            lines.append(
                {
                    "problem_id": example.id,
                    "question": example.question,
                    "options": example.options,
                    "text": text,
                    "answer": example.answer,
                    "rewards": {name: column[number] for name, column in terms.items()},
                    "prior": rows[example.id]["prior"] if use is not None else None,
                    "use": None if use is None else [round(value, 4) for value in use.tolist()],
                }
            )

    # 3. advantages, loss, backward (Eq. 9-10)
    totals = torch.tensor(totals, device=engine.device)  # (B, G)
    degenerate = totals.amax(1) - totals.amin(1) < 1e-6  # (B,)
    anchors = (
        torch.tensor(anchors, device=engine.device)
        if arguments.degenerate == "virtual_anchor"
        else None
    )  # (B,)
    advantages = group_advantages(
        totals, scale=arguments.scale_rewards, anchors=anchors
    ).flatten()  # (N,)
    dropped = degenerate if arguments.degenerate == "drop" else torch.zeros_like(degenerate)
    replay = {
        "prompts": prompts,
        "completions": completions,
        "mask": mask,
        "learned": learned_tokens(arguments, rollouts),
        "advantages": advantages,
        "ref_logp": ref_logp,
        "old_logp": rollouts.logp if arguments.old_logp == "sampled" else logp.detach(),
        "share": share,
        "dropped": dropped,
    }
    backward_loss(arguments, engine, replay, logp, weights, values)
    spend(values, "policy", clock)
    values["loss/zero_variance_groups"] += degenerate.float().tolist()
    values["rollout/length"] += lengths.flatten().tolist()
    values["rollout/truncated"] += rollouts.truncated.flatten().float().tolist()
    values["rollout/entropy"] += ((entropy * mask).sum(-1) / lengths).flatten().tolist()
    values["rollout/logp_difference"] += (
        (((rollouts.logp - logp.detach()).abs() * mask).sum(-1) / lengths).flatten().tolist()
    )
    return lines, replay


def learned_tokens(arguments, rollouts):
    """(B, G, T) bool, the tokens that count in the loss: all, or those of completions that came to their end."""
    if not arguments.mask_truncated_completions:
        return rollouts.mask
    return rollouts.mask & ~rollouts.truncated[..., None]


def weight_alpha(arguments):
    return arguments.token_weight_alpha if arguments.token_weight_alpha != 1 else None


def backward_loss(arguments, engine, replay, logp, weights, values):
    """Eq. 10 of one forward (logp, weights (B, G, T)) and its backward."""
    if replay["dropped"].any():
        weights = (torch.ones_like(logp) if weights is None else weights) * ~replay["dropped"][
            :, None, None
        ]
    logp, old_logp, mask, ref_logp, weights = (
        tensor if tensor is None else tensor.flatten(0, 1)
        for tensor in (logp, replay["old_logp"], replay["learned"], replay["ref_logp"], weights)
    )  # (N, T)
    loss, stats = policy_loss(
        logp,
        old_logp,
        replay["advantages"],
        mask,
        ref_logp,
        arguments.beta,
        arguments.clip_low,
        arguments.clip_high,
        arguments.reduction,
        weights,
    )
    check_finite(loss.item(), "loss")
    engine.backward(loss * replay["share"])
    for name, value in {**stats, "policy": loss.item()}.items():
        values[f"loss/{name}"] += [value] * len(replay["completions"])


def loss_shares(arguments, masks, device):
    """What each forward's loss counts, so that a step's gradient does not depend on how its rollouts are split into forwards and ranks.

    masks: list of (B, G, T). A forward's loss is a mean over its completions (sequence, constant) or its tokens (token), so it counts as
    many as it has of those on all ranks; DeepSpeed then divides by the ranks and by the forwards of a step. constant (Dr. GRPO) divides
    by --max_completion_length, not by the longest completion at hand.
    """
    token = arguments.reduction == "token"
    counts = [float(mask.sum() if token else mask[..., 0].numel()) for mask in masks]
    total = torch.tensor(sum(counts), device=device)
    dist.all_reduce(total)
    scales = [
        mask.shape[2] / arguments.max_completion_length
        if arguments.reduction == "constant"
        else 1.0
        for mask in masks
    ]
    return [
        count
        * scale
        * dist.get_world_size()
        * arguments.gradient_accumulation_steps
        / max(total.item(), 1.0)
        for count, scale in zip(counts, scales, strict=True)
    ]


def train_grpo(
    arguments,
    model_path,
    processor,
    encoder,
    stream,
    rows,
    skipped,
    checkpoint,
    writer,
    log_rollouts,
    heldout=None,
):
    """CF-GRPO on a stream of questions, with the starting checkpoint as frozen reference. Returns the folder of the trained one."""
    world, rank = dist.get_world_size(), dist.get_rank()
    batch, accumulation = (
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
    )
    engine = start_engine(arguments, model_path, batch, accumulation, arguments.learning_rate)
    reference, averages = (
        start_engine(arguments, model_path)
        if arguments.beta > 0 or arguments.consistency_coef
        else None,
        {},
    )
    steps = len(stream) // (batch * world * accumulation)
    lost, (done, kept) = len(skipped), checkpoint.load(engine, "grpo")
    if kept:
        new = skipped.keys() - kept["skipped"].keys()  # of questions that a longer run has come to
        lost, averages = kept["lost"] + len(new), kept["averages"]
        skipped.update(kept["skipped"])
        if averages:
            write_shards(reference, averages)
    inputs = Inputs(encoder, arguments.decode_workers, arguments.decode_timeout)

    def requests(step):
        """This rank's questions of a step, forward by forward, with their rows of the priors and the order of the control's frames."""
        parts = []
        for micro in range(accumulation if step < steps else 0):
            start, part = ((step * accumulation + micro) * world + rank) * batch, []
            for place, example in enumerate(stream[start : start + batch], start):
                row, order = rows.get(example.id), None
                if arguments.temporal and example.media_type == "video":
                    order = random.Random(run_seed(arguments, place)).sample(
                        range(len(row["frames"])), len(row["frames"])
                    )
                part.append((place, example, row, order))
            parts.append(part)
        return parts

    inputs.ahead(request for part in requests(done) for request in part)
    progress = tqdm(
        range(done, steps),
        desc="GRPO",
        unit="step",
        mininterval=1,
        initial=done,
        total=steps,
        disable=not is_main(),
    )
    for step in progress:
        begin, values = time.perf_counter(), defaultdict(list)
        set_learning_rate(engine, step, steps, arguments.learning_rate, arguments.warmup_ratio)
        micro_batches = []  # those in which every rank has something to do
        inputs.ahead(request for part in requests(step + 1) for request in part)
        for part in requests(step):
            usable = inputs.usable(part, arguments.max_prompt_length, skipped)
            fewest, everywhere = agree(len(usable), engine.device)
            lost += batch * world - everywhere
            if fewest > 0:
                micro_batches.append(usable)
        with (
            sampling(engine) as model
        ):  # everything is sampled before anything is learned: one gathering of the parameters a step
            sampled = [
                sample_groups(arguments, model, processor, usable) for usable in micro_batches
            ]
        spend(values, "rollout", begin)
        shares, replays = (
            loss_shares(
                arguments,
                [learned_tokens(arguments, rollouts) for rollouts in sampled],
                engine.device,
            ),
            [],
        )
        for iteration in range(arguments.num_iterations):
            for number, (rollouts, share) in enumerate(zip(sampled, shares, strict=True)):
                engine.set_gradient_accumulation_boundary(number == len(sampled) - 1)
                with checkpoint.guard("grpo", step, rollouts.examples):
                    if iteration == 0:
                        lines, replay = grpo_micro_batch(
                            arguments, engine, reference, processor, rollouts, rows, share, values
                        )
                        if arguments.num_iterations > 1:
                            replays.append(replay)
                        log_rollouts([{"step": step, **line} for line in lines])
                    else:
                        clock, replay = time.perf_counter(), replays[number]
                        logp, *_, weights = engine(
                            replay["prompts"],
                            replay["completions"],
                            replay["mask"],
                            arguments.packed,
                            weight_alpha=weight_alpha(arguments),
                        )
                        backward_loss(arguments, engine, replay, logp, weights, values)
                        spend(values, "policy", clock)
                    clock = time.perf_counter()
                    engine.step()
                    spend(values, "update", clock)
                    norm = float(engine.get_global_grad_norm() or 0)  # stage 0 computes none
                    check_finite(norm, "norm of the gradient")
        if (
            reference is not None
            and arguments.ema_decay < 1
            and (step + 1) % arguments.ema_steps == 0
        ):
            update_reference(reference, engine, averages, arguments.ema_decay)
        spend(values, "step", begin)
        metrics = average(values, METRICS, engine.device)
        if micro_batches and norm:
            metrics["loss/grad_norm"] = norm
        metrics["train/learning_rate"] = engine.get_lr()[0]
        record = {"stage": "grpo", "step": step, **metrics, "data/skipped": lost}
        if heldout and arguments.eval_steps and (step + 1) % arguments.eval_steps == 0:
            scores = score_heldout(arguments, engine, *heldout)
            record |= {f"eval/{name}": value for name, value in scores.items()}
        writer(record)
        shown = {
            "reward": "reward/total",
            "acc": "reward/accuracy",
            "cfr": "consensus/score",
            "len": "rollout/length",
            "kl": "loss/kl",
            "same": "loss/zero_variance_groups",
            "skipped": "data/skipped",
        }
        progress.set_postfix(
            {short: f"{record[name]:.3g}" for short, name in shown.items() if name in record},
            refresh=False,
        )
        checkpoint.after_step(
            engine, "grpo", step + 1, steps, skipped=skipped, lost=lost, averages=averages
        )
    inputs.stop()
    checkpoint.release()
    folder = Path(arguments.output_dir) / "grpo"
    save_model(engine, processor, folder)
    engine.destroy()
    return folder


def question_stream(arguments, examples, world):
    """The run's questions in order, shuffled epoch by epoch, and how many make a step."""
    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * world
    wanted = questions_wanted(arguments, len(examples), per_step)
    rng, stream = random.Random(arguments.seed), []
    while (
        examples and len(stream) < wanted
    ):  # a longer run begins with the questions of a shorter one
        stream += rng.sample(examples, len(examples))
    return stream[:wanted], per_step


def questions_wanted(arguments, count, per_step):
    """Length of the stream of a data set of `count` questions."""
    return (
        arguments.max_steps * per_step
        if arguments.max_steps > 0
        else int(arguments.num_train_epochs * count)
    )


def check_stream(arguments, data, stream, per_step, skipped):
    """DataError when too few questions are left for a step, or none has what a term of the reward compares with."""
    if len(stream) < per_step:
        raise DataError(
            f"{len(stream)} usable questions ({len(skipped)} skipped) are fewer than one step's {per_step}"
        )
    if arguments.alignment_weight and not any(example.grounding for example in stream):
        raise DataError(
            f"--alignment_weight needs claims to compare with, and no question of {data} has the field grounding"
        )


def grpo_plan(steps, planned, per_step, left_over, skipped):
    """What GRPO will do, for people: steps or questions that go missing are counted."""
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
    """TW-GRPO's question-answer inversion of a share of the stream -> (stream, how many are inverted, how many could not be)."""
    inverted, left = 0, 0
    for place, example in enumerate(stream if share else []):
        rng = random.Random(f"{seed}-{place}")
        if rng.random() < share:
            new = invert_question(example, rng)
            inverted, left = inverted + (new is not None), left + (new is None)
            stream[place] = new or example
    return stream, inverted, left


# ------------------------------------------------------------------------------------------------------ held-out score


def score_checkpoint(arguments, model_path, *heldout):
    """score_heldout of a saved model."""
    engine = start_engine(arguments, model_path)
    scores = score_heldout(arguments, engine, *heldout)
    engine.destroy()
    return scores


def unusable_heldout(arguments, encoder, examples, rows, batch=32):
    """{problem_id: cause} of held-out questions whose medium cannot be read or whose prompt is too long, on all ranks.

    Asked once, before the first scoring, so that all scorings of a run are of the same questions.
    """
    inputs = Inputs(encoder, arguments.decode_workers, arguments.decode_timeout)
    skipped, rank, world = {}, dist.get_rank(), dist.get_world_size()
    requests = [
        (place, example, rows.get(example.id), None) for place, example in enumerate(examples)
    ]
    for start in tqdm(
        range(0, len(requests), batch * world),
        desc="held-out",
        unit="batch",
        disable=not is_main(),
        leave=False,
    ):
        mine = requests[start : start + batch * world][rank::world]
        inputs.ahead(mine)
        inputs.usable(mine, arguments.max_prompt_length, skipped)
    inputs.stop()
    return skipped


@torch.no_grad()
def score_heldout(arguments, engine, processor, encoder, examples, rows, batch=32):
    """Greedy and sampled answers on questions that were never trained on, every rank its share. Returns {name: mean}.

    'conflict' are the questions whose asked and most salient evidence differ. Frame use is read on the sampled completions.
    """
    values = defaultdict(list)
    kinds = sorted({kind(example) for example in examples})
    mine = list(enumerate(examples))[dist.get_rank() :: dist.get_world_size()]
    with sampling(engine) as model:
        for start in tqdm(
            range(0, len(mine), batch),
            desc="held-out",
            unit="batch",
            disable=not is_main(),
            leave=False,
        ):
            positions, part = zip(*mine[start : start + batch], strict=True)
            prompts = collate(
                [encoder.encode(example, rows.get(example.id)) for example in part], model
            ).to(engine.device)
            for decoding, temperature in (("greedy", 0.0), ("sampled", arguments.temperature)):
                seeds = [run_seed(arguments, position) for position in positions]
                tokens, mask, texts = sample_texts(
                    model,
                    processor,
                    prompts,
                    [1] * len(part),
                    seeds,
                    arguments.max_completion_length,
                    temperature,
                    arguments.top_p,
                    arguments.top_k,
                    graph=arguments.cuda_graph,
                )
                for example, text in zip(part, texts, strict=True):
                    (accuracy,) = accuracies(example, [text])
                    for name in (decoding, f"{decoding}/{kind(example)}"):
                        values[name].append(accuracy)
                    if example.extra.get("salient_is_asked") is False:
                        values[f"{decoding}/conflict"].append(accuracy)
            values["length"] += mask.sum(-1).tolist()
            _, _, hidden, attention, _ = Policy(model)(
                prompts, tokens[:, None], mask[:, None], **use_layers(arguments)
            )  # the sampled ones
            for prefix, uses in zip(
                ("", "paper_"),
                frame_uses(arguments, prompts, mask[:, None], hidden, attention),
                strict=True,
            ):
                for example, (use,) in zip(part, uses, strict=True):
                    if use is None:
                        continue
                    consensus, evidence = use_scores(example, rows[example.id], use)
                    values[f"{prefix}consensus"].append(consensus)
                    if evidence is not None:
                        values[f"{prefix}evidence_use"].append(evidence)
                        values["evidence_chance"].append(
                            float(
                                slot_shares(
                                    rows[example.id]["times"], example.evidence, len(use)
                                ).mean()
                            )
                        )
    names = [
        f"{decoding}{rest}"
        for decoding in ("greedy", "sampled")
        for rest in ("", "/conflict", *(f"/{name}" for name in kinds))
    ]
    names += [
        "consensus",
        "evidence_use",
        "paper_consensus",
        "paper_evidence_use",
        "evidence_chance",
        "length",
    ]
    return average(values, names, engine.device)


def kind(example):
    """A question's row in the table: the toy's own kind, elsewhere its problem type."""
    return example.extra.get("kind", example.problem_type)


def print_table(arguments, before, after, seconds):
    """The end of a run, for people; result.json holds the same numbers."""
    use = f"{arguments.frame_use}, layer {arguments.frame_use_layer}"
    lines = [
        ("held-out accuracy, greedy", "greedy"),
        ("  asked and salient evidence differ", "greedy/conflict"),
    ]
    lines += [
        (f"  {name.partition('/')[2]}", name)
        for name in after
        if name.startswith("greedy/") and name != "greedy/conflict"
    ]
    lines += [
        ("held-out accuracy, sampled", "sampled"),
        ("  asked and salient evidence differ", "sampled/conflict"),
        (f"consensus score ({use})", "consensus"),
        (f"frame use on the true evidence ({use})", "evidence_use"),
        ("consensus score (the paper's)", "paper_consensus"),
        ("frame use on the true evidence (paper's)", "paper_evidence_use"),
        ("  chance (uniform use)", "evidence_chance"),
        ("completion length, tokens", "length"),
    ]
    say(f"\n{'':52s}{'before GRPO':>12s}{'after':>10s}")
    for text, name in lines:
        if name in after:
            say(f"{text:52s}{before[name]:12.3f}{after[name]:10.3f}")
    say("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()) + "\n")


# ---------------------------------------------------------------------------------------------------------------- main


FOREIGN_FLAGS = {  # of the originals' launch scripts
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


SFT_FLAGS = {  # GRPO's flags whose namesakes SFT reads
    "learning_rate": "sft_learning_rate",
    "max_steps": "sft_max_steps",
    "num_train_epochs": "sft_num_train_epochs",
    "per_device_train_batch_size": "sft_per_device_batch_size",
    "gradient_accumulation_steps": "sft_gradient_accumulation_steps",
}
GRPO_FLAGS = (  # read by GRPO alone
    *SFT_FLAGS,
    "priors",
    "num_generations",
    "cfr_weight",
    "gate",
    "temporal",
    "temporal_gamma",
    "temporal_ratio",
    "length_low",
    "length_high",
    "length_bonus",
    "consistency_coef",
    "consistency_margin",
    "consistency_dense",
    "alignment_weight",
    "alignment_threshold",
    "alignment_buffer",
    "invert_questions",
    "beta",
    "ema_decay",
    "ema_steps",
    "token_weight_alpha",
    "clip_low",
    "clip_high",
    "degenerate",
    "reduction",
    "scale_rewards",
    "mask_truncated_completions",
    "packed",
    "old_logp",
    "num_iterations",
    "eval_steps",
)


def refuse_unread_flags(stage, given):
    """DataError for a flag of the command line that this stage does not read. given: names of settings."""
    other = {theirs: ours for ours, theirs in SFT_FLAGS.items()}
    for name in given:
        if stage == "sft" and name in SFT_FLAGS:
            raise DataError(f"--stage sft does not read --{name}; its own is --{SFT_FLAGS[name]}")
        if stage == "sft" and name in GRPO_FLAGS:
            raise DataError(f"--stage sft does not read --{name}: it is GRPO's")
        if stage == "grpo" and name in other:
            raise DataError(f"--stage grpo does not read --{name}; its own is --{other[name]}")


def parse_arguments():
    parser = HfArgumentParser(
        (TrainArguments, prior.PriorSettings),
        allow_abbrev=False,
        formatter_class=Help,
        description=(
            f"{__doc__}\nThe defaults are those for a checkpoint; --recipe changes some, and so does the toy. run.json has what a run used."
        ),
    )
    first, unknown = parser.parse_known_args()
    for name in (word.partition("=")[0] for word in unknown):
        if name in FOREIGN_FLAGS:
            raise DataError(f"{name} is a flag of the releases; here: {FOREIGN_FLAGS[name]}")
    if unknown:
        raise DataError(f"unknown: {' '.join(unknown)} (python train.py --help lists the flags)")
    recipe = dict(RECIPES[first.recipe])
    if first.dataset_name is None:
        if first.model_name_or_path is None and first.stage == "grpo":
            raise DataError(
                "--stage grpo without a model would train an untrained toy; give --model_name_or_path or leave --stage out"
            )
        folder = first.toy_dir or f"toy-seed{first.seed}"
        defaults = {
            name: value.format(toy=folder) if isinstance(value, str) else value
            for name, value in toy_defaults(int(os.environ.get("WORLD_SIZE", 1))).items()
        }
        for name in (
            "learning_rate",
            "frames",
            "fps",
            "max_completion_length",
            "prior",
        ):  # made for billions of parameters
            recipe.pop(name, None)
        parser.set_defaults(**defaults, toy_dir=folder)
    elif first.model_name_or_path is None:
        raise DataError(
            "--dataset_name needs --model_name_or_path (a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint)"
        )
    elif first.stage == "both":
        raise DataError(
            "--stage both is for the toy; with your own data run --stage sft, then --stage grpo"
        )
    if first.priors is not None:
        recipe.pop("prior", None)  # the file's cues are there to be looked at
    parser.set_defaults(**recipe)
    arguments, settings = parser.parse_args_into_dataclasses()
    if arguments.frame_use == "attention" and arguments.frame_use_layer < 1:
        raise DataError(
            "--frame_use attention needs --frame_use_layer 1 (the first layer) or higher"
        )
    if arguments.cuda_graph and not torch.cuda.is_available():
        raise DataError("--cuda_graph needs a GPU")
    if arguments.num_generations < 2 or arguments.save_total_limit < 1:
        raise DataError("--num_generations must be at least 2 and --save_total_limit at least 1")
    arguments.stage = arguments.stage or (
        "both" if arguments.model_name_or_path is None else "grpo"
    )
    if arguments.freeze_vision and arguments.train_only_merger:
        raise DataError("--freeze_vision freezes the mergers too; give it or --train_only_merger")
    words = [word[2:].partition("=")[0] for word in sys.argv[1:] if word.startswith("--")]
    refuse_unread_flags(
        arguments.stage, [word.replace("-", "_").removeprefix("no_") for word in words]
    )
    return arguments, settings


def priors_for(arguments, settings, examples, name, resume, known, file=None, shared=None):
    """-> {problem_id: row} of the examples' priors, {problem_id: cause} of examples that have none: their medium cannot be read.

    file: a priors file that has them all. Without one they are taken from the first of these that has them, and written to
    output/priors_NAME.jsonl: that file, of the run that this one goes on with; `shared`, a priors file that may have some; the examples'
    own frame_sets; that file, of a start that was refused. The rest is computed.
    known: causes that the run that this one goes on with (resume) has found.
    """
    made = Path(arguments.output_dir) / f"priors_{name}.jsonl"
    asked = [example for example in examples if example.id not in known]

    def look():
        errors = prior.check_missing(
            file, asked, settings, arguments.decode_workers, arguments.decode_timeout
        )
        return {error["problem_id"]: error["cause"] for error in errors}

    def build():
        old = list(prior.read_priors(made)) if made.is_file() else []
        done = prior.load_priors(made, asked, settings) if resume and old else {}
        left = [
            example for example in asked if example.media_type != "text" and example.id not in done
        ]
        new = []

        # 1. a file that may have some
        if shared is not None:
            found = prior.rows_for(shared, left)
            new += prior.load_priors(
                shared, [example for example in left if example.id in found], settings
            ).values()
            left = [example for example in left if example.id not in found]

        # 2. the release's field
        rows, errors = prior.frame_set_rows(
            [example for example in left if "frame_sets" in example.extra], settings
        )
        new += rows
        left = [example for example in left if "frame_sets" not in example.extra]

        # 3. a start that was refused
        if old and not resume:
            found = prior.rows_for(made, left)
            found = {
                problem: row
                for problem, row in found.items()
                if row.get("settings") == prior.settings_of(settings)
            }
            new += found.values()
            left = [example for example in left if example.id not in found]

        # 4. computed; CLIP is for videos that can be read
        if left:
            say(
                f"computing the priors of {len(left)} {name} questions (prior.py does this ahead, --priors or --eval_priors reuses it)"
            )
            videos = [example for example in left if example.media_type == "video"]
            clip = None
            if settings.has_semantic and prior.look_at(videos, settings)[1] is not None:
                clip = prior.load_clip(
                    settings.clip,
                    settings.clip_pretrained,
                    deepspeed.get_accelerator().current_device_name(),
                )
            rows, more_errors = prior.build_priors(left, clip, settings)
            new += rows
            errors += more_errors
        workers.write_lines(made, [*(old if resume else []), *new])
        with open(f"{made}.errors.jsonl", "ab" if resume else "wb", buffering=0) as file:
            workers.append_lines(file, errors)
        return {error["problem_id"]: error["cause"] for error in errors}

    found = on_main_first(build if file is None else look)
    causes = {example.id: known[example.id] for example in examples if example.id in known}
    causes.update(found)
    name_skipped(causes)
    rows = prior.load_priors(
        file or made, [example for example in examples if example.id not in causes], settings
    )
    return rows, causes


def load_processor(arguments, model_path):
    """The checkpoint's processor. DataError when the checkpoint cannot be found or is of no family that this program knows."""
    try:
        processor = AutoProcessor.from_pretrained(model_path)
        family = AutoConfig.from_pretrained(model_path).model_type
    except (OSError, ValueError) as error:
        raise DataError(
            f"model {model_path} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    if family not in FAMILIES:
        raise DataError(f"{model_path} is a {family} checkpoint, not one of {', '.join(FAMILIES)}")
    if arguments.frame_use == "attention" and family not in PACKED_FAMILIES:
        raise DataError(
            f"--frame_use attention works with {', '.join(PACKED_FAMILIES)}, not with {family}"
        )
    return processor


def run(arguments, settings):
    seconds, clock = {}, time.perf_counter()

    def lap(name):
        nonlocal clock
        seconds[name], clock = time.perf_counter() - clock, time.perf_counter()

    def load(path, scored=True):
        """-> examples of a data set, {problem_id: cause} of its unusable rows. scored: whether answers to them will be."""
        errors = []
        examples = load_examples(path, arguments.media_root, errors)
        causes = {error["problem_id"]: error["cause"] for error in errors}
        if scored:
            hopeless = {example.id: cause for example in examples if (cause := unearnable(example))}
            examples = [example for example in examples if example.id not in hopeless]
            causes |= hopeless
        name_skipped(causes)
        return examples, causes

    # 1. What there is to read. But for priors nothing is written to the output folder before all of it is known to be good.
    check_deepspeed_file(arguments)
    output, sft, grpo = (
        Path(arguments.output_dir),
        arguments.stage in ("sft", "both"),
        arguments.stage in ("grpo", "both"),
    )
    resume = on_main_first(lambda: find_start(output, arguments))
    if resume is None:
        return
    set_seed(arguments.seed)
    model_path, data, heldout = (
        arguments.model_name_or_path,
        arguments.dataset_name,
        arguments.eval_dataset_name,
    )
    sft_data = data
    if data is None:
        folder = Path(arguments.toy_dir)
        on_main_first(
            lambda: toy.make_toy(toy.ToyArguments(output_dir=str(folder), seed=arguments.seed))
        )
        sft_data, data, heldout = (
            folder / "train_cot.json",
            folder / "train.json",
            heldout or folder / "heldout.json",
        )
        model_path = model_path or folder / "model"
        lap("toy")
    if arguments.eval_priors and not heldout:
        raise DataError("--eval_priors without held-out questions; give --eval_dataset_name")
    processor = load_processor(arguments, model_path)
    encoder = Encoder(
        processor,
        arguments.min_pixels,
        arguments.max_pixels,
        settings.frames,
        read_template(arguments.prompt_template),
        arguments.media_cache_gb,
        arguments.frame_times,
        arguments.system_prompt,
    )

    # 2. What will be trained
    unusable, steps = {}, 0
    result = {"command": sys.argv, "seed": arguments.seed}
    heldout_examples, heldout_skipped = load(heldout) if heldout else ([], {})
    if sft and resume.get("stage") != "grpo":
        examples, errors = load(sft_data, scored=False)
        unusable.update(errors)
        demonstrations = [example for example in examples if example.reasoning]
        if not demonstrations:
            raise DataError(f"{sft_data} has no reasoning traces (field `process`) for --stage sft")
        steps, per_step = sft_steps(arguments, len(demonstrations))
        say(
            f"SFT: {len(demonstrations)} of {len(examples) + len(errors)} rows have reasoning, {steps} step(s) of {per_step}"
        )
    if grpo:
        examples, errors = load(data)
        stream, per_step = question_stream(arguments, examples, dist.get_world_size())
        check_stream(arguments, data, stream, per_step, errors)
    if heldout:
        known = resume.get("heldout_skipped", {})
        heldout_rows, causes = priors_for(
            arguments,
            settings,
            heldout_examples,
            "held-out",
            resume,
            known,
            arguments.eval_priors,
            arguments.priors,
        )
        heldout_skipped.update(known)
        heldout_skipped.update(causes)
        lap("held-out priors")
    if grpo:
        asked = list({example.id: example for example in stream}.values())
        rows, without_prior = priors_for(
            arguments,
            settings,
            asked,
            "training",
            resume,
            resume.get("without_prior", {}),
            arguments.priors,
        )
        skipped = {**without_prior, **errors}
        lap("training priors")
        stream = [example for example in stream if example.id not in without_prior]
        stream, result["inverted"], result["not_invertible"] = invert_share(
            stream, arguments.invert_questions, arguments.seed
        )
        check_stream(arguments, data, stream, per_step, skipped)
        if arguments.invert_questions and not result["inverted"]:
            raise DataError(
                f"--invert_questions: none of the chosen questions of {data} can be inverted"
            )
        if arguments.alignment_weight:
            say(
                f"{sum(bool(example.grounding) for example in stream)} of {len(stream)} questions have timed claims (grounding)"
            )
        if arguments.invert_questions:
            say(
                f"{result['inverted']} questions are inverted; {result['not_invertible']} chosen ones cannot be and stay as they are"
            )
        planned = questions_wanted(arguments, len(examples) + len(errors), per_step) // per_step
        steps, left_over = divmod(len(stream), per_step)
        say(grpo_plan(steps, planned, per_step, left_over, skipped))
    if (
        resume.get("finished")
        and resume["stage"] == ("grpo" if grpo else "sft")
        and resume["step"] >= steps
    ):
        say(
            f"{output} holds a finished run of {resume['step']} {resume['stage']} steps, this command has {steps}; nothing to do"
        )
        return
    if heldout:
        heldout_examples = [
            example for example in heldout_examples if example.id not in heldout_skipped
        ]
        found = unusable_heldout(arguments, encoder, heldout_examples, heldout_rows)
        if found and resume.get("stage") == "grpo" and "heldout_skipped" in resume:
            raise DataError(
                f"{len(found)} held-out question(s) scored before GRPO can no longer be; the first: "
                f"{next(iter(found.values()))}"
            )
        heldout_examples = [example for example in heldout_examples if example.id not in found]
        heldout_skipped.update(found)
        if not heldout_examples:
            raise DataError(
                f"no question of {heldout} can be used; the first: {next(iter(heldout_skipped.values()))}"
            )
        say(f"held-out: {len(heldout_examples)} question(s); unusable: {len(heldout_skipped)}")

    # 3. The run
    on_main_first(lambda: prepare_output(output, arguments, settings, resume))
    files = (
        {
            name: open(output / name, "a", encoding="utf-8")
            for name in ("metrics.jsonl", "rollouts.jsonl")
        }
        if is_main()
        else {}
    )
    checkpoint = Checkpoints(arguments, processor, files, resume)
    checkpoint.shared["heldout_skipped"] = heldout_skipped
    checkpoint.shared["without_prior"] = without_prior if grpo else {}
    tracker = Tracker(arguments)

    def write(name, *records):
        if is_main():
            files[name].writelines(json.dumps(record) + "\n" for record in records)
            files[name].flush()

    def log(record):
        write("metrics.jsonl", record)
        tracker.show(record)

    def score(path):
        return (
            score_checkpoint(arguments, path, processor, encoder, heldout_examples, heldout_rows)
            if heldout_examples
            else {}
        )

    if sft:
        if resume.get("stage") == "grpo":
            model_path = output / "sft"
        else:
            model_path = train_sft(
                arguments, model_path, processor, encoder, demonstrations, unusable, checkpoint, log
            )
        lap("SFT")
    before = checkpoint.shared["before"] = (
        resume["before"] if resume.get("stage") == "grpo" else score(model_path)
    )
    lap("scoring before")
    after = before
    if grpo:
        folder = train_grpo(
            arguments,
            model_path,
            processor,
            encoder,
            stream,
            rows,
            skipped,
            checkpoint,
            log,
            lambda records: write("rollouts.jsonl", *records),
            (processor, encoder, heldout_examples, heldout_rows) if heldout_examples else None,
        )
        lap("GRPO")
        after = score(folder)
        lap("scoring after")
        unusable.update(skipped)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, unusable)
    result["skipped"] = {problem: cause for one in everyone for problem, cause in one.items()}
    result["skipped_by_cause"] = dict(
        Counter(map(plain_cause, result["skipped"].values())).most_common()
    )
    result["heldout_skipped"] = heldout_skipped
    for cause, count in result["skipped_by_cause"].items():
        say(f"{count} skipped: {cause}")
    if heldout_examples and is_main():
        print_table(arguments, before, after, seconds)
    result.update(before=before, after=after, seconds=seconds)
    if is_main():
        (output / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        try:
            run_report([output], command=f"python visualize.py run {shlex.quote(str(output))}")
        except (DataError, OSError) as error:  # the run itself is whole
            say(f"no report.html: {error}")
    say(
        f"all of it is in {output}/: report.html, result.json, metrics.jsonl, rollouts.jsonl, checkpoints"
    )


def plain_cause(cause):
    """Why something was skipped, without the names, numbers and solutions of its own."""
    cause = re.sub(r"solution (['\"]).*\1", "solution ...", cause)
    cause = (
        re.sub(r"^row \d+ (\(problem_id .*?\))?:? ?", "", cause)
        if cause.startswith("row ")
        else cause.partition(": ")[2] or cause
    )
    return re.sub(r"\d[\d,.]*", "N", re.sub(r"\S*/\S*", "FILE", cause))


def find_start(output, arguments):
    """state.json of the checkpoint that the run goes on from, with its folder and whether that run is finished; {} at the beginning, None
    if there is nothing to do. DataError when the folder holds an earlier run, which is not written over, or cannot be written."""
    finished, log = (output / "result.json").is_file(), output / "metrics.jsonl"
    begun = log.is_file() and log.stat().st_size > 0
    if arguments.resume_from_checkpoint is None and (finished or begun or checkpoints(output)):
        raise DataError(
            f"{output} holds an earlier run; remove it, choose another --output_dir, or --resume_from_checkpoint auto"
        )
    there = next(
        folder for folder in (output.resolve(), *output.resolve().parents) if folder.exists()
    )
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise DataError(
            f"--output_dir {output}: {there} is no folder that this program can write to"
        )
    if finished and arguments.resume_from_checkpoint == "auto":
        settings = json.loads((output / "run.json").read_text(encoding="utf-8"))
        if all(settings.get(name) == getattr(arguments, name) for name in LENGTHS):
            say(f"{output} holds a finished run (result.json); nothing to do")
            return None
        if not checkpoints(output):
            raise DataError(
                f"{output} holds a finished run without checkpoints (--save_steps 0): there is none to go on from"
            )
    resume = find_checkpoint(arguments)
    return {**resume, "finished": finished} if resume else {}


def prepare_output(output, arguments, settings, resume):
    """The output folder with run.json, every setting of the run, and its files as they were at the checkpoint it goes on from (resume)."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "result.json").unlink(missing_ok=True)  # from here on the run is not finished
    found = [path.name for path in checkpoints(output)]
    later = found[found.index(Path(resume["folder"]).name) + 1 :] if resume else []
    for old in (*(output / name for name in later), *output.glob("*.unfinished")):
        say(f"removing {old}, of after the checkpoint that this run goes on from")
        shutil.rmtree(old)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with open(output / name, "ab") as file:
            file.truncate(min(file.tell(), resume.get("sizes", {}).get(name, 0)))
    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", "transformers", "deepspeed", "open_clip_torch", "decord")
    }
    facts = {
        "command": sys.argv,
        "ranks": dist.get_world_size(),
        "revision": revision(),
        "versions": versions,
    }
    (output / "run.json").write_text(
        json.dumps({**asdict(arguments), **asdict(settings), **facts}, indent=1), encoding="utf-8"
    )


def revision():
    """git's name of this code; None without git, or outside of a repository."""
    if shutil.which("git") is None:
        return None
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return git.stdout.strip() or None


def main():
    hf_logging.set_verbosity_error()
    try:
        arguments, settings = parse_arguments()
        start_ranks()
        run(arguments, settings)
        dist.barrier()
        dist.destroy_process_group()
    except DataError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
