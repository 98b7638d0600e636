"""What a service that runs takes over when its settings are read again."""

from typing import TYPE_CHECKING

from plasm_dht.config import Change, Settings, change
from plasm_dht.dht.server import PlasmServer

if TYPE_CHECKING:
    from plasm_dht.provider.front import Front


async def take_over(running: Settings, read: Settings, server: PlasmServer, front: "Front | None") -> Change:
    """Apply what can change of the settings that were read. What that is, and what needs a restart."""
    what = change(running, read)
    before, now = running.dht, what.settings.dht
    if (now.record_ttl, now.refresh_interval) != (before.record_ttl, before.refresh_interval):
        server.set_life(now.record_ttl, now.refresh_interval)
    if front is not None:
        front.gateway.trust = what.settings.trust.publishers
    if now.bootstrap != before.bootstrap:
        await server.bootstrap(now.bootstrap, replace=True)
    return what
