"""The ways to per-example gradient norms that are timed, each set up once and then run step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from models import Case
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import perex

Step = Callable[[], Tensor | Callable[[], Tensor] | None]  # one step; norms (B,), or other numbers, where it gives them


class Unsupported(Exception):
    """A library does not do this model."""


def plain(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Forward, backward, all `.grad`s."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        case.loss(model(x), y).mean().backward()

    return step


def floor(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Forward, and the backward of activations alone: what no way to norms of all parameters can go below."""
    first = next(module for module in model.modules() if list(module.parameters(recurse=False)))
    model.requires_grad_(False)
    first.register_forward_hook(lambda module, args, out: out.requires_grad_())

    def step() -> None:
        case.loss(model(x), y).mean().backward()

    return step


def forward(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """A bare forward."""

    def step() -> None:
        with torch.no_grad():
            case.loss(model(x), y)

    return step


def scoring(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """perex, statistics alone."""
    px = perex.attach(model, param_grads=False)

    def step() -> Tensor:
        px.backward(case.loss(model(x), y))
        return px.norms()  # type: ignore[return-value]

    return step


def with_grads(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """perex, norms and `.grad`."""
    px = perex.attach(model)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        px.backward(case.loss(model(x), y))
        return px.norms()  # type: ignore[return-value]

    return step


def last_layer(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """perex, the norm of the last layer alone, as in active learning."""
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    px = perex.attach(model, params=[f"{last}.*"], param_grads=False)

    def step() -> None:
        px.backward(case.loss(model(x), y))
        px.norms()

    return step


def loop(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """One backward for each example."""
    parameters = list(model.parameters())

    def step() -> Tensor:
        norms = []
        for b in range(len(x)):
            loss = case.loss(model(x[b : b + 1]), y[b : b + 1]).sum()
            grads = torch.autograd.grad(loss, parameters)
            norms.append(torch.stack([g.norm() for g in grads]).norm())
        return torch.stack(norms)

    return step


def mapped(case: Case, model: nn.Module, x: Tensor, y: Tensor, chunk: int | None = None) -> Step:
    """`torch.func.vmap` over `grad`, in chunks of some examples or all at once."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return case.loss(functional_call(model, values, (image[None],)), label[None]).sum()

    gradients = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=chunk)

    def step() -> Tensor:
        found = gradients(values, x, y)
        return torch.stack([g.flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0)

    return step


def in_chunks(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """`vmap` on four examples at a time."""
    return mapped(case, model, x, y, chunk=4)


def opacus_hooks(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Opacus, hooks mode: per-example gradients are stored."""
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(model.train(), loss_reduction="mean")
    kept_in_eval(model)

    def step() -> Tensor:
        wrapped.zero_grad(set_to_none=True)
        case.loss(wrapped(x), y).mean().backward()
        found = [p.grad_sample.flatten(1).norm(dim=1) for p in model.parameters()]  # type: ignore[attr-defined]
        return torch.stack(found).norm(dim=0)

    return step


def opacus_ghost(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Opacus, fast gradient clipping's norms."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        model.train(), loss_reduction="mean", max_grad_norm=1.0, use_ghost_clipping=True
    )
    kept_in_eval(model)

    def step() -> Tensor:
        wrapped.zero_grad(set_to_none=True)
        case.loss(wrapped(x), y).mean().backward()
        return wrapped.get_norm_sample()

    return step


def backpack(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """BackPACK's `BatchL2Grad`, for models made of its layers."""
    from backpack import backpack as extending
    from backpack import extend
    from backpack.extensions import BatchL2Grad

    if case.loss.__name__ != "classes":
        raise Unsupported("BackPACK needs a loss module on (B, classes)")
    model = extend(model, use_converter=not isinstance(model, nn.Sequential) or len(list(model.children())) > 20)
    criterion = extend(nn.CrossEntropyLoss())

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        with extending(BatchL2Grad()):
            criterion(model(x), y).backward()
        squares = [p.batch_l2 for p in model.parameters()]  # type: ignore[attr-defined]
        return torch.stack(squares).sum(0).sqrt() * len(x)

    return step


def kept_in_eval(model: nn.Module) -> None:
    """Opacus looks at modules in training mode only; batch norm is to use its running statistics all the same."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()


WAYS: dict[str, Callable[..., Step]] = {
    "plain": plain,
    "floor": floor,
    "forward": forward,
    "perex": scoring,
    "perex, .grad": with_grads,
    "perex, last layer": last_layer,
    "loop": loop,
    "vmap": mapped,
    "vmap, chunks": in_chunks,
    "Opacus, hooks": opacus_hooks,
    "Opacus, ghost": opacus_ghost,
    "BackPACK": backpack,
}
"""By the names of columns. Each is called with a case, a model of its own, inputs and targets."""

SLOW = ("loop", "vmap", "vmap, chunks", "Opacus, hooks", "Opacus, ghost", "BackPACK")
"""Run less often: their times are far from plain's, and hold up the others."""


def exact(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loop's norms in float64."""
    model = copy.deepcopy(model).double()
    found = loop(case, model, x.double() if x.is_floating_point() else x, y)()
    assert found is not None
    return found
