# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""How well a model at degree n agrees with itself at degree m, with and without the chain of plugins between."""

from collections.abc import Callable, Iterable, Sequence

import torch


Run = Callable[[torch.Tensor, int, int], torch.Tensor]
"""`(pixel_values, source_r, target_r)` to what is compared, with the chain from source to target at degree target."""


@torch.no_grad()
def agreement_sums(
    run: Run,
    agreement: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batches: Iterable[torch.Tensor],
    degrees: Sequence[int],
    device: torch.device,
) -> torch.Tensor:
    """Sum up agreement over images, for every pair of degrees.

    Args:
        run: Runs the model.
        agreement: Of two outputs, for each image in [0, 1].
        batches: Finished `pixel_values`.
        degrees: The degrees m, and n.
        device: Where to sum.

    Returns:
        float64 `(2, degrees + 1, degrees)`: first without the chain, then with it; rows are the teacher's degree m,
        columns the student's degree n, and the row behind the last holds the number of images.
    """
    count = len(degrees)
    sums = torch.zeros(2, count + 1, count, dtype=torch.float64, device=device)
    for pixel_values in batches:
        # without a chain, the student at n is the teacher at n
        plain = [run(pixel_values, degree, degree) for degree in degrees]
        for i, source_r in enumerate(degrees):
            for j, target_r in enumerate(degrees):
                with_chain = plain[i] if i == j else run(pixel_values, source_r, target_r)
                sums[0, i, j] += agreement(plain[i], plain[j]).double().sum()
                sums[1, i, j] += agreement(plain[i], with_chain).double().sum()
        sums[:, count] += len(pixel_values)
    return sums


def agreement_grid(sums: torch.Tensor, degrees: Sequence[int]) -> dict:
    """What `agreement_sums` counted, over all processes, as means in [0, 1]: `degrees`, `plain`, `tocom`, `images`."""
    means = (sums[:, :-1] / sums[:, -1:]).tolist()
    rounded = [[[round(value, 6) for value in row] for row in grid] for grid in means]
    return {"degrees": list(degrees), "plain": rounded[0], "tocom": rounded[1], "images": int(sums[0, -1, 0].item())}


def format_grid(grid: dict) -> str:
    """An agreement grid as a table: in each cell without and with the chain, in percent."""
    degrees = grid["degrees"]
    lines = ["teacher m \\ student n " + " ".join(f"{degree:>13}" for degree in degrees)]
    for i, source_r in enumerate(degrees):
        cells = (f"{100 * grid['plain'][i][j]:6.2f}>{100 * grid['tocom'][i][j]:6.2f}" for j in range(len(degrees)))
        lines.append(f"{source_r:>21} " + " ".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)
