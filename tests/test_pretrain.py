"The chain that makes sdxl-tiny, in miniature: every stage, exact resume, and a folder that stock diffusers draws with."
import json
import shutil

import pytest
import torch

from sdxl_course import pretrain
from sdxl_course.core import load_tensors

SMALL = ("--num_scenes 9 --shard_size 5 --num_workers 1 --num_validation 1 --judge_batch_size 8 --num_things 4 --vae_batch_size 2 --clip_batch_size 4 --unet_batch_size 2 "
         "--vae_schedule_steps 6 --clip_schedule_steps 6 --unet_schedule_steps 6 --log_every 1 --sample_every 0").split()
STATES = ("judge_attributes", "judge_instances", "vae", "clip_1", "clip_2", "unet")


def chain(run, stage, **steps):
    flags = [word for name, value in steps.items() for word in (f"--{name}", str(value))]
    assert pretrain.main(["--output_dir", str(run), "--stage", stage, *SMALL, *flags]) == 0


def state(run, name): return (run / name / "state.safetensors").read_bytes()


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
    for _ in range(6): chain(run, "judges", judge_steps=6, instance_steps=6, max_minutes=1e-6) # one step of each judge at a time
    for stage in ("vae", "clip"):
        for number in (3, 6): chain(run, stage, **{f"{stage}_steps": number})
    chain(run, "cache")
    for number in (3, 6): chain(run, "unet", unet_steps=number)
    return run


@pytest.mark.parametrize("name", STATES)
def test_stopping_changes_no_byte(straight, stopped, name):
    assert state(straight, name) == state(stopped, name)
    tensors, notes = load_tensors(straight / name / "state.safetensors")
    assert notes["step"] == "6" and {key.split("/")[0] for key in tensors} == {"weight", "average", "momentum", "exp_avg", "exp_avg_sq"}
    if name.startswith("judge"): assert (straight / "judges" / name[6:] / "model.safetensors").read_bytes() == (stopped / "judges" / name[6:] / "model.safetensors").read_bytes()
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    steps = [json.loads(line)["step"] for line in (stopped / name / "training_log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_can_be_extended(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    chain(run, "vae", vae_steps=8, vae_schedule_steps=12)
    assert load_tensors(run / "vae" / "state.safetensors")[1]["step"] == "8"
    assert json.loads((run / "vae" / "measured.json").read_text())["step"] == 8


def test_the_cache_follows_the_vae(straight, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    chain(run, "cache")
    assert "shard-" not in capsys.readouterr().out # still valid: nothing is encoded
    chain(run, "vae", vae_steps=7)
    assert pretrain.main(["--output_dir", str(run), "--stage", "unet", *SMALL]) == 2 # latents of another VAE
    assert "cache" in capsys.readouterr().err
    chain(run, "cache")
    assert "shard-00001" in capsys.readouterr().out


def test_data_grows_by_whole_shards(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight / "data", run / "data")
    before = (run / "data" / "shard-00000.safetensors").stat().st_mtime_ns
    chain(run, "data", num_scenes=11)
    assert (run / "data" / "shard-00000.safetensors").stat().st_mtime_ns == before
    scenes = pretrain.read_scenes(run)
    assert len(scenes) == 11 and len({scene["seed"] for scene in scenes}) == 11
    assert all(scene["style"] in pretrain.STYLES for scene in scenes)


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
    parts, steps = pretrain.load_parts(straight, 0)
    assert steps == dict(clip_1=6, clip_2=6, vae=6, unet=6)
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
    assert card.count("not trained: random weights") == 3
    assert not (tmp_path / "model" / "vision_model").exists()


@pytest.mark.parametrize("flags, words", [
    (["--stage", "paint"], "paint"), (["--vae_step", "3"], "vae_steps"), (["--num_scenes", "-1"], "num_scenes"),
    (["--stage", "vae"], "stage `data`"), (["--stage", "unet"], "stage `data`"), (["--stage", "cache"], "stage `vae`"),
    (["--stage", "export"], "stage `tokenizer`")])
def test_mistakes_get_one_sentence(tmp_path, capsys, flags, words):
    assert pretrain.main(["--output_dir", str(tmp_path), *flags]) == 2
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message
