"""Stage 6: pictures of runs, priors and of what a model looks at. Each command writes one HTML report that opens from disk, without
network, on a phone, light or dark, and its figures as PNG and SVG beside it.

    python visualize.py run output                                        # -> output/report.html, .png, .svg
    python visualize.py run a0 a1 b0 b1 --label "λ = 0" --label "λ = 0" --label "λ = 3" --label "λ = 3" --output compare.html
    python visualize.py sample --model_name_or_path output/grpo --compare output/sft --video clip.mp4 --question "Who falls first?"

`run` draws the training dynamics that train.py wrote to metrics.jsonl, and the before/after table of result.json. Directories are overlaid;
those with the same label (seeds of one arm) become one line, their mean, in a band from the lowest to the highest run.
`sample` answers one question and draws where the answer looks: over frames, within them, and token by token.
"""

import argparse
import shlex
import sys
from dataclasses import fields

from transformers import HfArgumentParser

from data import DataError
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
    arguments = parser.parse_args()
    command = f"python {shlex.join(sys.argv)}"
    try:
        if arguments.command == "run":
            print(run_report(arguments.output_dirs, arguments.label, arguments.output, command))
        else:
            parts = [kind(**{setting.name: getattr(arguments, setting.name) for setting in fields(kind)})
                     for kind in (SampleArguments, PriorSettings)]
            print(sample_report(*parts, command))
    except (DataError, OSError) as error:
        print(f"visualize.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
