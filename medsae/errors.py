"""Errors that a user can act on."""


class MedSAEError(Exception):
    """A user's error: one line that says what, where and what to do. The command exits with status 2 and prints no traceback."""


class ConfigError(MedSAEError):
    """A configuration value that cannot be used."""


class DataError(MedSAEError):
    """A manifest, image or embedding table that cannot be used."""


class WeightsError(MedSAEError):
    """Model weights that are missing, damaged, of the wrong variant or unsafe."""


class ArtifactError(MedSAEError):
    """An artifact of the run directory that is missing or does not fit."""


class ServiceError(MedSAEError):
    """A service that did not answer as agreed."""
