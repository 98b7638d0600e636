"""`python -m tests.bench`: run the benchmarks, print the table, write JSON, and on demand the docs."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.bench import cost, docs, flood, latency, lookups, report, requests, startup, storage
from tests.bench.children import BenchError
from tests.bench.report import Group, Scale

GROUPS: Mapping[str, Group] = {
    "requests": requests.measure,
    "flood": flood.measure,
    "latency": latency.measure,
    "storage": storage.measure,
    "start-up": startup.measure,
    "lookups": lookups.measure,
    "cost": cost.measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is named. The exit code: 0, or 1 when a group could not be measured. A missed target changes nothing."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"what to run: {', '.join(GROUPS)}; default: all")
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--full", action="store_true", help="a million records, 5,000 nodes, more repetitions")
    scale.add_argument("--tiny", action="store_true", help="show that the bench works; the figures mean nothing")
    parser.add_argument("--seed", type=int, default=1, help="of ids and of the virtual network; default: 1")
    parser.add_argument("--json", type=Path, default=report.RESULTS, metavar="FILE", help="where the results are kept")
    parser.add_argument(
        "--write-docs", action="store_true", help="put the results into docs/performance.md; alone: measure nothing"
    )
    options = parser.parse_args(arguments)
    unknown = set(options.groups) - set(GROUPS)
    if unknown:
        parser.error(f"no group {', '.join(sorted(unknown))}: there are {', '.join(GROUPS)}")
    only_docs = options.write_docs and not (options.groups or options.full or options.tiny)
    names = [] if only_docs else options.groups or list(GROUPS)
    failed = [name for name in names if not measured(name, options)]
    document = report.load(options.json)
    document["groups"] = {name: document["groups"][name] for name in GROUPS if name in document["groups"]}
    if options.write_docs:
        docs.write(document)
    report.print_table(document)
    return 1 if failed else 0


def measured(name: str, options: argparse.Namespace) -> bool:
    """Run one group and keep what it found. False, said on stderr, when it could not be measured."""
    scale = Scale("tiny" if options.tiny else "full" if options.full else "quick", options.seed)
    sys.stderr.write(f"bench: {name} ({scale.name}) ...\n")
    started = time.monotonic()
    try:
        result = GROUPS[name](scale)
    except BenchError as error:
        sys.stderr.write(f"bench: {name} could not be measured: {error}\n")
        return False
    report.save(options.json, name, scale, result, time.monotonic() - started)
    return True


if __name__ == "__main__":
    sys.exit(main())
