# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""One plugin on disk: an ordinary PEFT LoRA adapter, checked to be nothing else before it is used."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tocom_hf.errors import ArgumentError, PluginFileError
from tocom_hf.merging.architectures import Architecture
from tocom_hf.plugins.composition import Adapter, Factors
from tocom_hf.plugins.config import CONFIG_NAME, PluginSetConfig
from tocom_hf.plugins.fused import is_query_and_value
from tocom_hf.storage.json_files import read_json
from tocom_hf.storage.repository import Repository, require_small_header


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_DTYPES = ("F64", "F32", "F16", "BF16")
# keys of adapter_config.json that switch nothing on
_HARMLESS = {
    "base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout", "init_lora_weights",
    "task_type", "r", "lora_alpha", "target_modules", "peft_type",
}  # fmt: skip
# what PEFT writes for options of variants that are switched off
_UNUSED = {"bias": "none", "megatron_core": "megatron.core", "qalora_group_size": 16}


def read_adapter(repository: Repository, name: str, config: PluginSetConfig) -> dict[str, Factors]:
    """Read a plugin and check it against the configuration of its set.

    Args:
        repository: Where it is.
        name: Its folder, `P_4_5`.
        config: The set's configuration.

    Returns:
        The factors by layer path, float32.

    Raises:
        PluginFileError: if a file is missing, damaged, or not the plain LoRA that the configuration promises.
        HubError: if the Hub fails.
    """
    layers = config.shapes()
    _check_adapter_config(repository.path(f"{name}/{ADAPTER_CONFIG}"), config, list(layers))
    rank = config.lora_rank
    shapes = {_key(layer, "A"): (rank, columns) for layer, (_, columns) in layers.items()}
    shapes |= {_key(layer, "B"): (rows, rank) for layer, (rows, _) in layers.items()}
    path = repository.path(f"{name}/{ADAPTER_WEIGHTS}")
    tensors = _read_tensors(path, shapes)
    adapter = {layer: Factors(tensors[_key(layer, "A")], tensors[_key(layer, "B")]) for layer in layers}
    wrong = [layer for layer in layers if config.joins_query_and_value and not is_query_and_value(adapter[layer])]
    if wrong:
        raise PluginFileError(
            f"{path}: {_key(wrong[0], 'B')} changes more than query and value. Expected zeros but in the query's rows "
            f"of the first {config.rank} columns and in the value's rows of the others; name the layer in "
            f"target_modules of {CONFIG_NAME} to change all of it."
        )
    return adapter


def write_adapter(
    folder: Path, adapter: Adapter, scale: float, base_model: str | None, dtype: torch.dtype = torch.float32
) -> None:
    """Write factors, in a floating dtype, as a PEFT LoRA adapter that multiplies their product by `scale`.

    Raises:
        ArgumentError: if a factor is too large for the dtype. Nothing is written then.
    """
    from peft import LoraConfig  # takes a quarter of a second to import, and reading does not need it

    tensors = {
        _key(path, name): factor.to(dtype).contiguous()
        for path, factors in adapter.items()
        for name, factor in (("A", factors.lora_A), ("B", factors.lora_B))
    }
    too_large = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if too_large:
        raise ArgumentError(
            f"{too_large[0]} has values that are not finite in {str(dtype).removeprefix('torch.')}. Store the set in "
            "float32, and if that fails too, distil it again with a lower learning rate."
        )
    rank = next(iter(adapter.values())).lora_A.shape[0]
    lora = LoraConfig(
        r=rank,
        # PEFT multiplies B A by lora_alpha / r
        lora_alpha=scale * rank,  # type: ignore[arg-type]
        target_modules=_target_modules(adapter),
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
        base_model_name_or_path=base_model,
    )
    # PEFT makes it a set, which is written in another order by every process
    lora.target_modules = _target_modules(adapter)
    lora.save_pretrained(str(folder))
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _target_modules(paths: Iterable[str]) -> list[str]:
    """How PEFT is told where plugins apply: query and value by name, others, which a head may have too, by path."""
    names = {path.rpartition(".")[2] for path in paths}
    return sorted(names if names == {Architecture.query, Architecture.value} else paths)


def _key(layer: str, factor: str) -> str:
    return f"{_PEFT_PREFIX}{layer}.lora_{factor}.weight"


def _check_adapter_config(path: Path, config: PluginSetConfig, layers: list[str]) -> None:
    """Stock PEFT may load this file too, so nothing in it may switch on more than plain LoRA on the listed layers."""
    found = read_json(path)
    wanted = {"peft_type": "LORA", "r": config.lora_rank}
    problems = [
        f"{key} is {found.get(key)!r}, not {value!r}" for key, value in wanted.items() if found.get(key) != value
    ]
    alpha: Any = found.get("lora_alpha")
    promised = config.trained_scale * config.lora_rank
    if not _is_number(alpha) or abs(alpha - promised) > 1e-6:
        problems.append(f"lora_alpha is {alpha!r}, not trained_scale * rank = {promised:g}")
    modules, expected = found.get("target_modules"), _target_modules(layers)
    names = modules if isinstance(modules, list) and all(isinstance(name, str) for name in modules) else []
    if {*names} != {*expected}:
        problems.append(f"target_modules is {modules!r:.200}, not {_shortened(expected)}")
    problems += [f"{key} is {value!r}" for key, value in found.items() if not _is_off(key, value)]
    if problems:
        raise PluginFileError(f"{path} is not the plain LoRA that {CONFIG_NAME} promises: {'; '.join(problems)[:500]}.")


def _shortened(names: list[str]) -> str:
    return repr(names) if len(names) <= 4 else f"{repr(names[:4])[:-1]}, ... ({len(names)} in all)]"


def _is_off(key: str, value: Any) -> bool:
    """Whether an entry of an adapter configuration leaves plain LoRA as it is.

    A key that is not listed here must be empty, whatever PEFT does by default.
    """
    if key in _HARMLESS or value is None or value is False or value in ([], {}, ""):
        return True
    return type(value) is type(_UNUSED.get(key)) and value == _UNUSED[key]


def _read_tensors(path: Path, shapes: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    require_small_header(path, list(shapes))
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            if found.keys() != shapes.keys():
                missing, extra = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
                raise PluginFileError(
                    f"{path} has other tensors than expected: missing {missing[:3]}, extra {extra[:3]}."
                )
            for name, entry in found.items():
                shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
                if shape != shapes[name] or dtype not in _DTYPES:
                    raise PluginFileError(
                        f"{path}: {name} has shape {shape} and dtype {dtype}, expected {shapes[name]} and one of "
                        f"{', '.join(_DTYPES)}."
                    )
            tensors = {name: file.get_tensor(name).float() for name in found}
    except SafetensorError as error:
        raise PluginFileError(
            f"{path} is truncated or not a safetensors file ({error}). Download or copy the plugin set again."
        ) from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise PluginFileError(f"{path}: {name} must hold finite floating-point numbers.")
    return tensors


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
