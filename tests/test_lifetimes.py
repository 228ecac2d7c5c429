"""What a step leaves goes when the last reference to it does; nothing waits for Python's collector of cycles."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import perex

B, D = 6, 8
x, y = torch.randn(B, D), torch.randint(0, 4, (B,))
every_way = pytest.mark.parametrize("param_grads", [True, False])


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, 4))


def losses(out: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="none")


class Odd(nn.Module):
    """Class token, positions, a recurrent layer, a bare weight, a checkpoint, and a look at the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, D)), nn.Embedding(7, D)
        self.recurrent, self.inner = nn.LSTM(D, D, batch_first=True), nn.Linear(D, D)
        self.weight, self.scale = nn.Parameter(torch.randn(D, 4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, None].expand(-1, 3, -1) + self.positions(torch.arange(3))
        h, _ = self.recurrent(torch.cat([self.token.expand(len(x), -1, -1), h], 1))
        h = checkpoint(lambda h: self.inner(h).relu(), h.mean(1), use_reentrant=False)
        if bool((x.detach() > 100).any()):
            h = h * 2
        return h @ self.weight * self.scale.exp()


@contextlib.contextmanager
def garbage() -> Iterator[Counter[str]]:
    """What of perex, of torch's tensors and of modules is left for the collector meanwhile, by class."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kinds = [type(one) for one in gc.garbage]
        found.update(
            k.__name__ for k in kinds if k.__module__.startswith("perex.") or issubclass(k, (Tensor, nn.Module))
        )
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def norms(model: nn.Module, **options: object) -> Callable[[], object]:
    px = perex.attach(model, **options)

    def step() -> None:
        px.backward(losses(model(x)))
        px.norms(by="parameter")
        str(px.report())

    return step


def clipping(memory: str) -> Callable[[], object]:
    model = net()
    px = perex.attach(model, memory=memory)

    def step() -> None:
        model.zero_grad()
        px.backward(losses(model(x)))
        px.clip_(0.1)

    return step


def quantities() -> Callable[[], object]:
    model = net()
    px = perex.attach(model, perex.Gram(), perex.Projections(4, seed=0), perex.Grads(), perex.NoiseScale())

    def step() -> None:
        px.backward(losses(model(x)))
        px.norms()

    return step


def usual() -> Callable[[], object]:
    model = net()
    px = perex.attach(model)

    def step() -> None:
        losses(model(x)).mean().backward()
        px.norms()

    return step


def refused() -> Callable[[], object]:
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, 4))
    perex.attach(model)

    def step() -> None:
        with contextlib.suppress(perex.PerexError):
            model(x)

    return step


def attached_anew() -> None:
    model = net()
    with perex.attach(model) as px:
        px.backward(losses(model(x)))
        px.norms()


def scored() -> Callable[[], object]:
    return lambda: perex.score(net(), (x, y), nn.CrossEntropyLoss(), progress=False)


def verified() -> Callable[[], object]:
    return lambda: perex.verify(net(), (x, y), nn.CrossEntropyLoss())


def unread() -> Callable[[], object]:
    model = net()
    perex.attach(model)
    return lambda: model(x)


STEPS: dict[str, Callable[[], Callable[[], object]]] = {
    "statistics alone": lambda: norms(net(), param_grads=False),
    "with gradients": lambda: norms(net()),
    "the user's own backward": usual,
    "of everything": lambda: norms(Odd()),
    "clipped": lambda: clipping("high"),
    "clipped, with little memory": lambda: clipping("low"),
    "with quantities": quantities,
    "a forward alone": unread,
    "refused": refused,
    "attached and detached": lambda: attached_anew,
    "scored": scored,
    "verified": verified,
}


@pytest.mark.parametrize("kind", STEPS)
def test_steps_leave_nothing_to_the_collector(kind):
    """A graphics card's memory is not what makes Python collect."""
    step = STEPS[kind]()
    step()
    step()
    with garbage() as found:
        step()
    assert not found


def test_garbage_would_be_found():
    with garbage() as found:
        model = net()
        model.itself = [model]
        del model
    assert found["Linear"] == 2 and found["Parameter"] == 4


class Softmax(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class Several(nn.Sequential):
    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h = super().forward(x)
        return h.tanh(), {"double": h * 2}


class Views(nn.Sequential):
    def forward(self, x: Tensor) -> list[Tensor]:
        h = super().forward(x)
        return [h.view(len(h), 2, 2), h[:, :2], h, h]


@every_way
@pytest.mark.parametrize("kind", [nn.Sequential, Softmax, Several, Views])
def test_graphs_that_nobody_holds_are_let_go(kind, param_grads):
    """Validation with gradients on, or a step that is given up: as much memory as without perex."""
    model = kind(*net())
    px = perex.attach(model, param_grads=param_grads)
    alive: list[weakref.ref[object]] = []
    model[1].register_forward_hook(lambda module, args, out: alive.append(weakref.ref(args[0].grad_fn)))
    for _ in range(3):  # checked batches keep more
        out = model(x)
        px.backward((out if isinstance(out, Tensor) else out[0]).square().flatten(1).sum(1))
    del out
    alive.clear()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            model(x)
        assert [node() for node in alive] == [None] * 3
        out = model(x)
        assert alive[-1]() is not None  # the test would see it
        del out
        assert alive[-1]() is None
    finally:
        gc.enable()


class Features(nn.Module):
    """Returns what the logits are made of, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.kept = nn.Linear(D, D), nn.Linear(D, 4), None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.kept = self.a(x).tanh()
        return {"features": self.kept, "logits": self.b(self.kept)}


@every_way
def test_outputs_are_what_the_model_returned(param_grads):
    """The same tensors, on the way from one to the other: a map of what decides a class goes by their gradients."""
    model = oracle.scramble(Features())
    with perex.attach(model, param_grads=param_grads) as px:
        for _ in range(2):
            out = model(x)
            assert out["features"] is model.kept
            (grad,) = torch.autograd.grad(out["logits"][:, 1].sum(), out["features"], retain_graph=True)
            assert torch.allclose(grad, model.b.weight[1].expand_as(grad))
            px.backward(losses(out["logits"]))
            px.norms()


class Sharing(nn.Module):
    """Outputs in one memory, one of which is a view of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x) + 1
        return h, h[:, :4]


def in_turn(model: nn.Module, of: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """Gradient norms of examples that are run one by one."""
    found = []
    for one in x:
        grads = torch.autograd.grad(of(model, one[None]).sum(), list(model.parameters()))
        found.append(sum(grad.square().sum() for grad in grads).sqrt())
    return torch.stack(found)


def shared(model: nn.Module, x: Tensor) -> Tensor:
    whole, part = model(x)
    part.mul_(x[:, :4])
    return (whole * whole).sum(1)


@every_way
def test_outputs_that_share_memory_are_changed_in_place(param_grads):
    """What is done to one happens to the other, in the graph too."""
    model = oracle.scramble(Sharing())
    expected = in_turn(model, shared)
    with perex.attach(model, param_grads=param_grads) as px:
        for _ in range(2):
            px.backward(shared(model, x))
            assert torch.allclose(px.norms(), expected)


def test_a_refusal_that_is_caught_keeps_nothing():
    """An error that is kept holds no frames: these hold the losses, and they the graph that keeps it."""

    def step() -> weakref.ref[nn.Module]:
        model = net()
        with perex.attach(model) as px:
            loss = losses(model(x)).mean() + model[0].weight.square().sum()  # a use that nobody saw
            loss.backward()
            for _ in range(2):
                with contextlib.suppress(perex.UnsupportedError):
                    px.norms()
                    raise AssertionError
        return weakref.ref(model)

    step()
    gone = step()
    gc.collect()
    assert gone() is None


def test_a_copy_of_the_handle_is_the_handle():
    model = net()
    px = perex.attach(model)
    px.backward(losses(model(x)))
    other = copy.copy(px)
    assert other is px
    del other
    assert px.norms().shape == (B,)


def test_a_hook_detaches():
    model = net()
    px = perex.attach(model)
    model[1].register_forward_hook(lambda *_: px.detach())
    assert model(x).shape == (B, 4)
    assert model(x).shape == (B, 4)
