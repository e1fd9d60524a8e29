"""Errors of sedac_hf: one class per cause, every message says expected, found and what to do."""

from __future__ import annotations

__all__ = [
    "ArtefactError",
    "BaseNotFoundError",
    "CacheError",
    "CalibrationError",
    "CertificateError",
    "ConfigError",
    "FingerprintError",
    "FormatVersionError",
    "MissingExtraError",
    "ModeError",
    "NotNativeError",
    "SedacError",
    "UnsupportedModelError",
]


class SedacError(Exception):
    """Base class of every error that sedac_hf raises on purpose."""


class ConfigError(SedacError, ValueError):
    """A configuration value is outside what it may be."""


class MissingExtraError(SedacError, ImportError):
    """A package is missing that only one part of this one needs."""


class UnsupportedModelError(SedacError):
    """The base model is of a kind whose layers cannot be skipped safely."""


class NotNativeError(SedacError):
    """The native pass cannot run this model; the base's own modules can."""


class ModeError(SedacError, ValueError):
    """A mode was asked for that does not exist or cannot be used here."""


class CacheError(SedacError):
    """A cache has a form that cannot be used, no room for more, or is one of two given."""


class CalibrationError(SedacError):
    """Fitting or calibrating cannot go on with what it was given."""


class CertificateError(SedacError):
    """A certificate is missing, malformed or does not cover this use."""


class ArtefactError(SedacError):
    """An artefact on disk or on the Hub is damaged, incomplete or inconsistent."""


class FingerprintError(ArtefactError):
    """The artefact was made for another base model than the one at hand."""


class FormatVersionError(ArtefactError):
    """The artefact was written in a format this version does not read."""


class BaseNotFoundError(ArtefactError, FileNotFoundError):
    """The base model that an artefact names is not where it is looked for."""
