"""How Sphinx builds the site from these pages: `make docs`. What is made from the code is in `reference.py`."""

import re
import sys
from abc import ABC, abstractmethod
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parent))
import reference

project = "plasm-dht"
release = version = installed("plasm-dht")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "examples"]
templates_path: list[str] = []
pygments_style, pygments_dark_style = "tango", "monokai"

# Links between pages are those of a forge: page.md#heading.
myst_heading_anchors = 3
myst_enable_extensions = ["substitution"]

html_theme = "furo"
html_title = f"plasm-dht {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = html_show_sourcelink = html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
default_role = "code"  # the docstrings' `name` is code
# The base library, the standard library and msgspec have no pages here to link to.
nitpick_ignore_regex = [("py:.*", r"(?!plasm_dht).*")]

# What a page loads: it has to be of the site. A link that a reader may follow is not loaded.
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc="(https?:)?//|<link[^>]*\shref="(https?:)?//|url\(["']?(https?:)?//|@import"""
)
_kept: dict[str, list[str]] = {}
_log = logging.getLogger(__name__)


class _Generated(SphinxDirective, ABC):
    """Markdown that `reference.py` makes."""

    @abstractmethod
    def markdown(self) -> str:
        """The text."""

    def run(self) -> list[nodes.Node]:
        for module in ("plasm_dht", "plasm_dht_cli"):
            for path in (Path(sys.modules[module].__file__ or "").parent).rglob("*.py"):
                self.env.note_dependency(str(path))
        return self.parse_text_to_nodes(self.markdown())


class CommandReference(_Generated):
    """`{command} serve`: usage, options, examples and exit codes of a command."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar[dict[str, Any]] = {"like": directives.unchanged}

    def markdown(self) -> str:
        """As `reference.command` has it."""
        return reference.command(self.arguments[0], self.options.get("like"))


class SettingsReference(_Generated):
    """`{settings}`: every key of the configuration file."""

    def markdown(self) -> str:
        """As `reference.settings` has it."""
        return reference.settings()


def foreign(text: str) -> bool:
    """Whether a page or style sheet loads something from another address."""
    return _LOADED.search(text) is not None


def _check_what_is_loaded(app: Sphinx, error: Exception | None) -> None:
    if error is None:
        for path in sorted(Path(app.outdir).rglob("*")):
            if path.suffix in (".html", ".css") and foreign(path.read_text()):
                _log.warning("%s loads something from another address", path.name)


def _keep(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    if what in ("attribute", "property"):
        _kept[name] = list(lines)


def _restore(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Napoleon takes what is before the first colon of an attribute's docstring for its type: there is none."""
    lines[:] = _kept.pop(name, lines)


def setup(app: Sphinx) -> None:
    """Sphinx calls it."""
    app.add_directive("command", CommandReference)
    app.add_directive("settings", SettingsReference)
    app.connect("autodoc-process-docstring", _keep, priority=100)  # napoleon has 500
    app.connect("autodoc-process-docstring", _restore, priority=900)
    app.connect("build-finished", _check_what_is_loaded)
