"""`rope_scaling`: a model reads rows longer than those it was trained on."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from jtune.config import Config
from jtune.errors import ConfigError
from jtune.models.families import full_config

log = logging.getLogger("jtune")


def scale_rope(config_json: Mapping[str, Any], kind: str, length: int) -> dict[str, Any]:
    """A config.json whose rotations reach `length` positions, by LLaMA-Factory's rule; unchanged if they do already.

    The factor is the next whole number of times that `length` holds the positions of the model.

    Args:
      kind: linear, dynamic, yarn or llama3.

    Raises:
      ConfigError: the model has no rotations, or several, one for each kind of layer.
    """
    full, _ = full_config(config_json)
    before = full.get("rope_parameters") or {}
    if "rope_theta" not in before:
        which = "one for each kind of layer" if before else "none"
        raise ConfigError(f"rope_scaling needs a model with one rotation, and this one has {which}: leave it out")
    known = int(before.get("original_max_position_embeddings") or full["max_position_embeddings"])
    if length <= known:
        log.info("rope_scaling has no effect: cutoff_len %d is within the %d positions of the model", length, known)
        return dict(config_json)
    factor = float(math.ceil(length / known))
    rope = {key: before[key] for key in ("rope_theta", "partial_rotary_factor") if before.get(key) is not None}
    rope |= {"rope_type": kind, "factor": factor}
    if kind != "linear":
        rope["original_max_position_embeddings"] = known
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    log.info("rope_scaling: %s: %g times the %d positions of the model", kind, factor, known)
    kept = {key: value for key, value in config_json.items() if key not in ("rope_scaling", "rope_theta")}
    return kept | {"rope_parameters": rope, "max_position_embeddings": int(known * factor)}


def with_rope_scaling(config_json: dict[str, Any], config: Config, *, trains: bool) -> dict[str, Any]:
    """`scale_rope` as the arguments ask for it: for `cutoff_len`, and without a training file for twice the positions.

    Raises:
      ConfigError: see `scale_rope`.
    """
    kind = config.model.rope_scaling
    if kind is None:
        return config_json
    if trains or config.training.do_train:
        return scale_rope(config_json, kind, config.data.cutoff_len)
    full, _ = full_config(config_json)
    before = full.get("rope_parameters") or {}
    known = before.get("original_max_position_embeddings") or full.get("max_position_embeddings") or 0
    return scale_rope(config_json, kind, 2 * int(known))
