"The DreamBooth recipe: every flag, what a pair costs, class pictures, the teacher, EDM, exact resume, and the upstream tests."
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler
from PIL import Image
from safetensors.torch import load_file
from sdxl_course import dreambooth
from sdxl_course.model.latents import posterior
from sdxl_course.cli import main as command
from sdxl_course.model.conditioning import encode_prompts, make_time_ids
from sdxl_course.core import CourseError, SampleRNG, seeded
from sdxl_course.data.records import open_image
from sdxl_course.train import class_images, prepare
from sdxl_course.train.class_images import SETTINGS_FILE, class_pictures, missing_pictures
from sdxl_course.dreambooth import DREAMBOOTH, DreamBoothConfig, find_subject, main, open_dreambooth, train_dreambooth
from sdxl_course.model.adapters import add_lora, inject_lora, lora_modules, lora_parameters
from sdxl_course.model.lora_files import initialize_lora_from
from sdxl_course.model.noise import noise_schedule
from sdxl_course.model import sampling
from sdxl_course.model.words import add_tokens, load_learned_tokens
from sdxl_course.data.preprocess import prepare_image
from sdxl_course.data.loader import BatchLoader
from sdxl_course.data.sampler import BatchSampler, MicroBatch
from sdxl_course.train.objective import WEIGHTINGS, DenoisingLoss, PriorDistillation, denoising_loss, make_weighting, per_sample_mse, predict, without_adapters
from forked import run_ranks
from test_trainer import REFERENCE as TEXT_TO_IMAGE
from toy import files_of, make_pictures, make_upstream_pipe

PROMPT, CLASS = "a photo of sks chair", "a photo of a chair"


@pytest.fixture(scope="module")
def home(tmp_path_factory, toy_model):
    "Folders that all tests here read: five pictures of a thing, three of its class (of another size), six long ones."
    home = tmp_path_factory.mktemp("dreambooth")
    make_pictures(home / "thing", 5)
    make_pictures(home / "class", 8, size=(80, 120))
    for i in range(5): (home / "class" / f"{i}.png").unlink()  # pictures 5, 6 and 7 look like none of the thing
    make_pictures(home / "wide", 4, size=(72, 100))
    for name in ("thing", "class", "wide"): (home / name / "metadata.jsonl").unlink()
    return home


@pytest.fixture(scope="module")
def usual(home, toy_model):
    return dict(pretrained_model_name_or_path=str(toy_model), instance_data_dir=str(home / "thing"), instance_prompt=PROMPT, resolution=64, train_batch_size=2, max_train_steps=3,
        learning_rate=1e-2, seed=0, report_to="none", checkpointing_steps=1000, lr_warmup_steps=0)


@pytest.fixture(scope="module")
def prior(home): return dict(with_prior_preservation=True, class_data_dir=str(home / "class"), class_prompt=CLASS)


def prior_of(folder): return dict(with_prior_preservation=True, class_data_dir=str(folder / "class"), class_prompt=CLASS)


@pytest.fixture(scope="module")
def dream(home, usual, toy):
    "A function that trains the toy model and remembers: the same options are trained once. `name` asks for a folder of that name."
    done = {}

    def dream(name=None, log=lambda text: None, components=None, **options):
        key = json.dumps([name, options], sort_keys=True)
        if key not in done or components or name:
            config = DreamBoothConfig(**{**usual, "output_dir": str(home / (name or f"run-{len(done)}")), **options})
            done[key] = train_dreambooth(config, components or toy(), log)
        return done[key]
    return dream


def make(usual, **options): return DreamBoothConfig(**{**usual, **options})


def read_subject(config, log=lambda text: None): return find_subject(config, log).usable()


# ---------------------------------------------------------------- every flag of the reference script

NOT_THERE = ("train_data_dir", "max_train_samples", "prediction_type", "noise_offset", "debug_loss", "enable_npu_flash_attention")
REFERENCE = {name: kind for name, kind in TEXT_TO_IMAGE.items() if name not in NOT_THERE} | dict(
    caption_column=(str, None), validation_epochs=(int, 50), output_dir=(str, "lora-dreambooth-model"), train_batch_size=(int, 4), num_train_epochs=(int, 1), adam_weight_decay=(float, 1e-4),
    instance_data_dir=(str, None), repeats=(int, 1), class_data_dir=(str, None), instance_prompt=(str, ""), class_prompt=(str, None), do_edm_style_training=(bool, False),
    with_prior_preservation=(bool, False), prior_loss_weight=(float, 1.0), num_class_images=(int, 100), output_kohya_format=(bool, False), sample_batch_size=(int, 4),
    text_encoder_lr=(float, 5e-6), lr_num_cycles=(int, 1), lr_power=(float, 1.0), optimizer=(str, "AdamW"), prodigy_beta3=(float, None), prodigy_decouple=(bool, True),
    prodigy_use_bias_correction=(bool, True), prodigy_safeguard_warmup=(bool, True), prior_generation_precision=(str, None), use_dora=(bool, False),
    adam_weight_decay_text_encoder=(float, 1e-3), lora_dropout=(float, 0.0))
CHOICES = dict(prior_generation_precision={"no", "fp32", "fp16", "bf16"}, mixed_precision={"no", "fp16", "bf16"},
    image_interpolation_mode={"bilinear", "bicubic", "box", "hamming", "lanczos", "nearest", "nearest_exact"})


def test_all_72_flags_have_their_name_type_default_and_choices():
    assert len(REFERENCE) == 72
    have, kinds = {f.name: f for f in fields(DreamBoothConfig)}, get_type_hints(DreamBoothConfig)
    for name, (kind, default) in REFERENCE.items():
        assert have[name].default == default and type(have[name].default) is type(default), name
        assert kind is kinds[name] or {kind, list[kind]} & set(get_args(kinds[name])), name  # one number of a list is a number
    for name, choices in CHOICES.items(): assert set(have[name].metadata["choices"]) == choices
    assert all(f.metadata["help"] for f in have.values())
    assert set(TEXT_TO_IMAGE) < set(have)  # what the text-to-image trainer can, this one can too


SOURCE = """--pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0" --dataset_name="AdamLucek/green-chair" --pretrained_vae_model_name_or_path="madebyollin/sdxl-vae-fp16-fix"
    --output_dir="lora-trained-xl" --train_text_encoder --instance_prompt="a photo of sks chair" --resolution=1024 --train_batch_size=1 --gradient_accumulation_steps=4 --learning_rate=1e-4
    --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=500 --validation_prompt="A photo of sks chair in an apartment" --validation_epochs=5 --seed="0"
    --hub_model_id="sdxl-base-1.0-greenchair-dreambooth-lora" --push_to_hub"""


DEFAULTS = {f.name: f.default for f in fields(DreamBoothConfig)}
NOT_DEFAULT = {name: value for name, value in dict(learning_rate=1e-4, lr_scheduler="constant", resolution=1024, lr_warmup_steps=0).items() if DEFAULTS[name] != value}


def words(line):
    import shlex
    return shlex.split(line)


def test_the_source_documents_command_is_accepted_unchanged(capsys):
    assert main(words(SOURCE) + ["--print_config"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {name: value for name, value in shown.items() if value != DEFAULTS.get(name)} == dict(pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0", dataset_name="AdamLucek/green-chair",
        pretrained_vae_model_name_or_path="madebyollin/sdxl-vae-fp16-fix", output_dir="lora-trained-xl", train_text_encoder=True, instance_prompt=PROMPT, train_batch_size=1,
        gradient_accumulation_steps=4, max_train_steps=500, validation_prompt="A photo of sks chair in an apartment", validation_epochs=5, seed=0,
        hub_model_id="sdxl-base-1.0-greenchair-dreambooth-lora", push_to_hub=True) | NOT_DEFAULT
    assert command(["dreambooth", *words(SOURCE), "--print_config"]) == 0 and json.loads(capsys.readouterr().out) == shown


def test_the_source_documents_command_runs_with_local_paths(home, toy_model, tmp_path):
    changed = dict(pretrained_model_name_or_path=toy_model, dataset_name=home / "thing", pretrained_vae_model_name_or_path=toy_model, output_dir=tmp_path / "o", resolution=64, max_train_steps=2)
    argv = [f"--{name}={changed[name]}" if (name := word[2:].split("=")[0]) in changed else word for word in words(SOURCE) if word != "--push_to_hub"]
    assert main(argv + ["--num_validation_images=1", "--report_to=none"]) == 0
    assert {name.split(".")[0] for name in load_file(tmp_path / "o" / "pytorch_lora_weights.safetensors")} == {"unet", "text_encoder", "text_encoder_2"}
    assert (tmp_path / "o" / "image_0.png").is_file() and "instance_prompt: a photo of sks chair" in (tmp_path / "o" / "README.md").read_text()


@pytest.mark.parametrize("argv, message", [
    ([], "instance_data_dir"), (["--instance_data_dir", "a", "--dataset_name", "b"], "leave one of them out"), (["--instance_data_dir", "a", "--train_data_dir", "b"], "belongs to text-to-image"),
    (["--instance_data_dir", "no/such"], "not there"), (["--instance_data_dir", "a", "--with_prior_preservation", "--class_prompt", "x"], "needs --class_data_dir"),
    (["--instance_data_dir", "a", "--with_prior_preservation", "--class_data_dir", "x"], "and --class_prompt"), (["--instance_data_dir", "a", "--prior_generation_precision", "fp8"], "fp8"),
    (["--instance_data_dir", "a", "--repeats", "0"], "at least 1"), (["--instance_data_dir", "a", "--num_class_images", "0"], "at least 1"), (["--instance_data_dir", "a", "--optimizer", "adamx"], "adamw"),
    (["--instance_data_dir", "a", "--num_validation_images", "0"], "at least 1"), (["--instance_data_dir", "a", "--with_prior_preservation", "--class_prompt", "x", "--class_data_dir", "a/b"], "separate"),
    (["--instance_data_dir", "a", "--do_edm_style_training", "--snr_gamma", "5"], "by itself"), (["--instance_data_dir", "a", "--do_edm_style_training", "--rescale_betas_zero_snr"], "infinite"),
    (["--instance_data_dir", "a", "--prior_teacher"], "needs --class_prompt"), (["--instance_data_dir", "a", "--instace_prompt", "x"], "instance_prompt"),
    (["--instance_data_dir", "a", "--output_dir", "a/run"], "a folder beside it"), (["--instance_data_dir", "a", "--class_prompt", "x", "--class_data_dir", "c", "--with_prior_preservation", "--prior_teacher"], "leave one of them out"), (["--instance_data_dir", "a", "--token_abstraction", "X"], "without --train_text_encoder_ti"),
    (["--instance_data_dir", "a", "--train_text_encoder_ti", "--train_text_encoder"], "leave one of them out"), (["--instance_data_dir", "a", "--train_text_encoder_ti", "--cache_text_embeds=True"], "leave one of them out"),
    (["--instance_data_dir", "a", "--train_text_encoder_ti", "--train_text_encoder_ti_frac", "1.5"], "at most 1"), (["--instance_data_dir", "a", "--train_text_encoder_ti", "--ti_lr", "1e-3", "--optimizer", "prodigy"], "one step size")])
def test_wrong_input_is_one_sentence_and_exit_code_2(argv, message, capsys):
    assert main(["--pretrained_model_name_or_path", "tiny", "--instance_prompt", "x", *argv]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and told.count("\n") == 1


def test_instance_prompt_is_required(capsys):
    assert main(["--pretrained_model_name_or_path", "tiny", "--instance_data_dir", "a"]) == 2 and "--instance_prompt" in capsys.readouterr().err


def test_prodigy_switches_can_be_switched_off_and_optimizers_are_read_in_any_case(capsys):
    argv = ["--pretrained_model_name_or_path", "m", "--instance_prompt", "x", "--instance_data_dir", "a", "--print_config"]
    assert main(argv + ["--optimizer", "Prodigy", "--learning_rate", "1", "--text_encoder_lr", "1", "--train_text_encoder", "--prodigy_decouple", "False", "--prodigy_safeguard_warmup=false"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["optimizer"], shown["prodigy_decouple"], shown["prodigy_use_bias_correction"], shown["prodigy_safeguard_warmup"]) == ("Prodigy", False, True, False)
    assert main(argv + ["--optimizer", "ADAMW"]) == 0


def test_upper_case_optimizers_train(dream): assert dream(optimizer="ProDigy").log == dream(optimizer="prodigy").log != dream(optimizer="adamw").log == dream().log


def test_defaults_of_the_text_encoders_do_not_trip_rules_and_are_used(usual, toy):
    from sdxl_course.train.weights import lora_weights

    def groups(**options):
        config = make(usual, **options)
        trained = lora_weights(config, toy(), 0)
        optimizer, _ = prepare.optimizer_and_schedule(config, trained.groups, 3)
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in trained.named.values()}
        return [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert groups() == [(1e-2, 1e-4)]
    assert groups(train_text_encoder=True) == [(1e-2, 1e-4), (5e-6, 1e-3)]
    assert groups(train_text_encoder=True, optimizer="prodigy", learning_rate=1.0) == [(1.0, 1e-4), (1.0, 1e-3)]


def test_idle_options_get_a_sentence(dream, prior):
    said = []
    dream("idle", said.append, class_prompt="x", class_data_dir="y", max_train_steps=1)
    assert any("do nothing without --with_prior_preservation" in text for text in said)
    said.clear()
    dream("busy", said.append, **prior, optimizer="prodigy", max_train_steps=1)
    assert not any("do nothing" in text for text in said) and any("Prodigy" in text for text in said)


LARGE = dict(train_text_encoder=True)
WORDS = dict(train_text_encoder_ti=True, instance_prompt="a photo of TOK chair")
PRODIGY = dict(optimizer="prodigy", learning_rate=0.5, adam_weight_decay=0.1, max_train_steps=4, checkpointing_steps=4)
EFFECTS = [ # (flag, beside these)
    (dict(use_dora=True), {}), (dict(lora_dropout=0.5), {}), (dict(optimizer="prodigy"), {}), (dict(adam_weight_decay=10.0), {}), (dict(snr_gamma=1.0), {}), (dict(rank=2), {}), (dict(repeats=2), {}),
    (dict(text_encoder_lr=1e-2), LARGE), (dict(adam_weight_decay_text_encoder=1e4), LARGE), (dict(train_text_encoder=True), {}), (dict(instance_prompt="z"), {}), (dict(noise_offset=0.2), {}),
    (dict(lr_num_cycles=2), dict(lr_scheduler="cosine_with_restarts", max_train_steps=4)), (dict(lr_power=3.0), dict(lr_scheduler="polynomial")), (dict(prediction_type="v_prediction"), {}),
    (dict(prodigy_beta3=0.1), PRODIGY), (dict(prodigy_decouple=False), PRODIGY), (dict(prodigy_use_bias_correction=False), PRODIGY), (dict(prodigy_safeguard_warmup=False), PRODIGY),
    (dict(max_train_samples=3), {}), (dict(proportion_empty_prompts=1.0), {}), (dict(scale_lr=True), {}), (dict(use_ema=True), {}), (dict(gradient_accumulation_steps=2), {}), (dict(max_grad_norm=1e-4), {}),
    (dict(text_encoder_lr=1.0), WORDS), (dict(num_new_tokens_per_abstraction=3), WORDS), (dict(train_text_encoder_ti_frac=1.0), WORDS), (dict(ti_lr=1.0), WORDS), (dict(train_text_encoder_ti=True), dict(instance_prompt="a photo of TOK chair")),
    (dict(token_abstraction="TOK, chair"), WORDS), (dict(prior_loss_weight=0.25), "prior"), (dict(class_prompt="b"), "prior"), (dict(do_edm_style_training=True), dict(prediction_type="v_prediction"))]


@pytest.mark.parametrize("options, beside", EFFECTS, ids=lambda value: str(value)[:60])
def test_every_flag_has_an_effect(dream, prior, options, beside):
    beside = prior if beside == "prior" else beside
    found = []
    for result in (dream(**beside), dream(**{**beside, **options})):
        memory = {name: data for name, data in files_of(result.output_dir).items() if "optimizer" in name}
        memory = {name: json.loads(data)["groups"][0].get("d_numerator") if name.endswith("json") else data for name, data in memory.items()}  # not the options themselves
        found.append((result.log, result.weights_path.read_bytes(), memory))
    assert found[0] != found[1]


@pytest.mark.parametrize("options", [dict(center_crop=True), dict(random_flip=True), dict(use_aspect_ratio_buckets=True), dict(image_interpolation_mode="nearest"), dict(cached_crops=2), dict(masked_loss=True, unmasked_weight=0.5)], ids=str)
def test_every_picture_flag_has_an_effect(dream, home, prior, options):
    wide = dict(instance_data_dir=str(home / "wide"), **prior)
    if "masked_loss" in options:
        folder = home / "masks"
        folder.mkdir(exist_ok=True)
        for path in (home / "wide").glob("*.png"): Image.new("L", (100, 72), 0).save(folder / path.name)
        options = options | dict(mask_data_dir=str(folder))
    assert dream(**wide).log != dream(**wide, **options).log


# ---------------------------------------------------------------- what a picture says, and which pictures there are

def test_defect_15_other_files_in_the_folder_do_no_harm_and_order_is_natural(dream, usual, home, tmp_path):
    folder = tmp_path / "thing"
    shutil.copytree(home / "thing", folder)
    (folder / "1.png").rename(folder / "10.png")
    for name, text in {".DS_Store": "\0", "notes.txt": "x", "metadata.jsonl": '{"file_name": "gone.png", "no_text": 1}', "Thumbs.db": "x", "10.txt": "a caption"}.items(): (folder / name).write_text(text)
    (folder / ".hidden").mkdir()
    found = read_subject(make(usual, instance_data_dir=str(folder)))
    assert [r.path.name for r in found] == ["0.png", "2.png", "3.png", "4.png", "10.png"] and {r.captions for r in found} == {(PROMPT,)}


def test_captions_speak_when_asked_and_the_prompt_fills_gaps(usual, tmp_path):
    folder = make_pictures(tmp_path / "thing", 4, captions=["one", "", "   ", "four"])
    (folder / "1.txt").write_text("beside it")
    heard = []
    captions = [r.captions[0] for r in read_subject(make(usual, instance_data_dir=str(folder), caption_column="text"), log=heard.append)]
    assert captions == ["one", "beside it", PROMPT, "four"] and "1 of 4 pictures have no caption" in heard[0]
    assert {r.captions[0] for r in read_subject(make(usual, instance_data_dir=str(folder)), log=heard.append)} == {PROMPT} and "--caption_column text would" in heard[1]
    with pytest.raises(CourseError, match="txet"): read_subject(make(usual, instance_data_dir=str(folder), caption_column="txet"))
    (folder / "metadata.jsonl").unlink(), (folder / "1.txt").unlink()
    with pytest.raises(CourseError, match="leads to no caption"): read_subject(make(usual, instance_data_dir=str(folder), caption_column="text"))


def test_hub_datasets_may_have_captions_or_none(usual, home, tmp_path):
    import datasets
    table = datasets.Dataset.from_dict(dict(image=[str(home / "thing" / f"{i}.png") for i in range(3)], words=["one", "", None], text=[1, 2, 3])).cast_column("image", datasets.Image())
    table.save_to_disk(str(tmp_path / "saved"))
    options = dict(instance_data_dir=None, dataset_name=str(tmp_path / "saved"), cache_dir=str(tmp_path / "cache"))
    read = lambda **more: [r.captions[0] for r in read_subject(make(usual, **options, **more))]
    assert read() == [PROMPT] * 3 and read(caption_column="words") == ["one", PROMPT, PROMPT]
    with pytest.raises(CourseError, match="wrods"): read(caption_column="wrods")


def test_pictures_stand_upright_and_transparency_is_white(usual, tmp_path):
    folder = tmp_path / "thing"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 64), "red").save(folder / "a.jpg", exif=exif)
    record = read_subject(make(usual, instance_data_dir=str(folder)))[0]
    assert (record.width, record.height) == (64, 80)


def test_repeats_lengthen_an_epoch_and_do_not_leak_into_validation(dream):
    assert [row["epoch"] for row in dream(repeats=2, max_train_steps=6).log] == [0] * 5 + [1]  # ten samples in batches of two
    held = dream(repeats=3, max_train_steps=4, validation_split=0.4, debug_loss=True)
    seen = {name for row in held.log for name in row["loss_of"]}
    assert held.measured_on == "2 held-out pictures" and len(seen) == 3
    assert [row["epoch"] for row in dream(max_train_steps=None, num_train_epochs=2).log] == [0] * 3 + [1] * 3


@pytest.mark.parametrize("batch, most, sizes", [(4, 100, [4, 4]), (4, 6, [4, 2]), (4, 3, [4, 1]), (2, 100, [2] * 4), (8, 100, [8])])
def test_an_epoch_with_class_pictures_is_as_long_as_the_reference_scripts(usual, toy, tmp_path, batch, most, sizes):
    "trainers.md 2.5: len = max(class, instance), indices modulo each, so that five pictures beside eight fill two batches of four."
    make_pictures(tmp_path / "class", 8)  # somebody's own
    config = make(usual, train_batch_size=batch, num_train_epochs=2, max_train_steps=None, **{**prior_of(tmp_path), "num_class_images": most, "output_dir": str(tmp_path / "o")})
    run = open_dreambooth(config, toy(), lambda text: None)
    try:
        epochs = [[m for m in run.sampler.micro_steps(0, run.updates) if m.epoch == epoch] for epoch in (0, 1)]
        assert [[len(m.indices) for m in epoch] for epoch in epochs] == [sizes] * 2 and run.updates == 2 * len(sizes)
        assert len(set(run.loader.keys)) == len(run.loader.all)  # a picture that comes twice gets another noise each time
        shown = [Counter(run.loader.all[i].path.name for m in epoch for i, _ in run.loader.samples(m)[:len(m.indices)]) for epoch in epochs]
        assert all(len(one) == 5 and max(one.values()) - min(one.values()) <= 1 for one in shown)
        partners = [i for epoch in epochs for m in epoch for i, _ in run.loader.samples(m)[len(m.indices):]]
        assert len(set(partners)) == min(8, 2 * sum(sizes))  # in the second epoch those that the first left out
        if most == 100: assert sorted(partners) == sorted(list(range(len(run.loader.records), len(run.loader.all))) * 2)
    finally: run.close()


def reference_batches(things, others, batch):
    "Batch sizes of a pass of the reference script: a DataLoader over the longer of both lists, which drops nothing."
    length = max(things, others)
    return [min(batch, length - begin) for begin in range(0, length, batch)]


@pytest.mark.parametrize("batch, repeats, prior", [(4, 1, False), (4, 3, False), (2, 1, False), (4, 1, True), (4, 3, True)])
def test_the_same_flags_see_as_many_samples_in_each_update_as_the_reference_script(usual, toy, tmp_path, batch, repeats, prior):
    make_pictures(tmp_path / "class", 8)
    config = make(usual, train_batch_size=batch, repeats=repeats, num_train_epochs=2, max_train_steps=None, output_dir=str(tmp_path / "o"), **(prior_of(tmp_path) | dict(num_class_images=100) if prior else {}))
    run = open_dreambooth(config, toy(), lambda text: None)
    try: assert [len(m.indices) for m in run.sampler.micro_steps(0, run.updates)] == reference_batches(5 * repeats, 8 * prior, batch) * 2
    finally: run.close()


@pytest.mark.parametrize("prior", [False, True], ids=["alone", "with class pictures"])
def test_filled_batches_cross_epochs_and_resume_to_the_same_bytes(dream, tmp_path, prior):
    make_pictures(tmp_path / "class", 6)
    options = dict(train_batch_size=4, fill_batches=True, max_train_steps=5, checkpointing_steps=1, random_flip=True, proportion_empty_prompts=0.3, **(prior_of(tmp_path) | dict(num_class_images=3) if prior else {}))
    straight = dream("straight", **options)
    assert [row["epoch"] for row in straight.log] == [0, 0, 1, 2, 3]  # 4 of 5, 1 + 3, 2 + 2, 3 + 1, 4 of 5
    for k in (1, 2): assert dream(f"again{k}", **{**options, "resume_from_checkpoint": str(straight.output_dir / f"checkpoint-{k}")}).weights_path.read_bytes() == straight.weights_path.read_bytes()
    assert straight.log[0]["loss"] == pytest.approx(dream("plain", **{**options, "fill_batches": False, "max_train_steps": 1}).log[0]["loss"], rel=1e-6)  # the first four pictures are the same


def test_two_epochs_of_filled_batches_are_as_many_samples(dream):
    log = dream(train_batch_size=4, fill_batches=True, max_train_steps=None, num_train_epochs=2).log
    assert [row["epoch"] for row in log] == [0, 0, 1] and len(dream("plain", train_batch_size=4, max_train_steps=None, num_train_epochs=2).log) == 4


def test_the_same_picture_twice_in_one_batch_gets_two_draws(usual, toy, tmp_path):
    run = open_dreambooth(make(usual, train_batch_size=8, fill_batches=True, random_flip=True, output_dir=str(tmp_path / "o")), toy(), lambda text: None)
    try:
        micro, = run.sampler.micro_steps(0, 1)
        batch, noise, timesteps, _ = run.loader.batch(micro, run.loader.prepare(micro))
        assert sorted(micro.indices[:5]) == list(range(5)) and micro.mixed == (0,) * 5 + (1,) * 3 and len({row.numpy().tobytes() for row in noise}) == 8
        later = MicroBatch(1, 0, 1, micro.indices[5:], 3, True)
        alone = run.loader.batch(later, run.loader.prepare(later))
        assert torch.equal(noise[5:], alone[1]) and torch.equal(timesteps[5:], alone[2]) and torch.equal(batch.latents[5:], alone[0].latents)
    finally: run.close()


def test_a_longer_epoch_resumes_to_the_same_bytes(dream, usual, tmp_path):
    make_pictures(tmp_path / "class", 8)
    options = dict(train_batch_size=4, max_train_steps=3, checkpointing_steps=1, **prior_of(tmp_path))
    straight = dream("straight", **options)
    again = dream("again", **{**options, "resume_from_checkpoint": str(straight.output_dir / "checkpoint-1")})
    assert again.weights_path.read_bytes() == straight.weights_path.read_bytes() and [row["epoch"] for row in again.log] == [0, 0, 1]


def test_validation_pictures_need_no_captions(dream, home):
    assert dream(validation_data_dir=str(home / "wide"), max_train_steps=1).measured_on == "4 held-out pictures"


# ---------------------------------------------------------------- pairs

def pieces(components, record, caption, rng):
    "Latents, embeddings, size numbers, noise and timestep of one sample, made by hand from its picture, its words and its random draws."
    prepared = prepare_image(open_image(record.path), 64, generator=rng.generator("crop"))
    mean, std = posterior(components.vae, prepared.pixels[None])
    embeds, pooled = encode_prompts(components, [caption])
    ids = make_time_ids(prepared.original_size, prepared.crop_top_left, prepared.target_size)
    shape = mean.shape[1:]
    return dict(latents=mean[0] + std[0] * rng.normal("vae", shape), prompt_embeds=embeds[0], pooled_prompt_embeds=pooled[0], time_ids=ids), rng.normal("noise", shape), int(rng.uniform("timestep") * 1000)


def by_hand(components, loader, indices, epoch, loss):
    "The loss of single samples, one at a time, whatever company they have in the batch."
    from sdxl_course.data.loader import Batch
    losses = []
    for i in indices:
        tensors, noise, t = pieces(components, loader.all[i], loader.all[i].captions[0], SampleRNG(loader.seed, epoch, loader.keys[i]))
        losses.append(loss(Batch(**{k: v[None] for k, v in tensors.items()}), noise[None], torch.tensor([t])))
    return torch.cat(losses)


@pytest.fixture(scope="module")
def paired(home, usual, prior, toy):
    config = make(usual, **prior)
    components = toy()
    return components, BatchLoader(read_subject(config), components, 0, resolution=64, class_records=class_pictures(config, components, lambda text: None)[0])


@pytest.fixture(scope="module")
def unlike(paired, toy):
    "The same, but each picture has its own words, and the network listens to words more than a fresh one would."
    loader = paired[1]
    components = toy()
    with torch.no_grad():
        for name, module in components.unet.named_modules():
            if name.endswith("attn2.to_v"): module.weight *= 100
    records = [replace(r, captions=(f"{'abcde'[k]} chair",)) for k, r in enumerate(loader.records)]
    loader = BatchLoader(records, components, 0, resolution=64, class_records=loader.class_records)
    loader.encode_once(latents=False, texts=True)
    return components, loader


def weighed(components, options, kind=DenoisingLoss, **of_the_module):
    "The loss module that such options ask for; edm: of an EDM model that predicts this."
    asked = {name: value for name, value in options.items() if name not in WEIGHTINGS and name != "edm"}
    scheduler = EDMEulerScheduler(prediction_type=options["edm"]) if "edm" in options else components.scheduler
    weighting = make_weighting(**{name: value for name, value in options.items() if name in WEIGHTINGS})
    return kind(components, noise_schedule(scheduler, **asked), weighting=weighting, **of_the_module)


@pytest.mark.parametrize("options", [{}, dict(snr_gamma=1.0), dict(debiased_estimation_loss=True), dict(do_edm_style_training=True), dict(snr_gamma=1.0, prediction_type="v_prediction"),
    dict(do_edm_style_training=True, prediction_type="v_prediction"), dict(edm="epsilon"), dict(edm="v_prediction")], ids=str)
@pytest.mark.parametrize("b", [1, 2, 3, 4])
@torch.no_grad()
def test_defects_1_2_3_prompts_sizes_and_weights_go_with_their_pictures_in_both_halves(unlike, b, options):
    components, loader = unlike
    alone, pairs = weighed(components, options), weighed(components, options, prior_loss_weight=0.5)
    micro = MicroBatch(7, 0, 2, (3, 0, 4, 2)[:b], b, True)
    batch = loader.batch(micro, loader.prepare(micro))
    together = pairs(*batch[:3])
    partners = [5 + (i + 2 * 5) % 3 for i in micro.indices]
    things, others = (by_hand(components, loader, which, 2, alone) for which in (micro.indices, partners))
    assert torch.allclose(together, things + 0.5 * others, rtol=1e-4)
    order = [k for pair in zip(range(b), range(b, 2 * b)) for k in pair] if b > 1 else [1, 0]  # thing, class, thing, class, as in the defect
    for wrong in (replace(batch[0], prompt_embeds=batch[0].prompt_embeds[order]), replace(batch[0], time_ids=batch[0].time_ids[order])):
        assert not torch.allclose(pairs(wrong, *batch[1:3]), together, rtol=1e-4)


@pytest.mark.parametrize("text", [False, True], ids=["kept captions", "text encoders train"])
def test_prior_loss_closed_form_in_a_real_update(dream, paired, prior, text):
    components, loader = paired
    first = dream(**prior, train_text_encoder=text, prior_loss_weight=0.7, train_batch_size=4, max_train_steps=1).log[0]["loss"]
    micro = next(BatchSampler(5, 4, 1, seed=0).micro_steps(0, 1))
    partners = [5 + i % 3 for i in micro.indices]
    loss = weighed(components, {})
    with torch.no_grad(): things, others = (by_hand(components, loader, which, 0, loss) for which in (micro.indices, partners))
    assert first == pytest.approx(float((things + 0.7 * others).mean()), rel=1e-4)


def test_defect_5_class_pictures_carry_their_own_size_and_crop(paired):
    components, loader = paired
    loader.encode_once(latents=False, texts=True)
    ids = []
    for epoch in range(4):
        micro = MicroBatch(0, 0, epoch, (0, 1), 2, True)
        prepared = loader.prepare(micro)
        sizes = loader.batch(micro, prepared)[0].time_ids
        assert sizes[:2].tolist() == [[64, 64, 0, 0, 64, 64]] * 2 and sizes[2:, :2].tolist() == [[80, 120]] * 2
        assert sizes[2:, 2:4].tolist() == [list(p.crop_top_left) for p in prepared[2:]]
        ids += sizes[2:, 3].tolist()
    assert len(set(ids)) > 3


def test_augmentation_of_both_halves_is_drawn_anew_in_each_epoch(home, usual, prior, toy):
    config = make(usual, **prior, instance_data_dir=str(home / "wide"), random_flip=True)
    loader = BatchLoader(read_subject(config), toy(), 0, resolution=64, random_flip=True, class_records=class_pictures(config, None, lambda text: None)[0][:1])
    views = [[(p.crop_top_left, p.flipped) for p in loader.prepare(MicroBatch(0, 0, epoch, (0,), 1, True))] for epoch in range(8)]
    for half in (0, 1): assert len({view[half] for view in views}) > 4


def test_partners_move_on_until_all_have_been_seen(paired):
    loader = paired[1]
    met = [i for epoch in range(3) for i, _ in loader.samples(MicroBatch(0, 0, epoch, (0, 1, 2, 3, 4), 5, True))[5:]]
    assert sorted(met) == sorted([5, 6, 7] * 5)


# ---------------------------------------------------------------- class pictures

def class_config(usual, folder, n=5, **options): return make(usual, with_prior_preservation=True, class_data_dir=str(folder), class_prompt=CLASS, num_class_images=n, **options)


def drawn(folder): return {name: data for name, data in files_of(folder).items() if name.endswith(".png")}


def pixels(data):
    import io
    import numpy as np
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def five(home, usual, toy):
    "Five class pictures, drawn at once."
    said = []
    class_pictures(class_config(usual, home / "five"), toy(), said.append)
    assert said == [f"drawing 5 class pictures of {CLASS!r}"]
    return home / "five"


def test_class_pictures_are_lossless_and_noted(five, usual):
    files = drawn(five)
    assert sorted(files) == [f"class-{i:05d}.png" for i in range(5)] and all(data.startswith(b"\x89PNG") for data in files.values())
    assert len({data for data in files.values()}) == 5 and all(pixels(data).shape == (64, 64, 3) for data in files.values())
    note = json.loads((five / SETTINGS_FILE).read_text())
    assert note | dict(weights="") == dict(prompt=CLASS, model=Path(usual["pretrained_model_name_or_path"]).name, revision=None, vae=None, weights="", max_token_length=75, prediction_type="epsilon", rescale_betas_zero_snr=False,
        precision="fp32", seed=0, size=64, steps=20, guidance=3.0)
    assert len(note["weights"]) == 24


def test_a_class_picture_is_what_the_stock_pipeline_draws(five, toy_model):
    from sdxl_course.train.class_images import class_seed
    pipeline = DiffusionPipeline.from_pretrained(str(toy_model))
    pipeline.set_progress_bar_config(disable=True)
    ours = pixels((five / "class-00003.png").read_bytes())
    theirs = pipeline(CLASS, height=64, width=64, num_inference_steps=20, guidance_scale=3.0, generator=torch.Generator().manual_seed(class_seed(0, 3))).images[0]
    import numpy as np
    assert abs(ours - np.asarray(theirs).astype(int)).max() <= 2


@pytest.mark.parametrize("n, batch, exact", [(2, 4, True), (5, 1, False), (5, 3, False)])
def test_a_class_picture_depends_on_its_number_only(five, usual, toy, tmp_path, n, batch, exact):
    before = torch.random.get_rng_state()
    class_pictures(class_config(usual, tmp_path / "c", n, sample_batch_size=batch), toy(), lambda text: None)
    assert torch.equal(before, torch.random.get_rng_state())
    for name, data in drawn(tmp_path / "c").items():
        assert data == drawn(five)[name] if exact else abs(pixels(data) - pixels(drawn(five)[name])).max() <= 2
    assert len(drawn(tmp_path / "c")) == n
    other = class_config(usual, tmp_path / "d", 2, seed=1)
    class_pictures(other, toy(), lambda text: None)
    assert drawn(tmp_path / "d")["class-00000.png"] != drawn(five)["class-00000.png"]


def test_drawing_goes_on_after_a_crash_and_counts_only_pictures(five, usual, toy, tmp_path, monkeypatch):
    folder, real, written = tmp_path / "c", sampling.write_atomic, []

    def dies(path, data):
        if len(written) == 3: raise KeyboardInterrupt
        written.append(real(path, data))
    monkeypatch.setattr(sampling, "write_atomic", dies)
    with pytest.raises(KeyboardInterrupt): class_pictures(class_config(usual, folder), toy(), lambda text: None)
    monkeypatch.undo()
    (folder / "class-00001.png").write_bytes((folder / "class-00001.png").read_bytes()[:100])
    for name in (".DS_Store", "notes.txt", "class-0.jpg.part"): (folder / name).write_text("x")
    assert missing_pictures(folder, 5) == [1, 3, 4]
    said = []
    class_pictures(class_config(usual, folder), toy(), said.append)
    assert said == [f"drawing 3 class pictures of {CLASS!r}"] and drawn(folder) == drawn(five)
    class_pictures(class_config(usual, folder, 3), toy(), said.append)
    assert len(said) == 1  # nothing more to do


def test_class_pictures_of_another_request_are_refused(five, usual, toy):
    for change, what in ((dict(class_prompt="a photo of a lamp"), "prompt"), (dict(resolution=56), "size")):
        with pytest.raises(CourseError, match=f"{what} .*another --class_data_dir"): class_pictures(make(usual, **{**dict(with_prior_preservation=True, class_data_dir=str(five), class_prompt=CLASS, num_class_images=5), **change}), toy())
    other = toy()
    with torch.no_grad(): other.unet.conv_in.bias += 1e-3
    with pytest.raises(CourseError, match="with other weights"): class_pictures(class_config(usual, five), other)
    with pytest.raises(CourseError, match="model 'model', now 'other'"): class_images.check_settings(five, class_images.read_settings(five), class_images.drawing_settings(replace(class_config(usual, five), pretrained_model_name_or_path="x/other"), "fp32"))
    for change, what in ((dict(pretrained_vae_model_name_or_path="x/other"), "vae None, now 'other'"), (dict(revision="b"), "revision"), (dict(prediction_type="v_prediction"), "prediction_type"), (dict(max_token_length=150), "max_token_length")):
        with pytest.raises(CourseError, match=what): class_images.check_settings(five, class_images.read_settings(five), class_images.drawing_settings(replace(class_config(usual, five), **change), "bf16"))
    said = []
    assert len(class_pictures(class_config(usual, five, mixed_precision="bf16"), None, said.append)[0]) == 5 and "only the names" in said[0]  # nothing is loaded that could tell more
    class_pictures(class_config(usual, five, revision="main", prediction_type="epsilon"), toy(), lambda text: pytest.fail(text))  # other words for the same weights
    same = class_config(usual, five, seed=3)  # another seed is no reason to draw everything again
    said = []
    assert len(class_pictures(same, toy(), said.append)[0]) == 5 and "seed 0" in said[0]
    assert drawn(five) and not (five / "class-00005.png").exists()


def test_somebodys_own_class_pictures_are_used_as_they_are(home, usual, prior):
    said = []
    records, ready = class_pictures(make(usual, **prior), None, said.append)
    assert len(records) == 3 and ready is None and "used as they are" in said[0]
    assert sorted(p.name for p in (home / "class").iterdir()) == ["5.png", "6.png", "7.png"]


def test_foreign_pictures_beside_drawn_ones_are_named_and_left_alone(five, usual, toy, tmp_path):
    shutil.copytree(five, tmp_path / "c")
    Image.new("RGB", (64, 64)).save(tmp_path / "c" / "mine.png")
    said = []
    assert len(class_pictures(class_config(usual, tmp_path / "c"), toy(), said.append)[0]) == 5 and "mine.png" in said[0]


def test_a_damaged_note_and_an_unwritable_folder_are_sentences(usual, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / SETTINGS_FILE).write_text("{")
    with pytest.raises(CourseError, match="JSON"): class_pictures(class_config(usual, tmp_path / "c"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CourseError, match="class_data_dir"): class_pictures(class_config(usual, tmp_path / "file" / "c"))


def test_prior_generation_precision(five, usual, toy, tmp_path, monkeypatch):
    said, base = [], toy()
    for name, precision in (("no", "no"), ("half", "fp16"), ("brain", "bf16"), ("full", "fp32")):
        class_pictures(class_config(usual, tmp_path / name, 2, prior_generation_precision=precision), base, said.append)
    files = {name: drawn(tmp_path / name) for name in ("no", "half", "brain", "full")}
    assert files["no"] == files["half"] == files["full"] != files["brain"] and any("fp16 needs a GPU" in text for text in said)
    assert files["no"]["class-00000.png"] == drawn(five)["class-00000.png"]
    assert {p.dtype for p in base.unet.parameters()} == {torch.float32}  # what will be trained stays what it was
    assert json.loads((tmp_path / "brain" / SETTINGS_FILE).read_text())["precision"] == "bf16"


def test_missing_class_pictures_are_drawn_as_the_others_were(five, usual, toy, tmp_path):
    shutil.copytree(five, tmp_path / "c")
    (tmp_path / "c" / "class-00003.png").unlink()
    said = []
    class_pictures(class_config(usual, tmp_path / "c", prior_generation_precision="bf16"), toy(), said.append)
    assert drawn(tmp_path / "c") == drawn(five) and "drawn in fp32" in said[0]
    note = json.loads((five / SETTINGS_FILE).read_text())
    (tmp_path / "c" / SETTINGS_FILE).write_text(json.dumps(note | dict(precision="fp16")))
    (tmp_path / "c" / "class-00003.png").unlink()
    note_alone = tmp_path / "alone"
    note_alone.mkdir()
    (note_alone / SETTINGS_FILE).write_text(json.dumps(note | dict(precision="fp16", prompt="x")))  # a run that ended before its first picture binds nobody
    assert len(class_pictures(class_config(usual, note_alone), toy(), lambda text: None)[0]) == 5 and json.loads((note_alone / SETTINGS_FILE).read_text())["precision"] == "fp32"
    with pytest.raises(CourseError, match="1 class pictures are missing.*drawn in fp16.*would draw in fp32"): class_pictures(class_config(usual, tmp_path / "c"), toy())


def test_class_pictures_are_drawn_by_what_the_model_predicts(five, usual, toy, tmp_path):
    live = toy()
    class_pictures(class_config(usual, tmp_path / "v", 2, prediction_type="v_prediction"), live, lambda text: None)
    own = toy()
    own.scheduler = type(own.scheduler).from_config({**own.scheduler.config, "prediction_type": "v_prediction"})
    class_pictures(class_config(usual, tmp_path / "own", 2), own, lambda text: None)
    assert drawn(tmp_path / "v") == drawn(tmp_path / "own") and drawn(tmp_path / "v")["class-00000.png"] != drawn(five)["class-00000.png"]
    assert live.scheduler.config.prediction_type == "epsilon"  # what was given is left as it was


@pytest.mark.parametrize("size, blocks", [(1, [1] * 5), (2, [2] * 3), (4, [4] * 2)])
def test_sample_batch_size_is_how_many_are_drawn_at_a_time(usual, toy, tmp_path, monkeypatch, size, blocks):
    seen = []
    monkeypatch.setattr(class_images, "draw_pictures", lambda components, embeds, empty, seeds, *rest: seen.append(len(seeds)) or [Image.new("RGB", (64, 64), (seed % 256, 0, 0)) for seed in seeds])
    class_pictures(class_config(usual, tmp_path / "c", sample_batch_size=size), toy(), lambda text: None)
    assert seen == blocks


def test_a_long_class_prompt_is_told(dream, prior):
    for options in (dict(prior, class_prompt=CLASS + " word" * 60), dict(prior_teacher=True, class_prompt=CLASS + " word" * 60)):
        said = []
        dream("long", said.append, **options, max_train_steps=1)
        assert any("--class_prompt is longer than 77 tokens" in text for text in said)
    said = []
    dream("short", said.append, **prior, max_train_steps=1)
    assert not any("longer than" in text for text in said)


def test_the_run_keeps_a_report_of_its_pictures_also_when_they_are_unusable(dream, home, prior, tmp_path):
    result = dream("reported", max_train_steps=1)
    report = json.loads((result.output_dir / "data_report.json").read_text())
    assert len(report["pictures"]) == 5 and result.report is not None and report["resolution"] == 64
    shutil.copytree(home / "thing", tmp_path / "thing")
    (tmp_path / "thing" / "broken.png").write_bytes(b"x")
    with pytest.raises(CourseError, match="broken.png"): dream("unusable", instance_data_dir=str(tmp_path / "thing"), **dict(prior, class_data_dir=str(tmp_path / "class")))
    assert "broken.png" in str(json.loads((home / "unusable" / "data_report.json").read_text())["problems"])
    assert not (tmp_path / "class").exists()  # nothing was drawn for a run that cannot be


def test_several_processes_share_the_work_and_draw_nothing_twice(five, toy, tmp_path, monkeypatch):
    note, written = class_images.read_settings(five), []
    monkeypatch.setattr(class_images, "save_picture", lambda picture, path: written.append(Path(path).name))
    for rank in range(3): class_images.draw_class_pictures(toy(), tmp_path, note | dict(steps=1), list(range(5)), 2, (rank, 3))
    assert sorted(written) == [f"class-{i:05d}.png" for i in range(5)]


def test_loading_once_is_enough_when_the_number_format_fits(usual, toy, tmp_path, monkeypatch):
    loaded, real = [], prepare.load_components
    monkeypatch.setattr(prepare, "load_components", lambda *a, **k: (loaded.append(a), real(*a, **k))[1])
    train_dreambooth(class_config(usual, tmp_path / "c", 1, output_dir=str(tmp_path / "o"), max_train_steps=1), log=lambda text: None)
    assert len(loaded) == 1  # defect 27: nor is anything loaded at the end
    train_dreambooth(class_config(usual, tmp_path / "b", 1, output_dir=str(tmp_path / "o2"), max_train_steps=1, prior_generation_precision="bf16"), log=lambda text: None)
    assert len(loaded) == 3  # drawn in another format: loaded for it, and again to train


def test_components_with_an_adapter_draw_no_class_pictures(usual, toy, tmp_path):
    used = toy()
    add_lora(used.unet.requires_grad_(False))
    with pytest.raises(CourseError, match="freshly loaded"): class_pictures(class_config(usual, tmp_path / "c"), used)
    assert not list((tmp_path / "c").glob("*.png"))


# ---------------------------------------------------------------- the teacher

def answer_weight(schedule, t, options):
    "What an error of the network's answer counts, in closed form."
    snr, sigma = schedule.snr(t), schedule.sigma(t)
    if "edm" in options: return (0.5 * sigma)**2 / (sigma**2 + 0.25)
    if "do_edm_style_training" in options: return 1 / (1 + sigma**2)
    if "snr_gamma" in options: return snr.clamp(max=options["snr_gamma"]) / snr
    return snr**-0.5 if "debiased_estimation_loss" in options else torch.ones(len(t))


@pytest.mark.parametrize("options", [{}, dict(snr_gamma=1.0), dict(debiased_estimation_loss=True), dict(do_edm_style_training=True, prediction_type="v_prediction"), dict(edm="epsilon"), dict(text=True), dict(text=True, use_dora=True)], ids=str)
def test_the_teacher_adds_the_weighed_distance_to_the_base_model(paired, toy, options):
    options = dict(options)
    text, dora = options.pop("text", False), options.pop("use_dora", False)
    base, loader = paired
    live = toy()
    named = inject_lora(lora_modules(live, text), 0, 4, use_dora=dora)
    loader.encode_once(latents=False, texts=True)
    micro = MicroBatch(0, 0, 0, (0, 1, 2), 3, True)
    batch, noise, t, _ = loader.batch(micro, loader.prepare(micro))
    batch, noise, t = replace(batch, **{k: getattr(batch, k)[:3] for k in ("latents", "prompt_embeds", "pooled_prompt_embeds", "time_ids")}), noise[:3], t[:3]
    captions = [r.captions[0] for r in loader.records[:3]] if text else None
    plain, taught = weighed(live, options, encode_text=text), weighed(live, options, PriorDistillation, encode_text=text, class_prompt=CLASS, teacher_weight=0.5)
    assert torch.allclose(plain(batch, noise, t, captions), taught(batch, noise, t, captions), rtol=1e-5)  # a fresh student agrees
    for name, p in named.items():
        if "lora_B" in name: torch.nn.init.normal_(p, std=0.3, generator=seeded(name))
    with torch.no_grad():
        seen, times = plain.schedule.model_input(batch.latents, noise, t)
        rows = lambda who: replace(batch, **{k: x.expand(3, *x.shape[1:]) for k, x in zip(("prompt_embeds", "pooled_prompt_embeds"), encode_prompts(who, [CLASS]))})
        drift = per_sample_mse(predict(live.unet, seen, times, rows(live)), predict(base.unet, seen, times, rows(base)))
    extra = taught(batch, noise, t, captions) - plain(batch, noise, t, captions)
    assert torch.allclose(extra, 0.5 * answer_weight(plain.schedule, t, options) * drift, rtol=1e-3, atol=1e-6) and (drift > 1e-4).all()
    taught(batch, noise, t, captions).sum().backward()
    assert all(p.grad is not None for name, p in named.items() if "text_encoder." not in name)


def test_the_teacher_needs_no_pictures_and_keeps_the_class_where_it_was(dream, toy, home):
    free, held = dream(max_train_steps=8), dream(max_train_steps=8, prior_teacher=True, class_prompt=CLASS, prior_loss_weight=20.0)
    assert free.losses[0] == pytest.approx(held.losses[0], rel=1e-5) and free.losses != held.losses
    base = toy()
    embeds, pooled = encode_prompts(base, [CLASS])
    class Rows: prompt_embeds, pooled_prompt_embeds, time_ids = embeds.detach(), pooled.detach(), torch.tensor([[64., 64, 0, 0, 64, 64]])
    noisy, t = torch.randn(1, 4, 8, 8, generator=seeded("x")), torch.tensor([500])
    def drift(result):
        live = toy()
        live.unet.load_lora_adapter(load_file(result.weights_path), prefix="unet")
        with torch.no_grad(): return float(per_sample_mse(predict(live.unet, noisy, t, Rows), predict(base.unet, noisy, t, Rows)))
    assert drift(held) < 0.5 * drift(free)
    assert dream(prior_teacher=True, class_prompt=CLASS, prior_loss_weight=0.0).losses == pytest.approx(dream().losses, rel=1e-5)


def test_adapters_are_on_again_after_the_teacher_spoke(toy):
    live = toy()
    for part in lora_modules(live, True).values(): add_lora(part.requires_grad_(False))
    grads = [(n, p.requires_grad) for n, p in live.unet.named_parameters()]
    with pytest.raises(ZeroDivisionError), without_adapters(live.unet, live.text_encoder, live.vae): 1 / 0
    assert [(n, p.requires_grad) for n, p in live.unet.named_parameters()] == grads
    assert not any(getattr(m, "_disable_adapters", False) for part in lora_modules(live, True).values() for m in part.modules())


# ---------------------------------------------------------------- EDM

def test_euler_style_on_epsilon_is_the_plain_loss(dream):
    assert dream(do_edm_style_training=True, max_train_steps=4).losses == pytest.approx(dream(max_train_steps=4).losses, rel=1e-4)


@torch.no_grad()
def test_euler_style_on_v_is_the_v_loss_over_one_plus_sigma_squared(paired):
    components, loader = paired
    plain, euler = (weighed(components, dict(prediction_type="v_prediction", do_edm_style_training=style)) for style in (False, True))
    loader.encode_once(latents=False, texts=True)
    micro = MicroBatch(0, 0, 0, (0, 1, 2, 3), 4, True)
    batch, noise, t, _ = loader.batch(micro, loader.prepare(micro))
    assert torch.allclose(euler(batch, noise, t), plain(batch, noise, t) / (1 + plain.schedule.sigma(t)**2), rtol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_true_edm_is_the_closed_form_of_diffusers_scheduler(paired, kind):
    components, loader = paired
    theirs = EDMEulerScheduler(sigma_data=0.7, sigma_max=40.0, prediction_type=kind)
    loss = DenoisingLoss(components, noise_schedule(theirs))
    loader.encode_once(latents=False, texts=True)
    micro = MicroBatch(0, 0, 0, (0, 1), 2, True)
    batch, noise, t, _ = loader.batch(micro, loader.prepare(micro))
    for k, place in enumerate(t.tolist()):
        sigma = theirs.sigmas[999 - place]
        one = replace(batch, **{name: getattr(batch, name)[k:k + 1] for name in ("latents", "prompt_embeds", "pooled_prompt_embeds", "time_ids")})
        noisy = one.latents + sigma * noise[k:k + 1]
        answer = predict(components.unet, theirs.precondition_inputs(noisy, sigma), theirs.precondition_noise(sigma)[None], one)
        want = (theirs.precondition_outputs(noisy, answer, sigma) - one.latents).square().mean()
        assert float(loss(one, noise[k:k + 1], t[k:k + 1])) == pytest.approx(float(want), rel=1e-4)


def test_an_edm_model_is_trained_its_own_way_without_being_asked(dream, toy, usual, tmp_path):
    def playground():
        components = toy()
        components.scheduler = EDMEulerScheduler()
        return components
    result, asked = dream("edm", components=playground()), dream("edm-asked", components=playground(), do_edm_style_training=True)
    assert result.log == asked.log != dream().log and all(map(math.isfinite, result.losses))
    run = dreambooth.open_dreambooth(make(usual, output_dir=str(tmp_path / "o")), playground(), lambda text: None)
    try:
        micro = next(run.sampler.micro_steps(0, 1))
        batch, noise, t, _ = run.loader.batch(micro, run.loader.prepare(micro))
        with torch.no_grad(): assert torch.equal(denoising_loss(run.components.unet, batch, run.schedule.unweighted(), noise, t), run.loss(batch, noise, t))
    finally: run.close()
    for options in (dict(snr_gamma=5.0), dict(debiased_estimation_loss=True), dict(rescale_betas_zero_snr=True)):
        with pytest.raises(CourseError, match="EDM"): dream("refused", components=playground(), **options)


def test_edm_knows_no_sample_prediction(dream, toy, monkeypatch):
    odd = toy()
    monkeypatch.setattr(BatchLoader, "encode_once", lambda *given, **named: pytest.fail("this takes long, and comes after the refusal"))
    odd.scheduler = type(odd.scheduler).from_config({**odd.scheduler.config, "prediction_type": "sample"})
    with pytest.raises(CourseError, match="epsilon and v_prediction"): dream("odd", components=odd, do_edm_style_training=True)


# ---------------------------------------------------------------- new words

def words_of(folder, step): return load_file(folder / f"checkpoint-{step}" / "words.safetensors")


@pytest.mark.parametrize("options", [dict(), dict(optimizer="prodigy", learning_rate=1.0), dict(optimizer="schedulefree"), dict(adam_weight_decay_text_encoder=100.0, lr_scheduler="cosine")], ids=str)
def test_defect_24_new_words_alone_move_and_stand_still_after_their_share(dream, toy, options):
    live = toy()
    before = {part: {name: p.clone() for name, p in getattr(live, part).state_dict().items()} for part in ("text_encoder", "text_encoder_2")}
    folder = dream(f"words-{len(options)}-{len(str(options))}", components=live, **WORDS, max_train_steps=6, checkpointing_steps=1, train_text_encoder_ti_frac=0.4, **options).output_dir
    for part, tensors in before.items():
        now = {name.replace("token_embedding.base.", "token_embedding."): p for name, p in getattr(live, part).state_dict().items()}
        assert set(now) - set(tensors) == {next(name for name in now if name.endswith("token_embedding.new"))}
        assert all(torch.equal(now[name], tensors[name]) for name in tensors)
    for name in ("clip_l", "clip_g"):
        steps = [words_of(folder, k)[name] for k in range(1, 7)]
        assert steps[0].shape == (2, 8) and not torch.equal(steps[0], steps[1])
        if "optimizer" not in options or options["optimizer"] == "prodigy": assert all(torch.equal(steps[1], later) for later in steps[2:])  # 0.4 of 6 updates are 2
        final = load_file(folder / f"{folder.name}_emb.safetensors")
        assert set(final) == {"clip_l", "clip_g"} and torch.equal(final[name], steps[5])


@pytest.mark.parametrize("kind", ["toy", "upstream"])
def test_stock_diffusers_reads_words_and_lora_and_draws_our_picture(dream, toy, toy_model, upstream, tmp_path, kind):
    from sdxl_course.model.components import load_components
    from sdxl_course.model.sampling import draw_pictures
    from sdxl_course.model.conditioning import empty_prompt_embeds
    import numpy as np
    model, live = (toy_model, toy()) if kind == "toy" else (upstream, load_components(str(upstream)))  # upstream's second encoder finds the end as the largest number
    result = dream(f"read-{kind}", components=live, **WORDS, max_train_steps=3, ti_lr=0.1, pretrained_model_name_or_path=str(model))
    with torch.no_grad(): prompt, empty = encode_prompts(live, ["a photo of TOK chair"]), empty_prompt_embeds(live)
    ours = np.asarray(draw_pictures(live, [x[0] for x in prompt], [x[0] for x in empty], [1], size=64, steps=2)[0]).astype(int)
    def draw(*files):
        pipeline = DiffusionPipeline.from_pretrained(str(model))
        pipeline.set_progress_bar_config(disable=True)
        if "lora" in files: pipeline.load_lora_weights(str(result.output_dir), weight_name="pytorch_lora_weights.safetensors")
        if "words" in files: load_learned_tokens(pipeline, result.output_dir / f"{result.output_dir.name}_emb.safetensors")
        embeds = pipeline.encode_prompt("a photo of <s0><s1> chair", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        drawn = pipeline("a photo of <s0><s1> chair", generator=torch.Generator().manual_seed(1), num_inference_steps=2, height=64, width=64, guidance_scale=3.0).images[0]
        return np.asarray(drawn).astype(int), embeds
    picture, embeds = draw("lora", "words")
    assert torch.allclose(embeds[0], prompt[0], atol=1e-5) and torch.allclose(embeds[2], prompt[1], atol=1e-5)  # also the pooled one
    assert abs(picture - ours).max() <= 2
    assert not torch.allclose(draw("lora")[1][2], prompt[1], atol=1e-3)


def test_defect_7_prompts_with_new_words_begin_and_end_as_all_prompts_do(usual, toy):
    live = toy()
    add_tokens(live, make(usual, **WORDS).placeholders, 0)
    ids = live.tokenizer("a TOK chair, TOKYO").input_ids
    assert ids[0] == live.tokenizer.bos_token_id and ids[-1] == live.tokenizer.eos_token_id
    assert ids.count(live.tokenizer.first) == ids.count(live.tokenizer.first + 1) == 1  # TOKYO is another word
    assert len(toy().tokenizer) == live.tokenizer.first  # the tokenizer that was given is as it was
    with pytest.raises(CourseError, match="freshly loaded"): add_tokens(live, make(usual, **WORDS).placeholders, 0)


def test_the_pooled_vector_is_that_of_the_end_and_not_of_a_new_word(usual, upstream):
    from sdxl_course.model.components import load_components
    live = load_components(str(upstream))  # its second encoder looks for the largest number, which a new word would be
    add_tokens(live, make(usual, **WORDS).placeholders, 0)
    ids = live.tokenizer_2("a TOK chair", return_tensors="pt").input_ids
    with torch.no_grad(): out = live.text_encoder_2(ids)
    assert ids[0, -1] == live.tokenizer_2.eos_token_id < ids.max()
    with torch.no_grad(): assert torch.allclose(out.text_embeds[0], live.text_encoder_2.text_projection(out.last_hidden_state[0, -1]), atol=1e-6)


def test_several_placeholders_get_a_file_each(dream, toy_model):
    folder = dream("two words", train_text_encoder_ti=True, token_abstraction="TOK, <new one>", instance_prompt="a TOK <new one> chair", max_train_steps=1).output_dir
    whole, parts = load_file(folder / "two words_emb.safetensors"), [load_file(folder / f"two words_{name}_emb.safetensors") for name in ("0_TOK", "1__new_one_")]
    for name in ("clip_l", "clip_g"): assert len(whole[name]) == 4 and torch.equal(whole[name], torch.cat([part[name] for part in parts]))
    pipeline = DiffusionPipeline.from_pretrained(str(toy_model))
    for name in ("0_TOK", "1__new_one_"): load_learned_tokens(pipeline, folder / f"two words_{name}_emb.safetensors")
    for name, part in (("clip_l", ""), ("clip_g", "_2")):
        ids, table = getattr(pipeline, f"tokenizer{part}").convert_tokens_to_ids([f"<s{i}>" for i in range(4)]), getattr(pipeline, f"text_encoder{part}").get_input_embeddings().weight
        assert torch.equal(table[ids].detach(), whole[name])


def test_new_words_need_a_place_in_a_prompt(dream):
    with pytest.raises(CourseError, match="nothing to learn"): dream("wordless", train_text_encoder_ti=True)


# ---------------------------------------------------------------- exact resume

N = 5


def lasting(folder):
    "What must be equal to the last byte: weights, log, final checkpoint; where the run was told to write may differ."
    files = {name: data for name, data in files_of(folder).items() if name in ("pytorch_lora_weights.safetensors", "training_log.jsonl") or name.startswith(f"checkpoint-{N}/")}
    files.pop(f"checkpoint-{N}/manifest.json")
    state = json.loads(files.pop(f"checkpoint-{N}/trainer_state.json"))
    for free in ("output_dir", "resume_from_checkpoint"): state["config"].pop(free)
    assert len(files) >= 7
    return files | {"state": state}


def slow(**options): return pytest.param(options, marks=pytest.mark.slow, id=str(options))


@pytest.mark.parametrize("options", [dict(), slow(optimizer="prodigy", learning_rate=1.0), dict(train_text_encoder=True, text_encoder_lr=1e-2, lora_dropout=0.2), slow(do_edm_style_training=True, prediction_type="v_prediction"),
    slow(edm=True), dict(edm=True, train_text_encoder=True, text_encoder_lr=1e-2), dict(optimizer="prodigy", learning_rate=1.0, train_text_encoder=True, do_edm_style_training=True, snr=False, use_ema=True), dict(teacher=True, train_text_encoder=True, lora_dropout=0.2),
    dict(optimizer="prodigy", learning_rate=1.0, edm=True, gradient_accumulation_steps=2, repeats=2, use_dora=True, random_flip=True), slow(words=True), dict(words=True, teacher=True, optimizer="prodigy", learning_rate=1.0, use_ema=True)], ids=str)
def test_k_plus_the_rest_equals_n_byte_for_byte(dream, prior, home, toy, options):
    options = dict(options)
    options.pop("snr", None)
    edm, teacher, words = (options.pop(name, False) for name in ("edm", "teacher", "words"))
    def fresh():
        components = toy()
        if edm: components.scheduler = EDMEulerScheduler()
        return components
    name = f"resume-{abs(hash(str([options, edm, teacher, words])))}"
    if words: options |= dict(train_text_encoder_ti=True, instance_prompt="a photo of TOK chair")  # they stand still after update 2
    options |= dict(prior_teacher=True, class_prompt=CLASS) if teacher else prior
    options |= dict(max_train_steps=N, checkpointing_steps=1, lr_scheduler="cosine", lr_warmup_steps=1)
    straight = dream(name, components=fresh(), **options).output_dir
    k = 1 + len(options) % 4  # not the same for all
    again = dream(f"{name}-{k}", components=fresh(), **options, resume_from_checkpoint=str(straight / f"checkpoint-{k}")).output_dir
    assert lasting(again) == lasting(straight), k


def test_another_set_of_class_pictures_is_refused_at_resume_and_a_moved_one_is_not(dream, prior, home, tmp_path):
    options = {**prior, "checkpointing_steps": 1}
    dream("moved", **options)
    shutil.copytree(home / "class", tmp_path / "class")
    options["class_data_dir"] = str(tmp_path / "class")
    straight = dream("straight", **{**prior, "checkpointing_steps": 1}, max_train_steps=4)
    assert dream("moved", **options, max_train_steps=4, resume_from_checkpoint="latest").weights_path.read_bytes() == straight.weights_path.read_bytes()
    (tmp_path / "class" / "5.png").unlink()
    with pytest.raises(CourseError, match="data"): dream("moved", **options, max_train_steps=6, resume_from_checkpoint="latest")
    with pytest.raises(CourseError, match="prior_loss_weight"): dream("moved", **{**prior, "prior_loss_weight": 0.5}, max_train_steps=6, resume_from_checkpoint="latest")


# ---------------------------------------------------------------- the result

def test_the_same_run_twice_is_the_same_file(dream, prior): assert dream("one", **prior).weights_path.read_bytes() == dream("two", **prior).weights_path.read_bytes()


@pytest.mark.parametrize("options", [dict(), dict(train_text_encoder=True, text_encoder_lr=1e-2), dict(use_dora=True), dict(use_dora=True, train_text_encoder=True, text_encoder_lr=1e-2, lora_alpha=2.0)], ids=str)
def test_defects_31_32_kohya_files_hold_everything_under_the_right_names(dream, toy, options):
    result = dream(output_kohya_format=True, **options)
    kohya = load_file(result.output_dir / "pytorch_lora_weights_kohya.safetensors")
    ours = load_file(result.weights_path)
    assert {name.split(".")[-2 if name.endswith("weight") else -1] for name in kohya} == {"lora_down", "lora_up", "alpha"} | ({"dora_scale"} if "use_dora" in options else set())
    modules = {name.split(".")[0] for name in kohya}
    assert all(f"{module}.{end}" in kohya for module in modules for end in ("alpha", "lora_down.weight", "lora_up.weight"))
    assert {name.split("_")[1] for name in modules} == ({"unet", "te1", "te2"} if "train_text_encoder" in options else {"unet"})
    live = toy()
    parts = lora_modules(live, "train_text_encoder" in options)
    for part in parts.values(): add_lora(part.requires_grad_(False), 4, options.get("lora_alpha"), use_dora=options.get("use_dora", False))
    initialize_lora_from(*(parts.get(name) for name in ("unet", "text_encoder", "text_encoder_2")), result.output_dir / "pytorch_lora_weights_kohya.safetensors")
    from sdxl_course.model.lora_files import lora_file_tensors
    back = lora_file_tensors(**parts)[0]
    assert back.keys() == ours.keys() and all(torch.allclose(back[name], ours[name], atol=1e-6) for name in ours)


def test_stock_diffusers_draws_the_same_from_both_files(dream, toy_model):
    result = dream(output_kohya_format=True, train_text_encoder=True, text_encoder_lr=1e-2)
    def draw(file=None):
        pipeline = DiffusionPipeline.from_pretrained(str(toy_model))
        pipeline.set_progress_bar_config(disable=True)
        if file: pipeline.load_lora_weights(str(result.output_dir), weight_name=file)
        return pipeline(PROMPT, generator=torch.Generator().manual_seed(1), num_inference_steps=2, height=64, width=64, output_type="np").images
    one, other = draw("pytorch_lora_weights.safetensors"), draw("pytorch_lora_weights_kohya.safetensors")
    assert abs(one - other).max() < 1e-5 < abs(one - draw()).max()


def test_defects_9_and_10_frozen_text_encoders_are_out_of_the_way(usual, toy, prior):
    run = dreambooth.open_dreambooth(make(usual, **prior, gradient_checkpointing=True, output_dir=usual["instance_data_dir"] + "-run"), toy(), lambda text: None)
    try:
        assert not any("text_encoder" in name for name, _ in run.loss.named_modules())
        micro = next(run.sampler.micro_steps(0, 1))
        batch = run.loader.batch(micro, run.loader.prepare(micro))[0]
        assert not batch.prompt_embeds.requires_grad and not batch.pooled_prompt_embeds.requires_grad
        run.train()
        assert all(row["grad_norm"] > 0 for row in run.state.rows)
    finally: run.close()


def test_gradient_checkpointing_changes_no_number(dream, prior):
    options = dict(**prior, train_text_encoder=True, max_train_steps=2)
    assert dream(**options, gradient_checkpointing=True).losses == pytest.approx(dream(**options).losses, rel=1e-5)
    teacher = dict(prior_teacher=True, class_prompt=CLASS, max_train_steps=3)
    assert dream(**teacher, gradient_checkpointing=True).losses == pytest.approx(dream(**teacher).losses, rel=1e-5)


def test_defects_27_28_under_bf16_the_vae_stays_fp32_and_nothing_grows_at_the_end(dream, toy, prior):
    live = toy()
    result = dream("half", components=live, **prior, mixed_precision="bf16", validation_prompt="x", num_validation_images=1)
    assert live.vae.dtype == torch.float32 and {p.dtype for n, p in live.unet.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    assert {p.dtype for n, p in lora_parameters(live.unet)} == {torch.float32} and len(result.images) == 1
    assert result.images[0].getextrema() != ((0, 0),) * 3  # not black


def test_kept_and_fresh_encodings_give_the_same_losses(dream, prior, home):
    options = dict(**prior, center_crop=True, random_flip=True)
    assert dream(**options, cache_latents=False, cache_text_embeds=False).losses == pytest.approx(dream(**options).losses, rel=1e-5)


# ---------------------------------------------------------------- upstream's own tests, numbers 5 to 12 of trainers.md

@pytest.fixture(scope="module")
def upstream(tmp_path_factory): return make_upstream_pipe(tmp_path_factory.mktemp("upstream") / "pipe")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    "Two files, a PNG and a JPEG, as in diffusers' documentation folder."
    folder = tmp_path_factory.mktemp("images")
    Image.new("RGB", (120, 90), "orange").save(folder / "one.png")
    Image.new("RGB", (200, 100), "teal").save(folder / "two.jpg")
    return folder


COMMON = "--resolution 64 --train_batch_size 1 --gradient_accumulation_steps 1 --learning_rate 5.0e-04 --scale_lr --lr_scheduler constant --lr_warmup_steps 0".split()


@pytest.mark.parametrize("number, more, prefixes, kept", [
    (5, "--instance_data_dir IMGS --max_train_steps 2", {"unet"}, None), (6, "--instance_data_dir IMGS --max_train_steps 2 --train_text_encoder", {"unet", "text_encoder", "text_encoder_2"}, None),
    (7, "--dataset_name DATA --caption_column text --max_train_steps 2", None, None), (8, "--dataset_name DATA --caption_column text --max_train_steps 2 --train_text_encoder", None, None),
    pytest.param(9, "--instance_data_dir IMGS --max_train_steps 6 --checkpointing_steps=2 --checkpoints_total_limit=2", None, {"checkpoint-4", "checkpoint-6"}, marks=pytest.mark.slow),
    (10, "--instance_data_dir IMGS --max_train_steps 7 --checkpointing_steps=2 --checkpoints_total_limit=2 --train_text_encoder", None, {"checkpoint-4", "checkpoint-6"}),
    (11, "--instance_data_dir IMGS --max_train_steps 2 --do_edm_style_training", {"unet"}, None), (12, "--instance_data_dir IMGS --max_train_steps 2 PLAYGROUND", {"unet"}, None)])
def test_upstream(number, more, prefixes, kept, upstream, images, tmp_path, monkeypatch):
    model = make_upstream_pipe(tmp_path / "playground", playground=True) if "PLAYGROUND" in more else upstream
    data = make_pictures(tmp_path / "data", 3)
    argv = [{"IMGS": str(images), "DATA": str(data)}.get(word, word) for word in more.split() if word != "PLAYGROUND"]
    monkeypatch.chdir(tmp_path)
    assert main(["--pretrained_model_name_or_path", str(model), "--instance_prompt", "photo", *argv, *COMMON, "--output_dir", str(tmp_path / "o")]) == 0
    keys = load_file(tmp_path / "o" / "pytorch_lora_weights.safetensors")
    assert all("lora" in key for key in keys)
    if prefixes: assert {key.split(".")[0] for key in keys} == prefixes
    if kept:
        pipe = DiffusionPipeline.from_pretrained(str(model))
        pipe.load_lora_weights(str(tmp_path / "o"))
        pipe("a prompt", num_inference_steps=2)
        assert {name for name in os.listdir(tmp_path / "o") if "checkpoint" in name} == kept


def test_python_m_runs_the_module(tmp_path, toy_model, home):
    argv = ["--pretrained_model_name_or_path", str(toy_model), "--instance_data_dir", str(home / "thing"), "--instance_prompt", PROMPT, *COMMON, "--max_train_steps", "2", "--output_dir", str(tmp_path / "o"), "--report_to=none"]
    done = subprocess.run([sys.executable, "-m", "sdxl_course.dreambooth", *argv], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "o" / "pytorch_lora_weights.safetensors").is_file() and "Traceback" not in done.stderr


def test_two_processes_share_the_drawing_and_learn_what_one_learns(tmp_path, toy_model, home):
    def argv(name, batch):
        return ["--pretrained_model_name_or_path", str(toy_model), "--instance_data_dir", str(home / "thing"), "--instance_prompt", "a TOK chair", "--resolution", "64", "--max_train_steps", "4", "--seed", "0",
            "--report_to", "none", "--learning_rate", "1e-2", "--with_prior_preservation", "--class_prompt", CLASS, "--class_data_dir", str(tmp_path / f"class-{name}"), "--num_class_images", "5",
            "--sample_batch_size", "2", "--train_text_encoder_ti", "--train_batch_size", str(batch), "--output_dir", str(tmp_path / name)]
    codes, printed = run_ranks("sdxl_course.dreambooth", argv("two", 1), tmp_path)
    assert codes == [0, 0] and "".join(printed).count("drawing 5 class pictures") == 1, printed
    assert main(argv("one", 2)) == 0
    assert drawn(tmp_path / "class-two") == drawn(tmp_path / "class-one") and len(drawn(tmp_path / "class-two")) == 5
    one, two = ([json.loads(line)["loss"] for line in (tmp_path / name / "training_log.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4) and len(one) == 4
    for file in ("pytorch_lora_weights.safetensors", "{}_emb.safetensors"):
        a, b = (load_file(tmp_path / name / file.format(name)) for name in ("one", "two"))
        assert a.keys() == b.keys() and max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-4


# ---------------------------------------------------------------- several concepts

@pytest.fixture
def things(tmp_path):
    "A file of two things with three and two pictures; the second is shown three times, and each has class pictures of somebody's own."
    rows = []
    for name, n, more in (("chair", 3, {}), ("dog", 2, dict(repeats=3))):
        make_pictures(tmp_path / name, n)
        make_pictures(tmp_path / f"many-{name}", 2 + len(rows))
        rows.append(dict(instance_data_dir=str(tmp_path / name), instance_prompt=f"a photo of TOK {name}", class_data_dir=str(tmp_path / f"many-{name}"), class_prompt=f"a photo of a {name}", **more))
    return rows


def listed(rows, path):
    "The file of some things."
    import yaml
    path.write_text(yaml.safe_dump(rows) if path.suffix == ".yaml" else json.dumps(rows))
    return dict(instance_data_dir=None, instance_prompt="", concepts=str(path))


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_several_concepts_are_learnt_with_their_own_words_and_repeats(usual, toy, things, tmp_path, kind):
    config = make(usual, **listed(things, tmp_path / f"things.{kind}"), repeats=2, max_train_steps=1, output_dir=str(tmp_path / "o"), with_prior_preservation=True)
    said = []
    run = open_dreambooth(config, toy(), said.append)
    try:
        assert "5 different pictures are shown 18 times a pass, as --concepts says" in said
        shown = Counter((record.path.parent.name, record.captions) for record in run.loader.records)
        assert shown == {("chair", ("a photo of TOK chair",)): 3 * 2, ("dog", ("a photo of TOK dog",)): 2 * 3 * 2}
        beside = Counter((record.path.parent.name, record.captions) for record in run.loader.class_records)
        assert beside == {("many-chair", ("a photo of a chair",)): 2, ("many-dog", ("a photo of a dog",)): 3}
        assert run.method.trigger(config) == "a photo of TOK chair, a photo of TOK dog"
        report = json.loads((tmp_path / "o" / "data_report.json").read_text())
        assert [one["file"] for one in report["pictures"]] == [*(f"chair/{i}.png" for i in range(3)), *(f"dog/{i}.png" for i in range(2))]
        run.train()
    finally: run.close()


def test_each_thing_is_validated_with_its_own_words(usual, toy, things, tmp_path):
    make_pictures(tmp_path / "other-dogs", 4)
    things[1]["validation_data_dir"] = str(tmp_path / "other-dogs")
    config = make(usual, **listed(things, tmp_path / "things.json"), max_train_steps=1, output_dir=str(tmp_path / "o"))
    held = DREAMBOOTH.read_validation(config)
    assert [record.captions for record in held] == [("a photo of TOK dog",)] * 4 and {record.path.parent.name for record in held} == {"other-dogs"}
    assert train_dreambooth(config, toy(), lambda text: None).validation_loss_after > 0


def test_one_concept_in_a_file_trains_to_the_same_bytes_as_by_flags(usual, toy, things, tmp_path):
    one = {name: things[1][name] for name in ("instance_data_dir", "instance_prompt")}
    flags, file = make(usual, **one, repeats=3, output_dir=str(tmp_path / "flags")), make(usual, **listed([one], tmp_path / "one.yaml"), repeats=3, output_dir=str(tmp_path / "file"))
    one, other = (train_dreambooth(config, toy(), lambda text: None).weights_path.read_bytes() for config in (flags, file))
    assert one == other


@pytest.mark.parametrize("change, told", [(dict(repeats=0), "concept 2: --repeats is 0"), (dict(repeat=2), "did you mean repeats"), (dict(instance_data_dir="no/such"), "no/such is not there"), (dict(instance_prompt=""), "no instance_prompt for concept 2"),
    (dict(class_data_dir=None), "wanted a text"), (dict(class_prompt=""), "concept 2: --with_prior_preservation needs")])
def test_a_wrong_concept_is_named(usual, toy, things, tmp_path, change, told):
    config = make(usual, **listed([things[0], {**things[1], **change}], tmp_path / "things.json"), with_prior_preservation=True, output_dir=str(tmp_path / "o"))
    with pytest.raises(CourseError, match=told): open_dreambooth(config, toy(), lambda text: None)


def test_class_pictures_of_one_concept_are_not_the_thing_of_another(usual, toy, things, tmp_path):
    things[0]["class_data_dir"] = things[1]["instance_data_dir"]
    with pytest.raises(CourseError, match="taken for the other"):
        open_dreambooth(make(usual, **listed(things, tmp_path / "things.json"), with_prior_preservation=True, output_dir=str(tmp_path / "o")), toy(), lambda text: None)
