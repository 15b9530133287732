# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What `tocom finetune` makes of checkpoints and labels of every kind: a classifier that trains, or a clear refusal."""

import json

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from helpers.families import COMMON, ast, clip_config
from helpers.models import make_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from tocom_hf import ArgumentError, TocomModel
from tocom_hf.cli.fine_tunable import classifier_config, find_classifier, load_classifier
from tocom_hf.cli.finetune import label_for_training


PROCESSOR = hf.ViTImageProcessorPil(size={"height": 32, "width": 32})


def tower(model_class, config_class, **settings):
    vision, _ = clip_config()
    return lambda: model_class(config_class(**vision, **settings))


def mae(model_class):
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
               "decoder_intermediate_size": 16}  # fmt: skip
    return lambda: model_class(hf.ViTMAEConfig(**{**COMMON, "num_labels": 2}, **decoder))


SOURCES = {
    "DeiTForImageClassificationWithTeacher": (
        lambda: make_model(hf.DeiTForImageClassificationWithTeacher), "deit", hf.DeiTForImageClassification, "deit"
    ),
    "ViTMAEForPreTraining": (mae(hf.ViTMAEForPreTraining), "vit", hf.ViTForImageClassification, "vit"),
    "ViTMAEModel": (mae(hf.ViTMAEModel), "", hf.ViTForImageClassification, "vit"),
    "CLIPVisionModel": (
        tower(hf.CLIPVisionModel, hf.CLIPVisionConfig), "", hf.CLIPForImageClassification, "vision_model"
    ),
    "CLIPVisionModelWithProjection": (
        tower(hf.CLIPVisionModelWithProjection, hf.CLIPVisionConfig, projection_dim=8), "vision_model",
        hf.CLIPForImageClassification, "vision_model",
    ),
    "SiglipVisionModel": (
        tower(hf.SiglipVisionModel, hf.SiglipVisionConfig), "", hf.SiglipForImageClassification, "vision_model"
    ),
    "Dinov2Model": (
        lambda: hf.Dinov2Model(hf.Dinov2Config(**{k: v for k, v in COMMON.items() if k != "intermediate_size"})), "",
        hf.Dinov2ForImageClassification, "dinov2",
    ),
    "CLIPModel": (
        lambda: hf.CLIPModel(hf.CLIPConfig(vision_config=clip_config()[0], text_config=clip_config()[1])),
        "vision_model", hf.CLIPForImageClassification, "vision_model",
    ),
}  # fmt: skip


def save(model, folder):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():  # whatever a class would start with itself
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


def make_classifier(folder, classes=3):
    config = hf.AutoConfig.from_pretrained(folder)
    classifier = find_classifier(config, "it")
    config = classifier_config(config, classifier)
    label_for_training(config, {index: f"class {index}" for index in range(classes)})
    return load_classifier(classifier, str(folder), config)


@pytest.mark.parametrize(("make", "path", "expected_class", "part"), SOURCES.values(), ids=SOURCES)
def test_pre_trained_weights_arrive_and_the_head_trains(tmp_path, make, path, expected_class, part, caplog):
    torch.manual_seed(0)
    source = make()
    model = make_classifier(save(source, tmp_path / "source"))
    assert type(model) is expected_class
    expected = source.get_submodule(path).state_dict()
    arrived = model.get_submodule(part).state_dict()
    assert len(arrived) > 20
    for name, weight in arrived.items():
        if "pooler" not in name:
            assert torch.equal(weight, expected[name]), name
    if not path:  # a tower by itself, for which the configuration of a text part is made up
        assert "bos_token_id" not in caplog.text

    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = TocomModel.from_pretrained(model, source_r=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        loss = model(pixel_values=images, labels=torch.arange(6) % 3).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "ViTMAEModel"])
def test_checkpoints_in_half_precision_train_in_full(tmp_path, name):
    make, path, _, part = SOURCES[name]
    source = make().half()
    model = make_classifier(save(source, tmp_path / "source"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    key = next(
        key for key in source.get_submodule(path).state_dict() if "q_proj.weight" in key or "query.weight" in key
    )
    assert torch.equal(
        model.get_submodule(part).state_dict()[key], source.get_submodule(path).state_dict()[key].float()
    )
    model.save_pretrained(tmp_path / "tuned")
    again = TocomModel.from_pretrained(tmp_path / "tuned", source_r=0)
    assert again(pixel_values=torch.zeros(1, 3, 32, 32)).logits.dtype == torch.float32


def test_the_head_of_the_class_token_is_kept_for_the_same_number_of_classes(tmp_path):
    source = make_model(hf.DeiTForImageClassificationWithTeacher)
    folder = save(source, tmp_path / "source")
    assert torch.equal(make_classifier(folder, 5).classifier.weight, source.cls_classifier.weight)
    assert make_classifier(folder, 3).classifier.out_features == 3


@pytest.fixture
def images(offline, tmp_path):
    """A parquet file of random pictures: `images(labels, feature)`."""

    def make(labels, feature, file="images.parquet"):
        rng = np.random.default_rng(0)
        pictures = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in labels]
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features).to_parquet(tmp_path / file)
        return tmp_path / file

    return make


def command(folder, data, *more):
    return (
        "finetune", "--model_name_or_path", folder, "--dataset_name", data, "--per_device_train_batch_size", 4,
        "--report_to", "none", "--output_dir", "tuned", "--max_steps", 1, "--save_strategy", "no", *more,
    )  # fmt: skip


CATS = datasets.ClassLabel(names=["cat", "dog", "pug"])


@pytest.mark.parametrize(
    "name", ["DeiTForImageClassificationWithTeacher", "ViTMAEForPreTraining", "CLIPVisionModel", "SiglipVisionModel"]
)
def test_the_result_is_a_checkpoint_that_runs_at_its_degree(run, images, tmp_path, name):
    make, _, expected_class, _ = SOURCES[name]
    folder = save(make(), tmp_path / "source")
    code, _, errors = run(*command(folder, images([0, 1, 2, 0], CATS), "--source_r", 2))
    assert code == 0, errors
    model = TocomModel.from_pretrained("tuned")
    assert model.stock_class is expected_class
    assert model.source_r == 2
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "pug"}
    assert model(pixel_values=torch.zeros(1, 3, 32, 32)).logits.shape == (1, 3)


def clip_tower_config():
    return hf.CLIPVisionConfig(**clip_config()[0])


def config_only(config):
    def make(folder):
        config().save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (config_only(lambda: hf.SwinConfig()), (), "does not support the architecture 'swin'"),
        (config_only(lambda: hf.ResNetConfig()), (), "does not support the architecture 'resnet'"),
        (config_only(ast), (), "takes spectrograms"),
        (config_only(lambda: hf.LlavaConfig()), (), "no class for image classification"),
        (config_only(lambda: hf.ViTConfig(**COMMON)), ("--source_r", 33), "of which a layer merges at most 32"),
        (config_only(lambda: hf.ViTConfig(**COMMON)), ("--source_r", -1), "must be a non-negative integer"),
        (config_only(clip_tower_config), ("--source_r", 33), "of which a layer merges at most 32"),
    ],
)  # fmt: skip
def test_models_and_degrees_are_refused_before_data_are_loaded(refused, tmp_path, make, options, message):
    error = refused(*command(make(tmp_path / "model"), "no/where/at.all", *options))
    assert "DatasetError" not in error
    assert message in error


def test_labels_that_no_head_can_learn_are_refused(refused, images, tmp_path):
    folder = save(make_model(), tmp_path / "model")
    error = refused(*command(folder, images([1, 1, 1], CATS)))
    assert "DatasetError: All 3 images of the split 'train' are of one class (dog)" in error
    error = refused(*command(folder, images([0, 0], datasets.ClassLabel(names=["cat"]), "one.parquet")))
    assert "are of one class (cat)" in error
    error = refused(*command(folder, images([3, 900, 7], datasets.Value("int64"), "holes.parquet")))
    assert "DatasetError: The labels of the split 'train' go up to 900, but only 3 of these 901 numbers occur" in error
    data = images([0, 1, 1, 2], datasets.Value("int64"), "high.parquet")
    error = refused(*command(folder, data, "--train_split", "train[:3]", "--eval_split", "test[3:]"))
    assert "The split 'test[3:]' has the label 2, but the split 'train[:3]' knows 2 classes" in error


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_a_head_of_another_kind_goes_on_with_one_label_an_image(run, images, tmp_path, problem, caplog):
    folder = save(make_model(num_labels=3, problem_type=problem), tmp_path / "model")
    code, _, errors = run(*command(folder, images([0, 1, 2, 0], CATS)))
    assert code == 0, errors
    assert caplog.text.count(f"was trained with problem_type {problem!r}. Here each image has one label") == 1
    assert json.loads((tmp_path / "tuned/config.json").read_text())["problem_type"] == "single_label_classification"


def test_only_the_data_of_a_run_resume_it(run, refused, images, tmp_path):
    folder = save(make_model(), tmp_path / "model")
    resumed = ("--resume_from_checkpoint", tmp_path / "tuned/checkpoint-1")
    kept = ("--save_strategy", "steps", "--save_steps", 1)
    assert run(*command(folder, images([0, 1, 2, 0], CATS), *kept)).code == 0
    wolves = datasets.ClassLabel(names=["cat", "dog", "wolf"])
    error = refused(*command(folder, images([0, 1, 2, 0], wolves, "wolves.parquet"), *resumed))
    assert "1 of the 3 classes of the split 'train' are none of the 3 of" in error
    two = datasets.ClassLabel(names=["cat", "dog"])
    error = refused(*command(folder, images([0, 1, 1, 0], two, "two.parquet"), *resumed))
    assert "was trained on 3 classes, and the data set has 2" in error


def test_weights_that_are_not_those_of_the_configuration_are_refused(tmp_path):
    folder = save(make_model(), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    lacking = next(name for name in weights if "layer" in name and "weight" in name)
    save_file({k: v for k, v in weights.items() if k != lacking}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArgumentError, match=r"1 of the backbone are missing or of another size.* start at random"):
        make_classifier(folder)


def test_warnings_are_at_the_level_of_transformers(tmp_path, caplog):
    logging.set_verbosity_error()
    try:
        config = hf.ViTConfig(**COMMON, problem_type="regression")
        label_for_training(config, {0: "a", 1: "b"})
    finally:
        logging.set_verbosity_warning()
    assert "regression" not in caplog.text
