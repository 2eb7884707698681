"""Events of a run. Subscribers are plain functions that get each event and may ask for something back."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["train_begin", "step", "log", "evaluate", "samples", "save", "train_end"]
Ask = Literal["save", "evaluate", "stop"]


@dataclass(frozen=True)
class Event:
    """One event.

    `record` holds the training log for `log`, the metrics for `evaluate`, and for `samples` the entry "samples": a list
    of {prompt, predict, label}, beside "step" and "epoch". Of other events it is empty.
    """

    kind: Kind
    step: int  # updates done
    max_steps: int
    epoch: float
    record: Mapping[str, Any] = field(default_factory=dict)


# A subscriber gets every event and may answer with requests: "save", "evaluate", "stop", or several of them.
Subscriber = Callable[[Event], Ask | Iterable[Ask] | None]


def tell(subscribers: Iterable[Subscriber], event: Event) -> set[Ask]:
    """Give `event` to each subscriber in order; return the union of their requests.

    >>> stop_at_3 = lambda event: "stop" if event.step == 3 else None
    >>> tell([stop_at_3, print], Event("step", 3, 10, 0.3))
    Event(kind='step', step=3, max_steps=10, epoch=0.3, record={})
    {'stop'}
    """
    asked: set[Ask] = set()
    for subscriber in subscribers:
        answer = subscriber(event)
        asked.update([answer] if isinstance(answer, str) else answer or ())
    return asked
