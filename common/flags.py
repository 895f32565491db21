"""Command-line flags: one field of a settings dataclass each, under headings in --help.

    @dataclass
    class Settings:
        frames: int = flag(16, "Frames of a video.", group="Frames")

    settings = Settings(**vars(Parser(Settings, __doc__).parse_args()))

The help shows the docstring of the command and the default of every flag.
"""

import argparse
import copy
import math
import sys
from contextlib import contextmanager
from dataclasses import field

from transformers import HfArgumentParser

from common.data import DataError


def flag(default, text, **more):
    """Field of a settings dataclass that is a flag of the command line.

    Args:
        default: value without the flag.
        text: its --help.
        more: `choices`, `aliases`, and `group`, the heading in --help above this flag and those
            after it.
    """
    return field(default=default, metadata={"help": text, **more})


def check_least(settings, **least):
    """Refuses a setting below its least value, NaN or infinite; None is right for all."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not bound <= value < math.inf:
            raise DataError(f"--{name} must be at least {bound} and finite")


@contextmanager
def exit_codes(program, again="the same command continues"):
    """What ends a command: bad input or a file that cannot be written by 2, Ctrl-C by 130.

    Args:
        again: how an interrupted one goes on.
    """
    try:
        yield
    except (DataError, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; {again}", file=sys.stderr)
        sys.exit(130)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help of every command: its docstring unchanged, and each flag's default unless None."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """HfArgumentParser with headings, which accepts no abbreviated flags.

    Args:
        dataclass_types: one or more dataclasses whose fields are flags.
        description: docstring of the command.
        more: further arguments of argparse.ArgumentParser, as subparsers pass them.
    """

    def __init__(self, dataclass_types=(), description=None, **more):
        # Flags before the first heading stand under argparse's own.
        self.group = None
        super().__init__(
            dataclass_types,
            allow_abbrev=False,
            formatter_class=Help,
            description=description,
            **more,
        )

    def _parse_dataclass_field(self, parser, field):
        # HfArgumentParser passes all metadata on to argparse, which knows no "group".
        field = copy.copy(field)
        field.metadata = dict(field.metadata)
        heading = field.metadata.pop("group", None)
        if heading is not None:
            self.group = self.add_argument_group(heading)
        super()._parse_dataclass_field(self.group or parser, field)
