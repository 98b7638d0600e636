"""Storage that outlives the process: what is held is in memory, as in `RecordStorage`, and follows to an SQLite file.

Reading never touches the disk, and no loop ever waits for it: while the node runs, one thread writes what has changed,
a transaction at a time. What a node has accepted is on the disk within a second, so that neither SIGKILL nor a power
cut loses more. A disk that fails is said and tried again; meanwhile the node goes on in memory.
"""

import asyncio
import functools
import logging
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from plasm_dht.clock import Clock
from plasm_dht.dht import ids
from plasm_dht.dht.holding import Holding
from plasm_dht.dht.ids import Address
from plasm_dht.dht.statefile import Changes, Row, StateFile
from plasm_dht.dht.storage import DEFAULT_MAX_BYTES, DEFAULT_MAX_RECORDS, RecordStorage
from plasm_dht.errors import ConfigError, RecordError
from plasm_dht.record import MAX_TTL, Record, decode, keys_of

log = logging.getLogger(__name__)

# What has changed is gathered for this long before it is written (s): with two commits of 0.3 s, which a slow disk
# needs, it is still within the second that may be lost.
GATHER = 0.25
# Records of one transaction, at most; with as many the next one begins at once. More come in while it is written than
# a node can verify, and what the loop does for them takes it 5 ms.
BATCH = 2000
# A disk that has failed is tried again after this long, and complained about so often (s).
RETRY_AFTER, COMPLAIN_EVERY = 5.0, 600.0
# A stop waits this long for the disk (s).
CLOSE_WITHIN = 2.0
# Names of which the last `seq` is kept, the latest said: as many as records are held.
MAX_SAID = DEFAULT_MAX_RECORDS
# Keys told to the replicator before the loop turns, 10 us each.
TOLD_AT_ONCE = 200


class SqliteStorage(RecordStorage):
    """A `RecordStorage` whose records, node id, contacts and last `seq`s outlive the process, in the file at `path`.

    Opening blocks (3 s for 100,000 records): with a loop that runs already, `await asyncio.to_thread(SqliteStorage,
    path)`. A file that is torn, or is not of this program, is set aside, which the log says, and a new one is begun.
    Raises `ConfigError` when the file cannot be read or written, or another process has it open.

    Records of the node's own come back as everybody's do: who does not publish them again lets them expire.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_records: int = DEFAULT_MAX_RECORDS,
        max_bytes: int = DEFAULT_MAX_BYTES,
        max_ttl: int = MAX_TTL,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(max_records=max_records, max_bytes=max_bytes, max_ttl=max_ttl, clock=clock)
        self._changes = Changes()
        self._changed = asyncio.Event()
        self._complained_at: float | None = None
        self._thread = ThreadPoolExecutor(1, "plasm-dht-state")
        self._file: StateFile | None = StateFile(Path(path))
        state = self._file.open(self.clock.wall())
        self.node_id = state.node_id
        self._node_id = int.from_bytes(state.node_id or b"")
        self.contacts = [address for address in state.contacts if _is_address(address)]
        self._said = state.said
        self._load(state.rows)

    def attach(self, node_id: bytes, clock: Clock) -> None:
        """As `RecordStorage`, and remember the id."""
        if self._file is None:
            raise ConfigError("this SqliteStorage has been closed: open another one")
        super().attach(node_id, clock)
        if node_id not in (self.node_id, ids.TRANSIENT_ID):
            self.node_id = self._changes.node_id = node_id
            self._changed.set()

    def keep_contacts(self, addresses: Sequence[Address]) -> None:
        """Remember where to find other nodes again."""
        if set(addresses) != set(self.contacts):
            self.contacts = self._changes.contacts = list(addresses)
            self._changed.set()

    def keep_own(self, key: bytes, record: Record) -> None:
        """As `RecordStorage`, and remember what was said, even when the record has long been forgotten."""
        super().keep_own(key, record)
        name = record.public_key, record.name
        seq, end = self._said.pop(name, (0, 0))
        self._said[name] = self._changes.said[name] = max(seq, record.seq), max(end, record.expires_at)
        if len(self._said) > MAX_SAID:
            oldest = next(iter(self._said))
            del self._said[oldest]
            self._changes.said[oldest] = None

    def last_said(self, public_key: bytes, name: str) -> tuple[int, int]:
        """The highest `seq` and the latest end (Unix ms) that this node has ever signed for the name; 0: nothing."""
        return self._said.get((public_key, name), (0, 0))

    async def run(self) -> None:
        """Write what changes, until cancelled; first tell whoever has to pass records on of what was loaded."""
        await self._tell()
        while self._file is not None:
            await self._changed.wait()
            if len(self._changes.records) < BATCH:
                await asyncio.sleep(GATHER)
            try:
                await self._commit()
            except sqlite3.Error as error:
                self._complain(error)
                await asyncio.sleep(RETRY_AFTER)
            else:
                if self._complained_at is not None:
                    log.info("the state file is written again")
                self._complained_at = None

    async def close(self) -> None:
        """Write what is left, within 2 s, and let others open the file."""
        file, self._file = self._file, None
        if file is None:
            return
        problem = ""
        try:
            async with asyncio.timeout(CLOSE_WITHIN):
                await self._in_thread(functools.partial(_finish, file, self._changes, self._booted_at()))
        except TimeoutError:
            problem = "the disk does not answer"
        except sqlite3.Error as error:
            problem = str(error)
        if problem:
            log.error("state file %s: the last changes may be lost: %s", file.path, problem)
        self._thread.shutdown(wait=False)

    def abandon(self) -> None:
        """Let go of the file at once, as a killed process does. Nothing may run."""
        file, self._file = self._file, None
        if file is not None:
            file.close()
        self._thread.shutdown(wait=False)

    # -- what is held ------------------------------------------------------------------------------------------------

    def _take_in(self, key: bytes, holding: Holding, held: Holding | None = None) -> None:
        super()._take_in(key, holding, held)
        self._changes.records[key, holding.public_key] = holding
        self._changed.set()

    def _remove(self, key: bytes, holding: Holding) -> None:
        super()._remove(key, holding)
        if holding.on_disk:
            self._changes.records[key, holding.public_key] = None
            self._changed.set()
        else:  # so that a flood of what does not stay leaves nothing behind, even while the disk fails
            self._changes.records.pop((key, holding.public_key), None)

    def _load(self, rows: Iterable[Row]) -> None:
        wall, monotonic = self.clock.wall(), self.clock.monotonic()
        for row in rows:
            holding = _restore(row, wall, monotonic)
            if holding is not None and self._make_room(row.key, 1, len(holding.envelope)):
                super()._take_in(row.key, holding)
            else:
                self._changes.records[row.key, row.public_key] = None
                self._changed.set()

    async def _tell(self) -> None:
        for count, key in enumerate(self.keys()):
            for holding in self.held(key):
                if self.on_change is not None and holding.replicate_at is None:
                    self.on_change(key, holding)
            if count % TOLD_AT_ONCE == 0:
                await asyncio.sleep(0)

    # -- writing -----------------------------------------------------------------------------------------------------

    async def _commit(self) -> None:
        """Write the oldest changes. What is not written goes back to what is to be written."""
        if self._file is None:
            return
        changes = self._take()
        try:
            await self._in_thread(functools.partial(self._file.write, changes, self._booted_at()))
        except BaseException:
            self._changes.put_back(changes)
            self._changed.set()
            raise
        for (key, public_key), written in changes.records.items():
            if written is not None:
                held = self.holding(key, public_key)
                if held is not None:
                    held.on_disk = True
                else:  # it went while it was written
                    self._changes.records.setdefault((key, public_key), None)
                    self._changed.set()

    def _take(self) -> Changes:
        some, rest = self._changes, Changes()
        if len(some.records) > BATCH:
            rest.records = some.records
            some.records = dict(islice(rest.records.items(), BATCH))
            for name in some.records:
                del rest.records[name]
        else:
            self._changed.clear()
        self._changes = rest
        return some

    def _booted_at(self) -> int:
        """Wall time (Unix ms) at monotonic time 0, to say when a record was received so that another process knows."""
        return self.clock.wall() - round(self.clock.monotonic() * 1000)

    async def _in_thread(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _complain(self, error: sqlite3.Error) -> None:
        now = self.clock.monotonic()
        if self._complained_at is None or now - self._complained_at >= COMPLAIN_EVERY:
            self._complained_at = now
            log.error("the state file cannot be written (%s): the node goes on in memory and tries again", error)


def _finish(file: StateFile, changes: Changes, booted_at: int) -> None:
    try:
        file.write(changes, booted_at)
    finally:
        file.close()


def _is_address(address: tuple[object, ...]) -> bool:
    ip, port = address
    return isinstance(ip, str) and ids.is_of_use(ip) and type(port) is int and 0 < port < 65536


def _restore(row: Row, wall: int, monotonic: float) -> Holding | None:
    """What the row says is held; `None` when it is damaged, or guards nothing any more.

    Monotonic time began anew with the machine or, for all that is known, has: what is left is what the wall clock says,
    but no more than the whole life. An expired record still guards against an older one with a longer life.
    """
    if not row.is_whole:
        return None
    try:
        record = decode(row.envelope)
    except RecordError:
        return None
    if row.key not in keys_of(record) or row.public_key != record.public_key or row.keep_until <= wall:
        return None
    life = min(record.expires_at - wall, record.expires_at - record.issued_at) / 1000
    received = monotonic - max(wall - row.received, 0) / 1000
    holding = Holding.of(record, monotonic + life, received, own=False)
    holding.keep_until = row.keep_until
    holding.keep_deadline = monotonic + min((row.keep_until - wall) / 1000, MAX_TTL)
    holding.contested_until = row.contested_until
    holding.on_disk = True
    return holding
