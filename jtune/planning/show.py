"""A plan as text, for a person."""

from collections.abc import Callable, Mapping
from typing import Any

from jtune.tuning.show import human

UNITS = {"pair": "pairs", "feedback": "marked answers"}  # what rows of preferences are counted in


def show(result: Mapping[str, Any], say: Callable[[str], None] = print) -> None:
    """The plan as text."""
    sizes, batch = result["per_device_bytes"], result["batch"]
    axes = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1) or "not split"
    say(f"{result['model']}: {result['parameters']:,} parameters, {result['trained_parameters']:,} train "
        f"({result['finetuning_type']})")  # fmt: skip
    say(f"devices      {result['devices']} x {result['device_kind']} ({axes})")
    others = f", of {len(batch['shapes'])} shapes the largest" if len(batch["shapes"]) > 1 else ""
    say(f"batch        [accum, batch, seq] {batch['shape']}{others}; remat {result['remat']}")
    if batch["assumed"]:
        say(f"             assumed: {batch['assumed']}")
    else:
        say(f"             {batch['padding_share']:.1%} padding, {batch['label_share']:.0%} of the tokens labelled")
    say("")
    say("memory of one device")
    names = {
        "frozen_parameters": "frozen parameters",
        "second_model": "teacher or reference model",
        "trained_parameters": "trained parameters",
        "adapters": "adapters",
        "optimizer_state": "optimizer state",
        "batch": "batch",
    }
    for kind, name in names.items():
        if sizes["by_kind"][kind]:
            say(f"  {name:38}{human(sizes['by_kind'][kind]):>14}")
    say(f"  {'saved activations and temporaries':38}{human(sizes['temporaries']):>14}")
    rest = sizes["peak"] - sizes["temporaries"] - sum(sizes["by_kind"].values())
    if rest > 0:
        say(f"  {'copied results, code, layout':38}{human(rest):>14}")
    say(f"  {'peak':38}{human(sizes['peak']):>14}   of {human(result['usable_memory_bytes'])} usable: "
        + ("fits" if result["fits"] else "DOES NOT FIT"))  # fmt: skip
    say(f"  {'lower bound: state and layer inputs':38}{human(result['floor_bytes']):>14}")
    if result["refused"]:
        say(f"  the compiler: {result['refused']}")
    say("")
    of_rows = result["rows"]
    counted = f"{of_rows['per_step']:,} {UNITS[of_rows['kind']]}, " if of_rows["kind"] in UNITS else ""
    say(f"update       {counted}{result['tokens_per_step']:,.0f} tokens, "
        f"{result['flops_per_token'] / 1e9:,.4g} GFLOP each, {result['flops_per_step'] / 1e12:,.4g} TFLOP")  # fmt: skip
    if result["seconds_per_step"]:
        say(f"time         {result['seconds_per_step']:.3f} s an update, {result['tokens_per_second']:,.0f} tokens/s, "
            f"if {result['utilisation']:.0%} of the peak is reached")  # fmt: skip
    else:
        say(f"time         unknown: no peak FLOP/s on record for {result['device_kind']}")
    if of_rows["reference"]:
        say(f"reference    of {of_rows['reference']:,} answers, once before the first update")
    run = f", {result['run_seconds'] / 3600:,.2f} hours" if result["run_seconds"] else ""
    steps = f"{result['steps']:,} updates{run}" if result["steps"] else "as many updates as the rows make"
    say(f"run          {steps}; a checkpoint takes {human(result['checkpoint_bytes'])}")
    say(
        f"compiled in  {result['compile_seconds']:.1f} s"
        + (" (cached: by an earlier plan)" if result["cached"] else "")
    )
    if result["advice"]:
        say("\nchanges that save memory, each alone:")
        for advice in result["advice"]:
            keys = overrides(advice["overrides"])
            enough = "fits" if advice["fits"] else "not enough"
            saves, left = human(advice["saves_bytes"]), human(advice["peak_bytes"])
            say(f"  {advice['change']}: saves about {saves}, peak {left}, {enough}\n      {keys}")
    if result["advice_together"]:
        together = result["advice_together"]
        enough = "fits" if together["fits"] else "still not enough"
        say(f"  together, on {together['devices']} devices: peak {human(together['peak_bytes'])}, {enough}\n"
            f"      {overrides(together['overrides'])}")  # fmt: skip
    if "fit" in result:
        say("\ntried:")
        for entry in result["fit"]["tried"]:
            say(f"  {human(entry['peak_bytes']):>12} {'fits' if entry['fits'] else 'does not fit':12} "
                f"{overrides(entry['overrides'])}")  # fmt: skip
        found = result["fit"]["overrides"]
        say(f"\nthe fastest that fits: {overrides(found)}" if found else "\nnothing that was tried fits")


def overrides(values: Mapping[str, Any]) -> str:
    """
    >>> overrides({"remat": "full", "pure_bf16": True})
    'remat=full pure_bf16=true'
    """
    plain = lambda value: str(value).lower() if isinstance(value, bool) else value
    return " ".join(f"{key}={plain(value)}" for key, value in values.items())
