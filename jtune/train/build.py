"""The parts a run is put together from; each can be called alone in a REPL."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xxhash
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jtune import tuning
from jtune.config import DataArguments, FinetuningArguments, ModelArguments, TrainingArguments
from jtune.data import Encoded, EvalBatch, EvalPlan, Plan, eval_batches, packing_windows
from jtune.errors import ConfigError
from jtune.interop import hf, peft, vocabulary
from jtune.models import CausalLM, DecoderConfig, attention, init_params
from jtune.models.decoder import is_apart
from jtune.models.families import decoder_config
from jtune.sharding import (
    batch_sharding,
    batch_shards,
    check_experts,
    check_row_length,
    make_mesh,
    replicated,
    spread,
    tree_shardings,
)
from jtune.sharding.mesh import AXES
from jtune.train.digest import digests, named_leaves
from jtune.train.evaluate import ExampleSums, evaluate, make_eval_step
from jtune.train.ledger import Ledger
from jtune.train.loop import Cadence, Improvement
from jtune.train.objective import PLAIN, Anchored, Objective, start_of, start_shardings
from jtune.train.schedule import make_schedule
from jtune.train.state import TrainState, init_state, state_shardings
from jtune.train.step import Metrics, make_loss_sum, make_train_step
from jtune.train.token_loss import TokenLoss, token_nll
from jtune.tuning import quantize
from jtune.tuning.vocabulary import Change

log = logging.getLogger("jtune")


class Model(NamedTuple):
    """A model that is ready to train: what it is, where it came from, and its parameters on the mesh."""

    module: CausalLM
    decoder: DecoderConfig
    source: dict[str, Any]  # the Hugging Face config.json
    params: Any
    mask: Any  # tree of bool: what trains


def use_compile_cache(folder: str | None) -> None:
    """Keep compiled programs on disk, so that the second run of a shape compiles nothing.

    Compiled programs are code: the folder is the user's own and readable by nobody else. Several devices on CPUs go
    without where XLA, before jax 0.12, forgets in a program read back from disk that its collectives have an order: the
    devices would wait for each other for ever.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1 and jax.__version_info__ < (0, 12):
        jax.config.update("jax_enable_compilation_cache", False)
        return
    path = Path(folder) if folder else Path.home() / ".cache" / "jtune" / "compiled"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def compute_dtype(
    training: TrainingArguments, pure_bf16: bool, stored: jnp.dtype, platform: str | None = None
) -> jnp.dtype:
    """What matrix products are computed in: `bf16` or `fp16` if asked for, else what the weights are stored in.

    On CPU without `bf16`/`fp16` it is float32, as there is nothing to gain. TPUs have no float16 units.
    """
    platform = platform or jax.default_backend()
    if training.fp16 and platform == "tpu":
        log.info("fp16: TPUs compute in bfloat16 instead, which needs no loss scaling")
        return jnp.dtype(jnp.bfloat16)
    if training.fp16:
        return jnp.dtype(jnp.float16)
    if training.bf16 or pure_bf16 or (platform != "cpu" and stored == jnp.bfloat16):
        return jnp.dtype(jnp.bfloat16)
    return jnp.dtype(jnp.float32)


def load_model(
    folder: Path,
    args: ModelArguments,
    finetuning: FinetuningArguments,
    decoder: DecoderConfig,
    source: dict[str, Any],
    mesh: Mesh,
    *,
    dtype: jnp.dtype,
    seed: int,
    change: Change | None = None,
) -> Model:
    """Weights read straight to their place, adapters and freezing applied, trainable leaves in float32.

    Frozen leaves are kept in the compute dtype if that is smaller than what is stored: no float32 copy of them exists.

    Args:
      decoder, source: with the vocabulary of the run.
      change: what makes it of the one that is stored.
    """
    check_experts(mesh, decoder.num_experts)
    form = form_of(args)
    if args.train_from_scratch:
        log.info("drawing random weights (train_from_scratch)")
        draw = lambda key: quantize.apply(init_params(decoder, key, jnp.float32), form)
        shardings = placement(jax.eval_shape(draw, jax.random.key(seed)), decoder, mesh)
        params = quantize.placed(jax.jit(draw, out_shardings=shardings)(jax.random.key(seed)), decoder, mesh)
    else:
        params = read_base(folder, args, decoder, change, mesh, seed=seed)
    read_adapter = partial(peft.load_adapter, subfolder=args.adapter_folder, base=args.model_name_or_path, **args.hub)
    params, mask = tuning.prepare(
        params,
        finetuning,
        decoder,
        adapters=args.adapter_name_or_path,
        load_adapter=read_adapter,
        key=jax.random.key(seed),
        frozen_dtype=dtype,
    )
    params = jax.tree.map(spread.put, params, placement(params, decoder, mesh))
    device = mesh.local_devices[0]
    backend, why = attention.choose(args.flash_attn, device.platform, decoder, dtype, device)
    log.info("attention: %s (%s)", backend, why)
    module = CausalLM(decoder, dtype=dtype, attention=backend, mesh=mesh)
    return Model(module, decoder, source, params, mask)


def form_of(args: ModelArguments) -> quantize.Form | None:
    """How the base is kept: as it is stored, or in the 4 or 8 bits of `quantization_bit`."""
    return quantize.form_of(args.quantization_bit, args.quantization_type, args.double_quantization)


def read_base(
    folder: Path, args: ModelArguments, decoder: DecoderConfig, change: Change | None, mesh: Mesh, *, seed: int
) -> Any:
    """The weights of a model, straight to their places; quantised on the way, if `quantization_bit` says so."""
    form = form_of(args)
    log.info("reading weights of %s%s", args.model_name_or_path, f", kept in {form}" if form else "")
    return quantize.placed(vocabulary.load_params(folder, decoder, change, mesh, seed=seed, form=form), decoder, mesh)


def asked_remat(training: TrainingArguments, model: ModelArguments) -> str:
    """What the backward pass computes again: a policy of `CausalLM.remat`, or "auto".

    `disable_gradient_checkpointing` is LLaMA-Factory's name for "none".
    """
    return "none" if training.remat == "auto" and model.disable_gradient_checkpointing else training.remat


def with_remat(module: CausalLM, remat: str, platform: str) -> CausalLM:
    """The module with a remat policy. Its layers are unrolled on CPUs and GPUs when it keeps everything: what is kept
    is then used where it was written. TPUs compile a loop in a fraction of the time.
    """
    return module.clone(remat=remat, unrolled=platform != "tpu" and remat == "none")


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """What XLA is told of a step, besides its defaults.

    On GPUs, to leave all matrix products to cuBLAS: it adds an adapter's part while it writes the kernel's product, and
    nothing is tried out first. XLA's own, in Triton, are as fast for a moment, on a card that is cool.
    """
    return {"xla_gpu_enable_triton_gemm": False} if mesh.devices.flat[0].platform == "gpu" else None


def decoder_of(source: Mapping[str, Any], args: ModelArguments) -> DecoderConfig:
    """The decoder that a config.json describes, with what the arguments change of it.

    Raises:
      ConfigError: they ask for what this model does not have.
      DataError: see `jtune.models.families.decoder_config`.
    """
    decoder = decoder_config(source)
    if not args.moe_aux_loss_coef:
        return decoder
    if decoder.experts is None:
        raise ConfigError(f"moe_aux_loss_coef: {decoder.family} has no experts to balance: leave it out")
    return replace(decoder, experts=replace(decoder.experts, aux_coef=args.moe_aux_loss_coef))


def mesh_of(training: TrainingArguments, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that the arguments `mesh_*` ask for, over `devices` (default: all that are here)."""
    return make_mesh(devices=devices, **{axis: getattr(training, f"mesh_{axis}") for axis in AXES})


def fetch_model(args: ModelArguments) -> Path:
    """The folder of `model_name_or_path`, downloaded if it is a hub id."""
    if args.model_name_or_path is None:
        raise ConfigError("model_name_or_path is not set: the folder of a Hugging Face model, or a hub id")
    return hf.fetch(args.model_name_or_path, **args.hub)


def placement(params: Any, decoder: DecoderConfig, mesh: Mesh) -> Any:
    """Shardings of a prepared tree, by the logical axes of its leaves.

    Args:
      params: of arrays or `jax.ShapeDtypeStruct`s; stacks of layers and nodes as tuning made them.
    """
    return tree_shardings(tuning.prepared_axes(params, decoder), params, mesh)


def abstract_state(trainable: Any, tx: optax.GradientTransformation, mesh: Mesh, *, float16: bool) -> TrainState:
    """The training state as `ShapeDtypeStruct`s with shardings: optimizer moments lie where their parameters lie."""
    shapes = jax.eval_shape(lambda t: init_state(t, tx, float16=float16), trainable)
    shardings = state_shardings(shapes, jax.tree.map(lambda x: x.sharding, trainable), tx, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def rounding_key_of(training: TrainingArguments, finetuning: FinetuningArguments) -> jax.Array | None:
    """The key of the rounding of parameters that are kept in bfloat16."""
    return jax.random.key(training.seed) if finetuning.pure_bf16 else None


def held(objective: Objective, trainable: Any, frozen: Any, dtype: jnp.dtype) -> Any:
    """What the step takes and does not change: `frozen`, and what the reference of an anchored objective needs besides.

    Args:
      trainable: as it is at the start, of arrays or of `jax.ShapeDtypeStruct`s with shardings, which give the same.
      dtype: of the computation: the copy is no wider.
    """
    if not objective.anchored:
        return frozen
    copied, where = partial(start_of, dtype=dtype), start_shardings(trainable)
    if any(isinstance(x, jax.Array) for x in jax.tree.leaves(trainable)):
        return Anchored(frozen, jax.jit(copied, out_shardings=where)(trainable))
    placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return Anchored(frozen, jax.tree.map(placed, jax.eval_shape(copied, trainable), where))


def apart(frozen: Any, module: CausalLM) -> Any:
    """What the step takes and does not change, as layers that are unrolled take it: their kernels in lists, where
    adapters train (`jtune.models.decoder.is_apart`). Stacks of arrays are deleted, as there is no room for both.

    Args:
      frozen: see `held`; of arrays or of `jax.ShapeDtypeStruct`s with shardings.
    """
    if isinstance(frozen, Anchored):
        return frozen._replace(frozen=apart(frozen.frozen, module))
    kernels = [(path, x) for path, x in tuning.kernels(frozen) if path[0] == "layers"]
    if not module.unrolled or not any(tuning.is_adapter(x) for _, x in kernels):
        return frozen

    def cut(stack: Any) -> list[Any]:
        where = NamedSharding(stack.sharding.mesh, P(*stack.sharding.spec[1:]))
        count = stack.shape[0]
        if not isinstance(stack, jax.Array):
            return [jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=where)] * count
        parts = jax.jit(lambda x: [x[i] for i in range(count)], out_shardings=[where] * count)(stack)
        stack.delete()
        return parts

    def of_layers(where: str, path: tuple[str, ...], x: Any) -> Any:
        if tuning.is_adapter(x):
            return tuning.map_fields(lambda name, x: jax.tree.map(cut, x) if name == "base" else x, x)
        return jax.tree.map(cut, x)

    return tuning.replace(frozen, [path for path, _ in kernels], of_layers)


def stacks_of(frozen: Any) -> Any:
    """What `apart` was given, lists as `jax.ShapeDtypeStruct`s of their stacks."""
    stack = lambda x: jax.ShapeDtypeStruct((len(x), *x[0].shape), x[0].dtype) if is_apart(x) else x
    return jax.tree.map(stack, frozen, is_leaf=is_apart)


def step_key(objective: Objective, params: Any, seed: int) -> jax.Array | None:
    """What a step's random draws follow from; None if it has none."""
    return jax.random.key(seed) if objective.noise_alpha or tuning.has_dropout(params) else None


def shardings_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def like(tree: Any) -> Any:
    """The tree as `ShapeDtypeStruct`s with shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def lower_step(
    module: CausalLM,
    tx: optax.GradientTransformation,
    state_like: TrainState,
    frozen_like: Any,
    batch_like: Mapping[str, Any],
    mesh: Mesh,
    *,
    label_capacity: int,
    max_grad_norm: float,
    dropout_key: jax.Array | None,
    rounding_key: jax.Array | None = None,
    objective: Objective = PLAIN,
) -> Any:
    """The train step, lowered for shapes: what `jtune train` runs and what `jtune plan` measures.

    Args:
      frozen_like: see `apart`.
    """
    everywhere = replicated(mesh)
    loss_sum = make_loss_sum(
        module, label_capacity=label_capacity, batch_shards=batch_shards(mesh), objective=objective
    )
    step = jax.jit(
        make_train_step(
            loss_sum,
            tx,
            max_grad_norm=max_grad_norm,
            dropout_key=dropout_key,
            gradients=shardings_of(state_like.trainable),
            rounding_key=rounding_key,
        ),
        donate_argnums=0,
        in_shardings=(shardings_of(state_like), shardings_of(frozen_like), shardings_of(batch_like), everywhere),
        out_shardings=(shardings_of(state_like), everywhere),
        compiler_options=compiler_options(mesh),
    )
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    return step.lower(state_like, frozen_like, batch_like, rate)


def compile_steps(
    module: CausalLM,
    tx: optax.GradientTransformation,
    plan: Plan,
    frozen: Any,
    state_like: TrainState,
    mesh: Mesh,
    *,
    max_grad_norm: float,
    dropout_key: jax.Array | None,
    rounding_key: jax.Array | None = None,
    ledger: Ledger,
    objective: Objective = PLAIN,
) -> Callable[[TrainState, Any, float], tuple[TrainState, Metrics]]:
    """`update(state, batch, learning_rate)`: the train step, compiled ahead of its first use for each shape of batch.

    The state is donated: its new arrays take the place of the old ones. In- and out-shardings are the same and
    explicit; left free, XLA may choose others, which costs a second compilation and the donation.
    """
    compiled: dict[tuple[int, int, int], Any] = {}
    everywhere = replicated(mesh)
    frozen_like = like(frozen)

    def compile_for(shape: tuple[int, int, int], batch: Mapping[str, jax.Array]):
        log.info("compiling the step for [accum, batch, seq] = %s", list(shape))
        lowered = lower_step(
            module,
            tx,
            state_like,
            frozen_like,
            like(batch),
            mesh,
            label_capacity=plan.label_capacity(shape),
            max_grad_norm=max_grad_norm,
            dropout_key=dropout_key,
            rounding_key=rounding_key,
            objective=objective,
        )
        return lowered.compile()

    def update(state: TrainState, batch: Mapping[str, jax.Array], learning_rate: float):
        accum, rows, seq = batch["input_ids"].shape
        shape = accum, rows, seq
        if shape not in compiled:
            with ledger.spent("compile"):
                compiled[shape] = compile_for(shape, batch)
        return compiled[shape](state, frozen, batch, spread.put(np.float32(learning_rate), everywhere))

    return update


def place_batch(index: int, plan: Plan, mesh: Mesh) -> dict[str, jax.Array]:
    """The batch of a 0-based update, on the devices: rows split, the scalar everywhere.

    Of several processes each reads and lays out the rows of its own devices only.
    """
    rows, everywhere = batch_sharding(mesh, accumulated=True), replicated(mesh)
    shape = plan.shape(index)
    first, stop = spread.own_rows(rows, shape, axis=1)
    arrays = plan.update(index, (first, stop))
    divisor = arrays.pop("divisor")
    if (first, stop) == (0, shape.batch):
        batch = {key: spread.put(x, rows) for key, x in arrays.items()}
    else:
        batch = {key: spread.put_rows(x, first, shape, 1, rows) for key, x in arrays.items()}
    return batch | {"divisor": spread.put(divisor, everywhere)}


def data_fingerprint(encoded: Encoded) -> str:
    """A digest of an encoded data set: the lengths and labelled counts of all rows, and the tokens of some."""
    content = xxhash.xxh3_64(encoded.lengths.tobytes())
    content.update(encoded.labelled.tobytes())
    for row in sorted({0, len(encoded) // 2, len(encoded) - 1}):
        content.update(encoded[row]["input_ids"].tobytes())
    return content.hexdigest()


def tree_fingerprint(tree: Any) -> str:
    """One digest of all arrays of a tree; the same on every mesh."""
    return xxhash.xxh3_64(repr(sorted(digests(named_leaves(tree)).items())).encode()).hexdigest()


def frozen_fingerprint(frozen: Any) -> str:
    """One digest of what does not train, as it was read."""
    return tree_fingerprint(as_read(frozen))


def as_read(params: Any) -> Any:
    """`params` without what PiSSA takes apart, which another mesh rounds otherwise."""
    is_taken_apart = lambda x: isinstance(x, tuning.lora.PiSSA)
    return jax.tree.map(lambda x: None if is_taken_apart(x) else x, params, is_leaf=is_taken_apart)


def check_schedule(training: TrainingArguments) -> None:
    """Raise a ConfigError for options that the schedule does not take, before anything is read."""
    make_schedule(training.lr_scheduler_type, training.learning_rate, 0, 1, training.lr_scheduler_kwargs)


def make_cadence(training: TrainingArguments, plan: Plan) -> Cadence:
    """When to log, evaluate and save; a number of steps below 1 is a share of the run."""

    def steps(value: float) -> int:
        return max(1, -int(-value * plan.max_steps // 1)) if value < 1 else int(value)

    return Cadence(
        max_steps=plan.max_steps,
        updates_per_epoch=plan.updates_per_epoch,
        logging_strategy=training.logging_strategy,
        logging_steps=steps(training.logging_steps),
        logging_first_step=training.logging_first_step,
        eval_strategy=training.eval_strategy,
        eval_steps=steps(training.eval_steps or training.logging_steps),
        eval_delay=training.eval_delay,
        save_strategy=training.save_strategy,
        save_steps=steps(training.save_steps),
        eval_on_start=training.eval_on_start,
        log_tokens=training.include_num_input_tokens_seen != "no",
    )


def best_metric(training: TrainingArguments, finetuning: FinetuningArguments) -> Improvement:
    """Which evaluation figure is watched, and in which direction (default: the loss, smaller is better)."""
    name = training.metric_for_best_model or "loss"
    greater = training.greater_is_better
    return Improvement(
        metric=name if name.startswith("eval_") else f"eval_{name}",
        greater_is_better=not name.endswith("loss") if greater is None else greater,
        patience=finetuning.early_stopping_steps,
    )


def make_evaluation(
    module: CausalLM,
    sets: Mapping[str, Encoded],
    mesh: Mesh,
    *,
    stage: str,
    per_device_batch_size: int,
    packing: bool,
    data: DataArguments,
    accuracy: bool,
    token_loss: TokenLoss = token_nll,
) -> Callable[[Any], dict[str, float]]:
    """`measure(params)`: the metrics of every evaluation set, under `eval_` or `eval_<name>_`."""
    prepared = {
        name: prepare_evaluation(
            module,
            encoded,
            mesh,
            stage=stage,
            per_device_batch_size=per_device_batch_size,
            packing=packing,
            token_loss=token_loss,
            cutoff_len=data.cutoff_len,
            windows=packing_windows(encoded, data, stage),
        )
        for name, encoded in sets.items()
    }

    def measure(params: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, (plan, step) in prepared.items():
            found |= evaluate(partial(step, params), plan, prefix=f"eval_{name}".rstrip("_"), accuracy=accuracy)
        return found

    return measure


def prepare_evaluation(
    module: CausalLM,
    encoded: Encoded,
    mesh: Mesh,
    *,
    per_device_batch_size: int,
    token_loss: TokenLoss = token_nll,
    **how: Any,
) -> tuple[EvalPlan, Callable[[Any, EvalBatch], ExampleSums]]:
    """The batches of an evaluation over `encoded`, and `step(params, batch)`: the sums of the examples in one of them.

    Args:
      how: as of `jtune.data.eval_batches`.
    """
    shards = batch_shards(mesh)
    rows, everywhere = batch_sharding(mesh, accumulated=False), replicated(mesh)
    plan = eval_batches(encoded, per_device_batch_size=per_device_batch_size, batch_shards=shards, **how)
    check_row_length(mesh, plan.shape[1])
    sums = make_eval_step(
        module, label_capacity=plan.label_capacity, batch_shards=shards, slots=plan.slots, token_loss=token_loss
    )
    compiled = jax.jit(sums, out_shardings=everywhere, compiler_options=compiler_options(mesh))

    def step(params: Any, batch: EvalBatch) -> ExampleSums:
        return compiled(params, *jax.tree.map(lambda x: spread.put(x, rows), (batch.arrays, batch.example)))

    return plan, step
