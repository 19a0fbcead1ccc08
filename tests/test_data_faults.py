"Data as people have it: tables that others wrote, odd files, links, folders of other trainers, old code pages. One test for each fault, with the right value."
import io
import json
import os
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sdxl_course.core import CourseError, load_tensors, run_guarded, write_json
from sdxl_course.data.check import check_data, check_dataset, load_tokenizer, main, read_dataset, scan
from sdxl_course.data.files import list_files, list_folder, read_file
from sdxl_course.data.loader import BatchLoader
from sdxl_course.data.metadata import read_metadata
from sdxl_course.data.records import ImageRecord, inspect_picture, open_image
from sdxl_course.data.tables import picture_roots, stored_picture
from sdxl_course.dreambooth import DreamBoothConfig, find_subject
from sdxl_course.model.conditioning import tokenize
from sdxl_course.options import STOPS, parse_config
from sdxl_course.text_to_image import TextToImageConfig
from sdxl_course.textual_inversion import TextualInversionConfig, read_pictures
from course import environment
from toy import files_of


def pictures(folder, n=2, caption="a chair", first=0):
    "Pictures 0.png and so on, no two alike, each with a text file."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + n):
        Image.new("RGB", (48, 32), (40*i % 256, 90, len(folder.name))).save(folder / f"{i}.png")
        if caption: (folder / f"{i}.txt").write_text(caption)
    return folder


def rows(folder, text, name="metadata.csv"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def problems(report): return [f"{file}: {reason}" for file, reason in report.problems]


def kinds(report): return {file: remark.partition(":")[0] for file, remark in report.remarks}


# ------------------------------------------------ tables of captions

HEAD = "file_name,text\n"


@pytest.mark.parametrize("line, reason", [
    ("0.png,a dragon, red, flying", "line 2 has 4 fields, the header names 2 .file_name, text.: put the caption in quotation marks"),
    ("0.png", "line 2 has 1 field, the header names 2"),
    ('0.png,"a 12" wide, red chair"', "line 2 holds a quotation mark inside a quoted text"),
    ('0.png,"a chair', "the quotation mark in line 2 is never closed"),
    ('0.png,"a chair\n' + "x.png,a picture of a chair in a room\n" * 4000, "the quotation mark in line 2 is never closed"),
    ("0.png,\"" + "a" * 140_000 + '"', "line 2 has a field that is too long")], ids=["commas", "missing", "inside", "open", "open in a long file", "long"])
def test_a_csv_is_read_strictly_and_the_line_named(tmp_path, line, reason):
    folder = rows(pictures(tmp_path / "d", 2, None), HEAD + line + "\n1.png,a cat\n")
    with pytest.raises(CourseError, match=reason): read_dataset(folder)
    assert any("metadata.csv: " in one and reason.split(" .")[0] in one for one in problems(scan(folder)))


def test_rows_before_and_beside_a_bad_one_still_count(tmp_path):
    folder = rows(pictures(tmp_path / "d", 3, None), HEAD + '0.png,a cat\n1.png,a, b\n2.png,"a dog, brown"\n')
    assert {record.path.name: record.captions for record in read_dataset(folder, on_problem="skip")} == {"0.png": ("a cat",), "2.png": ("a dog, brown",)}


@pytest.mark.parametrize("text", ["file_name;text\n0.png;a cat, red\n", "file_name\ttext\r\n0.png\ta cat, red\r\n", "file_name|text\n0.png|a cat, red\n",
    'file_name, text\n0.png, "a cat, red"\n', "\ufefffile_name,text\n\n0.png,\"a cat, red\"\n", 'file_name,text\r0.png,"a cat, red"\r'], ids=["semicolon", "tab", "bar", "spaces", "mark", "old Mac"])
def test_other_separators_are_understood(tmp_path, text):
    assert read_metadata(rows(tmp_path, text) / "metadata.csv") == ({"0.png": ("a cat, red",)}, [])


@pytest.mark.parametrize("text, reason", [("filename,text\n0.png,a\n", "name it with image_column='filename'"), ("0.png,a cat\n1.png,a dog\n", "a first line such as file_name,text"),
    ("file_name,prompt\n0.png,a\n", "its columns are file_name, prompt"), ("file_name,text\n0.png,café\n".encode("cp1252"), "line 2.*code page such as Windows-1252"),
    ("file_name,text\n0.png,a cat\n".encode("utf-16"), "UTF-16"), ("file_name,text\n0.png,a cat\n".encode("utf-16-le"), "UTF-16")])
def test_what_a_table_lacks_is_named(tmp_path, text, reason):
    with pytest.raises(CourseError, match=reason): read_dataset(rows(pictures(tmp_path / "d", 1, None), text))


def test_parquet_tables_and_json_beside_a_picture_are_read(tmp_path):
    import pyarrow
    from pyarrow import parquet
    folder = pictures(tmp_path / "d", 4, None)
    parquet.write_table(pyarrow.table(dict(file_name=["0.png", "1.png"], text=["a cat", "a dog"])), folder / "metadata.parquet")
    rows(folder, '{"caption": "a cow", "url": "https://a.b"}', "2.json"), rows(folder, '{"text": ["a pig", "one pig"]}', "3.json")
    assert [record.captions for record in read_dataset(folder)] == [("a cat",), ("a dog",), ("a cow",), ("a pig", "one pig")]
    assert scan(folder).others == [] and main([str(folder), "--resolution", "32"]) == 0
    rows(folder, "{", "3.json")
    with pytest.raises(CourseError, match="3.png .3.json beside it: it is not JSON"): read_dataset(folder)


def test_files_with_captions_that_are_not_read_are_named(tmp_path):
    folder = rows(pictures(tmp_path / "d", 2), HEAD + "0.png,a red cat\n")
    for name in ("metadata.json", "captions.txt", "1.png.txt", "notes.txt"): rows(folder, "{}", name)
    rows(folder, "a dog", "1.caption")
    report = scan(folder)
    assert kinds(report) == {"0.png": "a caption beside it that says another is not read", "1.png": "a caption beside it that says another is not read",
        "metadata.json": "a file that may hold captions is not read", "captions.txt": "a file that may hold captions is not read", "1.png.txt": "a file named like a picture with its ending is not read"}
    assert [record.captions for record in report.records] == [("a red cat",), ("a chair",)]
    rows(folder, "a red cat", "0.txt")
    assert "0.png" not in kinds(scan(folder))  # it says the same


# ------------------------------------------------ picture files

def with_chunk(data, kind, content):
    chunk = struct.pack(">I", len(content)) + kind + content
    return data[:33] + chunk + struct.pack(">I", zlib.crc32(kind + content)) + data[33:]


@pytest.mark.parametrize("kind, head", [(b"iCCP", b"icc\0\0"), (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0"), (b"zTXt", b"workflow\0\0")])
def test_a_png_with_a_large_profile_or_text_is_sound(tmp_path, kind, head):
    plain = open_image(pictures(tmp_path, 1) / "0.png")
    sound = with_chunk((tmp_path / "0.png").read_bytes(), kind, head + zlib.compress(b"A" * (8 << 20)))
    (tmp_path / "1.png").write_bytes(sound)
    assert open_image(tmp_path / "1.png").tobytes() == plain.tobytes() and inspect_picture(tmp_path / "1.png")[1] == []
    (tmp_path / "1.png").write_bytes(with_chunk(sound, kind, head + zlib.compress(b"A" * (80 << 20))))
    with pytest.raises(CourseError, match="unpack to more than 64 MB: save it without them"): inspect_picture(tmp_path / "1.png")


@pytest.mark.parametrize("values", [(-5, 9), (0, 70_000), (0, 2**31 - 1)])
def test_pixels_of_32_bits_are_not_clipped(tmp_path, values):
    Image.fromarray(np.resize(np.int32(values), (24, 24))).save(tmp_path / "0.tif")
    for read in (open_image, inspect_picture):
        with pytest.raises(CourseError, match="32-bit numbers of unknown range"): read(tmp_path / "0.tif")
    Image.fromarray(np.resize(np.int32([0, 65535]), (24, 24))).save(tmp_path / "0.tif")
    assert sorted(set(np.asarray(open_image(tmp_path / "0.tif")).flat)) == [0, 255] and inspect_picture(tmp_path / "0.tif")[0].width == 24


def test_a_very_wide_picture_is_a_problem_before_the_first_update(tmp_path, train):
    folder = pictures(tmp_path / "d")
    Image.new("RGB", (16_000, 16)).save(folder / "99.png"); (folder / "99.txt").write_text("a view")
    reason = "99.png: it is 16000 x 16 pixels, and would become 256000 x 256 to cover 256 x 256: cut it to a less extreme shape"
    assert problems(check_data(folder, 256)) == [reason] and problems(check_data(folder, 64)) == []
    assert [fit.file for fit in check_data(folder, 256).fits()] == ["0.png", "1.png"]
    report = check_data(folder, 1024, use_aspect_ratio_buckets=True)
    assert [file for file, why in report.problems] == ["99.png"]
    with pytest.raises(CourseError, match="d has 1 problem: 99.png .it is 16000 x 16"): train(train_data_dir=str(folder), resolution=256)
    assert files_of(tmp_path / "run").keys() <= {"data_report.json", ".lock"}
    with pytest.raises(CourseError, match="99.png: it is 16000 x 16"): train(validation_data_dir=str(folder), resolution=256)
    wide = ImageRecord(Path("wide.png"), ("a",), 16_000, 16, "key")
    class Components: scheduler = type("", (), dict(config=type("", (), dict(num_train_timesteps=10))))
    with pytest.raises(CourseError, match="wide.png: it is 16000 x 16"): BatchLoader([inspect_picture(folder / "0.png", ["a"])[0]], Components, 0, class_records=[wide], resolution=256)


@pytest.fixture
def odd(tmp_path):
    "A folder with a pipe and links to a device, under names that are read; a socket among them."
    import socket
    folder = pictures(tmp_path / "d", 1)
    os.mkfifo(folder / "1.png")
    (folder / "2.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        before = os.getcwd()
        os.chdir(folder); server.bind("3.png"); os.chdir(before)
    return folder


@pytest.mark.skipif(os.name != "posix", reason="no such files here")
def test_only_regular_files_are_opened(odd, tmp_path):
    signal.alarm(60)  # a reader that waits for a pipe is ended
    try:
        found = dict(scan(odd).problems)
        assert found == {"1.png": "it is a pipe, not a regular file: remove it", "2.png": "it is a device, not a regular file: remove it", "3.png": found["3.png"]} and "it is a socket" in found["3.png"]
        (odd / "0.txt").unlink(), os.mkfifo(odd / "0.txt"), os.mkfifo(odd / "metadata.jsonl")
        found = dict(scan(odd).problems)
        assert "0.txt beside it: it is a pipe" in found["0.png"] and "it is a pipe" in found["metadata.jsonl"]
        for path in (odd / "1.png", odd / "2.png"):
            with pytest.raises(CourseError, match="not a regular file"): open_image(path)
    finally: signal.alarm(0)
    with open(tmp_path / "large.png", "wb") as file: file.truncate(2**31)  # holds nothing, and would fill the memory
    with pytest.raises(CourseError, match="2.0 GB"): read_file(tmp_path / "large.png")


# ------------------------------------------------ links

def test_linked_folders_are_read_and_told(tmp_path):
    pictures(tmp_path / "real", 3, "a mug"), pictures(tmp_path / "d", 1)
    (tmp_path / "d" / "more").symlink_to(tmp_path / "real")
    report = check_dataset(tmp_path / "d")
    assert report.files == ["0.png", "more/0.png", "more/1.png", "more/2.png"] and [r.captions for r in report.records[1:]] == [("a mug",)] * 3
    assert kinds(report)["more"] == "a linked folder, read like any other" and ("more", f"a linked folder, read like any other: {tmp_path / 'real'}") in report.remarks


def test_links_make_no_loops_and_no_second_copies(tmp_path):
    folder = pictures(tmp_path / "up" / "d", 1)
    pictures(folder / "z", 1, first=1)
    for name, target in dict(again=folder / "z", loop=folder, up=tmp_path / "up", a=tmp_path / "a", b=tmp_path / "a").items(): (folder / name).symlink_to(target)
    pictures(tmp_path / "a", 1)
    assert [name for name in list_files(folder) if name.endswith(".png")] == ["0.png", "a/0.png", "z/1.png"]
    assert [name for name, remark in list_folder(folder).remarks if "not read again" in remark] == ["again", "b", "loop", "up"]


def test_a_linked_text_reads_nothing_outside(tmp_path):
    folder = pictures(tmp_path / "d", 2, None)
    (tmp_path / "secret.txt").write_text("a secret")
    (tmp_path / "rows").write_text(HEAD + "0.png,a secret\n")
    (folder / "0.txt").symlink_to(tmp_path / "secret.txt"), (folder / "metadata.csv").symlink_to(tmp_path / "rows")
    (folder / "texts").mkdir(), (folder / "texts" / "1").write_text("a mug"), (folder / "1.txt").symlink_to(folder / "texts" / "1")
    report = scan(folder)
    assert {file: reason.split(",")[0] for file, reason in report.problems if "link" in reason} == dict.fromkeys(("0.txt", "metadata.csv"), "it is a link to a file outside the folder")
    assert [record.captions for record in report.records] == [("a mug",)] and "secret" not in str(report.values()["pictures"])


def test_a_linked_picture_is_read_and_told(tmp_path):
    pictures(tmp_path / "real", 1), (tmp_path / "d").mkdir()
    (tmp_path / "d" / "0.png").symlink_to(tmp_path / "real" / "0.png"), (tmp_path / "d" / "0.txt").write_text("a mug")
    report = scan(tmp_path / "d")
    assert report.problems == [] and kinds(report) == {"0.png": "a linked picture"}
    (tmp_path / "d" / "1.png").symlink_to("nowhere.png"), (tmp_path / "d" / "2.png").symlink_to("/etc/passwd")
    assert "cannot be opened" in dict(scan(tmp_path / "d").problems)["1.png"] and "not a picture" in dict(scan(tmp_path / "d").problems)["2.png"]


def test_a_snapshot_of_the_hubs_cache_is_one_folder(tmp_path):
    blobs, snapshot = tmp_path / "datasets--a--b" / "blobs", tmp_path / "datasets--a--b" / "snapshots" / "0"
    pictures(blobs, 1, None), rows(blobs, HEAD + "0.png,a mug\n", "rows"), snapshot.mkdir(parents=True)
    for name, blob in (("0.png", "0.png"), ("metadata.csv", "rows")): (snapshot / name).symlink_to(Path("../../blobs", blob))
    report = scan(snapshot)
    assert (report.problems, report.remarks) == ([], []) and report.records[0].captions == ("a mug",)


# ------------------------------------------------ splits, archives, caches

def test_a_dataset_means_its_training_split(tmp_path):
    for split in ("train", "test", "validation"): rows(pictures(tmp_path / "d" / split, 2, None), HEAD + f"0.png,a {split} cat\n1.png,a dog\n")
    rows(tmp_path / "d", HEAD + "test/0.png,a cat\n")
    report = check_dataset(dataset_name=str(tmp_path / "d"))
    assert report.files == ["train/0.png", "train/1.png"] and report.records[0].captions == ("a train cat",) and report.problems == []
    assert kinds(report) == {"test": "pictures that are not for training, left out", "validation": "pictures that are not for training, left out"}
    assert len(check_dataset(tmp_path / "d").records) == 6  # --train_data_dir reads all
    subject = dict(pretrained_model_name_or_path="m", instance_prompt="a photo of sks chair")
    for options in ({}, dict(caption_column="text")):
        assert len(find_subject(DreamBoothConfig(dataset_name=str(tmp_path / "d"), **subject, **options)).records) == 2
        assert len(find_subject(DreamBoothConfig(instance_data_dir=str(tmp_path / "d"), **subject, **options)).records) == 6
    with pytest.raises(CourseError, match="no split 'train': its splits are test"):
        pictures(tmp_path / "e" / "test"), check_dataset(dataset_name=str(tmp_path / "e"))


def test_pictures_in_an_archive(tmp_path):
    folder, packed = pictures(tmp_path / "z", 3, None), tmp_path / "ds"
    packed.mkdir()
    rows(folder, "".join(json.dumps(dict(file_name=f"{i}.png", text=f"chair {i}")) + "\n" for i in range(3)), "metadata.jsonl")
    with zipfile.ZipFile(packed / "train.zip", "w") as archive:
        for path in folder.iterdir(): archive.write(path, path.name)
    records = read_dataset(dataset_name=str(packed), cache_dir=str(tmp_path / "cache"))
    assert sorted((r.captions, r.path.read_bytes()) for r in records) == [((f"chair {i}",), (folder / f"{i}.png").read_bytes()) for i in range(3)]
    with pytest.raises(CourseError, match="train.zip is an archive: unpack it, or name the folder with --dataset_name"): read_dataset(packed)
    with pytest.raises(CourseError, match="is a file.*unpack it"): read_dataset(packed / "train.zip")
    for path in (f"zip://0.png::{packed}/train.zip", f"zip://0.png::zip://a.zip::{tmp_path}/other/b.zip", f"https://a.b::{tmp_path}/other/b.zip"):
        with pytest.raises(CourseError, match="outside the dataset"): stored_picture(dict(path=path), [str(tmp_path / "other")], tmp_path / "s")


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "HF_DATASETS_CACHE"])
def test_a_cache_of_the_hub_may_lie_anywhere(tmp_path, variable):
    path = pictures(tmp_path / "moved" / "x", 1) / "0.png"
    say = "import sys; from sdxl_course.data.tables import picture_roots, stored_picture; print(stored_picture(dict(path=sys.argv[1]), picture_roots('a/b'), 's'))"
    env = environment() | {"HF_HOME": str(tmp_path / "home"), variable: str(tmp_path / "moved")}
    assert subprocess.run([sys.executable, "-c", say, str(path)], env=env, capture_output=True, text=True, check=True).stdout.strip() == str(path)


# ------------------------------------------------ kohya's folders

def test_folders_tell_how_often_their_pictures_are_shown(tmp_path, train):
    pictures(tmp_path / "img" / "10_sks chair", 1, "a sks chair"), pictures(tmp_path / "img" / "1_table", 1, None, first=1)
    report = check_dataset(tmp_path / "img")
    assert [(record.repeats, record.captions) for record in report.records] == [(1, ("table",)), (10, ("a sks chair",))]
    assert ("shown in a pass", "11 pictures, with repeats") in report.summary() and [one["repeats"] for one in report.values()["pictures"]] == [1, 10]
    assert "10 times a pass" in str(check_data(tmp_path / "img", 32)) and "its caption is what its folder is called" in str(report)
    said = []
    result = train(train_data_dir=str(tmp_path / "img"), train_batch_size=1, max_train_steps=11, debug_loss=True, log=said.append)
    shown = [name for row in result.log for name in row["loss_of"]]
    assert (shown.count("0.png"), shown.count("1.png")) == (10, 1) and any("2 different pictures are shown 11 times a pass" in text for text in said)
    once = check_dataset(tmp_path / "img", repeats_from_folders=False)
    assert [record.repeats for record in once.records] == [1] and "1_table/1.png" in dict(once.problems)
    config = DreamBoothConfig(instance_data_dir=str(tmp_path / "img"), pretrained_model_name_or_path="m", instance_prompt="x")
    assert [(record.repeats, record.captions) for record in find_subject(config).records] == [(1, ("x",)), (10, ("x",))]
    config = TextualInversionConfig(train_data_dir=str(tmp_path / "img"), pretrained_model_name_or_path="m", placeholder_token="<a>", initializer_token="a")
    assert [record.repeats for record in read_pictures(config).records] == [1, 10]


def test_repeats_count_in_every_epoch_and_for_a_resumed_run(tmp_path, train):
    pictures(tmp_path / "img" / "3_a chair", 2), pictures(tmp_path / "img" / "1_tables", 1)
    usual = dict(train_data_dir=str(tmp_path / "img"), train_batch_size=1, checkpointing_steps=4)
    whole = train("whole", max_train_steps=9, **usual)
    train("parts", max_train_steps=4, **usual)
    parts = train("parts", max_train_steps=9, resume_from_checkpoint="latest", **usual)
    assert parts.weights_path.read_bytes() == whole.weights_path.read_bytes() and len(whole.log) == 9
    with pytest.raises(CourseError, match="data"): train("parts", max_train_steps=9, resume_from_checkpoint="latest", repeats_from_folders=False, **usual)
    run = train("epochs", num_train_epochs=2, max_train_steps=None, **usual)
    assert len(run.log) == 14  # twice 3 + 3 + 1


def test_folders_that_are_not_all_named_so_are_not_believed_but_told(tmp_path):
    pictures(tmp_path / "d" / "10_sks chair", 1), pictures(tmp_path / "d" / "tables", 1)
    report = check_dataset(tmp_path / "d")
    assert [record.repeats for record in report.records] == [1, 1] and "--repeats_from_folders would" in dict(report.remarks)["10_sks chair"]
    assert [record.repeats for record in check_dataset(tmp_path / "d", repeats_from_folders=True).records] == [10, 1]
    pictures(tmp_path / "e" / "2024_holiday", 1)
    assert [record.repeats for record in check_dataset(tmp_path / "e").records] == [1]


# ------------------------------------------------ code pages, names, ~, Ctrl-C

def command(*words, cwd, **env):
    return subprocess.run([sys.executable, "-m", "sdxl_course.cli", *map(str, words)], cwd=cwd, env=environment() | env, capture_output=True, timeout=300)


def test_a_code_page_that_lacks_a_sign_ends_nothing(tmp_path):
    pictures(tmp_path / "猫", 1, "a 猫 cat")
    done = command("check-data", "猫", "--resolution", 32, cwd=tmp_path, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0 and b"\\u732b" in done.stdout and done.stderr == b""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        assert run_guarded(print, "写真-lora, caf\udce9") == 0 and main(["犬"]) == 2
    stream.flush()
    first, second, error = stream.buffer.getvalue().split(maxsplit=2)
    assert (first, second) == (rb"\u5199\u771f-lora,", rb"caf\udce9") and error.startswith(rb"error: \u72ac is not there")


def test_whoever_stops_reading_the_output_gets_no_traceback(tmp_path):
    say = "from sdxl_course.core import run_guarded; import sys; sys.exit(run_guarded(lambda: print('x' * 200000, flush=True)))"
    process = subprocess.Popen([sys.executable, "-c", say], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are always Unicode here")
def test_names_that_are_not_utf8_are_trained_on_and_written_down(tmp_path, train):
    folder = pictures(tmp_path / "d", 1)
    for end in (b"png", b"txt"): os.rename(os.fsencode(folder / "0.") + end, os.fsencode(folder) + b"/caf\xe9." + end)
    result = train(train_data_dir=str(folder), debug_loss=True)
    read = json.loads((result.output_dir / "data_report.json").read_text(encoding="utf-8"))
    assert [one["file"] for one in read["pictures"]] == ["caf\udce9.png"] and list(result.log[0]["loss_of"]) == ["caf\udce9.png"]
    assert main([str(folder), "--resolution", "32", "--output", str(tmp_path / "r.json")]) == 0
    result = train("caf\udce9", train_data_dir=str(folder), output_kohya_format=True)  # and a folder to write to
    assert load_tensors(result.output_dir / "pytorch_lora_weights_kohya.safetensors")[1]["modelspec.title"].startswith("caf?")
    assert json.loads(write_json(tmp_path / "x.json", {"caf\udce9": "\ud83d"}).read_text(encoding="utf-8")) == {"caf\udce9": "\ud83d"}


def test_half_an_emoji_is_named_wherever_it_stands(tmp_path):
    folder = rows(pictures(tmp_path / "d", 1, None), '{"file_name": "0.png", "text": "a chair \\ud83d"}\n', "metadata.jsonl")
    with pytest.raises(CourseError, match=r"0.png.*half a character, '\\ud83d' after 'a chair '"): read_dataset(folder)
    assert main([str(folder), "--resolution", "32", "--output", str(tmp_path / "r.json")]) == 2
    with pytest.raises(CourseError, match="holds signs that are not UTF-8"): tokenize(load_tokenizer(), ["a cat", "caf\udce9"])
    with pytest.raises(CourseError, match="--validation_prompt holds signs that are not UTF-8"):
        TextToImageConfig(pretrained_model_name_or_path="m", train_data_dir="d", validation_prompt="caf\udce9")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home")), monkeypatch.setenv("USERPROFILE", str(tmp_path / "home")), monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_tilde_is_the_home_folder_in_every_option_that_names_a_place(home, train, tmp_path):
    from dataclasses import fields
    from sdxl_course.evaluate import EvaluateConfig
    from sdxl_course.inference import GenerateConfig
    from sdxl_course.options import names_path
    told = {f.name for cls in (TextToImageConfig, DreamBoothConfig, EvaluateConfig, GenerateConfig) for f in fields(cls)
        if "str" in str(f.type) and {"folder", "folder,", "file", "file,"} & set(f.metadata["help"].split())}
    assert len(told) > 10 and {name for name in told if not names_path(name)} == {"save_precision"}
    config = parse_config(GenerateConfig, ["--prompt", "~ a cat", "--lora", "~/a", "--lora=~/b", "--output_dir=~/c"])
    assert (config.prompt, config.lora, config.output_dir) == (["~ a cat"], [str(home / "a"), str(home / "b")], str(home / "c"))
    pictures(home / "d")
    train(train_data_dir="~/d", validation_data_dir="~/d", cache_dir="~/c", output_dir="~/o")
    assert (home / "o" / "pytorch_lora_weights.safetensors").is_file() and (home / "c" / "encoded").is_dir() and not (tmp_path / "~").exists()
    assert main(["~/d", "--resolution", "32", "--output", "~/r.json"]) == 0 and (home / "r.json").is_file() and len(scan("~/d").records) == 2
    assert len(read_dataset("~/d")) == 2 and len(read_dataset(dataset_name="~/d", cache_dir="~/c")) == 2
    (home / "c.yaml").write_text("train_data_dir: ~/d\nvalidation_prompt: ~ a cat\n")
    config = parse_config(TextToImageConfig, ["--config", "~/c.yaml", "--pretrained_model_name_or_path", "~/m"])
    assert (config.train_data_dir, config.validation_prompt, config.pretrained_model_name_or_path) == (str(home / "d"), "~ a cat", str(home / "m"))


def test_ctrl_c_is_python_s_own_on_windows_and_ctrl_break_stops_a_run(monkeypatch):
    import sdxl_course
    source, name = Path(sdxl_course.__file__).read_text(encoding="utf-8"), "FOR_DISABLE_CONSOLE_CTRL_HANDLER"
    monkeypatch.delenv(name, raising=False)
    for platform, wanted in (("linux", None), ("win32", "1")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "platform", platform)
            exec(compile(source, "sdxl_course", "exec"), {"__name__": "sdxl_course"})
        assert os.environ.get(name) == wanted
    monkeypatch.delenv(name)
    assert signal.SIGTERM in STOPS and set(STOPS) == {getattr(signal, one) for one in ("SIGTERM", "SIGBREAK") if hasattr(signal, one)}


def test_no_text_is_read_or_written_in_the_machines_own_code_page():
    import ast
    for path in Path(__file__).parents[1].glob("sdxl_course/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
                given = [one.value for one in [*node.args, *(k.value for k in node.keywords)] if isinstance(one, ast.Constant)]
                assert {"utf-8", "utf-8-sig"} & set(given), f"{path.name}, line {node.lineno}"
