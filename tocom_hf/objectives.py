# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a distillation step compares between teacher and student: logits, or features where a backbone has no head."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .architectures import Backbone, find_backbone
from .errors import ArgumentError, UnsupportedModelError
from .inputs import model_inputs


class Objective(Protocol):
    """A way to compare two runs of one model on the same images."""

    name: str

    def outputs(self, model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
        """What is compared, with the batch as the first dimension."""

    def loss(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """How far the student is from the teacher, the mean over images; zero where they agree."""

    def agreement(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """How well the student agrees with the teacher, in [0, 1] for each image: `(batch,)`."""


class Logits:
    """`KL(teacher || student)` of the class distributions at temperature 1 (ToCom, eq. 6).

    Agreement is that of the predicted classes.
    """

    name = "logits"

    def outputs(self, model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(model(**model_inputs(model, pixel_values)).logits.float(), dim=-1)

    def loss(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean")

    def agreement(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        return (teacher.argmax(-1) == student.argmax(-1)).float()


class Features:
    """The squared distance of the normalised features that heads of the family read, `2 - 2 cos`.

    These are the class (and distillation) token, or the backbone's trained pooling; for families whose heads read patch
    tokens also the mean over these. Agreement is the cosine.
    """

    name = "features"

    def outputs(self, model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, features, hidden size)`, of length 1 along the last dimension."""
        backbone = find_backbone(model)
        outputs = backbone.module(**model_inputs(backbone.module, pixel_values))
        return F.normalize(_pooled(backbone, outputs).float(), dim=-1)

    def loss(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        return (teacher - student).square().sum(-1).mean()

    def agreement(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        return (teacher * student).sum(-1).mean(-1)


OBJECTIVES: dict[str, Objective] = {"logits": Logits(), "features": Features()}


def find_objective(name: str, model: PreTrainedModel) -> Objective:
    """The objective of a name; `auto` picks logits where the model has a classifier, else features.

    Raises:
        ArgumentError: if there is none of that name.
        UnsupportedModelError: if logits are asked of a model that has none.
    """
    if name not in ("auto", *OBJECTIVES):
        raise ArgumentError(f"objective must be one of auto, {', '.join(OBJECTIVES)}, got {name!r}.")
    has_logits = any(hasattr(model, attribute) for attribute in ("classifier", "cls_classifier"))
    if name == "auto":
        name = "logits" if has_logits else "features"
    if name == "logits" and not has_logits:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no classifier, so there are no logits to distil on. Use objective='features', "
            "or load the pre-trained model with AutoModelForImageClassification."
        )
    return OBJECTIVES[name]


def _pooled(backbone: Backbone, outputs: Any) -> torch.Tensor:
    """`(batch, features, hidden size)`: what heads of the family read."""
    hidden_states, row = outputs.last_hidden_state, backbone.architecture
    if not row.restore:
        return hidden_states[:, : row.protected]
    parts = [hidden_states[:, backbone.protected :].mean(dim=1)]
    # the pooling of ViT and DeiT is random in most checkpoints, that of these families is trained
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is not None:
        parts.insert(0, pooled)
    return torch.stack(parts, dim=1)
