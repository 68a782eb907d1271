"""The ``tenure`` command: reads the command line, calls one verb, prints, and ends with a documented exit code.

Not here: what the verbs do (`tenure.verbs`), how things are printed (`output`, `display`), the code table (`exits`).
Errors become one message on stderr, without a trace unless TENURE_DEBUG is set; with --json also an object on stdout.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType

from tenure.cli import exits
from tenure.cli.output import as_json, clean_lines, say
from tenure.errors import Refused, TenureError


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command line and leave the process with its exit code.

    argv: without the program's name; None takes this process's own.
    """
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code; `exits.MEANINGS` tells what each says."""
    # imported here so that an error in importing is also told in one line
    import typer

    from tenure.cli.commands import app

    json = "--json" in argv
    try:
        with _sigterm_interrupts():
            code = app(args=list(argv), prog_name="tenure", standalone_mode=False)
        if code == exits.INTERRUPTED:  # typer turned Ctrl-C into a code
            raise KeyboardInterrupt
        sys.stdout.flush()
        return code if isinstance(code, int) else exits.OK
    except (KeyboardInterrupt, typer.Abort):
        return _tell(
            KeyboardInterrupt(),
            'interrupted. "tenure runs" shows a run that was under way, "tenure run --resume RUN" goes on',
            json,
        )
    except BrokenPipeError:
        _silence_stdout()  # the reader has seen enough: `tenure events | head`
        return exits.OK
    except TenureError as error:
        return _tell(error, str(error), json)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's own: a wrong command line
            return _usage_error(error, json)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" at {error.filename}" if error.filename else " where Tenure keeps its state ($TENURE_HOME, or --home)"
            full = Refused(f"the disk is full{where}: free space there and try again")
            return _tell(full, str(full), json)
        if isinstance(error, OSError) and error.filename:
            return _tell(error, f"{error.filename}: {error.strerror}", json)
        return _tell(error, f"unforeseen {type(error).__name__}: {error}; this is a bug, TENURE_DEBUG=1 shows where", json)


def _tell(error: BaseException, message: str, json: bool) -> int:
    """Print an error once for people, and for programs if asked; return its exit code."""
    code = exits.exit_code(error)
    if os.environ.get("TENURE_DEBUG"):
        traceback.print_exc()
    say(clean_lines(f"tenure: {message}"), sys.stderr)
    if json:
        _print_error(type(error).__name__, message, code)
    return code


def _usage_error(error: Exception, json: bool) -> int:
    """Print what typer says of a wrong command line, with the line that leads to help."""
    message = str(error.format_message())  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "tenure"
    say(f'tenure: {message.rstrip(".")}. See "{path} --help".', sys.stderr)
    if json:
        _print_error("UsageError", message, exits.WRONG_INPUT)
    return exits.WRONG_INPUT


def _print_error(kind: str, message: str, code: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        say(as_json({"error": {"kind": kind, "message": message, "exit_code": code}}), sys.stdout)


def _silence_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM, and a terminal that is closed, end a command as Ctrl-C does, so that what it started is cleaned up too."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]  # nohup stays in force
    try:
        before = {number: signal.signal(number, interrupt) for number in numbers}
    except ValueError:  # not the main thread: someone else owns the signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
