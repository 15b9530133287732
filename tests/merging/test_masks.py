# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Padding masks of every kind, and several images in one sequence."""

import pytest
import torch
import transformers as hf
from helpers.families import COMMON, SIMILAR

from tocom_hf import UnsupportedInputError, apply_tome
from tocom_hf.merging.backbones import find_backbone


TOWERS = {str(family): family for family in SIMILAR}
PATCHES = (3, 8, 8)  # images, rows and columns of the grid


def vit():
    torch.manual_seed(0)
    return hf.ViTModel(hf.ViTConfig(**COMMON)).eval(), {"pixel_values": torch.randn(3, 3, 32, 32)}


def tower(name):
    family = TOWERS[name]
    return family.make(layers=2), family.inputs()


MASKS = {
    "attention_mask": (vit, (3, 65), torch.int64),
    "attention_mask of heads and queries": (vit, (3, 1, 65, 65), torch.bool),
    "patch_attention_mask": (lambda: tower("Idefics3VisionTransformer"), PATCHES, torch.bool),
    "patch_attention_mask of Idefics 2": (lambda: tower("Idefics2VisionTransformer"), PATCHES, torch.bool),
    "pixel_attention_mask": (lambda: tower("Siglip2VisionModel"), (3, 64), torch.int64),
    "pixel_attention_mask of booleans": (lambda: tower("Siglip2VisionModel"), (3, 64), torch.bool),
    "pixel_attention_mask of floats": (lambda: tower("Siglip2VisionModel"), (3, 64), torch.float32),
}


def ones_of(case):
    """A merging model, its inputs, the name of its mask, and a mask of ones."""
    make, shape, dtype = MASKS[case]
    model, inputs = make()
    return apply_tome(model, 6), inputs, case.split(" of ")[0], torch.ones(shape, dtype=dtype)


def last_padded(mask):
    """The mask that hides the last token of the last image."""
    padded = mask.clone()
    padded[-1].view(-1)[-1] = 0
    return padded


@pytest.mark.parametrize("case", MASKS)
def test_a_mask_that_hides_a_token_is_refused_before_any_layer_runs(case):
    model, inputs, name, ones = ones_of(case)
    ran = []
    find_backbone(model).layers[0].register_forward_pre_hook(lambda module, args: ran.append(module))
    with pytest.raises(UnsupportedInputError, match=rf"^{name} hides tokens.*without padding.*remove_tome\(model\)"):
        model(**{**inputs, name: last_padded(ones)})
    assert not ran


@pytest.mark.parametrize("case", MASKS)
def test_a_mask_of_ones_changes_nothing(case):
    model, inputs, name, ones = ones_of(case)
    without = {key: value for key, value in inputs.items() if key != name}
    expected = model(**inputs) if name == "pixel_attention_mask" else model(**without)
    assert torch.equal(model(**{**inputs, name: ones}).last_hidden_state, expected.last_hidden_state)


def test_a_mask_by_position_is_refused():
    model, inputs, _, ones = ones_of("patch_attention_mask")
    with pytest.raises(UnsupportedInputError, match=r"^patch_attention_mask hides tokens"):
        model(inputs["pixel_values"], last_padded(ones))


def test_a_mask_that_a_model_makes_itself_is_refused_at_its_first_layer():
    model, inputs = tower("Siglip2VisionModel")
    layer = apply_tome(model, 6).encoder.layers[0]
    visible = torch.ones(3, 1, 64, 64, dtype=torch.bool)
    layer.register_forward_pre_hook(lambda module, args: (args[0], last_padded(visible)))
    with pytest.raises(UnsupportedInputError, match=r"^attention_mask hides tokens"):
        model(**inputs)


def test_an_additive_mask_hides_what_is_not_zero():
    model, inputs = vit()
    zeros = torch.zeros(3, 1, 65, 65)
    hidden = zeros.clone()
    hidden[-1, :, :, -1] = float("-inf")
    apply_tome(model, 6)
    assert torch.equal(model(**inputs, attention_mask=zeros).pooler_output, model(**inputs).pooler_output)
    with pytest.raises(UnsupportedInputError, match=r"^attention_mask hides tokens"):
        model(**inputs, attention_mask=hidden)


def test_packed_images_are_refused():
    model, inputs = tower("RadioModel")
    apply_tome(model, 6)
    with pytest.raises(UnsupportedInputError, match=r"^cu_seqlens packs several images into one sequence"):
        model(**inputs, cu_seqlens=torch.tensor([0, 64, 128], dtype=torch.int32))


def test_masks_of_masked_image_modelling_are_allowed():
    torch.manual_seed(0)
    model = apply_tome(hf.ViTForMaskedImageModeling(hf.ViTConfig(**COMMON, encoder_stride=4)).eval(), 6)
    masked = torch.arange(64).repeat(3, 1) % 2 == 0
    assert model(torch.randn(3, 3, 32, 32), bool_masked_pos=masked).loss.isfinite()


def test_compiled_models_assert_that_nothing_is_hidden():
    torch.compiler.reset()
    model, inputs, name, ones = ones_of("pixel_attention_mask")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        found, expected = compiled(**inputs).pooler_output, model(**inputs).pooler_output
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(RuntimeError, match="pixel_attention_mask hides tokens"):
            compiled(**{**inputs, name: last_padded(ones)})


def test_exported_programs_assert_that_nothing_is_hidden():
    model, inputs, name, ones = ones_of("pixel_attention_mask")
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, strict=False).module()
        torch.testing.assert_close(exported(**inputs).pooler_output, model(**inputs).pooler_output)
        with pytest.raises(RuntimeError, match="pixel_attention_mask hides tokens"):
            exported(**{**inputs, name: last_padded(ones)})


def test_a_mask_that_is_no_tensor_is_refused_as_such():
    model, inputs = vit()
    with pytest.raises(UnsupportedInputError, match=r"^attention_mask must be a torch\.Tensor, got ndarray"):
        apply_tome(model, 4)(**inputs, attention_mask=torch.ones(3, 65).numpy())
