"The study of one chair: what is compared with what, and how it answers mistakes."
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from sdxl_course.core import CourseError, to_jsonable, write_json
from sdxl_course.data.records import open_image
from sdxl_course.world.samples import sample_dir
from sdxl_course.dreambooth import DreamBoothConfig
from sdxl_course.measure.claims import compare, verdict, verdicts
from sdxl_course.measure.metrics import student_interval
from sdxl_course.measure.subject import APPLICATIONS, Scorer
from sdxl_course.inference import load_pipeline
from sdxl_course.study import CLAIMS, VARIANTS, StudyConfig, Variant, draw_evaluation, eval_steps_of, gather, main, read_study, run_one, training_of


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "plain"])
def test_a_variant_differs_from_the_one_it_is_compared_with_in_one_thing(name):
    config = StudyConfig(output_dir="o")
    plain, other = training_of(dict(prior_text_encoder="text_encoder", prior_longer="prior").get(name, "plain"), 1, config), training_of(name, 1, config)
    free = {"output_dir", "class_data_dir", "class_prompt", "num_class_images", "text_encoder_lr", "checkpointing_steps"}
    changed = {f for f in DreamBoothConfig.__dataclass_fields__ if getattr(plain, f) != getattr(other, f)} - free
    assert len(changed) == 1, changed


@pytest.mark.parametrize("steps", [16, 150, 160])
@pytest.mark.parametrize("name", VARIANTS)
def test_there_is_a_checkpoint_at_every_evaluation(name, steps):
    training = training_of(name, 0, StudyConfig(max_train_steps=steps))
    judged = eval_steps_of(name, StudyConfig(max_train_steps=steps))
    assert judged[-1] == training.max_train_steps and not any(step % training.checkpointing_steps for step in judged) and abs(judged[-1] - VARIANTS[name].longer * steps) <= 8


@pytest.mark.parametrize("words, told", [(["--variants", "plain,sofa"], "sofa"), (["--seeds", "0"], "--seeds is 0"), (["--sed", "1"], "did you mean")], ids=str)
def test_mistakes_end_in_one_sentence(words, told, capsys, tmp_path):
    assert main(["--output_dir", str(tmp_path / "o"), *words]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1 and not (tmp_path / "o").exists()


def made_up(seed, shift):
    rng = np.random.default_rng(seed)
    pictures = {name: {key: (rng.normal(size=6) + shift).tolist() for key in ("subject_fidelity", "prompt_fidelity", "clip_t")} for name in APPLICATIONS}
    return dict(pictures, **{key: (rng.normal(size=12) + shift).tolist() for key in ("pres", "div", "drift", "unrelated", "copied")})


def test_pairs_of_the_same_seed_and_picture_are_compared():
    "The noise is common to both: the difference is exact, however much the pictures differ."
    rows = [dict(variant=name, seed=seed, eval_steps={"5": made_up(seed, shift)}) for name, shift, seeds in (("plain", 0., (2, 0, 1)), ("prior", -.1, (0, 1, 2))) for seed in seeds]  # whatever the order of the rows
    study = dict(rows=rows + [dict(variant="base", seed=seed, eval_steps={"0": made_up(seed, 0.)}) for seed in range(3)])
    found = compare(study, "prior", "plain", "pres")
    assert found == pytest.approx(dict(difference=-.1, low=-.1, high=-.1))
    shows = {row["claim"]: row["verdict"] == "shows" for row in verdicts(study, CLAIMS)}
    assert len(shows) == sum({claim.one, claim.other} <= {"plain", "prior", "base", None} for claim in CLAIMS) and shows["prior preservation keeps other chairs from becoming ours"]
    assert not shows["training makes it our chair"] and not shows["prior preservation keeps other chairs different"]
    json.dumps(verdicts(study, CLAIMS))


def test_only_seeds_that_both_have_are_compared():
    rows = [dict(variant=name, seed=seed, eval_steps={"5": made_up(seed, shift)}) for name, shift, seeds in (("plain", 0., (0, 1, 2, 3)), ("tok", .05, (3, 1)), ("rank_1", 0., (9,))) for seed in seeds]
    assert compare(dict(rows=rows), "tok", "plain", "subject_fidelity") == pytest.approx(dict(difference=.05, low=.05, high=.05))
    assert {row["claim"]: row["verdict"] for row in verdicts(dict(rows=rows), CLAIMS)}["another rare identifier makes no difference"] == "shows"
    with pytest.raises(CourseError, match="no seed that both"): compare(dict(rows=rows), "rank_1", "plain", "subject_fidelity")


def test_intervals_hold_the_truth_as_often_as_they_say():
    "Three trainings with six pictures each, which share what their training got: the mean of 0 lies inside 95 times in a hundred."
    rng = np.random.default_rng(0)
    inside = [low < 0 < high for low, high in (student_interval(rng.normal(size=(3, 1)) + .3 * rng.normal(size=(3, 6))) for _ in range(400))]
    assert np.mean(inside) == pytest.approx(.95, abs=.03)


@pytest.mark.parametrize("claimed, low, high, said", [((0, np.inf), .1, .2, "shows"), ((0, np.inf), -.1, .2, "undecided"), ((0, np.inf), -.2, -.1, "opposite"), ((-np.inf, 0), -.2, -.1, "shows"),
    ((-np.inf, 0), .1, .2, "opposite"), ((-.1, .1), -.05, .05, "shows"), ((-.1, .1), .05, .2, "undecided"), ((-.1, .1), .2, .3, "opposite"), ((-.1, .1), -.3, -.2, "opposite"), ((-.1, np.inf), -.05, .4, "shows")])
def test_a_verdict_is_where_the_interval_lies(claimed, low, high, said): assert verdict(claimed, low, high) == said


def test_rows_of_other_settings_are_left_out(tmp_path):
    "Weights, judges and the meaning of a variant belong to a row."
    (tmp_path / "rows").mkdir()
    settings = dict(weights="new")
    def row(name, seed, **other):
        written = dict(settings, variant=to_jsonable(VARIANTS.get(name, Variant("chair")))) | other
        write_json(tmp_path / "rows" / f"{name}-{seed}.json", dict(variant=name, seed=seed, seconds=1., eval_steps={"0": made_up(seed, 0.)}, settings=written, provenance=dict(time=str(seed), device="cpu")))
        Image.new("RGB", (596, 96)).save(tmp_path / "rows" / f"{name}-{seed}.png")
    for seed in (0, 1): row("base", seed)
    row("plain", 0)
    row("tok", 0, weights="old")
    row("prior", 0, variant=to_jsonable(Variant("sofa")))
    study = gather(tmp_path, settings, SimpleNamespace(scale={}))
    assert sorted((one["variant"], one["seed"]) for one in study["rows"]) == [("base", 0), ("base", 1), ("plain", 0)]
    assert study["provenance"] == [dict(time="1", device="cpu")] and read_study(tmp_path / "study.json") == study
    assert Image.open(tmp_path / "study.jpg").height == 2 * (96 + 14) + 4  # what is wanted, base and plain


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": []}'])
def test_a_file_that_is_no_study_is_refused(tmp_path, text):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(CourseError, match="is no study"): read_study(tmp_path / "study.json")


def test_a_mirrored_copy_is_a_copy():
    "Training sees mirrored pictures too."
    learnt = [open_image(path) for path in sorted(sample_dir("green_chair").glob("*.png"))]
    assert Scorer(applications=["view"]).nearest(learnt + [ImageOps.mirror(picture) for picture in learnt]) == pytest.approx([1.] * 2 * len(learnt), abs=1e-4)


def test_the_shipped_study_says_what_its_numbers_say():
    "Keys, claims and verdicts of the file are those of the code."
    study = read_study()
    judged = [measured for row in study["rows"] for measured in row["eval_steps"].values()]
    assert all(set(measured[name]) == {"subject_fidelity", "prompt_fidelity", "clip_t"} for measured in judged for name in APPLICATIONS)
    assert [row["claim"] for row in study["verdicts"]] == [claim.text for claim in CLAIMS]
    for row, found in zip(study["verdicts"], verdicts(study, CLAIMS)): assert {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()} == row


@pytest.mark.slow
def test_a_longer_training_is_judged_on_its_way(tmp_path):
    "What it is after one update is what a training of one update ends with."
    config = StudyConfig(output_dir=str(tmp_path), max_train_steps=1, class_pictures=2, num_inference_steps=1)
    (tmp_path / "rows").mkdir()
    scorer, base = Scorer(applications=["view"]), draw_evaluation(load_pipeline("tiny", device="cpu"), "chair", config, 0)
    longer, plain = (run_one(name, 0, config, base, scorer)["eval_steps"] for name in ("longer", "plain"))
    assert list(longer) == ["1", "2", "4", "8", "16"] and longer["1"] == plain["1"] and longer["16"] != plain["1"]
