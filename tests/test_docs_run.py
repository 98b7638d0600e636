"""The commands of the README, the tutorial and the how-to pages, run as they are written: see `documented.py`."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documented import ROOT, addresses, agrees, commands, steps

# A page takes ten seconds (s).
WITHIN = 200.0
# Where the nodes of these pages are that know no other address.
PORTS = ((socket.SOCK_DGRAM, 8468), (socket.SOCK_DGRAM, 8469), (socket.SOCK_STREAM, 8080))


def alone(page: Path) -> list[str]:
    """The words before a command that give it a network and mounts of its own; none, where these cannot be had."""
    elsewhere = addresses(page.read_text())
    words = ["unshare", "--net", "--mount", "--pid", "--kill-child"]  # so that what it started ends with it
    words += ["--map-root-user"] if os.geteuid() else []
    if shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0:
        if elsewhere and not shutil.which("ip"):
            pytest.skip("there is no `ip` to make the addresses of this page: install iproute2")
        return words
    if elsewhere:
        pytest.skip("this machine gives us no network of our own, with the addresses of this page")
    for kind, port in PORTS:
        with socket.socket(socket.AF_INET, kind) as probe:
            if kind == socket.SOCK_STREAM:  # where somebody has just listened is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                pytest.skip(f"port {port} is in use, and this machine gives us no network of our own")
    return []


def start(page: Path, *kinds: str, needs: tuple[str, ...] = (), **variables: str) -> "subprocess.Popen[str]":
    for program in ("bash", *needs):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program}, which this page uses")
    words = alone(page)
    reading = subprocess.Popen(
        [*words, sys.executable, "-m", "tests.documented", page, *kinds],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if not words:
        reading.wait(WITHIN)  # the next page uses the same ports
    return reading


def end(reading: "subprocess.Popen[str]") -> str:
    """What is not as the page says; nothing, if all is."""
    try:
        output, _ = reading.communicate(timeout=WITHIN)
    except subprocess.TimeoutExpired:
        reading.kill()
        raise
    assert (reading.returncode == 0) == (output == ""), output
    return output


# With the programs that they use beside our own.
PAGES: dict[str, tuple[str, ...]] = {
    "README.md": ("make", "curl"),
    "docs/tutorial.md": ("make", "curl"),
    "docs/how-to/several-providers.md": (),
    "docs/how-to/clients.md": ("curl", "jq"),
    "docs/how-to/rotate-key.md": (),
    "docs/how-to/embed.md": (),
}


def test_the_pages_do_what_they_say(subtests: pytest.Subtests) -> None:
    """All at once, for each waits most of the time. The tutorial: with the samples in place of a real kernel."""
    readings = {}
    for page, needs in PAGES.items():
        with subtests.test(page, step="start"):
            readings[page] = start(ROOT / page, "samples", needs=needs)
    for page, reading in readings.items():
        with subtests.test(page):
            assert not (problem := end(reading)), problem


def test_the_tutorial_does_what_it_says_with_a_real_kernel() -> None:
    """All but the download itself: that is done where `PLASM_NETBOOT` says."""
    named = Path(os.environ.get("PLASM_NETBOOT", "/nowhere"))
    unpacked = sorted(named.rglob("usr/lib/debian-installer/images/12/arm64"))
    if not unpacked:
        pytest.skip("PLASM_NETBOOT does not name a folder with debian-installer-12-netboot-arm64 unpacked")
    folder = str(unpacked[0].parents[5])
    reading = start(ROOT / "docs/tutorial.md", "netboot", needs=("make", "curl"), PLASM_NETBOOT=folder)
    assert not (problem := end(reading)), problem


# --- the reader itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "came", "agree"),
    [
        (["a"], ["a"], True),
        (["a"], ["b"], False),
        (["a"], [], False),
        ([], ["a"], False),
        (["port …, id …"], ["port 80, id x"], True),
        (["…", "z"], ["a", "b", "z"], True),
        (["…"], [], True),
        (["z"], ["a", "z"], False),
        (["A  B"], ["A     B"], True),
        (["a"], ["2026-01-01T00:00:00.000Z INFO x: y", "a"], True),
        (["2026-…Z INFO x: y"], ["2026-01-01T00:00:00.000Z INFO x: y"], True),
    ],
)
def test_what_is_shown_agrees_with_what_came(shown: list[str], came: list[str], agree: bool) -> None:
    assert agrees(shown, came) is agree


PAGE = """
```console
$ one \\
> more
out
$ two
```
<!-- not run: it takes hours -->
```console
$ three
```
<!-- only: samples -->
<!-- on: rack -->
```console
$ four
```
<!-- Ctrl-C: one -->
```sh
five
```
"""


def test_a_page_is_read_in_its_order() -> None:
    first, second, third = steps(PAGE)
    assert [(each.line, each.text, each.shown) for each in first.commands] == [
        (3, "one \\\nmore", ["out"]),
        (6, "two", []),
    ]
    assert (second.commands[0].text, second.only, second.machine) == ("four", "samples", "rack")
    assert (third.commands, third.stop) == ([], "one")
    assert list(commands("none\n", 1)) == []


def test_a_page_that_shows_what_does_not_come_is_found_out(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ echo yes\nno\n```\n")
    assert end(start(page)) == f"{page}:2: $ echo yes\nThe page shows:\nno\n\nThis came:\nyes\n\n"
