"""The documentation has everything that the code offers, and what it points to is there. Nothing is built for that."""

import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

import plasm_dht
from docs import reference
from plasm_dht import config
from plasm_dht.provider import gateway, web
from plasm_dht.provider import page as page_for_people
from plasm_dht.provider.journal import Journal
from plasm_dht.provider.site import Site
from plasm_dht.values import CHECKS, toml
from plasm_dht_cli import exits, options

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
COMMANDS = reference.commands()
DIRECTIVE = re.compile(r"^```\{command\} ([a-z ]+)\n(?::like: ([a-z ]+)\n)?```$", re.MULTILINE)

# --- what the code offers -------------------------------------------------------------------------------------------


def test_every_command_is_on_its_page_and_no_other() -> None:
    assert [name for name, _ in DIRECTIVE.findall((DOCS / "commands.md").read_text())] == list(COMMANDS)


@pytest.mark.parametrize(("name", "like"), DIRECTIVE.findall((DOCS / "commands.md").read_text()))
def test_every_option_that_help_has_is_documented_with_its_variable(name: str, like: str) -> None:
    command = COMMANDS[name]
    offered = flags_of(command) - (flags_of(COMMANDS[like]) if like else set())
    entries = dict(
        re.findall(r"^````\{option\} (.+)\n(.+)\n````$", reference.command(name, like or None), re.MULTILINE)
    )
    documented = {word: text for heading, text in entries.items() for word in re.findall(r"--?[a-z-]+", heading)}
    assert documented.keys() == offered
    for flag, text in documented.items():
        assert re.match(r"[A-Z].{9,}", text), f"{flag} has no help"
        assert "Variable: `PLASM_DHT_" in text


def flags_of(command: Any) -> set[str]:
    """The flags in its `--help`. None may be hidden there."""
    assert not [each.name for each in command.params if getattr(each, "hidden", False)]
    lines = re.findall(r"^  (-.+)$", command.get_help(command.context_class(command)), re.MULTILINE)
    return {flag for line in lines for flag in re.findall(r"--?[a-z][a-z-]*(?![\w.])", line.split("  ")[0])} - {
        "--help"
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_documented_with_an_example_and_its_exit_codes(name: str) -> None:
    text = reference.command(name)
    assert f"plasm-dht {name}" in text.partition("**Example")[2].partition("```text\n")[2].partition("```")[0]
    listed = text.partition("**Exit codes:**\n\n")[2].splitlines()
    assert listed[0].startswith("- `0`: ")
    assert all(re.match(r"- `\d+`: \w", line) for line in listed)


def test_a_command_that_lacks_an_option_of_the_one_it_is_like_is_found_out() -> None:
    with pytest.raises(ValueError, match="--artifacts"):
        reference.command("get", like="serve")


def test_every_setting_is_documented_with_what_is_allowed_and_its_flag() -> None:
    entries = re.split(r"^````\{confval\} ", reference.settings(), flags=re.MULTILINE)[1:]
    assert [entry.split("\n")[0] for entry in entries] == list(CHECKS)
    for entry in entries:
        assert re.search(
            r"\n:type: \w.+\n:default: \w.+\n\n[A-Z(].+\. Flag `--[a-z-]+`, variable `PLASM_DHT_[A-Z_]+`\.", entry
        )


def test_the_page_of_the_settings_shows_them_and_a_file_with_each() -> None:
    page = (DOCS / "configuration.md").read_text()
    assert "```{settings}\n```" in page
    assert "```{literalinclude} deploy/plasm.toml\n" in page
    table, keys = "", []
    for line in (DOCS / "deploy" / "plasm.toml").read_text().splitlines():
        if match := re.fullmatch(r"\[(.+)\]", line):
            table = match[1]
        elif match := re.match(r"(?:# )?([a-z_]+) = ", line):
            keys.append(f"{table}.{match[1]}")
    assert keys == list(CHECKS)


# These depend on the machine or on another setting: the help says it in words.
IN_WORDS = {
    "provider.name",
    "provider.artifacts_dir",
    "provider.base_url",
    "provider.dht.refresh_interval",
    "trust.publishers",
}


@pytest.mark.parametrize("key", [key for key in CHECKS if key not in IN_WORDS])
def test_the_default_that_help_says_is_the_default(key: str) -> None:
    argument = {value: argument for argument, value in options.SETTINGS.items()}[key]
    says = {
        reference.split_default(each.help)[1].split(",")[0]
        for name, command in COMMANDS.items()
        for each in reference.parameters(command, "option")
        if each.name == argument and (name, argument) not in OTHERWISE
    }
    assert says == {toml(config.flat(config.Settings())[key]).strip('[]"')}


# What a command does unless it is told: `publish` has an address and a port of its own, `node` serves no HTTP.
OTHERWISE = {("publish", "host"), ("publish", "port"), ("node", "http_port")}


def test_every_path_is_on_the_page_of_http_and_no_other_and_is_only_read() -> None:
    app, nothing = web.create_app(Site()), cast(Any, None)
    gateway.add_to(app, gateway.Gateway(nothing, nothing))
    page_for_people.add_to(app, nothing, Journal(lambda: 0))
    names = {"{channel}": "CHANNEL", "{arch}": "ARCH", "{filename}": "FILE"}
    offered = set()
    for route in app.router.routes():
        assert route.method in ("GET", "HEAD")
        assert route.resource is not None
        offered.add(re.sub(r"{\w+}", lambda name: names[name[0]], route.resource.canonical))
    first_column = re.findall(r"^\| (`/.*?`) \| ", (DOCS / "http.md").read_text(), re.MULTILINE)
    documented = {path for cell in first_column for path in cell.replace("`", "").split(", ")}
    assert documented - {"/CHANNEL/ARCH/boot.ipxe"} == offered, "that one is made where there is no such FILE"


def test_every_exit_code_is_documented_and_no_other() -> None:
    table = (DOCS / "commands.md").read_text().partition("| exit code |")[2].partition("\n\n")[0]
    codes = {value for value in vars(exits).values() if isinstance(value, int)}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == codes


def test_every_name_for_embedders_is_on_the_page_of_names() -> None:
    page = (DOCS / "python.md").read_text()
    in_errors = [name for name, value in vars(plasm_dht.errors).items() if inspect.isclass(value)]
    for name in plasm_dht.__all__:
        assert name in in_errors or f".. autoclass:: plasm_dht.{name}\n" in page, name
    assert ".. automodule:: plasm_dht.errors\n   :members:" in page


# --- what pages point to --------------------------------------------------------------------------------------------

LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_page_a_file_or_a_heading_leads_there(page: Path) -> None:
    for path, heading in LINK.findall(without_code(page.read_text())):
        target = page.parent / path if path else page
        assert target.exists(), f"{path} is not there"
        assert not heading or heading in headings(target), f"{path or page.name} has no heading #{heading}"


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)


def headings(page: Path) -> set[str]:
    """The anchors of a page, as forges and the site make them."""
    lines = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_every_page_is_in_the_contents_of_the_site() -> None:
    index = (DOCS / "index.md").read_text()
    listed = {
        f"{line}.md"
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", index, re.M | re.S)
        for line in block.split("\n")
    }
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert {page for page in pages - listed if not re.match(r"decisions/\d", page)} == {"index.md"}


# --- what pages show ------------------------------------------------------------------------------------------------


def shown_commands() -> Iterator[str]:
    """What follows `plasm-dht` in each line of a block for a shell."""
    for page in PAGES:
        for block in re.findall(r"^ *```(?:console|sh)\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in re.sub(r"\\\n(?:> )?", " ", block).splitlines():
                inner = r"\$\(plasm-dht ([^)]*)\)"
                yield from re.findall(inner, line)
                yield from re.findall(r"(?:^ *(?:\$ )?|bin/)plasm-dht ([a-z][^#&]*)", re.sub(inner, "it", line))


@pytest.mark.parametrize("typed", sorted(set(shown_commands())))
def test_a_command_that_a_page_shows_is_one(typed: str) -> None:
    words = shlex.split(typed)
    name = next(name for name in COMMANDS if words[: len(name.split())] == name.split())
    COMMANDS[name].make_context(name, words[len(name.split()) :])  # raises for an option that is not there


def shown_python() -> Iterator[str]:
    for page in PAGES:
        yield from re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", sorted(set(shown_python())))
def test_python_that_a_page_shows_is_python_and_imports_what_is_there(text: str) -> None:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("plasm_dht"):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names)
