"""usage: python tools/guest [options] -- COMMAND [WORD...]

Boots Debian's Linux 6.12 under QEMU, with this machine's root file system read-only below an overlay in RAM, and runs
COMMAND in it, as root, in the current directory; what it writes below --write folders is there afterwards, nothing
else is. For what the kernel here lacks: device-mapper, nbd, ublk, ...

Exit status: the command's; 124: time was up; 125: the guest could not be had, or ended by itself.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from kernel import Failed, get
from machine import Machine, signals_end

ROOT = Path(__file__).resolve().parent.parent.parent


def folder(text: str) -> Path:
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no folder")
    if "\n" in str(path):
        raise argparse.ArgumentTypeError(f"{text!r}: a line feed in its name")
    return path


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number from 1 on is needed")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="guest", usage="python tools/guest [options] -- COMMAND [WORD...]",
                                     description=(__doc__ or "").partition("\n\n")[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--write", metavar="FOLDER", type=folder, action="append", default=[],
        help="a folder of the host that is the same one in the guest (not for memory-mapped files); repeatable")
    add("--time", metavar="SECONDS", type=positive, default=300, help="limit (default: 300)")
    add("--cpus", metavar="N", type=positive, default=min(4, len(os.sched_getaffinity(0))),
        help="default: those of this machine, at most 4")
    add("--memory", metavar="SIZE", default="2G", help="for QEMU (default: 2G); files that the guest makes take of it")
    add("--no-kvm", dest="kvm", action="store_false", help="software emulation, even where there is /dev/kvm")
    add("--suite", help="of Debian's archive, for another kernel (default: the first with Linux 6.12 to be had)")
    add("--kernels", metavar="FOLDER", type=Path, default=ROOT / "build/guest",
        help="where kernels are unpacked, once (default: build/guest)")
    add("-v", "--verbose", action="store_true", help="the guest's console on standard error")
    add("command", metavar="COMMAND", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        with signals_end():
            kernel = get(options.kernels, options.suite, lambda text: print(f"guest: {text}", file=sys.stderr))
            kvm = options.kvm and os.access("/dev/kvm", os.R_OK | os.W_OK)
            return Machine(kernel, options.cpus, options.memory, options.time, kvm, options.write,
                           options.verbose).run(options.command)
    except Failed as error:
        print(f"guest: {error}", file=sys.stderr)
        return 125


if __name__ == "__main__":
    sys.exit(main())
