"LoRA tools on files of the real size, from the command line."
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_course.lora import main, open_lora
from sdxl_course.model.adapters import adaptable_layers
from sdxl_course.model.architecture import sdxl_architecture


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


def test_a_file_of_sdxl_is_known_as_such(sdxl_file, capsys):
    assert main(["info", sdxl_file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["base"] == "SDXL 1.0" and sorted(found["parts"]) == ["text_encoder", "text_encoder_2", "unet"] and found["metadata"]["modelspec.title"] == "style"
    assert found["parts"]["unet"]["ranks"] == [2] and found["parts"]["unet"]["alphas"] == [1.0] and found["parts"]["text_encoder_2"]["layers"] == 32


@pytest.mark.parametrize("layout, name", [("diffusers", "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"), ("kohya", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight"),
    ("sgm", "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_A.weight")])
def test_every_layout_comes_back_with_every_bit(sdxl_file, layout, name, tmp_path):
    there = tmp_path / "there.safetensors"
    assert main(["convert", sdxl_file, "--to", layout, "--output", there]) == 0 and name in load_file(there)
    first, again = (open_lora(path)[0] for path in (sdxl_file, there))
    assert {part: set(ones) for part, ones in first.items()} == {part: set(ones) for part, ones in again.items()}
    for part, ones in first.items():
        for module, one in ones.items(): assert torch.equal(one.A, again[part][module].A) and torch.equal(one.B, again[part][module].B) and one.alpha == again[part][module].alpha


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
