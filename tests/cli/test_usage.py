"""What a user can get wrong: each is one line on stderr that names the thing, and the contract's exit code."""

import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer

from plasm_dht.errors import ConfigError, IdentityError, ListenError, RecordError, VerificationError
from plasm_dht_cli import exits, logs
from plasm_dht_cli.main import _application
from plasm_dht_cli.output import printable
from tests.cli.process import SCRIPT, Run, Start


def every_command(command: Any = None, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words of each command and group of commands."""
    command = command or typer.main.get_command(_application([]))
    inner = getattr(command, "commands", {})
    return [path, *(words for name in inner for words in every_command(inner[name], (*path, name)))]


COMMANDS = every_command()
# What runs something, and no group of commands.
LEAVES = [words for words in COMMANDS if not any(other[: len(words)] == words != other for other in COMMANDS)]
PUBLISHER = "ed25519:" + "0a" * 32

MISTAKES = [
    # what is typed, what the line says
    ([], ["Missing command", "plasm-dht --help"]),
    (["serv"], ["serv"]),
    (["--no-such"], ["--no-such"]),
    (["key"], ["Missing command", "plasm-dht key --help"]),
    (["get"], ["CHANNEL/ARCH", "plasm-dht get --help"]),
    (["get", "stable/arm64", "beta/arm64"], ["beta/arm64"]),
    (["get", "stable/arm64", "--no-such"], ["--no-such"]),
    (["get", "stable/arm64", "--wait"], ["--wait", "see plasm-dht get --help"]),
    (["get", "stable/arm64", "--wait", ""], ["--wait: ''", "leave it out"]),
    (["get", "stable/arm64", "--timeout", ""], ["--timeout: ''", "leave it out"]),
    (["get", "stable/arm64", "--config", ""], ["--config: ''", "leave it out"]),
    (["status", "--url", ""], ["--url: ''", "leave it out"]),
    (["status", "--timeout", ""], ["--timeout: ''", "leave it out"]),
    (["node", "--state-dir", ""], ["--state-dir: ''", "leave it out"]),
    (["key", "new", "--identity", "", "--force"], ["--identity: ''", "leave it out"]),
    (["get", "stable"], ["'stable'", "CHANNEL/ARCH", "a-z 0-9"]),
    (["get", "Stable/arm64"], ["'Stable/arm64'", "a-z 0-9"]),
    (["get", "stable/arm64/x"], ["'stable/arm64/x'"]),
    (["get", "../etc"], ["'../etc'"]),
    (["get", "dht/arm64"], ["'dht/arm64'", "gateway"]),
    (["get", "stable/arm64\nplasm-dht: error: forged"], [r"\n"]),
    (["get", "stable/arm64", "--timeout", "soon"], ["--timeout", "'soon'", "number of seconds of at least 0.1"]),
    (["get", "stable/arm64", "--timeout", "0"], ["--timeout", "'0'", "at least 0.1"]),
    (["get", "stable/arm64", "--wait", "-1"], ["--wait", "'-1'", "at least 0"]),
    (["get", "stable/arm64", "--wait", "inf"], ["--wait", "'inf'"]),
    (["get", "stable/arm64", "--bootstrap", "127.0.0.1"], ["--bootstrap", "'127.0.0.1'", "HOST:PORT"]),
    (["get", "stable/arm64", "--bootstrap", "::1:8468"], ["--bootstrap", "'::1:8468'", "[::1]:8468"]),
    (["get", "stable/arm64", "--trust", "me"], ["--trust", "'me'", "64 lower-case hex digits"]),
    (["get", "stable/arm64", "--config", "no.toml"], ["no.toml", "No such file"]),
    (["get", "stable/arm64", "--log-format", "xml"], ["--log-format", "'xml'", "text or json"]),
    (["get", "stable/arm64", "-v", "-q"], ["--verbose", "--quiet"]),
    (["serve"], ["--artifacts", "PLASM_DHT_ARTIFACTS", "provider.artifacts_dir"]),
    (["serve", "--artifacts", ""], ["--artifacts", "provider.artifacts_dir", "''"]),
    (["serve", "--artifacts", ".", "--port", "65536"], ["--port", "provider.dht.port", "'65536'", "0 to 65535"]),
    (["serve", "--artifacts", ".", "--http-port", "http"], ["--http-port", "provider.http_port", "'http'"]),
    (["serve", "--artifacts", ".", "--host", "a b"], ["--host", "provider.dht.host", "'a b'"]),
    (["serve", "--artifacts", ".", "--record-ttl", "0"], ["--record-ttl", "'0'", "1 to 604800"]),
    (["serve", "--artifacts", ".", "--record-ttl", "1h"], ["--record-ttl", "'1h'", "number of seconds"]),
    (
        ["serve", "--artifacts", ".", "--refresh-interval", "3600"],
        ["--refresh-interval", "provider.dht.refresh_interval", "'3600'", "3600 s (the default)"],
    ),
    (
        ["serve", "--artifacts", ".", "--record-ttl", "60", "--refresh-interval", "60"],
        ["--refresh-interval", "less than provider.dht.record_ttl", "60 s (--record-ttl)"],
    ),
    (["serve", "--artifacts", ".", "--base-url", "cdn.example.net"], ["--base-url", "'cdn.example.net'", "https://"]),
    (["serve", "--artifacts", ".", "--name", "a\nb"], ["--name", r"'a\nb'", "control characters"]),
    (["serve", "--artifacts", ".", "--identity", "."], ["key file .", "directory"]),
    (["serve", "--artifacts", ".", "--identity", "bad.pem"], ["bad.pem", "Ed25519"]),
    (["node", "--port", "x"], ["--port", "provider.dht.port", "'x'"]),
    (["node", "--bootstrap", "a:0"], ["--bootstrap", "'a:0'"]),
    (["node", "--identity", "bad.pem"], ["bad.pem", "Ed25519"]),
]


def one_line(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("plasm-dht: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(("arguments", "says"), MISTAKES, ids=lambda value: " ".join(value)[:60])
def test_a_mistake_is_one_line_that_names_it(plasm: Run, tmp_path: Path, arguments: list[str], says: list[str]) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("not a key")
    bad.chmod(0o600)
    line = one_line(plasm(*arguments))
    for part in says:
        assert part in line


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        (["node"], {"PLASM_DHT_PORT": "x"}, ["PLASM_DHT_PORT: ", "provider.dht.port", "'x'"]),
        (["node"], {"PLASM_DHT_BOOTSTRAP": "a:1 b"}, ["PLASM_DHT_BOOTSTRAP: ", "'b'"]),
        (["node"], {"PLASM_DHT_RECORD_TTL": "0"}, ["PLASM_DHT_RECORD_TTL: ", "1 to 604800"]),
        (["node"], {"PLASM_DHT_CONFIG": "no.toml"}, ["no.toml", "No such file"]),
        (["serve"], {"PLASM_DHT_ARTIFACTS": ".", "PLASM_DHT_NAME": "\x07"}, ["PLASM_DHT_NAME: ", r"'\x07'"]),
        (["get", "a/b"], {"PLASM_DHT_TIMEOUT": "x"}, ["PLASM_DHT_TIMEOUT: ", "'x'"]),
        (["get", "a/b"], {"PLASM_DHT_TRUST": f"{PUBLISHER} me"}, ["PLASM_DHT_TRUST: ", "'me'"]),
        (["get", "a/b"], {"PLASM_DHT_LOG_FORMAT": "xml"}, ["PLASM_DHT_LOG_FORMAT: 'xml'", "text or json"]),
    ],
)
def test_a_mistake_in_a_variable_names_the_variable(
    plasm: Run, arguments: list[str], variables: dict[str, str], says: list[str]
) -> None:
    line = one_line(plasm(*arguments, **variables))
    for part in says:
        assert part in line


def test_a_flag_beats_the_variable_and_the_variable_beats_the_file(plasm: Run, tmp_path: Path) -> None:
    (tmp_path / "ttl.toml").write_text("[provider.dht]\nrecord_ttl = 100")
    ours = ("node", "--config", "ttl.toml", "--refresh-interval", "1000")  # above each of them: the refusal tells which
    assert "100 s (ttl.toml)" in one_line(plasm(*ours))
    assert "200 s (PLASM_DHT_RECORD_TTL)" in one_line(plasm(*ours, PLASM_DHT_RECORD_TTL="200"))
    flag = plasm(*ours, "--record-ttl", "300", PLASM_DHT_RECORD_TTL="200")
    assert "300 s (--record-ttl)" in one_line(flag)
    assert "100 s (ttl.toml)" in one_line(plasm(*ours, PLASM_DHT_RECORD_TTL="")), "an empty one is not set"


@pytest.mark.parametrize(
    "document",
    ["[provider\n", "[provider.dht]\nrefresh_intervall = 3", "[provider]\nhttp_port = '80'", "\x00", "x = 1"],
)
def test_a_mistake_in_the_file_is_one_line_with_its_name(plasm: Run, tmp_path: Path, document: str) -> None:
    (tmp_path / "plasm.toml").write_text(document)
    assert "plasm.toml" in one_line(plasm("serve", "--artifacts", ".", "--config", "plasm.toml"))


Help = Callable[[tuple[str, ...]], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def help_of(plasm: Run, said: dict[tuple[str, ...], "subprocess.CompletedProcess[str]"] = {}) -> Help:  # noqa: B006
    """What a command says of itself on a terminal of 80 columns; each is asked once."""

    def ask(command: tuple[str, ...]) -> "subprocess.CompletedProcess[str]":
        if command not in said:
            said[command] = plasm(*command, "--help", COLUMNS="80")
        return said[command]

    return ask


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_goes_to_stdout(help_of: Help, command: tuple[str, ...]) -> None:
    done = help_of(command)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"Usage: plasm-dht[ a-z]* \[OPTIONS\]( [A-Z/]+)*( \[ARGS\]\.\.\.)?\n", done.stdout)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_80_columns(help_of: Help, command: tuple[str, ...]) -> None:
    assert [line for line in help_of(command).stdout.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(help_of: Help, command: tuple[str, ...]) -> None:
    assert f"plasm-dht {' '.join(command)}".strip() in help_of(command).stdout.partition("\n\n")[2]


@pytest.mark.parametrize("command", LEAVES, ids=" ".join)
def test_help_starts_with_what_it_does_and_ends_with_its_exit_codes(help_of: Help, command: tuple[str, ...]) -> None:
    _, summary, *_ = help_of(command).stdout.split("\n\n")
    assert re.fullmatch(r"[A-Z][^.]{9,}\..*", " ".join(summary.split())), "a sentence"
    squeezed = " ".join(help_of(command).stdout.split())
    assert re.search(r"Exit codes: 0 [a-z].*; 2 [a-z]", squeezed)


@pytest.mark.parametrize("command", LEAVES, ids=" ".join)
def test_help_has_the_variable_of_each_option(help_of: Help, command: tuple[str, ...]) -> None:
    text = help_of(command).stdout
    squeezed = " ".join(text.split())
    flags = set(re.findall(r"^  (?:-[a-z], )?(--[a-z-]+)", text, re.MULTILINE)) - {"--help"}
    assert flags
    for flag in flags:
        assert "PLASM_DHT_" + flag[2:].replace("-", "_").upper() in squeezed


def test_version_is_that_of_the_package(plasm: Run) -> None:
    done = plasm("--version")
    assert (done.returncode, done.stdout) == (0, f"plasm-dht {version('plasm-dht')}\n")


def test_a_reader_that_has_gone_is_no_traceback(environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [SCRIPT, "key", "new"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == exits.OUTPUT_CLOSED


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full on this system")
def test_an_output_that_is_full_is_said_to_be_it(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        key_new = [SCRIPT, "key", "new", "--identity", tmp_path / "key.pem"]
        done = subprocess.run(key_new, stdout=full, stderr=subprocess.PIPE, text=True, timeout=20, check=False)
    assert done.returncode == exits.USAGE
    assert done.stderr == "plasm-dht: error: stdout cannot be written to: No space left on device\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a"), 2),
        (IdentityError("a"), 2),
        (ListenError("a"), 2),
        (RecordError("too_large", "a"), 2),
        (VerificationError("a"), 4),
    ],
)
def test_each_error_has_the_exit_code_of_the_contract(error: ConfigError, code: int) -> None:
    assert exits.exit_code(error) == code


# --- log lines ------------------------------------------------------------------------------------------------------


def entry(message: str, *arguments: object) -> logging.LogRecord:
    record = logging.LogRecord("plasm_dht.test", logging.INFO, __file__, 1, message, arguments, None)
    record.created = 1_600_000_000.25
    return record


FORGED = "a\n2020-09-13T12:26:40.250Z INFO plasm_dht: forged\r\x1b[2J\x85\u2028\u202e\ud800"


def test_a_text_line_says_when_how_grave_who_and_what() -> None:
    line = logs.TextFormatter().format(entry("%s of %d", "one", 2))
    assert line == "2020-09-13T12:26:40.250Z INFO plasm_dht.test: one of 2"


def test_no_message_can_forge_a_second_text_line() -> None:
    line = logs.TextFormatter().format(entry("%s", FORGED))
    assert line.isprintable()
    assert r"a\n2020" in line


def test_no_message_can_forge_a_second_json_line() -> None:
    line = logs.JsonFormatter().format(entry("%s", FORGED))
    assert line.isprintable()
    assert json.loads(line) == {
        "time": "2020-09-13T12:26:40.250Z",
        "level": "INFO",
        "logger": "plasm_dht.test",
        "message": FORGED,
    }


def test_a_traceback_is_indented_so_that_it_forges_no_line() -> None:
    record = entry("failed")
    try:
        int(FORGED)
    except ValueError:
        record.exc_info = sys.exc_info()
    lines = logs.TextFormatter().format(record).splitlines()
    assert len(lines) > 3
    assert all(line.startswith("    ") and line.isprintable() for line in lines[1:])
    assert "ValueError" in json.loads(logs.JsonFormatter().format(record))["exception"]


def test_every_line_that_a_service_logs_is_an_object_when_asked_for(start: Start, tmp_path: Path) -> None:
    artifacts = (*("--artifacts", tmp_path / "boot"), *("--http-host", "127.0.0.1", "--http-port", "0"))
    (tmp_path / "boot/stable/arm64").mkdir(parents=True)
    (tmp_path / "boot/stable/arm64/vmlinuz").write_text("a kernel")
    for command in (("node",), ("serve", *artifacts)):
        service = start(*command, "--port", "0", "--log-format", "json", "-v")
        _, stderr = service.stop(signal.SIGTERM)
        entries = [json.loads(line) for line in stderr.splitlines()]
        assert entries
        assert all(entry.keys() >= {"time", "level", "logger", "message"} for entry in entries)


def test_every_command_that_logs_can_log_objects(help_of: Help) -> None:
    for command in LEAVES:
        text = help_of(command).stdout
        assert ("--log-format" in text) == ("--verbose" in text), command


def test_printable_text_stays_as_it_is() -> None:
    assert printable("Zürich 東京 🥾 a/b") == "Zürich 東京 🥾 a/b"
    assert printable("\t\x00é\n") == r"\t\x00é\n"
