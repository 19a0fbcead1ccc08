"The parts of the repository agree with each other."
import ast
import re
import subprocess
import sys

import pytest
import yaml

from course import LIB, NBS, NOTEBOOKS, ROOT, SETTINGS, default_exp, environment, read, readme

EXPORTING = {path: name for path in NOTEBOOKS if (name := default_exp(read(path)))}
MODULES = sorted(path for path in LIB.rglob("*.py") if path.name not in ("__init__.py", "_modidx.py"))
ORDER = {name: path.stem for path, name in EXPORTING.items()}


# ------------------------------------------------ notebooks and modules

def test_no_two_notebooks_export_the_same_module():
    assert len(set(EXPORTING.values())) == len(EXPORTING)


def test_every_module_has_its_notebook_and_the_reverse():
    assert {path.relative_to(LIB).with_suffix("").as_posix() for path in MODULES} == set(EXPORTING.values())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_named_after_its_module(path):
    match = re.fullmatch(r"(\d\d)_(\w+)", path.stem)
    if path in EXPORTING: assert match and match[2] == EXPORTING[path]
    else: assert path.stem == "index" or (match and int(match[1]) >= 80), "a page that exports nothing has a number from 80 on"


def course_imports(tree):
    "The modules of the course that a tree imports, at whatever depth."
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level: yield from [node.module] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == LIB.name: yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(LIB.name + "."): yield node.module.split(".")[1]
        elif isinstance(node, ast.Import): yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith(LIB.name + "."))


def uphill(name, text):
    "Imports of a module that do not go to a lower number."
    return [other for other in course_imports(ast.parse(text)) if other in ORDER and ORDER[other] >= ORDER[name]]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_import_only_lower_numbers(path):
    assert path.stem in ORDER and uphill(path.stem, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("line", ["from .cli import main", "from sdxl_course.cli import main", "import sdxl_course.cli as c",
                                  "from sdxl_course import cli", "from . import cli", "def f():\n    from .cli import main", "from .core import check"])
def test_an_uphill_import_is_noticed(line):
    assert uphill("core", line)


def test_exported_modules_are_what_the_notebooks_say(fresh_copy):
    before = {path.name: path.read_bytes() for path in LIB.glob("*.py")}
    for path in (fresh_copy / LIB.name).glob("*.py"): path.unlink()
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=fresh_copy, env=environment(fresh_copy), check=True)
    after = {path.name: path.read_bytes() for path in (fresh_copy / LIB.name).glob("*.py")}
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == set(), "run nbdev_export"


def test_notebooks_are_clean(fresh_copy):
    subprocess.run([sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()"], cwd=fresh_copy, env=environment(fresh_copy), check=True)
    changed = [path.name for path in NOTEBOOKS if path.read_bytes() != (fresh_copy / path.relative_to(ROOT)).read_bytes()]
    assert changed == [], "run nbdev_clean"


# ------------------------------------------------ README, site, settings

def test_readme_is_the_index_page():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(read(NBS / "index.ipynb")), "run python tests/refresh.py --readme"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_index_lists_every_page():
    listed = re.findall(r"\]\((\w+\.ipynb)\)", "\n".join(cell.source for cell in read(NBS / "index.ipynb").cells))
    assert sorted(set(listed)) == [path.name for path in NOTEBOOKS if path.stem != "index"]


def test_quarto_file_and_its_link_read_the_same():
    cure = "nbs/_quarto.yml must be a link to ../_quarto.yml; on Windows run: git config core.symlinks true, then git checkout nbs/_quarto.yml"
    assert (NBS / "_quarto.yml").read_text(encoding="utf-8") == (ROOT / "_quarto.yml").read_text(encoding="utf-8"), cure


def test_sidebar_lists_every_page():
    def pages(entries):
        for entry in entries: yield from [entry] if isinstance(entry, str) else pages(entry["contents"])
    sidebar = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    assert sorted(pages(sidebar)) == sorted(path.name for path in NOTEBOOKS)


def test_versions_agree():
    assert f'__version__ = "{SETTINGS["version"]}"' in (LIB / "__init__.py").read_text(encoding="utf-8")


def test_requirements_have_lower_bounds_only():
    "Single broken releases may be left out."
    assert [one for one in SETTINGS["requirements"].split() if not re.fullmatch(r"[\w-]+>=[\d.]+(,!=[\d.]+)*", one)] == []


def test_nothing_that_the_library_needs_is_missing_from_the_requirements():
    names = {"PIL": "pillow", "yaml": "pyyaml"}
    wanted = {re.split(">=", one)[0].lower() for one in SETTINGS["requirements"].split()}
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {module.split(".")[0] for module in modules}
    found -= set(sys.stdlib_module_names) | {LIB.name}
    optional = {"bitsandbytes", "prodigyopt", "schedulefree", "tensorboard", "wandb", "comet_ml", "trackio", "gradio", "IPython"}
    assert {names.get(name, name).lower() for name in found - optional} - wanted == set()


def test_ci_runs_the_command_that_the_readme_gives():
    command = 'pip install -e ".[dev]" && pytest'
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith(command)
