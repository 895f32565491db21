"""Stage 1, the consensus prior: which of a video's K sampled frames a question should rest on (VideoCFR, arXiv 2606.18441, Eq. 1-2).

    python prior.py --dataset_name toy/heldout.json --clip local-dir:toy/clip --output priors.jsonl        # the toy, on a CPU
    python prior.py --dataset_name Video-R1-260k.json --media_root DATA --output priors.jsonl              # CLIP ViT-B-32 by OpenAI

Two cues vote on K frames spread evenly over the video: frames that begin a scene (jumps between colour histograms) and frames that look
like the question (CLIP). A frame's weight is w_base, plus w_scene if the first cue names it, plus w_sem if the second does; the weights
divided by their sum are P. Both cues' scores are stored beside P, so that other weights need no second look at the pixels.
One JSON line an example: problem_id, frames (indices in the video), times (s), scene_scores, semantic_scores, scene and semantic
(positions among the K frames), prior, settings. An image is one frame with P = [1.0] and no cues; a text-only example has no row.
"""

import json
import math
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import cv2
import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import HfArgumentParser

from data import DataError, MediaError, decode_frames, load_examples, load_image, open_video, uniform_frames

CONE_BINS, CONE_RANGES = [25, 25, 32], [-256, 256, -256, 256, 0, 256]  # scene cue: chroma x, y and value; odd, so grey is mid-bin
HISTOGRAM_SIGMA, HISTOGRAM_SIDE = 2.0, 160  # its smoothing, in bins; its frames are shrunk to this many pixels on the long side
KEPT_TEXTS = 4096  # encoded questions kept for the next video that asks the same


@dataclass
class PriorSettings:
    """What makes a prior; every row records it. train.py has the same flags."""

    frames: int = field(default=16, metadata={"help": "K of Eq. 1-2: frames sampled evenly from a video (all of a shorter one)"})
    scene_threshold: float = field(default=0.2, metadata={
        "help": "scene cue, the S_scene of Eq. 1: the least distance (0-1) between neighbouring frames' histograms that can be a cut"})
    semantic_k: int | None = field(default=None, metadata={
        "help": "semantic cue, the S_sem of Eq. 1: how many frames most like the question are taken; None: a quarter of K, rounded up"})
    clip: str = field(default="ViT-B-32", metadata={
        "help": "image-text model of the semantic cue: a name of open_clip or local-dir:FOLDER (open_clip_config.json, safetensors)"})
    clip_pretrained: str = field(default="openai", metadata={
        "help": "open_clip's tag of the weights, or a .safetensors file; unused with local-dir: and hf-hub:"})
    w_base: float = field(default=0.1, metadata={"help": "w_base of Eq. 1: weight that every frame has"})
    w_scene: float = field(default=1.0, metadata={"help": "lambda_scene of Eq. 1: added to a frame that begins a scene"})
    w_sem: float = field(default=3.0, metadata={"help": "lambda_sem of Eq. 1: added to a frame that is like the question"})

    def __post_init__(self):
        if self.frames < 1 or (self.semantic_k is not None and self.semantic_k < 1):
            raise DataError("--frames and --semantic_k must be at least 1")
        if self.w_base <= 0 or self.w_scene < 0 or self.w_sem < 0:
            raise DataError("--w_base must be above 0, --w_scene and --w_sem at least 0: P is a distribution over all frames")


@dataclass(kw_only=True)
class PriorArguments(PriorSettings):
    """The command line: the settings and the files."""

    dataset_name: str = field(metadata={"help": "data set file in Video-R1's format (JSON array or .jsonl)"})
    output: str = field(default="priors.jsonl", metadata={"help": "file to write; media that cannot be read go to OUTPUT.errors.jsonl"})
    media_root: str | None = field(default=None, metadata={"help": "folder that the data set's paths start from; None: the data set's own"})


# ------------------------------------------------------------------------------------------------- frames and the scene cue


def smoothing_matrix(bins, sigma=HISTOGRAM_SIGMA):
    """(bins, bins): column j spreads the mass of bin j over its neighbours, a Gaussian cut at 3 sigma; every column sums to 1."""
    distance = np.arange(bins)[:, None] - np.arange(bins)  # (bins, bins)
    kernel = np.exp(-0.5 * (distance / sigma) ** 2) * (abs(distance) <= 3 * sigma)
    return (kernel / kernel.sum(0)).astype(np.float32)


SMOOTHING = [smoothing_matrix(bins) for bins in CONE_BINS]
HUE_CIRCLE = np.exp(2j * np.pi * np.arange(256) / 180)  # OpenCV's 8-bit hue is in units of 2 degrees


def hsv_histogram(frame):
    """(H, W, 3) uint8 RGB -> (25, 25, 32) float32 smoothed histogram of its HSV colours.

    Binned in the HSV cone, not in raw (H, S, V): x, y = C cos H, C sin H with C = S V / 255, and V. Raw hue is noise on grey pixels, and a
    hard bin border lets one grey level of flicker move all the mass, so static clips would show cuts. In the cone both are continuous.
    """
    scale = HISTOGRAM_SIDE / max(frame.shape[:2])
    if scale < 1:
        frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    hue, saturation, value = cv2.split(cv2.cvtColor(frame, cv2.COLOR_RGB2HSV))  # each (h, w) uint8
    chroma = cv2.multiply(saturation, value, scale=1 / 255, dtype=cv2.CV_32F)  # (h, w)
    cone = [chroma * table[hue] for table in (HUE_CIRCLE.real.astype(np.float32), HUE_CIRCLE.imag.astype(np.float32))]
    cone = cv2.merge([*cone, value.astype(np.float32)])  # (h, w, 3)
    histogram = cv2.calcHist([cone], [0, 1, 2], None, CONE_BINS, CONE_RANGES)  # (25, 25, 32)
    return np.ascontiguousarray(np.einsum("xyv,ax,by,cv->abc", histogram, *SMOOTHING, optimize=True))


def scene_scores(frames):
    """(K, H, W, 3) uint8 RGB -> (K,) float: Bhattacharyya distance (0-1) of the HSV histograms of frames i-1 and i; 0 for i = 0."""
    histograms = [hsv_histogram(frame) for frame in frames]
    pairs = zip(histograms, histograms[1:], strict=False)
    return np.array([0.0, *(cv2.compareHist(before, after, cv2.HISTCMP_BHATTACHARYYA) for before, after in pairs)])  # (K,)


def scene_set(scores, threshold=0.2):
    """Scene scores (K,) -> ascending positions of the frames that begin a scene, the S_scene of Eq. 1.

    Criterion: s_i >= threshold, and s_i is a peak: at least twice the calmest value within two samples to its left and within two to its
    right. So a pan counts once at most and a steady drift never, yet two cuts in a row (a scene of a single sampled frame) are both found;
    of three or more in a row the inner ones would not be, so s_i >= 2 threshold counts without a peak.
    """
    chosen = []
    for i in range(1, len(scores)):
        sides = [side for side in (scores[max(i - 2, 0) : i], scores[i + 1 : i + 3]) if len(side)]
        floor = max(min(side) for side in sides)
        if scores[i] >= threshold and (scores[i] >= 2 * floor or scores[i] >= 2 * threshold):
            chosen.append(i)
    return chosen


# ----------------------------------------------------------------------------------------------------------- the semantic cue


@dataclass
class Clip:
    """An image-text model with what belongs to it."""

    model: torch.nn.Module
    preprocess: object  # PIL image -> (3, h, w) float
    tokenizer: object  # list of N str -> (N, context) int64, longer texts cut to the context
    device: str
    texts: dict = field(default_factory=dict)  # question -> (D,) unit feature


def load_clip(name, pretrained=None, device="cpu"):
    """open_clip model -> Clip. name: one of open_clip's, hf-hub:REPO or local-dir:FOLDER (open_clip_config.json, safetensors weights, and
    tokenizer files if its text_cfg has hf_tokenizer_name). DataError if it cannot be loaded; missing or pickled weights are refused."""
    folder = Path(name.removeprefix("local-dir:"))
    try:
        if name.startswith("local-dir:"):
            files = {file.name for file in folder.iterdir()}
            preferred = files & {"open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"}  # what open_clip looks for first
            if not preferred and (not list(folder.glob("*.safetensors")) or any(file.endswith((".bin", ".pth")) for file in files)):
                raise DataError(f"{folder} needs its weights as open_clip_model.safetensors (pickled weights are not loaded)")
        elif pretrained and os.path.isfile(pretrained) and not pretrained.endswith(".safetensors"):
            raise DataError(f"{pretrained} is not a .safetensors file (pickled weights are not loaded)")
        schema = name.startswith(("local-dir:", "hf-hub:"))
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=None if schema else pretrained, device=device, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except DataError:
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise DataError(f"CLIP model {name} ({pretrained}) cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    return Clip(model.eval(), preprocess, tokenizer, device)


@torch.no_grad()
def encode_frames(frames, clip, batch=64):
    """(K, H, W, 3) uint8 RGB -> (K, D) unit image features; they depend on the video only, so one call serves all its questions."""
    features = []
    for start in range(0, len(frames), batch):
        pixels = torch.stack([clip.preprocess(Image.fromarray(frame)) for frame in frames[start : start + batch]])  # (batch, 3, h, w)
        features.append(clip.model.encode_image(pixels.to(clip.device), normalize=True).float().cpu())  # (batch, D)
    return torch.cat(features)


@torch.no_grad()
def encode_texts(texts, clip):
    """N texts -> (N, D) unit text features; texts seen lately are not encoded again."""
    if len(clip.texts) > KEPT_TEXTS:
        clip.texts.clear()
    new = list(dict.fromkeys(text for text in texts if text not in clip.texts))
    if new:
        features = clip.model.encode_text(clip.tokenizer(new).to(clip.device), normalize=True).float().cpu()  # (new, D)
        clip.texts.update(zip(new, features, strict=True))
    return torch.stack([clip.texts[text] for text in texts])


def semantic_scores(frames, question, clip):
    """(K, H, W, 3) uint8 RGB and a question -> (K,) cosine similarity of each frame with it, in [-1, 1]."""
    return encode_frames(frames, clip) @ encode_texts([question], clip)[0]  # (K, D) @ (D,)


def semantic_set(scores, k=None):
    """Semantic scores (K,) -> ascending positions of the k highest (None: ceil(K / 4)), the S_sem of Eq. 1; of equals the earlier one."""
    k = math.ceil(len(scores) / 4) if k is None else k
    return sorted(sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:k])


# ------------------------------------------------------------------------------------------------------------ fusion and rows


def fuse(k, scene, semantic, w_base=0.1, w_scene=1.0, w_sem=3.0):
    """The prior P, (k,) summing to 1, from the two sets of positions.

    Eq. 1: w_i = w_base + 1[i in S_scene] lambda_scene + 1[i in S_sem] lambda_sem; Eq. 2: P(i) = w_i / sum_j w_j.
    """
    weights = torch.full((k,), w_base)  # (k,)
    weights[list(scene)] += w_scene
    weights[list(semantic)] += w_sem
    return weights / weights.sum()


def media_rows(examples, clip, arguments):
    """The rows of examples that share one video or image, which is decoded and encoded once. MediaError when it cannot be read."""
    indices, times, jumps, likeness = [0], [0.0], [], [[]] * len(examples)  # an image: one frame, no cues
    if examples[0].media_type == "image":
        load_image(examples[0].media)  # nothing is computed from it, but a broken one must be known
    else:
        indices = uniform_frames(len(open_video(examples[0].media)), arguments.frames)
        frames, times = decode_frames(examples[0].media, indices)  # (K, H, W, 3), (K,)
        jumps = scene_scores(frames)  # (K,)
        likeness = encode_texts([example.question for example in examples], clip) @ encode_frames(frames, clip).T  # (N, D) @ (D, K)
    times, jumps = ([round(float(value), 6) for value in values] for values in (times, jumps))
    rows = []
    for example, scores in zip(examples, likeness, strict=True):
        scores = [round(float(value), 6) for value in scores]  # rounded first: the sets follow from the scores in the file
        scene, semantic = scene_set(jumps, arguments.scene_threshold), semantic_set(scores, arguments.semantic_k)
        prior = fuse(len(indices), scene, semantic, arguments.w_base, arguments.w_scene, arguments.w_sem)  # (K,)
        rows.append({
            "problem_id": example.id, "frames": indices, "times": times, "scene_scores": jumps, "semantic_scores": scores, "scene": scene,
            "semantic": semantic, "prior": [float(f"{value:.9g}") for value in prior.tolist()],  # nine digits give back the float32
            "settings": {setting.name: getattr(arguments, setting.name) for setting in fields(PriorSettings)}})
    return rows


def make_prior(example, clip, arguments):
    """Video or image example -> its row of the priors file (see the top of this file). MediaError when the medium cannot be read."""
    return media_rows([example], clip, arguments)[0]


def build_priors(examples, clip, arguments):
    """Examples -> (rows in their order, errors). arguments: PriorSettings.

    errors: [{"problem_id", "media", "cause"}, ...] for examples whose medium cannot be read; they have no row and nothing replaces them.
    Text-only examples have neither.
    """
    groups = {}
    for example in examples:
        if example.media_type != "text":
            groups.setdefault((example.media_type, example.media), []).append(example)
    rows, errors = {}, {}
    for (_, media), group in tqdm(groups.items(), desc="priors", unit="medium"):
        try:
            rows.update((row["problem_id"], row) for row in media_rows(group, clip, arguments))
        except MediaError as error:
            errors.update((example.id, {"problem_id": example.id, "media": media, "cause": str(error)}) for example in group)
    return ([rows[example.id] for example in examples if example.id in rows],
            [errors[example.id] for example in examples if example.id in errors])


# --------------------------------------------------------------------------------------------------------------------- files


def check_row(row):
    """What is wrong with a row of a priors file, in words; '' for a good one."""
    if not isinstance(row, dict):
        return "is not an object"
    missing = [key for key in ("problem_id", "frames", "times", "prior") if key not in row]
    if missing:
        return f"has no {', '.join(missing)}"
    frames, times, prior = row["frames"], row["times"], row["prior"]
    if not all(isinstance(values, list) and values for values in (frames, times, prior)):
        return "has frames, times or prior that are not non-empty lists"
    if not len(frames) == len(times) == len(prior):
        return f"has {len(frames)} frames, {len(times)} times and {len(prior)} prior values"
    if not all(type(index) is int for index in frames) or frames[0] < 0 or any(a >= b for a, b in zip(frames, frames[1:], strict=False)):
        return "has frames that are not ascending indices"
    if not all(type(value) in (int, float) and math.isfinite(value) and value >= 0 for value in [*times, *prior]):
        return "has times or prior values that are not numbers of at least 0"
    return "" if abs(sum(prior) - 1) < 1e-3 else f"has a prior that sums to {sum(prior):.4g}, not 1"


def load_priors(path, examples, frames):
    """Priors file -> {problem_id: row} for the video and image examples given; text-only examples need none.

    frames: the run's K. DataError (one sentence) when the file or a row is malformed, an example has no row, or a video's row was made
    for another K. A video of fewer than K frames is fine: its row has all of its frames.
    """
    if not os.path.isfile(path):
        raise DataError(f"priors file {path} not found (prior.py makes it)")
    found = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"priors file {path}, line {number} is not valid JSON ({error}); build it again") from error
            fault = check_row(row)
            if fault:
                raise DataError(f"priors file {path}, line {number} {fault}; build it again")
            found[str(row["problem_id"])] = row
    needed = [example for example in examples if example.media_type != "text"]
    missing = [example.id for example in needed if example.id not in found]
    if missing:
        raise DataError(f"priors file {path} has no row for {len(missing)} of {len(needed)} examples, the first is {missing[0]}; "
                        "build it for this data set")
    for example in needed:
        indices = found[example.id]["frames"]
        short = len(indices) < frames and indices == list(range(len(indices)))  # every frame of a short video, or an image's one
        if example.media_type == "video" and len(indices) != frames and not short:
            made_for = found[example.id].get("settings", {}).get("frames", len(indices))
            raise DataError(f"the priors file {path} was made for K={made_for} frames, this run uses K={frames} "
                            f"({example.id} has {len(indices)}); build it again with --frames {frames}")
    return {example.id: found[example.id] for example in needed}


def write_lines(path, rows):
    """Rows -> JSON lines, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(f"{path}.tmp")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    unfinished.replace(path)


def main():
    parser = HfArgumentParser(PriorArguments, allow_abbrev=False, description=(
        "Build the consensus priors of a data set: for every question, which of K evenly sampled frames of its video to rest on "
        "(VideoCFR, arXiv 2606.18441, Eq. 1-2). Writes one JSON line an example. Exit code 0: done, media that could not be read are "
        "counted and listed; 2: nothing written, with one sentence saying why."))
    namespace = parser.parse_args()
    try:
        arguments = PriorArguments(**vars(namespace))
        examples = load_examples(arguments.dataset_name, arguments.media_root)
        if os.path.exists(arguments.output) and os.path.samefile(arguments.output, arguments.dataset_name):
            raise DataError(f"--output {arguments.output} is the data set itself")
        clip = load_clip(arguments.clip, arguments.clip_pretrained, "cuda" if torch.cuda.is_available() else "cpu")
        rows, errors = build_priors(examples, clip, arguments)
        if errors and not rows:
            raise DataError(f"none of the {len(errors)} examples' media can be read; the first: {errors[0]['cause']}")
    except DataError as error:
        print(f"prior.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    write_lines(arguments.output, rows)
    log = Path(f"{arguments.output}.errors.jsonl")
    log.unlink(missing_ok=True)  # of an earlier run
    if errors:
        write_lines(log, errors)
    left_out = len(examples) - len(rows) - len(errors)
    print(f"{len(rows)} priors written to {arguments.output}; {len(errors)} examples skipped for unreadable media"
          f"{f' (see {log})' if errors else ''}; {left_out} text-only examples need none")


if __name__ == "__main__":
    main()
