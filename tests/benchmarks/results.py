"""How long until a result: processor seconds from a command until what its LoRA draws is judged good; rows of reference.py.

A run waits while its last checkpoint is drawn and judged, so that it pays for its own work only. Both sides are judged alike: the same
prompts and seeds, drawn by this course in few steps, the LoRA at full strength.
"""
import os
import statistics
from pathlib import Path

from common import ask, close

LOOKS = (10, 20, 30, 40, 60, 80, 100, 140, 180, 240) # updates after which the LoRA is judged
RATES = ("1e-3", "3e-3", "1e-2", "3e-4") # of a script, which is taken at its best one
LESSON = dict(train_batch_size=5, rank=16, learning_rate=2e-3, text_encoder_lr=5e-4, lora_layers="attention+feedforward+convolution") # of 43_result_green_chair


def spent(pid):
    "Processor seconds of a process so far."
    numbers = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(numbers[11]) + int(numbers[12]))/os.sysconf("SC_CLK_TCK")


def reach(worker, folder, score, wanted, looks=LOOKS, seconds=float("inf")):
    "Let a worker train until its score is as wanted, for so many seconds and looks at the most."
    done, scores = 0, {}
    try:
        for look in looks:
            for _ in range(look - done): ask(worker)
            done, used = look, spent(worker.pid)
            scores[look] = score(folder/f"checkpoint-{look}"/"pytorch_lora_weights.safetensors")
            print(f"    {folder.name}: {look} updates, {used:.0f} s, score {scores[look]:.2f}", flush=True)
            if scores[look] >= wanted or used > seconds: break
    finally: close([worker])
    return dict(updates=done, seconds=used, scores=scores, reached=scores[done] >= wanted)


def best_rate(open_worker, score, wanted):
    "The rate at which a script is there first, or comes nearest; and that run."
    found = {}
    for rate in RATES:
        soonest = min((run["seconds"] for run in found.values() if run["reached"]), default=float("inf"))
        found[rate] = reach(*open_worker(rate), score, wanted, seconds=soonest)
    order = lambda rate: (not found[rate]["reached"], found[rate]["seconds"] if found[rate]["reached"] else -max(found[rate]["scores"].values()))
    best = min(found, key=order)
    return best, found[best]


def words(**options):
    "Options as words of a command line."
    return [word for name, value in options.items() for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def style_judge():
    "Function of a LoRA file: the share of pictures in the style, contents that no training picture shows."
    from sdxl_course.demo import demo_scenes, style_and_content
    from sdxl_course.evaluate import prompt_of
    from sdxl_course.inference import load_pipeline
    from sdxl_course.model.sampling import generate
    scenes = demo_scenes()*2
    prompts = [prompt_of(scene) for scene in scenes]
    return lambda lora: style_and_content(generate(load_pipeline("tiny", lora=lora), prompts, list(range(len(scenes))), num_inference_steps=6), scenes)[0]


def subject_judge():
    "Function of a LoRA file: how much drawings of the chair look like it, from 0, another chair of its colour, to 1, the truth."
    from sdxl_course.inference import load_pipeline
    from sdxl_course.measure.subject import SUBJECT_COLOR, SubjectJudge, subject_prompt
    from sdxl_course.model.sampling import generate
    from sdxl_course.world.scene import SUBJECT, Scene
    scenes = [Scene(SUBJECT, SUBJECT_COLOR, place, seed=k) for k, place in enumerate(("desert", "field", "apartment", "snow"))]
    judge, prompts = SubjectJudge(scenes), [subject_prompt(scene, SUBJECT) for scene in scenes]*4
    return lambda lora: float(judge.similarity(generate(load_pipeline("tiny", lora=lora), prompts, list(range(16)), num_inference_steps=6)).mean())


def against(bench, method, seeds, own, common, score, wanted=None):
    "Runs of this trainer, and runs of a script at its best rate; without a wanted score it is what this trainer's last look has."
    saved = words(checkpointing_steps=10)
    def side(opened, name, flags): return opened(method, [*flags, *saved, "--output_dir", str(bench.room/name)]), bench.room/name
    ours = []
    for seed in seeds:
        looks = LOOKS if wanted is not None else (50,)
        ours.append(reach(*side(bench.ours, f"ours-{method}-{seed}", [*words(**own), "--seed", str(seed)]), score, -9 if wanted is None else wanted, looks))
    wanted = statistics.median(list(one["scores"].values())[-1] for one in ours) if wanted is None else wanted
    def script(seed): return lambda rate: side(bench.theirs, f"theirs-{method}-{seed}-{rate}", [*words(**common), "--learning_rate", rate, "--seed", str(seed)])
    rate, first = best_rate(script(seeds[0]), score, wanted)
    theirs = [first] + [reach(*script(seed)(rate), score, wanted) for seed in seeds[1:]]
    return dict(wanted=wanted, rate=rate, ours_runs=ours, theirs_runs=theirs)


def result_rows(bench, row, seeds=(0, 1, 2)):
    "Both results; of a run that does not get there the seconds until its last look count, which are too few."
    from sdxl_course.demo import DemoConfig, demo_training
    demo = demo_training(DemoConfig())
    same = {name: getattr(demo, name) for name in ("train_batch_size", "rank")}
    own = same | {name: getattr(demo, name) for name in ("learning_rate", "lora_layers", "debiased_estimation_loss")}
    subject = dict(instance_prompt="a photo of sks chair", train_text_encoder=True, random_flip=True)
    taken = {name: LESSON[name] for name in ("train_batch_size", "rank", "text_encoder_lr")}
    for measure, found in (("time to style score 0.85", against(bench, "text_to_image", seeds, own, same, style_judge(), 0.85)),
            ("time to the subject fidelity of the lesson", against(bench, "dreambooth", seeds, subject | LESSON, subject | taken, subject_judge()))):
        theirs, ours = (statistics.median(one["seconds"] for one in found[side]) for side in ("theirs_runs", "ours_runs"))
        yield row(measure, theirs/ours, "times as fast", 3, theirs=theirs, ours=ours, **found)
