"""report.html in a real browser: the system's Chromium or Chrome, headless."""

import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from elastictok_jax.data import media
from elastictok_jax.evaluation.report.html import Picture, Section, Table, Video, write_html

STUDY = Path(__file__).parents[3] / "docs/study/report.html"
PHONE, DESK = (360, 740), (1280, 800)


def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for path in map(shutil.which, names) if path), None)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A page with one of each part, and text that would break out of its place."""
    folder = tmp_path_factory.mktemp("page")
    figure, axes = plt.subplots(figsize=(9, 3))
    axes.plot([1, 2, 3])
    frames = np.random.default_rng(0).integers(0, 255, (48, 32, 48, 3), np.uint8)
    media.write_video(folder / "clip.mp4", frames, fps=24.0)
    rows = [{"name": "<script>alert(1)</script>", "x": 0.12345, "wide": "y" * 300, "none": None}]
    parts = [
        Picture(figure, "a plot"),
        Table(rows, "a table"),
        Video((folder / "clip.mp4").read_bytes(), "a video"),
    ]
    write_html(
        folder / "report.html",
        title="Models & <others>",
        summary="two",
        command="elastictok evaluate 'a b' -o DIR",
        sections=[Section("First", "text", parts), Section("Second", "", [Table(rows, "again")])],
    )
    plt.close(figure)
    return folder / "report.html"


def test_a_page_needs_nothing_else(page_file):
    text = page_file.read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    assert "<script" not in text and "@import" not in text and "url(" not in text


def require_sound(page_file, *, size, plots, videos):
    """Opens a page: no errors, no sideways scrolling, all plots there, all videos play."""
    sync = pytest.importorskip("playwright.sync_api")
    browser_path = chromium()
    if browser_path is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        width, height = size
        page = browser.new_page(viewport={"width": width, "height": height}, offline=True)
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda r: said.append(r.url) if r.url.startswith("http") else None)
        page.goto(page_file.as_uri())
        page.wait_for_load_state("load")
        images = page.eval_on_selector_all(
            "img", "all => all.map(i => [i.naturalWidth, i.alt, i.clientWidth])"
        )
        assert len(images) >= plots
        assert all(drawn > 0 and alt for drawn, alt, _ in images)
        assert all(shown >= 0.69 * drawn for drawn, _, shown in images)  # text of 9 pt is read
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        sizes = page.eval_on_selector_all(
            "p, li, td, th, figcaption, code",
            "a => a.map(e => parseFloat(getComputedStyle(e).fontSize))",
        )
        assert min(sizes) >= 12
        played = page.eval_on_selector_all(
            "video",
            """async all => {
                for (const video of all) {
                    await video.play();
                    await new Promise(done => { video.ontimeupdate = () =>
                        video.currentTime > 0.05 && done(); });
                }
                return all.map(video => [video.videoWidth, video.error === null]);
            }""",
        )
        assert len(played) >= videos and all(wide > 0 and fine for wide, fine in played)
        # Everything that does something is reached by the Tab key.
        count = page.eval_on_selector_all("a, summary, video, .wide", "all => all.length")
        reached = set()
        for _ in range(2 * count + 9 * videos + 2):
            page.keyboard.press("Tab")
            reached.add(
                page.evaluate(
                    "[...document.querySelectorAll('a, summary, video, .wide')]"
                    ".indexOf(document.activeElement)"
                )
            )
        assert reached >= set(range(count))
        page.keyboard.press("Escape")
        browser.close()
        assert not said


def test_the_page_of_the_study_is_small_enough_to_keep():
    assert 100_000 < STUDY.stat().st_size < 3_000_000


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_the_page_of_the_study_in_a_browser(size):
    require_sound(STUDY, size=size, plots=9, videos=1)


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_a_page_in_a_browser(page_file, size):
    require_sound(page_file, size=size, plots=1, videos=1)
