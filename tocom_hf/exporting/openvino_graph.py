# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""OpenVINO graphs: converted from ONNX graphs, and pointed at the one file of weights."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tocom_hf.exporting.catalogue import DegreeCatalogue


_DTYPES: dict[str, Any] = {
    "f64": np.float64, "f32": np.float32, "f16": np.float16, "i64": np.int64, "i32": np.int32, "i16": np.int16,
    "i8": np.int8, "u8": np.uint8, "boolean": np.bool_,
}  # fmt: skip


def convert(onnx_file: Path, folder: Path) -> tuple[Path, Path]:
    """Convert an ONNX file with its weights.

    Args:
        onnx_file: The graph; its weights lie beside it.
        folder: Where to write the OpenVINO files.

    Returns:
        The graph and its weights.
    """
    import openvino

    model = openvino.Core().read_model(onnx_file)
    graph, weights = folder / "converted.xml", folder / "converted.bin"
    openvino.serialize(model, graph, weights)
    return graph, weights


def take_weights(graph: Path, weights: Path, names: DegreeCatalogue) -> ElementTree.Element:
    """Hand the arrays of a converted graph to the catalogue; its constants are called by their names there.

    Returns:
        The graph, whose offsets `save_graph` fills in.
    """
    root = ElementTree.parse(graph).getroot()
    content = np.memmap(weights, dtype=np.uint8, mode="r") if weights.stat().st_size else np.zeros(0, np.uint8)
    used: dict[str, int] = {}
    for layer, data in _constants(root):
        offset, size = int(data.get("offset", 0)), int(data.get("size", 0))
        dtype = np.dtype(_DTYPES.get(data.get("element_type", ""), np.uint8))
        array = content[offset : offset + size].view(dtype)
        shape = [int(side) for side in data.get("shape", "").split(",") if side.strip()]
        if np.prod(shape, dtype=np.int64) == array.size:
            array = array.reshape(shape)
        key = names.name(np.array(array))
        used[key] = used.get(key, 0) + 1
        layer.set("name", key if used[key] == 1 else f"{key}#{used[key]}")
    # it tells how and on which machine the graph was made
    for element in root.findall("rt_info"):
        root.remove(element)
    return root


def save_graph(root: ElementTree.Element, path: Path, offsets: Mapping[str, int]) -> None:
    """Write a graph.

    Args:
        root: What `take_weights` returned.
        path: Where to.
        offsets: Where in the file of weights each array begins, in bytes.
    """
    for layer, data in _constants(root):
        data.set("offset", str(offsets[layer.get("name", "").partition("#")[0]]))
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _constants(root: ElementTree.Element) -> list[tuple[ElementTree.Element, ElementTree.Element]]:
    """The constants of a graph, and where each says what it holds. Those without content are left out."""
    found = []
    for layer in root.iter("layer"):
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None and data.get("offset") is not None:
            found.append((layer, data))
    return found
