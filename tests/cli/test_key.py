"""`plasm-dht key`: the identity, shown and made."""

import os
import stat
from pathlib import Path

import pytest

from plasm_dht.identity import Identity, parse_publisher_id
from plasm_dht_cli.main import run
from tests.cli.process import Run


def test_new_prints_the_publisher_id_of_the_key_that_it_makes(plasm: Run, tmp_path: Path) -> None:
    made = plasm("key", "new", "--identity", tmp_path / "id.pem")
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout == Identity.load(tmp_path / "id.pem").publisher_id + "\n"
    parse_publisher_id(made.stdout.strip())


def test_the_key_is_identity_pem_in_the_users_state_directory_unless_named(plasm: Run, tmp_path: Path) -> None:
    made = plasm("key", "new")
    path = tmp_path / "state" / "plasm-dht" / "identity.pem"
    assert made.stdout.strip() == Identity.load(path).publisher_id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_show_prints_the_same_id_alone_on_stdout(plasm: Run) -> None:
    made = plasm("key", "new")
    shown = plasm("key", "show")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, made.stdout, "")


def test_state_dir_is_where_the_key_is(plasm: Run, tmp_path: Path) -> None:
    plasm("key", "new", "--state-dir", tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "identity.pem").exists()
    assert plasm("key", "show").returncode == 2
    assert plasm("key", "show", PLASM_DHT_STATE_DIR=str(tmp_path / "elsewhere")).returncode == 0


def test_identity_beats_state_dir(plasm: Run, tmp_path: Path) -> None:
    one = plasm("key", "new", "--identity", tmp_path / "one.pem").stdout
    plasm("key", "new", "--state-dir", tmp_path)
    assert plasm("key", "show", "--identity", tmp_path / "one.pem", "--state-dir", tmp_path).stdout == one


def test_show_without_a_key_says_how_to_make_one_and_makes_none(plasm: Run, tmp_path: Path) -> None:
    shown = plasm("key", "show", "--identity", tmp_path / "id.pem")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert "plasm-dht key new" in shown.stderr
    assert str(tmp_path / "id.pem") in shown.stderr
    assert shown.stderr.count("\n") == 1
    assert not (tmp_path / "id.pem").exists()


def test_new_refuses_to_overwrite_a_key(plasm: Run) -> None:
    before = plasm("key", "new").stdout
    again = plasm("key", "new")
    assert (again.returncode, again.stdout) == (2, "")
    assert "--force" in again.stderr
    assert again.stderr.count("\n") == 1
    assert plasm("key", "show").stdout == before


def test_new_with_force_replaces_the_key(plasm: Run) -> None:
    before = plasm("key", "new").stdout
    replaced = plasm("key", "new", "--force")
    assert replaced.returncode == 0
    assert replaced.stdout != before
    assert plasm("key", "show").stdout == replaced.stdout


@pytest.mark.parametrize(
    "content", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----"]
)
def test_a_bad_key_file_is_named_in_one_line(plasm: Run, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    shown = plasm("key", "show", "--identity", path)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith(f"plasm-dht: error: key file {path} ")
    assert shown.stderr.count("\n") == 1


def test_a_key_that_others_can_read_is_refused(plasm: Run, tmp_path: Path) -> None:
    plasm("key", "new", "--identity", tmp_path / "id.pem")
    (tmp_path / "id.pem").chmod(0o640)
    shown = plasm("key", "show", "--identity", tmp_path / "id.pem")
    assert shown.returncode == 2
    assert "0640" in shown.stderr
    assert "0600" in shown.stderr


def test_a_folder_that_cannot_be_made_is_one_line(plasm: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for force in ([], ["--force"]):
        made = plasm("key", "new", "--state-dir", tmp_path / "file" / "deeper", *force)
        assert made.returncode == 2
        assert made.stderr.startswith("plasm-dht: error: ")
        assert made.stderr.count("\n") == 1


def test_a_line_break_in_a_path_makes_no_second_line(plasm: Run, tmp_path: Path) -> None:
    shown = plasm("key", "show", "--identity", f"{tmp_path}/a\nplasm-dht: error: forged\x1b[2J")
    assert shown.stderr.count("\n") == 1
    assert "\x1b" not in shown.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can read another user's key file")
def test_root_is_shown_the_key_of_a_service_but_does_not_sign_with_it(plasm: Run, tmp_path: Path) -> None:
    made = plasm("key", "new", "--state-dir", tmp_path)
    os.chown(tmp_path / "identity.pem", 12345, -1)
    shown = plasm("key", "show", "--state-dir", tmp_path)
    assert (shown.returncode, shown.stdout) == (0, made.stdout)
    signed = plasm("publish", "name", "value", "--once", "--bootstrap", "127.0.0.1:9", "--state-dir", tmp_path)
    assert signed.returncode == 2
    assert "belongs to user 12345" in signed.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user that may not look")
@pytest.mark.parametrize(
    ("verb", "problem"), [("show", "key file {} cannot be read"), ("new", "key file cannot be made")]
)
def test_a_folder_where_we_may_not_look_is_one_line(
    verb: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["key", verb, "--state-dir", str(tmp_path / "state")]
    run(["key", "new", "--state-dir", str(tmp_path / "state")])
    run(["key", "show", "--state-dir", str(tmp_path / "state")])  # so that all is imported
    capsys.readouterr()
    os.seteuid(65534)
    try:
        assert run(arguments) == 2
    finally:
        os.seteuid(0)
    (line,) = capsys.readouterr().err.splitlines()
    assert problem.format(tmp_path / "state/identity.pem") in line
    assert line.endswith(": Permission denied")
