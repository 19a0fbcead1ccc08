"The main job from end to end, on a toy model: what it computes, what it leaves, how it refuses."
import json
import os
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from sdxl_course.core import CourseError, SampleRNG
from sdxl_course.data.records import content_key
from sdxl_course.data.check import read_dataset
from sdxl_course.data.loader import BatchLoader
from sdxl_course.text_to_image import TextToImageConfig, main, open_text_to_image
from sdxl_course.train.results import license_of
from sdxl_course.train.prepare import load_base
from sdxl_course.model.adapters import enable_gradient_checkpointing, lora_modules
from sdxl_course.data.sampler import MicroBatch, epoch_order
from toy import files_of, make_pictures as fill


def load_stock(model, lora=None):
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    if lora: pipeline.load_lora_weights(lora)
    return pipeline


def draw(pipeline): return pipeline("a house", generator=torch.Generator().manual_seed(3), num_inference_steps=2, height=64, width=64, output_type="np").images


# ---------------------------------------------------------------- what it leaves

def test_a_run_leaves_what_other_tools_read(train, tmp_path):
    "anchors.md 6 trap 2: the card named another licence than the base model's, and had neither widget nor gallery."
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: openrail++\n---\n")  # as SDXL's own card says
    result = train(max_train_steps=4, validation_prompt="a house", num_validation_images=2, lora_alpha=8, curve=True, pretrained_model_name_or_path=str(base))
    files = files_of(result.output_dir)
    for name in ("pytorch_lora_weights.safetensors", "config.yaml", "training_log.jsonl", "README.md", "loss.png", "image_0.png", "image_1.png", "validation/step-000003-0.png"):
        assert name in files, name
    assert files["loss.png"].startswith(b"\x89PNG")
    rows = [json.loads(line) for line in files["training_log.jsonl"].splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and [row["epoch"] for row in rows] == [0, 0, 0, 1]
    assert set(rows[0]) == {"step", "epoch", "loss", "lr", "grad_norm"} and result.losses == [row["loss"] for row in rows]
    card = files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == license_of("stabilityai/stable-diffusion-xl-base-1.0") == "openrail++" and "<Gallery />" in card
    assert yaml.safe_load(card.split("---")[1])["widget"] == [dict(text="a house", output=dict(url=f"image_{i}.png")) for i in range(2)]


@pytest.mark.parametrize("options, exact", [(dict(lora_alpha=2.0), True), (dict(lora_alpha=2.0, train_text_encoder=True), True), (dict(use_dora=True), True), (dict(use_rslora=True, lora_alpha=3.0), True),
    (dict(lora_layers="attention+feedforward", use_ema=True), True), (dict(init_lora_weights="pissa", lora_alpha=2.0), False), (dict(init_lora_weights="olora"), False), (dict(init_lora_weights="orthogonal"), True)], ids=str)
def test_stock_diffusers_draws_our_picture_from_our_files(toy, toy_model, make_pictures, tmp_path, options, exact):
    live, text = toy(), options.get("train_text_encoder", False)
    config = TextToImageConfig(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(make_pictures(3)), output_dir=str(tmp_path / "o"), resolution=64, train_batch_size=2, max_train_steps=3,
        learning_rate=1e-2, seed=0, report_to="none", output_kohya_format=True, skip_final_inference=True, **options)
    run = open_text_to_image(config, live, log=lambda text: None)
    try: run.train(), run.finish()
    finally: run.close()
    if run.state.ema:
        for name, p in run.state.parameters.items(): p.data.copy_(run.state.ema.average[name])
    ours = live.pipeline()
    ours.set_progress_bar_config(disable=True)
    for part in lora_modules(live, True).values(): part.eval()
    want, stock = draw(ours), load_stock(toy_model, str(tmp_path / "o"))
    assert abs(want - draw(stock)).max() <= (0 if exact else 1e-4)
    assert abs(want - draw(load_stock(toy_model))).max() > 1e-4
    stock.fuse_lora()
    stock.unload_lora_weights()
    assert abs(want - draw(stock)).max() < 1e-3  # merged equals unmerged
    if not options.get("use_dora"):  # diffusers leaves dora_scale out, with a warning
        kohya = load_stock(toy_model)
        kohya.load_lora_weights(str(tmp_path / "o"), weight_name="pytorch_lora_weights_kohya.safetensors")
        assert abs(want - draw(kohya)).max() < 1e-4
    keys = load_file(tmp_path / "o" / "pytorch_lora_weights.safetensors")
    assert all("lora" in key for key in keys)
    assert {key.split(".")[0] for key in keys} == ({"unet", "text_encoder", "text_encoder_2"} if text else {"unet"})


@pytest.mark.parametrize("options", [dict(), dict(train_text_encoder=True), dict(use_rslora=True, lora_alpha=3.0)], ids=str)
def test_a_lora_that_has_not_learnt_is_the_base_model(train, toy_model, options):
    folder = train(learning_rate=0.0, max_train_steps=1, **options).output_dir
    assert abs(draw(load_stock(toy_model, str(folder))) - draw(load_stock(toy_model))).max() == 0


def test_defects_31_and_32_kohya_files_with_text_encoders_and_dora_name_every_layer_rightly(train, toy_model):
    "UNet keys lost their alpha and their names when text encoders were trained; DoRA's lengths were never called dora_scale."
    folder = train("a", train_text_encoder=True, use_dora=True, lora_alpha=1.0, output_kohya_format=True).output_dir
    keys = load_file(folder / "pytorch_lora_weights_kohya.safetensors")
    layer, merged = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", load_stock(toy_model, str(folder))
    weight, part = load_stock(toy_model).unet.get_submodule(layer).weight.detach(), lambda kind: keys[f"lora_unet_{layer.replace('mid_block.attentions.0', 'middle_block.1').replace('.', '_')}.{kind}"]
    whole = weight + part("alpha") / 4 * part("lora_up.weight") @ part("lora_down.weight")
    merged.fuse_lora()
    assert (merged.unet.get_submodule(layer).base_layer.weight - part("dora_scale") * whole / whole.norm(dim=1, keepdim=True)).abs().max() < 1e-6  # as ComfyUI computes it
    layers = {key.split(".")[0] for key in keys}
    assert {layer.split("_")[1] for layer in layers} == {"unet", "te1", "te2"}
    for layer in layers:
        assert {key.split(".", 1)[1] for key in keys if key.split(".")[0] == layer} == {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"} and keys[f"{layer}.alpha"] == 1


def test_checkpoints_open_in_stock_diffusers_too(train, toy_model):
    result = train(max_train_steps=2, checkpointing_steps=2)
    draw(load_stock(toy_model, str(result.output_dir / "checkpoint-2")))


def test_no_file_and_no_word_ever_holds_the_token(tmp_path, toy_model, make_pictures, capfd, monkeypatch):
    token = "hf_" + "Zq7" * 12
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["--pretrained_model_name_or_path", str(toy_model), "--train_data_dir", str(make_pictures(2)), "--resolution", "64", "--output_dir", str(tmp_path / "o"),
        "--train_batch_size", "2", "--max_train_steps", "2", "--checkpointing_steps", "1", "--report_to", "tensorboard", "--hub_token", token]) == 0
    shown = "".join(capfd.readouterr())
    assert token not in shown and not any(token.encode() in data for data in files_of(tmp_path / "o").values())


# ---------------------------------------------------------------- the bar from outside

COMMON = "--resolution 64 --train_batch_size 1 --gradient_accumulation_steps 1 --learning_rate 5.0e-04 --scale_lr --lr_scheduler constant --lr_warmup_steps 0".split()
LIMITED = "--max_train_steps 6 --checkpointing_steps=2 --checkpoints_total_limit=2"


@pytest.mark.parametrize("number, more, prefixes, kept", [pytest.param(1, LIMITED, {"unet"}, {"checkpoint-4", "checkpoint-6"}, marks=pytest.mark.slow), (2, "--max_train_steps 2", {"unet"}, None),
    (3, "--max_train_steps 2 --train_text_encoder", {"unet", "text_encoder", "text_encoder_2"}, None), (4, f"{LIMITED} --train_text_encoder", {"unet", "text_encoder", "text_encoder_2"}, {"checkpoint-4", "checkpoint-6"})])
def test_upstream(number, more, prefixes, kept, upstream_pipe, tmp_path, monkeypatch):
    "diffusers' own tests of the script, numbers 1 to 4 of trainers.md."
    monkeypatch.chdir(tmp_path)
    assert main(["--pretrained_model_name_or_path", str(upstream_pipe), "--dataset_name", str(fill(tmp_path / "data", 3)), *more.split(), *COMMON, "--output_dir", str(tmp_path / "o")]) == 0
    keys = load_file(tmp_path / "o" / "pytorch_lora_weights.safetensors")
    assert all("lora" in key for key in keys) and {key.split(".")[0] for key in keys} == prefixes
    if not kept: return
    pipe = DiffusionPipeline.from_pretrained(str(upstream_pipe))
    pipe.load_lora_weights(str(tmp_path / "o"))
    pipe("a prompt", num_inference_steps=1)
    assert {name for name in os.listdir(tmp_path / "o") if "checkpoint" in name} == kept


@pytest.mark.slow
def test_upstream_resume_then_prune_several(upstream_pipe, tmp_path):
    argv = ["--pretrained_model_name_or_path", str(upstream_pipe), "--train_data_dir", str(fill(tmp_path / "data", 3)), *COMMON, "--output_dir", str(tmp_path / "o"), "--seed", "0", "--report_to", "none", "--checkpointing_steps=2"]
    there = lambda: {name for name in os.listdir(tmp_path / "o") if "checkpoint" in name}
    assert main(argv + ["--max_train_steps", "4"]) == 0 and there() == {"checkpoint-2", "checkpoint-4"}
    assert main(argv + ["--max_train_steps", "8", "--resume_from_checkpoint=checkpoint-4", "--checkpoints_total_limit=2"]) == 0
    assert there() == {"checkpoint-4", "checkpoint-6", "checkpoint-8"}  # upstream deletes the one that it went on from, too


@pytest.mark.slow
def test_the_source_documents_command_runs_on_local_paths(tmp_path, toy_model, capsys, monkeypatch):
    "With a small resolution, without the push, on a machine without GPU and without wandb."
    monkeypatch.setattr("sdxl_course.train.machine.find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = f"""--pretrained_model_name_or_path={toy_model} --pretrained_vae_model_name_or_path={toy_model}/vae --dataset_name={fill(tmp_path / "data", 2)} --num_validation_images=4 --validation_epochs=1
        --output_dir={tmp_path / "o"} --resolution=64 --center_crop --random_flip --train_text_encoder --train_batch_size=1 --num_train_epochs=10 --checkpointing_steps=500 --gradient_accumulation_steps=4
        --learning_rate=1e-04 --lr_warmup_steps=0 --report_to=wandb --dataloader_num_workers=8 --allow_tf32 --mixed_precision=fp16""".split()
    prompt = "An inventor tinkers with a complex machine in his workshop, oblivious\nto the setting sun outside"
    assert main(argv + ["--validation_prompt", prompt]) == 0
    told, rows = capsys.readouterr(), (tmp_path / "o" / "training_log.jsonl").read_text().splitlines()
    assert len(rows) == 10 and "fp16 needs a GPU" in told.out and "wandb is not installed" in told.out and "Traceback" not in told.err
    assert {f"image_{i}.png" for i in range(4)} | {"validation/step-000009-3.png"} <= set(files_of(tmp_path / "o"))


@pytest.mark.parametrize("more", [["--optimizer", "AdamW", "--lora_alpha", "8", "--validation_prompts", "a", "b c"], []], ids=["given", "defaults"])
def test_print_config_prints_what_was_parsed_and_touches_nothing(tmp_path, monkeypatch, capsys, more):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDXL_COURSE_CACHE", str(tmp_path / "cache"))
    before = torch.random.get_rng_state()
    assert main(["--pretrained_model_name_or_path", "no/such/model", "--train_data_dir", "not there", "--hub_token", "hf_secret", "--print_config", *more]) == 0
    told = capsys.readouterr()
    shown = json.loads(told.out)
    want = {f.name: f.default for f in fields(TextToImageConfig) if f.name != "hub_token"} | dict(pretrained_model_name_or_path="no/such/model", train_data_dir="not there")
    if more: want |= dict(optimizer="AdamW", lora_alpha=8.0, validation_prompts=["a", "b c"])
    assert shown == want and told.err == "" and "hf_secret" not in told.out
    assert not os.listdir(tmp_path) and torch.equal(before, torch.random.get_rng_state())


# ---------------------------------------------------------------- what it computes

@pytest.mark.parametrize("options", [dict(), dict(prediction_type="v_prediction"), dict(snr_gamma=1.0), dict(prediction_type="v_prediction", snr_gamma=1.0), dict(debiased_estimation_loss=True),
    dict(prediction_type="v_prediction", debiased_estimation_loss=True), dict(noise_offset=0.3), dict(masked_loss=True, unmasked_weight=0.25), dict(masked_loss=True, snr_gamma=0.5, noise_offset=0.1)], ids=str)
@torch.no_grad()
def test_the_first_loss_of_a_run_is_the_closed_form(train, toy_model, tmp_path, options):
    "Written with stock parts, diffusers' DDPMScheduler and plain tensors; only the draws are looked up by their address."
    data = fill(tmp_path / "half", 5)
    for i in range(5):
        picture = Image.open(data / f"{i}.png").convert("RGB")
        if options.get("masked_loss"): picture.putalpha(Image.fromarray(np.repeat(np.uint8([[255] * 24 + [0] * 40]), 64, axis=0)))
        picture.save(data / f"{i}.png")
    with torch.enable_grad(): found = train(train_data_dir=str(data), max_train_steps=1, seed=7, **options).losses[0]
    pipe = StableDiffusionXLPipeline.from_pretrained(toy_model)
    noising, indices = DDPMScheduler.from_config(pipe.scheduler.config), epoch_order(5, 7, 0)[:2]
    losses = []
    for i in indices:
        rng = SampleRNG(7, 0, content_key((data / f"{i}.png").read_bytes()) + "#0")
        rgba = np.asarray(Image.open(data / f"{i}.png").convert("RGBA"), dtype=np.float64)
        alpha = rgba[..., 3:] / 255
        pixels = torch.tensor((rgba[..., :3] * alpha + 255 * (1 - alpha)) / 127.5 - 1).float().permute(2, 0, 1)[None]
        cloud = pipe.vae.encode(pixels).latent_dist
        latents = (cloud.mean + cloud.std * rng.normal("vae", (4, 8, 8))) * pipe.vae.config.scaling_factor
        noise = rng.normal("noise", (4, 8, 8))[None] + options.get("noise_offset", 0) * rng.normal("offset", (4, 1, 1))
        t = torch.tensor([int(1000 * rng.uniform("timestep"))])
        embeds, _, pooled, _ = pipe.encode_prompt(f"picture {i}", do_classifier_free_guidance=False)
        answer = pipe.unet(noising.add_noise(latents, noise, t), t, embeds, added_cond_kwargs=dict(text_embeds=pooled, time_ids=torch.tensor([[64.0, 64, 0, 0, 64, 64]]))).sample
        v = options.get("prediction_type") == "v_prediction"
        error = (answer - (noising.get_velocity(latents, noise, t) if v else noise))**2
        if options.get("masked_loss"): error[..., 3:] *= options.get("unmasked_weight", 0)  # 24 of 64 pixels are opaque
        snr = float(noising.alphas_cumprod[t] / (1 - noising.alphas_cumprod[t]))
        weight = min(snr, options["snr_gamma"]) / (snr + v if v else snr) if "snr_gamma" in options else (snr**0.5 / (snr + 1) if v else snr**-0.5) if "debiased_estimation_loss" in options else 1
        losses.append(float(error.mean()) * weight)
    assert found == pytest.approx(sum(losses) / 2, rel=2e-6)


def test_defect_16_exif_and_alpha_are_seen_as_a_viewer_shows_them(toy, tmp_path):
    data = fill(tmp_path / "turned", 2, size=(64, 96))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(data / "0.png").save(data / "0.png", exif=exif)
    hidden = Image.new("RGBA", (64, 96), (255, 0, 0, 0))
    hidden.save(data / "1.png")
    loader = BatchLoader(read_dataset(train_data_dir=str(data)), toy(), seed=0, resolution=64)
    loader.encode_once(latents=False, texts=True)
    micro = MicroBatch(0, 0, 0, (0, 1), 2, True)
    prepared = loader.prepare(micro)
    assert loader.batch(micro, prepared)[0].time_ids[:, :2].tolist() == [[96, 64], [96, 64]]  # (height, width), upright
    assert (prepared[1].pixels == 1).all()  # white, not the hidden red


def test_defect_28_the_autoencoder_of_sdxl_stays_in_fp32_unless_it_says_it_is_safe(toy):
    config = TextToImageConfig(pretrained_model_name_or_path="m", train_data_dir="d", resolution=64)
    for safe, want in ((False, torch.float32), (True, torch.bfloat16)):
        parts = toy()
        parts.vae.register_to_config(force_upcast=not safe)
        base = load_base(config, "cpu", torch.bfloat16, parts)
        assert base.vae.dtype == want and base.unet.dtype == base.text_encoder.dtype == torch.bfloat16


def test_broken_latents_are_named_by_file_also_when_they_are_not_kept(train, monkeypatch):
    import sdxl_course.data.loader as module
    real = module.posterior
    monkeypatch.setattr(module, "posterior", lambda vae, pixels: [x * float("nan") if len(pixels) > 1 else x for x in real(vae, pixels)])
    with pytest.raises(CourseError, match=r"\d.png: its latents are not finite"): train(cache_latents=False)


def test_validation_of_trained_text_encoders_is_without_dropout(train):
    "The encoders are in training while the loss is measured: a drawn dropout would make it another number each time."
    rows = [train(name, train_text_encoder=True, lora_dropout=0.5, validation_loss_steps=1, **more).log for name, more in (("a", {}), ("b", dict(validation_prompt="x", num_validation_images=1, validation_epochs=1)))]
    assert rows[0] == rows[1] and len({row["validation_loss"] for row in rows[0]}) == 3


def test_what_can_be_refused_is_refused_before_the_long_encoding(train, monkeypatch):
    monkeypatch.setattr(BatchLoader, "encode_once", lambda *a, **k: pytest.fail("encoded first"))
    for options, message in ((dict(lora_layers="to_qq"), "to_q"), (dict(init_lora="no.safetensors"), "no LoRA"), (dict(rescale_betas_zero_snr=True), "epsilon")):
        with pytest.raises(CourseError, match=message): train(**options)


def test_seed_0_counts_and_repeats(train):
    first, second, other = train("a").weights_path.read_bytes(), train("b").weights_path.read_bytes(), train("c", seed=1).weights_path.read_bytes()
    assert first == second != other


def test_validation_and_workers_change_nothing_in_training(train):
    plain = train("a").weights_path.read_bytes()
    assert plain == train("b", validation_prompt="a house", validation_prompts=["x", "y"], num_validation_images=1).weights_path.read_bytes()
    assert plain == train("c", dataloader_num_workers=2, checkpointing_steps=1, debug_loss=True).weights_path.read_bytes()


def test_gradient_checkpointing_reaches_every_network_and_changes_no_number(train, toy, monkeypatch):
    seen = []
    plain = train("a", train_text_encoder=True)
    monkeypatch.setattr("sdxl_course.model.adapters.enable_gradient_checkpointing", lambda model: (enable_gradient_checkpointing(model), seen.append(model)))
    saved = train("b", train_text_encoder=True, gradient_checkpointing=True)
    assert len(seen) == 3 and all(any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) for model in seen)
    assert [row["loss"] for row in plain.log] == pytest.approx([row["loss"] for row in saved.log], rel=1e-5)


def test_text_encoder_lora_learns(train):
    before = load_file(train("a", max_train_steps=1, train_text_encoder=True, learning_rate=1e-12).weights_path)
    after = load_file(train("b", max_train_steps=3, train_text_encoder=True).weights_path)
    for part in ("unet.", "text_encoder.", "text_encoder_2."):
        assert any((before[key] - after[key]).abs().max() > 1e-3 for key in after if key.startswith(part)), part


@pytest.mark.parametrize("options", [dict(), dict(center_crop=True, size=(72, 100)), dict(use_aspect_ratio_buckets=True, size=(72, 100)), dict(masked_loss=True)], ids=str)
def test_cached_and_uncached_runs_have_the_same_losses(train, make_pictures, options):
    "trainers.md 2.14 number 12: kept latents were paired by step with captions of another order; the fourth update is of the second epoch, which has an order of its own."
    data = str(make_pictures(5, "other", size=options.pop("size", (64, 64))))
    options |= dict(random_flip=True, train_data_dir=data, max_train_steps=4)
    assert train("afresh", cache_latents=False, cache_text_embeds=False, **options).losses == pytest.approx(train("kept", **options).losses, rel=1e-6)


def test_size_numbers_are_of_what_was_really_cut(toy, tmp_path):
    records = read_dataset(train_data_dir=str(fill(tmp_path / "wide", 4, size=(80, 160))))
    loader = BatchLoader(records, toy(), seed=0, resolution=64, random_flip=True)
    assert not loader.caches_latents()[0]  # random crops are not cached
    loader.encode_once(latents=False, texts=True)
    micro = MicroBatch(0, 0, 0, (0, 1, 2, 3), 4, True)
    prepared = loader.prepare(micro)
    ids = loader.batch(micro, prepared)[0].time_ids
    assert ids[:, :2].tolist() == [[80, 160]] * 4 and ids[:, 4:].tolist() == [[64, 64]] * 4
    assert ids[:, 3].tolist() == [p.crop_top_left[1] for p in prepared] and len(set(ids[:, 3].tolist())) > 1 and ids[:, 2].abs().sum() == 0
    later = loader.prepare(MicroBatch(9, 0, 1, (0, 1, 2, 3), 4, True))
    assert [p.crop_top_left for p in later] != [p.crop_top_left for p in prepared]  # drawn anew in the next epoch


def test_learning_rate_reaches_zero_under_accumulation(train):
    "trainers.md 2.14 number 19: the schedule was as many times too long as there were micro-steps in an update."
    log = train(max_train_steps=4, gradient_accumulation_steps=4, train_batch_size=1, lr_scheduler="linear", lr_warmup_steps=0, learning_rate=1e-2).log
    assert [row["lr"] for row in log] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_accumulated_small_batches_equal_large_ones(train):
    large = train("a", train_batch_size=4)
    small = train("b", train_batch_size=1, gradient_accumulation_steps=4)
    assert [row["grad_norm"] for row in small.log] == pytest.approx([row["grad_norm"] for row in large.log], rel=1e-4)
    assert small.losses == pytest.approx(large.losses, rel=1e-4)


def test_lora_and_adam_are_fp32_under_bf16_and_fp16_falls_back_on_a_cpu(train, monkeypatch):
    half = train("a", mixed_precision="bf16", max_train_steps=2, checkpointing_steps=2)
    for name in ("pytorch_lora_weights.safetensors", "checkpoint-2/optimizer.safetensors"):
        assert all(tensor.dtype == torch.float32 for tensor in load_file(half.output_dir / name).values())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = []
    assert train("b", mixed_precision="fp16", log=said.append).losses == train("c").losses
    assert any("fp16 needs a GPU" in text for text in said)


def test_debug_loss_is_of_single_pictures(train):
    rows = train(debug_loss=True, max_train_steps=3).log
    assert {name for row in rows for name in row["loss_of"]} == {f"{i}.png" for i in range(5)}
    for row in rows: assert sum(row["loss_of"].values()) / len(row["loss_of"]) == pytest.approx(row["loss"], rel=1e-5)


def test_a_broken_number_stops_the_run_with_names_and_keeps_the_checkpoint(train, monkeypatch):
    "anchors.md 6 trap 9: nothing guarded against NaN."
    import sdxl_course.train.objective as module
    real, calls = module.denoising_loss, []

    def breaks(*args, **kwargs):
        loss = real(*args, **kwargs)
        calls.append(loss.requires_grad)
        return loss * torch.tensor([float("nan"), 1.0])[:len(loss)] if sum(calls) == 2 and loss.requires_grad else loss
    monkeypatch.setattr(module, "denoising_loss", breaks)
    with pytest.raises(CourseError, match=r"update 2 .*\.png.*nothing was changed.*--resume_from_checkpoint checkpoint-1 goes on after update 1"): train(checkpointing_steps=1)
    calls[:] = [True]
    with pytest.raises(CourseError, match="there is no checkpoint yet"): train("fresh")  # in the first update


def test_long_captions_are_reported(train, make_pictures):
    "trainers.md 2.14 number 11: captions were cut at 77 tokens without a word."
    said = []
    folder = train(train_data_dir=str(make_pictures(2, "long", captions=["short", "word " * 60])), max_train_steps=1, log=said.append).output_dir
    assert any("longer than 77 tokens" in text for text in said)
    (remark,) = [row for row in json.loads((folder / "data_report.json").read_text())["remarks"] if "tokens" in str(row)]
    assert "over 77 tokens" in str(remark) and "not heard" in str(remark)


# ---------------------------------------------------------------- how it refuses

@pytest.mark.parametrize("words, message", [
    (["--train_data_dir", "no/such/folder"], "no/such/folder"), (["--pretrained_model_name_or_path", "no/such/model/at/all"], "no/such/model"),
    (["--resolution", "100"], "multiple of 8"), (["--resolution", "1024"], "knows"), (["--push_to_hub"], "nothing was trained"), (["--use_8bit_adam"], "NVIDIA GPU"),
    (["--resume_from_checkpoint", "checkpoint-99"], "no checkpoint"), (["--lora_layers", "to_qq"], "to_q"), (["--local_rank", "1"], "accelerate launch"),
    (["--enable_npu_flash_attention"], "NPU"), (["--enable_xformers_memory_efficient_attention"], "xformers"), (["--caption_column", "txet"], "text")])
def test_bad_input_is_one_clear_sentence(words, message, tmp_path, toy_model, make_pictures, capsys):
    argv = ["--pretrained_model_name_or_path", str(toy_model), "--train_data_dir", str(make_pictures(2)), "--resolution", "64", "--output_dir", str(tmp_path / "o"),
        "--report_to", "none", "--max_train_steps", "1"]
    assert main(argv + words) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and told.strip().count("\n") == 0


def test_empty_captionless_and_unwritable_folders(tmp_path, toy_model, make_pictures, capsys):
    argv = ["--pretrained_model_name_or_path", str(toy_model), "--resolution", "64", "--report_to", "none", "--max_train_steps", "1"]
    (tmp_path / "empty").mkdir()
    bare = fill(tmp_path / "bare", 2)
    (bare / "metadata.jsonl").unlink()
    (tmp_path / "file").write_text("in the way")
    for data, out, message in ((tmp_path / "empty", "o", "no pictures"), (bare, "o", "no captions"), (make_pictures(2), "file/o", "output_dir")):
        assert main(argv + ["--train_data_dir", str(data), "--output_dir", str(tmp_path / out)]) == 2
        told = capsys.readouterr().err
        assert message in told and "Traceback" not in told


def test_components_that_carry_a_lora_are_refused(toy, train, toy_model, make_pictures, tmp_path):
    from sdxl_course.text_to_image import train_text_to_image
    used = toy()
    config = TextToImageConfig(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(make_pictures(2, "two")), output_dir=str(tmp_path / "o"), resolution=64, train_batch_size=2,
        max_train_steps=1, seed=0, report_to="none")
    train_text_to_image(config, used, log=lambda text: None)
    with pytest.raises(CourseError, match="freshly loaded"): train_text_to_image(config, used, log=lambda text: None)


# ---------------------------------------------------------------- from a terminal

@pytest.mark.slow
def test_accelerate_launch_runs_the_module(tmp_path, toy_model, make_pictures):
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
    argv = ["--pretrained_model_name_or_path", str(toy_model), "--train_data_dir", str(make_pictures(2)), "--resolution=64", "--train_batch_size=1", "--gradient_accumulation_steps=1",
        "--max_train_steps=2", "--learning_rate=5.0e-04", "--scale_lr", "--lr_scheduler=constant", "--lr_warmup_steps=0", f"--output_dir={tmp_path / 'o'}", "--report_to=none"]
    root = os.path.dirname(os.path.dirname(__file__))
    done = subprocess.run([sys.executable, *launcher, "sdxl_course.text_to_image", *argv], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "o" / "pytorch_lora_weights.safetensors").is_file() and "Traceback" not in done.stderr
