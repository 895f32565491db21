"""toy.py: questions, evidence and demonstrations agree with the planned video."""

import json
import random
import re
import sys
from dataclasses import asdict

import numpy as np
import pytest

import reward
import toy


def plan(seed):
    return toy.plan_video(np.random.default_rng(seed))


def ask(kind, seed, biased=False, dense_share=1.0):
    scenes = plan(seed)
    return scenes, toy.make_question(kind, scenes, random.Random(seed), biased, dense_share)


def answer_of(row):
    return reward.extract_answer(row["solution"])


def text_of(row, letter):
    (text,) = [option[3:] for option in row["options"] if option[0] == letter]
    return text


def scene_at(scenes, evidence):
    (scene,) = [scene for scene in scenes if [[scene.start, scene.end]] == evidence]
    return scene


@pytest.mark.parametrize("seed", range(30))
def test_a_plan_is_four_scenes_that_fill_the_video(seed):
    scenes = plan(seed)
    assert scenes[0].start == 0 and scenes[-1].end == 16
    assert all(a.end == b.start for a, b in zip(scenes, scenes[1:], strict=False))
    assert sorted(scene.end - scene.start for scene in scenes) == [2, 2, 4, 8]
    assert len({scene.colour for scene in scenes}) == 4
    assert len({scene.texture for scene in scenes}) == 4


@pytest.mark.parametrize("kind", toy.KINDS)
@pytest.mark.parametrize("seed", range(20))
def test_the_evidence_is_the_scene_that_answers(kind, seed):
    scenes, row = ask(kind, seed)
    scene = scene_at(scenes, row["evidence"])
    starts = {scene.texture: scene.start for scene in scenes}
    named = [word for word in re.findall(r"\w+", row["problem"]) if word in starts]
    assert len(named) == (2 if kind == "order" else 1)
    assert min(named, key=starts.get) == scene.texture
    if kind == "count":
        assert answer_of(row) == str(scene.balls)
        assert row["problem_type"] == "numerical" and row["options"] == []
    else:
        assert row["problem_type"] == "multiple choice" and len(set(row["options"])) == 2
        assert text_of(row, answer_of(row)) == scene.colour


@pytest.mark.parametrize("kind", toy.KINDS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_a_demonstration_answers_what_it_looked_at(kind, biased, seed):
    scenes, row = ask(kind, seed, biased)
    texture = re.search(r"Look: (\w+)", row["process"])[1]
    (looked,) = [scene for scene in scenes if scene.texture == texture]
    asked = scene_at(scenes, row["evidence"])
    if biased:
        assert looked.end - looked.start == 8
        assert row["salient_is_asked"] == (asked is looked)
    else:
        assert looked is asked
    if kind == "count":
        assert answer_of(row) == str(looked.balls)
    else:
        assert text_of(row, answer_of(row)) == looked.colour
    for second in range(0, 16, 2):  # listed rightly, whatever it looks at
        (scene,) = [scene for scene in scenes if scene.start <= second < scene.end]
        listed = f"{second}s {scene.texture} {scene.colour} {scene.balls}."
        assert listed in row["process"]


@pytest.mark.parametrize("seed", range(10))
def test_more_scenes_make_a_longer_video_of_which_the_longest_is_half(seed):
    scenes = toy.plan_video(np.random.default_rng(seed), 6)
    assert sorted(scene.end - scene.start for scene in scenes) == [2, 2, 2, 2, 4, 12]
    assert scenes[-1].end == 24
    assert len({scene.colour for scene in scenes}) == len({scene.texture for scene in scenes}) == 6


@pytest.mark.parametrize("kind", ["colour", "order"])
@pytest.mark.parametrize("seed", range(10))
def test_of_more_options_one_is_right_and_one_is_what_the_longest_scene_shows(kind, seed):
    scenes = toy.plan_video(np.random.default_rng(seed), 6)
    row = toy.make_question(kind, scenes, random.Random(seed), biased=False, choices=4)
    assert [option[:3] for option in row["options"]] == ["A. ", "B. ", "C. ", "D. "]
    offered = [option[3:] for option in row["options"]]
    assert len(set(offered)) == 4
    assert max(scenes, key=lambda scene: scene.end - scene.start).colour in offered
    scene = scene_at(scenes, row["evidence"])
    assert text_of(row, answer_of(row)) == scene.colour
    assert f"Option: {answer_of(row)}. {scene.colour}." in row["process"]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_biased_demonstrations_and_the_number_of_options_reach_the_files(share):
    settings = toy.ToyArguments(biased_share=share, scenes=6, options=3)
    scenes = toy.plan_video(np.random.default_rng(0), 6)
    video = toy.Video("videos/train_0000", scenes, [0], None)
    rows = list(toy.make_rows(video, random.Random(0), settings))
    options = {len(row["options"]) for _, row in rows if row["kind"] in ("colour", "order")}
    assert options == {3}
    longest = max(scenes, key=lambda scene: scene.end - scene.start)
    looks = []
    for name, row in rows:
        if name == "train_cot" and row["kind"] != "image":
            looks.append(f"Look: {longest}." in row["process"])
    # Without bias the longest scene is looked at where it is asked for alone.
    assert all(looks) if share else np.mean(looks) < 0.7


def test_a_focused_demonstration_lists_nothing():
    _, row = ask("colour", 3, biased=True, dense_share=0.0)
    assert row["process"].startswith("<think>Asked: ") and "Look: " in row["process"]


def test_the_asked_scene_differs_from_the_salient_one_often_enough():
    """One of four scenes is asked for: the longest in a quarter.

    Of the longest and another one, the longest comes first in half.
    """
    plans = [plan(seed) for seed in range(500)]
    shares = {}
    for kind in toy.KINDS:
        rng = random.Random(0)
        rows = [toy.make_question(kind, scenes, rng, biased=False) for scenes in plans * 4]
        shares[kind] = np.mean([row["salient_is_asked"] for row in rows])
    assert shares == pytest.approx({"colour": 1 / 4, "count": 1 / 4, "order": 1 / 2}, abs=0.04)


def test_letters_are_shuffled():
    rng = random.Random(0)
    scenes = plan(0)
    rows = [toy.make_question("colour", scenes, rng, biased=False) for _ in range(400)]
    letters = [answer_of(row) for row in rows]
    assert letters.count("A") == pytest.approx(200, abs=45)


def run_main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["toy.py", *map(str, flags)])
    toy.main()


def test_a_cached_toy_of_other_settings_is_refused(tmp_path, monkeypatch, capsys):
    made = {**asdict(toy.ToyArguments(output_dir="elsewhere")), "version": toy.VERSION}
    (tmp_path / "toy.json").write_text(json.dumps(made))
    run_main(monkeypatch, "--output_dir", tmp_path)
    assert f"a toy is in {tmp_path}" in capsys.readouterr().out
    with pytest.raises(toy.DataError, match="no finished toy with .*'dense_share': 0.6"):
        run_main(monkeypatch, "--output_dir", tmp_path, "--dense_share", 0.6)
    # train.py asks for the seed alone
    made["dense_share"] = 0.6
    (tmp_path / "toy.json").write_text(json.dumps(made))
    assert toy.make_toy(tmp_path, seed=0) == made
    (tmp_path / "toy.json").write_text(json.dumps({**made, "version": 1, "seed": 5}))
    with pytest.raises(toy.DataError, match="no finished toy with {'seed': 0, 'version': 4}"):
        toy.make_toy(tmp_path, seed=0)


def test_a_toy_of_another_version_is_made_anew_with_its_settings(tmp_path):
    small = {"train_videos": 12, "heldout_videos": 2, "clip_steps": 4, "dense_share": 0.6}
    made = {**asdict(toy.ToyArguments()), **small, "seed": 5, "version": toy.VERSION - 1}
    (tmp_path / "toy.json").write_text(json.dumps(made))
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/of_before.mp4").touch()
    assert not toy.is_made(tmp_path)
    new = toy.make_toy(tmp_path, seed=5)
    assert new == {**made, "output_dir": str(tmp_path), "version": toy.VERSION}
    assert toy.is_made(tmp_path) and not (tmp_path / "videos/of_before.mp4").exists()
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 14


def test_an_unfinished_toy_is_refused(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(toy.DataError, match="no finished toy"):
        toy.make_toy(tmp_path)
