"""Stage 6: pictures of runs, priors and of what a model looks at.

    python visualize.py run output                   # -> output/report.html, .png, .svg
    python visualize.py run a0 a1 b0 b1 --label "λ = 0" --label "λ = 0" --label "λ = 3" \\
        --label "λ = 3" --output compare.html
    python visualize.py sample --model_name_or_path output/grpo --compare output/sft \\
        --video clip.mp4 --question "Who falls first?"
    python visualize.py sample --model_name_or_path output/grpo \\
        --dataset_name toy-seed0/heldout.json --problem_id heldout-0 --clip local-dir:toy-seed0/clip
    python visualize.py answers --predictions sft.predictions.jsonl grpo.predictions.jsonl
    python visualize.py prior --priors priors.jsonl --media_root DATA

Each command writes one HTML page that opens from disk, without network, on a phone, light or dark,
and its figures, if any, as PNG and SVG beside it. `run` draws metrics.jsonl and result.json of
train.py; runs with the same label (seeds of one arm) become one line, their mean, in a band from
the lowest to the highest run; its page shows what the runs wrote, too. `sample` answers one
question and draws where the answer looks: over frames and within them. `answers` lists the answers
of an evaluation, right and wrong, or gained and lost between two. `prior` draws some rows of a
priors file.
"""

from dataclasses import dataclass, field

from common.answers_page import answers_report
from common.data import DataError
from common.flags import Parser, exit_codes, flag
from common.media import PromptFlags
from common.prior_page import prior_report
from common.run_page import run_report
from prior import PriorSettings


@dataclass(kw_only=True)
class SampleArguments(PromptFlags, PriorSettings):
    """One question about one video, and the models that answer it."""

    model_name_or_path: str = field(
        metadata={
            "help": "Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint, folder or hub id",
            "group": "question and models",
        }
    )
    video: str | None = flag(None, "video file")
    question: str | None = flag(None, "the question about it")
    dataset_name: str | None = flag(None, "data set file with a question, instead of these two")
    problem_id: str | None = flag(None, "that question in the data set, taken as it stands")
    media_root: str | None = flag(None, "folder of the data set's media; default: the file's")
    compare: str | None = flag(None, "a second checkpoint, drawn beside the first")
    options: list[str] | None = flag(None, "options of a multiple choice: 'A. red' 'B. blue'")
    answer: str | None = flag(None, "the right answer (a letter, with --options), for its rewards")
    attention_layer: int = flag(
        1, "layer whose attention is drawn, 1 is the first", group="answer and page"
    )
    max_completion_length: int = flag(1024, "most tokens of the answer, which is greedy")
    output: str = flag("sample.html", "report to write; its figure goes beside it as PNG and SVG")

    def __post_init__(self):
        super().__post_init__()
        typed = [self.video, self.question]
        stored = [self.dataset_name, self.problem_id]
        # A row of a data set has its own options and answer.
        more = [self.options, self.answer]
        if all(typed) == all(stored) or any(typed + more) == any(stored):
            raise DataError(
                "give --video and --question (--options, --answer), or --dataset_name and "
                "--problem_id"
            )


def sample_report(**flags):
    """Import and run common/sample_page.py; its imports take seconds, which other commands save."""
    arguments = SampleArguments(**flags)
    from transformers.utils import logging

    from common import sample_page

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return sample_page.sample_report(arguments)


def make_parser():
    """Parser of the four commands, whose flags have the names of the arguments of their reports."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    # Only `sample` has so many settings that they are a dataclass.
    run = commands.add_parser("run", help="training dynamics of one or several runs")
    run.add_argument("output_dirs", nargs="+", help="--output_dir of a run of train.py")
    commands.add_parser(
        "sample",
        dataclass_types=SampleArguments,
        help="where a model looks when it answers a question about a video",
    )
    answers = commands.add_parser("answers", help="the answers of an evaluation, right and wrong")
    text = "reports or predictions of evaluate.py, or what its --rescore reads"
    answers.add_argument("--predictions", nargs="+", required=True, help=text)
    text = "once a path, in their order; default: the paths"
    answers.add_argument("--label", action="append", help=text)
    run.add_argument("--label", action="append", help=f"{text}. Runs of one name become one line")
    prior = commands.add_parser("prior", help="some rows of a priors file")
    prior.add_argument("--priors", required=True, help="output of prior.py")
    prior.add_argument("--media_root", help="of the rows' media; default: the priors file's folder")
    text = "rows drawn at random, with their frames"
    prior.add_argument("--items", type=int, default=6, help=text)
    # The page of a run stands in its folder.
    pages = {run: None, answers: "answers.html", prior: "priors.html"}
    for command, page in pages.items():
        command.add_argument("--output", default=page, help="page to write")
    return parser


# Their arguments are the flags of the commands.
REPORTS = {
    "run": run_report,
    "sample": sample_report,
    "answers": answers_report,
    "prior": prior_report,
}


def main():
    flags = vars(make_parser().parse_args())
    report = REPORTS[flags.pop("command")]
    with exit_codes("visualize.py", "the same command begins anew"):
        print(report(**flags))


if __name__ == "__main__":
    main()
