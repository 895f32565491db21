"""Command-line flags: one dataclass field each, grouped in --help."""

import argparse
from dataclasses import field

from transformers import HfArgumentParser


def flag(default, text, **more):
    """A field of a settings dataclass that is a flag of the command line.

    Args:
        default: value without the flag.
        text: its --help.
        more: `choices`, `aliases`, and `group`, the heading in --help of this flag and of those after it.
    """
    return field(default=default, metadata={"help": text, **more})


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help of every command: its docstring as it is, and each flag's default unless that is None."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """HfArgumentParser with headings, without abbreviations of flags."""

    def __init__(self, dataclass_types=(), description=None, **more):
        self.group = None
        super().__init__(
            dataclass_types,
            allow_abbrev=False,
            formatter_class=Help,
            description=description,
            **more,
        )

    def _parse_dataclass_field(self, parser, field):
        metadata = dict(field.metadata)
        heading = metadata.pop("group", None)
        if heading is not None:
            self.group = self.add_argument_group(heading)
        field.metadata = metadata
        super()._parse_dataclass_field(self.group or parser, field)
