# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The command `tocom`. It imports the module of a subcommand only when that is asked for."""

import importlib
import sys
from collections.abc import Sequence

from tocom_hf.cli.endings import CommandParser, end_like_a_command
from tocom_hf.version import __version__


# every subcommand, in the order in which they come to be used: its module in this package, and what it does
COMMANDS = {
    "merge-report": ("merge_report", "what token merging would save on a model, and which degree to try first"),
    "calibrate": ("calibrate", "measure what every degree costs on this machine"),
    "find-recipe": ("find_recipe", "choose which tokens merge, and in which layers, from unlabelled images"),
    "fit-plugins": ("fit_plugins", "fit a plugin set in closed form, from a few hundred unlabelled images"),
    "distill": ("distill", "distil a plugin set for a pre-trained model from unlabelled images"),
    "finetune": ("finetune", "fine-tune a classifier while it merges tokens"),
    "evaluate": ("evaluate", "accuracy of fine-tuned checkpoints over a grid of degrees, with and without plugins"),
    "fit-scales": ("fit_scales", "fit the scales of a plugin set to one checkpoint"),
    "convert": ("convert", "convert checkpoints of the authors' repository and of timm"),
    "push": ("push", "publish a plugin set or a checkpoint on the Hugging Face Hub"),
    "visualize": ("visualize", "paint merged tokens over images"),
    "export": ("export", "write a model as graphs for ONNX Runtime or OpenVINO, one for each degree"),
    "predict": ("predict", "labels or features of a data set of any size, as parquet files"),
    "serve": ("serve", "serve a classifier that merges more tokens when the load rises"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tocom` and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        module_name, _ = COMMANDS[arguments[0]]
        module = importlib.import_module(f"tocom_hf.cli.{module_name}")
        return module.main(arguments[1:])

    def explain() -> None:
        parser = make_parser()
        _, unknown = parser.parse_known_args(arguments)
        names = ", ".join(COMMANDS)
        if unknown:
            parser.error(f"expected a command in place of {unknown[0]!r}: {names}")
        parser.error(f"expected a command: {names}")

    return end_like_a_command("tocom", explain)


def make_parser() -> CommandParser:
    """The parser for what stands in front of a subcommand's own options."""
    description = "Alter the inference cost of a Vision Transformer without re-tuning it.\n\ncommands:\n"
    width = max(len(name) for name in COMMANDS)
    for name, (_, summary) in COMMANDS.items():
        description += f"  {name:{width}}  {summary}\n"
    description += "\n`tocom COMMAND --help` shows the options of a command and an example."
    parser = CommandParser("tocom", description)
    parser.usage = "tocom [-h] [--version] COMMAND [options]"
    parser.add_argument("--version", action="version", version=f"tocom {__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
