"The parts of the repository agree with each other."
import ast
import re
import subprocess
import sys

import pytest
import yaml
from nbformat.v4 import new_markdown_cell, new_notebook

from course import (LIB, NBS, NOTEBOOKS, RECIPES, ROOMS, ROOT, SETTINGS, course_imports, default_exp, environment, kind, misplaced, page_name, public_names, read,
                    readme, room_of, too_long, uphill)

EXPORTING = {path: name for path in NOTEBOOKS if (name := default_exp(read(path)))}
MODULES = {room_of(path): path for path in sorted(LIB.rglob("*.py")) if path.name not in ("__init__.py", "_modidx.py")}
LESSONS = [path.name for path in NOTEBOOKS if kind(page_name(path)) == "lesson"]


def text(room): return MODULES[room].read_text(encoding="utf-8")


# ------------------------------------------------ notebooks and modules

def test_no_two_notebooks_export_the_same_module():
    assert len(set(EXPORTING.values())) == len(EXPORTING)


def test_every_module_has_its_notebook_and_the_reverse():
    assert set(MODULES) == set(EXPORTING.values())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_the_right_name(path):
    name = page_name(path)
    if kind(name) == "workshop": assert name == f"library/{default_exp(read(path)).replace('.', '_')}", "a workshop page is named after its module, with _ for ."
    elif kind(name) == "lesson": assert re.fullmatch(r"\d\d_[a-z][a-z0-9_]*", name), "a lesson is nbs/NN_name.ipynb, its number says where it stands in the reading order"


def test_no_two_pages_have_the_same_name_or_number():
    assert len({path.stem for path in NOTEBOOKS}) == len(NOTEBOOKS)
    assert len({name[:2] for name in LESSONS}) == len(LESSONS)


@pytest.mark.parametrize("path", EXPORTING, ids=lambda path: path.stem)
def test_public_names_are_those_that_nbdev_finds(path):
    "The rule that each public name is used relies on it."
    exported = ast.literal_eval(re.search(r"^__all__ = (\[.*?\])$", text(EXPORTING[path]), re.M | re.S)[1])
    assert sorted(public_names(read(path))) == sorted(exported)


# ------------------------------------------------ rooms

def test_every_room_has_its_place():
    assert list(misplaced(MODULES)) == []


@pytest.mark.parametrize("modules, rooms, sentence", [
    (["core", "cli"], ["core"], "cli has no place in the order of rooms: add it to ROOMS in tests/course.py"),
    (["core"], ["core", "cli"], "lists cli, which no page exports"),
    (["core"], ["core", "core"], "lists core more than once"),
])
def test_a_misplaced_room_is_noticed(modules, rooms, sentence):
    assert sentence in " ".join(misplaced(modules, rooms))


@pytest.mark.parametrize("room", MODULES)
def test_rooms_import_only_downhill(room):
    assert uphill(room, text(room)) == [], f"{room} stands before these in ROOMS in tests/course.py: move code down, or the room up"


@pytest.mark.parametrize("room, line", [(room, line) for room, lines in {
    "core": ["from .cli import main", "from sdxl_course.cli import main", "import sdxl_course.cli as c", "from sdxl_course import cli", "from . import cli",
             "def f():\n    from .cli import main", "from .core import check", "from .model.noise import NoiseSchedule", "from .model import noise",
             "from sdxl_course.model import noise", "import sdxl_course.model.noise", "from . import model"],
    "model.noise": ["from .lora import inject_lora", "from . import lora", "from ..train.loop import fit", "from ..train import loop", "from .. import cli",
                    "from ..cli import main", "from ..model.noise import add_noise", "def f():\n    from ..data import cache", "from .nowhere import nothing"],
}.items() for line in lines])
def test_an_uphill_import_is_noticed(room, line):
    assert uphill(room, line)


@pytest.mark.parametrize("line", ["from ..core import check", "from .. import core", "from .conditioning import encode_prompts", "from . import conditioning",
                                  "import sdxl_course.core", "from sdxl_course.world import scene", "import torch", "from sdxl_course import __version__"])
def test_a_downhill_import_is_allowed(line):
    assert uphill("model.noise", line) == []


def test_the_trainer_knows_nothing_of_the_small_world():
    for room in MODULES:
        if room.split(".")[0] in ("core", "devices", "options", "model", "data", "train", *RECIPES):
            assert [other for other in course_imports(room, ast.parse(text(room))) if other.startswith("world.")] == [], room


def test_a_room_without_a_place_says_where_to_add_it():
    with pytest.raises(AssertionError, match="add it to ROOMS in tests/course.py"): uphill("model.nowhere", "import torch")


def test_the_map_shows_every_room():
    "Each room stands in the table in CONTRIBUTING, in the row of its wing, and rooms stand in their order."
    table = re.search(r"^## The rooms.*?(^\|.*?)^(?!\|)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M | re.S)[1]
    shown = []
    for row in table.splitlines()[2:]:
        wing = ""
        for word in re.findall(r"`(\w+/?)`|(;)", row.split("|")[1]):
            if word[1]: wing = ""
            elif word[0].endswith("/"): wing = word[0].replace("/", ".")
            else: shown.append(wing + word[0])
    assert shown == ROOMS


def test_the_front_page_lists_every_page_of_the_library_once():
    table = re.search(r"^\| wing \| modules.*?^(?!\|)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[0]
    linked = re.findall(r"\(nbs/([\w/]+)\.ipynb\)", table)
    assert sorted(linked) == sorted(set(linked))
    assert {path.stem for path in NOTEBOOKS if path.parent.name == "library"} <= {name.removeprefix("library/") for name in linked}


@pytest.mark.parametrize("room", MODULES)
def test_rooms_are_short(room):
    assert list(too_long(room, text(room))) == []


def test_a_long_room_is_noticed():
    module = lambda n: "# %% auto #0\n__all__ = [\n'a']\n\n# %% ../nbs/library/x.ipynb #1\n" + "x = 1\n" * (n - 1)
    for room, limit in [("model.noise", 400), *((recipe, 200) for recipe in RECIPES)]:
        assert not list(too_long(room, module(limit))) and list(too_long(room, module(limit + 1)))


def test_exported_modules_are_what_the_notebooks_say(fresh_copy):
    def files(lib): return {path.relative_to(lib).as_posix(): path.read_bytes() for path in lib.rglob("*.py")}
    before, lib = files(LIB), fresh_copy / LIB.name
    for room in MODULES: (lib / MODULES[room].relative_to(LIB)).unlink()
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=fresh_copy, env=environment(fresh_copy), check=True)
    after = files(lib)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == set(), "run nbdev_export"


def test_notebooks_are_clean(fresh_copy):
    subprocess.run([sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()"], cwd=fresh_copy, env=environment(fresh_copy), check=True)
    changed = [page_name(path) for path in NOTEBOOKS if path.read_bytes() != (fresh_copy / path.relative_to(ROOT)).read_bytes()]
    assert changed == [], "run nbdev_clean"


# ------------------------------------------------ README, site, settings

def test_the_stored_help_is_that_of_the_commands(monkeypatch):
    from sdxl_course.cli import COMMANDS, FURTHER, stored_help, written_help
    monkeypatch.setenv("COLUMNS", "100")
    assert [word for word in (*COMMANDS, *FURTHER) if stored_help(word) != written_help(word)] == [], "run python tests/refresh.py --readme"


def test_readme_is_the_index_page():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(read(NBS / "index.ipynb")), "run python tests/refresh.py --readme"


def test_readme_links_what_is_in_the_repository_without_its_address():
    here = f"{SETTINGS['git_url']}/blob/{SETTINGS['branch']}"
    cell = new_markdown_cell(f"[a](library/core.ipynb) [b]({here}/LICENSE) [c](https://example.org/{here}) [d](#top)")
    assert f"[a](nbs/library/core.ipynb) [b](LICENSE) [c](https://example.org/{here}) [d](#top)" in readme(new_notebook(cells=[cell]))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_between_pages_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown"))
    assert [link for link in links if "://" not in link and not ((path.parent / link).exists() and (path.parent / link).resolve().is_relative_to(NBS))] == [], "what is not a page has its address on GitHub"


def index_rows():
    "The rows of the index's tables that begin with a link to a page: the page, and the other entries."
    lines = "\n".join(cell.source for cell in read(NBS / "index.ipynb").cells).splitlines()
    return [(match[1], [one.strip() for one in match[2].split("|")]) for line in lines if (match := re.match(r"\| \[\w+\]\((\w+\.ipynb)\) \|(.*)\|$", line))]


def test_index_lists_every_lesson_in_reading_order():
    assert [name for name, _ in index_rows()] == LESSONS


def test_index_asks_what_the_lessons_ask():
    titles = {name: read(NBS / name).cells[0].source.splitlines()[0].removeprefix("# ") for name in LESSONS}
    assert [(name, rest[0]) for name, rest in index_rows() if titles.get(name) != rest[0]] == []


def test_index_links_every_page_of_the_library():
    listed = re.findall(r"\]\((library/\w+\.ipynb)\)", "\n".join(cell.source for cell in read(NBS / "index.ipynb").cells))
    assert sorted(set(listed)) == sorted(f"{page_name(path)}.ipynb" for path in EXPORTING if kind(page_name(path)) == "workshop")


def test_quarto_file_and_its_link_read_the_same():
    cure = "nbs/_quarto.yml must be a link to ../_quarto.yml; on Windows run: git config core.symlinks true, then git checkout nbs/_quarto.yml"
    assert (NBS / "_quarto.yml").read_text(encoding="utf-8") == (ROOT / "_quarto.yml").read_text(encoding="utf-8"), cure


def test_site_has_a_light_and_a_dark_theme():
    assert list(yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["format"]["html"]["theme"]) == ["light", "dark"], "the first one is the default"


def test_sidebar_lists_every_page():
    def pages(entries):
        for entry in entries: yield from [entry] if isinstance(entry, str) else pages(entry["contents"])
    sidebar = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    listed = list(pages(sidebar))
    assert sorted(listed) == sorted(f"{page_name(path)}.ipynb" for path in NOTEBOOKS)
    assert [name for name in listed if name in LESSONS] == LESSONS, "lessons stand in reading order"
    library = [default_exp(read(NBS / name)) for name in listed if name.startswith("library/")]
    assert library == sorted(library, key=ROOMS.index), "pages of the library stand in the order of the rooms"


def test_versions_agree():
    assert f'__version__ = "{SETTINGS["version"]}"' in (LIB / "__init__.py").read_text(encoding="utf-8")


def test_requirements_have_lower_bounds_only():
    "Single broken releases may be left out."
    assert [one for one in SETTINGS["requirements"].split() if not re.fullmatch(r"[\w-]+>=[\d.]+(,!=[\d.]+)*", one)] == []


def test_a_bound_that_no_set_of_versions_meets_is_named():
    from lower_bounds import bounds, requirements, unmet, versions
    required, further = requirements()
    oldest = bounds(required + further)
    assert len(bounds(required)) == len(required) and oldest["huggingface-hub"] and oldest["pytest"]
    resolved = versions("".join(f"{name}=={version}.0\n    # via x\n" for name, version in oldest.items()))
    assert unmet(oldest, resolved) == []
    said = unmet(oldest, dict(resolved, safetensors="99.1"))
    assert len(said) == 1 and said[0].startswith("safetensors>=") and "the oldest that can is 99.1" in said[0]


def test_nothing_that_the_library_needs_is_missing_from_the_requirements():
    names = {"PIL": "pillow", "yaml": "pyyaml"}
    wanted = {re.split(">=", one)[0].lower() for one in SETTINGS["requirements"].split()}
    found = set()
    for room in MODULES:
        for node in ast.walk(ast.parse(text(room))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {module.split(".")[0] for module in modules}
    found -= set(sys.stdlib_module_names) | {LIB.name}
    optional = {"bitsandbytes", "prodigyopt", "schedulefree", "tensorboard", "wandb", "comet_ml", "trackio", "gradio", "IPython"}
    assert {names.get(name, name).lower() for name in found - optional} - wanted == set()


TOP = {".ci", ".gitattributes", ".github", ".gitignore", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "_quarto.yml", "data_samples", "nbs", "sdxl_course",
       "settings.ini", "setup.py", "tests"}


def test_no_folder_of_a_run_was_committed():
    found = subprocess.run(["git", "-c", "core.quotePath=false", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode: pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in found.stdout.splitlines()} <= TOP


def test_ci_runs_the_command_that_the_readme_gives():
    command = 'pip install -e ".[dev]" && pytest'
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith(command)
