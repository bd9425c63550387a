"""What a process that serves may do at all, once it has its privileges given up: a filter of system calls, and Landlock.

The filter (seccomp) is a list of what is allowed; everything else is EPERM, and noted in the kernel's audit log where that
is on. It sees numbers and plain arguments, not what pointers lead to, and nothing of what is done through io_uring: so that
is left out where a process does without. Landlock says which files can be reached, by what they are, not by their
permissions, through io_uring too; what is open already, or comes from a broker, is not concerned.

Both are for good, and for every thread that is started later. docs/decisions/018 has the reasons, and figures.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import platform
import stat
import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from muenfast.errors import MuenfastError

__all__ = ["CALLS", "IOCTLS", "Files", "Landlock", "compiled", "install"]

log = logging.getLogger("muenfast")

# System calls and their numbers, on x86-64 and where numbers are the generic ones (asm-generic/unistd.h).
_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286), "pwritev2": (328, 287),
    "close": (3, 57), "close_range": (436, 436), "lseek": (8, 62), "open": (2, None), "openat": (257, 56),
    "openat2": (437, 437), "creat": (85, None), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44), "access": (21, None),
    "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78),
    "getdents64": (217, 61), "getcwd": (79, 17), "unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None),
    "mkdir": (83, None), "mkdirat": (258, 34), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "link": (86, None), "linkat": (265, 37), "ftruncate": (77, 46), "truncate": (76, 45), "fallocate": (285, 47),
    "fsync": (74, 82), "fdatasync": (75, 83), "syncfs": (306, 267), "sync_file_range": (277, 84),
    "copy_file_range": (326, 285), "fadvise64": (221, 223), "flock": (73, 32), "fcntl": (72, 25), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "utimensat": (280, 88),
    "inotify_init1": (294, 26), "inotify_add_watch": (254, 27), "inotify_rm_watch": (255, 28),
    "getxattr": (191, 8), "lgetxattr": (192, 9), "fgetxattr": (193, 10), "listxattr": (194, 11), "flistxattr": (196, 13),
    "umask": (95, 166), "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226),
    "madvise": (28, 233), "brk": (12, 214), "msync": (26, 227), "mincore": (27, 232), "mlock": (149, 228),
    "mlock2": (325, 284), "munlock": (150, 229), "membarrier": (324, 283), "memfd_create": (319, 279),
    "futex": (202, 98), "futex_waitv": (449, 449), "set_robust_list": (273, 99), "get_robust_list": (274, 100),
    "rseq": (334, 293), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "sched_setaffinity": (203, 122),
    "sched_getparam": (143, 121), "sched_getscheduler": (145, 120), "getcpu": (309, 168), "set_tid_address": (218, 96),
    "exit": (60, 93), "exit_group": (231, 94), "wait4": (61, 260), "waitid": (247, 95), "restart_syscall": (219, 128),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132), "getpid": (39, 172), "gettid": (186, 178),
    "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158), "getpgrp": (111, None),
    "getpgid": (121, 155), "getsid": (124, 156), "capget": (125, 90), "uname": (63, 160), "sysinfo": (99, 179),
    "times": (100, 153), "getrusage": (98, 165), "getrlimit": (97, 163), "prlimit64": (302, 261),
    "getrandom": (318, 278), "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441), "eventfd2": (290, 19),
    "timerfd_create": (283, 85), "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87), "bind": (49, 200),
    "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242), "connect": (42, 203), "getsockname": (51, 204),
    "getpeername": (52, 205), "getsockopt": (55, 209), "setsockopt": (54, 208), "shutdown": (48, 210),
    "sendto": (44, 206), "recvfrom": (45, 207), "sendmsg": (46, 211), "recvmsg": (47, 212), "sendmmsg": (307, 269),
    "recvmmsg": (299, 243), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "socket": (41, 198), "socketpair": (53, 199), "clone": (56, 220),
    "clone3": (435, 435), "ioctl": (16, 29), "prctl": (157, 167), "tgkill": (234, 131)}
IO_URING = frozenset(("io_uring_setup", "io_uring_enter", "io_uring_register"))
CALLS = frozenset(_NUMBERS) - IO_URING      # what every role may call
# linux/audit.h: the machine's number, and which column of _NUMBERS is its
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1), "riscv64": (0xC00000F3, 1)}
_X32 = 0x40000000       # calls of another kind, in the same filter: x86-64 only

_AF_UNIX = 1
_CLONE_THREAD = 0x00010000                      # linux/sched.h: another process of ours is none of those
_CLONE_NEW = 0x7E020080                         # nor are namespaces
_PRCTL = (15, 16, 29, 57, 0x53564D41)   # PR_SET_NAME, PR_GET_NAME, PR_SET_TIMERSLACK, PR_SET_IO_FLUSHER, PR_SET_VMA
# Of terminals, files and block devices: TCGETS, FIONREAD, FIONBIO, FIOCLEX, FIONCLEX; FS_IOC_GETVERSION; BLKGETSIZE64,
# BLKSSZGET, BLKPBSZGET, BLKDISCARD, BLKZEROOUT, BLKFLSBUF, BLKROGET, BLKIOMIN, BLKALIGNOFF, BLKDISCARDZEROES; SG_IO and
# NVME_IOCTL_ADMIN_CMD (SMART); TUNSETCARRIER, TUNGETIFF, TUNSETOFFLOAD, TUNGETFEATURES.
IOCTLS = (0x5401, 0x541B, 0x5421, 0x5451, 0x5450, 0x80087601, 0x80081272, 0x1268, 0x127B, 0x1277, 0x127F, 0x1261, 0x125E,
          0x1278, 0x127A, 0x127C, 0x2285, 0xC0484E41, 0x400454E2, 0x800454D2, 0x400454D0, 0x800454CF)

_SECCOMP = {"x86_64": 317, "aarch64": 277, "riscv64": 277}
_SET_MODE_FILTER, _TSYNC, _LOG = 1, 1, 2
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def _instruction(code: int, k: int, true: int = 0, false: int = 0) -> bytes:
    """struct sock_filter, linux/filter.h."""
    return struct.pack("=HBBI", code, true, false, k & 0xFFFFFFFF)


_LOAD, _EQUAL, _ABOVE, _ANY, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06    # ld [k]; jeq; jge; jset; ret
_NUMBER, _MACHINE = 0, 4    # struct seccomp_data


def _argument(index: int) -> int:
    """Where the lower half of an argument is: what the kernel takes of an int."""
    return 16 + 8 * index + (0 if struct.pack("=H", 1)[0] else 4)


def _one_of(index: int, values: Iterable[int], otherwise: int = _ERRNO | errno.EPERM) -> list[bytes]:
    """Allows a call whose argument is one of these."""
    found = [_instruction(_LOAD, _argument(index))]
    for value in values:
        found += [_instruction(_EQUAL, value, 0, 1), _instruction(_RETURN, _ALLOW)]
    return [*found, _instruction(_RETURN, otherwise)]


def compiled(calls: Collection[str], machine: str | None = None) -> bytes:
    """The filter, as classic BPF. Raises MuenfastError where the machine's numbers are not known."""
    machine = machine or platform.machine()
    if machine not in _MACHINES:
        raise MuenfastError(f"no filter of system calls is known for {machine} (--no-sandbox does without)")
    token, column = _MACHINES[machine]
    special = {
        "socket": _one_of(0, (_AF_UNIX,)), "socketpair": _one_of(0, (_AF_UNIX,)), "ioctl": _one_of(1, IOCTLS),
        "prctl": _one_of(0, _PRCTL), "tgkill": _one_of(0, (os.getpid(),)),
        # Not there: glibc then takes clone(2), whose flags are no pointer's.
        "clone3": [_instruction(_RETURN, _ERRNO | errno.ENOSYS)],
        "clone": [_instruction(_LOAD, _argument(0)), _instruction(_ANY, _CLONE_NEW, 2, 0),
                  _instruction(_ANY, _CLONE_THREAD, 0, 1), _instruction(_RETURN, _ALLOW),
                  _instruction(_RETURN, _ERRNO | errno.EPERM)]}
    program = [_instruction(_LOAD, _MACHINE), _instruction(_EQUAL, token, 1, 0), _instruction(_RETURN, _KILL),
               _instruction(_LOAD, _NUMBER)]
    if machine == "x86_64":
        program += [_instruction(_ABOVE, _X32, 0, 1), _instruction(_RETURN, _ERRNO | errno.EPERM)]
    for name in sorted(calls, key=list(_NUMBERS).index):
        number = _NUMBERS[name][column]
        if number is not None:
            block = special.get(name, [_instruction(_RETURN, _ALLOW)])
            program += [_instruction(_EQUAL, number, 0, len(block)), *block]
    program.append(_instruction(_RETURN, _ERRNO | errno.EPERM))
    return b"".join(program)


def install(calls: Collection[str]) -> None:
    """From here on this process calls these, with the arguments that their rules allow, and no others. Precondition:
    no-new-privileges. Raises OSError, MuenfastError."""
    code = compiled(calls)
    instructions = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("HP", len(code) // 8, ctypes.addressof(instructions)))
    libc = ctypes.CDLL(None, use_errno=True)
    number = ctypes.c_long(_SECCOMP[platform.machine()])
    for flags in (_TSYNC | _LOG, _TSYNC):       # the second: before Linux 4.14
        if libc.syscall(number, ctypes.c_long(_SET_MODE_FILTER), ctypes.c_ulong(flags), program) == 0:
            return
        if ctypes.get_errno() != errno.EINVAL:
            break
    _raise("system calls cannot be filtered")


def _raise(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")


# ------------------------------------------------------------------ Landlock

# linux/landlock.h
_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE, _MAKE_CHAR, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK, \
    _MAKE_FIFO, _MAKE_BLOCK, _MAKE_SYM, _REFER, _TRUNCATE, _IOCTL_DEV = (1 << bit for bit in range(16))
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_KNOWN = {1: 13, 2: 14, 3: 15, 4: 15}       # rights to files by the kernel's version of it; 16 from the fifth on
_BIND_TCP, _CONNECT_TCP = 1, 2
_SIGNAL = 2
_READ = _READ_FILE | _READ_DIR
_CHANGE = (_READ | _WRITE_FILE | _TRUNCATE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _REFER)


@dataclass(slots=True)
class Files:
    """What a process may reach. read: files and folders, with all that is in them. write: files that it may write and read,
    and devices. change: folders in which it may make and remove files, too. sockets: folders in which it may make sockets.
    names: folders whose names it may read. What is not there is left out."""

    read: list[str] = field(default_factory=list)
    write: list[str] = field(default_factory=list)
    change: list[str] = field(default_factory=list)
    sockets: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def rights(self) -> Iterator[tuple[str, int]]:
        yield from ((path, _READ) for path in self.read)
        yield from ((path, _READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV) for path in self.write)
        yield from ((path, _CHANGE) for path in self.change)
        yield from ((path, _READ_DIR) for path in self.names)
        yield from ((path, _READ | _MAKE_SOCK | _REMOVE_FILE) for path in self.sockets)


class Landlock:
    """Rules that are made first, where paths can be looked up, and hold from restrict() on. version: of the kernel's; 0:
    it has none, and restrict() does nothing. Raises OSError."""

    def __init__(self, files: Files) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.version = max(0, self._call(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))
        self._rules = -1
        if not self.version:
            return
        handled = (1 << _KNOWN.get(self.version, 16)) - 1
        attributes = struct.pack("=QQQ", handled, _BIND_TCP | _CONNECT_TCP if self.version >= 4 else 0,
                                 _SIGNAL if self.version >= 6 else 0)
        size = 8 if self.version < 4 else 16 if self.version < 6 else 24
        buffer = ctypes.create_string_buffer(attributes, len(attributes))
        self._rules = self._call(_CREATE, buffer, ctypes.c_size_t(size), ctypes.c_uint32(0))
        if self._rules < 0:
            _raise("Landlock gives no rules")
        try:
            for path, rights in files.rights():
                self._add(path, rights & handled)
        except BaseException:
            self.close()
            raise

    def _call(self, number: int, *arguments: object) -> int:
        return int(self._libc.syscall(ctypes.c_long(number), *arguments))

    def _add(self, path: str, rights: int) -> None:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return
        try:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                rights &= _OF_FILES
            rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd), 12)
            if self._call(_ADD, ctypes.c_int(self._rules), ctypes.c_int(1), rule, ctypes.c_uint32(0)):
                _raise(f"Landlock takes no rule for {path}")
        finally:
            os.close(fd)

    def restrict(self) -> None:
        """From here on this thread, and those that it starts, reach nothing else. Precondition: no-new-privileges. Raises
        OSError."""
        if self._rules < 0:
            log.info("this kernel has no Landlock: files are kept apart by their permissions only")
            return
        if self._call(_RESTRICT, ctypes.c_int(self._rules), ctypes.c_uint32(0)):
            _raise("Landlock cannot be switched on")
        self.close()

    def close(self) -> None:
        """Idempotent."""
        rules, self._rules = self._rules, -1
        if rules >= 0:
            os.close(rules)
