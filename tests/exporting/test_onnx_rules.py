# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Rules that tidy a graph up leave fewer operations, and the same values by ONNX's own reference implementation."""

import numpy as np
import pytest


onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
ir = pytest.importorskip("onnx_ir", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

# what the exporter makes of a merge: sizes that are computed, casts, whole slices, reshapes of reshapes
MERGE = """
<ir_version: 10, opset_import: ["" : 23]>
merge (float[batch, 6, 4] hidden, int64[2] rows)
 => (float[batch, 6, 4] result, float[batch, 3] best, int64[batch, 3] order)
<int64[1] zero = {0}, int64[1] one = {1}, int64[1] end = {9223372036854775807}, int64[1] all = {-1},
 int64 index = {1}, int64[1] middle = {3}, int64[2] flat_shape = {-1, 4}, int64[2] score_shape = {-1, 6}>
{
   whole = Slice (hidden, zero, end, zero, one)
   same_order = Transpose <perm = [0, 1, 2]> (whole)
   wide = Reshape (same_order, flat_shape)
   rows_flat = Reshape (rows, all)
   rows_again = Reshape (rows_flat, all)
   rows_cast = Cast <to = 7> (rows_again)
   taken = Gather <axis = 0> (wide, rows_cast)
   taken_shape = Shape (taken)
   expanded = Expand (taken, taken_shape)
   target = Unsqueeze (rows_cast, all)
   added = ScatterND <reduction = "add"> (wide, target, expanded)
   shape = Shape (hidden)
   result = Reshape (added, shape)
   sums = ReduceSum <keepdims = 0> (hidden, all)
   scores = Reshape (sums, score_shape)
   halves = Slice (scores, zero, middle, one, one)
   halves_shape = Shape (halves)
   count = Gather (halves_shape, index)
   count_flat = Reshape (count, one)
   best, order = TopK <axis = 1> (halves, count_flat)
}
"""
ATTENTION = """
<ir_version: 10, opset_import: ["" : 23]>
attend (float[batch, 5, 8] query, float[batch, 5, 8] key, float[batch, 5, 8] value, float[batch, 1, 5, 5] bias)
 => (float[batch, 5, 8] result)
<int64[4] split = {-1, 5, 2, 4}, int64[3] join = {-1, 5, 8}>
{
   q4 = Reshape (query, split)
   k4 = Reshape (key, split)
   v4 = Reshape (value, split)
   q = Transpose <perm = [0, 2, 1, 3]> (q4)
   k = Transpose <perm = [0, 2, 1, 3]> (k4)
   v = Transpose <perm = [0, 2, 1, 3]> (v4)
   attended = Attention <scale = 0.3> (q, k, v, bias)
   back = Transpose <perm = [0, 2, 1, 3]> (attended)
   result = Reshape (back, join)
}
"""


def tidied(text, *rules):
    """The operations of a graph before and after the rules, and both graphs."""
    from onnx_ir.passes import common

    before = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True)
    model = ir.serde.deserialize_model(before)
    for rule in rules:
        rule(model.graph)
    common.RemoveUnusedNodesPass()(model)
    return before, ir.serde.serialize_model(model)


def run(model, inputs):
    return onnx.reference.ReferenceEvaluator(model).run(None, inputs)


def test_what_the_exporter_wraps_around_a_merge_goes():
    from tocom_hf.exporting import onnx_rules

    before, after = tidied(
        MERGE,
        onnx_rules.drop_what_does_nothing,
        onnx_rules.name_static_shapes,
        onnx_rules.join_reshapes,
        onnx_rules.drop_what_does_nothing,
    )
    left = sorted(node.op_type for node in after.graph.node)
    assert left == sorted(["Reshape", "Gather", "Unsqueeze", "ScatterND", "Reshape", "ReduceSum", "Slice", "TopK"]), (
        left
    )
    generator = np.random.default_rng(0)
    inputs = {"hidden": generator.normal(size=(3, 6, 4)).astype(np.float32), "rows": np.array([2, 11])}
    for found, expected in zip(run(after, inputs), run(before, inputs), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_attention_splits_the_heads_itself():
    from tocom_hf.exporting import onnx_rules

    before, after = tidied(ATTENTION, onnx_rules.attend_to_rows)
    assert [node.op_type for node in after.graph.node] == ["Attention"]
    generator = np.random.default_rng(0)
    inputs = {name: generator.normal(size=(2, 5, 8)).astype(np.float32) for name in ("query", "key", "value")}
    inputs["bias"] = generator.normal(size=(2, 1, 5, 5)).astype(np.float32)
    np.testing.assert_allclose(run(after, inputs)[0], run(before, inputs)[0], rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_sorted_values_are_counted_along_their_axis(axis):
    from tocom_hf.exporting import onnx_rules

    text = f"""
<ir_version: 10, opset_import: ["" : 23]>
sort (float[4, 3] x) => (float[a, b] values, int64[a, b] order)
<int64 index = {{{axis}}}, int64[1] one = {{1}}>
{{
   shape = Shape (x)
   count = Gather (shape, index)
   flat = Reshape (count, one)
   values, order = TopK <axis = {axis}> (x, flat)
}}
"""
    before, _ = tidied(text)
    size = (4, 3)[axis]
    for output in before.graph.output:
        for dim, length in zip(output.type.tensor_type.shape.dim, (4, 3), strict=True):
            dim.dim_value = length
    model = ir.serde.deserialize_model(before)
    onnx_rules.name_static_shapes(model.graph)
    after = ir.serde.serialize_model(model)
    counts = [onnx.numpy_helper.to_array(part).tolist() for part in after.graph.initializer if "count" in part.name]
    assert counts == [[size]]
    inputs = {"x": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)}
    for found, expected in zip(run(after, inputs), run(before, inputs), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_mask_that_masks_nothing_goes():
    from tocom_hf.exporting import onnx_rules

    text = ATTENTION.replace("float[batch, 1, 5, 5] bias", "int64[4] mask_shape").replace(", bias)", ", mask)")
    text = text.replace("int64[4] split", "bool[1, 1, 1, 1] ones = {1}, int64[4] split")
    text = text.replace("   attended", "   mask = Expand (ones, mask_shape)\n   attended")
    before, after = tidied(text, onnx_rules.drop_masks_of_ones)
    assert "Expand" in {node.op_type for node in before.graph.node} - {node.op_type for node in after.graph.node}
    generator = np.random.default_rng(0)
    inputs = {name: generator.normal(size=(2, 5, 8)).astype(np.float32) for name in ("query", "key", "value")}
    inputs["mask_shape"] = np.array([2, 1, 5, 5])
    np.testing.assert_allclose(run(after, inputs)[0], run(before, inputs)[0], rtol=1e-6)
    _, masked = tidied(text.replace("ones = {1}", "ones = {0}"), onnx_rules.drop_masks_of_ones)
    assert "Expand" in {node.op_type for node in masked.graph.node}


def test_what_does_something_stays():
    from tocom_hf.exporting import onnx_rules

    text = """
<ir_version: 10, opset_import: ["" : 23]>
other (float[batch, 6] x) => (float[batch, 3] half, double[batch, 6] exact, float[6, batch] turned, float[2, 3] shaped)
<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] end = {9223372036854775807},
 int64[2] sizes = {2, 3}>
{
   half = Slice (x, zero, end, one, two)
   exact = Cast <to = 11> (x)
   turned = Transpose <perm = [1, 0]> (x)
   shaped = Reshape (x, sizes)
}
"""
    rules = [onnx_rules.drop_what_does_nothing, onnx_rules.name_static_shapes, onnx_rules.join_reshapes]
    before, after = tidied(text, *rules)
    assert len(after.graph.node) == 4
    inputs = {"x": np.arange(6, dtype=np.float32).reshape(1, 6)}
    for found, expected in zip(run(after, inputs), run(before, inputs), strict=True):
        np.testing.assert_array_equal(found, expected)
