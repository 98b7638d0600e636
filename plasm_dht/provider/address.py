"""Where clients find what a provider serves: as configured, as bound, or as its neighbours see it."""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable
from contextlib import suppress

from plasm_dht.config import Settings, format_address
from plasm_dht.dht.server import PlasmServer

log = logging.getLogger(__name__)

Address = tuple[str, int]

# Neighbours are asked again this long after the first of some new ones came, and at least this often (s).
SETTLE, ASK_AGAIN = 1.0, 60.0


class BaseUrl:
    """The URL below which CHANNEL/ARCH/ is found.

    `http` is the (host, port) of the HTTP server, as bound; `met` is set when there is a neighbour more, who may know
    our address. What neighbours said last stays true when they are gone.
    """

    def __init__(self, settings: Settings, server: PlasmServer, http: Address, met: asyncio.Event) -> None:
        self._configured = settings.base_url
        self._server = server
        self._host, self._port = http
        self._seen: str | None = None
        self._warned = ""
        self._met = met

    async def look(self) -> str:
        """The URL as it is by now, without a `/` at its end."""
        if self._configured is not None:
            return self._configured
        takes_ipv6 = ":" in self._host  # what is bound to `::` serves IPv4 as well
        takes_ipv4 = not takes_ipv6 or self._host == "::"
        self._seen = await self._server.seen_address(ipv4=takes_ipv4, ipv6=takes_ipv6) or self._seen
        host = self._host
        if _is_wildcard(host):
            host = self._seen or ("::1" if takes_ipv6 else "127.0.0.1")
        url = f"http://{format_address((host, self._port))}"
        warning = self._doubt(url, host)
        if warning not in ("", self._warned):
            log.warning("%s; --base-url names another address", warning)
        self._warned = warning
        return url

    async def follow(self, take: Callable[[str], None]) -> None:
        """Give the URL to `take` whenever it may have changed, until cancelled."""
        while self._configured is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(ASK_AGAIN):
                    await self._met.wait()
            await asyncio.sleep(SETTLE)  # others may come with it
            self._met.clear()
            take(await self.look())

    def _doubt(self, url: str, host: str) -> str:
        """Why clients may not find anything at the URL; "" when there is no reason to think so."""
        bound = self._server.address[0]
        if self._seen is not None and self._seen not in (self._host, bound) and not _is_ours(self._seen):
            where = f"binds {bound}" if not _is_wildcard(bound) else "has no such address"
            return f"neighbours see this node at {self._seen}, but it {where}, and {url} is advertised"
        if not _is_wildcard(self._host) or ipaddress.ip_address(host).is_global:
            return ""
        if self._seen is None:
            return f"no neighbour has said yet at which address it sees this node: {url} is advertised until one does"
        return f"{url} is advertised, a private address, which is not reached from everywhere"


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _is_ours(ip: str) -> bool:
    """Whether this machine has the address: then it can be bound."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((ip, 0))
    except OSError:
        return False
    return True
