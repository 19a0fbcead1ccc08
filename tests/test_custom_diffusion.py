"The command that learns things by words and the keys and values of cross-attention, on a toy model."
import json
from dataclasses import MISSING, fields
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from sdxl_course.cli import main as command
from sdxl_course.core import CourseError, save_tensors
from sdxl_course.custom_diffusion import CustomDiffusionConfig, class_records, main, open_custom_diffusion, train_custom_diffusion
from sdxl_course.model.components import NETWORKS
from sdxl_course.model.conditioning import encode_prompts
from sdxl_course.model.key_values import KEY_VALUE_FILE, key_values, load_concepts, merged_weight, readouts, word_embeddings
from sdxl_course.train import prepare
from sdxl_course.train.objective import masked_mse
from test_trainer import REFERENCE
from toy import files_of

LACKS = ("pretrained_vae_model_name_or_path", "variant", "train_data_dir", "dataset_name", "dataset_config_name", "image_column", "caption_column", "max_train_samples", "cache_dir",
    "image_interpolation_mode", "random_flip", "snr_gamma", "prediction_type", "noise_offset", "rank", "train_text_encoder", "debug_loss", "validation_epochs", "enable_npu_flash_attention",
    "center_crop", "lr_num_cycles", "lr_power", "tracker_project_name", "mixed_precision")
UPSTREAM = {name: flag for name, flag in REFERENCE.items() if name not in LACKS} | dict(  # the flags of train_custom_diffusion.py: (type, default)
    modifier_token=(str, MISSING), initializer_token=(str, "ktn+pll+ucd"), freeze_model=(str, "crossattn_kv"), real_prior=(bool, False), with_prior_preservation=(bool, False),
    class_data_dir=(str, None), class_prompt=(str, None), prior_loss_weight=(float, 1.0), instance_data_dir=(str, None), instance_prompt=(str, MISSING), resolution=(int, 512),
    output_dir=(str, "custom-diffusion-model"), train_batch_size=(int, 4), num_train_epochs=(int, 1), learning_rate=(float, 1e-5), sample_batch_size=(int, 4), noaug=(bool, False))


@pytest.fixture
def options(tmp_path, toy_model, make_pictures, monkeypatch):
    "What every run here has in common; the pictures of the thing have no captions."
    monkeypatch.setattr("sdxl_course.train.run.save_curve", lambda path, *points: path)
    thing = make_pictures(3, "thing")
    (thing / "metadata.jsonl").unlink()
    usual = dict(pretrained_model_name_or_path=str(toy_model), instance_data_dir=str(thing), instance_prompt="a <new1> c", initializer_token="c", resolution=64, train_batch_size=2,
        max_train_steps=3, learning_rate=0.01, seed=0, report_to="none", checkpointing_steps=1000)
    return lambda name="run", **more: CustomDiffusionConfig(**{**usual, "output_dir": str(tmp_path / name), **more})


@pytest.fixture
def learn(options, toy): return lambda name="run", log=lambda text: None, components=None, **more: train_custom_diffusion(options(name, **more), components or toy(), log)


def test_every_upstream_flag_has_its_name_type_and_default():
    have, kinds = {f.name: f for f in fields(CustomDiffusionConfig)}, get_type_hints(CustomDiffusionConfig)
    for name, (kind, default) in UPSTREAM.items():
        if default is not MISSING: assert have[name].default == default, name
        assert kind is kinds[name] or kind in get_args(kinds[name]), name
    assert not {"rank", "prior_teacher", "train_text_encoder_ti"} & have.keys()


def test_the_command_line_takes_them_all(capsys):
    argv = [word for name, (kind, default) in UPSTREAM.items() if default not in (None, MISSING) and kind is not bool for word in (f"--{name}", str(default))]
    given = ["--pretrained_model_name_or_path", "m", "--instance_data_dir", "d", "--instance_prompt", "a <new1> c", "--modifier_token", "<new1>", *argv, "--noaug", "--hflip", "--print_config"]
    assert command(["custom-diffusion", *given]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["freeze_model"] == "crossattn_kv" and found["noaug"] and found["random_flip"]


def lasting(folder):
    "What must be equal to the last byte."
    kept = {name: data for name, data in files_of(folder).items() if name == "training_log.jsonl" or name.endswith("_custom_diffusion_weights.safetensors")
        or name.startswith("checkpoint-4/") and name.endswith(".safetensors")}
    assert {KEY_VALUE_FILE, "checkpoint-4/key_values.safetensors", "checkpoint-4/words.safetensors", "checkpoint-4/optimizer.safetensors"} <= kept.keys()
    return kept


@pytest.mark.parametrize("more", [dict(), dict(freeze_model="crossattn", gradient_checkpointing=True, use_ema=True), dict(with_prior_preservation=True, real_prior=True, class_prompt="a house"),
    dict(noaug=True)], ids=["plain", "all of attention", "real class pictures", "whole pictures"])
def test_resume_is_exact(learn, make_pictures, more):
    if "real_prior" in more: more = dict(more, class_data_dir=str(make_pictures(4, "class")), num_class_images=3)
    more = dict(more, max_train_steps=4, checkpointing_steps=2, lr_scheduler="cosine")
    folder = learn("straight", **more).output_dir
    assert lasting(learn("resumed", **more, resume_from_checkpoint=str(folder / "checkpoint-2")).output_dir) == lasting(folder)


@pytest.mark.parametrize("precision, dtype", [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_real_class_pictures_are_chosen_by_the_model_that_trains(options, make_pictures, monkeypatch, precision, dtype):
    "It was loaded a second time for them."
    loaded, load = [], prepare.load_components
    monkeypatch.setattr(prepare, "load_components", lambda *given, **named: loaded.append(load(*given, **named)) or loaded[-1])
    more = dict(with_prior_preservation=True, real_prior=True, class_prompt="a house", class_data_dir=str(make_pictures(4, "class")), num_class_images=3)
    config = options(**more, mixed_precision=precision)
    records, components = class_records(config, None, lambda text: None)
    assert len(records) == 3 and loaded == [components]
    wanted = load(config.pretrained_model_name_or_path, dtype)  # as it is loaded without them
    for part in NETWORKS:
        found, meant = (getattr(one, part).state_dict() for one in (components, wanted))
        assert found.keys() == meant.keys() and all(found[name].dtype == meant[name].dtype and torch.equal(found[name], meant[name]) for name in meant), part
    loaded.clear()
    train_custom_diffusion(config, None, lambda text: None)
    assert len(loaded) == 1


def stock(model, folder, words):
    "diffusers' pipeline with the files loaded as the card says."
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(model))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.load_attn_procs(str(folder), weight_name=KEY_VALUE_FILE, _pipeline=pipeline)
    rows = load_file(folder / f"{folder.name}_emb.safetensors")
    for key, part in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = getattr(pipeline, f"text_encoder{part}"), getattr(pipeline, f"tokenizer{part}")
        pipeline.load_textual_inversion(rows[key], token=words, tokenizer=tokenizer, text_encoder=encoder)
        for module in encoder.modules():
            if getattr(module, "eos_token_id", None) == 2: module.eos_token_id = tokenizer.eos_token_id
    return pipeline


@pytest.mark.parametrize("freeze", ["crossattn_kv", "crossattn"])
def test_stock_diffusers_draws_our_picture(learn, toy, toy_model, freeze):
    live = toy()
    folder = learn(components=live, freeze_model=freeze).output_dir
    ours = live.pipeline()
    ours.set_progress_bar_config(disable=True)
    for part in (live.unet, live.text_encoder, live.text_encoder_2): part.eval()
    with torch.no_grad(): embeds, pooled = encode_prompts(live, ["a <new1> c"])
    theirs = stock(toy_model, folder, ["<new1>"])
    found, _, found_pooled, _ = theirs.encode_prompt("a <new1> c", do_classifier_free_guidance=False)
    assert (embeds - found).abs().max() < 1e-5 and (pooled - found_pooled).abs().max() < 1e-5
    base = toy().pipeline()
    base.set_progress_bar_config(disable=True)
    told = dict(prompt_embeds=embeds, pooled_prompt_embeds=pooled, num_inference_steps=2, height=64, width=64, output_type="np", guidance_scale=1.0)
    a, b, c = (pipeline(**told, generator=torch.Generator().manual_seed(3)).images for pipeline in (ours, theirs, base))
    assert abs(a - b).max() < 1e-4 < abs(b - c).max()


def test_only_keys_values_and_words_change(learn, toy):
    live, base = toy(), toy()
    folder = learn(components=live).output_dir
    now, before = live.unet.state_dict(), base.unet.state_dict()
    assert all(torch.equal(now[name], before[name]) for name in before) and now.keys() - before.keys() == key_values(live.unet).keys()
    added = load_file(folder / KEY_VALUE_FILE)
    for name, value in added.items():
        if not value.numel(): continue
        layer, kind = name.split(".processor.to_")[0], name.split(".processor.to_")[1][0]
        assert not torch.equal(value, before[f"{layer}.to_{kind}.weight"]), name
    again = load_concepts(toy(), folder)
    assert all(torch.equal(p, key_values(live.unet)[name]) for name, p in key_values(again.unet).items())


def test_two_things_in_one_run(options, toy, make_pictures, tmp_path):
    other = make_pictures(2, "other")
    (other / "metadata.jsonl").unlink()
    file = tmp_path / "things.json"
    file.write_text(json.dumps([dict(instance_data_dir=options().instance_data_dir, instance_prompt="a <new1> c"), dict(instance_data_dir=str(other), instance_prompt="a <new2> d")]))
    more = dict(concepts=str(file), instance_data_dir=None, instance_prompt="", modifier_token="<new1>+<new2>", initializer_token="c+d")
    folder = train_custom_diffusion(options(**more), toy(), lambda text: None).output_dir
    assert load_file(folder / "run_emb.safetensors")["clip_l"].shape[0] == 2
    with pytest.raises(CourseError, match="no prompt says the new word <new3>"):
        train_custom_diffusion(options("no", **{**more, "modifier_token": "<new1>+<new3>"}), toy(), lambda text: None)


def test_what_is_pushed_is_all_that_others_need(options, toy, hub, make_pictures, tmp_path, toy_model):
    "Two words in one run; the code of the card draws with what was uploaded and nothing else."
    other = make_pictures(2, "other")
    (other / "metadata.jsonl").unlink()
    (tmp_path / "things.json").write_text(json.dumps([dict(instance_data_dir=options().instance_data_dir, instance_prompt="a <new1> c"), dict(instance_data_dir=str(other), instance_prompt="a <new2> d")]))
    more = dict(concepts=str(tmp_path / "things.json"), instance_data_dir=None, instance_prompt="", modifier_token="<new1>+<new2>", initializer_token="c+d", checkpointing_steps=1)
    live = toy()
    result = train_custom_diffusion(options(**more, push_to_hub=True, hub_model_id="two", validation_prompt="a <new1> <new2>", num_validation_images=1), live, lambda text: None)
    assert [words[:2] for words in hub.told] == [("create", "two"), ("upload", "me/two")] and result.url == "https://hub/me/two"
    words = ["run_emb.safetensors", "run_0__new1__emb.safetensors", "run_1__new2__emb.safetensors"]
    assert set(hub.sent) == {"README.md", "config.yaml", "image_0.png", KEY_VALUE_FILE, "training_log.jsonl", *words}
    assert not any(str(tmp_path).encode() in data for data in hub.sent.values())
    away = tmp_path / "fetched"
    away.mkdir()
    for name, data in hub.sent.items(): (away / name).write_bytes(data)
    card = hub.sent["README.md"].decode()
    *code, draw = card.split("```python\n")[1].split("```")[0].replace("this folder", str(away)).replace(f"the folder of {toy_model.name}", str(toy_model)).strip().splitlines()
    names = {}
    exec("\n".join(code), names)
    assert draw.startswith("picture = pipeline(") and "Trigger words: `a <new1> c, a <new2> d`" in card
    for part in (live.unet, live.text_encoder, live.text_encoder_2): part.eval()
    with torch.no_grad(): wanted = encode_prompts(live, ["a <new1> <new2>"])
    found = names["pipeline"].encode_prompt("a <new1> <new2>", do_classifier_free_guidance=False)
    assert (wanted[0] - found[0]).abs().max() < 1e-5 and (wanted[1] - found[2]).abs().max() < 1e-5
    told = dict(prompt_embeds=wanted[0], pooled_prompt_embeds=wanted[1], num_inference_steps=2, height=64, width=64, output_type="np", guidance_scale=1.0)
    ours, theirs = (pipeline(**told, generator=torch.Generator().manual_seed(3)).images for pipeline in (live.pipeline(), names["pipeline"]))
    assert abs(ours - theirs).max() < 1e-4
    before = hub.sent
    assert command(["push", str(result.output_dir), "--hub_model_id", "two"]) == 0 and hub.sent == before  # by hand: the same


@pytest.mark.parametrize("words, sentence", [(["--modifier_token", "<a>+<a>"], "all different"), (["--freeze_model", "all"], "invalid choice"), (["--initializer_token", "c+"], "is 0 tokens"),
    (["--modifier_token", "c"], "word that the tokenizer knows"), (["--real_prior"], "add that"), (["--cache_text_embeds"], "leave it out")])
def test_mistakes_get_one_sentence(options, capsys, words, sentence):
    config = options()
    given = ["--pretrained_model_name_or_path", config.pretrained_model_name_or_path, "--instance_data_dir", config.instance_data_dir, "--instance_prompt", "a <new1> c", "--initializer_token", "c",
        "--resolution", "64", "--max_train_steps", "1", "--report_to", "none", "--output_dir", config.output_dir]
    if words[:2] == ["--modifier_token", "c"]: given[5] = "a c"
    if "c+" in words: words, given[5] = ["--modifier_token", "<new1>+<new2>", *words], "a <new1> <new2>"
    assert main([*given, *words]) == 2
    told = capsys.readouterr().err
    assert sentence in told and "Traceback" not in told


# ------------------------------------------------ pictures in several sizes

def shown(run, number=12):
    "What the first batches of a run hold: (side, caption, mask, latents, pixels) of each picture of the thing; class pictures come as a second list."
    own, beside = [], []
    for _, micro in zip(range(number), (micro for epoch in range(number) for micro in run.sampler.micro_steps(epoch, epoch + 1))):
        prepared = run.loader.prepare(micro)
        batch, _, _, captions = run.loader.batch(micro, prepared)
        masks = batch.extra.get("mask", torch.ones(len(captions), 1, *batch.latents.shape[2:]))
        sides = [run.loader.place(epoch, i)[0] if hasattr(run.loader, "place") else 64 for (i, _), epoch in zip(run.loader.samples(micro), run.loader.epochs(micro))]
        rows = list(zip(sides, captions, masks, batch.latents, [one and one.pixels for one in prepared]))
        half = len(micro.indices)
        own, beside = own + rows[:half], beside + rows[half:]
    return own, beside


def test_pictures_of_the_thing_are_shown_in_several_sizes_and_class_pictures_are_not(options, toy, make_pictures):
    more = dict(with_prior_preservation=True, real_prior=True, class_prompt="a house", class_data_dir=str(make_pictures(4, "class")), num_class_images=3)
    run = open_custom_diffusion(options(**more), toy(), lambda text: None)
    own, beside = shown(run)
    run.close()
    assert {side for side, *_ in beside} == {64} and not any("very small" in text or "zoomed" in text for _, text, *_ in beside) and all((mask == 1).all() for *_, mask, _, _ in beside)
    for side, text, mask, _, pixels in own:
        words = [word for word in ("far away", "very small", "zoomed in", "close up") if text == f"a {word} <new1> c"]
        assert bool(words) == (side < 0.6*64 or side > 64) and (words or text == "a <new1> c") and (not words or (words[0] in ("far away", "very small")) == (side < 64))
        assert float(mask.mean()) == pytest.approx(1, rel=1e-5) and (mask == 0).any() == (side < 64) and len(mask.unique()) <= 2
        seen = (pixels != 0).all(0)  # no byte is 0 here: that is the margin
        assert int(seen.sum()) == min(side, 64)**2 and (side < 38 or (torch.nn.functional.avg_pool2d(seen[None].float(), 8) == 1)[mask > 0].all())
    assert len({side for side, *_ in own}) > 10 and min(side for side, *_ in own) < 38 < 64 < max(side for side, *_ in own)
    run = open_custom_diffusion(options("whole", noaug=True), toy(), lambda text: None)
    assert {(text, bool((mask == 1).all())) for _, text, mask, *_ in shown(run)[0]} == {("a <new1> c", True)}
    run.close()


def test_no_loss_is_taken_outside_the_picture(options, toy):
    run = open_custom_diffusion(options(), toy(), lambda text: None)
    own = [row for row in shown(run)[0] if row[0] < 64]
    run.close()
    for _, _, mask, latents, _ in own:
        error, gap = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)), 1e3*(mask == 0)
        inside = error.square()[:, mask[0] > 0].mean()
        assert float(masked_mse((latents + error + gap)[None], latents[None], mask[None])) == pytest.approx(float(inside), rel=1e-4)


@pytest.mark.parametrize("more, sentence", [(dict(cached_crops=2), "sizes are drawn"), (dict(use_aspect_ratio_buckets=True), "add --noaug"), (dict(masked_loss=True, unmasked_weight=0.5), "margin")])
def test_what_cannot_go_with_several_sizes_is_refused(options, more, sentence):
    with pytest.raises(CourseError, match=sentence): options(**more)
    assert options(**more, noaug=True)


# ------------------------------------------------ two things, trained apart and merged

@pytest.fixture
def apart(learn, make_pictures):
    "Two finished runs of the same base model."
    other = make_pictures(2, "other")
    (other / "metadata.jsonl").unlink()
    return [learn("one").output_dir, learn("two", instance_data_dir=str(other), instance_prompt="a <new2> d", modifier_token="<new2>", initializer_token="d").output_dir]


def merge(folders, *more): return command(["custom-merge", *map(str, folders), *more, "--num_captions", "9"])


def test_a_merge_answers_each_word_as_its_own_run_and_leaves_the_runs_as_they_are(apart, toy, tmp_path, toy_model, capsys):
    before, both = [files_of(folder) for folder in apart], tmp_path / "both"
    assert merge(apart, "--output_dir", str(both)) == 0
    assert "with <new1>, <new2>" in capsys.readouterr().out and [files_of(folder) for folder in apart] == before
    live, base = load_concepts(toy(), both), toy()
    for folder, prompt, word in zip(apart, ("a <new1> c", "a <new2> d"), ("<new1>", "<new2>")):
        alone = load_concepts(toy(), folder)
        for one in (alone, live):
            for part in (one.text_encoder, one.text_encoder_2): part.eval()
        assert torch.allclose(encode_prompts(live, [prompt])[0], encode_prompts(alone, [prompt])[0], atol=1e-6)  # the word is the same
        told = word_embeddings(live, [prompt], word)
        for name, p in key_values(live.unet).items():
            layer, kind = name.split(".processor.to_")[0], name.split(".processor.to_")[1][0]
            own, plain = told @ key_values(alone.unet)[name].T, told @ base.unet.get_submodule(layer).get_submodule(f"to_{kind}").weight.T
            assert (told @ p.T - own).abs().max() < 1e-4 * own.abs().max() < 0.1 * (plain - own).abs().max(), name
    ours, theirs = live.pipeline(), stock(toy_model, both, ["<new1>", "<new2>"])
    ours.set_progress_bar_config(disable=True)
    with torch.no_grad(): embeds, pooled = encode_prompts(live, ["a <new1> <new2>"])
    found, _, found_pooled, _ = theirs.encode_prompt("a <new1> <new2>", do_classifier_free_guidance=False)
    assert (embeds - found).abs().max() < 1e-5 and (pooled - found_pooled).abs().max() < 1e-5
    told = dict(prompt_embeds=embeds, pooled_prompt_embeds=pooled, num_inference_steps=2, height=64, width=64, output_type="np", guidance_scale=1.0)
    a, b = (pipeline(**told, generator=torch.Generator().manual_seed(3)).images for pipeline in (ours, theirs))
    assert abs(a - b).max() < 1e-4
    names = {}
    code = (both / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("this folder", str(both)).replace(f"the folder of {toy_model.name}", str(toy_model))
    exec("\n".join(code.strip().splitlines()[:-1]), names)
    assert (names["pipeline"].encode_prompt("a <new1> <new2>", do_classifier_free_guidance=False)[0] - embeds).abs().max() < 1e-5
    assert merge([both, apart[0]], "--output_dir", str(tmp_path / "no")) == 2 and "several files have a word <new1>" in capsys.readouterr().err


def test_generate_and_push_take_a_run_and_a_merge(apart, tmp_path, toy_model, capsys):
    "The command draws what stock diffusers draws, again from its own picture too; what is shared is the weights and the words."
    both, drawn = tmp_path / "both", tmp_path / "drawn"
    assert merge(apart, "--output_dir", str(both)) == 0
    for folder, words in ((apart[0], ["<new1>"]), (both, ["<new1>", "<new2>"])):
        prompt = "a " + " ".join(words)
        draw = ["generate", "--model", str(toy_model), "--custom_diffusion", str(folder), "--prompt", prompt, "--num_inference_steps", "2", "--guidance_scale", "1", "--seed", "3"]
        assert command([*draw, "--output_dir", str(drawn)]) == 0
        wanted = stock(toy_model, folder, words)(prompt, num_inference_steps=2, guidance_scale=1.0, height=64, width=64, output_type="np", generator=torch.Generator().manual_seed(3)).images[0]
        found = np.asarray(Image.open(drawn / "image_000.png"))/255
        assert abs(found - wanted).max() < 1.5/255
        plain = ["generate", "--model", str(toy_model), "--prompt", "a c", "--num_inference_steps", "2", "--guidance_scale", "1", "--seed", "3", "--output_dir", str(tmp_path / "plain")]
        assert command(plain) == 0 and abs(np.asarray(Image.open(tmp_path / "plain/image_000.png"))/255 - wanted).max() > 2/255
        with Image.open(drawn / "image_000.png") as picture: record = json.loads(picture.text["sdxl_course"])
        assert (folder.name, True) in [(one["name"], one["local"]) for one in record["files"] if one["option"] == "custom_diffusion"] and "custom_diffusion" not in record["settings"]
        again = tmp_path / f"again-{len(words)}"
        assert command(["generate", "--from", str(drawn / "image_000.png"), "--output_dir", str(again)]) == 0
        assert (np.asarray(Image.open(again / "image_000.png")) == np.asarray(Image.open(drawn / "image_000.png"))).all()
        capsys.readouterr()
        assert command(["push", str(folder), "--dry_run"]) == 0
        listed = capsys.readouterr().out
        assert {KEY_VALUE_FILE, f"{folder.name}_emb.safetensors", "README.md", "config.yaml"} <= set(listed.split()) and "checkpoint" not in listed
    assert command([*draw, "--output_dir", str(drawn), "--lora", "x"]) == 2 and "leave one of them out" in capsys.readouterr().err
    assert command(["generate", "--model", str(toy_model), "--custom_diffusion", str(tmp_path), "--prompt", "a"]) == 2 and "Traceback" not in capsys.readouterr().err
    (both / "config.yaml").write_text("rank: 4\n")
    assert command(["push", str(both), "--dry_run"]) == 2 and "holds no finished run" in capsys.readouterr().err


def test_a_merged_matrix_keeps_its_two_promises():
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]), dtype=torch.float64)
    W, W1, C, R = draw(4, 9), draw(5, 9)[:4], draw(3, 9), draw(60, 9)
    merged = merged_weight(W, C, C @ W1.T, readouts(C, R))
    assert torch.allclose(C @ merged.T, C @ W1.T, atol=1e-9)
    change, gram = merged - W, R.T @ R
    assert (change @ gram @ torch.linalg.svd(C)[2][3:].T).abs().max() < 1e-3  # stationary: the gradient has no part along what no target sees
    R[:, :3], C[:, 3:] = 0, 0
    merged = merged_weight(W, C, C @ W1.T, readouts(C, R))
    assert torch.allclose(R @ merged.T, R @ W.T, atol=1e-9) and torch.allclose(C @ merged.T, C @ W1.T, atol=1e-9)


def edit_config(folder, old, new): (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace(old, new))


def narrower(folder):
    values = load_file(folder / KEY_VALUE_FILE)
    save_tensors(folder / KEY_VALUE_FILE, {name: t[:, :-1].contiguous() if t.numel() else t for name, t in values.items()})


def short_words(folder):
    (file,) = folder.glob("*_emb.safetensors")
    save_tensors(file, {name: t[:, :-1].contiguous() for name, t in load_file(file).items()}, dict(placeholders='["<new2>"]'))


SPOILT = {  # what is done to the second run, what is said
    "another base": (lambda folder: edit_config(folder, "pretrained_model_name_or_path: ", "pretrained_model_name_or_path: /other"), "a merge needs one base model"),
    "other shapes": (narrower, "does not fit this model"),
    "other encoders": (short_words, "does not fit this model: its words have 7 numbers"),
    "the same word": (lambda folder: [file.write_bytes((folder.parent / "one" / "one_emb.safetensors").read_bytes()) for file in folder.glob("*_emb.safetensors")], "several files have a word <new1>"),
    "no words": (lambda folder: [file.unlink() for file in folder.glob("*_emb.safetensors")], "holds no new words"),
    "no weights": (lambda folder: (folder / KEY_VALUE_FILE).unlink(), "holds no pytorch_custom_diffusion_weights.safetensors"),
    "half a file": (lambda folder: (folder / KEY_VALUE_FILE).write_bytes((folder / KEY_VALUE_FILE).read_bytes()[:999]), "is not a whole safetensors file"),
    "no prompt": (lambda folder: edit_config(folder, "a <new2> d", "a d"), "says none of <new1>, <new2>")}


@pytest.mark.parametrize("fault", SPOILT)
def test_what_cannot_be_merged_gets_one_sentence(apart, tmp_path, capsys, fault):
    SPOILT[fault][0](apart[1])
    assert merge(apart, "--output_dir", str(tmp_path / "both")) == 2
    told = capsys.readouterr().err
    assert SPOILT[fault][1] in told and "Traceback" not in told and told.count("\n") == 1 and not (tmp_path / "both").exists()


def test_a_merge_needs_two_runs_a_free_place_and_keys_and_values_alone(apart, learn, tmp_path, capsys):
    before = files_of(apart[0])
    for words, sentence in (([apart[0], "--output_dir", tmp_path / "x"], "got 1 folder"), ([*apart], "--output_dir is missing"), ([*apart, "--output_dir", apart[0]], "nothing is overwritten"),
            ([*apart, "--output_dir", tmp_path / "x", "--prompts", "a <new1> <new2>"], "words of several runs"), ([*apart, "--output_dir", tmp_path / "x", "--prompts", "a <new1>"], "no prompt says <new2>"),
            ([*apart, "--output_dir", tmp_path / "x", "--captions", tmp_path / "gone"], "cannot be opened")):
        assert merge(words) == 2 and sentence in capsys.readouterr().err and files_of(apart[0]) == before and not (tmp_path / "x").exists()
    whole = learn("whole", freeze_model="crossattn", instance_prompt="a <new3> c", modifier_token="<new3>").output_dir
    assert merge([apart[0], whole], "--output_dir", str(tmp_path / "x")) == 2 and "--freeze_model crossattn_kv" in capsys.readouterr().err
    assert merge([*apart, "--output_dir", str(tmp_path / "x"), "--save_precision", "bf16"]) == 0
    assert {t.dtype for t in load_file(tmp_path / "x" / KEY_VALUE_FILE).values() if t.numel()} == {torch.bfloat16}
