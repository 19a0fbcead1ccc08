"""Seconds from a command to the end of its first update, of two versions in turn.

    git worktree add /tmp/before HEAD~1
    python tests/benchmarks/start.py --other /tmp/before                     a style LoRA on 40 pictures, nothing kept from earlier runs
    python tests/benchmarks/start.py --other /tmp/before --warm              with what the run before left in SDXL_COURSE_CACHE
    python tests/benchmarks/start.py --profile                               where this checkout's processor time goes

A fresh process each time, by turns, so that a machine that is now fast and now slow is so for both. On a machine that does other work
beside it, processor time is the number to trust. The ratio is the median over pairs.
"""
import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, compared, environment, in_turn

DEFAULT = ["--pretrained_model_name_or_path", "tiny", "--resolution", "128", "--train_batch_size", "4", "--seed", "0", "--report_to", "none", "--max_train_steps", "100"]
PROGRAM = """
import time
begin = time.time()
import importlib, os, resource, sys
profile = None
if os.environ.get("PROFILE"):
    import cProfile, pstats
    profile = cProfile.Profile(time.process_time)
    profile.enable()
real = importlib.import_module
def import_module(name, package=None):
    module = real(name, package)
    if name == "sdxl_course.text_to_image":
        loop = real("sdxl_course.train.loop")
        ended = loop.finish_update
        def stop(*given, **named):
            ended(*given, **named)
            spent = time.process_time(), time.time() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if profile: profile.disable(), pstats.Stats(profile).sort_stats("cumtime").print_stats(90)
            print("FIRST", *spent, flush=True)
            os._exit(0)
        loop.finish_update = stop
    return module
importlib.import_module = import_module
real("sdxl_course.cli").main()
"""


def first_update(checkout, words, home, profile=False):
    "(processor seconds, wall seconds, largest resident size in kB) of one start."
    from_folder = Path(checkout) / "data_samples" / "old_book_illustrations"
    with tempfile.TemporaryDirectory() as folder:
        env = environment(checkout, SDXL_COURSE_CACHE=str(home), **({"PROFILE": "1"} if profile else {}))
        command = [sys.executable, "-c", PROGRAM, "text-to-image", "--train_data_dir", str(from_folder), "--output_dir", folder, *DEFAULT, *words]
        said = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    line = next((line for line in said.stdout.splitlines() if line.startswith("FIRST")), None)
    if line is None: sys.exit(said.stdout + said.stderr)
    if profile: print(said.stdout)
    return tuple(map(float, line.split()[1:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", default=str(ROOT), help="checkout to compare with")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="keep what the run before left")
    parser.add_argument("--profile", action="store_true", help="of this checkout alone")
    parser.add_argument("--flags", default="", help="flags of both")
    parser.add_argument("--json", help="file for the numbers")
    words = parser.parse_args()
    flags = shlex.split(words.flags)
    with tempfile.TemporaryDirectory() as kept:
        homes = [Path(kept) / name for name in ("before", "now")]
        def start(which, turn, profile=False): return first_update((words.other, ROOT)[which], flags, homes[which] / ("" if words.warm else str(turn)), profile)
        if words.profile:
            if words.warm: start(1, 0)
            return start(1, 1, True)
        if words.warm: start(0, 0), start(1, 0)
        turn = iter(range(2*words.pairs))
        pairs = in_turn([lambda which=which: start(which, next(turn)) for which in (0, 1)], words.pairs, warmup=0)
    rows = {}
    print("| to the first update | before | now | times as fast |\n|---|---|---|---|")
    for which, name in enumerate(("processor, s", "wall, s", "largest resident size, MB")):
        rows[name] = compared([[one[which] / (1000 if which == 2 else 1) for one in pair] for pair in pairs])
        print(f"| {name} | {rows[name]['before']:.2f} | {rows[name]['after']:.2f} | {rows[name]['ratio']:.2f} |")
    if words.json: Path(words.json).write_text(json.dumps(dict(vars(words), rows=rows), indent=1))


if __name__ == "__main__": main()
