"""What the stages share: examples and their file formats, video decoding, prompts, batches.

    examples = load_examples("Video-R1-260k.json", media_root="DATA")     # -> list[Example]
    frames, times = decode_frames(examples[0].media, indices)             # decord, RGB uint8

A data set is a JSON array (or JSON lines) in Video-R1's format: problem, problem_type, options, solution, path, data_type and, for
SFT, process. Two optional fields of ours: evidence [[start, end], ...] in seconds and grounding {"00:04-00:08": "sentence"}.
"""

import json
import os
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import decord
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

PROBLEM_TYPES = ("multiple choice", "numerical", "regression", "free-form", "OCR")

# The project's own wording; --prompt_template FILE replaces it ({question} and {instruction} are filled in).
PROMPT_TEMPLATE = """{question}
{instruction}"""
INSTRUCTIONS = {
    "multiple choice": "Think inside <think></think>, then answer with one letter inside <answer></answer>.",
    "numerical": "Think inside <think></think>, then answer with a number inside <answer></answer>.",
    "regression": "Think inside <think></think>, then answer with a number inside <answer></answer>.",
    "free-form": "Think inside <think></think>, then answer in words inside <answer></answer>.",
    "OCR": "Think inside <think></think>, then answer with the text inside <answer></answer>.",
}


class DataError(ValueError):
    """Bad input that a user can mend; the command lines print the message alone and exit with 2."""


class MediaError(DataError):
    """One image or video that cannot be decoded: skipped, counted and named, never replaced."""


@dataclass
class Example:
    """One question. `answer` is the bare ground truth, `reasoning` the bare text of a think block ('' when there is none)."""

    id: str
    question: str
    options: list[str]
    problem_type: str
    answer: str
    media: str  # absolute path; '' for a text-only example
    media_type: str  # 'video' | 'image' | 'text'
    reasoning: str = ""
    grounding: list[tuple[float, float, str]] = field(default_factory=list)  # (start s, end s, sentence)
    evidence: list[tuple[float, float]] = field(default_factory=list)  # (start s, end s) that the answer rests on
    extra: dict = field(default_factory=dict)  # every other field of the row, untouched


def strip_tag(text, tag):
    """The inside of the first <tag>...</tag> block, or the text itself: solutions come with and without tags."""
    match = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return (match.group(1) if match else text).strip()


def parse_time(text):
    """'MM:SS' or 'HH:MM:SS' -> seconds."""
    seconds = 0.0
    for part in text.strip().split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def parse_example(row, index, media_root):
    """One row of a Video-R1 file -> Example. Raises DataError that names the row and what is wrong with it."""
    if not isinstance(row, dict):
        raise DataError(f"row {index} is not an object")
    where = f"row {index} (problem_id {row.get('problem_id', 'missing')})"
    missing = [key for key in ("problem", "problem_type", "solution", "data_type") if row.get(key) in (None, "")]
    if missing:
        raise DataError(f"{where} has no {', '.join(missing)}")
    if row["problem_type"] not in PROBLEM_TYPES:
        raise DataError(f"{where} has problem_type {row['problem_type']!r}; known are {', '.join(PROBLEM_TYPES)}")
    if row["data_type"] not in ("video", "image", "text"):
        raise DataError(f"{where} has data_type {row['data_type']!r}; known are video, image, text")
    media = ""
    if row["data_type"] != "text":
        if not row.get("path"):
            raise DataError(f"{where} has no {row['data_type']}: its path is empty")
        media = resolve_media(row["path"], media_root, where)
    options, process = row.get("options") or [], row.get("process") or ""
    if not isinstance(options, list) or not isinstance(process, str):
        raise DataError(f"{where}: options must be a list and process a text")
    try:
        spans = [(*span.partition("-"), sentence) for span, sentence in (row.get("grounding") or {}).items()]
        grounding = [(parse_time(start), parse_time(end or start), sentence) for start, _, end, sentence in spans]
        evidence = [(float(start), float(end)) for start, end in row.get("evidence") or []]
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f'{where}: grounding must be {{"MM:SS-MM:SS": sentence}}, evidence [[start, end], ...] ({error})') from error
    known = {"problem_id", "problem", "options", "problem_type", "solution", "path", "data_type", "process", "grounding", "evidence"}
    return Example(
        id=str(row.get("problem_id", index)),
        question=str(row["problem"]),
        options=[str(option) for option in options],
        problem_type=row["problem_type"],
        answer=strip_tag(str(row["solution"]), "answer"),
        media=media,
        media_type=row["data_type"],
        reasoning=strip_tag(process, "think"),
        grounding=grounding,
        evidence=evidence,
        extra={key: value for key, value in row.items() if key not in known},
    )


def resolve_media(path, media_root, where=""):
    """A row's path joined to the media root; a path that leaves the root is refused (rule 6 of the project)."""
    root = os.path.realpath(media_root)
    full = os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([root, full]) != root:
        raise DataError(f"{where} points outside the media root {root}: {path}")
    return full


def load_examples(dataset_name, media_root=None):
    """A data set file -> list of Example, in file order.

    media_root: folder that the rows' paths start from; default: the data set file's folder.
    Raises DataError (one sentence) for a missing or malformed file or row.
    """
    file = Path(dataset_name)
    if not file.is_file():
        raise DataError(f"data set {file} not found (a JSON array or JSON lines file is expected)")
    try:
        text = file.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.split("\n") if line.strip()] if file.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:  # not JSON, or not UTF-8
        raise DataError(f"data set {file} is not valid JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"data set {file} holds no examples (a non-empty JSON array is expected)")
    examples = [parse_example(row, index, media_root or file.parent) for index, row in enumerate(rows)]
    repeated = len(examples) - len({example.id for example in examples})
    if repeated:
        raise DataError(f"data set {file} repeats {repeated} problem_id values; priors and results are joined by it")
    return examples


# ---------------------------------------------------------------------------------------------------------------- media


def open_video(path):
    """decord reader of a video file; MediaError with the cause when it is missing, empty or not a video."""
    if not os.path.isfile(path):
        raise MediaError(f"{path}: no such file")
    try:
        reader = decord.VideoReader(path, num_threads=1)
    except (decord.DECORDError, RuntimeError) as error:  # decord raises either, by the kind of damage
        raise MediaError(f"{path}: not a readable video ({first_words(error)})") from error
    if len(reader) == 0:
        raise MediaError(f"{path}: the video has no frames")
    return reader


def first_words(error):
    """The sentence in a decord message, which comes wrapped in times and source paths and with a C++ stack trace behind it."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^(\[[^]]*\]\s*|\S*\.(cc|h):\d+:\s*)*", "", line)[:160]


def uniform_frames(total, k):
    """Indices of k frames spread evenly over a video of `total`: round(linspace(0, total - 1, k)); all of them when there are fewer."""
    return np.linspace(0, total - 1, min(k, total)).round().astype(int).tolist()


def decode_frames(path, indices):
    """Frames of a video: indices (K,) -> uint8 array (K, H, W, 3) RGB and their times (K,) in seconds (presentation start)."""
    reader = open_video(path)
    if min(indices) < 0 or max(indices) >= len(reader):
        raise MediaError(f"{path}: frames {min(indices)} to {max(indices)} asked for, the video has 0 to {len(reader) - 1}")
    try:
        frames = reader.get_batch(list(indices)).asnumpy()
        times = reader.get_frame_timestamp(list(indices))[:, 0]
    except (decord.DECORDError, RuntimeError) as error:
        raise MediaError(f"{path}: damaged video ({first_words(error)})") from error
    return frames, times


def load_image(path):
    """An image as one frame: uint8 array (1, H, W, 3) RGB."""
    if not os.path.isfile(path):
        raise MediaError(f"{path}: no such file")
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))[None]
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise MediaError(f"{path}: not a readable image ({error})") from error


def resize_frames(frames, min_pixels, max_pixels, factor=28):
    """(K, H, W, 3) -> (K, 3, h, w): sides multiples of `factor`, min_pixels <= h*w <= max_pixels, aspect kept, bicubic."""
    height, width = smart_resize(*frames.shape[1:3], factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
    pixels = torch.tensor(frames).permute(0, 3, 1, 2).float()  # (K, 3, H, W)
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)


# -------------------------------------------------------------------------------------------------------------- prompts


def build_prompt(example, template=PROMPT_TEMPLATE):
    """The user turn's text, as Video-R1 writes it: question, 'Options:' and one option a line, then the instruction."""
    question = example.question
    if example.options:
        question += "\nOptions:\n" + "\n".join(example.options)
    return template.format(question=question, instruction=INSTRUCTIONS[example.problem_type])


def chat_text(processor, example, template=PROMPT_TEMPLATE):
    """The chat-templated prompt with its media placeholder, ending where the assistant begins."""
    content = [{"type": example.media_type}] if example.media_type != "text" else []
    content.append({"type": "text", "text": build_prompt(example, template)})
    return processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)


def target_text(example):
    """What SFT teaches: think block, answer block."""
    return f"<think>{example.reasoning}</think><answer>{example.answer}</answer>"


class Encoder:
    """Examples -> model inputs through the checkpoint's own processor. Decoded media are kept up to `cache_gb`, the oldest leave first."""

    def __init__(self, processor, min_pixels, max_pixels, frames=16, template=PROMPT_TEMPLATE, cache_gb=1.0):
        self.processor, self.template, self.frames = processor, template, frames
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.factor = processor.image_processor.patch_size * processor.image_processor.merge_size
        self.media, self.media_bytes, self.limit = OrderedDict(), 0, int(cache_gb * 1e9)  # (path, frame indices) -> frames, patches

    def encode(self, example, row=None, shuffle=None):
        """-> dict: input_ids (P,), pixel_values (patches, C), grid_thw (3,), second_per_grid, times (K,) of the frames in seconds.

        row: the example's row of a priors file, which says the frames; without one they are `frames` uniform ones.
        shuffle: a permutation of the frames (the temporal reward's control); times and prompt stay as they are.
        """
        text = chat_text(self.processor, example, self.template)
        if example.media_type == "text":
            ids = self.processor.tokenizer(text, return_tensors="pt")["input_ids"][0]
            return {"input_ids": ids, "pixel_values": None, "grid_thw": None, "second_per_grid": 1.0, "times": []}
        entry = self.load(example, row)
        if shuffle is not None:
            return self.process(example, text, entry["frames"][list(shuffle)], entry)
        prompts = entry["prompts"]
        if text not in prompts:
            item = self.process(example, text, entry["frames"], entry)
            prompts[text] = item.pop("input_ids")
            entry.update(item)
        return {**entry, "input_ids": prompts[text]}

    def load(self, example, row):
        """Decoded, resized frames of the example's medium, from the cache if they are there."""
        key = (example.media, tuple(row["frames"]) if row else None)
        if key not in self.media:
            if example.media_type == "image":
                frames, times = load_image(example.media), [0.0]
            else:
                frames, times = decode_frames(example.media, key[1] or uniform_frames(len(open_video(example.media)), self.frames))
            try:
                frames = resize_frames(frames, self.min_pixels, self.max_pixels, self.factor)
            except ValueError as error:  # one side over 200 times the other
                raise MediaError(f"{example.media}: cannot be resized ({error})") from error
            fps = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 1.0
            size = (5 if len(times) > 1 else 9) * frames.numel()  # the frames and their float32 patches, in which an image stands twice
            self.media[key] = {"frames": frames, "times": [float(t) for t in times], "fps": float(fps), "prompts": {}, "bytes": size}
            self.media_bytes += size
            while self.media_bytes > self.limit and len(self.media) > 1:
                self.media_bytes -= self.media.popitem(last=False)[1]["bytes"]
        self.media.move_to_end(key)
        entry = self.media[key]
        if row and not np.allclose(entry["times"], row["times"], atol=0.02):
            raise DataError(f"{example.media}: its prior was made for other frames (the times differ); build the priors again")
        return entry

    def process(self, example, text, frames, entry):
        """The processor's view of prompt and frames; the size was settled by resize_frames."""
        if example.media_type == "image":
            output = self.processor(text=[text], images=[frames[0]], do_resize=False, return_tensors="pt")
            pixels, grid, seconds = output["pixel_values"], output["image_grid_thw"][0], 1.0
        else:
            metadata = {"fps": entry["fps"], "total_num_frames": len(frames), "frames_indices": list(range(len(frames)))}
            output = self.processor(text=[text], videos=[frames], video_metadata=[metadata], do_sample_frames=False, do_resize=False,
                                    return_tensors="pt")
            pixels, grid = output["pixel_values_videos"], output["video_grid_thw"][0]
            seconds = self.processor.video_processor.temporal_patch_size / entry["fps"]
        return {"input_ids": output["input_ids"][0], "pixel_values": pixels, "grid_thw": grid, "second_per_grid": seconds,
                "times": entry["times"]}
