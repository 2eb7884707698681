"""Every backend of attention gives what the reference gives: packed rows, grouped heads, windows, soft-caps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtune.models import CausalLM, DecoderConfig, init_params
from jtune.models.attention import dispatch
from jtune.models.attention.blocks import block_size
from jtune.models.attention.choose import choose, gpu_kernel_failure
from jtune.models.attention.chunks import cut_segments
from jtune.models.attention.dispatch import attend
from jtune.models.attention.flash import flash_attention
from jtune.sharding import make_mesh

BATCH, SEQ, HEADS, KV_HEADS, HEAD_DIM = 2, 300, 4, 2, 16


@pytest.fixture(scope="module")
def packed():
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((BATCH, SEQ, n, HEAD_DIM)), jnp.float32) for n in (HEADS, KV_HEADS, KV_HEADS)
    )
    # Segment 0 is padding; it comes first here, which is as good as last.
    segment_ids = jnp.asarray(np.sort(rng.integers(0, 4, (BATCH, SEQ)), axis=1), jnp.int32)
    return q, k, v, segment_ids


def outputs_and_gradients(call, q, k, v):
    def scalar(q, k, v):
        out = call(q, k, v)
        return jnp.sum(jnp.sin(out)), out

    gradients, out = jax.grad(scalar, (0, 1, 2), has_aux=True)(q, k, v)
    return (out, *gradients)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels are for TPUs and GPUs; here they are interpreted."""
    for name in ("splash_attention", "flash_attention"):
        monkeypatch.setattr(dispatch, name, partial(getattr(dispatch, name), interpret=True))


@pytest.mark.parametrize("backend", ["blocks", "splash", "flash"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (37, None), (None, 20.0), (130, 5.0)])
def test_backends_equal_the_reference(backend, window, softcap, packed, interpreted):
    q, k, v, segment_ids = packed
    call = partial(attend, segment_ids_BS=segment_ids, scale=0.25, window=window, softcap=softcap)
    expected = outputs_and_gradients(call, q, k, v)
    found = outputs_and_gradients(partial(call, backend=backend), q, k, v)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("backend", ["xla", "blocks", "splash", "flash"])
def test_a_token_sees_its_own_chunk_of_its_segment(backend, packed, interpreted):
    q, k, v, segment_ids = packed
    chunk, rows = 37, np.arange(BATCH)[:, None]
    starts = np.stack([np.searchsorted(row, np.arange(4)) for row in np.asarray(segment_ids)])
    positions = np.arange(SEQ) - starts[rows, segment_ids]
    cut = cut_segments(segment_ids, jnp.asarray(positions, jnp.int32), chunk)
    out = attend(q, k, v, cut, scale=0.25, window=chunk, backend=backend)
    begins = (positions % chunk == 0) & (segment_ids > 0)  # a chunk
    expected = attend(q, k, v, jnp.cumsum(begins, axis=1), scale=0.25)
    real = np.asarray(segment_ids) > 0
    np.testing.assert_allclose(out[real], expected[real], atol=2e-5)


@pytest.mark.parametrize("backend", ["blocks", "flash"])
def test_sinks_and_values_of_another_width(backend, packed, interpreted):
    q, k, v, segment_ids = packed
    sinks = jnp.linspace(-2.0, 2.0, HEADS)

    def call(q, k, sinks, backend="xla"):
        return attend(q, k, v[..., :10], segment_ids, scale=0.25, sinks_H=sinks, backend=backend)

    expected = outputs_and_gradients(call, q, k, sinks)
    for ours, theirs in zip(outputs_and_gradients(partial(call, backend=backend), q, k, sinks), expected):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("window", [None, 150])
def test_flash_attention_over_a_mesh(window, packed, interpreted):
    """Rows over devices, heads, and the queries of a row, of which each device must know the number of its first."""
    q, k, v, segment_ids = packed
    call = partial(attend, segment_ids_BS=segment_ids, scale=0.25, window=window)
    expected = outputs_and_gradients(call, q, k, v)
    mesh = make_mesh(fsdp=2, tensor=2, context=2)
    found = jax.jit(lambda *x: outputs_and_gradients(partial(call, backend="flash", mesh=mesh), *x))(q, k, v)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_heads_that_do_not_fit_together_are_computed_in_turn(packed, monkeypatch):
    q, k, v, segment_ids = packed
    call = partial(attend, scale=0.25, backend="blocks")
    together = outputs_and_gradients(lambda q, k, v: call(q, k, v, segment_ids), q, k, v)
    for heads in (1, 3):  # of the BATCH * KV_HEADS = 4
        monkeypatch.setattr(dispatch, "MAPPED_SCORES", heads * HEADS // KV_HEADS * block_size(SEQ) * SEQ)
        in_turn = outputs_and_gradients(lambda q, k, v: call(q, k, v, segment_ids), q, k, v)
        assert "scan" in str(jax.make_jaxpr(call)(q, k, v, segment_ids))
        for a, b in zip(in_turn, together):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_blocks_do_not_keep_scores(packed):
    q, k, v, segment_ids = packed

    def kept(backend):
        loss = lambda q, k, v: attend(q, k, v, segment_ids, scale=0.25, backend=backend).sum()
        residuals = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(loss, *x)[1], q, k, v))
        return max(x.size for x in residuals)

    scores = BATCH * HEADS * SEQ * SEQ
    assert kept("xla") == scores
    assert kept("blocks") < scores / 4


def test_the_choice_follows_from_platform_and_flash_attn():
    assert choose("auto", "tpu")[0] == choose("fa2", "tpu")[0] == "splash"
    assert choose("auto", "gpu")[0] == choose("fa2", "gpu")[0] == "flash"
    assert choose("auto", "cpu")[0] == "blocks"
    assert choose("auto", "gpu", dtype=jnp.float32)[0] == "blocks"
    assert choose("disabled", "tpu")[0] == choose("sdpa", "cpu")[0] == "xla"
    with pytest.raises(ValueError, match="expected one of xla, blocks, splash, flash"):
        attend(*(jnp.zeros((1, 2, 1, 4)),) * 3, jnp.ones((1, 2), jnp.int32), scale=1.0, backend="cudnn")


def test_the_gpu_kernel_is_tried_before_it_is_chosen(monkeypatch):
    """On a device where it does not compile (a CPU), where it gives wrong numbers, and where all is well."""
    device, right = jax.devices()[0], partial(flash_attention, interpret=True)
    choice = lambda: gpu_kernel_failure.cache_clear() or choose("auto", "gpu", device=device)
    backend, why = choice()
    assert backend == "blocks"
    assert "it fails on cpu (ValueError: Only interpret mode" in why

    def wrong(*args):
        out, sums = right(*args)
        return out.at[:, 128:256].multiply(1.1), sums

    monkeypatch.setattr(dispatch, "flash_attention", wrong)
    assert "its gradients are off by" in choice()[1]
    monkeypatch.setattr(dispatch, "flash_attention", right)
    assert choice()[0] == "flash"


@pytest.mark.slow
@pytest.mark.parametrize("mesh_shape", [(8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize(("head_dim", "window", "softcap"), [(64, None, None), (128, 512, 50.0)])
def test_splash_compiles_for_a_tpu(mesh_shape, head_dim, window, softcap, monkeypatch):
    """With the real TPU compiler, which needs no TPU: forward and backward, split over rows, heads and queries."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    jax.devices()  # those of the CPU, before their flags go: the TPU compiler ends a process that names unknown ones
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc("v5e:2x4", platform="tpu")
    names = ("fsdp", "tensor", "context")
    mesh = Mesh(np.array(topology.devices).reshape(mesh_shape), names, axis_types=(AxisType.Auto,) * 3)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    like = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    def loss(q, k, v, segment_ids):
        out = attend(q, k, v, segment_ids, scale=0.1, window=window, softcap=softcap, backend="splash", mesh=mesh)
        return out.astype(jnp.float32).sum()

    q, kv = like(8, 1024, 8, head_dim), like(8, 1024, 4, head_dim)
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, kv, kv, like(8, 1024, dtype=jnp.int32)).compile()
    scores = 8 // mesh_shape[0] * 8 * 1024 * 1024 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 4


@pytest.mark.parametrize("backend", ["xla", "blocks"])
@pytest.mark.parametrize("sinks", [False, True])
def test_what_attention_gives_is_kept_once(backend, sinks):
    config = DecoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=20, sinks=sinks,
    )  # fmt: skip
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def kept(remat):
        def residuals(params, ids):
            logits = lambda p: CausalLM(config, remat=remat, attention=backend).apply({"params": p}, ids)
            return jax.vjp(logits, params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, params, jax.ShapeDtypeStruct((2, 128), jnp.int32)))
        given = 3 * 2 * 128 * 4 * 20  # of each layer all tokens, of each its heads
        return sum(x.size == given for x in leaves)

    assert kept("attention") == 1
    assert kept("full") == 0
