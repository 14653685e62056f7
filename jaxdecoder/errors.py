"""Errors for the user: shown as one message, without a traceback."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can correct. The message says what is wrong, where, and the fix."""


def first_line(error: Exception) -> str:
    """Return the beginning of another library's message, or the error's name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def not_utf8(text: str) -> bool:
    """Return whether a text has bytes that are not UTF-8, which Python holds as half surrogates."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def friendly(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a script's `main`: a `UserError` ends the script with its message and status 1.

    Every other exception keeps its traceback, because it is a mistake in the program.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except BrokenPipeError:
            # The reader of our output is gone, so nothing more can be flushed to it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapped
