"""Scanning real folders: what is found, what is not, and when a hash may be believed."""

import errno
import hashlib
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from plasm_dht.clock import Clock
from plasm_dht.errors import ArtifactsError
from plasm_dht.provider import artifacts
from plasm_dht.provider.artifacts import ArtifactScanner, ScanStopped

TARGET = "stable/arm64"


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / TARGET
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def scanner(tmp_path) -> ArtifactScanner:
    return ArtifactScanner(tmp_path)


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """The sizes of all reads of files, so that a test sees what is hashed and can change a file in the midst."""
    sizes = []
    read = os.read

    def counted(descriptor: int, size: int) -> bytes:
        data = read(descriptor, size)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(os, "read", counted)
    return sizes


class Later(Clock):
    """A clock that is an hour ahead: everything on the disk is old."""

    def wall(self) -> int:
        return super().wall() + 3_600_000


def roles(scan, target=TARGET) -> dict[str, str]:
    return {file.role: file.filename for file in scan.found[target].files}


def test_a_folder_becomes_a_set_with_hashes(scanner, folder):
    (folder / "vmlinuz").write_bytes(b"kernel")
    (folder / "VERSION").write_text("1.2\n")
    scan = scanner.scan()
    (file,) = scan.found[TARGET].files
    assert (file.role, file.filename, file.size) == ("kernel", "vmlinuz", 6)
    assert file.sha256 == hashlib.sha256(b"kernel").hexdigest()
    assert file.path == folder / "vmlinuz"
    assert file.mtime_ns == (folder / "vmlinuz").stat().st_mtime_ns
    assert scan.found[TARGET].version == "1.2"
    assert not scan.unsettled
    assert not scan.problems


@pytest.mark.parametrize(
    ("filename", "role"),
    [
        ("vmlinuz-6.1.0", "kernel"),
        ("bzImage", "kernel"),
        ("Image.gz", "kernel"),
        ("kernel8.img", "kernel"),
        ("initramfs.cpio", "initramfs"),
        ("initrd.img", "initramfs"),
        ("rootfs.squashfs", "rootfs"),
        ("config.txt", "config.txt"),
        ("my-vmlinuz", "my-vmlinuz"),
        ("bzImage.old", "bzImage.old"),
        ("vmlinuz.sha256", "vmlinuz.sha256"),
        ("rootfs.squashfs.sig", "rootfs.squashfs.sig"),
    ],
)
def test_a_name_tells_the_role(scanner, folder, filename, role):
    (folder / filename).touch()
    assert roles(scanner.scan()) == {role: filename}


def test_of_two_files_for_a_role_the_last_in_version_order_has_it_and_a_problem_says_so(scanner, folder):
    for name in ("vmlinuz-6.9", "vmlinuz-6.10", "vmlinuz-6.10.sig"):
        (folder / name).touch()
    scan = scanner.scan()
    assert roles(scan) == {
        "kernel": "vmlinuz-6.10",
        "vmlinuz-6.9": "vmlinuz-6.9",
        "vmlinuz-6.10.sig": "vmlinuz-6.10.sig",
    }
    (problem,) = scan.problems.values()
    assert "vmlinuz-6.10 is served as the kernel, not vmlinuz-6.9" in problem


def test_a_file_that_has_the_name_of_a_role_keeps_it(scanner, folder):
    (folder / "rootfs").touch()
    (folder / "rootfs.squashfs").touch()
    assert roles(scanner.scan()) == {"rootfs": "rootfs", "rootfs.squashfs": "rootfs.squashfs"}


def test_hidden_and_temporary_files_and_subfolders_are_no_artifacts(scanner, folder, tmp_path):
    for name in (".vmlinuz.Xy12", "a.tmp", "b.part", "c~", "sub/vmlinuz"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (tmp_path / ".git" / "objects").mkdir(parents=True)
    (tmp_path / ".git" / "objects" / "x").touch()
    (tmp_path / "README").touch()
    scan = scanner.scan()
    assert not scan.found
    assert not scan.problems


def test_a_folder_with_a_version_alone_has_nothing_to_serve(scanner, folder):
    (folder / "VERSION").write_text("1")
    assert not scanner.scan().found


@pytest.mark.parametrize("text", [b"", b"\n", b"1\n2\n", b"1\x1b[2J", b"x" * 65, b"x" * 10_000, b"\xff"])
def test_a_version_that_is_not_one_short_line_is_a_problem_and_the_content_is_the_version(scanner, folder, text):
    (folder / "vmlinuz").touch()
    without = scanner.scan().found[TARGET].version
    (folder / "VERSION").write_bytes(text)
    scan = scanner.scan()
    assert scan.found[TARGET].version == without
    assert f"{TARGET}/VERSION" in scan.problems
    assert all("\n" not in line and line.isprintable() for line in scan.problems.values())


def test_the_content_version_changes_with_the_content_and_with_nothing_else(scanner, folder):
    (folder / "vmlinuz").write_bytes(b"1")
    first = scanner.scan().found[TARGET]
    os.utime(folder / "vmlinuz", (1, 1))
    touched = scanner.scan().found[TARGET]
    assert touched == first
    assert touched.files[0].mtime_ns == 1_000_000_000 != first.files[0].mtime_ns
    (folder / "vmlinuz").write_bytes(b"2")
    assert scanner.scan().found[TARGET].version != first.version


def test_names_that_are_no_target_are_problems(scanner, tmp_path):
    for name in ("Stable/arm64", "dht/arm64", "stable/ARM", "stable/x y"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "vmlinuz").touch()
    scan = scanner.scan()
    assert not scan.found
    assert set(scan.problems) == {"Stable/arm64", "dht/arm64", "stable/ARM", "stable/x y"}


def test_a_file_name_that_no_manifest_can_hold_is_a_problem_and_the_rest_is_served(scanner, folder):
    (folder / "vmlinuz").touch()
    for name in (b"bad\xff", b"a\nb", b"back\\slash", b"manifest.json"):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).touch()
    scan = scanner.scan()
    assert roles(scan) == {"kernel": "vmlinuz"}
    assert len(scan.problems) == 4
    assert all(line.isprintable() for line in scan.problems.values())


def test_a_pipe_is_a_problem_and_nobody_waits_for_it(scanner, folder):
    os.mkfifo(folder / "vmlinuz")
    scan = scanner.scan()
    assert not scan.found
    assert "not a regular file" in scan.problems[f"{TARGET}/vmlinuz"]


@pytest.mark.parametrize("root", ["missing", "file"])
def test_a_root_that_is_no_folder_is_one_clear_error(tmp_path, root):
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactsError, match=rf"artifact folder .*/{root} cannot be read: .*CHANNEL/ARCH"):
        ArtifactScanner(tmp_path / root).scan()


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX")
def test_what_may_not_be_read_is_a_problem_and_the_rest_is_served():
    nobody = 65534
    with tempfile.TemporaryDirectory() as name:  # tmp_path is below a folder that is the tester's alone
        root = Path(name)
        root.chmod(0o755)
        folder = root / TARGET
        folder.mkdir(parents=True)
        (folder / "vmlinuz").touch()
        (folder / "initrd").touch(mode=0o000)
        (root / "stable" / "amd64").mkdir(mode=0o000)
        (root / "closed").mkdir(mode=0o000)
        user = os.geteuid()
        if user == 0:
            os.seteuid(nobody)
        try:
            scan = ArtifactScanner(root).scan()
        finally:
            os.seteuid(user)
        (root / "stable" / "amd64").chmod(0o700)
        (root / "closed").chmod(0o700)
    assert roles(scan) == {"kernel": "vmlinuz"}
    assert set(scan.problems) == {f"{TARGET}/initrd", "stable/amd64", "closed"}


def test_a_share_that_fails_for_a_moment_withdraws_nothing(scanner, folder, monkeypatch):
    (folder / "vmlinuz").touch()
    assert scanner.scan().found

    def fail(*_: object) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    (folder / "vmlinuz").write_bytes(b"new")
    monkeypatch.setattr(os, "read", fail)
    scan = scanner.scan()
    assert scan.unsettled == {TARGET}
    assert not scan.found


# Links


def test_links_within_the_root_are_followed_to_where_the_bytes_are(scanner, tmp_path, folder):
    (tmp_path / "pool" / "6.1").mkdir(parents=True)
    real = tmp_path / "pool" / "6.1" / "linux"
    real.write_bytes(b"kernel")
    (folder / "vmlinuz").symlink_to("../../pool/6.1/linux")
    (tmp_path / "edge").symlink_to("stable")
    scan = scanner.scan()
    assert roles(scan) == roles(scan, "edge/arm64") == {"kernel": "vmlinuz"}
    assert scan.found["edge/arm64"].files[0].path == real
    assert scanner.linked


def test_the_scanner_forgets_links_that_are_gone(scanner, folder):
    (folder / "vmlinuz-6.1").touch()
    (folder / "vmlinuz").symlink_to("vmlinuz-6.1")
    scanner.scan()
    assert scanner.linked
    (folder / "vmlinuz").unlink()
    scanner.scan({TARGET})
    assert not scanner.linked


def test_links_that_leave_the_root_are_not_served(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    (outside / "vmlinuz").touch()
    (root / TARGET).mkdir(parents=True)
    (root / TARGET / "vmlinuz").symlink_to(outside / "vmlinuz")
    (root / TARGET / "initrd").symlink_to("nowhere")
    (root / TARGET / "rootfs").symlink_to("rootfs")
    (root / "stable" / "amd64").symlink_to(outside)
    (root / "a").symlink_to("a")
    scan = ArtifactScanner(root).scan()
    assert not scan.found
    assert set(scan.problems) == {*(f"{TARGET}/{name}" for name in ("vmlinuz", "initrd", "rootfs")), "stable/amd64"}
    assert "out of the artifact folder" in scan.problems["stable/amd64"]


def test_a_swapped_link_is_another_content(scanner, tmp_path):
    for release in ("1.1", "1.2"):
        (tmp_path / "releases" / release / "arm64").mkdir(parents=True)
        (tmp_path / "releases" / release / "arm64" / "vmlinuz").write_text(release)
    (tmp_path / "stable").symlink_to("releases/1.1")
    first = scanner.scan().found[TARGET]
    (tmp_path / ".new").symlink_to("releases/1.2")
    (tmp_path / ".new").replace(tmp_path / "stable")
    second = scanner.scan().found[TARGET]
    assert first != second
    assert second.files[0].sha256 == hashlib.sha256(b"1.2").hexdigest()


# The cache


def test_a_known_file_is_not_read_again(tmp_path, folder, reads):
    (folder / "vmlinuz").write_bytes(b"kernel")
    scanner = ArtifactScanner(tmp_path, Later())
    first = scanner.scan()
    assert reads == [6]
    assert scanner.scan() == first
    assert scanner.scan({TARGET}) == first
    assert reads == [6]


def test_a_file_that_two_targets_share_is_read_once_though_both_are_scanned_at_the_same_time(
    tmp_path, folder, monkeypatch
):
    (folder / "vmlinuz").write_bytes(b"kernel")
    (tmp_path / "latest").symlink_to("stable")
    reading, go_on, reads = threading.Event(), threading.Event(), []
    real_read = os.read

    def slow_read(descriptor: int, size: int) -> bytes:
        reading.set()
        go_on.wait(5)
        reads.append(size)
        return real_read(descriptor, size)

    monkeypatch.setattr(artifacts.os, "read", slow_read)
    scanner = ArtifactScanner(tmp_path, Later())
    with ThreadPoolExecutor() as threads:
        first = threads.submit(scanner.scan, {TARGET})
        assert reading.wait(5)
        second = threads.submit(scanner.scan, {"latest/arm64"})
        assert not second.done()
        go_on.set()
        hashes = {
            each.sha256 for done in (first, second) for found in done.result().found.values() for each in found.files
        }
    assert hashes == {hashlib.sha256(b"kernel").hexdigest()}
    assert len(reads) == 1


def test_a_hash_within_the_granularity_of_the_time_stamps_is_not_believed_again(scanner, folder, reads):
    path = folder / "vmlinuz"
    path.write_bytes(b"first!")
    scanner.scan()
    scanner.scan()
    assert reads == [6, 6]


def test_a_file_rewritten_in_place_with_its_old_time_and_size_is_seen(tmp_path, folder):
    path = folder / "vmlinuz"
    path.write_bytes(b"first!")
    status = path.stat()
    scanner = ArtifactScanner(tmp_path, Later())
    scanner.scan()
    while True:  # until the file system's clock has ticked
        path.write_bytes(b"second")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        if path.stat().st_ctime_ns != status.st_ctime_ns:
            break
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert scanner.scan().found[TARGET].files[0].sha256 == hashlib.sha256(b"second").hexdigest()


@pytest.mark.parametrize("targets", [None, {TARGET}])
def test_the_hash_of_a_vanished_file_is_forgotten(scanner, folder, targets):
    for name in ("vmlinuz", "initrd"):
        (folder / name).touch()
    scanner.scan(targets)
    (folder / "vmlinuz").unlink()
    scanner.scan(targets)
    assert set(scanner._hashes) == {folder / "initrd"}
    (folder / "initrd").unlink()
    folder.rmdir()
    scanner.scan(targets)
    assert not scanner._hashes


# Change while it is scanned


def test_a_file_that_is_replaced_while_it_is_hashed_is_hashed_again(scanner, folder, monkeypatch):
    path, fresh = folder / "vmlinuz", folder / ".fresh"
    path.write_bytes(b"old kernel")
    fresh.write_bytes(b"new kernel")
    read = os.read

    def replace(descriptor: int, size: int) -> bytes:
        if fresh.exists():
            fresh.rename(path)
        return read(descriptor, size)

    monkeypatch.setattr(os, "read", replace)
    scan = scanner.scan()
    assert scan.found[TARGET].files[0].sha256 == hashlib.sha256(b"new kernel").hexdigest()


def test_a_file_that_grows_all_the_time_is_unsettled_and_then_found_whole(scanner, folder, monkeypatch):
    path = folder / "vmlinuz"
    path.write_bytes(b"x")
    read, attempts = os.read, []

    def grow(descriptor: int, size: int) -> bytes:
        attempts.append(size)
        with path.open("ab") as file:
            file.write(b"x")
        return read(descriptor, size)

    monkeypatch.setattr(os, "read", grow)
    scan = scanner.scan()
    assert scan.unsettled == {TARGET}
    assert not scan.found
    assert len(attempts) == artifacts.ATTEMPTS
    monkeypatch.undo()
    scan = scanner.scan({TARGET})
    assert scan.found[TARGET].files[0].size == path.stat().st_size
    assert not scan.unsettled


def test_a_file_that_grows_as_fast_as_it_is_read_has_an_end(scanner, folder, monkeypatch):
    path = folder / "vmlinuz"
    path.write_bytes(b"x" * 2**21)
    read, asked = os.read, []

    def grow(descriptor: int, size: int) -> bytes:
        asked.append(size)
        with path.open("ab") as file:
            file.write(b"x" * size)
        return read(descriptor, size)

    monkeypatch.setattr(os, "read", grow)
    assert scanner.scan().unsettled == {TARGET}
    assert sum(asked) <= 2**21 * 2**artifacts.ATTEMPTS


def test_a_file_that_comes_while_another_is_hashed_is_in_the_same_set(scanner, folder, monkeypatch):
    (folder / "initrd").write_bytes(b"old")
    read = os.read

    def come(descriptor: int, size: int) -> bytes:
        (folder / "vmlinuz").write_bytes(b"new")
        monkeypatch.undo()
        return read(descriptor, size)

    monkeypatch.setattr(os, "read", come)
    assert set(roles(scanner.scan())) == {"initramfs", "kernel"}


def test_new_and_vanished_folders_are_told_by_the_next_scan(scanner, folder, tmp_path):
    (folder / "vmlinuz").touch()
    assert set(scanner.scan().found) == {TARGET}
    (tmp_path / "edge" / "amd64").mkdir(parents=True)
    (tmp_path / "edge" / "amd64" / "vmlinuz").touch()
    (folder / "vmlinuz").unlink()
    folder.rmdir()
    assert set(scanner.scan({"edge/amd64", TARGET}).found) == {"edge/amd64"}
    assert set(scanner.scan().found) == {"edge/amd64"}


def test_only_the_targets_that_are_asked_for_are_scanned(scanner, folder, tmp_path, reads):
    (folder / "vmlinuz").write_bytes(b"kernel")
    (tmp_path / "edge" / "amd64").mkdir(parents=True)
    (tmp_path / "edge" / "amd64" / "vmlinuz").write_bytes(b"edge")
    assert set(scanner.scan({"edge/amd64"}).found) == {"edge/amd64"}
    assert reads == [4]
    with pytest.raises(ArtifactsError):
        scanner.scan({"../etc"})


def test_stop_ends_a_long_hash_at_once_and_no_scan_starts_again(scanner, folder, monkeypatch):
    with (folder / "rootfs").open("wb") as file:
        file.truncate(2**34)  # 16 GiB of a hole
    reading = threading.Event()
    read = os.read

    def told(descriptor: int, size: int) -> bytes:
        reading.set()
        return read(descriptor, size)

    monkeypatch.setattr(os, "read", told)
    ended = []

    def scan() -> None:
        with pytest.raises(ScanStopped):
            scanner.scan()
        ended.append(True)

    thread = threading.Thread(target=scan)
    thread.start()
    assert reading.wait(5)
    scanner.stop()
    thread.join(1)
    assert ended
    with pytest.raises(ScanStopped):
        scanner.scan()
