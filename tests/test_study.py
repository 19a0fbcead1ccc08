"The study of one chair: what is compared with what, and how it answers mistakes."
import json

import numpy as np
import pytest
from sdxl_course.dreambooth import DreamBoothConfig
from sdxl_course.study import APPLICATIONS, CLAIMS, VARIANTS, StudyConfig, compare, main, marks_of, training_of, verdicts


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "plain"])
def test_a_variant_differs_from_the_plain_training_in_one_thing(name):
    config = StudyConfig(output_dir="o")
    plain, other = training_of("plain", 1, config), training_of(name, 1, config)
    free = {"output_dir", "class_data_dir", "class_prompt", "num_class_images", "text_encoder_lr", "checkpointing_steps"}
    changed = {f for f in DreamBoothConfig.__dataclass_fields__ if getattr(plain, f) != getattr(other, f)} - free
    assert len(changed) == 1, changed


@pytest.mark.parametrize("steps", [16, 150, 160])
@pytest.mark.parametrize("name", VARIANTS)
def test_there_is_a_checkpoint_at_every_mark(name, steps):
    training = training_of(name, 0, StudyConfig(max_train_steps=steps))
    marks = marks_of(name, StudyConfig(max_train_steps=steps))
    assert marks[-1] == training.max_train_steps and not any(mark % training.checkpointing_steps for mark in marks) and abs(marks[-1] - VARIANTS[name].longer * steps) <= 8


@pytest.mark.parametrize("words, told", [(["--variants", "plain,sofa"], "sofa"), (["--seeds", "0"], "--seeds is 0"), (["--sed", "1"], "did you mean")], ids=str)
def test_mistakes_end_in_one_sentence(words, told, capsys, tmp_path):
    assert main(["--output_dir", str(tmp_path / "o"), *words]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1 and not (tmp_path / "o").exists()


def made_up(seed, shift):
    rng = np.random.default_rng(seed)
    pictures = {name: {key: (rng.normal(size=6) + shift).tolist() for key in ("likeness", "obeyed", "clip_t")} for name in APPLICATIONS}
    return dict(pictures, **{key: (rng.normal(size=12) + shift).tolist() for key in ("pres", "div", "drift", "unrelated", "copied")})


def test_pairs_of_the_same_seed_and_picture_are_compared():
    "The noise is common to both: the difference is exact, however much the pictures differ."
    rows = [dict(variant=name, seed=seed, marks={"5": made_up(seed, shift)}) for name, shift, seeds in (("plain", 0., (2, 0, 1)), ("prior", -.1, (0, 1, 2))) for seed in seeds]  # whatever the order of the rows
    study = dict(rows=rows + [dict(variant="base", seed=seed, marks={"0": made_up(seed, 0.)}) for seed in range(3)])
    found = compare(study, "prior", "plain", "pres")
    assert found == pytest.approx(dict(difference=-.1, low=-.1, high=-.1))
    shows = {row["claim"]: row["verdict"] == "shows" for row in verdicts(study)}
    assert len(shows) == sum({one, other} <= {"plain", "prior", "base"} for _, one, other, _, _ in CLAIMS) and shows["prior preservation keeps other chairs from becoming ours"]
    assert not shows["training makes it our chair"] and not shows["prior preservation keeps other chairs different"]
    json.dumps(verdicts(study))
