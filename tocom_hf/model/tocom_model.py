# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""`TocomModel`: a transformers model that merges tokens at one degree with weights trained at another."""

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from tocom_hf.cost.budget import Budget
from tocom_hf.cost.calibration import Calibration, choose_degree
from tocom_hf.errors import BudgetError
from tocom_hf.merging.architectures import find_backbone
from tocom_hf.merging.patching import get_schedule, set_merging, unset_merging
from tocom_hf.model.checkpoint import CHECKPOINT_FILES
from tocom_hf.model.folding import TocomState, compose, composed, copy_weights, live_weights, verified_source_weights
from tocom_hf.model.loading import PLUGINS_FOLDER, load
from tocom_hf.model.locks import ReadersWriterLock, SwitchLock
from tocom_hf.plugins.cards import CARD_NAME, checkpoint_card
from tocom_hf.plugins.composition import require_scale
from tocom_hf.plugins.plugin_set import PLUGIN_FILES, PluginSet
from tocom_hf.storage.transaction import scratch_folder, write_folder
from tocom_hf.storage.upload import PUSH_ARGUMENTS, upload_folder


# a child of transformers' logger: its verbosity holds for ours
logger = logging.get_logger(f"transformers.{__name__}")
_SAVED_FILES = (CHECKPOINT_FILES, f"{PLUGINS_FOLDER}/{PLUGIN_FILES}")


class TocomModel(PreTrainedModel):
    """Runs a fine-tuned ViT at another merging degree than it was trained at (ToCom, arXiv 2408.06798).

    `TocomModel.from_pretrained` returns the transformers model itself, of a subclass of its class and of `TocomModel`:
    the forward pass, `pipeline`, `Trainer`, `save_pretrained` and `push_to_hub` work as they do on any model. Plugins
    are folded into the weights of query and value, or of the layers that the set names, so they cost nothing when the
    model runs.

    Threads may run a model while another one switches its degree: a switch waits for the calls under way, and calls see
    the weights of one degree. That holds for `model(...)`, eager or after `model.compile()`. It does not hold for
    `torch.compile(model)`, exported programs, `DataParallel`, and direct calls of a part of the model.

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
    _tocom_lock: ReadersWriterLock
    _tocom_switch: SwitchLock

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
            plugins: Hub id, local folder or `PluginSet` of the model's pre-trained backbone, or one fitted to this
                checkpoint. Not needed for a model saved by `TocomModel`, which brings its own, nor where both degrees
                are equal.
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
            PluginFileError: if the checkpoint or the plugin set cannot be read, or is not what it should be.
            HubError: if the Hub refuses or fails a request, or cannot be reached.
            ArgumentError: if code or pickled weights were to be loaded (`trust_remote_code`, `use_safetensors=False`).
            BudgetError: if a wanted cost is given twice, beside `target_r`, or cannot be reached.
            CalibrationError: if the calibration cannot be read or belongs to another model.
        """
        budget = Budget.of(target_speedup, target_latency_ms, target_gflops)
        if budget is not None and target_r is not None:
            raise BudgetError(f"Give target_r or {budget.name}, not both.")
        if isinstance(pretrained_model_name_or_path, nn.Module):
            find_backbone(pretrained_model_name_or_path)  # refuses wrapped models
        if isinstance(pretrained_model_name_or_path, PreTrainedModel) and kwargs:
            raise TypeError(f"A loaded model takes no loading arguments, got {', '.join(kwargs)}.")
        loaded = load(
            pretrained_model_name_or_path,
            plugins=plugins,
            source_r=source_r,
            target_r=target_r,
            scale=scale,
            arguments=kwargs,
        )
        model, source_r, target_r, scale, plugins = loaded
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

    def __call__(self, *args, **kwargs):
        # Dynamo cannot trace a lock; `model.compile()` compiles what is called from here, so it keeps it.
        # is_compiling() would not do: it is true in every thread while any of them compiles.
        if torch.compiler.is_dynamo_compiling():
            return super().__call__(*args, **kwargs)
        with self._tocom_lock.reading():
            return super().__call__(*args, **kwargs)

    def train(self, mode: bool = True) -> "TocomModel":
        if mode and self._tocom.source_weights:
            logger.warning(
                f"The weights are composed for target_r={self.target_r}; save_pretrained refuses them once they were "
                f"trained. Before training call model.set_target_r({self.source_r}) to train at the source degree, or "
                f"model.rebase() to make them a checkpoint of source_r={self.target_r}."
            )
        return super().train(mode)

    def _switch(self, target_r: int, scale: float | None) -> None:
        with self._tocom_switch:  # one switch at a time; forward calls go on while it composes
            self._switch_alone(target_r, scale)

    def _switch_alone(self, target_r: int, scale: float | None) -> None:
        state = self._tocom
        composite = compose(state, target_r, scale)
        weights = live_weights(find_backbone(self), state.target_modules)
        source_weights = verified_source_weights(state, weights)
        if composite is not None and composite.factors:
            source_weights = source_weights or {path: weight.detach().clone() for path, weight in weights.items()}
            fresh = {path: composite.apply(path, weight) for path, weight in source_weights.items()}
        else:
            fresh, source_weights = source_weights, {}
        # nothing has changed so far
        target_r = state.source_r if composite is None else composite.target_r
        before = {path: weights[path].detach().clone() for path in fresh}
        with self._tocom_lock.writing():
            try:
                copy_weights(fresh, weights)
                self._adopt(TocomState(state.source_r, target_r, scale, state.plugins, source_weights))
            except BaseException:
                copy_weights(before, weights)
                self._adopt(state)
                raise

    def _adopt(self, state: TocomState) -> None:
        """Take over a new state: merge at its degree, and record it in the configuration."""
        merging = {} if state.plugins is None else state.plugins.config.merging
        proportional_attention = merging.get("proportional_attention", True)
        set_merging(self, state.target_r, proportional_attention=proportional_attention, bound=True)
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
        with self._tocom_switch:
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
        push = kwargs.pop("push_to_hub", False)
        hub = {name: kwargs.pop(name) for name in ("repo_id", *PUSH_ARGUMENTS) if push and name in kwargs}
        with self._tocom_switch:  # what is written is one degree
            state_dict = self._source_state_dict(state_dict)
            if not is_main_process or kwargs.get("distributed_checkpoint"):
                # takes part in the gathering of shards; files of several writers cannot be replaced at once
                super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
                return
            with write_folder(save_directory, replaces=_SAVED_FILES) as folder:
                self._write(folder, state_dict, kwargs)
        if push:
            self.push_to_hub(**{"repo_id": Path(save_directory).name, "state_dict": state_dict, **kwargs, **hub})

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # type: ignore[override]
        """Upload what `save_pretrained` writes, plugins included, in one commit.

        Args:
            repo_id: Hub id of the repository; made if missing.
            **kwargs: `private`, `token`, `revision`, `commit_message` and `create_pr`; others go to `save_pretrained`.

        Returns:
            The address of the commit.
        """
        arguments = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs}
        with scratch_folder() as folder:
            with self._tocom_switch:
                self._write(folder, self._source_state_dict(kwargs.pop("state_dict", None)), kwargs)
            plugins = None if self.plugins is None else self.plugins.config
            checkpoint_card(self.config, plugins, repo_id).save(folder / CARD_NAME)
            return upload_folder(folder, repo_id, replaces=_SAVED_FILES, keeps=[CARD_NAME], **arguments)

    def _write(self, folder: Path, state_dict: dict | None, arguments: dict[str, Any]) -> None:
        super().save_pretrained(folder, True, state_dict, **arguments)
        if self._tocom.plugins is not None:
            self._tocom.plugins.write(folder / PLUGINS_FOLDER)

    def _source_state_dict(self, state_dict: dict | None) -> dict | None:
        """A state dict with the weights at `source_r`; `None` where that is what the model has."""
        backbone = find_backbone(self)
        source_weights = verified_source_weights(self._tocom, live_weights(backbone, self._tocom.target_modules))
        if not source_weights:
            return state_dict
        prefix = f"{backbone.path}." if backbone.path else ""
        state_dict = dict(self.state_dict() if state_dict is None else state_dict)
        return state_dict | {f"{prefix}{path}.weight": weight for path, weight in source_weights.items()}

    def _apply(self, fn, recurse=True):
        """Move or cast the kept source weights along with the parameters, and compose anew in their dtype."""
        with self._tocom_switch, self._tocom_lock.writing():
            super()._apply(fn, recurse)
            state = self._tocom
            if state.source_weights:
                state.source_weights = {path: fn(weight) for path, weight in state.source_weights.items()}
                layers = find_backbone(self).projections(state.target_modules)  # perhaps on the meta device
                copy_weights(composed(state), {path: cast(nn.Linear, layer).weight for path, layer in layers.items()})
        return self

    def __reduce_ex__(self, protocol):
        _, _, *state = tuple(super().__reduce_ex__(protocol))
        return _new_instance, (type(self).__mro__[2],), *state


def _equip(model: PreTrainedModel, state: TocomState, target_r: int) -> PreTrainedModel:
    """Turn a loaded model into a `TocomModel`, or leave it as it was."""
    backbone = find_backbone(model)
    if state.plugins is not None:
        live_weights(backbone, None)  # what is quantised or offloaded has no weights to know the backbone by
        state.plugins.check_backbone(backbone)
        live_weights(backbone, state.target_modules)
    if isinstance(model, TocomModel):
        before = model._tocom
        model.set_target_r(model.source_r)
        try:
            model._adopt(state)
            model.set_target_r(target_r)
        except BaseException:
            model._adopt(TocomState(before.source_r, before.source_r, before.scale, before.plugins, {}))
            model._switch(before.target_r, before.scale)
            raise
        return model
    stock_class, schedule, recorded = type(model), get_schedule(model), model.config.__dict__.get("tocom")
    try:
        set_merging(model, state.source_r)
        _own_config(model)
        model.__class__ = _tocom_class(stock_class)
        equipped = cast(TocomModel, model)
        equipped._tocom, equipped._tocom_lock, equipped._tocom_switch = state, ReadersWriterLock(), SwitchLock()
        equipped.set_target_r(target_r)
    except BaseException:
        model.__class__ = stock_class
        for holder, name in (
            (model, "_tocom"),
            (model, "_tocom_lock"),
            (model, "_tocom_switch"),
            (model.config, "tocom"),
        ):
            holder.__dict__.pop(name, None)
        if recorded is not None:
            model.config.tocom = recorded
        if schedule is None:
            unset_merging(model)
        else:
            set_merging(model, list(schedule))
        raise
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
