"""What private training refuses."""

from __future__ import annotations

from opacus.validators.errors import UnsupportedModuleError

from perex.errors import ExamplesMixError, PerexError


class PrivacyError(PerexError):
    """A step would not be private: gradients that were not clipped one by one would reach the parameters."""


class BatchStatisticsError(ExamplesMixError, UnsupportedModuleError):
    """A module would write or use statistics of a batch, which no clipping covers."""
