"""visualize.py sample: what it draws are the numbers of the method, recomputed here with transformers alone; the page; bad input."""

import base64
import html
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoModelForImageTextToText

import reward
import visualize
from common import look
from common.data import Example, load_examples
from common.media import Encoder
from common.plots import SHEETS

ROOT = Path(__file__).resolve().parents[1]
QUESTION = [
    "--question",
    "What colour are the balls in the plain scene?",
    "--options",
    "A. red",
    "B. <b>blue & 'x'",
]
SIDE = ["--min_pixels", "3136", "--max_pixels", "3136"]


def arguments(checkpoint, **more):
    return visualize.SampleArguments(
        **{
            "model_name_or_path": str(checkpoint),
            "video": "v.mp4",
            "question": "q",
            "min_pixels": 3136,
            "max_pixels": 3136,
            "max_completion_length": 12,
            **more,
        }
    )


def test_patch_contributions_by_hand():
    """Two channels, one slot of two patches, one response direction (0.6, 0.8)."""
    response, patches = torch.tensor([[3.0, 4.0]]), torch.tensor([[[4.0, -1.0], [0.0, 3.0]]])
    # max: f = (4, 3), |f| = 5; patch 0 owns channel 0: 0.6 * 4 / 5, patch 1 channel 1: 0.8 * 3 / 5
    torch.testing.assert_close(
        look.patch_contributions(response, patches, "max"), torch.tensor([[0.48, 0.48]])
    )
    # mean: f = (2, 1), |f| = sqrt 5; half of each patch: (0.6 * 4 - 0.8) / 2, 0.8 * 3 / 2
    torch.testing.assert_close(
        look.patch_contributions(response, patches, "mean"), torch.tensor([[0.8, 1.2]]) / 5**0.5
    )


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_patch_contributions_sum_to_the_score(pool):
    generator = torch.Generator().manual_seed(0)
    response, patches = (
        torch.randn(7, 16, generator=generator),
        torch.randn(3, 5, 16, generator=generator),
    )
    cosines = torch.cosine_similarity(
        response[:, None], reward.pool_frames(patches, pool)[None], dim=-1
    )  # (L, t)
    torch.testing.assert_close(
        look.patch_contributions(response, patches, pool).sum(1), cosines.mean(0)
    )


def test_token_pieces_keep_whole_characters(toy_processor):
    text = "é→ red 你好 <answer>A"
    ids = toy_processor.tokenizer(text)["input_ids"]
    pieces = look.token_pieces(ids, toy_processor.tokenizer)
    assert (
        len(pieces) == len(ids)
        and "".join(pieces) == text
        and "\ufffd" not in text
        and "" in pieces
    )  # é is two byte tokens
    assert (
        "".join(look.token_pieces(ids[:1], toy_processor.tokenizer)) == "\ufffd"
    )  # cut within a character: shown, not swallowed


def test_look_equals_plain_transformers(checkpoint, toy_folder, toy_processor):
    video = next(
        example
        for example in load_examples(toy_folder / "train_cot.json")
        if example.media_type == "video"
    )
    example = Example("0", "q", [], "free-form", "", video.media, "video")
    row = {
        "frames": [0, 9, 20, 31, 42, 53, 60],
        "times": [index / 4 for index in (0, 9, 20, 31, 42, 53, 60)],
    }  # 7 frames, 4 slots
    one = look.look(
        arguments(checkpoint, hidden_layer=3, attention_layer=2), "m", str(checkpoint), example, row
    )

    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, attn_implementation="eager"
    ).eval()
    item = Encoder(toy_processor, 3136, 3136).encode(example, row)
    ids, banned = (
        item["input_ids"],
        [
            model.config.image_token_id,
            model.config.video_token_id,
            model.config.vision_start_token_id,
            model.config.vision_end_token_id,
        ],
    )
    inputs = {
        "pixel_values_videos": item["pixel_values"],
        "video_grid_thw": item["grid_thw"][None],
        "second_per_grid_ts": torch.tensor([item["second_per_grid"]]),
    }
    kinds = lambda ids: 2 * (ids == model.config.video_token_id).int()[None]  # noqa: E731
    with torch.no_grad():
        for _ in range(12):
            output = model(input_ids=ids[None], mm_token_type_ids=kinds(ids), **inputs)
            ids = torch.cat(
                [
                    ids,
                    output.logits[0, -1]
                    .index_fill(0, torch.tensor(banned), -torch.inf)
                    .argmax()[None],
                ]
            )
        output = model(
            input_ids=ids[None],
            mm_token_type_ids=kinds(ids),
            output_hidden_states=True,
            output_attentions=True,
            **inputs,
        )
    assert (
        one.text
        == toy_processor.tokenizer.decode(ids[-12:], skip_special_tokens=True)
        == "".join(one.pieces)
    )
    visual, states = (
        (ids == model.config.video_token_id).nonzero()[:, 0],
        output.hidden_states[3][0],
    )
    assert len(visual) == 4 * 4
    for pool in ("max", "mean"):
        frames = reward.pool_frames(states[visual].view(4, 4, -1), pool)
        cosines = torch.cosine_similarity(states[-12:][:, None], frames[None], dim=-1)
        torch.testing.assert_close(one.tokens[pool], cosines, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.maps[pool].sum((1, 2)), cosines.mean(0), atol=1e-5, rtol=0)
        for tau in (0.1, 1.0):
            torch.testing.assert_close(
                one.uses[pool, tau], torch.softmax(cosines.mean(0) / tau, 0), atol=1e-5, rtol=0
            )
    weights = (
        output.attentions[1][0].mean(0)[-12:][:, visual].view(12, 4, 2, 2)
    )  # (L, t, h, w) of the second layer
    torch.testing.assert_close(one.maps["attention"], weights.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(one.tokens["attention"], weights.sum((2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        one.uses["attention", None], weights.sum((0, 2, 3)) / weights.sum(), atol=1e-5, rtol=0
    )


def fake_look(name, text, use, pieces=("a", "b")):
    uses = {(pool, tau): torch.tensor(use) for pool in ("max", "mean") for tau in (0.1, 1.0)}
    each = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    return look.Look(
        name,
        text,
        list(pieces),
        uses,
        {"max": each},
        {"max": torch.tensor([[[0.0, 1.0]], [[0.5, 0.25]]])},
    )


def test_reward_rows_by_hand():
    """P (0.1, 0.1, 0.6, 0.2) over 4 frames is (0.2, 0.8) over 2 slots; use (0.25, 0.75): R_cf = 0.05 + 0.6 = 0.65."""
    row = {"prior": [0.1, 0.1, 0.6, 0.2], "times": [0.0, 1.0, 2.0, 3.0]}
    right = fake_look("r", "<think>x</think><answer>B</answer>", [0.25, 0.75])
    wrong = fake_look(
        "w", "<answer>A</answer>", [0.75, 0.25]
    )  # R_cf = 0.15 + 0.2; no think block: no format reward
    example = Example("0", "q", ["A. x", "B. y"], "multiple choice", "B", "", "video")
    flags = SimpleNamespace(
        hidden_layer=-1, attention_layer=1, cfr_weight=3.0, max_completion_length=9
    )
    told = {name: cells for name, *cells in look.reward_rows(flags, example, row, [right, wrong])}
    assert told["R_cf, max pooling, τ = 0.1 (the paper's)"] == ["0.650", "0.350"] and told[
        "answer"
    ] == ["B", "A"]
    assert told["R_cf of even use"] == ["0.500", "0.500"] and told["reward: accuracy"] == [
        "1.000",
        "0.000",
    ]
    assert told["reward: consensus, 3 × accuracy × R_cf (max pooling, τ = 0.1)"] == [
        "1.950",
        "0.000",
    ]
    assert told["reward: format"] == ["1.000", "0.000"]
    assert told["reward: total, without the temporal term"] == ["3.950", "0.000"]
    wrong.uses["attention", None] = torch.tensor(
        [0.0, 1.0]
    )  # the first model has none: R_cf is 0.8 for the second alone
    told = {name: cells for name, *cells in look.reward_rows(flags, example, row, [right, wrong])}
    assert told["R_cf, attention, layer 1"] == ["–", "0.800"] and told[
        "R_cf of use of the best slot alone"
    ] == ["0.800", "0.800"]
    assert told["tokens"] == ["2", "2"] and look.reward_rows(
        SimpleNamespace(**vars(flags) | {"max_completion_length": 2}), example, row, [right]
    )[1] == ("tokens", "2, cut")
    unknown = {
        name: cells
        for name, *cells in look.reward_rows(
            flags, Example("0", "q", [], "free-form", "", "", "video"), row, [right]
        )
    }
    assert (
        unknown["reward: accuracy"] == unknown["reward: total, without the temporal term"] == ["–"]
    )


def test_use_bars_are_the_numbers():
    """The drawn steps and bars against the values, on five frames in three slots; the second model's line is drawn too."""
    row = {"prior": [0.1, 0.2, 0.3, 0.1, 0.3], "times": [0.0, 1.0, 2.0, 3.0, 4.0]}
    one = SimpleNamespace(
        name="a",
        uses={
            ("max", 0.1): torch.tensor([0.2, 0.5, 0.3]),
            ("max", 1.0): torch.tensor([0.3, 0.4, 0.3]),
        },
    )
    two = SimpleNamespace(
        name="b",
        uses={
            ("max", 0.1): torch.tensor([0.1, 0.1, 0.8]),
            ("mean", 0.1): torch.tensor([1.0, 0.0, 0.0]),
        },
    )
    axes = Figure().add_subplot()
    alt = look.plot_use(axes, SHEETS["light"], row, [one, two], "max")
    drawn = [patch.get_data() for patch in axes.patches]
    np.testing.assert_allclose(
        [np.array(data.values) for data in drawn],
        [[0.3, 0.4, 0.3], [0.3, 0.4, 0.3], [0.2, 0.5, 0.3], [0.3, 0.4, 0.3], [0.1, 0.1, 0.8]],
        atol=1e-6,
    )  # P twice, filled and dotted
    assert all(data.edges.tolist() == [-0.5, 1.5, 3.5, 4.5] for data in drawn)
    assert (
        "a, τ = 0.1: 0.200, 0.500, 0.300; a, τ = 1: 0.300" in alt
        and "b, τ = 0.1: 0.100, 0.100, 0.800" in alt
    )
    axes = Figure().add_subplot()
    cues = {
        "scene": [2, 4],
        "scene_scores": [0.3, 0.1, 0.5, 0.2, 0.4],
        "semantic": [0, 2],
        "semantic_scores": [0.3, -0.1, 0.5, 0.2, 0.1],
    }
    look.plot_cue(axes, SHEETS["light"], row | cues, "scene", "distance")
    assert [bar.get_height() for bar in axes.patches] == [0.3, 0.1, 0.5, 0.2, 0.4]
    filled = [bar.get_facecolor() != axes.patches[1].get_facecolor() for bar in axes.patches]
    assert filled == [False, False, True, False, True]
    axes = Figure().add_subplot()
    alt = look.plot_cue(axes, SHEETS["light"], row | cues, "semantic", "cosine")
    assert axes.collections[0].get_offsets().tolist() == [
        [0, 0.3],
        [1, -0.1],
        [2, 0.5],
        [3, 0.2],
        [4, 0.1],
    ]
    assert "0.0 s 0.300 chosen, 1.0 s -0.100, 2.0 s 0.500 chosen, 3.0 s 0.200" in alt


def test_prior_bars_are_made_of_their_cues():
    """Weights 0.5 for all, 1 for the scene cue on frame 0, 2 for the semantic on 0 and 2: 3.5, 0.5, 2.5, of 6.5."""
    row = {
        "prior": [3.5 / 6.5, 0.5 / 6.5, 2.5 / 6.5],
        "times": [0.0, 1.0, 2.0],
        "scene": [0],
        "semantic": [0, 2],
        "settings": {"prior": "full", "w_base": 0.5, "w_scene": 1.0, "w_sem": 2.0},
    }
    axes = Figure().add_subplot()
    look.plot_prior(axes, SHEETS["light"], row)
    bars = [(round(bar.get_y() * 6.5, 6), round(bar.get_height() * 6.5, 6)) for bar in axes.patches]
    assert bars == [
        (0, 0.5),
        (0, 0.5),
        (0, 0.5),
        (0.5, 1),
        (0.5, 0),
        (0.5, 0),
        (1.5, 2),
        (0.5, 0),
        (0.5, 2),
    ]
    np.testing.assert_allclose(sum(look.prior_parts(row).values()), row["prior"])
    uniform = look.prior_parts({**row, "settings": {**row["settings"], "prior": "no_scene"}})
    assert uniform["scene"].tolist() == [0, 0, 0] and uniform["semantic"].tolist() == [
        2 / 5.5,
        0,
        2 / 5.5,
    ]


def test_text_is_coloured_by_the_slot_of_each_token():
    colours = look.slot_colours(2)
    text = look.text_html(
        fake_look("m", "<x>y", [0.5, 0.5], ["<x>", "y"]), "max", [0.0, 1.0, 2.0, 3.0]
    )
    spans = re.findall(
        r'<span style="background:(#\w+);color:(#\w+)" title="(.*?)">(.*?)<sub>(\d)</sub></span>',
        text,
    )
    assert spans == [
        (*colours[0], "slot 1, 0.0 s", "&lt;x&gt;", "1"),
        (*colours[1], "slot 2, 2.0 s", "y", "2"),
    ]


def test_heat_maps_lie_where_their_patches_are():
    """A 4 x 8 frame, 1 x 2 patches a slot: the least value is darkest, on one scale over all slots."""
    thumbs = [np.zeros((4, 8, 3), np.uint8)] * 4
    first, second = look.slot_maps(fake_look("m", "", [0.5, 0.5]), thumbs)["max"]
    dark, bright = (
        np.array(look.matplotlib.colormaps["magma"](value)[:3]) * 255 * 0.75 for value in (0.0, 1.0)
    )
    np.testing.assert_allclose(first[:, :4].reshape(-1, 3), np.tile(dark, (16, 1)), atol=2)
    np.testing.assert_allclose(first[:, 4:].reshape(-1, 3), np.tile(bright, (16, 1)), atol=2)
    assert (
        dark.sum()
        < second[:, 4:].mean((0, 1)).sum()
        < second[:, :4].mean((0, 1)).sum()
        < bright.sum()
    )


def test_sample_as_a_user_runs_it(first_run, small_toy, tmp_path, chromium):
    run, _ = first_run
    (tmp_path / "a clip").mkdir()
    video = tmp_path / "a clip" / "my <video>.mp4"
    video.write_bytes(next((small_toy / "videos").glob("heldout_*.mp4")).read_bytes())
    command = [
        sys.executable,
        ROOT / "visualize.py",
        "sample",
        "--model_name_or_path",
        run / "grpo",
        "--compare",
        run / "sft",
        "--video",
        video,
        *QUESTION,
        "--answer",
        "A",
        *SIDE,
        "--clip",
        f"local-dir:{small_toy / 'clip'}",
        "--max_completion_length",
        "16",
        "--output",
        "out/s.html",
    ]
    done = subprocess.run(
        [str(part) for part in command], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0 and done.stdout.endswith("out/s.html\n"), done.stdout + done.stderr
    assert "warning" not in done.stderr
    page = (tmp_path / "out/s.html").read_text()
    pictures = re.findall(r'<img src="data:image/(\w+);base64,(.*?)"', page)
    assert (
        len(pictures) == 16 + 6 + 2 * 8
    )  # frames; three cues and three scores; eight slots of two models
    for kind, content in pictures:
        picture = Image.open(io.BytesIO(base64.b64decode(content)))
        assert picture.format.lower() == kind and len(np.unique(np.asarray(picture))) > 20
    use = re.search(r'alt="Frame use, max pooling\. (.*?)"', page).group(1)
    rows = {
        html.unescape(name): re.findall(r">([\d.]+)</td>", cells)
        for name, cells in re.findall(r"<th scope=row>(.*?)</th>(.*)", page)
    }
    prior = re.findall(
        r"P ([\d.]+)", re.search(r'<div class="frames">(.*?)</div>', page, re.S).group(1)
    )[::2]  # alt text and caption
    merged = np.array(prior, float).reshape(8, 2).sum(1)
    for column, values in enumerate(
        re.findall(r"τ = 0\.1: ([\d., ]+)", use)
    ):  # R_cf from the page's own numbers
        shares = np.array(values.rstrip(", .").split(", "), float)
        assert abs(shares.sum() - 1) < 0.005
        assert (
            abs(merged @ shares - float(rows["R_cf, max pooling, τ = 0.1 (the paper's)"][column]))
            < 0.005
        )
    for name in ("s.png", "s-maps.png"):
        assert Image.open(tmp_path / "out" / name).width > 1000
        assert (
            (tmp_path / "out" / name).with_suffix(".svg").read_text().lstrip().startswith("<?xml")
        )
    words = chromium(tmp_path / "out/s.html")
    assert (
        "B. <b>blue & 'x'" in words
        and "my <video>.mp4" in words
        and "output/grpo" in words
        and "output/sft" in words
    )
    assert "python " in words and "--compare" in words


def test_settings_of_the_training_run_are_compared(tmp_path, checkpoint):
    """run.json stands beside the checkpoint: a model that saw small frames answers large ones badly, and the reader should know why."""
    shutil.copytree(checkpoint, tmp_path / "run" / "grpo")
    asked, settings = arguments(tmp_path / "run/grpo"), SimpleNamespace(frames=16)
    assert look.check_model(asked, settings, str(tmp_path / "run/grpo")) == []
    (tmp_path / "run/run.json").write_text(
        json.dumps({"frames": 8, "max_pixels": 3136, "min_pixels": 100, "seed": 3})
    )
    assert look.check_model(asked, settings, str(tmp_path / "run/grpo")) == [
        f"{tmp_path}/run/grpo was trained with --frames 8, here it is 16",
        f"{tmp_path}/run/grpo was trained with --min_pixels 100, here it is 3136",
    ]


def test_64_large_frames_fit_in_memory(checkpoint, tmp_path):
    writer = cv2.VideoWriter(
        str(tmp_path / "hd.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 8, (1280, 720)
    )
    for index in range(64):
        writer.write(np.full((720, 1280, 3), 3 * index, np.uint8))
    writer.release()
    command = [
        sys.executable,
        ROOT / "visualize.py",
        "sample",
        "--model_name_or_path",
        checkpoint,
        "--video",
        tmp_path / "hd.mp4",
        "--question",
        "q",
        "--frames",
        "64",
        "--prior",
        "no_semantic",
        "--output",
        tmp_path / "x.html",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and (tmp_path / "x.html").is_file(), done.stderr
    assert (
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 3 * 1024**2
    )  # KiB: the largest child so far


def test_other_family_without_attention(tmp_path, toy_processor, toy_folder, monkeypatch):
    """A model that cannot pack has no recorded attention: its score and line are left out, the rest is drawn."""
    video = next((toy_folder / "videos").glob("*_0*.mp4"))
    monkeypatch.setattr(look, "check_model", lambda *_: [])
    monkeypatch.setattr(
        look,
        "look",
        lambda arguments, name, path, example, row: look.Look(
            name,
            "<answer>A</answer>",
            ["A"],
            {
                (pool, tau): torch.full((8,), 0.125)
                for pool in ("max", "mean")
                for tau in (0.1, 1.0)
            },
            {pool: torch.rand(1, 8) for pool in ("max", "mean")},
            {pool: torch.rand(8, 2, 2) for pool in ("max", "mean")},
        ),
    )
    output = tmp_path / "x.html"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "visualize.py",
            "sample",
            "--model_name_or_path",
            "m",
            "--video",
            str(video),
            "--question",
            "q",
            "--prior",
            "no_semantic",
            "--output",
            str(output),
        ],
    )
    visualize.main()
    page = output.read_text()
    assert (
        page.count("<picture>") == 4
        and "attention, layer" not in page
        and "Semantic cue" not in page
    )


def test_bad_input_is_one_sentence(tmp_path, toy_folder, checkpoint, capsys, monkeypatch):
    video = next((toy_folder / "videos").glob("*_0*.mp4"))
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava/config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "torn.mp4").write_bytes(video.read_bytes()[:2000])
    still = cv2.VideoWriter(
        str(tmp_path / "still.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 4, (64, 64)
    )
    still.write(np.zeros((64, 64, 3), np.uint8))
    still.release()
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    torch.nn.init.constant_(model.model.language_model.norm.weight, float("nan"))
    model.save_pretrained(tmp_path / "nan")
    for file in checkpoint.glob("*.json"):
        if not (tmp_path / "nan" / file.name).exists():
            (tmp_path / "nan" / file.name).write_bytes(file.read_bytes())
    for file in checkpoint.glob("*.jinja"):
        (tmp_path / "nan" / file.name).write_bytes(file.read_bytes())
    shutil.copytree(checkpoint, tmp_path / "half")
    os.truncate(tmp_path / "half/model.safetensors", 10_000)
    good = {
        "--model_name_or_path": checkpoint,
        "--video": video,
        "--question": "q",
        "--prior": "no_semantic",
        "--min_pixels": "3136",
        "--max_pixels": "3136",
        "--max_completion_length": "4",
        "--output": tmp_path / "x.html",
    }
    for change, words in (
        (
            {"--model_name_or_path": tmp_path / "llava"},
            "is a llava checkpoint; frame use is known for qwen2_vl",
        ),
        ({"--model_name_or_path": tmp_path / "nowhere"}, "nowhere is no checkpoint"),
        (
            {"--model_name_or_path": tmp_path / "nan"},
            "hidden states of this video are not finite numbers",
        ),
        ({"--compare": checkpoint}, "--compare names the model itself"),
        ({"--video": tmp_path / "no.mp4"}, "no.mp4: no such file"),
        ({"--video": tmp_path / "empty.mp4"}, "empty.mp4: empty file"),
        ({"--video": tmp_path / "torn.mp4"}, "torn.mp4: not a readable video"),
        ({"--video": tmp_path / "still.mp4"}, "still.mp4: 1 sampled frames make one slot"),
        ({"--options": "x"}, "a letter each"),
        ({"--options": "A. x", "--answer": "x"}, "--answer is one of the letters"),
        ({"--model_name_or_path": tmp_path / "half"}, "half cannot be loaded"),
        ({"--attention_layer": "5"}, "has layers 1 to 4 (--attention_layer)"),
        ({"--hidden_layer": "-2"}, "hidden states 0 to 4 or -1"),
        (
            {"--options": "A. x", "--problem_type": "OCR"},
            "--problem_type multiple choice go together",
        ),
        ({"--min_pixels": "5000"}, "at most --max_pixels"),
        ({"--frames": "0"}, "--frames and --semantic_k must be at least 1"),
        ({"--prior": "full", "--clip": f"local-dir:{tmp_path}"}, "needs its weights as"),
        ({"--output": "x.png"}, "must end in .html"),
    ):
        flags = [str(part) for pair in {**good, **change}.items() for part in pair]
        monkeypatch.setattr(sys, "argv", ["visualize.py", "sample", *flags])
        with pytest.raises(SystemExit) as stop:
            visualize.main()
        told = capsys.readouterr().err.strip().splitlines()
        assert (
            stop.value.code == 2
            and told[-1].startswith("visualize.py: error: ")
            and words in told[-1]
        ), (change, told)
    assert not (tmp_path / "x.html").exists()
