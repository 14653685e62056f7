"""Errors for the person at the keyboard: they are shown as one message, without a traceback."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake the user can mend; the message says what, where, and what would be right."""


def friendly(main: Callable[[], None]) -> Callable[[], None]:
    """Wraps a script's `main`: a `UserError` ends it with its message and status 1.

    Every other exception keeps its traceback, because it is a mistake of ours.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except BrokenPipeError:
            # Whoever read our output has seen enough; nothing more can be flushed to them.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapped
