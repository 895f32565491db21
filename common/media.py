"""Videos and pictures: frames, their times, and model inputs.

indices, times, frames = sample_video("a.mp4", 16)       # (K,), (K,) seconds, (K, H, W, 3) uint8
encoder = Encoder(processor, arguments)                  # any PromptFlags
inputs = encoder.encode(example)  # ModelInputs
"""

import os
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import cv2
import numpy as np
import torch

from common.data import (
    DataError,
    MediaError,
    Medium,
    around_text,
    build_prompt,
    plain_ids,
    read_template,
)
from common.flags import check_least, flag
from common.video import load_image, open_medium

MIN_PIXELS = 128 * 28 * 28  # of a frame, in the releases

IMAGE_MIN_PIXELS = 4 * 28 * 28  # of a picture


@dataclass(kw_only=True)
class FrameFlags:
    """Which frames of a video are taken; flags of every command."""

    frames: int = flag(
        16,
        "K of Eq. 1-2: frames sampled evenly from a video; all of a shorter one.",
        group="Frames",
    )
    fps: float | None = flag(
        None,
        "Frames a second to sample evenly instead, an even number from --min_frames to --frames. "
        "None: --frames. (The releases: 2, with --min_frames 4.)",
    )
    min_frames: int = flag(1, "Fewest frames that --fps samples; all of a shorter video.")
    decoder: str = flag(
        "pyav",
        "Reads video files. pyav: the frames that a player shows. decord: those that the releases "
        "see, which are other ones in some files (docs/priors.md).",
        choices=["pyav", "decord"],
    )

    def __post_init__(self):
        check_least(self, frames=1, min_frames=1, fps=1e-6)


@dataclass(kw_only=True)
class PromptFlags(FrameFlags):
    """How a model gets a question; flags of training, evaluation and figures."""

    min_pixels: int | None = flag(
        None,
        "Fewest pixels of a frame; smaller ones are scaled up. None: the releases' 100,352, or "
        "--max_pixels if that is less.",
        group="Prompt",
    )
    max_pixels: int = flag(256 * 28 * 28, "Most pixels of a frame (the paper's at inference).")
    image_max_pixels: int | None = flag(None, "Most pixels of a picture. None: --max_pixels.")
    frame_times: str = flag(
        "none",
        "How the model gets the frames' times: text (a line before the question), drawn (on the "
        "frames), none.",
        choices=["none", "text", "drawn"],
    )
    prompt_template: str | None = flag(
        None,
        "Text file with {question}, and {options} and {instruction} if wanted, or a .json file "
        "with such a text for each problem type; replaces our wording. Scores depend on it.",
    )
    system_prompt: str | None = flag(
        None,
        "Text of a system turn before every question. None: the chat template's default.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.min_pixels is None:
            self.min_pixels = min(MIN_PIXELS, self.max_pixels)
        check_least(self, min_pixels=1, max_pixels=1, image_max_pixels=1)
        if self.min_pixels > self.max_pixels:
            raise DataError("--min_pixels must not be above --max_pixels")


@dataclass(kw_only=True)
class RunFlags(PromptFlags):
    """How a data set is read and answered; flags of training and evaluation."""

    media_root: str | None = flag(
        None,
        "Folder that media paths start from. None: the data set file's.",
        group="Data and sampling",
    )
    decode_workers: int = flag(
        2,
        "Processes per rank that decode the next step's or batch's media; 0: none, and no timeout.",
    )
    decode_timeout: float = flag(300.0, "Seconds that a worker may take for a question's media.")
    top_k: int = flag(0, "Likeliest tokens to choose from, when sampled; 0: all.")
    seed: int = flag(0, "Random seed.")
    local_rank: int = flag(-1, "Set by the deepspeed launcher.")

    def __post_init__(self):
        super().__post_init__()
        check_least(self, decode_workers=0, decode_timeout=1e-6, top_k=0)


class Frames(NamedTuple):
    """Frames of a medium, in the order in which they were asked for."""

    indices: list  # (K,) numbers among the frames that are shown
    times: np.ndarray  # (K,) seconds since the first frame shown
    frames: np.ndarray  # (K, H, W, 3) uint8 RGB


def sample_video(path, count, fps=None, start=None, end=None, **more):
    """Frames of a video file, an animated picture or a folder of pictures, evenly spread in time.

    Args:
        path: file, or folder of pictures.
        count: number of frames; all of a shorter video.
        fps: frames a second instead, at most `count`, see Video.pick; of a folder its own rate, as
            for a frame folder in a data set.
        start, end: seconds; frames outside are not taken.
        more: other FrameFlags.
    Returns:
        Frames.
    Raises:
        MediaError: what open_video, Video.pick and Video.read raise.
    """
    medium = Medium("video", path, fps, start, end)
    if os.path.isdir(path):
        fps = None
    return sample_medium(medium, FrameFlags(frames=count, fps=fps, **more))


def sample_medium(medium, flags, indices=None):
    """Frames of a Medium: training, evaluation and figures take theirs from here.

    prior.read_cues takes the same ones from open_medium, one in memory at a time.

    Args:
        flags: FrameFlags, which choose the frames of a video, or anything with its fields.
        indices: numbers of the frames to take instead.
    Returns:
        Frames; of a picture one.
    Raises:
        MediaError: the medium cannot be read.
    """
    if medium.kind == "image":
        return Frames([0], np.zeros(1), load_image(medium.path))
    video, chosen = open_medium(medium, flags)
    return read_frames(video, indices or chosen)


def read_frames(video, indices):
    """Frames of an open Video in the order of `indices` -> Frames."""
    indices = list(indices)
    ascending = sorted(set(indices))
    frames = dict(zip(ascending, video.read(ascending), strict=True))
    return Frames(indices, video.times[indices], np.stack([frames[index] for index in indices]))


def resize_frames(frames, min_pixels, max_pixels, factor=28):
    """Resize frames as Qwen-VL's processors do: bicubic, aspect ratio kept.

    Args:
        frames: (K, H, W, 3) uint8.
        min_pixels, max_pixels: bounds of h * w.
        factor: h and w are multiples of it.
    Returns:
        (K, 3, h, w) uint8.
    """
    # Imports of 3 s, which stored answers do not need.
    from torchvision.transforms.v2.functional import InterpolationMode, resize
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    # The size that Qwen-VL's own processor chooses.
    size = smart_resize(
        *frames.shape[1:3], factor=factor, min_pixels=min_pixels, max_pixels=max_pixels
    )
    pixels = torch.tensor(frames).permute(0, 3, 1, 2)  # (K, 3, H, W)
    return resize(pixels, size, InterpolationMode.BICUBIC)


def clock(seconds):
    """75.4 -> "01:15", as reasoning traces cite times."""
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def draw_times(frames, times):
    """Draw each frame's time into its upper left corner, white on black.

    Args:
        frames: (K, 3, H, W) uint8.
        times: (K,) seconds.
    Returns:
        (K, 3, H, W) uint8, a copy.
    """
    font = cv2.FONT_HERSHEY_SIMPLEX
    # OpenCV draws into contiguous pixels only.
    pictures = frames.permute(0, 2, 3, 1).numpy().copy()  # (K, H, W, 3)
    for picture, time in zip(pictures, times, strict=True):
        text = clock(time)
        # A line of text keeps its share of the frame's height.
        scale = len(picture) / 250
        (width, height), below = cv2.getTextSize(text, font, scale, 2)
        cv2.rectangle(picture, (0, 0), (width + 4, height + below + 2), (0, 0, 0), -1)
        cv2.putText(picture, text, (2, height + 2), font, scale, (255, 255, 255), 2, cv2.LINE_AA)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


@dataclass
class ModelInputs:
    """Output of the checkpoint's processor for one example."""

    input_ids: torch.Tensor  # (P,)
    pixel_values: torch.Tensor | None  # (patches, C) of all media, None for text
    grid_thw: torch.Tensor | None  # (media, 3) patches in time, height, width
    second_per_grid: float  # seconds of a temporal slot of the video
    times: list[float]  # (K,) seconds of the video's frames, [0.0] for pictures, [] for text
    shared: int = 0  # tokens up to the end of the media, the same for all questions about them
    kinds: list[str] = field(default_factory=list)  # of the media in the prompt's order

    @property
    def slots(self):
        """Temporal slots of the video; 1 for pictures alone, 0 for text."""
        if "video" in self.kinds:
            return int(self.grid_thw[self.kinds.index("video"), 0])
        return min(1, len(self.kinds))


@dataclass
class CachedMedium:
    """Decoded video or image in the cache of an Encoder."""

    kind: str  # "video" or "image"
    frames: torch.Tensor  # (K, 3, h, w) uint8, resized
    times: list[float]  # (K,) seconds
    inputs: ModelInputs | None = None  # prompt of this medium alone up to its end, once encoded

    @property
    def nbytes(self):
        """Memory of the frames and their float32 patches, in which an image stands twice."""
        patches = 4 if len(self.frames) > 1 else 8
        return (1 + patches) * self.frames.numel()


@dataclass
class Encoder:
    """Converts examples to model inputs with the checkpoint's own processor.

    Decoded media are kept up to `cache_gb`; those used longest ago are dropped first.
    """

    processor: object  # transformers' ProcessorMixin, whose import takes seconds; None of a server
    flags: PromptFlags
    cache_gb: float = 1.0
    media: dict = field(default_factory=dict, init=False)  # key -> CachedMedium, oldest use first

    def __post_init__(self):
        self.template = read_template(self.flags.prompt_template)

    def encode(self, example, row=None, shuffle=None, black=False):
        """Encode one example.

        Args:
            example: Example.
            row: its Prior, whose frames are shown; None shows uniform ones.
            shuffle: (K,) new order of the video's frames (control of the temporal reward). Times
                and prompt do not change.
            black: show black frames of the video, of the pictures where there is none (control of
                the evaluation).
        Returns:
            ModelInputs.
        Raises:
            MediaError: a medium cannot be decoded.
            DataError: the prior was made for other frames.
        """
        media = []
        for medium in example.media:
            # The prior is the video's, or the first picture's.
            loaded = self.load(medium, row if medium == example.medium else None)
            # A control leaves the pictures beside a video as they are.
            changes = medium.kind == example.media_type
            if changes and black:
                loaded = replace(loaded, frames=torch.zeros_like(loaded.frames), inputs=None)
            elif changes and shuffle is not None:
                loaded = replace(loaded, frames=loaded.frames[list(shuffle)], inputs=None)
            media.append(loaded)
        kinds = tuple(medium.kind for medium in example.media)
        before, after = around_text(self.processor, kinds, self.flags.system_prompt)

        tokenizer = self.processor.tokenizer
        if not media:
            before_ids = torch.tensor(tokenizer(before).input_ids)
            inputs = ModelInputs(before_ids, None, None, second_per_grid=1.0, times=[])
        elif len(media) > 1:
            inputs = self.process(before, media)
        else:
            # All questions about a medium share the prompt up to its end.
            media[0].inputs = media[0].inputs or self.process(before, media)
            inputs = media[0].inputs
        # Times as text stand in the user's turn, before the question.
        if self.flags.frame_times == "text" and example.video:
            times = ", ".join(map(clock, inputs.times))
            question = f"The frames were taken at {times}.\n{example.question}"
            example = replace(example, question=question)
        text = build_prompt(example, self.template)
        # Tokenized apart from the rest, since its special tokens are ordinary text.
        ids = plain_ids(tokenizer, text) + tokenizer(after, add_special_tokens=False).input_ids
        shared = inputs.input_ids
        ids = torch.cat([shared, torch.tensor(ids)])
        return replace(inputs, input_ids=ids, shared=len(shared))

    def load(self, medium, row=None):
        """Decode and resize a Medium unless the cache has it -> CachedMedium.

        Args:
            row: see encode.
        """
        # A prior's frames and uniform frames of one video are two entries.
        key = (medium, tuple(row.frames) if row else None)
        loaded = self.media.pop(key, None) or self.decode(*key)
        # The same numbers in another file are other frames.
        if row and not np.allclose(loaded.times, row.times, atol=0.02):
            raise DataError(
                f"{medium.path}: its prior was made for other frames (the times differ); "
                "build the priors again"
            )
        self.media[key] = loaded
        # The newest entry stays even if it exceeds the limit by itself.
        held = sum(one.nbytes for one in self.media.values())
        while held > self.cache_gb * 1e9 and len(self.media) > 1:
            oldest = next(iter(self.media))
            held -= self.media.pop(oldest).nbytes
        return loaded

    def decode(self, medium, indices):
        """Decode a Medium, or its frames of these indices, and resize them -> CachedMedium."""
        _, times, frames = sample_medium(medium, self.flags, indices)
        most = self.flags.max_pixels
        least = self.flags.min_pixels
        if medium.kind == "image":
            most = self.flags.image_max_pixels or most
            least = min(least, IMAGE_MIN_PIXELS)
        try:
            frames = resize_frames(frames, min(least, most), most, self.factor)
        except ValueError as error:  # one side is over 200 times the other
            raise MediaError(f"{medium.path}: cannot be resized ({error})") from error
        return CachedMedium(medium.kind, frames, times.tolist())

    @property
    def factor(self):
        """Sides of a frame are multiples of it: pixels of a merged patch."""
        # A server has its own processor; it is Qwen2.5-VL's size.
        if self.processor is None:
            return 28
        image_processor = self.processor.image_processor
        return image_processor.patch_size * image_processor.merge_size

    def process(self, text, media):
        """Run the processor on a prompt and frames of settled size.

        Args:
            text: the prompt up to the end of the last medium.
            media: list of CachedMedium in the prompt's order, with their frames or a control's.
        Returns:
            ModelInputs.
        """
        images = [one.frames[0] for one in media if one.kind == "image"]
        given = {"images": images or None}
        seconds = 1.0
        times = media[0].times
        for video in media:
            if video.kind == "image":
                continue
            frames = video.frames
            times = video.times
            # Mean frames a second; a single frame has no rate.
            fps = 1.0
            if len(times) > 1:
                fps = (len(times) - 1) / (times[-1] - times[0])
            # Drawn after a control has shuffled the frames: the times stay in order.
            if self.flags.frame_times == "drawn":
                frames = draw_times(frames, times)
            seconds = self.processor.video_processor.temporal_patch_size / fps
            # The frames are sampled already; their rate gives the seconds per slot.
            metadata = {
                "fps": fps,
                "total_num_frames": len(frames),
                "frames_indices": list(range(len(frames))),
            }
            given |= {"videos": [frames], "video_metadata": [metadata], "do_sample_frames": False}
        output = self.processor(text=[text], do_resize=False, return_tensors="pt", **given)
        # The processor gives pictures and videos apart.
        parts = {}
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if name in output:
                grids = output[f"{kind}_grid_thw"]
                patches = output[name].split(grids.prod(1).tolist())
                parts[kind] = zip(grids, patches, strict=True)
        kinds = [one.kind for one in media]
        grids, pixels = zip(*(next(parts[kind]) for kind in kinds), strict=True)
        return ModelInputs(
            output["input_ids"][0], torch.cat(pixels), torch.stack(grids), seconds, times, 0, kinds
        )
