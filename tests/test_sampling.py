"What the pages model_samplers, model_prompts, model_sampling and model_lora_scales do not show: every sampler, odd prompts, other number formats, what is left behind."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from sdxl_course.core import CourseError, seeded
from sdxl_course.inference import load_pipeline
from sdxl_course.model.adapters import add_lora, lora_parameters
from sdxl_course.model.components import load_components
from sdxl_course.model.latents import decode_latents
from sdxl_course.model.lora_files import save_lora
from sdxl_course.model.lora_scales import fused_loras, lora_layers, set_lora_scale, swap_lora
from sdxl_course.model.prompts import prompt_rows, read_weights, weighted_prompts
from sdxl_course.model.samplers import SAMPLERS, guided_between, named_scheduler, noise_level, steps_to_take
from sdxl_course.model.sampling import Film, generate, start_from

QUICK = dict(num_inference_steps=2)


def gap(ones, others): return max(int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in zip(ones, others))


@pytest.fixture(scope="module")
def pipeline(toy_model): return load_pipeline(toy_model, device="cpu")


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_each_picture_from_its_own_seed(pipeline, name):
    own = pipeline.scheduler
    both = generate(pipeline, ["a cat", "a mug"], [3, 4], scheduler=name, num_inference_steps=3)
    assert pipeline.scheduler is own and gap(both[1:], generate(pipeline, "a mug", 4, scheduler=name, num_inference_steps=3)) <= 1
    assert gap(both[:1], both[1:]) > 1


@pytest.mark.parametrize("options, steps", [({}, 20), (dict(scheduler="unipc"), 8), (dict(scheduler="lcm"), 4), (dict(scheduler="unipc", num_inference_steps=3), 3)], ids=str)
def test_where_nobody_says_how_many_steps_the_sampler_does(pipeline, options, steps):
    seen = []
    hook = pipeline.unet.conv_in.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    try: generate(pipeline, "a cat", 3, **options)
    finally: hook.remove()
    assert len(seen) == steps


def test_the_shipped_model_takes_few_steps():
    tiny = load_components("tiny").scheduler
    assert (type(tiny).__name__, tiny.config.timestep_spacing, steps_to_take(None, tiny)) == ("UniPCMultistepScheduler", "trailing", 8)


def test_a_sampler_by_name_is_that_of_diffusers(pipeline):
    from diffusers import DPMSolverMultistepScheduler
    theirs = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    ours = generate(pipeline, "a cat", 3, scheduler="dpmpp_2m_karras", num_inference_steps=4)
    assert gap(ours, generate(pipeline, "a cat", 3, scheduler=theirs, num_inference_steps=4)) == 0
    assert gap(ours, generate(pipeline, "a cat", 3, scheduler="dpmpp_2m", num_inference_steps=4)) > 0


def test_what_the_model_was_trained_for_survives_the_change_of_sampler(pipeline):
    from diffusers import EulerDiscreteScheduler
    own = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction", beta_end=0.02)
    for name in SAMPLERS:
        made = named_scheduler(name, own)
        assert (made.config.prediction_type, made.config.beta_end) == ("v_prediction", 0.02) and not made.config.get("clip_sample", False), name


def test_noise_levels_between_timesteps_are_between(pipeline):
    levels = [noise_level(pipeline.scheduler, t) for t in (0, 0.25, 1, 998.5, 999, 1200)]
    assert levels == sorted(levels) and levels[-1] == levels[-2]


@pytest.mark.parametrize("start", [False, True])
def test_an_interval_of_everything_is_no_interval(pipeline, start):
    more = dict(init_image=Image.new("RGB", (64, 64), "red")) if start else {}
    one = lambda **options: generate(pipeline, ["a cat", "a mug"], 3, num_inference_steps=4, **options, **more)
    usual = one()
    assert gap(usual, one(guidance_interval=(0, 1e6))) == 0
    assert gap(one(guidance_scale=1.0), one(guidance_interval=(1e5, 1e6))) <= 1
    assert gap(usual, one(guidance_interval=[0.5, 5])) > 0 and gap(one(guidance_interval=[0.5, 5]), one(guidance_scale=1.0)) > 0


def test_outside_the_interval_half_the_work_is_done(pipeline):
    seen = []
    hook = pipeline.unet.conv_in.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    try: generate(pipeline, "a cat", 3, num_inference_steps=6, guidance_interval=(0.5, 5))
    finally: hook.remove()
    assert len(seen) == 6 and seen[0] == seen[-1] == 1 and 2 in seen


def test_hooks_do_not_outlive_an_error(pipeline):
    with pytest.raises(RuntimeError):
        with guided_between(pipeline, (0, 1)): raise RuntimeError
    with pytest.raises(CourseError, match="the lower first"): generate(pipeline, "a cat", 0, guidance_interval=(2, 1), **QUICK)
    assert not pipeline.unet._forward_hooks and not pipeline.unet._forward_pre_hooks


def test_rescaled_guidance_is_that_of_diffusers(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline("a cat", generator=torch.Generator().manual_seed(3), num_inference_steps=2, guidance_rescale=0.7, guidance_scale=3.0).images
    assert gap(generate(pipeline, "a cat", 3, guidance_rescale=0.7, **QUICK), stock) == 0 < gap(generate(pipeline, "a cat", 3, **QUICK), stock)


def test_each_picture_may_have_its_own_negative_prompt(pipeline):
    alone = [generate(pipeline, "a cat", 3, negative_prompt=one, **QUICK) for one in ("a dog", None, "")]
    together = generate(pipeline, "a cat", [3, 3, 3], negative_prompt=["a dog", None, ""], **QUICK)
    assert all(gap([ours], theirs) <= 1 for ours, theirs in zip(together, alone)) and gap(together[1:], together[2:]) > 1
    with pytest.raises(CourseError, match="2 negative prompts for 3"): generate(pipeline, "a cat", [1, 2, 3], negative_prompt=["a", "b"], **QUICK)


@given(st.text(alphabet="ab ()[]:.1\\", max_size=20))
@settings(max_examples=150, deadline=None)
def test_every_prompt_can_be_read(text):
    pieces = read_weights(text)
    assert all(one for one, _ in pieces) and all(a[1] != b[1] for a, b in zip(pieces, pieces[1:]))
    if not set(text) & set("()[]\\"): assert pieces == ([(text, 1.0)] if text else [])
    escaped = "".join("\\" + sign if sign in "()[]\\" else sign for sign in text)
    assert read_weights(escaped) == ([(text, 1.0)] if text else [])


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_a_weight_of_one_changes_no_bit(pipeline, clip_skip):
    plain = prompt_rows(pipeline, ["a red cat", "b"], [None, None], max_token_length=150, clip_skip=clip_skip)
    for prompt in ("a (red:1.0) cat", "a red cat", "(a red cat:1)", "a ([red:1.0]:1.1) cat"):
        rows = prompt_rows(pipeline, [prompt, "b"], [None, None], True, 150, clip_skip)
        assert "[" in prompt or all(torch.equal(rows[name], plain[name]) for name in plain), prompt
    with torch.no_grad(): heavy, _ = weighted_prompts(pipeline, ["a (red:1.4) cat", "b"], 150, clip_skip)
    assert not torch.equal(heavy[0], plain["prompt_embeds"][0]) and torch.equal(heavy[1], plain["prompt_embeds"][1])


def test_a_weight_goes_on_from_what_is_said_of_no_words(pipeline):
    with torch.no_grad(): none, plain, off, double = (weighted_prompts(pipeline, [prompt])[0] for prompt in ("", "b", "(b:0)", "(b:2)"))
    assert torch.allclose(off[:, 1], none[:, 1], atol=1e-6) and torch.allclose(double[:, 1] - none[:, 1], 2*(plain[:, 1] - none[:, 1]), atol=1e-5)
    assert torch.equal(off[:, 2:], plain[:, 2:])


def test_a_long_prompt_is_heard_to_its_end(pipeline):
    long = "a red house " * 12  # one token for each letter
    pictures = {n: [generate(pipeline, long + end, 3, max_token_length=n, **QUICK)[0] for end in ("cat", "dog")] for n in (75, 225)}
    assert gap(pictures[75][:1], pictures[75][1:]) == 0 < gap(pictures[225][:1], pictures[225][1:])
    assert gap(generate(pipeline, "a cat", 3, **QUICK), generate(pipeline, "a cat", 3, max_token_length=150, **QUICK)) > 0  # more padding is heard as well


def test_words_and_embeddings_are_told_the_same(pipeline):
    usual, weighted = (generate(pipeline, "a cat", 3, negative_prompt="a dog", prompt_weights=one, **QUICK) for one in (False, True))
    assert gap(usual, weighted) <= 1


def test_a_picture_from_a_picture_is_that_of_diffusers(pipeline):
    from diffusers import StableDiffusionXLImg2ImgPipeline
    begin = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    stock = StableDiffusionXLImg2ImgPipeline(**pipeline.components, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    theirs = stock("a cat", image=begin, strength=0.6, num_inference_steps=5, guidance_scale=3.0, generator=torch.Generator().manual_seed(3)).images
    ours = generate(pipeline, "a cat", [3, 4], num_inference_steps=5, init_image=begin, strength=0.6)
    assert gap(ours[:1], theirs) <= 1 < gap(ours[1:], theirs)


def test_a_mask_protects_what_is_black(pipeline, tmp_path):
    begin = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 80, 3), dtype=np.uint8))
    mask = Image.new("L", begin.size)
    mask.paste(255, (0, 0, 40, 40))
    for picture, name in ((begin, "a.png"), (mask, "m.png")): picture.save(tmp_path / name)
    drawn, = generate(pipeline, "a cat", 3, init_image=tmp_path / "a.png", mask=str(tmp_path / "m.png"), size=(64, 128), **QUICK)
    fitted = start_from(pipeline, begin, mask, (64, 128))[1]["image"]
    assert drawn.size == (128, 64) and gap([drawn.crop((70, 0, 128, 64))], [fitted.crop((70, 0, 128, 64))]) == 0
    assert gap([drawn.crop((0, 0, 50, 64))], [fitted.crop((0, 0, 50, 64))]) > 5
    with pytest.raises(CourseError, match="same size"): generate(pipeline, "a cat", 3, init_image=begin, mask=mask.resize((8, 8)), **QUICK)
    with pytest.raises(CourseError, match="leaves none"): generate(pipeline, "a cat", 3, init_image=begin, strength=0.2, **QUICK)


def test_a_film_ends_with_the_picture(pipeline):
    film = Film()
    drawn = generate(pipeline, ["a cat", "a mug", "a dog"], 3, 3, batch_size=2, callback_on_step_end=film)
    frames = film.frames(pipeline.vae)
    assert [len(one) for one in frames] == [3, 3, 3] and gap([one[-1] for one in frames], drawn) <= 1 < gap([one[0] for one in frames], drawn)


def test_half_precision_draws_films_and_from_pictures(toy_model):
    half = load_pipeline(toy_model, device="cpu", dtype=torch.bfloat16)
    film, begin = Film(), Image.new("RGB", (64, 64), "red")
    drawn = generate(half, "a (cat:1.2)", 3, 4, prompt_weights=True, init_image=begin, guidance_interval=(0.1, 9), callback_on_step_end=film)
    assert np.asarray(drawn[0]).std() > 0 and half.vae.dtype == torch.bfloat16 and gap(film.frames(half.vae)[0][-1:], drawn) <= 8


def test_an_overflowing_vae_is_cast_for_a_film(toy_model):
    vae = load_components(toy_model).vae
    film = Film()
    film.batches = [[torch.ones(1, 4, 8, 8)]]
    wanted = film.frames(vae)[0]
    vae.half()
    assert gap(film.frames(vae)[0], wanted) <= 3 and vae.dtype == torch.float16


def test_latents_go_where_an_offloaded_vae_works(toy_model):
    from accelerate import cpu_offload_with_hook
    vae = load_components(toy_model).vae
    wanted = decode_latents(vae, torch.ones(1, 4, 8, 8))
    cpu_offload_with_hook(vae, torch.device("cpu"))
    with torch.no_grad(): assert gap(decode_latents(vae, torch.ones(1, 4, 8, 8)), wanted) == 0


@pytest.fixture(scope="module")
def loras(toy_model, tmp_path_factory):
    home, found = tmp_path_factory.mktemp("loras"), {}
    for name, rank in (("style", 2), ("subject", 3)):
        parts = load_components(toy_model)
        for one in (parts.unet, parts.text_encoder):
            for layer, p in lora_parameters(add_lora(one, rank=rank, generator=seeded(name))): p.data = 0.5*torch.randn(p.shape, generator=seeded(name, layer))
        found[name] = save_lora(home / name, unet=parts.unet, text_encoder=parts.text_encoder)
    return found


def test_a_lora_may_be_off_in_one_place(toy_model, loras, pipeline):
    base, styled = generate(pipeline, "a cat", 3, **QUICK), load_pipeline(toy_model, lora=loras["style"].parent, device="cpu")
    whole = generate(styled, "a cat", 3, **QUICK)
    set_lora_scale(styled, 1.0, {"unet": 0, "text_encoder": 0})
    assert gap(generate(styled, "a cat", 3, **QUICK), base) == 0
    set_lora_scale(styled, 1.0, {"text_encoder": 0})
    assert gap(generate(styled, "a cat", 3, **QUICK), whole) > 0
    set_lora_scale(styled, 1.0)
    assert gap(generate(styled, "a cat", 3, **QUICK), whole) == 0
    for wrong in ("unet.down_block", "subject:unet", "text_encoder_2"):
        with pytest.raises(CourseError, match="no LoRA that is switched on"): set_lora_scale(styled, 1.0, {wrong: 1})


def test_fused_loras_draw_the_same_and_leave_the_weights(toy_model, loras):
    both = load_pipeline(toy_model, lora=list(loras.values()), lora_scale=[0.5, 0.8], device="cpu")
    wanted, before = generate(both, "a cat", 3, **QUICK), {name: p.clone() for name, p in both.unet.named_parameters()}
    with fused_loras(both): assert gap(generate(both, "a cat", 3, **QUICK), wanted) <= 1
    assert all(torch.equal(p, before[name]) for name, p in both.unet.named_parameters())  # no rounding stays behind
    assert gap(generate(both, "a cat", 3, **QUICK), wanted) == 0
    with pytest.raises(RuntimeError):
        with fused_loras(both): raise RuntimeError
    assert not any(module.merged for module in lora_layers(both).values())


def test_a_lora_is_swapped_for_one_of_another_rank(toy_model, loras, tmp_path):
    pipe = load_pipeline(toy_model, lora=loras["style"].parent, device="cpu")
    swap_lora(pipe, "style", loras["subject"])
    set_lora_scale(pipe, 1.0)
    wanted = generate(load_pipeline(toy_model, lora=loras["subject"], device="cpu"), "a cat", 3, **QUICK)
    assert gap(generate(pipe, "a cat", 3, **QUICK), wanted) == 0
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CourseError): swap_lora(pipe, "style", tmp_path / "bad.safetensors")
    assert gap(generate(pipe, "a cat", 3, **QUICK), wanted) == 0
