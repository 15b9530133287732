# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Numbers are functions of their keys, and look random."""

import torch

from tocom_hf.distillation.keyed_random import fold, image_keys, keep_mask, normals, uniforms


KEYS = image_keys(0, torch.zeros(2000, dtype=torch.long), torch.arange(2000))


def split_mix(key, value):
    """SplitMix64's finaliser in Python integers, of the state key + (value + 1) * golden."""
    word = (key + (value + 1) * 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def test_folding_is_split_mix():
    for key in (0, 1, -5, 2**62):
        for value in (0, 1, 77, -7):
            expected = split_mix(key % 2**64, value)
            assert int(fold(torch.tensor(key), value)) % 2**64 == expected


def test_keys_differ_by_seed_epoch_and_image():
    index = torch.arange(500)
    keys = [image_keys(seed, torch.full_like(index, epoch), index) for seed in (0, 1) for epoch in (0, 1)]
    assert len(torch.cat(keys).unique()) == 2000


def test_uniforms_are_uniform_and_independent():
    draws = uniforms(KEYS, 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, bins=10, min=0, max=1)
    assert ((counts - 800).abs() < 5 * 800**0.5).all()
    correlation = torch.corrcoef(draws.T) - torch.eye(4)
    assert correlation.abs().max() < 0.1


def test_normals_are_normal():
    draws = normals(KEYS, 4)
    assert abs(draws.mean()) < 0.05
    assert abs(draws.std() - 1) < 0.05
    assert abs((draws.abs() < 1).float().mean() - 0.6827) < 0.03


def test_masks_keep_the_right_share_and_look_independent():
    mask = keep_mask(KEYS[:64], 50, 96, 0.1)
    assert abs(mask.float().mean() - 0.9) < 0.003
    for dim in ((0, 1), (0, 2), (1, 2)):
        # the spread of sums over two dimensions is that of independent entries
        size = mask.numel() / mask.float().sum(dim).numel()
        spread = mask.float().mean(dim).std()
        assert 0.5 < spread / (0.09 / size) ** 0.5 < 1.6
    drops = (~mask).float()
    together = (drops[:, :-1, :-1] * drops[:, 1:, 1:]).mean()
    assert abs(together - 0.01) < 0.002


def test_an_image_is_drawn_alike_in_every_batch():
    for draw in (
        lambda keys: uniforms(keys, 3),
        lambda keys: normals(keys, 3),
        lambda keys: keep_mask(keys, 4, 5, 0.3),
    ):
        assert torch.equal(draw(KEYS[:8])[3:5], draw(KEYS[3:5]))


def test_nothing_is_dropped_at_zero():
    assert keep_mask(KEYS[:8], 16, 16, 0.0).all()
