"""The whole site without Quarto: `python tests/render_site.py [--output _site]`.

nbdev processes the notebooks (the stage that Quarto would read from as well), and this turns them into HTML: navigation from
_quarto.yml, search, folded code, light and dark. Nothing is fetched, neither now nor by who reads it, and the pages open from a folder."""
import argparse
import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import latex2mathml.converter
import mistune
import yaml
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from course import ROOT, SETTINGS, environment

# It ends without ceremony: IPython would collect garbage once for each page, which takes four times as long as making them.
STAGE = "import os; from nbdev.serve import proc_nbs; proc_nbs(force=True, n_workers=0); os._exit(0)"


@dataclass
class Page:
    "One page of the site, as far as it is read."
    path: PurePosixPath  # relative to the site, ends in .html
    title: str
    description: str
    body: str = ""
    headings: list = field(default_factory=list)  # (level, id, text)
    sections: list = field(default_factory=list)  # (id, heading, text) for the search


# ---------------------------------------------------------------- words

def slug(text):
    "The id of a heading, as Quarto makes it."
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", text.lower()).strip()) or "section"


def colored(code, language):
    "Highlighted code."
    try: lexer = get_lexer_by_name(language or "text")
    except ClassNotFound: lexer = get_lexer_by_name("text")
    return f'<div class="code"><pre>{highlight(code, lexer, HtmlFormatter(nowrap=True))}</pre></div>'


class Writer(mistune.HTMLRenderer):
    "Markdown as the pages use it; remembers the headings."
    def __init__(self, page):
        super().__init__(escape=False)
        self.page, self.seen = page, {}

    def heading(self, text, level, **attributes):
        name = slug(html.unescape(re.sub("<[^>]+>", "", text)))
        count = self.seen[name] = self.seen.get(name, -1) + 1
        name += f"-{count}" if count else ""
        self.page.headings.append((level, name, re.sub("<[^>]+>", "", text)))
        return f'<h{level} id="{name}">{text}<a class="anchor" href="#{name}" aria-label="link to this section">#</a></h{level}>\n'

    def block_code(self, code, info=None): return colored(code, (info or "").split(" ")[0].strip("{}."))
    def table(self, text): return f'<div class="wide"><table>{text}</table></div>'
    def image(self, text, url, title=None): return f'<img src="{url}" alt="{html.escape(text or title or "picture", quote=True)}">'
    def link(self, text, url, title=None): return f'<a href="{re.sub(r"[.]ipynb(?=$|#)", ".html", url)}">{text}</a>'
    def inline_math(self, text): return latex2mathml.converter.convert(text)
    def block_math(self, text): return f'<div class="wide">{latex2mathml.converter.convert(text, display="block")}</div>'


def markdown(page):
    return mistune.create_markdown(renderer=Writer(page), plugins=["table", "strikethrough", "footnotes", "math", "url"])


# ---------------------------------------------------------------- cells

def directives(source):
    "The lines `#| name: value` at the head of a cell, and the rest."
    found, lines = {}, source.split("\n")
    while lines and (match := re.match(r"#\s*\|\s*([\w-]+)\s*:?\s*(.*)", lines[0])):
        found[match[1]] = match[2].strip().strip('"')
        lines.pop(0)
    return found, "\n".join(lines).strip("\n")


def plain(text): return re.sub(r"\x1b\[[0-9;]*m", "", "".join(text))


def output(one, page, write, told):
    "An output of a cell as HTML."
    if one["output_type"] == "stream": return f'<pre class="output">{html.escape(plain(one["text"]))}</pre>'
    data = one.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data: return ""
    if "text/html" in data: return f'<div class="wide">{"".join(data["text/html"])}</div>'
    if "image/svg+xml" in data: return "".join(data["image/svg+xml"])
    for kind in ("image/png", "image/jpeg"):
        if kind not in data: continue
        said = plain(data.get("text/plain", ""))
        question = next((text for level, _, text in reversed(page.headings) if level == 2), page.title)
        alt = told or f"{'figure' if said.startswith('<') or not said else said}: {question}"
        return f'<img src="data:{kind};base64,{"".join(data[kind]).strip()}" alt="{html.escape(alt, quote=True)}">'
    if "text/markdown" in data: return write("".join(data["text/markdown"]).removeprefix("---\n\n"))
    return f'<pre class="output">{html.escape(plain(data["text/plain"]))}</pre>' if "text/plain" in data else ""


def cell_html(cell, page, write):
    "One cell as HTML."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return "" if "AUTOGENERATED" in source else write(source)
    if cell["cell_type"] != "code": return ""
    told, code = directives(source)
    if told.get("include") == "false": return ""
    made = "".join(output(one, page, write, told.get("fig-alt", "")) for one in cell.get("outputs", [])) if told.get("output") != "false" else ""
    if told.get("echo") == "false" or not code: return made
    shown, fold = colored(code, "python"), told.get("code-fold", "false")
    if fold != "false":
        shown = f'<details{" open" if fold == "show" else ""}><summary>{html.escape(told.get("code-summary", "Code"))}</summary>{shown}{made}</details>'
        return shown
    return shown + made


def read_page(path, root):
    "A processed notebook as a page."
    nb = json.loads(path.read_text(encoding="utf-8"))
    head = next((yaml.safe_load("".join(cell["source"]).strip().strip("-")) for cell in nb["cells"] if cell["cell_type"] == "raw"), {}) or {}
    page = Page(PurePosixPath(path.relative_to(root).with_suffix(".html").as_posix()), str(head.get("title", path.stem)), str(head.get("description", "")))
    write = markdown(page)
    page.body = "\n".join(cell_html(cell, page, write) for cell in nb["cells"])
    pieces = re.split(r'<h[1-6] id="([^"]+)">(.*?)<a class="anchor"', page.body)
    text = lambda piece: re.sub(r"\s+", " ", html.unescape(re.sub(r"<img [^>]*>|<[^>]+>", " ", piece)))[:3000]
    page.sections = [("", page.title, f"{page.description} {text(pieces[0])}")]
    page.sections += [(pieces[i], text(pieces[i + 1]), text(pieces[i + 2])) for i in range(1, len(pieces) - 2, 3)]
    return page


# ---------------------------------------------------------------- the frame

STYLE = """
:root { --back: #fff; --fore: #1d2126; --soft: #5b6470; --line: #dfe3e8; --block: #f5f6f8; --accent: #0b62c4; color-scheme: light }
[data-theme=dark] { --back: #15181c; --fore: #dfe3e8; --soft: #9aa4b0; --line: #313840; --block: #1e2329; --accent: #78b2ff; color-scheme: dark }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--fore); font: 16px/1.6 system-ui, sans-serif }
a { color: var(--accent) } h1, h2, h3, h4 { line-height: 1.25; overflow-wrap: anywhere } h1 { margin-bottom: 0 } .lead { color: var(--soft); font-size: 1.1em; margin-top: .3em }
header { position: sticky; top: 0; z-index: 2; display: flex; gap: .8em; align-items: center; flex-wrap: wrap; padding: .5em 1em; background: var(--back); border-bottom: 1px solid var(--line) }
header .name { font-weight: 600; text-decoration: none; color: var(--fore) }
header input { flex: 1 1 9em; min-width: 0; max-width: 24em; padding: .35em .6em; border: 1px solid var(--line); border-radius: 6px; background: var(--block); color: var(--fore); font: inherit }
button { border: 1px solid var(--line); border-radius: 6px; background: var(--block); color: var(--fore); font: inherit; padding: .3em .6em; cursor: pointer }
#found { position: absolute; top: 100%; left: 1em; right: 1em; max-height: 70vh; overflow: auto; background: var(--back); border: 1px solid var(--line); border-radius: 6px; padding: .5em 1em; max-width: 44em }
#found a { display: block; padding: .35em 0; text-decoration: none } #found small { color: var(--soft); display: block; overflow-wrap: anywhere }
.frame { display: grid; grid-template-columns: 17em minmax(0, 1fr) 14em; gap: 2em; max-width: 90em; margin: 0 auto; padding: 0 1em }
nav { font-size: .9em; padding: 1em 0 } nav ul { list-style: none; padding-left: .8em; margin: .2em 0 } nav > ul { padding-left: 0 } nav a { text-decoration: none; color: var(--soft); overflow-wrap: anywhere }
nav a:hover, nav a[aria-current] { color: var(--accent) } nav summary { cursor: pointer }
.side, .toc { position: sticky; top: 3.6em; align-self: start; max-height: calc(100vh - 4em); overflow: auto }
main { padding: 1.2em 0 4em; min-width: 0 } main img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
main p, main li { overflow-wrap: anywhere } main details { border-left: 3px solid var(--line); padding-left: .8em; margin: .8em 0 }
code { font: .88em ui-monospace, monospace; background: var(--block); padding: .1em .3em; border-radius: 4px } pre { margin: 0; font: .85em/1.5 ui-monospace, monospace }
.code { background: var(--block); border: 1px solid var(--line); border-radius: 6px; padding: .7em .9em; overflow-x: auto; margin: .8em 0 } .output { padding: .2em .9em; overflow-x: auto; color: var(--soft); margin: .4em 0 }
.wide { overflow-x: auto; margin: .8em 0 } table { border-collapse: collapse; font-size: .93em } th, td { border-bottom: 1px solid var(--line); padding: .35em .7em; text-align: left; vertical-align: top }
.anchor { visibility: hidden; margin-left: .3em; text-decoration: none } :hover > .anchor { visibility: visible } blockquote { margin: 0; padding-left: 1em; border-left: 3px solid var(--line); color: var(--soft) }
footer { display: flex; justify-content: space-between; gap: 1em; flex-wrap: wrap; border-top: 1px solid var(--line); padding: 1em 0; margin-top: 3em; font-size: .9em }
@media (max-width: 1100px) { .frame { grid-template-columns: 15em minmax(0, 1fr) } .toc { display: none } }
@media (max-width: 760px) { .frame { display: block } .side { position: static; max-height: none } }
@media (min-width: 761px) { .menu > summary { display: none } }
"""

SCRIPT = """
const root = document.documentElement, kept = { get: () => { try { return localStorage.theme } catch { return null } }, set: v => { try { localStorage.theme = v } catch {} } };
root.dataset.theme = kept.get() || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light');
addEventListener('DOMContentLoaded', () => {
  document.getElementById('theme').onclick = () => kept.set(root.dataset.theme = root.dataset.theme == 'dark' ? 'light' : 'dark');
  const menu = document.querySelector('.menu'); if (menu && innerWidth > 760) menu.open = true;
  const field = document.getElementById('search'), found = document.getElementById('found'), top = document.body.dataset.top;
  field.oninput = () => {
    const words = field.value.toLowerCase().split(/\\s+/).filter(Boolean);
    found.replaceChildren(); found.hidden = !words.length; if (!words.length) return;
    const rank = one => words.reduce((sum, w) => sum + (one.h.toLowerCase().includes(w) ? 10 : 0), 0);
    const hits = SEARCH.filter(one => words.every(w => (one.p + ' ' + one.h + ' ' + one.t).toLowerCase().includes(w))).sort((a, b) => rank(b) - rank(a)).slice(0, 20);
    for (const one of hits) {
      const link = document.createElement('a'), small = document.createElement('small'), at = Math.max(0, one.t.toLowerCase().indexOf(words[0]) - 40);
      link.href = top + one.u; link.textContent = one.p + (one.h == one.p ? '' : ': ' + one.h); small.textContent = one.t.slice(at, at + 140); link.append(small); found.append(link);
    }
    if (!hits.length) found.textContent = 'nothing found';
  };
  field.onkeydown = event => { if (event.key == 'Escape') { field.value = ''; field.oninput() } };
});
"""


def sidebar(entries, pages, current, top):
    "The navigation as a list; sections fold, and the one of the current page is open."
    def item(entry):
        if isinstance(entry, str):
            page = pages[entry.replace(".ipynb", ".html")]
            here = ' aria-current="page"' if page is current else ""
            return f'<li><a href="{top}{page.path}"{here}>{html.escape(page.title)}</a></li>'
        inside = "".join(map(item, entry["contents"]))
        return f'<li><details{" open" if "aria-current" in inside else ""}><summary>{html.escape(entry["section"])}</summary><ul>{inside}</ul></details></li>'
    return f"<ul>{''.join(map(item, entries))}</ul>"


def in_order(entries):
    "The pages of the navigation, in reading order."
    return [name for entry in entries for name in ([entry.replace(".ipynb", ".html")] if isinstance(entry, str) else in_order(entry["contents"]))]


def frame(page, pages, entries):
    "A page within navigation, search and footer."
    top, order = "../"*(len(page.path.parts) - 1), in_order(entries)
    at = order.index(str(page.path)) if str(page.path) in order else None
    link = lambda k, sign: f'<a href="{top}{order[k]}">{sign.format(html.escape(pages[order[k]].title))}</a>' if at is not None and 0 <= k < len(order) else "<span></span>"
    contents = "".join(f'<li><a href="#{name}">{html.escape(html.unescape(text))}</a></li>' for level, name, text in page.headings if level == 2)
    source = f'{SETTINGS["git_url"]}/blob/{SETTINGS["branch"]}/nbs/{page.path.with_suffix(".ipynb")}'
    about = f'<a href="{source}">Notebook</a> · <a href="{SETTINGS["git_url"]}/issues/new">Report an issue</a>'
    name = SETTINGS["title"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(page.title)} · {name}</title><meta name="description" content="{html.escape(page.description, quote=True)}">
<link rel="stylesheet" href="{top}site.css"><script src="{top}site.js"></script><script src="{top}search.js" defer></script></head>
<body data-top="{top}"><header><a class="name" href="{top}index.html">{name}</a><input id="search" type="search" placeholder="Search" aria-label="Search">
<button id="theme" aria-label="light or dark">&#9680;</button><a href="{SETTINGS["git_url"]}">Repository</a><div id="found" hidden></div></header>
<div class="frame"><nav class="side" aria-label="pages"><details class="menu"><summary>Pages</summary>{sidebar(entries, pages, page, top)}</details></nav>
<main><h1>{html.escape(page.title)}</h1><p class="lead">{html.escape(page.description)}</p>
{page.body}
<footer>{link((at or 0) - 1, "&larr; {}") if at else "<span></span>"}<span>{about}</span>{link((at if at is not None else len(order)) + 1, "{} &rarr;")}</footer></main>
<nav class="toc" aria-label="on this page"><ul>{contents}</ul></nav></div></body></html>
"""


def render(processed, site):
    "Processed notebooks as a site; gives its pages."
    setup = yaml.safe_load((processed / "_quarto.yml").read_text(encoding="utf-8"))
    entries = setup["website"]["sidebar"]["contents"]
    pages = {str(page.path): page for page in (read_page(path, processed) for path in sorted(processed.rglob("*.ipynb")))}
    shutil.rmtree(site, ignore_errors=True)
    for name, page in pages.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(frame(page, pages, entries), encoding="utf-8")
    for path in processed.rglob("*"):
        if path.suffix in (".png", ".jpg", ".svg"):
            (site / path.relative_to(processed)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, site / path.relative_to(processed))
    light, dark = (HtmlFormatter(style=style).get_style_defs(place) for style, place in (("friendly", ".code"), ("github-dark", "[data-theme=dark] .code")))
    flat = lambda css: "\n".join(line for line in css.split("\n") if " { background" not in line and not line.startswith(("pre ", "td.", "span.")))
    (site / "site.css").write_text(STYLE + flat(light) + flat(dark), encoding="utf-8")
    (site / "site.js").write_text(SCRIPT, encoding="utf-8")
    index = [dict(u=name + (f"#{at}" if at else ""), p=page.title, h=heading, t=text) for name, page in pages.items() for at, heading, text in page.sections]
    (site / "search.js").write_text(f"const SEARCH = {json.dumps(index, ensure_ascii=False)};", encoding="utf-8")
    rows = [f"- [{pages[name].title}]({name}): {pages[name].description}" for name in in_order(entries)]
    about = f"# {SETTINGS['title']}\n\n> {SETTINGS['description']}\n\n## Pages\n\n"
    (site / "llms.txt").write_text(about + "\n".join(rows) + "\n", encoding="utf-8")
    return pages


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=str(ROOT / "_site"), help="folder of the site; an earlier one there is replaced")
    site = Path(parser.parse_args(argv).output)
    if site.exists() and not (site / "llms.txt").exists() and any(site.iterdir()): sys.exit(f"{site} holds something else: give another --output")
    subprocess.run([sys.executable, "-c", STAGE], cwd=ROOT, env=environment(ROOT), check=True)
    pages = render(ROOT / "_proc", site)
    print(f"{len(pages)} pages: open {site / 'index.html'}")


if __name__ == "__main__": main()
