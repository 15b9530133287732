# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Slow references, written from the papers with Python loops and float64, that share no code with the package."""

import math

import torch


def match(metric, r, protected):
    """ToMe, section 3: `[(a, b), ...]` for one image, the r most similar A tokens with their best B token.

    `metric` is a list of float lists; positions are those of the sequence.
    """

    def cosine(x, y):
        dot = math.fsum(p * q for p, q in zip(x, y, strict=True))
        return dot / math.sqrt(math.fsum(p * p for p in x) * math.fsum(q * q for q in y))

    if r <= 0:
        return []
    evens = [i for i in range(0, len(metric), 2) if i >= protected]
    odds = [i for i in range(1, len(metric), 2) if i >= protected]
    edges = []
    for a in evens:
        best = max(odds, key=lambda b: cosine(metric[a], metric[b]))
        edges.append((cosine(metric[a], metric[best]), a, best))
    edges.sort(key=lambda edge: -edge[0])
    return [(a, b) for _, a, b in edges[:r]]


def merge(tokens, sizes, edges, protected):
    """Size-weighted means of one image. `tokens`: float64 `(tokens, hidden)`, `sizes`: list. Returns both merged."""
    groups = {i: [i] for i in range(len(tokens))}
    for a, b in edges:
        groups[b] += groups.pop(a)
    evens = [i for i in range(protected, len(tokens)) if i % 2 == 0 and i in groups]
    odds = [i for i in range(protected, len(tokens)) if i % 2 == 1]
    rows, totals = [], []
    for i in [*range(protected), *evens, *odds]:
        total = sum(sizes[j] for j in groups[i])
        rows.append(sum(sizes[j] * tokens[j] for j in groups[i]) / total)
        totals.append(total)
    return torch.stack(rows), totals


def vit_hidden_states(backbone, pixel_values, schedule, protected, proportional=True):
    """The last hidden states (before the final norm) of a ViT or DeiT backbone in float64, image by image."""
    outputs = []
    for tokens in backbone.embeddings(pixel_values):
        sizes = [1] * len(tokens)
        for layer, r in zip(backbone.layers, schedule, strict=True):
            attention = layer.attention
            heads, dim = attention.num_attention_heads, attention.head_dim
            normed = layer.layernorm_before(tokens)
            query, key, value = (
                projection(normed).view(-1, heads, dim)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            mixed = []
            for head in range(heads):
                logits = query[:, head] @ key[:, head].T / math.sqrt(dim)
                if proportional:
                    logits = logits + torch.tensor(sizes, dtype=torch.float64).log()
                mixed.append(logits.softmax(-1) @ value[:, head])
            tokens = tokens + attention.o_proj(torch.cat(mixed, dim=-1))
            r = min(r, (len(tokens) - protected) // 2)
            metric = key.mean(1).tolist()
            tokens, sizes = (
                merge(tokens, sizes, match(metric, r, protected) if r > 0 else [], protected)
                if r > 0
                else (tokens, sizes)
            )
            tokens = tokens + layer.mlp(layer.layernorm_after(tokens))
        outputs.append(tokens)
    return torch.stack(outputs)
