"""The files of docs/deploy: what systemd and a container engine read is well formed and names what is there."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from plasm_dht.config import load
from plasm_dht_cli.main import COMMANDS
from tests.cli.process import SCRIPT

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "docs/deploy"
UNITS = ("plasm-dht.service", "plasm-dht-node.service")
INSTALLED = "/opt/plasm-dht/bin/plasm-dht"

# The directives that the units use, as systemd.unit(5), systemd.service(5), systemd.exec(5), systemd.kill(5) and
# systemd.resource-control(5) of systemd 252 have them. systemd only warns of a misspelt one, and runs without it.
DIRECTIVES = {
    "Unit": {"Description", "Wants", "After", "StartLimitIntervalSec", "StartLimitBurst"},
    "Install": {"WantedBy"},
    "Service": {
        *("Type", "Environment", "ExecStart", "ExecReload", "TimeoutStartSec", "TimeoutStopSec", "WatchdogSec"),
        *("Restart", "RestartSec", "RestartPreventExitStatus", "DynamicUser", "StateDirectory", "StateDirectoryMode"),
        *("UMask", "ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices", "PrivateUsers", "NoNewPrivileges"),
        *("CapabilityBoundingSet", "AmbientCapabilities", "ProtectClock", "ProtectControlGroups", "ProtectHostname"),
        *("ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables", "ProtectProc", "RemoveIPC"),
        *("RestrictAddressFamilies", "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID", "LockPersonality"),
        *("MemoryDenyWriteExecute", "SystemCallArchitectures", "SystemCallFilter", "SystemCallErrorNumber"),
        "LimitNOFILE",
    },
}
HARDENED = {
    "DynamicUser": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "NoNewPrivileges": "yes",
    "MemoryDenyWriteExecute": "yes",
    "CapabilityBoundingSet": "",
    "PrivateDevices": "yes",
    "RestrictNamespaces": "yes",
}


def parse_unit(text: str) -> dict[str, list[tuple[str, str]]]:
    """The settings of each section, in their order. Raises `ValueError` for a line that is none of a unit file's."""
    sections: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line[0] in "#;":
            continue
        if match := re.fullmatch(r"\[([A-Za-z]+)\]", line):
            current = sections.setdefault(match[1], [])
        elif (match := re.fullmatch(r"([A-Za-z]+)=(.*)", line)) and current is not None:
            current.append((match[1], match[2]))
        else:
            raise ValueError(f"line {number} is neither [Section] nor Name=value: {line!r}")
    return sections


def service(unit: str) -> dict[str, str]:
    """The last value of each directive of [Service]."""
    return dict(parse_unit((DEPLOY / unit).read_text())["Service"])


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_has_known_sections_and_directives_only(unit: str) -> None:
    sections = parse_unit((DEPLOY / unit).read_text())
    assert sections.keys() == DIRECTIVES.keys()
    for section, settings in sections.items():
        assert {name for name, _ in settings} <= DIRECTIVES[section]


@pytest.mark.parametrize("text", ["Type=notify", "[Service]\nType", "[Service\nType=notify", "[Service]\n Type=notify"])
def test_a_line_that_is_no_units_is_found_out(text: str) -> None:
    with pytest.raises(ValueError, match="line"):
        parse_unit(text)


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_finds_nothing_wrong_with_a_unit(unit: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze on this machine")
    copy = tmp_path / unit
    copy.write_text((DEPLOY / unit).read_text().replace(INSTALLED, str(SCRIPT)))  # what it starts has to be there
    verify = ["systemd-analyze", "verify", "--man=no", copy]
    done = subprocess.run(verify, capture_output=True, text=True, timeout=60, check=False)
    about_ours = [line for line in done.stderr.splitlines() if unit in line]
    assert (done.returncode, about_ours) == (0, [])


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_hardened_and_has_the_notify_protocol(unit: str) -> None:
    settings = service(unit)
    assert HARDENED.items() <= settings.items()
    assert (settings["Type"], settings["Restart"]) == ("notify", "on-failure")
    assert settings["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert float(settings["WatchdogSec"]) >= 10
    assert float(settings["TimeoutStopSec"]) > 2 * 3, "it withdraws its records for 3 s"
    assert {"AF_INET", "AF_INET6", "AF_UNIX"} <= set(settings["RestrictAddressFamilies"].split())
    assert settings["RestartPreventExitStatus"] == "2", "the exit code of a wrong configuration"


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_starts_a_command_of_ours_with_variables_of_ours(unit: str) -> None:
    program, command = service(unit)["ExecStart"].split()
    assert (program, command in COMMANDS) == (INSTALLED, True)
    text = subprocess.run([SCRIPT, command, "--help"], capture_output=True, text=True, check=True).stdout
    environment = [value for name, value in parse_unit((DEPLOY / unit).read_text())["Service"] if name == "Environment"]
    assert len(environment) == 2
    for variable in environment:
        assert variable.split("=")[0] in text
    state = next(value for value in environment if value.startswith("PLASM_DHT_STATE_DIR="))
    assert state == f"PLASM_DHT_STATE_DIR=%S/{service(unit)['StateDirectory']}"


def test_the_example_of_a_file_is_one() -> None:
    settings = load(DEPLOY / "plasm.toml")
    assert settings.artifacts_dir == Path("/srv/boot")
    assert settings.dht.record_ttl == 3600


# prctl(2): PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, of Linux 6.3: what MemoryDenyWriteExecute= does, without systemd
DENY = "import ctypes, sys; sys.exit(ctypes.CDLL(None).prctl(65, 1, 0, 0, 0))"


def test_it_runs_where_no_memory_can_be_made_executable(tmp_path: Path) -> None:
    if subprocess.run([sys.executable, "-c", DENY], check=False).returncode:
        pytest.skip("this kernel cannot deny it to a process (Linux 6.3 can)")

    def deny() -> None:
        ctypes.CDLL(None).prctl(65, 1, 0, 0, 0)

    artifacts = ("--artifacts", ROOT / "docs/examples/artifacts", "--http-host", "127.0.0.1", "--http-port", "0")
    with subprocess.Popen(
        [SCRIPT, "serve", *artifacts, "--host", "127.0.0.1", "--port", "0", "--bootstrap", "127.0.0.1:9"],
        preexec_fn=deny, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        process.terminate()
        _, stderr = process.communicate(timeout=30)
    assert line.startswith("ready "), stderr
    assert process.returncode == 0, stderr


# --- the container --------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Containerfile and their arguments, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "Containerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def arguments(name: str) -> list[str]:
    return [argument for instruction, argument in instructions() if instruction == name]


def test_everything_that_is_copied_is_there_and_all_that_a_build_needs_is() -> None:
    copied = {
        source
        for argument in arguments("COPY")
        if not argument.startswith("--from=")
        for source in argument.split()[:-1]
    }
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.search(r"^packages = (\[.*\])", project, re.MULTILINE)
    assert packages is not None
    needed = {Path(package).parts[0] for package in json.loads(packages[1])}
    needed |= {"pyproject.toml", "constraints.txt", *re.findall(r'^readme = "(.*)"', project, re.MULTILINE)}
    needed |= set(json.loads(re.findall(r"^license-files = (.*)", project, re.MULTILINE)[0]))
    assert needed == copied


def test_the_container_runs_our_command_as_nobody_special() -> None:
    assert arguments("ENTRYPOINT") == ['["plasm-dht"]']
    (command,) = arguments("CMD")
    assert json.loads(command)[0] in COMMANDS
    assert arguments("USER") == ["10001"]
    assert arguments("STOPSIGNAL") == ["SIGTERM"]
    assert set(arguments("EXPOSE")[0].split()) == {"8468/udp", "8080/tcp"}
    assert {image.split()[0] for image in arguments("FROM")} == {"python:3.11-slim"}


def test_the_containers_health_check_is_a_program_that_runs() -> None:
    (check,) = arguments("HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    done = subprocess.run(
        [sys.executable, *command[1:]],
        env=os.environ | {"PLASM_DHT_HTTP_PORT": "9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (command[0], done.returncode) == ("python", 1)
    assert "Connection refused" in done.stderr, "it asked, and nobody serves port 9"
