"A small share of the campaign in faults.py, and arbitrary input for everything that reads files of others."
import errno
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import save

from sdxl_course.core import CourseError, load_tensors, write_atomic
from sdxl_course.data.metadata import read_metadata, read_sidecar
from sdxl_course.data.records import inspect_picture
from sdxl_course.model.lora_layouts import read_layers
from sdxl_course.options import option, parse_config
from sdxl_course.train.checkpoint import verify

FUZZ = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_no_trial_of_a_small_campaign_loses_anything(tmp_path):
    words = [sys.executable, str(Path(__file__).with_name("faults.py")), "--kill", "2", "--write", "1", "--error", "2", "--damage", "1", "--hub", "1", "--save", str(tmp_path / "found.json")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["kinds"]
    assert {kind: one["trials"] for kind, one in found.items()} == dict(kill=2, write=1, error=2, damage=1, hub=1) and not any(one["lost"] for one in found.values())


@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "EIO"])
def test_a_file_that_can_be_neither_finished_nor_removed_is_one_sentence(tmp_path, monkeypatch, name):
    def fails(*given): raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
    for call in ("replace", "unlink"): monkeypatch.setattr(os, call, fails)
    with pytest.raises(CourseError, match=f"could not be written .{os.strerror(getattr(errno, name))}"): write_atomic(tmp_path / "a", b"x")


def reads_or_explains(read, *given):
    "What a reader says of a file is a value or one sentence."
    try: return read(*given)
    except CourseError as error:
        text = str(error)
        assert 0 < len(text) < 2000 and "Traceback" not in text


cells = st.text(max_size=12) | st.sampled_from(["file_name", "text", "0.png", '"', ",", ";", "\t", "\r", "'", "caption", "[]", "{", "null"])
tables = st.lists(st.lists(cells, max_size=5), max_size=6)


@FUZZ
@given(tables, st.sampled_from([",", ";", "\t", "|"]), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]), st.binary(max_size=8))
def test_any_table_of_captions_is_read_or_explained(tmp_path, rows, delimiter, encoding, junk):
    path = tmp_path / "metadata.csv"
    path.write_bytes("\n".join(delimiter.join(row) for row in [["file_name", "text"], *rows]).encode(encoding, "replace") + junk)
    captions, problems = read_metadata(path)
    assert all(isinstance(text, str) and text for texts in captions.values() for text in texts) and all(reason for _, reason in problems)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.sampled_from(["file_name", "text", "image"]), inner, max_size=4), max_leaves=12)


@FUZZ
@given(st.lists(values, max_size=4), st.binary(max_size=6))
def test_any_lines_of_json_are_read_or_explained(tmp_path, rows, junk):
    path = tmp_path / "metadata.jsonl"
    path.write_bytes("\n".join(json.dumps(row) for row in rows).encode() + junk)
    captions, problems = read_metadata(path)
    assert all(isinstance(text, str) and text for texts in captions.values() for text in texts) and all(reason for _, reason in problems)


@FUZZ
@given(st.binary(max_size=60))
def test_any_bytes_beside_a_picture_are_captions_or_explained(tmp_path, data):
    (tmp_path / "0.txt").write_bytes(data)
    texts = reads_or_explains(read_sidecar, tmp_path / "0.png")
    assert texts is None or all(isinstance(text, str) and text.strip() for text in texts)


@FUZZ
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1), st.booleans())
def test_any_header_of_safetensors_is_read_or_explained(tmp_path, data, length, honest):
    path = tmp_path / "a.safetensors"
    path.write_bytes((len(data) if honest else length).to_bytes(8, "little") + data)
    reads_or_explains(load_tensors, path)


@FUZZ
@given(st.integers(0, 500), st.binary(min_size=1, max_size=4))
def test_any_damage_to_safetensors_is_read_or_explained(tmp_path, place, junk):
    data = save({"unet.mid_block.lora_A.weight": torch.ones(2, 3), "unet.mid_block.lora_B.weight": torch.ones(3, 2)}, {"lora_adapter_metadata": "{}"})
    place = place % len(data)
    path = tmp_path / "a.safetensors"
    path.write_bytes(data[:place] + junk + data[place + len(junk):])
    reads_or_explains(load_tensors, path)


parts = st.lists(st.sampled_from(["unet", "lora_unet", "lora_te1", "text_encoder", "mid_block", "attentions.0", "to_q", "down_blocks.1", "transformer_blocks.0", "attn1", "lora_A", "lora_B", "lora_down", "alpha", "weight",
    "hada_w1_a", "lokr_w1", "diff", "dora_scale", "processor", "input_blocks_4_1", "x", ""]), min_size=1, max_size=6)
tensors = st.sampled_from([torch.ones(2, 3), torch.ones(3, 2), torch.ones(()), torch.zeros(0), torch.ones(2, 3, 1, 1), torch.ones(4, dtype=torch.int64), torch.full((2, 3), float("nan"))])


@pytest.fixture(scope="module")
def unet(toy): return toy().unet


@FUZZ
@given(st.dictionaries(st.builds(lambda words, sign: sign.join(words), parts, st.sampled_from([".", "_"])), tensors, max_size=5))
def test_any_names_of_tensors_are_a_lora_or_explained(unet, tensors):
    reads_or_explains(read_layers, "any.safetensors", tensors, {}, dict(unet=unet))


@dataclass(frozen=True, kw_only=True)
class Paint:
    "Paint."
    width: int = option(3, "pixels", "1 .. 9")
    paint: str = option("oil", "what with")
    dry: bool = option(False, "let it dry")
    output_dir: str = option("x", "where")


@FUZZ
@given(st.one_of(values.map(json.dumps), st.text(max_size=60), st.dictionaries(st.sampled_from(["width", "paint", "dry", "widht"]), values, max_size=3).map(json.dumps)), st.sampled_from([".json", ".yaml", ".toml"]))
def test_any_configuration_is_read_or_explained(tmp_path, text, ending):
    path = tmp_path / f"c{ending}"
    path.write_text(text, encoding="utf-8", errors="surrogatepass") if "\udc80" not in text else path.write_text("")
    found = reads_or_explains(parse_config, Paint, ["--config", str(path)])
    assert found is None or (1 <= found.width <= 9 and isinstance(found.paint, str) and isinstance(found.dry, bool))


@FUZZ
@given(st.one_of(values.map(json.dumps), st.text(max_size=80)))
def test_any_manifest_is_a_reason(tmp_path, text):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8", errors="replace")
    assert verify(tmp_path)


@FUZZ
@given(st.lists(st.tuples(st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"pHYs", b"gAMA", b"tRNS", b"acTL", b"PLTE"]), st.binary(max_size=40)), max_size=3), st.sampled_from(["RGB", "L", "P", "RGBA", "1", "I;16"]))
def test_any_chunk_of_a_png_is_read_or_explained(tmp_path, chunks, mode):
    info, data = PngImagePlugin.PngInfo(), io.BytesIO()
    for kind, content in chunks: info.add(kind, content)
    Image.new(mode, (20, 24)).save(data, "PNG", pnginfo=info)
    (tmp_path / "0.png").write_bytes(data.getvalue())
    found = reads_or_explains(inspect_picture, tmp_path / "0.png")
    assert found is None or (found[0].width, found[0].height) in ((20, 24), (24, 20))
