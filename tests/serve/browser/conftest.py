"""A headless Chromium that watches itself: no error in its console, no request to another place than the service."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def _missing(what):
    reason = f"{what} is not there: run `make browser`"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


# Of a module, not of the session: Playwright keeps an event loop running in this thread until it is closed.
@pytest.fixture(scope="module")
def browser(service_url) -> Iterator:
    """Chromium, started after the service."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("Playwright for Python")
    if not CHROMIUM.exists():
        _missing(str(CHROMIUM))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, service_url):
    """Opens a page in a new context with these options, until `ready` is there; at the end looks at what the browser
    complained about.
    """
    opened = []

    def open_page(path="/", ready="#template option:nth-child(3)", **options):
        context = browser.new_context(**options)
        context.set_default_timeout(60_000)  # a page that takes 0.5 s on a calm machine has taken 19 s on a busy one
        page = context.new_page()
        seen = SimpleNamespace(page=page, context=context, errors=[], addresses=[], refusals=False)
        opened.append(seen)
        context.on("request", lambda request: seen.addresses.append(request.url))
        context.on("console", lambda message: seen.errors.append(message.text) if message.type == "error" else None)
        context.on("weberror", lambda error: seen.errors.append(str(error.error)))
        page.goto(service_url.rstrip("/") + path)
        page.locator(ready).first.wait_for(state="attached")  # the service's answers are in
        return seen

    yield open_page
    for seen in opened:
        seen.context.close()
    service = urlsplit(service_url).netloc
    for seen in opened:
        # Chromium itself notes each refused request in the console: a test that provokes one says so.
        expected = "Failed to load resource" if seen.refusals else "nothing"
        assert [text for text in seen.errors if not text.startswith(expected)] == []
        addresses = [urlsplit(url) for url in seen.addresses if not url.startswith(("data:", "blob:"))]
        assert {address.netloc for address in addresses} == {service}


@pytest.fixture
def seen(open_page):
    """The page on a desktop, with what the browser saw."""
    return open_page()


@pytest.fixture
def page(seen):
    """The page on a desktop."""
    return seen.page
