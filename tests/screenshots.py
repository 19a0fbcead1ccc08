"""Photograph the pages that commands make: nbs/images/app.jpg and nbs/images/report.jpg, from the LoRA of a demonstration.

    sdxl-course demo --output_dir DEMO && python tests/screenshots.py DEMO/lora

Needs gradio, playwright and a browser (see `chromium` in course.py)."""
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from course import ROOT, chromium
from sdxl_course.app import Studio, find_loras, make_interface
from sdxl_course.evaluate import main as evaluate

PROMPTS = [f"{medium} of a {thing} {place}" for medium in ("an old book illustration", "a photo")
           for thing, place in (("red car", "in the snow"), ("yellow cat", "on the beach"), ("blue teapot", "in the desert"))]


def photograph(browser, address, file, size, ready):
    "Open a page, wait until it is ready, keep the upper part of it."
    page = browser.new_page(viewport=dict(zip(("width", "height"), size)))
    page.goto(address)
    ready(page)
    page.screenshot(path=ROOT / "nbs" / "images" / file, type="jpeg", quality=80)
    page.close()


def app(browser, lora):
    "The page of `sdxl-course app`, after a drawing."
    interface = make_interface(Studio("tiny", find_loras([lora])), PROMPTS[0])
    _, address, _ = interface.launch(prevent_thread_lock=True, quiet=True)
    def ready(page):
        page.get_by_role("button", name="Draw").click()
        page.wait_for_function("[...document.images].filter(one => one.naturalWidth >= 256).length >= 2", timeout=120_000)
        page.wait_for_timeout(2000)
    try: photograph(browser, address, "app.jpg", (1000, 840), ready)
    finally: interface.close()


def report(browser, lora):
    "The report of `sdxl-course evaluate --html` on the same LoRA."
    with tempfile.TemporaryDirectory() as folder:
        prompts, html = Path(folder) / "prompts.txt", Path(folder) / "report.html"
        prompts.write_text("\n".join(PROMPTS))
        assert evaluate(["--lora", str(lora), "--prompts", str(prompts), "--references", str(ROOT / "data_samples" / "old_book_illustrations"),
                         "--trigger", "old book illustration", "--html", str(html)]) == 0
        photograph(browser, html.as_uri(), "report.jpg", (1000, 900), lambda page: page.wait_for_timeout(1000))


if __name__ == "__main__":
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for one in (app, report): one(browser, sys.argv[1])
        browser.close()
