"""`perex.score` against a loop over batches of one, in float64, whatever the pool, the loss or the model."""

from __future__ import annotations

import copy
import doctest
import importlib
import re
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_imports import optional_packages_imported_by
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from perex.errors import LossError, PerexError
from perex.quantities import Grads, Gram, NoiseScale, Projections
from perex.scoring import Scores, ScoringError, score
from perex.scoring.recorded import form_of

torch.set_num_threads(1)

N = 11
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3)).double()


def examples(n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (n,), generator=generator)


def loop(model: nn.Module, loss_of: Callable[[nn.Module, int], Tensor], n: int = N) -> dict[str, Tensor]:
    """One example after the other: its loss, and its gradient's norm over all parameters and over each."""
    model = copy.deepcopy(model).eval()
    losses, squares = [], []
    for i in range(n):
        model.zero_grad()
        loss = loss_of(model, i).sum()
        loss.backward()
        losses.append(loss.detach())
        squares.append([torch.zeros(()) if p.grad is None else p.grad.square().sum() for p in model.parameters()])
    table = torch.tensor(squares, dtype=torch.float64)
    by_name = {name: table[:, k].sqrt() for k, (name, _) in enumerate(model.named_parameters())}
    return {"loss": torch.stack(losses), "norm": table.sum(1).sqrt(), **by_name}


def assert_same(scores: Scores, reference: dict[str, Tensor], rows: Any = slice(None)) -> None:
    for found, expected in ((scores.losses, reference["loss"]), (scores.norms, reference["norm"])):
        torch.testing.assert_close(found.double(), expected[rows].double(), rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    x, y = examples()
    return loop(classifier(), lambda model, i: nn.CrossEntropyLoss()(model(x[i : i + 1]), y[i : i + 1]))


class Stream(IterableDataset):
    """Examples one after the other, of no known number."""

    def __iter__(self):
        yield from zip(*examples(), strict=True)


POOLS: dict[str, Callable[[], Any]] = {
    "tensors": examples,
    "TensorDataset": lambda: TensorDataset(*examples()),
    "list": lambda: list(zip(*examples(), strict=True)),
    "IterableDataset": Stream,
    "loader": lambda: DataLoader(TensorDataset(*examples()), 4),
    "shuffled loader": lambda: DataLoader(TensorDataset(*examples()), 4, shuffle=True, drop_last=True),
    "loader with workers": lambda: DataLoader(TensorDataset(*examples()), 4, shuffle=True, num_workers=2),
    "loader of a stream": lambda: DataLoader(Stream(), 4, num_workers=2, drop_last=True),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("batch_size", [None, 3])
def test_every_kind_of_pool(pool: str, batch_size: int | None, reference: dict[str, Tensor]) -> None:
    scores = score(classifier(), POOLS[pool](), nn.CrossEntropyLoss(), batch_size=batch_size, progress=False)
    assert scores.ids.tolist() == list(range(N))
    assert scores.losses.dtype == scores.norms.dtype == torch.float64
    assert_same(scores, reference)


def test_by_parameter_and_by_module(reference: dict[str, Tensor]) -> None:
    scores = score(classifier(), examples(), nn.CrossEntropyLoss(), by="parameter", batch_size=4, progress=False)
    assert list(scores.parts) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    for name, norms in scores.parts.items():
        torch.testing.assert_close(norms, reference[name], rtol=1e-9, atol=1e-12)
    by_module = score(classifier(), examples(), nn.CrossEntropyLoss(), by="module", progress=False).parts
    assert list(by_module) == ["0", "3"]
    torch.testing.assert_close(by_module["3"], torch.hypot(reference["3.weight"], reference["3.bias"]))


def test_params_selects(reference: dict[str, Tensor]) -> None:
    scores = score(classifier(), examples(), nn.CrossEntropyLoss(), params=["3.weight"], progress=False)
    torch.testing.assert_close(scores.norms, reference["3.weight"], rtol=1e-9, atol=1e-12)


class Branching(nn.Module):
    """Uses its second layer only in the first batch it sees with a large entry."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.always(x) + (self.sometimes(x) if bool((x > 9).any()) else 0)


def test_a_part_that_some_batches_skip_has_norm_zero_there() -> None:
    x, y = examples(6)
    x[2:4] += 10
    scores = score(Branching(), (x, y), nn.CrossEntropyLoss(), batch_size=2, by="module", progress=False)
    assert (scores.parts["sometimes"] > 0).tolist() == [False, False, True, True, False, False]
    assert bool((scores.parts["always"] > 0).all())


# ---------------------------------------------------------------------- losses


def per_example_mse(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(1)


LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "none": nn.CrossEntropyLoss(reduction="none"),
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)),
    "smoothed": nn.CrossEntropyLoss(weight=torch.ones(3, dtype=torch.float64), label_smoothing=0.2),
    "ignoring": nn.CrossEntropyLoss(ignore_index=1, reduction="sum"),
    "function": nn.functional.cross_entropy,
    "branching on a value": lambda o, t: (o.sum() if o.sum().item() > 0 else o.square().sum()) * (1 + t.sum()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_each_example_alone(name: str) -> None:
    x, y = examples()
    criterion = LOSSES[name]
    before = copy.deepcopy(vars(criterion))
    scores = score(classifier(), (x, y), criterion, batch_size=4, progress=False)
    assert_same(scores, loop(classifier(), lambda model, i: criterion(model(x[i : i + 1]), y[i : i + 1])))
    assert str(vars(criterion)) == str(before)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("width", [1, 3])
def test_regression_on_vectors_and_on_columns(reduction: str, width: int) -> None:
    x, _ = examples()
    model, target, criterion = nn.Linear(5, width).double(), x[:, :width] + 1, nn.MSELoss(reduction=reduction)
    scores = score(model, (x, target), criterion, progress=False)
    assert_same(scores, loop(model, lambda m, i: criterion(m(x[i : i + 1]), target[i : i + 1])))


class Tagger(nn.Module):
    """Gives a dict and a tuple, of logits `(B, T, V)`, among other things; T == B in a full batch."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.embed, self.head, self.wrap = nn.Embedding(7, 4).double(), nn.Linear(4, 7).double(), wrap

    def forward(self, tokens: Tensor) -> Any:
        return self.wrap(self.head(self.embed(tokens)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["tensor", "dict", "tuple"])
def test_token_losses_with_padding_and_nested_outputs(reduction: str, kind: str) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, (N, 4))
    labels = tokens.roll(1, dims=1)
    for i in range(N):
        labels[i, : i % 4] = -100
    wrap, logits_of = {
        "tensor": (lambda out: out, lambda out: out),
        "dict": (lambda out: {"logits": out, "mean": out.mean(), "none": None}, lambda out: out["logits"]),
        "tuple": (lambda out: (out, "label"), lambda out: out[0]),
    }[kind]
    criterion = nn.CrossEntropyLoss(reduction=reduction, ignore_index=-100)
    model = Tagger(wrap)

    def loss_fn(output: Any, target: Any) -> Tensor:
        return criterion(logits_of(output).transpose(1, 2), target["labels"])

    dataset = [(tokens[i], {"labels": labels[i]}) for i in range(N)]
    scores = score(model, dataset, loss_fn, batch_size=4, progress=False)
    assert_same(scores, loop(model, lambda m, i: loss_fn(m(tokens[i : i + 1]), {"labels": labels[i : i + 1]})))


def test_step_gets_the_batch_as_the_loader_yields_it(reference: dict[str, Tensor]) -> None:
    x, y = examples()
    batches = []

    def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        batches.append(batch)
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    for data in ({"x": x, "y": y}, [{"x": x[i], "y": y[i]} for i in range(N)]):
        assert_same(score(classifier(), data, step=step, batch_size=4, progress=False), reference)
    assert [len(batch["x"]) for batch in batches] == [4, 4, 3] * 2
    assert all(type(batch) is dict for batch in batches)


def test_an_example_with_a_nan_spoils_only_itself(reference: dict[str, Tensor]) -> None:
    x, y = examples()
    x[3] = torch.nan
    scores = score(classifier(), (x, y), nn.CrossEntropyLoss(), batch_size=4, progress=False)
    rest = [i for i in range(N) if i != 3]
    assert scores.norms.isnan().nonzero().flatten().tolist() == [3]
    torch.testing.assert_close(scores.norms[rest], reference["norm"][rest], rtol=1e-9, atol=1e-12)


def test_half_precision_is_kept_in_float32_and_autocast_is_close(reference: dict[str, Tensor]) -> None:
    x, y = examples()
    half = score(classifier().bfloat16(), (x.bfloat16(), y), nn.CrossEntropyLoss(), progress=False)
    mixed = score(classifier().float(), (x.float(), y), nn.CrossEntropyLoss(), autocast=torch.bfloat16, progress=False)
    for scores in (half, mixed):
        assert scores.norms.dtype == scores.losses.dtype == torch.float32
        torch.testing.assert_close(scores.norms.double(), reference["norm"], rtol=0.1, atol=0.02)


# ---------------------------------------------------------------------- what is left alone


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [module.training for module in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "places": [(p.device, p.data_ptr(), id(p)) for p in (*model.parameters(), *model.buffers())],
        "grads": [id(p.grad) for p in model.parameters()],
        "values": [p.tolist() for p in (*model.parameters(), *model.buffers())],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def mixed_model() -> nn.Sequential:
    """Submodules in different modes, a frozen parameter, a `.grad`, and buffers."""
    model = classifier()
    model.insert(1, nn.BatchNorm1d(4).double().eval())
    model[2].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    return model


@pytest.mark.parametrize("fails_at", [None, 0, 2])
@pytest.mark.parametrize("device", [None, *DEVICES])
def test_the_model_is_left_as_it_was(fails_at: int | None, device: str | None) -> None:
    model, calls = mixed_model(), []
    before = state_of(model)

    def step(model: nn.Module, batch: Any) -> Tensor:
        calls.append(batch)
        assert not any(module.training for module in model.modules())
        model[0].weight.requires_grad_(not (fails_at == 2 and len(calls) == 3))
        if fails_at is not None and len(calls) > fails_at:
            raise ZeroDivisionError
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    if fails_at is None:
        score(model, examples(), step=step, device=device, batch_size=4, progress=False)
    else:
        with pytest.raises(ZeroDivisionError):
            score(model, examples(), step=step, device=device, batch_size=4, progress=False)
    assert len(calls) == (3 if fails_at is None else fails_at + 1)
    assert state_of(model) == before
    assert bool((model[0].weight.grad == 1).all())


def test_a_device_that_cannot_be_moved_to_leaves_the_model_where_it_was() -> None:
    model = mixed_model()
    before = state_of(model)
    with pytest.raises(RuntimeError):
        score(model, examples(), nn.CrossEntropyLoss(), device="meta", progress=False)
    assert state_of(model) == before


@pytest.mark.parametrize("device", DEVICES)
def test_scores_on_another_device_come_back(device: str, reference: dict[str, Tensor]) -> None:
    scores = score(classifier(), examples(), nn.CrossEntropyLoss(), device=device, by="module", progress=False)
    assert_same(scores, reference)
    assert {t.device.type for t in (scores.losses, scores.norms, *scores.parts.values())} == {"cpu"}


@pytest.mark.parametrize(("mode", "expected"), [("eval", [False]), ("train", [True]), (None, [False, True])])
def test_mode(mode: Any, expected: list[bool]) -> None:
    model = classifier()
    model[1].eval()
    seen = set()

    def step(model: nn.Module, batch: Any) -> Tensor:
        seen.update(module.training for module in model.modules())
        return model(batch[0]).square().sum(1)

    score(model, examples(), step=step, mode=mode, progress=False)
    assert sorted(seen) == expected
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


def test_random_numbers_and_grad_mode_are_left_alone(reference: dict[str, Tensor]) -> None:
    loader = DataLoader(TensorDataset(*examples()), 4, shuffle=True)
    model = classifier()
    torch.manual_seed(3)
    expected = torch.rand(3)
    for ambient in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        torch.manual_seed(3)
        with ambient():
            scores = score(model, loader, nn.CrossEntropyLoss(), progress=False)
            assert torch.is_grad_enabled() == (ambient is torch.enable_grad)
        assert torch.equal(torch.rand(3), expected)
        assert_same(scores, reference)


def test_no_batch_outlives_the_next() -> None:
    alive: list[weakref.ref] = []
    most = 0

    def step(model: nn.Module, batch: Any) -> Tensor:
        nonlocal most
        output = model(batch[0])
        alive.append(weakref.ref(output))
        most = max(most, sum(ref() is not None for ref in alive))
        return nn.functional.cross_entropy(output, batch[1], reduction="none")

    score(classifier(), examples(), step=step, batch_size=1, progress=False)
    assert len(alive) == N
    assert most == 1


# ---------------------------------------------------------------------- ids, files, progress


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_ids_of_the_user(kind: Callable) -> None:
    ids = list(range(100, 100 + N))
    scores = score(classifier(), POOLS["shuffled loader"](), nn.CrossEntropyLoss(), ids=kind(ids), progress=False)
    assert scores.ids.tolist() == ids
    named = score(classifier(), Stream(), nn.CrossEntropyLoss(), ids=[f"no {i}" for i in ids], progress=False)
    assert named.ids.tolist() == [f"no {i}" for i in ids]


def test_out_writes_by_suffix(tmp_path: Any, reference: dict[str, Tensor]) -> None:
    scores = score(
        classifier(),
        examples(),
        nn.CrossEntropyLoss(),
        by="module",
        out=tmp_path / "scores.npz",
        progress=False,
    )
    with np.load(tmp_path / "scores.npz") as file:
        assert list(file) == ["id", "loss", "norm", "norm/0", "norm/3"]
        assert np.array_equal(file["norm"], scores.norms.numpy())


def test_progress_has_a_rate(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("tqdm")
    score(classifier(), examples(), nn.CrossEntropyLoss(), batch_size=4)
    shown = capsys.readouterr().err
    assert f"{N}/{N}" in shown and re.search(r"[\d.]+ examples/s", shown)
    score(classifier(), examples(), nn.CrossEntropyLoss(), progress=False)
    assert capsys.readouterr() == ("", "")


def test_progress_imports_tqdm_only_when_wanted_and_does_without_it() -> None:
    code = """
    from perex.scoring import score
    data = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 0])
    for progress in False, True:
        assert len(score(torch.nn.Linear(3, 2), data, torch.nn.CrossEntropyLoss(), progress=progress)) == 5
        assert not sys.modules.get("tqdm")
        sys.modules["tqdm"] = None  # as if it were not installed
    del sys.modules["tqdm"]
    """
    assert optional_packages_imported_by(code) == set()


# ---------------------------------------------------------------------- bad input


def scored(data: Any = None, loss_fn: Any = None, **options: Any) -> Scores:
    loss_fn = nn.CrossEntropyLoss() if loss_fn is None and "step" not in options else loss_fn
    return score(classifier(), examples() if data is None else data, loss_fn, **{"progress": False, **options})


X, Y = examples()

BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no loss": (lambda: score(classifier(), examples()), ScoringError, "loss_fn, or step"),
    "two losses": (
        lambda: scored(loss_fn=nn.MSELoss(), step=lambda m, b: m(b[0])),
        ScoringError,
        "either loss_fn, or step",
    ),
    "by": (lambda: scored(by="layer"), ScoringError, "by must be"),
    "mode": (lambda: scored(mode="test"), ScoringError, "mode must be"),
    "autocast": (lambda: scored(autocast="bf16"), ScoringError, "autocast must be a dtype"),
    "batch_size": (lambda: scored(batch_size=0), ScoringError, "batch_size must be"),
    "empty tensors": (lambda: scored((X[:0], Y[:0])), ScoringError, "data is empty"),
    "empty dataset": (lambda: scored([]), ScoringError, "data is empty"),
    "empty loader": (lambda: scored(DataLoader(TensorDataset(X[:0], Y[:0]))), ScoringError, "data is empty"),
    "fewer ids": (lambda: scored(ids=range(3)), ScoringError, "ids: there are 3 for 11"),
    "fewer ids than streamed": (
        lambda: scored(Stream(), ids=range(3)),
        ScoringError,
        "ids: there are 3, but more",
    ),
    "more ids than streamed": (
        lambda: scored(Stream(), ids=range(99)),
        ScoringError,
        "ids: there are 99 for 11",
    ),
    "ids of floats": (
        lambda: scored(ids=torch.rand(N)),
        ScoringError,
        "ids must be whole numbers or strings",
    ),
    "suffix": (lambda: scored(out="scores.xlsx"), ScoringError, "suffix of 'scores.xlsx' is none of .csv"),
    "directory": (lambda: scored(out="/nowhere/scores.csv"), ScoringError, "no directory '/nowhere'"),
    "params": (lambda: scored(params=["nothing.*"]), PerexError, "params|nothing"),
    "triples": (lambda: scored((X, Y, Y)), ScoringError, r"pairs \(x, y\).*tuple of 3; pass step"),
    "dicts": (lambda: scored({"x": X, "y": Y}), ScoringError, r"pairs \(x, y\), but it yields a dict"),
    "scalar step": (lambda: scored(step=lambda m, b: m(b[0]).sum()), LossError, r"shape \(\).*\(11,\)"),
    "wide step": (lambda: scored(step=lambda m, b: m(b[0])), LossError, r"shape \(11, 3\).*needs \(11,\)"),
    "short step": (lambda: scored(step=lambda m, b: m(b[0][:4])[:, 0]), LossError, r"shape \(4,\)"),
    "step that returns a number": (lambda: scored(step=lambda m, b: 1.0), LossError, "step returned a float"),
    "loss that is a number": (
        lambda: scored(loss_fn=lambda o, t: 1.0),
        LossError,
        "loss_fn returned a float",
    ),
    "loss of whole numbers": (
        lambda: scored(loss_fn=lambda o, t: t.sum()),
        LossError,
        "returned a torch.int64",
    ),
    "loss of many numbers": (
        lambda: scored(loss_fn=lambda o, t: (o - 1).square()),
        LossError,
        r"3 numbers, of shape \(1, 3\), for one example.*\.sum\(\) or \.mean\(\)",
    ),
    "targets that do not fit": (
        lambda: scored(DataLoader(TensorDataset(X, Y), 4, collate_fn=lambda rows: (X[:4], Y[:3]))),
        ScoringError,
        r"target is a Tensor of shape \(3,\), but the batch has 4 examples",
    ),
    "two rows for each example": (
        lambda: scored(DataLoader(TensorDataset(X, Y), 4, collate_fn=lambda rows: (X[:8], Y[:8]))),
        ScoringError,
        r"model output is a Tensor of shape \(8, 3\), but the batch has 4 examples",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


class Pooling(nn.Module):
    """Loses the batch: one row for every two examples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[::2]


def test_an_output_of_another_size_than_the_batch_is_refused() -> None:
    with pytest.raises(PerexError, match="output"):
        score(Pooling(), examples(), nn.CrossEntropyLoss(), progress=False)


def test_a_loss_taken_from_the_output_of_the_whole_batch_is_refused() -> None:
    tagger = Tagger(lambda out: {"logits": out, "loss": out.square().mean()})
    tokens = torch.randint(0, 7, (N, 4))
    with pytest.raises(ScoringError, match=r"a Tensor of shape \(\), which has no row for each example"):
        score(tagger, (tokens, tokens), lambda output, target: output["loss"] * 2, progress=False)


# ---------------------------------------------------------------------- documentation


@pytest.mark.parametrize("name", ["data", "errors", "losses", "nest", "plot", "score", "scores", "state"])
def test_the_examples_in_the_docstrings_run(name: str) -> None:
    module = importlib.import_module("perex.scoring.score" if name == "score" else f"perex.scoring.{name}")
    failed, tried = doctest.testmod(module, extraglobs={"progress": False})
    assert tried and not failed


def test_cuda_graphs_are_for_gpus_and_for_norms():
    model, pool = nn.Linear(3, 2), (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ScoringError, match="cuda_graphs=True needs a GPU, and the model is on cpu"):
        score(model, pool, nn.CrossEntropyLoss(), cuda_graphs=True)
    quantities = {"grads": Grads()}
    with pytest.raises(ScoringError, match="further quantities"):
        score(model, pool, nn.CrossEntropyLoss(), quantities=quantities, cuda_graphs=True)


def test_a_last_batch_of_one_tells_nothing_of_noise():
    model, noise = nn.Linear(3, 2), NoiseScale()
    score(model, (torch.randn(9, 3), torch.zeros(9, 2)), nn.MSELoss(), quantities={"noise": noise}, batch_size=4)
    assert list(noise.weights.values()) == pytest.approx([1 - 0.95**2] * 2) and repr(noise).startswith("NoiseScale(")


def test_forms_of_batches_tell_apart_what_a_recording_would_confuse():
    one, other = torch.zeros(2, 3), torch.ones(2, 3)
    batches = [
        {"a": one, "b": other},
        {"b": one, "a": other},
        {"a": one, "c": other},
        (one, other),
        [one, other],
        ((one, other),),
        (one, other, 1),
        (one, other, 2),
        (one, other.double()),
        (one, torch.ones(3, 2).T),
        (one[:1], other),
    ]
    forms = [form_of(batch) for batch in batches]
    assert len(set(forms)) == len(batches) and None not in forms
    assert form_of({"a": other, "b": one}) == forms[0]
    assert form_of((one, object())) is None and form_of({"a": one, "b": {1, 2}}) is None


def test_what_else_can_be_done_is_said() -> None:
    """Where model or criterion are called in another way than theirs."""

    class Outputs(dict):
        """What no criterion takes."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
            return Outputs(logits=self.layer(x))

    class Two(Whole):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return x

    data = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    criterion = nn.CrossEntropyLoss()
    for model, says in ((Whole(), r"loss_fn\(output, target\) raised TypeError.*a Outputs; .*step=lambda"),
                        (Two(), r"model\(x\) raised TypeError.*a Tensor; .*step=lambda")):  # fmt: skip
        with pytest.raises(ScoringError, match=says):
            score(model, data, criterion, progress=False)
    model = nn.Linear(3, 2)
    with pytest.raises(PerexError, match="compute the losses from its outputs"):
        score(model, data, step=lambda m, batch: criterion(m(batch[0]), batch[1]), progress=False)
    with pytest.raises(ScoringError, match="quantities is a list; pass a dict"):
        score(model, data, criterion, quantities=[Gram()], progress=False)  # type: ignore[arg-type]
    scores = score(model, data, criterion, progress=False)
    with pytest.raises(ScoringError, match="k is 0.1; pass how many"):
        scores.top(0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "names",
    [("norm", "b"), ("loss", "b"), ("norm/0", "b"), ("file", "b"), ("p", "p/0"), ("val/cosine", "val")],
    ids="-".join,
)
def test_columns_do_not_take_each_others_places(names):
    model, data = nn.Linear(3, 2), (torch.randn(4, 3), torch.zeros(4, 2))
    quantities = dict(zip(names, (Projections(2), Gram()), strict=True))
    with pytest.raises(ScoringError, match="another"):
        score(model, data, nn.MSELoss(), quantities=quantities)


def test_one_statistic_under_two_names():
    model, data, gram = nn.Linear(3, 2), (torch.randn(4, 3), torch.zeros(4, 2)), Gram()
    with pytest.raises(ScoringError, match="one object"):
        score(model, data, nn.MSELoss(), quantities={"a": gram, "b": gram})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_ranked_by_what_has_no_negatives(dtype):
    extra = {"k": torch.tensor([0, 1, 0], dtype=dtype)}
    scores = Scores(np.arange(3), torch.zeros(3), torch.zeros(3), {}, extra)
    assert scores.top(1, by="k").ids.tolist() == [1] and scores.bottom(2, by="k").ids.tolist() == [0, 2]
