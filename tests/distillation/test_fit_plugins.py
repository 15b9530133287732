# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Plugin sets in closed form: held against normal equations in float64, and against the teacher that they imitate."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers.families import COMMON, FAMILIES, SIMILAR, NaflexFamily

from tocom_hf import (
    ArgumentError,
    DatasetError,
    DegreeError,
    DistillationArguments,
    MergeRecipe,
    PluginSet,
    TocomModel,
    UnsupportedModelError,
    apply_tome,
    distill,
    fit_plugins,
    remove_tome,
    trace_tokens,
)
from tocom_hf.distillation import fit_plugins as module
from tocom_hf.distillation.objectives import Features
from tocom_hf.distillation.residual import Tokens
from tocom_hf.merging.backbones import find_backbone


# one of each kind: class tokens, none, layer scale, nested blocks; all others are slow tests
OTHERS = {"VitPoseForPoseEstimation", "MLCDVisionModel"}  # inputs of another name; refused below
DIFFERENT = {"ViTModel", "Dinov2ForImageClassification", "SiglipVisionModel", "VideoMAEForVideoClassification"}


def make_backbone():
    torch.manual_seed(0)
    return hf.Dinov2Model(hf.Dinov2Config(**{**COMMON, "layerscale_value": 0.5})).eval()


def images_for(count=40, seed=0, size=32):
    generator = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(3, size, size, generator=generator)} for _ in range(count)]


def features(model, images):
    with torch.no_grad():
        return Features().outputs(find_backbone(model), torch.stack([image["pixel_values"] for image in images]))


def agreement(model, images, wanted):
    return F.cosine_similarity(features(model, images), wanted, dim=-1).mean().item()


def test_an_update_solves_the_normal_equations():
    """The first one that is not zero, of full rank: that of the first layer's MLP, of which nothing else was mended."""
    model, images, degree = make_backbone(), images_for(60), 4
    pixel_values = torch.stack([image["pixel_values"] for image in images])
    layer, seen = model.encoder.layer[0], {}
    handles = [
        layer.norm2.register_forward_hook(lambda module, args, output: seen.update(residual=args[0])),
        layer.layer_scale2.register_forward_hook(lambda module, args, output: seen.update(branch=output)),
        layer.mlp.fc2.register_forward_hook(lambda module, args, output: seen.update(inputs=args[0])),
    ]

    def output():
        return (seen["residual"] + seen["branch"]).double().numpy()  # (images, tokens, hidden)

    with torch.no_grad():
        model(pixel_values)
        teacher = output()
        with trace_tokens(apply_tome(model, degree)) as trace:
            model(pixel_values)
    positions = trace.positions[0].numpy()
    student, inputs = output(), seen["inputs"].double().numpy()
    for handle in handles:
        handle.remove()
    remove_tome(model)

    size, hidden = inputs.shape[-1], teacher.shape[-1]
    gram, moment = np.zeros((2, size, size)), np.zeros((2, size, hidden))
    for image in range(len(images)):
        half, patches = image % 2, positions.shape[1] - 1
        for group in range(student.shape[1]):
            members = np.flatnonzero(positions[image] == group)
            weight = 0.5 if group == 0 else 0.5 * len(members) / patches
            row, wanted = inputs[image, group], teacher[image, members].mean(axis=0) - student[image, group]
            gram[half] += weight * np.outer(row, row)
            moment[half] += weight * np.outer(row, wanted)

    def solution(gram, moment, ridge):
        return np.linalg.solve(gram + ridge * np.diag(gram).mean() * np.eye(size), moment)

    def error(ridge):  # on the other half, less that of no update
        total = 0.0
        for half in (0, 1):
            update = solution(gram[half], moment[half], ridge)
            total += np.trace(update.T @ gram[1 - half] @ update) - 2 * np.trace(update.T @ moment[1 - half])
        return total

    ridge = min((0.003, 0.03, 0.3, 3.0), key=error)
    assert error(ridge) < 0
    expected = solution(gram.sum(axis=0), moment.sum(axis=0), ridge).T
    expected /= layer.layer_scale2.lambda1.detach().double().numpy()[:, None]

    plugins = fit_plugins(model, images, max_r=degree, degrees=[degree], rank=hidden)
    composite = plugins.compose(0, degree)
    path = "encoder.layer.0.mlp.fc2"
    found = composite.apply(path, layer.mlp.fc2.weight.double()) - layer.mlp.fc2.weight.double()
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("source_r", [0, 3])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if str(family) in DIFFERENT else pytest.mark.slow, id=str(family))
        for family in [*FAMILIES, *SIMILAR]
        if not family.audio and not isinstance(family, NaflexFamily) and str(family) not in OTHERS
    ],
)
def test_features_come_nearer_to_those_of_the_source_degree(family, source_r):
    model = family.make(layers=3)
    pixel_values = family.inputs(batch=120)[family.clips or "pixel_values"]
    images = [{"pixel_values": values} for values in pixel_values]
    lines = []
    plugins = fit_plugins(
        model, images, max_r=5, degrees=[0, 3, 5], source_r=source_r, rank=1, eval_images=images, report=lines.append
    )
    grid = plugins.config.training["agreement"]
    assert grid["sources"] == [source_r]
    assert len(lines) == len(grid["degrees"])
    [plain], [tocom] = grid["plain"], grid["tocom"]
    # what is fitted is the residual stream, which heads of random weights do not read alike
    at_least = sum(plain) if str(family) in DIFFERENT else sum(plain) - 1e-3
    assert sum(tocom) > at_least, (plain, tocom)
    # and a neighbouring degree has next to nothing to win
    assert all(after > before - 1e-3 for before, after in zip(plain, tocom, strict=True)), (plain, tocom)


@pytest.mark.parametrize("proportional", [True, False])
def test_the_set_does_on_a_model_what_was_measured(proportional):
    model, images, unseen = make_backbone(), images_for(), images_for(16, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plugins = fit_plugins(
        model, images, max_r=4, degrees=[2, 4], proportional_attention=proportional, eval_images=unseen
    )
    assert plugins.config.proportional_attention == proportional
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not find_backbone(model).is_patched
    wanted = features(apply_tome(model, 0), unseen)
    remove_tome(model)
    composed = TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=2)
    grid = plugins.config.training["agreement"]
    for degree, plain, tocom in zip(grid["degrees"], grid["plain"][0], grid["tocom"][0], strict=True):
        composed.set_target_r(degree)
        assert agreement(composed, unseen, wanted) == pytest.approx(tocom, abs=2e-5)
        merged = apply_tome(make_backbone(), degree, proportional_attention=proportional)
        assert agreement(merged, unseen, wanted) == pytest.approx(plain, abs=2e-5)


def test_the_same_images_give_the_same_set_whatever_the_scale():
    model, images = make_backbone(), images_for(20)
    one, other = (fit_plugins(model, images, max_r=3, scale=scale) for scale in (0.1, 0.5))
    assert one.config.trained_scale == one.config.recommended_scale == 0.1
    weight = torch.zeros(32, 32, dtype=torch.float64)
    path = "encoder.layer.1.attention.o_proj"
    torch.testing.assert_close(one.compose(0, 3).apply(path, weight), other.compose(0, 3).apply(path, weight))


def test_a_set_can_be_distilled_further(tmp_path):
    model, images = make_backbone(), images_for(16)
    fit_plugins(model, images, max_r=2, base_model="user/model").save_pretrained(tmp_path)
    plugins = PluginSet.from_pretrained(tmp_path)
    assert plugins.config.source_r == 0
    args = DistillationArguments(
        max_r=2,
        source_r=0,
        target_modules=["o_proj", "fc2"],
        max_steps=1,
        per_device_train_batch_size=16,
        learning_rate=1e-6,
        lora_dropout=0,
    )
    further = distill(model, images, args, init_plugins=plugins)
    for path, factors in further.adapter(1).items():
        torch.testing.assert_close(factors.lora_A, plugins.adapter(1)[path].lora_A, rtol=1e-3, atol=1e-5)


def test_a_recipe_is_obeyed_and_recorded():
    recipe, images = MergeRecipe(match_by="input", schedules={6: [12, 0, 8, 6]}), images_for(60)
    ours = fit_plugins(make_backbone(), images, max_r=6, degrees=[6], recipe=recipe)
    tomes = fit_plugins(make_backbone(), images, max_r=6, degrees=[6])
    assert ours.config.recipe == recipe
    weight, path = torch.zeros(32, 128, dtype=torch.float64), "encoder.layer.0.mlp.fc2"
    one, other = (plugins.compose(0, 6).apply(path, weight) for plugins in (ours, tomes))
    assert (one - other).norm() > 0.1 * other.norm() > 0


def test_channels_that_do_not_reach_the_residual_stream_are_left_alone():
    model = make_backbone()
    with torch.no_grad():
        model.encoder.layer[0].layer_scale2.lambda1[5] = 0
    plugins = fit_plugins(model, images_for(60), max_r=4, degrees=[4])
    change = plugins.compose(0, 4).apply("encoder.layer.0.mlp.fc2", torch.zeros(32, 128))
    assert change.isfinite().all()
    assert not change[5].any()
    assert change[6].any()


def test_groups_that_overlap_without_nesting_do_not_count():
    finer = Tokens(torch.zeros(1, 4, 2), torch.tensor([[0, 1, 1, 2, 3]]))
    coarser = Tokens(torch.zeros(1, 3, 2), torch.tensor([[0, 0, 1, 2, 2]]))
    # token 1 of the finer ones is torn apart by 0 and 1 of the coarser ones, of which 2 is whole
    assert finer.are_whole_in(coarser).tolist() == [[0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_r": 0}, DegreeError, "max_r and rank must be at least 1"),
        ({"source_r": 4}, DegreeError, "source_r=4 is above max_r=3"),
        ({"degrees": [5]}, DegreeError, "degrees has 5, which is above max_r=3"),
        ({"scale": 0.0}, ArgumentError, "scale=0"),
        ({"images": []}, DatasetError, "no images"),
        ({"model": make_backbone().half()}, ArgumentError, "load the model with dtype=torch.float32"),
        ({"model": apply_tome(make_backbone(), 2)}, UnsupportedModelError, r"call remove_tome\(model\)"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change, error, message):
    arguments = {"model": make_backbone(), "images": images_for(4), "max_r": 3, **change}
    with pytest.raises(error, match=message):
        fit_plugins(arguments.pop("model"), arguments.pop("images"), **arguments)


def test_layers_that_do_more_than_scale_are_refused():
    model = make_backbone()
    model.encoder.layer[1].mlp.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(UnsupportedModelError, match=r"do more than scale.*Use tocom distill"):
        fit_plugins(model, images_for(4), max_r=2)
    assert not find_backbone(model).is_patched


def test_layers_of_another_order_of_dimensions_are_refused():
    model = next(family for family in SIMILAR if str(family) == "MLCDVisionModel").make()
    with pytest.raises(UnsupportedModelError, match="another order of dimensions"):
        fit_plugins(model, images_for(4), max_r=2)


def test_what_does_not_carry_over_to_other_images_is_left_alone():
    """A map fitted to noise errs more on other images than no map; one that there is, is found."""
    generator = torch.Generator().manual_seed(0)
    inputs, noise = torch.randn(8, 4, 32, generator=generator), torch.randn(8, 4, 16, generator=generator)
    weights = torch.full((8, 4, 1), 0.25)
    down, up = module._reduced_rank(inputs, noise, weights, rank=16)
    assert not (up @ down).any()
    real = torch.randn(16, 32, generator=generator)
    many = torch.randn(80, 4, 32, generator=generator)
    down, up = module._reduced_rank(many, many @ real.T, torch.full((80, 4, 1), 0.25), rank=16)
    torch.testing.assert_close(up @ down, real, rtol=0.05, atol=0.05)
