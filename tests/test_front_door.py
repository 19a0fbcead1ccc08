"What `import sdxl_course` gives: names that bring their module when they are asked for, and nothing before."
import gc
import importlib
import os
import subprocess
import sys

import pytest
import sdxl_course
from course import environment
from sdxl_course.cli import load_module


@pytest.mark.parametrize("name", sdxl_course.NAMES)
def test_every_name_is_that_of_its_module(name):
    scope = {}
    exec(f"from sdxl_course import {name}", scope)
    module = importlib.import_module(f"sdxl_course.{sdxl_course.NAMES[name]}")
    assert scope[name] is getattr(module, name) and name in module.__all__ and name in dir(sdxl_course)


@pytest.mark.parametrize("name", sdxl_course.NAMES)
def test_no_name_is_that_of_a_module(name):
    "An import of the module would put the module in its place."
    with pytest.raises(ModuleNotFoundError): importlib.import_module(f"sdxl_course.{name}")


def test_importing_the_package_is_light():
    code = "import sys, sdxl_course; dir(sdxl_course); print(sorted({'torch', 'numpy', 'diffusers', 'PIL'} & set(sys.modules)), sdxl_course.__version__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert found.stdout.split() == ["[]", sdxl_course.__version__]


@pytest.mark.parametrize("words", [["-m", "sdxl_course.text_to_image", "--help"], ["-m", "sdxl_course.inference", "-h"], ["-msdxl_course.data.check", "--help"], ["-X", "utf8", "-m", "sdxl_course.study", "--help"],
    ["-c", "import sys; from sdxl_course.cli import main; sys.exit(main(['dreambooth', '--help']))"]], ids=lambda words: words[-2][-20:])
def test_help_of_a_module_comes_without_torch(tmp_path, words):
    "Importing torch and the others takes seconds."
    for name in ("torch", "numpy", "PIL", "yaml", "fastcore"): (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    env = environment() | {"PYTHONPATH": f"{tmp_path}:{environment()['PYTHONPATH']}".replace(":", os.pathsep)}
    found = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)
    assert found.returncode == 0 and found.stderr == "" and found.stdout.startswith("usage: ") and found.stdout.endswith("\n") and "--help" in found.stdout
    other = subprocess.run([sys.executable, "-m", "sdxl_course.text_to_image", "--rank", "4"], capture_output=True, text=True, env=env)
    assert "torch was imported" in other.stderr or "numpy was imported" in other.stderr or "yaml was imported" in other.stderr or "fastcore was imported" in other.stderr


def test_modules_are_imported_without_looking_for_garbage_and_it_is_looked_for_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sdxl_course, "__path__", [*sdxl_course.__path__, str(tmp_path)])
    (tmp_path / "watcher.py").write_text("import gc; watched = gc.isenabled()")
    (tmp_path / "broken_watcher.py").write_text("1/0")
    assert not load_module("watcher").watched and gc.isenabled()
    with pytest.raises(ZeroDivisionError): load_module("broken_watcher")
    assert gc.isenabled()
    gc.disable()
    try: assert load_module("options") and not gc.isenabled()
    finally: gc.enable()


def test_a_run_starts_without_what_it_needs_later():
    code = "import sys, sdxl_course.text_to_image, sdxl_course.dreambooth; print(sorted({'matplotlib.figure', 'datasets', 'pandas', 'scipy', 'pyarrow'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert found.stdout.strip() == "[]"


def test_an_unknown_name_is_an_ordinary_error():
    with pytest.raises(AttributeError, match="no attribute 'generat'"): sdxl_course.generat
    with pytest.raises(ImportError): exec("from sdxl_course import generat")


def test_a_star_brings_all_of_them():
    scope = {}
    exec("from sdxl_course import *", scope)
    assert set(sdxl_course.NAMES) <= set(scope)
