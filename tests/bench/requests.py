"""Requests a second that one process answers: the same ids, the same bytes held, the same generator, turn by turn.

Each kind of node is a process of its own; so is the generator (this one). A repetition of one is followed by one of the
other, so that what slows the machine down slows down both. Replies are matched and looked into: a repetition with wrong
ones raises.
"""

import asyncio
import random
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import msgspec
import umsgpack
from kademlia.node import Node
from kademlia.routing import RoutingTable

from plasm_dht import Identity
from plasm_dht.clock import Clock
from plasm_dht.dht.routing import PlasmRoutingTable
from plasm_dht.record import shared_key, sign
from tests.bench import opendht
from tests.bench.answerer import HOST, NODE_ID
from tests.bench.children import BenchError, Child
from tests.bench.load import Burst, Lane, message_id, run
from tests.bench.report import NOT_INSTALLED, Result, Row, Scale, Spread, number, ratios, spread

K = 20
NODES = 400  # of the network whose nodes the table has; nearly all find a place in it
ASKED = 500  # of what is held: all these answers are kept
VALUE_BYTES = 250
LANES = 4
# Requests under way a lane. All of them fit the default receive buffer of a socket: 212,992 bytes, some 270 small ones.
WINDOW = 48
# Different requests a lane, sent over and over: more where what is asked for is not to be one of few.
POOL = 4096
MANY = 8 * POOL
# Of what is held: four times as many names as ours keeps answers to.
HELD = 4 * POOL
# Before the first repetition, not counted (s).
WARM = 0.2
TARGET = "at least 8 times stock, aim for 10"
NO_TARGET = "none set"
RPCS = ("find_value", "find_node")
# For all that is held, each as often as any other, so that no answer is there when it is asked for again.
EACH = "find_value for 16,384 names"
# While somebody comes or goes each second, which changes what is closest.
TURNOVER = "find_node while contacts change"


@dataclass
class World:
    """What every kind of node knows and holds."""

    contacts: list[tuple[bytes, str, int]]
    held: list[tuple[bytes, bytes]]


class _Full(Exception):  # noqa: N818 - not an error: an answer
    pass


class _Pinger:
    """A stock table wants to ping somebody when a bucket is full."""

    def call_ping(self, node: Any) -> Any:
        raise _Full


def placeable(ids: list[bytes]) -> list[bytes]:
    """Of the ids those that both kinds of table have a place for, so that both know the same nodes."""
    while True:
        own = Node(NODE_ID)
        stock, ours = RoutingTable(_Pinger(), K, own), PlasmRoutingTable(None, K, own, Clock())
        kept = []
        for index, node_id in enumerate(ids):
            node = Node(node_id, f"127.1.{index >> 8}.{index & 255}", 8468)
            try:
                stock.add_contact(node)
            except _Full:
                continue
            if ours.add_contact(node):
                kept.append(node_id)
        if len(kept) == len(ids):
            return kept
        ids = kept


def world(scale: Scale, names: int) -> World:
    """Contacts and records, the same for the same seed."""
    source = random.Random(scale.seed)
    ids = placeable([source.randbytes(20) for _ in range(NODES)])
    contacts = [(node_id, f"127.1.{index >> 8}.{index & 255}", 8468) for index, node_id in enumerate(ids)]
    identity, now = Identity.generate(), int(time.time() * 1000)
    held = []
    for index in range(names):
        name = f"bench/{index:05d}"
        filler = bytes(VALUE_BYTES - 147)
        record = sign(identity, name, filler, seq=now, issued_at=now, expires_at=now + 86_400_000)
        held.append((shared_key(name), record.envelope))
    return World(contacts, held)


class Subject:
    """A node under test: its process, and the lanes that ask it."""

    def __init__(self, kind: str, world: World, stack: ExitStack) -> None:
        self.kind = kind
        self.world = world
        self.child = stack.enter_context(Child("tests.bench.answerer", kind))
        address = (HOST, self.child.hello["port"])
        source = random.Random(kind)
        self.sockets, self.peers = [], []
        for lane in range(LANES):
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            sock.bind((f"127.0.0.{lane + 2}", 0))
            sock.connect(address)
            self.sockets.append(sock)
        # Neighbours ask: whoever is in the table already causes neither pings nor hand-off. Each takes the place of a
        # contact, so that no bucket overflows.
        self.contacts = list(world.contacts)
        for lane, sock in enumerate(self.sockets):
            place = source.randrange(len(self.contacts) // LANES) * LANES + lane
            node_id = self.contacts[place][0]
            self.contacts[place] = (node_id, *sock.getsockname())
            self.peers.append(node_id)
        told = [(node_id.hex(), ip, port) for node_id, ip, port in self.contacts]
        self.ask_table(contacts=told, held=[(key.hex(), value.hex()) for key, value in world.held])
        self.targets: list[bytes] = []
        self.lanes: list[Lane] = []
        self.exact: list[float] = []

    def ask_table(self, **what: Any) -> None:
        """Tell it, and see that its table is as it should be."""
        told = self.child.ask(**what)
        if told["contacts"] != len(self.contacts):
            raise BenchError(f"{self.kind} has {told['contacts']} contacts, not {len(self.contacts)}")

    def prepare(self, rpc: str, *, each: bool = False, random_ids: int = MANY) -> None:
        """Make the requests of this kind; `each`: for all that is held, else for some of it, or so many random ids."""
        source = random.Random(rpc)
        self.exact.clear()
        keys = [key for key, _ in self.world.held]
        if each:
            self.targets = source.sample(keys, len(keys))
        elif rpc == "find_value":
            self.targets = [source.choice(keys[:ASKED]) for _ in range(POOL)]
        else:
            self.targets = [source.randbytes(20) for _ in range(random_ids)]
        self.lanes = [
            Lane(
                sock,
                [
                    b"\x00" + message_id(index) + msgspec.msgpack.encode([rpc, [peer, target]])
                    for index, target in enumerate(self.targets)
                ],
                WINDOW,
                first=lane * len(self.targets) // LANES,  # so that no two ask for the same at about the same time
            )
            for lane, (sock, peer) in enumerate(zip(self.sockets, self.peers, strict=True))
        ]

    def measure(self, rpc: str, seconds: float) -> dict[str, float]:
        """One repetition. Raises `BenchError` when replies are wrong."""
        before = self.child.cpu
        burst = run(self.lanes, seconds)
        used = self.child.cpu - before
        self.check(rpc, burst)
        answered = burst.count.answered
        return {
            "wall": answered / burst.wall,
            "cpu": answered / used,
            "generator": burst.generator / used,
            "lost": burst.count.lost / answered,
            "bytes": burst.count.longest,
        }

    def check(self, rpc: str, burst: Burst) -> None:
        """Whether what came back is what was asked for."""
        count = burst.count
        if not count.samples or count.strange:
            raise BenchError(f"{self.kind} {rpc}: {count.answered} replies, {count.strange} strange ones")
        held, known = dict(self.world.held), {(bytes(each[0]), *each[1:]) for each in self.contacts}
        for index, datagram in count.samples:
            reply, target = umsgpack.unpackb(datagram[21:]), self.targets[index]
            if rpc == "find_value":
                if reply["value"] != held[target]:
                    raise BenchError(f"{self.kind} {rpc}: another value than was asked for: {reply!r}")
                continue
            nodes = {tuple(node) for node in reply}
            if len(reply) != K or len(nodes) != K or not nodes <= known:
                raise BenchError(f"{self.kind} {rpc}: not {K} known nodes: {reply!r}")
            # The asker itself is left out, and which lane it was is not kept: so one of K + 1.
            near = sorted(known, key=lambda node: int.from_bytes(node[0]) ^ int.from_bytes(target))[: K + 1]
            self.exact.append(len(nodes & set(near)) / K)


class Bare(Subject):
    """A loop that reads and sends and does nothing else."""

    def ask_table(self, **what: Any) -> None:
        """It knows nobody."""

    def size(self, size: int) -> None:
        """How long its replies are to be (bytes)."""
        self.child.ask(size=size)

    def check(self, rpc: str, burst: Burst) -> None:
        """Its replies say nothing."""


def measure(scale: Scale) -> Result:
    """The rows of this group."""
    repetitions, seconds, random_ids = scale.pick((1, 0.05, POOL), (7, 1.0, MANY), (15, 2.0, MANY))
    result = Result()
    with ExitStack() as stack:
        asyncio.set_event_loop(loop := asyncio.new_event_loop())  # a stock table makes tasks
        stack.callback(loop.close)
        known = world(scale, scale.pick(POOL, HELD, HELD))
        subjects = {kind: Subject(kind, known, stack) for kind in ("ours", "stock")}
        bare = Bare("bare", known, stack)
        other = opendht.subject(stack, scale)
        for rpc in RPCS:
            figures: dict[str, list[dict[str, float]]] = {kind: [] for kind in subjects}
            others: list[dict[str, float]] = []
            bares: list[dict[str, float]] = []
            for subject in subjects.values():
                subject.prepare(rpc, random_ids=random_ids)
                subject.measure(rpc, WARM)
            if other is not None:
                other.prepare(rpc)
                other.measure(WARM)
            bare.prepare(rpc, random_ids=random_ids)
            bare.size(round(subjects["ours"].measure(rpc, WARM)["bytes"]))
            for _ in range(repetitions):
                bares.append(bare.measure(rpc, seconds))
                for kind, subject in subjects.items():
                    figures[kind].append(subject.measure(rpc, seconds))
                if other is not None:
                    others.append(other.measure(seconds))
            result.rows += rows(rpc, figures, others, subjects)
            result.rows.append(limit(rpc, figures["ours"], bares))
        for what, rpc in ((EACH, "find_value"), (TURNOVER, "find_node")):
            figures = {kind: [] for kind in subjects}
            for subject in subjects.values():
                subject.ask_table(turnover=what == TURNOVER)
                subject.prepare(rpc, each=what == EACH, random_ids=random_ids)
                subject.measure(rpc, WARM)
            for _ in range(repetitions):
                for kind, subject in subjects.items():
                    figures[kind].append(subject.measure(rpc, seconds))
            result.rows += rows(what, figures, None, subjects)
        for subject in subjects.values():
            subject.ask_table()
    return result


def rows(
    rpc: str,
    figures: dict[str, list[dict[str, float]]],
    others: list[dict[str, float]] | None,
    subjects: dict[str, Subject],
) -> list[Row]:
    """A request by the CPU time of the server, and by the wall."""
    ours, stock = figures["ours"], figures["stock"]
    note = " ".join(
        f"{kind}: replies of {each[-1]['bytes']:.0f} bytes, {max(one['lost'] for one in each):.2%} lost, the generator"
        f" used {max(one['generator'] for one in each):.0%} of the server's CPU time."
        for kind, each in {**figures, **({"OpenDHT": others} if others else {})}.items()
    )
    if rpc in ("find_node", TURNOVER):
        note += " Of the 20 truly closest in a reply: " + ", ".join(
            f"{kind} {sum(subject.exact) / len(subject.exact):.1%}" for kind, subject in subjects.items()
        )
    found = []
    for by, unit, what in (
        ("cpu", "a CPU second", "answered, by CPU time"),
        ("wall", "a second", "answered, by the clock"),
    ):
        ratio = ratios([each[by] for each in ours], [each[by] for each in stock])
        missing = "not measured" if others is None else NOT_INSTALLED
        opendht_spread: Spread | str = spread(each[by] for each in others) if others else missing
        found.append(
            Row(
                "requests",
                f"{rpc} {what}",
                unit,
                spread(each[by] for each in ours),
                spread(each[by] for each in stock),
                opendht_spread,
                ratio,
                "more",
                TARGET if rpc in RPCS else NO_TARGET,
                ratio.median >= 8 if rpc in RPCS else None,
                note if by == "cpu" else "",
            )
        )
    return found


def limit(rpc: str, ours: list[dict[str, float]], bares: list[dict[str, float]]) -> Row:
    """How near it comes to a loop that only reads and sends."""
    share = ratios([each["cpu"] for each in ours], [each["cpu"] for each in bares])
    reached = spread(each["cpu"] for each in bares)
    return Row(
        "requests",
        f"{rpc}, of what a bare loop reaches",
        "a CPU second",
        spread(each["cpu"] for each in ours),
        ratio=share,
        better="more",
        note="The ratio is not to stock, but to a loop around recvmmsg and sendmmsg that does nothing else and replies "
        f"with as many bytes: it reaches {number(reached.median)} ({number(reached.low)} to {number(reached.high)}).",
    )
