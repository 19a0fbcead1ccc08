"What a cache must survive: other writers, broken files, changed pictures, a stopped run (page 22)."
import os
import subprocess
import sys
import time
import warnings
from copy import copy, deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sdxl_course.data import cache as cache_module
from sdxl_course.data import loader as loader_module, shards as shards_module
from sdxl_course.data.cache import LatentCache, View, crop_origin, fingerprint, hashed
from sdxl_course.data.loader import BatchLoader, collate
from sdxl_course.data.sampler import MicroBatch
from sdxl_course.data.shards import EntryStore, pack_entry, read_shard, write_shard
from sdxl_course.model.latents import posterior, sample_latents, vae_dtype
from sdxl_course.model.components import load_components
from sdxl_course.model.architecture import tiny_architecture
from sdxl_course.model.conditioning import encode_prompts
from sdxl_course.core import CourseError, seeded
from sdxl_course.data.records import MASK, Companion, ImageRecord, content_key, inspect_picture, open_image, with_masks
from sdxl_course.data.check import read_dataset
from sdxl_course.data.preprocess import prepare_image

from course import environment
from forked import context


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
    torch.testing.assert_close(sample_latents(mean, std, torch.randn(mean.shape, generator=seeded("n"))), want, rtol=1e-6, atol=1e-6)


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


def test_each_fact_that_matters_changes_a_caption_s_name(components):
    store, changed = LatentCache(), []
    for part in ("text_encoder", "text_encoder_2"):
        other = copy(components); setattr(other, part, deepcopy(getattr(components, part)))
        with torch.no_grad(): next(getattr(other, part).parameters()).view(-1)[0] += 1
        half = copy(components); setattr(half, part, deepcopy(getattr(components, part)).to(torch.bfloat16))
        changed += [store.prompt(other, "a")[0], store.prompt(half, "a")[0]]
    names = [store.prompt(components, "a")[0], store.prompt(components, "b")[0], store.prompt(components, "")[0], store.prompt(components, "a", 150)[0], *changed]
    assert len(set(names)) == len(names) and store.prompt(copy(components), "a")[0] == names[0]


def test_buckets_masks_and_the_format_of_the_autoencoder_are_part_of_the_name(components, tmp_path):
    store, record = LatentCache(), make_record(tmp_path / "a.png", 48, 40)
    Image.new("L", (48, 40), 255).save(tmp_path / "white.png"); Image.new("L", (48, 40), 0).save(tmp_path / "black.png")
    half = deepcopy(components.vae).to(torch.bfloat16)
    names = [store.picture(record, components.vae, 32)[0], store.picture(record, half, 32)[0],
             *[store.picture(record, components.vae, 32, crop_top_left=(0, 0), target_size=target)[0] for target in (None, (24, 40), (40, 24))],
             *[store.picture(replace(record, companions={"mask": tmp_path / name}), components.vae, 32)[0] for name in ("white.png", "black.png")]]
    assert len(set(names)) == len(names)


def test_flips_and_crops_are_further_entries(components, tmp_path):
    record, made = make_record(tmp_path / "a.png", 80, 40), []
    hook = components.vae.encoder.register_forward_hook(lambda *_: made.append(1))
    try:
        for epoch in range(2):
            entries = {(flip, crop): LatentCache(tmp_path / "store").entry(record, "a", components, 32, flip=flip, crop_top_left=(0, crop)) for flip in (False, True) for crop in (0, 8, 20)}
            assert len(made) == 6
    finally: hook.remove()
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) == 6 + 1 and len({entry.key for entry in entries.values()}) == 6
    for (flip, left), entry in entries.items():
        pixels = prepare_image(open_image(record.path), 32, flip=flip, crop_top_left=(0, left)).pixels
        assert entry.crop_top_left == (0, left) and torch.equal(entry.latent_mean, posterior(components.vae, pixels[None])[0][0])


def test_the_empty_caption_is_a_caption_like_any_other(components, record, tmp_path):
    entry = LatentCache(tmp_path / "store").entry(record, "", components, 32)
    embeds, pooled = encode_prompts(components, [""])
    assert torch.equal(entry.prompt_embeds, embeds[0]) and torch.equal(entry.pooled_prompt_embeds, pooled[0])
    assert not torch.equal(entry.prompt_embeds, LatentCache().entry(record, "a", components, 32).prompt_embeds)
    assert same(LatentCache(tmp_path / "store").load(entry.key), entry)


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


def test_a_damaged_picture_is_encoded_again_with_a_message(components, record, tmp_path):
    store = LatentCache(tmp_path / "store")
    first = store.entry(record, "a", components, 32)
    for part in first.key.split("-"):
        whole = store.path(part).read_bytes()
        store.path(part).write_bytes(whole[:-3] + b"\0\0\0" if whole[-3:] != b"\0\0\0" else whole[:-3])
        with pytest.warns(UserWarning, match=f"{part}.safetensors is damaged and is made again"): again = store.entry(record, "a", components, 32)
        assert same(again, first) and store.path(part).read_bytes() == whole


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


def build(model, pictures, folder, start, barrier=None, pause=0.):
    "One of several runs that encode the same pictures into the same folder."
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    components, records, store = load_components(str(model)), read_dataset(pictures), LatentCache(folder)
    if barrier: barrier.wait(300)
    for k in range(len(records)):
        one = records[(start + k) % len(records)]
        store.entry(one, one.captions[0], components, 64)
        time.sleep(pause)


def kept(folder): return [path for path in folder.rglob("*") if path.is_file()]


def test_two_runs_may_fill_one_folder_at_the_same_time(toy_model, toy, make_pictures, tmp_path):
    pictures = make_pictures(6)
    barrier = context.Barrier(2)
    runs = [context.Process(target=build, args=(toy_model, pictures, tmp_path / "store", 0, barrier)) for start in range(2)]     # the same order: they meet at every entry
    for run in runs: run.start()
    for run in runs: run.join(300)
    assert [run.exitcode for run in runs] == [0, 0]
    assert len(kept(tmp_path / "store")) == 12 and all(path.suffix == ".safetensors" for path in kept(tmp_path / "store"))
    components, records = toy(), read_dataset(pictures)
    for one in records:
        straight = LatentCache().entry(one, one.captions[0], components, 64)
        assert same(LatentCache(tmp_path / "store").load(straight.key), straight)


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_killed_run_is_continued_where_it_was(toy_model, toy, make_pictures, tmp_path):
    pictures = make_pictures(6)
    run = context.Process(target=build, args=(toy_model, pictures, tmp_path / "store", 0, None, 0.2))
    run.start()
    whole = lambda: [path for path in kept(tmp_path / "store") if path.suffix == ".safetensors"]  # not the one that is being written
    while run.is_alive() and len(whole()) < 5: time.sleep(0.01)
    run.kill(); run.join(60)
    before = whole()
    assert run.exitcode < 0 and 5 <= len(before) < 12
    components, made = toy(), []
    hooks = [part.register_forward_hook(lambda *_: made.append(1)) for part in (components.vae.encoder, components.text_encoder_2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entries = [LatentCache(tmp_path / "store").entry(one, one.captions[0], components, 64) for one in read_dataset(pictures)]
    for hook in hooks: hook.remove()
    assert len(made) == 12 - len(before)
    assert all(same(entry, LatentCache().entry(one, one.captions[0], components, 64)) for entry, one in zip(entries, read_dataset(pictures)))


EPOCH = """
import io, json, os, random, sys
from pathlib import Path
import torch
from PIL import Image
from sdxl_course.data.cache import LatentCache, hashed
from sdxl_course.data.loader import BatchLoader, collate
from sdxl_course.data.sampler import MicroBatch
from sdxl_course.data.check import read_dataset
n, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
os.fsync = lambda handle: None                                     # nothing here must survive a crash
png = io.BytesIO(); Image.new("RGB", (16, 16), "red").save(png, "PNG")
folder.mkdir()
with open(folder / "metadata.jsonl", "w") as rows:
    for i in range(n):
        (folder / f"{i}.png").write_bytes(png.getvalue() + str(i).encode())
        rows.write(json.dumps({"file_name": f"{i}.png", "text": f"a photo of chair number {i} in a room"}) + chr(10))
records, store = read_dataset(folder), LatentCache(folder / "store")
sizes = {name: [16, 16] for name in ("original_size", "crop_top_left", "target_size")}
for i in range(16): store.write(hashed("words", i), {"prompt_embeds": torch.zeros(77, 24), "pooled_prompt_embeds": torch.zeros(16)}, {})
keys = [f"{hashed('picture', record.key)}-{hashed('words', i % 16)}" for i, record in enumerate(records)]
for i, key in enumerate(keys): store.write(key.split("-")[0], {"latent_mean": torch.full((4, 16, 16), float(i)), "latent_std": torch.zeros(4, 16, 16)}, sizes)
random.Random(0).shuffle(keys)
seen = 0
for k in range(0, n, 4):
    batch = collate([store.load(key) for key in keys[k:k + 4]], torch.randn(min(4, n - k), 4, 16, 16))
    seen += len(batch.latents)
assert seen == n == len(records) == len({record.key for record in records})
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")][0])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks Linux how much memory is resident")
@pytest.mark.slow
def test_ten_thousand_pictures_need_no_more_memory_than_a_hundred(tmp_path):
    def resident(n): return int(subprocess.run([sys.executable, "-c", EPOCH, str(n), str(tmp_path / str(n))], env=environment(), check=True, capture_output=True, text=True).stdout)
    few, many = resident(100), resident(10_000)                                    # kB, after an epoch over records and entries on disk
    assert many <= 1.1 * few, (few, many)


def test_on_disk_nothing_stays_in_memory(components, record, tmp_path):
    store = LatentCache(tmp_path / "store")
    for number in range(5): store.get_or_make(hashed(number), lambda: ({"x": torch.zeros(10)}, {}))
    store.entry(record, "a", components, 32)
    assert store.memory == {}


# ---- many at once, in few files ---------------------------------------------------------------------------------------------

def views_of(records): return [View(record, 32, flip, crop) for record in records for flip in (False, True) for crop in ((0, 0), (0, 3))]


def shards_in(folder): return sorted((folder / "shards").glob("*.safetensors"))


@pytest.mark.parametrize("folder", [None, "store"])
@pytest.mark.parametrize("threads", [1, 2])
def test_pictures_and_captions_made_together_are_bit_for_bit_those_made_alone(components, tmp_path, folder, threads):
    records, texts = [make_record(tmp_path / f"{i}.png", 44, 40, seed=i) for i in range(3)], [*"abcdefghijk", "", "a"]
    before, store = torch.get_num_threads(), LatentCache(folder and tmp_path / folder)
    torch.set_num_threads(threads)
    try:
        keys, words = store.pictures(views_of(records), components.vae), store.prompts(components, texts)
        assert torch.get_num_threads() == threads
        torch.set_num_threads(1)
        for view, key in zip(views_of(records), keys):
            wanted, tensors, sizes = LatentCache().picture(view.record, components.vae, 32, view.flip, view.crop_top_left)
            found, notes = store.fetch(key)
            assert (key, notes) == (wanted, sizes) and all(torch.equal(found[name], x) for name, x in tensors.items()) and found.keys() == tensors.keys()
        for text, key in zip(texts, words):
            wanted, tensors = LatentCache().prompt(components, text)
            assert key == wanted and all(torch.equal(store.fetch(key)[0][name], x) for name, x in tensors.items())
    finally: torch.set_num_threads(before)
    assert len(set(keys)) == 12 and len(set(words)) == 12 and words[0] == words[-1]
    if folder: assert len(shards_in(tmp_path / "store")) == 2 == len(kept(tmp_path / "store")) and store.memory == {}


def test_each_network_is_asked_once_for_each_entry_and_its_weights_are_read_once(components, tmp_path, monkeypatch):
    records, made, read, own = [make_record(tmp_path / f"{i}.png", 44, 40, seed=i) for i in range(2)], [], [], cache_module.fingerprint
    monkeypatch.setattr(cache_module, "fingerprint", lambda network: read.append(1) or own(network))
    hooks = [components.vae.encoder.register_forward_hook(lambda *_: made.append("picture")),
             components.text_encoder.register_forward_hook(lambda module, given, out: made.extend(["caption"] * len(out.last_hidden_state)))]
    before = torch.get_num_threads()
    torch.set_num_threads(2)                                                        # so that pictures are encoded side by side
    try:
        for turn in range(2):
            LatentCache(tmp_path / "store").pictures(views_of(records) * 3, components.vae)
            assert len(read) == 1
            LatentCache(tmp_path / "store").prompts(components, ["a", "b", "a", *"cdefghijkl", "a"])
            assert sorted(made) == (["caption"] * 12 + ["picture"] * 8) * (turn == 0)
            made.clear(); read.clear()
    finally:
        torch.set_num_threads(before)
        for hook in hooks: hook.remove()


def test_cuts_and_flipped_bits_in_a_shard_are_noticed_and_mended(tmp_path):
    entries = {hashed(i): ({"x": torch.arange(4.) + i}, {"size": [i, 2]}) for i in range(3)}
    rows = [(key, *entry) for key, entry in entries.items()]
    EntryStore(tmp_path).fill(iter(rows))
    shard, = shards_in(tmp_path)
    whole, warned = shard.read_bytes(), 0
    for damaged in [b"", *[whole[:n] for n in range(1, len(whole), 41)], *[whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1:] for i in range(0, len(whole), 13)]]:
        shard.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            store = EntryStore(tmp_path)
            store.fill(iter([row for row in rows if store.read(row[0]) is None]))
        assert all("damaged and is made again" in str(one.message) for one in told)
        warned += bool(told)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for key, (tensors, info) in entries.items():
                found = EntryStore(tmp_path).fetch(key)
                assert torch.equal(found[0]["x"], tensors["x"]) and found[1] == info
        if told: assert all(read_shard(one) for one in shards_in(tmp_path))
        for extra in shards_in(tmp_path):
            if extra != shard: extra.unlink()
    assert warned > 50


def test_a_damaged_shard_costs_only_what_is_damaged(tmp_path):
    rows = [(hashed(i), {"x": torch.full((50,), float(i))}, {}) for i in range(20)]
    EntryStore(tmp_path).fill(iter(rows))
    shard, = shards_in(tmp_path)
    data = bytearray(shard.read_bytes())
    _, begin, size = read_shard(shard)[rows[7][0]]
    data[begin + size - 3] ^= 1
    shard.write_bytes(data)
    with pytest.warns(UserWarning, match=f"{rows[7][0]}.safetensors is damaged") as told:
        store = EntryStore(tmp_path)
        lacking = [row for row in rows if store.read(row[0]) is None]
    assert [key for key, *_ in lacking] == [rows[7][0]] and len(told) == 1
    store.fill(iter(lacking))
    assert len(shards_in(tmp_path)) == 1 and all(EntryStore(tmp_path).read(key) for key, *_ in rows)


def slow_fill(folder, count, pause, order=1):
    "A run that makes entries slowly; a shard for every two or three of them."
    torch.set_num_threads(1)
    shards_module.SHARD_SECONDS = 2.5 * pause
    def rows():
        for i in range(count)[::order]:
            time.sleep(pause)
            yield hashed(i), {"x": torch.full((2000,), float(i))}, {"n": i}
    EntryStore(folder).fill(rows())


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_run_that_is_killed_leaves_whole_shards_only(tmp_path):
    run = context.Process(target=slow_fill, args=(tmp_path, 400, 0.02))
    run.start()
    while run.is_alive() and len(shards_in(tmp_path)) < 3: time.sleep(0.01)
    run.kill(); run.join(60)
    (tmp_path / "shards" / ".0f.part").write_bytes(shards_in(tmp_path)[0].read_bytes()[:-1])       # what a kill while writing leaves
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = EntryStore(tmp_path)
        found = [i for i in range(400) if store.read(hashed(i))]
        assert run.exitcode < 0 and 6 <= len(found) < 400 and found == list(range(len(found)))
        assert all(float(store.fetch(hashed(i))[0]["x"][-1]) == i for i in found)


def test_what_a_stopped_run_has_made_is_kept(components, tmp_path):
    records = [make_record(tmp_path / f"{i}.png", seed=i) for i in range(6)]
    records[4].path.write_bytes(b"no picture any more")
    with pytest.raises(CourseError, match="4.png.*changed"): LatentCache(tmp_path / "store").pictures([View(record, 32) for record in records], components.vae)
    store = LatentCache(tmp_path / "store")
    assert [store.read(View(record, 32).key(fingerprint(components.vae))) is not None for record in records] == [True] * 4 + [False] * 2


def test_several_runs_may_write_shards_into_one_folder(tmp_path):
    runs = [context.Process(target=slow_fill, args=(tmp_path, 30, 0.01, order)) for order in (1, 1, -1)]
    for run in runs: run.start()
    for run in runs: run.join(300)
    assert [run.exitcode for run in runs] == [0, 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = EntryStore(tmp_path)
        assert [store.fetch(hashed(i))[1]["n"] for i in range(30)] == list(range(30))
    assert all(path.suffix == ".safetensors" for path in kept(tmp_path))


def test_a_reader_follows_when_another_run_mends_a_shard(tmp_path):
    rows = [(hashed(i), {"x": torch.full((9,), float(i))}, {}) for i in range(4)]
    EntryStore(tmp_path).fill(iter(rows))
    reader, (shard,) = EntryStore(tmp_path), shards_in(tmp_path)
    reader.fetch(rows[0][0])
    write_shard(shard.parent, {key: pack_entry(key, *entry) for key, *entry in [*rows, (hashed("new"), {"x": torch.zeros(1)}, {})]})
    shard.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [float(reader.fetch(key)[0]["x"][0]) for key, *_ in rows] == [0, 1, 2, 3] and reader.read(hashed("new"))


def test_entries_with_a_file_each_are_still_read(components, record, tmp_path):
    key, _, _ = LatentCache(tmp_path).picture(record, components.vae, 32)                           # as every version before shards wrote them
    made = []
    hook = components.vae.encoder.register_forward_hook(lambda *_: made.append(1))
    try: assert LatentCache(tmp_path).pictures([View(record, 32)], components.vae) == [key] and made == []
    finally: hook.remove()
    assert not (tmp_path / "shards").exists()


BUILD = """
import io, json, sys
from pathlib import Path
import torch
from PIL import Image
from sdxl_course.data.cache import LatentCache
from sdxl_course.data.loader import BatchLoader
from sdxl_course.data.check import read_dataset
from sdxl_course.model.components import load_components
n, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
png = io.BytesIO(); Image.new("RGB", (16, 16), "red").save(png, "PNG")
folder.mkdir()
with open(folder / "metadata.jsonl", "w") as rows:
    for i in range(n):
        (folder / f"{i}.png").write_bytes(png.getvalue() + str(i).encode())
        rows.write(json.dumps({"file_name": f"{i}.png", "text": f"a photo of chair {i}"}) + chr(10))
loader = BatchLoader(read_dataset(folder), load_components(sys.argv[3]), 0, cache=LatentCache(folder / "store"), resolution=64)
loader.encode_once(True, True)
assert len(loader.latent_keys) == len(loader.text_keys) == n and loader.cache.memory == {} == loader.cache.waiting
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks Linux how much memory is resident")
@pytest.mark.slow
def test_encoding_ten_thousand_pictures_needs_no_more_memory_than_encoding_a_thousand(toy_model, tmp_path):
    def most(n): return int(subprocess.run([sys.executable, "-c", BUILD, str(n), str(tmp_path / str(n)), str(toy_model)], env=environment(), check=True, capture_output=True, text=True).stdout)
    few, many = most(1000), most(10_000)                                           # kB
    assert many <= 1.1 * few, (few, many)


# ---- copies of small caches ------------------------------------------------------------------------------------------------

def small_loader(records, components):
    loader = BatchLoader(records, components, 0, resolution=64)
    loader.choose_place(True, True, "nowhere")
    return loader


def test_the_next_run_finds_what_a_small_cache_held(toy, make_pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("SDXL_COURSE_CACHE", str(tmp_path / "home"))
    records, components, made = read_dataset(make_pictures(3)), toy(), []
    for part in (components.vae.encoder, components.text_encoder): part.register_forward_hook(lambda *_: made.append(1))
    first, again = [small_loader(records, components) for _ in range(2)]
    first.encode_once(True, True)
    count = len(made)
    again.encode_once(True, True)
    assert count == 3 + 2 and len(made) == count + 1                                # three pictures, their captions at once, the empty prompt; then that alone
    assert first.cache.folder == tmp_path / "home" / "encoded" and first.cache.in_memory and len(shards_in(first.cache.folder)) == 2
    for path in shards_in(first.cache.folder): path.unlink()                        # both runs have everything in memory
    batches = [loader.batch(micro, loader.prepare(micro))[0] for micro in [MicroBatch(0, 0, 0, (0, 1, 2), 3, True)] for loader in (first, again)]
    assert all(torch.equal(getattr(batches[0], name), getattr(batches[1], name)) for name in ("latents", "prompt_embeds", "pooled_prompt_embeds", "time_ids"))


@pytest.mark.parametrize("way", ["a file", "removed"])
def test_a_copy_that_cannot_be_kept_costs_nothing(toy, make_pictures, tmp_path, monkeypatch, way):
    home = tmp_path / "home"
    monkeypatch.setenv("SDXL_COURSE_CACHE", str(home))
    if way == "a file": home.write_text("in the way")
    loader = small_loader(read_dataset(make_pictures(3)), toy())
    if way == "removed": (home / "encoded" / "shards").write_text("in the way")
    loader.encode_once(True, True)
    assert loader.cache.folder is None and len(loader.cache.memory) == 6


def test_large_caches_go_to_the_run_s_folder_and_copies_do_not_grow_for_ever(toy, make_pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "IN_MEMORY", 1)
    loader = BatchLoader(read_dataset(make_pictures(2)), toy(), 0, resolution=64)
    loader.choose_place(True, True, tmp_path / "run")
    assert loader.cache.folder == tmp_path / "run" / "encoded" and not loader.cache.in_memory and loader.cache.limit is None
    for i in range(6): EntryStore(tmp_path / "copies", in_memory=True, limit=3000).fill(iter([(hashed(i), {"x": torch.zeros(200)}, {})]))
    sizes = [path.stat().st_size for path in shards_in(tmp_path / "copies")]
    assert 1 <= len(sizes) < 6 and sum(sizes) <= 3000 and EntryStore(tmp_path / "copies").read(hashed(5)) and not EntryStore(tmp_path / "copies").read(hashed(0))


# ---- batches ---------------------------------------------------------------------------------------------------------------

def test_a_batch_holds_each_entry_s_own_facts(components, tmp_path):
    store = LatentCache()
    records = [make_record(tmp_path / f"{i}.png", width=40 + 8 * i, height=64 - 8 * i, seed=i) for i in range(3)]
    entries = [store.entry(one, str(i), components, 32, crop_top_left=(i, 0) if one.height > one.width else None) for i, one in enumerate(records)]
    noise = [torch.randn(entries[0].latent_mean.shape, generator=seeded("b", i)) for i in range(3)]
    batch, stacked = collate(entries, noise), collate(entries, torch.stack(noise))
    for i, one in enumerate(entries):
        assert torch.equal(batch.latents[i], sample_latents(one.latent_mean, one.latent_std, noise[i])) and torch.equal(batch.latents[i], stacked.latents[i])
        assert torch.equal(batch.prompt_embeds[i], one.prompt_embeds) and torch.equal(batch.pooled_prompt_embeds[i], one.pooled_prompt_embeds)
        assert batch.time_ids[i].tolist() == [records[i].height, records[i].width, *one.crop_top_left, 32, 32]
    alone = collate([entries[1]], [noise[1]])
    assert torch.equal(alone.latents[0], batch.latents[1])                             # a sample does not depend on its neighbours


# ---- companions ------------------------------------------------------------------------------------------------------------

TWIN, COPY = Companion("twin", keep="latents"), Companion("copy")


def copied(records):
    "Each picture is its own companion, as latents and as pixels, and its own mask."
    return [replace(record, companions=dict(twin=record.path, copy=record.path, mask=record.path)) for record in records]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_companion_is_encoded_as_its_picture_is(components, record, tmp_path, dtype):
    record, store = copied([record])[0], LatentCache(tmp_path / "store")
    for options in (dict(), dict(flip=True, crop_top_left=(0, 3)), dict(target_size=(24, 40), interpolation="box")):
        key, tensors, sizes = store.picture(record, components.vae, 32, dtype=dtype, companions=(TWIN, COPY), **options)
        mean, std = posterior(components.vae, tensors["copy"][None])
        assert set(tensors) == {"latent_mean", "latent_std", "twin_mean", "twin_std", "copy", "mask"} and tensors["copy"].dtype == torch.float32
        for name in ("mean", "std"): assert torch.equal(tensors[f"twin_{name}"], tensors[f"latent_{name}"]) and tensors[f"twin_{name}"].dtype == dtype
        assert torch.equal(mean[0].to(dtype), tensors["latent_mean"])
    entry = store.entry(record, "a", components, 32, companions=(TWIN, COPY))
    assert set(entry.extra) == {"twin_mean", "twin_std", "copy", "mask"} and torch.equal(entry.extra["mask"], torch.ones(1, *entry.latent_mean.shape[1:]))
    assert all(torch.equal(entry.extra[name], store.load(entry.key).extra[name]) for name in entry.extra)


def test_companions_are_part_of_the_name(components, record, tmp_path):
    store, vae, names = LatentCache(), components.vae, []
    for seed in range(2):
        make_record(tmp_path / "other.png", seed=seed + 1)
        with_other = replace(record, companions=dict(other=tmp_path / "other.png", more=tmp_path / "other.png"))
        kinds = [(Companion("other"),), (Companion("other", keep="latents"),), (Companion("other", "L"),), (Companion("other", "L", "mask"),), (Companion("more"),),
                 (Companion("other"), Companion("more"))]
        names += [store.picture(with_other, vae, 32, companions=companions)[0] for companions in kinds]
        assert store.picture(with_other, vae, 32, companions=kinds[-1][::-1])[0] == names[-1]                                  # the order does not matter
        assert store.picture(with_other, vae, 32)[0] == store.picture(record, vae, 32)[0]                                      # nor what nobody asked for
    assert len(set(names)) == len(names)
    with pytest.raises(CourseError, match="has no other picture"): store.picture(record, vae, 32, companions=(Companion("other"),))


def test_names_without_companions_and_with_a_mask_are_those_of_old_caches(components, record):
    fixed = record.key, [32, 32], False, crop_origin(record, 32), "lanczos", fingerprint(components.vae), "torch.float32"
    masked, = with_masks([record])
    assert LatentCache().picture(record, components.vae, 32)[0] == hashed("picture 2", *fixed, None)
    for companions in ((), (MASK,)):
        key, tensors, _ = LatentCache().picture(masked, components.vae, 32, companions=companions)
        assert key == hashed("picture 2", *fixed, content_key(record.path.read_bytes())) and sorted(tensors) == ["latent_mean", "latent_std", "mask"]


def test_a_companion_whose_latents_are_not_numbers_is_named(components, record, tmp_path):
    broken, calls = deepcopy(components.vae), []
    hook = broken.quant_conv.register_forward_hook(lambda module, given, out: calls.append(1) or (out * float("nan") if len(calls) == 2 else out))
    record = replace(record, companions={"twin": make_record(tmp_path / "twin.png", seed=1).path})
    with pytest.raises(CourseError, match="twin.png: its latents are not finite"): LatentCache().picture(record, broken, 32, companions=(TWIN,))


@pytest.mark.parametrize("options", [dict(), dict(center_crop=True), dict(use_aspect_ratio_buckets=True), dict(cached_crops=2)], ids=str)
@pytest.mark.parametrize("kept", [False, True], ids=["fresh", "cached"])
def test_companions_share_crop_and_flip_in_every_batch(toy, make_pictures, options, kept):
    records, components = copied(read_dataset(make_pictures(4, size=(96, 144)))), toy()
    loader = BatchLoader(records, components, 3, resolution=64, random_flip=True, companions=(TWIN, COPY), **options)
    loader.encode_once(kept, True)
    views = set()
    for epoch in range(4):
        micro = MicroBatch(epoch, 0, epoch, (0, 2, 1, 3), 4, True)
        batch = loader.batch(micro, loader.prepare(micro))[0].to("cpu")
        means = torch.cat([posterior(components.vae, pixels[None])[0] for pixels in batch.extra["copy"]])
        torch.testing.assert_close(batch.extra["twin_mean"], means, rtol=1e-4, atol=1e-5)                # what is kept as pixels is what was encoded
        for one, twin, std, mask in zip(loader.latents(micro, loader.prepare(micro)), batch.extra["twin_mean"], batch.extra["twin_std"], batch.extra["mask"]):
            tensors = (loader.cache.fetch(one) if kept else one)[0]
            torch.testing.assert_close(twin, tensors["latent_mean"], rtol=1e-4, atol=1e-5); torch.testing.assert_close(std, tensors["latent_std"], rtol=1e-4, atol=1e-5)
            assert torch.equal(mask, torch.ones(1, *twin.shape[1:]))
        views |= {(i, *loader.augmentation(epoch, i)) for i in range(4)}
    assert len({flipped for i, flipped, crop in views}) == 2


def test_a_missing_mask_counts_everywhere_and_another_companion_may_not_be_missing(components, tmp_path):
    first, second = (make_record(tmp_path / f"{i}.png", seed=i) for i in range(2))
    Image.linear_gradient("L").resize((48, 40)).save(tmp_path / "mask.png")
    store, masked = LatentCache(), replace(first, companions=dict(mask=tmp_path / "mask.png", copy=first.path))
    some = collate([store.entry(masked, "", components, 32), store.entry(second, "", components, 32)])
    assert torch.equal(some.extra["mask"][1], torch.ones_like(some.extra["mask"][1])) and some.extra["mask"][0].min() < 0.2
    assert collate([store.entry(second, "", components, 32)]).extra == {}
    with pytest.raises(CourseError, match="1 of 2 samples of a batch have no 'copy'"):
        collate([store.entry(masked, "", components, 32, companions=(COPY,)), store.entry(second, "", components, 32)])


@pytest.mark.parametrize("kept", [False, True], ids=["fresh", "cached"])
def test_class_pictures_count_everywhere_and_need_the_method_s_companions_as_all_pictures_do(toy, make_pictures, tmp_path, kept):
    records, class_records, components = copied(read_dataset(make_pictures(2))), read_dataset(make_pictures(2)), toy()
    Image.linear_gradient("L").resize((64, 64)).save(tmp_path / "mask.png")
    masked, micro = [replace(record, companions=dict(mask=tmp_path / "mask.png")) for record in records], MicroBatch(0, 0, 0, (0, 1), 2, True)

    def batch(records, class_records, *companions):
        loader = BatchLoader(records, components, 3, resolution=64, class_records=class_records, companions=companions)
        loader.encode_once(kept, True)
        return loader.batch(micro, loader.prepare(micro))[0].to("cpu")
    mask = batch(masked, class_records).extra["mask"]
    assert len(mask) == 4 and mask[:2].amin() < 0.2 and torch.equal(mask[2:], torch.ones_like(mask[2:]))  # behind each picture that of its class
    with pytest.raises(CourseError, match=r"\.png has no copy picture: wanted one for every picture"): batch(records, class_records, COPY)
    assert len(batch(records, copied(class_records), COPY).extra["copy"]) == 4
