#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# torch 2.13.0, onnxscript 0.7.2: `scatter_reduce(reduce="mean")` averages all values with the same index. ONNX has no
# mean, and the exporter (`dynamo=True`, the default) writes a ScatterElements without any reduction: the last value
# wins (on the CPU). There is neither an error nor a warning, and the graph passes the checker. The older exporter
# (`dynamo=False`) refuses instead. Methods that average tokens of a Vision Transformer, such as token merging, use just
# this operation.
# What to do: export a sum and a count (a sum of ones), which come out right, and divide one by the other.
#
# Seen, for values 1, 3, 5 with index 0 and 7 with index 1: torch gives the means 3 and 7, the exported model 5 and 7.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | grep -E '^(sum|mean|older exporter):' | tee "$folder/seen"
import onnx
import onnxruntime
import torch


class Scatter(torch.nn.Module):
    def __init__(self, reduce):
        super().__init__()
        self.reduce = reduce

    def forward(self, values, index):
        return torch.zeros(1, 2).scatter_reduce(1, index, values, reduce=self.reduce, include_self=False)


VALUES = torch.tensor([[1.0, 3.0, 5.0, 7.0]])
INDEX = torch.tensor([[0, 0, 0, 1]])

for reduce in ("sum", "mean"):
    model = Scatter(reduce).eval()
    torch.onnx.export(model, (VALUES, INDEX), "model.onnx", input_names=["values", "index"], verbose=False)
    onnx.checker.check_model("model.onnx", full_check=True)
    session = onnxruntime.InferenceSession("model.onnx")
    (exported,) = session.run(None, {"values": VALUES.numpy(), "index": INDEX.numpy()})
    print(f"{reduce}: torch {model(VALUES, INDEX).tolist()}, exported {exported.tolist()}")

try:
    torch.onnx.export(Scatter("mean").eval(), (VALUES, INDEX), "old.onnx", dynamo=False)
except torch.onnx.errors.OnnxExporterError as error:
    print("older exporter:", error)
PYTHON
diff "$folder/seen" - <<'SEEN'
sum: torch [[9.0, 7.0]], exported [[9.0, 7.0]]
mean: torch [[3.0, 7.0]], exported [[5.0, 7.0]]
older exporter: ONNX does not support mean reduction for scatter_reduce
SEEN
