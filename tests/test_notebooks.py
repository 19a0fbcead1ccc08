"Every notebook keeps the house rules, and every rule notices when it is broken."
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course import INSTALL, NBS, NOTEBOOKS, RULES, page_name, read, typical_length


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_rule(path, rule):
    assert list(RULES[rule](page_name(path), read(path))) == []


def test_exported_cells_are_short():
    assert typical_length(map(read, NOTEBOOKS)) <= 12, "split exported cells: one definition each, or a few that belong together"


def test_all_notebooks_together_are_light():
    assert sum(path.stat().st_size for path in NBS.rglob("*") if path.is_file()) < 16_000_000


# ------------------------------------------------ the rules themselves

GUARD = "#| export\nif __name__ == '__main__' and __spec__: sys.exit(add())"


def notebook(*cells):
    "Markdown from strings, code from tuples."
    return new_notebook(cells=[new_markdown_cell(c) if isinstance(c, str) else new_code_cell(c[0]) for c in cells])


def lesson():
    "A small lesson that keeps every rule."
    nb = notebook("# How much is two and two?\n\n> A sum\n\n| learn | need | time | cost | exports |\n|---|---|---|---|---|\n"
                  "| adding | counting | 1 min | CPU, free | `sdxl_course.two` |\n\n[![Open in Colab](badge.svg)](https://colab.research.google.com/github/sdxl-course/sdxl_course/blob/main/nbs/07_two.ipynb)",
                  ("#| default_exp two",), ("#| export\nimport math",), ("import os\nfrom fastcore.test import test_eq",),
                  "## Does it add up?\n\nWe add with `math.fsum` ([Shewchuk, 1997](https://doi.org/10.1007/PL00009321)); see `x != y`.",
                  ("#| exports\ndef add(*terms):\n    import decimal\n    return math.fsum(terms)",),
                  ("test_eq(add(2, 2), 4)",), ("#| gpu\nadd(2, 3)",), (GUARD,), "## Exercises\n\nAdd three.",
                  ("mine = None\ncheck('three', mine, 3)",), ("#| code-fold: true\nassert add(1, 2) == 3\n" + "assert add(1, 3) == 4\n" * 9,),
                  "## What we now have\n\n- a sum", "## Next\n\nMore.")
    nb.cells[6].outputs = [new_output("stream", name="stdout", text="4\n")]
    nb.cells.append(new_code_cell(INSTALL))
    return nb


def workshop():
    "A small workshop page that keeps every rule."
    return notebook("# sums.two\n\n> Sums of a few terms", ("#| default_exp sums.two",), ("#| export\nimport math\nimport sys",),
                    ("#| hide\nfrom fastcore.test import test_eq",), "Adds without rounding in between.",
                    ("#| export\nUNIT = 1\n\ndef add(*terms): return math.fsum(terms)\n\ndef _half(x): return x / 2",), ("test_eq(add(UNIT, 2), 3)",),
                    ("#| export\n@patch\ndef twice(self:Sum): return 2 * self",), ("assert Sum(1).twice() == 2",),
                    ("#| exporti\ndef inner(): pass",), ("#| gpu\ntest_eq(add(2, 3), 5)",), (GUARD,))


GOOD = {"07_two": lesson, "library/sums_two": workshop}


def source(number, text):
    def change(nb): nb.cells[number].source = text
    return change


def replaced(number, old, new):
    def change(nb):
        assert old in nb.cells[number].source
        nb.cells[number].source = nb.cells[number].source.replace(old, new)
    return change


def output(kind, **given):
    def change(nb): nb.cells[6].outputs = [new_output(kind, **given)]
    return change


def printed(text): return output("stream", name="stdout", text=text)


def added(*sources):
    def change(nb): nb.cells.extend(new_code_cell(one) for one in sources)
    return change


BROKEN_LESSONS = [
    ("header", replaced(0, "two?", "two")),
    ("header", replaced(0, "> A sum", "A sum")),
    ("header", replaced(0, "| time |", "| duration |")),
    ("header", replaced(0, "| adding |", "|  |")),
    ("header", replaced(0, "sdxl_course.two", "sdxl_course.three")),
    ("header", replaced(0, "`sdxl_course.two`", "-")),
    ("header", source(1, "")),
    ("header", source(0, "# How much?\n\n> A sum")),
    ("header", lambda nb: nb.cells.insert(0, new_code_cell("early = 1"))),
    ("colab", replaced(0, "nbs/07_two.ipynb", "nbs/07_three.ipynb")),
    ("colab", replaced(14, "sdxl_course", "sdxl_course torch")),
    ("colab", added("%pip install torch")),
    ("ending", replaced(13, "## Next", "## Later")),
    ("ending", replaced(11, "#| code-fold: true\n", "")),
    ("ending", replaced(11, "#| code-fold: true\n", "#| code-fold: true\n#| slow\n")),
    ("share", replaced(5, "    import decimal\n", "    import decimal\n    terms\n    terms\n    terms\n")),
    ("imports", replaced(3, "import os", "import os\nos.getcwd()")),
    ("imports", replaced(2, "import math", "import math\nhalf = math.pi / 2")),
    ("imports", replaced(6, "test_eq", "def lazy():\n    import json\ntest_eq")),
    ("imports", replaced(7, "add(2, 3)", "import torch")),
    ("imports", replaced(7, "#| gpu", "#| gpu\n#| export")),
    ("imports", replaced(3, "import os", "from nbdev.showdoc import show_doc")),
    ("checks", added(*["add(1)"] * 12)),
    ("budgets", printed("x" * 120_001)),
    ("budgets", lambda nb: nb.cells.extend(new_markdown_cell("x" * 90_000) for _ in range(9))),
    ("budgets", replaced(5, "    import decimal\n", "    terms\n" * 29)),
    ("budgets", replaced(5, "(terms)", "(terms) #" + "." * 100)),
    ("outputs", output("error", ename="ValueError", evalue="no", traceback=[])),
    ("outputs", output("display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": "1"}})),
    ("outputs", printed("saved in /tmp/tmpab12/x.png")),
    ("outputs", printed("<object at 0x7f3a12345678>")),
    ("secrets", printed("loaded /" + "root/x")),
    ("secrets", printed("loaded /" + "home/ada/x")),
    ("secrets", output("execute_result", data={"text/plain": "/" + "Users/ada/x"})),
    ("secrets", replaced(6, "2, 2", "2, 2, token='hf" + "_" + "a" * 20 + "'")),
    ("secrets", source(4, "My folder is C:\\Users\\ada.")),
    ("evaluated", replaced(6, "test_eq", "#| eval: false\ntest_eq")),
    ("evaluated", replaced(8, "#| export\n", "#| export\n#| eval: false\n")),
    ("evaluated", replaced(8, " and __spec__", "")),
    ("evaluated", replaced(8, "== '__main__' and", "== '__main__' or")),
    ("evaluated", lambda nb: nb.cells.insert(0, nbformat.v4.new_raw_cell("---\nskip_exec: true\n---"))),
    ("prose", source(4, "word " * 121)),
    ("prose", source(4, "It works!")),
    ("prose", source(4, "It works \U0001F680.")),
    ("prose", replaced(10, "mine = None", "\u03b1 = mine = None")),
    ("cited", source(4, "It is exact (Shewchuk, 1997).")),
    ("cited", source(4, "Shewchuk (1997) adds without rounding.")),
    ("cited", source(4, "It is exact (Shewchuk et al. 1997, section 2).")),
    ("cited", source(4, "Shewchuk and\nothers (1997) add without rounding.")),
    ("cited", source(4, "| adding | Ogita and \u0141ucek-Rump, 2005 |")),
    ("cited", source(4, "[fsum](https://doi.org/10.1007/PL00009321) (Shewchuk, 1997) is exact.")),
    ("cited", source(4, "It is exact ([Shewchuk, 1997](08_three.ipynb)).")),
]
BROKEN_WORKSHOPS = [
    ("workshop", replaced(0, "# sums.two", "# Sums of two")),
    ("workshop", replaced(0, "# sums.two", "## sums.two")),
    ("workshop", replaced(0, "> Sums", "Sums")),
    ("workshop", source(1, "")),
    ("workshop", added("#| default_exp sums.three")),
    ("workshop", added("#| export\nimport json")),
    ("workshop", replaced(2, "#| export\n", "")),
    ("workshop", replaced(6, "UNIT", "1")),
    ("workshop", replaced(6, "add(UNIT, 2)", "UNIT + 2")),
    ("workshop", replaced(6, "test_eq(add(UNIT, 2), 3)", "'add', 'UNIT'")),
    ("workshop", replaced(6, "test_eq", "#| slow\ntest_eq")),
    ("workshop", replaced(5, "_half", "half")),
    ("workshop", added("#| export\n@dataclass\nclass Total: pass")),
    ("workshop", source(4, "## Exercises\n\nAdd three.")),
    ("workshop", replaced(6, "test_eq", "#| code-fold: true\ntest_eq")),
    ("checks", added(*["add(1)"] * 12)),
    ("budgets", added("#| export\n" + "UNIT\n" * 31)),
    ("evaluated", replaced(11, " and __spec__", "")),
]
BROKEN = [("07_two", *one) for one in BROKEN_LESSONS] + [("library/sums_two", *one) for one in BROKEN_WORKSHOPS]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", GOOD)
def test_a_good_page_passes(name, rule):
    assert list(RULES[rule](name, GOOD[name]())) == []


@pytest.mark.parametrize("number", range(len(BROKEN)), ids=lambda number: f"{BROKEN[number][1]}-{number}")
def test_a_broken_page_is_noticed(number):
    name, rule, change = BROKEN[number]
    nb = GOOD[name]()
    change(nb)
    assert list(RULES[rule](name, nb))


def test_every_rule_is_proved():
    assert {rule for _, rule, _ in BROKEN} == set(RULES)


def test_long_cells_are_noticed():
    short, long, imports = ((f"#| export\n{line * n}",) for line, n in (("UNIT\n", 10), ("UNIT\n", 20), ("import math\n", 1)))
    assert typical_length([notebook(short, long, long), notebook(imports, imports, imports)]) == 20
