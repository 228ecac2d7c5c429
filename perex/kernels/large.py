"""Products of large matrices, by whichever of the CPU's libraries multiplies faster: MKL, or oneDNN."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from perex.kernels.products import product

WORTH_PREPARING = 2**25
"""Multiply-adds that products of one form have to have in all: for a new one, oneDNN takes 0.3 ms to get ready."""

WORTH_A_CALL = 2**23
"""Multiply-adds that each of several has to have, for oneDNN takes one a call, and MKL all of them."""

WORTH_A_STEP = 2**21
"""Likewise, where MKL would take as many calls: it starts sooner."""

SLACK = 0.55
"""What a multiply-add costs by oneDNN, in those of `@`."""


def multiplied(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b` of two matrices, or of two stacks of matrices; stacks in half precision are multiplied into float32.

    Args:
        a: `(..., m, k)`.
        b: `(..., k, n)`.
        bias: `(n,)`, to be added.

    Returns:
        Tensor `(..., m, n)`.
    """
    if not faster(a, b):
        found = a @ b if a.dim() == 2 else product(a, b)
        return found if bias is None else found.add_(bias)
    if a.dim() == 2:
        return by_onednn(a, b, bias).contiguous()
    found = a.new_empty(*a.shape[:-1], b.shape[-1])
    for one, left, right in zip(*(stack.flatten(0, -3) for stack in (found, a, b)), strict=True):
        one.copy_(by_onednn(left, right, bias))
    return found


def faster(a: Tensor, b: Tensor, rows: int | None = None, times: int = 1) -> bool:
    """Whether two stacks of matrices are multiplied faster one by one, by oneDNN.

    Args:
        a: `(..., m, k)`.
        b: `(..., k, n)`.
        rows: if given, `b` is one matrix, and `a` has so many rows in all.
        times: how many such products, of a matrix each, there will be one after the other.
    """
    stack = 1 if rows is not None else a.shape[:-2].numel()
    one = b.shape[-2:].numel() * (a.shape[-2] if rows is None else rows)
    least = WORTH_A_CALL if times == 1 else WORTH_A_STEP
    if one < least or one * stack * times < WORTH_PREPARING or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or a.itemsize != 4:  # of float32
        return False
    here = in_memory(a) and in_memory(b) and not (a.requires_grad or b.requires_grad)
    return here and bool(torch.backends.mkldnn.enabled) and onednn_is_faster()


def in_memory(tensor: Tensor) -> bool:
    """Whether a tensor is in a CPU's memory, and does not stand for several, as in `vmap`."""
    if not tensor.is_cpu or not torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.CPU):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def slack(one: int, stack: int) -> float:
    """What a multiply-add costs where each of a stack of products in float32 has so many; in those of `@`."""
    fast = one >= WORTH_A_CALL and one * stack >= WORTH_PREPARING and onednn_is_faster()
    return SLACK if fast else 1.0


def by_onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b + bias` of two matrices in float32; the transpose of its transpose where less is to be copied for that.

    The operator copies a first matrix whose rows do not lie one after the other. Of the second, it reads rows or
    columns that lie apart; any other order it refuses. Of the bias it reads as many numbers as there are, one after the
    other, whatever its strides say.
    """
    (m, k), n = a.shape, b.shape[1]
    if bias is None and not a.is_contiguous() and m * k > n * (m + k):
        return by_onednn(b.mT.contiguous(), a.mT).mT
    if not (apart(b) or apart(b.mT)):
        b = b.contiguous()
    bias = None if bias is None else bias.contiguous()
    found: Tensor = torch.ops.mkldnn._linear_pointwise(a.contiguous(), b.mT, bias, "none", [], "")
    return found


def apart(matrix: Tensor) -> bool:
    """Whether the rows of a matrix lie apart in memory, each in one piece."""
    return matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies matrices faster than MKL does.

    MKL uses AVX-512 on Intel's CPUs only, and oneDNN wherever there is any: on others it takes half the time. The
    operator is one that torch's compiler calls; where it is not what it was, `@` has to do.
    """
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    elsewhere = "Intel" not in str(known.get("cpu_name", "Intel"))
    if not (elsewhere and known.get("avx512_f") and torch.backends.mkl.is_available()):
        return False
    a, b = torch.arange(6.0, device="cpu").view(2, 3), torch.arange(12.0, device="cpu").view(3, 4)
    try:
        return torch.equal(by_onednn(a, b), a @ b)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _operations(rows: Any, weight: Any, *options: Any, **kwargs: Any) -> int:
    """Operations of oneDNN's product, `(..., k)` with `(n, k)`."""
    return 2 * int(torch.Size(rows).numel()) * int(weight[0])


if onednn_is_faster() and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_operations)
