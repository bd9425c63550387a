"""A block connection: a request and a response channel, as configuration and as opened ends."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from muenfast import params, shm
from muenfast._ring import layout
from muenfast.channel import End
from muenfast.errors import ClaimError, PeerError, UsageError

_LAYOUT = layout()
BLOCK: int = _LAYOUT["block_size"]
REQUEST_PROTOCOL: int = _LAYOUT["request_protocol"]
RESPONSE_PROTOCOL: int = _LAYOUT["response_protocol"]
REGION_SIZE = 0x100000  # docs/protocol.md: the known peer's inline regions, 254 elements
MOST_POLL = 10_000_000  # microseconds: a channel is looked at once in 10 s at least
_LEAST = _LAYOUT["header_size"] + _LAYOUT["event_size"]


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


@dataclass(frozen=True, slots=True)
class Channels:
    """One connection: a request and a response channel, from entry `index` of the lists.

    size: bytes of a region that is made. poll: microseconds between polls, None: adaptive. bells: False: strict
    one-way, nothing flows back. options: of the lists.
    """

    req: shm.Locator
    resp: shm.Locator
    index: int = 0
    req_protocol: int = REQUEST_PROTOCOL
    resp_protocol: int = RESPONSE_PROTOCOL
    size: int = REGION_SIZE
    poll: int | None = None
    bells: bool = True
    options: Options = Options()

    @property
    def name(self) -> str:
        return f"{self.req.text}/{self.resp.text}"

    def open(self, serving: bool, old: tuple[End, End] | None = None) -> tuple[End, End]:
        """Both ends (request, response), claimed for the server or the client; errors name option and entry.

        old: ends to keep where their name still means the same region.
        """
        with ExitStack() as stack:
            role = "muenfast blk server" if serving else "muenfast blk client"
            ends: list[End] = []
            for i, (option, locator, writes) in enumerate(((self.options.req, self.req, not serving),
                                                           (self.options.resp, self.resp, serving))):
                if old is not None and not old[i].replaced():
                    ends.append(old[i])
                    continue
                with blame(option, self.index, locator.text):
                    ends.append(stack.enter_context(End(locator, writes=writes, role=role, create=self.size,
                                                        least=_LEAST, bell=self.bells)))
            stack.pop_all()
            return ends[0], ends[1]

    def misfit(self, request: bool, header: tuple[int, int, int]) -> PeerError:
        """What to say of a channel whose (protocol, size, elements) do not fit this connection."""
        protocol, size, elements = header
        return PeerError((self.req if request else self.resp).text, "header",
                         f"protocol {protocol:x}, size {size}, elements {elements}",
                         f"protocol {self.req_protocol if request else self.resp_protocol:x}, "
                         f"size {_LAYOUT['event_size']}, elements that fit")


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
                        more: dict[str, list[str] | None] | None = None,
                        options: Options | None = None) -> list[Channels]:
    """Pairs comma lists by position; nothing is opened. more: further lists whose lengths must agree. options: what
    the lists are called, default: as the options of `muenfast blk`.

    Raises UsageError naming option, entry, value and rule.
    """
    called = options or Options()
    lists: dict[str, list[str] | None] = {called.req: params.split(called.req, req),
                                          called.resp: params.split(called.resp, resp)}
    for option, text in ((called.req_protocol, req_protocol), (called.resp_protocol, resp_protocol),
                         (called.size, size)):
        lists[option] = None if text is None else params.split(option, text)
    count = params.same_length({**lists, **(more or {})})
    reqs, resps = ([shm.Locator.parse(text, option=option, index=i) for i, text in enumerate(lists[option] or ())]
                   for option in (called.req, called.resp))
    params.apart([place(option, i, locator) for option, entries in ((called.req, reqs), (called.resp, resps))
                  for i, locator in enumerate(entries)], "a channel carries one direction of one connection")
    if poll is not None and not 1 <= poll <= MOST_POLL:
        raise UsageError(f"a pause in microseconds is a number from 1 to {MOST_POLL}", option="--poll", value=poll)

    def each(option: str, parse: Callable[[str, int, str], int], default: int) -> list[int]:
        texts = lists[option]
        return [default] * count if texts is None else [parse(option, i, text) for i, text in enumerate(texts)]

    req_ids = each(called.req_protocol, params.protocol, REQUEST_PROTOCOL)
    resp_ids = each(called.resp_protocol, params.protocol, RESPONSE_PROTOCOL)
    sizes = each(called.size, lambda o, i, t: params.size(o, i, t, least=_LEAST), REGION_SIZE)
    return [Channels(reqs[i], resps[i], i, req_ids[i], resp_ids[i], sizes[i], poll, bells, called)
            for i in range(count)]


def place(option: str, index: int, locator: shm.Locator) -> tuple[str, int, str, str, int, float]:
    """What params.apart compares: two names of one file are one."""
    end = math.inf if locator.size is None else locator.offset + locator.size
    return option, index, locator.text, os.path.realpath(locator.path), locator.offset, end
