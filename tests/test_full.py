"The command that trains every weight of the UNet, on a toy model: what it takes, what it changes, what it leaves."
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from sdxl_course.cli import main as command
from sdxl_course.core import CourseError
from sdxl_course.full import FullConfig, main, train_full
from test_trainer import REFERENCE
from toy import files_of

LORA = ("rank", "train_text_encoder", "debug_loss", "enable_npu_flash_attention")  # what the reference's LoRA script has and its full script has not
UPSTREAM = {name: flag for name, flag in REFERENCE.items() if name not in LORA} | dict(  # the flags of train_text_to_image_sdxl.py: (type, default)
    output_dir=(str, "sdxl-model-finetuned"), proportion_empty_prompts=(float, 0), timestep_bias_strategy=(str, "none"), timestep_bias_multiplier=(float, 1.0),
    timestep_bias_begin=(int, 0), timestep_bias_end=(int, 1000), timestep_bias_portion=(float, 0.25), use_ema=(bool, False))


@pytest.fixture
def full(tmp_path, toy, toy_model, make_pictures, monkeypatch):
    "A function that trains the toy model's UNet on five toy pictures in tmp_path/NAME."
    monkeypatch.setattr("sdxl_course.train.run.save_curve", lambda path, *points: Path(path).write_bytes(b""))
    usual = dict(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(make_pictures(5)), resolution=64, train_batch_size=2, max_train_steps=3,
        learning_rate=1e-3, seed=0, report_to="none", checkpointing_steps=1000)
    return lambda name="run", log=lambda text: None, components=None, **options: train_full(
        FullConfig(**{**usual, "output_dir": str(tmp_path / name), **options}), components or toy(), log)


def networks(folder):
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, {name: getattr(pipeline, name).state_dict() for name in ("unet", "vae", "text_encoder", "text_encoder_2")}


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lasting(folder):
    "What must be equal to the last byte: the published weights, the log, the last checkpoint."
    files = files_of(folder)
    kept = {name: data for name, data in files.items() if name == "training_log.jsonl" or name.endswith(".safetensors") and not name.startswith("checkpoint") or name.startswith("checkpoint-4/opt")
        or name.startswith("checkpoint-4/") and name.endswith(".safetensors")}
    assert {"unet/diffusion_pytorch_model.safetensors", "checkpoint-4/unet.safetensors", "checkpoint-4/optimizer.safetensors"} <= kept.keys()
    return kept


def draw(pipeline): return pipeline("a house", generator=torch.Generator().manual_seed(3), num_inference_steps=2, height=64, width=64, output_type="np").images


def test_every_upstream_flag_has_its_name_type_and_default():
    have, kinds = {f.name: f for f in fields(FullConfig)}, get_type_hints(FullConfig)
    for name, (kind, default) in UPSTREAM.items():
        assert have[name].default == default, name
        assert kind is kinds[name] or kind in get_args(kinds[name]), name
    assert not {"rank", "lora_alpha", "train_text_encoder", "init_lora", "output_kohya_format"} & have.keys()  # nothing here is a LoRA


def test_the_command_line_takes_them_all(capsys):
    argv = [word for name, (kind, default) in UPSTREAM.items() if default not in (None, MISSING) for word in ([f"--{name}"] if kind is bool else [f"--{name}", str(default)])]
    given = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--report_to", "none", *argv, "--print_config"]
    assert main(given) == 0
    shown = json.loads(capsys.readouterr().out)
    assert all(shown[name] == (True if kind is bool else default) for name, (kind, default) in UPSTREAM.items() if default not in (None, MISSING))
    assert command(["full", *given]) == 0 and json.loads(capsys.readouterr().out) == shown
    assert command(["--help"]) == 0 and "  full " in capsys.readouterr().out


def test_stock_diffusers_draws_our_picture_and_only_the_unet_has_changed(full, toy, toy_model):
    live = toy()
    folder = full(components=live).output_dir
    pipeline, after = networks(folder)
    base, before = networks(toy_model)
    assert equal(after["unet"], live.unet.state_dict()) and all(p.dtype == torch.float32 for p in after["unet"].values())
    assert sum(not torch.equal(after["unet"][name], before["unet"][name]) for name in before["unet"]) > 0.9 * len(before["unet"])  # every layer learns
    for name in ("vae", "text_encoder", "text_encoder_2"): assert equal(after[name], before[name]) and equal(after[name], getattr(live, name).state_dict()), name
    ours = live.pipeline()
    ours.set_progress_bar_config(disable=True)
    live.unet.eval()
    assert abs(draw(pipeline) - draw(ours)).max() == 0 and abs(draw(pipeline) - draw(base)).max() > 1e-4


def test_a_run_leaves_a_whole_pipeline_and_what_explains_it(full):
    result = full(validation_prompt="a house", num_validation_images=1)
    files = files_of(result.output_dir)
    assert {"model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json", "text_encoder_2/config.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json",
        "README.md", "config.yaml", "training_log.jsonl", "image_0.png", "loss.png"} <= files.keys()
    assert "All weights of the UNet" in files["README.md"].decode() and "from_pretrained" in files["README.md"].decode()
    assert len(result.losses) == 3 and result.validation_loss_after != result.validation_loss_before and "KB" in result._repr_markdown_()


@pytest.mark.parametrize("options", [dict(), dict(use_ema=True, gradient_accumulation_steps=2, gradient_checkpointing=True), dict(optimizer="adafactor", random_flip=True, snr_gamma=5.0)], ids=str)
def test_resume_is_exact(full, options):
    options = dict(options, max_train_steps=4, checkpointing_steps=1, lr_scheduler="cosine", lr_warmup_steps=1)
    folder = full("straight", **options).output_dir
    straight = lasting(folder)
    for k in (1, 2, 3): assert lasting(full(f"from-{k}", **options, resume_from_checkpoint=str(folder / f"checkpoint-{k}")).output_dir) == straight, k


def test_a_run_that_stops_early_goes_on_as_if_nothing_had_happened(full):
    "Interrupted and resumed, to the byte; without a schedule that knows the end."
    straight = files_of(full("straight", max_train_steps=4, checkpointing_steps=2).output_dir)
    full("steps", max_train_steps=2, checkpointing_steps=2)
    said = []
    again = files_of(full("steps", max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint="latest", log=said.append).output_dir)
    assert any("resuming" in text and "2 of 4" in text for text in said)
    for name in straight:
        if name.endswith((".safetensors", ".jsonl")): assert again[name] == straight[name], name


def test_ema_weights_are_what_is_published(full, toy):
    live = toy()
    folder = full(components=live, use_ema=True, checkpointing_steps=3).output_dir
    published, average = networks(folder)[1]["unet"], load_file(folder / "checkpoint-3" / "ema.safetensors")
    assert equal(published, {name.removeprefix("unet."): value for name, value in average.items()}) and not equal(published, live.unet.state_dict())


def test_save_precision_is_of_the_files_and_the_weights_train_in_fp32(full, toy):
    live = toy()
    folder = full(components=live, save_precision="bf16", mixed_precision="bf16", checkpointing_steps=3).output_dir
    assert {value.dtype for value in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").values()} == {torch.bfloat16}
    assert {p.dtype for p in live.unet.parameters()} == {torch.float32}
    for name in ("unet", "optimizer"): assert {value.dtype for value in load_file(folder / "checkpoint-3" / f"{name}.safetensors").values()} == {torch.float32}


def test_the_learning_rate_is_scaled_where_that_is_asked_for(full):
    assert [row["lr"] for row in full(scale_lr=True, gradient_accumulation_steps=3).log] == pytest.approx([6e-3] * 3)


@pytest.mark.parametrize("words, message", [([], "no data was given"), (["--train_data_dir", "no/such/folder"], "no/such/folder"), (["--train_data_dir", "{pictures}", "--rank", "4"], "rank"),
    (["--train_data_dir", "{pictures}", "--resolution", "100"], "multiple of 8"), (["--train_data_dir", "{pictures}", "--resume_from_checkpoint", "checkpoint-9"], "no checkpoint")])
def test_bad_input_is_one_clear_sentence(words, message, tmp_path, toy_model, make_pictures, capsys):
    pictures = make_pictures(2)
    argv = ["--pretrained_model_name_or_path", str(toy_model), "--resolution", "64", "--output_dir", str(tmp_path / "o"), "--report_to", "none", "--max_train_steps", "1"]
    assert main(argv + [word.format(pictures=pictures) for word in words]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and told.strip().count("\n") == 0


def test_another_configuration_is_not_resumed(full):
    full(max_train_steps=2, checkpointing_steps=2)
    with pytest.raises(CourseError, match="learning_rate"): full(max_train_steps=4, learning_rate=1e-4, resume_from_checkpoint="latest")


def test_the_result_can_be_trained_again(full, tmp_path):
    "The folder is a base model like any other."
    from sdxl_course.model.components import load_components
    first = full("first").output_dir
    then = full("then", components=load_components(str(first)), pretrained_model_name_or_path=str(first))
    assert then.validation_loss_before == pytest.approx(full("again").validation_loss_after, rel=1e-5)
