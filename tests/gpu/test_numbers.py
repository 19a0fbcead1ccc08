"""What only a GPU shows: half precision with a scaler, fused attention, exact resume on its kernels, memory as `plan` foretold it.

    pytest tests/gpu
"""
import shlex

import pytest
import torch
from sdxl_course.core import seeded
from sdxl_course.memory import fake_batch
from sdxl_course.plan import forecast, read_command
from sdxl_course.train.prepare import optimizer_and_schedule
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
    from sdxl_course.model.components import load_components
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
