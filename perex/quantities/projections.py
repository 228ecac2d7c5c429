"""Random projections of each example's gradient."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from perex.errors import ArgumentError
from perex.factors import Total
from perex.quantities.base import Quantity

CHUNK = 256
"""How many projections are taken at a time: of so many, each position of a sequence has a temporary."""


class Projections(Quantity):
    r"""$p_b \in \mathbb{R}^K$ with $\mathbb{E} \langle p_b, p_c \rangle = \langle g_b, g_c \rangle$, for any batches.

    Each parameter's gradient, as a matrix $G$ of its first dimension by the rest, gives $K^{-1/2} s_k^\top G_b t_k$,
    with vectors $s_k$ and $t_k$ of independent random signs, added up over parameters. Both sides of a layer's factors
    are projected, so no gradient is multiplied out. The signs follow from the seed and the parameters' names, so they
    are the same in each batch, process and on each device.

    The inner product is unbiased. Its variance is at most $8 \|g_b\|^2 \|g_c\|^2 / K$. For one matrix of gradients
    $G$, $H$, with $P = G G^\top$, $Q = H H^\top$, $M = G H^\top$ and columns $G_i$, $H_i$, K times the variance is
    $\|G\|^2 \|H\|^2 + 2 \,\mathrm{tr}(PQ) - 2 \sum_j P_{jj} Q_{jj}
    + 2 [\langle G, H \rangle^2 + \mathrm{tr}(MM) + \|M\|^2 - 2 \sum_j M_{jj}^2]
    - 2 \sum_i [\|G_i\|^2 \|H_i\|^2 + 2 \langle G_i, H_i \rangle^2 - 2 \sum_j G_{ji}^2 H_{ji}^2]
    - \langle G, H \rangle^2$.

    Args:
        dim: K, the number of projections.
        seed: which random signs.

    Example:
        >>> import torch, perex
        >>> model, projections = torch.nn.Linear(20, 10), perex.Projections(512, seed=0)
        >>> with perex.attach(model, projections) as px:
        ...     px.backward(model(torch.randn(8, 20)).logsumexp(1))
        >>> px.read(projections).shape
        torch.Size([8, 512])

    References:
        Johnson and Lindenstrauss 1984; Park et al., "TRAK", 2023, for projected gradients in data attribution; Choe et
        al., "What is Your Data Worth to GPT?" (LoGra), 2024, for projecting both sides of a layer.
    """

    degree = 1

    def __init__(self, dim: int, seed: int = 0) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ArgumentError(f"dim={dim!r}: it is the number of projections, at least 1")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ArgumentError(f"seed={seed!r}: it is a whole number from 0 to 2**64 - 1")
        self.dim, self.seed = dim, seed
        self.complex: set[str] = set()
        self.drawn: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}
        self.wrapped = False  # by DistributedDataParallel, which puts a word in front of names

    def attached(self, model: nn.Module, tracked: Mapping[str, nn.Parameter]) -> None:
        """See `Quantity.attached`."""
        super().attached(model, tracked)
        self.wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
        self.complex = {name for name, parameter in tracked.items() if parameter.is_complex()}

    def reduce(self, name: str, gradient: Total) -> Tensor:
        """See `Quantity.reduce`: `(B, K)`."""
        m = gradient.shape[0] if gradient.shape else 1
        n = math.prod(gradient.shape[1:]) * (2 if name in self.complex else 1)
        key = name.removeprefix("module.") if self.wrapped else name, m, n
        if key not in self.drawn:
            self.drawn[key] = self.signs(f"{key[0]}, rows", m), self.signs(f"{key[0]}, columns", n)
        chunks = zip(*(signs.split(CHUNK, 1) for signs in self.drawn[key]), strict=True)
        found = torch.cat([gradient.project(rows, columns) for rows, columns in chunks], 1)
        if found.device != self.drawn[key][0].device:  # where they are needed next time
            rows, columns = self.drawn[key]
            self.drawn[key] = rows.to(found.device), columns.to(found.device)
        return found / math.sqrt(self.dim)

    def signs(self, what: str, count: int) -> Tensor:
        """`(count, K)` of 1 and -1, bits of numpy's Philox generator, whose stream is the same on all machines."""
        key = int.from_bytes(hashlib.blake2b(what.encode(), digest_size=8).digest(), "little")
        words = -(-self.dim // 64)
        raw = np.random.Philox(key=np.array([self.seed, key], dtype=np.uint64)).random_raw(count * words)
        bits = np.unpackbits(raw.astype("<u8").view(np.uint8)).reshape(count, 64 * words)[:, : self.dim]
        return torch.from_numpy(1 - 2 * bits.astype(np.int8))
