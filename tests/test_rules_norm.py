"""Normalisation layers and PReLU, with and without weight and bias; batch norm where examples do not meet."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import PLACES, Bare, check, grid, place, refused
from torch import nn

import perex

batches = st.integers(1, 3)
places = st.sampled_from(PLACES)
lengths = st.integers(1, 4)
BATCH_NORM = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


@grid(50)
@given(
    batch=batches,
    middle=st.lists(st.integers(0, 3), max_size=2),
    shape=st.lists(lengths, min_size=1, max_size=3),
    affine=st.booleans(),
    bias=st.booleans(),
    where=places,
)
def test_layer_norm(batch, middle, shape, affine, bias, where):
    layer = nn.LayerNorm(shape, elementwise_affine=affine, bias=bias)
    model, inputs = place(nn.Sequential(layer, nn.PReLU()), where, torch.randn(batch, *middle, *shape))
    check(model, inputs)


@grid(40)
@given(
    batch=batches,
    middle=st.lists(st.integers(0, 3), max_size=2),
    shape=st.lists(lengths, min_size=1, max_size=3),
    affine=st.booleans(),
    where=places,
)
def test_rms_norm(batch, middle, shape, affine, where):
    layer = nn.RMSNorm(shape, elementwise_affine=affine)
    model, inputs = place(nn.Sequential(layer, nn.PReLU()), where, torch.randn(batch, *middle, *shape))
    check(model, inputs)


@grid(40)
@given(
    batch=batches,
    groups=st.integers(1, 3),
    per_group=st.integers(1, 2),
    spatial=st.lists(lengths, max_size=3),
    affine=st.booleans(),
    where=places,
)
def test_group_norm(batch, groups, per_group, spatial, affine, where):
    channels = groups * per_group
    layer = nn.GroupNorm(groups, channels, affine=affine)
    model, inputs = place(nn.Sequential(layer, nn.PReLU()), where, torch.randn(batch, channels, 2, *spatial))
    check(model, inputs)


@grid(50)
@given(
    nd=st.integers(1, 3),
    batch=batches,
    channels=st.integers(1, 3),
    affine=st.booleans(),
    track=st.booleans(),
    training=st.booleans(),
    where=places,
)
def test_instance_norm(nd, batch, channels, affine, track, training, where):
    layer = INSTANCE_NORM[nd](channels, affine=affine, track_running_stats=track)
    model, inputs = place(nn.Sequential(layer, nn.PReLU()), where, torch.randn(batch, channels, *[3] * nd))
    check(model.train(training), inputs)


@grid(40)
@given(
    batch=batches,
    channels=st.integers(1, 3),
    one=st.booleans(),
    spatial=st.lists(st.integers(0, 3), max_size=3),
    where=places,
)
def test_prelu(batch, channels, one, spatial, where):
    check(*place(nn.PReLU(1 if one else channels), where, torch.randn(batch, channels, *spatial)))


@grid(50)
@given(nd=st.integers(0, 3), batch=batches, channels=st.integers(1, 3), affine=st.booleans(), where=places)
def test_batch_norm_in_eval_mode(nd, batch, channels, affine, where):
    layer = BATCH_NORM[nd](channels, affine=affine)
    model, inputs = place(nn.Sequential(layer, nn.PReLU()), where, torch.randn(batch, channels, *[2] * nd))
    check(model.eval(), inputs)


def net(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), norm, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2))


MIXING = {
    "training": net(nn.BatchNorm2d(3)),
    "not affine": net(nn.BatchNorm2d(3, affine=False)),
    "frozen": net(nn.BatchNorm2d(3).requires_grad_(False)),
    "no running statistics": net(nn.BatchNorm2d(3, track_running_stats=False)).eval(),  # batch statistics in eval too
    "momentum 0": net(nn.BatchNorm2d(3, momentum=0.0)),
    "synchronised": net(nn.SyncBatchNorm(3)),
    "first": nn.Sequential(nn.Identity(), nn.BatchNorm2d(2, affine=False), nn.Conv2d(2, 3, 3)),
    "last": nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False)),
}


@pytest.mark.parametrize("case", MIXING)
def test_batch_norm_on_batch_statistics_is_refused_and_named(case):
    """Whether or not its own parameters are tracked: every norm upstream of it would be wrong."""
    refused(MIXING[case], (torch.randn(3, 2, 4, 4),), match=r"(?s)\b1\b.*eval|eval.*\b1\b")


def test_batch_norm_upstream_of_what_is_selected_is_refused():
    """What the selected layers see of one example depends on the others."""
    refused(net(nn.BatchNorm2d(3)), (torch.randn(3, 2, 4, 4),), params=["4.*"])


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4).eval(),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.LayerNorm([4, 3, 3]),
    ],
    ids=repr,
)
def test_one_of_two_parameters_frozen(norm, frozen):
    getattr(norm, frozen).requires_grad_(False)
    check(*place(norm, "later+inplace", torch.randn(3, 4, 3, 3)))


def test_constant_input():
    """Rows without variance: gradients of the order of 1/sqrt(eps)."""
    x = torch.randn(3, 1, 1).expand(3, 4, 5).contiguous()
    for layer in (nn.LayerNorm(5), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.RMSNorm(5)):
        check(*place(layer, "later", x))


@pytest.mark.parametrize("n, c, b", [(3, 3, 4), (3, 3, 3), (2, 3, 4), (1, 2, 3)])
def test_batch_norm_where_the_batch_is_in_the_last_dimension(n, c, b):
    """`(N, C, B)`: the channels are in dimension 1, and the examples where a length was."""
    model = Bare(lambda m, x: m.norm(x.permute(1, 2, 0)).permute(2, 0, 1).sin())
    model.norm = nn.BatchNorm1d(c)
    model.norm.running_mean.normal_(), model.norm.running_var.uniform_(0.5, 2)
    check(model.double().eval(), (torch.randn(b, n, c),))


@pytest.mark.parametrize("slopes", [1, 3])
def test_a_slope_for_what_is_no_number(slopes):
    """torch's gradient of the slope is NaN there."""
    model, x = nn.Sequential(nn.PReLU(slopes)).double(), torch.randn(4, 3, dtype=torch.float64)
    x[1, 2] = torch.nan
    with perex.attach(model) as px:
        px.backward(model(x).sum(1))
    expected = [torch.autograd.grad(model(x[b : b + 1]).sum(), model[0].weight)[0].norm() for b in range(4)]
    torch.testing.assert_close(px.norms(), torch.stack(expected), equal_nan=True)
    assert px.norms().isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("options", [{}, {"affine": False}])
def test_batch_norm_of_no_examples(options):
    """torch's backward of it divides by zero, in a way that ends the process, if it is asked for no channels."""
    model = nn.Sequential(nn.BatchNorm2d(4, **options), nn.Flatten(), nn.Linear(16, 2)).eval()
    with perex.attach(model, param_grads=False) as px:
        for _ in range(3):
            px.backward(model(torch.randn(0, 4, 2, 2)).square().sum(1))
            assert px.norms().shape == (0,)


@pytest.mark.parametrize("layer", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("shape", [(32, 56, 56), (768,)])
def test_long_rows_far_from_zero_lose_no_digits(layer, shape):
    """In float32: sums over whole rows, and differences from a mean that is large beside them."""
    torch.manual_seed(0)
    x = torch.stack([torch.randn(shape).relu(), 1000.1 + torch.randn(shape), torch.full(shape, 3.7)])[:, None]
    model = layer(shape, eps=1e-5)

    def losses(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).sin().flatten(1).sum(1)

    with perex.attach(model, param_grads=False) as px:
        px.backward(losses(model, x))
    found, model, x = px.norms(by="parameter")["weight"].double(), model.double(), x.double()
    for b in range(len(x)):
        (grad,) = torch.autograd.grad(losses(model, x[b : b + 1]).sum(), [model.weight])
        assert abs(found[b] - grad.norm()) <= 1e-5 * grad.norm() + 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_of_halves_has_the_eps_that_torch_takes(dtype):
    """Of numbers so small that it decides."""
    torch.manual_seed(0)
    model, x = nn.RMSNorm(16).to(dtype), (0.02 * torch.randn(3, 5, 16)).to(dtype)
    with perex.attach(model) as px:
        px.backward(model(x).float().square().sum((1, 2)))
    for b in range(len(x)):
        (grad,) = torch.autograd.grad(model(x[b : b + 1]).float().square().sum(), [model.weight])
        assert abs(px.norms()[b] / grad.float().norm() - 1) < 0.02
