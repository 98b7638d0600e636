"""What the commands and settings say about themselves, as Markdown for the site. Nothing is written down here twice.

The texts are those of `--help`, of the docstrings in `plasm_dht.config`, and of the refusals of a wrong value.
"""

import ast
import importlib
import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import typer

from plasm_dht import config
from plasm_dht.errors import ConfigError
from plasm_dht.values import CHECKS, Given
from plasm_dht_cli import options

# What in a text for a terminal is code on a page.
_CODE = re.compile(r"(?<![\w`-])(-{1,2}[a-z][a-z-]*|PLASM_DHT_[A-Z_]+|[\w.-]+\.(?:json|pem|part))(?![\w`])")
_TABLES = {"provider": "Settings", "provider.dht": "DhtSettings", "trust": "TrustSettings"}


def commands() -> dict[str, Any]:
    """Each command that runs something, by its words after `plasm-dht`, in the order of `--help`."""
    main = importlib.import_module("plasm_dht_cli.main")
    return dict(_leaves((), typer.main.get_command(main._application([]))))


def _leaves(words: tuple[str, ...], command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield " ".join(words), command
        return
    for name, each in inner.items():
        yield from _leaves((*words, name), each)


def parameters(command: Any, kind: str) -> list[Any]:
    """Its parameters of this kind, `option` or `argument`, as `--help` shows them."""
    return [each for each in command.params if each.param_type_name == kind and each.name != "help"]


# --- commands -------------------------------------------------------------------------------------------------------


def command(name: str, like: str | None = None) -> str:
    """The reference of one command. Of the options that the command `like` has too it only says that they are."""
    known = commands()
    one = known[name]
    inherited = {_flags(each) for each in parameters(known[like], "option")} if like else set()
    if missing := inherited - {_flags(each) for each in parameters(one, "option")}:
        raise ValueError(f"{name} does not have every option of {like}: {sorted(missing)}")
    own = [each for each in parameters(one, "option") if _flags(each) not in inherited]
    arguments = parameters(one, "argument")
    usage = " ".join(["plasm-dht", name, "[OPTIONS]", *(each.metavar for each in arguments)])
    parts = [f"```text\n{usage}\n```", *map(_marked, _paragraphs(one.help))]
    if arguments:
        parts.append("\n".join(f"- `{each.metavar}`: {_marked(each.help)}" for each in arguments))
    parts.append(f"```{{program}} plasm-dht {name}\n```")
    parts += map(_option, own)
    if like:
        parts.append(f"And every option of [`plasm-dht {like}`](#{like}).")
    parts += _epilog(one.epilog)
    return "\n\n".join(parts) + "\n"


def _flags(option: Any) -> tuple[str, ...]:
    return tuple(sorted(option.opts, key=len))


def _option(option: Any) -> str:
    value = f" {option.metavar}" if option.metavar else ""
    meaning, default = split_default(option.help)
    facts = [f"Default: {_marked(default)}."] if default else []
    facts.append(f"Variable: `{option.envvar}`.")
    heading = ", ".join(flag + value for flag in _flags(option))
    return f"````{{option}} {heading}\n{_marked(meaning)} {' '.join(facts)}\n````"


def split_default(text: str) -> tuple[str, str]:
    """The help of an option without its last sentence `Default: …`, and what that says."""
    meaning, _, default = " ".join(text.split()).partition("Default: ")
    return meaning.strip(), default.removesuffix(".")


def _epilog(text: str) -> Iterator[str]:
    """The examples as a block; of every other paragraph, `Name: text`, its name in bold."""
    examples, _, rest = text.partition("Exit codes:")
    head, _, block = examples.replace("\b", "").partition(":\n")
    lines = block.splitlines()
    inside = [line[2:] for line in lines if line.startswith("  ")]
    yield f"**{head.strip()}:**\n\n```text\n" + "\n".join(inside) + "\n```"
    others = " ".join(line for line in lines if not line.startswith("  "))
    if others:
        name, _, said = others.partition(": ")
        yield f"**{name}:** {_marked(said)}"
    yield "**Exit codes:**\n\n" + "\n".join(map(_exit_code, re.split(r";\s+(?=\d)", rest.strip().rstrip("."))))


def _exit_code(text: str) -> str:
    code, _, meaning = " ".join(text.split()).partition(" ")
    return f"- `{code}`: {_marked(meaning)}"


def _paragraphs(text: str) -> list[str]:
    return [" ".join(each.split()) for each in text.split("\n\n")]


def _marked(text: str) -> str:
    """Text for a terminal as Markdown: nothing in it is syntax, and flags, variables and files are code."""
    escaped = re.sub(r"([\\*_<>\[\]|])", r"\\\1", text)
    return _CODE.sub(lambda match: f"`{match[1]}`", escaped.replace("\\_", "_"))


# --- settings -------------------------------------------------------------------------------------------------------


def settings() -> str:
    """The reference of every key of the configuration file."""
    flags = {key: "--" + argument.replace("_", "-") for argument, key in options.SETTINGS.items()}
    offered = {flag: each for flag in flags.values() if (each := _offered(flag)) is not None}
    parts = []
    for key in CHECKS:
        flag = flags[key]
        _, default = split_default(offered[flag].help)
        facts = f"Flag `{flag}`, variable `{options.variable(flag)}`."
        if key in config.CHANGEABLE:
            facts += " Changes while it runs."
        parts.append(
            f"````{{confval}} {key}\n:type: {_marked(allowed(key))}\n:default: {_marked(default or 'none')}\n\n"
            f"{meaning(key)} {facts}\n````"
        )
    return "\n\n".join(parts) + "\n"


def _offered(flag: str) -> Any:
    """The option of `serve` that has this flag."""
    return next((each for each in parameters(commands()["serve"], "option") if flag in each.opts), None)


def allowed(key: str) -> str:
    """What may be written, in the words of the refusal of a value that is no such thing."""
    for wrong in ("", ("",)):
        try:
            CHECKS[key](Given(key, wrong, "", is_text=True))
        except ConfigError as error:
            text = str(error).rpartition(": must be ")[2]
            if text != "a list of strings":
                return text
    raise ValueError(f"{key} takes anything")


def meaning(key: str) -> str:
    """What the docstring of the setting says, from a capital to a full stop."""
    table, _, name = key.rpartition(".")
    text = _docstrings(_TABLES[table])[name].removeprefix(f"`{key}`: ")
    sentences = [each for each in re.split(r"(?<=\.) ", " ".join(text.split())) if not each.startswith("None:")]
    text = " ".join(sentences)
    return text[0].upper() + text[1:]


def _docstrings(class_name: str) -> dict[str, str]:
    """The docstrings of the fields of a class of `plasm_dht.config`: the string after each."""
    tree = ast.parse(inspect.getsource(getattr(config, class_name)))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    return {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
