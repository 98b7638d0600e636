"""The console script. It sees to the signals that come while the rest is imported, for some tenths of a second.

It imports nothing that takes time itself.
"""

import os
import signal
import sys
from types import FrameType

# The commands that end with 0 when they are told to stop, and those of them that SIGHUP does not end. They have nothing
# to take back before they run.
SERVICES = ("serve", "node", "watch", "publish")
RELOADING = ("serve", "node")


def main() -> None:
    """Run the command line."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    once = command == "publish" and ("--once" in sys.argv or "PLASM_DHT_ONCE" in os.environ)
    if command in SERVICES and not once:  # what is done once was not done when it is interrupted
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end)  # until the event loop has handlers of its own
    if command in RELOADING:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the settings are only just being read
    from plasm_dht_cli.main import main as command_line

    command_line()


def _end(number: int, frame: FrameType | None) -> None:
    # An exception could be lost in whatever is imported at this moment; there is nothing to clean up.
    os._exit(0)
