# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A `TocomModel` where users of transformers meet it: pipelines, Trainer, loading, quantisation, PEFT adapters."""

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers.trainer as trainer_module
from helpers.families import FAMILIES
from helpers.models import make_model, make_plugins, schedule_of
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageClassification,
    BitsAndBytesConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    ViTModel,
    pipeline,
)
from transformers.utils import logging

from tocom_hf import PluginSet, TocomModel, UnsupportedModelError, apply_tome
from tocom_hf.merging.architectures import find_part
from tocom_hf.merging.backbones import find_backbone


PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
IMAGE = Image.linear_gradient("L").convert("RGB")


def logits(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values=pixel_values).logits


def assert_same_weights(one, other):
    for (name, left), (other_name, right) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(left, right), name


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def silence(caplog):
    """Whatever is warned of while the test runs, by `warnings` or by transformers' logger, fails it."""
    logger = logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


def test_the_classification_pipeline_without_a_warning(checkpoint, plugins, silence):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=4)
    classify = pipeline("image-classification", model=model, image_processor=PROCESSOR, device="cpu")
    found = classify(IMAGE, top_k=5)
    expected = logits(model, PROCESSOR(IMAGE, return_tensors="pt")["pixel_values"]).softmax(-1)[0]
    assert [row["score"] for row in found] == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-6)


@pytest.mark.parametrize("pool", [False, True])
def test_the_feature_extraction_pipeline_without_a_warning(tmp_path, plugins, silence, pool):
    backbone = make_model(ViTModel)
    model = TocomModel.from_pretrained(backbone, plugins=make_plugins(backbone), source_r=0, target_r=4)
    extract = pipeline(
        "image-feature-extraction", model=model, image_processor=PROCESSOR, device="cpu", pool=pool, return_tensors=True
    )
    with torch.no_grad():
        expected = model(**PROCESSOR(IMAGE, return_tensors="pt"))
    expected = expected.pooler_output if pool else expected.last_hidden_state
    assert torch.equal(extract(IMAGE), expected)
    assert pool or expected.shape == (1, 65 - 16, 32)


class Shades(Dataset):
    """Images whose brightness is their class."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        label = index % 2
        return {"pixel_values": 0.3 * torch.randn(3, 32, 32, generator=generator) + 2 * label - 1, "labels": label}


def make_trainer(model, folder, **arguments):
    defaults = {
        "output_dir": str(folder), "max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "report_to": "none", "use_cpu": True,
        "disable_tqdm": True,
    }  # fmt: skip
    return Trainer(
        model=model, args=TrainingArguments(**{**defaults, **arguments}), train_dataset=Shades(), eval_dataset=Shades()
    )


def test_trainer_tunes_at_the_source_degree_and_evaluates_at_another(checkpoint, plugins, tmp_path, pixel_values):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=3)
    trainer = make_trainer(model, tmp_path / "run")
    before = copy.deepcopy(model.state_dict())
    trainer.train()
    assert not torch.equal(model.vit.layers[0].attention.q_proj.weight, before["vit.layers.0.attention.q_proj.weight"])
    at_source = trainer.evaluate()["eval_loss"]
    tuned = copy.deepcopy(model.state_dict())
    with model.at(target_r=6):
        elsewhere = trainer.evaluate()["eval_loss"]
        model.eval()
        expected = logits(model, pixel_values)
    assert elsewhere != at_source
    assert trainer.evaluate()["eval_loss"] == at_source
    assert all(torch.equal(value, tuned[name]) for name, value in model.state_dict().items())

    trainer.save_model(tmp_path / "final")
    again = TocomModel.from_pretrained(tmp_path / "final", target_r=6)
    assert again.source_r == 3
    torch.testing.assert_close(logits(again, pixel_values), expected)


def test_trainer_resumes_as_if_it_had_not_stopped(checkpoint, plugins, tmp_path):
    whole = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=3)
    make_trainer(whole, tmp_path / "whole").train()
    first = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=3)
    make_trainer(first, tmp_path / "run", max_steps=3).train()
    # Trainer itself does not convert the key names that transformers writes, so the weights are loaded here
    resumed = TocomModel.from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert (resumed.source_r, resumed.target_r) == (3, 3)
    make_trainer(resumed, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for (name, left), right in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, msg=name)


def test_trainer_pushes_the_model_with_its_plugins(checkpoint, plugins, tmp_path, monkeypatch):
    uploaded = {}

    class Hub:
        def create_repo(self, name, **arguments):
            return type("Repository", (), {"repo_id": name})

        def upload_folder(self, repo_id, folder_path, **arguments):
            uploaded[repo_id] = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*")}

    monkeypatch.setattr(trainer_module, "hf_api", Hub)
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=3)
    trainer = make_trainer(model, tmp_path / "run", hub_model_id="user/tuned", hub_token="secret")
    trainer.train()
    trainer.create_model_card = lambda **arguments: None  # asks the Hub about the base model
    trainer.push_to_hub()
    assert {"config.json", "model.safetensors", "tocom_plugins/tocom_config.json"} < uploaded["user/tuned"]


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_of_one_device(checkpoint, plugins, device_map):
    model = TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=4, device_map=device_map)
    assert_same_weights(model, TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=4))


def test_a_model_spread_over_devices_is_refused_with_a_remedy(checkpoint, plugins, tmp_path):
    spread = {"vit.embeddings": "cpu", "vit.layers": "disk", "vit.layernorm": "cpu", "classifier": "cpu"}
    with pytest.raises(UnsupportedModelError, match="load without offloading to disk"):
        TocomModel.from_pretrained(
            checkpoint, plugins=plugins, source_r=0, target_r=4, device_map=spread, offload_folder=tmp_path / "offload"
        )


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dtype_and_attention_reach_the_model(checkpoint, plugins, dtype, attention):
    model = TocomModel.from_pretrained(
        checkpoint, plugins=plugins, source_r=0, target_r=4, dtype=dtype, attn_implementation=attention
    )
    assert model.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    assert model.vit.layers[0].attention.config._attn_implementation == attention
    expected = AutoModelForImageClassification.from_pretrained(checkpoint, dtype=dtype)
    expected = TocomModel.from_pretrained(expected, plugins=plugins, source_r=0, target_r=4)
    assert_same_weights(model, expected)


COMMIT = {"main": "0" * 40, "v1": "1" * 40}


def cache_repository(cache, name, revision, folder):
    """Lay a folder out as a download of the Hub in a cache."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(COMMIT[revision])
    shutil.copytree(folder, repository / "snapshots" / COMMIT[revision])


def test_revision_token_and_cache_dir_pass_through(model, plugins, tmp_path):
    """Two revisions of one repository and a plugin set in a cache of their own, found without a network."""
    other, cache = make_model(seed=5), tmp_path / "cache"
    for revision, saved in (("main", model), ("v1", other)):
        saved.save_pretrained(tmp_path / revision)
        cache_repository(cache, "user/vit", revision, tmp_path / revision)
    make_plugins(other).save_pretrained(tmp_path / "set")
    cache_repository(cache, "user/plugins", "main", tmp_path / "set")
    shutil.rmtree(tmp_path / "main")
    hub = {"cache_dir": cache, "token": "hf_secret"}
    found = TocomModel.from_pretrained("user/vit", plugins="user/plugins", source_r=0, target_r=4, revision="v1", **hub)
    expected = TocomModel.from_pretrained(other, plugins=tmp_path / "set", source_r=0, target_r=4)
    assert_same_weights(found, expected)
    assert_same_weights(TocomModel.from_pretrained("user/vit", source_r=0, **hub), model)


def test_arguments_of_the_hub_reach_every_download(checkpoint, plugins, tmp_path, monkeypatch):
    plugins.save_pretrained(tmp_path / "set")
    asked = []
    inner = PluginSet.from_pretrained
    monkeypatch.setattr(
        PluginSet, "from_pretrained", lambda name, **arguments: asked.append(arguments) or inner(name, **arguments)
    )
    hub = {"token": "hf_secret", "cache_dir": tmp_path, "local_files_only": True}
    TocomModel.from_pretrained(checkpoint, plugins=tmp_path / "set", source_r=0, target_r=2, revision="v1", **hub)
    assert asked == [hub]  # the revision is the checkpoint's


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantised_model_is_refused_and_a_composed_one_can_be_quantised(model, plugins, pixel_values):
    with pytest.raises(UnsupportedModelError, match="Compose before quantising"):
        TocomModel.from_pretrained(quantised(copy.deepcopy(model)), plugins=plugins, source_r=0, target_r=4)
    composed = TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=4)
    expected = logits(composed, pixel_values)
    small = quantised(composed)
    error = (logits(small, pixel_values) - expected).norm() / expected.norm()
    assert 0 < error < 0.2
    with pytest.raises(UnsupportedModelError, match="Compose before quantising"):
        small.set_target_r(2)


def torchao_config():
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def bitsandbytes_config():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize("make_config", [torchao_config, bitsandbytes_config])
def test_loading_quantised_is_refused(checkpoint, plugins, make_config):
    """Where the libraries are installed; `make test` does not need them."""
    config = make_config()
    with pytest.raises(UnsupportedModelError, match="Compose before quantising"):
        TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=4, quantization_config=config)


def test_a_composed_model_is_quantised_by_torchao(model, plugins, pixel_values):
    quantization = pytest.importorskip("torchao.quantization")
    composed = TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=4)
    expected = logits(composed, pixel_values)
    quantization.quantize_(composed, quantization.Int8WeightOnlyConfig())
    assert (logits(composed, pixel_values) - expected).norm() < 0.2 * expected.norm()
    with pytest.raises(UnsupportedModelError, match="Compose before quantising"):
        composed.set_target_r(2)


LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "fc1"], "init_lora_weights": False}


def with_lora(model, seed=3):
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**LORA))


def test_a_merged_lora_composes_with_plugins(model, plugins, pixel_values):
    """First the task's LoRA, then the plugins: W + A_task B_task + s * sum B_i A_i, here all by hooks of stock PEFT."""
    merged = with_lora(copy.deepcopy(model)).merge_and_unload()
    composed = TocomModel.from_pretrained(merged, plugins=plugins, source_r=0, target_r=4)

    reference = with_lora(copy.deepcopy(model))
    apply_tome(reference.base_model.model, 4)
    composite = plugins.compose(0, 4)
    backbone = find_backbone(reference.base_model.model).module
    for path, factors in composite.factors.items():
        delta = composite.scale * factors.lora_B @ factors.lora_A
        backbone.get_submodule(path).register_forward_hook(
            lambda layer, args, output, delta=delta: output + args[0] @ delta.T
        )
    torch.testing.assert_close(logits(composed, pixel_values), logits(reference, pixel_values), rtol=1e-4, atol=1e-4)
    composed.set_target_r(0)
    torch.testing.assert_close(
        logits(composed, pixel_values), logits(with_lora(copy.deepcopy(model)), pixel_values), rtol=1e-4, atol=1e-4
    )


def test_an_unmerged_lora_is_refused_with_the_remedy(model, plugins):
    wrapped = with_lora(model)
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        TocomModel.from_pretrained(wrapped, plugins=plugins, source_r=0, target_r=4)
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        TocomModel.from_pretrained(wrapped.base_model.model, plugins=plugins, source_r=0, target_r=4)
    assert schedule_of(model) is None


def test_an_adapter_of_transformers_is_refused_with_the_remedy(model, plugins):
    model.add_adapter(LoraConfig(**LORA))
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=4)


def test_a_folder_with_an_adapter_only_is_refused_with_the_remedy(model, plugins, checkpoint, tmp_path):
    with_lora(model).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        TocomModel.from_pretrained(tmp_path / "adapter", plugins=plugins, source_r=0, target_r=4)


def test_lora_tuning_at_the_source_degree_of_a_tocom_model(model, plugins, pixel_values):
    """The other order of calls: TocomModel first, tuned with PEFT at its source degree, merged, then run elsewhere."""
    expected = TocomModel.from_pretrained(
        with_lora(copy.deepcopy(model)).merge_and_unload(), plugins=plugins, source_r=2, target_r=5
    )
    tuned = TocomModel.from_pretrained(model, plugins=plugins, source_r=2)
    peft = with_lora(tuned)
    assert isinstance(peft, PeftModel)
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        tuned.set_target_r(5)
    peft.merge_and_unload()
    tuned.set_target_r(5)
    assert torch.equal(logits(tuned, pixel_values), logits(expected, pixel_values))


@pytest.mark.parametrize("family", FAMILIES[::4], ids=str)
def test_models_of_one_configuration_object_are_independent(family):
    config = family.config()
    one, other = family.model_class(config).eval(), family.model_class(config).eval()
    plugins = make_plugins(one)
    one = TocomModel.from_pretrained(one, plugins=plugins, source_r=0, target_r=4)
    assert not hasattr(config, "tocom")
    other = TocomModel.from_pretrained(other, source_r=2)
    assert (one.config.tocom["source_r"], other.config.tocom["source_r"]) == (0, 2)
    # the parts of one model still share theirs, so that a change reaches the attention
    one.set_attn_implementation("eager")
    backbone = find_backbone(one)
    attention = find_part(backbone.layers[0], backbone.architecture.attention)
    assert attention.config._attn_implementation == "eager"
    other_attention = find_part(find_backbone(other).layers[0], backbone.architecture.attention)
    assert other_attention.config._attn_implementation != "eager"


def test_the_recorded_configuration_is_plain_json(checkpoint, plugins, tmp_path):
    TocomModel.from_pretrained(checkpoint, plugins=plugins, source_r=0, target_r=4).save_pretrained(tmp_path / "saved")
    recorded = json.loads((tmp_path / "saved" / "config.json").read_text())["tocom"]
    assert recorded == {"source_r": 0, "target_r": 4, "scale": None, "plugins": "tocom_plugins"}
