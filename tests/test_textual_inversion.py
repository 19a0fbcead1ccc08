"The command that learns a new word, on a toy model: what it takes, what it changes, what stock diffusers makes of its files."
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
from sdxl_course.textual_inversion import OBJECT, STYLE, TextualInversionConfig, main, open_textual_inversion, read_pictures, train_textual_inversion
from test_trainer import REFERENCE
from toy import files_of, make_toy_model

LACKS = ("pretrained_vae_model_name_or_path", "dataset_name", "dataset_config_name", "image_column", "caption_column", "max_train_samples", "cache_dir", "random_flip", "image_interpolation_mode",
    "validation_epochs", "snr_gamma", "max_grad_norm", "prediction_type", "noise_offset", "rank", "train_text_encoder", "debug_loss", "enable_npu_flash_attention",
    "mixed_precision")  # there "no", which overrules what `accelerate launch` was told; here, as in the other scripts, nothing given lets it speak
UPSTREAM = {name: flag for name, flag in REFERENCE.items() if name not in LACKS} | dict(  # the flags of textual_inversion_sdxl.py: (type, default)
    placeholder_token=(str, MISSING), initializer_token=(str, MISSING), learnable_property=(str, "object"), num_vectors=(int, 1), repeats=(int, 100), save_steps=(int, 500),
    save_as_full_pipeline=(bool, False), resolution=(int, 512), max_train_steps=(int, 5000), output_dir=(str, "text-inversion-model"), validation_steps=(int, 100), lr_num_cycles=(int, 1))


@pytest.fixture
def options(tmp_path, toy_model, make_pictures, monkeypatch):
    "What every run here has in common; the pictures have no captions."
    monkeypatch.setattr("sdxl_course.train.run.save_curve", lambda path, *points: Path(path).write_bytes(b""))
    data = make_pictures(3)
    (data / "metadata.jsonl").unlink()
    usual = dict(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(data), placeholder_token="<my-chair>", initializer_token="c", resolution=64, train_batch_size=2, repeats=2,
        max_train_steps=3, learning_rate=0.1, seed=0, report_to="none", checkpointing_steps=1000)
    return lambda name="run", **more: TextualInversionConfig(**{**usual, "output_dir": str(tmp_path / name), **more})


@pytest.fixture
def learn(options, toy):
    "A function that learns a word from three toy pictures in tmp_path/NAME."
    return lambda name="run", log=lambda text: None, components=None, **more: train_textual_inversion(options(name, **more), components or toy(), log)


def stock(model, folder=None):
    "diffusers' pipeline, with the word in both encoders as diffusers' documentation does it."
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(model))
    pipeline.set_progress_bar_config(disable=True)
    if folder:
        pipeline.load_textual_inversion(str(folder), weight_name="learned_embeds.safetensors", text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer)
        pipeline.load_textual_inversion(str(folder), weight_name="learned_embeds_2.safetensors", text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2)
    return pipeline


def draw(pipeline, prompt): return pipeline(prompt, generator=torch.Generator().manual_seed(3), num_inference_steps=2, height=64, width=64, output_type="np").images


def words_of(folder): return [load_file(folder / name)["<my-chair>"] for name in ("learned_embeds.safetensors", "learned_embeds_2.safetensors")]


def lasting(folder):
    "What must be equal to the last byte: the words, the log, the tensors of the last checkpoint."
    kept = {name: data for name, data in files_of(folder).items() if name.startswith("learned_embeds") or name == "training_log.jsonl" or name.startswith("checkpoint-4/") and name.endswith(".safetensors")}
    assert {"learned_embeds.safetensors", "learned_embeds_2.safetensors", "checkpoint-4/words.safetensors", "checkpoint-4/optimizer.safetensors"} <= kept.keys()
    return kept


# ---------------------------------------------------------------- flags

def test_every_upstream_flag_has_its_name_type_and_default():
    have, kinds = {f.name: f for f in fields(TextualInversionConfig)}, get_type_hints(TextualInversionConfig)
    for name, (kind, default) in UPSTREAM.items():
        assert have[name].default == default, name
        assert kind is kinds[name] or kind in get_args(kinds[name]), name


def test_the_command_line_takes_them_all(capsys):
    argv = [word for name, (kind, default) in UPSTREAM.items() if default not in (None, MISSING) for word in ([f"--{name}"] if kind is bool else [f"--{name}", str(default)])]
    given = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--placeholder_token", "<cat-toy>", "--initializer_token", "toy", "--mixed_precision", "no", *argv, "--print_config"]
    assert main(given) == 0
    shown = json.loads(capsys.readouterr().out)
    assert all(shown[name] == (True if kind is bool else default) for name, (kind, default) in UPSTREAM.items() if default not in (None, MISSING))
    assert command(["textual-inversion", *given]) == 0 and json.loads(capsys.readouterr().out) == shown
    assert command(["--help"]) == 0 and "  textual-inversion " in capsys.readouterr().out


# ---------------------------------------------------------------- what it learns

def test_only_the_new_rows_change(learn, toy, toy_model):
    "The networks and the old rows of both tables keep every bit."
    live, base = toy(), toy()
    result = learn(components=live, num_vectors=2)
    for name in ("unet", "vae"):
        assert all(torch.equal(value, getattr(base, name).state_dict()[key]) for key, value in getattr(live, name).state_dict().items()), name
    for name in ("text_encoder", "text_encoder_2"):
        old = getattr(base, name).state_dict()
        now = {key.replace(".token_embedding.base.", ".token_embedding.").replace("token_embedding.base.", "token_embedding."): value for key, value in getattr(live, name).state_dict().items()}
        assert now.keys() - old.keys() == {key for key in now if key.endswith("token_embedding.new")} and len(now.keys() - old.keys()) == 1, name
        assert all(torch.equal(now[key], old[key]) for key in old), name
    for part, word in zip(("", "_2"), words_of(result.output_dir)):
        tokenizer, table = getattr(base, f"tokenizer{part}"), getattr(base, f"text_encoder{part}").get_input_embeddings().weight
        (known,) = tokenizer("c").input_ids[1:-1]
        assert word.shape == (2, 8) and word.dtype == torch.float32 and ((word - table[known]).abs().max(1).values > 1e-2).all()


def test_it_begins_with_the_known_word(learn, toy, toy_model):
    word, _ = words_of(learn(learning_rate=0.0, max_train_steps=1).output_dir)
    (known,) = toy().tokenizer("c").input_ids[1:-1]
    assert torch.equal(word[0], toy().text_encoder.get_input_embeddings().weight[known])


@pytest.mark.parametrize("vectors", [1, 2])
def test_stock_diffusers_draws_our_picture_from_our_files(learn, toy, toy_model, vectors):
    live = toy()
    folder = learn(components=live, num_vectors=vectors).output_dir
    ours = live.pipeline()
    ours.set_progress_bar_config(disable=True)
    for encoder in (live.text_encoder, live.text_encoder_2): encoder.eval()
    theirs = stock(toy_model, folder)
    from sdxl_course.model.conditioning import encode_prompts
    with torch.no_grad(): embeds, pooled = encode_prompts(live, ["a <my-chair> b"])
    found, _, found_pooled, _ = theirs.encode_prompt("a <my-chair> b", do_classifier_free_guidance=False)
    assert (embeds - found).abs().max() < 1e-5 and (pooled - found_pooled).abs().max() < 1e-5
    assert abs(draw(theirs, "a <my-chair>") - draw(theirs, "a")).max() > 1e-4
    assert abs(draw(theirs, "a <my-chair>") - draw(stock(toy_model), "a <my-chair>")).max() > 1e-4
    assert abs(draw(theirs, "a house") - draw(stock(toy_model), "a house")).max() == 0  # what does not say the word is the base model's


def test_the_full_pipeline_knows_the_word(learn, toy_model):
    folder = learn(save_as_full_pipeline=True).output_dir
    whole, base = stock(folder), stock(toy_model)
    assert abs(draw(whole, "a <my-chair>") - draw(stock(toy_model, folder), "a <my-chair>")).max() == 0
    for part in ("unet", "vae"): assert all(torch.equal(a, b) for a, b in zip(getattr(whole, part).state_dict().values(), getattr(base, part).state_dict().values()))
    assert "model_index.json" not in files_of(learn("without").output_dir)


def test_encoders_that_look_for_the_largest_id_find_the_end_all_the_same(tmp_path, options):
    "SDXL's own text encoders do (their configuration says eos_token_id 2): a new word has a larger id than the end. The whole pipeline is mended for good; the card says how to mend another."
    model = make_toy_model(tmp_path / "old" / "model")
    for part in ("text_encoder", "text_encoder_2"):
        file = model / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 2}))
    config = options(pretrained_model_name_or_path=str(model), save_as_full_pipeline=True, max_train_steps=1)
    run = open_textual_inversion(config, log=lambda text: None)
    try:
        run.train()
        with torch.no_grad(): want = run.embed("a <my-chair> b")[1]
        folder = run.finish().output_dir
    finally: run.close()
    pooled = lambda pipeline: pipeline.encode_prompt("a <my-chair> b", do_classifier_free_guidance=False)[2][0]
    usage = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    *lines, mend, draw = usage.replace('"this folder"', repr(str(folder))).replace('"the folder of model"', repr(str(model))).strip().splitlines()
    names = {}
    exec("\n".join(lines), names)
    pipeline = names["pipeline"]
    assert (pooled(pipeline) - want).abs().max() > 1e-3 and draw.startswith("picture = pipeline(")
    exec(mend, names)
    assert (pooled(pipeline) - want).abs().max() < 1e-5 and (pooled(stock(folder)) - want).abs().max() < 1e-5


def test_gradient_checkpointing_reaches_every_network_and_changes_no_number(learn, toy):
    "The gradient passes through the frozen UNet and both text encoders, and what they keep for it is what fills a card."
    live = toy()
    plain, saved = learn("plain"), learn("saved", components=live, gradient_checkpointing=True)
    for part in ("unet", "text_encoder", "text_encoder_2"): assert any(getattr(module, "gradient_checkpointing", False) for module in getattr(live, part).modules()), part
    assert saved.losses == pytest.approx(plain.losses, rel=1e-5)
    for one, other in zip(words_of(plain.output_dir), words_of(saved.output_dir)): torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_files_and_card(learn):
    result = learn(save_steps=2, validation_prompt="a <my-chair>", num_validation_images=1)
    files = files_of(result.output_dir)
    assert {"learned_embeds.safetensors", "learned_embeds_2.safetensors", "run_emb.safetensors", "learned_embeds-steps-2.safetensors", "learned_embeds_2-steps-2.safetensors", "image_0.png", "config.yaml"} <= files.keys()
    assert not any("steps-1" in name or "steps-3" in name for name in files)
    card = files["README.md"].decode()
    assert "textual_inversion" in card and "Trigger words: `<my-chair>`" in card and "load_textual_inversion" in card
    assert result.weights_path.name == "learned_embeds.safetensors" and files["learned_embeds-steps-2.safetensors"] != files["learned_embeds.safetensors"]


def test_save_steps_writes_the_word_as_it_is_then(learn):
    steps = learn("long", max_train_steps=3, save_steps=1).output_dir
    for k in (1, 2):
        short = learn(f"short-{k}", max_train_steps=k).output_dir
        for part in ("", "_2"): assert (steps / f"learned_embeds{part}-steps-{k}.safetensors").read_bytes() == (short / f"learned_embeds{part}.safetensors").read_bytes()


def test_validation_steps_and_epochs_say_when_to_draw(learn):
    prompt = dict(validation_prompt="<my-chair>", num_validation_images=1, max_train_steps=5)  # 3 pictures, shown twice, in batches of 2: 3 updates an epoch
    drawn = lambda name, **more: sorted(name for name in files_of(learn(name, **prompt, **more).output_dir) if name.startswith("validation/"))
    assert drawn("a") == []
    assert drawn("b", validation_steps=2) == ["validation/step-000002-0.png", "validation/step-000004-0.png"]
    assert drawn("c", validation_epochs=1) == ["validation/step-000003-0.png"]


def test_every_picture_is_shown_with_every_caption_of_its_kind(options):
    for kind, templates in (("object", OBJECT), ("style", STYLE)):
        records = read_pictures(options(learnable_property=kind)).records
        assert [set(record.captions) for record in records] == [{one.format("<my-chair>") for one in templates}] * 3


def test_style_captions_and_repeats_make_another_run(learn):
    plain = learn("plain")
    assert learn("style", learnable_property="style").log != plain.log
    assert [row["epoch"] for row in learn("short", repeats=1).log] == [0, 0, 1] and [row["epoch"] for row in plain.log] == [0, 0, 0]


# ---------------------------------------------------------------- resume

@pytest.mark.parametrize("more", [dict(), dict(num_vectors=2, use_ema=True, gradient_accumulation_steps=2, random_flip=True)], ids=str)
def test_resume_is_exact(learn, more):
    more = dict(more, max_train_steps=4, checkpointing_steps=1, save_steps=4, lr_scheduler="cosine", lr_warmup_steps=1)
    folder = learn("straight", **more).output_dir
    straight = lasting(folder)
    for k in (1, 2, 3): assert lasting(learn(f"from-{k}", **more, resume_from_checkpoint=str(folder / f"checkpoint-{k}")).output_dir) == straight, k


def test_a_run_that_stops_early_goes_on_as_if_nothing_had_happened(learn):
    straight = lasting(learn("straight", max_train_steps=4, checkpointing_steps=2).output_dir)
    learn("steps", max_train_steps=2, checkpointing_steps=2)
    assert lasting(learn("steps", max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint="latest").output_dir) == straight


def test_another_word_is_not_resumed(learn):
    learn(max_train_steps=2, checkpointing_steps=2)
    for change in (dict(placeholder_token="<other>"), dict(num_vectors=2), dict(initializer_token="d"), dict(learnable_property="style")):
        with pytest.raises(CourseError, match=next(iter(change))): learn(max_train_steps=4, resume_from_checkpoint="latest", **change)


# ---------------------------------------------------------------- how it refuses

@pytest.mark.parametrize("words, message", [(["--train_data_dir="], "no data was given"), (["--train_data_dir", "no/such/folder"], "no/such/folder"), (["--dataset_name", "n"], "--train_data_dir"),
    (["--placeholder_token", "my chair"], "one word"), (["--placeholder_token", " "], "one word"), (["--placeholder_token", "c"], "the tokenizer knows"), (["--initializer_token", "chair"], "is 5 tokens"),
    (["--initializer_token", ""], "is 0 tokens"), (["--learnable_property", "objekt"], "invalid choice"), (["--num_vectors", "0"], "at least 1"), (["--save_steps", "0"], "at least 1"),
    (["--rank", "4"], "rank"), (["--cache_text_embeds", "True"], "leave it out"), (["--resume_from_checkpoint", "checkpoint-9"], "no checkpoint")])
def test_bad_input_is_one_clear_sentence(words, message, tmp_path, toy_model, make_pictures, capsys):
    argv = ["--pretrained_model_name_or_path", str(toy_model), "--train_data_dir", str(make_pictures(2)), "--placeholder_token", "<my-chair>", "--initializer_token", "c", "--resolution", "64",
        "--output_dir", str(tmp_path / "o"), "--report_to", "none", "--max_train_steps", "1"]
    assert main(argv + words) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and told.strip().count("\n") == 0


def test_what_must_be_given_is_named(capsys):
    assert main(["--pretrained_model_name_or_path", "m", "--train_data_dir", "d"]) == 2
    told = capsys.readouterr().err
    assert "--placeholder_token" in told and "--initializer_token" in told and told.strip().count("\n") == 0


def test_an_empty_folder_is_a_sentence(tmp_path, options):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CourseError, match="no pictures"): train_textual_inversion(options(train_data_dir=str(tmp_path / "empty")), log=lambda text: None)
