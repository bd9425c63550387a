"""The second life of an attachment: cleans up when the process that answers its I/O cannot.

Run as a script, by path, in a process of its own: [python, "-I", "-S", watchdog.py, arguments]; hence
the standard library only, little of it, and nothing of this package, which uses release(), nbd_call() and their
like, too.

Why a process: a client killed with a thread of its own waiting for its device never dies, because that thread
waits (uninterruptibly) for an answer of threads that are already dead; its descriptors stay open, so
the kernel does not end the connection either. Somebody else must abort it. And a device of the nbd driver stays
until somebody disconnects it, whatever became of its socket.

Arguments: "fuse" CONTROL PID TIDS ABORT MOUNTPOINT NODE, or "nbd" CONTROL PID TIDS SOCKET IDENTIFIER NODE.
    CONTROL  read end of a pipe from the client
    PID TIDS the client, and threads of it (TID,TID) that sleep interruptibly only, so that after any kill one of them is
             gone soon, also where the process lingers and the pipe stays open. Two, for one of them may be the last thread
             of all: that one closes the process's files, and a device among them, with a read of its own under way, waits
             for the dead
    ABORT    open fusectl "abort" of the connection, or -1 (then: forced unmount)
    SOCKET   of the connection to the nbd driver, open
    IDENTIFIER  what the driver's device was given to know it by
Messages on the pipe, one a line:
    detaching SECONDS   the client takes the device down; abort if it is not done by then; again: it needs longer
    done                nothing is left to do
End of file, or the end of a thread before "detaching", means that the client is dead.

Never opens a file in the mount and holds neither the fuse device nor a block device. Exit status: 0 the
client was done, 1 it had to act, 2 it could not clean everything (/dev/kmsg says what).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import stat
import struct
import sys
import time

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, which costs megabytes
if TYPE_CHECKING:
    from collections.abc import Callable

LOOP_CLR_FD = 0x4C01        # uapi/linux/loop.h
MNT_FORCE, MNT_DETACH = 1, 2    # sys/mount.h; FUSE takes MNT_FORCE as "abort the connection"
PIDFD_THREAD = os.O_EXCL    # uapi/linux/pidfd.h, Linux 6.9

POLL = 0.25         # seconds between looks at the threads, where the kernel has no thread pidfd
AFTERMATH = 10.0    # seconds the client has, after its deadline, to finish
LIMIT = 30          # seconds the clean-up may take before the watchdog gives up on itself
LONGEST = 600.0     # seconds that a client may ask for at a time: it may have been taken over
LINE = 256          # bytes of a message


def _steps(failed: list[str]) -> Callable[..., None]:
    """What tries one step of a clean-up, and notes in `failed` what became of it, as a sentence."""
    def step(action: Callable[..., object], *arguments: object) -> None:
        try:
            action(*arguments)
        except FileNotFoundError:
            pass        # done before us
        except OSError as error:
            if error.errno != errno.ENXIO:      # LOOP_CLR_FD of a device that is free
                failed.append(f"{action.__name__} {arguments[0]}: {os.strerror(error.errno or 0)}")

    return step


def umount(path: str, flags: int) -> bool:
    """umount2(2); False when nothing is mounted there. Raises OSError (filename set)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOENT):
        return False
    raise OSError(code, os.strerror(code), path)


def loops_below(directory: str) -> list[int]:
    """Numbers of the loop devices whose backing file lies below *directory* in this mount namespace."""
    found = []
    for entry in os.listdir("/sys/block"):
        if entry.startswith("loop"):
            try:
                with open(f"/sys/block/{entry}/loop/backing_file") as file:
                    backing = file.read().rstrip("\n")
            except OSError:
                continue        # free, or freed while we looked
            if backing.startswith(directory.rstrip("/") + "/"):
                found.append(int(entry[4:]))
    return found


def loop_number(node: str) -> int | None:
    """Which loop device *node* is, or None."""
    try:
        status = os.stat(node, follow_symlinks=False)
    except FileNotFoundError:
        return None
    is_loop = stat.S_ISBLK(status.st_mode) and os.major(status.st_rdev) == 7
    return os.minor(status.st_rdev) if is_loop else None


def clear_loop(number: int, directory: str) -> None:
    """Detach a loop device; where it is still open the kernel does so with the last close. directory: only if its backing
    file lies below it: one that somebody else has by now is left alone; "" where that cannot be told any more."""
    device = os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not directory or number in loops_below(directory):   # asked while it is open: now it cannot change
            fcntl.ioctl(device, LOOP_CLR_FD)
    finally:
        os.close(device)


def remove_part_nodes(node: str, disks: list[str]) -> None:
    """Remove the nodes named *node* and a number of partitions of these disks (loop3), or of devices that are no more.

    Raises the last OSError (filename set), after all have been tried.
    """
    directory, name = os.path.split(node)
    failed = None
    for entry in os.listdir(directory):
        if not entry.startswith(name) or not entry[len(name):].isdecimal():
            continue
        try:
            status = os.stat(f"{directory}/{entry}", follow_symlinks=False)
            where = os.path.realpath(f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
            disk = os.path.basename(os.path.dirname(where))
            if stat.S_ISBLK(status.st_mode) and (not os.path.exists(where) or disk in disks):
                os.unlink(f"{directory}/{entry}")
        except FileNotFoundError:
            continue
        except OSError as error:
            failed = error
    if failed is not None:
        raise failed


def release(mountpoint: str, node: str, abort: int = -1) -> list[str]:
    """Take down what an attachment left: connection, nodes, loop device, mount, directory.

    Ordering: the abort comes first, so that nothing after it can wait for a dead file system; the loop
    device is found by its backing file's path, so before the unmount, and its partitions before it is freed,
    which ends them. Only nodes of a loop device found so are removed, and those of partitions that are gone.
    Each step is tried whatever became of the others. Returns what failed, as sentences.
    """
    failed: list[str] = []
    step = _steps(failed)
    loops = loops_below(mountpoint)
    if abort >= 0:
        step(os.write, abort, b"1")
    else:
        step(umount, mountpoint, MNT_FORCE | MNT_DETACH)
    if loop_number(node) in loops:
        step(os.unlink, node)
    step(remove_part_nodes, node, [f"loop{number}" for number in loops])
    for number in loops:
        step(clear_loop, number, mountpoint if abort >= 0 else "")     # "": it was unmounted above
    step(umount, mountpoint, MNT_DETACH)
    step(os.rmdir, mountpoint)
    return failed


# ---- the nbd driver, by generic netlink: uapi/linux/{netlink,genetlink,nbd-netlink}.h

NETLINK_GENERIC, GENL_ID_CTRL, CTRL_CMD_GETFAMILY = 16, 16, 3
CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME = 1, 2
NLM_F_REQUEST, NLM_F_ACK, NLMSG_ERROR = 1, 4, 2
NBD_CMD_CONNECT, NBD_CMD_DISCONNECT, NBD_CMD_RECONFIGURE = 1, 2, 3
NBD_ATTR_INDEX = 1


def attribute(kind: int, value: bytes) -> bytes:
    """One netlink attribute, padded."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes in a message, by kind."""
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            break
        found[kind] = data[4:length]
        data = data[(length + 3) & ~3:]
    return found


def nbd_call(command: int, data: bytes) -> dict[int, bytes]:
    """One command to the nbd driver; the attributes of its reply. May wait for the device's I/O.

    Raises FileNotFoundError where this kernel, or this network namespace, has no nbd driver, OSError for what it
    refuses.
    """
    import socket

    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_GENERIC) as s:
        s.bind((0, 0))

        def call(family: int, command: int, version: int, data: bytes) -> dict[int, bytes]:
            payload = struct.pack("=BBH", command, version, 0) + data
            s.send(struct.pack("=IHHII", 16 + len(payload), family, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + payload)
            reply: dict[int, bytes] = {}
            while True:
                received = s.recv(1 << 16)
                while len(received) >= 16:
                    length, kind = struct.unpack_from("=IH", received)
                    if kind == NLMSG_ERROR:     # the acknowledgement, with 0
                        error, = struct.unpack_from("=i", received, 16)
                        if error:
                            raise OSError(-error, os.strerror(-error), "nbd netlink")
                        return reply
                    reply.update(attributes(received[20:length]))
                    received = received[(max(length, 16) + 3) & ~3:]

        known = call(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 1, attribute(CTRL_ATTR_FAMILY_NAME, b"nbd\0"))
        return call(struct.unpack("=H", known[CTRL_ATTR_FAMILY_ID])[0], command, 1, data)


def nbd_devices(identifier: str | None = None) -> list[tuple[int, str]]:
    """(number, identifier) of the connected nbd devices that were given an identifier, or that one."""
    found = []
    for entry in os.listdir("/sys/block"):
        if entry.startswith("nbd") and entry[3:].isdecimal():
            try:
                with open(f"/sys/block/{entry}/backend") as file:
                    given = file.read().rstrip("\n")
            except OSError:
                continue        # not connected, or no more
            if given and identifier in (None, given):
                found.append((int(entry[3:]), given))
    return sorted(found)


def nbd_disconnect(number: int) -> None:
    """Takes a device's connection away: whoever waits for it gets EIO. Precondition: its socket is shut down, or
    somebody reads from it; else this may wait for that."""
    nbd_call(NBD_CMD_DISCONNECT, attribute(NBD_ATTR_INDEX, struct.pack("=I", number)))


def nbd_number(node: str) -> int | None:
    """Which nbd device *node* is, or None."""
    try:
        device = os.stat(node, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISBLK(device.st_mode):
        return None
    link = f"/sys/dev/block/{os.major(device.st_rdev)}:{os.minor(device.st_rdev)}"
    name = os.path.basename(os.path.realpath(link))
    return int(name[3:]) if name.startswith("nbd") and name[3:].isdecimal() else None


def shut_down(fd: int) -> None:
    """Ends a connection in both directions, for all who have its ends open."""
    import socket

    with socket.socket(fileno=os.dup(fd)) as s:
        try:
            s.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise


def nbd_release(identifier: str, node: str, fd: int = -1) -> list[str]:
    """Takes down what an attachment through the nbd driver left: connection, nodes, device. As release()."""
    failed: list[str] = []
    step = _steps(failed)
    if fd >= 0:
        step(shut_down, fd)
    for number, _ in nbd_devices(identifier):
        if nbd_number(node) == number:
            step(os.unlink, node)
        step(remove_part_nodes, node, [f"nbd{number}"])
        step(nbd_disconnect, number)
    return failed


class Thread:
    """One thread of another process, watched for its end."""

    def __init__(self, pid: int, tid: int) -> None:
        self.entry = f"/proc/{pid}/task/{tid}"
        try:
            self.fd = os.pidfd_open(tid, PIDFD_THREAD)
        except ProcessLookupError:
            self.fd = -1
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.fd = -1        # before Linux 6.9: look at /proc now and then

    def gone(self) -> bool:
        if self.fd >= 0:
            poller = select.poll()
            poller.register(self.fd, select.POLLIN)
            return bool(poller.poll(0))
        return not os.path.exists(self.entry)


def watch(control: int, threads: list[Thread], abort: Callable[[], object]) -> bool:
    """Until the client is done (True) or dead (False); aborts the connection of one that cannot finish."""
    poller = select.poll()
    poller.register(control, select.POLLIN)
    fds = [thread.fd for thread in threads if thread.fd >= 0]
    for fd in fds:
        poller.register(fd, select.POLLIN)
    pending, deadline, aborted = b"", None, False
    while True:
        wait = None if len(fds) == len(threads) else POLL
        if deadline is not None:
            wait = max(0.0, deadline - time.monotonic())
        ready = [fd for fd, _ in poller.poll(None if wait is None else wait * 1000)]
        if control in ready:
            data = os.read(control, 4096)
            if not data:
                return False
            *lines, pending = (pending + data).split(b"\n")
            if len(pending) > LINE:
                raise ValueError("a message without an end")
            for line in lines:
                if line == b"done":
                    return True
                if line.startswith(b"detaching ") and not aborted:
                    if deadline is None:
                        for fd in fds:
                            poller.unregister(fd)   # their end is expected now
                    deadline = time.monotonic() + min(max(0.0, float(line[10:])), LONGEST)   # 0: no number at all
        elif deadline is not None:
            if time.monotonic() < deadline:
                continue
            if aborted:
                return False
            abort()
            aborted, deadline = True, deadline + AFTERMATH
        elif any(thread.gone() for thread in threads):
            return False


def say(text: str) -> None:
    """To the kernel's log: there is no client and no terminal to tell."""
    try:
        with open("/dev/kmsg", "w") as log:
            log.write(f"muenfast: {text}\n")
    except OSError:
        pass        # a container without it; the exit status still tells


def main(arguments: list[str]) -> int:
    kind = arguments[0]
    control, pid = map(int, arguments[1:3])
    tids, fd = map(int, arguments[3].split(",")), int(arguments[4])
    below, node = arguments[5:]
    if kind == "nbd":
        __import__("socket")    # now: what has to be loaded may not be to be had later

        def abort() -> object:
            shut_down(fd)
            return None

        def clean() -> list[str]:
            return nbd_release(below, node, fd)
    else:
        def abort() -> object:
            return os.write(fd, b"1") if fd >= 0 else umount(below, MNT_FORCE | MNT_DETACH)

        def clean() -> list[str]:
            return release(below, node, fd)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    try:
        done = watch(control, [Thread(pid, tid) for tid in tids], abort)
    except Exception as error:      # whatever it is: from here on nobody else would clean up
        say(f"watchdog of {node}: {error!r}")
        done = False
    if done:
        return 0
    signal.alarm(LIMIT)     # default action: ends us, should a step hang after all
    failed = clean()
    say(f"{node}: process {pid} died with the device attached; "
        + ("not cleaned: " + "; ".join(failed) if failed else "cleaned up"))
    return 2 if failed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
