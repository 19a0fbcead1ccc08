"The command that trains on preferences, on a toy model: its loss, exact resume, what it leaves and what it refuses."
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from sdxl_course.core import seeded
from sdxl_course.data.loader import Batch
from sdxl_course.dpo import DpoConfig, PreferenceLoss, main, train_dpo
from sdxl_course.model.adapters import inject_lora, lora_modules
from sdxl_course.model.noise import NoiseSchedule
from sdxl_course.model.sampling import generate
from sdxl_course.train.objective import predict
from toy import files_of

UPSTREAM = dict(validation_steps=200, max_train_samples=None, output_dir="diffusion-dpo-lora", resolution=1024, train_batch_size=4, num_train_epochs=1, max_train_steps=None, checkpointing_steps=500,
    gradient_accumulation_steps=1, beta_dpo=5000, learning_rate=5e-4, lr_scheduler="constant", lr_warmup_steps=500, lr_num_cycles=1, lr_power=1.0, rank=4, adam_weight_decay=1e-2)  # of train_diffusion_dpo_sdxl.py


def draw(*shape): return torch.randn(*shape, generator=seeded("dpo test", *shape))


@pytest.fixture
def dpo(tmp_path, toy, toy_model, make_pictures, monkeypatch):
    "A function that trains the toy model on four pairs in tmp_path/NAME."
    monkeypatch.setattr("sdxl_course.train.run.save_curve", lambda path, *points: path.write_bytes(b""))
    good, bad = make_pictures(4, "good"), make_pictures(4, "bad")
    for k in range(4): Image.new("RGB", (64, 64), ("black", "white")[k % 2]).save(bad / f"{k}.png")
    usual = dict(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(good), rejected_data_dir=str(bad), resolution=64, train_batch_size=2, max_train_steps=4, learning_rate=1e-2, seed=0,
        report_to="none", checkpointing_steps=1000)
    return lambda name="run", components=None, **options: train_dpo(DpoConfig(**{**usual, "output_dir": str(tmp_path / name), **options}), components or toy(), lambda text: None)


def test_upstream_flags_have_their_names_and_defaults():
    have = {f.name: f.default for f in fields(DpoConfig)}
    assert {name: have[name] for name in UPSTREAM} == UPSTREAM


def test_the_loss_is_that_of_the_reference_script_and_log_2_at_the_start(toy):
    parts = toy()
    named = inject_lora(lora_modules(parts, False), seed=0, rank=2)
    batch = Batch(draw(3, 4, 8, 8), draw(3, 77, 16), draw(3, 8), torch.full((3, 6), 64.), dict(rejected_mean=draw(3, 4, 8, 8).flip(0)))
    noise, t, schedule = draw(3, 4, 8, 8).flip(1), torch.tensor([10, 500, 900]), NoiseSchedule.of(parts.scheduler)
    loss = PreferenceLoss(parts, schedule, beta=50.0)
    assert torch.allclose(loss(batch, noise, t), torch.full((3,), math.log(2)), atol=1e-5)
    for name, p in named.items():
        if "lora_B" in name: torch.nn.init.normal_(p, std=0.3, generator=seeded(name))
    def differences():
        errors = [(predict(parts.unet, schedule.add_noise(x, noise, t), t, batch) - noise).square().mean((1, 2, 3)) for x in (batch.latents, batch.extra["rejected_mean"])]
        return errors[0] - errors[1]
    with torch.no_grad():
        own = differences()
        parts.unet.disable_adapters()
        base = differences()
        parts.unet.enable_adapters()
    want = -torch.nn.functional.logsigmoid(-25.0*(own - base))
    assert torch.allclose(loss(batch, noise, t), want, rtol=1e-3, atol=1e-4) and not torch.allclose(want, torch.full((3,), math.log(2)), atol=1e-3)
    loss.right.clear()
    loss(batch, noise, t).sum().backward()
    assert all(p.grad is not None for p in named.values()) and loss.numbers()["implicit_accuracy"] == pytest.approx(float((own < base).float().mean()))


def test_resume_is_exact(dpo):
    options = dict(max_train_steps=4, checkpointing_steps=2, gradient_accumulation_steps=2, random_flip=True)
    lasting = lambda folder: {name: data for name, data in files_of(folder).items() if name == "training_log.jsonl" or name.endswith(".safetensors") and name.startswith(("checkpoint-4", "pytorch"))}
    folder = dpo("straight", **options).output_dir
    assert lasting(dpo("again", **options, resume_from_checkpoint=str(folder / "checkpoint-2")).output_dir) == lasting(folder)


def test_preferences_are_learnt(toy):
    "A batch that stays the same: its pairs are preferred as they should be, and those of the other order are not."
    parts = toy()
    named = inject_lora(lora_modules(parts, False), seed=0, rank=4, layers="attention+feedforward+convolution")
    batch = Batch(draw(4, 4, 8, 8), draw(4, 77, 16), draw(4, 8), torch.full((4, 6), 64.), dict(rejected_mean=draw(4, 4, 8, 8).flip(0)))
    noise, t = draw(4, 4, 8, 8).flip(1), torch.tensor([50, 100, 200, 300])
    loss, optimizer = PreferenceLoss(parts, NoiseSchedule.of(parts.scheduler), beta=200.0), torch.optim.Adam(named.values(), lr=1e-2)
    for _ in range(40): optimizer.zero_grad(), loss(batch, noise, t).mean().backward(), optimizer.step()
    turned = Batch(batch.extra["rejected_mean"], batch.prompt_embeds, batch.pooled_prompt_embeds, batch.time_ids, dict(rejected_mean=batch.latents))
    with torch.no_grad(): assert loss(batch, noise, t).mean() < 0.9*math.log(2) < math.log(2) < loss(turned, noise, t).mean()


def test_a_run_leaves_a_lora_and_says_how_often_it_agrees(dpo):
    result = dpo(max_train_steps=2)
    assert any("lora" in name for name in load_file(result.weights_path)) and all(0 <= row["implicit_accuracy"] <= 1 for row in result.log)


def test_stock_diffusers_draws_with_the_lora_what_the_run_draws(dpo, toy, toy_model):
    live = toy()
    result = dpo(components=live, rank=4, max_train_steps=6)
    stock = StableDiffusionXLPipeline.from_pretrained(str(toy_model), add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    def gap(pictures): # from what the run draws with the LoRA in memory
        return np.abs(np.asarray(pictures[0], int) - np.asarray(generate(live.pipeline(), "a house", 3, num_inference_steps=4)[0], int)).max()
    draw = lambda: stock("a house", generator=torch.Generator().manual_seed(3), num_inference_steps=4, guidance_scale=3.0, height=64, width=64).images
    assert gap(draw()) > 1
    stock.load_lora_weights(str(result.output_dir), weight_name="pytorch_lora_weights.safetensors")
    assert gap(draw()) <= 1


@pytest.mark.parametrize("words, message", [([], "two folders"), (["--train_data_dir", "{good}", "--rejected_data_dir", "no/such"], "no/such"), (["--train_data_dir", "{good}", "--rejected_data_dir", "{few}"], "for instance 1.png"),
    (["--train_data_dir", "{good}", "--snr_gamma", "5"], "compares errors")])
def test_bad_input_is_one_clear_sentence(words, message, tmp_path, toy_model, make_pictures, capsys):
    folders = dict(good=make_pictures(2, "good"), few=make_pictures(1, "few"))
    argv = ["--pretrained_model_name_or_path", str(toy_model), "--rejected_data_dir", str(folders["good"]), "--resolution", "64", "--output_dir", str(tmp_path / "o"), "--report_to", "none", "--max_train_steps", "1"]
    assert main(argv + [word.format(**folders) for word in words]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and told.strip().count("\n") == 0
