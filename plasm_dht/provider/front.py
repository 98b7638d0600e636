"""The HTTP server in front of a node: what it serves, the gateway, the page for people and the metrics."""

from typing import Self

from plasm_dht.config import Settings
from plasm_dht.provider import gateway, page, web
from plasm_dht.provider.journal import Journal
from plasm_dht.provider.metrics import Exposition
from plasm_dht.provider.observed import ObservedServer
from plasm_dht.provider.site import Site

Address = tuple[str, int]


class Front:
    """Answers for a node, until it is closed.

    Attributes:
        address: (host, port) as bound.
        gateway: what looks records up for clients.
    """

    def __init__(self, address: Address, runner: web.Runner, asked: gateway.Gateway) -> None:
        self.address = address
        self.gateway = asked
        self._runner = runner

    @classmethod
    async def open(
        cls, settings: Settings, site: Site, server: ObservedServer, journal: Journal, *, own: str | None = None
    ) -> Self:
        """Serve the site; `own` is the id of the publisher whose records it describes. Raises `ListenError`."""
        app = web.create_app(site)
        table = server.protocol.router
        asked = gateway.Gateway(server, table, settings.trust.publishers, own)
        gateway.add_to(app, asked)
        page.add_to(app, table, journal, server.holders)
        site.metrics = Exposition(server, site.traffic).render
        runner, port = await web.serve(app, settings.http_host, settings.http_port)
        site.address = settings.http_host, port
        return cls(site.address, runner, asked)

    async def close(self) -> None:
        """End every connection; downloads get half a second."""
        await self._runner.cleanup()
