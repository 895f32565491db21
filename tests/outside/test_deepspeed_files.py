"""DeepSpeed files as people have them: of R1-V, Video-R1, Qwen's scripts, Hugging Face's docs.

Run as a program with a folder, this file trains two steps with each of them in one process; the
test starts it. A real run of train.py with one of them is in test_trackers.py.
"""

import copy
import json
import sys
from pathlib import Path

import pytest
from conftest import run_script

import train
from common import engine, ranks
from common.data import DataError

FP16 = {
    "enabled": "auto",
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
ADAMW = {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
}
WARMUP = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
BATCH = {
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 100,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
HEAD = {"fp16": FP16, "bf16": {"enabled": "auto"}}
CPU = {"device": "cpu", "pin_memory": True}
NONE = {"device": "none", "pin_memory": True}
ZERO2 = {
    "stage": 2,
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 2e8,
    "contiguous_gradients": True,
}
ZERO3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
QWEN3 = {
    "reduce_bucket_size": 500000000,
    "stage3_prefetch_bucket_size": 500000000,
    "stage3_param_persistence_threshold": 10000000,
}
FILES = {
    "stage 0, as in BGE's examples": HEAD
    | {"zero_optimization": {"stage": 0}, "optimizer": ADAMW}
    | BATCH,
    "stage 1, as Video-R1": HEAD
    | {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}, "optimizer": ADAMW}
    | BATCH,
    "stage 2, as Video-R1": HEAD
    | {
        "zero_optimization": ZERO2 | {"offload_optimizer": NONE, "offload_param": NONE},
        "optimizer": ADAMW,
    }
    | BATCH,
    "stage 3, as Video-R1": HEAD
    | {
        "zero_optimization": ZERO3 | {"offload_optimizer": NONE, "offload_param": NONE},
        "optimizer": ADAMW,
    }
    | BATCH,
    "optimizer offloaded, as Hugging Face's stage 2": HEAD
    | {"zero_optimization": ZERO2 | {"offload_optimizer": CPU}, "optimizer": ADAMW}
    | BATCH,
    "both offloaded, as Video-R1's zero3_offload": HEAD
    | {
        "zero_optimization": ZERO3 | {"offload_optimizer": CPU, "offload_param": CPU},
        "optimizer": ADAMW,
    }
    | BATCH,
    "all auto without an optimizer, as Qwen's zero3": HEAD
    | {
        "zero_optimization": ZERO3 | QWEN3,
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
    }
    | {"gradient_accumulation_steps": "auto"},
    "scheduler auto, as R1-V's zero2": HEAD
    | {
        "zero_optimization": ZERO2 | {"offload_optimizer": CPU, "offload_param": CPU},
        "optimizer": ADAMW,
    }
    | {"scheduler": {"type": "WarmupDecayLR", "params": WARMUP | {"total_num_steps": "auto"}}}
    | BATCH,
}
NO_OPTIMIZER = "all auto without an optimizer, as Qwen's zero3"
SCHEDULER = "scheduler auto, as R1-V's zero2"

RATE = 1e-2
CLIP = 0.05  # far below the norms of these gradients
SETTINGS = dict(
    max_grad_norm=CLIP, weight_decay=0.1, per_device_train_batch_size=3, sft_per_device_batch_size=3
)


def changed(name, value):
    """The Video-R1 file of stage 3 with another value at a dotted key; None takes the key out."""
    config = copy.deepcopy(FILES["stage 3, as Video-R1"])
    *sections, key = name.split(".")
    place = config
    for section in sections:
        place = place.setdefault(section, {})
    place[key] = value
    if value is None:
        del place[key]
    return config


# ------------------------------------------------------------------------------------- the program


def batch(model, device):
    """One text prompt and a completion of eight tokens of it."""
    import torch

    from common.media import ModelInputs
    from common.policy import collate

    item = ModelInputs(torch.arange(40, 60), None, None, 1.0, [])
    completions = torch.arange(61, 69)[None, None]
    return (
        collate([item], model).to(device),
        completions.to(device),
        torch.ones_like(completions, dtype=torch.bool),
    )


def mean_loss(policy, model):
    prompts, completions, mask = batch(model, "cpu")
    logp, *_ = policy(prompts, completions, mask)
    return -(logp * mask).mean()


def losses_by_hand(checkpoint, betas):
    """Before the first step, after it and after the second one, by torch alone."""
    import torch
    from transformers import AutoModelForImageTextToText

    from common.policy import Policy

    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    policy = Policy(model)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=RATE, betas=betas, eps=1e-8, weight_decay=0.1
    )
    losses = []
    for _ in range(2):
        loss = mean_loss(policy, model)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
    losses.append(mean_loss(policy, model).item())
    return losses


def losses_of(file, checkpoint):
    """The same with the engine that a file asks for, and the loss of an engine for inference."""
    import torch

    settings = train.TrainArguments(deepspeed=str(file), **SETTINGS)
    frozen = engine.start_engine(settings, checkpoint)
    with torch.no_grad():
        reference = mean_loss(frozen, frozen.module.model).item()
    frozen.destroy()
    trained = engine.start_engine(settings, checkpoint, 3, 1, RATE)
    losses = []
    for _ in range(2):
        loss = mean_loss(trained, trained.module.model)
        losses.append(loss.item())
        engine.set_learning_rate(trained, 1, 10, RATE, 0.1)  # behind the warm-up: the peak
        trained.backward(loss)
        trained.step()
    losses.append(mean_loss(trained, trained.module.model).item())
    trained.destroy()
    return reference, losses


BAD = {
    "not json": ("{,}", "not valid JSON"),
    "a section's typo": (
        {"zero_optimisation": {"stage": 3}},
        "has zero_optimisation, which DeepSpeed does not know; is it zero_optimization?",
    ),
    "a list": ([], "is not a JSON object"),
    "no section": (changed("optimizer", 3), "optimizer in "),
    "no object": (changed("zero_optimization.offload_param", None) | {"bf16": None}, "bf16 in "),
    "fp16": (changed("fp16.enabled", True), "fp16"),
    "an auto of nobody": (
        changed("zero_optimization.sub_group_size", "auto"),
        " zero_optimization.sub_group_size;",
    ),
    "no type": (changed("optimizer.type", None), "no type"),
    "a monitor's typo": (changed("wandb.projects", "x"), "does not take"),
    "a word": (changed("zero_optimization.reduce_bucket_size", "large"), "does not take"),
    "no such stage": (changed("zero_optimization.stage", 7), "does not take"),
    "comet": (changed("comet.enabled", True), "pip install comet_ml"),
}
OVERRIDDEN = (
    changed("optimizer.params.lr", 0.5)
    | {
        "scheduler": {"type": "WarmupLR", "params": WARMUP},
        "gradient_clipping": 1.0,
        "train_batch_size": 256,
    }
    | {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8}
)


def said_by_check(file, log_main):
    lines = []
    engine.log_main = lines.append
    try:
        engine.check_deepspeed_file(train.TrainArguments(deepspeed=str(file), **SETTINGS))
    except DataError as error:
        lines.append(f"DataError: {error}")
    engine.log_main = log_main
    return lines


def main(folder, checkpoint):
    ranks.start_ranks()
    folder = Path(folder)
    found = {
        "hand": losses_by_hand(checkpoint, (0.9, 0.999)),
        "hand, ours": losses_by_hand(checkpoint, (0.9, 0.95)),
    }
    for name, config in FILES.items():
        file = folder / "file.json"
        file.write_text(json.dumps(config))
        found[name] = losses_of(file, checkpoint)
    log_main = engine.log_main
    bad = {name: config for name, (config, _) in BAD.items()}
    for name, config in (bad | {"overridden": OVERRIDDEN} | FILES).items():
        file = folder / "file.json"
        file.write_text(config if isinstance(config, str) else json.dumps(config))
        found[f"said, {name}"] = said_by_check(file, log_main)
    (folder / "found.json").write_text(json.dumps(found))


# --------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def found(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    run_script(__file__, folder, checkpoint)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", FILES)
def test_a_file_as_people_have_it_trains_as_torch_does(found, name):
    reference, losses = found[name]
    expected = found["hand, ours"] if name == NO_OPTIMIZER else found["hand"]
    assert expected[0] - expected[2] > 0.1
    assert losses == pytest.approx(expected, abs=2e-4)
    assert reference == pytest.approx(expected[0], abs=2e-4)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_before_anything_is_loaded(found, name):
    (line,) = found[f"said, {name}"]
    assert line.startswith("DataError: ") and BAD[name][1] in line


def test_what_a_file_says_in_vain_is_in_the_log(found):
    lines = [line.partition(": ")[2] for line in found["said, overridden"]]
    assert lines == [
        *(
            f"{words} is not used, the flags of train.py decide it"
            for words in (
                "train_batch_size 256",
                "train_micro_batch_size_per_gpu 4",
                "gradient_accumulation_steps 8",
                "optimizer.params.lr 0.5",
                f"scheduler {OVERRIDDEN['scheduler']}",
            )
        ),
        "gradient_clipping 1.0 is used, --max_grad_norm 0.05 is not",
    ]


def test_a_file_of_autos_says_little(found):
    for name in FILES:
        lines = " ".join(found[f"said, {name}"])
        assert ("scheduler {" in lines) == (name == SCHEDULER)
        assert ("has no optimizer" in lines) == (name == NO_OPTIMIZER)
        assert "DataError" not in lines and " is used" not in lines


def filled(config, folder, gpu, monkeypatch):
    monkeypatch.setattr(engine.torch.cuda, "is_available", lambda: gpu)
    (folder / "file.json").write_text(json.dumps(config))
    settings = train.TrainArguments(
        deepspeed=str(folder / "file.json"), max_grad_norm=0.7, weight_decay=0.02
    )
    return engine.deepspeed_config(settings, 100, 3, 5, 0.25)


def test_every_auto_has_hugging_face_s_value(alone, tmp_path, monkeypatch):
    monitors = {
        name: {"enabled": True} for name in ("tensorboard", "wandb", "comet", "csv_monitor")
    }
    config = filled(
        FILES["stage 3, as Video-R1"] | {"scheduler": {}} | monitors, tmp_path, True, monkeypatch
    )
    assert "auto" not in json.dumps(config)
    assert config["zero_optimization"] == {
        **ZERO3,
        "offload_optimizer": NONE,
        "offload_param": NONE,
        "reduce_bucket_size": 10000,
        "stage3_prefetch_bucket_size": 9000,
        "stage3_param_persistence_threshold": 1000,
    }
    # On a GPU the optimizer is DeepSpeed's own, as the file's words mean there.
    assert config["optimizer"] == {
        "type": "AdamW",
        "params": {"lr": 0.25, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.02},
    }
    assert config["bf16"] == {"enabled": True} and config["fp16"]["enabled"] is False
    assert {name: config[name] for name in BATCH if name in config} == {
        "gradient_accumulation_steps": 5,
        "gradient_clipping": 0.7,
        "steps_per_print": 100,
        "train_micro_batch_size_per_gpu": 3,
        "wall_clock_breakdown": False,
    }
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}  # Trainer leaves it to the user
    assert config.keys() == {
        *("fp16", "bf16", "zero_optimization", "optimizer", "data_types"),
        *BATCH,
    } - {"train_batch_size"}


@pytest.mark.parametrize(
    ("gpu", "offload", "torch_adam"), [(True, False, True), (True, True, None), (False, True, True)]
)
def test_a_file_without_an_optimizer_gets_ours(
    alone, tmp_path, monkeypatch, gpu, offload, torch_adam
):
    zero = ZERO3 | ({"offload_optimizer": CPU} if offload else {})
    config = filled({"zero_optimization": zero}, tmp_path, gpu, monkeypatch)
    parameters = {"betas": [0.9, 0.95], "lr": 0.25, "weight_decay": 0.02}
    if torch_adam:
        parameters |= {"torch_adam": True, "fused": True}
    assert config["optimizer"] == {"type": "AdamW", "params": parameters}
    assert config["gradient_clipping"] == 0.7


LINEAR = {"memory_efficient_linear": True}


@pytest.mark.parametrize(
    ("gpu", "given", "used"), [(True, {}, None), (False, {}, False), (False, LINEAR, True)]
)
def test_linear_layers_of_zero_3_are_off_on_a_cpu(alone, tmp_path, monkeypatch, gpu, given, used):
    config = filled({"zero_optimization": ZERO3 | given}, tmp_path, gpu, monkeypatch)
    assert config["zero_optimization"].get("memory_efficient_linear") is used


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
