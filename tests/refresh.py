"""Bring the course up to date after notebooks were edited: export, run, clean, write README.

    python tests/refresh.py                     all notebooks
    python tests/refresh.py 21_lora 30_data     these
    python tests/refresh.py --readme            README.md only

Cells flagged gpu, net, slow or colab are neither run nor cleared."""
import subprocess
import sys
import time

import nbformat

from course import NBS, NOTEBOOKS, ROOT, environment, execute, read, readme


def nbdev(code):
    "Run a line of nbdev in the repository."
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True)


def refresh(path):
    "Run one notebook in place; it is not touched if a cell fails."
    begin = time.perf_counter()
    nb = execute(read(path), path.parent, environment() | {"OMP_NUM_THREADS": "1"}) # one thread: the same numbers on every machine
    nbformat.write(nb, path)
    nbdev(f"from nbdev.clean import nbdev_clean; nbdev_clean(fname={str(path)!r})")
    print(f"{path.stem:<20} {time.perf_counter() - begin:6.1f} s {path.stat().st_size / 1000:6.0f} KB", flush=True)


def main(words):
    known = {path.stem: path for path in NOTEBOOKS}
    names = [word.removesuffix(".ipynb").removeprefix("nbs/") for word in words if word != "--readme"]
    if unknown := [name for name in names if name not in known]: sys.exit(f"no notebook {', '.join(unknown)}; known are {', '.join(known)}")
    if "--readme" not in words:
        nbdev("from nbdev.doclinks import nbdev_export; nbdev_export()")
        for name in names or known: refresh(known[name])
    (ROOT / "README.md").write_text(readme(read(NBS / "index.ipynb")), encoding="utf-8")


if __name__ == "__main__": main(sys.argv[1:])
