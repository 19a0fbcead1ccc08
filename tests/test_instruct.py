"The command that trains a UNet to change pictures, on a toy model: what it takes, what it changes, what it leaves."
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInstructPix2PixPipeline
from PIL import Image, ImageOps
from safetensors.torch import load_file
from sdxl_course.core import CourseError, seeded
from sdxl_course.inference import main as generate_main
from sdxl_course.instruct_pix2pix import EditLoss, InstructPix2PixConfig, main, open_instruct_pix2pix, train_instruct_pix2pix
from sdxl_course.model.components import load_components
from sdxl_course.model.latents import posterior
from sdxl_course.text_to_image import main as train_main
from sdxl_course.model.noise import NoiseSchedule
from test_trainer import REFERENCE
from toy import files_of

UPSTREAM = {name: flag for name, flag in REFERENCE.items() if name not in ("rank", "train_text_encoder", "debug_loss", "image_column", "caption_column", "validation_epochs", "local_rank", "snr_gamma",
    "prediction_type", "noise_offset", "enable_npu_flash_attention", "image_interpolation_mode")} | dict(  # the flags of train_instruct_pix2pix_sdxl.py: (type, default)
    original_image_column=(str, "input_image"), edited_image_column=(str, "edited_image"), edit_prompt_column=(str, "edit_prompt"), conditioning_dropout_prob=(float, None), use_ema=(bool, False),
    val_image_url_or_path=(str, None), validation_steps=(int, 100), output_dir=(str, "instruct-pix2pix-model"), resolution=(int, 256))


def make_edits(pictures):
    "Pictures before in before/, their negatives after, and rows that say so."
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    for name in ("before", "after"): (pictures / name).mkdir()
    for row in rows:
        image = Image.open(pictures / row["file_name"]).convert("RGB")
        image.save(pictures / "before" / row["file_name"]), ImageOps.invert(image).save(pictures / "after" / row["file_name"])
        (pictures / row["file_name"]).unlink()
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(dict(edited_image=f"after/{row['file_name']}", input_image=f"before/{row['file_name']}", edit_prompt=f"turn {i}")) + "\n" for i, row in enumerate(rows)))
    return pictures


@pytest.fixture
def edits(make_pictures): return make_edits(make_pictures(5))


@pytest.fixture
def edit(tmp_path, toy, toy_model, edits, monkeypatch):
    "A function that trains the toy model on five toy edits in tmp_path/NAME."
    monkeypatch.setattr("sdxl_course.train.run.save_curve", lambda path, *points: Path(path).write_bytes(b""))
    usual = dict(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(edits), resolution=64, train_batch_size=2, max_train_steps=3, learning_rate=1e-3, seed=0, report_to="none",
        checkpointing_steps=1000)
    return lambda name="run", log=lambda text: None, components=None, **options: train_instruct_pix2pix(
        InstructPix2PixConfig(**{**usual, "output_dir": str(tmp_path / name), **options}), components or toy(), log)


def lasting(folder):
    kept = {name: data for name, data in files_of(folder).items() if name == "training_log.jsonl" or name == "unet/diffusion_pytorch_model.safetensors" or name.startswith("checkpoint-4/") and name.endswith(".safetensors")}
    assert {"unet/diffusion_pytorch_model.safetensors", "checkpoint-4/unet.safetensors", "checkpoint-4/optimizer.safetensors"} <= kept.keys()
    return kept


def test_every_upstream_flag_has_its_name_type_and_default(capsys):
    have, kinds = {f.name: f for f in fields(InstructPix2PixConfig)}, get_type_hints(InstructPix2PixConfig)
    for name, (kind, default) in UPSTREAM.items():
        assert have[name].default == default, name
        assert kind is kinds[name] or kind in get_args(kinds[name]), name
    argv = [word for name, (kind, default) in UPSTREAM.items() if default not in (None, MISSING) for word in ([f"--{name}"] if kind is bool else [f"--{name}", str(default)])]
    assert main(["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--report_to", "none", "--conditioning_dropout_prob", "0.05", *argv, "--print_config"]) == 0
    assert json.loads(capsys.readouterr().out)["conditioning_dropout_prob"] == 0.05


def test_stock_diffusers_loads_the_result_and_draws_the_pictures_of_the_run(all_steps, edit, edits):
    result = edit(validation_prompt="turn 0", val_image_url_or_path=str(edits / "before" / "0.png"), num_validation_images=1, learning_rate=1e-2)
    pipeline = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(str(result.output_dir))
    assert pipeline.unet.config.in_channels == 8
    pipeline.set_progress_bar_config(disable=True)
    draw = lambda file: 255*pipeline("turn 0", image=Image.open(edits / "before" / file), generator=torch.Generator().manual_seed(0), num_inference_steps=20, guidance_scale=3.0, height=64, width=64, output_type="np").images[0]
    gap = lambda a, b: abs(a - np.asarray(b)).max()
    assert gap(draw("0.png"), Image.open(result.output_dir / "image_0.png")) <= 1 and gap(draw("0.png"), draw("1.png")) > 1e-4
    card = (result.output_dir / "README.md").read_text()
    assert "from diffusers import StableDiffusionXLInstructPix2PixPipeline" in card and 'image=load_image("before.png")' in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")


@pytest.mark.parametrize("options", [dict(conditioning_dropout_prob=0.3), dict(use_ema=True, gradient_accumulation_steps=2, gradient_checkpointing=True), dict(cache_latents=False, cache_text_embeds=False, random_flip=True, conditioning_dropout_prob=0.2)], ids=str)
def test_resume_is_exact(edit, options):
    options = dict(options, max_train_steps=4, checkpointing_steps=1, lr_scheduler="cosine", lr_warmup_steps=1)
    folder = edit("straight", **options).output_dir
    straight = lasting(folder)
    for k in (1, 3): assert lasting(edit(f"from-{k}", **options, resume_from_checkpoint=str(folder / f"checkpoint-{k}")).output_dir) == straight, k


def test_generate_changes_a_picture_and_draws_it_again(edit, edits, make_pictures, tmp_path, capsys):
    "From the command line as diffusers' own pipeline does; the picture's file says how, and which picture it came from."
    model, picture = edit().output_dir, sorted((edits / "before").iterdir())[0]
    draw = lambda *words: generate_main(["--device", "cpu", "--num_inference_steps", "4", *map(str, words)])
    assert draw("--model", model, "--prompt", "turn 1", "--edit_image", picture, "--image_guidance_scale", "2", "--seed", "3", "--output_dir", tmp_path / "new") == 0
    ours = Image.open(tmp_path / "new" / "image_000.png")
    stock = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(model)
    theirs = stock("turn 1", image=Image.open(picture).convert("RGB").resize((64, 64)), height=64, width=64, num_inference_steps=4, guidance_scale=3.0, image_guidance_scale=2.0, generator=[torch.Generator().manual_seed(3)]).images[0]
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
    capsys.readouterr()
    assert draw("--from", tmp_path / "new" / "image_000.png", "--output_dir", tmp_path / "again") == 0 and "to the last bit" in capsys.readouterr().out
    for words, told in ((["--model", model], "wants --edit_image"), (["--model", "tiny", "--edit_image", picture], "wants a model of instruct-pix2pix"), (["--model", model, "--image_guidance_scale", "2"], "wanted both"),
                        (["--model", model, "--edit_image", picture, "--init_image", picture], "leave --control_image"), (["--model", model, "--edit_image", tmp_path / "none.png"], "none.png")):
        assert draw("--prompt", "turn 1", "--output_dir", tmp_path / "no", *words) == 2
        said = capsys.readouterr().err
        assert told in said and "Traceback" not in said, said
    assert train_main(["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(make_pictures(3, "captioned")), "--resolution", "64", "--output_dir", str(tmp_path / "b"), "--max_train_steps", "1", "--report_to", "none"]) == 2
    assert "takes 8 channels and a latent has 4" in capsys.readouterr().err


def test_the_run_begins_as_the_base_model_and_learns_what_the_picture_before_says(edit, toy):
    live = toy()
    old = live.unet.conv_in.weight.clone()
    result = edit(components=live, max_train_steps=4, learning_rate=1e-2)
    new = live.unet.conv_in.weight
    assert new.shape[1] == 2*old.shape[1] and float(new[:, old.shape[1]:].abs().max()) > 0  # zero before the first update
    assert result.validation_loss_after != result.validation_loss_before


def test_the_loss_is_the_reference_scripts_for_given_draws(toy, toy_model, edits, tmp_path):
    "Latents before the edit unscaled, as train_instruct_pix2pix_sdxl.py and the pipeline have them; its masks for words and picture."
    config = InstructPix2PixConfig(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(edits), resolution=64, train_batch_size=5, max_train_steps=1, seed=0, report_to="none",
        output_dir=str(tmp_path / "o"), conditioning_dropout_prob=0.2)
    run = open_instruct_pix2pix(config, toy(), log=lambda text: None)
    try:
        with torch.no_grad(): run.components.unet.conv_in.weight[:, 4:] = torch.randn(8, 4, 3, 3, generator=seeded("wide"))
        micro = next(iter(run.sampler.micro_steps(0, 1, 0)))
        batch, noise, t, _ = run.loader.batch(micro, run.loader.prepare(micro))
        torch.manual_seed(7)
        with torch.no_grad(): ours = run.loss(batch, noise, t)
        torch.manual_seed(7)
        p, vae, uniform = 0.2, run.components.vae, torch.rand(len(noise))
        records = [run.loader.all[i] for i in micro.indices]
        pixels = torch.stack([torch.from_numpy(np.array(Image.open(r.companions["original"]))).permute(2, 0, 1).float()/127.5 - 1 for r in records])
        with torch.no_grad(): original = vae.encode(pixels).latent_dist.mode()
        embeds, pooled = (torch.where((uniform < 2*p).view(-1, *[1]*(x.ndim - 1)), e[None], x) for x, e in zip((batch.prompt_embeds, batch.pooled_prompt_embeds), run.loader.empty_embeds))
        mask = 1 - (uniform >= p).float()*(uniform < 3*p).float()
        original = original*mask.view(-1, 1, 1, 1)
        noisy = run.schedule.model_input(batch.latents, noise, t)[0]
        with torch.no_grad(): answer = run.components.unet(torch.cat([noisy, original], 1), t, embeds, added_cond_kwargs=dict(text_embeds=pooled, time_ids=batch.time_ids)).sample
        torch.testing.assert_close(ours, (answer - noise).square().flatten(1).mean(1), rtol=1e-4, atol=1e-6)
        assert 0 < int((uniform < 3*p).sum()) < len(noise)
    finally: run.close()


@pytest.mark.parametrize("words, message", [([], "no data was given"), (["--train_data_dir", "{plain}"], "no column 'edit_prompt'"), (["--train_data_dir", "{edits}", "--original_image_column", "source"], "no column 'source'"),
    (["--train_data_dir", "{edits}", "--caption_column", "text2"], "--edit_prompt_column"), (["--train_data_dir", "{edits}", "--conditioning_dropout_prob", "0.5"], "at most 0.33"),
    (["--train_data_dir", "{edits}", "--validation_prompt", "a"], "belong together"), (["--train_data_dir", "{edits}", "--validation_prompt", "a", "--val_image_url_or_path", "{edits}/metadata.jsonl"], "cannot be read as a picture"),
    (["--train_data_dir", "{edits}", "--tokenizer_name", "x"], "leave it out")], ids=lambda one: one if isinstance(one, str) else None)
def test_bad_input_is_one_clear_sentence(words, message, tmp_path, toy_model, edits, make_pictures, capsys):
    plain = make_pictures(2, name="plain")
    argv = ["--pretrained_model_name_or_path", str(toy_model), "--resolution", "64", "--output_dir", str(tmp_path / "o"), "--report_to", "none", "--max_train_steps", "1"]
    assert main(argv + [word.format(edits=edits, plain=plain) for word in words]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and told.strip().count("\n") == 0


def test_a_missing_picture_before_names_its_row(edit, edits):
    (edits / "before" / "1.png").unlink()
    with pytest.raises(CourseError, match="original picture 1.png"): edit()


def test_training_goes_on_from_a_model_that_edits_already(edit):
    "What it has learnt of the picture is where it begins; it is not widened again."
    first = edit("first", learning_rate=1e-2).output_dir
    kept = load_file(edit("kept", components=load_components(str(first)), learning_rate=0.0).output_dir / "unet" / "diffusion_pytorch_model.safetensors")
    before = load_file(first / "unet" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == kept.keys() and all(torch.equal(before[name], kept[name]) for name in before)
    assert before["conv_in.weight"][:, 4:].abs().max() > 0
