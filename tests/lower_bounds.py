"""Run the tests on the oldest versions of every library that settings.ini allows, as one set.

    python tests/lower_bounds.py                            all tests, in a new environment of the Python that runs this
    python tests/lower_bounds.py tests/test_lora.py -x      these words go to pytest
    python tests/lower_bounds.py --torch 2.13.0 ...         with another torch than the oldest, where only that one can be had

Wanted: uv (pip install uv), which finds the set. A bound that no set of versions can meet is named before anything is installed."""
import argparse
import configparser
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def requirements():
    "What the package and its tests require, one requirement each."
    section = configparser.ConfigParser(delimiters=["="], interpolation=None)
    section.read(ROOT/"settings.ini", encoding="utf-8")
    settings = section["DEFAULT"]
    return settings["requirements"].split(), settings["dev_requirements"].split()


def spelled(name): return re.sub(r"[-_.]+", "-", name).lower()


def bounds(words):
    "Oldest version of each library: of `torch>=2.6` it is 2.6."
    found = (re.match(r"([\w.-]+).*?>=([\w.]+)", word) for word in words)
    return {spelled(match[1]): match[2] for match in found if match}


def same_version(one, two):
    "Whether two versions are equal but for zeros at the end: 6.0 and 6.0.0."
    return re.sub(r"(\.0)+$", "", one) == re.sub(r"(\.0)+$", "", two)


def unmet(wanted, resolved):
    "The bounds that the set of versions does not reach, as sentences."
    return [f"{name}>={oldest} cannot be met beside the others: the oldest that can is {resolved[name]}"
        for name, oldest in wanted.items() if name in resolved and not same_version(oldest, resolved[name])]


def versions(pins):
    "Version of each library in a file of pins."
    return {spelled(name): version for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", pins, re.M)}


def uv(*words):
    "Run uv; it speaks only if something goes wrong."
    subprocess.run(["uv", *words, "--quiet"], check=True)


def main(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="version of torch instead of the oldest")
    args, rest = parser.parse_known_args(words)
    required, further = requirements()
    if args.torch: required = [f"torch=={args.torch}" if word.startswith("torch>") else word for word in required]
    if not shutil.which("uv"): sys.exit("uv is not installed, which finds the set: pip install uv")
    with tempfile.TemporaryDirectory(prefix="lower-bounds-") as folder:
        wanted, pins, venv = (Path(folder)/name for name in ("wanted.txt", "pins.txt", "venv"))
        wanted.write_text("\n".join(required + further), encoding="utf-8")
        uv("pip", "compile", "--resolution", "lowest-direct", "--no-annotate", "--python", sys.executable, wanted, "-o", pins)
        resolved = versions(pins.read_text(encoding="utf-8"))
        if said := unmet(bounds(required + further), resolved): sys.exit("\n".join(said))
        uv("venv", "--python", sys.executable, venv)
        target = venv/("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        uv("pip", "install", "--python", target, "-r", pins)
        uv("pip", "install", "--python", target, "--no-deps", "-e", ROOT)
        return subprocess.run([target, "-m", "pytest", *rest], cwd=ROOT).returncode


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
