"""Names for what `datasets` caches: made of everything that the result depends on, and of nothing else.

By itself `datasets` pickles the function it maps. That misses changes of the code (functions are pickled by name) and
sees changes where there are none (a tokenizer carries state of its last call), so rows would be stale or encoded anew.
"""

from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import xxhash

ROOMS = ("sources", "formats", "templates", "tokens", "encode")  # whose code the encoded rows depend on


def fingerprint(table: datasets.Dataset, step: str, args: Any, rows: np.ndarray | None = None) -> str:
    """The name of the result of `step` on `table`; `args` is what it depends on, as anything with a stable repr."""
    digest = xxhash.xxh64(f"{table._fingerprint} {step} {_code()} {args!r}".encode())
    if rows is not None:
        digest.update(np.ascontiguousarray(rows).tobytes())
    return digest.hexdigest()


def tokenizer_key(tokenizer: Any) -> str:
    """A digest of everything about a tokenizer that its ids depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        truncation, padding = backend.truncation, backend.padding  # of the last call, not of the vocabulary
        backend.no_truncation()
        backend.no_padding()
        content = backend.to_str()
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
    else:
        content = repr((sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs))
    names = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    flags = (getattr(tokenizer, "split_special_tokens", False), getattr(tokenizer, "add_bos_token", False))
    return xxhash.xxh64(f"{type(tokenizer).__name__} {content} {names} {flags}".encode()).hexdigest()


@cache
def _code() -> str:
    data = Path(__file__).parents[1]
    files = (path for room in ROOMS for path in sorted((data / room).glob("*.py")))
    return xxhash.xxh64(b"".join(path.read_bytes() for path in files)).hexdigest()
