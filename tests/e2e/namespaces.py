"""Hosts with addresses of their own on one network: namespaces, joined by cables (veth) to a switch (a bridge).

Nothing of it touches the machine's own network, and all of it goes when `Network.close` is called.
"""

import asyncio
import contextlib
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What becomes of all that a host sends: it is late (s), and some of it is lost.
DELAY, LOSS = 0.02, 0.02
# Of Linux' packet sockets: every protocol, and what the host itself sent.
_ALL, _OUTGOING = 3, 4
_SOL_PACKET, _PACKET_VNET_HDR = 263, 15


class UnavailableError(Exception):
    """Namespaces, or netem, cannot be had; it says why."""


@dataclass(frozen=True, slots=True)
class Host:
    """One host: the name of its namespace, its end of the cable is `eth0`."""

    namespace: str
    address: str
    port: str  # the switch's end of the cable

    def command(self, *words: str | Path) -> tuple[str | Path, ...]:
        """The command, to be run on this host."""
        return ("ip", "netns", "exec", self.namespace, *words)


@dataclass(slots=True)
class Network:
    """Hosts 10.99.0.1 and up, and the switch between them."""

    name: str = field(default_factory=lambda: f"plasm-{os.getpid()}-{secrets.token_hex(3)}")
    hosts: list[Host] = field(default_factory=list)
    _made: list[str] = field(default_factory=list)
    _hub: "subprocess.Popen[str] | None" = None

    @classmethod
    def of(cls, count: int) -> "Network":
        """A network of this many hosts. Raises `UnavailableError` when this machine cannot have one."""
        if not sys.platform.startswith("linux"):
            raise UnavailableError("network namespaces are Linux's")
        if os.geteuid() != 0:
            raise UnavailableError("network namespaces are made by root alone")
        if not shutil.which("ip") or not shutil.which("tc"):
            raise UnavailableError("there is no `ip` or no `tc`: install iproute2")
        network = cls()
        try:
            network._make(count)
        except subprocess.CalledProcessError as error:
            network.close()
            raise UnavailableError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from None
        except BaseException:
            network.close()
            raise
        return network

    def impair(self) -> str:
        """Delay and lose what every host sends, by netem, or by a hub of ours where the kernel has none: which."""
        for host in self.hosts:
            netem = ("netem", "delay", f"{1000 * DELAY}ms", "loss", f"{100 * LOSS}%")
            try:
                _run("tc", "-n", host.namespace, "qdisc", "add", "dev", "eth0", "root", *netem)
            except subprocess.CalledProcessError as error:
                self._put_hub()
                return f"a hub in place of netem, which this kernel does not have ({error.stderr.strip()})"
        return "netem"

    def _put_hub(self) -> None:
        """Put a process of ours in the place of the switch."""
        ports = [host.port for host in self.hosts]
        for port in ports:
            _run("ip", "-n", self.name, "link", "set", port, "nomaster")
        here = ("ip", "netns", "exec", self.name, sys.executable, "-m", "tests.e2e.namespaces", "hub", *ports)
        self._hub = subprocess.Popen(here, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._hub.stdout is not None
        if self._hub.stdout.readline() != "ready\n":
            raise UnavailableError("no packet sockets, so neither delay nor loss")

    def cut_off(self, host: Host) -> None:
        """Pull the host's cable out of the switch."""
        _run("ip", "-n", self.name, "link", "set", host.port, "down")

    def heal(self, host: Host) -> None:
        """Plug it in again."""
        _run("ip", "-n", self.name, "link", "set", host.port, "up")

    def close(self) -> None:
        """Delete every namespace that was made; the cables and the switch go with them."""
        if self._hub is not None:
            self._hub.kill()
            self._hub.communicate()
        for name in reversed(self._made):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        self._made.clear()

    def _make(self, count: int) -> None:
        self._add(self.name)
        _run("ip", "-n", self.name, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", self.name, "link", "set", "switch", "up")
        for number in range(1, count + 1):
            host = Host(f"{self.name}-{number}", f"10.99.0.{number}", f"port{number}")
            self._add(host.namespace)
            cable = ("link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _run("ip", "-n", self.name, *cable)
            _run("ip", "-n", self.name, "link", "set", host.port, "master", "switch", "up")
            _run("ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
            _run("ip", "-n", host.namespace, "link", "set", "eth0", "up")
            self.hosts.append(host)

    def _add(self, name: str) -> None:
        self._made.append(name)  # first: half of one is deleted too
        _run("ip", "netns", "add", name)


def _run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout


# -- on a host: `python -m tests.e2e.namespaces WHAT ADDRESS ...` ------------------------------------------------------


async def _held(address: str, target: str) -> str:
    """The versions that the node at the address itself holds, whoever else does."""
    from kademlia.node import Node

    from plasm_dht import PlasmServer
    from plasm_dht.config import parse_address
    from plasm_dht.provider.manifest import Pointer, record_name
    from plasm_dht.record import decode, shared_key

    async with PlasmServer(node_id=bytes(20)) as reader:
        await reader.listen(0)
        answered = False
        for _ in range(5):  # datagrams are lost
            for contact in await reader.bootstrap([parse_address(address)]):
                answered, found = await reader.protocol.call_find_value(
                    contact, Node(shared_key(record_name(target))), 0
                )
            if answered:
                break
        else:
            return "no answer"
    records = [decode(envelope) for envelope in found.envelopes] if found else []
    return " ".join("-" if record.withdrawn else Pointer.decode(record.value).version for record in records)


async def _echo(address: str) -> str:
    """How long each of ten datagrams to the node at the address takes to be answered (ms); "lost": not at all."""
    from plasm_dht.config import parse_address

    loop = asyncio.get_running_loop()
    took = []
    for number in range(10):
        answer: asyncio.Future[float] = loop.create_future()

        class Asker(asyncio.DatagramProtocol):
            def datagram_received(self, data: bytes, source: object, answer: "asyncio.Future[float]" = answer) -> None:
                if not answer.done():
                    answer.set_result(loop.time())

        transport, _ = await loop.create_datagram_endpoint(Asker, remote_addr=parse_address(address))
        began = loop.time()
        transport.sendto(b"\x00" + bytes([number]) * 20 + b"\x92\xa4stun\x90")
        try:
            took.append(f"{1000 * (await asyncio.wait_for(answer, 1) - began):.1f}")
        except TimeoutError:
            took.append("lost")
        transport.close()
    return " ".join(took)


async def _be_hub(*ports: str) -> str:
    """Pass every frame on to all other ports, late, but for those that are lost. Ends when it is killed."""
    loop = asyncio.get_running_loop()
    sockets = []
    for port in ports:
        each = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(_ALL))
        each.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)  # checksums that veth leaves to the "hardware" stay so
        each.bind((port, _ALL))
        sockets.append(each)

    def send(frame: bytes, source: socket.socket) -> None:
        for each in sockets:
            if each is not source:
                with contextlib.suppress(OSError):  # this cable is out
                    each.send(frame)

    def receive(source: socket.socket) -> None:
        with contextlib.suppress(OSError):
            frame, (_, _, kind, *_) = source.recvfrom(2**17)
            if kind != _OUTGOING and random.random() >= LOSS:
                loop.call_later(DELAY, send, frame, source)

    for each in sockets:
        loop.add_reader(each, receive, each)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.Event().wait()
    return ""


async def _count(address: str) -> str:
    """How many of 500 datagrams to the node at the address are answered; few at once, so that no buffer loses one."""
    from plasm_dht.config import parse_address

    answered: set[bytes] = set()
    heard = asyncio.Event()

    class Asker(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, source: object) -> None:
            answered.add(data[1:21])
            heard.set()

    endpoint = asyncio.get_running_loop().create_datagram_endpoint(Asker, remote_addr=parse_address(address))
    transport, _ = await endpoint
    for first in range(0, 500, 10):
        asked = {number.to_bytes(20) for number in range(first, first + 10)}
        for each in asked:
            transport.sendto(b"\x00" + each + b"\x92\xa4stun\x90")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10 * DELAY):
                while not asked <= answered:
                    heard.clear()
                    await heard.wait()
    transport.close()
    return str(len(answered))


if __name__ == "__main__":
    sys.stdout.write(
        asyncio.run({"held": _held, "echo": _echo, "count": _count, "hub": _be_hub}[sys.argv[1]](*sys.argv[2:])) + "\n"
    )
