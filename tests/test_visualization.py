# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from helpers import reference
from helpers.models import describe, make_model
from PIL import Image

from tocom_hf import UnsupportedInputError, UnsupportedModelError, apply_tome, trace_tokens
from tocom_hf.visualization import paint_groups, tile


def test_the_trace_equals_the_groups_of_the_slow_reference(model, pixel_values):
    model, pixel_values = model.double(), pixel_values.double()
    with torch.no_grad():
        for layers in (1, 3, 4):
            schedule = [9, 0, 7, 3]
            with trace_tokens(apply_tome(model, schedule)) as trace:
                model(pixel_values)
            tokens = model.vit.embeddings(pixel_values)
            _, groups = reference.hidden_states(make_model().double().vit.layers[:layers], tokens, schedule[:layers], 1)
            for image in range(3):
                found = trace.positions[layers - 1][image].tolist()
                expected = {position: token for token, group in enumerate(groups[image]) for position in group}
                assert found == [expected[position] for position in range(65)]


def test_a_trace_leaves_no_hooks(model, pixel_values):
    apply_tome(model, 4)
    before = describe(model)
    with trace_tokens(model) as trace:
        model(pixel_values)
        model(pixel_values[:2])
    assert len(trace.positions) == 4
    assert trace.positions[0].shape == (2, 65)
    assert describe(model) == before


def test_tracing_needs_a_merging_model(model):
    with pytest.raises(UnsupportedModelError, match="apply_tome"), trace_tokens(model):
        pass


def test_groups_are_painted_in_their_mean_colour():
    image = Image.new("RGB", (8, 8), "black")
    image.paste((200, 0, 0), (0, 0, 4, 8))
    # left half one group, the right patches each their own
    picture = np.asarray(paint_groups(image, torch.tensor([0, 1, 0, 2]), (2, 2), size=40, border=1))
    assert picture.shape == (40, 40, 3)
    assert (picture[5, 5] == picture[30, 5]).all()
    assert abs(int(picture[5, 5, 0]) - 200) < 15
    assert picture[10, 20].tolist() in ([255, 255, 255], [0, 0, 0])  # the line between the halves
    assert picture[20, 30].tolist() == [255, 255, 255]  # and between the dark patches
    assert (picture[20, 5] == picture[19, 5]).all()  # none within a group


def test_positions_must_fit_the_grid():
    with pytest.raises(UnsupportedInputError, match=r"needs \(6,\)"):
        paint_groups(Image.new("RGB", (4, 4)), torch.zeros(7, dtype=torch.long), (2, 3))


def test_tiles_are_laid_out_in_rows():
    red, blue = Image.new("RGB", (10, 6), "red"), Image.new("RGB", (10, 6), "blue")
    sheet = tile([[red, blue, red], [blue]], gap=2)
    assert sheet.size == (34, 14)
    assert sheet.getpixel((13, 3)) == (0, 0, 255)
    assert sheet.getpixel((11, 3)) == (255, 255, 255)
