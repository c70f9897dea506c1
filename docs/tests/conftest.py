"""The built site behind a local server, and a Chromium that can reach nothing else."""

import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

SITE = Path(__file__).resolve().parents[2] / "_build" / "site"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="session")
def site():
    """The address of the built site."""
    assert (SITE / "index.html").exists(), "there is no site yet: make site"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    assert found, "there is no Chromium: apt install chromium, or set CHROMIUM to its path"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser, site):
    """A page that keeps what went wrong in `faults`; it closes with the test, which they fail."""
    faults, contexts = [], []

    def opened(**settings):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        contexts.append(context)
        context.route("**/*", only_here)
        page = context.new_page()
        page.on("console", lambda said: said.type in ("error", "warning") and note(said.text))
        page.on("pageerror", lambda error: note(str(error)))
        page.on("response", lambda got: got.status >= 400 and note(f"{got.status} {got.url}"))
        return page

    def note(fault: str) -> None:
        faults.append(fault)

    def only_here(route) -> None:
        if route.request.url.startswith((site, "data:", "blob:")):
            route.continue_()
        else:
            note(f"a request to another host: {route.request.url}")
            route.abort()

    yield opened
    for context in contexts:
        context.close()
    assert not faults
