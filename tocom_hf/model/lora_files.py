# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Reading the LoRA adapter of a stranger: one state of a repository, safetensors only, and LoRA alone."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from tocom_hf.errors import PluginFileError
from tocom_hf.plugins.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tocom_hf.storage.json_files import read_json
from tocom_hf.storage.repository import Repository, require_small_header
from tocom_hf.storage.transaction import retry_while_saved


if TYPE_CHECKING:
    from peft import LoraConfig

_PREFIX = "base_model.model."
_MAX_RANK = 4096
_MAX_REPETITIONS = 4  # in one regular expression
# what decides which weights change, and by how much
_OPTIONS = {
    "r", "lora_alpha", "target_modules", "exclude_modules", "target_parameters", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layers_pattern", "use_rslora", "use_dora", "lora_bias", "bias", "fan_in_fan_out",
    "modules_to_save",
}  # fmt: skip
# what matters in training only, or describes the adapter
_HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "init_lora_weights", "megatron_core", "qalora_group_size", "ensure_weight_tying",
    "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
# ways to start that change the weights of the base model as well
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class LoraFiles:
    """A LoRA adapter as it was saved.

    Attributes:
        name: Where it came from.
        content: Its `adapter_config.json`.
        weights: Its weights by the names that PEFT saves them under, `base_model.model.{path}.lora_A.weight`.
    """

    name: str
    content: dict[str, Any]
    weights: dict[str, torch.Tensor]

    @classmethod
    def open(cls, name: str | Path, *, subfolder: str = "", **download: Any) -> "LoraFiles":
        """Read an adapter from a local folder or the Hub.

        Args:
            name: Local folder or Hub id.
            subfolder: Where in the repository its files are.
            **download: `revision`, `cache_dir`, `token`, `local_files_only` and `force_download` of `hf_hub_download`.

        Raises:
            PluginFileError: if a file is missing or damaged, or it is not a LoRA adapter in safetensors.
            HubError: if the Hub fails.
        """

        def load() -> "LoraFiles":
            repository = Repository.open(name, probe=ADAPTER_CONFIG, subfolder=subfolder, **download)
            content = read_json(repository.path(ADAPTER_CONFIG))
            _require_lora(str(name), content)
            _require_tame_patterns(str(name), content)
            weights = _read_weights(repository)
            _require_moderate_ranks(str(name), content, weights)
            repository.require_unchanged()
            return cls(str(name), content, weights)

        return retry_while_saved(load)

    @property
    def base_model(self) -> str | None:
        """Hub id or path of the model that it was trained on."""
        name = self.content.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def base_class(self) -> str | None:
        """The class of the model that it was trained on, where it is recorded."""
        mapping = self.content.get("auto_mapping")
        name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        return name if isinstance(name, str) else None

    @property
    def num_labels(self) -> int | None:
        """The number of classes of the head that it brings, or `None` where it brings none."""
        for name, weight in self.weights.items():
            if "classifier" in name and ".lora_" not in name and name.endswith(".weight") and weight.ndim == 2:
                return weight.shape[0]
        return None

    def paths(self) -> list[str]:
        """The paths of the layers that it adapts, in the model that it was trained on."""
        found = (name.partition(".lora_")[0] for name in self.weights if ".lora_" in name)
        # the second parameter of a layer is adapted around the first
        return sorted({path.removeprefix(_PREFIX).removesuffix(".base_layer") for path in found})

    def unused_targets(self) -> list[str]:
        """The names in its target modules that none of its weights is for."""
        names = self.content.get("target_modules")
        paths = [f".{path}" for path in self.paths()]
        named = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
        return [name for name in named if not any(path.endswith(f".{name}") for path in paths)]

    def config(self) -> "LoraConfig":
        """Its configuration for PEFT, which starts at zero and trains nothing."""
        from peft import LoraConfig  # takes a quarter of a second to import

        options = {key: value for key, value in self.content.items() if key in _OPTIONS}
        try:
            return LoraConfig(**options, inference_mode=True)
        except Exception as error:  # whatever PEFT makes of values of a wrong type
            raise PluginFileError(f"{ADAPTER_CONFIG} of {self.name} cannot be used: {error!r:.300}") from error


def _require_lora(name: str, content: dict[str, Any]) -> None:
    if content.get("peft_type") != "LORA":
        raise PluginFileError(
            f"{name} is an adapter of type {content.get('peft_type')!r:.50}, but only LoRA can be merged here. "
            "Merge it with PEFT (merge_and_unload) if it can be, and pass the model."
        )
    start = content.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        raise PluginFileError(
            f"{name} was started with init_lora_weights={start!r:.50}, which changed the weights of the base model as "
            "well. Convert it to an ordinary LoRA first: save_pretrained(..., path_initial_model_for_weight_conversion"
            "=...) of PEFT."
        )
    unknown = {key: value for key, value in content.items() if key not in _OPTIONS | _HARMLESS}
    on = [key for key, value in unknown.items() if value is not False and value not in (None, [], {}, "")]
    if on:
        raise PluginFileError(
            f"{ADAPTER_CONFIG} of {name} switches on {', '.join(sorted(on))[:200]}, which this package does not know. "
            "Merge it with PEFT (merge_and_unload) under the versions that it was made with, and pass the model."
        )


def _require_tame_patterns(name: str, content: dict[str, Any]) -> None:
    """PEFT matches every layer with the regular expressions of the file, some of which would take for ever."""
    strings = [content.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")]
    patterns = [text for text in strings if isinstance(text, str)]
    for key in ("layers_pattern", "rank_pattern", "alpha_pattern"):
        entries = content.get(key)
        patterns += [text for text in entries if isinstance(text, str)] if isinstance(entries, dict | list) else []
    for pattern in patterns:
        if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > _MAX_REPETITIONS:
            raise PluginFileError(
                f"{ADAPTER_CONFIG} of {name} has the pattern {pattern!r:.100}, which may take very long to match: at "
                f"most {_MAX_REPETITIONS} repetitions are accepted, and none of a group. Write it more simply."
            )


def _require_moderate_ranks(name: str, content: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """PEFT makes matrices of the ranks that the configuration names before any weight is compared with them."""
    pattern = content.get("rank_pattern")
    ranks = [content.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    limit = max(_MAX_RANK, *(size for weight in weights.values() for size in weight.shape))
    for rank in ranks:
        if isinstance(rank, int | float) and rank > limit:
            raise PluginFileError(f"{ADAPTER_CONFIG} of {name} names the rank {rank}, which none of its weights has.")


def _read_weights(repository: Repository) -> dict[str, torch.Tensor]:
    try:
        path = repository.path(ADAPTER_WEIGHTS)
    except PluginFileError as error:
        if repository.folder is None and not isinstance(error.__cause__, EntryNotFoundError):
            raise
        raise PluginFileError(
            f"{error} Only safetensors files are read. Load an adapter_model.bin that you trust with PEFT, and save it "
            "anew with save_pretrained, which writes safetensors."
        ) from error
    require_small_header(path)
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise PluginFileError(
            f"{path} is truncated or not a safetensors file ({error}). Download or copy the adapter again."
        ) from error
    if not any(".lora_" in name for name in weights):
        raise PluginFileError(f"{path} holds no LoRA weights (lora_A, lora_B).")
    for name, weight in weights.items():
        if not weight.is_floating_point() or not weight.isfinite().all():
            raise PluginFileError(f"{path}: {name} must hold finite floating-point numbers.")
    if any(name.startswith(_PREFIX) for name in weights):
        return weights
    return {_PREFIX + name: weight for name, weight in weights.items()}
