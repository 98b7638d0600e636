"""What a log says when one thing goes wrong again and again: deterministic, with a clock that is set by hand."""

import io
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from plasm_dht_cli import log_limit, logs
from plasm_dht_cli.log_limit import KEPT, LATE, PER, LimitedHandler
from plasm_dht_cli.logs import JsonFormatter, TextFormatter


class Log:
    """A handler on a text stream, the time, and what it wants to have done later."""

    def __init__(self, formatter: logging.Formatter | None = None) -> None:
        self.now = 1000.0
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.stream = io.StringIO()
        self.handler = LimitedHandler(self.stream, monotonic=lambda: self.now, later=self._later)
        self.handler.setFormatter(formatter or logging.Formatter("%(levelname)s %(message)s"))

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        self.timers.append((self.now + seconds, act))

    def say(self, message: str, *arguments: object, level: int = logging.WARNING, logger: str = "plasm_dht") -> None:
        self.handler.handle(logging.LogRecord(logger, level, __file__, 1, message, arguments, None))

    def wait(self, seconds: float) -> None:
        """Time passes, and what is due is done at its time."""
        until = self.now + seconds
        for at, act in sorted(self.timers, key=lambda timer: timer[0]):
            if at <= until:
                self.timers.remove((at, act))
                self.now = at
                act()
        self.now = until

    def lines(self) -> list[str]:
        """What was said since the last look."""
        text = self.stream.getvalue()
        self.stream.seek(0)
        self.stream.truncate()
        return text.splitlines()


def summary(held: int, last: str) -> str:
    return f"… and {held} more like this in the last minute, the last of them: {last}"


def test_the_first_lines_of_a_kind_are_said_and_the_others_are_counted_once_the_minute_is_over() -> None:
    assert (KEPT, PER) == (10, 60.0)  # what docs/operations.md says
    log = Log()
    for number in range(KEPT + 37):
        log.say("%r was not refreshed", f"n{number}")
    assert log.lines() == [f"WARNING 'n{number}' was not refreshed" for number in range(KEPT)]
    log.wait(PER - 1)
    assert log.lines() == []
    log.wait(1 + LATE)
    assert log.lines() == ["WARNING " + summary(37, f"'n{KEPT + 36}' was not refreshed")]
    log.wait(10 * PER)
    assert log.lines() == []


def test_the_next_minute_begins_anew() -> None:
    log = Log()
    for minute in range(3):
        for _ in range(KEPT + 1):
            log.say("no bootstrap node answered (%s)", minute)
        assert log.lines() == [f"WARNING no bootstrap node answered ({minute})"] * KEPT
        log.wait(PER + LATE)
        assert log.lines() == ["WARNING " + summary(1, f"no bootstrap node answered ({minute})")]


def test_what_is_rare_is_never_held_back() -> None:
    log = Log()
    for number in range(100):
        log.say("retry %d", number)
        log.wait(PER / KEPT)
    assert len(log.lines()) == 100
    assert log.timers == []


def test_kinds_are_told_apart_by_logger_level_and_format() -> None:
    log = Log()
    for _ in range(KEPT + 1):
        log.say("a %s", 1)
    log.lines()
    log.say("a %s", 1, logger="plasm_dht.other")
    log.say("a %s", 1, level=logging.INFO)
    log.say("b %s", 1)
    assert log.lines() == ["WARNING a 1", "INFO a 1", "WARNING b 1"]


@pytest.mark.parametrize("level", [logging.ERROR, logging.CRITICAL])
def test_no_error_is_held_back(level: int) -> None:
    log = Log()
    for _ in range(10 * KEPT):
        log.say("the state file cannot be written (%s)", "full", level=level)
    assert len(log.lines()) == 10 * KEPT


def test_a_format_that_says_nothing_itself_hides_nothing() -> None:
    log = Log()
    for number in range(KEPT + 5):
        log.say("%s: %s", f"stable/arm{number}", "is a link")
    assert len(log.lines()) == KEPT + 5
    for _ in range(KEPT + 5):
        log.say("%s: %s", "stable/arm0", "is a link")
    assert len(log.lines()) == KEPT - 1


def test_endless_new_kinds_take_no_endless_memory() -> None:
    log = Log()
    for number in range(5000):
        log.say("%s", number)
    assert len(log.handler._windows) <= 1001
    log.wait(PER + LATE)
    log.say("the end of it")
    assert len(log.handler._windows) == 1


def test_a_later_line_brings_the_summary_even_if_the_timer_does_not() -> None:
    log = Log()
    for _ in range(KEPT + 2):
        log.say("again")
    log.now += PER
    log.lines()
    log.say("something else", level=logging.INFO)
    assert log.lines() == ["WARNING " + summary(2, "again"), "INFO something else"]


def test_what_is_held_back_at_the_end_is_said() -> None:
    log = Log()
    for _ in range(KEPT + 2):
        log.say("again")
    log.lines()
    log.handler.close()
    assert log.lines() == ["WARNING " + summary(2, "again")]


def test_as_json_the_summary_is_an_entry_as_any_other() -> None:
    log = Log(JsonFormatter())
    for number in range(KEPT + 2):
        log.say("%r\n was not refreshed", number)
    log.wait(PER + LATE)
    entries = [json.loads(line) for line in log.lines()]
    assert len(entries) == KEPT + 1
    assert entries[-1].keys() == entries[0].keys()
    assert entries[-1]["logger"] == "plasm_dht"
    assert entries[-1]["message"] == summary(2, f"{KEPT + 1}\n was not refreshed")


def test_as_text_the_summary_is_one_line_whatever_it_repeats() -> None:
    log = Log(TextFormatter())
    for _ in range(KEPT + 1):
        log.say("a %s", "forged\n2026-01-31T12:00:00.000Z INFO line")
    log.wait(PER + LATE)
    assert len(log.lines()) == KEPT + 1


def test_the_minute_ends_by_itself_when_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_limit, "PER", 0.1)
    handler = LimitedHandler(stream := io.StringIO())
    for _ in range(KEPT + 3):
        handler.handle(logging.LogRecord("plasm_dht", logging.WARNING, __file__, 1, "again", (), None))
    end = time.monotonic() + 10
    while "more like this" not in stream.getvalue() and time.monotonic() < end:
        time.sleep(0.01)
    assert stream.getvalue().splitlines() == ["again"] * KEPT + [summary(3, "again")]


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """What a command sets up, put back after."""
    root = logging.getLogger()
    before, level, raises, hook = root.handlers[:], root.level, logging.raiseExceptions, sys.excepthook
    root.handlers[:] = []
    levels = {name: logging.getLogger(name).level for name in ("plasm_dht", "plasm_dht_cli", "kademlia", "rpcudp")}
    yield root
    root.handlers[:] = before
    root.setLevel(level)
    logging.raiseExceptions, sys.excepthook = raises, hook
    for name, each in levels.items():
        logging.getLogger(name).setLevel(each)


@pytest.mark.parametrize(
    ("usual", "verbose", "limited"),
    [(logging.INFO, 0, True), (logging.INFO, 1, False), (logging.WARNING, 0, False)],
)
def test_a_service_is_limited_and_neither_one_with_v_nor_a_command_that_ends(
    root_logger: logging.Logger, usual: int, verbose: int, limited: bool
) -> None:
    logs.set_up(log_format=None, verbose=verbose, quiet=False, usual=usual)
    (handler,) = root_logger.handlers
    assert isinstance(handler, LimitedHandler) == limited
