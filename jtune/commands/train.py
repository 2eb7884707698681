"""One run, read from top to bottom: what `jtune train CASE.yaml` does.

Everything that can be wrong with the input is looked at before the weights are read, and the weights are read before
anything is compiled; each slow phase says that it begins.
"""

import json
import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jtune import tuning
from jtune.config import Config
from jtune.data import Plan, StreamPlan, order_seed, plan_updates, rows_are_packed
from jtune.distributed import command, exchange, processes, shutdown
from jtune.errors import Preempted
from jtune.evaluation import predict, text_metrics
from jtune.evaluation.loss import make_evaluation
from jtune.generation.settings import describe_sampling, read_generation_config, sampling_of
from jtune.interop import hf
from jtune.interop.endings import resolve_endings as settle_endings
from jtune.loading import vocabulary
from jtune.loading.data import data_template, load_data
from jtune.loading.model import abstract_like, compute_dtype, decoder_of, fetch_model, load_model, with_remat
from jtune.losses.objective import PLAIN, WithReference, describe_objective, objective_of, step_constants, step_key
from jtune.planning.chips import usable_memory
from jtune.planning.flops import flops_per_token
from jtune.planning.remat import fitting_remat
from jtune.planning.shapes import Shapes
from jtune.sharding import arrays, batch_shards, check_row_length, describe_unsplit, unsplit
from jtune.sharding.compiler import use_compile_cache
from jtune.sharding.mesh import mesh_of
from jtune.train import preflight, report
from jtune.train.batch import place_batch
from jtune.train.cadence import best_metric, make_cadence
from jtune.train.checkpoint import (
    Checkpointer,
    check_folder,
    check_stream,
    restore,
    restore_checked,
    restore_newest,
    writing_model,
)
from jtune.train.digest import data_fingerprint, frozen_fingerprint, tree_fingerprint
from jtune.train.files import full_disk_explained
from jtune.train.identity import Run, adapters_of, arguments_of, model_of
from jtune.train.loop import Hooks, Progress, run_loop
from jtune.train.optimizer import optimizer_of
from jtune.train.output import check_writable, save_model, trainer_state
from jtune.train.program import compile_steps, rounding_key_of
from jtune.train.schedule import check_schedule, make_schedule, warmup_updates
from jtune.train.start import begin, check_same_run, check_start, mark_finished, saved_run, start_point, take_up
from jtune.train.state import TrainState, abstract_state, init_state, shardings_of
from jtune.train.timing import Timing, describe_timing, goodput, lost
from jtune.tuning.show import show
from jtune.tuning.unstack import restacked_shapes, unstack_layers

log = logging.getLogger("jtune")


def train(config: Config) -> dict[str, Any]:
    """Train and evaluate as `config` says; write everything into `output_dir`.

    Returns:
      The content of `all_results.json`.

    Raises:
      JtuneError: see `jtune.errors` for the kinds and the exit codes they stand for.
    """
    training, finetuning, generating = config.training, config.finetuning, config.generating
    ledger = Timing()
    for note in config.notes:
        log.info("note: %s", note)
    check_schedule(training)
    if training.predict_with_generate:
        text_metrics.check_installed()
    output_dir, arguments = Path(training.output_dir), arguments_of(config)
    check_folder(output_dir)
    exchange.from_first("start", partial(check_start, output_dir, training, arguments))
    preflight.check_processes(config, output_dir)

    # ------------------------------------------------------------------ devices
    use_compile_cache(training.compile_cache_dir)
    mesh = mesh_of(training)
    shards = batch_shards(mesh)
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "not split"
    held = f" in {processes.count()} processes" if processes.count() > 1 else ""
    log.info("devices: %d x %s%s (%s)", mesh.size, jax.devices()[0].device_kind, held, axes)

    # ------------------------------------------------------------------ data
    folder = exchange.process_group(hub_cache(config)).first("fetching the model", partial(fetch_model, config.model))
    source = hf.read_config(folder)
    decoder = decoder_of(source, config.model)
    settled = vocabulary.resolve_vocabulary(config, folder, decoder)
    config, decoder, tokenizer = settled.config, settled.decoder, settled.tokenizer
    finetuning, source = config.finetuning, settled.source(source)
    template = data_template(config, tokenizer)
    splits = load_data(config, tokenizer, decoder.vocab_size, exchange.process_group, template)
    preflight.check_data(splits)
    endings = settle_endings(config, template, tokenizer, source, folder) if training.do_train else None

    # ------------------------------------------------------------------ model
    adapters = {f"adapter {path}": Path(path) for path in config.model.adapter_name_or_path if Path(path).is_dir()}
    preflight.check_model_files({"model": folder, **adapters})
    dtype = compute_dtype(training, finetuning.pure_bf16, hf.stored_dtype(source))
    model = load_model(
        folder,
        config.model,
        finetuning,
        decoder,
        source,
        mesh,
        dtype=dtype,
        seed=training.seed,
        change=settled.change,
    )
    preflight.check_weights(model.params)
    if whole := unsplit(tuning.prepared_axes(model.params, decoder), model.params, mesh):
        log.info("%s", describe_unsplit(whole))
    if training.do_train:
        log.info("%s", tuning.describe_trainable(model.params, model.mask))
        check_writable(model.params, model.mask, config, decoder, settled.resized)
    if config.model.print_param_status and processes.is_first():
        show(model.params, model.mask)
    objective = objective_of(finetuning, training)
    measure_loss = make_evaluation(
        model.module,
        splits.eval,
        mesh,
        stage=finetuning.stage,
        per_device_batch_size=training.per_device_eval_batch_size,
        packing=rows_are_packed(config),
        data=config.data,
        accuracy=finetuning.compute_accuracy,
        token_loss=objective.eval_loss,
    )
    ask = samples = None
    if training.predict_with_generate:
        own = read_generation_config(folder)
        sampling = sampling_of(generating, own, (*predict.stop_ids(tokenizer), template.end_id))
        log.info("answers: %s", describe_sampling(sampling))
        ask = predict.make_prediction(
            model.module,
            splits.eval,
            tokenizer,
            sampling,
            generating,
            seed=training.seed,
            batch_size=training.per_device_eval_batch_size * shards,
        )
    looked_at = next(iter(splits.eval.values()), splits.train)
    if training.eval_samples and looked_at is not None:
        samples = predict.make_samples(model.module, looked_at, training.eval_samples, tokenizer, generating)

    def measure(params: Any) -> dict[str, float]:
        found = measure_loss(params)
        return predict.joined(found, ask(params, "eval")[1]) if ask else found

    def finish(params: Any) -> dict[str, Any]:
        """What is asked for of the finished model."""
        if training.do_eval and splits.eval:
            report.finish_evaluation(measure(params), output_dir)
        if ask and training.do_predict:
            answers, metrics = ask(params, "predict")
            text = predict.lines(tokenizer, answers, skip_special_tokens=generating.skip_special_tokens)
            report.finish_prediction(text, metrics, output_dir)
        return report.read_results(output_dir)

    if not training.do_train:
        for line in samples(model.params) if samples else ():
            log.info("%s", report.describe_sample(line))
        return finish(model.params)

    # ------------------------------------------------------------------ plan of all updates
    assert splits.train is not None
    assert endings is not None
    plan = plan_updates(config, splits.train, shards, splits.stream)
    warmup = warmup_updates(plan.max_steps, training.warmup_steps, training.warmup_ratio)
    schedule = make_schedule(
        training.lr_scheduler_type, training.learning_rate, warmup, plan.max_steps, training.lr_scheduler_kwargs
    )
    report.describe_plan(plan)
    for shape in plan.shapes:
        check_row_length(mesh, shape.seq)

    # ------------------------------------------------------------------ state and step
    trainable, frozen = tuning.partition(model.params, model.mask)
    held = step_constants(objective, trainable, frozen, dtype)
    if objective != PLAIN:
        log.info("%s", describe_objective(objective))
    parameters = tuning.count(model.params)
    tx = optimizer_of(training, finetuning, trainable, decoder)
    float16 = dtype == jnp.float16
    state_like = abstract_state(trainable, tx, mesh, float16=float16)
    policy = remat(config, Shapes(model.module, tx, model.params, model.mask, held, state_like, mesh), plan)
    module = with_remat(model.module, policy, mesh.devices.flat[0].platform)
    rates = report.make_rates(
        flops_per_token(
            decoder,
            model.params,
            model.mask,
            lengths=splits.train.lengths,
            label_share=splits.train.labelled.sum() / splits.train.lengths.sum(),
            reference=objective.anchored,
        ),
        mesh,
    )

    # ------------------------------------------------------------------ start or resume
    identity = {
        "data": data_fingerprint(splits.train),
        "examples per update": [training.per_device_train_batch_size * shards, training.gradient_accumulation_steps],
        "order": [order_seed(config), not finetuning.disable_shuffling, *stream_order(config)],
        "rows": [rows_are_packed(config), config.data.cutoff_len],
        "updates": plan.max_steps,
        "frozen weights": frozen_fingerprint(held),
    }
    if settled.change is not None:
        identity["vocabulary"] = [decoder.vocab_size, list(settled.change.new)]
    if finetuning.finetuning_type == "full" and settled.change is None and not config.model.train_from_scratch:
        identity["base weights"] = tree_fingerprint(trainable)
    identity |= {"adapters": adapters_of(model.params), "model": model_of(decoder)}
    this = Run(json.loads(json.dumps(identity)), arguments)
    progress = Progress()
    state: TrainState
    checkpoint = start_point(output_dir, training, this)
    if checkpoint is None:
        shardings = shardings_of(state_like)
        start = jax.jit(lambda t: init_state(t, tx, float16=float16), out_shardings=shardings, donate_argnums=0)
        state = start(trainable)
    else:

        def check(path: Path, meta: Mapping[str, Any]) -> None:
            check_same_run(path, saved_run(meta), this)
            check_stream(path, meta, splits.stream)

        if str(checkpoint) == training.resume_from_checkpoint:
            restored = restore_checked(checkpoint, state_like, check)
        else:
            restored = restore_newest(output_dir, state_like, check)
            assert restored is not None, "checkpoints were found"
        checkpoint, state, meta = restored
        progress = Progress.from_dict(meta["progress"])
        if isinstance(plan, StreamPlan):
            plan.seek(meta["stream"])
        earlier = meta.get("seconds", {})
        ledger.add(earlier | {"lost": earlier.get("lost", 0.0) + lost(output_dir / "trainer_log.jsonl", earlier)})
        log.info("resumed from %s: %d of %d updates are done", checkpoint, progress.step, plan.max_steps)
        take_up(progress, output_dir, training, saved_run(meta), this, max_steps=plan.max_steps)
    begin(output_dir, training, this)
    mask, dropout_key = model.mask, step_key(objective, model.params, training.seed)
    del trainable, frozen, model  # nothing else may keep the first parameters alive
    held = unstack_layers(held, module)
    frozen = held.frozen if isinstance(held, WithReference) else held
    update = compile_steps(
        module,
        tx,
        plan,
        held,
        state_like,
        mesh,
        max_grad_norm=training.max_grad_norm,
        dropout_key=dropout_key,
        rounding_key=rounding_key_of(training, finetuning),
        ledger=ledger,
        objective=objective,
    )

    # ------------------------------------------------------------------ train
    cadence = make_cadence(training, plan)
    improvement = best_metric(training, finetuning)
    saver = Checkpointer(output_dir, keep=training.save_total_limit)
    write = partial(
        save_model,
        mask=mask,
        config=config,
        decoder=decoder,
        endings=endings,
        tokenizer=tokenizer,
        resized=settled.resized,
    )
    whole = lambda state: tuning.combine(state.trainable, frozen)
    written = lambda state: tuning.combine(state.trainable, restacked_shapes(frozen))
    state_file = lambda: trainer_state(
        progress, plan=plan, cadence=cadence, batch_size=training.per_device_train_batch_size
    )

    def save(state: TrainState, progress: Progress, *, only_model: bool) -> None:
        def files(folder: Path) -> None:
            write(folder, written(state))
            report.write_json(folder / "trainer_state.json", state_file())

        if progress.best_step is not None:
            saver.best = output_dir / f"checkpoint-{progress.best_step}"
        meta = {**this._asdict(), "progress": progress.to_dict(), "seconds": ledger.total()}
        if isinstance(plan, StreamPlan):
            meta["stream"] = plan.position(progress.step)
        saver.save(progress.step, None if only_model else state, meta, files)

    hooks = Hooks(
        prepare=partial(place_batch, plan=plan, mesh=mesh),
        update=update,
        tokens=plan.tokens,
        epoch_at=plan.epoch_at,
        evaluate=(lambda state: measure(whole(state))) if splits.eval else None,
        samples=(lambda state: samples(whole(state))) if samples else None,
        save=partial(save, only_model=training.save_only_model),
        save_to_stop=partial(save, only_model=False),
        poll=saver.poll,
        rates=rates,
        explain=plan.explain,
        agree=arrays.agreement(mesh),
    )
    began, start = time.monotonic(), (progress.step, progress.tokens)
    subscribers = report.subscribers(training, output_dir, progress.step, plan.max_steps)
    ledger.rest("startup")
    try:
        with full_disk_explained():  # in here, as what other processes are told of is the explanation
            state, outcome = run_loop(state, progress, cadence, schedule, hooks, subscribers, improvement, ledger)
            saver.close()
    except BaseException as error:
        shutdown.last_work(error, saver.wait)  # a checkpoint may be nearly written
        raise
    if outcome == "preempted":
        raise Preempted(
            f"stopped by a signal at update {progress.step} and saved: the same command goes on from there\n"
            f"  {command.command_to_go_on()}"
        )

    # ------------------------------------------------------------------ finish
    if training.load_best_model_at_end and progress.best_step not in (None, progress.step):
        best = output_dir / f"checkpoint-{progress.best_step}"
        log.info("the best model is %s: %s %.4f", best, improvement.metric, progress.best_metric)
        state = restore(best, state_like)
    with ledger.spent("checkpoint"), writing_model(output_dir):
        write(output_dir, written(state))
    seconds = ledger.total()
    log.info("time: %s", describe_timing(seconds))
    summary = report.train_summary(
        progress,
        began=start,
        seconds=time.monotonic() - began,
        examples_per_update=plan.examples_per_update,
        epoch=plan.epoch_at(progress.step),
        parameters=parameters,
    )
    summary |= {"train_goodput": round(goodput(seconds), 4)}
    if finetuning.include_effective_tokens_per_second:
        summary["effective_tokens_per_sec"] = summary["train_tokens_per_second"]
    progress.log_history.append(summary | {"step": progress.step})
    with writing_model(output_dir):
        report.save_results(output_dir, "train", summary)
        report.write_json(output_dir / "trainer_state.json", state_file())
        title = f"Training loss of {training.run_name or output_dir}"
        report.plot_losses(progress.log_history, output_dir / "training_loss.png", title)
    results = finish(whole(state))
    mark_finished(output_dir, training, this)
    log.info("wrote %s", output_dir)
    return results


def hub_cache(config: Config) -> Path:
    """Where downloaded models are kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(config.model.cache_dir or HF_HUB_CACHE)


def stream_order(config: Config) -> list[Any]:
    """What else the order of rows depends on when they are streamed: all that says which row comes when."""
    data = config.data
    if not data.streaming:
        return []
    mix = [data.mix_strategy, *data.interleave_probs]
    return ["streaming", list(data.dataset), data.buffer_size, mix, data.max_samples, data.val_size]


def remat(config: Config, shapes: Shapes, plan: Plan) -> str:
    """What the backward pass computes again, the same in all processes."""
    assert isinstance(shapes.mesh, Mesh)
    device = shapes.mesh.local_devices[0]
    usable = min(map(int, exchange.all_gather("memory", str(usable_memory(device)))))
    shapes = shapes._replace(params=abstract_like(shapes.params), frozen=abstract_like(shapes.frozen))
    capacities = {(s.accum, s.batch, s.seq): plan.label_capacity(s) for s in plan.shapes}
    return fitting_remat(config, shapes, capacities, device.device_kind, usable)
