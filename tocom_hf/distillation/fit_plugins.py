# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A plugin set in closed form: regression of what merging takes off the residual stream, layer by layer, in minutes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from tocom_hf.devices import describe_device, evaluation_mode
from tocom_hf.distillation.objectives import Features
from tocom_hf.distillation.residual import Tokens, Writer, WriterHook, find_writers, watched_writers
from tocom_hf.errors import ArgumentError, DatasetError, DegreeError, UnsupportedModelError
from tocom_hf.merging.backbones import Backbone, find_backbone
from tocom_hf.merging.inputs import model_inputs
from tocom_hf.merging.patching import get_settings, set_merging, unset_merging
from tocom_hf.merging.recipes import TOME_RECIPE, MergeRecipe
from tocom_hf.merging.schedule import require_degree
from tocom_hf.merging.tokens import group_sizes
from tocom_hf.plugins.agreement import AgreementGrid
from tocom_hf.plugins.composition import Factors, require_scale
from tocom_hf.plugins.config import BackboneFacts, PluginSetConfig
from tocom_hf.plugins.plugin_set import PluginSet


_RIDGES = (0.003, 0.03, 0.3, 3.0)  # what is tried, in units of the mean square of the inputs
_CLASS_SHARE = 0.5  # what class, distillation and register tokens weigh beside all patches of an image
_EVAL_BATCH_SIZE = 32


def fit_plugins(
    model: PreTrainedModel,
    images: Dataset,
    *,
    max_r: int,
    degrees: Sequence[int] | None = None,
    source_r: int = 0,
    rank: int = 2,
    scale: float = 0.1,
    recipe: MergeRecipe | None = None,
    proportional_attention: bool = True,
    eval_images: Dataset | None = None,
    base_model: str | None = None,
    report: Callable[[str], None] | None = None,
) -> PluginSet:
    """Fit a plugin set to a model on a few hundred unlabelled images, without gradients.

    `distill` finds plugins by thousands of steps (ToCom, eq. 6). Here they are solved for. Teacher and student are
    those of a distillation: the model at `source_r`, and the same one at another degree. While the student runs, once
    for each degree, the two projections of every layer that write to the residual stream, that of attention and that
    of the MLP, get the update of a low rank that takes its tokens nearest to the teacher's, averaged over the same
    patches (ridge regression of reduced rank, its ridge by what carries over from one half of the images to the other).
    Later layers see what earlier ones have mended.

    The result is an ordinary set for weights trained at `source_r`. Distil it further with `init_plugins`, or use it as
    it is. What it agrees on with the teacher are the images that it was fitted to and others like them: take those of
    the task.

    Args:
        model: A supported model in float32, with or without its head. It is left as it was. All images go through it
            at once: it holds two tensors for each layer, `(images, tokens, hidden)`, on the device.
        images: Samples with finished `pixel_values`, float `(channels, height, width)`, of clips with the frames in
            front. Two to five hundred; labels are not looked at.
        max_r: Largest degree; the set has this many plugins.
        degrees: The degrees to fit; by default eight, or all if there are fewer. Plugins between two of them share what
            was fitted there, the strongest directions first.
        source_r: The degree that the weights were trained at.
        rank: Rank h of one plugin.
        scale: Factor s of the set.
        recipe: How tokens merge, as in `apply_tome`; by default ToMe's rule.
        proportional_attention: As in `apply_tome`. Without it attention needs no bias, and plugins have more to mend.
        eval_images: Images for the agreement that is recorded: like `images`, and not among them.
        base_model: Hub id or path of the backbone, for the set's configuration.
        report: Called with a line of text for every degree.

    Returns:
        The plugin set. `config.training["agreement"]` has the cosine of the features to the teacher's on `eval_images`.

    Raises:
        UnsupportedModelError: if the architecture is not supported, or does not write to its residual stream by two
            linear layers.
        DegreeError: if a degree is not one from 0 to `max_r`, or the scale is none.
        ArgumentError: if the model is not in float32, or the scale is 0.
        DatasetError: if there are no images.

    Example:

    ```python
    >>> import torch
    >>> from tocom_hf import fit_plugins
    >>> from transformers import ViTConfig, ViTModel
    >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "image_size": 64}
    >>> model = ViTModel(ViTConfig(num_hidden_layers=2, num_attention_heads=2, **sizes))
    >>> images = [{"pixel_values": torch.rand(3, 64, 64)} for _ in range(8)]
    >>> fit_plugins(model, images, max_r=3, rank=1, base_model="user/vit")
    PluginSet(base_model='user/vit', source_r=0, r=0..3, rank=1, scale=0.1)

    ```
    """
    if require_degree(max_r, "max_r") < 1 or require_degree(rank, "rank") < 1:
        raise DegreeError("max_r and rank must be at least 1.")
    if require_degree(source_r, "source_r") > max_r:
        raise DegreeError(f"source_r={source_r} is above max_r={max_r}.")
    if not require_scale(scale):
        raise ArgumentError("With scale=0 plugins have no effect, so there is nothing to fit.")
    wanted = _degrees(degrees, max_r, source_r)
    backbone = find_backbone(model)
    if get_settings(backbone) is not None:
        raise UnsupportedModelError(
            "The model merges tokens already. Fit plugins to it as transformers loads it: call remove_tome(model), or "
            "instead of TocomModel load the checkpoint with its transformers class."
        )
    if {parameter.dtype for parameter in backbone.module.parameters()} != {torch.float32}:
        raise ArgumentError("Plugins are fitted in float32: load the model with dtype=torch.float32.")
    if not len(images):  # type: ignore[arg-type]
        raise DatasetError("There are no images to fit plugins to.")

    with evaluation_mode(model), torch.no_grad():
        rule = _Rule(recipe or TOME_RECIPE, proportional_attention)
        regression = _Regression(backbone, images, source_r, rule, eval_images)
        try:
            adapters = regression.run(wanted, max_r, rank, scale, report or (lambda line: None))
        finally:
            regression.undo()
    paths = [writer.path for writer in regression.writers[0].both]
    config = PluginSetConfig(
        backbone=BackboneFacts.of(backbone),
        base_model=base_model,
        max_r=max_r,
        source_r=source_r,
        rank=rank,
        target_modules=backbone.find_target_modules(paths),
        trained_scale=scale,
        recommended_scale=scale,
        merging={
            "proportional_attention": proportional_attention,
            **({} if recipe is None else {"recipe": recipe.to_dict()}),
        },
        training={
            "method": "regression",
            "num_images": len(images),  # type: ignore[arg-type]
            "degrees": wanted,
            "hardware": describe_device(next(model.parameters()).device),
            **regression.agreement(wanted),
        },
    )
    return PluginSet(config, adapters)


def _degrees(given: Sequence[int] | None, max_r: int, source_r: int) -> list[int]:
    """The degrees to fit, in order; both ends are among them, because every plugin needs one beyond it."""
    steps = min(8, max_r)
    degrees = [round(max_r * step / steps) for step in range(steps + 1)] if given is None else given
    for degree in degrees:
        if require_degree(degree, "degrees") > max_r:
            raise DegreeError(f"degrees has {degree}, which is above max_r={max_r}.")
    return sorted({*degrees, 0, max_r} - {source_r})


class _Rule(NamedTuple):
    """How teacher and student merge, but for their degree; the names are those of `apply_tome`."""

    recipe: MergeRecipe
    proportional_attention: bool


class _Regression:
    """The updates of a model's weights that make up for a change of the degree, found one degree at a time.

    The weights of the model are changed in place, as the chain of plugins grows; `undo` puts them back.
    """

    def __init__(self, backbone: Backbone, images: Dataset, source_r: int, rule: _Rule, eval_images: Dataset | None):
        self.backbone = backbone
        self.source_r = source_r
        self.rule = rule
        self.writers = find_writers(backbone)
        self.originals = [writer.linear.weight.clone() for writer in self._all_writers()]
        self.objective = Features()
        [self.pixel_values] = self._load(images, len(images))  # type: ignore[arg-type]
        self.eval_batches = [] if eval_images is None else self._load(eval_images, _EVAL_BATCH_SIZE)
        # by degree, without and with plugins
        self.cosines: dict[tuple[int, bool], float] = {}

    def run(
        self, degrees: list[int], max_r: int, rank: int, scale: float, report: Callable[[str], None]
    ) -> dict[int, dict[str, Factors]]:
        """Fit all degrees; returns the plugins by index."""
        references = self._features(self.source_r)
        for degree in degrees if self.eval_batches else ():
            self.cosines[degree, False] = self._cosine(references, degree)
        teacher = self._record_teacher()
        adapters: dict[int, dict[str, Factors]] = {index: {} for index in range(max_r)}
        above = [degree for degree in degrees if degree > self.source_r]
        below = [degree for degree in reversed(degrees) if degree < self.source_r]
        for towards, sign in ((above, 1), (below, -1)):
            nearest = self.source_r
            for degree in towards:
                # from the source degree outwards
                indices = range(nearest, degree) if sign > 0 else range(nearest - 1, degree - 1, -1)
                updates = self._fit(degree, teacher, rank * len(indices))
                for path, (down, up) in updates.items():
                    for place, index in enumerate(indices):
                        # the strongest directions go to different plugins
                        part = slice(place, None, len(indices))
                        adapters[index][path] = _balanced(down[part], up[:, part] / (sign * scale))
                nearest = degree
                if self.eval_batches:
                    self.cosines[degree, True] = self._cosine(references, degree)
                report(self._line(degree))
            self._restore_weights()
        return adapters

    def agreement(self, degrees: list[int]) -> dict[str, Any]:
        """What to record of the images that plugins were not fitted to."""
        if not self.eval_batches:
            return {}
        plain, tocom = ([round(self.cosines[degree, fitted], 6) for degree in degrees] for fitted in (False, True))
        images = sum(len(batch) for batch in self.eval_batches)
        return {"agreement": AgreementGrid([self.source_r], degrees, [plain], [tocom], images).to_dict()}

    def undo(self) -> None:
        """Leave the model as it was."""
        self._restore_weights()
        unset_merging(self.backbone)

    def _record_teacher(self) -> list[tuple[Tokens, Tokens]]:
        """What stands in the residual stream of the teacher behind attention and behind the MLP, by layer."""
        found: list[list[Tokens]] = [[] for _ in self.writers]

        def keep(layer: int, number: int, before: Tokens, read: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            if (
                number == 0
                and layer > 0
                and not torch.allclose(before.hidden_states, found[layer - 1][1].hidden_states, rtol=1e-3, atol=1e-3)
            ):
                raise UnsupportedModelError(
                    f"The layers of {type(self.backbone.module).__name__} do more than scale between these projections "
                    "and the residual stream, so plugins cannot be fitted in closed form. Use tocom distill."
                )
            scale = self.writers[layer].both[number].scale
            found[layer].append(Tokens(before.hidden_states + scale * output, before.positions))
            return output

        self._run(self.source_r, keep)
        return [(behind_attention, behind_mlp) for behind_attention, behind_mlp in found]

    def _fit(
        self, degree: int, teacher: list[tuple[Tokens, Tokens]], rank: int
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Update all writers at one degree, each before anything behind it is computed.

        Returns:
            By path in the backbone, the two factors `(rank, in)` and `(out, rank)` of what was added to the weight, the
            strongest directions first.
        """
        updates: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def mend(layer: int, number: int, before: Tokens, read: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            writer = self.writers[layer].both[number]
            student = Tokens(before.hidden_states + writer.scale * output, before.positions)
            target = teacher[layer][number]
            # where both merge, two tokens may overlap without one being part of the other: such ones do not count
            finer, coarser = student, target
            if target.hidden_states.shape[1] >= student.hidden_states.shape[1]:
                finer, coarser = target, student
            weights = self._weights(coarser) * finer.are_whole_in(coarser).unsqueeze(-1)
            wanted = target.averaged(coarser) - student.averaged(coarser)  # (images, groups, out)
            inputs = Tokens(read, before.positions).averaged(coarser)  # (images, groups, in)
            down, up = _reduced_rank(inputs, wanted, weights, rank)
            scale = writer.scale[:, None]  # (out, 1)
            # a channel that does not reach the residual stream is left alone
            up = torch.where(scale == 0, 0.0, up / scale)  # (out, rank)
            writer.linear.weight += up @ down
            updates[f"{self.backbone.architecture.layers}.{layer}.{writer.path}"] = down, up
            return output + F.linear(F.linear(read, down), up)  # (images, tokens, out)

        self._run(degree, mend)
        return updates

    def _weights(self, tokens: Tokens) -> torch.Tensor:
        """What each token of an image counts: `(images, tokens, 1)`, of sum 1. Merged ones count by their size."""
        protected = self.backbone.protected
        weights = group_sizes(tokens.positions, tokens.hidden_states.shape[1])  # (images, tokens)
        share = _CLASS_SHARE if protected else 0.0
        weights[:, :protected] = share / max(protected, 1)
        patches = weights[:, protected:]
        patches *= (1 - share) / patches.sum(dim=1, keepdim=True)
        return weights.unsqueeze(-1)

    def _run(self, degree: int, act: WriterHook) -> None:
        """Run all images through the model at a degree, with a call back at every writer."""
        set_merging(self.backbone, degree, **self.rule._asdict())
        with watched_writers(self.backbone, self.writers, act):
            self.backbone.module(**model_inputs(self.backbone.module, self.backbone, self.pixel_values))

    def _features(self, degree: int) -> list[torch.Tensor]:
        """What heads read, of the images for evaluation."""
        set_merging(self.backbone, degree, **self.rule._asdict())
        return [self.objective.outputs(self.backbone, batch) for batch in self.eval_batches]

    def _cosine(self, references: list[torch.Tensor], degree: int) -> float:
        pairs = zip(references, self._features(degree), strict=True)
        return torch.cat([self.objective.agreement(reference, found) for reference, found in pairs]).mean().item()

    def _line(self, degree: int) -> str:
        if not self.eval_batches:
            return f"r = {degree} fitted"
        plain, tocom = self.cosines[degree, False], self.cosines[degree, True]
        return f"r = {degree}: cosine to r = {self.source_r} {plain:.4f} without plugins, {tocom:.4f} with them"

    def _load(self, images: Dataset, batch_size: int) -> list[torch.Tensor]:
        device = next(self.backbone.module.parameters()).device
        loader: DataLoader = DataLoader(images, batch_size=batch_size)
        return [batch["pixel_values"].to(device, torch.float32) for batch in loader]

    def _restore_weights(self) -> None:
        for writer, original in zip(self._all_writers(), self.originals, strict=True):
            writer.linear.weight.copy_(original)

    def _all_writers(self) -> list[Writer]:
        return [writer for writers in self.writers for writer in writers.both]


def _reduced_rank(
    inputs: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge regression of reduced rank, with the ridge that carries over best from one half of the images to the other.

    Where none of them comes nearer on the other half than no map at all, the map is zero.

    Args:
        inputs: `(images, tokens, in)`.
        wanted: `(images, tokens, out)`, what a linear map of the inputs shall come near.
        weights: `(images, tokens, 1)`, what each token counts.
        rank: Of the map; more than `out` are zeros.

    Returns:
        The factors of the map, `(rank, in)` and `(out, rank)`, the strongest directions of its outputs first.
    """
    root = weights.sqrt()
    halves = [_normal_equations(inputs[half::2], wanted[half::2], root[half::2]) for half in (0, 1)]
    ridge = _best_ridge(halves)
    gram, moment = (sum(parts) for parts in zip(*halves, strict=True))
    full = torch.zeros_like(moment).T if ridge is None else _ridge_map(gram, moment, ridge)  # (out, in)
    _, directions = torch.linalg.eigh(full @ gram @ full.T)  # (out, out), the strongest last
    up = directions.flip(1)[:, :rank]  # (out, at most rank)
    up = F.pad(up, (0, rank - up.shape[1]))
    return (up.T @ full).float(), up.float()


def _normal_equations(
    inputs: torch.Tensor, wanted: torch.Tensor, root: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The products of inputs with themselves, float64 `(in, in)`, and with what is wanted, `(in, out)`."""
    rows = (inputs * root).flatten(0, 1)  # (rows, in)
    targets = (wanted * root).flatten(0, 1)  # (rows, out)
    return (rows.T @ rows).double(), (rows.T @ targets).double()


def _best_ridge(halves: list[tuple[torch.Tensor, torch.Tensor]]) -> float | None:
    """Of `_RIDGES` the one whose map from each half errs least on the other; `None` where no map errs less."""
    best, least = None, 0.0
    for ridge in _RIDGES:
        change = 0.0
        for (gram, moment), (other_gram, other_moment) in (halves, halves[::-1]):
            found = _ridge_map(gram, moment, ridge)  # (out, in)
            # the squared error there, less that of no map
            change += float(((found @ other_gram) * found).sum() - 2 * (found * other_moment.T).sum())
        if change < least:
            best, least = ridge, change
    return best


def _ridge_map(gram: torch.Tensor, moment: torch.Tensor, ridge: float) -> torch.Tensor:
    """The map `(out, in)` of ridge regression. The ridge is in units of the mean square of the inputs."""
    size = gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    # positive definite, by its ridge
    factor = torch.linalg.cholesky(gram + ridge * size * torch.eye(len(gram), device=gram.device))
    return torch.cholesky_solve(moment, factor).T


def _balanced(down: torch.Tensor, up: torch.Tensor) -> Factors:
    """The two factors of a plugin, on the CPU, with rows of `lora_A` and columns of `lora_B` of the same lengths."""
    length_a = down.norm(dim=1)  # (rank,)
    length_b = up.norm(dim=0)  # (rank,)
    used = (length_a > 0) & (length_b > 0)
    factor = torch.where(used, (length_b / length_a.clamp(min=1e-30)).sqrt(), torch.ones_like(length_a))
    return Factors((down * factor[:, None]).cpu().contiguous(), (up / factor).cpu().contiguous())
