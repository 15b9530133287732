# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""Plugins on a layer whose outputs are query, key and value: one LoRA that changes the rows of query and value alone.

Query and value have factors of rank h of their own, as where they are layers of their own. Together they are one LoRA
of rank 2h: `lora_A` of the query stands above that of the value, and `lora_B` is `[[B_q, 0], [0, 0], [0, B_v]]`.
"""

import torch

from tocom_hf.plugins.composition import Factors


def join_query_and_value(query: Factors, value: Factors) -> Factors:
    """One LoRA of the fused layer, `lora_A` `(2 rank, in)` and `lora_B` `(3 out, 2 rank)`, from those of two thirds."""
    rank = query.lora_A.shape[0]
    out = query.lora_B.shape[0]
    lora_B = query.lora_B.new_zeros(3 * out, 2 * rank)
    lora_B[:out, :rank] = query.lora_B
    lora_B[2 * out :, rank:] = value.lora_B
    return Factors(torch.cat([query.lora_A, value.lora_A]), lora_B)


def split_query_and_value(joined: Factors) -> tuple[Factors, Factors]:
    """The factors of query and value, of which `join_query_and_value` made one LoRA."""
    query_A, value_A = joined.lora_A.chunk(2)  # (rank, in) each
    query_rows, _, value_rows = joined.lora_B.chunk(3)  # (out, 2 rank) each
    rank = query_A.shape[0]
    return Factors(query_A, query_rows[:, :rank]), Factors(value_A, value_rows[:, rank:])


def is_query_and_value(joined: Factors) -> bool:
    """Whether a LoRA of the fused layer is zero wherever `join_query_and_value` leaves zeros."""
    again = join_query_and_value(*split_query_and_value(joined))
    return torch.equal(again.lora_B, joined.lora_B)
