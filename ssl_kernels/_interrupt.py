"""Ctrl-C while `ssl-kernels`, or a trainer by `python -m`, loads its modules: a line instead of a traceback.

In every other program, importing this does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType


def _exit(number: int, frame: FrameType | None) -> None:
    """At once: nothing is written yet, and an import might swallow an exception."""
    os.write(2, b"ssl-kernels: interrupted\n")
    os._exit(130)


def over() -> None:
    """From now on Ctrl-C is an exception again."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_NAMES, _TRAINERS = ("ssl-kernels", "ssl_kernels.cli"), "ssl_kernels.trainers."
_is_command = any(os.path.basename(word) in _NAMES or word.startswith(_TRAINERS) for word in sys.orig_argv[1:4])
_in_main_thread = threading.current_thread() is threading.main_thread()
if _is_command and _in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _exit)
