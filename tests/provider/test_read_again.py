"""What a node does with settings that are read again. tests/e2e/test_reload.py has the rest, with real services."""

from plasm_dht.config import DhtSettings, Settings
from plasm_dht.provider.reload import take_over
from tests.dht.support import server


async def test_the_bootstrap_addresses_of_before_are_asked_no_more() -> None:
    async with server() as old, server() as new, server([old]) as node:
        before, read = (Settings(dht=DhtSettings(bootstrap=(each.address,))) for each in (old, new))
        what = await take_over(before, read, node, None)
        assert what.applied == ("provider.dht.bootstrap",)
        assert node._membership is not None
        assert node._membership._addresses == [new.address]
        assert {each.address for each in node.protocol.router.live()} == {old.address, new.address}
