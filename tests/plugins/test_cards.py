# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Cards say what was recorded and nothing else; their metadata is valid, and their code runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from helpers.families import FAMILIES, SIMILAR
from helpers.hub_server import metadata_errors
from helpers.models import make_model, make_plugins
from helpers.paths import ROOT
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoModelForAudioClassification, AutoModelForImageClassification

from tocom_hf import MergeRecipe, PluginSet, TocomModel
from tocom_hf.merging.backbones import find_backbone
from tocom_hf.plugins.cards import checkpoint_card, plugin_set_card


PUBLISHED = sorted(path.parent for path in ROOT.glob("hub_cards/*/tocom_config.json"))
CHECKPOINTS = {
    "tocom-dinov2-small": "facebook/dinov2-small",
    "tocom-vit-fashion-mnist": "examples/fashion_mnist/checkpoint",
    "tocom-vit-mix": "examples/digits/checkpoint",
}


def code(card):
    return re.search(r"```python\n(.*?)```", str(card), flags=re.DOTALL)[1]


def metadata(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), flags=re.DOTALL)[1])


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A working directory in which the repository's paths exist."""
    for name in ("examples", "hub_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)


def test_a_card_says_a_recipe_in_words(model):
    recipe = MergeRecipe(["key_mean", "input", "input", "input"], 0.05, {2: [3, 3, 2, 2]}, [0, 0.03, 0.03, 0.03])
    for content, expected in (
        (
            recipe.to_dict(),
            "match_by key_mean in layer 0, input in layers 1 to 3; size_penalty 0.05; "
            "attention_penalty 0.0 in layer 0, 0.03 in layers 1 to 3; schedules by degree in tocom_config.json",
        ),
        (MergeRecipe("values").to_dict(), "match_by values"),
        (MergeRecipe().to_dict(), "ToMe's rule"),
        ({"match_by": "colour"}, "match_by: colour"),
    ):
        card = plugin_set_card(make_plugins(model, training={"merge_recipe": content}).config, "us/set")
        assert f"| merge_recipe | {expected} |" in str(card)


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_a_published_card_is_rendered_from_its_configuration_and_its_code_runs(folder, clone):
    card = ModelCard.load(folder / "README.md")
    rendered = plugin_set_card(
        PluginSet.from_pretrained(folder).config, f"hub_cards/{folder.name}", checkpoint=CHECKPOINTS[folder.name]
    )
    assert str(card) == str(rendered), "run examples/push_to_hub.py --card_only"
    assert metadata_errors(metadata(card)) == []
    if not Path(CHECKPOINTS[folder.name]).exists():
        return  # the weights of others are not in the repository
    namespace = {}
    exec(compile(code(card), f"{folder.name} card", "exec"), namespace)
    assert isinstance(namespace["model"], TocomModel)
    assert namespace["outputs"].logits.isfinite().all()


def test_the_card_of_the_embedded_set_holds_its_measured_grid():
    card = ModelCard.load(ROOT / "hub_cards" / "tocom-vit-fashion-mnist" / "README.md")
    data = card.data
    assert (data.base_model, data.base_model_relation) == ("vit-fashion-mnist", "adapter")
    assert (data.library_name, data.license) == ("tocom-hf", "apache-2.0")
    assert data.datasets == ["zalando-datasets/fashion_mnist"]
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    assert found["accuracy, source_r=0, target_r=8, with ToCom"] == 0.8905
    assert found["accuracy, source_r=0, target_r=8, token merging alone"] == 0.8709
    assert "| with ToCom, scale 0.08 | 90.41 | 90.45 | 90.31 | 89.99 | 89.05 |" in card.text
    assert "standard error is 0.3 percentage points" in card.text


def test_what_is_not_recorded_is_left_out(plugins):
    card = plugin_set_card(plugins.config, "user/set")
    assert not {"model-index", "base_model", "license", "datasets"} & metadata(card).keys()
    assert metadata_errors(metadata(card)) == []
    for heading in ("## Measured results", "## Agreement", "## Recipe"):
        assert heading not in card.text
    assert "No accuracy of a fine-tuned checkpoint has been recorded" in card.text
    assert "Hardware: not recorded." in card.text
    for heading in ("## Use", "## Backbone and degrees", "## Limits", "## Citation"):
        assert f"\n\n{heading}\n\n" in card.text


def test_an_agreement_grid_and_hardware_are_rendered(plugins):
    plugins.config.training = {
        "dataset": "org/images", "hardware": "8 x H100", "learning_rate": 0.001, "max_steps": None,
        "loss_by_distance": {"1-2": 0.03742130713896897},
        "agreement": {"degrees": [0, 2], "plain": [[1.0, 0.75], [0.5, 1.0]], "tocom": [[1.0, 0.875], [0.625, 1.0]]},
    }  # fmt: skip
    card = plugin_set_card(plugins.config, "user/set", figure="agreement.png")
    assert "| m \\ n | 0 | 2 |\n|---|---|---|\n| 0 | 100.0 | 75.0 |\n| 2 | 50.0 | 100.0 |" in card.text
    assert "| 0 | 100.0 | 87.5 |" in card.text
    assert "![Agreement between degrees](agreement.png)" in card.text
    assert "Hardware: 8 x H100." in card.text
    assert "| learning_rate | 0.001 |" in card.text
    assert "| loss_by_distance | 1-2: 0.0374213 |" in card.text
    assert "max_steps" not in card.text  # an option that was not used
    assert card.data.datasets == ["org/images"]


@pytest.mark.parametrize(
    ("objective", "measure", "loss"),
    [
        ("logits", "predicts the same class", "divergence"),
        ("features", "The cosine", "distance of their normalised"),
        ("whitened_features", "The cosine", "whitened by the\nteacher's"),
        ("hidden_states", "The cosine", "every layer but the first"),
        ("label_probabilities", "The share of labels", "divergence of each label's probability"),
        ("values", "How close (times 100", "squared difference of the values"),
    ],
)
def test_the_card_says_what_was_compared(plugins, objective, measure, loss):
    grid = [[1.0, 0.75], [0.5, 1.0]]
    agreement = {"degrees": [0, 2], "plain": grid, "tocom": grid}
    plugins.config.training = {"agreement": agreement, "objective": objective, "learning_rate": 0.001}
    text = plugin_set_card(plugins.config, "user/set").text
    measures = ("predicts the same class", "The cosine", "The share of labels", "How close")
    assert [words in text for words in measures].count(True) == 1
    assert measure in text.split("## Agreement")[1].split("## Recipe")[0]
    assert loss in text.split("## Recipe")[1]


def test_the_card_of_a_set_for_one_source_degree_says_so(plugins):
    plugins.config.source_r = 6
    grid = [[0.5, 0.75, 1.0]]
    agreement = {"sources": [6], "degrees": [0, 3, 6], "plain": grid, "tocom": grid}
    plugins.config.training = {"agreement": agreement}
    card = plugin_set_card(plugins.config, "user/set")
    assert "source_r=6,  # the degree that the checkpoint was trained at\n    target_r=0," in card.text
    assert "weights trained\nwhile merging 6 tokens a layer" in card.text
    assert "any checkpoint fine-tuned from it at this degree\n" in card.text
    assert "| m \\ n | 0 | 3 | 6 |\n|---|---|---|---|\n| 6 | 50.0 | 75.0 | 100.0 |" in card.text


@pytest.mark.parametrize(("degrees", "middle"), [([2, 6], 2), ([0, 5, 6], 5), (None, 3), ("0 6", 3), (["0"], 3)])
def test_the_card_says_which_degrees_were_trained(plugins, degrees, middle):
    """And shows one of them. The set is one of r = 0 to 6, and what a file says may be anything."""
    plugins.config.training = {} if degrees is None else {"train_degrees": degrees}
    text = plugin_set_card(plugins.config, "user/set").text
    assert f"model.set_target_r({middle})" in text
    said = isinstance(degrees, list) and isinstance(degrees[0], int)
    assert ("They were trained at r = " + ", ".join(map(str, degrees or ())) + " alone." in text) == said


@pytest.mark.parametrize("grid", [None, [], {"degrees": 3}, {"degrees": [0], "plain": [["x"]], "tocom": [[2.0]]}])
def test_a_malformed_agreement_grid_is_left_out(plugins, grid):
    plugins.config.training = {"agreement": grid}
    assert "## Agreement" not in plugin_set_card(plugins.config, "user/set").text


HOSTILE = '"); import os; os._exit(9) #\n---\nlicense: mit\n| a {{ 7 * 7 }} <script>'


def test_recorded_text_cannot_break_out_of_its_place(plugins):
    config = plugins.config
    config.base_model = config.base_model_revision = config.license = HOSTILE
    config.training = {HOSTILE: HOSTILE, "hardware": HOSTILE, "dataset": HOSTILE}
    config.evaluation = [
        {"dataset": HOSTILE, "dataset_id": HOSTILE, "source_r": 0, "target_r": 2, "plain": 0.5, "tocom": 0.6}
    ]
    card = plugin_set_card(config, "user/set")
    data = metadata(card)
    assert "base_model" not in data
    assert data["license"] == HOSTILE  # one string, quoted
    assert data["model-index"][0]["results"][0]["dataset"]["name"] == HOSTILE
    assert "49" not in card.text
    assert "<script" not in card.text
    tree = compile(code(card), "card", "exec", flags=1024)  # the syntax tree only
    assert not [node for node in tree.body if type(node).__name__ == "Import" and node.names[0].name == "os"]


CLASSES = [AutoModel, AutoModelForImageClassification, AutoModelForAudioClassification]
WITH_AND_WITHOUT_A_HEAD = [
    pytest.param(
        family,
        automatic,
        id=f"{family}-{automatic.__name__}",
        marks=() if family in FAMILIES else pytest.mark.slow,
    )
    for family in [*FAMILIES, *SIMILAR]
    for automatic in CLASSES
    if type(family.config()) in automatic._model_mapping
]


@pytest.mark.parametrize(("family", "automatic"), WITH_AND_WITHOUT_A_HEAD)
def test_the_card_shows_how_peft_alone_loads_a_plugin(family, automatic, tmp_path, monkeypatch):
    """As it is printed, and with a class that has a head."""
    plugins = make_plugins(model := family.make(), max_r=2)
    model.save_pretrained(tmp_path / "org" / "base")
    plugins.save_pretrained(tmp_path / "user" / "set")
    monkeypatch.chdir(tmp_path)
    card = plugin_set_card(plugins.config, "user/set", checkpoint="org/base")
    block = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)[1]
    namespace = {}
    exec(compile(block.replace("AutoModel", automatic.__name__), "card", "exec"), namespace)
    plain = find_backbone(automatic.from_pretrained("org/base"))
    adapted = namespace["model"].get_submodule(plain.path)
    for path, factors in plugins.compose(0, 1).factors.items():
        layer, weight = adapted.get_submodule(path), plain.module.get_submodule(path).weight
        inputs = torch.eye(weight.shape[1])
        expected = (weight + 0.1 * factors.lora_B @ factors.lora_A).T
        found = layer(inputs) - (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in SIMILAR)], ids=str
)
def test_the_code_of_a_checkpoint_card_runs_for_every_family(family, tmp_path, monkeypatch):
    plugins = make_plugins(model := family.make(), max_r=2, base_model="org/base")
    composed = TocomModel.from_pretrained(model, plugins=plugins, source_r=0, target_r=1)
    composed.save_pretrained(tmp_path / "user" / "tuned")
    monkeypatch.chdir(tmp_path)
    card = checkpoint_card(composed.config, plugins.config, "user/tuned")
    assert card.data.base_model == "org/base"
    assert metadata_errors(metadata(card)) == []
    namespace = {}
    # CLIPModel needs a text too, and towers of some language models are no public classes of transformers
    if type(model).__name__ != "CLIPModel" and hasattr(transformers, type(model).__name__):
        exec(compile(code(card), "card", "exec"), namespace)
        assert namespace["model"].target_r == 1


def test_the_card_of_a_checkpoint_for_grey_images_gives_it_such():
    composed = TocomModel.from_pretrained(make_model(num_channels=1), source_r=3)
    assert "torch.randn(1, 1, 32, 32)" in checkpoint_card(composed.config, None, "user/tuned").text


def test_the_card_of_a_checkpoint_without_plugins():
    composed = TocomModel.from_pretrained(make_model(), source_r=3)
    card = checkpoint_card(composed.config, None, "user/tuned")
    assert "merging 3 tokens a layer" in card.text
    assert "tocom_plugins" not in card.text
