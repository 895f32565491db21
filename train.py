"""Stage 4: SFT cold start and GRPO with the consensus frame reward (CF-GRPO, arXiv 2606.18441), under DeepSpeed ZeRO-3.

    deepspeed train.py --deepspeed ds_zero3.json                     # the embedded toy: SFT, then GRPO; about 10 minutes on 2 CPU cores
    deepspeed train.py --deepspeed ds_zero3.json --stage sft  --model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct \\
        --dataset_name Video-R1-COT-165k.json --media_root DATA --output_dir out/sft
    deepspeed train.py --deepspeed ds_zero3.json --stage grpo --model_name_or_path out/sft/sft \\
        --dataset_name Video-R1-260k.json --media_root DATA --output_dir out/grpo

Per question (Eq. 3-10): sample G completions (and G/2 with the frames shuffled) -> rewards that need text only -> one packed forward
gives log-probs and frame use -> consensus reward -> advantages -> loss -> step.
"""

import argparse
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
from data import DataError, Encoder, invert_question, load_examples, read_template, target_text
from engine import (
    Checkpoints,
    Inputs,
    Tracker,
    agree,
    average,
    check_deepspeed_file,
    check_finite,
    checkpoints,
    find_checkpoint,
    is_main,
    on_main_first,
    save_model,
    say,
    set_learning_rate,
    start_engine,
    start_ranks,
    update_reference,
    write_shards,
)
from grpo import (
    FAMILIES,
    PACKED_FAMILIES,
    Policy,
    Prompts,
    answer_likelihoods,
    collate,
    group_advantages,
    policy_loss,
    rollout_frame_use,
    sample_texts,
    sampling,
    slot_shares,
)
from report import run_report


def flag(default, text, **more):
    return field(default=default, metadata={"help": text, **more})


@dataclass
class TrainArguments:
    # what to train on what
    model_name_or_path: str | None = flag(None, "Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint, folder or hub id. None: the toy model.")
    dataset_name: str | None = flag(None, "Training questions, Video-R1 JSON (SFT needs reasoning in `process`). Without one: the toy's.")
    eval_dataset_name: str | None = flag(None, "Held-out questions, scored before and after; never trained on. The toy brings its own.")
    media_root: str | None = flag(None, "Folder that media paths start from. Default: the data set file's folder.")
    stage: str | None = flag(None, "sft, grpo, or both. Default: both for the toy model, grpo for a checkpoint.",
                             choices=["sft", "grpo", "both"])
    output_dir: str = flag("output", "Everything the run writes.")
    priors: str | None = flag(None, "Priors file made by prior.py for the training questions. Without one they are computed first.")
    toy_dir: str | None = flag(None, "Folder of the toy. Default: toy-seedN, made on first use.")
    prompt_template: str | None = flag(None, "Text file with {question} and {instruction}; replaces our wording.")
    # frames
    min_pixels: int = flag(16 * 28 * 28, "Fewest pixels a frame.")
    max_pixels: int = flag(128 * 28 * 28, "Most pixels a frame.")
    frame_times: str = flag("none", "How frames say when they were taken: text (a line before the question), drawn (on the frames), none.",
                            choices=["none", "text", "drawn"])
    media_cache_gb: float = flag(2.0, "Memory for decoded media, per process that decodes.")
    decode_workers: int = flag(2, "Processes per rank that decode the next step's media; 0: none. Default for the toy: 0.")
    decode_timeout: float = flag(300.0, "Seconds after which a medium is given up (with workers).")
    max_prompt_length: int = flag(16384, "Questions with more prompt tokens, visual ones included, are skipped.")
    # SFT
    sft_learning_rate: float = flag(1e-5, "Peak learning rate of SFT.")
    sft_max_steps: int = flag(-1, "SFT steps; -1: one epoch.")
    sft_per_device_batch_size: int = flag(1, "Demonstrations per device and SFT step.")
    # rollouts
    num_generations: int = flag(8, "G, rollouts per question.")
    max_completion_length: int = flag(768, "Most tokens of a completion.")
    temperature: float = flag(1.0, "Sampling temperature of rollouts.")
    top_p: float = flag(0.95, "Nucleus of rollouts.")
    top_k: int = flag(0, "Likeliest tokens that rollouts choose from, 0: all.")
    cuda_graph: bool = flag(torch.cuda.is_available(), "Sample in fixed shapes by a CUDA graph, captured once a rollout and replayed "
                            "every step; on by itself on a GPU, where it has not been run yet; false launches kernel by kernel.")
    # rewards
    recipe: str = flag("cfgrpo", "Which system's terms and constants are the defaults; any other flag on the command line wins over it. "
                       "The README has a table.", choices=["cfgrpo", "grpo", "tgrpo", "care", "tw", "video_r2", "release"])
    cfr_weight: float = flag(3.0, "Lambda of the consensus frame reward, Eq. 7 (the release has 5).")
    gate: str = flag("soft", "What conditions it: soft (times accuracy), hard (accuracy > 0.01, the release), none (Eq. 7).",
                     choices=["soft", "hard", "none"])
    frame_use: str = flag("hidden", "Frame use from hidden states (the paper, Eq. 3-5) or from attention.", choices=["hidden", "attention"])
    frame_use_layer: int = flag(-1, "Layer it is read at. hidden: 0 embeddings ... -1 last; attention: 1 is the first layer.")
    pool: str = flag("max", "Pooling of a frame's tokens, Eq. 3.", choices=["max", "mean"])
    tau: float = flag(0.1, "Sharpness of frame use, Eq. 5.")
    use_order: str = flag("mean_softmax", "mean_softmax (the paper) or softmax_mean (the release, with --tau 0.5).",
                          choices=["mean_softmax", "softmax_mean"])
    temporal: bool = flag(True, "Temporal reward: G/2 rollouts with shuffled frames (T-GRPO).")
    temporal_gamma: float = flag(0.3, "Temporal reward of a correct completion.")
    temporal_ratio: float = flag(1.0, "Rho: ordered accuracy must reach rho times shuffled accuracy (the release has 0.8).")
    length_low: int = flag(320, "Fewest tokens that earn the length bonus.")
    length_high: int = flag(512, "Most tokens that earn it.")
    length_bonus: float = flag(0.2, "Length bonus of a correct completion; 0 turns it off.")
    consistency_coef: float = flag(0.0, "GRPO-CARE: bonus of an answer that the reference finds likely after its reasoning (CARE has 0.5).")
    consistency_margin: float = flag(0.01, "How far its likelihood may lie below the mean of the selected (0 for SEED-Bench-R1).")
    consistency_dense: bool = flag(False, "The bonus is coef * accuracy * likelihood for every answer, without the selection.")
    alignment_weight: float = flag(0.0, "Video-R2: weight of the temporal alignment reward; gated as the consensus is (there by an LLM).")
    alignment_threshold: float = flag(0.75, "Least similarity of two matching claims; words are compared, not meanings.")
    alignment_buffer: float = flag(2.0, "Seconds by which both intervals are widened on each side.")
    invert_questions: float = flag(0.0, "TW-GRPO: share of the questions to be inverted (negated, right and wrong options exchanged).")
    # optimisation
    learning_rate: float = flag(5e-6, "Peak learning rate of GRPO (the release has 1e-6).")
    weight_decay: float = flag(0.01, "AdamW's.")
    max_grad_norm: float = flag(5.0, "Gradient clipping.")
    warmup_ratio: float = flag(0.05, "Share of the steps in which the learning rate rises; over the last 30 % it falls to a tenth.")
    beta: float = flag(0.04, "Weight of the KL penalty to the reference, Eq. 10; 0 loads none, unless the consistency bonus needs it.")
    ema_decay: float = flag(1.0, "Reference <- decay * reference + (1 - decay) * policy; 1: frozen (GRPO-CARE has 0.995).")
    ema_steps: int = flag(10, "Steps between two such updates.")
    token_weight_alpha: float = flag(1.0, "TW-GRPO: greatest weight of a token; 1: all have weight 1 (TW-GRPO has 1.7).")
    clip_low: float = flag(0.2, "Epsilon below, Eq. 10.")
    clip_high: float = flag(0.2, "Epsilon above.")
    degenerate: str = flag("keep", "Groups of equal rewards: keep (their KL alone), drop (no KL either), virtual_anchor (a virtual "
                           "rollout of the other accuracy joins mean and deviation).", choices=["keep", "drop", "virtual_anchor"])
    reduction: str = flag("sequence", "Token losses to one, a step: sequence (GRPO), token (TW-GRPO, DAPO), constant (Dr. GRPO).",
                          choices=["sequence", "token", "constant"])
    scale_rewards: bool = flag(True, "Divide advantages by the group's standard deviation.")
    per_device_train_batch_size: int = flag(1, "Questions per device and forward.")
    gradient_accumulation_steps: int = flag(1, "Forwards per optimizer step.")
    max_steps: int = flag(-1, "GRPO steps; -1: num_train_epochs.")
    num_train_epochs: float = flag(1.0, "GRPO epochs.")
    packed: bool = flag(True, "Score a group in one packed row; false repeats the prompt, as the releases do (same numbers, slower).")
    old_logp: str = flag("forward", "Old log-probabilities of Eq. 10: the policy's forward on the rollouts before its first update, or "
                         "sampled, those of sampling; they differ by rounding.", choices=["forward", "sampled"])
    num_iterations: int = flag(1, "Updates on the same rollouts; from the second on the ratio of Eq. 10 is not 1.")
    freeze_vision: bool = flag(False, "Do not train the vision tower. Rollouts, reference and policy then share one pass through it.")
    gradient_checkpointing: bool = flag(False, "Recompute activations in the backward pass: less memory, a third more time.")
    # checkpoints
    save_steps: int = flag(100, "Steps between checkpoints, from which a run can go on; 0: none but the final model.")
    save_total_limit: int = flag(2, "Checkpoints that are kept; the oldest leave.")
    resume_from_checkpoint: str | None = flag(None, "Folder of a checkpoint, or auto: the output folder's last one, if there is one.")
    seed: int = flag(0, "Of everything random.")
    deepspeed: str = flag("ds_zero3.json", "DeepSpeed configuration; 'auto' values are filled from the flags.")
    local_rank: int = flag(-1, "Set by the deepspeed launcher.")


PLAIN = dict(cfr_weight=0.0, temporal=False, length_bonus=0.0, prior="uniform")  # accuracy and format alone; no prior is needed
RECIPES = {  # what each changes in the defaults above
    "cfgrpo": {},
    "grpo": PLAIN,
    "tgrpo": dict(cfr_weight=0.0, prior="uniform", learning_rate=1e-6, top_k=50),
    "care": dict(PLAIN, consistency_coef=0.5, ema_decay=0.995, beta=0.0, learning_rate=1e-6, top_k=50),
    "tw": dict(PLAIN, token_weight_alpha=1.7, reduction="token", clip_high=0.28, invert_questions=0.5, beta=0.0, learning_rate=1e-6,
               top_p=1.0, top_k=50, freeze_vision=True, max_completion_length=4096),
    "video_r2": dict(PLAIN, alignment_weight=1.0, learning_rate=1e-6, temperature=0.9, top_p=1.0, top_k=50, freeze_vision=True, frames=32,
                     fps=2.0, max_completion_length=1024),
    "release": dict(cfr_weight=5.0, gate="hard", frame_use="hidden", frame_use_layer=-1, tau=0.5, use_order="softmax_mean",
                    temporal_ratio=0.8, learning_rate=1e-6, top_k=50),
}


def toy_defaults(world_size):
    """What the toy changes in the defaults above; any flag on the command line still wins. Global batches do not depend on the ranks.

    Frame use comes from the attention of the first layer: on the toy's known evidence it was above chance on every checkpoint checked
    (evaluate.py --frame_use_check), while the paper's lies at chance; the paper's is computed and logged beside it. Beta is higher
    because at a learning rate that a 1.2 M-parameter model needs to move in 80 steps, what no reward asks for drifts.
    """
    return dict(
        clip="local-dir:{toy}/clip", min_pixels=56 * 56, max_pixels=56 * 56, max_completion_length=96, length_bonus=0.0,
        sft_learning_rate=2e-3, sft_max_steps=600, sft_per_device_batch_size=max(1, 32 // world_size), learning_rate=2e-4, beta=0.1,
        max_steps=80, per_device_train_batch_size=max(1, 16 // world_size), max_grad_norm=1.0, frame_use="attention", frame_use_layer=1,
        decode_workers=0)


# ----------------------------------------------------------------------------------------------------------------- SFT


def batch_targets(examples, tokenizer, eos):
    """Demonstrations as groups of one: completions, mask (B, 1, T)."""
    targets = [tokenizer(target_text(example)).input_ids + [eos] for example in examples]
    length = max(map(len, targets))
    completions = torch.tensor([[ids + [eos] * (length - len(ids))] for ids in targets])
    mask = torch.tensor([[[True] * len(ids) + [False] * (length - len(ids))] for ids in targets])
    return completions, mask


def train_sft(arguments, model_path, processor, encoder, examples, skipped, checkpoint, writer):
    """Cold start: reasoning and answer as target, prompt masked, mean over the tokens of all ranks. Returns the checkpoint's folder."""
    world, rank = dist.get_world_size(), dist.get_rank()
    engine = start_engine(arguments, model_path, arguments.sft_per_device_batch_size, 1, arguments.sft_learning_rate)
    device = engine.device
    model, (done, kept) = engine.module.model, checkpoint.load(engine, "sft")
    lost = 0
    if kept:
        lost = kept["lost"]
        skipped.update(kept["skipped"])
    batch = arguments.sft_per_device_batch_size
    if batch * world > len(examples):
        raise DataError(f"SFT has {len(examples)} usable demonstrations, fewer than one batch of {batch * world}")
    steps = arguments.sft_max_steps if arguments.sft_max_steps > 0 else len(examples) // (batch * world)
    rng, order = random.Random(arguments.seed), []
    while len(order) < steps * batch * world:
        order += rng.sample(examples, len(examples))
    eos, inputs = processor.tokenizer.eos_token_id, Inputs(encoder, arguments.decode_workers, arguments.decode_timeout)

    def requests(step):
        """This rank's demonstrations of a step."""
        start = (step * world + rank) * batch
        return [(start + index, example, None) for index, example in enumerate(order[start : start + batch] if step < steps else [])]

    inputs.ahead(requests(done))
    progress = tqdm(range(done, steps), desc="SFT", unit="step", mininterval=1, initial=done, total=steps, disable=not is_main())
    for step in progress:
        begin = time.perf_counter()
        inputs.ahead(requests(step + 1))
        usable = inputs.usable(requests(step), arguments.max_prompt_length, skipped)
        fewest, everywhere = agree(len(usable), device)
        lost += batch * world - everywhere
        kept = dict(skipped=skipped, lost=lost)
        if fewest == 0:
            checkpoint.after_step(engine, "sft", step + 1, steps, **kept)
            continue
        _, chosen, items, _ = zip(*usable, strict=True)
        completions, mask = (tensor.to(device) for tensor in batch_targets(chosen, processor.tokenizer, eos))
        logp, *_ = engine(collate(items, model).to(device), completions, mask)
        tokens = mask.sum().float()
        dist.all_reduce(tokens)
        loss = -(logp * mask).sum() / tokens  # this rank's share of the mean over all ranks' tokens
        set_learning_rate(engine, step, steps, arguments.sft_learning_rate, arguments.warmup_ratio)
        with checkpoint.guard("sft", step, chosen):
            check_finite(loss.item(), "loss")
        engine.backward(loss * world)  # DeepSpeed averages gradients over ranks
        engine.step()
        values = {"loss/sft": [loss.item() * world], "time/step": [time.perf_counter() - begin]}
        metrics = average(values, tuple(values), device)
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
    consensus = reward.consensus_frame_reward(reward.merge_prior(torch.tensor(row["prior"]), len(use)), use.cpu())
    evidence = float(use.cpu() @ slot_shares(row["times"], example.evidence, len(use))) if example.evidence else None
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
    return rollout_frame_use(prompts, mask, chosen, None, arguments.tau, arguments.use_order, arguments.pool), paper


def accuracies(example, texts):
    return [reward.accuracy_reward(text, example.answer, example.problem_type) for text in texts]


def text_rewards(arguments, example, texts, lengths, shuffled):
    """The terms that need text only: {name: G values}. shuffled: accuracies of the control with shuffled frames, None without one."""
    accuracy = accuracies(example, texts)
    terms = {
        "accuracy": accuracy,
        "format": [reward.format_reward(text) for text in texts],
        "length": [reward.length_reward(length, value, arguments.length_low, arguments.length_high, arguments.length_bonus)
                   for length, value in zip(lengths, accuracy, strict=True)],
        "temporal": [0.0] * len(texts),
    }
    if arguments.alignment_weight:
        terms["alignment"] = [arguments.alignment_weight * reward.gate(right, arguments.gate) * reward.temporal_alignment_reward(
            reward.parse_claims(reward.extract_think(text)), example.grounding, buffer=arguments.alignment_buffer,
            threshold=arguments.alignment_threshold) for text, right in zip(texts, accuracy, strict=True)]
    if shuffled is not None:  # means over this question's own rollouts, never over the batch
        means = sum(accuracy) / len(accuracy), sum(shuffled) / len(shuffled)
        terms["temporal"] = [reward.temporal_reward(value, *means, arguments.temporal_gamma, arguments.temporal_ratio)
                             for value in accuracy]
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
    logp: torch.Tensor  # (B, G, T) of the sampled tokens
    texts: list  # B lists of G
    control_texts: dict  # {index of the question: texts with shuffled frames}


def sample_groups(arguments, model, processor, usable):
    """G completions of every question and, with --temporal, G/2 of every video's with shuffled frames, in one batch -> Rollouts.

    model: the bare one of sampling(); usable: (place in the run, which seeds it, example, model inputs, the control's or None).
    """
    places, examples, items, shuffled = zip(*usable, strict=True)
    group, half, device = arguments.num_generations, max(1, arguments.num_generations // 2), model.get_input_embeddings().weight.device
    seeds = [run_seed(arguments, place) for place in places]
    controls = {index: control for index, control in enumerate(shuffled) if control is not None}
    counts = [group] * len(items) + [half] * len(controls)
    row_seeds = [seeds[index] * 1_009 + number for index, count in zip([*range(len(items)), *controls], counts, strict=True)
                 for number in range(count)]
    prompts = collate([*items, *controls.values()], model).to(device)
    if arguments.freeze_vision:
        with torch.no_grad():
            prompts.features = Policy(model).encode(prompts)
    tokens, mask, texts, logp = sample_texts(model, processor, prompts, counts, row_seeds, arguments.max_completion_length,
                                             arguments.temperature, arguments.top_p, arguments.top_k, True, arguments.cuda_graph)
    own = len(items) * group
    longest = int(mask[:own].sum(-1).max())
    shape, visual = (len(items), group, longest), int(prompts.visual[: len(items)].sum())
    features = prompts.features and tuple(feature[:visual] if visual else feature for feature in prompts.features)  # 0: text, a blank image
    shaped = lambda tensor: tensor[:own, :longest].reshape(shape)  # noqa: E731
    return Rollouts(
        examples, replace(collate(items, model), features=features), shaped(tokens), shaped(mask), shaped(logp),
        [texts[start : start + group] for start in range(0, own, group)],
        {index: texts[own + place * half : own + (place + 1) * half] for place, index in enumerate(controls)})


METRICS = (
    *(f"reward/{name}" for name in ("total", "accuracy", "format", "length", "temporal", "alignment", "consensus", "consistency")),
    *(f"consensus/{name}" for name in ("score", "evidence_use", "paper_score", "paper_evidence_use")),
    *(f"loss/{name}" for name in ("policy", "kl", "ratio", "clip_fraction", "zero_variance_groups")),
    *(f"rollout/{name}" for name in ("length", "truncated", "entropy", "logp_difference", "shuffled_accuracy")),
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
    examples, texts, completions, mask = rollouts.examples, rollouts.texts, rollouts.completions, rollouts.mask
    lengths = mask.sum(-1)  # (B, G)

    # 1. log-probs of the reference, then one packed policy forward: log-probs and frame use
    clock = time.perf_counter()
    prompts, ref_logp = rollouts.prompts.to(engine.device), None
    if reference is not None:
        with torch.no_grad():
            ref_logp = reference(prompts, completions, mask, arguments.packed)[0]  # (B, G, T)
    clock = spend(values, "reference", clock)
    logp, entropy, hidden, attention, weights = engine(prompts, completions, mask, arguments.packed,
                                                       weight_alpha=weight_alpha(arguments), **use_layers(arguments))
    check_finite(logp.detach()[mask].sum().item(), "policy's log-probability")
    uses, paper_uses = frame_uses(arguments, prompts, mask, hidden, attention)

    # 2. rewards (Eq. 6-8)
    totals, anchors, lines = [], [], []
    for index, example in enumerate(examples):
        shuffled = accuracies(example, rollouts.control_texts[index]) if index in rollouts.control_texts else None
        terms = text_rewards(arguments, example, texts[index], lengths[index].tolist(), shuffled)
        values["rollout/shuffled_accuracy"] += shuffled or []
        consensus = [0.0] * len(texts[index])  # an image is one frame: nothing to choose, no consensus reward
        if uses[index][0] is not None:
            for names, group in ((("score", "evidence_use"), uses[index]), (("paper_score", "paper_evidence_use"), paper_uses[index])):
                scores = [use_scores(example, rows[example.id], use) for use in group]
                for name, column in zip(names, zip(*scores, strict=True), strict=True):
                    values[f"consensus/{name}"] += [value for value in column if value is not None]
                consensus = [score for score, _ in scores] if names[0] == "score" else consensus
        terms["consensus"] = [arguments.cfr_weight * reward.gate(right, arguments.gate) * score
                              for right, score in zip(terms["accuracy"], consensus, strict=True)]
        if arguments.consistency_coef:
            likelihoods = answer_likelihoods(processor.tokenizer, completions[index], mask[index], ref_logp[index])  # (G,)
            terms["consistency"] = reward.consistency_bonus(
                torch.tensor(terms["accuracy"]), likelihoods, arguments.consistency_coef, margin=arguments.consistency_margin,
                dense=arguments.consistency_dense).tolist()
        terms["total"] = [sum(column) for column in zip(*terms.values(), strict=True)]
        totals.append(terms["total"])
        anchors.append(terms["total"][0] + 1 - 2 * sum(terms["accuracy"]) / len(terms["accuracy"]))
        for name, column in terms.items():
            values[f"reward/{name}"] += column
        for number, text in enumerate(texts[index]):
            use = uses[index][number]
            lines.append({"problem_id": example.id, "question": example.question, "options": example.options, "text": text,
                          "answer": example.answer,
                          "rewards": {name: column[number] for name, column in terms.items()},
                          "prior": rows[example.id]["prior"] if use is not None else None,
                          "use": None if use is None else [round(value, 4) for value in use.tolist()]})

    # 3. advantages, loss, backward (Eq. 9-10)
    totals = torch.tensor(totals, device=engine.device)  # (B, G)
    degenerate = totals.amax(1) - totals.amin(1) < 1e-6  # (B,)
    anchors = torch.tensor(anchors, device=engine.device) if arguments.degenerate == "virtual_anchor" else None  # (B,)
    advantages = group_advantages(totals, scale=arguments.scale_rewards, anchors=anchors).flatten()  # (N,)
    dropped = degenerate if arguments.degenerate == "drop" else torch.zeros_like(degenerate)
    replay = {"prompts": prompts, "completions": completions, "mask": mask, "advantages": advantages,
              "ref_logp": ref_logp, "old_logp": rollouts.logp if arguments.old_logp == "sampled" else logp.detach(), "share": share,
              "dropped": dropped}
    backward_loss(arguments, engine, replay, logp, weights, values)
    spend(values, "policy", clock)
    values["loss/zero_variance_groups"] += degenerate.float().tolist()
    values["rollout/length"] += lengths.flatten().tolist()
    values["rollout/truncated"] += (lengths.flatten() >= arguments.max_completion_length).float().tolist()
    values["rollout/entropy"] += ((entropy * mask).sum(-1) / lengths).flatten().tolist()
    values["rollout/logp_difference"] += (((rollouts.logp - logp.detach()).abs() * mask).sum(-1) / lengths).flatten().tolist()
    return lines, replay


def weight_alpha(arguments):
    return arguments.token_weight_alpha if arguments.token_weight_alpha != 1 else None


def backward_loss(arguments, engine, replay, logp, weights, values):
    """Eq. 10 of one forward (logp, weights (B, G, T)) and its backward."""
    if replay["dropped"].any():
        weights = (torch.ones_like(logp) if weights is None else weights) * ~replay["dropped"][:, None, None]
    logp, old_logp, mask, ref_logp, weights = (tensor if tensor is None else tensor.flatten(0, 1) for tensor in (
        logp, replay["old_logp"], replay["mask"], replay["ref_logp"], weights))  # (N, T)
    loss, stats = policy_loss(logp, old_logp, replay["advantages"], mask, ref_logp, arguments.beta, arguments.clip_low,
                              arguments.clip_high, arguments.reduction, weights)
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
    scales = [mask.shape[2] / arguments.max_completion_length if arguments.reduction == "constant" else 1.0 for mask in masks]
    return [count * scale * dist.get_world_size() * arguments.gradient_accumulation_steps / max(total.item(), 1.0)
            for count, scale in zip(counts, scales, strict=True)]


def train_grpo(arguments, model_path, processor, encoder, stream, rows, skipped, checkpoint, writer, log_rollouts):
    """CF-GRPO on a stream of questions, with the starting checkpoint as frozen reference. Returns the folder of the trained one."""
    world, rank = dist.get_world_size(), dist.get_rank()
    batch, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    engine = start_engine(arguments, model_path, batch, accumulation, arguments.learning_rate)
    reference, averages = start_engine(arguments, model_path) if arguments.beta > 0 or arguments.consistency_coef else None, {}
    steps = len(stream) // (batch * world * accumulation)
    lost, (done, kept) = len(skipped), checkpoint.load(engine, "grpo")
    if kept:
        lost, averages = kept["lost"], kept["averages"]
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
                    order = random.Random(run_seed(arguments, place)).sample(range(len(row["frames"])), len(row["frames"]))
                part.append((place, example, row, order))
            parts.append(part)
        return parts

    inputs.ahead(request for part in requests(done) for request in part)
    progress = tqdm(range(done, steps), desc="GRPO", unit="step", mininterval=1, initial=done, total=steps, disable=not is_main())
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
        with sampling(engine) as model:  # everything is sampled before anything is learned: one gathering of the parameters a step
            sampled = [sample_groups(arguments, model, processor, usable) for usable in micro_batches]
        spend(values, "rollout", begin)
        shares, replays = loss_shares(arguments, [rollouts.mask for rollouts in sampled], engine.device), []
        for iteration in range(arguments.num_iterations):
            for number, (rollouts, share) in enumerate(zip(sampled, shares, strict=True)):
                engine.set_gradient_accumulation_boundary(number == len(sampled) - 1)
                with checkpoint.guard("grpo", step, rollouts.examples):
                    if iteration == 0:
                        lines, replay = grpo_micro_batch(arguments, engine, reference, processor, rollouts, rows, share, values)
                        if arguments.num_iterations > 1:
                            replays.append(replay)
                        log_rollouts([{"step": step, **line} for line in lines])
                    else:
                        clock, replay = time.perf_counter(), replays[number]
                        logp, *_, weights = engine(replay["prompts"], replay["completions"], replay["mask"], arguments.packed,
                                                   weight_alpha=weight_alpha(arguments))
                        backward_loss(arguments, engine, replay, logp, weights, values)
                        spend(values, "policy", clock)
                    clock = time.perf_counter()
                    engine.step()
                    spend(values, "update", clock)
                    norm = float(engine.get_global_grad_norm() or 0)  # stage 0 computes none
                    check_finite(norm, "norm of the gradient")
        if reference is not None and arguments.ema_decay < 1 and (step + 1) % arguments.ema_steps == 0:
            update_reference(reference, engine, averages, arguments.ema_decay)
        spend(values, "step", begin)
        metrics = average(values, METRICS, engine.device)
        if micro_batches and norm:
            metrics["loss/grad_norm"] = norm
        metrics["train/learning_rate"] = engine.get_lr()[0]
        record = {"stage": "grpo", "step": step, **metrics, "data/skipped": lost}
        writer(record)
        shown = {"reward": "reward/total", "acc": "reward/accuracy", "cfr": "consensus/score", "len": "rollout/length", "kl": "loss/kl",
                 "same": "loss/zero_variance_groups", "skipped": "data/skipped"}
        progress.set_postfix({short: f"{record[name]:.3g}" for short, name in shown.items() if name in record}, refresh=False)
        checkpoint.after_step(engine, "grpo", step + 1, steps, skipped=skipped, lost=lost, averages=averages)
    inputs.stop()
    checkpoint.release()
    folder = Path(arguments.output_dir) / "grpo"
    save_model(engine, processor, folder)
    engine.destroy()
    return folder


def question_stream(arguments, examples, world):
    """The run's questions in order, shuffled epoch by epoch, and how many make a step."""
    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * world
    wanted = arguments.max_steps * per_step if arguments.max_steps > 0 else int(arguments.num_train_epochs * len(examples))
    rng, stream = random.Random(arguments.seed), []
    while examples and len(stream) < wanted:
        stream += rng.sample(examples, len(examples))
    return stream[:wanted], per_step


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


@torch.no_grad()
def score_heldout(arguments, model_path, processor, encoder, examples, rows, batch=32):
    """Greedy and sampled answers on questions that were never trained on, every rank its share. Returns {name: mean}.

    'conflict' are the questions whose asked and most salient evidence differ. Frame use is read on the sampled completions.
    """
    engine, values = start_engine(arguments, model_path), defaultdict(list)
    kinds = sorted({kind(example) for example in examples})
    mine = list(enumerate(examples))[dist.get_rank() :: dist.get_world_size()]
    with sampling(engine) as model:
        for start in tqdm(range(0, len(mine), batch), desc="held-out", unit="batch", disable=not is_main(), leave=False):
            positions, part = zip(*mine[start : start + batch], strict=True)
            prompts = collate([encoder.encode(example, rows.get(example.id)) for example in part], model).to(engine.device)
            for decoding, temperature in (("greedy", 0.0), ("sampled", arguments.temperature)):
                seeds = [run_seed(arguments, position) for position in positions]
                tokens, mask, texts = sample_texts(model, processor, prompts, [1] * len(part), seeds, arguments.max_completion_length,
                                                   temperature, arguments.top_p, arguments.top_k, graph=arguments.cuda_graph)
                for example, text in zip(part, texts, strict=True):
                    (accuracy,) = accuracies(example, [text])
                    for name in (decoding, f"{decoding}/{kind(example)}"):
                        values[name].append(accuracy)
                    if example.extra.get("salient_is_asked") is False:
                        values[f"{decoding}/conflict"].append(accuracy)
            values["length"] += mask.sum(-1).tolist()
            _, _, hidden, attention, _ = Policy(model)(prompts, tokens[:, None], mask[:, None], **use_layers(arguments))  # the sampled ones
            for prefix, uses in zip(("", "paper_"), frame_uses(arguments, prompts, mask[:, None], hidden, attention), strict=True):
                for example, (use,) in zip(part, uses, strict=True):
                    if use is None:
                        continue
                    consensus, evidence = use_scores(example, rows[example.id], use)
                    values[f"{prefix}consensus"].append(consensus)
                    if evidence is not None:
                        values[f"{prefix}evidence_use"].append(evidence)
                        values["evidence_chance"].append(float(slot_shares(rows[example.id]["times"], example.evidence, len(use)).mean()))
    names = [f"{decoding}{rest}" for decoding in ("greedy", "sampled") for rest in ("", "/conflict", *(f"/{name}" for name in kinds))]
    names += ["consensus", "evidence_use", "paper_consensus", "paper_evidence_use", "evidence_chance", "length"]
    scores = average(values, names, engine.device)
    engine.destroy()
    return scores


def kind(example):
    """A question's row in the table: the toy's own kind, elsewhere its problem type."""
    return example.extra.get("kind", example.problem_type)


def print_table(arguments, before, after, seconds):
    """The end of a run, for people; result.json holds the same numbers."""
    use = f"{arguments.frame_use}, layer {arguments.frame_use_layer}"
    lines = [("held-out accuracy, greedy", "greedy"), ("  asked and salient evidence differ", "greedy/conflict")]
    lines += [(f"  {name.partition('/')[2]}", name) for name in after if name.startswith("greedy/") and name != "greedy/conflict"]
    lines += [("held-out accuracy, sampled", "sampled"), ("  asked and salient evidence differ", "sampled/conflict"),
              (f"consensus score ({use})", "consensus"), (f"frame use on the true evidence ({use})", "evidence_use"),
              ("consensus score (the paper's)", "paper_consensus"), ("frame use on the true evidence (paper's)", "paper_evidence_use"),
              ("  chance (uniform use)", "evidence_chance"), ("completion length, tokens", "length")]
    say(f"\n{'':52s}{'before GRPO':>12s}{'after':>10s}")
    for text, name in lines:
        if name in after:
            say(f"{text:52s}{before[name]:12.3f}{after[name]:10.3f}")
    say("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()) + "\n")


# ---------------------------------------------------------------------------------------------------------------- main


FOREIGN_FLAGS = {  # of the originals' launch scripts
    "--len_control": "--length_bonus 0.2 turns it on, --length_bonus 0 off", "--model_name": "--model_name_or_path",
    "--bf16": '"bf16" in the DeepSpeed configuration, on by itself on a GPU', "--torch_dtype": '"bf16" in the DeepSpeed configuration',
    "--attn_implementation": "none, it is sdpa, with its flash kernel on a GPU", "--use_vllm": "none, it samples itself",
    "--vllm_device": "none, it samples itself", "--report_to": '"tensorboard" or "wandb" in the DeepSpeed configuration',
    "--logging_steps": "none, every step is in metrics.jsonl", "--run_name": '"wandb" in the DeepSpeed configuration',
    "--lr_scheduler_type": "none, see --warmup_ratio", "--save_only_model": "--save_steps 0 keeps the final model alone",
    "--frames_num": "--frames", "--nframes": "--frames", "--dataset_path": "--dataset_name", "--eval_strategy": "--eval_dataset_name",
    "--alpha": "--token_weight_alpha", "--epsilon": "--clip_low and --clip_high", "--epsilon_high": "--clip_high",
    "--per_device_eval_batch_size": "none, held-out questions come 32 at a time", "--data_seed": "--seed"}


def parse_arguments():
    parser = HfArgumentParser((TrainArguments, prior.PriorSettings), allow_abbrev=False, description=__doc__,
                              formatter_class=argparse.RawDescriptionHelpFormatter)
    first, unknown = parser.parse_known_args()
    for name in (word.partition("=")[0] for word in unknown):
        if name in FOREIGN_FLAGS:
            raise DataError(f"{name} is a flag of the releases; here: {FOREIGN_FLAGS[name]}")
    if unknown:
        raise DataError(f"unknown: {' '.join(unknown)} (python train.py --help lists the flags)")
    recipe = dict(RECIPES[first.recipe])
    if first.dataset_name is None:
        if first.model_name_or_path is None and first.stage == "grpo":
            raise DataError("--stage grpo without a model would train an untrained toy; give --model_name_or_path or leave --stage out")
        folder = first.toy_dir or f"toy-seed{first.seed}"
        defaults = {name: value.format(toy=folder) if isinstance(value, str) else value
                    for name, value in toy_defaults(int(os.environ.get("WORLD_SIZE", 1))).items()}
        for name in ("learning_rate", "frames", "fps", "max_completion_length", "prior"):  # made for billions of parameters
            recipe.pop(name, None)
        parser.set_defaults(**defaults, toy_dir=folder)
    elif first.model_name_or_path is None:
        raise DataError("--dataset_name needs --model_name_or_path (a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint)")
    elif first.stage == "both":
        raise DataError("--stage both is for the toy; with your own data run --stage sft, then --stage grpo")
    if first.priors is not None:
        recipe.pop("prior", None)  # the file's cues are there to be looked at
    parser.set_defaults(**recipe)
    arguments, settings = parser.parse_args_into_dataclasses()
    if arguments.frame_use == "attention" and arguments.frame_use_layer < 1:
        raise DataError("--frame_use attention needs --frame_use_layer 1 (the first layer) or higher")
    if arguments.cuda_graph and not torch.cuda.is_available():
        raise DataError("--cuda_graph needs a GPU")
    if arguments.num_generations < 2 or arguments.save_total_limit < 1:
        raise DataError("--num_generations must be at least 2 and --save_total_limit at least 1")
    arguments.stage = arguments.stage or ("both" if arguments.model_name_or_path is None else "grpo")
    return arguments, settings


def priors_for(arguments, settings, examples, name, file=None):
    """Rows of the priors of `examples` and what was skipped: from a priors file and its list of errors, else from the examples' own
    frame_sets, else computed; on rank 0."""
    def build():
        rows, errors = prior.frame_set_rows([example for example in examples if "frame_sets" in example.extra], settings)
        others = [example for example in examples if "frame_sets" not in example.extra]
        if others:
            clip = None
            if settings.has_semantic:
                clip = prior.load_clip(settings.clip, settings.clip_pretrained, deepspeed.get_accelerator().current_device_name())
            more_rows, more_errors = prior.build_priors(others, clip, settings)
            rows, errors = rows + more_rows, errors + more_errors
        prior.write_lines(f"{path}.errors.jsonl", errors)
        prior.write_lines(path, rows)
        return {error["problem_id"]: error["cause"] for error in errors}

    made = Path(arguments.output_dir) / f"priors_{name}.jsonl"
    if file is None and made.is_file():  # of the run that this one goes on with
        file = made
    path, skipped = file or made, {}
    if file is not None and Path(f"{file}.errors.jsonl").is_file():
        errors = [json.loads(line) for line in Path(f"{file}.errors.jsonl").read_text(encoding="utf-8").splitlines()]
        skipped = {error["problem_id"]: error["cause"] for error in errors}
    if file is None:
        say(f"computing the priors of {len(examples)} {name} questions (prior.py does this ahead, --priors FILE reuses it)")
        skipped = on_main_first(build)
    for problem, cause in skipped.items():
        say(f"skipped {problem}: {cause}")
    return prior.load_priors(path, [example for example in examples if example.id not in skipped], settings), skipped


def run(arguments, settings):
    seconds, clock = {}, time.perf_counter()

    def lap(name):
        nonlocal clock
        seconds[name], clock = time.perf_counter() - clock, time.perf_counter()

    check_deepspeed_file(arguments)
    output = Path(arguments.output_dir)
    resume = on_main_first(lambda: prepare_output(output, arguments, settings))
    if resume is None:
        return
    set_seed(arguments.seed)
    model_path, data, heldout = arguments.model_name_or_path, arguments.dataset_name, arguments.eval_dataset_name
    sft_data = data
    if data is None:
        folder = Path(arguments.toy_dir)
        on_main_first(lambda: toy.make_toy(toy.ToyArguments(output_dir=str(folder), seed=arguments.seed)))
        sft_data, data, heldout = folder / "train_cot.json", folder / "train.json", heldout or folder / "heldout.json"
        model_path = model_path or folder / "model"
        lap("toy")
    if not Path(model_path).is_dir() and os.environ.get("HF_HUB_OFFLINE") == "1":
        raise DataError(f"model {model_path} is not a folder, and HF_HUB_OFFLINE forbids the hub")
    processor = AutoProcessor.from_pretrained(model_path)
    family = AutoConfig.from_pretrained(model_path).model_type
    if family not in FAMILIES:
        raise DataError(f"{model_path} is a {family} checkpoint, not one of {', '.join(FAMILIES)}")
    if arguments.frame_use == "attention" and family not in PACKED_FAMILIES:
        raise DataError(f"--frame_use attention works with {', '.join(PACKED_FAMILIES)}, not with {family}")
    encoder = Encoder(processor, arguments.min_pixels, arguments.max_pixels, settings.frames, read_template(arguments.prompt_template),
                      arguments.media_cache_gb, arguments.frame_times)
    files = {name: open(output / name, "a", encoding="utf-8") for name in ("metrics.jsonl", "rollouts.jsonl")} if is_main() else {}
    checkpoint = Checkpoints(arguments, processor, files, resume)
    tracker = Tracker(arguments)

    def write(name, *records):
        if is_main():
            files[name].writelines(json.dumps(record) + "\n" for record in records)
            files[name].flush()

    def log(record):
        write("metrics.jsonl", record)
        tracker.show(record)

    def score(path):
        return score_heldout(arguments, path, processor, encoder, heldout_examples, heldout_rows) if heldout_examples else {}

    def load(path):
        """-> examples of a data set, {problem_id: cause} of its rows that are none."""
        errors = []
        examples = load_examples(path, arguments.media_root, errors)
        errors = {error["problem_id"]: error["cause"] for error in errors}
        for problem, cause in errors.items():
            say(f"skipped {problem}: {cause}")
        unusable.update(errors)
        return examples, errors

    heldout_examples, heldout_rows, unusable = [], {}, {}
    if heldout:
        heldout_examples, _ = load(heldout)
        heldout_rows, broken = priors_for(arguments, settings, heldout_examples, "held-out")
        heldout_examples = [example for example in heldout_examples if example.id not in broken]
        lap("held-out priors")
    result = {"command": sys.argv, "seed": arguments.seed}
    if arguments.stage in ("sft", "both"):
        examples = [example for example in load(sft_data)[0] if example.reasoning]
        if not examples:
            raise DataError(f"{sft_data} has no reasoning traces (field `process`) for --stage sft")
        if resume.get("stage") == "grpo":
            model_path = output / "sft"
        else:
            model_path = train_sft(arguments, model_path, processor, encoder, examples, unusable, checkpoint, log)
        lap("SFT")
    before = checkpoint.shared["before"] = resume["before"] if resume.get("stage") == "grpo" else score(model_path)
    lap("scoring before")
    after = before
    if arguments.stage in ("grpo", "both"):
        examples, errors = load(data)
        stream, per_step = question_stream(arguments, examples, dist.get_world_size())
        asked = list({example.id: example for example in stream}.values())
        rows, skipped = priors_for(arguments, settings, asked, "training", arguments.priors)
        skipped.update(errors)
        lap("training priors")
        stream = [example for example in stream if example.id not in skipped]
        stream, result["inverted"], result["not_invertible"] = invert_share(stream, arguments.invert_questions, arguments.seed)
        if arguments.alignment_weight and not any(example.grounding for example in stream):
            raise DataError(f"--alignment_weight needs claims to compare with, and no question of {data} has the field grounding")
        if arguments.invert_questions and not result["inverted"]:
            raise DataError(f"--invert_questions: none of the chosen questions of {data} can be inverted")
        if arguments.alignment_weight:
            say(f"{sum(bool(example.grounding) for example in stream)} of {len(stream)} questions have timed claims (grounding)")
        if arguments.invert_questions:
            say(f"{result['inverted']} questions are inverted; {result['not_invertible']} chosen ones cannot be and stay as they are")
        if len(stream) < per_step:
            raise DataError(f"{len(stream)} usable questions ({len(skipped)} skipped) are fewer than one step's {per_step}")
        folder = train_grpo(arguments, model_path, processor, encoder, stream, rows, skipped, checkpoint,
                            log, lambda records: write("rollouts.jsonl", *records))
        lap("GRPO")
        after = score(folder)
        lap("scoring after")
        unusable.update(skipped)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, unusable)
    result["skipped"] = {problem: cause for one in everyone for problem, cause in one.items()}
    result["skipped_by_cause"] = dict(Counter(map(plain_cause, result["skipped"].values())).most_common())
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
    say(f"all of it is in {output}/: report.html, result.json, metrics.jsonl, rollouts.jsonl, checkpoints")


def plain_cause(cause):
    """Why something was skipped, without the names and numbers of its own."""
    cause = re.sub(r"^row \d+ (\(problem_id .*?\))?:? ?", "", cause) if cause.startswith("row ") else cause.partition(": ")[2] or cause
    return re.sub(r"\d[\d,.]*", "N", re.sub(r"\S*/\S*", "FILE", cause))


def prepare_output(output, arguments, settings):
    """The output folder with run.json, every setting of the run, and its files as they were at the checkpoint it goes on from, whose
    state is returned ({} at the beginning, None if the run is finished). An earlier run is not written over."""
    if arguments.resume_from_checkpoint == "auto" and (output / "result.json").is_file():
        say(f"{output} holds a finished run (result.json); nothing to do")
        return None
    resume = find_checkpoint(arguments)
    if arguments.resume_from_checkpoint is None and (output / "metrics.jsonl").exists():
        raise DataError(f"{output} holds an earlier run; remove it, choose another --output_dir, or --resume_from_checkpoint auto")
    output.mkdir(parents=True, exist_ok=True)
    found = [path.name for path in checkpoints(output)]
    later = found[found.index(Path(resume["folder"]).name) + 1 :] if resume else []
    for old in (*(output / name for name in later), *output.glob("*.unfinished")):
        say(f"removing {old}, of after the checkpoint that this run goes on from")
        shutil.rmtree(old)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with open(output / name, "ab") as file:
            file.truncate(min(file.tell(), resume.get("sizes", {}).get(name, 0)))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "deepspeed", "open_clip_torch", "decord")}
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    facts = {"command": sys.argv, "ranks": dist.get_world_size(), "revision": git.stdout.strip() or None, "versions": versions}
    (output / "run.json").write_text(json.dumps({**asdict(arguments), **asdict(settings), **facts}, indent=1), encoding="utf-8")
    return resume


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
