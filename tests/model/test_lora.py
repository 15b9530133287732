# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Adapters of transformers 4 and 5 are merged by the formula, to the last weight, or refused with a reason."""

import copy
import json
import re

import pytest
import torch
import transformers as hf
from helpers.families import FAMILIES
from helpers.models import make_model
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tocom_hf import (
    ArgumentError,
    ComposedWeightsError,
    PluginFileError,
    TocomModel,
    UnsupportedModelError,
    load_lora,
)


# how transformers 4 named the parts of a layer, written down independently of the package and of transformers' tables
FORMERLY = {
    "layers": "encoder.layer", "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key", "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip
DINO_FORMERLY = {key: FORMERLY[key] for key in FORMERLY if key.startswith("attention.")}
SWIGLU = next(family for family in FAMILIES if getattr(family.config(), "use_swiglu_ffn", False))


def former_name(path):
    """What transformers 4 called a layer or weight of a model."""
    if ".attention.attention." in path:
        table = {}  # a layer of VideoMAE, which has its names to this day
    elif "layers." in path and "encoder.layers." not in path:
        table = FORMERLY
    elif "encoder.layer." in path:
        table = DINO_FORMERLY
    else:
        table = {}
    for current, former in table.items():
        path = path.replace(f"{current}.", f"{former}.", 1) if f"{current}." in path else path
        path = path.removesuffix(current) + former if path.endswith(f".{current}") else path
    return path


def test_the_names_of_this_test_are_those_of_transformers_4():
    assert former_name("vit.layers.3.attention.q_proj") == "vit.encoder.layer.3.attention.attention.query"
    assert former_name("dinov2.encoder.layer.0.mlp.fc1") == "dinov2.encoder.layer.0.mlp.fc1"
    assert former_name("vit.layers.0.mlp.fc2.lora_A.weight") == "vit.encoder.layer.0.output.dense.lora_A.weight"


def write(folder, config, tensors):
    """An adapter by hand, with keys as PEFT writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"peft_type": "LORA", "base_model_name_or_path": None, "task_type": None, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    save_file({f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})  # fmt: skip
    return folder


def factors(shape, rank, generator):
    rows, columns = shape
    A = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    return A, torch.randn(rows, rank, generator=generator, dtype=torch.float64)


def adapt(model, targets, folder, rename=former_name, rank=3, alpha=7, **config):
    """Write a random adapter for the layers whose path ends with a target, and what a model's weights become."""
    generator = torch.Generator().manual_seed(5)
    weights, tensors = dict(model.named_parameters()), {}
    expected = copy.deepcopy({name: weight.detach() for name, weight in weights.items()})
    matches = re.compile(rf"(.+\.\d+\..+\.({'|'.join(targets)}))\.weight").fullmatch
    paths = [match[1] for match in map(matches, weights) if match]
    assert paths
    for path in paths:
        A, B = factors(weights[f"{path}.weight"].shape, rank, generator)
        tensors |= {f"{rename(path)}.lora_A.weight": A, f"{rename(path)}.lora_B.weight": B}
        expected[f"{path}.weight"] += alpha / rank * B @ A
    names = [rename(path) for path in paths]
    return write(folder, {"r": rank, "lora_alpha": alpha, "target_modules": names, **config}, tensors), expected


def assert_weights(model, expected):
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("rename", [former_name, str], ids=["transformers 4", "transformers 5"])
@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj", "qkv", "query", "value"], ["q_proj", "o_proj", "out_proj", "fc1", "fc2", "key", "dense"]],
    ids=len,
)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_the_formula_holds_for_every_family(family, targets, rename, tmp_path):
    model = family.make().double()
    folder, expected = adapt(model, targets, tmp_path / "adapter", rename)
    assert load_lora(model, folder) is model
    assert_weights(model, expected)


def test_a_matrix_that_transformers_5_splits(tmp_path):
    model = SWIGLU.make().double()
    tensors, expected, generator = {}, dict(copy.deepcopy(model).named_parameters()), torch.Generator().manual_seed(5)
    for index in range(4):
        path = f"dinov2.encoder.layer.{index}.mlp"
        gate, up = (expected[f"{path}.{name}.weight"] for name in ("gate_proj", "up_proj"))
        A, B = factors((2 * len(gate), gate.shape[1]), 3, generator)
        tensors |= {f"{path}.weights_in.lora_A.weight": A, f"{path}.weights_in.lora_B.weight": B}
        with torch.no_grad():
            gate += 7 / 3 * (B @ A)[: len(gate)]
            up += 7 / 3 * (B @ A)[len(gate) :]
    config = {"r": 3, "lora_alpha": 7, "target_modules": ["weights_in"]}
    load_lora(model, write(tmp_path / "adapter", config, tensors))
    assert_weights(model, expected)


OLD_LORA = {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 7, "init_lora_weights": False}
VARIANTS = {
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"value": 5, "layer.1.attention.attention.query": 2}, "alpha_pattern": {"query": 11}},
    "a bias of B": {"lora_bias": True},
    "all biases": {"bias": "all"},
    "the biases of adapted layers": {"bias": "lora_only"},
    "parameters": {"target_modules": [], "target_parameters": ["query.weight", "output.dense.weight"]},
    "a head": {"modules_to_save": ["classifier"]},
    "a regular expression": {"target_modules": r".*layer\.\d+\.attention\.(attention\.query|output\.dense)"},
    "some layers": {"layers_to_transform": [1, 3], "layers_pattern": "layer"},
    "layers left out": {"exclude_modules": r".*layer\.0\..*"},
}


def former_model(model):
    """A tree of the layers of a ViT with the names of transformers 4, which PEFT adapts."""
    root = torch.nn.Module()
    for name, module in model.named_modules():
        if not name or any(module.children()) or not any(True for _ in module.parameters()):
            continue
        parent = root
        *parents, last = former_name(name).split(".")
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, torch.nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, module)
    return root


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_variant_equals_stock_peft_under_transformers_4(variant, tmp_path):
    model, reference = make_model(), make_model()
    peft = get_peft_model(former_model(reference), LoraConfig(**{**OLD_LORA, **variant}))
    for index, weight in enumerate(peft.parameters()):
        if weight.requires_grad:  # what was trained
            generator = torch.Generator().manual_seed(index)
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    peft.save_pretrained(tmp_path)
    merged = peft.merge_and_unload()
    load_lora(model, tmp_path)
    expected = dict(merged.named_parameters())
    untouched = make_model()
    changed = 0
    for name, weight in model.named_parameters():
        wanted = expected.get(former_name(name), weight)
        torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-5, msg=name)
        changed += not torch.equal(weight, untouched.get_parameter(name))
    assert changed >= 2


def test_an_adapter_of_the_backbone_goes_into_a_model_with_a_head(tmp_path):
    model = make_model().double()
    expected = dict(copy.deepcopy(model).named_parameters())
    folder, of_backbone = adapt(model.vit, ["q_proj", "fc2"], tmp_path / "adapter", lambda path: former_name(path))
    for name, weight in of_backbone.items():
        expected[f"vit.{name}"] = weight
    load_lora(model, folder)
    assert_weights(model, expected)


@pytest.mark.parametrize("rename", [former_name, str], ids=["transformers 4", "transformers 5"])
def test_an_adapter_of_a_model_with_a_head_goes_into_the_backbone(rename, tmp_path):
    model = make_model().double()
    folder, expected = adapt(model, ["q_proj", "fc2"], tmp_path / "adapter", rename)
    assert_weights(load_lora(model.vit, folder), {name.removeprefix("vit."): value for name, value in expected.items()})


@pytest.mark.parametrize("config", [{}, {"auto_mapping": {"base_model_class": "ViTForImageClassification"}}], ids=len)
@pytest.mark.parametrize("bare", [True, False], ids=["a backbone", "another head"])
def test_the_head_of_an_adapter_decides_the_class(config, bare, tmp_path):
    """As of the many adapters of `google/vit-base-patch16-224-in21k`, which is a backbone, or has a thousand labels."""
    base, trained = make_model(num_labels=9), make_model(num_labels=7)
    (hf.ViTModel(base.config) if bare else base).save_pretrained(tmp_path / "base")
    loaded = (hf.ViTModel if bare else hf.ViTForImageClassification).from_pretrained(tmp_path / "base")
    trained.vit.load_state_dict((loaded if bare else loaded.vit).state_dict(), strict=False)
    folder, expected = adapt(
        trained.double(), ["q_proj", "v_proj"], tmp_path / "adapter", modules_to_save=["classifier"]
    )
    head = {f"base_model.model.{name}": weight for name, weight in expected.items() if "classifier" in name}
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | head, path)
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, **config}))
    tuned = load_lora(tmp_path / "base", folder, dtype=torch.float64)
    assert (type(tuned), tuned.config.num_labels, tuned.training) == (hf.ViTForImageClassification, 7, False)
    assert_weights(tuned, expected)


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    """A sound adapter of transformers 4 for query and value."""
    return adapt(make_model(), ["q_proj", "v_proj"], tmp_path / "adapter", target_modules=["query", "value"])[0]


def change(folder, weights=None, **config):
    """Change the files of an adapter: its configuration, and its weights by a function."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if weights is not None:
        path = folder / "adapter_model.safetensors"
        save_file(weights(load_file(path)), path)


def renamed(old, new):
    return lambda weights: {name.replace(old, new): weight for name, weight in weights.items()}


def without(*parts):
    return lambda weights: {
        name: weight for name, weight in weights.items() if not any(part in name for part in parts)
    }  # fmt: skip


REFUSED = {
    "a layer that is not there": ({"weights": renamed("layer.3", "layer.7")}, r"lacks 2: vit\.encoder\.layer\.7"),
    "other names": (
        {"weights": renamed("vit.", "beit.blocks.")},
        r"lacks 8: .* like layers\.0\.attention\.q_proj",
    ),
    "half a pair": (
        {"weights": without("layer.1.attention.attention.query.lora_B")},
        r"query\.lora_B\.weight is missing",
    ),
    "no second factors": ({"weights": without("lora_B")}, r"lora_B\.weight is missing.*and 5 more"),
    "a hole": ({"weights": without("layer.2.")}, r"layer\.2\..* is missing"),
    "a target without weights": ({"weights": without("value")}, r"attention\.value\.lora_.* is missing"),
    "targets renamed by hand": (
        {"target_modules": ["q_proj", "v_proj"]},
        r"for the layers query, value; its target",
    ),
    "keys renamed by hand": ({"weights": renamed("encoder.layer", "layers")}, r"lacks 8"),
    "another rank": ({"r": 4}, r"has the shape \(3, 32\), the model's place for it \(4, 32\)"),
    "a head that is not there": (
        {"weights": lambda found: {**found, "base_model.model.score.weight": torch.ones(5, 32)}},
        r"score\.weight has no place in ViTForImageClassification",
    ),
    "a head of other size": (
        {
            "weights": lambda found: {**found, "base_model.model.classifier.weight": torch.ones(7, 32)},
            "modules_to_save": ["classifier"],
        },
        r"classifier\.bias is missing; .*has the shape \(7, 32\), the model's place for it \(5, 32\)",
    ),
    "a rank without end": ({"r": 10**12}, r"names the rank 1000000000000, which none"),
    "another rank without end": ({"rank_pattern": {"query": 10**12}}, r"names the rank 1000000000000, which none"),
    # what is refused by its form; these two match at once
    "a repeated group": ({"target_modules": "(ab)*c"}, "may take very long to match"),
    "many repetitions": ({"alpha_pattern": {"a*b*c*d*e*f*query": 2}}, "may take very long to match"),
    "biases that PEFT did not save": (
        {"bias": "lora_only"},
        r"query\.base_layer\.bias is missing \(PEFT before 0\.21 did not save it\)",
    ),
    "another method": ({"peft_type": "IA3"}, "an adapter of type 'IA3', but only LoRA"),
    "another base": ({"init_lora_weights": "pissa_niter_4"}, "changed the weights of the base model"),
    "an unknown option": ({"layer_replication": [[0, 2]], "use_new": True}, "switches on layer_replication, use_new"),
    "a wrong type": ({"r": "three"}, "does not fit|cannot be used"),
    "not a number": ({"weights": lambda found: {name: weight / 0 for name, weight in found.items()}}, "finite"),
    "no LoRA": ({"weights": renamed("lora_", "other_")}, "holds no LoRA weights"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_an_adapter_that_does_not_arrive_whole_is_refused(adapter, model, changes, message):
    before = copy.deepcopy(model.state_dict())
    change(adapter, **changes)
    with pytest.raises(PluginFileError, match=message):
        load_lora(model, adapter)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert type(model.vit.layers[0].attention.q_proj) is torch.nn.Linear


def test_pickled_and_damaged_weights_are_refused(adapter, model):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PluginFileError, match="truncated"):
        load_lora(model, adapter)
    path.unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(PluginFileError, match="Only safetensors files are read"):
        load_lora(model, adapter)


def test_a_target_of_a_layer_that_only_this_model_has_is_fine(tmp_path):
    """`dense` also stands for a pooler, which the model with a head, that the adapter is from, does not have."""
    model = hf.ViTModel(make_model().config).double()
    folder, expected = adapt(model, ["o_proj"], tmp_path / "adapter", target_modules=["dense", "query", "q_lin"])
    change(folder, weights=lambda found: found, exclude_modules=r".*(intermediate|layer\.\d+\.output)\.dense")
    change(folder, target_modules=["dense", "q_lin"])
    assert_weights(load_lora(model, folder), expected)


def test_a_model_that_takes_no_adapter_is_refused(adapter, plugins):
    composed = TocomModel.from_pretrained(make_model(), plugins=plugins, source_r=0, target_r=3)
    with pytest.raises(ComposedWeightsError, match=r"model\.set_target_r\(0\) before an adapter"):
        load_lora(composed, adapter)
    composed.set_target_r(0)
    expected = load_lora(make_model(), adapter)
    load_lora(composed, adapter)
    assert torch.equal(composed.vit.layers[0].attention.v_proj.weight, expected.vit.layers[0].attention.v_proj.weight)
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        load_lora(get_peft_model(make_model(), LoraConfig(target_modules=["fc1"])), adapter)
    with pytest.raises(UnsupportedModelError, match="PreTrainedModel"):
        load_lora(torch.nn.Linear(3, 3), adapter)
    with pytest.raises(TypeError, match="takes no loading arguments, got dtype"):
        load_lora(make_model(), adapter, dtype=torch.float64)


def test_another_base_is_warned_of(adapter, model, caplog, tmp_path):
    change(adapter, base_model_name_or_path="google/vit-base-patch16-224-in21k")
    model.save_pretrained(tmp_path / "base")
    load_lora(tmp_path / "base", adapter)
    assert "was trained on google/vit-base-patch16-224-in21k and is merged into" in caplog.text


# -- TocomModel -----------------------------------------------------------------------------------------------------


def test_a_tocom_model_takes_an_adapter(adapter, model, plugins, tmp_path):
    model.save_pretrained(tmp_path / "base")
    arguments = {"plugins": plugins, "source_r": 0, "target_r": 4}
    one = TocomModel.from_pretrained(tmp_path / "base", adapter=adapter, **arguments)
    other = TocomModel.from_pretrained(load_lora(tmp_path / "base", adapter), **arguments)
    plain = TocomModel.from_pretrained(tmp_path / "base", **arguments)
    name = "vit.layers.1.attention.q_proj.weight"
    assert all(torch.equal(weight, other.state_dict()[key]) for key, weight in one.state_dict().items())
    assert not torch.equal(one.state_dict()[name], plain.state_dict()[name])
    one.set_target_r(0)
    assert torch.equal(one.state_dict()[name], load_lora(model, adapter).state_dict()[name])


def test_the_ways_to_a_tocom_model_with_an_adapter_are_named(adapter, model, plugins):
    with pytest.raises(UnsupportedModelError, match=r"from_pretrained\(base, adapter='.*adapter', \.\.\.\) merges it"):
        TocomModel.from_pretrained(adapter, plugins=plugins, source_r=0)
    with pytest.raises(ArgumentError, match=r"TocomModel\.from_pretrained\(load_lora\(model, adapter\), \.\.\.\)"):
        TocomModel.from_pretrained(model, adapter=adapter, plugins=plugins, source_r=0)


def test_stock_peft_writes_what_is_read(tmp_path):
    """An adapter of transformers 5 as PEFT saves it, of another kind than by hand, equals its own merge."""
    peft = get_peft_model(make_model(), LoraConfig(target_modules="all-linear", init_lora_weights=False, use_dora=True))
    peft.save_pretrained(tmp_path)
    expected = PeftModel.from_pretrained(make_model(), tmp_path).merge_and_unload()
    tuned = load_lora(make_model(), tmp_path)
    for name, weight in tuned.named_parameters():
        torch.testing.assert_close(weight, expected.get_parameter(name), msg=name)
    get_peft_model(make_model(), IA3Config(target_modules=["fc1"], feedforward_modules=["fc1"])).save_pretrained(
        tmp_path
    )
    with pytest.raises(PluginFileError, match="only LoRA"):
        load_lora(make_model(), tmp_path)
