"""What whoever installs the package gets: built as `pip wheel` builds it, without a network."""

import tarfile
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]
PACKAGES = {"plasm_dht": ROOT / "plasm_dht", "plasm_dht_cli": ROOT / "cli" / "plasm_dht_cli"}


def files(folder: Path, pattern: str = "*") -> set[str]:
    """What is in it, by the path from there."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob(pattern) if path.is_file()}
    return {path for path in found if not path.endswith(".pyc")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    return zipfile.ZipFile(built)


def test_the_wheel_has_every_file_of_both_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {f"{name}/{path}" for name, folder in PACKAGES.items() for path in files(folder)}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected
    assert {"plasm_dht/py.typed", "plasm_dht/testing.py", "plasm_dht/provider/static/page.js"} <= expected


def test_the_wheel_has_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    (entries,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "plasm-dht = plasm_dht_cli.start:main" in wheel.read(entries).decode()
    assert [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]


def test_the_source_archive_has_what_makes_and_tests_it(tmp_path: Path) -> None:
    (built,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(built) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"Makefile", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "pyproject.toml", "PKG-INFO"}
    for folder, pattern in (("plasm_dht", "*"), ("cli", "*"), ("tests", "*.py"), ("docs", "*.md")):
        wanted |= {f"{folder}/{path}" for path in files(ROOT / folder, pattern)}
    assert wanted <= held
