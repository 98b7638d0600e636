"""`/metrics`: what was done is what is counted, every series is there from the start, and nobody can add one."""

import asyncio
import logging
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

from plasm_dht.dht import protocol
from plasm_dht.dht.intent import Round
from plasm_dht.dht.server import PlasmServer
from plasm_dht.dht.stats import Durations, counted
from plasm_dht.provider import gateway
from plasm_dht.provider.artifacts import ArtifactSet
from plasm_dht.provider.metrics import Exposition
from plasm_dht.provider.site import Page, Site, Traffic
from plasm_dht.provider.web import create_app
from plasm_dht.record import shared_key
from tests.dht.support import HERE, IDENTITIES, NAME, HalfManualClock, RawNode, forged, raw_node, record, server, until

KEY = shared_key(NAME)
ZERO = bytes(20)

Samples = dict[str, float]


def scrape(node: PlasmServer, traffic: Traffic | None = None) -> Samples:
    """By the series as it is written, without the version of anything, its value."""
    _, body = Exposition(node, traffic or Traffic()).render("")
    found: Samples = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items() if "info" not in sample.name)
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def changes(before: Samples, after: Samples, prefix: str) -> Samples:
    """What is another value now, of the series that begin so."""
    return {
        name.removeprefix(prefix): value - before.get(name, 0)
        for name, value in after.items()
        if name.startswith(prefix) and value != before.get(name, 0)
    }


def refusing(reason: Any) -> dict[str, Any]:
    return {"ok": False, "reason": reason, "held": None, "now": None}


async def joined(node: PlasmServer, raw: RawNode) -> None:
    """Have the raw node in the table."""
    raw.answers |= {"find_node": lambda *_: [], "find_value": lambda *_: []}
    await node.bootstrap([raw.address])
    assert node.protocol.router.live_count == 1


async def test_a_record_that_is_kept_alive_shows_with_the_time_until_it_expires() -> None:
    async with server() as other, server([other], identity=IDENTITIES[0], record_ttl=600) as node:
        before = scrape(node)
        assert before["plasm_dht_advertised_records"] == 0
        assert "plasm_dht_next_expiry_seconds" not in before
        await node.publish(NAME, "value")
        await node.publish("short", "value", ttl=60)
        await node.set("once", "value")
        after = scrape(node)
    assert after["plasm_dht_advertised_records"] == 2
    assert after["plasm_dht_failing_records"] == 0
    assert 55 < after["plasm_dht_next_expiry_seconds"] <= 60
    assert after["plasm_dht_record_ttl_seconds"] == 600
    assert after["plasm_dht_refresh_interval_seconds"] == 400
    assert changes(before, after, "plasm_dht_refreshes_total") == {"{result=done}": 2}
    assert changes(before, after, "plasm_dht_stores_sent_total") == {"{result=accepted}": 6}  # three names, two keys
    assert after["plasm_dht_records_held"] == 6
    assert after["plasm_dht_held_bytes"] == node.storage.bytes > 0
    assert after["plasm_dht_records_limit"] == 100_000
    assert after["plasm_dht_held_bytes_limit"] == 64 * 2**20
    assert after["plasm_dht_clock_correction_seconds"] == 0


async def test_a_refresh_that_fails_shows_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with server(identity=IDENTITIES[0]) as node, raw_node() as raw:
        raw.answers["store"] = lambda *_: refusing("full")
        await joined(node, raw)
        before = scrape(node)
        await node.publish(NAME, "value")
        failed = scrape(node)
        assert changes(before, failed, "plasm_dht_refreshes_total") == {"{result=failed}": 1}
        assert changes(before, failed, "plasm_dht_stores_sent_total") == {"{result=full}": 2}
        assert (failed["plasm_dht_failing_records"], failed["plasm_dht_next_expiry_seconds"]) == (1, 0)
        assert failed["plasm_dht_owed_stores"] == 2
        (line,) = [each for each in caplog.messages if "was not refreshed" in each]
        said = "of 2 stores 0 acknowledged, 2 refused (full 2), 0 not answered"
        assert re.fullmatch(
            rf"{NAME!r} was not refreshed: too few holders acknowledged it \({re.escape(said)}\); "
            r"what is held expires in \d+ s; next try in 5\.0 s",
            line,
        )
        raw.answers["store"] = lambda *_: {"ok": True, "reason": None, "held": None, "now": None}
        assert node._publisher is not None
        await node._publisher.refresh(NAME)
        healed = scrape(node)
    assert changes(failed, healed, "plasm_dht_refreshes_total") == {"{result=done}": 1}
    assert healed["plasm_dht_failing_records"] == 0
    assert healed["plasm_dht_next_expiry_seconds"] > 3500
    assert f"{NAME!r} is refreshed again, after 1 failure" in caplog.messages


async def test_that_it_is_only_kept_here_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with server(identity=IDENTITIES[0]) as node:
        await node.publish(NAME, "value")
        assert node._publisher is not None
        for _ in range(3):
            await node._publisher.refresh(NAME)
    assert len([each for each in caplog.messages if "is only kept here" in each]) == 1


def test_what_holders_said_is_put_in_words() -> None:
    tally = Round(record(), asked=40, answered=32, refused=Counter({"clock": 3, "full": 1, "made_up": 1}))
    assert str(tally) == "of 40 stores 27 acknowledged, 5 refused (clock 3, full 1, other 1), 8 not answered"
    assert str(Round(record(), asked=1)) == "of 1 store 0 acknowledged, 0 refused, 1 not answered"
    assert str(Round(record())) == "nobody was asked, for no neighbour answers"
    assert [counted(number, "record") for number in (0, 1, 2)] == ["0 records", "1 record", "2 records"]


async def test_stores_of_others_are_counted_by_what_became_of_them() -> None:
    async with server() as node, raw_node() as raw:
        before = scrape(node)
        fresh = record(issued_at=node.clock.wall())
        for envelope in (fresh.envelope, fresh.envelope, b"junk", bytes(1001), forged(fresh)):
            await raw.ask(node.address, "store", ZERO, KEY, envelope)
        await raw.ask(node.address, "store", ZERO, ZERO, fresh.envelope)
        after = scrape(node)
        assert changes(before, after, "plasm_dht_stores_received_total") == {
            "{result=accepted}": 2,
            "{result=malformed}": 1,
            "{result=too_large}": 1,
            "{result=bad_signature}": 1,
            "{result=wrong_key}": 1,
        }
        assert changes(before, after, "plasm_dht_datagrams_dropped_total") == {}
        assert after["plasm_dht_records_held"] == 1


async def test_a_store_that_nobody_answers_and_a_reason_that_nobody_knows_are_counted() -> None:
    async with server() as node, raw_node() as raw:
        await joined(node, raw)
        (contact,) = node.protocol.router.live()
        before = scrape(node)
        silent = node.protocol.call_store(contact, KEY, b"x")
        for reason in ("made_up", None, "y" * 5000, 7):
            raw.answers["store"] = lambda *_, reason=reason: refusing(reason)
            await node.protocol.call_store(contact, KEY, b"x")
        raw.answers["store"] = lambda *_: "junk"
        await node.protocol.call_store(contact, KEY, b"x")
        raw.answers.pop("store")
        await silent
        assert changes(before, scrape(node), "plasm_dht_stores_sent_total") in (
            {"{result=other}": 5, "{result=no_answer}": 1},
            {"{result=other}": 6},  # its resend was answered
        )


async def test_every_datagram_is_counted_once_in_and_once_out() -> None:
    async with server() as node, raw_node() as raw:
        before = scrape(node)
        for _ in range(200):
            raw.send(node.address, "stun")
        await until(lambda: len(raw.responses._queue) == 200)  # type: ignore[attr-defined]
        raw.transport.sendto(b"\x00", node.address)
        raw.transport.sendto(b"\x05" * 40, node.address)
        raw.transport.sendto(b"\x00" * 40, node.address)
        raw.transport.sendto(b"\x01" * 40, node.address)
        await raw.ask(node.address, "stun")
        after = scrape(node)
        assert changes(before, after, "plasm_dht_datagrams_received_total") == {"": 205}
        assert changes(before, after, "plasm_dht_datagrams_sent_total") == {"": 201}
        assert changes(before, after, "plasm_dht_datagrams_dropped_total") == {
            "{reason=size}": 1,
            "{reason=type}": 1,
            "{reason=malformed}": 1,
            "{reason=unasked}": 1,
        }


async def test_a_store_for_which_there_is_no_ping_left_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_PINGS", 0)
    async with server() as node, raw_node() as raw:
        before = scrape(node)
        raw.send(node.address, "store", ZERO, KEY, record(issued_at=node.clock.wall()).envelope)
        await raw.ask(node.address, "stun")
        assert changes(before, scrape(node), "plasm_dht_datagrams_dropped_total") == {"{reason=busy}": 1}


async def test_readings_are_counted_by_what_came_of_them() -> None:
    async with server() as other, server([other], identity=IDENTITIES[0]) as node, server() as alone:
        await node.publish(NAME, "value")
        before, lonely = scrape(node), scrape(alone)
        assert await node.get(NAME) == "value"
        assert await node.get("nothing") is None
        assert await alone.get(NAME) is None
        prefix = "plasm_dht_lookup_duration_seconds_count"
        looked = changes(before, scrape(node), prefix)
        assert looked.pop("{kind=name,result=found}") == 1
        assert looked.pop("{kind=name,result=not_found}") == 1
        assert list(looked) == ["{kind=key,result=found}"]
        looked = changes(lonely, scrape(alone), prefix)
        assert looked.pop("{kind=name,result=no_answer}") == 1
        assert list(looked) == ["{kind=key,result=no_answer}"]


async def test_round_trips_and_contacts_show() -> None:
    async with server() as other, server([other]) as node:
        samples = scrape(node)
        assert samples["plasm_dht_round_trip_seconds_count"] >= 1
        assert samples["plasm_dht_round_trip_seconds_bucket{le=2.5}"] >= 1
        assert 0 < samples["plasm_dht_round_trip_seconds_sum"] < 5
        assert (samples["plasm_dht_contacts{state=live}"], samples["plasm_dht_contacts{state=stale}"]) == (1, 0)
        (contact,) = node.protocol.router.live()
        node.protocol.router.miss(contact)
        node.protocol.router.miss(contact)
        samples = scrape(node)
        assert (samples["plasm_dht_contacts{state=live}"], samples["plasm_dht_contacts{state=stale}"]) == (0, 1)


async def test_a_histogram_holds_each_duration_in_every_bucket_that_it_fits() -> None:
    async with server() as node:
        took = node.protocol.stats.round_trips = Durations((0.1, 1.0))
        for seconds in (0.05, 0.1, 0.5, 70.0):
            took.add(seconds)
        samples = scrape(node)
    buckets = {name: value for name, value in samples.items() if name.startswith("plasm_dht_round_trip_seconds_bucket")}
    assert list(buckets.values()) == [2, 3, 4]
    assert [name.partition("le=")[2] for name in buckets] == ["0.1}", "1.0}", "+Inf}"]
    assert samples["plasm_dht_round_trip_seconds_count"] == 4
    assert samples["plasm_dht_round_trip_seconds_sum"] == pytest.approx(70.65)


async def test_a_clock_that_is_wrong_shows() -> None:
    async with server(clock=HalfManualClock()) as node:
        node.clock.correction = -90_000
        assert scrape(node)["plasm_dht_clock_correction_seconds"] == -90


async def test_two_nodes_of_one_process_do_not_mix() -> None:
    async with server(identity=IDENTITIES[0]) as one, server() as two:
        await one.publish(NAME, "value")
        assert scrape(one)["plasm_dht_advertised_records"] == 1
        assert scrape(two)["plasm_dht_advertised_records"] == 0
        assert scrape(two)["plasm_dht_datagrams_received_total"] == 0


# -- HTTP ------------------------------------------------------------------------------------------------------------


async def test_requests_are_counted_by_what_was_asked_for_and_nobody_can_add_a_series() -> None:
    async with server() as node:
        site = Site(pages={"stable/arm64": Page(ArtifactSet("stable/arm64", "1", ()), b"{}")})
        site.metrics = Exposition(node, site.traffic).render
        app = create_app(site)
        gateway.add_to(app, gateway.Gateway(node, node.protocol.router))
        async with TestClient(TestServer(app, host=HERE)) as client:
            before = scrape(node, site.traffic)
            asked = (
                ("/health", "health", "2xx"),
                ("/status", "status", "2xx"),
                ("/metrics", "metrics", "2xx"),
                ("/stable/arm64/manifest.json", "manifest", "2xx"),
                ("/other/arm64/manifest.json", "manifest", "4xx"),
                ("/stable/arm64/made-up", "artifact", "4xx"),
                ("/stable/arm64/boot.ipxe", "ipxe", "4xx"),
                ("/boot.ipxe", "ipxe", "2xx"),
                ("/dht/stable/arm64", "gateway", "5xx"),
                ("/dht/stable/arm64/manifest.json", "gateway", "5xx"),
                ("/made/up/by/a/client", "unknown", "4xx"),
            )
            total: Counter[str] = Counter()
            for path, kind, status in asked:
                await (await client.get(path)).read()
                total[f"{{path={kind},status={status}}}"] += 1
            await (await client.post("/health")).read()
            total["{path=unknown,status=4xx}"] += 1
            after = scrape(node, site.traffic)
        assert changes(before, after, "plasm_dht_http_requests_total") == dict(total)
        assert after["plasm_dht_http_sent_bytes_total"] == site.traffic.sent > 1000
        assert after.keys() == before.keys()


async def test_the_scraper_gets_the_format_that_it_asks_for() -> None:
    async with server() as node:
        site = Site()
        site.metrics = Exposition(node, site.traffic).render
        async with TestClient(TestServer(create_app(site), host=HERE)) as client:
            plain = await client.get("/metrics")
            assert plain.headers["Content-Type"].startswith("text/plain; version=")
            assert list(text_string_to_metric_families(await plain.text()))
            accept = {"Accept": "application/openmetrics-text;version=1.0.0"}
            modern = await client.get("/metrics", headers=accept)
            assert modern.headers["Content-Type"].startswith("application/openmetrics-text")
            assert list(open_metrics(await modern.text()))
            for junk in ("x" * 4000, ";;;,,,", "text/plain; version=\\\\", "application/openmetrics-text; version=x"):
                assert (await client.get("/metrics", headers={"Accept": junk})).status == 200


async def test_without_metrics_there_is_no_such_page() -> None:
    async with TestClient(TestServer(create_app(Site()), host=HERE)) as client:
        assert (await client.get("/metrics")).status == 404


async def test_whatever_arrives_adds_no_series() -> None:
    async with server(identity=IDENTITIES[0]) as node, raw_node() as raw:
        await joined(node, raw)
        await node.publish("first", "value")
        before = scrape(node)
        raw.answers["store"] = lambda *_: refusing("made_up")
        await node.publish("a name of the network's", "value")
        for datagram in (b"", b"\x00" * 21, b"\x07" * 30, b"\x00" * 20 + b"\x93", bytes(9300)):
            raw.transport.sendto(datagram, node.address)
        for name in ("made_up", "store", "ping"):
            raw.send(node.address, name, "x")
        await raw.ask(node.address, "store", ZERO, KEY, b"x")
        await asyncio.sleep(0)
        assert scrape(node).keys() == before.keys()


def test_a_provider_without_http_imports_no_prometheus_client() -> None:
    code = "import sys, plasm_dht.provider.provider; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
