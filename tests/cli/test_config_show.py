"""`plasm-dht config show`: the effective settings, where each came from, and output that is a configuration file."""

import inspect
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plasm_dht import config as plasm_config
from plasm_dht.config import DhtSettings, Settings, TrustSettings, load
from plasm_dht_cli import config, serve
from tests.cli.process import SCRIPT, Run

PUBLISHER = "ed25519:" + "0a" * 32
FILE = """
[provider]
name = "of-the-file"
http_port = 1
[provider.dht]
bootstrap = ["dht.example.net:1", "[::1]:2"]
record_ttl = 600
"""


def shown(plasm: Run, *arguments: str | Path, **variables: str) -> str:
    done = plasm("config", "show", *arguments, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def line_of(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.removeprefix("# ").startswith(f"{name} =")]
    return line


def test_without_anything_it_shows_the_defaults_and_says_so(plasm: Run) -> None:
    text = shown(plasm)
    assert line_of(text, "port") == "port = 8468  # default"
    assert line_of(text, "bootstrap") == 'bootstrap = ["127.0.0.1:8468"]  # default'
    assert line_of(text, "refresh_interval") == "# refresh_interval = 2400  # default: 2/3 of record_ttl"
    assert line_of(text, "artifacts_dir").startswith("# artifacts_dir")
    assert set(tomllib.loads(text)) == {"provider", "trust"}


def test_each_setting_says_whether_it_came_from_the_file_a_variable_or_a_flag(plasm: Run, tmp_path: Path) -> None:
    (tmp_path / "plasm.toml").write_text(FILE)
    arguments = ("--config", "plasm.toml", "--http-port", "3", "--artifacts", "boot")
    text = shown(
        plasm, *arguments, PLASM_DHT_HTTP_PORT="2", PLASM_DHT_NAME="of-the-variable", PLASM_DHT_TRUST=PUBLISHER
    )
    assert line_of(text, "name") == 'name = "of-the-variable"  # PLASM_DHT_NAME'
    assert line_of(text, "http_port") == "http_port = 3  # --http-port"
    assert line_of(text, "record_ttl") == "record_ttl = 600  # plasm.toml"
    assert line_of(text, "refresh_interval") == "# refresh_interval = 400  # default: 2/3 of record_ttl"
    assert line_of(text, "publishers") == f'publishers = ["{PUBLISHER}"]  # PLASM_DHT_TRUST'
    assert line_of(text, "artifacts_dir") == f'artifacts_dir = "{tmp_path}/boot"  # --artifacts'
    assert "# config: plasm.toml (--config)" in text


def test_what_no_file_can_say_is_named_in_comments(plasm: Run, tmp_path: Path) -> None:
    text = shown(plasm, "--no-http", "--identity", "key.pem", PLASM_DHT_STATE_DIR="/state", PLASM_DHT_NO_WITHDRAW="1")
    for line in ("no-http: true (--no-http)", "identity: key.pem (--identity)", "log-format: text (default)"):
        assert f"# {line}" in text
    assert "# state-dir: /state (PLASM_DHT_STATE_DIR)" in text
    assert "# no-withdraw: true (PLASM_DHT_NO_WITHDRAW)" in text
    assert not list(tmp_path.rglob("*.pem"))  # it only shows


def test_the_output_is_a_file_that_means_the_same(plasm: Run, tmp_path: Path) -> None:
    (tmp_path / "plasm.toml").write_text(FILE)
    arguments = ("--config", "plasm.toml", "--artifacts", "boot", "--refresh-interval", "0.5", "--name", 'a"\\ü')
    (tmp_path / "copy.toml").write_text(shown(plasm, *arguments))
    again = shown(plasm, "--config", "copy.toml")
    assert load(tmp_path / "copy.toml").name == 'a"\\ü'
    values = [[line.partition("  # ")[0] for line in text.splitlines() if line[:1] not in ("#", "")]
              for text in ((tmp_path / "copy.toml").read_text(), again)]  # fmt: skip
    assert values[0] == values[1]


hosts = st.sampled_from(["10.0.0.1", "::1", "dht.example.net"])
everything = st.builds(
    Settings,
    name=st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20),
    artifacts_dir=st.none() | st.text(st.characters(exclude_characters="\0"), min_size=1).map(lambda t: Path("/", t)),
    http_host=hosts,
    http_port=st.integers(0, 65535),
    base_url=st.none() | st.just("https://cdn.example.net/boot"),
    dht=st.builds(
        DhtSettings,
        host=hosts,
        port=st.integers(0, 65535),
        bootstrap=st.lists(st.tuples(hosts, st.integers(1, 65535)), unique=True).map(tuple),
        record_ttl=st.floats(100, 604_800),
        refresh_interval=st.none() | st.floats(0.1, 99),
    ),
    trust=st.builds(TrustSettings, publishers=st.sampled_from([(), (PUBLISHER,)])),
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(everything)
def test_any_settings_written_and_read_are_the_same(tmp_path: Path, wanted: Settings) -> None:
    loaded = plasm_config.Loaded(wanted, dict.fromkeys(plasm_config.flat(wanted), "a\nport = 1 # file"))
    lines = list(config._file(loaded, {"identity": ("a\nb", "c\n[x]")}))
    assert all("\n" not in line for line in lines)
    (tmp_path / "all.toml").write_bytes("\n".join(lines).encode())
    read = load(tmp_path / "all.toml")
    unsayable = any("\ud800" <= char <= "\udfff" for char in str(wanted.artifacts_dir))
    for key, value in plasm_config.flat(wanted).items():
        assert plasm_config.flat(read)[key] == (None if unsayable and key == "provider.artifacts_dir" else value)


def test_a_path_that_is_not_utf8_is_shown_and_no_traceback(environment: dict[str, str], tmp_path: Path) -> None:
    for json_option in ([], ["--json"]):
        done = subprocess.run(
            [SCRIPT, "config", "show", "--artifacts", b"/srv/b\xff", *json_option],
            env=environment, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"dcff" in done.stdout


def test_json_has_value_and_source_of_everything(plasm: Run, tmp_path: Path) -> None:
    (tmp_path / "plasm.toml").write_text(FILE)
    found = json.loads(shown(plasm, "--json", "--config", "plasm.toml", "--port", "7"))
    assert found["settings"]["provider.dht.port"] == {"value": 7, "source": "--port"}
    assert found["settings"]["provider.dht.bootstrap"]["value"] == ["dht.example.net:1", "[::1]:2"]
    assert found["settings"]["provider.dht.refresh_interval"] == {"value": 400, "source": "default"}
    assert found["settings"]["provider.artifacts_dir"] == {"value": None, "source": "default"}
    assert found["settings"].keys() == plasm_config.flat(Settings()).keys()
    assert found["options"]["no-http"] == {"value": "false", "source": "default"}


def test_what_serve_would_refuse_it_refuses_with_the_same_words(plasm: Run, tmp_path: Path) -> None:
    (tmp_path / "plasm.toml").write_text("[provider.dht]\nrecord_ttl = 0\n")
    for command in (("config", "show"), ("serve", "--artifacts", ".")):
        done = plasm(*command, "--config", "plasm.toml")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert "plasm.toml: provider.dht.record_ttl = 0: must be a number of seconds from 1 to 604800" in done.stderr


def test_it_has_every_option_of_serve() -> None:
    mine = set(inspect.signature(config.show).parameters)
    assert mine - {"as_json"} == set(inspect.signature(serve.serve).parameters)


def test_it_imports_no_dht_and_no_http(environment: dict[str, str]) -> None:
    code = "import sys; from plasm_dht_cli.main import run; run(['config', 'show']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert loaded & {"kademlia", "aiohttp", "asyncio", "watchdog", "rich", "cryptography"} <= {"cryptography"}


@pytest.mark.parametrize("option", [["-v"], ["-q"]])
def test_a_flag_for_the_log_beats_the_variable_that_contradicts_it(plasm: Run, option: list[str]) -> None:
    other = {"-v": "PLASM_DHT_QUIET", "-q": "PLASM_DHT_VERBOSE"}[option[0]]
    assert plasm("config", "show", *option, **{other: "1"}).returncode == 0
    both = plasm("config", "show", PLASM_DHT_QUIET="1", PLASM_DHT_VERBOSE="1")
    assert (both.returncode, both.stderr.count("\n")) == (2, 1)
