"Several processes, number formats, and launchers that are refused."
import json
import os
import time

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from sdxl_course.core import CourseError
from sdxl_course.full import main as full_main
from sdxl_course.train.machine import output_lock
from sdxl_course.text_to_image import main
from sdxl_course.train.machine import REFUSED, SHARDED, accelerating
from forked import context, run_ranks
from toy import files_of, make_pictures as fill


def argv(model, data, folder, batch, *more):
    return ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--resolution", "64", "--max_train_steps", "4", "--seed", "0", "--learning_rate", "1e-3", "--report_to", "none",
        "--checkpointing_steps", "2", "--gradient_accumulation_steps", "2", "--train_text_encoder", "--lr_scheduler", "linear", "--lr_warmup_steps", "0", "--debug_loss", "--random_flip",
        "--validation_prompt", "x", "--num_validation_images", "1", "--output_dir", str(folder), "--train_batch_size", str(batch), *more]


def close(one, two, exact):
    "Whether two runs learnt the same: to the byte, or to 1e-5."
    rows = [[json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()] for folder in (one, two)]
    a, b = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (one, two))
    assert len(rows[0]) == len(rows[1]) == 4 and a.keys() == b.keys() and max(t.abs().max() for t in a.values()) > 1e-2
    if exact: return rows[0] == rows[1] and all(torch.equal(a[n], b[n]) for n in a)
    for x, y in zip(*rows):
        assert (x["step"], x["epoch"], x["lr"]) == (y["step"], y["epoch"], y["lr"]) and x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert x["loss_of"] == pytest.approx(y["loss_of"], rel=1e-5)  # every picture of both processes is named
    return max((a[n] - b[n]).abs().max() for n in a) < 1e-5


def test_two_processes_equal_one_with_twice_the_batch_and_resume_exactly(tmp_path, toy_model):
    "trainers.md 2.14 number 21 and 19: only rank 0's randomness was kept; the schedule ran too fast on several processes."
    data = fill(tmp_path / "pictures", 7)  # 4 + 3: the last share is uneven, one process has a picture more
    codes, printed = run_ranks("sdxl_course.text_to_image", argv(toy_model, data, tmp_path / "two", 2), tmp_path)
    assert codes == [0, 0], printed
    assert "".join(printed).count("7 pictures with 7 captions") == 1 and "Traceback" not in "".join(printed)
    assert main(argv(toy_model, data, tmp_path / "one", 4)) == 0
    assert close(tmp_path / "two", tmp_path / "one", exact=False)
    codes, printed = run_ranks("sdxl_course.text_to_image", argv(toy_model, data, tmp_path / "again", 2, "--resume_from_checkpoint", str(tmp_path / "two" / "checkpoint-2")), tmp_path)
    assert codes == [0, 0] and "resuming from" in "".join(printed), printed
    assert close(tmp_path / "again", tmp_path / "two", exact=True)
    assert main(argv(toy_model, data, tmp_path / "alone", 4, "--resume_from_checkpoint", str(tmp_path / "two" / "checkpoint-2"))) == 0  # one process takes over
    assert close(tmp_path / "alone", tmp_path / "two", exact=False)


def full_argv(model, data, folder, batch, *more):
    return ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--resolution", "64", "--max_train_steps", "4", "--seed", "0", "--learning_rate", "1e-3", "--report_to", "none",
        "--checkpointing_steps", "2", "--gradient_accumulation_steps", "2", "--use_ema", "--lr_scheduler", "linear", "--validation_prompt", "x", "--validation_epochs", "1", "--num_validation_images", "1",
        "--validation_loss_steps", "2", "--gradient_checkpointing", "--output_dir", str(folder), "--train_batch_size", str(batch), *more]


def learnt(folder): return {name: load_file(folder / name) for name in ("unet/diffusion_pytorch_model.safetensors", "checkpoint-4/unet.safetensors", "checkpoint-4/ema.safetensors", "checkpoint-4/optimizer.safetensors")}


def apart(one, two):
    "The largest difference of anything that two full trainings learnt, shapes and names being equal."
    pairs = [(a[name], b[name]) for a, b in zip(learnt(one).values(), learnt(two).values(), strict=True) for name in a.keys() | b.keys()]
    return max(float((a - b).abs().max()) for a, b in pairs)


def test_divided_weights_train_as_whole_ones_do_and_resume_exactly(tmp_path, toy_model):
    "FSDP: each process holds a part of weights, EMA weights, gradients and moments; what is written is whole."
    data, sharded = fill(tmp_path / "pictures", 7), dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    codes, printed = run_ranks("sdxl_course.full", full_argv(toy_model, data, tmp_path / "two", 2), tmp_path, **sharded)
    assert codes == [0, 0], printed
    assert "".join(printed).count("FSDP: each of 2 processes keeps its part") == 1 and "Traceback" not in "".join(printed)
    assert run_ranks("sdxl_course.full", full_argv(toy_model, data, tmp_path / "one", 4), tmp_path, count=1, **sharded)[0] == [0]  # alone, there is nothing to divide
    assert apart(tmp_path / "two", tmp_path / "one") < 1e-5 and files_of(tmp_path / "two").keys() == files_of(tmp_path / "one").keys()
    rows = [[json.loads(line) for line in (tmp_path / name / "training_log.jsonl").read_text().splitlines()] for name in ("two", "one")]
    for x, y in zip(*rows, strict=True):
        assert all(x[name] == pytest.approx(y[name], rel=1e-4) for name in ("loss", "grad_norm", "lr")) and x.get("validation_loss", 0) == pytest.approx(y.get("validation_loss", 0), rel=1e-4)
    unet = StableDiffusionXLPipeline.from_pretrained(str(tmp_path / "two")).unet
    assert all(torch.equal(p, load_file(tmp_path / "two" / "checkpoint-4" / "ema.safetensors")[f"unet.{name}"]) for name, p in unet.named_parameters())
    again = ["--resume_from_checkpoint", str(tmp_path / "two" / "checkpoint-2")]
    codes, printed = run_ranks("sdxl_course.full", full_argv(toy_model, data, tmp_path / "again", 2, *again), tmp_path, **sharded)
    assert codes == [0, 0] and "resuming from" in "".join(printed), printed
    assert apart(tmp_path / "again", tmp_path / "two") == 0
    assert full_main(full_argv(toy_model, data, tmp_path / "alone", 4, *again)) == 0  # one process takes over
    assert apart(tmp_path / "alone", tmp_path / "two") < 1e-5


@pytest.mark.parametrize("variable, words, message", [("ACCELERATE_USE_DEEPSPEED", [], "wanted a file with distributed_type: FSDP"), ("ACCELERATE_USE_FSDP", ["--mixed_precision", "fp16"], "wanted bf16"),
    ("ACCELERATE_USE_FSDP", ["--optimizer", "adafactor"], "divides the moments of AdamW"), ("ACCELERATE_USE_FSDP", ["--checkpointing_minutes", "5"], "wanted --checkpointing_steps")])
def test_what_cannot_be_divided_is_refused_with_a_sentence(variable, words, message, monkeypatch, tmp_path, toy_model, make_pictures, capsys):
    for name, value in (("WORLD_SIZE", "2"), (variable, "true")): monkeypatch.setenv(name, value)
    assert full_main(full_argv(toy_model, make_pictures(2), tmp_path / "o", 2, *words)) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and told.strip().count("\n") == 0


@pytest.mark.parametrize("variable", SHARDED)
def test_launchers_that_cut_the_weights_get_whole_ones_and_the_same_run(variable, monkeypatch, train):
    "trainers.md 2.14 number 25: DeepSpeed's engine was neither unwrapped on saving nor found on loading."
    plain = train("plain", max_train_steps=2, checkpointing_steps=1)
    monkeypatch.setenv(variable, "true")
    said = []
    cut = train("cut", max_train_steps=2, checkpointing_steps=1, log=said.append)
    assert [SHARDED[variable] in text for text in said].count(True) == 1 and os.environ[variable] == "true"
    assert (cut.output_dir / "pytorch_lora_weights.safetensors").read_bytes() == (plain.output_dir / "pytorch_lora_weights.safetensors").read_bytes()


@pytest.mark.parametrize("variable", REFUSED)
def test_launchers_that_change_the_network_are_refused_with_a_sentence(variable, monkeypatch, tmp_path, toy_model, make_pictures, capsys):
    for name in ("ACCELERATE_USE_FSDP", variable): monkeypatch.setenv(name, "true")  # accelerate launch sets both
    assert main(argv(toy_model, make_pictures(2), tmp_path / "o", 2)) == 2
    told = capsys.readouterr().err
    assert REFUSED[variable] in told and "data parallelism" in told and os.environ["ACCELERATE_USE_FSDP"] == "true" and told.count("\n") == 1 and not files_of(tmp_path / "o").keys() - {".lock", "data_report.json"} and os.environ[variable] == "true"


@pytest.mark.parametrize("text", ["distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n  fsdp_reshard_after_forward: true\n", "distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 2\n"], ids=["FSDP", "DeepSpeed"])
def test_config_files_for_them_set_what_we_know(text, tmp_path):
    "What accelerate launch makes of such a file, without starting it."
    (tmp_path / "a.yaml").write_text("compute_environment: LOCAL_MACHINE\nnum_processes: 2\nnum_machines: 1\nmixed_precision: 'no'\n" + text)
    config = load_config_from_file(str(tmp_path / "a.yaml"))
    assert f"ACCELERATE_USE_{config.distributed_type.value}" in SHARDED


def hold(folder, held):
    "Another process that writes into a folder."
    with output_lock(folder):
        held.set()
        time.sleep(600)


def test_a_second_process_does_not_write_into_the_same_folder(tmp_path, toy_model, make_pictures, capsys):
    data, folder = make_pictures(2), tmp_path / "o"
    folder.mkdir()
    held = context.Event()
    other = context.Process(target=hold, args=(folder, held))
    other.start()
    try:
        assert held.wait(120)
        words = argv(toy_model, data, folder, 2)
        assert main(words) == 2 and list(files_of(folder)) == [".lock"]
        told = capsys.readouterr().err
        assert "another process is training into" in told and told.count("\n") == 1
    finally: other.kill(), other.join()
    assert main(words) == 0  # it died without a word and let go


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path, monkeypatch):
    from filelock import FileLock
    def refuse(*given, **named): raise NotImplementedError("flock is not supported here")
    monkeypatch.setattr(FileLock, "_acquire", refuse)
    with output_lock(tmp_path): (tmp_path / "done").touch()
    assert (tmp_path / "done").exists()


def test_bf16_trains_on_a_cpu(train):
    log = train(mixed_precision="bf16", max_train_steps=6, learning_rate=1e-2, train_text_encoder=True).log
    assert len(log) == 6 and all(row["loss"] > 0 and row["grad_norm"] > 0 for row in log)


def test_the_process_is_left_as_it_was():
    with pytest.raises(RuntimeError):
        with accelerating("bf16"): raise RuntimeError
    with accelerating("no") as accelerator: assert accelerator.mixed_precision == "no"
    with pytest.raises(CourseError, match="Megatron"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_MEGATRON_LM", "1")
            with accelerating("no"): pass
