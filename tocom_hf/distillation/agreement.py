# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""How often a model at degree n agrees with itself at degree m: on which images, summed up, and what it says."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Subset
from transformers.utils import logging

from tocom_hf.devices import float64_device
from tocom_hf.distillation.augmentation import Augmentation, augment


logger = logging.get_logger(__name__)

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


def held_out_batches(
    dataset: Dataset,
    accelerator: Accelerator,
    batch_size: int,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
) -> Iterator[torch.Tensor]:
    """The part of the images held out that this process looks at, normalised and not augmented.

    Args:
        dataset: Samples with `pixel_values`.
        accelerator: Of this process.
        batch_size: Images of a batch.
        mean, std: As in `augment`.
    """
    processes = accelerator.num_processes
    # as many for each: where weights are sharded, all processes must run the model equally often
    count = len(dataset) // processes * processes  # type: ignore[arg-type]
    own = range(accelerator.process_index, count, processes)
    for batch in DataLoader(Subset(dataset, list(own)), batch_size=batch_size):
        pixel_values = batch["pixel_values"].to(accelerator.device)
        no_keys = torch.zeros(len(pixel_values), dtype=torch.long, device=pixel_values.device)
        yield augment(pixel_values, no_keys, Augmentation(), mean, std)


def warn_of_harm(plain: float, tocom: float, when: str) -> None:
    """Say so where plugins do more harm than good.

    Args:
        plain, tocom: Mean agreement without and with them, in [0, 1].
        when: At which step that is.
    """
    without, with_them = f"{100 * plain:.2f}", f"{100 * tocom:.2f}"
    if float(with_them) < float(without):
        logger.warning(
            f"At {when} the plugins do harm: on images held out the mean agreement of student and teacher at different "
            f"degrees is {with_them} % with them and {without} % without. Lower learning_rate, the more so the larger "
            "max_r is: what the plugins between two degrees change adds up."
        )
