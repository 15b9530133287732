#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# transformers 5.23.0, torch 2.13.0: one expects a Vision Transformer that is called without a mask to be exported without
# one. While it is traced, transformers makes a mask of ones, and every attention of the program reads it: masked
# attention for nothing, in each runtime that does not fold it away.
# What to do: drop the mask of each attention in the graph, where it is a constant of ones.
#
# Seen: called, the attention gets no mask; traced, every one of the two layers gets one, which is true everywhere.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
import torch
from transformers import ViTConfig, ViTModel

config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32)
model = ViTModel(config).eval()
pixel_values = torch.randn(2, 3, 32, 32)
masks = []
plain = torch.nn.functional.scaled_dot_product_attention


def watched(query, key, value, attn_mask=None, **options):
    masks.append(attn_mask)
    return plain(query, key, value, attn_mask=attn_mask, **options)


torch.nn.functional.scaled_dot_product_attention = watched
with torch.no_grad():
    model(pixel_values)
print("called, masks:", sum(mask is not None for mask in masks))
torch.nn.functional.scaled_dot_product_attention = plain
program = torch.export.export(model, (pixel_values,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
calls = [node for node in program.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
given = [node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask") for node in calls]
print("traced, masks:", sum(mask is not None for mask in given), "of", len(calls))


names = {node.name for node in given}
ones = []


class Masks(torch.fx.Interpreter):
    def run_node(self, node):
        result = super().run_node(node)
        if node.name in names:
            ones.append(bool(result.all()))
        return result


with torch.no_grad():
    Masks(program.module()).run(pixel_values)
print("true everywhere:", all(ones) and len(ones) > 0)
PYTHON
diff "$folder/seen" - <<'SEEN'
called, masks: 0
traced, masks: 2 of 2
true everywhere: True
SEEN
