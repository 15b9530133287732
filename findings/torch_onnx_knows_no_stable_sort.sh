#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# torch 2.13.0: one expects an option that only makes a result definite to be exported like its default. argsort and sort
# export to ONNX as a TopK, which ONNX defines to put the first of equals first. With stable given, be it True or False,
# they become another overload, for which torch.onnx has no translation.
# What to do: leave the argument out while exporting (torch.compiler.is_exporting()).
#
# Seen: without the argument it exports; with True or False the export fails.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | grep -E '^stable' | tee "$folder/seen"
import torch


class Order(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, scores):
        return scores.argsort(dim=1, descending=True, **self.options)


scores = torch.tensor([[1.0, 3.0, 2.0]])
for name, options in (("left out", {}), ("True", {"stable": True}), ("False", {"stable": False})):
    try:
        program = torch.onnx.export(Order(**options).eval(), (scores,), dynamo=True, verbose=False)
        kinds = [node.op_type for node in program.model.graph]
        print(f"stable {name}: exports, TopK: {'TopK' in kinds}")
    except Exception as error:
        print(f"stable {name}: {type(error).__name__}")
PYTHON
diff "$folder/seen" - <<'SEEN'
stable left out: exports, TopK: True
stable True: ConversionError
stable False: ConversionError
SEEN
