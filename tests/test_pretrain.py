"The chain that makes sdxl-tiny, in miniature: every stage, exact resume, and a folder that stock diffusers draws with."
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from sdxl_course.core import CourseError, load_tensors, seeded
from sdxl_course.model.architecture import TINY, tiny_architecture
from sdxl_course.options import parse_config
from sdxl_course.pretraining import unet as unet_room
from sdxl_course.pretraining.alignment import Aligner, clean_features, make_aligner
from sdxl_course.pretraining.cache import framed_picture
from sdxl_course.pretraining.data import SIDE, draw_balanced, read_pictures, read_scenes, select_pictures, style_groups
from sdxl_course.pretraining.export import PretrainConfig, main
from sdxl_course.pretraining.judges import SHOTS, attribute_batch, attribute_loss, instance_batch, picture_codes, reconstruct_pictures
from sdxl_course.pretraining.parent import load_parent_weights
from sdxl_course.pretraining.stage import steps_done
from sdxl_course.pretraining.unet import ablation, drawn_pictures, load_parts, named_parts, reinitialise, sampling_weights
from sdxl_course.pretraining.vae import load_vae, vae_batch
from sdxl_course.train.checkpoint import latest_checkpoint, verify
from sdxl_course.world.scene import HELD_OUT_STYLE, STYLES
from sdxl_course.measure.judges import ATTRIBUTES, to_bytes, to_pixels
from sdxl_course.measure.metrics import reconstruct

SMALL = ("--num_scenes 9 --shard_size 5 --num_workers 1 --num_validation 1 --judge_batch_size 8 --num_things 4 --vae_batch_size 2 --clip_batch_size 4 --unet_batch_size 2 "
         "--vae_schedule_steps 6 --decoder_steps 6 --clip_schedule_steps 6 --unet_schedule_steps 6 --log_every 1 --sample_every 0").split()
STATES = ("judge_attributes", "judge_instances", "vae", "decoder", "clip_1", "clip_2", "unet")


def chain(run, stage, **steps):
    flags = [word for name, value in steps.items() for word in (f"--{name}", str(value))]
    assert main(["--output_dir", str(run), "--stage", stage, *SMALL, *flags]) == 0


def state(run, name):
    "Files of a stage's newest checkpoint that hold no seconds."
    folder = latest_checkpoint(run / name)
    assert verify(folder) == ""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("training_log.jsonl", "manifest.json")}


def parse(*argv): return parse_config(PretrainConfig, argv)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "A run of six steps in each training stage, never stopped."
    run = tmp_path_factory.mktemp("straight")
    chain(run, "all", judge_steps=6, instance_steps=6, vae_steps=6, clip_steps=6, unet_steps=6)
    return run


@pytest.fixture(scope="module")
def stopped(straight, tmp_path_factory):
    "The same run, stopped after three steps of each stage and continued."
    run = tmp_path_factory.mktemp("stopped")
    for name in ("data", "tokenizer", "tokenizer_2"): shutil.copytree(straight / name, run / name)
    for stage in ("vae", "clip"):
        for number in (3, 6): chain(run, stage, **{f"{stage}_steps": number})
        for _ in range(6 if stage == "vae" else 0): chain(run, "decoder", vae_steps=6, max_minutes=1e-6)
    for _ in range(6): chain(run, "judges", judge_steps=6, instance_steps=6, max_minutes=1e-6) # one step of each judge at a time
    chain(run, "cache")
    for number in (3, 6): chain(run, "unet", unet_steps=number)
    return run


@pytest.mark.parametrize("name", STATES)
def test_stopping_changes_no_byte(straight, stopped, name):
    assert state(straight, name) == state(stopped, name)
    folder = latest_checkpoint(straight / name)
    tensors = {path.name: load_tensors(path)[0] for path in folder.glob("*.safetensors")}
    kinds = {"exp_avg", "exp_avg_sq", "step"} | (set() if name == "unet" else {"momentum"}) # AdamW moves the whole UNet
    assert folder.name == "checkpoint-6" and tensors.keys() == {"trained.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert {key.split("/")[0] for key in tensors["optimizer.safetensors"]} == kinds
    if name.startswith("judge"): assert (straight / "judges" / name[6:] / "model.safetensors").read_bytes() == (stopped / "judges" / name[6:] / "model.safetensors").read_bytes()
    assert all(torch.isfinite(tensor).all() for group in tensors.values() for tensor in group.values())
    steps = [json.loads(line)["step"] for line in (stopped / name / "training_log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_can_be_extended(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    chain(run, "vae", vae_steps=8, vae_schedule_steps=12)
    assert steps_done(run, "vae") == 8
    assert json.loads((run / "vae" / "measured.json").read_text())["step"] == 8


def test_the_cache_follows_the_vae(straight, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    chain(run, "cache")
    assert "shard-" not in capsys.readouterr().out # still valid: nothing is encoded
    chain(run, "vae", vae_steps=7)
    assert main(["--output_dir", str(run), "--stage", "unet", *SMALL]) == 2 # latents of another VAE
    assert "cache" in capsys.readouterr().err
    chain(run, "cache")
    assert "shard-00001" in capsys.readouterr().out


def test_data_grows_by_whole_shards(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight / "data", run / "data")
    before = (run / "data" / "shard-00000.safetensors").stat().st_mtime_ns
    chain(run, "data", num_scenes=11)
    assert (run / "data" / "shard-00000.safetensors").stat().st_mtime_ns == before
    scenes = read_scenes(run)
    assert len(scenes) == 11 and len({scene["seed"] for scene in scenes}) == 11
    assert all(scene["style"] in STYLES for scene in scenes)


def test_processes_render_the_same_pictures(straight, tmp_path):
    chain(tmp_path, "data", num_workers=2, num_validation=0)
    for name in ("shard-00000.safetensors", "shard-00001.json"):
        assert (tmp_path / "data" / name).read_bytes() == (straight / "data" / name).read_bytes()


def test_stock_diffusers_draws_with_the_export(straight):
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPVisionModelWithProjection
    folder = straight / "export"
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red chair in the snow", num_inference_steps=2, height=128, width=128, generator=torch.Generator().manual_seed(1)).images[0]
    assert picture.size == (128, 128)
    parts, steps = load_parts(straight, 0)
    assert steps == dict(FORMER, unet=6)
    for name, part in (("unet", parts.unet), ("vae", parts.vae)): # the export holds the averaged weights, rounded to half
        for mine, theirs in zip(part.parameters(), getattr(pipeline, name).parameters()): torch.testing.assert_close(mine.half().float(), theirs)
    for name, width in (("vision_model", 64), ("vision_model_2", 128)):
        tower, info = CLIPVisionModelWithProjection.from_pretrained(str(folder / name), output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert tower(torch.zeros(1, 3, 128, 128)).image_embeds.shape == (1, width)
    card, log = (folder / "README.md").read_text(), json.loads((folder / "training_log.json").read_text())
    assert "9 scenes" in card and "6 steps" in card and "not trained" not in card
    assert log["unet"]["step"] == [1, 2, 3, 4, 5, 6]


def test_an_unfinished_run_can_be_exported(straight, tmp_path):
    run = tmp_path / "run"
    for name in ("data", "tokenizer", "tokenizer_2", "vae"): shutil.copytree(straight / name, run / name)
    chain(run, "export", export_dir=tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.count("not trained: random weights") == 3 and "| not done |" in card # clip_1, clip_2, unet; the decoder
    assert not (tmp_path / "model" / "vision_model").exists()


# ------------------------------------------------ a chain that goes on from an exported model

WEIGHTS = [f"{part}/model.safetensors" for part in ("text_encoder", "text_encoder_2", "vision_model", "vision_model_2", "judges/attributes", "judges/instances")]
WEIGHTS += [f"{part}/diffusion_pytorch_model.safetensors" for part in ("vae", "unet")] + [f"vision_model{ending}/contrastive.safetensors" for ending in ("", "_2")]
WEIGHTS += [f"tokenizer{ending}/{name}" for ending in ("", "_2") for name in ("vocab.json", "merges.txt")]
WEIGHTS += [f"{part}/config.json" for part in ("vae", "unet", "text_encoder", "text_encoder_2", "vision_model", "vision_model_2")] # the scaling factor too
FORMER = dict(clip_1=6, clip_2=6, vae=6, decoder=6, judge_attributes=6, judge_instances=6)


def differing(one, other): return {name for name in WEIGHTS if (one / name).read_bytes() != (other / name).read_bytes()}


def fresh_run(folder, straight):
    "A run folder on a new machine: pictures can be made again, nothing else is there."
    shutil.copytree(straight / "data", folder / "data")
    return folder


def test_the_shipped_model_comes_out_as_it_went_in(tmp_path):
    from sdxl_course.model.components import tiny_path
    chain(tmp_path, "export", start_from="tiny")
    assert not differing(tiny_path(), tmp_path / "export")
    before, after = (json.loads((folder / "training_log.json").read_text()) for folder in (tiny_path(), tmp_path / "export"))
    for name in before:
        if name != "facts": assert after[name] == before[name]
    for name in ("steps", "scenes", "held_out", "minutes", "losses", "psnr"): assert after["facts"][name] == before["facts"][name]
    assert after["facts"]["history"][:-1] == before["facts"]["history"]


@pytest.mark.slow
def test_only_what_is_named_goes_on(straight, tmp_path):
    run, source = fresh_run(tmp_path, straight), straight / "export"
    chain(run, "cache,unet,export", start_from=source, unet_steps=2)
    assert differing(source, run / "export") == {"unet/diffusion_pytorch_model.safetensors"}
    log, card, first = json.loads((run / "export" / "training_log.json").read_text()), (run / "export" / "README.md").read_text(), json.loads((source / "training_log.json").read_text())
    assert log["facts"]["steps"] == dict(FORMER, unet=8) and log["unet"]["step"] == list(range(1, 9)) and log["unet"]["loss"][:6] == first["unet"]["loss"]
    assert log["unet"]["seconds"] == sorted(log["unet"]["seconds"]) and log["vae"] == first["vae"]
    assert log["facts"]["history"][:-1] == first["facts"]["history"] and log["facts"]["history"][-1]["flags"]["start_from"] == "export"
    assert "--vae_steps 6" in card and "--start_from export" in card and str(straight) not in card and "9 scenes" in card and "| `unet` | 8 steps" in card
    assert steps_done(run, "unet") == 2 # moments and warm-up began again
    third = fresh_run(tmp_path / "third", straight)
    chain(third, "cache,unet,export", start_from=run / "export", unet_steps=1)
    log = json.loads((third / "export" / "training_log.json").read_text())
    assert log["facts"]["steps"] == dict(FORMER, unet=9) and len(log["facts"]["history"]) == len(first["facts"]["history"]) + 2


@pytest.mark.slow
def test_every_stage_begins_with_the_given_weights(straight, tmp_path):
    run = fresh_run(tmp_path, straight)
    rates = dict(vae_lr=1e-13, decoder_lr=1e-13, clip_lr=1e-13, unet_lr=1e-13) # too small to change a half
    chain(run, "tokenizer,vae,decoder,clip,cache,unet,export", start_from=straight / "export", vae_steps=1, decoder_steps=1, clip_steps=1, unet_steps=1, **rates)
    assert not (run / "tokenizer").exists() # the encoders know the tokens of the model they come from
    for name in differing(straight / "export", run / "export") - {"vae/config.json"}: # measured again; else at most in the sign of a zero
        before, after = (load_tensors(folder / name)[0] for folder in (straight / "export", run / "export"))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before), name
    assert json.loads((run / "export" / "training_log.json").read_text())["facts"]["steps"] == dict(clip_1=7, clip_2=7, vae=7, decoder=7, unet=7, judge_attributes=6, judge_instances=6)


def test_stages_that_a_run_already_has_stay_its_own(straight, tmp_path):
    run = fresh_run(tmp_path, straight)
    chain(run, "vae", vae_steps=2)
    chain(run, "export", start_from=straight / "export")
    assert differing(straight / "export", run / "export") == {"vae/diffusion_pytorch_model.safetensors", "vae/config.json"}
    assert json.loads((run / "export" / "training_log.json").read_text())["facts"]["steps"] == dict(FORMER, vae=2, unet=6)


def test_a_chain_that_goes_on_draws_what_is_new(straight, tmp_path, monkeypatch):
    drawn, batch, counted, loss = [], unet_room.unet_batch, [], unet_room.denoising_loss
    monkeypatch.setattr(unet_room, "unet_batch", lambda words, scenes, cache, step, *rest: drawn.append(step) or batch(words, scenes, cache, step, *rest))
    monkeypatch.setattr(unet_room, "denoising_loss", lambda unet, batch, *rest: counted.append((batch, rest)) or loss(unet, batch, *rest))
    run = fresh_run(tmp_path, straight)
    chain(run, "cache,unet", start_from=straight / "export", unet_steps=1)
    chain(run, "unet", unet_steps=2) # the model is in the run folder by now
    assert drawn == [6, 7]
    chain(run, "unet", unet_steps=3, unet_batch_size=8, timestep_power=3., unmasked_weight=0.)
    seen, (_, _, times, _, outside) = counted[-1]
    mask = seen.extra["mask"]
    assert outside == 0 and (times < 125).sum() == 4 and mask.shape == (8, 1, *seen.latents.shape[2:]) and 0 < mask.mean() < 0.7


def test_parts_of_the_unet_can_begin_anew(straight, tmp_path):
    run, folder = fresh_run(tmp_path, straight), "unet/diffusion_pytorch_model.safetensors"
    chain(run, "cache,unet,export", start_from=straight / "export", unet_steps=1, unet_lr=1e-13, unet_renewed="mid_block,up_blocks.0.resnets.1", seed=1)
    before, after = (load_tensors(source / folder)[0] for source in (straight / "export", run / "export"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key for key in changed if not key.startswith(("mid_block.", "up_blocks.0.resnets.1."))} == set()
    assert {"mid_block.resnets.0.conv1.weight", "up_blocks.0.resnets.1.conv_shortcut.weight"} <= changed
    assert not after["mid_block.resnets.0.conv2.weight"].any() and not after["up_blocks.0.resnets.1.conv2.weight"].any() # they add nothing yet
    assert json.loads((run / "export" / "training_log.json").read_text())["facts"]["history"][-1]["flags"]["unet_renewed"] == "mid_block,up_blocks.0.resnets.1"
    ema = lambda: load_tensors(latest_checkpoint(run / "unet") / "ema.safetensors")[0]["unet.mid_block.resnets.0.conv1.weight"]
    began = ema()
    chain(run, "unet", unet_steps=2, unet_lr=1e-13, unet_renewed="mid_block", seed=2) # its checkpoint is there: nothing begins anew
    assert torch.allclose(ema(), began, atol=1e-6)


@pytest.fixture
def unet(): return tiny_architecture(0).unet.requires_grad_(False)


def ask(unet, x):
    "One answer of a UNet of sdxl-tiny's sizes."
    pooled = unet.config.projection_class_embeddings_input_dim - 6*unet.config.addition_time_embed_dim
    return unet(x, torch.tensor([9, 900]), torch.ones(2, 77, unet.config.cross_attention_dim), added_cond_kwargs=dict(text_embeds=torch.zeros(2, pooled), time_ids=torch.zeros(2, 6))).sample


SMALL_SIDE = TINY["unet"]["sample_size"]
X = torch.randn(2, 4, SMALL_SIDE, SMALL_SIDE, generator=torch.Generator().manual_seed(0))


def test_new_parts_add_nothing_and_keep_streams_at_size_one(unet):
    for p in unet.down_blocks[0].downsamplers[0].parameters(): p.mul_(40.) # a stream that has grown
    kept, anew, sizes = {name: p.clone() for name, p in unet.named_parameters()}, ("down_blocks.1.", "mid_block."), []
    reinitialise(unet, anew, lambda: ask(unet, X))
    for layer in (unet.down_blocks[1].resnets[0].conv_shortcut, unet.down_blocks[1].downsamplers[0].conv):
        layer.register_forward_hook(lambda _, __, out: sizes.append(float(out.square().mean().sqrt())))
    ask(unet, X)
    assert sizes == pytest.approx([1., 1.], rel=1e-4)
    assert {name for name, p in unet.named_parameters() if not torch.equal(p, kept[name])} <= {name for name in kept if name.startswith(anew)}
    silent = {name for name, rise in ablation(unet, lambda: ask(unet, X).square().mean()).items() if rise == 0}
    assert silent == {name for name, block in unet.named_modules() if name.startswith(anew) and type(block).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")}
    given = torch.randn(2, unet.config.block_out_channels[-1], 4, 4)
    assert torch.equal(unet.mid_block.attentions[0](given, encoder_hidden_states=torch.ones(2, 77, unet.config.cross_attention_dim)).sample, given)
    assert named_parts(unet, " mid_block., up_blocks.0") == ("mid_block.", "up_blocks.0.") and named_parts(unet, "") == ()
    for wrong in ("midblock", "mid_block,", "mid_block,,up_blocks.0"):
        with pytest.raises(CourseError, match="which the UNet lacks: wanted modules"): named_parts(unet, wrong)


def test_a_unet_can_grow_deeper_without_changing_its_answers(unet, tmp_path):
    from sdxl_course.core import save_tensors
    save_tensors(tmp_path / "start" / "unet" / "diffusion_pytorch_model.safetensors", unet.state_dict())
    depth = [1, unet.config.transformer_layers_per_block[1] + 1, 1]
    deeper, before = type(unet).from_config(dict(unet.config, transformer_layers_per_block=depth)).requires_grad_(False), ask(unet, X)
    added = tuple(f"{place}.transformer_blocks.{depth[1] - 1}." for place in ("down_blocks.1.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"))
    with pytest.raises(CourseError, match="another architecture"): load_parent_weights(tmp_path, "unet", deeper)
    flatter = type(unet).from_config(dict(unet.config, transformer_layers_per_block=[1, 1, 1]))
    with pytest.raises(CourseError, match=r"does not fit at .*transformer_blocks\.[12]"): load_parent_weights(tmp_path, "unet", flatter) # nothing is left out in silence
    assert load_parent_weights(tmp_path, "unet", deeper, added)
    assert not torch.allclose(ask(deeper, X), before, atol=1e-4)
    reinitialise(deeper, added, lambda: None)
    assert torch.allclose(ask(deeper, X), before, atol=1e-6)


@pytest.mark.slow
def test_hidden_states_learn_what_the_judge_sees(straight, tmp_path, capsys):
    run = fresh_run(tmp_path, straight)
    options = dict(alignment_weight=0.5, unet_lr=1e-3)
    chain(run, "cache,unet,export", start_from=straight / "export", unet_steps=3, **options)
    rows = [json.loads(line) for line in (run / "unet" / "training_log.jsonl").read_text().splitlines()]
    assert all(0 < row["apart"] < 2 and row["loss"] > 0.5*row["apart"] for row in rows)
    trained = load_tensors(latest_checkpoint(run / "unet") / "trained.safetensors")[0]
    assert {key.split(".")[0] for key in trained} == {"unet", "aligner"}
    assert differing(straight / "export", run / "export") == {"unet/diffusion_pytorch_model.safetensors"} # the head is thrown away
    whole = state(run, "unet")
    shutil.rmtree(run / "unet")
    for steps in (2, 3): chain(run, "unet", unet_steps=steps, **options)
    assert state(run, "unet") == whole
    shutil.rmtree(run / "unet")
    chain(run, "unet", unet_steps=1, unet_lr=1e-3)
    assert main(["--output_dir", str(run), "--stage", "unet", "--alignment_weight", "0.5", *SMALL]) == 2
    assert "other flags" in capsys.readouterr().err # its checkpoint has no head


def test_alignment_needs_a_judge_and_pictures_framed_alike(straight, tmp_path, capsys):
    run = fresh_run(tmp_path, straight)
    chain(run, "cache", start_from=straight / "export")
    for flags, words in ((["--seed", "5"], "framed with other values"), (["--reframed_share", "0.5"], "framed with other values"), ([], "no judge to align with")):
        if not flags: shutil.rmtree(run / "start" / "judges")
        assert main(["--output_dir", str(run), "--stage", "unet", "--alignment_weight", "0.5", *SMALL, *flags]) == 2
        assert words in capsys.readouterr().err


def test_alignment_asks_the_judge_of_the_given_model(straight, tmp_path, unet):
    run = fresh_run(tmp_path, straight)
    chain(run, "cache", start_from=straight / "export")
    (run / "judges" / "attributes").mkdir(parents=True)
    aligned = lambda: make_aligner(run, unet, 0.15, 0)
    assert aligned()[1].shape == (9, 2, 128, 8, 8) # the new judge is not asked, even though it is there
    shutil.rmtree(run / "start" / "judges")
    with pytest.raises(CourseError, match="there is no judge"): aligned() # it is, where there is no other


def test_rare_styles_are_met_more_often(straight):
    pictures = read_pictures(straight)
    groups, codes = style_groups(pictures), picture_codes(pictures)
    assert sorted(torch.cat(groups).tolist()) == list(range(len(codes))) == list(range(len(pictures.pixels) + len(pictures.held_out_style)))
    for k, row in enumerate(pictures.held_out_rows):
        one, other = codes[len(pictures.pixels) + k], codes[row]
        assert one[3] == ATTRIBUTES["style"].index(HELD_OUT_STYLE) and torch.equal(one[[0, 1, 2, 4, 5]], other[[0, 1, 2, 4, 5]])
        assert torch.equal(select_pictures(pictures, torch.tensor([len(pictures.pixels) + k]))[0], pictures.held_out_style[k])
    drawn = draw_balanced([torch.tensor([7]), torch.arange(100, 200)], 4000, torch.Generator().manual_seed(0))
    assert (drawn == 7).float().mean() == pytest.approx(0.5, abs=0.04) and drawn[drawn != 7].unique().tolist() == list(range(100, 200))
    wanted = to_pixels(select_pictures(pictures, draw_balanced(groups, 6, seeded(0, "vae", 3))))
    even, any_ = (vae_batch(pictures, tiny_architecture(0).vae, 3, 0, 6, SIDE, styles)[0] for styles in (groups, None))
    same = lambda drawn: all(torch.equal(one, other) or torch.equal(one.flip(-1), other) for one, other in zip(drawn, wanted))
    assert same(even) and not same(any_)
    met = torch.cat([attribute_batch(pictures, None, codes, step, 0, 8, 0.5)[1][:, 3] for step in range(50)])
    assert (met == ATTRIBUTES["style"].index(HELD_OUT_STYLE)).float().mean() == pytest.approx(0.2, abs=0.06) # the judge meets it in a fifth of its pictures


def test_drawings_in_one_ink_teach_nothing_about_colour():
    logits = {name: torch.zeros(2, len(words), requires_grad=True) for name, words in ATTRIBUTES.items()}
    codes = torch.zeros(2, 6, dtype=torch.long)
    codes[:, 3] = ATTRIBUTES["style"].index("pencil")
    loss = attribute_loss(logits, codes)
    loss.mean().backward()
    assert loss.mean().item() == pytest.approx(sum(math.log(len(words)) for name, words in ATTRIBUTES.items() if name != "color"), abs=1e-5)
    assert not logits["color"].grad.any() and logits["place"].grad.any() # zero, but there: every weight moves on


def test_some_words_are_drawn_more_often(straight, tmp_path, capsys):
    scenes = read_scenes(straight)
    thing = scenes[0]["object"]
    weights = sampling_weights(scenes, f"{thing}:3, {scenes[0]['style']}:1.5")
    assert weights[0] == 4.5 and torch.equal(sampling_weights(scenes, ""), torch.ones(len(scenes)))
    rows = torch.cat([drawn_pictures(weights, step, 0, 100)[1] for step in range(40)])
    assert torch.allclose(torch.bincount(rows, minlength=len(scenes))/len(rows), weights/weights.sum(), atol=0.03)
    run = fresh_run(tmp_path, straight)
    chain(run, "cache", start_from=straight / "export")
    for more in ("", f"{thing}:50"):
        chain(run, "unet", unet_steps=1, unet_more=more)
        shutil.move(run / "unet", tmp_path / f"unet{len(more)}")
    assert state(tmp_path, "unet0") != state(tmp_path, f"unet{len(thing) + 3}")
    for more in ("sofa:2", "duck", "duck:0", "duck:-1", "duck:many"):
        assert main(["--output_dir", str(run), "--stage", "unet", "--unet_more", more, *SMALL]) == 2
        assert f"{more!r}: wanted a word" in capsys.readouterr().err


def test_features_are_those_of_the_framed_picture_and_its_mirror_image(straight):
    from sdxl_course.measure.judges import load_judge
    pictures, judge = read_pictures(straight).pixels, load_judge("attributes")
    for share in (0., 1.):
        found = clean_features(judge, pictures, share, 0).float()
        pixels = to_pixels(torch.stack([framed_picture(picture, k, share, 0)[0] for k, picture in enumerate(pictures)]))
        with torch.no_grad(): seen = torch.stack([judge.body(part, output_hidden_states=True).hidden_states[3] for part in (pixels, pixels.flip(-1))], 1)
        spread, mean = seen.std((0, 1, 3, 4)), seen.mean((0, 1, 3, 4))
        alive = spread > 0.05
        wanted = (seen - mean.view(-1, 1, 1))/spread.view(-1, 1, 1)
        assert found.shape == (len(pictures), 2, 128, 8, 8) and alive.float().mean() > 0.8
        assert torch.allclose(found[:, :, alive], wanted[:, :, alive], atol=0.05) and not torch.allclose(found[:, 0], found[:, 1], atol=0.5)


def test_alignment_is_a_cosine_where_the_object_is(unet):
    aligner = Aligner(unet)
    ask(unet, X)
    said, mask = aligner.head(aligner.hidden).detach(), torch.zeros(2, 1, SMALL_SIDE, SMALL_SIDE)
    mask[:, :, :SMALL_SIDE//2] = 1.
    half = torch.cat([said[:, :, :4], -said[:, :, 4:]], 2) # right in the object, opposite elsewhere
    for wanted, outside, loss in ((said, 1., 0.), (3*said, 0.2, 0.), (-said, 1., 2.), (half, 0., 0.), (half, 1., 1.), (half, 0.25, 2*0.25/1.25)):
        assert aligner(wanted, mask, outside).mean().item() == pytest.approx(loss, abs=1e-5)
    unet.requires_grad_(True)
    ask(unet, X)
    aligner(torch.ones_like(said), mask, 1.).mean().backward()
    taught = {name.split(".resnets")[0] for name, p in unet.named_parameters() if ".resnets." in name and p.grad is not None and p.grad.any()}
    assert taught == {"down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1"} # all that lies before it
    assert unet.up_blocks[1].resnets[1].conv1.weight.grad is None


def test_ablation_finds_the_block_that_does_nothing(unet):
    for p in unet.up_blocks[2].resnets[0].conv2.parameters(): p.zero_()
    for p in (*(block := unet.up_blocks[1].attentions[1].transformer_blocks[0]).attn1.to_out[0].parameters(), *block.attn2.to_out[0].parameters(), *block.ff.net[2].parameters()): p.zero_()
    before = ask(unet, X)
    found = ablation(unet, lambda: (ask(unet, X) - 1).square().mean())
    assert {name for name, rise in found.items() if rise == 0} == {"up_blocks.2.resnets.0", "up_blocks.1.attentions.1.transformer_blocks.0"}
    assert len(found) == 11 + 13 and torch.equal(ask(unet, X), before) # and every hook is gone


@pytest.mark.slow
def test_judges_go_on_from_those_of_the_given_model(straight, tmp_path):
    run = fresh_run(tmp_path, straight)
    chain(run, "judges,export", start_from=straight / "export", judge_steps=2, instance_steps=2)
    assert differing(straight / "export", run / "export") == {"judges/attributes/model.safetensors", "judges/instances/model.safetensors"}
    log = json.loads((run / "export" / "training_log.json").read_text())
    assert log["facts"]["steps"] == dict(FORMER, judge_attributes=8, judge_instances=8, unet=6) and log["judge_attributes"]["step"] == list(range(1, 9))
    for judge in ("attributes", "instances"): assert "8 steps of up to 8" in (run / "export" / "judges" / judge / "README.md").read_text()
    still = fresh_run(tmp_path / "still", straight)
    chain(still, "judges", start_from=straight / "export", judge_steps=1, instance_steps=1, judge_lr=1e-13)
    for judge in ("attributes", "instances"):
        before, after = (load_tensors(folder / "judges" / judge / "model.safetensors")[0] for folder in (straight / "export", still))
        for key in before: assert "running" in key or "batches" in key or torch.equal(before[key], after[key]), key # batch normalisation is measured anew


def test_half_of_what_judges_see_went_through_the_vae(straight, tmp_path):
    run = tmp_path / "run"
    for name in ("data", "vae", "decoder"): shutil.copytree(straight / name, run / name)
    pictures, vae = read_pictures(run), load_vae(run, tiny_architecture(0).vae)
    codes, config = picture_codes(pictures), parse("--output_dir", str(run), *SMALL)
    packed = replace(pictures, pixels=reconstruct_pictures(pictures.pixels, "known", config), held_out_style=reconstruct_pictures(pictures.held_out_style, "other", config))
    gap = packed.pixels.int() - to_bytes(reconstruct(vae, pictures.pixels)).int()
    assert gap.abs().max() <= 1 and packed.pixels.shape == pictures.pixels.shape  # one: other sizes of batches round otherwise
    files = {path: path.stat().st_mtime_ns for path in (run / "packed").iterdir()}
    assert torch.equal(reconstruct_pictures(pictures.pixels, "known", config), packed.pixels) and {path: path.stat().st_mtime_ns for path in files} == files  # nothing is done twice
    assert reconstruct_pictures(pictures.pixels[:0], "none", config).shape == (0, 128, 128, 3)
    things, unpacked = torch.stack([pictures.pixels[:SHOTS], pictures.pixels[-SHOTS:]]), torch.stack([packed.pixels[:SHOTS], packed.pixels[-SHOTS:]])
    attributes = lambda one, other, share: attribute_batch(one, other, codes, 5, 0, 64, share)[0]
    instances = lambda one, other, share: instance_batch(one, other, 4, 0, 64, share)[0]
    for batch, one, other in ((attributes, pictures, packed), (instances, things, unpacked)):
        drawn, all_, none = batch(one, other, .5), batch(one, other, 1.), batch(other, one, 1.)
        went = torch.tensor([torch.equal(a, b) for a, b in zip(drawn, all_)])
        assert len(went)/5 < went.sum() < len(went)*4/5 and torch.equal(drawn[~went], none[~went])


def test_judges_that_see_through_the_vae_need_one(straight, tmp_path, capsys):
    run = fresh_run(tmp_path, straight)
    flags = ["--output_dir", str(run), "--stage", "judges", "--judge_steps", "1", "--instance_steps", "1", *SMALL]
    assert main(flags) == 2 and "run the stage `vae` first" in capsys.readouterr().err
    assert main([*flags, "--judge_vae_share", "0"]) == 0
    assert main([*flags, "--judge_vae_share", "50"]) == 2 and "wanted at least 0 and at most 1" in capsys.readouterr().err


def test_a_judge_that_is_given_no_steps_is_kept(straight, tmp_path, capsys):
    run = fresh_run(tmp_path, straight)
    chain(run, "judges,export", start_from=straight / "export", judge_steps=2, instance_steps=0)
    assert differing(straight / "export", run / "export") == {"judges/attributes/model.safetensors"}
    assert not (run / "judges" / "instances").exists() and not (run / "judge_instances").exists()
    other = fresh_run(tmp_path / "other", straight)
    assert main(["--output_dir", str(other), "--stage", "judges", "--judge_steps", "0", "--instance_steps", "2", *SMALL]) == 2
    assert "no judge of attributes to keep" in capsys.readouterr().err


def test_starts_that_cannot_be_are_refused(straight, tmp_path, capsys):
    def refused(run, start, words):
        assert main(["--output_dir", str(run), "--stage", "export", "--start_from", str(start)]) == 2
        told = capsys.readouterr().err
        assert words in told and "Traceback" not in told
    refused(tmp_path / "a", tmp_path, "no model_index.json")
    shutil.copytree(straight / "tokenizer", tmp_path / "b" / "tokenizer")
    (tmp_path / "b" / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b\n")
    refused(tmp_path / "b", straight / "export", "splits words otherwise")
    chain(tmp_path / "c", "export", start_from=straight / "export")
    refused(tmp_path / "c", "tiny", "started from export")
    chain(tmp_path / "c", "export", start_from=straight / "export") # the same again is no mistake
    folder = shutil.copytree(straight / "export", tmp_path / "narrow")
    from sdxl_course.core import save_tensors
    tensors = load_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors")[0]
    save_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors", dict(tensors, **{"conv_in.bias": torch.zeros(3)}))
    refused(tmp_path / "d", folder, "another architecture")


@pytest.mark.parametrize("flags, words", [
    (["--stage", "paint"], "paint"), (["--vae_step", "3"], "vae_steps"), (["--num_scenes", "-1"], "num_scenes"),
    (["--stage", "vae"], "stage `data`"), (["--stage", "unet"], "stage `data`"), (["--stage", "cache"], "stage `vae`"),
    (["--stage", "export"], "stage `tokenizer`")])
def test_mistakes_get_one_sentence(tmp_path, capsys, flags, words):
    assert main(["--output_dir", str(tmp_path), *flags]) == 2
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message


def test_a_stopped_session_leaves_a_checkpoint(straight, tmp_path, monkeypatch):
    run = fresh_run(tmp_path, straight)
    from sdxl_course.pretraining import vae as room
    batch = room.vae_batch
    def ctrl_c(pictures, vae, step, *rest):
        if step == 4: raise KeyboardInterrupt
        return batch(pictures, vae, step, *rest)
    monkeypatch.setattr(room, "vae_batch", ctrl_c)
    assert main(["--output_dir", str(run), "--stage", "vae", "--vae_steps", "6", *SMALL]) == 130
    assert steps_done(run, "vae") == 4
    monkeypatch.undo()
    chain(run, "vae", vae_steps=6)
    assert state(run, "vae") == state(straight, "vae")


def test_another_learning_rate_holds_at_once(straight, tmp_path):
    run = fresh_run(tmp_path, straight)
    for steps, rate in ((3, 1.5e-3), (4, 1e-13)): chain(run, "vae", vae_steps=steps, vae_lr=rate)
    rows = [json.loads(line) for line in (run / "vae" / "training_log.jsonl").read_text().splitlines()]
    assert rows[2]["lr"] > 1e-4 and rows[3]["lr"] < 1e-12


@pytest.mark.slow
def test_a_second_average_can_be_chosen_at_the_end(straight, tmp_path, capsys):
    run = fresh_run(tmp_path, straight)
    chain(run, "cache", start_from=straight / "export")
    chain(run, "unet", unet_steps=2, unet_ema=0.1, unet_ema_slow=0.9, unet_lr=1e-2, unet_schedule_steps=100)
    for name in ("ema", "ema_slow"): chain(run, "export", unet_average=name, export_dir=tmp_path / name)
    assert differing(tmp_path / "ema", tmp_path / "ema_slow") == {"unet/diffusion_pytorch_model.safetensors"}
    other = fresh_run(tmp_path / "other", straight)
    chain(other, "cache,unet", start_from=straight / "export", unet_steps=1)
    assert main(["--output_dir", str(other), "--stage", "export", "--unet_average", "ema_slow", *SMALL]) == 2
    assert "second average" in capsys.readouterr().err


def test_bf16_trains_fp32_weights(straight, tmp_path):
    run = fresh_run(tmp_path, straight)
    chain(run, "vae", vae_steps=1, mixed_precision="bf16")
    half, full = (load_tensors(latest_checkpoint(one / "vae") / "trained.safetensors")[0] for one in (run, straight))
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in half.values()) and half.keys() == full.keys()


@pytest.mark.slow
def test_a_finer_autoencoder_needs_no_other_code(tmp_path, monkeypatch):
    "The factor of the latents is a matter of the architecture alone."
    factor4 = dict(block_out_channels=(8, 16, 32), down_block_types=("DownEncoderBlock2D",)*3, up_block_types=("UpDecoderBlock2D",)*3)
    monkeypatch.setitem(TINY, "vae", TINY["vae"] | factor4)
    monkeypatch.setitem(TINY, "unet", TINY["unet"] | dict(sample_size=32))
    chain(tmp_path, "all", judge_steps=1, instance_steps=1, vae_steps=2, decoder_steps=1, clip_steps=1, unet_steps=1, alignment_weight=0.5)
    cached = load_tensors(tmp_path / "cache" / "shard-00000.safetensors")[0]
    assert cached["mean"].shape[2:] == (4, 32, 32) and cached["mask"].shape[2:] == (1, 32, 32)
    from diffusers import StableDiffusionXLPipeline
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(tmp_path / "export"))
    assert (pipeline.vae_scale_factor, pipeline.default_sample_size) == (4, 32)
