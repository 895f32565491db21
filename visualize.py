"""Stage 6: pictures of runs, priors and of what a model looks at.

    python visualize.py run output                   # -> output/report.html, .png, .svg
    python visualize.py run a0 a1 b0 b1 --label "λ = 0" --label "λ = 0" --label "λ = 3" \\
        --label "λ = 3" --output compare.html
    python visualize.py sample --model_name_or_path output/grpo --compare output/sft \\
        --video clip.mp4 --question "Who falls first?"
    python visualize.py enrichment --predictions sft.predictions.jsonl grpo.predictions.jsonl
    python visualize.py prior --priors priors.jsonl --media_root DATA

Each command writes one HTML page that opens from disk, without network, on a phone, light or dark,
and its figures as PNG and SVG beside it. `run` draws the metrics.jsonl and result.json of train.py;
runs with the same label (seeds of one arm) become one line, their mean, in a band from the lowest
to the highest run. `sample` answers one question and draws where the answer looks: over frames,
within them, and token by token. `enrichment` draws figure 9 of the paper (arXiv 2606.18441) from
what `evaluate.py --frame_use ... --priors ...` stores: do answers look where the prior points?
`prior` draws a priors file: where the mass of P lies, how concentrated it is, whether its two cues
agree, and some of its rows.
"""

import argparse
import os
import re
import shlex
import sys
from dataclasses import dataclass, field, fields

from common.data import PROBLEM_TYPES, DataError, Example
from common.enrichment_page import enrichment_report
from common.flags import Help, Parser, flag
from common.media import open_video
from common.pages import check_output
from common.plots import short_names
from common.prior_page import prior_report
from common.run_page import run_report
from prior import PriorSettings, load_clip, make_prior


@dataclass
class SampleArguments:
    """One question about one video, and the models that answer it."""

    model_name_or_path: str = field(
        metadata={
            "help": "Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint, folder or hub id",
            "group": "question and models",
        }
    )
    video: str = field(metadata={"help": "video file"})
    question: str = field(metadata={"help": "the question about it"})
    compare: str | None = flag(None, "a second checkpoint, drawn beside the first")
    options: list[str] = field(
        default_factory=list,
        metadata={"help": "options of a multiple-choice question: 'A. red' 'B. blue'"},
    )
    answer: str | None = flag(
        None, "the right answer (a letter, with --options); None: no accuracy, no total"
    )
    problem_type: str | None = flag(
        None,
        "how it is asked and scored; None: multiple choice with --options, else free-form",
        choices=list(PROBLEM_TYPES),
    )
    min_pixels: int = flag(4 * 28 * 28, "fewest pixels a frame", group="prompt, as in training")
    max_pixels: int = flag(256 * 28 * 28, "most pixels a frame")
    prompt_template: str | None = flag(None, "text file with {question} and {instruction}")
    system_prompt: str | None = flag(None, "text of a system turn before the question")
    frame_times: str = flag(
        "none", "how frames say when they were taken", choices=["none", "text", "drawn"]
    )
    hidden_layer: int = flag(
        -1,
        "hidden states that the paper's score reads: 0 embeddings ... -1 last layer (the paper's)",
        group="answer and page",
    )
    attention_layer: int = flag(1, "layer whose attention is drawn, 1 is the first")
    cfr_weight: float = flag(3.0, "lambda of the consensus frame reward, Eq. 7")
    max_completion_length: int = flag(1024, "most tokens of the answer")
    temperature: float = flag(0.0, "0 is greedy")
    seed: int = flag(0, "random seed of the sampling")
    output: str = flag(
        "sample.html", "report to write; FILE.png, FILE-maps.png and their SVG go beside it"
    )

    def __post_init__(self):
        check_output(self.output)
        if not 0 < self.min_pixels <= self.max_pixels:
            raise DataError("--min_pixels must be above 0 and at most --max_pixels")
        if self.max_completion_length < 1 or self.temperature < 0:
            raise DataError("--max_completion_length must be above 0, --temperature at least 0")
        # Options make a multiple-choice question, and the other way round.
        if self.problem_type is None:
            self.problem_type = "multiple choice" if self.options else "free-form"
        if (self.problem_type == "multiple choice") != bool(self.options):
            raise DataError(
                "--options 'A. ...' 'B. ...' and --problem_type multiple choice go together"
            )
        # Each option begins with another letter.
        letters = {option[0] for option in self.options if re.match(r"[A-Z]\. ", option)}
        if len(letters) < len(self.options):
            raise DataError("--options are 'A. ...' 'B. ...' with a letter each")
        if self.options and self.answer and set(self.answer.split(",")) - letters:
            raise DataError("--answer is one of the letters of --options (or several: A,C)")
        # Two names of one folder are the same model.
        path = os.path.realpath(self.model_name_or_path)
        if self.compare and os.path.realpath(self.compare) == path:
            raise DataError("--compare names the model itself; give another one")
        if not self.question.strip():
            raise DataError("--question is empty")


def sample(arguments, settings, command):
    """Compute the prior of the question, and write the report of what the models look at."""
    # These imports take seconds, which the other commands need not wait.
    from transformers.utils import logging

    from common.sample_page import check_model, sample_report

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    example = Example(
        "0",
        arguments.question,
        arguments.options,
        arguments.problem_type,
        arguments.answer or "",
        os.path.abspath(arguments.video),
        "video",
    )
    # Everything that can be wrong is named before anything slow begins.
    paths = [arguments.model_name_or_path]
    if arguments.compare:
        paths.append(arguments.compare)
    notes = []
    for path in paths:
        notes += check_model(arguments, settings, path)
    # A video that cannot be read is named before CLIP is loaded.
    open_video(example.media)
    for note in notes:
        print(f"visualize.py: warning: {note}", file=sys.stderr)
    # The prior's ablations without the semantic cue need no CLIP.
    clip = None
    if settings.has_semantic:
        clip = load_clip(settings.clip, settings.clip_pretrained)
    prior = make_prior(example, clip, settings)
    # The page calls the models by the ends of their paths.
    models = dict(zip(short_names(paths), paths, strict=True))
    return sample_report(arguments, example, prior, models, notes, command)


def make_parser():
    """Parser of the four commands."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    # Only `sample` has so many settings that they are a dataclass.
    run = commands.add_parser("run", help="training dynamics of one or several runs")
    run.add_argument(
        "output_dirs", nargs="+", metavar="OUTPUT_DIR", help="--output_dir of a run of train.py"
    )
    run.add_argument(
        "--label",
        action="append",
        metavar="NAME",
        help="once a directory, in their order; same name: one line and a band",
    )
    run.add_argument(
        "--output",
        metavar="FILE.html",
        help="default: report.html in the directory, of several ./report.html",
    )

    commands.add_parser(
        "sample",
        dataclass_types=(SampleArguments, PriorSettings),
        help="where a model looks when it answers a question about a video",
    )

    enrichment = commands.add_parser(
        "enrichment", help="the strongest token-slot pairs of answers (the paper's figure 9)"
    )
    enrichment.add_argument(
        "--predictions",
        nargs="+",
        required=True,
        metavar="FILE",
        help="NAME.predictions.jsonl of evaluate.py --frame_use ... --priors ...",
    )
    enrichment.add_argument(
        "--label",
        action="append",
        metavar="NAME",
        help="once a file, in their order; default: the files' names",
    )
    output = {"metavar": "FILE.html", "help": "report to write"}
    enrichment.add_argument("--output", default="enrichment.html", **output)

    prior = commands.add_parser("prior", help="what a priors file says, and some of its rows")
    prior.add_argument("--priors", required=True, metavar="FILE", help="output of prior.py")
    prior.add_argument(
        "--media_root",
        metavar="DIR",
        help="folder that the rows' media paths start from; default: the priors file's",
    )
    prior.add_argument(
        "--items", type=int, default=6, metavar="N", help="rows drawn at random, with their frames"
    )
    prior.add_argument("--seed", type=int, default=0, help="random seed of that choice")
    prior.add_argument("--output", default="priors.html", **output)
    return parser


def settings_of(kind, arguments):
    """Parsed arguments -> settings object of a dataclass."""
    return kind(**{setting.name: getattr(arguments, setting.name) for setting in fields(kind)})


def main():
    arguments = make_parser().parse_args()
    command = f"python {shlex.join(sys.argv)}"
    try:
        if arguments.command == "run":
            page = run_report(arguments.output_dirs, arguments.label, arguments.output, command)
        elif arguments.command == "enrichment":
            page = enrichment_report(
                arguments.predictions, arguments.label, arguments.output, command
            )
        elif arguments.command == "prior":
            page = prior_report(arguments, command)
        else:
            settings = settings_of(PriorSettings, arguments)
            page = sample(settings_of(SampleArguments, arguments), settings, command)
        print(page)
    except (DataError, OSError) as error:
        print(f"visualize.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
