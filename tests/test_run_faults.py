"A run's end and its middle, as met in the field (issue 16, section D): what is lost, what is refused, and what is only said."
import hashlib
import json
import os
import random
import shutil

import pytest
from sdxl_course.core import CourseError
from sdxl_course.train.checkpoint import checkpointing, find_checkpoint, latest_checkpoint, list_checkpoints, prune_checkpoints, read_state, verify
from test_checkpoint import toy_train
from toy import files_of


@pytest.fixture
def steps(tmp_path):
    "A folder with four whole checkpoints of a small network."
    toy_train(tmp_path / "steps", 4)
    return tmp_path / "steps"


def names(folder): return [path.name for path in list_checkpoints(folder)]


def seal(folder):
    "Write a checkpoint's manifest again, so that it agrees with whatever lies there."
    files = {p.name: dict(bytes=p.stat().st_size, sha256=hashlib.sha256(p.read_bytes()).hexdigest()) for p in folder.iterdir() if p.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps(files))


# ---------------------------------------------------------------- 14: pruning, manifests

@pytest.mark.parametrize("stray", ["damaged", "empty", "another run's", "a link", "forged"])
def test_pruning_leaves_whole_checkpoints_whatever_lies_beside_them(steps, stray):
    newest = steps / "checkpoint-9999"
    if stray == "a link": newest.symlink_to(steps / "checkpoint-4", target_is_directory=True)
    elif stray == "empty": newest.mkdir()
    else: shutil.copytree(steps / "checkpoint-2", newest)
    if stray == "damaged": (newest / "optimizer.json").write_text("{")
    if stray == "forged": (newest / "trainer_state.json").write_text('{"step": "9999"}'), seal(newest)
    prune_checkpoints(steps, 1)
    assert [name for name in names(steps) if name != "checkpoint-9999"] == ["checkpoint-4"] and newest.exists()
    assert latest_checkpoint(steps, lambda text: None).name == "checkpoint-4" and not verify(steps / "checkpoint-4")


def test_damaged_checkpoints_do_not_count_as_kept(steps):
    (steps / "checkpoint-4" / "optimizer.safetensors").write_bytes(b"")
    prune_checkpoints(steps, 2)
    assert names(steps) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_the_one_resumed_from_and_the_one_just_written_stay(steps):
    class state: step = 2
    hook = checkpointing(steps, 1, None, limit=1, spare=[steps / "checkpoint-1"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdxl_course.train.checkpoint.save_checkpoint", lambda *given: None)  # checkpoint-2 lies there already
        hook(state, None)
    assert names(steps) == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]  # 4 belongs to the branch that was given up, and is the newest


def test_every_flipped_bit_of_a_manifest_is_named_or_harmless(steps):
    path = steps / "checkpoint-3" / "manifest.json"
    good, seen = path.read_bytes(), 0
    for place in range(len(good)):
        for bit in range(8):
            data = bytearray(good)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            seen += bool(verify(steps / "checkpoint-3"))
    assert seen > 7 * len(good)  # a few lie in white space


@pytest.mark.parametrize("text", ["[]", "{}", "null", "3", '{"optimizer.json": 3}', '{"optimizer.json": {"bytes": true, "sha256": ""}}', '{"optimizer.json": {"bytes": 1}}', '{"../x": {"bytes": 1, "sha256": ""}}',
    '{"\\u0000": {"bytes": 1, "sha256": "x"}}', '{"\\ud800": {"bytes": 1, "sha256": "x"}}', '{"%s": {"bytes": 1, "sha256": "x"}}' % ("a" * 5000), "[" * 100_000], ids=range(12))
def test_a_manifest_of_any_form_is_a_reason_and_not_a_traceback(steps, text):
    (steps / "checkpoint-4" / "manifest.json").write_text(text)
    said = []
    assert latest_checkpoint(steps, said.append).name == "checkpoint-3" and "checkpoint-4 is passed over" in said[0] and said[0].isascii()


FORGED = {"trainer_state.json": ["[]", "{}", '{"step": 4}', '{"step": "4", "seed": 3, "overflows": 0, "config": {}}'], "optimizer.json": ["[]", "{}", '{"groups": [{}], "numbers": {}}', '{"groups": [{"names": ["x"]}], "numbers": {}}'],
    "scheduler.json": ["[]", "3"], "training_log.jsonl": ["[]\n", "{}\n", '{"step": 9}\n', "{"], "optimizer.safetensors": [""], "weights.safetensors": [""]}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_checkpoint_whose_manifest_agrees_is_one_sentence(steps, tmp_path, name):
    victim = steps / "checkpoint-4"
    for text in FORGED[name]:
        (victim / name).write_text(text), seal(victim)
        with pytest.raises(CourseError, match="checkpoint-4|safetensors"): toy_train(tmp_path / "again", 6, victim)
    if name == "trainer_state.json":
        with pytest.raises(CourseError, match="not whole"): find_checkpoint(str(victim), steps)
        assert latest_checkpoint(steps, lambda text: None).name == "checkpoint-3"


def test_a_checkpoint_under_another_number_does_not_count(steps, tmp_path):
    shutil.copytree(steps / "checkpoint-2", steps / "checkpoint-7"), shutil.copytree(steps / "checkpoint-2", tmp_path / "best")
    with pytest.raises(CourseError, match="after update 2"): find_checkpoint("checkpoint-7", steps)
    assert find_checkpoint(str(tmp_path / "best"), steps) == tmp_path / "best" and read_state(tmp_path / "best")["step"] == 2  # a name of one's own is fine


def test_a_run_keeps_the_checkpoint_that_it_went_on_from(train):
    options = dict(checkpointing_steps=1, checkpoints_total_limit=1)
    folder = train(max_train_steps=2, checkpointing_steps=1).output_dir
    train(max_train_steps=5, resume_from_checkpoint="checkpoint-1", **options)
    assert names(folder) == ["checkpoint-1", "checkpoint-5"]
