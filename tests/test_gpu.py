"""What runs on a GPU, on a pretended one (pretend_gpu.py): the same numbers as on the CPU, no
tensor on the wrong device, and a decode step that a CUDA graph can capture. Kernels, speed and
bfloat16's rounding there are not tested by anything here.
"""

import copy
import importlib.util
import json
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import banned_ids
from pretend_gpu import GpuTensor, PretendGpu

import bench
import evaluate
import prior
import train
import visualize
from common import ranks, sample_page
from common.data import Prior, load_examples
from common.media import Encoder, PromptFlags
from common.policy import Policy, checkpoint_activations, collate, load_weights
from common.rollout import Sampling, replay, rollout
from grpo import policy_loss, rollout_frame_use, token_frame_use

# ---------------------------------------------------------------------- the pretended GPU itself


def test_tensors_of_two_devices_do_not_meet():
    with PretendGpu():
        there, here = torch.arange(6.0, device="cuda").view(2, 3), torch.ones(2, 3)
        assert there.is_cuda and there.device == torch.device("cuda:0") and not here.is_cuda
        for meet in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: torch.where(there > 2, there, here),
            lambda: there @ here.T,
            lambda: torch.zeros_like(there).masked_fill_(here > 0, 1),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                meet()
        assert (there + torch.tensor(1.0)).sum().item() == 21  # a number from the host
        assert torch.equal((there + here.to("cuda")).cpu(), torch.arange(1.0, 7).view(2, 3))
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


def test_waits_are_noted():
    with PretendGpu() as gpu:
        there = torch.arange(6, device="cuda")
        (there * 2).cumsum(0)[2:]
        assert gpu.waits == []
        for wait in (
            there[3].item,
            lambda: bool(there.any()),
            there.tolist,
            there.cpu,
            lambda: there[there > 2],
            lambda: torch.ones(3).to("cuda"),
        ):
            before = len(gpu.waits)
            wait()
            assert len(gpu.waits) > before


def test_a_graph_replays_what_was_recorded():
    with PretendGpu() as gpu:
        total, number = torch.zeros(3, device="cuda"), 1

        def step():
            total.add_(total.cumsum(0) + number)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        assert total.tolist() == [0, 0, 0]  # recorded, not run
        number = 100  # a graph keeps the number it has seen
        graph.replay()
        assert total.tolist() == [1, 1, 1]
        graph.replay()  # 1 + (1, 2, 3) + 1
        assert total.tolist() == [3, 4, 5] and gpu.graphs == [graph] and graph.replays == 2
        for forbidden in (
            lambda: total.sum().item(),
            lambda: total[total > 3],
            lambda: total.add_(torch.ones(3).to("cuda")),
        ):
            with (
                pytest.raises(RuntimeError, match="capturing"),
                torch.cuda.graph(torch.cuda.CUDAGraph()),
            ):
                forbidden()


def test_gradients_are_those_of_the_cpu():
    layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    inputs = torch.randn(3, 4)
    layers(inputs).pow(2).sum().backward()
    with PretendGpu():
        there = copy.deepcopy(layers).to("cuda")
        torch.utils.checkpoint.checkpoint(there, inputs.to("cuda"), use_reentrant=False).pow(
            2
        ).sum().backward()
        for one, two in zip(layers.parameters(), there.parameters(), strict=True):
            torch.testing.assert_close(two.grad.cpu(), one.grad)


# ---------------------------------------------------------------------- rollout.py and policy.py


@pytest.mark.parametrize("graph", [False, True])
def test_rollouts(items, talker, graph):
    # rows end at different steps and leave the batch
    ends = range(0, talker.config.text_config.vocab_size, 12)
    options = dict(eos_ids=ends, banned_ids=banned_ids(talker))
    settings = Sampling(20, 0.7, 0.9, 50, **options)
    there_settings = Sampling(20, 0.7, 0.9, 50, graph=graph, **options)
    rows = [3, 1, 2, 2], range(8)
    prompts = collate(items, talker)
    here = rollout(talker, prompts, *rows, settings)
    with PretendGpu() as gpu:
        model = copy.deepcopy(talker).to("cuda")
        there = rollout(model, prompts.to("cuda"), *rows, there_settings)[:3]
        assert all(isinstance(tensor, GpuTensor) for tensor in there)
        tokens, mask, logp = (tensor.cpu() for tensor in there)
    assert len(gpu.graphs) == graph
    assert torch.equal(tokens, here.tokens) and torch.equal(mask, here.mask)
    torch.testing.assert_close(logp, here.logp, atol=1e-4, rtol=0)


@pytest.mark.parametrize("other_family", ["Qwen2VL", "Qwen3VL"], indirect=True)
def test_other_families_sample_by_a_graph(other_family):
    model, family_items = other_family
    prompts = collate(family_items, model)
    rows = [2, 1, 2], range(5), Sampling(9, graph=True, banned_ids=banned_ids(model))
    here = rollout(model, prompts, *rows).tokens
    with PretendGpu() as gpu:
        there = rollout(copy.deepcopy(model).to("cuda"), prompts.to("cuda"), *rows).tokens.cpu()
    assert torch.equal(there, here)
    # 9 tokens: one of the prompt, three steps, five replays
    assert [graph.replays for graph in gpu.graphs] == [5]


def test_a_graph_waits_once_in_16_steps(items, talker):
    prompts = collate(items, talker)
    waits = {}
    with PretendGpu() as gpu:
        model, prompts = copy.deepcopy(talker).to("cuda"), prompts.to("cuda")
        for steps in (20, 52):
            gpu.waits.clear()
            settings = Sampling(steps, graph=True, banned_ids=banned_ids(talker))
            rollout(model, prompts, [2] * 4, range(8), settings)
            waits[steps] = len(gpu.waits)
        assert waits[52] - waits[20] == 2  # 32 more steps
        # one token is the prompt's, three steps are run one by one
        assert [graph.replays for graph in gpu.graphs] == [16, 48]


def test_a_step_that_cannot_be_captured_says_what_to_do():
    with PretendGpu():
        count = torch.zeros((), device="cuda")
        with pytest.raises(RuntimeError, match="--cuda_graph false"):
            replay(lambda: count.add_(count.item()), 10, lambda: True, count.device)
    steps = [None, None, None, torch.OutOfMemoryError("CUDA out of memory")]
    with PretendGpu(), pytest.raises(torch.OutOfMemoryError):  # which is no matter of graphs
        replay(mock.Mock(side_effect=steps), 10, lambda: True, count.device)


def test_what_has_ended_is_not_replayed():
    with PretendGpu() as gpu:
        count = torch.zeros((), dtype=torch.long, device="cuda")
        replay(lambda: count.add_(1), 100, lambda: bool(count < 20), count.device)
        assert count.item() == 32 and gpu.graphs[0].replays == 29  # asked at 0, 16 and 32


def gradients(model):
    return {
        name: parameter.grad.cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("packed, checkpointed", [(True, False), (True, True), (False, False)])
def test_forward_and_backward(items, talker, packed, checkpointed):
    generator = torch.Generator().manual_seed(1)
    completions = torch.randint(0, 256, (4, 3, 5), generator=generator)
    mask = torch.arange(5) < torch.tensor([[5, 2, 4], [1, 5, 3], [4, 4, 2], [3, 1, 5]])[..., None]
    advantages = torch.randn(12, generator=generator)
    prompts = collate(items, talker)

    def run(model, device):
        policy = Policy(model)
        if checkpointed:
            checkpoint_activations(model)
        policy.train()
        rows, tokens, valid = prompts.to(device), completions.to(device), mask.to(device)
        rows.features = policy.encode(rows) if checkpointed else None
        logp, entropy, hidden, attention, weights = policy(
            rows, tokens, valid, packed, hidden_layers=(1, -1), attention_layer=2, weight_alpha=1.7
        )
        loss, stats = policy_loss(
            logp.flatten(0, 1),
            logp.detach().flatten(0, 1) - 0.1,
            advantages.to(device),
            valid.flatten(0, 1),
            logp.detach().flatten(0, 1) + 0.2,
            weights=weights.flatten(0, 1),
        )
        loss.backward()
        uses = [
            use
            for how in ({"hidden": hidden[-1]}, {"attention": attention})
            for use in rollout_frame_use(rows, valid, **how)[0]
        ]
        each = [
            token_frame_use(
                rows, 0, valid[0, :1].expand(1, 5)[0], hidden[-1][:, : rows.input_ids.shape[1] + 5]
            )
        ]
        numbers = [loss.detach(), entropy[valid].detach(), hidden[1], attention, *uses, *each]
        return [tensor.cpu() for tensor in numbers], stats, gradients(model)

    expected = run(copy.deepcopy(talker), "cpu")
    with PretendGpu():
        found = run(copy.deepcopy(talker).to("cuda"), "cuda")
    for one, two in zip(expected[0], found[0], strict=True):
        torch.testing.assert_close(two, one, atol=2e-5, rtol=1e-4)
    assert found[1] == pytest.approx(expected[1], abs=1e-5)
    assert found[2].keys() == expected[2].keys() and len(found[2]) > 50
    for name, gradient in expected[2].items():
        torch.testing.assert_close(found[2][name], gradient, atol=2e-5, rtol=1e-3)


# ----------------------------------------------------------------------- train.py and the others


def test_a_rank_takes_its_own_gpu_before_the_first_collective(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(device))
    monkeypatch.setattr(ranks.deepspeed, "init_distributed", lambda: done.append("ranks"))
    monkeypatch.setattr(ranks.dist, "new_group", lambda **_: None)
    for name, value in {
        "RANK": "11",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "16",
        "MASTER_ADDR": "node",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    ranks.start_ranks()
    assert done == [3, "ranks"]


def test_the_graph_is_on_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    spec = importlib.util.spec_from_file_location("train_there", train.__file__)
    there = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_there", there)
    spec.loader.exec_module(there)
    assert there.TrainArguments().cuda_graph and not train.TrainArguments().cuda_graph


@pytest.mark.parametrize(
    "flags",
    [
        ("--recipe", "cfgrpo", "--freeze_vision", "true"),
        (
            "--recipe",
            "release",
            "--frame_use",
            "attention",
            "--frame_use_layer",
            "2",
            "--cuda_graph",
            "true",
        ),
        ("--recipe", "care", "--beta", "0.1"),
        ("--recipe", "tw", "--degenerate", "drop"),
        ("--recipe", "video_r2"),
    ],
)
def test_groups_of_every_recipe(flags, toy_folder, toy_processor, talker, monkeypatch):
    """Sampling, reference, policy, rewards, loss and backward of two videos and an image."""
    examples = load_examples(toy_folder / "train.json")
    videos = {
        example.path: example
        for example in examples
        if example.media_type == "video" and example.options
    }
    chosen = [*videos.values()][:2] + [
        example for example in examples if example.media_type == "image"
    ][:1]
    rows = {
        "video": Prior(
            "0",
            frames=[0, 10, 20, 30],
            times=[0.0, 2.5, 5.0, 7.5],
            prior=[0.1, 0.2, 0.3, 0.4],
        ),
        "image": None,
    }
    encoder = Encoder(toy_processor, PromptFlags(min_pixels=3136, max_pixels=3136))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--model_name_or_path", "x", "--num_generations", "4", *flags]
    )
    arguments = train.parse_arguments()
    arguments.max_completion_length = 12  # the toy's default wins over a flag of its recipe
    monkeypatch.undo()

    def run(device):
        model = copy.deepcopy(talker).to(device)
        engine = Engine(model)
        reference = None
        towers = []
        if arguments.beta or arguments.consistency_coef:
            reference = Policy(copy.deepcopy(talker).to(device))
            reference.model.model.visual.register_forward_pre_hook(lambda *_: towers.append(1))
        model.model.visual.register_forward_pre_hook(lambda *_: towers.append(1))
        ready = []
        for place, example in enumerate(chosen):
            row = rows[example.media_type]
            control = None
            if arguments.temporal and example.media_type == "video":
                control = encoder.encode(example, row, shuffle=[3, 0, 2, 1])
            inputs = encoder.encode(example, row)
            ready.append(train.Ready(place, example, rows["video"], None, inputs, control))
        lines = []
        run = SimpleNamespace(
            args=arguments,
            processor=toy_processor,
            write=lambda name, records: lines.extend(records),
        )
        log = train.StepLog("grpo", 0)
        with torch.no_grad():
            (rollouts,) = train.sample(run, model, [ready])
        assert rollouts.mask.is_cuda == (device == "cuda")
        rollouts.learned = rollouts.mask
        train.learn(run, engine, reference, rollouts, log)
        # once for each set of weights and sampling
        assert len(towers) == (1 if arguments.freeze_vision else 2 + (reference is not None))
        return log.values, [line["text"] for line in lines], gradients(model)

    values, texts, expected = run("cpu")
    with PretendGpu() as gpu:
        there = run("cuda")
    assert there[1] == texts and len(gpu.graphs) == arguments.cuda_graph
    for name in [name for name in values if not name.startswith("time/")]:
        assert there[0][name] == pytest.approx(values[name], abs=1e-4, nan_ok=True), name
    assert there[2].keys() == expected.keys() and len(expected) > 30
    for name, gradient in expected.items():
        torch.testing.assert_close(there[2][name], gradient, atol=1e-4, rtol=1e-3)


class Engine(Policy):
    """Stands in for DeepSpeed's engine on one rank."""

    @property
    def device(self):
        return self.model.device

    def backward(self, loss):
        loss.backward()


@pytest.fixture
def as_if(monkeypatch):
    """A pretended GPU that torch finds, so that the programs take it, with bfloat16."""
    with PretendGpu() as gpu:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        yield gpu


@pytest.mark.parametrize(
    "more", [("--frame_use", "attention"), ("--frame_use", "hidden"), ("--frame_use_check",)]
)
def test_evaluate(more, checkpoint, toy_folder, tmp_path, as_if, monkeypatch):
    rows = json.loads((toy_folder / "train_cot.json").read_text())
    asked = [row for row in rows if row["data_type"] == "video"][:3] + rows[-2:]
    if more == ("--frame_use_check",):
        # It asks a question many times.
        asked = asked[:1]
    (tmp_path / "bench.json").write_text(json.dumps(asked))
    flags = {
        "--model_name_or_path": checkpoint,
        "--bench": tmp_path / "bench.json",
        "--media_root": toy_folder,
        "--frames": 4,
        "--min_pixels": 3136,
        "--max_pixels": 3136,
        "--max_completion_length": 12,
        "--cuda_graph": "true",
        "--output": tmp_path / "report.json",
    }
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", *(str(word) for pair in flags.items() for word in pair), *more]
    )
    evaluate.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(as_if.waits) > 50
    if more[0] == "--frame_use":
        # Five questions in one batch, whose decode step is captured once.
        assert len(as_if.graphs) == 1
        assert (
            report["errors"] == {}
            and report["settings"]["dtype"] == "bfloat16"
            and report["n"] == 5
        )


def test_look(checkpoint, toy_folder, as_if):
    video = next(
        example
        for example in load_examples(toy_folder / "train.json")
        if example.media_type == "video"
    )
    arguments = visualize.SampleArguments(
        model_name_or_path=str(checkpoint),
        video=video.path,
        question=video.question,
        min_pixels=3136,
        max_pixels=3136,
        max_completion_length=12,
    )
    row = Prior("0", frames=[0, 10, 20, 30], times=[0.0, 2.5, 5.0, 7.5], prior=[0.25] * 4)
    found = sample_page.answer_question(arguments, "talker", str(checkpoint), video, row)
    assert len(found.uses) == 2 and all(
        not use.is_cuda and use.sum() == pytest.approx(1, abs=1e-2) for use in found.uses.values()
    )


def test_prior(small_toy):
    pixels = torch.rand(3, 3, 56, 56, generator=torch.Generator().manual_seed(0)).numpy()

    def run(device):
        clip = prior.load_clip(f"local-dir:{small_toy / 'clip'}", device=device)
        return prior.encode_pixels(pixels, clip), prior.encode_texts(
            ["a red scene", "two balls"], clip
        )

    with PretendGpu() as gpu:
        there = run("cuda")
    assert len(gpu.waits) > 50
    for one, two in zip(there, run("cpu"), strict=True):
        torch.testing.assert_close(one, two)


def test_bench(tmp_path, monkeypatch):
    """A step on the pretended GPU; the side graph alone captures one."""
    arguments = bench.Arguments(
        num_generations=2, completion_length=6, visual_tokens=32, frames=4, sides=["graph"]
    )
    bench.write_checkpoint(arguments, tmp_path)
    medium = bench.write_medium(arguments, tmp_path)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7_000_000)

    # torch.cuda.is_available() stays false: AdamW would ask the driver. So load_model finds no GPU.
    def load(path):
        return load_weights(path, torch.float32).to("cuda").eval(), None

    monkeypatch.setattr(bench, "load_model", load)
    monkeypatch.setattr(bench, "GPU", True)
    monkeypatch.setattr(bench, "DEVICE", "cuda")
    for side in ("packed", "graph"):
        with PretendGpu() as gpu:
            costs = bench.GroupStep(arguments, side, tmp_path, medium).run()
        assert len(gpu.graphs) == (side == "graph")
        assert costs["step"][1] == 7
