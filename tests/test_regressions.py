"What the reference scripts get wrong, in whole runs on a toy model: the defects of trainers.md 2.14 and the traps of anchors.md 6 that no other file shows."
import gc
import json
import shlex
import sys
import weakref
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from diffusers import DiffusionPipeline
from diffusers.models import ModelMixin
from diffusers.optimization import SchedulerType
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from sdxl_course.cli import main as command
from sdxl_course.model.components import SDXLComponents
from sdxl_course.core import CourseError
from sdxl_course.data.check import read_dataset
from sdxl_course.data.records import with_masks
from sdxl_course.data.loader import BatchLoader
from sdxl_course.text_to_image import TextToImageConfig, main, open_text_to_image
from sdxl_course.train.build import learning_scale
from sdxl_course.train.prepare import optimizer_and_schedule
from sdxl_course.train.weights import lora_weights
from sdxl_course.data.sampler import MicroBatch
from sdxl_course.data.shards import read_shard, unpack_entry
from test_trainer import REFERENCE
from toy import files_of
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture
def start(tmp_path, toy, toy_model, make_pictures, monkeypatch):
    "A function that opens a run over five toy pictures, ready to train; what it opened is closed in the end."
    monkeypatch.setattr("sdxl_course.train.run.save_curve", lambda path, *points: Path(path).write_bytes(b""))
    usual, runs = dict(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(make_pictures(5)), resolution=64, train_batch_size=5, max_train_steps=3, learning_rate=1e-2, seed=0,
        report_to="none", checkpointing_steps=1000), []

    def start(name="run", **options):
        runs.append(open_text_to_image(TextToImageConfig(**{**usual, "output_dir": str(tmp_path / name), **options}), toy(), log=lambda text: None))
        return runs[-1]
    yield start
    for run in runs: run.close()


# ---------------------------------------------------------------- the loop

def test_defect_30_the_other_processes_wait_for_hours_while_one_draws(start):
    "trainers.md 2.14 number 30: only the main process validates; after ten minutes of waiting, NCCL gave up."
    assert start().accelerator.init_handler.timeout >= timedelta(hours=2)


class Looks(TorchDispatchMode):
    "Counts how often a number is taken out of a tensor, which makes a GPU wait."
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_trap_10_losses_are_looked_at_once_per_update(train, monkeypatch):
    "anchors.md 6 trap 10: the loss was gathered and looked at in every micro-step, and the GPU stood still."
    import sdxl_course.train.loop as module
    looks, passes, calls, forward_backward = Looks(), [], [], module.forward_backward

    def watched(*args):
        passes.append(args[1].step)
        with looks: return forward_backward(*args)
    monkeypatch.setattr(module, "forward_backward", watched)
    for name in ("reduce", "gather", "gather_for_metrics"):
        monkeypatch.setattr(Accelerator, name, lambda self, *args, name=name, real=getattr(Accelerator, name), **options: calls.append(name) or real(self, *args, **options))
    assert len(train(train_batch_size=1, gradient_accumulation_steps=4, max_train_steps=4).log) == 4
    assert passes == [0] * 4 + [1] + [2] * 4 + [3] and calls == ["reduce"] * 4 and looks.count == 0
    with looks: torch.ones(()).item()
    assert looks.count == 1  # the count does count


def test_trap_18_scale_lr_and_epochs_under_accumulation(train):
    "anchors.md 6 trap 18: an update of the last, incomplete micro-steps is an update too."
    rates = lambda log: [row["lr"] for row in log]
    whole = train("a", scale_lr=True, gradient_accumulation_steps=3, train_batch_size=2, num_train_epochs=2, max_train_steps=None, learning_rate=1e-3).log
    assert rates(whole) == pytest.approx([6e-3] * 2, rel=1e-12) and [row["epoch"] for row in whole] == [0, 1]  # ceil(3 / 3) updates an epoch
    rest = train("b", scale_lr=True, gradient_accumulation_steps=2, train_batch_size=2, num_train_epochs=2, max_train_steps=None, learning_rate=1e-3).log
    assert rates(rest) == pytest.approx([4e-3] * 4, rel=1e-12) and [row["epoch"] for row in rest] == [0, 0, 1, 1]  # ceil(3 / 2)
    assert [row["epoch"] for row in train("c", gradient_accumulation_steps=2, train_batch_size=2, num_train_epochs=9, max_train_steps=3).log] == [0, 0, 1]  # max_train_steps wins


def test_defect_19_a_linear_schedule_ends_at_exactly_0(train):
    "trainers.md 2.14 number 19: with four micro-steps in an update, the rate had come down by a quarter only when the run was over."
    result = train(lr_scheduler="linear", lr_warmup_steps=0, num_train_epochs=2, max_train_steps=None, train_batch_size=1, gradient_accumulation_steps=4, checkpointing_steps=4,
        train_text_encoder=True, text_encoder_lr=5e-3)
    assert [row["lr"] for row in result.log] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    assert json.loads((result.output_dir / "checkpoint-4" / "scheduler.json").read_text())["_last_lr"] == [0, 0]


def test_text_encoders_get_gradients_under_gradient_checkpointing(train):
    "Recomputing reentrantly, from inputs that need no gradient, would leave the first layers without one, silently."
    plain, saved = (train(name, train_text_encoder=True, gradient_checkpointing=name == "saved") for name in ("plain", "saved"))
    assert [row["grad_norm"] for row in saved.log] == pytest.approx([row["grad_norm"] for row in plain.log], rel=1e-5)
    a, b = (load_file(run.weights_path) for run in (plain, saved))
    assert a.keys() == b.keys() and max((a[name] - b[name]).abs().max() for name in a) < 1e-4
    for part in ("text_encoder", "text_encoder_2"):
        for layer in ("q_proj", "k_proj", "v_proj", "out_proj"): assert b[f"{part}.text_model.encoder.layers.0.self_attn.{layer}.lora_B.weight"].abs().max() > 1e-3, (part, layer)


# ---------------------------------------------------------------- what is kept

def test_defect_13_and_trap_20_kept_crops_keep_their_own_sizes(toy, make_pictures):
    "trainers.md 2.14 number 13 and anchors.md 6 trap 20: latents of one crop were told to the model as another, or as the crop before the flip."
    records, parts = read_dataset(train_data_dir=str(make_pictures(4, "wide", size=(80, 160)))), toy()
    loader, seen = BatchLoader(records, parts, seed=0, resolution=64, random_flip=True, cached_crops=3), set()
    loader.encode_once(latents=True, texts=True)
    assert len(loader.latent_keys) == 4 * 2 * 3

    def latents_of(i, mirrored, left, rng):
        "By hand, from the file."
        picture = Image.open(records[i].path).convert("RGB").resize((128, 64), Image.Resampling.LANCZOS)
        if mirrored: picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.tensor(np.asarray(picture.crop((left, 0, left + 64, 64)), dtype=np.float64) / 127.5 - 1).float().permute(2, 0, 1)[None]
        with torch.no_grad(): cloud = parts.vae.encode(pixels).latent_dist
        return (cloud.mean + cloud.std * rng.normal("vae", (4, 8, 8)))[0] * parts.vae.config.scaling_factor
    for epoch in range(4):
        micro = MicroBatch(0, 0, epoch, (0, 1, 2, 3), 4, True)
        batch = loader.batch(micro, loader.prepare(micro))[0]
        for i, latents, (height, width, top, left, *target) in zip(micro.indices, batch.latents, batch.time_ids.int().tolist()):
            rng, mirrored = loader.rng(epoch, i), loader.augmentation(epoch, i)[0]
            assert (height, width, top, target) == (80, 160, 0, [64, 64])
            assert torch.allclose(latents, latents_of(i, mirrored, left, rng), atol=1e-5)
            assert not torch.allclose(latents, latents_of(i, not mirrored, left, rng), atol=1e-4)
            assert left == 32 or not torch.allclose(latents, latents_of(i, mirrored, 64 - left, rng), atol=1e-4)  # where the crop was before the flip
            seen.add((i, mirrored, left))
    assert {mirrored for _, mirrored, _ in seen} == {True, False} and any(len({left for j, _, left in seen if j == i}) > 1 for i in range(4))


def veil(folder, turn=True):
    "Make pictures opaque at the left, half transparent in the middle, nothing at the right; turn: every second one is upright."
    for i, file in enumerate(sorted(Path(folder).glob("*.png"))):
        picture = Image.open(file).convert("RGB")
        if turn and i % 2: picture = picture.transpose(Image.Transpose.ROTATE_90)
        alpha = np.zeros((picture.height, picture.width), np.uint8)
        alpha[:, :picture.width // 2], alpha[:, :picture.width // 4 + i] = 128, 255
        picture.putalpha(Image.fromarray(alpha))
        picture.save(file)
    return str(folder)


@pytest.mark.parametrize("options", [dict(center_crop=True), dict(use_aspect_ratio_buckets=True)], ids=str)
def test_masks_of_half_transparent_pictures_are_kept_as_they_are(train, make_pictures, options):
    "Cached equals uncached, mirrored or not, also where each shape has its bucket."
    options = dict(options, masked_loss=True, unmasked_weight=0.1, random_flip=True, max_train_steps=4, train_data_dir=veil(make_pictures(5, "veiled", size=(72, 100))))
    afresh = train("afresh", cache_latents=False, **options).losses
    assert afresh == pytest.approx(train("kept", **options).losses, rel=1e-6)
    assert afresh != pytest.approx(train("whole", **{**options, "masked_loss": False, "unmasked_weight": 0.0}).losses, rel=1e-2)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "afresh"])
def test_masks_are_mirrored_with_their_pictures(toy, make_pictures, kept):
    records = with_masks(read_dataset(train_data_dir=veil(make_pictures(5, "veiled"), turn=False)))
    loader, seen = BatchLoader(records, toy(), seed=0, resolution=64, center_crop=True, random_flip=True), set()
    loader.encode_once(latents=kept, texts=True)
    for epoch in range(2):
        micro = MicroBatch(0, 0, epoch, tuple(range(5)), 5, True)
        for i, mask in zip(micro.indices, loader.batch(micro, loader.prepare(micro))[0].extra["mask"]):
            alpha, mirrored = torch.tensor(np.array(Image.open(records[i].path).getchannel("A"))) / 255, loader.augmentation(epoch, i)[0]
            want = alpha.reshape(8, 8, 8, 8).mean((1, 3))
            assert torch.allclose(mask[0], want.flip(-1) if mirrored else want, atol=1e-6)
            seen.add(mirrored)
    assert seen == {True, False}


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "afresh"])
def test_traps_11_and_12_nothing_is_encoded_in_a_step_when_all_is_kept(start, kept):
    "anchors.md 6 trap 11 and 12: the VAE in fp32 and the text encoders worked in every step, for the same answer."
    run = start(num_train_epochs=3, max_train_steps=None, validation_loss_steps=1, validation_prompt="a house", num_validation_images=1, **({} if kept else dict(cache_latents=False, cache_text_embeds=False)))
    worked = []
    networks = dict(vae=run.components.vae.encoder, text_encoder=run.components.text_encoder, text_encoder_2=run.components.text_encoder_2)
    assert [name for name, network in networks.items() if network is None] == ["text_encoder", "text_encoder_2"]*kept  # gone, so they cannot work
    for name, network in networks.items(): network is None or network.register_forward_hook(lambda *_, name=name: worked.append(name))
    run.train()
    assert run.state.step == 3 and run.state.rows[-1]["epoch"] == 2
    if kept: assert worked == []
    else: assert worked.count("vae") == 3 and worked.count("text_encoder") >= 3 and worked.count("text_encoder_2") >= 3  # the hooks do hear them


@pytest.mark.parametrize("options, gone", [({}, {"text_encoder", "text_encoder_2", "vae"}), (dict(cache_latents=False), {"text_encoder", "text_encoder_2"}), (dict(cache_text_embeds=False), {"vae"}),
    (dict(train_text_encoder=True), {"vae"}), (dict(cache_latents=False, train_text_encoder=True), set())], ids=["all kept", "pictures afresh", "captions afresh", "learning text", "nothing kept"])
def test_encoders_whose_work_is_done_leave_the_memory(train, toy_model, make_pictures, tmp_path, monkeypatch, options, gone):
    "issue 19, lever 1: moving to the CPU frees nothing on a CPU; the run's numbers and pictures are those of a run that keeps everything."
    import sdxl_course.train.prepare as module
    refs, load, shown = {}, module.load_components, dict(validation_prompt="a house", num_validation_images=1, **options)

    def noted(*given, **more):
        whole = load(*given, **more)
        refs.update({part: weakref.ref(getattr(whole, part)) for part in ("text_encoder", "text_encoder_2", "vae")})
        return whole
    monkeypatch.setattr(module, "load_components", noted)
    config = TextToImageConfig(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(make_pictures(5)), resolution=64, train_batch_size=2, max_train_steps=3, learning_rate=1e-2,
        seed=0, report_to="none", checkpointing_steps=1000, output_dir=str(tmp_path / "own"), **shown)
    run = open_text_to_image(config, log=lambda text: None)
    gc.collect()
    assert {part for part, ref in refs.items() if ref() is None} == gone
    result = run.run()
    assert "vae" not in gone or run.components.vae is None  # loaded to draw, and gone again
    kept, mine = files_of(train("kept", **shown).output_dir), files_of(result.output_dir)
    assert {name for name in mine if name.endswith((".safetensors", ".png", ".jsonl")) and name != "loss.png"} >= {"image_0.png", "pytorch_lora_weights.safetensors", "training_log.jsonl"}
    assert [name for name in mine if name.endswith((".safetensors", ".png", ".jsonl")) and name != "loss.png" and mine[name] != kept[name]] == []


def test_a_damaged_entry_is_rebuilt_with_a_sentence_and_the_run_is_the_same(train, tmp_path):
    "On the disk, between two runs: one entry cut short, one with a flipped bit."
    first = train("a", cache_dir=str(tmp_path / "cache"), random_flip=True)
    files = {name: data for name, data in files_of(tmp_path / "cache").items() if name.endswith(".safetensors")}
    places = {key: place for shard in (tmp_path / "cache").rglob("*.safetensors") for key, place in read_shard(shard).items()}
    tensors = {key: unpack_entry(key, shard.read_bytes()[begin:begin + size])[0] for key, (shard, begin, size) in places.items()}
    assert len(places) == 15 and len(files) == 2
    cut, bent = (max((key for key in places if kind in tensors[key]), key=lambda key: places[key][1]) for kind in ("latent_mean", "prompt_embeds"))  # the last of their shards
    places[cut][0].write_bytes(places[cut][0].read_bytes()[:-100])
    whole = bytearray(places[bent][0].read_bytes())
    whole[-50] ^= 16
    places[bent][0].write_bytes(whole)
    with pytest.warns(UserWarning, match="damaged and is made again") as told: again = train("b", cache_dir=str(tmp_path / "cache"), random_flip=True)
    assert {key for key in (cut, bent) for warning in told if key in str(warning.message)} == {cut, bent}
    assert again.log == first.log and again.weights_path.read_bytes() == first.weights_path.read_bytes()
    assert {name: data for name, data in files_of(tmp_path / "cache").items() if name.endswith(".safetensors")} == files


# ---------------------------------------------------------------- validation, trackers, curve

def test_trap_14_validation_loads_nothing_and_frees_its_memory(start, monkeypatch):
    "anchors.md 6 trap 14: each validation read the whole model from the disk again, and the pipeline stayed in memory at the end."
    run, made, left, pipeline = start(validation_prompt="a house", num_validation_images=1, validation_epochs=1), [], [], SDXLComponents.pipeline
    validate = type(run).validate

    def refuse(*args, **options): raise AssertionError("something was loaded")
    for owner in (DiffusionPipeline, ModelMixin): monkeypatch.setattr(owner, "from_pretrained", refuse)
    monkeypatch.setattr("sdxl_course.train.prepare.load_components", refuse)

    def noted(self, **options):
        whole = pipeline(self, **options)
        assert whole.unet is run.components.unet
        made.append(weakref.ref(whole))
        return whole
    monkeypatch.setattr(SDXLComponents, "pipeline", noted)

    def counted(self, *args):
        result = validate(self, *args)
        gc.collect()
        left.append(sum(ref() is not None for ref in made))
        return result
    monkeypatch.setattr(type(run), "validate", counted)
    run.train(), run.finish()
    assert len(made) == 3 and left == [0] * 3  # after the first and the second epoch and at the end


class Notebook(GeneralTracker):
    "A tracker with the rules of wandb: steps only go forward."
    name, requires_logging_directory = "wandb", False

    def __init__(self):
        super().__init__()
        self.config, self.scalars, self.images, self.steps, self.closed = None, [], [], [], False

    @property
    def tracker(self): return self

    def store_init_configuration(self, values): self.config = dict(values)

    def log(self, values, step=None, **options): self.steps.append(step), self.scalars.append((step, values))

    def log_images(self, values, step=None, **options): self.steps.append(step), self.images.append((step, values))

    def finish(self): self.closed = True


def test_defect_36_trackers_get_scalars_and_pictures_in_order_and_no_token(train, monkeypatch):
    "trainers.md 2.14 number 36: pictures were told without their step, and wandb dropped what came after them."
    book, token = Notebook(), "hf_" + "Qw3" * 12
    monkeypatch.setattr("sdxl_course.train.build.usable_tracker", lambda *_: book)
    result = train(report_to="wandb", hub_token=token, train_batch_size=5, validation_prompts=["a", "b"], num_validation_images=1, validation_loss_steps=1, debug_loss=True)
    assert None not in book.steps and book.steps == sorted(book.steps) and book.closed
    assert [step for step, _ in book.scalars] == [1, 2, 3] and [values["train_loss"] for _, values in book.scalars] == result.losses
    for (_, values), row in zip(book.scalars, result.log):
        assert {name: values[name] for name in ("lr", "grad_norm", "validation_loss")} == {name: row[name] for name in ("lr", "grad_norm", "validation_loss")}
        assert {name: values[f"loss_for_{name}"] for name in row["loss_of"]} == row["loss_of"]
    assert [step for step, _ in book.images] == [1, 2, 3] and all(isinstance(image, Image.Image) for _, values in book.images for image in values["validation"])
    assert [len(values["validation"]) for _, values in book.images] == [2] * 3
    assert book.config["learning_rate"] == 1e-2 and "hub_token" not in book.config and token not in str(vars(book))


def test_the_curve_shows_three_lines_and_a_broken_run_leaves_it(train, tmp_path, monkeypatch):
    import sdxl_course.train.objective as module
    drawn, savefig = [], Figure.savefig

    def seen(self, path, *args, **options):
        drawn.append([line.get_xydata().tolist() for line in self.axes[0].get_lines()])
        return savefig(self, path, *args, **options)
    monkeypatch.setattr(Figure, "savefig", seen)
    result = train("a", curve=True, validation_loss_steps=2)
    raw, smooth, measured = drawn[-1]
    one, two, three = result.losses
    assert raw == [[1, one], [2, two], [3, three]]
    assert [y for _, y in smooth] == pytest.approx([one, 0.9 * one + 0.1 * two, 0.81 * one + 0.09 * two + 0.1 * three])
    assert measured == [[0, result.validation_loss_before], [2, result.log[1]["validation_loss"]], [3, result.validation_loss_after]]
    loss, updates = module.denoising_loss, []

    def breaks(*args, **options):
        updates.extend([1] * torch.is_grad_enabled())
        if len(updates) == 3: raise RuntimeError("the third update breaks")
        return loss(*args, **options)
    monkeypatch.setattr(module, "denoising_loss", breaks)
    drawn.clear()
    with pytest.raises(RuntimeError, match="third update"): train("b", curve=True, checkpointing_steps=2)
    assert (tmp_path / "b" / "loss.png").read_bytes().startswith(b"\x89PNG") and drawn[-1][0] == [[1, one], [2, two]]


# ---------------------------------------------------------------- options

@pytest.mark.parametrize("options", [dict(use_8bit_adam=True), dict(optimizer="AdamW8bit")], ids=str)
def test_8_bit_adam_gets_our_groups_and_settings(monkeypatch, options):
    "With a made-up bitsandbytes and made-up tensors on a GPU, so that no GPU is needed."
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW8bit=lambda *args, **settings: (args, settings))))
    named = {name: SimpleNamespace(name=name, device=torch.device("cuda")) for name in ("unet.x.lora_A.default.weight", "unet.x.lora_B.default.weight", "text_encoder.x.lora_A.default.weight")}
    config = TextToImageConfig(pretrained_model_name_or_path="m", train_data_dir="d", learning_rate=1e-3, train_text_encoder=True, text_encoder_lr=1e-4, adam_weight_decay_text_encoder=0.3, loraplus_lr_ratio=16.0,
        adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, adam_weight_decay=0.2, scale_lr=True, train_batch_size=2, **options)
    monkeypatch.setattr("sdxl_course.train.weights.inject_lora", lambda *parts, **options: named)
    monkeypatch.setattr("sdxl_course.train.prepare.make_schedule", lambda *schedule: None)
    scale, networks = learning_scale(config, processes=1), SimpleNamespace(unet=None, text_encoder=None, text_encoder_2=None)
    trained = lora_weights(config, networks, 0, scale)
    ((groups,), settings), _ = optimizer_and_schedule(config, trained.groups, 10, scale)
    assert [[p.name.split(".x.")[0] + p.name[-16] for p in group["params"]] for group in groups] == [["unetA"], ["unetB"], ["text_encoderA"]]
    assert [group["lr"] for group in groups] == pytest.approx([2e-3, 32e-3, 2e-4]) and [group["weight_decay"] for group in groups] == [0.2, 0.2, 0.3]
    assert settings == dict(lr=2e-3, weight_decay=0.2, betas=(0.8, 0.95), eps=1e-6)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(CourseError, match="pip install bitsandbytes"): optimizer_and_schedule(config, trained.groups, 10, scale)


SOURCE = r'''accelerate launch train_text_to_image_lora_sdxl.py \
--pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0" \
--pretrained_vae_model_name_or_path="madebyollin/sdxl-vae-fp16-fix" \
--dataset_name="AdamLucek/oldbookillustrations-small" \
--validation_prompt="An inventor tinkers with a complex machine in his workshop, oblivious
to the setting sun outside" \
--num_validation_images=4 \
--validation_epochs=1 \
--output_dir="output/sdxl-base-1.0-oldbookillustrations-lora" \
--resolution=1024 \
--center_crop \
--random_flip \
--train_text_encoder \
--train_batch_size=1 \
--num_train_epochs=10 \
--checkpointing_steps=500 \
--gradient_accumulation_steps=4 \
--learning_rate=1e-04 \
--lr_warmup_steps=0 \
--report_to="wandb" \
--dataloader_num_workers=8 \
--allow_tf32 \
--mixed_precision="fp16" \
--push_to_hub \
--hub_model_id="sdxl-base-1.0-oldbookillustrations-lora"'''


def test_the_source_documents_command_is_understood_word_for_word(capsys):
    "As a shell reads it; every option that it leaves out keeps its default."
    words = shlex.split(SOURCE.replace("\\\n", " "))
    assert words[:3] == ["accelerate", "launch", "train_text_to_image_lora_sdxl.py"] and len(words) == 26
    assert main(words[3:] + ["--print_config"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {f.name: f.default for f in fields(TextToImageConfig) if f.name != "hub_token"} | dict(
        pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0", pretrained_vae_model_name_or_path="madebyollin/sdxl-vae-fp16-fix", dataset_name="AdamLucek/oldbookillustrations-small",
        validation_prompt="An inventor tinkers with a complex machine in his workshop, oblivious\nto the setting sun outside", num_validation_images=4, validation_epochs=1,
        output_dir="output/sdxl-base-1.0-oldbookillustrations-lora", resolution=1024, center_crop=True, random_flip=True, train_text_encoder=True, train_batch_size=1, num_train_epochs=10,
        checkpointing_steps=500, gradient_accumulation_steps=4, learning_rate=1e-4, lr_warmup_steps=0, report_to="wandb", dataloader_num_workers=8, allow_tf32=True, mixed_precision="fp16",
        push_to_hub=True, hub_model_id="sdxl-base-1.0-oldbookillustrations-lora")
    assert command(["text-to-image", *words[3:], "--print_config"]) == 0 and json.loads(capsys.readouterr().out) == shown


CHOICES = dict(  # what the reference's parser takes, or, for the last three, what its help promises and its code can do
    image_interpolation_mode={"bilinear", "bicubic", "box", "hamming", "lanczos", "nearest", "nearest_exact"}, mixed_precision={"no", "fp16", "bf16"},
    lr_scheduler={kind.value for kind in SchedulerType}, prediction_type={"epsilon", "v_prediction"}, report_to={"tensorboard", "wandb", "comet_ml", "all"})
OURS = dict(report_to={"trackio", "none"})  # and what we take besides


def test_every_reference_flag_has_the_references_choices():
    have = {f.name: f for f in fields(TextToImageConfig)}
    for name in REFERENCE: assert set(have[name].metadata.get("choices", ())) == CHOICES.get(name, set()) | OURS.get(name, set()), name
