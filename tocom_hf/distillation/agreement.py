# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""How often a model at degree n agrees with itself at degree m, summed up over images."""

from collections.abc import Callable, Iterable, Sequence

import torch

from tocom_hf.devices import float64_device


Run = Callable[[torch.Tensor, int, int], torch.Tensor]
"""`(pixel_values, source_r, target_r)` to what is compared, with the chain from source to target at degree target."""


@torch.no_grad()
def agreement_sums(
    run: Run,
    agreement: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batches: Iterable[torch.Tensor],
    sources: Sequence[int],
    degrees: Sequence[int],
    device: torch.device,
) -> torch.Tensor:
    """Sum up agreement over images, for every pair of degrees.

    Args:
        run: Runs the model.
        agreement: Of two outputs, for each image in [0, 1].
        batches: Finished `pixel_values`.
        sources: The degrees m of the teacher, of which all are among `degrees`.
        degrees: The degrees n of the student.
        device: Where to sum, if it has float64; else that is done on the CPU.

    Returns:
        float64 `(2, sources + 1, degrees)`: first without the chain, then with it; rows are the teacher's degree m,
        columns the student's degree n, and the row behind the last holds the number of images.
    """
    device = float64_device(device)
    sums = torch.zeros(2, len(sources) + 1, len(degrees), dtype=torch.float64, device=device)
    for pixel_values in batches:
        # without a chain, the student at n is the teacher at n
        plain = {degree: run(pixel_values, degree, degree) for degree in degrees}
        for i, source_r in enumerate(sources):
            teacher = plain[source_r]
            for j, target_r in enumerate(degrees):
                with_chain = teacher if source_r == target_r else run(pixel_values, source_r, target_r)
                sums[0, i, j] += agreement(teacher, plain[target_r]).to(device).double().sum()
                sums[1, i, j] += agreement(teacher, with_chain).to(device).double().sum()
        sums[:, -1] += len(pixel_values)
    return sums
