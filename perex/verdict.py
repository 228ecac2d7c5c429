"""From a trial to a verdict: does perex agree with the loop, and if not, why?"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from perex.attaching import attach
from perex.errors import PerexError
from perex.report import Report
from perex.rules.registry import MODULES, OPERATORS
from perex.trial import Trial, close
from perex.verification import Comparison, Verdict, Verification

TOLERANCES = {torch.float64: (1e-6, 1e-8), torch.float32: (1e-2, 1e-4)}
"""Relative differences of norms, and of losses, that are rounding. Half precision has those of `HALF`."""

HALF = (0.2, 0.05)


@dataclass
class Case:
    """What is known while a verdict is found; see `Verification` for the fields."""

    dtype: torch.dtype
    notes: list[str]
    rows: list[Comparison] = field(default_factory=list)
    mixing: str | None = None
    error: Exception | None = None
    report: Report | None = None

    def closed(self, verdict: Verdict, summary: str) -> Verification:
        """The result."""
        return Verification(
            verdict, summary, self.rows, self.mixing is None, self.dtype, self.notes, self.error, self.report
        )


def judge(trial: Trial, dtype: torch.dtype, notes: list[str]) -> Verification:
    """Run perex and the loop on a trial, and compare.

    Args:
        trial: model and examples, which run in this precision.
        dtype: the lowest precision that their numbers go through.
        notes: what the result is to mention.
    """
    case = Case(dtype, notes)
    rtol, loss_rtol = TOLERANCES.get(dtype, HALF)
    together = trial.together()
    if not bool(close(trial.together(seed=1), together, loss_rtol).all()):
        return case.closed(
            "random",
            "perex cannot be compared with the loop: two runs of the same examples have different losses. The model "
            'draws random numbers (dropout in mode="train", for one) or keeps something from run to run. With '
            'mode="eval", or without that, there is something to compare.',
        )
    try:
        losses, loop = trial.alone()
    except Exception as error:  # a batch norm in training mode, for one
        return without_loop(trial, case, error)
    if trial.n == 1:
        notes.append("one example cannot show whether examples influence each other: pass a batch of several")
    if not bool(close(together, losses, loss_rtol).all()):
        worst = int((together - losses).abs().nan_to_num(float("inf")).argmax())
        case.mixing = (
            f"examples influence each other: example {worst} has a loss of {float(losses[worst]):.6g} alone, and of "
            f"{float(together[worst]):.6g} in the batch. It begins in "
            f"{trial.differs(loss_rtol) or 'the loss, or in the step: modules return the same in both'}"
        )
    try:
        norms, case.report = by_perex(trial)
    except PerexError as error:
        case.error = error
        tail = "" if case.mixing is None else f" It is right to, as {case.mixing}."
        return case.closed("refused", f"perex refuses. {sentence(error)}{tail}")
    except Exception as error:
        case.error = error
        return case.closed(
            "fails",
            f"perex fails. {sentence(error)} The model runs without it, so that is a bug of perex, or of a rule of "
            "your own: please file an issue with the traceback of `.error`.",
        )
    case.rows = compared(norms, loop, case.report, rtol, dtype)
    wrong = [row for row in case.rows if not row.agrees]
    if not wrong:
        if case.mixing is not None:
            notes.append(f"{case.mixing}. Norms of the gradients are the same even so")
        bound = max((row.difference for row in case.rows), default=0.0)
        return case.closed(
            "agrees",
            f"perex agrees with the loop: gradient norms of {counted(trial.n, 'example')} differ by {bound:.1e} at "
            f"most (relative), over {counted(len(case.rows), 'parameter')}, in {name_of(dtype)}.",
        )
    if case.mixing is not None:
        return case.closed(
            "mixes",
            f"There is nothing to agree on, as {case.mixing}. So no example has a gradient of its own, which perex did "
            "not notice: please file an issue, unless it is a statistic of the batch that leaves torch, which perex "
            "cannot see. Take what mixes examples out of the model.",
        )
    return case.closed("disagrees", f"perex disagrees with the loop on {blame(wrong, case.report)}")


def by_perex(trial: Trial) -> tuple[dict[str, Tensor], Report]:
    """Norms `(n,)` by parameter, and the report."""

    def own(name: str, parameter: nn.Parameter) -> bool:
        return any(parameter is one for one in trial.parameters.values())

    px = attach(trial.model, params=own, param_grads=False, batch_dim=trial.batch_dim, audit=False, memory="none")
    with px, trial.run():
        px.backward(trial.compute(trial.model, trial.batch, trial.n))
        norms = px.norms(by="parameter")
        assert isinstance(norms, dict)
        return norms, px.report()


def without_loop(trial: Trial, case: Case, alone: Exception) -> Verification:
    """Where the model runs on the batch but not on one example: a refusal can be told, and nothing compared."""
    try:
        by_perex(trial)
    except PerexError as error:
        case.error = error
        why = f"The model does not run on one example alone ({first_line(alone)}), so there is no loop either."
        return case.closed("refused", f"perex refuses. {sentence(error)} {why}")
    raise alone


def compared(
    norms: dict[str, Tensor], loop: dict[str, Tensor], report: Report, rtol: float, dtype: torch.dtype
) -> list[Comparison]:
    """A row for each parameter, in the order in which the forward uses them.

    Squares are compared, as a norm's rounding error is that of its square; a gradient that is zero but for rounding,
    in relation to the example's gradient over all parameters, agrees with zero.
    """
    order: dict[str, tuple[int, str]] = {}
    for place, row in enumerate(report.rows):
        for name in row.parameters:
            order.setdefault(name, (place, row.module))
    total = torch.stack(list(loop.values())).square().sum(0).nan_to_num()  # (n,)
    floor = torch.finfo(dtype).eps ** 0.5 * total
    rows = []
    for name in sorted(loop, key=lambda name: order.get(name, (len(report.rows), ""))[0]):
        expected = loop[name]
        found = norms[name].detach().cpu().double() if name in norms else torch.zeros_like(expected)
        gap = (found.square() - expected.square()).abs()
        same = (gap <= 2 * rtol * (expected.square() + floor)) | (found.isnan() & expected.isnan())
        same |= found == expected
        larger = torch.maximum(found, expected).maximum(1e-3 * total.sqrt())
        relative = torch.where(same & ~gap.isfinite() | (found == expected), 0, (found - expected).abs() / larger)
        relative = relative.nan_to_num(float("inf"))
        worst = int((relative + torch.where(same, 0, 1)).argmax())
        module = order.get(name, (0, name.rpartition(".")[0]))[1]
        difference = float(relative[worst])
        rows.append(Comparison(name, module, found, expected, difference, worst, bool(same.all())))
    return rows


def blame(wrong: list[Comparison], report: Report) -> str:
    """Which parameters disagree, by how much, through which rule, and what to do."""
    first, far = wrong[0], max(row.difference for row in wrong)
    names = ", ".join(row.parameter for row in wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
    text = f"{counted(len(wrong), 'parameter')} ({names}), by up to {100 * far:.2g} % of the norm, while losses agree. "
    used = [row for row in report.rows if first.parameter in row.parameters]
    if not used:
        return f"{text}perex saw no use of '{first.parameter}' in the forward: please file an issue."
    place = f"module '{used[0].module}'" if used[0].module else "the model's own forward"
    text += f"Look at {place} first, where `{used[0].operator}` goes by the rule '{used[0].rule}'. "
    rules = [rule for rule in (*OPERATORS.values(), *MODULES.values()) if rule.name == used[0].rule]
    if any(not rule.function.__module__.startswith("perex.") for rule in rules):
        return f"{text}That rule is one of your own: check its formula."
    aside = f"params=lambda name, p: name != '{first.parameter}'"
    return f"{text}That is a bug of perex: please file an issue with that module. Until then, leave it out: {aside}."


def counted(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name, `float64`."""
    return str(dtype).removeprefix("torch.")


def sentence(error: Exception) -> str:
    """An error's kind and message, with a full stop."""
    text = str(error) if isinstance(error, PerexError) else first_line(error)
    return f"{type(error).__name__}: {text.rstrip('.')}."


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
