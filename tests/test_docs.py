"The pages of the site can be made. Quarto itself is not needed: this is the stage before it, which runs imports and exports."
import json
import subprocess
import sys

import pytest

from course import NOTEBOOKS, environment, page_name

STAGE = "from nbdev.serve import proc_nbs; proc_nbs(force=True, n_workers=0)"


def make_docs(root):
    return subprocess.run([sys.executable, "-c", STAGE], cwd=root, env=environment(root), capture_output=True, text=True)


def test_docs_stage(fresh_copy):
    made = make_docs(fresh_copy)
    assert made.returncode == 0, made.stderr[-3000:]
    pages = fresh_copy / "_proc"
    assert {path.relative_to(pages).as_posix() for path in pages.rglob("*.ipynb")} == {f"{page_name(path)}.ipynb" for path in NOTEBOOKS}
    assert (pages / "_quarto.yml").is_file() and not (pages / "_quarto.yml").is_symlink()
    core = json.loads((pages / "library" / "core.ipynb").read_text(encoding="utf-8"))
    text = "".join("".join(cell["source"]) for cell in core["cells"])
    assert "image_grid" in text and "default_exp" not in text


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
