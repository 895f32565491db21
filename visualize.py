"""Stage 6: pictures of runs, priors and of what a model looks at. Each command writes one HTML report that opens from disk, without
network, on a phone, light or dark, and its figures as PNG and SVG beside it.

    python visualize.py run output                                        # -> output/report.html, .png, .svg
    python visualize.py run a0 a1 b0 b1 --label "λ = 0" --label "λ = 0" --label "λ = 3" --label "λ = 3" --output compare.html
    python visualize.py sample --model_name_or_path output/grpo --compare output/sft --video clip.mp4 --question "Who falls first?"
    python visualize.py enrichment --predictions sft.predictions.jsonl grpo.predictions.jsonl     # -> enrichment.html, .png, .svg
    python visualize.py prior --priors priors.jsonl --media_root DATA                             # -> prior.html, prior-sheet.png, ...

`run` draws the training dynamics that train.py wrote to metrics.jsonl, and the before/after table of result.json. Directories are overlaid;
those with the same label (seeds of one arm) become one line, their mean, in a band from the lowest to the highest run.
`sample` answers one question and draws where the answer looks: over frames, within them, and token by token.
`enrichment` draws the paper's figure 9 (arXiv 2606.18441): are the strongest 5 % of token-slot pairs, which `evaluate.py --frame_use ...
--priors ...` stores as events, about the slots that the prior speaks for, where in the answer, and more so in right answers?
`prior` draws what a priors file says: where the mass of P lies, how concentrated it is, whether its two cues agree, and some of its rows.
"""

import argparse
import shlex
import sys
from dataclasses import fields

from transformers import HfArgumentParser

from data import DataError
from figures import run_enrichment, run_prior
from look import SampleArguments, sample_report
from prior import PriorSettings
from report import run_report

# ------------------------------------------------------------------------------------------------------------ command line


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=HfArgumentParser)
    run = commands.add_parser("run", dataclass_types=(), allow_abbrev=False, help="training dynamics of one or several runs")
    run.add_argument("output_dirs", nargs="+", metavar="OUTPUT_DIR", help="what train.py wrote (its --output_dir)")
    run.add_argument("--label", action="append", metavar="NAME", help="once a directory, in their order; same name: one line and a band")
    run.add_argument("--output", metavar="FILE.html", help="default: report.html in the directory, of several ./report.html")
    commands.add_parser("sample", dataclass_types=(SampleArguments, PriorSettings), allow_abbrev=False,
                        help="where a model looks when it answers a question about a video")
    enrichment = commands.add_parser("enrichment", dataclass_types=(), allow_abbrev=False,
                                     help="the strongest token-slot pairs of answers (the paper's figure 9)")
    enrichment.add_argument("--predictions", nargs="+", required=True, metavar="FILE", help=(
        "what evaluate.py --frame_use ... --priors ... wrote: NAME.predictions.jsonl"))
    enrichment.add_argument("--label", nargs="+", metavar="NAME", help="one a file, in their order; default: the files' names")
    enrichment.add_argument("--output", default="enrichment.html", metavar="FILE.html", help="report to write")
    prior = commands.add_parser("prior", dataclass_types=(), allow_abbrev=False, help="what a priors file says, and some of its rows")
    prior.add_argument("--priors", required=True, metavar="FILE", help="what prior.py wrote")
    prior.add_argument("--media_root", metavar="DIR", help="folder that the rows' media paths start from; default: the priors file's")
    prior.add_argument("--items", type=int, default=6, metavar="N", help="rows whose frames are shown, drawn at random")
    prior.add_argument("--seed", type=int, default=0, help="of that choice")
    prior.add_argument("--output", default="prior.html", metavar="FILE.html", help="report to write")
    arguments = parser.parse_args()
    command = f"python {shlex.join(sys.argv)}"
    try:
        if arguments.command == "run":
            print(run_report(arguments.output_dirs, arguments.label, arguments.output, command))
        elif arguments.command == "enrichment":
            print(run_enrichment(arguments.predictions, arguments.label, arguments.output, command))
        elif arguments.command == "prior":
            print(run_prior(arguments.priors, arguments.media_root, arguments.items, arguments.seed, arguments.output, command))
        else:
            parts = [kind(**{setting.name: getattr(arguments, setting.name) for setting in fields(kind)})
                     for kind in (SampleArguments, PriorSettings)]
            print(sample_report(*parts, command))
    except (DataError, OSError) as error:
        print(f"visualize.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
