"""Coverage-guided inputs: `python -m tests.fuzz.atheris_run TARGET -runs=100000 [options of libFuzzer] [folders]`.

Needs `atheris`, which no other test does. A folder that is named keeps what was found to reach new code.
"""

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore  # installed by whoever runs this

with atheris.instrument_imports(include=["plasm_dht", "plasm_dht_cli"]):
    from tests.fuzz.campaign import say
    from tests.fuzz.targets import TARGETS, end, seeds, stages


def main() -> None:
    name, *options = sys.argv[1:]
    if name not in TARGETS:
        sys.exit(f"{name!r} is no target: choose one of {', '.join(TARGETS)}")
    runs = next((int(each.partition("=")[2]) for each in options if each.startswith("-runs=")), 0)
    with tempfile.TemporaryDirectory(prefix="plasm-fuzz-seeds-") as folder:
        for number, data in enumerate(seeds(name)):
            (Path(folder) / f"seed-{number}").write_bytes(data)
        played = 0

        def one(data: bytes) -> None:
            nonlocal played
            TARGETS[name](data)
            played += 1
            if played == runs:
                end()  # what is alive at the end leaves nothing either
                say(f"{name}: {played:,} inputs, {stages.datagrams:,} datagrams, {stages.requests:,} requests")

        own = [each for each in options if each.startswith("-")]
        folders = [each for each in options if not each.startswith("-")]
        atheris.Setup([sys.argv[0], *own, *folders, folder], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
