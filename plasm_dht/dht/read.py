"""Reading a name: at the bound keys of trusted publishers, at the shared key, and what a reading teaches."""

import asyncio
from collections.abc import Callable, Iterable, Sequence

from plasm_dht.clock import Clock
from plasm_dht.dht.lookup import LOOKUP_TIMEOUT, RecordLookup
from plasm_dht.dht.protocol import PlasmProtocol
from plasm_dht.dht.routing import Contact
from plasm_dht.identity import parse_publisher_id
from plasm_dht.record import Record, bound_key, check_name, freshest_first, shared_key


class Reader:
    """Finds the live records of names.

    `repair(pairs, key)` is told whom to send which newer record under the key.
    """

    def __init__(
        self,
        protocol: PlasmProtocol,
        clock: Clock,
        *,
        k: int,
        alpha: int,
        repair: Callable[[Iterable[tuple[Contact, Record]], bytes], None],
    ) -> None:
        self._protocol = protocol
        self._clock = clock
        self._k = k
        self._alpha = alpha
        self._repair = repair
        self._ahead = 0

    def now(self) -> int:
        """Unix ms as the last reading made believe: the network's time where our own clock is wrong."""
        return self._clock.now() + self._ahead

    async def find(
        self, name: str, *, quorum: int | None, trust: Sequence[str] | None, timeout: float | None
    ) -> list[Record]:
        """Every publisher's live record (in `trust`, if given), freshest first.

        Ends once `quorum` holders agree on the first (`None`: when all closest have answered), or after `timeout` s.
        """
        check_name(name)
        publishers = frozenset(parse_publisher_id(publisher) for publisher in trust or ())
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (LOOKUP_TIMEOUT if timeout is None else timeout)

        async def look_up(keys: Iterable[bytes]) -> list[RecordLookup]:
            lookups = [
                RecordLookup(self._protocol, key, k=self._k, alpha=self._alpha, quorum=quorum, trust=publishers)
                for key in keys
            ]
            await asyncio.gather(*(lookup.run(deadline - loop.time()) for lookup in lookups))
            return lookups

        lookups = await look_up(bound_key(each, name) for each in sorted(publishers))
        if not any(lookup.winners for lookup in lookups):
            lookups = await look_up([shared_key(name)])
        self._ahead = lookups[0].now() - self._clock.now()
        for lookup in lookups:
            if outdated := lookup.outdated():
                self._repair(outdated, lookup.target.id)
        return freshest_first(record for lookup in lookups for record in lookup.live())
