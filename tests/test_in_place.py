"""What is written in place: parameters into constants, examples into what derives from parameters, shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from oracle import Bare, check, exact_or_refused, scramble
from torch import Tensor, nn

import perex

B, D = 4, 4
Forward = Callable[[Any, Tensor], Tensor]


def net(function: Forward) -> nn.Module:
    model = Bare(function, w="4", k="")
    model.l = nn.Linear(3, D)
    model.register_buffer("table", torch.randn(25, D))
    return scramble(model).double()


def losses(out: Tensor, index: Tensor) -> Tensor:
    return out.sin().flatten(1).sum(1)


def copied(m: Any, x: Tensor) -> Tensor:
    h, row = m.l(x).clone(), x.new_zeros(D)
    row.copy_(m.w)
    h[:, 2:] = row[2:]
    return h


def like_the_batch(m: Any, x: Tensor) -> Tensor:
    h, row = m.l(x), x.new_zeros(D)
    row.copy_(m.w)
    t = torch.zeros_like(h)
    t[:] = row
    return h * t


def into_a_view(m: Any, x: Tensor) -> Tensor:
    table = x.new_ones(3, D)
    table[1] += m.w
    table[2, :2].mul_(m.k)
    return m.l(x) @ table.T


def into_a_view_of_a_view(m: Any, x: Tensor) -> Tensor:
    table = x.new_ones(2, 3, D)
    part = table[1]
    part[0].sub_(m.w)
    return torch.einsum("bd,end->ben", m.l(x), table)


def a_number_set(m: Any, x: Tensor) -> Tensor:
    table = x.new_zeros(3, D)
    table.add_(m.w)
    table[0] = 1.0
    table[1, torch.arange(D) > 1] = -2.0
    return m.l(x) @ table.T


def changed_behind_a_view(m: Any, x: Tensor) -> Tensor:
    table = x.new_zeros(3, D)
    table.add_(m.w)
    row = table[0]
    table.mul_(2.0)
    row += m.k
    table[1] = m.w * 3
    return m.l(x) * row + m.l(x) @ table.T.sum(1, keepdim=True)


def set_behind_a_view(m: Any, x: Tensor) -> Tensor:
    table = x.new_zeros(3, D)
    table[0] = m.w
    row = table[0]
    table[0] = m.w * 3
    return m.l(x) * row


def copied_then_changed(m: Any, x: Tensor) -> Tensor:
    table, other = x.new_zeros(3, D), x.new_ones(3, D)
    table.add_(m.w)
    other.copy_(table)
    table.mul_(2.0)
    return m.l(x) @ (table + other).T


def without_gradients(m: Any, x: Tensor) -> Tensor:
    table = x.new_zeros(3, D)
    table.add_(m.w)
    with torch.no_grad():
        table.mul_(2.0)
    return m.l(x) @ table.T


def by_rows(m: Any, x: Tensor) -> Tensor:
    table = x.new_zeros(3, D)
    for i in range(3):
        table[i] += m.w * (i + 1)
    with torch.no_grad():
        size = table.norm().detach() * 0 + 2
    return m.l(x) @ (table / size).T


EXACT: dict[str, Forward] = {
    "copied": copied,
    "added": lambda m, x: m.l(x) + x.new_zeros(D).add_(m.w, alpha=2),
    "multiplied": lambda m, x: m.l(x) * x.new_ones(D).mul_(m.w).exp_(),
    "by an index": lambda m, x: m.l(x) + x.new_zeros(D).index_add_(0, torch.tensor([0, 0, 1]), m.w[:3]),
    "filled": lambda m, x: m.l(x) * x.new_zeros(D).masked_fill_(torch.arange(D) > 1, m.k),
    "all of it": lambda m, x: m.l(x) * x.new_zeros(D).fill_(m.k),
    "like the batch": like_the_batch,
    "into a view": into_a_view,
    "behind a view": changed_behind_a_view,
    "set behind a view": set_behind_a_view,
    "by rows": by_rows,
    "copied, then changed": copied_then_changed,
    "and a number over that": a_number_set,
    "the same number wherever a mask is": lambda m, x: m.l(x).masked_scatter(x[:, :1] > 0, x.new_zeros(40)) * m.w,
    "into a view of a view": into_a_view_of_a_view,
}


@pytest.mark.parametrize("name", EXACT)
def test_parameters_are_written_into_constants(name):
    """From there on the constant derives from parameters, and the audit has no part in that."""
    check(net(EXACT[name]), (torch.randn(B, 3),), losses)


def class_token(m: Any, x: Tensor) -> Tensor:
    h = m.l(x)
    q = h.new_zeros(len(x), 3, D)
    q[:, 0] += m.w
    q[:, 1:] = h[:, None]
    return q


def scaled_then_written(m: Any, x: Tensor) -> Tensor:
    h = m.l(x)
    q = h.new_ones(len(x), D)
    q *= m.w
    q[:, 1:] = h[:, 1:]
    return q


def examples_beside_a_parameter(m: Any, x: Tensor) -> Tensor:
    q = x.new_zeros(len(x), 2, D)
    q[:, 0] = m.w
    q[:, 1].copy_(m.l(x))
    return q


def examples_onto_a_parameter(m: Any, x: Tensor) -> Tensor:
    q = m.w.expand(len(x), D).clone()
    q += m.l(x)
    return q


def masked(m: Any, x: Tensor) -> Tensor:
    q = m.w.expand(len(x), D).clone()
    q[m.l(x) > 0] = 0.0
    return q + m.l(x)


def a_number(m: Any, x: Tensor) -> Tensor:
    q = m.w * 1.0
    q.detach().exp()
    q[1] = 5.0
    return m.l(x) * q


def unsqueezed(m: Any, x: Tensor) -> Tensor:
    q = m.w * 1.0
    q.unsqueeze_(0)
    return m.l(x) * q * q.shape[0]


def transposed(m: Any, x: Tensor) -> Tensor:
    q = m.w.outer(m.w[:2])
    q.t_()
    return m.l(x) * q.shape[0]


def row_by_row(m: Any, x: Tensor) -> Tensor:
    table = x.new_zeros(3, D)
    for i in range(3):
        table[i].copy_(m.w * (i + 1))
    with torch.no_grad():
        size = table.norm()
    return m.l(x) @ (table / size).T


def by_a_number_in_a_view(m: Any, x: Tensor) -> Tensor:
    table = x.new_zeros(3, D)
    table[0] = m.w
    table[0][1] = 7.0
    return m.l(x) @ table.T * float(table.detach()[0, 1])


def a_view_taken_before(m: Any, x: Tensor) -> Tensor:
    table = x.new_zeros(3, D)
    turned = table.T
    table.add_(m.w)
    return m.l(x) @ turned


def copied_onto_a_parameter(m: Any, x: Tensor) -> Tensor:
    q = m.w.expand(len(x), D).clone()
    q.copy_(m.l(x))
    return q


CAREFUL: dict[str, Forward] = {
    function.__name__: function
    for function in (
        class_token,
        scaled_then_written,
        examples_beside_a_parameter,
        examples_onto_a_parameter,
        masked,
        a_number,
        unsqueezed,
        transposed,
        row_by_row,
        without_gradients,
        by_a_number_in_a_view,
        a_view_taken_before,
        copied_onto_a_parameter,
    )
}


@pytest.mark.parametrize("function", [row_by_row, by_rows, into_a_view, changed_behind_a_view, a_number_set])
def test_the_model_computes_what_it_does_by_itself(function):
    """Also from memory that is read without gradients."""
    model, x = net(function), torch.randn(B, 3).double()
    expected = model(x)
    with perex.attach(model, param_grads=False):
        assert torch.allclose(model(x), expected)


@pytest.mark.parametrize("name", CAREFUL)
def test_the_rest_is_exact_or_refused(name):
    exact_or_refused(net(CAREFUL[name]), (torch.randn(B, 3),), losses)


def sliced(m: Any, x: Tensor) -> Tensor:
    return m.l(x) * m.table[: (x[:, 0] > 0).sum()].sum(0)


def sliced_at_the_largest(m: Any, x: Tensor) -> Tensor:
    h = m.l(x)
    n = h.detach().sum(1).argmax()
    return h * m.table[n : n + 1] * m.w


def written_up_to_a_count(m: Any, x: Tensor) -> Tensor:
    t = x.new_zeros(25)
    t[: (x[:, 0] > 0).sum()] = 1.0
    return m.l(x) * t.sum()


def scattered(m: Any, x: Tensor) -> Tensor:
    h = m.l(x)
    return h.masked_scatter(h > 0, m.table) * m.w


def rolled_twice(m: Any, x: Tensor) -> Tensor:
    h = m.l(x)
    return h * h.roll((1, 1), (0, 0))


def a_view_that_gets_a_graph(m: Any, x: Tensor) -> Tensor:
    a = x.repeat(1, 4)[:, :D].contiguous()
    v = a.view(-1, len(x)).T
    a.mul_(m.w)
    return v * m.l(x)


@pytest.mark.parametrize("call", ["loss", "losses"])
@pytest.mark.parametrize(
    "function",
    [sliced, sliced_at_the_largest, written_up_to_a_count, scattered, rolled_twice, a_view_that_gets_a_graph],
)
def test_what_mixes_examples_is_refused(function, call):
    model = net(function)
    torch.manual_seed(1)
    with perex.attach(model) as px, pytest.raises(perex.PerexError):
        each = losses(model(torch.randn(B, 3).double()), torch.arange(B))
        px.backward(each) if call == "losses" else each.mean().backward()
        px.norms()


def test_rolled_there_and_back():
    check(net(lambda m, x: m.l(x).roll((1, 2, 1), (0, 1, 0)).roll((-2,), (0,)) * m.w), (torch.randn(B, 3),), losses)


@pytest.mark.parametrize("parameters", [1, D])
def test_prelu_of_one_number_an_example(parameters):
    model = nn.Sequential(nn.Linear(3, parameters), nn.Flatten(0) if parameters == 1 else nn.Identity(), nn.PReLU())
    check(scramble(model), (torch.randn(B, 3),), lambda out, index: out.reshape(len(index), -1).sin().sum(1))


def test_a_scalar_as_it_is_and_as_a_view():
    check(net(lambda m, x: m.l(x) * m.k.view(1) + m.k), (torch.randn(B, 3),), losses)


def test_parameters_that_are_computed_outside_are_refused():
    """Gradients would be of what was put there, and `clip_` would leave its sums on it."""
    model, x = nn.Linear(3, 2), torch.randn(B, 3)
    with perex.attach(model) as px:
        with pytest.raises(perex.AttachError, match="'weight' is a tensor computed from others"):
            torch.func.functional_call(model, {"weight": model.weight * 2}, (x,))
        px.backward(model(x).sum(1))
        assert len(px.norms()) == B


def test_the_oracle_sees_what_is_written():
    """The test of the test: without the parameter, the loop has other norms."""
    rows = [
        oracle.loop(lambda f=f: net(f), (torch.ones(B, 3).double(),), losses, batch_size=B, example=oracle.sliced())
        for f in (copied, lambda m, x: m.l(x))
    ]
    assert rows[0]["w"][0].any() and not rows[1]["w"][0].any()
