"The command that trains on a reward, on a toy model: probabilities, rounds, exact resume, what it leaves and what it refuses."
import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from sdxl_course.cli import main as command
from sdxl_course.core import CourseError, seeded
from sdxl_course.ddpo import DdpoConfig, main, open_ddpo, train_ddpo
from sdxl_course.model.noise import PREDICTION_TYPES, NoiseSchedule
from sdxl_course.rewards import REWARDS, jpeg_kilobytes
from sdxl_course.train.policy import advantages, chain_times, clipped_loss, log_probability, next_latents
from forked import run_ranks
from toy import files_of

# names and defaults of TRL's DDPOConfig, those that have no other name here
TRL = dict(sample_num_steps=50, sample_eta=1.0, sample_guidance_scale=5.0, sample_batch_size=1, sample_num_batches_per_epoch=2, train_batch_size=1, train_num_inner_epochs=1, train_adv_clip_max=5.0,
    train_clip_range=1e-4, train_timestep_fraction=1.0, per_prompt_stat_tracking=False, per_prompt_stat_tracking_min_count=16, num_train_epochs=100, learning_rate=3e-4, gradient_accumulation_steps=1, max_grad_norm=1.0)


def draw(*shape): return torch.randn(*shape, generator=seeded("ddpo test", *shape))


@pytest.fixture
def ddpo(tmp_path, toy, toy_model, monkeypatch):
    "A function that trains the toy model on a reward in tmp_path/NAME."
    monkeypatch.setattr("sdxl_course.train.run.save_curve", lambda path, *points: Path(path).write_bytes(b""))
    (tmp_path / "prompts.txt").write_text("a house\na tree\n")
    usual = dict(pretrained_model_name_or_path=str(toy_model), prompt_file=str(tmp_path / "prompts.txt"), reward="jpeg_compressibility", resolution=64, sample_num_steps=3, sample_batch_size=2,
        sample_num_batches_per_epoch=2, train_batch_size=2, sample_guidance_scale=2.0, max_train_steps=4, learning_rate=1e-2, seed=0, report_to="none", checkpointing_steps=1000, rank=2)
    return lambda name="run", log=lambda text: None, components=None, run=train_ddpo, reward=None, **options: run(
        DdpoConfig(**{**usual, "output_dir": str(tmp_path / name), **options}), components or toy(), log, reward=reward)


def test_names_and_defaults_are_those_of_trl(capsys):
    have = {f.name: f.default for f in fields(DdpoConfig)}
    assert {name: have[name] for name in TRL} == TRL
    argv = ["--pretrained_model_name_or_path", "m", "--prompt_file", "p", "--reward", "judge", "--train_learning_rate", "0.5", "--num_epochs", "3", "--train_gradient_accumulation_steps", "2",
        "--train_max_grad_norm", "7", "--print_config"]
    assert command(["ddpo", *argv]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [shown[name] for name in ("learning_rate", "num_train_epochs", "gradient_accumulation_steps", "max_grad_norm")] == [0.5, 3, 2, 7]


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_step_is_that_of_diffusers_and_its_probability_that_of_torch(toy, kind):
    ddim = DDIMScheduler.from_config({**toy().scheduler.config, "prediction_type": kind}, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    ddim.set_timesteps(20)
    assert chain_times(1000, 20)[:-1].tolist() == ddim.timesteps.tolist()
    schedule, answer, xt, noise = NoiseSchedule.of(ddim), draw(2, 4, 8, 8), draw(2, 4, 8, 8).flip(0), draw(2, 4, 8, 8).flip(1)
    for t, then in ((999, 949), (499, 449), (99, 49)):
        for eta in (0.3, 1.0):
            mean, std = next_latents(schedule, answer, xt, torch.full((2,), t), torch.full((2,), then), eta)
            chosen = ddim.step(answer, t, xt, eta=eta, variance_noise=noise).prev_sample
            assert torch.allclose(mean + std*noise, chosen, atol=2e-3)
            want = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(chosen).flatten(1).mean(1)
            assert torch.allclose(log_probability(chosen, mean, std), want, atol=1e-4)


def test_the_gradient_at_equal_weights_is_that_of_reinforce():
    mean, std, chosen, gain = torch.zeros(3, 1, 2, 2, requires_grad=True), torch.full((3, 1, 1, 1), 0.5), draw(3, 1, 2, 2), torch.tensor([1.0, -2.0, 0.0])
    now = log_probability(chosen, mean, std)
    clipped_loss(now, now.detach(), gain).sum().backward()
    assert torch.allclose(mean.grad, -gain.view(3, 1, 1, 1)*(chosen/0.25)/4, atol=1e-5)  # d log p / d mean = (x - mean)/std², averaged over four numbers


def test_advantages_know_their_prompt():
    rewards, prompts = [1.0, 2.0, 11.0, 12.0, 5.0], ["a", "a", "b", "b", "c"]
    own = advantages(rewards, prompts, 2)
    assert torch.allclose(own[:4], torch.tensor([-1.0, 1.0, -1.0, 1.0]), atol=1e-4) and own[4] == advantages(rewards)[4]


def test_jpeg_sizes_are_those_of_the_files(tmp_path):
    noise = Image.fromarray((draw(32, 32, 3)*50 + 120).clamp(0, 255).byte().numpy())
    noise.save(tmp_path / "a.jpg", quality=95)
    assert float(jpeg_kilobytes([noise])) == pytest.approx((tmp_path / "a.jpg").stat().st_size / 1000)
    assert REWARDS["jpeg_incompressibility"]([noise], [""]) == -REWARDS["jpeg_compressibility"]([noise], [""])


def test_a_round_is_drawn_with_one_set_of_weights_and_every_choice_comes_up_once(ddpo):
    run = ddpo(run=open_ddpo, train_num_inner_epochs=2)
    loader, seen = run.loader, []
    try:
        for micro, (batch,) in loader.batches(run.sampler.micro_steps(0, run.sampler.updates_per_epoch)):
            drawn = loader.drawn[2]
            for row, start in zip(range(len(batch.latents)), batch.extra["start"].tolist()): seen.append((micro.indices[row], start))
            for p in run.trained.named.values(): p.data.add_(0.01)  # learning goes on meanwhile
        assert sorted(seen) == sorted((i, t) for i in range(4) for t in (999, 666, 332))
        assert loader.drawn[2] is drawn and loader.policy.round == 0
        next(loader.batches(run.sampler.micro_steps(run.sampler.updates_per_epoch, 4)))  # the second pass over the same round
        assert loader.policy.round == 0 and loader.drawn[2] is drawn
        loader.roll_out(0)
        assert torch.equal(loader.drawn[2], drawn)  # drawn again with the weights of its beginning
        loader.roll_out(1)
        assert loader.policy.round == 1 and not torch.equal(loader.drawn[2], drawn)
    finally: run.close()


def test_pictures_of_a_prompt_begin_alike_where_noise_is_shared(ddpo):
    alone, run = (ddpo(name=f"shared-{shared}", run=open_ddpo, sample_num_batches_per_epoch=4, sample_shared_noise=shared) for shared in (False, True))
    try:
        alone.loader.roll_out(0)
        assert len({tuple(one.flatten().tolist()) for one in alone.loader.drawn[2][:, 0]}) == 8  # eight pictures, eight beginnings
        begins = []
        for number in (0, 1):
            run.loader.roll_out(number)
            _, prompts, chain, *_ = run.loader.drawn
            first = {prompt: chain[prompts.index(prompt), 0] for prompt in prompts}
            assert len(first) == 2 and all(torch.equal(one[0], first[prompt]) for prompt, one in zip(prompts, chain))
            assert not torch.equal(*first.values()) and len({tuple(one.flatten().tolist()) for one in chain[:, 1]}) == 8  # choices are their own
            begins.append(first)
        assert not any(torch.equal(begins[0][prompt], begins[1][prompt]) for prompt in first)
    finally: alone.close(), run.close()


def test_stored_probabilities_are_those_of_the_choices(ddpo):
    run = ddpo(run=open_ddpo)
    try:
        for _, (batch,) in run.loader.batches(run.sampler.micro_steps(0, 1)):
            mean, std = run.loss(batch, drawing=True)
            assert torch.allclose(log_probability(batch.extra["chosen"], mean, std), batch.extra["before"], atol=1e-4)
            assert torch.allclose(run.loss(batch), -batch.extra["advantage"], atol=1e-3)
    finally: run.close()


@pytest.mark.parametrize("options", [dict(), dict(train_num_inner_epochs=2, train_timestep_fraction=0.7, gradient_accumulation_steps=2), dict(use_ema=True, sample_shared_noise=True, per_prompt_stat_tracking=True, per_prompt_stat_tracking_min_count=2)], ids=str)
def test_resume_is_exact_even_in_the_middle_of_a_round(ddpo, options):
    options = dict(options, max_train_steps=5, checkpointing_steps=1)
    lasting = lambda folder: {name: data for name, data in files_of(folder).items() if name == "training_log.jsonl" or name.endswith(".safetensors") and name.startswith(("checkpoint-5", "pytorch"))}
    folder = ddpo("straight", **options).output_dir
    straight = lasting(folder)
    assert "checkpoint-5/policy.safetensors" in straight
    for k in (1, 2, 3): assert lasting(ddpo(f"from-{k}", **options, resume_from_checkpoint=str(folder / f"checkpoint-{k}")).output_dir) == straight, k


def test_each_of_two_processes_draws_its_share_of_a_round(tmp_path, toy_model):
    "Each drew the whole round; three groups of two pictures are shared out as two and one."
    (tmp_path / "prompts.txt").write_text("a house\na tree\n")
    def words(name, batch): return [str(word) for word in ["--pretrained_model_name_or_path", toy_model, "--prompt_file", tmp_path / "prompts.txt", "--reward", "jpeg_compressibility", "--resolution", 64,
        "--sample_num_steps", 2, "--sample_batch_size", 2, "--sample_num_batches_per_epoch", 3, "--train_batch_size", batch, "--sample_guidance_scale", 1, "--max_train_steps", 6, "--learning_rate", 1e-2,
        "--seed", 0, "--report_to", "none", "--rank", 2, "--output_dir", tmp_path / name]]
    codes, printed = run_ranks("told_drawings", words("two", 1), tmp_path)
    assert codes == [0, 0], printed
    found = [[line for line in text.splitlines() if line.startswith("drawn: (0") or line.startswith("drawn: (1")] for text in printed]
    assert found == [["drawn: (0, 0) (0, 1)", "drawn: (0, 4) (0, 5)", "drawn: (1, 0) (1, 1)", "drawn: (1, 4) (1, 5)"], ["drawn: (0, 2) (0, 3)", "drawn: (1, 2) (1, 3)"]]
    assert main(words("one", 2)) == 0
    one, two = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("one", "two"))
    assert max(x.abs().max() for x in one.values()) > 1e-2 and max((one[name] - two[name]).abs().max() for name in one) < 1e-4
    rows = [[json.loads(line) for line in (tmp_path / name / "training_log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert [row["epoch"] for row in rows[0]] == [0, 0, 0, 1, 1, 1] and [row["loss"] for row in rows[0]] == pytest.approx([row["loss"] for row in rows[1]], abs=1e-4)


@pytest.mark.slow
def test_a_reward_of_ones_own_is_learnt(ddpo, monkeypatch):
    "The toy's pictures are noise in 256 shades; so the reward sees the mean of the latents itself."
    monkeypatch.setattr("sdxl_course.train.rounds.decode_latents", lambda vae, latents: latents.mean((1, 2, 3)).tolist())
    result = ddpo(reward=lambda pictures, prompts: pictures, max_train_steps=30, sample_batch_size=8, train_batch_size=16, learning_rate=1e-2, train_clip_range=0.1, sample_guidance_scale=1.0, rank=4)
    rewards = [row["reward"] for row in result.log]
    assert sum(rewards[-6:]) > sum(rewards[:6]) + 0.1 and result.validation_loss_after < result.validation_loss_before
    assert {"clipped", "approx_kl", "reward"} <= result.log[0].keys() and result.measured_on == "2 prompts (minus the mean reward)"


def test_stock_diffusers_loads_the_lora(ddpo, toy_model):
    result = ddpo(validation_prompt="a house", num_validation_images=1)
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(toy_model))
    pipeline.load_lora_weights(str(result.output_dir))
    assert any(tensor.abs().max() > 0 for name, tensor in load_file(result.weights_path).items() if "lora_B" in name or "lora.up" in name)
    assert {"README.md", "config.yaml", "image_0.png", "loss.png"} <= files_of(result.output_dir).keys()


def test_nothing_is_learnt_from_equal_rewards(ddpo):
    result = ddpo(reward=lambda pictures, prompts: [1.0]*len(pictures), adam_weight_decay=0.0)
    assert all(row["loss"] == 0 for row in result.log) and not any(tensor.any() for name, tensor in load_file(result.weights_path).items() if "lora_B" in name)


@pytest.mark.parametrize("words, message", [(["--reward", "judge"], "names no"), (["--reward", "beauty"], "invalid choice: 'beauty'"), (["--sample_num_steps", "2000"], "wanted 1 to 1000"), (["--prompt_file", "no/such"], "no/such"),
    (["--prompt_file", "{empty}"], "holds no prompt"), (["--train_data_dir", "d"], "draws its own pictures"), (["--lora_dropout", "0.1"], "lora_dropout"), (["--sample_eta", "0"], "sample_eta")])
def test_bad_input_is_one_clear_sentence(words, message, tmp_path, toy_model, capsys):
    (tmp_path / "prompts.txt").write_text("a nice view\n"), (tmp_path / "empty.txt").write_text(" \n")
    argv = ["--pretrained_model_name_or_path", str(toy_model), "--prompt_file", str(tmp_path / "prompts.txt"), "--reward", "jpeg_compressibility", "--resolution", "64", "--output_dir", str(tmp_path / "o"),
        "--report_to", "none", "--max_train_steps", "1"]
    assert main(argv + [word.format(empty=tmp_path / "empty.txt") for word in words]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and told.strip().count("\n") == 0


def test_a_reward_that_is_no_number_stops_the_run_with_a_sentence(ddpo):
    with pytest.raises(CourseError, match="finite number for each"): ddpo(reward=lambda pictures, prompts: [math.nan]*len(pictures))
