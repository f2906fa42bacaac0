"""`linsight app` as a visitor uses it, in a headless Chromium: `make test-app`.

The page is served from a process of its own, by the command. Nothing that the browser asks for may
lie on another machine.
"""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from linsight.data.digits import digit_scene

from .models import write_checkpoint

BROWSERS = ("chromium", "google-chrome", "chromium-browser", "google-chrome-stable")
SCREENSHOT = Path(__file__).parents[2] / "docs" / "assets" / "app.png"
LOADED = 60_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail("there is no Chromium: apt install chromium", pytrace=False)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module", params=["classifier", "segmentor", "detector"])
def served(request, tmp_path_factory):
    """The task and the address of a page for its model."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = write_checkpoint(request.param, folder)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = ["--port", str(port), "--score", "0.1", "--max-pixels", "100000", "--device", "cpu"]
    command = [sys.executable, "-m", "linsight.tools.main", "app", checkpoint.name, *words]
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=folder)
    try:
        for _ in range(300):
            if f"http://127.0.0.1:{port}" in (folder / "said.txt").read_text():
                break
            assert process.poll() is None, (folder / "said.txt").read_text()
            time.sleep(0.4)
        yield request.param, f"http://127.0.0.1:{port}"
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def page(browser, served):
    """The opened page; at its end, whatever it asked for was on this machine."""
    asked = []
    opened: Page = browser.new_page(viewport={"width": 1280, "height": 1000})
    opened.on("request", lambda request: asked.append(request.url))
    opened.set_default_timeout(LOADED)
    expect.set_options(timeout=LOADED)
    opened.goto(served[1])
    expect(opened.get_by_role("heading", name="linsight")).to_be_visible()
    yield opened
    opened.close()
    assert len(asked) > 5
    places = {urlsplit(url)[:2] for url in asked if not url.startswith(("data:", "blob:"))}
    assert places == {urlsplit(served[1])[:2]}


def drop(page: Page, file: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(file)


def shown(page: Page, label: str):
    """The picture with a label."""
    return page.locator(".block", has_text=label).locator("img").first


def cells(page: Page) -> list[str]:
    return [text.strip() for text in page.locator("table").first.locator("td").all_inner_texts()]


def test_a_dropped_picture(page, served, tmp_path):
    task, _ = served
    settings = {"size": 64} if task == "classifier" else {"size": 160, "digits": 4}
    if task != "classifier":
        settings["digit_size"] = (0.2, 0.45)
    file = tmp_path / "ä <b> digit.tif"  # a format that browsers do not show
    Image.fromarray(digit_scene(7, "test", **settings).image).save(file)
    drop(page, file)
    expect(page.get_by_label("Time")).to_have_value(
        __import__("re").compile(rf"\d+ ms for {settings['size']} x {settings['size']} pixels")
    )
    expect(shown(page, "Prediction")).to_be_visible()
    page.screenshot(path="/tmp/app/s1.png", full_page=True)
    print(cells(page))
