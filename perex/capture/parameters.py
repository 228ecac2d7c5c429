"""The model's parameters as perex reads them: which are tracked, and the stand-ins that operators get."""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.hooks import RemovableHandle

from perex.capture.sharding import is_shard
from perex.capture.taps import Alias, identity
from perex.errors import AttachError, UnsupportedError

if TYPE_CHECKING:
    from perex.capture.spread import Origin

Choice = Callable[[str, nn.Parameter], bool]
Selection = None | str | Iterable[str] | Choice


@dataclass(eq=False)
class Entry:
    """One parameter of the model, known by its name: the shard and the whole of a sharded one are equal.

    Attributes:
        name: its first name in `named_parameters`.
        parameter: the parameter.
        selected: whether `params` asks for it.
        stand_in: what operators read in its place; made when first needed.
        values: the same without gradients; made when first needed after that.
        seen: which tensor was its gradient over all uses that perex saw; see `taps.identity`.
        sharded: whether it is whole only while its module runs; see `perex.capture.sharding`.
        place: where torch had the parameter, when it was hooked.
        total: for a sharded one, the sum of what its stand-ins saw in the running backward: each forward has its own.
    """

    name: str
    parameter: nn.Parameter
    selected: bool
    stand_in: Tensor | None = None
    values: Tensor | None = field(default=None, repr=False)
    seen: tuple[int, int, int] | None = None
    sharded: bool = False
    total: Tensor | None = field(default=None, repr=False)
    handle: RemovableHandle | None = field(default=None, repr=False)
    place: int = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entry) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def note(self, grad: Tensor) -> None:
        """A stand-in has got its gradient."""
        found = identity(grad)
        if self.sharded:
            again = self.total is not None and self.seen is not None and self.seen[0] == found[0]
            self.total = grad if not again or self.total is None else self.total + grad
        self.seen = found

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
        origin: how it was made, if it is rows of a parameter, see `perex.capture.spread`.
        shown: what it shows again and again, if an operator like `expand` made it of another derived tensor.
        memory: where the memory of what the user's code holds in its place begins.
        spared: whether what its graph has saved is not simply held, but recomputed or moved elsewhere: a backward may
            ask for it once.
    """

    tensor: Tensor
    entries: tuple[Entry, ...]
    stand_ins: tuple[Tensor, ...]
    version: int = 0
    origin: Origin | None = None
    shown: Shared | None = None
    memory: int = 0
    spared: bool = False


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
        """By the identity of each parameter, and of the other tensor of a sharded one."""
        self.current: list[Entry] = []
        self.tensors: list[Entry] = []  # those of them that are no `nn.Parameter`
        self.modules: list[nn.Module] = []
        self.layout: list[tuple[int | str, ...]] = []  # what these modules hold
        self.changes = callable(params) or type(model).named_parameters is not nn.Module.named_parameters
        """Whether a function may answer otherwise next time."""
        self.sharded = False  # whether the model turned out to be
        self.gone = False  # whether a parameter is the model's no more, and somebody may still hold on to it
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
        return iter(self.current)

    def refresh(self) -> None:
        """Take up new and swapped parameters, and drop those that are gone."""
        found: dict[int, Entry] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            entry = found.get(id(parameter))
            if entry is None:
                entry = self.entries.get(id(parameter))
                if entry is None or entry.parameter is not parameter or entry.name != name:
                    entry = Entry(name, parameter, False)
                entry.selected = entry.selected and not self.changes
            if not entry.selected:  # a tied parameter is asked for by any of its names
                entry.selected = self.chosen(name, parameter)
            found[id(parameter)] = entry
        self.current = list(found.values())
        self.tensors = [entry for entry in self.current if not isinstance(entry.parameter, nn.Parameter)]
        shards = {entry.name: is_shard(entry.parameter) for entry in self.current}
        for key, entry in self.entries.items():
            if found.get(key) is entry:
                continue
            if shards.get(entry.name, shard := is_shard(entry.parameter)) != shard:
                found[key] = entry  # the whole of what is a shard now, or the other way round
            else:
                self.unwatch(entry)
                self.gone = True
        self.entries = found
        self.modules = list(self.model.modules())
        self.members = set(map(id, self.modules))
        self.layout = layout_of(self.modules)
        self.follow()

    def refuse_computed(self) -> None:
        """Raise if tensors that were computed from others are in the place of parameters."""
        for entry in self.tensors:
            if entry.parameter.grad_fn is not None:
                raise AttachError(
                    f"'{entry.name}' is a tensor computed from others now, in the place of the model's parameter, as "
                    "torch.func.functional_call puts it there: perex cannot follow it back. Compute it within the "
                    "attached model, by torch.nn.utils.parametrize or in the forward of a module around it"
                )

    def follow(self) -> None:
        """Watch those that are tracked now; `swap_tensors` takes a parameter's hooks away, and its place in graphs."""
        for entry in self.current:
            if entry.handle is not None and entry.place != entry.parameter._cdata:
                self.unwatch(entry)
                entry.stand_in = entry.values = None
            if entry.handle is None and entry.tracked:
                if isinstance(entry.parameter, UninitializedParameter):
                    raise AttachError(
                        f"module '{entry.module}' has no parameters yet: run one batch through it before it becomes a "
                        "part of the model, or through the model before attaching"
                    )
                entry.handle, entry.place = self.watch(entry), entry.parameter._cdata

    def tracked(self) -> list[Entry]:
        """Those whose per-example gradients are wanted now."""
        return [entry for entry in self.current if entry.tracked]

    def holders(self, entries: Iterable[Entry]) -> dict[str, nn.Parameter]:
        """The parameters that have a `.grad`, by name: the shards of sharded ones, whichever is in its module now."""
        shards = {e.name: e.parameter for e in self.entries.values() if is_shard(e.parameter)} if self.sharded else {}
        return {entry.name: shards.get(entry.name, entry.parameter) for entry in entries}

    def holds(self, module: nn.Module) -> bool:
        """Whether a module is a part of the model now: look at it afresh."""
        if self.sharded or self.changes or layout_of(self.modules) != self.layout:
            self.refresh()
        return id(module) in self.members

    def begin(self) -> None:
        """A forward begins.

        The hooks of `fully_shard` want a gradient before those of the module's inputs have come, and autograd runs the
        younger of two nodes first: the alias of a sharded parameter must not be older than the forward.
        """
        self.follow()
        for entry in self.entries.values() if self.sharded else ():
            entry.sharded, entry.stand_in = True, None

    def versions(self) -> list[int]:
        """How often each parameter was changed."""
        return [entry.parameter._version for entry in self]

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
        if is_shard(entry.parameter):
            raise UnsupportedError(
                f"parameter '{entry.name}' is a shard (DTensor) where the forward uses it, as in tensor parallelism: "
                "no process has whole gradients. perex follows fully_shard (FSDP2), which gathers a parameter before "
                "its module runs: call the module that was sharded, not its parts"
            )
        if entry.stand_in is None or not stands_in(entry.stand_in, entry):
            entry.values = None
            if self.param_grads:
                entry.stand_in = Alias.apply(entry, entry.parameter)
            else:
                entry.stand_in = entry.parameter.detach().requires_grad_(entry.tracked)
        assert entry.stand_in is not None
        return entry.stand_in

    def value(self, entry: Entry) -> Tensor:
        """The same, without gradients where autograd is not to compute them."""
        stand_in = self.read(entry)
        if self.param_grads or not entry.tracked:
            return stand_in
        if entry.values is None:
            entry.values = stand_in.detach()
        return entry.values

    def watch(self, entry: Entry) -> RemovableHandle:
        """Compare the gradient that reaches a parameter with what its alias saw.

        The hook goes first, before hooks of the user that may change the gradient. It holds on to nothing: a parameter
        whose hook leads to a graph that leads to the parameter would never be freed.
        """
        own, its = weakref.ref(self), weakref.ref(entry)

        def arrived(grad: Tensor | None) -> None:
            parameters, entry = own(), its()
            if parameters is None or entry is None or grad is None:  # the loss does not depend on it
                return
            total, entry.total = entry.total, None
            if parameters.param_grads and entry.seen is not None and entry.seen == identity(grad):
                return
            if total is not None and same(total, grad):
                return
            if entry.tracked:
                parameters.untapped(entry.name)

        handle = entry.parameter.register_hook(arrived)
        hooks = entry.parameter._backward_hooks
        assert hooks is not None
        others = [(key, hook) for key, hook in hooks.items() if key != handle.id]
        for key, _ in others:  # autograd goes by the order of insertion, which `move_to_end` leaves as it is
            del hooks[key]
        hooks.update(others)
        return handle

    def unwatch(self, entry: Entry) -> None:
        """Take the hook off, and leave the parameter as it was."""
        if entry.handle is not None:
            entry.handle.remove()
            entry.handle = None
            if not entry.parameter._backward_hooks:
                entry.parameter._backward_hooks = None

    def release(self) -> None:
        """Take all hooks off, and let go of who would hear of them."""
        self.untapped = lambda name: None
        for entry in self.entries.values():
            self.unwatch(entry)
            entry.stand_in = entry.values = entry.total = None


def layout_of(modules: Iterable[nn.Module]) -> list[tuple[int | str, ...]]:
    """Of some modules, the names and identities of their parameters and modules."""
    return [
        (
            *module._parameters,
            *map(id, module._parameters.values()),
            *module._modules,
            *map(id, module._modules.values()),
        )
        for module in modules
    ]


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two gradients are equal, bit for bit."""
    return bool(torch.eq(one, other).logical_or(one.isnan() & other.isnan()).all())


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
