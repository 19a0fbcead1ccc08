"Every notebook runs from top to bottom, as Run All in plain Jupyter does, and what it stored is what it shows."
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook, new_output

from course import NOTEBOOKS, ROOT, environment, execute, is_skipped, read
from kernels import warm


@pytest.fixture(scope="session")
def kernel(checkout, cache):
    "The command of a kernel that has the libraries in memory, but nothing of the course."
    with warm(environment(checkout, cache)) as command: yield command


def shown(cell):
    "The kinds of output that a reader sees under a cell; warnings depend on versions and do not count."
    return {output.output_type for output in cell.outputs if output.get("name") != "stderr"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, checkout, cache, kernel):
    nb = read(path)
    ran = execute(nb, checkout / path.parent.relative_to(ROOT), environment(checkout, cache), kernel)
    stale = [i for i, (old, new) in enumerate(zip(nb.cells, ran.cells))
             if old.cell_type == "code" and not is_skipped(old) and shown(old) != shown(new)]
    assert stale == [], f"run python tests/refresh.py {path.stem}"


# ------------------------------------------------ the runner itself

@pytest.fixture(params=["plain", "warm"])
def either(request, kernel):
    "A plain kernel and a warm one."
    return kernel if request.param == "warm" else None


def pages(*sources): return new_notebook(cells=[new_code_cell(source) for source in sources])


def printed(nb): return "".join(output.text for cell in nb.cells for output in cell.outputs if output.get("name") == "stdout")


def test_flagged_cells_keep_their_outputs(tmp_path, either):
    nb = pages("print(1 + 1)", "#| gpu\nraise SystemError")
    nb.cells[1].outputs = [new_output("stream", text="measured long ago\n")]
    ran = execute(nb, tmp_path, kernel=either)
    assert ran.cells[0].outputs[0].text == "2\n"
    assert ran.cells[1].source == nb.cells[1].source and ran.cells[1].outputs[0].text == "measured long ago\n"


@pytest.mark.parametrize("source", ["assert 0, 'mistake'", "#| eval: false\nassert 0, 'mistake'"])
def test_an_error_stops_the_run(tmp_path, either, source):
    with pytest.raises(CellExecutionError, match="mistake"): execute(pages(source), tmp_path, kernel=either)


@pytest.mark.parametrize("wish, said", [("", "Left out, since it takes long"), ("1", "after an hour")])
def test_run_all_in_jupyter_leaves_out_what_takes_long(tmp_path, wish, said):
    nb = pages("from sdxl_course.core import seeded", "#| slow\nprint('after', 'an hour')", "print('then this')")
    client = NotebookClient(nb, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    with client.setup_kernel(env=environment() | {"SDXL_COURSE_SLOW": wish}):
        for i, cell in enumerate(nb.cells): client.execute_cell(cell, i)
    assert printed(nb).startswith(said) and printed(nb).endswith("then this\n")


def test_running_does_not_change_what_was_given(tmp_path):
    nb = pages("print(1)")
    before = nbformat.writes(nb)
    execute(nb, tmp_path)
    assert nbformat.writes(nb) == before


def test_a_main_guard_does_not_end_the_page(tmp_path, either):
    ran = execute(pages("import sys", "if __name__ == '__main__' and __spec__: sys.exit('the end')", "print('still here')"), tmp_path, kernel=either)
    assert printed(ran) == "still here\n"


def test_a_page_starts_with_nothing(tmp_path, checkout, either):
    "Only its folder, its environment and the path to the course; libraries in memory have no names in it."
    look = ("import os, sys", "print(os.getcwd(), os.environ['WORD'], os.environ['MPLBACKEND'])",
            "print('torch' in globals(), [name for name in sys.modules if name.split('.')[0] in ('sdxl_course', 'course', 'kernels')])",
            "print(sorted(entry for entry in sys.path if 'site-packages' not in entry and 'lib' not in entry))")
    ran = [execute(pages(*look), tmp_path, environment(checkout) | {"WORD": word}, either) for word in ("one", "two")]
    for nb, word in zip(ran, ("one", "two")):
        assert printed(nb).splitlines() == [f"{tmp_path} {word} module://matplotlib_inline.backend_inline", "False []", f"['', '{checkout}']"]


def test_plots_belong_in_the_page(tmp_path, either):
    ran = execute(pages("import matplotlib.pyplot as plt", "plt.plot([1, 2]);"), tmp_path, kernel=either)
    assert shown(ran.cells[1]) == {"display_data"}


def test_a_page_can_be_given_up(tmp_path, either):
    "A cell that takes too long, and a process that dies, end in an error; the next page runs."
    with pytest.raises(CellTimeoutError): execute(pages("import time\ntime.sleep(600)"), tmp_path, kernel=either, timeout=4)
    with pytest.raises(DeadKernelError): execute(pages("import os\nos._exit(1)"), tmp_path, kernel=either)
    assert printed(execute(pages("print(1)"), tmp_path, kernel=either)) == "1\n"
