# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""What the exporter of torch writes out that no runtime needs to compute: each rule removes one kind of it.

At batch 1 every operation counts, however little it does. Values do not change by any of these rules.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir


_END = np.iinfo(np.int64).max


def drop_what_does_nothing(graph: ir.Graph) -> None:
    """Remove operations that hand on what they get: casts to the same type, whole slices, and their like."""
    rules: dict[str, Callable[[ir.Node], bool]] = {
        "Cast": _casts_to_the_same,
        "Slice": _takes_everything,
        "Transpose": _keeps_the_order,
        "Expand": _expands_nothing,
        "Reshape": _keeps_the_shape,
    }
    for node in list(graph):
        rule = rules.get(node.op_type)
        if rule is not None and rule(node):
            given, result = node.inputs[0], node.outputs[0]
            assert given is not None
            # the exporter does not record shape and type behind every operation
            if given.shape is None:
                given.shape = result.shape
            if given.dtype is None and result.dtype is not None:
                given.dtype = result.dtype
            ir.convenience.replace_all_uses_with(result, given)
            graph.remove(node, safe=True)


def name_static_shapes(graph: ir.Graph) -> None:
    """Write the shapes of reshapes, and the numbers of sorted values, as constants: only the batch is open."""
    for node in list(graph):
        result = node.outputs[0]
        if result.shape is None or len(node.inputs) < 2 or _constant(node.inputs[1]) is not None:
            continue
        open_dims = [dim for dim in result.shape if not isinstance(dim, int)]
        if node.op_type == "Reshape" and len(open_dims) <= 1:
            sizes = [dim if isinstance(dim, int) else -1 for dim in result.shape]
            node.replace_input_with(1, _add(graph, f"{result.name}_shape", sizes))
        elif node.op_type == "TopK":
            count = result.shape[node.attributes["axis"].as_int() if "axis" in node.attributes else -1]
            if isinstance(count, int):
                node.replace_input_with(1, _add(graph, f"{result.name}_count", [count]))


def join_reshapes(graph: ir.Graph) -> None:
    """Let a reshape read what the reshape before it read."""
    for node in list(graph):
        before = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] is not None else None
        sizes = _constant(node.inputs[1]) if before is not None else None
        # a zero would stand for a size of the input
        if before is not None and before.op_type == "Reshape" and sizes is not None and 0 not in sizes:
            node.replace_input_with(0, before.inputs[0])


def drop_masks_of_ones(graph: ir.Graph) -> None:
    """Take masks off attention that mask nothing: transformers makes one for dense layers while it is traced."""
    for node in list(graph):
        mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
        producer = None if mask is None else mask.producer()
        source = producer.inputs[0] if producer is not None and producer.op_type == "Expand" else mask
        known = _constant(source)
        if known is not None and known.dtype == np.bool_ and known.all():
            node.resize_inputs(3)


def attend_to_rows(graph: ir.Graph) -> None:
    """Let attention split the heads itself: `(batch, tokens, hidden)` goes in and comes out, nothing is transposed."""
    for node in list(graph):
        if node.op_type != "Attention":
            continue
        sources = [_split_heads(value) for value in node.inputs[:3]]
        users = [user for user, _ in node.outputs[0].uses()]
        joined = _joined_heads(users[0]) if len(users) == 1 else None
        if joined is None or any(source is None for source in sources):
            continue
        for index, source in enumerate(sources):
            assert source is not None
            node.replace_input_with(index, source[0])
            if index < 2:
                name = ("q_num_heads", "kv_num_heads")[index]
                node.attributes[name] = ir.AttrInt64(name, source[1])
        result = node.outputs[0]
        result.shape = joined.outputs[0].shape
        ir.convenience.replace_all_uses_with(joined.outputs[0], result, replace_graph_outputs=True)


def _split_heads(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """What was split into heads, and how many they are; `None` where this is something else."""
    transpose = None if value is None else value.producer()
    if transpose is None or not _swaps_heads_and_tokens(transpose):
        return None
    reshape = transpose.inputs[0].producer() if transpose.inputs[0] is not None else None
    sizes = None if reshape is None or reshape.op_type != "Reshape" else _constant(reshape.inputs[1])
    source = None if reshape is None else reshape.inputs[0]
    if sizes is None or len(sizes) != 4 or source is None or source.shape is None or len(source.shape) != 3:
        return None
    return source, int(sizes[2])


def _joined_heads(transpose: ir.Node) -> ir.Node | None:
    """The reshape that puts heads side by side again, behind a transpose."""
    if not _swaps_heads_and_tokens(transpose):
        return None
    users = [user for user, _ in transpose.outputs[0].uses()]
    if len(users) != 1 or users[0].op_type != "Reshape":
        return None
    sizes = _constant(users[0].inputs[1])
    return users[0] if sizes is not None and len(sizes) == 3 else None


def _swaps_heads_and_tokens(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == (0, 2, 1, 3)


def _casts_to_the_same(node: ir.Node) -> bool:
    given: ir.Value | None = node.inputs[0]
    # a reshape has the type of what it reads
    while given is not None and given.dtype is None:
        producer = given.producer()
        given = producer.inputs[0] if producer is not None and producer.op_type == "Reshape" else None
    return given is not None and given.dtype == node.attributes["to"].as_int()


def _expands_nothing(node: ir.Node) -> bool:
    # what `index_add` adds has its full shape; the exporter expands it all the same
    is_added = all(user.op_type == "ScatterND" and index == 2 for user, index in node.outputs[0].uses())
    return is_added or _keeps_the_shape(node)


def _takes_everything(node: ir.Node) -> bool:
    starts, ends = _constant(node.inputs[1]), _constant(node.inputs[2])
    steps = _constant(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
    if starts is None or ends is None or steps is None:
        return False
    return bool((starts == 0).all() and (ends == _END).all() and (steps == 1).all())


def _keeps_the_order(node: ir.Node) -> bool:
    order = list(node.attributes["perm"].as_ints())
    return order == sorted(order)


def _keeps_the_shape(node: ir.Node) -> bool:
    before, after = node.inputs[0], node.outputs[0]
    if before is None or before.shape is None or after.shape is None or len(before.shape) != len(after.shape):
        return False
    # with one size open at most, equal numbers of elements leave it no choice
    differing = [(one, other) for one, other in zip(before.shape, after.shape, strict=True) if one != other]
    if not differing:
        return True
    return node.op_type == "Reshape" and len(differing) == 1 and not all(isinstance(dim, int) for dim in differing[0])


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """What a value holds, where it is known."""
    if value is None or value.const_value is None:
        return None
    return np.atleast_1d(value.const_value.numpy())


def _add(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    tensor = ir.Tensor(np.array(numbers, np.int64), name=name)
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
