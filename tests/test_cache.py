"What a cache must survive: other writers, broken files, changed pictures, a stopped run (page 32)."
import multiprocessing
import os
import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from sdxl_course import cache as cache_module
from sdxl_course.cache import LatentCache, collate, crop_origin, draw_latents, fingerprint, hashed, posterior, vae_dtype
from sdxl_course.components import tiny_architecture
from sdxl_course.core import CourseError, seeded
from sdxl_course.data import ImageRecord, inspect_picture, open_image
from sdxl_course.preprocess import prepare_image


@pytest.fixture(scope="module")
def components():
    "sdxl-tiny's sizes with random weights, and a tokenizer of single characters."
    from transformers import CLIPTokenizer
    letters = [chr(code) for code in range(33, 127)]
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    made = tiny_architecture(0, vocab_size=len(words))
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77, pad_token="!")
        setattr(made, name, tokenizer)
    return made


@pytest.fixture
def record(tmp_path):
    return make_record(tmp_path / "photo.png")


def make_record(path, width=48, height=40, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return inspect_picture(path, ["a photo"])[0]


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("latent_mean", "latent_std", "prompt_embeds", "pooled_prompt_embeds")) \
        and (a.original_size, a.crop_top_left, a.target_size, a.key) == (b.original_size, b.crop_top_left, b.target_size, b.key)


# ---- right -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", [None, "store"])
def test_a_kept_entry_equals_a_fresh_one_bit_for_bit(components, record, tmp_path, folder):
    store = LatentCache(folder and tmp_path / folder)
    first = store.entry(record, "a photo", components, 32, flip=True, crop_top_left=(0, 3))
    again = store.entry(record, "a photo", components, 32, flip=True, crop_top_left=(0, 3))
    prepared = prepare_image(open_image(record.path), 32, flip=True, crop_top_left=(0, 3))
    mean, std = posterior(components.vae, prepared.pixels[None])
    assert same(first, again) and same(first, store.load(first.key))
    assert torch.equal(first.latent_mean, mean[0]) and torch.equal(first.latent_std, std[0])
    assert (first.original_size, first.crop_top_left, first.target_size) == (prepared.original_size, prepared.crop_top_left, prepared.target_size)
    assert all(isinstance(pair, tuple) for pair in (again.original_size, again.crop_top_left, again.target_size))


def test_drawn_latents_are_the_reference_trainer_s(components):
    pixels = torch.rand(3, 3, 32, 32, generator=seeded("pixels")) * 2 - 1
    mean, std = posterior(components.vae, pixels)
    with torch.no_grad(): want = components.vae.encode(pixels).latent_dist.sample(generator=seeded("n")) * components.vae.config.scaling_factor
    torch.testing.assert_close(draw_latents(mean, std, torch.randn(mean.shape, generator=seeded("n"))), want, rtol=1e-6, atol=1e-6)


def test_each_fact_that_matters_changes_the_name(components, record, tmp_path):
    store, vae = LatentCache(), components.vae
    names = [store.picture(record, vae, 32)[0], store.picture(record, vae, 40)[0], store.picture(record, vae, 32, flip=True)[0],
             store.picture(record, vae, 32, crop_top_left=(0, 0))[0], store.picture(record, vae, 32, interpolation="bicubic")[0],
             store.picture(record, vae, 32, dtype=torch.float16)[0], store.picture(make_record(tmp_path / "b.png", seed=1), vae, 32)[0]]
    changed = deepcopy(vae)
    with torch.no_grad(): changed.encoder.conv_in.bias[0] += 1
    names.append(store.picture(record, changed, 32)[0])
    assert len(set(names)) == len(names)
    assert store.picture(record, vae, 32, crop_top_left=crop_origin(record, 32))[0] == names[0]      # the middle, in numbers
    moved = ImageRecord(record.path.rename(tmp_path / "renamed.png"), ("other words",), record.width, record.height, record.key)
    assert store.picture(moved, vae, 32)[0] == names[0]                                               # the name of a file does not matter


def test_only_what_changed_is_made_again(components, tmp_path):
    records, made = [make_record(tmp_path / f"{i}.png", seed=i) for i in range(4)], []
    hooks = [components.vae.encoder.register_forward_hook(lambda *_: made.append("picture")),
             components.text_encoder.register_forward_hook(lambda *_: made.append("caption"))]
    try:
        def epoch(captions): made.clear(); [LatentCache(tmp_path / "store").entry(r, c, components, 32) for r, c in zip(records, captions)]; return sorted(made)
        assert epoch("aabc") == ["caption"] * 3 + ["picture"] * 4
        assert epoch("aabc") == []
        assert epoch("aabd") == ["caption"]
        records[2] = make_record(tmp_path / "2.png", seed=9)
        assert epoch(["", "a", "b", "d"]) == ["caption", "picture"]
    finally:
        for hook in hooks: hook.remove()


def test_a_fingerprint_is_of_the_weights_and_asked_for_once(components, monkeypatch):
    vae, calls, digest = deepcopy(components.vae), [], cache_module.tensors_digest
    monkeypatch.setattr(cache_module, "tensors_digest", lambda tensors: calls.append(1) or digest(tensors))
    before = fingerprint(vae)
    assert fingerprint(vae) == before == fingerprint(components.vae) and len(calls) <= 2
    calls.clear(); fingerprint(vae); assert calls == []
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.1)
    for parameter in vae.parameters(): parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert fingerprint(vae) != before and calls
    half = deepcopy(components.vae).to(torch.bfloat16)
    assert fingerprint(half) != before and fingerprint(half.to(torch.float32)) != before
    other = deepcopy(components.vae); other.register_to_config(scaling_factor=0.5)
    assert fingerprint(other) != before


def test_kept_in_half_precision_if_asked(components, record, tmp_path):
    store = LatentCache(tmp_path / "store")
    half, full = (store.entry(record, "", components, 32, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert half.latent_mean.dtype == torch.bfloat16 and torch.equal(half.latent_mean, full.latent_mean.to(torch.bfloat16))
    assert collate([half]).latents.dtype == torch.float32


def test_the_format_to_encode_in_follows_the_flag(components):
    vae = deepcopy(components.vae)
    assert vae.config.force_upcast and vae_dtype(vae, torch.float16) == torch.float32
    vae.register_to_config(force_upcast=False)
    assert vae_dtype(vae, torch.float16) == torch.float16


# ---- broken ----------------------------------------------------------------------------------------------------------------

def test_cuts_and_flipped_bits_are_noticed(tmp_path):
    store, key = LatentCache(tmp_path), hashed("x")
    make = lambda: ({"x": torch.arange(5.)}, {"size": [1, 2]})
    store.get_or_make(key, make)
    whole = store.path(key).read_bytes()
    for damaged in [whole[:n] for n in range(0, len(whole), 19)] + [whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1:] for i in range(0, len(whole), 7)]:
        store.path(key).write_bytes(damaged)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            tensors, info = store.get_or_make(key, make)
        assert torch.equal(tensors["x"], torch.arange(5.))
        if told: assert "damaged" in str(told[0].message) and store.path(key).read_bytes() == whole and info == {"size": [1, 2]}


def test_the_sizes_of_an_entry_are_protected_too(tmp_path):
    store, key = LatentCache(tmp_path), hashed("x")
    store.get_or_make(key, lambda: ({"x": torch.zeros(2)}, {"size": [128, 96]}))
    store.path(key).write_bytes(store.path(key).read_bytes().replace(b"128", b"129"))
    with pytest.warns(UserWarning, match="damaged"): assert store.read(key) is None


def test_an_entry_under_a_wrong_name_is_not_believed(tmp_path):
    store, one, two = LatentCache(tmp_path), hashed("one"), hashed("two")
    store.get_or_make(one, lambda: ({"x": torch.zeros(2)}, {}))
    store.path(two).parent.mkdir(parents=True, exist_ok=True)
    store.path(two).write_bytes(store.path(one).read_bytes())
    with pytest.warns(UserWarning, match="damaged"): assert store.get_or_make(two, lambda: ({"x": torch.ones(2)}, {}))[0]["x"].sum() == 2


def test_latents_that_are_not_numbers_name_the_file(components, record, tmp_path):
    broken = deepcopy(components.vae)
    with torch.no_grad(): broken.quant_conv.bias[0] = float("nan")
    store = LatentCache(tmp_path / "store")
    with pytest.raises(CourseError, match="photo.png.*not finite"): store.picture(record, broken, 32)
    assert not (tmp_path / "store").exists()                                       # nothing wrong was kept


def test_a_picture_that_changed_after_reading_is_noticed(components, record, tmp_path):
    make_record(record.path, seed=5)
    with pytest.raises(CourseError, match="photo.png.*changed"): LatentCache().picture(record, components.vae, 32)
    record.path.unlink()
    with pytest.raises(CourseError, match="photo.png.*cannot be opened"): LatentCache().picture(record, components.vae, 32)


def test_without_networks_a_lost_entry_is_one_sentence(components, record, tmp_path):
    store = LatentCache(tmp_path / "store")
    key = store.entry(record, "a", components, 32).key
    store.path(key.split("-")[1]).unlink()
    with pytest.raises(CourseError, match="gone or damaged"): store.load(key)
    with pytest.raises(CourseError, match="gone or damaged"): store.load("nonsense")


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CourseError): LatentCache(tmp_path / "file").get_or_make(hashed("x"), lambda: ({"x": torch.zeros(1)}, {}))


# ---- shared and stopped ----------------------------------------------------------------------------------------------------

def fill(folder, start, turns):
    "One of several runs that fill the same folder, each in its own order."
    torch.set_num_threads(1)
    store = LatentCache(folder)
    for turn in range(turns):
        number = (start + turn * 7) % 20
        tensors, info = store.get_or_make(hashed(number), lambda: ({"x": torch.full((2000,), float(number))}, {"n": number}))
        assert info["n"] == number and bool((tensors["x"] == number).all())


def test_several_runs_may_share_the_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    runs = [context.Process(target=fill, args=(tmp_path, start, 60)) for start in range(3)]
    for run in runs: run.start()
    for run in runs: run.join(600)
    assert [run.exitcode for run in runs] == [0, 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(20): assert LatentCache(tmp_path).read(hashed(number))[1] == {"n": number}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".safetensors"]


def test_a_stopped_run_leaves_whole_entries_and_goes_on(components, tmp_path, monkeypatch):
    records = [make_record(tmp_path / f"{i}.png", seed=i) for i in range(3)]
    store, replace, done = LatentCache(tmp_path / "store"), os.replace, []
    def stop(*args):
        if len(done) == 3: raise KeyboardInterrupt
        done.append(args); return replace(*args)
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        for one in records: store.entry(one, "a", components, 32)
    monkeypatch.undo()
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert len(files) == 3 and all(path.suffix == ".safetensors" for path in files)
    straight = [LatentCache().entry(one, "a", components, 32) for one in records]
    assert all(same(store.entry(one, "a", components, 32), want) for one, want in zip(records, straight))


def test_on_disk_nothing_stays_in_memory(components, record, tmp_path):
    store = LatentCache(tmp_path / "store")
    for number in range(5): store.get_or_make(hashed(number), lambda: ({"x": torch.zeros(10)}, {}))
    store.entry(record, "a", components, 32)
    assert store.memory == {}


# ---- batches ---------------------------------------------------------------------------------------------------------------

def test_a_batch_holds_each_entry_s_own_facts(components, tmp_path):
    store = LatentCache()
    records = [make_record(tmp_path / f"{i}.png", width=40 + 8 * i, height=64 - 8 * i, seed=i) for i in range(3)]
    entries = [store.entry(one, str(i), components, 32, crop_top_left=(i, 0) if one.height > one.width else None) for i, one in enumerate(records)]
    noise = [torch.randn(entries[0].latent_mean.shape, generator=seeded("b", i)) for i in range(3)]
    batch, stacked = collate(entries, noise), collate(entries, torch.stack(noise))
    for i, one in enumerate(entries):
        assert torch.equal(batch.latents[i], draw_latents(one.latent_mean, one.latent_std, noise[i])) and torch.equal(batch.latents[i], stacked.latents[i])
        assert torch.equal(batch.prompt_embeds[i], one.prompt_embeds) and torch.equal(batch.pooled_prompt_embeds[i], one.pooled_prompt_embeds)
        assert batch.time_ids[i].tolist() == [records[i].height, records[i].width, *one.crop_top_left, 32, 32]
    alone = collate([entries[1]], [noise[1]])
    assert torch.equal(alone.latents[0], batch.latents[1])                             # a sample does not depend on its neighbours
