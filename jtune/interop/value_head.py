"""The value head of a reward model in files: LLaMA-Factory's `value_head.safetensors`, and transformers' classifiers.

The file lies beside an adapter or a model; trl's `AutoModelForCausalLMWithValueHead` saves the same tensors among those
of the model. A model of transformers for sequence classification, with one label, holds the kernel of a head as
`score.weight`, and has no bias.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jtune.distributed import processes
from jtune.errors import DataError, NonFiniteError
from jtune.files import read_object
from jtune.interop.weights import DTYPES, FLOAT8, Stored, is_finite, map_files, open_weights, read_header, read_part
from jtune.models.families.wrapped import with_text
from jtune.sharding import arrays

FILE, PICKLE = "value_head.safetensors", "value_head.bin"
WEIGHT, BIAS = "v_head.summary.weight", "v_head.summary.bias"
SCORE = "score.weight"  # of a classifier
CLASSIFIER = "ForSequenceClassification"
# What only a classifier's config.json says.
OF_CLASSIFIERS = ("id2label", "label2id", "problem_type", "num_labels")


def is_classifier(config_json: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a transformers model for sequence classification."""
    names = config_json.get("architectures")
    return isinstance(names, list) and bool(names) and str(names[0]).endswith(CLASSIFIER)


def without_labels(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the causal model inside of a classifier. It has no head of its own: its embedding is its head.

    >>> without_labels({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "good"}})
    {'architectures': ['LlamaForCausalLM'], 'tie_word_embeddings': True}
    """
    causal = [str(name).replace(CLASSIFIER, "ForCausalLM") for name in config_json["architectures"]]
    rest = {key: value for key, value in config_json.items() if key not in OF_CLASSIFIERS}
    return {**with_text(rest, {"tie_word_embeddings": True}), "architectures": causal, "tie_word_embeddings": True}


def holds_head(folder: Path) -> bool:
    """Whether there is a value head in the folder of an adapter or a model."""
    if any((folder / name).exists() for name in (FILE, PICKLE)):
        return True
    try:
        return is_classifier(read_object(folder / "config.json")) or WEIGHT in open_weights(folder)
    except (FileNotFoundError, DataError):  # of weights that cannot be read is told when they are read
        return False


def read_value_head(folder: Path, hidden_size: int) -> dict[str, np.ndarray]:
    """The value head in a folder that has one (`holds_head`), float32 `{"kernel": [hidden, 1], "bias": [1]}`.

    Raises:
      DataError: it is a pickle, is not of this model, or holds NaN or infinity.
    """
    path = folder / FILE
    if path.exists():
        stored, names = read_header(path), {"kernel": WEIGHT, "bias": BIAS}
    elif (folder / PICKLE).exists():
        raise DataError(
            f"{folder / PICKLE}: a pickle can run any code when it is read, so jtune does not.{_way(folder)}"
        )
    else:
        path, stored = folder, open_weights(folder)
        names = {"kernel": WEIGHT, "bias": BIAS} if WEIGHT in stored else {"kernel": SCORE}
    shapes = {"kernel": (1, hidden_size), "bias": (1,)}
    head = {"bias": np.zeros(1, np.float32)}
    for key, name in names.items():
        if name not in stored:
            there = "" if name == SCORE else f"; it holds {', '.join(sorted(stored)) or 'nothing'}"
            raise DataError(f"{path}: {name} is missing{there}")
        head[key] = _read(path, stored, name, shapes[key])
    return {"kernel": head["kernel"].T, "bias": head["bias"]}


def _read(path: Path, stored: Mapping[str, Stored], name: str, shape: tuple[int, ...]) -> np.ndarray:
    found = stored[name]
    if found.shape != shape:
        labels = " A reward model has one label." if name == SCORE and found.shape[1:] == shape[1:] else ""
        raise DataError(f"{path}: {name} has shape {list(found.shape)}, expected {list(shape)}.{labels}")
    if found.dtype not in DTYPES or found.dtype == FLOAT8:
        raise DataError(f"{path}: {name} is {found.dtype}; expected F32, BF16 or F16")
    part = tuple(slice(0, size) for size in shape)
    x = np.array(read_part(stored, name, part, map_files([found])), np.float32)
    if not is_finite(x):
        raise DataError(f"{path}: {name} is not finite (NaN or infinity)")
    return x


def _way(folder: Path) -> str:
    """How to make the file of today from the pickle."""
    return (
        " If you trust where it comes from, convert it:\n"
        '  python -c "import torch; from safetensors.torch import save_file; '
        f"save_file(torch.load('{folder / PICKLE}', map_location='cpu', weights_only=True), "
        f"'{folder / FILE}', metadata={{'format': 'pt'}})\""
    )


def forget_value_head(folder: Path) -> None:
    """Remove the value head of an earlier model, which would be read as that of the model that takes its place."""
    (folder / FILE).unlink(missing_ok=True)


def save_value_head(head: Mapping[str, Any], folder: Path) -> None:
    """Write `value_head.safetensors`. All processes call it; the first writes.

    Raises:
      NonFiniteError: it holds NaN or infinity.
    """
    kernel, bias = (jax.tree.map(arrays.whole, head[key]) for key in ("kernel", "bias"))
    if not processes.is_first():
        return
    tensors = {WEIGHT: np.ascontiguousarray(np.asarray(kernel, np.float32).T), BIAS: np.asarray(bias, np.float32)}
    if wrong := [name for name, x in tensors.items() if not is_finite(x)]:
        raise NonFiniteError(f"{folder / FILE} is not written: not finite (NaN or infinity): {', '.join(wrong)}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
