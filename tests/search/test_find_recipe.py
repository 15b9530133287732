# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The search for a recipe: what it measures, what it keeps, and how it goes on."""

import itertools
from argparse import Namespace

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import Dataset, Features, Image
from helpers.models import describe, make_model
from PIL import Image as Pictures

from tocom_hf import ArgumentError, DatasetError, DegreeError, MergeRecipe, apply_tome, count_flops, find_recipe
from tocom_hf.cli.find_recipe import main
from tocom_hf.cli.samples import SampleKind, load_samples_and_more
from tocom_hf.cost.flops import Example
from tocom_hf.merging.backbones import find_backbone
from tocom_hf.merging.recipes import TOME_RECIPE
from tocom_hf.search import find_recipe as module
from tocom_hf.search.flop_model import FlopModel


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(12, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic")
    return [{"pixel_values": image} for image in smooth]


def features(recipe, degree, pixel_values):
    """The class feature of the model that merges by a recipe, float64 `(images, hidden)`."""
    with torch.no_grad():
        states = apply_tome(make_model(hf.ViTModel), degree, recipe=recipe)(pixel_values).last_hidden_state
    return states[:, 0].double().numpy()


def whitened(dense):
    """The inverse of the correlations of some features, shrunken as their number asks for, and their spread."""
    rows = dense - dense.mean(axis=0)
    rows /= rows.std(axis=0)
    images, channels = rows.shape
    share = max(0.1, 1 - images / (2 * channels))
    inverse = np.linalg.inv((1 - share) * rows.T @ rows / images + share * np.eye(channels))
    return inverse / np.mean([row @ inverse @ row for row in rows]), dense.std(axis=0)


@pytest.fixture(scope="module")
def found(images):
    return find_recipe(make_model(hf.ViTModel), images, [4, 0, 8], max_evaluations=20, batch_size=5)


@pytest.mark.parametrize("more", [0, 200])
def test_what_it_reports_is_the_distance_to_the_untouched_model(found, images, more):
    """In units of the spread of its features over all images, and over further ones."""
    further = list(torch.randn(more, 3, 32, 32, generator=torch.Generator().manual_seed(6)))
    if more:
        spread_images = [{"pixel_values": image} for image in further]
        found = find_recipe(make_model(hf.ViTModel), images, [4], spread_images=spread_images, max_evaluations=0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    pixel_values = torch.stack([image["pixel_values"] for image in images])
    dense = features(None, 0, pixel_values)
    all_images = torch.cat([pixel_values, torch.stack(further)]) if more else pixel_values
    inverse, spread = whitened(features(None, 0, all_images))
    for row in found.results:
        for half, value in ((order[::2], row.distance), (order[1::2], row.held_out)):
            differences = (features(row.recipe, row.degree, pixel_values[half]) - dense[half]) / spread
            expected = np.mean([difference @ inverse @ difference for difference in differences])
            assert value == pytest.approx(expected, rel=1e-3)


def test_every_choice_is_better_and_none_costs_more(found):
    assert {row.degree for row in found.results} == {4, 8}
    assert len(found.results) > 2, "nothing was found"
    for degree, group in itertools.groupby(found.results, key=lambda row: row.degree):
        rows = list(group)
        assert rows[0].what == "ToMe"
        assert rows[0].recipe == TOME_RECIPE
        assert rows[-1].distance < rows[0].distance
        budget = count_flops(make_model(hf.ViTModel), degree)
        for row in rows:
            model = apply_tome(make_model(hf.ViTModel), 0, recipe=row.recipe)
            assert count_flops(model, degree) == round(row.gflops * 1e9) <= budget


def test_flops_of_any_recipe_and_schedule_follow_from_a_few():
    model = make_model(hf.ViTModel)
    backbone = find_backbone(model)
    example = Example.of(backbone, None, 1)

    def count(recipe, schedule):
        apply_tome(model, 0, recipe=recipe)
        with torch.no_grad():
            return example.count_at(list(schedule)).flops

    flops = FlopModel(count, ("key_mean", "input", "keys_values"), True, 65, 1, 4)
    for recipe in (
        MergeRecipe(),
        MergeRecipe("keys_values", attention_penalty=0.1),
        MergeRecipe(["key_mean", "input", "keys_values", "key_mean"], attention_penalty=[0, 0.1, 0, 0.2]),
    ):
        for schedule in ([5, 5, 5, 5], [0, 9, 0, 20], [32, 30, 1, 1], [1, 2, 3, 4]):
            assert flops(recipe, schedule) == pytest.approx(count(recipe, schedule), rel=1e-9)


def test_the_first_layers_get_a_rule_that_suits_them(images, monkeypatch):
    """Here the first two are better by keys, the others by their input and what the class token looks at."""

    class Judge(module.Judge):
        def distances(self, recipe, degree):
            value = 4.0
            for layer in range(4):
                rule = recipe.rule(layer)
                value -= 0.5 * (rule.match_by == "keys") if layer < 2 else 0.6 * (rule.match_by == "input")
                value += 0.5 * (rule.attention_penalty > 0) if layer < 2 else 0.1 * (rule.attention_penalty != 0.05)
            return torch.full((6,), value, dtype=torch.float64)

    monkeypatch.setattr(module, "Judge", Judge)
    recipes = []
    for count in (0, 4):
        found = find_recipe(make_model(hf.ViTModel), images, [4, 8], first_layers=count, max_evaluations=0)
        recipes.append(found.recipe)
    assert recipes[0].match_by == "input"
    assert recipes[0].attention_penalty == 0
    assert [recipes[1].rule(layer).match_by for layer in range(4)] == ["keys", "keys", "input", "input"]
    assert recipes[1].attention_penalty == (0, 0, 0.05, 0.05)
    assert found.results[-1].what == "keys in the first 2 layers, attention penalty 0.05 in the others"


def test_a_model_without_a_class_token_is_not_asked_what_it_looks_at(images):
    config = hf.SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=4
    )
    model = hf.SiglipVisionModel(config)
    found = find_recipe(model, images, [4], match_by=["key_mean", "input"], max_evaluations=1)
    assert not found.recipe.reads_attention


def test_no_degree_up_to_the_largest_costs_more_than_tomes_rule(images, monkeypatch):
    """Comparing more channels costs more, so that more tokens have to merge."""

    class Judge(module.Judge):
        def distances(self, recipe, degree):
            return torch.full((6,), 2.0 - (recipe.match_by == "keys_values"), dtype=torch.float64)

    monkeypatch.setattr(module, "Judge", Judge)
    arguments = {"match_by": ["keys_values"], "size_penalties": [], "attention_penalties": [], "max_evaluations": 0}
    found = find_recipe(make_model(hf.ViTModel), images, [8], **arguments)
    assert found.recipe.match_by == "keys_values"
    for degree in range(1, 9):
        budget = count_flops(make_model(hf.ViTModel), degree)
        assert count_flops(apply_tome(make_model(hf.ViTModel), 0, recipe=found.recipe), degree) <= budget
        assert sum(found.recipe.schedule(degree, 4)) > 4 * degree


def test_a_degree_at_which_all_tokens_merge_ends_the_search(images, monkeypatch):
    """There no schedule can make up for what comparing more channels costs."""

    class Judge(module.Judge):
        def distances(self, recipe, degree):
            return torch.full((6,), 2.0 - (recipe.match_by == "keys_values"), dtype=torch.float64)

    monkeypatch.setattr(module, "Judge", Judge)
    found = find_recipe(make_model(hf.ViTModel), images, [32], max_evaluations=2)
    assert found.recipe == TOME_RECIPE


@pytest.mark.parametrize("slope", [0.25, 1.0])
def test_decreasing_schedules_take_all_of_the_flops_of_their_degree(images, monkeypatch, slope):
    """The only candidate here, so that every recipe that is looked at is one."""
    seen = []

    class Judge(module.Judge):
        def distances(self, recipe, degree):
            seen.append(recipe)
            return torch.zeros(6, dtype=torch.float64)

    monkeypatch.setattr(module, "Judge", Judge)
    monkeypatch.setattr(module, "_SLOPES", (slope,))
    nothing = {"match_by": [], "size_penalties": [], "attention_penalties": []}
    find_recipe(make_model(hf.ViTModel), images, [8], max_evaluations=1, **nothing)
    [merges] = {recipe.schedules[8] for recipe in seen if 8 in recipe.schedules}
    assert list(merges) == sorted(merges, reverse=True)
    assert merges[0] > merges[-1]

    def flops(schedule):
        recipe = MergeRecipe(schedules={8: schedule})
        return count_flops(apply_tome(make_model(hf.ViTModel), 0, recipe=recipe), 8)

    budget = count_flops(make_model(hf.ViTModel), 8)
    assert flops(merges) <= budget < flops(tuple(count - 1 for count in merges))


def test_the_last_recipe_is_the_one_that_is_returned(found):
    for degree in (4, 8):
        last = [row for row in found.results if row.degree == degree][-1]
        assert last.recipe.schedule(degree, 4) == found.recipe.schedule(degree, 4)
        assert last.recipe.match_by == found.recipe.match_by


def test_the_model_is_left_as_it_was_and_the_search_can_be_repeated(found, images, tmp_path):
    model = make_model(hf.ViTModel)
    before = describe(model)
    progress = tmp_path / "progress.json"
    again = find_recipe(model, images, [4, 8], max_evaluations=20, batch_size=5, progress=progress)
    assert describe(model) == before
    assert again == found
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["progress-0.json", "progress-1.json"]


def test_a_search_goes_on_where_it_stopped(images, tmp_path, found):
    """Cut off in the middle, it ends as the whole one did."""

    class StopSearchError(Exception):
        pass

    def stop(line):
        raise StopSearchError

    arguments = {"max_evaluations": 20, "batch_size": 5, "progress": tmp_path / "progress.json"}
    with pytest.raises(StopSearchError):
        find_recipe(make_model(hf.ViTModel), images, [4, 8], report=stop, **arguments)
    assert find_recipe(make_model(hf.ViTModel), images, [4, 8], **arguments) == found
    with pytest.raises(ArgumentError, match="another model, other images or another seed"):
        find_recipe(make_model(hf.ViTModel, seed=1), images, [4, 8], **arguments)


def test_what_was_measured_is_not_measured_again(images, tmp_path):
    calls = []
    model = make_model(hf.ViTModel)
    model.register_forward_hook(lambda *_: calls.append(1))
    arguments = {"max_evaluations": 5, "progress": tmp_path / "progress.json"}
    first = find_recipe(model, images, [4], **arguments)
    whole = len(calls)
    assert find_recipe(model, images, [4], **arguments) == first
    # the features without merging, of either half, and the number of tokens
    assert len(calls) - whole < 10 < whole


def test_wrong_arguments_are_refused_before_anything_runs(images):
    model = make_model(hf.ViTModel)
    with pytest.raises(ArgumentError, match="at least one degree above 0"):
        find_recipe(model, images, [0])
    with pytest.raises(DegreeError, match="degrees must be a non-negative integer"):
        find_recipe(model, images, [-1])
    with pytest.raises(ArgumentError, match="match_by must be one of"):
        find_recipe(model, images, [4], match_by=["colour"])
    with pytest.raises(ArgumentError, match="attention_penalty to try must be single values"):
        find_recipe(model, images, [4], attention_penalties=[[0, 0, 0, 0.1]])
    with pytest.raises(DatasetError, match="At least four images"):
        find_recipe(model, images[:3], [4])


def test_the_command_draws_images_at_random_however_few_there_are(tmp_path, monkeypatch):
    """The first ones of a file may all be of one class. Further ones are others."""
    hf.ViTImageProcessorPil(size={"height": 8, "width": 8}, do_normalize=False).save_pretrained(tmp_path / "model")
    pictures = [Pictures.new("RGB", (8, 8), (shade, 0, 0)) for shade in range(40)]
    Dataset.from_dict({"image": pictures}).to_parquet(tmp_path / "images.parquet")
    options = {"dataset_name": str(tmp_path / "images.parquet"), "dataset_split": "train", "image_column": "image"}
    args = Namespace(model_name_or_path=str(tmp_path / "model"), dataset_config_name=None, max_samples=10, **options)
    samples, further = load_samples_and_more(args, SampleKind(3), 100)
    shades, others = (
        [round(float(sample["pixel_values"].max() * 255)) for sample in part] for part in (samples, further)
    )
    assert sorted(shades + others) == list(range(40))
    assert len(shades) == 10
    assert max(shades) > 20
    assert load_samples_and_more(args, SampleKind(3), 0)[1] is None


def test_the_command_writes_a_recipe_and_a_table(tmp_path, capsys):
    make_model(hf.ViTModel).save_pretrained(tmp_path / "model")
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    pictures = [Pictures.linear_gradient("L").rotate(30 * turn).resize((40, 40)).convert("RGB") for turn in range(8)]
    data = Dataset.from_dict({"image": pictures}, features=Features({"image": Image()}))
    data.to_parquet(tmp_path / "images.parquet")
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "images.parquet")]
    output = tmp_path / "recipe"
    assert (
        main(
            [*arguments, "--degrees", "4", "--max_evaluations", "3", "--max_samples", "5", "--output_dir", str(output)]
        )
        == 0
    )
    recipe = MergeRecipe.load(output / "recipe.json")
    assert apply_tome(make_model(hf.ViTModel), 4, recipe=recipe) is not None
    assert (output / "recipe.md").read_text().startswith("| r | recipe | GFLOPs |")
    assert "distance to r = 0" in capsys.readouterr().out
