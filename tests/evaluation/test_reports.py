# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
import csv
import json

import pytest
import torch
from helpers.evaluation import make_run
from helpers.pictures import assert_drawn

from tocom_hf.cost.timing import DegreeCost
from tocom_hf.evaluation.reports import Report, gap_closed, won_back


@pytest.fixture
def report():
    runs = [make_run(s, s, seed, 0.9) for s in (0, 4) for seed in (0, 1)]
    runs += [make_run(s, 4 - s, seed, 0.5, 0.7) for s in (0, 4) for seed in (0, 1)]
    return Report({"dataset": "numbers"}, runs, COSTS)


COSTS = [
    DegreeCost(0, (65, 65), 2.0, latency_ms=20.0, images_per_second=50.0, speedup=1.0, rounds=5),
    DegreeCost(4, (65, 61), 1.0, latency_ms=11.0, images_per_second=90.0, speedup=1.8, rounds=5),
]


def test_what_is_saved_is_what_was_measured(report, tmp_path):
    report.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "grid.md", "grid.csv", "grid.json", "heat_map.png", "tradeoff.png",
    }  # fmt: skip
    with (tmp_path / "grid.csv").open() as file:
        rows = {(row["source_r"], row["target_r"], row["method"]): row for row in csv.DictReader(file)}
    cells = {(cell.source_r, cell.target_r): cell for cell in report.cells}
    cell, row = cells[0, 4], rows["0", "4", "paper"]
    assert float(row["accuracy"]) == pytest.approx(100 * cell.compensated["paper"].accuracy)
    assert float(row["gap_closed"]) == pytest.approx(100 * cell.compensated["paper"].gap_closed, abs=0.5)
    assert row["scales"] == "0.1 0.11"
    assert float(row["lost"]) == pytest.approx(100 * (cells[0, 0].plain - cell.plain), abs=0.01)
    assert rows["0", "0", "plain"]["gain"] == rows["0", "0", "plain"]["lost"] == ""
    content = json.loads((tmp_path / "grid.json").read_text())
    assert content["cells"][1]["compensated"]["wide"]["gain"] == cell.compensated["wide"].gain
    for name in ("heat_map.png", "tradeoff.png"):
        assert_drawn(tmp_path / name, 500, 300)


def test_a_report_survives_a_round_trip_with_every_image(report, tmp_path):
    report.save(tmp_path)
    loaded = Report.load(tmp_path / "grid.json")
    assert (loaded.settings, loaded.costs, loaded.cells) == (report.settings, report.costs, report.cells)
    for run, again in zip(report.runs, loaded.runs, strict=True):
        assert torch.equal(run.plain, again.plain)
        assert run.at_scale.keys() == again.at_scale.keys()


def test_the_table_has_the_figures_of_the_cells(report):
    lines = report.markdown().splitlines()
    assert lines[0] == "| source r | method | target r = 0 | target r = 4 |"
    cells = {(cell.source_r, cell.target_r): cell for cell in report.cells}
    cell = cells[0, 4]
    plain = next(line for line in lines if line.startswith("| 0 | plain"))
    assert f"{100 * cell.plain:.1f} ± {100 * cell.plain_se:.1f} |" in plain
    assert f"{100 * cell.compensated['paper'].gap_closed:.0f} % of +{100 * cell.gap:.1f}" in "\n".join(lines)
    assert next(line for line in lines if "GFLOPs" in line) == "|  | GFLOPs | 2.00 | 1.00 |"
    assert "90 (1.80x)" in lines[-1]


def test_a_gap_within_its_error_is_called_so():
    runs = [make_run(0, 4, 0, 0.8, 0.8), make_run(4, 4, 0, 0.82)]
    cell = Report({}, runs, []).cells[0]
    assert cell.gap < 2 * cell.gap_se
    assert "no clear gap" in Report({}, runs, []).markdown()


def test_the_gap_closed_over_cells_is_a_ratio_of_sums(report):
    cells = [cell for cell in report.cells if cell.compensated]
    gains = [cell.compensated["paper"].gain for cell in cells]
    gaps = [cell.gap for cell in cells]
    assert gap_closed(report.cells, "paper") == pytest.approx((sum(gains) / sum(gaps), sum(gaps)))
    assert gap_closed([], "paper") is None


def test_only_what_was_clearly_lost_can_be_won_back():
    runs = [make_run(0, 0, 0, 0.9), make_run(0, 4, 0, 0.5, 0.7)]  # loses
    runs += [make_run(4, 4, 0, 0.5), make_run(4, 0, 0, 0.6, 0.5)]  # is better at the other degree
    cells = {(cell.source_r, cell.target_r): cell for cell in Report({}, runs, []).cells}
    lost = cells[0, 0].plain - cells[0, 4].plain
    gain = cells[0, 4].compensated["paper"].accuracy - cells[0, 4].plain
    assert won_back(cells.values(), "paper") == pytest.approx((gain / lost, lost))
    assert won_back([cells[4, 0], cells[4, 4]], "paper") is None
