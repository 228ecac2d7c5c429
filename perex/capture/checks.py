"""What perex refuses before it runs: models and modules whose operators it could not follow."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from perex.capture.sharding import refuse_flat
from perex.errors import AttachError, ExamplesMixError, NotReadyError


def refuse_batch_statistics(path: str, module: nn.Module) -> None:
    """Raise before a batch norm in training mode runs, and so before it changes its running statistics."""
    if not isinstance(module, BATCH_NORMS) or not any(type(module).forward is c.forward for c in BATCH_NORMS):
        return
    if module.training or module.running_mean is None:
        others = "replace it by GroupNorm, LayerNorm or InstanceNorm"
        way = f"Call `.eval()` on it after each `.train()` of the model, to use its running statistics, or {others}"
        way = f"It has no running statistics that `.eval()` would use: {others}" if module.running_mean is None else way
        raise ExamplesMixError(
            f"Module '{path}' is a {type(module).__name__} that normalises by statistics of the batch, so every "
            f"example depends on all others. {way}"
        )


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def compiling() -> bool:
    """Whether `torch.compile` is tracing this code (a constant for type checkers, so behind a function)."""
    return bool(torch.compiler.is_compiling())


def run_eagerly() -> Callable[[], object]:
    """Have compiled functions run as they were written, until what this returns is called.

    `torch.compile` traces an active function mode along with the function, and gets numbers wrong over it.
    """
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):  # not before torch 2.6
        return lambda: None
    try:
        stance = torch.compiler.set_stance("force_eager")
    except RuntimeError as error:
        raise AttachError(
            "the attached model is called from compiled code, which perex cannot see into: leave the call uncompiled"
        ) from error
    return lambda: stance.__exit__(None, None, None)


def learns_graph(module: nn.Module) -> bool:
    """Whether a module is, or is called by, a `DistributedDataParallel` whose static graph is not known yet."""
    kind = nn.parallel.DistributedDataParallel
    ddp = module if isinstance(module, kind) else getattr(kind, "_active_ddp_module", None)
    return bool(ddp is not None and ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued)


def check_model(model: nn.Module) -> None:
    """Refuse models whose operators perex would not see."""
    if not isinstance(model, nn.Module):
        raise AttachError(f"attach needs a torch.nn.Module, not {type(model).__name__}")
    for path, module in model.named_modules():
        name = f"module '{path}'" if path else "the model"
        if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
            raise AttachError(f"{name} has no parameters yet: run one batch through the model first")
        if isinstance(module, torch.jit.ScriptModule):
            raise AttachError(f"{name} is scripted: perex cannot see into it. Attach to the Python model")
        if isinstance(module, nn.DataParallel):
            raise AttachError(
                f"{name} is nn.DataParallel, which runs copies of the model in threads. Use DistributedDataParallel, "
                "or attach to the module inside and run it on one device"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            refuse_flat(module)
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise AttachError(f"{name} is compiled: perex cannot see into it. Attach to the uncompiled model")


def refuse_recording(tensor: Tensor) -> None:
    """A check is due, which looks at values: not while a CUDA graph is being recorded.

    Raises:
        NotReadyError: it is.
    """
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise NotReadyError(
            "a CUDA graph is being captured, and perex has yet to check that examples keep apart in batches of these "
            "shapes: run two or three steps before capturing one. If steps before it did not help, the model leaves a "
            "doubt in each forward, and attach(..., audit=False) does without these checks"
        )
