"""Facts about torch's operators that capture needs: which only read metadata, which work in place."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from perex.capture.carry import FAMILIES

METADATA = """
    __deepcopy__ __dir__ __dlpack_device__ __hash__
    __len__ __reduce_ex__ __repr__ __setstate__
    _is_view _version backward data_ptr dense_dim dim dim_order element_size get_device has_names
    is_coalesced is_complex is_conj is_contiguous is_distributed is_floating_point is_inference is_neg
    is_pinned is_same_size is_set_to is_shared is_signed is_sparse ndimension nelement numel
    pin_memory record_stream register_post_accumulate_grad_hook requires_grad_ retain_grad
    share_memory_ size sparse_dim storage_offset storage_type stride
    is_tensor is_storage result_type can_cast promote_types is_same_size
""".split()
"""Operators whose result holds nothing that a gradient goes through."""

DIFFERENTIABLE_GETTERS = {"T", "mT", "H", "mH", "real", "imag", "data"}

PARTS: dict[Any, Any] = {part.__set__: part.__get__ for part in (Tensor.real, Tensor.imag)}  # type: ignore[attr-defined]
"""`z.real = x` and `z.imag = x`, and what gives the part that is written."""


def _metadata() -> frozenset[Any]:
    found: set[Any] = set()
    for space in (torch, Tensor):
        found.update(f for name in METADATA if (f := getattr(space, name, None)) is not None)
    for cls in Tensor.__mro__[:-1]:
        for name, member in vars(cls).items():
            if isinstance(member, (types.GetSetDescriptorType, property)):
                if name != "data" and member.__set__ not in PARTS:
                    found.add(member.__set__)
                if name not in DIFFERENTIABLE_GETTERS:
                    found.add(member.__get__)
    return frozenset(found)


PASSED_OVER = _metadata()
"""Operators that capture lets through unseen."""

NUMBERS = frozenset(
    getattr(Tensor, name)
    for name in "item __int__ __index__ tolist numpy __float__ __complex__ __array__ __dlpack__".split()
)
"""Operators that take numbers out of torch, where nothing can be followed."""

UNFOLLOWED = frozenset({Tensor.__format__, Tensor.storage, Tensor.untyped_storage, Tensor.data.__set__})  # type: ignore
"""Operators behind whose back something may be done with a tensor; mostly nothing is."""

BRANCHES = frozenset(
    getattr(space, name)
    for space in (torch, Tensor)
    for name in "__bool__ __contains__ is_nonzero equal allclose".split()
    if hasattr(space, name)
)
"""Operators that give Python a truth value."""

READS_FIRST = frozenset({Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.reshape_as})
"""Operators that read only the shape or type of their further arguments."""

FILLS = frozenset({Tensor.copy_, Tensor.fill_, torch.fill_})
"""Operators that write a value over all of their first argument."""

RESHAPES = frozenset("unsqueeze_ squeeze_ t_ transpose_ swapaxes_ swapdims_ as_strided_ resize_ resize_as_".split())
"""Operators that change the shape of their first argument."""

DUNDERS = {
    "__iadd__": "add",
    "__isub__": "sub",
    "__imul__": "mul",
    "__itruediv__": "div",
    "__idiv__": "div",
    "__ipow__": "pow",
    "__imod__": "remainder",
    "__ifloordiv__": "floor_divide",
    "__iand__": "bitwise_and",
    "__ior__": "bitwise_or",
    "__ixor__": "bitwise_xor",
    "__ilshift__": "bitwise_left_shift",
    "__irshift__": "bitwise_right_shift",
}


def by_holders(mode: TorchFunctionMode, func: Callable[..., Any], kinds: Any, args: Any, kwargs: Any) -> Any:
    """What an operator gives on objects that hold tensors and say what torch's operators do with them.

    What they do is run in the mode. `NotImplemented` where there are none, or none says.
    """
    for kind in kinds:
        if not issubclass(kind, Tensor):
            with mode:
                out = kind.__torch_function__(func, kinds, args, kwargs)
            if out is not NotImplemented:
                return out
    return NotImplemented


def in_place(func: Callable[..., Any]) -> bool:
    """Whether an operator changes its first argument."""
    name = getattr(func, "__name__", "")
    return name in DUNDERS or (name.endswith("_") and not name.endswith("__"))


def out_of_place(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """The operator that returns what an in-place operator would write."""
    name: str = func.__name__
    name = DUNDERS.get(name, name.rstrip("_"))
    found: Callable[..., Any] | None = getattr(Tensor, name, None)
    return found


ANSWERS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
"""What torch's Python functions ask before they hand themselves to a mode."""


def composite(func: Any) -> bool:
    """Whether an operator is a Python function over others, and no family knows it as a whole."""
    return isinstance(func, types.FunctionType) and _composite(func)


@functools.cache
def _composite(func: types.FunctionType) -> bool:
    if func in FAMILIES or func in NUMBERS:
        return False
    inside = func.__module__.startswith("torch") and not func.__module__.startswith("torch.autograd")
    return inside and any(answer in func.__globals__ for answer in ANSWERS)


def _no(*args: Any, **kwargs: Any) -> bool:
    return False


@functools.cache
def body(func: types.FunctionType) -> Callable[..., Any]:
    """A composite operator without its own call to the mode, so that the mode sees what it is made of.

    torch's Python functions begin by handing themselves to an active mode when `has_torch_function` says
    so; this copy of the function, and of nothing it calls, answers no.
    """
    scope = {**func.__globals__, **dict.fromkeys(ANSWERS, _no)}
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
