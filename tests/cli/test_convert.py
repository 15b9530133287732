# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Converted weights and plugins compute what the layers that they were trained in compute."""

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from tocom_hf import DegreeError, PluginFileError, PluginSet, TocomModel
from tocom_hf.cli.official_weights import convert_plugins, convert_weights, read_weights


WIDTH, HEADS, BLOCKS, MAX_R, H = 32, 4, 2, 16, 2


def timm_weights(distilled=False, seed=0):
    """A random state dict with timm's names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    tokens = 1 + distilled
    tensors = {
        "cls_token": draw(1, 1, WIDTH), "pos_embed": draw(1, 64 + tokens, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, 3, 4, 4), "patch_embed.proj.bias": draw(WIDTH),
        "norm.weight": draw(WIDTH), "norm.bias": draw(WIDTH), "head.weight": draw(5, WIDTH), "head.bias": draw(5),
    }  # fmt: skip
    if distilled:
        tensors |= {"dist_token": draw(1, 1, WIDTH), "head_dist.weight": draw(5, WIDTH), "head_dist.bias": draw(5)}
    for i in range(BLOCKS):
        shapes = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        shapes |= {"mlp.fc1": (2 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 2 * WIDTH)}
        for name, shape in shapes.items():
            tensors[f"blocks.{i}.{name}.weight"], tensors[f"blocks.{i}.{name}.bias"] = draw(*shape), draw(shape[0])
        for name in ("norm1", "norm2"):
            tensors[f"blocks.{i}.{name}.weight"], tensors[f"blocks.{i}.{name}.bias"] = draw(WIDTH), draw(WIDTH)
    return tensors


def plugin_weights(seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"adapter_down": (MAX_R * H, WIDTH), "adapter_up": (WIDTH, MAX_R * H)}
    return {
        f"blocks.{i}.attn.{part}_tocom.{name}.weight": 0.3 * torch.randn(*shape, generator=generator)
        for i in range(BLOCKS)
        for part in "qv"
        for name, shape in shapes.items()
    }


def forward(t, images, plugins=None, r_src=0, r_tgt=0, scale=0.1):
    """A timm ViT in plain torch, without merging, with the adapters masked by two degrees as in the release."""
    x = F.conv2d(images, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=4).flatten(2).transpose(1, 2)
    tokens = [t["cls_token"], *([t["dist_token"]] if "dist_token" in t else [])]
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], dim=1) + t["pos_embed"]

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), t[f"{name}.weight"], t[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    def delta(x, block, part):
        name = f"blocks.{block}.attn.{part}_tocom"
        rows = MAX_R * H
        target = torch.tensor([0.0] * (rows - H * r_tgt) + [1.0] * (H * r_tgt))
        source = torch.tensor([0.0] * (rows - H * r_src) + [1.0] * (H * r_src))
        down = x @ plugins[f"{name}.adapter_down.weight"].T * (target - source)
        return down @ plugins[f"{name}.adapter_up.weight"].T * scale

    for i in range(BLOCKS):
        y = norm(x, f"blocks.{i}.norm1")
        q, k, v = linear(y, f"blocks.{i}.attn.qkv").chunk(3, dim=-1)
        if plugins is not None:
            q, v = q + delta(y, i, "q"), v + delta(y, i, "v")
        q, k, v = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (q, k, v))
        attention = (q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5).softmax(-1) @ v
        x = x + linear(attention.transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
    x = norm(x, "norm")
    logits = linear(x[:, 0], "head")
    return (logits + linear(x[:, 1], "head_dist")) / 2 if "dist_token" in t else logits


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("distilled", [False, True])
def test_converted_weights_compute_the_same(distilled, images):
    tensors = timm_weights(distilled)
    model = convert_weights(tensors, head_dim=WIDTH // HEADS)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, forward(tensors, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("r_src", "r_tgt"), [(0, 16), (16, 0), (3, 5), (9, 8)])
def test_converted_plugins_compute_the_same(r_src, r_tgt, images):
    """The composed weights, run without merging, against the masked adapters."""
    tensors, adapters = timm_weights(), plugin_weights()
    model = convert_weights(tensors, head_dim=WIDTH // HEADS)
    composite = convert_plugins(adapters, model, MAX_R, 0.1).compose(r_src, r_tgt)
    with torch.no_grad():
        for path, module in model.vit.named_modules():
            if path in composite.factors:
                module.weight.copy_(composite.apply(path, module.weight))
        expected = forward(tensors, images, adapters, r_src, r_tgt)
        assert not torch.allclose(expected, forward(tensors, images), atol=1e-3)
        torch.testing.assert_close(model(images).logits, expected, rtol=1e-4, atol=1e-4)


def test_files_are_converted(run, tmp_path, images):
    torch.save({"model": timm_weights(), "epoch": 3}, tmp_path / "deit.pth")
    torch.save({"model": plugin_weights()}, tmp_path / "tocom.pth")

    def convert(*arguments):
        ended = run("convert", *arguments)
        assert ended.code == 0, ended.errors
        return ended.output

    deit = tmp_path / "deit"
    assert "ViTForImageClassification" in convert(
        "--weights", tmp_path / "deit.pth", "--output_dir", deit, "--head_dim", WIDTH // HEADS
    )
    convert("--plugins", tmp_path / "tocom.pth", "--model_name_or_path", deit, "--output_dir", tmp_path / "set")
    plugins = PluginSet.from_pretrained(tmp_path / "set")
    assert (plugins.config.max_r, plugins.config.rank, plugins.config.trained_scale) == (16, 2, 0.1)
    TocomModel.from_pretrained(deit, plugins=plugins, source_r=4, target_r=16)
    model = AutoModelForImageClassification.from_pretrained(deit)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, forward(timm_weights(), images), rtol=1e-4, atol=1e-4)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


def test_no_code_is_run(tmp_path):
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(PluginFileError, match="cannot be read as weights"):
        read_weights(tmp_path / "evil.pth")


def test_what_does_not_fit_is_named(tmp_path):
    model = convert_weights(timm_weights(), head_dim=8)
    missing = plugin_weights()
    del missing["blocks.1.attn.v_tocom.adapter_up.weight"]
    with pytest.raises(PluginFileError, match=r"lacks blocks\.1\.attn\.v_tocom.*has 7 matrices.*2 blocks need 8"):
        convert_plugins(missing, model, MAX_R, 0.1)
    with pytest.raises(PluginFileError, match="has shapes"):
        convert_plugins(plugin_weights(), model, 15, 0.1)
    with pytest.raises(PluginFileError, match=r"blocks\.0\.attn\.gate is no weight"):
        convert_weights({**timm_weights(), "blocks.0.attn.gate": torch.zeros(1)})
    incomplete = timm_weights()
    del incomplete["blocks.1.norm2.bias"]
    with pytest.raises(PluginFileError, match=r"layers\.1\.layernorm_after\.bias"):
        convert_weights(incomplete, head_dim=8)
    (tmp_path / "truncated.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(PluginFileError, match="cannot be read"):
        read_weights(tmp_path / "truncated.pth")
    (tmp_path / "truncated.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(PluginFileError, match="cannot be read"):
        read_weights(tmp_path / "truncated.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(PluginFileError, match="holds a list"):
        read_weights(tmp_path / "list.pth")


def test_checkpoints_of_training_scripts_are_read(tmp_path):
    """DeiT's has its arguments beside the weights, timm's calls these `state_dict`."""
    tensors = timm_weights()
    torch.save({"model": tensors, "args": argparse.Namespace(lr=1e-3), "epoch": 3}, tmp_path / "deit.pth")
    torch.save({"state_dict": tensors, "arch": "vit"}, tmp_path / "timm.pth.tar")
    for name in ("deit.pth", "timm.pth.tar"):
        found = read_weights(tmp_path / name)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"head_dim": 7}, "which heads of 7 do not divide"),
        ({"pos_embed": torch.zeros(1, 1 + 60, WIDTH)}, {}, "60 patches, which form no square"),
        ({"head.bias": torch.zeros(3)}, {}, "do not fit a ViTForImageClassification.*classifier.bias"),
    ],
)
def test_weights_of_other_shapes_are_named(change, arguments, message):
    with pytest.raises(PluginFileError, match=f"(?s){message}"):
        convert_weights({**timm_weights(), **change}, **{"head_dim": 8, **arguments})


def test_what_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "notes.pth").write_text("these are notes")
    with pytest.raises(PluginFileError, match="cannot be read as weights"):
        read_weights(tmp_path / "notes.pth")
    model = convert_weights(timm_weights(), head_dim=8)
    with pytest.raises(DegreeError, match="finite"):
        convert_plugins(plugin_weights(), model, MAX_R, float("nan"))


def test_images_are_prepared_as_told(run, tmp_path):
    torch.save(timm_weights(), tmp_path / "vit.pth")
    settings = ["--head_dim", "8", "--image_mean", *["0.5"] * 3, "--image_std", *["0.5"] * 3, "--crop_pct", "0.9"]
    assert run("convert", "--weights", tmp_path / "vit.pth", "--output_dir", tmp_path / "vit", *settings).code == 0
    processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    image = Image.fromarray(np.arange(70 * 50 * 3, dtype=np.uint8).reshape(70, 50, 3))
    resized = image.resize((35, 49), Image.Resampling.BICUBIC)  # the shorter edge to 32 / 0.9
    left, top = (35 - 32) // 2, (49 - 32) // 2
    cropped = np.asarray(resized.crop((left, top, left + 32, top + 32)), dtype=np.float32).transpose(2, 0, 1)
    found = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, torch.from_numpy(cropped / 127.5 - 1), rtol=0, atol=1e-3)
