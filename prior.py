"""Stage 1, the consensus prior: which of a video's K sampled frames a question should rest on.

    python prior.py --video clip.mp4 --question "Who falls first?"     # a table and prior.png
    python prior.py --dataset_name Video-R1-260k.json --media_root DATA --output priors.jsonl
    torchrun --nproc_per_node 8 prior.py --dataset_name ...            # or deepspeed
    python prior.py --scores priors.jsonl --prior no_scene --output no_scene.jsonl
    python prior.py --dataset_name toy-seed0/heldout.json --clip local-dir:toy-seed0/clip

The second command continues where an interrupted one stopped; nodes of the third share a folder;
the fourth weighs stored scores anew; the last runs the toy on a CPU.

Two cues vote on K frames spread evenly over the video (VideoCFR, arXiv 2606.18441, Eq. 1-2):
frames that begin a scene (jumps between colour histograms, or a detector of PySceneDetect) and
frames that look like the question (CLIP). A frame's weight is w_base, plus w_scene if the first cue
names it, plus w_sem if the second does; the weights divided by their sum are P.

One JSON line per example: problem_id, question, media (as the data set names it), frames (indices
in the video), times (s), scene_scores, semantic_scores, scene and semantic (positions among the K
frames), prior, settings. An image is one frame with P = [1.0] and no cues; a text-only example has
no row. Worker processes decode while this process runs CLIP.
"""

import json
import math
import os
import shutil
import sys
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
import open_clip
import scenedetect
import torch
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from common.data import (
    Cues,
    DataError,
    Example,
    MediaError,
    Prior,
    load_examples,
    parse_example,
    read_rows,
)
from common.flags import Parser, flag
from common.media import decode_frames, load_image, open_video, read_frames, uniform_frames
from common.workers import Pool, ShardedLines, check_settings, join_ranks, write_lines, write_whole

# Histograms of the scene cue: bins of the chroma's x and y, odd so that grey is mid-bin, and value.
CONE_BINS = [25, 25, 32]
CONE_RANGES = [-256, 256, -256, 256, 0, 256]

HISTOGRAM_SIGMA = 2.0  # smoothing, in bins

HISTOGRAM_SIDE = 160  # pixels on the long side to which frames are shrunk first

DETECTORS = {
    "content": scenedetect.ContentDetector,
    "adaptive": scenedetect.AdaptiveDetector,
    "hash": scenedetect.HashDetector,
    "histogram": scenedetect.HistogramDetector,
    "threshold": scenedetect.ThresholdDetector,
}

SHORTEST_SCENE = "0.6s"  # of the detectors; the default of PySceneDetect's command line

# Bytes of decoded frames in memory at a time: all of them at 640x360, ten at 1080p, two in 4K.
CHUNK_BYTES = 1 << 26

# Weights that open_clip finds first in a folder. Pickles are not loaded.
CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")

WEIGHTS = ("prior", "w_base", "w_scene", "w_sem")  # settings that need no scores


@dataclass
class PriorSettings:
    """What a prior depends on; every row records it. train.py has the same flags."""

    frames: int = flag(
        16,
        "K of Eq. 1-2: frames sampled evenly from a video; all of a shorter one.",
        group="Prior (Eq. 1-2)",
    )
    fps: float | None = flag(
        None, "Frames a second to sample evenly instead, at most --frames of them. None: --frames."
    )
    scene: str = flag(
        "hsv",
        "Scene cue, S_scene of Eq. 1. hsv (the paper's): distances of the sampled frames' "
        "histograms. The others: PySceneDetect's detectors on every frame of the video (slower); "
        "threshold finds fades and cuts through black only.",
        choices=["hsv", *DETECTORS],
    )
    scene_threshold: float | None = flag(
        None,
        "hsv: least distance (0-1) of neighbouring frames' histograms that can be a cut, None: "
        "0.2. Other --scene: the detector's threshold, None: its default.",
    )
    semantic_k: int | None = flag(
        None,
        "Semantic cue, S_sem of Eq. 1: number of frames most like the question. None: a quarter "
        "of K, rounded up.",
    )
    semantic_options: bool = flag(
        False,
        "Compare frames with the question and its options, cut to the model's context, not with "
        "the question alone.",
    )
    clip: str = flag(
        "ViT-B-32",
        "Image-text model of the semantic cue: a name of open_clip (SigLIP's too) or "
        "local-dir:FOLDER (open_clip_config.json and safetensors).",
    )
    clip_pretrained: str = flag(
        "openai",
        "open_clip's tag of the weights, or a .safetensors file; unused with local-dir: and "
        "hf-hub:.",
    )
    prior: str = flag(
        "full",
        "Cues in P; the paper's ablation rows. Without the semantic cue no CLIP model is loaded.",
        choices=["full", "no_scene", "no_semantic", "uniform"],
    )
    w_base: float = flag(0.1, "w_base of Eq. 1: weight of every frame.")
    w_scene: float = flag(1.0, "lambda_scene of Eq. 1: added to a frame that begins a scene.")
    w_sem: float = flag(3.0, "lambda_sem of Eq. 1: added to a frame that is like the question.")

    def __post_init__(self):
        # P is a distribution over all frames. Flags of the command line are checked as well.
        least = {"scene_threshold": 0, "w_scene": 0, "w_sem": 0, "workers": 0}
        least |= {"frames": 1, "semantic_k": 1}
        for name, bound in least.items():
            value = getattr(self, name, None)
            if value is not None and not bound <= value < math.inf:
                raise DataError(f"--{name} must be at least {bound} and finite")
        for name in ("fps", "w_base", "decode_timeout"):
            value = getattr(self, name, None)
            if value is not None and not 0 < value < math.inf:
                raise DataError(f"--{name} must be above 0 and finite")

    @property
    def has_scene(self):
        return self.prior in ("full", "no_semantic")

    @property
    def has_semantic(self):
        return self.prior in ("full", "no_scene")

    @property
    def hsv_threshold(self):
        return 0.2 if self.scene_threshold is None else self.scene_threshold


@dataclass(kw_only=True)
class PriorArguments(PriorSettings):
    """The command line: the settings and the files."""

    dataset_name: str | None = flag(
        None,
        "Data set file (JSON array or .jsonl; Video-R1, SEED-Bench-R1, TW-GRPO or Video-R2).",
        group="Files",
    )
    media_root: str | None = flag(
        None, "Folder that media paths start from. None: the data set file's folder."
    )
    video: str | None = flag(
        None, "One video instead of a data set: its prior is printed and drawn."
    )
    question: str | None = flag(None, "Question about --video.")
    scores: str | None = flag(
        None,
        "Priors file instead of a data set: its stored scores are weighed by this command's "
        "--prior, --w_base, --w_scene, --w_sem, --semantic_k and, for --scene hsv, "
        "--scene_threshold. Other settings stay as the file has them.",
    )
    output: str | None = flag(
        None,
        "File to write. None: priors.jsonl, or prior.png with --video. The same command continues "
        "an interrupted run, whose rows stay. Unusable examples are listed with their causes in "
        "OUTPUT.errors.jsonl and tried again by the next run.",
    )
    export_frame_sets: str | None = flag(
        None,
        "JSON file for a copy of the data set with the release's field frame_sets (frame indices: "
        "uniform, scene, semantic).",
    )
    workers: int | None = flag(
        None,
        "Processes that decode. None: the cores, half of them where CLIP runs on the CPU, shared "
        "by the ranks of a machine. 0: decode in this process, without a timeout.",
        group="Run",
    )
    pin_workers: bool = flag(
        True,
        "Keep each worker on its own core. Use false if other containers run prior.py on the same "
        "machine: all begin with its first cores.",
    )
    decode_timeout: float = flag(
        300.0, "Seconds after which a decoder is killed and its video counts as broken."
    )
    local_rank: int = flag(-1, "Set by the deepspeed launcher.")

    def __post_init__(self):
        super().__post_init__()
        sources = ("dataset_name", "video", "scores")
        given = [name for name in sources if getattr(self, name) is not None]
        if len(given) != 1:
            excess = f", not {' and '.join(given)}" if given else ""
            raise DataError(f"give one of --dataset_name, --video and --scores{excess}")
        if (self.question is None) != (self.video is None):
            raise DataError("--video and --question go together")
        if self.export_frame_sets and not self.dataset_name:
            raise DataError("--export_frame_sets needs --dataset_name, whose rows it writes")
        self.output = self.output or ("prior.png" if self.video else "priors.jsonl")
        if self.video and Path(self.output).suffix not in (".png", ".svg", ".pdf"):
            raise DataError(f"--output {self.output}: a prior is drawn as .png, .svg or .pdf")
        exported = self.export_frame_sets
        if exported and Path(exported).suffix != ".json":
            raise DataError(f"--export_frame_sets {exported}: a JSON array, name it .json")
        # No file is written over another one of the command line.
        flag_of = {}
        for name in (*sources, "output", "export_frame_sets"):
            if getattr(self, name) is None:
                continue
            path = os.path.realpath(getattr(self, name))
            if path in flag_of:
                raise DataError(
                    f"--{name} {path} is the --{flag_of[path]} itself; choose another file to write"
                )
            flag_of[path] = name


def settings_of(settings):
    """The settings that a row records, as a dict: those of PriorSettings."""
    return {setting.name: getattr(settings, setting.name) for setting in fields(PriorSettings)}


# ---------------------------------------------------------------------------- cues, sets, fusion

# Unit vectors of OpenCV's 8-bit hue, which is in units of 2 degrees.
HUE_CIRCLE = np.exp(2j * np.pi * np.arange(256) / 180)  # (256,)
COSINE = HUE_CIRCLE.real.astype(np.float32)
SINE = HUE_CIRCLE.imag.astype(np.float32)

# Gaussian, cut at 3 sigma.
KERNEL = np.exp(-0.5 * (np.arange(-6, 7, dtype=np.float32) / HISTOGRAM_SIGMA) ** 2)  # (13,)
IDENTITY = np.ones(1, np.float32)


def blur(histogram):
    """Convolves each axis of an (A, B, C) float32 histogram with KERNEL, zero-padded."""
    for _ in range(3):
        # The last axis first, and so in turn. Not by BLAS, whose threads spin on shared cores.
        rows = histogram.reshape(-1, histogram.shape[-1])
        rows = cv2.sepFilter2D(rows, -1, KERNEL, IDENTITY, borderType=cv2.BORDER_CONSTANT)
        histogram = np.ascontiguousarray(np.moveaxis(rows.reshape(histogram.shape), -1, 0))
    return histogram


# The kernel's mass inside the borders: less near them.
SPREAD = blur(np.ones(CONE_BINS, np.float32))  # (25, 25, 32)


def hsv_histogram(frame):
    """Smoothed histogram of a frame's HSV colours.

    Its bins are those of the HSV cone, not of raw (H, S, V): x, y = C cos H, C sin H with
    C = S V / 255, and V. Raw hue is noise on grey pixels, and a hard bin border lets one grey level
    of flicker move all the mass, so that static clips would show cuts. In the cone both are
    continuous.

    Args:
        frame: (H, W, 3) uint8 RGB.
    Returns:
        (25, 25, 32) float32.
    """
    height, width = frame.shape[:2]
    scale = HISTOGRAM_SIDE / max(height, width)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    hue, saturation, value = cv2.split(cv2.cvtColor(frame, cv2.COLOR_RGB2HSV))  # each (h, w) uint8
    chroma = cv2.multiply(saturation, value, scale=1 / 255, dtype=cv2.CV_32F)  # (h, w)
    x = cv2.multiply(chroma, cv2.LUT(hue, COSINE))
    y = cv2.multiply(chroma, cv2.LUT(hue, SINE))
    cone = [x, y, value.astype(np.float32)]
    histogram = cv2.calcHist(cone, [0, 1, 2], None, CONE_BINS, CONE_RANGES)  # (25, 25, 32)
    # Divided first, so that every pixel keeps its weight.
    return blur(histogram / SPREAD)


def scene_scores(frames):
    """Bhattacharyya distance (0-1) of the HSV histograms of frames i-1 and i; 0 for i = 0.

    Args:
        frames: K of (H, W, 3) uint8 RGB.
    Returns:
        (K,) float64.
    """
    return histogram_distances([hsv_histogram(frame) for frame in frames])


def histogram_distances(histograms):
    distances = [0.0]
    for before, after in zip(histograms, histograms[1:], strict=False):
        distances.append(cv2.compareHist(before, after, cv2.HISTCMP_BHATTACHARYYA))
    return np.array(distances)  # (K,)


def detector_scores(path, times, name, threshold=None):
    """1 where a sampled frame is the first after a cut that a PySceneDetect detector finds, else 0.

    Args:
        times: (K,) seconds of the sampled frames since the video's first frame. A cut after the
            last of them is not seen.
        name: key of DETECTORS, applied to every frame of the video.
    Returns:
        (K,) float64.
    """
    options = {} if threshold is None else {"threshold": threshold}
    detector = DETECTORS[name](min_scene_len=SHORTEST_SCENE, **options)
    try:
        scenes = scenedetect.detect(path, detector)
    except (scenedetect.VideoOpenFailure, cv2.error, OSError) as error:
        cause = " ".join(str(error).split())[:160]
        raise MediaError(f"{path}: PySceneDetect cannot read the video ({cause})") from error
    scores = np.zeros(len(times))
    for start, _ in scenes[1:]:
        first = int(np.searchsorted(times, start.seconds - 1e-3))
        if first < len(times):
            scores[first] = 1.0
    return scores


def scene_set(scores, threshold=0.2):
    """Ascending positions of the frames that begin a scene, S_scene of Eq. 1.

    Criterion: s_i >= threshold, and s_i is a peak: at least twice the calmest value within two
    samples to its left and within two to its right. So a pan counts at most once and a steady drift
    never, yet two cuts in a row (a scene of a single sampled frame) are both found. Of three or
    more in a row the inner ones are no peaks, so s_i >= 2 threshold counts without a peak.

    Args:
        scores: (K,) scene scores.
    """
    chosen = []
    for i in range(1, len(scores)):
        left = min(scores[max(i - 2, 0) : i])
        right = min(scores[i + 1 : i + 3], default=left)
        is_peak = scores[i] >= 2 * max(left, right)
        if scores[i] >= threshold and (is_peak or scores[i] >= 2 * threshold):
            chosen.append(i)
    return chosen


@dataclass
class Clip:
    """An image-text model and its preprocessing."""

    model: torch.nn.Module
    preprocess: object  # PIL image -> (3, h, w) float
    tokenizer: object  # list of N str -> (N, context) int64, longer texts cut to the context
    device: str


def load_clip(name, pretrained=None, device="cpu"):
    """Loads an open_clip model; one without weights, or with pickled local ones, is refused.

    What a hub has as pickles only, open_clip reads by torch's weights_only.

    Args:
        name: a name of open_clip, hf-hub:REPO, or local-dir:FOLDER with open_clip_config.json,
            open_clip_model.safetensors, and tokenizer files if its text_cfg has hf_tokenizer_name.
        pretrained: open_clip's tag or a .safetensors file, for a name of open_clip.
    Returns:
        Clip in eval mode.
    Errors: DataError if it cannot be loaded.
    """
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if folder.is_dir() and not any((folder / file).is_file() for file in CLIP_FILES):
            raise DataError(
                f"{folder} needs its weights as {CLIP_FILES[0]} (pickled weights are not loaded)"
            )
    elif pretrained and os.path.isfile(pretrained) and not pretrained.endswith(".safetensors"):
        raise DataError(f"{pretrained} is not a .safetensors file (pickled weights are not loaded)")
    if name.startswith(("local-dir:", "hf-hub:")):
        pretrained = None
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, device=device, require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(name)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        cause = " ".join(str(error).split())[:300]
        raise DataError(
            f"CLIP model {name} ({pretrained}) cannot be loaded, "
            f"give --clip local-dir:FOLDER or --prior no_semantic: {cause}"
        ) from error
    return Clip(model.eval(), preprocess, tokenizer, device)


@torch.no_grad()
def encode_pixels(pixels, clip, batch=64):
    """Unit image features; they depend on the video only, so one call serves all its questions.

    Args:
        pixels: (K, 3, h, w) float32 of clip.preprocess.
    Returns:
        (K, D) float32 on the CPU.
    """
    parts = []
    for part in torch.as_tensor(pixels).split(batch):
        features = clip.model.encode_image(part.to(clip.device), normalize=True)  # (batch, D)
        parts.append(features.float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def encode_texts(texts, clip):
    """Unit text features (N, D) of N texts."""
    tokens = clip.tokenizer(texts).to(clip.device)  # (N, context)
    return clip.model.encode_text(tokens, normalize=True).float().cpu()


def semantic_scores(frames, question, clip):
    """Cosine similarity of each frame with the question, in [-1, 1].

    Args:
        frames: (K, H, W, 3) uint8 RGB.
        clip: Clip.
    Returns:
        (K,) float32.
    """
    images = [clip.preprocess(Image.fromarray(frame)) for frame in frames]
    pixels = torch.stack(images)  # (K, 3, h, w)
    return encode_pixels(pixels, clip) @ encode_texts([question], clip)[0]  # (K, D) @ (D,)


def semantic_set(scores, k=None):
    """Ascending positions of the k highest of (K,) semantic scores, S_sem of Eq. 1.

    k None: ceil(K / 4). Of equal scores the earlier counts.
    """
    if k is None:
        k = math.ceil(len(scores) / 4)
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    return sorted(order[:k])


def fuse(k, scene, semantic, w_base=0.1, w_scene=1.0, w_sem=3.0):
    """The prior P, (k,) summing to 1, from the two sets of positions.

    Eq. 1: w_i = w_base + 1[i in S_scene] lambda_scene + 1[i in S_sem] lambda_sem.
    Eq. 2: P(i) = w_i / sum_j w_j.
    """
    weights = torch.full((k,), w_base)  # (k,)
    weights[list(scene)] += w_scene
    weights[list(semantic)] += w_sem
    return weights / weights.sum()


# ------------------------------------------------------------------------------ from media to rows


def sample_frames(reader, settings):
    """Frame indices of an open video: --frames, or --fps a second but at most --frames, evenly."""
    total = len(reader)
    count = settings.frames
    if settings.fps is not None:
        spans = reader.get_frame_timestamp([0, total - 1])  # (2, 2): start and end, in seconds
        count = min(count, max(1, round((spans[1, 1] - spans[0, 0]) * settings.fps)))
    return uniform_frames(total, count)


def read_cues(medium, settings, preprocess=None):
    """Decodes a medium, holding CHUNK_BYTES of its frames at a time, or one frame.

    Args:
        medium: ("video" or "image", path).
        preprocess: Clip.preprocess; None: no pixels are returned.
    Returns:
        Cues.
    Errors: MediaError if the medium cannot be read.
    """
    kind, path = medium
    if kind == "image":
        load_image(path)  # finds a broken one
        return Cues([0], [0.0], [], None)
    reader = open_video(path)
    indices = sample_frames(reader, settings)
    times = []
    histograms = []
    pixels = []
    step = 1  # until the size of a frame is known
    while len(times) < len(indices):
        chunk = indices[len(times) : len(times) + step]
        frames, seconds = read_frames(reader, path, chunk)  # (step, H, W, 3), (step,)
        step = max(1, CHUNK_BYTES // frames[0].nbytes)
        times += [round(float(second), 6) for second in seconds]
        for frame in frames:
            if settings.scene == "hsv":
                histograms.append(hsv_histogram(frame))
            if preprocess is not None:
                pixels.append(preprocess(Image.fromarray(frame)).numpy())
    if settings.scene == "hsv":
        scores = histogram_distances(histograms)
    else:
        begin = float(reader.get_frame_timestamp([0])[0, 0])
        since_begin = np.array(times) - begin
        scores = detector_scores(path, since_begin, settings.scene, settings.scene_threshold)
    scores = [round(float(score), 6) for score in scores]
    return Cues(indices, times, scores, np.stack(pixels) if pixels else None)


def media_name(example):
    """The medium as the data set names it, whatever the media root."""
    return example.extra.get("path") or os.path.basename(example.media)


def new_row(example, frames, times):
    """Prior of an example without scores, sets and P."""
    return Prior(
        problem_id=example.id,
        question=example.question,
        media=media_name(example),
        frames=frames,
        times=times,
    )


def weigh(row, scene, semantic, settings):
    """A copy of a Prior with these sets, their P, and the settings that weighed them."""
    prior = fuse(
        len(row.frames),
        scene if settings.has_scene else [],
        semantic if settings.has_semantic else [],
        settings.w_base,
        settings.w_scene,
        settings.w_sem,
    )  # (K,)
    weights = {name: getattr(settings, name) for name in WEIGHTS}
    return replace(
        row,
        scene=scene,
        semantic=semantic,
        prior=[float(f"{value:.9g}") for value in prior.tolist()],  # exact for a float32
        settings={**row.settings, **weights},
    )


def weigh_scores(row, settings):
    """A copy of a Prior with the sets and P that follow from its scores, as --scores makes it."""
    if settings.scene == "hsv":
        scene = scene_set(row.scene_scores, settings.hsv_threshold)
    else:
        # A detector's scores are 0 or 1.
        scene = [position for position, score in enumerate(row.scene_scores) if score > 0]
    semantic = semantic_set(row.semantic_scores, settings.semantic_k)
    return weigh(replace(row, settings=settings_of(settings)), scene, semantic, settings)


def media_rows(examples, cues, clip, settings):
    """Priors of examples that share one medium; they depend on these examples and it alone.

    Args:
        cues: Cues of the medium.
        clip: Clip; None, or an image: no semantic scores.
    """
    likeness = None
    if clip is not None and cues.pixels is not None:
        texts = []
        for example in examples:
            options = example.options if settings.semantic_options else []
            texts.append(" ".join([example.question, *options]))
        likeness = encode_texts(texts, clip) @ encode_pixels(cues.pixels, clip).T  # (N, D) @ (D, K)
    rows = []
    for index, example in enumerate(examples):
        row = new_row(example, cues.frames, cues.times)
        row.scene_scores = cues.scene_scores
        if likeness is not None:
            row.semantic_scores = [round(float(value), 6) for value in likeness[index]]
        rows.append(weigh_scores(row, settings))
    return rows


def make_prior(example, clip, settings):
    """Prior of a video or image example, decoded in this process.

    Errors: MediaError if the medium cannot be read.
    """
    cues = read_cues((example.media_type, example.media), settings, clip and clip.preprocess)
    return media_rows([example], cues, clip, settings)[0]


def all_cues(media, settings, preprocess, workers=0, timeout=300.0, pin=True):
    """Yields (medium, Cues or MediaError) of every ("video" or "image", path) as they finish.

    Args:
        workers, timeout, pin: see Pool.
    """
    return Pool(workers, timeout, pin=pin).each(read_cues, media, settings, preprocess)


def group_by_medium(examples):
    """Examples as {("video" or "image", path): list of Example}, without text-only ones."""
    groups = {}
    for example in examples:
        if example.media_type != "text":
            groups.setdefault((example.media_type, example.media), []).append(example)
    return groups


def error_lines(examples, cause):
    """Rows of the errors file for examples that cannot be used."""
    cause = str(cause)
    return [{"problem_id": one.id, "media": one.media, "cause": cause} for one in examples]


def build_priors(examples, clip, settings):
    """Priors of examples, decoded in this process; the command line serves large data sets.

    Returns:
        list of Prior, those of a medium together; error lines {"problem_id", "media", "cause"} of
        examples whose medium cannot be read. Text-only examples have neither.
    """
    groups = group_by_medium(examples)
    rows = []
    errors = []
    found = all_cues(groups, settings, clip and clip.preprocess)
    for medium, cues in tqdm(found, total=len(groups), desc="priors", unit="video"):
        if isinstance(cues, MediaError):
            errors += error_lines(groups[medium], cues)
        else:
            rows += media_rows(groups[medium], cues, clip, settings)
    return rows, errors


def look_at(examples, settings, workers=0, timeout=300.0):
    """Reads the examples' media one by one until one can be read.

    Returns:
        error lines of those that cannot; an example that can, or None.
    """
    groups = group_by_medium(examples)
    errors = []
    with closing(all_cues(groups, settings, None, workers, timeout, pin=False)) as found:
        for medium, cues in found:
            if not isinstance(cues, MediaError):
                return errors, groups[medium][0]
            errors += error_lines(groups[medium], cues)
    return errors, None


# ------------------------------------------------------------------------ the release's frame_sets


def fits(frames, k, fps):
    """Whether a run with K samples these frames: K; fewer with --fps; all of a shorter video."""
    fewer = len(frames) < k and (fps or frames == list(range(len(frames))))
    return len(frames) == k or fewer


def frame_set_rows(examples, settings):
    """Priors of examples with the release's field frame_sets, whose videos are not decoded.

    The field is {"uniform", "scene", "semantic": frame indices}. The K frames are the uniform set;
    a frame of another set counts for the sampled frame nearest to it.

    Returns:
        list of Prior; error lines, as build_priors.
    Errors: DataError if a field is malformed or has another K.
    """
    rows = []
    errors = []
    for example in tqdm(examples, desc="frame_sets", unit="example", disable=not examples):
        sets = example.extra["frame_sets"]
        if not are_frame_sets(sets):
            raise DataError(
                f"{example.id}: frame_sets must have the lists uniform (not empty), scene and "
                "semantic of frame indices"
            )
        frames = sorted(set(sets["uniform"]))
        times = [0.0]
        if example.media_type == "video":
            if not fits(frames, settings.frames, settings.fps):
                raise DataError(
                    f"{example.id}: its frame_sets have {len(frames)} uniform frames, this run "
                    f"uses --frames {settings.frames}"
                )
            try:
                times = frame_times(example.media, tuple(frames))
            except MediaError as error:
                errors += error_lines([example], error)
                continue
        scene, semantic = (nearest(frames, sets[name]) for name in ("scene", "semantic"))
        rows.append(weigh(new_row(example, frames, times), scene, semantic, settings))
    return rows, errors


def nearest(frames, indices):
    """Ascending positions of the sampled frames that are nearest to some frame indices."""
    return sorted({int(np.abs(np.array(frames) - index).argmin()) for index in indices})


def are_frame_sets(sets):
    if not isinstance(sets, dict) or not sets.get("uniform"):
        return False
    lists = [sets.get(name) for name in ("uniform", "scene", "semantic")]
    if not all(isinstance(indices, list) for indices in lists):
        return False
    return all(type(index) is int and index >= 0 for index in chain(*lists))


@lru_cache(1 << 14)  # the questions of a video share its frames
def frame_times(path, frames):
    """Seconds of these frames of a video, without decoding them."""
    reader = open_video(path)
    if frames[-1] >= len(reader):
        raise MediaError(
            f"{path}: its frame_sets name frame {frames[-1]}, the video ends with {len(reader) - 1}"
        )
    return [round(float(time), 6) for time in reader.get_frame_timestamp(frames)[:, 0]]


def export_frame_sets(arguments):
    """Writes the data set with frame_sets in every row that has a prior, other rows unchanged."""
    priors = {row.problem_id: row for row in read_priors(arguments.output)}
    rows = read_rows(arguments.dataset_name)
    media_root = arguments.media_root or Path(arguments.dataset_name).parent
    count = 0
    for index, row in enumerate(rows):
        try:
            example = parse_example(row, index, media_root)
        except DataError:
            continue
        # Only the first row of an id has its prior.
        prior = priors.pop(example.id, None)
        if prior is None:
            continue
        count += 1
        row["frame_sets"] = {
            "uniform": prior.frames,
            "scene": [prior.frames[position] for position in prior.scene],
            "semantic": [prior.frames[position] for position in prior.semantic],
        }
    write_whole(arguments.export_frame_sets, [json.dumps(rows, indent=1).encode()])
    print(f"{count} of {len(rows)} rows have frame_sets in {arguments.export_frame_sets}")


# ----------------------------------------------------------------------------------- priors files


def check_row(row):
    """What is wrong with a parsed row of a priors file, in words; '' for a good one."""
    if not isinstance(row, dict):
        return "is not an object"
    if "problem_id" not in row:
        return "has no problem_id"
    if not isinstance(row.get("settings", {}), dict):
        return "has settings that are not an object"
    frames = row.get("frames")
    times = row.get("times")
    prior = row.get("prior")
    if not all(isinstance(values, list) and values for values in (frames, times, prior)):
        return "has frames, times or prior that are not non-empty lists"
    if not len(frames) == len(times) == len(prior):
        return f"has {len(frames)} frames, {len(times)} times and {len(prior)} prior values"
    indices = all(type(index) is int for index in frames)
    if not indices or frames[0] < 0 or frames != sorted(set(frames)):
        return "has frames that are not ascending indices"
    if not all(type(value) in (int, float) and math.isfinite(value) for value in [*times, *prior]):
        return "has times or prior values that are not numbers"
    if min(prior) < 0 or not abs(sum(prior) - 1) < 1e-3:
        return f"has a prior whose least value is {min(prior):.4g}, the sum {sum(prior):.4g}"
    return ""


def read_priors(path):
    """Yields the rows of a priors file, each a Prior; fields that it does not know are left out.

    Errors: DataError if the file or a row is malformed.
    """
    if not os.path.isfile(path):
        raise DataError(f"priors file {path} not found (prior.py makes it)")
    names = [one.name for one in fields(Prior)]
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                fault = check_row(row)
            except ValueError as error:  # not JSON, or not UTF-8
                fault = f"is not valid JSON ({error})"
            if fault:
                raise DataError(f"priors file {path}, line {number} {fault}; build it again")
            known = {name: row[name] for name in names if row.get(name) is not None}
            known["problem_id"] = str(row["problem_id"])
            yield Prior(**known)


def other_question(row, example):
    """Whether a Prior is about another question or medium than the example with its problem_id."""
    if row.question not in (None, example.question):
        return True
    return row.media not in (None, media_name(example))


def load_priors(path, examples, settings):
    """Priors of the video and image examples that have a row in a priors file.

    check_missing() asks why others have none.

    Args:
        settings: the run's PriorSettings. The names of CLIP models are not compared.
    Returns:
        {problem_id: Prior}.
    Errors: DataError if the file is malformed, or a row was made for another question, another K
        or with other settings.
    """
    needed = {example.id: example for example in examples if example.media_type != "text"}
    rows = {row.problem_id: row for row in read_priors(path) if row.problem_id in needed}
    compared = settings_of(settings)
    for name in ("frames", "clip", "clip_pretrained"):
        del compared[name]
    for problem, row in rows.items():
        example = needed[problem]
        if other_question(row, example):
            raise DataError(
                f"priors file {path}: {problem} is another question there, or about another file; "
                "build it for this data set"
            )
        count = len(row.frames)
        fitting = fits(row.frames, settings.frames, row.settings.get("fps"))
        if example.media_type == "video" and not fitting:
            raise DataError(
                f"the priors file {path} was made for K={row.settings.get('frames', count)} "
                f"frames, this run uses K={settings.frames} ({problem} has {count}); build it "
                f"again with --frames {settings.frames}"
            )
        # Rows of other programs need not record settings.
        made_with = {**compared, **row.settings}
        remedy = f"give the same here, or make another file by prior.py --scores {path}"
        check_settings(f"the priors file {path}", made_with, compared, remedy)
    return {problem: rows[problem] for problem in needed if problem in rows}


def check_missing(path, examples, settings, workers=0, timeout=300.0):
    """Error lines of examples without a row in a priors file because their medium is unreadable.

    Errors: DataError if a medium can be read: the file was made for other examples, or is not
        finished.
    """
    rows = load_priors(path, examples, settings)
    needed = [example for example in examples if example.media_type != "text"]
    missing = [example for example in needed if example.id not in rows]
    errors, readable = look_at(missing, settings, workers, timeout)
    if readable is not None:
        raise DataError(
            f"priors file {path} has no row for {len(missing)} of {len(needed)} examples, though "
            f"the medium of {readable.id} can be read; prior.py --dataset_name DATA --output "
            f"{path} adds what is missing"
        )
    return errors


def rows_for(path, examples):
    """{problem_id: Prior} of the rows that name the question and the medium of an example."""
    by_id = {example.id: example for example in examples}
    rows = {}
    for row in read_priors(path):
        example = by_id.get(row.problem_id)
        named = row.question is not None and row.media is not None
        if example is not None and named and not other_question(row, example):
            rows[example.id] = row
    return rows


# ------------------------------------------------------------------------------------ command line


def finished(output, examples, settings):
    """problem_ids of the rows that an earlier run left in the output.

    Errors: DataError if they belong to another data set or were made with other settings.
    """
    by_id = {example.id: example for example in examples}
    done = set()
    if not output.exists():
        return done
    for row in read_priors(output):
        example = by_id.get(row.problem_id)
        if example is None or other_question(row, example):
            raise DataError(
                f"{output} has a row of another data set ({row.problem_id}); "
                "choose another --output"
            )
        check_settings(output, row.settings, settings_of(settings))
        done.add(row.problem_id)
    return done


def cores():
    """Processor cores for this rank, as torchrun and deepspeed count the ranks of the machine."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1))
    return max(1, cv2.getNumberOfCPUs() // int(ranks))


def clip_of(arguments, workers):
    """The semantic cue's Clip, or None without that cue; it has the cores that workers leave."""
    if not arguments.has_semantic:
        return None
    torch.set_num_threads(max(1, cores() - workers))
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return load_clip(arguments.clip, arguments.clip_pretrained, device)


def run_dataset(arguments):
    """Appends the rows of a data set to --output as they are made; ranks share its videos."""
    unusable = []
    examples = load_examples(arguments.dataset_name, arguments.media_root, unusable)
    rank, world = join_ranks()
    output = ShardedLines(arguments.output, rank, world)
    groups = group_by_medium(examples)
    done = finished(output.path, examples, arguments)
    mine = list(groups)[rank::world]
    left = [medium for medium in mine if any(one.id not in done for one in groups[medium])]
    workers = arguments.workers
    if workers is None:
        workers = cores()
        if arguments.has_semantic and not torch.cuda.is_available():
            workers = max(1, workers // 2)
    clip = None
    if any(kind == "video" for kind, _ in left):
        clip = clip_of(arguments, workers)

    # What an earlier run could not use is tried again, now that nothing can refuse this run.
    errors = ShardedLines(f"{arguments.output}.errors.jsonl", rank, world)
    errors.replace(unusable)
    output.append([])  # the file exists even if no example needs a row
    found = all_cues(
        left,
        arguments,
        clip and clip.preprocess,
        workers,
        arguments.decode_timeout,
        arguments.pin_workers,
    )
    progress = tqdm(found, desc="priors", unit="video", total=len(left), disable=rank > 0)
    for medium, cues in progress:
        if isinstance(cues, MediaError):
            asked = [example for example in groups[medium] if example.id not in done]
            errors.append(error_lines(asked, cues))
        else:
            # All rows of the medium, so that a resumed run computes the same numbers.
            rows = media_rows(groups[medium], cues, clip, arguments)
            output.append([row for row in rows if row.problem_id not in done])
    output.close()
    errors.close()
    if rank == 0:
        conclude(arguments, examples, errors.path)


def conclude(arguments, examples, errors_file):
    """Prints the summary, and writes the data set with frame_sets if it is asked for."""
    output = Path(arguments.output)
    with open(output, "rb") as file:
        count = sum(1 for _ in file)
    errors = errors_file.read_text(encoding="utf-8").splitlines()
    if errors and not count:
        output.unlink()
        cause = json.loads(errors[0])["cause"]
        raise DataError(
            f"none of the {len(errors)} examples can be used (see {errors_file}); "
            f"the first: {cause}"
        )
    place = f" (see {errors_file})"
    if not errors:
        place = ""
        errors_file.unlink()
    texts = sum(example.media_type == "text" for example in examples)
    print(
        f"{count} priors are in {output}; {len(errors)} examples could not be used{place}; "
        f"{texts} text-only examples need none"
    )
    report_evidence(output, examples)
    if arguments.export_frame_sets:
        export_frame_sets(arguments)


def report_evidence(path, examples):
    """Prints how well the priors find the evidence of answers, where the data set knows it."""
    known = {example.id: example.evidence for example in examples if example.evidence}
    if not known:
        return
    hits = []
    masses = []
    for row in read_priors(path):
        inside = np.zeros(len(row.frames), bool)  # (K,)
        for start, end in known.get(row.problem_id, []):
            inside |= [start <= time < end for time in row.times]
        if row.problem_id in known:
            hits.append(inside[row.semantic].any())
        if inside.any():
            masses.append((inside @ row.prior, inside.mean()))
    if not masses:
        return
    unseen = ""
    if len(masses) < len(hits):
        unseen = f" ({len(hits) - len(masses)} have no sampled frame there)"
    prior, uniform = np.array(masses).T
    print(
        f"{len(hits)} questions of known evidence{unseen}: {np.mean(hits):.3f} have it among the "
        f"semantic cue's frames; P's mass on it is {np.mean(prior / uniform):.2f} times uniform's "
        f"(mean of ratios; ratio of means {prior.mean() / uniform.mean():.2f})"
    )


def run_scores(arguments):
    """Weighs the stored scores of --scores by this command's flags; the errors are copied."""
    wanted = settings_of(arguments)
    defaults = settings_of(PriorSettings())
    rows = []
    for row in read_priors(arguments.scores):
        stored = row.media is not None and (row.scene_scores or len(row.frames) == 1)
        if not stored or wanted.keys() - row.settings.keys():
            raise DataError(
                f"{arguments.scores}: the row of {row.problem_id} has no stored scores and settings"
            )
        used = {name: row.settings[name] for name in wanted}
        free = [*WEIGHTS, "semantic_k"]
        if used["scene"] == "hsv":
            free.append("scene_threshold")
        for name, value in wanted.items():
            if name in free:
                used[name] = value
            elif value != defaults[name]:
                check_settings(arguments.scores, used, {name: value}, "that takes the videos")
        settings = PriorSettings(**used)
        # An image has no scores.
        if row.scene_scores and settings.has_semantic and not row.semantic_scores:
            raise DataError(
                f"{arguments.scores} has no semantic scores "
                f"(it was made with --prior {row.settings['prior']})"
            )
        rows.append(weigh_scores(row, settings))
    write_lines(arguments.output, rows)
    # The same media have no row.
    errors = Path(f"{arguments.scores}.errors.jsonl")
    copied = Path(f"{arguments.output}.errors.jsonl")
    if errors.is_file():
        shutil.copyfile(errors, copied)
    else:
        copied.unlink(missing_ok=True)
    print(f"{len(rows)} priors are in {arguments.output}, from the scores in {arguments.scores}")


def run_video(arguments):
    """Prints one video's prior as a table and draws it."""
    # Imported here, since workers import this file and matplotlib takes a second.
    from common.plots import prior_figure

    clip = clip_of(arguments, 0)
    path = os.path.abspath(arguments.video)
    example = Example("0", arguments.question, [], "free-form", "", path, "video")
    row = make_prior(example, clip, arguments)
    print("frame    time    scene  semantic      P")
    semantic = row.semantic_scores or [math.nan] * len(row.frames)
    columns = (row.frames, row.times, row.scene_scores, semantic, row.prior)
    for position, (frame, time, jump, likeness, prior) in enumerate(zip(*columns, strict=True)):
        begins = "*" if position in row.scene else " "
        alike = "*" if position in row.semantic else " "
        print(
            f"{frame:5d} {time:6.1f} s  {jump:6.3f}{begins} {likeness:8.3f}{alike} {prior:6.3f} "
            f"{'#' * round(100 * prior)}"
        )
    frames, _ = decode_frames(path, row.frames)  # (K, H, W, 3)
    threshold = arguments.hsv_threshold if arguments.scene == "hsv" else None
    figure, *_ = prior_figure(row, frames, threshold)
    figure.savefig(arguments.output)
    print(
        "* begins a scene, or is among the frames most like the question. "
        f"Drawn in {arguments.output}"
    )


EXIT_CODES = """
Exit code 0: done; unusable examples are counted and listed in OUTPUT.errors.jsonl. 2: bad input, or
a file that cannot be written; one sentence says which. 130: interrupted; the same command
continues. 1: a fault of this program, with its trace."""


def main():
    parser = Parser(PriorArguments, __doc__ + EXIT_CODES)
    namespace = parser.parse_args()
    try:
        arguments = PriorArguments(**vars(namespace))
        if arguments.video:
            run_video(arguments)
        elif arguments.scores:
            run_scores(arguments)
        else:
            run_dataset(arguments)
    except (DataError, OSError) as error:  # OSError: a file that cannot be written, a full disk
        print(f"prior.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("prior.py: interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
