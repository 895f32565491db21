"""common/engine.py under ZeRO-3, in a process of its own: sampling beside hooks, sums of gradients,
the optimizer's kind; and train.py's use of engines, clocks and its alarm.
"""

import gc
import json
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import banned_ids, zero_stage
from deepspeed.utils import safe_get_full_grad
from warm import run_script

import train
from common import checkpoints, engine, ranks
from common.data import DataError
from common.policy import collate, load_model
from common.rollout import Sampling, rollout


def living_numbers():
    """Numbers in all tensors that Python knows."""
    gc.collect()
    return sum(thing.numel() for thing in gc.get_objects() if torch.is_tensor(thing))


def main(folder, checkpoint):
    ranks.start_ranks()
    folder = Path(folder)
    found = {}
    file = folder / "zero3.json"
    file.write_text(json.dumps(zero_stage(3)))
    settings = train.TrainArguments(deepspeed=str(file), output_dir=str(folder))
    bare, _ = load_model(checkpoint)
    ids = torch.arange(20, 60)
    words = SimpleNamespace(input_ids=ids, kinds=[], slots=0, second_per_grid=1.0)
    prompts = collate([words], bare)
    choice = Sampling(6, banned_ids=banned_ids(bare))

    def sample(model):
        return rollout(model, prompts, [3], range(3), choice)

    expected = sample(bare)
    living = living_numbers()
    trained = engine.start_engine(settings, checkpoint, 1, 1, 1e-2)
    coordinator = trained.optimizer.parameter_offload.get_param_coordinator()
    traces = []
    for step in range(4):
        with engine.sampling(trained) as model:
            samples = sample(model)
            weight = model.lm_head.weight.clone()
        if step == 0:
            found["same tokens"] = torch.equal(samples.tokens, expected.tokens)
            found["difference"] = (samples.logp - expected.logp).abs().max().item()
            before = weight
        found["moved"] = (weight - before).abs().max().item()
        scored = trained(prompts, samples.tokens[None], samples.mask[None])
        trained.backward(-scored.logp.mean())
        trained.step()
        traces.append(coordinator.is_complete_trace())
    found["traces"] = traces
    found["left"] = sum(parameter.numel() for parameter in trained.twin.parameters())
    # What a checkpoint keeps of the optimizer, and what the run that goes on says.
    kept = folder / "kept"
    trained.save_checkpoint(str(kept), "deepspeed", save_latest=False)
    torch.save({"rng": torch.get_rng_state()}, kept / "rank0.pt")
    for group in trained.optimizer.param_groups:
        group["weight_decay"] = 50.0
    resume = {"stage": "sft", "step": 4, "folder": str(kept)}
    saver = checkpoints.Checkpoints(settings, None, resume, {})
    found["goes on"] = saver.load(trained, "sft")
    saver.release()
    found["decays"] = [group["weight_decay"] for group in trained.optimizer.param_groups]
    optimizer = trained.optimizer.optimizer
    found["optimizer"] = [type(optimizer).__name__, optimizer.defaults["fused"]]

    engine.end_engine(trained)
    del coordinator, optimizer, scored, before, weight, group, saver
    weights = sum(parameter.numel() for parameter in bare.parameters())
    found["kept"] = (living_numbers() - living) / weights

    # bfloat16 weights: many small gradients behind a large one are lost in a sum of that type.
    for stage in (2, 3):
        content = zero_stage(stage) | {"bf16": {"enabled": True}}
        (folder / "bf16.json").write_text(json.dumps(content))
        settings.deepspeed = str(folder / "bf16.json")
        forwards = 33
        trained = engine.start_engine(settings, checkpoint, 1, forwards, 1e-2)
        weight = trained.module.model.model.language_model.layers[0].mlp.up_proj.weight
        gradients = []
        for number in range(forwards):
            trained.set_gradient_accumulation_boundary(False)
            logp = trained(prompts, expected.tokens[None], expected.mask[None]).logp
            trained.backward(logp.mean() * (1.0 if number == 0 else 2**-10))
            gradients.append(safe_get_full_grad(weight).double())
        large = gradients[0].abs() > gradients[0].abs().median()
        ratio = (gradients[-1] / gradients[0])[large]
        found[f"ratio {stage}"] = [ratio.min().item(), ratio.max().item()]
        trained.destroy()
    (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    run_script(__file__, folder, checkpoint)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize(
    "world, stages, told, zero",
    [
        (1, (2, 0), True, {"stage": 3}),
        (1, (2, 0), True, {"stage": 3, "offload_optimizer": None}),
        (2, (3, 3), False, {"stage": 3}),
        # What offloads needs it, and so does who says so.
        (1, (3, 3), False, {"stage": 3, "offload_optimizer": {"device": "cpu"}}),
        (1, (3, 3), False, {"stage": 3, "offload_param": {"device": "none"}}),
        (1, (2, 0), False, {"stage": 2}),
        (1, (1, 0), False, {"stage": 1}),
    ],
)
def test_one_rank_runs_zero_2_instead_of_3(world, stages, told, zero, monkeypatch, tmp_path):
    monkeypatch.setattr(engine.dist, "get_world_size", lambda: world)
    lines = []
    monkeypatch.setattr(engine, "log_main", lines.append)
    file = tmp_path / "file.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    settings = train.TrainArguments(deepspeed=str(file), output_dir=str(tmp_path))
    for rate, stage in zip((1e-6, None), stages, strict=True):
        config = engine.deepspeed_config(settings, hidden_size=8, learning_rate=rate)
        assert config["zero_optimization"]["stage"] == stage
    engine.log_overrides(settings, engine.read_deepspeed_file(settings))
    assert ("ZeRO-2 runs instead of ZeRO-3" in " ".join(lines)) == told


def test_sampling_beside_the_hooks_keeps_the_trace(found):
    """DeepSpeed records the first forward and backward; from then on it knows the order."""
    assert found["traces"] == [False, True, True, True]
    assert found["same tokens"] and found["difference"] < 1e-5
    # it sees what training has changed, and holds it only while it samples
    assert found["moved"] > 1e-3 and found["left"] == 0


def test_nothing_stays_of_an_engine_that_has_ended(found):
    # weights, gradients, float32 copies and moments: destroy() alone keeps more than one of each
    assert found["kept"] < 0.01


def test_scores_are_by_the_engines_that_train(monkeypatch, tmp_path):
    """Before and after: another model beside the trained one would not fit."""
    done = []

    def start_engine(args, path, *rest):
        done.append(("start", "policy" if rest else "reference"))
        end = partial(done.append, "destroy")
        parts = dict(module=torch.nn.Identity(), optimizer=SimpleNamespace())
        return SimpleNamespace(name=done[-1][1], destroy=end, **parts)

    def score_heldout(run, engine):
        done.append(("score", engine.name))
        return {"greedy": len(done)}

    def stage_steps(run, name, engine, *rest):
        done.append(("train", engine.name))
        yield from ()

    for stand_in in (start_engine, score_heldout, stage_steps):
        monkeypatch.setattr(train, stand_in.__name__, stand_in)
    monkeypatch.setattr(train, "save_model", lambda *_: None)
    checkpoint = SimpleNamespace(release=lambda: None, load=lambda *_: (0, {}))
    for stage in ("sft", "both"):
        done.clear()
        args = train.TrainArguments(output_dir=str(tmp_path), stage=stage)
        run = SimpleNamespace(
            args=args,
            checkpoint=checkpoint,
            processor=None,
            demonstrations=None,
            training=None,
            heldout=SimpleNamespace(examples=[1]),
            progress=SimpleNamespace(start=lambda name: None),
            result={},
        )
        train.train_sft(run)
        scores = [("score", "policy")] * (stage == "sft")
        assert done == [("start", "policy"), ("train", "policy"), *scores, "destroy"]
    done.clear()
    train.train_grpo(run, "sft")
    steps = ["start policy", "score policy", "start reference", "train policy", "score policy"]
    assert done == [*(tuple(step.split()) for step in steps), "destroy"]
    assert run.result == {"before": {"greedy": 2}, "after": {"greedy": 5}}


def test_gradients_are_summed_in_float32(found):
    # in bfloat16 1 + 2**-10 is 1, and so is the sum
    for stage in (2, 3):
        assert found[f"ratio {stage}"] == pytest.approx([1 + 32 * 2**-10] * 2, abs=1e-3)


def test_a_run_that_goes_on_has_its_own_weight_decay(found):
    assert found["goes on"] == [4, {}] and found["decays"] == [50.0]


@pytest.mark.parametrize(
    "file, expected",
    [
        ({}, {"enabled": True}),
        ({"bf16": {"enabled": False}}, {"enabled": False}),
        ({"bfloat16": {"enabled": False}}, None),
        ({"torch_autocast": {"enabled": True}}, None),
    ],
)
def test_weights_are_bfloat16_on_a_gpu_unless_the_file_says_otherwise(
    file, expected, alone, monkeypatch, tmp_path
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    path = tmp_path / "file.json"
    path.write_text(json.dumps(file | {"zero_optimization": {"stage": 2}}))
    settings = train.TrainArguments(deepspeed=str(path), output_dir=str(tmp_path))
    for rate in (1e-6, None):
        config = engine.deepspeed_config(settings, hidden_size=8, learning_rate=rate)
        assert config.get("bf16") == expected


@pytest.mark.parametrize(
    "norm, weight, words",
    [
        (2.0, math.nan, None),
        (math.inf, 1.0, "the norm of the gradient is inf in step 3 of sft"),
        # ZeRO stage 0 tells no norm.
        (None, 1.0, None),
        (None, math.nan, "the norm of the gradient is nan in step 3 of sft"),
    ],
)
def test_a_gradient_that_is_not_finite_ends_sft(norm, weight, words, alone, monkeypatch):
    logp = torch.full((1, 1, 2), -1.0)

    class Engine:
        module = SimpleNamespace(model=None)
        backward = step = set_gradient_accumulation_boundary = lambda *_: None

        def __call__(self, *_):
            return SimpleNamespace(logp=logp)

        def get_global_grad_norm(self):
            return norm

        def parameters(self):
            return [torch.full((2,), weight, requires_grad=True), torch.tensor(math.nan)]

    pack = train.Demonstrations(None, None, None, torch.ones(1, 1, 2, dtype=torch.bool))
    monkeypatch.setattr(train, "pack_demonstrations", lambda *_: pack)
    checkpoint = SimpleNamespace(newest_checkpoint_text=lambda: "")
    run = SimpleNamespace(args=train.TrainArguments(), processor=None, checkpoint=checkpoint)
    log = train.StepLog("sft", 3)
    ready = [SimpleNamespace(example=SimpleNamespace(id="q"))]
    if words is None:
        train.sft_step(run, Engine(), [ready], log)
        assert log.values["loss/sft"] == [1.0] and ("loss/grad_norm" in log.values) == bool(norm)
    else:
        with pytest.raises(DataError, match=words):
            train.sft_step(run, Engine(), [ready], log)


def test_torch_s_adam_is_fused(found):
    assert found["optimizer"] == ["AdamW", True]


def test_cudnn_s_attention_is_off():
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_clocks_wait_for_the_device(monkeypatch):
    """A device that works for 3 s beside a host that has launched it at once."""
    clock = [0.0]

    def synchronize():
        clock[0] += 3 * working.pop() if working else 0

    working = []
    device = SimpleNamespace(synchronize=synchronize)
    monkeypatch.setattr(train.deepspeed, "get_accelerator", lambda: device)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    log = train.StepLog("grpo", 0)
    for _ in range(2):
        with log.seconds("policy"):
            working.append(1)
    working.append(1)  # another phase's
    with log.seconds("update"):
        pass
    assert log.values["time/policy"] == [6.0] and log.values["time/update"] == [0.0]


FULL = "[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file data/0"


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError("No space left on device"), DataError),
        (RuntimeError(FULL), DataError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("NCCL communicator was aborted"), RuntimeError),
    ],
)
def test_only_an_error_of_the_disk_is_said_to_be_one(error, raised, alone, tmp_path, monkeypatch):
    def save_model(*_):
        raise error

    monkeypatch.setattr(checkpoints, "save_model", save_model)
    args = train.TrainArguments(output_dir=str(tmp_path))
    saver = checkpoints.Checkpoints(args, None, {}, {})
    with pytest.raises(raised) as told:
        saver.save(None, "grpo", 1, {})
    assert (told.type is DataError) == ("could not be written" in str(told.value))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AssertionError(), "AssertionError"),
        (RuntimeError("Error(s) in loading state_dict for Policy:\n\tsize"), "Error(s) in loading"),
        (None, "No such file or directory"),
    ],
)
def test_a_checkpoint_that_does_not_load_is_named(error, words, alone, tmp_path):
    def load_checkpoint(*_, **__):
        if error:
            raise error

    resume = {"stage": "grpo", "step": 1, "folder": str(tmp_path)}
    saver = checkpoints.Checkpoints(train.TrainArguments(), None, resume, {})
    with pytest.raises(DataError) as told:
        optimizer = SimpleNamespace(param_groups=[])
        engine = SimpleNamespace(load_checkpoint=load_checkpoint, optimizer=optimizer)
        saver.load(engine, "grpo")
    saver.release()
    assert str(told.value).startswith(f"{tmp_path} cannot be loaded (")
    assert words in str(told.value) and "it must be whole" in str(told.value)


def test_a_log_on_a_full_disk_is_named(alone, tmp_path):
    args = train.TrainArguments(output_dir=str(tmp_path))
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    run = train.Run(args, None, None, None, {}, None)
    with pytest.raises(DataError, match="metrics.jsonl cannot be written: No space left"):
        run.write("metrics.jsonl", [{"stage": "sft", "step": 0}])


@pytest.fixture
def nothing_happens(alone, monkeypatch):
    """A Run whose steps have no questions and write nothing."""
    monkeypatch.setattr(train, "step_requests", lambda *_: [])
    monkeypatch.setattr(train, "set_learning_rate", lambda *_: None)
    nothing = SimpleNamespace(
        each=lambda batches: batches,
        show=lambda record: None,
        after_step=lambda *_: None,
        get_lr=lambda: [0.1],
    )
    monkeypatch.setattr(train, "Inputs", lambda *_: nothing)
    return SimpleNamespace(
        args=train.TrainArguments(),
        encoder=None,
        write=lambda *_: None,
        tracker=nothing,
        checkpoint=nothing,
    )


@pytest.mark.parametrize(("difference", "alarms"), [(0.09, 0), (0.3, 1)])
def test_sampling_that_differs_from_scoring_is_said(
    difference, alarms, nothing_happens, monkeypatch
):
    said = []
    monkeypatch.setattr(train, "log_main", said.append)
    run = nothing_happens
    kept = {"trained": True}
    for log, _ in train.stage_steps(run, "grpo", run.tracker, train.Questions([1]), 0, kept):
        log.add("rollout/logp_difference", [difference, difference])
    assert len(said) == alarms and all("logp_difference is 0.30" in line for line in said)


def test_a_stage_without_a_usable_question_is_no_success(nothing_happens, monkeypatch):
    run = nothing_happens
    questions = train.Questions([SimpleNamespace(id="a")] * 3, "rows.json", skipped={"a": "late"})
    words = "no question of rows.json can be used; the first: late"
    with pytest.raises(DataError, match=words):
        list(train.stage_steps(run, "grpo", run.tracker, questions, 0, {}))
    # Once it was there, and once it came too late: that is training. So is what went before.
    monkeypatch.setattr(train, "step_requests", lambda *_: ["a"])
    found = iter([["a"], [], []])
    monkeypatch.setattr(train, "take_usable", lambda *_: next(found))
    kept = {}
    assert len(list(train.stage_steps(run, "grpo", run.tracker, questions, 0, kept))) == 3
    monkeypatch.setattr(train, "take_usable", lambda *_: [])
    assert len(list(train.stage_steps(run, "grpo", run.tracker, questions, 2, kept))) == 1


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
