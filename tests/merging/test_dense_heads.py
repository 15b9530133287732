# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Heads that read the patches of layers in the middle get them at all places of the grid."""

import torch
import transformers as hf
from helpers.families import dpt

from tocom_hf import apply_tome


def test_depth_of_duplicate_tokens_is_that_without_merging():
    """DPT reads four layers: groups of four identical tokens merge exactly, so its depth must not change."""
    torch.manual_seed(0)
    model = hf.DPTForDepthEstimation(dpt()).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    pixel_values = torch.randn(2, 3, 32, 32)

    def duplicate(module, args):
        tokens = args[0].clone()
        for offset in range(1, 4):
            tokens[:, 1 + offset :: 4] = tokens[:, 1::4]
        return (tokens, *args[1:])

    with torch.no_grad():
        handle = model.dpt.encoder.layer[0].register_forward_pre_hook(duplicate)
        dense = model(pixel_values).predicted_depth
        merged = apply_tome(model, [32, 16, 0, 0])(pixel_values).predicted_depth
        handle.remove()
        other = model(pixel_values).predicted_depth
        unmerged = apply_tome(model, 0)(pixel_values).predicted_depth
    assert merged.shape == (2, 128, 128)
    torch.testing.assert_close(merged, dense, rtol=1e-4, atol=1e-4 * dense.abs().max().item())
    # the figures depend on the tokens: without duplicates, merging shows
    assert (other - unmerged).abs().max() > 1e-3 * unmerged.abs().max()
