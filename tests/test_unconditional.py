"The command that trains a diffusion model of pixels: what it takes, its loss, exact resume, what it leaves and what it refuses."
import json
from dataclasses import fields

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from sdxl_course.cli import main as command
from sdxl_course.core import seeded
from sdxl_course.train.pixels import PixelLoss, PixelModel
from sdxl_course.model.noise import PREDICTION_TYPES, NoiseSchedule
from sdxl_course.unconditional import UnconditionalConfig, main, train_unconditional
from toy import files_of

UPSTREAM = dict(dataset_name=None, dataset_config_name=None, train_data_dir=None, output_dir="ddpm-model-64", cache_dir=None, resolution=64, center_crop=False, random_flip=False, train_batch_size=16,
    dataloader_num_workers=0, gradient_accumulation_steps=1, learning_rate=1e-4, lr_scheduler="cosine", lr_warmup_steps=500, adam_beta1=0.95, adam_beta2=0.999, adam_weight_decay=1e-6, adam_epsilon=1e-8,
    use_ema=False, push_to_hub=False, hub_token=None, hub_model_id=None, logging_dir="logs", local_rank=-1, prediction_type="epsilon", ddpm_num_steps=1000, ddpm_num_inference_steps=1000,
    ddpm_beta_schedule="linear", checkpointing_steps=500, checkpoints_total_limit=None, resume_from_checkpoint=None)  # of train_unconditional.py


@pytest.fixture
def small(tmp_path):
    "A folder with the configuration of a UNet of a few thousand weights."
    UNet2DModel(sample_size=16, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")).save_config(tmp_path / "small")
    return str(tmp_path / "small")


@pytest.fixture
def pixels(tmp_path, small, make_pictures, monkeypatch):
    "A function that trains the small UNet on five toy pictures in tmp_path/NAME."
    monkeypatch.setattr("sdxl_course.train.run.save_curve", lambda path, *points: path.write_bytes(b""))
    usual = dict(pretrained_model_name_or_path=small, train_data_dir=str(make_pictures(5)), resolution=16, train_batch_size=2, max_train_steps=4, learning_rate=1e-3, lr_warmup_steps=1, seed=0, report_to="none",
        checkpointing_steps=1000, num_validation_images=2, ddpm_num_inference_steps=2)
    return lambda name="run", log=lambda text: None, **options: train_unconditional(UnconditionalConfig(**{**usual, "output_dir": str(tmp_path / name), **options}), None, log)


def test_upstream_flags_have_their_names_and_defaults_and_the_words_of_the_script_are_understood(capsys):
    have = {f.name: f.default for f in fields(UnconditionalConfig)}
    assert {name: have[name] for name in UPSTREAM} == UPSTREAM
    argv = ["--train_data_dir", "d", "--model_config_name_or_path", "m", "--num_epochs", "3", "--eval_batch_size", "4", "--save_images_epochs", "5", "--use_ema", "--ema_max_decay", "0.5", "--print_config"]
    assert command(["unconditional", *argv]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [shown[name] for name in ("pretrained_model_name_or_path", "num_train_epochs", "num_validation_images", "validation_epochs", "ema_decay")] == ["m", 3, 4, 5, 0.5]


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_loss_is_that_of_diffusers_scheduler(small, kind):
    unet, scheduler = UNet2DModel.from_config(UNet2DModel.load_config(small)), DDPMScheduler(prediction_type=kind)
    x, noise, t = (torch.randn(3, 3, 16, 16, generator=seeded("pixels", k)) for k in range(2)), None, torch.tensor([5, 500, 990])
    x, noise = x
    loss = PixelLoss(PixelModel(unet, scheduler), NoiseSchedule.of(scheduler))(x, noise, t)
    target = dict(epsilon=noise, sample=x, v_prediction=scheduler.get_velocity(x, noise, t))[kind]
    assert torch.allclose(loss, (unet(scheduler.add_noise(x, noise, t), t).sample - target).square().mean((1, 2, 3)), rtol=1e-3)


@pytest.mark.parametrize("options", [dict(), dict(use_ema=True, gradient_accumulation_steps=2, random_flip=True, ddpm_beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", snr_gamma=5.0)], ids=str)
def test_resume_is_exact(pixels, options):
    options = dict(options, checkpointing_steps=1)
    lasting = lambda folder: {name: data for name, data in files_of(folder).items() if name == "training_log.jsonl" or name.endswith(".safetensors") and name.startswith(("checkpoint-4", "unet"))}
    folder = pixels("straight", **options).output_dir
    straight = lasting(folder)
    assert {"unet/diffusion_pytorch_model.safetensors", "checkpoint-4/unet.safetensors"} <= straight.keys()
    for k in (1, 3): assert lasting(pixels(f"from-{k}", **options, resume_from_checkpoint=str(folder / f"checkpoint-{k}")).output_dir) == straight, k


def test_stock_diffusers_draws_what_the_run_drew(pixels):
    said = []
    result = pixels(log=said.append, validation_epochs=1)
    pipeline = DDPMPipeline.from_pretrained(str(result.output_dir))
    pipeline.set_progress_bar_config(disable=True)
    again = pipeline(1, torch.Generator().manual_seed(1), 2).images[0]  # picture 1 of seed 0
    assert max(abs(a - b) for a, b in zip(again.tobytes(), result.images[1].tobytes())) <= 1 and len(result.images) == 2
    files, card = files_of(result.output_dir), (result.output_dir / "README.md").read_text()
    assert {"image_0.png", "validation/step-000003-0.png", "validation.png", "model_index.json", "scheduler/scheduler_config.json", "config.yaml", "loss.png"} <= files.keys()
    assert "from diffusers import DDPMPipeline" in card and "picture = pipeline().images[0]" in card and "StableDiffusion" not in card
    assert said[0] == "5 pictures, opened and cut afresh each time"


def test_it_learns_and_goes_on_from_its_own_result(pixels):
    first = pixels("first", max_train_steps=60, learning_rate=1e-2)
    assert first.validation_loss_after < 0.8*first.validation_loss_before
    then = pixels("then", pretrained_model_name_or_path=str(first.output_dir))
    assert then.validation_loss_before == pytest.approx(first.validation_loss_after, rel=1e-5)


@pytest.mark.parametrize("words, message", [([], "no data was given"), (["--train_data_dir", "no/such"], "no/such"), (["--train_data_dir", "{pictures}", "--resolution", "17"], "multiple of 2"),
    (["--train_data_dir", "{pictures}", "--validation_prompt", "x"], "knows no words"), (["--train_data_dir", "{pictures}", "--model_config_name_or_path", "no/model"], "no config.json"),
    (["--train_data_dir", "{pictures}", "--ddpm_num_inference_steps", "2000"], "as many or fewer"), (["--train_data_dir", "{pictures}", "--cached_crops", "2"], "pixels of squares")])
def test_bad_input_is_one_clear_sentence(words, message, tmp_path, small, make_pictures, capsys):
    argv = ["--model_config_name_or_path", small, "--resolution", "16", "--output_dir", str(tmp_path / "o"), "--report_to", "none", "--max_train_steps", "1"]
    assert main(argv + [word.format(pictures=make_pictures(2)) for word in words]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and told.strip().count("\n") == 0
