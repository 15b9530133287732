#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# onnxruntime 1.32.0, torch 2.13.0: one expects that a model for which the CPU has no kernel is refused when its session
# is made. A ScatterND or ScatterElements that adds, which is what torch writes for `index_add` and `scatter_add`, loads
# in float16, and raises at the first image. So a service starts well and fails later. Vision Transformers that merge
# tokens have just these operations.
# What to do: run one image after loading, and keep the sum itself in float32.
#
# Seen: float32 runs; float16 loads, and raises when run; float16 with the sum in float32 runs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | grep -E '^(index_add|scatter_add)' | tee "$folder/seen"
import onnxruntime
import torch


class Sums(torch.nn.Module):
    def __init__(self, name, sum_dtype):
        super().__init__()
        self.name, self.sum_dtype = name, sum_dtype

    def forward(self, values, index):
        total = torch.zeros(2, values.shape[1], dtype=self.sum_dtype)
        added = values.to(self.sum_dtype)
        if self.name == "index_add":
            total = total.index_add(0, index, added)
        else:
            total = total.scatter_add(0, index[:, None].expand_as(added), added)
        return total.to(values.dtype)


def outcome(name, dtype, sum_dtype):
    values, index = torch.ones(4, 3, dtype=dtype), torch.tensor([0, 0, 0, 1])
    model = Sums(name, sum_dtype).eval()
    torch.onnx.export(model, (values, index), "model.onnx", input_names=["values", "index"], verbose=False)
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    try:
        (found,) = session.run(None, {"values": values.numpy(), "index": index.numpy()})
    except Exception as error:
        return f"loads, and raises {type(error).__name__} when run"
    return f"runs, right: {(found == model(values, index).numpy()).all()}"


for name in ("index_add", "scatter_add"):
    print(f"{name}, float32: {outcome(name, torch.float32, torch.float32)}")
    print(f"{name}, float16: {outcome(name, torch.float16, torch.float16)}")
    print(f"{name}, float16, sum in float32: {outcome(name, torch.float16, torch.float32)}")
PYTHON
diff "$folder/seen" - <<'SEEN'
index_add, float32: runs, right: True
index_add, float16: loads, and raises RuntimeException when run
index_add, float16, sum in float32: runs, right: True
scatter_add, float32: runs, right: True
scatter_add, float16: loads, and raises RuntimeException when run
scatter_add, float16, sum in float32: runs, right: True
SEEN
