"""What only a GPU can show; skipped without one (`python bench.py gpu --only tests` runs it)."""

import copy

import pytest
import torch
from conftest import banned_ids

from common.policy import Policy, collate
from common.rollout import Sampling, rollout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def scored(policy, prompts, completions, packed):
    """Log-probs and the gradient of the embeddings, on the CPU in float32."""
    policy.zero_grad()
    logp = policy(prompts, completions, torch.ones_like(completions).bool(), packed).logp
    logp.sum().backward()
    gradient = policy.model.get_input_embeddings().weight.grad
    return logp.detach().float().cpu(), gradient.float().cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_the_device_give_the_numbers_of_the_cpu(items, talker, dtype):
    prompts = collate(items, talker)
    generator = torch.Generator().manual_seed(0)
    completions = torch.randint(3, 60, (len(items), 3, 7), generator=generator)
    exact, gradient = scored(Policy(copy.deepcopy(talker)), prompts, completions, True)
    # What rounding to this type costs on the CPU.
    rounded, _ = scored(Policy(copy.deepcopy(talker).to(dtype)), prompts, completions, True)
    tolerance = 2e-3 + 2 * (rounded - exact).abs().max().item()
    there = Policy(copy.deepcopy(talker).to("cuda", dtype))
    for packed in (True, False):
        logp, moved = scored(there, prompts.to("cuda"), completions.to("cuda"), packed)
        torch.testing.assert_close(logp, exact, atol=tolerance, rtol=0)
        assert torch.cosine_similarity(moved.flatten(), gradient.flatten(), dim=0) > 0.99


def test_a_captured_step_samples_what_plain_steps_sample(items, talker):
    model = copy.deepcopy(talker).to("cuda")
    prompts = collate(items, model).to("cuda")
    counts = [3] * len(items)
    tokens = []
    for graph in (False, True):
        settings = Sampling(12, graph=graph, banned_ids=banned_ids(model))
        tokens.append(rollout(model, prompts, counts, range(sum(counts)), settings).tokens)
    # Equal but for draws at the edge between two tokens.
    assert (tokens[0] == tokens[1]).float().mean() > 0.9


def test_prefill_and_scoring_run_a_flash_kernel(items, talker):
    policy = Policy(copy.deepcopy(talker).to("cuda", torch.bfloat16))
    prompts = collate(items, talker).to("cuda")
    completions = torch.full((len(items), 3, 7), 5, device="cuda")
    with torch.profiler.profile() as profile, torch.no_grad():
        policy(prompts, completions, torch.ones_like(completions).bool())
    names = {event.name for event in profile.events()}
    assert any("flash" in name for name in names), sorted(names)
