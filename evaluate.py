"""Stage 5: answers to a benchmark's questions, their scores, and the comparison of two runs. scores.py has the rules.

    python evaluate.py --model_name_or_path output/grpo --bench eval_mmvu.json --media_root DATA --frames 16     # on this machine
    torchrun --nproc_per_node 8 evaluate.py --model_name_or_path ...          # or deepspeed; the same command again continues a killed run
    python evaluate.py --api_base http://localhost:8000/v1 --model_name_or_path NAME --bench ...                  # vLLM, SGLang, ...
    python evaluate.py --rescore eval_mmvu_greedy_output.json --output report.json              # stored answers, without a model
    python evaluate.py --rescore report.json --output judged.json --judge_base http://localhost:8000/v1 --judge_model NAME    # TAC, VAS
    python evaluate.py compare first.json second.json                                             # is the difference more than noise?
    python evaluate.py --model_name_or_path output/sft --bench toy-seed0/heldout.json --max_pixels 3136 --frame_use_check

Answers go to REPORT.predictions.jsonl as they are made, and the report is made from that file. A question without an answer, because its
row or medium is unusable or the server failed, counts as wrong and is listed under `errors`; only server errors are tried again.

The last needs `process` (reasoning that cites times) and `grounding` (which sentence is true when) in the data set. It feeds the model
the known reasoning and asks of every token in a sentence about a known interval: does its frame use lie there?
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
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HTTPError, InferenceTimeoutError
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, HfArgumentParser
from transformers.utils import logging as hf_logging

import reward
from common import scores
from common.data import (
    DataError,
    MediaError,
    build_prompt,
    load_examples,
    read_template,
    solution_letters,
    target_text,
)
from common.flags import Help
from common.media import (
    Encoder,
    decode_frames,
    load_image,
    open_video,
    resize_frames,
    uniform_frames,
)
from common.policy import Policy, collate, load_model
from common.rollout import Sampling, read_turn, sample_texts
from common.workers import append_lines, join_shards, write_whole
from grpo import rollout_frame_use, slot_shares, token_frame_use
from prior import read_priors


@dataclass
class EvaluateArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Qwen2-VL or Qwen2.5-VL checkpoint, folder or hub id; with --api_base the name that the server knows it by."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Questions: Video-R1, SEED-Bench-R1, TW-GRPO or Video-R2 JSON or .jsonl.",
            "aliases": ["--bench"],
        },
    )
    media_root: str | None = field(
        default=None,
        metadata={"help": "Folder that media paths start from. Default: the data set's."},
    )
    rescore: str | None = field(
        default=None,
        metadata={
            "help": "Score stored answers instead: eval_results of Video-R1 and its descendants, TW-GRPO's log, lmms-eval samples, our own."
        },
    )
    output: str = field(
        default="report.json",
        metadata={"help": "Report to write; the answers go beside it, to NAME.predictions.jsonl."},
    )
    frames: int = field(default=16, metadata={"help": "Frames sampled evenly from a video."})
    min_pixels: int = field(default=4 * 28 * 28, metadata={"help": "Fewest pixels a frame."})
    max_pixels: int = field(
        default=256 * 28 * 28, metadata={"help": "Most pixels a frame (the paper's at inference)."}
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Text file with {question} and {instruction}; replaces our wording. Scores depend on it."
        },
    )
    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "Text of a system turn before every question, as in training. None: what the chat template does by itself."
        },
    )
    frame_times: str = field(
        default="none",
        metadata={
            "help": "How frames say when they were taken, as in training: text, drawn, none. For a model on this machine.",
            "choices": ["none", "text", "drawn"],
        },
    )
    max_completion_length: int = field(default=1024, metadata={"help": "Most tokens of an answer."})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus, when sampled."})
    top_k: int = field(
        default=0, metadata={"help": "Most probable tokens to choose from, when sampled; 0: all."}
    )
    control: str = field(
        default="none",
        metadata={
            "help": "How much of the score needs the video? Answer with the frames shuffled, all black, or without the medium, and compare.",
            "choices": ["none", "shuffled", "black", "question_only"],
        },
    )
    frame_use: str = field(
        default="none",
        metadata={
            "help": "Also measure where each answer looks, by a layer's attention or, as in the paper, its hidden states.",
            "choices": ["none", "attention", "hidden"],
        },
    )
    frame_use_layer: int | None = field(
        default=None,
        metadata={"help": "That layer, 1 is the first; default: attention 1, hidden -1."},
    )
    priors: str | None = field(
        default=None,
        metadata={
            "help": "prior.py's file for these questions: with --frame_use, the consensus of each answer's use with the prior (Eq. 6)."
        },
    )
    batch_size: int = field(
        default=32, metadata={"help": "Questions answered at once, on each rank."}
    )
    seed: int = field(default=0, metadata={"help": "Of the sampling."})
    api_base: str | None = field(
        default=None,
        metadata={
            "help": "Ask an OpenAI-compatible server, http://host:port/v1, instead; its key comes from the environment's OPENAI_API_KEY."
        },
    )
    api_media: str = field(
        default="images",
        metadata={
            "help": "images: the sampled frames, PNG; video: the file as it is, of which the server takes the frames it likes.",
            "choices": ["images", "video"],
        },
    )
    api_extra: str = field(
        default="{}",
        metadata={
            "help": "JSON object of further fields for every request, such as "
            '\'{"mm_processor_kwargs": {"max_pixels": 200704}}\' for vLLM or \'{"chat_template_kwargs": {"num_frames": 16}}\' for '
            "`transformers serve`."
        },
    )
    api_workers: int = field(
        default=8, metadata={"help": "Questions that a server is asked at the same time."}
    )
    api_timeout: float = field(default=300.0, metadata={"help": "Seconds to wait for an answer."})
    api_retries: int = field(
        default=3,
        metadata={
            "help": "Further tries after a timeout, a lost connection, or status 429 or 5xx."
        },
    )
    judge_base: str | None = field(
        default=None,
        metadata={
            "help": "OpenAI-compatible server of a judge that reads the reasoning for TAC and VAS; its key is JUDGE_API_KEY."
        },
    )
    judge_model: str | None = field(
        default=None, metadata={"help": "The judge's name on that server."}
    )
    frame_use_check: bool = field(
        default=False,
        metadata={"help": "Test the frame-use scores of every layer instead of answering."},
    )
    local_rank: int = field(default=-1, metadata={"help": "Set by the deepspeed launcher."})

    def __post_init__(self):
        if self.rescore and (self.dataset_name or self.model_name_or_path or self.api_base):
            raise DataError(
                "--rescore takes stored answers: no --dataset_name, --model_name_or_path or --api_base beside it"
            )
        if not self.rescore and not (self.dataset_name and self.model_name_or_path):
            raise DataError(
                "give --model_name_or_path and --dataset_name (--bench), or --rescore FILE, or `compare FIRST SECOND`"
            )
        if self.api_base and (self.frame_use_check or not re.match(r"https?://", self.api_base)):
            raise DataError(
                "--api_base is a server's address, http://host:port/v1, and --frame_use_check needs the model itself"
            )
        try:
            fits = isinstance(json.loads(self.api_extra), dict)
        except ValueError:
            fits = False
        if not fits:
            raise DataError(f"--api_extra {self.api_extra} is no JSON object")
        for name in (
            "frames",
            "min_pixels",
            "max_pixels",
            "max_completion_length",
            "batch_size",
            "api_workers",
            "api_timeout",
        ):
            if getattr(self, name) <= 0:
                raise DataError(f"--{name} must be above 0")
        if self.min_pixels > self.max_pixels:
            raise DataError("--min_pixels must not be above --max_pixels")
        if (
            self.temperature < 0
            or self.top_k < 0
            or self.api_retries < 0
            or not 0 < self.top_p <= 1
        ):
            raise DataError(
                "--temperature, --top_k and --api_retries must be at least 0, --top_p above 0 and at most 1"
            )
        if self.frame_times != "none" and (self.api_base or self.control == "black"):
            raise DataError(
                "--frame_times goes with a model on this machine and frames to be seen: no --api_base, no --control black"
            )
        if self.api_media == "video" and self.control in ("shuffled", "black"):
            raise DataError(
                f"--control {self.control} changes frames; --api_media video sends the file as it is"
            )
        if bool(self.judge_base) != bool(self.judge_model) or (
            self.judge_base and not re.match(r"https?://", self.judge_base)
        ):
            raise DataError(
                "--judge_base, a server's address (http://host:port/v1), and --judge_model go together"
            )
        if self.frame_use_layer is None:
            self.frame_use_layer = {"none": None, "attention": 1, "hidden": -1}[self.frame_use]
        elsewhere = self.api_base or self.rescore or self.control != "none"
        if self.frame_use == "none" and self.priors or self.frame_use != "none" and elsewhere:
            raise DataError(
                "--priors goes with --frame_use, and that with a model here, without --control"
            )
        if self.rescore and os.path.realpath(self.rescore) == os.path.realpath(self.output):
            raise DataError(
                f"--output {self.output} is the --rescore file itself; choose another file to write"
            )


# ------------------------------------------------------------------------------------------------------ what makes a score


def fingerprint(model):
    """What a checkpoint folder holds, briefly: sha1 of its weight files' sizes, first and last megabytes. None for a hub id."""
    if not os.path.isdir(model):
        return None
    digest = hashlib.sha1()
    for file in sorted(Path(model).glob("*.safetensors")):
        with open(file, "rb") as weights:
            size = weights.seek(0, os.SEEK_END)
            for place in (0, max(0, size - (1 << 20))):
                weights.seek(place)
                digest.update(weights.read(1 << 20))
        digest.update(f"{file.name} {size}".encode())
    return digest.hexdigest()[:16]


def score_settings(arguments):
    """Every setting that an answer depends on: it stands in the report, and a run continues only an earlier one that has the same."""
    settings = {
        name: getattr(arguments, name)
        for name in (
            "model_name_or_path",
            "frames",
            "frame_times",
            "system_prompt",
            "min_pixels",
            "max_pixels",
            "max_completion_length",
            "temperature",
            "top_p",
            "top_k",
            "seed",
            "control",
        )
    }
    settings["prompt_template"] = read_template(arguments.prompt_template)
    if arguments.api_base:
        return settings | {
            "engine": "api",
            "api_base": arguments.api_base,
            "api_media": arguments.api_media,
            "api_extra": arguments.api_extra,
        }
    try:
        config = AutoConfig.from_pretrained(arguments.model_name_or_path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"--model_name_or_path {arguments.model_name_or_path} is no checkpoint: {str(error).splitlines()[0]}"
        ) from error
    layers, layer = config.get_text_config().num_hidden_layers, arguments.frame_use_layer
    if (
        layer is not None
        and not (1 if arguments.frame_use == "attention" else -1) <= layer <= layers
    ):
        raise DataError(
            f"--frame_use_layer {layer}: the model has layers 1 to {layers} (hidden states also 0, and -1 after the last norm)"
        )
    return settings | {
        "engine": "local",
        "model_revision": getattr(config, "_commit_hash", None),
        "weights": fingerprint(arguments.model_name_or_path),
        "batch_size": arguments.batch_size,
        "frame_use": arguments.frame_use,
        "frame_use_layer": arguments.frame_use_layer,
        "priors": arguments.priors,
        "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
    }


# ----------------------------------------------------------------------------------------------------------- stored answers


def prediction(example, settings, output="", error=None, frame_use=None):
    """One line of the predictions file: the question in Video-R1's fields, the answer or why there is none, and how it was made."""
    names = (*scores.TASK_FIELDS, *scores.BREAKDOWNS, "path")
    return {
        "problem_id": example.id,
        "problem": example.question,
        "problem_type": example.problem_type,
        "options": example.options,
        "solution": example.answer,
        "evidence": example.evidence,
        **{name: example.extra[name] for name in names if name in example.extra},
        "output": output,
        "error": error,
        **({"frame_use": frame_use} if frame_use else {}),
        "settings": settings,
    }


def is_final(row):
    """Server errors are tried again by the next run; what is wrong with a row or a medium stays wrong."""
    return not (row["error"] or "").startswith("server error")


def finished(predictions, questions, settings):
    """problem_ids that the predictions file answers. DataError when it belongs to other questions or was made with other settings."""
    done = set()
    for row in (
        scores.read_json(predictions)[0]
        if predictions.exists() and predictions.stat().st_size
        else ()
    ):
        known = questions.get(row.get("problem_id"))
        truth = row.get("solution")
        if (
            row.get("problem_type") == "multiple choice"
        ):  # older files have "(A)" as it stood in the data set
            truth = solution_letters(str(truth), row.get("options") or []) or truth
        if (
            known is None
            or "settings" not in row
            or truth != known["solution"]
            or row.get("problem") != known["problem"]
        ):
            raise DataError(
                f"{predictions} has a row of another data set ({row.get('problem_id')}); choose another --output"
            )
        for name in settings:
            if row["settings"].get(name) != settings[name]:
                raise DataError(
                    f"{predictions} was made with {name} {row['settings'].get(name)!r}, not {settings[name]!r}; choose another "
                    "--output, or delete it to begin anew"
                )
        done.add(row["problem_id"])
    return done


def load_questions(arguments):
    """-> examples; rows that cannot be used, as {"problem_id", "media", "cause"}; problem_ids of rows that repeat one."""
    unusable = []
    examples = load_examples(arguments.dataset_name, arguments.media_root, unusable)
    known, bad, repeated = {example.id for example in examples}, {}, []
    for row in unusable:
        if row["problem_id"] in known or row["problem_id"] in bad:
            repeated.append(row["problem_id"])
        else:
            bad[row["problem_id"]] = row
    return examples, list(bad.values()), repeated


def run_benchmark(arguments):
    """Answers of every rank's share, appended to shards as they are made; rank 0 joins them and scores the file, whatever run wrote it."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and ("MASTER_ADDR" not in os.environ or arguments.api_base):
        raise DataError(
            "--api_base asks from one process"
            if arguments.api_base
            else "RANK and WORLD_SIZE are set without MASTER_ADDR; start ranks by torchrun or deepspeed"
        )
    examples, bad, repeated = load_questions(arguments)
    if not examples:
        raise DataError(
            f"none of the {len(bad)} rows of {arguments.dataset_name} can be used; the first: {bad[0]['cause']}"
        )
    settings = score_settings(arguments)
    predictions = Path(arguments.output).with_suffix(".predictions.jsonl")
    lines = [
        {
            "problem_id": row["problem_id"],
            "problem": "",
            "problem_type": "",
            "solution": "",
            "output": "",
            "error": f"unusable row: {row['cause']}",
            "settings": settings,
        }
        for row in bad
    ]
    questions = {
        row["problem_id"]: row
        for row in [*lines, *(prediction(example, settings) for example in examples)]
    }
    if world > 1:
        dist.init_process_group(
            "gloo", timeout=timedelta(days=30)
        )  # for its barrier: ranks end at different times
    if rank == 0:
        predictions.parent.mkdir(parents=True, exist_ok=True)
        join_shards(predictions)  # of an earlier run
        finished(predictions, questions, settings)
        if predictions.exists() and predictions.stat().st_size:
            kept = [row for row in scores.read_json(predictions)[0] if is_final(row)]
            write_whole(predictions, (f"{json.dumps(row)}\n".encode() for row in kept))
    if world > 1:
        dist.barrier()
    done = finished(predictions, questions, settings)
    file = predictions if world == 1 else Path(f"{predictions}.shard{rank}")
    with open(file, "ab", buffering=0) as out:
        append_lines(
            out, [row for row in lines if row["problem_id"] not in done] if rank == 0 else []
        )
        answers = (
            ask_server(arguments, examples, done)
            if arguments.api_base
            else answer_here(arguments, examples, done, rank, world)
        )
        for batch in answers:
            append_lines(
                out,
                [
                    prediction(example, settings, *answer)
                    for example, *answer in batch
                    if example.id not in done
                ],
            )
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        join_shards(predictions)
        items = {item.problem_id: item for item in scores.read_predictions(predictions)[0]}
        if all(item.error for item in items.values()):
            raise DataError(
                f"none of {len(items)} questions could be answered; the first: {items[examples[0].id].error}"
            )
        report = scores.make_report(
            [items[name] for name in questions],
            scores.benchmark_of(arguments.dataset_name),
            repeated,
        )
        finish(arguments, report, {"dataset_name": arguments.dataset_name, **settings})


# ------------------------------------------------------------------------------------------------------ answers, here or there


def frame_order(arguments, position, count):
    """The order in which a question's frames are shown: as they are, or shuffled, the same in every run with this seed."""
    order = list(range(count))
    if arguments.control == "shuffled":
        random.Random(arguments.seed * 1_000_003 + position).shuffle(order)
    return order


def without_medium(example):
    return replace(example, media="", media_type="text")


def encode(encoder, example, arguments, position):
    """Encoder.encode under --control: times, prompt and the number of visual tokens stay, but for question_only."""
    if arguments.control == "question_only":
        return encoder.encode(without_medium(example))
    if arguments.control == "none" or example.media_type == "text":
        return encoder.encode(example)
    if arguments.control == "black":
        return encoder.encode(example, black=True)
    frames = encoder.load(example, None).frames
    return encoder.encode(example, shuffle=frame_order(arguments, position, len(frames)))


@torch.no_grad()
def frame_uses(arguments, model, prompts, tokens, mask):
    """Where each prompt's one completion looks, tokens and mask (B, T) -> list of (frame use (t,), what each token makes of each slot
    (L, t)): cosines with the slots' max-pooled states, or attention to them; None without a video of two slots."""
    layer, found = arguments.frame_use_layer, []
    layers = (
        {"hidden_layers": (layer,)}
        if arguments.frame_use == "hidden"
        else {"attention_layer": layer}
    )
    _, _, hidden, attention, _ = Policy(model)(prompts, tokens[:, None], mask[:, None], **layers)
    states = hidden.get(layer)
    for row, (use,) in enumerate(rollout_frame_use(prompts, mask[:, None], states, attention)):
        found.append(
            None
            if use is None
            else (use, token_frame_use(prompts, row, mask[row].bool(), states, attention))
        )
    return found


def strongest_events(each, share=0.05):
    """The strongest token-slot pairs (the paper's figure 9): each (L, t) -> the largest 5 % of all L * t, at least one, ascending, as flat
    indices token * t + slot."""
    return sorted(each.flatten().topk(max(1, round(share * each.numel()))).indices.tolist())


def used_interval(use, times):
    """The slots around the most used one that have more than an even share: use (t,), times of the frames -> [start s, end s]."""
    slots, frames = len(use), -(-len(times) // len(use))
    first = last = int(use.argmax())
    while first > 0 and use[first - 1] * slots > 1:
        first -= 1
    while last + 1 < slots and use[last + 1] * slots > 1:
        last += 1
    borders = [*times, 2 * times[-1] - times[-2]]  # a frame lasts to the next
    return [borders[first * frames], borders[min((last + 1) * frames, len(times))]]


def use_row(example, item, found, prior):
    """What a prediction keeps of frame_uses' (use (t,), each (L, t)): the shares and their mass on the known evidence; with the prior's row
    their consensus with it, `events` (strongest_events), `tokens` L, `consensus_slots`, the positions of the slots that have more of the
    prior than an even share, and `enrichment`, that of the events on them."""
    if found is None:
        return None
    use, each = found
    if prior and (
        len(prior["times"]) != len(item["times"])
        or not np.allclose(prior["times"], item["times"], atol=0.02)
    ):
        raise DataError(
            f"the prior of {example.id} was made for other frames; build it with this run's --frames"
        )
    row = dict.fromkeys(("evidence", "chance", "consensus", "enrichment"))
    if example.evidence:
        evidence = slot_shares(item["times"], example.evidence, len(use))
        row |= {"evidence": float(use.cpu() @ evidence), "chance": float(evidence.mean())}
    if prior:
        merged = reward.merge_prior(torch.tensor(prior["prior"]), len(use))
        events, consensus = (
            strongest_events(each.cpu()),
            (merged * len(use) > 1 + 1e-6).nonzero().flatten().tolist(),
        )
        row |= {
            "consensus": reward.consensus_frame_reward(merged, use),
            "enrichment": scores.event_enrichment(events, len(use), consensus),
            "events": events,
            "tokens": len(each),
            "consensus_slots": consensus,
        }
    return {"slots": use.tolist(), "interval": used_interval(use, item["times"]), **row}


def answer_here(arguments, examples, done, rank, world):
    """This rank's batches: yields lists of (example, output, error[, frame use]). A batch is the same questions whatever is done and
    however many ranks there are, since padding moves the last bits of a greedy choice; where anything is missing, it is answered whole."""
    starts = range(rank * arguments.batch_size, len(examples), world * arguments.batch_size)
    parts = [list(enumerate(examples))[start : start + arguments.batch_size] for start in starts]
    left = [part for part in parts if any(example.id not in done for _, example in part)]
    if not left:
        return
    model, processor = load_model(arguments.model_name_or_path)
    encoder = Encoder(
        processor,
        arguments.min_pixels,
        arguments.max_pixels,
        arguments.frames,
        read_template(arguments.prompt_template),
        frame_times=arguments.frame_times,
        system_prompt=arguments.system_prompt,
    )
    priors = (
        {row["problem_id"]: row for row in read_priors(arguments.priors)}
        if arguments.priors
        else {}
    )
    for part in tqdm(
        left,
        desc="answer",
        unit="batch",
        initial=len(parts) - len(left),
        total=len(parts),
        disable=rank > 0,
    ):
        items, answers = {}, {}
        for position, example in part:
            try:
                items[position] = encode(encoder, example, arguments, position)
            except MediaError as error:
                answers[position] = ("", f"unreadable media: {error}")
        if items:
            prompts = collate([*items.values()], model).to(model.device)
            seeds = [arguments.seed * 1_000_003 + position for position in items]
            settings = Sampling(
                arguments.max_completion_length,
                arguments.temperature,
                arguments.top_p,
                arguments.top_k,
            )
            tokens, mask, _, texts = sample_texts(
                model, processor, prompts, [1] * len(items), seeds, settings
            )
            uses = (
                [None] * len(items)
                if arguments.frame_use == "none"
                else frame_uses(arguments, model, prompts, tokens, mask)
            )
            for (position, item), text, use in zip(items.items(), texts, uses, strict=True):
                answers[position] = (
                    text,
                    None,
                    use_row(examples[position], item, use, priors.get(examples[position].id)),
                )
        yield [(example, *answers[position]) for position, example in part]


def data_url(content, kind):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def message(arguments, example, position, template):
    """The user turn for a server: the medium as data URLs, then the prompt. MediaError when it cannot be read."""
    content = []
    if arguments.control == "question_only":
        example = without_medium(example)
    if example.media_type == "video" and arguments.api_media == "video":
        if not os.path.isfile(example.media):
            raise MediaError(f"{example.media}: no such file")
        kind = mimetypes.guess_type(example.media)[0] or "video/mp4"
        content.append(
            {
                "type": "video_url",
                "video_url": {"url": data_url(Path(example.media).read_bytes(), kind)},
            }
        )
    elif example.media_type != "text":
        if example.media_type == "image":
            frames = load_image(example.media)
        else:
            frames, _ = decode_frames(
                example.media, uniform_frames(len(open_video(example.media)), arguments.frames)
            )
        try:
            frames = resize_frames(
                frames, arguments.min_pixels, arguments.max_pixels
            )  # (K, 3, h, w)
        except ValueError as error:  # one side over 200 times the other
            raise MediaError(f"{example.media}: cannot be resized ({error})") from error
        frames = (
            torch.zeros_like(frames)
            if arguments.control == "black"
            else frames[frame_order(arguments, position, len(frames))]
        )
        for frame in frames.permute(0, 2, 3, 1).numpy():
            picture = io.BytesIO()
            Image.fromarray(frame).save(picture, "PNG")
            content.append(
                {
                    "type": "image_url",
                    "image_url": {"url": data_url(picture.getvalue(), "image/png")},
                }
            )
    system = (
        [{"role": "system", "content": arguments.system_prompt}] if arguments.system_prompt else []
    )
    return [
        *system,
        {
            "role": "user",
            "content": [*content, {"type": "text", "text": build_prompt(example, template)}],
        },
    ]


def chat(client, retries, messages, **settings):
    """One answer of a server -> text, and None or why there is none. Tried again after 1, 2, 4... s when another try may help.

    A server that cuts the think block off (`transformers serve`, vLLM's reasoning parsers) sends it apart; it is put back."""
    for attempt in range(retries + 1):
        try:
            told = client.chat_completion(messages, **settings).choices[0].message
            thought = told.reasoning or getattr(told, "reasoning_content", None)
            return (f"<think>{thought}</think>" if thought else "") + (told.content or ""), None
        except (HTTPError, InferenceTimeoutError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            cause = f"server error: {f'status {status}, ' if status else ''}{' '.join(str(error).split())[:300] or type(error).__name__}"
            if status is not None and status != 429 and status < 500:
                return "", cause
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            cause = f"server error: no chat completion came back ({type(error).__name__}: {error})"
        if attempt < retries:
            time.sleep(2**attempt)
    return "", cause


def ask_server(arguments, examples, done):
    """Answers of an OpenAI-compatible server, as they come: yields lists of one (example, output, error)."""
    # without a key the client would send the one of huggingface.co that it finds on this machine
    client = InferenceClient(
        base_url=arguments.api_base,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        timeout=arguments.api_timeout,
    )
    extra = (
        {"top_k": arguments.top_k} if arguments.top_k and arguments.temperature else {}
    )  # of vLLM and SGLang, not of the protocol
    settings = {
        "model": arguments.model_name_or_path,
        "max_tokens": arguments.max_completion_length,
        "top_p": arguments.top_p,
        "temperature": arguments.temperature,
        "extra_body": extra | json.loads(arguments.api_extra),
    }
    template = read_template(arguments.prompt_template)

    def ask(position, example):
        try:
            messages = message(arguments, example, position, template)
        except MediaError as error:
            return example, "", f"unreadable media: {error}"
        return example, *chat(
            client,
            arguments.api_retries,
            messages,
            seed=arguments.seed * 1_000_003 + position,
            **settings,
        )

    left = [
        (position, example) for position, example in enumerate(examples) if example.id not in done
    ]
    with ThreadPoolExecutor(arguments.api_workers) as pool:
        futures = [pool.submit(ask, *task) for task in left]
        try:
            for future in tqdm(
                as_completed(futures),
                desc="ask",
                unit="question",
                initial=len(examples) - len(left),
                total=len(examples),
            ):
                yield [future.result()]
        finally:
            pool.shutdown(
                wait=False, cancel_futures=True
            )  # on an interruption: what has not begun is not asked any more


# ------------------------------------------------------------------------------------------------------------- a judge's reading

# The project's own wording of what Video-R2's judge is asked.
READ_ANSWER = """Below are the options of a question (none when it asks for a number) and a final answer to it. Say which option the answer
names. Do not solve the question and do not infer anything that is not written. Reply with the option's capital letter, or with the bare
number, or with UNKNOWN when the answer names none.

Options:
{options}

Final answer:
{answer}"""
READ_CONCLUSION = """Below are the options of a question (none when it asks for a number) and somebody's reasoning about it. Say which
option the reasoning itself concludes. The last explicit conclusion counts; the exact text of an option stands for its letter. Do not judge
whether it is right and do not conclude anything in its place. Reply with the option's capital letter, the bare number, or UNKNOWN.

Options:
{options}

Reasoning:
{reasoning}"""
RATE_ATTENTION = """Below are a question about a video and somebody's reasoning about it. Rate from 0 to 10 how far the reasoning claims
concrete visual evidence from the video. Whether the claims or the answer are true does not matter.
10: dense and specific, step by step: entities, attributes, counts, text on screen, positions, order of events
7-9: several specific claims about the video    4-6: concrete facts without where or when    1-3: a generic mention, or matching of options
0: none, or guessing
Reply with JSON alone: {{"score": 0, "rationale": "one sentence"}}

Question:
{question}

Reasoning:
{reasoning}"""


def judge_one(arguments, client, record):
    """What the judge reads in one output -> {"answer", "conclusion", "vas"} ("" for UNKNOWN, None without a rating) or {"error"}."""
    think, answer = (scores.last_block(record["output"], tag) for tag in ("think", "answer"))
    first_think = reward.extract_think(record["output"])
    options, question = (
        "\n".join(record["options"]) or "(none)",
        "\n".join([record["problem"], *record["options"]]),
    )
    told = {
        "answer": "",
        "conclusion": "",
        "vas": None if first_think else 0.0,
    }  # nothing to read: no conclusion, no attention
    prompts = {
        "answer": answer and READ_ANSWER.format(options=options, answer=answer),
        "conclusion": think and READ_CONCLUSION.format(options=options, reasoning=think),
        "vas": first_think and RATE_ATTENTION.format(question=question, reasoning=first_think),
    }
    for name, prompt in prompts.items():
        for more in ("", "\n\nJSON only.") if name == "vas" else ("",):
            if not prompt or (name == "vas" and told["vas"] is not None):
                continue
            text, error = chat(
                client,
                arguments.api_retries,
                [{"role": "user", "content": prompt + more}],
                model=arguments.judge_model,
                max_tokens=256,
                temperature=0.0,
                top_p=1.0,
            )
            if error:
                return {"error": error}
            text = text.rpartition("</think>")[2].strip()  # a judge may think, too
            rating = re.search(r'"score"\s*:\s*(-?\d+(?:\.\d+)?)', text)
            if name == "vas":
                told["vas"] = min(10.0, max(0.0, float(rating[1]))) if rating else None
            else:
                told[name] = "" if text.upper().startswith("UNKNOWN") else text.strip("()*. ")
    return told


def judge_report(arguments, report):
    """The judge's readings of every output, appended to REPORT.judged.jsonl as they come, -> the report's `judged`: TAC and VAS."""
    # only one letter or a number can be compared with the solution
    readable = []
    for record in report["results"]:
        one_letter = record["problem_type"] == "multiple choice" and not scores.several_letters(
            record["solution"]
        )
        if one_letter or record["problem_type"] in ("numerical", "regression"):
            readable.append(record["problem_id"])
    file, told = Path(arguments.output).with_suffix(".judged.jsonl"), {}
    join_shards(file)  # cuts a torn last line
    for row in scores.read_json(file)[0] if file.exists() and file.stat().st_size else ():
        if (row["judge_model"], row["judge_base"]) == (arguments.judge_model, arguments.judge_base):
            told[row["problem_id"], row["output"]] = row["told"]
    records = {
        record["problem_id"]: record
        for record in report["results"]
        if record["output"].strip() and not record["error"]
    }
    left = [
        name
        for name, record in records.items()
        if "error" in told.get((name, record["output"]), {"error": ""})
    ]
    client = InferenceClient(
        base_url=arguments.judge_base,
        api_key=os.environ.get("JUDGE_API_KEY", "none"),
        timeout=arguments.api_timeout,
    )
    with ThreadPoolExecutor(arguments.api_workers) as pool, open(file, "ab", buffering=0) as out:
        futures = {pool.submit(judge_one, arguments, client, records[name]): name for name in left}
        try:
            for future in tqdm(as_completed(futures), desc="judge", unit="answer", total=len(left)):
                name = futures[future]
                told[name, records[name]["output"]] = future.result()
                append_lines(
                    out,
                    [
                        {
                            "problem_id": name,
                            "output": records[name]["output"],
                            "judge_model": arguments.judge_model,
                            "judge_base": arguments.judge_base,
                            "told": future.result(),
                        }
                    ],
                )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    told = {name: told[name, record["output"]] for name, record in records.items()}
    failed = {name: row["error"] for name, row in told.items() if "error" in row}
    if told and len(failed) == len(told):
        raise DataError(
            f"{arguments.judge_base} judged none of {len(told)} answers; the first: {next(iter(failed.values()))}"
        )
    readings = {
        name: ("", "") if name not in records else (told[name]["answer"], told[name]["conclusion"])
        for name in readable
        if name not in failed
    }
    judged = scores.reasoning_metrics(report["results"], readings, judge=arguments.judge_model)
    ratings = [row["vas"] for row in told.values() if row.get("vas") is not None]
    judged["VAS"] = {
        "value": 10 * scores.mean(ratings) if ratings else None,
        "n": len(ratings),
        "not_rated": len(told) - len(ratings),
        "reason": "mean of the judge's 0 to 10, times 10, over outputs that were rated",
    }
    return judged | {"failed": failed}


# --------------------------------------------------------------------------------------------------- reports and comparisons


def share(value):
    return "     -" if value is None else f"{value:.4f}"


def print_report(report):
    """The report's numbers as tables on the screen; warnings on stderr."""
    print(f"{'':32s}{'n':>7s}{'correct':>9s}{'accuracy':>10s}{'video_r1':>10s}{'format':>8s}")
    rows = {"all": report}
    for name, groups in report.items():
        if name.startswith("by_"):
            rows |= (
                {f"  {value}": row for value, row in groups.items()}
                if len(groups) > 1 or name == "by_type"
                else {}
            )
    for name, row in rows.items():
        print(
            f"{name[:31]:32s}{row['n']:7d}{row['correct']:9d}{share(row['accuracy']):>10s}{share(row['accuracy_video_r1']):>10s}"
            f"{share(row['format_rate']):>8s}"
        )
    for name, row in report.get("frame_use", {}).items():
        print(
            f"frame use, {name} ({row['n']}): "
            + ", ".join(f"{key} {share(row[key])}" for key in row if key != "n")
        )
    for key, name in (("grounding", "cited times"), ("grounding_by_frame_use", "frame use")):
        if key in report:
            numbers = report[key]
            print(
                f"grounding by {name}, {numbers['predicted']} of {numbers['n']} have one: Acc@GQA {share(numbers['acc_gqa'])}, "
                f"mIoP {share(numbers['mIoP'])}, mIoU {share(numbers['mIoU'])}"
            )
    for mode, numbers in report.get("vsi_bench", {}).items():
        print(
            f"VSI-Bench, {mode}: "
            + ", ".join(
                f"{name} {share(value)}" for name, value in numbers.items() if name != "tasks"
            )
        )
    for name, row in report.get("several_letters", {}).items():
        if isinstance(row, dict):
            whole, partial = share(row["per_question_accuracy"]), share(row["partial_accuracy"])
            print(
                f"{name}: {row['n']} questions, all letters right in {whole}, with partial credit {partial}"
            )
    reasoning = report["judged"]
    if reasoning["judge"]:
        vas = "" if reasoning["VAS"]["value"] is None else f", VAS {reasoning['VAS']['value']:.1f}"
        print(
            f"reasoning, read by {reasoning['judge']}: {reasoning['no_conclusion']} of {reasoning['outputs']} never conclude; "
            + "".join(f"{name} {share(value)}, " for name, value in reasoning["TAC"].items())
            + f"consistency rate {share(reasoning['consistency_rate'])}{vas}"
        )
    for kind, rows in report["errors"].items():
        problem, cause = next(iter(rows.items()))
        print(f"{len(rows)} count as wrong, {kind}; the first is {problem}: {cause}")
    for warning in report["warnings"]:
        print(f"evaluate.py: warning: {warning}", file=sys.stderr)


def finish(arguments, report, settings):
    """The report, judged if a judge is given, on the screen and, whole or not at all, in its file."""
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    if arguments.judge_base:
        report["judged"] = judge_report(arguments, report)
    print_report(report)
    write_whole(arguments.output, [json.dumps({"settings": settings, **report}, indent=1).encode()])
    print(f"the report is {arguments.output}")


def rescored(path):
    """Stored predictions of any known format -> report, with the settings that the file tells."""
    items, repeated, source = scores.read_predictions(path)
    rows, settings = scores.read_json(path)
    told = [row.get("settings") for row in rows]
    if not settings and told[0] and all(each == told[0] for each in told):
        settings = told[0]
    benchmark = scores.benchmark_of(path, items) or scores.benchmark_of(
        settings.get("dataset_name", ""), items
    )
    return scores.make_report(items, benchmark, repeated), {
        **settings,
        "rescored": str(path),
        "format": source,
    }


def run_compare(first, second, output=None, seed=0):
    """What changed between two files of stored predictions or reports, on the screen and in a file if one is named."""
    (a, a_settings), (b, b_settings) = rescored(first), rescored(second)
    result = scores.compare(a["results"], b["results"], seed)
    low, high = result["interval_95"]
    result["settings_that_differ"] = {
        name: [a_settings.get(name), b_settings.get(name)]
        for name in {**a_settings, **b_settings}
        if a_settings.get(name) != b_settings.get(name)
        and name not in ("rescored", "format", "weights", "model_name_or_path")
    }
    print(
        f"{result['n']} questions are in both files, {result['only_in_first']} only in the first, {result['only_in_second']} only in "
        "the second"
    )
    print(
        f"accuracy {result['accuracy'][0]:.4f} and {result['accuracy'][1]:.4f}; the second has {len(result['gains'])} gains and "
        f"{len(result['losses'])} losses"
    )
    print(
        f"difference {result['difference']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f} (paired bootstrap, seed {seed}); "
        f"normalised gain {share(result['normalised_gain']).strip()}; "
        f"McNemar's exact p = {result['mcnemar_p']:.4g}"
    )
    for name, (one, other) in result["settings_that_differ"].items():
        print(f"made with another {name}: {one!r} and {other!r}")
    if output:
        write_whole(output, [json.dumps(result, indent=1).encode()])


def parse_compare(words):
    parser = argparse.ArgumentParser(
        "evaluate.py compare",
        allow_abbrev=False,
        formatter_class=Help,
        description=(
            "Pair the questions of two reports or prediction files by problem_id: gains, losses, and whether they are more than noise."
        ),
    )
    parser.add_argument("first", help="report or predictions of one run")
    parser.add_argument("second", help="of the other, over the same questions")
    parser.add_argument(
        "--output", help="JSON file to write, with the problem_ids of gains and losses"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser.parse_args(words)


# ------------------------------------------------------------------------------------------------------------ frame use, checked


def encode_all(encoder, examples):
    """Pairs (example, model inputs) of every readable example, and the causes of the others."""
    pairs, broken = [], {}
    for example in tqdm(examples, desc="decode", unit="question"):
        try:
            pairs.append((example, encoder.encode(example)))
        except MediaError as error:
            broken[example.id] = str(error)
    return pairs, broken


def told_intervals(example, processor):
    """Tokens of the known reasoning and, of those in a sentence that cites a time, the interval it is about.

    -> ids list, {token index: (start, end)} from the example's grounding."""
    text = target_text(example).removeprefix(
        read_turn(processor).opening.strip()
    )  # what the prompt says already is not said again
    encoded = processor.tokenizer(
        text, return_offsets_mapping=True, add_special_tokens=False, split_special_tokens=True
    )
    intervals = {}
    for match in re.finditer(r"[^.<>]*\.", text):
        claims = reward.parse_claims(match.group())
        spans = [
            (start, end)
            for start, end, _ in example.grounding
            if len(claims) == 1 and start <= claims[0][0] < end
        ]
        if len(spans) == 1:
            for index, (begin, stop) in enumerate(encoded["offset_mapping"]):
                if match.start() <= begin and stop <= match.end():
                    intervals[index] = spans[0]
    return encoded["input_ids"], intervals


@torch.no_grad()
def check_frame_use(model, processor, pairs, tau=0.1):
    """{score name: (argmax inside the told scene, mass there over chance)}, means over tokens; the last entry is chance itself."""
    policy, layers = Policy(model), model.config.text_config.num_hidden_layers
    sums = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))  # hits, mass, chance
    count = 0
    for example, item in tqdm(pairs, desc="frame use", unit="question"):
        ids, intervals = told_intervals(example, processor)
        if not intervals or not item["times"]:
            continue
        prompts = collate([item], model).to(model.device)
        completion = torch.tensor([[ids]], device=model.device)
        columns, slots = prompts.visual[0].nonzero().squeeze(1), prompts.slots[0]
        shares = {
            span: slot_shares(item["times"], [span], slots) for span in set(intervals.values())
        }
        states, weights = {}, {}
        for layer in range(1, layers + 1):
            hidden_layers = (*range(layers), -1) if layer == 1 else ()
            _, _, hidden, weights[layer], _ = policy(
                prompts, completion, torch.ones_like(completion), True, hidden_layers, layer
            )
            states.update(hidden)
        offset = prompts.input_ids.shape[1]
        for index, span in intervals.items():
            uses = {
                f"attention, layer {layer}": reward.attention_use(
                    weights[layer][:, 0, index : index + 1][..., columns], slots
                )
                for layer in weights
            }
            for layer, hidden in states.items():
                for pool in ("max", "mean"):
                    frames = reward.pool_frames(
                        hidden[0, columns].view(slots, -1, hidden.shape[-1]), pool
                    )
                    uses[f"hidden, layer {layer}, {pool} pool"] = reward.frame_use(
                        hidden[0, offset + index][None], frames, tau
                    )
            for name, use in uses.items():
                inside = shares[span]
                sums[name] += torch.tensor(
                    [
                        float(inside[use.argmax()] > 0.5),
                        float(use.cpu() @ inside),
                        float(inside.mean()),
                    ]
                )
            count += 1
    if not count:
        raise DataError(
            "--frame_use_check found no reasoning sentence that cites a time inside a grounding interval"
        )
    table = {
        name: ((hits / count).item(), (mass / chance).item())
        for name, (hits, mass, chance) in sums.items()
    }
    return {**table, "chance": ((next(iter(sums.values()))[2] / count).item(), 1.0)}, count


def run_check(arguments):
    """The frame-use scores of every layer against known evidence, as a table and in the report."""
    examples, settings = (
        load_examples(arguments.dataset_name, arguments.media_root),
        score_settings(arguments),
    )
    model, processor = load_model(arguments.model_name_or_path)
    encoder = Encoder(
        processor,
        arguments.min_pixels,
        arguments.max_pixels,
        arguments.frames,
        read_template(arguments.prompt_template),
        frame_times=arguments.frame_times,
        system_prompt=arguments.system_prompt,
    )
    pairs, broken = encode_all(encoder, examples)
    table, count = check_frame_use(model, processor, pairs)
    print(
        f"{count} tokens that describe a known scene\n{'frame use from':32s}{'argmax inside':>14s}{'mass over chance':>18s}"
    )
    for name, (hits, mass) in sorted(table.items(), key=lambda row: -row[1][1]):
        print(f"{name:32s}{hits:14.3f}{mass:18.2f}")
    report = {"tokens": count, "frame_use": table, "errors": broken, "settings": settings}
    write_whole(arguments.output, [json.dumps(report, indent=1).encode()])


def main():
    hf_logging.set_verbosity_error()
    words = sys.argv[1:]
    parser = HfArgumentParser(
        EvaluateArguments, allow_abbrev=False, formatter_class=Help, description=__doc__
    )
    try:
        if words[:1] == ["compare"]:
            run_compare(**vars(parse_compare(words[1:])))
            return
        arguments = EvaluateArguments(**vars(parser.parse_args(words)))
        if arguments.rescore:
            finish(arguments, *rescored(arguments.rescore))
        elif arguments.frame_use_check:
            run_check(arguments)
        else:
            run_benchmark(arguments)
    except (
        DataError,
        OSError,
    ) as error:  # OSError: a file that cannot be written, a checkpoint that is none
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
