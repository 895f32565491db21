"""Names, shapes and values in what save_model() writes, read with safetensors alone, against
checkpoints named as the hub's are.

As a script (that is what the test runs, once): FOLDER has sources/, made here without
train.py's code; each is loaded by start_engine()
at every ZeRO stage and saved by save_model() to FOLDER/saved/SOURCE-STAGE.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script, zero_stage
from safetensors.torch import load_file, save_file

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
TIED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # families with checkpoints of both kinds
MTP = "mtp.fc.weight"  # Qwen3.5's checkpoints have weights that transformers' model has not
HUB = "someone/model"


def hub_weights(model):
    """{name in a checkpoint of the hub: weight}, derived by hand: transformers 5 renamed the Qwen2
    families and turned the experts.
    """
    family, weights = model.config.model_type, {}
    for name, weight in model.state_dict().items():
        if family in ("qwen2_vl", "qwen2_5_vl"):
            name = name.replace("model.visual.", "visual.").replace(
                "model.language_model.", "model."
            )
        if ".experts." in name:
            weight = weight.mT
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            weights[name] = weight.contiguous().clone()
    return weights | ({MTP: torch.ones(2, 2)} if family == "qwen3_5" else {})


def misnamed(weights):
    """As transformers 5.24 wrote them under ZeRO-3."""
    wrong = {}
    for name, weight in weights.items():
        before = "model.language_model." if "model.language_model." in name else "model."
        is_text = name.startswith(before) and "visual" not in name
        wrong[name.replace(before, before + "model.", 1) if is_text else name] = weight
    return wrong


def write(folder, config, weights, shards=1):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return
    names, index = sorted(weights), {}
    for shard in range(shards):
        part = {name: weights[name] for name in names[shard::shards]}
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def make_sources(folder):
    from other_versions import model_config
    from transformers import AutoConfig, AutoModelForImageTextToText

    for family in FAMILIES:
        for tied in (True, False) if family in TIED else (False,):
            config = model_config(family, tied)
            (folder / "config.json").write_text(json.dumps(config))
            torch.manual_seed(0)
            weights = hub_weights(
                AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
            )
            source = folder / "sources" / f"{family}-{'tied' if tied else 'untied'}"
            write(source, config, weights)
            if family in ("qwen2_5_vl", "qwen3_vl_moe") and not tied:
                write(folder / "sources" / f"{family}-misnamed", config, misnamed(weights))
    # a model of the hub, in shards, as it lies in the cache
    weights = load_file(folder / "sources" / "qwen2_5_vl-untied" / "model.safetensors")
    config = json.loads((folder / "sources" / "qwen2_5_vl-untied" / "config.json").read_text())
    cached = folder / "hub" / f"models--{HUB.replace('/', '--')}"
    write(cached / "snapshots" / "abc", config, weights, shards=2)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    # one that lacks a weight
    weights.pop("model.norm.weight")
    write(folder / "sources" / "lacks", config, weights)


def save_all(folder):
    from huggingface_hub import constants
    from transformers import AutoProcessor

    from common import checkpoints, engine, ranks
    from common.data import DataError

    constants.HF_HUB_CACHE = str(folder / "hub")
    constants.HF_HUB_OFFLINE = True
    processor = AutoProcessor.from_pretrained(folder / "processor")
    ranks.start_ranks()

    def start(path, stage, lora_rank=0):
        (folder / "ds.json").write_text(json.dumps(zero_stage(stage)))
        settings = SimpleNamespace(
            deepspeed=str(folder / "ds.json"),
            max_grad_norm=1.0,
            weight_decay=0.0,
            ema_decay=1.0,
            lora_rank=lora_rank,
            lora_alpha=None,
            lora_targets="",
            freeze_vision=False,
            train_only_merger=False,
            gradient_checkpointing=False,
        )
        return engine.start_engine(settings, path, learning_rate=1e-6)

    def refused(work, *arguments):
        try:
            work(*arguments)
        except DataError as error:
            return str(error)

    for source in sorted((folder / "sources").glob("*-*")):
        stages = (0, 1, 2, 3) if source.name.endswith("-untied") else (0, 2, 3)
        for stage in stages:
            started = start(source, stage)
            checkpoints.save_model(started, processor, folder / "saved" / f"{source.name}-{stage}")
            started.destroy()
        if source.name.endswith("-untied"):
            # New adapters, which change nothing yet.
            started = start(source, 3, lora_rank=2)
            checkpoints.save_model(started, processor, folder / "saved" / f"{source.name}-lora")
            started.destroy()
    started = start(HUB, 0)
    checkpoints.save_model(started, processor, folder / "saved" / "hub-0")
    causes = {"lacks": [refused(start, folder / "sources" / "lacks", stage) for stage in (0, 3)]}
    # then save_pretrained writes transformers' own names
    started.module.model._weight_conversions = []
    causes["wrong"] = refused(
        checkpoints.save_model, started, processor, folder / "saved" / "wrong"
    )
    (folder / "causes.json").write_text(json.dumps(causes))


@pytest.fixture(scope="module")
def saved(toy_processor, tmp_path_factory):
    """The folder after the script, what it printed, and the errors that it met."""
    folder = tmp_path_factory.mktemp("names")
    make_sources(folder)
    toy_processor.save_pretrained(folder / "processor")
    done = run_script(__file__, folder)
    return folder, done.stdout, json.loads((folder / "causes.json").read_text())


def assert_same(one, other):
    assert sorted(one) == sorted(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, msg=name)


def test_names_shapes_and_values_are_those_of_the_source_for_every_family_and_stage(saved):
    folder, printed, _ = saved
    runs = [
        path
        for path in (folder / "saved").iterdir()
        if "misnamed" not in path.name and "-" in path.name
    ]
    assert len(runs) == 5 * 5 + 3 * 3 + 1
    assert len([run for run in runs if (run / "adapter" / "adapter_config.json").exists()]) == 5
    for run in runs:
        source = run.name.rpartition("-")[0].replace("hub", "qwen2_5_vl-untied")
        expected = load_file(folder / "sources" / source / "model.safetensors")
        expected.pop(MTP, None)
        assert_same(load_file(run / "model.safetensors"), expected)
    said = [line for line in printed.splitlines() if MTP in line]
    assert len(said) == 5 and all("1 weights of" in line and "not saved" in line for line in said)


def test_what_the_old_code_saved_loads_and_is_saved_with_the_right_names(saved):
    folder, printed, _ = saved
    for family in ("qwen2_5_vl", "qwen3_vl_moe"):
        expected = load_file(folder / "sources" / f"{family}-untied" / "model.safetensors")
        assert not expected.keys() & {
            "model.model.norm.weight",
            "model.language_model.model.norm.weight",
        }
        for stage in (0, 2, 3):
            assert_same(
                load_file(folder / "saved" / f"{family}-misnamed-{stage}" / "model.safetensors"),
                expected,
            )
    assert printed.count("has weights named model.model.") == 6


def test_weights_that_are_missing_or_would_get_other_names_end_the_run(saved):
    folder, _, causes = saved
    words = "lacks lacks 1 weights of a qwen2_5_vl model, the first is "
    for cause in causes["lacks"]:
        assert words + "model.language_model.norm.weight" in cause
    assert "56 weights in" in causes["wrong"]  # all but lm_head.weight
    assert (
        f"are not those of {HUB}: the first is model.language_model.embed_tokens.weight"
        in causes["wrong"]
    )
    assert (folder / "saved" / "wrong.unfinished" / "model.safetensors").exists() and not (
        folder / "saved" / "wrong"
    ).exists()


def test_transformers_4_finds_its_settings(saved):
    folder, *_ = saved
    for name, scaling in (
        ("qwen2_vl", {"type": "mrope", "mrope_section": [2, 3, 3]}),
        ("qwen2_5_vl", {"mrope_section": [2, 3, 3]}),
        ("qwen3_vl", {"mrope_interleaved": True, "mrope_section": [3, 3, 2]}),
        ("qwen3_vl_moe", {}),
    ):
        for tied in (True, False) if name in TIED else (False,):
            run = folder / "saved" / f"{name}-{'tied' if tied else 'untied'}-3"
            text = json.loads((run / "config.json").read_text())["text_config"]
            assert (
                text["rope_theta"] == 500000.0
                and text["rope_scaling"].items() >= {"rope_type": "default", **scaling}.items()
            )
            assert "rope_theta" not in text["rope_scaling"] and text["tie_word_embeddings"] is tied
            assert text.get("num_experts") == (4 if name == "qwen3_vl_moe" else None)
    tokenizer = json.loads((run / "tokenizer_config.json").read_text())
    assert (
        tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
        and "extra_special_tokens" not in tokenizer
    )


if __name__ == "__main__":
    save_all(Path(sys.argv[1]))
