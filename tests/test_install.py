"What `pip install sdxl_course` gives to someone who has no checkout."
import json
import os
import subprocess
import sys
import sysconfig
import time
import zipfile

import pytest

from course import LIB, environment, room_of


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of the repository."
    from course import copy_course
    folder = tmp_path_factory.mktemp("wheel")
    root = copy_course(folder / "source")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(root)], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    "A new virtual environment with the wheel; libraries are borrowed from this one, the course is not. Returns a function that runs in it."
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--ignore-installed", str(wheel)], check=True)
    found = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], capture_output=True, text=True, check=True)
    borrowed = dict.fromkeys([sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]])
    with open(os.path.join(found.stdout.strip(), "borrowed.pth"), "w") as file: file.write("\n".join(borrowed) + "\n")
    env = environment(cache=folder / "cache")
    env.pop("PYTHONPATH")
    env["HOME"] = str(folder)
    away = folder / "elsewhere"
    away.mkdir()
    def run(*words, timeout=600):
        return subprocess.run([scripts / words[0], *words[1:]], cwd=away, env=env, capture_output=True, text=True, timeout=timeout)
    run.folder = away
    return run


def test_wheel_holds_modules_and_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    data = [path for path in LIB.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {f"{LIB.name}/{path.relative_to(LIB).as_posix()}" for path in data} <= names
    assert not [name for name in names if name.startswith(("tests/", "nbs/", "data_samples/"))]


def test_the_course_comes_from_the_wheel(bare):
    found = bare("python", "-c", "import sdxl_course; print(sdxl_course.__file__)")
    assert found.returncode == 0 and str(LIB) not in found.stdout and "venv" in found.stdout


def test_import_is_light(bare):
    code = "import sys, time; t = time.perf_counter(); import sdxl_course; print(time.perf_counter() - t, 'torch' in sys.modules)"
    found = [bare("python", "-c", code).stdout.split() for _ in range(3)] # the quickest counts: another process may be in the way
    assert min(float(seconds) for seconds, _ in found) < 0.3 and {torch for _, torch in found} == {"False"}


@pytest.mark.parametrize("words", [(), ("text-to-image",), ("evaluate",)], ids=" ".join)
def test_help_is_quick(bare, words):
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        found = bare("sdxl-course", *words, "--help")
        seconds.append(time.perf_counter() - begin)
        assert found.returncode == 0 and "usage: sdxl-course" in found.stdout
    assert min(seconds) < 1


def test_every_module_can_be_imported(bare):
    names = sorted(room_of(path) for path in LIB.rglob("*.py") if not path.stem.startswith("_"))
    code = "import importlib, sys; [importlib.import_module(f'sdxl_course.{name}') for name in sys.argv[1:]]"
    found = bare("python", "-c", code, *names)
    assert found.returncode == 0, found.stderr[-3000:]


@pytest.mark.parametrize("words, sentence", [
    (["text-to-imge"], "did you mean text-to-image?"),
    (["text-to-image", "--pretrained_model_name_or_path", "tiny", "--train_data_dir", "no-such-folder"], "no-such-folder"),
])
def test_a_mistake_gets_one_sentence(bare, words, sentence):
    found = bare("sdxl-course", *words)
    assert found.returncode == 2 and sentence in found.stderr and "Traceback" not in found.stderr + found.stdout


def test_demo_away_from_the_repository(bare):
    found = bare("sdxl-course", "demo", "--steps", "2", "--num_prompts", "2", "--output_dir", "out")
    assert found.returncode == 0, found.stderr[-3000:]
    out = bare.folder / "out"
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["steps"] == 2 and len(report["losses"]) == 2 and len(report["prompts"]) == len(report["seeds"]) == 2
    for name in ("style_score_before", "style_score_after", "content_accuracy_before", "content_accuracy_after"): assert 0 <= report[name] <= 1
    assert report["seconds"] > 0 and report["peak_memory_bytes"] > 1e8
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("before_after.png", "loss.png"))
    assert list(out.rglob("pytorch_lora_weights.safetensors"))
