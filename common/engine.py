"""What keeps a run going around the algorithm in train.py: ranks, DeepSpeed engines, checkpoints, media decoded ahead.

A checkpoint is a folder checkpoint-{stage}-{steps}: the model as from_pretrained and vLLM load it, deepspeed/ (parameters and optimizer),
rank{r}.pt and state.json. Runs under ZeRO-0 to 3, on one process or many.
"""

import copy
import importlib.util
import json
import multiprocessing
import os
import uuid
from collections import OrderedDict
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from pebble import ProcessExpired, ProcessPool
from transformers import AutoConfig
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from common.checkpoints import keep_names
from common.data import DataError, MediaError
from common.policy import Policy, checkpoint_activations, load_weights
from common.ranks import is_main, say, share_skipped
from common.workers import start_worker

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
                raise DataError(
                    "--ema_decay below 1 needs the parameters in memory, not offloaded to nvme"
                )
            zero["stage3_param_persistence_threshold"] = (
                0  # update_reference() writes to the shards
            )
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
    model = load_weights(model_path, dtype)
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
        engine, *_ = deepspeed.initialize(
            model=policy,
            config=config,
            model_parameters=[p for p in policy.parameters() if p.requires_grad],
        )
        engine.train()
    return engine


def choose_trained(model, arguments):
    """Which parameters learn: all, all but the vision tower, or the mergers between tower and language model alone."""
    model.model.visual.requires_grad_(not arguments.freeze_vision)
    if arguments.train_only_merger:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".visual." in name and "merger" in name)


def set_learning_rate(engine, step, steps, peak, warmup_ratio, decay_ratio=0.3):
    """Up, flat, down: a linear warm-up, the peak, and over the last `decay_ratio` of the steps linearly to a tenth of it."""
    rise = min(1.0, (step + 1) / max(1, round(warmup_ratio * steps)))
    fall = max(
        0.0, 1 - (steps - step) / max(1, round(decay_ratio * steps))
    )  # 0 until the decay begins, 1 at the end
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
    for (name, kept), moved in zip(
        reference.module.named_parameters(), engine.module.parameters(), strict=True
    ):
        averages.setdefault(name, shard(kept).float().clone()).lerp_(
            shard(moved).float(), 1 - decay
        )
    write_shards(reference, averages)


def shard(parameter):
    """This rank's part of a parameter under ZeRO-3, else all of it."""
    return getattr(parameter, "ds_tensor", parameter.data)


def write_shards(reference, averages):
    for name, parameter in reference.module.named_parameters():
        shard(parameter).copy_(averages[name])


def encode(encoder, example, row, shuffle=None):
    """-> model inputs of an example, and those with its frames in the order `shuffle` (None without one)."""
    return encoder.encode(example, row), None if shuffle is None else encoder.encode(
        example, row, shuffle=shuffle
    )


def start_encoding(encoder):
    """Of a worker process: its encoder stays, with what it has decoded."""
    global worker_encoder
    worker_encoder = encoder
    start_worker(pin=False)


def encode_in_worker(*request):
    # as arrays: torch would pass its tensors on in shared memory that lives as long as this process
    to_numpy = lambda item: {
        name: value.numpy() if torch.is_tensor(value) else value for name, value in item.items()
    }  # noqa: E731
    return [item and to_numpy(item) for item in encode(worker_encoder, *request)]


class Inputs:
    """Model inputs of examples. Workers decode them ahead of their turn, so that the accelerator does not wait, and a decoder that hangs
    costs its example alone; with 0 workers they are encoded in this process when their turn comes."""

    def __init__(self, encoder, workers, timeout):
        self.encoder, self.timeout, self.waiting, self.pool = encoder, timeout, {}, None
        if workers:
            context, empty = (
                multiprocessing.get_context("forkserver"),
                copy.copy(encoder),
            )  # forks of a process without threads or CUDA
            empty.media, empty.media_bytes = OrderedDict(), 0  # what it holds goes to no worker
            self.pool = ProcessPool(
                workers, initializer=start_encoding, initargs=(empty,), context=context
            )

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
                raise MediaError(
                    f"{example.media}: not decoded within {self.timeout:g} s (--decode_timeout)"
                ) from error
            except (
                ProcessExpired
            ) as error:  # of the medium, or of a signal to the whole job: once more
                if last:
                    raise MediaError(
                        f"{example.media}: the decoder died of it (exit code {error.exitcode})"
                    ) from error
                task = self.schedule((example, *request))
        to_torch = lambda item: {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value  # noqa: E731
            for name, value in item.items()
        }
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
                    raise MediaError(
                        f"{example.media}: the prompt has {len(item['input_ids'])} tokens (--max_prompt_length {limit})"
                    )
                found.append((place, example, item, control))
            except MediaError as error:
                broken[example.id] = str(error)
        share_skipped(broken, skipped)
        return found
