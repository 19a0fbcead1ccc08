"Options, their parser, the plan of batches and the loop."
import json
import math
from dataclasses import MISSING, fields
from fractions import Fraction
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings, strategies as st
from sdxl_course.core import CourseError, SampleRNG, seeded
from sdxl_course.text_to_image import TextToImageConfig, main
from sdxl_course.data.sampler import BatchSampler, epoch_order
from sdxl_course.inference import GenerateConfig
from sdxl_course.options import config_dict, parse_config
from sdxl_course.train.optimizer import Ema, make_optimizer, make_schedule
from sdxl_course.train.machine import usable_tracker

REFERENCE = dict(  # the flags of the reference text-to-image LoRA script: (type, default)
    pretrained_model_name_or_path=(str, MISSING), pretrained_vae_model_name_or_path=(str, None), revision=(str, None), variant=(str, None),
    dataset_name=(str, None), dataset_config_name=(str, None), train_data_dir=(str, None), image_column=(str, "image"), caption_column=(str, "text"),
    max_train_samples=(int, None), cache_dir=(str, None), resolution=(int, 1024), center_crop=(bool, False), random_flip=(bool, False),
    image_interpolation_mode=(str, "lanczos"), validation_prompt=(str, None), num_validation_images=(int, 4), validation_epochs=(int, 1),
    output_dir=(str, "sd-model-finetuned-lora"), seed=(int, None), train_batch_size=(int, 16), num_train_epochs=(int, 100), max_train_steps=(int, None),
    checkpointing_steps=(int, 500), checkpoints_total_limit=(int, None), resume_from_checkpoint=(str, None), gradient_accumulation_steps=(int, 1),
    gradient_checkpointing=(bool, False), dataloader_num_workers=(int, 0), local_rank=(int, -1), learning_rate=(float, 1e-4), scale_lr=(bool, False),
    lr_scheduler=(str, "constant"), lr_warmup_steps=(int, 500), snr_gamma=(float, None), use_8bit_adam=(bool, False), adam_beta1=(float, 0.9),
    adam_beta2=(float, 0.999), adam_weight_decay=(float, 1e-2), adam_epsilon=(float, 1e-8), max_grad_norm=(float, 1.0), prediction_type=(str, None),
    noise_offset=(float, 0), rank=(int, 4), train_text_encoder=(bool, False), debug_loss=(bool, False), allow_tf32=(bool, False),
    mixed_precision=(str, None), enable_xformers_memory_efficient_attention=(bool, False), enable_npu_flash_attention=(bool, False),
    push_to_hub=(bool, False), hub_token=(str, None), hub_model_id=(str, None), logging_dir=(str, "logs"), report_to=(str, "tensorboard"))

NEEDED = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d"]


def test_every_reference_flag_has_its_name_type_and_default():
    assert len(REFERENCE) == 55
    have, kinds = {f.name: f for f in fields(TextToImageConfig)}, get_type_hints(TextToImageConfig)
    for name, (kind, default) in REFERENCE.items():
        assert have[name].default == default, name
        assert kind is kinds[name] or kind in get_args(kinds[name]), name
    assert all(f.metadata["help"] for f in have.values())


def test_the_source_documents_command_is_accepted(capsys):
    argv = """--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix
        --dataset_name=AdamLucek/oldbookillustrations-small --num_validation_images=4 --validation_epochs=1 --output_dir=output/x --resolution=1024 --center_crop
        --random_flip --train_text_encoder --train_batch_size=1 --num_train_epochs=10 --checkpointing_steps=500 --gradient_accumulation_steps=4
        --learning_rate=1e-04 --lr_warmup_steps=0 --report_to=wandb --dataloader_num_workers=8 --allow_tf32 --mixed_precision=fp16 --push_to_hub
        --hub_model_id=sdxl-base-1.0-oldbookillustrations-lora --hub_token=hf_secret --print_config""".split()
    assert main(argv + ["--validation_prompt", "An inventor tinkers, oblivious to the setting sun"]) == 0
    text = capsys.readouterr().out
    shown = json.loads(text)
    assert shown["learning_rate"] == 1e-4 and shown["center_crop"] is True and shown["max_train_steps"] is None and shown["push_to_hub"] is True
    assert "hf_secret" not in text


def test_a_config_file_goes_through_the_same_parser_and_the_command_line_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 1e-4\nmixed_precision: no\nrank: 8\ncenter_crop: true\nrandom_flip: false\nsnr_gamma: ~\n"
        "validation_prompt: 'yes, a house: red'\nvalidation_prompts:\n  - a\n  - b c\n")
    config = parse_config(TextToImageConfig, NEEDED + [f"--config={tmp_path / 'a.yaml'}", "--rank", "3"])
    assert (config.learning_rate, config.mixed_precision, config.rank, config.center_crop, config.random_flip) == (1e-4, "no", 3, True, False)
    assert (config.snr_gamma, config.validation_prompt, config.validation_prompts) == (None, "yes, a house: red", ["a", "b c"])
    (tmp_path / "b.json").write_text(json.dumps(config_dict(config)))
    assert parse_config(TextToImageConfig, ["--config", str(tmp_path / "b.json")]) == config


def test_the_command_line_wins_where_a_flag_may_be_given_again(tmp_path):
    (tmp_path / "a.yaml").write_text("prompt: [a cat, a dog]\nnum_inference_steps: 4\n")
    asked = lambda *words: parse_config(GenerateConfig, ["--config", str(tmp_path / "a.yaml"), *words])
    assert asked().prompt == ["a cat", "a dog"] and asked("--prompt", "a duck", "--prompt", "a car").prompt == ["a duck", "a car"]
    assert asked("--prompt=a duck").num_inference_steps == 4


@pytest.mark.parametrize("words, message", [
    (["--rnak", "4"], "rank"), (["--resol", "64"], "resolution"), (["--rank", "many"], "invalid int value"), (["--rank", "0"], "at least 1"),
    (["--num_validation_images", "0"], "at least 1"),  # trainers.md 2.14 number 29: a pipeline was built to draw nothing, and stacking nothing failed in the middle of the training
    (["--lr_scheduler", "cosin"], "cosine"), (["--report_to", "tensorbord"], "tensorboard"), (["--learning_rate", "nan"], "nan: wanted a number"),
    (["--lr_scheduler", "piecewise_constant"], "lr_step_rules"), (["stray"], "stray"), (["--config", "no.yaml"], "no.yaml")])
def test_wrong_words_are_one_sentence_and_exit_code_2(words, message, capsys):
    assert main(NEEDED + words) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and told.count("\n") == 1


def test_help_lists_every_flag(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in (*REFERENCE, "lora_alpha", "lora_layers", "lora_dropout", "config", "print_config", "validation_prompts", "proportion_empty_prompts"))


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 30), batch=st.integers(1, 5), accumulation=st.integers(1, 4), processes=st.integers(1, 3), seed=st.integers(0, 5))
def test_every_epoch_sees_every_sample_once_whatever_the_shape_of_the_run(n, batch, accumulation, processes, seed):
    plan = BatchSampler(n, batch, accumulation, seed, processes)
    alone = BatchSampler(n, batch * processes, accumulation, seed)
    assert plan.updates_per_epoch == alone.updates_per_epoch
    updates = 2 * plan.updates_per_epoch
    shares = [list(plan.micro_steps(0, updates, rank)) for rank in range(processes)]
    for epoch in (0, 1):
        seen = [i for share in shares for m in share if m.epoch == epoch and m.live for i in m.indices]
        assert sorted(seen) == list(range(n))
    for together, *parts in zip(alone.micro_steps(0, updates), *shares):
        assert tuple(i for part in parts if part.live for i in part.indices) == together.indices
        assert all((part.step, part.part, part.total, part.last) == (together.step, together.part, together.total, together.last) for part in parts)
    for first in range(updates): assert list(alone.micro_steps(first, updates)) == [m for m in alone.micro_steps(0, updates) if m.step >= first]


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 30), batch=st.integers(1, 9), accumulation=st.integers(1, 4), processes=st.integers(1, 3), seed=st.integers(0, 5))
def test_filled_batches_show_the_same_order_and_no_update_is_smaller_than_another(n, batch, accumulation, processes, seed):
    plan, alone = (BatchSampler(n, one, accumulation, seed, count, fill=True) for one, count in ((batch, processes), (batch * processes, 1)))
    updates = math.ceil(3 * plan.updates_per_epoch)
    whole, shares = list(alone.micro_steps(0, updates)), [list(plan.micro_steps(0, updates, rank)) for rank in range(processes)]
    shown = [(epoch, i) for m in whole for epoch, i in zip(m.epochs, m.indices)]
    assert shown[:3 * n] == [(epoch, i) for epoch in range(3) for i in epoch_order(n, seed, epoch)] and (updates - 1) * alone.global_batch_size * accumulation < 3 * n <= len(shown)
    assert {len(m.indices) for m in whole} == {batch * processes} and {m.total for m in whole} == {batch * processes * accumulation} and all(m.live and m.epoch == m.epochs[0] for m in whole)
    for together, *parts in zip(whole, *shares):
        assert tuple(pair for part in parts for pair in zip(part.indices, part.epochs)) == tuple(zip(together.indices, together.epochs))
        assert all((part.step, part.part, part.total, part.last) == (together.step, together.part, together.total, together.last) for part in parts)
    for first in range(updates): assert list(alone.micro_steps(first, updates)) == [m for m in whole if m.step >= first]


@pytest.mark.parametrize("pace, every, drawn", [(2, 1, [2, 4, 6]), (2, 2, [2, 6]), (Fraction(5, 4), 1, [2, 3, 4, 5, 7]), (Fraction(5, 4), 2, [2, 4, 7]), (Fraction(2, 5), 2, [1, 2, 3, 4, 5, 6, 7]), (Fraction(2, 5), 6, [1, 3, 6])])
def test_prompts_are_drawn_after_the_update_that_ends_an_epoch(pace, every, drawn):
    config = TextToImageConfig(pretrained_model_name_or_path="m", train_data_dir="d", validation_epochs=every)
    assert [step for step in range(1, 8) if config.draws_after(step, pace)] == drawn


def test_draws_differ_by_every_part_of_their_address():
    draws = {SampleRNG(seed, epoch, key).randint(purpose, 2**40) for seed in (0, 1) for epoch in (0, 1) for key in ("a", "b") for purpose in ("noise", "flip")}
    assert len(draws) == 16


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules_end_where_they_should(name, warmup):
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], 1e-4)
    schedule = make_schedule(optimizer, name, warmup, 10)
    for _ in range(10): optimizer.step(), schedule.step()
    assert schedule.get_last_lr()[0] == pytest.approx(1e-7 if name == "polynomial" else 0, abs=1e-12)


def test_piecewise_constant_follows_its_rules():
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], 1.0)
    schedule, rates = make_schedule(optimizer, "piecewise_constant", 0, 4, "1:2,0.1"), []
    for _ in range(4): rates.append(schedule.get_last_lr()[0]), optimizer.step(), schedule.step()
    assert rates == pytest.approx([1, 1, 0.1, 0.1])
    with pytest.raises(CourseError, match="lr_step_rules"): make_schedule(optimizer, "piecewise_constant", 0, 4, "nonsense")


def test_a_missing_tracker_is_said_and_the_run_goes_on(monkeypatch):
    monkeypatch.setattr("sdxl_course.train.machine.find_spec", lambda name: None)
    said = []
    assert usable_tracker("wandb", said.append) is None and "not installed" in said[0]
    assert usable_tracker("none", said.append) is None and len(said) == 1


def test_importing_and_training_leave_no_trace_in_the_global_state(train):
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    train(lora_dropout=0.3, validation_prompt="x", num_validation_images=1, allow_tf32=True)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_default_dtype() == torch.float32 and torch.get_num_threads() == threads
    assert torch.backends.cuda.matmul.allow_tf32 is False


def test_an_update_in_one_kernel_is_adams():
    weight = torch.randn(5, 3, generator=seeded("weight"))
    grads = [torch.randn(5, 3, generator=seeded("grad", i)) for i in range(3)]
    p = torch.nn.Parameter(weight.clone())
    optimizer, mean, square, wanted = make_optimizer([dict(params=[p], lr=1e-2, weight_decay=0.1)], 1e-2), 0, 0, weight.double()
    for step, grad in enumerate(grads, 1):
        p.grad = grad.clone()
        optimizer.step()
        mean, square = 0.9*mean + 0.1*grad.double(), 0.999*square + 0.001*grad.double()**2
        wanted = wanted*(1 - 1e-2*0.1) - 1e-2*(mean/(1 - 0.9**step))/((square/(1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(p.detach().double(), wanted, rtol=1e-6, atol=1e-6)


def test_averages_move_together_as_they_would_one_by_one():
    weights = {name: torch.randn(4, 2, generator=seeded(name)) for name in "abc"}
    ema, alone = Ema(weights, 0.9), {name: w.clone() for name, w in weights.items()}
    for step in (1, 2, 3):
        for name, w in weights.items(): w.add_(0.1*step)
        ema.update(weights, step)
        decay = min(0.9, step/(9 + step)) if step > 1 else 0.0
        for name, w in weights.items(): alone[name].lerp_(w, 1 - decay)
    assert all(torch.equal(ema.average[name], alone[name]) for name in weights)
