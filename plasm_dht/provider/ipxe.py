"""iPXE scripts: one that boots a `CHANNEL/ARCH`, and one that chooses it by the client's architecture. Pure text.

What iPXE does with a line (ipxe.org/scripting): it splits it at white space, with no quotes and no escapes; `||`, `&&`
and `;` alone end a command, and a word that starts with `#` ends the line. Settings, `${name}`, are expanded in the
words after that, so whatever comes out of one is an argument and never a command.
"""

import json
import re
from collections.abc import Iterable

BOOT_FILE = "boot.ipxe"
CMDLINE_FILE = "cmdline"
# Linux cuts a longer command line off (COMMAND_LINE_SIZE: 2,048 on x86 and arm64, at most 4,096) (bytes).
MAX_CMDLINE = 4096
# How long a message stays on a screen before the machine goes on with its next boot device (ms).
_PAUSE = 10_000
# What iPXE takes for white space; `str.split` without an argument takes more for it.
_SPACE = re.compile(r"[ \t\n\v\f\r]+")
# The values of iPXE's ${buildarch}, and what the same architecture is called by those who name folders. The first that
# is served is used.
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "x86_64": ("amd64", "x86_64", "x86-64", "x64"),
    "arm64": ("arm64", "aarch64"),
    "i386": ("i386", "i486", "i586", "i686", "x86", "ia32"),
    "arm32": ("armhf", "arm", "arm32", "armv7", "armv7l", "armv7hl", "armel"),
    "riscv64": ("riscv64",),
    "loong64": ("loong64", "loongarch64"),
}
# How a word gets past iPXE that it would take for syntax: the first character comes from a setting.
_SYNTAX = {"#": ("hash", "23"), ";": ("semicolon", "3b"), "|": ("pipe", "7c"), "&": ("ampersand", "26")}


def read_cmdline(data: bytes) -> list[str]:
    """The words of a `cmdline` file; its lines are one command line. Raises `ValueError` when no kernel can take it."""
    if len(data) > MAX_CMDLINE:
        raise ValueError(f"it has {len(data)} bytes: a kernel takes at most {MAX_CMDLINE}")
    try:
        words = [word for word in _SPACE.split(data.decode("ascii")) if word]
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not ASCII, which is all that every kernel and iPXE take") from None
    for word in words:
        if not word.isprintable():
            raise ValueError(f"{word!a} has a control character")
    return words


def boot_script(target: str, version: str, manifest: bytes, cmdline: Iterable[str] = ()) -> str:
    """The script that boots what the manifest of our own names. Raises `ValueError` when it names no kernel."""
    artifacts = json.loads(manifest).get("artifacts", {})
    urls = {role: str(artifacts[role]["urls"][0]) for role in ("kernel", "initramfs") if role in artifacts}
    if "kernel" not in urls:
        raise ValueError("it has no kernel: no file is named vmlinuz*, bzImage, Image* or kernel*")
    needed: dict[str, str] = {}
    words = [_word(word, needed) for word in cmdline]
    if "initramfs" in urls:
        words.insert(0, "initrd=initramfs")  # on EFI, older kernels and older iPXE agree on it by this name alone
    lines = [f"echo plasm-dht: {target} {_text(version)}"]
    lines += [f"set {name}:hex {code}" for name, code in needed.items()]
    lines.append(" ".join(["kernel", urls["kernel"], *words, "|| goto failed"]))
    if "initramfs" in urls:
        lines.append(f"initrd --name initramfs {urls['initramfs']} || goto failed")
    lines += ["boot || goto failed", ":failed", f"echo plasm-dht: {target} was not booted"]
    return _script(lines)


def choice_script(channel: str, served: Iterable[str]) -> str:
    """The script that goes on with the script of the client's architecture; `served`: the channel's architectures."""
    archs = set(served)
    known = {build: name for build, names in ARCHITECTURES.items() for name in reversed(names) if name in archs}
    lines = []
    if "x86_64" in known:
        # For a PC with a BIOS iPXE is built for i386, whatever the machine; its CPU says whether it can do 64 bits. On
        # EFI the firmware decides, which iPXE was built for.
        lines.append("iseq ${buildarch} i386 && iseq ${platform} pcbios && cpuid --ext 29 && goto x86_64 ||")
    lines += [f"iseq ${{buildarch}} {build} && goto {build} ||" for build in known]
    lines.append("goto none")
    for build, arch in known.items():
        lines += [f":{build}", f"chain --replace --autofree {channel}/{arch}/{BOOT_FILE} || goto failed"]
    lines += [":none", f"echo plasm-dht: {channel} has nothing for ${{buildarch}}", "goto end"]
    lines += [":failed", f"echo plasm-dht: the script of {channel} for ${{buildarch}} did not run", ":end"]
    return _script(lines)


def choose_channel(asked: str | None, targets: Iterable[str]) -> tuple[str, list[str]]:
    """The channel for a client that asks for one or for none, and its architectures.

    Without one it is `stable`, or the only one. Raises `LookupError` that says what there is.
    """
    channels: dict[str, list[str]] = {}
    for target in sorted(targets):
        channel, arch = target.split("/")
        channels.setdefault(channel, []).append(arch)
    default = next(iter(channels)) if len(channels) == 1 else "stable"
    channel = default if asked is None else asked
    if channel not in channels:
        there_is = ", ".join(channels) or "none at this moment"
        raise LookupError(f"channel {channel!a} is not served here, name one with ?channel=: {there_is}")
    return channel, channels[channel]


def _script(lines: Iterable[str]) -> str:
    """The lines, and an end in which a person can read what went wrong before the next boot device is tried."""
    return "\n".join(
        ["#!ipxe", *lines, f"prompt --timeout {_PAUSE} Press a key to go on with the next boot device ||", "exit 1", ""]
    )


def _word(word: str, needed: dict[str, str]) -> str:
    if word in ("||", "&&", ";") or word.startswith("#"):
        name, code = _SYNTAX[word[0]]
        needed[name] = code
        return f"${{{name}:string}}{word[1:]}"
    return word


def _text(text: str) -> str:
    """The text for `echo`: what iPXE could take for syntax or a setting, or a screen cannot show, is an underscore."""
    return re.sub(r"[^A-Za-z0-9.,:+~_-]", "_", text)
