"""common/media.py: real videos and images, and the encoder with the toy's processor."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import chat_parts
from PIL import Image
from transformers import Qwen2VLImageProcessor

import prior
import toy
from common import media, video
from common.data import DataError, Example, MediaError, Medium, Prior
from common.media import (
    Encoder,
    PromptFlags,
    load_image,
    read_frames,
    resize_frames,
)
from common.video import open_video

EXAMPLE = Example(
    id="1",
    question="What moves?",
    options=["A. a ball", "B. a car"],
    problem_type="multiple choice",
    answer="A",
    media=[],
)


def write_video(path, count=20, fps=5, size=(48, 64), step=10):
    """Write grey frames whose brightness is 10 + step * index -> the path."""
    brightness = 10 + step * np.arange(count, dtype=np.uint8)
    frames = np.broadcast_to(brightness[:, None, None, None], (count, *size, 3))
    toy.write_video(path, frames, fps)
    return str(path)


# ------------------------------------------------------------ media


def test_uniform_frames_by_hand():
    # linspace(0, 9, 4) = 0 3 6 9; linspace(0, 10, 4) = 0 3.33 6.67 10
    assert prior.uniform_frames(10, 4) == [0, 3, 6, 9]
    assert prior.uniform_frames(11, 4) == [0, 3, 7, 10]
    assert prior.uniform_frames(3, 8) == [0, 1, 2]
    assert prior.uniform_frames(5, 1) == [0]
    assert prior.uniform_frames(64, 16)[-1] == 63


def test_decoded_frames_are_the_asked_ones(tmp_path):
    path = write_video(tmp_path / "a.mp4", count=20, fps=5)
    assert len(open_video(path)) == 20
    for indices in ([0, 7, 13, 19], [19, 3], [5]):
        _, times, frames = read_frames(open_video(path), indices)
        assert frames.shape == (len(indices), 48, 64, 3) and frames.dtype == np.uint8
        assert np.abs(frames.mean((1, 2, 3)) - (10 + 10 * np.array(indices))).max() < 4
        np.testing.assert_allclose(times, np.array(indices) / 5, atol=1e-3)


def test_colours_are_rgb(tmp_path):
    toy.write_video(tmp_path / "red.mp4", np.full((3, 48, 64, 3), (200, 60, 30), np.uint8))
    frame = read_frames(open_video(str(tmp_path / "red.mp4")), [1]).frames[0]
    assert np.abs(frame.mean((0, 1)) - (200, 60, 30)).max() < 8


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        ("missing", "no such file"),
        ("folder", "a folder without pictures"),
        ("empty", "empty file"),
        ("text", "not a readable video"),
        ("picture", "an image where a video was promised"),
        ("truncated", "not a readable video"),
        ("holed", "damaged video"),
    ],
)
def test_an_undecodable_video_is_named(tmp_path, damage, cause):
    path = tmp_path / f"{damage}.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), np.uint8)
    toy.write_video(tmp_path / "good.mp4", noise, fps=5)
    good = (tmp_path / "good.mp4").read_bytes()
    third = len(good) // 3
    Image.fromarray(noise[0]).save(tmp_path / "good.png")
    content = {
        "empty": b"",
        "text": b"this is no video\n" * 50,
        "picture": (tmp_path / "good.png").read_bytes(),
        "truncated": good[: len(good) // 2],
        "holed": good[:third] + bytes(third) + good[2 * third :],
    }
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(content[damage])
    with pytest.raises(MediaError, match=f"{damage}.mp4: {cause}") as caught:
        read_frames(open_video(str(path)), [0, 5, 10, 15, 19])
    message = str(caught.value)
    assert "\n" not in message and ".cc:" not in message, "one sentence, no C++ source path"


def test_an_index_beyond_the_video_is_named(tmp_path):
    path = write_video(tmp_path / "a.mp4", count=6)
    with pytest.raises(MediaError, match="a.mp4.*frames 0 to 6 asked for, the video has 0 to 5"):
        read_frames(open_video(path), [0, 6])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_load_image(tmp_path, mode):
    Image.new("RGB", (30, 20), (200, 60, 20)).convert(mode).save(tmp_path / "a.png")
    image = load_image(str(tmp_path / "a.png"))
    assert image.shape == (1, 20, 30, 3) and image.dtype == np.uint8
    if mode in ("RGB", "RGBA"):
        assert (image == (200, 60, 20)).all()


def test_pictures_are_read_as_a_viewer_shows_them(tmp_path):
    def load(image, name="a.png", **options):
        image.save(tmp_path / name, **options)
        return load_image(str(tmp_path / name))[0]

    # Orientation 6: the camera's left edge is the upper one.
    left = np.zeros((16, 32, 3), np.uint8)
    left[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = load(Image.fromarray(left), "a.jpg", exif=exif)
    assert turned.shape == (32, 16, 3)
    assert turned[:14].min() > 240 and turned[18:].max() < 15
    # Transparency is white, half of it half.
    clear = load(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    half = load(Image.new("LA", (4, 4), (0, 128)))
    assert (clear == 255).all() and (half == 127).all()
    palette = Image.new("P", (4, 4))
    assert (load(palette, transparency=0) == 255).all()
    # 16 bits and floats have their whole range.
    deep = load(Image.fromarray(np.array([[0, 32896, 65535]], np.uint16)))
    assert deep[0, :, 0].tolist() == [0, 128, 255]
    real = load(Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)), "a.tif")
    assert real[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


def test_pictures_have_bounds_of_their_own(tmp_path, toy_processor):
    Image.new("RGB", (280, 280)).save(tmp_path / "a.png")
    Image.new("RGB", (56, 56)).save(tmp_path / "small.png")
    write_video(tmp_path / "v.mp4", size=(56, 56))

    def grid(kind, name, **bounds):
        example = replace(EXAMPLE, media=[Medium(kind, str(tmp_path / name))])
        flags = PromptFlags(min_pixels=112 * 112, max_pixels=112 * 112, frames=4, **bounds)
        encoder = Encoder(toy_processor, flags)
        return encoder.encode(example).grid_thw.flatten().tolist()

    assert grid("image", "a.png") == [1, 8, 8]  # 112 pixels are 8 patches
    assert grid("image", "a.png", image_max_pixels=280 * 280) == [1, 20, 20]
    assert grid("image", "small.png") == [1, 4, 4]  # not scaled up
    assert grid("video", "v.mp4", image_max_pixels=280 * 280) == [2, 8, 8]  # scaled up


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated"])
def test_an_undecodable_image_is_named(tmp_path, damage):
    path = tmp_path / f"{damage}.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(
        tmp_path / "good.png"
    )
    good = (tmp_path / "good.png").read_bytes()
    if damage != "missing":
        path.write_bytes(
            {"empty": b"", "text": b"no image", "truncated": good[: len(good) // 2]}[damage]
        )
    with pytest.raises(MediaError, match=f"{damage}.png"):
        load_image(str(path))


def test_resize_frames_by_hand():
    frames = np.full((2, 100, 200, 3), 77, np.uint8)
    # 100x200 -> multiples of 28: 112x196 = 21952 px, within the limits
    assert resize_frames(frames, 28 * 28, 10**6).shape == (2, 3, 112, 196)
    # at most 10 * 784 px = 7840: shrink by sqrt(20000 / 7840) = 1.597
    # -> 62.6 x 125.2, floored to 56 x 112
    assert resize_frames(frames, 28 * 28, 10 * 784).shape == (2, 3, 56, 112)
    # at least 60 * 784 px = 47040: grow by sqrt(47040 / 20000) = 1.534
    # -> 153.4 x 306.7, ceiled to 168 x 308
    assert resize_frames(frames, 60 * 784, 10**6).shape == (2, 3, 168, 308)
    resized = resize_frames(frames, 28 * 28, 10**6)
    assert resized.dtype == torch.uint8 and (resized == 77).all()


def test_resize_frames_keeps_places_and_channels():
    frames = np.zeros((1, 56, 56, 3), np.uint8)
    frames[0, :28, :, 0] = 255  # the upper half is red
    pixels = resize_frames(frames, 112 * 112, 112 * 112)[0].float()
    assert pixels.shape == (3, 112, 112)
    assert pixels[0, :50].min() > 240 and pixels[0, 62:].max() < 15 and pixels[1:].max() == 0


@pytest.mark.parametrize("most", [40, 400])
def test_frames_are_resized_as_by_the_model_s_own_processor(most):
    """Shrunk and enlarged: pixel by pixel what Qwen2-VL's processor makes of the same picture."""
    picture = np.random.default_rng(0).integers(0, 256, (250, 400, 3), np.uint8)
    own = Qwen2VLImageProcessor()
    size = {"shortest_edge": most * 700, "longest_edge": most * 784}
    theirs = own(images=[picture], size=size, return_tensors="pt")
    ours = resize_frames(picture[None], most * 700, most * 784)
    again = own(images=[ours[0]], do_resize=False, return_tensors="pt")
    assert (theirs["image_grid_thw"] == again["image_grid_thw"]).all()
    assert torch.equal(theirs["pixel_values"], again["pixel_values"])


def test_an_image_that_cannot_be_resized_is_a_media_error(tmp_path, toy_processor):
    Image.new("RGB", (4000, 10)).save(
        tmp_path / "strip.png"
    )  # aspect 400; Qwen's smart_resize refuses over 200
    example = Example(
        "1", "What?", [], "free-form", "x", [Medium("image", str(tmp_path / "strip.png"))]
    )
    with pytest.raises(MediaError, match="strip.png"):
        Encoder(toy_processor, PromptFlags(min_pixels=784, max_pixels=4 * 784)).encode(example)


# ------------------------------------------------------------ encoder


def encoder_of(processor, cache_gb=1.0, **settings):
    flags = PromptFlags(min_pixels=56 * 56, max_pixels=56 * 56, frames=4, **settings)
    return Encoder(processor, flags, cache_gb)


def prior_of(frames, times):
    prior = [1 / len(frames)] * len(frames)
    return Prior(problem_id="v", frames=frames, times=times, prior=prior)


def brightness(item, processor):
    """(frames,) 0-255 from the processor's normalised patches.

    A row of pixel_values is (channel 3, time 2, 14, 14).
    """
    slots = int(item.grid_thw[:, 0].sum())
    mean = torch.tensor(processor.video_processor.image_mean).view(1, 1, 3, 1)
    std = torch.tensor(processor.video_processor.image_std).view(1, 1, 3, 1)
    values = item.pixel_values.view(slots, -1, 3, 2, 14 * 14).mean(-1)  # (slots, patches, 3, 2)
    return (255 * (values * std + mean).mean((1, 2))).flatten()


@pytest.fixture
def video_example(tmp_path):
    path = write_video(tmp_path / "v.mp4", size=(56, 56))
    return replace(EXAMPLE, id="v", media=[Medium("video", path)])


@pytest.fixture
def image_example(tmp_path):
    Image.new("RGB", (56, 56), (200, 60, 20)).save(tmp_path / "i.png")
    return replace(EXAMPLE, id="i", media=[Medium("image", str(tmp_path / "i.png"))])


def test_encode_video(video_example, toy_processor):
    item = encoder_of(toy_processor).encode(video_example)
    # frames 0 6 13 19 (linspace 0..19), brightness 10 + 10 i, 5 frames a second
    np.testing.assert_allclose(brightness(item, toy_processor), [10, 70, 140, 200], atol=4)
    np.testing.assert_allclose(item.times, [0, 1.2, 2.6, 3.8], atol=1e-3)
    assert item.grid_thw.tolist() == [[2, 4, 4]]
    assert item.pixel_values.shape == (32, 3 * 2 * 14 * 14)
    assert item.second_per_grid == pytest.approx(2 * 3.8 / 3)  # 2 frames a slot, 3 steps in 3.8 s
    ids = item.input_ids.tolist()
    assert ids.count(toy_processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")) == 2 * 2 * 2
    text = "".join(chat_parts(toy_processor, video_example))
    text = text.replace("<|video_pad|>", "<|video_pad|>" * 8)
    assert ids == toy_processor.tokenizer(text).input_ids


def test_encode_uses_the_priors_frames(video_example, toy_processor):
    item = encoder_of(toy_processor).encode(video_example, prior_of([2, 4, 10], [0.4, 0.8, 2.0]))
    # the last frame fills its slot
    np.testing.assert_allclose(brightness(item, toy_processor), [30, 50, 110, 110], atol=4)
    assert len(item.times) == 3


def test_encode_image_and_text(image_example, toy_processor):
    tokenizer = toy_processor.tokenizer
    encoder = encoder_of(toy_processor)
    item = encoder.encode(image_example)
    assert item.grid_thw.tolist() == [[1, 4, 4]] and item.times == [0.0]
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert item.input_ids.tolist().count(pad) == 4
    np.testing.assert_allclose(brightness(item, toy_processor), [(200 + 60 + 20) / 3] * 2, atol=2)
    text = encoder.encode(EXAMPLE)
    assert text.pixel_values is None and text.grid_thw is None and text.times == []
    whole = "".join(chat_parts(toy_processor, EXAMPLE))
    assert text.input_ids.tolist() == tokenizer(whole).input_ids


def assert_same(one, other):
    for name in ("input_ids", "pixel_values", "grid_thw"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert one.times == other.times
    assert one.second_per_grid == other.second_per_grid


def test_cache_gives_the_same_and_reads_the_file_once(
    video_example, image_example, toy_processor, monkeypatch
):
    opened = []

    def open_and_count(path, *settings):
        opened.append(path)
        return open_video(path, *settings)

    monkeypatch.setattr(video, "open_video", open_and_count)
    encoder = encoder_of(toy_processor)
    for example in (video_example, image_example):
        first = encoder.encode(example)
        assert_same(first, encoder.encode(example))
        assert_same(first, encoder_of(toy_processor).encode(example))
    assert len(opened) == 2  # one for the cache, one for the fresh encoder


def test_questions_of_one_video_share_its_frames_not_its_prompt(video_example, toy_processor):
    encoder = encoder_of(toy_processor)
    other = replace(video_example, id="w", question="What stands still?")
    for example in (video_example, other) * 2:
        assert_same(encoder.encode(example), encoder_of(toy_processor).encode(example))


def test_examples_of_two_files_may_share_an_id(video_example, toy_processor, tmp_path):
    """train.py encodes training and held-out questions with one encoder.

    Rows without problem_id are '0', '1', ... in every file.
    """
    encoder = encoder_of(toy_processor)
    path = write_video(tmp_path / "w.mp4", size=(56, 56))
    other = replace(video_example, question="What stands still?", media=[Medium("video", path)])
    for example, word in ((video_example, "moves"), (other, "still"), (video_example, "moves")):
        assert word in toy_processor.tokenizer.decode(encoder.encode(example).input_ids)


def bytes_held(medium):
    total = 0
    for value in (*vars(medium).values(), *vars(medium.inputs).values()):
        if torch.is_tensor(value):
            total += value.numel() * value.element_size()
    return total


def test_eviction_keeps_within_the_limit_and_stays_right(tmp_path, toy_processor):
    examples = []
    for index in range(3):
        path = write_video(tmp_path / f"{index}.mp4", step=index + 1, size=(56, 56))
        examples.append(replace(EXAMPLE, id=path, media=[Medium("video", path)]))
    # a video: 4 frames of 3 x 56 x 56 = 37,632 bytes, and as float32 patches four times that:
    # 188,160; two fit into 400 kB
    encoder = encoder_of(toy_processor, cache_gb=400e3 / 1e9)
    expected = [encoder_of(toy_processor).encode(example).pixel_values for example in examples]
    for index in (0, 1, 2, 0, 2, 1):
        assert torch.equal(encoder.encode(examples[index]).pixel_values, expected[index])
    assert len(encoder.media) == 2
    assert sum(map(bytes_held, encoder.media.values())) <= 400e3
    # the one used longest ago was dropped
    assert [medium for medium, _ in encoder.media] == [examples[2].video, examples[1].video]


@pytest.mark.parametrize("kind", ["video", "image"])
def test_cache_counts_what_it_holds(video_example, image_example, toy_processor, kind):
    encoder = encoder_of(toy_processor)
    encoder.encode(video_example if kind == "video" else image_example)
    (medium,) = encoder.media.values()
    assert 0.99 * bytes_held(medium) <= medium.nbytes <= 1.5 * bytes_held(medium)


def test_shuffle_permutes_frames_and_leaves_the_rest(video_example, toy_processor):
    permutation = [2, 0, 3, 1]
    encoder = encoder_of(toy_processor)
    plain = encoder.encode(video_example)
    shuffled = encoder.encode(video_example, shuffle=permutation)
    np.testing.assert_allclose(brightness(shuffled, toy_processor), [140, 10, 200, 70], atol=4)
    assert_same(plain, replace(shuffled, pixel_values=plain.pixel_values))
    assert_same(plain, encoder.encode(video_example))  # the cache is untouched
    assert_same(shuffled, encoder_of(toy_processor).encode(video_example, shuffle=permutation))


def test_black_frames_keep_the_rest(video_example, image_example, toy_processor):
    encoder = encoder_of(toy_processor)
    for example in (video_example, image_example):
        plain = encoder.encode(example)
        black = encoder.encode(example, black=True)
        assert brightness(black, toy_processor).abs().max() < 1e-3
        assert_same(plain, replace(black, pixel_values=plain.pixel_values))
        assert_same(plain, encoder.encode(example))  # the cache is untouched


@pytest.mark.parametrize("warm", [False, True])
def test_a_prior_made_for_other_frames_is_an_error(video_example, toy_processor, warm):
    encoder = encoder_of(toy_processor)
    right = prior_of([0, 6, 13, 19], [0.0, 1.2, 2.6, 3.8])
    wrong = prior_of([0, 6, 13, 19], [0.0, 2.4, 5.2, 7.6])  # of a video with half the rate
    if warm:
        encoder.encode(video_example, right)
    with pytest.raises(DataError, match="v.mp4.*prior"):
        encoder.encode(video_example, wrong)


def test_a_prior_of_other_frames_than_the_cached_ones_is_decoded(video_example, toy_processor):
    """The model sees the frames of the prior, in whatever order they are asked for."""
    encoder = encoder_of(toy_processor)
    encoder.encode(video_example)  # SFT encodes without priors: 0 6 13 19
    item = encoder.encode(video_example, prior_of([1, 3, 5, 7], [0.2, 0.6, 1.0, 1.4]))
    np.testing.assert_allclose(item.times, [0.2, 0.6, 1.0, 1.4], atol=1e-3)
    np.testing.assert_allclose(brightness(item, toy_processor), [20, 40, 60, 80], atol=4)


def test_a_broken_video_is_not_cached(tmp_path, toy_processor):
    encoder = encoder_of(toy_processor)
    example = replace(EXAMPLE, media=[Medium("video", str(tmp_path / "late.mp4"))])
    with pytest.raises(MediaError, match="late.mp4"):
        encoder.encode(example)
    write_video(tmp_path / "late.mp4")
    assert encoder.encode(example).grid_thw is not None


def test_frame_times_are_shown_as_text_or_drawn(video_example, toy_processor):
    row = prior_of([0, 12, 19], [0.0, 2.4, 3.8])
    encoders = {
        name: encoder_of(toy_processor, frame_times=name) for name in ("none", "text", "drawn")
    }
    items = {name: encoder.encode(video_example, row) for name, encoder in encoders.items()}
    prompt = toy_processor.tokenizer.decode(items["text"].input_ids)
    assert "The frames were taken at 00:00, 00:02, 00:03.\nWhat moves?" in prompt
    assert torch.equal(items["text"].pixel_values, items["none"].pixel_values)
    assert torch.equal(items["drawn"].input_ids, items["none"].input_ids)
    assert not torch.equal(items["drawn"].pixel_values, items["none"].pixel_values)
    # a control's frames change places, the times on them do not
    medium = encoders["drawn"].load(video_example.video, row)
    shuffled = encoders["drawn"].encode(video_example, row, shuffle=[2, 0, 1])
    frames = media.draw_times(medium.frames[[2, 0, 1]], row.times)
    before = "x<|vision_start|><|video_pad|><|vision_end|>"
    expected = encoders["none"].process(before, [replace(medium, frames=frames)])
    assert torch.equal(shuffled.pixel_values, expected.pixel_values)


def test_drawn_times_stand_in_the_corner_of_their_own_frame():
    frames = torch.full((2, 3, 200, 300), 90, dtype=torch.uint8)
    one, two = media.draw_times(frames, [5.0, 65.9])
    assert (
        media.clock(65.9) == "01:05"
        and media.clock(3599.9) == "59:59"
        and media.clock(6000) == "100:00"
    )
    assert (frames == 90).all() and not torch.equal(one, two)  # the input stays as it is
    for frame in (one, two):
        assert (
            frame[:, :40, :110].max() > 250
            and frame[:, :40, :110].min() == 0
            and (frame[:, :2, :2] == 0).all()
        )
        assert (frame[:, 40:] == 90).all() and (frame[:, :, 110:] == 90).all()
