# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A `TocomModel` loads what transformers writes: every family by `load_state_dict`, some under the stock Trainer."""

import copy
import shutil

import pytest
import torch
from helpers.families import FAMILIES
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from tocom_hf import TocomModel
from tocom_hf.model.weight_names import state_names


# one of every table of names: ViT's, that of DINOv2 with its split matrices, and of a family that has none
TRAINED = [
    family for family in FAMILIES if str(family) in ("ViTForImageClassification", "SiglipForImageClassification")
]
TRAINED.append(next(family for family in FAMILIES if getattr(family.config(), "use_swiglu_ffn", False)))


def assert_same_weights(one, other):
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, weight in left.items():
        assert torch.equal(weight, right[name]), name


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in a wrapper"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_the_file_that_transformers_writes_loads_strictly(family, wrapped, tmp_path):
    trained = TocomModel.from_pretrained(family.make(seed=3), source_r=2)
    trained.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    resumed = TocomModel.from_pretrained(family.make(seed=0), source_r=2)
    if wrapped:  # as DistributedDataParallel does
        torch.nn.ModuleDict({"module": resumed}).load_state_dict(
            {f"module.{name}": weight for name, weight in weights.items()}
        )
    else:
        resumed.load_state_dict(weights)
    assert_same_weights(resumed, trained)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_names_of_the_model_and_unknown_ones_are_left_alone(family):
    trained, model = (TocomModel.from_pretrained(family.make(seed=seed), source_r=2) for seed in (3, 0))
    assert state_names(model) == model.state_dict().keys()
    weights = trained.state_dict()
    model.load_state_dict(weights)
    assert_same_weights(model, trained)
    weights["encoder.layer.0.attention.attention.nonsense("] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*nonsense"):
        model.load_state_dict(weights)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == ([], ["encoder.layer.0.attention.attention.nonsense("])


def test_a_shard_of_a_file_loads(tmp_path):
    family = FAMILIES[0]
    trained = TocomModel.from_pretrained(family.make(seed=3), source_r=2)
    trained.save_pretrained(tmp_path, max_shard_size="20KB")
    resumed = TocomModel.from_pretrained(family.make(seed=0), source_r=2)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        assert resumed.load_state_dict(load_file(shard), strict=False).unexpected_keys == []
    assert_same_weights(resumed, trained)


class Recorder(TrainerCallback):
    """Keeps the weights of every step at which a checkpoint is saved."""

    def __init__(self):
        self.weights = {}

    def on_save(self, args, state, control, model, **_):
        self.weights[state.global_step] = copy.deepcopy(model.state_dict())


class Samples(Dataset):
    """Eight inputs of a family with a label each."""

    def __init__(self, family):
        self.inputs = family.inputs(batch=8)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.inputs.items()} | {"labels": index % 5}


def make_trainer(family, folder, **arguments):
    torch.manual_seed(0)
    model = TocomModel.from_pretrained(family.make(), source_r=2)
    settings = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps",
        "save_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 3,
        "logging_strategy": "no", "remove_unused_columns": False,
    }  # fmt: skip
    return Trainer(
        model=model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=Samples(family),
        eval_dataset=Samples(family),
    )


@pytest.mark.parametrize("family", TRAINED, ids=str)
def test_the_stock_trainer_resumes_bit_for_bit(family, tmp_path):
    uninterrupted = make_trainer(family, tmp_path / "run")
    uninterrupted.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = make_trainer(family, tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed.model, uninterrupted.model)


@pytest.mark.parametrize("family", TRAINED, ids=str)
def test_the_stock_trainer_loads_the_best_model_at_the_end(family, tmp_path):
    recorder = Recorder()
    trainer = make_trainer(
        family, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="step",
    )  # fmt: skip
    trainer.compute_metrics = lambda _: {"step": -trainer.state.global_step}  # so the first is the best
    trainer.add_callback(recorder)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best, last = recorder.weights[2], recorder.weights[4]
    assert not all(torch.equal(weight, last[name]) for name, weight in best.items())
    assert all(torch.equal(weight, best[name]) for name, weight in trainer.model.state_dict().items())
