"""Videos and pictures: frames and their times, and what the checkpoint's processor makes of them (model inputs)."""

import os
from collections import OrderedDict
from dataclasses import dataclass, replace

import cv2
import decord
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from common.data import PROMPT_TEMPLATE, DataError, MediaError, chat_parts, first_words, plain_ids

decord.logging.set_level(
    decord.logging.QUIET
)  # what is wrong with a video is in the exception; the rest is noise between the lines


def open_video(path):
    """decord reader of a video file; MediaError with the cause when it is missing, empty or not a video."""
    if not os.path.isfile(path):
        raise MediaError(f"{path}: no such file")
    if os.path.getsize(path) == 0:
        raise MediaError(f"{path}: empty file")
    try:
        reader = decord.VideoReader(path, num_threads=1)
    except (
        decord.DECORDError,
        RuntimeError,
    ) as error:  # decord raises either, by the kind of damage
        if is_image(path):
            raise MediaError(f"{path}: an image where a video was promised") from error
        raise MediaError(f"{path}: not a readable video ({first_words(error)})") from error
    if len(reader) == 0:
        raise MediaError(f"{path}: the video has no frames")
    return reader


def is_image(path):
    try:
        Image.open(path).close()
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        return False
    return True


def uniform_frames(total, k):
    """Indices of k frames spread evenly over a video of `total`: round(linspace(0, total - 1, k)); all of them when there are fewer."""
    return np.linspace(0, total - 1, min(k, total)).round().astype(int).tolist()


def read_frames(reader, path, indices):
    """Frames of an open video: indices (K,) -> uint8 array (K, H, W, 3) RGB and their times (K,) in seconds (presentation start)."""
    if min(indices) < 0 or max(indices) >= len(reader):
        raise MediaError(
            f"{path}: frames {min(indices)} to {max(indices)} asked for, the video has 0 to {len(reader) - 1}"
        )
    try:
        return reader.get_batch(list(indices)).asnumpy(), reader.get_frame_timestamp(list(indices))[
            :, 0
        ]
    except (decord.DECORDError, RuntimeError, MemoryError) as error:
        raise MediaError(f"{path}: damaged video ({first_words(error)})") from error


def decode_frames(path, indices):
    """Frames of a video file, as read_frames has them."""
    return read_frames(open_video(path), path, indices)


def load_image(path):
    """An image as one frame: uint8 array (1, H, W, 3) RGB."""
    if not os.path.isfile(path):
        raise MediaError(f"{path}: no such file")
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))[None]
    except (
        Image.DecompressionBombError,
        OSError,
        SyntaxError,
        ValueError,
    ) as error:  # Pillow raises all of them, by the damage
        raise MediaError(f"{path}: not a readable image ({error})") from error


def resize_frames(frames, min_pixels, max_pixels, factor=28):
    """(K, H, W, 3) -> (K, 3, h, w): sides multiples of `factor`, min_pixels <= h*w <= max_pixels, aspect kept, bicubic."""
    height, width = smart_resize(
        *frames.shape[1:3], factor=factor, min_pixels=min_pixels, max_pixels=max_pixels
    )
    resized = torch.empty(len(frames), 3, height, width, dtype=torch.uint8)
    for frame, own in zip(
        frames, resized, strict=True
    ):  # one at a time: as float32 they take four times the memory
        pixels = torch.tensor(frame).permute(2, 0, 1)[None].float()  # (1, 3, H, W)
        own.copy_(
            F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0]
            .round()
            .clamp(0, 255)
        )
    return resized


def clock(seconds):
    """75.4 -> "01:15", as traces cite times."""
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def draw_times(frames, times):
    """Each frame's time in its upper left corner, white on a black box: frames (K, 3, H, W) uint8 -> the same shape."""
    drawn, font = [], cv2.FONT_HERSHEY_SIMPLEX
    for frame, time in zip(frames.permute(0, 2, 3, 1).numpy(), times, strict=True):
        picture, scale = np.ascontiguousarray(frame), frame.shape[0] / 250
        (width, height), below = cv2.getTextSize(clock(time), font, scale, 2)
        cv2.rectangle(picture, (0, 0), (width + 4, height + below + 2), (0, 0, 0), -1)
        cv2.putText(
            picture, clock(time), (2, height + 2), font, scale, (255, 255, 255), 2, cv2.LINE_AA
        )
        drawn.append(torch.from_numpy(picture).permute(2, 0, 1))
    return torch.stack(drawn)


@dataclass
class ModelInputs:
    """What the checkpoint's processor made of one example."""

    input_ids: torch.Tensor  # (P,)
    pixel_values: torch.Tensor | None  # (patches, C), None for text
    grid_thw: torch.Tensor | None  # (3,) patches in time, height, width
    second_per_grid: float  # seconds of a temporal slot
    times: list[float]  # (K,) seconds of the frames, [] for text

    def __getitem__(self, name):  # TO GO: access as a dict
        return getattr(self, name)

    def items(self):  # TO GO
        return vars(self).items()

    def keys(self):  # TO GO
        return vars(self).keys()


class Encoder:
    """Examples -> model inputs through the checkpoint's own processor. Decoded media are kept up to `cache_gb`; the oldest leave first.

    frame_times: how a video's frames say when they were taken: text (a line before the question), drawn (on the frames), none.
    system_prompt: text of a system turn before the question; None: whatever the chat template does by itself.
    """

    def __init__(
        self,
        processor,
        min_pixels,
        max_pixels,
        frames=16,
        template=PROMPT_TEMPLATE,
        cache_gb=1.0,
        frame_times="none",
        system_prompt=None,
    ):
        self.processor, self.template, self.frames, self.frame_times = (
            processor,
            template,
            frames,
            frame_times,
        )
        self.system_prompt = system_prompt
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.factor = processor.image_processor.patch_size * processor.image_processor.merge_size
        self.media, self.media_bytes, self.limit = (
            OrderedDict(),
            0,
            int(cache_gb * 1e9),
        )  # (path, frame indices) -> frames, patches

    def encode(self, example, row=None, shuffle=None, black=False):
        """-> dict: input_ids (P,), pixel_values (patches, C), grid_thw (3,), second_per_grid, times (K,) of the frames in seconds.

        row: the example's row of a priors file, which says the frames; without one they are `frames` uniform ones.
        shuffle: a permutation of the frames (the temporal reward's control); times and prompt stay as they are.
        black: the frames are black (a control of the evaluation).
        """
        if example.media_type == "text":
            before, words, after = chat_parts(
                self.processor, example, self.template, self.system_prompt
            )
            ids = torch.tensor(self.processor.tokenizer(before).input_ids)
            seen = {
                "input_ids": ids,
                "pixel_values": None,
                "grid_thw": None,
                "second_per_grid": 1.0,
                "times": [],
            }
        else:
            entry = self.load(example, row)
            if self.frame_times == "text" and example.media_type == "video":
                times = f"The frames were taken at {', '.join(map(clock, entry['times']))}.\n"
                example = replace(example, question=times + example.question)
            before, words, after = chat_parts(
                self.processor, example, self.template, self.system_prompt
            )
            if black:
                seen = self.process(example, before, torch.zeros_like(entry["frames"]), entry)
            elif shuffle is not None:
                seen = self.process(example, before, entry["frames"][list(shuffle)], entry)
            else:
                # the medium and what stands before it are the same for all questions about it
                if "seen" not in entry:
                    entry["seen"] = self.process(example, before, entry["frames"], entry)
                seen = entry["seen"]
        tokenizer = self.processor.tokenizer
        question = (
            plain_ids(tokenizer, words) + tokenizer(after, add_special_tokens=False).input_ids
        )
        return ModelInputs(
            **{**seen, "input_ids": torch.cat([seen["input_ids"], torch.tensor(question)])}
        )

    def load(self, example, row):
        """Decoded, resized frames of the example's medium, from the cache if they are there."""
        key = (example.media, tuple(row["frames"]) if row else None)
        if key not in self.media:
            if example.media_type == "image":
                frames, times = load_image(example.media), [0.0]
            else:
                frames, times = decode_frames(
                    example.media,
                    key[1] or uniform_frames(len(open_video(example.media)), self.frames),
                )
            try:
                frames = resize_frames(frames, self.min_pixels, self.max_pixels, self.factor)
            except ValueError as error:  # one side over 200 times the other
                raise MediaError(f"{example.media}: cannot be resized ({error})") from error
            fps = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 1.0
            size = (
                (5 if len(times) > 1 else 9) * frames.numel()
            )  # the frames and their float32 patches, in which an image stands twice
            self.media[key] = {
                "frames": frames,
                "times": [float(t) for t in times],
                "fps": float(fps),
                "bytes": size,
            }
            self.media_bytes += size
            while self.media_bytes > self.limit and len(self.media) > 1:
                self.media_bytes -= self.media.popitem(last=False)[1]["bytes"]
        self.media.move_to_end(key)
        entry = self.media[key]
        if row and not np.allclose(entry["times"], row["times"], atol=0.02):
            raise DataError(
                f"{example.media}: its prior was made for other frames (the times differ); build the priors again"
            )
        return entry

    def process(self, example, text, frames, entry):
        """The processor's view of prompt and frames; the size was settled by resize_frames."""
        if example.media_type == "image":
            output = self.processor(
                text=[text], images=[frames[0]], do_resize=False, return_tensors="pt"
            )
            pixels, grid, seconds = output["pixel_values"], output["image_grid_thw"][0], 1.0
        else:
            if self.frame_times == "drawn":
                frames = draw_times(
                    frames, entry["times"]
                )  # after a control's shuffling: its times stay in order
            metadata = {
                "fps": entry["fps"],
                "total_num_frames": len(frames),
                "frames_indices": list(range(len(frames))),
            }
            output = self.processor(
                text=[text],
                videos=[frames],
                video_metadata=[metadata],
                do_sample_frames=False,
                do_resize=False,
                return_tensors="pt",
            )
            pixels, grid = output["pixel_values_videos"], output["video_grid_thw"][0]
            seconds = self.processor.video_processor.temporal_patch_size / entry["fps"]
        return {
            "input_ids": output["input_ids"][0],
            "pixel_values": pixels,
            "grid_thw": grid,
            "second_per_grid": seconds,
            "times": entry["times"],
        }
