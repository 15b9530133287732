# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""`tocom merge-report` and `tocom calibrate`: what token merging costs, from a configuration or a checkpoint."""

import json
import shutil

import pytest
from helpers.families import clip, video_llava
from helpers.models import make_model, make_plugins
from helpers.paths import ROOT
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    CLIPModel,
    DepthAnythingConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SwinConfig,
    SwinModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from tocom_hf import Calibration, DegreeCost, count_flops
from tocom_hf.cli.merge_report import degree_to_try, make_report


CHECKPOINT, PLUGINS = ROOT / "examples/digits/checkpoint", ROOT / "hub_cards/tocom-vit-mix"
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def test_the_embedded_model(run):
    code, output, errors = run("merge-report", CHECKPOINT, "--target_r", 4, "--seconds", 0)
    assert code == 0, errors
    assert "model type vit, class ViTForImageClassification" in output
    assert "Token merging supports it." in output
    assert "the class token never merges" in output
    assert "random weights" in output
    rows = [line.split() for line in output.splitlines() if line.lstrip()[:1].isdigit()]
    assert [int(row[0]) for row in rows] == [0, 1, 2, 3, 4]
    assert [int(row[1]) for row in rows] == [50, 38, 26, 14, 4]


def test_only_the_configuration_is_read(tmp_path):
    """Weights and code that are there are not touched: here they could not be."""
    shutil.copy(CHECKPOINT / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle")
    report = make_report(str(tmp_path), target_r=[0, 8], seconds=0)
    assert report.reason is None
    assert report.calibration.degrees == [0, 8]
    assert report.first_r in (0, 8)
    assert (report.protected, report.registers, report.restored) == (1, 0, False)


def test_the_figures_are_those_of_the_checkpoint(tmp_path):
    """GFLOPs by another path: the loaded model, with the head."""
    model = make_model()
    model.save_pretrained(tmp_path)
    report = make_report(str(tmp_path), target_r=[0, 3], seconds=0)
    assert [cost.gflops for cost in report.calibration] == [count_flops(model, r) / 1e9 for r in (0, 3)]


def test_degrees_end_where_nothing_more_can_merge(tmp_path):
    """16 patches: the first layer merges at most 8 of them."""
    make_model(image_size=16, num_hidden_layers=1).config.save_pretrained(tmp_path)
    assert make_report(str(tmp_path), seconds=0).calibration.degrees == list(range(9))
    assert make_report(str(tmp_path), seconds=0, image_size=(32, 32)).calibration.degrees == list(range(17))


def test_of_clip_the_vision_tower_is_measured(tmp_path, run):
    CLIPModel(clip()).save_pretrained(tmp_path / "clip")
    code, output, errors = run("merge-report", tmp_path / "clip", "--target_r", 2, "--seconds", 0)
    assert code == 0, errors
    assert "model type clip, class CLIPModel" in output
    assert "Of CLIPModel, its vision part alone (CLIPVisionModel)" in output
    assert "copied back to their places" in output


def test_one_of_several_towers_is_named(tmp_path, run, refused):
    video_llava().save_pretrained(tmp_path)
    message = refused("merge-report", tmp_path, "--seconds", 0)
    assert "2 backbones that could merge tokens: 'model.video_tower', 'model.image_tower'. Name one" in message
    code, output, _ = run("merge-report", tmp_path, "--seconds", 0, "--target_r", 2, "--backbone", "image_tower")
    assert code == 0
    assert "its vision part alone (CLIPVisionModel)" in output


def test_registers_are_protected(tmp_path, run):
    config = Dinov2WithRegistersConfig(**TINY, image_size=32, patch_size=4, num_register_tokens=3)
    Dinov2WithRegistersModel(config).config.save_pretrained(tmp_path / "dino")
    report = make_report(str(tmp_path / "dino"), target_r=[2], seconds=0)
    assert (report.protected, report.registers, report.restored) == (4, 3, True)
    output = run("merge-report", tmp_path / "dino", "--target_r", 2, "--seconds", 0).output
    assert "the class token and 3 register tokens never merge." in output


def test_audio_spectrograms(tmp_path):
    config = ASTConfig(**TINY, patch_size=8, frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=32)
    ASTForAudioClassification(config).save_pretrained(tmp_path)
    report = make_report(str(tmp_path), target_r=[2], seconds=0)
    assert report.calibration.input_size == (32, 32)
    assert report.protected == 2


def test_swin_is_refused_with_its_reason(tmp_path, run):
    SwinModel(SwinConfig(embed_dim=8, depths=[1], num_heads=[1], image_size=32)).save_pretrained(tmp_path / "swin")
    code, output, errors = run("merge-report", tmp_path / "swin")
    assert (code, errors) == (0, "")
    assert "model type swin, class SwinModel" in output
    assert "it attends within windows of a fixed grid" in output
    assert "apply_tome" not in output


def test_of_a_language_model_its_vision_part_gets_the_reason(tmp_path, run):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    code, output, errors = run("merge-report", tmp_path)
    assert (code, errors) == (0, "")
    assert "'qwen2_vl', whose part 'qwen2_vl_vision' does not fit: it packs the tokens of all images" in output


def test_a_configuration_that_names_no_class_is_measured_by_its_backbone(tmp_path):
    """Depth Anything has no class without a head."""
    backbone = Dinov2Config(**{name: value for name, value in TINY.items() if name != "intermediate_size"},
                            image_size=32, patch_size=4, out_features=["stage1", "stage2"])  # fmt: skip
    DepthAnythingConfig(backbone_config=backbone).save_pretrained(tmp_path)
    report = make_report(str(tmp_path), target_r=[0, 2], seconds=0)
    assert (report.reason, report.measured_class) == (None, "Dinov2Model")
    assert report.calibration[0].tokens[0] == 65


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model_type": "ours", "auto_map": {"AutoModel": "code.Ours"}}, "code of the repository, which is not run"),
        ({"architecture": "vit_tiny", "pretrained_cfg": {}}, "a checkpoint of timm"),
        ({"model_type": "ours"}, "names no model type that this version of transformers knows"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "the architecture 'bert': it reads text, and"),
        ({"model_type": "vit", "architectures": ["Ours"]}, "not a model class of transformers"),
    ],
)
def test_other_checkpoints_get_their_reason(tmp_path, content, reason):
    (tmp_path / "config.json").write_text(json.dumps(content))
    report = make_report(str(tmp_path))
    assert reason in report.reason
    assert report.calibration is None


def test_a_use_that_merging_breaks_gets_its_reason(tmp_path):
    config = ViTMAEConfig(**TINY, image_size=32, patch_size=4, decoder_hidden_size=8, decoder_num_hidden_layers=1,
                          decoder_num_attention_heads=1, decoder_intermediate_size=8)  # fmt: skip
    ViTMAEForPreTraining(config).save_pretrained(tmp_path)
    assert "without random masking" in make_report(str(tmp_path)).reason


def test_a_configuration_that_no_model_can_be_built_from(tmp_path, refused):
    config = json.loads((CHECKPOINT / "config.json").read_text())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": -1, "hidden_size": -8}))
    assert "broken" in refused("merge-report", tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{")
    assert "is not valid JSON" in refused("merge-report", tmp_path / "broken")


def calibration(*speedups):
    costs = tuple(DegreeCost(r, (9,), 1.0, 1.0, 1.0, speedup) for r, speedup in enumerate(speedups))
    return Calibration("vit", (3, 8, 8), 1, "cpu", "float32", "sdpa", "2", 1, costs)


@pytest.mark.parametrize(
    ("speedups", "degree"),
    [((1.0, 1.2, 1.5, 1.9), 2), ((1.0, 1.2, 1.4, 1.3), 2), ((1.0, 0.8, 0.9), 0), ((1.0,), 0)],
)
def test_the_degree_to_try_first(speedups, degree):
    """The smallest that is 1.5 times as fast, or else the fastest."""
    assert degree_to_try(calibration(*speedups), 1.5) == degree


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ((1.0, 1.2, 1.62), ["Try first: r = 2, 1.62x, the smallest", "apply_tome(model, r=2)", "target_r=2)"]),
        ((1.0, 1.2, 1.4), ["Try first: r = 2, 1.40x, the fastest here: none is 1.5 times", "--batch_size 32"]),
        ((1.0, 0.9, 0.8), ["No degree is faster than r = 0 here", "--batch_size 32"]),
    ],
)
def test_the_advice(run, monkeypatch, speedups, expected):
    monkeypatch.setattr("tocom_hf.cost.calibration.calibrate", lambda *_, **__: calibration(*speedups))
    output = run("merge-report", CHECKPOINT).output
    for text in expected:
        assert text in output
    assert ("apply_tome(model" in output) == (max(speedups) > 1)


def test_calibrate_writes_what_it_prints(run, tmp_path):
    code, output, errors = run(
        "calibrate", CHECKPOINT, "--plugins", PLUGINS, "--target_r", 2, 8, "--seconds", 0, "--batch_size", 2,
        "--image_size", 28, 32, "--output", "results/calibration.json", "--plot", "results/calibration.png",
    )  # fmt: skip
    assert code == 0, errors
    saved = Calibration.from_json_file(tmp_path / "results" / "calibration.json")
    assert str(saved) in output
    assert saved.degrees == [0, 2, 8]
    assert (saved.batch_size, saved.input_size) == (2, (3, 28, 32))
    assert (tmp_path / "results" / "calibration.png").read_bytes().startswith(b"\x89PNG")


def test_calibrate_takes_the_degrees_of_the_plugins_and_any_checkpoint(run, tmp_path):
    model = make_model(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "vit")
    make_plugins(model, max_r=3).save_pretrained(tmp_path / "set")
    command = ("calibrate", tmp_path / "vit", "--seconds", 0)
    rows = run(*command, "--plugins", tmp_path / "set", "--source_r", 0).output.splitlines()[2:]
    assert [int(row.split()[0]) for row in rows] == [0, 1, 2, 3]
    # without plugins, it need not record the degree that it was trained at
    assert run(*command, "--target_r", 5).code == 0
