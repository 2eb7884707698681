"""Learning rates equal transformers' own schedulers, to the last bits of a double."""

import pytest

from jtune.errors import ConfigError
from jtune.train.schedule import make_schedule, warmup_updates

CASES = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-5, "power": 2.0}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 20}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5, "warmup_lr_rate": 0.2}),
    ("warmup_stable_decay", {"num_stable_steps": 10, "num_decay_steps": 8, "min_lr_ratio": 0.1}),
    (
        "warmup_stable_decay",
        {"num_stable_steps": 4, "num_decay_steps": 8, "decay_type": "1-sqrt", "warmup_type": "cosine"},
    ),
]


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_rates_equal_transformers(name, kwargs, warmup):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    total, peak = 30, 1e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=kwargs)
    ours = make_schedule(name, peak, warmup, total, kwargs)
    for step in range(total):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18), step
        optimizer.step()
        theirs.step()


def test_stable_part_is_a_third_of_what_follows_warmup():
    rates = [make_schedule("warmup_stable_decay", 1.0, 2, 32)(step) for step in range(33)]
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[2:12] == [1.0] * 10
    assert rates[12] == 1.0
    assert rates[13] < 1.0
    assert rates[32] == 0.0


def test_warmup_is_a_count_or_a_share():
    assert warmup_updates(12, 2, None) == 2
    assert warmup_updates(12, 0, 0.1) == 2  # rounded up
    assert warmup_updates(12, 0.5, None) == 6
    assert warmup_updates(12, 3, 0.5) == 3
    assert warmup_updates(12, 0, None) == 0


def test_unknown_names_and_keywords_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'cosine'"):
        make_schedule("cosin", 1e-3, 0, 10)
    with pytest.raises(ConfigError, match="has no 'cycles'; it takes num_cycles"):
        make_schedule("cosine", 1e-3, 0, 10, {"cycles": 2})
    with pytest.raises(ConfigError, match="exactly one of min_lr or min_lr_rate"):
        make_schedule("cosine_with_min_lr", 1e-3, 0, 10)
