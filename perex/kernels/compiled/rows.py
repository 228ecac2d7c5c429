"""What layer norms and RMS norms get of each example, in one pass over input and gradient; see `rows.h`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from perex.kernels.compiled.library import address, kernel, lanes, room, runnable, seen
from perex.kernels.compiled.outer import shape_of
from perex.kernels.geometry import OPERATORS


def row_sums(x: Tensor, grads: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor] | None:
    """See `perex.kernels.affine.row_sums`; None where there is no kernel."""
    if not lanes() or not runnable(x, grads):
        return None
    weight, bias = seen(torch.ops.perex.row_sums, _sums)(x, grads, eps, centred)
    return weight, bias


def _sums(x: Tensor, grads: Tensor, eps: float, centred: bool) -> Tensor:
    """`row_sums` as an operator: both in one tensor, `(2, B, d)`."""
    x, grads = (t if t.stride(2) == 1 else t.contiguous() for t in (x, grads))
    found, shape = x.new_empty(2, x.shape[0], x.shape[2]), shape_of(x, grads, len(x), 1, 1)
    with room("rows", x.dtype, shape) as space:
        tensors = map(address, (x, grads, *found))
        kernel("rows", x.dtype)(shape, ctypes.c_double(eps), ctypes.c_int(centred), *tensors, space)
    return found


OPERATORS.define("row_sums(Tensor x, Tensor grads, float eps, bool centred) -> Tensor")
OPERATORS.impl("row_sums", _sums, "CPU")
