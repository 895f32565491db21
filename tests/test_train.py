"""train.py as a user runs it: the deepspeed launcher, a small toy, one CPU rank (ZeRO-2) and two
(ZeRO-3); and what it says to bad input.
"""

import copy
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import (
    ROOT,
    SMALL_GRPO,
    complain,
    launch,
    metrics,
    run_script,
    shared_folder,
    weights,
)
from huggingface_hub import ModelCard

import reward
import train
from common.data import DataError, Example, Prior, load_examples
from common.engine import choose_trained, update_averages, write_shards
from common.flags import Parser
from common.media import Encoder, PromptFlags
from common.policy import Policy, collate


def test_the_whole_path(small_toy, first_run):
    output, done = first_run
    assert "held-out accuracy, greedy" in done.stdout + done.stderr
    result = json.loads((output / "result.json").read_text())
    heldout = json.loads((small_toy / "heldout.json").read_text())
    expected = {
        "greedy",
        "sampled",
        "greedy/conflict",
        "consensus",
        "evidence_use",
        "paper_consensus",
        "paper_evidence_use",
    }
    assert expected <= set(result["before"]) and expected <= set(result["after"])
    # sampled-frame shares of the evidence, averaged by hand over the held-out questions: 2 of
    # 16 frames a 2 s slot
    chance = sum((row["evidence"][0][1] - row["evidence"][0][0]) / 16 for row in heldout) / len(
        heldout
    )
    assert result["before"]["evidence_chance"] == pytest.approx(chance, abs=1e-6)
    assert len(metrics(output, "sft")) == 2 and len(metrics(output, "grpo")) == 2
    for record in metrics(output, "grpo"):
        assert record["reward/total"] == pytest.approx(
            sum(
                record[f"reward/{name}"]
                for name in ("accuracy", "format", "length", "temporal", "consensus")
            ),
            abs=1e-5,
        )
        assert 0 < record["consensus/score"] < 1 and record["data/skipped"] == 0
    assert metrics(output, "grpo")[0]["loss/kl"] == pytest.approx(
        0, abs=1e-6
    )  # the policy starts as its reference
    assert all(
        record["loss/ratio"] == pytest.approx(1, abs=1e-6) for record in metrics(output, "grpo")
    )  # one update a rollout
    # The model can be shared: its card has the same numbers.
    card = ModelCard.load(output / "grpo" / "README.md")
    before, after = (f"{result[part]['greedy']:.4f}" for part in ("before", "after"))
    assert f"| accuracy, greedy | {before} | {after} |" in card.text
    assert f"\n{len(heldout)} questions of" in card.text
    rollouts = [json.loads(line) for line in (output / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 2 * 4 * 4 and all(
        abs(sum(row["use"]) - 1) < 1e-2 for row in rollouts if row["use"]
    )


def test_evaluate_agrees_with_the_table(small_toy, first_run, tmp_path):
    output, _ = first_run
    result = json.loads((output / "result.json").read_text())["after"]
    for name, temperature in (("greedy", 0), ("sampled", 1)):
        flags = [
            "--bench",
            small_toy / "heldout.json",
            "--min_pixels",
            3136,
            "--max_pixels",
            3136,
            "--max_completion_length",
            12,
            "--temperature",
            temperature,
            "--top_p",
            0.95,
            "--output",
            tmp_path / f"{name}.json",
        ]
        run_script("evaluate.py", "--model_name_or_path", output / "grpo", *flags)
        report = json.loads((tmp_path / f"{name}.json").read_text())
        assert report["n"] == 9 and report["accuracy"] == pytest.approx(result[name], abs=1e-6)


def test_training_moves_every_parameter_and_checkpoints_load(small_toy, first_run):
    output, _ = first_run
    start, sft = weights(small_toy / "model"), weights(output / "sft")
    assert start.keys() == sft.keys()
    assert [name for name in start if torch.equal(start[name], sft[name])] == []
    grpo = weights(output / "grpo")
    assert [name for name in sft if torch.equal(sft[name], grpo[name])] == []


def test_two_ranks_equal_one(small_toy, first_run, tmp_path):
    """In the first step: later a rounding could decide about a token."""
    output, _ = first_run
    flags = ["--toy_dir", small_toy, "--model_name_or_path", output / "sft", *SMALL_GRPO]
    launch(*flags, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", 2, ranks=2)
    one = metrics(output, "grpo")[0]
    two = metrics(tmp_path / "two", "grpo")[0]
    assert one["loss/grad_norm"] > 1e-3 and one["loss/zero_variance_groups"] < 1
    for name in ("loss/policy", "loss/kl", "reward/total", "consensus/score", "loss/grad_norm"):
        assert one[name] == pytest.approx(two[name], abs=1e-4), name


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_rank_without_a_question_leaves_those_of_the_others(
    stage, small_toy, first_run, tmp_path
):
    """Four questions, one of them too long: two ranks of one a forward train three, as one does."""
    file = {"sft": "train_cot.json", "grpo": "train.json"}[stage]
    rows = json.loads((small_toy / file).read_text())
    rows = [row for row in rows if row["data_type"] == "video"][:4]
    rows[0]["problem"] = "Why " * 400
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    flags = ["--dataset_name", data, "--model_name_or_path", first_run[0] / "sft"]
    flags += ["--stage", stage, "--decode_workers", 0, "--save_steps", 0]
    flags += ["--media_root", small_toy, "--min_pixels", 784, "--max_pixels", 784]
    flags += ["--max_prompt_length", 400]
    names = ["loss/sft", "loss/grad_norm"]
    batch = "--sft_per_device_batch_size"
    accumulation = "--sft_gradient_accumulation_steps"
    if stage == "grpo":
        flags += [*SMALL_GRPO, "--prior", "no_semantic", "--max_steps", 1]
        names = ["loss/policy", "loss/grad_norm", "reward/total", "rollout/length"]
        batch = "--per_device_train_batch_size"
        accumulation = "--gradient_accumulation_steps"
    launch(*flags, "--output_dir", tmp_path / "one", batch, 4)
    launch(*flags, "--output_dir", tmp_path / "two", batch, 1, accumulation, 2, ranks=2)
    (one,) = metrics(tmp_path / "one", stage)
    (two,) = metrics(tmp_path / "two", stage)
    assert one["loss/grad_norm"] > 1e-3 and one["data/skipped"] == two["data/skipped"] == 1
    for name in names:
        assert one[name] == pytest.approx(two[name], abs=1e-4), name
    if stage == "grpo":
        # Rank 0 writes its own group, and not the one that it has borrowed.
        assert (tmp_path / "two" / "rollouts.jsonl").read_text().count("\n") == 4


def rows_of(small_toy, count=12):
    return [
        row
        for row in json.loads((small_toy / "train.json").read_text())
        if row["data_type"] == "video"
    ][:count]


def test_a_broken_video_is_skipped_counted_and_named(small_toy, first_run, tmp_path):
    rows = rows_of(small_toy)
    shutil.copytree(small_toy / "videos", tmp_path / "videos")
    (tmp_path / "videos" / "bad.mp4").write_text("no video")
    rows[3]["path"] = "videos/bad.mp4"
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    done = launch(
        "--dataset_name",
        data,
        "--model_name_or_path",
        first_run[0] / "sft",
        "--output_dir",
        tmp_path / "out",
        "--clip",
        f"local-dir:{small_toy}/clip",
        "--max_pixels",
        3136,
        "--min_pixels",
        3136,
        "--num_generations",
        2,
        "--max_completion_length",
        4,
        "--beta",
        0,
        "--per_device_train_batch_size",
        5,
    )
    skipped = json.loads((tmp_path / "out" / "result.json").read_text())["skipped"]
    assert list(skipped) == [rows[3]["problem_id"]] and "bad.mp4" in skipped[rows[3]["problem_id"]]
    assert "bad.mp4" in done.stdout + done.stderr
    assert [record["data/skipped"] for record in metrics(tmp_path / "out", "grpo")] == [
        1,
        1,
    ]  # 11 usable questions, two steps of five


def test_bad_input_ends_with_one_sentence(small_toy, first_run, tmp_path):
    sft = first_run[0] / "sft"
    assert "--no_such_flag" in complain("--no_such_flag", "1")
    if not torch.cuda.is_available():
        assert "--cuda_graph needs a GPU" in complain("--cuda_graph", "true")
    assert "not found" in complain(
        "--dataset_name",
        tmp_path / "none.json",
        "--model_name_or_path",
        sft,
        "--output_dir",
        tmp_path / "a",
    )
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{**row, "path": ""} for row in rows_of(small_toy, 4)]))
    assert f"0 usable questions of {data} (4 skipped)" in complain(
        "--dataset_name",
        data,
        "--media_root",
        small_toy,
        "--model_name_or_path",
        sft,
        "--output_dir",
        tmp_path / "b",
    )


def test_frame_sets_in_the_data_are_the_prior(small_toy, first_run, tmp_path):
    data, sets, priors = tmp_path / "data.json", tmp_path / "sets.json", tmp_path / "priors.jsonl"
    data.write_text(json.dumps(rows_of(small_toy, 5)))
    run_script(
        "prior.py",
        "--dataset_name",
        data,
        "--media_root",
        small_toy,
        "--output",
        priors,
        "--clip",
        f"local-dir:{small_toy}/clip",
    )
    rows = {row["problem_id"]: row for row in rows_of(small_toy, 5)}
    for row in map(json.loads, priors.read_text().splitlines()):
        frames = row["frames"]
        rows[row["problem_id"]]["frame_sets"] = {
            "uniform": frames,
            "scene": [frames[position] for position in row["scene"]],
            "semantic": [frames[position] for position in row["semantic"]],
        }
    sets.write_text(json.dumps(list(rows.values())))
    launch(
        "--dataset_name",
        sets,
        "--media_root",
        small_toy,
        "--model_name_or_path",
        first_run[0] / "sft",
        "--output_dir",
        tmp_path / "out",
        "--clip",
        "local-dir:none",
        "--max_pixels",
        3136,
        "--min_pixels",
        3136,
        "--num_generations",
        2,
        "--max_completion_length",
        4,
        "--beta",
        0,
        "--per_device_train_batch_size",
        5,
    )  # no CLIP is there, none is needed
    built, used = (
        {row["problem_id"]: row for row in map(json.loads, file.read_text().splitlines())}
        for file in (priors, tmp_path / "out" / "priors_training.jsonl")
    )
    assert len(built) == 5 and built.keys() == used.keys()
    for problem, row in built.items():
        assert all(
            row[key] == used[problem][key]
            for key in ("frames", "times", "scene", "semantic", "prior")
        )
    rollouts = [
        json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()
    ]
    assert len(rollouts) >= 10 and all(
        record["prior"] == built[record["problem_id"]]["prior"] for record in rollouts
    )


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen3VL"])
def test_other_families_train(family, small_toy, tmp_path):
    """A random checkpoint of the family, with its own processor and the toy's tokenizer, saved and
    trained as a user's would be.
    """
    old = transformers.AutoProcessor.from_pretrained(small_toy / "model")
    tokenizer, token, later = (
        old.tokenizer,
        old.tokenizer.convert_tokens_to_ids,
        family == "Qwen3VL",
    )
    patches = dict(patch_size=16 if later else 14, temporal_patch_size=2)
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        initializer_range=0.1,
    )
    vision = dict(
        depth=2, num_heads=4, spatial_merge_size=2, hidden_size=64, initializer_range=0.1, **patches
    )
    deep = dict(
        intermediate_size=96,
        out_hidden_size=64,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    )
    vision |= deep if later else dict(embed_dim=64)
    ids = {
        name: token(f"<|{word}|>")
        for name, word in (
            ("image_token_id", "image_pad"),
            ("video_token_id", "video_pad"),
            ("vision_start_token_id", "vision_start"),
            ("vision_end_token_id", "vision_end"),
        )
    }
    config = getattr(transformers, f"{family}Config")(
        text_config=text | (dict(head_dim=16) if later else {}),
        vision_config=vision,
        **ids,
        tie_word_embeddings=False,
    )
    getattr(transformers, f"{family}ForConditionalGeneration")(config).save_pretrained(
        tmp_path / "model"
    )
    getattr(transformers, f"{family}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(**patches, merge_size=2),
        tokenizer=tokenizer,
        chat_template=old.chat_template,
        video_processor=getattr(transformers, f"{family}VideoProcessor")(**patches, merge_size=2),
    ).save_pretrained(tmp_path / "model")
    launch(
        "--dataset_name",
        small_toy / "train.json",
        "--model_name_or_path",
        tmp_path / "model",
        "--output_dir",
        tmp_path / "out",
        *SMALL_GRPO,
        "--per_device_train_batch_size",
        4,
        "--min_pixels",
        4096,
        "--max_pixels",
        12544,
        "--prior",
        "no_semantic",
    )
    first, second = metrics(tmp_path / "out", "grpo")
    assert (
        first["loss/kl"] == pytest.approx(0, abs=1e-6)
        and second["loss/kl"] > 1e-9
        and second["loss/grad_norm"] > 1e-3
    )
    before, after = weights(tmp_path / "model"), weights(tmp_path / "out" / "grpo")
    assert [name for name in before if torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize(
    "kind, answer, earned",
    [
        ("numerical", "5", True),
        ("numerical", "1,200.5", True),
        ("numerical", "50%", False),
        ("numerical", "two", False),
        ("regression", "-3.5", True),
        ("regression", "0", False),
        ("regression", "3 m", False),
        ("free-form", "a man runs", True),
        ("free-form", "red", True),
        ("free-form", "он", False),
        ("OCR", "он", True),
        ("OCR", "5% off", True),
        ("multiple choice", "B", True),
        ("multiple choice", "A,C", True),
        ("multiple choice", "Yes", True),
    ],
)
def test_what_no_answer_can_earn(kind, answer, earned):
    cause = f"its own solution '{answer}' scores 0 as {kind}, so no answer can earn it"
    assert train.unearnable(Example("1", "?", [], kind, answer)) == (None if earned else cause)
    assert (
        train.plain_cause(cause)
        == f"its own solution ... scores ... as {kind}, so no answer can earn it"
    )


# ------------------------------------------------------------------------------------- the recipes


def test_bfloat16_with_gradient_checkpointing(cold_start, tmp_path):
    """What the configuration turns on by itself on a GPU, here by hand."""
    config = json.loads((ROOT / "ds_zero3.json").read_text()) | {"bf16": {"enabled": True}}
    (tmp_path / "bf16.json").write_text(json.dumps(config))
    checkpoint, flags = cold_start
    launch(
        *flags,
        "--deepspeed",
        tmp_path / "bf16.json",
        "--gradient_checkpointing",
        "true",
        "--max_steps",
        2,
        "--learning_rate",
        5e-3,  # two steps move a weight by more than bfloat16's spacing at 1
        "--per_device_train_batch_size",
        4,
        "--weight_decay",
        0,
        "--output_dir",
        tmp_path / "out",
    )
    first, second = metrics(tmp_path / "out", "grpo")
    assert first["loss/kl"] < 1e-6 < second["loss/kl"] and first["loss/zero_variance_groups"] < 1
    assert (
        1e-6 < first["rollout/logp_difference"] < 0.05
    )  # sampling and scoring round in other places
    before, after = weights(checkpoint), weights(tmp_path / "out" / "grpo")
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert [name for name in before if torch.equal(before[name].bfloat16(), after[name])] == []


@pytest.fixture(scope="session")
def cold_start(small_toy, tmp_path_factory):
    """A checkpoint that has learned short answers ("0s striped red 2."), so that every reward
    varies, and flags to go on from it.
    """
    folder = shared_folder(
        tmp_path_factory, "cold_start", lambda folder: make_cold_start(small_toy, folder)
    )
    flags = data_flags(small_toy, folder)
    return folder / "run" / "sft", [
        *flags,
        "--model_name_or_path",
        folder / "run" / "sft",
        "--clip",
        f"local-dir:{small_toy}/clip",
        "--max_steps",
        3,
        "--num_generations",
        4,
        "--max_completion_length",
        40,
    ]


def data_flags(small_toy, folder):
    """Flags that read the data of cold_start."""
    flags = ["--dataset_name", folder / "data.json", "--media_root", small_toy]
    return [*flags, "--min_pixels", 3136, "--max_pixels", 3136]


def make_cold_start(small_toy, folder):
    """The data and the run of cold_start."""
    folder.mkdir()
    rows = [
        row
        for row in json.loads((small_toy / "train_cot.json").read_text())
        if row["data_type"] == "video" and row["options"]
    ]
    for row in rows:
        row["process"] = f"<think>0s {row['grounding'][min(row['grounding'])]}.</think>"
    data = folder / "data.json"
    data.write_text(json.dumps(rows))
    flags = data_flags(small_toy, folder)
    launch(
        *flags,
        "--stage",
        "sft",
        "--model_name_or_path",
        small_toy / "model",
        "--sft_learning_rate",
        2e-3,
        "--sft_max_steps",
        40,
        "--sft_per_device_batch_size",
        8,
        "--output_dir",
        folder / "run",
    )


TERMS = {  # recipe -> terms that may differ from 0 beside accuracy and format
    "cfgrpo": {"length", "temporal", "consensus"},
    "grpo": set(),
    "tgrpo": {"length", "temporal"},
    "care": {"consistency"},
    "tw": set(),
    "video_r2": {"alignment"},
    "release": {"length", "temporal", "consensus"},
}
CONSTANTS = {  # method.md's, and evaluation.md's table of settings
    "cfgrpo": dict(
        cfr_weight=3.0,
        gate="soft",
        tau=0.1,
        use_order="mean_softmax",
        temporal_ratio=1.0,
        beta=0.04,
        learning_rate=5e-6,
        max_grad_norm=5.0,
        top_k=0,
    ),
    "grpo": dict(beta=0.04, clip_high=0.2, reduction="sequence"),
    "tgrpo": dict(temporal_gamma=0.3, length_bonus=0.2, top_k=50),
    "care": dict(
        consistency_coef=0.5,
        consistency_margin=0.01,
        beta=0.0,
        ema_decay=0.995,
        ema_steps=10,
        learning_rate=1e-6,
        top_k=50,
    ),
    "tw": dict(
        token_weight_alpha=1.7,
        reduction="token",
        clip_low=0.2,
        clip_high=0.28,
        beta=0.0,
        top_p=1.0,
        top_k=50,
        learning_rate=1e-6,
        max_grad_norm=20.0,
    ),
    "video_r2": dict(
        alignment_weight=1.0,
        alignment_buffer=2.0,
        alignment_threshold=0.75,
        temperature=0.9,
        top_k=50,
        beta=0.04,
        max_grad_norm=1.0,
    ),
    "release": dict(
        cfr_weight=5.0,
        gate="hard",
        tau=0.5,
        use_order="softmax_mean",
        temporal_ratio=0.8,
        learning_rate=1e-6,
        top_k=50,
    ),
}


@pytest.mark.parametrize("recipe", TERMS)
def test_every_recipe_trains(recipe, cold_start, tmp_path):
    checkpoint, flags = cold_start
    output = tmp_path / "out"
    launch(
        *flags,
        "--recipe",
        recipe,
        "--per_device_train_batch_size",
        4,
        "--length_low",
        5,
        "--weight_decay",
        0,
        "--output_dir",
        output,
    )
    records, settings = metrics(output, "grpo"), json.loads((output / "run.json").read_text())
    assert CONSTANTS[recipe].items() <= settings.items() and settings["length_low"] == 5
    assert len(records) == 3 and any(record["loss/zero_variance_groups"] < 1 for record in records)
    terms = {name.removeprefix("reward/") for name in records[0] if name.startswith("reward/")} - {
        "total"
    }
    for record in records:
        assert record["reward/total"] == pytest.approx(
            sum(record[f"reward/{name}"] for name in terms), abs=1e-5
        )
        assert 0 < record["rollout/logp_difference"] < 1e-4
    assert {name for name in terms if any(record[f"reward/{name}"] for record in records)} - {
        "accuracy",
        "format",
    } == TERMS[recipe]
    assert ("rollout/shuffled_accuracy" in records[0]) == ("temporal" in TERMS[recipe])
    result = json.loads((output / "result.json").read_text())
    assert (result["inverted"] > 0) == (recipe == "tw") and result["inverted"] + result[
        "not_invertible"
    ] <= 12
    before, after = weights(checkpoint), weights(output / "grpo")
    frozen = [name for name in before if ".visual." in name] if recipe in ("tw", "video_r2") else []
    assert [name for name in before if torch.equal(before[name], after[name])] == frozen


def test_an_sft_step_does_not_depend_on_how_it_is_split(cold_start, small_toy, tmp_path):
    """8 demonstrations as one forward, and as two forwards of 2 on each of two ranks. The source
    stops at another token than its template:
    what is saved stops at both."""
    shutil.copytree(small_toy / "model", tmp_path / "model")
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    end = generation["eos_token_id"]
    other = json.loads((tmp_path / "model" / "config.json").read_text())["text_config"][
        "pad_token_id"
    ]
    (tmp_path / "model" / "generation_config.json").write_text(
        json.dumps(generation | {"eos_token_id": other})
    )
    whole, flags = (
        metrics(cold_start[0].parent, "sft")[0],
        cold_start[1][: cold_start[1].index("--model_name_or_path")],
    )
    launch(
        *flags,
        "--stage",
        "sft",
        "--model_name_or_path",
        tmp_path / "model",
        "--sft_max_steps",
        1,
        "--sft_per_device_batch_size",
        2,
        "--sft_gradient_accumulation_steps",
        2,
        "--output_dir",
        tmp_path / "out",
        ranks=2,
    )
    (parts,) = metrics(tmp_path / "out", "sft")
    for name in ("loss/sft", "loss/grad_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4) and whole[name] > 0.1
    saved = json.loads((tmp_path / "out" / "sft" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [other, end] and other != end


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stage", "sft", "--learning_rate", "1e-6"], "--sft_learning_rate"),
        (["--stage", "sft", "--per_device_train_batch_size=2"], "--sft_per_device_batch_size"),
        (
            ["--stage", "sft", "--gradient-accumulation-steps", "2"],
            "--sft_gradient_accumulation_steps",
        ),
        (["--stage", "sft", "--num_train_epochs", "2"], "--sft_num_train_epochs"),
        (["--stage", "sft", "--max_steps", "3"], "--sft_max_steps"),
        (["--stage", "sft", "--beta", "0"], "does not read --beta: it is GRPO's"),
        (["--stage", "sft", "--no_temporal"], "does not read --temporal"),
        (
            ["--stage", "grpo", "--sft_questions_per_medium", "4"],
            "--stage grpo does not read --sft_questions_per_medium: it is SFT's",
        ),
        (["--stage", "grpo", "--sft_learning_rate", "1e-6"], "its own is --learning_rate"),
    ],
)
def test_flags_that_a_stage_does_not_read_are_refused(monkeypatch, flags, words):
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--model_name_or_path", "m", "--dataset_name", "d.json", *flags]
    )
    with pytest.raises(DataError, match=re.escape(words)):
        train.parse_arguments()


def test_steps_come_from_epochs(monkeypatch):
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 2)
    flags = dict(
        sft_max_steps=-1,
        sft_num_train_epochs=2.5,
        sft_per_device_batch_size=1,
        sft_gradient_accumulation_steps=2,
        sft_learning_rate=1e-5,
    )

    def steps(count, **more):
        plan = train.schedule(SimpleNamespace(**flags | more), "sft")
        examples = [SimpleNamespace(media=[])] * count
        return plan.steps(train.Questions(plan.order(examples, 0), "d.json"))

    assert steps(10) == 6  # 25 demonstrations, four a step
    assert steps(10, sft_max_steps=7) == 7
    words = "3 usable questions of d.json .0 skipped. are fewer than one step's 4"
    with pytest.raises(DataError, match=words):
        steps(3, sft_num_train_epochs=1.0)


def test_several_updates_on_the_same_rollouts(cold_start, tmp_path):
    flags = [
        *cold_start[1],
        "--num_iterations",
        2,
        "--max_steps",
        1,
        "--learning_rate",
        1e-3,
        "--gradient_accumulation_steps",
        2,
        "--per_device_train_batch_size",
        2,
    ]
    launch(*flags, "--output_dir", tmp_path / "out")
    (record,) = metrics(tmp_path / "out", "grpo")
    # the first update has ratio 1 and, the reference being the policy, no KL; the means over
    # both are not those of the first
    assert abs(record["loss/ratio"] - 1) > 1e-6 and record["loss/kl"] > 1e-5
    assert (
        len((tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()) == 4 * 4
    )  # sampled once


def test_the_reference_follows_the_policy_on_every_rank(cold_start, tmp_path):
    launch(
        *cold_start[1],
        "--recipe",
        "care",
        "--beta",
        0.1,
        "--ema_decay",
        0,
        "--ema_steps",
        2,
        "--learning_rate",
        1e-3,
        "--output_dir",
        tmp_path / "out",
        "--per_device_train_batch_size",
        2,
        "--eval_dataset_name",
        cold_start[1][3] / "heldout.json",
        "--eval_steps",
        3,
        ranks=2,
    )
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    during = [
        {name: value for name, value in record.items() if name.startswith("eval/")}
        for record in metrics(tmp_path / "out", "grpo")
    ]
    assert during == [
        {},
        {},
        {f"eval/{name}": pytest.approx(value) for name, value in result["after"].items()},
    ]
    assert (
        10 < result["before"]["length"] < 40
    )  # scored, though the ranks' completions end at different times
    start, moved, followed = (record["loss/kl"] for record in metrics(tmp_path / "out", "grpo"))
    assert (
        start == pytest.approx(0, abs=1e-7)
        and moved > 1e-5
        and followed == pytest.approx(0, abs=1e-7)
    )


def micro_batch(toy_folder, toy_processor, toy_model, texts, *flags, cut=()):
    """One question's group with these completions through train.learn(): its loss, values, mask,
    log-probs of policy and reference.
    """
    example = next(
        example
        for example in load_examples(toy_folder / "train.json")
        if example.options and example.media_type == "video"
    )
    arguments = Parser(train.TrainArguments, "").parse_args_into_dataclasses(
        ["--temporal", "false", "--length_bonus", "0", "--cfr_weight", "0", *flags]
    )[0]
    texts = [
        text.format(right=example.answer, wrong="BA"[ord(example.answer) - 65]) for text in texts
    ]
    encoder = Encoder(toy_processor, PromptFlags(min_pixels=56 * 56, max_pixels=56 * 56))
    tokenizer = toy_processor.tokenizer
    ids = [tokenizer(text).input_ids for text in texts]
    completions = torch.full((1, len(ids), max(map(len, ids))), tokenizer.eos_token_id)
    for row, tokens in zip(completions[0], ids, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    mask = torch.tensor(
        [[[place < len(tokens) for place in range(completions.shape[2])] for tokens in ids]]
    )
    torch.manual_seed(0)
    other = copy.deepcopy(toy_model)
    with torch.no_grad():
        other.lm_head.weight.add_(0.3 * torch.randn_like(other.lm_head.weight))
    losses = []

    class Engine(Policy):
        device, module, backward = (
            torch.device("cpu"),
            SimpleNamespace(model=toy_model),
            staticmethod(losses.append),
        )

    rows = {
        example.id: Prior(
            example.id, frames=[0, 10, 20, 30], times=[0.0, 2.5, 5.0, 7.5], prior=[0.25] * 4
        )
    }
    item = encoder.encode(example, rows[example.id])
    truncated = torch.tensor([[number in cut for number in range(len(ids))]])
    rollouts = train.Rollouts(
        examples=[example],
        priors=[rows[example.id]],
        prompts=collate([item], toy_model),
        completions=completions,
        mask=mask,
        truncated=truncated,
        logp=torch.zeros(mask.shape),
        texts=[texts],
        control_texts=[None],
    )
    run = SimpleNamespace(args=arguments, processor=toy_processor, write=lambda *_: None)
    log = train.StepLog("grpo", 0)
    train.weigh_forwards(arguments, [rollouts])
    train.learn(run, Engine(toy_model), Policy(other), rollouts, log)
    values = log.values
    with torch.no_grad():
        logps = [
            Policy(model)(collate([item], model), completions, mask, weight_alpha=1.7)
            for model in (toy_model, other)
        ]
    return losses[0], values, mask[0], logps, example, texts


def test_the_consistency_bonus_asks_the_reference(
    toy_folder, toy_processor, toy_model, alone, monkeypatch
):
    def bonus_of_every_answer(accuracy, likelihood, coef, margin):
        return coef * accuracy * likelihood.nan_to_num(0.0)

    monkeypatch.setattr(reward, "consistency_bonus", bonus_of_every_answer)
    texts = [
        "<think>a</think><answer>{right}</answer>",
        "<think>red it is</think><answer>{right}</answer>",
        "<think>a</think><answer>{wrong}</answer>",
        "<think>b</think>",
    ]
    _, values, mask, ((own, *_), (reference, *_)), _, texts = micro_batch(
        toy_folder,
        toy_processor,
        toy_model,
        texts,
        "--consistency_coef",
        "0.5",
    )
    answered = [
        toy_processor.tokenizer(text.split("<answer>")[0] + "<answer>").input_ids
        for text in texts[:3]
    ]
    likelihoods = [
        [logp[0, row, len(ids)].exp().item() for row, ids in enumerate(answered)]
        for logp in (own, reference)
    ]  # of one letter
    assert all(abs(a / b - 1) > 0.1 for a, b in zip(*likelihoods, strict=True))
    bonus = [
        0.5 * likelihoods[1][0],
        0.5 * likelihoods[1][1],
        0.0,
        0.0,
    ]  # right, right, wrong, no answer
    assert values["reward/consistency"] == pytest.approx(bonus, rel=1e-4)
    assert values["reward/total"] == pytest.approx([2 + bonus[0], 2 + bonus[1], 1, 0], rel=1e-4)


def test_every_metric_of_a_step_is_in_the_glossary(toy_folder, toy_processor, toy_model, alone):
    """Names as they are logged, those of the reward terms included: rewards() has the only list."""
    flags = ["--consistency_coef", "0.5", "--alignment_weight", "1", "--token_weight_alpha", "1.7"]
    texts = ["<think>a</think><answer>{right}</answer>", "<answer>{wrong}</answer>"]
    _, values, *_ = micro_batch(toy_folder, toy_processor, toy_model, texts, *flags)
    assert {"reward/alignment", "reward/consistency", "consensus/score"} <= values.keys()
    glossary = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name in values if f"`{name}`" not in glossary] == []


def test_the_token_weights_enter_the_loss(toy_folder, toy_processor, toy_model, alone):
    texts = [
        "<think>a</think><answer>{right}</answer>",
        "<think>b c d</think><answer>{wrong}</answer>",
    ]
    flags = ["--token_weight_alpha", "1.7", "--reduction", "token", "--beta", "0"]
    loss, values, mask, ((logp, *_, weights), _), *_ = micro_batch(
        toy_folder, toy_processor, toy_model, texts, *flags
    )
    # rewards 2 and 1: mean 1.5, unbiased std 0.7071; at ratio 1 the loss is -sum(A w) / tokens
    advantage = 0.5 / (0.5**0.5 + 1e-4)
    expected = (
        -(advantage * weights[0, 0][mask[0]].sum() - advantage * weights[0, 1][mask[1]].sum())
        / mask.sum()
    )
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert values["rollout/logp_difference"] == pytest.approx(
        (-(logp[0] * mask).sum(1) / mask.sum(1)).tolist()
    )  # to the 0 when sampled
    assert (
        abs(loss.item() + advantage * (mask[0].sum() - mask[1].sum()).item() / mask.sum().item())
        > 1e-3
    )  # not that of weights 1


def test_truncated_completions_can_be_left_out_of_the_loss(
    toy_folder, toy_processor, toy_model, alone
):
    texts = ["<think>a</think><answer>{right}</answer>", "<think>b c d e f"]
    losses = {}
    for flag, cut in (("true", (1,)), ("false", (1,)), ("true", ())):
        flags = ["--mask_truncated_completions", flag, "--beta", "0"]
        loss, values, *_ = micro_batch(toy_folder, toy_processor, toy_model, texts, *flags, cut=cut)
        losses[flag, cut] = loss.item()
        assert values["rollout/truncated"] == [0, len(cut)]
    # rewards 2 and 0: advantages +-0.7071; at ratio 1 a completion's mean is -A, and the mean
    # over both cancels unless one is left out
    advantage = 1 / (2**0.5 + 1e-4)
    assert losses["true", (1,)] == pytest.approx(-advantage / 2, abs=1e-5)
    assert losses["false", (1,)] == losses["true", ()] == pytest.approx(0, abs=1e-6)


def test_the_mergers_alone_learn(other_family):
    model, items = other_family
    model = copy.deepcopy(model).train()
    choose_trained(model, SimpleNamespace(freeze_vision=False, train_only_merger=True))
    logp, *_ = Policy(model)(
        collate(items, model), torch.full((3, 1, 4), 70), torch.ones(3, 1, 4, dtype=torch.bool)
    )
    logp.sum().backward()
    moved = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }
    mergers = {
        name
        for name, _ in model.named_parameters()
        if ".merger." in name or ".deepstack_merger_list." in name
    }
    assert mergers and moved == mergers


def test_the_alignment_reward_is_gated_and_weighed(toy_folder, toy_processor, toy_model, alone):
    rows = json.loads((toy_folder / "train.json").read_text())
    row = next(row for row in rows if row["options"] and row["data_type"] == "video")
    start, sentence = next(iter(row["grounding"].items()))
    claim = f"At {start[:5]} {sentence}."
    texts = [
        f"<think>{claim}</think><answer>{{right}}</answer>",
        f"<think>{claim} At 00:01 an elephant.</think><answer>{{right}}</answer>",
        f"<think>{claim}</think><answer>{{wrong}}</answer>",
    ]
    _, values, *_ = micro_batch(
        toy_folder, toy_processor, toy_model, texts, "--alignment_weight", "0.8"
    )
    assert values["reward/alignment"] == pytest.approx(
        [0.8, 0.4, 0.0]
    )  # all claims match, one of two, a wrong answer


@pytest.mark.parametrize("answer", ["{right}", "{wrong}"])
def test_groups_of_equal_rewards_can_be_dropped(
    toy_folder, toy_processor, toy_model, answer, alone
):
    texts = [f"<think>{'a ' * n}</think><answer>{answer}</answer>" for n in range(1, 9)]
    losses = {}
    for degenerate in ("keep", "drop"):
        loss, values, mask, ((own, *_), (reference, *_)), *_ = micro_batch(
            toy_folder, toy_processor, toy_model, texts, "--degenerate", degenerate, "--beta", "0.5"
        )
        assert (
            values["loss/zero_variance_groups"] == [1] and values["loss/kl"][0] > 1e-3
        )  # logged, whatever becomes of it
        losses[degenerate] = loss.item()
    d = ((reference - own)[0] * mask).clamp(-10, 10)
    kl = ((d.exp() - d - 1) * mask).sum(1) / mask.sum(1)
    assert losses == pytest.approx({"keep": 0.5 * kl.mean().item(), "drop": 0}, abs=1e-3)


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
def test_a_step_does_not_depend_on_how_it_is_split(reduction, cold_start, tmp_path):
    """The first step: later a rounding could decide about a token."""
    flags = [
        *cold_start[1],
        "--reduction",
        reduction,
        "--max_steps",
        1,
        "--learning_rate",
        1e-4,
        "--beta",
        0.1,
    ]
    # questions in a forward, forwards, ranks
    splits = {"whole": (4, 1, 1), "parts": (1, 4, 1), "ranks": (1, 2, 2)}
    for name, (batch, accumulation, ranks) in splits.items():
        launch(
            *flags,
            "--per_device_train_batch_size",
            batch,
            "--gradient_accumulation_steps",
            accumulation,
            "--output_dir",
            tmp_path / name,
            ranks=ranks,
        )
    lines = (tmp_path / "whole" / "rollouts.jsonl").read_text().splitlines()
    assert len({json.loads(line)["text"] for line in lines}) > 4
    (one,) = metrics(tmp_path / "whole", "grpo")
    state = weights(tmp_path / "whole" / "grpo")
    assert one["loss/grad_norm"] > 1e-3
    for name in ("parts", "ranks"):
        (other,) = metrics(tmp_path / name, "grpo")
        assert other["loss/grad_norm"] == pytest.approx(one["loss/grad_norm"], rel=1e-3)
        assert other["reward/total"] == pytest.approx(one["reward/total"], abs=1e-5)
        moved = weights(tmp_path / name / "grpo")
        assert max((state[key] - moved[key]).abs().max().item() for key in state) < 1e-5


def test_a_moving_average_is_kept_in_float32():
    kept, moved = (
        SimpleNamespace(module=torch.nn.Linear(3, 2, bias=False).to(torch.bfloat16))
        for _ in range(2)
    )
    with torch.no_grad():
        kept.module.weight.fill_(1.0)
        moved.module.weight.fill_(2.0)
    averages = {}
    update_averages(averages, kept, 0.995)
    for _ in range(20):  # 2 - 0.995^20 = 1.0954; in bf16 1 + 0.005 is 1.0078 at best, or 1
        update_averages(averages, moved, 0.995)
    write_shards(kept, averages)
    torch.testing.assert_close(averages["weight"], torch.full((2, 3), 2 - 0.995**20))
    torch.testing.assert_close(
        kept.module.weight.data, torch.full((2, 3), 2 - 0.995**20).bfloat16()
    )
