"""Helper processes, spawned and not forked: JAX has threads, and a forked process may hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager

from jaxdecoder.errors import show_any_text

SPAWN = multiprocessing.get_context("spawn")


def start_helper() -> None:
    """Ignore interrupts, print any text, and end when the parent ends, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    show_any_text()
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


@contextmanager
def no_main_module() -> Iterator[None]:
    """Hide the running script from helpers while they start.

    Otherwise they would import it first: train.py with the whole model, or a script on standard
    input, which cannot be found. They need nothing from it.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
