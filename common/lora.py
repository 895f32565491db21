"""LoRA: adapters beside frozen weights, by peft, which is imported only where a run asks for it.

add_adapters(policy, arguments)                  # before the engine starts
merge_adapters(twin)                             # for a rollout
weights = save_adapter(model, weights, folder)   # merged ones
"""

import importlib.util
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.data import DataError, first_words, read_document


def check_peft(what):
    """Errors: DataError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise DataError(f"{what} needs peft, which is not installed: pip install peft")


def add_adapters(policy, arguments):
    """Gives linear layers adapters, which change nothing yet, and freezes all else.

    Args:
        policy: Policy whose names keep_names() has kept. Layers that it does not train, and its
            head, get none.
        arguments: TrainArguments.
    Errors: DataError if --lora_targets names no layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model = policy.model
    chosen = []
    for target in arguments.lora_targets.split(","):
        before = len(chosen)
        for name, module in model.named_modules():
            linear = isinstance(module, torch.nn.Linear) and module is not model.lm_head
            if linear and module.weight.requires_grad and name.endswith(target):
                chosen.append(name)
        if len(chosen) == before:
            raise DataError(f"--lora_targets: no linear layer that is trained is named {target}")
    config = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha or arguments.lora_rank,
        target_modules=chosen,
        base_model_name_or_path=str(policy.source),
    )
    inject_adapter_in_model(config, model)
    # peft makes them in float32; an engine has one dtype, and its optimizer the float32 weights.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)


def merge_adapters(twin, adapters=True):
    """Lets an engine's twin compute with plain weights.

    Args:
        twin: whose parameters have been lent; its weights are replaced, never written to.
        adapters: whether they are in these weights; without them it is the model of the start.
    """
    for layer in twin.modules():
        if hasattr(layer, "lora_A"):
            layer.merged_adapters.clear()
            if adapters:
                layer.merge(safe_merge=True)
            else:
                layer.merged_adapters.append("default")


def save_adapter(model, weights, folder):
    """Writes a model's adapter as PeftModel.from_pretrained reads it.

    Args:
        weights: {name: tensor} of the model with its adapter.
    Returns:
        {name: tensor} of the merged model, under the names of a model without an adapter.
    """
    config = model.peft_config["default"]
    plain = {}
    adapter = {}
    for name, value in weights.items():
        if ".lora_" in name:
            adapter["base_model.model." + name.replace(".default", "")] = value
            continue
        layer = name.replace(".base_layer", "")
        if layer.endswith(".weight") and layer != name:
            down = weights[name.replace("base_layer", "lora_A.default")]  # (rank, in)
            up = weights[name.replace("base_layer", "lora_B.default")]  # (out, rank)
            change = config.lora_alpha / config.r * (up.float() @ down.float())
            value = (value.float() + change).to(value.dtype)
        plain[layer] = value
    config.save_pretrained(folder)
    save_file(adapter, folder / "adapter_model.safetensors", {"format": "pt"})
    return plain


def base_checkpoint(path):
    """The checkpoint that the adapter in a folder is for; the path itself if it has none."""
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        return path
    return read_document(file)["base_model_name_or_path"]


def load_adapter(model, folder):
    """Merges the adapter in a folder into the model of its base_checkpoint(). Returns the model.

    Errors: DataError if peft is missing, or the adapter is another model's.
    """
    check_peft(f"the adapter {folder}")
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # peft would go on with adapters that change nothing.
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (OSError, RuntimeError, UserWarning, ValueError) as error:
        raise DataError(f"the adapter {folder} does not fit: {first_words(error)}") from error
