"""Stage 1, the consensus prior: which of a video's K sampled frames a question should rest on (VideoCFR, arXiv 2606.18441, Eq. 1-2).

    python prior.py --video clip.mp4 --question "Who falls first?"                                  # one video: a table and prior.png
    python prior.py --dataset_name Video-R1-260k.json --media_root DATA --output priors.jsonl       # a data set; run again to continue
    torchrun --nproc_per_node 8 prior.py --dataset_name ...                                         # or deepspeed; nodes share the folder
    python prior.py --scores priors.jsonl --prior no_scene --output no_scene.jsonl                  # other weights from stored scores
    python prior.py --dataset_name toy-seed0/heldout.json --clip local-dir:toy-seed0/clip           # the toy, on a CPU

Two cues vote on K frames spread evenly over the video: frames that begin a scene (jumps between colour histograms, or a detector of
PySceneDetect) and frames that look like the question (CLIP). A frame's weight is w_base, plus w_scene if the first cue names it, plus
w_sem if the second does; the weights divided by their sum are P.
One JSON line an example: problem_id, question, media (as the data set names it), frames (indices in the video), times (s), scene_scores,
semantic_scores, scene and semantic (positions among the K frames), prior, settings. An image is one frame with P = [1.0] and no cues; a
text-only example has no row. Worker processes decode; this one runs CLIP on what they send, so that the two overlap.
"""

import json
import math
import os
import shutil
import sys
import textwrap
from contextlib import closing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import open_clip
import scenedetect
import torch
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import HfArgumentParser

from common.data import DataError, Example, MediaError, load_examples, parse_example, read_rows
from common.flags import Help
from common.media import decode_frames, load_image, open_video, read_frames, uniform_frames
from common.workers import Pool, ShardedLines, join_ranks, write_lines, write_whole

CONE_BINS, CONE_RANGES = (
    [25, 25, 32],
    [-256, 256, -256, 256, 0, 256],
)  # scene cue: chroma x, y and value; odd, so grey is mid-bin

HISTOGRAM_SIGMA, HISTOGRAM_SIDE = (
    2.0,
    160,
)  # its smoothing, in bins; its frames are shrunk to this many pixels on the long side

DETECTORS = {
    "content": scenedetect.ContentDetector,
    "adaptive": scenedetect.AdaptiveDetector,
    "hash": scenedetect.HashDetector,
    "histogram": scenedetect.HistogramDetector,
    "threshold": scenedetect.ThresholdDetector,
}

CHUNK_BYTES = (
    1 << 26
)  # of decoded frames held at a time: all of them at 640x360, ten at 1080p, two in 4K

SHORTEST_SCENE = "0.6s"  # of those detectors, as PySceneDetect's command line has it

WEIGHTS = ("prior", "w_base", "w_scene", "w_sem")


@dataclass
class PriorSettings:
    """What makes a prior; every row records it. train.py has the same flags."""

    frames: int = field(
        default=16,
        metadata={
            "help": "K of Eq. 1-2: frames sampled evenly from a video (all of a shorter one)"
        },
    )
    fps: float | None = field(
        default=None,
        metadata={
            "help": "sample this many frames a second instead, still evenly and at most --frames of them; None: always --frames"
        },
    )
    scene: Literal["hsv", "content", "adaptive", "hash", "histogram", "threshold"] = field(
        default="hsv",
        metadata={
            "help": "scene cue, the S_scene of Eq. 1. hsv (the paper's): distances between the sampled frames' histograms. The others are "
            "PySceneDetect's detectors over every frame of the video (slower); threshold finds fades and cuts through black only"
        },
    )
    scene_threshold: float | None = field(
        default=None,
        metadata={
            "help": "hsv: the least distance (0-1) of neighbouring frames' histograms that can be a cut, None: 0.2. Other --scene: the "
            "detector's own threshold, None: its default"
        },
    )
    semantic_k: int | None = field(
        default=None,
        metadata={
            "help": "semantic cue, the S_sem of Eq. 1: how many frames most like the question are taken; None: a quarter of K, rounded up"
        },
    )
    semantic_options: bool = field(
        default=False,
        metadata={
            "help": "the text compared with the frames is the question and its options, not the question alone; what exceeds the model's "
            "context is cut"
        },
    )
    clip: str = field(
        default="ViT-B-32",
        metadata={
            "help": "image-text model of the semantic cue: a name of open_clip (SigLIP's too) or local-dir:FOLDER (open_clip_config.json and "
            "safetensors)"
        },
    )
    clip_pretrained: str = field(
        default="openai",
        metadata={
            "help": "open_clip's tag of the weights, or a .safetensors file; unused with local-dir: and hf-hub:"
        },
    )
    prior: Literal["full", "no_scene", "no_semantic", "uniform"] = field(
        default="full",
        metadata={
            "help": "cues that P has; the paper's ablation rows. Without the semantic cue no CLIP model is loaded"
        },
    )
    w_base: float = field(
        default=0.1, metadata={"help": "w_base of Eq. 1: weight that every frame has"}
    )
    w_scene: float = field(
        default=1.0,
        metadata={"help": "lambda_scene of Eq. 1: added to a frame that begins a scene"},
    )
    w_sem: float = field(
        default=3.0,
        metadata={"help": "lambda_sem of Eq. 1: added to a frame that is like the question"},
    )

    def __post_init__(self):
        for name in ("fps", "scene_threshold", "w_base", "w_scene", "w_sem"):
            if getattr(self, name) is not None and not math.isfinite(getattr(self, name)):
                raise DataError(f"--{name} must be a finite number")
        if self.scene_threshold is not None and self.scene_threshold < 0:
            raise DataError("--scene_threshold must be at least 0")
        if self.frames < 1 or (self.semantic_k is not None and self.semantic_k < 1):
            raise DataError("--frames and --semantic_k must be at least 1")
        if self.fps is not None and self.fps <= 0:
            raise DataError("--fps must be above 0")
        if self.w_base <= 0 or self.w_scene < 0 or self.w_sem < 0:
            raise DataError(
                "--w_base must be above 0, --w_scene and --w_sem at least 0: P is a distribution over all frames"
            )

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

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "data set file (JSON array or .jsonl; Video-R1, SEED-Bench-R1, TW-GRPO or Video-R2)"
        },
    )
    media_root: str | None = field(
        default=None,
        metadata={"help": "folder that the data set's paths start from; None: the data set's own"},
    )
    video: str | None = field(
        default=None,
        metadata={"help": "one video instead of a data set: print its prior and draw it"},
    )
    question: str | None = field(default=None, metadata={"help": "the question about --video"})
    scores: str | None = field(
        default=None,
        metadata={
            "help": "a priors file instead of a data set: its stored scores with this command's --prior, --w_base, --w_scene, --w_sem, "
            "--semantic_k and, for --scene hsv, --scene_threshold. All else is as the file has it"
        },
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "file to write; None: priors.jsonl, or prior.png with --video. Rows already in it are kept: the same command continues "
            "an interrupted run. What cannot be used goes to OUTPUT.errors.jsonl, with its cause, and is tried again next time"
        },
    )
    export_frame_sets: str | None = field(
        default=None,
        metadata={
            "help": "also write the data set with the release's field frame_sets (frame indices: uniform, scene, semantic) to this JSON file"
        },
    )
    workers: int | None = field(
        default=None,
        metadata={
            "help": "processes that decode; None: the cores, half of them where CLIP runs on the CPU, shared by the ranks of a machine; "
            "0: decode in this process, without a timeout"
        },
    )
    pin_workers: bool = field(
        default=True,
        metadata={
            "help": "each of them keeps to a core of its own. false where other containers run this on the same machine: all begin with its "
            "first cores"
        },
    )
    decode_timeout: float = field(
        default=300.0,
        metadata={
            "help": "seconds after which a video's decoder counts as hung; it is killed and the video is listed as broken"
        },
    )
    local_rank: int = field(default=-1, metadata={"help": "set by the deepspeed launcher"})

    def __post_init__(self):
        super().__post_init__()
        given = [
            name for name in ("dataset_name", "video", "scores") if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise DataError(
                "give one of --dataset_name, --video and --scores"
                + (f", not {' and '.join(given)}" if given else "")
            )
        if (self.question is None) != (self.video is None):
            raise DataError("--video and --question go together")
        if self.export_frame_sets and not self.dataset_name:
            raise DataError("--export_frame_sets needs --dataset_name, whose rows it writes")
        if self.workers is not None and self.workers < 0 or self.decode_timeout <= 0:
            raise DataError("--workers must be at least 0 and --decode_timeout above 0")
        self.output = self.output or ("prior.png" if self.video else "priors.jsonl")
        if self.video and Path(self.output).suffix not in (".png", ".svg", ".pdf"):
            raise DataError(
                f"--output {self.output}: a video's prior is drawn as .png, .svg or .pdf"
            )
        if self.export_frame_sets and Path(self.export_frame_sets).suffix != ".json":
            raise DataError(
                f"--export_frame_sets {self.export_frame_sets}: a JSON array is written, name it .json"
            )
        files = {
            name: os.path.realpath(getattr(self, name))
            for name in ("dataset_name", "video", "scores", "output", "export_frame_sets")
            if getattr(self, name) is not None
        }
        for name in ("output", "export_frame_sets"):
            for other in files:
                if name in files and name != other and files[name] == files[other]:
                    raise DataError(
                        f"--{name} {files[name]} is the --{other} itself; choose another file to write"
                    )


def sample_frames(reader, settings):
    """Frame indices of an open video: --frames spread evenly, or --fps of them a second, evenly too, and never more than --frames."""
    total, count = len(reader), settings.frames
    if settings.fps is not None:
        spans = reader.get_frame_timestamp([0, total - 1])  # (2, 2): start and end, in seconds
        count = min(count, max(1, round((spans[1, 1] - spans[0, 0]) * settings.fps)))
    return uniform_frames(total, count)


HUE_CIRCLE = np.exp(
    2j * np.pi * np.arange(256) / 180
)  # OpenCV's 8-bit hue is in units of 2 degrees

COSINE, SINE = HUE_CIRCLE.real.astype(np.float32), HUE_CIRCLE.imag.astype(np.float32)

KERNEL = np.exp(
    -0.5 * (np.arange(-6, 7, dtype=np.float32) / HISTOGRAM_SIGMA) ** 2
)  # Gaussian, cut at 3 sigma


def blur(histogram):
    """(A, B, C) float32, each axis convolved with KERNEL, nothing beyond the borders. (No BLAS: its threads spin, and workers share cores.)"""
    for _ in range(3):
        rows = histogram.reshape(-1, histogram.shape[-1])
        rows = cv2.sepFilter2D(
            rows, -1, KERNEL, np.ones(1, np.float32), borderType=cv2.BORDER_CONSTANT
        )  # the last axis
        histogram = np.ascontiguousarray(np.moveaxis(rows.reshape(histogram.shape), -1, 0))
    return histogram


SPREAD = blur(
    np.ones(CONE_BINS, np.float32)
)  # what the kernel makes of a unit in every bin: less near the borders


def hsv_histogram(frame):
    """(H, W, 3) uint8 RGB -> (25, 25, 32) float32 smoothed histogram of its HSV colours.

    Binned in the HSV cone, not in raw (H, S, V): x, y = C cos H, C sin H with C = S V / 255, and V. Raw hue is noise on grey pixels, and a
    hard bin border lets one grey level of flicker move all the mass, so static clips would show cuts. In the cone both are continuous.
    """
    height, width = frame.shape[:2]
    scale = HISTOGRAM_SIDE / max(height, width)
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    hue, saturation, value = cv2.split(cv2.cvtColor(frame, cv2.COLOR_RGB2HSV))  # each (h, w) uint8
    chroma = cv2.multiply(saturation, value, scale=1 / 255, dtype=cv2.CV_32F)  # (h, w)
    cone = [
        cv2.multiply(chroma, cv2.LUT(hue, COSINE)),
        cv2.multiply(chroma, cv2.LUT(hue, SINE)),
        value.astype(np.float32),
    ]
    histogram = cv2.calcHist(cone, [0, 1, 2], None, CONE_BINS, CONE_RANGES)  # (25, 25, 32)
    return blur(histogram / SPREAD)  # divided first, so that every pixel keeps its weight


def scene_scores(frames):
    """K frames (H, W, 3) uint8 RGB -> (K,) float: Bhattacharyya distance (0-1) of the HSV histograms of frames i-1 and i; 0 for i = 0."""
    return histogram_distances([hsv_histogram(frame) for frame in frames])


def histogram_distances(histograms):
    pairs = zip(histograms, histograms[1:], strict=False)
    return np.array(
        [
            0.0,
            *(cv2.compareHist(before, after, cv2.HISTCMP_BHATTACHARYYA) for before, after in pairs),
        ]
    )  # (K,)


def detector_scores(path, times, name, threshold=None):
    """A PySceneDetect detector over every frame of a video -> (K,) float: 1 where a sampled frame is the first after a cut, else 0.

    times: (K,) seconds of the sampled frames, counted from the video's first frame. A cut after the last of them is not seen.
    """
    detector = DETECTORS[name](
        *(() if threshold is None else (threshold,)), min_scene_len=SHORTEST_SCENE
    )
    try:
        scenes = scenedetect.detect(path, detector)
    except (scenedetect.VideoOpenFailure, cv2.error, OSError) as error:
        raise MediaError(
            f"{path}: PySceneDetect cannot read the video ({' '.join(str(error).split())[:160]})"
        ) from error
    scores = np.zeros(len(times))
    for start, _ in scenes[1:]:
        first = int(np.searchsorted(times, start.seconds - 1e-3))
        if first < len(times):
            scores[first] = 1.0
    return scores


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


def read_cues(medium, settings, preprocess=None):
    """What must be read from the video itself: (media type, path) -> frame indices, times, scene scores, pixels for CLIP.

    indices, times and scores are lists of K; pixels (K, 3, h, w) float32 by `preprocess`, None without one. Holds CHUNK_BYTES of decoded
    frames at a time, or one frame. MediaError when the medium cannot be read.
    """
    kind, path = medium
    if kind == "image":
        load_image(path)  # nothing is computed from it, but a broken one must be known
        return [0], [0.0], [], None
    reader = open_video(path)
    indices, times, histograms, pixels, step = sample_frames(reader, settings), [], [], [], 1
    while len(times) < len(indices):
        frames, seconds = read_frames(
            reader, path, indices[len(times) : len(times) + step]
        )  # (step, H, W, 3), (step,)
        step = max(1, CHUNK_BYTES // frames[0].nbytes)
        times += [round(float(second), 6) for second in seconds]
        if settings.scene == "hsv":
            histograms += [hsv_histogram(frame) for frame in frames]
        if preprocess is not None:
            pixels += [preprocess(Image.fromarray(frame)).numpy() for frame in frames]
    if settings.scene == "hsv":
        scores = histogram_distances(histograms)
    else:
        begin = float(reader.get_frame_timestamp([0])[0, 0])
        scores = detector_scores(
            path, np.array(times) - begin, settings.scene, settings.scene_threshold
        )
    return (
        indices,
        times,
        [round(float(score), 6) for score in scores],
        np.stack(pixels) if pixels else None,
    )


@dataclass
class Clip:
    """An image-text model with what belongs to it."""

    model: torch.nn.Module
    preprocess: object  # PIL image -> (3, h, w) float
    tokenizer: object  # list of N str -> (N, context) int64, longer texts cut to the context
    device: str


def load_clip(name, pretrained=None, device="cpu"):
    """open_clip model -> Clip. name: one of open_clip's, hf-hub:REPO or local-dir:FOLDER (open_clip_config.json, safetensors weights, and
    tokenizer files if its text_cfg has hf_tokenizer_name). DataError if it cannot be loaded. Missing weights are refused, and so are local
    pickled ones; what a hub has as pickles only, open_clip reads by torch's weights_only."""
    folder = Path(name.removeprefix("local-dir:"))
    try:
        if name.startswith("local-dir:"):
            files = {file.name for file in folder.iterdir()}
            preferred = files & {
                "open_clip_model.safetensors",
                "open_clip_pytorch_model.safetensors",
            }  # what open_clip looks for first
            if not preferred and (
                not list(folder.glob("*.safetensors"))
                or any(file.endswith((".bin", ".pth")) for file in files)
            ):
                raise DataError(
                    f"{folder} needs its weights as open_clip_model.safetensors (pickled weights are not loaded)"
                )
        elif pretrained and os.path.isfile(pretrained) and not pretrained.endswith(".safetensors"):
            raise DataError(
                f"{pretrained} is not a .safetensors file (pickled weights are not loaded)"
            )
        schema = name.startswith(("local-dir:", "hf-hub:"))
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=None if schema else pretrained, device=device, require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(name)
    except DataError:
        raise
    except (KeyError, OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise DataError(
            f"CLIP model {name} ({pretrained}) cannot be loaded, give --clip local-dir:FOLDER or --prior no_semantic: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    return Clip(model.eval(), preprocess, tokenizer, device)


@torch.no_grad()
def encode_pixels(pixels, clip, batch=64):
    """(K, 3, h, w) float32 of clip.preprocess -> (K, D) unit image features; of the video only, so one call serves all its questions."""
    parts = torch.as_tensor(pixels).split(batch)
    return torch.cat(
        [
            clip.model.encode_image(part.to(clip.device), normalize=True).float().cpu()
            for part in parts
        ]
    )


@torch.no_grad()
def encode_texts(texts, clip):
    """N texts -> (N, D) unit text features."""
    return (
        clip.model.encode_text(clip.tokenizer(texts).to(clip.device), normalize=True).float().cpu()
    )


def semantic_scores(frames, question, clip):
    """(K, H, W, 3) uint8 RGB and a question -> (K,) cosine similarity of each frame with it, in [-1, 1]."""
    pixels = torch.stack(
        [clip.preprocess(Image.fromarray(frame)) for frame in frames]
    )  # (K, 3, h, w)
    return encode_pixels(pixels, clip) @ encode_texts([question], clip)[0]  # (K, D) @ (D,)


def semantic_set(scores, k=None):
    """Semantic scores (K,) -> ascending positions of the k highest (None: ceil(K / 4)), the S_sem of Eq. 1; of equals the earlier one."""
    k = math.ceil(len(scores) / 4) if k is None else k
    return sorted(sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:k])


def fuse(k, scene, semantic, w_base=0.1, w_scene=1.0, w_sem=3.0):
    """The prior P, (k,) summing to 1, from the two sets of positions.

    Eq. 1: w_i = w_base + 1[i in S_scene] lambda_scene + 1[i in S_sem] lambda_sem; Eq. 2: P(i) = w_i / sum_j w_j.
    """
    weights = torch.full((k,), w_base)  # (k,)
    weights[list(scene)] += w_scene
    weights[list(semantic)] += w_sem
    return weights / weights.sum()


def weigh(row, scene, semantic, settings):
    """A row with these sets and the P that follows from them; its settings are added or replaced by the weights of these."""
    cues = scene if settings.has_scene else [], semantic if settings.has_semantic else []
    prior = fuse(
        len(row["frames"]), *cues, settings.w_base, settings.w_scene, settings.w_sem
    )  # (K,)
    return {
        **row,
        "scene": scene,
        "semantic": semantic,
        "prior": [float(f"{value:.9g}") for value in prior.tolist()],  # exact float32
        "settings": {**row["settings"], **{name: getattr(settings, name) for name in WEIGHTS}},
    }


def settings_of(settings):
    """PriorSettings -> what a row records of them."""
    return {setting.name: getattr(settings, setting.name) for setting in fields(PriorSettings)}


def weigh_scores(row, settings):
    """A row with its sets and P from its stored scores: what --scores does; no pixels are needed. settings: all of PriorSettings."""
    scene = [
        position for position, score in enumerate(row["scene_scores"]) if score > 0
    ]  # a detector's scores are 0 or 1
    if settings.scene == "hsv":
        scene = scene_set(row["scene_scores"], settings.hsv_threshold)
    return weigh(
        {**row, "settings": settings_of(settings)},
        scene,
        semantic_set(row["semantic_scores"], settings.semantic_k),
        settings,
    )


def media_name(example):
    """The medium as the data set names it, which does not change with the media root."""
    return example.extra.get("path") or os.path.basename(example.media)


def media_rows(examples, cues, clip, settings):
    """Examples that share one video or image, and its cues (read_cues) -> their rows (see the top of this file).

    clip None, or an image: no semantic scores. The rows depend on these examples and this medium alone, not on what was done before.
    """
    indices, times, jumps, pixels = cues
    likeness = [[]] * len(examples)
    if clip is not None and pixels is not None:
        texts = [
            " ".join([example.question, *example.options])
            if settings.semantic_options
            else example.question
            for example in examples
        ]
        likeness = encode_texts(texts, clip) @ encode_pixels(pixels, clip).T  # (N, D) @ (D, K)
    rows = []
    for example, scores in zip(examples, likeness, strict=True):
        row = {
            "problem_id": example.id,
            "question": example.question,
            "media": media_name(example),
            "frames": indices,
            "times": times,
            "scene_scores": jumps,
            "semantic_scores": [round(float(value), 6) for value in scores],
        }
        rows.append(weigh_scores(row, settings))
    return rows


def make_prior(example, clip, settings):
    """Video or image example -> its row of the priors file. MediaError when the medium cannot be read. Decodes in this process."""
    cues = read_cues((example.media_type, example.media), settings, clip and clip.preprocess)
    return media_rows([example], cues, clip, settings)[0]


def all_cues(media, settings, preprocess, workers=0, timeout=300.0, pin=True):
    """[(media type, path), ...] -> yields (medium, its cues or a MediaError) in the order in which they are finished.

    workers: processes that decode, each one medium at a time; one that dies or takes more than `timeout` seconds costs its medium and is
    replaced. 0: in this process, where a decoder that hangs, hangs. pin: every worker keeps to a core of its own (take_core).
    """
    pool = Pool(workers, timeout, pin=pin)
    try:
        yield from pool.each(read_cues, media, settings, preprocess)
    finally:
        pool.stop()


def group_by_medium(examples):
    """Examples -> {(media type, path): its examples}; text-only ones are left out."""
    groups = {}
    for example in examples:
        if example.media_type != "text":
            groups.setdefault((example.media_type, example.media), []).append(example)
    return groups


def error_lines(examples, cause):
    return [
        {"problem_id": example.id, "media": example.media, "cause": str(cause)}
        for example in examples
    ]


def build_priors(examples, clip, settings, workers=0, timeout=300.0):
    """Examples -> (rows in their order, errors), in memory; for data sets of any size there is the command line.

    errors: [{"problem_id", "media", "cause"}, ...] for examples whose medium cannot be read; they have no row and nothing replaces them.
    Text-only examples have neither.
    """
    groups, rows, errors = group_by_medium(examples), {}, {}
    cues_of_all = all_cues(groups, settings, clip and clip.preprocess, workers, timeout)
    for medium, cues in tqdm(cues_of_all, total=len(groups), desc="priors", unit="video"):
        if isinstance(cues, MediaError):
            errors.update((line["problem_id"], line) for line in error_lines(groups[medium], cues))
        else:
            rows.update(
                (row["problem_id"], row) for row in media_rows(groups[medium], cues, clip, settings)
            )
    return (
        [rows[example.id] for example in examples if example.id in rows],
        [errors[example.id] for example in examples if example.id in errors],
    )


def look_at(examples, settings, workers=0, timeout=300.0):
    """Reads the examples' media one by one until one can be read -> (error lines of those that cannot, an example that can or None)."""
    groups = group_by_medium(examples)
    errors = []
    if not groups:
        return errors, None
    with closing(all_cues(groups, settings, None, workers, timeout, pin=False)) as cues_of_all:
        for medium, cues in cues_of_all:
            if not isinstance(cues, MediaError):
                return errors, groups[medium][0]
            errors += error_lines(groups[medium], cues)
    return errors, None


def frame_set_rows(examples, settings):
    """Examples with the release's field frame_sets {"uniform", "scene", "semantic": frame indices} -> (rows, errors), as build_priors.

    The K frames are the uniform set; a frame of another set counts for the sampled frame nearest to it. The videos are opened for the
    frames' times, not decoded. DataError when a field is malformed or has another K.
    """
    rows, errors, times_of = [], [], {}
    for example in tqdm(examples, desc="frame_sets", unit="example", disable=not examples):
        sets = example.extra["frame_sets"]
        good = (
            isinstance(sets, dict)
            and all(
                isinstance(sets.get(name), list)
                and all(type(index) is int and index >= 0 for index in sets[name])
                for name in ("uniform", "scene", "semantic")
            )
            and sets["uniform"]
        )
        if not good:
            raise DataError(
                f"{example.id}: frame_sets must have the lists uniform (not empty), scene and semantic of frame indices"
            )
        frames, video = sorted(set(sets["uniform"])), example.media_type == "video"
        fewer = len(frames) < settings.frames and (
            settings.fps or frames == list(range(len(frames)))
        )  # --fps, or a short video
        if video and len(frames) != settings.frames and not fewer:
            raise DataError(
                f"{example.id}: its frame_sets have {len(frames)} uniform frames, this run uses --frames {settings.frames}"
            )
        key = (example.media, *frames)
        try:
            if key not in times_of:
                times_of[key] = frame_times(example.media, frames) if video else [0.0]
        except MediaError as error:
            errors += error_lines([example], error)
            continue
        scene, semantic = (
            sorted({int(np.abs(np.array(frames) - index).argmin()) for index in sets[name]})
            for name in ("scene", "semantic")
        )
        rows.append(
            weigh(
                {
                    "problem_id": example.id,
                    "question": example.question,
                    "media": media_name(example),
                    "frames": frames,
                    "times": times_of[key],
                    "scene_scores": [],
                    "semantic_scores": [],
                    "settings": {},
                },
                scene,
                semantic,
                settings,
            )
        )
    return rows, errors


def frame_times(path, frames):
    """Seconds of these frames of a video, without decoding them."""
    reader = open_video(path)
    if frames[-1] >= len(reader):
        raise MediaError(
            f"{path}: its frame_sets name frame {frames[-1]}, the video ends with {len(reader) - 1}"
        )
    return [round(float(time), 6) for time in reader.get_frame_timestamp(frames)[:, 0]]


def check_row(row):
    """What is wrong with a row of a priors file, in words; '' for a good one."""
    if not isinstance(row, dict):
        return "is not an object"
    missing = [key for key in ("problem_id", "frames", "times", "prior") if key not in row]
    if missing:
        return f"has no {', '.join(missing)}"
    frames, times, prior = row["frames"], row["times"], row["prior"]
    if not isinstance(row.get("settings", {}), dict):
        return "has settings that are not an object"
    if not all(isinstance(values, list) and values for values in (frames, times, prior)):
        return "has frames, times or prior that are not non-empty lists"
    if not len(frames) == len(times) == len(prior):
        return f"has {len(frames)} frames, {len(times)} times and {len(prior)} prior values"
    if (
        not all(type(index) is int for index in frames)
        or frames[0] < 0
        or any(a >= b for a, b in zip(frames, frames[1:], strict=False))
    ):
        return "has frames that are not ascending indices"
    if not all(type(value) in (int, float) and math.isfinite(value) for value in [*times, *prior]):
        return "has times or prior values that are not numbers"
    good = min(prior) >= 0 and abs(sum(prior) - 1) < 1e-3
    return (
        ""
        if good
        else f"has a prior that is none: the least is {min(prior):.4g}, the sum {sum(prior):.4g}"
    )


def read_priors(path):
    """Yields the rows of a priors file. DataError (one sentence) when it or a row is malformed."""
    if not os.path.isfile(path):
        raise DataError(f"priors file {path} not found (prior.py makes it)")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise DataError(
                    f"priors file {path}, line {number} is not valid JSON ({error}); build it again"
                ) from error
            fault = check_row(row)
            if fault:
                raise DataError(f"priors file {path}, line {number} {fault}; build it again")
            yield {**row, "problem_id": str(row["problem_id"])}


def other_question(row, example):
    """Whether a row was made for another question or medium than the example that has its problem_id."""
    return row.get("question", example.question) != example.question or row.get(
        "media", media_name(example)
    ) != media_name(example)


def load_priors(path, examples, settings):
    """Priors file -> {problem_id: row} of the video and image examples that have one; check_missing() asks why others have none.

    settings: the run's PriorSettings. DataError (one sentence) when the file or a row is malformed, or a row was made for another
    question, another K or with other settings (the CLIP model's name is not compared). A video of fewer than K frames is fine: its row
    has all of its frames.
    """
    needed = {example.id: example for example in examples if example.media_type != "text"}
    found = {row["problem_id"]: row for row in read_priors(path) if row["problem_id"] in needed}
    for problem, example in needed.items():
        if problem not in found:
            continue
        indices, made_with = found[problem]["frames"], found[problem].get("settings", {})
        if other_question(found[problem], example):
            raise DataError(
                f"priors file {path}: {problem} is another question there, or about another file; build it for this data set"
            )
        short = len(indices) < settings.frames and (
            indices == list(range(len(indices))) or made_with.get("fps")
        )  # a short video, or --fps
        if example.media_type == "video" and len(indices) != settings.frames and not short:
            raise DataError(
                f"the priors file {path} was made for K={made_with.get('frames', len(indices))} frames, this run uses "
                f"K={settings.frames} ({problem} has {len(indices)}); build it again with --frames {settings.frames}"
            )
        for name in (
            setting.name
            for setting in fields(PriorSettings)
            if setting.name not in ("frames", "clip", "clip_pretrained")
        ):
            if made_with.get(name, getattr(settings, name)) != getattr(settings, name):
                raise DataError(
                    f"the priors file {path} was made with --{name} {made_with[name]}, this run has {getattr(settings, name)}; "
                    f"give the same here, or make another file by prior.py --scores {path}"
                )
    return {problem: found[problem] for problem in needed if problem in found}


def check_missing(path, examples, settings, workers=0, timeout=300.0):
    """Why examples have no row in a priors file -> error lines of those whose medium cannot be read.

    DataError when a medium can be read: the file was made for other examples, or is not finished.
    """
    rows = load_priors(path, examples, settings)
    needed = [example for example in examples if example.media_type != "text"]
    missing = [example for example in needed if example.id not in rows]
    errors, readable = look_at(missing, settings, workers, timeout)
    if readable is not None:
        raise DataError(
            f"priors file {path} has no row for {len(missing)} of {len(needed)} examples, though the medium of {readable.id} "
            f"can be read; prior.py --dataset_name DATA --output {path} adds what is missing"
        )
    return errors


def rows_for(path, examples):
    """Rows of a priors file that name the question and the medium of one of these examples, {problem_id: row}; others are left out."""
    by_id = {example.id: example for example in examples}
    found = {}
    for row in read_priors(path):
        example = by_id.get(row["problem_id"])
        if example is None or "question" not in row or "media" not in row:
            continue
        if not other_question(row, example):
            found[example.id] = row
    return found


def finished(output, examples, settings):
    """problem_ids of the rows in the output. DataError when they belong to another data set or were made with other settings."""
    by_id, done = {example.id: example for example in examples}, set()
    for row in read_priors(output) if output.exists() else ():
        problem = row["problem_id"]
        if problem not in by_id or other_question(row, by_id[problem]):
            raise DataError(
                f"{output} has a row of another data set ({problem}); choose another --output"
            )
        for setting in fields(PriorSettings):
            made_with, wanted = (
                row.get("settings", {}).get(setting.name),
                getattr(settings, setting.name),
            )
            if made_with != wanted:
                raise DataError(
                    f"{output} has rows made with --{setting.name} {made_with}, this run has {wanted}; choose another --output"
                )
        done.add(problem)
    return done


def cores():
    """Processor cores for this rank: torchrun and deepspeed say how many ranks share the machine."""
    return max(
        1,
        cv2.getNumberOfCPUs()
        // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1))),
    )


def clip_of(arguments, workers):
    """The semantic cue's model, or None where P has no semantic cue; on a CPU it has the threads that the workers leave."""
    if not arguments.has_semantic:
        return None
    torch.set_num_threads(max(1, cores() - workers))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return load_clip(arguments.clip, arguments.clip_pretrained, device)


def run_dataset(arguments):
    """Appends the rows of a data set to --output as they are made; each rank takes every world-th video."""
    unusable = []
    examples = load_examples(arguments.dataset_name, arguments.media_root, unusable)
    rank, world = join_ranks()
    output = ShardedLines(arguments.output, rank, world)
    groups = group_by_medium(examples)
    done = finished(output.path, examples, arguments)
    mine = list(groups)[rank::world]
    left = [medium for medium in mine if any(example.id not in done for example in groups[medium])]
    workers = arguments.workers
    if workers is None:
        workers = cores()
        if arguments.has_semantic and not torch.cuda.is_available():
            workers = max(1, workers // 2)
    clip = None
    if any(kind == "video" for kind, _ in left):
        clip = clip_of(arguments, workers)

    # What an earlier run could not use is tried again. Nothing is left that could refuse this run.
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
    progress = tqdm(
        found,
        desc="priors",
        unit="video",
        initial=len(mine) - len(left),
        total=len(mine),
        disable=rank > 0,
    )
    for medium, cues in progress:
        if isinstance(cues, MediaError):
            asked = [example for example in groups[medium] if example.id not in done]
            errors.append(error_lines(asked, cues))
        else:
            # All rows of the medium, so that a resumed run computes the same numbers.
            rows = media_rows(groups[medium], cues, clip, arguments)
            output.append([row for row in rows if row["problem_id"] not in done])
    output.close()
    errors.close()
    if rank == 0:
        conclude(arguments, examples, output.path, errors.path)


def conclude(arguments, examples, output, errors_file):
    """The summary, and the data set with frame_sets if it is asked for."""
    errors, done = (
        errors_file.read_text(encoding="utf-8").splitlines(),
        sum(1 for _ in open(output, "rb")),
    )
    if not errors:
        errors_file.unlink()
    if errors and not done:
        output.unlink()
        raise DataError(
            f"none of the {len(errors)} examples can be used (see {errors_file}); the first: {json.loads(errors[0])['cause']}"
        )
    print(
        f"{done} priors are in {output}; {len(errors)} examples could not be used{f' (see {errors_file})' if errors else ''}; "
        f"{sum(example.media_type == 'text' for example in examples)} text-only examples need none"
    )
    report_evidence(output, examples)
    if arguments.export_frame_sets:
        export_frame_sets(arguments)


def report_evidence(path, examples):
    """Where the data set knows the evidence of an answer: how well the priors find it."""
    known, hits, mass = (
        {example.id: example.evidence for example in examples if example.evidence},
        [],
        [],
    )
    for row in read_priors(path) if known else []:
        if row["problem_id"] in known:
            inside = np.array(
                [
                    any(start <= time < end for start, end in known[row["problem_id"]])
                    for time in row["times"]
                ]
            )
            hits.append(inside[row["semantic"]].any())
            mass.append((inside @ row["prior"], inside.mean()))
    seen = [(prior, uniform) for prior, uniform in mass if uniform > 0]
    if seen:
        prior, uniform = np.array(seen).T
        unseen = (
            f" ({len(hits) - len(seen)} have no sampled frame there)"
            if len(seen) < len(hits)
            else ""
        )
        print(
            f"{len(hits)} questions of known evidence{unseen}: {np.mean(hits):.3f} have it among the semantic cue's frames; P's mass on "
            f"it is {np.mean(prior / uniform):.2f} times uniform's (mean of ratios; ratio of means {prior.mean() / uniform.mean():.2f})"
        )


def export_frame_sets(arguments):
    """The data set with the release's frame_sets in every row that has a prior, the other rows as they are."""
    made, rows, count = (
        {row["problem_id"]: row for row in read_priors(arguments.output)},
        read_rows(arguments.dataset_name),
        0,
    )
    for index, row in enumerate(rows):
        try:
            example = parse_example(
                row, index, arguments.media_root or Path(arguments.dataset_name).parent
            )
        except DataError:
            continue  # an unusable row
        prior = made.pop(example.id, None)  # once: a row that repeats an id has none
        if prior:
            sets = {
                name: [prior["frames"][at] for at in prior[name]] for name in ("scene", "semantic")
            }
            row["frame_sets"], count = {"uniform": prior["frames"], **sets}, count + 1
    write_whole(arguments.export_frame_sets, [json.dumps(rows, indent=1).encode()])
    print(f"{count} of {len(rows)} rows have frame_sets in {arguments.export_frame_sets}")


def run_scores(arguments):
    """The rows of --scores under this command's weights, and its list of errors. The cues' settings are the file's."""
    names, defaults, rows = [setting.name for setting in fields(PriorSettings)], PriorSettings(), []
    for row in read_priors(arguments.scores):
        made_with = row.get("settings", {})
        if {"media", "scene_scores", "semantic_scores"} - row.keys() or set(
            names
        ) - made_with.keys():
            raise DataError(
                f"{arguments.scores}: the row of {row['problem_id']} has no stored scores and settings"
            )
        free = (
            *WEIGHTS,
            "semantic_k",
            *(["scene_threshold"] if made_with["scene"] == "hsv" else []),
        )
        for name in names:
            value = getattr(arguments, name)
            if name not in free and value not in (getattr(defaults, name), made_with[name]):
                raise DataError(
                    f"{arguments.scores} was made with --{name} {made_with[name]}, not {value}; that takes the videos"
                )
        settings = PriorSettings(
            **{
                name: getattr(arguments, name) if name in free else made_with[name]
                for name in names
            }
        )
        if (
            row["scene_scores"] and settings.has_semantic and not row["semantic_scores"]
        ):  # an image has neither
            raise DataError(
                f"{arguments.scores} has no semantic scores (it was made with --prior {made_with['prior']})"
            )
        rows.append(weigh_scores(row, settings))
    write_lines(arguments.output, rows)
    errors, listed = (
        Path(f"{arguments.scores}.errors.jsonl"),
        Path(f"{arguments.output}.errors.jsonl"),
    )
    if errors.is_file():
        shutil.copyfile(errors, listed)  # the same media have no row
    else:
        listed.unlink(missing_ok=True)
    print(f"{len(rows)} priors are in {arguments.output}, from the scores in {arguments.scores}")


def run_video(arguments):
    """One video's prior as a table and a picture."""
    clip = clip_of(arguments, 0)
    example = Example(
        "0", arguments.question, [], "free-form", "", os.path.abspath(arguments.video), "video"
    )
    row = make_prior(example, clip, arguments)
    print("frame    time    scene  semantic      P")
    semantic = row["semantic_scores"] or [math.nan] * len(row["frames"])
    for position, (frame, time, jump, likeness, prior) in enumerate(
        zip(row["frames"], row["times"], row["scene_scores"], semantic, row["prior"], strict=True)
    ):
        marks = ["*" if position in row[name] else " " for name in ("scene", "semantic")]
        print(
            f"{frame:5d} {time:6.1f} s  {jump:6.3f}{marks[0]} {likeness:8.3f}{marks[1]} {prior:6.3f} {'#' * round(100 * prior)}"
        )
    draw_prior(row, decode_frames(example.media, row["frames"])[0], arguments.output)
    print(
        f"* begins a scene, or is among the frames most like the question. Drawn in {arguments.output}"
    )


def draw_prior(row, frames, path):
    """Picture of one row: its frames (K, H, W, 3) uint8 above the two cues and P; the frames that a cue names are filled."""
    from matplotlib.figure import Figure

    count, settings = len(frames), PriorSettings(**row["settings"])
    figure = Figure(figsize=(max(6, 0.8 * count), 6), layout="constrained")
    figure.suptitle(textwrap.fill(row["question"], max(60, 9 * count)), parse_math=False)
    lines = (
        ("scene_scores", "scene", "#0072B2"),
        ("semantic_scores", "semantic", "#D55E00"),
        ("prior", "P", "#009E73"),
    )
    lines = [line for line in lines if row[line[0]]]  # without CLIP there are no semantic scores
    grid = figure.add_gridspec(1 + len(lines), count, height_ratios=(0.8, *(1 for _ in lines)))
    for position, frame in enumerate(frames):
        axes = figure.add_subplot(grid[0, position], title=f"{row['times'][position]:.1f} s")
        axes.title.set_fontsize(8)
        axes.imshow(frame)
        axes.set_axis_off()
    for line, (name, label, colour) in enumerate(lines, 1):
        axes = figure.add_subplot(
            grid[line, :],
            ylabel=name.replace("_", " "),
            xlim=(-0.5, count - 0.5),
            xticks=range(count),
        )
        values = row[name]
        floor = (
            min(values) - 0.1 * (max(values) - min(values)) if label == "semantic" else 0.0
        )  # cosines differ little: zoomed in on
        bars = axes.bar(
            range(count),
            [value - floor for value in values],
            bottom=floor,
            color="white",
            edgecolor=colour,
        )
        for position in row.get(label, range(count)):
            bars[position].set_facecolor(colour)
        if label == "scene" and settings.scene == "hsv":
            axes.axhline(settings.hsv_threshold, color="grey", linestyle="--")
    axes.set_xlabel(
        "sampled frame; filled: chosen by the cue; dashed: the least score of a scene cut"
    )
    figure.savefig(path, dpi=110)


def main():
    parser = HfArgumentParser(
        PriorArguments,
        allow_abbrev=False,
        formatter_class=Help,
        description=(
            f"{__doc__}\nExit code 0: done; what could not be used is counted and listed in OUTPUT.errors.jsonl. 2: bad input, or a file that "
            "cannot be written;\none sentence says which. 130: interrupted; the same command continues. 1: a fault of this program, with its "
            "trace."
        ),
    )
    namespace = parser.parse_args()
    try:
        arguments = PriorArguments(**vars(namespace))
        run = run_video if arguments.video else run_scores if arguments.scores else run_dataset
        run(arguments)
    except (DataError, OSError) as error:  # OSError: a file that cannot be written, a full disk
        print(f"prior.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("prior.py: interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
