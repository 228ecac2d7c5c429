"""Operators that perex runs by other means than the model, where these are faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perex.capture.checkpoint import sparing
from perex.capture.forward import Forward
from perex.capture.parameters import Parameters
from perex.kernels.pooling import max_pool2d
from perex.rules.registry import OPERATORS

ALIKE_TO_THE_BIT: dict[Any, Callable[..., Tensor | None]] = {
    F.max_pool2d: max_pool2d,
    torch.max_pool2d: max_pool2d,
}
"""What gives the same as an operator without parameters, backward too; or None, where it is no faster."""


def ours(forward: Forward) -> bool:
    """Whether it is perex's business how operators are run.

    Not where what is saved for the backward is counted or moved, nor where somebody else's mode is to see them.
    """
    return not (forward.recomputed or sparing() or torch._C._len_torch_function_stack())


def run(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    forward: Forward,
    parameters: Parameters | None,
) -> Any:
    """Run an operator, by other means where these are faster.

    Args:
        func: the operator.
        args: its arguments.
        kwargs: those given by name.
        forward: the forward that is running.
        parameters: the model's, if some are among the arguments.
    """
    out: Tensor | None = None
    if parameters is not None:
        out = to_rounding(func, args, kwargs, parameters) if ours(forward) else None
    elif func in ALIKE_TO_THE_BIT and ours(forward):
        out = ALIKE_TO_THE_BIT[func](*args, **kwargs)
    return func(*args, **kwargs) if out is None else out


def to_rounding(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Parameters) -> Tensor | None:
    """What an operator on parameters and examples gives, if perex does it faster, to rounding.

    Not where gradients of parameters are computed, which are to stay as they are, to the bit, as outputs are; nor where
    parameters are shards, or computed with in another dtype.
    """
    rule = OPERATORS.get(func)
    if parameters.param_grads or parameters.sharded or rule is None or rule.substitute is None:
        return None
    if torch.is_autocast_enabled("cpu") or len(args) > len(rule.arguments):
        return None
    return rule.substitute.run({**dict(zip(rule.arguments, args, strict=False)), **kwargs})
