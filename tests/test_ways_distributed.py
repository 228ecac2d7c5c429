"""Data parallel training with two processes, each with examples of its own: DDP and FSDP2.

Every rank's norms are those of a loop over its own examples, and gradients are synchronised as they are without perex.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import traces
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import perex

T, D = 4, 4
Squares = dict[str, Tensor]
Steps = list[list[Tensor | None]]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as running:
        yield running


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 6), nn.Linear(6, D)
        self.scale = nn.Parameter(torch.ones(D))
        self.checkpointed = False

    def run(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).tanh()) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x + (checkpoint(self.run, x, use_reentrant=False) if self.checkpointed else self.run(x))


class Net(nn.Module):
    """Tied weights, a block that is called twice, a bare parameter, and perhaps a layer that is never used."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(5, D), nn.Linear(D, 5, bias=False)
        self.head.weight = self.words.weight
        self.place = nn.Parameter(torch.randn(1, T, D))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.unused = nn.Linear(2, 2) if unused else None
        self.outside = False

    def forward(self, words: Tensor) -> Tensor:
        h = self.words(words) + self.place
        for block in (*self.blocks, self.blocks[0]):
            h = checkpoint(block, h, use_reentrant=False) if self.outside else block(h)
        return self.head(h)


def net(unused: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(unused).double()


def batch(rank: int, step: int, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Examples of one rank: there are more of them on the second."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return tuple(torch.randint(5, (size or 3 + rank, T), generator=generator) for _ in range(2))


def losses_of(out: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(out.transpose(1, 2), y, reduction="none").mean(1)


def alone(model: nn.Module, losses: Callable[[nn.Module, int], Tensor], size: int) -> Squares:
    """Squared norms by parameter: the loop, on a model that nothing is attached to."""
    parameters, rows = dict(model.named_parameters()), []
    for i in range(size):
        grads = torch.autograd.grad(losses(model, i).sum(), list(parameters.values()), allow_unused=True)
        rows.append([torch.zeros(()).double() if g is None else g.square().sum() for g in grads])
    return {name: torch.stack(each) for name, each in zip(parameters, zip(*rows, strict=True), strict=True)}


def loop(model: nn.Module, x: Tensor, y: Tensor) -> Squares:
    return alone(model, lambda model, i: losses_of(model(x[i : i + 1]), y[i : i + 1]), len(x))


def assert_norms(px: perex.Tracker, squares: Squares) -> None:
    found = {name.removeprefix("module."): square for name, square in px.squared_norms(by="parameter").items()}
    assert set(found) == set(squares)
    for name, square in squares.items():
        torch.testing.assert_close(found[name], square, rtol=1e-9, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(px.norms(), sum(squares.values()).sqrt(), rtol=1e-9, atol=0)


def grads_of(model: nn.Module) -> list[Tensor | None]:
    """This rank's part of all gradients."""
    grads = (p.grad for p in model.parameters())
    return [None if g is None else getattr(g, "_local_tensor", g).clone() for g in grads]


def assert_same(found: Steps, expected: Steps, rtol: float = 0.0) -> None:
    for step, (some, others) in enumerate(zip(found, expected, strict=True)):
        for a, b in zip(some, others, strict=True):
            assert (a is None) == (b is None), f"step {step}: {a} instead of {b}"
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, msg=lambda m, s=step: f"step {s}: {m}")


def refusal(run: Callable[[], Any]) -> str:
    try:
        run()
    except perex.PerexError as error:
        return str(error)
    raise AssertionError("was not refused")


# ------------------------------------------------------------------- DistributedDataParallel

OPTIONS: dict[str, dict[str, bool]] = {
    "plain": {},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "bucket views": {"gradient_as_bucket_view": True},
}
ORDERS = ["before", "wrapper", "inside"]


def wrapped(
    option: str, order: str | None, **options: Any
) -> tuple[DistributedDataParallel, nn.Module, perex.Tracker | None]:
    """A DDP model, and a tracker attached before wrapping, to the wrapper, or to the model inside."""
    model = net(option == "unused parameters")
    px = perex.attach(model, **options) if order == "before" else None
    ddp = DistributedDataParallel(model, **OPTIONS[option])
    if order in ("wrapper", "inside"):
        px = perex.attach(ddp if order == "wrapper" else model, **options)
    return ddp, model, px


def run_ddp(rank: int, option: str, order: str | None, call: str, param_grads: bool, accumulate: int = 1) -> Steps:
    """Three steps of an optimizer; the norms are checked on the way."""
    ddp, model, px = wrapped(option, order, param_grads=param_grads)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = []
    for step in range(3):
        for micro in range(accumulate if step or option != "static graph" else 1):  # torch fails on another first step
            x, y = batch(rank, 10 * step + micro)
            expected = net(option == "unused parameters")
            expected.load_state_dict(model.state_dict())
            with ddp.no_sync() if micro < accumulate - 1 and step else contextlib.nullcontext():
                losses = losses_of(ddp(x), y)
                if px is not None and call == "losses":
                    px.backward(losses)
                else:
                    losses.mean().backward()
            if px is not None:
                assert_norms(px, loop(expected, x, y))
            seen.append(grads_of(model))
        optimizer.step()
        optimizer.zero_grad()
    seen.append([p.detach().clone() for p in model.parameters()])
    if px is not None:
        px.detach()
    return seen


def ddp_case(rank: int, option: str, accumulate: int) -> None:
    expected = run_ddp(rank, option, None, "loss", True, accumulate)
    for order in ORDERS:
        for call in ("loss", "losses"):
            assert_same(run_ddp(rank, option, order, call, True, accumulate), expected)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("option", OPTIONS)
def test_ddp(ranks, option, accumulate):
    """Gradients and weights to the bit, over several steps, also where only the last micro-batch is synchronised.

    The audit of `px.backward` must not start what synchronises a static graph.
    """
    ranks(ddp_case, option, accumulate)


def ddp_statistics_case(rank: int, option: str, order: str) -> None:
    """No `.grad`, so nothing to synchronise; and training goes on as if nothing had been."""

    def train(ddp: nn.Module, model: nn.Module) -> Steps:
        seen = []
        for step in range(2):
            model.zero_grad()
            x, y = batch(rank, step)
            losses_of(ddp(x), y).mean().backward()
            seen.append(grads_of(model))
        return seen

    def score(ddp: DistributedDataParallel, model: nn.Module, px: perex.Tracker) -> None:
        model.zero_grad()
        for step in range(3):
            x, y = batch(rank, 5 + step, 3 + step * rank)
            with ddp.no_sync() if step == 2 else contextlib.nullcontext():
                losses = losses_of(ddp(x), y)
                px.backward(losses) if step else losses.mean().backward()
            assert_norms(px, loop(net(option == "unused parameters"), x, y))
            assert all(p.grad is None for p in model.parameters())
        px.detach()

    expected = train(*wrapped(option, None)[:2])
    ddp, model, px = wrapped(option, order, param_grads=False)
    assert px is not None
    if option == "static graph":
        assert "static_graph" in refusal(lambda: ddp(batch(rank, 0)[0]))
        px.detach()
        train(ddp, model)
        px = perex.attach(ddp if order == "wrapper" else model, param_grads=False)
    score(ddp, model, px)
    assert_same(train(ddp, model), expected)


@pytest.mark.parametrize("option", OPTIONS)
def test_ddp_without_gradients(ranks, option):
    for order in ORDERS:
        ranks(ddp_statistics_case, option, order)


def ddp_mixing_case(rank: int, order: str) -> None:
    ddp, _, px = wrapped("static graph", order)
    assert px is not None
    x, y = batch(rank, 0)
    out = ddp(x)
    if order != "wrapper":  # what a wrapper with a static graph returns has passed an operator of its own
        assert "depend on" in refusal(lambda: px.backward(losses_of(out - out.mean(0), y)))
    px.backward(losses_of(out, y))
    assert_norms(px, loop(net(), x, y))


@pytest.mark.parametrize("order", ORDERS)
def test_ddp_audits_losses(ranks, order):
    ranks(ddp_mixing_case, order)


# ------------------------------------------------------------------- fully_shard

SHARDINGS = {"whole": False, "nested": True}
BEFORE_AFTER = ["before", "after"]


def sharded(
    order: str | None,
    nested: bool = True,
    change: Callable[[nn.Module], Any] = lambda model: None,
    options: dict[str, Any] | None = None,
    **how: Any,
) -> tuple[Any, perex.Tracker | None]:
    """A sharded model, and a tracker attached before sharding or after."""
    model = net()
    change(model)
    px = perex.attach(model, **(options or {})) if order == "before" else None
    mesh = init_device_mesh("cpu", (2,))
    for module in (*model.blocks, model) if nested else (model,):
        fully_shard(module, mesh=mesh, **how)
    return model, perex.attach(model, **(options or {})) if order == "after" else px


def whole(model: nn.Module, change: Callable[[nn.Module], Any] = lambda model: None) -> nn.Module:
    """A plain model with the same weights."""
    plain = net()
    change(plain)
    plain.load_state_dict({name: p.full_tensor() for name, p in model.state_dict().items()})
    return plain


def run_sharded(
    rank: int,
    order: str | None,
    call: str = "loss",
    param_grads: bool = True,
    change: Callable[[nn.Module], Any] = lambda model: None,
    **how: Any,
) -> Steps:
    """Three steps of an optimizer. Batches grow on one rank alone, so that the audit runs on one rank alone."""
    model, px = sharded(order, change=change, options={"param_grads": param_grads}, **how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = []
    for step in range(3):
        x, y = batch(rank, step, 3 + step * rank)
        expected = whole(model, change) if px is not None else None
        losses = losses_of(model(x), y)
        if px is not None and call == "losses":
            px.backward(losses)
        else:
            losses.mean().backward()
        if px is not None and expected is not None:
            assert_norms(px, loop(expected, x, y))
        seen.append(grads_of(model))
        optimizer.step()
        optimizer.zero_grad()
    if px is not None:
        px.detach()
    return seen


def fsdp_case(rank: int, nested: bool, reshard: bool | None, order: str) -> None:
    how = {"nested": nested, "reshard_after_forward": reshard}
    expected = run_sharded(rank, None, **how)
    for call in ("loss", "losses"):
        assert_same(run_sharded(rank, order, call, **how), expected)
    assert all(g is None for step in run_sharded(rank, order, param_grads=False, **how) for g in step)


@pytest.mark.parametrize("order", BEFORE_AFTER)
@pytest.mark.parametrize("reshard", [None, True, False])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_fsdp(ranks, sharding, reshard, order):
    """Norms are of whole gradients; this rank's shards of `.grad` to the bit."""
    ranks(fsdp_case, SHARDINGS[sharding], reshard, order)


def checkpoint_inside(model: nn.Module) -> None:
    for block in model.blocks:
        block.checkpointed = True


def checkpoint_outside(model: nn.Module) -> None:
    model.outside = True


def fsdp_checkpoint_case(rank: int, change: Callable[[nn.Module], Any], order: str) -> None:
    assert_same(run_sharded(rank, order, change=change), run_sharded(rank, None, change=change))
    run_sharded(rank, order, "losses", param_grads=False, change=change)


@pytest.mark.parametrize("change", [checkpoint_inside, checkpoint_outside], ids=lambda f: f.__name__)
def test_fsdp_with_checkpoints(ranks, change):
    for order in BEFORE_AFTER:
        ranks(fsdp_checkpoint_case, change, order)


def fsdp_blocks_case(rank: int, order: str, root: bool) -> None:
    """Inputs that require grad, and outputs that are a sharded block's own: both have hooks of `fully_shard`."""

    def run(attached: bool) -> Steps:
        torch.manual_seed(0)
        model, mesh = nn.Sequential(Block(), Block()).double(), init_device_mesh("cpu", (2,))
        expected = {name: p.detach().clone() for name, p in model.named_parameters()}
        px = perex.attach(model) if attached and order == "before" else None
        for module in (*model, model) if root else model:
            fully_shard(module, mesh=mesh)
        if attached and order == "after":
            px = perex.attach(model)
        seen = []
        for step in range(3):
            generator = torch.Generator().manual_seed(2 * step + rank)
            x = torch.randn(3 + step * rank, D, generator=generator).double().requires_grad_()
            losses = model(x).sin().sum(1)
            losses.mean().backward() if px is None or step == 0 else px.backward(losses)
            if px is not None:
                plain = nn.Sequential(Block(), Block()).double()
                plain.load_state_dict(expected)
                assert_norms(px, alone(plain, lambda m, i, x=x: m(x[i : i + 1]).sin().sum(1), len(x)))
            seen.append([x.grad, *grads_of(model)])
            model.zero_grad()
        return seen

    assert_same(run(True), run(False))


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("order", BEFORE_AFTER)
def test_fsdp_of_blocks(ranks, order, root):
    ranks(fsdp_blocks_case, order, root)


def fsdp_twice_case(rank: int, order: str, param_grads: bool) -> None:
    """Two forwards before one backward, as a siamese network has them; and one that is never run backward."""

    def run(order: str | None) -> Steps:
        model, px = sharded(order, options={"forwards": "same", "param_grads": param_grads})
        seen = []
        for step in range(2):
            (x, y), (other, _) = batch(rank, step), batch(rank, step + 5)
            dangling = model(other) if order is None else None  # kept alive
            losses = losses_of(model(x), y) + losses_of(model(other), y)
            losses.mean().backward()
            if px is not None:

                def pair(m: nn.Module, i: int, x: Tensor = x, y: Tensor = y, other: Tensor = other) -> Tensor:
                    return losses_of(m(x[i : i + 1]), y[i : i + 1]) + losses_of(m(other[i : i + 1]), y[i : i + 1])

                assert_norms(px, alone(whole(model), pair, len(x)))
            seen.append(grads_of(model))
            model.zero_grad()
            del dangling
        return seen

    found = run(order)
    if param_grads:
        assert_same(found, run(None), rtol=1e-12)  # each forward's gradients are added up first


def fsdp_dangling_case(rank: int, order: str) -> None:
    """Forwards that were never run backward, still alive: the gradients of the next one are all there."""

    def run(order: str | None) -> Steps:
        model, px = sharded(order)
        x, y = batch(rank, 0)
        alive = [model(x), model(x)]
        losses_of(model(x), y).mean().backward()
        if px is not None:
            assert_norms(px, loop(whole(model), x, y))
        assert len(alive) == 2
        return [grads_of(model)]

    assert_same(run(order), run(None))


def test_fsdp_with_several_forwards(ranks):
    for order in BEFORE_AFTER:
        for param_grads in (True, False):
            ranks(fsdp_twice_case, order, param_grads)
        ranks(fsdp_dangling_case, order)


def fsdp_training_case(rank: int, order: str) -> None:
    """Accumulation without synchronising, then layers frozen and unfrozen."""

    def run(order: str | None) -> Steps:
        model, px = sharded(order)
        seen = []
        for micro in range(3):
            model.set_requires_gradient_sync(micro == 2)
            x, y = batch(rank, micro)
            losses_of(model(x), y).mean().backward()
            if px is not None:
                model.reshard()
                assert_norms(px, loop(whole(model), x, y))
        seen.append(grads_of(model))
        for freeze in (False, True, False):
            model.zero_grad()
            model.blocks[0].requires_grad_(not freeze)
            x, y = batch(rank, 7)
            losses_of(model(x), y).mean().backward()
            if px is not None:
                squares = loop(whole(model), x, y)
                assert_norms(px, {n: s for n, s in squares.items() if not (freeze and n.startswith("blocks.0."))})
            seen.append(grads_of(model))
        return seen

    assert_same(run(order), run(None))


@pytest.mark.parametrize("order", BEFORE_AFTER)
def test_fsdp_training(ranks, order):
    ranks(fsdp_training_case, order)


def single(model: nn.Module) -> None:
    model.float()


def fsdp_mixed_case(rank: int, order: str) -> None:
    """bfloat16 in forward and backward; gradients reduced in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def run(order: str | None, param_grads: bool = True) -> Steps:
        model, px = sharded(order, change=single, options={"param_grads": param_grads}, mp_policy=policy)
        seen = []
        for step in range(2):
            x, y = batch(rank, step)
            losses_of(model(x), y).mean().backward()
            if px is not None:
                half = loop(whole(model, single).bfloat16(), x, y)
                assert px.norms().dtype == torch.float32
                torch.testing.assert_close(px.norms(), sum(half.values()).float().sqrt(), rtol=0.03, atol=0)
            seen.append(grads_of(model))
            model.zero_grad()
        return seen

    assert_same(run(order), run(None))
    run(order, param_grads=False)


@pytest.mark.parametrize("order", BEFORE_AFTER)
def test_fsdp_in_mixed_precision(ranks, order):
    ranks(fsdp_mixed_case, order)


def fsdp_refusals_case(rank: int, order: str) -> None:
    x, y = batch(rank, 0)
    model, px = sharded(order)
    assert px is not None
    out = model(x)
    assert "depend on" in refusal(lambda: px.backward(losses_of(out - out.mean(0), y)))
    penalty = sum(p.to_local().square().sum() for p in model.blocks[0].parameters())
    (losses_of(model(x), y).mean() + penalty).backward()
    assert "did not see" in refusal(px.norms)
    px.backward(losses_of(model(x), y))
    assert_norms(px, loop(whole(model), x, y))


@pytest.mark.parametrize("order", BEFORE_AFTER)
def test_fsdp_refusals(ranks, order):
    """Losses that compare examples, and parameters used outside the forward, whole or not."""
    ranks(fsdp_refusals_case, order)


def fsdp_traces_case(rank: int) -> None:
    """On the shards, nor on the whole parameters."""
    model, _ = sharded(None)
    x, y = batch(rank, 0)

    def step() -> dict[str, Any]:
        model.zero_grad()
        losses_of(model(x), y).mean().backward()
        model.zero_grad()
        found: dict[str, Any] = {}
        for whole in (False, True):
            for module in (model, *model.blocks):
                module.unshard() if whole else module.reshard()
            found |= {f"{whole} {name}": seen for name, seen in traces(model).items()}
        for name, seen in found.items():
            if "parameter" in name:
                del seen["version"], seen["pointer"]
        for module in (model, *model.blocks):
            module.reshard()
        return found

    before = step()
    with perex.attach(model) as px:
        losses_of(model(x), y).mean().backward()
        assert px.norms().shape == (len(x),)
        scores = perex.score  # and while scoring
    scores(model, (x, y), step=lambda m, pair: losses_of(m(pair[0]), pair[1]), progress=False)
    after = step()
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert not changed, {name: (before.get(name), after.get(name)) for name in changed}


def test_fsdp_leaves_no_trace(ranks):
    ranks(fsdp_traces_case)


# ------------------------------------------------------------------- what is refused


def flat_case(rank: int, order: str) -> None:
    """FSDP's first version, whose parameters are pieces of a flat one."""

    def run() -> None:
        model = net()
        px = perex.attach(model) if order == "before" else None
        outer = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        px = px or perex.attach(outer)
        outer(batch(rank, 0)[0])

    assert "fully_shard" in refusal(run)


def tensor_parallel_case(rank: int) -> None:
    model = parallelize_module(nn.Sequential(nn.Linear(D, 6)), init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})

    def run() -> None:
        with perex.attach(model):
            model(torch.randn(3, D))

    assert "tensor parallelism" in refusal(run)


def test_other_ways_of_sharding_are_refused(ranks):
    for order in BEFORE_AFTER:
        ranks(flat_case, order)
    ranks(tensor_parallel_case)


def fails_case(rank: int) -> None:
    if rank:
        raise ZeroDivisionError
    torch.distributed.all_reduce(torch.ones(1))


def test_a_rank_that_fails_or_waits_is_noticed():
    """The test of the tests."""
    with Ranks() as running:
        with pytest.raises(AssertionError, match="ZeroDivisionError"):
            running(fails_case, seconds=60)


def noise_case(rank: int) -> None:
    """Each rank sees other examples; what they keep is the same, the mean of their estimates."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1).double(), torch.randn(2, 6, 4, dtype=torch.float64)
    rows = [torch.cat((own, torch.ones(6, 1, dtype=torch.float64)), 1) for own in x]  # gradients of a linear output
    pairs = [torch.stack((r.var(0).sum(), r.mean(0).square().sum() - r.var(0).sum() / 6)) for r in rows]
    noise = perex.NoiseScale(decay=0.5)
    with perex.attach(model, noise, param_grads=False) as px:
        for _ in range(2):
            px.backward(model(x[rank]).squeeze(1))
            noise.update(px)
    torch.testing.assert_close(torch.tensor(noise.parts(), dtype=torch.float64), (pairs[0] + pairs[1]) / 2)


def test_the_noise_scale_of_several_processes(ranks):
    ranks(noise_case)
