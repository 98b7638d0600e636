"""Key pairs, the key file and publisher ids."""

import base64
import copy
import errno
import os
import pickle
import stat
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from plasm_dht.errors import IdentityError
from plasm_dht.identity import MAX_KEY_FILE, Identity, parse_publisher_id, publisher_id, verify

# RFC 8032, 7.1, TEST 2
SECRET = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def pem(key: Ed25519PrivateKey | X25519PrivateKey, password: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def key_file(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_signatures_are_those_of_rfc_8032() -> None:
    identity = Identity(Ed25519PrivateKey.from_private_bytes(SECRET))
    assert identity.public_key == PUBLIC
    assert identity.sign(b"\x72") == SIGNATURE
    assert verify(PUBLIC, SIGNATURE, b"\x72")


@pytest.mark.parametrize(
    ("key", "signature", "message"),
    [
        pytest.param(PUBLIC, SIGNATURE, b"\x73", id="another message"),
        pytest.param(PUBLIC, SIGNATURE[:-1] + b"\x01", b"\x72", id="another signature"),
        pytest.param(PUBLIC, SIGNATURE[:-1], b"\x72", id="a short signature"),
        pytest.param(PUBLIC, b"", b"\x72", id="no signature"),
        pytest.param(bytes(32), SIGNATURE, b"\x72", id="another key"),
        pytest.param(PUBLIC[:-1], SIGNATURE, b"\x72", id="a short key"),
    ],
)
def test_what_the_key_did_not_sign_is_refused_without_raising(key: bytes, signature: bytes, message: bytes) -> None:
    assert not verify(key, signature, message)


def test_a_publisher_id_and_its_key_are_each_others_inverse() -> None:
    identity = Identity.generate()
    assert identity.publisher_id == publisher_id(identity.public_key)
    assert parse_publisher_id(identity.publisher_id) == identity.public_key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ed25519:",
        "ed25519:" + "a" * 63,
        "ed25519:" + "a" * 65,
        "ed25519:" + "A" * 64,
        "ed25519:" + "g" * 64,
        "ed25519:" + "a" * 64 + "\n",
        "rsa:" + "a" * 64,
        "a" * 64,
    ],
)
def test_anything_else_is_no_publisher_id(text: str) -> None:
    with pytest.raises(IdentityError, match="64 lower-case hex digits"):
        parse_publisher_id(text)


def test_load_creates_the_file_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "identity.pem"
    made = Identity.load(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert Identity.load(path).public_key == made.public_key
    assert [file.name for file in path.parent.iterdir()] == ["identity.pem"]


def test_a_key_from_another_tool_is_read(tmp_path: Path) -> None:
    path = key_file(tmp_path / "id.pem", pem(Ed25519PrivateKey.from_private_bytes(SECRET)))
    assert Identity.load(path).public_key == PUBLIC


def test_two_that_start_at_once_end_with_one_key(tmp_path: Path) -> None:
    keys: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: keys.append(Identity.load(tmp_path / "id.pem").public_key)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert len(set(keys)) == 1


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00" * 100_000, id="something large"),
        pytest.param(b"\n" * MAX_KEY_FILE + pem(Ed25519PrivateKey.generate()), id="a key behind more than is read"),
        pytest.param(pem(X25519PrivateKey.generate()), id="another kind of key"),
        pytest.param(pem(Ed25519PrivateKey.generate(), b"password"), id="encrypted"),
    ],
)
def test_a_file_that_holds_no_usable_key_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = key_file(tmp_path / "id.pem", content)
    with pytest.raises(IdentityError, match=str(path)):
        Identity.load(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_key_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path / "id.pem", pem(Ed25519PrivateKey.generate()), mode)
    with pytest.raises(IdentityError, match=f"mode {mode:04o}.*0600"):
        Identity.load(path)


def test_a_folder_is_no_key_file(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="directory"):
        Identity.load(tmp_path)


def test_create_overwrites_only_when_told_to(tmp_path: Path) -> None:
    path = tmp_path / "id.pem"
    first = Identity.create(path)
    with pytest.raises(IdentityError, match="exists"):
        Identity.create(path)
    assert Identity.load(path).public_key == first.public_key
    second = Identity.create(path, replace=True)
    assert second.public_key != first.public_key
    assert Identity.load(path).public_key == second.public_key
    assert [file.name for file in tmp_path.iterdir()] == ["id.pem"]


def is_in(secret: bytes, text: str) -> bool:
    """Whether the key, or a half of it, is in the text in any of the ways in which it is written."""
    der = secret[:16], secret[16:]
    ways = [way(part) for part in der for way in (bytes.hex, repr, lambda part: base64.b64encode(part)[:20].decode())]
    pem_lines = pem(Ed25519PrivateKey.from_private_bytes(secret)).decode().splitlines()[1:-1]
    return any(way.strip("b'") in text for way in [*ways, *pem_lines])


def test_the_secret_is_in_no_text_of_it() -> None:
    identity = Identity(Ed25519PrivateKey.from_private_bytes(SECRET))
    assert repr(identity) == f"<Identity ed25519:{PUBLIC.hex()}>"
    for text in (str(identity), f"{identity}", f"{identity!a}", repr(vars(identity)), repr([identity])):
        assert not is_in(SECRET, text)


def test_what_finds_the_secret_would_find_it() -> None:
    key = Ed25519PrivateKey.from_private_bytes(SECRET)
    for text in (SECRET.hex(), repr(SECRET), pem(key).decode(), base64.b64encode(SECRET).decode(), repr(pem(key))):
        assert is_in(SECRET, f"something {text} something")


@pytest.mark.parametrize("copy_it", [pickle.dumps, copy.copy, copy.deepcopy], ids=lambda each: each.__name__)
def test_a_key_is_neither_pickled_nor_copied(copy_it: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="not pickled or copied"):
        copy_it(Identity.generate())


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_secret_is_in_no_refusal(tmp_path: Path, mode: int) -> None:
    content = pem(Ed25519PrivateKey.from_private_bytes(SECRET))
    path = key_file(tmp_path / "id.pem", content[:-10] if mode == 0o600 else content, mode)
    with pytest.raises(IdentityError) as caught:
        Identity.load(path)
    assert not is_in(SECRET, "".join(traceback.format_exception(caught.value)))


def test_a_pipe_is_no_key_file_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "id.pem", 0o600)
    with pytest.raises(IdentityError, match="no regular file"):
        Identity.load(tmp_path / "id.pem")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can read, or make, another user's key file")
def test_a_key_that_belongs_to_somebody_else_is_refused(tmp_path: Path) -> None:
    path = key_file(tmp_path / "id.pem", pem(Ed25519PrivateKey.generate()))
    os.chown(path, 12345, -1)
    with pytest.raises(IdentityError, match="belongs to user 12345"):
        Identity.load(path)


def test_the_file_has_its_mode_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Identity.create(tmp_path / "id.pem")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "id.pem").stat().st_mode) == 0o600


@pytest.mark.parametrize("replace", [False, True])
def test_a_key_file_has_all_of_its_content_or_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    """Whatever step fails, as on a full disk: what was there is there still, and nothing else."""
    path = tmp_path / "id.pem"
    before = Identity.create(path).public_key if replace else None

    def full(descriptor: int) -> None:
        assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o600  # also while it is written
        assert (path.exists(), replace) in ((False, False), (True, True))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(IdentityError, match="cannot be written: No space left"):
        Identity.create(path, replace=replace)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == (["id.pem"] if replace else [])
    assert not replace or Identity.load(path).public_key == before


def test_the_key_and_its_name_are_on_the_disk_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(stat.S_IFMT(os.fstat(descriptor).st_mode)))
    Identity.create(tmp_path / "id.pem")
    assert synced == [stat.S_IFREG, stat.S_IFDIR]
