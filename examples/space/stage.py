# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Put all that the demo needs into one folder, ready to be uploaded as a Space.

python examples/space/stage.py my-space
"""

import argparse
import shutil
from pathlib import Path


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FILES = ("app.py", "README.md", "requirements.txt")
FOLDERS = {
    HERE / "samples": "samples",
    ROOT / "tocom_hf": "tocom_hf",
    ROOT / "examples" / "fashion_mnist" / "checkpoint": "assets/checkpoint",
    ROOT / "hub_cards" / "tocom-vit-fashion-mnist": "assets/plugins",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="A new or empty folder.")
    args = parser.parse_args()
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        parser.error(f"{args.output_dir} is not empty.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(HERE / name, args.output_dir / name)
    for source, name in FOLDERS.items():
        shutil.copytree(source, args.output_dir / name, ignore=shutil.ignore_patterns("__pycache__"))
    print(f"{args.output_dir}: upload it with `hf upload user/name {args.output_dir} --repo-type space`")


if __name__ == "__main__":
    main()
