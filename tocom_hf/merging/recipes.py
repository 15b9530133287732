# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""How tokens merge at a given cost: what they are matched by, and how many merge in which layer."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F

from tocom_hf.errors import ArgumentError
from tocom_hf.merging.schedule import Schedule, require_degree, resolve_schedule


MATCH_BY = ("key_mean", "keys", "values", "keys_values", "input", "input_key_mean")
_LARGEST_PENALTY = 10.0  # cosines are from -1 to 1
_SMALLEST_ATTENTION = 1e-8  # its logarithm is finite


def _each(name: str, value: Any, require: Callable[[str, Any], Any]) -> Any:
    """A value that holds for all layers or, where it is a list, one for each layer."""
    if not isinstance(value, list | tuple):
        return require(name, value)
    if not value:
        raise ArgumentError(f"{name} must have one entry for each layer, got an empty list.")
    return tuple(require(f"{name}[{layer}]", entry) for layer, entry in enumerate(value))


def _require_match_by(name: str, value: Any) -> str:
    if value not in MATCH_BY:
        raise ArgumentError(f"{name} must be one of {', '.join(MATCH_BY)}, got {value!r:.100}.")
    return value


def _require_penalty(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST_PENALTY:
        raise ArgumentError(
            f"{name} must be a number from {-_LARGEST_PENALTY:g} to {_LARGEST_PENALTY:g}, got {value!r:.100}."
        )
    return float(value)


class MergeRule(NamedTuple):
    """How the tokens of one layer are chosen; see `MergeRecipe`."""

    match_by: str
    size_penalty: float
    attention_penalty: float


TOME_RULE = MergeRule("key_mean", 0.0, 0.0)


@dataclass(frozen=True)
class MergeRecipe:
    """How tokens merge. The default is ToMe's rule (arXiv 2210.09461, section 3).

    A recipe changes which tokens merge; comparing more channels of them than ToMe does costs some FLOPs, which its
    schedules make up for where `find_recipe` wrote them. What it says holds for all layers where it is one value, and
    layer by layer where it is a list with one value for each.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ViTConfig, ViTModel
    >>> from tocom_hf import MergeRecipe, apply_tome
    >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64))
    >>> recipe = MergeRecipe(match_by=["key_mean", "input"], attention_penalty=[0, 0.03], schedules={3: [4, 2]})
    >>> apply_tome(model, r=3, recipe=recipe)(torch.rand(1, 3, 64, 64)).last_hidden_state.shape
    torch.Size([1, 11, 32])

    ```

    Attributes:
        match_by: What tokens are compared by: `key_mean`, the keys averaged over heads (ToMe); `keys` or `values` of
            all heads; `keys_values`, the mean of both similarities; `input`, the normalised input of attention;
            `input_key_mean`, the mean of its similarity and that of `key_mean`.
        size_penalty: What is taken off the similarity of two tokens for each unit of the natural logarithm of the size
            that they would have together. Large groups grow less readily.
        schedules: How many tokens each layer merges at a degree, by degree; other degrees merge the same in every
            layer. What a schedule costs should be what its degree costs: `find_recipe` sees to that.
        attention_penalty: What is taken off the similarity of two tokens for each unit of the natural logarithms of the
            attention that the first class token pays to each, of the mean over heads. What it looks at merges less
            readily. With proportional attention large groups are looked at more. Token fusion by informativeness does
            the like with the attention of all tokens (MCTF, arXiv 2403.10030, section 3.2).

    Raises:
        ArgumentError: if a value is not one of these, or lists are not of the same number of layers.
    """

    match_by: str | Sequence[str] = "key_mean"
    size_penalty: float | Sequence[float] = 0.0
    schedules: Mapping[int, tuple[int, ...]] = field(default_factory=dict, hash=False)
    attention_penalty: float | Sequence[float] = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "match_by", _each("match_by", self.match_by, _require_match_by))
        for name in ("size_penalty", "attention_penalty"):
            object.__setattr__(self, name, _each(name, getattr(self, name), _require_penalty))
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
        if any(schedules.get(0, ())):
            raise ArgumentError("schedules[0] merges tokens, but degree 0 means that none merge. Leave it out.")
        object.__setattr__(self, "schedules", schedules)
        if len({len(values) for values in self._lists()}) > 1:
            raise ArgumentError("All lists of a recipe must have one entry for each layer of the same model.")
        # recipes that do the same are equal
        for name in ("match_by", "size_penalty", "attention_penalty"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(set(value)) == 1:
                object.__setattr__(self, name, value[0])

    def rule(self, layer: int) -> MergeRule:
        """How the tokens of a layer are chosen.

        Raises:
            IndexError: if the recipe has no such layer.
        """
        values: tuple[Any, ...] = (self.match_by, self.size_penalty, self.attention_penalty)
        return MergeRule(*(value[layer] if isinstance(value, tuple) else value for value in values))

    def require_layers(self, num_layers: int) -> None:
        """Make sure that the recipe is one for a model of so many layers.

        Raises:
            ArgumentError: if it was made for another number.
        """
        for values in self._lists():
            if len(values) != num_layers:
                raise ArgumentError(
                    f"The recipe is one for models of {len(values)} layers, and this model has {num_layers}."
                )

    @property
    def reads_attention(self) -> bool:
        """Whether it needs a class token."""
        penalty = self.attention_penalty
        return any(penalty) if isinstance(penalty, tuple) else penalty != 0

    def schedule(self, r: Schedule, num_layers: int) -> tuple[int, ...]:
        """How many tokens each layer merges; takes and raises what `resolve_schedule` does.

        Raises:
            ArgumentError: if the recipe was made for a model with another number of layers.
        """
        self.require_layers(num_layers)
        found = None if isinstance(r, bool | list | tuple) else self.schedules.get(r)
        return resolve_schedule(r, num_layers) if found is None else found

    def _lists(self) -> list[tuple]:
        """All parts that have one entry for each layer."""
        values = (self.match_by, self.size_penalty, self.attention_penalty, *self.schedules.values())
        return [value for value in values if isinstance(value, tuple)]

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON has it."""
        content = asdict(self)
        for name in ("match_by", "size_penalty", "attention_penalty"):
            if isinstance(content[name], tuple):
                content[name] = list(content[name])
        content["schedules"] = {str(degree): list(schedule) for degree, schedule in self.schedules.items()}
        return content

    @classmethod
    def from_dict(cls, content: Any) -> Self:
        """The recipe that `to_dict` wrote.

        Raises:
            ArgumentError: if it is none.
        """
        known = ("match_by", "size_penalty", "attention_penalty", "schedules")
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
    key = key.detach()
    if match_by == "keys_values":
        parts = [key.flatten(2), value.detach().flatten(2)]
    else:
        parts = [hidden_states.detach(), key.mean(dim=2)]
    # the cosine of unit vectors one behind the other is the mean of their cosines
    return torch.cat([F.normalize(part.float(), dim=-1) for part in parts], dim=-1)


@torch.no_grad()
def log_class_attention(
    query: torch.Tensor, key: torch.Tensor, sizes: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """The logarithm of the attention that the first token pays to each token: float32 `(batch, tokens)`.

    Args:
        query: `(batch, queries, heads, head_dim)`, of which the first is that of the class token.
        key: `(batch, tokens, heads, head_dim)`.
        sizes: Float32 `(batch, tokens)`, or `None` where all tokens weigh the same.
        scaling: The factor of the attention logits.
    """
    first = query[:, :1].float().transpose(1, 2)  # (batch, heads, 1, head_dim)
    keys = key.float().permute(0, 2, 3, 1)  # (batch, heads, head_dim, tokens)
    with torch.autocast(key.device.type, enabled=False):
        logits = scaling * torch.matmul(first, keys).squeeze(2)  # (batch, heads, tokens)
    if sizes is not None:
        logits = logits + sizes.log().unsqueeze(1)
    attention = logits.softmax(dim=-1).mean(dim=1)  # (batch, tokens)
    return attention.clamp(min=_SMALLEST_ATTENTION).log()
