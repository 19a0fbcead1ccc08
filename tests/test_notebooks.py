"Every notebook keeps the house rules, and every rule notices when it is broken."
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course import NBS, NOTEBOOKS, RULES, read


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_rule(path, rule):
    assert list(RULES[rule](path.stem, read(path))) == []


def test_all_notebooks_together_are_light():
    assert sum(path.stat().st_size for path in NBS.rglob("*") if path.is_file()) < 6_000_000


# ------------------------------------------------ the rules themselves

def page():
    "A small notebook that keeps every rule."
    cells = ["# How much is two and two?\n\n> A sum\n\n| learn | need | time | cost | exports |\n|---|---|---|---|---|\n"
             "| adding | counting | 1 min | CPU, free | `sdxl_course.two` |",
             ("#| default_exp two",), ("#| export\nimport math",), ("import os\nfrom fastcore.test import test_eq",),
             "## Does it add up?\n\nWe add with `math.fsum`; see `x != y`.", ("#| exports\ndef add(*terms):\n    import decimal\n    return math.fsum(terms)",),
             ("test_eq(add(2, 2), 4)",), ("#| gpu\nadd(2, 3)",), ("#| export\n#| eval: false\nif __name__ == '__main__': add()",),
             "## Exercises\n\nAdd three.", ("mine = None\ncheck('three', mine, 3)",), ("#| code-fold: true\nassert add(1, 2) == 3",),
             "## What we now have\n\n- a sum", "## Next\n\nMore."]
    nb = new_notebook(cells=[new_markdown_cell(c) if isinstance(c, str) else new_code_cell(c[0]) for c in cells])
    nb.cells[6].outputs = [new_output("stream", name="stdout", text="4\n")]
    return nb


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


BROKEN = [
    ("header", replaced(0, "two?", "two")),
    ("header", replaced(0, "> A sum", "A sum")),
    ("header", replaced(0, "| time |", "| duration |")),
    ("header", replaced(0, "| adding |", "|  |")),
    ("header", replaced(0, "sdxl_course.two", "sdxl_course.three")),
    ("header", source(1, "")),
    ("header", source(0, "# How much?\n\n> A sum")),
    ("header", lambda nb: nb.cells.insert(0, new_code_cell("early = 1"))),
    ("ending", replaced(13, "## Next", "## Later")),
    ("ending", replaced(11, "#| code-fold: true\n", "")),
    ("imports", replaced(3, "import os", "import os\nos.getcwd()")),
    ("imports", replaced(2, "import math", "import math\nhalf = math.pi / 2")),
    ("imports", replaced(6, "test_eq", "def lazy():\n    import json\ntest_eq")),
    ("imports", replaced(7, "add(2, 3)", "import torch")),
    ("imports", replaced(7, "#| gpu", "#| gpu\n#| export")),
    ("imports", replaced(3, "import os", "from nbdev.showdoc import show_doc")),
    ("checks", lambda nb: nb.cells.extend(new_code_cell("add(1)") for _ in range(12))),
    ("budgets", printed("x" * 120_001)),
    ("budgets", lambda nb: nb.cells.extend(new_markdown_cell("x" * 90_000) for _ in range(9))),
    ("budgets", replaced(5, "    import decimal\n", "    terms\n" * 39)),
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
    ("evaluated", replaced(8, "#| eval: false\n", "")),
    ("evaluated", lambda nb: nb.cells.insert(0, nbformat.v4.new_raw_cell("---\nskip_exec: true\n---"))),
    ("prose", source(4, "word " * 121)),
    ("prose", source(4, "It works!")),
    ("prose", source(4, "It works \U0001F680.")),
    ("prose", replaced(10, "mine = None", "\u03b1 = mine = None")),
]


@pytest.mark.parametrize("rule", RULES)
def test_a_good_page_passes(rule):
    assert list(RULES[rule]("07_two", page())) == []


@pytest.mark.parametrize("number", range(len(BROKEN)), ids=lambda number: f"{BROKEN[number][0]}-{number}")
def test_a_broken_page_is_noticed(number):
    rule, change = BROKEN[number]
    nb = page()
    change(nb)
    assert list(RULES[rule]("07_two", nb))


def test_every_rule_is_proved():
    assert {rule for rule, _ in BROKEN} == set(RULES)
