"""Exact per-example gradient norms for PyTorch, from one batched backward pass."""

from perex import factors
from perex.attaching import attach
from perex.errors import (
    ArgumentError,
    AttachError,
    ExamplesMixError,
    LossError,
    NotReadyError,
    PerexError,
    UnsupportedError,
)
from perex.gradients import Gradients
from perex.quantities import Dots, Grads, Gram, NoiseScale, Projections, Quantity
from perex.report import Report, Row
from perex.rules import (  # noqa: F401  (they register)
    broadcast,
    convolution,
    einsum,
    embedding,
    grouped,
    linear,
    normalization,
)
from perex.rules.call import Captured
from perex.rules.registry import module_rule, operator_rule
from perex.scoring import Scores, ScoringError, score
from perex.tracker import Tracker
from perex.verification import Comparison, Verification
from perex.verify import verify

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "AttachError",
    "Captured",
    "Comparison",
    "Dots",
    "ExamplesMixError",
    "Gradients",
    "Grads",
    "Gram",
    "LossError",
    "NoiseScale",
    "NotReadyError",
    "PerexError",
    "Projections",
    "Quantity",
    "Report",
    "Row",
    "Scores",
    "ScoringError",
    "Tracker",
    "UnsupportedError",
    "Verification",
    "attach",
    "factors",
    "module_rule",
    "operator_rule",
    "score",
    "verify",
]
