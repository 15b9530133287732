# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""`tocom_config.json`: what a plugin set is for, and how it was made."""

import itertools
import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from tocom_hf.errors import ArgumentError, BackboneMismatchError, DegreeError, PluginFileError
from tocom_hf.merging.architectures import ARCHITECTURES, find_part, projection_paths, unsupported
from tocom_hf.merging.backbones import Backbone
from tocom_hf.merging.recipes import MergeRecipe
from tocom_hf.storage.json_files import read_json
from tocom_hf.version import __version__


CONFIG_NAME = "tocom_config.json"
FORMAT_VERSION = 1
DTYPES = ("float32", "float16", "bfloat16")
_LIMIT = 65_536  # of degrees, layers and sizes; far above any model's, and small enough to loop over
_MAX_MODULES = 16  # linear layers of a transformer layer; no family has more than 7
_SKETCH_SIZE = 16  # samples per layer
_MIN_COSINE = 0.5  # fine-tuning leaves the sketch above 0.9, another model's is within 0.3 of zero


@dataclass(frozen=True)
class BackboneFacts:
    """A backbone's fingerprint.

    Attributes:
        model_type, hidden_size, num_hidden_layers, num_attention_heads, patch_size: As in its transformers
            configuration. They must be those of any model that the set is used with.
        image_size: For information: fine-tuning at another resolution is fine.
        sketch: Samples of the key projection weights of every layer, which plugins change little, if at all. They tell
            a fine-tuned descendant of the backbone from another model of the same shape.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: Any = None
    image_size: Any = None
    sketch: tuple[float, ...] = ()

    @classmethod
    def of(cls, backbone: Backbone) -> "BackboneFacts":
        measures = backbone.dimensions
        names = [item.name for item in fields(cls) if item.name not in ("model_type", "sketch")]
        shape: dict[str, Any] = {name: _as_json(getattr(measures, name)) for name in names}
        return cls(model_type=backbone.module.config.model_type, **shape, sketch=_sketch(backbone))

    def check(self, backbone: Backbone, base_model: str | None) -> None:
        """Raise `BackboneMismatchError` unless `backbone` is this one, or was fine-tuned from it."""
        found = BackboneFacts.of(backbone)
        names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size"]
        if not may_hold_the_same_weights(found.model_type, self.model_type):
            names.insert(0, "model_type")
        wrong = [
            f"{name} is {getattr(found, name)!r}, the set's is {getattr(self, name)!r}"
            for name in names
            if getattr(found, name) != getattr(self, name)
        ]
        origin = f"The plugin set was distilled for {base_model or 'another backbone'}"
        if wrong:
            raise BackboneMismatchError(f"{origin}, and this model has another shape: {'; '.join(wrong)}.")
        if self.sketch:  # a configuration made by hand may lack it
            cosine = torch.cosine_similarity(torch.tensor(self.sketch), torch.tensor(found.sketch), dim=0).item()
            if not cosine >= _MIN_COSINE:
                raise BackboneMismatchError(
                    f"{origin}, and this model has its shape but was not fine-tuned from it: their key projections "
                    f"have a cosine similarity of {cosine:.2f} (at least {_MIN_COSINE} expected). "
                    "Use the plugin set of this model's own pre-trained backbone. If transformers reported weights as "
                    "MISSING when it loaded the model, those are random."
                )


@dataclass
class PluginSetConfig:
    """The content of `tocom_config.json`.

    Attributes:
        backbone: The backbone's fingerprint.
        base_model: Hub id or path of the backbone.
        base_model_revision: Its commit on the Hub.
        min_r, max_r: The degrees that the set covers.
        source_r: The one degree that weights can be trained at, for a set distilled with
            `DistillationArguments(source_r=...)`; `None` for any. Weights of another degree run at that alone.
        rank: Rank h of one plugin, of each layer that it changes.
        target_modules: The linear layers that plugins apply to, as the shapes of their weights, `(out, in)`, by name in
            a transformer layer; `None` for query and value, as in the paper.
        trained_scale: The factor s during distillation.
        recommended_scale: The factor s to use; picked on held-out data, else `trained_scale`.
        merging: Settings of token merging that the set was distilled with.
        training: What distillation recorded: data set, arguments, figures.
        evaluation: Measured results of checkpoints with the set, one dictionary per data set and pair of degrees:
            `dataset`, `source_r`, `target_r`, the accuracies `plain` and `tocom` in [0, 1], and their `standard_error`;
            where known also `dataset_id` (on the Hub), `split`, `scale`, `checkpoint`.
        license: Identifier of the set's licence on the Hub, such as `apache-2.0`.
        dtype: What the factors are stored in: `float32`, `float16` or `bfloat16`. They are computed with in float32.
        extra: Keys of a file that this version does not know. They survive a round trip.
    """

    backbone: BackboneFacts
    base_model: str | None = None
    base_model_revision: str | None = None
    min_r: int = 0
    max_r: int = 16
    source_r: int | None = None
    rank: int = 2
    target_modules: dict[str, tuple[int, int]] | None = None
    trained_scale: float = 0.1
    recommended_scale: float = 0.1
    merging: dict[str, Any] = field(default_factory=lambda: {"proportional_attention": True})
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    license: str | None = None
    dtype: str = "float32"
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def joins_query_and_value(self) -> bool:
        """Whether the plugins of query and value are one LoRA of a fused layer, see `tocom_hf.plugins.fused`."""
        return self.target_modules is None and ARCHITECTURES[self.backbone.model_type].qkv is not None

    @property
    def lora_rank(self) -> int:
        """Rank of a plugin as PEFT counts it: that of query and of value together, where they are one LoRA."""
        return 2 * self.rank if self.joins_query_and_value else self.rank

    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of the weights that the plugins change, `(out, in)`, by path in the backbone."""
        facts = self.backbone
        paths = projection_paths(facts.model_type, facts.num_hidden_layers, self.target_modules)
        if self.target_modules is None:
            rows = 3 * facts.hidden_size if self.joins_query_and_value else facts.hidden_size
            return dict.fromkeys(paths, (rows, facts.hidden_size))
        # layer by layer, as the paths are
        return dict(zip(paths, itertools.cycle(self.target_modules.values()), strict=False))

    def check(self, backbone: Backbone) -> None:
        """Raise `BackboneMismatchError` unless the plugins fit `backbone`: the set's own, or fine-tuned from it."""
        self.backbone.check(backbone, self.base_model)
        for path, (rows, columns) in self.shapes().items():
            try:
                layer = backbone.module.get_submodule(path)
            except AttributeError:
                layer = None
            found = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
            if found != (rows, columns):
                raise BackboneMismatchError(
                    f"The plugin set was distilled for {self.base_model or 'another backbone'} and changes a weight of "
                    f"{rows} x {columns} in {path}, but there this model has "
                    + ("no linear layer." if layer is None or None in found else f"one of {found[0]} x {found[1]}.")
                )

    @property
    def proportional_attention(self) -> bool:
        """Whether keys weigh by their sizes, as in `apply_tome`."""
        return self.merging.get("proportional_attention", True)

    @property
    def recipe(self) -> MergeRecipe:
        """How tokens merge, as in `apply_tome`."""
        return MergeRecipe.from_dict(self.merging.get("recipe", {}))

    def origin(self) -> dict[str, Any]:
        """What to record of this set in one that was trained on from it."""
        names = ("dataset", "steps", "global_batch_size")
        return {"base_model": self.base_model, **{name: self.training[name] for name in names if name in self.training}}

    def to_json_file(self, path: Path) -> None:
        content = asdict(self)
        extra = content.pop("extra")
        # the version lets an older package say which one to upgrade to
        header = {"format_version": FORMAT_VERSION, "tocom_hf_version": __version__}
        if self.target_modules is None:
            del content["target_modules"]
        if self.dtype == "float32":
            del content["dtype"]
        text = json.dumps({**header, **extra, **content}, indent=2) + "\n"
        path.write_text(text, encoding="utf-8")

    @classmethod
    def from_json_file(cls, path: Path) -> "PluginSetConfig":
        """Read and check a `tocom_config.json`.

        Raises:
            PluginFileError: if it is not valid JSON, lacks a key, has one of a wrong type, or is of a newer format.
            UnsupportedModelError: if its architecture is not supported.
        """
        content = read_json(path)
        version = content.pop("format_version", None)
        if isinstance(version, bool) or version != FORMAT_VERSION:
            raise PluginFileError(
                f"{path} has format_version {version!r:.50}; this tocom_hf, {__version__}, reads version "
                f"{FORMAT_VERSION}. {_upgrade(content)}"
            )
        backbone = _checked(path, content.pop("backbone", None), _BACKBONE_TYPES)
        if backbone["model_type"] not in ARCHITECTURES:
            raise unsupported(backbone["model_type"][:100])
        values = _checked(path, {**_OPTIONAL, **content}, _CONFIG_TYPES)
        numbers = {**backbone, **values}
        for name, (low, high) in _RANGES.items():
            if not low <= numbers[name] <= high:
                raise PluginFileError(f"{path}: {name} must be from {low} to {high}, found {numbers[name]!r:.50}.")
        if values["dtype"] not in DTYPES:
            raise PluginFileError(f"{path}: dtype must be one of {', '.join(DTYPES)}, found {values['dtype']!r:.50}.")
        if values["min_r"] >= values["max_r"]:
            raise PluginFileError(f"{path}: expected min_r < max_r, found {values['min_r']} and {values['max_r']}.")
        if values["source_r"] is not None and not values["min_r"] <= values["source_r"] <= values["max_r"]:
            raise PluginFileError(
                f"{path}: source_r must be from min_r to max_r, or null for any, found {values['source_r']!r:.50}."
            )
        if not isinstance(values["merging"].get("proportional_attention", True), bool):
            raise PluginFileError(f"{path}: merging.proportional_attention must be true or false.")
        _check_recipe(path, values["merging"], backbone["num_hidden_layers"])
        if not all(isinstance(entry, dict) for entry in values["evaluation"]):
            raise PluginFileError(f"{path}: 'evaluation' must be a list of JSON objects.")
        if values["target_modules"] is not None:
            values["target_modules"] = _checked_target_modules(path, values["target_modules"])
        sketch = backbone["sketch"]
        if len(sketch) != _SKETCH_SIZE * backbone["num_hidden_layers"] or not all(map(_is_number, sketch)):
            raise PluginFileError(f"{path}: 'sketch' must be a list of {_SKETCH_SIZE} finite numbers for each layer.")
        known = {*_CONFIG_TYPES, "tocom_hf_version"}
        extra = {key: value for key, value in content.items() if key not in known}
        return cls(backbone=BackboneFacts(**{**backbone, "sketch": tuple(sketch)}), extra=extra, **values)


_NUMBER, _OPTIONAL_TEXT = (int, float), (str, type(None))
_BACKBONE_TYPES = {
    "model_type": str, "hidden_size": int, "num_hidden_layers": int, "num_attention_heads": int, "patch_size": object,
    "image_size": object, "sketch": list,
}  # fmt: skip
_CONFIG_TYPES = {
    "base_model": _OPTIONAL_TEXT, "base_model_revision": _OPTIONAL_TEXT, "min_r": int, "max_r": int,
    "source_r": (int, type(None)), "rank": int, "target_modules": (dict, type(None)), "trained_scale": _NUMBER,
    "recommended_scale": _NUMBER, "merging": dict, "training": dict, "evaluation": list, "license": _OPTIONAL_TEXT,
    "dtype": str,
}  # fmt: skip
# keys that older files lack
_OPTIONAL: dict[str, Any] = {
    "source_r": None, "target_modules": None, "evaluation": [], "license": None, "dtype": "float32",
}  # fmt: skip
_RANGES = {
    "hidden_size": (1, _LIMIT), "num_hidden_layers": (1, _LIMIT), "num_attention_heads": (1, _LIMIT),
    "min_r": (0, _LIMIT), "max_r": (1, _LIMIT), "rank": (1, _LIMIT), "trained_scale": (-1e6, 1e6),
    "recommended_scale": (-1e6, 1e6),
}  # fmt: skip


def _check_recipe(path: Path, merging: dict[str, Any], num_layers: int) -> None:
    """Refuse a merging recipe that is none, or one for another number of layers."""
    try:
        MergeRecipe.from_dict(merging.get("recipe", {})).require_layers(num_layers)
    except (ArgumentError, DegreeError) as error:
        raise PluginFileError(f"{path}: merging.recipe cannot be used. {error}") from error


def _checked_target_modules(path: Path, found: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """The entry of that name, checked."""
    if not 0 < len(found) <= _MAX_MODULES or not all(
        re.fullmatch(r"\w+(\.\w+)*", name) and _is_shape(shape) for name, shape in found.items()
    ):
        raise PluginFileError(
            f"{path}: 'target_modules' must have one to {_MAX_MODULES} shapes [out, in] by the name of a linear layer "
            f"in a transformer layer, found {found!r:.200}."
        )
    return {name: (shape[0], shape[1]) for name, shape in found.items()}


def _is_shape(value: Any) -> bool:
    sizes = value if isinstance(value, list) else []
    return len(sizes) == 2 and all(type(size) is int and 0 < size <= _LIMIT for size in sizes)


def _upgrade(content: dict[str, Any]) -> str:
    """What to install, going by the version that a file of another format says it needs."""
    wanted = content.get("tocom_hf_version")
    if isinstance(wanted, str) and re.fullmatch(r"[0-9][0-9a-z.+]{0,30}", wanted):
        return f"Upgrade with `pip install -U 'tocom-hf>={wanted}'`."
    return "Upgrade with `pip install -U tocom-hf` if the number is larger."


def _checked(path: Path, content: Any, types: dict[str, Any]) -> dict[str, Any]:
    """The entries of a JSON object that `types` lists, all of which must be there and of that type."""
    if not isinstance(content, dict):
        raise PluginFileError(f"{path}: expected a JSON object with {', '.join(types)}, found {content!r:.100}.")
    for key, wanted in types.items():
        if key not in content:
            raise PluginFileError(f"{path} lacks {key!r}. Download or copy the plugin set again.")
        value = content[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not object):
            raise PluginFileError(f"{path}: {key!r} has the wrong type, found {value!r:.100}.")
    return {key: content[key] for key in types}


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBER) and not isinstance(value, bool) and abs(value) < 1e30  # false for NaN


def may_hold_the_same_weights(one: str, other: str) -> bool:
    """Whether models of two types can have the same layers: an autoencoder becomes a ViT, and timm has all of them."""
    rows = ARCHITECTURES[one], ARCHITECTURES[other]
    types = [row.fine_tuned_as or model_type for row, model_type in zip(rows, (one, other), strict=True)]
    return types[0] == types[1] or any(row.reader is not None for row in rows)


def _as_json(value: Any) -> Any:
    """A configuration value as it comes back from JSON, which has no tuples."""
    return list(value) if isinstance(value, tuple) else value


@torch.no_grad()
def _sketch(backbone: Backbone) -> tuple[float, ...]:
    names = backbone.architecture
    samples: list[float] = []
    for layer in backbone.layers:
        attention = find_part(layer, names.attention)
        if names.qkv is None:
            weight = getattr(attention, names.key).weight.flatten()
        else:
            weight = getattr(attention, names.qkv).weight.chunk(3)[1].flatten()
        step = weight.numel() // _SKETCH_SIZE
        index = torch.arange(_SKETCH_SIZE, device=weight.device) * step
        values = weight[index].float().tolist()
        samples += [float(f"{value:.4g}") for value in values]
    return tuple(samples)
