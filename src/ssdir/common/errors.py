"""Errors that a user can correct; the command line prints them as one line."""

from __future__ import annotations


class UserError(ValueError):
    """Something in the input, a file or a setting is wrong; the message says what, where, and what to do."""


class ConfigError(UserError):
    """A setting that cannot be used; the message names it and the remedy."""


class DataError(UserError):
    """Data that cannot be used; the message names the file and the remedy."""


class TrainingError(UserError):
    """A run that cannot go on; the message says at which step and why. Its last checkpoint is good."""
