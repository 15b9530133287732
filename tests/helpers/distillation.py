# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Small data, arguments, and the loss of a distillation by its formula."""

import copy
import functools

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from helpers.models import make_model
from tocom_hf import TocomModel, apply_tome


ARGUMENTS = {"max_r": 4, "num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 0.3}


class Noise(Dataset):
    def __init__(self, count=32):
        self.images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index]}


def expected_loss(chain, pixel_values, source_r, target_r, proportional=True):
    """Equation 6, put together from the other parts: the teacher is plain at m, the student composed for n, at n."""
    merge = functools.partial(apply_tome, proportional_attention=proportional)
    teacher = merge(make_model(), source_r)(pixel_values).logits.log_softmax(-1)
    student = merge(make_model(), target_r)
    sign = 1 if target_r > source_r else -1
    with torch.no_grad():
        for i in range(min(source_r, target_r), max(source_r, target_r)):
            for path, (lora_A, lora_B) in chain.adapters()[i].items():
                student.vit.get_submodule(path).weight += sign * 0.1 * lora_B @ lora_A
    student = student(pixel_values).logits.log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1).mean()


def divergence(model, plugins, images, source_r, target_r, scale):
    """KL between the model at its source degree and, composed, at the target degree."""
    with torch.no_grad():
        teacher = apply_tome(copy.deepcopy(model), source_r)(images).logits.log_softmax(-1)
        student = TocomModel.from_pretrained(
            copy.deepcopy(model), plugins=plugins, source_r=source_r, target_r=target_r, scale=scale
        )
        return F.kl_div(student(images).logits.log_softmax(-1), teacher, log_target=True, reduction="batchmean").item()
