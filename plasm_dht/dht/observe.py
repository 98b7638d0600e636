"""Watching a name: what becomes of each publisher's record, by asking the network and by what is stored at this node.

Nothing follows from silence: a record has ended when a later one says so or when its life is over, never because an
answer did not show it. All watchers of a name share one task and what it has asked.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from plasm_dht.clock import Clock, NetworkTime
from plasm_dht.dht.find import RecordLookup
from plasm_dht.dht.holding import Holding
from plasm_dht.dht.ids import TRANSIENT_ID
from plasm_dht.dht.protocol import PlasmProtocol
from plasm_dht.errors import ConfigError
from plasm_dht.identity import parse_publisher_id
from plasm_dht.record import Record, bound_key, check_name, decode, shared_key

log = logging.getLogger(__name__)

# Between two looks at the network (s): a 20th of the shortest life among the live records, because who lets a record
# live for a minute wants its end known sooner than who lets it live for a day; but a look takes some 25 requests.
PART_OF_LIFE = 20
LEAST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
# One more look this long before a record ends (s), or a sixth of its life: its refresh, which is due after two thirds
# of it, may have been late.
LAST_LOOK = 2.0
# However many records end at different moments, no two looks begin closer to each other (s).
FLOOR = 0.5
# No wait is shorter (s): what is left by subtraction can be too little for a clock to show that it has passed.
LEAST_WAIT = 0.001
# A wall clock that jumps wakes nobody, so it is looked at this often (s).
LOOK_AGAIN = 5.0
# A jump of the wall clock since the last look, beyond what reading two clocks one after the other can differ by (s).
JUMPED = 0.5
# Looks in a row without an answer until that is worth a warning: one may be chance.
UNANSWERED = 2
# Publishers of one name that are followed; without a trust list anybody can make up more of them.
MAX_FOLLOWED = 1000

Kind = Literal["published", "changed", "withdrawn", "expired"]
Key = tuple[str, frozenset[bytes]]  # name, public keys that are trusted


@dataclass(frozen=True, slots=True)
class Event:
    """What became of one publisher's record.

    Attributes:
        kind: `published`: there is a live record where there was none, or there is one already when the watch begins;
            `changed`: it has another value; `withdrawn` or `expired`: there is none any more.
        record: as it is now or, when it was withdrawn or has expired, as it was last.
        at: when that was noticed (Unix ms).
    """

    kind: Kind
    record: Record
    at: int


@dataclass(slots=True)
class Seen:
    """The newest that is known of one publisher's record, live (`ended` is `None`) or not.

    `deadline` (s, monotonic) ends it if the wall clock does not; until `keep_until` (Unix ms) an older one may be
    around; `changed_at` (Unix ms) is when it was published, changed or ended; `last_look`: whether the network was
    asked once more just before its end.
    """

    newest: Record
    deadline: float
    keep_until: int
    changed_at: int
    ended: Kind | None = None
    last_look: bool = False

    @property
    def life(self) -> float:
        """Seconds from one end to the other."""
        return (self.newest.expires_at - self.newest.issued_at) / 1000

    @property
    def lead(self) -> float:
        """How long before its end the last look is (s)."""
        return min(LAST_LOOK, self.life / 6)


class Observer:
    """The watches of one node.

    `spawn` runs a coroutine in the node's task group, `look_up(name, public_keys)` asks the network for all that is
    shown of a name (of these publishers, if any are given).
    """

    def __init__(
        self,
        protocol: PlasmProtocol,
        clock: Clock,
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], bool],
        look_up: Callable[[str, frozenset[bytes]], Awaitable[list[RecordLookup]]],
    ) -> None:
        self.protocol = protocol
        self.clock = clock
        self.look_up = look_up
        self._spawn = spawn
        self._watches: dict[Key, Watch] = {}

    def watch(self, name: str, trust: Sequence[str] | None) -> AsyncGenerator[Event, None]:
        """The events of the name, of publishers in `trust` (ids) if given. Raises `ConfigError` on a transient node."""
        if self.protocol.source_node.id == TRANSIENT_ID:
            raise ConfigError(
                "a node with the id of 20 zero bytes will not stay, so it cannot watch: give it no node_id"
            )
        key = check_name(name), frozenset(parse_publisher_id(publisher) for publisher in trust or ())
        return self._events(key)

    def stop(self, *_: object) -> None:
        """The node has stopped: every watch ends."""
        for watch in self._watches.values():
            watch.end()

    async def _events(self, key: Key) -> AsyncGenerator[Event, None]:
        watch = self._watches.get(key)
        if watch is None:
            watch = self._watches[key] = Watch(self, *key)
            if not self._spawn(watch.run()):
                watch.end()
        told: dict[bytes, Record] = {}
        news = watch.enter()
        try:
            while not watch.has_ended:
                for event in watch.news(told):
                    yield event
                await news.wait()
                news.clear()
        finally:
            if watch.leave(news):
                if self._watches.get(key) is watch:
                    del self._watches[key]
                await watch.stop()


class Watch:
    """What is known of one name, kept up to date while somebody wants to know it."""

    def __init__(self, observer: Observer, name: str, trust: frozenset[bytes]) -> None:
        self.has_ended = False
        self._room = observer
        self._clock = observer.clock
        self._name = name
        self._trust = trust
        self._keys = [shared_key(name), *(bound_key(each, name) for each in sorted(trust))]
        self._seen: dict[bytes, Seen] = {}
        self._watchers: list[asyncio.Event] = []
        self._task: asyncio.Task[None] | None = None
        self._woken = asyncio.Event()
        self._time = NetworkTime(self._clock)
        self._asked_at: float | None = None  # when the last look began, in seconds of `Clock.elapsed`
        self._settled = self._skipped()
        self._found_none = 0  # looks in a row that found nothing live, and those that nobody answered
        self._unanswered = 0

    # -- for its watchers --------------------------------------------------------------------------------------------

    def enter(self) -> asyncio.Event:
        """One more watcher. What is returned is set when there may be news."""
        self._watchers.append(news := asyncio.Event())
        return news

    def leave(self, news: asyncio.Event) -> bool:
        """One watcher less. Whether it was the last."""
        self._watchers.remove(news)
        return not self._watchers

    async def stop(self) -> None:
        """End, and wait until nothing of it runs."""
        self.end()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    def end(self) -> None:
        """Tell the watchers that no more comes."""
        self.has_ended = True
        self._tell()

    def news(self, told: dict[bytes, Record]) -> list[Event]:
        """What has come of the records since a watcher was `told` of them, by public key; and note that it knows.

        A watcher that is slow is so told of how things are by then, not of each step on the way.
        """
        events = []
        for public_key, seen in self._seen.items():
            before = told.get(public_key)
            if seen.ended is None:
                told[public_key] = seen.newest
                if before is None:
                    events.append(Event("published", seen.newest, seen.changed_at))
                elif not _says_the_same(before, seen.newest):
                    events.append(Event("changed", seen.newest, seen.changed_at))
            elif before is not None:
                del told[public_key]
                events.append(Event(seen.ended, before, seen.changed_at))
        for public_key in [each for each in told if each not in self._seen]:  # long over
            events.append(Event("expired", record := told.pop(public_key), record.expires_at))
        return events

    # -- its task ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look when it is time, and end records when they are over, until cancelled."""
        if self.has_ended:  # the last watcher left before this began
            return
        self._task = asyncio.current_task()
        observers = self._room.protocol.storage.observers
        for key in self._keys:
            observers.setdefault(key, []).append(self._on_store)
        try:
            async with asyncio.TaskGroup() as group:
                await self._follow(group)
        finally:
            for key in self._keys:
                observers[key].remove(self._on_store)
                if not observers[key]:
                    del observers[key]
            self.end()

    async def _follow(self, group: asyncio.TaskGroup) -> None:
        looking: asyncio.Task[None] | None = None
        while True:
            self._end_what_is_over()
            due_in = LOOK_AGAIN
            if looking is None or looking.done():
                due_in = self._due_in()
                if due_in <= 0:
                    looking = group.create_task(self._look())
                    due_in = LOOK_AGAIN
            ends_in = min((self._left(seen) for seen in self._live()), default=LOOK_AGAIN)
            try:
                async with asyncio.timeout(max(min(due_in, ends_in, LOOK_AGAIN), LEAST_WAIT)):
                    await self._woken.wait()
            except TimeoutError:
                pass
            self._woken.clear()

    async def _look(self) -> None:
        """Ask the network for the newest of every publisher."""
        self._asked_at = self._clock.elapsed()
        skipped = self._skipped()
        for seen in self._live():
            seen.last_look = self._left(seen) <= seen.lead
        lookups = await self._room.look_up(self._name, self._trust)
        self._note_answer(any(lookup.answered() for lookup in lookups))
        self._time.learn([now for lookup in lookups for now in lookup.samples])
        self._settled = skipped
        over = {record.envelope for lookup in lookups for record in lookup.ended()}
        for lookup in lookups:
            for record in lookup.winners.values():
                self._take(record, over=record.envelope in over)
        self._found_none = 0 if any(self._live()) else self._found_none + 1
        self._woken.set()

    def _note_answer(self, answered: bool) -> None:
        if answered and self._unanswered >= UNANSWERED:
            log.info("watching %r: DHT nodes answer again", self._name)
        self._unanswered = 0 if answered else self._unanswered + 1
        if self._unanswered == UNANSWERED:
            log.warning(
                "watching %r: no DHT node answers; changes are not seen until one does, what expires is reported",
                self._name,
            )

    # -- what is known -----------------------------------------------------------------------------------------------

    def _on_store(self, holding: Holding) -> None:
        """A record was put into this node's storage, which has verified it."""
        self._take(decode(holding.envelope))
        self._woken.set()

    def _take(self, record: Record, *, over: bool = False) -> None:
        """Take note of a verified record if it is the newest of its publisher. `over`: it has ended by some clock."""
        if self._trust and record.public_key not in self._trust:
            return
        seen = self._seen.get(record.public_key)
        if seen is not None and record.rank < seen.newest.rank:
            return
        now, monotonic = self._time.now(), self._clock.monotonic()
        left = life = (record.expires_at - record.issued_at) / 1000
        if not self._has_jumped():  # what a clock says that has just jumped is worth nothing
            left = min((record.expires_at - now) / 1000, life)
        ended: Kind | None = "withdrawn" if record.withdrawn else "expired" if over or left <= 0 else None
        if seen is None:
            if left > 0 and len(self._seen) < MAX_FOLLOWED:
                self._seen[record.public_key] = Seen(record, monotonic + left, record.expires_at, now, ended)
                self._tell()
            return
        if record.rank == seen.newest.rank:
            if seen.ended is None or ended is not None or monotonic >= seen.deadline:
                return
            left = seen.deadline - monotonic  # a clock was wrong about its end, and has been set right
        same = seen.ended is None and ended is None and _says_the_same(seen.newest, record)
        changed_at = seen.changed_at if same else now
        keep_until = max(seen.keep_until, record.expires_at)
        self._seen[record.public_key] = Seen(record, monotonic + left, keep_until, changed_at, ended)
        self._tell()

    def _end_what_is_over(self) -> None:
        """By the monotonic clock at once; by a wall clock that has jumped only after the network was asked."""
        now, monotonic, jumped = self._time.now(), self._clock.monotonic(), self._has_jumped()
        forgettable = []
        for public_key, seen in self._seen.items():
            over = not jumped and now >= seen.newest.expires_at
            if seen.ended is None and (over or monotonic >= seen.deadline):
                seen.ended, seen.changed_at = "expired", now
                self._found_none = 0  # it may be back soon
                self._tell()
            elif seen.ended is not None and not jumped and now >= seen.keep_until:
                forgettable.append(public_key)
        for public_key in forgettable:
            del self._seen[public_key]

    def _tell(self) -> None:
        for news in self._watchers:
            news.set()

    def _live(self) -> Iterator[Seen]:
        return (seen for seen in self._seen.values() if seen.ended is None)

    # -- when --------------------------------------------------------------------------------------------------------

    def _due_in(self) -> float:
        """Seconds until the next look; 0 or less: now."""
        if self._asked_at is None:
            return 0.0
        since = self._clock.elapsed() - self._asked_at
        if self._has_jumped():
            return FLOOR - since
        lives = [seen.life for seen in self._live()]
        pause = min(lives) / PART_OF_LIFE if lives else LEAST_PAUSE * 2 ** min(self._found_none, 6)
        if self._unanswered:
            pause = min(pause, LEAST_PAUSE * 2 ** min(self._unanswered - 1, 6))
        due_in = min(max(pause, LEAST_PAUSE), LONGEST_PAUSE) - since
        last_looks = [self._left(seen) - seen.lead for seen in self._live() if not seen.last_look]
        return max(min([due_in, *last_looks]), FLOOR - since)

    def _left(self, seen: Seen) -> float:
        """Seconds until the record is over by one of the clocks: by the monotonic one, while the other has jumped."""
        by_deadline = seen.deadline - self._clock.monotonic()
        if self._has_jumped():
            return by_deadline
        return min((seen.newest.expires_at - self._time.now()) / 1000, by_deadline)

    def _skipped(self) -> float:
        """Seconds by which the wall clock has jumped forward so far."""
        return self._clock.elapsed() - self._clock.monotonic()

    def _has_jumped(self) -> bool:
        """Whether the wall clock has jumped forward since the last look began: a suspend, a step."""
        return self._skipped() - self._settled > JUMPED


def _says_the_same(one: Record, other: Record) -> bool:
    """Whether two live records have the same value; to Python 1 is True and 1.0, too."""
    return type(one.value) is type(other.value) and one.value == other.value
