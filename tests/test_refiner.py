"A refiner at inference: against stock diffusers, picture by picture, with LoRAs, and from the command line."
import json

import numpy as np
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from sdxl_course.core import CourseError, seeded
from sdxl_course.inference import draw_planned, load_pipeline, main, spare_memory
from sdxl_course.model.adapters import add_lora, lora_parameters
from sdxl_course.model.components import load_components
from sdxl_course.model.lora_files import save_lora
from sdxl_course.model.lora_scales import plan_loras
from sdxl_course.model.refiner import generate_refined, load_refiner, refine, split_steps
from sdxl_course.model.sampling import generate, own_generator
from toy import make_toy_refiner

PROMPTS, SEEDS = ["a red house", "a blue mug", "a cat"], [5, 6, 7]
QUICK = dict(num_inference_steps=5, guidance_scale=3.0)


def gap(ones, others): return max(int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in zip(ones, others, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return make_toy_refiner(tmp_path_factory.mktemp("refiner") / "mine")


@pytest.fixture(scope="module")
def pipeline(toy_model): return load_pipeline(toy_model, device="cpu")


@pytest.fixture(scope="module")
def refiner(pipeline, folder): return load_refiner(pipeline, folder)


@pytest.fixture(scope="module")
def lora(toy_model, tmp_path_factory):
    "It steers the UNet and the text encoder that the base model lends."
    parts = load_components(toy_model)
    models = {name: getattr(parts, name) for name in ("unet", "text_encoder_2")}
    for one in models.values():
        for name, p in lora_parameters(add_lora(one, rank=2, generator=seeded(1))):
            if "lora_B" in name: p.data = 2 * torch.randn(p.shape, generator=seeded(name))
    return save_lora(tmp_path_factory.mktemp("lora") / "style", **models)


@pytest.mark.parametrize("negative", [None, ["a dog", "fog"]])
def test_it_is_what_two_stock_pipelines_draw(pipeline, refiner, negative):
    ours = generate_refined(pipeline, refiner, PROMPTS[:2], SEEDS[:2], 0.6, negative, 7.0, 2.0, scheduler="euler_a", **QUICK)
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
    made = lambda one: EulerAncestralDiscreteScheduler.from_config(one.scheduler.config)
    base = StableDiffusionXLPipeline(**{**{name: part for name, part in pipeline.components.items()}, "scheduler": made(pipeline)}, add_watermarker=False)
    second = StableDiffusionXLImg2ImgPipeline(**{**refiner.components, "scheduler": made(refiner)}, add_watermarker=False, requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False)
    for one in (base, second): one.set_progress_bar_config(disable=True)
    shared = dict(prompt=PROMPTS[:2], negative_prompt=negative, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS[:2]], **QUICK)
    latents = base(denoising_end=0.6, output_type="latent", **shared).images
    stock = second(image=latents, denoising_start=0.6, aesthetic_score=7.0, negative_aesthetic_score=2.0, **shared).images
    assert gap(ours, stock) == 0 and gap(ours, generate(pipeline, PROMPTS[:2], SEEDS[:2], negative_prompt=negative, scheduler="euler_a", **QUICK)) > 1
    assert gap(ours, generate_refined(pipeline, refiner, PROMPTS[:2], SEEDS[:2], 0.6, negative, 3.0, 2.0, scheduler="euler_a", **QUICK)) > 0


@pytest.mark.parametrize("scheduler", ["euler", "euler_a", "dpmpp_2m_sde"])
def test_a_picture_depends_on_its_own_prompt_and_seed_only(pipeline, refiner, scheduler):
    negatives = ["a dog", None, "fog"]
    draw = lambda *what, **more: generate_refined(pipeline, refiner, *what, scheduler=scheduler, **QUICK, **more)
    alone = [draw(prompt, seed, 0.6, negative)[0] for prompt, seed, negative in zip(PROMPTS, SEEDS, negatives)]
    assert gap(draw(PROMPTS, SEEDS, 0.6, negatives), alone) <= 1
    assert gap(draw(PROMPTS[::-1], SEEDS[::-1], 0.6, negatives[::-1], batch_size=2), alone[::-1]) <= 1
    assert gap(alone[:1], draw(PROMPTS[0], 9, 0.6, "a dog")) > 1


def test_options_reach_both(pipeline, refiner):
    plain = generate_refined(pipeline, refiner, "a (cat:1.5)", 3, 0.6, prompt_weights=True, size=(64, 128), **QUICK)
    assert plain[0].size == (128, 64)
    generator = [own_generator(3)]
    latents = generate(pipeline, "a (cat:1.5)", generator, prompt_weights=True, size=(64, 128), latents=True, denoising_end=0.6, **QUICK)
    assert gap(plain, refine(refiner, latents, ["a cat"], generator, 0.6, **QUICK)) == 0  # the refiner reads words without weights
    one = lambda **more: generate_refined(pipeline, refiner, "a cat", 3, 0.6, **QUICK | more)
    calls, hook = [], refiner.unet.register_forward_hook(lambda layer, args, output: calls.append(len(output[0])))
    try: usual, bare, some = one(), one(guidance_scale=1.0), one(guidance_interval=(1e5, 1e6))
    finally: hook.remove()
    assert calls == [2] * 2 + [1] * 4 and gap(bare, some) <= 1 < gap(usual, bare)  # 5 steps: 3 of the base model, 2 of the refiner
    assert gap(usual, one(guidance_rescale=0.7)) > 0


def test_shares_that_leave_one_without_a_step(pipeline, refiner):
    assert split_steps(pipeline, refiner, 10, 0.8) == (8, 2) and split_steps(pipeline, refiner, 6, 0.5, "euler_karras") == (2, 4)
    for share, words in ((0, "between 0 and 1"), (1, "between 0 and 1"), (float("nan"), "between 0 and 1"), (0.1, "leaves the base model none")):
        with pytest.raises(CourseError, match=words): generate_refined(pipeline, refiner, "a cat", 0, share, **QUICK)
    with pytest.raises(CourseError, match="leaves the refiner none"): generate_refined(pipeline, refiner, "a cat", 0, 0.9999, **QUICK)
    with pytest.raises(CourseError, match="asks twice"): generate_refined(pipeline, refiner, "a cat", 0, scheduler="heun", **QUICK)
    with pytest.raises(CourseError, match="begin with"): generate_refined(pipeline, refiner, "a cat", 0, init_image="a.png", **QUICK)


def test_folders_that_are_none(pipeline, toy_model, tmp_path, monkeypatch):
    for where, words in ((tmp_path / "nowhere", "no model at"), (tmp_path, "no model_index.json"), (toy_model, "is no refiner"), (toy_model / "model_index.json", "is a file"),
            (make_toy_refiner(tmp_path / "nine", in_channels=9), "9 latent channels"), (make_toy_refiner(tmp_path / "wide", cross_attention_dim=32), "does not fit")):
        with pytest.raises(CourseError, match=words): load_refiner(pipeline, where)
    monkeypatch.setattr("sdxl_course.model.refiner.tiny_path", lambda: tmp_path)
    with pytest.raises(CourseError, match="sdxl-tiny has no refiner"): load_refiner(pipeline)
    make_toy_refiner(tmp_path / "refiner")
    assert load_refiner(pipeline).text_encoder_2 is pipeline.text_encoder_2


def test_a_complete_folder_uses_its_own_text_encoder(pipeline, refiner, tmp_path):
    refiner.save_pretrained(tmp_path / "whole", safe_serialization=True)
    whole = load_refiner(pipeline, tmp_path / "whole")
    assert whole.text_encoder_2 is not pipeline.text_encoder_2 and whole.vae is pipeline.vae and whole.config.force_zeros_for_empty_prompt is False
    assert gap(*(generate_refined(pipeline, one, "a cat", 3, 0.6, **QUICK) for one in (whole, refiner))) == 0
    assert load_refiner(pipeline, tmp_path / "whole", torch.bfloat16).unet.dtype == torch.bfloat16


@pytest.mark.parametrize("fuse", [False, True])
def test_loras_act_on_the_base_model_alone(toy_model, folder, refiner, lora, fuse):
    styled = load_pipeline(toy_model, lora=lora, device="cpu")
    lent = load_refiner(styled, folder)
    generators = [own_generator(3)]
    latents = generate(styled, "a cat", generators, latents=True, denoising_end=0.6, **QUICK)
    wanted = refine(refiner, latents, ["a cat"], generators, 0.6, **QUICK)  # with a text encoder that never had a LoRA
    assert gap(generate_refined(styled, lent, "a cat", 3, 0.6, **QUICK), wanted) == 0
    finish = lambda drawn, texts, own, negative_prompt: refine(lent, drawn, texts, own, 0.6, negative_prompt, **QUICK)
    drawn, scales = draw_planned(styled, plan_loras(["a cat"], [str(lora)]), ["a cat"], [own_generator(3)], fuse=fuse, finish=finish, latents=True, denoising_end=0.6, **QUICK)
    assert gap(drawn, wanted) <= fuse and list(scales[0].values()) == [1.0]
    assert all(not layer.disable_adapters for layer in styled.text_encoder_2.modules() if isinstance(layer, BaseTunerLayer))


def test_offloading_and_slicing_hold_for_both(toy_model, folder, refiner, pipeline):
    wanted = generate_refined(pipeline, refiner, PROMPTS, SEEDS, 0.6, **QUICK)
    base = load_pipeline(toy_model, device="cpu")
    second = load_refiner(base, folder)
    for one in (base, second): one.enable_model_cpu_offload(device=torch.device("cpu"))
    base.vae.enable_slicing()
    for _ in range(2): assert gap(generate_refined(base, second, PROMPTS, SEEDS, 0.6, **QUICK), wanted) <= 1  # they share hooks, time after time
    with pytest.raises(CourseError, match="draws on the CPU"): spare_memory(second, torch.device("cpu"), "model")


def test_the_command_says_what_refined_and_draws_it_again(toy_model, folder, lora, tmp_path, capsys):
    flags = ["--model", toy_model, "--refiner", folder, "--denoising_end", "0.6", "--prompt", "a cat", "a (mug:1.2)", "a dog <lora:style:0.5>", "--lora", lora.parent, "--prompt_weights",
        "--num_inference_steps", "5", "--scheduler", "euler_a", "--batch_size", "2", "--vae_slicing", "--device", "cpu", "--output_dir", tmp_path / "out"]
    assert main(flags) == 0
    names = [f"image_{i:03d}.png" for i in range(3)]
    found = [Image.open(tmp_path / "out" / name).text for name in names]
    assert all("Refiner: mine, Refiner switch at: 0.6" in one["parameters"] and one["refiner"] == "mine" for one in found)
    assert [one["name"] for one in json.loads(found[0]["sdxl_course"])["files"]][:2] == [toy_model.name, "mine"]
    for name in names:
        capsys.readouterr()
        assert main(["--from", str(tmp_path / "out" / name), "--device", "cpu", "--output_dir", str(tmp_path / "again")]) == 0
        assert "to the last bit" in capsys.readouterr().out
    make_toy_refiner(folder.parent / "other", norm_eps=1e-3)
    assert main(["--from", str(tmp_path / "out" / names[0]), "--refiner", str(folder.parent / "other"), "--device", "cpu", "--output_dir", str(tmp_path / "again")]) == 0
    assert main(["--prompt", "a cat", "--model", str(toy_model), "--num_inference_steps", "2", "--device", "cpu", "--output_dir", str(tmp_path / "plain")]) == 0
    assert "Refiner" not in Image.open(tmp_path / "plain" / names[0]).text["parameters"]


@pytest.mark.parametrize("flags, words", [(["--denoising_end", "0.7"], "wanted both of them"), (["--refiner", "{folder}", "--film"], "leave one of them out"),
    (["--refiner", "{folder}", "--init_image", "a.png"], "leave one of them out"), (["--refiner", "{folder}", "--denoising_end", "1"], "--denoising_end is 1.0: wanted more than 0 and less than 1"),
    (["--refiner", "{folder}", "--denoising_end", "0.1", "--num_inference_steps", "3"], "leaves the base model none"), (["--refiner", "{model}"], "is no refiner")])
def test_what_the_command_refuses(toy_model, folder, tmp_path, capsys, flags, words):
    named = [flag.format(folder=folder, model=toy_model) for flag in flags]
    assert main(["--model", str(toy_model), "--prompt", "a cat", "--device", "cpu", "--output_dir", str(tmp_path / "out"), *named]) == 2
    assert words in capsys.readouterr().err
