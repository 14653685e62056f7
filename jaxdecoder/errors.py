"""Errors for the user: shown as one message, without a traceback."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can correct. The message says what is wrong, where, and the fix."""


class Stopped(Exception):
    """Work that ended before its end because it was asked to, with nothing lost."""


INTERRUPTED = 130
"""The status of a script that was interrupted, as shells give it: 128 and the number of SIGINT."""


def first_line(error: Exception) -> str:
    """Return the beginning of another library's message, or the error's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def how_to_go_on() -> str:
    """Return the command that goes on with what this script was stopped in."""
    return f"to go on: {shlex.join(['python', *sys.argv])}"


def friendly(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a script's `main`: a `UserError` ends the script with its message and status 1.

    A script that was `Stopped` says how to go on, and ends with status 0.
    Every other exception keeps its traceback, because it is a mistake in the program.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except Stopped as stopped:
            print(f"{stopped}; {how_to_go_on()}", file=sys.stderr)
        except BrokenPipeError:
            # The reader of our output is gone, so nothing more can be flushed to it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)

    return wrapped
