# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Slow references, written from the papers with Python loops and float64, that share no code with the package."""

import functools
import math

import torch


def match(metric, r, protected, sizes=None, penalty=0.0, burdens=None):
    """ToMe, section 3: `[(a, b), ...]` for one image, the r most similar A tokens with their best B token.

    `metric` is a list of float lists; positions are those of the sequence. The logarithm of the size that two tokens
    have together takes `penalty` times off their similarity, and so do the `burdens` of both, a list of floats.
    """

    def cosine(x, y):
        dot = math.fsum(p * q for p, q in zip(x, y, strict=True))
        return dot / math.sqrt(math.fsum(p * p for p in x) * math.fsum(q * q for q in y))

    def similarity(a, b):
        found = cosine(metric[a], metric[b])
        if penalty:
            found -= penalty * math.log(sizes[a] + sizes[b])
        return found if burdens is None else found - burdens[a] - burdens[b]

    if r <= 0:
        return []
    evens = [i for i in range(0, len(metric), 2) if i >= protected]
    odds = [i for i in range(1, len(metric), 2) if i >= protected]
    edges = []
    for a in evens:
        best = max(odds, key=lambda b: similarity(a, b))
        edges.append((similarity(a, best), a, best))
    edges.sort(key=lambda edge: -edge[0])
    return [(a, b) for _, a, b in edges[:r]]


def joined(count, edges, protected):
    """The input positions of each output token, in output order; all where no token merges keep their order."""
    if not edges:
        return [[i] for i in range(count)]
    members = {i: [i] for i in range(count)}
    for a, b in edges:
        members[b] += members.pop(a)
    evens = [i for i in range(protected, count) if i % 2 == 0 and i in members]
    odds = [i for i in range(protected, count) if i % 2 == 1]
    return [members[i] for i in [*range(protected), *evens, *odds]]


def merge(tokens, sizes, edges, protected):
    """Size-weighted means of one image. `tokens`: float64 `(tokens, hidden)`, `sizes`: list. Returns both merged."""
    rows, totals = [], []
    for members in joined(len(tokens), edges, protected):
        total = sum(sizes[j] for j in members)
        rows.append(sum(sizes[j] * tokens[j] for j in members) / total)
        totals.append(total)
    return torch.stack(rows), totals


def merge_groups(groups, edges, protected):
    """The original positions of each output token, from those of each input token."""
    return [[p for j in members for p in groups[j]] for members in joined(len(groups), edges, protected)]


def metric_of(match_by, normed, key, value):
    """What tokens are compared by, a list of float lists: `normed` is `(tokens, hidden)`, the others have heads."""
    keys, values, key_mean = key.flatten(1), value.flatten(1), key.mean(1)

    def both(one, other):
        return torch.cat([one / one.norm(dim=1, keepdim=True), other / other.norm(dim=1, keepdim=True)], dim=1)

    choices = {
        "key_mean": key_mean, "keys": keys, "values": values, "keys_values": both(keys, values), "input": normed,
        "input_key_mean": both(normed, key_mean),
    }  # fmt: skip
    return choices[match_by].tolist()


VIT = ("layernorm_before", "attention", None, "layernorm_after", None, "o_proj")


def rotate(heads, groups, angles_of):
    """Rotary positions: every token is multiplied by the mean of its members' turns, pairs of channels at a time.

    `heads` is `(tokens, heads, dim)`; `angles_of` gives `dim / 2` angles for an input position, or `None` where it does
    not turn. Channel `i` and channel `i + dim / 2` are a pair.
    """
    turned = []
    for token, group in zip(heads, groups, strict=True):
        members = [angles_of(position) for position in group]
        if members[0] is None:
            turned.append(token)
            continue
        turn = torch.exp(1j * torch.stack(members)).mean(0)
        first, second = token.chunk(2, dim=-1)
        number = torch.complex(first, second) * turn
        turned.append(torch.cat([number.real, number.imag], dim=-1))
    return torch.stack(turned)


def part(module, path):
    """What stands at a path in a module."""
    return functools.reduce(getattr, path.split("."), module)


def first_part(*places):
    """The first of several places, each a module and a path, where there is something."""
    return next(part(module, path) for module, path in places if hasattr(module, path.split(".")[0]))


def head_dim(attention, hidden):
    """Number of channels of a head."""
    if hasattr(attention, "num_heads"):
        return hidden // attention.num_heads
    return first_part((attention, "head_dim"), (attention, "attention_head_size"))


def projected(attention, normed):
    """Queries, keys and values, `(tokens, hidden)` each: of three layers, or from thirds of the rows of one."""
    if hasattr(attention, "qkv"):
        hidden = normed.shape[-1]
        biases = [None] * 3 if attention.qkv.bias is None else attention.qkv.bias.split(hidden)
        weights = attention.qkv.weight.split(hidden)
        return [torch.nn.functional.linear(normed, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    names = ("query", "key", "value")
    return [first_part((attention, f"{name[0]}_proj"), (attention, name))(normed) for name in names]


def hidden_states(
    layers,
    images,
    schedule,
    protected,
    names=VIT,
    proportional=True,
    angles_of=None,
    turn=None,
    match_by="key_mean",
    penalty=0.0,
    attention_penalty=0.0,
):
    """Token states after the last layer of a pre-norm transformer in float64, image by image, not restored.

    `images` are the tokens that enter the first layer. `names` are those of a layer's parts: norm, attention, layer
    scale, norm, layer scale, and the output projection, in the attention or in the layer; behind these, where that is
    not `mlp`, the parts of the MLP. `angles_of` is that of `rotate`; `turn` does what `rotate` does, in other models:
    `(heads, groups)` to heads. `match_by` is that of `metric_of`, `penalty` that of `match`; `attention_penalty` is how
    much of the logarithm of the attention of the first token is a token's burden in `match`. All three may be lists
    with an entry for each layer.

    Returns the states, and for every image the groups of input positions that each output token stands for.
    """
    norm1, attention_name, scale1, norm2, scale2, output, *mlp = names
    if angles_of is not None:
        turn = functools.partial(rotate, angles_of=angles_of)
    outputs, all_groups = [], []
    for tokens in images:
        groups = [[i] for i in range(len(tokens))]
        parts = (each_layer(value, len(schedule)) for value in (match_by, penalty, attention_penalty))
        rules = zip(*parts, strict=True)
        for layer, r, rule in zip(layers, schedule, rules, strict=True):
            layer_match_by, layer_penalty, layer_attention_penalty = rule
            attention = part(layer, attention_name)
            dim = head_dim(attention, tokens.shape[-1])
            normed = getattr(layer, norm1)(tokens)
            query, key, value = projected(attention, normed)
            if hasattr(attention, "q_norm"):  # over all heads at once
                query, key = attention.q_norm(query), attention.k_norm(key)
            query, key, value = (part.view(len(tokens), -1, dim) for part in (query, key, value))
            sizes = [len(group) for group in groups]
            if turn is not None:
                query, key = turn(query, groups), turn(key, groups)
            mixed, looked_at = [], []
            for head in range(key.shape[1]):
                logits = query[:, head] @ key[:, head].T / math.sqrt(dim)
                if proportional:
                    logits = logits + torch.tensor(sizes, dtype=torch.float64).log()
                mixed.append(logits.softmax(-1) @ value[:, head])
                looked_at.append(logits[0].softmax(-1))
            burdens = (layer_attention_penalty * torch.stack(looked_at).mean(0).log()).tolist()
            metric = metric_of(layer_match_by, normed, key, value)
            r = min(r, (len(tokens) - protected) // 2)
            edges = match(metric, r, protected, sizes, layer_penalty, burdens)
            branch = first_part((attention, output), (layer, output))(torch.cat(mixed, dim=-1))
            tokens = tokens + scaled(layer, scale1, branch)
            tokens, _ = merge(tokens, sizes, edges, protected)
            groups = merge_groups(groups, edges, protected)
            branch = getattr(layer, norm2)(tokens)
            for path in mlp[0] if mlp else ("ffn" if hasattr(layer, "ffn") else "mlp",):
                branch = part(layer, path)(branch)
            tokens = tokens + scaled(layer, scale2, branch)
        outputs.append(tokens)
        all_groups.append(groups)
    return torch.stack(outputs), all_groups


def each_layer(value, num_layers):
    """One value for each layer."""
    return value if isinstance(value, list | tuple) else [value] * num_layers


def scaled(layer, name, branch):
    """A branch times a layer scale, which is a module or a parameter; `name` is `None` where there is none."""
    if name is None:
        return branch
    scale = getattr(layer, name)
    return scale * branch if isinstance(scale, torch.nn.Parameter) else scale(branch)


def restore(tokens, groups):
    """Every input position gets the output token of its group."""
    restored = []
    for image, image_groups in zip(tokens, groups, strict=True):
        owner = {position: token for token, group in enumerate(image_groups) for position in group}
        restored.append(torch.stack([image[owner[position]] for position in range(len(owner))]))
    return torch.stack(restored)
