"""What only a GPU shows: half precision with a scaler, fused attention, exact resume on its kernels, memory as `plan` foretold it, drawing.

    pytest tests/gpu
"""
import functools
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from sdxl_course.core import seeded
from sdxl_course.evaluate import EvaluateConfig
from sdxl_course.inference import load_pipeline, main, set_lora_scale
from sdxl_course.judge import level_report
from sdxl_course.memory import fake_batch
from sdxl_course.model.adapters import add_lora, lora_parameters
from sdxl_course.model.components import load_components
from sdxl_course.model.lora_files import save_lora
from sdxl_course.model.sampling import generate
from sdxl_course.plan import forecast, read_command
from sdxl_course.train.prepare import optimizer_and_schedule
from sdxl_course.world.samples import sample_dir
from toy import files_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of NVIDIA or AMD")
HALVES = ["fp16", *(["bf16"] if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else [])]


@pytest.mark.parametrize("precision", HALVES)
def test_half_precision_learns_what_full_precision_learns(train, precision):
    full, half = train("full", max_train_steps=6), train("half", max_train_steps=6, mixed_precision=precision)
    assert torch.allclose(torch.tensor(half.losses), torch.tensor(full.losses), rtol=0.05)


@pytest.mark.parametrize("precision", [None, *HALVES])
@pytest.mark.parametrize("options", [{}, dict(train_text_encoder=True), dict(gradient_checkpointing=True)], ids=str)
def test_a_resumed_run_ends_with_the_same_bytes(train, precision, options):
    usual = dict(max_train_steps=4, checkpointing_steps=2, mixed_precision=precision, **options)
    whole = train("whole", **usual)
    train("parts", **{**usual, "max_train_steps": 2})
    parts = train("parts", **usual, resume_from_checkpoint="latest")
    name = "pytorch_lora_weights.safetensors"
    assert files_of(whole.output_dir)[name] == files_of(parts.output_dir)[name]


def test_the_scaler_halves_its_factor_when_a_gradient_overflows_and_goes_on(train, monkeypatch):
    "A first factor of 2**30 is too large for any gradient in fp16: updates are left out until it fits."
    real = torch.amp.GradScaler.__init__
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", lambda self, *given, **more: real(self, *given, **{**more, "init_scale": 2.0**30}))
    result = train(max_train_steps=24, mixed_precision="fp16")
    assert all(torch.isfinite(torch.tensor(result.losses)))
    assert result.losses[-1] != result.losses[0]


def test_fused_attention_is_plain_attention_but_for_rounding(toy):
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
    parts = toy()
    unet = parts.unet.cuda()
    with torch.device("cuda"): batch, noise, t = fake_batch(parts, 2, 64)
    for tensor in (batch.latents, batch.prompt_embeds, batch.pooled_prompt_embeds, batch.time_ids): tensor.normal_()
    answers = []
    for processor in (AttnProcessor(), AttnProcessor2_0()):
        unet.set_attn_processor(processor)
        added = dict(text_embeds=batch.pooled_prompt_embeds, time_ids=batch.time_ids)
        with torch.no_grad(): answers.append(unet(batch.latents, t, batch.prompt_embeds, added_cond_kwargs=added).sample)
    assert torch.allclose(*answers, atol=1e-4)


@pytest.mark.parametrize("flags", ["", "--train_batch_size 8", "--train_batch_size 8 --gradient_checkpointing", "--resolution 256", "--train_batch_size 8 --rank 64"])
def test_memory_is_what_plan_foretells(flags):
    "Activations, gradients and what the backward pass needs of one update, as torch's allocator counts them; a tenth more or less."
    words = f"text-to-image --pretrained_model_name_or_path tiny --train_data_dir none --center_crop --resolution 128 --train_batch_size 4 {flags}"
    method, config = read_command(shlex.split(words))
    parts = load_components("tiny")
    parts.unet.cuda().requires_grad_(False)
    trained = method.weights(config, parts, 0)
    loss = method.loss(config, parts, method.schedule(config, parts.scheduler), False).cuda().train()
    optimizer, _ = optimizer_and_schedule(config, trained.groups, 2)

    def update(b):
        with torch.device("cuda"): batch, noise, t = fake_batch(parts, b, config.resolution)
        noise.copy_(torch.randn(noise.shape, generator=seeded("noise")))
        loss(batch, noise, t, None).sum().backward()
        optimizer.step(), optimizer.zero_grad()
    update(1) # libraries and the optimizer's state are there from now on
    torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    update(config.train_batch_size)
    moments = forecast(method, config).moments
    foretold = max(sum(moments[moment].get(part, 0) for part in ("activations", "backward", "gradients")) for moment in ("a step", "an update"))
    assert foretold == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)


# ------------------------------------------------ drawing

CARD, PROMPTS = "cuda", ["a photo of a red house in the snow", "a watercolour of a blue mug on the beach"]
LEVELS = {torch.float32: 0.7, torch.float16: 2, torch.bfloat16: 8}  # mean difference to the CPU's float32 that rounding may make, in grey levels
DTYPES = [dtype for dtype in LEVELS if dtype != torch.bfloat16 or "bf16" in HALVES]
OPTIONS = [{}, dict(offload="model"), dict(offload="sequential"), dict(vae_slicing=True), dict(vae_tiling=True)]


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    "A LoRA that changes every picture, in the UNet and in both text encoders."
    parts = load_components("tiny")
    networks = {name: add_lora(getattr(parts, name), rank=4, generator=seeded(name)) for name in ("unet", "text_encoder", "text_encoder_2")}
    for name, network in networks.items():
        for key, p in lora_parameters(network): p.data = 0.1*torch.randn(p.shape, generator=seeded(name, key))
    return save_lora(tmp_path_factory.mktemp("lora"), **networks)


def drawn(device, dtype=torch.float32, lora=None, **options):
    "Pictures in grey levels (b, h, w, 3) and the pipeline; four times as large where tiles should matter."
    pipeline = load_pipeline("tiny", lora, 0.7, device=device, dtype=dtype, **options)
    size = 256 if options.get("vae_tiling") else None
    return np.stack([np.asarray(one, float) for one in generate(pipeline, PROMPTS, [0, 1], 6, scheduler="euler", size=size)]), pipeline


@functools.cache
def on_cpu(lora=None, **options): return drawn("cpu", lora=lora, **options)[0]


def gap(a, b): return np.abs(a - b).mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_card_draws_what_the_cpu_draws(dtype, options):
    wanted = on_cpu(**{name: value for name, value in options.items() if name == "vae_tiling"})
    found, pipeline = drawn(CARD, dtype, **options)
    assert gap(found, wanted) <= LEVELS[dtype] < 20 < gap(found[:1], wanted[1:])
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        assert {p.device.type for p in part.parameters()} == {dict(model="cpu", sequential="meta").get(options.get("offload"), CARD)}
        assert {p.dtype for p in part.parameters()} == {dtype}


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lora_draws_on_the_card_what_it_draws_on_the_cpu(lora, dtype, options):
    plain, wanted = on_cpu(), on_cpu(lora)
    found, pipeline = drawn(CARD, dtype, lora, **options)
    assert gap(found, wanted) <= 1.5*LEVELS[dtype] < gap(found, plain)
    set_lora_scale(pipeline, 0)
    off = np.stack([np.asarray(one, float) for one in generate(pipeline, PROMPTS, [0, 1], 6, scheduler="euler")])
    assert gap(off, plain) <= LEVELS[dtype]


@pytest.mark.parametrize("words", ["", "--offload model", "--offload sequential", "--vae_slicing --vae_tiling --height 160", "--fuse_lora"])
@pytest.mark.parametrize("precision", ["no", *HALVES])
def test_a_picture_is_remade_on_the_card_to_the_last_bit(lora, tmp_path, capsys, precision, words):
    line = ["--prompt", *PROMPTS, "--num_images", "2", "--num_inference_steps", "4", "--scheduler", "euler_a", "--lora", lora, "--lora_scale", "0.7", "--batch_size", "3",
        "--mixed_precision", precision, "--device", CARD, *words.split()]
    assert main([*map(str, line), "--output_dir", str(tmp_path / "out")]) == 0
    for name in ("image_001.png", "image_003.png"):
        capsys.readouterr()
        assert main(["--from", str(tmp_path / "out" / name), "--output_dir", str(tmp_path / name)]) == 0
        assert "to the last bit" in capsys.readouterr().out
        assert Image.open(tmp_path / name / "image_000.png").tobytes() == Image.open(tmp_path / "out" / name).tobytes()


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_the_loss_by_level_is_the_same_where_networks_take_turns(lora, offload):
    usual = dict(validation_data_dir=str(sample_dir("chairs")), lora=str(lora))
    plain, spared = (level_report(EvaluateConfig(**usual, **more), 3) for more in ({}, dict(offload=offload)))
    for name in ("base", "tuned"): assert spared[name] == pytest.approx(plain[name], rel=1e-2)
