"""What every exactness test compares perex with: a loop over batches of one, in float64.

`check` runs a model as it is, then once per way of calling perex, and compares outputs, gradients, buffers,
norms and what is left on the model afterwards. `exact_or_refused` allows a `PerexError` instead of an exact
answer, and `refused` demands one. Every loss is per example, and its weights differ from example to example.
"""

from __future__ import annotations

import copy
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor, nn
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_leaves, tree_map

import perex
from perex.kernels import convolution, outer, sums
from perex.kernels.compiled import library

BUILT = library.library() is not None
"""Whether there are kernels in C here."""

Loss = Callable[[Any, Tensor], Tensor]  # (output, indices of the examples) -> one loss per example
Example = Callable[[tuple, int], tuple]  # (inputs, i) -> the inputs of a batch that holds example i alone

torch.set_num_threads(1)  # the tensors here are tiny: more threads only wait for one another


@contextmanager
def without_kernels() -> Iterator[None]:
    """As on a machine where no kernel in C was built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "bits", lambda: 0)
        for strategies in (convolution.NORMS, outer.NORMS, sums.OUTER, sums.PATCHES):
            patch.setattr(strategies, "picked", {})
        yield


DRAWS = float(os.environ.get("PEREX_DRAWS", "0.5"))
"""What part of the drawn grids is drawn, and of the ways of calling is gone: half on a desk, all in CI (`.ci/run`)."""


def grid(max_examples: int) -> settings:
    """Hypothesis settings of the drawn grids: the same draws in every run, no time limit per example."""
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(
        max_examples=max(1, round(DRAWS * max_examples)),
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=slow,
    )


@dataclass(frozen=True)
class Way:
    """One way of calling perex: `call` is "loss" (`loss.backward()`) or "losses" (`px.backward(losses)`)."""

    call: str
    reduction: str
    param_grads: bool


WAYS = [
    Way(call, reduction, param_grads)
    for param_grads in (True, False)
    for call, reduction in (("loss", "mean"), ("loss", "sum"), ("losses", "mean"))
]


checked: Counter[str] = Counter()
"""How many checks each test has made."""


def in_turn(ways: list[Way]) -> list[Way]:
    """All ways in CI; on a desk half of them, and the other half in the same test's next check."""
    if DRAWS >= 1 or len(ways) < 3:
        return ways
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    turn = zlib.crc32(test.encode()) + checked[test]  # not a test's number: workers share tests out as they come
    checked[test] += 1
    return ways[turn % 2 :: 2]


@dataclass
class Shared:
    """Marks an input tensor that has no batch axis: each batch of one gets all of it."""

    value: Tensor


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic random values, so that no gradient is simple by accident."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


class Around(nn.Module):
    """A layer with something that has a parameter before it, and something behind it."""

    def __init__(self, layer: nn.Module, before: bool, inplace: bool, after: bool):
        super().__init__()
        self.before = nn.PReLU() if before else None
        self.layer = layer
        self.act = nn.ReLU(inplace=True) if inplace else None
        self.after = nn.PReLU() if after else None

    def forward(self, *args: Any) -> Tensor:
        if self.before is not None:
            args = tuple(self.before(a) if torch.is_tensor(a) and a.is_floating_point() else a for a in args)
        out = self.layer(*args)
        for then in (self.act, self.after):
            out = out if then is None else then(out)
        return out


class Bare(nn.Module):
    """Parameters without a layer: `forward` is a function of the module and the inputs.

    Shapes are spelled with letters and digits: `Bare(f, {"T": 3, "D": 4}, pos="1TD", scale="")`.
    """

    def __init__(self, function: Callable[..., Any], sizes: dict[str, int] | None = None, **shapes: str):
        super().__init__()
        self.function, self.sizes = function, sizes or {}
        for name, shape in shapes.items():
            size = [int(s) if s.isdigit() else self.sizes[s] for s in shape]
            self.register_parameter(name, nn.Parameter(torch.randn(size)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


PLACES = ("alone", "input", "first", "first+inplace", "later", "later+inplace")


def place(layer: nn.Module, where: str, *inputs: Any) -> tuple[nn.Module, tuple]:
    """The layer as the whole model, perhaps on inputs that require grad, or a part of a small model."""
    scramble(layer)
    if where == "input":
        floating = [torch.is_tensor(x) and x.is_floating_point() for x in inputs]
        inputs = tuple(x.detach().requires_grad_() if f else x for x, f in zip(inputs, floating, strict=True))
    if where in ("alone", "input"):
        return layer, inputs
    inplace = where.endswith("inplace")
    return scramble(Around(layer, before=where.startswith("later"), inplace=inplace, after=not inplace)), inputs


def quiet(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Build a module without torch's warnings about empty parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **kwargs)


# ---------------------------------------------------------------------- the loop


def projection(batch_dim: int = 0) -> Loss:
    """sum_e w[i, e] sin(output[i, e]) over all floating-point tensors in the output, w irregular."""

    def losses(output: Any, index: Tensor) -> Tensor:
        total = torch.zeros(len(index), dtype=torch.float64)
        for k, t in enumerate(floats(output)):
            flat = t.movedim(batch_dim, 0).unsqueeze(-1).flatten(1)
            w = torch.sin(1 + k + 0.7 * index[:, None] + 1.3 * torch.arange(flat.shape[1], dtype=torch.float64))
            total = total + (w.to(t.dtype) * flat.sin()).sum(1)
        return total

    return losses


def floats(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if torch.is_tensor(t) and t.is_floating_point()]


def sliced(batch_dim: int = 0) -> Example:
    """Batches of one by slicing every input tensor that is not marked `Shared`."""

    def one(t: Any, i: int) -> Any:
        return t.narrow(batch_dim, i, 1) if torch.is_tensor(t) else t

    return lambda inputs, i: tree_map(lambda t: one(t, i), inputs)


def unwrap(inputs: Any) -> Any:
    return tree_map(lambda t: t.value if isinstance(t, Shared) else t, inputs)


def fresh(inputs: Any) -> Any:
    """The same inputs as leaves of their own."""
    return tree_map(lambda t: t.detach().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t, inputs)


def double(tree: Any) -> Any:
    """Floating-point tensors in float64, strides kept; integers as they are."""

    def cast(t: Any) -> Any:
        if isinstance(t, Shared):
            return Shared(cast(t.value))
        floating = torch.is_tensor(t) and t.is_floating_point()
        return t.detach().double().requires_grad_(t.requires_grad) if floating else t

    return tree_map(cast, tree)


def is_tracked(name: str, p: nn.Parameter, params: Any) -> bool:
    if params is None or callable(params):
        return p.requires_grad and (params is None or params(name, p))
    return p.requires_grad and any(fnmatchcase(name, pattern) for pattern in params)


def loop(
    make: Callable[[], nn.Module],
    inputs: tuple,
    loss: Loss,
    *,
    params: Any = None,
    batch_size: int,
    example: Example,
    kwargs: dict | None = None,
) -> dict[str, list[Tensor]]:
    """Gradients by parameter, one batch of one after the other: {name: [gradient for each example]}."""
    rows: list[dict[str, Tensor]] = []
    for i in range(batch_size):
        model = make()
        args, keywords = unwrap(example((inputs, kwargs or {}), i))
        value = loss(model(*args, **keywords), torch.tensor([i]))
        assert value.shape == (1,), "the loss must be per example"
        tracked = {n: p for n, p in model.named_parameters() if is_tracked(n, p, params)}
        model.zero_grad()
        if value.requires_grad:
            value.sum().backward()
        row = {n: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for n, p in tracked.items()}
        rows.append(row)
    return {n: [row[n] for row in rows] for n in rows[0]}


# ---------------------------------------------------------------------- traces


def globals_touched() -> dict[str, Any]:
    """What a careless library would patch or leave switched on."""
    module, functional = nn.modules.module, nn.functional
    return {
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "global hooks": {
            k: len(v) for k, v in vars(module).items() if k.startswith("_global") and hasattr(v, "__len__")
        },
        "patched": [
            nn.Module.__call__,
            nn.Module.__getattr__,
            torch.Tensor.backward,
            torch.autograd.backward,
            vars(torch.autograd.Function)["apply"],
            vars(_SingleLevelFunction).get("apply"),
            functional.linear,
            functional.conv2d,
            functional.embedding,
            functional.multi_head_attention_forward,
        ],
        "grad enabled": torch.is_grad_enabled(),
    }


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything on a model that attaching could leave behind, comparable with ==."""
    found: dict[str, Any] = {"globals": globals_touched(), "state": list(model.state_dict())}
    for path, module in model.named_modules():
        state = vars(module)
        found[f"module {path!r}"] = {
            "keys": list(state),
            "type": type(module),
            "hooks": {k: dict(v) for k, v in state.items() if "hook" in k and isinstance(v, dict)},
            "parameters": {k: id(p) for k, p in module._parameters.items()},
            "buffers": list(module._buffers),
            "children": {k: id(m) for k, m in module._modules.items()},
            "training": module.training,
            "methods": type(module).forward,
        }
    for name, p in model.named_parameters(remove_duplicate=False):
        found[f"parameter {name}"] = {
            "id": id(p),
            "type": type(p),
            "requires_grad": p.requires_grad,
            "leaf": p.is_leaf,
            "keys": list(vars(p)),
            "version": p._version,
            "pointer": p.data_ptr(),
            "hooks": dict(p._backward_hooks or {}),
            "post hooks": dict(p._post_accumulate_grad_hooks or {}),
        }
    return found


@contextmanager
def no_trace(model: nn.Module, versions: bool = True) -> Iterator[None]:
    """Fails if the model is not as it was; `versions=False` for models that change their own parameters."""

    def seen() -> dict[str, Any]:
        found = traces(model)
        for name in found if not versions else ():
            if name.startswith("parameter"):
                found[name].pop("version")
        return found

    before = seen()
    try:
        yield
    finally:
        after = seen()
        changed = {k: (before.get(k), after.get(k)) for k in before | after if before.get(k) != after.get(k)}
        assert not changed, f"left behind on the model: {changed}"


# ---------------------------------------------------------------------- the comparison


@dataclass
class Run:
    """One forward and backward: what a user could see of it."""

    output: list[Tensor]
    grads: dict[str, Tensor | None]
    input_grads: list[Tensor | None]
    buffers: dict[str, Tensor]


def run(model: nn.Module, inputs: tuple, kwargs: dict, loss: Loss, batch_size: int, way: Way, px: Any = None) -> Run:
    inputs, kwargs = fresh(unwrap(inputs)), fresh(unwrap(kwargs))
    output = model(*inputs, **kwargs)
    seen = [t.detach().clone() for t in floats(output)]
    losses = loss(output, torch.arange(batch_size))
    assert losses.shape == (batch_size,), "the loss must be per example"
    if px is not None and way.call == "losses":
        px.backward(losses)
    else:
        (losses.mean() if way.reduction == "mean" else losses.sum()).backward()
    return Run(
        seen,
        {n: p.grad for n, p in model.named_parameters()},
        [t.grad for t in floats((inputs, kwargs))],
        {n: b.detach().clone() for n, b in model.named_buffers()},
    )


def assert_identical(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    """Bit for bit, None and layout included."""
    assert (actual is None) == (expected is None), f"{what}: {actual} instead of {expected}"
    if actual is None or expected is None:
        return
    assert actual.layout == expected.layout, f"{what}: {actual.layout} instead of {expected.layout}"
    torch.testing.assert_close(
        actual.to_dense(),
        expected.to_dense(),
        rtol=0,
        atol=0,
        equal_nan=True,
        msg=lambda m: f"{what} differs\n{m}",
    )


def assert_rounded(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    """Equal but for rounding: torch multiplies by another kernel where a weight does not require grad."""
    assert (actual is None) == (expected is None), f"{what}: {actual} instead of {expected}"
    if actual is not None and expected is not None:
        margin = 1e-12 * max(1.0, float(expected.abs().nan_to_num().max()) if expected.numel() else 0.0)
        same = torch.allclose(actual, expected, rtol=1e-9, atol=margin, equal_nan=True)
        assert same, f"{what}: {actual} instead of {expected}"


def assert_norms(px: Any, squares: dict[str, Tensor], what: Any = "", rtol: float = 1e-9, atol: float = 1e-9) -> None:
    """All readings of `px` against the loop's squared norms; `atol` is relative to the largest norm."""
    total = torch.stack(list(squares.values())).sum(0)
    margin = atol * max(1e-3, float(total.sqrt().nan_to_num(posinf=0).max())) if len(total) else 0.0
    modules: dict[str, Tensor] = {}
    for name, square in squares.items():
        path = name.rpartition(".")[0]
        modules[path] = modules.get(path, 0) + square

    pairs = [("all", px.norms(), total), ("all, squared", px.squared_norms().sqrt(), total)]
    for by, expected in (("parameter", squares), ("module", modules)):
        found, found_squares = px.norms(by=by), px.squared_norms(by=by)
        assert set(found) == set(expected) == set(found_squares), f"{what} by={by!r}: {sorted(found)}"
        for name, square in expected.items():
            pairs.append((f"{by} {name!r}", found[name], square))
            pairs.append((f"{by} {name!r}, squared", found_squares[name].sqrt(), square))
    for of, actual, _ in pairs:
        assert torch.is_tensor(actual) and not actual.requires_grad, f"{what} {of}: {actual!r}"
        assert actual.shape == total.shape, f"{what} {of}: {actual.shape}"
    actuals, wanted = (torch.stack([pair[k].double() for pair in pairs]) for k in (1, 2))
    if not torch.allclose(actuals, wanted.sqrt(), rtol=rtol, atol=margin, equal_nan=True):  # which, and how far off
        for of, actual, square in pairs:
            torch.testing.assert_close(
                actual.double(),
                square.double().sqrt(),
                rtol=rtol,
                atol=margin,
                equal_nan=True,
                msg=lambda m, of=of: f"{what} norms of {of}:\n{m}",
            )
        raise AssertionError(f"{what}: norms differ")


def close(actual: Tensor, expected: Tensor, what: str, rtol: float, size: Any = None) -> None:
    """Equal but for rounding, relative to the largest number, or to `size`."""
    size = expected if size is None else torch.as_tensor(size)
    margin = rtol * max(1e-3, float(size.abs().max()) if size.numel() else 0.0)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=margin, msg=lambda m: f"{what}\n{m}")


def directions(rows: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """An irregular direction for each parameter."""
    numbers = ((name, each[0], torch.arange(each[0].numel(), dtype=torch.float64)) for name, each in rows.items())
    return {name: (one.real + 1.7 * n.reshape(one.shape)).cos().to(one.dtype) for name, one, n in numbers}


def statistics(rows: dict[str, list[Tensor]]) -> list[perex.Quantity]:
    """One of each further statistic."""
    return [perex.Dots(directions(rows)), perex.Dots("grad"), perex.Gram(), perex.Grads(), perex.Projections(70, 3)]


def flat(gradient: Tensor) -> Tensor:
    return (torch.view_as_real(gradient) if gradient.is_complex() else gradient).flatten()


def assert_statistics(px: Any, quantities: list, rows: dict[str, list[Tensor]], weight: float, what: Any, rtol: float):
    """All further statistics against the loop's gradients; `weight` is that of each loss in the one run backward."""
    dots, own, gram, grads, projections = quantities
    along = directions(rows)
    whole = torch.stack([torch.cat([flat(rows[name][b]) for name in rows]) for b in range(px.batch_size)])
    direction = torch.cat([flat(along[name]) for name in rows])
    norms, rtol = whole.norm(dim=1), max(rtol, 1e-9)
    large = float(norms.max())
    close(px.read(dots), whole @ direction, f"{what} dots", rtol, large * direction.norm())
    close(px.read(own), whole @ whole.sum(0) * weight, f"{what} dots with .grad", rtol, large**2)
    close(px.read(gram), whole @ whole.T, f"{what} Gram", rtol, large**2)
    for quantity, vector in ((dots, direction), (own, whole.sum(0))):
        sizes = norms * vector.norm()
        if float(vector.norm()) > 1e-6 * large and large > 1e-6:
            expected = torch.where(norms > 1e-6 * large, whole @ vector / sizes, quantity.cosines(px).double())
            close(quantity.cosines(px), expected, f"{what} cosines", rtol * 1e3)
    found = px.read(grads)
    assert set(found) == set(rows)
    for name, each in rows.items():
        torch.testing.assert_close(
            found[name], torch.stack(each), rtol=rtol, atol=rtol * max(large, 1e-3), check_dtype=False
        )
    expected = torch.zeros(px.batch_size, 70, dtype=torch.float64)
    for name, each in rows.items():
        m = each[0].shape[0] if each[0].dim() else 1
        matrices = torch.stack([flat(g) for g in each]).reshape(len(each), m, flat(each[0]).numel() // max(m, 1))
        left, right = (
            projections.signs(f"{name}, {side}", n).double()
            for side, n in (("rows", matrices.shape[1]), ("columns", matrices.shape[2]))
        )
        expected += torch.einsum("bmn,mk,nk->bk", matrices, left, right) / 70**0.5
    close(px.read(projections), expected, f"{what} projections", rtol, large)


def assert_clips(
    px: Any,
    model: nn.Module,
    rows: dict[str, list[Tensor]],
    before: dict[str, Tensor | None],
    what: Any,
    rtol: float,
    low: bool,
) -> None:
    """`clip_` and `reweight_` leave in `.grad` what the loop's gradients say, on top of what was there before."""
    rtol = max(rtol, 1e-9)
    each = {name: torch.stack(gradients) for name, gradients in rows.items()}
    squares = {name: g.abs().square().reshape(len(g), g[0].numel()).sum(1) for name, g in each.items()}
    norms = torch.stack(list(squares.values())).sum(0).sqrt()
    bound = max(float(norms.median()), 1e-3)
    parameters = dict(model.named_parameters())

    def held(weights: dict[str, Tensor], of: str) -> None:
        for name, gradients in each.items():
            expected = torch.tensordot(weights[name].to(gradients), gradients, 1)
            expected = expected if before.get(name) is None else expected + before[name]
            grad, largest = parameters[name].grad.to_dense(), float(norms.max()) if len(norms) else 0.0
            same = torch.allclose(grad, expected, rtol=rtol, atol=rtol * max(1e-3, largest * len(gradients)))
            assert same, f"{what} {of}: {name}.grad is {grad} instead of {expected}"

    close(px.clip_(bound), norms, f"{what} norms of clip_", rtol)
    held(dict.fromkeys(each, bound / norms.clamp(min=bound)), "clip_")
    if low:
        return
    px.clip_(bound, by="parameter")
    held({name: bound / square.sqrt().clamp(min=bound) for name, square in squares.items()}, "clip_ by parameter")
    weights = torch.linspace(-1, 2, len(norms), dtype=torch.float64)
    px.reweight_(weights)
    held(dict.fromkeys(each, weights), "reweight_")


def assert_adds_up(
    rows: dict[str, list[Tensor]], grads: dict[str, Tensor | None], batch_size: int, rtol: float
) -> None:
    """The test of the oracle: the loop's gradients add up to the one that torch gives for the whole batch."""
    for name, each in rows.items():
        whole = grads[name]
        expected = torch.zeros_like(each[0]) if whole is None else whole.to_dense() * batch_size
        found = sum(each, torch.zeros_like(each[0]))
        same = torch.allclose(found, expected, rtol=rtol, atol=rtol, equal_nan=True)
        assert same, f"the loop is wrong about {name}: {found} is not {expected}"


def check(
    model: nn.Module | Callable[[], nn.Module],
    inputs: tuple,
    loss: Loss | None = None,
    *,
    params: Any = None,
    batch_dim: int = 0,
    batch_size: int | None = None,
    example: Example | None = None,
    kwargs: dict | None = None,
    rtol: float = 1e-9,
    atol: float = 1e-9,
    versions: bool = True,
    again: bool = True,
    bits: bool = True,
    ways: list[Way] = WAYS,
) -> dict[str, Tensor]:
    """Compare perex with the loop in every way of calling it; returns the loop's squared norms by parameter.

    Args:
        model: a module, copied for each run; or a function that makes the same one every time (where a module
            cannot be copied).
        inputs: positional arguments. Tensors are batched along `batch_dim` unless marked `Shared`.
        loss: (output, indices of the examples) -> losses; a projection of the output by default.
        example: (inputs, i) -> inputs of a batch of one, where slicing `batch_dim` is not it.
        again: False where the graph can be run backward once only.
        bits: False where `.grad` is added up in another order.
        versions: False where the model itself writes into its parameters in its forward.
    """
    make = (lambda: copy.deepcopy(model).double()) if isinstance(model, nn.Module) else (lambda: model().double())
    inputs, kwargs = double(inputs), double(kwargs or {})
    loss = loss or projection(batch_dim)
    if batch_size is None:
        batched = [t for t in tree_leaves((inputs, kwargs)) if torch.is_tensor(t) and t.dim() > batch_dim]
        batch_size = batched[0].shape[batch_dim]
    grads = loop(
        make,
        inputs,
        loss,
        params=params,
        batch_size=batch_size,
        example=example or sliced(batch_dim),
        kwargs=kwargs,
    )
    squares = {n: torch.stack([g.square().sum() for g in rows]) for n, rows in grads.items()}

    plains: dict[str, Run] = {}
    for way in in_turn(ways):
        if way.reduction not in plains:
            plains[way.reduction] = run(make(), inputs, kwargs, loss, batch_size, way)
            assert_adds_up(grads, plains[way.reduction].grads, batch_size if way.reduction == "mean" else 1, rtol)
        plain = plains[way.reduction]
        subject = make()
        before: dict[str, Any] = {}
        if not way.param_grads:  # every other parameter has a gradient already, which is nobody's business
            for k, (name, p) in enumerate(subject.named_parameters()):
                p.grad = torch.full_like(p, 7.0) if k % 2 else None
                before[name] = p.grad
        memory = "low" if again and way.call == "losses" and way.param_grads else "high"
        finite = all(bool(square.isfinite().all()) for square in squares.values())
        quantities = statistics(grads) if way.call == "losses" and finite else []
        with no_trace(subject, versions):
            with perex.attach(
                subject,
                *quantities,
                params=params,
                loss_reduction=way.reduction,
                batch_dim=batch_dim,
                param_grads=way.param_grads,
                memory=memory,
            ) as px:
                seen = run(subject, inputs, kwargs, loss, batch_size, way, px)
                assert px.batch_size == batch_size, f"{way}: batch_size {px.batch_size}"
                assert_norms(px, squares, way, rtol, atol)
            assert_norms(px, squares, f"{way} after detaching", rtol, atol)
            if quantities:
                weight = 1 / batch_size if way.reduction == "mean" else 1.0
                assert_statistics(px, quantities, grads, weight, way, rtol)

        assert len(seen.output) == len(plain.output)
        same = assert_identical if way.param_grads else assert_rounded
        for a, b in zip(seen.output, plain.output, strict=True):
            same(a, b, f"{way} output")
        for a, b in zip(seen.input_grads, plain.input_grads, strict=True):
            same(a, b, f"{way} input.grad")
        for name, b in plain.buffers.items():
            same(seen.buffers[name], b, f"{way} buffer {name}")
        for name, g in seen.grads.items():
            if way.param_grads:
                (assert_identical if bits else assert_rounded)(g, plain.grads[name], f"{way} {name}.grad")
            else:
                assert g is before[name], f"{way} {name}.grad was replaced"
                assert g is None or bool((g == 7).all()), f"{way} {name}.grad was written to"
        if finite:
            held = {name: None if g is None else g.clone() for name, g in before.items()}
            assert_clips(px, subject, grads, held, way, rtol, memory == "low")
    return squares


def exact_or_refused(model: Any, inputs: tuple, *args: Any, ways: list[Way] = WAYS, **kwargs: Any) -> str:
    """Each way of calling is exact or raises `PerexError`, leaving no trace; returns what happened."""
    results = set()
    for way in ways:
        try:
            check(model, inputs, *args, ways=[way], **kwargs)
            results.add("exact")
        except perex.PerexError as error:
            assert str(error), "a refusal says why"
            results.add("refused")
    return " or ".join(sorted(results))


def refused(
    model: Any,
    inputs: tuple,
    loss: Loss | None = None,
    *,
    params: Any = None,
    batch_dim: int = 0,
    match: str | None = None,
) -> None:
    """Each way of calling raises a `PerexError` whose message matches, and leaves no trace."""
    make = (lambda: copy.deepcopy(model).double()) if isinstance(model, nn.Module) else (lambda: model().double())
    inputs, loss = double(inputs), loss or projection()
    for way in WAYS:
        subject = make()
        with no_trace(subject), pytest.raises(perex.PerexError, match=match):
            with perex.attach(
                subject,
                params=params,
                loss_reduction=way.reduction,
                batch_dim=batch_dim,
                param_grads=way.param_grads,
            ) as px:
                run(subject, inputs, {}, loss, len(tree_leaves(inputs)[0]), way, px)
                px.norms()
