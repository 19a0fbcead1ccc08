"What `import sdxl_course` gives: names that bring their module when they are asked for, and nothing before."
import importlib
import subprocess
import sys

import pytest
import sdxl_course
from course import environment


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


def test_an_unknown_name_is_an_ordinary_error():
    with pytest.raises(AttributeError, match="no attribute 'generat'"): sdxl_course.generat
    with pytest.raises(ImportError): exec("from sdxl_course import generat")


def test_a_star_brings_all_of_them():
    scope = {}
    exec("from sdxl_course import *", scope)
    assert set(sdxl_course.NAMES) <= set(scope)
