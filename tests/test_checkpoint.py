"What survives: exact resume, whole folders, refused resumes."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations, product

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from sdxl_course.train.checkpoint import checkpointing, verify, find_checkpoint, latest_checkpoint, list_checkpoints, load_checkpoint, remove_partial, write_folder
from sdxl_course.core import CourseError, SampleRNG, load_tensors, save_tensors, seeded, write_atomic
from sdxl_course.text_to_image import TextToImageConfig, main, open_text_to_image
from sdxl_course.data.sampler import BatchSampler
from sdxl_course.train.optimizer import Ema, make_optimizer, make_schedule
from sdxl_course.train.loop import TrainState, fit, copy_into
from toy import files_of, make_pictures as fill

N = 6


def lasting(folder, n=N):
    "What must be equal to the last byte: weights, log, final checkpoint. Where the run was told to write may differ."
    files = {name: data for name, data in files_of(folder).items() if name in ("pytorch_lora_weights.safetensors", "training_log.jsonl") or name.startswith(f"checkpoint-{n}/")}
    files.pop(f"checkpoint-{n}/manifest.json")
    state = json.loads(files.pop(f"checkpoint-{n}/trainer_state.json"))
    for free in ("output_dir", "resume_from_checkpoint"): state["config"].pop(free)
    assert len(files) >= 7
    return files | {"state": state}


def resumed(train, straight, k, options):
    return train(f"from-{k}", **options, resume_from_checkpoint=str(straight / f"checkpoint-{k}")).output_dir


def test_every_k_plus_the_rest_equals_n_byte_for_byte(train):
    "trainers.md 2.14 numbers 20 and 23, anchors 6.5: an epoch began again, and a checkpoint's path was cut to its last part (here it lies in another run's folder)."
    options = dict(max_train_steps=N, checkpointing_steps=1, lr_scheduler="cosine", lr_warmup_steps=1)  # 5 pictures in batches of 2: epochs end in update 3 and 6
    straight = train("straight", **options).output_dir
    want = lasting(straight)
    for k in range(1, N): assert lasting(resumed(train, straight, k, options)) == want, k
    done = files_of(resumed(train, straight, N, options))  # nothing is left to do
    for name in ("pytorch_lora_weights.safetensors", "training_log.jsonl"): assert done[name] == want[name]


@pytest.mark.parametrize("adapter, file, more", [("loha", "lycoris", dict(train_text_encoder=True, lora_layers="attention+convolution")),
    ("lokr", "lycoris", dict(train_text_encoder=True, lora_layers="attention+convolution")), ("oft", "adapter_model", dict(lora_layers="attention+feedforward")), ("oft", "adapter_model", dict(mixed_precision="bf16"))], ids=str)
def test_resume_is_exact_with_other_adapters(train, adapter, file, more):
    options = dict(max_train_steps=4, checkpointing_steps=2, adapter=adapter, **more)
    straight = train("straight", **options).output_dir
    again = resumed(train, straight, 2, options)
    assert lasting(again, 4) == lasting(straight, 4)
    assert (again / f"{file}.safetensors").read_bytes() == (straight / f"{file}.safetensors").read_bytes()


# every pair of these options occurs in some row; flips, dropped captions, offset noise and measuring are in all of them
FACTORS = dict(optimizer=["adamw", "prodigy", "adafactor", "schedulefree"], gradient_accumulation_steps=[1, 2, 3], data=["square", "buckets", "kept crops"], init_lora_weights=["gaussian", "pissa", "orthogonal"],
    use_ema=[False, True], lora_dropout=[0.0, 0.2], train_text_encoder=[False, True], k=[1, 2, 3], shape=[dict(), dict(use_rslora=True, lora_alpha=3.0), dict(use_dora=True)])


def possible(row):
    return not (row.get("optimizer") == "schedulefree" and row.get("use_ema")) and not (row.get("init_lora_weights") == "pissa" and row.get("shape", {}).get("use_dora"))


def covering_rows():
    "A small table in which all pairs of values occur, greedily."
    pairs = {((a, i), (b, j)) for a, b in combinations(FACTORS, 2) for i, j in product(range(len(FACTORS[a])), range(len(FACTORS[b]))) if possible({a: FACTORS[a][i], b: FACTORS[b][j]})}
    rows, left = [], set(pairs)
    while left:
        row = dict(max(left, key=str))
        for name in FACTORS:
            if name in row: continue
            gain = lambda i: sum(frozenset(pair) <= frozenset({*row.items(), (name, i)}) for pair in left)
            fits = [i for i in range(len(FACTORS[name])) if possible({n: FACTORS[n][j] for n, j in {**row, name: i}.items()})]
            row[name] = max(fits, key=gain)
        left -= {pair for pair in left if set(pair) <= set(row.items())}
        rows.append({name: FACTORS[name][i] for name, i in row.items()})
    return rows


ROWS = covering_rows()


@pytest.mark.parametrize("row", [pytest.param(row, marks=[pytest.mark.slow] * (i % 2)) for i, row in enumerate(ROWS)], ids=lambda row: "-".join(str(v) for v in row.values()))
def test_resume_is_exact_pairwise(train, make_pictures, row):
    k, data, shape, options = row["k"], row["data"], row["shape"], {name: value for name, value in row.items() if name not in ("k", "data", "shape")}
    options |= dict(max_train_steps=4, checkpointing_steps=1, random_flip=True, proportion_empty_prompts=0.3, noise_offset=0.1, snr_gamma=5.0, validation_loss_steps=1, **shape)
    if data != "square": options |= dict(train_data_dir=str(make_pictures(5, "wide", size=(64, 100))))
    options |= {"square": {}, "buckets": dict(use_aspect_ratio_buckets=True), "kept crops": dict(cached_crops=2)}[data]
    if row["optimizer"] == "prodigy": options["learning_rate"] = 1.0
    straight = train("straight", **options).output_dir
    assert lasting(resumed(train, straight, k, options), 4) == lasting(straight, 4)


def test_resume_is_exact_with_random_crops_and_a_seed_of_its_own(train, make_pictures):
    options = dict(train_data_dir=str(make_pictures(3, "wide", size=(64, 96))), max_train_steps=N, checkpointing_steps=2, seed=None)
    straight = train("straight", **options)
    again = train("again", **options, resume_from_checkpoint=str(straight.output_dir / "checkpoint-2"))
    assert again.seed == straight.seed and lasting(again.output_dir) == lasting(straight.output_dir)
    assert train("other", **options).log != straight.log  # another run without a seed is another run


def test_resuming_twice_and_stopping_early_change_nothing(train):
    options = dict(checkpointing_steps=1)
    straight = lasting(train("straight", max_train_steps=N, **options).output_dir)
    train("steps", max_train_steps=2, **options)
    train("steps", max_train_steps=4, resume_from_checkpoint="latest", **options)
    said = []
    folder = train("steps", max_train_steps=N, resume_from_checkpoint="latest", log=said.append, **options).output_dir
    assert lasting(folder) == straight
    assert any("resuming" in text and "4 of 6" in text for text in said)


def test_a_run_killed_between_checkpoints_forgets_the_rows_after_the_last_one(train):
    options = dict(max_train_steps=N, checkpointing_steps=2)
    straight = train("straight", **options).output_dir
    folder = straight.with_name("killed")
    shutil.copytree(straight, folder, ignore=shutil.ignore_patterns("checkpoint-4", "checkpoint-6", "pytorch_lora_weights.safetensors"))
    shutil.copytree(straight / "checkpoint-2", folder / "checkpoint-2", dirs_exist_ok=True)
    train("killed", **options, resume_from_checkpoint="latest")
    assert lasting(folder) == lasting(straight)


# ------------------------------------------------ stopped by hand

FREE_TEXT = dict(optimizer="schedulefree", train_text_encoder=True, lora_dropout=0.2)
STOPS = {  # where SIGINT arrives: (what is patched, how often it is called before, how often the key is pressed, options)
    "in the middle of accumulating": ("sdxl_course.train.objective.DenoisingLoss.forward", 3, 1, FREE_TEXT), "within an update": ("sdxl_course.train.loop.ensure_finite", 1, 1, dict(use_ema=True)),
    "twice within an update": ("torch.optim.lr_scheduler.LambdaLR.step", 1, 2, FREE_TEXT), "while drawing": ("sdxl_course.model.sampling.decode_latents", 0, 2, dict(use_ema=True)),
    "in the first step": ("sdxl_course.train.objective.DenoisingLoss.forward", 0, 1, {})}


@pytest.mark.parametrize("where", STOPS)
def test_a_run_stopped_by_hand_goes_on_as_if_nothing_had_happened(train, toy, toy_model, tmp_path, monkeypatch, where):
    target, before, presses, more = STOPS[where]
    options = dict(max_train_steps=4, gradient_accumulation_steps=2, validation_prompt="x", num_validation_images=1, checkpointing_steps=4, **more)
    straight = train("straight", **options).output_dir
    config = TextToImageConfig(**{**options, **dict(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(tmp_path / "pictures"), resolution=64, train_batch_size=2, learning_rate=1e-2, seed=0,
        report_to="none", output_dir=str(tmp_path / "stopped"))})
    said = []
    run = open_text_to_image(config, toy(), said.append)
    with monkeypatch.context() as patch:
        module, name = target.rsplit(".", 1)
        owner = sys.modules.get(module) or getattr(sys.modules[module.rsplit(".", 1)[0]], module.rsplit(".", 1)[1])
        real, calls = getattr(owner, name), []

        def press(*args, **kwargs):
            calls.append(1)
            if len(calls) == before + 1:
                for _ in range(presses): signal.raise_signal(signal.SIGINT)
            return real(*args, **kwargs)
        patch.setattr(owner, name, press)
        with pytest.raises(KeyboardInterrupt): run.train()
    step = run.state.step
    assert step < 4 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [p.name for p in list_checkpoints(run.output_dir)] == ([f"checkpoint-{step}"] if step else []) and (not step or any(f"checkpoint-{step}" in text for text in said))
    try: run.train(), run.finish()
    finally: run.close()
    assert lasting(run.output_dir, 4) == lasting(straight, 4)
    if step: assert lasting(train("resumed", **options, resume_from_checkpoint=str(run.output_dir / f"checkpoint-{step}")).output_dir, 4) == lasting(straight, 4)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "kill"])
def test_a_run_told_to_stop_writes_a_checkpoint_that_goes_on_exactly(tmp_path, toy_model, kind):
    n, data = 60, fill(tmp_path / "pictures", 5)
    argv = lambda name: ["--pretrained_model_name_or_path", str(toy_model), "--train_data_dir", str(data), "--resolution", "64", "--train_batch_size", "2", "--max_train_steps", str(n), "--seed", "0",
        "--learning_rate", "1e-2", "--report_to", "none", "--checkpointing_steps", "1000", "--output_dir", str(tmp_path / name)]
    root, log = os.path.dirname(os.path.dirname(__file__)), tmp_path / "stopped" / "training_log.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "sdxl_course.text_to_image", *argv("stopped")], env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    patience = time.monotonic() + 120
    while not (log.is_file() and log.read_bytes().count(b"\n") >= 3) and process.poll() is None and time.monotonic() < patience: time.sleep(0.01)
    process.send_signal(kind)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if kind == signal.SIGINT else 143) and "Traceback" not in err and "--resume_from_checkpoint latest" in err, err[-2000:]
    found = list_checkpoints(tmp_path / "stopped")
    assert len(found) == 1 and 3 <= int(found[0].name.split("-")[1]) < n and found[0].name in out
    assert main(argv("stopped") + ["--resume_from_checkpoint", "latest"]) == main(argv("straight")) == 0
    for name in ("pytorch_lora_weights.safetensors", "training_log.jsonl"): assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_only_safetensors_and_json_are_written(train):
    folder = train(max_train_steps=2, checkpointing_steps=1, train_text_encoder=True).output_dir
    assert {name.rsplit(".", 1)[1] for name in files_of(folder)} - {"lock"} <= {"safetensors", "json", "jsonl", "yaml", "md", "png"}
    moments = load_file(folder / "checkpoint-2" / "optimizer.safetensors")
    assert {name.split("/")[0] for name in moments} == {"exp_avg", "exp_avg_sq", "step"}
    assert {name.split("/")[1].split(".")[0] for name in moments} == {"unet", "text_encoder", "text_encoder_2"}
    assert all(value.dtype.itemsize == 4 for value in moments.values())


def test_pruning_keeps_the_newest_and_follows_a_resume(train):
    options = dict(checkpointing_steps=2, checkpoints_total_limit=2)
    names = lambda folder: {p.name for p in folder.iterdir() if "checkpoint" in p.name}
    assert names(train(max_train_steps=6, **options).output_dir) == {"checkpoint-4", "checkpoint-6"}
    assert names(train(max_train_steps=10, resume_from_checkpoint="checkpoint-4", **options).output_dir) == {"checkpoint-4", "checkpoint-8", "checkpoint-10"}  # the one it went on from stays


def test_trap_7_the_old_checkpoint_goes_only_when_the_new_one_is_whole(train, monkeypatch, tmp_path):
    import sdxl_course.train.checkpoint as module
    real = module.save_whole
    monkeypatch.setattr(module, "save_whole", lambda path, *rest: real(path, *rest) if "checkpoint-2" not in str(path) else (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CourseError, match="No space left"): train(checkpointing_steps=1, checkpoints_total_limit=1)
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["checkpoint-1"] and not verify(tmp_path / "run" / "checkpoint-1")


def test_a_fresh_run_does_not_take_an_earlier_runs_checkpoints_for_its_own(train):
    train(max_train_steps=4, checkpointing_steps=2)
    said = []
    folder = train(max_train_steps=2, checkpointing_steps=2, rank=8, log=said.append).output_dir
    assert [p.name for p in list_checkpoints(folder)] == ["checkpoint-2"] and (folder / "earlier-1" / "checkpoint-4").is_dir()
    assert any("earlier-1" in text for text in said)


@pytest.mark.parametrize("change", [dict(rank=8), dict(lora_layers="to_q,to_v"), dict(seed=1), dict(learning_rate=1e-3), dict(train_text_encoder=True),
    dict(gradient_accumulation_steps=2), dict(train_batch_size=1), "data"], ids=str)
def test_a_configuration_that_makes_the_state_a_lie_is_refused_by_name(train, make_pictures, change):
    train(max_train_steps=2, checkpointing_steps=2)
    key = "data" if change == "data" else next(iter(change))
    if change == "data": change = dict(train_data_dir=str(make_pictures(4, "fewer")))
    key = {"train_batch_size": "pictures_per_micro_step"}.get(key, key)
    with pytest.raises(CourseError, match=key): train(max_train_steps=4, resume_from_checkpoint="latest", **change)


def test_damage_of_any_file_is_named_and_the_one_before_is_taken(train, tmp_path):
    straight = train("straight", max_train_steps=2, checkpointing_steps=1).output_dir
    for name in os.listdir(straight / "checkpoint-2"):
        for harm in ("cut", "bit", "gone"):
            folder = tmp_path / f"{name}-{harm}"
            for step in (1, 2): shutil.copytree(straight / f"checkpoint-{step}", folder / f"checkpoint-{step}")
            victim = folder / "checkpoint-2" / name
            data = bytearray(victim.read_bytes())
            if harm == "bit": data[len(data) // 2] ^= 4
            if harm == "cut": del data[len(data) // 2:]
            victim.write_bytes(data) if harm != "gone" else victim.unlink()
            said = []
            found = latest_checkpoint(folder, said.append)
            if name == "manifest.json" and harm == "bit" and not said: continue  # the flipped bit may lie in white space
            assert found.name == "checkpoint-1" and name.split(".")[0] in said[0], (name, harm, said)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("target", ["checkpoint-2", "checkpoint-1"], ids=["new", "written again"])
def test_a_process_killed_at_any_moment_of_writing_leaves_a_whole_checkpoint(tmp_path, target):
    good = lambda text: lambda draft: [write_atomic(draft / name, text) for name in ("a", "b")]
    done = 0
    for moment in range(1, 40):  # the process dies instead of its n-th rename or flush to disk
        folder = tmp_path / str(moment)
        write_folder(folder / "checkpoint-1", good(b"one"))
        child = os.fork()
        if not child:
            calls, real = [], {name: getattr(os, name) for name in ("replace", "fsync")}

            def deadly(name):
                def call(*args):
                    calls.append(name)
                    if len(calls) == moment: os._exit(9)
                    return real[name](*args)
                return call
            for name in real: setattr(os, name, deadly(name))
            write_folder(folder / target, good(b"two"))
            os._exit(0)
        done += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        remove_partial(folder)
        found = latest_checkpoint(folder)
        assert found and not verify(found) and not list(folder.glob(".*"))
        assert {p.read_bytes() for p in found.iterdir() if p.name != "manifest.json"} in ({b"one"}, {b"two"})
        if done: break
    assert done and moment > 8


def test_a_full_disk_is_a_sentence_and_keeps_what_was_there(tmp_path):
    write_folder(tmp_path / "checkpoint-1", lambda draft: write_atomic(draft / "a", b"one"))

    def full(draft): raise OSError(28, "No space left on device")
    with pytest.raises(CourseError, match="No space left"): write_folder(tmp_path / "checkpoint-2", full)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1"] and not verify(tmp_path / "checkpoint-1")


def test_neighbours_with_similar_names_are_no_checkpoints(tmp_path):
    "trainers.md 2.14 number 22, anchors 6.6: any name with a dash was read as a number."
    for name in ("checkpoint-foo", "checkpoint-", "checkpoint-5x", "checkpoints", "checkpoint-9999"): (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    said = []
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-9999"]
    assert find_checkpoint("latest", tmp_path, said.append) is None and len(said) == 2  # the empty one is named, then the fresh start


# ------------------------------------------------ every optimizer, EMA, accumulation: no model needed

class Line(torch.nn.Module):
    "Eight numbers per sample, told by a small network with dropout."
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.randn(8, 3, generator=seeded("a")) / 3), torch.nn.Parameter(torch.zeros(3, 8))

    def forward(self, x): return (x - torch.nn.functional.dropout(x @ self.a, .2) @ self.b).square().mean(1)


class Kernel(torch.nn.Module):
    "The same numbers under a kernel whose channels lie last in memory."
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(4, 2, 2, 2, generator=seeded("a")).to(memory_format=torch.channels_last))

    def forward(self, x): return torch.nn.functional.conv2d(x.view(-1, 2, 2, 2), self.a).square().mean((1, 2, 3))


def toy_train(folder, updates, start=None, name="adamw", ema=False, accumulation=1, schedule="cosine", model=Line):
    folder.mkdir(parents=True, exist_ok=True)
    model, plan = model(), BatchSampler(5, 2, accumulation, seed=3)
    named = dict(model.named_parameters())
    try: optimizer = torch.optim.AdamW(named.values(), 1e-2, fused=True) if name == "fused" else make_optimizer(list(named.values()), dict(prodigy=1.).get(name, 1e-2), name=name)
    except CourseError as error: pytest.skip(str(error))
    state = TrainState(named, optimizer, make_schedule(optimizer, "constant" if name == "schedulefree" else schedule, 1, 6), seed=3, ema=Ema(named, .9) if ema else None)
    write = lambda where: save_tensors(where / "weights.safetensors", {k: p.detach() for k, p in named.items()})
    if start: load_checkpoint(start, state, lambda where: copy_into(named, load_tensors(where / "weights.safetensors")[0]))
    batches = ((m, (torch.stack([SampleRNG(3, m.epoch, str(i)).normal("x", (8,)) for i in m.indices]),)) for m in plan.micro_steps(state.step, updates))
    fit(model, batches, state, Accelerator(cpu=True), after_update=[checkpointing(folder, 1, write)])
    return state


@pytest.mark.parametrize("name", ["adamw", "prodigy", "schedulefree", "adafactor"])
@pytest.mark.parametrize("ema", [False, True], ids=["plain", "ema"])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_every_optimizer_resumes_to_the_byte(name, ema, accumulation, tmp_path):
    if ema and name == "schedulefree": pytest.skip("averages by itself")
    options = dict(name=name, ema=ema, accumulation=accumulation)
    toy_train(tmp_path / "straight", 5, **options)
    for k in (1, 2, 3, 4):
        toy_train(tmp_path / f"from-{k}", 5, tmp_path / "straight" / f"checkpoint-{k}", **options)
        assert files_of(tmp_path / f"from-{k}" / "checkpoint-5") == files_of(tmp_path / "straight" / "checkpoint-5")


@pytest.mark.parametrize("name", ["adamw", "fused"])
def test_weights_with_channels_last_resume_to_the_byte(name, tmp_path):
    "Files hold moments row by row; a fused step reads them in the order in which the weights lie."
    straight = toy_train(tmp_path / "straight", 5, name=name, model=Kernel)
    for k in (1, 3):
        resumed = toy_train(tmp_path / f"from-{k}", 5, tmp_path / "straight" / f"checkpoint-{k}", name=name, model=Kernel)
        assert files_of(tmp_path / f"from-{k}" / "checkpoint-5") == files_of(tmp_path / "straight" / "checkpoint-5")
        for state in (straight, resumed): assert {m.stride() for m in state.optimizer.state[state.parameters["a"]].values() if m.ndim} == {state.parameters["a"].stride()} == {(8, 1, 4, 2)}


def test_what_is_saved_is_the_average_and_what_trains_is_not(tmp_path):
    state = toy_train(tmp_path, 4, ema=True)
    saved, trained = (load_tensors(tmp_path / "checkpoint-4" / f"{n}.safetensors")[0] for n in ("weights", "trained"))
    assert torch.equal(saved["b"], state.ema.average["b"]) and torch.equal(trained["b"], state.parameters["b"]) and not torch.equal(saved["b"], trained["b"])


def test_a_refused_resume_costs_nothing(train, monkeypatch):
    "Nothing is loaded or encoded before options are compared with those of the checkpoint."
    train("first", checkpointing_steps=2)
    monkeypatch.setattr("sdxl_course.train.build.build_run", lambda *given: pytest.fail("the run was built"))
    with pytest.raises(CourseError, match="rank .was 4, now 8"): train("first", resume_from_checkpoint="latest", rank=8)


def test_a_checkpoint_of_one_optimizer_does_not_fit_another(train):
    train("one", optimizer="adamw", max_train_steps=2, checkpointing_steps=1)
    with pytest.raises(CourseError, match="optimizer"): train("one", optimizer="adafactor", max_train_steps=2, resume_from_checkpoint="latest")


# ------------------------------------------------ changes on purpose

def weights_after(folder, k):
    "What the checkpoint after update k holds."
    return load_file(folder / f"checkpoint-{k}" / "pytorch_lora_weights.safetensors")


def moves(before, after, part=""): return torch.cat([(after[n] - before[n]).flatten() for n in sorted(before) if n.startswith(part)])


STEADY = dict(max_train_steps=4, checkpointing_steps=1, adam_weight_decay=0.0, max_grad_norm=1e6)


def test_a_resume_with_another_rate_takes_the_same_step_shorter(train):
    said, straight = [], train("straight", **STEADY).output_dir
    two = dict(STEADY, learning_rate=1e-3, resume_from_checkpoint=str(straight / "checkpoint-2"))
    with pytest.raises(CourseError, match="learning_rate .was 0.01, now 0.001.*--resume_with_changes learning_rate goes on.*--init_lora"): train("refused", **two)
    other = train("other", log=said.append, **two, resume_with_changes="learning_rate")
    assert [row["lr"] for row in other.log] == [1e-2, 1e-2, 1e-3, 1e-3] and any("learning_rate (was 0.01, now 0.001)" in text and "--resume_with_changes" in text for text in said)
    start, long, short = weights_after(straight, 2), weights_after(straight, 3), weights_after(other.output_dir, 3)
    assert torch.allclose(moves(start, short), moves(start, long) / 10, atol=1e-7) and moves(start, long).abs().max() > 1e-3  # the moments are the same


def test_a_changed_schedule_is_where_it_would_have_been(train):
    straight = train("straight", **STEADY).output_dir
    linear = dict(STEADY, lr_scheduler="linear", lr_warmup_steps=0, learning_rate=2e-2)
    want = [row["lr"] for row in train("linear", **linear).log]
    other = train("other", **linear, resume_from_checkpoint=str(straight / "checkpoint-2"), resume_with_changes="lr_scheduler, lr_warmup_steps,learning_rate")
    assert [row["lr"] for row in other.log] == pytest.approx([1e-2, 1e-2, *want[2:]]) and want[2] == pytest.approx(1e-2) and want[3] == pytest.approx(5e-3)


def test_a_resume_may_split_the_rates_of_unet_and_text_encoders(train):
    text = dict(STEADY, train_text_encoder=True)
    straight = train("straight", **text).output_dir
    other = train("other", **text, text_encoder_lr=0.0, resume_from_checkpoint=str(straight / "checkpoint-2"), resume_with_changes="text_encoder_lr").output_dir
    start, long, held = weights_after(straight, 2), weights_after(straight, 3), weights_after(other, 3)
    assert not moves(start, held, "text_encoder").any() and moves(start, long, "text_encoder").any() and torch.allclose(moves(start, held, "unet"), moves(start, long, "unet"), atol=1e-8)


def test_a_resume_may_learn_from_more_pictures_but_never_with_another_rank(train, make_pictures):
    said, straight = [], train("straight", **STEADY).output_dir
    more = dict(STEADY, max_train_steps=7, train_data_dir=str(make_pictures(8, "more")), resume_from_checkpoint=str(straight / "checkpoint-2"))
    with pytest.raises(CourseError, match="data .was .*--resume_with_changes train_data_dir goes on"): train("refused", **more)
    other = train("other", log=said.append, **more, resume_with_changes="train_data_dir", debug_loss=True)
    assert {name for row in other.log[2:] for name in row["loss_of"]} - {f"{i}.png" for i in range(5)} and any("data (was " in text for text in said)
    with pytest.raises(CourseError, match="cannot name rank"): train("rank", **more, rank=8, resume_with_changes="rank")
    with pytest.raises(CourseError, match="rank .was 4, now 8") as caught: train("rank", **more, rank=8, resume_with_changes="train_data_dir")
    assert "--resume_with_changes" not in str(caught.value) and "--init_lora" in str(caught.value)
    with pytest.raises(CourseError, match="did you mean learning_rate"): train("slip", **more, resume_with_changes="learning_rat")


def test_a_named_change_that_is_none_keeps_the_bytes(train):
    straight = train("straight", **STEADY).output_dir
    again = train("again", **STEADY, resume_from_checkpoint=str(straight / "checkpoint-2"), resume_with_changes="learning_rate").output_dir
    for name in ("pytorch_lora_weights.safetensors", "training_log.jsonl"): assert files_of(again)[name] == files_of(straight)[name]
