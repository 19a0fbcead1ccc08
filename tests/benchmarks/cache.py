"""Processor time of filling a cache, of two versions in turn, as a ratio.

    git worktree add /tmp/before HEAD~1
    python tests/benchmarks/cache.py --other /tmp/before
    python tests/benchmarks/cache.py --other /tmp/before --threads 2 --json cache.json

One process for each version stays open, and each encodes the same few pictures with their captions by turns, into an empty folder on the
disk, so that a machine that is now fast and now slow is so for both. Wall time holds what waits for the disk, too; on a machine that does
other work beside it, processor time is the number to trust. The ratio is the median over pairs.
"""
import argparse
import json
import sys
from pathlib import Path

from common import ROOT, by_turns, compared, start


def work(words):
    "For each line on standard input, fill an empty cache with pictures that were not there before; say how long it took."
    import tempfile
    import time
    from dataclasses import replace

    import torch
    said, sys.stdout = sys.stdout, sys.stderr
    count, resolution, threads, place = int(words[0]), int(words[1]), int(words[2]), words[3]
    torch.set_num_threads(threads)
    from sdxl_course.data.cache import LatentCache
    from sdxl_course.data.check import read_dataset
    from sdxl_course.data.loader import BatchLoader
    from sdxl_course.model.components import load_components
    from sdxl_course.world.samples import sample_dir
    components, records = load_components("tiny"), read_dataset(sample_dir("old_book_illustrations"))[:count]
    for turn, line in enumerate(sys.stdin):
        named = [replace(record, captions=(f"{record.captions[0]} {turn}",)) for record in records]
        with tempfile.TemporaryDirectory(dir=place or None) as folder:
            begin = time.process_time(), time.perf_counter()
            loader = BatchLoader(named, components, 0, cache=LatentCache(Path(folder) / "encoded"), resolution=resolution)
            loader.encode_once(latents=True, texts=True)
            print(time.process_time() - begin[0], time.perf_counter() - begin[1], file=said, flush=True)
            assert len(loader.latent_keys) == len(loader.text_keys) == count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", required=True, help="checkout to compare with")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--place", default="", help="folder on the disk that is to be measured")
    parser.add_argument("--json", help="file for the numbers")
    words = parser.parse_args()
    given = words.pictures, words.resolution, words.threads, words.place
    pairs = by_turns([start(__file__, given, checkout=checkout, threads=words.threads) for checkout in (words.other, ROOT)], words.pairs)
    rows = {}
    print("| a picture with its caption | before, ms | now, ms | times as fast |\n|---|---|---|---|")
    for which, name in enumerate(("processor", "wall")):
        rows[name] = compared([[1000*one[which]/words.pictures for one in pair] for pair in pairs])
        print(f"| {name} | {rows[name]['before']:.1f} | {rows[name]['after']:.1f} | {rows[name]['ratio']:.2f} |")
    if words.json: Path(words.json).write_text(json.dumps(dict(vars(words), rows=rows), indent=1))


if __name__ == "__main__": work(sys.argv[2:]) if sys.argv[1:2] == ["--work"] else main()
