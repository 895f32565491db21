"""DeepSpeed engines: their start, their weights for sampling, the learning rate, trackers.

check_deepspeed_file(arguments)                                # before anything is loaded
engine = start_engine(arguments, path, learning_rate=1e-6)     # ZeRO-0 to 3, one process or many
with sampling(engine) as model:                                # the weights without the engine
    samples = rollout(model, ...)
"""

import copy
import difflib
import importlib.util
import os
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from transformers import AutoConfig
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from common.checkpoints import keep_names
from common.data import DataError, read_document
from common.lora import add_adapters, merge_adapters
from common.policy import Policy, checkpoint_activations, load_weights
from common.ranks import log_main

# Sections of a DeepSpeed file that send metrics somewhere, and the package that each needs.
MONITORS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "comet": "comet_ml",
    "csv_monitor": "csv",
}

SECTIONS = ("fp16", "bf16", "optimizer", "zero_optimization", *MONITORS)


def read_deepspeed_file(arguments):
    """Reads the --deepspeed file.

    Returns:
        HfTrainerDeepSpeedConfig, with "auto" where the file has it.
    Errors: DataError if it is missing, not JSON, or has something else where a section belongs.
    """
    # Read anew by every caller, since each changes it.
    file = arguments.deepspeed
    config = read_document(file, "DeepSpeed configuration")
    if not isinstance(config, dict):
        raise DataError(f"DeepSpeed configuration {file} is not a JSON object")
    # DeepSpeed would leave out a section whose name it does not know.
    for name in config.keys() - set(SECTIONS):
        for known in difflib.get_close_matches(name, SECTIONS, cutoff=0.75):
            raise DataError(f"{file} has {name}, which DeepSpeed does not know; is it {known}?")
    for name in SECTIONS:
        section = config.get(name, {})
        if not isinstance(section, dict):
            raise DataError(f"{name} in {file} is {section!r}, not an object")
    return HfTrainerDeepSpeedConfig(config)


def deepspeed_config(arguments, hidden_size, micro_batch=1, accumulation=1, learning_rate=None):
    """Configuration of an engine: the --deepspeed file with every "auto" filled.

    Values are those of Hugging Face's Trainer; what flags decide is replaced.

    Args:
        hidden_size: width of the language model; sizes of ZeRO's buckets follow from it.
        learning_rate: None for an engine without an optimizer (reference, scoring).
    Returns:
        dict without "auto".
    Errors: DataError for fp16, for an "auto" that nothing fills, for an optimizer without a type.
    """
    file = read_deepspeed_file(arguments)
    config = file.config
    # Flags and the training loop decide these. Tracker writes the metrics of all engines.
    for name in ("train_batch_size", "scheduler", *MONITORS):
        config.pop(name, None)
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["gradient_accumulation_steps"] = accumulation
    # A file without these takes the flags, too, and bfloat16 on a GPU if it names no type.
    config.setdefault("gradient_clipping", "auto")
    if not {"bfloat16", "torch_autocast"} & config.keys():
        config.setdefault("bf16", {}).setdefault("enabled", "auto")
    if learning_rate is None:
        config.pop("optimizer", None)
    else:
        parameters = optimizer_parameters(file)
        parameters["lr"] = learning_rate
        parameters.setdefault("weight_decay", "auto")
        # Sums of many bfloat16 gradients lose the small ones. Stages 0 and 1 sum in no other type.
        if file.get_value("zero_optimization.stage") in (2, 3):
            config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")

    # As in HfTrainerDeepSpeedConfig; betas and eps are the defaults of TrainingArguments.
    values = {
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
    for key, value in values.items():
        file.fill_only(key, value)
    keys = ", ".join(find_autos(config))
    if keys:
        raise DataError(f'{arguments.deepspeed}: nothing fills the "auto" of {keys}; write a value')
    if file.is_true("fp16.enabled"):
        raise DataError(f"{arguments.deepspeed} asks for fp16, which is not supported; use bf16")
    zero = config.get("zero_optimization", {})
    if shares_nothing(zero):
        zero["stage"] = 2
        zero["overlap_comm"] = False  # would only double the bucket
    # ZeRO-3's own linear layers save the accelerator's memory; on a CPU they cost time alone.
    if not torch.cuda.is_available():
        zero.setdefault("memory_efficient_linear", False)
    if learning_rate is None:
        zero.pop("offload_optimizer", None)
        # Stages 1 and 2 partition only what an optimizer has.
        if zero.get("stage") in (1, 2):
            zero["stage"] = 0
    # A moving reference, which with LoRA is in the policy's own engine.
    if arguments.ema_decay < 1 and (learning_rate is None or arguments.lora_rank):
        if (zero.get("offload_param") or {}).get("device") == "nvme":
            raise DataError("--ema_decay below 1 needs the parameters in memory, not on nvme")
        # write_shards() writes to the shards, so no parameter may stay whole.
        zero["stage3_param_persistence_threshold"] = 0
    return config


def shares_nothing(zero):
    """Whether this is ZeRO-3 on one rank, and offloads nothing.

    ZeRO-2 then computes the same without ZeRO-3's work at every module, which on an H200 made the
    forwards and backward of a 3B model 8 times as long, with LoRA 15 times (docs/performance.md).
    """
    offloads = any(value for key, value in zero.items() if "offload" in key)
    return zero.get("stage") == 3 and dist.get_world_size() == 1 and not offloads


def optimizer_parameters(file):
    """optimizer.params of a file, which gets AdamW with ds_zero3.json's betas if it has none.

    Errors: DataError for a section without a type.
    """
    missing = "optimizer" not in file.config
    default = {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}
    optimizer = file.config.setdefault("optimizer", default)
    if not isinstance(optimizer.get("type"), str):
        raise DataError("optimizer in the DeepSpeed configuration has no type, for example AdamW")
    parameters = optimizer.setdefault("params", {})
    # DeepSpeed compiles its Adam on first use, for minutes, and without a GPU gains nothing by it.
    # On a GPU it is used where a file's section asks for it, or for offloaded states.
    offloads = file.get_value("zero_optimization.offload_optimizer.device", "none") != "none"
    use_torch = not torch.cuda.is_available() or (missing and not offloads)
    if use_torch and optimizer["type"].lower() in ("adam", "adamw"):
        parameters.setdefault("torch_adam", True)
    # torch's other Adams copy all that they update; on a CPU (offload) they are many times slower.
    if parameters.get("torch_adam"):
        parameters.setdefault("fused", True)
    return parameters


def find_autos(node, name=""):
    """Dotted keys whose value is "auto"."""
    if node == "auto":
        yield name
    if isinstance(node, dict):
        for key, value in node.items():
            if key != "keep_in_fp32_modules":  # DeepSpeed's own "auto"
                yield from find_autos(value, f"{name}.{key}".lstrip("."))


def check_deepspeed_file(arguments, checkpoint=None):
    """Checks the --deepspeed file before a model is loaded, and logs what the run overrides.

    The ranks must have started.

    Args:
        checkpoint: folder that the run goes on from.
    Errors: DataError for whatever is wrong with it, a missing package of a tracker included.
    """
    name = arguments.deepspeed
    file = read_deepspeed_file(arguments)
    # DeepSpeed would fail only when the first engine starts.
    for section, package in MONITORS.items():
        if file.is_true(f"{section}.enabled") and importlib.util.find_spec(package) is None:
            raise DataError(f"{name} enables {section}, not installed: pip install {package}")
    try:
        training = deepspeed_config(arguments, hidden_size=1, learning_rate=arguments.learning_rate)
        get_monitor_config(file.config)
        DeepSpeedConfig(training)
        DeepSpeedConfig(deepspeed_config(arguments, hidden_size=1))
    except DataError:
        raise
    except (AssertionError, AttributeError, DeepSpeedConfigError, TypeError, ValueError) as error:
        words = " ".join(str(error).split())
        raise DataError(f"DeepSpeed does not take {name}: {words}") from error
    # ZeRO-3 alone writes its part of the model for every rank, and reads no other files.
    if checkpoint:
        stage = training.get("zero_optimization", {}).get("stage", 0)
        parts = any(Path(checkpoint, "deepspeed").glob("zero_pp_rank_*_model_states.pt"))
        if (stage == 3) != parts:
            raise DataError(
                f"{checkpoint} was written under ZeRO-{'3' if parts else '2 or less'}, which "
                f"ZeRO-{stage} of this run cannot read; set the stage of then in zero_optimization "
                f'of {name}, for ZeRO-3 on one process with "offload_param": {{"device": "none"}}'
            )
    log_overrides(arguments, file)
    if "optimizer" not in file.config:
        log_main(f"{name} has no optimizer: AdamW with betas 0.9, 0.95 as in ds_zero3.json")


# Keys of a DeepSpeed file that flags decide.
DECIDED_BY_FLAGS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer.params.lr",
    "scheduler",
)
# Keys that win over a flag.
INSTEAD_OF_FLAGS = {
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.weight_decay": "weight_decay",
}


def log_overrides(arguments, file):
    """Logs values of the DeepSpeed file that the run ignores, and those that replace a flag."""
    name = arguments.deepspeed
    for key in DECIDED_BY_FLAGS:
        value = file.get_value(key, "auto")
        if value != "auto":
            log_main(f"{name}: {key} {value} is not used, the flags of train.py decide it")
    for key, flag in INSTEAD_OF_FLAGS.items():
        value = file.get_value(key, "auto")
        if value not in ("auto", getattr(arguments, flag)):
            log_main(f"{name}: {key} {value} is used, --{flag} {getattr(arguments, flag)} is not")
    if shares_nothing(file.config.get("zero_optimization", {})):
        log_main(f"{name}: one process shares nothing, so ZeRO-2 runs instead of ZeRO-3")


def start_engine(arguments, model_path, micro_batch=1, accumulation=1, learning_rate=None):
    """Loads a checkpoint into a DeepSpeed engine around a Policy, partitioned while it loads.

    Args:
        micro_batch, accumulation: examples per rank and forward, forwards per optimizer step.
        learning_rate: None for a frozen engine in eval mode.
    Errors: DataError if the checkpoint cannot be loaded or lacks weights.
    """
    hidden_size = AutoConfig.from_pretrained(model_path).get_text_config().hidden_size
    config = deepspeed_config(arguments, hidden_size, micro_batch, accumulation, learning_rate)
    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
    # from_pretrained partitions the weights while this object lives.
    partitioning = HfDeepSpeedConfig(config)
    model = load_weights(model_path, dtype)
    del partitioning
    policy = Policy(model)
    # None: DeepSpeed gets no parameters to optimize.
    trained = None
    if learning_rate is None:
        policy.requires_grad_(False)
    else:
        keep_names(policy, model_path)
        choose_trained(model, arguments)
        if arguments.lora_rank:
            add_adapters(policy, arguments)
        if arguments.gradient_checkpointing:
            checkpoint_activations(model)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    twin = hookless_twin(model)
    engine, *_ = deepspeed.initialize(model=policy, config=config, model_parameters=trained)
    vars(engine)["twin"] = twin  # not as a part of it, which its parameters would be
    engine.train(learning_rate is not None)
    return engine


def end_engine(engine):
    """Ends an engine and frees its memory, though DeepSpeed goes on referring to its parts."""
    engine.destroy()
    for parameter in engine.module.parameters():
        parameter.data = parameter.new_empty(0)
        parameter.grad = None
        # what ZeRO-3 has attached to it: its partition
        vars(parameter).clear()
    for part in (engine.optimizer, engine):
        vars(part).clear()


def hookless_twin(model):
    """A model's modules again around parameters that hold nothing; sampling() lends it the model's.

    It is made before DeepSpeed hooks the model.
    """
    hollow = {}
    for parameter in model.parameters():
        # One number's memory, in the shape of them all.
        shape = parameter.new_empty(()).expand(parameter.shape)
        hollow[id(parameter)] = torch.nn.Parameter(shape, False)
    return copy.deepcopy(model, hollow).eval()


@contextmanager
def sampling(engine, adapters=True):
    """The engine's twin with the model's weights, in eval mode, for a rollout phase.

    Adapters (LoRA) are merged into the twin's weights, or without `adapters` left out.
    ZeRO-3 parameters are gathered once. The model keeps its hooks, and what they know of the order
    of its modules. ZeRO-3's torch.nn.functional.linear, an autograd function that binds a signature
    on every call, is off.
    """
    model = engine.module.model
    twin = engine.twin
    parameters = list(model.parameters())
    linear = torch.nn.functional.linear
    with deepspeed.zero.GatheredParameters(parameters):
        lend([*parameters, *model.buffers()], [*twin.parameters(), *twin.buffers()])
        merge_adapters(twin, adapters)
        torch.nn.functional.linear = torch._C._nn.linear
        try:
            yield twin
        finally:
            torch.nn.functional.linear = linear
            lend([torch.empty(0)] * len(parameters), twin.parameters())


def lend(tensors, borrowers):
    """Lets each borrower hold the memory of a tensor."""
    for tensor, borrower in zip(tensors, borrowers, strict=True):
        borrower.data = tensor.data


def choose_trained(model, arguments):
    """Freezes the vision tower (--freeze_vision), or all but its mergers (--train_only_merger)."""
    model.model.visual.requires_grad_(not arguments.freeze_vision)
    if arguments.train_only_merger:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".visual." in name and "merger" in name)


def set_learning_rate(engine, step, steps, peak, warmup_ratio):
    """Sets the learning rate of a step: a linear warm-up, the peak, a linear fall to a tenth of it.

    Args:
        warmup_ratio: share of the steps; the fall takes 30 % of them.
    """
    rise = min(1.0, (step + 1) / max(1, round(warmup_ratio * steps)))
    # 0 until the fall begins, 1 at the end.
    fall = max(0.0, 1 - (steps - step) / max(1, round(0.3 * steps)))
    for group in engine.optimizer.param_groups:
        group["lr"] = peak * rise * (1 - 0.9 * fall)


class Tracker:
    """Sends the records of metrics.jsonl to the trackers that the --deepspeed file enables.

    One writer, DeepSpeed's on rank 0, for the whole run: GRPO's steps are numbered after SFT's.

    Args:
        run_id: of the W&B run; a run that goes on keeps its id.
        step: steps that the trackers already have.
    """

    def __init__(self, arguments, run_id, step):
        os.environ.setdefault("WANDB_RUN_ID", run_id)
        os.environ.setdefault("WANDB_RESUME", "allow")
        config = read_deepspeed_file(arguments).config
        self.monitor = MonitorMaster(get_monitor_config(config))
        self.step = step

    def show(self, record):
        """Sends the record of a step {"stage", "step", metric: value, ...}."""
        stage = record["stage"]
        # Only metrics have a slash.
        metrics = [name for name in record if "/" in name]
        events = [(f"{stage}/{name}", record[name], self.step) for name in metrics]
        self.monitor.write_events(events)
        self.step += 1


def update_averages(averages, engine, decay):
    """Moves averages of what an engine trains (GRPO-CARE), each rank its shards of both.

    average <- decay * average + (1 - decay) * policy

    Args:
        averages: {name: float32 shard}, kept between calls: a step of 0.5 % would be rounded away
            in bfloat16. Empty at first, then it starts with the policy.
    """
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            own = shard(parameter).float()
            average = averages[name] if name in averages else own.clone()
            # Those of a checkpoint come on the CPU.
            averages[name] = average.to(own.device).lerp_(own, 1 - decay)


def shard(parameter):
    """This rank's part of a parameter under ZeRO-3, else all of it."""
    return getattr(parameter, "ds_tensor", parameter.data)


def write_shards(engine, values):
    """Copies {name: shard} into an engine."""
    for name, parameter in engine.module.named_parameters():
        if name in values:
            shard(parameter).copy_(values[name])


def score_without_adapters(engine, averages, *packed):
    """Scores one forward as the reference of a LoRA run does: by the policy without its adapters.

    Args:
        averages: moving averages of the adapters, which then take their place, or {}.
        packed: of Policy.forward.
    Returns:
        Scored.
    """
    named = engine.module.named_parameters()
    own = {name: shard(parameter).clone() for name, parameter in named if name in averages}
    write_shards(engine, averages)
    with sampling(engine, adapters=bool(averages)) as model:
        scored = Policy(model)(*packed)
    write_shards(engine, own)
    return scored
