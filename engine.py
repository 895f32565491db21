"""What keeps a run going around the algorithm in train.py: ranks, DeepSpeed engines, checkpoints, media decoded ahead.

A checkpoint is a folder checkpoint-{stage}-{steps}: the model as from_pretrained and vLLM load it, deepspeed/ (parameters and optimizer),
rank{r}.pt and state.json. Runs under ZeRO-0 to 3, on one process or many.
"""

import copy
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import uuid
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import deepspeed
import numpy as np
import psutil
import torch
import torch.distributed as dist
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from pebble import ProcessExpired, ProcessPool
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

import prior
from data import DataError, MediaError, first_words
from grpo import Policy, checkpoint_activations, stop_tokens

# ------------------------------------------------------------------------------------------------------------------------------------ ranks


def is_main():
    return dist.get_rank() == 0


def say(text):
    if is_main():
        tqdm.write(text)


named = set()  # what name_skipped() has said


def name_skipped(causes):
    """Says what cannot be used, {problem_id: cause}: each once a run, whatever stage, epoch or file it comes from."""
    for problem, cause in causes.items():
        if (problem, cause) not in named:
            named.add((problem, cause))
            say(f"skipped {problem}: {cause}")


def share_skipped(found, skipped):
    """Adds what every rank has just found to be unusable, {problem_id: cause}, to `skipped` on all of them, and names it."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    for causes in everyone:
        skipped.update(causes)
        name_skipped(causes)


def agree(count, device):
    """-> (fewest, all) usable examples over the ranks, so that every rank skips a micro-batch or none does."""
    fewest, total = torch.tensor([count], device=device), torch.tensor([count], device=device)
    dist.all_reduce(fewest, op=dist.ReduceOp.MIN)
    dist.all_reduce(total)
    return int(fewest), int(total)


def average(values, names, device):
    """{name: list of this rank's values} -> {name: mean over all ranks' values}; names nobody has a value for are left out."""
    assert set(values) <= set(names), set(values) - set(names)
    table = torch.tensor([[sum(values.get(name, [])), len(values.get(name, []))] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(table)
    return {name: (total / count).item() for name, (total, count) in zip(names, table, strict=True) if count > 0}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def own_port():
    """A free port for the ranks of one deepspeed launcher on one machine.

    The launcher gives every run the same port unless --master_port says another. The ranks of a run
    agree on one of their own in a file named after their launcher's process.

    Returns:
        str, or None: another launcher, more than one machine, or a port that the user chose.
    """
    default = str(TORCH_DISTRIBUTED_DEFAULT_PORT)
    if os.environ.get("CROSS_SIZE") != "1" or os.environ["MASTER_PORT"] != default:
        return None
    parents = psutil.Process().parents()
    launchers = [one for one in parents if "deepspeed.launcher.launch" in one.cmdline()]
    if not launchers:
        return None
    name = f"ranks-{launchers[0].pid}-{launchers[0].create_time()}"
    file = Path(tempfile.gettempdir()) / name
    # The store removes its file when the last rank lets go of it.
    store = dist.FileStore(str(file), int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] == "0":
        store.set("port", free_port())
    return store.get("port").decode()


def start_ranks():
    """One process alone is a world of one, on any free port; the deepspeed launcher or torchrun set these variables themselves."""
    # Ranks that something else started without a port have to guess the same one.
    port = "29511" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else free_port()
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        os.environ.setdefault(name, value)
    os.environ["MASTER_PORT"] = own_port() or os.environ["MASTER_PORT"]
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # NCCL's first collective comes before any engine
    deepspeed.init_distributed()
    if not torch.cuda.is_available():
        torch.set_flush_denormal(True)  # a CPU computes with denormal numbers a hundred times slower
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))))


def on_main_first(work):
    """work() on rank 0, then on the others, which find what it made. An error on rank 0 ends all ranks with its message."""
    outcome = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except DataError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise DataError(outcome[1])
    return outcome[0]


# ---------------------------------------------------------------------------------------------------------------------------------- engines


# Sections of a DeepSpeed file that send metrics somewhere, and the package that each needs.
MONITORS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "comet": "comet_ml",
    "csv_monitor": "csv",
}
SECTIONS = (
    "fp16",
    "bf16",
    "optimizer",
    "optimizer.params",
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    *MONITORS,
)


def read_deepspeed_file(arguments):
    """The --deepspeed file as it is, with the functions of Hugging Face's class for such files.

    Errors: DataError if there is no file, no JSON in it, or something else where a section belongs.
    """
    file = Path(arguments.deepspeed)
    if not file.is_file():
        raise DataError(f"DeepSpeed configuration {file} not found (--deepspeed)")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"DeepSpeed configuration {file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"DeepSpeed configuration {file} is not a JSON object")
    for name in SECTIONS:
        # From the outer section to the inner one, so that find_config_node meets objects alone.
        place = config
        for key in name.split("."):
            place = place.get(key, {})
        if not isinstance(place, dict):
            raise DataError(f"{name} in {file} is {json.dumps(place)}, not an object")
    return HfTrainerDeepSpeedConfig(config)


def deepspeed_config(arguments, hidden_size, micro_batch=1, accumulation=1, learning_rate=None):
    """The --deepspeed file as an engine gets it.

    What Hugging Face's Trainer fills is filled, what this program decides is replaced.

    Args:
        hidden_size: width of the language model; sizes of ZeRO's buckets follow from it.
        learning_rate: None for an engine without an optimizer (reference, scoring).
    Returns:
        dict without "auto".
    Errors: DataError for fp16, for an "auto" that nothing fills, for an optimizer without a type.
    """
    file = read_deepspeed_file(arguments)
    config = file.config
    # Decided by flags and by the loop. One writer of metrics serves the run (Tracker).
    for name in ("train_batch_size", "scheduler", *MONITORS):
        config.pop(name, None)
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["gradient_accumulation_steps"] = accumulation
    # A file that says nothing about these takes the flags as well.
    config.setdefault("gradient_clipping", "auto")
    if learning_rate is None:
        config.pop("optimizer", None)
    else:
        parameters = optimizer_parameters(file)
        parameters["lr"] = learning_rate
        parameters.setdefault("weight_decay", "auto")

    # As in HfTrainerDeepSpeedConfig; betas and eps are the defaults of TrainingArguments.
    autos = {
        "gradient_clipping": arguments.max_grad_norm,
        "fp16.enabled": False,
        "bf16.enabled": torch.cuda.is_available(),
        "optimizer.params.betas": [0.9, 0.999],
        "optimizer.params.eps": 1e-8,
        "optimizer.params.weight_decay": arguments.weight_decay,
        "zero_optimization.reduce_bucket_size": hidden_size * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, value in autos.items():
        file.fill_only(key, value)
    left = list(find_autos(config))
    if left:
        keys = ", ".join(left)
        raise DataError(f'{arguments.deepspeed}: nothing fills the "auto" of {keys}; write a value')
    if file.is_true("fp16.enabled"):
        words = "asks for fp16, whose loss scaling this program does not know; use bf16"
        raise DataError(f"{arguments.deepspeed} {words}")

    zero = config.get("zero_optimization", {})
    if learning_rate is None:
        zero.pop("offload_optimizer", None)
        if zero.get("stage") in (1, 2):
            zero["stage"] = 0  # these partition what an optimizer has
        if arguments.ema_decay < 1:
            if zero.get("offload_param", {}).get("device") == "nvme":
                raise DataError("--ema_decay below 1 needs the parameters in memory, not offloaded to nvme")
            zero["stage3_param_persistence_threshold"] = 0  # update_reference() writes to the shards
    return config


def optimizer_parameters(file):
    """optimizer.params of a file's configuration, which gets ds_zero3.json's if it has none.

    Errors: DataError for a section without a type.
    """
    missing = "optimizer" not in file.config
    default = {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}
    optimizer = file.config.setdefault("optimizer", default)
    if not isinstance(optimizer.get("type"), str):
        raise DataError("optimizer in the DeepSpeed configuration has no type, for example AdamW")
    parameters = optimizer.setdefault("params", {})
    # DeepSpeed compiles its own Adam on first use, for minutes, and without a GPU it gains nothing.
    # On a GPU it is for what a file's own section asks, and for offloaded states.
    offloads = file.get_value("zero_optimization.offload_optimizer.device", "none") != "none"
    use_torch = not torch.cuda.is_available() or (missing and not offloads)
    if use_torch and optimizer["type"].lower() in ("adam", "adamw"):
        parameters.setdefault("torch_adam", True)
    return parameters


def find_autos(node, name=""):
    """Dotted keys whose value is "auto"."""
    if node == "auto":
        yield name
    if isinstance(node, dict):
        for key, value in node.items():
            if key != "keep_in_fp32_modules":  # DeepSpeed's own "auto"
                yield from find_autos(value, f"{name}.{key}".lstrip("."))


def check_deepspeed_file(arguments):
    """Looks at the --deepspeed file before a model is loaded; says what of it is not used.

    The ranks must have started.

    Errors: DataError for all that is wrong with it, a package that is not installed included.
    """
    name = arguments.deepspeed
    file = read_deepspeed_file(arguments)
    for section, package in MONITORS.items():
        if file.is_true(f"{section}.enabled") and importlib.util.find_spec(package) is None:
            words = f"which is not installed: pip install {package}"
            raise DataError(f"{name} enables {section}, {words}")
    training = deepspeed_config(arguments, hidden_size=1, learning_rate=arguments.learning_rate)
    inference = deepspeed_config(arguments, hidden_size=1)
    try:
        get_monitor_config(file.config)
        DeepSpeedConfig(training)
        DeepSpeedConfig(inference)
    except (AssertionError, AttributeError, DeepSpeedConfigError, TypeError, ValueError) as error:
        words = " ".join(str(error).split())
        raise DataError(f"DeepSpeed does not take {name}: {words}") from error

    # What the file says and the run does not do.
    micro = arguments.per_device_train_batch_size
    accumulation = arguments.gradient_accumulation_steps
    batch = micro * accumulation * dist.get_world_size()
    decided = {
        "train_batch_size": {
            "--per_device_train_batch_size x --gradient_accumulation_steps x ranks": batch
        },
        "train_micro_batch_size_per_gpu": {
            "--sft_per_device_batch_size": arguments.sft_per_device_batch_size,
            "--per_device_train_batch_size": micro,
        },
        "gradient_accumulation_steps": {
            "--sft_gradient_accumulation_steps": arguments.sft_gradient_accumulation_steps,
            "--gradient_accumulation_steps": accumulation,
        },
        "optimizer.params.lr": {
            "--sft_learning_rate": arguments.sft_learning_rate,
            "--learning_rate": arguments.learning_rate,
        },
    }
    for key, flags in decided.items():
        value = file.get_value(key, "auto")
        if value != "auto" and any(value != own for own in flags.values()):
            instead = ", ".join(f"{flag} is {own}" for flag, own in flags.items())
            say(f"{name}: {key} {value} is not used, {instead}")
    if "scheduler" in file.config:
        say(f"{name}: its scheduler is not used, --warmup_ratio {arguments.warmup_ratio} is")

    # What the file says in place of a flag.
    of_file = {
        "gradient_clipping": ("--max_grad_norm", arguments.max_grad_norm),
        "optimizer.params.weight_decay": ("--weight_decay", arguments.weight_decay),
    }
    for key, (flag, own) in of_file.items():
        value = file.get_value(key, "auto")
        if value not in ("auto", own):
            say(f"{name}: {key} {value} is used, {flag} {own} is not")

    # What it does not say.
    torch_adam = "optimizer.params.torch_adam"
    if "optimizer" not in file.config:
        say(f"{name} has no optimizer: AdamW with betas 0.9, 0.95 as in ds_zero3.json")
    elif training["optimizer"]["params"].get("torch_adam") and not file.is_true(torch_adam):
        say(f"{name}: without a GPU Adam is torch's, DeepSpeed would compile its own")


def start_engine(arguments, model_path, micro_batch=1, accumulation=1, learning_rate=None):
    """A checkpoint under DeepSpeed, partitioned while it loads; trainable when there is a learning rate, else frozen and in eval mode."""
    hidden_size = AutoConfig.from_pretrained(model_path).get_text_config().hidden_size
    config = deepspeed_config(arguments, hidden_size, micro_batch, accumulation, learning_rate)
    keep = HfDeepSpeedConfig(config)  # noqa: F841  from_pretrained partitions while this object lives
    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
    model, found = AutoModelForImageTextToText.from_pretrained(
        model_path, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, key_mapping=MISNAMED, output_loading_info=True)
    # transformers would start these at random and go on
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise DataError(f"{model_path} lacks {len(missing)} weights of a {model.config.model_type} model, the first is {missing[0]}")
    policy = Policy(model)
    if learning_rate is None:
        policy.requires_grad_(False)
        engine, *_ = deepspeed.initialize(model=policy, config=config)
        engine.eval()
    else:
        keep_names(policy, model_path)
        choose_trained(model, arguments)
        if arguments.gradient_checkpointing:
            checkpoint_activations(model)
        engine, *_ = deepspeed.initialize(model=policy, config=config, model_parameters=[p for p in policy.parameters() if p.requires_grad])
        engine.train()
    return engine


def choose_trained(model, arguments):
    """Which parameters learn: all, all but the vision tower, or the mergers between tower and language model alone."""
    model.model.visual.requires_grad_(not arguments.freeze_vision)
    if arguments.train_only_merger:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".visual." in name and "merger" in name)


# Names that transformers up to 5.24 gave the weights of a Qwen that ZeRO-3 had partitioned -> what they should be.
MISNAMED = {r"^model\.model\.": "model.", r"^model\.language_model\.model\.": "model.language_model."}


def weight_shapes(path):
    """{name: [sizes]} of a checkpoint's weights, read from the heads of its files.

    Args:
        path: a folder, or the name of a model of the hub.
    Raises:
        DataError: it has no safetensors.
    """
    files = [cached_file(path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)]
    if files == [None]:
        index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        if index is None:
            raise DataError(f"{path} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
        shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
        files = [cached_file(path, shard) for shard in sorted(set(shards))]
    shapes = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                shapes[name] = weights.get_slice(name).get_shape()
    return shapes


def right_name(name):
    for wrong, right in MISNAMED.items():
        name = re.sub(wrong, right, name)
    return name


def is_transposition(conversion):
    return isinstance(conversion, WeightConverter) and all(isinstance(step, Transpose) for step in conversion.operations)


def keep_names(policy, path):
    """Lets save_model() write a policy, just loaded from the checkpoint at path, with the names and shapes that its weights have there."""
    # save_pretrained undoes the conversions that the model has. The loader for ZeRO-3 leaves all of the family, not those that matched;
    # transposed experts are not always turned back, so in_layout() does it; names that were mended stay so.
    conversions = [one for one in policy.model._weight_conversions if one.was_used() and not is_transposition(one)]
    policy.model._weight_conversions = [one for one in conversions if one.target_patterns[0] not in MISNAMED.values()]
    shapes = weight_shapes(path)
    policy.source, policy.shapes = path, {right_name(name): shape for name, shape in shapes.items()}
    if policy.shapes.keys() != shapes.keys():
        say(f"{path} has weights named model.model., as a fault of transformers made them; what this run saves has the right names")


def in_layout(tensor, shape):
    """Qwen3-VL's experts are (experts, in, out) in its checkpoints and (experts, out, in) in transformers 5."""
    turned = shape is not None and list(tensor.shape) != shape and list(tensor.mT.shape) == shape
    return tensor.cpu().mT.contiguous() if turned else tensor


def check_names(policy, folder):
    """The weights just written against those of the checkpoint that the policy came from. DataError when they differ."""
    written, expected = weight_shapes(folder), dict(policy.shapes)
    if policy.model.config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)  # the embedding again; who loads a tied model does not look for it
    wrong = sorted(name for name, shape in written.items() if expected.get(name) != shape)
    lost = sorted(expected.keys() - written.keys())
    if wrong:
        raise DataError(f"{len(wrong)} weights in {folder} are not those of {policy.source}: the first is {wrong[0]} {written[wrong[0]]}, "
                        f"there is {expected.get(wrong[0]) or ', '.join(lost[:1])}; report this with the version of transformers")
    if lost:
        say(f"{len(lost)} weights of {policy.source} are not part of the model and not saved, the first is {lost[0]}")
        policy.shapes = written  # said once


def set_learning_rate(engine, step, steps, peak, warmup_ratio, decay_ratio=0.3):
    """Up, flat, down: a linear warm-up, the peak, and over the last `decay_ratio` of the steps linearly to a tenth of it."""
    rise = min(1.0, (step + 1) / max(1, round(warmup_ratio * steps)))
    fall = max(0.0, 1 - (steps - step) / max(1, round(decay_ratio * steps)))  # 0 until the decay begins, 1 at the end
    for group in engine.optimizer.param_groups:
        group["lr"] = peak * rise * (1 - 0.9 * fall)


class Tracker:
    """Shows the records of metrics.jsonl where the --deepspeed file says (MONITORS).

    One writer for the whole run, on rank 0. Its step counts over the run: GRPO's steps come after
    SFT's. A run that goes on after a checkpoint shows no step twice and continues its W&B run;
    tracker.json in the output folder has the last step shown and the W&B run's id.
    """

    def __init__(self, arguments):
        config = get_monitor_config(read_deepspeed_file(arguments).config)
        self.file = Path(arguments.output_dir) / "tracker.json"
        self.enabled = config.enabled and is_main()
        self.sft_steps = 0
        if not self.enabled:
            return
        self.state = {"wandb_run_id": uuid.uuid4().hex[:8], "shown": -1}
        if arguments.resume_from_checkpoint is not None and self.file.is_file():
            self.state = json.loads(self.file.read_text(encoding="utf-8"))
            say(f"{self.file}: the run's steps up to {self.state['shown']} are not shown again")
        # Only the lines up to the checkpoint are left.
        metrics = Path(arguments.output_dir) / "metrics.jsonl"
        for line in metrics.read_text(encoding="utf-8").splitlines():
            self.step_of(json.loads(line))
        if config.wandb.enabled:
            run_id = os.environ.setdefault("WANDB_RUN_ID", self.state["wandb_run_id"])
            self.state["wandb_run_id"] = run_id
            os.environ.setdefault("WANDB_RESUME", "allow")
        self.monitor = MonitorMaster(config)

    def step_of(self, record):
        """Of the whole run."""
        if record["stage"] == "sft":
            self.sft_steps = record["step"] + 1
            return record["step"]
        return self.sft_steps + record["step"]

    def show(self, record):
        if not self.enabled:
            return
        step = self.step_of(record)
        if step <= self.state["shown"]:
            return
        stage = record["stage"]
        metrics = {name: value for name, value in record.items() if "/" in name}
        self.monitor.write_events([(f"{stage}/{name}", metrics[name], step) for name in metrics])
        # Written aside and renamed: a run that is killed here can go on.
        self.state["shown"] = step
        aside = self.file.with_suffix(".new")
        aside.write_text(json.dumps(self.state), encoding="utf-8")
        os.replace(aside, self.file)


def update_reference(reference, engine, averages, decay):
    """Reference <- decay * reference + (1 - decay) * policy (GRPO-CARE's), each rank on its shards of both.

    averages {name: float32 shard} starts empty and is kept between the calls: in bf16 a step of 0.5 % would be rounded away.
    """
    for (name, kept), moved in zip(reference.module.named_parameters(), engine.module.parameters(), strict=True):
        averages.setdefault(name, shard(kept).float().clone()).lerp_(shard(moved).float(), 1 - decay)
    write_shards(reference, averages)


def shard(parameter):
    """This rank's part of a parameter under ZeRO-3, else all of it."""
    return getattr(parameter, "ds_tensor", parameter.data)


def write_shards(reference, averages):
    for name, parameter in reference.module.named_parameters():
        shard(parameter).copy_(averages[name])


# ------------------------------------------------------------------------------------------------------------------------------ checkpoints


def save_model(engine, processor, folder):
    """save_pretrained format, gathered; written aside and renamed, so that a folder of this name is always complete."""
    state = engine._zero3_consolidated_16bit_state_dict() if engine.zero_optimization_partition_weights() else engine.module.state_dict()
    if is_main():
        aside = Path(f"{folder}.unfinished")
        state = {name.removeprefix("model."): value for name, value in state.items()}
        state = {name: in_layout(value, engine.module.shapes.get(name)) for name, value in state.items()}
        # what ended completions here ends them for every reader
        model = engine.module.model
        model.generation_config.eos_token_id = stop_tokens(model, processor)
        model.save_pretrained(aside, state_dict=state)
        processor.save_pretrained(aside)
        check_names(engine.module, aside)
        write_for_version_4(aside, model.config.text_config.attribute_map)
        replace_folder(aside, folder)
    dist.barrier()


def write_for_version_4(folder, attribute_map):
    """Writes once more, where transformers 4 and servers built on it look, what transformers 5 writes elsewhere; 5 reads both."""
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    text = config["text_config"]
    rope = dict(text["rope_parameters"])  # rope_type, mrope_section, ..., rope_theta
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope
    for old, new in attribute_map.items():  # of the text model: num_experts
        text[old] = text[new]
    text["tie_word_embeddings"] = config["tie_word_embeddings"]  # 4 looks here alone, with False as default
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    file = Path(folder) / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in 4
    special = config.get("extra_special_tokens")
    if isinstance(special, list):
        # 4 expects a dict under this name, and a list under another
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_folder(aside, folder):
    """aside -> folder. A folder on its way out is called *.unfinished as well: those of other names are whole at any moment."""
    old = Path(f"{folder}.old.unfinished")
    if Path(folder).exists():
        os.rename(folder, old)
    if aside is not None:
        os.rename(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def check_finite(value, what):
    if not math.isfinite(value):
        raise FloatingPointError(f"the {what} is {value}")


STAGES = ("sft", "grpo")


def checkpoints(output):
    """Whole checkpoints of a run, the oldest first: folders checkpoint-{stage}-{steps done}."""
    found = [(re.fullmatch(r"checkpoint-(sft|grpo)-(\d+)", path.name), path) for path in Path(output).glob("checkpoint-*")]
    return [path for _, _, path in sorted((STAGES.index(match[1]), int(match[2]), path) for match, path in found if match)]


class Checkpoints:
    """What a run needs to go on: writes it every --save_steps and on SIGTERM or SIGINT, and reads it.

    A folder holds the model as from_pretrained and vLLM load it, deepspeed/ (parameters, optimizer), rank{r}.pt (random states and what
    the stage keeps, of every rank) and state.json. It is written aside and renamed: one of this name is whole.
    """

    def __init__(self, arguments, processor, files, resume):
        self.arguments, self.processor, self.files = arguments, processor, files  # files: {name: file that the run writes to} on rank 0
        self.resume = resume  # state.json and "folder" of the checkpoint that this run goes on from, or {}
        self.shared, self.signals = {}, []  # shared: what else goes into state.json

    def on_signal(self, number, _):
        self.signals.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait; launchers send several SIGTERM
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this step\n".encode())  # print() may be what it interrupts

    def release(self):
        """Signals end the program again, as one that came after the last step does: no step follows."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.signals:
            sys.exit(128 + self.signals[0])

    def load(self, engine, stage):
        """-> steps of the stage that are done, and what each rank kept (None at the start of a stage). From here on signals wait."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        if self.resume.get("stage") != stage:
            return 0, None
        folder = self.resume["folder"]
        engine.load_checkpoint(folder, tag="deepspeed")
        kept = torch.load(Path(folder) / f"rank{dist.get_rank()}.pt", weights_only=True)
        torch.set_rng_state(kept.pop("rng"))
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(kept.pop("cuda_rng"))
        say(f"going on after step {self.resume['step']} of {stage} ({folder})")
        return self.resume["step"], kept

    def after_step(self, engine, stage, step, last, **kept):
        """Saves when it is time to after `step` steps of `last`; ends the run if a rank was told to stop."""
        stop = torch.tensor(max(self.signals, default=0), device=engine.device)
        dist.all_reduce(stop, dist.ReduceOp.MAX)
        every = self.arguments.save_steps
        if stop or every and (step % every == 0 or step == last):
            self.save(engine, stage, step, kept)
        if stop:
            say(f"stopped by {signal.Signals(int(stop)).name} after step {step} of {last} of {stage}; "
                "--resume_from_checkpoint auto goes on from there")
            dist.barrier()
            sys.exit(128 + int(stop))

    def save(self, engine, stage, step, kept):
        folder = Path(self.arguments.output_dir) / f"checkpoint-{stage}-{step}"
        aside = Path(f"{folder}.unfinished")
        try:
            save_model(engine, self.processor, aside)
            engine.save_checkpoint(str(aside), tag="deepspeed", save_latest=False)
            kept["rng"] = torch.get_rng_state()
            if torch.cuda.is_available():
                kept["cuda_rng"] = torch.cuda.get_rng_state()
            torch.save(kept, aside / f"rank{dist.get_rank()}.pt")
            if is_main():
                sizes = {name: os.fstat(file.fileno()).st_size for name, file in self.files.items()}
                state = {"stage": stage, "step": step, "ranks": dist.get_world_size(), "sizes": sizes, "settings": asdict(self.arguments),
                         **self.shared}
                (aside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(self.arguments.output_dir).free / 1e6
            for leftover in (aside, f"{aside}.unfinished"):  # save_model's own
                shutil.rmtree(leftover, ignore_errors=True)
            raise DataError(f"checkpoint {folder} could not be written ({first_words(error)}; {free:,.0f} MB of disk were free); "
                            f"{self.last()}") from error
        dist.barrier()
        if is_main():
            replace_folder(aside, folder)
            for old in checkpoints(self.arguments.output_dir)[: -self.arguments.save_total_limit]:
                replace_folder(None, old)

    @contextmanager
    def guard(self, stage, step, examples):
        """Ends the run if a number inside is not finite (check_finite), before it reaches a checkpoint."""
        try:
            yield
        except FloatingPointError as error:
            names = ", ".join(dict.fromkeys(example.id for example in examples))
            raise DataError(f"{error} in step {step} of {stage} (rank {dist.get_rank()}, questions {names}); {self.last()}") from error

    def last(self):
        """Words for messages that end a run."""
        found = checkpoints(self.arguments.output_dir)
        return f"the last whole checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def find_checkpoint(arguments):
    """state.json of the checkpoint to go on from, with its folder; {} without one."""
    wanted = arguments.resume_from_checkpoint
    if wanted is None:
        return {}
    folder = next(iter(checkpoints(arguments.output_dir)[::-1]), None) if wanted == "auto" else Path(wanted)
    if folder is None:
        say(f"--resume_from_checkpoint auto: no checkpoint in {arguments.output_dir} yet, starting from the beginning")
        return {}
    if not (folder / "state.json").is_file():
        raise DataError(f"{folder} is not a checkpoint of this program (--resume_from_checkpoint)")
    if folder.resolve().parent != Path(arguments.output_dir).resolve():
        raise DataError(f"{folder} belongs to the run in {folder.parent}; go on there (--output_dir {folder.parent})")
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state["ranks"] != dist.get_world_size():
        raise DataError(f"{folder} was written by {state['ranks']} processes, this run has {dist.get_world_size()}: it must have as many")
    changed = {name: value for name, value in asdict(arguments).items() if state["settings"].get(name) != value}
    fixed = sorted(changed.keys() & WHERE_A_RUN_IS)
    if fixed:
        raise DataError(f"{folder} was written with another " + ", ".join(f"--{name} ({state['settings'].get(name)})" for name in fixed))
    for name in sorted(changed.keys() - {"resume_from_checkpoint", "local_rank"}):
        say(f"going on with --{name} {changed[name]}, before it was {state['settings'].get(name)}")
        if name.startswith("sft_") and state["stage"] == "grpo":
            say(f"--{name} changes nothing any more: SFT is over")
        elif name in LENGTHS:
            say("the learning rate's schedule is stretched over the new number of steps, from the next step on")
    return {**state, "folder": str(folder)}


# settings that say which questions come at which step, and of what the scores before and after are
WHERE_A_RUN_IS = {"stage", "seed", "dataset_name", "eval_dataset_name", "toy_dir", "per_device_train_batch_size",
                  "gradient_accumulation_steps", "sft_per_device_batch_size", "sft_gradient_accumulation_steps", "invert_questions"}
# settings that say how many steps there are: the order of the questions is the same for all of their values
LENGTHS = ("max_steps", "num_train_epochs", "sft_max_steps", "sft_num_train_epochs")


# ----------------------------------------------------------------------------------------------------------------------------- model inputs


def encode(encoder, example, row, shuffle=None):
    """-> model inputs of an example, and those with its frames in the order `shuffle` (None without one)."""
    return encoder.encode(example, row), None if shuffle is None else encoder.encode(example, row, shuffle=shuffle)


def start_encoding(encoder):
    """Of a worker process: its encoder stays, with what it has decoded."""
    global worker_encoder
    worker_encoder = encoder
    prior.start_worker(pin=False)


def encode_in_worker(*request):
    # as arrays: torch would pass its tensors on in shared memory that lives as long as this process
    to_numpy = lambda item: {name: value.numpy() if torch.is_tensor(value) else value for name, value in item.items()}  # noqa: E731
    return [item and to_numpy(item) for item in encode(worker_encoder, *request)]


class Inputs:
    """Model inputs of examples. Workers decode them ahead of their turn, so that the accelerator does not wait, and a decoder that hangs
    costs its example alone; with 0 workers they are encoded in this process when their turn comes."""

    def __init__(self, encoder, workers, timeout):
        self.encoder, self.timeout, self.waiting, self.pool = encoder, timeout, {}, None
        if workers:
            context, empty = multiprocessing.get_context("forkserver"), copy.copy(encoder)  # forks of a process without threads or CUDA
            empty.media, empty.media_bytes = OrderedDict(), 0  # what it holds goes to no worker
            self.pool = ProcessPool(workers, initializer=start_encoding, initargs=(empty,), context=context)

    def ahead(self, requests):
        """requests: (place in the run, example, its row of the priors, order of the control's frames or None)."""
        for place, *request in requests if self.pool else ():
            self.waiting[place] = self.schedule(request)

    def schedule(self, request):
        return self.pool.schedule(encode_in_worker, args=request, timeout=self.timeout)

    def take(self, place, example, *request):
        """What encode() returns; MediaError if the medium cannot be decoded."""
        if self.pool is None:
            return encode(self.encoder, example, *request)
        task = self.waiting.pop(place)
        for last in (False, True):
            try:
                items = task.result()
                break
            except TimeoutError as error:
                raise MediaError(f"{example.media}: not decoded within {self.timeout:g} s (--decode_timeout)") from error
            except ProcessExpired as error:  # of the medium, or of a signal to the whole job: once more
                if last:
                    raise MediaError(f"{example.media}: the decoder died of it (exit code {error.exitcode})") from error
                task = self.schedule((example, *request))
        to_torch = lambda item: {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value  # noqa: E731
                                 for name, value in item.items()}
        return [item and to_torch(item) for item in items]

    def stop(self):
        if self.pool:
            self.pool.stop()
            self.pool.join()

    def usable(self, requests, limit, skipped):
        """(place, example, model inputs, the control's) of the requests; those without, or of more than `limit` tokens, are named in
        `skipped`, those of other ranks too: all of them call this at the same time."""
        found, broken = [], {}
        for place, example, *request in requests:
            try:
                item, control = self.take(place, example, *request)
                if len(item["input_ids"]) > limit:
                    raise MediaError(f"{example.media}: the prompt has {len(item['input_ids'])} tokens (--max_prompt_length {limit})")
                found.append((place, example, item, control))
            except MediaError as error:
                broken[example.id] = str(error)
        share_skipped(broken, skipped)
        return found
