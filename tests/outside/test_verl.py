"""reward.compute_score as verl 0.9.1 finds, loads and calls it.

The configuration file, the loader and the reward manager are verl's. verl is installed without its
dependencies, so the packages around these three are empty, and a batch has what the manager reads.
"""

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT

ANSWERS = {
    "<think>a</think><answer>B</answer>": 2.0,
    "<think>a</think><answer>C</answer>": 1.0,
    "so: <answer>B</answer>": 1.0,
    "B": 0.0,
}


@pytest.fixture
def verl(monkeypatch):
    """verl's folder; its packages are imported without their __init__, which needs Ray."""
    found = importlib.util.find_spec("verl")
    if found is None:
        pytest.skip("needs verl: pip install --no-deps verl==0.9.1 (.ci/run does)")
    root = Path(found.origin).parent
    before = set(sys.modules)

    def empty(name, **contents):
        module = ModuleType(name)
        module.__path__ = [str(root.parent / name.replace(".", "/"))]
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    empty("ray")
    empty("omegaconf", DictConfig=dict)
    empty("verl", DataProto=object)
    empty("verl.utils")
    empty("verl.experimental.reward_loop")
    empty(
        "verl.experimental.reward_loop.reward_manager",
        register=lambda name: lambda manager: manager,
    )
    yield root
    for name in set(sys.modules) - before:
        del sys.modules[name]


class Batch(list):
    """One response, as verl's DataProto gives it to a reward manager."""

    def __getitem__(self, index):
        return self if isinstance(index, slice) else super().__getitem__(index)


# With a router, verl passes two more keyword arguments, and those of the configuration.
@pytest.mark.parametrize("router", [None, "localhost:8000"])
@pytest.mark.parametrize("reward_kwargs", [{}, {"scale": 2}])
def test_verl_loads_and_calls_compute_score(router, reward_kwargs, verl):
    from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
    from verl.trainer.ppo.reward import get_custom_reward_fn

    settings = yaml.safe_load((verl / "trainer/config/reward/reward.yaml").read_text())
    # reward.custom_reward_function.path=reward.py
    settings["custom_reward_function"]["path"] = str(ROOT / "reward.py")
    settings["custom_reward_function"]["reward_kwargs"] = reward_kwargs
    config = SimpleNamespace(reward=settings)

    async def score(text):
        tokenizer = SimpleNamespace(
            decode=lambda ids, skip_special_tokens: bytes(ids.tolist()).decode()
        )
        manager = NaiveRewardManager(
            config, tokenizer, get_custom_reward_fn(config), router, tokenizer
        )
        ids = torch.tensor([*text.encode(), 0, 0])  # two of padding
        mask = torch.tensor([1, 1, 1] + [1] * len(text) + [0, 0])  # a prompt of three
        row = {
            "data_source": "toy",
            "reward_model": {"ground_truth": "B"},
            "extra_info": {"problem_type": "multiple choice"},
        }
        item = SimpleNamespace(
            batch={"responses": ids, "attention_mask": mask}, non_tensor_batch=row
        )
        return (await manager.run_single(Batch([item])))["reward_score"]

    assert {text: asyncio.run(score(text)) for text in ANSWERS} == ANSWERS
