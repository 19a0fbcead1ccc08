"The sweep over ranks, layers and kinds of LoRA: how rates are chosen, how it goes on, what it costs."
import json

import pytest

from sdxl_course import sweep
from sdxl_course.core import CourseError
from sdxl_course.train.loop import Diverged
from sdxl_course.sweep import SweepConfig, TASKS, WAYS, best_rate, main, run_sweep, seconds_needed, summary, trainings_of, training_of

SHORT = dict(ways="rank_1", learning_rates=[1e-3, 2e-3], max_rates=2, seeds=2, max_train_steps=2, train_batch_size=1, num_prompts=2, num_inference_steps=1)


@pytest.mark.parametrize("way", WAYS)
def test_ways_differ_in_what_they_say_and_in_nothing_else(way, tmp_path):
    config = SweepConfig(output_dir=str(tmp_path))
    for task in TASKS:
        plain, other = training_of(task, "rank_8", 1e-3, 0, config), training_of(task, way, 1e-3, 0, config)
        changed = {name for name in type(plain).__dataclass_fields__ if getattr(plain, name) != getattr(other, name)} - {"output_dir"}
        assert changed <= set(WAYS[way]), changed


def test_every_way_is_swept_before_it_is_compared():
    "With rates that suit each way differently, each is judged at its own, with all seeds."
    rows, config = [], SweepConfig(ways="rank_1,dora", seeds=3)
    loss = {"rank_1": lambda rate: abs(rate - 4e-3), "dora": lambda rate: abs(rate - 5e-4)}
    judged = []
    for task, way, rate, seed, judge in trainings_of(config, rows):
        rows.append(dict(task=task, way=way, rate=rate, seed=seed, trial=[-loss[way](rate)], validation_loss=0.1))
        if judge: judged.append((task, way, rate, seed))
    assert judged == [(task, way, rate, seed) for task in TASKS for way, rate in (("rank_1", 4e-3), ("dora", 5e-4)) for seed in range(3)]
    tried = {way: {row["rate"] for row in rows if row["way"] == way} for way in loss}
    assert tried == {"rank_1": {5e-4, 1e-3, 2e-3, 4e-3, 8e-3}, "dora": {2.5e-4, 5e-4, 1e-3, 2e-3}}  # until the best lies between two worse ones


def test_rates_beyond_the_first_end_where_they_should():
    rows, seen = [], []
    for task, way, rate, seed, judge in trainings_of(SweepConfig(ways="dora", seeds=1, max_rates=5), rows):
        rows.append(dict(task=task, way=way, rate=rate, seed=seed, trial=[rate], validation_loss=0.1))  # higher is always better
        if not judge and task == "style": seen.append(rate)
    assert seen == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]


def test_the_rate_that_shows_most_is_the_best_and_of_equal_ones_the_one_with_the_lowest_loss():
    row = dict(task="style", way="dora", seed=0)
    rows = [dict(row, rate=1, trial=[0.0, 0.0], validation_loss=0.0), dict(row, rate=2, trial=[1.0, 0.0], validation_loss=0.3), dict(row, rate=4, trial=[0.0, 1.0], validation_loss=0.2)]
    assert best_rate(rows, "style", "dora") == 4                                     # of two equal ones that with the lower loss
    assert best_rate([*rows[:2], dict(rows[2], validation_loss=None)], "style", "dora") == 2  # one that blew up is no best one


def test_a_training_that_blows_up_counts_as_the_worst_and_the_sweep_goes_on(tmp_path, monkeypatch):
    def burst(config, components, log): raise Diverged("update 3 got loss nan: wanted finite numbers; nothing was changed")
    monkeypatch.setattr(sweep, "train_dreambooth", burst)
    config = SweepConfig(output_dir=str(tmp_path), **SHORT)
    row = sweep.train_one("subject", "rank_1", 1.0, 0, config)
    assert row["trial"] == [0.0] and row["validation_loss"] is None and "nan" in row["failed"]
    (tmp_path / "rows").mkdir()
    rows = [dict(row, rate=0.1, trial=[0.0], validation_loss=0.2)]
    kept = sweep.next_row(("subject", "rank_1", 1.0, 0, False), rows, {}, config, lambda *given: pytest.fail("there is nothing to draw with"))
    assert kept["rate"] == 1.0 and best_rate(rows, "subject", "rank_1") == 0.1
    monkeypatch.setattr(sweep, "train_dreambooth", lambda *given, **more: (_ for _ in ()).throw(CourseError("no such folder")))
    with pytest.raises(CourseError, match="no such folder"): sweep.train_one("subject", "rank_1", 1.0, 0, config)


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_and_ends_with_the_same_numbers(tmp_path, monkeypatch):
    said, straight, stopped = [], SweepConfig(output_dir=str(tmp_path / "a"), **SHORT), SweepConfig(output_dir=str(tmp_path / "b"), **SHORT)
    whole = run_sweep(straight, said.append)
    assert len(said) == 2*(2 + 2) + 1 and "hours" in said[-1]                  # two rates, then two seeds, of which the first has to be judged only
    assert len(whole["rows"]) == 2*(2 + 1) and len(summary(whole, "style")) == len(summary(whole, "subject")) == 1
    train, count = sweep.train_one, []
    def stop_after_two(*args):
        if len(count) == 2: raise KeyboardInterrupt
        count.append(args)
        return train(*args)
    monkeypatch.setattr(sweep, "train_one", stop_after_two)
    with pytest.raises(KeyboardInterrupt): run_sweep(stopped, said.append)
    monkeypatch.setattr(sweep, "train_one", lambda *args: count.append(args) or train(*args))
    again = run_sweep(stopped, said.append)
    assert len(count) == 6                                                     # nothing was trained twice
    free = ("seconds", "update_seconds", "drawing_seconds", "peak_memory")
    bare = lambda rows: [{key: value for key, value in row.items() if key not in free} for row in rows]
    assert bare(again["rows"]) == bare(whole["rows"]) == bare(json.loads((tmp_path / "b" / "sweep.json").read_text())["rows"])
    seen = len(said)
    assert run_sweep(stopped, said.append)["rows"] == again["rows"] and len(said) == seen + 1
    rows = [json.loads(path.read_text()) for path in (tmp_path / "a" / "rows").glob("*.json")]
    assert seconds_needed(rows, SweepConfig()) > seconds_needed(rows, straight) > 0


@pytest.mark.parametrize("words, told", [(["--ways", "dorra"], "did you mean dora"), (["--seeds", "0"], "--seeds is 0"), (["--way", "dora"], "did you mean")], ids=str)
def test_mistakes_end_in_one_sentence(words, told, capsys, tmp_path):
    assert main(["--output_dir", str(tmp_path / "o"), *words]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1 and not (tmp_path / "o").exists()
