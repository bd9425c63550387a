"""The command line: one module per command; the only place that prints.

Exit status: 0 done, 1 something failed, 2 usage.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status."""
    # A KeyboardInterrupt raised while modules are imported may be lost: the import system runs code as weak reference
    # callbacks, where exceptions are only printed. Until everything is loaded nothing exists that would have to be
    # removed, and SIGINT ends the process as SIGTERM does.
    raises = (signal.getsignal(signal.SIGINT) is signal.default_int_handler
              and threading.current_thread() is threading.main_thread())

    def interrupts() -> None:
        if raises:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    if raises:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from muenfast.cli import _main

        return _main.main(argv, interrupts)
    finally:
        interrupts()


def muennet_cfg(argv: Sequence[str] | None = None) -> int:
    """The program of that name; the exit status."""
    from muenfast.cli import netcfg

    return netcfg.program(argv)
