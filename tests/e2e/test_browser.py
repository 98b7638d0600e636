"""The page for people in a real browser: what it shows, that it keeps up, and that no name in it is ever run."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.world import TARGET, World, put, read, soon

selenium = pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium or chromedriver is missing: apt install chromium chromium-driver"
)
# A page hears of a change within half a second of it; a record is published within two of the last write (s).
SHOWN_WITHIN = 10.0
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)
SHOWN_LEFT = "document.querySelector('.expiry .left').textContent"
HOSTILE = "<img src=x onerror=document.title='run'>"


class Browser:
    """A headless Chromium. Every question blocks, so it is asked in a thread."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
        self.driver.set_page_load_timeout(30)

    async def open(self, url: str) -> None:
        await asyncio.to_thread(self.driver.get, url)

    async def run(self, script: str) -> Any:
        return await asyncio.to_thread(self.driver.execute_script, script)

    async def look_like(self, width: int, scheme: str) -> None:
        sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        await asyncio.to_thread(self.driver.execute_cdp_cmd, "Emulation.setDeviceMetricsOverride", sizes)
        await asyncio.to_thread(self.driver.execute_cdp_cmd, "Emulation.setEmulatedMedia", media)

    async def allow_scripts(self, yes: bool) -> None:
        value = {"value": not yes}
        await asyncio.to_thread(self.driver.execute_cdp_cmd, "Emulation.setScriptExecutionDisabled", value)

    async def text(self, selector: str) -> str:
        return str(await self.run(f"return document.querySelector({selector!r})?.textContent ?? ''"))

    async def shows(self, selector: str, text: str) -> None:
        """Wait until it does."""

        async def there() -> bool:
            return text in await self.text(selector)

        await soon(there, within=SHOWN_WITHIN)

    async def complaints(self) -> list[Any]:
        """What is in its console since it was last asked."""
        return list(await asyncio.to_thread(self.driver.get_log, "browser"))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    chromium.driver.get("about:blank")
    chromium.driver.get_log("browser")
    return chromium


async def test_a_record_is_shown_counts_down_changes_and_goes_without_a_reload(
    world: World, artifacts: Path, browser: Browser
) -> None:
    put(artifacts, "edge/amd64", vmlinuz="a kernel", VERSION="7")
    node = await world.node("127.0.0.30")
    provider = await world.provider("127.0.0.31", artifacts, "--name", "rack-7", "--record-ttl", "300", joins=node.dht)
    await browser.open(f"http://{provider.http}/")
    await browser.run("window.never_reloaded = true")
    card = "document.querySelector('#records article:last-child')"

    await browser.shows("#records article:last-child h3", TARGET)
    assert await browser.text("h1") == "rack-7"
    assert await browser.text("#publisher") == provider.publisher
    assert await browser.text("#health") == "well"
    assert await browser.text("#advertised") == "2"
    assert await browser.text("#neighbours") == "1"
    assert await browser.text("#records article:last-child .version") == "1"
    assert await browser.text("#records article:last-child .holders") == "1"
    assert (await browser.text("#records article:last-child .seq")).isdecimal()
    assert await browser.run("return document.querySelectorAll('#sky circle.contact').length") == 1
    await browser.shows("#events", "published")
    await browser.shows("#events", "neighbour")

    left = f"return {card}.querySelector('.expiry .left').textContent"
    before = await browser.run(left)

    async def moved() -> bool:
        return bool(await browser.run(left) != before)

    await soon(moved, within=5)
    assert before.startswith(("4:", "5:")), before

    put(artifacts, VERSION="2 " + HOSTILE)
    await browser.shows("#records article:last-child .version", "2 ")
    await browser.shows("#events", "changed")
    assert await browser.text("#records article:last-child .version") == "2 " + HOSTILE

    shutil.rmtree(artifacts / "edge")
    await browser.shows("#events", "withdrawn")
    await browser.shows("#advertised", "1")
    assert await browser.run("return document.querySelectorAll('#records article').length") == 1
    assert await browser.run("return window.never_reloaded")
    assert await browser.complaints() == []

    await provider.stop()  # within its 3 s, with a page open
    await browser.shows("#health", "not connected: this is how it was at ")
    assert await browser.run("return document.body.className") == "away"
    assert await browser.run(
        f"tick(); const before = {SHOWN_LEFT}; arrived -= 90000; tick(); return before === {SHOWN_LEFT}"
    )


async def test_what_did_not_change_stays_for_whoever_reads_it(world: World, artifacts: Path, browser: Browser) -> None:
    node = await world.node("127.0.0.36")
    provider = await world.provider("127.0.0.37", artifacts, joins=node.dht)
    await browser.open(f"http://{provider.http}/")
    await browser.shows("#events", "neighbour")
    for each in await browser.run("return [...document.querySelectorAll('summary')].map(each => each.textContent)"):
        assert each.strip()
    await browser.run("for (const each of document.querySelectorAll('details')) each.open = true")
    assert await browser.text(".held .addresses") == node.dht
    await browser.run("document.querySelector('.files a').focus()")
    await browser.run("getSelection().selectAllChildren(document.getElementById('events'))")
    await browser.run("window.dot = document.querySelector('#sky circle.contact')")
    before = int(await browser.text("#requests"))
    selected = await browser.run("return String(getSelection())")
    await browser.run("return fetch('stable/arm64/manifest.json').then((answer) => answer.text())")

    async def counted() -> bool:
        return int(await browser.text("#requests")) > before

    await soon(counted, within=SHOWN_WITHIN)
    assert await browser.run("return document.activeElement.matches('.files a')")
    assert await browser.run("return window.dot.isConnected")
    assert "published" in selected
    assert await browser.run("return String(getSelection())") == selected


async def test_nothing_moves_when_the_script_draws(world: World, artifacts: Path, browser: Browser) -> None:
    node = await world.node("127.0.0.38")
    provider = await world.provider("127.0.0.39", artifacts, joins=node.dht)
    watch = "new PerformanceObserver((list) => {for (const each of list.getEntries()) moved += each.value})"
    source = f"var moved = 0; {watch}.observe({{type: 'layout-shift', buffered: true}})"
    command = "Page.addScriptToEvaluateOnNewDocument"
    added = await asyncio.to_thread(browser.driver.execute_cdp_cmd, command, {"source": source})
    try:
        for width in (1280, 390):
            await browser.look_like(width, "light")
            await browser.open(f"http://{provider.http}/")
            requests = await browser.text("#requests")
            await read(f"http://{provider.http}/status")  # its own /events may be among them already

            async def heard(before: str = requests) -> bool:
                return await browser.text("#requests") != before

            await soon(heard, within=SHOWN_WITHIN)
            assert await browser.run("return new Promise((done) => requestAnimationFrame(() => done(moved)))") == 0
    finally:
        await asyncio.to_thread(browser.driver.execute_cdp_cmd, "Page.removeScriptToEvaluateOnNewDocument", added)


async def test_an_event_of_another_day_has_its_date(world: World, artifacts: Path, browser: Browser) -> None:
    provider = await world.provider("127.0.0.29", artifacts)
    await browser.open(f"http://{provider.http}/")
    await browser.shows("#events", "published")
    assert len(await browser.text("#events time")) == len("12:34:56")
    await browser.run("render({...state, events: state.events.map((each) => ({...each, at: 1.7e12}))})")
    assert (await browser.text("#events time")).startswith("2023-11-1")


async def test_no_name_is_ever_run(world: World, artifacts: Path, browser: Browser) -> None:
    put(artifacts, VERSION=HOSTILE)
    (artifacts / TARGET / "<script>document.title='run'<").write_text("x")
    (artifacts / TARGET / "'\" onmouseover=alert(1) x='").write_text("x")
    provider = await world.provider("127.0.0.32", artifacts, "--name", HOSTILE)
    await browser.open(f"http://{provider.http}/")
    await browser.shows("#events", "published")
    await browser.run("for (const each of document.querySelectorAll('details')) each.open = true")
    assert await browser.text("h1") == HOSTILE
    assert await browser.run("return document.title") == f"{HOSTILE} · plasm-dht"
    assert await browser.run("return document.querySelectorAll('img').length") == 0
    assert await browser.run("return document.scripts.length") == 1
    handlers = (
        "return [...document.querySelectorAll('*')].filter(e => [...e.attributes].some(a => /^on/.test(a.name))).length"
    )
    assert await browser.run(handlers) == 0
    links = await browser.run("return [...document.querySelectorAll('.files a')].map(each => each.href)")
    for link in links:
        status = await browser.run(f"return fetch({link!r}).then(answer => answer.status)")
        assert status == 200, link
    assert await browser.complaints() == []


async def test_the_policy_stops_what_would_be_run_all_the_same(world: World, artifacts: Path, browser: Browser) -> None:
    provider = await world.provider("127.0.0.33", artifacts)
    await browser.open(f"http://{provider.http}/")
    await browser.run(f"document.body.insertAdjacentHTML('beforeend', {HOSTILE!r})")

    async def refused() -> bool:
        return any("Content Security Policy" in each["message"] for each in await browser.complaints())

    await soon(refused, within=5)
    assert "plasm-dht" in await browser.run("return document.title")


async def test_it_fits_a_phone_and_can_be_read_in_dark_and_light(
    world: World, artifacts: Path, browser: Browser
) -> None:
    put(artifacts, "a-channel-with-a-rather-long-name/an-architecture-with-a-long-name", vmlinuz="k", VERSION="9" * 60)
    provider = await world.provider("127.0.0.34", artifacts, "--name", "a-rack-with-a-very-long-name." * 3)
    luminance = """
        const lightness = (color) => {
            const [r, g, b] = color.match(/[\\d.]+/g).map((each) => {
                each /= 255;
                return each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const ground = (element) => {
            const color = getComputedStyle(element).backgroundColor;
            return color === "rgba(0, 0, 0, 0)" ? ground(element.parentElement) : color;
        };
        const words = [...document.querySelectorAll("body *")].filter((element) =>
            element.offsetParent && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
        return words.map((element) => {
            const [one, other] = [lightness(getComputedStyle(element).color), lightness(ground(element))];
            return [(Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05), element.outerHTML.slice(0, 80)];
        }).sort((one, other) => one[0] - other[0])[0];
    """
    for width, scheme in ((390, "light"), (390, "dark"), (1280, "light"), (1280, "dark"), (320, "light")):
        await browser.look_like(width, scheme)
        await browser.open(f"http://{provider.http}/")
        await browser.shows("#events", "published")
        assert await browser.run("return document.documentElement.scrollWidth") <= width
        unnamed = "return [...document.querySelectorAll('progress, th')].filter(e => !(e.ariaLabel || e.textContent))"
        assert await browser.run(unnamed) == []
        contrast, where = await browser.run(luminance)
        assert contrast >= 4.5, (scheme, contrast, where)  # WCAG 2.1, AA
    await browser.look_like(390, "light")
    await browser.run("document.documentElement.style.fontSize = '200%'")
    assert await browser.run("return document.documentElement.scrollWidth") <= 390
    right = "Math.max(...[...document.querySelectorAll('#events *')].map((each) => each.getBoundingClientRect().right))"
    assert await browser.run(f"return {right}") <= 390
    assert await browser.complaints() == []


async def test_without_javascript_the_page_says_the_same(world: World, artifacts: Path, browser: Browser) -> None:
    provider = await world.provider("127.0.0.35", artifacts)
    await browser.allow_scripts(False)
    try:
        await browser.open(f"http://{provider.http}/")
        source = await asyncio.to_thread(lambda: browser.driver.find_element("tag name", "body").text)
    finally:
        await browser.allow_scripts(True)
    for shown in (TARGET, "refresh in", "expires in", provider.publisher, "vmlinuz", "published"):
        assert shown in source
    assert await browser.complaints() == []
