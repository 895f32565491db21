"""LoRA: adapters beside frozen weights, in single forwards and as train.py runs them."""

import copy
import importlib.util
import json
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    SMALL_GRPO,
    banned_ids,
    complain,
    launch,
    metrics,
    run_script,
    weights,
    zero_stage,
)
from pretend_gpu import PretendGpu
from safetensors.torch import load_file, save_file
from test_resume import assert_same_run

import evaluate
import train
from common import lora, sample_page
from common.data import DataError
from common.engine import (
    choose_trained,
    hookless_twin,
    sampling,
    score_without_adapters,
    update_averages,
)
from common.flags import Parser
from common.policy import Policy, collate, load_model
from common.rollout import Sampling, rollout
from visualize import SampleArguments


def adapt(model, *flags):
    """A Policy of a copy of the model, with new adapters."""
    words = ["--lora_rank", "4", *flags]
    (arguments,) = Parser(train.TrainArguments, "").parse_args_into_dataclasses(words)
    policy = Policy(copy.deepcopy(model))
    policy.source = "base"
    choose_trained(policy.model, arguments)
    lora.add_adapters(policy, arguments)
    return policy


def adapters(policy):
    return {name: value for name, value in policy.named_parameters() if value.requires_grad}


def move(policy):
    """Adapters as training may leave them."""
    generator = torch.Generator().manual_seed(0)
    for value in adapters(policy).values():
        value.data.copy_(0.1 * torch.randn(value.shape, generator=generator))


@torch.no_grad()
def score(policy, items, model=None):
    completions = torch.randint(70, 200, (len(items), 2, 5), generator=torch.manual_seed(1))
    prompts = collate(items, model or policy.model)
    return policy(prompts, completions, torch.ones_like(completions).bool()).logp


def engine_of(policy):
    return SimpleNamespace(module=policy, twin=hookless_twin(policy.model))


def test_a_rollout_sees_the_adapted_model_and_leaves_it_as_it_was(other_family):
    model, items = other_family
    policy = adapt(model)
    start = score(Policy(model), items)
    assert torch.equal(score(policy, items), start)  # new adapters change nothing
    move(policy)
    engine = engine_of(policy)
    before = copy.deepcopy(policy.state_dict())
    adapted = score(policy, items)
    assert (adapted - start).abs().max() > 0.1
    for _ in range(2):
        with sampling(engine) as twin:
            scored = score(Policy(twin), items)
            torch.testing.assert_close(scored, adapted, atol=1e-5, rtol=1e-5)
            pairs = zip(policy.model.named_parameters(), twin.parameters(), strict=True)
            replaced = [name for (name, one), two in pairs if not torch.equal(one, two)]
            assert replaced and all(name.endswith("base_layer.weight") for name in replaced)
        with sampling(engine, adapters=False) as twin:
            assert torch.equal(score(Policy(twin), items), start)
        assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
        assert torch.equal(score(policy, items), adapted)
        assert sum(value.numel() for value in engine.twin.parameters()) == 0


def test_the_reference_is_without_adapters_or_with_their_averages(talker, items):
    policy = adapt(talker)
    start = score(Policy(talker), items)
    move(policy)
    engine = engine_of(policy)
    averages = {}
    update_averages(averages, engine, 0.5)
    halfway = score(policy, items)
    for value in adapters(policy).values():
        value.data.mul_(3)
    adapted = score(policy, items)
    before = copy.deepcopy(policy.state_dict())

    def reference(averages):
        return score(partial(score_without_adapters, engine, averages), items, talker)

    assert torch.equal(reference({}), start)
    torch.testing.assert_close(reference(averages), halfway, atol=1e-5, rtol=1e-5)
    update_averages(averages, engine, 0.5)
    name, value = next(iter(adapters(policy).items()))
    torch.testing.assert_close(averages[name], 2 / 3 * value)  # (1 + 3) / 2 of what is now 3
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert torch.equal(score(policy, items), adapted)


def test_only_adapters_learn(other_family):
    model, items = other_family
    policy = adapt(model)
    move(policy)
    completions = torch.full((len(items), 1, 4), 70)
    mask = torch.ones_like(completions).bool()
    policy(collate(items, policy.model), completions, mask).logp.sum().backward()
    moved = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert moved == adapters(policy).keys() and len(moved) > 20
    assert all(".lora_A." in name or ".lora_B." in name for name in moved)
    assert all(adapters(policy)[name].grad.abs().sum() > 0 for name in moved)


@pytest.mark.parametrize(
    ("flags", "there", "absent"),
    [
        ((), (".visual.blocks.", ".merger.", "q_proj", "down_proj"), ("lm_head", "embed")),
        (("--freeze_vision", "true"), ("q_proj", "down_proj"), (".visual.", "lm_head")),
        (("--train_only_merger", "true"), ("merger",), (".blocks.", "language_model", "lm_head")),
        (("--lora_targets", "q_proj,v_proj"), ("q_proj", "v_proj"), ("k_proj", "visual")),
    ],
)
def test_which_layers_get_adapters(talker, flags, there, absent):
    names = adapters(adapt(talker, *flags))
    assert all(any(part in name for name in names) for part in there)
    assert not [name for name in names if any(part in name for part in absent)]


def test_the_scale_is_alpha_over_the_rank(talker, items):
    scores = []
    for alpha in ([], ["--lora_alpha", "4"], ["--lora_alpha", "2"]):
        policy = adapt(talker, *alpha)
        move(policy)
        if alpha == ["--lora_alpha", "2"]:
            for name, value in adapters(policy).items():
                if ".lora_B." in name:
                    value.data.mul_(2)
        scores.append(score(policy, items))
    torch.testing.assert_close(scores[1], scores[0])
    torch.testing.assert_close(scores[2], scores[0])


def test_targets_that_are_not_there_are_refused(talker):
    with pytest.raises(DataError, match="--lora_targets: no linear .* named no_proj"):
        adapt(talker, "--lora_targets", "q_proj,no_proj")
    with pytest.raises(DataError, match="that is trained is named qkv"):
        adapt(talker, "--lora_targets", "qkv", "--freeze_vision", "true")


def test_adapters_have_the_dtype_of_the_weights(talker):
    policy = adapt(copy.deepcopy(talker).to(torch.bfloat16))
    assert {value.dtype for value in adapters(policy).values()} == {torch.bfloat16}


def test_a_graph_samples_what_the_adapted_model_says(items, talker):
    policy = adapt(talker)
    move(policy)
    prompts = collate(items, talker)
    settings = Sampling(9, graph=True, banned_ids=banned_ids(talker))
    rows = [3, 1, 1, 1], range(6)
    with sampling(engine_of(policy)) as twin:
        here = rollout(twin, prompts, *rows, settings)
    other = rollout(talker, prompts, *rows, settings)
    assert not torch.equal(here.tokens, other.tokens)
    with PretendGpu() as gpu:
        model = copy.deepcopy(policy.model).to("cuda")
        lora.merge_adapters(model)
        there = rollout(model, prompts.to("cuda"), *rows, settings)
        tokens, mask, logp = (tensor.cpu() for tensor in there[:3])
    assert [graph.replays for graph in gpu.graphs] == [5]
    assert torch.equal(tokens, here.tokens) and torch.equal(mask, here.mask)
    torch.testing.assert_close(logp, here.logp, atol=1e-4, rtol=0)
    # The sampler's numbers are those of the adapted model's packed forward, nothing merged.
    pair = collate(items[:1], talker)
    with torch.no_grad():
        scored = policy(pair, here.tokens[None, :3], here.mask[None, :3]).logp[0]
    torch.testing.assert_close(scored, here.logp[:3], atol=1e-4, rtol=0)


@pytest.fixture
def saved(checkpoint, tmp_path):
    """A policy of the checkpoint with adapters, and its folder tmp_path / "adapter"."""
    policy = adapt(load_model(checkpoint)[0])
    policy.model.peft_config["default"].base_model_name_or_path = str(checkpoint)
    move(policy)
    state = policy.model.state_dict()
    plain = lora.save_adapter(policy.model, state, tmp_path / "adapter")
    return policy, plain, tmp_path / "adapter"


def test_an_adapter_is_loaded_with_its_base(saved, checkpoint, items):
    policy, plain, folder = saved
    model, _ = load_model(folder)
    state = model.state_dict()
    assert state.keys() == plain.keys() == load_model(checkpoint)[0].state_dict().keys()
    for name, value in state.items():
        torch.testing.assert_close(value, plain[name], atol=1e-6, rtol=0)
    adapted = score(policy, items)
    torch.testing.assert_close(score(Policy(model), items), adapted, atol=1e-5, rtol=1e-5)
    assert lora.base_checkpoint(checkpoint) == checkpoint


def test_a_page_knows_the_run_of_an_adapter(checkpoint, tmp_path):
    folder = tmp_path / "grpo" / "adapter"
    folder.mkdir(parents=True)
    config = {"base_model_name_or_path": str(checkpoint)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "run.json").write_text(json.dumps({"frames": 99}))
    words = ["--model_name_or_path", str(folder), "--video", "v", "--question", "q"]
    (arguments,) = Parser(SampleArguments, "").parse_args_into_dataclasses(words)
    (note,) = sample_page.check_model(arguments, arguments.model_name_or_path)
    assert "was trained with --frames 99" in note


def test_evaluate_takes_either_folder(saved, checkpoint, tmp_path, monkeypatch):
    plain, folder = saved[1:]
    shutil.copytree(checkpoint, tmp_path / "merged")
    save_file(plain, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    rows = []
    for number, colour in enumerate(["red", "blue"]):
        rows.append(
            {
                "problem_id": number,
                "problem": f"What is like {colour}?",
                "data_type": "text",
                "problem_type": "free-form",
                "solution": f"<answer>{colour}</answer>",
            }
        )
    (tmp_path / "bench.json").write_text(json.dumps(rows))
    outputs = []
    for model in (checkpoint, tmp_path / "merged", folder):
        words = ["--model_name_or_path", model, "--bench", tmp_path / "bench.json"]
        words += [
            "--decode_workers",
            0,
            "--max_completion_length",
            9,
            "--output",
            tmp_path / f"{model.name}.json",
        ]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        evaluate.main()
        report = json.loads((tmp_path / f"{model.name}.json").read_text())
        assert report["errors"] == {} and report["n"] == 2
        outputs.append([row["output"] for row in report["results"]])
    assert outputs[1] == outputs[2] != outputs[0]


def test_training_takes_no_adapter(saved, checkpoint, tmp_path, monkeypatch, alone):
    words = ["train.py", "--model_name_or_path", saved[2], "--dataset_name", "x.json"]
    words += ["--output_dir", tmp_path / "out", "--decode_workers", 0]
    words += ["--deepspeed", ROOT / "ds_zero3.json"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(DataError, match="adapter is an adapter; train the merged model"):
        train.run(train.parse_arguments())


def test_an_adapter_of_another_model_is_refused(saved):
    folder = saved[2]
    stored = load_file(folder / "adapter_model.safetensors")
    other = {name.replace("layers.0", "layers.77"): value for name, value in stored.items()}
    save_file(other, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="adapter does not fit: Found missing adapter keys"):
        load_model(folder)


def test_without_peft_one_sentence_says_how_to_install_it(saved, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else find(name)
    )
    with pytest.raises(DataError, match="needs peft, which is not installed: pip install peft"):
        load_model(saved[2])
    words = ["train.py", "--model_name_or_path", "x", "--dataset_name", "y", "--lora_rank"]
    monkeypatch.setattr(sys, "argv", [*words, "8"])
    with pytest.raises(
        DataError, match="^--lora_rank needs peft, which is not .* pip install peft"
    ):
        train.parse_arguments()
    monkeypatch.setattr(sys, "argv", [*words, "0"])
    train.parse_arguments()


def test_peft_is_imported_only_where_it_is_asked_for(checkpoint, tmp_path):
    file = tmp_path / "script.py"
    file.write_text(
        "import sys\nimport train, evaluate, visualize\nfrom common.policy import load_model\n"
        "load_model(sys.argv[1])\nassert 'peft' not in sys.modules\n"
    )
    run_script(file, checkpoint)


def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_happened(small_toy, tmp_path):
    """SFT and GRPO with a moving reference, both with adapters, on two ranks under ZeRO-3."""
    output = tmp_path / "run"
    flags = {
        "--toy_dir": small_toy,
        "--output_dir": output,
        "--lora_rank": 4,
        "--consistency_coef": 0.5,
        "--ema_steps": 2,
        "--ema_decay": 0.5,
        "--num_generations": 4,
        "--max_completion_length": 12,
        "--gate": "none",
        "--save_steps": 2,
        "--save_total_limit": 9,
        "--sft_max_steps": 3,
        "--sft_per_device_batch_size": 4,
        "--max_steps": 4,
        "--per_device_train_batch_size": 2,
        "--gradient_checkpointing": "true",
    }
    words = [word for pair in flags.items() for word in pair]
    launch(*words, ranks=2)
    shutil.copytree(output, tmp_path / "whole")
    check_what_moved(small_toy / "model", output)
    (output / "result.json").unlink()
    launch(*words, "--resume_from_checkpoint", output / "checkpoint-grpo-2", ranks=2)
    assert_same_run(tmp_path / "whole", output)
    # The reference was the start at first, and then a mean that the policy moved on from.
    kl = [record["loss/kl"] for record in metrics(output, "grpo")]
    assert kl[0] == pytest.approx(0, abs=1e-7) and all(value > 1e-7 for value in kl[1:])


def check_what_moved(start, output):
    """Frozen weights are those of the start, every adapter learns, files have the known names."""
    for before, after in ((start, output / "sft"), (output / "sft", output / "grpo")):
        files = [load_file(folder / "model.safetensors") for folder in (before, after)]
        assert files[0].keys() == files[1].keys()
        config = json.loads((after / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(before) and config["r"] == 4
        own = load_file(after / "adapter" / "adapter_model.safetensors")
        targets = {
            name.removeprefix("base_model.model.").replace(".lora_A", "")
            for name in own
            if ".lora_A." in name
        }
        before, after = weights(before), weights(after)
        assert targets < before.keys() and len(targets) > 20
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == targets
    two, four = (
        load_file(output / f"checkpoint-grpo-{step}" / "adapter" / "adapter_model.safetensors")
        for step in (2, 4)
    )
    assert [name for name in two if torch.equal(two[name], four[name])] == []
    # deepspeed/ has the adapters and their optimizer alone; a tied head is an empty placeholder.
    folder = output / "checkpoint-grpo-4" / "deepspeed"
    (file,) = folder.glob("zero_pp_rank_0_*model_states.pt")
    kept = torch.load(file, weights_only=False)["module"]
    assert [name for name, value in kept.items() if ".lora_" not in name and value.numel()] == []
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size < 12 * sum(value.numel() for value in four.values()) + 500_000


def test_stages_agree(small_toy, tmp_path):
    outputs = []
    runs = []
    for stage in (2, 3):
        file = tmp_path / f"{stage}.json"
        file.write_text(json.dumps(zero_stage(stage)))
        outputs.append(tmp_path / f"run{stage}")
        flags = {
            "--toy_dir": small_toy,
            "--stage": "grpo",
            "--model_name_or_path": small_toy / "model",
            "--deepspeed": file,
            "--output_dir": outputs[-1],
            "--lora_rank": 4,
            "--per_device_train_batch_size": 4,
            "--learning_rate": 1e-3,
        }
        runs.append([word for pair in flags.items() for word in pair] + SMALL_GRPO)
        launch(*runs[-1])
    one, two = (weights(output / "grpo") for output in outputs)
    start = weights(small_toy / "model")
    assert max((one[name] - start[name]).abs().max() for name in one) > 1e-4
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    # What a step says does not depend on the stage either; its reference is the start.
    for ours, theirs in zip(*(metrics(output, "grpo") for output in outputs), strict=True):
        for name in ("loss/kl", "loss/policy", "reward/total", "rollout/entropy"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5)
    assert [row["loss/kl"] < 1e-7 for row in metrics(outputs[0], "grpo")] == [True, False]
    # Neither goes on from the other's checkpoint, and a refused start leaves it as it is.
    longer = ["--max_steps", 3, "--resume_from_checkpoint", "auto", "--deepspeed"]
    said = [complain(*runs[0], *longer, file), complain(*runs[1], *longer, tmp_path / "2.json")]
    for output, words, line in zip(outputs, ("2 or less", "3"), said, strict=True):
        assert f"{output / 'checkpoint-grpo-2'} was written under ZeRO-{words}, which " in line
        assert (output / "result.json").is_file()
