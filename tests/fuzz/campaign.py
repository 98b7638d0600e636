"""Random inputs without a coverage tool: `python -m tests.fuzz.campaign TARGET -n 100000 [--seed 1] [--memory]`.

With `--memory` one world lives through all of it, and what it holds afterwards is compared with what it held after the
first fifth, when its tables, with their small caps, are full.
"""

import argparse
import random
import sys
import time
import tracemalloc

from tests.fuzz.guard import require
from tests.fuzz.targets import TARGETS, end, seeds, settle, stages
from tests.measure import resident

# How full the tables of a world are differs by so much from one moment to another (bytes).
LUCK = 250_000


def say(text: object) -> None:
    """One line of the report."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("-n", type=int, default=10_000, help="inputs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="one world for all, and compare its memory")
    arguments = parser.parse_args()
    target, corpus = TARGETS[arguments.target], seeds(arguments.target)
    drawn = random.Random(f"{arguments.target} {arguments.seed}")
    if arguments.memory:
        stages.life = 2**62
        tracemalloc.start()
    weights: list[int] = []
    started = time.perf_counter()
    for number in range(arguments.n):
        data = drawn.choice(corpus) if drawn.random() < 0.1 else b""
        data += drawn.randbytes(drawn.choice((8, 30, 90, 250, 600)))
        try:
            target(data)
        except BaseException:
            say(f"input {number}: {data.hex()}")
            raise
        if arguments.memory and number in (arguments.n // 5, arguments.n - 1):
            settle()
            weights.append(tracemalloc.get_traced_memory()[0])
            say(f"after {number + 1:,} inputs: {weights[-1]:,} bytes traced, {resident():,} resident")
            if stages.world is not None:
                say({name: size for name, (size, _) in stages.world.sizes().items()})
    if arguments.memory:
        require(weights[-1] < weights[0] + LUCK, "what is held has grown")
    end()
    took = time.perf_counter() - started
    say(
        f"{arguments.target}: {arguments.n:,} inputs ({stages.datagrams:,} datagrams, {stages.requests:,} requests) "
        f"in {took:.0f} s, nothing found"
    )


if __name__ == "__main__":
    main()
