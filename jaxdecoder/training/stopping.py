"""Stop when asked: SIGINT (Ctrl-C) and SIGTERM, which is what a preemption notice is.

A call of the compiled step cannot be interrupted, so a thread listens, and work ends where it can
be gone on with. A second signal ends the process at once.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np

from jaxdecoder.errors import INTERRUPTED, Stopped, how_to_go_on

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE_SIGNAL = 0.5
"""Seconds within which what comes twice was meant once: a process may be told, and its group."""


class Stop:
    """Whether to stop. `idle`: there is nothing to save, so a signal ends the process at once."""

    def __init__(self, *, idle: bool = False) -> None:
        self.requested, self.idle = False, idle

    def check(self) -> None:
        """Raise `Stopped` if it is asked for. Call it where nothing would be lost."""
        if self.requested:
            raise Stopped("stopped")


@contextlib.contextmanager
def listening(*, idle: bool = False) -> Iterator[Stop]:
    """Listen to the signals, but for those that this process ignores, until the block ends.

    Outside the main thread, where Python sets no handlers, the `Stop` is never requested. Within
    another such block, the inner one is told.
    """
    stop = Stop(idle=idle)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    ours = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    read, write = socket.socketpair()
    write.setblocking(False)
    thread = threading.Thread(target=_listen, args=(read, stop), daemon=True)
    before = {s: signal.getsignal(s) for s in ours}
    woken = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    thread.start()
    for s in ours:
        # Python writes the signal's number to the socket; the handler has nothing left to do.
        signal.signal(s, lambda number, frame: None)
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        signal.set_wakeup_fd(woken)
        write.close()
        thread.join()
        read.close()


def anywhere(*flags: bool) -> list[bool]:
    """Return which of these flags are set on any host. Every host must ask at the same places."""
    if jax.process_count() == 1:
        return list(flags)
    from jax.experimental import multihost_utils

    gathered = np.asarray(multihost_utils.process_allgather(np.array(flags)))
    return [bool(each.any()) for each in gathered.T]


def _listen(read: socket.socket, stop: Stop) -> None:
    # A helper is told by its parent, and perhaps by the system too; its parent speaks to the user.
    helper = multiprocessing.parent_process() is not None
    first = math.inf
    while data := read.recv(1):
        if data[0] not in SIGNALS or (stop.requested and helper):
            continue
        if stop.requested and time.monotonic() - first < ONE_SIGNAL:
            continue
        if stop.requested:
            _leave(INTERRUPTED, "stopped at once")
        if stop.idle:
            _leave(0, "" if helper else f"stopped; nothing new was to be saved; {how_to_go_on()}")
        stop.requested, first = True, time.monotonic()
        if not helper:
            _say("stopping: what is new is saved first; a second time stops at once")


def _leave(status: int, why: str) -> None:
    """End the process, whatever its main thread waits for."""
    if why:
        _say(why)
    os._exit(status)


def _say(text: str) -> None:
    show_cursor = "\033[?25h" if sys.stderr.isatty() else ""  # the progress bar hides it
    with contextlib.suppress(OSError, ValueError):
        print(f"{show_cursor}\n{text}", file=sys.stderr, flush=True)
