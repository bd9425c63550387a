"""A block connection: a request and a response channel, perhaps a buffer, as configuration and as opened ends."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from muenfast import params, shm
from muenfast._engine import CHECKSUM_MODES as CHECKSUM_MODES
from muenfast._ring import layout
from muenfast.channel import End, wanted
from muenfast.errors import ClaimError, PeerError, UsageError

_LAYOUT = layout()
BLOCK: int = _LAYOUT["block_size"]
REQUEST_PROTOCOL: int = _LAYOUT["request_protocol"]
RESPONSE_PROTOCOL: int = _LAYOUT["response_protocol"]
BUFFER_PROTOCOL: int = _LAYOUT["buffer_protocol"]
# docs/protocol.md: the known peers' regions, inline (254 elements) and beside a buffer (1022 and 1020), and that buffer.
REGION_SIZE = 0x100000
BUFFER_REQUEST_SIZE, BUFFER_RESPONSE_SIZE = 0x8000, 0x4000
BUFFER_SIZE = 16 << 20
PATIENCE = 10_000   # rules that a peer may break in a second
MOST_POLL = 10_000_000  # microseconds: a channel is looked at once in 10 s at least


@dataclass(frozen=True, slots=True)
class Options:
    """What the lists are called where the user wrote them; only messages use it."""

    req: str = "--req"
    resp: str = "--resp"
    req_protocol: str = "--req-protocol"
    resp_protocol: str = "--resp-protocol"
    size: str = "--size"
    device: str = "--device"
    read_only: str = "--read-only"
    buffer: str = "--shm"
    buffer_size: str = "--shm-size"
    pool: str = "--pool"
    timeout: str = "--timeout"
    inject: str = "--inject"
    poll: str = "--poll"
    checksum: str = "--checksum"


IN_PYTHON = Options("req", "resp", "req_protocol", "resp_protocol", "size", "device", "read_only", "buffer", "buffer_size",
                    "pool", "timeout", "inject", "poll", "checksum")


@dataclass(frozen=True, slots=True)
class Channels:
    """One connection: a request and a response channel, from entry `index` of the lists.

    buffer: the region that both sides write; None: the inline transport. sizes: bytes of the request and the response
    channel where they are made; buffer_size: of the buffer. poll: microseconds between polls, None: adaptive. bells:
    False: strict one-way, nothing flows back. options: of the lists. permits: as the regions have to be, in their order;
    then none of them is made. patience: rules that the peer may break in a second before it is quarantined, 0: any number.
    checksum: of each message and its block: "off", "auto": with a peer that has them, "require": with no other.
    """

    req: shm.Locator
    resp: shm.Locator
    index: int = 0
    req_protocol: int = REQUEST_PROTOCOL
    resp_protocol: int = RESPONSE_PROTOCOL
    sizes: tuple[int, int] = (REGION_SIZE, REGION_SIZE)
    poll: int | None = None
    bells: bool = True
    options: Options = Options()
    buffer: shm.Locator | None = None
    buffer_size: int = BUFFER_SIZE
    permits: tuple[shm.Permit, ...] | None = None
    patience: int = PATIENCE
    checksum: str = "off"

    @property
    def name(self) -> str:
        return f"{self.req.text}/{self.resp.text}"

    @property
    def regions(self) -> tuple[tuple[str, shm.Locator], ...]:
        """(option, locator) of the request channel, the response channel, and the buffer where there is one."""
        both = ((self.options.req, self.req), (self.options.resp, self.resp))
        return both if self.buffer is None else (*both, (self.options.buffer, self.buffer))

    @property
    def element_sizes(self) -> tuple[int, int]:
        """Bytes of an element of the request and of the response channel."""
        if self.buffer is None:
            return _LAYOUT["event_size"], _LAYOUT["event_size"]
        return _LAYOUT["buffer_request_size"], _LAYOUT["buffer_response_size"]

    def open(self, serving: bool, old: Sequence[End] | None = None) -> tuple[End, ...]:
        """The ends (request, response, and buffer where there is one), the channels claimed for the server or the client;
        errors name option and entry.

        old: ends to keep where their name still means the same region.
        """
        role = "muenfast blk server" if serving else "muenfast blk client"
        least = [_LAYOUT["header_size"] + size for size in self.element_sizes]
        with ExitStack() as stack:
            ends: list[End] = []
            for i, (option, locator) in enumerate(self.regions):
                if old is not None and not old[i].replaced():
                    ends.append(old[i])
                    continue
                permit = None if self.permits is None else self.permits[i]
                with blame(option, self.index, locator.text):
                    end = End(locator, writes=serving == (i == 1), role=role, create=self.sizes[i], least=least[i],
                              bell=self.bells, more={"buffer": self.buffer is not None}, permit=permit) if i < 2 else \
                        End(locator, writes=True, role=role, create=self.buffer_size, least=BLOCK, bell=False,
                            buffer="server" if serving else "client", permit=permit)
                    ends.append(stack.enter_context(end))
            stack.pop_all()
            return tuple(ends)

    def wanted(self, serving: bool) -> Iterator[shm.Wanted]:
        """What open() makes where it is missing, for shm.made_ahead."""
        for i, (_, locator) in enumerate(self.regions):
            yield from wanted(locator, writes=i == 2 or serving == (i == 1), create=(*self.sizes, self.buffer_size)[i],
                              bell=self.bells, permit=None if self.permits is None else self.permits[i], buffer=i == 2)

    def misfit(self, request: bool, header: tuple[int, int, int]) -> PeerError:
        """What to say of a channel whose (protocol, size, elements) do not fit this connection."""
        protocol, size, elements = header
        return PeerError((self.req if request else self.resp).text, "header",
                         f"protocol {protocol:x}, size {size}, elements {elements}",
                         f"protocol {self.req_protocol if request else self.resp_protocol:x}, "
                         f"size {self.element_sizes[not request]}, elements that fit" + self._generation(size))

    def _generation(self, size: int) -> str:
        """What a header with elements of this size may mean."""
        if self.buffer is None and size in (_LAYOUT["buffer_request_size"], _LAYOUT["buffer_response_size"]):
            return f"; the other side uses a shared buffer: name it ({self.options.buffer})"
        if self.buffer is not None and size == _LAYOUT["event_size"]:
            return f"; the other side has no shared buffer: leave it out ({self.options.buffer})"
        return ""

    def demanded(self) -> PeerError:
        """What to say of a server that serves nobody without checksums."""
        return PeerError(self.resp.text, "error", "EPROTONOSUPPORT", "an answer: the server requires checksums",
                         hint=f"{self.options.checksum} auto, or require, offers them")

    def unanswered(self, seconds: float, server: dict[str, Any] | None) -> str:
        """What to say of a server that has not answered a client for so long. server: who claims to write responses."""
        called = self.options.buffer
        if server is not None and isinstance(server.get("buffer"), bool) and server["buffer"] != (self.buffer is not None):
            step = f"name that ({called})" if server["buffer"] else f"leave it out ({called})"
            why = (f"process {server['pid']} serves there {'over a' if server['buffer'] else 'without a'} shared buffer: "
                   f"{step}, or give the server {'none' if server['buffer'] else 'one'}")
        elif server is not None:
            why = f"process {server['pid']} serves there, but gives no answer"
        else:
            how = f"{'without' if self.buffer is None else 'with the same'} {called}"
            if ": " in called:      # not an option, but a policy's line
                how = f"by this policy ({called.partition(':')[0]})"
            why = f"is `muenfast blk` running there, {how}?"
        return f"no server answered within {seconds:g} s: {why}"


@contextmanager
def blame(option: str, index: int, value: str) -> Iterator[None]:
    """Errors from within name the list entry they belong to."""
    try:
        yield
    except UsageError as error:
        if error.option is not None:
            raise
        raise UsageError(error.rule, option=option, index=index, value=value, hint=error.hint) from error
    except ClaimError as error:
        raise ClaimError(f"{option}, entry {index} {value!r}: {error.what}", error.holder, hint=error.hint) from error
    except OSError as error:
        raise OSError(error.errno, f"{option}, entry {index} {value!r}: {error.strerror}", error.filename) from error


def channels_from_lists(req: str, resp: str, *, req_protocol: str | None = None, resp_protocol: str | None = None,
                        size: str | None = None, poll: int | None = None, bells: bool = True,
                        buffer: str | None = None, buffer_size: str | None = None, patience: int = PATIENCE,
                        checksum: str = "off",
                        more: dict[str, list[str] | None] | None = None,
                        options: Options | None = None) -> list[Channels]:
    """Pairs comma lists by position; nothing is opened. buffer: an empty entry is an inline connection. more: further
    lists whose lengths must agree. patience, checksum: as Channels has them. options: what the lists are called, default:
    as here.

    Raises UsageError naming option, entry, value and rule.
    """
    called = options or IN_PYTHON
    lists: dict[str, list[str] | None] = {called.req: params.split(called.req, req),
                                          called.resp: params.split(called.resp, resp)}
    for option, text in ((called.req_protocol, req_protocol), (called.resp_protocol, resp_protocol),
                         (called.size, size)):
        lists[option] = None if text is None else params.split(option, text)
    for option, text in ((called.buffer, buffer), (called.buffer_size, buffer_size)):
        lists[option] = None if text is None else params.split(option, text, empty=True)
    count = params.same_length({**lists, **(more or {})})
    reqs, resps = ([shm.Locator.parse(text, option=option, index=i) for i, text in enumerate(lists[option] or ())]
                   for option in (called.req, called.resp))
    buffers = [shm.Locator.parse(text, option=called.buffer, index=i) if text else None
               for i, text in enumerate(lists[called.buffer] or [""] * count)]
    params.apart([place(option, i, locator) for option, entries in ((called.req, reqs), (called.resp, resps))
                  for i, locator in enumerate(entries)], "a channel carries one direction of one connection")
    params.apart([place(option, i, locator)
                  for option, entries in ((called.req, reqs), (called.resp, resps), (called.buffer, buffers))
                  for i, locator in enumerate(entries) if locator is not None],
                 "a region is one channel or the buffer of one connection")
    if poll is not None and not 1 <= poll <= MOST_POLL:
        raise UsageError(f"a pause in microseconds is a number from 1 to {MOST_POLL}", option=called.poll, value=poll)

    if checksum not in CHECKSUM_MODES:
        raise UsageError(f"is one of {', '.join(CHECKSUM_MODES)}", option=called.checksum, value=checksum)

    def entry(option: str, i: int, parse: Callable[[str, int, str], int]) -> int | None:
        texts = lists[option]
        return parse(option, i, texts[i]) if texts and texts[i] else None

    def connection(i: int) -> Channels:
        shared = buffers[i] is not None
        if not shared and (given := lists[called.buffer_size]) and given[i]:
            raise UsageError(f"{called.buffer} names no buffer for this entry", option=called.buffer_size, index=i,
                             value=given[i])
        protocols = (BUFFER_PROTOCOL, BUFFER_PROTOCOL) if shared else (REQUEST_PROTOCOL, RESPONSE_PROTOCOL)
        sizes = (BUFFER_REQUEST_SIZE, BUFFER_RESPONSE_SIZE) if shared else (REGION_SIZE, REGION_SIZE)
        least = _LAYOUT["header_size"] + _LAYOUT["buffer_request_size" if shared else "event_size"]
        size = entry(called.size, i, lambda o, i, t: params.size(o, i, t, least=least))
        room = entry(called.buffer_size, i, lambda o, i, t: params.size(o, i, t, least=BLOCK, multiple=BLOCK))
        return Channels(reqs[i], resps[i], i, entry(called.req_protocol, i, params.protocol) or protocols[0],
                        entry(called.resp_protocol, i, params.protocol) or protocols[1],
                        sizes if size is None else (size, size), poll, bells, called, buffers[i], room or BUFFER_SIZE,
                        patience=patience, checksum=checksum)

    return [connection(i) for i in range(count)]


def place(option: str, index: int, locator: shm.Locator) -> tuple[str, int, str, str, int, float]:
    """What params.apart compares: two names of one file are one."""
    end = math.inf if locator.size is None else locator.offset + locator.size
    return option, index, locator.text, os.path.realpath(locator.path), locator.offset, end
