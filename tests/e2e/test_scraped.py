"""`/metrics` of real processes: what a scraper sees while records are published, holders die, and clients download."""

from collections.abc import Mapping
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.world import TARGET, Running, World, fetch, read, soon

Samples = Mapping[tuple[str, frozenset[str]], float]


async def scrape(process: Running) -> Samples:
    """By name and label values what a scraper gets."""
    text = (await read(f"http://{process.http}/metrics")).decode()
    families = text_string_to_metric_families(text)
    return {
        (sample.name, frozenset(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def of(samples: Samples, name: str, *labels: str) -> float:
    return samples[name, frozenset(labels)]


async def test_a_provider_and_a_gateway_tell_a_scraper_how_they_are(world: World, artifacts: Path) -> None:
    (artifacts / TARGET / "vmlinuz").write_bytes(bytes(2**20))
    holders = [await world.node("127.0.0.10")]
    holders += [await world.node(f"127.0.0.{11 + number}", joins=holders[0].dht) for number in range(2)]
    gateway = await world.node("127.0.0.20", "--http-host", "127.0.0.20", "--http-port", "0", joins=holders[0].dht)
    times = ("--record-ttl", "30", "--refresh-interval", "3")
    provider = await world.provider("127.0.0.21", artifacts, *times, joins=holders[0].dht)

    first = await scrape(provider)
    assert of(first, "plasm_dht_advertised_records") == 1
    assert of(first, "plasm_dht_failing_records") == 0
    assert of(first, "plasm_dht_refreshes_total", "done") >= 1
    assert 20 < of(first, "plasm_dht_next_expiry_seconds") <= 30
    assert of(first, "plasm_dht_record_ttl_seconds") == 30
    assert of(first, "plasm_dht_contacts", "live") >= 3
    assert of(first, "plasm_dht_stores_sent_total", "accepted") >= 6
    assert of(first, "process_resident_memory_bytes") > 10_000_000
    assert of(first, "process_start_time_seconds") > 1_700_000_000

    await read(f"http://{provider.http}/{TARGET}/vmlinuz")
    assert (await fetch(f"http://{provider.http}/stable/arm64/nothing"))[0] == 404
    await read(f"http://{gateway.http}/dht/stable/arm64")
    second = await scrape(provider)
    assert of(second, "plasm_dht_http_requests_total", "artifact", "2xx") == 1
    assert of(second, "plasm_dht_http_requests_total", "artifact", "4xx") == 1
    assert of(second, "plasm_dht_http_sent_bytes_total") > of(first, "plasm_dht_http_sent_bytes_total") + 2**20
    asked = await scrape(gateway)
    assert of(asked, "plasm_dht_lookup_duration_seconds_count", "name", "found") == 1
    assert of(asked, "plasm_dht_http_requests_total", "gateway", "2xx") == 1
    assert of(asked, "plasm_dht_stores_received_total", "accepted") >= 1
    assert of(asked, "plasm_dht_records_held") >= 1

    async def refreshed() -> bool:
        return of(await scrape(provider), "plasm_dht_refreshes_total", "done") > of(
            first, "plasm_dht_refreshes_total", "done"
        )

    await soon(refreshed)
    for process in (*holders, gateway):
        await process.kill()

    async def failing() -> bool:
        samples = await scrape(provider)
        return of(samples, "plasm_dht_failing_records") == 1 and of(samples, "plasm_dht_refreshes_total", "failed") >= 1

    await soon(failing)
    assert of(await scrape(provider), "plasm_dht_next_expiry_seconds") < 30
    (line, *_) = [line for line in provider.stderr.splitlines() if "was not refreshed" in line]
    assert "'/phase/stable/arm64/manifest' was not refreshed: too few holders acknowledged it (" in line
    assert "not answered" in line or "nobody was asked" in line
    assert "next try in " in line
