"""This trainer against diffusers' example scripts and against bars: one command, JSON and Markdown.

    python tests/benchmarks/reference.py --reference FOLDER                        every row but `large` and `result`
    python tests/benchmarks/reference.py --reference FOLDER --rows steps start     these; the others stay as they were measured

FOLDER holds train_text_to_image_lora_sdxl.py and train_dreambooth_lora_sdxl.py, as diffusers has them. They run unchanged: what is timed is
patched in from outside. They want torchvision, which this project must not: --python names an interpreter that has it. Two processes work
by turns, so that a machine that is now fast and now slow is so for both; the ratio is the median over pairs. Seconds are processor seconds
on one thread. `large` wants 16 GiB of free memory and 15 GB of disk, `result` many trainings.
"""
import time

BEGIN = time.time() # of this process

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cache
import results
import start as beginning
import steps
from common import ROOT, ask, by_turns, close, compared, environment, in_turn, start

SCRIPTS = dict(text_to_image="train_text_to_image_lora_sdxl.py", dreambooth="train_dreambooth_lora_sdxl.py")
SUBJECT = ["--instance_prompt", "a photo of sks chair", "--train_batch_size", "4", "--repeats", "4"] # 20 pictures: whole batches
TRACKED = ["--report_to", "tensorboard"] # the scripts know no "none"


# What runs in a process of its own

def script(kind, path, *words):
    "Run a script unchanged. It waits for a line before every step and says how long the one before took; `first` ends with the first step."
    import runpy

    from accelerate import Accelerator
    said, sys.stdout, times, accumulate = sys.stdout, sys.stderr, {}, Accelerator.accumulate

    @contextmanager
    def waiting(self, *models): # a script enters it with each batch
        if times: print(time.process_time() - times["begin"], file=said, flush=True)
        if kind == "steps" and not sys.stdin.readline().strip(): os._exit(0)
        times["begin"] = time.process_time()
        with accumulate(self, *models): yield
        if kind == "first": print(time.process_time(), time.time() - BEGIN, file=said, flush=True), os._exit(0)
    Accelerator.accumulate = waiting
    sys.argv = [path, *words]
    runpy.run_path(path, run_name="__main__")


def product(side):
    "For each line, multiply two square matrices: operations a second, in units of 10^9."
    import torch
    torch.set_num_threads(1)
    a, b = torch.randn(2, int(side), int(side))
    for line in sys.stdin:
        begin = time.process_time()
        for _ in range(4): a @ b
        print(4*2*int(side)**3/(time.process_time() - begin)/1e9, flush=True)


def drawing(folder, kind, number, count):
    "For each line, draw prompts with this course or with the stock pipeline: seconds, and the sum of all pixels."
    import numpy as np
    import torch
    torch.set_num_threads(1)
    prompts, seeds, count = ["a photo of a chair in the desert"]*int(number), list(range(int(number))), int(count)
    if kind == "ours":
        from sdxl_course import generate, load_pipeline
        pipeline = load_pipeline(folder)
        draw = lambda: generate(pipeline, prompts, seeds, num_inference_steps=count, batch_size=len(seeds))
    else:
        from diffusers import StableDiffusionXLPipeline
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        dice = lambda: [torch.Generator().manual_seed(seed) for seed in seeds]
        draw = lambda: pipeline(prompts, num_inference_steps=count, guidance_scale=3.0, generator=dice(), height=128, width=128).images
    for line in sys.stdin:
        begin = time.process_time()
        pictures = draw()
        print(time.process_time() - begin, sum(float(np.asarray(one, float).mean()) for one in pictures)/len(pictures), flush=True)


def growth(folder, number):
    "Fill a cache with many pictures and captions: seconds, MB resident after a tenth of the time, and at the most after that."
    import threading

    import numpy as np
    import torch
    from PIL import Image
    torch.set_num_threads(1)
    from sdxl_course.data.cache import LatentCache
    from sdxl_course.data.check import read_dataset
    from sdxl_course.data.loader import BatchLoader
    from sdxl_course.model.components import load_components
    folder, number, dice = Path(folder), int(number), np.random.default_rng(0)
    (folder/"many").mkdir(parents=True)
    for k in range(number): # a few colours in large squares: every picture is another one
        Image.fromarray(dice.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((128, 128), 0).save(folder/"many"/f"{k:05d}.png")
        (folder/"many"/f"{k:05d}.txt").write_text(f"a photo of chair {k}")
    records, components, seen = read_dataset(folder/"many"), load_components("tiny"), []
    loader = BatchLoader(records, components, 0, cache=LatentCache(folder/"encoded"), resolution=128)
    def look():
        while not stopped.wait(0.2):
            seen.append(1024*number_of("/proc/self/status", "VmRSS"))
    stopped, begin = threading.Event(), time.process_time()
    watch = threading.Thread(target=look)
    watch.start()
    loader.encode_once(latents=True, texts=True)
    stopped.set(), watch.join()
    print(time.process_time() - begin, seen[len(seen)//10], max(seen[len(seen)//10:]), flush=True)


# What starts them

@dataclass(frozen=True)
class Bench:
    "Where things are."
    reference: Path # folder of the scripts
    python: str # interpreter that runs them
    pairs: int # of measurements
    room: Path # a folder for what is made

    def data(self, name):
        "The flags that name a method's data; the DreamBooth script opens every file of a folder, so that only pictures may lie there."
        if name == "text_to_image": return ["--train_data_dir", ROOT/"data_samples"/"old_book_illustrations"]
        return ["--instance_data_dir", self.pictures("green_chair")]

    def pictures(self, name):
        "A folder with twenty pictures of a sample data set, or all there are, and nothing else."
        (folder := self.room/name).mkdir(exist_ok=True)
        for path in sorted((ROOT/"data_samples"/name).glob("*.png"))[:20]: shutil.copy(path, folder)
        return folder

    def model(self):
        "sdxl-tiny as a folder of float32 weights."
        import torch
        from sdxl_course.model.components import load_components, save_components
        folder = self.room/"tiny"
        return folder if folder.exists() else save_components(load_components("tiny"), folder, torch.float32)

    def flags(self, name, flags):
        "Flags for both."
        return [*self.data(name), *steps.DEFAULT, "--pretrained_model_name_or_path", self.model(), *TRACKED, *flags]

    def script(self, kind, name, flags):
        "The words after --work that run a script."
        return ["script", kind, self.reference/SCRIPTS[name], *self.flags(name, ["--output_dir", self.room/"theirs", *flags])]

    def told(self, home="hf"):
        "What a script's process is told: where its libraries keep what they made of the data."
        return dict(HF_HOME=str(self.room/home), PYTHONWARNINGS="ignore")

    def theirs(self, name, flags):
        "A worker that makes steps of a script."
        return start(__file__, self.script("steps", name, flags), python=self.python, log=(self.room/"log").open("a"), **self.told())

    def ours(self, name, flags):
        "A worker that makes steps of this trainer with the same flags."
        return start(steps.__file__, [name, *self.flags(name, flags)], SDXL_COURSE_CACHE=str(self.room/"home"))


def row(measure, value, unit, bar, least=True, **seen):
    "One row of the table; `least`: the value should be at least the bar, else at most."
    return dict(measure=measure, value=value, unit=unit, bar=bar, least=least, reached=value >= bar if least else value <= bar, **seen)


def versus(measure, pairs, bar, unit="times as fast"):
    "A row that compares the two: seconds of the script and of this trainer."
    found = compared(pairs)
    return row(measure, found["ratio"], unit, bar, theirs=found["before"], ours=found["after"], pairs=len(pairs))


def step_row(bench, measure, name, flags, bar):
    "Processor seconds of a step."
    return versus(measure, [(one, other) for (one,), (other,) in by_turns((bench.theirs(name, flags), bench.ours(name, flags)), bench.pairs, warmup=3)], bar)


def step_rows(bench):
    "Text-to-image; 32 of the 40 pictures, so that every batch is full."
    for batch, bar in ((1, 1.6), (4, 1.6), (16, 1.8)):
        yield step_row(bench, f"step, text-to-image, batch {batch}", "text_to_image", ["--train_batch_size", batch, "--max_train_samples", "32"], bar)


def dreambooth_rows(bench):
    "DreamBooth; twenty pictures of other chairs stand for what the model would draw."
    prior = ["--with_prior_preservation", "--class_data_dir", bench.pictures("chairs"), "--class_prompt", "a photo of a chair", "--num_class_images", "20"]
    yield step_row(bench, "step, DreamBooth with prior, batch 4", "dreambooth", [*SUBJECT, *prior], 1.6)
    yield step_row(bench, "step, DreamBooth with text encoders, batch 4", "dreambooth", [*SUBJECT, "--train_text_encoder"], 1.4)


def start_rows(bench):
    "From a command to the end of its first update, 40 pictures at batch 4, with and without what earlier runs left."
    turn = iter(range(10**6))
    def theirs(home):
        command = [bench.python, __file__, "--work", *map(str, bench.script("first", "text_to_image", ["--train_batch_size", "4"]))]
        said = subprocess.run(command, env=environment(**bench.told(home)), capture_output=True, text=True)
        if said.returncode: sys.exit(said.stderr)
        return tuple(map(float, said.stdout.split()))
    def ours(home): return beginning.first_update(ROOT, ["--pretrained_model_name_or_path", bench.model(), *TRACKED], bench.room/home)
    for kind, bar, home in (("cold", 4, lambda: f"cold{next(turn)}"), ("warm", 3, lambda: "warm")):
        pairs = in_turn([lambda: theirs(home()), lambda: ours(home())], max(5, bench.pairs//4), warmup=int(kind == "warm"))
        spent, waited = (compared([[one[which] for one in pair] for pair in pairs]) for which in (0, 1))
        yield row(f"command to first step, 40 pictures, {kind}", spent["after"], "s", bar, least=False, theirs=spent["before"], ours=spent["after"],
            wall=[waited["before"], waited["after"]], pairs=len(pairs))


def cache_rows(bench):
    "Encoding pictures and captions to disk."
    worker = start(cache.__file__, [40, 128, 1, bench.room])
    times = [ask(worker)[0] for _ in range(6)][1:]
    close([worker])
    yield row("cache building, pictures with captions", 40/statistics.median(times), "a second", 90, repeats=len(times))


def growth_rows(bench, number=10_000):
    "Whether memory grows while many pictures are encoded."
    with tempfile.TemporaryDirectory(dir=bench.room) as folder:
        done = subprocess.run([sys.executable, __file__, "--work", "growth", folder, str(number)], env=environment(), stdout=subprocess.PIPE, text=True, check=True)
    seconds, early, late = map(float, done.stdout.split())
    yield row(f"cache of {number:,} pictures, growth of resident memory after the first tenth", late - early, "MB", 16, least=False, resident_MB=[early, late], rate=number/seconds)


def peak_rows(bench):
    "The operations of a step, counted on shapes, over its time; a large matrix product on the same thread is what could be had."
    from sdxl_course.plan import forecast, read_command
    flags = ["--train_batch_size", "16", "--max_train_samples", "32"]
    flops = forecast(*read_command(["text-to-image", *map(str, bench.flags("text_to_image", flags))])).flops
    workers = start(__file__, ["product", 2048]), bench.ours("text_to_image", flags)
    pairs = [(rate, flops/seconds/1e9) for (rate,), (seconds,) in by_turns(workers, bench.pairs, warmup=2)]
    share = statistics.median(reached/rate for rate, reached in pairs)
    yield row("share of the peak of matrix products, batch 16", 100*share, "%", 60, product_gflops=statistics.median(rate for rate, _ in pairs), step_gflop=flops/1e9, pairs=len(pairs))


def help_rows(bench):
    "--help of every command, and the import; processor seconds of fresh processes."
    from sdxl_course.cli import COMMANDS
    def so_far(): return (used := resource.getrusage(resource.RUSAGE_CHILDREN)).ru_utime + used.ru_stime
    def spent(code):
        before = so_far()
        subprocess.run([sys.executable, "-c", code], env=environment(), stdout=subprocess.DEVNULL, check=True)
        return so_far() - before
    ask_for = "import sys; from sdxl_course.cli import main; sys.exit(main([{!r}, '--help']))"
    found = {word: statistics.median(spent(ask_for.format(word)) for _ in range(5)) for word in COMMANDS}
    slowest = max(found, key=found.get)
    yield row(f"--help, the slowest of {len(found)} commands ({slowest})", found[slowest], "s", 1, least=False, repeats=5)
    pairs = in_turn([lambda: spent("pass"), lambda: spent("import sdxl_course")], 9)
    yield row("import sdxl_course, beyond an empty Python", statistics.median(one - empty for empty, one in pairs), "s", 0.05, least=False, pairs=len(pairs))


def drawing_rows(bench):
    "The same prompts, seeds, sampler, steps and guidance, and the same pictures but for rounding."
    for number in (1, 8):
        workers = [start(__file__, ["drawing", bench.model(), kind, number, 8]) for kind in ("stock", "ours")]
        pairs = by_turns(workers, bench.pairs)
        assert all(abs(stock[1] - ours[1]) < 0.5 for stock, ours in pairs), "the pictures differ"
        yield versus(f"generation, {number} at a time, 8 steps, against the stock pipeline", [(stock[0], ours[0]) for stock, ours in pairs], 1.2)


def large_model(folder):
    "SDXL 1.0's architecture with random weights, in float32."
    import torch
    from sdxl_course.memory import meta_components
    from sdxl_course.model.components import NETWORKS, save_components
    if folder.exists(): return folder
    parts = meta_components("stabilityai/stable-diffusion-xl-base-1.0")
    for name in NETWORKS:
        setattr(parts, name, network := getattr(parts, name).to_empty(device="cpu"))
        for tensor in network.parameters(): torch.nn.init.normal_(tensor, std=0.02)
    return save_components(parts, folder, torch.float32)


def number_of(file, name):
    "A number that the kernel gives in kB, in GiB; VmHWM is the most that a process has held."
    return next(int(line.split()[1])/2**20 for line in Path(file).read_text().splitlines() if line.startswith(name))


def large_rows(bench):
    "One after the other, since both do not fit: a few steps each, and the most that each held, while it loaded and in its steps."
    if (free := number_of("/proc/meminfo", "MemAvailable")) < 16: sys.exit(f"large wants 16 GiB of free memory, there are {free:.1f}")
    subprocess.run([sys.executable, __file__, "--work", "large_model", bench.room/"large"], env=environment(), check=True)
    flags, found = ["--pretrained_model_name_or_path", bench.room/"large", "--resolution", "256", "--train_batch_size", "1", "--max_train_samples", "4"], []
    for side in (bench.theirs, bench.ours):
        worker = side("text_to_image", flags)
        times = [ask(worker)[0]]
        status = f"/proc/{worker.pid}/status"
        whole = number_of(status, "VmHWM")
        Path(f"/proc/{worker.pid}/clear_refs").write_text("5") # the peak counts from here
        times += [ask(worker)[0] for _ in range(5)]
        found.append((times[1:], whole, number_of(status, "VmHWM")))
        close([worker])
    (slow, first, most), (fast, first_here, most_here) = found
    yield versus("SDXL 1.0's architecture, float32, 256 pixels, batch 1: step", list(zip(slow, fast)), 1.35)
    for name, one, other in (("steps", most, most_here), ("the whole run", max(first, most), max(first_here, most_here))):
        yield row(f"SDXL 1.0's architecture: peak memory of {name}, share of the script's", other/one, "", 0.75, least=False, theirs=one, ours=other)


ROWS = dict(steps=step_rows, dreambooth=dreambooth_rows, start=start_rows, cache=cache_rows, growth=growth_rows, peak=peak_rows, help=help_rows, drawing=drawing_rows, large=large_rows, result=lambda bench: results.result_rows(bench, row))


def where():
    "Machine, versions, commit and time of a measurement."
    from sdxl_course.devices import provenance
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return provenance() | dict(threads=1, processor=names[0] if names else platform.processor(), cores=os.cpu_count(), commit=commit)


def number(value):
    "Three digits that count."
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def markdown(rows):
    "The table, and below it where its rows were measured."
    lines = ["| measure | script | here | value | bar | reached |", "|---|---|---|---|---|---|"]
    for one in rows:
        sides = [number(one[side]) if side in one else "" for side in ("theirs", "ours")]
        lines.append(f"| {one['measure']} | {' | '.join(sides)} | {number(one['value'])} {one['unit']} | {'>=' if one['least'] else '<='} {one['bar']} | {'yes' if one['reached'] else 'no'} |")
    places = {}
    for one in (one["provenance"] for one in rows):
        place = "{processor}, {cores} cores, one thread; {system}, Python {python}, torch {versions[torch]}, diffusers {versions[diffusers]}".format(**one)
        places.setdefault(place, {})[one["commit"]] = None
    told = "Script and here: processor seconds, or GiB where the row is about memory."
    return "\n".join([*lines, "", told, *(f"Measured on {place}; commit {', '.join(commits)}." for place, commits in places.items())]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, type=Path, help="folder with the two scripts")
    parser.add_argument("--python", default=sys.executable, help="interpreter for the scripts")
    parser.add_argument("--rows", nargs="+", default=[name for name in ROWS if name not in ("large", "result")], choices=ROWS)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--room", help="folder on a disk with room; what is made in it goes away")
    parser.add_argument("--json", type=Path, default=Path("reference.json"), help="file for the numbers; the table goes beside it")
    words = parser.parse_args()
    kept = json.loads(words.json.read_text()) if words.json.exists() else {}
    with tempfile.TemporaryDirectory(dir=words.room) as room:
        bench = Bench(words.reference.resolve(), words.python, words.pairs, Path(room))
        for name in words.rows:
            kept[name] = []
            for one in ROWS[name](bench):
                kept[name].append(one | dict(provenance=where()))
                print(markdown(kept[name][-1:]).splitlines()[2], flush=True)
                words.json.write_text(json.dumps(kept, indent=1) + "\n")
                words.json.with_suffix(".md").write_text(markdown(sum((kept[name] for name in ROWS if name in kept), [])))


PARTS = dict(script=script, product=product, drawing=drawing, growth=growth, large_model=lambda folder: large_model(Path(folder)))

if __name__ == "__main__": PARTS[sys.argv[2]](*sys.argv[3:]) if sys.argv[1:2] == ["--work"] else main()
