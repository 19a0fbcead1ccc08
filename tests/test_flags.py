"Every option of the text-to-image trainer, and what it changes. `test_every_option_has_a_place_in_this_file` fails for an option without an entry."
import json
import math
import re
import shutil
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sdxl_course.controlnet import ControlNetConfig
from sdxl_course.core import CourseError, load_tensors
from sdxl_course.custom_diffusion import CustomDiffusionConfig
from sdxl_course.ddpo import DdpoConfig
from sdxl_course.demo import DemoConfig
from sdxl_course.data.shards import read_shard
from sdxl_course.dpo import DpoConfig
from sdxl_course.dreambooth import DreamBoothConfig
from sdxl_course.evaluate import EvaluateConfig
from sdxl_course.full import FullConfig
from sdxl_course.instruct_pix2pix import InstructPix2PixConfig
from sdxl_course.t2i_adapter import T2IAdapterConfig
from sdxl_course.inference import GenerateConfig
from sdxl_course.lcm import LcmConfig
from sdxl_course.model.lora_reading import read_lora
from sdxl_course.options import RESUME, check_range, resume_kinds, rules_of, unused_options
from sdxl_course.pretraining.export import PretrainConfig
from sdxl_course.study import StudyConfig
from sdxl_course.text_to_image import TextToImageConfig, open_text_to_image, train_text_to_image
from sdxl_course.textual_inversion import TextualInversionConfig
from sdxl_course.train.objective import WEIGHTINGS
from sdxl_course.unconditional import UnconditionalConfig
from toy import files_of, make_pictures, make_toy_model

SHOWN = set()  # options whose effect some test below shows


def shows(*names):
    "Mark a test as the proof of these options."
    SHOWN.update(names)
    return lambda test: test


# ------------------------------------------------ the stage

@pytest.fixture(scope="module")
def home(tmp_path_factory): return tmp_path_factory.mktemp("flags")


@pytest.fixture(scope="module")
def place(home, toy_model):
    "Folders of pictures and models by name."
    import datasets
    folders = dict(square=make_pictures(home / "square"), other=make_pictures(home / "other", 3), few=make_pictures(home / "few", 2), wide=make_pictures(home / "wide", 4, size=(72, 100)),
        tags=make_pictures(home / "tags", 3, captions=["red, green, blue, tall, old"] * 3), long=make_pictures(home / "long", 2, captions=["a" * 60 + " bcde" * 12] * 2))
    halves, masks = make_pictures(home / "halves", 3), home / "masks"
    make_pictures(home / "named" / "3_a thing", 1), make_pictures(home / "named" / "1_others", 2)
    (make_pictures(home / "spoilt", 4) / "3.png").write_bytes(b"")
    masks.mkdir()
    for i in range(3):
        alpha = Image.fromarray(np.repeat(np.uint8([[255] * 32 + [0] * 32]), 64, axis=0))
        picture = Image.open(halves / f"{i}.png")
        picture.putalpha(alpha)
        picture.save(halves / f"{i}.png")
        Image.fromarray(255 - np.asarray(alpha)).save(masks / f"{i}.png")
    rows = dict(image=[dict(bytes=(folders["square"] / f"{i}.png").read_bytes(), path=None) for i in range(5)], text=[f"picture {i}" for i in range(5)])
    make_table = lambda n: datasets.Dataset.from_dict({name: values[:n] for name, values in rows.items()}).cast_column("image", datasets.Image())
    table = make_table(5)
    table.save_to_disk(home / "table")
    table.rename_columns(dict(image="pic", text="words")).save_to_disk(home / "renamed")
    for name, some in (("one", table), ("two", make_table(2))): some.to_parquet(home / "configs" / f"{name}.parquet")
    (home / "configs" / "README.md").write_text("---\nconfigs:\n" + "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("one", "two")) + "---\n")
    variant = shutil.copytree(toy_model, home / "variant")
    for file in variant.rglob("*.safetensors"): file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    second = make_toy_model(home / "second" / "model", seed=1)
    return {name: str(path) for name, path in dict(folders, named=home / "named", spoilt=home / "spoilt", halves=halves, masks=masks, table=home / "table", renamed=home / "renamed", configs=home / "configs", toy=toy_model,
        second=second, vae=second / "vae", variant=variant, cache=home / "cache", downloads=home / "downloads").items()}


@pytest.fixture(scope="module")
def ran(home, place, toy):
    "A function that trains with some options (words in braces are names of `place`); equal options train once."
    done = {}

    def ran(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in done:
            said, folder = [], home / f"run-{len(done)}"
            usual = dict(pretrained_model_name_or_path="{toy}", train_data_dir="{square}", resolution=64, train_batch_size=2, max_train_steps=3, learning_rate=1e-2, seed=0,
                report_to="none", checkpointing_steps=1000, output_dir=str(folder))
            filled = {name: value.format(**place) if isinstance(value, str) else value for name, value in {**usual, **options}.items()}
            own = {"pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "variant", "revision"} & options.keys()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sdxl_course.train.run.save_curve", lambda *curve: None)  # a fifth of the time
                result = train_text_to_image(TextToImageConfig(**filled), None if own else toy(), said.append)
            done[key] = SimpleNamespace(log=result.log, losses=result.losses, result=result, said=" | ".join(said), folder=folder, options=options)
        return done[key]
    return ran


def tensors(run, file="pytorch_lora_weights.safetensors"): return load_file(run.folder / file)


def part(run, start, file="pytorch_lora_weights.safetensors"):
    "The numbers of all tensors whose name begins so."
    return torch.cat([t.flatten().float() for name, t in sorted(tensors(run, file).items()) if name.startswith(start)])


def names(run): return set(files_of(run.folder))


def note(run): return read_lora(run.folder)[1]["unet"]


# ------------------------------------------------ the table: option, value, what else both runs have, what must be true of (run with it, run without)

TE, WIDE, TAGS = dict(train_text_encoder=True), dict(train_data_dir="{wide}"), dict(train_data_dir="{tags}", cache_text_embeds=False)
PROMPT = dict(validation_prompt="a house", num_validation_images=1)
FORGET = dict(checkpointing_steps=1)


def differ(a, b): return a.log != b.log
def same(a, b): return a.losses == pytest.approx(b.losses, rel=1e-6) and a.log != []
def rates(a): return [row["lr"] for row in a.log]


def kept(folder): return sum(len(read_shard(path)) for path in Path(folder).rglob("*.safetensors"))


TABLE = [  # model
    ("pretrained_model_name_or_path", "{second}", {}, differ), ("pretrained_vae_model_name_or_path", "{vae}", dict(pretrained_model_name_or_path="{toy}"), differ),
    # data
    ("train_data_dir", "{other}", {}, differ), ("dataset_name", "{table}", dict(train_data_dir=None), lambda a, b: same(a, b)), ("max_train_samples", 3, {}, lambda a, b: "3 pictures" in a.said and differ(a, b)),
    ("dataset_config_name", "two", dict(dataset_name="{configs}", train_data_dir=None, cache_dir="{downloads}"), lambda a, b: "2 pictures" in a.said),
    # trainers.md 2.14 number 14: columns named otherwise than image and text broke the run
    ("image_column", "pic", dict(dataset_name="{renamed}", train_data_dir=None, caption_column="words"), lambda a, b: same(a, b)),
    ("caption_column", "words", dict(dataset_name="{renamed}", train_data_dir=None, image_column="pic"), lambda a, b: same(a, b)),
    ("cache_dir", "{cache}", {}, lambda a, b: same(a, b) and "cache/encoded" in a.said and kept(a.folder.parent / "cache" / "encoded") == 10),
    ("proportion_empty_prompts", 1.0, {}, differ),
    ("repeats_from_folders", False, dict(train_data_dir="{named}"), lambda a, b: "3 pictures with" in a.said and "3 different pictures are shown 5 times a pass" in b.said and differ(a, b)),
    # captions and masks
    ("shuffle_tags", True, TAGS, differ), ("keep_tags", 9, dict(TAGS, shuffle_tags=True), lambda a, b: differ(a, b)),
    ("clip_skip", 1, {}, differ), ("clip_skip", 1, TE, differ),
    ("max_token_length", 150, dict(train_data_dir="{long}"), lambda a, b: differ(a, b) and "longer than 77" in b.said and "longer" not in a.said),
    ("masked_loss", True, dict(train_data_dir="{halves}"), lambda a, b: all(x < y for x, y in zip(a.losses[:1], b.losses))),
    ("mask_data_dir", "{masks}", dict(train_data_dir="{halves}", masked_loss=True), differ),
    ("unmasked_weight", 1.0, dict(train_data_dir="{halves}", masked_loss=True), lambda a, b: a.losses[0] > b.losses[0]),
    # pictures
    ("resolution", 56, WIDE, differ), ("center_crop", True, WIDE, differ), ("random_flip", True, {}, differ), ("image_interpolation_mode", "nearest", WIDE, differ),
    ("use_aspect_ratio_buckets", True, WIDE, lambda a, b: differ(a, b) and "buckets" in a.said),
    # cache
    ("cache_latents", False, {}, lambda a, b: same(a, b) and "cut and encoded afresh each time, since --cache_latents is False" in a.said),
    ("cache_text_embeds", False, {}, lambda a, b: same(a, b) and "encoded in every step, since --cache_text_embeds is False" in a.said),
    ("cache_latents_to_disk", True, {}, lambda a, b: same(a, b) and any(n.startswith("encoded/") for n in names(a)) and not any(n.startswith("encoded/") for n in names(b))),
    ("cached_crops", 2, WIDE, lambda a, b: differ(a, b) and "kept, in 2 random crops each" in a.said and "afresh each time, since their crop is drawn" in b.said),
    # validation
    ("validation_prompt", "a house", dict(max_train_steps=4), lambda a, b: {"image_0.png", "image_3.png", "validation/step-000003-3.png", "validation.png"} <= names(a) and not any(n.endswith(".png") for n in names(b))),
    ("validation_prompts", ["a", "b"], dict(num_validation_images=1), lambda a, b: {"image_0.png", "image_1.png"} <= names(a) and "image_2.png" not in names(a)),
    ("num_validation_images", 2, PROMPT, lambda a, b: {"image_0.png", "image_1.png"} <= names(a) and "image_1.png" not in names(b)),
    ("validation_epochs", 2, dict(PROMPT, train_batch_size=5), lambda a, b: {n for n in names(a) if n.startswith("validation/")} == {"validation/step-000001-0.png"}
        and {n for n in names(b) if n.startswith("validation/")} == {"validation/step-000001-0.png", "validation/step-000002-0.png"}),
    ("validation_steps", 2, dict(PROMPT, train_batch_size=5), lambda a, b: {n for n in names(a) if n.startswith("validation/")} == {"validation/step-000002-0.png"}
        and {n for n in names(b) if n.startswith("validation/")} == {"validation/step-000001-0.png", "validation/step-000002-0.png"}),
    ("validation_steps", 2, dict(PROMPT, train_batch_size=1, max_train_steps=11, validation_epochs=2), lambda a, b: {int(n[16:22]) for n in names(a) if n.startswith("validation/")} == {2, 4, 5, 6, 8, 10}
        and {int(n[16:22]) for n in names(b) if n.startswith("validation/")} == {5}),
    ("validation_split", 0.4, dict(debug_loss=True, max_train_steps=6), lambda a, b: a.result.measured_on == "2 held-out pictures" and len({n for row in a.log for n in row["loss_of"]}) == 3
        and b.result.measured_on == "2 training pictures" and len({n for row in b.log for n in row["loss_of"]}) == 5),
    ("validation_data_dir", "{other}", {}, lambda a, b: a.log == b.log and a.result.measured_on == "3 held-out pictures" and a.result.validation_loss_before != b.result.validation_loss_before),
    ("validation_loss_steps", 2, {}, lambda a, b: [row.get("validation_loss") is not None for row in a.log] == [False, True, False] and not any("validation_loss" in row for row in b.log)),
    ("skip_final_inference", True, PROMPT, lambda a, b: "image_0.png" not in names(a) and "image_0.png" in names(b)),
    # the run
    ("seed", 1, {}, differ), ("train_batch_size", 1, {}, differ), ("max_train_steps", 2, {}, lambda a, b: len(a.log) == 2 and a.log == b.log[:2]),
    ("num_train_epochs", 2, dict(max_train_steps=None, train_batch_size=5), lambda a, b: len(a.log) == 2), ("gradient_accumulation_steps", 2, {}, differ),
    ("fill_batches", True, dict(train_batch_size=4), lambda a, b: a.losses[:1] == pytest.approx(b.losses[:1], rel=1e-6) and differ(a, b) and [row["epoch"] for row in a.log] == [0, 0, 1]),
    ("checkpointing_steps", 2, {}, lambda a, b: "checkpoint-2/trainer_state.json" in names(a) and not any("checkpoint" in n for n in names(b))),
    ("checkpointing_minutes", 1e-9, {}, lambda a, b: a.log == b.log and "checkpoint-1/trainer_state.json" in names(a) and not any("checkpoint" in n for n in names(b))),
    ("checkpoints_total_limit", 1, FORGET, lambda a, b: {n.split("/")[0] for n in names(a) if "checkpoint" in n} == {"checkpoint-3"} and "checkpoint-1/optimizer.json" in names(b)),
    ("save_precision", "bf16", {}, lambda a, b: {t.dtype for t in tensors(a).values()} == {torch.bfloat16} and all(torch.equal(t, tensors(b)[n].bfloat16()) for n, t in tensors(a).items())),
    ("output_kohya_format", True, {}, lambda a, b: "pytorch_lora_weights_kohya.safetensors" in names(a) - names(b) and all(n.startswith("lora_unet_") for n in tensors(a, "pytorch_lora_weights_kohya.safetensors"))),
    ("dataloader_num_workers", 2, WIDE, lambda a, b: a.log == b.log),
    # optimizer
    *[("optimizer", name, dict(learning_rate=0.5), differ) for name in ("prodigy", "adafactor", "schedulefree")], ("optimizer", "AdamW", {}, lambda a, b: a.log == b.log),
    ("learning_rate", 1e-3, {}, differ),
    # anchors.md 6 trap 18: what scale_lr multiplies by; test_regressions.py counts the updates under accumulation
    ("scale_lr", True, {}, lambda a, b: rates(a) == [2e-2] * 3 and rates(b) == [1e-2] * 3),
    ("text_encoder_lr", 0.0, TE, lambda a, b: not part(a, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B").any() and part(b, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B").any()),
    ("text_encoder_lr", [1e-2, 0.0], TE, lambda a, b: tuple(bool(part(a, f"{name}.text_model.encoder.layers.0.self_attn.q_proj.lora_B").any()) for name in ("text_encoder", "text_encoder_2")) == (True, False)),
    ("block_lr", "down=0, up_blocks.0=1e-3", dict(max_train_steps=1, adam_weight_decay=0.0), lambda a, b: [most(a, block) / most(b, block) for block in ("down_blocks", "mid_block", "up_blocks")] == pytest.approx([0, 1, 0.1], rel=1e-3)),
    ("loraplus_lr_ratio", 10.0, dict(max_train_steps=1, adam_weight_decay=0.0, learning_rate=1e-3), lambda a, b: moved(a) == pytest.approx(10 * moved(b), rel=1e-3)),
    ("lr_scheduler", "linear", dict(lr_warmup_steps=0), lambda a, b: rates(a) == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])), ("lr_scheduler", "constant_with_warmup", dict(lr_warmup_steps=2), lambda a, b: rates(a) == [0, 5e-3, 1e-2]),
    ("lr_warmup_steps", 3, dict(lr_scheduler="cosine"), lambda a, b: rates(a) == pytest.approx([0, 1e-2 / 3, 2e-2 / 3]) and rates(b) == pytest.approx([0, 1e-2 / 500, 2e-2 / 500])),
    ("lr_step_rules", "1:1,0.1", dict(lr_scheduler="piecewise_constant"), lambda a, b: rates(a) == pytest.approx([1e-2, 1e-3, 1e-3])),
    ("lr_num_cycles", 3, dict(lr_scheduler="cosine_with_restarts", lr_warmup_steps=0), lambda a, b: rates(a) == [1e-2] * 3 and rates(b)[1] == pytest.approx(0.75e-2)),
    ("lr_power", 2.0, dict(lr_scheduler="polynomial", lr_warmup_steps=0), lambda a, b: rates(a)[1] == pytest.approx(1e-2 * (2 / 3)**2, rel=1e-3) and rates(b)[1] == pytest.approx(1e-2 * 2 / 3, rel=1e-3)),
    ("adam_beta1", 0.5, {}, differ), ("adam_beta2", 0.5, {}, differ), ("adam_weight_decay", 0.5, {}, differ), ("adam_epsilon", 1e-3, {}, differ), ("max_grad_norm", 1e-4, {}, differ),
    ("adam_weight_decay_text_encoder", 50.0, TE, lambda a, b: part(a, "text_encoder.").abs().sum() < 0.9 * part(b, "text_encoder.").abs().sum() and part(a, "unet.").abs().sum() > 0.9 * part(b, "unet.").abs().sum()),
    ("use_ema", True, FORGET, lambda a, b: "checkpoint-3/ema.safetensors" in names(a) - names(b) and a.log == b.log and averaged(a, 0.999) and torch.equal(part(a, "unet.", "checkpoint-3/trained.safetensors").sort()[0], part(b, "unet.").sort()[0])),
    ("ema_decay", 0.1, dict(FORGET, use_ema=True), lambda a, b: averaged(a, 0.1) and averaged(b, 0.999) and not torch.equal(part(a, "unet."), part(b, "unet."))),
    # loss
    ("prediction_type", "v_prediction", {}, differ), ("snr_gamma", 0.01, {}, lambda a, b: a.losses[0] < b.losses[0]), ("debiased_estimation_loss", True, {}, differ), ("noise_offset", 0.2, {}, differ),
    ("rescale_betas_zero_snr", True, dict(prediction_type="v_prediction"), differ), ("do_edm_style_training", True, {}, differ),
    ("timestep_bias_strategy", "later", dict(timestep_bias_multiplier=1e6), differ), ("timestep_bias_strategy", "cubic", {}, differ), ("timestep_bias_strategy", "earlier", dict(timestep_bias_multiplier=1e6), differ),
    ("timestep_bias_multiplier", 1e6, dict(timestep_bias_strategy="later"), differ), ("timestep_bias_portion", 0.01, dict(timestep_bias_strategy="later", timestep_bias_multiplier=1e6), differ),
    ("timestep_bias_begin", 900, dict(timestep_bias_strategy="range", timestep_bias_multiplier=1e6), differ), ("timestep_bias_end", 50, dict(timestep_bias_strategy="range", timestep_bias_multiplier=1e6), differ),
    # LoRA
    ("rank", 2, {}, lambda a, b: note(a)["r"] == 2 and note(b)["r"] == 4 and differ(a, b)), ("lora_alpha", 1.0, {}, lambda a, b: note(a)["lora_alpha"] == 1 and differ(a, b)), ("lora_dropout", 0.5, {}, differ),
    ("lora_layers", "to_q,to_v", {}, lambda a, b: {n.rsplit(".", 3)[1] for n in tensors(a)} == {"to_q", "to_v"}), ("lora_layers", "attention+feedforward", {}, lambda a, b: any(".ff." in n for n in tensors(a))),
    ("lora_layers", "attention+feedforward+convolution", {}, lambda a, b: any(".conv1." in n for n in tensors(a))),
    ("use_dora", True, {}, lambda a, b: any("lora_magnitude_vector" in n for n in tensors(a)) and differ(a, b)), ("use_rslora", True, {}, lambda a, b: note(a)["use_rslora"] and differ(a, b)),
    *[("init_lora_weights", name, {}, lambda a, b: differ(a, b) and a.result.validation_loss_before == pytest.approx(b.result.validation_loss_before, rel=1e-4))
        for name in ("default", "pissa", "pissa_niter_4", "olora", "orthogonal")],
    *[("adapter", name, {}, lambda a, b, file=file, sign=sign: differ(a, b) and any(sign in n for n in load_tensors(a.folder / f"{file}.safetensors")[0]))
        for name, file, sign in (("loha", "lycoris", "hada_w1_a"), ("lokr", "lycoris", "lokr_w1"), ("oft", "adapter_model", "oft_R.weight"))],
    ("train_text_encoder", True, {}, lambda a, b: {n.split(".")[0] for n in tensors(a)} == {"unet", "text_encoder", "text_encoder_2"} and {n.split(".")[0] for n in tensors(b)} == {"unet"}),
    ("debug_loss", True, {}, lambda a, b: "loss_of" in a.log[0].keys() - b.log[0].keys() and all(len(row["loss_of"]) in (1, 2) for row in a.log)),
    # machine and sharing
    ("mixed_precision", "bf16", {}, differ),
    ("report_to", "tensorboard", {}, lambda a, b: any("events.out.tfevents" in n and n.startswith("logs/") for n in names(a)) and not any(n.startswith("logs/") for n in names(b))),
    ("logging_dir", "curves", dict(report_to="tensorboard"), lambda a, b: any(n.startswith("curves/") for n in names(a)) and not any(n.startswith("logs/") for n in names(a))),
]


NEEDED = ("num_train_epochs", "dataset_name", "dataset_config_name", "image_column", "caption_column", "lr_step_rules")  # nothing works without them where they belong


def moved(run): return max(float(t.abs().max()) for n, t in tensors(run).items() if ".lora_B." in n)


def most(run, block): return float(torch.cat([t.flatten() for n, t in tensors(run).items() if n.startswith(f"unet.{block}") and ".lora_B." in n]).abs().max())


def averaged(run, decay):
    "Whether the file is the moving average of the trained weights that the checkpoints kept."
    steps = [load_tensors(run.folder / f"checkpoint-{k}" / "trained.safetensors")[0] for k in (1, 2, 3)]
    average = steps[0]
    for k in (2, 3): average = {n: t + (1 - min(decay, k / (9 + k))) * (steps[k - 1][n] - t) for n, t in average.items()}
    saved = load_tensors(run.folder / "checkpoint-3" / "ema.safetensors")[0]
    kept = {n.replace(".default.", "."): t for n, t in saved.items()}
    return all(torch.allclose(t, average[n], atol=1e-7) for n, t in saved.items()) and all(torch.equal(t, kept[n]) for n, t in tensors(run).items())


@pytest.mark.parametrize("name, value, others, true", TABLE, ids=[f"{name}-{value}" for name, value, *_ in TABLE])
def test_option_has_its_effect(ran, place, name, value, others, true):
    a, b = ran(**{**others, name: value}), ran(**({} if name in NEEDED else others))
    assert true(a, b)
    if name not in (*NEEDED, "dataloader_num_workers") and value != "AdamW": assert not true(b, b)  # the check does see something


SHOWN.update(name for name, *_ in TABLE)


# ------------------------------------------------ what needs more than one line

@shows("on_problem")
def test_what_cannot_be_used_is_left_out_where_that_is_asked_for(ran):
    for options in ({}, dict(on_problem="error")):
        with pytest.raises(CourseError, match="3.png .it is empty.*--on_problem skip"): ran(train_data_dir="{spoilt}", **options)
    run = ran(train_data_dir="{spoilt}", on_problem="skip")
    assert "3 pictures with" in run.said and "left out for problems, as --on_problem skip asks: 1, for instance 3.png (it is empty" in run.said
    assert same(run, ran(train_data_dir="{other}"))


@shows("revision", "variant")
def test_revision_and_variant_reach_the_hub_and_the_files(monkeypatch, ran, place):
    from diffusers import StableDiffusionXLPipeline
    asked = []
    monkeypatch.setattr(StableDiffusionXLPipeline, "download", lambda model, **wishes: asked.append((model, wishes)) or place["variant"])
    run = ran(pretrained_model_name_or_path="owner/name", revision="abc", variant="fp16")
    assert same(run, ran()) and asked[0][0] == "owner/name" and (asked[0][1]["revision"], asked[0][1]["variant"]) == ("abc", "fp16")
    with pytest.raises(CourseError, match="has only the variant fp16 of its weights: add --variant fp16"): ran(pretrained_model_name_or_path="{variant}")


def test_the_base_may_be_one_file(ran, toy, home, place, monkeypatch):
    "Its configurations come from the hub, or from a pipeline folder beside it; test_components.py shows that the file itself is understood."
    from sdxl_course.core import save_tensors
    file, seen = home / "single" / "base.safetensors", []
    file.parent.mkdir()
    save_tensors(file, {"x": torch.zeros(1)})
    with pytest.raises(CourseError, match="base.safetensors.*hub.*beside it, named base"): ran(pretrained_model_name_or_path=str(file))
    shutil.copytree(place["toy"], file.parent / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr("sdxl_course.train.prepare.load_components", lambda model, dtype, **options: seen.append((model, options["config"])) or toy())
    assert same(ran(pretrained_model_name_or_path=str(file), rank=3), ran(rank=3)) and seen == [(str(file), file.parent / "base")]


def older(name):
    "Diffusers' block names in kohya's spelling, as other programs write them, for a UNet with one layer in each of two blocks."
    blocks = dict(down_blocks_1_attentions_0="input_blocks_3_1", mid_block_attentions_0="middle_block_1", up_blocks_0_attentions_0="output_blocks_0_1", up_blocks_0_attentions_1="output_blocks_1_1")
    for theirs, ours in blocks.items(): name = name.replace(ours, theirs)
    return name


@shows("init_lora")
@pytest.mark.parametrize("options", [pytest.param(dict(lora_alpha=2.0), marks=pytest.mark.slow), dict(TE, rank=2, lora_alpha=3.0), dict(use_dora=True), pytest.param(dict(use_rslora=True), marks=pytest.mark.slow)], ids=str)
def test_a_run_goes_on_from_a_lora_file_of_either_layout(ran, options, tmp_path):
    from sdxl_course.core import save_tensors
    first = ran(**options, output_kohya_format=True)
    kohya = first.folder / "pytorch_lora_weights_kohya.safetensors"
    values, notes = load_tensors(kohya)
    save_tensors(tmp_path / "older.safetensors", {older(n): t for n, t in values.items()}, notes)
    logs = []
    for file in (first.folder, kohya, tmp_path / "older.safetensors"):
        then = ran(**{**options, "lora_alpha": 8.0}, init_lora=str(file))  # another alpha: the values are scaled
        assert then.result.validation_loss_before == pytest.approx(first.result.validation_loss_after, rel=1e-5)
        logs.append(then.losses)
    assert logs[1] == pytest.approx(logs[0], rel=1e-5) and logs[2] == pytest.approx(logs[0], rel=1e-5) and logs[0] != first.losses


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"])
def test_a_lora_whose_text_encoders_would_be_dropped_is_no_start(ran, file):
    with pytest.raises(CourseError, match="train_text_encoder"): ran(init_lora=str(ran(**TE, output_kohya_format=True).folder / file))


@shows("enable_xformers_memory_efficient_attention", "enable_npu_flash_attention")
def test_other_attentions_are_switched_on(toy, monkeypatch):
    from sdxl_course.train.prepare import load_base
    called = []
    for name in ("enable_xformers_memory_efficient_attention", "enable_npu_flash_attention"):
        monkeypatch.setattr("diffusers.UNet2DConditionModel." + name, lambda self, *a, name=name: called.append(name), raising=False)
        load_base(TextToImageConfig(pretrained_model_name_or_path="m", train_data_dir="d", resolution=64, **{name: True}), "cpu", torch.float32, toy())
    assert called == ["enable_xformers_memory_efficient_attention", "enable_npu_flash_attention"]


@shows("use_8bit_adam", "local_rank")
def test_what_the_machine_lacks_is_refused_before_anything_is_read(home):
    for options, message in ((dict(use_8bit_adam=True), "NVIDIA GPU"), (dict(optimizer="AdamW8bit"), "NVIDIA GPU"), (dict(local_rank=0), "accelerate launch")):
        with pytest.raises(CourseError, match=message):
            open_text_to_image(TextToImageConfig(pretrained_model_name_or_path="no", train_data_dir="no", output_dir=str(home / "refused"), **options))
    assert not (home / "refused").exists()


@pytest.mark.parametrize("scheduler, warmup, updates, told", [("cosine", 500, 50, True), ("linear", 51, 50, True), ("cosine", 50, 50, False), ("constant", 500, 50, False),
    ("constant_with_warmup", 500, 50, True)], ids=str)
def test_a_warmup_that_outlasts_the_training_is_told_with_what_the_rate_comes_to(scheduler, warmup, updates, told):
    from sdxl_course.model.adapters import parameter_groups
    from sdxl_course.train.prepare import optimizer_and_schedule
    said, place = [], torch.nn.Parameter(torch.zeros(4))
    config = TextToImageConfig(pretrained_model_name_or_path="m", train_data_dir="d", learning_rate=1e-3, lr_scheduler=scheduler, lr_warmup_steps=warmup)
    optimizer, schedule = optimizer_and_schedule(config, parameter_groups({"unet.x.lora_A.default.weight": place}, 1e-3, weight_decay=0.0), updates, log=said.append)
    assert bool(said) == told
    if told:
        for _ in range(updates): optimizer.step(), schedule.step()
        assert f"has come to {schedule.get_last_lr()[0] / 1e-3:.0%} of" in said[0] and f"{warmup} is longer" in said[0]


@shows("prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup")
def test_each_flag_of_prodigy_reaches_it_and_changes_its_way():
    from sdxl_course.model.adapters import parameter_groups
    from sdxl_course.train.prepare import optimizer_and_schedule
    def walk(**options):
        place = torch.nn.Parameter(torch.zeros(4))
        config = TextToImageConfig(pretrained_model_name_or_path="m", train_data_dir="d", optimizer="Prodigy", learning_rate=1.0, adam_weight_decay=0.5, **options)
        optimizer, _ = optimizer_and_schedule(config, parameter_groups({"unet.x.lora_A.default.weight": place}, config.learning_rate, weight_decay=config.adam_weight_decay), 40)
        for k in range(40):
            optimizer.param_groups[0]["lr"] = min(1.0, k / 10)  # a warm-up
            optimizer.zero_grad(), ((place - torch.arange(4.0))**2).sum().backward(), optimizer.step()
        return place.detach(), optimizer.param_groups[0]
    usual, group = walk()
    assert (group["beta3"], group["decouple"], group["use_bias_correction"], group["safeguard_warmup"]) == (None, True, True, True)
    for name, value in dict(beta3=0.5, decouple=False, use_bias_correction=False, safeguard_warmup=False).items():
        place, group = walk(**{f"prodigy_{name}": value})
        assert group[name] == value and not torch.equal(place, usual), name


def inside(monkeypatch, look):
    "Call `look` on every loss of the training."
    import sdxl_course.train.objective as module
    real = module.denoising_loss
    def loss(*args, **options):
        if torch.is_grad_enabled(): look(*args)
        return real(*args, **options)
    monkeypatch.setattr(module, "denoising_loss", loss)


def test_workers_open_pictures_in_threads(train, make_pictures, monkeypatch):
    "trainers.md 2.14 number 17: worker processes could not be started where the dataset held a closure; threads need not be sent anything."
    import threading
    from sdxl_course.data.loader import BatchLoader
    real, where = BatchLoader.prepare, []
    monkeypatch.setattr(BatchLoader, "prepare", lambda self, micro: where.append(threading.current_thread() is threading.main_thread()) or real(self, micro))
    wide = dict(train_data_dir=str(make_pictures(4, "wide", size=(64, 100))))
    assert train("a", dataloader_num_workers=2, **wide).log == train("b", **wide).log and where == [False] * 3 + [True] * 3


@shows("allow_tf32")
def test_tf32_is_allowed_while_training_only(train, monkeypatch):
    seen = []
    inside(monkeypatch, lambda *_: seen.append(torch.backends.cuda.matmul.allow_tf32))
    train("a", allow_tf32=True), train("b")
    assert seen == [True] * 3 + [False] * 3 and torch.backends.cuda.matmul.allow_tf32 is False


@pytest.mark.parametrize("options, allowed", [(dict(timestep_bias_strategy="range", timestep_bias_begin=900), range(900, 1000)), (dict(timestep_bias_strategy="later", timestep_bias_portion=0.1), range(900, 1000)),
    (dict(timestep_bias_strategy="earlier", timestep_bias_portion=0.1), range(100)), (dict(timestep_bias_strategy="range", timestep_bias_begin=0, timestep_bias_end=10), range(10))], ids=str)
def test_timestep_bias_draws_what_it_favours(train, monkeypatch, options, allowed):
    seen = []
    inside(monkeypatch, lambda unet, batch, schedule, noise, timesteps, *_: seen.extend(timesteps.tolist()))
    train(timestep_bias_multiplier=1e9, **options)
    assert len(seen) == 5 and set(seen) <= set(allowed)


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "an encoded empty text"])
@pytest.mark.parametrize("text", [False, True], ids=["kept", "trained"])
def test_empty_prompts_are_the_pipelines_own_and_drawn_anew(train, toy, toy_model, tmp_path, monkeypatch, zeros, text):
    "anchors.md 6 trap 17: a LoRA could not be trained with empty prompts at all, and the full trainer drew them once for all epochs."
    from sdxl_course.model.conditioning import encode_prompts
    parts, seen = toy(), []
    parts.force_zeros_for_empty_prompt = zeros
    empty = torch.zeros(77, 16) if zeros else encode_prompts(parts, [""])[0][0].detach()
    inside(monkeypatch, lambda unet, batch, *_: seen.extend(batch.prompt_embeds.detach().clone()))
    config = TextToImageConfig(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(make_pictures(tmp_path / "p", 2)), resolution=64, train_batch_size=2, num_train_epochs=12, seed=0,
        proportion_empty_prompts=0.5, learning_rate=1e-9, train_text_encoder=text, report_to="none", output_dir=str(tmp_path / "o"))
    train_text_to_image(config, parts, log=lambda text: None)
    dropped = [bool((told - empty).abs().max() < 1e-5) for told in seen]
    assert len(dropped) == 24 and 5 < sum(dropped) < 19
    assert len({tuple(dropped[i:i + 2]) for i in range(0, 24, 2)}) > 2  # not the same in every epoch


@shows("push_to_hub", "hub_model_id", "hub_token")
def test_the_result_goes_to_the_hub_and_nothing_else_does(train, hub, monkeypatch, tmp_path):
    "trainers.md 2.14 number 35 and 33, anchors.md 6 trap 1, 3 and 4: no push without a validation prompt, token leaked, checkpoints and logs uploaded."
    events = []
    inside(monkeypatch, lambda *_: events.append(len(hub.told)))
    said, token = [], "hf_" + "Tk4" * 12
    result = train(push_to_hub=True, hub_token=token, checkpointing_steps=1, report_to="tensorboard", logging_dir="curves", cache_dir=str(tmp_path / "run" / "mine"), log=said.append)
    assert [what for what, *_ in hub.told] == ["create", "upload"] and events == [1] * 3  # the repository is there before the first step
    assert hub.told[0][1:3] == ("run", token) and hub.told[1][1:3] == ("me/run", token) and result.url == "https://hub/me/run"
    assert hub.told[1][3] == ["README.md", "config.yaml", "loss.png", "pytorch_lora_weights.safetensors", "training_log.jsonl"]
    assert not any(token.encode() in data for data in files_of(tmp_path / "run").values()) and token not in " ".join(said)
    train("named", push_to_hub=True, hub_model_id="style", validation_prompt="x", num_validation_images=1, output_kohya_format=True)
    assert hub.told[2][1] == "style" and {"image_0.png", "pytorch_lora_weights_kohya.safetensors"} <= set(hub.told[3][3]) and not any("/" in name for name in hub.told[3][3])


def test_a_hub_that_says_no_costs_nothing(train, hub, tmp_path):
    hub.broken = ("create",)
    with pytest.raises(CourseError, match="nothing was trained"): train(push_to_hub=True)
    assert "training_log.jsonl" not in files_of(tmp_path / "run")
    hub.broken = ("upload",)
    with pytest.raises(CourseError, match="trained, not pushed.*nothing is lost.*sdxl-course push"): train(push_to_hub=True)
    assert {"pytorch_lora_weights.safetensors", "README.md", "config.yaml"} <= set(files_of(tmp_path / "run"))


def test_trackers_get_curves_pictures_and_no_token(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder = train(report_to="tensorboard", hub_token="hf_secret", validation_prompt="x", num_validation_images=2, train_batch_size=5, validation_loss_steps=1, debug_loss=True).output_dir / "logs"
    events = EventAccumulator(str(folder / "text2image-fine-tune")).Reload()
    assert {"train_loss", "lr", "grad_norm", "validation_loss", "loss_for_0.png"} <= set(events.Tags()["scalars"]) and "validation" in events.Tags()["images"]
    assert [e.step for e in events.Scalars("train_loss")] == [1, 2, 3]
    assert not any(b"hf_secret" in data for data in files_of(folder).values())


@pytest.mark.parametrize("name", ["wandb", "comet_ml", "trackio"])
def test_a_missing_tracker_is_a_sentence_and_the_run_goes_on(train, name, monkeypatch):
    monkeypatch.setattr("sdxl_course.train.machine.find_spec", lambda name: None)
    said = []
    assert len(train(report_to=name, log=said.append, max_train_steps=1).log) == 1 and any(f"{name} is not installed" in text for text in said)


@pytest.mark.parametrize("moment", ["start", "log", "log_images"])
def test_a_tracker_that_breaks_does_not_stop_the_training(train, monkeypatch, moment):
    "anchors 3.5: an outage elsewhere must not cost a run."
    from accelerate.tracking import TensorBoardTracker
    def broken(self, *args, **options): raise ConnectionError("the tracker is away")
    monkeypatch.setattr(TensorBoardTracker, moment, broken)
    said = []
    assert len(train(report_to="tensorboard", validation_prompt="x", num_validation_images=1, log=said.append).log) == 3 and sum("tensorboard" in text and "ConnectionError" in text and "training_log.jsonl" in text for text in said) == 1
    assert "the tracker is away" not in " ".join(said)  # what it says may hold an address with a key


@shows("skip_nan_updates")
def test_broken_updates_are_left_out_on_request(train, monkeypatch):
    import sdxl_course.train.objective as module
    real, calls = module.denoising_loss, []
    def loss(*args, **options):
        value = real(*args, **options)
        if not value.requires_grad: return value
        calls.append(1)
        return value * (float("nan") if len(calls) == 2 else 1)
    monkeypatch.setattr(module, "denoising_loss", loss)
    rows = train(skip_nan_updates=True).log
    assert [row["loss"] is None for row in rows] == [False, True, False] and rows[1]["grad_norm"] is None
    calls.clear()
    with pytest.raises(CourseError, match="update 2"): train("b")


@shows("output_dir", "validation_loss_steps")
def test_everything_is_written_below_output_dir(ran, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = ran(**PROMPT, report_to="tensorboard", checkpointing_steps=2, cache_latents_to_disk=True, validation_loss_steps=1)
    assert not files_of(tmp_path) and {"config.yaml", "README.md", "training_log.jsonl", "image_0.png"} <= names(run)


ELSEWHERE = dict(resume_with_changes=("test_checkpoint.py", "test_a_resume_with_another_rate_takes_the_same_step_shorter"), resume_from_checkpoint=("test_checkpoint.py", "test_resuming_twice_and_stopping_early_change_nothing"),
    gradient_checkpointing=("test_text_to_image.py", "test_gradient_checkpointing_reaches_every_network_and_changes_no_number"))
SHOWN.update(ELSEWHERE)


def test_what_is_shown_elsewhere_is_there():
    for file, name in ELSEWHERE.values(): assert f"def {name}(" in Path(__file__).with_name(file).read_text()


def test_a_run_in_a_notebook_shows_itself(train, toy, toy_model, tmp_path):
    "Nothing but what ipywidgets 7 and 8 have in common."
    import inspect
    from sdxl_course.train.results import LiveView
    assert re.findall(r"from ipywidgets import (.+)", inspect.getsource(LiveView)) == ["HTML, Image as Picture, VBox"]
    config = TextToImageConfig(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(make_pictures(tmp_path / "p", 2)), resolution=64, train_batch_size=2, max_train_steps=3, seed=0,
        validation_prompt="x", num_validation_images=1, report_to="none", output_dir=str(tmp_path / "o"))
    run = open_text_to_image(config, toy(), log=lambda text: None, live=True)
    try: run.train(), run.finish()
    finally: run.close()
    assert "update 3 of 3" in run.live.words.value and all(bytes(view.value).startswith(b"\x89PNG") for view in (run.live.curve, run.live.sheet))
    assert [type(child).__name__ for child in run.live.box.children] == ["HTML", "Image", "Image"]


# ------------------------------------------------ limits, what a resume may change, rules

CONFIGS = dict(  # every command that trains, and what it cannot do without
    text=(TextToImageConfig, dict(train_data_dir="d")), subject=(DreamBoothConfig, dict(instance_data_dir="d", instance_prompt="a photo of TOK chair")), full=(FullConfig, dict(train_data_dir="d")),
    word=(TextualInversionConfig, dict(train_data_dir="d", placeholder_token="<s>", initializer_token="chair")), steer=(ControlNetConfig, dict(train_data_dir="d")),
    adapter=(T2IAdapterConfig, dict(train_data_dir="d")), edit=(InstructPix2PixConfig, dict(train_data_dir="d")), lcm=(LcmConfig, dict(train_data_dir="d")),
    dpo=(DpoConfig, dict(train_data_dir="d", rejected_data_dir="r")), pixels=(UnconditionalConfig, dict(train_data_dir="d")), ddpo=(DdpoConfig, dict(prompt_file="p", reward="jpeg_compressibility")),
    words=(CustomDiffusionConfig, dict(instance_data_dir="d", instance_prompt="a <new1> chair")))


def build(command, **options): return CONFIGS[command][0](**{"pretrained_model_name_or_path": "m", **CONFIGS[command][1], **options})


@pytest.mark.parametrize("command", CONFIGS)
def test_every_option_has_a_help_line_a_limit_that_holds_and_a_kind(command):
    config, hints, kinds = build(command), get_type_hints(CONFIGS[command][0]), resume_kinds(build(command))
    for f in fields(config):
        kinds_of = {hints[f.name], *get_args(hints[f.name])}
        number = {int, float} & (kinds_of | {one for kind in kinds_of for one in get_args(kind)})
        assert f.metadata["help"] and "\n" not in f.metadata["help"] and kinds[f.name] in RESUME, f.name
        assert bool(f.metadata["limit"]) == (bool(number) and not f.metadata.get("choices") and f.name != "local_rank"), f.name  # every number has one
        if not f.metadata["limit"]: continue
        low, high = re.fullmatch(r"(?:> )?(-?\d+) \.\.(?: (?:< )?(\d+))?", f.metadata["limit"]).groups()
        wrong = [int(low) - 1, float("nan"), float("inf"), *([float(low)] if ">" in f.metadata["limit"] else []), *([int(high) + 1] if high else []), *([float(high)] if "<" in f.metadata["limit"] else [])]
        assert all(check_range(value, f.metadata["limit"]) for value in wrong), f.name
        if f.default is not None: assert check_range(f.default, f.metadata["limit"]) == "", f.name
        for value in (int(value) if int in number else value for value in wrong if math.isfinite(value) or int not in number):
            with pytest.raises(CourseError, match=f"--{f.name} is .*wanted"): build(command, **{f.name: value})
        for value in (True, "3", *([1.5] if int in number else [])):
            with pytest.raises(CourseError, match=f"--{f.name} is .*wanted a (whole )?number"): build(command, **{f.name: value})


OTHERS = dict(generate=(GenerateConfig, dict(prompt=["a mug"])), evaluate=(EvaluateConfig, {}), demo=(DemoConfig, {}), study=(StudyConfig, {}), pretrain=(PretrainConfig, {}))


@pytest.mark.parametrize("command", OTHERS)
def test_every_number_of_the_other_commands_has_a_limit(command):
    Config, usual = OTHERS[command]
    hints = get_type_hints(Config)
    for f in fields(Config):
        kinds = {hints[f.name], *get_args(hints[f.name])}
        several = list[float] in kinds
        if not several and (not kinds & {int, float} or f.metadata.get("choices")): continue
        assert check_range(math.inf, f.metadata["limit"]), f.name
        for wrong in (math.nan, math.inf, int(f.metadata["limit"].split("..")[0].strip("> ")) - 1):
            with pytest.raises(CourseError, match=f"--{f.name} is .*wanted"): Config(**{**usual, f.name: [wrong] if several else wrong})


FREE = set("""ddpm_num_inference_steps rejected_data_dir prompt_file output_dir max_train_steps num_train_epochs checkpointing_steps checkpointing_minutes checkpoints_total_limit resume_from_checkpoint
    dataloader_num_workers local_rank train_batch_size validation_prompt validation_prompts num_validation_images validation_epochs cache_dir logging_dir
    validation_data_dir validation_loss_steps skip_final_inference save_precision output_kohya_format init_lora cache_latents_to_disk mask_data_dir report_to push_to_hub
    hub_model_id debug_loss pretrained_model_name_or_path pretrained_vae_model_name_or_path train_data_dir dataset_name dataset_config_name image_column caption_column
    max_train_samples repeats_from_folders on_problem instance_data_dir class_data_dir num_class_images sample_batch_size prior_generation_precision save_as_full_pipeline validation_steps save_steps resume_with_changes concepts
    conditioning_image_column conditioning_data_dir validation_image controlnet_model_name_or_path adapter_model_name_or_path original_image_column edited_image_column edit_prompt_column val_image_url_or_path""".split())
MACHINE = set("""cast_teacher_unet mixed_precision gradient_checkpointing allow_tf32 enable_xformers_memory_efficient_attention enable_npu_flash_attention
    cache_latents cache_text_embeds revision variant""".split())

NEVER = set("""ddpm_num_steps ddpm_beta_schedule reward whole_unet unet_time_cond_proj_dim adapter rank lora_alpha lora_layers use_dora use_rslora init_lora_weights train_text_encoder optimizer use_8bit_adam use_ema seed prediction_type rescale_betas_zero_snr do_edm_style_training
    train_text_encoder_ti token_abstraction num_new_tokens_per_abstraction placeholder_token num_vectors modifier_token freeze_model controlnet_size""".split())


@pytest.mark.parametrize("command", CONFIGS)
def test_what_a_resume_may_change(command):
    "Everything that shapes the numbers is fixed; data and base model are compared by their content (`Run.settings`)."
    kinds = resume_kinds(build(command))
    rounds = {"sample_batch_size"} if command == "ddpo" else set()  # how many pictures a round has
    assert {name for name, kind in kinds.items() if kind == "free"} == FREE & kinds.keys() - rounds
    assert {name for name, kind in kinds.items() if kind == "machine"} == MACHINE & kinds.keys()
    assert {name for name, kind in kinds.items() if kind == "never"} == NEVER & kinds.keys()
    assert set(kinds.values()) == set(RESUME)


def test_no_kind_is_left_out(): assert FREE | MACHINE | NEVER <= {name for command in CONFIGS for name in resume_kinds(build(command))}


def weight(one): return True if one.kind is bool else 5.0  # a value that asks for a weighting


STRUCK = dict(  # command -> (options that cannot be together, a neighbour that can); `text` holds for the others too
    text=[(dict(lr_scheduler="piecewise_constant"), dict(lr_scheduler="piecewise_constant", lr_step_rules="1:1,0.1")), (dict(cache_text_embeds=True, train_text_encoder=True), dict(cache_text_embeds=False, train_text_encoder=True)),
    (dict(cache_text_embeds=True, shuffle_tags=True), dict(cache_text_embeds=False, shuffle_tags=True)), (dict(cache_latents=True), dict(cache_latents=True, cached_crops=2)),
    (dict(fill_batches=True, use_aspect_ratio_buckets=True), dict(fill_batches=True)), (dict(cached_crops=2, use_aspect_ratio_buckets=True), dict(cached_crops=2)), (dict(cache_latents=False, cache_latents_to_disk=True), dict(cache_latents_to_disk=True)),
    *[({one.flag: weight(one), other.flag: weight(other)}, {other.flag: weight(other)}) for one, other in combinations(WEIGHTINGS.values(), 2)], (dict(mask_data_dir="m"), dict(mask_data_dir="m", masked_loss=True)),
    (dict(rescale_betas_zero_snr=True, prediction_type="epsilon"), dict(rescale_betas_zero_snr=True, prediction_type="v_prediction")), (dict(keep_tags=1), dict(keep_tags=1, shuffle_tags=True)),
    (dict(validation_split=0.1, validation_data_dir="v"), dict(validation_split=0.1)), (dict(resume_with_changes="learning_rate"), dict(resume_with_changes="learning_rate", resume_from_checkpoint="latest")),
    (dict(timestep_bias_strategy="range", timestep_bias_begin=5, timestep_bias_end=5), dict(timestep_bias_strategy="range", timestep_bias_begin=5, timestep_bias_end=6)),
    (dict(use_8bit_adam=True, optimizer="prodigy"), dict(use_8bit_adam=True)),
    (dict(optimizer="schedulefree", lr_scheduler="cosine"), dict(optimizer="schedulefree", lr_scheduler="constant_with_warmup")), (dict(optimizer="schedulefree", use_ema=True), dict(optimizer="schedulefree")),
    (dict(optimizer="Prodigy", loraplus_lr_ratio=16.0), dict(optimizer="Prodigy")), (dict(optimizer="Prodigy", block_lr="up=1e-4"), dict(block_lr="up=1e-4")),
    (dict(block_lr="up"), dict(block_lr=" up = 1E-4, mid_block=.5")), (dict(text_encoder_lr=[1e-4] * 3), dict(text_encoder_lr=[1e-4] * 2)), (dict(output_dir="d/run"), dict(output_dir="d/.run")),
    (dict(use_dora=True, init_lora_weights="pissa"), dict(use_dora=True, init_lora_weights="orthogonal")), (dict(ema_decay=0.5), dict(ema_decay=0.5, use_ema=True)),
    (dict(adapter="loha", use_dora=True), dict(adapter="loha")), (dict(adapter="lokr", lora_alpha=2.0), dict(adapter="lokr", lora_alpha=4.0)),
    (dict(adapter="oft", train_text_encoder=True), dict(adapter="oft", lora_layers="attention+feedforward")),
    (dict(init_lora_weights="orthogonal", rank=3), dict(init_lora_weights="orthogonal", rank=4)),
    (dict(init_lora_weights="olora", lora_layers="attention+feedforward+convolution"), dict(init_lora_weights="olora", lora_layers="attention+feedforward")),
    (dict(use_aspect_ratio_buckets=True, resolution=16), dict(use_aspect_ratio_buckets=True, resolution=32)), (dict(init_lora="f", init_lora_weights="pissa"), dict(init_lora="f")),
    (dict(do_edm_style_training=True, snr_gamma=5.0), dict(do_edm_style_training=True)), (dict(do_edm_style_training=True, rescale_betas_zero_snr=True), dict(do_edm_style_training=True, prediction_type="v_prediction")),
    (dict(train_data_dir=None), dict(train_data_dir=None, dataset_name="n"))],
    subject=[(dict(train_data_dir="t"), dict()), (dict(instance_data_dir=None), dict(instance_data_dir=None, dataset_name="n")), (dict(dataset_name="n"), dict()), (dict(instance_prompt=" "), dict(instance_prompt="x")),
    (dict(with_prior_preservation=True, class_data_dir="c"), dict(with_prior_preservation=True, class_data_dir="c", class_prompt="a chair")), (dict(prior_teacher=True), dict(prior_teacher=True, class_prompt="a chair")),
    (dict(prior_teacher=True, with_prior_preservation=True, class_data_dir="c", class_prompt="a chair"), dict(with_prior_preservation=True, class_data_dir="c", class_prompt="a chair")),
    (dict(prior_teacher=True, class_prompt="a chair", init_lora_weights="olora"), dict(prior_teacher=True, class_prompt="a chair", init_lora_weights="orthogonal")),
    (dict(with_prior_preservation=True, class_data_dir="d/c", class_prompt="a chair"), dict(with_prior_preservation=True, class_data_dir="c", class_prompt="a chair")),
    (dict(concepts="c.yaml"), dict(concepts="c.yaml", instance_data_dir=None, instance_prompt="")),
    (dict(concepts="c.yaml", instance_data_dir=None, instance_prompt="", validation_data_dir="v"), dict(concepts="c.yaml", instance_data_dir=None, instance_prompt="")),
    (dict(concepts="c.yaml", instance_data_dir=None, instance_prompt="", prior_teacher=True, class_prompt="a chair"), dict(concepts="c.yaml", instance_data_dir=None, instance_prompt="")),
    (dict(token_abstraction="SKS"), dict(token_abstraction="SKS", train_text_encoder_ti=True)), (dict(train_text_encoder_ti=True, train_text_encoder=True), dict(train_text_encoder_ti=True)),
    (dict(train_text_encoder_ti=True, cache_text_embeds=True), dict(train_text_encoder_ti=True, cache_text_embeds=False)),
    (dict(train_text_encoder_ti=True, ti_lr=1e-3, optimizer="prodigy"), dict(train_text_encoder_ti=True, ti_lr=1e-3))],
    full=[(dict(train_data_dir=None), dict(train_data_dir=None, dataset_name="n"))],
    steer=[(dict(train_data_dir=None), dict(train_data_dir=None, dataset_name="n")), (dict(validation_prompt=["a"]), dict(validation_prompt=["a"], validation_image=["i.png"])),
    (dict(validation_prompt=["a", "b"], validation_image=["i.png"]*3), dict(validation_prompt=["a", "b"], validation_image=["i.png"])), (dict(controlnet_size="full", controlnet_model_name_or_path="c"), dict(controlnet_size="full"))],
    adapter=[(dict(train_data_dir=None), dict(train_data_dir=None, dataset_name="n")), (dict(validation_image=["i.png"]), dict(validation_prompt=["a"], validation_image=["i.png"])),
    (dict(validation_prompt=["a", "b"], validation_image=["i.png"]*3), dict(validation_prompt=["a"], validation_image=["i.png"]*3))],
    edit=[(dict(train_data_dir=None), dict(train_data_dir=None, dataset_name="n")), (dict(caption_column="words"), dict(edit_prompt_column="words")),
    (dict(validation_prompt="a"), dict(validation_prompt="a", val_image_url_or_path="i.png")), (dict(conditioning_dropout_prob=0.4), dict(conditioning_dropout_prob=0.3))],
    word=[(dict(train_data_dir=None), dict()), (dict(dataset_name="n"), dict()), (dict(placeholder_token="my chair"), dict(placeholder_token="my-chair")), (dict(cache_text_embeds=True), dict(cache_text_embeds=False))],
    words=[(dict(modifier_token="<a>+<a>", initializer_token="b+c"), dict(modifier_token="<a>+<b>")), (dict(initializer_token="a", modifier_token="<a>+<b>"), dict(initializer_token="a")),
    (dict(real_prior=True), dict(real_prior=True, with_prior_preservation=True, class_data_dir="c", class_prompt="a chair")), (dict(cache_text_embeds=True), dict(cache_text_embeds=False)),
    (dict(with_prior_preservation=True), dict(with_prior_preservation=True, class_data_dir="c", class_prompt="a chair")),
    (dict(with_prior_preservation=True, class_data_dir="d/c", class_prompt="a chair"), dict(with_prior_preservation=True, class_data_dir="c", class_prompt="a chair")),
    (dict(train_data_dir="d"), dict()), (dict(instance_data_dir=None), dict(instance_data_dir=None, dataset_name="n")), (dict(dataset_name="n"), dict()), (dict(instance_prompt=" "), dict()),
    (dict(concepts="f"), dict(concepts="f", instance_data_dir=None, instance_prompt="")), (dict(concepts="f", instance_data_dir=None, instance_prompt="", validation_data_dir="v"), dict(validation_data_dir="v")),
    (dict(cached_crops=2), dict(cached_crops=2, noaug=True)), (dict(masked_loss=True, unmasked_weight=0.5), dict(masked_loss=True, unmasked_weight=0.5, noaug=True))],
    lcm=[(dict(train_data_dir=None), dict()), (dict(w_min=16.0), dict(w_min=15.0)), (dict(unet_time_cond_proj_dim=7), dict(unet_time_cond_proj_dim=8)), (dict(train_text_encoder=True), dict()), (dict(masked_loss=True), dict())],
    pixels=[(dict(train_data_dir=None), dict(train_data_dir=None, dataset_name="n")), (dict(ddpm_num_inference_steps=1001), dict()), (dict(validation_prompt="x"), dict()), (dict(masked_loss=True), dict())],
    dpo=[(dict(train_data_dir=None), dict()), (dict(masked_loss=True), dict())],
    ddpo=[(dict(train_data_dir="d"), dict()), (dict(fill_batches=True), dict()), (dict(shuffle_tags=True), dict()), (dict(lora_dropout=0.5), dict())])


@pytest.mark.parametrize("command", STRUCK)
def test_every_rule_is_struck_once_and_its_neighbour_is_allowed(command):
    rules, hit = [sentence for _, sentence in rules_of(build(command), "constraints")], []
    for wrong, right in STRUCK[command]:
        with pytest.raises(CourseError) as caught: build(command, **wrong)
        hit += [sentence for sentence in rules if sentence == str(caught.value)]
        build(command, **right)
        assert any(f"--{name}" in str(caught.value) for name in wrong), caught.value
    assert len(hit) == len(STRUCK[command]) == len(set(hit))
    shared = {sentence for _, sentence in rules_of(build("text"), "constraints")} if command != "text" else set()
    assert set(rules) - shared <= set(hit)


def test_rules_of_common_options_hold_for_every_command():
    for command in ("subject", "full", "word", "steer", "adapter", "edit", "lcm", "words"):
        known = {f.name for f in fields(CONFIGS[command][0])}
        for wrong, _ in STRUCK["text"]:
            if not wrong.keys() <= known or wrong.keys() & {"train_data_dir", "cache_text_embeds"}: continue
            with pytest.raises(CourseError): build(command, **wrong)


@pytest.mark.parametrize("idle, busy", [(dict(text_encoder_lr=1e-5), dict(train_text_encoder=True)), (dict(adam_weight_decay_text_encoder=0.1), dict(train_text_encoder=True)),
    (dict(text_encoder_lr=1e-5, optimizer="Prodigy", train_text_encoder=True), dict(optimizer="adamw")), (dict(prodigy_beta3=0.5), dict(optimizer="prodigy"))], ids=str)
def test_idle_options_of_the_reference_scripts_are_told_and_harm_nothing(idle, busy):
    (sentence,) = unused_options(build("text", **idle))
    assert f"--{next(iter(idle))}" in sentence and "nothing" in sentence and unused_options(build("text", **{**idle, **busy})) == []


def test_every_sentence_about_an_idle_option_is_told_by_some_case():
    cases = [dict(use_dora=True, output_kohya_format=True), dict(text_encoder_lr=1e-5), dict(text_encoder_lr=1e-5, optimizer="Prodigy", train_text_encoder=True), dict(prodigy_beta3=0.5)]
    told = {sentence for case in cases for sentence in unused_options(build("text", **case))} | {*unused_options(build("lcm", cast_teacher_unet=True))}
    for command in CONFIGS: assert {sentence for _, sentence in rules_of(build(command), "unused")} <= told


def test_a_dora_for_other_programs_is_told_who_draws_it():
    (sentence,) = unused_options(build("text", use_dora=True, output_kohya_format=True))
    assert "A1111 and InvokeAI" in sentence and unused_options(build("text", use_dora=True)) == []


def test_idle_options_are_said_by_the_run(ran): assert "--prodigy_beta3 does nothing" in ran(prodigy_beta3=0.5).said


@pytest.mark.parametrize("text", [False, True], ids=["kept", "trained"])
@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "an encoded empty text"])
def test_clip_skip_is_that_of_diffusers(train, toy, toy_model, tmp_path, monkeypatch, text, zeros):
    from sdxl_course.model.conditioning import encode_prompts
    parts, seen = toy(), []
    parts.force_zeros_for_empty_prompt = zeros
    words = [f"picture {i}" for i in range(2)]
    with torch.no_grad():
        theirs = parts.pipeline().encode_prompt(words, clip_skip=1)
        for want, got in zip((theirs[0], theirs[2]), encode_prompts(parts, words, clip_skip=1)): assert torch.equal(want, got)
        assert not torch.equal(theirs[0], encode_prompts(parts, words)[0])
    inside(monkeypatch, lambda unet, batch, *_: seen.extend(batch.prompt_embeds.detach().clone()))
    config = TextToImageConfig(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(make_pictures(tmp_path / "p", 2)), resolution=64, train_batch_size=2, num_train_epochs=4, seed=0,
        proportion_empty_prompts=0.5, learning_rate=1e-9, train_text_encoder=text, report_to="none", output_dir=str(tmp_path / "o"), clip_skip=1)
    train_text_to_image(config, parts, log=lambda text: None)
    possible = [*theirs[0], theirs[1][0] if zeros is False else torch.zeros(77, 16)]  # what is drawn from nothing is the pipeline's
    near = [[bool((told - one).abs().max() < 1e-5) for one in possible] for told in seen]
    assert len(near) == 8 and all(sum(row) == 1 for row in near) and {row.index(True) for row in near} == {0, 1, 2}
    with pytest.raises(CourseError, match="clip_skip is 2: wanted 1 or less"): train(clip_skip=2)


def test_prodigys_own_step_size_is_in_the_log(ran):
    from sdxl_course.train.loop import TrainState, found_rate
    from sdxl_course.train.optimizer import make_optimizer
    run = ran(optimizer="prodigy", learning_rate=0.5, max_train_steps=8)
    rows = [json.loads(line) for line in (run.folder / "training_log.jsonl").read_text().splitlines()]
    assert rows[0]["effective_lr"] == pytest.approx(0.5e-6) and rows[0]["lr"] == 0.5 and "effective_lr" not in ran().log[0]  # Prodigy's d begins at 1e-6
    before = load_file(ran(optimizer="prodigy", learning_rate=0.5, max_train_steps=1, adam_weight_decay=0.0).folder / "pytorch_lora_weights.safetensors")
    assert max(float(t.abs().max()) for n, t in before.items() if ".lora_B." in n) == pytest.approx(0.5e-6, rel=0.05)  # Adam's first step is as long as its rate
    place, path = torch.nn.Parameter(torch.zeros(1)), []
    optimizer = make_optimizer([place], 0.5, weight_decay=0.0, name="prodigy")
    for _ in range(20):
        path.append((found_rate(TrainState({}, optimizer, None, 0))["effective_lr"], optimizer.param_groups[0]["d"]))
        optimizer.zero_grad(), ((place - 1)**2).sum().backward(), optimizer.step()
    assert all(told == 0.5 * d for told, d in path) and path[0][0] == 5e-7 and path[-1][0] > 1e-3  # it grows towards the distance to go



def test_groups_of_rates_stand_in_the_order_of_the_names():
    from sdxl_course.model.adapters import parameter_groups
    names = [f"{where}.lora_A.default.weight" for where in ("unet.down_blocks.1.x", "unet.up_blocks.0.x", "unet.up_blocks.0.y", "unet.up_blocks.01.x", "text_encoder.x", "text_encoder_2.x")]
    named = {name: torch.nn.Parameter(torch.zeros(1)) for name in names}
    def groups(*rates, **options): return [(group["lr"], [names[i] for i, p in enumerate(named.values()) if any(p is q for q in group["params"])]) for group in parameter_groups(named, *rates, **options)]
    assert groups(1.0) == [(1.0, names)] and groups(1.0, 2.0) == groups(1.0, [2.0]) == [(1.0, names[:4]), (2.0, names[4:])]
    assert groups(1.0, [2.0, 3.0], block_rates={"up_blocks": 0.0, "up_blocks.0.y": 5.0}) == [(1.0, names[:1]), (0.0, [names[1], names[3]]), (5.0, [names[2]]), (2.0, [names[4]]), (3.0, [names[5]])]


def test_a_block_without_a_lora_is_named(train):
    with pytest.raises(CourseError, match="--block_lr names 'down_blocks.0'.*no LoRA.*down_blocks.1"): train(block_lr="down_blocks.0=1e-4")


@pytest.mark.parametrize("words, want", [(["1e-3"], 1e-3), (["1e-3", "2e-4"], [1e-3, 2e-4]), ([], None)])
def test_one_rate_of_the_text_encoders_is_a_number_and_two_are_a_list(words, want, tmp_path):
    from sdxl_course.options import parse_config
    rest = ["--pretrained_model_name_or_path", "m"]
    assert parse_config(TextToImageConfig, [*rest, "--train_data_dir", "d", *(["--text_encoder_lr", *words] if words else [])]).text_encoder_lr == want
    (tmp_path / "c.json").write_text(json.dumps(dict(text_encoder_lr=want)))
    assert parse_config(TextToImageConfig, [*rest, "--train_data_dir", "d", "--config", str(tmp_path / "c.json")]).text_encoder_lr == want
    assert parse_config(DreamBoothConfig, [*rest, "--instance_data_dir", "d", "--instance_prompt", "x"]).text_encoder_lr == 5e-6


# ------------------------------------------------ flags of other trainers

# every flag of sd-scripts' sdxl_train_network.py, sdxl_train.py and train_textual_inversion.py, its data set configuration, and diffusers' advanced DreamBooth script
THEIRS = """adaptive_noise_scale alpha_mask async_upload base_weights base_weights_multiplier block_lr blocks_to_swap bucket_no_upscale bucket_reso_steps cache_info cache_latents
    cache_latents_to_disk cache_text_encoder_outputs cache_text_encoder_outputs_to_disk caption_dropout_every_n_epochs caption_dropout_rate caption_extension caption_extention
    caption_prefix caption_separator caption_suffix caption_tag_dropout_rate clip_skip color_aug conditioning_data_dir config_file cpu_offload_checkpointing dataset_class
    dataset_config dataset_repeats ddp_gradient_as_bucket_view ddp_static_graph ddp_timeout debiased_estimation_loss debug_dataset deepspeed diffusers_xformers dim_from_weights
    disable_mmap_load_safetensors dynamo_backend enable_bucket enable_wildcard face_crop_aug_range flip_aug fp16_master_weights_and_gradients fp8_base fp8_base_unet full_bf16 full_fp16
    fused_backward_pass fused_optimizer_groups gradient_accumulation_steps gradient_checkpointing highvram huber_c huber_scale huber_schedule huggingface_path_in_repo
    huggingface_repo_id huggingface_repo_type huggingface_repo_visibility huggingface_token in_json initial_epoch initial_step ip_noise_gamma ip_noise_gamma_random_strength keep_tokens
    keep_tokens_separator learning_rate learning_rate_te learning_rate_te1 learning_rate_te2 log_config log_prefix log_tracker_config log_tracker_name log_with logging_dir logit_mean
    logit_std loss_type lowram lr_decay_steps lr_scheduler lr_scheduler_args lr_scheduler_min_lr_ratio lr_scheduler_num_cycles lr_scheduler_power lr_scheduler_timescale
    lr_scheduler_type lr_warmup_steps masked_loss max_bucket_reso max_data_loader_n_workers max_grad_norm max_timestep max_token_length max_train_epochs max_train_steps
    max_validation_steps mem_eff_attn min_bucket_reso min_snr_gamma min_timestep mixed_precision mode_scale multires_noise_discount multires_noise_iterations network_alpha network_args
    network_dim network_dropout network_module network_train_text_encoder_only network_train_unet_only network_weights no_half_vae no_metadata no_token_padding noise_offset
    noise_offset_random_strength offload_optimizer_device offload_optimizer_nvme_path offload_param_device offload_param_nvme_path optimizer_args optimizer_type output_config
    output_dir output_name persistent_data_loader_workers pretrained_model_name_or_path prior_loss_weight random_crop reg_data_dir resize_interpolation resolution resume
    resume_from_huggingface sample_at_first sample_every_n_epochs sample_every_n_steps sample_prompts sample_sampler save_every_n_epochs save_every_n_steps save_last_n_epochs
    save_last_n_epochs_state save_last_n_steps save_last_n_steps_state save_model_as save_n_epoch_ratio save_precision save_state save_state_on_train_end save_state_to_huggingface
    scale_v_pred_loss_like_noise_pred scale_weight_norms sdpa secondary_separator seed shuffle_caption skip_cache_check skip_until_initial_step stop_text_encoder_training
    support_controlnet support_dreambooth support_dropout support_finetuning text_encoder_batch_size text_encoder_lr token_warmup_min token_warmup_step tokenizer_cache_dir
    torch_compile train_batch_size train_data_dir train_text_encoder training_comment unet_lr use_8bit_adam use_lion_optimizer use_safetensors v2 v_parameterization v_pred_like_loss
    vae vae_batch_size validate_every_n_epochs validate_every_n_steps validation_seed validation_split wandb_api_key wandb_run_name weighted_captions weighting_scheme xformers
    zero3_init_flag zero3_save_16bit_model zero_stage zero_terminal_snr num_repeats lora_unet_blocks use_blora train_text_encoder_frac token_string init_word num_vectors_per_token
    use_object_template use_style_template""".split()


def told(cls, *words):
    "The sentence that a command line ends with."
    from sdxl_course.options import parse_config
    with pytest.raises(CourseError) as caught: parse_config(cls, ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", *words])
    return str(caught.value)


def test_no_flag_of_another_trainer_meets_a_guess():
    ours = set().union(*({f.name for f in fields(cls)} for cls, _ in CONFIGS.values()))
    strange = [name for name in THEIRS if name not in ours]
    assert len(strange) > 150
    for name in strange:
        sentence = told(TextToImageConfig, f"--{name}", "1")
        assert f"got '--{name}', which is no option; " in sentence and "did you mean" not in sentence and "--help lists" not in sentence, sentence
        assert set(re.findall(r"--(\w+)", sentence.split(";", 1)[1])) <= ours | {"config", "print_config", "help"}, sentence


@pytest.mark.parametrize("theirs, ours", [("network_dim", "rank"), ("network_alpha", "lora_alpha"), ("unet_lr", "learning_rate"), ("flip_aug", "random_flip"), ("max_train_epochs", "num_train_epochs"),
    ("save_every_n_steps", "checkpointing_steps"), ("shuffle_caption", "shuffle_tags"), ("min_snr_gamma", "snr_gamma"), ("enable_bucket", "use_aspect_ratio_buckets"), ("optimizer_type", "optimizer"),
    ("network_weights", "init_lora"), ("caption_dropout_rate", "proportion_empty_prompts"), ("vae", "pretrained_vae_model_name_or_path"), ("resume", "resume_from_checkpoint"), ("log_with", "report_to")])
def test_a_flag_of_another_trainer_is_answered_with_ours(theirs, ours, tmp_path):
    assert re.search(rf"here it is --{ours}\b", told(TextToImageConfig, f"--{theirs}", "8"))
    (tmp_path / "kohya.yaml").write_text(f"{theirs}: 8\n")
    assert re.search(rf"sets '{theirs}', which is no option; here it is --{ours}\b", told(TextToImageConfig, "--config", str(tmp_path / "kohya.yaml")))
    with pytest.raises(CourseError, match=rf"got '{theirs}', which is no option; here it is --{ours}\b"): build("text", **{theirs: 8})


def test_a_whole_command_of_another_trainer_is_answered_at_once(tmp_path):
    sentence = told(TextToImageConfig, "--network_dim=32", "--network_train_unet_only", "--unet_lr", "1e-4")
    assert "got 3 flags" in sentence and "--network_dim: here it is --rank;" in sentence and "--network_train_unet_only: that is what happens" in sentence and sentence.endswith("--unet_lr: here it is --learning_rate")
    assert "did you mean rank" in told(TextToImageConfig, "--network_dim", "32", "--rnak", "3")  # a slip of our own comes first
    assert "here it is --resolution" not in told(TextToImageConfig, "--resolution", "1024,1024") and "one number: --resolution 1024" in told(TextToImageConfig, "--resolution", "1024,1024")
    assert "--use_aspect_ratio_buckets" in told(TextToImageConfig, "--resolution", "832,1216")
    assert "has no such option" in told(FullConfig, "--network_dim", "8") and "--repeats_from_folders" in told(DreamBoothConfig, "--instance_prompt", "x", "--num_repeats", "8")
    (tmp_path / "kohya.toml").write_text("network_dim = 8\n")
    assert "is TOML" in told(TextToImageConfig, "--config", str(tmp_path / "kohya.toml"))


def test_every_option_has_a_place_in_this_file():
    assert {f.name for f in fields(TextToImageConfig)} - SHOWN == set()
    assert SHOWN - {f.name for f in fields(TextToImageConfig)} == set()
