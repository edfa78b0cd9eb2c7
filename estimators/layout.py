"""Where the examples lie in a layer's tensors, and how to bring them to the front.

Most layers see (B, ...). Others see examples folded into a longer leading dimension (windows of an image, tokens of a
flattened batch), or time first. Which one it is, is found out by measuring (`plan.py`), not by guessing.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("rows", "flat", "time", "flat_time")
WHOLE = "whole"  # a batch of one example: everything is that example's


def fits(value: Tensor, layout: str, examples: int) -> bool:
    """Whether a tensor's shape allows the layout with this many examples."""
    if layout == WHOLE:
        return True
    if layout == "time":
        return value.dim() > 1 and value.shape[1] == examples
    if value.dim() == 0 or value.shape[0] == 0:
        return False
    return value.shape[0] == examples if layout == "rows" else value.shape[0] % examples == 0


def split(value: Tensor, layout: str, examples: int) -> Tensor:
    """A view (or copy, for "flat_time") with one more leading dimension: (B, *what the layer sees for one example).

    rows: (B, ...) -> (B, 1, ...); flat: (B k, ...) -> (B, k, ...); time: (T, B, ...) -> (B, T, 1, ...);
    flat_time: (T B, ...) -> (B, T, ...); whole: (...) -> (1, ...).
    """
    if layout == WHOLE:
        return value.unsqueeze(0)
    if layout == "rows":
        return value.unsqueeze(1)
    if layout == "flat":
        return unfold_rows(value, examples, -1)
    if layout == "time":
        return value.movedim(1, 0).unsqueeze(2)
    return unfold_rows(value, -1, examples).movedim(1, 0)


def alike(shape: torch.Size, layouts: list[str], examples: int) -> bool:
    """Whether all these layouts cut a tensor of this shape into the same examples."""
    places = torch.arange(shape.numel()).view(shape)
    cuts = [split(places, layout, examples).flatten(1) for layout in layouts]
    return all(torch.equal(cut, cuts[0]) for cut in cuts)


def unfold_rows(value: Tensor, outer: int, inner: int) -> Tensor:
    """(outer * inner, ...) -> (outer, inner, ...); one of the two may be -1."""
    return value.reshape(outer, inner, *value.shape[1:])
