# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Images and models for which merging loses nothing: whatever reads the tokens must then give what it gave before."""

import torch
from torch import nn


def duplicates(batch=2):
    """Images of two kinds of patches, of which every one has exact duplicates among those that it may merge with."""
    generator = torch.Generator().manual_seed(3)
    kinds = torch.randn(batch, 2, 3, 4, 4, generator=generator)
    rows = [torch.cat([kinds[:, (row // 2) % 2]] * 8, dim=-1) for row in range(8)]
    return torch.cat(rows, dim=-2)  # (batch, 3, 32, 32)


def without_positions(model):
    """A model to which patches that look alike are alike."""
    for name, parameter in model.named_parameters():
        if "position_embedding" in name:
            nn.init.zeros_(parameter)
        elif parameter.ndim > 1 or "lambda" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()
