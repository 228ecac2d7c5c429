"""`torch.distributed.fsdp.fully_shard`: parameters that are whole only while their module runs.

Such a parameter is two tensors in turn. Outside, the module holds its shard, a `DTensor`; before the module's forward,
and again in the backward, hooks gather the whole one and put that in its place. Operators only ever read the whole one,
and it is the same object each time, so perex knows parameters by name and both tensors of a name as one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from perex.capture.hooks import Hook
from perex.errors import AttachError


def is_shard(parameter: Tensor) -> bool:
    """Whether a parameter is spread over processes, so that this one does not have all of it."""
    if type(parameter) is nn.Parameter:
        return False
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(parameter, loaded.DTensor)


def is_managed(module: nn.Module) -> bool:
    """Whether a module belongs to a sharded model, new way or old."""
    return "_is_fsdp_managed_module" in module.__dict__


def refuse_flat(model: nn.Module, parameters: Iterable[Tensor] = ()) -> None:
    """Refuse `FullyShardedDataParallel`, whose parameters are pieces of a flat one: managed, but not sharded."""
    if not any(map(is_shard, parameters)) and not any(hasattr(type(m), "_get_fsdp_state") for m in model.modules()):
        raise AttachError(
            "the model is run by FullyShardedDataParallel, which replaces parameters by pieces of a flat one that "
            "perex cannot tell apart: use torch.distributed.fsdp.fully_shard, and attach to the module that was sharded"
        )


def leave_last(module: nn.Module) -> None:
    """Have perex's hook see what a module returns after the hooks of `fully_shard`, whichever was there first."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, Hook):
            module._forward_hooks.move_to_end(key)  # type: ignore[attr-defined]


class Exit(torch.autograd.Function):
    """Behind an output of a sharded model.

    `fully_shard` gathers parameters in a hook on the output. The audit of losses must not run that hook: it would do so
    on one rank alone, and the others would wait for ever. So it stops here, behind it.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, output: Tensor) -> Tensor:
        """Return the output as it is."""
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Pass the gradient on."""
        return grad


EXIT = f"{Exit.__name__}Backward"
"""What autograd calls the node of an `Exit`."""
