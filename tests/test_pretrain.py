"The chain that makes sdxl-tiny, in miniature: every stage, exact resume, and a folder that stock diffusers draws with."
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sdxl_course.core import load_tensors
from sdxl_course.data.cache import fingerprint
from sdxl_course.measure.judges import ATTRIBUTES, to_pixels
from sdxl_course.model.architecture import TINY, tiny_architecture
from sdxl_course.model.latents import posterior
from sdxl_course.pretraining import unet as unet_room, vae as vae_room
from sdxl_course.pretraining.alignment import make_aligner
from sdxl_course.pretraining.cache import encode_pictures, framed_maps, framed_picture, read_cache
from sdxl_course.pretraining.data import MAPS, MAP_SIDE, SIDE, Pictures, draw_balanced, read_pictures, read_scenes, select_pictures
from sdxl_course.pretraining.export import STAGES, TRAINED, main
from sdxl_course.pretraining.judges import attribute_batch, attribute_loss, picture_codes
from sdxl_course.pretraining.stage import steps_done
from sdxl_course.pretraining.unet import ablation, load_parts
from sdxl_course.pretraining.vae import encoding_part, load_vae
from sdxl_course.train.checkpoint import latest_checkpoint, verify
from sdxl_course.world.render import render_array
from sdxl_course.world.scene import HELD_OUT_STYLE, STYLES, Scene, set_stage
from sdxl_course.world.trace import trace

SMALL = ("--num_scenes 5 --shard_size 3 --num_workers 1 --num_validation 1 --captions_per_scene 2 --held_out_share 0.4 --judge_batch_size 4 --num_things 3 "
         "--vae_batch_size 1 --clip_batch_size 4 --unet_batch_size 2 --num_subjects 2 --judge_steps 4 --instance_steps 4 --vae_steps 4 --clip_steps 4 --unet_steps 4 --refiner_steps 4 --refiner_batch_size 2 "
         "--vae_schedule_steps 4 --clip_schedule_steps 4 --unet_schedule_steps 4 --log_every 1 --sample_every 0").split()


def ask_main(run, stage, **flags): return main(["--output_dir", str(run), "--stage", stage, *SMALL, *(str(word) for name, value in flags.items() for word in (f"--{name}", value))])


def chain(run, stage, **flags): assert ask_main(run, stage, **flags) == 0


def part_of(run, folder, *names):
    "A run folder that has come as far as these folders of another run."
    for name in names: shutil.copytree(run / name, folder / name)
    return folder


def rows(run, name):
    "The log of a stage."
    return [json.loads(line) for line in (run / name / "training_log.jsonl").read_text().splitlines()]


def state(run, name):
    "Files of a stage's newest checkpoint that hold no seconds."
    folder = latest_checkpoint(run / name)
    assert verify(folder) == ""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("training_log.jsonl", "manifest.json")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "A run of four steps in each training stage, never stopped; nobody writes into it."
    run = tmp_path_factory.mktemp("straight")
    chain(run, "all")
    return run


@pytest.fixture(scope="module")
def stopped(straight, tmp_path_factory):
    "The same run, each stage stopped and continued, and the judges before there is a VAE."
    run = part_of(straight, tmp_path_factory.mktemp("stopped"), "data")
    chain(run, "judges,tokenizer,clip,vae", max_minutes=1e-6) # one step of each
    chain(run, "judges")
    chain(run, "vae,clip,cache,unet", unet_steps=2)
    chain(run, "unet,refiner", max_minutes=1e-6)
    chain(run, "unet,refiner")
    return run


# ------------------------------------------------ running and stopping

@pytest.mark.parametrize("name", TRAINED)
def test_stopping_changes_no_byte(straight, stopped, name):
    assert state(straight, name) == state(stopped, name)
    folder = latest_checkpoint(straight / name)
    tensors = {path.name: load_tensors(path)[0] for path in folder.glob("*.safetensors")}
    kinds = {"exp_avg", "exp_avg_sq", "step"} | (set() if name == "refiner" else {"momentum"}) # AdamW moves the whole refiner
    assert folder.name == "checkpoint-4" and tensors.keys() == {"trained.safetensors", "ema.safetensors", "optimizer.safetensors"} | ({"ema_2.safetensors"} if name == "unet" else set())
    assert {key.split("/")[0] for key in tensors["optimizer.safetensors"]} == kinds
    assert all(torch.isfinite(tensor).all() for group in tensors.values() for tensor in group.values())
    assert [row["step"] for row in rows(stopped, name)] == [1, 2, 3, 4]
    if name.startswith("judge"): assert (straight / "judges" / name[6:] / "model.safetensors").read_bytes() == (stopped / "judges" / name[6:] / "model.safetensors").read_bytes()


def test_a_stopped_session_leaves_a_checkpoint(straight, tmp_path, monkeypatch):
    run, batch = part_of(straight, tmp_path / "run", "data"), vae_room.vae_batch
    def ctrl_c(pictures, vae, step, *rest):
        if step == 3: raise KeyboardInterrupt
        return batch(pictures, vae, step, *rest)
    monkeypatch.setattr(vae_room, "vae_batch", ctrl_c)
    assert ask_main(run, "vae") == 130 and steps_done(run, "vae") == 3
    monkeypatch.undo()
    chain(run, "vae")
    assert state(run, "vae") == state(straight, "vae")


def test_a_longer_plan_another_rate_and_another_format(straight, tmp_path):
    run = part_of(straight, tmp_path, "data", "vae")
    chain(run, "vae", vae_steps=5, vae_schedule_steps=50, vae_lr=1e-13, mixed_precision="bf16")
    assert steps_done(run, "vae") == json.loads((run / "vae" / "measured.json").read_text())["step"] == 5
    assert rows(run, "vae")[2]["lr"] > 1e-4 and rows(run, "vae")[4]["lr"] == pytest.approx(1e-13, rel=1e-6) # at its height again, at once
    half, full = (load_tensors(latest_checkpoint(one / "vae") / "trained.safetensors")[0] for one in (run, straight))
    assert half.keys() == full.keys() and all(tensor.dtype == torch.float32 and torch.allclose(tensor, full[key], atol=1e-6) for key, tensor in half.items())


def test_the_cache_follows_the_vae(straight, tmp_path, capsys):
    run = part_of(straight, tmp_path, "data", "tokenizer", "tokenizer_2", "vae", "clip_1", "clip_2", "cache")
    chain(run, "cache")
    assert "shard-" not in capsys.readouterr().out # still valid: nothing is encoded
    chain(run, "vae", vae_steps=5)
    assert ask_main(run, "unet") == 2 # latents of another VAE
    assert "run the stage `cache` first" in capsys.readouterr().err
    chain(run, "cache")
    assert "shard-00001" in capsys.readouterr().out


def test_data_grows_by_whole_shards(straight, tmp_path):
    run = part_of(straight, tmp_path, "data")
    before = (run / "data" / "shard-00000.safetensors").stat().st_mtime_ns
    chain(run, "data", num_scenes=6)
    assert (run / "data" / "shard-00000.safetensors").stat().st_mtime_ns == before
    scenes, known = read_scenes(run), read_scenes(straight)
    assert scenes[:5] == known and len({scene["seed"] for scene in scenes}) == 6
    assert all(scene["style"] in STYLES and scene["style"] != HELD_OUT_STYLE for scene in scenes)


def test_processes_render_the_same_pictures(straight, tmp_path):
    chain(tmp_path, "data", num_workers=2, num_validation=0)
    for name in ("shard-00000.safetensors", "shard-00001.json"):
        assert (tmp_path / "data" / name).read_bytes() == (straight / "data" / name).read_bytes()


@pytest.mark.parametrize("flags, words", [
    (["--stage", "paint"], "paint"), (["--vae_step", "3"], "vae_steps"), (["--num_scenes", "-1"], "num_scenes"), (["--unet_decay_share", "70"], "at most 1"),
    (["--stage", "vae"], "stage `data`"), (["--stage", "unet"], "stage `data`"), (["--stage", "cache"], "stage `vae`"),
    (["--stage", "judges", "--judge_steps", "0"], "no judge of attributes to keep"), (["--stage", "export"], "stage `tokenizer`")])
def test_mistakes_get_one_sentence(tmp_path, capsys, flags, words):
    assert main(["--output_dir", str(tmp_path), *flags]) == 2
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message


# ------------------------------------------------ what comes out

def test_stock_diffusers_draws_with_the_export(straight):
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPVisionModelWithProjection
    folder = straight / "export"
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red chair in the snow", num_inference_steps=1, height=SIDE, width=SIDE, generator=torch.Generator().manual_seed(1)).images[0]
    assert picture.size == (SIDE, SIDE) and pipeline.default_sample_size*pipeline.vae_scale_factor == SIDE
    parts, steps = load_parts(straight, 0)
    assert steps == dict.fromkeys(TRAINED, 4)
    for name, part in (("unet", parts.unet), ("vae", parts.vae), ("text_encoder", parts.text_encoder)): # the averaged weights, rounded to half
        theirs = getattr(pipeline, name).state_dict()
        assert theirs.keys() == part.state_dict().keys() # REPA's head is thrown away
        for key, mine in part.state_dict().items(): torch.testing.assert_close(mine.half().float(), theirs[key].float())
    refiner, averaged = pipeline.unet.from_pretrained(str(folder / "refiner" / "unet")), load_tensors(latest_checkpoint(straight / "refiner") / "ema.safetensors")[0]
    for name, p in refiner.named_parameters(): torch.testing.assert_close(averaged[f"unet.{name}"].half().float(), p.detach())
    for name, width in (("vision_model", 64), ("vision_model_2", 128)):
        tower, info = CLIPVisionModelWithProjection.from_pretrained(str(folder / name), output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert tower(torch.zeros(1, 3, SIDE, SIDE)).image_embeds.shape == (1, width)


def test_the_card_says_what_made_it(straight, stopped, tmp_path):
    card, log = (straight / "export" / "README.md").read_text(), json.loads((straight / "export" / "training_log.json").read_text())
    assert "5 scenes" in card and card.count("| 4 steps, ") == len(TRAINED) and "not trained" not in card and "--num_scenes 5" in card and "| `judges/attributes` | 4 steps" in card
    assert log.keys() == {*TRAINED, "facts"} and log["unet"]["step"] == [1, 2, 3, 4] and log["facts"]["held_out"] == len(read_pictures(straight).held_out_rows)
    chain(part_of(stopped, tmp_path / "run", "data", "tokenizer", "tokenizer_2", "vae"), "export", export_dir=tmp_path / "model", num_scenes=6)
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.count("not trained: random weights") == 3 and card.count("| 4 steps, ") == 1 # no CLIP, no UNet, and no row for judges
    assert "| `refiner` | not there |" in card
    assert not any((tmp_path / "model" / name).exists() for name in ("vision_model", "judges", "refiner"))
    sessions = [json.loads(line)["flags"] for line in (stopped / "history.jsonl").read_text().splitlines()]
    assert [one["stage"] for one in sessions] == ["judges,tokenizer,clip,vae", "judges", "vae,clip,cache,unet", "unet,refiner", "unet,refiner"] and sessions[2]["unet_steps"] == 2


@pytest.mark.slow
def test_a_second_average_can_be_chosen_at_the_end(straight, tmp_path, capsys):
    run = part_of(straight, tmp_path / "run", "data", "tokenizer", "tokenizer_2", "vae", "clip_1", "clip_2", "cache")
    chain(run, "unet", unet_steps=2, unet_ema=0.1, unet_ema_slow=0.9, unet_lr=1e-2, unet_schedule_steps=100)
    for name in ("ema", "ema_slow"): chain(run, "export", unet_average=name, export_dir=tmp_path / name)
    differs = {path.relative_to(tmp_path / "ema").as_posix() for path in (tmp_path / "ema").rglob("*.safetensors") if path.read_bytes() != (tmp_path / "ema_slow" / path.relative_to(tmp_path / "ema")).read_bytes()}
    assert differs == {"unet/diffusion_pytorch_model.safetensors"}
    other = part_of(straight, tmp_path / "other", "data", "tokenizer", "tokenizer_2", "vae", "clip_1", "clip_2", "cache")
    chain(other, "unet", unet_steps=1, unet_ema_slow=0)
    assert ask_main(other, "export", unet_average="ema_slow") == 2
    assert "second average" in capsys.readouterr().err


@pytest.mark.slow
def test_a_coarser_autoencoder_needs_no_other_code(straight, tmp_path, monkeypatch):
    "The factor of the latents is a matter of the architecture alone."
    monkeypatch.setitem(TINY, "vae", TINY["vae"] | dict(block_out_channels=(8, 8, 16, 16)))
    monkeypatch.setitem(TINY, "unet", TINY["unet"] | dict(sample_size=16))
    run = part_of(straight, tmp_path, "data", "tokenizer", "tokenizer_2")
    chain(run, "vae,clip,cache,unet,export", vae_steps=1, clip_steps=1, unet_steps=3)
    cached = load_tensors(run / "cache" / "shard-00000.safetensors")[0]
    assert cached["mean"].shape[2:] == (4, 16, 16)
    from diffusers import StableDiffusionXLPipeline
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(run / "export"))
    assert (pipeline.vae_scale_factor, pipeline.default_sample_size) == (8, 16)


# ------------------------------------------------ pictures and their maps

def test_maps_hold_what_the_tracer_knows(straight):
    pictures = read_pictures(straight)
    assert pictures.maps.shape == (5, MAP_SIDE, MAP_SIDE, 6) and len(pictures.scenes) == 5
    for words, maps in zip(pictures.scenes, pictures.maps.numpy()/255):
        buffers = trace(set_stage(Scene(**{key: value for key, value in words.items() if key != "captions"})), SIDE)
        small = lambda full: F.adaptive_avg_pool2d(torch.from_numpy(np.float32(full)).reshape(*full.shape[:2], -1).permute(2, 0, 1), MAP_SIDE).permute(1, 2, 0).numpy().squeeze()
        assert np.abs(maps[..., :3]*2 - 1 - small(buffers.normal)).max() < 0.01
        assert np.abs(maps[..., 4] - small(buffers.figure == 1)).max() < 0.01 and np.abs(maps[..., 5] - small(buffers.figure == 2)).max() < 0.01
        assert np.abs(maps[..., 3] - small(buffers.depth.min()/buffers.depth)).max() < 0.01
        ground = maps[-1] # the lowest row of a picture: mostly ground, which faces up, and nearer than the horizon
        assert np.median(ground[:, MAPS.index("up")]) > 0.7 and np.median(ground[:, MAPS.index("near")]) > np.median(maps[0][:, MAPS.index("near")])


def test_maps_go_through_the_frame_of_their_picture(straight):
    pictures = read_pictures(straight)
    drawn = 2*(pictures.maps[..., 4].float().repeat_interleave(4, 1).repeat_interleave(4, 2) > 127) - 1 # the object, as a picture of its own
    cut = []
    for k in range(5):
        picture = ((drawn[k] + 1)*127).to(torch.uint8)[..., None].expand(-1, -1, 3).contiguous()
        framed, size, crop, _ = framed_picture(picture, k, 1., 0)
        wanted, maps = F.avg_pool2d(to_pixels(framed[None]), 4)[0, 0], framed_maps(pictures.maps[k], k, 1., 0)
        assert maps.shape == (2, 6, MAP_SIDE, MAP_SIDE) and (maps[0, 4] - wanted).abs().mean() < 0.15
        assert torch.equal(maps[1, 1:], maps[0, 1:].flip(-1)) and torch.equal(maps[1, 0], -maps[0, 0].flip(-1)) # right is left in the mirror
        if size == (SIDE, SIDE): cut.append((framed_maps(pictures.maps[k], k, 0., 0)[0, 4] - wanted).abs().mean())
    assert cut and max(cut) > 0.3 # without the frame they would lie elsewhere


def test_a_picture_and_its_mirror_image_are_told_their_frames(straight):
    pictures, vae = read_pictures(straight), load_vae(straight, tiny_architecture(0).vae)
    frames = [framed_picture(picture, k, 1., 0) for k, picture in enumerate(pictures.pixels)]
    found = encode_pictures(vae, frames)
    for k, (_, size, crop, mirrored) in enumerate(frames): assert found["time_ids"][k].tolist() == [[*size, *crop, SIDE, SIDE], [*size, *mirrored, SIDE, SIDE]]
    assert (found["time_ids"][..., :4] % 128).any() # 128 is what most are told
    pixels = to_pixels(torch.stack([frame[0] for frame in frames]))
    for side, shown in enumerate((pixels, pixels.flip(-1))):
        for name, wanted in zip(("mean", "std"), posterior(vae, shown)): torch.testing.assert_close(found[name][:, side].float(), wanted, atol=2e-2, rtol=2e-2)


def test_the_picture_outside_its_object_counts_less(straight, tmp_path, monkeypatch):
    counted, loss = [], unet_room.denoising_loss
    def counting(unet, batch, *rest):
        found = loss(unet, batch, *rest)
        counted.append((batch, *rest[2:], found.mean().item()))
        return found
    monkeypatch.setattr(unet_room, "denoising_loss", counting)
    run = part_of(straight, tmp_path, "data", "tokenizer", "tokenizer_2", "vae", "clip_1", "clip_2", "cache")
    chain(run, "unet", unet_steps=1, unet_batch_size=8, unmasked_weight=0.)
    chain(run, "unet", unet_steps=2, unet_batch_size=8)
    for batch, *_ in counted:
        assert batch.latents.shape[-2:] == (32, 32) and batch.extra["maps"].shape == (8, 6, MAP_SIDE, MAP_SIDE)
        torch.testing.assert_close(batch.extra["mask"][:, 0], batch.extra["maps"][:, 4]/2 + .5, atol=1e-4, rtol=0) # cells and maps are of one size
    assert [outside for *_, outside, _ in counted] == [0., 0.33]
    for (*_, found), row in zip(counted, rows(run, "unet")): assert row["loss"] == pytest.approx(found + 0.5*row["apart"], rel=1e-5)


# ------------------------------------------------ parts of a loss

def ask(unet, x):
    "One answer of a UNet of sdxl-tiny's sizes."
    pooled = unet.config.projection_class_embeddings_input_dim - 6*unet.config.addition_time_embed_dim
    return unet(x, torch.tensor([9, 900]), torch.ones(2, 77, unet.config.cross_attention_dim), added_cond_kwargs=dict(text_embeds=torch.zeros(2, pooled), time_ids=torch.zeros(2, 6))).sample


def noise(side): return torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def unet(): return tiny_architecture(0).unet.requires_grad_(False)


def test_alignment_is_a_square_where_the_object_is(unet):
    aligner = make_aligner(unet, 0)
    for side in (16, 32): # pictures of 64 and of 128 pixels
        ask(unet, noise(side))
        said = aligner.head(aligner.hidden).detach()
        assert said.shape == (2, 6, side, side)
        object_ = torch.where(torch.arange(side) < side//2, 1., -1.).view(-1, 1).expand(2, side, side)
        maps = said.clone()
        maps[:, 4] = object_
        wrong = lambda rows, by: torch.cat([maps[:, :4] + by*rows.view(-1, 1), maps[:, 4:]], 1) # the four maps before the object's
        inside = (object_[0, :, 0] > 0).float()
        base = {outside: aligner(maps, outside).mean().item() for outside in (0., 0.25, 1.)} # the head does not say `object` right
        for outside in base:
            for rows_, weight in ((inside, 1.), (1 - inside, outside)):
                rise = aligner(wrong(rows_, 2.), outside).mean().item() - base[outside]
                assert rise == pytest.approx(4*4/6*weight/(1 + outside), abs=1e-4)


def test_alignment_teaches_what_lies_before_it(unet):
    aligner = make_aligner(unet.requires_grad_(True), 0)
    ask(unet, noise(16))
    aligner(torch.ones(2, 6, MAP_SIDE, MAP_SIDE), 1.).mean().backward()
    taught = {name.split(".resnets")[0] for name, p in unet.named_parameters() if ".resnets." in name and p.grad is not None and p.grad.any()}
    assert taught == {"down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0"}
    assert unet.up_blocks[1].resnets[0].conv1.weight.grad is None and unet.up_blocks[0].upsamplers[0].conv.weight.grad.any()


def test_a_checkpoint_holds_the_head_that_reads_maps(straight, tmp_path, capsys):
    trained = load_tensors(latest_checkpoint(straight / "unet") / "trained.safetensors")[0]
    assert {key.split(".")[0] for key in trained} == {"unet", "aligner"}
    run = part_of(straight, tmp_path, "data", "tokenizer", "tokenizer_2", "vae", "clip_1", "clip_2", "cache", "unet")
    assert ask_main(run, "unet", unet_steps=5, alignment_weight=0) == 2
    assert "other flags" in capsys.readouterr().err # this checkpoint has a head


def test_ablation_finds_the_block_that_does_nothing(unet):
    block = unet.up_blocks[1].attentions[1].transformer_blocks[0]
    for layer in (unet.up_blocks[2].resnets[0].conv2, block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
        for p in layer.parameters(): p.zero_()
    before = ask(unet, noise(16))
    found = ablation(unet, lambda: (ask(unet, noise(16)) - 1).square().mean())
    assert {name for name, rise in found.items() if rise == 0} == {"up_blocks.2.resnets.0", "up_blocks.1.attentions.1.transformer_blocks.0"}
    blocks = {name for name, _ in unet.named_modules() if name.rpartition(".")[0].endswith(("resnets", "transformer_blocks"))}
    assert found.keys() == blocks and torch.equal(ask(unet, noise(16)), before) # and every hook is gone


def test_judges_see_renders_and_the_held_out_style_in_a_fifth(straight):
    pictures = read_pictures(straight)
    codes, known = picture_codes(pictures), len(pictures.pixels)
    assert len(codes) == known + len(pictures.held_out_rows) and pictures.held_out_rows
    for k, row in enumerate(pictures.held_out_rows):
        one, other = codes[known + k], codes[row]
        assert one[3] == ATTRIBUTES["style"].index(HELD_OUT_STYLE) and torch.equal(one[[0, 1, 2, 4, 5]], other[[0, 1, 2, 4, 5]])
        scene = Scene(**{key: value for key, value in pictures.scenes[row].items() if key != "captions"} | dict(style=HELD_OUT_STYLE))
        assert np.array_equal(select_pictures(pictures, torch.tensor([known + k]))[0].numpy(), render_array(scene, SIDE))
    drawn = draw_balanced([torch.tensor([7]), torch.arange(100, 200)], 4000, torch.Generator().manual_seed(0))
    assert (drawn == 7).float().mean() == pytest.approx(0.5, abs=0.04) and drawn[drawn != 7].unique().tolist() == list(range(100, 200))
    flat = Pictures(torch.stack([torch.full((SIDE, SIDE, 3), 40*k, dtype=torch.uint8) for k in range(known)]), pictures.scenes, torch.full((len(codes) - known, SIDE, SIDE, 3), 250, dtype=torch.uint8), pictures.held_out_rows, pictures.maps)
    met = [attribute_batch(flat, codes, step, 0, 8) for step in range(40)]
    seen, said = torch.cat([pixels.mean((1, 2, 3)) for pixels, _ in met]), torch.cat([one[:, 3] for _, one in met])
    held_out = said == ATTRIBUTES["style"].index(HELD_OUT_STYLE)
    assert held_out.float().mean() == pytest.approx(0.2, abs=0.06) and torch.equal(held_out, seen > 0.6) # pictures and answers belong together


def test_drawings_in_one_ink_teach_nothing_about_colour():
    logits = {name: torch.zeros(2, len(words), requires_grad=True) for name, words in ATTRIBUTES.items()}
    codes = torch.zeros(2, 6, dtype=torch.long)
    codes[:, 3] = ATTRIBUTES["style"].index("pencil")
    loss = attribute_loss(logits, codes)
    loss.mean().backward()
    assert loss.mean().item() == pytest.approx(sum(math.log(len(words)) for name, words in ATTRIBUTES.items() if name != "color"), abs=1e-5)
    assert not logits["color"].grad.any() and logits["place"].grad.any() # zero, but there: every weight moves on
