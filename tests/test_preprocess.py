"Properties of resize, buckets, flip and crop that hold for every size, and the report on a folder (page 21)."
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from sdxl_course.model.conditioning import make_time_ids
from sdxl_course.core import CourseError, seeded
from sdxl_course.data.report import DataReport
from sdxl_course.data.records import ImageRecord
from sdxl_course.world.samples import sample_dir
from sdxl_course.data.preprocess import INTERPOLATIONS, bucket_sizes, center_crop_origin, covering_size, crop, crop_loss, flip_left_right, nearest_bucket, prepare_image, random_crop_origin, resize, resized_size, to_tensor
from sdxl_course.data.report import FitReport, fit_records
from sdxl_course.data.check import check_data, load_tokenizer, main

side = st.integers(1, 90)
resolution = st.sampled_from([8, 16, 24, 32])
calm = settings(max_examples=60, deadline=None, derandomize=True)


def noisy(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@calm
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(8, 2048))
def test_shorter_side_is_the_resolution_and_proportions_stay(height, width, res):
    new = resized_size((height, width), res)
    assert min(new) == res
    assert resized_size((width, height), res) == new[::-1]
    assert new[0] * width == pytest.approx(new[1] * height, abs=max(height, width))      # at most one pixel of rounding


@calm
@given(st.integers(8, 4000), st.integers(8, 4000), st.integers(0, 10**6))
def test_both_windows_lie_inside(height, width, seed):
    size = resized_size((height, width), 8)
    for origin in (center_crop_origin(size, (8, 8)), random_crop_origin(size, (8, 8), seeded(seed))):
        assert all(0 <= start <= have - 8 for start, have in zip(origin, size))


@calm
@given(st.integers(8, 3000), st.integers(8, 3000), st.integers(8, 64))
def test_the_middle_is_rounded_as_in_the_reference_trainer(height, width, res):
    height, width = max(height, res), max(width, res)
    assert center_crop_origin((height, width), (res, res)) == (max(0, int(round((height - res) / 2.0))), max(0, int(round((width - res) / 2.0))))


@calm
@given(side, side, resolution, st.booleans(), st.integers(0, 1000), st.sampled_from(sorted(INTERPOLATIONS)))
def test_the_record_tells_what_was_done(height, width, res, flip, seed, interpolation):
    image = noisy(height, width, seed)
    one = prepare_image(image, res, flip=flip, generator=seeded(seed), interpolation=interpolation)
    assert one.pixels.shape == (3, res, res) and one.pixels.dtype == torch.float32 and one.pixels.abs().max() <= 1
    assert (one.original_size, one.target_size, one.flipped) == ((height, width), (res, res), flip)
    again = resize(image, resized_size((height, width), res), interpolation)
    if flip: again = flip_left_right(again)
    assert torch.equal(to_tensor(crop(again, one.crop_top_left, (res, res))), one.pixels)
    told = prepare_image(image, res, flip=flip, crop_top_left=one.crop_top_left, interpolation=interpolation)
    assert torch.equal(told.pixels, one.pixels)
    ids = make_time_ids(one.original_size, one.crop_top_left, one.target_size)
    assert ids.tolist() == [height, width, *one.crop_top_left, res, res]


# ---- buckets ---------------------------------------------------------------------------------------------------------------

@calm
@given(st.integers(32, 2048), st.sampled_from([8, 16, 32, 64, 128]), st.sampled_from([1.5, 2., 3.]))
def test_no_bucket_is_larger_than_the_square(res, step, ratio):
    buckets = bucket_sizes(res, step, ratio)
    used = max(8, min(step, res // 4 // 8 * 8))
    assert len(set(buckets)) == len(buckets) and {(w, h) for h, w in buckets} == set(buckets)       # lying and standing pictures are equals
    for height, width in buckets:
        assert 0 < height * width <= res**2 and height % used == width % used == 0
        assert max(height, width) <= ratio * min(height, width)
        if height > width: assert height * (width + used) > res**2                                    # no room for one step more
    assert (res // used * used,) * 2 in buckets                                                       # square pictures stay square


@calm
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(32, 1280))
def test_the_nearest_bucket_is_the_nearest(height, width, res):
    buckets = bucket_sizes(res)
    best = nearest_bucket((height, width), buckets)
    off = lambda bucket: abs(math.log(bucket[0] * width / (bucket[1] * height)))
    assert all(off(best) <= off(bucket) + 1e-12 for bucket in buckets)
    assert not any(abs(off(bucket) - off(best)) < 1e-15 and math.prod(bucket) > math.prod(best) for bucket in buckets if bucket[0] * best[1] == bucket[1] * best[0])


@settings(calm, max_examples=400)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(32, 1280), st.booleans(), st.integers(0, 10**6))
def test_every_window_of_every_picture_lies_inside(height, width, res, square, seed):
    target = (res, res) if square else nearest_bucket((height, width), bucket_sizes(res))
    size = covering_size((height, width), target)
    for origin in (center_crop_origin(size, target), random_crop_origin(size, target, seeded(seed))):
        assert all(0 <= start <= have - keep for start, have, keep in zip(origin, size, target))
    assert any(have == keep for have, keep in zip(size, target))                                      # nothing to spare on one side
    assert size[0] * width == pytest.approx(size[1] * height, abs=max(height, width))                 # proportions stay, to a pixel
    assert 0 <= crop_loss((height, width), target) < 1
    assert crop_loss((height, width), target) == pytest.approx(1 - math.prod(target) / math.prod(size))


@calm
@given(side, side, st.booleans(), st.booleans(), st.integers(0, 1000))
def test_the_record_of_a_bucket_tells_what_was_done(height, width, flip, middle, seed):
    "anchors.md 6 trap 20: the corner of the crop has to be that of the mirrored picture."
    image, target = noisy(height, width, seed), nearest_bucket((height, width), bucket_sizes(32))
    one = prepare_image(image, 32, flip=flip, center_crop=middle, generator=seeded(seed), target_size=target)
    again = resize(image, covering_size((height, width), target), "lanczos")
    if flip: again = flip_left_right(again)
    assert one.pixels.shape == (3, *target) and torch.equal(to_tensor(crop(again, one.crop_top_left, target)), one.pixels)
    assert make_time_ids(one.original_size, one.crop_top_left, one.target_size).tolist() == [height, width, *one.crop_top_left, *target]
    if flip and not middle:                                                                           # the corner was measured after the flip
        before = (one.crop_top_left[0], again.width - target[1] - one.crop_top_left[1])
        assert torch.equal(prepare_image(image, 32, crop_top_left=before, target_size=target).pixels.flip(-1), one.pixels)


# ---- windows and mirrors ---------------------------------------------------------------------------------------------------

@calm
@given(side, side, resolution, st.integers(0, 1000))
def test_a_mirrored_window_is_the_mirrored_picture_s_window(height, width, res, seed):
    image = noisy(height, width, seed)
    size = resized_size((height, width), res)
    top, left = random_crop_origin(size, (res, res), seeded(seed))
    plain = prepare_image(image, res, crop_top_left=(top, left)).pixels
    mirrored = prepare_image(image, res, crop_top_left=(top, size[1] - res - left), flip=True).pixels
    assert torch.equal(mirrored, plain.flip(-1))
    assert image.tobytes() == flip_left_right(flip_left_right(image)).tobytes()


@calm
@given(side, side, resolution, st.tuples(*[st.integers(0, 255)] * 3), st.sampled_from(sorted(INTERPOLATIONS)), st.booleans())
def test_a_flat_picture_stays_flat(height, width, res, color, interpolation, flip):
    pixels = prepare_image(Image.new("RGB", (width, height), color), res, center_crop=True, flip=flip, interpolation=interpolation).pixels
    assert torch.equal(pixels, to_tensor(Image.new("RGB", (res, res), color)))


def test_chance_comes_only_from_the_generator():
    image = noisy(40, 90)
    torch.manual_seed(1); first = prepare_image(image, 16, generator=seeded("a", 3))
    torch.manual_seed(2); again = prepare_image(image, 16, generator=seeded("a", 3))
    assert first.crop_top_left == again.crop_top_left and torch.equal(first.pixels, again.pixels)
    with pytest.raises(CourseError, match="generator"): prepare_image(image, 16)


def test_extreme_shapes_are_refused_before_memory_is():
    with pytest.raises(CourseError, match="extreme"): prepare_image(Image.new("RGB", (8000, 4)), 1024, center_crop=True)


# ---- companions ------------------------------------------------------------------------------------------------------------

@calm
@given(side, side, st.booleans(), st.booleans(), st.sampled_from([None, (24, 40), (40, 24), (32, 32)]), st.integers(0, 1000), st.sampled_from(sorted(INTERPOLATIONS)))
def test_a_companion_that_is_a_copy_stays_a_copy(height, width, flip, middle, target, seed, interpolation):
    image = noisy(height, width, seed)
    one = prepare_image(image, 32, middle, flip, interpolation, seeded(seed), target_size=target, companions=dict(copy=image.copy(), grey=image.convert("L")))
    alone = prepare_image(image, 32, middle, flip, interpolation, seeded(seed), target_size=target)
    assert torch.equal(one.pixels, alone.pixels) and one.crop_top_left == alone.crop_top_left and alone.extra == {}   # companions draw nothing
    assert torch.equal(one.extra["copy"], one.pixels)
    grey = resize(image.convert("L"), covering_size((height, width), one.target_size), "bilinear")
    want = to_tensor(crop(flip_left_right(grey) if flip else grey, one.crop_top_left, one.target_size))
    assert one.extra["grey"].shape == (1, *one.target_size) and one.extra["grey"].dtype == torch.float32 and torch.equal(one.extra["grey"], want)


def test_a_companion_of_another_size_is_refused():
    for name, companion in (("mask", Image.new("L", (40, 31))), ("control", noisy(40, 30))):
        with pytest.raises(CourseError) as error: prepare_image(noisy(30, 40), 16, True, companions={"right": noisy(30, 40), name: companion})
        assert str(error.value) == f"the {name} is {companion.width} x {companion.height}, its picture 40 x 30: wanted the same size"


def test_transparent_companions_lie_on_white():
    one = prepare_image(noisy(30, 40), 16, True, companions=dict(clear=Image.new("RGBA", (40, 30), (0, 0, 0, 0))))
    assert torch.equal(one.extra["clear"], torch.ones(3, 16, 16))


# ---- the report on a folder ------------------------------------------------------------------------------------------------

def report_on(sizes, res, buckets=False):
    records = [ImageRecord(f"{i}.png", ("a chair",), width, height, f"{i}") for i, (height, width) in enumerate(sizes)]
    return FitReport("x", records, [], [], [], [record.path for record in records], res, buckets)


@calm
@given(st.lists(st.tuples(st.integers(16, 3000), st.integers(16, 3000)), min_size=1, max_size=20), st.integers(32, 1280), st.booleans())
def test_the_bucket_table_counts_every_picture_once(sizes, res, buckets):
    report = report_on(sizes, res, buckets)
    fits, values = report.fits(), report.values()
    assert [fit.file for fit in fits] == report.files
    for fit in fits:
        assert fit.target == (nearest_bucket(fit.size, bucket_sizes(res)) if buckets else (res, res))
        assert fit.cut == crop_loss(fit.size, fit.target)
        assert (fit.scale > 1) == any(want > have for want, have in zip(fit.target, fit.size))
    assert sum(row["pictures"] for row in values["buckets"]) == len(sizes) and sum(row["enlarged"] for row in values["buckets"]) == sum(fit.scale > 1 for fit in fits)
    assert isinstance(report, DataReport) and "cut off" in str(report) and "cut off" in report._repr_markdown_()


def test_the_bucket_table_in_numbers():
    report = report_on([(1200, 1800), (1200, 1800), (512, 512), (2000, 2000)], 1024, buckets=True)
    assert {title: rows for title, head, rows in report.tables()} == {
        "buckets": [("1216 x 832", 2, 0, "3%", "3%", "0.png"), ("1024 x 1024", 2, 1, "0%", "0%", "-")],
        "enlarged most": [("2.png", "512 x 512", "1024 x 1024", "2.0 times", "0%")]}
    assert ("cut off", "1% on average in buckets (--use_aspect_ratio_buckets), 17% as squares") in report.summary()
    assert ("enlarged", "1 of 4 pictures, up to 2.0 times") in report.summary()


def test_every_kind_of_trouble_is_in_the_report():
    report = check_data(sample_dir("troublesome"), 128)
    text, shown = str(report), report._repr_markdown_().replace("&#95;", "_")
    troubles = {"../outside.png": "points outside", "nobody_home.png": "is not there", "no_caption.jpg": "no caption", "one_pixel.png": "1 x 1 pixels",
                "page_called.jpg": "not a picture", "strip_8000x4.png": "8000 x 4", "truncated.jpg": "damaged", "zero_bytes.png": "0 bytes",
                "animated.gif": "first frame", "cmyk.jpg": "from CMYK", "exif_orientation_6.jpg": "turned upright", "grey.png": "greyscale", "hidden_colours.png": "transparent",
                "palette_alpha.png": "transparent", "long_caption.jpg": "over 77 tokens", "png_called.jpg": "another format", "sixteen_bit.png": "16 bits",
                "straße_été_茶.jpg": "same picture as another", ".DS_Store": "other files"}
    for file, trouble in troubles.items():
        for found in (text, shown): assert [line for line in found.splitlines() if file in line and trouble in line], (file, trouble)
    assert "not heard: umbrella in the desert" in text and "exif_orientation_6.jpg" in text.split("cut off most:")[1]
    files = {path.relative_to(sample_dir("troublesome")).as_posix() for path in sample_dir("troublesome").rglob("*") if path.is_file()}
    assert files - set(troubles) == {"metadata.jsonl", "duplicate_of_another_file.jpg", "a folder/inside.jpg"}


def test_the_command_says_whether_anything_can_be_used(make_pictures, tmp_path, capsys):
    folder = make_pictures(3, captions=["one", "a chair", "a mug"])
    (folder / "1.png").write_bytes(b"")
    assert main([str(folder), "--resolution", "64", "--output", str(tmp_path / "report.json")]) == 0                      # remarks and problems are no errors
    out, err = capsys.readouterr()
    values = json.loads((tmp_path / "report.json").read_text())
    assert "usable pictures  2" in out and "1.png  it is empty" in out and err == ""
    assert values["usable_pictures"] == 2 and values["resolution"] == 64 and values["remarks"] == [{"file": "0.png", "kind": "a caption of one word", "detail": "one"}]
    for name in ("0.png", "2.png"): (folder / name).write_bytes(b"")
    assert main(["--train_data_dir", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert "usable pictures  0" in out and err.startswith("error: pictures has no usable picture: 0.png (it is empty") and err.count("\n") == 1
    (tmp_path / "nothing").mkdir()
    assert main([str(tmp_path / "nothing")]) == 2 and capsys.readouterr().err == "error: nothing has no usable picture: wanted files such as .jpg, .png or .webp, there or in folders below\n"


def test_pictures_without_any_caption_are_fit_for_dreambooth(make_pictures, capsys):
    folder = make_pictures(2)
    (folder / "metadata.jsonl").unlink()
    assert main([str(folder), "--resolution", "64"]) == 0 and "none: enough for dreambooth" in capsys.readouterr().out
    (folder / "0.txt").write_text("a chair")                                          # now the other one lacks its caption
    assert main([str(folder), "--resolution", "64"]) == 0 and "1.png  it has no caption" in capsys.readouterr().out


def test_columns_and_buckets_are_asked_for_by_the_trainers_names(make_pictures, capsys):
    folder = make_pictures(2, size=(64, 128))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"picture": row["file_name"], "words": row["text"]}) + "\n" for row in rows))
    assert main([str(folder), "--resolution", "64"]) == 2 and "no column 'file_name'" in capsys.readouterr().err
    flags = [str(folder), "--resolution", "64", "--image_column", "picture", "--caption_column", "words"]
    assert main(flags) == 0 and re.search(r"64 x 64 +2 +0 +50%", capsys.readouterr().out)
    assert main([*flags, "--use_aspect_ratio_buckets"]) == 0 and "80 x 48" in capsys.readouterr().out


def test_captions_are_measured_by_the_asked_for_model(make_pictures, toy_model, capsys):
    folder = make_pictures(1, captions=["a chair " * 20])
    assert main([str(folder)]) == 0 and "not heard" not in capsys.readouterr().out
    assert main([str(folder), "--model", str(toy_model)]) == 0 and "120" not in capsys.readouterr().err   # a tokenizer of single letters
    assert check_data(folder, 64, model=toy_model).remarks_by_kind()["a caption over 77 tokens"][0][1].startswith("122, not heard: ")
    assert check_data(folder, 64, model=toy_model, max_token_length=150).remarks == []


@pytest.mark.parametrize("words, say", [
    ([], "no folder was given"), (["a", "--train_data_dir", "b"], "two folders"), (["a", "--resolution", "big"], "invalid int value: 'big'"), (["nowhere"], "is not there"),
    (["a", "--resolutoin", "8"], "did you mean resolution?"), (["DIR", "--resolution", "8"], "too small"), (["DIR", "--resolution", "24", "--use_aspect_ratio_buckets"], "too small for buckets"),
    (["DIR", "--model", "tinny"], "no tokenizer of 'tinny'"), (["DIR", "--output", "DIR/0.png/report.json"], "could not be written")])
def test_what_stops_the_command_is_one_sentence(words, say, make_pictures, capsys):
    folder = make_pictures(1)
    assert main([word.replace("DIR", str(folder)) for word in words]) == 2
    err = capsys.readouterr().err
    assert say in err and err.startswith("error: ") and err.count("\n") == 1
