"""The base of every error that a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """Something in the input, a file or a setting is wrong; the message says what, where, and what to do."""


class DataError(UserError):
    """Data that cannot be used; the message names the file and the remedy."""
