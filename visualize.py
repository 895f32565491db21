"""Stage 6: pictures of runs, priors and of what a model looks at. Each command writes one HTML report that opens from disk, without
network, on a phone, light or dark, and its figures as PNG and SVG beside it.

    python visualize.py run output                                        # -> output/report.html, .png, .svg
    python visualize.py run a0 a1 b0 b1 --label "λ = 0" --label "λ = 0" --label "λ = 3" --label "λ = 3" --output compare.html
    python visualize.py sample --model_name_or_path output/grpo --compare output/sft --video clip.mp4 --question "Who falls first?"
    python visualize.py enrichment --predictions sft.predictions.jsonl grpo.predictions.jsonl     # -> enrichment.html, .png, .svg
    python visualize.py prior --priors priors.jsonl --media_root DATA                             # -> priors.html, priors-sheet.png, ...

`run` draws the training dynamics that train.py wrote to metrics.jsonl, and the before/after table of result.json. Directories are overlaid;
those with the same label (seeds of one arm) become one line, their mean, in a band from the lowest to the highest run.
`sample` answers one question and draws where the answer looks: over frames, within them, and token by token.
`enrichment` draws the paper's figure 9 (arXiv 2606.18441): are the strongest 5 % of token-slot pairs, which `evaluate.py --frame_use ...
--priors ...` stores as events, about the slots that the prior speaks for, where in the answer, and more so in right answers?
`prior` draws what a priors file says: where the mass of P lies, how concentrated it is, whether its two cues agree, and some of its rows.
"""

import argparse
import functools
import os
import re
import shlex
import sys
from dataclasses import dataclass, field, fields

from transformers import HfArgumentParser

from common.data import PROBLEM_TYPES, DataError
from common.figures import run_enrichment, run_prior
from common.flags import Help
from common.pages import check_output
from common.run_page import run_report
from prior import PriorSettings


@dataclass
class SampleArguments:
    """One question about one video, and the models that answer it."""

    model_name_or_path: str = field(
        metadata={"help": "Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint, folder or hub id"}
    )
    video: str = field(metadata={"help": "video file"})
    question: str = field(metadata={"help": "the question about it"})
    compare: str | None = field(
        default=None, metadata={"help": "a second checkpoint, drawn beside the first"}
    )
    options: list[str] = field(
        default_factory=list,
        metadata={"help": "the options of a multiple-choice question: 'A. red' 'B. blue'"},
    )
    answer: str | None = field(
        default=None,
        metadata={
            "help": "the right answer (a letter, with --options); None: no accuracy, no total"
        },
    )
    problem_type: str | None = field(
        default=None,
        metadata={
            "help": "how it is asked and scored; None: multiple choice with --options, else free-form",
            "choices": list(PROBLEM_TYPES),
        },
    )
    min_pixels: int = field(default=4 * 28 * 28, metadata={"help": "fewest pixels a frame"})
    max_pixels: int = field(default=256 * 28 * 28, metadata={"help": "most pixels a frame"})
    prompt_template: str | None = field(
        default=None, metadata={"help": "text file with {question} and {instruction}"}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "text of a system turn before the question, as in training"}
    )
    frame_times: str = field(
        default="none",
        metadata={
            "help": "how frames say when they were taken, as in training",
            "choices": ["none", "text", "drawn"],
        },
    )
    hidden_layer: int = field(
        default=-1,
        metadata={
            "help": "layer of the hidden states that the paper's score reads: 0 embeddings ... -1 last (the paper's)"
        },
    )
    attention_layer: int = field(
        default=1, metadata={"help": "layer whose attention is drawn, 1 is the first"}
    )
    cfr_weight: float = field(
        default=3.0, metadata={"help": "lambda of the consensus frame reward, Eq. 7"}
    )
    max_completion_length: int = field(default=1024, metadata={"help": "most tokens of the answer"})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy"})
    seed: int = field(default=0, metadata={"help": "of the sampling"})
    output: str = field(
        default="sample.html",
        metadata={"help": "report to write; FILE.png, FILE-maps.png and both as SVG go beside it"},
    )

    def __post_init__(self):
        check_output(self.output)
        if (
            not 0 < self.min_pixels <= self.max_pixels
            or self.max_completion_length < 1
            or self.temperature < 0
        ):
            raise DataError(
                "--min_pixels above 0 and at most --max_pixels, --max_completion_length above 0, --temperature at least 0"
            )
        self.problem_type = self.problem_type or (
            "multiple choice" if self.options else "free-form"
        )
        if (self.problem_type == "multiple choice") != bool(self.options):
            raise DataError(
                "--options 'A. ...' 'B. ...' and --problem_type multiple choice go together"
            )
        letters = {option[0] for option in self.options if re.match(r"[A-Z]\. ", option)}
        if self.options and (
            len(letters) < len(self.options)
            or self.answer
            and set(self.answer.split(",")) - letters
        ):
            raise DataError(
                "--options are 'A. ...' 'B. ...' with a letter each, and --answer is one of the letters (or several: A,C)"
            )
        if self.compare and os.path.realpath(self.compare) == os.path.realpath(
            self.model_name_or_path
        ):
            raise DataError("--compare names the model itself; give another one")
        if not self.question.strip():
            raise DataError("--question is empty")


# ------------------------------------------------------------------------------------------------------------ command line


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=HfArgumentParser)
    add = functools.partial(
        commands.add_parser, dataclass_types=(), allow_abbrev=False, formatter_class=Help
    )
    run = add("run", help="training dynamics of one or several runs")
    run.add_argument(
        "output_dirs",
        nargs="+",
        metavar="OUTPUT_DIR",
        help="what train.py wrote (its --output_dir)",
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
    add(
        "sample",
        dataclass_types=(SampleArguments, PriorSettings),
        help="where a model looks when it answers a question about a video",
    )
    enrichment = add(
        "enrichment", help="the strongest token-slot pairs of answers (the paper's figure 9)"
    )
    enrichment.add_argument(
        "--predictions",
        nargs="+",
        required=True,
        metavar="FILE",
        help=("what evaluate.py --frame_use ... --priors ... wrote: NAME.predictions.jsonl"),
    )
    enrichment.add_argument(
        "--label",
        action="append",
        metavar="NAME",
        help="once a file, in their order; default: the files' names",
    )
    enrichment.add_argument(
        "--output", default="enrichment.html", metavar="FILE.html", help="report to write"
    )
    prior = add("prior", help="what a priors file says, and some of its rows")
    prior.add_argument("--priors", required=True, metavar="FILE", help="what prior.py wrote")
    prior.add_argument(
        "--media_root",
        metavar="DIR",
        help="folder that the rows' media paths start from; default: the priors file's",
    )
    prior.add_argument(
        "--items",
        type=int,
        default=6,
        metavar="N",
        help="rows whose frames are shown, drawn at random",
    )
    prior.add_argument("--seed", type=int, default=0, help="of that choice")
    prior.add_argument(
        "--output", default="priors.html", metavar="FILE.html", help="report to write"
    )
    arguments = parser.parse_args()
    command = f"python {shlex.join(sys.argv)}"
    try:
        if arguments.command == "run":
            print(run_report(arguments.output_dirs, arguments.label, arguments.output, command))
        elif arguments.command == "enrichment":
            print(run_enrichment(arguments.predictions, arguments.label, arguments.output, command))
        elif arguments.command == "prior":
            print(
                run_prior(
                    arguments.priors,
                    arguments.media_root,
                    arguments.items,
                    arguments.seed,
                    arguments.output,
                    command,
                )
            )
        else:
            from look import sample_report  # imports DeepSpeed, for which the others need not wait

            parts = [
                kind(**{setting.name: getattr(arguments, setting.name) for setting in fields(kind)})
                for kind in (SampleArguments, PriorSettings)
            ]
            print(sample_report(*parts, command))
    except (DataError, OSError) as error:
        print(f"visualize.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
