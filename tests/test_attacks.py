"""What attacks on the library found: odd moments, broken runs, replaced memory."""

import gc
import pickle
import threading
import weakref

import pytest
import torch
from oracle import check, no_trace
from torch import Tensor, nn
from torch.nn import functional as F

import perex


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 4), torch.randint(3, (6,))


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def loop(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    norms = []
    for b in range(len(x)):
        loss = F.cross_entropy(model(x[b : b + 1]), y[b : b + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        norms.append(torch.stack([g.norm() for g in grads if g is not None]).norm())
    return torch.stack(norms)


@pytest.mark.parametrize("param_grads", [True, False])
def test_memory_that_is_replaced_between_forwards(param_grads):
    x, y = batch()
    model = net()
    other = torch.randn(sum(p.numel() for p in model.parameters()))
    with perex.attach(model, param_grads=param_grads) as px:
        before = model(x)
        nn.utils.vector_to_parameters(other, model.parameters())
        after = model(x)
        assert not torch.allclose(before, after)
        F.cross_entropy(after, y).backward()
        found = px.norms()
    torch.testing.assert_close(found, loop(model, x, y))


def test_the_type_of_the_model_changes():
    x, y = batch()
    model = net()
    with perex.attach(model) as px:
        model(x)
        model.double()
        F.cross_entropy(model(x.double()), y).backward()
        torch.testing.assert_close(px.norms(), loop(model, x.double(), y))


def test_a_parameter_first_read_under_no_grad():
    class Averaged(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.average = self.weight * 0.9
            return F.linear(x, self.weight, self.bias)

    x, y = batch()
    model = Averaged(4, 3)
    with perex.attach(model) as px:
        F.cross_entropy(model(x), y).backward()
        assert model.weight.grad is not None
        torch.testing.assert_close(px.norms(), loop(model, x, y))


def test_a_backward_after_detach_is_refused():
    x, y = batch()
    model = net()
    with perex.attach(model) as px:
        out = model(x)
    (F.cross_entropy(out, y) + F.linear(x, model[0].weight).square().mean()).backward()
    with pytest.raises(perex.PerexError, match="detached"):
        px.norms()
    with pytest.raises(perex.PerexError, match="detached"):
        px.backward(F.cross_entropy(model(x), y, reduction="none"))


def test_losses_of_another_model_leave_nothing_to_read():
    x, y = batch()
    model, other = net(), net()
    with perex.attach(model) as px:
        px.backward(F.cross_entropy(model(x), y, reduction="none"))
        model(x)
        with pytest.raises(perex.LossError, match="no gradient reached"):
            px.backward(F.cross_entropy(other(3 * x), y, reduction="none"))
        with pytest.raises(perex.PerexError):
            px.norms()


@pytest.mark.parametrize("param_grads", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_a_batch_that_uses_no_tracked_parameter_has_norms_of_zero(param_grads, own):
    x, y = batch()
    model = net()
    model.aux = nn.Linear(2, 2)
    model.forward = lambda z: model[2](model[1](model[0](z)))  # type: ignore[method-assign]
    with perex.attach(model, params="aux.*", param_grads=param_grads) as px:
        losses = F.cross_entropy(model(x), y, reduction="none")
        if own:
            px.backward(losses)
        elif param_grads:
            losses.mean().backward()
        assert px.norms().tolist() == [0] * 6


class Interrupted(nn.Module):
    """Ctrl-C in a forward, once."""

    def __init__(self) -> None:
        super().__init__()
        self.error: type[BaseException] | None = KeyboardInterrupt

    def forward(self, x: Tensor) -> Tensor:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return x


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_a_run_that_is_broken_off_leaves_nothing(error):
    x, _ = batch()
    model = nn.Sequential(nn.Linear(4, 3), Interrupted())
    model[1].error = error
    alive = weakref.ref(model[0].weight)
    with no_trace(model), pytest.raises(error), perex.attach(model):
        model(x)
    assert torch._C._len_torch_function_stack() == 0
    del model
    gc.collect()
    assert alive() is None


def test_the_run_after_one_that_was_broken_off():
    x, y = batch()
    model = nn.Sequential(nn.Linear(4, 3), Interrupted())
    with perex.attach(model) as px:
        with pytest.raises(KeyboardInterrupt):
            model(x)
        F.cross_entropy(model(x[:3]), y[:3]).backward()
        torch.testing.assert_close(px.norms(), loop(model, x[:3], y[:3]))
    assert torch._C._len_torch_function_stack() == 0


def test_a_layer_made_in_the_forward():
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 5)
            self.second: nn.Linear | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.second is None:
                self.second = nn.Linear(5, 3)
                nn.init.kaiming_uniform_(self.second.weight)
            return self.second(self.first(x))

    x, y = batch()
    model = Lazy()
    with perex.attach(model) as px:
        F.cross_entropy(model(x), y).backward()
        torch.testing.assert_close(px.norms(), loop(model, x, y))


def test_tensors_that_the_model_keeps_have_no_label():
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("average", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            self.last, self.derived = h.detach(), self.layer.weight * 2
            self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
            return h

    x, y = batch()
    model = Keeps()
    with perex.attach(model):
        F.cross_entropy(model(x), y).backward()
        for tensor in (model.last, model.derived, model.average, x):
            assert not [name for name in vars(tensor) if "perex" in name]


def test_a_layer_without_parameters_yet_is_refused_without_a_trace():
    model = nn.Sequential(nn.Linear(4, 5), nn.LazyLinear(3))
    with pytest.raises(perex.AttachError, match="module '1' has no parameters yet"):
        perex.attach(model)
    assert model[0].weight._backward_hooks is None


def test_a_predicate_that_raises_leaves_no_trace():
    def choose(name: str, parameter: nn.Parameter) -> bool:
        if name == "2.weight":
            raise ZeroDivisionError
        return True

    model = net()
    with no_trace(model), pytest.raises(ZeroDivisionError):
        perex.attach(model, params=choose)


class OwnReduce(nn.Linear):
    """Pickles itself in a way of its own."""

    def __reduce__(self):
        return rebuilt, (dict(self.__dict__),)


def rebuilt(attributes: dict) -> OwnReduce:
    layer = OwnReduce(4, 3)
    layer.__dict__.update(attributes)
    return layer


def test_a_class_that_pickles_itself():
    model = nn.Sequential(OwnReduce(4, 3))
    with perex.attach(model):
        data = pickle.dumps(model)
    assert b"perex" not in data.replace(b"test_attacks", b"")
    assert not pickle.loads(data)[0]._forward_hooks


def test_two_aliases_are_one():
    x, _ = batch()
    model = net()
    with perex.attach(model, forwards="further") as px:
        first, second = model(x), model(2 * x)
        first.sum(1).mean().backward()
        third = model(3 * x)
        (second.sum(1).mean() + third.sum(1).mean()).backward()
        assert len(px.norms()) == 12


def test_batch_norm_is_refused_before_it_changes_its_statistics():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with perex.attach(model), pytest.raises(perex.ExamplesMixError, match=r"Module '1'.*eval.*replace"):
        model(batch()[0])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_an_evaluation_in_another_thread():
    x, y = batch()
    model = net()
    found: list[Tensor] = []

    class Meanwhile(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            def evaluate() -> None:
                with torch.no_grad():
                    found.append(model[0](x))

            thread = threading.Thread(target=evaluate)
            thread.start()
            thread.join()
            return h

    model[1] = Meanwhile()
    with perex.attach(model) as px:
        F.cross_entropy(model(x), y).backward()
        torch.testing.assert_close(px.norms(), loop(model, x, y))
    assert torch.equal(found[0], model[0](x))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("0", r"did you mean '0\.\*'"),
        (["0.*", "layer9.*"], r"'layer9\.\*' matches no parameter of the model; it has 0\.weight"),
        (net()[0], "holds a"),
        (lambda name: True, r"called with \(name, parameter\)"),
        (list(net().parameters()), "holds a Parameter"),
    ],
)
def test_messages_about_params(params, message):
    with pytest.raises(perex.AttachError, match=message):
        perex.attach(net(), params=params)


def test_messages_about_calls_that_began_no_forward():
    x, y = batch()
    model = net()
    with perex.attach(model, batch_dim=5) as px, pytest.raises(perex.PerexError, match="dimension 5"):
        px.backward(F.cross_entropy(model(x), y, reduction="none"))
    with perex.attach(model) as px, torch.no_grad():
        model(x)
        with pytest.raises(perex.PerexError, match="no_grad"):
            px.norms()


def test_inputs_that_disagree_about_the_batch():
    class Compared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 5)

        def forward(self, anchors: Tensor, x: Tensor) -> Tensor:
            return self.a(x) @ self.a(anchors).t()

    model = Compared()
    with perex.attach(model), pytest.raises(perex.PerexError, match=r"sizes \[3, 6\]"):
        model(torch.randn(3, 4), torch.randn(6, 4))


# Numbers that were wrong, each by an attack; `check` is against the loop, `refused` by name.


class Bare(nn.Module):
    """A model in a line: parameters by name, and a function of the model and its input."""

    def __init__(self, function, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def merged(m: Bare, x: Tensor) -> Tensor:
    w = m.w.clone()
    w += m.b @ m.a
    return x @ w


def merged_by_call(m: Bare, x: Tensor) -> Tensor:
    return F.linear(x, m.w.clone().add_(m.b @ m.a))


def put_in(m: Bare, x: Tensor) -> Tensor:
    w = m.w * 1
    view = w.t()
    w[0] = m.a[0]
    return x @ w + x @ view


def masked_token(m: Bare, x: Tensor) -> Tensor:
    h = x @ m.w
    h[x[..., 0] > 0] = m.a[0]
    return h


def first_row(m: Bare, x: Tensor) -> Tensor:
    h = x @ m.w
    h[:, 0] = m.a[None, :1]
    return h


def seen(m: Bare, x: Tensor) -> Tensor:
    mask = torch.zeros(len(x), 4, dtype=x.dtype)
    mask[torch.arange(len(x))[:, None], x.argmax(2)] = 1
    return (x @ m.w) * mask[:, None]


EXACT = [merged, merged_by_call, put_in, masked_token, first_row, seen]


@pytest.mark.parametrize("function", EXACT, ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [(3, 5, 4), (4, 4, 4), (1, 5, 4)])
def test_exact_after_all(function, size):
    torch.manual_seed(0)
    check(Bare(function, w=(4, 4), a=(2, 4), b=(4, 2)), (torch.randn(size, dtype=torch.float64),))


@pytest.mark.parametrize("first", [(1, 4), (1,)])
def test_an_input_with_one_row_is_shared(first):
    shared, x = torch.randn(first, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    model = Bare(lambda m, s, x: x @ m.w + (s * m.a[:1]), w=(4, 4), a=(2, 4))
    losses = model(shared, x).sin().sum(1)
    expected = [
        torch.stack([g.norm() for g in torch.autograd.grad(loss, [model.w, model.a], retain_graph=True)]).norm()
        for loss in losses
    ]
    with perex.attach(model) as px:
        model(shared, x).sin().sum(1).mean().backward()
        torch.testing.assert_close(px.norms(), torch.stack(expected))


def test_bilinear_with_a_constant_of_the_batch():
    layer = nn.Bilinear(4, 3, 2).double()
    model = Bare(lambda m, x: m.layer(x, torch.ones(len(x), 3, dtype=x.dtype)))
    model.layer = layer
    check(model, (torch.randn(5, 4, dtype=torch.float64),))


def decayed(m: Bare, x: Tensor) -> Tensor:
    p = m.a[0].clone()
    y = x + p
    p.mul_(0.5)
    return y + p


def seen_by_all(m: Bare, x: Tensor) -> Tensor:
    mask = torch.zeros(4, dtype=x.dtype)
    mask[x.argmax(2)] = 1
    return (x @ m.w) * mask


def earlier_view(m: Bare, x: Tensor) -> Tensor:
    buffer = torch.zeros(len(x), 4, 4, dtype=x.dtype)
    view = buffer.view(-1)
    buffer[:, 0] = x[:, 0]
    return (x @ m.w) * view.sum()


MIXING = {
    "view taken before a write": earlier_view,
    "changed after use": decayed,
    "seen by all": seen_by_all,
    "stack by axis": lambda m, x: torch.softmax(x @ m.w, axis=0),
    "cumsum by axis": lambda m, x: torch.cumsum(x @ m.w, axis=0),
    "fftshift": lambda m, x: torch.fft.fftshift(x @ m.w),
    "diff": lambda m, x: torch.diff(x @ m.w, dim=0, prepend=torch.zeros(1, *x.shape[1:], dtype=x.dtype)),
    "linspace": lambda m, x: (x @ m.w) * torch.linspace(x.min(), x.max(), 4, dtype=x.dtype),
    "full": lambda m, x: (x @ m.w) * torch.full((4,), x.mean(), dtype=x.dtype),
}


@pytest.mark.parametrize("case", MIXING)
@pytest.mark.parametrize("param_grads", [True, False])
def test_refused_after_all(case, param_grads):
    model = Bare(MIXING[case], w=(4, 4), a=(2, 4))
    x = torch.randn(4, 4, 4, dtype=torch.float64)
    with perex.attach(model, param_grads=param_grads) as px, pytest.raises((perex.PerexError, RuntimeError)) as error:
        model(x).sin().sum((1, 2)).mean().backward()
        px.norms()
    assert isinstance(error.value, perex.PerexError) or (case == "changed after use" and param_grads)


LOSSES = {
    "a column against a row": lambda out, y: F.mse_loss(out[:, :1], y[:, 0]),
    "another order": lambda out, y: F.mse_loss(out.t(), y),
    "dot": lambda out, y: torch.dot(out.flatten(), y.t().flatten()),
}


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")  # torch warns of the same mistake
@pytest.mark.parametrize("case", LOSSES)
def test_losses_in_the_model_that_pair_examples(case):
    model = Bare(lambda m, x, y: LOSSES[case](x @ m.w, y), w=(4, 4))
    x, y = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    with perex.attach(model) as px, pytest.raises(perex.PerexError, match="pairs examples|arranges the rows"):
        model(x, y).backward()
        px.norms()


@pytest.mark.parametrize("taken", [lambda n: n.item(), int], ids=["item", "int"])
def test_a_mean_by_a_count_that_left_torch(taken):
    """The denominator is the batch's, not the example's: no mean of the examples' own losses."""
    model = Bare(lambda m, x, mask: ((x @ m.w).sum(1) * mask).sum() / taken(mask.sum()), w=(4, 4))
    mask = torch.tensor([1, 0, 1, 1])
    with perex.attach(model) as px:
        model(torch.randn(4, 4, dtype=torch.float64), mask).backward()
        with pytest.raises(perex.ExamplesMixError, match="reduces the batch"):
            px.norms()


def test_contrastive_losses_over_two_forwards():
    model, x = net(), torch.randn(6, 4)
    for forwards in (None, "further"):
        with perex.attach(model, forwards=forwards) as px:
            first, second = model(x), model(x + 0.1)
            with pytest.raises(perex.ExamplesMixError, match="losses"):
                px.backward(F.cross_entropy(second @ first.t(), torch.arange(6), reduction="none"))
        with perex.attach(model, forwards=forwards) as px:
            z = F.normalize(torch.cat([model(x), model(x + 0.1)]))
            with pytest.raises(perex.ExamplesMixError, match="losses"):
                px.backward((z @ z.t()).logsumexp(1))
