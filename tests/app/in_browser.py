"""`linsight app` as a visitor uses it, in a headless Chromium: `make test-app`.

The page is served from a process of its own, by the command. Nothing that the browser asks for may
lie on another machine.
"""

import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from linsight.data.digits import digit_scene
from linsight.tools.predict import open_predictor

from .models import write_checkpoint

BROWSERS = ("chromium", "google-chrome", "chromium-browser", "google-chrome-stable")
# docs/assets/app.png is a copy of it.
SCREENSHOT = Path(__file__).parents[2] / "build" / "app.png"
LOADED = 20_000  # milliseconds, on a busy machine


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
    """The task, the address of a page for its model, and the checkpoint."""
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
        yield request.param, f"http://127.0.0.1:{port}", checkpoint
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
    expect(page.get_by_text("Drop File Here")).to_be_visible()
    page.locator("input[type=file]").first.set_input_files(file)


def picture(page: Page, label: str):
    """The picture in the block with a label."""
    return page.locator(".block").filter(has_text=label).locator("img").first


def expect_table(page: Page, rows: list[tuple]) -> None:
    """Each class and number stands on the page."""
    for row in rows:
        for value in row:
            expect(page.locator("body")).to_contain_text(str(value))


def test_a_picture_and_its_looks(page, served, tmp_path):
    task, _, checkpoint = served
    scene = digit_scene(7, "test", size=(96, 128), digit_size=(0.4, 0.7)).image
    file = tmp_path / "ä <b> digit.tif"  # a format that browsers do not show
    Image.fromarray(scene).save(file)
    drop(page, file)
    time_of = page.get_by_label("Time")
    expect(time_of).to_have_value(re.compile(r"^\d+ ms for 128 x 96 pixels$"))
    expect(picture(page, "Prediction")).to_be_visible()
    predictor = open_predictor(str(checkpoint), None, torch.device("cpu"), score=0.1)
    rows = predictor(Image.fromarray(scene)).rows
    assert rows
    expect_table(page, rows[:3])
    if task == "detector":
        assert rows[0][-1] > 0  # pixels of a mask
    looks, seen = picture(page, "Features as colours"), picture(page, "As the model gets it")
    expect(looks).to_be_visible()
    expect(seen).to_be_visible()
    before = looks.get_attribute("src")
    seen.click(position={"x": 20, "y": 20})
    expect(looks).not_to_have_attribute("src", str(before))
    if task == "classifier":
        page.wait_for_timeout(500)  # the fading of Gradio's progress bars
        SCREENSHOT.parent.mkdir(exist_ok=True)
        page.screenshot(path=SCREENSHOT, full_page=True)
        with Image.open(SCREENSHOT) as shot:
            small = shot.convert("RGB").quantize(48)
        small.save(SCREENSHOT, optimize=True)
    page.locator("button.thumbnail-item").nth(1).click()
    expect(time_of).not_to_have_value(re.compile("128 x 96"))


def test_wrong_files_are_one_line_and_the_page_goes_on(page, tmp_path):
    (tmp_path / "notes.png").write_text("some words")
    Image.new("RGB", (400, 300)).save(tmp_path / "large.png")
    Image.new("RGB", (128, 128), "teal").save(tmp_path / "right.png")
    for name, said in (
        ("notes.png", "notes.png is no picture, or it is damaged"),
        ("large.png", "large.png has 400 x 300 pixels, and at most 100,000 are taken"),
    ):
        drop(page, tmp_path / name)
        expect(page.get_by_text(said)).to_be_visible()
    drop(page, tmp_path / "right.png")
    expect(page.get_by_label("Time")).to_have_value(re.compile("for 128 x 128 pixels"))
