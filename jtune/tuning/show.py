"""A parameter tree, to look at: as a table, or one tensor of it by its Hugging Face name."""

import difflib
import sys
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jtune.errors import DataError
from jtune.models import CausalLM
from jtune.models.names import located, tensors
from jtune.tuning import count, is_node, trainable_mask


def show(tree: Any, mask: Any = None, *, norms: bool = False) -> None:
    """Print `tree`, one line for each leaf, and totals: path, shape, dtype, bytes, where it lies, whether it trains.

    In a notebook the tree itself follows, by treescope: unfold it, and arrays are drawn.

    >>> show(params)                                                     # doctest: +SKIP
    >>> show(jtune.lora.add(params, "q_proj,v_proj"))                    # doctest: +SKIP

    Args:
      tree: of arrays or `jax.ShapeDtypeStruct`s.
      mask: tree of bool like it, what trains; default: adapters if there are any, else everything.
      norms: a column more, the root mean square of each leaf's elements.
    """
    mask = trainable_mask(tree) if mask is None else mask
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    rows = [("parameter", "shape", "dtype", "bytes", *(["rms"] if norms else []), "sharding", "trains")]
    trained, total = 0, count(tree)
    held = {True: 0, False: 0}  # trains -> bytes
    for (path, leaf), trains in zip(leaves, jax.tree.leaves(mask), strict=True):
        size = leaf.size * leaf.dtype.itemsize
        trained += leaf.size if trains else 0
        held[trains] += size
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        rms = [f"{float(_rms(leaf)):.3g}"] if norms else []
        rows.append((name, shape, leaf.dtype.name, human(size), *rms, placement(leaf), "yes" if trains else ""))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:  # whole names, however narrow the terminal: they are what is typed next
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(
        f"{total:,} parameters, {human(sum(held.values()))}; {trained:,} of them train "
        f"({trained / max(1, total):.2%}, {human(held[True])})"
    )
    if _in_notebook():
        import treescope  # comes with flax

        treescope.display(tree)


def tensor(model: CausalLM, params: Any, name: str) -> jax.Array:
    """One tensor by the name that it has in the model's Hugging Face files, laid out as there (kernels `[out, in]`).

    >>> tensor(model, params, "model.layers.3.self_attn.q_proj.weight").shape                  # doctest: +SKIP
    (896, 896)

    Of a kernel with an adapter this is the kernel without it; `jtune.lora.merge(params)` has both in one.

    Raises:
      DataError: the model has no such tensor; the nearest name is told.
    """
    names = []
    for keys, leaf, layers in located(params):
        for part in tensors(keys, model.config, layers):
            if part.name == name:
                x = jax.tree.map(itemgetter(part.index), leaf)
                while is_node(x):
                    x = x.plain()
                return jnp.swapaxes(x, -1, -2) if part.transposed else x
            names.append(part.name)
    near = difflib.get_close_matches(name, names, n=1)
    raise DataError(f"{name}: this model has no such tensor.{f' Did you mean {near[0]}?' if near else ''}")


@jax.jit
def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def _in_notebook() -> bool:
    """Whether what is printed is read in a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


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
