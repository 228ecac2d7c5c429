"""How a network of another package is made: what to import, what to call it with, and its inputs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import pkgutil
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from inputs import BATCH, Inputs
from torch import Tensor, nn

Maker = Callable[[torch.Generator], Tensor]
PARTIAL = ("vit_pytorch",)  # their `__init__` needs torchvision, most of their modules do not


class New:
    """Something to import and to call later; among its arguments may be more of the kind."""

    def __init__(self, path: str, **options: Any) -> None:
        self.path, self.options = path, options

    def __call__(self) -> Any:
        options = {name: value() if isinstance(value, New) else value for name, value in self.options.items()}
        return pkgutil.resolve_name(self.path)(**options)


@dataclasses.dataclass
class Shared:
    """An input without examples in it, the same in every call."""

    make: Maker


@dataclasses.dataclass
class Case:
    """One network.

    Attributes:
        package: the name under which its package is imported.
        model: makes the network.
        inputs: by argument: what makes a row for each example, a shared input, or a constant.
    """

    package: str
    model: New
    inputs: dict[str, Any]

    def build(self) -> nn.Module:
        """The network, without dropout."""
        if self.package in PARTIAL:
            only_in_part(self.package)
        torch.manual_seed(0)
        model = self.model()
        for module in model.modules():
            rates = [n for n, v in vars(module).items() if "drop" in n and isinstance(v, float)]
            if isinstance(module, nn.modules.dropout._DropoutNd):
                rates.append("p")
            for name in rates:
                setattr(module, name, 0.0)
        return model

    def make_inputs(self) -> Inputs:
        """The same at every call."""
        random = torch.Generator().manual_seed(1)
        made = {n: v.make(random) if isinstance(v, Shared) else v for n, v in self.inputs.items()}
        tensors = {name: value(random) for name, value in made.items() if callable(value)}
        return Inputs(tensors, {name: value for name, value in made.items() if name not in tensors})


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed, by the names under which they are imported."""
    known = importlib.metadata.packages_distributions()
    return {name: importlib.metadata.version(known[name][0]) for name in dict.fromkeys(packages) if name in known}


def only_in_part(package: str) -> None:
    """Let single modules of a package be imported, without its `__init__`."""
    if package not in sys.modules:
        module = types.ModuleType(package)
        module.__path__ = list(importlib.util.find_spec(package).submodule_search_locations)
        sys.modules[package] = module


def floats(*shape: int) -> Maker:
    """Normal numbers for each example."""
    return lambda random: torch.randn(BATCH, *shape, generator=random, dtype=torch.float64)


def rows(count: int, *shape: int) -> Maker:
    """Several rows for each example, one after the other."""
    return lambda random: torch.randn(BATCH * count, *shape, generator=random, dtype=torch.float64)


def ids(highest: int, *shape: int) -> Maker:
    """Whole numbers below this one."""
    return lambda random: torch.randint(highest, (BATCH, *shape), generator=random)


def keys(length: int, dtype: torch.dtype = torch.bool) -> Maker:
    """Which positions count: all, two fewer, one fewer."""
    lengths = torch.tensor([length, length - 2, length - 1])[:BATCH]
    return lambda random: (torch.arange(length) < lengths[:, None]).to(dtype)


def hidden(length: int) -> Maker:
    """Which positions do not count."""
    return lambda random: ~keys(length)(random)


def shared(*shape: int) -> Shared:
    """The same normal numbers in every call."""
    return Shared(lambda random: torch.randn(*shape, generator=random, dtype=torch.float64))


def times(random: torch.Generator) -> Tensor:
    """A moment of a diffusion for each example."""
    return 10 * torch.rand(BATCH, generator=random, dtype=torch.float64)


def causal(length: int) -> Shared:
    """The mask that hides what comes later, as numbers to add."""
    return Shared(lambda random: nn.Transformer.generate_square_subsequent_mask(length))
