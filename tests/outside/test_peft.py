"""A saved adapter, read by peft and by transformers themselves: the model is the one that was
trained."""

import pytest
import torch
from conftest import hf_inputs
from peft import PeftModel
from test_lora import adapt, move
from transformers import AutoModelForImageTextToText

from common import lora
from common.policy import load_model


@torch.no_grad()
def logits(model, item):
    return model(**hf_inputs(item, model)).logits


@pytest.mark.parametrize("alpha", [[], ["--lora_alpha", "9"]])
def test_peft_reads_an_adapter(alpha, checkpoint, items, tmp_path):
    policy = adapt(load_model(checkpoint)[0], *alpha)
    policy.model.peft_config["default"].base_model_name_or_path = str(checkpoint)
    move(policy)
    plain = lora.save_adapter(policy.model, policy.model.state_dict(), tmp_path / "adapter")
    # The plain attention of transformers, for all of them.
    policy.model.model.language_model.config._attn_implementation = "sdpa"
    expected = logits(policy.model, items[0])
    base = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert (logits(base, items[0]) - expected).abs().max() > 0.1
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
    close = 1e-5 * expected.abs().max()
    assert (logits(whole, items[0]) - expected).abs().max() < close
    read = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert (logits(read, items[0]) - expected).abs().max() < close
    merged = read.merge_and_unload().state_dict()
    assert merged.keys() == plain.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, plain[name], atol=1e-6, rtol=0)
