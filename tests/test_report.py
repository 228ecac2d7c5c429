"""The report: what it prints, and that what it says is what the kernels do."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from oracle import BUILT, without_kernels
from printed import assert_printed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import perex
from perex.factors import Dense, Few, Outer, Part, Patches, Place, Rows, Total
from perex.factors.outline import outline
from perex.kernels import convolution, outer
from perex.kernels.geometry import Geometry
from perex.kernels.strategies import Preferences, preferring
from perex.table import human, shortened

torch.set_num_threads(1)


class TinyGPT(nn.Module):
    """One block, bare position table and class token, head tied to the embedding."""

    def __init__(self, d: int = 16, vocabulary: int = 50) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, d)
        self.positions = nn.Parameter(torch.randn(1, 9, d))
        self.token = nn.Parameter(torch.randn(1, 1, d))
        self.block = nn.TransformerEncoderLayer(d, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat((self.token.expand(len(ids), -1, -1), self.wte(ids)), 1) + self.positions
        return self.head(self.block(x))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 10),
    )


def report_of(model: nn.Module, x: Tensor, **attach: object) -> perex.Report:
    with perex.attach(model, **attach) as px:
        out = model(x)
        out = out[0] if isinstance(out, tuple) else out
        px.backward(out.square().flatten(1).sum(1))
    return px.report()


@pytest.mark.parametrize(
    ("name", "make", "x"),
    [
        ("mlp", mlp, torch.randn(32, 20)),
        ("cnn", cnn, torch.randn(4, 3, 16, 16)),
        ("gpt", TinyGPT, torch.randint(50, (4, 8))),
        ("lstm", lambda: nn.LSTM(6, 7, num_layers=2, batch_first=True), torch.randn(3, 5, 6)),
    ],
)
def test_what_is_printed(name: str, make, x: Tensor) -> None:
    with without_kernels():  # what they are chosen for depends on the CPU
        assert_printed(f"report_{name}", str(report_of(make(), x)))


def test_a_refusal_and_an_unused_parameter_are_told() -> None:
    model = mlp()
    model.register_parameter("spare", nn.Parameter(torch.zeros(3)))
    with perex.attach(model) as px:
        penalty = sum(p.square().sum() for p in model.parameters())
        (model(torch.randn(8, 20)).square().sum(1).mean() + penalty).backward()
    report = px.report()
    assert report.unused == ["spare"]
    assert report.refused is not None and "penalty" in report.refused
    with pytest.raises(perex.UnsupportedError) as caught:
        px.norms()
    assert str(caught.value) in report.refused
    assert_printed("report_refused", str(report))


def test_before_a_forward_and_before_a_backward() -> None:
    model = mlp()
    with perex.attach(model) as px:
        assert str(px.report()) == "nothing to report yet: the model was not called (6 parameters tracked)"
        loss = model(torch.randn(8, 20)).sum(1).mean()
        before = px.report()
        assert [row.module for row in before.rows] == ["0", "2", "4"]
        assert {row.flops for row in before.rows} == {None} and before.refused is None
        assert "known after a backward" in str(before)
        loss.backward()
        assert all(row.flops for row in px.report().rows)
        model(torch.randn(8, 20))
        assert {row.flops for row in px.report().rows} == {None}, "a new forward, a new report"


def test_rows_have_named_fields() -> None:
    first, *_ = report_of(mlp(), torch.randn(32, 20)).rows
    assert first == perex.Row(
        module="0",
        operator="linear",
        rule="linear",
        parameters=("0.weight", "0.bias"),
        shapes=((64, 20), (64,)),
        ways=("one position", "dense"),
        input="(B, 20)",
        output="(B, 64)",
        flops=2 * 32 * (64 + 20 + 1) + 32 * 64 + 2 * 32 * 64,
        bytes=4 * (32 * (64 + 20) + 32 * 64),
    )
    assert first.way == "one position"


def test_the_batch_is_shown_where_it_is() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).flatten(0, 1)).unflatten(0, (len(x), -1))

    with perex.attach(model := Folded(), batch_dim=1) as px:
        px.backward(model(torch.randn(5, 7, 3)).square().sum((0, 2)))
    assert [(row.input, row.output) for row in px.report().rows] == [
        ("(5, B, 3)", "(5, B, 4)"),
        ("(5*B, 4)", "(5*B, 2)"),
    ]


def test_sharing_is_told_and_its_cross_terms_are_counted() -> None:
    tied = report_of(TinyGPT(), torch.randint(50, (4, 8)))
    assert tied.shared == {"wte.weight": "2 uses: wte (embedding), head (linear); tied with head.weight"}
    model = TinyGPT()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    untied = report_of(model, torch.randint(50, (4, 8)))
    assert untied.shared == {}
    assert tied.flops - untied.flops == 2 * 4 * 8 * 9 * (16 + 1)  # positions in, positions out, of each example


def test_uses_that_merge_are_counted_once() -> None:
    layer = nn.Linear(40, 40, bias=False)
    report = report_of(nn.Sequential(layer, nn.Tanh(), layer), torch.randn(3, 4, 40))
    ways, pairs = (["compiled Gram"] * 2, 8 * 9 // 2) if BUILT else (["Gram"] * 2, 8**2)
    assert [row.way for row in report.rows] == ways
    assert [row.flops for row in report.rows] == [2 * 3 * pairs * (40 + 40 + 1), 0]
    assert report.shared == {"0.weight": "2 uses: 0 (linear); tied with 2.weight"}


def test_derived_weights_and_parts_of_parameters() -> None:
    report = report_of(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), torch.randn(5, 3))
    assert "pulled back" in report.rows[0].ways and not report.rows[0].counted
    assert "not counted" in str(report)


def test_a_parameter_twice_in_one_operator_has_two_ways() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addcmul(x, self.w, self.w)

    report = report_of(Twice(), torch.randn(5, 3))
    assert report.rows[0].parameters == ("w", "w") and report.rows[0].ways == ("dense", "dense")
    assert report.shared == {"w": "2 uses: (model) (addcmul)"}


def test_a_use_that_the_backward_does_not_reach_costs_nothing() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    report = report_of(Two(), torch.randn(5, 3))
    assert [row.flops is None for row in report.rows] == [False, True]
    assert " -  " in str(report)


def test_a_layer_that_is_called_on_one_example_after_the_other() -> None:
    class Each(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.layer(row) for row in x])

    report = report_of(Each(), torch.randn(3, 8))
    assert len(report.rows) == 3 and all(row.way == "one position" for row in report.rows)


def test_a_factor_of_a_user_s_own_is_shown() -> None:
    class Own(Dense):
        """A kind that perex does not know."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    perex.module_rule(Scale, saves="x")(lambda captured: {"weight": Own(captured.grad * captured.examples("x"))})
    try:
        (row,) = report_of(Scale(), torch.randn(5, 3)).rows
    finally:
        del perex.rules.registry.MODULES[Scale]
    assert row.way == "its own" and not row.counted


def test_nothing_of_a_step_is_kept_but_names_and_shapes() -> None:
    model = mlp()
    with perex.attach(model, memory="none") as px:
        x = torch.randn(8, 20)
        activation = weakref.ref(x.relu())
        loss = model(x * 1).sum(1).mean()
        loss.backward()
        del loss
        gc.collect()
        found = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
        alive = {id(t) for t in found if t.shape in {(8, 64), (8, 32), (8, 20)}}
        assert alive <= {id(x)} and activation() is None
        assert px.report().rows


# What plans say is what kernels do


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def images(x: tuple, grads: tuple, weight: tuple) -> Patches:
    return Patches(batch(*x), batch(*grads), Geometry(torch.Size(weight), (1, 1), (0, 0), (1, 1), False, (0, 0), 1))


SMALL = images((4, 1, 2, 9, 9), (4, 1, 3, 7, 7), (3, 2, 3, 3))
FACTORS = {
    "one position": Outer(batch(4, 1, 6), batch(4, 1, 5), torch.Size((6, 5))),
    "Gram": Outer(batch(4, 3, 40), batch(4, 3, 50), torch.Size((40, 50))),
    "Gram of many positions": Outer(batch(4, 150, 40), batch(4, 150, 50), torch.Size((40, 50))),
    "direct": Outer(batch(4, 30, 6), batch(4, 30, 5), torch.Size((6, 5))),
    "unfolded, direct": SMALL,
    "unfolded, Gram": images((2, 1, 64, 4, 4), (2, 1, 64, 2, 2), (64, 64, 3, 3)),
    "call per example": SMALL,
    "grouped calls": SMALL,
    "pixel Gram": SMALL,
} | dict.fromkeys(["compiled direct", "compiled pixel Gram"] if BUILT else [], SMALL)
if BUILT:
    FACTORS["compiled direct of positions"] = Outer(batch(4, 30, 20), batch(4, 30, 50), torch.Size((20, 50)))
    FACTORS["compiled Gram"] = FACTORS["Gram"]
    FACTORS["compiled Gram of many positions"] = FACTORS["Gram of many positions"]


@pytest.mark.parametrize("way", FACTORS)
def test_a_plan_counts_what_the_kernel_multiplies(way: str) -> None:
    factor = FACTORS[way]
    way = way.partition(" of ")[0]
    with preferring(Preferences(tuple(way.split(", ")))):
        plan = outline(factor).factor().plan()
        assert plan == factor.plan() and plan.way == way
        with FlopCounterMode(display=False) as counter:
            factor.squared_norm()
    products = counter.get_total_flops()  # of matrix products and convolutions; squares and sums are not counted there
    shifts = 2 if way == "pixel Gram" else 1  # of small images, adding up is most of it
    assert products <= plan.flops <= 1.25 * shifts * products + 100


@pytest.mark.parametrize("positions, way", [(1, "one position"), (8, "Gram"), (64, "Gram"), (400, "direct")])
def test_the_cheapest_way_is_chosen(positions: int, way: str) -> None:
    shapes = [torch.Size((16, 1, positions, 256))] * 2
    assert outer.plan(*shapes).way in (way, f"compiled {way}")
    with without_kernels():
        assert outer.plan(*shapes).way == way


@pytest.mark.parametrize(
    "channels, side, compiled, way",
    [
        ((3, 32), 32, "compiled direct", "unfolded, direct"),
        ((64, 64), 32, "compiled direct", "grouped calls"),
        ((256, 256), 8, "compiled pixel Gram", "pixel Gram"),
    ],
)
def test_the_cheapest_way_of_a_convolution(channels: tuple[int, int], side: int, compiled: str, way: str) -> None:
    into, out = channels
    geometry = Geometry(torch.Size((out, into, 3, 3)), (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    shapes = torch.Size((32, 1, into, side, side)), torch.Size((32, 1, out, side, side))
    assert convolution.plan(*shapes, geometry).way == (compiled if BUILT else way)
    with without_kernels():
        assert convolution.plan(*shapes, geometry).way == way


def test_every_kind_has_an_outline() -> None:
    rows = Rows(torch.randint(6, (4, 3)), batch(4, 3, 5), torch.Size((6, 5)))
    few = Few(Dense(batch(2, 6, 5)), [1, 3], 4)
    part = Part(Dense(batch(4, 2, 5)), Place(torch.Size((6, 5)), (2, 5), (5, 1), 5))
    for factor in (rows, few, part, *FACTORS.values()):
        again = outline(factor).factor()
        assert type(again) is type(factor) and again.shape == factor.shape and again.batch == factor.batch
        assert again.plan() == factor.plan()


@pytest.mark.parametrize("pair", [("rows", "outer"), ("dense", "outer"), ("dense", "rows")])
def test_cross_terms_have_a_plan(pair: tuple[str, str]) -> None:
    kinds = {
        "rows": Rows(torch.randint(6, (4, 3)), batch(4, 3, 5), torch.Size((6, 5))),
        "outer": Outer(batch(4, 3, 6), batch(4, 3, 5), torch.Size((6, 5))),
        "dense": Dense(batch(4, 6, 5)),
    }
    first, second = (kinds[name] for name in pair)
    with FlopCounterMode(display=False) as counter:
        Total([first, second]).factors[0].dot(second)
    assert counter.get_total_flops() <= first.dot_plan(second).flops
    assert first.dot_plan(second) == second.dot_plan(first)


def test_numbers_for_people() -> None:
    assert [human(n, "B") for n in (0, 7, 999, 1000, 12345, 999_600, 4.2e9)] == [
        "0 B", "7 B", "999 B", "1 kB", "12 kB", "1 MB", "4.2 GB",
    ]  # fmt: skip
    assert shortened("a.b.c", 3, "start") == "….c" and shortened("abcdef", 3, "end") == "ab…"


def test_a_report_of_long_names_fits() -> None:
    model: nn.Module = nn.Linear(3, 3)
    for name in ("feature_extractor", "encoder_blocks", "some_long_attention_name"):
        model = nn.ModuleDict({name: model})
    inner = next(m for m in model.modules() if isinstance(m, nn.Linear))
    model.forward = lambda x: F.relu(inner(x))  # type: ignore[method-assign]
    report = report_of(model, torch.randn(4, 3))
    assert max(map(len, str(report).splitlines())) <= 120
