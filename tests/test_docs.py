"The pages of the site can be made: the stage before Quarto, which runs imports and exports, and our own renderer, which needs no Quarto."
import base64
import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from html.parser import HTMLParser

import pytest
from PIL import Image

from course import NOTEBOOKS, chromium, copy_course, environment, page_name
from render_site import STAGE, render, slug


def make_docs(root):
    return subprocess.run([sys.executable, "-c", STAGE], cwd=root, env=environment(root), capture_output=True, text=True)


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    "A copy of the repository with its processed pages in _proc and the site in _site."
    root = copy_course(tmp_path_factory.mktemp("docs") / "sdxl_course")
    made = make_docs(root)
    assert made.returncode == 0, made.stderr[-3000:]
    assert len(render(root / "_proc", root / "_site")) == len(NOTEBOOKS)
    return root


def test_docs_stage(docs):
    pages = docs / "_proc"
    assert {path.relative_to(pages).as_posix() for path in pages.rglob("*.ipynb")} == {f"{page_name(path)}.ipynb" for path in NOTEBOOKS}
    assert (pages / "_quarto.yml").is_file() and not (pages / "_quarto.yml").is_symlink()
    core = json.loads((pages / "library" / "core.ipynb").read_text(encoding="utf-8"))
    text = "".join("".join(cell["source"]) for cell in core["cells"])
    assert "image_grid" in text and "default_exp" not in text
    check_links(docs / "_site")


def test_pages_fit_their_screens(request):
    browser = find_browser() # before a site is made in vain
    check_in_a_browser(browser, request.getfixturevalue("docs") / "_site", None if request.config.getoption("--slow") else 6)


class Reader(HTMLParser):
    "The ids, links and pictures of a page."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.pictures = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if "id" in found: self.ids.append(found["id"])
        if tag == "a": self.links.append(found.get("href", ""))
        if tag in ("script", "link"): self.links.append(found.get("src") or found.get("href"))
        if tag == "img": self.pictures.append((found.get("src", ""), found.get("alt", "")))


def check_links(site):
    "Every link and anchor within the site leads somewhere, and every picture says what it shows."
    pages = {path.resolve(): Reader(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    for path, page in pages.items():
        assert len(page.ids) == len(set(page.ids)), path
        for link in page.links + [source for source, _ in page.pictures]:
            if re.match(r"https?://|data:|mailto:", link): continue
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.is_relative_to(site.resolve()), f"{path.name}: {link} leaves the site"
            assert target.is_file(), f"{path.name}: {link}"
            assert not anchor or anchor in pages[target].ids, f"{path.name}: {link}"
        assert all(alt.strip() for _, alt in page.pictures), path
        for source, _ in page.pictures:
            kept = re.match(r"data:image/(png|jpeg);base64,(.*)", source, re.S)
            if kept: Image.open(io.BytesIO(base64.b64decode(kept[2]))).verify()
    assert {link for page in pages.values() for link in page.links} and not any(link.endswith(".ipynb") and not link.startswith("http") for page in pages.values() for link in page.links)


TRY = """<script>async function all() {
  const found = [], frame = document.createElement('iframe');
  document.body.append(frame); frame.style.height = '900px';
  for (const page of PAGES) {
    frame.style.width = '1280px';
    await new Promise(done => { frame.onload = done; frame.src = page });
    const inside = frame.contentDocument;
    for (const width of [360, 768, 1280]) {
      frame.style.width = width + 'px';
      const wide = inside.documentElement.scrollWidth;
      if (wide > width) found.push(page + ': ' + wide + ' pixels wide on a screen of ' + width);
    }
    if (page == PAGES[0]) {
      const field = inside.getElementById('search'); field.value = 'lora'; field.oninput();
      if (!inside.querySelector('#found a')) found.push('nothing is found');
      const before = inside.documentElement.dataset.theme; inside.getElementById('theme').click();
      if (inside.documentElement.dataset.theme == before) found.push('light stays light');
    }
  }
  document.title = 'done'; document.body.textContent = JSON.stringify({pages: PAGES.length, found});
}
addEventListener('load', all)</script>"""


def find_browser():
    "Chromium; a test that wants it is skipped where there is none."
    return chromium() or pytest.skip("no Chromium: what the pages look like was not tried")


def check_in_a_browser(browser, site, count=None):
    "Each page, or so many, at the width of a phone, a tablet and a screen."
    names = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    names.sort(key=lambda name: (name != "index.html", -(site / name).stat().st_size))
    names = names[:count]
    (site / "try.htm").write_text(f"<!doctype html><body><script>const PAGES = {json.dumps(names)}</script>{TRY}</body>", encoding="utf-8")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--window-size=1400,1000", "--timeout=300000",
             "--virtual-time-budget=600000", "--dump-dom", (site / "try.htm").as_uri()]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=400).stdout
    found = json.loads(re.search(r"<body[^>]*>(\{.*\})</body>", shown, re.S)[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found == dict(pages=len(names), found=[])


def test_without_a_browser_the_test_says_that_it_tried_nothing(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="no Chromium"): find_browser()


@pytest.mark.parametrize("link, wrong", [("a.html", None), ("https://example.org", None), ("../LICENSE", "leaves the site"), ("b.html", "b.html")])
def test_a_link_that_leaves_the_site_is_noticed(tmp_path, link, wrong):
    "Also where there is a file, as beside a site that was made in a checkout."
    (tmp_path / "LICENSE").touch()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "a.html").write_text(f'<a href="{link}">x</a>', encoding="utf-8")
    with pytest.raises(AssertionError, match=wrong) if wrong else nullcontext(): check_links(tmp_path / "site")


def test_headings_get_the_ids_that_quarto_gives_them():
    assert [slug(text) for text in ("What does noise do?", "A  b, c", "v_prediction", "???")] == ["what-does-noise-do", "a-b-c", "v_prediction", "section"]


@pytest.mark.parametrize("source, made", [pytest.param("1 / 0", False, marks=pytest.mark.slow), ("import sys\nif __name__ == '__main__': sys.exit('the end')", False),
                                          ("if __name__ == '__main__' and __spec__: sys.exit('the end')", True)])
def test_a_page_that_cannot_be_made_is_noticed(fresh_copy, source, made):
    "Among them a page that ends at its __main__ guard; the guard that the pages have does not."
    page = fresh_copy / "nbs" / "library" / "core.ipynb"
    for path in (fresh_copy / "nbs").rglob("*.ipynb"):
        if path != page: path.unlink()
    nb = json.loads(page.read_text(encoding="utf-8"))
    nb["cells"].append({"cell_type": "code", "execution_count": None, "id": "broken00", "metadata": {}, "outputs": [], "source": "#| export\n" + source})
    page.write_text(json.dumps(nb), encoding="utf-8")
    assert (make_docs(fresh_copy).returncode == 0) == made
