# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What token merging would save on a model, and which degree to try first, without plugins or data.

    tocom merge-report facebook/deit-base-patch16-224 --batch_size 32

Cost does not depend on weights. So only config.json is read, and a model with random weights is measured: no weights
are downloaded, and no code or pickle of the repository is run. A model that token merging does not support gets its
reason as the answer.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tocom_hf.cli.calibrate import add_measuring_options, check_measuring_options, measuring_device
from tocom_hf.cli.endings import CommandParser, run_command
from tocom_hf.cli.loading import refused_input
from tocom_hf.errors import UnsupportedModelError


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tocom_hf.cost.calibration import Calibration

COMMAND = "tocom merge-report"
MAX_R = 16  # the paper's
LARGER_BATCHES = "Larger batches and images gain more: try --batch_size 32, or another --device."


@dataclass(frozen=True)
class MergeReport:
    """What `tocom merge-report` has found out about a checkpoint.

    Attributes:
        model: Hub id or folder.
        model_type: Of its configuration.
        model_class: The class that it was saved from.
        reason: Why token merging does not support it, or `None`. What follows is only known where it does.
        measured_class: The class that was measured: of a model of several parts the vision part.
        protected: Tokens at the front that never merge, registers included.
        registers: How many of them are registers.
        restored: Whether merged tokens are copied back to their places after the last layer.
        calibration: The cost of every degree.
        first_r: The degree to try first: the smallest that is as fast as was asked for, or else the fastest.
    """

    model: str
    model_type: str
    model_class: str
    reason: str | None = None
    measured_class: str | None = None
    protected: int = 0
    registers: int = 0
    restored: bool = False
    calibration: "Calibration | None" = None
    first_r: int | None = None


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(COMMAND, __doc__)
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of any checkpoint.")
    add_measuring_options(parser)
    parser.add_argument(
        "--target_r",
        type=int,
        nargs="+",
        help="Largest degree to measure, or the degrees where several are given; default: 16, or where the first layer "
        "can merge no more.",
    )
    parser.add_argument("--backbone", help="Which part to look at, of a model with several that could merge.")
    parser.add_argument("--target_speedup", type=float, default=1.5, help="How much faster than r = 0 it should be.")
    parser.add_argument("--seconds", type=float, default=10.0, help="How long to measure.")
    args = parser.parse_args(argv)
    check_measuring_options(parser, args)
    if not args.target_speedup > 0:
        parser.error(f"--target_speedup must be positive, got {args.target_speedup:g}")
    return args


def make_report(
    model: str,
    *,
    image_size: tuple[int, int] | None = None,
    batch_size: int = 1,
    target_r: Sequence[int] | None = None,
    target_speedup: float = 1.5,
    seconds: float = 10.0,
    device: str | None = None,
    backbone: str | None = None,
) -> MergeReport:
    """Read the configuration of a checkpoint and measure a model of its shape with random weights.

    Args:
        model: Hub id or folder of any checkpoint.
        image_size: Height and width in pixels; by default those of the configuration.
        batch_size: Images per forward pass.
        target_r: The largest degree to measure, or the degrees where it has several.
        target_speedup: How many times as fast as degree 0 the degree to try first should be.
        seconds: How long to measure.
        device: Where to measure; by default an accelerator if there is one.
        backbone: Which part to look at, where several could merge; as in `apply_tome`.

    Raises:
        PluginFileError: if there is no such checkpoint, or its configuration cannot be used.
        HubError: if the Hub fails.
        DegreeError, ArgumentError: if an argument is out of range.
    """
    from tocom_hf.cost.calibration import calibrate
    from tocom_hf.merging.backbones import find_backbone
    from tocom_hf.merging.patching import get_settings, set_merging

    place = measuring_device(device)
    report, subject = open_checkpoint(model, backbone)
    if subject is None:
        return report
    subject.to(place)
    degrees = degrees_to_measure(subject, target_r, image_size)
    calibration = calibrate(subject, image_size, batch_size, degrees=degrees, seconds=seconds)
    found = find_backbone(subject)
    set_merging(found, 0)
    settings = get_settings(found)
    restored = settings is not None and settings.restore
    return MergeReport(
        model=report.model,
        model_type=report.model_type,
        model_class=report.model_class,
        measured_class=type(subject).__name__,
        protected=found.protected,
        registers=found.protected - found.architecture.protected,
        restored=restored,
        calibration=calibration,
        first_r=degree_to_try(calibration, target_speedup),
    )


def open_checkpoint(name: str, backbone: str | None) -> "tuple[MergeReport, PreTrainedModel | None]":
    """What the configuration of a checkpoint says, and a model with random weights unless it is unsupported."""
    from tocom_hf.merging.architectures import supported_types, unsupported
    from tocom_hf.merging.timm_models import MODEL_TYPE
    from tocom_hf.model.checkpoint import Checkpoint, is_of_timm, reason_for_foreign
    from tocom_hf.storage.json_files import read_json

    checkpoint = Checkpoint(name, {})
    content = read_json(checkpoint.repository.path("config.json"))
    model_type = MODEL_TYPE if is_of_timm(content) else str(content.get("model_type", "unknown"))
    model_class = class_recorded_in(content)
    reason = reason_for_foreign(content)
    if reason is not None:
        return MergeReport(name, model_type, model_class, reason), None
    config, _ = checkpoint.config(None, {})
    if not supported_types(config):
        # The second sentence lists what is supported.
        reason = str(unsupported(config)).partition(". ")[0]
        return MergeReport(name, model_type, model_class, f"{reason}."), None
    try:
        subject = build_with_random_weights(name, config, backbone)
    except UnsupportedModelError as error:
        return MergeReport(name, model_type, model_class, str(error)), None
    return MergeReport(name, model_type, model_class), subject


def class_recorded_in(content: dict[str, Any]) -> str:
    """The name of the class that a checkpoint was saved from."""
    names = content.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0])
    return "AutoModel"


def build_with_random_weights(name: str, config: Any, part: str | None) -> "PreTrainedModel":
    """A model of a configuration in evaluation mode, or where it is only a part of the model, its vision part.

    The whole model is looked at without memory for its weights first: beside a vision part there may be a language
    model of many gigabytes.

    Raises:
        UnsupportedModelError: if the class is unknown, or used in a way that merging breaks.
        ArgumentError: if transformers cannot build such a model.
    """
    import torch
    from transformers import MODEL_MAPPING, AutoModel

    from tocom_hf.merging.architectures import ARCHITECTURES
    from tocom_hf.merging.backbones import find_backbone
    from tocom_hf.merging.refusals import parts_of
    from tocom_hf.model.loading import model_class_of

    model_class = model_class_of(config)
    if model_class is AutoModel and type(config) not in MODEL_MAPPING:
        # The configuration names no class and there is none without a head: a part that could merge stands for it.
        config = next(found for found in parts_of(config) if found.model_type in ARCHITECTURES)

    def build() -> Any:
        with refused_input(f"No model can be built from the config.json of {name}"):
            return AutoModel.from_config(config) if model_class is AutoModel else model_class(config)

    with torch.device("meta"):
        whole = build()
    backbone = find_backbone(whole, part).module
    if backbone.config.model_type == config.model_type:
        return build().eval()
    with refused_input(f"No vision part can be built from the config.json of {name}"):
        return type(backbone)(backbone.config).eval()


def degrees_to_measure(
    model: "PreTrainedModel", target_r: Sequence[int] | None, image_size: tuple[int, int] | None
) -> list[int]:
    """The degrees that are asked for, or those up to where the first layer, and so every layer, can merge no more."""
    from tocom_hf.cost.calibration import calibrate
    from tocom_hf.merging.backbones import find_backbone
    from tocom_hf.merging.schedule import require_degree

    if target_r is None:
        dense = calibrate(model, image_size, degrees=[0], seconds=0, progress=False)[0]
        unprotected = dense.tokens[0] - find_backbone(model).protected
        return list(range(min(MAX_R, unprotected // 2) + 1))
    degrees = [require_degree(degree, "target_r") for degree in target_r]
    if len(degrees) == 1:
        return list(range(degrees[0] + 1))
    return degrees


def degree_to_try(calibration: "Calibration", target_speedup: float) -> int:
    """The smallest degree that is as many times as fast as degree 0 as was asked for, or else the fastest."""
    for cost in calibration:
        if cost.speedup >= target_speedup:
            return cost.target_r
    return max(calibration, key=lambda cost: cost.speedup).target_r


def format_report(report: MergeReport, target_speedup: float) -> str:
    """A report as the text that is printed."""
    lines = [f"{report.model}: model type {report.model_type}, class {report.model_class}"]
    if report.calibration is None or report.first_r is None:
        lines += ["", f"Token merging does not support it. {report.reason}"]
        return "\n".join(lines)
    lines += [
        "",
        "Token merging supports it.",
        f"Protected: {describe_protected(report)}.",
        f"Restored: {describe_restored(report)}.",
        "",
        describe_measured(report),
        str(report.calibration),
        "",
        *advise(report, report.calibration, report.first_r, target_speedup),
    ]
    return "\n".join(lines)


def describe_protected(report: MergeReport) -> str:
    names = {0: "no token, all may merge", 1: "the class token", 2: "the class and the distillation token"}
    text = names[report.protected - report.registers]
    if report.registers:
        text += f" and {report.registers} register tokens"
    return text if report.protected == 0 else f"{text} never merge" + ("s" if report.protected == 1 else "")


def describe_restored(report: MergeReport) -> str:
    if report.restored:
        return "merged tokens are copied back to their places after the last layer, so outputs keep their shape"
    return "no, the head reads no patch tokens; the last hidden state has the tokens that are left"


def describe_measured(report: MergeReport) -> str:
    text = "Measured with random weights, because cost does not depend on weights; none were downloaded."
    if report.measured_class != report.model_class:
        text += f" Of {report.model_class}, its vision part alone ({report.measured_class})."
    return text


def advise(report: MergeReport, calibration: "Calibration", first_r: int, target_speedup: float) -> list[str]:
    """Which degree to try first, and what to type."""
    speedup = calibration[first_r].speedup
    if first_r == 0:
        return [f"No degree is faster than r = 0 here. {LARGER_BATCHES}"]
    if speedup >= target_speedup:
        found = f"the smallest degree that is at least {target_speedup:g} times as fast as r = 0 here."
    else:
        found = f"the fastest here: none is {target_speedup:g} times as fast as r = 0. {LARGER_BATCHES}"
    return [
        f"Try first: r = {first_r}, {speedup:.2f}x, {found}",
        "",
        "    from tocom_hf import apply_tome",
        f"    apply_tome(model, r={first_r})",
        "",
        "Merging alone costs accuracy where the weights were trained at another degree. Plugins, made by "
        "`tocom distill`, win part of it back:",
        f"    TocomModel.from_pretrained({report.model!r}, plugins=..., target_r={first_r})",
    ]


def report_on(args: argparse.Namespace) -> None:
    report = make_report(
        args.model,
        image_size=args.image_size,
        batch_size=args.batch_size,
        target_r=args.target_r,
        target_speedup=args.target_speedup,
        seconds=args.seconds,
        device=args.device,
        backbone=args.backbone,
    )
    print(format_report(report, args.target_speedup))


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, parse_args, report_on, argv)


if __name__ == "__main__":
    sys.exit(main())
