"""Stage 5: answers to a benchmark's questions, their scores, and the comparison of two runs.

On this machine, on one GPU or several (torchrun or deepspeed); the same command continues a run:
    python evaluate.py --model_name_or_path output/grpo --bench eval_mmvu.json --media_root DATA
    torchrun --nproc_per_node 8 evaluate.py --model_name_or_path output/grpo --bench ...
By an OpenAI-compatible server (vLLM, SGLang, ...):
    python evaluate.py --api_base http://localhost:8000/v1 --model_name_or_path NAME --bench ...
Stored answers, without a model; with a judge of their reasoning (TAC, VAS):
    python evaluate.py --rescore eval_mmvu_greedy_output.json --output report.json
    python evaluate.py --rescore report.json --output judged.json \\
        --judge_base http://localhost:8000/v1 --judge_model NAME
Whether the difference between two runs is more than noise:
    python evaluate.py compare first.json second.json
Whether frame use finds known evidence, layer by layer:
    python evaluate.py --model_name_or_path output/sft --bench toy-seed0/heldout.json \\
        --max_pixels 3136 --frame_use_check

Answers go to REPORT.predictions.jsonl as they are made, and the report is made from that file.
A question without an answer, because its row or medium is unusable or the server failed, counts as
wrong and is listed under `errors`; only server errors are tried again. common/scores.py has the
rules.

--frame_use_check needs `process` (reasoning that cites times) and `grounding` (which sentence is
true when) in the data set. It feeds the model the known reasoning and tests for every token in a
sentence about a known interval whether the token's frame use lies there.
"""

import argparse
import base64
import hashlib
import io
import json
import mimetypes
import os
import random
import re
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HTTPError, InferenceTimeoutError
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig
from transformers.utils import logging as hf_logging

import reward
from common import scores
from common.data import (
    DataError,
    MediaError,
    build_prompt,
    load_examples,
    read_template,
    target_text,
)
from common.flags import Help, Parser, flag
from common.media import Encoder
from common.policy import Policy, collate, load_model
from common.rollout import Sampling, read_turn, sample_texts
from common.workers import ShardedLines, check_settings, join_ranks, write_whole
from grpo import rollout_frame_use, slot_shares, token_frame_use
from prior import read_priors


@dataclass
class EvaluateArguments:
    model_name_or_path: str | None = flag(
        None,
        "Qwen-VL checkpoint, folder or hub id; with --api_base the server's name of the model.",
        group="Model and data",
    )
    dataset_name: str | None = flag(
        None,
        "Questions: Video-R1, SEED-Bench-R1, TW-GRPO or Video-R2 JSON or JSON lines.",
        aliases=["--bench"],
    )
    media_root: str | None = flag(
        None, "Folder that media paths start from. Default: the data set's."
    )
    rescore: str | None = flag(
        None,
        "Score stored answers instead: eval_results of Video-R1 and its descendants, TW-GRPO's "
        "log, lmms-eval samples, our own.",
    )
    output: str = flag(
        "report.json", "Report to write; the answers go beside it, to NAME.predictions.jsonl."
    )
    frames: int = flag(16, "Frames sampled evenly from a video.", group="Frames and prompt")
    min_pixels: int = flag(4 * 28 * 28, "Fewest pixels of a frame.")
    max_pixels: int = flag(256 * 28 * 28, "Most pixels of a frame (the paper's at inference).")
    prompt_template: str | None = flag(
        None,
        "Text file with {question} and {instruction}; replaces our wording. Scores depend on it.",
    )
    system_prompt: str | None = flag(
        None,
        "System turn before every question, as in training. None: the chat template's default.",
    )
    frame_times: str = flag(
        "none",
        "How frames show their times, as in training. For a model on this machine.",
        choices=["none", "text", "drawn"],
    )
    control: str = flag(
        "none",
        "How much of the score needs the video? Answer with the frames shuffled, all black, or "
        "without the medium, and compare.",
        choices=["none", "shuffled", "black", "question_only"],
    )
    max_completion_length: int = flag(1024, "Most tokens of an answer.", group="Sampling")
    temperature: float = flag(0.0, "0 is greedy.")
    top_p: float = flag(1.0, "Nucleus, when sampled.")
    top_k: int = flag(0, "Most probable tokens to choose from, when sampled; 0: all.")
    batch_size: int = flag(32, "Questions answered at once, on each rank.")
    seed: int = flag(0, "Seed of the sampling.")
    frame_use: str = flag(
        "none",
        "Also measure where each answer looks, by a layer's attention or, as in the paper, its "
        "hidden states.",
        choices=["none", "attention", "hidden"],
        group="Frame use",
    )
    frame_use_layer: int | None = flag(
        None, "That layer, 1 is the first; default: attention 1, hidden -1."
    )
    priors: str | None = flag(
        None,
        "prior.py's file for these questions: with --frame_use, the consensus of each answer's "
        "frame use with the prior (Eq. 6).",
    )
    frame_use_check: bool = flag(
        False, "Test the frame-use scores of every layer instead of answering."
    )
    api_base: str | None = flag(
        None,
        "Ask an OpenAI-compatible server, http://host:port/v1, instead; its key is the "
        "environment's OPENAI_API_KEY.",
        group="Servers",
    )
    api_media: str = flag(
        "images",
        "images: the sampled frames as PNG; video: the file, of which the server takes the frames.",
        choices=["images", "video"],
    )
    api_extra: str = flag(
        "{}",
        "JSON object of further fields of every request, such as "
        '\'{"mm_processor_kwargs": {"max_pixels": 200704}}\' for vLLM or '
        '\'{"chat_template_kwargs": {"num_frames": 16}}\' for `transformers serve`.',
    )
    api_workers: int = flag(8, "Questions that a server is asked at the same time.")
    api_timeout: float = flag(300.0, "Seconds to wait for an answer.")
    api_retries: int = flag(
        3, "Further tries after a timeout, a lost connection, or status 429 or 5xx."
    )
    judge_base: str | None = flag(
        None,
        "OpenAI-compatible server of a judge that reads the reasoning for TAC and VAS; its key is "
        "the environment's JUDGE_API_KEY.",
    )
    judge_model: str | None = flag(None, "The judge's name on that server.")
    local_rank: int = flag(-1, "Set by the deepspeed launcher.")

    def __post_init__(self):
        rescore = self.rescore
        elsewhere = self.api_base or rescore or self.control != "none"
        measures = self.frame_use != "none"
        # (whether the flags are wrong, what to say)
        checks = [
            (
                rescore and (self.dataset_name or self.model_name_or_path or self.api_base),
                "--rescore takes stored answers: no --dataset_name, --model_name_or_path or "
                "--api_base beside it",
            ),
            (
                not rescore and not (self.dataset_name and self.model_name_or_path),
                "give --model_name_or_path and --dataset_name (--bench), or --rescore FILE, or "
                "`compare FIRST SECOND`",
            ),
            (
                not is_address(self.api_base) or not is_address(self.judge_base),
                "--api_base and --judge_base are addresses of servers, http://host:port/v1",
            ),
            (
                self.api_base and self.frame_use_check,
                "--frame_use_check needs the model itself: no --api_base",
            ),
            (not is_object(self.api_extra), f"--api_extra {self.api_extra} is no JSON object"),
            (self.min_pixels > self.max_pixels, "--min_pixels must not be above --max_pixels"),
            (
                min(self.temperature, self.top_k, self.api_retries) < 0 or not 0 < self.top_p <= 1,
                "--temperature, --top_k and --api_retries must be at least 0, --top_p above 0 and "
                "at most 1",
            ),
            (
                self.frame_times != "none" and (self.api_base or self.control == "black"),
                "--frame_times goes with a model on this machine and frames to be seen: no "
                "--api_base, no --control black",
            ),
            (
                self.api_media == "video" and self.control in ("shuffled", "black"),
                f"--control {self.control} changes frames; --api_media video sends the file as it "
                "is",
            ),
            (
                bool(self.judge_base) != bool(self.judge_model),
                "--judge_base and --judge_model go together",
            ),
            (
                (self.priors and not measures) or (measures and elsewhere),
                "--priors goes with --frame_use, and that with a model here, without --control",
            ),
            (
                rescore and os.path.realpath(rescore) == os.path.realpath(self.output),
                f"--output {self.output} is the --rescore file itself; choose another file",
            ),
        ]
        for name in (
            "frames",
            "min_pixels",
            "max_completion_length",
            "batch_size",
            "api_workers",
            "api_timeout",
        ):
            checks.append((getattr(self, name) <= 0, f"--{name} must be above 0"))
        # The first fault is named; the others show once it is mended.
        for wrong, message in checks:
            if wrong:
                raise DataError(message)
        # The layers of the default run and of the paper.
        if self.frame_use_layer is None:
            self.frame_use_layer = {"none": None, "attention": 1, "hidden": -1}[self.frame_use]


def is_address(text):
    return text is None or text.startswith(("http://", "https://"))


def is_object(text):
    """Whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


# ------------------------------------------------------------------------ what makes a score


def fingerprint(model):
    """Return a short sha1 of a folder's weight files: sizes, first and last megabytes.

    None for a hub id, whose revision says what it is.
    """
    if not os.path.isdir(model):
        return None
    # Hashing all of a large checkpoint would take minutes.
    digest = hashlib.sha1()
    for file in sorted(Path(model).glob("*.safetensors")):
        size = file.stat().st_size
        with open(file, "rb") as weights:
            for place in (0, max(0, size - (1 << 20))):
                weights.seek(place)
                digest.update(weights.read(1 << 20))
        digest.update(f"{file.name} {size}".encode())
    return digest.hexdigest()[:16]


def score_settings(arguments):
    """Return all settings that an answer depends on, dict for the report.

    A run continues an earlier one only if they are the same.
    """
    names = """model_name_or_path frames frame_times system_prompt min_pixels max_pixels
        max_completion_length temperature top_p top_k seed control""".split()
    # Padding in a batch changes the last bits of a greedy choice, so its size is one of them.
    if arguments.api_base:
        names += ["api_base", "api_media", "api_extra"]
    else:
        names += ["batch_size", "frame_use", "frame_use_layer", "priors"]
    settings = {name: getattr(arguments, name) for name in names}
    settings["prompt_template"] = read_template(arguments.prompt_template)
    settings["engine"] = "api" if arguments.api_base else "local"
    if arguments.api_base:
        return settings
    path = arguments.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise DataError(f"--model_name_or_path {path} is no checkpoint: {cause}") from error
    # Hidden states also have the embeddings, 0, and the state after the last norm, -1.
    layers = config.get_text_config().num_hidden_layers
    lowest = 1 if arguments.frame_use == "attention" else -1
    layer = arguments.frame_use_layer
    if layer is not None and not lowest <= layer <= layers:
        raise DataError(
            f"--frame_use_layer {layer}: the model has layers 1 to {layers} "
            "(hidden states also 0, and -1 after the last norm)"
        )
    return settings | {
        "model_revision": getattr(config, "_commit_hash", None),
        "weights": fingerprint(path),
        "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
    }


# ---------------------------------------------------------------------------- stored answers


@dataclass
class Answer:
    """What came back for a question: the text, or why there is none."""

    output: str = ""
    error: str | None = None
    frame_use: dict | None = None  # where it looked: see use_row


def prediction(example, settings, answer):
    """Make a line of the predictions file: the question in Video-R1's fields, its answer."""
    row = {
        "problem_id": example.id,
        "problem": example.question,
        "problem_type": example.problem_type,
        "options": example.options,
        "solution": example.answer,
        "evidence": example.evidence,
    }
    # What reports break scores down by.
    for name in (*scores.TASK_FIELDS, *scores.BREAKDOWNS, "path"):
        if name in example.extra:
            row[name] = example.extra[name]
    row["output"] = answer.output
    row["error"] = answer.error
    if answer.frame_use:
        row["frame_use"] = answer.frame_use
    return row | {"settings": settings}


def unusable(row, settings):
    """Make the line of a question whose row in the data set cannot be used."""
    line = dict.fromkeys(("problem_id", "problem", "problem_type", "solution", "output"), "")
    line["problem_id"] = row["problem_id"]
    line["error"] = f"unusable row: {row['cause']}"
    return line | {"settings": settings}


def stored_rows(path):
    """Rows of a predictions or judgements file, [] if it does not exist or is empty."""
    if not path.exists() or not path.stat().st_size:
        return []
    return scores.read_json(path)[0]


def check_row(path, row, questions, settings):
    """Raise DataError if a stored answer is of another question or of other settings."""
    # A problem_id is not enough: in many files it is a running number.
    known = questions.get(row.get("problem_id"), {})
    same = [row.get(name) == known.get(name) for name in ("problem", "solution")]
    if not known or not all(same) or "settings" not in row:
        raise DataError(
            f"{path} has a row of another data set ({row.get('problem_id')}); "
            "choose another --output"
        )
    remedy = "choose another --output, or delete it to begin anew"
    check_settings(path, row["settings"], settings, remedy)


def load_questions(arguments):
    """Read the data set.

    Returns:
        (examples, unusable rows as {"problem_id", "media", "cause"}, problem_ids of repeated rows).
    Raises:
        DataError: no row is usable.
    """
    errors = []
    examples = load_examples(arguments.dataset_name, arguments.media_root, errors)
    if not examples:
        raise DataError(
            f"none of the {len(errors)} rows of {arguments.dataset_name} can be used; "
            f"the first: {errors[0]['cause']}"
        )
    # No medium is read at all.
    if arguments.control == "question_only":
        examples = [replace(example, media="", media_type="text") for example in examples]
    # Repeated rows are warned about, unusable ones count as wrong.
    known = {example.id for example in examples}
    bad = []
    repeated = []
    for row in errors:
        if row["problem_id"] in known:
            repeated.append(row["problem_id"])
        else:
            bad.append(row)
            known.add(row["problem_id"])
    return examples, bad, repeated


def run_benchmark(arguments):
    """Answer this rank's share of the questions; rank 0 scores what all ranks stored."""
    rank, world = join_ranks()
    if world > 1 and arguments.api_base:
        raise DataError("--api_base asks from one process")
    examples, bad, repeated = load_questions(arguments)
    settings = score_settings(arguments)
    # What the file holds of every question when it is not answered.
    lines = [unusable(row, settings) for row in bad]
    questions = {line["problem_id"]: line for line in lines}
    for example in examples:
        questions[example.id] = prediction(example, settings, Answer())

    # Continue an earlier run. Only server errors can end otherwise the next time.
    file = ShardedLines(Path(arguments.output).with_suffix(".predictions.jsonl"), rank, world)
    final = []
    for row in stored_rows(file.path):
        check_row(file.path, row, questions, settings)
        if not (row["error"] or "").startswith("server error"):
            final.append(row)
    # All ranks have read the file before it changes.
    file.replace(final)
    done = {row["problem_id"] for row in final}
    if rank == 0:
        file.append([line for line in lines if line["problem_id"] not in done])
    # Either way batches of (Example, Answer), appended as they are made.
    if arguments.api_base:
        batches = ask_server(arguments, examples, done)
    else:
        batches = answer_here(arguments, examples, done, rank, world)
    for batch in batches:
        rows = []
        for example, answer in batch:
            if example.id not in done:
                rows.append(prediction(example, settings, answer))
        file.append(rows)
    file.close()
    if rank > 0:
        return

    # Score what the file holds, whichever runs and ranks wrote it, in the order of the data set.
    items = {item.problem_id: item for item in scores.read_predictions(file.path)[0]}
    if all(item.error for item in items.values()):
        first = items[examples[0].id].error
        raise DataError(f"none of {len(items)} questions could be answered; the first: {first}")
    benchmark = scores.benchmark_of(arguments.dataset_name)
    report = scores.make_report([items[name] for name in questions], benchmark, repeated)
    finish(arguments, report, {"dataset_name": arguments.dataset_name, **settings})


# ------------------------------------------------------------------------------ answers made here


def seed_of(arguments, position):
    """Seed of a question, the same in every run."""
    return arguments.seed * 1_000_003 + position


def frame_order(arguments, position, count):
    """Order in which a question's frames are shown: shuffled by --control shuffled alone."""
    order = list(range(count))
    if arguments.control == "shuffled":
        random.Random(seed_of(arguments, position)).shuffle(order)
    return order


def make_encoder(arguments, processor):
    return Encoder(
        processor,
        arguments.min_pixels,
        arguments.max_pixels,
        arguments.frames,
        read_template(arguments.prompt_template),
        frame_times=arguments.frame_times,
        system_prompt=arguments.system_prompt,
    )


def encode(encoder, example, arguments, position):
    """Encode an example under --control, which changes neither times nor number of tokens."""
    # Only the frames change places: their times stay in order.
    shuffle = None
    if arguments.control == "shuffled" and example.media_type != "text":
        count = len(encoder.load(example, None).frames)
        shuffle = frame_order(arguments, position, count)
    return encoder.encode(example, shuffle=shuffle, black=arguments.control == "black")


@dataclass
class FrameUse:
    """Where one answer looks, over the t temporal slots of its video."""

    slots: torch.Tensor  # (t,) frame use, sums to 1
    tokens: torch.Tensor  # (L, t) each token's cosine with a slot's states, or attention to it


@torch.no_grad()
def answer_batch(model, processor, prompts, seeds, arguments):
    """Sample one answer to each prompt and read where it looks.

    Args:
        prompts: Prompts of B rows, on the model's device.
        seeds: B ints.
        arguments: max_completion_length, temperature, top_p, top_k, frame_use, frame_use_layer.
    Returns:
        B texts; B FrameUse, None where a row has no video of two slots, or without frame_use.
    """
    settings = Sampling(
        arguments.max_completion_length, arguments.temperature, arguments.top_p, arguments.top_k
    )
    # One answer to each prompt, which rollout() also accepts in groups.
    counts = [1] * len(seeds)
    tokens, mask, _, texts = sample_texts(model, processor, prompts, counts, seeds, settings)
    uses = [None] * len(seeds)
    if arguments.frame_use == "none":
        return texts, uses
    # A second forward, on the sampled tokens, reads the asked layer.
    layer = arguments.frame_use_layer
    layers = {"attention_layer": layer}
    if arguments.frame_use == "hidden":
        layers = {"hidden_layers": (layer,)}
    scored = Policy(model)(prompts, tokens[:, None], mask[:, None], **layers)
    looked = (scored.hidden.get(layer), scored.attention)
    for row, (slots,) in enumerate(rollout_frame_use(prompts, mask[:, None], *looked)):
        if slots is not None:
            per_token = token_frame_use(prompts, row, mask[row].bool(), *looked)
            uses[row] = FrameUse(slots, per_token)
    return texts, uses


def strongest_events(tokens, share=0.05):
    """Pick the strongest token-slot pairs (the paper's figure 9).

    Args:
        tokens: (L, t).
        share: of all L * t pairs; at least one is picked.
    Returns:
        Flat indices token * t + slot, ascending.
    """
    count = max(1, round(share * tokens.numel()))
    return sorted(tokens.flatten().topk(count).indices.tolist())


def used_interval(use, times):
    """Interval of the most used slot and its neighbours with more than an even share.

    Args:
        use: (t,) frame use.
        times: seconds of the frames.
    Returns:
        [start s, end s].
    """
    # The last slot may have fewer frames.
    slots = len(use)
    per_slot = -(-len(times) // slots)
    first = int(use.argmax())
    last = first
    while first > 0 and use[first - 1] * slots > 1:
        first -= 1
    while last + 1 < slots and use[last + 1] * slots > 1:
        last += 1
    # A frame lasts until the next one.
    borders = [*times, 2 * times[-1] - times[-2]]
    return [borders[first * per_slot], borders[min((last + 1) * per_slot, len(times))]]


def use_row(example, times, use, prior):
    """Make the `frame_use` of a prediction.

    Args:
        times: seconds of the frames.
        use: FrameUse, or None.
        prior: the question's Prior, or None.
    Returns:
        None without a FrameUse, else dict of scores.frame_use_numbers; with a prior also `events`
        (strongest_events), `tokens`, their number L, and `consensus_slots`, the slots with more of
        the prior than an even share.
    Raises:
        DataError: the prior was made for other frames.
    """
    if use is None:
        return None
    count = len(use.slots)
    row = {"slots": use.slots.tolist(), "interval": used_interval(use.slots, times)}
    # Not known until the example or the prior says so.
    row |= dict.fromkeys(("evidence", "chance", "consensus", "enrichment"))
    if example.evidence:
        evidence = slot_shares(times, example.evidence, count)  # (t,)
        row["evidence"] = float(use.slots.cpu() @ evidence)
        row["chance"] = float(evidence.mean())
    if prior is None:
        return row
    if len(prior.times) != len(times) or not np.allclose(prior.times, times, atol=0.02):
        raise DataError(
            f"the prior of {example.id} was made for other frames; build it with this run's "
            "--frames"
        )
    # Eq. 6 on slots: the prior is of frames.
    merged = reward.merge_prior(torch.tensor(prior.prior), count)  # (t,)
    chosen = (merged * count > 1 + 1e-6).nonzero().flatten().tolist()
    # Figure 9 of the paper: are these events about the slots of the prior?
    events = strongest_events(use.tokens.cpu())
    row["consensus"] = reward.consensus_frame_reward(merged, use.slots)
    row["enrichment"] = scores.event_enrichment(events, count, chosen)
    return row | {"events": events, "tokens": len(use.tokens), "consensus_slots": chosen}


def answer_here(arguments, examples, done, rank, world):
    """Yield this rank's batches as lists of (Example, Answer).

    A batch has the same questions however many ranks there are and whatever is done, since padding
    changes the last bits of a greedy choice. If any answer is missing, all are made again.
    """
    size = arguments.batch_size
    priors = {}
    if arguments.priors:
        priors = {prior.problem_id: prior for prior in read_priors(arguments.priors)}
    model = None
    starts = range(rank * size, len(examples), world * size)
    for start in tqdm(starts, desc="answer", unit="batch", disable=rank > 0):
        batch = dict(enumerate(examples[start : start + size], start))  # position: Example
        if done.issuperset(example.id for example in batch.values()):
            continue
        # A finished run loads no model.
        if model is None:
            model, processor = load_model(arguments.model_name_or_path)
            encoder = make_encoder(arguments, processor)
        # An unreadable medium costs its own question alone.
        inputs = {}
        answers = {}
        for position, example in batch.items():
            try:
                inputs[position] = encode(encoder, example, arguments, position)
            except MediaError as error:
                answers[position] = Answer(error=f"unreadable media: {error}")
        # Nothing to sample if no medium of the batch could be read.
        if inputs:
            prompts = collate(list(inputs.values()), model).to(model.device)
            seeds = [seed_of(arguments, position) for position in inputs]
            texts, uses = answer_batch(model, processor, prompts, seeds, arguments)
            for position, text, use in zip(inputs, texts, uses, strict=True):
                example = batch[position]
                row = use_row(example, inputs[position].times, use, priors.get(example.id))
                answers[position] = Answer(text, frame_use=row)
        # In the order of the data set, also where a medium was unreadable.
        yield [(batch[position], answers[position]) for position in batch]


# --------------------------------------------------------------------------- answers of a server


class ServerError(Exception):
    """A server gave no answer, however often it was asked."""


def server(base, key_name, arguments):
    # Without a key the client would send the one of huggingface.co that it finds on this machine.
    key = os.environ.get(key_name, "none")
    return InferenceClient(base_url=base, api_key=key, timeout=arguments.api_timeout)


def chat(client, retries, messages, **settings):
    """Ask a server once, and again after 1, 2, 4... seconds where another try may help.

    A server that cuts off the think block (`transformers serve`, vLLM's reasoning parsers) sends it
    apart; it is put back.

    Returns:
        Text of the answer.
    Raises:
        ServerError: with the cause.
    """
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            message = client.chat_completion(messages, **settings).choices[0].message
            text = message.content or ""
            # The field has two names among servers.
            thought = message.reasoning or getattr(message, "reasoning_content", None)
            return f"<think>{thought}</think>{text}" if thought else text
        except (HTTPError, InferenceTimeoutError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            cause = " ".join(str(error).split())[:300] or type(error).__name__
            if status is not None:
                cause = f"status {status}, {cause}"
                # The request itself is wrong.
                if status != 429 and status < 500:
                    break
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            cause = f"no chat completion came back ({type(error).__name__}: {error})"
    raise ServerError(f"server error: {cause}")


def media_part(kind, content, mime):
    """Make the part of a message that holds an image or a video as a data URL."""
    url = f"data:{mime};base64,{base64.b64encode(content).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


class FrameEncoder(Encoder):
    """Loads and resizes frames without a processor: the server has its own."""

    factor = 28  # sides in pixels are multiples of it, as for Qwen2.5-VL


def frame_parts(arguments, example, position):
    """Make the parts of a message that hold an image, or a video's frames, as PNG."""
    encoder = FrameEncoder(None, arguments.min_pixels, arguments.max_pixels, arguments.frames)
    frames = encoder.load(example, None).frames  # (K, 3, h, w)
    frames = frames[frame_order(arguments, position, len(frames))]
    if arguments.control == "black":
        frames = torch.zeros_like(frames)
    parts = []
    # PNG, since JPEG would change the pixels.
    for frame in frames.permute(0, 2, 3, 1).numpy():
        picture = io.BytesIO()
        Image.fromarray(frame).save(picture, "PNG")
        parts.append(media_part("image", picture.getvalue(), "image/png"))
    return parts


def make_messages(arguments, example, position):
    """Make the turns of a request: system prompt, the medium and the question.

    Raises:
        MediaError: the medium cannot be read.
    """
    # The medium stands before the question, as in training.
    content = []
    if example.media_type == "video" and arguments.api_media == "video":
        if not os.path.isfile(example.media):
            raise MediaError(f"{example.media}: no such file")
        mime = mimetypes.guess_type(example.media)[0] or "video/mp4"
        content.append(media_part("video", Path(example.media).read_bytes(), mime))
    elif example.media_type != "text":
        content += frame_parts(arguments, example, position)
    text = build_prompt(example, read_template(arguments.prompt_template))
    content.append({"type": "text", "text": text})
    messages = [{"role": "user", "content": content}]
    if arguments.system_prompt:
        messages.insert(0, {"role": "system", "content": arguments.system_prompt})
    return messages


def in_threads(arguments, function, tasks, name, unit):
    """Yield (task, Future of function(*task)) as they finish, --api_workers at a time."""
    with ThreadPoolExecutor(arguments.api_workers) as pool:
        futures = {pool.submit(function, *task): task for task in tasks}
        try:
            for future in tqdm(as_completed(futures), name, len(futures), unit=unit):
                yield futures[future], future
        finally:
            # On an interruption, what waits in the queue is not asked any more.
            pool.shutdown(wait=False, cancel_futures=True)


def ask_server(arguments, examples, done):
    """Yield answers of an OpenAI-compatible server as they come: lists of one (Example, Answer)."""
    client = server(arguments.api_base, "OPENAI_API_KEY", arguments)
    # The user's fields win over ours.
    extra = json.loads(arguments.api_extra)
    if arguments.top_k and arguments.temperature:
        # A field of vLLM and SGLang, not of the protocol.
        extra = {"top_k": arguments.top_k, **extra}
    settings = {
        "model": arguments.model_name_or_path,
        "max_tokens": arguments.max_completion_length,
        "top_p": arguments.top_p,
        "temperature": arguments.temperature,
        "extra_body": extra,
    }

    def ask(position, example):
        seed = seed_of(arguments, position)
        try:
            messages = make_messages(arguments, example, position)
            return Answer(chat(client, arguments.api_retries, messages, seed=seed, **settings))
        except MediaError as error:
            return Answer(error=f"unreadable media: {error}")
        except ServerError as error:
            return Answer(error=str(error))

    tasks = [task for task in enumerate(examples) if task[1].id not in done]
    for (_, example), future in in_threads(arguments, ask, tasks, "ask", "question"):
        yield [(example, future.result())]


# --------------------------------------------------------------------- a judge of the reasoning

# The project's wording of the questions to Video-R2's judge.
READ_ANSWER = """Below are the options of a question (none when it asks for a number) and a final \
answer to it. Say which option the answer
names. Do not solve the question and do not infer anything that is not written. Reply with the \
option's capital letter, or with the bare
number, or with UNKNOWN when the answer names none.

Options:
{options}

Final answer:
{answer}"""
READ_CONCLUSION = """Below are the options of a question (none when it asks for a number) and \
somebody's reasoning about it. Say which
option the reasoning itself concludes. The last explicit conclusion counts; the exact text of an \
option stands for its letter. Do not judge
whether it is right and do not conclude anything in its place. Reply with the option's capital \
letter, the bare number, or UNKNOWN.

Options:
{options}

Reasoning:
{reasoning}"""
RATE_ATTENTION = """Below are a question about a video and somebody's reasoning about it. Rate \
from 0 to 10 how far the reasoning claims
concrete visual evidence from the video. Whether the claims or the answer are true does not matter.
10: dense and specific, step by step: entities, attributes, counts, text on screen, positions, \
order of events
7-9: several specific claims about the video    4-6: concrete facts without where or when    \
1-3: a generic mention, or matching of options
0: none, or guessing
Reply with JSON alone: {{"score": 0, "rationale": "one sentence"}}

Question:
{question}

Reasoning:
{reasoning}"""


def rating_of(reply):
    """Read a reply to RATE_ATTENTION: 0 to 10, None without a score."""
    rating = re.search(r'"score"\s*:\s*(-?\d+(?:\.\d+)?)', reply)
    return min(10.0, max(0.0, float(rating[1]))) if rating else None


def judge_one(arguments, client, record):
    """Ask the judge about one output.

    Returns:
        {"answer", "conclusion": its replies, "" for UNKNOWN or where there is nothing to read,
        "vas": 0 to 10, None without a rating}.
    Raises:
        ServerError.
    """

    def ask(prompt):
        messages = [{"role": "user", "content": prompt}]
        settings = {"model": arguments.judge_model, "max_tokens": 256}
        text = chat(client, arguments.api_retries, messages, temperature=0.0, top_p=1.0, **settings)
        # A judge may think, too.
        return text.rpartition("</think>")[2].strip()

    def read(prompt):
        reply = ask(prompt)
        return "" if reply.upper().startswith("UNKNOWN") else reply.strip("()*. ")

    # Without reasoning there is no attention to the video: 0 of 10.
    replies = {"answer": "", "conclusion": "", "vas": 0.0}
    options = "\n".join(record["options"]) or "(none)"
    answer = scores.last_block(record["output"], "answer")
    if answer:
        replies["answer"] = read(READ_ANSWER.format(options=options, answer=answer))
    think = scores.last_block(record["output"], "think")
    if think:
        prompt = READ_CONCLUSION.format(options=options, reasoning=think)
        replies["conclusion"] = read(prompt)
    # Video-R2 rates the first think block, and reads the conclusion of the last.
    first_think = reward.extract_think(record["output"])
    if first_think:
        question = "\n".join([record["problem"], *record["options"]])
        prompt = RATE_ATTENTION.format(question=question, reasoning=first_think)
        replies["vas"] = rating_of(ask(prompt))
        if replies["vas"] is None:
            replies["vas"] = rating_of(ask(f"{prompt}\n\nJSON only."))
    return replies


def can_compare(record):
    """Whether the solution is a letter or a number, to be compared with a judge's reply."""
    if record["problem_type"] == "multiple choice":
        return not scores.several_letters(record["solution"])
    return record["problem_type"] in ("numerical", "regression")


def judge_report(arguments, report):
    """Have every output judged; the replies are appended to REPORT.judged.jsonl as they come.

    Returns:
        dict, the report's `judged`: TAC, consistency rate and VAS.
    Raises:
        DataError: the judge answered nothing.
    """
    judge = {"judge_model": arguments.judge_model, "judge_base": arguments.judge_base}
    file = ShardedLines(Path(arguments.output).with_suffix(".judged.jsonl"), 0, 1)
    # What this judge read in earlier runs is not asked again; errors are.
    judged = {}  # (problem_id, output): replies
    for row in stored_rows(file.path):
        same = [row[name] for name in judge] == list(judge.values())
        if same and "error" not in row["told"]:
            judged[row["problem_id"], row["output"]] = row["told"]
    client = server(arguments.judge_base, "JUDGE_API_KEY", arguments)
    outputs = []
    tasks = []
    for record in report["results"]:
        # Outputs that exist are judged, right or wrong.
        if record["output"].strip() and not record["error"]:
            outputs.append(record)
            if (record["problem_id"], record["output"]) not in judged:
                tasks.append((arguments, client, record))
    failed = {}
    for (_, _, record), future in in_threads(arguments, judge_one, tasks, "judge", "answer"):
        row = {"problem_id": record["problem_id"], "output": record["output"], **judge}
        try:
            row["told"] = future.result()
        except ServerError as error:
            failed[record["problem_id"]] = str(error)
            continue
        judged[record["problem_id"], record["output"]] = row["told"]
        file.append([row])
    file.close()
    if failed and len(failed) == len(outputs):
        first = next(iter(failed.values()))
        raise DataError(
            f"{arguments.judge_base} judged none of {len(failed)} answers; the first: {first}"
        )

    # TAC is over the answers that have one letter or a number, VAS over all.
    readings = {}
    ratings = []
    for record in report["results"]:
        name = record["problem_id"]
        if name in failed:
            continue
        # Without an output there is nothing to read.
        nothing = {"answer": "", "conclusion": "", "vas": None}
        replies = judged.get((name, record["output"]), nothing)
        if replies["vas"] is not None:
            ratings.append(replies["vas"])
        if can_compare(record):
            readings[name] = (replies["answer"], replies["conclusion"])
    metrics = scores.reasoning_metrics(report["results"], readings, judge=arguments.judge_model)
    return metrics | {
        "VAS": {
            "value": 10 * scores.mean(ratings) if ratings else None,
            "n": len(ratings),
            "not_rated": len(outputs) - len(ratings),
            "reason": "mean of the judge's 0 to 10, times 10, over outputs that were rated",
        },
        "failed": failed,
    }


# ------------------------------------------------------------------------ reports, comparisons


def share(value):
    return "     -" if value is None else f"{value:.4f}"


def listed(numbers):
    """Write numbers with their names in a line, without counts and tables."""
    words = []
    for name, value in numbers.items():
        if name not in ("n", "tasks"):
            words.append(f"{name} {share(value)}")
    return ", ".join(words)


def print_report(report):
    """Print the report's numbers as tables, and its warnings on stderr."""
    # One row for all questions, then one for each group.
    print(f"{'':32s}{'n':>7s}{'correct':>9s}{'accuracy':>10s}{'video_r1':>10s}{'format':>8s}")
    rows = {"all": report}
    for name, groups in report.items():
        if name == "by_type" or (name.startswith("by_") and len(groups) > 1):
            for value, row in groups.items():
                rows[f"  {value}"] = row
    for name, row in rows.items():
        print(
            f"{name[:31]:32s}{row['n']:7d}{row['correct']:9d}{share(row['accuracy']):>10s}"
            f"{share(row['accuracy_video_r1']):>10s}{share(row['format_rate']):>8s}"
        )
    for name, row in report.get("frame_use", {}).items():
        print(f"frame use, {name} ({row['n']}): {listed(row)}")
    for key, name in (("grounding", "cited times"), ("grounding_by_frame_use", "frame use")):
        if key in report:
            row = report[key]
            print(
                f"grounding by {name}, {row['predicted']} of {row['n']} have one: "
                f"Acc@GQA {share(row['acc_gqa'])}, mIoP {share(row['mIoP'])}, "
                f"mIoU {share(row['mIoU'])}"
            )
    for mode, row in report.get("vsi_bench", {}).items():
        print(f"VSI-Bench, {mode}: {listed(row)}")
    for name, row in report.get("several_letters", {}).items():
        if name != "per_option_accuracy":
            print(
                f"{name}: {row['n']} questions, all letters right in "
                f"{share(row['per_question_accuracy'])}, with partial credit "
                f"{share(row['partial_accuracy'])}"
            )
    judged = report["judged"]
    if judged["judge"]:
        numbers = {**judged["TAC"], "consistency rate": judged["consistency_rate"]}
        vas = judged["VAS"]["value"]
        print(
            f"reasoning, read by {judged['judge']}: {judged['no_conclusion']} of "
            f"{judged['outputs']} never conclude; {listed(numbers)}"
            + ("" if vas is None else f", VAS {vas:.1f}")
        )
    for kind, causes in report["errors"].items():
        problem, cause = next(iter(causes.items()))
        print(f"{len(causes)} count as wrong, {kind}; the first is {problem}: {cause}")
    for warning in report["warnings"]:
        print(f"evaluate.py: warning: {warning}", file=sys.stderr)


def write_json(path, document):
    write_whole(path, [json.dumps(document, indent=1).encode()])


def finish(arguments, report, settings):
    """Have the report judged if a judge is given, print it and write it."""
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    if arguments.judge_base:
        report["judged"] = judge_report(arguments, report)
    print_report(report)
    write_json(arguments.output, {"settings": settings, **report})
    print(f"the report is {arguments.output}")


def rescored(path):
    """Score stored predictions of any known format.

    Returns:
        (report, settings in the file).
    """
    items, repeated, source = scores.read_predictions(path)
    rows, settings = scores.read_json(path)
    # Lines of a predictions file have their settings each.
    first = rows[0].get("settings")
    if first and not settings and all(row.get("settings") == first for row in rows):
        settings = first
    benchmark = scores.benchmark_of(path, items)
    if not benchmark:
        benchmark = scores.benchmark_of(settings.get("dataset_name", ""), items)
    report = scores.make_report(items, benchmark, repeated)
    return report, {**settings, "rescored": str(path), "format": source}


def run_compare(first, second, output=None, seed=0):
    """Print what changed between two files of predictions or reports, and write it to `output`."""
    a, a_settings = rescored(first)
    b, b_settings = rescored(second)
    result = scores.compare(a["results"], b["results"], seed)
    # Another checkpoint is what people compare; another prompt or size they should see.
    differ = {}
    for name in {**a_settings, **b_settings}:
        pair = [a_settings.get(name), b_settings.get(name)]
        expected = name in ("rescored", "format", "weights", "model_name_or_path")
        if pair[0] != pair[1] and not expected:
            differ[name] = pair
    result["settings_that_differ"] = differ
    low, high = result["interval_95"]
    before, after = result["accuracy"]
    print(
        f"{result['n']} questions are in both files, {result['only_in_first']} only in the first, "
        f"{result['only_in_second']} only in the second\n"
        f"accuracy {before:.4f} and {after:.4f}; the second has {len(result['gains'])} gains and "
        f"{len(result['losses'])} losses\n"
        f"difference {result['difference']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f} (paired "
        f"bootstrap, seed {seed}); normalised gain {share(result['normalised_gain']).strip()}; "
        f"McNemar's exact p = {result['mcnemar_p']:.4g}"
    )
    for name, (one, other) in differ.items():
        print(f"made with another {name}: {one!r} and {other!r}")
    if output:
        write_json(output, result)


def parse_compare(words):
    parser = argparse.ArgumentParser(
        "evaluate.py compare",
        allow_abbrev=False,
        formatter_class=Help,
        description="Pair the questions of two reports or prediction files by problem_id: gains, "
        "losses, and whether they are more than noise.",
    )
    parser.add_argument("first", help="report or predictions of one run")
    parser.add_argument("second", help="of the other, over the same questions")
    parser.add_argument("--output", help="JSON file for gains, losses and the numbers")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    return parser.parse_args(words)


# -------------------------------------------------------------------------- frame use, checked


def cited_tokens(example, processor):
    """Find the tokens of the known reasoning whose sentence cites a time.

    Returns:
        ids, list of token ids of the reasoning; {token index: (start s, end s)}, the grounding
        interval that the token's sentence is about.
    """
    # The prompt may open the think block already.
    text = target_text(example).removeprefix(read_turn(processor).opening.strip())
    encoded = processor.tokenizer(
        text, return_offsets_mapping=True, add_special_tokens=False, split_special_tokens=True
    )
    intervals = {}
    for sentence in re.finditer(r"[^.<>]*\.", text):
        # One claim inside one known interval: then it is certain which scene the sentence is about.
        claims = reward.parse_claims(sentence.group())
        if len(claims) != 1:
            continue
        cited = claims[0][0]
        spans = [(start, end) for start, end, _ in example.grounding if start <= cited < end]
        if len(spans) != 1:
            continue
        for index, (begin, stop) in enumerate(encoded["offset_mapping"]):
            if sentence.start() <= begin and stop <= sentence.end():
                intervals[index] = spans[0]
    return encoded["input_ids"], intervals


def score_layers(policy, prompts, ids):
    """Run a completion through the model once a layer: a forward returns one layer's attention.

    Returns:
        {layer: attention (1, 1, T, P)}, {layer: hidden states (1, P + T, D)}.
    """
    layers = policy.model.config.text_config.num_hidden_layers
    completion = torch.tensor([[ids]], device=prompts.input_ids.device)  # (1, 1, T)
    mask = torch.ones_like(completion)
    attention = {}
    hidden = {}
    for layer in range(1, layers + 1):
        # All hidden states come with the first.
        asked = (*range(layers), -1) if layer == 1 else ()
        scored = policy(prompts, completion, mask, hidden_layers=asked, attention_layer=layer)
        attention[layer] = scored.attention
        hidden |= scored.hidden
    return attention, hidden


def uses_of_token(prompts, index, attention, hidden, tau=0.1):
    """Frame use of a token of the completion by every layer -> {name of the score: (t,)}."""
    slots = prompts.slots[0]
    columns = prompts.visual[0].nonzero().squeeze(1)  # (t*M,)
    uses = {}
    for layer, weights in attention.items():
        row = weights[:, 0, index : index + 1][..., columns]  # (1, 1, t*M)
        uses[f"attention, layer {layer}"] = reward.attention_use(row, slots)
    for layer, states in hidden.items():
        token = states[:, prompts.input_ids.shape[1] + index]  # (1, D)
        patches = states[0, columns].unflatten(0, (slots, -1))  # (t, M, D)
        for pool in ("max", "mean"):
            frames = reward.pool_frames(patches, pool)  # (t, D)
            uses[f"hidden, layer {layer}, {pool} pool"] = reward.frame_use(token, frames, tau)
    return uses


@torch.no_grad()
def check_frame_use(model, processor, encoder, examples):
    """Compare the frame use of tokens that describe a known scene with where the scene is.

    Returns:
        {name of the score: (share of tokens whose most used slot is in the scene, mass in the scene
        over chance)}, the last one is chance itself; number of tokens; {problem_id: cause} of
        unreadable examples.
    Raises:
        DataError: there are no such tokens.
    """
    policy = Policy(model)
    sums = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))  # hits, mass, chance
    count = 0
    broken = {}
    for example in tqdm(examples, desc="frame use", unit="question"):
        try:
            item = encoder.encode(example)
        except MediaError as error:
            broken[example.id] = str(error)
            continue
        ids, intervals = cited_tokens(example, processor)
        if not intervals or not item.times:
            continue
        prompts = collate([item], model).to(model.device)
        layers = score_layers(policy, prompts, ids)
        # Each token is scored by itself: sentences describe different scenes.
        for index, span in intervals.items():
            inside = slot_shares(item.times, [span], prompts.slots[0])  # (t,)
            chance = float(inside.mean())
            for name, use in uses_of_token(prompts, index, *layers).items():
                hit = float(inside[use.argmax()] > 0.5)
                mass = float(use.cpu() @ inside)
                sums[name] += torch.tensor([hit, mass, chance])
        count += len(intervals)
    if not count:
        raise DataError(
            "--frame_use_check found no reasoning sentence that cites a time inside a grounding "
            "interval"
        )
    table = {}
    for name, (hits, mass, chance) in sums.items():
        table[name] = ((hits / count).item(), (mass / chance).item())
    table["chance"] = ((chance / count).item(), 1.0)
    return table, count, broken


def run_check(arguments):
    """Print and write how well every layer's frame use finds known evidence."""
    examples = load_examples(arguments.dataset_name, arguments.media_root)
    settings = score_settings(arguments)
    model, processor = load_model(arguments.model_name_or_path)
    encoder = make_encoder(arguments, processor)
    table, count, broken = check_frame_use(model, processor, encoder, examples)
    print(f"{count} tokens that describe a known scene")
    print(f"{'frame use from':32s}{'argmax inside':>14s}{'mass over chance':>18s}")
    for name, (hits, mass) in sorted(table.items(), key=lambda row: -row[1][1]):
        print(f"{name:32s}{hits:14.3f}{mass:18.2f}")
    report = {"tokens": count, "frame_use": table, "errors": broken, "settings": settings}
    write_json(arguments.output, report)


def main():
    hf_logging.set_verbosity_error()
    words = sys.argv[1:]
    try:
        if words[:1] == ["compare"]:
            run_compare(**vars(parse_compare(words[1:])))
            return
        flags = Parser(EvaluateArguments, __doc__).parse_args(words)
        arguments = EvaluateArguments(**vars(flags))
        if arguments.rescore:
            finish(arguments, *rescored(arguments.rescore))
        elif arguments.frame_use_check:
            run_check(arguments)
        else:
            run_benchmark(arguments)
    except (DataError, OSError) as error:  # OSError: a file cannot be written
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
