"""The built book, looked at as a reader's browser does.

`make book` makes it; without it, and without Chromium, these tests skip.
"""

import functools
import http.server
import os
import re
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlparse

import pytest
from manifest import ROOT, repository, sources
from playwright.sync_api import Browser, Page, sync_playwright

HTML = ROOT / "_build" / "html"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
ALONE = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
).split()
PAGES = sorted(
    path.relative_to(HTML).as_posix()
    for path in HTML.rglob("*.html")
    if "_static" not in path.parts
)
PREFIX = "/bertnb/"  # where the book lies on its server

pytestmark = [
    pytest.mark.skipif(not PAGES, reason="no book in _build/html: `make book`"),
]
browsers = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")


class Links(HTMLParser):
    """The ids of a page, and what it links to or loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.urls: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(
        self, tag: str, attrs: list[tuple[str, str | None]]
    ) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.urls.append((tag, value))


@functools.cache
def links(path: Path) -> Links:
    return Links(path)


def test_every_chapter_has_its_page() -> None:
    for path in sources():
        assert f"notebooks/{path.stem}.html" in PAGES
    for page in ("index", "404", "search", "book/api", "book/notation"):
        assert f"{page}.html" in PAGES


@pytest.mark.parametrize("page", PAGES)
def test_every_internal_link_arrives(page: str) -> None:
    here = HTML / page
    for tag, url in links(here).urls:
        if tag == "base" or urlparse(url).scheme or url.startswith("//"):
            continue
        path, anchor = urldefrag(url)
        path = unquote(path.split("?")[0])
        target = (here.parent / path).resolve() if path else here
        if target.is_dir():
            target /= "index.html"
        assert target.exists(), url
        if anchor and target.suffix == ".html":
            assert unquote(anchor) in links(target).ids, url


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    for tag, url in links(HTML / page).urls:
        if tag in ("script", "img", "link", "iframe", "source"):
            outside = urlparse(url).scheme in ("http", "https")
            canonical = tag == "link" and url.startswith(
                "https://bertnb.github"
            )
            assert not outside or canonical, url


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.stem)
def test_every_equation_has_an_anchor(path: Path) -> None:
    found = links(HTML / "notebooks" / f"{path.stem}.html").ids
    for number in re.findall(r"\\tag\{([\d.]+)\}", path.read_text("utf-8")):
        assert f"eq-{number.replace('.', '-')}" in found


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.stem)
def test_chapter_and_ledger_lead_to_each_other(path: Path) -> None:
    there = {url for _, url in links(HTML / "book" / "ledger.html").urls}
    chapter = f"notebooks/{path.stem}.html"
    numbers = re.findall(r"\\tag\{([\d.]+)\}", path.read_text("utf-8"))
    for number in numbers:
        assert f"../{chapter}#eq-{number.replace('.', '-')}" in there
    part = f"../book/ledger.html#ledger-{path.stem.replace('_', '-')}"
    here = {url for _, url in links(HTML / chapter).urls}
    assert (part in here) == bool(numbers)


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.stem)
def test_a_notebook_can_be_opened_elsewhere(path: Path) -> None:
    urls = {u for _, u in links(HTML / "notebooks" / f"{path.stem}.html").urls}
    place = repository().removeprefix("https://github.com/")
    file = f"notebooks/{path.stem}.ipynb"
    colab = "https://colab.research.google.com/github"
    binder = "https://mybinder.org/v2/gh"
    assert f"{colab}/{place}/blob/main/{file}" in urls
    assert f"{binder}/{place}/main?urlpath=lab/tree/{file}" in urls
    assert any(url.endswith(f"_sources/{file}") for url in urls)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serve the book below PREFIX, with its own page for what is not there."""

    def translate_path(self, path: str) -> str:
        return super().translate_path(f"/{path.removeprefix(PREFIX)}")

    def send_error(self, code: int, *arguments: Any) -> None:
        body = (HTML / "404.html").read_bytes()
        self.send_response(code)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    handler = functools.partial(Handler, directory=str(HTML))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{PREFIX}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=ALONE
        )
        yield chromium
        chromium.close()


class Visit:
    """A page in the browser, and what it complained of."""

    def __init__(self, page: Page, site: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", self.hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.see(request.url, site))
        page.on(
            "response", lambda answer: self.judge(answer.status, answer.url)
        )

    def hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def see(self, url: str, site: str) -> None:
        if not url.startswith((site, "data:", "blob:")):
            self.complaints.append(f"asks for {url}")

    def judge(self, status: int, url: str) -> None:
        if status >= 400:
            self.complaints.append(f"{status} {url}")

    def open(self, url: str) -> None:
        self.page.goto(url, wait_until="load")
        self.page.wait_for_function(
            "!document.querySelector('.math') || (window.MathJax?.startup"
            "?.promise && document.querySelector('mjx-container'))"
        )
        self.page.evaluate("window.MathJax?.startup?.promise?.then(() => true)")
        self.page.wait_for_load_state("networkidle")


@pytest.fixture(scope="module", params=["desktop", "phone"])
def screen(
    request: pytest.FixtureRequest, browser: Browser, site: str
) -> Iterator[tuple[str, Visit]]:
    phone = request.param == "phone"
    context = browser.new_context(
        viewport={"width": 390, "height": 844} if phone else None
    )
    yield request.param, Visit(context.new_page(), site)
    context.close()


RAW = """() => {
    const article = document.querySelector(".bd-article")?.cloneNode(true);
    article?.querySelectorAll("pre, code, script, mjx-container").forEach(
        (node) => node.remove());
    return article?.textContent ?? "";
}"""
ERRORS = """() => [...document.querySelectorAll("mjx-merror, [data-mjx-error]")]
    .map((node) => node.getAttribute("data-mjx-error") ?? node.textContent)"""
UNTYPESET = """() => [...document.querySelectorAll(".math")]
    .filter((node) => !node.querySelector("mjx-container"))
    .map((node) => node.textContent)"""
WIDE = """() => {
    const page = document.documentElement;
    const box = document.querySelector(".bd-article")?.getBoundingClientRect();
    return [page.scrollWidth, Math.floor(box?.right ?? 0)];
}"""


@browsers
@pytest.mark.parametrize("page", PAGES)
def test_the_page_is_in_order(
    screen: tuple[str, Visit], site: str, page: str
) -> None:
    """No complaint, no outside request, no raw mathematics, no side scroll;
    the colour is that of the system, also when it changes."""
    name, visit = screen
    visit.complaints.clear()
    themes = ("dark", "light") if name == "phone" else ("light", "dark")
    visit.page.emulate_media(color_scheme=themes[0])
    visit.open(site + page)
    for theme in themes:
        visit.page.emulate_media(color_scheme=theme)
        visit.page.wait_for_selector(
            f"html[data-theme={theme}]", state="attached", timeout=5000
        )
    assert visit.complaints == []
    assert visit.page.evaluate(ERRORS) == []
    assert visit.page.evaluate(UNTYPESET) == []
    raw = re.search(r"\$\$|\\[a-z]{2,}|\{eq\}", visit.page.evaluate(RAW))
    assert raw is None, raw
    if name == "phone":
        scroll, right = visit.page.evaluate(WIDE)
        assert scroll <= 390
        assert right <= 390


@browsers
def test_a_link_to_an_equation_arrives(
    screen: tuple[str, Visit], site: str
) -> None:
    _, visit = screen
    visit.open(f"{site}notebooks/01_attention.html")
    link = visit.page.locator("a:has(> .eqref)").first
    link.click()
    assert re.search(r"#eq-\d+-\d+$", visit.page.url)
    assert visit.page.locator(":target").count() == 1
    assert visit.page.locator(":target").is_visible()


@browsers
@pytest.mark.parametrize("wrong", ["nothing.html", "a/deep/path/nothing"])
def test_a_wrong_address_leads_back(
    browser: Browser, site: str, wrong: str
) -> None:
    page = browser.new_page()
    visit = Visit(page, site)
    page.goto(site + wrong)
    assert (
        page.locator("h1").last.inner_text() == "This page is not in the book"
    )
    # the browser itself notes the 404 of the address; nothing else may fail
    assert [
        c for c in visit.complaints if wrong not in c and "404" not in c
    ] == []
    assert len([c for c in visit.complaints if c.startswith("404")]) == 1
    page.locator("article a").first.click()
    page.wait_for_url(f"{site}index.html")
    page.close()
