"""Experiment trackers: which names `report_to` may give, and which arguments are for which of them."""

import difflib
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

TRACKERS = ("tensorboard", "wandb", "mlflow", "swanlab", "trackio")
# transformers reports to these, jtune does not.
OTHERS = (
    *("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "flytekit", "kubeflow"),
    "neptune",
)
# Arguments that mean something to some trackers only.
OWNERS: dict[str, tuple[str, ...]] = {
    "project": ("wandb", "mlflow", "trackio"),
    "trackio_space_id": ("trackio",),
    **dict.fromkeys(
        ("swanlab_project", "swanlab_workspace", "swanlab_run_name", "swanlab_mode", "swanlab_api_key"), ("swanlab",)
    ),
    "swanlab_logdir": ("swanlab",),
}


def chosen(report_to: tuple[str, ...], use_swanlab: bool) -> tuple[str, ...]:
    """The trackers that are asked for, each once; "all" stays, as only the machine knows which are installed.

    >>> chosen(("none", "wandb", "comet_ml"), True), chosen(("all",), False)
    (('wandb', 'swanlab'), ('all',))
    """
    names = [*report_to, *(["swanlab"] if use_swanlab else [])]
    return tuple(dict.fromkeys(name for name in names if name in (*TRACKERS, "all")))


def faults(v: SimpleNamespace) -> Iterator[tuple[tuple[str, ...], str]]:
    """A fault for each name that no tracker has."""
    for name in v.report_to:
        if name not in (*TRACKERS, *OTHERS, "all", "none"):
            near = difflib.get_close_matches(name, [*TRACKERS, "all", "none", *OTHERS], n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            yield ("report_to",), f"report_to: {name} is not a tracker: {', '.join(TRACKERS)}, all or none.{hint}"


def notes(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """`(argument, note)` for each value that has no effect.

    Args:
      values: the arguments that were given.
      defaults: of all arguments.
    """
    report_to = values.get("report_to", ())
    for name in report_to:
        if name in OTHERS:
            yield "report_to", f"report_to: jtune does not report to {name}; it does to {', '.join(TRACKERS)}"
    names = chosen(report_to, values.get("use_swanlab", False))
    for name, owners in OWNERS.items():
        if values.get(name, defaults[name]) != defaults[name] and not {*owners, "all"} & set(names):
            yield name, f"{name} is ignored without report_to: {' or '.join(owners)}"
