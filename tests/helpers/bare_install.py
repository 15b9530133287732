# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What the package can do without any extra, as a program of its own: it prints one JSON object, an answer per case.

python tests/helpers/bare_install.py FOLDER           in an environment that has no extras
python tests/helpers/bare_install.py FOLDER --hide    in any environment; the packages of the extras cannot be imported,
                                                     but for Accelerate, which PEFT brings

FOLDER is the repository. This file imports nothing of the tests, so that it runs where pytest is not installed.
"""

import argparse
import importlib.machinery
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


# written down independently of tocom_hf.extras
EXTRAS = (
    "accelerate", "datasets", "kornia", "PIL", "matplotlib", "fastapi", "uvicorn", "prometheus_client", "onnx",
    "onnxscript", "onnxruntime", "openvino",
)  # fmt: skip
ALWAYS_THERE = ("accelerate",)  # PEFT needs it itself


class WithoutExtras(importlib.machinery.PathFinder):
    """Python's own finder of modules, for which the packages of the extras are not there.

    It answers that it found nothing, as it does for a package that is not installed: `import` then raises
    ModuleNotFoundError with the package's name, and `importlib.util.find_spec`, by which other libraries ask what is
    installed, returns None.
    """

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        package = fullname.partition(".")[0]
        if package in EXTRAS and package not in ALWAYS_THERE:
            return None
        return super().find_spec(fullname, path, target)


def hide_extras() -> None:
    position = sys.meta_path.index(importlib.machinery.PathFinder)
    sys.meta_path[position] = WithoutExtras


class Cases:
    """One method for each case; what it returns, or the error that it raises, is the answer.

    Every name of tocom_hf is imported in the case that needs it, so that a failing import is an answer, too.
    """

    def __init__(self, root: Path):
        self.checkpoint = str(root / "examples" / "digits" / "checkpoint")
        self.plugins = str(root / "hub_cards" / "tocom-vit-mix")
        self.model = None
        self.image_file = str(root / "examples" / "digits" / "test.parquet")

    def installed_extras(self):
        """The packages of the extras that can be imported nevertheless."""
        return [package for package in EXTRAS if importlib.util.find_spec(package) is not None]

    def load_plugins(self):
        from tocom_hf import PluginSet

        return repr(PluginSet.from_pretrained(self.plugins))

    def run_model(self):
        """The logits' shape at two degrees, and whether the degree changes them."""
        import torch

        model = self._model()
        before = self._logits(model)
        model.set_target_r(4)
        after = self._logits(model)
        return [*after.shape, bool(torch.equal(before, after))]

    def merge_tokens(self):
        """Whether merging leaves the logits as they were, and whether its removal does."""
        import torch
        from transformers import AutoModelForImageClassification

        from tocom_hf import apply_tome, remove_tome

        model = AutoModelForImageClassification.from_pretrained(self.checkpoint).eval()
        before = self._logits(model)
        apply_tome(model, 4)
        merged = self._logits(model)
        remove_tome(model)
        return [bool(torch.equal(before, merged)), bool(torch.equal(before, self._logits(model)))]

    def count_flops(self):
        """Whether merging costs fewer operations."""
        from tocom_hf import count_flops

        model = self._model()
        return count_flops(model, 8) < count_flops(model, 0)

    def calibrate(self):
        from tocom_hf import calibrate

        return calibrate(self._model(), degrees=[0, 4], seconds=0, progress=False).degrees

    def pick_scale(self):
        from tocom_hf import pick_scale

        return pick_scale(self._model(), self._images(), 4, scales=[0.1])

    def fit_scales(self):
        from tocom_hf import fit_scales

        return fit_scales(self._model(), self._images(), target_r=4, max_steps=1).config.source_r

    def evaluate_degrees(self):
        from tocom_hf import evaluate_degrees

        results = evaluate_degrees(self._model(), self._images(), [0, 4])
        return [result.target_r for result in results]

    def load_images(self):
        from tocom_hf import load_images

        return len(load_images(self.image_file, split="test"))

    def with_pixel_values(self):
        from tocom_hf import with_pixel_values

        return repr(with_pixel_values)

    def distill(self):
        from tocom_hf import distill

        return repr(distill)

    def paint_groups(self):
        from tocom_hf import paint_groups

        return repr(paint_groups)

    def tile(self):
        from tocom_hf import tile

        return repr(tile)

    def export(self):
        """As a program of torch, which needs no extra."""
        from tocom_hf import ExportedTocom, export

        with tempfile.TemporaryDirectory() as folder:
            written = export(self._model(), folder, format="torch", degrees=[0], processor=False)
            return ExportedTocom(written).degrees

    def export_to_onnx(self):
        from tocom_hf import export

        return str(export(self._model(), "nowhere"))

    def export_to_openvino(self):
        from tocom_hf import export

        return str(export(self._model(), "nowhere", format="openvino"))

    def plot_calibration(self):
        from tocom_hf import calibrate

        return repr(calibrate(self._model(), degrees=[0], seconds=0, progress=False).plot())

    def _model(self):
        """The model at its source degree, loaded once for all cases."""
        from tocom_hf import TocomModel

        if self.model is None:
            self.model = TocomModel.from_pretrained(self.checkpoint, plugins=self.plugins)
        self.model.set_target_r(self.model.source_r)
        return self.model

    def _size(self) -> int:
        return json.loads(Path(self.checkpoint, "config.json").read_text(encoding="utf-8"))["image_size"]

    def _logits(self, model):
        import torch

        generator = torch.Generator().manual_seed(0)
        pixel_values = torch.randn(2, 3, self._size(), self._size(), generator=generator)
        with torch.no_grad():
            return model(pixel_values=pixel_values).logits

    def _images(self):
        """Samples as a plain list, which is a data set to torch."""
        import torch

        pixel_values = torch.linspace(0, 1, 3 * self._size() ** 2).view(3, self._size(), self._size())
        return [{"pixel_values": pixel_values, "labels": 1}, {"pixel_values": -pixel_values, "labels": 2}]


def answer(case: Callable[[], object]) -> dict[str, object]:
    """What a case returned, or the class of its error, whether that is a TocomError, and its message."""
    import tocom_hf

    try:
        return {"value": case()}
    except Exception as error:
        return {
            "error": type(error).__name__,
            "ours": isinstance(error, tocom_hf.TocomError),
            "message": str(error),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hide", action="store_true")
    args = parser.parse_args()
    if args.hide:
        # before anything is imported that would bring one of them along
        hide_extras()
    import torch
    from transformers.utils import logging

    # the models are small: more threads only wait for each other
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    cases = Cases(args.folder)
    answers = {}
    for name in vars(Cases):
        if not name.startswith("_"):
            answers[name] = answer(getattr(cases, name))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
