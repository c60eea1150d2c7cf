"""Errors that tensormill raises on purpose; each message says what was given and what is expected."""


class TensormillError(Exception):
    """Base of every error a caller can cause. The command line prints it in one line and exits with 2."""


class InvalidArgument(TensormillError, ValueError):
    """An argument has the wrong shape, dtype, device, range or combination."""


class CheckpointError(TensormillError):
    """A checkpoint is missing, incomplete, damaged, or not what the call needs."""


class ModelError(TensormillError):
    """A model has a structure that the called method can't handle."""


class DataError(TensormillError):
    """A text or data set is missing, empty, or too small for the call."""


class RecipeError(TensormillError):
    """A recipe is malformed or its steps contradict one another."""


class OutputError(TensormillError):
    """A result could not be written; nothing was left half-written."""


class BackendError(TensormillError):
    """An implementation was asked for that can't run here."""
