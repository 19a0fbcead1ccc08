"Overfitting on purpose: what the ways differ in, that looking disturbs nothing, and that a study goes on."
import json
from dataclasses import fields, replace

import pytest

from sdxl_course import overfit
from sdxl_course.full import FullConfig
from sdxl_course.overfit import Bench, OverfitConfig, WAYS, looks_of, main, picture_scenes, run_overfit, training_of, watch
from sdxl_course.text_to_image import TextToImageConfig, train_text_to_image

SHORT = dict(max_train_steps=2, looks=2, seeds=1, num_prompts=1, num_unrelated=1, num_inference_steps=1)


@pytest.fixture
def few_pictures(monkeypatch):
    "One picture to learn, one kept out: what is tested does not depend on how many there are."
    scenes = picture_scenes()
    monkeypatch.setattr(overfit, "picture_scenes", lambda: dict(few=scenes["few"][:1], many=scenes["many"][:2], held_out=scenes["held_out"][:1]))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "lora"])
def test_a_way_differs_from_the_lora_in_what_it_says_and_in_nothing_else(way, tmp_path, few_pictures):
    config = OverfitConfig(output_dir=str(tmp_path))
    plain, other = training_of("lora", 1, config), training_of(way, 1, config)
    shared = {f.name for f in fields(other)} & {f.name for f in fields(plain)}
    changed = {name for name in shared if getattr(plain, name) != getattr(other, name)} - {"output_dir"}
    assert changed == {dict(pictures="train_data_dir").get(name, name) for name in WAYS[way]}
    assert isinstance(other, FullConfig if way == "full" else TextToImageConfig)


@pytest.mark.parametrize("steps, looks, wanted", [(640, 7, [0, 10, 20, 40, 80, 160, 320, 640]), (3, 7, [0, 1, 3]), (1, 1, [0, 1])])
def test_looks_begin_at_the_base_model_and_end_at_the_end(steps, looks, wanted):
    assert looks_of(OverfitConfig(max_train_steps=steps, looks=looks)) == wanted


def test_looking_disturbs_nothing(tmp_path, few_pictures):
    config = OverfitConfig(output_dir=str(tmp_path), **SHORT)
    row, drawn = watch("lora", 0, config, Bench(1))
    alone = train_text_to_image(replace(training_of("lora", 0, config), output_dir=str(tmp_path / "alone")), log=lambda text: None)
    losses = [row["eval_steps"][step]["training_loss"][0] for step in ("1", "2")]
    assert losses == alone.losses and row["eval_steps"]["0"]["training_loss"] == []
    assert row["eval_steps"]["0"]["held_out_loss"] == [alone.validation_loss_before] and row["eval_steps"]["2"]["held_out_loss"] == [alone.validation_loss_after]
    assert drawn[0]["copies"][0].tobytes() != drawn[2]["copies"][0].tobytes()


@pytest.mark.slow
def test_a_study_goes_on_where_it_was(tmp_path, few_pictures, monkeypatch):
    config, said, seen = OverfitConfig(output_dir=str(tmp_path), ways="lora,full,ema", **SHORT), [], []
    real = overfit.watch
    def stop_after_one(*args):
        if seen: raise KeyboardInterrupt
        seen.append(args[0])
        return real(*args)
    monkeypatch.setattr(overfit, "watch", stop_after_one)
    with pytest.raises(KeyboardInterrupt): run_overfit(config, said.append)
    monkeypatch.setattr(overfit, "watch", lambda *args: seen.append(args[0]) or real(*args))
    study = run_overfit(config, said.append)
    assert seen == ["lora", "full", "ema"] == [row["variant"] for row in study["rows"]] and len(said) == 3
    assert study == json.loads((tmp_path / "overfit.json").read_text()) and not list((tmp_path / "runs").iterdir())
    assert all(picture.startswith("data:image/jpeg") for picture in study["rows"][0]["pictures"].values())
    assert run_overfit(config, said.append)["rows"] == study["rows"] and len(said) == 3
    changed = run_overfit(replace(config, ways="lora", max_train_steps=1), said.append) # other settings, other rows
    assert len(said) == 4 and [row["variant"] for row in changed["rows"]] == ["lora"]


@pytest.mark.parametrize("words, told", [(["--ways", "loar"], "did you mean lora"), (["--seeds", "0"], "--seeds is 0"), (["--way", "lora"], "did you mean")], ids=str)
def test_mistakes_end_in_one_sentence(words, told, capsys, tmp_path):
    assert main(["--output_dir", str(tmp_path / "o"), *words]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1 and not (tmp_path / "o").exists()
