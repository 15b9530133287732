# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The Gradio demo, staged as it goes to the Hub; the slow test looks at it with a headless browser.

Gradio wants an older Pillow than the package's tests, so the slow test needs an environment of its own:

    pip install . -r examples/space/requirements.txt pytest hypothesis selenium
    pytest -m slow tests/project/test_space.py
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from helpers.paths import ROOT


SPACE = ROOT / "examples" / "space"


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "staged"
    subprocess.run([sys.executable, SPACE / "stage.py", folder], check=True)
    return folder


def test_the_staged_folder_has_all_that_the_demo_needs(staged):
    for name in (
        "README.md", "app.py", "requirements.txt", "assets/checkpoint/model.safetensors",
        "assets/plugins/P_7_8/adapter_model.safetensors", "tocom_hf/model/tocom_model.py",
    ):  # fmt: skip
        assert (staged / name).is_file()
    assert len(list((staged / "samples").glob("*.png"))) == 10
    assert not list(staged.rglob("__pycache__"))


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("x")
    done = subprocess.run([sys.executable, SPACE / "stage.py", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_card_and_the_requirements_agree_with_the_package():
    card = (SPACE / "README.md").read_text(encoding="utf-8").split("---")[1]
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (SPACE / "requirements.txt").read_text(), flags=re.MULTILINE))
    tested = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert f"sdk_version: {pins.pop('gradio')}" in card
    assert pins == {name: tested[name] for name in pins}
    assert "app_file: app.py" in card
    description = re.search(r"short_description: (.*)", card).group(1)
    assert len(description) <= 60  # the Hub's limit


@pytest.fixture(scope="module")
def address(staged):
    """The demo, running in a process of its own on the staged copy of the package."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": "",
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, "app.py"], cwd=staged, env=environment)
    try:
        for _ in range(120):
            time.sleep(1)
            assert process.poll() is None
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5)
                break
            except OSError:
                continue
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def text(browser):
    return browser.find_element("tag name", "body").text


def wait_for(browser, condition):
    for _ in range(300):
        if condition(text(browser)):
            return
        time.sleep(0.1)
    pytest.fail(f"It did not appear:\n{text(browser)}")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "mobile"), [(1280, False), (390, True)])
def test_the_page_in_a_browser(address, browser, tmp_path, width, mobile):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(address)
    wait_for(browser, lambda page: "GFLOPs" in page and "r = 8" in page)
    wait_for(browser, lambda page: len(re.findall(r"\d+%", page)) >= 10)

    # nothing sticks out to the right
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for box in browser.find_elements("css selector", ".block, table, h1, img"):
        left, right = box.rect["x"], box.rect["x"] + box.rect["width"]
        assert 0 <= left <= right <= width, box.get_attribute("outerHTML")[:200]
    height = browser.execute_script("return document.documentElement.scrollHeight")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**metrics, "height": height})
    time.sleep(1)
    screenshot = Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"space-{width}.png"
    browser.save_screenshot(str(screenshot))
    assert screenshot.stat().st_size > 20_000

    # at degree 0 nothing merges and nothing is compensated: both columns agree
    number = browser.find_element("css selector", "input[type=number]")
    number.clear()
    number.send_keys("0\n")
    wait_for(browser, lambda page: "r = 8" not in page and page.count("r = 0") >= 2)
    found = re.findall(r"\d+%", text(browser))
    half = len(found) // 2
    assert found[:half] == found[half:]
    assert "50" in text(browser)

    # another image
    browser.find_elements("css selector", ".gallery-item")[1].click()
    wait_for(browser, lambda page: "Trouser" in page and re.search(r"Trouser\s+\d+%", page))
