"""Activation checkpointing: exact, and still worth it, however it is asked for; or refused."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from oracle import Bare, check, exact_or_refused, scramble
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import perex

B, D = 3, 4
every_way = pytest.mark.parametrize("param_grads", [True, False])


class Block(nn.Module):
    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, *, gain: Tensor | None = None, negate: bool = False) -> Tensor:
        h = self.down(nn.functional.gelu(self.up(self.norm(x)))) * (1.0 if gain is None else gain)
        return x - h if negate else x + h


def net(function: Callable, width: int = D) -> nn.Module:
    model = Bare(function)
    model.blocks = nn.ModuleList([Block(width) for _ in range(3)])
    return scramble(model)


def again(*args, **kwargs):
    return checkpoint(*args, use_reentrant=False, **kwargs)


def saves_products():
    """Selective: products are saved, the rest is computed again."""
    return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default, torch.ops.aten.mm.default])


def by_policy():
    def policy(context, operator, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if "mm" in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def every_block(m, x, **options):
    for block in m.blocks:
        x = again(block, x, **options)
    return x


def nested(m, x):
    def inner(x):
        return again(m.blocks[1], again(m.blocks[0], x).sin())

    return m.blocks[2](again(inner, x))


FORMS = {
    "every block": every_block,
    "nested": nested,
    "nested three deep": lambda m, x: again(lambda x: again(lambda x: again(m.blocks[0], x).cos(), x).sin(), x),
    "keywords": lambda m, x: again(m.blocks[0], again(m.blocks[1], x, negate=True), gain=x[:, :1]),
    "keyword tensor only": lambda m, x: again(lambda *, h: m.blocks[0](h), h=x),
    "sequential": lambda m, x: checkpoint_sequential(list(m.blocks), 2, x, use_reentrant=False),
    "selective, by operator": lambda m, x: every_block(m, x, context_fn=saves_products),
    "selective, by policy": lambda m, x: every_block(m, x, context_fn=by_policy),
    "tuples": lambda m, x: sum(again(lambda a, b: (m.blocks[0](a), m.blocks[1](b), None), x, x.sin())[:2]),
    "without determinism check": lambda m, x: every_block(m, x, determinism_check="none"),
    "twice the same": lambda m, x: again(m.blocks[0], again(m.blocks[0], x)),
    "an input by closure": lambda m, x: again(lambda h: h + m.blocks[0](x), x.sin()),
    "what was made of it by closure": lambda m, x: (lambda y: again(lambda h: h + m.blocks[0](y), x))(x.cos()),
    "one of many used": lambda m, x: again(lambda x: (m.blocks[0](x), m.blocks[1](x)), x)[0] + m.blocks[2](x),
}


NO_EARLY_STOP = ("every block", "nested three deep", "selective, by operator", "one of many used")


@pytest.mark.parametrize("form, early_stop", [(f, True) for f in FORMS] + [(f, False) for f in NO_EARLY_STOP])
def test_forms(form, early_stop):
    def forward(m, x):
        with set_checkpoint_early_stop(early_stop):
            return FORMS[form](m, x)

    check(net(forward), (torch.randn(B, D),), again="selective" not in form)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad=True:UserWarning")
def test_reentrant_is_exact_or_refused(requires_grad):
    x = torch.randn(B, D).requires_grad_(requires_grad)
    for function in (
        lambda m, x: m.blocks[1](checkpoint(m.blocks[0], m.blocks[2](x), use_reentrant=True)),
        lambda m, x: checkpoint(lambda x: again(m.blocks[0], x), m.blocks[1](x), use_reentrant=True),
        lambda m, x: again(lambda x: checkpoint(m.blocks[0], x, use_reentrant=True), m.blocks[1](x)),
    ):
        assert "refused" in exact_or_refused(net(function), (x,))


@every_way
@pytest.mark.parametrize("preserve", [True, False])
def test_dropout(preserve, param_grads):
    """In training mode: norms are those of the masks that were drawn, and `.grad` is as without perex.

    Without `preserve_rng_state` the second masks are others, and gradients are of no function at all.
    """

    def forward(m, x, masks):
        def noisy(x):
            h = nn.functional.dropout(m.blocks[0](x), 0.5, m.training)
            masks.append(h.detach() != 0)
            return m.blocks[1](h)

        return again(noisy, x, preserve_rng_state=preserve)

    model, x = net(forward).double().train(), torch.randn(B, D).double()
    weights = torch.arange(1.0, B + 1).double()

    def step(px=None) -> list[Tensor]:
        masks: list[Tensor] = []
        torch.manual_seed(5)
        with perex.attach(model, param_grads=param_grads, audit=False) if px else nullcontext() as tracker:
            (model(x, masks).sin().sum(1) * weights).mean().backward()
            norms.append(tracker.norms() if px else None)
        return masks

    norms: list = []
    plain = step()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    masks = step(px=True)
    assert all(torch.equal(a, b) for a, b in zip(masks, plain, strict=True))
    if param_grads:
        for p, g in zip(model.parameters(), expected, strict=True):
            assert (p.grad is None) == (g is None) and (g is None or torch.equal(p.grad, g))
    if not preserve:
        return
    for i in range(B):
        h = model.blocks[0](x[i : i + 1]) * masks[0][i] * 2
        loss = model.blocks[1](h).sin().sum() * weights[i]
        grads = torch.autograd.grad(loss, [*model.blocks[0].parameters(), *model.blocks[1].parameters()])
        torch.testing.assert_close(norms[1][i], torch.cat([g.flatten() for g in grads]).norm(), rtol=1e-9, atol=0)


# ------------------------------------------------------------------- what it saves


def held(model: nn.Module, x: Tensor, attached: bool, param_grads: bool) -> int:
    """Bytes that are allocated in a forward and still there when it is over, as torch's allocator counts them."""
    gc.collect()  # what others left in cycles must not be freed, and so counted, while we measure
    gc.disable()
    try:
        with perex.attach(model, param_grads=param_grads, memory="none") if attached else nullcontext():
            for _ in range(2):  # the first batch is looked at more closely
                with torch.profiler.profile(profile_memory=True) as profile:
                    out = model(x)
                out.sum().backward()
    finally:
        gc.enable()
    model.zero_grad()
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


@every_way
@pytest.mark.parametrize("form", ["every block", "nested three deep", "sequential", "selective, by operator"])
def test_memory_is_saved(form, param_grads):
    """What a checkpointed forward keeps is what it keeps without perex, and a few tensors for each parameter."""
    width, x = 64, torch.randn(256, 64)
    model = net(FORMS[form], width)
    everything = held(net(lambda m, x: m.blocks[2](m.blocks[1](m.blocks[0](x))), width), x, True, param_grads)
    plain, found = held(model, x, False, param_grads), held(model, x, True, param_grads)
    row = x.nbytes
    assert everything > 10 * row, "the test of the test: without checkpoints much more is kept"
    assert found <= plain + row // 4, f"{found} bytes are kept instead of {plain}, in units of {row}"


def test_the_second_run_is_of_the_forward_only():
    """Counted in runs: one for the forward and one for the backward, not one for each norm."""
    runs = []

    def forward(m, x):
        return again(lambda x: runs.append(1) or m.blocks[0](x), x)

    model, x = net(forward), torch.randn(B, D)
    with perex.attach(model, audit=False) as px:
        for _ in range(2):
            runs.clear()
            model(x).sum(1).mean().backward()
            px.norms(), px.norms(by="parameter")
    assert len(runs) == 2


TABLES = {
    "added": lambda m, x: again(lambda t: t + m.table(torch.arange(4)), x),
    "multiplied": lambda m, x: again(lambda t: t * m.table(torch.arange(4)), x),
    "given to each": lambda m, x: again(lambda t: t + m.table(torch.arange(4).expand(len(t), 4)), x),
    "returned": lambda m, x: x + again(lambda t: m.table(torch.arange(4)), x).view(1, 4, D),
    "returned and projected": lambda m, x: x + m.blocks[0](again(lambda t: m.table(torch.arange(4)), x)),
}


@pytest.mark.parametrize("name", TABLES)
def test_position_tables(name):
    """What the backward needs of them, it can ask for once."""

    def forward(m, x):
        return m.blocks[1](TABLES[name](m, x))

    model = Bare(forward)
    model.blocks, model.table = nn.ModuleList([Block(), Block()]), nn.Embedding(5, D)
    check(scramble(model), (torch.randn(B, 4, D, dtype=torch.float64),))
