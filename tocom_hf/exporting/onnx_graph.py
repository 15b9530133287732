# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""ONNX graphs: made from a traced program, tidied up for runtimes, and parted from their weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common

from tocom_hf.deployed.manifest import WEIGHTS
from tocom_hf.exporting import onnx_rules
from tocom_hf.exporting.catalogue import DegreeCatalogue
from tocom_hf.exporting.tracing import quiet


# the first that has attention as one operation
OPSET = 23
# smaller arrays stay in the graph: shapes, indices and scalars, which runtimes want to see there
_LEAST_BYTES = 1024


def make_graph(program: torch.export.ExportedProgram, input_name: str, output_name: str) -> ir.Model:
    """The ONNX graph of a traced program, with its weights."""
    with quiet(), torch.no_grad():
        # the exporter's own optimizer takes minutes for a merging model, and leaves what runtimes remove themselves
        made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    assert made is not None
    model = made.model
    _tidy(model)
    model.graph.inputs[0].name = input_name
    model.graph.outputs[0].name = output_name
    model.graph.name = "tocom"
    return model


def _tidy(model: ir.Model) -> None:
    """Fold and remove what no runtime needs to compute."""
    common.InlinePass()(model)
    onnxscript.optimizer.fold_constants(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    common.IdentityEliminationPass()(model)
    _fold_transposed_weights(model.graph)
    onnx_rules.drop_what_does_nothing(model.graph)
    onnx_rules.name_static_shapes(model.graph)
    onnx_rules.join_reshapes(model.graph)
    onnx_rules.drop_what_does_nothing(model.graph)
    onnx_rules.drop_masks_of_ones(model.graph)
    onnx_rules.attend_to_rows(model.graph)
    _expand_masks(model.graph)
    _scatter_in_float32(model.graph)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    # the exporter writes where on this machine each operation was called
    common.ClearMetadataAndDocStringPass()(model)
    common.NameFixPass()(model)


def _fold_transposed_weights(graph: ir.Graph) -> None:
    """Transpose weights here: a runtime that does it when it opens the graph has a copy of its own afterwards."""
    done: dict[tuple[str, tuple[int, ...]], ir.Value] = {}
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.const_value is None:
            continue
        order = tuple(node.attributes["perm"].as_ints())
        assert weight.name is not None
        if (weight.name, order) not in done:
            array = np.ascontiguousarray(weight.const_value.numpy().transpose(order))
            done[weight.name, order] = _add_constant(graph, f"{weight.name}_transposed_{len(done)}", array)
        ir.convenience.replace_all_uses_with(node.outputs[0], done[weight.name, order])
        graph.remove(node, safe=True)


def _expand_masks(graph: ir.Graph) -> None:
    """Give the bias of every attention a row for each query: onnxruntime 1.32 does not broadcast a single one."""
    for node in list(graph):
        mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
        if mask is None or mask.shape is None or mask.shape[-2] != 1:
            continue
        query = node.inputs[0]
        queries = None if query is None or query.shape is None else query.shape[-2]
        if queries == 1 or not isinstance(queries, int):
            continue
        dtype = mask.dtype.numpy() if mask.dtype is not None else np.dtype(np.float32)
        rows = _add_constant(graph, f"{node.name}_rows", np.zeros((1, 1, queries, 1), dtype))
        expanded = ir.node("Add", [mask, rows])
        graph.insert_before(node, expanded)
        node.replace_input_with(3, expanded.outputs[0])


def _scatter_in_float32(graph: ir.Graph) -> None:
    """Add up in float32 where half precision is scattered: onnxruntime has no other kernel for it on a CPU."""
    for node in list(graph):
        reduction = node.attributes.get("reduction")
        adds = reduction is not None and reduction.as_string() == "add"
        data = node.inputs[0] if node.op_type in ("ScatterND", "ScatterElements") and adds else None
        if data is None or _find_dtype(data) != ir.DataType.FLOAT16:
            continue
        for index in (0, 2):
            wide = ir.node("Cast", [node.inputs[index]], {"to": ir.DataType.FLOAT})
            graph.insert_before(node, wide)
            node.replace_input_with(index, wide.outputs[0])
        result = node.outputs[0]
        narrow = ir.node("Cast", [result], {"to": ir.DataType.FLOAT16})
        narrow.outputs[0].dtype, narrow.outputs[0].shape = ir.DataType.FLOAT16, result.shape
        result.dtype = ir.DataType.FLOAT
        uses = list(result.uses())
        graph.insert_after(node, narrow)
        for user, index in uses:
            if user is not narrow:
                user.replace_input_with(index, narrow.outputs[0])


def _find_dtype(value: ir.Value) -> ir.DataType | None:
    """The type of a value, which the exporter does not record behind every operation that only moves numbers."""
    while value.dtype is None:
        producer = value.producer()
        if producer is None or producer.op_type not in ("Transpose", "Reshape", "Expand", "Unsqueeze", "Squeeze"):
            return None
        moved = producer.inputs[0]
        assert moved is not None
        value = moved
    return value.dtype


def _add_constant(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def take_weights(model: ir.Model, names: DegreeCatalogue) -> None:
    """Hand the large arrays of a graph to the catalogue. Only their names are left, which `save_graph` fills in."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None:
            continue
        array = tensor.numpy()
        is_stored = np.issubdtype(array.dtype, np.floating) and (array.nbytes >= _LEAST_BYTES or names.composes(array))
        if not is_stored:
            # what the exporter left refers to the live weights of the model
            value.const_value = ir.Tensor(array.copy(), name=value.name)
            continue
        key = names.name(array)
        if key in graph.initializers:
            ir.convenience.replace_all_uses_with(value, graph.initializers[key])
            del graph.initializers[value.name]  # type: ignore[arg-type]
            continue
        del graph.initializers[value.name]  # type: ignore[arg-type]
        value.name = key
        value.const_value = _stored(tensor, key, offset=0)
        graph.initializers[key] = value


def add_factors(
    model: ir.Model, key: str, left: str, right: str, shapes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    """Let a graph add the product of two stored arrays to a stored weight. Runtimes compute that when they open it.

    Args:
        model: The graph, parted from its weights.
        key: Name of the weight.
        left, right: Names of the float32 arrays.
        shapes: Their shapes.
    """
    graph = model.graph
    weight = graph.initializers[key]
    assert weight.const_value is not None
    dtype = weight.const_value.dtype
    uses = list(weight.uses())
    factors = []
    for name, shape in zip((left, right), shapes, strict=True):
        tensor = ir.ExternalTensor(
            WEIGHTS, 0, 4 * shape[0] * shape[1], ir.DataType.FLOAT, shape=ir.Shape(shape), name=name, base_dir=""
        )
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
        graph.register_initializer(value)
        factors.append(value)
    nodes = [ir.node("MatMul", factors)]
    addend = weight
    if dtype != ir.DataType.FLOAT:
        nodes.append(ir.node("Cast", [weight], {"to": ir.DataType.FLOAT}))
        addend = nodes[-1].outputs[0]
    nodes.append(ir.node("Add", [addend, nodes[0].outputs[0]]))
    if dtype != ir.DataType.FLOAT:
        nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], {"to": dtype}))
    for node in nodes:
        node.outputs[0].name = f"{key}.composed.{node.op_type}_{len(nodes)}_{nodes.index(node)}"
    graph.insert_before(graph[0], nodes)
    for node, index in uses:
        node.replace_input_with(index, nodes[-1].outputs[0])


def rename_weight(model: ir.Model, key: str, name: str) -> None:
    """Let a graph use another stored array of the same shape and type."""
    value = model.graph.initializers.pop(key)
    assert value.const_value is not None
    value.name = name
    value.const_value = _stored(value.const_value, name, offset=0)
    model.graph.initializers[name] = value


def weights_of(model: ir.Model) -> list[str]:
    """Names of the stored weights that a graph uses, once it was parted from them."""
    return [
        name for name, value in model.graph.initializers.items() if isinstance(value.const_value, ir.ExternalTensor)
    ]


def save_graph(model: ir.Model, path: Path, offsets: Mapping[str, int]) -> None:
    """Write a graph that was parted from its weights.

    Args:
        model: The graph.
        path: Where to.
        offsets: Where in the file of weights each array begins, in bytes.
    """
    for key in weights_of(model):
        value = model.graph.initializers[key]
        assert value.const_value is not None
        value.const_value = _stored(value.const_value, key, offsets[key])
    ir.save(model, path)


def _stored(tensor: Any, name: str, offset: int) -> ir.ExternalTensor:
    """Stands in a graph for an array in the file of weights."""
    return ir.ExternalTensor(
        WEIGHTS, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape), name=name, base_dir=""
    )
