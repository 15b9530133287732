# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The agreement grid counts what the formula says."""

import numpy as np
import pytest
import torch
from helpers.pictures import assert_drawn

from tocom_hf.devices import float64_device
from tocom_hf.distillation.agreement import agreement_sums
from tocom_hf.plugins.agreement import agreement_grid, format_grid, mean_agreement
from tocom_hf.visualization import plot_agreement


DEGREES = [0, 2, 5]


def run(pixel_values, source_r, target_r):
    """A model whose class is the image's number plus the degree, of which the chain takes back half."""
    degree = target_r if source_r == target_r else (source_r + target_r) // 2
    return (pixel_values + degree) % 7


def agreement(teacher, student):
    return (teacher == student).float()


def grid(sources=DEGREES):
    batches = [torch.arange(5), torch.arange(5, 9)]
    return agreement_grid(
        agreement_sums(run, agreement, batches, sources, DEGREES, torch.device("cpu")), sources, DEGREES
    )


def test_cells_are_means_over_images():
    result = grid()
    assert result["degrees"] == DEGREES
    assert result["images"] == 9
    for i, m in enumerate(DEGREES):
        for j, n in enumerate(DEGREES):
            plain = [float((image + m) % 7 == (image + n) % 7) for image in range(9)]
            chain = n if m == n else (m + n) // 2
            tocom = [float((image + m) % 7 == (image + chain) % 7) for image in range(9)]
            assert result["plain"][i][j] == sum(plain) / 9
            assert result["tocom"][i][j] == sum(tocom) / 9


def test_sums_of_processes_add_up():
    parts = [
        agreement_sums(run, agreement, [images], DEGREES, DEGREES, torch.device("cpu"))
        for images in (torch.arange(4), torch.arange(4, 9))
    ]
    assert agreement_grid(parts[0] + parts[1], DEGREES, DEGREES) == grid()


def test_a_grid_may_have_one_teacher(tmp_path):
    whole, row = grid(), grid(sources=[2])
    assert (row["sources"], row["degrees"]) == ([2], DEGREES)
    assert (row["plain"], row["tocom"]) == (whole["plain"][1:2], whole["tocom"][1:2])
    assert len(format_grid(row).splitlines()) == 2
    plot_agreement(row).savefig(tmp_path / "agreement.png")
    assert_drawn(tmp_path / "agreement.png", 600, 200)


def test_grids_recorded_before_rows_had_a_name_are_square():
    old = {name: value for name, value in grid().items() if name != "sources"}
    assert format_grid(old) == format_grid(grid())


def test_the_table_shows_every_cell():
    lines = format_grid(grid()).splitlines()
    assert len(lines) == 4
    assert lines[1].count("100.00>100.00") == 1


def test_the_mean_leaves_out_pairs_of_the_same_degree():
    one_source = {"sources": [2], "degrees": [0, 2, 4], "plain": [[0.5, 1.0, 0.7]], "tocom": [[0.7, 1.0, 0.9]]}
    assert mean_agreement(one_source) == pytest.approx((0.6, 0.8))
    assert mean_agreement({"degrees": [0], "plain": [[1.0]], "tocom": [[1.0]]}) is None


def test_the_heat_map_has_three_panels(tmp_path):
    figure = plot_agreement(grid())
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["token merging alone", "with ToCom", "difference"]
    figure.savefig(tmp_path / "agreement.png")
    assert_drawn(tmp_path / "agreement.png", 600, 200)
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    cells = grid()
    for title, name in (("token merging alone", "plain"), ("with ToCom", "tocom")):
        written = [text.get_text() for text in panels[title].texts]
        assert written == [f"{100 * value:.1f}" for row in cells[name] for value in row]
    changes = 100 * (np.array(cells["tocom"]) - np.array(cells["plain"]))
    written = [float(text.get_text()) for text in panels["difference"].texts]
    assert written == pytest.approx(changes.flatten(), abs=0.06)


def test_sums_are_exact_where_the_device_can():
    assert float64_device(torch.device("mps")).type == "cpu"  # which has no float64
    assert float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
