"""Where tensors lie: which share memory, and which part of another one a view shows."""

from __future__ import annotations

import torch
from torch import Tensor


def storage(tensor: Tensor) -> int:
    """What tells a tensor's memory from others, also from some that takes its place later, if it is weakly held."""
    if tensor.layout != torch.strided or not torch._C._has_storage(tensor):
        return -1
    return int(tensor.untyped_storage()._cdata)


def memory(tensor: Tensor) -> int:
    """Where a tensor's storage begins."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else -1


def whole_view(view: Tensor, base: Tensor) -> bool:
    """Whether a view shows all of a tensor as it is, whenever it was taken; as `as_subclass`, which no mode sees."""
    return (
        (view.shape, view.dtype) == (base.shape, base.dtype)
        and view.stride() == base.stride()
        and view.storage_offset() == base.storage_offset()
    )


def place_in(view: Tensor, base: Tensor) -> tuple[list[int | None], list[int]] | None:
    """Which dimension of a base each dimension of a view runs along, and where the view begins in the base.

    It is read off strides, so it is None where these do not tell: dimensions were merged or split, say.
    """
    by_stride = {base.stride(d): d for d in range(base.dim()) if base.size(d) > 1}
    if len(by_stride) != sum(size > 1 for size in base.shape):
        return None
    rest = int(view.storage_offset()) - int(base.storage_offset())
    starts = [0] * base.dim()
    for stride in sorted(by_stride, reverse=True):
        starts[by_stride[stride]], rest = divmod(rest, stride)
    dims: list[int | None] = []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        dim = by_stride.get(stride) if size > 1 else None
        if size > 1 and (dim is None or starts[dim] + size > base.size(dim)):
            return None
        dims.append(dim)
    return None if rest else (dims, starts)
