"What the pages of components and architecture have no room for: wrong folders, replacement VAEs, single files, other people's readers."
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from sdxl_course.core import CourseError
from sdxl_course.model.architecture import TINY, sdxl_architecture, tiny_architecture
from sdxl_course.model.components import NETWORKS, PARTS, load_components, quiet, save_components


def small_tokenizer(folder, pad):
    "Every byte is a token and 'c' + 'a' merge: enough of a CLIP tokenizer to be saved and loaded."
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *[letter + "</w>" for letter in letters], "ca", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nc a\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    tokenizers = [small_tokenizer(folder / name, pad) for name, pad in (("one", "<|endoftext|>"), ("two", "!"))]
    with pytest.MonkeyPatch.context() as patch: # a tenth of sdxl-tiny's UNet, to be quick
        patch.setitem(TINY, "unet", {**TINY["unet"], "block_out_channels": (32, 32, 32), "attention_head_dim": 2, "transformer_layers_per_block": 1})
        parts = tiny_architecture(seed=0, vocab_size=len(tokenizers[0]))
    parts.tokenizer, parts.tokenizer_2 = tokenizers
    return parts


@pytest.fixture
def folder(parts, tmp_path): return save_components(parts, tmp_path / "model")


def change_json(file, **changes): file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
def stock(parts, folder, **options):
    with quiet(): return type(parts.pipeline()).from_pretrained(folder, **options)
def files(folder): return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_round_trip_keeps_every_byte(parts, folder, tmp_path):
    again = save_components(load_components(folder), tmp_path / "again")
    assert files(folder) == files(again)
    for mine, loaded in ((parts.tokenizer, load_components(folder).tokenizer), (parts.tokenizer_2, load_components(folder).tokenizer_2)):
        assert mine(["a cat!", "Ünïcode, 漢字"]).input_ids == loaded(["a cat!", "Ünïcode, 漢字"]).input_ids
        assert (mine.pad_token_id, mine.eos_token_id, loaded.model_max_length) == (loaded.pad_token_id, loaded.eos_token_id, 77)


@pytest.mark.parametrize("asked, expected", [({}, torch.float32), ({"torch_dtype": torch.float32}, torch.float32), ({"torch_dtype": torch.float16}, torch.float16)])
def test_stock_diffusers_loads_one_dtype(parts, folder, asked, expected):
    pipeline = stock(parts, folder, **asked)
    assert {getattr(pipeline, part).dtype for part in NETWORKS} == {expected}
    assert pipeline.config.force_zeros_for_empty_prompt is True


def test_the_dtype_line_is_what_does_it(parts, folder):
    for part in ("text_encoder", "text_encoder_2"):
        config = json.loads((folder / part / "config.json").read_text())
        assert config.pop("dtype") == "float32"
        (folder / part / "config.json").write_text(json.dumps(config))
    assert stock(parts, folder).text_encoder.dtype == torch.float16 # the trap: halves beside a single precision UNet
    assert {getattr(load_components(folder), part).dtype for part in NETWORKS} == {torch.float32} # ours asks for what it wants


def test_no_trace_of_the_machine(parts, folder, tmp_path):
    again = save_components(load_components(folder), tmp_path / "again")
    for name, content in files(again).items(): assert str(tmp_path).encode() not in content and b"name_or_path" not in content, name


def test_classic_text_encoder_names(parts, folder):
    for part in ("text_encoder", "text_encoder_2"):
        names = list(load_file(folder / part / "model.safetensors"))
        assert all(name.startswith("text_model.") or name == "text_projection.weight" for name in names)
        assert not any("position_ids" in name for name in names)


def test_other_folders_beside_the_parts_do_not_matter(parts, folder):
    for name in ("vision_model", "vision_model_2", "judges"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        (folder / name / "model.safetensors").write_bytes(b"not even safetensors")
    assert load_components(folder).name == str(folder)
    stock(parts, folder)


def test_half_precision_on_request(folder):
    parts = load_components(folder, dtype=torch.float16)
    assert {getattr(parts, part).dtype for part in NETWORKS} == {torch.float16}
    assert parts.to(dtype=torch.float32).unet.dtype == torch.float32


def test_variant_files(folder):
    for part in NETWORKS:
        for file in (folder / part).glob("*.safetensors"): file.rename(file.with_suffix("").with_suffix(".fp16.safetensors"))
    assert load_components(folder, variant="fp16").unet.dtype == torch.float32
    with pytest.raises(CourseError, match="add --variant fp16"): load_components(folder)


def test_pickled_weights_are_refused(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(CourseError, match="only pickled weights"): load_components(folder)
    (folder / "old.ckpt").write_bytes(b"x")
    with pytest.raises(CourseError, match="not a .safetensors file"): load_components(folder / "old.ckpt")


def test_incomplete_or_broken_folders(folder):
    file = folder / "text_encoder" / "model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    tensors.pop("text_model.final_layer_norm.weight")
    save_file(tensors, file)
    with pytest.raises(CourseError, match="lacks 1 tensors"): load_components(folder)
    file.write_bytes(whole[:1000])
    with pytest.raises(CourseError, match="does not load as CLIPTextModel"): load_components(folder)
    file.unlink()
    with pytest.raises(CourseError, match="no weights"): load_components(folder)
    file.write_bytes(whole)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    tensors.pop("conv_in.weight")
    save_file(tensors, unet)
    with pytest.raises(CourseError, match="conv_in.weight"): load_components(folder)
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(CourseError, match="does not load as UNet2DConditionModel"): load_components(folder)


def test_folders_that_are_something_else(folder):
    change_json(folder / "text_encoder" / "config.json", architectures=["T5EncoderModel"])
    with pytest.raises(CourseError, match="T5EncoderModel"): load_components(folder)
    change_json(folder / "model_index.json", text_encoder=[None, None], tokenizer=[None, None], _class_name="StableDiffusionXLImg2ImgPipeline")
    with pytest.raises(CourseError, match="lacks tokenizer, text_encoder.*refiner"): load_components(folder)
    change_json(folder / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(CourseError, match="holds a FluxPipeline"): load_components(folder)
    for text in ("[]", "3", '"x"', "null"):
        (folder / "model_index.json").write_text(text)
        with pytest.raises(CourseError, match="cannot be read"): load_components(folder)
    (folder / "model_index.json").write_text("[")
    with pytest.raises(CourseError, match="cannot be read"): load_components(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(CourseError, match="no model_index.json"): load_components(folder)


@pytest.mark.parametrize("name", ["", "nothing-here", "./nothing/here", "/nothing/here", "a/b/c", "~/nothing-here.safetensors"])
def test_names_that_lead_nowhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CourseError): load_components(name)


def test_hub_out_of_reach(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CourseError, match="'nobody/nothing' from the hub .*local folder"): load_components("nobody/nothing")
    with pytest.raises(CourseError, match="VAE 'nobody/nothing' from the hub .*local folder"): load_components(folder, vae="nobody/nothing")
    load_components(folder) # local paths need no hub


def test_replacement_vae(parts, folder, tmp_path):
    other = tiny_architecture(seed=5)
    other.tokenizer, other.tokenizer_2, other.text_encoder, other.text_encoder_2 = [getattr(parts, part) for part in PARTS[:4]]
    second = save_components(other, tmp_path / "second")
    want = load_components(second).vae.state_dict()
    for where in (second, second / "vae"):
        loaded = load_components(folder, vae=where)
        assert all(torch.equal(want[name], value) for name, value in loaded.vae.state_dict().items())
        assert torch.equal(loaded.unet.conv_in.weight, load_components(folder).unet.conv_in.weight)
    shutil.rmtree(folder / "vae") # a model without its own
    load_components(folder, vae=second)
    with pytest.raises(CourseError, match="lacks vae"): load_components(folder)
    with pytest.raises(CourseError, match="no VAE at"): load_components(folder, vae="nothing-here")
    from diffusers import AutoencoderKL
    AutoencoderKL(latent_channels=16).save_pretrained(tmp_path / "wide")
    with pytest.raises(CourseError, match="16 latent channels"): load_components(folder, vae=tmp_path / "wide")


def test_a_single_file_vae_gets_the_scale_of_the_base_model(folder, tmp_path):
    "diffusers took it for Stable Diffusion 1.5's, 0.18215, and every picture was drawn from latents of the wrong size."
    want = load_components(folder).vae
    save_file(original_vae(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")), tmp_path / "vae.safetensors")
    vae = load_components(folder, vae=tmp_path / "vae.safetensors").vae
    assert vae.config.scaling_factor == want.config.scaling_factor == 0.13025
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in want.state_dict().items())


def test_a_pickled_vae_is_refused(folder, tmp_path):
    torch.save({}, tmp_path / "vae.pt")
    with pytest.raises(CourseError, match="pickled weights can run code"): load_components(folder, vae=tmp_path / "vae.pt")


@pytest.mark.parametrize("entry", [["diffusers", "StableDiffusionXLPipeline"], ["os", "system"], ["diffusers", "no_such"], "EulerDiscreteScheduler", ["diffusers", 3], 7])
def test_only_known_classes_of_schedulers_are_looked_up(folder, entry):
    change_json(folder / "model_index.json", scheduler=entry)
    with pytest.raises(CourseError, match="as its scheduler|lacks scheduler"): load_components(folder)


def test_saving_what_cannot_be_saved(parts, tmp_path):
    bad = tiny_architecture(vocab_size=2000)
    bad.tokenizer, bad.tokenizer_2 = parts.tokenizer, parts.tokenizer_2
    with pytest.raises(CourseError, match="vocab_size=len"): save_components(bad, tmp_path / "bad")
    from peft import LoraConfig
    bad = tiny_architecture(vocab_size=len(parts.tokenizer))
    bad.tokenizer, bad.tokenizer_2 = parts.tokenizer, parts.tokenizer_2
    bad.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(CourseError, match="carries an adapter"): save_components(bad, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_published_configuration_and_ours_differ_only_in_size():
    real, tiny = sdxl_architecture(), tiny_architecture()
    assert torch.equal(real.scheduler.alphas_cumprod, tiny.scheduler.alphas_cumprod)  # the same noise, though not the same sampler
    assert real.unet.config.cross_attention_dim == sum(e.config.hidden_size for e in (real.text_encoder, real.text_encoder_2)) == 2048
    assert tiny.unet.config.cross_attention_dim == sum(e.config.hidden_size for e in (tiny.text_encoder, tiny.text_encoder_2))
    for unet, text in ((real.unet, real.text_encoder_2), (tiny.unet, tiny.text_encoder_2)):
        assert unet.config.projection_class_embeddings_input_dim == 6*unet.config.addition_time_embed_dim + text.config.projection_dim


# A single file as A1111 and ComfyUI use it: the reverse of what diffusers does when it reads one.

def original_unet(tensors, layers):
    "Diffusers' UNet names -> the names of the SGM code base."
    names = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}
    for i in range(3):
        for j in range(layers):
            names[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{1 + i*(layers + 1) + j}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{1 + i*(layers + 1) + j}.1"
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1)*(layers + 1)}.0.op"
        for j in range(layers + 1):
            names[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{i*(layers + 1) + j}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{i*(layers + 1) + j}.1"
        names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{i*(layers + 1) + layers}.2.conv"
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
        "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    made = {}
    for name, value in tensors.items():
        start = max((old for old in names if name.startswith(old + ".")), key=len)
        rest = name[len(start) + 1:]
        if ".resnets." in start: rest = inside[rest.split(".")[0]] + "." + rest.split(".")[1]
        made[f"model.diffusion_model.{names[start]}.{rest}"] = value
    return made


def original_vae(tensors):
    "Diffusers' VAE names -> the names of the latent diffusion code base, which counts the decoder's levels from the picture."
    levels = len({name.split(".")[2] for name in tensors if name.startswith("decoder.up_blocks.")})
    swaps = [("mid_block.resnets.0.", "mid.block_1."), ("mid_block.resnets.1.", "mid.block_2."), ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        *[(f"mid_block.attentions.0.to_{old}.", f"mid.attn_1.{new}.") for old, new in (("q", "q"), ("k", "k"), ("v", "v"), ("out.0", "proj_out"))],
        ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"), ("resnets.", "block."),
        ("down_blocks.", "down."), *[(f"up_blocks.{i}.", f"up.{levels - 1 - i}.") for i in range(levels)]]
    made = {}
    for name, value in tensors.items():
        new = name
        for old, replacement in swaps: new = new.replace(old, replacement)
        made["first_stage_model." + new] = value[..., None, None] if "attn_1" in new and value.ndim == 2 else value
    return made


def original_second_encoder(tensors):
    "transformers' CLIP names -> OpenCLIP's, with q, k and v in one matrix."
    swaps = {"text_model.encoder.layers.": "transformer.resblocks.", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj", "text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final",
        "text_model.embeddings.position_embedding.weight": "positional_embedding"}
    made = {}
    for name, value in tensors.items():
        if "k_proj" in name or "v_proj" in name: continue
        new, rows = name, [value]
        if "q_proj" in name:
            rows = [tensors[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            new = name.replace("self_attn.q_proj.", "attn.in_proj_")
        for old, replacement in swaps.items(): new = new.replace(old, replacement)
        value = torch.cat(rows).contiguous()
        made["conditioner.embedders.1.model." + new.replace("text_projection.weight", "text_projection")] = value.T.contiguous() if "text_projection" in name else value
    return made


def test_single_file(parts, folder, tmp_path):
    read = lambda part, name: load_file(folder / part / f"{name}.safetensors")
    tensors = {f"conditioner.embedders.0.transformer.{name}": value for name, value in read("text_encoder", "model").items()}
    tensors |= original_second_encoder(read("text_encoder_2", "model"))
    tensors |= original_unet(read("unet", "diffusion_pytorch_model"), layers=1) | original_vae(read("vae", "diffusion_pytorch_model"))
    save_file(tensors, tmp_path / "all-in-one.safetensors")
    single, want = load_components(tmp_path / "all-in-one.safetensors", config=folder), load_components(folder)
    assert single.name == "all-in-one"
    for part in NETWORKS:
        loaded = getattr(single, part).state_dict()
        assert sorted(loaded) == sorted(getattr(want, part).state_dict())
        for name, value in getattr(want, part).state_dict().items(): assert torch.equal(value, loaded[name]), (part, name)
    assert dict(single.scheduler.config) == dict(want.scheduler.config)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CourseError, match="does not load as SDXL"): load_components(tmp_path / "other.safetensors", config=folder)
