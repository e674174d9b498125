"""Errors a user can act on. Everything else that escapes is a defect."""


class MspError(ValueError):
    """The work cannot be done as asked; the message names the thing at fault (exit code 1)."""


class UsageError(MspError):
    """The request itself is wrong: an unknown name, a value out of range (exit code 2)."""


def system_reason(error: Exception) -> str:
    """The reason in an ``OSError`` without its number and path; the message of any other error."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
