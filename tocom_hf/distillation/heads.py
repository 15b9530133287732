# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a distillation compares of a head's outputs, by what they mean: one label of several, any labels, or values."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from tocom_hf.errors import UnsupportedModelError
from tocom_hf.merging.backbones import Backbone
from tocom_hf.merging.inputs import model_inputs


class Logits:
    """One label of several: `KL(teacher || student)` of the class distributions at temperature 1 (ToCom, eq. 6).

    Agreement is that of the predicted classes.
    """

    name = "logits"

    def part(self, backbone: Backbone) -> PreTrainedModel:
        return backbone.model

    def outputs(self, backbone: Backbone, pixel_values: torch.Tensor) -> torch.Tensor:
        """Log-probabilities, float32 `(batch, classes)`."""
        return F.log_softmax(_logits(backbone, pixel_values), dim=-1)

    def loss(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean")

    @property
    def judge(self) -> "Logits":
        return self

    def agreement(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        return (teacher.argmax(-1) == student.argmax(-1)).float()


class LabelProbabilities:
    """Any number of labels: the divergence of each label's probability, `KL(teacher || student)`, summed over labels.

    A label's probability is the sigmoid of its logit. Agreement is the share of labels on which both decide alike.
    """

    name = "label_probabilities"

    def part(self, backbone: Backbone) -> PreTrainedModel:
        return backbone.model

    def outputs(self, backbone: Backbone, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits, float32 `(batch, labels)`."""
        return _logits(backbone, pixel_values)

    def loss(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))  # (batch, labels)
        no = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))  # (batch, labels)
        return (yes + no).sum(-1).mean()

    @property
    def judge(self) -> "LabelProbabilities":
        return self

    def agreement(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        return ((teacher > 0) == (student > 0)).float().mean(-1)


class Values:
    """Regression: the squared difference of the values, summed over the outputs, in the unit that the model predicts.

    Agreement is `1 - sum|t - s| / sum(|t| + |s|)`, one minus the dissimilarity of Bray and Curtis: 1 where all values
    are equal, 0 where none has even the same sign.
    """

    name = "values"

    def part(self, backbone: Backbone) -> PreTrainedModel:
        return backbone.model

    def outputs(self, backbone: Backbone, pixel_values: torch.Tensor) -> torch.Tensor:
        """The values, float32 `(batch, outputs)`."""
        return _logits(backbone, pixel_values)

    def loss(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        return (teacher - student).square().sum(-1).mean()

    @property
    def judge(self) -> "Values":
        return self

    def agreement(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        difference = (teacher - student).abs().sum(-1)  # (batch,)
        magnitude = (teacher.abs() + student.abs()).sum(-1)  # (batch,)
        # two values of zero agree
        return 1 - difference / magnitude.where(magnitude > 0, 1.0)


Head = Logits | LabelProbabilities | Values
HEADS: dict[str, Head] = {
    "single_label_classification": Logits(),
    "multi_label_classification": LabelProbabilities(),
    "regression": Values(),
}


def has_head(model: PreTrainedModel) -> bool:
    """Whether a model has a head that puts out logits; of no labels transformers builds one that does nothing."""
    if is_timm_classifier(model):
        return True
    heads = [getattr(model, name, None) for name in ("classifier", "cls_classifier")]
    return any(head is not None and not isinstance(head, nn.Identity) for head in heads)


def is_timm_classifier(model: PreTrainedModel) -> bool:
    """Whether a model is the wrapper of a timm model that puts out nothing but logits."""
    return any(base.__name__ == "TimmWrapperForImageClassification" for base in type(model).__mro__)


def head_of(model: PreTrainedModel) -> Head:
    """What to compare of a model's head.

    As in transformers, that is what `config.problem_type` says; where it says nothing, one output is a value, and
    several are classes.

    Args:
        model: A model with a head.

    Raises:
        UnsupportedModelError: if the problem type is none that transformers knows.
    """
    config = model.config
    problem = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    if problem not in HEADS:
        raise UnsupportedModelError(
            f"config.problem_type is {problem!r}, which is none of {', '.join(HEADS)}. Correct it in config.json, or "
            "use objective='features'."
        )
    return HEADS[problem]


def _logits(backbone: Backbone, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the head puts out, float32 `(batch, outputs)`."""
    inputs = model_inputs(backbone.model, backbone, pixel_values)
    return backbone.model(**inputs).logits.float()
