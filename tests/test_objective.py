"The loss of a step: closed forms written with diffusers' schedulers and plain tensors, and what the reference scripts get wrong."
import json
from dataclasses import dataclass, fields, make_dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from hypothesis import given, settings, strategies as st

from sdxl_course.core import CourseError, seeded
from sdxl_course.model.noise import EdmSchedule, EdmStyleSchedule, NoiseSchedule, edm_loss_weight, edm_scalings, euler_scalings, noise_schedule, offset_noise
from sdxl_course.options import fields_of, parse_config
from sdxl_course.text_to_image import TextToImageConfig, main
from sdxl_course.train.prepare import make_loss, make_noise_schedule
from sdxl_course.train.objective import (WEIGHTINGS, WeightingOptions, _weighting_field, active_weightings, debiased_weight, denoising_loss, loss_weighting,
    make_weighting, masked_mse, min_snr_weight, per_sample_mse, predict, prior_preservation, weighting_table)

SDXL = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
KINDS = ("epsilon", "v_prediction", "sample")
TIMES = torch.tensor([3, 250, 500, 990])
few = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def unet():
    "A very small SDXL UNet with random weights."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(1, 2),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6*4 + 8).eval()


def make_batch(b=4, mask=None):
    g = seeded("batch", b)
    return SimpleNamespace(latents=torch.randn(b, 4, 8, 8, generator=g), prompt_embeds=torch.randn(b, 77, 16, generator=g), extra={} if mask is None else dict(mask=mask),
        pooled_prompt_embeds=torch.randn(b, 8, generator=g), time_ids=torch.tensor([[64., 96, 0, 16, 64, 64]]*b))


def draw_noise(b=4): return torch.randn(b, 4, 8, 8, generator=seeded("noise", b))


def half_mask(b=4):
    mask = torch.zeros(b, 1, 8, 8)
    mask[..., :3] = 1; mask[..., 3] = 0.5
    return mask


WEIGHTED = dict(even={}, min_snr=dict(snr_gamma=5.0), debiased=dict(debiased_estimation_loss=True))


def ask(unet, noisy, t, batch):
    conditions = dict(text_embeds=batch.pooled_prompt_embeds, time_ids=batch.time_ids)
    return unet(noisy, t, batch.prompt_embeds, added_cond_kwargs=conditions).sample


# ------------------------------------------------ closed forms of a whole step

@pytest.mark.parametrize("masked", [None, 0.0, 0.25], ids=["whole", "masked", "partly"])
@pytest.mark.parametrize("offset", [0.0, 0.1], ids=["plain", "offset"])
@pytest.mark.parametrize("weighting", list(WEIGHTED))
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_loss_of_a_step_is_the_closed_form(unet, kind, weighting, offset, masked):
    library, batch = DDPMScheduler(**SDXL), make_batch(mask=None if masked is None else half_mask())
    plain, shift = draw_noise(), torch.randn(4, 4, 1, 1, generator=seeded("shift"))

    noise = plain + offset*shift.expand(4, 4, 8, 8)
    target = {"epsilon": noise, "v_prediction": library.get_velocity(batch.latents, noise, TIMES), "sample": batch.latents}[kind]
    error = (ask(unet, library.add_noise(batch.latents, noise, TIMES), TIMES, batch) - target)**2
    if masked is not None: error = torch.where(batch.extra["mask"] == 1, error, torch.where(batch.extra["mask"] == 0, error*masked, error*(0.5 + 0.5*masked)))
    signal = library.alphas_cumprod[TIMES]
    snr = signal / (1 - signal)
    capped = torch.tensor([min(float(s), 5.0) for s in snr])
    weight = dict(even=dict(epsilon=torch.ones(4), v_prediction=torch.ones(4), sample=torch.ones(4)),
        min_snr=dict(epsilon=capped/snr, v_prediction=capped/(snr + 1), sample=capped),
        debiased=dict(epsilon=snr**-0.5, v_prediction=snr**0.5/(snr + 1), sample=snr**0.5))[weighting][kind]
    want = error.flatten(1).mean(1)*weight

    given_ = denoising_loss(unet, batch, NoiseSchedule.of(library, kind), offset_noise(plain, offset, shift), TIMES, make_weighting(**WEIGHTED[weighting]), masked or 0.0)
    assert given_.shape == (4,) and given_.dtype == torch.float32
    torch.testing.assert_close(given_, want, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_prediction_type_of_the_scheduler_is_the_default(unet):
    batch, noise, weighting = make_batch(), draw_noise(), make_weighting(snr_gamma=5)
    losses = []
    for kind in KINDS:
        own = denoising_loss(unet, batch, NoiseSchedule.of(DDPMScheduler(**SDXL, prediction_type=kind)), noise, TIMES, weighting)
        for schedule in (NoiseSchedule.of(DDPMScheduler(**SDXL), kind), replace(NoiseSchedule.of(DDPMScheduler(**SDXL)), prediction_type=kind)):
            assert torch.equal(own, denoising_loss(unet, batch, schedule, noise, TIMES, weighting))
        losses.append(own)
    assert not torch.equal(losses[0], losses[1]) and not torch.equal(losses[1], losses[2])


@torch.no_grad()
def test_a_sample_does_not_feel_its_neighbours(unet):
    batch, noise, schedule = make_batch(mask=half_mask()), draw_noise(), NoiseSchedule.of(DDPMScheduler(**SDXL))
    weighting = make_weighting(snr_gamma=5)
    whole = denoising_loss(unet, batch, schedule, noise, TIMES, weighting)
    for i in range(4):
        part = lambda value: {name: part(x) for name, x in value.items()} if isinstance(value, dict) else value[i:i + 1]
        one = SimpleNamespace(**{name: part(value) for name, value in vars(batch).items()})
        torch.testing.assert_close(denoising_loss(unet, one, schedule, noise[i:i + 1], TIMES[i:i + 1], weighting), whole[i:i + 1], rtol=1e-4, atol=1e-7)


# ------------------------------------------------ which weighting

TEXT_TO_IMAGE = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d"]
BOTH = "--snr_gamma and --debiased_estimation_loss are two weights for one loss: leave one of them out"


def test_two_weightings_at_once_are_refused(capsys):
    with pytest.raises(CourseError) as refused: make_weighting(snr_gamma=5.0, debiased_estimation_loss=True)
    assert str(refused.value) == BOTH
    with pytest.raises(CourseError) as refused: TextToImageConfig(pretrained_model_name_or_path="m", train_data_dir="d", snr_gamma=5.0, debiased_estimation_loss=True)
    assert str(refused.value) == BOTH
    assert main(TEXT_TO_IMAGE + ["--snr_gamma", "5", "--debiased_estimation_loss"]) == 2 and BOTH in capsys.readouterr().err


def test_no_weighting_and_one_that_is_off_are_none():
    assert make_weighting() is make_weighting(snr_gamma=None, debiased_estimation_loss=False) is None
    config = TextToImageConfig(pretrained_model_name_or_path="m", train_data_dir="d", snr_gamma=2.0)
    assert fields_of(config, WeightingOptions) == dict(snr_gamma=2.0, debiased_estimation_loss=False) and active_weightings(config) == ["snr_gamma"]
    snr = torch.tensor([0.5, 2.0, 8.0])
    for kind in KINDS: assert torch.equal(make_weighting(**fields_of(config, WeightingOptions))(snr, kind), min_snr_weight(snr, 2.0, kind))


@pytest.fixture
def registered():
    "Two weightings of this test's own, one with a value and one without, forgotten afterwards."
    before = dict(WEIGHTINGS)
    try:
        @loss_weighting("test_power", "a power of the SNR", float, "> 0 ..", "Nobody, 2026")
        def power_weight(snr, power, prediction_type="epsilon"): return snr**power

        @loss_weighting("test_tenfold", "ten times as much")
        def tenfold_weight(snr, prediction_type="epsilon"): return torch.full_like(snr, 10.0)
        yield make_dataclass("Options", map(_weighting_field, WEIGHTINGS.values()), frozen=True, kw_only=True)
    finally:
        WEIGHTINGS.clear()
        WEIGHTINGS.update(before)


@torch.no_grad()
def test_a_registered_weighting_gets_an_option_a_row_and_is_applied(registered, unet, toy):
    known = {f.name: f for f in fields(registered)}
    assert list(known) == [*[f.name for f in fields(WeightingOptions)], "test_power", "test_tenfold"]
    assert (known["test_power"].default, known["test_tenfold"].default) == (None, False)
    assert known["test_power"].metadata["help"] == "a power of the SNR" and known["test_power"].metadata["limit"] == "> 0 .."
    assert "| `--test_power` | power_weight | a power of the SNR | Nobody, 2026 |" in weighting_table().splitlines()

    @dataclass(frozen=True, kw_only=True)
    class Config(registered, TextToImageConfig): "Text-to-image with the new options."
    config, on = parse_config(Config, TEXT_TO_IMAGE + ["--test_power", "0.25"]), parse_config(Config, TEXT_TO_IMAGE + ["--test_tenfold"])
    assert active_weightings(config) == ["test_power"] and active_weightings(on) == ["test_tenfold"]
    with pytest.raises(CourseError, match="--test_power is -1.0: wanted more than 0"): parse_config(Config, TEXT_TO_IMAGE + ["--test_power", "-1"])
    batch, noise, schedule = make_batch(), draw_noise(), NoiseSchedule.of(DDPMScheduler(**SDXL))
    plain, loss = denoising_loss(unet, batch, schedule, noise, TIMES), lambda config: denoising_loss(unet, batch, schedule, noise, TIMES, make_weighting(**fields_of(config, registered)))
    torch.testing.assert_close(loss(config), plain*schedule.snr(TIMES)**0.25)
    torch.testing.assert_close(loss(on), plain*10)
    trained = make_loss(config, toy(), schedule, False)  # what a training with such a configuration uses
    torch.testing.assert_close(trained.weighting(schedule.snr(TIMES), "epsilon"), schedule.snr(TIMES)**0.25)
    for pair in (dict(test_power=1.0, test_tenfold=True), dict(snr_gamma=5.0, test_power=1.0), dict(snr_gamma=5.0, debiased_estimation_loss=True)):
        for refuse in (make_weighting, lambda **pair: Config(pretrained_model_name_or_path="m", train_data_dir="d", **pair)):
            with pytest.raises(CourseError, match=f"{' and '.join(f'--{flag}' for flag in pair)} are two weights for one loss"): refuse(**pair)
    with pytest.raises(CourseError, match="leave --snr_gamma and .*--test_power and --test_tenfold out"):
        Config(pretrained_model_name_or_path="m", train_data_dir="d", do_edm_style_training=True, test_tenfold=True)


def test_a_weighting_registered_later_does_no_harm_to_configs_that_do_not_know_it(registered):
    config = TextToImageConfig(pretrained_model_name_or_path="m", train_data_dir="d", snr_gamma=2.0)
    assert active_weightings(config) == ["snr_gamma"]
    assert TextToImageConfig(pretrained_model_name_or_path="m", train_data_dir="d", do_edm_style_training=True).do_edm_style_training
    assert make_noise_schedule(config, DDPMScheduler(**SDXL)).prediction_type == "epsilon"


def test_registered_weightings_are_forgotten(): assert list(WEIGHTINGS) == ["snr_gamma", "debiased_estimation_loss"] == [f.name for f in fields(WeightingOptions)]


# ------------------------------------------------ weights

@few
@given(t=st.integers(0, 999), weight=st.sampled_from([make_weighting(**WEIGHTED[name]) for name in ("debiased", "min_snr")]), seed=st.integers(0, 10**6))
def test_one_network_gets_one_loss_whichever_way_it_answers(t, weight, seed):
    schedule, t = NoiseSchedule(DDPMScheduler(**SDXL).alphas_cumprod.double()), torch.tensor([t])
    x0, noise, wrong = torch.randn(3, 1, 4, 8, 8, generator=seeded(seed), dtype=torch.float64)
    kept, noisy, guess = schedule.alphas_cumprod[t], schedule.add_noise(x0, noise, t), x0 + wrong
    answers = dict(sample=guess, epsilon=(noisy - kept.sqrt()*guess)/(1 - kept).sqrt(), v_prediction=(kept.sqrt()*noisy - guess)/(1 - kept).sqrt())
    losses = {kind: weight(schedule.snr(t), kind)*(answer - replace(schedule, prediction_type=kind).target(x0, noise, t)).square().mean() for kind, answer in answers.items()}
    for kind in ("epsilon", "v_prediction"): torch.testing.assert_close(losses[kind], losses["sample"], rtol=1e-6, atol=0)


def test_defect_4_v_prediction_min_snr_is_not_the_epsilon_weight_plus_one():
    signal = DDPMScheduler(**SDXL).alphas_cumprod
    snr = signal / (1 - signal)
    given_ = min_snr_weight(snr, 5.0, "v_prediction")
    torch.testing.assert_close(given_, torch.minimum(snr, torch.full_like(snr, 5.0)) / (snr + 1))
    assert given_.max() < 1 and abs(given_[500] - 0.276) < 1e-3 and given_[0] < 0.005  # where the scripts have 2.0 and 1.0043


def test_trap_16_weights_are_finite_at_zero_terminal_snr(unet):
    ends = torch.tensor([0.0, torch.inf])
    for kind in KINDS: assert min_snr_weight(ends[:1], 5.0, kind).isfinite().all()
    assert min_snr_weight(ends[:1], 5.0, "epsilon") == 1 and torch.equal(debiased_weight(ends, "v_prediction"), torch.zeros(2))
    schedule = NoiseSchedule.of(DDPMScheduler(**SDXL), "v_prediction", zero_terminal_snr=True)
    for options in WEIGHTED.values():
        with torch.no_grad(): loss = denoising_loss(unet, make_batch(), schedule, draw_noise(), torch.tensor([999, 998, 0, 999]), make_weighting(**options))
        assert loss.isfinite().all()


# ------------------------------------------------ masks

@few
@given(seed=st.integers(0, 10**6), outside=st.floats(0, 1))
def test_masked_error_is_a_blend_of_inside_and_outside(seed, outside):
    prediction, target = torch.randn(2, 3, 4, 8, 8, generator=seeded(seed))
    mask = torch.rand(3, 1, 8, 8, generator=seeded(seed, "mask"))
    inside, rest = masked_mse(prediction, target, mask), masked_mse(prediction, target, 1 - mask)
    torch.testing.assert_close(inside + rest, per_sample_mse(prediction, target))
    torch.testing.assert_close(masked_mse(prediction, target, mask, outside), inside + outside*rest)


def test_mask_of_ones_is_no_mask_and_of_zeros_is_nothing():
    prediction, target = torch.randn(2, 3, 4, 8, 8, generator=seeded("mask"))
    torch.testing.assert_close(masked_mse(prediction, target, torch.ones(3, 1, 8, 8)), per_sample_mse(prediction, target))
    assert torch.equal(masked_mse(prediction, target, torch.zeros(3, 1, 8, 8)), torch.zeros(3))


def test_nothing_is_learnt_outside_the_mask():
    prediction, target = torch.randn(2, 3, 4, 8, 8, generator=seeded("gradient"))
    prediction.requires_grad_()
    masked_mse(prediction, target, half_mask(3)).sum().backward()
    assert (prediction.grad[..., 4:] == 0).all() and (prediction.grad[..., :4] != 0).all()


def test_a_mask_of_pixels_is_averaged_over_each_latent():
    fine = (torch.rand(3, 1, 64, 64, generator=seeded("fine")) > 0.5).float()
    prediction, target = torch.randn(2, 3, 4, 8, 8, generator=seeded("coarse"))
    by_hand = fine.view(3, 1, 8, 8, 8, 8).mean((3, 5))
    torch.testing.assert_close(masked_mse(prediction, target, fine), masked_mse(prediction, target, by_hand))


@pytest.mark.parametrize("weight", [-0.1, 1.1])
def test_a_weight_outside_its_range_is_refused(weight):
    with pytest.raises(CourseError, match="from 0"): masked_mse(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.ones(1, 1, 8, 8), weight)


# ------------------------------------------------ prior preservation

@pytest.mark.parametrize("b", [1, 2, 3, 4])
@torch.no_grad()
def test_defect_2_min_snr_weights_both_halves_of_prior_preservation(unet, b):
    library, batch, noise = DDPMScheduler(**SDXL), make_batch(2*b), draw_noise(2*b)
    t = torch.arange(2*b)*120 + 5  # no two pictures share a noise level
    signal = library.alphas_cumprod[t]
    snr = signal / (1 - signal)
    error = ((ask(unet, library.add_noise(batch.latents, noise, t), t, batch) - noise)**2).mean((1, 2, 3))*torch.minimum(snr, torch.tensor(5.0))/snr
    want = error[:b] + 0.7*error[b:]
    given_ = prior_preservation(denoising_loss(unet, batch, NoiseSchedule.of(library), noise, t, make_weighting(snr_gamma=5.0)), 0.7)
    assert given_.shape == (b,)
    torch.testing.assert_close(given_, want, rtol=1e-4, atol=1e-7)


def edm_style(kind="epsilon"): return noise_schedule(DDPMScheduler(**SDXL), kind, do_edm_style_training=True)


def error_on_x0(unet, batch, schedule, noise, t):
    "How far the denoised latents are from the clean ones, all noise levels alike."
    return per_sample_mse(*schedule.predict_and_target(lambda noisy, time: predict(unet, noisy, time, batch), batch.latents, noise, t))


@pytest.mark.parametrize("preconditioning", ["euler", "edm"])
@pytest.mark.parametrize("b", [1, 2, 3, 4])
@torch.no_grad()
def test_defect_3_edm_weights_both_halves_of_prior_preservation(unet, b, preconditioning):
    batch, noise, t = make_batch(2*b), draw_noise(2*b), torch.arange(2*b)*120 + 5
    schedule = edm_style("v_prediction")
    sigma = schedule.sigma(t)
    if preconditioning == "edm":
        schedule = EdmSchedule(schedule.alphas_cumprod, "v_prediction", schedule.sigma(torch.arange(1000)), 0.5)
        losses = denoising_loss(unet, batch, schedule, noise, t)*edm_loss_weight(sigma, 0.5)
    else: losses = denoising_loss(unet, batch, schedule, noise, t)
    plain = error_on_x0(unet, batch, schedule, noise, t)
    weight = torch.tensor([1/s**2 if preconditioning == "euler" else (s**2 + 0.25)/(0.5*s)**2 for s in sigma.tolist()])
    given_ = prior_preservation(losses, 0.7)
    assert given_.shape == (b,)
    torch.testing.assert_close(given_, (plain*weight)[:b] + 0.7*(plain*weight)[b:], rtol=1e-4, atol=1e-6)


def test_prior_preservation_needs_pairs():
    with pytest.raises(CourseError, match="as many class pictures"): prior_preservation(torch.ones(3), 1.0)


# ------------------------------------------------ EDM

@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_euler_preconditioned_loss_is_the_plain_loss_up_to_a_weight(unet, kind):
    schedule, batch, noise = edm_style(kind), make_batch(), draw_noise()
    assert isinstance(schedule, EdmStyleSchedule) and schedule.unweighted() == NoiseSchedule(schedule.alphas_cumprod, kind)
    plain = denoising_loss(unet, batch, schedule.unweighted(), noise, TIMES)
    snr = schedule.snr(TIMES)
    weight = torch.ones(4) if kind == "epsilon" else snr/(1 + snr)
    torch.testing.assert_close(denoising_loss(unet, batch, schedule, noise, TIMES), plain*weight, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(schedule.answer_weight(TIMES), weight)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_euler_loss_is_the_closed_form_of_euler_discrete(unet, kind):
    library, batch, noise = EulerDiscreteScheduler(**SDXL, prediction_type=kind, timestep_spacing="linspace"), make_batch(1), draw_noise(1)
    schedule = noise_schedule(library, do_edm_style_training=True)
    for index in (0, 400, 900):
        library.set_timesteps(1000)
        t, sigma = library.timesteps[index:index + 1], library.sigmas[index:index + 1]
        noisy = batch.latents + sigma*noise
        answer = ask(unet, library.scale_model_input(noisy, t[0]), t, batch)
        clean = library.step(answer, t[0], noisy).pred_original_sample
        want = ((clean - batch.latents)**2).mean((1, 2, 3))/sigma**2
        torch.testing.assert_close(schedule.sigma(t.long()), sigma, rtol=1e-4, atol=0)
        torch.testing.assert_close(denoising_loss(unet, batch, schedule, noise, t.long()), want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_edm_loss_is_the_closed_form_of_edm_euler(unet, kind, masked):
    library, batch, noise = EDMEulerScheduler(prediction_type=kind, sigma_data=0.5), make_batch(mask=half_mask() if masked else None), draw_noise()
    steps = torch.tensor([10, 400, 700, 950])
    sigma = library.sigmas[steps]
    wide = sigma.view(-1, 1, 1, 1)
    noisy = batch.latents + wide*noise
    answer = ask(unet, library.precondition_inputs(noisy, wide), library.precondition_noise(sigma), batch)
    error = (library.precondition_outputs(noisy, answer, wide) - batch.latents)**2
    if masked: error = error*(0.2 + 0.8*batch.extra["mask"])
    schedule, t = noise_schedule(library), 999 - steps  # small noise levels first
    loss = denoising_loss(unet, batch, schedule, noise, t, unmasked_weight=0.2)
    assert isinstance(schedule, EdmSchedule) and torch.equal(schedule.sigma(t), sigma) and schedule.unweighted() is schedule
    torch.testing.assert_close(loss, error.mean((1, 2, 3)), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(edm_loss_weight(sigma, 0.5)*loss, error.mean((1, 2, 3))*(sigma**2 + 0.25)/(0.5*sigma)**2, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(schedule.answer_weight(t), (0.5*sigma)**2/(sigma**2 + 0.25))


@few
@given(sigma=st.floats(0.002, 80), data=st.floats(0.1, 2))
def test_edm_weight_undoes_the_scale_of_the_answer(sigma, data):
    sigma = torch.tensor([sigma], dtype=torch.float64)
    torch.testing.assert_close(edm_loss_weight(sigma, data)*edm_scalings(sigma, data)[1]**2, torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(edm_loss_weight(sigma, data, "euler")*euler_scalings(sigma)[1]**2, torch.ones(1, dtype=torch.float64))


@torch.no_grad()
def test_sigmas_stay_in_full_precision_whatever_the_latents_are(unet):
    for schedule in (edm_style(), noise_schedule(EDMEulerScheduler())):
        batch, noise = make_batch(), draw_noise()
        batch.latents = batch.latents.bfloat16().float()
        noise = noise.bfloat16().float()
        want = denoising_loss(unet, batch, schedule, noise, TIMES)
        batch.latents = batch.latents.bfloat16()
        assert torch.equal(denoising_loss(unet, batch, schedule, noise.bfloat16(), TIMES), want)


def test_unknown_names_are_refused():
    with pytest.raises(CourseError, match="edm or euler"): edm_loss_weight(torch.ones(1), 0.5, "karras")
    with pytest.raises(CourseError, match="epsilon and v_prediction only"): edm_style("sample")
    with pytest.raises(CourseError, match="epsilon and v_prediction only"): EdmSchedule(torch.ones(1)/2, "sample", torch.ones(1)).scalings(torch.tensor([0]))
    with pytest.raises(CourseError, match="prediction_type is 'flow'"): NoiseSchedule(torch.ones(1)/2, "flow")
    for weight in (debiased_weight, make_weighting(snr_gamma=5.0)):
        with pytest.raises(CourseError, match="unknown"): weight(torch.ones(1), "flow")


def test_text_to_image_trains_in_edm_style_too(train, capsys):
    assert main(TEXT_TO_IMAGE + ["--do_edm_style_training", "--print_config"]) == 0 and json.loads(capsys.readouterr().out)["do_edm_style_training"] is True
    plain, edm = train("plain"), train("edm", do_edm_style_training=True)
    assert edm.losses == pytest.approx(plain.losses, rel=1e-4)  # on epsilon they are one
    plain, edm = train("v", prediction_type="v_prediction"), train("edm-v", prediction_type="v_prediction", do_edm_style_training=True)
    assert edm.losses[0] < plain.losses[0] and edm.validation_loss_before == plain.validation_loss_before  # measured without weights


@pytest.mark.parametrize("weighting", [["--snr_gamma", "5"], ["--debiased_estimation_loss"], ["--rescale_betas_zero_snr"]], ids=lambda words: words[0])
def test_edm_style_refuses_other_weights(weighting, capsys):
    assert main(TEXT_TO_IMAGE + ["--do_edm_style_training", *weighting]) == 2
    error = capsys.readouterr().err
    assert ("weighs the noise levels by itself" in error or "infinite" in error) and weighting[0] in error and error.count("\n") == 1
