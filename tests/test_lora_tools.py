"LoRA tools on files of the real size, from the command line."
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from PIL import Image
from sdxl_course import core
from sdxl_course.app import find_loras
from sdxl_course.core import seeded, write_json
from sdxl_course.inference import main as generate_main
from sdxl_course.lora import main, open_lora
from sdxl_course.model.adapters import adaptable_layers, add_lora, lora_parameters
from sdxl_course.model.architecture import sdxl_architecture, tiny_architecture
from sdxl_course.model.components import NETWORKS, load_components, tiny_path
from sdxl_course.model.lora_files import attach_lora, save_kohya, save_lora
from sdxl_course.model.weight_files import StoredModel, open_stored, stream_tensors, write_model


@pytest.fixture(scope="module")
def sdxl_file(tmp_path_factory):
    "A LoRA of rank 2 for every attention layer of SDXL 1.0 and of its text encoders, in kohya's layout with diffusers' block names."
    parts, tensors = sdxl_architecture(), {}
    for part, prefix, endings in (("unet", "lora_unet", ("to_q", "to_out.0")), ("text_encoder", "lora_te1", ("q_proj",)), ("text_encoder_2", "lora_te2", ("q_proj",))):
        for name, layer in adaptable_layers(getattr(parts, part)).items():
            if not name.endswith(endings): continue
            flat = f"{prefix}_{'' if part == 'unet' or name.startswith('text_model') else 'text_model_'}{name.replace('.', '_')}"
            n = len(tensors)
            tensors[f"{flat}.lora_down.weight"] = torch.full((2, layer.weight.shape[1]), .01 * (1 + n % 3)).tril()
            tensors[f"{flat}.lora_up.weight"] = torch.full((layer.weight.shape[0], 2), .02)
            tensors[f"{flat}.alpha"] = torch.tensor(1.)
    path = tmp_path_factory.mktemp("sdxl") / "style.safetensors"
    save_file(tensors, path, {"ss_network_dim": "2", "modelspec.title": "style"})
    return path


def test_a_file_of_sdxl_is_known_as_such(sdxl_file, capsys, monkeypatch):
    read, parse = [], core.parse_safetensors
    monkeypatch.setattr(core, "parse_safetensors", lambda data: read.append(len(data)) or parse(data))
    assert main(["info", sdxl_file, "--json"]) == 0 and read == [sdxl_file.stat().st_size]  # once
    found = json.loads(capsys.readouterr().out)
    assert found["base"] == "SDXL 1.0" and sorted(found["parts"]) == ["text_encoder", "text_encoder_2", "unet"] and found["metadata"]["modelspec.title"] == "style"
    assert found["parts"]["unet"]["ranks"] == [2] and found["parts"]["unet"]["alphas"] == [1.0] and found["parts"]["text_encoder_2"]["layers"] == 32


@pytest.mark.parametrize("words, files", [(["convert", "--to", "kohya"], 1), (["resize", "--rank", "1"], 1), (["merge"], 2)], ids=str)
def test_a_tool_reads_each_file_once(sdxl_file, tmp_path, monkeypatch, words, files):
    read, parse = [], core.parse_safetensors
    monkeypatch.setattr(core, "parse_safetensors", lambda data: read.append(len(data)) or parse(data))
    assert main([words[0], *[sdxl_file]*files, *words[1:], "--output", tmp_path / "out.safetensors"]) == 0
    assert read == [sdxl_file.stat().st_size]*files


@pytest.mark.parametrize("layout, name", [("diffusers", "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"), ("kohya", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight"),
    ("sgm", "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_A.weight"), ("peft", "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight")])
def test_every_layout_comes_back_with_every_bit(sdxl_file, layout, name, tmp_path):
    there = tmp_path / ("there" if layout == "peft" else "there.safetensors")
    assert main(["convert", sdxl_file, "--to", layout, "--output", there]) == 0
    assert name in load_file(there / "unet" / "adapter_model.safetensors" if layout == "peft" else there)
    first, again = (open_lora(path).layers for path in (sdxl_file, there))
    assert {part: set(ones) for part, ones in first.items()} == {part: set(ones) for part, ones in again.items()}
    for part, ones in first.items():
        for module, one in ones.items(): assert torch.equal(one.A, again[part][module].A) and torch.equal(one.B, again[part][module].B) and one.alpha == again[part][module].alpha


def test_what_a_file_says_of_itself_is_kept_but_for_what_is_no_longer_true(sdxl_file, tmp_path, capsys):
    "The title and the trigger words stay through every tool; rank and alpha are those of the new tensors, and A1111's layout is one step away."
    tensors = load_file(sdxl_file)
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    for file, words in zip(files, ("sks chair", "old book")):
        save_file(tensors, file, {"ss_network_dim": "2", "modelspec.title": "style", "modelspec.trigger_phrase": words, "modelspec.license": "mit", "sshs_model_hash": "0"})
    notes = lambda path: open_lora(path).notes
    for words in (["convert", files[0], "--to", "kohya"], ["resize", files[0], "--rank", "1", "--to", "kohya"], ["merge", *files, "--to", "kohya"], ["resize", files[0], "--energy", "0.9"]):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        assert main([*words, "--output", out]) == 0
        said = notes(out)
        assert said["modelspec.title"] == "style" and said["modelspec.license"] == "mit" and "sshs_model_hash" not in said, words
        assert said["modelspec.trigger_phrase"] == ("sks chair, old book" if words[0] == "merge" else "sks chair")
        if "kohya" in words: assert said["ss_network_dim"] == {"convert": "2", "resize": "1", "merge": "4"}[words[0]] and said["ss_base_model_version"] == "sdxl_base_v1-0"
        else: assert "ss_network_dim" not in said
    assert main(["info", tmp_path / "2.safetensors"]) == 0 and "problem: its notes" not in capsys.readouterr().out


def test_learnt_words_are_carried_along_or_told(sdxl_file, tmp_path, capsys):
    file, words = tmp_path / "words.safetensors", {f"bundle_emb.<s0>.{key}": torch.full((2, n), 0.5) for key, n in (("clip_l", 768), ("clip_g", 1280))}
    save_file({**load_file(sdxl_file), **words}, file)
    assert main(["info", file]) == 0 and "learnt words: <s0>" in capsys.readouterr().out
    for layout, kept in (("kohya", True), ("sgm", True), ("diffusers", False)):
        assert main(["convert", file, "--to", layout, "--output", tmp_path / f"{layout}.safetensors"]) == 0
        assert (words.keys() <= load_file(tmp_path / f"{layout}.safetensors").keys()) == kept
        assert ("left out: the learnt words <s0>" in capsys.readouterr().out) != kept
    assert all(torch.equal(load_file(tmp_path / "kohya.safetensors")[name], tensor) for name, tensor in words.items())
    save_file({**load_file(sdxl_file), **{name: tensor + 1 for name, tensor in words.items()}}, tmp_path / "other.safetensors")
    assert main(["merge", file, tmp_path / "other.safetensors", "--to", "kohya", "--output", tmp_path / "both.safetensors"]) == 2
    assert "teach the word <s0> a meaning of its own" in capsys.readouterr().err and not (tmp_path / "both.safetensors").exists()
    assert main(["merge", file, "--into", "tiny", "--to", "kohya", "--output", tmp_path / "model"]) == 2 and "--into writes a model" in capsys.readouterr().err


def test_a_folder_of_peft_draws_and_trains_on_like_a_file(tiny_style, tmp_path, capsys):
    "With its own alpha, in UNet and both text encoders; a kind that is no LoRA is told."
    assert main(["convert", tiny_style, "--to", "peft", "--output", tmp_path / "peft"]) == 0
    first, again = (open_lora(path).layers for path in (tiny_style, tmp_path / "peft"))
    assert sorted(first) == sorted(again) and {one.alpha for ones in again.values() for one in ones.values()} == {3.0}
    parts = load_components("tiny")
    assert attach_lora(parts.pipeline(), tmp_path / "peft") == tmp_path / "peft"
    module, one = next(iter(first["text_encoder_2"].items()))
    assert (parts.text_encoder_2.get_submodule(module).get_delta_weight("default") - one.delta).abs().max() < 1e-6
    assert generate_main(["--prompt", "a house", "--lora", str(tmp_path / "peft"), "--num_inference_steps", "1", "--device", "cpu", "--output_dir", str(tmp_path / "drawn")]) == 0
    assert generate_main(["--prompt", "a house", "--lora", str(tiny_style), "--num_inference_steps", "1", "--device", "cpu", "--output_dir", str(tmp_path / "same")]) == 0
    pixels = lambda name: Image.open(tmp_path / name / "image_000.png").tobytes()
    assert pixels("drawn") == pixels("same")
    assert find_loras([tmp_path / "peft"]) == [str(tmp_path / "peft")]
    weights = tmp_path / "peft" / "unet" / "adapter_model.safetensors"
    assert {one.alpha for one in open_lora(weights).layers["unet"].values()} == {3.0}      # the file alone says no alpha, its neighbour does
    alone = open_lora(tmp_path / "peft" / "text_encoder", "tiny").layers  # one network's folder
    assert list(alone) == ["text_encoder"] and len(alone["text_encoder"]) == len(first["text_encoder"])
    config = tmp_path / "peft" / "unet" / "adapter_config.json"
    config.write_text(config.read_text().replace("LORA", "OFT"))
    assert main(["info", tmp_path / "peft"]) == 2 and "an adapter of the kind OFT: wanted a LoRA" in capsys.readouterr().err


def test_what_is_read_is_never_overwritten(sdxl_file, capsys):
    before = sdxl_file.read_bytes()
    for words in (["convert", sdxl_file, "--to", "kohya"], ["resize", sdxl_file, "--rank", "1"], ["merge", sdxl_file, sdxl_file]):
        assert main([*words, "--output", sdxl_file]) == 2 and "there already" in capsys.readouterr().err
    assert sdxl_file.read_bytes() == before


@pytest.mark.parametrize("words, told", [(["convert"], "convert FILE --to LAYOUT"), (["merge", "--output", "x"], "merge FILE FILE"), (["extract", "tiny", "--rank", "1", "--output", "x"], "got 1 models"),
    (["info", "style.ckpt"], "no LoRA at"), (["resize", "FILE", "--energy", "2", "--output", "x"], "--energy is 2.0: wanted more than 0 and at most 1"), (["merge", "FILE", "--weights", "nan", "--output", "x"], "--weights is nan")])
def test_mistakes_get_one_sentence(sdxl_file, words, told, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main([str(sdxl_file) if word == "FILE" else word for word in words]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_pickle_is_refused(tmp_path, capsys):
    torch.save({"a": torch.zeros(1)}, tmp_path / "style.pt")
    assert main(["info", tmp_path / "style.pt"]) == 2 and "can run code" in capsys.readouterr().err


def test_a_merge_of_a_lora_with_its_opposite_changes_nothing(sdxl_file, tmp_path, capsys):
    assert main(["merge", sdxl_file, sdxl_file, "--weights", "1", "-1", "--rank", "2", "--output", tmp_path / "none.safetensors"]) == 0
    assert main(["info", tmp_path / "none.safetensors", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert all(one["norm"] < 1e-3 for one in found["parts"].values())


# ------------------------------------------------ whole models, a tensor at a time

@pytest.fixture(scope="module")
def tiny_style(tmp_path_factory):
    "A LoRA for sdxl-tiny: attention and convolutions of the UNet, attention of both text encoders."
    parts, path = tiny_architecture(0), tmp_path_factory.mktemp("tiny") / "style.safetensors"
    for part, layers in dict(unet="attention+convolution", text_encoder="attention", text_encoder_2="attention").items():
        network = add_lora(getattr(parts, part), rank=2, alpha=3, layers=layers, generator=seeded("tools", part))
        for name, p in lora_parameters(network): p.data = 0.05*torch.randn(p.shape, generator=seeded("tools", part, name))
    return save_lora(path, parts.unet, parts.text_encoder, parts.text_encoder_2)


def weights_of(components):
    return {(part, name): t for part in NETWORKS for name, t in getattr(components, part).state_dict().items() if not name.endswith("position_ids")}


def test_a_merge_into_a_folder_and_into_a_file_is_what_peft_merges(tiny_style, tmp_path):
    for output in ("model", "model.safetensors"): assert main(["merge", tiny_style, "--into", "tiny", "--weights", "0.5", "--output", tmp_path / output]) == 0
    pipeline = load_components("tiny").pipeline()
    attach_lora(pipeline, tiny_style)
    pipeline.fuse_lora(lora_scale=0.5)
    pipeline.unload_lora_weights()
    for made in (load_components(tmp_path / "model"), load_components(tmp_path / "model.safetensors", config="tiny")):
        found, changed = weights_of(made), 0
        for (part, name), before in weights_of(load_components("tiny")).items():
            wanted = dict(getattr(pipeline, part).state_dict())[name]
            torch.testing.assert_close(found[part, name], wanted, atol=1e-5, rtol=0, msg=f"{part} {name}")
            changed += not torch.equal(before, found[part, name])
        assert changed == sum(len(ones) for ones in open_lora(tiny_style).layers.values())


def test_single_files_go_in_everywhere(tiny_style, tmp_path, capsys):
    plain, tuned = tmp_path / "plain.safetensors", tmp_path / "tuned.safetensors"
    write_model(open_stored("tiny"), plain, dtype=torch.float32)
    tiny = ["--architecture", "tiny"]
    assert main(["merge", tiny_style, "--into", plain, *tiny, "--output", tuned]) == 0
    assert main(["extract", tuned, plain, *tiny, "--rank", "2", "--output", tmp_path / "found.safetensors"]) == 0
    assert main(["info", tmp_path / "found.safetensors", "--model", plain, *tiny]) == 0
    first, again = (open_lora(path).layers for path in (tiny_style, tmp_path / "found.safetensors"))
    for part, ones in first.items():
        assert ones.keys() == again[part].keys()
        for name, one in ones.items(): torch.testing.assert_close(again[part][name].delta, one.delta, atol=1e-5, rtol=1e-3)
    assert main(["merge", tiny_style, "--into", tuned, *tiny, "--weights", "-1", "--output", tmp_path / "back"]) == 0   # a folder of a file
    found = weights_of(load_components(tmp_path / "back"))
    for key, wanted in weights_of(load_components("tiny")).items(): torch.testing.assert_close(found[key], wanted, atol=1e-5, rtol=0)
    capsys.readouterr()
    assert main(["merge", tiny_style, "--into", plain, "--output", tmp_path / "none"]) == 2 and "--architecture" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_merge_that_fails_leaves_nothing(tiny_style, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_path(), broken, ignore=shutil.ignore_patterns("judges", "vision*"))
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"][0] = torch.nan
    save_file(tensors, path)
    assert main(["merge", tiny_style, "--into", broken, "--output", tmp_path / "out.safetensors"]) == 2
    assert "not finite" in capsys.readouterr().err and [one.name for one in tmp_path.iterdir()] == ["broken"]


def anonymous_memory():
    "Bytes of this process that no file stands behind."
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])*1024


linux_only = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
DEEP = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def big_models(tmp_path_factory):
    "Folders of a model before and after one layer learnt, and the bytes of its UNet in fp32: 300 MB in three shards; the largest of its matrices has 15 MB."
    home = tmp_path_factory.mktemp("big")
    config = dict(json.loads((tiny_path() / "unet" / "config.json").read_text()), block_out_channels=[320, 480, 640], attention_head_dim=[5, 10, 20])
    with torch.device("meta"): unet = UNet2DConditionModel.from_config(config)
    shapes = {name: t.shape for name, t in unet.state_dict().items()}
    for folder, learnt in ((home / "base", 0.), (home / "tuned", 1.)):
        for part in ("text_encoder", "text_encoder_2", "vae", "scheduler", "tokenizer", "tokenizer_2"): shutil.copytree(tiny_path() / part, folder / part)
        shutil.copy(tiny_path() / "model_index.json", folder)
        write_json(folder / "unet" / "config.json", config)
        for k in range(3):
            plan = {name: (shapes[name], torch.float16) for name in sorted(shapes)[k::3]}
            stream_tensors(folder / "unet" / f"diffusion_pytorch_model-{k + 1:05}-of-00003.safetensors", plan, lambda name: torch.full(shapes[name], learnt*(name == f"{DEEP}.weight")))
    return home / "base", home / "tuned", sum(4*shape.numel() for shape in shapes.values())


@pytest.fixture
def most_memory(monkeypatch):
    "The most bytes that this process had since the test began, seen whenever a weight is asked for."
    peak, before, get = [0], anonymous_memory(), StoredModel.get
    def watched(self, *place):
        peak[0] = max(peak[0], anonymous_memory() - before)
        return get(self, *place)
    monkeypatch.setattr(StoredModel, "get", watched)
    return peak


@linux_only
def test_a_merge_holds_one_matrix_at_a_time(big_models, most_memory, tmp_path):
    folder, _, size = big_models
    save_file({f"unet.{DEEP}.lora_A.weight": torch.ones(1, 640), f"unet.{DEEP}.lora_B.weight": torch.ones(640, 1)}, tmp_path / "one.safetensors")
    for output in ("whole", "whole.safetensors"):
        assert main(["merge", tmp_path / "one.safetensors", "--into", folder, "--output", tmp_path / output]) == 0
        assert size > 250e6 and most_memory[0] < 0.3*size, (output, most_memory[0], size)
    assert open_stored(tmp_path / "whole").module_weight("unet", DEEP).eq(1).all() and not open_stored(tmp_path / "whole").module_weight("unet", "conv_in").any()


@linux_only
def test_an_extract_holds_one_pair_of_matrices_at_a_time(big_models, most_memory, tmp_path):
    base, tuned, size = big_models
    assert main(["extract", tuned, base, "--rank", "1", "--output", tmp_path / "found.safetensors"]) == 0
    assert most_memory[0] < 0.3*size, (most_memory[0], size)
    layers = open_lora(tmp_path / "found.safetensors", base).layers
    assert list(layers) == ["unet"] and list(layers["unet"]) == [DEEP]
    torch.testing.assert_close(layers["unet"][DEEP].delta, torch.ones(640, 640))


# ------------------------------------------------ one writer

@pytest.mark.parametrize("options", [dict(alpha=3), dict(use_dora=True), dict(use_rslora=True, alpha=3), dict(init="pissa")])
def test_what_a_trainer_writes_is_what_convert_writes(options, tmp_path):
    parts = tiny_architecture(0)
    layers = "attention+feedforward" if "init" in options else "attention+convolution"
    for part in ("unet", "text_encoder"): add_lora(getattr(parts, part), rank=2, layers=layers if part == "unet" else "attention", generator=seeded(part), **options)
    file, kohya = save_lora(tmp_path / "a.safetensors", parts.unet, parts.text_encoder), save_kohya(tmp_path / "k.safetensors", parts.unet, parts.text_encoder)
    assert main(["convert", file, "--to", "kohya", "--output", tmp_path / "kohya.safetensors"]) == main(["convert", kohya, "--output", tmp_path / "diffusers.safetensors"]) == 0
    for first, second in ((kohya, tmp_path / "kohya.safetensors"), (file, tmp_path / "diffusers.safetensors")):
        first, second = load_file(first), load_file(second)
        assert first.keys() == second.keys()
        for name, tensor in first.items(): assert torch.equal(tensor, second[name]), name


# ------------------------------------------------ what is wrong with a file

def test_info_says_what_is_wrong(tiny_style, tmp_path, capsys):
    tensors = load_file(tiny_style)
    idle = {name: 0*t if ".lora_B." in name and name.startswith("text_encoder.") else t for name, t in tensors.items()}
    with safe_open(tiny_style, "pt") as opened: notes = opened.metadata()
    save_file(idle, tmp_path / "idle.safetensors", notes | {"ss_network_dim": "64", "ss_base_model_version": "sd_v1"})
    assert main(["info", tmp_path / "idle.safetensors", "--layers"]) == 0
    said = capsys.readouterr().out
    for told in ("text_encoder: no layer changes anything", "its notes say rank 64, its tensors 2", "made for sd_v1"): assert f"problem: {told}" in said or told in said
    assert said.count("attn1.to_q") > 3                                        # one line a layer
    assert main(["info", tiny_style, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [] and len(found["parts"]["unet"]["effective_ranks"]) == found["parts"]["unet"]["layers"]
