# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""How many operations a merging layer starts beside those of the untouched layer: on a busy GPU each is a launch."""

import pytest
import torch
from helpers.models import make_model
from helpers.operations import Operations

from tocom_hf import apply_tome


def launches(model, pixel_values):
    with torch.no_grad(), Operations() as operations:
        model(pixel_values)
    return len(operations.names)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_merging_layer_starts_few_operations_more_than_a_dense_one(batch):
    model = make_model().eval()
    pixel_values = torch.randn(batch, 3, 32, 32)
    dense = launches(model, pixel_values)
    more = launches(apply_tome(model, 3), pixel_values) - dense
    layers = model.config.num_hidden_layers
    # the rows of all tokens are numbered once for all layers, and the merged rows of several images are not contiguous
    assert more <= layers * (24 if batch == 1 else 25) + 1
