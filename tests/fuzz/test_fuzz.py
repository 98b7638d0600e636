"""A bounded run of every target, the same inputs each time; what was found before; and that a planted bug is found.

The long runs are `python -m tests.fuzz.campaign` and `python -m tests.fuzz.atheris_run`.
"""

import asyncio
import gc
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from plasm_dht import config, record, values
from plasm_dht.dht import ids, limits, mmsg, protocol, statefile, storage, udp, wire
from plasm_dht.dht.ids import NodeTuple
from plasm_dht.dht.intent import Holder
from plasm_dht.dht.routing import Contact
from plasm_dht.errors import ConfigError
from plasm_dht.provider import fetch, folder, gateway, manifest, page, web
from plasm_dht_cli import status, watch
from tests.fuzz import guard, states
from tests.fuzz.datagrams import World
from tests.fuzz.downloads import Client
from tests.fuzz.guard import require
from tests.fuzz.pages import OTHER, DoorLoop, Server
from tests.fuzz.source import Source
from tests.fuzz.targets import TARGETS, ended, seeds, settle, stages

# Inputs of random bytes in a bounded run, besides those that hypothesis makes.
RANDOM = {
    "datagram": 400, "record": 2000, "pointer": 2000, "manifest": 600, "settings": 300, "page": 700, "state": 300,
    "fetch": 120, "shown": 1500, "socket": 150,
}  # fmt: skip
EXAMPLES = {"datagram": 60, "page": 100, "state": 60, "fetch": 30, "socket": 30}


def random_inputs(target: str) -> Iterator[bytes]:
    drawn = random.Random(target)
    yield from seeds(target)
    for _ in range(RANDOM[target]):
        yield drawn.randbytes(drawn.choice((8, 30, 90, 250)))


def play_all(name: str) -> None:
    with ended():
        for data in random_inputs(name):
            TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_random_bytes_find_nothing(name: str) -> None:
    play_all(name)


@pytest.mark.parametrize("name", TARGETS)
def test_bytes_that_hypothesis_shrinks_find_nothing(name: str) -> None:
    @settings(
        max_examples=EXAMPLES.get(name, 200),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(max_size=300) | st.sampled_from(seeds(name)))
    @example(b"")
    def one(data: bytes) -> None:
        TARGETS[name](data)

    with ended():
        one()


# -- what was found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["[provider]\nhttp_port = 0x" + "f" * 4000, "provider.name" + ".a" * 2000 + " = 1", "a" + ".a" * 2000 + " = 1"],
    ids=["a number of 4,816 digits", "tables without end", "unknown tables without end"],
)
def test_a_value_that_cannot_be_shown_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plasm.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 10_000


def test_nothing_is_kept_of_an_address_that_is_too_long_to_be_one() -> None:
    kept = ids.is_reachable.cache_info().currsize
    for number in range(50):
        assert not ids.is_askable(NodeTuple(b"\x01" * 20, f"{number}" + "1" * 8000, 8468))
    assert ids.is_reachable.cache_info().currsize == kept


@pytest.mark.parametrize("ip", ["fe80::1%x\n", "fe80::1%" + "x" * 8000, "0.0.0.0", "localhost"])
def test_no_neighbour_can_make_us_believe_in_an_address_that_is_none(ip: str) -> None:
    with ended():
        world = stages.world = World()
        world.node.protocol.router.add_contact(world.node.node.__class__(b"\x01" * 20, "10.0.0.1", 8468))

        async def ask() -> str | None:
            asking = world.loop.create_task(world.node.seen_address())
            await world.settle()
            for message_id, call in list(world.protocol._calls.items()):
                if call.read is wire.read_address:
                    world.feed(wire.response(message_id, wire.address_result((ip, 1))), call.address)
            seen: str | None = await asking
            return seen

        assert world.run(ask()) is None


def test_a_stolen_key_that_has_used_up_the_numbers_stops_no_node() -> None:
    with ended():
        stages.world = world = World()
        name, by = "any/name", world.node.identity

        async def publish() -> Any:
            from plasm_dht.record import bound_key, sign

            assert by is not None
            now = world.clock.wall()
            last = sign(by, name, b"x", seq=2**64 - 1, issued_at=now, expires_at=now + 60_000)
            world.node.storage.store(bound_key(by.public_key, name), last.envelope)
            await world.node.publish(name, b"y")
            await world.node.publish(name, b"z")
            return await world.node.withdraw(name)

        assert world.run(publish()) is not None
        world.check()


def test_a_clock_that_liars_and_then_an_operator_set_back_stops_no_node() -> None:
    with ended():
        stages.world = world = World()

        async def publish() -> None:
            world.clock.correction = 1 - world.clock.wall()  # what one holder of one may make us believe
            await world.node.publish("any/name", b"x", ttl=10)
            world.clock.stepped -= 7200
            await asyncio.sleep(60)  # refreshes come due

        world.run(publish())
        world.check()


def test_a_record_that_is_only_refreshed_remembers_no_holder_whose_copy_has_expired() -> None:
    with ended():
        stages.world = world = World()

        async def publish() -> int:
            await world.node.publish("any/name", b"x", ttl=10)
            assert world.node._publisher is not None
            intent = world.node._publisher.intents["any/name"]
            for holders in intent.holders.values():
                for number in range(100):
                    contact = Contact(bytes([number]) * 20, f"10.9.9.{number}", 1)
                    holders[contact.address] = Holder(contact, 1, world.clock.now() + 1000)
            await asyncio.sleep(60)
            return sum(map(len, intent.holders.values()))

        assert world.run(publish()) == 0


def test_a_client_that_goes_without_its_body_leaves_no_task() -> None:
    with ended():
        server = stages.server = Server()

        async def leave() -> None:
            from tests.fuzz.pages import Connection

            assert isinstance(server.loop, DoorLoop)
            for _ in range(20):
                connection = Connection(server.loop, server.loop.accept())
                connection.owner.data_received(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
                await server.settle()
                connection.close()
                await server.settle()

        server.run(leave())
        server.check()


def test_what_a_server_sends_instead_of_http_is_said_in_one_short_line() -> None:
    with ended():
        client = stages.client = Client()
        client.loop.answer = lambda request: ([b"\xb4\n" * 60_000], 0.0, False)  # type: ignore[attr-defined]
        client.run(client.play(Source(b"")))
        assert client.refused


@pytest.mark.parametrize("as_json", [False, True])
def test_the_status_of_a_provider_that_nests_it_so_deep_that_it_can_just_be_read_is_none(as_json: bool) -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(status.NoProviderError):
        list(status._lines({"records": [], "name": deep}, as_json=as_json))


def test_what_sqlite_quotes_of_a_damaged_file_ends_no_line() -> None:
    folder = states.Folder()
    try:
        folder.empty()
        for name, content in folder.samples.items():
            (folder.path / name).write_bytes(content.replace(b"CREATE TABLE node", b"CREATE TABLE nod\x16"))
        folder.open().abandon()
        assert len(folder.said) == 1
        assert folder.said[0].getMessage().isprintable()
    finally:
        folder._temporary.cleanup()


# -- what would be found ---------------------------------------------------------------------------------------------


def _forgetting_nothing(self: limits.Seen, address: Any, now: float) -> None:
    self._times[address] = now


def _believing_for_ever(self: Any, address: Any, node_id: bytes, now: float) -> None:
    self._ids[address] = node_id, now


def _one_too_many(request: Any, file: Any) -> tuple[int, int] | None:
    asked = _range(request, file)
    return None if asked is None else (asked[0], min(asked[1] + 1, file.size))


def _spin() -> None:
    began = time.thread_time()
    while time.thread_time() - began < 1.5 * guard.BLOCKED_AFTER:
        pass


async def _fail() -> None:
    raise ValueError


# Blocks by which the tables of a world may be fuller at one moment than at another.
LUCK = 4000
_kept: list[object] = []
_node_log = logging.getLogger("plasm_dht.dht")
# What a node does with a datagram, and the words in which the guard tells of it.
MISDEEDS: dict[str, tuple[Callable[[Any], object], str]] = {
    "raises": (lambda node: 1 / 0, "division by zero"),
    "logs a traceback": (lambda node: _node_log.warning("lost", exc_info=ValueError("x")), "logged: lost"),
    "logs an error": (lambda node: _node_log.error("lost"), "logged: lost"),
    "logs two lines": (lambda node: _node_log.info("a\nb"), "a log line that the network has forged"),
    "leaves a task": (lambda node: _kept.append(asyncio.ensure_future(asyncio.sleep(1e9))), "tasks"),
    "leaves one task": (
        lambda node: _kept or _kept.append(asyncio.ensure_future(asyncio.sleep(1e9))), "tasks",
    ),
    "leaves tasks in the node": (lambda node: node._spawn(asyncio.sleep(1e9)), "tasks are left in the node"),
    "leaves a failed task": (lambda node: asyncio.ensure_future(_fail()) and None, "never retrieved"),
    "spins": (lambda node: _spin(), "a turn of the loop took"),
    "sends too much": (lambda node: node.transport.sendto(bytes(1233), ("10.0.0.1", 1)), "a datagram of 1233 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("misdeed", MISDEEDS)
@pytest.mark.unguarded
@pytest.mark.filterwarnings("ignore")
def test_the_guard_tells_what_a_node_does_wrong(monkeypatch: pytest.MonkeyPatch, misdeed: str) -> None:
    act, words = MISDEEDS[misdeed]
    right = protocol.PlasmProtocol.datagram_received

    def wrong(self: Any, data: bytes, address: Any) -> None:
        right(self, data, address)
        act(self)

    monkeypatch.setattr(protocol.PlasmProtocol, "datagram_received", wrong)
    _kept.clear()
    with pytest.raises((AssertionError, ZeroDivisionError), match=words):
        _play_ten()
    _kept.clear()


def _play_ten() -> None:
    with ended():
        for number in range(10):
            TARGETS["datagram"](random.Random(number).randbytes(250))
            gc.collect()


def _growth(monkeypatch: pytest.MonkeyPatch, name: str) -> int:
    """How many more blocks of memory are taken after 300 inputs than after the first hundred, which fill the tables."""
    drawn, taken = random.Random(name), []
    monkeypatch.setattr(stages, "life", 2**62)
    with ended():
        for number in range(300):
            TARGETS[name](drawn.randbytes(250))
            if number in (100, 299):
                settle()
                taken.append(sys.getallocatedblocks())
    return taken[1] - taken[0]


@pytest.mark.parametrize("name", ["datagram", "page"])
def test_what_is_held_does_not_grow_with_what_was_sent(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert _growth(monkeypatch, name) < LUCK


def test_what_grows_where_nobody_looks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right, seen = protocol.PlasmProtocol.datagram_received, []

    def forgetful(self: Any, data: bytes, address: Any) -> None:
        seen.append((data, address))
        right(self, data, address)

    monkeypatch.setattr(protocol.PlasmProtocol, "datagram_received", forgetful)
    assert _growth(monkeypatch, "datagram") > LUCK


_range = web._range


class _Anything(str):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


PLANTED: list[tuple[str, Any, str, Any]] = [
    ("datagram", wire, "_DECODE_ERRORS", ()),
    ("datagram", wire, "MAX_DATAGRAM", 1400),
    ("datagram", limits.Seen, "add", _forgetting_nothing),
    ("datagram", limits.Said, "add", _believing_for_ever),
    ("datagram", ids, "is_askable", lambda node: True),
    ("datagram", storage, "verify", lambda record: 1 / 0),
    ("record", storage, "verify", lambda record: True),
    ("record", storage.RecordStorage, "_make_room", lambda *_: True),
    ("record", record, "check_name", lambda name: name),
    ("record", record, "_VALUE_TYPES", {int, float, bool, str, bytes, type(None)}),
    ("pointer", manifest.Pointer, "_check", lambda self: None),
    ("manifest", manifest, "check_filename", lambda name: name),
    ("settings", values, "_shown", repr),
    ("settings", values, "printable", str),
    ("page", web, "_range", _one_too_many),
    ("page", web, "_logger", lambda: None),
    ("page", os, "close", lambda descriptor: None),
    ("page", page, "escape", str),
    ("page", page.Feed, "remove", lambda self, listener: None),
    ("page", gateway.Pointer, "decode", lambda value: manifest.Pointer(OTHER, "1", "x", bytes(32), 1)),
    ("socket", udp, "MAX_READ", 4000),
    ("socket", mmsg.Batches, "_sender", lambda self, name: ("127.0.0.1", 1)),
    ("fetch", folder.File, "sha256", property(lambda self: "0" * 64)),
    (
        "fetch",
        fetch,
        "_verify",
        lambda data, offer, target, now: manifest.verify_manifest(data, offer.record.public_key),
    ),
    ("fetch", fetch, "MAX_REASON", 10**6),
    ("fetch", folder.os, "O_NOFOLLOW", 0),
    ("shown", watch, "printable", str),
    ("shown", watch.math, "isfinite", lambda value: True),
    ("state", statefile, "_checksum", lambda *_: 0),
    ("state", statefile, "_TORN", ()),
    ("state", statefile.StateFile, "_set_aside", lambda self, now, why: [each.unlink() for each in self._paths()]),
]


@pytest.mark.parametrize(("name", "where", "what", "bug"), PLANTED, ids=[f"{p[0]}-{p[2]}" for p in PLANTED])
@pytest.mark.unguarded
@pytest.mark.filterwarnings("ignore")
def test_a_planted_bug_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, where: Any, what: str, bug: Callable[..., Any]
) -> None:
    monkeypatch.setattr(where, what, bug)
    found = False
    try:
        play_all(name)
    except BaseException:  # noqa: BLE001  # whatever the bug makes of it
        found = True
    with monkeypatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda lost: None)
        gc.collect()  # what the broken world has left is not for the next test to find
    assert found


def test_a_source_that_is_empty_makes_the_first_choice() -> None:
    source = Source(b"")
    assert (source.below(7), source.pick("ab"), source.rest(), bool(source)) == (0, "a", b"", False)
    require(True, "")
