"""How long `plasm-dht get` takes as a whole process, against a node on this machine, beside an empty asyncio program.

As a program it is that node and a publisher: `python -m tests.bench.startup`.
"""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from plasm_dht import Identity, PlasmServer
from plasm_dht.provider.manifest import Pointer, record_name
from tests.bench.children import BenchError, Child, serve
from tests.bench.report import Result, Row, Scale, ratios, spread

HOST = "127.0.0.1"
TARGET = "stable/arm64"
URL = "http://127.0.0.1:8080/stable/arm64/manifest.json"
BOUND = 4.0
SCRIPT = Path(sys.executable).with_name("plasm-dht")


async def main() -> None:
    """A node that holds a record, and its publisher, until the input ends."""
    async with PlasmServer() as node, PlasmServer(identity=Identity.generate()) as publisher:
        await node.listen(0, HOST)
        await publisher.listen(0, HOST)
        await publisher.bootstrap([node.address])
        pointer = Pointer(URL, "2026.1", "bench", bytes(32), 1234).encode()
        await publisher.publish(record_name(TARGET), pointer)

        async def handle(_: dict[str, Any]) -> None:
            """It is asked nothing."""

        await serve(handle, {"address": f"{HOST}:{node.address[1]}"})


def timed(*command: str) -> tuple[float, float, str]:
    """Seconds of the wall and of the CPU that a command takes, and what it prints."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PLASM_", "PYTHON"))}
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=kept) as process:
        assert process.stdout is not None
        printed = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        took = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BenchError(f"{' '.join(command)} exited with {process.returncode}")
    return took, usage.ru_utime + usage.ru_stime, printed


def measure(scale: Scale) -> Result:
    """The rows of this group."""
    repetitions = scale.pick(1, 25, 50)
    ours: list[tuple[float, float]] = []
    empty: list[tuple[float, float]] = []
    with Child("tests.bench.startup") as child:
        get = (str(SCRIPT), "get", TARGET, "--bootstrap", child.hello["address"])
        for repetition in range(-1, repetitions):
            wall, cpu, printed = timed(*get)
            if printed != URL + "\n":
                raise BenchError(f"{' '.join(get)} printed {printed!r}")
            base_wall, base_cpu, _ = timed(sys.executable, "-c", "import asyncio")
            if repetition >= 0:  # the first filled the caches
                ours.append((wall, cpu))
                empty.append((base_wall, base_cpu))
    rows = []
    for index, what in enumerate(("by the clock", "by CPU time")):
        mine, base = [each[index] for each in ours], [each[index] for each in empty]
        ratio = ratios(mine, base)
        rows.append(
            Row(
                "start-up",
                f"plasm-dht get, whole process, {what}",
                "ms",
                spread(1000 * each for each in mine),
                None,
                "",
                ratio,
                "less",
                f"at most {BOUND:g} times `import asyncio`" if index == 0 else "none set",
                ratio.median <= BOUND if index == 0 else None,
                f'python3 -c "import asyncio" took {1000 * spread(base).median:.0f} ms; the ratio is to that',
            )
        )
    return Result(rows)


if __name__ == "__main__":
    asyncio.run(main())
