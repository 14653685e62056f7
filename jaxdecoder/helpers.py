"""Helper processes: spawned, not forked, for JAX has threads, and a fork of them may hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager

SPAWN = multiprocessing.get_context("spawn")


def start_helper() -> None:
    """Leaves interrupts to the parent, and goes when the parent goes, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


@contextmanager
def no_main_module() -> Iterator[None]:
    """Hides the running script from helpers while they start.

    They would import it first: train.py with the model and all, and a script on standard input
    could not be found. They need nothing of it.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
