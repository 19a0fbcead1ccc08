"""What the benchmarks share: workers that do their work by turns, medians and ratios of pairs, and where something was measured."""
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(checkout=ROOT, threads=1, **more):
    "What a process on a checkout is told."
    return {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **more}


def start(file, words, python=sys.executable, log=None, **told):
    "A worker: the part of a benchmark after --work, which waits for a line before each piece of work and answers with numbers."
    return subprocess.Popen([python, file, "--work", *map(str, words)], env=environment(**told), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)


def ask(worker):
    "The numbers that come back for one piece of work."
    worker.stdin.write("go\n")
    worker.stdin.flush()
    numbers = tuple(map(float, worker.stdout.readline().split()))
    if not numbers: sys.exit(f"a worker stopped: {' '.join(worker.args)}")
    return numbers


def close(workers):
    "Let workers end."
    for worker in workers:
        worker.stdin.close()
        worker.wait()


def in_turn(works, pairs, warmup=1):
    "What two functions return, pair by pair; who goes first changes."
    found = []
    for i in range(pairs + warmup):
        order = (0, 1) if i % 2 else (1, 0)
        pair = {which: works[which]() for which in order}
        found.append((pair[0], pair[1]))
    return found[warmup:]


def compared(pairs):
    "Medians of both, and the median of the ratios: how many times as fast the second one is."
    before, after = zip(*pairs)
    return dict(before=statistics.median(before), after=statistics.median(after), ratio=statistics.median(one/other for one, other in pairs))


def by_turns(workers, pairs, warmup=1):
    "`in_turn` of two workers, which end with it."
    try: return in_turn([lambda one=one: ask(one) for one in workers], pairs, warmup)
    finally: close(workers)
