"""Errors for the user, shown as one message without a traceback; output for any terminal."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import os
import shlex
import sys
from collections.abc import Callable

REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.ELOOP),
)
"""Why a system refuses a file: no program can help it."""


class UserError(Exception):
    """A mistake that the user can correct. The message says what is wrong, where, and the fix."""


class Stopped(Exception):
    """Work that ended before its end because it was asked to, with nothing lost."""


INTERRUPTED = 130
"""The status of a script that was interrupted, as shells give it: 128 and the number of SIGINT."""


def first_line(error: Exception) -> str:
    """Return the beginning of another library's message, or the error's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def not_utf8(text: str) -> bool:
    """Return whether a text has bytes that are not UTF-8, which Python holds as half surrogates."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def shell_word(path: str | os.PathLike[str]) -> str:
    """Return a path as it can be pasted into a command: quoted, and never like an option."""
    text = os.fspath(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def how_to_go_on() -> str:
    """Return the command that goes on with what this script was stopped in."""
    return f"to go on: {shlex.join(['python', *sys.argv])}"


def show_any_text() -> None:
    """Let standard output take any text: what it cannot show becomes ?, and closed, it is void."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def friendly(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a script's `main`: a `UserError` ends the script with its message and status 1.

    A script that was `Stopped` says how to go on, and ends with status 0. An output that cannot be
    written ends it with status 1, unless its reader has gone, which is no mistake. Every other
    exception keeps its traceback, because it is a mistake in the program.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        show_any_text()
        lost = None
        try:
            status = _ended(main)
        except OSError:
            if (lost := _lost_output("\n")) is None:
                raise
            status = 0
        lost = lost or _lost_output()
        if lost is not None and not isinstance(lost, BrokenPipeError):
            _complain(f"error: the output cannot be written: {lost.strerror}", 1)
            status = status or 1
        if status:
            sys.exit(status)

    return wrapped


def _ended(main: Callable[[], None]) -> int:
    """Run a script's `main`, say what went wrong, and return the status."""
    try:
        main()
    except UserError as error:
        return _complain(f"error: {error}", 1)
    except Stopped as stopped:
        return _complain(f"{stopped}; {how_to_go_on()}", 0)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except OSError as error:
        if error.errno not in REFUSALS or error.filename is None:
            raise
        return _complain(f"error: {error.filename}: {error.strerror}", 1)
    except UnicodeEncodeError as error:
        if sys.getfilesystemencoding() == "utf-8":
            raise
        strange = error.object[error.start : error.end]
        why = "the names of files here cannot have it; set the environment variable PYTHONUTF8=1"
        return _complain(f"error: {strange!a}: {why}", 1)
    except SystemExit as end:  # from the parser of the command line
        for option, value in itertools.pairwise(sys.argv if end.code else []):
            if option.startswith("--") and "=" not in option and value.startswith("-"):
                meant = shlex.join([f"{option}={value}"])
                _complain(f"If {value} is meant to be the value of {option}, write {meant}", 2)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _complain(message: str, status: int) -> int:
    with contextlib.suppress(OSError):  # there may be nobody to tell
        print(message, file=sys.stderr, flush=True)
    return status


def _lost_output(probe: str = "") -> OSError | None:
    """Return why standard output takes no more, or None if it does; then nobody asks again.

    `probe` is written, for an output without a buffer only fails while it is written to.
    """
    try:
        print(end=probe, flush=True)
    except OSError as error:
        # Python flushes once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None
