"""Attention by each kernel of this machine's GPU, beside the exact result: time of forward and backward, and error.

    python scripts/bench/attention.py [--only "8B"] [--sweep]

--sweep also times other blocks for jtune/models/attention/flash_kernels.py. README.md says what is compared.
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import NamedTuple

import make  # noqa: F401  this checkout, also where another one is installed
import numpy as np


class Cell(NamedTuple):
    name: str
    rows: int
    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    mean: int | None  # tokens of a segment; None: a row is one


CELLS = [
    Cell("8B one segment", 4, 4096, 32, 8, 128, None),
    Cell("8B packed", 4, 4096, 32, 8, 128, 200),
    Cell("1B one segment", 8, 4096, 32, 8, 64, None),
    Cell("1B packed", 8, 4096, 32, 8, 64, 200),
    Cell("0.5B packed", 16, 4096, 14, 2, 64, 200),
    Cell("8B 32k", 1, 32768, 32, 8, 128, None),
]


def segments(cell: Cell) -> np.ndarray:
    """int32 [rows, seq], log-normal lengths."""
    if cell.mean is None:
        return np.ones((cell.rows, cell.seq), np.int32)
    rng = np.random.default_rng(0)
    ids = np.zeros((cell.rows, cell.seq), np.int32)
    for row in ids:
        lengths = np.maximum(8, cell.mean * rng.lognormal(-0.3, 0.8, cell.seq // 8).astype(int))
        row[:] = np.repeat(np.arange(1, len(lengths) + 1), lengths)[: cell.seq]
    return ids


def pairs(ids: np.ndarray) -> int:
    lengths = np.concatenate([np.bincount(row)[1:] for row in ids]).astype(np.int64)
    return int((lengths * (lengths + 1) // 2).sum())


def cudnn(q, k, v, segment_ids, *, scale: float, most: int):
    """cuDNN through jax: its causal kernel for rows of one segment, else that for segments of different lengths.

    jax has the second only inside; it wants the largest number of segments of a row, and keeps as much for the backward
    pass as if each were as long as the row.
    """
    import jax
    import jax.numpy as jnp

    if most == 1:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    _, T = segment_ids.shape
    number = jnp.arange(1, most + 1)
    lengths = (segment_ids[:, None, :] == number[None, :, None]).sum(-1).astype(jnp.int32)
    starts = jnp.argmax(segment_ids[:, None, :] == number[None, :, None], axis=-1).astype(jnp.int32)
    there = lengths > 0
    end = jnp.where(there.any(1), (starts + lengths).max(1), T)
    offsets = jnp.concatenate([jnp.where(there, starts, -1), jnp.full_like(starts[:, :1], -1)], axis=1)
    offsets = jnp.where(jnp.arange(most + 1)[None] == there.sum(1)[:, None], end[:, None], offsets).astype(jnp.int32)
    lengths = jnp.where(there, lengths, -1)
    return dot_product_attention(
        q, k, v, None, None, lengths, lengths, offsets, offsets, scale=scale, mask_type=MaskType.PADDING_CAUSAL
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts of the names of the cells to run")
    parser.add_argument("--sweep", action="store_true", help="other blocks, too")
    parser.add_argument("--tiny", action="store_true", help="one small cell, wherever this runs: that it works")
    args = parser.parse_args()
    import jax

    if jax.default_backend() != "gpu" and not args.tiny:
        print("no GPU here: nothing is measured. --tiny shows that it works.")
        return 0
    cells = [Cell("tiny", 2, 512, 4, 2, 64, 100)] if args.tiny else [c for c in CELLS if args.only in c.name]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, bf16")
    print(
        "| cell | kernel | forward ms | TFLOP/s | backward ms | TFLOP/s | error of output, of gradients | same bits |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for cell in cells:
        run_cell(cell)
    if args.sweep:
        for cell in cells:
            if cell.seq == 4096:
                sweep(cell)
    return 0


def inputs(cell: Cell):
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 4)
    heads = (cell.heads, cell.kv_heads, cell.kv_heads, cell.heads)
    shapes = [(cell.rows, cell.seq, n, cell.head_dim) for n in heads]
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes)]


def run_cell(cell: Cell) -> None:
    import jax
    import jax.numpy as jnp

    from jtune.models.attention.dispatch import attend

    ids = segments(cell)
    segment_ids, scale = jnp.asarray(ids), cell.head_dim**-0.5
    q, k, v, d_out = inputs(cell)
    kernels = {
        "flash": partial(attend, scale=scale, backend="flash"),
        "cuDNN": partial(cudnn, scale=scale, most=int(ids.max())),
        "blocks": partial(attend, scale=scale, backend="blocks"),
    }
    if cell.seq > 8192:
        del kernels["blocks"]
    forward = lambda call: jax.jit(lambda q, k, v, s: call(q, k, v, s))
    both = lambda call: jax.jit(lambda q, k, v, s, d: with_gradients(call, q, k, v, s, d))
    exact = None
    if cell.seq <= 8192:  # of one row and two groups of heads
        G = cell.heads // cell.kv_heads
        cut = lambda x, n: x[:1, :, :n].astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            exact = both(partial(attend, scale=scale))(
                cut(q, 2 * G), cut(k, 2), cut(v, 2), segment_ids[:1], cut(d_out, 2 * G)
            )
    with ThreadPoolExecutor(8) as pool:  # compilers run side by side
        given = q, k, v, segment_ids
        compiled = {
            name: (pool.submit(compile_it, forward(call), *given), pool.submit(compile_it, both(call), *given, d_out))
            for name, call in kernels.items()
        }
    work = 4 * cell.heads * cell.head_dim * pairs(ids)
    for name, (one, two) in compiled.items():
        try:
            one, two = one.result(), two.result()
            found, again = two(*given, d_out), two(*given, d_out)
            same = all(bool((a == b).all()) for a, b in zip(found, again))
            t1, t2 = seconds(one, *given), seconds(two, *given, d_out)
        except Exception as error:
            print(f"| {cell.name} | {name} | {type(error).__name__}: {str(error)[:300]!r} | | | | | |", flush=True)
            continue
        errors = [] if exact is None else [error_of(a, b) for a, b in zip(found, exact)]
        shown = f"{errors[0]:.1e}, {max(errors[1:]):.1e}" if errors else ""
        speeds = (
            f"{t1 * 1e3:.2f} | {work / t1 / 1e12:.0f} | {(t2 - t1) * 1e3:.2f} | {2.5 * work / (t2 - t1) / 1e12:.0f}"
        )
        print(f"| {cell.name} | {name} | {speeds} | {shown} | {'yes' if same else 'no'} |", flush=True)


def with_gradients(call, q, k, v, segment_ids, d_out):
    import jax

    out, back = jax.vjp(lambda q, k, v: call(q, k, v, segment_ids), q, k, v)
    return (out, *back(d_out))


def compile_it(function, *given):
    return function.lower(*given).compile()


def error_of(found, exact) -> float:
    import jax.numpy as jnp

    part = found[:1, :, : exact.shape[2]].astype(jnp.float32)
    return float(jnp.linalg.norm(part - exact) / jnp.linalg.norm(exact))


def seconds(function, *given, calls: int = 10, rounds: int = 3) -> float:
    """Of one call, when so many are in the queue; the median of some rounds."""
    import jax

    jax.block_until_ready(function(*given))
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            found = function(*given)
        jax.block_until_ready(found)
        times.append((time.perf_counter() - begin) / calls)
    return median(times)


def sweep(cell: Cell) -> None:
    """Each of the three kernels by itself, with other blocks; what a call does not return is not computed."""
    import jax
    import jax.numpy as jnp

    from jtune.models.attention.flash import bounds as _bounds
    from jtune.models.attention.flash_kernels import Blocks, Options, Plan, flash, plan_of

    q, k, v, d_out = inputs(cell)
    first, last = _bounds(jnp.asarray(segments(cell)), None)
    given = q, k, v, first, last, jnp.zeros(1, jnp.int32), d_out

    def call(field: str, blocks: Blocks, q, k, v, first, last, offset, d_out):
        plan = plan_of(cell.head_dim)._replace(**{field: blocks})
        options = Options(cell.head_dim**-0.5, None, plan)
        out, back = jax.vjp(lambda q, k, v: flash(q, k, v, first, last, offset, options)[0], q, k, v)
        if field == "forward":
            return out
        d_q, d_k, d_v = back(d_out)
        return d_q if field == "by_queries" else (d_k, d_v)

    shapes = (128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (32, 128)  # queries, keys
    tried = [
        (field, Blocks(*shape, warps, stages))
        for field in Plan._fields
        for shape in (shapes[-1::-1] if field == "by_keys" else shapes[:-1])
        for warps in (4, 8)
        for stages in (2, 3)
    ]
    with ThreadPoolExecutor(16) as pool:
        compiled = {one: pool.submit(compile_it, jax.jit(partial(call, *one)), *given) for one in tried}
    results = []
    for (field, blocks), future in compiled.items():
        try:
            results.append((field, seconds(future.result(), *given), blocks))
        except Exception as error:
            print(f"{cell.name}: {field} {tuple(blocks)}: {str(error)[:120]!r}")
    for field in Plan._fields:
        ranked = sorted((t, b) for f, t, b in results if f == field)
        print(
            f"{cell.name}: {field} (the forward pass is in all), ms: "
            + ", ".join(f"{t * 1e3:.2f} {tuple(b)}" for t, b in ranked[:8]),
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
