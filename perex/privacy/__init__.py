"""Differentially private training with Opacus: `pip install "perex[opacus]"`."""

from perex.privacy.controller import Controller
from perex.privacy.engine import PrivacyEngine
from perex.privacy.errors import BatchStatisticsError, PrivacyError

__all__ = ["BatchStatisticsError", "Controller", "PrivacyEngine", "PrivacyError"]
