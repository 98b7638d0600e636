"""What a shell gets that asks `plasm-dht` what could come next, and the scripts that make it ask."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from plasm_dht_cli.main import COMMANDS
from tests.cli.process import SCRIPT, Run

Complete = Callable[[str], set[str]]


@pytest.fixture
def complete(plasm: Run) -> Complete:
    """What bash is told after this line, its last word unfinished."""

    def ask(line: str) -> set[str]:
        words = line.split(" ")
        done = plasm(_PLASM_DHT_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
        assert (done.returncode, done.stderr) == (0, "")
        return set(done.stdout.split())

    return ask


def test_every_command_is_offered(complete: Complete) -> None:
    assert complete("plasm-dht ") == set(COMMANDS)
    assert complete("plasm-dht ser") == {"serve"}
    assert complete("plasm-dht key ") == {"show", "new"}
    assert complete("plasm-dht config ") == {"show"}


def test_the_options_of_a_command_are_offered(complete: Complete) -> None:
    assert complete("plasm-dht serve --re") == {"--record-ttl", "--refresh-interval"}
    assert complete("plasm-dht get stable/arm64 --tr") == {"--trust"}
    assert complete("plasm-dht config show --js") == {"--json"}
    assert {"--version", "--help", "--show-completion"} <= complete("plasm-dht --")


def test_values_are_offered_where_there_are_few(complete: Complete) -> None:
    assert complete("plasm-dht node --log-format ") == {"text", "json"}
    assert complete("plasm-dht node --config ") == set(), "the shell offers files then"


def test_asking_runs_nothing_and_minds_no_variable(plasm: Run, tmp_path: Path) -> None:
    line = {"_PLASM_DHT_COMPLETE": "complete_bash", "COMP_WORDS": "plasm-dht key new ", "COMP_CWORD": "3"}
    done = plasm(**line, PLASM_DHT_PORT="x", PLASM_DHT_LOG_FORMAT="xml")
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.rglob("*.pem"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_shown(plasm: Run, shell: str) -> None:
    done = plasm("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"complete_{shell}" in done.stdout
    assert "plasm-dht" in done.stdout


def test_installing_writes_what_bash_reads(plasm: Run, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    done = plasm("--install-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    (script,) = (tmp_path / "home").rglob("plasm-dht.sh")
    assert "complete_bash" in script.read_text()
    assert str(script) in (tmp_path / "home/.bashrc").read_text()


# What each shell does with its script after `plasm-dht serve --re`. zsh's own completion needs a terminal, so what it
# would be told is printed by a function in place of its own.
IN_SHELL = {
    "bash": """
        eval "$(_PLASM_DHT_COMPLETE=source_bash plasm-dht)"
        COMP_WORDS=(plasm-dht serve --re) COMP_CWORD=2
        _plasm_dht_completion plasm-dht && printf '%s\\n' "${COMPREPLY[@]}"
    """,
    "zsh": """
        compdef() { : }
        _arguments() { print -r -- "$@" }
        eval "$(_PLASM_DHT_COMPLETE=source_zsh plasm-dht)"
        words=(plasm-dht serve --re) CURRENT=3
        _plasm_dht_completion
    """,
    "fish": """
        _PLASM_DHT_COMPLETE=source_fish plasm-dht | source
        complete -C 'plasm-dht serve --re'
    """,
}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_real_shell_offers_the_options(shell: str, environment: dict[str, str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} on this machine")
    path = f"{SCRIPT.parent}:{environment['PATH']}"
    quiet = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    done = subprocess.run(
        [shell, *quiet, "-c", IN_SHELL[shell]], env=environment | {"PATH": path}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "--record-ttl" in done.stdout
    assert "--refresh-interval" in done.stdout
    assert "--port" not in done.stdout
