"""A process that becomes another user's, and keeps no more than it needs: user, groups, capabilities, no-new-privileges."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Collection

__all__ = ["CAPABILITIES", "become", "bound", "flusher", "held", "keep", "no_new"]

# linux/capability.h: those that a serving process may need.
CAPABILITIES = {"CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_FOWNER": 3,
                "CAP_NET_ADMIN": 12, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21, "CAP_SYS_RESOURCE": 24,
                "CAP_MKNOD": 27, "CAP_BPF": 39}
_VERSION = 0x20080522           # _LINUX_CAPABILITY_VERSION_3
_PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT = 8, 38, 24, 47   # linux/prctl.h
_PR_SET_IO_FLUSHER = 57  # Linux 5.6
_PR_CAP_AMBIENT_CLEAR_ALL = 4


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Data(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _prctl(option: int, *arguments: int) -> int:
    return int(_libc().prctl(option, *(ctypes.c_ulong(each) for each in (*arguments, *[0] * (4 - len(arguments))))))


def become(uid: int, gid: int, groups: Collection[int], capabilities: Collection[str] = ()) -> None:
    """Becomes that user for good, with these capabilities of root's and no others; nothing gives any back.

    Precondition: root, and the only thread: capabilities are each thread's own. Raises OSError; what was given up by then
    stays so.
    """
    if threading.active_count() > 1:
        raise RuntimeError("there are other threads, which would keep what they are")
    bound(capabilities)
    _check(_prctl(_PR_SET_KEEPCAPS, 1), "capabilities cannot be kept")
    os.setgroups(sorted({gid, *groups}))
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _check(_prctl(_PR_SET_KEEPCAPS, 0), "capabilities cannot be dropped")
    keep(capabilities)
    no_new()
    if uid and os.getresuid() != (uid, uid, uid):
        raise OSError(errno.EPERM, "the user is not what it should be")


def bound(capabilities: Collection[str]) -> None:
    """From here on no program that is executed has other capabilities, not root's either. Precondition: CAP_SETPCAP. Raises
    OSError."""
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for number in set(range(last + 1)) - {CAPABILITIES[name] for name in capabilities}:
        _check(_prctl(_PR_CAPBSET_DROP, number), "capabilities cannot be bounded")


def no_new() -> None:
    """From here on no program that is executed gives more than there is. Raises OSError."""
    _check(_prctl(_PR_SET_NO_NEW_PRIVS, 1), "no-new-privileges cannot be set")


def flusher() -> bool:
    """Marks this thread, and those that it will start, as ones that writeback depends on: they do not wait, as memory runs
    out, for what they are to write themselves. False: refused (CAP_SYS_RESOURCE), or before Linux 5.6."""
    return _prctl(_PR_SET_IO_FLUSHER, 1) == 0


def keep(capabilities: Collection[str]) -> None:
    """Gives up every capability but these, of the calling thread and those that it will start. Raises OSError."""
    bits = sum(1 << CAPABILITIES[name] for name in set(capabilities))
    data = (_Data * 2)(*(_Data(word, word, 0) for word in (bits & 0xFFFFFFFF, bits >> 32)))
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)      # absent before Linux 4.3: then there are none
    _check(_libc().capset(ctypes.byref(_Header(_VERSION, 0)), ctypes.byref(data)), "capabilities cannot be dropped")


def held() -> int:
    """Bits of the capabilities that the calling thread may use. Raises OSError."""
    data = (_Data * 2)()
    _check(_libc().capget(ctypes.byref(_Header(_VERSION, 0)), ctypes.byref(data)), "capabilities cannot be read")
    return int(data[0].effective | data[1].effective << 32)
