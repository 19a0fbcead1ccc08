"What the page 50_inference does not show: odd inputs, several LoRAs, live trainers' modules and the command's exit codes."
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sdxl_course.model.components import load_components
from sdxl_course.core import CourseError, seeded
from sdxl_course.inference import GenerateConfig, adapter_names, draw_and_save, load_pipeline, main, set_lora_scale, sweep_lora_scale
from sdxl_course.model.conditioning import empty_prompt_embeds, encode_prompts
from sdxl_course.model.sampling import draw_pictures, generate, sample_pictures
from sdxl_course.model.adapters import add_lora, lora_parameters
from sdxl_course.model.lora_files import save_lora
from sdxl_course.options import parse_config

PROMPTS = ["a red house", "a blue mug", "a cat"]
QUICK = dict(num_inference_steps=2)


def gap(ones, others): return max(int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in zip(ones, others))


def make_lora(model, folder, key, encoders=(), **options):
    "A LoRA file with numbers in every B."
    parts = load_components(model)
    models = {part: getattr(parts, part) for part in ("unet", *encoders)}
    for one in models.values():
        for name, p in lora_parameters(add_lora(one, generator=seeded(key), **options)):
            if "lora_B" in name: p.data = 2 * torch.randn(p.shape, generator=seeded(key, name))
            if "magnitude" in name: p.data *= 2
    return save_lora(folder, **models)


@pytest.fixture(scope="module")
def pipeline(toy_model): return load_pipeline(toy_model, device="cpu")


@pytest.fixture(scope="module")
def loras(toy_model, tmp_path_factory):
    "One LoRA for the UNet alone, one that also steers both text encoders."
    home = tmp_path_factory.mktemp("loras")
    return {"style": make_lora(toy_model, home / "style", 1, rank=2, alpha=4), "subject": make_lora(toy_model, home / "subject", 2, ("text_encoder", "text_encoder_2"))}


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_picture_does_not_depend_on_its_batch(pipeline, batch_size):
    wanted = [generate(pipeline, p, s, **QUICK)[0] for p, s in zip(PROMPTS, (5, 6, 7))]
    assert gap(generate(pipeline, PROMPTS, (5, 6, 7), batch_size=batch_size, **QUICK), wanted) <= 1
    shuffled = generate(pipeline, PROMPTS[::-1], (7, 6, 5), batch_size=batch_size, **QUICK)
    assert gap(shuffled[::-1], wanted) <= 1


def test_the_seed_is_the_one_stock_diffusers_takes(pipeline):
    ours = generate(pipeline, PROMPTS[0], 3, **QUICK)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(3), num_inference_steps=2, guidance_scale=3.0).images
    assert gap(ours, stock) == 0 and ours[0].size == (64, 64)


def test_prompts_and_embeddings_give_the_same_picture(toy_model, pipeline):
    parts = load_components(toy_model)
    with torch.no_grad(): embeds, empty = encode_prompts(parts, PROMPTS[0]), empty_prompt_embeds(parts)
    drawn = draw_pictures(parts, [x[0] for x in embeds], [x[0] for x in empty], [3, 4], steps=2)
    assert gap(drawn, generate(pipeline, PROMPTS[0], [3, 4], **QUICK)) <= 1
    assert gap(drawn[1:], draw_pictures(parts, [x[0] for x in embeds], [x[0] for x in empty], [4], steps=2)) <= 1
    assert gap(drawn, sample_pictures(pipeline, dict(prompt=PROMPTS[:1]*2), [3, 4], (64, 64), steps=2, decode_singly=True)) <= 1


def test_another_scheduler_draws_and_is_put_back(pipeline):
    from diffusers import DDIMScheduler
    own = pipeline.scheduler
    other = DDIMScheduler.from_config(own.config)
    ours = generate(pipeline, PROMPTS[0], 3, scheduler=other, **QUICK)
    assert pipeline.scheduler is own and gap(ours, generate(pipeline, PROMPTS[0], 3, **QUICK)) > 1
    pipeline.scheduler = other
    try: assert gap(ours, generate(pipeline, PROMPTS[0], 3, **QUICK)) == 0
    finally: pipeline.scheduler = own


def test_one_seed_or_one_prompt_serve_all(pipeline):
    assert len(generate(pipeline, PROMPTS, 0, **QUICK)) == 3
    many = generate(pipeline, PROMPTS[0], range(3), **QUICK)
    assert len(many) == 3 and gap(many[:1], many[1:]) > 1
    for prompts, seeds in ((PROMPTS, [1, 2]), ([], 1), (PROMPTS, []), ([1], 0), (PROMPTS, "1")):
        with pytest.raises(CourseError): generate(pipeline, prompts, seeds, **QUICK)


def test_nothing_outside_is_touched(pipeline):
    pipeline.unet.train()
    state = torch.random.get_rng_state()
    generate(pipeline, PROMPTS, 0, negative_prompt="a dog", **QUICK)
    assert torch.equal(state, torch.random.get_rng_state()) and pipeline.unet.training
    pipeline.unet.eval()


def test_lora_dropout_is_off_while_drawing(toy_model):
    "A trainer's live modules are in train mode; its pictures must not be drawn with dropout."
    parts = load_components(toy_model)
    add_lora(parts.unet, dropout=0.9, generator=seeded(0))
    for name, p in lora_parameters(parts.unet):
        if "lora_B" in name: p.data += 1
    parts.unet.train()
    live = parts.pipeline()
    assert gap(generate(live, PROMPTS[0], 0, **QUICK), generate(live, PROMPTS[0], 0, **QUICK)) == 0


def test_scale_zero_is_the_base_also_for_dora(toy_model, tmp_path, pipeline):
    base = generate(pipeline, PROMPTS[0], 0, **QUICK)
    dora = load_pipeline(toy_model, lora=make_lora(toy_model, tmp_path, 3, use_dora=True), device="cpu")
    assert gap(generate(dora, PROMPTS[0], 0, **QUICK), base) > 1
    assert gap(sweep_lora_scale(dora, PROMPTS[0], 0, (0,), **QUICK), base) == 0
    assert gap(generate(dora, PROMPTS[0], 0, **QUICK), base) > 1  # back on after the sweep
    assert gap(generate(load_pipeline(toy_model, lora=tmp_path, lora_scale=0, device="cpu"), PROMPTS[0], 0, **QUICK), base) == 0


@pytest.mark.parametrize("name", ["lokr_style", "hada_w1_a", "lora_A", "lokr"])
def test_a_file_may_be_called_as_the_tensors_of_an_adapter_are(toy_model, loras, tmp_path, name):
    file = tmp_path / f"{name}.safetensors"
    shutil.copy(loras["style"] / "pytorch_lora_weights.safetensors" if Path(loras["style"]).is_dir() else loras["style"], file)
    same = (generate(load_pipeline(toy_model, lora=one, device="cpu"), PROMPTS[0], 0, **QUICK) for one in (file, loras["style"]))
    assert gap(*same) == 0


def test_several_loras_and_their_strengths(toy_model, loras, pipeline):
    base = generate(pipeline, PROMPTS[0], 0, **QUICK)
    alone = {name: generate(load_pipeline(toy_model, lora=file, device="cpu"), PROMPTS[0], 0, **QUICK) for name, file in loras.items()}
    both = load_pipeline(toy_model, lora=list(loras.values()), device="cpu")
    assert adapter_names(both) == ["style", "subject"]  # named after their folders
    assert min(gap(generate(both, PROMPTS[0], 0, **QUICK), other) for other in (base, *alone.values())) > 1
    for name in loras:
        set_lora_scale(both, {name: 1.0})
        assert gap(generate(both, PROMPTS[0], 0, **QUICK), alone[name]) <= 1
    set_lora_scale(both, 0)
    assert gap(generate(both, PROMPTS[0], 0, **QUICK), base) == 0
    set_lora_scale(both, [0, 0.5])
    half = load_pipeline(toy_model, lora={"mine": loras["subject"]}, lora_scale={"mine": 0.5}, device="cpu")
    assert gap(generate(both, PROMPTS[0], 0, **QUICK), generate(half, PROMPTS[0], 0, **QUICK)) <= 1


def test_merging_by_diffusers_gives_the_same_picture(toy_model, loras):
    pipeline = load_pipeline(toy_model, lora=loras["subject"], device="cpu")
    wanted = generate(pipeline, PROMPTS[0], 0, guidance_scale=5.0, **QUICK)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert gap(generate(pipeline, PROMPTS[0], 0, guidance_scale=5.0, **QUICK), wanted) <= 1


def test_bf16_pipeline_takes_a_lora(toy_model, loras):
    pipeline = load_pipeline(toy_model, lora=loras["subject"], device="cpu", dtype=torch.bfloat16)
    assert np.asarray(generate(pipeline, PROMPTS[0], 0, **QUICK)[0]).std() > 0


def test_the_command_writes_pictures_that_say_how_they_were_made(toy_model, loras, tmp_path, capsys):
    flags = ["--model", str(toy_model), "--prompt", "a red house", "--prompt", "été: 赤い家", "--num_images", "2", "--seed", "7", "--num_inference_steps", "2",
        "--guidance_scale", "3", "--lora", str(loras["style"].parent), "--lora", str(loras["subject"]), "--lora_scale", "0.5", "1", "--output_dir", str(tmp_path / "out")]
    assert main(flags) == 0
    assert "wrote 4 pictures" in capsys.readouterr().out
    files = sorted((tmp_path / "out").glob("image_*.png"))
    assert [f.name for f in files] == [f"image_{i:03d}.png" for i in range(4)] and (tmp_path / "out" / "grid.png").is_file()
    notes = [Image.open(f).text for f in files]
    assert [(n["prompt"], n["seed"]) for n in notes] == [("a red house", "7"), ("a red house", "8"), ("été: 赤い家", "7"), ("été: 赤い家", "8")]
    assert notes[0]["lora"] == "style, subject" and str(tmp_path) not in str(notes)
    before = [f.read_bytes() for f in files]
    assert main(flags) == 0 and [f.read_bytes() for f in files] == before  # same command, same bytes


def drawn(folder):
    "Pictures and notes of a command."
    pictures = [Image.open(file) for file in sorted(folder.glob("image_*.png"))]
    return [picture.convert("RGB") for picture in pictures], [picture.text for picture in pictures]


@pytest.mark.parametrize("way", ["of its own", "in the prompt", "only in the prompt"])
def test_a_strength_may_stand_behind_the_file_or_in_the_prompt(toy_model, loras, tmp_path, monkeypatch, way):
    style, subject = str(loras["style"].parent), str(loras["subject"])
    usual = ["--model", str(toy_model), "--seed", "7", "--num_inference_steps", "2", "--device", "cpu", "--output_dir", str(tmp_path)]
    monkeypatch.chdir(loras["style"].parent.parent)
    flags = {"of its own": ["--prompt", "a cat", "--lora", f"{style}:0.5", "--lora", f"{subject}:-.25"], "in the prompt": ["--prompt", "a cat <lora:style:0.5> <lora:subject:-0.25>", "--lora", style, subject],
        "only in the prompt": ["--prompt", "a cat<lora:style:0.5><lora:subject:-.25>"]}[way]
    assert main([*usual, *flags]) == 0
    want = generate(load_pipeline(toy_model, lora=[style, subject], lora_scale=[0.5, -0.25], device="cpu"), "a cat", 7, **QUICK)
    (picture, (notes,)) = drawn(tmp_path)
    assert gap(picture, want) == 0 and notes["lora"] == "style, subject" and notes["lora_scale"] == "[0.5, -0.25]"
    assert gap(want, generate(load_pipeline(toy_model, device="cpu"), "a cat", 7, **QUICK)) > 5


def test_paths_may_be_given_in_python(loras):
    from sdxl_course.inference import plan_loras
    plan = plan_loras(["a cat"], [loras["style"].parent, loras["subject"]])
    assert plan.scales == dict(style=1.0, subject=1.0) and [str(one) for one in plan.files.values()] == [str(loras["style"].parent), str(loras["subject"])]


def test_each_prompt_gets_the_loras_that_it_asks_for(toy_model, loras, tmp_path, monkeypatch):
    monkeypatch.chdir(loras["style"].parent.parent)
    assert main(["--model", str(toy_model), "--seed", "7", "--num_images", "2", "--num_inference_steps", "2", "--device", "cpu", "--output_dir", str(tmp_path), "--lora", "style",
        "--prompt", "a cat", "a cat <lora:style:0>", "a cat <lora:subject>"]) == 0
    pictures, notes = drawn(tmp_path)
    style, both = (load_pipeline(toy_model, lora=[str(loras[name].parent) for name in names], device="cpu") for names in (["style"], ["style", "subject"]))
    wants = [generate(style, "a cat", (7, 8), **QUICK), generate(load_pipeline(toy_model, device="cpu"), "a cat", (7, 8), **QUICK), generate(both, "a cat", (7, 8), **QUICK)]
    for k, want in enumerate(wants): assert gap(pictures[2*k:2*k + 2], want) <= 1, k
    assert [one["lora_scale"] for one in notes[::2]] == ["[1.0, 0.0]", "0.0", "1.0"] and notes[2]["prompt"] == "a cat <lora:style:0>"


def test_the_commands_clip_skip_is_that_of_diffusers(toy_model, pipeline, tmp_path):
    assert main(["--model", str(toy_model), "--prompt", "a cat", "--seed", "7", "--num_inference_steps", "2", "--device", "cpu", "--output_dir", str(tmp_path), "--clip_skip", "1"]) == 0
    stock = pipeline("a cat", generator=torch.Generator().manual_seed(7), num_inference_steps=2, guidance_scale=3.0, clip_skip=1).images
    assert gap(drawn(tmp_path)[0], stock) == 0 and drawn(tmp_path)[1][0]["clip_skip"] == "1" and gap(stock, generate(pipeline, "a cat", 7, **QUICK)) > 0


@pytest.mark.parametrize("flags, words", [
    ([], "no prompt was given"),
    (["--prompt", "a", "--promt", "b"], "did you mean prompt"),
    (["--prompt", "a", "--num_images", "0"], "--num_images is 0: wanted at least 1"),
    (["--prompt", "a", "--height", "0"], "--height is 0: wanted at least 1"),
    (["--prompt", "a", "--guidance_scale", "nan"], "--guidance_scale is nan: wanted a number"),
    (["--prompt", "a", "--guidance_scale", "inf"], "--guidance_scale is inf: wanted at least 0"),
    (["--prompt", "a", "--lora", "{lora}", "--lora_scale", "nan"], "--lora_scale is nan: wanted at least -1000"),
    (["--prompt", "a", "--seed", str(2**64)], "--seed is 18446744073709551616: wanted at least"),
    (["--prompt", "a", "--num_inference_steps", "100000"], "--num_inference_steps is 100000: wanted at least 1 and at most 1000"),
    (["--prompt", "a", "--height", "63"], "multiples of 8"),
    (["--prompt", "a", "--lora", "nowhere.safetensors"], "no LoRA at 'nowhere.safetensors'"),
    (["--prompt", "a", "--lora", "{lora}", "--lora_scale", "1", "2"], "2 LoRA scales for 1"),
    (["--prompt", "a", "--lora", "{lora}:0.5", "--lora_scale", "1"], "--lora_scale both say"),
    (["--prompt", "a <lora:nobody:1>", "--lora", "{lora}"], "asks for the LoRA 'nobody': wanted one that --lora loads (style)"),
    (["--prompt", "a <lora:style:0.8:0.2>", "--lora", "{lora}"], "with one number"),
    (["--prompt", "a", "--clip_skip", "2"], "clip_skip is 2: wanted 1 or less"), (["--prompt", "a", "--clip_skip", "-1"], "wanted at least 0"),
    (["--prompt", "a", "--device", "toaster"], "toaster"),
    (["--prompt", "a", "--model", "no/such/model"], "no model at"),
    (["--prompt", "a", "--mixed_precision", "fp8"], "fp8"),
    (["--prompt", "a", "--output_dir", "{file}/deep"], "cannot be written"),
    (["--prompt", "a", "--scheduler", "eulera"], "invalid choice: 'eulera'"), (["--prompt", "a", "--guidance_interval", "5", "1"], "--guidance_interval is not a range"),
    (["--prompt", "a", "--guidance_rescale", "2"], "--guidance_rescale is 2.0: wanted at least 0 and at most 1"), (["--prompt", "a", "--strength", "0"], "--strength is 0.0: wanted more than 0"),
    (["--prompt", "a", "--mask", "{file}"], "wanted both of them"), (["--prompt", "a", "--init_image", "{file}"], "cannot be read as a picture"),
    (["--prompt", "a", "--max_token_length", "100"], "wanted a multiple of 75"), (["--prompt", "a", "--negative_prompt", "b", "c"], "2 negative prompts for 1 prompts"),
    (["--prompt", "a", "--lora", "{lora}", "--lora_places", "text_encoder"], "wanted such as text_encoder=0"), (["--prompt", "a", "--lora", "{lora}", "--lora_places", "text_encoder_2=0"], "no LoRA that is switched on"),
    (["--prompt", "a", "--offload", "model", "--device", "cpu"], "draws on the CPU: leave it out"), (["--prompt", "a", "--offload", "sequential", "--fuse_lora"], "leave one of them out"),
    (["--from", "{file}"], "cannot be read as a picture"), (["--from"], "expected one argument"), (["--from", "nowhere.png"], "cannot be read as a picture"),
])
def test_mistakes_end_with_one_sentence(toy_model, loras, tmp_path, capsys, flags, words):
    (tmp_path / "file").write_text("in the way")
    places = dict(lora=loras["style"], file=tmp_path / "file")
    flags = [f.format(**places) for f in flags]
    code = main(["--model", str(toy_model), "--output_dir", str(tmp_path / "out"), *flags])
    told = capsys.readouterr().err
    assert code == 2 and words in told and "Traceback" not in told and len(told.strip().splitlines()) == 1


def test_a_prompt_that_is_too_long_is_told(toy_model, tmp_path, capsys):
    assert main(["--model", str(toy_model), "--prompt", "a red house " * 20 + "by the sea", "--num_inference_steps", "1", "--output_dir", str(tmp_path)]) == 0
    assert "will not hear its end" in capsys.readouterr().out


def test_words_that_tiny_never_learned_are_named(tmp_path, capsys):
    flags = ["--num_inference_steps", "1", "--output_dir", str(tmp_path), "--device", "cpu"]
    assert main(["--prompt", "a red chair in the snow", *flags]) == 0
    assert "never learned" not in capsys.readouterr().out
    assert main(["--prompt", "an sks chair, old book illustration", *flags]) == 0
    assert "never learned sks, old, book, illustration" in capsys.readouterr().out


def test_the_config_is_plain(toy_model):
    config = parse_config(GenerateConfig, ["--prompt", "a", "b", "--prompt", "c", "--lora_scale", "0.3"])
    assert config.prompt == ["a", "b", "c"] and config.lora_scale == [0.3] and config.model == "tiny" and config.num_images == 1
    with pytest.raises(CourseError, match="no prompt"): GenerateConfig()


def test_draw_and_save_takes_a_config(toy_model, tmp_path, capsys):
    paths = draw_and_save(GenerateConfig(prompt=["a mug"], model=str(toy_model), num_inference_steps=1, output_dir=str(tmp_path), height=64, width=96))
    assert [p.name for p in paths] == ["image_000.png", "grid.png"] and Image.open(paths[0]).size == (96, 64)


def test_words_that_were_learnt_with_a_lora_are_read(toy_model, loras, tmp_path, capsys):
    "field 13: TOK was drawn as the letters T, O and K."
    import shutil
    from sdxl_course.model.words import add_tokens, placeholder_map, save_embeddings
    run = tmp_path / "ti"
    shutil.copytree(loras["style"].parent, run)
    tokens = add_tokens(load_components(toy_model), placeholder_map("TOK", 2), 0)
    for table in tokens.tables.values(): table.new.data = 3 * torch.randn(table.new.shape, generator=seeded("words"))
    file = save_embeddings(tokens, run)
    def drawn(prompt, *flags):
        assert main(["--model", str(toy_model), "--prompt", prompt, "--num_inference_steps", "2", "--output_dir", str(tmp_path / "out"), *flags]) == 0
        return [Image.open(tmp_path / "out" / "image_000.png")]
    want = drawn("a <s0><s1> chair", "--lora", str(run))
    assert "read the words TOK" in capsys.readouterr().out
    assert gap(drawn("a TOK chair", "--lora", str(run)), want) == 0 and gap(drawn("a ti_emb chair", "--lora", str(run)), want) == 0
    assert gap(drawn("a TOK chair", "--lora", str(loras["style"]), "--embeddings", str(file)), want) == 0
    assert gap(drawn("a TOK chair", "--lora", str(loras["style"])), want) > 1


def run(folder, *flags):
    "The notes of the pictures that a command wrote, with its pictures."
    assert main(["--device", "cpu", "--output_dir", str(folder), *map(str, flags)]) == 0
    return drawn(Path(folder))


EVERYTHING = ["--num_inference_steps", "4", "--scheduler", "euler_a", "--guidance_scale", "3", "--guidance_interval", "0.3", "5", "--guidance_rescale", "0.5", "--prompt_weights",
    "--max_token_length", "150", "--negative_prompt=-a dog", "--clip_skip", "1", "--width", "96", "--lora_places", "text_encoder=0.5", "--fuse_lora"]


@pytest.mark.parametrize("flags", [["--num_inference_steps", "2"], EVERYTHING], ids=["plain", "everything"])
def test_every_picture_is_drawn_again_to_the_last_bit(toy_model, loras, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    pictures, notes = run("out", "--model", toy_model, "--prompt", "a cat", "a (red:1.2) mug <lora:style:0.5>", "--num_images", "2", "--seed", "5", "--lora", loras["subject"], loras["style"], "--batch_size", "3", *flags)
    for i in (1, 2, 3):
        again, words = run(f"again{i}", "--from", f"out/image_{i:03d}.png")
        assert f"equal to out/image_{i:03d}.png to the last bit" in capsys.readouterr().out
        assert len(again) == 1 and gap(again, pictures[i:i + 1]) == 0 and {k: v for k, v in words[0].items() if k != "sdxl_course"} == {k: v for k, v in notes[i].items() if k != "sdxl_course"}
    again, words = run("third", "--from", "again3/image_000.png")  # a copy is as good
    assert gap(again, pictures[3:]) == 0


def test_steps_that_nobody_asked_for_are_written_down_too(toy_model, tmp_path, capsys):
    pictures, notes = run(tmp_path / "out", "--model", toy_model, "--prompt", "a cat")
    assert "Steps: 20, Sampler: Euler" in notes[0]["parameters"] and notes[0]["steps"] == "20"
    again, _ = run(tmp_path / "again", "--from", tmp_path / "out" / "image_000.png")
    assert gap(again, pictures) == 0 and "to the last bit" in capsys.readouterr().out


def test_a_picture_from_a_picture_is_drawn_again(toy_model, tmp_path, capsys):
    begin, mask = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)), Image.new("L", (64, 64), 255)
    for one, name in ((begin, "begin.png"), (mask, "mask.png")): one.save(tmp_path / name)
    pictures, notes = run(tmp_path / "out", "--model", toy_model, "--prompt", "a cat", "--num_inference_steps", "3", "--init_image", tmp_path / "begin.png", "--mask", tmp_path / "mask.png", "--strength", "0.9", "--film")
    assert Image.open(tmp_path / "out" / "film_000.gif").n_frames == 2 and (tmp_path / "out" / "film_000.png").is_file() and "Denoising strength: 0.9" in notes[0]["parameters"]
    again, _ = run(tmp_path / "again", "--from", tmp_path / "out" / "image_000.png")
    assert gap(again, pictures) == 0 and "to the last bit" in capsys.readouterr().out
    (tmp_path / "mask.png").rename(tmp_path / "elsewhere.png")
    assert main(["--from", str(tmp_path / "out" / "image_000.png"), "--output_dir", str(tmp_path / "x")]) == 2 and "say where it is with --mask" in capsys.readouterr().err


def test_what_is_given_beside_a_picture_wins(toy_model, loras, tmp_path, capsys):
    first = tmp_path / "out" / "image_000.png"
    run(tmp_path / "out", "--model", toy_model, "--prompt", "a cat", "--seed", "5", "--lora", f"{loras['style']}:0.5", "--num_inference_steps", "2")
    (tmp_path / "c.yaml").write_text("seed: 7\nprompt: a mug\n")
    pictures, notes = run(tmp_path / "new", "--from", first, "--config", tmp_path / "c.yaml", "--num_images", "2", "--lora_scale", "1")
    assert [(n["prompt"], n["seed"], n["lora_scale"], n["steps"]) for n in notes] == [("a mug", "7", "1.0", "2"), ("a mug", "8", "1.0", "2")] and "with other settings" in capsys.readouterr().out
    assert gap(pictures, generate(load_pipeline(toy_model, lora=loras["style"].parent, device="cpu"), "a mug", [7, 8], **QUICK)) == 0
    _, (notes,) = run(tmp_path / "other", "--from", first, "--lora", f"{loras['subject']}:0.25", "--seed", "0")
    assert (notes["lora"], notes["lora_scale"], notes["seed"]) == ("subject", "0.25", "0")
    assert main(["--from", str(first), "--output_dir", str(first.parent)]) == 2 and "could be written over" in capsys.readouterr().err


def test_what_is_missing_or_has_changed_is_told(toy_model, loras, tmp_path, capsys):
    import json, shutil
    from sdxl_course.remake import picture_settings, read_record
    here = tmp_path / "loras" / "mine.safetensors"
    here.parent.mkdir()
    shutil.copy(loras["style"], here)
    shutil.copytree(toy_model, tmp_path / "model")
    pictures, notes = run(tmp_path / "out", "--model", tmp_path / "model", "--prompt", "a cat", "--lora", here, "--num_inference_steps", "2")
    first = tmp_path / "out" / "image_000.png"
    record = read_record(first)
    assert json.loads(notes[0]["sdxl_course"]) == record and record["files"][1]["path"] == "../loras/mine.safetensors" and str(tmp_path) not in str(record)
    moved = here.rename(tmp_path / "out" / "mine.safetensors")  # beside the picture it is found by its hash
    again, _ = run(tmp_path / "again", "--from", first)
    assert gap(again, pictures) == 0 and "to the last bit" in capsys.readouterr().out
    away = moved.rename(tmp_path / "away.safetensors")
    shutil.copy(loras["subject"], moved)  # of the same name, and not the one
    assert main(["--from", str(first), "--output_dir", str(tmp_path / "x")]) == 2
    told = capsys.readouterr().err
    moved.unlink()
    assert f"mine.safetensors (sha256 {record['files'][1]['sha256'][:12]})" in told and "say where it is with --lora" in told
    again, _ = run(tmp_path / "given", "--from", first, "--lora", away)
    assert gap(again, pictures) == 0
    shutil.copy(loras["subject"], here)
    capsys.readouterr()
    again, _ = run(tmp_path / "changed", "--from", first)
    told = capsys.readouterr().out
    assert "mine.safetensors is another file now: sha256" in told and "differs from" in told and gap(again, pictures) > 0
    here.unlink()
    parts = load_components(tmp_path / "model")
    parts.unet.conv_in.weight.data *= 2
    from sdxl_course.model.components import save_components
    save_components(parts, tmp_path / "model", dtype=torch.float32)
    run(tmp_path / "weights", "--from", first, "--lora", away)
    assert "the model's weights are others now" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "model")
    assert main(["--from", str(first), "--lora", str(away), "--output_dir", str(tmp_path / "x")]) == 2 and "say where it is with --model" in capsys.readouterr().err
    assert picture_settings(first, ["model", "lora"])["prompt"] == ["a cat"]


def test_other_programs_read_how_a_picture_was_made(toy_model, loras, tmp_path):
    _, (notes,) = run(tmp_path, "--model", toy_model, "--prompt", "a (cat)\nin two lines", "--negative_prompt", "a dog", "--lora", f"{loras['style']}:0.5", "--scheduler", "dpmpp_2m_karras", "--num_inference_steps", "2", "--seed", "5")
    *said, line = notes["parameters"].split("\n")
    assert said == ["a \\(cat\\)", "in two lines <lora:style:0.5>", "Negative prompt: a dog"]
    found = dict(one.split(": ", 1) for one in line.split(", "))
    assert (found["Steps"], found["Sampler"], found["Schedule type"], found["CFG scale"], found["Seed"], found["Size"], found["Lora hashes"][:8]) == ("2", "DPM++ 2M", "Karras", "3.0", "5", "64x64", '"style: ')


def test_a_picture_that_others_saved_again_says_nothing(tmp_path, capsys):
    for name, notes in (("bare", None), ("broken", {"sdxl_course": "{}"}), ("words", {"sdxl_course": "[1]"})):
        from sdxl_course.model.sampling import save_picture
        save_picture(Image.new("RGB", (8, 8)), tmp_path / f"{name}.png", notes)
        assert main(["--from", str(tmp_path / f"{name}.png"), "--output_dir", str(tmp_path / "x")]) == 2 and "does not say how it was made" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    assert main(["--from", str(tmp_path / "a.jpg")]) == 2
