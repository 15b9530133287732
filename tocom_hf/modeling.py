# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""`TocomModel`: a transformers model that merges tokens at one degree with weights trained at another."""

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from .architectures import Backbone, find_backbone, supported_types, unsupported
from .budget import Budget
from .calibration import Calibration, choose_degree
from .composition import Composite, require_scale
from .errors import BudgetError, ComposedWeightsError, DegreeError, UnsupportedModelError
from .files import PUSH_ARGUMENTS, upload_folder
from .merging import require_degree
from .patching import apply_tome
from .plugins import PluginSet


PLUGINS_FOLDER = "tocom_plugins"
_HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "subfolder")


@dataclass
class TocomState:
    """What a `TocomModel` knows beyond its transformers class.

    Attributes:
        source_r: The degree that the weights were trained at.
        target_r: The degree that the model runs at.
        scale: The factor s asked for, or `None` for what the plugin set recommends.
        plugins: The plugin set, or `None` for a model that only ever runs at its source degree.
        source_weights: The query and value weights at `source_r` by layer path in the backbone; empty while the model
            runs at that degree.
    """

    source_r: int
    target_r: int
    scale: float | None
    plugins: PluginSet | None
    source_weights: dict[str, torch.Tensor]


class TocomModel(PreTrainedModel):
    """Runs a fine-tuned ViT at another merging degree than it was trained at (ToCom, arXiv 2408.06798).

    `TocomModel.from_pretrained` returns the transformers model itself, of a subclass of its class and of `TocomModel`:
    the forward pass, `pipeline`, `Trainer`, `save_pretrained` and `push_to_hub` work as they do on any model. Plugins
    are folded into the query and value weights, so they cost nothing when the model runs.

    Example:

    ```python
    >>> import torch
    >>> from tocom_hf import TocomModel
    >>> model = TocomModel.from_pretrained(
    ...     "examples/fashion_mnist/checkpoint", plugins="hub_cards/tocom-vit-fashion-mnist", target_r=8
    ... )
    >>> model(pixel_values=torch.zeros(1, 3, 28, 28)).logits.shape
    torch.Size([1, 10])
    >>> model.set_target_r(4)
    >>> with model.at(target_r=0):
    ...     model.target_r
    0

    ```
    """

    _tocom: TocomState

    def __new__(cls, *args, **kwargs):
        if cls is TocomModel:
            raise TypeError("Use TocomModel.from_pretrained(model, plugins=..., source_r=..., target_r=...).")
        return super().__new__(cls)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path | PreTrainedModel,
        *,
        plugins: str | Path | PluginSet | None = None,
        source_r: int | None = None,
        target_r: int | None = None,
        scale: float | None = None,
        target_speedup: float | None = None,
        target_latency_ms: float | None = None,
        target_gflops: float | None = None,
        calibration: Calibration | str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model, merge `target_r` tokens in every layer, and compensate for the change from `source_r`.

        Args:
            pretrained_model_name_or_path: Hub id, local folder, or a loaded model, which is changed in place.
            plugins: Hub id, local folder or `PluginSet` of the model's pre-trained backbone. Not needed for a model
                saved by `TocomModel`, which brings its own, nor where both degrees are equal.
            source_r: The degree that the checkpoint was trained at, 0 for ordinary training. Not needed for
                checkpoints whose configuration records it; must agree with it where both are given.
            target_r: The degree to run at; by default the recorded one, else `source_r`.
            scale: The factor s in front of the plugins; by default what the plugin set recommends.
            target_speedup, target_latency_ms, target_gflops: A wanted cost instead of `target_r`: at least so many
                times the throughput of degree 0, at most so many milliseconds a batch, or at most so many GFLOPs an
                image. The smallest degree that meets it is taken. Time is measured for single images on the device that
                the model is loaded to, unless a calibration is given.
            calibration: What `calibrate` measured, for other batch sizes, devices or machines; or a file that holds it,
                which is written if it is missing.
            **kwargs: Passed to the model class's own `from_pretrained` (`dtype`, `revision`, `token`, ...).

        Returns:
            The transformers model, in evaluation mode unless it was passed in loaded.

        Raises:
            UnsupportedModelError: if the architecture is not supported.
            DegreeError: if a degree is missing, contradicts the configuration or is outside the plugin set.
            BackboneMismatchError: if the plugin set belongs to another backbone.
            PluginFileError: if the plugin set cannot be read.
            BudgetError: if a wanted cost is given twice, beside `target_r`, or cannot be reached.
            CalibrationError: if the calibration cannot be read or belongs to another model.
        """
        budget = Budget.of(target_speedup, target_latency_ms, target_gflops)
        if budget is not None and target_r is not None:
            raise BudgetError(f"Give target_r or {budget.name}, not both.")
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        if isinstance(pretrained_model_name_or_path, nn.Module):
            find_backbone(pretrained_model_name_or_path)  # refuses wrapped models
        if isinstance(pretrained_model_name_or_path, PreTrainedModel):
            config = pretrained_model_name_or_path.config
            if kwargs:
                raise TypeError(f"A loaded model takes no loading arguments, got {', '.join(kwargs)}.")
        else:
            config, kwargs = _load_config(pretrained_model_name_or_path, kwargs)
            model_class = _model_class(config)
        # everything that can be wrong is found before weights are loaded or changed
        recorded = getattr(config, "tocom", None) or {}
        source_r = _resolve_source_r(source_r, recorded)
        target_r = recorded.get("target_r", source_r) if target_r is None else target_r
        target_r = require_degree(target_r, "target_r")
        scale = recorded.get("scale") if scale is None else scale
        scale = None if scale is None else require_scale(scale)
        plugins = _open_plugins(plugins, pretrained_model_name_or_path, recorded, hub)
        if plugins is not None:
            plugins.compose(source_r, target_r, scale)
        elif source_r != target_r:
            raise DegreeError(
                f"Running at target_r={target_r} a checkpoint of source_r={source_r} needs plugins=... "
                "(a Hub id, a folder or a PluginSet). For merging without compensation use apply_tome(model, r)."
            )
        if isinstance(pretrained_model_name_or_path, PreTrainedModel):
            model = pretrained_model_name_or_path
        else:
            model = model_class.from_pretrained(pretrained_model_name_or_path, config=config, **kwargs)
        if budget is not None:
            degrees = [source_r] if plugins is None else range(plugins.config.min_r, plugins.config.max_r + 1)
            target_r = choose_degree(model, budget, degrees, calibration)
        return _equip(model, TocomState(source_r, source_r, scale, plugins, {}), target_r)

    @property
    def source_r(self) -> int:
        """The degree that the weights were trained at."""
        return self._tocom.source_r

    @property
    def target_r(self) -> int:
        """The degree that the model runs at."""
        return self._tocom.target_r

    @property
    def plugins(self) -> PluginSet | None:
        """The plugin set that the model composes from."""
        return self._tocom.plugins

    def set_target_r(self, target_r: int, scale: float | None = None) -> None:
        """Run at another degree from now on: changes the degree of merging and composes the weights anew.

        The weights are always composed from those at `source_r`, so they do not depend on the degrees visited before.

        Args:
            target_r: The degree to run at.
            scale: The factor s; by default the one in use.

        Raises:
            DegreeError: if the degree is outside the plugin set, or there is none.
            PluginFileError: if a plugin cannot be read.
            ComposedWeightsError: if the composed weights were changed from outside.
        """
        self._switch(target_r, self._tocom.scale if scale is None else require_scale(scale))

    def _switch(self, target_r: int, scale: float | None) -> None:
        state = self._tocom
        composite = _compose(state, target_r, scale)
        weights = _weights(find_backbone(self))
        source_weights = self._verified_source_weights(weights)
        if composite is not None and composite.factors:
            source_weights = source_weights or {path: weight.detach().clone() for path, weight in weights.items()}
            fresh = {path: composite.apply(path, weight) for path, weight in source_weights.items()}
        else:
            fresh, source_weights = source_weights, {}
        # nothing has changed so far, and nothing below can fail
        with torch.no_grad():
            for path, weight in fresh.items():
                weights[path].copy_(weight)
        target_r = state.source_r if composite is None else composite.target_r
        self._adopt(TocomState(state.source_r, target_r, scale, state.plugins, source_weights))

    def _adopt(self, state: TocomState) -> None:
        """Take over a new state: merge at its degree, and record it in the configuration."""
        merging = {} if state.plugins is None else state.plugins.config.merging
        apply_tome(self, state.target_r, proportional_attention=merging.get("proportional_attention", True))
        self._tocom = state
        self.config.tocom = {"source_r": state.source_r, "target_r": state.target_r, "scale": state.scale}
        if state.plugins is not None:
            self.config.tocom["plugins"] = PLUGINS_FOLDER

    @contextlib.contextmanager
    def at(self, target_r: int, scale: float | None = None) -> Iterator["TocomModel"]:
        """Run at another degree within a `with` block. Takes what `set_target_r` takes."""
        before = self._tocom
        self.set_target_r(target_r, scale)
        try:
            yield self
        finally:
            self._switch(before.target_r, before.scale)

    def rebase(self) -> None:
        """Declare the weights, as they are now, to be trained at the current `target_r`, which becomes `source_r`.

        This is what fine-tuning a composed model needs before it is saved or run at another degree.
        """
        state = self._tocom
        self._adopt(TocomState(state.target_r, state.target_r, state.scale, state.plugins, {}))

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Save an ordinary checkpoint with the weights at `source_r`, the degrees in its `config.json`, and the plugin
        set in the folder `tocom_plugins`. `TocomModel.from_pretrained(save_directory)` restores all of it.

        Takes what `PreTrainedModel.save_pretrained` takes.
        """
        backbone = find_backbone(self)
        source_weights = self._verified_source_weights(_weights(backbone))
        if source_weights:
            prefix = f"{backbone.path}." if backbone.path else ""
            state_dict = dict(self.state_dict() if state_dict is None else state_dict)
            state_dict |= {f"{prefix}{path}.weight": weight for path, weight in source_weights.items()}
        plugins = self._tocom.plugins
        if plugins is not None and is_main_process:
            plugins.save_pretrained(Path(save_directory) / PLUGINS_FOLDER)
        push = kwargs.pop("push_to_hub", False)
        arguments = {name: kwargs.pop(name) for name in ("repo_id", *PUSH_ARGUMENTS) if push and name in kwargs}
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if push and is_main_process:
            upload_folder(Path(save_directory), arguments.pop("repo_id", Path(save_directory).name), **arguments)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # type: ignore[override]
        """Upload what `save_pretrained` writes, plugins included, in one commit.

        Args:
            repo_id: Hub id of the repository; made if missing.
            **kwargs: `private`, `token`, `revision`, `commit_message` and `create_pr`; others go to `save_pretrained`.

        Returns:
            The address of the commit.
        """
        arguments = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            return upload_folder(folder, repo_id, **arguments)

    def _verified_source_weights(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The kept source weights, after a check that the live ones are still what was composed from them."""
        state = self._tocom
        for path, weight in _composed(state).items():
            if not torch.equal(weight, weights[path]):
                raise ComposedWeightsError(
                    f"{path}.weight was changed while composed for target_r={state.target_r} (by training, or by "
                    "loading a state dict?). Call model.rebase() to make the weights as they are now a checkpoint of "
                    f"source_r={state.target_r}. To train at the source degree, call "
                    f"model.set_target_r({state.source_r}) first."
                )
        return state.source_weights

    def _apply(self, fn, recurse=True):
        """Move or cast the kept source weights along with the parameters, and compose anew in their dtype."""
        super()._apply(fn, recurse)
        state = self._tocom
        if state.source_weights:
            state.source_weights = {path: fn(weight) for path, weight in state.source_weights.items()}
            weights = _weights(find_backbone(self))
            with torch.no_grad():
                for path, weight in _composed(state).items():
                    weights[path].copy_(weight)
        return self

    def __reduce_ex__(self, protocol):
        _, _, *state = tuple(super().__reduce_ex__(protocol))
        return _new_instance, (type(self).__mro__[2],), *state


def _resolve_source_r(source_r: int | None, recorded: dict) -> int:
    known = recorded.get("source_r")
    if source_r is None and known is None:
        raise DegreeError(
            "The checkpoint does not record the degree that it was trained at. "
            "Pass source_r=0 if it was fine-tuned without token merging, else the r that it was trained with."
        )
    if source_r is not None:
        source_r = require_degree(source_r, "source_r")
        if known is not None and source_r != known:
            raise DegreeError(
                f"source_r={source_r} contradicts the checkpoint, whose configuration records source_r={known}. "
                "Leave source_r out to use the recorded one."
            )
        return source_r
    return require_degree(known, "source_r in the configuration")


def _open_plugins(plugins, checkpoint, recorded: dict, hub: dict) -> PluginSet | None:
    if isinstance(plugins, PluginSet):
        return plugins
    if plugins is None and isinstance(checkpoint, TocomModel):
        return checkpoint.plugins
    if plugins is not None:
        # the revision is the checkpoint's; plugins of another repository have their own
        shared = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
        return PluginSet.from_pretrained(plugins, **shared)
    if recorded.get("plugins") and not isinstance(checkpoint, PreTrainedModel):
        subfolder = "/".join(part for part in (hub.get("subfolder"), PLUGINS_FOLDER) if part)
        return PluginSet.from_pretrained(checkpoint, **{**hub, "subfolder": subfolder})
    return None


def _compose(state: TocomState, target_r: int, scale: float | None) -> Composite | None:
    """The composite for a degree; `None` for a model without plugins, which runs at its source degree only."""
    if state.plugins is not None:
        return state.plugins.compose(state.source_r, target_r, scale)
    if require_degree(target_r, "target_r") != state.source_r:
        raise DegreeError(
            f"target_r={target_r} differs from source_r={state.source_r}, and the model has no plugins to compensate. "
            "Load it with TocomModel.from_pretrained(..., plugins=...)."
        )
    return None


def _composed(state: TocomState) -> dict[str, torch.Tensor]:
    """The weights at the current degree, computed from the kept source weights; empty at the source degree."""
    composite = _compose(state, state.target_r, state.scale) if state.source_weights else None
    if composite is None:
        return {}
    return {path: composite.apply(path, weight) for path, weight in state.source_weights.items()}


def _load_config(checkpoint: str | Path, kwargs: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The configuration, with the overrides among the keyword arguments, and the arguments that are left."""
    config = kwargs.pop("config", None)
    if isinstance(config, PreTrainedConfig):
        return config, kwargs
    hub = {key: kwargs.pop(key) for key in _HUB_ARGUMENTS if key in kwargs}
    try:
        config, rest = AutoConfig.from_pretrained(config or checkpoint, return_unused_kwargs=True, **hub, **kwargs)
    except (OSError, ValueError) as error:
        if config is None and find_adapter_config_file(str(checkpoint), **hub):
            raise UnsupportedModelError(
                f"{checkpoint} holds an adapter, not a model. Merge it into its base model first, then compose: "
                "TocomModel.from_pretrained(PeftModel.from_pretrained(base, adapter).merge_and_unload(), ...)."
            ) from error
        raise
    return config, {**hub, **rest}


def _model_class(config: PreTrainedConfig) -> Any:
    """The transformers class that a checkpoint was saved from."""
    if not supported_types(config):
        raise unsupported(config.model_type)
    name = (config.architectures or ["AutoModel"])[0]
    if not hasattr(transformers, name):
        raise UnsupportedModelError(
            f"The checkpoint was saved from {name}, which is not a class of transformers. "
            "Load it with its own class and pass the model to TocomModel.from_pretrained."
        )
    return getattr(transformers, name)


def _weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    """The live weights that plugins fold into, by layer path.

    Raises:
        UnsupportedModelError: if one of them is not an ordinary matrix in memory (quantised, offloaded, adapted).
    """
    weights = {}
    for path, module in backbone.projections().items():
        weight = getattr(module, "weight", None)
        plain = isinstance(module, nn.Linear) and type(weight) is nn.Parameter
        if weight is None or not plain or not weight.is_floating_point() or weight.is_meta:
            raise UnsupportedModelError(
                f"{path} ({type(module).__name__}) is not an ordinary linear layer in memory, so plugins cannot be "
                "folded into its weight. Compose before quantising, load without offloading to disk, and merge other "
                "adapters first (merge_and_unload)."
            )
        weights[path] = weight
    return weights


def _equip(model: PreTrainedModel, state: TocomState, target_r: int) -> PreTrainedModel:
    """Turn a loaded model into a `TocomModel`, or leave it as it was."""
    backbone = find_backbone(model)
    if state.plugins is not None:
        _weights(backbone)
        state.plugins.check_backbone(backbone)
    if isinstance(model, TocomModel):
        model.set_target_r(model.source_r)
    else:
        apply_tome(model, state.source_r)
        _own_config(model)
        model.__class__ = _tocom_class(type(model))
    equipped = cast(TocomModel, model)
    equipped._tocom = state
    equipped.set_target_r(target_r)
    return equipped


def _own_config(model: PreTrainedModel) -> None:
    """Give a model a copy of its configuration, which it may share with other models, before degrees go into it."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        own = copies.get(id(module.__dict__.get("config")))
        if own is not None:
            module.config = own


_CLASSES: dict[type[PreTrainedModel], type[TocomModel]] = {}


def _tocom_class(stock_class: type[PreTrainedModel]) -> type[TocomModel]:
    """The subclass of a transformers class and `TocomModel`, made once per process.

    It keeps the name of the stock class, which pipelines and saved configurations go by.
    """
    if stock_class not in _CLASSES:
        names = ("__module__", "__qualname__", "__doc__", "config_class")
        members = {name: getattr(stock_class, name) for name in names}
        _CLASSES.setdefault(stock_class, type(stock_class.__name__, (TocomModel, stock_class), members))
    return _CLASSES[stock_class]


def _new_instance(stock_class: type[PreTrainedModel]) -> PreTrainedModel:
    cls = _tocom_class(stock_class)
    return cls.__new__(cls)
