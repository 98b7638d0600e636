"""A node of the DHT that tells a journal what becomes of its records, and who joins it."""

from collections.abc import Callable
from typing import Any

from plasm_dht.config import format_address
from plasm_dht.dht.intent import Intent, Publication
from plasm_dht.dht.routing import Contact
from plasm_dht.dht.server import PlasmServer
from plasm_dht.errors import VerificationError
from plasm_dht.provider.journal import Journal, Kind
from plasm_dht.provider.manifest import Pointer, record_name
from plasm_dht.record import Value


class ObservedServer(PlasmServer):
    """A `PlasmServer` with a journal; the settings are the same. `met` is called for each new neighbour."""

    def __init__(self, journal: Journal, *, met: Callable[[], None] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._journal = journal
        self._met = met
        self._last: dict[str, tuple[int, Value, bool]] = {}  # by name: seq, value, whether enough holders have it

    def holders(self, target: str) -> list[str]:
        """`HOST:PORT` of the nodes that acknowledged the record of a `CHANNEL/ARCH` as it is now."""
        intent = self._publisher.intents.get(record_name(target)) if self._publisher is not None else None
        if intent is None or intent.record is None:
            return []
        seq = intent.record.seq
        told = {address for held in intent.holders.values() for address, holder in held.items() if holder.seq >= seq}
        return sorted(format_address(address) for address in told)

    async def withdraw(self, name: str) -> Publication | None:
        """As `PlasmServer.withdraw`."""
        publication = await super().withdraw(name)
        if self._last.pop(name, None) is not None or publication is not None:
            self._journal.note("withdrawn", _subject(name))
        return publication

    def _on_contact(self, contact: Contact) -> None:
        super()._on_contact(contact)
        self._journal.note("neighbour", format_address(contact.address))
        if self._met is not None:
            self._met()

    def _on_round(self, intent: Intent, enough: bool, took: float) -> None:
        super()._on_round(intent, enough, took)
        if intent.record is None:
            return
        before = self._last.get(intent.name)
        self._last[intent.name] = (intent.record.seq, intent.value, enough)
        kind: Kind = "published"
        if not enough:
            kind = "failed"
        elif before is not None and before[1] != intent.value:
            kind = "changed"
        elif before is not None and before[0] == intent.record.seq and before[2]:
            return  # the same record, at more holders
        elif before is not None:
            kind = "refreshed"
        self._journal.note(kind, _subject(intent.name), _describe(intent))


def _describe(intent: Intent) -> str:
    holders = f"{intent.stored} holder{'' if intent.stored == 1 else 's'}"
    try:
        return f"version {Pointer.decode(intent.value).version}, {holders}"
    except VerificationError:
        return holders


def _subject(name: str) -> str:
    """The `CHANNEL/ARCH` of a record's name, or the name itself where it is another one."""
    target = name.removeprefix("/phase/").removesuffix("/manifest")
    return target if record_name(target) == name else name
