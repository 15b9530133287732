# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""`export` writes at every degree what the model is there, all or nothing, and leaves the model as it was."""

import hashlib
import json

import numpy as np
import pytest
import torch
import transformers as hf
from helpers.exports import copy_of, logits_at, make_images, make_tocom_model
from helpers.families import FAMILIES
from helpers.models import describe, make_model, make_plugins

from tocom_hf import (
    ArgumentError,
    DegreeError,
    ExportedTocom,
    MergeRecipe,
    TocomModel,
    UnsupportedModelError,
    apply_tome,
    export,
)
from tocom_hf.exporting import verification


QUICK = {"Dinov2WithRegistersForImageClassification", "SiglipForImageClassification"}


@pytest.fixture(scope="module")
def model():
    return make_tocom_model()


@pytest.fixture(scope="module")
def torch_folder(model, tmp_path_factory):
    return export(model, tmp_path_factory.mktemp("torch") / "out", format="torch", degrees=[6, 2, 2])


@pytest.fixture(scope="module")
def onnx_folder(model, tmp_path_factory):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    return export(model, tmp_path_factory.mktemp("onnx") / "out", degrees=[2, 6])


def require_same(folder, model, tolerance=1e-4, counts=(1, 3)):
    exported = ExportedTocom(folder)
    for degree in exported.degrees:
        exported.set_target_r(degree)
        for count in counts:
            images = make_images(count)
            found, expected = exported(images), logits_at(model, degree, images)
            assert np.abs(found - expected).max() <= tolerance * max(1, np.abs(expected).max()), degree


def test_programs_of_torch_give_what_the_model_gives(torch_folder, model):
    require_same(torch_folder, model, 1e-6)


def test_onnx_graphs_give_what_the_model_gives(onnx_folder, model):
    require_same(onnx_folder, model)


def test_a_degree_differs_from_another_in_weights_and_merging(torch_folder, model):
    """Or equality would show nothing."""
    exported, images = ExportedTocom(torch_folder, 6), make_images()
    found = exported(images)
    with torch.no_grad(), model.plain_at(6):
        plain = model(pixel_values=torch.from_numpy(images)).logits.numpy()
    exported.set_target_r(2)
    assert np.abs(found - exported(images)).max() > 0.1
    assert np.abs(found - plain).max() > 0.1


def test_degrees_on_both_sides_of_the_source(tmp_path):
    model = make_tocom_model(source_r=2, target_r=3, layers=1)
    require_same(export(model, tmp_path / "out", format="torch", degrees=[0, 4]), model, 1e-6)
    assert model.target_r == 3


def test_composed_weights_are_rounded_once_from_float64(onnx_folder, model):
    """They are those of the model, up to the last bit of a sum that numpy adds in another order."""
    from tocom_hf.deployed.manifest import ExportedFolder
    from tocom_hf.deployed.weights import Composer, MappedWeights

    folder = ExportedFolder(onnx_folder)
    found = Composer(folder, MappedWeights(folder.path("weights.safetensors"))).at(6)
    with model.at(6):
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert len(found) == 2 * 2
    for name, array in found.items():
        expected = weights[name.removesuffix(".T")].numpy()
        np.testing.assert_array_max_ulp(array, expected.T if name.endswith(".T") else expected, 1)


def test_a_graph_of_another_degree_does_not_run_with_the_weights_of_the_source(onnx_folder):
    onnxruntime = pytest.importorskip("onnxruntime")
    onnxruntime.InferenceSession(onnx_folder / "degree_2.onnx")  # the source degree needs nothing else
    with pytest.raises(Exception, match="out of bounds"):
        onnxruntime.InferenceSession(onnx_folder / "degree_6.onnx")


def test_no_weight_is_written_twice(onnx_folder, model):
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    written = (onnx_folder / "weights.safetensors").stat().st_size
    assert written < size + 20_000  # names and offsets


def test_the_graphs_tell_nothing_of_the_machine(onnx_folder):
    for path in onnx_folder.iterdir():
        assert b"site-packages" not in path.read_bytes(), path
        assert b".py" not in path.read_bytes(), path


def test_the_model_is_left_as_it_was(tmp_path):
    model = apply_tome(make_model(num_hidden_layers=1), 3).train()
    model.vit.layers[0].eval()
    model.set_attn_implementation("eager")
    before, modes = describe(model), [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, tmp_path / "out", format="torch", degrees=[0])
    assert describe(model) == before
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_the_manifest(torch_folder, model):
    manifest = json.loads((torch_folder / "manifest.json").read_text(encoding="utf-8"))
    assert [*manifest["degrees"]] == ["2", "6"]
    assert manifest["degrees"]["6"]["tokens"] == [65, 59, 53]
    assert manifest["degrees"]["6"]["gflops"] < manifest["degrees"]["2"]["gflops"]
    assert manifest["input"] == {"name": "pixel_values", "shape": [None, 3, 32, 32]}
    assert (manifest["output"], manifest["dtype"], manifest["model_type"]) == ("logits", "float32", "vit")
    assert (manifest["plugins"]["source_r"], manifest["plugins"]["scale"]) == (2, model.scale)
    assert manifest["versions"].keys() >= {"torch", "transformers", "tocom_hf"}
    files = {path.name for path in torch_folder.iterdir()} - {"manifest.json"}
    assert files == {*manifest["files"]}
    for name, checksum in manifest["files"].items():
        assert hashlib.sha256((torch_folder / name).read_bytes()).hexdigest() == checksum
    labels = json.loads((torch_folder / "labels.json").read_text(encoding="utf-8"))
    assert labels == {str(label): f"LABEL_{label}" for label in range(5)}


def test_an_earlier_export_is_replaced_as_a_whole(torch_folder, tmp_path):
    folder = copy_of(torch_folder, tmp_path)
    export(make_model(num_hidden_layers=1), folder, format="torch", degrees=[1])
    names = {path.name for path in folder.iterdir()}
    assert names == {"degree_1.pt2", "labels.json", "manifest.json", "weights.safetensors"}


def test_a_graph_that_differs_from_torch_is_refused_and_nothing_is_left(model, tmp_path, monkeypatch):
    monkeypatch.setitem(verification.TOLERANCES, "float32", -1.0)
    with pytest.raises(UnsupportedModelError, match=r"degree 0 differs from PyTorch by .* more than -1"):
        export(make_model(num_hidden_layers=1), tmp_path / "out", format="torch", degrees=[0])
    assert [*tmp_path.iterdir()] == []


def test_a_failed_export_leaves_the_earlier_one(torch_folder, tmp_path, monkeypatch):
    folder = copy_of(torch_folder, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setitem(verification.TOLERANCES, "float32", -1.0)
    with pytest.raises(UnsupportedModelError):
        export(make_model(num_hidden_layers=1), folder, format="torch", degrees=[0])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_of_something_else_is_refused_before_work_begins(model, tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArgumentError, match=r"holds config\.json and no export"):
        export(model, tmp_path, format="torch")


WRONG = [
    ({"format": "tflite"}, ArgumentError, "format must be one of onnx, openvino, torch, got 'tflite'"),
    ({"dtype": "int8"}, ArgumentError, "dtype must be one of float32, float16, got 'int8'"),
    ({"degrees": []}, DegreeError, "at least one degree"),
    ({"degrees": 4}, DegreeError, "degrees must be a list of integers, got 4"),
    ({"degrees": [0, -1]}, DegreeError, "every degree"),
    ({"degrees": [0, 7]}, DegreeError, "target_r=7 is outside the plugin set"),
    ({"processor": "vit"}, ArgumentError, "processor must be an image processor of transformers, got str"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_wrong_arguments_are_refused_before_work_begins(model, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        export(model, tmp_path / "out", **{"format": "torch", "degrees": [0], **arguments})
    assert [*tmp_path.iterdir()] == []


def test_a_model_without_plugins_has_one_degree(tmp_path):
    model = TocomModel.from_pretrained(make_model(), source_r=3)
    with pytest.raises(DegreeError, match=r"has no plugins.*at source_r=3 only, not at 0"):
        export(model, tmp_path / "out", format="torch", degrees=[0, 3])


def test_a_masked_autoencoder_that_masks_is_refused(tmp_path):
    family = next(family for family in FAMILIES if family.model_class is hf.ViTMAEModel)
    model = family.make(layers=2)
    model.config.mask_ratio = 0.75
    with pytest.raises(
        UnsupportedModelError, match=r"without random masking\. Load ViTMAEModel with config\.mask_ratio = 0"
    ):
        export(model, tmp_path / "out", format="torch", degrees=[0])


def test_a_model_without_weights_in_memory_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="not in memory"):
        export(make_model(num_hidden_layers=1).to("meta"), tmp_path / "out", format="torch", degrees=[0])


def test_of_a_model_that_reads_text_the_vision_backbone_is_exported(tmp_path):
    from helpers.families import clip

    torch.manual_seed(0)
    config = clip()
    config.vision_config.num_hidden_layers = 1
    model = hf.CLIPModel(config).eval()
    folder = export(model, tmp_path / "out", format="torch", degrees=[3])
    images = make_images()
    with torch.no_grad():
        expected = apply_tome(model, 3).vision_model(pixel_values=torch.from_numpy(images)).pooler_output
    exported = ExportedTocom(folder)
    np.testing.assert_allclose(exported(images), expected, rtol=1e-5, atol=1e-5)
    assert exported.manifest["output"] == "pooler_output"
    with pytest.raises(ArgumentError, match="gives pooler_output, not classes"):
        exported.predict("image.png")


def test_one_image_at_a_time(tmp_path):
    model = make_tocom_model(layers=1)
    folder = export(model, tmp_path / "out", format="torch", degrees=[4], dynamic_batch=False)
    require_same(folder, model, 1e-6, counts=(1,))
    assert ExportedTocom(folder).manifest["input"]["shape"] == [1, 3, 32, 32]


def test_half_precision_is_a_copy_of_the_model(tmp_path):
    model = make_tocom_model(layers=1)
    folder = export(model, tmp_path / "out", format="torch", degrees=[4], dtype="float16")
    require_same(folder, model, 0.05)
    assert model.dtype == torch.float32
    full = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    assert (folder / "weights.safetensors").stat().st_size < 0.5 * full + 12_000


def test_standalone_programs_of_torch(tmp_path):
    model = make_tocom_model(layers=1)
    folder = export(model, tmp_path / "out", format="torch", degrees=[4], standalone=True)
    require_same(folder, model, 1e-6)
    program = torch.export.load(folder / "degree_4.pt2").module()
    found = program(torch.from_numpy(make_images())).detach().numpy()
    np.testing.assert_allclose(found, logits_at(model, 4, make_images()), rtol=1e-5, atol=1e-5)


def test_standalone_onnx_graphs_run_by_themselves(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    model = make_tocom_model(layers=1)
    folder = export(model, tmp_path / "out", degrees=[4], standalone=True)
    session = onnxruntime.InferenceSession(folder / "degree_4.onnx")
    found = session.run(["logits"], {"pixel_values": make_images()})[0]
    np.testing.assert_allclose(found, logits_at(model, 4, make_images()), rtol=1e-4, atol=1e-4)
    require_same(folder, model)


def test_openvino_graphs_give_what_the_model_gives(tmp_path):
    pytest.importorskip("openvino", reason="needs the extra openvino")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    model = make_tocom_model(layers=1)
    require_same(export(model, tmp_path / "out", format="openvino", degrees=[4]), model)


@pytest.mark.parametrize("format", ["onnx", "openvino", "torch"])
def test_a_set_with_a_recipe(format, tmp_path):
    """The second layer reads the class token's attention, and merges what has a size already."""
    if format != "torch":
        pytest.importorskip("onnxscript", reason="needs the extra onnx")
    if format == "openvino":
        pytest.importorskip("openvino", reason="needs the extra openvino")
    recipe = MergeRecipe(["keys_values", "input_key_mean"], 0.1, {6: [8, 5]}, attention_penalty=[0.0, 0.2])
    model = make_tocom_model(merging={"proportional_attention": True, "recipe": recipe.to_dict()})
    images = make_images()
    assert np.abs(logits_at(model, 6, images) - logits_at(make_tocom_model(), 6, images)).max() > 0.1
    folder = export(model, tmp_path / "out", format=format, degrees=[6])
    require_same(folder, model, 1e-6 if format == "torch" else 1e-4)


@pytest.mark.parametrize(
    ("dtype", "capabilities", "device", "hint"),
    [
        ("float32", ["BF16", "FP32"], "CPU", "f32"),
        ("float16", ["BF16", "FP32"], "CPU", "f32"),
        ("float16", ["FP16", "BF16", "FP32"], "CPU", None),
        ("float16", ["BF16", "FP32"], "AUTO", None),
    ],
)
def test_openvino_keeps_the_precision_of_an_export(tmp_path, monkeypatch, dtype, capabilities, device, hint):
    """Whatever a processor would take by itself, and unless the user says otherwise."""
    openvino = pytest.importorskip("openvino", reason="needs the extra openvino")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    folder = export(make_tocom_model(layers=1), tmp_path / "out", format="openvino", degrees=[4], dtype=dtype)
    seen = []

    class Core(openvino.Core):
        def get_property(self, device, name):
            return capabilities

        def compile_model(self, model, device, config):
            seen.append(config.get("INFERENCE_PRECISION_HINT"))
            return super().compile_model(model, "CPU", {})

    monkeypatch.setattr(openvino, "Core", Core)
    for options in ({}, {"INFERENCE_PRECISION_HINT": "bf16"}):
        ExportedTocom(folder, device=device, options=options)(make_images())
    assert seen == [hint, "bf16"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_standalone_openvino_graphs_run_by_themselves(model, tmp_path, dtype):
    openvino = pytest.importorskip("openvino", reason="needs the extra openvino")
    folder = export(model, tmp_path / "out", format="openvino", degrees=[0, 6], standalone=True, dtype=dtype)
    network = openvino.Core().read_model(folder / "degree_6.xml", folder / "weights.safetensors")
    images = make_images().astype(dtype)
    # OpenVINO computes in bfloat16 where a processor has it, unless it is told
    found = openvino.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)[0]
    expected = logits_at(model, 6, make_images())
    tolerance = 1e-4 if dtype == "float32" else 0.05 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=tolerance)


def chosen(names):
    return [pytest.param(f, id=str(f), marks=() if str(f) in names else pytest.mark.slow) for f in FAMILIES]


def require_family(family, folder, tolerance=1e-4):
    exported, model = ExportedTocom(folder), family.make(layers=2)
    for degree in exported.degrees:
        exported.set_target_r(degree)
        apply_tome(model, degree)
        for count in (1, 5):
            inputs = family.inputs(batch=count)
            with torch.no_grad():
                expected = model(**inputs)[exported.manifest["output"]].numpy()
            found = exported(inputs[exported.manifest["input"]["name"]].numpy())
            assert np.abs(found - expected).max() <= tolerance * max(1, np.abs(expected).max())


@pytest.mark.parametrize("family", chosen(QUICK))
def test_every_family_in_onnxruntime(family, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    require_family(family, export(family.make(layers=2), tmp_path / "out", degrees=[6]))


@pytest.mark.slow
@pytest.mark.parametrize("family", chosen(()))
def test_every_family_in_openvino(family, tmp_path):
    pytest.importorskip("openvino", reason="needs the extra openvino")
    require_family(family, export(family.make(layers=2), tmp_path / "out", format="openvino", degrees=[6]))


@pytest.mark.parametrize("family", chosen(()))
def test_every_family_as_a_program_of_torch(family, tmp_path):
    require_family(family, export(family.make(layers=2), tmp_path / "out", format="torch", degrees=[6]), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_half_precision_labels(format, tmp_path):
    """999 of 1,000 labels are those of float32 where the winner leads by more than rounding."""
    model = make_tocom_model()
    folder = export(model, tmp_path / "out", format=format, degrees=[0, 6], dtype="float16")
    exported, images = ExportedTocom(folder), make_images(1000)
    for degree in (0, 6):
        exported.set_target_r(degree)
        found, expected = exported(images), logits_at(model, degree, images)
        best = np.sort(expected, axis=1)
        clear = best[:, -1] - best[:, -2] > 0.05 * np.abs(expected).max()
        assert clear.mean() > 0.5
        assert (found.argmax(1) == expected.argmax(1))[clear].mean() >= 0.999


@pytest.mark.slow
def test_five_degrees_cost_little_more_disk_than_one(tmp_path):
    """A ViT-B but for its number of layers, which all counts are in proportion to."""
    torch.manual_seed(0)
    config = hf.ViTConfig(num_hidden_layers=2, num_labels=1000)
    model = hf.ViTForImageClassification(config).eval()
    plugins = make_plugins(model, max_r=16, size=0.02)
    model = TocomModel.from_pretrained(model, plugins=plugins, source_r=0)
    one = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())

    def size(folder):
        return {path.name: path.stat().st_size for path in folder.iterdir()}

    sizes = size(export(model, tmp_path / "composed"))
    factors = sizes.pop("plugins.safetensors")
    assert sum(sizes.values()) <= 1.15 * one
    assert factors == pytest.approx(16 * 2 * 2 * (2 * 768 * 2 * 4), rel=0.02)
    assert sum(size(export(model, tmp_path / "alone", standalone=True)).values()) <= 1.35 * one
