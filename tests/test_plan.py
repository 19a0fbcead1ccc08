"The planner: what it counts on shapes is what real tensors take, commands are read as they are, proposals keep the update."
import shlex
from dataclasses import replace

import pytest
import torch
import yaml
from sdxl_course.core import CourseError
from sdxl_course.memory import Meter, encoding_usage, fake_batch, meta_components, shapes_only, step_usage, weights_of
from sdxl_course.model.components import NETWORKS, load_components
from sdxl_course.plan import CARDS, CONTEXT, GIB, Card, forecast, main, propose, read_command
from sdxl_course.text_to_image import TextToImageConfig
from sdxl_course.train.prepare import load_base


DATA = {"dreambooth": "--instance_data_dir x --instance_prompt y", "dpo": "--train_data_dir x --rejected_data_dir y", "textual-inversion": "--train_data_dir x --placeholder_token <x> --initializer_token c",
        "custom-diffusion": "--instance_data_dir x --instance_prompt 'a <new1> c' --modifier_token <new1> --initializer_token c --noaug"}  # what a method cannot do without


def asked(model, flags="", method="text-to-image"):
    data = DATA.get(method, "--train_data_dir pictures")
    return read_command(shlex.split(f"{method} --pretrained_model_name_or_path {model} {data} --resolution 64 --center_crop --train_batch_size 4 {flags}"))


@pytest.mark.parametrize("flags, method", [("", "text-to-image"), ("--gradient_checkpointing", "text-to-image"), ("--rank 16 --lora_layers attention+feedforward+convolution", "text-to-image"),
    ("--train_text_encoder", "text-to-image"), ("--use_dora", "text-to-image"), ("", "full"), ("", "textual-inversion"), ("", "custom-diffusion"), ("", "controlnet"),
    ("--controlnet_size small --gradient_checkpointing", "controlnet"), ("", "t2i-adapter"), ("", "instruct-pix2pix"), ("", "dpo"), ("", "lcm"), ("--whole_unet", "lcm")], ids=str)
def test_shapes_take_what_real_tensors_take(toy_model, flags, method):
    "The same meter listens to both; on a real device attention is PyTorch's own."
    method, config = asked(toy_model, flags, method)

    def step(parts, device):
        trained = method.weights(config, parts, 0)
        loss = method.loss(config, parts, method.schedule(config, parts.scheduler), trained.trains_text).train().to(device)
        return trained, loss
    parts = load_base(config, "meta", torch.float32, meta_components(str(toy_model)), method.full_precision(config))
    with torch.device("meta"): trained, loss = step(parts, "meta")
    said = step_usage(loss, parts, 4, 64, captions=trained.trains_text, companions=method.companions)
    parts = load_base(config, "cpu", torch.float32, load_components(str(toy_model)), method.full_precision(config))
    trained, loss = step(parts, "cpu")
    with Meter() as meter:
        batch, noise, times = fake_batch(parts, 4, 64, companions=method.companions)
        loss(batch, noise, times, ["a picture"] * 4 if trained.trains_text else None).sum().backward()
    del batch, noise, times
    assert 0 <= said.kept - sum(p.grad.nbytes for p in trained.named.values() if p.grad is not None) <= 8  # a number for the log
    assert said.peak == pytest.approx(meter.peak, rel=0.1)


def test_autocast_on_shapes_casts_what_autocast_casts(toy_model):
    "torch.autocast on a CPU, for the functions that both lists have."
    real, shapes, seen = load_components(str(toy_model)), meta_components(str(toy_model)), {}
    for name, parts, device in (("real", real, "cpu"), ("shapes", shapes, "meta")):
        kinds = seen[name] = {}
        for key, module in parts.unet.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)): module.register_forward_hook(lambda m, a, out, key=key, kinds=kinds: kinds.update({key: out.dtype}))
        with torch.device(device): batch, noise, times = fake_batch(parts, 1, 64)
        condition = dict(text_embeds=batch.pooled_prompt_embeds, time_ids=batch.time_ids)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if name == "real" else shapes_only(Meter(), torch.bfloat16):
            parts.unet(noise, times, batch.prompt_embeds, added_cond_kwargs=condition)
    assert seen["real"] == seen["shapes"] and set(seen["real"].values()) == {torch.bfloat16}


def test_a_model_that_is_not_at_hand_is_as_large_as_sdxl(toy_model):
    whole = meta_components("somebody/a-fine-tune-of-sdxl")
    assert weights_of(whole.unet) == 4 * 2567463684 and all(p.is_meta for part in NETWORKS for p in getattr(whole, part).parameters())
    assert encoding_usage(meta_components(str(toy_model)), 64).peak > 0


def test_moments_hold_what_lies_there(toy_model):
    lora, text = forecast(*asked(toy_model)), forecast(*asked(toy_model, "--train_text_encoder"))
    assert "text encoders" not in lora.moments["a step"] and text.moments["a step"]["text encoders"] and set(lora.moments) == {"encoding", "a step", "an update"}
    assert "UNet" not in lora.moments["encoding"] and "UNet" in forecast(*asked(toy_model), shared=True).moments["encoding"]  # on a card it comes after the encoding
    afresh = forecast(*asked(toy_model, "--cache_latents False"))
    assert afresh.moments["a step"]["VAE"] and "UNet" in afresh.moments["encoding"]
    drawn = forecast(*asked(toy_model, "--validation_prompt x --use_ema")).moments["a drawing"]
    assert drawn["EMA"] == drawn["what trains"] and drawn["VAE"]
    words = forecast(*asked(toy_model, method="textual-inversion"))
    assert 0 < words.trained < lora.trained
    taught = forecast(*asked(toy_model, "--whole_unet", "lcm")).moments["a step"]
    assert taught["teacher"] == taught["what trains"] > 0 == taught["UNet"] == lora.moments["a step"]["teacher"]
    method, config = asked(toy_model, method="custom-diffusion")
    assert ["VAE" in forecast(method, replace(config, noaug=fixed)).moments["a step"] for fixed in (True, False)] == [False, True]  # sizes that are drawn cannot be kept
    state = {name: forecast(*asked(toy_model, f"--optimizer {name}")).moments["a step"]["optimizer"] for name in ("adamw", "prodigy", "adafactor")}
    assert state == dict(adamw=8 * lora.trained, prodigy=16 * lora.trained, adafactor=0)


def test_a_drawing_guided_by_a_picture_too_takes_three_copies(toy_model):
    drawing = lambda method, flags="": forecast(*asked(toy_model, f"--validation_prompt x --num_validation_images 64 {flags}", method)).moments["a drawing"]["activations"]
    assert drawing("instruct-pix2pix", "--val_image_url_or_path y")/drawing("full") == pytest.approx(1.5, rel=0.1)


@pytest.mark.parametrize("command, name", [("text-to-image", "text-to-image"), ("sdxl-course dreambooth --instance_prompt a", "dreambooth"), ("python -m sdxl_course.full", "full"),
    ("accelerate launch --mixed_precision fp16 -m sdxl_course.text_to_image", "text-to-image"), ("accelerate launch --mixed_precision='fp16' examples/text_to_image/train_text_to_image_lora_sdxl.py", "text-to-image"),
    ("python3 train_dreambooth_lora_sdxl.py --instance_prompt a", "dreambooth")])
def test_commands_are_read_as_they_are(command, name):
    data = "--instance_data_dir x" if name == "dreambooth" else "--train_data_dir x"
    method, config = read_command(shlex.split(f"{command} --pretrained_model_name_or_path m {data} --max_train_steps 8"))
    assert method.name == name and config.pretrained_model_name_or_path == "m" and config.max_train_steps == 8
    assert config.mixed_precision == ("fp16" if "fp16" in command else None)


def test_what_is_no_training_is_refused_with_a_sentence(capsys):
    for words, told in (([], "no training command"), (["generate"], "no training command"), (["text-to-image", "--pretrained_model_name_or_path", "m", "--train_data_dir", "x", "--rnak", "4"], "did you mean rank"), (["text-to-image", "--train_data_dir", "x"], "pretrained_model_name_or_path")):
        with pytest.raises(CourseError, match=told): read_command(words)
    assert main(["--card", "9", "--", "text-to-image", "--pretrained_model_name_or_path", "tiny", "--train_data_dir", "x"]) == 2 and "wanted one of 8, 12, t4" in capsys.readouterr().err


def test_a_preset_is_one_line_and_a_file_for_the_trainer(toy_model, tmp_path, capsys):
    file, command = tmp_path / "t4.yaml", f"text-to-image --pretrained_model_name_or_path {toy_model} --train_data_dir pictures --resolution 64 --train_batch_size 6".split()
    assert main(["--preset", "t4", "--output", str(file), "--", *command]) == 0
    line = capsys.readouterr().out.strip()
    method, config = read_command([*command, *shlex.split(line)])
    assert config.mixed_precision == "fp16" and config.train_batch_size * config.gradient_accumulation_steps == 6  # a T4 has no bf16
    again = read_command(["text-to-image", "--config", str(file), *command[1:-2]])[1]
    assert again == config and yaml.safe_load(file.read_text())["mixed_precision"] == "fp16"


def test_the_fastest_way_that_fits_is_proposed(toy_model):
    "Ever smaller cards: first everything at once, then parts, then checkpointing, then a sentence; the update stays the same."
    method, config = asked(toy_model, "--train_batch_size 8 --gradient_accumulation_steps 2")
    found = forecast(method, config)
    whole = sum(found.moments["a step"].values()) / GIB
    cards = [Card(f"{share}", CONTEXT + 2 * whole * share, 1) for share in (4, 1, 0.5, 0.25, 0.14, 0.001)]
    ways = propose(method, config, cards)
    batches = [one.flags.get("train_batch_size", 0) for one in ways]
    assert batches == sorted(batches, reverse=True) and batches[0] == 16 and batches[-1] == 0
    assert all(one.flags["train_batch_size"] * one.flags["gradient_accumulation_steps"] >= 16 and one.peak <= card.memory for one, card in zip(ways, cards) if one.peak)
    assert "one picture at a time needs" in ways[-1].reasons[0] and "--rank" in ways[-1].reasons[0]
    assert CARDS["80"].room > CARDS["8"].room and isinstance(config, TextToImageConfig)


@pytest.mark.parametrize("crop", ["--center_crop", "", "--center_crop --gradient_checkpointing"], ids=["kept", "cut afresh", "checkpointing asked for"])
@pytest.mark.parametrize("method", ["text-to-image", "dreambooth"])
def test_a_proposal_agrees_with_the_forecast_of_its_own_flags(toy_model, method, crop):
    "Added to the command as they are printed, on cards from large to small; pictures that are cut afresh are encoded in every step."
    data = "--train_data_dir pictures" if method == "text-to-image" else "--instance_data_dir x --instance_prompt y --with_prior_preservation --class_data_dir c --class_prompt d"
    command = shlex.split(f"{method} --pretrained_model_name_or_path {toy_model} {data} --resolution 64 --train_batch_size 16 {crop}")
    ends = [forecast(*read_command([*command, *shlex.split(f"--mixed_precision bf16 --train_batch_size {b} --gradient_checkpointing {spare}")])).peak for b, spare in ((1, True), (16, False))]
    room = lambda share: (ends[0] + share * (ends[1] - ends[0])) / 0.97 / GIB + CONTEXT
    ways = propose(*read_command(command), [Card(f"{share}", room(share) + 1e-9, 1, bf16=share != 0.5) for share in (1, 0.5, 0.01)])
    assert len({one.flags["train_batch_size"] for one in ways}) > 1 and all(one.peak for one in ways)
    for one in ways:
        method, config = read_command([*command, *shlex.split(one.line())])
        found = forecast(method, config)
        assert one.peak == found.peak / GIB + CONTEXT and one.moment == found.moment and found.fits(one.card)
        assert one.seconds == found.seconds(one.card) * one.flags["gradient_accumulation_steps"]


def test_full_fine_tuning_is_offered_an_optimizer_that_keeps_less_and_no_rank():
    "Ever smaller cards: Adam as asked for, Adam in 8 bits, Adafactor, nothing; each as its own forecast says."
    method, config = read_command(shlex.split(f"full --pretrained_model_name_or_path tiny --train_data_dir x --resolution 128 --center_crop --train_batch_size 1"))
    flags = dict(mixed_precision="bf16", gradient_checkpointing=True)
    peaks = [forecast(method, replace(config, **flags, **optimizer)).peak for optimizer in ({}, dict(use_8bit_adam=True), dict(optimizer="adafactor"))]
    assert peaks == sorted(peaks, reverse=True)
    cards = [Card("one", CONTEXT + peak / 0.97 / GIB + 1e-6, 1) for peak in peaks] + [Card("none", CONTEXT + 1e-6, 1)]
    *fit, none = propose(method, config, cards)
    assert [{name: value for name, value in one.flags.items() if name in ("use_8bit_adam", "optimizer")} for one in fit] == [{}, dict(use_8bit_adam=True), dict(optimizer="adafactor")]
    assert "8 bits" in " ".join(fit[1].reasons) and "Adafactor" in " ".join(fit[2].reasons)
    assert not none.flags and "rank" not in none.reasons[0] and "LoRA" in none.reasons[0]
    lora, = propose(*read_command(shlex.split(f"text-to-image --pretrained_model_name_or_path tiny --train_data_dir x --resolution 128 --center_crop")), [cards[-1]])
    assert "--rank" in lora.reasons[0] and not lora.flags


def test_what_needs_the_memory_is_what_the_hopeless_are_told(toy_model):
    for crop, told in (("", True), ("--center_crop", False), ("--cache_latents False", False)):
        one, = propose(*read_command(shlex.split(f"text-to-image --pretrained_model_name_or_path {toy_model} --train_data_dir x --resolution 64 {crop}")), [Card("none", CONTEXT + 1e-6)])
        assert not one.peak and ("--center_crop" in one.reasons[0]) == told
