"""`plasm-dht status`: a real provider is asked, and everything that is none."""

import json
import re
import signal
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.process import Process, Run, Start

ROOT = Path(__file__).parents[2]
TARGETS = ("edge/amd64", "stable/arm64")


@pytest.fixture
def provider(start: Start, tmp_path: Path) -> Process:
    for target in TARGETS:
        folder = tmp_path / "artifacts" / target
        folder.mkdir(parents=True)
        (folder / "vmlinuz").write_text("a kernel")
        (folder / "VERSION").write_text("2026.1\n")
    http_options = ("--http-host", "127.0.0.1", "--http-port", "0", "--port", "0")
    process = start("serve", "--artifacts", tmp_path / "artifacts", "--name", "rack-7", *http_options)
    assert process.line.startswith("ready ")
    return process


def url(process: Process) -> str:
    return "http://" + process.line.split("http=")[1].split()[0]


def test_the_table_shows_each_record_and_how_it_stands(plasm: Run, provider: Process) -> None:
    done = plasm("status", "--url", url(provider))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    publisher = provider.line.split("publisher=")[1].strip()
    assert lines[0] == f"rack-7 ({publisher})"
    assert lines[1].startswith(f"DHT {provider.address}, HTTP {url(provider)[7:]}, neighbours 0, records held 4")
    assert lines[3].split() == ["RECORD", "VERSION", "SEQ", "REFRESH", "IN", "EXPIRES", "IN", "HOLDERS"]
    said = json.loads(plasm("status", "--url", url(provider), "--json").stdout)
    for target, line, record in zip(TARGETS, lines[4:], said["records"], strict=True):
        cells = [cell for cell in line.split("  ") if cell]
        assert [cell.strip() for cell in cells[:3]] == [target, "2026.1", str(record["seq"])]
        assert cells[3].strip().startswith(("38 min", "39 min"))
        assert cells[4].strip().startswith("59 min")
        assert cells[5].strip() == "0"
        assert line.rindex(cells[5]) == lines[3].index("HOLDERS")


def test_json_is_the_providers_own_answer_on_one_line(plasm: Run, provider: Process) -> None:
    done = plasm("status", "--json", PLASM_DHT_URL=url(provider) + "/")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    said = json.loads(done.stdout)
    assert said["name"] == "rack-7"
    assert [record["key"] for record in said["records"]] == list(TARGETS)
    documented = (ROOT / "docs/http.md").read_text().partition("\n## `/status`\n")[2].partition("\n## ")[0]
    words = set(re.findall(r"`([a-z_]+)`", documented)) - {"inotify", "polling", "none"}
    assert said.keys() | said["records"][0].keys() == words


def test_a_node_with_http_advertises_nothing(plasm: Run, start: Start) -> None:
    process = start("node", "--port", "0", "--http-host", "127.0.0.1", "--http-port", "0")
    done = plasm("status", "--url", url(process))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "It advertises nothing.")


def test_a_provider_that_has_gone_is_one_line_and_exit_code_1(plasm: Run, provider: Process) -> None:
    where = url(provider)
    provider.stop(signal.SIGTERM)
    done = plasm("status", "--url", where)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"plasm-dht: error: no provider answers at {where}/status: Connection refused: "
        "name a running provider's HTTP server with --url\n"
    )


# -- what is no provider ---------------------------------------------------------------------------------------------

Serve = Callable[[bytes], str]


@pytest.fixture
def raw() -> Iterator[Serve]:
    """Serve these bytes to everybody, whatever they ask; `slowly`: one each tenth of a second."""
    servers: list[socketserver.ThreadingTCPServer] = []

    def serve(answer: bytes, *, slowly: bool = False) -> str:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.recv(4096)
                try:
                    for start in range(0, len(answer), step := 1 if slowly else 65536):
                        self.request.sendall(answer[start : start + step])
                        time.sleep(0.1 if slowly else 0)
                except OSError:
                    return

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def answer(body: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body.encode())}\r\n\r\n{body}".encode()


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (answer("no", "404 Not Found"), "HTTP 404"),
        (answer("<html>"), "what it sent is not JSON"),
        (answer("\ud800".encode("utf-8", "surrogatepass").decode("latin-1")), "what it sent is not JSON"),
        (answer("[" * 100_000), "what it sent is not JSON"),
        (answer("[]"), "not the status of a provider"),
        (answer('{"records": 7}'), "not the status of a provider"),
        (answer('{"records": [7]}'), "not the status of a provider"),
        (answer("", "302 Found\r\nLocation: ftp://127.0.0.1:9/status"), "unknown url type: ftp"),
        (answer("", "302 Found\r\nLocation: file:///etc/passwd"), "HTTP 302"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no HTTP"),
        (b"", "Remote end closed connection"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_answers_otherwise_is_one_line_and_exit_code_1(plasm: Run, raw: Serve, sent: bytes, says: str) -> None:
    done = plasm("status", "--url", raw(sent))
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_server_that_sends_a_byte_now_and_then_does_not_hold_it_up(plasm: Run, raw: Callable[..., str]) -> None:
    began = time.monotonic()
    done = plasm("status", "--timeout", "1", "--url", raw(answer("{" + " " * 1000), slowly=True))
    assert time.monotonic() - began < 10
    assert (done.returncode, done.stdout) == (1, "")
    assert "no answer within 1 s" in done.stderr


def test_what_a_provider_sends_cannot_forge_a_line_or_break_the_table(plasm: Run, raw: Serve) -> None:
    forged = {
        "name": "a\nb\x1b[2J",
        "neighbours": None,
        "records": [{"key": "x\n", "seq": [], "ttl_remaining": "soon"}],
    }
    done = plasm("status", "--url", raw(answer(json.dumps(forged))))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("a\\nb\\x1b[2J (-)\nDHT -, ")
    assert len(done.stdout.splitlines()) == 5


def test_a_redirect_to_http_is_followed(plasm: Run, raw: Serve, provider: Process) -> None:
    done = plasm("status", "--url", raw(answer("", f"307 Temporary Redirect\r\nLocation: {url(provider)}/status")))
    assert (done.returncode, done.stderr) == (0, "")
    assert "stable/arm64" in done.stdout


def test_no_proxy_is_asked(plasm: Run, raw: Serve, provider: Process) -> None:
    proxy = raw(answer('{"records": []}'))
    done = plasm("status", "--url", url(provider), http_proxy=proxy, HTTP_PROXY=proxy)
    assert "stable/arm64" in done.stdout


def test_a_password_in_the_url_is_refused_and_not_quoted(plasm: Run) -> None:
    for given in ("http://user:hunter2@127.0.0.1:1", "http://hunter2@[::1]:1/", "http://user:hunter2@a:70000"):
        done = plasm("status", PLASM_DHT_URL=given)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("plasm-dht: error: PLASM_DHT_URL: it has a user")
        assert "hunter2" not in done.stderr


@pytest.mark.parametrize(
    "mistake",
    [
        "127.0.0.1:8080",
        "file:///etc/passwd",
        "http://",
        "http://a b",
        "http://a:x",
        "http://a:70000",
        "http://a/?q",
        "http://[::1",
    ],
)
def test_a_mistake_in_the_url_is_one_line_that_names_it(plasm: Run, mistake: str) -> None:
    done = plasm("status", "--url", mistake)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"--url: {mistake!r}: must be http://" in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_has_an_example_and_says_what_the_exit_codes_mean(plasm: Run) -> None:
    text = plasm("status", "--help").stdout
    assert "plasm-dht status --url" in text
    assert "1 no provider answered" in text
