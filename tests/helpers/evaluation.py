# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Runs of checkpoints that are made up, and the divergence of two degrees by its formula."""

import random

import torch

from tocom_hf.evaluation.grid import CellRun


def divergence_from_source(tocom, target_r, scale, images):
    """KL(model at its source degree || model at the target degree), by the formula, in float64."""
    pixel_values, total = torch.stack([sample["pixel_values"] for sample in images]), 0.0
    with torch.no_grad(), tocom.at(tocom.source_r):
        teacher = tocom(pixel_values).logits.double().softmax(-1)
    with torch.no_grad(), tocom.at(target_r, scale):
        student = tocom(pixel_values).logits.double().softmax(-1)
    for p, q in zip(teacher, student, strict=True):
        total += sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
    return total / len(images)


def make_run(source_r, target_r, seed, accuracy, tocom=None, images=200):
    generator = random.Random(f"{source_r} {target_r} {seed}")
    draw = lambda share: torch.tensor([generator.random() < share for _ in range(images)])  # noqa: E731
    if tocom is None:
        return CellRun(f"{source_r}-{seed}", source_r, target_r, draw(accuracy), {}, {}, (), {})
    scales = {0.1 + seed / 100: draw(tocom), -0.1: draw(accuracy)}
    picked = {"paper": 0.1 + seed / 100, "wide": 0.1 + seed / 100}
    return CellRun(f"{source_r}-{seed}", source_r, target_r, draw(accuracy), scales, picked, (-0.1,), {})
