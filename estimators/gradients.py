"""Per-example gradients of one parameter in the few forms they come in, and how each is squared and summed.

None of the forms holds B x P numbers unless the parameter is small: a matrix's gradient is kept as the two factors of
its sum of outer products, an embedding's as the rows it touches. The names are those of one use of a parameter in a
forward pass: B examples, T positions (tokens, pixels), O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradmatch.estimators import kernel
from gradmatch.estimators.products import (
    Workspace,
    add_product,
    add_square_of_product,
    add_squares_of_products,
)

PAIRS_UP_TO = 3  # positions; above, forming each gradient is cheaper than all pairs of positions (measured)
SMALL_BYTES = 2 * 2**20  # up to here, the gradients of all examples at once are the quickest
CHUNK_BYTES = 32 * 2**20  # dense gradients of several examples at once stay below this


class Gradients(Protocol):
    """B per-example gradients of one parameter."""

    @property
    def examples(self) -> int:
        """B."""

    def dense(self, first: int, last: int) -> Tensor:
        """The gradients of examples first .. last-1, (last - first, *shape)."""

    def total(self) -> Tensor:
        """Their sum, (*shape)."""

    def add_squares(self, squares: Tensor, fourths: Tensor | None, space: Workspace) -> None:
        """squares += sum_n g_n^2 and, where wanted, fourths += sum_n g_n^4; both (*shape)."""


@dataclass
class Dense:
    """Small gradients as they are: value (B, *shape)."""

    value: Tensor

    @property
    def examples(self) -> int:
        """B."""
        return self.value.shape[0]

    def dense(self, first: int, last: int) -> Tensor:
        """A slice."""
        return self.value[first:last]

    def total(self) -> Tensor:
        """Sum over examples."""
        return self.value.sum(0)

    def add_squares(self, squares: Tensor, fourths: Tensor | None, space: Workspace) -> None:
        """squares += sum_n value_n^2."""
        square = self.value * self.value
        squares.add_(square.sum(0))
        if fourths is not None:
            fourths.add_((square * square).sum(0))


@dataclass
class Outer:
    """Gradient of a matrix as a sum of outer products: G_n = sum_t left_nt right_nt'.

    left: (B, T, O), right: (B, T, I) -> G_n: (O, I). For a linear layer left is the gradient at its output and right its
    input.
    """

    left: Tensor
    right: Tensor

    @property
    def examples(self) -> int:
        """B."""
        return self.left.shape[0]

    def dense(self, first: int, last: int) -> Tensor:
        """(last - first, O, I)."""
        return torch.bmm(self.left[first:last].transpose(1, 2), self.right[first:last])

    def total(self) -> Tensor:
        """(O, I)."""
        return self.left.flatten(0, 1).t() @ self.right.flatten(0, 1)

    def add_squares(self, squares: Tensor, fourths: Tensor | None, space: Workspace) -> None:
        """squares += sum_n G_n^2, in whichever way is cheapest for this number of positions."""
        positions = self.left.shape[1]
        if positions == 1:
            add_squared_products(self.left[:, 0], self.right[:, 0], squares, fourths, space)
        elif fourths is None and kernel.add_squares(self.left, self.right, squares, space):
            pass
        elif self.examples * squares.numel() * squares.element_size() <= SMALL_BYTES:
            Dense(self.dense(0, self.examples)).add_squares(squares, fourths, space)
        elif positions <= PAIRS_UP_TO and fourths is None:
            add_pairs(self.left, self.right, squares)
        else:
            add_squares_of_products(self.left, self.right, squares, fourths, space)


def add_squared_products(
    left: Tensor, right: Tensor, squares: Tensor, fourths: Tensor | None, space: Workspace
) -> None:
    """(l r')^2 = l^2 (r^2)': with one position an example, the squares are one product of squares. (B, O), (B, I)."""
    left, right = left * left, right * right
    add_product(left.t(), right.t(), squares, space)
    if fourths is not None:
        add_product(left.square_().t(), right.square_().t(), fourths, space)


def add_pairs(left: Tensor, right: Tensor, squares: Tensor) -> None:
    """(sum_t l_t r_t')^2 = sum_{t <= s} c_ts (l_t l_s)(r_t r_s)', c = 1 on the diagonal and 2 off it.

    One product over B T (T + 1) / 2 pairs, without forming any example's gradient. (B, T, O), (B, T, I).
    """
    first, second = torch.triu_indices(left.shape[1], left.shape[1], device=left.device)
    factor = torch.where(first == second, 1.0, 2.0).to(left.dtype)
    pairs_left = left[:, first] * left[:, second] * factor[:, None]
    pairs_right = right[:, first] * right[:, second]
    squares.addmm_(pairs_left.flatten(0, 1).t(), pairs_right.flatten(0, 1))


@dataclass
class Patches:
    """Gradient of a convolution's kernel: G_n = sum over places of left_n(place) patch_n(place)', in the kernel's shape.

    left: (B, O, L) for L places; windows: a strided view (B, C, k.., L..) of the padded input, from which the patches of
    one example at a time are copied; shape: (O, C, k..).
    """

    left: Tensor
    windows: Tensor
    shape: torch.Size

    @property
    def examples(self) -> int:
        """B."""
        return self.left.shape[0]

    def matrices(self, first: int, last: int) -> Tensor:
        """The patches of some examples, (last - first, C k.., L)."""
        return self.windows[first:last].reshape(last - first, -1, self.left.shape[2])

    def outer(self) -> Outer:
        """The same as a linear layer on patches; all patches at once."""
        return Outer(self.left.transpose(1, 2), self.matrices(0, self.examples).transpose(1, 2))

    def dense(self, first: int, last: int) -> Tensor:
        """(last - first, *shape)."""
        patches = self.matrices(first, last)
        return torch.bmm(self.left[first:last], patches.transpose(1, 2)).view(last - first, *self.shape)

    def total(self) -> Tensor:
        """(*shape)."""
        value = self.left.new_zeros(self.shape).flatten(1)
        for n in range(self.examples):
            value.addmm_(self.left[n], self.matrices(n, n + 1)[0].t())
        return value.view(self.shape)

    def add_squares(self, squares: Tensor, fourths: Tensor | None, space: Workspace) -> None:
        """Example by example, the patches copied into one buffer."""
        flat, flat_fourths = squares.flatten(1), None if fourths is None else fourths.flatten(1)
        patches = self.windows.new_empty(self.windows.shape[1:])
        matrix = patches.view(1, -1, self.left.shape[2])
        for left, window in zip(torch.split(self.left, 1), self.windows.unbind(), strict=True):
            patches.copy_(window)
            add_square_of_product(left, matrix, flat, flat_fourths, space)


@dataclass
class Rows:
    """Gradient of an embedding: example n adds left_nt to row index_nt. index (B, T), left (B, T, D)."""

    index: Tensor
    left: Tensor
    shape: tuple[int, int]

    @property
    def examples(self) -> int:
        """B."""
        return self.index.shape[0]

    def dense(self, first: int, last: int) -> Tensor:
        """(last - first, V, D)."""
        count, (rows, width) = last - first, self.shape
        offsets = torch.arange(count, device=self.index.device)[:, None] * rows
        flat = self.left.new_zeros(count * rows, width)
        flat.index_add_(0, (self.index[first:last] + offsets).flatten(), self.left[first:last].flatten(0, 1))
        return flat.view(count, rows, width)

    def total(self) -> Tensor:
        """(V, D)."""
        return self.left.new_zeros(self.shape).index_add_(0, self.index.flatten(), self.left.flatten(0, 1))

    def merged(self) -> tuple[Tensor, Tensor, Tensor]:
        """Uses of the same row by the same example added up: example (U,), row (U,), gradient (U, D)."""
        offsets = torch.arange(self.examples, device=self.index.device)[:, None] * self.shape[0]
        keys, where = torch.unique(self.index + offsets, return_inverse=True)
        summed = self.left.new_zeros(keys.numel(), self.left.shape[2])
        summed.index_add_(0, where.flatten(), self.left.flatten(0, 1))
        return keys // self.shape[0], keys % self.shape[0], summed

    def add_squares(self, squares: Tensor, fourths: Tensor | None, space: Workspace) -> None:
        """squares[row] += (sum of the example's gradients of this row)^2, without a V x D matrix an example."""
        _, rows, summed = self.merged()
        summed.mul_(summed)
        squares.index_add_(0, rows, summed)
        if fourths is not None:
            fourths.index_add_(0, rows, summed * summed)


@dataclass
class SetAside:
    """A matrix's gradient already squared and added, but for the rows that other uses of the same weights also touch.

    A language model that shares its embedding with its output layer: G_n + E_n, where E_n has few rows. G_n^2 is added
    whole when G_n is formed; what is set aside is G_n at the rows of the tokens of example n, to add
    (G + E)^2 - G^2 once E is known. example, row: (U,); value: (U, D).
    """

    example: Tensor
    row: Tensor
    value: Tensor
    examples: int


def set_aside(outer: Outer, index: Tensor, rows: int) -> SetAside:
    """G_n at the rows `index` (B, T) of its example, each once; outer.left is (B, T', V)."""
    offsets = torch.arange(outer.examples, device=index.device)[:, None] * rows
    keys = torch.unique(index + offsets)
    example, row = keys // rows, keys % rows
    counts = torch.bincount(example, minlength=outer.examples).tolist()
    pieces = [
        outer.left[n].index_select(1, own).t() @ outer.right[n]
        for n, own in enumerate(row.split(counts))
        if len(own)
    ]
    return SetAside(example, row, torch.cat(pieces), outer.examples)


def add_cross_terms(aside: SetAside, uses: Rows, squares: Tensor, fourths: Tensor | None) -> None:
    """squares[row] += (G + E)^2 - G^2 at the rows set aside, of which E's are a part."""
    example, row, summed = uses.merged()
    height = uses.shape[0]
    places = torch.searchsorted(aside.example * height + aside.row, example * height + row)
    before = aside.value[places]
    after = (before + summed).square_()
    before = before.square()
    squares.index_add_(0, row, after - before)
    if fourths is not None:
        fourths.index_add_(0, row, after.square() - before.square())


@dataclass
class Several:
    """Gradients of one parameter by unlike uses; added before anything is squared."""

    parts: list[Gradients]

    @property
    def examples(self) -> int:
        """B."""
        return self.parts[0].examples

    def dense(self, first: int, last: int) -> Tensor:
        """Sum over uses."""
        value = self.parts[0].dense(first, last)
        for part in self.parts[1:]:
            value = value + part.dense(first, last)
        return value

    def total(self) -> Tensor:
        """Sum over uses and examples."""
        value = self.parts[0].total()
        for part in self.parts[1:]:
            value = value + part.total()
        return value

    def add_squares(self, squares: Tensor, fourths: Tensor | None, space: Workspace) -> None:
        """Dense gradients of a few examples at a time."""
        step = max(1, CHUNK_BYTES // max(1, squares.numel() * squares.element_size()))
        for first in range(0, self.examples, step):
            Dense(self.dense(first, min(first + step, self.examples))).add_squares(squares, fourths, space)


def combine(parts: list[Gradients]) -> Gradients:
    """All uses of one parameter in one form: positions of like uses are simply laid end to end."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Dense) for part in parts):
        return Dense(torch.stack([part.value for part in parts if isinstance(part, Dense)]).sum(0))
    outers = [part for part in parts if isinstance(part, Outer)]
    if len(outers) == len(parts):
        return Outer(
            torch.cat([part.left for part in outers], 1), torch.cat([part.right for part in outers], 1)
        )
    rows = [part for part in parts if isinstance(part, Rows)]
    if len(rows) == len(parts):
        index = torch.cat([part.index for part in rows], 1)
        return Rows(index, torch.cat([part.left for part in rows], 1), rows[0].shape)
    return Several(parts)
