"""When norms may be read, what they then belong to, and which parameters they cover."""

from __future__ import annotations

import pytest
import torch
from oracle import (
    Loss,
    Way,
    assert_norms,
    check,
    exact_or_refused,
    loop,
    no_trace,
    projection,
    scramble,
    sliced,
)
from torch import Tensor, nn

import perex

B, D = 3, 4


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batch(size: int = B, seed: int = 1) -> Tensor:
    return torch.randn(size, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def losses(out: Tensor) -> Tensor:
    return projection()(out, torch.arange(len(out)))


def reference(model: nn.Module, x: Tensor, loss: Loss | None = None) -> dict[str, Tensor]:
    """Squared norms by parameter, from the loop, on a model to which nothing is attached."""
    grads = loop(lambda: model, (x,), loss or projection(), batch_size=len(x), example=sliced())
    model.zero_grad()
    return {n: torch.stack([g.square().sum() for g in rows]) for n, rows in grads.items()}


every_way = pytest.mark.parametrize("param_grads", [True, False])


# ------------------------------------------------------------------- stale or not


@every_way
def test_reading_too_early(param_grads):
    model, x = net(), batch()
    expected = reference(model, x)
    with perex.attach(model, param_grads=param_grads) as px:
        for read in (px.norms, px.squared_norms, lambda: px.norms(by="module")):
            with pytest.raises(perex.PerexError):
                read()
        out = model(x)
        with pytest.raises(perex.PerexError):
            px.norms()
        losses(out).mean().backward()
        assert_norms(px, expected)
        model(batch(seed=2))
        with pytest.raises(perex.PerexError):  # not the batch before
            px.norms()


@every_way
def test_every_backward_replaces_the_one_before(param_grads):
    model = net()
    with perex.attach(model, param_grads=param_grads) as px:
        for size, seed in [
            (3, 1),
            (3, 2),
            (5, 3),
            (1, 4),
            (2, 5),
        ]:  # the last batches of an epoch are smaller
            x = batch(size, seed)
            expected = reference(net(), x)
            losses(model(x)).mean().backward()
            assert_norms(px, expected)
            assert px.batch_size == size


@every_way
def test_same_graph_backwards_again(param_grads):
    model, x = net(), batch()
    expected = reference(model, x)
    doubled = {n: 4 * s for n, s in expected.items()}
    with perex.attach(model, param_grads=param_grads) as px:
        out = model(x)
        losses(out).mean().backward(retain_graph=True)
        assert_norms(px, expected)
        losses(out).mean().backward(retain_graph=True)
        assert_norms(px, expected)
        (2 * losses(out)).mean().backward()
        assert_norms(px, doubled)


def test_two_losses_of_one_forward():
    """One backward each, as with two heads: the second reading is of the second loss."""
    model, x = net(), batch()
    other = lambda out, index: out.square().sum(1) * (index + 1)  # noqa: E731
    first, second = reference(model, x), reference(model, x, loss=other)
    with perex.attach(model) as px:
        out = model(x)
        losses(out).mean().backward(retain_graph=True)
        assert_norms(px, first)
        other(out, torch.arange(B)).mean().backward()
        assert_norms(px, second)


@every_way
def test_a_forward_without_grad_in_between(param_grads):
    """Either the norms of the batch that was run backward, or an error; never the other batch's."""
    model, x = net(), batch()
    expected = reference(model, x)
    with perex.attach(model, param_grads=param_grads) as px:
        for context in (torch.no_grad, torch.inference_mode):
            losses(model(x)).mean().backward()
            with context():
                model(batch(5, 2))
            try:
                assert_norms(px, expected)
                assert px.batch_size == B
            except perex.PerexError:
                pass
            out = model(x)
            with context():
                model(batch(5, 2))
            try:
                losses(out).mean().backward()
                assert_norms(px, expected)
            except perex.PerexError:
                pass


def test_accumulated_gradients_are_those_without_perex():
    plain, model = net(), net()
    for seed in (1, 2):
        losses(plain(batch(seed=seed))).mean().backward()
    with perex.attach(model) as px:
        for seed in (1, 2):
            expected = reference(net(), batch(seed=seed))
            losses(model(batch(seed=seed))).mean().backward()
            assert_norms(px, expected)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@every_way
def test_training_steps_in_between(param_grads):
    """The optimiser writes into the parameters in place; the next reading is at the new values."""
    model, twin = net(), net()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    with perex.attach(model, param_grads=param_grads) as px:
        for seed in range(3):
            if not param_grads:
                for p in model.parameters():
                    p.grad = torch.ones_like(p)
            x = batch(seed=seed)
            twin.load_state_dict(model.state_dict())
            expected = reference(twin, x)
            losses(model(x)).mean().backward()
            optimiser.step()
            assert_norms(px, expected)


@every_way
def test_values_are_a_copy(param_grads):
    """What was read stays; writing into it changes nothing."""
    model, x = net(), batch()
    expected = reference(model, x)
    with perex.attach(model, param_grads=param_grads) as px:
        losses(model(x)).mean().backward()
        kept = px.norms()
        px.norms().zero_()
        next(iter(px.norms(by="parameter").values())).zero_()
        next(iter(px.squared_norms(by="module").values())).zero_()
        assert_norms(px, expected)
        losses(model(batch(5, 2))).mean().backward()
        torch.testing.assert_close(kept, sum(expected.values()).sqrt(), rtol=1e-9, atol=0)


def test_other_gradients_do_not_count():
    """`autograd.grad` with respect to the input is no backward of the model's parameters."""
    model, x = net(), batch().requires_grad_()
    expected = reference(model, x.detach())
    with perex.attach(model) as px:
        out = model(x)
        torch.autograd.grad(out.sum(), x, retain_graph=True)
        losses(out).mean().backward()
        try:
            assert_norms(px, expected)
        except perex.PerexError:
            pass


# ------------------------------------------------------------------- losses and their weights


def test_one_bad_input_affects_its_own_norm_only():
    x = batch()
    x[1, 2] = float("nan")
    check(net(), (x,))


@every_way
def test_reduction_by_sum(param_grads):
    model, x = net(), batch()
    expected = reference(model, x)
    with perex.attach(model, loss_reduction="sum", param_grads=param_grads) as px:
        losses(model(x)).sum().backward()
        assert_norms(px, expected)


@every_way
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_need_no_reduction(param_grads, reduction):
    model, x = net(), batch()
    expected = reference(model, x)
    with perex.attach(model, loss_reduction=reduction, param_grads=param_grads) as px:
        px.backward(losses(model(x)))
        assert_norms(px, expected)


# ------------------------------------------------------------------- which parameters

SELECTIONS = {
    "name": ["2.weight"],
    "names": ["0.bias", "4.weight"],
    "glob": ["2.*"],
    "globs": ["*.bias", "0.*"],
    "predicate": lambda name, p: p.dim() == 1,
    "predicate of names": lambda name, p: name.startswith("4"),
    "everything": ["*"],
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_selection(case):
    check(net(), (batch(),), params=SELECTIONS[case])


@every_way
def test_frozen_and_unfrozen_between_batches(param_grads):
    """Looked at afresh in each forward; what is frozen is left out, or zero."""
    model, twin = net(), net()
    with perex.attach(model, param_grads=param_grads) as px:
        for frozen in ("", "2.weight", "0", "", "4.bias"):
            for name, p in [*model.named_parameters(), *twin.named_parameters()]:
                p.requires_grad_(not (frozen and name.startswith(frozen)))
            x = batch(seed=len(frozen))
            expected = reference(twin, x)
            losses(model(x)).mean().backward()
            torch.testing.assert_close(px.norms(), sum(expected.values()).sqrt(), rtol=1e-9, atol=0)
            for name, found in px.squared_norms(by="parameter").items():
                torch.testing.assert_close(found, expected.get(name, torch.zeros(B).double()), rtol=1e-9, atol=0)


def test_frozen_when_attached_and_unfrozen_later():
    model, x = net(), batch()
    model[2].requires_grad_(False)
    with perex.attach(model) as px:
        losses(model(x)).mean().backward()
        model[2].requires_grad_(True)
        expected = reference(net(), x)
        losses(model(x)).mean().backward()
        assert_norms(px, expected)


class Branches(nn.Module):
    """One of two heads is left out, from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(D, D), nn.Linear(D, 2), nn.Linear(D, 2)
        self.use = "left"

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.use)(self.trunk(x).tanh())


@every_way
def test_a_module_left_out_of_this_batch_has_zeros(param_grads):
    model, twin = scramble(Branches()).double(), scramble(Branches()).double()
    with perex.attach(model, param_grads=param_grads) as px:
        for model.use in ("left", "right", "right", "left"):
            twin.use = model.use
            expected = reference(twin, batch())
            losses(model(batch())).mean().backward()
            assert_norms(px, expected)
            other = "right" if model.use == "left" else "left"
            assert (px.norms(by="module")[other] == 0).all()


def test_switching_between_training_and_eval():
    model = nn.Sequential(nn.Linear(D, 5), nn.Dropout(0.5), nn.Linear(5, 2)).double().eval()
    expected = reference(model, batch())
    model.train()
    with perex.attach(model) as px:
        losses(model(batch())).mean().backward()
        model.eval()
        losses(model(batch())).mean().backward()
        assert_norms(px, expected)


# ------------------------------------------------------------------- two forwards, one backward


@every_way
def test_two_forwards_are_ambiguous(param_grads):
    """Further examples, or the same ones again? The message names both ways out."""
    model = net()
    with perex.attach(model, param_grads=param_grads) as px:
        with pytest.raises(perex.PerexError, match=r"(?is)backward\(losses\)"):
            first, second = model(batch()), model(batch(seed=2))
            (losses(first) + losses(second)).mean().backward()
            px.norms()
    with perex.attach(model, param_grads=param_grads) as px:
        losses(model(batch())).mean().backward()
        assert px.norms().shape == (B,)


@every_way
@pytest.mark.parametrize("told", ["losses", "forwards"])
def test_two_forwards_of_further_examples(told, param_grads):
    model, twin = net(), net()
    rows = [reference(twin, batch(seed=s)) for s in (1, 2)]
    expected = {n: torch.cat([row[n] for row in rows]) for n in rows[0]}
    relation = "further" if told == "forwards" else None
    with perex.attach(model, param_grads=param_grads, forwards=relation, loss_reduction="sum") as px:
        first, second = model(batch()), model(batch(seed=2))
        each = torch.cat([losses(first), losses(second)])
        px.backward(each) if told == "losses" else each.sum().backward()
        assert_norms(px, expected)


@every_way
@pytest.mark.parametrize("told", ["losses", "forwards"])
def test_two_forwards_of_the_same_examples(told, param_grads):
    """A siamese loss: example i is in both forwards, and its gradient is the sum."""
    model, x, y = net(), batch(seed=1), batch(seed=2)
    rows: list[dict[str, Tensor]] = []
    for i in range(B):
        value = (model(x[i : i + 1]) * model(y[i : i + 1])).sum()
        grads = torch.autograd.grad(value, list(model.parameters()))
        names = [n for n, _ in model.named_parameters()]
        rows.append({n: g.square().sum() for n, g in zip(names, grads, strict=True)})
    expected = {n: torch.stack([row[n] for row in rows]) for n in rows[0]}
    relation = "same" if told == "forwards" else None
    with perex.attach(model, param_grads=param_grads, forwards=relation) as px:
        each = (model(x) * model(y)).sum(1)
        px.backward(each) if told == "losses" else each.mean().backward()
        assert_norms(px, expected)


def test_a_forward_whose_backward_never_came():
    """An aborted step must not be taken for the first of two forwards, or else it must be said."""
    model, x = net(), batch()
    expected = reference(model, x)
    with perex.attach(model) as px:
        model(batch(seed=2))  # the result is dropped at once
        try:
            losses(model(x)).mean().backward()
            assert_norms(px, expected)
        except perex.PerexError as error:
            assert str(error)


def test_a_submodule_called_by_itself():
    """Outside the forward of the attached model: exact, or refused."""
    model, x = net(), batch()
    expected = reference(model, x)
    for param_grads in (True, False):
        with perex.attach(model, param_grads=param_grads) as px:
            try:
                out = x
                for layer in model:
                    out = layer(out)
                losses(out).mean().backward()
                assert_norms(px, expected)
            except perex.PerexError as error:
                assert str(error)


# ------------------------------------------------------------------- sizes


def test_one_example():
    check(net(), (batch(1),))


def test_no_example_is_empty_or_refused():
    model = net()
    for param_grads in (True, False):
        try:
            with perex.attach(model, loss_reduction="sum", param_grads=param_grads) as px:
                model(batch(0)).sum().backward()
                assert px.norms().shape == (0,)
        except perex.PerexError as error:
            assert str(error)


def test_batch_on_the_second_axis():
    x = torch.randn(5, B, D)
    for way in (Way("loss", "mean", True), Way("losses", "mean", False)):
        check(net(), (x,), batch_dim=1, ways=[way])


@every_way
def test_detaching_keeps_what_was_read_and_attaching_again_starts_anew(param_grads):
    model, x = net(), batch()
    expected = reference(model, x)
    with no_trace(model):
        px = perex.attach(model, param_grads=param_grads)
        losses(model(x)).mean().backward()
        px.detach()
        px.detach()  # twice is not an error
        assert_norms(px, expected)
        again = perex.attach(model, param_grads=param_grads)
        with pytest.raises(perex.PerexError):
            again.norms()
        losses(model(batch(5))).mean().backward()
        assert again.norms().shape == (5,)
        assert_norms(px, expected)
        again.detach()
        for p in model.parameters():
            p.grad = None


def test_loss_on_a_subset_of_the_batch_has_zeros_elsewhere():
    """Ignored examples: their losses are not in the mean, and their gradients are zero."""
    model, x = net(), batch()
    expected = reference(model, x)
    keep = torch.tensor([1.0, 0.0, 1.0]).double()
    for n in expected:
        expected[n] = expected[n] * keep
    with perex.attach(model, loss_reduction="sum") as px:
        losses(model(x))[keep > 0].sum().backward()
        assert_norms(px, expected)


def test_exact_or_refused_says_which():
    """The helper itself: a model that perex handles is reported as exact."""
    assert exact_or_refused(net(), (batch(),)) == "exact"
