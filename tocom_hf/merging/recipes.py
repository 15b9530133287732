# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""How tokens merge at a given cost: what they are matched by, and how many merge in which layer."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F

from tocom_hf.errors import ArgumentError
from tocom_hf.merging.schedule import Schedule, require_degree, resolve_schedule


MATCH_BY = ("key_mean", "keys", "values", "keys_values", "input")
_LARGEST_PENALTY = 10.0  # cosines are from -1 to 1


@dataclass(frozen=True)
class MergeRecipe:
    """How tokens merge. The default is ToMe's rule (arXiv 2210.09461, section 3).

    A recipe changes which tokens merge, not how many: degrees stay a measure of cost.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ViTConfig, ViTModel
    >>> from tocom_hf import MergeRecipe, apply_tome
    >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64))
    >>> recipe = MergeRecipe(match_by="input", size_penalty=0.02, schedules={3: [4, 2]})
    >>> apply_tome(model, r=3, recipe=recipe)(torch.rand(1, 3, 64, 64)).last_hidden_state.shape
    torch.Size([1, 11, 32])

    ```

    Attributes:
        match_by: What tokens are compared by: `key_mean`, the keys averaged over heads (ToMe); `keys` or `values` of
            all heads; `keys_values`, the mean of both similarities; `input`, the normalised input of attention.
        size_penalty: What is taken off the similarity of two tokens for each unit of the natural logarithm of the size
            that they would have together. Large groups grow less readily.
        schedules: How many tokens each layer merges at a degree, by degree; other degrees merge the same in every
            layer. What a schedule costs should be what its degree costs: `find_recipe` sees to that.

    Raises:
        ArgumentError: if a value is not one of these.
    """

    match_by: str = "key_mean"
    size_penalty: float = 0.0
    schedules: Mapping[int, tuple[int, ...]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.match_by not in MATCH_BY:
            raise ArgumentError(f"match_by must be one of {', '.join(MATCH_BY)}, got {self.match_by!r:.100}.")
        penalty = self.size_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not abs(penalty) <= _LARGEST_PENALTY:
            raise ArgumentError(
                f"size_penalty must be a number from {-_LARGEST_PENALTY:g} to {_LARGEST_PENALTY:g}, "
                f"got {penalty!r:.100}."
            )
        if not isinstance(self.schedules, Mapping):
            raise ArgumentError(
                "schedules must map a degree to a list of one number of merges for each layer, "
                f"got {self.schedules!r:.100}."
            )
        schedules = {}
        for degree, schedule in self.schedules.items():
            if not isinstance(schedule, list | tuple) or not schedule:
                raise ArgumentError(
                    f"schedules[{degree!r:.20}] must be a list of one number of merges for each layer, "
                    f"got {schedule!r:.100}."
                )
            name = f"schedules[{degree}]"
            merges = [require_degree(r, f"{name}[{layer}]") for layer, r in enumerate(schedule)]
            schedules[require_degree(degree, "a degree of schedules")] = tuple(merges)
        if len({len(schedule) for schedule in schedules.values()}) > 1:
            raise ArgumentError("All schedules of a recipe must have one entry for each layer of the same model.")
        if any(schedules.get(0, ())):
            raise ArgumentError("schedules[0] merges tokens, but degree 0 means that none merge. Leave it out.")
        object.__setattr__(self, "size_penalty", float(penalty))
        object.__setattr__(self, "schedules", schedules)

    def schedule(self, r: Schedule, num_layers: int) -> tuple[int, ...]:
        """How many tokens each layer merges; takes and raises what `resolve_schedule` does.

        Raises:
            ArgumentError: if the recipe was made for a model with another number of layers.
        """
        found = None if isinstance(r, bool | list | tuple) else self.schedules.get(r)
        if found is None:
            return resolve_schedule(r, num_layers)
        if len(found) != num_layers:
            raise ArgumentError(
                f"The recipe has schedules for models of {len(found)} layers, and this model has {num_layers}."
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON has it."""
        content = asdict(self)
        content["schedules"] = {str(degree): list(schedule) for degree, schedule in self.schedules.items()}
        return content

    @classmethod
    def from_dict(cls, content: Any) -> Self:
        """The recipe that `to_dict` wrote.

        Raises:
            ArgumentError: if it is none.
        """
        known = ("match_by", "size_penalty", "schedules")
        if not isinstance(content, dict) or not content.keys() <= {*known}:
            raise ArgumentError(
                f"A merging recipe is a JSON object with {', '.join(known)}, got {content!r:.200}. If another key is "
                "of a newer version, upgrade with `pip install -U tocom-hf`."
            )
        values = dict(content)
        schedules = values.get("schedules", {})
        if isinstance(schedules, dict):
            try:
                values["schedules"] = {int(degree): schedule for degree, schedule in schedules.items()}
            except ValueError:
                raise ArgumentError(
                    f"The degrees of schedules must be integers, got {list(schedules)!r:.200}."
                ) from None
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write the recipe to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a recipe that `save` wrote.

        Raises:
            ArgumentError: if the file cannot be read or holds no recipe.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArgumentError(f"{path} cannot be read as a merging recipe in JSON: {error}") from error
        return cls.from_dict(content)


TOME_RECIPE = MergeRecipe()
"""ToMe's rule."""


def read_recipe(recipe: MergeRecipe | str | Path) -> MergeRecipe:
    """The recipe itself, or the one in a file."""
    return recipe if isinstance(recipe, MergeRecipe) else MergeRecipe.load(recipe)


def matching_metric(match_by: str, hidden_states: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What tokens are compared by, `(batch, tokens, channels)`.

    Args:
        match_by: One of `MATCH_BY`.
        hidden_states: The normalised input of attention, `(batch, tokens, hidden)`.
        key, value: `(batch, tokens, heads, head_dim)`, the keys rotated where attention rotates them by position.
    """
    if match_by == "key_mean":
        return key.detach().mean(dim=2)  # (batch, tokens, head_dim)
    if match_by == "keys":
        return key.detach().flatten(2)  # (batch, tokens, heads * head_dim)
    if match_by == "values":
        return value.detach().flatten(2)
    if match_by == "input":
        return hidden_states.detach()
    # the cosine of unit vectors one behind the other is the mean of their cosines
    return torch.cat([F.normalize(part.detach().flatten(2).float(), dim=-1) for part in (key, value)], dim=-1)
