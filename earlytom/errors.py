"""Errors a caller can act on: each carries one sentence that says what was wrong, where, and what would fit."""


class EarlyTomError(Exception):
    """Base of every error this project raises on purpose; the command line prints it without a traceback."""


class ConfigError(EarlyTomError, ValueError):
    """A setting, or a combination of settings, that cannot hold."""


class InputError(EarlyTomError, ValueError):
    """A tensor or argument with the wrong shape, dtype or value."""


class CheckpointError(EarlyTomError):
    """A checkpoint that is missing, foreign, truncated or does not fit its own configuration."""


class VideoError(EarlyTomError):
    """A video that cannot be read or is too short."""


class ExportError(EarlyTomError):
    """An ONNX graph that could not be made or breaks a rule."""


class BundleError(EarlyTomError):
    """A bundle that is incomplete, damaged, edited, too new, or cannot be written."""


class EngineError(EarlyTomError):
    """An engine that is missing, cannot be built, or cannot run on this machine."""


class ParityError(EarlyTomError):
    """Two implementations disagree beyond tolerance."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
