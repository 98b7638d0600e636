"""Does what a page of the documentation says, as its reader would: `python -m tests.documented PAGE [KIND...]`.

The `console` blocks of the page are run in their order, in a new folder that looks like a checkout, and what they show
is compared with what comes. In a block `$ ` begins a command and `> ` goes on with it; the rest is what it prints:
`…` is anything, on a line of its own any number of lines. Lines of the log need not be shown. A command may fail only
where its error is shown. A whole script (`asyncio.run` in a `python` block) is run, too.

Comments before a block, which no reader sees: `<!-- only: KIND -->`, it is for a run that was given this kind;
`<!-- on: MACHINE -->`, where it is typed: each has a state directory of its own; `<!-- not run: WHY -->`;
`<!-- Ctrl-C: COMMAND -->`, a service that was started is stopped, and has to end with 0.

In a network namespace of its own the machines' addresses (10.0.0.x) are there, and the samples are in /srv/boot.
"""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]
# For what takes a moment on a machine with other things to do (s).
PATIENCE = 60.0
# What runs until it is stopped.
SERVICE = re.compile(r"make serve|plasm-dht (?:serve|node|watch|publish(?!.* --once))\b")
LOG = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z (?:INFO|WARNING) ")
PART = re.compile(
    r"<!-- (?P<what>only|on|not run|Ctrl-C): (?P<more>.*?) -->|^ *```(?P<kind>\w+)\n(?P<text>.*?)^ *```",
    re.MULTILINE | re.DOTALL,
)
# After each command the shell prints this and the exit code.
END = "\x1e"
# Linux' SIOCGIFFLAGS and SIOCSIFFLAGS (netdevice(7)), and IFF_UP.
GET_FLAGS, SET_FLAGS, UP = 0x8913, 0x8914, 1


@dataclass(frozen=True, slots=True)
class Command:
    """What is typed, and the lines that the page shows for it."""

    line: int
    text: str
    shown: list[str]


@dataclass(frozen=True, slots=True)
class Step:
    """A block of commands, or (without any) the service that is stopped."""

    commands: list[Command]
    only: str | None = None
    machine: str = ""
    stop: str | None = None


def steps(page: str) -> Iterator[Step]:
    """What the page says is to be done."""
    said: dict[str, str] = {}
    for part in PART.finditer(page):
        if part["what"] == "Ctrl-C":
            yield Step([], stop=part["more"])
        elif part["what"]:
            said[part["what"]] = part["more"]
        else:
            line, text = page.count("\n", 0, part.start()) + 1, textwrap.dedent(part["text"])
            typed: list[Command] = []
            if part["kind"] == "console":
                typed = list(commands(text, line))
            elif part["kind"] == "python" and "asyncio.run(" in text:
                typed = [Command(line, f"python -W error - <<'END'\n{text}END", ["…"])]
            if typed and "not run" not in said:
                yield Step(typed, said.get("only"), said.get("on", ""))
            said = {}


def commands(block: str, line: int) -> Iterator[Command]:
    """The commands of a console block that begins at this line."""
    for typed in re.finditer(r"^\$ (?P<text>.*\n(?:> .*\n)*)(?P<shown>(?:(?!\$ ).*\n)*)", block, re.MULTILINE):
        text = re.sub(r"^> ", "", typed["text"].rstrip("\n"), flags=re.MULTILINE)
        yield Command(line + 1 + block.count("\n", 0, typed.start()), text, typed["shown"].splitlines())


def agrees(shown: list[str], lines: list[str]) -> bool:
    """Whether this came, log lines and the width of columns aside."""
    squeezed = [re.sub(" {2,}", "  ", line) for line in shown]
    pattern = "".join(
        "(?:.*\n)*" if each == "…" else ".*".join(map(re.escape, each.split("…"))) + "\n" for each in squeezed
    )
    without_log = [line for line in lines if not LOG.match(line)]
    return any(
        re.fullmatch(pattern, "".join(re.sub(" {2,}", "  ", line).rstrip() + "\n" for line in kept)) is not None
        for kept in (without_log, lines)
    )


@dataclass(slots=True)
class Reader:
    """Somebody who does what the page says, in this folder. `SystemExit` names the line that is not so."""

    page: Path
    folder: Path
    services: dict[str, "subprocess.Popen[str]"] = field(default_factory=dict)

    def do(self, step: Step) -> None:
        """One step."""
        if step.stop is not None:
            self._stop(step.stop)
        elif len(step.commands) == 1 and SERVICE.search(step.commands[0].text):
            self._start(step.commands[0], step.machine)
        else:
            self._type(step.commands, step.machine)

    def _fail(self, line: int, text: str) -> NoReturn:
        raise SystemExit(f"{self.page}:{line}: {text}")

    def _shell(self, script: str, machine: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self._environment(machine),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _environment(self, machine: str) -> dict[str, str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PLASM_DHT_", "XDG_", "MAKE"))
        }
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        home = self.folder / "homes" / machine
        home.mkdir(parents=True, exist_ok=True)
        return kept | {"HOME": str(home), "PATH": path, "PYTHONUNBUFFERED": "1"}

    def _type(self, commands: list[Command], machine: str) -> None:
        script = "".join(f"{each.text}\ns=$?; printf '{END}%d\\n' $s; (exit $s)\n" for each in commands)
        with self._shell(script, machine) as shell:
            try:
                output, _ = shell.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(shell.pid, signal.SIGKILL)
                self._fail(commands[0].line, f"this block has not ended after {PATIENCE:g} s")
        for each, (came, code) in zip(commands, re.findall(f"(.*?){END}(\\d+)\n", output, re.DOTALL), strict=True):
            if not agrees(each.shown, came.splitlines()):
                self._fail(each.line, f"$ {each.text}\nThe page shows:\n{_listed(each.shown)}\nThis came:\n{came}")
            if code != "0" and not any(line.startswith("plasm-dht: error: ") for line in each.shown):
                self._fail(each.line, f"$ {each.text}\nended with {code}:\n{came}")

    def _start(self, command: Command, machine: str) -> None:
        service = self.services[command.text] = self._shell(f"exec {command.text}", machine)
        assert service.stdout is not None
        came: list[str] = []
        while command.shown and not agrees(command.shown, came):
            came += [line.rstrip("\n")] if (line := service.stdout.readline()) else []
            if not line:
                self._fail(command.line, f"$ {command.text}\nended, and showed:\n{_listed(came)}")

    def _stop(self, named: str) -> None:
        ((text, service),) = [each for each in self.services.items() if named in each[0]]
        del self.services[text]
        os.killpg(service.pid, signal.SIGINT)  # as a terminal does: `make` and what it started
        output, _ = service.communicate(timeout=PATIENCE)
        if service.returncode != 0 and not text.startswith("make"):
            self._fail(1, f"$ {text}\nended with {service.returncode} after Ctrl-C:\n{output}")

    def leave(self) -> None:
        """End what still runs."""
        for service in self.services.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(service.pid, signal.SIGKILL)
            service.communicate()


def _listed(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def checkout(folder: Path) -> None:
    """Make the folder look like a checkout whose `make venv` was done. What is written there stays there."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (folder / ".venv" / ".installed").touch()


def is_alone() -> bool:
    """Whether this is a network of its own, in which even 127.0.0.1 is down at first; it is up then."""
    with socket.socket() as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack("16xH14x", fcntl.ioctl(any_socket, GET_FLAGS, request))
        if not flags & UP:
            fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sH14x", b"lo", flags | UP))
        return not flags & UP


def addresses(page: str) -> set[str]:
    """Those of other machines that the page's commands speak of."""
    return {
        each for step in steps(page) for typed in step.commands for each in re.findall(r"10\.0\.0\.\d+", typed.text)
    }


def furnish(machines: set[str]) -> None:
    """These addresses, and /srv/boot, for whoever is alone."""
    for address in sorted(machines):
        subprocess.run(["ip", "addr", "add", f"{address}/32", "dev", "lo"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/srv"], check=True)
    shutil.copytree(ROOT / "docs/examples/artifacts", "/srv/boot")


def main(page: Path, *kinds: str) -> None:
    """Do it, of the blocks that are `only` for something those for one of these kinds."""
    text = page.read_text()
    if is_alone() and (machines := addresses(text)):
        furnish(machines)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkout(folder)
        if "netboot" in kinds:
            (folder / "netboot").symlink_to(os.environ["PLASM_NETBOOT"])
        reader = Reader(page, folder)
        try:
            for step in steps(text):
                if step.only is None or step.only in kinds:
                    reader.do(step)
        finally:
            reader.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
