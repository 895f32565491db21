"""Several media in one prompt: pictures, a video between them, folders of frames."""

import base64
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL_GRPO, banned_ids, chat_parts, hf_inputs, launch, metrics, video_row
from PIL import Image

import evaluate
import reward
from common.data import Medium, load_examples
from common.media import Encoder, PromptFlags, read_frames
from common.policy import Policy, collate
from common.rollout import Sampling, rollout
from common.video import open_video
from grpo import rollout_frame_use

FRAMES = [0, 10, 20, 30, 40, 50]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two pictures of noise: (patches of height, width) are (4, 4) and (4, 8)."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    media = []
    for name, size in (("a", (56, 56)), ("b", (56, 112))):
        path = folder / f"{name}.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        media.append(Medium("image", str(path)))
    return media


@pytest.fixture(scope="module")
def video(toy_folder):
    """An example about one video."""
    examples = load_examples(toy_folder / "train_cot.json")
    return next(example for example in examples if example.video)


@pytest.fixture(scope="module")
def mixed(video, pictures):
    """The same question, with a picture before the video and one behind it."""
    return replace(video, media=[pictures[0], video.video, pictures[1]])


@pytest.fixture
def encoder(toy_processor):
    return Encoder(toy_processor, PromptFlags(min_pixels=56 * 56, max_pixels=56 * 112))


def parts(item):
    """Pixels of each medium."""
    return item.pixel_values.split(item.grid_thw.prod(1).tolist())


def test_media_stand_in_their_order(encoder, toy_processor, video, mixed, pictures):
    item = encoder.encode(mixed, video_row(FRAMES))
    assert item.kinds == ["image", "video", "image"] and item.slots == 3
    alone = [encoder.encode(replace(mixed, media=[one])) for one in pictures]
    alone.insert(1, encoder.encode(video, video_row(FRAMES)))
    for own, single in zip(parts(item), alone, strict=True):
        assert torch.equal(own, single.pixel_values)
    assert item.grid_thw.tolist() == [single.grid_thw[0].tolist() for single in alone]
    assert (item.times, item.second_per_grid) == (alone[1].times, alone[1].second_per_grid)
    # The tokenizer reads the whole prompt as one text.
    before, question, after = chat_parts(toy_processor, mixed)
    for kind, single in zip(item.kinds, alone, strict=True):
        count = int(single.grid_thw.prod()) // 4
        before = before.replace(f"<|{kind}_pad|>", "<|pad|>" * count, 1)
        before = before.replace("<|pad|>", f"<{kind}>")
    before = before.replace("<image>", "<|image_pad|>").replace("<video>", "<|video_pad|>")
    tokenizer = toy_processor.tokenizer
    assert item.input_ids.tolist() == tokenizer(before + question + after).input_ids
    assert item.shared == len(tokenizer(before).input_ids)


def test_controls_are_about_the_video(encoder, mixed, pictures):
    plain = encoder.encode(mixed, video_row(FRAMES))
    shuffled = encoder.encode(mixed, video_row(FRAMES), shuffle=[5, 4, 3, 2, 1, 0])
    black = encoder.encode(mixed, video_row(FRAMES), black=True)
    for control in (shuffled, black):
        same = map(torch.equal, parts(control), parts(plain))
        assert list(same) == [True, False, True]
        assert torch.equal(control.input_ids, plain.input_ids) and control.times == plain.times
    # Without a video the pictures are black.
    two = replace(mixed, media=pictures)
    colours = encoder.encode(two).pixel_values.unique()
    assert len(colours) > 100 and len(encoder.encode(two, black=True).pixel_values.unique()) == 3


@pytest.fixture
def batch(encoder, mixed, pictures, items, talker):
    """Items of a mixture, and completions of two each."""
    mixture = [
        encoder.encode(mixed, video_row(FRAMES)),
        items[3],
        encoder.encode(replace(mixed, media=pictures)),
        items[1],
        items[2],
    ]
    generator = torch.Generator().manual_seed(0)
    completions = torch.randint(40, 90, (len(mixture), 2, 5), generator=generator)
    return mixture, completions


def test_forwards_agree_with_plain_transformers(batch, talker):
    mixture, completions = batch
    prompts = collate(mixture, talker)
    assert prompts.slots == [3, 0, 1, 1, 3] and prompts.media == [3, 0, 2, 1, 1]
    everything = torch.ones_like(completions, dtype=torch.bool)
    for row, item in enumerate(mixture):
        for number, completion in enumerate(completions[row]):
            with torch.no_grad():
                output = talker(**hf_inputs(item, talker, completion))
            logp = output.logits[0, -6:-1].log_softmax(-1)
            expected = logp.gather(-1, completion[:, None]).squeeze(-1)
            for packed in (True, False):
                with torch.no_grad():
                    scored = Policy(talker)(prompts, completions, everything, packed=packed)
                torch.testing.assert_close(scored.logp[row, number], expected, atol=5e-5, rtol=0)


def test_rollouts_have_the_log_probs_of_the_forward(batch, talker):
    mixture, _ = batch
    prompts = collate(mixture, talker)
    settings = Sampling(5, banned_ids=banned_ids(talker))
    samples = rollout(talker, prompts, [1] * len(mixture), range(len(mixture)), settings)
    scored = Policy(talker)(prompts, samples.tokens[:, None], samples.mask[:, None])
    logp = scored.logp[:, 0] * samples.mask
    torch.testing.assert_close(samples.logp, logp, atol=5e-5, rtol=0)


def test_other_families_take_several_pictures(other_family, encoder, mixed, pictures):
    model, items = other_family
    pair = encoder.encode(replace(mixed, media=pictures))
    mixture = [pair, items[1], items[2]]
    completions = torch.randint(40, 90, (3, 1, 4), generator=torch.Generator().manual_seed(0))
    everything = torch.ones_like(completions, dtype=torch.bool)
    with torch.no_grad():
        scored = Policy(model)(collate(mixture, model), completions, everything)
        output = model(**hf_inputs(pair, model, completions[0, 0]))
    logp = output.logits[0, -5:-1].log_softmax(-1)
    expected = logp.gather(-1, completions[0, 0][:, None]).squeeze(-1)
    torch.testing.assert_close(scored.logp[0, 0], expected, atol=2e-5, rtol=0)


def test_frame_use_is_over_the_video_s_slots(batch, talker):
    mixture, completions = batch
    prompts = collate(mixture, talker)
    mask = torch.ones_like(completions, dtype=torch.bool)
    width = prompts.input_ids.shape[1]
    hidden = torch.randn(len(mixture), width + 10, 8, generator=torch.Generator().manual_seed(1))
    attention = torch.rand(len(mixture), 2, 5, width, generator=torch.Generator().manual_seed(2))
    token = talker.config.video_token_id
    columns = (prompts.input_ids[0] == token).nonzero().squeeze(1)
    frames = reward.pool_frames(hidden[0, columns].unflatten(0, (3, -1)))
    uses = rollout_frame_use(prompts, mask, hidden)
    expected = reward.frame_use(hidden[0, width : width + 5], frames)
    torch.testing.assert_close(uses[0][0], expected)
    looked = rollout_frame_use(prompts, mask, attention=attention)
    share = attention[0, 1][:, columns].unflatten(1, (3, -1)).sum((0, 2))
    torch.testing.assert_close(looked[0][1], share / share.sum())
    # Nothing to choose among pictures or text.
    assert uses[1:4] == [[None, None]] * 3


def picture_of(part):
    """Pixels of an image part of a message."""
    data = part["image_url"]["url"].partition("base64,")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_a_server_gets_all_media_in_order(mixed, pictures, tmp_path):
    settings = dict(model_name_or_path="m", dataset_name="d.json", api_base="http://localhost")
    settings |= dict(min_pixels=56 * 56, max_pixels=56 * 112, frames=4)

    def content(example, **more):
        arguments = evaluate.EvaluateArguments(**settings, **more)
        (message,) = evaluate.make_messages(arguments, example, 0)
        assert message["content"][-1]["text"].startswith(example.question)
        return message["content"][:-1]

    for control in ("none", "shuffled", "black"):
        shown = [picture_of(part) for part in content(mixed, control=control)]
        assert len(shown) == 6
        for place, picture in ((0, pictures[0]), (-1, pictures[1])):
            np.testing.assert_array_equal(shown[place], np.asarray(Image.open(picture.path)))
        assert (shown[1].max() == 0) == (control == "black")
    kinds = [part["type"] for part in content(mixed, api_media="video")]
    assert kinds == ["image_url", "video_url", "image_url"]
    # A whole file would show more than the span.
    span = replace(mixed, media=[replace(mixed.video, end=2.0), pictures[0]])
    assert [part["type"] for part in content(span, api_media="video")] == ["image_url"] * 5


def test_two_ranks_equal_one_on_a_mixture(small_toy, first_run, tmp_path, pictures):
    """Text, a picture, two pictures, a video with a picture, a folder of frames, a span."""
    shutil.copytree(small_toy, tmp_path / "media")
    for medium in pictures:
        shutil.copy(medium.path, tmp_path / "media")
    rows = json.loads((small_toy / "train.json").read_text())
    rows = [row for row in rows if row["data_type"] == "video" and row["options"]][:6]
    (tmp_path / "media" / "frames").mkdir()
    _, _, frames = read_frames(open_video(str(small_toy / rows[4]["path"])), list(range(0, 48, 4)))
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "media" / "frames" / f"{number}.png")
    a = {"data_type": "image", "path": "a.png"}
    b = {"data_type": "image", "path": "b.png"}
    clips = [{"data_type": "video", "path": row["path"]} for row in rows]
    media = [[], [a], [a, b], [b, clips[3], a], None, [{**clips[5], "start": 1, "end": 6}, a]]
    rows[0] |= {"data_type": "text"}
    rows[4] |= {"data_type": "frame", "path": "frames"}
    for number, shown in enumerate(media):
        rows[number] |= {"problem_id": str(number), "media": shown}
    (tmp_path / "media" / "data.json").write_text(json.dumps(rows))
    flags = ["--dataset_name", tmp_path / "media" / "data.json", *SMALL_GRPO, "--max_steps", 1]
    flags += ["--model_name_or_path", first_run[0] / "sft", "--stage", "grpo", "--save_steps", 0]
    flags += ["--min_pixels", 3136, "--max_pixels", 6272, "--prior", "no_semantic"]
    flags += ["--frames", 8, "--decode_workers", 0, "--gradient_accumulation_steps", 3]
    launch(*flags, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", 2)
    launch(*flags, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", 1, ranks=2)
    (one,) = metrics(tmp_path / "one", "grpo")
    (two,) = metrics(tmp_path / "two", "grpo")
    assert one["data/skipped"] == 0 and one["loss/grad_norm"] > 1e-3
    for name in ("loss/policy", "reward/total", "consensus/score", "loss/grad_norm"):
        assert one[name] == pytest.approx(two[name], abs=1e-4), name
    lines = (tmp_path / "two" / "priors_training.jsonl").read_text().splitlines()
    priors = {row["problem_id"]: row for row in map(json.loads, lines)}
    assert sorted(priors) == ["1", "2", "3", "4", "5"]
    # 3 frames a second of the folder, seconds 1 to 6 of the span.
    assert priors["4"]["times"][-1] == pytest.approx(11 / 3, abs=1e-3)
    assert priors["3"]["media"] == clips[3]["path"] and len(priors["5"]["frames"]) == 8
