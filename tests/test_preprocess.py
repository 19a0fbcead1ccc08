"Properties of resize, flip and crop that hold for every size (page 31)."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from sdxl_course.conditioning import make_time_ids
from sdxl_course.core import CourseError, seeded
from sdxl_course.preprocess import (INTERPOLATIONS, center_crop_origin, crop, flip_left_right, prepare_image, random_crop_origin,
                                    resize, resized_size, to_tensor)

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
