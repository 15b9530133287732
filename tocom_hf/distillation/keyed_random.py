# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Random numbers that are a function of a key, not of a generator's state.

Everything random in distillation is drawn from a key of the seed, the epoch and the image. An image is therefore
augmented and dropped out alike in whichever process, batch or worker it is, and a run that resumes needs no generator
states.
"""

import torch


# the finaliser of SplitMix64: two multiplications by odd constants, written as signed 64-bit integers
_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def fold(keys: torch.Tensor, value: torch.Tensor | int) -> torch.Tensor:
    """A new key from a key and a number, such as an image's key and the index of a layer.

    Args:
        keys: int64, any shape.
        value: An int, or int64 of a shape that broadcasts.

    Returns:
        int64 of the broadcast shape; equally likely to be any 64-bit integer.
    """
    if isinstance(value, int):
        value = torch.tensor(value, device=keys.device)
    mixed = keys + (value + 1) * _GOLDEN
    mixed = (mixed ^ _shift(mixed, 30)) * _FIRST
    mixed = (mixed ^ _shift(mixed, 27)) * _SECOND
    return mixed ^ _shift(mixed, 31)


def image_keys(seed: int, epoch: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The keys of images in an epoch, int64, from int64 tensors of one shape."""
    return fold(fold(torch.full_like(index, seed), epoch), index)


def uniforms(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers in [0, 1), uniform and independent: float32 `(batch, count)` for int64 keys `(batch,)`."""
    bits = fold(keys[:, None], torch.arange(count, device=keys.device))
    return (bits >> 40 & 0xFFFFFF).float() / 0x1000000


def normals(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Standard normal numbers by Box and Muller: float32 `(batch, count)` for int64 keys `(batch,)`."""
    radius = (1 - uniforms(fold(keys, 0), count)).log().mul(-2).sqrt()
    return radius * (2 * torch.pi * uniforms(fold(keys, 1), count)).cos()


def keep_mask(keys: torch.Tensor, tokens: int, channels: int, dropout: float) -> torch.Tensor:
    """A dropout mask: bool `(batch, tokens, channels)`, false with probability `dropout`, for int64 keys `(batch,)`.

    An entry is decided by the product, modulo 2^32, of two random odd integers: one of the token, one of the channel.
    So an entry takes one multiplication and one comparison.
    """
    rows = fold(keys[:, None], torch.arange(tokens, device=keys.device)).to(torch.int32) | 1
    columns = fold(fold(keys, -7)[:, None], torch.arange(channels, device=keys.device)).to(torch.int32) | 1
    return rows[:, :, None] * columns[:, None, :] >= int(dropout * 2**32) - 2**31


def _shift(value: torch.Tensor, count: int) -> torch.Tensor:
    """Shift to the right, filling with zeros."""
    return value >> count & ((1 << 64 - count) - 1)
