# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A merging model that was exported to ONNX gives in onnxruntime what it gives in torch, with any number of images."""

import pytest
import torch
from helpers.families import FAMILIES

from tocom_hf import apply_tome


onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")


@pytest.mark.slow  # those of `export` are run by its own tests
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_onnxruntime_gives_the_same_with_any_batch(family, tmp_path):
    # one layer without sizes and one with them
    model, inputs = apply_tome(family.make(layers=2), 6), family.inputs()
    shapes = {name: {0: torch.export.Dim("batch", min=2, max=64)} for name in inputs}
    with torch.no_grad():
        torch.onnx.export(model, (), tmp_path / "m.onnx", kwargs=inputs, dynamic_shapes=shapes, dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    other = family.inputs(batch=5)
    outputs = session.run(None, {node.name: other[node.name].numpy() for node in session.get_inputs()})
    expected = family.result(model, other)
    if family.output == "last_hidden_state":
        outputs = [output[:, 0] for output in outputs if output.ndim == 3]
    found = next(torch.from_numpy(output) for output in outputs if output.shape == expected.shape)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
