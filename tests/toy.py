"A very small SDXL and very small pictures, made on the spot: tests need no download and no trained weights."
import json
from pathlib import Path
from types import SimpleNamespace

LETTERS = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]  # how CLIP writes the 256 bytes


def make_tokenizer(folder):
    "A CLIP tokenizer that knows single letters only; its end token has the largest id."
    from transformers import CLIPTokenizer
    folder.mkdir(parents=True, exist_ok=True)
    words = LETTERS + [f"{letter}</w>" for letter in LETTERS] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(special, model_max_length=77, tokenizer_class="CLIPTokenizer")))
    return CLIPTokenizer.from_pretrained(str(folder))


def make_toy_model(folder, seed=0):
    "The folder of an SDXL pipeline: two levels, 64-pixel pictures, 8 x 8 latents; another seed gives other weights."
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from sdxl_course.model.components import SDXLComponents, save_components
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    tokenizer = make_tokenizer(Path(folder).with_name("tokenizer"))
    text = CLIPTextConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, projection_dim=8,
        vocab_size=len(tokenizer), bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1, pad_token_id=len(tokenizer) - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = dict(text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
            vae=AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, layers_per_block=1, sample_size=64, scaling_factor=0.13025,
                latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4),
            unet=UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=16,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=(1, 2), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=6 * 4 + 8))
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading")
    components = SDXLComponents(tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=scheduler, **parts)
    return save_components(components, folder, dtype=torch.float32)


def make_pictures(folder, n=5, size=(64, 64), captions=None):
    "A folder of n pictures of the given (height, width) with metadata.jsonl; picture i always looks the same."
    import numpy as np
    from PIL import Image
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        small = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        rows.append(dict(file_name=f"{i}.png", text=captions[i] if captions else f"picture {i}"))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def load_toy(folder):
    "A function that gives the toy model's components afresh, without reading the disk again."
    import copy
    from sdxl_course.model.components import load_components
    whole = load_components(str(folder))
    networks = ("text_encoder", "text_encoder_2", "vae", "unet", "scheduler")
    return lambda: copy.copy(whole).__class__(**{**vars(whole), **{name: copy.deepcopy(getattr(whole, name)) for name in networks}})


def make_upstream_pipe(folder, playground=False):
    "The tiny pipeline of diffusers' own example tests (64 pixels, 32 x 32 latents), saved by diffusers itself; playground: as Playground v2.5 has it."
    import torch
    from diffusers import AutoencoderKL, EDMEulerScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    tokenizer = make_tokenizer(Path(folder).with_name("upstream-tokenizer"))
    text = CLIPTextConfig(hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=5, vocab_size=1000, projection_dim=32, hidden_act="gelu",
        bos_token_id=0, eos_token_id=2, pad_token_id=1, layer_norm_eps=1e-5)
    moments = dict(latents_mean=[-1.6, 1.1, 0.4, -0.3], latents_std=[8.4, 5.9, 6.2, 5.7]) if playground else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = dict(text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text), tokenizer=tokenizer, tokenizer_2=tokenizer,
            vae=AutoencoderKL(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=128, **moments),
            unet=UNet2DConditionModel(sample_size=32, block_out_channels=(32, 64), layers_per_block=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
                addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=6 * 8 + 32, cross_attention_dim=64))
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading")
    scheduler = EDMEulerScheduler(sigma_data=0.5) if playground else EulerDiscreteScheduler(**betas)
    StableDiffusionXLPipeline(scheduler=scheduler, **parts).save_pretrained(folder)
    return Path(folder)


def files_of(folder):
    "Every file below a folder: relative name -> bytes."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


class Hub:
    "A hub that notes what it is told, and keeps what it was sent last."
    told, broken, sent = [], (), {}

    def __init__(self, token=None): self.token = token

    def create_repo(self, name, **options):
        if "create" in self.broken: raise OSError("no network")
        self.told.append(("create", name, self.token, len(list(Path.cwd().glob("*")))))
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, repo_id, folder_path, allow_patterns=None, ignore_patterns=None, **options):
        from huggingface_hub.utils import filter_repo_objects
        if "upload" in self.broken: raise OSError("no network")
        files = files_of(folder_path)
        names = sorted(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        self.told.append(("upload", repo_id, self.token, names))
        type(self).sent = {name: files[name] for name in names}
        return f"https://hub/{repo_id}"


def make_toy_refiner(folder, **changes):
    "The folder of a refiner for the toy model, with random weights; it borrows everything but its UNet."
    import torch
    from diffusers import UNet2DConditionModel
    sizes = dict(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8, attention_head_dim=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=5 * 4 + 8) | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = UNet2DConditionModel(**sizes)
    for name, p in unet.named_parameters():
        if "attn2.to_v" in name or "attn2.to_out.0.weight" in name: p.data *= 20  # words matter
    unet.save_pretrained(Path(folder) / "unet")
    (Path(folder) / "model_index.json").write_text(json.dumps(dict(_class_name="StableDiffusionXLImg2ImgPipeline", requires_aesthetics_score=True, force_zeros_for_empty_prompt=False)))
    return Path(folder)
