"""Ctrl-C at a bad moment: one line and whole files all the same.

Python loses the exception where it arises in the middle of a fork, and torch turns it into an error
of its own where it arises while a checkpoint is written. So it waits until either is done. It
reaches the processes that load images, too, and they leave it to the first one to end them.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["held_back", "ignore", "started"]


@contextmanager
def held_back() -> Iterator[None]:
    """A KeyboardInterrupt from within comes at the end."""
    if threading.current_thread() is not threading.main_thread():
        # Signals are the main thread's.
        yield
        return
    seen: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if seen:
            raise KeyboardInterrupt


def ignore(worker: int) -> None:
    """What a loader's process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def started(loader: Any) -> Iterator[Any]:
    """`iter(loader)`, which starts its processes."""
    with held_back():
        return iter(loader)
