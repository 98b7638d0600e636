"""What kademlia's `Server` can do and a node whose records have a life cannot: each is refused with what to use."""

from typing import Self

from kademlia.network import Server

from plasm_dht.errors import PlasmError


class RefusingServer(Server):  # type: ignore[misc]  # the base library has no types
    """kademlia's `Server` without what sets a bare value under a bare key, and without pickles."""

    async def set_digest(self, dkey: bytes, value: object) -> bool:
        """Refused: a record is signed for its name, so a key alone says nothing."""
        raise PlasmError(f"key {dkey.hex()} cannot be set: a record is signed for its name, use set(name, value)")

    def save_state(self, fname: str) -> None:
        """Refused: kademlia's state file is a pickle, which runs whatever code is in it."""
        raise PlasmError(f"state is not saved to {fname}: kademlia's state file is a pickle, use a SqliteStorage")

    @classmethod
    async def load_state(cls, fname: str, port: int, interface: str = "0.0.0.0") -> Self:  # noqa: S104
        """Refused, as `save_state` is."""
        raise PlasmError(f"state is not read from {fname}: kademlia's state file is a pickle, use a SqliteStorage")
