# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The two projections of each layer that write to its residual stream: that of attention and that of the MLP."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
from torch import nn

from tocom_hf.errors import UnsupportedModelError
from tocom_hf.merging.architectures import find_part
from tocom_hf.merging.backbones import Backbone
from tocom_hf.merging.layers import through
from tocom_hf.merging.state import TokenState, running_call
from tocom_hf.merging.tokens import mean_over_groups, output_positions


class Writer(NamedTuple):
    """A linear layer whose output, scaled, is added to the residual stream.

    Attributes:
        path: Its path in the transformer layer.
        linear: The layer.
        scale: What its output is multiplied by, channel by channel, on the way: `(hidden,)`.
    """

    path: str
    linear: nn.Linear
    scale: torch.Tensor


class Tokens(NamedTuple):
    """Tokens at one place of the model.

    Attributes:
        hidden_states: `(images, tokens, hidden)`.
        positions: Which of them each token of the first layer is in: int64 `(images, input tokens)`.
    """

    hidden_states: torch.Tensor
    positions: torch.Tensor

    def averaged(self, groups: "Tokens") -> torch.Tensor:
        """Means over the input tokens that each of some other tokens stands for: `(images, groups, hidden)`."""
        return mean_over_groups(self.hidden_states, self.positions, groups.positions, groups.hidden_states.shape[1])

    def are_whole_in(self, groups: "Tokens") -> torch.Tensor:
        """Which of some coarser tokens stand for whole tokens of these, so that `averaged` mixes in no others.

        Returns:
            float32 `(images, groups)` of ones and zeros.
        """
        images, count, _ = self.hidden_states.shape
        inside = groups.positions  # (images, input tokens)
        first = inside.new_zeros(images, count).scatter_reduce(1, self.positions, inside, "amin", include_self=False)
        last = inside.new_zeros(images, count).scatter_reduce(1, self.positions, inside, "amax", include_self=False)
        whole = (first == last).float().gather(1, self.positions)  # (images, input tokens)
        ones = whole.new_ones(images, groups.hidden_states.shape[1])
        return ones.scatter_reduce(1, inside, whole, "amin")


class LayerWriters(NamedTuple):
    """What writes to the residual stream in one transformer layer.

    Attributes:
        attention: The output projection of attention.
        mlp: The second layer of the MLP.
        norm_after: The norm between them, which reads the residual stream behind attention.
    """

    attention: Writer
    mlp: Writer
    norm_after: nn.Module

    @property
    def both(self) -> tuple[Writer, Writer]:
        """In the order of the layer."""
        return self.attention, self.mlp


WriterHook = Callable[[int, int, Tokens, torch.Tensor, torch.Tensor], torch.Tensor]
"""Called with the number of the layer, 0 for attention or 1 for the MLP, the residual stream that is written to, and
what the linear layer has read and put out. Returns what it shall put out instead."""


def find_writers(backbone: Backbone) -> list[LayerWriters]:
    """The writers of all layers. The model must be in evaluation mode.

    Raises:
        UnsupportedModelError: if a layer has none that is a plain linear layer.
    """
    architecture = backbone.architecture
    found = []
    for layer in backbone.layers:
        branch = architecture.attention_branch
        if architecture.output is not None:
            branch = (f"{architecture.attention}.{architecture.output}", *branch)
        norm_after, *mlp_branch = architecture.mlp_branch
        found.append(
            LayerWriters(
                _last_writer(layer, branch), _last_writer(layer, tuple(mlp_branch)), find_part(layer, norm_after)
            )
        )
    return found


@contextlib.contextmanager
def watched_writers(backbone: Backbone, writers: list[LayerWriters], act: WriterHook) -> Iterator[None]:
    """Call back at every writer while a patched model runs within the `with` block, one call at a time."""
    entering: list[Tokens] = []

    def enter(index: int, layer: nn.Module, args: tuple) -> None:
        hidden_states = args[0]
        if index == 0:
            images, tokens, _ = hidden_states.shape
            positions = torch.arange(tokens, device=hidden_states.device).expand(images, -1)  # (images, tokens)
        else:
            positions = entering[0].positions
        entering[:] = [Tokens(hidden_states, positions)]

    def between(index: int, norm: nn.Module, args: tuple) -> None:
        positions = entering[0].positions
        plan = cast(TokenState, running_call()).plans.get(index)
        if plan is not None:
            positions = output_positions(plan).gather(1, positions)  # (images, input tokens)
        entering[:] = [Tokens(args[0], positions)]

    def write(index: int, number: int, linear: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if args[0].shape[:2] != entering[0].hidden_states.shape[:2]:
            raise UnsupportedModelError(
                f"{type(backbone.module).__name__} computes its tokens in another order of dimensions, so plugins "
                "cannot be fitted to it in closed form. Use tocom distill."
            )
        return act(index, number, entering[0], args[0], output)

    handles = []
    for index, (layer, found) in enumerate(zip(backbone.layers, writers, strict=True)):
        handles.append(layer.register_forward_pre_hook(functools.partial(enter, index)))
        handles.append(found.norm_after.register_forward_pre_hook(functools.partial(between, index)))
        for number, writer in enumerate(found.both):
            handles.append(writer.linear.register_forward_hook(functools.partial(write, index, number)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _last_writer(layer: nn.Module, branch: tuple[str, ...]) -> Writer:
    """The last linear layer of a branch, and what comes behind it as a scale."""
    for index in reversed(range(len(branch))):
        part = find_part(layer, branch[index])
        modules = part.named_modules() if isinstance(part, nn.Module) else ()
        linear = [(name, module) for name, module in modules if isinstance(module, nn.Linear)]
        if linear:
            name, module = linear[-1]
            path = ".".join(filter(None, (branch[index], name)))
            ones = torch.ones(1, 1, module.out_features, device=module.weight.device, dtype=module.weight.dtype)
            with torch.no_grad():
                return Writer(path, module, through(layer, branch[index + 1 :], ones).flatten())
    raise UnsupportedModelError(
        f"{type(layer).__name__} has no linear layer that writes to its residual stream, so plugins cannot be fitted "
        "to it in closed form. Use tocom distill."
    )
