"""Command lines of the Linux modules (muenfast.modules), of both generations; nothing is opened here."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muenfast import modules
from muenfast.errors import UsageError
from muenfast.modules import Connection

SERVER, CLIENT = modules.find("muenblock-server"), modules.find("muenblock_client")
SHARED = 0x5155684453516F3D  # docs/protocol.md: both channels beside a shared buffer


def refused(call: object, *arguments: object, **options: object) -> UsageError:
    with pytest.raises(UsageError) as caught:
        call(*arguments, **options)  # type: ignore[operator]
    return caught.value


def simple(connection: Connection) -> tuple[object, ...]:
    return (connection.id, connection.req.text, connection.resp.text, connection.buffer.text, connection.req_protocol,
            connection.resp_protocol, connection.devices)


# ---- the command line


@pytest.mark.parametrize("name", ["muenblock-server", "muenblock_server"])
def test_dashes_and_underscores_of_a_module_are_equal(name: str) -> None:
    """As for modprobe."""
    assert modules.find(name) is SERVER


@pytest.mark.parametrize("name", ["", "muenblock", "muenblock-server.ko", "Muenblock-server", "loop", "muennet2"])
def test_a_module_that_is_none(name: str) -> None:
    """kmod's words, and which there are."""
    error = refused(modules.find, name)
    assert str(error).startswith(f"Module {name} not found: the modules are muenblock-client, muenblock-server")


def test_the_first_generation() -> None:
    """The known command lines of server and client."""
    words = ["req_shm_name=blk_req1,blk_req2", "resp_shm_name=blk_resp1,blk_resp2",
             "req_shm_protocol=9570208dca77db19,9570208dca77db19",
             "resp_shm_protocol=9851be3282fef0dc,9851be3282fef0dc"]
    call = modules.parse(SERVER, [*words, "device_name=/dev/sda1,/dev/sda2"])
    assert (call.module, call.generation) == (SERVER, 0)
    assert call.values == {"req_shm_name": "blk_req1,blk_req2", "resp_shm_name": "blk_resp1,blk_resp2",
                           "req_shm_protocol": "9570208dca77db19,9570208dca77db19",
                           "resp_shm_protocol": "9851be3282fef0dc,9851be3282fef0dc",
                           "device_name": "/dev/sda1,/dev/sda2"}
    assert modules.parse(CLIENT, words).generation == 0


@pytest.mark.parametrize("spelling", ["device", "devices"])
def test_the_second_generation(spelling: str) -> None:
    """The known command lines of server and client; device has two spellings."""
    connections = "connections=1:req1:resp1:shm1,2:req2:resp2:shm2:5155684453516f3d:5155684453516f3d"
    call = modules.parse(SERVER, [connections, f"{spelling}=/dev/sda1:1,/dev/sda2:2,/dev/sdb:1"])
    assert call.generation == 1 and call.spelled["device"] == spelling
    found = modules.connections_from_lists(call.values["connections"], call.values["device"])
    assert list(map(simple, found)) == [
        ("1", "req1", "resp1", "shm1", SHARED, SHARED, ("/dev/sda1", "/dev/sdb")),
        ("2", "req2", "resp2", "shm2", SHARED, SHARED, ("/dev/sda2",))]
    assert modules.parse(CLIENT, [connections]).values == {"connections": connections.partition("=")[2]}


@pytest.mark.parametrize(("word", "value"), [
    ("req-shm-name=a", "a"), ("req_shm-name=a", "a"), ('req_shm_name="a b"', "a b"), ('"req_shm_name=a b"', "a b"),
    ("req_shm_name=a b", "a b"), ("req_shm_name=", ""), ('req_shm_name=""', ""), ("req_shm_name=a=b", "a=b"),
    ('req_shm_name=a"b', 'a"b'), ("req_shm_name=", "")])
def test_how_a_parameter_may_be_written(word: str, value: str) -> None:
    """Dashes and underscores are equal; the kernel takes double quotes around the value or the whole, and so do we."""
    assert modules.parse(CLIENT, [word, "resp_shm_name=x"]).values["req_shm_name"] == value


@pytest.mark.parametrize(("words", "parts"), [
    (["foo=1"], ["muenblock_server: unknown parameter 'foo'", "the module has req_shm_name", "modinfo muenblock-server"]),
    (["foo"], ["unknown parameter 'foo'"]),
    ([""], ["unknown parameter ''"]),
    (["=x"], ["unknown parameter ''"]),
    (["req_shm_nam=a"], ["unknown parameter 'req_shm_nam'"]),
    (["REQ_SHM_NAME=a"], ["unknown parameter 'REQ_SHM_NAME'"]),
    (["req_shm_name"], ["muenblock_server: `' invalid for parameter `req_shm_name'", "KEY=VALUE"]),
    (["req_shm_name=a", "req-shm-name=b"], ["req-shm-name 'b': given twice"]),
    (["device=/x:1", "devices=/y:1"], ["devices '/y:1': given twice, first as device"]),
    (["req_shm_name=a", "connections=1:a:b:c"], ["req_shm_name and connections belong to different generations"]),
    ([], ["no parameter is given", "req_shm_name, resp_shm_name and device_name, or connections and device"]),
    (["req_shm_name=a"], ["required and not given: resp_shm_name and device_name"]),
    (["req_shm_protocol=1"], ["required and not given: req_shm_name, resp_shm_name and device_name"]),
    (["connections=1:a:b:c"], ["required and not given: device"]),
    (['req_shm_name="a'], ["'\"a'", "the quote has no end"]),
    (['"'], ["the quote has no end"])])
def test_a_wrong_command_line(words: list[str], parts: list[str]) -> None:
    """In the kernel's words where it has some, with the rule and the next step."""
    error = refused(modules.parse, SERVER, words)
    for part in parts:
        assert part in str(error)


def test_a_client_has_no_devices() -> None:
    """What only the server takes is unknown to the client."""
    for word in ("device_name=/x", "device=/x:1", "devices=/x:1"):
        assert "unknown parameter" in str(refused(modules.parse, CLIENT, [word]))


@given(st.lists(st.text(max_size=30), max_size=4))
def test_any_words_are_a_call_or_a_usage_error(words: list[str]) -> None:
    """No text gets out as another exception."""
    for module in (SERVER, CLIENT):
        try:
            call = modules.parse(module, words)
        except UsageError:
            continue
        assert set(call.values) <= {parameter.name for parameter in module.generations[call.generation]}


# ---- the second generation's lists


def test_devices_stand_in_the_order_of_the_list() -> None:
    """Their place is their number on the wire, whatever other connections' devices stand between them; a RAM disk's own
    colons belong to it; slices and white space are allowed as everywhere."""
    found = modules.connections_from_lists("b : /f@0+32K : /f@32K+16K : /g:1:0x2, a:q:r:s",
                                           " /z:b , ram:1M:name:a,/y:a,null:4096:b,/x:a")
    assert list(map(simple, found)) == [
        ("b", "/f@0+32K", "/f@32K+16K", "/g", 1, 2, ("/z", "null:4096")),
        ("a", "q", "r", "s", SHARED, SHARED, ("ram:1M:name", "/y", "/x"))]
    assert [each.index for each in found] == [0, 1]


@pytest.mark.parametrize(("connections", "index", "parts"), [
    ("", 0, ["must not be empty"]),
    ("1:a:b:c,", 1, ["must not be empty"]),
    ("1", 0, ["'1'", "ID:REQ:RESP:BUFFER", "REQ is missing"]),
    ("1:a:b:c,2:d", 1, ["'2:d'", "RESP is missing"]),
    ("1:a:b", 0, ["BUFFER is missing"]),
    ("1:a:b:c:1", 0, ["RESP_PROTOCOL is missing"]),
    (":a:b:c", 0, ["ID is empty"]),
    ("1::b:c", 0, ["REQ is empty"]),
    ("1:a:b: ", 0, ["BUFFER is empty"]),
    ("1:a:b:c::2", 0, ["REQ_PROTOCOL is empty"]),
    ("1:a:b:c:1:2:3", 0, ["7 fields", "':' or ','", "symbolic link"]),
    ("1:/sys/bus/pci/devices/0000:00:05.0/resource2:b:c", 0, ["BUFFER is '05.0/resource2'", "holds ':'", "link"]),
    ("1:a:b:c:xyz:2", 0, ["REQ_PROTOCOL is 'xyz'", "hexadecimal"]),
    ("1:a:b:c:1:0", 0, ["RESP_PROTOCOL is '0'", "non-zero"]),
    ("1:a:b:c:1:11112222333344445", 0, ["RESP_PROTOCOL is '11112222333344445'", "64 bits"]),
    ("1:x/y:b:c", 0, ["REQ is 'x/y'", "must not contain '/'"]),
    ("1:a:..:c", 0, ["RESP is '..'", "not names"]),
    ("1:a:b:/f@0", 0, ["BUFFER is '/f@0'", "/path@OFFSET+SIZE"]),
    ("1:a:b:c,1:d:e:f", 1, ["'1:d:e:f'", "the ID '1' is that of entry 0"]),
    ("1:a:b:c,2:d:e:c", 1, ["'c'", "overlaps connections, entry 0"]),
    ("1:a:a:c", 0, ["'a'", "one channel or the buffer"]),
    ("1:a:b:/dev/shm/a", 0, ["'/dev/shm/a'", "overlaps another one of the same entry"])])
def test_wrong_connections(connections: str, index: int, parts: list[str]) -> None:
    """Entry, field and rule are named."""
    error = refused(modules.connections_from_lists, connections)
    assert (error.option, error.index) == ("connections", index)
    for part in parts:
        assert part in str(error)


@pytest.mark.parametrize(("device", "option", "index", "parts"), [
    ("", "device", 0, ["must not be empty"]),
    ("/x:1,,/y:2", "device", 1, ["must not be empty"]),
    ("/x", "device", 0, ["'/x'", "PATH:ID", "','"]),
    (":1", "device", 0, ["PATH is empty"]),
    ("/x:", "device", 0, ["ID is empty"]),
    ("/x:1,/y:3", "device", 1, ["'/y:3'", "no connection has the ID '3'; there is 1 and 2"]),
    ("/by-path/pci-0000:00:1f.2:1,/y:2", "device", 0, ["a path that holds ':' cannot be expressed here", "link"]),
    ("ram:64M,/y:2", "device", 0, ["no connection has the ID '64M'"]),
    ("/x:1", "connections", 1, ["the connection '2' has no device", "device=PATH:2"])])
def test_wrong_devices(device: str, option: str, index: int, parts: list[str]) -> None:
    """The same; of a connection without a disk, the connection is named."""
    error = refused(modules.connections_from_lists, "1:a:b:c,2:d:e:f", device)
    assert (error.option, error.index) == (option, index)
    for part in parts:
        assert part in str(error)


def test_devices_are_called_as_they_were_spelled() -> None:
    """Whoever writes devices= is told of devices."""
    assert refused(modules.connections_from_lists, "1:a:b:c", "/x:2", called="devices").option == "devices"


@given(st.text(alphabet="ab1:,/@+ .0x", max_size=30), st.text(alphabet="ab1:,/ ram", max_size=20))
def test_any_lists_are_connections_or_a_usage_error(connections: str, device: str) -> None:
    """And what comes out is complete: every connection has its own ID and at least one disk."""
    try:
        found = modules.connections_from_lists(connections, device)
    except UsageError:
        return
    assert len({each.id for each in found}) == len(found)
    assert all(each.devices for each in found)
    assert sum(len(each.devices) for each in found) == len(device.split(","))
