# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Why model types are refused: each reason names a real type, and a model of that type is refused with it."""

import importlib
import inspect

import pytest
import torch
import transformers as hf
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoModel

from tocom_hf import UnsupportedModelError, apply_tome
from tocom_hf.merging.architectures import ARCHITECTURES, supported_types
from tocom_hf.merging.refusals import REASONS, explain, parts_of


FIRST = {reason: model_type for model_type, reason in reversed(REASONS.items())}  # one type of every reason
RESNET = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "out_features": ["stage1"]}


def config_of(model_type):
    """A configuration of a type with one layer, where it has a number of layers."""
    detectors = ("detr", "conditional_detr", "table-transformer", "deformable_detr")
    settings = {"backbone_config": hf.ResNetConfig(**RESNET)} if model_type in detectors else {}
    config = CONFIG_MAPPING[model_type](**settings)
    for name in ("num_hidden_layers", "depth", "encoder_layers", "decoder_layers"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 1)
    return config


def model_of(config):
    """A model without memory for its weights; of a part that has no Auto class, the first class of its module."""
    with torch.device("meta"):
        if type(config) in hf.MODEL_MAPPING:
            return AutoModel.from_config(config)
        module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
        classes = [found for found in vars(module).values() if inspect.isclass(found)]
        classes = [found for found in classes if getattr(found, "config_class", None) is type(config)]
        return next(found for found in classes if not found.__name__.endswith("PreTrainedModel"))(config)


def test_reasons_name_real_model_types():
    assert set(REASONS) <= set(CONFIG_MAPPING)


def test_no_supported_type_has_a_reason():
    assert not set(REASONS) & set(ARCHITECTURES)


def test_reasons_are_one_sentence():
    for reason in REASONS.values():
        assert ". " not in reason
        assert not reason.endswith(".")


@pytest.mark.parametrize(
    "model_type",
    [name if name in FIRST.values() else pytest.param(name, marks=pytest.mark.slow) for name in REASONS],
)
def test_a_model_of_the_type_is_refused_with_the_reason(model_type):
    config = config_of(model_type)
    try:
        model = model_of(config)
    except ImportError as error:
        pytest.skip(f"transformers builds no {model_type} here: {str(error).strip()[:60]}")
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModelError) as refusal:
        apply_tome(model, 4)
    assert f"{model_type!r}: {REASONS[model_type]}. Supported model types: " in str(refusal.value)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("model_type", ["convnext", "resnet", "focalnet", "poolformer", "mobilenet_v2"])
def test_models_of_convolutions_project_to_no_queries(model_type):
    names = {name.rpartition(".")[2] for name, _ in model_of(config_of(model_type)).named_modules()}
    assert not names & {"query", "q_proj", "qkv", "key", "k_proj"}


@pytest.mark.parametrize(
    ("model_type", "part"),
    [
        ("sam", "sam_vision_model"),
        ("sam_hq", "sam_hq_vision_model"),
        ("sam2", "sam2_hiera_det_model"),
        ("sam3", "sam3_vit_model"),
        ("qwen2_vl", "qwen2_vl_vision"),
        ("qwen2_5_vl", "qwen2_5_vl_vision"),
        ("qwen3_vl", "qwen3_vl_vision"),
        ("qwen3_omni_moe", "qwen3_omni_moe_vision_encoder"),
        ("colqwen2", "qwen2_vl_vision"),
        ("llama4", "llama4_vision_model"),
        ("mistral3", "pixtral"),
        ("florence2", "florence_vision"),
        ("groupvit", "groupvit_vision_model"),
        ("deepseek_ocr2", "deepseek_ocr2_sam_vision_model"),
        ("mask2former", "swin"),
        ("upernet", "resnet"),
        ("zoedepth", "beit"),
    ],
)
def test_of_a_model_of_parts_the_part_that_does_not_fit_is_named(model_type, part):
    assert explain(CONFIG_MAPPING[model_type]()) == f"{model_type!r}, whose part {part!r} does not fit: {REASONS[part]}"


def test_other_types_are_told_what_is_known_of_them():
    assert explain(hf.BertConfig()) == (
        "'bert': it reads text, and merging is for the patches of images, videos and spectrograms"
    )
    assert explain(hf.PatchTSTConfig()) == "'patchtst': its layers are not described in the table of architectures"
    assert explain("no_such_type") == "'no_such_type': its layers are not described in the table of architectures"
    assert explain(hf.BarkConfig()).startswith("'bark': none of its parts ('semantic', ")


@pytest.mark.slow
def test_every_type_of_transformers_gets_an_answer():
    undecided = ("patchtst", "vilt", "dac", "bark")
    for model_type in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[model_type]()
        except (ValueError, StrictDataclassError):
            continue  # two types have no configuration by default
        answer = explain(config)
        assert answer.startswith(f"{config.model_type!r}"), model_type
        assert "''" not in answer, model_type
        assert (model_type in undecided) <= ("described in the table" in answer), model_type


def test_parts_of_parts_are_looked_at():
    config = hf.ColPaliConfig(vlm_config=hf.PaliGemmaConfig())
    assert [part.model_type for part in parts_of(config)] == ["colpali", "paligemma", "siglip_vision_model", "gemma"]
    assert supported_types(config) == {"siglip_vision_model"}
