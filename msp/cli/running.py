"""Runs a verb: progress, errors, exit codes, and the streams of its output."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from msp.errors import MspError, UsageError

if TYPE_CHECKING:
    from msp.base.progress import Progress

FAILED, WRONG_USAGE = 1, 2
# Messages of torch and the system if there is no more memory.
NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory")
MORE_MEMORY = "msp prune --dry-run says how much a run takes; --stream takes one block at a time"


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end; the clean-up is that of Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM, and SIGHUP unless it is ignored as under nohup, raise ``Stopped`` within the context, each once."""

    def stop(number: int, _: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # the clean-up is under way
        raise Stopped(number)

    before: dict[int, Any] = {}
    asking: tuple[int, ...] = (signal.SIGTERM, signal.SIGHUP)
    if threading.current_thread() is threading.main_thread():
        for number in asking:
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Running:
    """A running verb: the target of its progress, and its result."""

    def __init__(self, progress: Progress, console: Console, as_json: bool) -> None:
        self.progress = progress
        self.console = console
        self._as_json = as_json
        self._shown: tuple[Any, RenderableType] | None = None

    def result(self, data: Any, report: RenderableType) -> None:
        """Set the result: ``data`` for ``--json``, ``report`` for a reader."""
        self._shown = (data, report)

    def say(self, message: str) -> None:
        """Print a line on standard error, in addition to the result."""
        self.console.print(Text(message))

    def print_result(self) -> None:
        from msp.show.report import to_json

        if self._shown is None:
            return
        data, report = self._shown
        if self._as_json:
            print(to_json(data), flush=True)
        else:
            Console().print(report)


@contextlib.contextmanager
def running(as_json: bool, debug: bool, *, on_interrupt: str = "interrupted") -> Iterator[Running]:
    """Runs a verb: progress to standard error, errors to one line and an exit code, 128 + its number for a signal.

    All output of libraries goes to standard error, so that standard output holds the result alone.
    """
    from msp.show.report import RichProgress

    console = Console(stderr=True)
    try:
        with (
            stopped_by_signals(),
            contextlib.redirect_stdout(sys.stderr),
            _quiet(console, debug),
            RichProgress(console) as progress,
        ):
            session = Running(progress, console, as_json)
            yield session
        session.print_result()
    except typer.Exit:
        raise
    except Stopped as stopped:
        _fail(console, on_interrupt, 128 + stopped.number, debug)
    except KeyboardInterrupt:
        _fail(console, on_interrupt, FAILED, debug)
    except MspError as error:
        _fail(console, str(error), WRONG_USAGE if isinstance(error, UsageError) else FAILED, debug)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        if out_of_memory(error):
            _fail(
                console,
                f"the memory does not suffice: {lines[0] or 'no more can be had'}; {MORE_MEMORY}",
                FAILED,
                debug,
            )
        hint = "" if debug else " (run again with --debug for the traceback)"
        _fail(console, f"{type(error).__name__}: {lines[0]}{hint}", FAILED, debug)


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch on a CPU or a GPU, or the system ran out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(sign in str(error) for sign in NO_MEMORY)


def _fail(console: Console, message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc(file=sys.stderr)
    console.print(Text.assemble(("msp: ", "bold red"), message), soft_wrap=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def _quiet(console: Console, debug: bool) -> Iterator[None]:
    """Warnings meant for users as one line each; those meant for developers only with ``--debug``."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if debug or issubclass(category, UserWarning):
            console.print(Text.assemble(("warning: ", "yellow"), str(message)), soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def calm_libraries() -> None:
    """Suppress transformers' notices and its loading bar; downloads still show their bars."""
    import huggingface_hub.utils
    import transformers

    notices: Any = transformers.logging
    notices.set_verbosity_error()
    notices.disable_progress_bar()
    bars: Any = huggingface_hub.utils
    bars.enable_progress_bars()
