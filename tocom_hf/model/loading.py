# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What `TocomModel.from_pretrained` reads: a checkpoint, its plugins, and the degrees, all checked before use."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from tocom_hf.errors import ArgumentError, DegreeError, PluginFileError, UnsupportedModelError
from tocom_hf.merging.architectures import supported_types, unsupported
from tocom_hf.merging.recipes import MergeRecipe, read_recipe
from tocom_hf.merging.schedule import require_degree
from tocom_hf.merging.timm_models import MODEL_TYPE
from tocom_hf.model.checkpoint import Checkpoint
from tocom_hf.model.lora_files import LoraFiles
from tocom_hf.model.lora_merging import merge_lora
from tocom_hf.plugins.composition import require_scale
from tocom_hf.plugins.plugin_set import PluginSet
from tocom_hf.storage.repository import DOWNLOAD_ARGUMENTS
from tocom_hf.storage.transaction import retry_while_saved


PLUGINS_FOLDER = "tocom_plugins"
# a child of transformers' logger: its verbosity holds for ours
logger = logging.get_logger(f"transformers.{__name__}")


class Opened(NamedTuple):
    """A checkpoint whose weights are still to be loaded.

    Attributes:
        checkpoint: Its files.
        model_class: The transformers class to load.
        config: The configuration.
        arguments: What is left for `from_pretrained` of that class.
    """

    checkpoint: Checkpoint
    model_class: Any
    config: PreTrainedConfig
    arguments: dict[str, Any]


class Loaded(NamedTuple):
    """A model that is still at its source degree, and what it shall become.

    Attributes:
        model: The transformers model, a given one or a new one.
        source_r, target_r: The degrees.
        scale: The factor s asked for, or `None`.
        recipe: How tokens merge.
        plugins: The plugin set, with what lies between the degrees read, or `None`.
        backbone: What the checkpoint records of the part that merges, where the model has several that could.
    """

    model: PreTrainedModel
    source_r: int
    target_r: int
    scale: float | None
    recipe: MergeRecipe
    plugins: PluginSet | None
    backbone: str | None

    @property
    def degrees(self) -> Sequence[int]:
        """The degrees that the model can run at."""
        if self.plugins is None:
            return [self.source_r]
        return range(self.plugins.config.min_r, self.plugins.config.max_r + 1)


def open_checkpoint(name: str | Path, arguments: dict[str, Any], adapter: LoraFiles | None = None) -> Opened:
    """Read the configuration of a checkpoint.

    Args:
        name: Local folder or Hub id.
        arguments: Keyword arguments of `from_pretrained`.
        adapter: An adapter that will be merged into it. Where it brings a head, that is the one to load.
    """
    arguments = dict(arguments)
    if arguments.pop("output_loading_info", False):
        raise ArgumentError(
            "output_loading_info is not supported: the result is one model. Load the checkpoint with transformers "
            "to see what was missing, and pass the loaded model to TocomModel.from_pretrained."
        )
    chosen = {"num_labels", "id2label"} & arguments.keys()
    checkpoint = Checkpoint(name, arguments)
    config, arguments = checkpoint.config(arguments.pop("config", None), arguments)
    model_class = model_class_of(config)
    if adapter is not None and adapter.num_labels is not None:
        model_class = _class_with_head(model_class, config, adapter)
        if config.num_labels != adapter.num_labels and not chosen:
            config.num_labels = adapter.num_labels
            arguments["ignore_mismatched_sizes"] = True  # of the head, which the adapter replaces
    return Opened(checkpoint, model_class, config, arguments)


def load(
    model: str | Path | PreTrainedModel,
    *,
    adapter: str | Path | None,
    plugins: str | Path | PluginSet | None,
    source_r: int | None,
    target_r: int | None,
    scale: float | None,
    recipe: MergeRecipe | str | Path | None,
    arguments: dict[str, Any],
) -> Loaded:
    """Resolve the arguments of `TocomModel.from_pretrained` and load what they name.

    Folders are read in one state: where one is saved anew meanwhile, all is read again.

    Args:
        model, adapter, plugins, source_r, target_r, scale, recipe: As in `TocomModel.from_pretrained`.
        arguments: Its other keyword arguments.
    """
    return retry_while_saved(lambda: _load(model, adapter, plugins, source_r, target_r, scale, recipe, arguments))


def _load(
    model: Any,
    adapter: Any,
    plugins: Any,
    source_r: Any,
    target_r: Any,
    scale: Any,
    recipe: Any,
    arguments: dict[str, Any],
) -> Loaded:
    opened = lora = None
    if isinstance(model, PreTrainedModel):
        if adapter is not None:
            raise ArgumentError(
                "adapter=... is for a checkpoint. Merge an adapter into a loaded model first: "
                "TocomModel.from_pretrained(load_lora(model, adapter), ...)."
            )
        config = model.config
    else:
        if adapter is not None:
            download = {name: arguments[name] for name in DOWNLOAD_ARGUMENTS if name in arguments}
            download.pop("revision", None)  # is the checkpoint's
            lora = LoraFiles.open(adapter, **download)
        opened = open_checkpoint(model, arguments, lora)
        config = opened.config
    checkpoint = None if opened is None else opened.checkpoint
    # everything that can be wrong is found before weights are loaded or changed
    recorded = getattr(config, "tocom", None) or {}
    if not isinstance(recorded, dict):
        raise PluginFileError(
            f"'tocom' in the checkpoint's config.json must be a JSON object, found {recorded!r:.100}."
        )
    source_r = _resolve_source_r(source_r, recorded)
    target_r = require_degree(recorded.get("target_r", source_r) if target_r is None else target_r, "target_r")
    if scale is None and plugins is None:  # another set has its own recommendation
        scale = recorded.get("scale")
    scale = None if scale is None else require_scale(scale)
    plugins = _open_plugins(plugins, model, recorded, checkpoint, needed=source_r != target_r)
    if plugins is not None:
        plugins.require(source_r, target_r, scale)
    elif source_r != target_r:
        raise DegreeError(
            f"Running at target_r={target_r} a checkpoint of source_r={source_r} needs plugins=... "
            "(a Hub id, a folder or a PluginSet). For merging without compensation use apply_tome(model, r)."
        )
    recipe = _resolve_recipe(recipe, recorded, source_r, plugins)
    if opened is not None:
        model = opened.checkpoint.load(opened.model_class, opened.config, opened.arguments)
    if lora is not None:
        merge_lora(model, lora)
    return Loaded(model, source_r, target_r, scale, recipe, plugins, recorded.get("backbone"))


def _class_with_head(model_class: Any, config: PreTrainedConfig, adapter: LoraFiles) -> Any:
    """The class for a checkpoint whose head an adapter brings: the one that it was trained on, as far as is known."""
    recorded = getattr(transformers, adapter.base_class or "", None)
    if isinstance(recorded, type) and issubclass(recorded, PreTrainedModel) and recorded.config_class is type(config):
        return recorded
    if "Classification" in model_class.__name__:
        return model_class
    for automatic in (transformers.AutoModelForImageClassification, transformers.AutoModelForAudioClassification):
        if type(config) in automatic._model_mapping:
            return automatic
    return model_class


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
                "Leave source_r out to use the recorded one; if the weights were trained anew since it was recorded, "
                'correct or delete "tocom" in config.json.'
            )
        return source_r
    return require_degree(known, "source_r in the configuration")


def _resolve_recipe(given: Any, recorded: dict, source_r: int, plugins: PluginSet | None) -> MergeRecipe:
    """How tokens merge, which all who know must agree on: the caller, the checkpoint and the plugin set."""
    known: dict[str, MergeRecipe] = {}
    if given is not None:
        known["recipe=..."] = read_recipe(given)
    if recorded.get("source_r") and recorded["source_r"] == source_r:  # weights of source_r = 0 are of no recipe
        known["the checkpoint, fine-tuned while it merged,"] = _recorded_recipe(recorded)
    if plugins is not None:
        known["the plugin set"] = plugins.config.recipe
    if not known:
        return _recorded_recipe(recorded)
    (name, recipe), *others = known.items()
    for other, found in others:
        if found != recipe:
            raise ArgumentError(
                f"{name} and {other} merge by different recipes, {recipe} and {found}. Weights and plugins made for "
                "one do not fit the other: use a plugin set distilled with the recipe that the checkpoint was "
                "fine-tuned with, or fine-tune with recipe=plugins.config.recipe."
            )
    return recipe


def _recorded_recipe(recorded: dict) -> MergeRecipe:
    try:
        return MergeRecipe.from_dict(recorded.get("recipe", {}))
    except (ArgumentError, DegreeError) as error:
        raise PluginFileError(f"'tocom' in the checkpoint's config.json has no usable recipe. {error}") from error


def _open_plugins(
    plugins: Any, model: Any, recorded: dict, checkpoint: Checkpoint | None, needed: bool
) -> PluginSet | None:
    if isinstance(plugins, PluginSet):
        return plugins
    if plugins is None and isinstance(getattr(model, "plugins", None), PluginSet):  # a TocomModel keeps its own
        return model.plugins
    download = {} if checkpoint is None else {**checkpoint.download}
    download.pop("force_download", None)
    if plugins is not None:
        # the revision is the checkpoint's; plugins of another repository have their own
        download.pop("revision", None)
        return PluginSet.from_pretrained(plugins, **download)
    if recorded.get("plugins") and checkpoint is not None:
        subfolder = "/".join(part for part in (checkpoint.subfolder, PLUGINS_FOLDER) if part)
        download["revision"] = checkpoint.repository.download.get("revision")
        try:
            return PluginSet.from_pretrained(checkpoint.name, subfolder=subfolder, **download)
        except PluginFileError as error:
            if not _is_missing(checkpoint, error):
                raise
            message = (
                f"The configuration of {checkpoint.name} promises a plugin set in {subfolder}, which is missing: "
                "transformers' own save_pretrained does not copy it. Pass plugins=... (a Hub id, a folder or a "
                "PluginSet)"
            )
            if needed:
                raise PluginFileError(f"{message}.") from error
            logger.warning(f"{message} to run at another degree.")
    return None


def _is_missing(checkpoint: Checkpoint, error: Exception) -> bool:
    """Whether a checkpoint has no folder of plugins at all."""
    if checkpoint.repository.folder is None:  # only the configuration of the set was asked for
        return isinstance(error.__cause__, EntryNotFoundError)
    return not (checkpoint.folder / PLUGINS_FOLDER).exists()


def _class_of_timm(config: PreTrainedConfig) -> str | None:
    """The class for a checkpoint as timm writes it, which names none; `None` for all others."""
    if config.model_type != MODEL_TYPE:
        return None
    return "TimmWrapperForImageClassification" if config.num_labels else "TimmWrapperModel"


def model_class_of(config: PreTrainedConfig) -> Any:
    """The transformers class that a checkpoint was saved from."""
    if not supported_types(config):
        raise unsupported(config)
    names = config.architectures or [_class_of_timm(config) or "AutoModel"]
    name = names[0] if isinstance(names, list) else names
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if found is not transformers.AutoModel and not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise UnsupportedModelError(
            f"The checkpoint was saved from {name!r:.100}, which is not a model class of transformers. "
            "Load it with its own class and pass the model to TocomModel.from_pretrained."
        )
    return found
