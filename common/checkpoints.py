"""Checkpoints: complete or not there, named as their source, resumable."""

import json
import os
import re
import shutil
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from common.data import DataError, first_words
from common.policy import MISNAMED
from common.ranks import is_main, say
from common.rollout import stop_tokens


def weight_shapes(path):
    """{name: [sizes]} of a checkpoint's weights, read from the heads of its files.

    Args:
        path: a folder, or the name of a model of the hub.
    Raises:
        DataError: it has no safetensors.
    """
    files = [cached_file(path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)]
    if files == [None]:
        index = cached_file(
            path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False
        )
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
    return isinstance(conversion, WeightConverter) and all(
        isinstance(step, Transpose) for step in conversion.operations
    )


def keep_names(policy, path):
    """Lets save_model() write a policy, just loaded from the checkpoint at path, with the names and shapes that its weights have there."""
    # save_pretrained undoes the conversions that the model has. The loader for ZeRO-3 leaves all of the family, not those that matched;
    # transposed experts are not always turned back, so in_layout() does it; names that were mended stay so.
    conversions = [
        one
        for one in policy.model._weight_conversions
        if one.was_used() and not is_transposition(one)
    ]
    policy.model._weight_conversions = [
        one for one in conversions if one.target_patterns[0] not in MISNAMED.values()
    ]
    shapes = weight_shapes(path)
    policy.source, policy.shapes = path, {right_name(name): shape for name, shape in shapes.items()}
    if policy.shapes.keys() != shapes.keys():
        say(
            f"{path} has weights named model.model., as a fault of transformers made them; what this run saves has the right names"
        )


def in_layout(tensor, shape):
    """Qwen3-VL's experts are (experts, in, out) in its checkpoints and (experts, out, in) in transformers 5."""
    turned = shape is not None and list(tensor.shape) != shape and list(tensor.mT.shape) == shape
    return tensor.cpu().mT.contiguous() if turned else tensor


def check_names(policy, folder):
    """The weights just written against those of the checkpoint that the policy came from. DataError when they differ."""
    written, expected = weight_shapes(folder), dict(policy.shapes)
    if policy.model.config.tie_word_embeddings:
        expected.pop(
            "lm_head.weight", None
        )  # the embedding again; who loads a tied model does not look for it
    wrong = sorted(name for name, shape in written.items() if expected.get(name) != shape)
    lost = sorted(expected.keys() - written.keys())
    if wrong:
        raise DataError(
            f"{len(wrong)} weights in {folder} are not those of {policy.source}: the first is {wrong[0]} {written[wrong[0]]}, "
            f"there is {expected.get(wrong[0]) or ', '.join(lost[:1])}; report this with the version of transformers"
        )
    if lost:
        say(
            f"{len(lost)} weights of {policy.source} are not part of the model and not saved, the first is {lost[0]}"
        )
        policy.shapes = written  # said once


def save_model(engine, processor, folder):
    """save_pretrained format, gathered; written aside and renamed, so that a folder of this name is always complete."""
    state = (
        engine._zero3_consolidated_16bit_state_dict()
        if engine.zero_optimization_partition_weights()
        else engine.module.state_dict()
    )
    if is_main():
        aside = Path(f"{folder}.unfinished")
        state = {name.removeprefix("model."): value for name, value in state.items()}
        state = {
            name: in_layout(value, engine.module.shapes.get(name)) for name, value in state.items()
        }
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
    text["tie_word_embeddings"] = config[
        "tie_word_embeddings"
    ]  # 4 looks here alone, with False as default
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    file = Path(folder) / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in 4
    special = config.get("extra_special_tokens")
    if isinstance(special, list):
        # 4 expects a dict under this name, and a list under another
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    file.write_text(
        json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def replace_folder(aside, folder):
    """aside -> folder. A folder on its way out is called *.unfinished as well: those of other names are whole at any moment."""
    old = Path(f"{folder}.old.unfinished")
    if Path(folder).exists():
        os.rename(folder, old)
    if aside is not None:
        os.rename(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


STAGES = ("sft", "grpo")


def checkpoints(output):
    """Whole checkpoints of a run, the oldest first: folders checkpoint-{stage}-{steps done}."""
    found = [
        (re.fullmatch(r"checkpoint-(sft|grpo)-(\d+)", path.name), path)
        for path in Path(output).glob("checkpoint-*")
    ]
    return [
        path
        for _, _, path in sorted(
            (STAGES.index(match[1]), int(match[2]), path) for match, path in found if match
        )
    ]


class Checkpoints:
    """What a run needs to go on: writes it every --save_steps and on SIGTERM or SIGINT, and reads it.

    A folder holds the model as from_pretrained and vLLM load it, deepspeed/ (parameters, optimizer), rank{r}.pt (random states and what
    the stage keeps, of every rank) and state.json. It is written aside and renamed: one of this name is whole.
    """

    def __init__(self, arguments, processor, files, resume):
        self.arguments, self.processor, self.files = (
            arguments,
            processor,
            files,
        )  # files: {name: file that the run writes to} on rank 0
        self.resume = (
            resume  # state.json and "folder" of the checkpoint that this run goes on from, or {}
        )
        self.shared, self.signals = {}, []  # shared: what else goes into state.json

    def on_signal(self, number, _):
        self.signals.append(number)
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a second Ctrl-C does not wait; launchers send several SIGTERM
        os.write(
            2, f"\n{signal.Signals(number).name}: stopping after this step\n".encode()
        )  # print() may be what it interrupts

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
            say(
                f"stopped by {signal.Signals(int(stop)).name} after step {step} of {last} of {stage}; "
                "--resume_from_checkpoint auto goes on from there"
            )
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
                state = {
                    "stage": stage,
                    "step": step,
                    "ranks": dist.get_world_size(),
                    "sizes": sizes,
                    "settings": asdict(self.arguments),
                    **self.shared,
                }
                (aside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(self.arguments.output_dir).free / 1e6
            for leftover in (aside, f"{aside}.unfinished"):  # save_model's own
                shutil.rmtree(leftover, ignore_errors=True)
            raise DataError(
                f"checkpoint {folder} could not be written ({first_words(error)}; {free:,.0f} MB of disk were free); "
                f"{self.last()}"
            ) from error
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
            raise DataError(
                f"{error} in step {step} of {stage} (rank {dist.get_rank()}, questions {names}); {self.last()}"
            ) from error

    def last(self):
        """Words for messages that end a run."""
        found = checkpoints(self.arguments.output_dir)
        return (
            f"the last whole checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        )


def find_checkpoint(arguments):
    """state.json of the checkpoint to go on from, with its folder; {} without one."""
    wanted = arguments.resume_from_checkpoint
    if wanted is None:
        return {}
    folder = (
        next(iter(checkpoints(arguments.output_dir)[::-1]), None)
        if wanted == "auto"
        else Path(wanted)
    )
    if folder is None:
        say(
            f"--resume_from_checkpoint auto: no checkpoint in {arguments.output_dir} yet, starting from the beginning"
        )
        return {}
    if not (folder / "state.json").is_file():
        raise DataError(f"{folder} is not a checkpoint of this program (--resume_from_checkpoint)")
    if folder.resolve().parent != Path(arguments.output_dir).resolve():
        raise DataError(
            f"{folder} belongs to the run in {folder.parent}; go on there (--output_dir {folder.parent})"
        )
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state["ranks"] != dist.get_world_size():
        raise DataError(
            f"{folder} was written by {state['ranks']} processes, this run has {dist.get_world_size()}: it must have as many"
        )
    changed = {
        name: value
        for name, value in asdict(arguments).items()
        if state["settings"].get(name) != value
    }
    fixed = sorted(changed.keys() & WHERE_A_RUN_IS)
    if fixed:
        raise DataError(
            f"{folder} was written with another "
            + ", ".join(f"--{name} ({state['settings'].get(name)})" for name in fixed)
        )
    for name in sorted(changed.keys() - {"resume_from_checkpoint", "local_rank"}):
        say(f"going on with --{name} {changed[name]}, before it was {state['settings'].get(name)}")
        if name.startswith("sft_") and state["stage"] == "grpo":
            say(f"--{name} changes nothing any more: SFT is over")
        elif name in LENGTHS:
            say(
                "the learning rate's schedule is stretched over the new number of steps, from the next step on"
            )
    return {**state, "folder": str(folder)}


# settings that say which questions come at which step, and of what the scores before and after are
WHERE_A_RUN_IS = {
    "stage",
    "seed",
    "dataset_name",
    "eval_dataset_name",
    "toy_dir",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "sft_per_device_batch_size",
    "sft_gradient_accumulation_steps",
    "invert_questions",
}

# settings that say how many steps there are: the order of the questions is the same for all of their values
LENGTHS = ("max_steps", "num_train_epochs", "sft_max_steps", "sft_num_train_epochs")
