"""Disks without room, of which SQLite says so itself: what was accepted waits for room, and no file is set aside."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dht.disk import aside

ROOT = Path(__file__).parents[2]
# A file system of its own, which goes with the process, for whoever may have a user namespace: no root is needed.
SMALL = 'mount -t tmpfs -o size=800k tmpfs "$1" && exec "$2" -m tests.dht.full "$1"'
# No file may become larger: the error is that of a write, as with a quota (EDQUOT), not that of a full disk.
LIMITED = """
import resource, sys
from plasm_dht.dht.sqlite import SqliteStorage
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
SqliteStorage(sys.argv[1])
"""


def unavailable() -> str:
    """Why there can be no small file system here; empty when there can."""
    if shutil.which("unshare") is None:
        return "there is no `unshare`"
    command = ("unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"no file system can be mounted in a namespace: {done.stderr.strip()}" if done.returncode else ""


def test_a_full_disk_refuses_a_start_loses_nothing_that_is_held_and_is_written_to_when_it_has_room(
    tmp_path: Path,
) -> None:
    if why := unavailable():
        pytest.skip(why)
    command = ("unshare", "--map-root-user", "--mount", "sh", "-c", SMALL, "sh", tmp_path, sys.executable)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_a_file_that_may_not_grow_is_not_set_aside(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, path], capture_output=True, text=True, check=False)
    assert f"ConfigError: state file {path} cannot be used: disk I/O error" in done.stderr
    assert aside(path) == []
