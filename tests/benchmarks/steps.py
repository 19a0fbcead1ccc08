"""Seconds of a training step, of two versions in turn, as a ratio.

    git worktree add /tmp/before HEAD~1
    python tests/benchmarks/steps.py --other /tmp/before                     this checkout against another one
    python tests/benchmarks/steps.py --flags="--mixed_precision bf16"        the same checkout, other flags
    python tests/benchmarks/steps.py --batch 1 4 --json steps.json

One process for each version stays open, and they make one step each by turns, so that a machine that is now fast and now slow is so for
both. What counts is the processor time of a step (forward and backward pass, update, next batch), on one thread; the ratio is the median over pairs.
"""
import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ["--pretrained_model_name_or_path", "tiny", "--resolution", "128", "--seed", "0", "--report_to", "none", "--max_train_steps", "1000000",
           "--checkpointing_steps", "1000000"]


def work(words):
    "Open a run; then, for each line on standard input, make one step and say how long it took."
    import contextlib
    import tempfile
    import time

    import torch
    said, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    from sdxl_course.options import parse_config
    from sdxl_course.text_to_image import TextToImageConfig, open_text_to_image
    from sdxl_course.train.loop import fit
    from sdxl_course.world.samples import sample_dir
    with tempfile.TemporaryDirectory() as folder:
        words = ["--train_data_dir", str(sample_dir("old_book_illustrations")), "--output_dir", folder, *DEFAULT, *words]
        run = open_text_to_image(parse_config(TextToImageConfig, words), log=lambda text: None)
        full = lambda micro: len(micro.indices) == run.config.train_batch_size # the last batch of a pass may be a smaller one
        times = {}
        def batches():
            for micro, batch in run.loader.batches(run.sampler.micro_steps(0, 10**6)):
                if not full(micro): continue
                if times: print(time.process_time() - times["begin"], file=said, flush=True)
                if not sys.stdin.readline().strip(): return
                times["begin"] = time.process_time()
                yield micro, batch
        with contextlib.closing(run): fit(run.loss, batches(), run.state, run.accelerator)


def start(checkout, words):
    "A worker on a checkout."
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    return subprocess.Popen([sys.executable, __file__, "--work", *words], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def step(worker):
    "Seconds of one step."
    worker.stdin.write("go\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def compare(workers, pairs, warmup=3):
    "Seconds of both, pair by pair; who goes first changes."
    found = []
    for i in range(pairs + warmup):
        order = (0, 1) if i % 2 else (1, 0)
        pair = {which: step(workers[which]) for which in order}
        found.append((pair[0], pair[1]))
    return found[warmup:]


def measure(checkouts, flags, batch, pairs):
    "One row of the table."
    workers = [start(checkout, ["--train_batch_size", str(batch), *words]) for checkout, words in zip(checkouts, flags)]
    try: found = compare(workers, pairs)
    finally:
        for worker in workers:
            worker.stdin.close()
            worker.wait()
    before, after = zip(*found)
    return dict(batch=batch, pairs=pairs, before=statistics.median(before), after=statistics.median(after),
                ratio=statistics.median(one/other for one, other in found))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", default=str(ROOT), help="checkout to compare with")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--common", default="", help="flags of both")
    parser.add_argument("--flags", default="", help="flags of this checkout's run alone")
    parser.add_argument("--json", help="file for the numbers")
    words = parser.parse_args()
    common, own = shlex.split(words.common), shlex.split(words.flags)
    rows = []
    print("| batch | before, ms | now, ms | times as fast |\n|---|---|---|---|")
    for batch in words.batch:
        rows.append(row := measure((words.other, ROOT), (common, common + own), batch, words.pairs))
        print(f"| {batch} | {1000*row['before']:.1f} | {1000*row['after']:.1f} | {row['ratio']:.2f} |", flush=True)
    if words.json: Path(words.json).write_text(json.dumps(dict(other=words.other, common=common, flags=own, rows=rows), indent=1))


if __name__ == "__main__": work(sys.argv[2:]) if sys.argv[1:2] == ["--work"] else main()
