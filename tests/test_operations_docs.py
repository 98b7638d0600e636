"""What docs/operations.md, the alerts and the dashboard say about metrics is what a node exposes, and all of it."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from plasm_dht.provider.metrics import Exposition
from plasm_dht.provider.site import Traffic
from tests.dht.support import IDENTITIES, server

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "operations.md"
ALERTS = DOCS / "operations" / "alerts.yml"
DASHBOARD = DOCS / "operations" / "grafana-dashboard.json"

# By the name as queries have it: the type, and by label the values; `None` where a value can be anything.
Metrics = dict[str, tuple[str, dict[str, set[str] | None]]]

# Labels whose values are those of one build, of the scraper, or of buckets.
ANY = {"version", "python", "le"}
SCRAPERS = {"job", "instance"}
# What PromQL has between metrics, and the metric that the scraper makes.
KEYWORDS = {"and", "or", "unless", "bool", "offset", "on", "ignoring", "group_left", "group_right", "by", "without"}
UP = "up"


@pytest.fixture
async def exposed() -> Metrics:
    """What a node exposes that advertises something."""
    async with server(identity=IDENTITIES[0]) as node:
        await node.publish("name", "value")
        _, body = Exposition(node, Traffic()).render("")
    return parse(body.decode())


def parse(text: str) -> Metrics:
    found: Metrics = {}
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels: dict[str, set[str] | None] = {}
        for sample in family.samples:
            for label, value in sample.labels.items():
                if label in ANY:
                    labels[label] = None
                else:
                    labels.setdefault(label, set()).add(value)  # type: ignore[union-attr]
        labels.pop("le", None)
        found[name] = (family.type, labels)
    return found


def documented(page: str) -> Metrics:
    """The rows of the tables whose first column is a metric; of label values what stands after a colon."""
    found: Metrics = {}
    for row in re.findall(r"^\| `((?:plasm_dht|process)_\w+)` \| (\w+) \|([^|]*)\|[^|]+\|[^|]*\|$", page, re.MULTILINE):
        name, kind, column = row
        labels: dict[str, set[str] | None] = {}
        for part in filter(None, column.split(";")):
            names, colon, values = part.partition(":")
            for label in re.findall(r"`(\w+)`", names):
                labels[label] = set(re.findall(r"`(\w+)`", values)) if colon else None
        assert name not in found, f"{name} is there twice"
        found[name] = (kind, labels)
    return found


async def test_every_metric_is_documented_as_it_is_and_no_other(exposed: Metrics) -> None:
    page = documented(PAGE.read_text())
    assert page.keys() == exposed.keys()
    for name, metric in exposed.items():
        assert page[name] == metric, name


# -- expressions -----------------------------------------------------------------------------------------------------

_SELECTOR = re.compile(r"([a-zA-Z_]\w*)?\{([^}]*)\}")
_MATCHER = re.compile(r'\s*(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"\s*(?:,|$)')


def problems(expression: str, exposed: Metrics) -> Iterator[str]:
    """What in an expression names a metric, a label or a label's value that nobody exposes."""
    known = dict(exposed) | {UP: ("gauge", {})}
    for name, (kind, labels) in exposed.items():
        if kind == "histogram":
            known |= {f"{name}{suffix}": (kind, labels) for suffix in ("_bucket", "_count", "_sum")}
            del known[name]
    used: set[str] = set()
    grouped: set[str] = set()
    for name, inside in _SELECTOR.findall(expression):
        matchers = _MATCHER.findall(inside)
        if not name or _MATCHER.sub("", inside).strip():
            yield f"{{{inside}}} is no selector of one metric"
        for label, _, value in matchers:
            values = known.get(name, ("", {}))[1].get(label, set())
            if label not in SCRAPERS and values is not None:
                yield from (f"{name}: {label} is never {each!r}" for each in value.split("|") if each not in values)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", expression)
    for clause in re.findall(r"\b(?:by|without)\s*\(([^)]*)\)", text):
        grouped |= {label.strip() for label in clause.split(",")}
    text = re.sub(r"\b(?:by|without)\s*\([^)]*\)", " ", text)
    for name, call in re.findall(r"\b([a-zA-Z_:][\w:]*)(\s*\()?", text):
        if not call and name not in KEYWORDS:
            used.add(name)
    yield from (f"{name} is not exposed" for name in sorted(used - known.keys()))
    if not used:
        yield "there is no metric in it"
    labels = {label for name in used & known.keys() for label in known[name][1]} | SCRAPERS | {"le"}
    yield from (f"nothing has the label {label}" for label in sorted(grouped - labels))


SAMPLE: Metrics = {
    "plasm_dht_a_total": ("counter", {"result": {"done", "failed"}, "version": None}),
    "plasm_dht_h_seconds": ("histogram", {"kind": {"name"}}),
}


@pytest.mark.parametrize(
    "expression",
    [
        'sum by (instance) (rate(plasm_dht_a_total{result!~"done|failed",job="x"}[5m])) / 2 > 0.5',
        'histogram_quantile(0.9, sum by (le) (rate(plasm_dht_h_seconds_bucket{kind="name"}[$__rate_interval])))',
        'abs(plasm_dht_a_total{version=~"1.*"}) > 0 and up == 1',
    ],
)
def test_a_right_expression_has_no_problem(expression: str) -> None:
    assert list(problems(expression, SAMPLE)) == []


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("rate(plasm_dht_b_total[5m])", "plasm_dht_b_total is not exposed"),
        ("plasm_dht_a", "plasm_dht_a is not exposed"),
        ("plasm_dht_h_seconds", "plasm_dht_h_seconds is not exposed"),
        ('plasm_dht_a_total{result="ok"}', "result is never 'ok'"),
        ('plasm_dht_a_total{resul="done"}', "resul is never 'done'"),
        ("sum by (reason) (plasm_dht_a_total)", "nothing has the label reason"),
        ("plasm_dht_a_total{result=done}", "is no selector"),
        ("1 > 0", "there is no metric in it"),
    ],
)
def test_a_wrong_expression_has_one(expression: str, problem: str) -> None:
    assert [each for each in problems(expression, SAMPLE) if problem in each]


# -- the files -------------------------------------------------------------------------------------------------------


def rules() -> list[dict[str, Any]]:
    loaded = yaml.safe_load(ALERTS.read_text())
    assert list(loaded) == ["groups"]
    assert all(set(group) == {"name", "rules"} for group in loaded["groups"])
    return [rule for group in loaded["groups"] for rule in group["rules"]]


async def test_every_alert_is_a_rule_over_metrics_that_are_there(exposed: Metrics) -> None:
    found = rules()
    assert len({rule["alert"] for rule in found}) == len(found) > 0
    for rule in found:
        assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}, rule
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s")), rule
        assert rule["labels"]["severity"] in ("critical", "warning", "info"), rule
        assert {"summary", "description"} == set(rule["annotations"]), rule
        assert list(problems(rule["expr"], exposed)) == [], rule["alert"]


def test_every_alert_is_documented_and_no_other() -> None:
    assert re.findall(r"^\| `(Plasm\w+)` \|", PAGE.read_text(), re.MULTILINE) == [rule["alert"] for rule in rules()]


def test_prometheus_itself_takes_the_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    done = subprocess.run([promtool, "check", "rules", ALERTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


async def test_the_dashboard_can_be_imported_and_shows_metrics_that_are_there(exposed: Metrics) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["id"] is None  # else an import would replace a dashboard of somebody else
    assert dashboard["uid"]
    assert dashboard["title"]
    assert dashboard["schemaVersion"] >= 36
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken, f"{panel['title']} lies over another panel"
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert list(problems(target["expr"], exposed)) == [], (panel["title"], target["expr"])
            asked = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert asked <= variables, panel["title"]
            known = {label for _, labels in exposed.values() for label in labels} | SCRAPERS
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known, panel["title"]


async def test_every_metric_is_used_by_the_dashboard(exposed: Metrics) -> None:
    expressions = " ".join(
        target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel.get("targets", ())
    )
    not_shown = {name for name in exposed if not re.search(rf"\b{name}(_bucket|_count)?\b", expressions)}
    assert not_shown == {
        "plasm_dht_record_ttl_seconds",
        "plasm_dht_refresh_interval_seconds",
        "process_start_time_seconds",
        "process_virtual_memory_bytes",
    }
