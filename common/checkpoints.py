"""Checkpoints of a run: whole or absent, named as their source names its weights, resumable.

checkpoint = Checkpoints(arguments, processor, find_checkpoint(arguments), shared)
done, kept = checkpoint.load(engine, "grpo")          # 0, {} at the beginning
for step in range(done, steps):
    ...
    checkpoint.after_step(engine, "grpo", step + 1, steps, kept)
checkpoint.release()
save_model(engine, processor, output / "grpo")

A checkpoint is a folder checkpoint-{stage}-{steps done}: the model as from_pretrained and vLLM load
it, deepspeed/ (parameters and optimizer), rank{r}.pt (random states and what a rank keeps) and
state.json (settings, sizes of the logs, what all ranks share). It is written aside and renamed, so
that a folder of this name is whole.
"""

import json
import os
import re
import shutil
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import Transpose
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from common.data import DataError, first_words, read_document
from common.lora import save_adapter
from common.policy import MISNAMED
from common.ranks import gather, is_main, log_main, wait_for_all
from common.rollout import stop_tokens

# What a run appends to. A run that goes on cuts them to their length at its checkpoint.
LOGS = ("metrics.jsonl", "rollouts.jsonl")

# Settings of a group of the optimizer's parameters that a resumed run may change.
OF_THE_RUN = ("betas", "eps", "weight_decay")

# What DeepSpeed and torch raise at files that are torn, of another model or ZeRO stage.
LOAD_ERRORS = (
    AssertionError,
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def weight_shapes(path):
    """Reads the shapes of a checkpoint's weights from the heads of its files.

    Args:
        path: folder with safetensors, or model id of the hub.
    Returns:
        {name: list of sizes}
    """
    files = [cached_file(path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)]
    if files == [None]:
        files, _ = get_checkpoint_shard_files(path, cached_file(path, SAFE_WEIGHTS_INDEX_NAME))
    shapes = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}
    return shapes


def keep_names(policy, path):
    """Makes save_model() write the names and shapes of the checkpoint that a policy came from.

    Args:
        path: that checkpoint, just loaded.
    """
    # save_pretrained undoes the conversions that the model lists. Under ZeRO-3 the loader lists all
    # of the family, not those that matched.
    used = []
    for conversion in policy.model._weight_conversions:
        steps = {type(step) for step in getattr(conversion, "operations", [])}
        # Transposed experts are not always turned back, so in_layout() does it.
        if conversion.was_used() and steps != {Transpose}:
            # Mended names stay mended.
            if conversion.target_patterns[0] not in MISNAMED.values():
                used.append(conversion)
    policy.model._weight_conversions = used
    policy.source = path
    policy.shapes = {}
    shapes = weight_shapes(path)
    for name, shape in shapes.items():
        for wrong, right in MISNAMED.items():
            name = re.sub(wrong, right, name)
        policy.shapes[name] = shape
    if policy.shapes.keys() != shapes.keys():
        log_main(
            f"{path} has weights named model.model., as a fault of transformers made them; "
            "what this run saves has the right names"
        )


def in_layout(tensor, shape):
    """A weight in the layout of the source checkpoint.

    Qwen3-VL's experts are (experts, in, out) there and (experts, out, in) in transformers 5.

    Args:
        shape: list of sizes there; None for a weight that it has not.
    """
    if shape is None or list(tensor.shape) == shape or list(tensor.mT.shape) != shape:
        return tensor
    return tensor.cpu().mT.contiguous()


def check_names(policy, folder):
    """Compares the weights just written with those of the checkpoint that the policy came from.

    Errors: DataError if a name or a shape differs.
    """
    written = weight_shapes(folder)
    expected = dict(policy.shapes)
    # A tied output layer is the embedding; loaders do not look for it.
    if policy.model.config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    wrong = sorted(name for name, shape in written.items() if expected.get(name) != shape)
    lost = sorted(expected.keys() - written.keys())
    if wrong:
        first = wrong[0]
        raise DataError(
            f"{len(wrong)} weights in {folder} are not those of {policy.source}: the first is "
            f"{first} {written[first]}, there is {expected.get(first) or ', '.join(lost[:1])}; "
            "report this with the version of transformers"
        )
    if lost:
        log_main(
            f"{len(lost)} weights of {policy.source} are not part of the model and not saved, "
            f"the first is {lost[0]}"
        )
        # Log it once.
        policy.shapes = written


def save_model(engine, processor, folder):
    """Writes a trained engine's model as save_pretrained does, gathered from all ranks.

    Adapters (LoRA) are merged into it, and written to its folder adapter/ as well. The folder is
    written aside and renamed. All ranks call this.
    """
    if engine.zero_optimization_partition_weights():
        state = engine._zero3_consolidated_16bit_state_dict()
    else:
        state = engine.module.state_dict()
    if is_main():
        policy = engine.module
        weights = {}
        for name, value in state.items():
            name = name.removeprefix("model.")  # Policy's attribute
            weights[name] = in_layout(value, policy.shapes.get(name))
        aside = Path(f"{folder}.unfinished")
        if hasattr(policy.model, "peft_config"):
            weights = save_adapter(policy.model, weights, aside / "adapter")
        # What ended completions here ends them for every reader.
        policy.model.generation_config.eos_token_id = stop_tokens(policy.model, processor)
        policy.model.save_pretrained(aside, state_dict=weights)
        processor.save_pretrained(aside)
        check_names(policy, aside)
        write_for_version_4(aside, policy.model.config.text_config.attribute_map)
        replace_folder(aside, folder)
    wait_for_all()


@contextmanager
def edit_json(file):
    """Gives the object in a JSON file to a block that changes it, and writes it back."""
    content = read_document(file)
    yield content
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def write_for_version_4(folder, attribute_map):
    """Repeats settings of transformers 5 where version 4, and servers built on it, look for them.

    Args:
        folder: Path of a saved model.
        attribute_map: {old name: new name} of the text model's settings.
    """
    with edit_json(folder / "config.json") as config:
        text = config["text_config"]
        rope = dict(text["rope_parameters"])  # rope_type, mrope_section, ..., rope_theta
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope
        for old, new in attribute_map.items():
            text[old] = text[new]
        # Version 4 looks only here, with False as default.
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    with edit_json(folder / "tokenizer_config.json") as config:
        if config["tokenizer_class"] == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Version 4 expects a dict under this name.
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")


def replace_folder(aside, folder):
    """Renames the folder `aside` to `folder`, whose former content is deleted; None only deletes.

    A folder on its way out is named *.unfinished, too.
    """
    old = Path(f"{folder}.old.unfinished")
    if Path(folder).exists():
        os.rename(folder, old)
    if aside is not None:
        os.rename(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def checkpoints(output):
    """Folders of a run's whole checkpoints, the oldest first."""
    found = []
    for path in Path(output).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(sft|grpo)-(\d+)", path.name)
        if match:
            found.append((match[1] == "grpo", int(match[2]), path))
    return [path for _, _, path in sorted(found)]


@dataclass
class Checkpoints:
    """Writes what a run needs to go on, at --save_steps, SIGTERM and SIGINT, and reads it."""

    arguments: object  # TrainArguments
    processor: object
    resume: dict  # what find_checkpoint() returned
    shared: dict  # more values for state.json; the run may add to them
    received: int = 0  # signal

    def on_signal(self, number, _):
        self.received = number
        # A second Ctrl-C does not wait. Launchers send several SIGTERM.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print(), which the signal may have interrupted.
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this step\n".encode())

    def release(self):
        """Lets signals end the program again; one that came after the last step ends it now."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.received:
            sys.exit(128 + self.received)

    def load(self, engine, stage):
        """Restores an engine and the random states; from here on signals wait for after_step().

        Returns:
            steps of the stage that are done; what after_step() kept on this rank, {} at 0 steps.
        """
        # A step in the middle cannot be saved.
        signal.signal(signal.SIGTERM, self.on_signal)
        signal.signal(signal.SIGINT, self.on_signal)
        if self.resume.get("stage") != stage:
            return 0, {}
        folder = self.resume["folder"]
        # The state of an optimizer has its settings, too: those of this run stay.
        own = []
        for group in engine.optimizer.param_groups:
            own.append({name: group[name] for name in OF_THE_RUN if name in group})
        try:
            # What is frozen is not in it.
            engine.load_checkpoint(folder, tag="deepspeed", load_module_strict=False)
            for group, settings in zip(engine.optimizer.param_groups, own, strict=True):
                group.update(settings)
            # Ranks may sit on other devices now.
            file = Path(folder) / f"rank{dist.get_rank()}.pt"
            kept = torch.load(file, map_location="cpu", weights_only=True)
        except LOAD_ERRORS as error:
            raise DataError(
                f"{folder} cannot be loaded ({first_words(error)}): it must be whole, and of this "
                "run's model, and of the ZeRO stage and bf16 of its --deepspeed file"
            ) from error
        torch.set_rng_state(kept.pop("rng"))
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(kept.pop("cuda_rng"))
        log_main(f"going on after step {self.resume['step']} of {stage} ({folder})")
        return self.resume["step"], kept

    def after_step(self, engine, stage, step, last, kept):
        """Saves if it is time to, and ends the run if a rank received a signal.

        Args:
            step: steps of the stage that are done, of `last`.
            kept: dict that load() returns to this rank.
        """
        # A signal may have reached one rank alone.
        stop = max(gather(self.received))
        every = self.arguments.save_steps
        due = every > 0 and (step % every == 0 or step == last)
        if stop or due:
            self.save(engine, stage, step, kept)
        if stop:
            name = signal.Signals(stop).name
            log_main(
                f"stopped by {name} after step {step} of {last} of {stage}; "
                "--resume_from_checkpoint auto goes on from there"
            )
            dist.barrier()
            sys.exit(128 + stop)

    def save(self, engine, stage, step, kept):
        output = Path(self.arguments.output_dir)
        folder = output / f"checkpoint-{stage}-{step}"
        aside = Path(f"{folder}.unfinished")
        try:
            save_model(engine, self.processor, aside)
            engine.save_checkpoint(
                str(aside), "deepspeed", save_latest=False, exclude_frozen_parameters=True
            )
            kept["rng"] = torch.get_rng_state()
            if torch.cuda.is_available():
                kept["cuda_rng"] = torch.cuda.get_rng_state()
            torch.save(kept, aside / f"rank{dist.get_rank()}.pt")
            if is_main():
                state = {
                    "stage": stage,
                    "step": step,
                    "ranks": dist.get_world_size(),
                    "sizes": {name: (output / name).stat().st_size for name in LOGS},
                    "settings": asdict(self.arguments),
                    **self.shared,
                }
                (aside / "state.json").write_text(json.dumps(state, indent=1))
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch's writer of files raises RuntimeError; others are no want of disk.
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            # Room for the next try; the checkpoint before is whole.
            free = shutil.disk_usage(output).free / 1e6
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(f"{aside}.unfinished", ignore_errors=True)  # save_model's
            raise DataError(
                f"checkpoint {folder} could not be written ({first_words(error)}; "
                f"{free:,.0f} MB of disk were free); {self.newest_checkpoint_text()}"
            ) from error
        wait_for_all()
        if is_main():
            replace_folder(aside, folder)
            for old in checkpoints(output)[: -self.arguments.save_total_limit]:
                replace_folder(None, old)

    def newest_checkpoint_text(self):
        """The newest whole checkpoint, in words for a message that ends a run."""
        found = checkpoints(self.arguments.output_dir)
        if not found:
            return "there is no checkpoint yet"
        return f"the last whole checkpoint is {found[-1]}"


# Settings that a resumed run cannot change: they decide which questions come at which step, what
# the scores before and after training are of, or what the trained tensors mean.
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
    "sft_questions_per_medium",
    "invert_questions",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
}


def find_checkpoint(arguments):
    """Finds the checkpoint of --resume_from_checkpoint and compares its settings with this run's.

    Returns:
        its state.json with "folder"; {} to start from the beginning.
    Errors: DataError if it is no checkpoint of this run, or a setting differs that must not.
    """
    wanted = arguments.resume_from_checkpoint
    if wanted is None:
        return {}
    output = Path(arguments.output_dir)
    if wanted == "auto":
        found = checkpoints(output)
        if not found:
            log_main(f"no checkpoint in {output} yet: starting from the beginning")
            return {}
        wanted = found[-1]
    folder = Path(wanted)
    if not (folder / "state.json").is_file():
        raise DataError(
            f"{folder} is not a checkpoint of this program: --resume_from_checkpoint takes auto or "
            "a folder checkpoint-STAGE-STEP; a saved model is for --model_name_or_path"
        )
    if folder.resolve().parent != output.resolve():
        raise DataError(f"{folder} belongs to the run of --output_dir {folder.parent}; go on there")
    state = read_document(folder / "state.json")
    if state["ranks"] != dist.get_world_size():
        raise DataError(
            f"{folder} was written by {state['ranks']} processes, "
            f"this run has {dist.get_world_size()}: it must have as many"
        )
    compare_settings(folder, state, arguments)
    return {**state, "folder": str(folder)}


def compare_settings(folder, state, arguments):
    """Logs settings that changed since a checkpoint.

    Errors: DataError if one of WHERE_A_RUN_IS did.
    """
    settings = asdict(arguments)
    # A setting that is newer than the checkpoint had its default then.
    before = {**asdict(type(arguments)()), **state["settings"]}
    # Flags that this version has not.
    for name in before.keys() - settings.keys():
        log_main(f"the checkpoint's --{name} {before[name]} is no setting any more")
    for name in sorted(settings):
        changed = before[name] != settings[name]
        if changed and name in WHERE_A_RUN_IS:
            raise DataError(f"{folder} was written with another --{name} ({before[name]})")
        if changed and name not in ("resume_from_checkpoint", "local_rank"):
            log_main(f"going on with --{name} {settings[name]}, before it was {before[name]}")
