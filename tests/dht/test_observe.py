"""`server.watch`: how it begins, ends, is shared and is bounded; what it sees over hours is in tests/virtual."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import pytest

from plasm_dht import Event, PlasmServer
from plasm_dht.dht import observe
from plasm_dht.errors import ConfigError, IdentityError, ListenError, RecordError
from plasm_dht.record import Value, bound_key, shared_key
from plasm_dht.testing import LocalNetwork, local_network
from tests.dht.support import IDENTITIES, record

NAME = "any/name"
PATIENCE = 10.0


@pytest.fixture
async def network() -> AsyncIterator[LocalNetwork]:
    async with local_network(3, record_ttl=60) as network:
        yield network


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that the network was asked for."""
    asked: list[str] = []
    original = observe.Watch._look

    async def look(watch: observe.Watch) -> None:
        asked.append(watch._name)
        await original(watch)

    monkeypatch.setattr(observe.Watch, "_look", look)
    return asked


def tasks() -> list[str]:
    """The tasks that watch something."""
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return [name for name in names if name.startswith("Watch.")]


async def following(events: AsyncGenerator[Event, None]) -> tuple[str, Value]:
    async with asyncio.timeout(PATIENCE):
        event = await anext(events)
    return event.kind, event.record.value


async def test_it_begins_with_what_is_live_and_tells_each_change_and_the_end(network: LocalNetwork) -> None:
    publisher, _, node = network.nodes
    await publisher.publish(NAME, "one")
    async with aclosing(node.watch(NAME)) as events:
        assert await following(events) == ("published", "one")
        await publisher.publish(NAME, "one")  # the same again
        await publisher.publish(NAME, "two")
        assert await following(events) == ("changed", "two")
        await publisher.withdraw(NAME)
        assert await following(events) == ("withdrawn", "two")
        await publisher.publish(NAME, "three", ttl=1)
        assert await following(events) == ("published", "three")


async def test_an_event_says_of_whose_record_and_when(network: LocalNetwork) -> None:
    publisher, _, node = network.nodes
    assert publisher.identity is not None
    before = node.now()
    await publisher.publish(NAME, "one", ttl=1)
    await publisher.close(withdraw=False)
    network.nodes.remove(publisher)
    async with aclosing(node.watch(NAME)) as events:
        first, last = await anext(events), await anext(events)
    assert (first.kind, last.kind) == ("published", "expired")
    assert first.record.publisher == publisher.identity.publisher_id
    assert before <= first.at <= first.record.expires_at
    assert last.record.expires_at <= last.at < last.record.expires_at + 500
    with pytest.raises(AttributeError):
        first.at = 0  # type: ignore[misc]  # the checker refuses it too


@pytest.mark.parametrize("other", [True, 1.0, "1", b"1"])
async def test_a_value_of_another_type_is_a_change(network: LocalNetwork, other: Value) -> None:
    publisher, _, node = network.nodes
    await publisher.publish(NAME, 1)
    async with aclosing(node.watch(NAME)) as events:
        await following(events)
        await publisher.publish(NAME, other)
        assert await following(events) == ("changed", other)


async def test_of_several_publishers_each_is_told_of_unless_a_trust_list_leaves_it_out(network: LocalNetwork) -> None:
    one, two, node = network.nodes
    assert two.identity is not None
    await one.publish(NAME, "one")
    await two.publish(NAME, "two")
    async with (
        aclosing(node.watch(NAME)) as everybody,
        aclosing(node.watch(NAME, trust=[two.identity.publisher_id])) as trusted,
    ):
        assert {await following(everybody), await following(everybody)} == {("published", "one"), ("published", "two")}
        assert await following(trusted) == ("published", "two")
        await one.withdraw(NAME)
        await two.withdraw(NAME)
        assert {await following(everybody), await following(everybody)} == {("withdrawn", "one"), ("withdrawn", "two")}
        assert await following(trusted) == ("withdrawn", "two")


async def test_what_is_stored_here_is_told_at_once_without_asking(network: LocalNetwork, looks: list[str]) -> None:
    publisher, _, node = network.nodes
    async with aclosing(node.watch(NAME)) as events:
        following_soon = asyncio.ensure_future(following(events))
        await asyncio.sleep(0.3)  # nothing tells that the first look-up has found nothing
        assert looks == [NAME]
        await publisher.publish(NAME, "one")
        assert await asyncio.wait_for(following_soon, 0.3) == ("published", "one")
        assert looks == [NAME]
        await node.publish(NAME, "mine")  # its own records, too
        assert await following(events) == ("published", "mine")


async def test_all_watchers_of_a_name_share_one_task_and_its_looks(network: LocalNetwork, looks: list[str]) -> None:
    publisher, _, node = network.nodes
    await publisher.publish(NAME, "one")
    watchers = [node.watch(NAME) for _ in range(20)]
    assert [await following(each) for each in watchers] == [("published", "one")] * 20
    assert (looks, len(tasks())) == ([NAME], 1)
    other = node.watch("other/name")
    waiting = asyncio.ensure_future(following(other))
    await asyncio.sleep(0.2)  # as above: its first look-up has found nothing
    assert len([each for each in tasks() if each == "Watch.run"]) == 2
    await publisher.publish("other/name", 1)
    await waiting
    for each in [*watchers[:19], other]:
        await each.aclose()
    await publisher.publish(NAME, "two")
    assert await following(watchers[19]) == ("changed", "two")
    await watchers[19].aclose()
    assert (tasks(), node.storage.observers) == ([], {})


@pytest.mark.parametrize("how", ["aclose", "cancel", "break"])
async def test_however_it_is_left_nothing_goes_on(network: LocalNetwork, how: str) -> None:
    publisher, _, node = network.nodes
    await publisher.publish(NAME, "one")
    events = node.watch(NAME)
    assert await following(events) == ("published", "one")
    assert node.storage.observers.keys() == {shared_key(NAME)}
    if how == "aclose":
        await events.aclose()
    elif how == "cancel":
        waiting = asyncio.ensure_future(following(events))
        await asyncio.sleep(0.1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    else:
        del events  # as after a `break`: nobody has it any more
        await asyncio.sleep(0.1)
    assert (tasks(), node.storage.observers) == ([], {})
    again = node.watch(NAME)
    assert await following(again) == ("published", "one")
    await again.aclose()


async def test_left_before_it_began_it_never_begins(network: LocalNetwork) -> None:
    node = network.nodes[0]
    untouched = node.watch(NAME)
    waiting = asyncio.ensure_future(following(node.watch(NAME)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await untouched.aclose()
    await asyncio.sleep(0.1)
    assert (tasks(), node.storage.observers) == ([], {})


@pytest.mark.parametrize("how", ["close", "stop"])
async def test_it_ends_when_the_node_stops(network: LocalNetwork, how: str) -> None:
    node = network.nodes[1]

    async def follow() -> str:
        async for _ in node.watch(NAME):
            raise AssertionError("nothing was published")
        return "ended"

    followers = [asyncio.ensure_future(follow()) for _ in range(2)]
    await asyncio.sleep(0.2)  # two that wait already, and one that has just begun
    followers.append(asyncio.ensure_future(follow()))
    await asyncio.sleep(0)
    if how == "close":
        await node.close()
    else:
        node.stop()
    async with asyncio.timeout(PATIENCE):
        assert await asyncio.gather(*followers) == ["ended"] * 3
    assert tasks() == []
    with pytest.raises(ListenError):
        node.watch(NAME)


async def test_it_ends_when_the_node_stops_in_the_moment_in_which_it_begins(network: LocalNetwork) -> None:
    events = network.nodes[1].watch(NAME)
    network.nodes[1].stop()
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(StopAsyncIteration):
            await anext(events)


async def test_a_node_that_does_not_listen_cannot_watch() -> None:
    with pytest.raises(ListenError, match=r"call listen\(port\)"):
        PlasmServer().watch(NAME)


async def test_a_mistake_is_told_before_it_begins(network: LocalNetwork) -> None:
    with pytest.raises(RecordError, match="control character"):
        network.nodes[0].watch("a\nb")
    with pytest.raises(IdentityError, match="'me'"):
        network.nodes[0].watch(NAME, trust=["me"])


async def test_a_slow_watcher_is_told_how_things_are_and_not_each_step(network: LocalNetwork) -> None:
    publisher, _, node = network.nodes
    await publisher.publish(NAME, 0)
    async with aclosing(node.watch(NAME)) as events:
        assert await following(events) == ("published", 0)
        for value in range(1, 6):
            await publisher.publish(NAME, value)
        assert await following(events) == ("changed", 5)
        await publisher.withdraw(NAME)
        await publisher.publish(NAME, 5)  # and back: as if nothing had been
        await publisher.publish("other/name", 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(events), 0.3)


async def test_a_caller_that_will_not_stay_cannot_watch() -> None:
    async with PlasmServer(node_id=bytes(20)) as caller:
        await caller.listen(0, "127.0.0.1")
        with pytest.raises(ConfigError, match="give it no node_id"):
            caller.watch(NAME)


# -- what is known ---------------------------------------------------------------------------------------------------


def watch_of(node: PlasmServer, *, trust: frozenset[bytes] = frozenset()) -> observe.Watch:
    """A watch that nobody runs."""
    assert node._reader is not None
    observer = observe.Observer(node.protocol, node.clock, spawn=lambda _: False, look_up=node._reader.look_up)
    return observe.Watch(observer, NAME, trust)


async def test_made_up_publishers_do_not_make_it_grow_for_ever(
    network: LocalNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "MAX_FOLLOWED", 5)
    node = network.nodes[0]
    watch = watch_of(node)
    for identity in IDENTITIES[:8]:
        watch._take(record(by=identity, name=NAME, issued_at=node.now(), life=0.3))
    told: dict[bytes, observe.Record] = {}
    assert [event.kind for event in watch.news(told)] == ["published"] * 5
    await asyncio.sleep(0.35)  # real records have to end
    for _ in range(2):  # ended, then forgotten
        watch._end_what_is_over()
    assert watch._seen == {}
    assert [event.kind for event in watch.news(told)] == ["expired"] * 5
    assert (told, watch.news(told)) == ({}, [])


async def test_an_older_record_never_replaces_a_newer_one_or_its_tombstone(network: LocalNetwork) -> None:
    node = network.nodes[0]
    watch = watch_of(node)
    now = node.now()
    told: dict[bytes, observe.Record] = {}
    old, new, gone = (record(str(seq), name=NAME, seq=seq, issued_at=now, withdrawn=seq == 3) for seq in (1, 2, 3))
    for each in (new, old):
        watch._take(each)
    assert [(event.kind, event.record) for event in watch.news(told)] == [("published", new)]
    for each in (gone, old, new):
        watch._take(each)
    assert [(event.kind, event.record) for event in watch.news(told)] == [("withdrawn", new)]


async def test_a_newer_record_that_is_over_ends_an_older_one_that_would_live_on(network: LocalNetwork) -> None:
    node = network.nodes[0]
    watch = watch_of(node)
    now = node.now()
    told: dict[bytes, observe.Record] = {}
    watch._take(record("long", name=NAME, seq=1, issued_at=now))
    watch.news(told)
    watch._take(record("short", name=NAME, seq=2, issued_at=now - 5000, life=1))
    assert [event.kind for event in watch.news(told)] == ["expired"]
    watch._take(record("long", name=NAME, seq=1, issued_at=now))
    assert watch.news(told) == []


@pytest.mark.parametrize(("life", "pause"), [(1, 1), (20, 1), (60, 3), (600, 30), (1200, 60), (604_800, 60)])
async def test_how_soon_it_asks_again_is_a_twentieth_of_the_shortest_life(
    network: LocalNetwork, life: float, pause: float
) -> None:
    node = network.nodes[0]
    watch = watch_of(node)
    watch._asked_at = node.clock.elapsed()
    watch._take(record(name=NAME, issued_at=node.now(), life=life))
    watch._take(record(by=IDENTITIES[1], name=NAME, issued_at=node.now(), life=604_800))
    for seen in watch._seen.values():
        seen.last_look = True
    assert pause - 0.5 < watch._due_in() <= pause


async def test_where_nothing_is_it_asks_ever_less_often_and_of_those_whom_it_trusts_first(
    network: LocalNetwork,
) -> None:
    node = network.nodes[0]
    trusted = IDENTITIES[1].public_key
    watch = watch_of(node, trust=frozenset([trusted]))
    assert watch._keys == [shared_key(NAME), bound_key(trusted, NAME)]
    pauses = []
    for _ in range(9):
        await watch._look()
        pauses.append(round(watch._due_in()))
    assert pauses == [2, 4, 8, 16, 32, 60, 60, 60, 60]
