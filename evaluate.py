"""Stage 5: answers to a benchmark's questions, their scores, and the comparison of two runs.

On this machine, on one GPU or several (torchrun or deepspeed); the same command continues a run:
    python evaluate.py --model_name_or_path output/grpo --bench eval_mmvu.json --media_root DATA
    torchrun --nproc_per_node 8 evaluate.py --model_name_or_path output/grpo --bench ...
One question, answered on the screen:
    python evaluate.py --model_name_or_path output/grpo --video clip.mp4 --question "Who falls?" \\
        --options "A. the cat" "B. the dog" --frame_use attention
By an OpenAI-compatible server (vLLM, SGLang, ...):
    python evaluate.py --api_base http://localhost:8000/v1 --model_name_or_path NAME --bench ...
Stored answers, without a model; with a judge of reasoning (TAC, VAS) and of open answers:
    python evaluate.py --rescore eval_mmvu_greedy_output.json --output report.json
    python evaluate.py --rescore report.json --output judged.json \\
        --judge_base http://localhost:8000/v1 --judge_model NAME
Whether the difference between two runs is more than noise:
    python evaluate.py compare first.json second.json
Whether frame use finds known evidence, layer by layer:
    python evaluate.py --model_name_or_path output/sft --bench toy-seed0/heldout.json \\
        --max_pixels 784 --frame_use_check

Answers go to REPORT.predictions.jsonl as they are made, and the report is made from that file.
A question without an answer, because its row or medium is unusable or the server failed, counts as
wrong and is listed under `errors`; only server errors are tried again. common/scores.py has the
rules.

--frame_use_check needs `process` (reasoning that cites times) and `grounding` (which sentence is
true when) in the data set. It feeds the model the known reasoning and tests for every token in a
sentence about a known interval whether the token's frame use lies there.
"""

import base64
import hashlib
import io
import json
import math
import mimetypes
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as hf_logging

import reward
from common import scores
from common.data import (
    DataError,
    Example,
    MediaError,
    build_prompt,
    differences,
    load_examples,
    read_choice,
    read_document,
    read_template,
    solution_letters,
    split_options,
    target_text,
    typed_example,
)
from common.flags import Parser, check_least, exit_codes, flag
from common.inputs import BATCH_TOKENS, Inputs, Ready, run_seed
from common.media import Encoder, PromptFlags, RunFlags
from common.workers import Pool, ShardedLines, check_settings, join_ranks, write_json
from grpo import rollout_frame_use, slot_shares, token_frame_use
from prior import load_priors, read_priors

# common.policy and common.rollout, whose imports take seconds, come with a local model alone.


@dataclass
class EvaluateArguments(RunFlags):
    model_name_or_path: str | None = flag(
        None,
        "Qwen-VL checkpoint, folder or hub id; with --api_base the server's name of the model.",
        group="Model and data",
    )
    dataset_name: str | None = flag(
        None,
        "Questions: Video-R1, SEED-Bench-R1, TW-GRPO, MVBench or Video-R2 JSON or JSON lines.",
        aliases=["--bench"],
    )
    question: str | None = flag(
        None, "One question instead of a data set: its answer is printed, and where it looked."
    )
    options: list[str] | None = flag(None, "Its options: 'A. red' 'B. blue', or red blue.")
    video: str | None = flag(None, "The video that --question is about.")
    image: list[str] | None = flag(None, "Pictures that it is about.")
    rescore: str | None = flag(
        None,
        "Score stored answers instead: eval_results of Video-R1 and its descendants, TW-GRPO's "
        "log, lmms-eval samples, our own.",
    )
    output: str = flag(
        "report.json", "Report to write; the answers go beside it, to NAME.predictions.jsonl."
    )
    control: str = flag(
        "none",
        "How much of the score needs the video? Answer with the frames shuffled, all black, or "
        "without the medium, and compare.",
        choices=["none", "shuffled", "black", "question_only"],
        group="Answers",
    )
    max_completion_length: int = flag(1024, "Most tokens of an answer.")
    temperature: float = flag(0.0, "0 is greedy.")
    top_p: float = flag(1.0, "Nucleus, when sampled.")
    batch_tokens: int = flag(
        BATCH_TOKENS,
        "Questions are answered together, on each rank, as long as their prompts and longest "
        "answers have so many tokens, padding included. A 7B model's cache has 57 kB a token.",
    )
    batch_size: int | None = flag(
        None, "Most questions answered together. None: a 16th of all, or 32 if that is more."
    )
    cuda_graph: bool = flag(
        torch.cuda.is_available(), "Replay the decode step as one CUDA graph; packed families only."
    )
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
        "OpenAI-compatible server of a judge that reads the reasoning for TAC and VAS, and says "
        "whether open answers are right; its key is the environment's JUDGE_API_KEY.",
    )
    judge_model: str | None = flag(None, "The judge's name on that server.")

    def __post_init__(self):
        super().__post_init__()
        check_least(self, max_completion_length=1, batch_tokens=1, batch_size=1, temperature=0)
        check_least(self, api_workers=1, api_timeout=1e-6, api_retries=0)
        # Without a frame use there is nothing to compare a prior with.
        if self.question and self.priors and self.frame_use == "none":
            self.frame_use = "attention"
        rescore = self.rescore
        sources = [source for source in (rescore, self.dataset_name, self.question) if source]
        servers = [base for base in (self.api_base, self.judge_base) if base]
        controlled = self.control != "none"
        measures = self.frame_use != "none" or self.frame_use_check
        try:
            api_extra = json.loads(self.api_extra)
        except ValueError:
            api_extra = None
        # {what to say: whether the flags are wrong}
        refusals = {
            "give --model_name_or_path and --dataset_name (--bench) or --question, or --rescore "
            "FILE with no --dataset_name and no model beside it, or `compare FIRST SECOND`": (
                len(sources) != 1
                or bool(rescore) == bool(self.model_name_or_path)
                or (rescore and self.api_base)
            ),
            "--options, --video and --image go with --question, --frame_use_check, --control and a "
            "judge with a data set": (
                self.frame_use_check or controlled or self.judge_base
                if self.question
                else self.options or self.video or self.image
            ),
            f"--output {self.output} is a file to be read; choose another": (
                os.path.realpath(self.output)
                in map(os.path.realpath, [*sources, self.priors or ""])
            ),
            f"--output {self.output} is a folder; give a file": os.path.isdir(self.output),
            "--api_base and --judge_base are addresses of servers, http://host:port/v1": (
                not all(base.startswith("http") for base in servers)
            ),
            f"--api_extra {self.api_extra} is no JSON object": not isinstance(api_extra, dict),
            "--judge_base and --judge_model go together": (
                bool(self.judge_base) != bool(self.judge_model)
            ),
            "--top_p must be above 0 and at most 1": not 0 < self.top_p <= 1,
            "--frame_times goes with a model on this machine and frames to be seen: no --api_base, "
            "no --control black": (
                self.frame_times != "none" and (self.api_base or self.control == "black")
            ),
            "--frame_use and --frame_use_check need a model on this machine: no --api_base, "
            "--rescore or --control": measures and (self.api_base or rescore or controlled),
            "--priors goes with --frame_use": self.priors and self.frame_use == "none",
            f"--control {self.control} changes frames; --api_media video sends the file as it is": (
                self.api_media == "video" and self.control in ("shuffled", "black")
            ),
        }
        # The first fault is named; the others show once it is mended.
        for message, wrong in refusals.items():
            if wrong:
                raise DataError(message)
        # The layers of the default run and of the paper.
        if self.frame_use_layer is None:
            self.frame_use_layer = {"none": None, "attention": 1, "hidden": -1}[self.frame_use]


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
    names = "model_name_or_path max_completion_length temperature top_p top_k seed control "
    # Padding in a batch changes the last bits of a greedy choice, so its size is one of them.
    here = "batch_tokens batch_size cuda_graph frame_use frame_use_layer priors"
    names += "api_base api_media api_extra" if arguments.api_base else here
    prompt = [one.name for one in fields(PromptFlags)]
    settings = {name: getattr(arguments, name) for name in [*prompt, *names.split()]}
    settings["prompt_template"] = read_template(arguments.prompt_template)
    if arguments.api_base:
        return settings | {"engine": "api"}
    path = arguments.model_name_or_path
    asked = {"needs_attention": arguments.frame_use == "attention" or arguments.frame_use_check}
    if arguments.frame_use_layer is not None:
        asked[f"{arguments.frame_use}_layer"] = arguments.frame_use_layer
    from common.policy import read_config

    config = read_config(path, **asked)
    return settings | {
        "engine": "local",
        "model_revision": getattr(config, "_commit_hash", None),
        "weights": fingerprint(path),
        "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
    }


# ---------------------------------------------------------------------------- stored answers


def question_fields(example):
    """Make the part of a line of the predictions that describes the question, as Video-R1 does."""
    values = {
        "problem_id": example.id,
        "problem": example.question,
        "problem_type": example.problem_type,
        "options": example.options,
        "solution": example.answer,
        "evidence": example.evidence,
    }
    # What reports break scores down by.
    for name in (*scores.TASK_FIELDS, *scores.BREAKDOWNS, *scores.CAPTION_FIELDS, "path"):
        if name in example.extra:
            values[name] = example.extra[name]
    return values


def stored_rows(path):
    """Rows of a predictions or judgements file, [] if it does not exist."""
    return read_document(path) if path.exists() else []


def check_row(path, row, questions, settings):
    """Raise DataError if a stored answer is of another question or of other settings."""
    # A problem_id is not enough: in many files it is a running number.
    known = questions.get(row.get("problem_id"))
    if not known or any(row.get(name) != known[name] for name in ("problem", "solution")):
        raise DataError(
            f"{path} has a row of another data set ({row.get('problem_id')}); "
            "choose another --output"
        )
    remedy = "choose another --output, or delete it to begin anew"
    check_settings(path, row.get("settings", {}), settings, remedy)


def load_questions(arguments):
    """Read the data set.

    Returns:
        (examples, {problem_id: answer} of unusable rows, problem_ids of repeated rows).
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
        examples = [replace(example, media=[]) for example in examples]
    # Repeated rows are warned about, unusable ones count as wrong.
    known = {example.id for example in examples}
    unusable = {}
    repeated = []
    for row in errors:
        name = row["problem_id"]
        if name in known or name in unusable:
            repeated.append(name)
        else:
            unusable[name] = {"error": f"unusable row: {row['cause']}"}
    return examples, unusable, repeated


def run_benchmark(arguments):
    """Answer this rank's share of the questions; rank 0 scores what all ranks stored."""
    rank, world = join_ranks()
    if world > 1 and arguments.api_base:
        raise DataError("--api_base asks from one process")
    examples, unusable, repeated = load_questions(arguments)
    settings = score_settings(arguments)
    questions = {}
    blank = [Example(name, "", [], "", "") for name in unusable]
    for example in [*blank, *examples]:
        questions[example.id] = question_fields(example)

    # Continue an earlier run. Only server errors can end otherwise the next time.
    file = ShardedLines(Path(arguments.output).with_suffix(".predictions.jsonl"), rank, world)
    final = []
    for row in stored_rows(file.path):
        check_row(file.path, row, questions, settings)
        if not (row.get("error") or "").startswith("server error"):
            final.append(row)
    # All ranks have read the file before it changes.
    file.replace(final)
    done = {row["problem_id"] for row in final}

    # problem_id, {"output" or "error", "frame_use"}, appended as they are made.
    if arguments.api_base:
        answers = ask_server(arguments, examples, done)
    else:
        answers = answer_here(arguments, examples, done, rank, world)
    # What every rank writes alike stands in the joined file once.
    for name, answer in chain(unusable.items(), answers):
        row = {**questions[name], "output": "", "error": None, **answer, "settings": settings}
        if name not in done:
            file.append([row])
    file.close()
    if rank > 0:
        return

    # Score what the file holds, whichever runs and ranks wrote it, in the order of the data set.
    stored = {item.problem_id: item for item in scores.read_predictions(file.path)[0]}
    items = [stored[name] for name in questions]
    if all(item.error for item in items):
        cause = items[-1].error
        raise DataError(f"none of {len(items)} questions could be answered; the last: {cause}")
    benchmark = scores.benchmark_of(arguments.dataset_name)
    report = scores.make_report(items, benchmark, repeated)
    report["differences"] = differences(examples)
    finish(arguments, report, {"dataset_name": arguments.dataset_name, **settings})


# ------------------------------------------------------------------------------ answers made here


def frame_order(arguments, position, count):
    """Order in which --control shuffled shows the frames of the question at a position."""
    order = list(range(count))
    random.Random(run_seed(arguments, position)).shuffle(order)
    return order


def encode(encoder, one):
    """Encode a Ready under --control, which changes neither times nor number of tokens.

    Returns:
        ModelInputs, None, as Inputs expects.
    """
    arguments = encoder.flags
    # Only the frames change places: their times stay in order.
    shuffle = None
    if arguments.control == "shuffled" and one.example.media:
        count = len(encoder.load(one.example.medium).frames)
        shuffle = frame_order(arguments, one.place, count)
    black = arguments.control == "black"
    return encoder.encode(one.example, shuffle=shuffle, black=black), None


def make_inputs(arguments, processor):
    """Inputs with the command line's encoder, workers and control."""
    encoder = Encoder(processor, arguments)
    return Inputs(encoder, arguments.decode_workers, arguments.decode_timeout, encode)


def frame_uses(answers, layer):
    """Read where a batch of rollout.Answers looks, over the t temporal slots of each video.

    Returns:
        {row: (slots, tokens)}, without rows that have no video of two slots; slots: (t,) frame use,
        sums to 1; tokens: (L, t) each token's cosine with a slot's states, or attention to it.
    """
    mask = answers.samples.mask[:, None]  # (B, 1, T)
    looked = (answers.scored.hidden.get(layer), answers.scored.attention)
    uses = {}
    for row, (slots,) in enumerate(rollout_frame_use(answers.prompts, mask, *looked)):
        if slots is not None:
            uses[row] = (slots, token_frame_use(answers.prompts, row, mask[row, 0], *looked))
    return uses


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


def use_row(example, times, prior, use, tokens):
    """Make the `frame_use` of a prediction.

    Args:
        times: seconds of the frames.
        prior: the question's Prior, or None.
        use, tokens: (t,) and (L, t), see frame_uses.
    Returns:
        dict: `slots`, (t,) shares of the temporal slots that sum to 1; `times`; `evidence`, the
        share on the slots that the answer rests on, and `chance`, that of even use; `consensus`,
        the agreement with the prior (Eq. 6); `enrichment`, see scores.event_enrichment. What is
        unknown is None.
        With a prior also `prior`, (t,) its shares of the slots, `consensus_slots`, those with more
        of it than an even share, `events` (strongest_events) and `tokens`, their number L.
    Raises:
        DataError: the prior was made for other frames.
    """
    count = len(use)
    row = {"slots": use.tolist(), "times": times}
    row |= dict.fromkeys(("evidence", "chance", "consensus", "enrichment"))
    if example.evidence:
        evidence = slot_shares(times, example.evidence, count)  # (t,)
        row["evidence"] = float(use.cpu() @ evidence)
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
    events = strongest_events(tokens.cpu())
    return row | {
        "consensus": reward.consensus_frame_reward(merged, use),
        "enrichment": scores.event_enrichment(events, count, chosen),
        "prior": merged.tolist(),
        "consensus_slots": chosen,
        "events": events,
        "tokens": len(tokens),
    }


def window_size(arguments, count):
    """Questions, of `count`, that are decoded together and answered in one batch or several.

    As many as fit one batch if each has a video, so that the media in memory are bounded, too.
    """
    prompt = math.ceil(arguments.frames / 2) * arguments.max_pixels // 28**2 + 256  # words: 256
    fit = arguments.batch_tokens // (prompt + arguments.max_completion_length)
    # Ranks get equal shares.
    most = arguments.batch_size or max(32, count // 16)
    return max(1, min(fit, most))


def answer_here(arguments, examples, done, rank, world):
    """Yield (problem_id, answer) of this rank's questions.

    A window has the same questions, and so the same batches, however many ranks there are and
    whatever is done, since padding changes the last bits of a greedy choice. If any answer of a
    window is missing, all are made again.
    """
    size = window_size(arguments, len(examples))
    priors = load_priors(arguments.priors, examples, arguments) if arguments.priors else {}
    starts = []  # of windows in the data set
    for start in range(rank * size, len(examples), world * size):
        if not done.issuperset(example.id for example in examples[start : start + size]):
            starts.append(start)
    # A finished run loads no model.
    if not starts:
        return
    from common.policy import load_model
    from common.rollout import Sampling, answer_inputs

    model, processor = load_model(arguments.model_name_or_path)
    inputs = make_inputs(arguments, processor)
    settings = Sampling(
        arguments.max_completion_length,
        arguments.temperature,
        arguments.top_p,
        arguments.top_k,
        arguments.cuda_graph,
    )
    budget = arguments.batch_tokens
    layer = arguments.frame_use_layer
    ways = {"attention": {"attention_layer": layer}, "hidden": {"hidden_layers": (layer,)}}
    layers = ways.get(arguments.frame_use, {})  # of a second forward; {}: none

    def window(start):
        asked = enumerate(examples[start : start + size], start)
        return [Ready(place, example, priors.get(example.id)) for place, example in asked]

    # Workers decode the next window while this one is answered.
    decoded = inputs.each(map(window, starts))
    for requests in tqdm(decoded, "answer", len(starts), unit="window", disable=rank > 0):
        # An unreadable medium costs its own question alone.
        ready, broken = inputs.take(requests)
        for name, cause in broken.items():
            yield name, {"error": f"unreadable media: {cause}"}
        made = [one.inputs for one in ready]
        seeds = [run_seed(arguments, one.place) for one in ready]
        for batch in answer_inputs(model, processor, made, seeds, settings, budget, **layers):
            uses = frame_uses(batch, layer) if layers else {}
            for row, place in enumerate(batch.places):
                one = ready[place]
                ended = bool(batch.samples.ended[row])
                answer = {"output": batch.samples.texts[row], "truncated": not ended}
                if row in uses:
                    seen = (one.example, one.inputs.times, one.prior)
                    answer["frame_use"] = use_row(*seen, *uses[row])
                yield one.example.id, answer


# --------------------------------------------------------------------------- answers of a server


class ServerError(Exception):
    """A server gave no answer, however often it was asked."""


def chat(arguments, base, key_name, messages, **settings):
    """Ask a server once, and again after 1, 2, 4... seconds where another try may help.

    A server that cuts off the think block (`transformers serve`, vLLM's reasoning parsers) sends it
    apart; it is put back.

    Args:
        base: the server's address.
        key_name: the environment's variable that holds the key.
        messages, settings: of a chat completion.
    Returns:
        {"output": text, "truncated": whether it was cut at max_tokens}.
    Raises:
        ServerError: with the cause.
    """
    # Without a key the client would send the one of huggingface.co that it finds on this machine.
    key = os.environ.get(key_name, "none")
    client = InferenceClient(base_url=base, api_key=key, timeout=arguments.api_timeout)
    for attempt in range(arguments.api_retries + 1):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            choice = client.chat_completion(messages, **settings).choices[0]
            message = choice.message
            text = message.content or ""
            if not isinstance(text, str):
                raise TypeError("its content is no text")
            # The field has two names among servers.
            thought = message.reasoning or getattr(message, "reasoning_content", None)
            if thought:
                text = f"<think>{thought}</think>{text}"
            return {"output": text, "truncated": choice.finish_reason == "length"}
        except HfHubHTTPError as error:
            status = error.response.status_code
            cause = f"status {status}, {error}"
            # The request itself is wrong.
            if status != 429 and status < 500:
                break
        # A lost connection, or something else than a chat completion.
        except (HTTPError, AttributeError, LookupError, TypeError, ValueError) as error:
            cause = f"no chat completion came back ({type(error).__name__}: {error})"
    raise ServerError(f"server error: {' '.join(cause.split())[:300]}")


def media_part(kind, content, mime):
    """Make the part of a message that holds an image or a video as a data URL."""
    url = f"data:{mime};base64,{base64.b64encode(content).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def media_parts(arguments, example, medium, position):
    """Make the parts of a message that hold a video file, or an image or frames as PNG.

    Args:
        medium: one of the example's.
    Raises:
        MediaError: the medium cannot be read.
    """
    # Of a span or a folder the server gets frames: it would see all of a file.
    whole = example.span == [None, None] and not os.path.isdir(medium.path)
    if medium.kind == "video" and arguments.api_media == "video" and whole:
        if not os.path.isfile(medium.path):
            raise MediaError(f"{medium.path}: no such file")
        mime = mimetypes.guess_type(medium.path)[0] or "video/mp4"
        return [media_part("video", Path(medium.path).read_bytes(), mime)]
    frames = Encoder(None, arguments).load(medium).frames  # (K, 3, h, w)
    if arguments.control == "shuffled":
        frames = frames[frame_order(arguments, position, len(frames))]
    # As in Encoder.encode: pictures beside a video stay.
    if arguments.control == "black" and medium.kind == example.media_type:
        frames = torch.zeros_like(frames)
    parts = []
    # PNG, since JPEG would change the pixels.
    for frame in frames.permute(0, 2, 3, 1).numpy():
        picture = io.BytesIO()
        Image.fromarray(frame).save(picture, "PNG")
        parts.append(media_part("image", picture.getvalue(), "image/png"))
    return parts


def make_messages(arguments, example, position):
    """Make the turns of a request: system prompt, the media and the question."""
    # The media stand before the question, as in training.
    content = []
    for medium in example.media:
        content += media_parts(arguments, example, medium, position)
    text = build_prompt(example, read_template(arguments.prompt_template))
    content.append({"type": "text", "text": text})
    messages = [{"role": "user", "content": content}]
    if arguments.system_prompt:
        messages.insert(0, {"role": "system", "content": arguments.system_prompt})
    return messages


def in_threads(arguments, function, tasks, name):
    """Call function(*task) for every task, --api_workers at a time.

    Yields:
        (task, dict that the function returned, or {"error": cause}) as they finish.
    """

    def call(task):
        try:
            return task, function(*task)
        except MediaError as error:
            return task, {"error": f"unreadable media: {error}"}
        except ServerError as error:
            return task, {"error": str(error)}

    # On an interruption, what waits in the queue is not asked any more.
    with ThreadPool(arguments.api_workers) as pool:
        yield from tqdm(pool.imap_unordered(call, tasks), name, len(tasks))


def ask_server(arguments, examples, done):
    """Yield (problem_id, answer) of an OpenAI-compatible server as the answers come."""
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

    # Workers decode: a decoder that hangs costs its question alone.
    pool = Pool(arguments.decode_workers, arguments.decode_timeout)

    def ask(position, example):
        task = pool.submit(make_messages, arguments, example, position)
        messages = pool.result(task, example.path)
        seed = run_seed(arguments, position)
        server = (arguments, arguments.api_base, "OPENAI_API_KEY")
        return chat(*server, messages, seed=seed, **settings)

    tasks = [task for task in enumerate(examples) if task[1].id not in done]
    try:
        for (_, example), answer in in_threads(arguments, ask, tasks, "ask"):
            yield example.id, answer
    finally:
        pool.stop()


# ------------------------------------------------------ a judge of reasoning and of open answers

# The project's wording of the questions to Video-R2's judge, and to a judge of correctness.
READ_ANSWER = """Below are the options of a question (none when it asks for a number) and a final \
answer to it. Say which option the answer
names. Do not solve the question and do not infer anything that is not written. Reply with the \
option's capital letter, or with the bare
number, or with UNKNOWN when the answer names none.

Options:
{options}

Final answer:
{prediction}"""
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
JUDGE_ANSWER = """Below are a question about a video, its reference answer and somebody's answer. \
Say whether the answer is right: whether it
means what the reference answer means, in whatever words or unit. More detail is no fault unless \
it contradicts the reference; an answer that
leaves out what was asked for, or names several possibilities, is wrong. Reply with CORRECT or \
WRONG alone.

Question:
{question}

Reference answer:
{solution}

Answer:
{prediction}"""
# TempCompass: a description is right if it leads a reader who has not seen the video to the answer.
READ_CAPTION = """Below are somebody's description of a video and a question about the video. \
Answer the question from the description alone.
Reply with the right option's capital letter, or with NONE when the description does not say or \
fits no option.

Description:
{prediction}

Question:
{mc_question}"""

JUDGE_TOKENS = 256  # most tokens of a judge's reply


def judge_prompts(record):
    """Make the questions to the judge about one output.

    Returns:
        {reading: prompt}: "answer" and "conclusion" for TAC, "vas", and "correct" for an open
        answer; without those that would be about nothing.
    """
    reasoning, _ = reward.split_output(record["output"])
    values = {
        **record,
        "options": "\n".join(record["options"]) or "(none)",
        "question": "\n".join([record["problem"], *record["options"]]),
        "reasoning": reasoning,
    }
    wordings = {}
    if scores.can_compare(record) and record["prediction"]:
        wordings["answer"] = READ_ANSWER
    if scores.can_compare(record) and reasoning:
        wordings["conclusion"] = READ_CONCLUSION
    if reasoning:
        wordings["vas"] = RATE_ATTENTION
    if scores.is_open(record):
        wordings["correct"] = READ_CAPTION if record["mc_question"] else JUDGE_ANSWER
    return {name: wording.format(**values) for name, wording in wordings.items()}


def read_reply(name, reply, record):
    """Read a judge's reply to one of judge_prompts.

    Returns:
        "answer", "conclusion": text, "" for UNKNOWN; "vas": 0 to 10; "correct": bool. None for a
        rating or verdict that is none, and for an empty reply.
    """
    if name in ("answer", "conclusion"):
        if not reply.strip():
            return None
        return "" if reply.upper().startswith("UNKNOWN") else reply.strip("()*. ")
    if name == "vas":
        rating = re.search(r'"score"\s*:\s*(-?\d+(?:\.\d+)?)', reply)
        return rating and min(10.0, max(0.0, float(rating[1])))
    if record["mc_question"]:
        options = split_options(record["mc_question"])[1]
        letter = read_choice(reply, options)
        known = letter or reply.upper().startswith("NONE")
        return letter == solution_letters(record["mc_answer"], options) if known else None
    verdict = re.match(r"\W*(correct|incorrect|wrong)\b", reply, re.IGNORECASE)
    return verdict and verdict[1].lower() == "correct"


def judge_one(arguments, record, name, prompt):
    """Ask the judge for one reading of an output -> {reading: value of read_reply}."""
    # A judge that gave no rating or verdict is asked once more.
    for reminder in ("", "\n\nJSON only." if name == "vas" else "\n\nOne word only."):
        reply = chat(
            arguments,
            arguments.judge_base,
            "JUDGE_API_KEY",
            [{"role": "user", "content": prompt + reminder}],
            model=arguments.judge_model,
            max_tokens=JUDGE_TOKENS,
            temperature=0.0,
            top_p=1.0,
        )
        # A judge may think, too.
        value = read_reply(name, reward.split_output(reply["output"])[1], record)
        if value is not None:
            break
    # No reading is no conclusion that agrees with another one.
    if value is None and name in ("answer", "conclusion"):
        raise ServerError("server error: the judge's reply was empty")
    return {name: value}


def judge_report(arguments, report):
    """Have every output judged; the readings are appended to REPORT.judged.jsonl as they come.

    Returns:
        dict, the report's `judged`: TAC, consistency rate, VAS and correctness.
    Raises:
        DataError: the judge answered nothing.
    """
    judge = {"judge_model": arguments.judge_model, "judge_base": arguments.judge_base}
    file = ShardedLines(Path(arguments.output).with_suffix(".judged.jsonl"), 0, 1)
    # What this judge read in earlier runs is not asked again.
    known = defaultdict(dict)  # {(problem_id, output): {reading: value}}
    for row in stored_rows(file.path):
        if judge.items() <= row.items():
            known[row["problem_id"], row["output"]].update(row["told"])
    readings = {}  # {problem_id: {reading: value}}
    tasks = []
    tokens = 0
    for record in filter(scores.has_output, report["results"]):
        told = known[record["problem_id"], record["output"]]
        readings[record["problem_id"]] = told
        for name, prompt in judge_prompts(record).items():
            if name not in told:
                tasks.append((record, name, prompt))
                tokens += len(prompt) // 4
    # Somebody may have to pay for it.
    print(
        f"{arguments.judge_model} at {arguments.judge_base} is asked {len(tasks)} times: about "
        f"{tokens} tokens to read, at most {JUDGE_TOKENS * len(tasks)} to write"
    )
    ask = partial(judge_one, arguments)
    failed = {}
    for (record, *_), told in in_threads(arguments, ask, tasks, "judge"):
        name = record["problem_id"]
        if "error" in told:
            failed[name] = told["error"]
        else:
            readings[name] |= told
            file.append([{"problem_id": name, "output": record["output"], **judge, "told": told}])
    file.close()
    if failed and not any(readings.values()):
        first = next(iter(failed.values()))
        raise DataError(
            f"{arguments.judge_base} judged none of {len(failed)} answers; the first: {first}"
        )
    # Half of the readings of an output would look like a judge that saw nothing.
    for name in failed:
        del readings[name]
    metrics = scores.reasoning_metrics(report["results"], readings, arguments.judge_model)
    return metrics | {
        "judge_base": arguments.judge_base,
        "correctness": scores.correctness(report["results"], readings, failed),
        "failed": failed,
    }


# ------------------------------------------------------------------------ reports, comparisons


def print_numbers(name, numbers):
    """Print the numbers of a dict in a line, and those of each dict inside in another."""
    words = []
    for key, value in numbers.items():
        if isinstance(value, dict):
            print_numbers(f"{name}, {key}", value)
        else:
            words.append(f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}")
    print(f"{name}: {', '.join(words)}")


def print_report(report):
    """Print the report's numbers, and its warnings on stderr."""
    rows = {"all": report}
    for name, groups in report.items():
        if name.startswith("by_"):
            rows |= groups
    print(f"{'':32s}      n  correct  accuracy  video_r1  format")
    for name, row in rows.items():
        print(
            f"{name[:31]:32s}{row['n']:7d}{row['correct']:9d}{row['accuracy']:10.4f}"
            f"{row['accuracy_video_r1']:10.4f}{row['format_rate']:8.4f}"
        )
    for name in ("vsi_bench", "grounding", "frame_use", "judged"):
        if name in report:
            print_numbers(name, report[name])
    for kind, causes in [*report["errors"].items(), *report["unread"].items()]:
        problem, cause = next(iter(causes.items()))
        print(f"{len(causes)} count as wrong, {kind}; the first is {problem}: {cause}")
    for warning in report["warnings"]:
        print(f"evaluate.py: warning: {warning}", file=sys.stderr)


def finish(arguments, report, settings):
    """Have the report judged if a judge is given, print it and write it."""
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
    items, repeated, settings = scores.read_predictions(path)
    source = settings.get("dataset_name", "")
    benchmark = scores.benchmark_of(path, items) or scores.benchmark_of(source)
    return scores.make_report(items, benchmark, repeated), settings | {"rescored": str(path)}


def run_compare(first, second, output, seed):
    """Print what changed between two files of predictions or reports, and write it to `output`."""
    if output and os.path.realpath(output) in map(os.path.realpath, (first, second)):
        raise DataError(f"--output {output} is one of the files that are compared")
    a, a_settings = rescored(first)
    b, b_settings = rescored(second)
    for path, report in ((first, a), (second, b)):
        failed = sum(map(len, report["errors"].values()))
        told = [f"{failed} questions failed and count as wrong"] if failed else []
        for warning in report["warnings"] + told:
            print(f"evaluate.py: warning: {path}: {warning}", file=sys.stderr)
    result = scores.compare(a["results"], b["results"], seed)
    # Another checkpoint is what people compare; another prompt or size they should see.
    differ = {}
    expected = ("rescored", "format", "weights", "model_name_or_path")
    for name in a_settings | b_settings:
        pair = [a_settings.get(name), b_settings.get(name)]
        if pair[0] != pair[1] and name not in expected:
            differ[name] = pair
    result["settings_that_differ"] = differ
    low, high = result["interval_95"]
    before, after = result["accuracy"]
    gain = "unknown"
    if result["normalised_gain"] is not None:
        gain = f"{result['normalised_gain']:.4f}"
    print(
        f"{result['n']} questions are in both files, {result['only_in_first']} only in the first, "
        f"{result['only_in_second']} only in the second\n"
        f"accuracy {before:.4f} and {after:.4f}; the second has {len(result['gains'])} gains and "
        f"{len(result['losses'])} losses\n"
        f"difference {result['difference']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f} (paired "
        f"bootstrap, seed {seed}); normalised gain {gain}; "
        f"McNemar's exact p = {result['mcnemar_p']:.4g}"
    )
    for name, (one, other) in differ.items():
        print(f"made with another {name}: {one!r} and {other!r}")
    worded = result["worded_otherwise"]
    if worded:
        print(f"{len(worded)} questions are worded otherwise in the second, such as {worded[0]}")
    if output:
        write_json(output, result)


def parse_compare(words):
    parser = Parser(
        (),
        "Pair the questions of two reports or prediction files by problem_id: gains, losses, and "
        "whether they are more than noise.",
        prog="evaluate.py compare",
    )
    parser.add_argument("first", help="report or predictions of one run")
    parser.add_argument("second", help="of the other, over the same questions")
    parser.add_argument("--output", help="JSON file for gains, losses and the numbers")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    return parser.parse_args(words)


# ------------------------------------------------------------------------------- one question


def print_bars(use):
    """Print a frame_use and its prior as bars over the times of the slots' first frames."""
    slots = len(use["slots"])
    times = use["times"][:: math.ceil(len(use["times"]) / slots)]
    rows = {"looked": use["slots"]}
    if "prior" in use:
        rows["prior"] = use["prior"]
    for begin in range(0, slots, 10):
        part = slice(begin, begin + 10)
        for name, shares in rows.items():
            # A full bar is the largest share.
            bars = [6 * " ▁▂▃▄▅▆▇█"[round(8 * share / max(shares))] for share in shares[part]]
            print(f"{name:8s}", *bars)
        print("seconds ", *(f"{time:6.1f}" for time in times[part]))


def run_question(arguments):
    """Answer the question of the command line: print reasoning, answer and where it looked."""
    example = typed_example(arguments.question, arguments.options, arguments.video, arguments.image)
    # Names what is wrong with the model.
    score_settings(arguments)
    if arguments.priors:
        # Many videos may have the same question.
        asked = (example.question, os.path.basename(example.path))
        for row in read_priors(arguments.priors):
            if asked == (row.question, os.path.basename(row.media or example.path)):
                break
        else:
            raise DataError(f"{arguments.priors} has no prior of this question about {asked[1]}")
        example.id = row.problem_id
        example.extra["path"] = row.media
    answers = answer_here(arguments, [example], set(), 0, 1)
    if arguments.api_base:
        answers = ask_server(arguments, [example], set())
    [(_, answer)] = answers
    if "error" in answer:
        raise DataError(answer["error"])
    reasoning, text = reward.split_output(answer["output"])
    print("\n".join([example.question, *example.options]))
    print(f"\nreasoning: {reasoning or '(none)'}\nanswer: {text or '(none)'}")
    if "frame_use" in answer:
        print_bars(answer["frame_use"])
    elif arguments.frame_use != "none":
        print("looked: there is no choice of frames")


# -------------------------------------------------------------------------- frame use, checked


def cited_tokens(example, processor, opening):
    """Find the tokens of the known reasoning whose sentence cites a time.

    Args:
        opening: what the prompt already says of the reasoning (rollout.Turn).
    Returns:
        ids, list of token ids of the reasoning; {token index: (start s, end s)}, the grounding
        interval that the token's sentence is about.
    """
    text = target_text(example).removeprefix(opening.strip())
    encoded = processor.tokenizer(
        text, return_offsets_mapping=True, add_special_tokens=False, split_special_tokens=True
    )
    intervals = {}
    for sentence in re.finditer(r"[^.<>]*\.", text):
        # One claim inside one known interval: then it is certain which scene the sentence is about.
        spans = []
        claims = reward.parse_claims(sentence.group())
        for cited, _, _ in claims:
            spans += [(start, end) for start, end, _ in example.grounding if start <= cited < end]
        if not len(claims) == len(spans) == 1:
            continue
        for index, (begin, stop) in enumerate(encoded["offset_mapping"]):
            if sentence.start() <= begin and stop <= sentence.end():
                intervals[index] = spans[0]
    return encoded["input_ids"], intervals


def score_layers(policy, prompts, ids):
    """Run a completion through the model once a layer: a forward returns one layer's attention.

    Returns:
        {name of the score: arguments of grpo.rollout_frame_use}.
    """
    layers = policy.model.config.text_config.num_hidden_layers
    completion = torch.tensor([[ids]], device=prompts.input_ids.device)  # (1, 1, T)
    mask = torch.ones_like(completion)
    uses = {}
    hidden = {}
    for layer in range(1, layers + 1):
        # All hidden states come with the first.
        asked = (*range(layers), -1) if layer == 1 else ()
        scored = policy(prompts, completion, mask, hidden_layers=asked, attention_layer=layer)
        uses[f"attention, layer {layer}"] = {"attention": scored.attention}
        hidden |= scored.hidden
    for layer, states in hidden.items():
        for pool in ("max", "mean"):
            uses[f"hidden, layer {layer}, {pool} pool"] = {"hidden": states, "pool": pool}
    return uses


@torch.no_grad()
def run_check(arguments):
    """Compare the frame use of tokens that describe a known scene with where the scene is.

    Print and write for every score {name: (share of the tokens whose most used slot is in the
    scene, mass in the scene over chance)}.
    """
    from common.policy import Policy, collate, load_model
    from common.rollout import read_turn

    examples = load_examples(arguments.dataset_name, arguments.media_root)
    settings = score_settings(arguments)
    model, processor = load_model(arguments.model_name_or_path)
    opening = read_turn(processor).opening
    inputs = make_inputs(arguments, processor)
    requests = ([Ready(place, example, None)] for place, example in enumerate(examples))
    hits = Counter()
    mass = Counter()
    count = 0
    broken = {}
    for batch in tqdm(inputs.each(requests), "frame use", len(examples), unit="question"):
        ready, causes = inputs.take(batch)
        broken |= causes
        # One question, or none if its medium is unreadable.
        for one in ready:
            ids, intervals = cited_tokens(one.example, processor, opening)
            prompts = collate([one.inputs], model).to(model.device)
            slots = prompts.slots[0]
            # In a video of one slot there is nothing to choose.
            if not intervals or slots < 2:
                continue
            layers = score_layers(Policy(model), prompts, ids)
            # Each token is scored by itself: sentences describe different scenes.
            for index, span in intervals.items():
                inside = slot_shares(one.inputs.times, [span], slots)  # (t,)
                token = torch.arange(len(ids))[None, None] == index  # (1, 1, T)
                for name, layer in layers.items():
                    use = rollout_frame_use(prompts, token, **layer)[0][0].cpu()  # (t,)
                    hits[name] += float(inside[use.argmax()] > 0.5)
                    mass[name] += float(use @ inside)
                hits["chance"] += float(inside.mean())
            count += len(intervals)
    if not count:
        raise DataError(
            "--frame_use_check found no reasoning sentence that cites a time inside a grounding "
            "interval"
        )
    mass["chance"] = hits["chance"]
    table = {name: (hits[name] / count, mass[name] / mass["chance"]) for name in hits}
    print(f"{count} tokens that describe a known scene")
    print(f"{'frame use from':32s}{'argmax inside':>14s}{'mass over chance':>18s}")
    for name, (inside, over) in sorted(table.items(), key=lambda row: -row[1][1]):
        print(f"{name:32s}{inside:14.3f}{over:18.2f}")
    report = {"tokens": count, "frame_use": table, "errors": broken, "settings": settings}
    write_json(arguments.output, report)


def main():
    hf_logging.set_verbosity_error()
    words = sys.argv[1:]
    with exit_codes("evaluate.py"):
        if words[:1] == ["compare"]:
            run_compare(**vars(parse_compare(words[1:])))
            return
        flags = Parser(EvaluateArguments, __doc__).parse_args(words)
        arguments = EvaluateArguments(**vars(flags))
        if arguments.rescore:
            finish(arguments, *rescored(arguments.rescore))
        elif arguments.question:
            run_question(arguments)
        elif arguments.frame_use_check:
            run_check(arguments)
        else:
            run_benchmark(arguments)


if __name__ == "__main__":
    main()
