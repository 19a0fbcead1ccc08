"Every notebook runs from top to bottom, and what it stored is what it shows."
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook, new_output

from course import NOTEBOOKS, ROOT, environment, execute, is_skipped, read


def shown(cell):
    "The kinds of output that a reader sees under a cell; warnings depend on versions and do not count."
    return {output.output_type for output in cell.outputs if output.get("name") != "stderr"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, checkout, cache):
    nb = read(path)
    ran = execute(nb, checkout / path.parent.relative_to(ROOT), environment(checkout, cache))
    stale = [i for i, (old, new) in enumerate(zip(nb.cells, ran.cells))
             if old.cell_type == "code" and not is_skipped(old) and shown(old) != shown(new)]
    assert stale == [], f"run python tests/refresh.py {path.stem}"


# ------------------------------------------------ the runner itself

def test_flagged_cells_keep_their_outputs(tmp_path):
    flagged = new_code_cell("#| gpu\nraise SystemError", outputs=[new_output("stream", text="measured long ago\n")])
    ran = execute(new_notebook(cells=[new_code_cell("print(1 + 1)"), flagged, new_code_cell("#| eval: false\nraise SystemError")]), tmp_path)
    assert ran.cells[0].outputs[0].text == "2\n"
    assert ran.cells[1].source == flagged.source and ran.cells[1].outputs[0].text == "measured long ago\n"
    assert ran.cells[2].source.endswith("SystemError") and not ran.cells[2].outputs


def test_an_error_stops_the_run(tmp_path):
    with pytest.raises(CellExecutionError, match="mistake"): execute(new_notebook(cells=[new_code_cell("assert 0, 'mistake'")]), tmp_path)


def test_running_does_not_change_what_was_given(tmp_path):
    nb = new_notebook(cells=[new_code_cell("print(1)")])
    before = nbformat.writes(nb)
    execute(nb, tmp_path)
    assert nbformat.writes(nb) == before
