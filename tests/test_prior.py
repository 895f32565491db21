"""prior.py: hand-derived numbers for its maths, real mp4 files and a real (tiny, untrained)
open_clip model for the rest.
"""

import copy
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import open_clip
import pytest
import torch
from pebble import ProcessExpired
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from warm import Script, run_script

import prior
from common import workers
from common.data import DataError, Example, MediaError, Medium, load_examples
from common.media import read_frames, sample_video
from common.video import Video, open_video
from common.workers import Pool

ROOT = Path(__file__).resolve().parents[1]

WORDS = "which what colour is the ball scene comes first red green blue".split()


def flat(red, green, blue, size=48):
    return np.full((size, size, 3), (red, green, blue), np.uint8)


def write_video(path, frames, fps=8):
    writer = cv2.VideoWriter(
        str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, frames[0].shape[1::-1]
    )
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return path


def noisy(background, count, rng, sigma=8):
    """count frames of one background (H, W, 3) with camera noise."""
    return list(
        np.clip(background + rng.normal(0, sigma, (count, *background.shape)), 0, 255).astype(
            np.uint8
        )
    )


def backgrounds(size=96):
    """Scenes that differ in texture or brightness, some in hue, as hard as the toy's: most are
    grey.
    """
    y, x = np.mgrid[:size, :size]
    striped = np.where((y // 7) % 2, 75, 160)[..., None].repeat(3, 2)
    dotted = np.where((x % 14 - 7) ** 2 + (y % 14 - 7) ** 2 < 18, 145, 90)[..., None].repeat(3, 2)
    plain, red, blue = (
        np.full((size, size, 3), colour) for colour in (75, (200, 60, 60), (60, 60, 200))
    )
    return [striped, dotted, plain, red, blue]


def pictures(seed=0, size=96):
    """Five scenes with the coarse structure of photographs, of different brightness: 6 by 6 random
    colours, smoothly enlarged.
    """
    coarse, ranges = (
        np.random.default_rng(seed).random((5, 6, 6, 3)),
        ((20, 110), (120, 235), (60, 150), (170, 255), (0, 70)),
    )
    levels = [
        (low + picture * (high - low)).astype(np.uint8)
        for picture, (low, high) in zip(coarse, ranges, strict=True)
    ]
    return [
        cv2.resize(picture, (size, size), interpolation=cv2.INTER_CUBIC).astype(float)
        for picture in levels
    ]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A local-dir: of a tiny open_clip model with a tokenizer of its own: config, safetensors,
    tokenizer files.
    """
    folder = tmp_path_factory.mktemp("clip")
    tokens = {
        word: index for index, word in enumerate(["<pad>", "<unk>", "<start>", *WORDS, "<end>"])
    }  # CLIP pools at the highest id
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[(name, tokens[name]) for name in ("<start>", "<end>")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": 8,
            "vocab_size": len(tokens),
            "width": 32,
            "heads": 2,
            "layers": 1,
            "hf_tokenizer_name": "own",
        },
    }
    torch.manual_seed(0)
    save_file(
        open_clip.model.CLIP(**config).state_dict(), str(folder / "open_clip_model.safetensors")
    )
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    )
    return folder


@pytest.fixture(scope="session")
def clip(clip_folder):
    return prior.load_clip(f"local-dir:{clip_folder}")


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    """A folder of media: three scenes of 2 s at 8 fps, a video of 5 frames, a picture, and broken
    ones.
    """
    folder, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    write_video(
        folder / "scenes.mp4",
        [frame for scene in backgrounds()[:3] for frame in noisy(scene, 16, rng)],
    )
    write_video(folder / "short.mp4", noisy(backgrounds()[0], 5, rng))
    Image.fromarray(flat(200, 30, 30)).save(folder / "picture.png")
    (folder / "text.mp4").write_text("this is no video\n" * 50)
    (folder / "empty.mp4").write_bytes(b"")
    whole = (folder / "scenes.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("this is no picture")
    return folder


def example(media, name, question="which scene comes first", id=None):
    kind = {".mp4": "video", ".png": "image"}.get(Path(name).suffix)
    shown = [Medium(kind, str(media / name))] if name else []
    return Example(id or name, question, [], "free-form", "a", shown)


def arguments(**changes):
    return prior.PriorSettings(**{"frames": 8, **changes})


# ------------------------------------------------------------------------------------------- maths


@pytest.mark.parametrize(
    "total, k, expected",
    [
        (64, 4, [0, 21, 42, 63]),  # 63 / 3 = 21
        (10, 4, [0, 3, 6, 9]),
        (
            9,
            8,
            [0, 1, 2, 3, 5, 6, 7, 8],
        ),  # steps of 8 / 7: 0, 1.14, 2.29, 3.43, 4.57, 5.71, 6.86, 8
        (3, 16, [0, 1, 2]),  # fewer than K: all
        (1, 16, [0]),
        (100, 1, [0]),
    ],
)
def test_uniform_frames(total, k, expected):
    assert prior.uniform_frames(total, k) == expected


def test_scene_scores_of_flat_frames():
    black, white = flat(0, 0, 0), flat(255, 255, 255)
    half = black.copy()
    half[:, 24:] = 255
    scores = prior.scene_scores(np.stack([black, black, white, black, half]))
    # identical 0, disjoint 1; black against half black, half white: BC = sqrt(1 * 1/2),
    # distance sqrt(1 - BC)
    assert scores == pytest.approx([0, 0, 1, 1, np.sqrt(1 - np.sqrt(0.5))], abs=1e-3)


def test_scene_scores_see_hue_and_forgive_flicker():
    frames = [
        flat(200, 30, 30),
        flat(30, 200, 30),
        flat(127, 127, 127),
        flat(127, 127, 126),
        flat(126, 127, 127),
        flat(128, 128, 128),
    ]
    scores = prior.scene_scores(np.stack(frames))
    assert scores[1] == pytest.approx(1, abs=1e-3)  # same saturation and value, another hue
    assert scores[3:5] == pytest.approx(
        [0, 0], abs=1e-3
    )  # the hue of a grey turns by 60 and 120 degrees
    # value 127 -> 128 moves all mass by one bin; of two Gaussians of sigma 2 bins BC = exp(-1
    # / (8 * 2 * 2)): below the threshold
    assert scores[5] == pytest.approx(np.sqrt(1 - np.exp(-1 / 32)), abs=0.01)


def test_scene_scores_do_not_depend_on_resolution():
    frames = np.stack(
        [np.clip(background, 0, 255).astype(np.uint8) for background in backgrounds(112)]
    )
    large = np.stack(
        [cv2.resize(frame, (672, 672), interpolation=cv2.INTER_NEAREST) for frame in frames]
    )
    assert prior.scene_scores(large) == pytest.approx(prior.scene_scores(frames), abs=0.1)


@pytest.mark.parametrize(
    "scores, expected",
    [
        ([0, 0.02, 0.9, 0.03, 0.02], [2]),
        ([0, 0.02, 0.19, 0.03, 0.02], []),  # below the threshold
        (
            [0, 0.02, 0.8, 0.3, 0.02, 0.02],
            [2, 3],
        ),  # two cuts in a row: a scene of one sampled frame
        ([0, 0.02, 0.3, 0.3, 0.02, 0.02], [2, 3]),  # the same on a plateau
        ([0, 0.3, 0.02, 0.02, 0.3], [1, 4]),  # at both ends
        ([0, 0.28, 0.26, 0.27, 0.28, 0.25, 0.28], []),  # steady drift
        ([0, 0.05, 0.1, 0.25, 0.3, 0.25, 0.1, 0.05], [4]),  # a pan: its peak alone
        ([0, 0.7, 0.6, 0.7, 0.8, 0.6], [1, 2, 3, 4, 5]),  # a montage: strong scores need no peak
        ([0], []),
    ],
)
def test_scene_set(scores, expected):
    assert prior.scene_set(np.array(scores), threshold=0.2) == expected


def test_semantic_set():
    assert prior.semantic_set([0.1, 0.5, 0.3, 0.4, 0.2, 0.0, 0.0, 0.0]) == [1, 3]  # ceil(8 / 4) = 2
    assert prior.semantic_set([0.1, 0.5, 0.3, 0.4, 0.2]) == [1, 3]  # ceil(5 / 4) = 2
    assert prior.semantic_set([0.3, 0.1, 0.3, 0.3], 2) == [0, 2]  # ties: the earlier
    assert prior.semantic_set(torch.tensor([0.1, 0.2]), 5) == [0, 1]
    assert prior.semantic_set([-0.5]) == [0]


def test_fuse():
    # w = 0.1, 1.1, 4.1, 3.1; sum 8.4
    assert prior.fuse(4, [1, 2], [2, 3]).tolist() == pytest.approx(
        [0.1 / 8.4, 1.1 / 8.4, 4.1 / 8.4, 3.1 / 8.4]
    )
    assert prior.fuse(4, [], []).tolist() == pytest.approx([0.25] * 4)
    assert prior.fuse(2, [0], [1], w_base=1, w_scene=2, w_sem=4).tolist() == pytest.approx(
        [3 / 8, 5 / 8]
    )


# ------------------------------------------------------------------------------------- real videos


@pytest.mark.parametrize("k", [10, 16, 32])
def test_every_hard_cut_is_found(tmp_path, k):
    rng, lengths = np.random.default_rng(1), [16, 24, 8, 20, 12]
    write_video(
        tmp_path / "cuts.mp4",
        [
            frame
            for scene, n in zip(backgrounds(), lengths, strict=True)
            for frame in noisy(scene, n, rng)
        ],
    )
    indices = prior.uniform_frames(sum(lengths), k)
    _, _, frames = read_frames(open_video(str(tmp_path / "cuts.mp4")), indices)
    starts = np.cumsum(lengths)[:-1]
    expected = [
        next(i for i, index in enumerate(indices) if index >= start) for start in starts
    ]  # the sampled frame that begins the scene
    assert prior.scene_set(prior.scene_scores(frames)) == expected


@pytest.mark.parametrize("sigma", [0, 3, 20])
@pytest.mark.parametrize("grey", [16, 127.5, 128])
def test_no_cut_in_a_static_noisy_video(tmp_path, sigma, grey):
    rng = np.random.default_rng(2)
    write_video(tmp_path / "static.mp4", noisy(np.full((96, 96, 3), grey), 48, rng, sigma))
    _, _, frames = sample_video(str(tmp_path / "static.mp4"), 16)
    assert prior.scene_set(prior.scene_scores(frames)) == []


def cuts(scores, scene):
    return (
        prior.scene_set(scores)
        if scene == "hsv"
        else [i for i, score in enumerate(scores) if score == 1]
    )


@pytest.mark.parametrize("detector", ["hsv", "content", "adaptive", "hash", "histogram"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [16, 32])
def test_every_detector_finds_every_hard_cut(tmp_path, detector, seed, k):
    rng, lengths = np.random.default_rng(1), [24, 40, 16, 32, 20]
    write_video(
        tmp_path / "cuts.mp4",
        [
            frame
            for scene, n in zip(pictures(seed), lengths, strict=True)
            for frame in noisy(scene, n, rng)
        ],
    )
    indices, _, scores, pixels = prior.read_cues(
        Medium("video", str(tmp_path / "cuts.mp4")), arguments(frames=k, scene=detector)
    )
    starts = np.cumsum(lengths)[:-1]
    assert cuts(scores, detector) == [
        next(i for i, index in enumerate(indices) if index >= start) for start in starts
    ]
    assert pixels is None


def test_the_threshold_detector_finds_cuts_through_black(tmp_path):
    rng, black = np.random.default_rng(1), np.zeros((96, 96, 3))
    parts = [(pictures()[0], 30), (black, 8), (pictures()[1], 30), (black, 6), (pictures()[2], 30)]
    write_video(
        tmp_path / "fades.mp4", [frame for scene, n in parts for frame in noisy(scene, n, rng, 2)]
    )
    indices, _, scores, _ = prior.read_cues(
        Medium("video", str(tmp_path / "fades.mp4")), arguments(frames=32, scene="threshold")
    )
    found = [indices[i] for i, score in enumerate(scores) if score == 1]
    step = indices[1] - indices[0]
    assert len(found) == 2 and all(
        begin <= index <= end + step
        for index, (begin, end) in zip(found, [(30, 38), (68, 74)], strict=True)
    )


@pytest.mark.parametrize(
    "detector", ["hsv", "content", "adaptive", "hash", "histogram", "threshold"]
)
@pytest.mark.parametrize("picture", range(3))
def test_no_detector_finds_a_cut_in_a_static_video(tmp_path, detector, picture):
    write_video(
        tmp_path / "static.mp4", noisy(pictures()[picture], 80, np.random.default_rng(2), 6)
    )
    scores = prior.read_cues(
        Medium("video", str(tmp_path / "static.mp4")), arguments(frames=16, scene=detector)
    )[2]
    assert cuts(scores, detector) == [] and (detector == "hsv" or set(scores) == {0.0})


def test_a_threshold_is_the_detectors_own(tmp_path):
    frames = noisy(pictures()[0], 24, np.random.default_rng(1)) + noisy(
        pictures()[1], 24, np.random.default_rng(1)
    )
    path = str(write_video(tmp_path / "cut.mp4", frames))
    scores = [
        sum(
            prior.read_cues(
                Medium("video", path), arguments(scene="content", scene_threshold=threshold)
            )[2]
        )
        for threshold in (None, 250)
    ]
    assert scores == [1, 0]


# ---------------------------------------------------------------- frames: fps, VFR, rotation, size


def write_av(path, frames, times=None, codec="mpeg4", fps=8, **options):
    """Frames with PyAV, at any times (milliseconds)."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = (
            frames[0].shape[1],
            frames[0].shape[0],
            "yuv420p",
        )
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts, frame.time_base = (
                times[index] if times else index * 1000 // fps,
                Fraction(1, 1000),
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize(
    "fps, expected",
    [
        (None, [0, 7, 13, 20, 27, 34, 40, 47]),  # K = 8 of 48
        (1, [0, 9, 19, 28, 38, 47]),  # 6 s at 1 fps: 6 frames, steps of 47 / 5
        (4, [0, 7, 13, 20, 27, 34, 40, 47]),  # 24 frames, capped at 8
        (0.01, [0]),
    ],
)
def test_fps(media, fps, expected):
    indices, times, _, _ = prior.read_cues(
        Medium("video", str(media / "scenes.mp4")), arguments(fps=fps)
    )
    assert indices == expected and times == [index / 8 for index in indices]


@pytest.mark.parametrize("scene", ["hsv", "content"])
def test_variable_frame_rate(tmp_path, scene):
    frames = [
        frame
        for background in pictures()[:3]
        for frame in noisy(background, 16, np.random.default_rng(0))
    ]
    times = [
        125 * i if i < 16 else 2000 + 500 * (i - 16) for i in range(48)
    ]  # 8 fps for 2 s, then 2 fps
    path = write_av(tmp_path / "vfr.mp4", frames, times)
    indices, seconds, scores, _ = prior.read_cues(
        Medium("video", path), arguments(scene=scene, frames=12)
    )
    assert seconds == pytest.approx([times[index] / 1000 for index in indices], abs=2e-3)
    assert cuts(scores, scene) == [
        next(i for i, index in enumerate(indices) if index >= start) for start in (16, 32)
    ]


def test_a_stream_that_begins_late(tmp_path):
    frames = [
        frame
        for background in pictures()[:2]
        for frame in noisy(background, 24, np.random.default_rng(0))
    ]
    path = write_av(tmp_path / "late.mkv", frames, [5000 + 125 * i for i in range(48)])
    for scene in ("hsv", "content"):
        indices, _, scores, _ = prior.read_cues(Medium("video", path), arguments(scene=scene))
        assert cuts(scores, scene) == [next(i for i, index in enumerate(indices) if index >= 24)]


def rotate(path):
    """Writes a display matrix of 90 degrees into the track header of an mp4."""
    data = bytearray(path.read_bytes())
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    at = data.index(identity, data.index(b"tkhd"))
    data[at : at + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 96 << 16, 0, 1 << 30)
    path.write_bytes(data)


def test_a_rotated_video_is_seen_upright(tmp_path):
    frame = np.zeros((96, 160, 3), np.uint8)
    frame[:, :80] = (200, 30, 30)  # red on the left; turned by 90 degrees clockwise, red on top
    write_av(tmp_path / "turned.mp4", [frame] * 10)
    rotate(tmp_path / "turned.mp4")
    shapes = []
    prior.read_cues(
        Medium("video", str(tmp_path / "turned.mp4")),
        arguments(),
        lambda image: shapes.append(image.copy()) or torch.zeros(3, 1, 1),
    )
    assert shapes[0].size == (96, 160)
    top, bottom = np.asarray(shapes[0])[20, 48], np.asarray(shapes[0])[140, 48]
    assert top[0] > 150 and bottom[0] < 60


def test_large_frames_are_not_held_together(tmp_path):
    write_video(
        tmp_path / "large.mp4", [np.full((2304, 4096, 3), 10 * i, np.uint8) for i in range(24)]
    )  # 28 MB a frame, 680 MB in all
    code = (
        "import resource, prior; from common.data import Medium;"
        "usage = resource.getrusage; own = resource.RUSAGE_SELF;"
        "peak = lambda: usage(own).ru_maxrss; before = peak();"
        f"medium = Medium('video', {str(tmp_path / 'large.mp4')!r});"
        "indices = prior.read_cues(medium, prior.PriorSettings(frames=24))[0];"
        "print(len(indices), (peak() - before) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    count, megabytes = map(int, done.stdout.split())
    assert count == 24 and megabytes < 500, megabytes


# -------------------------------------------------------------------------------------------- CLIP


def test_load_clip_uses_the_folders_weights_and_tokenizer(clip, clip_folder):
    assert not clip.model.training
    ids = clip.tokenizer(["the ball"])[0].tolist()
    assert ids == [2, 3 + WORDS.index("the"), 3 + WORDS.index("ball"), 3 + len(WORDS), 0, 0, 0, 0]
    again = prior.load_clip(f"local-dir:{clip_folder}", "openai")  # the tag is unused with a folder
    assert all(
        torch.equal(a, b)
        for a, b in zip(clip.model.parameters(), again.model.parameters(), strict=True)
    )


def test_semantic_scores_are_cosines(clip):
    frames = np.stack([flat(200, 30, 30), flat(30, 200, 30), flat(30, 30, 200)])
    scores = prior.semantic_scores(frames, "which scene", clip)
    pixels = torch.stack([clip.preprocess(Image.fromarray(frame)) for frame in frames])
    with torch.no_grad():
        image, text = (
            clip.model.encode_image(pixels),
            clip.model.encode_text(clip.tokenizer(["which scene"])),
        )
    assert scores.shape == (3,)
    assert torch.allclose(scores, torch.cosine_similarity(image, text), atol=1e-6)
    assert scores.unique().numel() == 3
    assert torch.allclose(
        prior.encode_pixels(pixels, clip, batch=2),
        prior.encode_pixels(pixels.numpy(), clip),
        atol=1e-6,
    )


def test_a_question_longer_than_the_context_is_cut(clip):
    long = prior.semantic_scores(
        flat(9, 9, 9)[None],
        "which what colour is the ball scene comes first red green blue " * 20,
        clip,
    )
    cut = prior.semantic_scores(
        flat(9, 9, 9)[None], "which what colour is the ball", clip
    )  # 6 words + start + end = the context of 8
    assert torch.allclose(long, cut, atol=1e-6)


def test_load_clip_refuses_what_it_must(clip_folder, tmp_path):
    with pytest.raises(DataError, match="cannot be loaded"):
        prior.load_clip(f"local-dir:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="cannot be loaded"):
        prior.load_clip("ViT-Nothing", "openai")
    with pytest.raises(DataError, match="cannot be loaded"):
        prior.load_clip("ViT-B-32", None)  # no weights named: never a random model
    for name in ("open_clip_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(DataError, match="cannot be loaded.*Required pretrained weights"):
        prior.load_clip(f"local-dir:{tmp_path}")
    torch.save({"run": os.system}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(DataError, match="cannot be loaded.*[Ww]eights.only"):
        prior.load_clip(f"local-dir:{tmp_path}")  # a pickle that is more than weights
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="cannot be loaded"):
        prior.load_clip(f"local-dir:{tmp_path}")


# -------------------------------------------------------------------------------------------- rows


def test_row_of_a_video(clip, media):
    row = prior.make_prior(example(media, "scenes.mp4"), clip, arguments())
    assert row.problem_id == "scenes.mp4"
    assert row.frames == [0, 7, 13, 20, 27, 34, 40, 47]  # 48 frames: steps of 47 / 7
    assert row.times == pytest.approx([index / 8 for index in row.frames], abs=1e-3)
    assert row.scene == [3, 5]  # scenes begin at frames 16 and 32
    assert row.semantic == prior.semantic_set(row.semantic_scores) and len(row.semantic) == 2
    assert torch.equal(torch.tensor(row.prior), prior.fuse(8, row.scene, row.semantic))
    assert (row.question, row.media) == ("which scene comes first", "scenes.mp4")
    assert row.settings == {
        "frames": 8,
        "fps": None,
        "min_frames": 1,
        "decoder": "pyav",
        "scene": "hsv",
        "scene_threshold": None,
        "semantic_k": None,
        "semantic_options": False,
        "clip": "ViT-B-32",
        "clip_pretrained": "openai",
        "prior": "full",
        "w_base": 0.1,
        "w_scene": 1.0,
        "w_sem": 3.0,
    }
    assert torch.equal(
        torch.tensor(json.loads(workers.to_line(row))["prior"]), torch.tensor(row.prior)
    )
    changed = prior.make_prior(
        example(media, "scenes.mp4"), clip, arguments(semantic_k=1, w_sem=0.0, scene_threshold=1.0)
    )
    assert (
        changed.prior == pytest.approx([1 / 8] * 8)
        and len(changed.semantic) == 1
        and changed.scene == []
    )


def test_row_of_an_image(clip, media):
    row = prior.make_prior(example(media, "picture.png"), clip, arguments())
    assert (row.frames, row.times, row.prior, row.scene, row.semantic) == (
        [0],
        [0.0],
        [1.0],
        [],
        [],
    )


def test_short_video_keeps_all_frames(clip, media):
    row = prior.make_prior(example(media, "short.mp4"), clip, arguments())
    assert (
        row.frames == [0, 1, 2, 3, 4] and len(row.prior) == 5 and sum(row.prior) == pytest.approx(1)
    )


def test_build_priors_groups_by_medium_and_names_broken_media(clip, media, monkeypatch):
    names = [
        "scenes.mp4",
        "text.mp4",
        "picture.png",
        "scenes.mp4",
        "",
        "empty.mp4",
        "truncated.mp4",
        "absent.mp4",
        "text.png",
        "scenes.mp4",
    ]
    questions = [
        "which scene",
        "what",
        "what",
        "the ball",
        "what",
        "what",
        "what",
        "what",
        "what",
        "first red green",
    ]
    examples = [
        example(media, name, question, str(index))
        for index, (name, question) in enumerate(zip(names, questions, strict=True))
    ]
    decoded, read = [], Video.read
    monkeypatch.setattr(
        Video,
        "read",
        lambda self, indices: decoded.append((self.path, *indices)) or read(self, indices),
    )
    rows, errors = prior.build_priors(examples, clip, arguments())
    assert [row.problem_id for row in rows] == ["0", "3", "9", "2"]  # by medium
    assert [(error["problem_id"], Path(error["media"]).name) for error in errors] == [
        ("1", "text.mp4"),
        ("5", "empty.mp4"),
        ("6", "truncated.mp4"),
        ("7", "absent.mp4"),
        ("8", "text.png"),
    ]
    assert all(len(error["cause"]) > 20 and "\n" not in error["cause"] for error in errors)
    # once, for three questions
    assert decoded == [(str(media / "scenes.mp4"), 0, 7, 13, 20, 27, 34, 40, 47)]
    assert (
        rows[0].scene_scores == rows[1].scene_scores
        and rows[0].semantic_scores != rows[1].semantic_scores
    )
    assert rows[1] == prior.make_prior(examples[3], clip, arguments())


def test_a_fault_of_ours_is_not_swallowed(clip, media, monkeypatch):
    monkeypatch.setattr(prior, "hsv_histogram", lambda frame: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prior.build_priors([example(media, "scenes.mp4")], clip, arguments())


def hang(medium, settings, preprocess):
    time.sleep(600 if "hang" in medium.path else 0)
    if "crash" in medium.path:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "fault" in medium.path:
        raise ZeroDivisionError("ours")
    return medium.path


def test_a_decoder_that_hangs_or_dies_costs_its_medium_alone(monkeypatch):
    monkeypatch.setattr(prior, "read_cues", hang)
    media = [
        Medium("video", name)
        for name in ("a", "hang", "b", "crash", "c", "hang2", "d", "e", "f", "g", "h")
    ]
    begin = time.monotonic()
    found = dict(Pool(workers=2, timeout=1).each(prior.read_cues, media, None, None))
    assert time.monotonic() - begin < 60
    assert list(found) != media and set(found) == set(
        media
    )  # in the order in which they are finished
    assert [found[Medium("video", name)] for name in "abcdefgh"] == list("abcdefgh")
    assert "hang: not decoded within 1 s (--decode_timeout)" in str(found[Medium("video", "hang")])
    assert "crash: the decoder died of it (exit code -11)" in str(found[Medium("video", "crash")])
    assert all(
        isinstance(found[Medium("video", name)], MediaError) for name in ("hang", "hang2", "crash")
    )


def test_workers_killed_between_two_calls_cost_nothing():
    # pebble declares its pool broken then; every kill is followed by calls, waiting ones included.
    pool = Pool(workers=2, timeout=30)
    before = [pool.submit(abs, number) for number in range(-3, 0)]
    assert [pool.result(task, "a") for task in before] == [3, 2, 1]
    for pause in (0, 0.01, 0.1, 0.5):
        for child in multiprocessing.active_children():
            child.kill()
        early = pool.submit(abs, -4)
        time.sleep(pause)
        late = pool.submit(abs, -5)
        assert (pool.result(late, "late"), pool.result(early, "early")) == (5, 4)
    pool.stop()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "ends, outcome",
    [
        ([ProcessExpired("died"), BrokenProcessPool("lost"), 7], 7),
        ([BrokenProcessPool("lost"), ProcessExpired("died"), BrokenProcessPool("lost"), 7], 7),
        ([ProcessExpired("died"), BrokenProcessPool("lost"), ProcessExpired("died")], MediaError),
        ([BrokenProcessPool("lost")] * 3, BrokenProcessPool),
    ],
)
def test_a_lost_pool_is_not_the_mediums_doing(ends, outcome):
    pool = Pool(workers=0, timeout=1)
    ends = iter(ends)

    def begin(task):
        task.future = Future()
        end = next(ends)
        if isinstance(end, Exception):
            task.future.set_exception(end)
        else:
            task.future.set_result(end)

    pool.begin = begin
    task = pool.submit(abs, -7)
    begin(task)
    if outcome == 7:
        assert pool.result(task, "a") == 7
    else:
        with pytest.raises(outcome):
            pool.result(task, "a")
    assert not list(ends)


def fail_to_start():
    raise ValueError("no encoder")


def test_workers_that_cannot_start_end_the_run():
    pool = Pool(workers=1, timeout=30, initializer=fail_to_start)
    with pytest.raises(BrokenProcessPool):
        pool.result(pool.submit(abs, -1), "a")
    pool.stop()


def test_a_fault_of_ours_in_a_worker_is_not_swallowed(monkeypatch):
    monkeypatch.setattr(prior, "read_cues", hang)
    with pytest.raises(ZeroDivisionError, match="ours"):
        list(
            Pool(workers=1, timeout=30).each(
                prior.read_cues,
                [Medium("video", name) for name in ("a", "fault", "b")],
                None,
                None,
            )
        )


def test_workers_give_the_cues_of_one_process(clip, media):
    names = ("scenes.mp4", "text.mp4", "short.mp4", "picture.png", "empty.mp4")
    asked = list(prior.group_by_medium([example(media, name) for name in names]))
    given = (prior.read_cues, asked, arguments(), clip.preprocess)
    here = dict(Pool(workers=0, timeout=300).each(*given))
    there = dict(Pool(workers=2, timeout=300).each(*given))
    for medium in asked:
        if isinstance(here[medium], MediaError):
            assert str(there[medium]) == str(here[medium])
            continue
        for one, other in zip(here[medium], there[medium], strict=True):
            np.testing.assert_equal(one, other)


def test_workers_give_the_priors_of_one_process_in_its_order(clip, media):
    # two workers may finish in any order
    names = ("scenes.mp4", "short.mp4", "text.mp4", "scenes.mp4", "picture.png")
    examples = [example(media, name, id=str(index)) for index, name in enumerate(names)]
    here, broken = prior.build_priors(examples, clip, arguments())
    there, broken_there = prior.build_priors(examples, clip, arguments(), workers=2, timeout=30)
    assert there == here and [row.problem_id for row in here] == ["0", "3", "1", "4"]
    assert broken_there == broken and [one["problem_id"] for one in broken] == ["2"]


def test_options_in_the_text(clip, media):
    asked = example(media, "scenes.mp4", "which scene")
    asked.options = ["A. red", "B. blue"]
    alone, both = (
        prior.make_prior(asked, clip, arguments(semantic_options=flag)) for flag in (False, True)
    )
    _, _, frames = read_frames(open_video(asked.path), alone.frames)
    assert alone.semantic_scores == pytest.approx(
        prior.semantic_scores(frames, "which scene", clip).tolist(), abs=1e-6
    )
    assert both.semantic_scores == pytest.approx(
        prior.semantic_scores(frames, "which scene A. red B. blue", clip).tolist(), abs=1e-6
    )
    assert both.semantic_scores != alone.semantic_scores


def test_ablations_from_the_stored_scores(clip, media):
    row = prior.make_prior(example(media, "scenes.mp4"), clip, arguments())
    scene, semantic = row.scene, row.semantic
    for name, sets in {
        "full": (scene, semantic),
        "no_scene": ([], semantic),
        "no_semantic": (scene, []),
        "uniform": ([], []),
    }.items():
        changed = prior.weigh(copy.deepcopy(row), arguments(prior=name))
        assert torch.equal(torch.tensor(changed.prior), prior.fuse(8, *sets))
        assert changed.settings["prior"] == name and (changed.scene, changed.semantic) == (
            scene,
            semantic,
        )  # the sets stay
        assert (
            prior.make_prior(example(media, "scenes.mp4"), clip, arguments(prior=name)) == changed
        )
    without = prior.make_prior(example(media, "scenes.mp4"), None, arguments(prior="no_semantic"))
    assert (
        without.semantic_scores == []
        and without.prior == prior.weigh(row, arguments(prior="no_semantic")).prior
    )


def test_frame_sets_become_rows(media, tmp_path):
    sets = {
        "uniform": [0, 7, 13, 20, 27, 34, 40, 47],
        "scene": [20, 33],
        "semantic": [13, 14, 47],
    }  # 33 counts for 34, 14 for 13
    given = [
        example(media, "scenes.mp4"),
        example(media, "absent.mp4"),
        example(media, "picture.png"),
    ]
    for one, value in zip(
        given, (sets, sets, {"uniform": [0], "scene": [], "semantic": []}), strict=True
    ):
        one.extra["frame_sets"] = value
    rows, errors = prior.frame_set_rows(given, arguments())
    assert [row.problem_id for row in rows] == ["scenes.mp4", "picture.png"]
    assert [error["problem_id"] for error in errors] == ["absent.mp4"]
    assert (rows[0].scene, rows[0].semantic) == ([3, 5], [2, 7])
    assert torch.equal(torch.tensor(rows[0].prior), prior.fuse(8, [3, 5], [2, 7]))
    assert rows[1].prior == [1.0]
    assert rows[0].times == [index / 8 for index in sets["uniform"]]
    assert all(prior.check_row(vars(row)) == "" for row in rows)
    given[0].extra["frame_sets"] = {**sets, "uniform": [0, 60]}
    assert (
        "frame 60, the video ends with 47"
        in prior.frame_set_rows(given[:1], arguments(frames=2))[1][0]["cause"]
    )
    for bad in (
        {},
        3,
        {**sets, "scene": None},
        {**sets, "uniform": []},
        {**sets, "semantic": ["a"]},
        {**sets, "uniform": [-1]},
    ):
        given[0].extra["frame_sets"] = bad
        with pytest.raises(DataError, match="scenes.mp4: frame_sets must have"):
            prior.frame_set_rows(given[:1], arguments())
    given[0].extra["frame_sets"] = sets
    for frames in (4, 16):
        with pytest.raises(
            DataError, match=f"8 frames of scenes.mp4, this run uses --frames {frames}"
        ):
            prior.frame_set_rows(given[:1], arguments(frames=frames))
    given[0].extra["frame_sets"] = {
        **sets,
        "uniform": [0, 0, 1, 2],
    }  # a short video's, sampled with repeats
    assert prior.frame_set_rows(given[:1], arguments())[0][0].frames == [0, 1, 2]
    given[0].extra["frame_sets"] = {**sets, "uniform": [0, 47]}  # made with --fps
    settings = arguments(fps=0.3, min_frames=2)
    rows, _ = prior.frame_set_rows(given[:1], settings)
    assert rows[0].frames == [0, 47]
    workers.write_lines(tmp_path / "sets.jsonl", rows)
    again = prior.load_priors(tmp_path / "sets.jsonl", given[:1], settings)
    assert again["scenes.mp4"].frames == [0, 47]


@pytest.mark.parametrize(
    "changes",
    [
        {"fps": 0},
        {"fps": -1.0},
        {"fps": float("nan")},
        {"frames": 0},
        {"semantic_k": 0},
        {"scene_threshold": -1.0},
        {"w_base": 0.0},
        {"w_base": float("nan")},
        {"w_sem": -1.0},
        {"w_sem": float("inf")},
    ],
)
def test_arguments_that_give_no_distribution(changes):
    with pytest.raises(DataError):
        arguments(**changes)


# -------------------------------------------------------------------------------------------- file


@pytest.fixture
def priors_file(clip, media, tmp_path):
    examples = [example(media, name) for name in ("scenes.mp4", "short.mp4", "picture.png")] + [
        example(media, "")
    ]
    rows, _ = prior.build_priors(examples, clip, arguments())
    workers.write_lines(tmp_path / "priors.jsonl", rows)
    return SimpleNamespace(path=tmp_path / "priors.jsonl", examples=examples, rows=rows)


def test_load_priors_reads_back_what_was_written(priors_file):
    assert prior.load_priors(priors_file.path, priors_file.examples, arguments()) == {
        row.problem_id: row for row in priors_file.rows
    }
    short = prior.load_priors(priors_file.path, priors_file.examples[1:2], arguments(frames=16))
    assert list(short) == ["short.mp4"]  # 5 frames: right for 8 and 16


def test_load_priors_of_another_k(priors_file):
    for frames in (4, 16):
        with pytest.raises(
            DataError, match=f"8 frames of scenes.mp4, this run uses --frames {frames}"
        ):
            prior.load_priors(priors_file.path, priors_file.examples, arguments(frames=frames))
    with pytest.raises(DataError, match="5 frames of short.mp4, this run uses --frames 4"):
        prior.load_priors(priors_file.path, priors_file.examples[1:], arguments(frames=4))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"w_sem": 5.0}, "made with --w_sem 3.0, this run has 5.0"),
        ({"prior": "uniform"}, "made with --prior full, this run has uniform"),
        ({"scene_threshold": 0.3}, "made with --scene_threshold None"),
        ({"semantic_k": 2}, "made with --semantic_k None"),
        ({"scene": "content"}, "made with --scene hsv"),
        ({"decoder": "decord"}, "made with --decoder pyav, this run has decord"),
        ({"semantic_options": True}, "made with --semantic_options False"),
    ],
)
def test_load_priors_with_other_weights(priors_file, changes, words):
    with pytest.raises(DataError, match=words):
        prior.load_priors(priors_file.path, priors_file.examples, arguments(**changes))


def test_load_priors_of_another_question(priors_file, media):
    for other in (
        example(media, "scenes.mp4", "another question"),
        example(media, "short.mp4", id="scenes.mp4"),
    ):
        with pytest.raises(
            DataError, match="scenes.mp4 is another question there, or about another file"
        ):
            prior.load_priors(priors_file.path, [other], arguments())


def test_two_priors_of_one_question_are_refused(priors_file, tmp_path):
    lines = priors_file.path.read_text().splitlines(keepends=True)
    twice = tmp_path / "twice.jsonl"
    twice.write_text("".join([*lines, lines[0]]))
    expected = prior.load_priors(priors_file.path, priors_file.examples, arguments())
    assert prior.load_priors(twice, priors_file.examples, arguments()) == expected
    row = json.loads(lines[0])
    row["prior"] = [1 / len(row["frames"])] * len(row["frames"])
    twice.write_text("".join([*lines, json.dumps(row)]))
    with pytest.raises(DataError, match=f"has two priors of {row['problem_id']}"):
        prior.load_priors(twice, priors_file.examples, arguments())


def test_priors_of_a_span_are_read_again_and_no_others(media, tmp_path):
    """Scenes of 2 s at 8 fps: from 2 to 2.5 s there are 5 frames, fewer than the 8 asked for."""
    whole = example(media, "scenes.mp4", id="0")
    settings = arguments(prior="no_semantic")
    span = replace(whole, media=[replace(whole.video, start=2.0, end=2.5)])
    files = {}
    for name, one in (("whole", whole), ("span", span)):
        rows, errors = prior.build_priors([one], None, settings)
        assert not errors
        files[name] = tmp_path / f"{name}.jsonl"
        workers.write_lines(files[name], rows)
        assert prior.load_priors(files[name], [one], settings)["0"].frames == rows[0].frames
    assert prior.load_priors(files["span"], [span], settings)["0"].frames == [16, 17, 18, 19, 20]
    with pytest.raises(DataError, match="0 is another question there, or about another file"):
        prior.load_priors(files["whole"], [span], settings)
    inside = replace(whole, media=[replace(whole.video, start=1.9, end=2.6)])
    for other in (whole, inside):
        with pytest.raises(DataError, match="0 is another question there, .* file or span"):
            prior.load_priors(files["span"], [other], settings)


def test_examples_without_a_row_have_no_prior(priors_file, media):
    broken = [example(media, name) for name in ("truncated.mp4", "absent.mp4", "text.png")]
    everyone = priors_file.examples + broken
    assert prior.load_priors(priors_file.path, everyone, arguments()) == {
        row.problem_id: row for row in priors_file.rows
    }
    with pytest.raises(DataError, match="not found"):
        prior.load_priors(priors_file.path.with_name("absent"), priors_file.examples, arguments())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prior": [0.5, 0.5]}, "not equally long lists of numbers"),
        ({"prior": [0.5] * 8}, "the sum 4"),
        ({"prior": [-0.5, 1.5, 0, 0, 0, 0, 0, 0]}, "least value is -0.5, the sum 1"),
        ({"prior": [float("nan")] * 8}, "not equally long lists of numbers"),
        ({"settings": None}, "settings that are not an object"),
        ({"prior": ["x"] * 8}, "not equally long lists of numbers"),
        ({"frames": [0, 0, 1, 2, 3, 4, 5, 6]}, "not ascending"),
        ({"frames": 3}, "not equally long lists of numbers"),
        ({"times": None}, "not equally long lists of numbers"),
        ({"frames": [], "times": [], "prior": []}, "not ascending"),
        ({"frames": [0.5, 1, 2, 3, 4, 5, 6, 7]}, "not ascending"),
        ({"scene": [1, 8]}, "has a scene set that is not of positions"),
        ({"semantic": ["3"]}, "has a semantic set that is not of positions"),
    ],
)
def test_load_priors_of_a_malformed_row(priors_file, change, words):
    workers.write_lines(
        priors_file.path, [*priors_file.rows[1:], {**vars(priors_file.rows[0]), **change}]
    )
    with pytest.raises(DataError, match=f"line 3 .*{words}"):
        prior.load_priors(priors_file.path, priors_file.examples, arguments())


def test_load_priors_of_a_torn_file(priors_file):
    priors_file.path.write_text(priors_file.path.read_text()[:-30])
    with pytest.raises(DataError, match="line 3 is not valid JSON"):
        prior.load_priors(priors_file.path, priors_file.examples, arguments())


# ------------------------------------------------------------------------------------ command line


def run(*flags):
    return run_script("prior.py", *flags, check=False)


def write_dataset(path, media, names):
    kinds = {".mp4": "video", ".png": "image"}
    path.write_text(
        json.dumps(
            [
                {
                    "problem_id": index,
                    "problem": "which scene",
                    "problem_type": "free-form",
                    "solution": "a",
                    "path": name,
                    "data_type": kinds[Path(name).suffix],
                }
                for index, name in enumerate(names)
            ]
        )
    )
    return path


def test_command_line(clip_folder, media, tmp_path):
    dataset = write_dataset(tmp_path / "set.json", media, ["scenes.mp4", "text.mp4", "picture.png"])
    output = tmp_path / "new" / "priors.jsonl"
    done = run(
        "--dataset_name",
        dataset,
        "--media_root",
        media,
        "--output",
        output,
        "--frames",
        8,
        "--clip",
        f"local-dir:{clip_folder}",
    )
    assert done.returncode == 0, done.stderr
    assert (
        "2 priors are in" in done.stdout
        and "1 examples could not be used" in done.stdout
        and "Traceback" not in done.stderr
    )
    good = [example for example in load_examples(dataset, media) if example.id != "1"]
    rows = prior.load_priors(
        output, good, prior.PriorSettings(frames=8, clip=f"local-dir:{clip_folder}")
    )
    assert rows["0"].scene == [3, 5] and rows["0"].settings["clip"] == f"local-dir:{clip_folder}"
    [error] = [json.loads(line) for line in Path(f"{output}.errors.jsonl").read_text().splitlines()]
    assert error["problem_id"] == "1" and error["media"] == str(media / "text.mp4")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--dataset_name", "absent.json"], "data set absent.json not found"),
        (["--dataset_name", "absent.json", "--frame", "8"], "unrecognized arguments: --frame 8"),
    ],
)
def test_command_line_says_in_a_sentence_what_is_wrong(flags, words):
    done = run(*flags)
    assert (
        done.returncode == 2
        and words in done.stderr.splitlines()[-1]
        and "Traceback" not in done.stderr
    )


def fails(monkeypatch, capsys, *flags):
    """main() in this process with these flags: the last line it says before it exits with 2."""
    monkeypatch.setattr(sys, "argv", ["prior.py", *map(str, flags)])
    with pytest.raises(SystemExit) as exit:
        prior.main()
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_main_refuses(clip_folder, media, tmp_path, monkeypatch, capsys):
    dataset, output = (
        write_dataset(tmp_path / "set.json", media, ["text.mp4", "absent.mp4"]),
        tmp_path / "priors.jsonl",
    )
    known = ["--dataset_name", dataset, "--media_root", media, "--output", output]
    assert "give one of --dataset_name and --video" in fails(monkeypatch, capsys)
    assert "--w_base must be at least 1e-06 and finite" in fails(
        monkeypatch, capsys, *known, "--w_base", 0
    )
    assert "invalid int value: 'many'" in fails(monkeypatch, capsys, *known, "--frames", "many")
    assert "cannot be loaded" in fails(monkeypatch, capsys, *known, "--clip", "ViT-Nothing")
    assert "is the input itself" in fails(monkeypatch, capsys, *known, "--output", dataset)
    assert "is a folder; name a file" in fails(monkeypatch, capsys, *known, "--output", tmp_path)
    below = f"{dataset}/priors.jsonl"
    message = fails(monkeypatch, capsys, *known, "--prior", "no_semantic", "--output", below)
    assert f"{below} cannot be written: File exists" in message
    assert not output.exists()
    assert "none of the 2 examples can be used" in fails(
        monkeypatch, capsys, *known, "--clip", f"local-dir:{clip_folder}", "--workers", 0
    )
    assert not output.exists() and len(load_examples(dataset, media)) == 2


def works(monkeypatch, capsys, *flags, **environment):
    """main() in this process with these flags: what it prints."""
    monkeypatch.setattr(sys, "argv", ["prior.py", *map(str, flags)])
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    prior.main()
    return capsys.readouterr().out


def lines(path):
    return sorted(Path(path).read_text().splitlines())


@pytest.mark.parametrize("text", ['[{"problem_id": 1}]', '{\n "accuracy": 1\n}', "note\nnote\n"])
def test_a_file_of_something_else_stays_as_it_is(text, tmp_path):
    """It would lose its last line, which has no end, and lines that are alike."""
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(DataError, match="report.json is there, but not of this program"):
        workers.ShardedLines(path, 0, 1)
    assert path.read_text() == text


def test_what_cannot_be_written_is_named(tmp_path):
    lines = workers.ShardedLines(tmp_path / "a.jsonl", 0, 1)
    lines.file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(DataError, match="a.jsonl cannot be written: No space left on device$"):
        lines.append([{"row": 1}])
    lines.close()
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder cannot be written: Is a directory$"):
        workers.write_json(tmp_path / "folder", {})


@pytest.fixture
def flags(clip_folder, media, tmp_path):
    """A data set of eleven examples about four media, a third of them unusable, and the flags that
    build its priors here.
    """
    names = [
        "scenes.mp4",
        "short.mp4",
        "picture.png",
        "text.mp4",
        "scenes.mp4",
        "empty.mp4",
        "scenes.mp4",
        "short.mp4",
        "absent.mp4",
        "../outside.mp4",
        "short.mp4",
    ]
    rows = json.loads(write_dataset(tmp_path / "set.json", media, names).read_text())
    questions = [
        "which scene",
        "what",
        "the ball",
        "what",
        "red",
        "what",
        "first red green",
        "blue",
        "what",
        "what",
        "x",
    ]
    for row, question in zip(rows, questions, strict=True):
        row["problem"] = question
    rows[-1]["problem_id"] = 1  # a repeated one
    (tmp_path / "set.json").write_text(json.dumps(rows))
    model = f"local-dir:{clip_folder}"
    return [
        "--dataset_name",
        tmp_path / "set.json",
        "--media_root",
        media,
        "--frames",
        8,
        "--clip",
        model,
        "--workers",
        0,
    ]


def test_every_fault_is_one_line_with_its_cause(clip_folder, media, tmp_path):
    """Real files, worker processes, the command as a user has it."""
    folder = tmp_path / "media"
    folder.mkdir()
    for name in (
        "scenes.mp4",
        "short.mp4",
        "picture.png",
        "text.mp4",
        "empty.mp4",
        "truncated.mp4",
        "text.png",
    ):
        (folder / name).write_bytes((media / name).read_bytes())
    frames = [
        frame
        for picture in pictures()[:3]
        for frame in noisy(picture, 16, np.random.default_rng(0))
    ]
    write_av(folder / "turned.mp4", frames)
    rotate(folder / "turned.mp4")
    write_av(
        folder / "vfr.mp4",
        frames,
        [125 * i if i < 16 else 2000 + 500 * (i - 16) for i in range(48)],
    )
    write_av(folder / "single.mp4", frames[:1])
    write_av(folder / "front.mp4", frames, movflags="faststart")
    front = (folder / "front.mp4").read_bytes()
    (folder / "front.mp4").write_bytes(
        front[: len(front) * 6 // 10]
    )  # its index says 48 frames, half of them are there
    write_av(folder / "rotten.mp4", frames, codec="libx264")
    rotten = bytearray((folder / "rotten.mp4").read_bytes())
    middle = rotten.index(b"mdat") + 1000
    rotten[middle : middle + 4000] = bytes(4000)
    (folder / "rotten.mp4").write_bytes(rotten)
    with av.open(str(folder / "zero.mp4"), "w") as container:  # a video stream without a packet
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
        container.start_encoding()
    with av.open(str(folder / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
        )
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with open(folder / "huge.mp4", "wb") as file:
        file.truncate(5 << 30)  # 5 GB of nothing
    Image.new("1", (14000, 14000)).save(folder / "huge.png")  # 196 million pixels
    (folder / "folder.mp4").mkdir()
    picture = bytearray((folder / "picture.png").read_bytes())
    picture[8:12] = struct.pack(">I", 5)  # the length of the PNG's header
    (folder / "header.png").write_bytes(picture)
    write_video(folder / "thin.mp4", [np.full((2, 1280, 3), 90, np.uint8)] * 5)
    good = [
        "scenes.mp4",
        "short.mp4",
        "picture.png",
        "turned.mp4",
        "vfr.mp4",
        "single.mp4",
        "thin.mp4",
    ]
    bad = {
        "text.mp4": "not a readable video",
        "empty.mp4": "empty file",
        "truncated.mp4": "not a readable video",
        "front.mp4": "not a readable video",
        "rotten.mp4": "damaged video",
        "absent.mp4": "no such file",
        "absent.png": "no such file",
        "folder.mp4": "a folder without pictures",
        "zero.mp4": "not a readable video",
        "audio.mp4": "not a readable video",
        "huge.mp4": "not a readable video",
        "huge.png": "not a readable image",
        "text.png": "not a readable image",
        "header.png": "not a readable image",
        "../scenes.mp4": "outside the media root",
        "/etc/hosts.mp4": "outside the media root",
    }
    names = [*good, *bad]
    dataset = write_dataset(tmp_path / "set.json", folder, [*names, "scenes.mp4"])
    rows = json.loads(dataset.read_text())
    rows[-1]["problem_id"] = 0  # a duplicate of the first
    turns = [
        {"from": "human", "value": "<video>\nWho?"},
        {"from": "gpt", "value": "<think>.</think><answer>A</answer>"},
    ]
    rows += [
        {"problem_id": "two", "video": ["a.mp4", "b.mp4"], "conversations": turns},
        {**rows[0], "problem_id": "list", "path": ["a"]},
        {"problem_id": "none"},
    ]
    dataset.write_text(json.dumps(rows))
    output = tmp_path / "priors.jsonl"
    done = run(
        "--dataset_name",
        dataset,
        "--media_root",
        folder,
        "--output",
        output,
        "--clip",
        f"local-dir:{clip_folder}",
        "--workers",
        2,
        "--decode_timeout",
        60,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (
        f"{len(good)} priors are in {output}; {len(bad) + 4} examples could not be used"
        in done.stdout
    )
    made = {row.media: row for row in prior.read_priors(output)}
    assert sorted(made) == sorted(good) and len(output.read_text().splitlines()) == len(good)
    assert len(made["single.mp4"].frames) == 1 and made["single.mp4"].prior == [1.0]
    errors = [json.loads(line) for line in Path(f"{output}.errors.jsonl").read_text().splitlines()]
    assert len(errors) == len(bad) + 4
    odd = {
        error["problem_id"]: error["cause"]
        for error in errors
        if error["problem_id"] in ("two", "list", "none")
    }
    assert (
        "has 2 videos; one is supported" in odd["two"]
        and "which is not a path" in odd["list"]
        and "has no problem" in odd["none"]
    )
    causes = {
        names[int(error["problem_id"])]: error["cause"]
        for error in errors
        if error["problem_id"] not in odd and "repeats" not in error["cause"]
    }
    assert set(causes) == set(bad)
    for name, words in bad.items():
        assert (
            words in causes[name] and "\n" not in causes[name] and Path(name).name in causes[name]
        ), (name, causes[name])
    [repeated] = [error for error in errors if "repeats" in error["cause"]]
    assert (
        repeated["problem_id"] == "0"
        and f"row {len(names)} repeats the problem_id 0 of row 0" in repeated["cause"]
    )


def test_a_second_run_keeps_the_rows_and_tries_the_broken_again(
    flags, media, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "priors.jsonl"
    assert "6 priors are in" in works(monkeypatch, capsys, *flags, "--output", output)
    first = output.read_text()
    assert sorted(row.problem_id for row in prior.read_priors(output)) == [
        "0",
        "1",
        "2",
        "4",
        "6",
        "7",
    ]
    assert len(lines(f"{output}.errors.jsonl")) == 5
    decoded, read_cues = [], prior.read_cues
    monkeypatch.setattr(
        prior,
        "read_cues",
        lambda medium, *others: (
            decoded.append(Path(medium.path).name) or read_cues(medium, *others)
        ),
    )
    (media / "absent.mp4").write_bytes((media / "short.mp4").read_bytes())  # mended
    try:
        assert "7 priors are in" in works(monkeypatch, capsys, *flags, "--output", output)
    finally:
        (media / "absent.mp4").unlink()
    assert decoded == ["text.mp4", "empty.mp4", "absent.mp4"]
    assert (
        output.read_text().startswith(first)
        and len(lines(output)) == 7
        and len(lines(f"{output}.errors.jsonl")) == 4
    )


@pytest.mark.parametrize("cut", [1, 100, 3000])
def test_a_torn_file_is_continued(flags, tmp_path, monkeypatch, capsys, cut):
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    works(monkeypatch, capsys, *flags, "--output", whole)
    torn.write_bytes(whole.read_bytes()[:-cut])
    assert "6 priors are in" in works(monkeypatch, capsys, *flags, "--output", torn)
    assert lines(torn) == lines(whole)


def test_a_run_of_other_settings_or_data_is_not_continued(flags, tmp_path, monkeypatch, capsys):
    output = tmp_path / "priors.jsonl"
    works(monkeypatch, capsys, *flags, "--output", output)
    before = output.read_text()
    again = [*flags, "--output", output]
    assert "was made with --w_sem 3.0, this run has 5.0" in fails(
        monkeypatch, capsys, *again, "--w_sem", 5
    )
    assert "was made with --scene hsv, this run has content" in fails(
        monkeypatch, capsys, *again, "--scene", "content"
    )
    assert "was made with --clip_pretrained openai, this run has x" in fails(
        monkeypatch, capsys, *again, "--clip_pretrained", "x"
    )
    rows = json.loads((tmp_path / "set.json").read_text())
    rows[0]["problem"] = "another question"
    (tmp_path / "set.json").write_text(json.dumps(rows))
    assert "0 is another question there" in fails(monkeypatch, capsys, *again)
    (tmp_path / "set.json").write_text(json.dumps(rows[1:]))
    assert "0 is another question there" in fails(monkeypatch, capsys, *again)
    assert output.read_text() == before


def ranks(count, flags, output):
    """A run on so many ranks: what they print."""
    return run_script("prior.py", *flags, "--output", output, ranks=count).stdout


def test_several_ranks(flags, tmp_path, monkeypatch, capsys):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "ranks" / "priors.jsonl"
    works(monkeypatch, capsys, *flags, "--output", whole)
    for count in (3, 2):  # anew, and once more when all is done: the broken are tried again
        assert ranks(count, flags, output).count("6 priors are in") == 1
        assert lines(output) == lines(whole) and lines(f"{output}.errors.jsonl") == lines(
            f"{whole}.errors.jsonl"
        )
        assert len(list(output.parent.iterdir())) == 2  # nothing is left aside


def test_ranks_without_a_launcher(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert "start ranks by torchrun or deepspeed" in fails(
        monkeypatch, capsys, *flags, "--output", tmp_path / "priors.jsonl"
    )


@pytest.fixture(scope="session")
def long_run(clip_folder, tmp_path_factory):
    """120 examples about 60 videos and one that is none, and the lines of an undisturbed run."""
    folder, rng = tmp_path_factory.mktemp("long"), np.random.default_rng(0)
    for index in range(60):
        write_video(
            folder / f"{index}.mp4",
            [frame for picture in pictures(index)[:2] for frame in noisy(picture, 40, rng)],
        )
    (folder / "text.mp4").write_text("this is no video")
    dataset = write_dataset(
        folder / "set.json", folder, [f"{index % 60}.mp4" for index in range(120)] + ["text.mp4"]
    )
    flags = ["--dataset_name", str(dataset), "--clip", f"local-dir:{clip_folder}", "--workers", "2"]
    assert run(*flags, "--output", folder / "whole.jsonl").returncode == 0
    return SimpleNamespace(
        flags=flags, whole=folder / "whole.jsonl", size=(folder / "whole.jsonl").stat().st_size
    )


def written(path):
    """Bytes of an output file and its shards."""
    size = 0
    for file in path.parent.glob(f"{path.name}*"):
        if ".errors" in file.name:
            continue
        try:
            size += file.stat().st_size
        except FileNotFoundError:
            pass  # a shard that rank 0 has just joined
    return size


def test_killed_ranks_are_continued(long_run, tmp_path):
    output = tmp_path / "ranks" / "priors.jsonl"
    output.parent.mkdir()
    for count, share in ((2, 0.2), (3, 0.6)):
        script = Script("prior.py", *long_run.flags, "--output", output, ranks=count)
        while written(output) < share * long_run.size and script.poll() is None:
            time.sleep(0.002)
        assert script.poll() is None
        script.kill()
    done = run(*long_run.flags, "--output", output)  # the rest in one process
    assert "120 priors are in" in done.stdout, done.stderr
    assert lines(output) == lines(long_run.whole) and len(lines(output)) == 120
    assert len(lines(f"{output}.errors.jsonl")) == 1 and len(list(output.parent.iterdir())) == 2


def test_killed_at_ten_random_moments(long_run, tmp_path):
    output, rng = tmp_path / "killed.jsonl", np.random.default_rng(0)
    for index, kill in enumerate(
        sorted(rng.random(10))
    ):  # five at a line, five wherever it is then: importing, loading, or at a line
        script = Script("prior.py", *long_run.flags, "--output", output)
        limit = time.monotonic() + (rng.uniform(0, 2) if index % 2 else 100)
        while (
            written(output) < kill * long_run.size * 0.8
            and script.poll() is None
            and time.monotonic() < limit
        ):
            time.sleep(0.002)
        assert script.poll() is None  # it was at work
        script.kill()
    left = len(output.read_bytes().splitlines())
    done = run(*long_run.flags, "--output", output)
    assert 0 < left < 120 and "120 priors are in" in done.stdout
    assert lines(output) == lines(long_run.whole) and len(lines(output)) == 120
    assert (
        lines(f"{output}.errors.jsonl") == lines(f"{long_run.whole}.errors.jsonl")
        and len(lines(f"{output}.errors.jsonl")) == 1
    )


def test_workers_end_with_the_process_they_work_for(tmp_path):
    code = (
        "import multiprocessing, os, signal, sys, time\n"
        "import prior\n"
        "from common.data import Medium\n"
        "def hang(medium, settings, preprocess):\n"
        "    time.sleep(600 if medium.path == 'hang' else 0)\n"
        "prior.read_cues = hang\n"
        "if __name__ == '__main__':\n"
        "    media = [Medium('video', name) for name in ('a', 'hang')]\n"
        "    for medium, found in prior.Pool(1, 300).each(prior.read_cues, media, None, None):\n"
        "        print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)"
    )
    (tmp_path / "hangs.py").write_text(code)
    done = run_script(tmp_path / "hangs.py", check=False)
    assert done.returncode == -signal.SIGKILL
    (worker,) = done.stdout.split()
    end = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < end, "the worker goes on"
        time.sleep(0.02)


def test_frame_sets_give_the_priors_that_they_came_from(clip, media):
    given = [example(media, name) for name in ("scenes.mp4", "short.mp4", "picture.png")]
    made, _ = prior.build_priors(given, clip, arguments())
    for one, row in zip(given, made, strict=True):
        one.extra["frame_sets"] = {
            "uniform": row.frames,
            "scene": [row.frames[position] for position in row.scene],
            "semantic": [row.frames[position] for position in row.semantic],
        }
    found, errors = prior.frame_set_rows(given, arguments())
    assert errors == [] and len(found) == 3
    for row, other in zip(made, found, strict=True):
        assert all(
            getattr(row, key) == getattr(other, key)
            for key in ("problem_id", "frames", "times", "scene", "semantic", "prior", "question")
        )


def test_one_video_is_printed_and_drawn(clip_folder, media, tmp_path, monkeypatch, capsys):
    asked = [
        "--video",
        media / "scenes.mp4",
        "--question",
        "which scene comes first, $5_$ or $6?",
        "--frames",
        8,
    ]
    told = works(
        monkeypatch,
        capsys,
        *asked,
        "--clip",
        f"local-dir:{clip_folder}",
        "--output",
        tmp_path / "prior.png",
    )
    table = [line.split() for line in told.splitlines()[1:9]]
    assert [int(line[0]) for line in table] == [0, 7, 13, 20, 27, 34, 40, 47]
    assert ["*" in line[3] for line in table] == [
        False,
        False,
        False,
        True,
        False,
        True,
        False,
        False,
    ]  # scenes begin at 16 and 32
    picture = np.asarray(Image.open(tmp_path / "prior.png").convert("RGB"))
    colours = [(0, 158, 115), (204, 121, 167), (230, 159, 0)]  # scene cue, semantic cue, P
    areas = [(picture == colour).all(-1).sum() for colour in colours]
    assert picture.shape[1] > 600 and all(area > 500 for area in areas), areas
    works(monkeypatch, capsys, *asked, "--prior", "no_semantic", "--output", tmp_path / "two.svg")
    assert "<!-- semantic cue -->" not in (tmp_path / "two.svg").read_text()
    for bad, words in (
        (["--question", "x"], "give one of"),
        (["--video", "x.mp4"], "--video and --question go together"),
        ([*asked, "--output", "x.txt"], "drawn as .png"),
        ([*asked, "--dataset_name", "x"], "give one of"),
        ([*asked, "--prior", "uniform", "--video", media / "text.mp4"], "not a readable video"),
        ([*asked, "--prior", "uniform", "--output", tmp_path / "no" / "x.png"], "No such file"),
    ):
        assert words in fails(monkeypatch, capsys, *bad)


def test_the_report_about_known_evidence(flags, tmp_path, monkeypatch, capsys):
    rows = json.loads((tmp_path / "set.json").read_text())
    rows[0]["evidence"] = [[2, 4]]  # frames 20 and 27 of 8; a scene begins at 20
    (tmp_path / "set.json").write_text(json.dumps(rows))
    told = works(monkeypatch, capsys, *flags, "--output", tmp_path / "priors.jsonl")
    row = next(row for row in prior.read_priors(tmp_path / "priors.jsonl") if row.problem_id == "0")
    ratio = sum(row.prior[3:5]) / (2 / 8)
    hit = float(bool({3, 4} & set(row.semantic)))
    assert (
        f"1 questions of known evidence, 0 of them without a sampled frame there: {hit:.3f}" in told
        and f"is {ratio:.2f} times uniform's" in told
    )


@pytest.mark.parametrize("allowed, threads", [(1, 1), (2, 2), (8, 3)])
def test_the_semantic_cue_takes_the_threads_that_workers_leave(monkeypatch, allowed, threads):
    """Of 4 cores with 1 worker, 3; fewer where OMP_NUM_THREADS allows fewer."""
    before = torch.get_num_threads()
    monkeypatch.setattr(prior, "cores", lambda: 4)
    monkeypatch.setattr(prior, "load_clip", lambda *names: torch.get_num_threads())
    settings = prior.PriorSettings()
    torch.set_num_threads(allowed)
    try:
        assert prior.load_here(settings, workers=1) == threads
    finally:
        torch.set_num_threads(before)
