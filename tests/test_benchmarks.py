"The benchmarks: who takes turns, which median is told, and that a foreign script stops before each of its steps."
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
LOOP = """
import sys
from pathlib import Path
from accelerate import Accelerator
accelerator, said = Accelerator(cpu=True), Path(sys.argv[2])
for step in range(100):
    with accelerator.accumulate(): said.write_text(f"{sys.argv[1]} {step + 1}")
"""


@pytest.fixture
def benchmarks(monkeypatch):
    "The folder of the benchmarks, whose modules find each other as scripts do."
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = [path.stem for path in BENCHMARKS.glob("*.py")]
    for name in names: monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in names: sys.modules.pop(name, None)


def test_two_take_turns_and_the_ratio_is_that_of_pairs(benchmarks):
    from common import compared, in_turn
    order = []
    pairs = in_turn([lambda: order.append("a") or len(order), lambda: order.append("b") or len(order)], 4, warmup=2)
    assert "".join(order) == "baabbaabbaab" and pairs == [(6, 5), (7, 8), (10, 9), (11, 12)]
    assert compared([(1, 1), (4, 2), (9, 3)]) == dict(before=4, after=2, ratio=2)
    assert compared([(1, 2), (30, 3), (4, 4)])["ratio"] == 1 # the ratio of the medians would be 4/3


def test_a_table_has_the_bar_beside_the_value(benchmarks):
    from reference import markdown, row, versus
    place = dict(processor="P", cores=2, system="S", python="3", versions=dict(torch="2", diffusers="0"))
    rows = [versus("steps", [(3., 2.), (3., 2.), (4., 2.)], 1.6), row("start", 3.5, "s", 4, least=False)]
    table = markdown([one | dict(provenance=place | dict(commit=commit)) for one, commit in zip(rows + rows[:1], "abb")]).splitlines()
    assert table[2:4] == ["| steps | 3 | 2 | 1.5 times as fast | >= 1.6 | no |", "| start |  |  | 3.5 s | <= 4 | yes |"]
    assert table[7:] == ["Measured on P, 2 cores, one thread; S, Python 3, torch 2, diffusers 0; commit a, b."]


def test_a_script_waits_before_each_step(benchmarks, tmp_path):
    from common import ask, close, start
    (tmp_path / "loop.py").write_text(LOOP)
    worker = start(BENCHMARKS / "reference.py", ["script", "steps", tmp_path / "loop.py", "word", tmp_path / "said"])
    try:
        for step in (1, 2, 3):
            seconds, = ask(worker)
            assert seconds >= 0 and (tmp_path / "said").read_text() == f"word {step}"
    finally: close([worker])


def test_the_fastest_rate_counts_and_a_run_that_is_too_late_stops(benchmarks, tmp_path, monkeypatch):
    import results
    asked, clock = [], {}
    monkeypatch.setattr(results, "ask", lambda worker: clock.update({worker.pid: clock.get(worker.pid, 0) + 1}) or asked.append(worker.pid))
    monkeypatch.setattr(results, "spent", lambda pid: clock[pid])
    monkeypatch.setattr(results, "close", lambda workers: None)
    good = {"1e-3": 60, "3e-3": 20, "1e-2": 1000, "3e-4": 1000} # updates after which each is good
    class Worker:
        def __init__(self, rate): self.pid = rate
    def score(path): return float(clock[path.parts[-3]] >= good[path.parts[-3]])
    rate, run = results.best_rate(lambda rate: (Worker(rate), tmp_path / rate), score, 1)
    assert rate == "3e-3" and run["updates"] == 20 and run["reached"] and clock == {"1e-3": 60, "3e-3": 20, "1e-2": 30, "3e-4": 30}
