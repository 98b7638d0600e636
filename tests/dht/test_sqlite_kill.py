"""Killed at random moments while it stores, a storage opens every time and has lost nothing that is a second old."""

import asyncio
import json
import random
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What was accepted longer before the kill than this is on the disk (s): the promise.
SAFE_AFTER = 1.0
# Storages that are killed side by side: each waits most of the time.
ABREAST = 4


class Killed:
    """One file, and what is known to have been acknowledged for it."""

    def __init__(self, path: Path, lives: random.Random) -> None:
        self.path = path
        self.lives = lives
        self.promised: dict[str, int] = {}
        self.opened = self.checked = 0

    async def live_and_die(self) -> None:
        """Open, say what is there, store for a while, be killed."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.dht.storing", self.path),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=2**20,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            found = json.loads(await process.stdout.readline() or "null")
            assert found is not None, (await process.stderr.read()).decode()
            await asyncio.sleep(self.lives.uniform(0.02, 2.0))
        finally:
            killed_at = time.monotonic()
            process.kill()
            rest, complaints = await process.communicate()
        assert complaints == b"", complaints.decode()
        self.opened += 1
        lost = {name: seq for name, seq in self.promised.items() if found.get(name, 0) < seq}
        assert lost == {}, f"{len(lost)} of {len(self.promised)}"
        self.promised |= found  # what was there once stays
        for line in rest.decode().splitlines():
            if line.count(" ") == 2:  # the last one may have been cut
                seq, name, moment = line.split()
                if killed_at - float(moment) > SAFE_AFTER:
                    self.promised[name] = max(int(seq), self.promised.get(name, 0))
                    self.checked += 1


async def kill(folder: Path, kills: int, seed: int) -> None:
    async def one(number: int) -> Killed:
        place = folder / str(number)
        killed = Killed(place / "node.sqlite", random.Random(seed + number))
        for _ in range(kills // ABREAST + 1):  # the last one looks what the one before has left
            await killed.live_and_die()
        assert sorted(each.name for each in place.iterdir() if ".bad-" in each.name) == []
        return killed

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(number)) for number in range(ABREAST)]
    done = [task.result() for task in tasks]
    checked = sum(each.checked for each in done)
    sys.stdout.write(f"opened {sum(each.opened for each in done)} times, {checked} promises kept\n")
    assert checked > kills * 20


async def test_killed_at_random_moments_while_storing_it_opens_and_has_lost_nothing(tmp_path: Path) -> None:
    await kill(tmp_path, 20, seed=1)


@pytest.mark.soak
async def test_killed_200_times_at_random_moments_while_storing_it_opens_and_has_lost_nothing(tmp_path: Path) -> None:
    await kill(tmp_path, 200, seed=2)
