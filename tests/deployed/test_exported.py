# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""`ExportedTocom` runs an export without torch and transformers, and refuses what it cannot run before it tries."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import transformers as hf
from helpers.exports import copy_of, logits_at, make_images, make_tocom_model
from helpers.models import make_model
from helpers.paths import ROOT
from PIL import Image

from tocom_hf import (
    ArgumentError,
    DatasetError,
    DegreeError,
    ExportedTocom,
    PluginFileError,
    UnsupportedInputError,
    export,
)
from tocom_hf.deployed import manifest as manifest_module


@pytest.fixture(scope="module")
def processor():
    return hf.BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def model():
    model = make_tocom_model(source_r=0)
    model.config.id2label = {label: f"animal {label}" for label in range(5)}
    return model


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    """With onnxruntime where it is installed, else with torch."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        pytest.skip("needs the extra onnx")
    return export(model, tmp_path_factory.mktemp("exported") / "out", degrees=[0, 5], processor=processor)


@pytest.fixture
def damaged(folder, tmp_path):
    return copy_of(folder, tmp_path)


WITHOUT = """
import importlib.machinery, sys
class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        hidden = fullname.partition(".")[0] in {HIDDEN}
        return None if hidden else super().find_spec(fullname, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
import json
import numpy as np
from tocom_hf import ExportedTocom
exported = ExportedTocom(sys.argv[1])
answer = []
for degree in exported.degrees:
    exported.set_target_r(degree)
    answer.append(exported(np.load(sys.argv[2])).tolist())
print(json.dumps({"logits": answer, "labels": [p.label for p in exported.predict(sys.argv[3])[0]]}))
"""
HIDDEN = [
    "torch",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "peft",
    "onnx",
    "onnxscript",
    "datasets",
    "filelock",
]


def test_it_needs_numpy_pillow_and_the_runtime_alone(folder, model, tmp_path):
    images = make_images()
    np.save(tmp_path / "images.npy", images)
    Image.new("RGB", (50, 60), (200, 10, 10)).save(tmp_path / "image.png")
    code = WITHOUT.replace("{HIDDEN}", repr(HIDDEN))
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "images.npy"), str(tmp_path / "image.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    for degree, found in zip([0, 5], answer["logits"], strict=True):
        np.testing.assert_allclose(found, logits_at(model, degree, images), rtol=1e-4, atol=1e-4)
    assert {*answer["labels"]} == {f"animal {label}" for label in range(5)}


def test_degrees(folder):
    exported = ExportedTocom(folder)
    assert (exported.degrees, exported.target_r) == ([0, 5], 0)
    exported.set_target_r(5)
    assert exported.target_r == 5
    assert ExportedTocom(folder, 5).target_r == 5
    for wrong in (4, "5", True, None):
        with pytest.raises(DegreeError, match=r"was not exported. Choose one of 0, 5"):
            exported.set_target_r(wrong)
    assert exported.target_r == 5


def test_predictions_are_those_of_the_pipeline(folder, model, processor, tmp_path):
    pictures = [Image.fromarray(np.uint8(255 * np.random.default_rng(n).random((60, 45, 3)))) for n in range(2)]
    pictures[1].save(tmp_path / "second.png")
    with torch.no_grad(), model.at(5):
        expected = model(**processor(pictures, return_tensors="pt")).logits.softmax(-1)
    given = [pictures[0], tmp_path / "second.png", np.asarray(pictures[0])]
    found = ExportedTocom(folder, 5).predict(given, top_k=3)
    for row, predictions in zip([0, 1, 0], found, strict=True):
        scores, labels = expected[row].topk(3)
        assert [prediction.label for prediction in predictions] == [f"animal {label}" for label in labels]
        np.testing.assert_allclose([prediction.score for prediction in predictions], scores, atol=1e-4)
    assert ExportedTocom(folder).predict([]) == []


WRONG_INPUTS = [
    (np.zeros((1, 3, 40, 40), np.float32), r"shape \(1, 3, 40, 40\), but the graph was made for \(batch, 3, 32, 32\)"),
    (np.zeros((3, 32, 32), np.float32), r"shape \(3, 32, 32\)"),
    (np.zeros((0, 3, 32, 32), np.float32), r"shape \(0, 3, 32, 32\)"),
    (np.zeros((1, 1, 32, 32), np.float32), r"shape \(1, 1, 32, 32\)"),
    (np.zeros((1, 3, 32, 32), np.uint8), "dtype uint8; expected finished, normalised floating-point numbers"),
    (torch.zeros(1, 3, 32, 32), "must be a numpy array of shape .* got Tensor"),
]


@pytest.mark.parametrize(("inputs", "message"), WRONG_INPUTS)
def test_inputs_that_do_not_fit_are_refused_before_the_runtime_sees_them(folder, inputs, message, monkeypatch):
    exported = ExportedTocom(folder)
    monkeypatch.setattr(exported, "_opened", {})  # the runtime
    with pytest.raises(UnsupportedInputError, match=message):
        exported(inputs)


def test_inputs_of_another_precision_and_order_in_memory(folder):
    exported, images = ExportedTocom(folder), make_images()
    reordered = np.asfortranarray(images.astype(np.float64))
    np.testing.assert_array_equal(exported(reordered), exported(images))


WRONG_IMAGES = [
    (np.zeros((4, 4, 3), np.float32), ArgumentError, "Image 0 is an array of float32"),
    (np.zeros((3, 4, 5), np.uint8), ArgumentError, r"shape \(3, 4, 5\); expected uint8"),
    (b"png", ArgumentError, "Image 0 is a bytes"),
    ("missing.png", DatasetError, r"The image missing\.png cannot be read"),
]


@pytest.mark.parametrize(("image", "error", "message"), WRONG_IMAGES)
def test_images_that_cannot_be_read(folder, image, error, message):
    with pytest.raises(error, match=message):
        ExportedTocom(folder).predict([image])


def test_wrong_top_k(folder):
    with pytest.raises(ArgumentError, match="top_k must be a positive integer, got 0"):
        ExportedTocom(folder).predict([], top_k=0)


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "plugins.safetensors", "labels.json", "preprocessor_config.json", "degree_5.onnx"]
)
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_damaged_file_is_named(damaged, name, how):
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / name).unlink()
    if how == "changed":
        (damaged / name).write_bytes(content)
    reason = "is damaged: its SHA-256 is" if how == "changed" else "is missing"
    with pytest.raises(PluginFileError, match=rf"{name} {reason}"):
        ExportedTocom(damaged, 5).predict(np.zeros((9, 9, 3), np.uint8))


def test_a_damaged_degree_does_not_stop_the_others(damaged):
    (damaged / "degree_5.onnx").write_bytes(b"nothing")
    exported = ExportedTocom(damaged)
    before = exported(make_images())
    with pytest.raises(PluginFileError, match=r"degree_5\.onnx is damaged"):
        exported.set_target_r(5)
    assert exported.target_r == 0
    np.testing.assert_array_equal(exported(make_images()), before)


def test_every_file_is_hashed_once(folder, monkeypatch):
    hashed = []

    def sha256(path, whole=manifest_module.sha256):
        hashed.append(path.name)
        return whole(path)

    monkeypatch.setattr(manifest_module, "sha256", sha256)
    exported = ExportedTocom(folder)
    assert "degree_5.onnx" not in hashed  # nothing is read that is not needed
    for degree in (5, 0, 5):
        exported.set_target_r(degree)
        exported.predict(np.zeros((9, 9, 3), np.uint8))
    files = {path.name for path in folder.iterdir() if path.is_file()} - {"manifest.json"}
    assert sorted(hashed) == sorted(files)


MANIFESTS = [
    ("[]", "must hold a JSON object"),
    ("{", "is not valid JSON"),
    ("{}", "format_version None"),
    ({"format_version": 2}, "format_version 2, this version of tocom-hf reads 1"),
    ({"format": "tflite"}, "format is 'tflite'"),
    ({"files": {"../weights.safetensors": "0"}}, "which is no file of an export"),
    ({"degrees": {"5": {"graph": "degree_6.onnx"}}}, "the entry of degree '5' names no graph"),
    ({"input": {"name": "pixel_values"}}, "input has no name or no shape"),
    ({"plugins": None}, "weights are composed, but plugins is missing"),
    ({"composed": {}}, "the entry of degree 5 composes unknown weights"),
]


@pytest.mark.parametrize(("change", "message"), MANIFESTS)
def test_a_manifest_that_is_not_one(damaged, change, message):
    path = damaged / "manifest.json"
    content = change if isinstance(change, str) else json.dumps({**json.loads(path.read_text("utf-8")), **change})
    path.write_text(content, encoding="utf-8")
    with pytest.raises(PluginFileError, match=message):
        ExportedTocom(damaged)


def test_a_folder_that_is_no_export(tmp_path):
    with pytest.raises(PluginFileError, match=r"manifest\.json is missing. Expected a folder written by"):
        ExportedTocom(tmp_path)


def test_a_device_that_there_is_not(folder):
    with pytest.raises(ArgumentError, match=r"no execution provider 'abacus'\. Choose one of .*CPUExecutionProvider"):
        ExportedTocom(folder, device="abacus")


def test_degrees_that_share_their_weights_give_the_same(folder):
    images = make_images()
    for degree in (0, 5):
        found = ExportedTocom(folder, degree, share_weights=True, threads=1)(images)
        np.testing.assert_allclose(found, ExportedTocom(folder, degree)(images), rtol=1e-5, atol=1e-5)


def test_threads_may_switch_and_call(folder):
    exported, images = ExportedTocom(folder), make_images(1)
    allowed = {}
    for degree in exported.degrees:
        exported.set_target_r(degree)
        allowed[degree] = exported(images)
    failures = []

    def work(seed):
        order = np.random.default_rng(seed).integers(0, 2, 20)
        for index in order:
            exported.set_target_r(exported.degrees[index])
            found = exported(images)
            if not any(np.allclose(found, logits, atol=1e-5) for logits in allowed.values()):
                failures.append(found)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_without_a_processor_images_are_refused(tmp_path):
    folder = export(make_model(num_hidden_layers=1), tmp_path / "out", format="torch", degrees=[0])
    with pytest.raises(ArgumentError, match="exported without an image processor"):
        ExportedTocom(folder).predict(np.zeros((9, 9, 3), np.uint8))


def test_heads_with_several_labels_give_probabilities_of_each(tmp_path, processor):
    model = make_model(num_hidden_layers=1)
    model.config.problem_type = "multi_label_classification"
    exported = ExportedTocom(export(model, tmp_path / "out", format="torch", degrees=[0], processor=processor))
    image = Image.new("RGB", (40, 40), (1, 200, 30))
    with torch.no_grad():
        expected = model(**processor(image, return_tensors="pt")).logits.sigmoid().sort(descending=True).values[0]
    scores = [prediction.score for prediction in exported.predict(image)[0]]
    np.testing.assert_allclose(scores, expected, atol=1e-4)
