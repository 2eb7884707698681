"""A parameter tree, as a table to read: path, shape, dtype, bytes, where it lies, whether it trains."""

from typing import Any

import jax
from jax.sharding import NamedSharding

from jtune.tuning import trainable_mask


def show(tree: Any, mask: Any = None) -> None:
    """Print `tree`, one line for each leaf, and totals.

    >>> show(params)                                                     # doctest: +SKIP
    >>> show(jtune.lora.add(params, "q_proj,v_proj"))                    # doctest: +SKIP

    Args:
      tree: of arrays or `jax.ShapeDtypeStruct`s.
      mask: tree of bool like it, what trains; default: adapters if there are any, else everything.
    """
    mask = trainable_mask(tree) if mask is None else mask
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    rows = [("parameter", "shape", "dtype", "bytes", "sharding", "trains")]
    totals = {True: [0, 0], False: [0, 0]}  # trains -> parameters, bytes
    for (path, leaf), trains in zip(leaves, jax.tree.leaves(mask), strict=True):
        size = leaf.size * leaf.dtype.itemsize
        totals[trains][0] += leaf.size
        totals[trains][1] += size
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        rows.append((name, shape, leaf.dtype.name, human(size), placement(leaf), "yes" if trains else ""))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:  # whole names, however narrow the terminal: they are what is typed next
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    (trained, trained_bytes), (frozen, frozen_bytes) = totals[True], totals[False]
    total = trained + frozen
    print(
        f"{total:,} parameters, {human(trained_bytes + frozen_bytes)}; {trained:,} of them train "
        f"({trained / max(1, total):.2%}, {human(trained_bytes)})"
    )


def placement(leaf: Any) -> str:
    """Where an array lies: which of its dimensions are split over which mesh axes."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return "one device" if sharding is not None else ""
    if sharding.is_fully_replicated:
        return "replicated" if sharding.mesh.size > 1 else "one device"
    names = lambda part: "-" if part is None else "+".join(part) if isinstance(part, tuple) else part
    return f"({', '.join(map(names, sharding.spec))})"


def human(size: float) -> str:
    """
    >>> human(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
