"""What perex turns down: arguments that make no sense, and examples that have no gradient of their own.

Every refusal is a `PerexError` that names the argument or the module, and leaves nothing behind.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from oracle import WAYS, Bare, no_trace, projection, refused, scramble
from torch import Tensor, nn

import perex

B, D = 3, 4


def net() -> nn.Module:
    return scramble(nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 2)))


x = torch.randn(B, D)

# ------------------------------------------------------------------- arguments

ARGUMENTS = {  # name: (keyword arguments of attach, what the message mentions)
    "no name matches": ({"params": ["nope"]}, "nope"),
    "no glob matches": ({"params": ["layer4.*"]}, r"layer4"),
    "one of two does not match": ({"params": ["0.*", "fc.weight"]}, r"fc\.weight"),
    "no parameter is chosen": ({"params": lambda name, p: False}, "params"),
    "empty list": ({"params": []}, "params"),
    "number for params": ({"params": 3}, "params"),
    "no reduction": ({"loss_reduction": "none"}, "loss_reduction"),
    "unknown reduction": ({"loss_reduction": "batchmean"}, "loss_reduction"),
    "reduction is None": ({"loss_reduction": None}, "loss_reduction"),
    "batch_dim is no number": ({"batch_dim": "first"}, "batch_dim"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_argument_of_attach(case):
    arguments, mentioned = ARGUMENTS[case]
    model = net()
    with no_trace(model):
        with pytest.raises(perex.PerexError, match=mentioned):
            perex.attach(model, **arguments)


@pytest.mark.parametrize("by", ["layer", "", "parameters", 3])
def test_unknown_grouping(by):
    model = net()
    with perex.attach(model) as px:
        model(x).sum(1).mean().backward()
        for read in (px.norms, px.squared_norms):
            with pytest.raises(perex.PerexError, match="by"):
                read(by=by)


def test_not_a_module():
    for thing in (lambda x: x, None, "model", torch.randn(3), nn.Linear, net().forward):
        with pytest.raises(perex.PerexError):
            perex.attach(thing)


def test_nothing_to_track():
    for model in (nn.ReLU(), net().requires_grad_(False)):
        with no_trace(model), pytest.raises(perex.PerexError):
            perex.attach(model)


def test_batch_axis_that_is_not_there():
    refused(net(), (x,), batch_dim=5)


LOSSES = {
    "reduced": lambda each: each.mean(),
    "one column": lambda each: each[:, None],
    "one too many": lambda each: torch.cat([each, each[:1]]),
    "one too few": lambda each: each[1:],
    "per element": lambda each: each[:, None].expand(-1, 2),
    "none": lambda each: each[:0],
    "integers": lambda each: each.long(),
    "detached": lambda each: each.detach(),
    "a number": lambda each: 3.0,
    "a list": lambda each: list(each),
    "None": lambda each: None,
}


@pytest.mark.parametrize("param_grads", [True, False])
@pytest.mark.parametrize("case", LOSSES)
def test_losses_that_are_not_one_for_each_example(case, param_grads):
    model = net()
    with no_trace(model), perex.attach(model, param_grads=param_grads) as px:
        with pytest.raises(perex.PerexError, match="(?i)loss"):
            px.backward(LOSSES[case](model(x).sum(1)))
        px.backward(model(x).sum(1))  # and then the right ones
        assert px.norms().shape == (B,)


def test_losses_before_a_forward():
    model = net()
    with perex.attach(model) as px, pytest.raises(perex.PerexError):
        px.backward(torch.randn(3, requires_grad=True))


# ------------------------------------------------------------------- models that cannot be attached to


def test_attached_already():
    model = nn.Sequential(net(), net())
    for first, second in [(model, model), (model, model[0]), (model[1], model), (model, model[1][0])]:
        with no_trace(model), perex.attach(first) as px:
            with pytest.raises(perex.PerexError, match="(?i)attach"):
                perex.attach(second)
            px.detach()
        with perex.attach(second):
            pass


def test_a_refused_second_attachment_leaves_the_first_working():
    model = net()
    with perex.attach(model) as px:
        with pytest.raises(perex.PerexError):
            perex.attach(model[0])
        model(x).sum(1).mean().backward()
        assert px.norms().shape == (B,)


def test_siblings_can_be_attached_at_once():
    model = nn.Sequential(net(), nn.Linear(2, 2))
    with perex.attach(model[0]) as one, perex.attach(model[1]) as two:
        model(x).sum(1).mean().backward()
        assert one.norms().shape == two.norms().shape == (B,)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_model():
    for scripted in (torch.jit.script(net()), torch.jit.trace(net(), x)):
        for model in (scripted, nn.Sequential(nn.Linear(D, D), scripted)):
            with pytest.raises(perex.PerexError, match="(?i)script"):
                perex.attach(model)


def test_data_parallel():
    for model in (nn.DataParallel(net()), nn.Sequential(nn.DataParallel(net()))):
        with pytest.raises(perex.PerexError, match="DataParallel"):
            perex.attach(model)


# ------------------------------------------------------------------- examples that meet

w = {"w": "44", "a": "4"}
MIXING = {
    "mean over the batch": lambda m, x: (x - x.mean(0)) @ m.w,
    "mean over the batch, downstream": lambda m, x: (h := x @ m.w) - h.mean(0),
    "mean over the batch, detached": lambda m, x: (h := x @ m.w) - h.mean(0).detach(),
    "scaled by the largest": lambda m, x: (h := x @ m.w) / h.abs().max(),
    "scaled by the largest, detached": lambda m, x: (h := x @ m.w) / h.abs().max().detach(),
    "scaled by the input's norm": lambda m, x: x / x.norm() @ m.w,
    "standardised": lambda m, x: ((h := x @ m.w) - h.mean()) / h.std(),
    "softmax over the batch": lambda m, x: (x @ m.w).softmax(0),
    "sum so far": lambda m, x: (x @ m.w).cumsum(0),
    "next to each other": lambda m, x: (h := x @ m.w) + h.roll(1, 0),
    "the other way round": lambda m, x: (h := x @ m.w) * h.flip(0),
    "sorted": lambda m, x: (x @ m.w).sort(0).values,
    "attention between examples": lambda m, x: (x @ m.w @ x.t()).softmax(1) @ x,
    "einsum over the batch": lambda m, x: torch.einsum("bd,cd->bc", x @ m.w, x),
    "product with the batch": lambda m, x: (h := x @ m.w) @ (x.t() @ h),
    "covariance": lambda m, x: x @ (x.t() @ x) @ m.w,
    "distances between examples": lambda m, x: torch.cdist(x @ m.w, x),
    "convolution over the batch": lambda m, x: F.conv1d((x @ m.w).t()[:, None], m.a.view(1, 1, 4)[..., :3],
                                                         padding=1)[:, 0].t(),
    "functional batch norm": lambda m, x: F.batch_norm(x @ m.w, None, None, training=True),
    "variance as a scale": lambda m, x: (x @ m.w) * x.var(0),
    "norm over the batch": lambda m, x: F.normalize(x @ m.w, dim=0),
    "layer norm over the batch": lambda m, x: nn.functional.layer_norm((x @ m.w).t(), (len(x),)).t(),
    "batch folded into features": lambda m, x: (x.reshape(1, -1) * 2).softmax(1).view_as(x) @ m.w,
    "mixup": lambda m, x: (0.7 * x + 0.3 * x[[1, 2, 0]]) @ m.w,
    "gate by the first example": lambda m, x: (x @ m.w) * x[0],
    "written across": lambda m, x: written_across(m, x),
    "triangular": lambda m, x: torch.ones(len(x), len(x)).to(x).tril() @ (x @ m.w),
    "number taken out": lambda m, x: (x @ m.w) * x.detach().sum().item(),
    "group of experts by capacity": lambda m, x: (x @ m.w) * (x[:, 0] >= x[:, 0].topk(2).values[-1])[:, None],
}  # fmt: skip


def written_across(m: nn.Module, x: Tensor) -> Tensor:
    h = x @ m.w
    out = h * 1
    out[1:] += h[:-1]
    return out


@pytest.mark.parametrize("case", MIXING)
def test_examples_that_meet(case):
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), Bare(MIXING[case], **w))
    refused(model, (x,))


@pytest.mark.parametrize("case", ["mean over the batch", "scaled by the input's norm", "covariance", "mixup"])
def test_examples_that_meet_in_the_inputs(case):
    """Upstream of every parameter."""
    refused(Bare(MIXING[case], **w), (x,))


MIXING_LOSSES = {
    "contrastive": lambda out, index: torch.logsumexp(out @ out.t(), 1) - (out * out).sum(1),
    "batch mean in the loss": lambda out, index: (out - out.mean(0)).square().sum(1),
    "largest in the batch": lambda out, index: out.sum(1) / out.abs().max(),
    "ranking": lambda out, index: (out[:, :1] - out[:, 0]).relu().sum(1),
}


@pytest.mark.parametrize("case", MIXING_LOSSES)
def test_losses_that_mix_examples(case):
    """Refused where perex is handed the losses one by one; in `loss.backward()` nobody can tell."""
    model = net()
    for param_grads in (True, False):
        with no_trace(model), pytest.raises(perex.PerexError):
            with perex.attach(model, param_grads=param_grads) as px:
                px.backward(MIXING_LOSSES[case](model(x), torch.arange(B)))
                px.norms()


# ------------------------------------------------------------------- gradients that perex did not see


@pytest.mark.parametrize("param_grads", [True, False])
@pytest.mark.parametrize("call", ["loss", "losses"])
def test_a_parameter_used_in_the_loss(call, param_grads):
    """Weight decay in the loss belongs to no example, or to each: refused by name, or exact."""
    model = net().double()
    data = x.double()
    with no_trace(model):
        try:
            with perex.attach(model, param_grads=param_grads) as px:
                each = projection()(model(data), torch.arange(B)) + model[2].weight.square().sum()
                px.backward(each) if call == "losses" else each.mean().backward()
                found = px.norms(by="parameter")["2.weight"]
        except perex.PerexError as error:
            assert "2.weight" in str(error) or "2" in re.findall(r"\w+", str(error))
            return
    for i in range(B):
        value = projection()(model(data[i : i + 1]), torch.tensor([i])) + model[2].weight.square().sum()
        grad = torch.autograd.grad(value.sum(), model[2].weight)[0]
        torch.testing.assert_close(found[i], grad.norm(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("param_grads", [True, False])
def test_a_layer_used_in_the_loss(param_grads):
    """Its forward is not part of the model's: refused, or exact."""
    model, data = net().double(), x.double()
    model.add_module("head", nn.Linear(2, 2).double())
    expected = []
    for i in range(B):
        value = (model(data[i : i + 1]) * model.head(torch.ones(1, 2).double())).sum()
        grads = torch.autograd.grad(value, list(model.parameters()))
        expected.append(torch.stack([g.square().sum() for g in grads]).sum().sqrt())
    with no_trace(model):
        try:
            with perex.attach(model, param_grads=param_grads) as px:
                (model(data) * model.head(torch.ones(1, 2).double())).sum(1).mean().backward()
                torch.testing.assert_close(px.norms(), torch.stack(expected), rtol=1e-9, atol=0)
        except perex.PerexError as error:
            assert "head" in str(error)


def test_refusals_name_the_module():
    inner = nn.Sequential(nn.Linear(D, D), Bare(MIXING["mean over the batch"], **w))
    model = nn.Sequential()
    model.add_module("outer", nn.Sequential(nn.Tanh(), inner))
    refused(model, (x,), match=r"outer\.1\.1")


def test_a_refusal_does_not_spoil_the_next_batch():
    """The model is usable, and perex still right, after an error in the middle of a forward."""
    model = Bare(lambda m, x, mix: x @ m.w - (x @ m.w).mean(0) if mix else x @ m.w, w="44")
    for way in WAYS:
        with perex.attach(model, loss_reduction=way.reduction, param_grads=way.param_grads) as px:
            with pytest.raises(perex.PerexError):
                losses = model(x, True).sum(1)
                px.backward(losses) if way.call == "losses" else losses.mean().backward()
                px.norms()
            losses = model(x, False).sum(1)
            px.backward(losses) if way.call == "losses" else getattr(losses, way.reduction)().backward()
            torch.testing.assert_close(px.norms(), x.norm(dim=1) * 2, rtol=1e-5, atol=0)
