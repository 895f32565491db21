"""visualize.py sample: its numbers, recomputed with transformers alone; the page; bad input."""

import base64
import html
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import banned_ids
from PIL import Image
from transformers import AutoModelForImageTextToText
from warm import run_script

import reward
import visualize
from common import sample_page
from common.data import Example, Prior, load_examples
from common.media import Encoder, PromptFlags

ROOT = Path(__file__).resolve().parents[1]


def arguments(checkpoint, **more):
    settings = {"model_name_or_path": str(checkpoint), "video": "v.mp4", "question": "q"}
    sizes = {"min_pixels": 3136, "max_pixels": 3136, "max_completion_length": 12}
    return visualize.SampleArguments(**{**settings, **sizes, **more})


def command(monkeypatch, **flags):
    """visualize.py sample in this process."""
    words = []
    for name, values in flags.items():
        values = values if isinstance(values, list) else [values]
        words += [f"--{name}", *map(str, values)]
    monkeypatch.setattr(sys, "argv", ["visualize.py", "sample", *words])
    visualize.main()


def test_patch_contributions():
    """Two channels, one slot of two patches, one response direction (0.6, 0.8)."""
    response = torch.tensor([[3.0, 4.0]])
    patches = torch.tensor([[[4.0, -1.0], [0.0, 3.0]]])
    # f = (4, 3), |f| = 5; patch 0 owns channel 0: 0.6 * 4 / 5, patch 1 channel 1: 0.8 * 3 / 5
    contributions = sample_page.patch_contributions(response, patches)
    torch.testing.assert_close(contributions, torch.tensor([[0.48, 0.48]]))
    generator = torch.Generator().manual_seed(0)
    response = torch.randn(7, 16, generator=generator)
    patches = torch.randn(3, 5, 16, generator=generator)
    frames = reward.pool_frames(patches)
    cosines = torch.cosine_similarity(response[:, None], frames[None], dim=-1)  # (L, t)
    contributions = sample_page.patch_contributions(response, patches)
    torch.testing.assert_close(contributions.sum(1), cosines.mean(0))


def test_answer_equals_plain_transformers(checkpoint, toy_folder, toy_processor):
    examples = load_examples(toy_folder / "train_cot.json")
    video = next(example for example in examples if example.media_type == "video")
    example = Example("0", "q", [], "free-form", "", [video.medium])
    frames = [0, 9, 20, 31, 42, 53, 60]  # 7 frames, 4 slots
    times = [index / 4 for index in frames]
    row = Prior("0", frames=frames, times=times, prior=[1 / 7] * 7)
    asked = arguments(checkpoint, attention_layer=2)
    one = sample_page.answer_question(asked, "m", str(checkpoint), example, row)

    model = AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager")
    model.eval()
    item = Encoder(toy_processor, PromptFlags(min_pixels=3136, max_pixels=3136)).encode(
        example, row
    )
    ids = item.input_ids
    banned = torch.tensor(banned_ids(model))
    inputs = {
        "pixel_values_videos": item.pixel_values,
        "video_grid_thw": item.grid_thw,
        "second_per_grid_ts": torch.tensor([item.second_per_grid]),
    }

    def kinds(ids):
        return 2 * (ids == model.config.video_token_id).int()[None]

    with torch.no_grad():
        for _ in range(12):
            output = model(input_ids=ids[None], mm_token_type_ids=kinds(ids), **inputs)
            logits = output.logits[0, -1].index_fill(0, banned, -torch.inf)
            ids = torch.cat([ids, logits.argmax()[None]])
        output = model(
            input_ids=ids[None],
            mm_token_type_ids=kinds(ids),
            output_hidden_states=True,
            output_attentions=True,
            **inputs,
        )
    text = toy_processor.tokenizer.decode(ids[-12:], skip_special_tokens=True)
    assert one.text == text and one.length == 12
    assert list(one.uses) == list(one.maps) == ["the paper's score", "attention, layer 2"]
    uses = list(one.uses.values())
    maps = list(one.maps.values())
    visual = (ids == model.config.video_token_id).nonzero()[:, 0]
    states = output.hidden_states[3][0]
    assert len(visual) == 4 * 4
    frames = reward.pool_frames(states[visual].view(4, 4, -1))
    cosines = torch.cosine_similarity(states[-12:][:, None], frames[None], dim=-1)  # (L, t)
    mean = cosines.mean(0)
    torch.testing.assert_close(maps[0].sum((1, 2)), mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(uses[0], (mean / 0.1).softmax(0), atol=1e-5, rtol=0)
    weights = output.attentions[1][0].mean(0)[-12:][:, visual].view(12, 4, 2, 2)  # (L, t, h, w)
    torch.testing.assert_close(maps[1], weights.mean(0), atol=1e-6, rtol=0)
    share = weights.sum((0, 2, 3)) / weights.sum()
    torch.testing.assert_close(uses[1], share, atol=1e-5, rtol=0)


def test_rewards_by_hand():
    """P is (0.2, 0.8) over 2 slots; use (0.25, 0.75): R_cf = 0.05 + 0.6 = 0.65."""
    prior = [0.1, 0.1, 0.6, 0.2]
    row = Prior("0", frames=[0, 1, 2, 3], times=[0.0, 1.0, 2.0, 3.0], prior=prior)
    example = Example("0", "q", ["A. x", "B. y"], "multiple choice", "B")

    def column(example, text, length, **uses):
        uses = {score: torch.tensor(use) for score, use in uses.items()}
        answer = sample_page.Answer("m", text, length, uses, {})
        return sample_page.reward_column(example, row, answer)

    right = "<think>x</think><answer>B</answer>"
    assert column(example, right, 320, hidden=[0.25, 0.75]) == {
        "model": "m",
        "answer": "B",
        "tokens": 320,
        "format reward": 1.0,
        "accuracy reward": "1.000",
        "length reward": 0.2,
        "R_cf, hidden": "0.650",
        "R_cf of even use": "0.500",
    }
    # R_cf = 0.15 + 0.2 by the paper's score, 0.8 by attention; no think block: no format reward
    wrong = "<answer>A</answer>"
    found = column(example, wrong, 320, hidden=[0.75, 0.25], attention=[0.0, 1.0])
    assert found["format reward"] == found["length reward"] == 0
    assert found["accuracy reward"] == "0.000" and found["R_cf, hidden"] == "0.350"
    assert found["R_cf, attention"] == "0.800"
    unknown = Example("0", "q", [], "free-form", "")
    found = column(unknown, right, 2, hidden=[0.25, 0.75])
    assert not any("accuracy" in name or "length" in name for name in found)


def test_sample_of_two_models(checkpoint, small_toy, tmp_path, monkeypatch, capsys, chromium):
    (tmp_path / "a clip").mkdir()
    video = tmp_path / "a clip" / "my <video>.mp4"
    video.write_bytes(next((small_toy / "videos").glob("heldout_*.mp4")).read_bytes())
    other = tmp_path / "output" / "other"
    shutil.copytree(checkpoint, other)
    drawn = []
    draw = sample_page.draw_answers

    def kept(*arguments):
        drawn.append(arguments)
        return draw(*arguments)

    monkeypatch.setattr(sample_page, "draw_answers", kept)
    command(
        monkeypatch,
        model_name_or_path=checkpoint,
        compare=other,
        video=video,
        question="What colour are the balls?",
        options=["A. red", "B. <b>blue & 'x'"],
        answer="A",
        min_pixels=3136,
        max_pixels=3136,
        clip=f"local-dir:{small_toy / 'clip'}",
        max_completion_length=16,
        output=tmp_path / "out/s.html",
    )
    printed = capsys.readouterr()
    assert printed.out.endswith("out/s.html\n") and "warning" not in printed.err
    page = (tmp_path / "out/s.html").read_text()
    (content,) = re.findall(r'<img src="data:image/png;base64,(.*?)"', page)
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert picture.width > 1000 and len(np.unique(np.asarray(picture))) > 20
    # R_cf from P and the uses that are drawn
    ((row, _, answers),) = drawn
    merged = np.array(row.prior).reshape(8, 2).sum(1)
    rows = {}
    for name, cells in re.findall(r"<tr><td>(.*?)</td>(.*)</tr>", page):
        rows[html.unescape(name)] = re.findall(r"<td>([\d.]+)</td>", cells)
    for name in ("the paper's score", "attention, layer 1"):
        for answer, consensus in zip(answers, rows[f"R_cf, {name}"], strict=True):
            shares = answer.uses[name].numpy()
            assert abs(shares.sum() - 1) < 1e-5
            assert abs(merged @ shares - float(consensus)) < 0.001
    file = tmp_path / "out/s.png"
    assert file.read_bytes() == base64.b64decode(content)
    assert file.with_suffix(".svg").read_text().lstrip().startswith("<?xml")
    words = chromium(tmp_path / "out/s.html")
    for word in ("B. <b>blue & 'x'", "my <video>.mp4", "other", "--compare"):
        assert word in words


def test_settings_of_the_training_run_are_compared(tmp_path, checkpoint):
    """A model that saw small frames answers large ones badly; the reader should know why."""
    path = tmp_path / "run" / "grpo"
    shutil.copytree(checkpoint, path)
    asked = arguments(path, frames=16)
    assert sample_page.check_model(asked, str(path)) == []
    trained = {"frames": 8, "max_pixels": 3136, "min_pixels": 100, "seed": 3}
    (tmp_path / "run/run.json").write_text(json.dumps(trained))
    assert sample_page.check_model(asked, str(path)) == [
        f"{path} was trained with --frames 8, here it is 16",
        f"{path} was trained with --min_pixels 100, here it is 3136",
    ]


def test_64_large_frames_fit_in_memory(checkpoint, tmp_path):
    file = str(tmp_path / "hd.mp4")
    writer = cv2.VideoWriter(file, cv2.VideoWriter_fourcc(*"mp4v"), 8, (1280, 720))
    for index in range(64):
        writer.write(np.full((720, 1280, 3), 3 * index, np.uint8))
    writer.release()
    words = ["--model_name_or_path", checkpoint, "--video", file, "--question", "q"]
    words += ["--frames", "64", "--prior", "no_semantic", "--output", tmp_path / "x.html"]
    words += ["--max_completion_length", "64"]
    code = (
        "import resource, visualize\n"
        "visualize.main()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    (tmp_path / "sample.py").write_text(code)
    done = run_script(tmp_path / "sample.py", "sample", *words)
    assert (tmp_path / "x.html").is_file()
    # KiB
    assert int(done.stdout.split()[-1]) < 3 * 1024**2


def test_other_family_without_attention(tmp_path, toy_folder, monkeypatch):
    """A model that cannot pack gives no attention: its score is left out, the rest is drawn."""

    def made(asked, name, path, example, row):
        uses = {"hidden": torch.full((8,), 0.125)}
        maps = {"hidden": torch.rand(8, 2, 2)}
        return sample_page.Answer(name, "<answer>A</answer>", 1, uses, maps)

    monkeypatch.setattr(sample_page, "check_model", lambda *_: ["a note"])
    monkeypatch.setattr(sample_page, "answer_question", made)
    video = next((toy_folder / "videos").glob("*_0*.mp4"))
    output = tmp_path / "x.html"
    flags = {"model_name_or_path": "m", "video": video, "question": "q", "prior": "no_semantic"}
    command(monkeypatch, **flags, output=output)
    page = output.read_text()
    assert page.count("<img") == 1 and "<p>a note</p>" in page
    assert "R_cf, hidden" in page and "R_cf, attention" not in page


def test_a_question_of_a_data_set(tmp_path, toy_folder, monkeypatch, capsys):
    """As it stands: its video, options, answer and span."""
    rows = json.loads((toy_folder / "train_cot.json").read_text())
    row = next(row for row in rows if row["data_type"] == "video" and row["options"])
    rows = [{**row, "problem_id": "0", "path": "gone.mp4"}, {**row, "problem_id": 7}]
    rows.append({**row, "problem_id": "text", "data_type": "text", "path": ""})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    asked = []

    def made(arguments, name, path, example, row):
        asked.append(example)
        uses = {"hidden": torch.full((8,), 0.125)}
        return sample_page.Answer(
            name, "<answer>A</answer>", 1, uses, {"hidden": torch.rand(8, 2, 2)}
        )

    monkeypatch.setattr(sample_page, "check_model", lambda *_: [])
    monkeypatch.setattr(sample_page, "answer_question", made)
    flags = {"model_name_or_path": "m", "dataset_name": tmp_path / "rows.json"}
    flags |= {"media_root": toy_folder, "prior": "no_semantic", "output": tmp_path / "x.html"}
    command(monkeypatch, **flags, problem_id="7")
    (example,) = asked
    (expected,) = load_examples(tmp_path / "rows.json", toy_folder, errors := [])[1:2]
    assert example == expected and example.answer and not errors
    page = html.unescape((tmp_path / "x.html").read_text())
    assert f"<h1>{row['problem']}" in page and f"<p>{row['options'][1]}</p>" in page
    assert "accuracy reward" in page
    capsys.readouterr()
    for more, words in (
        ({"problem_id": "8"}, "has no usable row of --problem_id 8 about one video alone"),
        ({"problem_id": "text"}, "has no usable row of --problem_id text"),
        ({"problem_id": "0"}, "gone.mp4: no such file"),
        ({}, "or --dataset_name and --problem_id"),
        ({"problem_id": "7", "question": "q"}, "give --video and --question"),
        ({"problem_id": "7", "answer": "A"}, "give --video and --question"),
    ):
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, **flags, **more)
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_bad_input_is_one_sentence(tmp_path, toy_folder, checkpoint, capsys, monkeypatch):
    video = next((toy_folder / "videos").glob("*_0*.mp4"))
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava/config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "torn.mp4").write_bytes(video.read_bytes()[:2000])
    file = str(tmp_path / "still.mp4")
    still = cv2.VideoWriter(file, cv2.VideoWriter_fourcc(*"mp4v"), 4, (64, 64))
    still.write(np.zeros((64, 64, 3), np.uint8))
    still.release()
    shutil.copytree(checkpoint, tmp_path / "nan")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    torch.nn.init.constant_(model.model.language_model.norm.weight, float("nan"))
    model.save_pretrained(tmp_path / "nan")
    shutil.copytree(checkpoint, tmp_path / "half")
    os.truncate(tmp_path / "half/model.safetensors", 10_000)
    good = {
        "model_name_or_path": checkpoint,
        "video": video,
        "question": "q",
        "prior": "no_semantic",
        "min_pixels": 3136,
        "max_pixels": 3136,
        "max_completion_length": 4,
        "output": tmp_path / "x.html",
    }
    model_cases = {
        "llava": "is a llava checkpoint, not one of qwen2_vl, ",
        "nowhere": "nowhere is not a checkpoint",
        "nan": "hidden states of this video are not finite numbers",
        "half": "half",
    }
    cases = [({"model_name_or_path": tmp_path / name}, text) for name, text in model_cases.items()]
    cases += [
        ({"compare": checkpoint}, "a path is given twice"),
        ({"video": tmp_path / "no.mp4"}, "no.mp4: no such file"),
        ({"video": tmp_path / "empty.mp4"}, "empty.mp4: empty file"),
        ({"video": tmp_path / "torn.mp4"}, "torn.mp4: not a readable video"),
        ({"video": tmp_path / "still.mp4"}, "still.mp4: its frames make one slot"),
        ({"options": "A. x", "answer": "y"}, "solution 'y' names none of the options A"),
        ({"attention_layer": 5}, "has layers 1 to 3, and hidden states"),
        ({"min_pixels": 5000}, "must not be above --max_pixels"),
        ({"frames": 0}, "--frames must be at least 1 and finite"),
        ({"prior": "full", "clip": f"local-dir:{tmp_path}"}, "cannot be loaded, give --clip"),
        ({"output": "x.png"}, "must end in .html"),
    ]
    for change, words in cases:
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, **{**good, **change})
        printed = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and words in printed[-1], (change, printed)
        assert printed[-1].startswith("visualize.py: error: ")
    assert not (tmp_path / "x.html").exists()
