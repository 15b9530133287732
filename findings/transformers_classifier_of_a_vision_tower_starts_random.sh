#!/usr/bin/env bash
# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
# transformers 5.23.0: the usual way to a classifier is `...ForImageClassification.from_pretrained(backbone)`, where
# only the head is new. For ViT and DINOv2 that is so. For a saved CLIPVisionModel, SiglipVisionModel or
# Siglip2VisionModel it is not: the whole tower is random, and it has the default size, 12 layers of 768, whatever the
# size of the one that was saved. Nothing is raised. There is a warning that the type of the config differs, and the
# load report lists every weight as missing, where one expects to find the head. The same folder loads right as a
# CLIPVisionModel. Fine-tuning a vision tower thus begins from nothing.
# What to do: build the classifier from the tower's own config and copy the weights, as the last line shows, or start
# from the folder of the whole CLIP or SigLIP model; and look at `missing_keys` of `output_loading_info=True`.
#
# Seen: ViT misses 2 tensors (the head), CLIP 201 of 201, SigLIP 210 of 210; 2 layers of 16 became 12 of 768.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON' | tee "$folder/seen"
import transformers

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BACKBONES = {
    "ViTForImageClassification": "ViTModel",
    "Dinov2ForImageClassification": "Dinov2Model",
    "CLIPForImageClassification": "CLIPVisionModel",
    "SiglipForImageClassification": "SiglipVisionModel",
    "Siglip2ForImageClassification": "Siglip2VisionModel",
}

for classifier, backbone in BACKBONES.items():
    kind = getattr(transformers, backbone)
    kind(kind.config_class(**SIZES, image_size=16, patch_size=8)).save_pretrained(backbone)
    _, alone = kind.from_pretrained(backbone, output_loading_info=True)
    print(f"{backbone}: {len(alone['missing_keys'])} tensors missing")
    model, report = getattr(transformers, classifier).from_pretrained(backbone, output_loading_info=True)
    size = getattr(model.config, "vision_config", model.config)
    print(
        f"{classifier} of the same folder: {len(report['missing_keys'])} of {len(model.state_dict())} missing,",
        f"{size.num_hidden_layers} layers of {size.hidden_size}",
    )

whole = transformers.CLIPModel(transformers.CLIPConfig(vision_config={**SIZES, "image_size": 16, "patch_size": 8}))
whole.save_pretrained("whole")
_, report = transformers.CLIPForImageClassification.from_pretrained("whole", output_loading_info=True)
print("CLIPForImageClassification of a whole CLIP:", len(report["missing_keys"]), "missing")

tower = transformers.CLIPVisionModel.from_pretrained("CLIPVisionModel")
config = transformers.CLIPConfig(vision_config=tower.config.to_dict())
model = transformers.CLIPForImageClassification(config)
print("by hand:", model.vision_model.load_state_dict(tower.state_dict()))
PYTHON
diff "$folder/seen" - <<'SEEN'
ViTModel: 0 tensors missing
ViTForImageClassification of the same folder: 2 of 40 missing, 2 layers of 16
Dinov2Model: 0 tensors missing
Dinov2ForImageClassification of the same folder: 2 of 45 missing, 2 layers of 16
CLIPVisionModel: 0 tensors missing
CLIPForImageClassification of the same folder: 201 of 201 missing, 12 layers of 768
SiglipVisionModel: 0 tensors missing
SiglipForImageClassification of the same folder: 210 of 210 missing, 12 layers of 768
Siglip2VisionModel: 0 tensors missing
Siglip2ForImageClassification of the same folder: 210 of 210 missing, 12 layers of 768
CLIPForImageClassification of a whole CLIP: 2 missing
by hand: <All keys matched successfully>
SEEN
