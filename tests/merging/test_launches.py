# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""How many operations a merging layer starts beside those of the untouched layer: on a busy GPU each is a launch."""

import pytest
import torch
from helpers.models import make_model
from torch.utils._python_dispatch import TorchDispatchMode

from tocom_hf import apply_tome


class LaunchCounter(TorchDispatchMode):
    """Counts the operations that compute something; a view of a tensor computes nothing."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns_view = any(part.alias_info and not part.alias_info.is_write for part in function._schema.returns)
        self.count += not returns_view and function is not torch.ops.aten._unsafe_view.default
        return function(*args, **(kwargs or {}))


def launches(model, pixel_values):
    with torch.no_grad(), LaunchCounter() as counter:
        model(pixel_values)
    return counter.count


@pytest.mark.parametrize("batch", [1, 3])
def test_a_merging_layer_starts_few_operations_more_than_a_dense_one(batch):
    model = make_model().eval()
    pixel_values = torch.randn(batch, 3, 32, 32)
    dense = launches(model, pixel_values)
    more = launches(apply_tome(model, 3), pixel_values) - dense
    layers = model.config.num_hidden_layers
    # the rows of all tokens are numbered once for all layers, and the merged rows of several images are not contiguous
    assert more <= layers * (24 if batch == 1 else 25) + 1
