"""The log: no name from the network, no exception and no client can forge a line of it, and no secret is in it."""

import asyncio
import base64
import json
import logging
import re
import signal
import subprocess
import sys
import unicodedata
import urllib.error
import urllib.request
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from plasm_dht import Identity, PlasmServer
from plasm_dht.config import parse_address
from plasm_dht.provider.manifest import record_name
from plasm_dht_cli.logs import JsonFormatter, TextFormatter
from plasm_dht_cli.output import printable
from tests.cli.process import Process, Run, Start
from tests.test_identity import SECRET, is_in, pem

TARGET = "stable/arm64"
URL = "http://127.0.0.1:8080/stable/arm64/manifest.json"
FORGED = "2026-01-31T12:00:00.000Z INFO plasm_dht.dht.server: all is well"
HOSTILE = {
    "a new line": f"x\n{FORGED}",
    "a carriage return": f"x\r{FORGED}",
    "a line that is not only one to Python": "".join(f"x{end}{FORGED}" for end in "\v\f\x1c\x1d\x1e\x85\u2028\u2029"),
    "a terminal's escapes": "\x1b[2J\x1b[1;1H\x1b]0;title\x07",
    "C1 controls": "\x9b2J\x90\x9c",
    "backspaces": f"{'x' * 40}{chr(8) * 40}{FORGED}",
    "NUL": "a\x00b",
    "the right-to-left override": "\u202egpj.exe\u202c \u2066x\u2069 \u200f\u061c",
    "invisible": "pay\u200bpal\u00ad\ufeff\u2060",
    "printable to Python": "a\u3164\u115f\u1160\uffa0\u034f\u17b4\u180b\ufe0f\U000e0101b",
    "tags": "".join(chr(0xE0000 + ord(each)) for each in "hidden"),
    "halves of a pair": "\udfff\ud800",
    "JSON": '"}\n{"time": "now", "level": "INFO", "message": "all is well"}',
}


def entry(message: str, *arguments: object, error: BaseException | None = None) -> logging.LogRecord:
    exc_info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("plasm_dht.dht.server", logging.WARNING, __file__, 1, message, arguments, exc_info)


# Words for what has no ink, in Unicode's names of letters and marks.
BLANK = ("FILLER", "VARIATION SELECTOR", "JOINER", "VOWEL INHERENT")


def moves_or_hides(text: str) -> list[str]:
    """The characters that end a line, move the cursor, turn the writing round or are not seen."""
    unseen = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return [
        each
        for each in text
        if unicodedata.category(each) in unseen or any(word in unicodedata.name(each, "") for word in BLANK)
    ]


def raised(text: str) -> BaseException:
    """An exception with a cause and a note, all of which say it."""
    try:
        {}[text]
    except KeyError as inner:
        error = ValueError(text)
        error.__cause__ = inner
        error.add_note(text)
        return error


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_a_name_from_the_network_is_one_line_and_is_seen(formatter: logging.Formatter, name: str) -> None:
    line = formatter.format(entry("a record of %s: %r", name, name))
    assert moves_or_hides(line) == []
    assert len(line.splitlines()) == 1
    line.encode()  # what could not be encoded would not be logged


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_json_says_exactly_what_the_name_was(name: str) -> None:
    assert json.loads(JsonFormatter().format(entry("%s", name)))["message"] == name


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_an_exceptions_text_cannot_begin_a_line_of_the_log(name: str) -> None:
    first, *lines = TextFormatter().format(entry("it failed", error=raised(name))).split("\n")
    assert first.endswith(" WARNING plasm_dht.dht.server: it failed")
    assert len(lines) > 5
    for line in lines:
        assert line.startswith("    ")
        assert moves_or_hides(line) == []
    line = JsonFormatter().format(entry("it failed", error=raised(name)))
    assert moves_or_hides(line) == []
    assert "ValueError" in json.loads(line)["exception"]


def test_what_is_printable_stays_as_it_is() -> None:
    for text in ("rack-7", "Größe 2", "日本語", "a b", ""):
        assert printable(text) == text


def test_a_bug_that_ends_the_process_goes_through_the_log() -> None:
    code = (
        "import logging; from plasm_dht_cli import logs\n"
        "logs.set_up(log_format='text', verbose=0, quiet=True, usual=logging.INFO)\n"
        f"raise RuntimeError({HOSTILE['a new line'] + HOSTILE['C1 controls']!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    first, *lines = done.stderr.rstrip("\n").split("\n")
    assert " CRITICAL plasm_dht_cli.logs: a bug of plasm-dht ended it" in first
    assert "    Traceback (most recent call last):" in lines
    assert all(line.startswith("    ") for line in lines)
    assert moves_or_hides("".join(lines)) == []


def pointer(**fields: object) -> bytes:
    """A pointer that no honest publisher could make."""
    honest = {"url": URL, "version": "1", "provider_name": "rack-7", "sha256": bytes(32), "size": 9}
    return msgspec.msgpack.encode([1, *(honest | fields).values()])


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_get_prints_nothing_of_a_hostile_record_that_is_not_escaped(
    plasm: Run, node: Process, log_format: str
) -> None:
    odd = HOSTILE["the right-to-left override"]  # no control character: such a name is allowed
    values: list[bytes | str] = [
        pointer(url=f"{URL}\n{FORGED}"),
        pointer(url=f"{URL}\x1b[2J"),
        pointer(version=HOSTILE["a terminal's escapes"]),
        pointer(provider_name=f"x\n{FORGED}"),
        f"x\n{FORGED}",
        pointer(version=odd, provider_name=odd),
    ]
    servers = [PlasmServer(identity=Identity.generate(), record_ttl=60) for _ in values]
    try:
        for server, value in zip(servers, values, strict=True):
            await server.listen(0, "127.0.0.1")
            await server.bootstrap([parse_address(node.address)])
            assert (await server.publish(record_name(TARGET), value)).stored
        options = ("--bootstrap", node.address, "--all", "-v", "--log-format", log_format)
        text = await asyncio.to_thread(plasm, "get", TARGET, *options)
        found = await asyncio.to_thread(plasm, "get", TARGET, *options, "--json")
    finally:
        await asyncio.gather(*(server.close(withdraw=False) for server in servers))
    assert text.stdout == f"{URL}\n"
    assert found.stdout.count("\n") == 1
    assert json.loads(found.stdout)["provider_name"] == odd
    for done in (text, found):
        assert done.stderr.count("skipping the record of") == 5
        assert moves_or_hides((done.stdout + done.stderr).replace("\n", "")) == []
        start = r"\{\"time\": " if log_format == "json" else r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ plasm_dht"
        assert all(re.match(start, line) and not line.startswith(FORGED) for line in done.stderr.splitlines())


def read(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.read().decode()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_key_is_in_nothing_that_a_provider_says(
    start: Start, node: Process, plasm: Run, tmp_path: Path, log_format: str
) -> None:
    key = tmp_path / "id.pem"
    key.touch(0o600)
    key.write_bytes(pem(Ed25519PrivateKey.from_private_bytes(SECRET)))
    artifacts = tmp_path / "artifacts" / TARGET
    artifacts.mkdir(parents=True)
    (artifacts / "vmlinuz").write_text("a kernel")
    provider = start(
        *("serve", "--artifacts", artifacts.parents[1], "--http-host", "127.0.0.1", "--port", "0", "--http-port", "0"),
        *("--identity", key, "--bootstrap", node.address, "-vv", "--log-format", log_format),
    )
    base = "http://" + provider.line.split("http=")[1].split()[0]
    said = [provider.line]
    for path in ("/status", "/health", "/", f"/{TARGET}/manifest.json", "/id.pem", "/identity.pem"):
        said.append(read(base + path))
    said.append(plasm("get", TARGET, "--bootstrap", node.address, "--json", "-vv").stdout)
    said.append(plasm("key", "show", "--identity", key).stdout)
    code, stderr = provider.stop(signal.SIGTERM)
    assert code == 0
    assert "published stable/arm64" in stderr  # there is a log
    assert '"GET /status HTTP/1.1"' in stderr.replace('\\"', '"')  # and it is the whole of it
    for text in [*said, stderr]:
        assert not is_in(SECRET, text)
        assert base64.b64encode(SECRET[:15]).decode() not in text
