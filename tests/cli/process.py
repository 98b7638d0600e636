"""Where the command is, and the types of the fixtures that run it."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(sys.executable).with_name("plasm-dht")

Run = Callable[..., subprocess.CompletedProcess[str]]


@dataclass
class Process:
    """A `serve` or `node` that runs, and the line that it printed when it was ready ("": it ended before)."""

    process: "subprocess.Popen[str]"
    line: str

    @property
    def address(self) -> str:
        return self.line.split("dht=")[1].split()[0]

    def stop(self, number: int) -> tuple[int, str]:
        """Send the signal. The exit code and what was on stderr."""
        self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=15)
        return self.process.returncode, stderr


Start = Callable[..., Process]
