#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# onnxruntime 1.32.0, onnx 1.23.2: one expects the mask of ONNX's Attention (opset 23) to broadcast, as the standard says
# and as torch writes it for a bias that is the same for every query. ONNX's own reference does so. onnxruntime makes the
# session, and raises at the first run: the mask must have a row for every query.
# What to do: add the bias to zeros of shape (1, 1, queries, 1) in front of it.
#
# Seen: the reference gives a result; onnxruntime raises when run; with all rows both give the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
import numpy as np
import onnx
import onnx.reference
import onnxruntime

GRAPH = """
<ir_version: 10, opset_import: ["" : 23]>
attend (float[1, 2, 5, 4] q, float[1, 2, 5, 4] k, float[1, 2, 5, 4] v, float[1, 1, ROWS, 5] bias) => (float[1, 2, 5, 4] y)
{ y = Attention (q, k, v, bias) }
"""
numbers = np.random.default_rng(0)
inputs = {name: numbers.normal(size=(1, 2, 5, 4)).astype(np.float32) for name in "qkv"}
row = numbers.normal(size=(1, 1, 1, 5)).astype(np.float32)
found = {}
for rows in (1, 5):
    model = onnx.parser.parse_model(GRAPH.replace("ROWS", str(rows)))
    onnx.checker.check_model(model, full_check=True)
    inputs["bias"] = np.repeat(row, rows, axis=2)
    found["reference", rows] = onnx.reference.ReferenceEvaluator(model).run(None, inputs)[0]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    try:
        found["onnxruntime", rows] = session.run(None, inputs)[0]
    except Exception as error:
        print(f"onnxruntime, {rows} row(s): {type(error).__name__} when run")
print("reference, 1 row as 5:", np.allclose(found["reference", 1], found["reference", 5], atol=1e-6))
print("onnxruntime, 5 rows, as the reference:", np.allclose(found["onnxruntime", 5], found["reference", 5], atol=1e-6))
PYTHON
diff "$folder/seen" - <<'SEEN'
onnxruntime, 1 row(s): Fail when run
reference, 1 row as 5: True
onnxruntime, 5 rows, as the reference: True
SEEN
