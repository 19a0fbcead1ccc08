"""Seconds of a training step, of two versions in turn, as a ratio.

    git worktree add /tmp/before HEAD~1
    python tests/benchmarks/steps.py --other /tmp/before                     this checkout against another one
    python tests/benchmarks/steps.py --flags="--mixed_precision bf16"        the same checkout, other flags
    python tests/benchmarks/steps.py --batch 1 4 --json steps.json

One process for each version stays open, and they make one step each by turns, so that a machine that is now fast and now slow is so for
both. What counts is the processor time of a step (forward and backward pass, update, its row in the log, next batch), on one thread; the ratio is the median over pairs.
"""
import argparse
import json
import shlex
import sys
from pathlib import Path

from common import ROOT, by_turns, compared, start

DEFAULT = ["--pretrained_model_name_or_path", "tiny", "--resolution", "128", "--seed", "0", "--report_to", "none", "--max_train_steps", "1000000",
           "--checkpointing_steps", "1000000"]


def work(words):
    "Open a run of the method that the first word names, with the flags behind it; then, for each line on standard input, make one step and say how long it took."
    import contextlib
    import importlib
    import tempfile
    import time

    import torch
    said, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    from sdxl_course.options import parse_config
    from sdxl_course.train.build import open_run
    name, *words = words
    module = importlib.import_module(f"sdxl_course.{name}")
    method = getattr(module, name.upper())
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(method, parse_config(method.config, ["--output_dir", folder, *DEFAULT, *words]), log=lambda text: None)
        made, times = run.loader.batches, {}
        def full(micro): return len(micro.indices) == run.config.train_batch_size # the last batch of a pass may be a smaller one
        def batches(*given):
            for micro, batch in made(*given):
                if not full(micro): continue
                if times: print(time.process_time() - times["begin"], file=said, flush=True)
                if not sys.stdin.readline().strip(): sys.exit()
                times["begin"] = time.process_time()
                yield micro, batch
        run.loader.batches = batches
        with contextlib.closing(run): run.train()


def measure(checkouts, flags, batch, pairs):
    "One row of the table."
    data = ROOT / "data_samples" / "old_book_illustrations"
    workers = [start(__file__, ["text_to_image", "--train_data_dir", data, "--train_batch_size", batch, *words], checkout=checkout) for checkout, words in zip(checkouts, flags)]
    return dict(batch=batch, pairs=pairs, **compared([(one, other) for (one,), (other,) in by_turns(workers, pairs, warmup=3)]))


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
