"""Convolutions and transposed convolutions in one, two and three dimensions, with every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import PLACES, check, grid, place
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import perex
from perex.kernels import blocks, convolution, outer, pixels, sums
from perex.kernels.geometry import Geometry, weight_gradient

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
FORMAT = {2: torch.channels_last, 3: torch.channels_last_3d}


@st.composite
def common(draw: st.DrawFn, nd: int) -> tuple[dict[str, Any], list[int]]:
    """Options that both kinds share, and what to add to the least possible spatial sizes."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    options = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": draw(st.tuples(*[st.integers(1, 3)] * nd)),
        "dilation": draw(st.tuples(*[st.integers(1, 2)] * nd)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    return options, draw(st.lists(st.integers(0, 3), min_size=nd, max_size=nd))


@st.composite
def conv(draw: st.DrawFn, nd: int) -> tuple[dict[str, Any], list[int]]:
    options, extra = draw(common(nd))
    reach = [d * (k - 1) for d, k in zip(options["dilation"], options["kernel_size"], strict=True)]
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(*[st.integers(0, 2)] * nd)))
    stride = (1,) * nd if padding == "same" else draw(st.tuples(*[st.integers(1, 3)] * nd))
    options |= {
        "padding": padding,
        "stride": stride,
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }
    return options, [max(r, 2) + 1 + e for r, e in zip(reach, extra, strict=True)]


@st.composite
def transposed(draw: st.DrawFn, nd: int) -> tuple[dict[str, Any], list[int]]:
    options, extra = draw(common(nd))
    options |= {"stride": draw(st.tuples(*[st.integers(1, 3)] * nd))}
    larger = [max(s, d) for s, d in zip(options["stride"], options["dilation"], strict=True)]
    options |= {"output_padding": tuple(draw(st.integers(0, n - 1)) for n in larger)}
    reach = [d * (k - 1) for d, k in zip(options["dilation"], options["kernel_size"], strict=True)]
    options |= {"padding": tuple(draw(st.integers(0, min(2, r // 2))) for r in reach)}
    return options, [1 + e for e in extra]


def image(batch: int, options: dict[str, Any], spatial: list[int], last: bool) -> Tensor:
    x = torch.randn(batch, options["in_channels"], *spatial)
    return x.to(memory_format=FORMAT[len(spatial)]) if last and len(spatial) in FORMAT else x


batches = st.integers(1, 3)
places = st.sampled_from(PLACES)


@pytest.mark.parametrize("nd", CONV)
def test_conv(nd):
    @grid(50)
    @given(case=conv(nd), batch=batches, channels_last=st.booleans(), where=places)
    def drawn(case, batch, channels_last, where):
        options, spatial = case
        layer = CONV[nd](**options)
        if channels_last and nd in FORMAT:
            layer.to(memory_format=FORMAT[nd])
        check(*place(layer, where, image(batch, options, spatial, channels_last)))

    drawn()


@pytest.mark.parametrize("nd", TRANSPOSED)
def test_transposed_conv(nd):
    @grid(40)
    @given(case=transposed(nd), batch=batches, channels_last=st.booleans(), where=places)
    def drawn(case, batch, channels_last, where):
        options, spatial = case
        check(*place(TRANSPOSED[nd](**options), where, image(batch, options, spatial, channels_last)))

    drawn()


@pytest.mark.parametrize("nd", CONV)
@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise(nd, multiplier):
    layer = CONV[nd](4, 4 * multiplier, 3, padding=1, groups=4)
    check(*place(layer, "later+inplace", torch.randn(3, 4, *[4] * nd)))


class ToSize(nn.Module):
    """A transposed convolution told its output size at the call."""

    def __init__(self, nd: int):
        super().__init__()
        self.up = TRANSPOSED[nd](2, 3, 3, stride=2)
        self.size = [8] * nd

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, output_size=self.size)


@pytest.mark.parametrize("nd", TRANSPOSED)
def test_transposed_conv_with_an_output_size(nd):
    check(*place(ToSize(nd), "later", torch.randn(2, 2, *[3] * nd)))


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv1d(2, 3, 3, padding=1), (2, 2, 4)),
        (nn.Conv2d(3, 4, 3), (3, 3, 3, 3)),  # batch, channels and sides all of one size
        (nn.Conv2d(3, 3, 1), (3, 3, 3, 3)),
        (nn.Conv2d(1, 8, 5, stride=4), (2, 1, 21, 21)),  # many pixels, few channels
        (nn.Conv2d(24, 24, 3, padding=1), (2, 24, 2, 2)),  # few pixels, many channels
        (nn.Conv2d(4, 4, (1, 3), padding="same", padding_mode="circular"), (2, 4, 5, 5)),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=2, stride=2), (2, 4, 7, 7)),
        (nn.Conv1d(2, 2, 4, padding="same", dilation=3, padding_mode="replicate"), (2, 2, 11)),
    ],
    ids=str,
)
def test_particular_shapes(layer, shape):
    for where in PLACES:
        check(*place(layer, where, torch.randn(shape)))


def test_no_example():
    layer = nn.Conv2d(2, 3, 3)
    with perex.attach(layer, loss_reduction="sum") as px:
        layer(torch.randn(0, 2, 4, 4)).sum().backward()
    assert px.norms().shape == (0,)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("layer", [nn.Conv2d(2, 3, 2), nn.ConvTranspose2d(2, 3, 2)], ids=repr)
def test_one_of_two_parameters_frozen(layer, frozen):
    getattr(layer, frozen).requires_grad_(False)
    check(*place(layer, "later", torch.randn(3, 2, 4, 4)))


# Ways to the norms, beside one call for each example


@st.composite
def operands(draw: st.DrawFn, nd: int) -> tuple[Tensor, Tensor, Geometry]:
    """Several images an example, output gradients and a geometry, with any options that fit together."""
    turned = draw(st.booleans())
    options, extra = draw(transposed(nd) if turned else conv(nd))
    if options.get("padding") in ("same", "valid"):
        options["padding"] = (0,) * nd
    options.pop("padding_mode", None)
    layer = (TRANSPOSED if turned else CONV)[nd](**options).double()
    batch, rows = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    longer = draw(st.integers(0, 6)) if nd < 3 else 0
    x = torch.randn(batch, rows, layer.in_channels, *[size + longer for size in extra], dtype=torch.float64)
    out = layer(x.flatten(0, 1)).detach()
    geometry = Geometry(
        layer.weight.shape, layer.stride, layer.padding, layer.dilation, turned, layer.output_padding, layer.groups
    )  # fmt: skip
    return x, torch.randn_like(out).unflatten(0, (batch, rows)), geometry


@pytest.mark.parametrize("nd", CONV)
@pytest.mark.parametrize("shortest", [3, 64], ids=lambda shortest: f"pieces of {shortest}")
def test_all_ways_to_the_norm(nd, shortest, monkeypatch):
    monkeypatch.setattr(outer, "SHORTEST", shortest)

    @grid(60)
    @given(case=operands(nd))
    def drawn(case):
        x, grads, geometry = case
        expected = convolution.call_per_example(*case)
        plans = convolution.NORMS.plans(x.shape, grads.shape, geometry)
        assert {"unfolded", "pixel Gram"} < plans.keys()
        for name in plans:
            torch.testing.assert_close(convolution.NORMS.ways[name].run(*case), expected, rtol=1e-10, atol=0)
        found, sizes = pixels.inner_products(*case)  # before those that cancel are computed again
        assert ((found - expected).abs() <= 1e-13 * sizes).all() and (sizes >= (1 - 1e-9) * found).all()

    drawn()


@pytest.mark.parametrize("nd", CONV)
def test_all_ways_to_multiply_out(nd):
    @grid(40)
    @given(case=operands(nd))
    def drawn(case):
        x, grads, geometry = case
        expected = torch.stack([weight_gradient(x[b], grads[b], geometry) for b in range(len(x))])
        for plan, run in convolution.MULTIPLIED.values():
            if plan(x.shape, grads.shape, geometry) is not None:
                torch.testing.assert_close(torch.cat(list(run(*case))), expected, rtol=1e-10, atol=1e-12)
        norms, total = sums.of_patches(*case)
        torch.testing.assert_close(norms, expected.flatten(1).square().sum(1), rtol=1e-10, atol=0)
        torch.testing.assert_close(total, expected.sum(0), rtol=1e-10, atol=1e-12)

    drawn()


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("way", ["unfolded", "pixel Gram"])
def test_blocks_of_examples(way, stride, monkeypatch):
    """Whatever the size of a block, the numbers are the same, and so is what the plan says of the operations."""
    geometry = Geometry(torch.Size((4, 2, 3, 3)), (stride,) * 2, (1, 1), (1, 1), False, (0, 0), 1)
    x = torch.randn(7, 1, 2, 13, 13, dtype=torch.float64)
    side = (13 + 2 - 3) // stride + 1
    grads = torch.randn(7, 1, 4, side, side, dtype=torch.float64)
    expected = convolution.call_per_example(x, grads, geometry)
    run = convolution.NORMS.ways[way]
    for block in (1, 3 * 169**2, 2**24):
        monkeypatch.setattr(blocks, "BLOCK", block)
        plan = run.plan(x.shape, grads.shape, geometry)
        assert plan is not None
        with FlopCounterMode(display=False) as counter:
            torch.testing.assert_close(run.run(x, grads, geometry), expected, rtol=1e-10, atol=0)
        assert counter.get_total_flops() <= plan.flops <= 3 * counter.get_total_flops()
