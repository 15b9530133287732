# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Names of devices for people, waiting for them, and running a model in evaluation mode for a while."""

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn


def describe_device(device: torch.device | str) -> str:
    """The name of a device as a person knows it; on a CPU with the number of threads that torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} thread(s)"


def float64_device(device: torch.device) -> torch.device:
    """The device itself where it computes in float64, else the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished; a CPU has, when a call returns."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model in evaluation mode for the length of a `with` block.

    Afterwards every part of it is in the mode that it was in: a layer that its owner froze in evaluation mode stays so
    in a model that trains, which `model.train()` would undo.

    Args:
        model: Any module, with parts in training and evaluation mode.

    Yields:
        The same module.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield model
    finally:
        for module, training in modes:
            module.training = training
