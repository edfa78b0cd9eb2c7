"""An optional compiled kernel that squares every example's gradient in registers; `GRADMATCH_KERNEL=1` asks for it.

It serves single-precision linear layers on the CPU where the extension was built (`gradmatch.estimators.native`), and pays
where examples are short: torch must write each example's gradient to memory before it can square it. Its sums differ from
torch's in their last digits, so that it is used only where it is asked for.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from gradmatch.estimators import native
from gradmatch.estimators.products import Workspace

SOURCE = Path(__file__).with_name("squares.c")
BAND = 48  # outputs that a thread takes at least


def add_squares(left: Tensor, right: Tensor, squares: Tensor, space: Workspace) -> bool:
    """squares += sum_n (sum_t left_nt right_nt')^2 if the kernel can; else False and nothing is done.

    left: (B, T, O), right: (B, T, I), squares: (O, I). Every thread takes a band of outputs, which does not change the sums.
    """
    plain = all(
        value.dtype == torch.float32 and value.device.type == "cpu" for value in (left, right, squares)
    )
    library = loaded() if plain and squares.is_contiguous() else None
    if library is None:
        return False
    left, right = left.contiguous(), right.contiguous()
    examples, positions, outputs, inputs = (*left.shape, right.shape[2])
    count = max(1, min(torch.get_num_threads(), outputs // BAND))
    library.room.restype = ctypes.c_ssize_t
    room = library.room(*(ctypes.c_ssize_t(size) for size in (examples, positions, outputs, inputs)))
    packed = space.take(count, room, left)

    def band(number: int) -> None:
        sizes = (
            number * outputs // count,
            (number + 1) * outputs // count,
            examples,
            positions,
            outputs,
            inputs,
        )
        library.add_squares(
            *(ctypes.c_void_p(value.data_ptr()) for value in (left, right, squares, packed[number])),
            *(ctypes.c_ssize_t(size) for size in sizes),
        )

    if count == 1:
        band(0)
    else:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(band, range(count)))
    return True


def loaded() -> ctypes.CDLL | None:
    """The kernel where it is asked for and was built."""
    return native.load(SOURCE) if native.asked() else None
