"""Pools: stream any data through a model once, and keep every example's loss and gradient norm."""

from perex.scoring.errors import ScoringError
from perex.scoring.score import score
from perex.scoring.scores import Scores

__all__ = ["Scores", "ScoringError", "score"]
