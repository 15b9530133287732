# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Which requests share a batch."""

import asyncio

import pytest
import torch

from tocom_hf.serving.policy import DegreePolicy


pytest.importorskip("prometheus_client")


def serve(monkeypatch, waves, patience):
    """The sizes of the batches of a service whose clients come in waves: each when the one before has been answered,
    and within it one after the other, a moment apart."""
    from tocom_hf.serving import batching

    monkeypatch.setattr(batching, "_WAVE_SHARE", 1e9)
    monkeypatch.setattr(batching, "_WAVE_SECONDS", patience)
    batcher = batching.Batcher(None, DegreePolicy({0: 1.0}, 4, 100.0), None, batching.Metrics(), None, 1)
    sizes = []

    def forward(pixel_values, degree):
        sizes.append(len(pixel_values))
        return [[(0, 1.0)]] * len(pixel_values)

    async def client(delay, images):
        await asyncio.sleep(delay)
        answer = await batcher.classify(torch.zeros(images, 3, 4, 4))
        assert len(answer.best) == images

    async def main():
        worker = asyncio.create_task(batcher.run())
        for wave in waves:
            await asyncio.gather(*(client(0.02 * number, images) for number, images in enumerate(wave)))
        worker.cancel()
        await asyncio.wait([worker])

    batcher._forward = forward
    asyncio.run(main())
    return sizes


def test_clients_that_were_answered_together_share_the_next_batch(monkeypatch):
    assert serve(monkeypatch, [[3], [1, 1, 1]], patience=30) == [3, 3]


def test_a_full_batch_is_not_waited_for_longer_than_a_moment(monkeypatch):
    assert serve(monkeypatch, [[3], [1], [1]], patience=0.05) == [3, 1, 1]


def test_whoever_comes_alone_is_served_at_once(monkeypatch):
    assert serve(monkeypatch, [[1], [1], [1, 1]], patience=30) == [1, 1, 1, 1]


def test_more_than_a_full_batch_is_not_waited_for(monkeypatch):
    assert serve(monkeypatch, [[4], [2, 2]], patience=30) == [4, 4]
    assert serve(monkeypatch, [[4], [2, 3]], patience=30) == [4, 2, 3]
