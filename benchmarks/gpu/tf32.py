"""How far norms in TF32 are off, parameter by parameter: perex's and the loop's, from a float64 loop on the same GPU.

python benchmarks/gpu/tf32.py --only 'ResNet-50 224 (256)'

The loop's batches of one are computed in TF32, too: where it is as far off as perex, or farther, it is the precision;
where perex alone is off, it is perex, and the way that it took says where.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
from collections.abc import Sequence

import run
import torch
from run import large, models
from torch import Tensor, nn

import perex


def looped(case: models.Case, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Squared norms of each parameter, of the first examples, by a loop."""
    found: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for b in range(run.FEW):
        loss = case.loss(model(x[b : b + 1]), y[b : b + 1]).sum()
        grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, allow_unused=True)
        for name, grad in zip(found, grads, strict=True):
            found[name].append(grad.double().square().sum())
    return {name: torch.stack(each) for name, each in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How far norms in TF32 are off, parameter by parameter.")
    parser.add_argument("--only", default="ResNet-50 224 (256)", help="a model, as a glob")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models")
    parser.add_argument("--most", type=int, default=25)
    options = parser.parse_args(arguments)
    every = large.SMALL if options.small else [*models.TABLE, *large.LARGE]
    case = next(case for case in every if fnmatch.fnmatch(case.name, options.only))
    run.in_precision("tf32")
    with torch.device(options.device):
        model, x, y = case.build()
    ours = copy.deepcopy(model)
    with perex.attach(ours, param_grads=False) as px:
        for _ in range(2):
            px.backward(case.loss(ours(x), y))
        squares = {name: each[: run.FEW].double() for name, each in px.squared_norms(by="parameter").items()}
        ways = {name: row.ways for row in px.report().rows for name in row.parameters}
    loop = looped(case, model, x, y)
    exact = looped(case, copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x, y)
    whole = sum(exact.values())
    of_perex, of_loop = (off(sum(each.values()), whole) for each in (squares, loop))
    print(f"{case.name}: squares of the whole norm: perex {of_perex}, loop {of_loop}")
    shares = {name: float(((squares[name] - each).abs() / whole).max()) for name, each in exact.items()}
    for name in sorted(shares, key=shares.__getitem__, reverse=True)[: options.most]:
        print(
            f"{shares[name]:.1e} of the whole: {name} {ways.get(name)}: perex {off(squares[name], exact[name])}, "
            f"loop {off(loop[name], exact[name])}"
        )


def off(found: Tensor | float, exact: Tensor | float) -> str:
    """The worst relative error of squares, of each example."""
    ratio = (torch.as_tensor(found) / torch.as_tensor(exact) - 1).abs()
    return " ".join(f"{float(each):.1e}" for each in ratio.flatten())


if __name__ == "__main__":
    main()
