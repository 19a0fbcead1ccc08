"What the pages 15_lora, model_adapters and model_lora_files do not show: every kind of LoRA through diffusers' own reader, and equal bytes across processes."
import copy
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from sdxl_course.core import CourseError, load_tensors, save_tensors, seeded
from sdxl_course.model.adapters import adaptable_layers, add_lora, lora_parameters, lora_size, lora_targets, parameter_groups
from sdxl_course.model.architecture import sdxl_architecture, tiny_architecture
from sdxl_course.model.lora_files import attach_lora, initialize_lora_from, load_lora_into, lora_file_tensors
from sdxl_course.model.lora_files import save_kohya, save_lora
from sdxl_course.model.lora_layouts import sgm_name
from sdxl_course.model.lora_reading import read_lora

EVERYTHING = "attention+feedforward+convolution"
BASE = tiny_architecture(0)


def fresh_parts(): return copy.deepcopy(BASE)


def shake(model, *key):
    "Give every trained-looking parameter numbers that do not vanish."
    for name, p in lora_parameters(model):
        drawn = torch.randn(p.shape, generator=seeded(*key, name))
        p.data = p.data * (1 + 0.2 * drawn.abs()) if "magnitude" in name else 0.05 * drawn
    return model


def predict(parts):
    "Hidden states of both text encoders and the UNet's answer, without tokenizers."
    ids = torch.arange(2 * 77).view(2, 77) % 900
    with torch.no_grad():
        one, two = (te.eval()(ids, output_hidden_states=True) for te in (parts.text_encoder, parts.text_encoder_2))
        embeds = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        added = dict(text_embeds=two.text_embeds, time_ids=torch.full((2, 6), 128.))
        noise = torch.randn(2, 4, 16, 16, generator=seeded("noise"))
        return parts.unet.eval()(noise, 300, embeds, added_cond_kwargs=added).sample


def attached(file):
    parts = fresh_parts()
    attach_lora(parts.pipeline(), file)
    return parts


def adapted(layers, encoders, **options):
    parts = fresh_parts()
    shake(add_lora(parts.unet, layers=layers, generator=seeded("A"), **options), "unet")
    for part in encoders:
        text_layers = layers if layers.startswith("attention") else "attention"
        shake(add_lora(getattr(parts, part), layers=text_layers, generator=seeded("A", part), **options), part)
    return parts, {part: getattr(parts, part) for part in encoders}


BOTH = ("text_encoder", "text_encoder_2")


@pytest.mark.parametrize("layers, encoders, options", [
    ("attention", (), dict(rank=4, alpha=10)),
    ("attention", BOTH, dict(rank=4, alpha=2.5)),
    ("attention", ("text_encoder_2",), dict(rank=1)),
    ("attention+feedforward", BOTH, dict(rank=3, alpha=5)),
    (EVERYTHING, BOTH, dict(rank=2, alpha=7)),
    ("convolution", (), dict(rank=2, alpha=3)),
    ("to_q,proj_in,proj_out,time_emb_proj,conv_in", (), dict(rank=2, alpha=3)),
    (EVERYTHING, BOTH, dict(rank=2, alpha=7, use_dora=True)),
    ("attention+feedforward", BOTH, dict(rank=4, alpha=3, use_rslora=True)),
    ("attention", BOTH, dict(rank=4, alpha=3, use_rslora=True, use_dora=True, dropout=0.3, init="default")),
])
def test_stock_diffusers_draws_the_same(tmp_path, layers, encoders, options):
    parts, text = adapted(layers, encoders, **options)
    file = save_lora(tmp_path, parts.unet, **text)
    ours, base = predict(parts), predict(fresh_parts())
    assert (ours - base).abs().max() > 1e-2
    fresh = fresh_parts()
    fresh.pipeline().load_lora_weights(tmp_path, weight_name=file.name)  # offline, diffusers 0.39 wants the name
    for part in ("unet", *encoders):  # values lie where they lay in the file: at an address off 64 bytes BLAS adds in another order
        for p in getattr(fresh, part).parameters(): p.data = p.data.clone()
    assert (predict(fresh) - ours).abs().max() == 0
    again = fresh_parts()
    for part in ("unet", *encoders):
        wanted = layers if part == "unet" or layers.startswith("attention") else "attention"
        add_lora(getattr(again, part), layers=wanted, **options)
    load_lora_into(again.unet, *(getattr(again, p) if p in encoders else None for p in BOTH), file)
    assert (predict(again) - ours).abs().max() == 0
    tensors, settings = read_lora(file)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert set(settings) == {"unet", *encoders} and settings["unet"]["r"] == options["rank"]


def test_alpha_and_rank_survive_the_file(tmp_path):
    "anchors.md 6 trap 8: an alpha different from the rank was lost on the way."
    parts, _ = adapted("attention", (), rank=4, alpha=16)
    save_lora(tmp_path, parts.unet)
    fresh = fresh_parts()
    attach_lora(fresh.pipeline(), tmp_path)
    layer = fresh.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
    assert layer.scaling == {"default": 4.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_is_fp32_beside_a_half_base(tmp_path, dtype):
    "trainers.md 2.14 number 26 and anchors.md 6 trap 15: under bf16 the reference keeps LoRA and Adam in bf16; under fp16 a text encoder's LoRA stayed in fp16, whose gradients cannot be unscaled."
    for model in (fresh_parts().unet, fresh_parts().text_encoder):
        add_lora(model.to(dtype), rank=2, generator=seeded(0))
        assert {p.dtype for _, p in lora_parameters(model)} == {torch.float32}
        assert {p.dtype for n, p in model.named_parameters() if ".lora_" not in n} == {dtype}
    full = lora_file_tensors(add_lora(fresh_parts().unet, rank=2, generator=seeded(0)))[0]
    half = lora_file_tensors(add_lora(fresh_parts().unet.to(dtype), rank=2, generator=seeded(0)))[0]
    assert all(torch.equal(full[name], half[name]) for name in full)


def test_draw_depends_on_the_generator_alone():
    def A(seed): return torch.cat([p.flatten() for n, p in lora_parameters(add_lora(fresh_parts().unet, generator=seeded(seed))) if "lora_A" in n])
    state = torch.random.get_rng_state()
    one = A(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(one, A(1)) and not torch.equal(one, A(2))
    assert abs(one.std() - 1 / 4) < 0.01


def test_sdxl_counts_agree_with_peft():
    sdxl = sdxl_architecture()
    for model, per_rank, layers in (sdxl.unet, 1_451_520, 560), (sdxl.text_encoder, 73_728, 48), (sdxl.text_encoder_2, 327_680, 128):
        assert lora_size(model, 2) == (layers, 2 * per_rank)
        add_lora(model, rank=2)
        assert sum(p.numel() for _, p in lora_parameters(model)) == 2 * per_rank
        assert lora_size(model, 2) == (layers, 2 * per_rank)  # adapters are seen through


def test_two_adapters_live_side_by_side(tmp_path):
    unet = fresh_parts().unet
    add_lora(unet, rank=2, adapter_name="style", generator=seeded(1))
    add_lora(unet, rank=3, layers="attention+feedforward", adapter_name="subject", generator=seeded(2))
    assert {p.shape[0] for n, p in lora_parameters(unet, "style") if "lora_A" in n} == {2}
    assert {p.shape[0] for n, p in lora_parameters(unet, "subject") if "lora_A" in n} == {3}
    assert len(lora_file_tensors(unet, adapter_name="subject")[0]) > len(lora_file_tensors(unet, adapter_name="style")[0])
    with pytest.raises(CourseError, match="call add_lora first"): lora_parameters(unet)


def test_gradients_reach_only_the_lora():
    parts, text = adapted("attention", BOTH, rank=2)
    ids = torch.arange(77)[None]
    parts.text_encoder(ids).last_hidden_state.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in lora_parameters(parts.text_encoder))
    assert all(p.grad is None for n, p in parts.text_encoder.named_parameters() if ".lora_" not in n)


def test_wrong_files_are_refused(tmp_path):
    parts, _ = adapted("attention", (), rank=2, alpha=4)
    file = save_lora(tmp_path / "good", parts.unet)
    tensors, metadata = load_tensors(file)
    fresh = add_lora(fresh_parts().unet, rank=2, alpha=4)
    before = lora_file_tensors(fresh)[0]
    first = min(tensors)
    broken = {"lacks": {n: t for n, t in tensors.items() if n != first}, "has too much with": {**tensors, "unet.new.lora_A.weight": tensors[first]},
        "this model wants": {**tensors, first: tensors[first][:1]}}
    for message, content in broken.items():
        save_tensors(tmp_path / "bad.safetensors", content, metadata)
        with pytest.raises(CourseError, match=message): load_lora_into(fresh, None, None, tmp_path / "bad.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CourseError, match="whole safetensors"): load_lora_into(fresh, None, None, tmp_path / "cut.safetensors")
    after = lora_file_tensors(fresh)[0]
    assert all(torch.equal(before[n], after[n]) for n in before)  # nothing was half loaded
    for options, key in (dict(rank=2, alpha=2), "lora_alpha"), (dict(rank=2, alpha=4, use_rslora=True), "use_rslora"), (dict(rank=4, alpha=4), "r = 2"):
        with pytest.raises(CourseError, match=key): load_lora_into(add_lora(fresh_parts().unet, **options), None, None, file)


def test_a_lora_for_another_model_is_refused(tmp_path):
    parts, _ = adapted("attention", (), rank=2)
    tensors, metadata = load_tensors(save_lora(tmp_path / "good", parts.unet))
    save_tensors(tmp_path / "deep.safetensors", {**tensors, "unet.down_blocks.2.attentions.9.to_q.lora_A.weight": torch.ones(2, 192)}, metadata)
    with pytest.raises(CourseError, match="this model lacks"): attach_lora(fresh_parts().pipeline(), tmp_path / "deep.safetensors")
    save_tensors(tmp_path / "wide.safetensors", {n: torch.cat([t, t], dim=-1) if "lora_A" in n else t for n, t in tensors.items()}, metadata)
    with pytest.raises(CourseError, match="does not load as a LoRA"): attach_lora(fresh_parts().pipeline(), tmp_path / "wide.safetensors")


@pytest.mark.parametrize("where, words", [("owner/name", "the hub gave no LoRA"), ("runs/x.safetensors", "no LoRA at"), ("./runs", "no LoRA at"), ("runs", "no LoRA at")])
def test_a_lora_that_is_not_there(where, words):
    with pytest.raises(CourseError, match=words): attach_lora(fresh_parts().pipeline(), where)


def test_targets_in_words():
    unet = fresh_parts().unet
    assert lora_targets(unet, "feedforward") == ["ff.net.0.proj", "ff.net.2"]
    assert lora_targets(unet, " attention + feedforward ") == ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    full = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert lora_size(unet, 4, full) == (1, 4 * (96 + 96))
    with pytest.raises(CourseError, match="nearest name is 'feedforward'"): lora_targets(unet, "attention+feedfoward")


@pytest.mark.slow
def test_equal_values_give_equal_bytes_in_any_process(tmp_path):
    code = ("import sys; from sdxl_course.model.architecture import tiny_architecture; from sdxl_course.core import seeded\n"
        "from sdxl_course.model.adapters import add_lora; from sdxl_course.model.lora_files import save_lora\n"
        "save_lora(sys.argv[1], add_lora(tiny_architecture(0).unet, layers='attention+feedforward', generator=seeded(5)))")
    there, here = tmp_path / "there.safetensors", tmp_path / "here.safetensors"
    subprocess.run([sys.executable, "-c", code, str(there)], check=True, env={**os.environ, "PYTHONHASHSEED": "12"})
    save_lora(here, add_lora(fresh_parts().unet, layers="attention+feedforward", generator=seeded(5)))
    assert there.read_bytes() == here.read_bytes()
    note = load_tensors(here)[1]
    assert set(note) == {"format", "lora_adapter_metadata"} and str(tmp_path) not in json.dumps(note)


# ------------------------------------------------ kohya's layout, other starts, groups

@pytest.mark.parametrize("options", [dict(), dict(use_dora=True), dict(use_rslora=True, layers="attention+feedforward")], ids=["plain", "dora", "rslora"])
def test_kohya_files_come_back_exactly(options, tmp_path):
    parts = tiny_architecture(0)
    models = {name: getattr(parts, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    for name, model in models.items():
        for key, p in lora_parameters(add_lora(model, rank=3, alpha=5, generator=seeded(name), **options)): p.data = torch.randn(p.shape, generator=seeded(name, key))
    file = save_kohya(tmp_path / "a.safetensors", **models)
    assert file.read_bytes() == save_kohya(tmp_path / "b" / "a.safetensors", **models).read_bytes()
    heir = tiny_architecture(1)
    for name in models: add_lora(getattr(heir, name), rank=3, alpha=5, generator=seeded("other"), **options)
    initialize_lora_from(heir.unet, heir.text_encoder, heir.text_encoder_2, file)
    for name, model in models.items():
        for (key, p), (_, q) in zip(lora_parameters(model), lora_parameters(getattr(heir, name))): assert torch.equal(p, q), key


@pytest.mark.parametrize("layers", ["attention", EVERYTHING + ",proj_in,conv_in,conv_out,linear_1,time_emb_proj"])
def test_kohyas_own_block_names_mean_to_us_what_they_mean_to_diffusers(layers, tmp_path):
    unet = shake(add_lora(tiny_architecture(0).unet, rank=2, alpha=3, layers=layers, generator=seeded("sgm")), "sgm")
    theirs = {f"lora_unet_{sgm_name(name, unet.config.layers_per_block).replace('.', '_')}": f"lora_unet_{name.replace('.', '_')}" for name in dict(tiny_architecture(0).unet.named_modules()) if name}
    tensors, notes = load_tensors(save_kohya(tmp_path / "sgm.safetensors", unet))
    assert not any("_blocks_0_attentions" in name or "down_blocks" in name for name in tensors)
    save_tensors(tmp_path / "older.safetensors", {f"{theirs[place]}.{rest}": t for name, t in tensors.items() for place, rest in [name.split(".", 1)]}, notes)
    stock, heir, want = tiny_architecture(0), tiny_architecture(0), predict(SimpleNamespace(**{**vars(tiny_architecture(0)), "unet": unet}))
    stock.pipeline().load_lora_weights(tmp_path, weight_name="sgm.safetensors")
    add_lora(heir.unet, rank=2, alpha=1, layers=layers)
    initialize_lora_from(heir.unet, None, None, tmp_path / "older.safetensors")  # as we wrote it before, and others do
    for parts in (stock, heir, attached(tmp_path / "sgm.safetensors"), attached(tmp_path / "older.safetensors")): assert (predict(parts) - want).abs().max() < 1e-5


def test_defect_alpha_other_than_rank_survives_in_kohya_files(tmp_path):
    "anchors.md 6 trap 8: kohya's layout was written as if alpha were the rank."
    unet = add_lora(tiny_architecture(0).unet, rank=4, alpha=1)
    tensors, metadata = load_tensors(save_kohya(tmp_path / "a.safetensors", unet))
    assert {float(t) for name, t in tensors.items() if name.endswith(".alpha")} == {1.} and metadata["ss_network_dim"] == "4" and metadata["ss_network_alpha"] == "1"


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_starts_that_change_the_base_give_files_for_the_original_base(init, tmp_path):
    changed, plain = tiny_architecture(0).unet, tiny_architecture(0).unet
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    original = plain.get_submodule(name).weight.clone()
    add_lora(changed, rank=2, alpha=3, init=init, generator=seeded(init))
    for key, p in lora_parameters(changed): p.data += .1 * torch.randn(p.shape, generator=seeded(key))
    file = save_lora(tmp_path, changed, dtype=torch.float32)
    layer, tensors = changed.get_submodule(name), load_tensors(file)[0]
    whole = layer.base_layer.weight + 1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    delta = 1.5 * tensors[f"unet.{name}.lora_B.weight"] @ tensors[f"unet.{name}.lora_A.weight"]
    assert (original + delta - whole).abs().max() < 1e-4 and (original - layer.base_layer.weight).abs().max() > 1e-3


def test_a_half_precision_file_is_the_rounded_one(tmp_path):
    unet = add_lora(tiny_architecture(0).unet, rank=2, generator=seeded("half"))
    whole, half = (load_tensors(save_lora(tmp_path / str(d), unet, dtype=d))[0] for d in (torch.float32, torch.bfloat16))
    assert all(half[n].dtype == torch.bfloat16 and torch.equal(half[n], whole[n].bfloat16()) for n in whole)


def test_groups_cover_every_parameter_once():
    named = {f"{part}.x.{kind}.default.weight": torch.nn.Parameter(torch.zeros(1)) for part in ("unet", "text_encoder", "text_encoder_2") for kind in ("lora_A", "lora_B")}
    groups = parameter_groups(named, 1., .5, 8., .1, .2)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert [rates[id(p)] for p in named.values()] == [(1., .1), (8., .1), (.5, .2), (4., .2), (.5, .2), (4., .2)]


# ------------------------------------------------ other people's files

def text_layer(parts): return next(name for name, _ in parts.text_encoder.named_modules() if name.endswith("layers.0.self_attn.q_proj"))


LAYER, CONV = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", "mid_block.resnets.0.conv1"
def draw(*shape, key="field"): return 0.1 * torch.randn(shape, generator=seeded(key, *shape))


def written(tmp_path, tensors, notes=None): return save_tensors(tmp_path / "theirs.safetensors", tensors, notes or {})


def changed(parts, module):
    "What a LoRA adds to one layer's weights."
    layer = parts.get_submodule(module)
    return layer.get_delta_weight("default").detach()


DOWN, UP = (3, 192), (192, 3)
@pytest.mark.parametrize("down, up, alpha", [
    (f"unet.{LAYER.replace('to_out.0', 'processor.to_out_lora')}.down.weight", ".up.weight", None),
    (f"{LAYER.replace('to_out.0', 'processor.to_out_lora')}.down.weight", ".up.weight", None),
    (f"unet.{LAYER}.lora.down.weight", ".lora.up.weight", None),
    (f"unet.{LAYER}.lora_A.weight", ".lora_B.weight", None),
    (f"base_model.model.{LAYER}.lora_A.weight", ".lora_B.weight", None),
    (f"{LAYER}.lora_A.weight", ".lora_B.weight", None),
    (f"lora_unet_{LAYER.replace('.', '_')}.lora_down.weight", ".lora_up.weight", 1.5),
    ("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0.lora_down.weight", ".lora_up.weight", 6),
])
def test_every_layout_of_a_lora_gives_the_right_weights(tmp_path, down, up, alpha):
    ending = next(e for e in (".lora.down.weight", ".lora_down.weight", ".lora_A.weight", ".down.weight") if down.endswith(e))
    start = down.removesuffix(ending)
    tensors = {down: draw(*DOWN), start + up: draw(*UP)} | ({} if alpha is None else {f"{start}.alpha": torch.tensor(alpha)})
    parts = attached(written(tmp_path, tensors))
    assert (changed(parts.unet, LAYER) - (alpha or 3) / 3 * draw(*UP) @ draw(*DOWN)).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.{}.weight", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.{}.weight",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight"])
def test_old_layouts_of_text_encoders(tmp_path, name):
    parts = attached(written(tmp_path, {name.format("down"): draw(2, 64), name.format("up"): draw(64, 2)}))
    assert (changed(parts.text_encoder, text_layer(BASE)) - draw(64, 2) @ draw(2, 64)).abs().max() < 1e-6


def test_every_layer_keeps_its_own_rank_and_alpha(tmp_path):
    "Kohya's conv_dim and conv_alpha differ from dim and alpha; a CP decomposition has a core."
    linear, conv = (f"lora_unet_{name.replace('.', '_')}" for name in (LAYER, CONV))
    tensors = {f"{linear}.lora_down.weight": draw(*DOWN), f"{linear}.lora_up.weight": draw(*UP), f"{linear}.alpha": torch.tensor(1.),
        f"{conv}.lora_down.weight": draw(2, 192, 1, 1), f"{conv}.lora_mid.weight": draw(2, 2, 3, 3), f"{conv}.lora_up.weight": draw(192, 2, 1, 1), f"{conv}.alpha": torch.tensor(4.)}
    parts = attached(written(tmp_path, tensors))
    assert (changed(parts.unet, LAYER) - draw(*UP) @ draw(*DOWN) / 3).abs().max() < 1e-6
    want = 2 * torch.einsum("oi,ijkl,jn->onkl", draw(192, 2, 1, 1)[..., 0, 0], draw(2, 2, 3, 3), draw(2, 192, 1, 1)[..., 0, 0])
    assert (changed(parts.unet, CONV) - want).abs().max() < 1e-6


def test_lycoris_kinds_give_the_right_weights(tmp_path):
    linear, conv = (f"lora_unet_{name.replace('.', '_')}" for name in (LAYER, CONV))
    loha = dict(hada_w1_a=draw(192, 2), hada_w1_b=draw(2, 192), hada_w2_a=draw(192, 2, key="b"), hada_w2_b=draw(2, 192, key="b"), alpha=torch.tensor(1.))
    parts = attached(written(tmp_path, {f"{linear}.{key}": t for key, t in loha.items()}))
    assert (changed(parts.unet, LAYER) - (loha["hada_w1_a"] @ loha["hada_w1_b"]) * (loha["hada_w2_a"] @ loha["hada_w2_b"]) / 2).abs().max() < 1e-6
    lokr = dict(lokr_w1=draw(4, 4), lokr_w2=draw(48, 48, 3, 3), alpha=torch.tensor(1.))  # both whole: alpha says nothing
    parts = attached(written(tmp_path, {f"{conv}.{key}": t for key, t in lokr.items()}))
    assert (changed(parts.unet, CONV) - torch.kron(lokr["lokr_w1"][..., None, None], lokr["lokr_w2"])).abs().max() < 1e-5
    parts = attached(written(tmp_path, {f"{linear}.diff": draw(192, 192)}))
    assert (changed(parts.unet, LAYER) - draw(192, 192)).abs().max() < 1e-6


def test_our_kohya_dora_is_a_dora_for_generate_too(tmp_path):
    "diffusers drops dora_scale, with a warning that nobody saw: a DoRA was drawn as a plain LoRA."
    parts, text = adapted(EVERYTHING, BOTH, rank=2, alpha=3, use_dora=True)
    again = attached(save_kohya(tmp_path / "dora.safetensors", parts.unet, **text))
    assert (predict(again) - predict(parts)).abs().max() < 1e-5
    tensors, notes = load_tensors(tmp_path / "dora.safetensors")
    flat = {name: t for name, t in tensors.items() if "dora_scale" not in name}
    assert (predict(attached(written(tmp_path, flat, notes))) - predict(parts)).abs().max() > 1e-3


KOHYA_LAYER = f"lora_unet_{LAYER.replace('.', '_')}"
GOOD = {f"{KOHYA_LAYER}.lora_down.weight": draw(*DOWN), f"{KOHYA_LAYER}.lora_up.weight": draw(*UP)}
@pytest.mark.parametrize("tensors, words", [
    ({}, "holds no tensors"),
    ({**GOOD, "stray.lora_down.weight": draw(3, 3)}, "1 layers that this model lacks, for instance stray"),
    ({f"{KOHYA_LAYER}.lora_down.weight": draw(*DOWN)}, "tensor B is missing"),
    ({f"{KOHYA_LAYER}.alpha": torch.tensor(1.)}, "only alpha"),
    ({**GOOD, f"{KOHYA_LAYER}.lora_up.weight": draw(*UP) * torch.nan}, "not finite"),
    ({**GOOD, f"{KOHYA_LAYER}.alpha": torch.tensor(torch.inf)}, "not finite"),
    ({**GOOD, f"{KOHYA_LAYER}.lora_up.weight": torch.ones(*UP).long()}, "int64"),
    ({**GOOD, f"{KOHYA_LAYER}.dora_scale": torch.ones(1, 192)}, "one length for each input"),
    ({f"{KOHYA_LAYER}.lora_down.weight": draw(3, 7), f"{KOHYA_LAYER}.lora_up.weight": draw(*UP)}, "7 inputs"),
    ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": draw(*DOWN), "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": draw(*UP)}, "Flux"),
    ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": draw(*DOWN), "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": draw(*UP)}, "Flux"),
    ({"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": draw(2, 64), **GOOD}, "Stable Diffusion 1.5"),
    ({f"{KOHYA_LAYER}.oft_blocks": draw(2, 4, 4)}, "it is OFT"),
    ({f"{KOHYA_LAYER}.diff": draw(192, 192), f"{KOHYA_LAYER}.diff_b": draw(192)}, "a change of biases"),
])
def test_nothing_is_drawn_as_if_it_were_not_there(tmp_path, tensors, words):
    "In `generate` and in --init_lora alike: one reader, one check."
    file, parts = written(tmp_path, tensors), fresh_parts()
    with pytest.raises(CourseError, match=words): attach_lora(parts.pipeline(), file)
    assert not getattr(parts.unet, "peft_config", None)
    with pytest.raises(CourseError, match=words): initialize_lora_from(add_lora(parts.unet, rank=3, layers=LAYER), None, None, file)


def test_bundled_words_are_no_layers(tmp_path):
    assert (changed(attached(written(tmp_path, {**GOOD, "bundle_emb.TOK.clip_l": draw(2, 64)})).unet, LAYER) - draw(*UP) @ draw(*DOWN)).abs().max() < 1e-6


def braces(text):
    "a{b,c}d -> abd, acd; a{0..2} -> a0, a1, a2."
    match = re.search(r"\{([^{}]*)\}", text)
    if not match: return [text]
    low, dots, high = match[1].partition("..")
    inside = map(str, range(int(low), int(high) + 1)) if dots else match[1].split(",")
    return [one for word in inside for one in braces(text[:match.start()] + word + text[match.end():])]


# The names of Stability's SDXL in kohya's spelling, which ComfyUI, Forge, A1111, sd-scripts and InvokeAI look up in their own model.
BLOCK = "transformer_blocks_{}_{{attn{{1,2}}_to_{{q,k,v,out_0}},ff_net_{{0_proj,2}}}}"
DEEP, SHALLOW = BLOCK.format("{0..9}"), BLOCK.format("{0..1}")
SGM_KEYS = [f"input_blocks_{{4,5}}_1_{SHALLOW}", f"input_blocks_{{7,8}}_1_{DEEP}", f"middle_block_1_{DEEP}", f"output_blocks_{{0..2}}_1_{DEEP}", f"output_blocks_{{3..5}}_1_{SHALLOW}",
    "input_blocks_{1,2,4,5,7,8}_0_{in_layers_2,out_layers_3}", "input_blocks_{4,7}_0_skip_connection", "input_blocks_{3,6}_0_op", "middle_block_{0,2}_{in_layers_2,out_layers_3}",
    "output_blocks_{0..8}_0_{in_layers_2,out_layers_3,skip_connection}", "output_blocks_{2,5}_2_conv"]


def test_the_kohya_file_of_every_convolution_lora_has_the_names_that_other_programs_look_up():
    "A1111 dropped lora_unet_up_blocks_0_upsamplers_0_conv, one of 749."
    names = {sgm_name(module, 2).replace(".", "_") for module in sdxl_layers(EVERYTHING)}
    assert len(names) == 749 and names == {name for line in SGM_KEYS for name in braces(line)}


def sdxl_layers(choice):
    targets, unet = lora_targets(META.unet, choice), META.unet
    return [name for name in adaptable_layers(unet) if any(f".{name}".endswith(f".{end}") for end in targets)]


META = sdxl_architecture()
