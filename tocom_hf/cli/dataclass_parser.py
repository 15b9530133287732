# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The parser of the commands whose options are the fields of dataclasses."""

import argparse
from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser

from tocom_hf.cli.endings import OneLineErrors
from tocom_hf.errors import TocomError


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows the description as it is written, and the default of every option."""


class DataclassParser(OneLineErrors, HfArgumentParser):
    """The parser of a command whose options are the fields of dataclasses.

    Args:
        command: What the user types, such as `tocom distill`.
        description: What the command does, with an example; shown as it is written.
        dataclass_types: The dataclasses.
    """

    def __init__(self, command: str, description: str | None, dataclass_types: Sequence[Any]):
        super().__init__(dataclass_types, prog=command, description=description, formatter_class=_HelpFormatter)

    def parse_into_dataclasses(self, argv: Sequence[str] | None) -> tuple[Any, ...]:
        """One object of each dataclass from the command line."""
        given = None if argv is None else list(argv)
        try:
            *found, unknown = self.parse_args_into_dataclasses(given, return_remaining_strings=True)
        except (TocomError, ModuleNotFoundError):
            raise
        except (ValueError, TypeError, ImportError) as error:
            # The checks of TrainingArguments, which name the options that do not fit each other.
            self.error(str(error))
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return tuple(found)
