"The main job from end to end, on a toy model: what it computes, what it leaves, how it refuses."
import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from sdxl_course.core import CourseError
from sdxl_course.text_to_image import Feeder, main, trained_parts
from sdxl_course.trainer import Micro
from sdxl_course.data import read_dataset
from toy import files_of, make_pictures as fill


def load_stock(model, lora=None):
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    if lora: pipeline.load_lora_weights(lora)
    return pipeline


def draw(pipeline): return pipeline("a house", generator=torch.Generator().manual_seed(3), num_inference_steps=2, height=64, width=64, output_type="np").images


# ---------------------------------------------------------------- what it leaves

def test_a_run_leaves_what_other_tools_read(train, toy_model):
    result = train(max_train_steps=4, validation_prompt="a house", num_validation_images=2, lora_alpha=8)
    files = files_of(result.output_dir)
    for name in ("pytorch_lora_weights.safetensors", "config.yaml", "training_log.jsonl", "README.md", "loss.png", "image_0.png", "image_1.png", "validation/step-000003-0.png"):
        assert name in files, name
    rows = [json.loads(line) for line in files["training_log.jsonl"].splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and [row["epoch"] for row in rows] == [0, 0, 0, 1]
    assert set(rows[0]) == {"step", "epoch", "loss", "lr", "grad_norm"} and result.losses == [row["loss"] for row in rows]
    assert b"license: openrail++" in files["README.md"] and b"image_0.png" in files["README.md"]


@pytest.mark.parametrize("text", [False, True], ids=["unet", "text encoders too"])
def test_stock_diffusers_draws_our_picture_from_our_file(train, toy, toy_model, text):
    live = toy()
    from sdxl_course.text_to_image import TextToImageConfig, train_text_to_image
    result = train(max_train_steps=3, train_text_encoder=text, lora_alpha=2)
    config = TextToImageConfig(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(result.output_dir.parent / "pictures"), output_dir=str(result.output_dir.parent / "again"),
        resolution=64, train_batch_size=2, max_train_steps=3, learning_rate=1e-2, seed=0, report_to="none", train_text_encoder=text, lora_alpha=2)
    train_text_to_image(config, live, say=lambda text: None)  # the same run, in components we keep
    ours = live.pipeline()
    ours.set_progress_bar_config(disable=True)
    for part in trained_parts(live, True).values(): part.eval()
    assert abs(draw(ours) - draw(load_stock(toy_model, str(result.output_dir)))).max() < 1e-5
    assert abs(draw(ours) - draw(load_stock(toy_model))).max() > 1e-4
    keys = load_file(result.lora_path)
    assert all("lora" in key for key in keys)
    assert {key.split(".")[0] for key in keys} == ({"unet", "text_encoder", "text_encoder_2"} if text else {"unet"})


def test_checkpoints_open_in_stock_diffusers_too(train, toy_model):
    result = train(max_train_steps=2, checkpointing_steps=2)
    draw(load_stock(toy_model, str(result.output_dir / "checkpoint-2")))


def test_no_file_and_no_word_ever_holds_the_token(tmp_path, toy_model, make_pictures, capfd, monkeypatch):
    token = "hf_" + "Zq7" * 12
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["--pretrained_model_name_or_path", str(toy_model), "--train_data_dir", str(make_pictures(2)), "--resolution", "64", "--output_dir", str(tmp_path / "o"),
        "--train_batch_size", "2", "--max_train_steps", "2", "--checkpointing_steps", "1", "--report_to", "tensorboard", "--hub_token", token]) == 0
    shown = "".join(capfd.readouterr())
    assert token not in shown and not any(token.encode() in data for data in files_of(tmp_path / "o").values())


# ---------------------------------------------------------------- what it computes

def test_seed_0_counts_and_repeats(train):
    first, second, other = train("a").lora_path.read_bytes(), train("b").lora_path.read_bytes(), train("c", seed=1).lora_path.read_bytes()
    assert first == second != other


def test_validation_and_workers_change_nothing_in_training(train):
    plain = train("a").lora_path.read_bytes()
    assert plain == train("b", validation_prompt="a house", validation_prompts=["x", "y"], num_validation_images=1).lora_path.read_bytes()
    assert plain == train("c", dataloader_num_workers=2, checkpointing_steps=1, debug_loss=True).lora_path.read_bytes()


def test_gradient_checkpointing_reaches_every_network_and_changes_no_number(train, toy, monkeypatch):
    seen = []
    plain = train("a", train_text_encoder=True)
    monkeypatch.setattr("sdxl_course.text_to_image.recompute_activations", (lambda real: lambda model: (real(model), seen.append(model)))(__import__("sdxl_course.text_to_image", fromlist=["x"]).recompute_activations))
    saved = train("b", train_text_encoder=True, gradient_checkpointing=True)
    assert len(seen) == 3 and all(any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) for model in seen)
    assert [row["loss"] for row in plain.log] == pytest.approx([row["loss"] for row in saved.log], rel=1e-5)


def test_text_encoder_lora_learns(train):
    before = load_file(train("a", max_train_steps=1, train_text_encoder=True, learning_rate=1e-12).lora_path)
    after = load_file(train("b", max_train_steps=3, train_text_encoder=True).lora_path)
    for part in ("unet.", "text_encoder.", "text_encoder_2."):
        assert any((before[key] - after[key]).abs().max() > 1e-3 for key in after if key.startswith(part)), part


@pytest.mark.parametrize("options", [dict(), dict(center_crop=True, size=(72, 100)), dict(use_aspect_ratio_buckets=True, size=(72, 100)), dict(masked_loss=True)], ids=str)
def test_cached_and_uncached_runs_have_the_same_losses(train, make_pictures, options):
    data = str(make_pictures(5, "other", size=options.pop("size", (64, 64))))
    options |= dict(random_flip=True, train_data_dir=data)
    assert train("afresh", cache_latents=False, cache_text_embeds=False, **options).losses == pytest.approx(train("kept", **options).losses, rel=1e-6)


def test_size_numbers_are_of_what_was_really_cut(toy, tmp_path):
    records = read_dataset(train_data_dir=str(fill(tmp_path / "wide", 4, size=(80, 160))))
    feeder = Feeder(records, toy(), seed=0, resolution=64, random_flip=True)
    assert not feeder.keeping_pictures()[0]  # random crops are not cached
    feeder.encode_once(pictures=False, texts=True)
    micro = Micro(0, 0, 0, (0, 1, 2, 3), 4, True)
    prepared = feeder.prepare(micro)
    ids = feeder.batch(micro, prepared, 1000)[0].time_ids
    assert ids[:, :2].tolist() == [[80, 160]] * 4 and ids[:, 4:].tolist() == [[64, 64]] * 4
    assert ids[:, 3].tolist() == [p.crop_top_left[1] for p in prepared] and len(set(ids[:, 3].tolist())) > 1 and ids[:, 2].abs().sum() == 0
    later = feeder.prepare(Micro(9, 0, 1, (0, 1, 2, 3), 4, True))
    assert [p.crop_top_left for p in later] != [p.crop_top_left for p in prepared]  # drawn anew in the next epoch


def test_learning_rate_reaches_zero_under_accumulation(train):
    log = train(max_train_steps=4, gradient_accumulation_steps=4, train_batch_size=1, lr_scheduler="linear", lr_warmup_steps=0, learning_rate=1e-2).log
    assert [row["lr"] for row in log] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_accumulated_small_batches_equal_large_ones(train):
    large = train("a", train_batch_size=4)
    small = train("b", train_batch_size=1, gradient_accumulation_steps=4)
    assert [row["grad_norm"] for row in small.log] == pytest.approx([row["grad_norm"] for row in large.log], rel=1e-4)
    assert small.losses == pytest.approx(large.losses, rel=1e-4)


def test_lora_and_adam_are_fp32_under_bf16_and_fp16_falls_back_on_a_cpu(train, monkeypatch):
    half = train("a", mixed_precision="bf16", max_train_steps=2, checkpointing_steps=2)
    for name in ("pytorch_lora_weights.safetensors", "checkpoint-2/optimizer.safetensors"):
        assert all(tensor.dtype == torch.float32 for tensor in load_file(half.output_dir / name).values())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = []
    assert train("b", mixed_precision="fp16", say=said.append).losses == train("c").losses
    assert any("fp16 needs a GPU" in text for text in said)


def test_debug_loss_is_of_single_pictures(train):
    rows = train(debug_loss=True, max_train_steps=3).log
    assert {name for row in rows for name in row["loss_of"]} == {f"{i}.png" for i in range(5)}
    for row in rows: assert sum(row["loss_of"].values()) / len(row["loss_of"]) == pytest.approx(row["loss"], rel=1e-5)


def test_a_broken_number_stops_the_run_with_names_and_keeps_the_checkpoint(train, monkeypatch):
    import sdxl_course.text_to_image as module
    real, calls = module.denoising_loss, []

    def breaks(*args, **kwargs):
        loss = real(*args, **kwargs)
        calls.append(loss.requires_grad)
        return loss * torch.tensor([float("nan"), 1.0])[:len(loss)] if sum(calls) == 2 and loss.requires_grad else loss
    monkeypatch.setattr(module, "denoising_loss", breaks)
    with pytest.raises(CourseError, match=r"update 2 .*\.png.*last checkpoint is good"): train(checkpointing_steps=1)


def test_long_captions_are_reported(train, make_pictures):
    said = []
    train(train_data_dir=str(make_pictures(2, "long", captions=["short", "word " * 60])), max_train_steps=1, say=said.append)
    assert any("longer than 77 tokens" in text for text in said)


# ---------------------------------------------------------------- how it refuses

@pytest.mark.parametrize("words, message", [
    (["--train_data_dir", "no/such/folder"], "no/such/folder"), (["--pretrained_model_name_or_path", "no/such/model/at/all"], "no/such/model"),
    (["--resolution", "100"], "multiple of 8"), (["--resolution", "1024"], "knows"), (["--push_to_hub"], "nothing was trained"), (["--use_8bit_adam"], "NVIDIA GPU"),
    (["--resume_from_checkpoint", "checkpoint-99"], "no checkpoint"), (["--lora_layers", "to_qq"], "to_q"), (["--local_rank", "1"], "accelerate launch"),
    (["--enable_npu_flash_attention"], "NPU"), (["--enable_xformers_memory_efficient_attention"], "xformers"), (["--caption_column", "txet"], "text")])
def test_bad_input_is_one_clear_sentence(words, message, tmp_path, toy_model, make_pictures, capsys):
    argv = ["--pretrained_model_name_or_path", str(toy_model), "--train_data_dir", str(make_pictures(2)), "--resolution", "64", "--output_dir", str(tmp_path / "o"),
        "--report_to", "none", "--max_train_steps", "1"]
    assert main(argv + words) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and told.strip().count("\n") == 0


def test_empty_captionless_and_unwritable_folders(tmp_path, toy_model, make_pictures, capsys):
    argv = ["--pretrained_model_name_or_path", str(toy_model), "--resolution", "64", "--report_to", "none", "--max_train_steps", "1"]
    (tmp_path / "empty").mkdir()
    bare = fill(tmp_path / "bare", 2)
    (bare / "metadata.jsonl").unlink()
    (tmp_path / "file").write_text("in the way")
    for data, out, message in ((tmp_path / "empty", "o", "no pictures"), (bare, "o", "no captions"), (make_pictures(2), "file/o", "output_dir")):
        assert main(argv + ["--train_data_dir", str(data), "--output_dir", str(tmp_path / out)]) == 2
        told = capsys.readouterr().err
        assert message in told and "Traceback" not in told


def test_components_that_carry_a_lora_are_refused(toy, train, toy_model, make_pictures, tmp_path):
    from sdxl_course.text_to_image import TextToImageConfig, train_text_to_image
    used = toy()
    config = TextToImageConfig(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(make_pictures(2, "two")), output_dir=str(tmp_path / "o"), resolution=64, train_batch_size=2,
        max_train_steps=1, seed=0, report_to="none")
    train_text_to_image(config, used, say=lambda text: None)
    with pytest.raises(CourseError, match="freshly loaded"): train_text_to_image(config, used, say=lambda text: None)


# ---------------------------------------------------------------- from a terminal

@pytest.mark.parametrize("launcher", [["-m"], ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m"]],
    ids=["python", "accelerate launch"])
def test_the_module_runs_from_a_terminal(launcher, tmp_path, toy_model, make_pictures):
    argv = ["--pretrained_model_name_or_path", str(toy_model), "--train_data_dir", str(make_pictures(2)), "--resolution=64", "--train_batch_size=1", "--gradient_accumulation_steps=1",
        "--max_train_steps=2", "--learning_rate=5.0e-04", "--scale_lr", "--lr_scheduler=constant", "--lr_warmup_steps=0", f"--output_dir={tmp_path / 'o'}", "--report_to=none"]
    root = os.path.dirname(os.path.dirname(__file__))
    done = subprocess.run([sys.executable, *launcher, "sdxl_course.text_to_image", *argv], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "o" / "pytorch_lora_weights.safetensors").is_file() and "Traceback" not in done.stderr
