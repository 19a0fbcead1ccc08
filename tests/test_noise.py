"The noise schedule: conversions there and back, the libraries' numbers, draws of timesteps, EDM scalings."
import math

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import rescale_zero_terminal_snr as library_rescale
from hypothesis import example, given, settings, strategies as st

from sdxl_course.core import CourseError, seeded
from sdxl_course.model.noise import NoiseSchedule, draw_timestep, edm_input, edm_output, edm_scalings, euler_scalings, rescale_zero_terminal_snr, timestep_weights

SDXL = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
KINDS = ("epsilon", "v_prediction", "sample")
few = settings(max_examples=40, deadline=None)


@st.composite
def schedulers(draw, kinds=KINDS):
    "DDPM schedulers of many lengths, slopes and shapes."
    start = draw(st.floats(1e-4, 5e-3))
    return DDPMScheduler(num_train_timesteps=draw(st.integers(20, 1000)), beta_start=start, beta_end=start*draw(st.floats(2, 15)),
        beta_schedule=draw(st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"])), prediction_type=draw(st.sampled_from(kinds)))


def latents(*keys, b=3): return torch.randn(2, b, 4, 5, 7, generator=seeded(*keys))


def some_timesteps(count, seed): return torch.randint(count, (3,), generator=seeded("t", seed))


def relative(given, want): return ((given - want).norm() / want.norm().clamp(min=1e-12)).item()


# ------------------------------------------------ epsilon, v and x0

@few
@given(scheduler=schedulers(), seed=st.integers(0, 10**6))
def test_noisy_latents_and_velocity_are_the_librarys(scheduler, seed):
    schedule, (x0, noise) = NoiseSchedule.of(scheduler), latents(seed)
    t = some_timesteps(len(schedule), seed)
    assert len(schedule) == scheduler.config.num_train_timesteps and schedule.prediction_type == scheduler.config.prediction_type
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t))
    torch.testing.assert_close(schedule.velocity(x0, noise, t), scheduler.get_velocity(x0, noise, t))


@few
@given(scheduler=schedulers(), seed=st.integers(0, 10**6))
def test_each_answer_gives_the_clean_latents_back(scheduler, seed):
    kept, (x0, noise) = NoiseSchedule.of(scheduler).alphas_cumprod, latents(seed)
    kept = kept.clamp(min=1e-4)  # a cosine schedule ends where float32 does
    t = some_timesteps(len(kept), seed)
    for kind in KINDS:
        schedule = NoiseSchedule(kept, kind)
        answer = {"epsilon": noise, "v_prediction": schedule.velocity(x0, noise, t), "sample": x0}[kind]
        assert relative(schedule.predict_x0(answer, schedule.add_noise(x0, noise, t), t), x0) < 1e-3


@few
@given(scheduler=schedulers(), seed=st.integers(0, 10**6))
def test_velocity_gives_the_noise_back(scheduler, seed):
    schedule, (x0, noise) = NoiseSchedule.of(scheduler), latents(seed)
    t = some_timesteps(len(schedule), seed)
    kept = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy, v = schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t)
    assert relative((1 - kept).sqrt()*noisy + kept.sqrt()*v, noise) < 1e-5


@few
@given(scheduler=schedulers(kinds=("epsilon",)), seed=st.integers(0, 10**6))
def test_snr_and_sigma_are_one_number(scheduler, seed):
    schedule = NoiseSchedule.of(scheduler)
    t = some_timesteps(len(schedule), seed)
    kept = scheduler.alphas_cumprod[t]
    torch.testing.assert_close(schedule.snr(t), kept / (1 - kept))
    torch.testing.assert_close(schedule.sigma(t)**2*schedule.snr(t), torch.ones(3))


# ------------------------------------------------ zero terminal SNR

@few
@given(scheduler=schedulers(kinds=("v_prediction", "sample")))
def test_rescaling_is_the_librarys(scheduler):
    kept = rescale_zero_terminal_snr(scheduler.alphas_cumprod)
    torch.testing.assert_close(kept, (1 - library_rescale(scheduler.betas)).cumprod(0), atol=2e-6, rtol=2e-4)
    assert kept[-1] == 0 and (kept.diff() < 0).all()
    torch.testing.assert_close(NoiseSchedule.of(scheduler, zero_terminal_snr=True).alphas_cumprod, kept)


def test_rescaled_schedule_is_the_one_diffusers_trains_with():
    theirs = DDPMScheduler(**SDXL, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ours = NoiseSchedule.of(DDPMScheduler(**SDXL, prediction_type="v_prediction"), zero_terminal_snr=True)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, EulerDiscreteScheduler])
def test_a_scheduler_that_ends_at_zero_already_is_not_stretched_twice(scheduler):
    theirs = scheduler(**SDXL, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ours = NoiseSchedule.of(theirs, zero_terminal_snr=True).alphas_cumprod
    assert ours[-1] == 0 and torch.equal(ours[:-1], theirs.alphas_cumprod[:-1])
    assert torch.equal(NoiseSchedule.of(theirs).alphas_cumprod, theirs.alphas_cumprod)


def test_trap_16_nothing_is_nan_at_zero_terminal_snr():
    schedule = NoiseSchedule.of(DDPMScheduler(**SDXL), "v_prediction", zero_terminal_snr=True)
    (x0, noise), t = latents("zero"), torch.tensor([999, 998, 0])
    noisy, v = schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t)
    assert schedule.snr(t)[0] == 0 and torch.equal(noisy[0], noise[0]) and torch.equal(v[0], -x0[0])
    torch.testing.assert_close(schedule.predict_x0(v, noisy, t), x0)


def test_zero_terminal_snr_refuses_epsilon_with_the_reason():
    for kind, scheduler in ((None, DDPMScheduler(**SDXL)), ("epsilon", DDPMScheduler(**SDXL, prediction_type="v_prediction"))):
        with pytest.raises(CourseError, match="epsilon.*v_prediction or sample"): NoiseSchedule.of(scheduler, kind, zero_terminal_snr=True)


# ------------------------------------------------ which timesteps come up

@few
@given(steps=st.integers(2, 1200), strategy=st.sampled_from(["earlier", "later", "range"]), multiplier=st.floats(0.01, 100), portion=st.floats(0, 1), data=st.data())
def test_weights_are_the_full_fine_tuning_scripts(steps, strategy, multiplier, portion, data):
    begin = data.draw(st.integers(0, steps - 1))
    end = data.draw(st.integers(begin + 1, steps))
    count = int(portion*steps)
    favored = {"earlier": range(count), "later": range(steps - count, steps), "range": range(begin, end)}[strategy]
    want = torch.tensor([multiplier if t in favored else 1.0 for t in range(steps)], dtype=torch.float64)
    given_ = timestep_weights(steps, strategy, multiplier, begin=begin, end=end, portion=portion)
    torch.testing.assert_close(given_.double(), want / want.sum(), rtol=1e-5, atol=0)
    assert given_.dtype == torch.float32 and abs(given_.double().sum() - 1) < 1e-5


def test_none_ignores_the_other_options():
    assert torch.equal(timestep_weights(10, "none", multiplier=5, begin=-3, end=99, portion=7), timestep_weights(10))


@pytest.mark.parametrize("options, reason", [
    (dict(strategy="latter"), "did you mean later"), (dict(strategy="later", multiplier=0), "above 0"), (dict(strategy="later", multiplier=-1), "above 0"),
    (dict(strategy="later", multiplier=math.nan), "above 0"), (dict(strategy="earlier", portion=1.5), "from 0 to 1"), (dict(strategy="range", begin=-1), "begin < end"),
    (dict(strategy="range", end=1001), "begin < end"), (dict(strategy="range", begin=5, end=5), "begin < end")])
def test_impossible_biases_are_refused(options, reason):
    with pytest.raises(CourseError, match=reason): timestep_weights(1000, **{"multiplier": 2, **options})


@given(uniform=st.floats(0, 1, exclude_max=True), steps=st.integers(1, 1500))
@example(uniform=math.nextafter(1, 0), steps=1000)
@example(uniform=0.29, steps=100)
@settings(max_examples=300, deadline=None)
def test_equal_weights_draw_the_floor(uniform, steps):
    assert draw_timestep(uniform, timestep_weights(steps)) == int(uniform*steps)


def test_equal_weights_draw_the_floor_at_every_border():
    weights = timestep_weights(1000)
    for k in range(1, 1000):
        for uniform in (math.nextafter(k/1000, 0), k/1000, math.nextafter(k/1000, 1)): assert draw_timestep(uniform, weights) == int(uniform*1000)


@few
@given(weights=st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any), uniform=st.floats(0, 1, exclude_max=True))
@example(weights=[1, 0, 0], uniform=math.nextafter(1, 0))
@example(weights=[0, 0, 1], uniform=0.0)
@example(weights=[3, 3, 1, 0], uniform=math.nextafter(1, 0))
@example(weights=[3, 1, 1, 1, 1, 1, 1], uniform=math.nextafter(1, 0))  # where the stick ends a rounding short of 7
def test_a_draw_lands_on_its_piece_of_the_stick(weights, uniform):
    t, total = draw_timestep(uniform, torch.tensor(weights, dtype=torch.float32)), sum(weights)
    assert weights[t] > 0
    assert sum(weights[:t]) <= uniform*total + 1e-9 and uniform*total - 1e-9 <= sum(weights[:t + 1])


def test_draws_come_up_as_often_as_their_weights_say():
    weights = timestep_weights(8, "range", 5, begin=2, end=4)
    count = torch.bincount(torch.tensor([draw_timestep((i + 0.5)/4000, weights) for i in range(4000)]), minlength=8)
    torch.testing.assert_close(count/4000, weights, atol=1e-3, rtol=0)


# ------------------------------------------------ EDM

sigmas = st.floats(0.002, 80)


@few
@given(sigma=sigmas, data=st.floats(0.1, 2), kind=st.sampled_from(["epsilon", "v_prediction"]))
def test_edm_scalings_are_edm_eulers(sigma, data, kind):
    library, size, (noisy, answer) = EDMEulerScheduler(sigma_data=data, prediction_type=kind), torch.tensor([sigma]), latents("edm", b=1)
    scalings = edm_scalings(size, data, kind)
    torch.testing.assert_close(edm_input(noisy, scalings), library.precondition_inputs(noisy, size))
    torch.testing.assert_close(edm_output(noisy, answer, scalings), library.precondition_outputs(noisy, answer, size))
    torch.testing.assert_close(scalings[3], library.precondition_noise(size))


@few
@given(sigma=sigmas, data=st.floats(0.1, 2))
def test_edm_scalings_have_karras_properties(sigma, data):
    sigma = torch.tensor([sigma], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = edm_scalings(sigma, data)
    one = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(c_in**2*(sigma**2 + data**2), one)  # input of size 1
    torch.testing.assert_close(((1 - c_skip)*data/c_out)**2 + (c_skip*sigma/c_out)**2, one)  # target of size 1
    torch.testing.assert_close(c_skip, data**2/(sigma**2 + data**2)); torch.testing.assert_close(c_out, c_in*sigma*data)
    torch.testing.assert_close(c_noise.mul(4).exp(), sigma)
    v = edm_scalings(sigma, data, "v_prediction")
    assert v[0] == c_skip and v[1] == -c_out and v[2] == c_in and v[3] == c_noise


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_euler_scalings_are_euler_discretes(kind):
    noisy, answer = latents("euler", b=1)
    for index in (0, 1, 300, 700, 999):
        library = EulerDiscreteScheduler(**SDXL, prediction_type=kind, timestep_spacing="linspace")
        library.set_timesteps(1000)
        scalings = euler_scalings(library.sigmas[index:index + 1], kind)
        torch.testing.assert_close(edm_input(noisy, scalings), library.scale_model_input(noisy, library.timesteps[index]))
        torch.testing.assert_close(edm_output(noisy, answer, scalings), library.step(answer, library.timesteps[index], noisy).pred_original_sample)


@few
@given(scheduler=schedulers(kinds=("epsilon", "v_prediction")), seed=st.integers(0, 10**6))
def test_sigma_and_timestep_lead_to_one_belief(scheduler, seed):
    kept = NoiseSchedule.of(scheduler).alphas_cumprod.clamp(min=1e-4)
    schedule, (x0, noise) = NoiseSchedule(kept, scheduler.config.prediction_type), latents(seed)
    t, answer = some_timesteps(len(kept), seed), latents(seed, "answer")[0]
    sigma, noisy = schedule.sigma(t), schedule.add_noise(x0, noise, t)
    grown = x0 + sigma.view(-1, 1, 1, 1)*noise
    scalings = euler_scalings(sigma, schedule.prediction_type)
    assert relative(edm_input(grown, scalings), noisy) < 1e-4
    assert relative(edm_output(grown, answer, scalings), schedule.predict_x0(answer, noisy, t)) < 1e-3


@pytest.mark.parametrize("scalings", [edm_scalings, euler_scalings])
def test_edm_knows_epsilon_and_v_only(scalings):
    with pytest.raises(CourseError, match="epsilon and v_prediction only"): scalings(torch.ones(1), prediction_type="sample")
