"""Where the time of a run goes adds up to the time, over interruptions too."""

import json

import pytest

from jtune.train import timing
from jtune.train.timing import Timing, goodput, lost


@pytest.fixture
def clock(monkeypatch):
    """`clock.now` is the time."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_what_is_booked_inside_is_not_booked_twice_and_the_rest_is_of_updates(clock):
    seconds = Timing()
    clock.now += 5
    seconds.rest("startup")
    with seconds.spent("evaluation"):
        clock.now += 2
        with seconds.spent("compile"):
            clock.now += 3
    clock.now += 10
    found = seconds.total()
    assert {kind: value for kind, value in found.items() if value} == pytest.approx(
        {"startup": 5, "evaluation": 2, "compile": 3, "step": 10}
    )
    assert goodput(found) == pytest.approx(0.5)


def test_time_is_booked_when_what_happens_fails(clock):
    seconds = Timing()

    def fails():
        with seconds.spent("checkpoint"):
            clock.now += 4
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert seconds.total()["checkpoint"] == 4


def test_a_resumed_run_goes_on_counting_and_what_is_done_again_was_lost(clock, tmp_path):
    log = tmp_path / "trainer_log.jsonl"
    lines = [
        {"seconds": {"step": 10.0, "compile": 5.0}},
        {"eval_loss": 1.0},
        {"seconds": {"step": 30.0, "compile": 5.0}},
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"seconds": {"step": 99')
    saved = {"step": 18.0, "compile": 5.0}
    assert lost(log, saved) == 12.0
    assert lost(tmp_path / "none", saved) == 0.0
    seconds = Timing()
    clock.now += 1
    seconds.add(saved | {"lost": 12.0})
    seconds.rest("startup")
    clock.now += 7
    found = seconds.total()
    assert (found["step"], found["startup"], found["lost"]) == pytest.approx((25.0, 1.0, 12.0))
    assert sum(found.values()) == pytest.approx(18 + 5 + 12 + 1 + 7)
