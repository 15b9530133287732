# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""`TocomModel`: a transformers model that merges tokens at one degree with weights trained at another."""

import contextlib
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
from tocom_hf.errors import BudgetError, UnsupportedModelError
from tocom_hf.merging.backbones import Backbone, find_backbone
from tocom_hf.merging.patching import get_settings, merging_at, set_merging
from tocom_hf.merging.recipes import TOME_RECIPE, MergeRecipe
from tocom_hf.merging.subclassing import RuntimeSubclass
from tocom_hf.model.checkpoint import CHECKPOINT_FILES
from tocom_hf.model.equipping import equip
from tocom_hf.model.folding import (
    TocomState,
    checksum,
    composed_weights,
    composite_for,
    copy_weights,
    live_weights,
    verified_source_weights,
)
from tocom_hf.model.loading import PLUGINS_FOLDER, load
from tocom_hf.model.locks import ReadersWriterLock, SwitchLock
from tocom_hf.model.state_dicts import mark_composed, require_loadable, require_source_weights
from tocom_hf.model.weight_names import with_current_names
from tocom_hf.plugins.cards import CARD_NAME, checkpoint_card
from tocom_hf.plugins.composition import require_scale
from tocom_hf.plugins.plugin_set import PLUGIN_FILES, PluginSet
from tocom_hf.storage.transaction import scratch_folder, write_folder
from tocom_hf.storage.upload import PUSH_ARGUMENTS, upload_folder


# a child of transformers' logger: its verbosity holds for ours
logger = logging.get_logger(f"transformers.{__name__}")
_SAVED_FILES = (CHECKPOINT_FILES, f"{PLUGINS_FOLDER}/{PLUGIN_FILES}")


class TocomModel(RuntimeSubclass, PreTrainedModel):
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
    _tocom_path: str | None
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
        adapter: str | Path | None = None,
        plugins: str | Path | PluginSet | None = None,
        source_r: int | None = None,
        target_r: int | None = None,
        scale: float | None = None,
        target_speedup: float | None = None,
        target_latency_ms: float | None = None,
        target_gflops: float | None = None,
        calibration: Calibration | str | Path | None = None,
        target_image_size: int | tuple[int, int] | None = None,
        recipe: MergeRecipe | str | Path | None = None,
        backbone: str | None = None,
        **kwargs: Any,
    ) -> "TocomModel":
        """Load a model, merge `target_r` tokens in every layer, and compensate for the change from `source_r`.

        Args:
            pretrained_model_name_or_path: Hub id, local folder, or a loaded model, which is changed in place.
            adapter: Hub id or local folder of a LoRA adapter to merge into the weights of a checkpoint first, as
                `load_lora` does.
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
            target_image_size: Height and width in pixels that a wanted cost is meant for; by default those of the
                model's configuration, which of DINOv2 are 518, whatever the images have.
            recipe: How tokens merge, or a file that says it; as in `apply_tome`. Not needed where the plugin set or the
                checkpoint records it; all must agree.
            backbone: Which part merges, for models with several that could; as in `apply_tome`. Not needed for
                checkpoints whose configuration records it.
            **kwargs: Passed to the model class's own `from_pretrained` (`dtype`, `revision`, `token`, ...).

        Returns:
            The transformers model, in evaluation mode unless it was passed in loaded.

        Raises:
            UnsupportedModelError: if the architecture is not supported.
            DegreeError: if a degree is missing, contradicts the configuration or is outside the plugin set.
            BackboneMismatchError: if the plugin set belongs to another backbone.
            PluginFileError: if the checkpoint or the plugin set cannot be read, or is not what it should be.
            HubError: if the Hub refuses or fails a request, or cannot be reached.
            ArgumentError: if code or pickled weights were to be loaded (`trust_remote_code`, `use_safetensors=False`);
                if several parts could merge and `backbone` does not name one; if recipes differ.
            BudgetError: if a wanted cost is given twice, beside `target_r`, or cannot be reached; or
                `target_image_size` without one.
            CalibrationError: if the calibration cannot be read or belongs to another model.
        """
        budget = Budget.of(target_speedup, target_latency_ms, target_gflops)
        if budget is not None and target_r is not None:
            raise BudgetError(f"Give target_r or {budget.name}, not both.")
        if budget is None and target_image_size is not None:
            raise BudgetError(
                "target_image_size says what a wanted cost is meant for: give target_speedup, for instance."
            )
        given = None
        if isinstance(pretrained_model_name_or_path, nn.Module):
            given = find_backbone(pretrained_model_name_or_path, backbone)
            settings = get_settings(given)
            if recipe is None and settings is not None and settings.recipe != TOME_RECIPE:
                recipe = settings.recipe  # of a model that merges by it already
        if given is not None and kwargs:
            raise TypeError(f"A loaded model takes no loading arguments, got {', '.join(kwargs)}.")
        loaded = load(
            pretrained_model_name_or_path,
            adapter=adapter,
            plugins=plugins,
            source_r=source_r,
            target_r=target_r,
            scale=scale,
            recipe=recipe,
            arguments=kwargs,
        )
        found = find_backbone(loaded.model, backbone or loaded.backbone) if given is None else given
        target_r = loaded.target_r
        if budget is not None:
            target_r = choose_degree(found, budget, loaded.degrees, calibration, target_image_size)
        state = TocomState(loaded.source_r, loaded.source_r, loaded.scale, loaded.plugins, loaded.recipe)
        return equip(found, state, target_r, TocomModel)

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

    @property
    def scale(self) -> float | None:
        """The factor s in front of the plugins: the one asked for, else what the plugin set recommends.

        `None` for a model without plugins.
        """
        state = self._tocom
        if state.plugins is None:
            return None
        return state.plugins.config.recommended_scale if state.scale is None else state.scale

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

    def _backbone(self) -> Backbone:
        """The part that merges, which is named where there are several that could."""
        return find_backbone(self, self._tocom_path)

    def _switch(self, target_r: int, scale: float | None) -> None:
        with self._tocom_switch:  # one switch at a time; forward calls go on while it composes
            self._switch_alone(self._backbone(), target_r, scale)

    def _switch_alone(self, backbone: Backbone, target_r: int, scale: float | None) -> None:
        state = self._tocom
        composite = composite_for(state, target_r, scale)
        weights = live_weights(backbone, state.target_modules)
        source_weights = verified_source_weights(state, weights)
        if composite is None:
            after = TocomState(state.source_r, state.source_r, scale, state.plugins, state.recipe)
            fresh = source_weights
        elif not composite.factors:
            after = TocomState(state.source_r, composite.target_r, scale, state.plugins, state.recipe)
            fresh = source_weights
        else:
            if not source_weights:
                source_weights = {path: weight.detach().clone() for path, weight in weights.items()}
            fresh = {path: composite.apply(path, weight) for path, weight in source_weights.items()}
            checksums = {path: checksum(weight) for path, weight in fresh.items()}
            after = TocomState(
                state.source_r, composite.target_r, scale, state.plugins, state.recipe, source_weights, checksums
            )
        # nothing has changed so far
        before = {path: weights[path].detach().clone() for path in fresh}
        with self._tocom_lock.writing():
            try:
                copy_weights(fresh, weights)
                self._adopt(backbone, after)
            except BaseException:
                copy_weights(before, weights)
                self._adopt(backbone, state)
                raise

    def _adopt(self, backbone: Backbone, state: TocomState) -> None:
        """Take over a new state: merge at its degree, and record it in the configuration."""
        set_merging(
            backbone,
            state.target_r,
            proportional_attention=state.plugins is None or state.plugins.config.proportional_attention,
            recipe=state.recipe,
            bound=True,
        )
        self._tocom = state
        self.config.tocom = {"source_r": state.source_r, "target_r": state.target_r, "scale": state.scale}
        if state.recipe != TOME_RECIPE:
            self.config.tocom["recipe"] = state.recipe.to_dict()
        if self._tocom_path is not None:
            self.config.tocom["backbone"] = self._tocom_path
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

    @contextlib.contextmanager
    def plain_at(self, target_r: int) -> Iterator["TocomModel"]:
        """Merge at another degree without compensation within a `with` block: with the weights at `source_r`.

        This is what plugins are compared with. No other thread may run the model meanwhile.

        Args:
            target_r: The degree to merge at; any, whatever the plugin set covers.
        """
        with self.at(self.source_r), merging_at(self._backbone(), target_r):
            yield self

    def rebase(self) -> None:
        """Declare the weights, as they are now, to be trained at the current `target_r`, which becomes `source_r`.

        This is what fine-tuning a composed model needs before it is saved or run at another degree.
        """
        with self._tocom_switch:
            state = self._tocom
            after = TocomState(state.target_r, state.target_r, state.scale, state.plugins, state.recipe)
            self._adopt(self._backbone(), after)

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
        backbone = self._backbone()
        source_weights = verified_source_weights(self._tocom, live_weights(backbone, self._tocom.target_modules))
        if not source_weights:
            require_source_weights(state_dict)
            return state_dict
        prefix = f"{backbone.path}." if backbone.path else ""
        state_dict = dict(self.state_dict() if state_dict is None else state_dict)
        return state_dict | {f"{prefix}{path}.weight": weight for path, weight in source_weights.items()}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        mark_composed(self._tocom, destination, prefix)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        """Load names that transformers writes, as `Trainer` needs, and no weights of another degree.

        torch calls this for the model before it calls it for its parts, whoever wraps the model.
        """
        own = {name.removeprefix(prefix): state_dict[name] for name in state_dict if name.startswith(prefix)}
        current = with_current_names(self, own)
        self._require_loadable(current, local_metadata)
        if current.keys() != own.keys():
            for name in own:
                del state_dict[prefix + name]
            state_dict.update({prefix + name: weight for name, weight in current.items()})
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _require_loadable(self, weights: dict[str, torch.Tensor], local_metadata: dict[str, Any]) -> None:
        try:
            path = self._backbone().path
        except UnsupportedModelError:
            return  # adapters are trained, whose names are not those of the weights
        require_loadable(self._tocom, path, weights, local_metadata)

    def _apply(self, fn, recurse=True):
        """Move or cast the kept source weights along with the parameters, and compose anew in their dtype."""
        with self._tocom_switch, self._tocom_lock.writing():
            super()._apply(fn, recurse)
            state = self._tocom
            if state.source_weights:
                state.source_weights = {path: fn(weight) for path, weight in state.source_weights.items()}
                layers = self._backbone().projections(state.target_modules)
                weights = {path: cast(nn.Linear, layer).weight for path, layer in layers.items()}
                copy_weights(composed_weights(state), weights)
                state.checksums = {path: checksum(weight) for path, weight in weights.items()}
        return self
