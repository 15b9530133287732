# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What a distillation step compares between teacher and student: logits, features, or the tokens of every layer."""

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from tocom_hf.devices import float64_device
from tocom_hf.distillation.heads import Logits, has_head, head_of, is_timm_classifier
from tocom_hf.errors import ArgumentError, DatasetError, UnsupportedModelError
from tocom_hf.merging.backbones import Backbone
from tocom_hf.merging.inputs import model_inputs
from tocom_hf.merging.tokens import group_sizes, mean_over_groups
from tocom_hf.merging.tracing import traced


_LEAST_SHRINKAGE = 0.1


class Objective(Protocol):
    """A way to compare two runs of one model on the same images."""

    name: str

    def part(self, backbone: Backbone) -> PreTrainedModel:
        """The part of a model that is run: all of it, or its backbone."""

    def outputs(self, backbone: Backbone, pixel_values: torch.Tensor) -> Any:
        """What the loss compares, of the model that has this backbone, or of such a part."""

    def loss(self, teacher: Any, student: Any) -> torch.Tensor:
        """How far the student is from the teacher, the mean over images; zero where they agree."""

    @property
    def judge(self) -> "Judge":
        """What agreement is measured by."""


class Judge(Protocol):
    """A way to say how well two runs of one model agree."""

    name: str

    def outputs(self, backbone: Backbone, pixel_values: torch.Tensor) -> torch.Tensor:
        """What is compared, with the batch as the first dimension."""

    def agreement(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """How well the student agrees with the teacher, in [0, 1] for each image: `(batch,)`."""


class Features:
    """The squared distance of the normalised features that heads of the family read, `2 - 2 cos`.

    These are the class (and distillation) token, or the backbone's trained pooling; for families whose heads read patch
    tokens also the mean over these. Agreement is the cosine.
    """

    name = "features"

    def part(self, backbone: Backbone) -> PreTrainedModel:
        return backbone.module

    def outputs(self, backbone: Backbone, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, features, hidden size)`, of length 1 along the last dimension."""
        inputs = model_inputs(backbone.module, backbone, pixel_values)
        outputs = backbone.module(**inputs)
        return F.normalize(_pooled(backbone, outputs).float(), dim=-1)

    def loss(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        return (teacher - student).square().sum(-1).mean()

    @property
    def judge(self) -> "Features":
        return self

    def agreement(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        return (teacher * student).sum(-1).mean(-1)


class WhitenedFeatures:
    """The squared distance of the features of `Features`, measured in their own spread.

    Images differ most in a few directions of the features, and a cosine is about these. Linear heads divide by the
    spread: a direction in which images hardly differ may decide between classes. So features count here after they were
    whitened, `(f - g)^T C^-1 (f - g)`, with the correlations C of a teacher's features over many images, in units of
    what this is for one image and the mean of all. C is shrunk towards no correlations, by a tenth at least, which is
    about what heads that were fitted to some hundred images resolve; and the more, the fewer images there are below
    twice the channels, because few say nothing of most directions. Agreement is that of `Features`.

    Attributes:
        metric: What differences of features are multiplied by, float32 `(features * hidden, features * hidden)`;
            `None` before `fitted`.
    """

    name = "whitened_features"
    judge = Features()

    def __init__(self, metric: torch.Tensor | None = None):
        self.metric = metric

    def part(self, backbone: Backbone) -> PreTrainedModel:
        return self.judge.part(backbone)

    def outputs(self, backbone: Backbone, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, features * hidden size)`, as heads read them."""
        inputs = model_inputs(backbone.module, backbone, pixel_values)
        return _pooled(backbone, backbone.module(**inputs)).float().flatten(1)

    def loss(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        return self.distances(teacher, student).mean()

    def distances(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """That of each image, 0 where both agree: `(batch,)`."""
        if self.metric is None:
            raise ArgumentError("The spread of the features is not known yet: use what fitted(features) returns.")
        with torch.autocast(student.device.type, enabled=False):
            return ((student - teacher).float() @ self.metric).square().sum(-1)

    def fitted(self, features: torch.Tensor) -> "WhitenedFeatures":
        """The objective whose metric is that of some features of a teacher, `(images, features * hidden size)`.

        Raises:
            DatasetError: if fewer than two images have features that are finite, or all have the same.
        """
        rows = features.to(float64_device(features.device)).double()
        rows = rows[rows.isfinite().all(dim=1)]
        if not (rows[1:] != rows[:1]).any():
            raise DatasetError(
                f"The features of {len(features)} images have no spread: {len(rows)} of them are finite, and these do "
                "not differ. Look for images that are not finite, or all the same."
            )
        rows = rows - rows.mean(dim=0)
        spread = rows.std(dim=0, correction=0)  # (channels,)
        spread = spread.clamp(min=1e-3 * spread.max())  # a channel that hardly moves shall not outweigh all others
        scaled = rows / spread  # (images, channels)
        correlations = scaled.T @ scaled / len(scaled)  # (channels, channels)
        share = max(_LEAST_SHRINKAGE, 1 - len(rows) / (2 * rows.shape[1]))
        values, vectors = torch.linalg.eigh(correlations)
        metric = vectors / ((1 - share) * values + share).sqrt() / spread[:, None]  # (channels, channels)
        metric = metric / (rows @ metric).square().sum(-1).mean().sqrt()
        return WhitenedFeatures(metric.to(features.device, torch.float32))


class LayerInputs(NamedTuple):
    """The tokens that a layer reads.

    Attributes:
        hidden_states (`torch.Tensor` of shape `(batch, tokens, hidden size)`): Behind the layer's first norm.
        positions (`torch.Tensor` of shape `(batch, input tokens)`): Which of them each token of the first layer is in.
    """

    hidden_states: torch.Tensor
    positions: torch.Tensor


class ModelTokens(NamedTuple):
    """What `HiddenStates` compares: the features, what every layer but the first reads, and the number of tokens at the
    front that never merge."""

    features: torch.Tensor
    layers: list[LayerInputs]
    protected: int


class HiddenStates:
    """The distance of `Features`, and as much for the tokens that every layer but the first reads.

    That says not only that a student is off, but from which layer on and for which tokens, which helps short trainings.
    What a layer reads is behind its first norm, which takes care of the different magnitudes of layers and channels.
    Teacher and student have merged different tokens: both are averaged over the groups of the one that has merged more.
    A layer's distance is the squared one over the mean square length of the teacher's tokens, half of it that of the
    class (distillation, register) tokens, half that of the patches, in which merged tokens weigh by size. Agreement is
    that of `Features`.
    """

    name = "hidden_states"
    judge = Features()

    def part(self, backbone: Backbone) -> PreTrainedModel:
        return self.judge.part(backbone)

    def outputs(self, backbone: Backbone, pixel_values: torch.Tensor) -> ModelTokens:
        read: list[torch.Tensor] = []

        def record(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            read.append(output)  # (batch, tokens, hidden size)

        handles = []
        for layer in list(backbone.layers)[1:]:
            norm = getattr(layer, backbone.architecture.norm_before)
            handles.append(norm.register_forward_hook(record))
        try:
            with traced(backbone) as trace:
                features = self.judge.outputs(backbone, pixel_values)
        finally:
            for handle in handles:
                handle.remove()
        layers = [LayerInputs(*pair) for pair in zip(read, trace.positions[:-1], strict=True)]
        return ModelTokens(features, layers, backbone.protected)

    def loss(self, teacher: ModelTokens, student: ModelTokens) -> torch.Tensor:
        distances = [self.judge.loss(teacher.features, student.features)]
        for teacher_layer, student_layer in zip(teacher.layers, student.layers, strict=True):
            distances.append(_distance(teacher_layer, student_layer, teacher.protected))
        return torch.stack(distances).mean()


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective for objective in (Logits(), Features(), WhitenedFeatures(), HiddenStates())
}


def find_objective(name: str, model: PreTrainedModel) -> Objective:
    """The objective of a name; `auto` picks logits where the model has a head, else features.

    What is compared of logits goes by what the head means: one label of several, any labels, or values (see `heads`).

    Raises:
        ArgumentError: if there is none of that name.
        UnsupportedModelError: if logits are asked of a model that has none, or of one of an unknown problem type; if
            anything else is asked of one that has nothing but logits.
    """
    if name not in ("auto", *OBJECTIVES):
        raise ArgumentError(f"objective must be one of auto, {', '.join(OBJECTIVES)}, got {name!r}.")
    if name == "auto":
        name = "logits" if has_head(model) else "features"
    if name != "logits" and is_timm_classifier(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} puts out logits alone, so there are no features to distil on. Use "
            "objective='logits', or load the model without its head (AutoModel)."
        )
    if name != "logits":
        return OBJECTIVES[name]
    if not has_head(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no classifier, so there are no logits to distil on. Use objective='features', "
            "or load the pre-trained model with AutoModelForImageClassification."
        )
    return head_of(model)


def _pooled(backbone: Backbone, outputs: Any) -> torch.Tensor:
    """`(batch, features, hidden size)`: what heads of the family read."""
    hidden_states = outputs.last_hidden_state  # (batch, tokens, hidden size)
    architecture = backbone.architecture
    if not architecture.restore:
        return hidden_states[:, : architecture.protected]
    patch_mean = hidden_states[:, backbone.protected :].mean(dim=1)  # (batch, hidden size)
    # the pooling of ViT and DeiT is random in most checkpoints, that of these families is trained
    pooled = getattr(outputs, "pooler_output", None)
    # that of Ovis 2 is one vector for each patch
    parts = [patch_mean] if pooled is None or pooled.shape != patch_mean.shape else [pooled, patch_mean]
    return torch.stack(parts, dim=1)


def _distance(teacher: LayerInputs, student: LayerInputs, protected: int) -> torch.Tensor:
    """How far the student's tokens are from the teacher's at one layer, the mean over images."""
    # the one that has merged more; of equals the student
    coarser = teacher if teacher.hidden_states.shape[1] < student.hidden_states.shape[1] else student
    groups = coarser.positions  # (batch, input tokens)
    count = coarser.hidden_states.shape[1]
    target = mean_over_groups(teacher.hidden_states.float(), teacher.positions, groups, count)  # (batch, groups, size)
    own = mean_over_groups(student.hidden_states.float(), student.positions, groups, count)  # (batch, groups, size)
    mean_square_length = target.square().sum(-1).mean(dim=1, keepdim=True)  # (batch, 1)
    squares = (target - own).square().sum(-1) / mean_square_length  # (batch, groups)
    sizes = group_sizes(groups, count)[:, protected:]  # (batch, patch groups)
    patches = (squares[:, protected:] * sizes).sum(dim=1) / sizes.sum(dim=1)  # (batch,)
    if protected == 0:
        return patches.mean()
    class_tokens = squares[:, :protected].mean(dim=1)  # (batch,)
    return (class_tokens + patches).mean() / 2
