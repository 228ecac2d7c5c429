"""Leave a model as it was found: mode, devices, flags."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from perex.scoring.errors import ScoringError

Mode = Literal["eval", "train"] | None


@contextmanager
def prepared(model: nn.Module, mode: Mode, device: torch.device | None) -> Iterator[None]:
    """Put a model into a mode and on a device, and undo both at the end, also after an error.

    Undone are the mode of every submodule, where every parameter and buffer lives, and `requires_grad`. A
    parameter comes back as the very storage it was, a buffer with the values it has by then. `.grad` is not
    touched.

    Args:
        model: any module.
        mode: `"eval"`, `"train"`, or None for as it is.
        device: None for as it is.

    Raises:
        ScoringError: `mode` is none of these.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout().eval())
        >>> with prepared(model, "eval", None):
        ...     model.training
        False
        >>> model.training, model[1].training
        (True, False)
    """
    if mode not in ("eval", "train", None):
        raise ScoringError(f'mode must be "eval", "train" or None, not {mode!r}')
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(buffer, buffer.data) for buffer in model.buffers()]
    try:
        if mode is not None:
            model.train(mode == "train")
        if device is not None:
            for tensor, original in (*parameters, *buffers):
                tensor.data = original.to(device)
        yield
    finally:
        for buffer, original in buffers:
            if buffer.device != original.device:
                original.copy_(buffer.data)
        for tensor, original in (*parameters, *buffers):
            if tensor.device != original.device:
                tensor.data = original
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training


@contextmanager
def frozen(criterion: object) -> Iterator[None]:
    """Keep gradients out of a criterion's own parameters, if it has any.

    Example:
        >>> criterion = nn.Bilinear(2, 2, 1)
        >>> with frozen(criterion):
        ...     criterion.weight.requires_grad
        False
        >>> criterion.weight.requires_grad
        True
    """
    parameters = criterion.parameters() if isinstance(criterion, nn.Module) else ()
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
