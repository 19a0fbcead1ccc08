"The commands that steer a UNet by pictures, on a toy model: what they take, what they change, what they leave."
import json
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import yaml
from diffusers import ControlNetModel, MultiAdapter, StableDiffusionXLAdapterPipeline, StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline, T2IAdapter
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file
from sdxl_course.cli import main as command
from sdxl_course.controlnet import ControlNetConfig, main as controlnet_main, open_controlnet, train_controlnet
from sdxl_course.core import CourseError, seeded
from sdxl_course.inference import load_pipeline, main as generate_main
from sdxl_course.model.adapters import add_lora, lora_parameters
from sdxl_course.model.components import count_parameters
from sdxl_course.model.conditioning import encode_prompts
from sdxl_course.model.control import control_residuals, follow_picture, for_each, generate_controlled, new_adapter, new_controlnet, save_control, steering
from sdxl_course.model.lora_files import save_lora
from sdxl_course.model.lora_scales import set_lora_scale
from sdxl_course.model.refiner import load_refiner, refine
from sdxl_course.model.sampling import generate, own_generator
from sdxl_course.t2i_adapter import T2IAdapterConfig, main as adapter_main, train_t2i_adapter
from sdxl_course.train.checkpoint import sha256_of
from test_trainer import REFERENCE
from toy import files_of, make_toy_refiner

SHARED = {name: flag for name, flag in REFERENCE.items() if name not in ("rank", "train_text_encoder", "debug_loss", "center_crop", "random_flip", "snr_gamma", "prediction_type", "noise_offset",
    "validation_epochs", "local_rank", "enable_npu_flash_attention", "image_interpolation_mode")} | dict(  # what both scripts of diffusers have: (type, default)
    conditioning_image_column=(str, "conditioning_image"), proportion_empty_prompts=(float, 0), validation_image=(str, None), validation_steps=(int, 100), learning_rate=(float, 5e-6),
    train_batch_size=(int, 4), num_train_epochs=(int, 1), lr_num_cycles=(int, 1), lr_power=(float, 1.0))
UPSTREAM = dict(
    controlnet=(ControlNetConfig, controlnet_main, SHARED | dict(controlnet_model_name_or_path=(str, None), output_dir=(str, "controlnet-model"), resolution=(int, 512), image_interpolation_mode=(str, "lanczos"))),
    adapter=(T2IAdapterConfig, adapter_main, SHARED | dict(adapter_model_name_or_path=(str, None), output_dir=(str, "t2iadapter-model"), resolution=(int, 1024), checkpoints_total_limit=(int, 3), dataloader_num_workers=(int, 1))))
TRAIN = dict(controlnet=(ControlNetConfig, train_controlnet, ControlNetModel), adapter=(T2IAdapterConfig, train_t2i_adapter, T2IAdapter),
    small=(partial(ControlNetConfig, controlnet_size="small"), train_controlnet, ControlNetModel))


def part_of(kind): return "adapter" if kind == "adapter" else "controlnet"  # what diffusers' pipelines call it


def add_maps(folder, column="conditioning_image"):
    "A map for each picture of a folder: its negative, in maps/, named by the metadata."
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "maps").mkdir()
    for row in rows:
        row[column] = f"maps/{row['file_name']}"
        ImageOps.invert(Image.open(folder / row["file_name"]).convert("RGB")).save(folder / row[column])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def mapped(make_pictures): return add_maps(make_pictures(5))


@pytest.fixture
def steered(tmp_path, toy, toy_model, mapped, monkeypatch):
    "A function that trains a network of a kind on five toy pictures in tmp_path/NAME."
    monkeypatch.setattr("sdxl_course.train.run.save_curve", lambda path, *points: Path(path).write_bytes(b""))
    usual = dict(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(mapped), resolution=64, train_batch_size=2, max_train_steps=3, learning_rate=1e-3, seed=0, report_to="none",
        checkpointing_steps=1000)
    def train(kind, name="run", log=lambda text: None, components=None, **options):
        Config, run, _ = TRAIN[kind]
        return run(Config(**{**usual, "output_dir": str(tmp_path / name), **options}), components or toy(), log)
    return train


def lasting(folder):
    "What must be equal to the last byte: the published weights, the log, the last checkpoint."
    kept = {name: data for name, data in files_of(folder).items() if name in ("training_log.jsonl", "diffusion_pytorch_model.safetensors", "config.json") or name.startswith("checkpoint-4/") and name.endswith(".safetensors")}
    assert {"diffusion_pytorch_model.safetensors", "checkpoint-4/control.safetensors", "checkpoint-4/optimizer.safetensors"} <= kept.keys()
    return kept


@pytest.mark.parametrize("kind", UPSTREAM)
def test_every_upstream_flag_has_its_name_type_and_default(kind, capsys):
    Config, main, flags = UPSTREAM[kind]
    have, kinds = {f.name: f for f in fields(Config)}, get_type_hints(Config)
    for name, (type_, default) in flags.items():
        assert have[name].default == default, name
        assert type_ is kinds[name] or type_ in get_args(kinds[name]) or list[type_] in get_args(kinds[name]), name
    argv = [word for name, (type_, default) in flags.items() if default not in (None, MISSING) for word in ([f"--{name}"] if type_ is bool else [f"--{name}", str(default)])]
    given = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--report_to", "none", *argv, "--validation_prompt", "a house", "a car", "--validation_image", "a.png", "b.png", "--print_config"]
    assert main(given) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["validation_image"] == ["a.png", "b.png"] and shown["validation_prompt"] == ["a house", "a car"]


@pytest.mark.parametrize("kind, Pipeline", [("controlnet", StableDiffusionXLControlNetPipeline), ("adapter", StableDiffusionXLAdapterPipeline), ("small", StableDiffusionXLControlNetPipeline)])
def test_stock_diffusers_loads_the_result_and_draws_the_pictures_of_the_run(all_steps, steered, kind, Pipeline, toy, toy_model, mapped):
    live = toy()
    before = {name: [p.clone() for p in getattr(live, name).parameters()] for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
    result = steered(kind, components=live, validation_prompt=["a house", "a car"], validation_image=[str(mapped / "maps" / f"{i}.png") for i in (0, 1)], num_validation_images=1, learning_rate=1e-2)
    for name, old in before.items(): assert all(map(torch.equal, old, getattr(live, name).parameters())), name  # the base model is as it was
    Kind = TRAIN[kind][2]
    loaded = Kind.from_pretrained(str(result.output_dir))
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in live.control.state_dict().items())
    pipeline = Pipeline.from_pipe(StableDiffusionXLPipeline.from_pretrained(str(toy_model)), **{part_of(kind): loaded})
    pipeline.set_progress_bar_config(disable=True)
    draw = lambda prompt, file: 255*pipeline(prompt, image=Image.open(mapped / "maps" / file), generator=torch.Generator().manual_seed(0), num_inference_steps=20, guidance_scale=3.0, height=64, width=64, output_type="np").images[0]
    gap = lambda a, b: abs(a - np.asarray(b)).max()
    own = [Image.open(result.output_dir / f"image_{i}.png") for i in range(2)]
    assert gap(draw("a house", "0.png"), own[0]) <= 1 and gap(draw("a car", "1.png"), own[1]) <= 1
    assert gap(draw("a house", "1.png"), draw("a house", "0.png")) > 1e-4  # the map makes a difference


@pytest.mark.parametrize("kind", TRAIN)
@pytest.mark.parametrize("options", [dict(), dict(use_ema=True, gradient_accumulation_steps=2, gradient_checkpointing=True, proportion_empty_prompts=0.5), dict(cache_latents=False, random_flip=True, optimizer="adafactor")], ids=str)
def test_resume_is_exact(steered, kind, options):
    options = dict(options, max_train_steps=4, checkpointing_steps=1, lr_scheduler="cosine", lr_warmup_steps=1, checkpoints_total_limit=None)
    folder = steered(kind, "straight", **options).output_dir
    straight = lasting(folder)
    for k in (1, 3): assert lasting(steered(kind, f"from-{k}", **options, resume_from_checkpoint=str(folder / f"checkpoint-{k}")).output_dir) == straight, k


@pytest.mark.parametrize("kind", TRAIN)
def test_every_weight_learns_and_the_validation_loss_sees_it(steered, kind, toy):
    live, fresh = toy(), toy()
    result = steered(kind, components=live, max_train_steps=4, learning_rate=1e-2)
    start = steered(kind, "none", components=fresh, max_train_steps=1, learning_rate=0.0)
    moved = [not torch.equal(a, b) for a, b in zip(live.control.state_dict().values(), fresh.control.state_dict().values())]
    assert sum(moved) == len(moved) and start.validation_loss_after == start.validation_loss_before
    assert result.validation_loss_before == start.validation_loss_before != result.validation_loss_after


def test_the_map_is_cut_as_its_picture_is_and_the_cache_changes_nothing(steered, tmp_path, make_pictures, toy_model, toy):
    "Cropped and mirrored alike: where the map is the negative, picture and map still add up to white."
    wide = add_maps(make_pictures(3, name="wide", size=(64, 96)))
    config = ControlNetConfig(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(wide), resolution=64, train_batch_size=2, max_train_steps=2, random_flip=True, seed=0, report_to="none",
        output_dir=str(tmp_path / "o"))
    run = open_controlnet(config, toy(), log=lambda text: None)
    try:
        for micro in run.sampler.micro_steps(0, 2, 0):
            for prepared in run.loader.prepare(micro): assert (prepared.pixels + prepared.extra["conditioning"]).abs().max() < 0.05
            batch, *_ = run.loader.batch(micro, run.loader.prepare(micro))
            assert batch.extra["conditioning"].shape == (len(batch.latents), 3, 64, 64)
    finally: run.close()
    square = dict(max_train_steps=3, random_flip=True)
    logs = [steered("controlnet", name, **square, **more).losses for name, more in (("kept", {}), ("fresh", dict(cache_latents=False)), ("disk", dict(cache_latents_to_disk=True)))]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5) and logs[0] == pytest.approx(logs[2], rel=1e-5)


def test_maps_in_a_folder_of_their_own_and_in_a_table_train_alike(steered, mapped, tmp_path, make_pictures):
    import datasets
    datasets.disable_progress_bars()
    wanted = steered("controlnet", "column").losses
    plain = make_pictures(5, name="plain")
    assert steered("controlnet", "folder", train_data_dir=str(plain), conditioning_data_dir=str(mapped / "maps")).losses == wanted
    rows = dict(image=[str(mapped / f"{i}.png") for i in range(5)], text=[f"picture {i}" for i in range(5)], edges=[str(mapped / "maps" / f"{i}.png") for i in range(5)])
    table = datasets.Dataset.from_dict(rows)
    for name in ("image", "edges"): table = table.cast_column(name, datasets.Image())
    table.save_to_disk(tmp_path / "table")
    found = steered("controlnet", "table", train_data_dir=None, dataset_name=str(tmp_path / "table"), conditioning_image_column="edges", cache_dir=str(tmp_path / "cache")).losses
    assert found == wanted


@pytest.mark.parametrize("kind", ["controlnet", "small"])
def test_a_trained_controlnet_goes_on_at_its_size(steered, kind):
    first, words = steered(kind, "first", learning_rate=1e-2), "A small ControlNet without attention, which steers" if kind == "small" else "A ControlNet, which steers"
    then = steered("controlnet", "then", controlnet_model_name_or_path=str(first.output_dir))
    assert then.validation_loss_before == pytest.approx(first.validation_loss_after, rel=1e-5)
    for run in (first, then): assert words in (run.output_dir / "README.md").read_text()
    assert [yaml.safe_load((run.output_dir / "config.yaml").read_text())["controlnet_size"] for run in (first, then)] == ["small" if kind == "small" else None, None]


def test_a_small_controlnet_is_the_full_one_without_attention(toy, tmp_path):
    "It begins as the UNet's, says nothing yet, and hears of the prompt by the pooled vector alone."
    parts = toy()
    full, small = new_controlnet(parts, 3), new_controlnet(parts, 3, "small")
    own, theirs, unet = small.state_dict(), full.state_dict(), parts.unet.state_dict()
    for name, p in own.items(): assert torch.equal(p, theirs[name]), name
    copied = {name for name in own if not name.startswith("controlnet_")}
    assert copied == {name for name in unet if name.startswith(("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block.resnets.0")) and ".attentions." not in name}
    for name in copied: assert torch.equal(own[name], unet[name]), name
    zero = [name for name in own if name.startswith(("controlnet_down_blocks", "controlnet_mid_block"))]
    assert len(zero) == 2*len(small.controlnet_down_blocks) + 2 and not any(own[name].any() for name in zero)
    assert not small.attn_processors and full.attn_processors and count_parameters(small) < count_parameters(full)
    place = save_control(small, tmp_path / "small").parent
    told, again = json.loads((place / "config.json").read_text()), ControlNetModel.from_pretrained(str(place))
    assert set(told["down_block_types"]) == {"DownBlock2D"} and told["mid_block_type"] == "UNetMidBlock2D" and all(torch.equal(p, own[name]) for name, p in again.state_dict().items())
    draw = lambda name: torch.randn(2, 4, 8, 8, generator=seeded(name))
    (words, pooled), (others, vectors) = (encode_prompts(parts, [text]*2) for text in ("a red house", "a dog"))
    def added(control, words, pooled): # what a network adds to the UNet, in one vector
        batch = SimpleNamespace(prompt_embeds=words, pooled_prompt_embeds=pooled, time_ids=torch.full((2, 6), 64.))
        with torch.no_grad(): found = control_residuals(control, draw("noise"), torch.tensor([500, 20]), batch, draw("map")[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3).sigmoid(), torch.float32)
        return torch.cat([x.flatten() for x in (*found["down_block_additional_residuals"], found["mid_block_additional_residual"])])
    assert not added(small, words, pooled).any()
    for control in (small, full):
        for block in (*control.controlnet_down_blocks, control.controlnet_mid_block): torch.nn.init.dirac_(block.weight)
    assert torch.equal(added(small, words, pooled), added(small, others, pooled)) and not torch.equal(added(full, words, pooled), added(full, others, pooled))
    assert not torch.equal(added(small, words, pooled), added(small, words, vectors))


@pytest.mark.parametrize("kind, other, told", [("small", "controlnet", "controlnet_size (was 'small', now None)"), ("controlnet", "small", "controlnet_size (was None, now 'small')")])
def test_a_resumed_run_keeps_its_size(steered, kind, other, told):
    folder = steered(kind, max_train_steps=1, checkpointing_steps=1).output_dir / "checkpoint-1"
    for more in (dict(), dict(resume_with_changes="controlnet_size")):
        with pytest.raises(CourseError) as caught: steered(other, "on", resume_from_checkpoint=str(folder), **more)
        assert (told if not more else "cannot name controlnet_size") in str(caught.value)


@pytest.mark.parametrize("words, message", [([], "no data was given"), (["--train_data_dir", "{plain}"], "no column 'conditioning_image'"), (["--train_data_dir", "{pictures}", "--conditioning_image_column", "depth"], "no column 'depth'"),
    (["--train_data_dir", "{pictures}", "--rank", "4"], "rank"), (["--train_data_dir", "{pictures}", "--controlnet_model_name_or_path", "{plain}"], "does not load as a ControlNetModel"),
    (["--train_data_dir", "{pictures}", "--controlnet_size", "small", "--controlnet_model_name_or_path", "{plain}"], "leave one of them out"), (["--train_data_dir", "{pictures}", "--controlnet_size", "smal"], "choose from 'full', 'small'"),
    (["--train_data_dir", "{plain}", "--conditioning_data_dir", "{plain}/none"], "conditioning_data_dir"),
    (["--train_data_dir", "{pictures}", "--validation_prompt", "a house"], "belong together"), (["--train_data_dir", "{pictures}", "--validation_prompt", "a", "b", "--validation_image", "a", "b", "c"], "differ in number"),
    (["--train_data_dir", "{pictures}", "--validation_prompt", "a", "--validation_image", "{pictures}/metadata.jsonl"], "cannot be read as a picture")], ids=lambda one: one if isinstance(one, str) else None)
def test_bad_input_is_one_clear_sentence(words, message, tmp_path, toy_model, mapped, make_pictures, capsys):
    plain = make_pictures(2, name="plain")
    argv = ["--pretrained_model_name_or_path", str(toy_model), "--resolution", "64", "--output_dir", str(tmp_path / "o"), "--report_to", "none", "--max_train_steps", "1"]
    assert controlnet_main(argv + [word.format(pictures=mapped, plain=plain) for word in words]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and told.strip().count("\n") == 0


@pytest.mark.parametrize("spoil, message", [(lambda file: file.unlink(), "conditioning picture 1.png"), (lambda file: file.write_bytes(b""), "empty"), (lambda file: Image.new("RGB", (32, 64)).save(file), "32 x 64")])
def test_a_broken_map_names_its_picture_and_may_be_skipped(spoil, message, steered, mapped):
    spoil(mapped / "maps" / "1.png")
    with pytest.raises(CourseError, match=message) as caught: steered("controlnet")
    assert "1.png" in str(caught.value)
    assert steered("controlnet", "skipped", on_problem="skip").report.records.__len__() == 4


def test_an_adapter_says_which_resolutions_it_can_see(steered):
    with pytest.raises(CourseError, match="multiple of 32"): steered("adapter", resolution=72)


def test_the_cubic_law_is_that_of_the_reference_script():
    from sdxl_course.model.noise import draw_timestep, timestep_weights
    weights, uniform = timestep_weights(1000, "cubic"), torch.rand(20000, generator=seeded("cubic"), dtype=torch.float64)
    ours = torch.tensor([draw_timestep(float(u), weights) for u in uniform[:2000]])
    theirs = ((1 - uniform**3)*1000).long()
    for share in (0.1, 0.25, 0.5, 0.75): assert abs(float(ours.double().quantile(share)) - float(theirs.double().quantile(share))) < 25
    assert float(weights.sum()) == pytest.approx(1) and weights[999] > weights[500] > weights[0]


def test_a_card_shows_how_the_result_is_used(steered, mapped):
    folder = steered("controlnet", validation_prompt=["a house"], validation_image=[str(mapped / "maps" / "0.png")], num_validation_images=1).output_dir
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "StableDiffusionXLControlNetPipeline.from_pipe(pipeline, controlnet=controlnet)" in code and "image=load_image" in code
    assert command(["--help"]) == 0


# ---------------------------------------------------------------- drawing: generate --controlnet and --adapter

PIPELINES = dict(controlnet=(new_controlnet, ControlNetModel, StableDiffusionXLControlNetPipeline), adapter=(new_adapter, T2IAdapter, StableDiffusionXLAdapterPipeline))
NETWORKS = PIPELINES | dict(small=(partial(new_controlnet, size="small"), ControlNetModel, StableDiffusionXLControlNetPipeline))
QUICK = dict(num_inference_steps=4, guidance_scale=3.0)


def gap(ones, others): return max(int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in zip(ones, others, strict=True))


@pytest.fixture(scope="module")
def networks(toy, tmp_path_factory):
    "Folders of a ControlNet, of a T2I-Adapter and of a small ControlNet that say something loud."
    home, parts = tmp_path_factory.mktemp("networks"), toy()
    for kind, (new, _, _) in NETWORKS.items():
        network = new(parts, 0)
        for name, p in network.named_parameters(): p.data += 0.15*torch.randn(p.shape, generator=seeded(name))
        save_control(network, home / kind)
    return {kind: home / kind for kind in NETWORKS}


@pytest.fixture
def lines(tmp_path):
    "A picture that steers, wider than high."
    (tmp_path / "maps").mkdir()
    noise = np.random.default_rng(3).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((144, 96), Image.Resampling.NEAREST).save(tmp_path / "maps" / "lines.png")
    return tmp_path / "maps" / "lines.png"


@pytest.fixture
def drawn(toy_model, tmp_path):
    "A function that runs `generate` with the toy model and gives its pictures."
    def draw(*flags, name="out", model=True):
        words = [*(["--model", toy_model] if model else []), *flags, "--device", "cpu", "--output_dir", tmp_path / name]
        assert generate_main([str(word) for word in words]) == 0
        return [Image.open(path) for path in sorted((tmp_path / name).glob("image_*.png"))]
    return draw


@pytest.mark.parametrize("kind", NETWORKS)
def test_generate_draws_what_the_stock_pipeline_draws(kind, networks, lines, drawn, toy_model):
    _, Network, Pipeline = NETWORKS[kind]
    part = part_of(kind)
    ours = drawn("--prompt", "a house", "a cat", "--seed", "5", "--num_inference_steps", "4", "--guidance_scale", "3", f"--{part}", networks[kind], "--control_image", lines, "--control_scale", "0.7")
    stock = Pipeline.from_pretrained(str(toy_model), **{part: Network.from_pretrained(str(networks[kind]))}, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    shown = ImageOps.fit(Image.open(lines), (64, 64), Image.Resampling.LANCZOS)  # the middle, as high as it is
    draw = lambda prompt, picture, scale: stock(prompt, image=picture, generator=torch.Generator().manual_seed(5), height=64, width=64, **QUICK, **{f"{part}_conditioning_scale": scale}).images[0]
    theirs = [draw(prompt, shown, 0.7) for prompt in ("a house", "a cat")]
    assert gap(ours, theirs) <= 1
    assert gap(ours, [draw(prompt, shown, 0.2) for prompt in ("a house", "a cat")]) > 1 and gap(ours, [draw(prompt, ImageOps.invert(shown), 0.7) for prompt in ("a house", "a cat")]) > 1


@pytest.fixture
def depth(lines):
    "Another picture that steers, from left to right ever nearer."
    ramp = np.linspace(0, 255, 96).astype(np.uint8)[None, :, None].repeat(96, 0).repeat(3, 2)
    Image.fromarray(ramp).save(lines.with_name("depth.png"))
    return lines.with_name("depth.png")


@pytest.mark.parametrize("kind", PIPELINES)
def test_two_networks_steer_together_as_in_stock_diffusers(kind, networks, lines, depth, drawn, toy, toy_model, tmp_path, capsys):
    "Two networks of a kind, a picture and a strength each; one record that draws again; in batches as one by one."
    _, Network, Pipeline = PIPELINES[kind]
    second = save_control(NETWORKS[kind][0](toy(), 5), tmp_path / "second").parent if kind == "adapter" else networks["small"]
    flags = ["--prompt", "a house", "a cat", "--seed", "5", "--num_inference_steps", "4", "--guidance_scale", "3", f"--{kind}", networks[kind], f"--{kind}", second]
    maps = ["--control_image", lines, depth]
    ours = drawn(*flags, *maps, "--control_scale", "0.7", "0.4")
    loaded = [Network.from_pretrained(str(folder)) for folder in (networks[kind], second)]
    stock = Pipeline.from_pretrained(str(toy_model), **{kind: MultiAdapter(loaded) if kind == "adapter" else loaded}, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    shown = [ImageOps.fit(Image.open(one), (64, 64), Image.Resampling.LANCZOS) for one in (lines, depth)]
    draw = lambda prompt, pictures, scales: stock(prompt, image=pictures, generator=torch.Generator().manual_seed(5), height=64, width=64, **QUICK, **{f"{kind}_conditioning_scale": scales}).images[0]
    assert gap(ours, [draw(prompt, shown, [0.7, 0.4]) for prompt in ("a house", "a cat")]) <= 1
    assert gap(ours, [draw(prompt, shown, [0.7, 0.0]) for prompt in ("a house", "a cat")]) > 1 and gap(ours, [draw(prompt, shown[::-1], [0.7, 0.4]) for prompt in ("a house", "a cat")]) > 1
    assert gap(drawn(*flags, *maps, "--control_scale", "0.5", name="one"), drawn(*flags, *maps, "--control_scale", "0.5", "0.5", name="each")) == 0
    text = Image.open(tmp_path / "out" / "image_001.png").text
    assert text["control_image"] == "lines.png, depth.png" and text["control_scale"] == "0.7, 0.4" and f'Weight: 0.7", ControlNet 1: "Module: none, Model: {second.name}, Weight: 0.4"' in text["parameters"]
    again = ["--from", str(tmp_path / "out" / "image_001.png"), "--device", "cpu", "--output_dir", str(tmp_path / "again")]
    capsys.readouterr()
    assert generate_main(again) == 0 and "to the last bit" in capsys.readouterr().out
    pipeline = follow_picture(load_pipeline(toy_model, device="cpu"), **{kind: [str(networks[kind]), str(second)]})
    options = dict(num_inference_steps=4, **{f"{kind}_conditioning_scale": [0.7, 0.4]})
    many = lambda **more: generate_controlled(pipeline, ["a house", "a cat", "a car"], [shown, shown[::-1], shown], [5, 5, 5], **options, **more)
    assert gap(many(), many(batch_size=1)) <= 1 and gap(many()[1:2], [draw("a cat", shown[::-1], [0.7, 0.4])]) <= 1 and gap(many()[:2], ours) > 1


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_steered_picture_says_so_and_is_drawn_again(kind, networks, lines, drawn, tmp_path, capsys):
    drawn("--prompt", "a house", "a cat", "--num_inference_steps", "3", f"--{kind}", networks[kind], "--control_image", lines, "--control_scale", "0.7", "--height", "64", "--width", "96")
    one = tmp_path / "out" / "image_001.png"
    text = Image.open(one).text
    assert f'ControlNet 0: "Module: none, Model: {kind}, Weight: 0.7"' in text["parameters"] and (text[kind], text["control_image"], text["control_scale"]) == (kind, "lines.png", "0.7")
    used = {file["option"]: file for file in json.loads(text["sdxl_course"])["files"]}
    assert used["control_image"]["path"] == "../maps/lines.png" and used["control_image"]["sha256"] == sha256_of(lines) and used[kind]["name"] == kind
    again = lambda *more, name="again": generate_main(["--from", str(one), "--device", "cpu", "--output_dir", str(tmp_path / name), *map(str, more)])
    capsys.readouterr()
    assert again() == 0 and "to the last bit" in capsys.readouterr().out
    assert again("--seed", 9) == 0 and "other settings" in capsys.readouterr().out
    other = "adapter" if kind == "controlnet" else "controlnet"
    assert again(f"--{other}", networks[other]) == 0  # in place of the first, not beside it
    moved = lines.rename(lines.with_name("moved.png"))
    for spoil, words in ((lambda: None, "is not at"), (lambda: ImageOps.invert(Image.open(moved)).save(lines), "is another file at")):
        spoil(), capsys.readouterr()
        assert again() == 2
        told = capsys.readouterr().err
        assert words in told and "lines.png" in told and "--control_image" in told and told.strip().count("\n") == 0
    assert again("--control_image", moved) == 0 and "to the last bit" in capsys.readouterr().out
    one.parent.joinpath("lines.png").write_bytes(moved.read_bytes())
    assert again() == 0 and "to the last bit" in capsys.readouterr().out  # beside the picture, known by its hash


def test_pictures_of_before_there_could_be_several_networks_are_drawn_again(networks, lines, drawn, tmp_path, capsys):
    "Their records have one number for the strength, 1.0 too where nothing steered."
    for flags, old in (([], 1.0), (["--controlnet", networks["controlnet"], "--control_image", lines, "--control_scale", "0.7"], 0.7)):
        drawn("--prompt", "a cat", "--num_inference_steps", "3", "--height", "64", "--width", "64", *flags)
        picture = tmp_path / "out" / "image_000.png"
        text = Image.open(picture).text
        record, notes = json.loads(text["sdxl_course"]), PngInfo()
        record["settings"]["control_scale"] = old
        for name, value in (text | dict(sdxl_course=json.dumps(record))).items(): notes.add_text(name, value)
        Image.open(picture).save(picture, pnginfo=notes)
        capsys.readouterr()
        assert generate_main(["--from", str(picture), "--device", "cpu", "--output_dir", str(tmp_path / "again")]) == 0
        assert "to the last bit" in capsys.readouterr().out


def test_adapters_that_see_pictures_at_other_sizes_are_refused_together(networks, lines, toy, toy_model, tmp_path, capsys):
    unlike = T2IAdapter(in_channels=3, channels=new_adapter(toy(), 0).config.channels, num_res_blocks=1, adapter_type="full_adapter_xl", downscale_factor=8)
    save_control(unlike, tmp_path / "unlike")
    assert generate_main(["--model", str(toy_model), "--prompt", "a cat", "--device", "cpu", "--output_dir", str(tmp_path / "out"), "--adapter", str(networks["adapter"]), str(tmp_path / "unlike"), "--control_image", str(lines), str(lines)]) == 2
    told = capsys.readouterr().err
    assert "made alike" in told and told.strip().count("\n") == 0
    with pytest.raises(CourseError, match="2 strengths for 3 networks"): for_each([0.5, 1.0], 3)


@pytest.mark.parametrize("kind", PIPELINES)
def test_steering_goes_together_with_the_other_options(kind, networks, lines, toy_model, tmp_path):
    "Silent at a scale of zero; with LoRAs, a refiner, negative prompts and an interval of guidance."
    pipeline = load_pipeline(toy_model, device="cpu")
    plain = generate(pipeline, ["a house", "a cat"], [1, 2], **QUICK)
    unet = load_pipeline(toy_model, device="cpu").unet
    for name, p in lora_parameters(add_lora(unet, rank=2, generator=seeded(1))): p.data = 2*torch.randn(p.shape, generator=seeded(name))
    styled = load_pipeline(toy_model, lora=save_lora(tmp_path / "style", unet), device="cpu")
    follow = lambda one: follow_picture(one, **{kind: str(networks[kind])})
    draw = lambda one, scale=1.0, seeds=(1, 2), **more: generate(one, ["a house", "a cat"], list(seeds), **QUICK | more, **steering(one, lines, (64, 64), scale))
    steered, both = follow(pipeline), follow(styled)
    assert gap(draw(steered, 0), plain) <= 1 < gap(draw(steered), plain)
    assert gap(draw(both), draw(steered)) > 1 and gap(draw(both), generate(styled, ["a house", "a cat"], [1, 2], **QUICK)) > 1
    set_lora_scale(both, 0.0)
    assert gap(draw(both), draw(steered)) <= 1
    away, usual = (draw(steered, 0.2, guidance_scale=20.0, **more) for more in (dict(negative_prompt=["a dog", None]), {}))
    assert gap(away[1:], usual[1:]) <= 1 < gap(away[:1], usual[:1])
    nowhere, bare = (draw(steered, 0.2, **more) for more in (dict(guidance_scale=20.0, guidance_interval=(1e5, 1e6)), dict(guidance_scale=1.0)))
    assert gap(nowhere, bare) <= 1 < gap(usual, bare)
    refiner, seeds = load_refiner(pipeline, make_toy_refiner(tmp_path / "refiner")), lambda: [own_generator(seed) for seed in (1, 2)]
    latents = draw(steered, seeds=(own := seeds()), latents=True, denoising_end=0.5)
    finished = refine(refiner, latents, ["a house", "a cat"], own, 0.5, **QUICK)
    assert gap(finished, draw(steered)) > 1


def test_generate_steers_lets_the_refiner_finish_and_films(networks, lines, drawn, tmp_path, capsys):
    drawn("--prompt", "a house", "--num_inference_steps", "4", "--controlnet", networks["controlnet"], "--control_image", lines, "--film", name="film")
    assert {"film_000.gif", "film_000.png"} <= files_of(tmp_path / "film").keys()
    flags = ["--prompt", "a house", "--num_inference_steps", "4", "--controlnet", networks["controlnet"], "--control_image", lines]
    pictures = [drawn(*flags, name="plain"), drawn(*flags, "--refiner", make_toy_refiner(tmp_path / "refiner"), "--denoising_end", "0.5", name="refined")]
    assert gap(*pictures) > 1
    assert generate_main(["--from", str(tmp_path / "refined" / "image_000.png"), "--device", "cpu", "--output_dir", str(tmp_path / "again")]) == 0
    assert "to the last bit" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [(["--controlnet", "{controlnet}"], "wanted the picture and one of the networks"), (["--control_image", "{lines}"], "wanted the picture and one of the networks"),
    (["--control_scale", "0.5"], "wanted both of them"), (["--controlnet", "{controlnet}", "{small}", "--control_image", "{lines}"], "wanted as many of both"), (["--adapter", "{adapter}", "--control_image", "{lines}", "{lines}"], "wanted as many of both"),
    (["--controlnet", "{controlnet}", "{small}", "--control_image", "{lines}", "{lines}", "--control_scale", "1", "1", "1"], "wanted one for all, or one for each"), (["--controlnet", "{controlnet}", "--adapter", "{adapter}", "--control_image", "{lines}"], "leave one of them out"),
    (["--adapter", "{adapter}", "--control_image", "{lines}", "--film"], "leave one of them out"), (["--controlnet", "{controlnet}", "--control_image", "{lines}", "--init_image", "{lines}"], "leave one of them out"),
    (["--controlnet", "{controlnet}", "--control_image", "{lines}", "--guidance_rescale", "0.5"], "leave one of them out"), (["--controlnet", "{controlnet}", "--control_image", "{lines}", "--control_scale", "-1"], "--control_scale is -1.0"),
    (["--adapter", "{adapter}", "--control_image", "{lines}", "--height", "72"], "wanted multiples of 32 pixels"), (["--controlnet", "{controlnet}", "--control_image", "{folder}/none.png"], "cannot be read as a picture"),
    (["--controlnet", "{adapter}", "--control_image", "{lines}"], "holds a T2IAdapter: wanted a ControlNetModel"), (["--adapter", "{controlnet}", "--control_image", "{lines}"], "holds a ControlNetModel: wanted a T2IAdapter"),
    (["--adapter", "{folder}", "--control_image", "{lines}"], "does not load as a T2IAdapter"), (["--controlnet", "{wide}", "--control_image", "{lines}"], "reads 8 numbers for a word, the UNet 16")])
def test_what_generate_refuses_to_steer(flags, words, networks, lines, toy, toy_model, tmp_path, capsys):
    if "{wide}" in flags:
        unet = toy().unet
        save_control(new_controlnet(SimpleNamespace(unet=type(unet).from_config({**unet.config, "cross_attention_dim": 8}), vae=toy().vae), 0), tmp_path / "wide")
    named = [flag.format(**networks, lines=lines, folder=tmp_path, wide=tmp_path / "wide") for flag in flags]
    assert generate_main(["--model", str(toy_model), "--prompt", "a cat", "--device", "cpu", "--output_dir", str(tmp_path / "out"), *named]) == 2
    told = capsys.readouterr().err
    assert words in told and told.strip().count("\n") == 0
