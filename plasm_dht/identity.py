"""Ed25519 key pairs, the key file and the publisher id. The only module that imports cryptography."""

import os
import re
import stat
from pathlib import Path
from typing import NoReturn, Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from plasm_dht.errors import IdentityError

PREFIX = "ed25519:"
_PUBLISHER_ID = re.compile(r"ed25519:[0-9a-f]{64}")
# A PKCS#8 Ed25519 key is 119 bytes of PEM; a file far above that is something else.
MAX_KEY_FILE = 16 * 1024


def publisher_id(public_key: bytes) -> str:
    """The publisher id, `ed25519:` and 64 hex digits, of a 32-byte public key."""
    return PREFIX + public_key.hex()


def parse_publisher_id(text: str) -> bytes:
    """The 32-byte public key of a publisher id. Raises `IdentityError`."""
    if not _PUBLISHER_ID.fullmatch(text):
        raise IdentityError(f"publisher id {text!r} is not 'ed25519:' and 64 lower-case hex digits")
    return bytes.fromhex(text[len(PREFIX) :])


def read_publisher_id(path: str | os.PathLike[str]) -> str:
    """The publisher id of the key in the file, whoever owns it: nothing is signed with it.

    Raises `FileNotFoundError` when there is none, and `IdentityError` as `Identity.load` does.
    """
    return Identity._read(Path(path), of_anybody=True).publisher_id


def verify(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the 64-byte signature of `message` is by the holder of the 32-byte `public_key` (RFC 8032)."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


class Identity:
    """An Ed25519 key pair: who a publisher is.

    `public_key` is 32 bytes, `publisher_id` is its printable form.
    """

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._private_key = private_key
        self.public_key: bytes = private_key.public_key().public_bytes_raw()
        self.publisher_id: str = publisher_id(self.public_key)

    def __repr__(self) -> str:
        return f"<Identity {self.publisher_id}>"

    def __reduce__(self) -> NoReturn:
        """Raises `TypeError`: a copy of the key would be in a file or a message that nobody guards."""
        raise TypeError("an Identity is not pickled or copied: its key stays in the key file and in this process")

    @classmethod
    def generate(cls) -> Self:
        """A new random key pair, kept nowhere."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The key pair in the file (PKCS#8 PEM, mode 0600), which is created when there is none.

        Raises `IdentityError` when the file is no such key, or when others than us (and root) can read it.
        """
        path = Path(path)
        try:
            return cls._read(path)
        except FileNotFoundError:
            pass
        try:
            return cls.create(path)
        except IdentityError:
            if path.exists():  # another process created it in this moment
                return cls._read(path)
            raise

    @classmethod
    def create(cls, path: str | os.PathLike[str], *, replace: bool = False) -> Self:
        """A new key pair, written to the file.

        Raises `IdentityError` when the file exists (unless `replace`) or cannot be written.
        """
        path = Path(path)
        identity = cls.generate()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise IdentityError(f"folder {path.parent} of the key file cannot be made: {error.strerror}") from None
        try:
            identity._write(path, replace=replace)
        except FileExistsError:
            raise IdentityError(f"key file {path} exists: name another one, or say that it may be replaced") from None
        except OSError as error:
            raise IdentityError(f"key file {path} cannot be written: {error.strerror}") from None
        return identity

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature of the message."""
        return self._private_key.sign(message)

    @classmethod
    def _read(cls, path: Path, *, of_anybody: bool = False) -> Self:
        try:
            # without waiting: a pipe that nobody writes to would hold up the start for ever
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123
                status = os.fstat(file.fileno())
                _check_guarded(path, status)
                if not of_anybody:
                    _check_owner(path, status)
                data = file.read(MAX_KEY_FILE)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise IdentityError(f"key file {path} cannot be read: {error.strerror}") from None
        # imported where a key file is read or written: a reader of records has none, and it takes as long as the rest
        from cryptography.hazmat.primitives import serialization

        try:
            key = serialization.load_pem_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise IdentityError(f"key file {path} holds no unencrypted Ed25519 private key in PKCS#8 PEM")
        return cls(key)

    def _write(self, path: Path, *, replace: bool) -> None:
        import tempfile

        from cryptography.hazmat.primitives import serialization

        pem = self._private_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(pem)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                temporary.replace(path)
            else:
                path.hardlink_to(temporary)  # unlike a rename it never overwrites a key that another process just made
        finally:
            temporary.unlink(missing_ok=True)
        # The file is on the disk, but its name is in the folder: without it the next start would make another key.
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _check_guarded(path: Path, status: os.stat_result) -> None:
    """Raises `IdentityError` unless it is a file that nobody but its owner, and root, can read or replace."""
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise IdentityError(f"key file {path} is {kind}: name a file with a key, or one that is to be made")
    if mode & 0o077:
        raise IdentityError(f"key file {path} has mode {mode:04o}, so others can use the key: make it 0600")


def _check_owner(path: Path, status: os.stat_result) -> None:
    """Raises `IdentityError` when the file is neither ours nor root's: its owner could sign with the key, too."""
    if status.st_uid not in (0, os.geteuid()):
        raise IdentityError(f"key file {path} belongs to user {status.st_uid}, who can use the key: make it yours")
