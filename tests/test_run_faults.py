"A run's end and its middle, as met in the field (issue 16, section D): what is lost, what is refused, and what is only said."
import hashlib
import json
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


@pytest.mark.parametrize("what, error", list(zip(NEEDLESS, ERRORS)))
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


# ---------------------------------------------------------------- 16: a second run into one folder

def test_a_second_run_sets_aside_everything_that_the_first_one_left(train, tmp_path):
    "Field 03: the first LoRA was overwritten, and the second's sheet showed the first's pictures as its own."
    options = dict(num_validation_images=1, validation_epochs=1, train_batch_size=5)
    first = files_of(train(max_train_steps=6, validation_prompt="a red chair", **options).output_dir)
    said = []
    second = files_of(train(max_train_steps=3, validation_prompt="a blue house", rank=8, log=said.append, **options).output_dir)
    left = {name for name in first if name not in (".lock", "data_report.json") and "cache" not in name}
    assert {"pytorch_lora_weights.safetensors", "validation.png", "image_0.png", "README.md", "config.yaml", "training_log.jsonl", "validation/step-000005-0.png"} <= left
    for name in left: assert second[f"earlier-1/{name}"] == first[name], name
    assert sorted(name for name in second if name.startswith("validation/")) == ["validation/step-000001-0.png", "validation/step-000002-0.png"]
    assert len([text for text in said if "earlier-1" in text]) == 1
    third = train(max_train_steps=3, validation_prompt="a blue house", rank=8, **options).output_dir
    assert (third / "earlier-2" / "pytorch_lora_weights.safetensors").read_bytes() == second["pytorch_lora_weights.safetensors"]


def test_a_run_that_goes_on_sets_nothing_aside_unless_it_comes_from_elsewhere(train, tmp_path):
    folder = train(max_train_steps=2, checkpointing_steps=1).output_dir
    train(max_train_steps=3, resume_from_checkpoint="latest", checkpointing_steps=1)
    assert not list(folder.glob("earlier-*"))
    other = train("other", max_train_steps=2, checkpointing_steps=1).output_dir
    train(max_train_steps=3, resume_from_checkpoint=str(other / "checkpoint-2"), checkpointing_steps=1)
    assert {path.name for path in (folder / "earlier-1").iterdir()} >= {"checkpoint-1", "checkpoint-3", "pytorch_lora_weights.safetensors"} and names(folder) == ["checkpoint-3"]


def test_files_of_ones_own_stay_where_no_run_was(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "image_1.png").write_text("mine")
    folder = train(max_train_steps=1).output_dir
    assert (folder / "image_1.png").read_text() == "mine" and not (folder / "earlier-1").exists()


# ---------------------------------------------------------------- 17: the hub, and the token

@pytest.fixture
def hub(monkeypatch):
    "A hub on this machine: answers with the given status, with nothing at all, or takes everything; notes each request."
    import socket
    import threading
    from huggingface_hub import HfApi
    listener, state = socket.create_server(("127.0.0.1", 0)), dict(status=200, calls=0)

    def serve():
        kept = []
        while True:
            try: connection, _ = listener.accept()
            except OSError: return
            state["calls"] += 1
            kept.append(connection)
            if state["status"] == "silent": continue
            connection.recv(65536)
            connection.sendall(f"HTTP/1.1 {state['status']} X\r\nContent-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode())
            connection.close()
    threading.Thread(target=serve, daemon=True).start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("sdxl_course.train.hub.HfApi", lambda token=None: HfApi(endpoint=address, token=token))
    monkeypatch.setattr("sdxl_course.train.hub.PAUSES", (0, 0))
    monkeypatch.setattr("sdxl_course.train.hub.SILENCE", 0.3)
    yield state
    listener.close()


@pytest.mark.parametrize("status, words, calls", [("silent", "did not answer", 3), (401, "token is not valid", 2), (403, "may not write", 2), (404, "no such owner", 1), (409, "answer cannot be read", 3), (200, "answer cannot be read", 3), (429, "pause", 3), (500, "out of order", 3), (503, "out of order", 3)])
def test_a_hub_that_says_no_or_nothing_is_told_apart(hub, status, words, calls):
    from sdxl_course.train.hub import open_repository
    hub["status"] = status
    with pytest.raises(CourseError, match=f"{words}.*nothing was trained") as told: open_repository("style", "hf_" + "Tk4" * 12)
    assert hub["calls"] == calls and "Tk4" not in str(told.value) and told.value.__cause__ is None


def test_a_run_that_cannot_be_pushed_says_how_to_finish_it_and_that_works(train, monkeypatch, tmp_path, capsys):
    from types import SimpleNamespace
    from huggingface_hub.utils import filter_repo_objects
    from sdxl_course.cli import main as command
    sent, broken = {}, [1]

    class Hub:
        def __init__(self, token=None): self.token = token
        def create_repo(self, name, **options): return SimpleNamespace(repo_id=f"me/{name}")
        def upload_folder(self, repo_id, folder_path, allow_patterns, **options):
            if broken: raise TimeoutError(f"{self.token} at {folder_path}")
            sent.update({name: data for name, data in files_of(folder_path).items() if name in set(filter_repo_objects(files_of(folder_path), allow_patterns=allow_patterns))})
            return f"https://hub/{repo_id}"
    monkeypatch.setattr("sdxl_course.train.hub.HfApi", Hub), monkeypatch.setattr("sdxl_course.train.hub.PAUSES", (0, 0))
    with pytest.raises(CourseError, match=r"trained, not pushed to me/run.*sdxl-course push .*run --hub_model_id me/run") as told: train(push_to_hub=True, hub_token="hf_Tk4Tk4", checkpointing_steps=1)
    assert "Tk4" not in str(told.value) and not sent
    broken.clear()
    assert command(["push", str(tmp_path / "run"), "--hub_token", "hf_Tk4Tk4"]) == 0 and "https://hub/me/run" in capsys.readouterr().out
    assert set(sent) == {"README.md", "config.yaml", "loss.png", "pytorch_lora_weights.safetensors", "training_log.jsonl"}
    assert str(tmp_path).encode() not in b"".join(sent.values()) and b"train_data_dir: pictures" in sent["config.yaml"] and str(tmp_path).encode() in (tmp_path / "run" / "config.yaml").read_bytes()
    assert command(["push", str(tmp_path / "nothing")]) == 2


TOKEN = "hf_" + "Tk4" * 12


@pytest.mark.parametrize("words", [[f"--hub_tokn={TOKEN}"], ["--hub_tokn", TOKEN], ["--hub_token", "x", TOKEN], ["--rank", TOKEN], [TOKEN], ["--hub_token", "x", "a secret of another form"], ["--hub_tokn=a secret of another form"]], ids=range(7))
@pytest.mark.parametrize("debug", ["0", "1"])
def test_no_error_sentence_and_no_traceback_shows_the_token(words, debug, monkeypatch, capsys):
    import traceback
    from sdxl_course.text_to_image import main
    monkeypatch.setenv("SDXL_COURSE_DEBUG", debug)
    try: assert main(["--pretrained_model_name_or_path", "tiny", "--train_data_dir", "d", *words]) == 2 and debug == "0"
    except CourseError: told = traceback.format_exc()
    else: told = capsys.readouterr().err
    assert "Tk4" not in told and "a secret" not in told and ("--help" in told or "did you mean" in told)


# ---------------------------------------------------------------- 18: config files and Python

def flags(tmp_path, text, name="c.yaml", words=()):
    from sdxl_course.options import parse_config
    from sdxl_course.text_to_image import TextToImageConfig
    (tmp_path / name).write_text(text)
    return parse_config(TextToImageConfig, ["--pretrained_model_name_or_path", "tiny", "--train_data_dir", "d", "--config", str(tmp_path / name), *words])


@pytest.mark.parametrize("name, text", [("c.yaml", "validation_prompts: [a photo, --push_to_hub, '--rank', '64', '--', '-1 chair']"), ("c.json", '{"validation_prompts": ["a photo", "--push_to_hub", "--rank", "64", "--", "-1 chair"]}')])
def test_a_list_in_a_config_file_holds_values_and_no_flags(tmp_path, name, text):
    config = flags(tmp_path, text, name)
    assert config.validation_prompts == ["a photo", "--push_to_hub", "--rank", "64", "--", "-1 chair"] and not config.push_to_hub and config.rank == 4


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)) + "validation_prompts: *a11\n"


@pytest.mark.parametrize("text, words", [("rank: [4, --push_to_hub]", "to a list: wanted one value"), (LAUGHS[LAUGHS.index("a1"):].replace("a1: ", "validation_prompts: ", 1).replace("*a0", "x"), "list of lists"), ("validation_prompts: [[a, b]]", "list of lists"), ("validation_prompts: [{a: b}]", "list of lists"),
    ("rank: 1e9", "rank"), ("rank: 1000000000", "at most 4096"), (f"seed: {2**64}", "at most"), ("learning_rate: nan", "number"), ("[" * 3000, "cannot read|not a table"), ("? [a]\n: b", "cannot read|no option")], ids=range(10))
def test_config_files_of_any_form_end_in_a_sentence(tmp_path, text, words):
    with pytest.raises(CourseError, match=words): flags(tmp_path, text)


def test_bare_cache_latents_means_yes(tmp_path):
    "Field 11."
    for words, want in ((["--cache_latents"], True), (["--cache_latents", "False"], False), ([], None)): assert flags(tmp_path, "center_crop: true", words=words).cache_latents is want


def test_paths_and_misspelt_names_in_python(train, tmp_path):
    from sdxl_course.text_to_image import TextToImageConfig
    folder = train(train_data_dir=tmp_path / "pictures", output_dir=tmp_path / "from paths", max_train_steps=1).output_dir
    assert (folder / "config.yaml").is_file() and folder == tmp_path / "from paths"
    with pytest.raises(CourseError, match="got 'lerning_rate'.*did you mean learning_rate"): TextToImageConfig(pretrained_model_name_or_path="tiny", lerning_rate=1)


# ---------------------------------------------------------------- 19 and 20: NaN weights, a full disk, leftovers, the clock, cards

def test_a_base_model_with_nan_is_named_at_load(toy_model, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file
    from sdxl_course.model.components import load_components
    for part in ("unet", "vae", "text_encoder"):
        folder = shutil.copytree(toy_model, tmp_path / part)
        (file,) = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        victim = sorted(tensors)[3]
        tensors[victim].view(-1)[0] = torch.nan
        save_file(tensors, file, metadata=dict(format="pt"))
        with pytest.raises(CourseError, match=f"{part}: .*{victim.removeprefix('text_model.')} holds numbers that are not finite"): load_components(str(folder))


def test_a_checkpoint_with_nan_is_named_at_load(steps, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file
    victim = steps / "checkpoint-4"
    tensors = load_file(victim / "weights.safetensors")
    tensors["b"][0, 0] = torch.nan
    save_file(tensors, victim / "weights.safetensors"), seal(victim)
    with pytest.raises(CourseError, match="checkpoint-4: b holds numbers"): toy_train(tmp_path / "again", 6, victim)


def test_a_disk_that_is_too_small_is_found_before_anything_is_encoded(train, monkeypatch, tmp_path):
    from collections import namedtuple
    monkeypatch.setattr("shutil.disk_usage", lambda place: namedtuple("usage", "total used free")(0, 0, 10_000))
    monkeypatch.setattr("sdxl_course.train.build.fill_cache", breaks(AssertionError("too late")))
    with pytest.raises(CourseError, match="free space, less than 3 checkpoints"): train(checkpointing_steps=1)


def test_halves_of_files_go_at_the_next_start(train, tmp_path):
    half = tmp_path / "run" / "validation" / f".{'0f' * 16}.part"
    half.parent.mkdir(parents=True)
    half.write_text("half"), (tmp_path / "run" / ".notes.part").write_text("mine")
    train(max_train_steps=1)
    assert not half.exists() and (tmp_path / "run" / ".notes.part").exists()


def test_a_checkpoint_every_so_many_minutes(steps, tmp_path, monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr("sdxl_course.train.checkpoint.time.monotonic", lambda: now[0])
    monkeypatch.setattr("sdxl_course.train.checkpoint.save_checkpoint", lambda target, *given: saved.append(target.name))
    hook = checkpointing(tmp_path / "none", 10, None, minutes=2)
    class state: step = 0
    for state.step in range(1, 16):
        now[0] += 50
        hook(state, None)
    assert saved == ["checkpoint-3", "checkpoint-6", "checkpoint-9", "checkpoint-10", "checkpoint-13"]


@pytest.mark.parametrize("name", ["a`b", "*x* <script>", "[a](b) # c"])
def test_a_card_shows_names_and_prompts_as_they_are(train, name):
    from huggingface_hub import ModelCard
    prompt = "a\n---\nlicense: mit\n<img src=x> `code`"
    folder = train(name, max_train_steps=1, validation_prompt=prompt, num_validation_images=1).output_dir
    text = (folder / "README.md").read_text()
    assert ModelCard(text).data.license == "other" and ModelCard(text).data.widget[0]["text"] == prompt and "<script>" not in text.replace("\\<script\\>", "")
    assert text.count("\n---\n") == 1 and text.startswith("---\n")
