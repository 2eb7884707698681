"""A checkpoint is complete and verified, or invisible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jtune.errors import CheckpointError
from jtune.train import resume_json
from jtune.train.checkpoint import Checkpointer
from jtune.train.checkpoint_folder import find_checkpoints, read_meta
from jtune.train.digest import digests
from jtune.train.restore import restore, restore_newest

STATE = {"a": jnp.arange(12.0).reshape(3, 4), "b": (None, jnp.int32(3)), "c": jnp.ones((7,), jnp.bfloat16)}


def like(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(folder, *steps, keep=None, state=STATE):
    saver = Checkpointer(folder, keep=keep)
    for step in steps:
        saver.save(step, state, {"note": step}, lambda path: (path / "model.txt").write_text("weights"))
    saver.close()


def damage(folder):
    """Flip one bit of the largest file."""
    file = max((p for p in (folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_what_is_saved_comes_back_bit_for_bit_with_its_files_and_notes(tmp_path):
    save(tmp_path, 5)
    path = tmp_path / "checkpoint-5"
    assert_same(restore(path, like(STATE)), STATE)
    assert read_meta(path)["note"] == 5
    assert (path / "model.txt").read_text() == "weights"


def test_a_donated_buffer_does_not_reach_the_checkpoint(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = step(jnp.zeros((256, 256)))
    saver = Checkpointer(tmp_path)
    saver.save(1, {"x": x}, {}, lambda _: None)
    for _ in range(20):
        x = step(x)  # overwrites the buffer while Orbax may still be writing
    saver.close()
    assert_same(restore(tmp_path / "checkpoint-1", like({"x": x})), {"x": np.ones((256, 256))})


def test_the_newest_are_kept_and_the_best_is_never_forgotten(tmp_path):
    save(tmp_path, 2, 4, 6, 8, 10, keep=2)
    assert [p.name for p in find_checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-10"]
    saver = Checkpointer(tmp_path, keep=2)
    saver.best = tmp_path / "checkpoint-8"
    for step in (12, 14):
        saver.save(step, STATE, {}, lambda _: None)
    saver.close()
    assert [p.name for p in find_checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-14"]


def test_an_unfinished_checkpoint_is_invisible_and_removed(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "checkpoint-6.tmp" / "state").mkdir(parents=True)
    assert [p.name for p in find_checkpoints(tmp_path)] == ["checkpoint-3"]
    Checkpointer(tmp_path).close()
    assert not (tmp_path / "checkpoint-6.tmp").exists()


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_used(tmp_path):
    save(tmp_path, 1, 2)
    damage(tmp_path / "checkpoint-2")
    path, state, _ = restore_newest(tmp_path, like(STATE))
    assert path.name == "checkpoint-1"
    assert_same(state, STATE)
    assert (tmp_path / "checkpoint-2.damaged").is_dir()


def test_a_flipped_bit_that_still_decodes_is_caught_by_the_digest(tmp_path):
    save(tmp_path, 1)
    note = tmp_path / "checkpoint-1" / "resume.json"
    meta = resume_json.decode(note.read_bytes())
    flipped = np.arange(12, dtype=np.float32).reshape(3, 4)
    flipped.view(np.uint32)[1, 2] ^= 1 << 7
    meta["digests"]["a"] = digests({"a": jnp.asarray(flipped)})["a"]
    note.write_bytes(resume_json.encode(meta))
    with pytest.raises(CheckpointError, match="stored data of a is not what was saved"):
        restore(tmp_path / "checkpoint-1", like(STATE))


def test_when_every_checkpoint_is_damaged_the_run_does_not_start_from_scratch(tmp_path):
    save(tmp_path, 1)
    damage(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match="overwrite_output_dir=true"):
        restore_newest(tmp_path, like(STATE))


def test_another_configuration_is_refused_leaf_by_leaf(tmp_path):
    save(tmp_path, 1)
    other = {"a": jnp.zeros((3, 5)), "b": (None, jnp.int32(0)), "d": jnp.zeros(2)}
    with pytest.raises(CheckpointError) as error:
        restore_newest(tmp_path, like(other))
    differences = (
        "a is float32[3, 4] in it, float32[3, 5] in this run",
        "d is not in it",
        "c is in it, but not in this run",
    )
    for said in differences:
        assert said in str(error.value)
    assert (tmp_path / "checkpoint-1").is_dir()  # it is not damaged, so it stays


def test_restored_on_another_mesh_the_digests_are_the_same(tmp_path):
    save(tmp_path, 1, state={"x": jnp.arange(64.0).reshape(8, 8)})
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    x = restore(tmp_path / "checkpoint-1", {"x": sharded})["x"]  # raises if the digest differs
    assert x.sharding.spec == P(None, "fsdp")


def test_a_digest_changes_with_a_bit_and_with_the_place_of_an_element():
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    swapped, flipped = x.copy(), x.copy()
    swapped[0, 0], swapped[1, 1] = x[1, 1], x[0, 0]
    flipped.view(np.uint32)[2, 3] ^= 1
    values = [digests({"x": jnp.asarray(v)})["x"] for v in (x, swapped, flipped)]
    assert len(set(values)) == 3
