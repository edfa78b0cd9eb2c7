"""An optional compiled kernel that squares every example's gradient in registers; `GRADMATCH_KERNEL=1` asks for it.

It needs a C compiler and takes a second, once a machine (`gradmatch.estimators.native`). It serves single-precision linear layers on
the CPU and pays where examples are short: torch must write each example's gradient to memory before it can square it.
Whatever goes wrong, torch does the work as it does without.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from gradmatch.estimators import native
from gradmatch.estimators.products import Workspace

SOURCE = Path(__file__).with_name("squares.c")
FLAGS = ("-O3", "-march=native", "-fopenmp")


def add_squares(left: Tensor, right: Tensor, squares: Tensor, space: Workspace) -> bool:
    """squares += sum_n (sum_t left_nt right_nt')^2 if the kernel can; else False and nothing is done.

    left: (B, T, O), right: (B, T, I), squares: (O, I).
    """
    plain = all(
        value.dtype == torch.float32 and value.device.type == "cpu" for value in (left, right, squares)
    )
    library = loaded() if plain and squares.is_contiguous() else None
    if library is None:
        return False
    left, right = left.contiguous(), right.contiguous()
    sizes = [ctypes.c_ssize_t(size) for size in (*left.shape, right.shape[2])]
    library.room.restype = ctypes.c_ssize_t
    packed = space.take(1, library.room(*sizes), left)
    library.add_squares(
        *(ctypes.c_void_p(value.data_ptr()) for value in (left, right, squares, packed)), *sizes
    )
    return True


def loaded() -> ctypes.CDLL | None:
    """The kernel where it is asked for and can be had."""
    return native.load(SOURCE, FLAGS) if native.asked() else None
