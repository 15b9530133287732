# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""From a module to a program of torch.export, in which only the number of images is open."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tocom_hf.errors import UnsupportedModelError


_LOUD = ("torch.onnx._internal.exporter._registration", "torch.__trace", "onnx_ir._convenience")


def trace(module: nn.Module, inputs: tuple[Any, ...], dynamic_batch: bool) -> torch.export.ExportedProgram:
    """Trace a module on example inputs.

    Args:
        module: The module.
        inputs: Its arguments, the batch first; others keep their shapes.
        dynamic_batch: Whether the number of images is open. Otherwise it is that of the example.

    Raises:
        UnsupportedModelError: if it cannot be traced.
    """
    shapes: Any = None
    if dynamic_batch:
        batch = {0: torch.export.Dim("batch", min=1)}
        shapes = (batch, *(dict.fromkeys(other) for other in inputs[1:]))
    with quiet():
        try:
            return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # whatever torch meets in code that it cannot trace
            raise UnsupportedModelError(
                f"torch.export cannot trace the model: {' '.join(str(error).split()):.400}"
            ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep quiet what exporters tell in every run: packages that are not needed, their own deprecations, and traces
    for the developers of torch, which take several times as long as the export where a program listens to all loggers.
    """
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
