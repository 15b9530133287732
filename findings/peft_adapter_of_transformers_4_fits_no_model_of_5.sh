#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# peft 0.21.2, transformers 4.57.6 and 5.23.0: transformers 5 renamed the modules of ViT (query became q_proj,
# encoder.layer became layers). It converts checkpoints of version 4 as it loads them, so one expects the same of an
# adapter. But an adapter of "query" and "value" that was saved with transformers 4 raises NoMatchingPeftModuleError, in
# `PeftModel.from_pretrained` and in `load_adapter`. With the targets renamed in adapter_config.json the error goes, and
# `PeftModel.from_pretrained` then loads NO weight, with a warning only; `load_adapter` loads them all. So LoRA adapters
# of ViT from before transformers 5 fail, and the obvious mending makes them do nothing.
# What to do: rename the targets and call `load_adapter`, or merge the adapter with transformers 4 and save the model.
#
# Seen: the checkpoint of 4 loads with no key missing; its adapter is refused twice, does nothing once, and works once.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv4"
python3 -m venv "$folder/venv5"
"$folder/venv4/bin/pip" install --quiet torch==2.13.0 transformers==4.57.6 peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
"$folder/venv5/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
cd "$folder"
"$folder/venv4/bin/python" - 2>/dev/null <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTModel

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
model = ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8))
model.save_pretrained("model")
adapted = get_peft_model(model, LoraConfig(target_modules=["query", "value"]))
for name, parameter in adapted.named_parameters():
    if "lora_B" in name:  # These are zero before the training that random numbers stand for here.
        torch.nn.init.normal_(parameter)
adapted.save_pretrained("adapter")
PYTHON
"$folder/venv5/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import ViTModel

IMAGES = torch.ones(1, 3, 16, 16)


def by_peft(model):
    PeftModel.from_pretrained(model, "adapter")


def by_load_adapter(model):
    model.load_adapter("adapter")


@torch.no_grad()
def show(name, put_adapter):
    model = ViTModel.from_pretrained("model").eval()
    before = model(IMAGES)[0]
    try:
        put_adapter(model)
    except ValueError as error:
        print(f"{name}: {type(error).__name__}")
    else:
        print(f"{name}: output changed {not torch.equal(before, model.eval()(IMAGES)[0])}")


_, report = ViTModel.from_pretrained("model", output_loading_info=True)
print("checkpoint: missing", len(report["missing_keys"]), "unexpected", len(report["unexpected_keys"]))
show("as saved, PeftModel.from_pretrained", by_peft)
show("as saved, load_adapter", by_load_adapter)

config = json.loads(Path("adapter/adapter_config.json").read_text())
config["target_modules"] = ["q_proj", "v_proj"]
Path("adapter/adapter_config.json").write_text(json.dumps(config))
show("targets renamed, PeftModel.from_pretrained", by_peft)
show("targets renamed, load_adapter", by_load_adapter)
PYTHON
diff "$folder/seen" - <<'SEEN'
checkpoint: missing 0 unexpected 0
as saved, PeftModel.from_pretrained: NoMatchingPeftModuleError
as saved, load_adapter: NoMatchingPeftModuleError
targets renamed, PeftModel.from_pretrained: output changed False
targets renamed, load_adapter: output changed True
SEEN
