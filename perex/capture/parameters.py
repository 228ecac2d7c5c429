"""The model's parameters as perex reads them: which are tracked, and the stand-ins that operators get."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from perex.capture.taps import Alias, identity
from perex.errors import AttachError, UnsupportedError

Choice = Callable[[str, nn.Parameter], bool]
Selection = None | str | Iterable[str] | Choice


@dataclass(eq=False)
class Entry:
    """One parameter of the model.

    Attributes:
        name: its first name in `named_parameters`.
        parameter: the parameter.
        selected: whether `params` asks for it.
        stand_in: what operators read in its place; made when first needed.
        seen: which tensor was its gradient over all uses that perex saw; see `taps.identity`.
    """

    name: str
    parameter: nn.Parameter
    selected: bool
    stand_in: Tensor | None = None
    seen: tuple[int, int, int] | None = None
    handle: RemovableHandle | None = field(default=None, repr=False)

    @property
    def module(self) -> str:
        """The path of the module that owns it."""
        return self.name.rpartition(".")[0]

    @property
    def tracked(self) -> bool:
        """Whether its per-example gradients are wanted now: selected, and not frozen."""
        return self.selected and self.parameter.requires_grad


class Shared(NamedTuple):
    """A tensor derived from parameters alone, in front of its guard.

    Attributes:
        tensor: the derived tensor.
        entries: the tracked parameters it derives from.
        stand_ins: the tensors that were read in place of those, from which `tensor`'s graph starts.
        version: `tensor`'s version when it met examples.
    """

    tensor: Tensor
    entries: tuple[Entry, ...]
    stand_ins: tuple[Tensor, ...]
    version: int = 0


Source = Entry | Shared


def selector(params: Any) -> Choice:
    """The predicate behind the `params` argument of `attach`: None, names or globs, or a predicate."""
    if params is None:
        return lambda name, parameter: True
    if callable(params) and not isinstance(params, nn.Module):
        return params
    patterns = [params] if isinstance(params, str) else list(params) if isinstance(params, Iterable) else [params]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise AttachError(
                f"params: holds a {type(pattern).__name__}; give names or globs such as 'layer4.*', or a function of "
                "(name, parameter)"
            )
    return lambda name, parameter: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


class Parameters:
    """All parameters of a model, looked at afresh in each forward.

    Args:
        model: the model.
        params: which parameters to track, as in `attach`.
        param_grads: whether `.grad` is computed too.
        untapped: called with the name of a parameter that got a gradient from a use nobody saw.
    """

    def __init__(self, model: nn.Module, params: Selection, param_grads: bool, untapped: Callable[[str], None]) -> None:
        self.model = model
        if not (params is None or isinstance(params, str) or callable(params)) and isinstance(params, Iterable):
            params = list(params)  # an iterator is read once
        self.choose = selector(params)
        self.param_grads = param_grads
        self.untapped = untapped
        self.entries: dict[int, Entry] = {}
        try:
            self.refresh()
            self.check(params)
        except BaseException:
            self.release()
            raise

    def check(self, params: Selection) -> None:
        """Raise where `params` selects nothing that can be tracked."""
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        if not names:
            raise AttachError("the model has no parameters")
        for pattern in params if isinstance(params, list) else [params] if isinstance(params, str) else []:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                inside = any(name.startswith(f"{pattern}.") for name in names)
                hint = f"did you mean '{pattern}.*'?" if inside else f"it has {', '.join(names[:5])}, ..."
                raise AttachError(f"params: {pattern!r} matches no parameter of the model; {hint}")
        if not any(entry.selected for entry in self):
            raise AttachError(f"params: selects no parameter of the model, which has {', '.join(names[:5])}, ...")
        if not any(entry.tracked for entry in self):
            raise AttachError(
                "no parameter that `params` selects requires grad: unfreeze what you want to track before attaching"
            )

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def refresh(self) -> None:
        """Take up new and swapped parameters, and drop those that are gone."""
        found: dict[int, Entry] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            entry = found.get(id(parameter)) or self.entries.get(id(parameter))
            if entry is None or entry.parameter is not parameter:
                entry = Entry(name, parameter, self.chosen(name, parameter))
            elif not entry.selected:  # a tied parameter is asked for by any of its names
                entry.selected = self.chosen(name, parameter)
            found[id(parameter)] = entry
        for key, entry in self.entries.items():
            if found.get(key) is not entry:
                self.unwatch(entry)
        self.entries = found
        for entry in self:
            if entry.handle is None and entry.tracked:
                entry.handle = self.watch(entry)

    def chosen(self, name: str, parameter: nn.Parameter) -> bool:
        """What `params` says of a parameter."""
        try:
            return bool(self.choose(name, parameter))
        except TypeError as error:
            raise AttachError(f"params: a function is called with (name, parameter), and raised: {error}") from error

    def knows(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter is the model's; one that the running forward has made is taken up."""
        if id(parameter) not in self.entries:
            self.refresh()
        return id(parameter) in self.entries

    def read(self, entry: Entry) -> Tensor:
        """What an operator gets in place of a parameter.

        With `param_grads`, an alias through which gradients reach the parameter; otherwise a leaf of its own
        for tracked parameters, from which derived tensors can be pulled back, and plain values for others. It is
        made once, and again when the parameter's memory was replaced or it was frozen or unfrozen.
        """
        if not torch.is_grad_enabled() or (self.param_grads and not entry.tracked):
            return entry.parameter
        if entry.stand_in is None or not stands_in(entry.stand_in, entry):
            if self.param_grads:
                entry.stand_in = Alias.apply(entry, entry.parameter)
            else:
                entry.stand_in = entry.parameter.detach().requires_grad_(entry.tracked)
        assert entry.stand_in is not None
        return entry.stand_in

    def watch(self, entry: Entry) -> RemovableHandle:
        """Compare the gradient that reaches a parameter with what its alias saw.

        The hook goes first, before hooks of the user that may change the gradient.
        """

        def arrived(grad: Tensor) -> None:
            if self.param_grads and entry.seen == identity(grad):
                return
            if entry.tracked:
                self.untapped(entry.name)

        handle = entry.parameter.register_hook(arrived)
        hooks = entry.parameter._backward_hooks
        assert hooks is not None
        hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
        return handle

    def unwatch(self, entry: Entry) -> None:
        """Take the hook off, and leave the parameter as it was."""
        if entry.handle is not None:
            entry.handle.remove()
            entry.handle = None
            if not entry.parameter._backward_hooks:
                entry.parameter._backward_hooks = None

    def release(self) -> None:
        """Take all hooks off."""
        for entry in self:
            self.unwatch(entry)
            entry.stand_in = None


def stands_in(stand_in: Tensor, entry: Entry) -> bool:
    """Whether a stand-in still shows its parameter: same memory, type and layout, tracked or not as before."""
    parameter = entry.parameter
    return (
        stand_in.data_ptr() == parameter.data_ptr()
        and stand_in.dtype == parameter.dtype
        and stand_in.shape == parameter.shape
        and stand_in.stride() == parameter.stride()
        and stand_in.device == parameter.device
        and stand_in.requires_grad == entry.tracked
    )


def pull_back(shared: Shared, grads: Tensor) -> list[tuple[Entry, Tensor]]:
    r"""Per-example gradients of a derived tensor $S(\theta)$ as those of its parameters.

    $\partial \ell_b / \partial \theta = J_S^\top \, \partial \ell_b / \partial S$, one batched
    vector-Jacobian product through the operators that derived it.

    Args:
        shared: the derived tensor.
        grads: `(B, *S.shape)`.

    Returns:
        A pair of parameter and `(B, *parameter.shape)` for each parameter that S depends on.
    """
    if shared.tensor._version != shared.version:
        names = ", ".join(entry.name for entry in shared.entries)
        raise UnsupportedError(
            f"a tensor derived from {names} was changed in place after it had been used: change a clone of it instead"
        )
    grads = grads.to(shared.tensor.dtype)

    def product(grad: Tensor, batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            shared.tensor,
            shared.stand_ins,
            grad,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )

    try:
        found = product(grads, batched=True)
    except RuntimeError:  # an operator without a batched derivative
        each = [product(grad, batched=False) for grad in grads]
        found = tuple(
            None if any(part is None for part in parts) else torch.stack(parts) for parts in zip(*each, strict=True)
        )
    return [(entry, grad) for entry, grad in zip(shared.entries, found, strict=True) if grad is not None]
