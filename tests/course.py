"What the tests and tests/refresh.py know about the course: where things are, how a notebook is read, run and judged."
import ast
import configparser
import functools
import itertools
import json
import os
import re
import shutil
import statistics
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

# The rooms of the library, from the ground up: a room imports only from rooms before it. This is the one place where they stand in order.
ROOMS = """
slow_cells core devices foreign_flags options
world.shapes world.objects world.places world.scene world.textures world.trace world.render world.captions world.samples world.maps
model.folders model.components model.architecture model.conditioning model.noise model.consistency model.latents model.samplers model.prompts model.sampling model.refiner model.attention model.rank model.subspace model.lora model.lora_forward model.adapters model.lora_layouts model.lora_reading model.lora_files model.lora_factors model.lora_scales
model.lora_tools model.weight_files
model.words model.key_values model.control
data.files data.metadata data.records data.preprocess data.report data.tables data.check data.shards data.cache data.sampler data.loader data.resizing
train.machine train.sharding train.objective train.policy train.optimizer train.loop train.checkpoint train.changes train.validation train.results train.config train.prepare
train.weights train.control train.hub train.run train.build train.rounds train.pixels train.class_images train.concepts
text_to_image dreambooth full textual_inversion custom_diffusion controlnet t2i_adapter instruct_pix2pix lcm dpo unconditional
memory plan remake inference lora custom_merge measure.metrics measure.control measure.judges measure.distributions measure.subject measure.claims
measure.towers measure.pictures measure.timesteps measure.scores measure.report judge checkpoint_sweep evaluate rewards ddpo explain study demo sweep_drawings sweep overfit app
pretraining.stage pretraining.data pretraining.tokenizer pretraining.vae pretraining.judges pretraining.clip
pretraining.cache pretraining.alignment pretraining.unet pretraining.refiner pretraining.export
cli
""".split()
RECIPES = {"text_to_image", "dreambooth", "full", "textual_inversion", "custom_diffusion", "controlnet", "t2i_adapter", "instruct_pix2pix", "lcm", "dpo", "ddpo", "unconditional"}


# ---------------------------------------------------------------- reading

@functools.cache
def _read(path, changed): return nbformat.read(path, as_version=4)


def read(path):
    "A notebook, with sources as strings. It is parsed once for all who read it: not to be changed."
    return _read(path, path.stat().st_mtime_ns)


def page_name(path):
    "A page's name below nbs/: 15_lora, library/model_lora, index."
    return path.relative_to(NBS).with_suffix("").as_posix()


def kind(name):
    "What kind of page a name belongs to: a lesson, a workshop page of the library, or the index."
    return "index" if name == "index" else "workshop" if name.startswith("library/") else "lesson"


def directives(cell):
    "The directives of a code cell: name -> words after it."
    found = {}
    for line in cell.source.splitlines():
        match = re.match(r"#\s*\|\s*([\w-]+)\s*:?\s*(.*)", line)
        if match: found[match[1]] = match[2].strip()
        elif line.strip(): break
    return found


def default_exps(nb):
    "Every module that a notebook says it exports."
    return [directives(cell)["default_exp"] for cell in nb.cells if cell.cell_type == "code" and "default_exp" in directives(cell)]


def default_exp(nb):
    "The module that a notebook exports, or None."
    return next(iter(default_exps(nb)), None)


def is_skipped(cell):
    "Is this cell left alone when notebooks are run here?"
    return cell.cell_type == "code" and bool(directives(cell).keys() & SKIP_FLAGS)


def is_exported(cell):
    "Does this cell become part of the library?"
    return cell.cell_type == "code" and bool(directives(cell).keys() & EXPORTS)


def lines_of(cell):
    "A cell's lines of code: neither blank nor a directive."
    return [line for line in cell.source.splitlines() if line.strip() and not re.match(r"#\s*\|", line)]


def code_cells(nb):
    "Code cells that hold code, with their numbers; directives alone do not count."
    bare = lambda source: "\n".join(line for line in source.splitlines() if not line.lstrip().startswith("#")).strip()
    return [(i, cell) for i, cell in enumerate(nb.cells) if cell.cell_type == "code" and bare(cell.source)]


@functools.lru_cache(5000)
def _parse(source):
    lines = ["" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()]
    return ast.parse("\n".join(lines))


def parse(cell):
    "The syntax tree of a code cell, not to be changed; lines for the shell or IPython are left out."
    return _parse(cell.source)


IMPORTS = (ast.Import, ast.ImportFrom)


def holds_imports(cell):
    "Is an import among the statements of this cell?"
    return any(isinstance(node, IMPORTS) for node in parse(cell).body)


def public_names(nb):
    "What a page puts into its module's `__all__`: public functions, classes and values; not what is patched into a class."
    found = {}
    for _, cell in code_cells(nb):
        if not is_exported(cell) or "exporti" in directives(cell): continue
        for node in parse(cell).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                decorators = [getattr(one, "func", one) for one in node.decorator_list]
                if not any(getattr(one, "id", "").startswith("patch") for one in decorators): found[node.name] = None
            elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets: found |= {one.id: None for one in getattr(target, "elts", [target]) if isinstance(one, ast.Name)}
    return [name for name in found if not name.startswith("_")]


# ---------------------------------------------------------------- rooms

def room_of(path, lib=LIB):
    "A module's dotted name below the package."
    return ".".join(path.relative_to(lib).with_suffix("").parts)


def misplaced(modules, rooms=ROOMS):
    "Modules that have no place in the order, and places without a module; one sentence each."
    for name in modules:
        if name not in rooms: yield f"{name} has no place in the order of rooms: add it to ROOMS in tests/course.py, after every room that it imports"
    for name in rooms:
        if name not in modules: yield f"ROOMS in tests/course.py lists {name}, which no page exports: take it out, or correct the name"
        if rooms.count(name) > 1: yield f"ROOMS in tests/course.py lists {name} more than once"


def course_imports(room, tree, rooms=ROOMS):
    "The rooms that a room imports, at whatever depth."
    def named(base, alias): # `from base import alias`: a module or a wing, or a name out of a module
        inner = f"{base}.{alias}".lstrip(".")
        return inner if any(f"{other}.".startswith(f"{inner}.") for other in rooms) else base
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix(f"{LIB.name}.") for alias in node.names if alias.name.startswith(f"{LIB.name}."))
        elif isinstance(node, ast.ImportFrom):
            if node.level: base = ".".join([*room.split(".")[:-node.level], *filter(None, [node.module])])
            elif node.module and node.module.split(".")[0] == LIB.name: base = node.module.removeprefix(LIB.name).lstrip(".")
            else: continue
            yield from (named(base, alias.name) for alias in node.names)


def uphill(room, text, rooms=ROOMS):
    "Imports of a room, on top or inside functions, that do not go to a room before it."
    if room not in rooms: raise AssertionError(next(misplaced([room], rooms)))
    return sorted({other for other in course_imports(room, ast.parse(text), rooms)
                   if other not in ("", *rooms[:rooms.index(room)])})


def room_length(text):
    "Lines of a generated module from its first cell on: docstring and `__all__` are not counted."
    lines = text.rstrip().splitlines()
    return len(lines) - next((i for i, line in enumerate(lines) if line.startswith("# %% ") and not line.startswith("# %% auto")), 0)


def too_long(room, text):
    "A sentence if a room is too long to be read at one go."
    limit = 200 if room in RECIPES else 400
    if (length := room_length(text)) > limit: yield f"{room} has {length} lines, {limit} is the limit: split it, or move what others need down"


# ---------------------------------------------------------------- running

def environment(root=ROOT, cache=None):
    "Environment variables for a process that uses the course in `root`, offline and on two threads at most."
    found = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "TQDM_DISABLE": "1"}
    found.setdefault("OMP_NUM_THREADS", "2")
    found.pop("IN_TEST", None)
    found.pop("MPLBACKEND", None) # the kernel chooses: plots belong in the page
    found.pop("SDXL_COURSE_DEBUG", None)
    return found | ({"SDXL_COURSE_CACHE": str(cache)} if cache else {})


def execute(nb, folder, env=None, kernel=None, timeout=600, slow=False):
    """Run a notebook in `folder`, with the command of a kernel or a plain one. Returns the notebook with new outputs.
    Flagged cells are neither run nor cleared; with `slow` those that only take long are run."""
    nb = nbformat.from_dict(json.loads(json.dumps(nb)))
    kept = {i: (cell.source, cell.outputs) for i, cell in enumerate(nb.cells)
            if is_skipped(cell) and not (slow and "slow" in directives(cell))}
    for i in kept: nb.cells[i].source = ""
    client = NotebookClient(nb, timeout=timeout, startup_timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    if kernel: client.create_kernel_manager().kernel_spec.argv = kernel
    with client.setup_kernel(env=(env or environment()) | {"SDXL_COURSE_SLOW": str(int(slow))}):
        for i, cell in enumerate(nb.cells): client.execute_cell(cell, i)
    for i, (source, outputs) in kept.items(): nb.cells[i].source, nb.cells[i].outputs = source, outputs
    return nb


def copy_course(to):
    "Copy the repository's own files, without environments and other people's debris."
    skip = shutil.ignore_patterns(".git", ".venv*", "venv", "_proc", "_docs", "__pycache__", "*.egg-info", "build", "dist",
                                  ".pytest_cache", ".hypothesis", "sdxl-course-demo", "runs", ".ipynb_checkpoints")
    return Path(shutil.copytree(ROOT, to, ignore=skip, symlinks=True))


def chromium():
    "The command of a browser, None where there is none."
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# ---------------------------------------------------------------- README

def readme(nb):
    "README.md out of index.ipynb: text as it is, code and its printed output fenced, links as they are from the repository's root."
    here = f"]({SETTINGS['git_url']}/blob/{SETTINGS['branch']}/" # on the site, what is not a page has its address on GitHub
    parts = ["<!-- Written by `python tests/refresh.py --readme` from nbs/index.ipynb. Edit that page. -->"]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\((?!https?:|#|/)", "](nbs/", cell.source).replace(here, "]("))
        elif cell.cell_type == "code" and "hide" not in directives(cell):
            parts.append(f"```python\n{cell.source}\n```")
            text = "".join(output.get("text", "") for output in cell.outputs)
            if text: parts.append(f"```\n{text.rstrip()}\n```")
    return "\n\n".join(part.strip() for part in parts) + "\n"


# what a fresh process prints as sdxl_course/help.json
HELPS = "import json; from sdxl_course.cli import *; print(json.dumps({word: written_help(word) for word in (*COMMANDS, *FURTHER)}, indent=1))"


# ---------------------------------------------------------------- judging
# A rule takes a page's name and the notebook; it yields one sentence for each thing that is wrong.

HEADER = "| learn | need | time | cost | exports |"
KB = 1000


def text_of(output):
    "Everything in an output that is text."
    if "text" in output: yield output["text"]
    for mime, data in output.get("data", {}).items():
        if not mime.startswith("image/") or mime == "image/svg+xml": yield data if isinstance(data, str) else json.dumps(data)
    yield from output.get("traceback", [])


def opening(nb):
    "The lines of text before the first code that is more than an import."
    start = next((i for i, cell in enumerate(nb.cells) if cell.cell_type == "markdown"), len(nb.cells))
    leading = itertools.takewhile(lambda cell: cell.cell_type == "markdown", nb.cells[start:])
    return [line.strip() for cell in leading for line in cell.source.splitlines() if line.strip()]


def headings(nb):
    "The titles of a page's sections."
    return [head.strip() for head in re.findall(r"^## (.+)$", "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown"), re.M)]


def solutions(nb):
    "The folded cells that hold an exercise's solution."
    return [cell for cell in nb.cells if cell.cell_type == "code" and "code-fold" in directives(cell)]


def header(name, nb):
    "A lesson begins with a question, a subtitle, and the table that says what it costs and gives."
    if kind(name) != "lesson": return
    start = next((i for i, cell in enumerate(nb.cells) if cell.cell_type == "markdown"), len(nb.cells))
    if any(not all(isinstance(node, IMPORTS) for node in parse(cell).body) for i, cell in code_cells(nb) if i < start):
        yield "only imports may stand before the title"
    lines = opening(nb)[:5]
    if len(lines) != 5: yield "the page must begin with a title, a subtitle and a table of three lines"; return
    if not (lines[0].startswith("# ") and lines[0].endswith("?")): yield f"the title is not a question: {lines[0]!r}"
    if not lines[1].startswith("> "): yield f"the second line is not a subtitle: {lines[1]!r}"
    if lines[2] != HEADER or not re.fullmatch(r"(\|\s*:?-+:?\s*){5}\|", lines[3]): yield f"the table must begin {HEADER!r}"
    row = [one.strip() for one in lines[4].strip("|").split("|")]
    module = default_exp(nb)
    want = f"`{SETTINGS['lib_name']}.{module}`" if module else "-"
    if len(row) != 5 or not all(row): yield f"the table's row needs five entries: {lines[4]!r}"
    elif row[4] != want: yield f"the table says that the page exports {row[4]}, it is {want}"


INSTALL = "#| colab\n%pip install -q sdxl_course"  # the package and nothing else; where it is there already, nothing at all


def colab(name, nb):
    "A lesson opens in Colab from a badge, and installs there what it needs."
    if kind(name) != "lesson": return
    link = f"https://colab.research.google.com/github/{SETTINGS['user']}/{SETTINGS['repo']}/blob/{SETTINGS['branch']}/nbs/{name}.ipynb"
    if not any(f"[![Open in Colab](" in cell.source and f"]({link})" in cell.source for cell in nb.cells if cell.cell_type == "markdown"):
        yield f"there is no badge that opens {link}"
    if [cell.source for cell in nb.cells if "pip install" in cell.source and cell.cell_type == "code"] != [INSTALL]: yield f"wanted one cell that installs: {INSTALL!r}"


def ending(name, nb):
    "A lesson ends with exercises whose solutions run, then what we have, then what comes next."
    if kind(name) != "lesson": return
    want = ["Exercises", "What we now have", "Next"]
    if headings(nb)[-3:] != want: yield f"the page must end with the headings {want}, it ends with {headings(nb)[-3:]}"
    if all(is_skipped(cell) for cell in solutions(nb)): yield "no exercise has a folded solution that is run"


def share(name, nb):
    "A lesson is read for its story: at most 30 % of its lines of code are exported."
    if kind(name) != "lesson": return
    every = sum(len(lines_of(cell)) for _, cell in code_cells(nb))
    exported = sum(len(lines_of(cell)) for _, cell in code_cells(nb) if is_exported(cell))
    if exported * 100 > every * 30: yield f"{exported} of {every} lines of code are exported; 30 % may be: move plumbing to a page in nbs/library"


def workshop(name, nb):
    "A workshop page says which module it is, imports once, uses every public name, and sets no exercises."
    if kind(name) != "workshop": return
    modules, lines = default_exps(nb), [*opening(nb), "", ""]
    if len(modules) != 1: yield f"the page needs exactly one default_exp, it has {len(modules)}"
    if lines[0] != f"# {default_exp(nb)}": yield f"the title must be the module's dotted name, '# {default_exp(nb)}', it is {lines[0]!r}"
    if not lines[1].startswith("> "): yield f"the second line is not a subtitle: {lines[1]!r}"
    importing = [i for i, cell in code_cells(nb) if is_exported(cell) and holds_imports(cell)]
    if len(importing) != 1: yield f"the page needs exactly one exported cell of imports, it has {len(importing)}: {importing}"
    used = set()
    for _, cell in code_cells(nb):
        if is_exported(cell) or is_skipped(cell): continue
        for node in ast.walk(parse(cell)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load): used.add(node.id)
            elif isinstance(node, ast.Attribute): used.add(node.attr)
    if unused := [one for one in public_names(nb) if one not in used]: yield f"no cell shows how to use {', '.join(unused)}"
    if "Exercises" in headings(nb) or solutions(nb): yield "exercises belong into a lesson"


def imports(name, nb):
    "Cells with imports hold nothing else; flagged cells hold none; nothing here imports nbdev."
    for i, cell in code_cells(nb):
        tree, exported = parse(cell), is_exported(cell)
        inside = [node for node in (tree.body if exported else ast.walk(tree)) if isinstance(node, IMPORTS)]
        if inside and not all(isinstance(node, IMPORTS) for node in tree.body): yield f"cell {i} mixes imports with other code"
        if (inside or exported) and is_skipped(cell): yield f"cell {i} is flagged, but the docs would run it for its imports or exports"
        modules = [alias.name for node in ast.walk(tree) if isinstance(node, IMPORTS) for alias in node.names]
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
        if not is_exported(cell): continue
        lines = lines_of(cell)
        if len(lines) > 30: yield f"exported cell {i} has {len(lines)} lines, 30 is the limit"
        for line in lines:
            if len(line) > 120: yield f"exported cell {i} has a line of {len(line)} characters, 120 is the limit: {line.strip()[:60]!r}"


def outputs(name, nb):
    "What is stored is what a reader should see: no errors, no widgets, nothing that only one machine would print."
    for i, cell in code_cells(nb):
        for output in cell.outputs:
            if output.output_type == "error": yield f"cell {i} stored an error"
            if any("widget" in mime for mime in output.get("data", {})): yield f"cell {i} stored a widget, which shows nothing on a page"
            if any(re.search(r"/tmp/|\b0x[0-9a-f]{9,}", text) for text in text_of(output)): yield f"cell {i} printed a temporary path or address"


def secrets(name, nb):
    "No home folders and no tokens, in sources or outputs."
    for i, cell in enumerate(nb.cells):
        texts = [cell.source] + [text for output in cell.get("outputs", []) for text in text_of(output)]
        for text in texts:
            if re.search(r"(?<![\w.])/root\b|/home/\w|/Users/\w|[A-Z]:\\Users", text): yield f"cell {i} names a home folder"
            if re.search(r"\bhf_[A-Za-z0-9]{16,}", text): yield f"cell {i} holds what looks like a token"


def evaluated(name, nb):
    "Run All reaches the end: nothing is left unrun without a flag, and a __main__ guard sleeps in a notebook."
    guard = ast.dump(ast.parse('__name__ == "__main__" and __spec__', mode="eval").body)
    for i, cell in code_cells(nb):
        if "eval" in directives(cell): yield f"cell {i} is marked eval, which plain Jupyter does not know; flag it {sorted(SKIP_FLAGS)} or run it"
        for node in ast.walk(parse(cell)):
            if isinstance(node, (ast.If, ast.IfExp)) and "'__main__'" in ast.dump(node.test) and ast.dump(node.test) != guard:
                yield f'cell {i} has a __main__ guard, which would end the page; write: if __name__ == "__main__" and __spec__: sys.exit(main())'
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


PERSON = r"[A-Z\u00c0-\u017f][\w\u2019'-]+"
CITATION = rf"(?:{PERSON}\s+(?:et\s+al\.?|and\s+others|and\s+colleagues|(?:and|&)\s+{PERSON}),?\s+\(?|{PERSON}(?:,\s+|\s+\())(?:19|20)\d\d\b"


def cited(name, nb):
    "A paper that a lesson names, as in (Heusel et al., 2017) or Gal et al. (2022), is a link to it."
    if kind(name) != "lesson": return
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "markdown": continue
        text = re.sub(r"```.*?```|`[^`]*`|\$[^$]*\$|\[[^\]]*\]\(https?://[^\s)]+\)", " ` ", cell.source, flags=re.S)
        for paper in re.findall(CITATION, text): yield f"markdown cell {i} names a paper without its link: {' '.join(paper.split())!r}"


RULES = {rule.__name__: rule for rule in (header, colab, ending, share, workshop, imports, checks, budgets, outputs, secrets, evaluated, prose, cited)}


def typical_length(pages):
    "The median number of lines of all exported cells that define something."
    return statistics.median(len(lines_of(cell)) for nb in pages for _, cell in code_cells(nb) if is_exported(cell) and not holds_imports(cell))
