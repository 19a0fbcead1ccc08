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


# ---------------------------------------------------------------- 15: what nobody needs must not cost the run

def breaks(error):
    def call(*given, **named): raise error
    return call


NEEDLESS = {"the final pictures": ("sdxl_course.train.run.draw_validation", "image_0.png"), "the model card": ("sdxl_course.train.results.ModelCard", "README.md"), "the loss curve": ("sdxl_course.train.run.save_curve", "loss.png"),
    "measuring the validation loss": ("sdxl_course.train.run.Run.measure", None), "config.yaml": ("sdxl_course.train.run.save_config", "config.yaml")}


ERRORS = [RuntimeError("CUDA out of memory. Tried to allocate 20 MiB"), OSError(28, "No space left on device"), ValueError("odd"), MemoryError(), RuntimeError("odd")]


@pytest.mark.parametrize("what, error", zip(NEEDLESS, ERRORS))
def test_what_nobody_needs_fails_alone_and_with_a_sentence(monkeypatch, start_of, what, error):
    "Whatever breaks after the last update, the LoRA is there, and so is everything else."
    where, file = NEEDLESS[what]
    run, said = start_of(validation_prompt="x", num_validation_images=1)
    run.train()
    (run.output_dir / "loss.png").unlink()  # drawn on the way as well
    monkeypatch.setattr(where, breaks(error))
    result = run.finish()
    assert result.weights_path.is_file() and len([text for text in said if what in text and "goes on" in text]) == 1, said
    left = {"pytorch_lora_weights.safetensors", "config.yaml", "README.md", "loss.png", "image_0.png", "training_log.jsonl"} - {file}
    assert left <= set(files_of(run.output_dir)) and file not in files_of(run.output_dir)
    if what == "measuring the validation loss": assert "not measured" in (run.output_dir / "README.md").read_text()


@pytest.fixture
def start_of(tmp_path, toy, toy_model, make_pictures):
    "A function that opens a run over five toy pictures, and the list of what it says; what it opened is closed in the end."
    from sdxl_course.text_to_image import TextToImageConfig, open_text_to_image
    usual, runs = dict(pretrained_model_name_or_path=str(toy_model), train_data_dir=str(make_pictures(5)), resolution=64, train_batch_size=5, max_train_steps=2, learning_rate=1e-2, seed=0, report_to="none"), []

    def start(name="run", log=None, **options):
        said = []
        runs.append(open_text_to_image(TextToImageConfig(**{**usual, "output_dir": str(tmp_path / name), **options}), toy(), log=log or said.append))
        return runs[-1], said
    yield start
    for run in runs: run.close()


def test_pictures_curves_and_the_window_failing_in_the_middle_change_no_byte(start_of, monkeypatch):
    options = dict(validation_prompt="x", num_validation_images=1, validation_loss_steps=1, checkpointing_steps=1, train_batch_size=2, max_train_steps=4)
    whole, _ = start_of("whole", **options)
    want = whole.run().weights_path.read_bytes()
    run, said = start_of("broken", **options)
    with monkeypatch.context() as patch:
        for name in ("draw_validation", "save_curve"): patch.setattr(f"sdxl_course.train.run.{name}", breaks(RuntimeError("CUDA out of memory")))
        patch.setattr("sdxl_course.train.run.Run.measure", breaks(MemoryError()))
        assert run.run().weights_path.read_bytes() == want
    assert {text.split(" failed")[0] for text in said if "goes on" in text} == {"drawing the validation prompts", "the loss curve", "measuring the validation loss", "drawing the final pictures"}


def test_a_log_that_cannot_be_written_is_made_up_for(start_of, monkeypatch):
    "A sentence that the window cannot show, and a row that the disk does not take."
    def show(text): raise UnicodeEncodeError("cp1252", "x", 0, 1, "no such letter")
    run, _ = start_of(log=show)
    real, calls = open, []

    def full(path, mode="r", *rest, **more):
        if mode == "ab" and not calls.append(1): raise OSError(28, "No space left on device")
        return real(path, mode, *rest, **more)
    monkeypatch.setattr("builtins.open", full)
    run.run()
    rows = [json.loads(line) for line in (run.output_dir / "training_log.jsonl").read_text().splitlines()]
    assert calls and [row["step"] for row in rows] == [1, 2]


@pytest.mark.parametrize("card", ["---\nlicense: [\n---\n", "---\nlicense: 3\n---\n", "---\n- a\n---\n", b"\xff\xfe\x00---"], ids=["yaml", "number", "list", "bytes"])
def test_a_base_with_a_broken_readme_has_another_licence(tmp_path, card):
    from sdxl_course.train.results import license_of
    (tmp_path / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    assert license_of(str(tmp_path)) == "other"


def test_too_little_memory_ends_with_what_helps_here(start_of, monkeypatch):
    run, _ = start_of(train_batch_size=2, checkpointing_steps=1, gradient_checkpointing=True, max_train_steps=3)
    real, calls = run.loss.forward, []

    def forward(*given):
        calls.append(1)
        if len(calls) == 2: raise RuntimeError("CUDA out of memory. Tried to allocate 20 MiB")
        return real(*given)
    monkeypatch.setattr(run.loss, "forward", forward)
    with pytest.raises(CourseError, match="update 2 did not fit.*--train_batch_size 1.*--mixed_precision bf16; --resume_from_checkpoint checkpoint-1") as told: run.train()
    assert not any(word in str(told.value) for word in ("gradient_checkpointing", "ema", "rank", "resolution"))
