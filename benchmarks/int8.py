# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Merging and int8 together: speed, size and agreement with float32, in ONNX Runtime, OpenVINO and torchao.

    pip install onnxruntime==1.32.0 openvino==2026.4.1 nncf==3.4.0 torchao==0.18.0
    python benchmarks/int8.py --resume                     # takes up what an earlier run has left
    python benchmarks/int8.py --models examples/digits/checkpoint --data examples/digits/test.parquet --r 0 4 8

Schemes whose package is missing are left out. A model is merged first, at the degree of its row, and then quantised.
"""

import argparse
import importlib.util
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sessions import (
    Call,
    Results,
    export_onnx,
    median_ratio,
    onnxruntime_call,
    openvino_call,
    time_in_turn,
    torch_call,
    versions,
    write_whole,
)
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, PreTrainedModel

from tocom_hf import apply_tome, load_images


FLOAT32 = "float32"
CALIBRATION_IMAGES = 32
PHOTOGRAPHS = 24  # crops of the two that scikit-learn brings, which nncf needs
EVALUATION_SECONDS = 15  # for each scheme and degree; slow schemes see fewer images
TIMING_SECONDS = 60  # for each runtime and batch size
COLUMNS = {
    "runtime": "runtime", "scheme": "scheme", "model": "model", "image_size": "image size", "batch_size": "batch",
    "r": "r", "speed": "speed over dense float32", "merging": "gain of merging alone", "int8": "gain of int8 alone",
    "share": "speed of the product of the gains", "milliseconds": "ms", "megabytes": "MB on disk",
    "cosine": "cosine to float32 of the same r", "cosine_dense": "cosine to float32, r = 0",
    "photographs": "photographs: cosine to float32 of the same r",
    "photographs_dense": "photographs: cosine to float32, r = 0", "top1": "top-1 as float32 of the same r",
    "top1_dense": "top-1 as float32, r = 0", "accuracy": "accuracy", "images": "images",
    "batch_change": "change beside other images", "rounds": "rounds",
}  # fmt: skip
NOTES = [
    "Speeds are over the dense float32 model of the same runtime: medians of the ratios of each round, in which all "
    "schemes and degrees of the runtime run in turn. Milliseconds are medians.",
    "*Speed of the product of the gains*: 1 means that merging gains as much in int8 as it does in float32.",
    "Agreement is with PyTorch's float32 on the same images: the cosine of the logits or, without a head, of the class "
    "feature, and the label of the largest logit or, without a head, that of the nearest other image in the features "
    "of float32 at r = 0. *Accuracy* is that of these labels. *Photographs* are random crops, which have more texture.",
    "*Change beside other images*: how far the output of an image moves when it is computed beside others instead of "
    "alone, at most, over the root mean square of all outputs. In float32 it is rounding.",
    "*MB on disk* counts everything that the runtime loads; the torchao rows are a state dict.",
]


@dataclass(frozen=True)
class Scheme:
    """A way to make int8 out of float32 in one runtime.

    Attributes:
        runtime: What runs it.
        name: As in the table.
        needs: The module that does it.
        make: Gives what runs, for one batch size, and the bytes on disk, from a `Source`.
    """

    runtime: str
    name: str
    needs: str
    make: Callable[["Source", int], tuple[Call, int]]


@dataclass
class Source:
    """One model at one degree, before it is quantised.

    Attributes:
        name: Of the model.
        r: The degree.
        image_size: Height and width of its images in pixels.
        folder: Where its files go.
        calibration: Images for those schemes that look at some, float32 `(images, 3, height, width)`.
        threads: Of every runtime.
    """

    name: str
    r: int
    image_size: int
    folder: Path
    calibration: np.ndarray
    threads: int

    def model(self, *, merged: bool = True) -> PreTrainedModel:
        config = AutoConfig.from_pretrained(self.name)
        has_head = (config.architectures or [""])[0].endswith("ForImageClassification")
        model_class = AutoModelForImageClassification if has_head else AutoModel
        model = model_class.from_pretrained(self.name, dtype=torch.float32).eval()
        return self.merge(model) if merged else model

    def merge(self, model: PreTrainedModel) -> PreTrainedModel:
        if self.r == 0:
            return model
        # without a head only the class token is read, so nothing needs to return to its place
        has_head = hasattr(model, "classifier")
        return apply_tome(model, self.r, restore=None if has_head else False)

    def path(self, scheme: str, ending: str = "onnx") -> Path:
        return self.folder / f"{Path(self.name).name}-{self.image_size}-r{self.r}-{scheme}.{ending}"

    def onnx(self) -> Path:
        """The float32 file, exported once."""
        return write_whole(self.path(FLOAT32), lambda part: export_onnx(self.model(), part, self.image_size))


def onnxruntime_float32(source: Source, batch_size: int) -> tuple[Call, int]:
    path = source.onnx()
    return onnxruntime_call(path, source.threads, batch_size), size_of(path, Path(f"{path}.data"))


def onnxruntime_dynamic(source: Source, batch_size: int, *, bits: int = 8) -> tuple[Call, int]:
    """Weights of linear layers in int8, activations with one scale for the whole tensor, found in every run.

    The kernels for CPUs without VNNI instructions add two products in 16 bits, which overflows where weights use all 8
    bits; with 7 it cannot.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": bits == 7}
    # by default onnxruntime takes ONNX's own Attention for one of its operators, and writes a file that does not load
    options["op_types_to_quantize"] = ["MatMul"]
    path = source.path(f"dynamic{bits}")
    write_whole(path, lambda part: quantize_dynamic(source.onnx(), part, **options))
    return onnxruntime_call(path, source.threads, batch_size), size_of(path)


def onnxruntime_dynamic_7_bits(source: Source, batch_size: int) -> tuple[Call, int]:
    return onnxruntime_dynamic(source, batch_size, bits=7)


def openvino_float32(source: Source, batch_size: int) -> tuple[Call, int]:
    path = source.onnx()
    return openvino_call(path, source.threads, batch_size), size_of(path, Path(f"{path}.data"))


def openvino_weights(source: Source, batch_size: int) -> tuple[Call, int]:
    """Weights in int8, one scale and zero point for each channel; computed in float32."""
    import nncf
    import openvino

    def write(part: Path) -> None:
        model = openvino.Core().read_model(source.onnx())
        openvino.save_model(nncf.compress_weights(model), part, compress_to_fp16=False)

    path = write_whole(source.path("weights", "xml"), write)
    return openvino_call(path, source.threads, batch_size), size_of(path, path.with_suffix(".bin"))


def openvino_full(source: Source, batch_size: int) -> tuple[Call, int]:
    """Weights and activations in int8, with scales that were found on calibration images."""
    import nncf
    import openvino

    def write(part: Path) -> None:
        images = nncf.Dataset([image[None] for image in source.calibration])
        model = nncf.quantize(
            openvino.Core().read_model(source.onnx()),
            images,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(source.calibration),
        )
        openvino.save_model(model, part, compress_to_fp16=False)

    path = write_whole(source.path("full", "xml"), write)
    return openvino_call(path, source.threads, batch_size), size_of(path, path.with_suffix(".bin"))


def torch_float32(source: Source, batch_size: int) -> tuple[Call, int]:
    model = source.model()
    return torch_call(model), saved_bytes(model, source)


def torchao_weights(source: Source, batch_size: int) -> tuple[Call, int]:
    from torchao.quantization import Int8WeightOnlyConfig

    return torchao_call(source, Int8WeightOnlyConfig(set_inductor_config=False))


def torchao_dynamic(source: Source, batch_size: int) -> tuple[Call, int]:
    """Weights in int8, activations with one scale for each token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return torchao_call(source, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))


def torchao_call(source: Source, config) -> tuple[Call, int]:
    from torchao.quantization import quantize_

    model = source.model(merged=False)
    quantize_(model, config)
    model = source.merge(model)
    return torch_call(model), saved_bytes(model, source)


SCHEMES = [
    Scheme("onnxruntime", FLOAT32, "onnxruntime", onnxruntime_float32),
    Scheme("onnxruntime", "dynamic int8", "onnxruntime", onnxruntime_dynamic),
    Scheme("onnxruntime", "dynamic int8, weights of 7 bits", "onnxruntime", onnxruntime_dynamic_7_bits),
    Scheme("openvino", FLOAT32, "openvino", openvino_float32),
    Scheme("openvino", "int8 weights (nncf)", "nncf", openvino_weights),
    Scheme("openvino", "full int8 (nncf)", "nncf", openvino_full),
    Scheme("torch", FLOAT32, "torch", torch_float32),
    Scheme("torch", "int8 weights (torchao)", "torchao", torchao_weights),
    Scheme("torch", "dynamic int8 (torchao)", "torchao", torchao_dynamic),
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["facebook/dinov2-small"], help="Hub ids or folders.")
    parser.add_argument(
        "--data",
        default=str(Path(__file__).parents[1] / "examples" / "fashion_mnist" / "test.parquet"),
        help="Labelled images, split test.",
    )
    parser.add_argument("--images", type=int, default=96, help="How many of them.")
    parser.add_argument("--image_size", type=int, help="Default: 224, or what the model is smaller for.")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--r", type=int, nargs="+", default=[0, 8, 16])
    runtimes = list(dict.fromkeys(scheme.runtime for scheme in SCHEMES))
    parser.add_argument("--runtimes", nargs="+", choices=runtimes, default=runtimes)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="Of every runtime.")
    parser.add_argument("--files", type=Path, help="Keep the exported files here, and use those that are here.")
    parser.add_argument("--resume", action="store_true", help="Add to the rows of --output; leave out what is there.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "int8_cpu")
    args = parser.parse_args()
    if 0 not in args.r:
        parser.error("--r must contain 0, the dense model that all others are compared with.")
    return args


class Judge:
    """Compares outputs with those of PyTorch's float32, which it computes for every degree when they are asked for."""

    def __init__(self, sources: dict[int, Source], labelled: np.ndarray, labels: np.ndarray, crops: np.ndarray | None):
        self.sources, self.labelled, self.labels, self.crops = sources, labelled, labels, crops
        self.has_head = hasattr(sources[0].model(), "classifier")
        calls = {r: torch_call(source.model()) for r, source in sources.items()}
        self.expected = {r: run(call, labelled) for r, call in calls.items()}
        self.expected_crops = {} if crops is None else {r: run(call, crops) for r, call in calls.items()}

    def agreement(self, call: Call, r: int, seconds: float) -> dict:
        """How near the outputs come, on as many images as there is time for.

        Args:
            call: Takes one image at a time.
            r: The degree of what is called.
            seconds: What one image takes.
        """
        count = min(len(self.labelled), max(8, int(EVALUATION_SECONDS / seconds)))
        outputs = run(call, self.labelled[:count])
        top1 = self.labels_of(outputs)
        row = {
            "cosine": cosine(outputs, self.expected[r][:count]),
            "cosine_dense": cosine(outputs, self.expected[0][:count]),
            "top1": share(top1 == self.labels_of(self.expected[r][:count])),
            "top1_dense": share(top1 == self.labels_of(self.expected[0][:count])),
            "accuracy": share(top1 == self.labels[:count]),
            "images": count,
        }
        if self.crops is not None:
            count = min(len(self.crops), max(8, int(EVALUATION_SECONDS / seconds)))
            outputs = run(call, self.crops[:count])
            row["photographs"] = cosine(outputs, self.expected_crops[r][:count])
            row["photographs_dense"] = cosine(outputs, self.expected_crops[0][:count])
        return row

    def labels_of(self, outputs: np.ndarray) -> np.ndarray:
        """The class of the largest logit, or the label of the nearest other image; of the first images."""
        if self.has_head:
            return outputs.argmax(axis=-1)
        similarity = unit(outputs) @ unit(self.expected[0]).T  # (outputs, images)
        np.fill_diagonal(similarity, -np.inf)
        return self.labels[similarity.argmax(axis=-1)]


def run(call: Call, images: np.ndarray) -> np.ndarray:
    """Outputs of single images, `(images, channels)`."""
    return np.concatenate([call(image[None]) for image in images])


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return round(float((unit(a) * unit(b)).sum(axis=-1).mean()), 5)


def share(hits: np.ndarray) -> float:
    return round(float(hits.mean()), 3)


def size_of(*paths: Path) -> int:
    return sum(path.stat().st_size for path in paths)


def saved_bytes(model: PreTrainedModel, source: Source) -> int:
    path = source.path("state", "pt")
    torch.save(model.state_dict(), path)
    size = path.stat().st_size
    path.unlink()
    return size


def batch_change(alone: Call, together: Call, images: np.ndarray) -> float:
    """How far the output of an image moves at most beside others, over the root mean square of all outputs."""
    outputs = run(alone, images)
    moved = np.abs(together(images) - outputs).max()
    return float(f"{moved / np.sqrt((outputs**2).mean()):.1e}")


def measure(runtime: str, batch_size: int, sources: dict[int, Source], judge: Judge, rounds: int) -> list[dict]:
    schemes = [scheme for scheme in SCHEMES if scheme.runtime == runtime]
    missing = [scheme for scheme in schemes if importlib.util.find_spec(scheme.needs) is None]
    for scheme in missing:
        print(f"{runtime}, {scheme.name}: left out, because {scheme.needs} is not installed", flush=True)
    schemes = [scheme for scheme in schemes if scheme not in missing]
    if not schemes or schemes[0].name != FLOAT32:
        return []
    made = {(scheme, r): scheme.make(source, batch_size) for scheme in schemes for r, source in sources.items()}
    calls = {f"{scheme.name} {r}": call for (scheme, r), (call, _) in made.items()}
    images = judge.labelled[:batch_size]
    times = time_in_turn(calls, images, rounds, limit=TIMING_SECONDS)
    dense, rows = f"{FLOAT32} 0", []
    for (scheme, r), (_, size) in made.items():
        speed = median_ratio(times, dense, f"{scheme.name} {r}")
        merging, int8 = median_ratio(times, dense, f"{FLOAT32} {r}"), median_ratio(times, dense, f"{scheme.name} 0")
        seconds = statistics.median(times[f"{scheme.name} {r}"])
        source = sources[r]
        alone, beside = (scheme.make(source, count)[0] for count in (1, 8))
        rows.append({
            "runtime": runtime, "scheme": scheme.name, "model": Path(source.name).name,
            "image_size": source.image_size, "batch_size": batch_size, "r": r, "speed": round(speed, 3),
            "merging": round(merging, 3), "int8": round(int8, 3), "share": round(speed / (merging * int8), 3),
            "milliseconds": round(1000 * seconds, 1), "megabytes": round(size / 1e6, 1),
            **judge.agreement(alone, r, seconds / batch_size),
            "batch_change": batch_change(alone, beside, judge.labelled[:8]), "rounds": len(times[dense]),
        })  # fmt: skip
    return rows


def pixels(images: list[Image.Image], name: str, image_size: int) -> np.ndarray:
    """Images as the processor of a model makes them, in the size that is asked for: `(images, 3, height, width)`."""
    images = [image.convert("RGB").resize((image_size, image_size), Image.Resampling.BICUBIC) for image in images]
    processor = AutoImageProcessor.from_pretrained(name)
    options = {"do_resize": False, "do_center_crop": False, "return_tensors": "np"}
    return np.asarray(processor(images, **options)["pixel_values"], np.float32)


def crops_of_photographs(count: int) -> list[Image.Image] | None:
    """Random square parts of the photographs of scikit-learn, or `None` where it is not installed."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        print("photographs: left out, because scikit-learn is not installed", flush=True)
        return None
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    generator, crops = np.random.default_rng(0), []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        side = int(min(photograph.size) * generator.uniform(0.4, 1))
        left, top = (int(generator.integers(0, length - side + 1)) for length in photograph.size)
        crops.append(photograph.crop((left, top, left + side, top + side)))
    return crops


def measure_model(args, name: str, folder: Path, results: Results) -> None:
    image_size = args.image_size or min(224, AutoConfig.from_pretrained(name).image_size)
    keys = {"model": Path(name).name, "image_size": image_size}
    cells = [
        (runtime, batch_size)
        for batch_size in args.batch_sizes
        for runtime in args.runtimes
        if not all(results.has(runtime=runtime, batch_size=batch_size, r=r, **keys) for r in args.r)
    ]
    if not cells:
        print(f"{keys['model']}: all there already", flush=True)
        return
    data = load_images(args.data, split="test", label_column="label", max_samples=args.images + CALIBRATION_IMAGES)
    labelled, labels = pixels(data["image"][:], name, image_size), np.asarray(data["label"][:])
    crops = crops_of_photographs(PHOTOGRAPHS)
    calibration, labelled, labels = (
        labelled[-CALIBRATION_IMAGES:], labelled[:-CALIBRATION_IMAGES], labels[:-CALIBRATION_IMAGES],
    )  # fmt: skip
    sources = {r: Source(name, r, image_size, folder, calibration, args.threads) for r in args.r}
    judge = Judge(sources, labelled, labels, None if crops is None else pixels(crops, name, image_size))
    for runtime, batch_size in cells:
        results.add(measure(runtime, batch_size, sources, judge, args.rounds))


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    packages = versions("torch", "transformers", "onnxruntime", "openvino", "nncf", "torchao")
    results = Results(args.output, "Merging and int8", COLUMNS, NOTES, packages, resume=args.resume)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.files or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in args.models:
            measure_model(args, name, folder, results)


if __name__ == "__main__":
    main()
