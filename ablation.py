"""The ablation table: what each part of the method does on the toy, over seeds, with intervals.

    python ablation.py table                   # from the stored runs, docs/ablation.jsonl
    python ablation.py run --runs mine.jsonl   # every arm again, as many at a time as cores
    python ablation.py run --runs mine.jsonl --settings tiny --seeds 0 --arms full    # minutes

`run`, in the folder of train.py: for every setting and seed one toy, one SFT checkpoint and the
priors of its questions, which all arms start from; for every arm GRPO from it, and evaluations of
the held-out questions as they are, with the frames shuffled and without the video. Each is a
command that is printed; its log lies in OUTPUT_DIR/SETTING/seedN/NAME.log. The numbers of every
arm that ends become a line of RUNS; what has a line is not run again. The same call goes on where
it was interrupted and tries again what failed; exit code 1: something did.

`table` prints Markdown and writes ablation.json, .png and .svg into OUTPUT_DIR: means, and paired
differences to `full` with 95 % t-intervals, over the seeds that both have. Runs that are missing
are named on stderr.
"""

import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from common.data import DataError, read_document
from common.flags import Parser, exit_codes
from common.plots import COLOURS, DOTTED, STYLES, new_figure
from common.run_page import read_run
from common.workers import to_line, write_lines, writing
from prior import PriorSettings, read_priors, weigh


@dataclass
class Setting:
    """Flags of a toy and of everything that is run on it."""

    toy: str  # of toy.py
    frames: str = "--frames 16"  # of prior.py, train.py and evaluate.py
    model: str = "--max_pixels 784 --max_completion_length 64"  # of train.py and evaluate.py
    sft: str = ""  # of train.py
    grpo: str = ""
    # Arms that are another one under a second name: listed, not run again.
    same: dict = field(default_factory=lambda: SAME)


# Defaults of `full` under another name.
SAME = {"gate_soft": "full", "lambda_3": "full"}
SETTINGS = {
    # Some traces list everything, some look at once: arms can differ in where a model looks.
    # Its slots have one token, of which the mean is the maximum.
    "easy": Setting("--dense_share 0.6", same={**SAME, "mean_pool": "hidden"}),
    # Longer videos, more options, rarer right looks, and four tokens a slot, which can be pooled.
    "hard": Setting(
        "--dense_share 0.6 --scenes 6 --options 4 --biased_share 0.95",
        "--frames 24",
        "--max_pixels 3136 --max_completion_length 96",
        "--sft_max_steps 800",
        # An answer is right or wrong, so a hard gate is the soft one: equal to the digit in all
        # runs of `easy` and in seed 0 here, after which it was not run again.
        same={**SAME, "gate_hard": "full"},
    ),
    "tiny": Setting(
        "--train_videos 12 --heldout_videos 2 --clip_steps 4",
        sft="--sft_max_steps 2",
        grpo="--max_steps 2 --per_device_train_batch_size 2 --num_generations 2",
    ),
}

# The paper's frame use, which pooling, temperature and order belong to; the toy's is attention.
HIDDEN = "--frame_use hidden --frame_use_layer -1"
# Flags of train.py that make each arm out of `full`, the toy's CF-GRPO.
ARMS = {
    "full": "",
    "hidden": HIDDEN,
    "uniform_prior": "",
    "no_scene": "",
    "no_semantic": "",
    "shuffled_prior": "",
    "mean_pool": f"{HIDDEN} --pool mean",
    "tau_1": f"{HIDDEN} --tau 1",
    "softmax_mean": f"{HIDDEN} --use_order softmax_mean",
    "gate_soft": "",
    "gate_hard": "--gate hard",
    "gate_none": "--gate none",
    "lambda_0": "--cfr_weight 0",
    "lambda_1": "--cfr_weight 1",
    "lambda_3": "",
    "lambda_10": "--cfr_weight 10",
    "no_temporal": "--temporal false",
    "grpo": "--recipe grpo",
    "tgrpo": "--recipe tgrpo",
    "care": "--recipe care",
    "tw": "--recipe tw",
    "video_r2": "--recipe video_r2",
}
# Arms whose training questions have a prior of other cues; None: another question's prior. The
# held-out questions keep theirs, so that the consensus of all arms is with the same prior.
PRIORS = {
    "uniform_prior": "uniform",
    "no_scene": "no_scene",
    "no_semantic": "no_semantic",
    "shuffled_prior": None,
}

# Evaluations of every model. Where it looks is measured by attention, on sampled answers.
EVALUATIONS = {
    "looks": "--temperature 1 --top_p 0.95 --frame_use attention --priors {folder}/heldout.jsonl",
    "shuffled": "--control shuffled",
    "blind": "--control question_only",
}
# Columns, and where their numbers stand in result.json and the reports. Those of "paper" are by the
# paper's frame use, on the answers that train.py sampled.
COLUMNS = {
    "greedy": "result after greedy",
    "greedy, conflict": "result after greedy/conflict",
    "sampled": "result after sampled",
    "sampled, conflict": "result after sampled/conflict",
    "frames shuffled": "shuffled accuracy",
    "no video": "blind accuracy",
    "consensus, attention": "looks frame_use all consensus",
    "consensus, paper": "result after paper_consensus",
    "evidence, attention": "looks frame_use all evidence",
    "evidence, paper": "result after paper_evidence_use",
    "tokens": "result after length",
}
# Of the training rollouts: held-out questions are scored before and after alone.
STEPS = "steps to 80 %"
COUNTS = ["tokens", STEPS]  # the other columns are shares
# Of --frame_use_check; its rows are compared with its row "chance".
CHECKS = ["argmax inside", "mass over chance"]
DRAWN = ["greedy", "greedy, conflict", "evidence, attention", "tokens", STEPS]

# Quantiles of Student's t at 0.975, for 2 seeds to 10; of more seeds the last, which is too wide.
T95 = [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622]


# ---------------------------------------------------------------------------------- commands


# A run has one core: no second process decodes for it.
ONE_CORE = "--decode_workers 0"


def train_flags(folder, setting, seed, name):
    """Flags of train.py that SFT and all arms share."""
    return (
        f"--toy_dir {folder}/toy --seed {seed} {setting.frames} {setting.model} {ONE_CORE} "
        f"--eval_priors {folder}/heldout.jsonl --output_dir {folder}/{name} "
        "--save_steps 25 --save_total_limit 1 --resume_from_checkpoint auto"
    )


def evaluations(folder, setting, seed, name, stage):
    """Commands that evaluate the model of a run, {name: command}."""
    asked = (
        f"evaluate.py --model_name_or_path {folder}/{name}/{stage} "
        f"--bench {folder}/toy/heldout.json --seed {seed} {setting.frames} {setting.model} "
        f"{ONE_CORE}"
    )
    steps = {}
    for kind, flags in EVALUATIONS.items():
        output = f"--output {folder}/{name}-{kind}.json"
        steps[f"{name}-{kind}"] = f"{asked} {flags.format(folder=folder)} {output}"
    if stage == "sft":
        steps["check"] = f"{asked} --frame_use_check --output {folder}/check.json"
    return steps


def shared_steps(folder, setting, seed):
    """Commands of what the arms of a setting and seed share, {name: command} in their order."""
    toy = f"{folder}/toy"
    priors = f"prior.py --workers 1 --clip local-dir:{toy}/clip {setting.frames}"
    train = train_flags(folder, setting, seed, "sft")
    return {
        "toy": f"toy.py --output_dir {toy} --seed {seed} {setting.toy}",
        "priors": f"{priors} --dataset_name {toy}/train.json --output {folder}/full.jsonl",
        "heldout": f"{priors} --dataset_name {toy}/heldout.json --output {folder}/heldout.jsonl",
        "sft": f"train.py --stage sft {train} {setting.sft}",
        **evaluations(folder, setting, seed, "sft", "sft"),
    }


def arm_steps(folder, setting, seed, arm):
    """Commands of an arm, {name: command} in their order."""
    priors = arm if arm in PRIORS else "full"
    command = (
        f"train.py --stage grpo --model_name_or_path {folder}/sft/sft "
        f"--priors {folder}/{priors}.jsonl {train_flags(folder, setting, seed, arm)} "
        f"{setting.grpo} {ARMS[arm]}"
    )
    return {arm: command, **evaluations(folder, setting, seed, arm, "grpo")}


def change_priors(rows, kind, seed):
    """Priors of an arm of PRIORS.

    Args:
        rows: list of Prior of the training questions.
        kind: value of PRIORS.
    Returns:
        list of Prior, each of its own question and frames. They record no settings: train.py
        accepts them beside held-out priors of all cues.
    """
    changed = []
    circles = defaultdict(list)
    for row in random.Random(seed).sample(rows, len(rows)):
        circles[len(row.frames)].append(row)
    for circle in circles.values():
        # In a random circle of questions with as many frames, each gets the next one's.
        for row, other in zip(circle, circle[1:] + circle[:1], strict=True):
            if kind is None:
                row = replace(row, prior=other.prior)
            else:
                row = weigh(replace(row, settings={}), PriorSettings(prior=kind))
            changed.append(replace(row, settings={}))
    return changed


# --------------------------------------------------------------------------------- stored runs


@dataclass(frozen=True)
class World:
    """A toy and its SFT checkpoint, from which all arms of a setting and seed start."""

    setting: str
    seed: int
    folder: Path

    @property
    def flags(self):
        return SETTINGS[self.setting]


def flags_of(setting, arm):
    """Text of the flags that an arm is made with, whatever the seed and the folders."""
    flags = SETTINGS[setting]
    parts = (flags.toy, flags.frames, flags.model, flags.sft, flags.grpo, ARMS.get(arm, ""))
    return " ".join(" ".join(parts).split())


def steps_to(accuracies):
    """Steps until the mean accuracy of five of them is 0.8; all of them if it never is."""
    for step in range(5, len(accuracies) + 1):
        if mean(accuracies[step - 5 : step]) >= 0.8:
            return step
    return len(accuracies)


def read_arm(folder, name):
    """Read the numbers of an arm, or of "sft" -> {column: number or None}.

    Raises:
        DataError: result.json or an evaluation is not there, or no JSON.
    """
    documents = {"result": read_document(folder / name / "result.json")}
    for kind in EVALUATIONS:
        documents[kind] = read_document(folder / f"{name}-{kind}.json")
    numbers = {}
    for column, words in COLUMNS.items():
        numbers[column] = documents
        for word in words.split():
            numbers[column] = numbers[column].get(word)
    records, _ = read_run(folder / name)
    curve = [one["reward/accuracy"] for one in records.values() if "reward/accuracy" in one]
    numbers[STEPS] = steps_to(curve) if curve else None
    return numbers


def store(runs, world, arm, numbers):
    """Add the numbers of an arm, of "sft" or of its "check" to the file of runs."""
    made = read_document(world.folder / ("sft" if arm == "check" else arm) / "run.json")
    row = {
        "setting": world.setting,
        "seed": world.seed,
        "arm": arm,
        "flags": flags_of(world.setting, arm),
        "revision": made["revision"],
        "versions": made["versions"],
        "numbers": numbers,
    }
    with open(runs, "ab") as file:
        file.write(to_line(row))


def read_runs(runs):
    """Lines of the file of runs, {(setting, seed, arm): line}.

    Raises:
        DataError: it is no file of runs, or a line is not of the flags that its arm has now.
    """
    lines = {}
    for line in read_document(runs, "--runs"):
        try:
            key = (line["setting"], line["seed"], line["arm"])
            same = line["flags"] == flags_of(line["setting"], line["arm"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{runs} is no file of runs, it lacks {error}") from error
        if not same:
            raise DataError(f"{runs} has {line['arm']} with {line['flags']}; give another --runs")
        lines[key] = line
    return lines


# --------------------------------------------------------------------------------------- run


def run_steps(folder, steps):
    """Run the commands that are not finished, up to one that fails, which is named.

    Args:
        steps: {name: command} in their order.
    Returns:
        Whether all are finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, command in steps.items():
        path = folder / f"{name}.log"
        # The last line of a log says that the command has ended well.
        words = command.split()
        finished = f"finished: {' '.join(words)}"
        last = path.read_text(errors="replace").splitlines()[-1:] if path.exists() else []
        if last == [finished]:
            continue
        if last and last[0].startswith("finished: "):
            print(f"{path} is of another command; choose another --output_dir", file=sys.stderr)
            return False
        print("python", *words, flush=True)
        with open(path, "w") as log:
            code = subprocess.run(
                [sys.executable, *words], env=env, stdout=log, stderr=subprocess.STDOUT
            ).returncode
            if code:
                print(f"{name} failed with exit code {code}, see {path}", file=sys.stderr)
                return False
            print(f"\n{finished}", file=log)
    return True


def run_shared(world, runs):
    """Run what the arms of a world share, and store its numbers -> whether arms can follow."""
    if not run_steps(world.folder, shared_steps(world.folder, world.flags, world.seed)):
        return False
    stored = read_runs(runs)
    numbers = read_arm(world.folder, "sft")
    before = stored.get((world.setting, world.seed, "sft"))
    if before is None:
        store(runs, world, "check", read_document(world.folder / "check.json")["frame_use"])
        store(runs, world, "sft", numbers)
    elif before["numbers"] != numbers:
        # Arms of two checkpoints are no pairs.
        print(f"SFT of {world.folder} is not that of {runs}; give another --runs", file=sys.stderr)
        return False
    return True


def run_arm(world, arm, runs):
    """Run an arm and store its numbers -> whether it has ended."""
    if arm in PRIORS:
        rows = list(read_priors(world.folder / "full.jsonl"))
        write_lines(world.folder / f"{arm}.jsonl", change_priors(rows, PRIORS[arm], world.seed))
    if not run_steps(world.folder, arm_steps(world.folder, world.flags, world.seed, arm)):
        return False
    store(runs, world, arm, read_arm(world.folder, arm))
    return True


def run(arguments):
    """Run what is not stored yet -> exit code."""
    if not arguments.runs.endswith(".jsonl"):
        raise DataError(f"--runs {arguments.runs} must end in .jsonl")
    with writing(arguments.runs):
        Path(arguments.runs).touch()
    stored = read_runs(arguments.runs)
    worlds = {}  # and their arms
    for seed in arguments.seeds:
        for name in arguments.settings:
            arms = []
            for arm in arguments.arms:
                if (name, seed, arm) in stored:
                    print(f"{name}, seed {seed}, {arm}: in {arguments.runs}")
                elif arm not in SETTINGS[name].same:
                    arms.append(arm)
            if arms:
                folder = Path(arguments.output_dir, name, f"seed{seed}")
                worlds[World(name, seed, folder)] = arms
    with ThreadPoolExecutor(arguments.jobs) as pool:
        shared = [pool.submit(run_shared, world, arguments.runs) for world in worlds]
        tasks = []
        for ready, (world, arms) in zip(shared, worlds.items(), strict=True):
            if ready.result():
                tasks += [pool.submit(run_arm, world, arm, arguments.runs) for arm in arms]
    return 0 if all(task.result() for task in shared + tasks) else 1


# ------------------------------------------------------------------------------------- table


def summarize(numbers):
    """Means, and differences to the row that a column is compared with, over the seeds of both.

    Args:
        numbers: {column: {row: {seed: number}}}.
    Returns:
        {column: {row: {"values": {seed: number}, "mean", "difference", "half": half of its 95 %
        t-interval, None of one seed}}}.
    """
    summary = defaultdict(dict)
    for column, rows in numbers.items():
        base = rows["chance" if column in CHECKS else "full"]
        for row, found in rows.items():
            values = {seed: found[seed] for seed in found if seed in base}
            if not values:
                continue
            differences = [value - base[seed] for seed, value in values.items()]
            count = len(values)
            half = None
            if count > 1:
                half = T95[min(count, 10) - 2] * stdev(differences) / count**0.5
            summary[column][row] = {
                "values": values,
                "mean": mean(values.values()),
                "difference": mean(differences),
                "half": half,
            }
    return summary


def print_table(title, summary, columns):
    """Print Markdown: the mean of every column, and its difference with the interval."""
    print(f"\n**{title}**\n\n| | seeds | {' | '.join(columns)} |")
    print("|---" * (2 + len(columns)) + "|")
    for row in summary[columns[0]]:
        cells = [row, str(len(summary[columns[0]][row]["values"]))]
        for column in columns:
            number = summary[column].get(row)
            digits = 1 if column in COUNTS else 3
            text = "–"
            if number:
                text = f"{number['mean']:.{digits}f}"
            # The row that the others are compared with has no difference.
            if number and number["half"] is not None and row not in ("full", "chance"):
                text += f" ({number['difference']:+.{digits}f} ± {number['half']:.{digits}f})"
            cells.append(text)
        print(f"| {' | '.join(cells)} |")


def draw(summaries):
    """Figure of the differences to `full`, a colour a setting."""
    note = (
        "Dot: mean of the paired differences to full; line: its 95 % t-interval over seeds. "
        "A run that never comes to 80 % counts with all its steps."
    )
    figure = new_figure(14, 7, "Differences to the full method", list(summaries), note)
    panels = figure.subplots(1, len(DRAWN), sharey=True)
    for axes, column in zip(panels, DRAWN, strict=True):
        axes.axvline(0, **DOTTED)
        axes.set_title(column, loc="left", fontsize=11, weight="bold")
        for index, summary in enumerate(summaries.values()):
            for place, arm in enumerate(ARMS):
                if arm in summary[column]:
                    number = summary[column][arm]
                    point = (number["difference"], place + 0.25 * index)
                    look = {"fmt": "o", "color": COLOURS[index], "capsize": 2}
                    bars = axes.errorbar(*point, xerr=number["half"], **look)
                    bars.lines[2][0].set_linestyle(STYLES[index])  # as in the legend
    panels[0].set_yticks(range(len(ARMS)), ARMS)
    panels[0].invert_yaxis()
    return figure


def table(arguments):
    """Make the table from the stored runs -> exit code."""
    stored = read_runs(arguments.runs)
    summaries = {}
    made = {setting for setting, _, _ in stored}
    for setting in arguments.settings:
        if setting not in made:
            raise DataError(f"{arguments.runs} has no run of {setting}; --settings names others")
        same = SETTINGS[setting].same
        numbers = defaultdict(lambda: defaultdict(dict))  # {column: {row: {seed: number}}}
        missing = defaultdict(list)
        for seed in arguments.seeds:
            for arm in ["sft", *ARMS]:
                line = stored.get((setting, seed, same.get(arm, arm)))
                if line is None:
                    missing[arm].append(seed)
                    continue
                for column, number in line["numbers"].items():
                    if number is not None:
                        numbers[column][arm][seed] = number
            check = stored.get((setting, seed, "check"), {"numbers": {}})
            for row, values in check["numbers"].items():
                for column, value in zip(CHECKS, values, strict=True):
                    numbers[column][row][seed] = value
        for arm, seeds in missing.items():
            print(f"missing: {setting}, {arm}, seeds", *seeds, file=sys.stderr)
        summaries[setting] = summarize(numbers)
    for setting, summary in summaries.items():
        columns = list(COLUMNS)
        print_table(f"{setting}: answers", summary, [*columns[:6], STEPS])
        print_table(f"{setting}: where the model looks", summary, columns[6:])
        print_table(f"{setting}: frame use of the SFT checkpoints, and chance", summary, CHECKS)
    output = Path(arguments.output_dir, "ablation.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(summaries, indent=1))
    figure = draw(summaries)
    figure.savefig(output.with_suffix(".png"))
    figure.savefig(output.with_suffix(".svg"), metadata={"Date": None})
    return 0


def main():
    parser = Parser((), __doc__)
    parser.add_argument("work", choices=["run", "table"], help="what is done")
    several = partial(parser.add_argument, nargs="+")
    several("--settings", default=["easy", "hard"], choices=list(SETTINGS), help="toys")
    several("--seeds", type=int, default=[0, 1, 2, 3, 4], help="of toy, SFT and GRPO")
    several("--arms", default=list(ARMS), choices=list(ARMS), help="of run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--runs", default="docs/ablation.jsonl", help="file of finished runs")
    parser.add_argument(
        "--output_dir", default="ablation", help="folder of the runs, without spaces"
    )
    arguments = parser.parse_args()
    with exit_codes("ablation.py"):
        sys.exit(run(arguments) if arguments.work == "run" else table(arguments))


if __name__ == "__main__":
    main()
