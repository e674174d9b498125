"""Errors a user can act on. Everything else that escapes is a defect."""


class MspError(ValueError):
    """The work cannot be done as asked; the message names the thing at fault (exit code 1)."""


class UsageError(MspError):
    """The request itself is wrong: an unknown name, a value out of range (exit code 2)."""
