"""Settings: what is read, what beats what, and what is refused with which words."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from plasm_dht.config import Override, Settings, format_address, host_name, load, parse_address, parse_seconds
from plasm_dht.errors import ConfigError

PUBLISHER = "ed25519:" + "0a" * 32

WHOLE = f"""
[provider]
name = "rack-7"
artifacts_dir = "/var/lib/plasm/artifacts"
http_host = "127.0.0.1"
http_port = 8081
base_url = "https://cdn.example.net/boot/"

[provider.dht]
host = "::1"
port = 0
bootstrap = ["dht.example.net:8468", "[::1]:9000"]
record_ttl = 600
refresh_interval = 400.5

[trust]
publishers = ["{PUBLISHER}"]
"""

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str | bytes) -> Path:
        path = tmp_path / "plasm.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write_file


def refusal(path: Path | None, *overrides: Override) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    text = str(caught.value)
    assert text.isprintable(), "a refusal is one line"
    return text


def typed(key: str, value: str | tuple[str, ...], source: str = "--flag") -> Override:
    return Override(key, value, source)


# --- what is read ---------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = load()
    assert settings == Settings()
    assert (settings.name, settings.artifacts_dir, settings.base_url) == (host_name(), None, None)
    assert (settings.http_host, settings.http_port) == ("0.0.0.0", 8080)
    assert (settings.dht.host, settings.dht.port) == ("0.0.0.0", 8468)
    assert settings.dht.bootstrap == (("127.0.0.1", 8468),)
    assert (settings.dht.record_ttl, settings.dht.refresh_interval) == (3600, None)
    assert settings.trust.publishers == ()


def test_every_key_of_the_file_is_read(write: Write) -> None:
    settings = load(write(WHOLE))
    assert settings.name == "rack-7"
    assert settings.artifacts_dir == Path("/var/lib/plasm/artifacts")
    assert (settings.http_host, settings.http_port) == ("127.0.0.1", 8081)
    assert settings.base_url == "https://cdn.example.net/boot"
    assert (settings.dht.host, settings.dht.port) == ("::1", 0)
    assert settings.dht.bootstrap == (("dht.example.net", 8468), ("::1", 9000))
    assert (settings.dht.record_ttl, settings.dht.refresh_interval) == (600, 400.5)
    assert settings.trust.publishers == (PUBLISHER,)


def test_an_empty_file_gives_the_defaults(write: Write) -> None:
    assert load(write("")) == Settings()


def test_an_empty_bootstrap_list_means_nobody_and_not_the_default(write: Write) -> None:
    assert load(write("[provider.dht]\nbootstrap = []")).dht.bootstrap == ()


def test_a_relative_folder_in_the_file_is_relative_to_the_file(write: Write, tmp_path: Path) -> None:
    assert load(write('[provider]\nartifacts_dir = "boot"')).artifacts_dir == tmp_path / "boot"


def test_a_relative_folder_that_was_typed_is_relative_to_the_working_directory(write: Write) -> None:
    assert load(write(WHOLE), [typed("provider.artifacts_dir", "boot")]).artifacts_dir == Path("boot")


def test_what_was_typed_beats_the_file_and_leaves_the_rest_of_it(write: Write) -> None:
    settings = load(write(WHOLE), [typed("provider.dht.port", "9"), typed("provider.dht.bootstrap", ("a:1",))])
    assert settings.dht.port == 9
    assert settings.dht.bootstrap == (("a", 1),)
    assert settings.dht.record_ttl == 600


def test_what_was_not_given_changes_nothing(write: Write) -> None:
    assert load(write(WHOLE), [Override("provider.dht.port", None, "--port")]) == load(write(WHOLE))


def test_a_later_override_beats_an_earlier_one() -> None:
    settings = load(None, [typed("provider.name", "variable"), typed("provider.name", "flag")])
    assert settings.name == "flag"


def test_one_address_or_publisher_given_twice_counts_once() -> None:
    twice = [typed("provider.dht.bootstrap", ("a:1", "b:1", "a:1")), typed("trust.publishers", (PUBLISHER, PUBLISHER))]
    settings = load(None, twice)
    assert settings.dht.bootstrap == (("a", 1), ("b", 1))
    assert settings.trust.publishers == (PUBLISHER,)


@pytest.mark.parametrize("ttl", ["1", "604800", "2.5", "1e3"])
def test_a_record_ttl_from_a_second_to_seven_days_is_allowed(ttl: str) -> None:
    assert load(None, [typed("provider.dht.record_ttl", ttl)]).dht.record_ttl == float(ttl)


# --- what is refused ------------------------------------------------------------------------------------------------

WRONG_VALUES = [
    # table, line, the part of it that the refusal shows, what it says is allowed
    ("provider", "name = 7", "7", "string"),
    ("provider", 'name = ""', "''", "1 to 100 bytes"),
    ("provider", 'name = "a\\nb"', r"'a\nb'", "control characters"),
    ("provider", f'name = "{"é" * 51}"', "é", "1 to 100 bytes"),
    ("provider", "artifacts_dir = 7", "7", "string"),
    ("provider", 'artifacts_dir = ""', "''", "path of a folder"),
    ("provider", 'http_host = "127.0.0.1:80"', "'127.0.0.1:80'", "without a port"),
    ("provider", 'http_host = "999.1.1.1"', "'999.1.1.1'", "IP address or a host name"),
    ("provider", 'http_host = "two words"', "'two words'", "IP address or a host name"),
    ("provider", "http_port = 65536", "65536", "0 to 65535"),
    ("provider", "http_port = -1", "-1", "0 to 65535"),
    ("provider", 'http_port = "8080"', "'8080'", "integer"),
    ("provider", "http_port = 80.0", "80.0", "integer"),
    ("provider", "http_port = true", "true", "integer"),
    ("provider", 'base_url = "ftp://a/b"', "'ftp://a/b'", "https://HOST"),
    ("provider", 'base_url = "https://"', "'https://'", "https://HOST"),
    ("provider", 'base_url = "http://a:99999/"', "99999", "https://HOST"),
    ("provider", 'base_url = "http://[::1/"', "'http://[::1/'", "https://HOST"),
    ("provider", 'base_url = "http://a/b?c"', "'http://a/b?c'", "without user, query"),
    ("provider", 'base_url = "http://me@a/"', "'http://...@a/'", "without user"),
    ("provider", 'base_url = "http://a/b c"', "'http://a/b c'", "percent-encoded"),
    ("provider", "dht = 7", "7", "table"),
    ("provider.dht", 'host = ""', "''", "IP address or a host name"),
    ("provider.dht", "port = false", "false", "integer"),
    ("provider.dht", 'bootstrap = "a:1"', "'a:1'", "list"),
    ("provider.dht", "bootstrap = [7]", "7", "string"),
    ("provider.dht", 'bootstrap = ["a:1", "b"]', "'b'", "HOST:PORT"),
    ("provider.dht", 'bootstrap = ["::1:8468"]', "'::1:8468'", "brackets"),
    ("provider.dht", "record_ttl = 0", "0", "1 to 604800"),
    ("provider.dht", "record_ttl = 604801", "604801", "1 to 604800"),
    ("provider.dht", "record_ttl = true", "true", "1 to 604800"),
    ("provider.dht", 'record_ttl = "600"', "'600'", "number of seconds"),
    ("provider.dht", "record_ttl = inf", "inf", "1 to 604800"),
    ("provider.dht", "record_ttl = nan", "nan", "1 to 604800"),
    ("provider.dht", f"record_ttl = {'9' * 400}", "999", "1 to 604800"),
    ("provider.dht", "record_ttl = 1979-05-27", "1979", "1 to 604800"),
    ("provider.dht", "refresh_interval = 0", "0", "less than provider.dht.record_ttl"),
    ("provider.dht", "refresh_interval = -1", "-1", "less than provider.dht.record_ttl"),
    ("provider.dht", "refresh_interval = 3600", "3600", "less than provider.dht.record_ttl, which is 3600 s"),
    ("trust", f'publishers = "{PUBLISHER}"', PUBLISHER, "list"),
    ("trust", f'publishers = ["{PUBLISHER}", "me"]', "'me'", "64 lower-case hex digits"),
]


@pytest.mark.parametrize(("table", "line", "shown", "allowed"), WRONG_VALUES)
def test_a_wrong_value_is_refused_with_file_key_value_and_what_is_allowed(
    write: Write, table: str, line: str, shown: str, allowed: str
) -> None:
    path = write(f"[{table}]\n{line}\n")
    text = refusal(path)
    key = f"{table}.{line.split(' =')[0]}"
    assert text.startswith(f"{path}: {key} = ")
    assert shown in text
    assert allowed in text


@pytest.mark.parametrize(
    ("document", "key", "hint"),
    [
        ("[provider.dht]\nrefresh_intervall = 1", "provider.dht.refresh_intervall", "provider.dht.refresh_interval"),
        ("[provider]\nrecord_ttl = 1", "provider.record_ttl", "provider.dht.record_ttl"),
        ("[provder]\nname = 'a'", "provder", "provider"),
        ("[provider.dth]\nport = 1", "provider.dth", "provider.dht"),
        ("[dht]\nport = 1", "dht", "provider.dht"),
        ("[provider]\n'dht.port' = 1", "provider.dht.port", "provider.dht"),
        ("[trust]\nzzzzzz = 1", "trust.zzzzzz", "trust.publishers"),
        ("qqqq = 1", "qqqq", "provider, trust"),
        ("[provider.dht]\nx = 1", "provider.dht.x", "allowed here: provider.dht.bootstrap, provider.dht.host, "),
        ('[provider]\n"a\\nb" = 1', r"provider.a\nb", "provider.name"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_one_named(write: Write, document: str, key: str, hint: str) -> None:
    text = refusal(write(document))
    assert f": {key} = " in text
    assert hint in text.partition(" = ")[2]


def test_a_syntax_error_is_refused_with_its_line(write: Write) -> None:
    path = write("[provider]\nname = 'a'\nport =\n")
    assert re.search(rf"{path} is not valid TOML: .*line 3", refusal(path))


def test_a_byte_order_mark_that_an_editor_left_is_not_seen(write: Write) -> None:
    assert load(write(b'\xef\xbb\xbf[provider]\nname = "rack-7"\n')).name == "rack-7"


def test_a_file_that_is_not_utf_8_is_refused_with_its_line(write: Write) -> None:
    assert "not UTF-8 (at line 2)" in refusal(write(b"[provider]\nname = '\xff'\n"))


@pytest.mark.parametrize("document", ["a = " + "[" * 5000, "a = " + "9" * 5000])
def test_a_hostile_file_is_refused_like_any_other(write: Write, document: str) -> None:
    assert "plasm.toml" in refusal(write(document))


def test_a_file_that_is_far_too_large_is_not_read(write: Write) -> None:
    assert "is it the right file?" in refusal(write(b"#" * (1024 * 1024 + 1)))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'none.toml'} cannot be read: No such file" in refusal(tmp_path / "none.toml")
    assert f"{tmp_path} cannot be read: Is a directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("provider.http_port", "x"),
        ("provider.http_port", ""),
        ("provider.http_port", "٨٠"),
        ("provider.http_port", "8_080"),
        ("provider.http_port", "65536"),
        ("provider.dht.record_ttl", "1h"),
        ("provider.dht.record_ttl", "nan"),
        ("provider.dht.record_ttl", "inf"),
        ("provider.dht.record_ttl", "1e999"),
        ("provider.dht.refresh_interval", "1h"),
        ("provider.dht.bootstrap", ("a",)),
        ("trust.publishers", ("a",)),
    ],
)
def test_a_wrong_value_that_was_typed_is_refused_with_the_flag_or_variable(
    write: Write, key: str, value: str | tuple[str, ...]
) -> None:
    text = refusal(write(WHOLE), typed(key, value, "PLASM_DHT_X"))
    assert text.startswith(f"PLASM_DHT_X: {key} = ")


@pytest.mark.parametrize(
    "text",
    ["http://me:hunter2@h/x", "http://me:a/@ hunter2@h", f"https://{'me' * 30}:hunter2{'x' * 60}@h", "//hunter2@h:1"],
)
@pytest.mark.parametrize(
    "key", ["provider.base_url", "provider.dht.bootstrap", "provider.http_host", "provider.http_port"]
)
def test_a_password_that_stands_in_a_wrong_value_is_not_quoted(key: str, text: str) -> None:
    raw: object = [text] if key.endswith("bootstrap") else text
    with pytest.raises(ConfigError) as caught:
        load(None, [Override(key, raw, "--flag")])
    assert "hunter2" not in str(caught.value)
    assert "//...@" in str(caught.value)


def test_a_wrong_value_in_the_file_is_refused_even_where_the_command_line_hides_it(write: Write) -> None:
    text = refusal(write("[provider.dht]\nport = -1"), typed("provider.dht.port", "1"))
    assert "plasm.toml: provider.dht.port = -1: " in text


def test_an_interval_that_the_typed_ttl_makes_impossible_names_both(write: Write) -> None:
    path = write("[provider.dht]\nrefresh_interval = 2400")
    text = refusal(path, typed("provider.dht.record_ttl", "60", "--record-ttl"))
    assert text.startswith(f"{path}: provider.dht.refresh_interval = 2400: ")
    assert "60 s (--record-ttl)" in text


def test_an_interval_may_come_close_to_the_ttl(write: Write) -> None:
    path = write("[provider.dht]\nrecord_ttl = 2\nrefresh_interval = 1.999")
    assert load(path).dht.refresh_interval == 1.999


def test_an_override_of_no_setting_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match=r"provider\.prot"):
        load(None, [typed("provider.prot", "1")])


# --- addresses and seconds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1:8468", ("10.0.0.1", 8468)),
        ("localhost:1", ("localhost", 1)),
        ("dht.example.net.:65535", ("dht.example.net.", 65535)),
        ("my_host-1:80", ("my_host-1", 80)),
        ("[::1]:8468", ("::1", 8468)),
        ("[fe80::1%eth0]:8468", ("fe80::1%eth0", 8468)),
    ],
)
def test_an_address_is_parsed_and_written_back(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address
    assert format_address(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "a",
        "a:",
        ":1",
        "a:0",
        "a:65536",
        "a:-1",
        "a:+",
        "a:x",
        "a:1:2",
        "a:٨",
        "::1",
        "::1:8468",
        "[::1]",
        "[::1]:",
        "[]:1",
        "[a]:1",
        "[1.2.3.4]:1",
        "1.2.3:1",
        "1.2.3.256:1",
        "a b:1",
        "a\n:1",
        " a:1",
        "a:1 ",
        "-a:1",
        "a..b:1",
        "http://a:1",
        "x" * 64 + ":1",
    ],
)
def test_what_is_no_address_is_refused_with_an_example_of_one(text: str) -> None:
    with pytest.raises(ConfigError, match=r"\[::1\]:8468"):
        parse_address(text)


def test_seconds_are_parsed_within_their_limits() -> None:
    assert parse_seconds("0.5", source="--wait") == 0.5
    assert parse_seconds("7", source="--wait", least=7, most=7) == 7.0


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "inf", "1e999", "1_0", "0x1", "1 s"])
def test_what_is_no_number_of_seconds_is_refused_with_its_source(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--wait: .*number of seconds of at least 0$"):
        parse_seconds(text, source="--wait")
