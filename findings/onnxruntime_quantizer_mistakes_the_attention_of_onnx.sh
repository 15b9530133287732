#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# onnxruntime 1.32.0, onnx 1.23.2: one expects quantize_dynamic to leave alone what it cannot quantise. It knows an
# operator Attention of com.microsoft, goes by the name alone, and replaces ONNX's own Attention (opset 23), which torch
# writes for scaled_dot_product_attention, by a QAttention with inputs that this does not have. It writes the file without
# an error, and the file does not load.
# What to do: quantize_dynamic(..., op_types_to_quantize=["MatMul"]).
#
# Seen: by default a QAttention and a file that does not load; with MatMul alone it loads.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import quantize_dynamic

GRAPH = """
<ir_version: 10, opset_import: ["" : 23]>
attend (float[1, 5, 8] x, float[1, 1, 5, 5] bias) => (float[1, 5, 8] y)
{
   q = MatMul (x, wq)
   k = MatMul (x, wk)
   v = MatMul (x, wv)
   y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v, bias)
}
"""
model = onnx.parser.parse_model(GRAPH)
numbers = np.random.default_rng(0)
for name in ("wq", "wk", "wv"):
    weight = numbers.normal(size=(8, 8)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
onnx.checker.check_model(model, full_check=True)
onnx.save(model, "float32.onnx")
onnxruntime.InferenceSession("float32.onnx", providers=["CPUExecutionProvider"])
for name, options in (("by default", {}), ("MatMul alone", {"op_types_to_quantize": ["MatMul"]})):
    quantize_dynamic("float32.onnx", "int8.onnx", **options)
    kinds = sorted({node.op_type for node in onnx.load("int8.onnx").graph.node if "Attention" in node.op_type})
    try:
        onnxruntime.InferenceSession("int8.onnx", providers=["CPUExecutionProvider"])
        outcome = "loads"
    except Exception as error:
        outcome = f"does not load: {type(error).__name__}"
    print(f"{name}: {kinds}, {outcome}")
PYTHON
diff "$folder/seen" - <<'SEEN'
by default: ['QAttention'], does not load: InvalidGraph
MatMul alone: ['Attention'], loads
SEEN
