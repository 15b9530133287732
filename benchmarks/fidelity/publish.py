# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Take backbone, one checkpoint, test images and plugins of a study for others to use, with the figures of the study.

    python benchmarks/fidelity/publish.py --backbone runs/mix/backbone --study runs/study-a-mix \\
        --grids runs/study-a-mix-grids --task digits --base_model vit-mix \\
        --example_dir examples/digits --set_dir hub_cards/tocom-vit-mix
    python examples/push_to_hub.py hub_cards/tocom-vit-mix hub_cards/tocom-vit-mix --card_only \\
        --checkpoint examples/digits/checkpoint

writes the embedded default. The grids must hold the plugins at the scale of their training (`fixed_scales`).
"""

import argparse
import os
import shutil
from pathlib import Path

from run import checkpoint, data_folder, plugins_folder

from tocom_hf import PluginSet
from tocom_hf.data.tasks import load_labelled
from tocom_hf.evaluation.reports import Report


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, required=True, help="Folder of the pre-trained model.")
    parser.add_argument("--study", type=Path, required=True, help="Output folder of run.py.")
    parser.add_argument("--grids", type=Path, help="Another one, whose grids are recorded; default: the study's.")
    parser.add_argument("--task", required=True, help="The task whose checkpoint of r = 0 and seed 0 is taken.")
    parser.add_argument("--base_model", required=True, help="What the set calls its backbone.")
    parser.add_argument(
        "--dataset", default="clothing, letters, shapes and drawings of its pre-training", help="What it was made of."
    )
    parser.add_argument("--num_test_images", type=int, default=800)
    parser.add_argument("--license", default="apache-2.0")
    parser.add_argument("--example_dir", type=Path, required=True, help="For backbone/, checkpoint/ and test.parquet.")
    parser.add_argument("--set_dir", type=Path, required=True)
    return parser.parse_args()


def entries(report: Report, task: str, scale: float) -> list[dict]:
    """What a plugin set records of a grid of one checkpoint."""
    found = []
    for cell in report.cells:
        entry = {"dataset": task, "split": "test", "checkpoint": "fine-tuned checkpoint", "scale": scale}
        entry |= {"source_r": cell.source_r, "target_r": cell.target_r, "plain": round(cell.plain, 4)}
        if cell.source_r == cell.target_r:
            entry["tocom"] = entry["plain"]
        elif (name := f"scale {scale:g}") in cell.compensated:
            entry["tocom"] = round(cell.compensated[name].accuracy, 4)
        else:
            raise SystemExit(f"The grid of {task} lacks the {name}; evaluate it with fixed_scales=[{-scale}, {scale}].")
        if (name := f"scale {-scale:g}") in cell.compensated:
            entry["sign_flipped"] = round(cell.compensated[name].accuracy, 4)
        found.append({**entry, "standard_error": round(cell.plain_se, 4)})
    return found


def main() -> None:
    args = parse_args()
    plugins = PluginSet.from_pretrained(plugins_folder(args.study, args.task, 0, 0))
    config = plugins.config
    paths = sorted((args.grids or args.study).glob("grids/*/r*-seed0/grid.json"))
    if not paths or not any(path.parts[-3] == args.task for path in paths):
        raise SystemExit(f"There are no grids of {args.task} in {args.grids or args.study}; run the stage evaluate.")
    config.evaluation = [
        entry for path in paths for entry in entries(Report.load(path), path.parts[-3], config.trained_scale)
    ]
    config.base_model, config.license = args.base_model, args.license
    config.training["dataset"] = f"{config.training['num_images']:,} images: {args.dataset}"
    plugins.save_pretrained(args.set_dir)
    for source, name in ((args.backbone, "backbone"), (checkpoint(args.study, args.task, 0, 0), "checkpoint")):
        folder = args.example_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        if source.resolve() == folder.resolve():
            continue  # the backbone that is published already
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(source / file, folder / file)
        # images of the study have the right size, so its own processor does not resize; those of others may not
        shutil.copyfile(args.backbone / "preprocessor_config.json", folder / "preprocessor_config.json")
    images, _ = load_labelled(str(data_folder(args.study, args.task)), "test")
    part = args.example_dir / "test.parquet.part"
    images.select(range(args.num_test_images)).to_parquet(part)
    os.replace(part, args.example_dir / "test.parquet")


if __name__ == "__main__":
    main()
