# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Models of clips: conventional degrees of long sequences, what reads their tokens, and what drops them."""

import pytest
import torch
import transformers as hf
from helpers import reference
from helpers.families import FAMILIES, SIMILAR, videomae, vivit, vjepa2
from helpers.models import make_plugins, schedule_of
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tocom_hf import (
    ArgumentError,
    DistillationArguments,
    TocomModel,
    UnsupportedInputError,
    UnsupportedModelError,
    apply_tome,
    calibrate,
    count_flops,
    distill,
    remove_tome,
)


CLIPS = [family for family in [*FAMILIES, *SIMILAR] if family.clips]


def make_clips(batch=2, frames=8, side=16):
    return torch.randn(batch, frames, 3, side, side, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", CLIPS, ids=str)
def test_layers_equal_the_slow_reference_at_conventional_degrees_of_clips(family):
    """512 patches, of which the layers merge 240, 120 (of the 130 asked for, at most half can) and 40."""
    config, clips = family.config(), make_clips(batch=1, frames=16, side=32).double()
    for name in ("num_frames", "frames_per_clip", "image_size", "crop_size"):
        if hasattr(config, name):
            setattr(config, name, {"num_frames": 16, "frames_per_clip": 16}.get(name, 32))
    config.num_hidden_layers = 3
    torch.manual_seed(0)
    model = family.model_class(config).double().eval()
    layers = model.get_submodule(family.layers)
    entering = []
    handle = layers[0].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    with torch.no_grad():
        apply_tome(model, [240, 130, 40])
        found = model(**{family.clips: clips}, output_hidden_states=True).hidden_states[-1]
        handle.remove()
        remove_tome(model)
        turn = family.turn and (lambda heads, groups: family.turn(heads, groups, grid=8))
        expected, groups = reference.hidden_states(
            layers, entering[0], [240, 130, 40], family.protected, family.names, turn=turn
        )
    if found.shape != expected.shape:
        expected = reference.restore(expected, groups)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CLIPS, ids=str)
def test_a_plugin_set_fits_and_survives_saving(family, tmp_path):
    model, inputs = family.make(), family.inputs()
    plugins = make_plugins(model)
    tocom = TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=4)
    expected = family.result(tocom, inputs)
    assert schedule_of(tocom) == (4, 4, 4, 4)
    tocom.save_pretrained(tmp_path / "saved")
    again = TocomModel.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(family.result(again, inputs), expected)


def test_the_mean_over_merged_clips_weighs_by_size():
    model, clips = hf.VideoMAEForVideoClassification(videomae()).eval(), make_clips()
    head = lambda tokens: model.classifier(model.fc_norm(tokens.mean(1)))  # noqa: E731
    apply_tome(model, 20)
    with torch.no_grad():
        output = model(clips, output_hidden_states=True)
        assert output.hidden_states[-1].shape[1] == 64
        torch.testing.assert_close(output.logits, head(output.hidden_states[-1]))


def test_the_predictor_of_vjepa_reads_restored_tokens_under_masks_too():
    torch.manual_seed(0)
    model, clips = hf.VJEPA2Model(vjepa2()).eval(), make_clips()
    stock = hf.VJEPA2Model(vjepa2()).eval()
    stock.load_state_dict(model.state_dict())
    context = [torch.arange(40).repeat(2, 1)]
    target = [torch.arange(40, 64).repeat(2, 1)]
    apply_tome(model, 15)
    with torch.no_grad():
        found = model(clips, context_mask=context, target_mask=target)
        assert found.last_hidden_state.shape == (2, 64, 32)
        expected = stock.predictor(found.last_hidden_state, context, target).last_hidden_state
    torch.testing.assert_close(found.predictor_output.last_hidden_state, expected)
    torch.testing.assert_close(found.masked_hidden_state, found.last_hidden_state[:, :40])


def test_vjepa_is_always_restored():
    model = hf.VJEPA2ForVideoClassification(vjepa2())
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ArgumentError, match="takes tokens by their numbers behind its last layer"):
        apply_tome(model, 4, restore=False)
    assert [type(module) for module in model.modules()] == classes


def test_pretraining_of_videomae_is_refused_with_the_reason():
    with pytest.raises(UnsupportedModelError, match="decoder needs every token that bool_masked_pos leaves over"):
        apply_tome(hf.VideoMAEForPreTraining(videomae()), 4)


@pytest.mark.parametrize("positional", [True, False])
def test_dropped_tokens_of_videomae_are_refused(positional):
    model, clips = apply_tome(hf.VideoMAEModel(videomae()).eval(), 4), make_clips()
    mask = torch.arange(64).expand(2, -1) % 2 == 0
    with pytest.raises(UnsupportedInputError, match="does not take bool_masked_pos"):
        model(clips, mask) if positional else model(clips, bool_masked_pos=mask)


def test_attention_masks_of_vivit_are_refused():
    model = apply_tome(hf.VivitModel(vivit()).eval(), 4)
    with pytest.raises(UnsupportedInputError, match="attention_mask hides tokens"):
        model(make_clips(), attention_mask=torch.zeros(2, 65))


@pytest.mark.parametrize("family", CLIPS, ids=str)
def test_cost_is_that_of_clips_of_the_configuration(family):
    model = family.make()
    calibration = calibrate(model, degrees=[0, 9], seconds=0, progress=False)
    assert calibration[9].tokens == tuple(64 + family.protected - 9 * layer for layer in range(5))
    assert count_flops(model, 9) == calibration[9].gflops * 1e9 < count_flops(model, 0)
    with pytest.raises(ArgumentError, match="takes clips, not images, and only at the size"):
        count_flops(model, 0, image_size=32)


@pytest.mark.parametrize("family", CLIPS, ids=str)
def test_plugins_are_distilled_from_clips(family):
    inputs = family.inputs(batch=2)
    clips = [{"pixel_values": clip} for clip in next(iter(inputs.values()))]
    plugins = distill(
        family.make(layers=2),
        clips,
        DistillationArguments(max_r=3, num_train_epochs=1, per_device_train_batch_size=2, learning_rate=0.1),
    )
    plain = TocomModel.from_pretrained(family.make(layers=2), plugins=plugins, source_r=0, target_r=3, scale=0.0)
    before = family.result(plain, inputs)
    tocom = TocomModel.from_pretrained(family.make(layers=2), plugins=plugins, source_r=0, target_r=3)
    assert not torch.equal(family.result(tocom, inputs), before)


def test_a_layer_that_somebody_wraps_to_be_recomputed_is_refused():
    """The model hands its layers no keyword arguments, so what wraps one cannot keep the state of the call."""
    model = apply_tome(hf.VideoMAEForVideoClassification(videomae()), 9).train()
    layers = model.videomae.encoder.layer
    layers[1] = checkpoint_wrapper(layers[1])
    with pytest.raises(UnsupportedModelError, match="gradient_checkpointing_enable"):
        model(make_clips()).logits.sum().backward()
