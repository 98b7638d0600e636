"""`Holding`: what a node holds of one publisher under one key, and until when it counts. It reads no clock."""

import msgspec

from plasm_dht.record import Record


class Holding(msgspec.Struct, gc=False, eq=False):
    """One publisher's newest envelope under one key, and until when it counts. Times: ms on the wall, s monotonic.

    Not seen by the garbage collector, which would stop the node for as long as it takes to visit all of them; so
    nothing in it may ever lead back to it.
    """

    envelope: bytes
    public_key: bytes
    seq: int
    issued_at: int
    expires_at: int
    withdrawn: bool
    deadline: float
    received: float
    own: bool
    keep_until: int
    keep_deadline: float
    # When the storage looks whether it can be forgotten, and the replicator whether it is to be passed on.
    look_at: float = 0.0
    replicate_at: float | None = None
    # Until then another holder may still have a different, older record of this publisher alive.
    contested_until: int = 0
    # Whether a storage that outlives the process has written it, or what it replaced, to the disk.
    on_disk: bool = False
    # The other publishers' holdings, if this is the freshest of its key.
    others: "tuple[Holding, ...]" = ()

    @classmethod
    def of(cls, record: Record, deadline: float, received: float, *, own: bool) -> "Holding":
        """What is held of a record."""
        return cls(
            envelope=record.envelope,
            public_key=record.public_key,
            seq=record.seq,
            issued_at=record.seq if record.seq == record.issued_at else record.issued_at,  # mostly: one int for both
            expires_at=record.expires_at,
            withdrawn=record.withdrawn,
            deadline=deadline,
            received=received,
            own=own,
            keep_until=record.expires_at,
            keep_deadline=deadline,
        )

    def is_over(self, now: int, monotonic: float) -> bool:
        """Whether its life has ended by either clock."""
        return now >= self.expires_at or monotonic >= self.deadline

    def is_forgettable(self, wall: int, monotonic: float) -> bool:
        """Whether nothing older can come back any more: by both clocks, since either may have jumped."""
        return wall >= self.keep_until and monotonic >= self.keep_deadline

    def inherit(self, older: "Holding", *, changed: bool) -> None:
        """Take over what the replaced holding still guards against."""
        self.own = self.own or older.own
        self.keep_until = max(self.keep_until, older.keep_until)
        self.keep_deadline = max(self.keep_deadline, older.keep_deadline)
        self.contested_until = max(older.contested_until, older.expires_at if changed else 0)
        self.on_disk = older.on_disk
