"The command that distils a model into one that draws in four steps, on a toy model: what it takes, what it learns, what it leaves."
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from sdxl_course.cli import main as command
from sdxl_course.core import CourseError, seeded
from sdxl_course.data.loader import Batch
from sdxl_course.lcm import LAYERS, ConsistencyLoss, LcmConfig, drawing, main, measured_distance, train_lcm
from sdxl_course.model.adapters import inject_lora, lora_modules
from sdxl_course.model.consistency import consistency_function, consistency_scalings, guidance_embedding, guided_step, solver_times, with_guidance_input
from sdxl_course.model.noise import PREDICTION_TYPES, NoiseSchedule
from sdxl_course.train.objective import predict
from toy import files_of

# flags of train_lcm_distill_lora_sdxl.py with their defaults, and of train_lcm_distill_sdxl_wds.py
UPSTREAM = dict(output_dir="lcm-xl-distilled", cache_dir=None, seed=None, logging_dir="logs", report_to="tensorboard", checkpointing_steps=500, checkpoints_total_limit=None, dataset_name=None,
    dataset_config_name=None, train_data_dir=None, image_column="image", caption_column="text", resolution=1024, dataloader_num_workers=0, train_batch_size=16, num_train_epochs=100, max_train_steps=None,
    max_train_samples=None, learning_rate=1e-6, lr_scheduler="constant", lr_warmup_steps=500, gradient_accumulation_steps=1, adam_beta1=0.9, adam_beta2=0.999, adam_weight_decay=1e-2, adam_epsilon=1e-8,
    max_grad_norm=1.0, w_min=3.0, w_max=15.0, num_ddim_timesteps=50, loss_type="l2", huber_c=0.001, lora_dropout=0.0, timestep_scaling_factor=10.0, mixed_precision=None, validation_steps=200,
    hub_token=None, hub_model_id=None, pretrained_vae_model_name_or_path=None, unet_time_cond_proj_dim=256, cast_teacher_unet=False)
OTHERS = dict(pretrained_teacher_model="pretrained_model_name_or_path", teacher_revision="revision", lora_rank="rank", lora_target_modules="lora_layers", interpolation_type="image_interpolation_mode")


def draw(*shape): return torch.randn(*shape, generator=seeded("lcm test", *shape))


@pytest.fixture
def lcm(tmp_path, toy, toy_model, make_pictures, monkeypatch):
    "A function that distils the toy model on five toy pictures in tmp_path/NAME."
    monkeypatch.setattr("sdxl_course.train.run.save_curve", lambda path, *points: Path(path).write_bytes(b""))
    usual = dict(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(make_pictures(5)), resolution=64, train_batch_size=2, max_train_steps=3, learning_rate=1e-3, seed=0, report_to="none",
        checkpointing_steps=1000, rank=2, unet_time_cond_proj_dim=8)
    return lambda name="run", log=lambda text: None, components=None, **options: train_lcm(LcmConfig(**{**usual, "output_dir": str(tmp_path / name), **options}), components or toy(), log)


@pytest.fixture
def question(toy):
    "A batch, its noise and timesteps, as the loader gives them."
    parts = toy()
    batch = Batch(draw(3, 4, 8, 8), draw(3, 77, 16), draw(3, 8), torch.full((3, 6), 64.))
    return parts, batch, draw(3, 4, 8, 8).flip(0), torch.tensor([3, 400, 999])


def test_every_upstream_flag_has_its_name_and_default_and_the_words_of_the_script_are_understood(capsys):
    have = {f.name: f.default for f in fields(LcmConfig)}
    for name, default in UPSTREAM.items(): assert have[name] == default, name
    argv = ["--pretrained_teacher_model", "m", "--teacher_revision", "r", "--lora_rank", "16", "--lora_target_modules", "to_q,to_v", "--interpolation_type", "lanczos", "--train_data_dir", "d", "--print_config"]
    assert main(argv) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [shown[name] for name in OTHERS.values()] == ["m", "r", 16, "to_q,to_v", "lanczos"]
    assert command(["lcm", *argv]) == 0 and json.loads(capsys.readouterr().out) == shown


def test_at_time_zero_the_function_gives_its_input_back():
    x, answer = draw(2, 4, 8, 8), draw(2, 4, 8, 8).flip(0)
    schedule = NoiseSchedule(torch.linspace(0.999, 0.01, 1000))
    for kind in PREDICTION_TYPES:
        assert torch.equal(consistency_function(NoiseSchedule(schedule.alphas_cumprod, kind), answer, x, torch.zeros(2, dtype=torch.long)), x)
    skip, out = consistency_scalings(torch.arange(1000), 7.0)
    assert (skip[0], out[0]) == (1, 0) and bool((out[:20].diff() > 0).all()) and bool((skip[:20].diff() < 0).all())
    assert torch.allclose(skip + out**2, torch.ones(1000))  # 1 = s²/(t² + s²) + t²/(t² + s²)


def test_the_whole_path_of_a_perfect_student_is_one_picture():
    schedule, x0, noise = NoiseSchedule(torch.linspace(0.999, 0.01, 1000)), draw(1, 4, 8, 8), draw(1, 4, 8, 8).flip(1)
    for kind in PREDICTION_TYPES:
        own = NoiseSchedule(schedule.alphas_cumprod, kind)
        ends = [consistency_function(own, own.target(x0, noise, t), own.add_noise(x0, noise, t), t) for t in (torch.tensor([300]), torch.tensor([999]))]
        assert torch.allclose(*ends, atol=1e-3), kind


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_guided_step_is_the_one_of_diffusers(toy, kind):
    config = {**toy().scheduler.config, "prediction_type": kind}
    ddim = DDIMScheduler.from_config(config, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    schedule, spoken, silent, xt = NoiseSchedule.of(ddim), draw(1, 4, 8, 8), draw(1, 4, 8, 8).flip(1), draw(1, 4, 8, 8).flip(2)
    ddim.set_timesteps(50)
    for t in (999, 519, 39):
        want = ddim.step(silent + 6*(spoken - silent), t, xt).prev_sample
        start, earlier = solver_times(torch.tensor([t - 7]), 1000, 50)
        assert (int(start), int(earlier)) == (t, t - 20)
        assert torch.allclose(guided_step(schedule, spoken, silent, xt, start, earlier, torch.tensor([5.0])), want, atol=2e-3), t


def test_the_loss_is_that_of_the_reference_script(question):
    "A LoRA with values, every line written out."
    parts, batch, noise, timesteps = question
    for name, p in inject_lora(lora_modules(parts, False), seed=0, rank=2).items():
        if "lora_B" in name: torch.nn.init.normal_(p, std=0.1, generator=seeded(name))
    schedule, w = NoiseSchedule.of(parts.scheduler), torch.tensor([3.0, 7.0, 15.0])
    for kind in (None, 0.001):
        loss = ConsistencyLoss(parts, schedule, huber_c=kind)
        start, earlier = torch.tensor([19, 419, 999]), torch.tensor([0, 399, 979])
        alpha, sigma = (lambda t: schedule.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)), (lambda t: (1 - schedule.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1))
        xt, width = alpha(start)*batch.latents + sigma(start)*noise, w.view(-1, 1, 1, 1)
        x0 = lambda x, e, t: (x - sigma(t)*e)/alpha(t)
        f = lambda x, t: 0.25/((10*t)**2 + 0.25).view(-1, 1, 1, 1)*x + (10*t/((10*t)**2 + 0.25)**0.5).view(-1, 1, 1, 1)*x0(x, predict(parts.unet, x, t, batch), t)
        with torch.no_grad():
            parts.unet.disable_adapters()
            silent = Batch(batch.latents, torch.zeros_like(batch.prompt_embeds), torch.zeros_like(batch.pooled_prompt_embeds), batch.time_ids)
            with_words, without = predict(parts.unet, xt, start, batch), predict(parts.unet, xt, start, silent)
            parts.unet.enable_adapters()
            noise_of = with_words + width*(with_words - without)
            before = alpha(earlier)*(x0(xt, with_words, start) + width*(x0(xt, with_words, start) - x0(xt, without, start))) + sigma(earlier)*noise_of
            apart = f(xt, start) - f(before, earlier)
        want = (apart**2 if kind is None else (apart**2 + kind**2)**0.5 - kind).flatten(1).mean(1)
        found = loss.distance(batch, noise, timesteps, w)
        assert torch.allclose(found, want, rtol=2e-3, atol=1e-5)
        assert torch.allclose(measured_distance(loss)(None, batch, schedule, noise, timesteps), loss.distance(batch, noise, timesteps, torch.full((3,), 9.0)))


def test_the_guidance_is_drawn_in_its_range_and_by_the_seed(question):
    parts, batch, noise, timesteps = question
    loss, seen = ConsistencyLoss(parts, NoiseSchedule.of(parts.scheduler), w_range=(2.0, 4.0)), []
    loss.distance = lambda batch, noise, timesteps, w: seen.append(w)
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        for _ in range(50): loss(batch, noise, timesteps)
    w = torch.cat(seen).view(3, 150)
    assert torch.equal(w[0], w[1]) and not torch.equal(w[0], w[2]) and 2 <= w.min() < 2.1 and 3.9 < w.max() <= 4


def test_a_unet_with_an_input_for_the_guidance_begins_as_its_teacher(question):
    parts, batch, noise, timesteps = question
    told = with_guidance_input(parts.unet, 8)
    heard = lambda w: predict(told, noise, timesteps, batch, timestep_cond=guidance_embedding(torch.full((3,), w), 8))
    with torch.no_grad():
        assert torch.allclose(heard(3.0), predict(parts.unet, noise, timesteps, batch), atol=1e-6) and torch.equal(heard(3.0), heard(9.0))
        torch.nn.init.normal_(told.time_embedding.cond_proj.weight)
        assert not torch.allclose(heard(3.0), heard(9.0))


def test_only_the_student_gets_a_gradient(question):
    parts, batch, noise, timesteps = question
    named = inject_lora(lora_modules(parts, False), seed=0, rank=2, layers=LAYERS)
    assert any("time_emb_proj" in name for name in named) and any("proj_in" in name for name in named)
    loss = ConsistencyLoss(parts, NoiseSchedule.of(parts.scheduler))
    loss(batch, noise, timesteps).sum().backward()
    assert all(p.grad is not None for p in named.values()) and not any(p.requires_grad for name, p in parts.unet.named_parameters() if "lora" not in name)


@pytest.mark.parametrize("options", [dict(), dict(whole_unet=True), dict(loss_type="huber", use_ema=True, gradient_accumulation_steps=2)], ids=str)
def test_resume_is_exact(lcm, options):
    options = dict(options, max_train_steps=4, checkpointing_steps=1, lr_scheduler="cosine", lr_warmup_steps=1)
    lasting = lambda folder: {name: data for name, data in files_of(folder).items() if name == "training_log.jsonl" or name.endswith(".safetensors") and name.startswith(("checkpoint-4", "unet", "pytorch"))}
    folder = lcm("straight", **options).output_dir
    straight = lasting(folder)
    assert len(straight) >= 4
    for k in (1, 3): assert lasting(lcm(f"from-{k}", **options, resume_from_checkpoint=str(folder / f"checkpoint-{k}")).output_dir) == straight, k


def test_stock_diffusers_draws_our_picture_with_the_lora(lcm, toy, toy_model):
    live = toy()
    result = lcm(components=live, validation_prompt="a house", num_validation_images=1)
    stock = StableDiffusionXLPipeline.from_pretrained(str(toy_model))
    stock.load_lora_weights(str(result.output_dir))
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config)
    ours = live.pipeline()
    assert isinstance(ours.scheduler, LCMScheduler)
    pictures = []
    for pipeline in (stock, ours):
        pipeline.set_progress_bar_config(disable=True)
        pictures.append(pipeline("a house", generator=torch.Generator().manual_seed(3), num_inference_steps=4, guidance_scale=1.0, height=64, width=64, output_type="np").images)
    assert abs(pictures[0] - pictures[1]).max() < 1e-4
    card = (result.output_dir / "README.md").read_text()
    assert "LCMScheduler.from_config(pipeline.scheduler.config" in card and "num_inference_steps=4, guidance_scale=1.0" in card and "SDXL LCM-LoRA" in card
    assert result.validation_loss_after != result.validation_loss_before and {"image_0.png", "pytorch_lora_weights.safetensors"} <= files_of(result.output_dir).keys()


def test_stock_diffusers_loads_the_whole_unet_and_heeds_the_guidance(lcm):
    folder = lcm(whole_unet=True, learning_rate=1e-2).output_dir
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(folder))
    assert isinstance(pipeline.scheduler, LCMScheduler) and pipeline.unet.config.time_cond_proj_dim == 8
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert weights["time_embedding.cond_proj.weight"].abs().max() > 0  # it has learnt to listen
    pipeline.set_progress_bar_config(disable=True)
    picture = lambda guidance: pipeline("a house", generator=torch.Generator().manual_seed(3), num_inference_steps=4, guidance_scale=guidance, height=64, width=64, output_type="np").images
    assert abs(picture(4.0) - picture(12.0)).max() > 0


def test_validation_pictures_are_drawn_in_four_steps(lcm, monkeypatch):
    import sdxl_course.train.validation as module
    real, asked = module.draw_pictures, []
    monkeypatch.setattr(module, "draw_pictures", lambda components, *given, **more: asked.append((type(components.scheduler), more)) or real(components, *given, **more))
    lcm(validation_prompt="a house", num_validation_images=1)
    assert asked == [(LCMScheduler, dict(steps=4, guidance=1.0))]
    assert drawing(LcmConfig(pretrained_model_name_or_path="m", train_data_dir="d", whole_unet=True)) == dict(steps=4, guidance=8.0)


def test_distillation_brings_the_answers_of_a_path_together(lcm):
    result = lcm(max_train_steps=40, learning_rate=3e-3, rank=8, w_min=1.0, w_max=1.0)
    assert result.validation_loss_after < 0.8*result.validation_loss_before


@pytest.mark.parametrize("words, message", [([], "no data was given"), (["--train_data_dir", "no/such/folder"], "no/such/folder"), (["--train_data_dir", "{pictures}", "--num_ddim_timesteps", "2000"], "wanted 1000 at the most"),
    (["--train_data_dir", "{pictures}", "--w_min", "20"], "--w_min is above"), (["--train_data_dir", "{pictures}", "--ema_decay", "0.5"], "ema_decay"), (["--train_data_dir", "{pictures}", "--loss_type", "l1"], "l1")])
def test_bad_input_is_one_clear_sentence(words, message, tmp_path, toy_model, make_pictures, capsys):
    pictures = make_pictures(2)
    argv = ["--pretrained_teacher_model", str(toy_model), "--resolution", "64", "--output_dir", str(tmp_path / "o"), "--report_to", "none", "--max_train_steps", "1", "--lora_rank", "2"]
    assert main(argv + [word.format(pictures=pictures) for word in words]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and told.strip().count("\n") == 0


def test_an_edm_model_is_no_teacher(lcm, toy):
    from diffusers import EDMEulerScheduler
    parts = toy()
    parts.scheduler = EDMEulerScheduler()
    with pytest.raises(CourseError, match="EDMEulerScheduler, which has no timesteps"): lcm(components=parts)


def test_another_method_is_not_resumed(lcm):
    lcm(max_train_steps=2, checkpointing_steps=2)
    for options in (dict(w_max=9.0), dict(whole_unet=True), dict(num_ddim_timesteps=20)):
        with pytest.raises(CourseError, match=next(iter(options))): lcm(max_train_steps=4, resume_from_checkpoint="latest", **options)
