"Folders, tables and files that try to break the reader (page 20)."
import hashlib
import io
import json
import pickle
import unicodedata
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image, ImageOps
from sdxl_course.core import CourseError
from sdxl_course.data import files
from sdxl_course.data.files import natural_key
from sdxl_course.data.metadata import caption_list, read_metadata, row_name
from sdxl_course.data.records import MASK, Companion, companions_of, decode, inspect_picture, open_companion, open_image, open_mask
from sdxl_course.data.records import to_rgb, with_companions, with_masks
from sdxl_course.data.report import DataReport, caption_remarks, escape_markdown
from sdxl_course.data.check import check_dataset, read_dataset, scan
from sdxl_course.data.tables import choose_samples
from toy import make_tokenizer

calm = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def picture(width=32, height=24, seed=0):
    ramp = np.stack([*np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height)), np.full((height, width), 37.0 * seed % 256)], -1)
    return Image.fromarray(ramp.astype(np.uint8))


def encoded(image, **options):
    buffer = io.BytesIO(); image.save(buffer, **options)
    return buffer.getvalue()


def lines(folder, rows, name="metadata.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---- names -----------------------------------------------------------------------------------------------------------------

@calm
@given(st.lists(st.text(max_size=12), max_size=12))
def test_the_order_does_not_depend_on_where_one_starts(names):
    assert sorted(names, key=natural_key) == sorted(reversed(names), key=natural_key)


@calm
@given(st.text(st.sampled_from("./\\:~a b%ü\0") , max_size=16) | st.text(max_size=30))
def test_no_name_leaves_the_folder(name):
    try: clean = row_name(name)
    except CourseError: return
    root = Path("/somewhere/data")
    assert root in [Path(*Path(root, clean).parts)] + list(Path(root, clean).parents)
    assert ".." not in Path(clean).parts and not Path(clean).is_absolute()


@calm
@given(st.text(max_size=80))
def test_reports_show_strangers_text_as_text(text):
    shown = escape_markdown(text)
    assert not set(shown) & set("<>[]|*_`\\!\n\r") and '"' not in shown
    report = DataReport(text, [], [(text, text)], [(text, text)], [text])
    table = report._repr_markdown_()
    assert table.count("<") == 0 and all(line.count("|") in (0, 3, 4) for line in table.split("\n"))
    assert all(line.isprintable() for line in str(report).split("\n"))             # nothing that steers a terminal


# ---- picture files ---------------------------------------------------------------------------------------------------------

TURN = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}


@pytest.mark.parametrize("orientation", range(1, 9))
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(16, 40), height=st.integers(16, 40), seed=st.integers(0, 99), format=st.sampled_from(["png", "webp"]))
def test_every_exif_orientation_is_undone(orientation, width, height, seed, format, tmp_path):
    upright, exif = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)), Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(Image.Transpose[TURN[orientation]]) if orientation > 1 else upright
    stored.save(tmp_path / f"a.{format}", exif=exif, lossless=True)
    assert np.array_equal(np.asarray(open_image(tmp_path / f"a.{format}")), np.asarray(upright))
    record, remarks = inspect_picture(tmp_path / f"a.{format}")
    assert (record.width, record.height) == upright.size and [remark.startswith("turned upright") for remark in remarks] == [True] * (orientation > 1)


@calm
@given(st.integers(0, 999), st.integers(1, 12), st.integers(1, 12), st.sampled_from(["RGBA", "LA"]))
def test_transparency_is_white_paper_showing_through(seed, height, width, mode):
    rgba = np.random.default_rng(seed).integers(0, 256, (height, width, 2 if mode == "LA" else 4), dtype=np.uint8)
    color, alpha = rgba[..., :-1].astype(float), rgba[..., -1:] / 255
    got = np.asarray(to_rgb(Image.fromarray(rgba, mode)))
    assert np.abs(got - (color * alpha + 255 * (1 - alpha))).max() <= 1.001


@pytest.mark.parametrize("suffix, options", [(".webp", dict(lossless=True)), (".bmp", {}), (".tiff", {}), (".png", {}), (".gif", {})])
def test_every_format_opens(suffix, options, tmp_path):
    image = picture().quantize(16).convert("RGB")
    image.save(tmp_path / f"a{suffix}", **options)
    assert np.abs(np.asarray(open_image(tmp_path / f"a{suffix}")).astype(int) - np.asarray(image)).max() <= 8


def test_deep_pixels_of_both_byte_orders(tmp_path):
    grey = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 80
    want = np.round(grey / 257).astype(np.uint8)
    for name, array in {"small.tif": grey, "small.png": grey}.items():
        Image.fromarray(array).save(tmp_path / name)
        assert np.array_equal(np.asarray(open_image(tmp_path / name))[..., 0], want)
    big = Image.frombytes("I;16B", (32, 24), grey.astype(">u2").tobytes())
    big.save(tmp_path / "big.tif")
    assert np.array_equal(np.asarray(open_image(tmp_path / "big.tif"))[..., 0], want)


def test_hidden_colours_never_reach_the_model(tmp_path):
    rng = np.random.default_rng(0)
    rgba = np.dstack([rng.integers(0, 256, (24, 24, 3)), rng.choice([0, 255], (24, 24))]).astype(np.uint8)
    other = rgba.copy(); other[rgba[..., 3] == 0, :3] = 17
    for name, array in (("a.png", rgba), ("b.png", other)): Image.fromarray(array).save(tmp_path / name)
    a, b = (np.asarray(open_image(tmp_path / name)) for name in ("a.png", "b.png"))
    assert np.array_equal(a, b) and (a[rgba[..., 3] == 0] == 255).all()
    assert np.array_equal(a[rgba[..., 3] == 255], rgba[rgba[..., 3] == 255][:, :3])


SEEDS = [encoded(picture(), format="PNG"), encoded(picture(), format="JPEG"), encoded(picture(), format="GIF"),
         encoded(picture(), format="WEBP"), encoded(picture(), format="TIFF"), encoded(picture(), format="BMP"),
         encoded(picture().convert("RGBA"), format="PNG")]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6), st.integers(0, 4000))
def test_damaged_files_end_in_a_picture_or_a_sentence(data, changes, cut):
    data = bytearray(data)
    for place, value in changes: data[place % len(data)] = value
    for damaged in (bytes(data), bytes(data[:cut])):
        try: image = decode(damaged)
        except CourseError: continue
        assert image.mode == "RGB" and image.width * image.height <= 64_000_000


def test_inspection_refuses_what_opening_refuses(tmp_path):
    data = encoded(picture(64, 48), format="JPEG", quality=90)
    for cut in range(0, len(data) - 2, 37):
        (tmp_path / "a.jpg").write_bytes(data[:cut])
        with pytest.raises(CourseError): open_image(tmp_path / "a.jpg")
        with pytest.raises(CourseError): inspect_picture(tmp_path / "a.jpg")


# ---- folders ---------------------------------------------------------------------------------------------------------------

@calm
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode), st.sampled_from(["metadata.jsonl", "metadata.csv"]))
def test_any_metadata_file_ends_in_captions_or_problems(tmp_path, data, name):
    (tmp_path / name).write_bytes(data)
    captions, problems = read_metadata(tmp_path / name)
    assert all(isinstance(text, str) for texts in captions.values() for text in texts)
    assert all(isinstance(reason, str) for file, reason in problems)


@calm
@given(st.one_of(st.none(), st.integers(), st.text(), st.lists(st.text() | st.none())))
def test_captions_are_texts_or_an_error(value):
    try: texts = caption_list(value)
    except CourseError: return
    assert texts and all(text and text == text.strip() for text in texts)


def test_nested_folders_csv_sidecars_and_natural_order(tmp_path):
    for name in ("10.png", "2.png", "deep/er/1.png", "deep/3.PNG", "side.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=len(name)).save(tmp_path / name)
    lines(tmp_path, [{"file_name": "2.png", "text": "two"}, {"file_name": "10.png", "text": ["ten", "10"]}, {"file_name": "deep/er/1.png", "text": "one"}])
    (tmp_path / "deep" / "metadata.csv").write_bytes("\ufefffile_name,text\r\n3.PNG,\"three, or so\"\r\n".encode())
    (tmp_path / "side.txt").write_text("from the side\n\n")
    (tmp_path / ".git").mkdir(); (tmp_path / ".git" / "x.png").write_bytes(b"")
    (tmp_path / "notes.md").write_text("hello")
    records = read_dataset(tmp_path)
    assert [(record.path.relative_to(tmp_path).as_posix(), record.captions) for record in records] == [
        ("2.png", ("two",)), ("10.png", ("ten", "10")), ("deep/3.PNG", ("three, or so",)), ("deep/er/1.png", ("one",)), ("side.png", ("from the side",))]
    assert scan(tmp_path).others == ["notes.md"]
    assert read_dataset(dataset_name=str(tmp_path)) == records                       # a folder of pictures under the other flag
    assert check_dataset("deep", dataset_name=str(tmp_path)).files == ["3.PNG"]      # and a folder within it
    with pytest.raises(CourseError, match="is not there"): check_dataset("shallow", dataset_name=str(tmp_path))


def test_accents_in_two_spellings_are_one_name(tmp_path):
    picture().save(tmp_path / unicodedata.normalize("NFD", "größe.png"))
    lines(tmp_path, [{"file_name": unicodedata.normalize("NFC", "größe.png"), "text": "big"}])
    assert read_dataset(tmp_path)[0].captions == ("big",)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "file:///secret.png", "local://secret.png", "sub/../../secret.png", "C:\\secret.png"])
def test_metadata_cannot_reach_outside(name, tmp_path):
    inside = tmp_path / "inside"; inside.mkdir()
    picture().save(tmp_path / "secret.png"); picture(seed=1).save(inside / "1.png")
    lines(inside, [{"file_name": "1.png", "text": "one"}, {"file_name": name, "text": "stolen"}])
    with pytest.raises(CourseError, match="outside the folder"): read_dataset(inside)
    assert [record.path.name for record in read_dataset(inside, on_problem="skip")] == ["1.png"]


def test_a_legitimate_subfolder_is_allowed(tmp_path):
    (tmp_path / "sub").mkdir(); picture().save(tmp_path / "sub" / "1.png")
    lines(tmp_path, [{"file_name": "./sub/1.png", "text": "one"}])
    assert read_dataset(tmp_path)[0].captions == ("one",)


def test_what_stops_the_trainer_is_one_sentence(tmp_path):
    cases = [(dict(train_data_dir=tmp_path / "nowhere"), "is not there"), (dict(train_data_dir=__file__), "is a file"), ({}, "no data was given"),
             (dict(train_data_dir=tmp_path), "no pictures")]
    for options, say in cases:
        with pytest.raises(CourseError, match=say): read_dataset(**options)
    picture().save(tmp_path / "1.png"); picture(seed=1).save(tmp_path / "2.png")
    with pytest.raises(CourseError, match="1.png has none, nor has any of the 2"): read_dataset(tmp_path)
    (tmp_path / "1.txt").write_text("one")
    with pytest.raises(CourseError, match="2.png .it has no caption"): read_dataset(tmp_path)
    assert len(read_dataset(tmp_path, require_captions=False)) == 2
    lines(tmp_path, [{"file_name": "1.png", "caption": "one"}, {"file_name": "2.png", "caption": 7}])
    with pytest.raises(CourseError, match="did you mean caption_column='caption'|name one with caption_column"): read_dataset(tmp_path)
    with pytest.raises(CourseError, match="7 .int."): read_dataset(tmp_path, caption_column="caption")
    with pytest.raises(CourseError, match="on_problem"): read_dataset(tmp_path, caption_column="caption", on_problem="ignore")
    with pytest.raises(CourseError, match="max_train_samples"): read_dataset(tmp_path, caption_column="caption", max_train_samples=0)
    (tmp_path / "3.psd").write_bytes(b"x")
    assert ("3.psd", "pictures of this kind are not read: export it as JPEG or PNG") in scan(tmp_path).problems


def test_avif_is_read_where_pillow_can_and_named_where_it_cannot(tmp_path):
    from PIL import features
    from sdxl_course.data.records import open_image
    picture(seed=1).save(tmp_path / "1.png")
    if "avif" not in features.get_supported():
        (tmp_path / "2.avif").write_bytes(b"x")
        assert [file for file, reason in scan(tmp_path).problems if "export it as JPEG or PNG" in reason] == ["2.avif"]
        return
    picture(seed=1).save(tmp_path / "2.avif", quality=100, subsampling="4:4:4")
    records = read_dataset(tmp_path, require_captions=False)
    assert [record.path.name for record in records] == ["1.png", "2.avif"] and records[1].key != records[0].key
    first, second = (np.asarray(open_image(record.path), int) for record in records)
    assert first.shape == second.shape and np.abs(first - second).max() <= 12


def test_a_phones_pictures_are_read_where_pillow_heif_is_and_else_its_name_is_given(tmp_path):
    from sdxl_course.data.files import SUFFIXES
    from sdxl_course.data.records import open_image
    (tmp_path / "2.heic").write_bytes(b"x")
    reason = dict(scan(tmp_path).problems)["2.heic"]
    if "HEIF" not in SUFFIXES: assert reason.endswith("export it as JPEG or PNG, or pip install pillow-heif"); return
    assert "not a picture of a known format" in reason
    picture(seed=1).save(tmp_path / "2.heic", quality=100, chroma=444)
    drawn, read = np.asarray(picture(seed=1), int), np.asarray(open_image(read_dataset(tmp_path, require_captions=False)[0].path), int)
    assert read.shape == drawn.shape and np.abs(read - drawn).max() <= 12


def test_a_subset_is_repeatable_and_not_checked_beyond_itself(tmp_path):
    for i in range(12): picture(seed=i).save(tmp_path / f"{i}.png")
    lines(tmp_path, [{"file_name": f"{i}.png", "text": str(i)} for i in range(12)])
    kept = read_dataset(tmp_path, max_train_samples=5, seed=3)
    assert kept == read_dataset(tmp_path, max_train_samples=5, seed=3) and len(kept) == 5
    assert [int(record.captions[0]) for record in kept] == choose_samples(12, 5, 3)
    assert {tuple(choose_samples(12, 5, seed)) for seed in range(5)} != {tuple(choose_samples(12, 5, 0))}


def test_the_report_counts_every_file_once(tmp_path):
    picture().save(tmp_path / "1.png"); (tmp_path / "2.png").write_bytes(b""); (tmp_path / "x.pdf").write_bytes(b"x")
    picture().save(tmp_path / "copy.png")
    lines(tmp_path, [{"file_name": name, "text": "a"} for name in ("1.png", "2.png", "copy.png")])
    report = scan(tmp_path)
    assert (len(report.records), len(report.problems), report.others) == (2, 1, ["x.pdf"])
    assert ("copy.png", "the same picture as another: 1.png") in report.remarks and report.duplicates() == [["1.png", "copy.png"]]
    assert "2.png" in str(report) and "usable pictures | 2, 1 different" in report._repr_markdown_()


def test_a_caption_that_is_too_long_says_which_text_is_lost(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer")                              # one token a letter
    picture().save(tmp_path / "1.png"); (tmp_path / "1.txt").write_text("ab " * 37 + "c " + "de" * 5)
    def remarks(**options): return scan(tmp_path, tokenizer=tokenizer, **options).remarks
    (file, remark), = remarks()
    assert file == "1.png" and remark.startswith("a caption over 77 tokens: 87, not heard: ") and remark.split("heard: ")[1].replace(" ", "") == "de" * 5
    assert remarks(max_token_length=150) == [] and scan(tmp_path).remarks == []
    (tmp_path / "1.txt").write_text("ab " * 37 + "c")                               # 75 letters: the last that fits
    assert remarks() == []


@pytest.mark.parametrize("caption, few", [("chair", True), ("chair.", True), (".", True), ("a chair", False), ("椅子", False), ("sks chair", False)])
def test_a_caption_that_says_next_to_nothing_is_remarked_on(caption, few):
    assert [remark.split(": ")[0] for remark in caption_remarks((caption,))] == ["a caption of one word"] * few


def test_a_long_report_stays_short_and_its_values_complete(tmp_path, monkeypatch):
    for i in range(30): picture(seed=i).convert("L").save(tmp_path / f"{i}.png"); (tmp_path / f"{i + 100}.png").write_bytes(b"")
    walked = []
    monkeypatch.setattr(files, "_walk", lambda folder, walk=files._walk: walked.append(folder) or walk(folder))
    assert len(scan(tmp_path, require_captions=None).problems) == 30 and walked == [tmp_path]  # once
    report = scan(tmp_path, require_captions=False)
    text, values = str(report), report.values()
    assert len(text.splitlines()) < 40 and "and 10 more" in text and "and 25 more" in text
    assert (len(values["problems"]), len(values["remarks"]), len(values["pictures"])) == (30, 30, 30)
    assert json.loads(json.dumps(values))["pictures"][2]["file"] == "2.png"


def test_columns_of_a_report_are_aligned_under_wide_signs(tmp_path):
    (tmp_path / "茶.png").write_bytes(b""); (tmp_path / "abc.png").write_bytes(b"")
    rows = [line for line in str(scan(tmp_path)).splitlines() if "0 bytes" in line]
    assert len({line.index("it is empty") + line.count("茶") for line in rows}) == 1 and len(rows) == 2


def test_what_is_checked_before_training_is_what_is_trained_on(tmp_path):
    for i in range(3): picture(seed=i).save(tmp_path / f"{i}.png"); (tmp_path / f"{i}.txt").write_text("a chair")
    (tmp_path / "2.png").write_bytes(b""); (tmp_path / "notes.md").write_text("")
    seen = []
    report = check_dataset(tmp_path, bar=lambda items, words: seen.append((len(items), words)) or items)
    assert report.records == read_dataset(tmp_path, on_problem="skip") and report.others == ["notes.md"] and seen == [(3, "reading pictures")]
    with pytest.raises(CourseError, match="1 problem: 2.png"): report.usable()


def test_a_record_is_small_and_survives_another_process(tmp_path):
    picture().save(tmp_path / "a.png")
    record = inspect_picture(tmp_path / "a.png", ["a"])[0]
    assert not hasattr(record, "__dict__") and pickle.loads(pickle.dumps(record)) == record


# ---- companions ------------------------------------------------------------------------------------------------------------

def some_records(folder, n=3):
    folder.mkdir()
    for i in range(n): picture(seed=i).save(folder / f"{i}.png")
    return read_dataset(folder, require_captions=False)


def test_companions_are_found_by_the_picture_s_name_whatever_their_ending(tmp_path):
    records, folder = some_records(tmp_path / "a"), tmp_path / "b"
    folder.mkdir(); (folder / "notes.txt").write_text("not a picture")
    for i, ending in enumerate(("png", "webp", "tiff")): picture(seed=9 + i).save(folder / f"{i}.{ending}", **dict(lossless=True) if ending == "webp" else {})
    both = with_masks(with_companions(records, "control", folder), folder)
    assert [sorted(record.companions) for record in both] == [["control", "mask"]] * 3 and all(not record.companions for record in records)
    for i, record in enumerate(both):
        assert np.array_equal(np.asarray(open_companion(record, Companion("control"))), np.asarray(picture(seed=9 + i)))
        assert np.array_equal(np.asarray(open_companion(record, Companion("control", "L"))), np.asarray(picture(seed=9 + i).convert("L")))
        assert np.array_equal(np.asarray(open_mask(record)), np.asarray(picture(seed=9 + i).convert("L")))
        assert replace(record, companions={}) == records[i] != record and pickle.loads(pickle.dumps(record)) == record and hash(record) == hash(records[i])


@pytest.mark.parametrize("name, noun", [("mask", "mask"), ("original", "original picture")])
def test_a_companion_that_is_missing_is_named(name, noun, tmp_path):
    records, folder = some_records(tmp_path / "a"), tmp_path / "b"
    with pytest.raises(CourseError) as error: with_companions(records, name, folder)
    assert str(error.value) == f"{name}_data_dir {str(folder)!r} is not there: wanted a folder of {noun}s named like the pictures"
    folder.mkdir(); picture().save(folder / "0.png")
    with pytest.raises(CourseError) as error: with_companions(records, name, folder)
    assert str(error.value) == f"{folder} has no {noun} for 2 of 3 pictures, for instance 1.png: wanted 1.png"
    with pytest.raises(CourseError, match=f"0.png has no {noun}: wanted one for every picture"): open_companion(records[0], Companion(name))


@pytest.mark.parametrize("companion, article", [(MASK, "a mask"), (Companion("original", keep="latents"), "an original picture")])
def test_a_companion_that_does_not_fit_or_open_is_one_sentence(companion, article, tmp_path):
    record, file = some_records(tmp_path / "a", 1)[0], tmp_path / "b" / "0.png"
    file.parent.mkdir(); picture(20, 24).save(file)
    record, = with_companions([record], companion.name, file.parent)
    with pytest.raises(CourseError, match="is 20 x 24, its picture 32 x 24: wanted the same size"): open_companion(record, companion)
    data = encoded(picture(), format="PNG")
    for damaged in (b"", b"no picture", data[:len(data) // 2], data[:30]):
        file.write_bytes(damaged)
        with pytest.raises(CourseError, match=f"0.png: it cannot be opened as {article} "): open_companion(record, companion)
    file.unlink()
    with pytest.raises(CourseError, match=f"cannot be opened as {article} .*No such file"): open_companion(record, companion)


def test_companions_are_upright_and_keep_what_their_mode_can_hold(tmp_path):
    exif, upright = Image.Exif(), picture()
    exif[0x0112] = 6
    for folder in ("a", "b"): (tmp_path / folder).mkdir()
    upright.save(tmp_path / "a" / "0.png"); upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b" / "0.png", exif=exif)
    record, = with_companions([inspect_picture(tmp_path / "a" / "0.png")[0]], "control", tmp_path / "b")
    assert np.array_equal(np.asarray(open_companion(record, Companion("control"))), np.asarray(upright))
    deep = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 80                                 # a depth map of 16 bits
    Image.fromarray(deep).save(tmp_path / "b" / "0.png")
    assert np.array_equal(np.asarray(open_companion(record, Companion("control", "L"))), np.round(deep / 257).astype(np.uint8))


def test_a_picture_is_its_own_mask_by_its_alpha_and_its_own_companion_by_its_colours(tmp_path):
    alpha, image = np.tile(np.uint8([0, 60, 255, 255]), (24, 8)), picture()
    image.putalpha(Image.fromarray(alpha)); image.save(tmp_path / "0.png")
    record, = with_masks([inspect_picture(tmp_path / "0.png")[0]])
    record = replace(record, companions=record.companions | {"original": record.path})
    assert np.array_equal(np.asarray(open_mask(record)), alpha)
    assert np.array_equal(np.asarray(open_companion(record, Companion("original"))), np.asarray(open_image(record.path)))
    picture().save(tmp_path / "1.png")
    assert open_mask(with_masks([inspect_picture(tmp_path / "1.png")[0]])[0]).getextrema() == (255, 255)


def test_a_mask_travels_without_being_asked_for(tmp_path):
    plain, = some_records(tmp_path / "a", 1)
    masked, control, other = with_masks([plain])[0], Companion("control"), Companion("mask", "L")
    assert companions_of(plain) == () and companions_of(plain, [control]) == (control,) and companions_of(masked) == (MASK,)
    assert companions_of(masked, (control,)) == (control, MASK) and companions_of(masked, (MASK, control)) == (MASK, control)
    assert companions_of(masked, (other,)) == (other,)


@pytest.mark.parametrize("words, say", [(("", "RGB"), "name of its own"), (("latent_mean", "RGB"), "name of its own"), (("x", "P"), "'RGB' or 'L'"),
    (("x", "L", "numbers"), "pixels, latents, mask"), (("x", "RGB", "mask"), "masks are 'L'"), (("x", "L", "latents"), "masks are 'L'")])
def test_a_companion_that_makes_no_sense_is_refused(words, say):
    with pytest.raises(CourseError, match=say): Companion(*words)


# ---- tables ----------------------------------------------------------------------------------------------------------------

def saved(folder, columns, name="saved"):
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(str(folder / name))
    return str(folder / name)


def test_a_saved_table_gives_the_same_keys_as_the_files(tmp_path):
    (tmp_path / "files").mkdir()
    for i in range(3): picture(seed=i).save(tmp_path / "files" / f"{i}.png")
    where = saved(tmp_path, {"image": [str(tmp_path / "files" / f"{i}.png") for i in range(3)], "text": ["a", "b", "c"]})
    records = read_dataset(dataset_name=where, cache_dir=tmp_path / "cache")
    assert [record.key for record in records] == [hashlib.sha256((tmp_path / "files" / f"{i}.png").read_bytes()).hexdigest()[:24] for i in range(3)]
    assert all(record.path.is_file() and (tmp_path / "cache") in record.path.parents for record in records)
    assert records == read_dataset(dataset_name=where, cache_dir=tmp_path / "cache")
    assert len(read_dataset(dataset_name=where, cache_dir=tmp_path / "cache", max_train_samples=2)) == 2


def test_rows_of_a_table_are_checked_too(tmp_path):
    good, broken = encoded(picture(), format="PNG"), b"no picture"
    where = saved(tmp_path, {"image": [{"bytes": good, "path": None}, {"bytes": broken, "path": None}, {"bytes": good[:60], "path": None}], "text": ["a", "b", "c"]})
    with pytest.raises(CourseError, match="row 1 .it is not a picture"): read_dataset(dataset_name=where, cache_dir=tmp_path / "cache")
    assert [record.captions for record in read_dataset(dataset_name=where, cache_dir=tmp_path / "cache", on_problem="skip")] == [("a",)]


def test_a_table_cannot_point_at_other_files(tmp_path):
    picture().save(tmp_path / "secret.png")
    table = datasets.Dataset.from_dict({"image": [str(tmp_path / "secret.png")], "text": ["mine"]})
    datasets.disable_progress_bars(); table.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(CourseError, match="outside the dataset"): read_dataset(dataset_name=str(tmp_path / "saved"), cache_dir=tmp_path / "cache")


def test_tables_that_do_not_fit_say_why(tmp_path):
    where = saved(tmp_path, {"image": [{"bytes": encoded(picture(), format="PNG"), "path": None}], "text": ["a"]})
    with pytest.raises(CourseError, match="did you mean 'image'"): read_dataset(dataset_name=where, image_column="imge", cache_dir=tmp_path)
    with pytest.raises(CourseError, match="its columns are image, text"): read_dataset(dataset_name=where, caption_column="prompt", cache_dir=tmp_path)
    datasets.DatasetDict({"test": datasets.load_from_disk(where)}).save_to_disk(str(tmp_path / "split"))
    with pytest.raises(CourseError, match="no split 'train'"): read_dataset(dataset_name=str(tmp_path / "split"), cache_dir=tmp_path)
    numbers = datasets.Dataset.from_dict({"image": [1], "text": ["a"]}); numbers.save_to_disk(str(tmp_path / "numbers"))
    with pytest.raises(CourseError, match="holds no pictures"): read_dataset(dataset_name=str(tmp_path / "numbers"), cache_dir=tmp_path)


def test_an_unknown_dataset_is_one_sentence(monkeypatch, tmp_path):
    def absent(*args, **options): raise FileNotFoundError("no such dataset\nsecond line")
    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(CourseError, match="'nobody/nothing' cannot be loaded .no such dataset."): read_dataset(dataset_name="nobody/nothing", cache_dir=tmp_path)


# ---- the sample folder -----------------------------------------------------------------------------------------------------

def test_the_troublesome_folder_is_made_the_same_twice(tmp_path):
    from sdxl_course.world.samples import write_troublesome
    def contents(folder): return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    first, second = (contents(write_troublesome(tmp_path / name, picture(128, 128))) for name in ("a", "b"))
    assert first == second and sum(map(len, first.values())) < 400_000
    report = scan(tmp_path / "a")
    pictures = [name for name in first if name not in ("metadata.jsonl", ".DS_Store")]
    refused = {file for file, reason in report.problems}
    assert len(report.records) + len(refused & set(pictures)) == len(pictures)
    assert refused - set(pictures) == {"../outside.png", "nobody_home.png"}


def test_sample_pictures_that_an_older_renderer_left_in_the_cache_are_not_taken(tmp_path, monkeypatch):
    "Without the repository's copy beside the package, as after pip install."
    import shutil
    from sdxl_course.world import samples
    here, drawn = Path(samples.__file__).parent, []
    shutil.copytree(here, tmp_path / "site" / "sdxl_course" / "world", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("SDXL_COURSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(samples, "files", lambda package: tmp_path / "site" / package)
    monkeypatch.setattr(samples, "write_samples", lambda name, folder: (drawn.append(name), folder.mkdir()))
    first = samples.sample_dir("green_chair")
    assert samples.sample_dir("green_chair") == first and drawn == ["green_chair"]
    with open(tmp_path / "site" / "sdxl_course" / "world" / "render.py", "a") as file: file.write("# lines follow the form\n")
    assert samples.sample_dir("green_chair") != first and drawn == ["green_chair"]*2
