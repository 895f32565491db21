"""Stage 5: answers to a data set's questions, scored with reward.py; and a test of the frame-use scores against known evidence.

    python evaluate.py --model_name_or_path output/grpo --dataset_name toy-seed0/heldout.json --max_pixels 3136 --output report.json
    python evaluate.py --model_name_or_path output/sft --dataset_name toy-seed0/heldout.json --max_pixels 3136 --frame_use_check

The second needs `process` (reasoning that cites times) and `grounding` (which sentence is true when) in the data set. It feeds the model
the known reasoning and asks of every token in a sentence about a known interval: does its frame use lie there?
"""

import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from transformers.utils import logging as hf_logging

import reward
from data import DataError, Encoder, MediaError, load_examples, target_text
from grpo import Policy, collate, sample_texts, slot_shares


@dataclass
class EvaluateArguments:
    model_name_or_path: str = field(metadata={"help": "Qwen2-VL or Qwen2.5-VL checkpoint, folder or hub id."})
    dataset_name: str = field(metadata={"help": "Questions, Video-R1 JSON."})
    media_root: str | None = field(default=None, metadata={"help": "Folder that media paths start from. Default: the data set's."})
    output: str = field(default="report.json", metadata={"help": "File to write."})
    frames: int = field(default=16, metadata={"help": "Frames sampled evenly from a video."})
    min_pixels: int = field(default=4 * 28 * 28, metadata={"help": "Fewest pixels a frame."})
    max_pixels: int = field(default=256 * 28 * 28, metadata={"help": "Most pixels a frame (the paper's at inference)."})
    max_completion_length: int = field(default=1024, metadata={"help": "Most tokens of an answer."})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus, when sampled."})
    batch_size: int = field(default=32, metadata={"help": "Questions answered at once."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})
    frame_use_check: bool = field(default=False, metadata={"help": "Test the frame-use scores of every layer instead of answering."})


def encode_all(encoder, examples):
    """Pairs (example, model inputs) of every readable example, and the causes of the others."""
    pairs, broken = [], {}
    for example in tqdm(examples, desc="decode", unit="question"):
        try:
            pairs.append((example, encoder.encode(example)))
        except MediaError as error:
            broken[example.id] = str(error)
    return pairs, broken


def answer_all(arguments, model, processor, pairs):
    """Texts of the answers, in order."""
    texts = []
    for start in tqdm(range(0, len(pairs), arguments.batch_size), desc="answer", unit="batch"):
        items = [item for _, item in pairs[start : start + arguments.batch_size]]
        seeds = [arguments.seed * 1_000_003 + start + index for index in range(len(items))]
        prompts = collate(items, model).to(model.device)
        texts += sample_texts(model, processor, prompts, [1] * len(items), seeds, arguments.max_completion_length,
                              arguments.temperature, arguments.top_p)[2]
    return texts


def score_answers(examples, texts, broken):
    """Report: accuracy (unreadable media count as wrong), format rate, per problem type; one record a question."""
    records = []
    for example, text in zip(examples, texts, strict=True):
        accuracy = 0.0 if example.id in broken else reward.accuracy_reward(text, example.answer, example.problem_type)
        records.append({"problem_id": example.id, "problem_type": example.problem_type, "solution": example.answer, "output": text,
                        "prediction": reward.extract_answer(text), "reward": accuracy, "correct": accuracy == 1.0,
                        "error": broken.get(example.id)})
    by_type = defaultdict(list)
    for record in records:
        by_type[record["problem_type"]].append(record["reward"])
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        "n": len(records), "correct": sum(record["correct"] for record in records), "accuracy": mean([r["reward"] for r in records]),
        "format_rate": mean([reward.format_reward(record["output"]) for record in records]), "unreadable_media": len(broken),
        "by_type": {name: {"n": len(values), "accuracy": mean(values)} for name, values in sorted(by_type.items())}, "results": records}


def told_intervals(example, tokenizer):
    """Tokens of the known reasoning and, of those in a sentence that cites a time, the interval it is about.

    -> ids list, {token index: (start, end)} from the example's grounding."""
    text = target_text(example)
    encoded = tokenizer(text, return_offsets_mapping=True)
    intervals = {}
    for match in re.finditer(r"[^.<>]*\.", text):
        claims = reward.parse_claims(match.group())
        spans = [(start, end) for start, end, _ in example.grounding if len(claims) == 1 and start <= claims[0][0] < end]
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
        ids, intervals = told_intervals(example, processor.tokenizer)
        if not intervals or not item["times"]:
            continue
        prompts = collate([item], model).to(model.device)
        completion = torch.tensor([[ids]], device=model.device)
        columns, slots = prompts.visual[0].nonzero().squeeze(1), prompts.slots[0]
        shares = {span: slot_shares(item["times"], [span], slots) for span in set(intervals.values())}
        states, weights = {}, {}
        for layer in range(1, layers + 1):
            hidden_layers = (*range(layers), -1) if layer == 1 else ()
            _, _, hidden, weights[layer], _ = policy(prompts, completion, torch.ones_like(completion), True, hidden_layers, layer)
            states.update(hidden)
        offset = prompts.input_ids.shape[1]
        for index, span in intervals.items():
            uses = {f"attention, layer {layer}": reward.attention_use(weights[layer][:, 0, index : index + 1][..., columns], slots)
                    for layer in weights}
            for layer, hidden in states.items():
                for pool in ("max", "mean"):
                    frames = reward.pool_frames(hidden[0, columns].view(slots, -1, hidden.shape[-1]), pool)
                    uses[f"hidden, layer {layer}, {pool} pool"] = reward.frame_use(hidden[0, offset + index][None], frames, tau)
            for name, use in uses.items():
                inside = shares[span]
                sums[name] += torch.tensor([float(inside[use.argmax()] > 0.5), float(use.cpu() @ inside), float(inside.mean())])
            count += 1
    if not count:
        raise DataError("--frame_use_check found no reasoning sentence that cites a time inside a grounding interval")
    table = {name: ((hits / count).item(), (mass / chance).item()) for name, (hits, mass, chance) in sums.items()}
    return {**table, "chance": ((next(iter(sums.values()))[2] / count).item(), 1.0)}, count


def main():
    hf_logging.set_verbosity_error()
    parser = HfArgumentParser(EvaluateArguments, allow_abbrev=False, description=__doc__.split("\n\n")[0])
    arguments = EvaluateArguments(**vars(parser.parse_args()))
    try:
        examples = load_examples(arguments.dataset_name, arguments.media_root)
        processor = AutoProcessor.from_pretrained(arguments.model_name_or_path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForImageTextToText.from_pretrained(
            arguments.model_name_or_path, dtype=torch.bfloat16 if device == "cuda" else torch.float32, attn_implementation="sdpa",
            use_safetensors=True).to(device).eval()
        encoder = Encoder(processor, arguments.min_pixels, arguments.max_pixels, arguments.frames)
        pairs, broken = encode_all(encoder, examples)
        if arguments.frame_use_check:
            table, count = check_frame_use(model, processor, pairs)
            print(f"{count} tokens that describe a known scene\n{'frame use from':32s}{'argmax inside':>14s}{'mass over chance':>18s}")
            for name, (hits, mass) in sorted(table.items(), key=lambda row: -row[1][1]):
                print(f"{name:32s}{hits:14.3f}{mass:18.2f}")
            report = {"tokens": count, "frame_use": table}
        else:
            texts = iter(answer_all(arguments, model, processor, pairs))
            texts = ["" if example.id in broken else next(texts) for example in examples]
            report = score_answers(examples, texts, broken)
            print(f"accuracy {report['accuracy']:.4f} on {report['n']} questions ({report['correct']} fully correct, "
                  f"{len(broken)} with unreadable media count as wrong), format {report['format_rate']:.4f}")
            for name, row in report["by_type"].items():
                print(f"  {name:20s}{row['accuracy']:.4f}  ({row['n']})")
    except DataError as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    report["settings"] = vars(arguments)
    Path(arguments.output).write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
