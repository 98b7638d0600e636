"""A PlasmServer whose calls overlap, are cancelled, or come at the wrong time."""

import asyncio

import pytest

from plasm_dht import PlasmServer
from plasm_dht.errors import ConfigError, ListenError
from tests.dht.support import HERE, IDENTITIES, server


async def test_leaving_while_publishes_are_under_way_leaves_nothing_alive() -> None:
    async with server() as other, server([other]) as reader:
        publisher = PlasmServer(identity=IDENTITIES[1], rate_limit=None)
        await publisher.listen(0, HERE)
        await publisher.bootstrap([other.address])
        publishing = [asyncio.ensure_future(publisher.publish(f"name/{number}", number)) for number in range(100)]
        await asyncio.sleep(0.01)
        await publisher.close()
        await asyncio.gather(*publishing, return_exceptions=True)
        found = await asyncio.gather(*(reader.get(f"name/{number}") for number in range(100)))
        assert found == [None] * 100


async def test_a_publish_that_was_cancelled_at_once_is_still_kept_alive() -> None:
    async with server() as other, server([other], identity=IDENTITIES[1]) as publisher:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await publisher.publish("name", "value")
        assert publisher._refresher is not None
        assert publisher._refresher.due_in("name") is not None


async def test_a_life_of_its_own_is_refreshed_at_two_thirds_of_it_and_never_later_than_the_interval() -> None:
    options = {"identity": IDENTITIES[1], "record_ttl": 3600, "refresh_interval": 600}
    async with server() as other, server([other], **options) as publisher:
        for name, ttl, due in (("usual", None, 600), ("short", 30, 20), ("long", 100_000, 600)):
            await publisher.publish(name, 1, ttl=ttl)
            standing = publisher.standing(name)
            assert standing is not None
            assert standing.refresh_in == pytest.approx(due, rel=0.06)


async def test_waiting_for_a_failure_can_be_cancelled() -> None:
    async with server() as node:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await node.wait_failed()


async def test_a_node_listens_once_and_publishes_nothing_after_it_has_stopped() -> None:
    async with server(identity=IDENTITIES[1]) as node:
        with pytest.raises(ListenError, match="listens already"):
            await node.listen(0, HERE)
        node.stop()
        with pytest.raises(ListenError, match="stopped"):
            await node.publish("name", "value")


async def test_an_impossible_port_of_a_bootstrap_node_is_refused() -> None:
    async with server() as node:
        with pytest.raises(ConfigError, match="70000"):
            await node.bootstrap([(HERE, 70000)])
        assert node.address[1]


@pytest.mark.parametrize("setting", [{"quorum": 2.5}, {"max_records": -5}, {"max_ttl": 0}, {"record_ttl": "60"}])
def test_an_impossible_setting_is_named_with_its_value(setting: dict[str, object]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
        PlasmServer(**setting)  # type: ignore[arg-type]  # wrong on purpose
