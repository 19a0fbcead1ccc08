"""Bring the course up to date after notebooks were edited: export, run, clean, write README and the texts of --help.

    python tests/refresh.py                          all pages
    python tests/refresh.py 15_lora model_words      these, lessons or pages of the library, named without folder and ending
    python tests/refresh.py --slow 63_lcm            with the cells flagged slow as well
    python tests/refresh.py --readme                 README.md and sdxl_course/help.json only

Cells flagged gpu, net or colab are neither run nor cleared, and those flagged slow only with --slow."""
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import nbformat

from course import HELPS, LIB, NBS, NOTEBOOKS, ROOT, environment, execute, read, readme
from kernels import warm


def nbdev(code):
    "Run a line of nbdev in the repository."
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True)


def refresh(path, env, kernel, slow=False):
    "Run one notebook in place; it is not touched if a cell fails."
    begin = time.perf_counter()
    nb = execute(read(path), path.parent, env, kernel, 7200 if slow else 600, slow)
    nbformat.write(nb, path)
    nbdev(f"from nbdev.clean import nbdev_clean; nbdev_clean(fname={str(path)!r})")
    print(f"{path.stem:<20} {time.perf_counter() - begin:6.1f} s {path.stat().st_size / 1000:6.0f} KB", flush=True)


def main(words):
    known = {path.stem: path for path in NOTEBOOKS}
    names = [Path(word).name.removesuffix(".ipynb") for word in words if word not in ("--readme", "--slow")]
    if unknown := [name for name in names if name not in known]: sys.exit(f"no page {', '.join(unknown)}; known are {', '.join(known)}")
    if "--readme" not in words:
        nbdev("from nbdev.doclinks import nbdev_export; nbdev_export()")
        env = environment() | {"OMP_NUM_THREADS": "1"}  # one thread: the same numbers on every machine
        with warm(env) if len(names) != 1 else nullcontext() as kernel:
            for name in names or known: refresh(known[name], env, kernel, "--slow" in words)
    helps = subprocess.run([sys.executable, "-c", HELPS], cwd=ROOT, env=environment() | {"COLUMNS": "100"}, check=True, capture_output=True, text=True).stdout
    (LIB / "help.json").write_text(helps, encoding="utf-8")
    (ROOT / "README.md").write_text(readme(read(NBS / "index.ipynb")), encoding="utf-8")


if __name__ == "__main__": main(sys.argv[1:])
