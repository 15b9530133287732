# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""How every command and every example script begins and ends.

Wrong use ends with one line on stderr and the exit code 2, and never with a traceback. What is a mistake of the package
itself still shows its traceback. Nothing heavy is imported here, so that help and wrong options are answered at once.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TypeVar

from tocom_hf.errors import DistillationInterrupted, MissingExtraError, TocomError
from tocom_hf.extras import require_extras


WRONG_USE = 2
# what a shell shows for a program that SIGPIPE has ended
BROKEN_PIPE = 128 + 13

Arguments = TypeVar("Arguments")


class WrongOptionError(Exception):
    """The command line has an unknown option, lacks one, or has a value that it does not take."""


class OneLineErrors:
    """Mixin for an `argparse.ArgumentParser` that raises `WrongOptionError` instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise WrongOptionError(message)


class CommandParser(OneLineErrors, argparse.ArgumentParser):
    """The parser of a command.

    Args:
        command: What the user types, such as `tocom distill`.
        description: What the command does, with an example; shown as it is written.
        add_help: Whether it has the option `--help`.
    """

    def __init__(self, command: str, description: str | None = None, add_help: bool = True):
        super().__init__(
            prog=command,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=add_help,
        )


def positive_integer(text: str) -> int:
    """The type of an option that counts something."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def run_command(
    command: str,
    parse_args: Callable[[Sequence[str] | None], Arguments],
    job: Callable[[Arguments], None],
    argv: Sequence[str] | None = None,
    extra: str | None = None,
) -> int:
    """Parse the command line, do the job, and end in the one way in which every command ends.

    Args:
        command: What the user typed, such as `tocom distill`; every message begins with it.
        parse_args: Makes the arguments from the command line.
        job: Does the work.
        argv: The command line without the program; by default that of the process.
        extra: The extra that brings all that the command needs, as in `require_extras`.

    Returns:
        The exit code: 0, 2 for wrong use, 128 and the signal's number for a distillation that was told to stop.

    Raises:
        SystemExit: after help or version were printed.
        Exception: whatever is a mistake of the package, as it is.
    """

    def run() -> None:
        arguments = parse_args(argv)
        with progress_bars_on_terminals_only():
            job(arguments)

    return end_like_a_command(command, run, extra)


def end_like_a_command(command: str, run: Callable[[], None], extra: str | None = None) -> int:
    """What `run_command` does, for a function that parses its command line itself."""
    try:
        try:
            with require_extras(command, extra):
                run()
        finally:
            # A reader that has gone is found here, and not when the interpreter ends.
            sys.stdout.flush()
    except WrongOptionError as error:
        return _wrong_use(command, f"{error} (see {command} --help)")
    except BrokenPipeError:
        _drop_what_is_left_to_print()
        return BROKEN_PIPE
    except DistillationInterrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    except (TocomError, OSError) as error:
        return _wrong_use(command, f"{type(error).__name__}: {error}")
    return 0


def say(text: str) -> None:
    """Print a line of a command that goes on where it cannot be read: the reader has gone, or the disk is full."""
    try:
        print(text, flush=True)
    except OSError:
        _drop_what_is_left_to_print()


def one_line(text: str) -> str:
    """A text of several lines as one line."""
    return " ".join(text.split())


@contextlib.contextmanager
def extras_or_exit(command: str) -> Iterator[None]:
    """Exit as for wrong use where an import in the `with` block needs an extra that is not installed.

    It is for scripts that import at their top; commands import what they need within the job of `run_command`.
    """
    try:
        with require_extras(command):
            yield
    except MissingExtraError as error:
        sys.exit(_wrong_use(command, f"{type(error).__name__}: {error}"))


@contextlib.contextmanager
def progress_bars_on_terminals_only() -> Iterator[None]:
    """Draw no progress bars within the `with` block where stderr is a file or a pipe, which they would only fill."""
    if sys.stderr.isatty():
        yield
        return
    # datasets looks at this when it is imported, which not every command does.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _wrong_use(command: str, message: str) -> int:
    print(f"{command}: error: {one_line(message)}", file=sys.stderr)
    return WRONG_USE


def _drop_what_is_left_to_print() -> None:
    """Let stdout lead nowhere, so that the interpreter does not complain when it flushes it at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
