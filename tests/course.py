"What the tests and tests/refresh.py know about the course: where things are, how a notebook is read, run and judged."
import ast
import configparser
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
settings = configparser.ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = settings["DEFAULT"]
LIB = ROOT / SETTINGS["lib_path"]
SKIP_FLAGS = set(SETTINGS["tst_flags"].split())
NOTEBOOKS = sorted(path for path in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts))
EXPORTS = {"export", "exports", "exporti"}


# ---------------------------------------------------------------- reading

def read(path):
    "A notebook, with sources as strings."
    return nbformat.read(path, as_version=4)


def directives(cell):
    "The directives of a code cell: name -> words after it."
    found = {}
    for line in cell.source.splitlines():
        match = re.match(r"#\s*\|\s*([\w-]+)\s*:?\s*(.*)", line)
        if match: found[match[1]] = match[2].strip()
        elif line.strip(): break
    return found


def default_exp(nb):
    "The module that a notebook exports, or None."
    names = [directives(cell)["default_exp"] for cell in nb.cells if cell.cell_type == "code" and "default_exp" in directives(cell)]
    return names[0] if names else None


def is_skipped(cell):
    "Is this cell left alone when notebooks are run here?"
    found = directives(cell)
    return cell.cell_type == "code" and (bool(found.keys() & SKIP_FLAGS) or found.get("eval", "").lower() == "false")


def code_cells(nb):
    "Code cells that hold code, with their numbers; directives alone do not count."
    bare = lambda source: "\n".join(line for line in source.splitlines() if not line.lstrip().startswith("#")).strip()
    return [(i, cell) for i, cell in enumerate(nb.cells) if cell.cell_type == "code" and bare(cell.source)]


def parse(cell):
    "The syntax tree of a code cell; lines for the shell or IPython are left out."
    lines = ["" if line.lstrip().startswith(("%", "!")) else line for line in cell.source.splitlines()]
    return ast.parse("\n".join(lines))


# ---------------------------------------------------------------- running

def environment(root=ROOT, cache=None):
    "Environment variables for a process that uses the course in `root`, offline and on two threads at most."
    found = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "TQDM_DISABLE": "1"}
    found.setdefault("OMP_NUM_THREADS", "2")
    found.pop("IN_TEST", None)
    found.pop("MPLBACKEND", None) # the kernel chooses: plots belong in the page
    found.pop("SDXL_COURSE_DEBUG", None)
    return found | ({"SDXL_COURSE_CACHE": str(cache)} if cache else {})


def execute(nb, folder, env=None, timeout=600):
    "Run a notebook in `folder`; flagged cells are neither run nor cleared. Returns the notebook with new outputs."
    nb = nbformat.from_dict(json.loads(json.dumps(nb)))
    kept = {i: (cell.source, cell.outputs) for i, cell in enumerate(nb.cells) if is_skipped(cell)}
    for i in kept: nb.cells[i].source = ""
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    with client.setup_kernel(env=env or environment()):
        for i, cell in enumerate(nb.cells): client.execute_cell(cell, i)
    for i, (source, outputs) in kept.items(): nb.cells[i].source, nb.cells[i].outputs = source, outputs
    return nb


def copy_course(to):
    "Copy the repository's own files, without environments and other people's debris."
    skip = shutil.ignore_patterns(".git", ".venv*", "venv", "_proc", "_docs", "__pycache__", "*.egg-info", "build", "dist",
                                  ".pytest_cache", ".hypothesis", "sdxl-course-demo", "runs", ".ipynb_checkpoints")
    return Path(shutil.copytree(ROOT, to, ignore=skip, symlinks=True))


# ---------------------------------------------------------------- README

def readme(nb):
    "README.md out of index.ipynb: text as it is, code and its printed output fenced, links moved up one folder."
    parts = ["<!-- Written by `python tests/refresh.py --readme` from nbs/index.ipynb. Edit that page. -->"]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\((?!https?:|#|/|\.\./)", "](nbs/", cell.source).replace("](../", "]("))
        elif cell.cell_type == "code" and "hide" not in directives(cell):
            parts.append(f"```python\n{cell.source}\n```")
            text = "".join(output.get("text", "") for output in cell.outputs)
            if text: parts.append(f"```\n{text.rstrip()}\n```")
    return "\n\n".join(part.strip() for part in parts) + "\n"


# ---------------------------------------------------------------- judging
# A rule takes a notebook's name and the notebook; it yields one sentence for each thing that is wrong.

HEADER = "| learn | need | time | cost | exports |"
KB = 1000


def text_of(output):
    "Everything in an output that is text."
    if "text" in output: yield output["text"]
    for kind, data in output.get("data", {}).items():
        if not kind.startswith("image/") or kind == "image/svg+xml": yield data if isinstance(data, str) else json.dumps(data)
    yield from output.get("traceback", [])


def header(name, nb):
    "Question, subtitle, and the table that says what the page costs and gives."
    if name == "index": return
    start = next((i for i, cell in enumerate(nb.cells) if cell.cell_type == "markdown"), len(nb.cells))
    leading = list(itertools.takewhile(lambda cell: cell.cell_type == "markdown", nb.cells[start:]))
    text = "\n".join(cell.source for cell in leading)
    if any(not all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in parse(cell).body) for i, cell in code_cells(nb) if i < start):
        yield "only imports may stand before the title"
    lines = [line.strip() for line in text.splitlines() if line.strip()][:5]
    if len(lines) != 5: yield "the page must begin with a title, a subtitle and a table of three lines"; return
    if not (lines[0].startswith("# ") and lines[0].endswith("?")): yield f"the title is not a question: {lines[0]!r}"
    if not lines[1].startswith("> "): yield f"the second line is not a subtitle: {lines[1]!r}"
    if lines[2] != HEADER or not re.fullmatch(r"(\|\s*:?-+:?\s*){5}\|", lines[3]): yield f"the table must begin {HEADER!r}"
    row = [one.strip() for one in lines[4].strip("|").split("|")]
    module = default_exp(nb)
    want = f"`{SETTINGS['lib_name']}.{module}`" if module else "-"
    if len(row) != 5 or not all(row): yield f"the table's row needs five entries: {lines[4]!r}"
    elif row[4] != want: yield f"the table says that the page exports {row[4]}, it is {want}"


def ending(name, nb):
    "Exercises with solutions that run, then what we have, then what comes next."
    if name == "index": return
    heads = re.findall(r"^## (.+)$", "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown"), re.M)
    want = ["Exercises", "What we now have", "Next"]
    if [head.strip() for head in heads[-3:]] != want: yield f"the page must end with the headings {want}, it ends with {heads[-3:]}"
    if not any("code-fold" in directives(cell) and not is_skipped(cell) for cell in nb.cells if cell.cell_type == "code"):
        yield "no exercise has a folded solution that is run"


def imports(name, nb):
    "Cells with imports hold nothing else; flagged cells hold none; nothing here imports nbdev."
    for i, cell in code_cells(nb):
        tree, found = parse(cell), directives(cell)
        kinds = (ast.Import, ast.ImportFrom)
        exported = bool(found.keys() & EXPORTS)
        inside = [node for node in (tree.body if exported else ast.walk(tree)) if isinstance(node, kinds)]
        if inside and not all(isinstance(node, kinds) for node in tree.body): yield f"cell {i} mixes imports with other code"
        if (inside or exported) and found.keys() & SKIP_FLAGS: yield f"cell {i} is flagged, but the docs would run it for its imports or exports"
        modules = [alias.name for node in ast.walk(tree) if isinstance(node, kinds) for alias in node.names]
        modules += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        if any(module.split(".")[0] == "nbdev" for module in modules): yield f"cell {i} imports nbdev, which readers do not have"


def is_check(node):
    "Does this piece of code fail when something is wrong?"
    if isinstance(node, ast.Assert): return True
    called = node.func if isinstance(node, ast.Call) else None
    name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
    return name.startswith("test_") or name in ("check", "ExceptionExpected", "expect_fail")


def checks(name, nb):
    "At least a quarter of the code cells check something."
    cells = code_cells(nb)
    checking = sum(any(is_check(node) for node in ast.walk(parse(cell))) for _, cell in cells)
    if checking * 4 < len(cells): yield f"{checking} of {len(cells)} code cells check something; a quarter must"


def budgets(name, nb):
    "Light enough to keep in a repository and to read."
    size = len(nbformat.writes(nb).encode())
    if size > 800 * KB: yield f"the notebook has {size // KB} KB, 800 is the limit"
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "code": continue
        for output in cell.outputs:
            size = len(json.dumps(output))
            if size > 120 * KB: yield f"an output of cell {i} has {size // KB} KB, 120 is the limit"
        lines = len([line for line in cell.source.splitlines() if line.strip() and not line.startswith("#|")])
        if directives(cell).keys() & EXPORTS and lines > 40: yield f"exported cell {i} has {lines} lines, 40 is the limit"


def outputs(name, nb):
    "What is stored is what a reader should see: no errors, no widgets, nothing that only one machine would print."
    for i, cell in code_cells(nb):
        for output in cell.outputs:
            if output.output_type == "error": yield f"cell {i} stored an error"
            if any("widget" in kind for kind in output.get("data", {})): yield f"cell {i} stored a widget, which shows nothing on a page"
            if any(re.search(r"/tmp/|\b0x[0-9a-f]{9,}", text) for text in text_of(output)): yield f"cell {i} printed a temporary path or address"


def secrets(name, nb):
    "No home folders and no tokens, in sources or outputs."
    for i, cell in enumerate(nb.cells):
        texts = [cell.source] + [text for output in cell.get("outputs", []) for text in text_of(output)]
        for text in texts:
            if re.search(r"(?<![\w.])/root\b|/home/\w|/Users/\w|[A-Z]:\\Users", text): yield f"cell {i} names a home folder"
            if re.search(r"\bhf_[A-Za-z0-9]{16,}", text): yield f"cell {i} holds what looks like a token"


def evaluated(name, nb):
    "Only a __main__ guard may be left unrun without a flag."
    for i, cell in code_cells(nb):
        if "eval" in directives(cell) and "__main__" not in cell.source: yield f"cell {i} is marked eval: false; flag it {sorted(SKIP_FLAGS)} or run it"
        body = parse(cell).body
        guarded = [node for node in body if isinstance(node, ast.If) and "__main__" in ast.dump(node.test)]
        if guarded and directives(cell).get("eval", "").lower() != "false": yield f"cell {i} has a __main__ guard, which runs in a notebook; mark it eval: false"
    if any(re.search(r"^\s*skip_(exec|showdoc)\s*:", cell.source, re.M) for cell in nb.cells if cell.cell_type == "raw"): yield "the page is skipped as a whole"


def prose(name, nb):
    "Short paragraphs in a quiet voice."
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "markdown": continue
        text = re.sub(r"```.*?```|`[^`]*`|\$[^$]*\$|!\[|^\|.*$", " ", cell.source, flags=re.S | re.M)
        words = len(text.split())
        if words > 120 and name != "index": yield f"markdown cell {i} has {words} words, 120 is the limit"
        if "!" in text: yield f"markdown cell {i} exclaims"
        if re.search("[\U0001F300-\U0001FAFF\u2705\u274C\u26A0\u2728]", text): yield f"markdown cell {i} holds an emoji"
    for i, cell in code_cells(nb):
        names = {node.id for node in ast.walk(parse(cell)) if isinstance(node, ast.Name)}
        if any(not one.isascii() for one in names): yield f"cell {i} has names outside ASCII"


RULES = {rule.__name__: rule for rule in (header, ending, imports, checks, budgets, outputs, secrets, evaluated, prose)}
