# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A model's fingerprint tells models that predict otherwise apart, and outputs become scores as the head means them."""

import numpy as np
import pytest
import torch
import transformers as hf
from helpers.families import FAMILIES
from helpers.models import make_model, make_plugins

from tocom_hf import TocomModel, UnsupportedModelError, apply_tome
from tocom_hf.prediction.backends import ModelBackend


PROCESSOR = hf.ViTImageProcessorPil(size={"height": 32, "width": 32})


def backend_of(model, processor=PROCESSOR):
    return ModelBackend(model, np.asarray, processor, "cpu")


def composed(target_r=4, scale=0.1, seed=1, **settings):
    model = make_model(num_hidden_layers=1, patch_size=8, **settings)
    plugins = make_plugins(model, seed=seed)
    return TocomModel.from_pretrained(model, plugins=plugins, source_r=2, target_r=target_r, scale=scale)


def test_a_fingerprint_is_that_of_what_decides_the_outputs():
    others = {
        "weights": backend_of(composed()),
        "other weights": backend_of(composed(initializer_range=0.4)),
        "plugins": backend_of(composed(seed=2)),
        "scale": backend_of(composed(scale=0.2)),
        "names of classes": backend_of(composed(id2label=dict(enumerate("abcde")))),
        "meaning of outputs": backend_of(composed(problem_type="multi_label_classification")),
        "processor": backend_of(
            composed(), hf.ViTImageProcessorPil(size={"height": 32, "width": 32}, do_rescale=False)
        ),
    }
    assert len({backend.fingerprint for backend in others.values()}) == len(others)
    assert backend_of(composed()).fingerprint == others["weights"].fingerprint


def test_taking_it_leaves_the_model_at_its_degree():
    model = composed()
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixel_values=pixel_values).logits
    found = backend_of(model).run(pixel_values.numpy())
    assert model.target_r == 4
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if str(family) in ("ViTModel", "SiglipVisionModel")])
def test_features_are_what_heads_of_the_family_read(family):
    """The pooling of ViT is random in most checkpoints, that of SigLIP is trained."""
    model = apply_tome(family.make(layers=2), 2)
    inputs = family.inputs()
    with torch.no_grad():
        outputs = model(**inputs)
    expected = outputs.last_hidden_state[:, 0] if str(family) == "ViTModel" else outputs.pooler_output
    found = backend_of(model).run(inputs["pixel_values"].numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_maps_are_neither_classes_nor_features():
    config = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8, encoder_stride=8
    )
    with pytest.raises(UnsupportedModelError, match=r"gives .*: neither the classes of an image nor its features"):
        backend_of(hf.ViTForMaskedImageModeling(config).eval())
