"""What the machine can do at most: matrix throughput at the shapes used, memory bandwidth; and what a step needs.

Training needs 6 N T + 6 H V S operations (with LoRA 4 instead of 6, of a reference pass 2), and attention's; N
parameters of the layers, T different real tokens (a pair's prompt counts once), H V the head, S scored tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any


def body_parameters(shape: Mapping[str, Any]) -> int:
    """Of the layers' matrices."""
    return sum(a * b for a, b in matrices(shape)) * int(shape["num_hidden_layers"])


def matrices(shape: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(inputs, outputs) of one layer's matrices."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    return [
        (width, width),
        (width, keys),
        (width, keys),
        (width, width),
        (width, inner),
        (width, inner),
        (inner, width),
    ]


def training_operations(
    shape: Mapping[str, Any], rows: Sequence[Sequence[tuple[int, int]]], *, lora: bool = False, reference: float = 0.0
) -> float:
    """Floating point operations of one step.

    Args:
        shape: of the model.
        rows: for each prompt, the (prompt's tokens, completion's tokens) of its completions.
        lora: only adapters are trained.
        reference: passes of a second model, which is only evaluated.
    """
    unique = sum(row[0][0] + sum(c for _, c in row) for row in rows)
    scored = sum(c for row in rows for _, c in row)
    head = shape["hidden_size"] * shape["vocab_size"]
    # Queries and keys that see each other: the prompt's among themselves, then each completion's with both.
    seen = sum(row[0][0] ** 2 / 2 + sum(p * c + c * c / 2 for p, c in row) for row in rows)
    forward = 2 * body_parameters(shape) * unique + 2 * head * scored
    attention = 4 * shape["hidden_size"] * shape["num_hidden_layers"] * seen
    passes = 2 if lora else 3
    return float((passes + reference) * forward + (3 + reference) * attention)


LARGE = ((2048, 2048, 2048),)
"""A shape at which the machine is as fast as it gets."""


@cache
def throughput(shapes: tuple[tuple[int, int, int], ...], dtype: str) -> float:
    """Operations a second of products [rows, inputs] x [inputs, outputs], each by the faster of two libraries."""
    import torch

    seconds, operations = 0.0, 0.0
    for rows, inputs, outputs in shapes:
        x = torch.randn(rows, inputs, dtype=getattr(torch, dtype))
        w = torch.randn(outputs, inputs, dtype=getattr(torch, dtype))
        ways: list[Callable[[], Any]] = [partial(torch.mm, x, w.t())]
        if torch.backends.mkldnn.is_available() and (dtype != "bfloat16" or has_half()):
            ways.append(partial(torch.ops.mkldnn._linear_pointwise, x, w, None, "none", [], ""))
        seconds += min(_seconds(way) for way in ways)
        operations += 2.0 * rows * inputs * outputs
    return operations / seconds


def has_half() -> bool:
    """Whether the processor multiplies in bfloat16; PyTorch does it a number at a time else."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def throughput_of(shape: Mapping[str, Any], tokens: int, dtype: str) -> float:
    """Operations a second at a model's own shapes, head included, for `tokens` rows."""
    of_layers = [(tokens, a, b) for a, b in matrices(shape)] * int(shape["num_hidden_layers"])
    # The same shapes again say nothing new; the head counts as one layer's matrix does, by its operations.
    some = of_layers[: len(matrices(shape))]
    return throughput((*some, (tokens, shape["hidden_size"], shape["vocab_size"])), dtype)


@cache
def bandwidth() -> float:
    """Bytes a second that are read from memory."""
    import torch

    x = torch.randn(64 * 2**20)
    return 4 * len(x) / min(_seconds(x.sum), _seconds(lambda: torch.dot(x, x)))


def decode_seconds(shape: Mapping[str, Any], rows: int, context: float, operations: float, read: float) -> float:
    """The least that one decoding step takes: products, or reading float32 weights, keys and values."""
    head = shape["hidden_size"] * shape["vocab_size"]
    weights = body_parameters(shape) + head
    keys = shape["hidden_size"] * shape["num_key_value_heads"] / shape["num_attention_heads"]
    live = 2 * shape["num_hidden_layers"] * keys * context * rows
    return float(max(4 * (weights + live) / read, 2 * weights * rows / operations))


def _seconds(way: Callable[[], Any]) -> float:
    """The fewest of some calls."""
    for _ in range(2):
        way()
    found = []
    end = time.perf_counter() + 0.25
    while len(found) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        way()
        found.append(time.perf_counter() - began)
    return min(found)
