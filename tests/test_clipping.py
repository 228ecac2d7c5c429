"""`clip_`, `reweight_` and the gradients they are made of; every other model is clipped in `oracle.check`."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from oracle import no_trace, scramble
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import perex

B = 6


def net() -> nn.Module:
    layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    return scramble(layers.double())


def batch(size: int = B, seed: int = 0) -> Tensor:
    return torch.randn(size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().square().sum(1)


def each(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The loop: gradients `(B, *shape)` by parameter."""
    rows = [torch.autograd.grad(losses_of(model, x[b : b + 1]).sum(), list(model.parameters())) for b in range(len(x))]
    names = [name for name, _ in model.named_parameters()]
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def norms_of(gradients: dict[str, Tensor], names: list[str] | None = None) -> Tensor:
    return torch.cat([gradients[name].flatten(1) for name in names or gradients], 1).norm(dim=1)


def assert_grads(model: nn.Module, gradients: dict[str, Tensor], weights: dict[str, Tensor], extra: float = 0) -> None:
    for name, parameter in model.named_parameters():
        expected = torch.tensordot(weights[name], gradients[name], 1) + extra
        torch.testing.assert_close(parameter.grad, expected)


GROUPS = {"first": "0.*", "rest": ["2.*", "4.weight", "4.bias"]}


@pytest.mark.parametrize("by", [None, "module", "parameter", GROUPS], ids=["all", "module", "parameter", "groups"])
@pytest.mark.parametrize("normalize", [False, True])
def test_clipping_together_or_apart(by, normalize):
    model, x = net(), batch()
    gradients = each(model, x)
    names = list(gradients)
    groups = {
        "all": {"": names},
        "module": {path: [f"{path}.weight", f"{path}.bias"] for path in ("0", "2", "4")},
        "parameter": {name: [name] for name in names},
        "groups": {"first": names[:2], "rest": names[2:]},
    }["all" if by is None else by if isinstance(by, str) else "groups"]
    bounds = {group: 0.5 + k for k, group in enumerate(groups)}
    with perex.attach(model, param_grads=False) as px:
        px.backward(losses_of(model, x))
    found = px.clip_(bounds[""] if by is None else bounds, by=by, normalize=normalize, stability=0.3)
    weights = {}
    for group, members in groups.items():
        norms = norms_of(gradients, members)
        torch.testing.assert_close(found if by is None else found[group], norms)
        own = bounds[group] / (norms + 0.3) if normalize else (bounds[group] / norms).clamp(max=1)
        weights |= dict.fromkeys(members, own)
    assert_grads(model, gradients, weights)


def test_no_example_moves_the_sum_by_more_than_the_bound():
    model, x = net(), batch()
    sums = []
    for rows in (x, *(torch.cat((x[:b], x[b + 1 :])) for b in range(B))):
        model.zero_grad()
        with perex.attach(model, param_grads=False) as px:
            px.backward(losses_of(model, rows))
            px.clip_(0.7)
        sums.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    moves = torch.stack([(sums[0] - other).norm() for other in sums[1:]])
    assert bool((moves <= 0.7 + 1e-12).all()) and float(moves.max()) > 0.69


@pytest.mark.parametrize("param_grads", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("call", ["loss", "losses"])
def test_micro_batches_add_up(param_grads, reduction, call):
    """What `.grad` held before the forward stays, whatever the backward itself adds to it."""
    model, parts = net(), [batch(4, 1), batch(5, 2), batch(2, 3)]
    gradients = {name: torch.cat([each(model, x)[name] for x in parts]) for name, _ in model.named_parameters()}
    with no_trace(model), perex.attach(model, param_grads=param_grads, loss_reduction=reduction) as px:
        for x in parts:
            losses = losses_of(model, x)
            px.backward(losses) if call == "losses" else getattr(losses, reduction)().backward()
            held = [p.grad for p in model.parameters()]
            px.clip_(0.7)
            for before, parameter in zip(held, model.parameters(), strict=True):
                assert before is None or before is parameter.grad, "a tensor that is there is written to"
    weights = (0.7 / norms_of(gradients)).clamp(max=1)
    assert_grads(model, gradients, dict.fromkeys(gradients, weights))


def test_doing_it_again_replaces_it():
    model, x = net(), batch()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    gradients, weights = each(model, x), torch.linspace(-1, 1, B, dtype=torch.float64)
    with perex.attach(model) as px:
        losses_of(model, x).mean().backward()
        px.reweight_(torch.ones(B))
        px.clip_(0.1)
        px.reweight_(weights)
    assert_grads(model, gradients, dict.fromkeys(gradients, weights), 7)


def test_the_mean_is_a_weighted_sum():
    model, x = net(), batch()
    losses_of(model, x).mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with perex.attach(model, param_grads=False) as px:
        px.backward(losses_of(model, x))
        px.reweight_(torch.full((B,), 1 / B))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_only_what_is_tracked():
    model, x = net(), batch()
    gradients = each(model, x)
    with perex.attach(model, params=["2.*"]) as px:
        losses_of(model, x).sum().backward()
        whole = {name: p.grad.clone() for name, p in model.named_parameters()}
        norms = px.clip_(0.5)
    torch.testing.assert_close(norms * 1.0, B * norms_of(gradients, ["2.weight", "2.bias"]))  # told that it is a mean
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, whole[name]) != name.startswith("2.")


def test_a_parameter_that_was_not_used():
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}).double()
    model.forward = lambda x: model["a"](x)
    x = batch()
    with perex.attach(model, param_grads=False) as px:
        px.backward(model(x).sin().sum(1))
        norms = px.clip_({"a": 1.0, "b": 2.0}, by="module")
    assert not norms["b"].any() and not model["b"].weight.grad.any() and model["a"].weight.grad.any()


def test_siamese_towers_and_further_examples():
    model, x, z = net(), batch(4, 1), batch(4, 2)
    rows = [torch.autograd.grad((model(x[b]) - model(z[b])).square().sum(), list(model.parameters())) for b in range(4)]
    names = [name for name, _ in model.named_parameters()]
    gradients = {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    with perex.attach(model, param_grads=False) as px:
        px.backward((model(x) - model(z)).square().sum(1))
        px.clip_(0.7)
    weights = (0.7 / norms_of(gradients)).clamp(max=1)
    assert_grads(model, gradients, dict.fromkeys(gradients, weights))

    model.zero_grad()
    gradients = {name: torch.cat((each(model, x)[name], each(model, z)[name])) for name in names}
    gram = perex.Gram()
    with perex.attach(model, gram, param_grads=False) as px:
        px.backward(torch.cat((losses_of(model, x), losses_of(model, z))))
        px.clip_(0.7)
        rows = torch.cat([g.flatten(1) for g in gradients.values()], 1)
        torch.testing.assert_close(px.gradients().gram(), rows @ rows.T)
        with pytest.raises(perex.NotReadyError, match="several forwards of further examples"):
            px.read(gram)
    weights = (0.7 / norms_of(gradients)).clamp(max=1)
    assert_grads(model, gradients, dict.fromkeys(gradients, weights))


@pytest.mark.parametrize("call", ["loss", "losses"])
def test_a_scaled_loss(call):
    model, x, scaler = net(), batch(), torch.amp.GradScaler("cpu", init_scale=1000.0)
    gradients = each(model, x)
    with perex.attach(model, grad_scaler=scaler, param_grads=False) as px:
        losses = losses_of(model, x)
        px.backward(losses) if call == "losses" else scaler.scale(losses.mean()).backward()
        torch.testing.assert_close(px.clip_(0.7), norms_of(gradients))
    assert_grads(model, gradients, dict.fromkeys(gradients, (0.7 / norms_of(gradients)).clamp(max=1)))


def test_mixed_precision_is_accumulated_in_float32():
    model, x = net().float(), batch().float()
    gradients = {name: g.float() for name, g in each(model, x).items()}
    with perex.attach(model, param_grads=False) as px:
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_of(model, x)
        px.backward(losses.float())
        px.clip_(100.0)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, gradients[name].sum(0), rtol=0.1, atol=0.1)


# What is kept, and for how long


def test_pairs_of_two_batches():
    model, x, z = net(), batch(4, 1), batch(3, 2)
    one, two = (torch.cat([g.flatten(1) for g in each(model, rows).values()], 1) for rows in (x, z))
    expected = each(model, x)["0.bias"].sum(0)
    with perex.attach(model, memory="high", param_grads=False) as px:
        px.backward(losses_of(model, x))
        first = px.gradients()
        px.backward(losses_of(model, z))
        torch.testing.assert_close(first.gram(px.gradients()), one @ two.T)
        torch.testing.assert_close(first.weighted_sum(torch.ones(4))["0.bias"], expected)
    assert "4 examples, 6 parameters" in repr(first)
    with perex.attach(model, params=["0.*"]) as px:
        px.backward(losses_of(model, z))
        with pytest.raises(perex.PerexError, match="of other parameters, such as '2.bias'"):
            px.gradients().gram(first)


def test_who_asks_once_is_served_from_then_on():
    model = net()
    with perex.attach(model, param_grads=False) as px:
        for seed in range(3):
            px.backward(losses_of(model, batch(seed=seed)))
            px.clip_(1.0)
    with perex.attach(model, param_grads=False) as px:
        px.backward(losses_of(model, batch()))
        px.norms()
        px.backward(losses_of(model, batch()))
        with pytest.raises(perex.NotReadyError, match="memory='high'"):
            px.clip_(1.0)
        px.norms()


def test_nothing_is_kept_where_that_is_said():
    model = net()
    with perex.attach(model, memory="none") as px:
        px.backward(losses_of(model, batch()))
        with pytest.raises(perex.NotReadyError, match="memory='none'"):
            px.reweight_(torch.ones(B))
    with pytest.raises(perex.AttachError, match="memory='much'"):
        perex.attach(model, memory="much")


def test_much_is_not_kept_unasked(monkeypatch):
    from perex import backward

    model = net()
    for room, kept in ((10_000, True), (100, False)):
        monkeypatch.setattr(backward, "ROOM", room)
        with perex.attach(model) as px:
            px.backward(losses_of(model, batch()))
            if kept:
                px.clip_(1.0)
            else:
                with pytest.raises(perex.NotReadyError, match="at most 32 MiB"):
                    px.clip_(1.0)


def test_checkpoints_are_not_undone_unasked():
    model, x = net(), batch()
    inner = nn.Sequential(*model)
    model.forward = lambda x: checkpoint(inner.forward, x, use_reentrant=False)
    gradients = each(model, x)
    for memory in ("auto", "high"):
        with perex.attach(model, memory=memory, param_grads=False) as px:
            px.backward(losses_of(model, x))
            if memory == "auto":
                with pytest.raises(perex.NotReadyError, match="nothing is checkpointed"):
                    px.clip_(0.7)
            else:
                px.clip_(0.7)
    assert_grads(model, gradients, dict.fromkeys(gradients, (0.7 / norms_of(gradients)).clamp(max=1)))


def alive(rows: int) -> bool:
    """Whether there is a tensor of so many rows."""
    gc.collect()
    return any(
        issubclass(type(t), Tensor) and t.dim() == 2 and len(t) == rows and t.shape[1] > 1 for t in gc.get_objects()
    )


@pytest.mark.parametrize("memory", ["high", "auto"])
def test_the_next_forward_lets_go(memory):
    model = net()
    with perex.attach(model, memory=memory) as px:
        px.backward(losses_of(model, batch(17)))
        px.clip_(1.0)
        assert alive(17)
        model(batch())
        assert not alive(17)


def test_inputs_that_are_overwritten_are_noticed():
    model, x = net(), batch()
    with perex.attach(model) as px:
        px.backward(losses_of(model, x))
        x.zero_()
        with pytest.raises(perex.NotReadyError, match="parameter '0.weight' are lost: .* changed in place"):
            px.clip_(1.0)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_norm": 0}, "positive number"),
        ({"max_norm": float("nan")}, "positive number"),
        ({"max_norm": {"first": 1.0}, "by": GROUPS}, "no bound for 'rest'"),
        ({"max_norm": 1.0, "by": {"a": "0.*"}}, "parameter '2.weight' is in no group"),
        ({"max_norm": 1.0, "by": {"a": "*", "b": "0.*"}}, "parameter '0.weight' is in 'a' and 'b'"),
        ({"max_norm": 1.0, "by": "layer"}, "by='layer'"),
    ],
)
def test_arguments_of_clip(arguments, message):
    model = net()
    with perex.attach(model, param_grads=False) as px:
        with pytest.raises(perex.NotReadyError, match="nothing to read yet"):
            px.clip_(1.0)
        px.backward(losses_of(model, batch()))
        with pytest.raises(perex.PerexError, match=message):
            px.clip_(**arguments)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("weights", [torch.ones(B + 1), torch.ones(B, 1), [1.0] * B, torch.ones(B) * 1j])
def test_arguments_of_reweight(weights):
    model = net()
    with perex.attach(model, param_grads=False) as px:
        px.backward(losses_of(model, batch()))
        with pytest.raises(perex.PerexError, match=r"expected a tensor of one number an example, \(6,\)"):
            px.reweight_(weights)


# In little memory: the backward runs twice


@pytest.mark.parametrize("param_grads", [True, False])
@pytest.mark.parametrize("by", [None, "parameter"])
def test_running_the_backward_again(param_grads, by):
    """Inputs' gradients are those of one backward, and micro-batches add up."""
    model, parts = net(), [batch(4, 1), batch(5, 2)]
    gradients = {name: torch.cat([each(model, x)[name] for x in parts]) for name, _ in model.named_parameters()}
    with no_trace(model), perex.attach(model, param_grads=param_grads, memory="low") as px:
        for x in parts:
            x.requires_grad_()
            px.backward(losses_of(model, x))
            once = x.grad.clone()
            px.clip_(0.7, by=by)
            assert torch.equal(x.grad, once)
            with pytest.raises(perex.NotReadyError, match="clip_ or reweight_ once after each"):
                px.clip_(0.7)
            with pytest.raises(perex.NotReadyError, match="memory='low'"):
                px.gradients()
    groups = [[name] for name in gradients] if by else [list(gradients)]
    weights = {}
    for names in groups:
        weights |= dict.fromkeys(names, (0.7 / norms_of(gradients, names)).clamp(max=1))
    assert_grads(model, gradients, weights)


def test_running_it_again_takes_losses():
    model = net()
    with perex.attach(model, memory="low") as px:
        losses_of(model, batch()).mean().backward()
        with pytest.raises(perex.NotReadyError, match="rather than loss.backward"):
            px.clip_(1.0)


def test_two_forwards_run_again():
    model, x, z = net(), batch(4, 1), batch(3, 2)
    gradients = {name: torch.cat((each(model, x)[name], g)) for name, g in each(model, z).items()}
    with perex.attach(model, param_grads=False, memory="low") as px:
        px.backward(torch.cat((losses_of(model, x), losses_of(model, z))))
        px.clip_(0.7)
    assert_grads(model, gradients, dict.fromkeys(gradients, (0.7 / norms_of(gradients)).clamp(max=1)))


def test_checkpoints_stay_what_they_are_in_little_memory():
    model, x = net(), batch()
    inner = nn.Sequential(*model)
    model.forward = lambda x: checkpoint(inner.forward, x, use_reentrant=False)
    gradients = each(model, x)
    with perex.attach(model, memory="low", param_grads=False) as px:
        for _ in range(2):
            px.backward(losses_of(model, x))
            model.zero_grad()
            px.clip_(0.7)
    assert_grads(model, gradients, dict.fromkeys(gradients, (0.7 / norms_of(gradients)).clamp(max=1)))


def test_a_selective_checkpoint_goes_backward_once():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    model, x = net(), batch()
    inner = nn.Sequential(*model)

    def contexts():
        return create_selective_checkpoint_contexts(lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE)

    model.forward = lambda x: checkpoint(inner.forward, x, use_reentrant=False, context_fn=contexts)
    with perex.attach(model, memory="low", param_grads=False) as px:
        px.backward(losses_of(model, x))
        with pytest.raises(perex.NotReadyError, match="once only"):
            px.clip_(0.7)


def test_sparse_gradients_of_before():
    """An embedding with `sparse=True`: what is added to a sparse `.grad` makes a dense one."""
    model, ids = nn.Embedding(6, 3, sparse=True).double(), torch.tensor([[1, 2, 1], [0, 1, 5]])
    for _ in range(2):
        model.weight.grad = None
        model(ids).sum().backward()
        assert model.weight.grad.is_sparse
        with perex.attach(model, param_grads=False) as px:
            px.backward(model(ids).sum((1, 2)))
            px.reweight_(torch.tensor([1.0, 10.0]))
    expected = torch.zeros(6, 3, dtype=torch.float64)
    for row, weight in zip(ids, (2.0, 11.0), strict=True):
        expected.index_add_(0, row, torch.full((3, 3), weight, dtype=torch.float64))
    torch.testing.assert_close(model.weight.grad, expected)


def test_who_asks_in_vain_once_is_given_the_next():
    """Gradients of more than 32 MiB are not kept unasked, and a later step is the first to want any."""
    model, x = nn.Linear(1500, 1500), torch.randn(1500, 2, 1500)
    with perex.attach(model, param_grads=False) as px:
        px.backward(model(x).square().sum((1, 2)))
        with pytest.raises(perex.NotReadyError, match="from the next forward and backward on they are kept"):
            px.clip_(1.0)
        for _ in range(2):
            px.backward(model(x).square().sum((1, 2)))
            px.clip_(1.0)
    model, x = net(), batch()
    with perex.attach(model) as px:
        for _ in range(3):  # by the third, perex takes it that nobody wants any
            px.backward(losses_of(model, x))
        with pytest.raises(perex.NotReadyError, match="That is noted now"):
            px.clip_(1.0)
        px.backward(losses_of(model, x))
        px.clip_(1.0)


def test_bounds_of_groups_given_as_groups():
    model = net()
    with perex.attach(model) as px:
        px.backward(losses_of(model, batch()))
        with pytest.raises(perex.ArgumentError, match="globs of parameters by group, such as"):
            px.clip_(1.0, by={"0.*": 1.0, "2.*": 2.0})
        with pytest.raises(perex.ArgumentError, match="say with `by` what these are"):
            px.clip_({"0.*": 1.0})


# What `.grad` held


@pytest.mark.parametrize("memory", ["high", "low"])
@pytest.mark.parametrize("param_grads", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("to_none", [True, False])
def test_what_was_cleared_stays_so(memory, param_grads, sparse, to_none):
    """Also for a second sum, and where the gradient is sparse."""
    model = nn.Embedding(5, 1, sparse=sparse)
    ids = torch.tensor([[1, 2], [2, 3]])
    px = perex.attach(model, param_grads=param_grads, memory=memory, loss_reduction="sum")
    px.backward(model(ids).sum((1, 2)))
    for _ in range(2 if memory == "high" else 1):  # in little memory there is one sum a backward
        px.reweight_(torch.ones(2))
    px.backward(model(ids).sum((1, 2)))
    model.zero_grad(set_to_none=to_none)
    for _ in range(2 if memory == "high" else 1):
        px.reweight_(torch.ones(2))
        assert model.weight.grad.to_dense().flatten().tolist() == [0, 1, 2, 1, 0]


@pytest.mark.parametrize("memory", ["high", "low"])
@pytest.mark.parametrize("param_grads", [True, False])
def test_what_comes_out_as_zero_was_not_cleared(memory, param_grads):
    """As where a critic's losses of real and of generated examples cancel in the last bias."""
    model, x = nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    px = perex.attach(model, param_grads=param_grads, memory=memory, loss_reduction="sum")
    px.backward(-model(x).squeeze(1))
    px.clip_(100.0)
    px.backward(model(x).squeeze(1))
    px.clip_(100.0)
    assert not model.weight.grad.any() and not model.bias.grad.any()
    px.backward(model(x).squeeze(1))
    px.reweight_(torch.tensor([0.0, 1.0]))
    assert model.weight.grad.tolist() == [[3.0, 4.0]]
    px.backward(model(x).squeeze(1))
    for _ in range(2 if memory == "high" else 1):  # what a sum of perex's own brings to zero, too
        px.reweight_(torch.tensor([0.0, -1.0]))
        assert not model.weight.grad.any()


@pytest.mark.parametrize("memory", ["high", "low"])
@pytest.mark.parametrize("param_grads", [True, False])
def test_what_was_cleared_out_of_autograds_sight(memory, param_grads):
    model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    px = perex.attach(model, param_grads=param_grads, memory=memory, loss_reduction="sum")
    for _ in range(2):
        px.backward(model(x).squeeze(1))
        if model.weight.grad is not None:
            model.weight.grad.data.zero_()
        px.reweight_(torch.ones(2))
        assert model.weight.grad.tolist() == [[4.0, 6.0]]


@pytest.mark.parametrize("param_grads", [True, False])
def test_a_parameter_that_is_frozen_behind_the_forward(param_grads):
    model = net()
    with perex.attach(model, param_grads=param_grads, memory="high") as px:
        each = losses_of(model, batch())
        name, parameter = next(iter(model.named_parameters()))
        parameter.requires_grad_(False)
        px.backward(each)
        px.reweight_(torch.full((B,), 1 / B))
        found = parameter.grad.clone()
    parameter.requires_grad_(True)
    model.zero_grad()
    losses_of(model, batch()).mean().backward()
    assert torch.allclose(found, parameter.grad), name


@pytest.mark.parametrize("memory", ["high", "low"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 1000.0), (torch.bfloat16, 1.0), (torch.int64, 3)])
def test_weights_in_few_bits(memory, dtype, size):
    model, x = nn.Linear(4, 1), torch.randn(257, 4)
    with perex.attach(model, param_grads=False, memory=memory) as px:
        px.backward(model(x).squeeze(1))
        px.reweight_(torch.full((257,), size, dtype=dtype))
    assert torch.allclose(model.weight.grad, size * x.sum(0, keepdim=True), rtol=1e-4, atol=1e-3 * size)


def test_automatic_clipping_takes_finite_bounds():
    model = net()
    with perex.attach(model, param_grads=False) as px:
        px.backward(losses_of(model, batch()))
        for arguments in ({"max_norm": math.inf}, {"max_norm": 1.0, "stability": -1.0}):
            with pytest.raises(perex.PerexError, match="normalize=True divides"):
                px.clip_(normalize=True, **arguments)
