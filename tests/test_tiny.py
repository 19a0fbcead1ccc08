"The model that ships: it draws what is asked for, as finely as the renders that it learnt from, and with all of its blocks."
import pytest
import torch
from sdxl_course.core import seeded
from sdxl_course.evaluate import evaluation_scenes, fidelity_report, prompt_of
from sdxl_course.inference import load_pipeline
from sdxl_course.measure.judges import load_judge, name_attributes, right_answers, to_pixels
from sdxl_course.model.components import load_components
from sdxl_course.model.conditioning import encode_prompts, make_time_ids
from sdxl_course.model.latents import posterior
from sdxl_course.model.noise import NoiseSchedule
from sdxl_course.model.sampling import generate
from sdxl_course.data.loader import Batch
from sdxl_course.pretraining.judges import measure_subjects, subject_scenes
from sdxl_course.pretraining.unet import ablation
from sdxl_course.train.objective import denoising_loss
from sdxl_course.world.render import render

SCENES = evaluation_scenes(36, seed=11, style="photo")


@pytest.fixture(scope="module")
def drawn():
    "36 photos, drawn by default."
    return generate(load_pipeline("tiny"), [prompt_of(scene) for scene in SCENES], list(range(36)), batch_size=12)


def test_a_judge_of_crisp_renders_names_what_was_asked_for(drawn):
    right = right_answers(name_attributes(load_judge("attributes"), drawn), SCENES)
    assert right["joint"].sum() >= 33, right["joint"]


def test_the_judge_calls_the_subject_a_chair():
    assert measure_subjects(load_judge("attributes"), subject_scenes(1000, 1020, 0)) >= 0.9


@torch.no_grad()
def test_rare_tokens_are_heard_like_colours():
    "DreamBooth's identifier moves what both encoders make of the noun behind it, as far as a colour does at least by half."
    parts = load_components("tiny")
    heard = lambda word: encode_prompts(parts, [f"a photo of a {word} chair"])[0][0, 6]
    plain = encode_prompts(parts, ["a photo of a chair"])[0][0, 5]
    moved = {word: float((heard(word) - plain).norm()/plain.norm()) for word in ("sks", "tok", "red", "green", "blue")}
    assert min(moved["sks"], moved["tok"]) > 0.5*min(moved[word] for word in ("red", "green", "blue")), moved


def test_pictures_hold_as_much_detail_as_renders(drawn):
    power = fidelity_report(drawn[:16], SCENES[:16])["power_ratio"]
    assert all(0.7 < power[band] < 1.3 for band in ("4-8", "8-16", "16-32")) and power["32-64"] > 0.4, power


@torch.no_grad()
def test_every_block_of_the_unet_is_at_work():
    "A block works where silencing it raises the error by half a per cent at one noise level or another."
    parts = load_components("tiny")
    schedule, words = NoiseSchedule.of(parts.scheduler), encode_prompts(parts, [prompt_of(scene) for scene in SCENES[:8]])
    mean, _ = posterior(parts.vae, to_pixels([render(scene) for scene in SCENES[:8]]))
    batch = Batch(mean, *words, make_time_ids((128, 128), (0, 0), (128, 128)).expand(8, -1))
    noise = torch.randn(mean.shape, generator=seeded("ablation"))
    dead = None
    for t in (500, 100, 900, 300, 700):
        moved = ablation(parts.unet, lambda: denoising_loss(parts.unet, batch, schedule, noise, torch.full((8,), t)).mean())
        dead = [name for name in (moved if dead is None else dead) if abs(moved[name]) < 0.005]
        if len(dead) <= 4: break # another level can only find fewer
    assert len(dead) <= 4, dead
