"""Differentially private training with Opacus: `pip install "perex[opacus]"`."""

try:
    import opacus as _  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "opacus":
        raise
    raise ModuleNotFoundError('perex.privacy needs Opacus: pip install "perex[opacus]"', name="opacus") from error

from perex.privacy.controller import Controller
from perex.privacy.engine import PrivacyEngine
from perex.privacy.errors import BatchStatisticsError, PrivacyError

__all__ = ["BatchStatisticsError", "Controller", "PrivacyEngine", "PrivacyError"]
