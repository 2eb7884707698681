"""`jtune train CASE.yaml`: one run, read from top to bottom.

Everything that can be wrong with the input is looked at before the weights are read, and the weights are read before
anything is compiled; each slow phase says that it begins.
"""

import json
import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jtune import tuning
from jtune.config import Config
from jtune.config.stages import rules_of
from jtune.data import Plan, Splits, Template, plan_updates, segments_of
from jtune.distributed import exchange, processes, shutdown
from jtune.distributed.command import command_to_go_on
from jtune.errors import Preempted
from jtune.evaluation.measures import Measures, finish, log_samples, make_measures
from jtune.evaluation.references import TRAIN, of_model, of_second, of_step, with_reference
from jtune.evaluation.text_metrics import check_installed
from jtune.interop import peft, serving
from jtune.interop.endings import Endings, resolve_endings
from jtune.loading.data import data_template, load_data
from jtune.loading.model import Model, abstract_like, load_model, with_remat
from jtune.loading.second import fetch_second, load_second, with_second
from jtune.loading.source import Source, fetch_model, read_source
from jtune.loading.value_head import scores
from jtune.losses.objective import PLAIN, Objective, describe_objective
from jtune.losses.reference import frozen_of
from jtune.losses.units import UnitObjective
from jtune.planning.chips import usable_memory
from jtune.planning.flops import make_rates, program_flops
from jtune.planning.remat import fitting_remat
from jtune.sharding import arrays, batch_shards, check_row_length, describe_unsplit, unsplit
from jtune.sharding.compiler import use_compile_cache
from jtune.sharding.mesh import mesh_of
from jtune.stages import stage_of
from jtune.train import callbacks, preflight, results
from jtune.train.batch import place_batch
from jtune.train.cadence import best_metric, make_cadence
from jtune.train.callbacks import trackers
from jtune.train.checkpoint import Checkpointer, writing_model
from jtune.train.checkpoint_folder import check_folder
from jtune.train.files import full_disk_explained
from jtune.train.identity import Run, arguments_of, identity_of
from jtune.train.loop import Hooks, Progress, run_loop
from jtune.train.output import ModelFiles, Output, check_writable
from jtune.train.plot import plot_losses, plot_measures
from jtune.train.program import Program, compile_steps, make_program, unstacked
from jtune.train.restore import restore
from jtune.train.resume import start_or_resume
from jtune.train.schedule import check_schedule, make_schedule, warmup_updates
from jtune.train.start import check_start, mark_finished
from jtune.train.state import TrainState
from jtune.train.timing import Timing, describe_timing, goodput
from jtune.tuning.show import show

log = logging.getLogger("jtune")


def train(config: Config) -> dict[str, Any]:
    """Train, evaluate and predict as `config` says; write everything into `output_dir`.

    Returns:
      The content of `all_results.json`.

    Raises:
      JtuneError: see `jtune.errors` for the kinds and the exit codes they stand for.
    """
    timing, arguments, training = Timing(), arguments_of(config), config.training
    output_dir = Path(training.output_dir)
    check_before_compute(config, arguments)

    # ------------------------------------------------------------------ devices, data, model
    mesh = find_devices(config)
    source = prepare_source(config)
    config = source.config
    rows = prepare_rows(config, source)
    preflight.check_model_files(model_folders(source))
    objective = stage_of(config.finetuning.stage).objective(config.finetuning, training)
    references = of_second(config, source, rows.splits, mesh, objective)
    model = prepare_model(config, source, rows, mesh, reads_second=references is None)
    references = references or of_model(config, model, rows.splits, mesh, objective)
    end_ids = (rows.template.end_id,) if training.predict_with_generate else ()
    measures = make_measures(
        config, source, rows.splits, model.module, objective, end_ids=end_ids, references=references.sums
    )
    if not training.do_train:
        log_samples(measures, model.params)
        return finish(config, source, rows.splits, measures, model.params)

    # ------------------------------------------------------------------ updates and step
    assert rows.splits.train is not None
    assert rows.endings is not None
    files = ModelFiles(config, source, model.mask, rows.endings)
    plan = with_reference(prepare_plan(config, rows.splits, mesh), references.sums.get(TRAIN))
    program = prepare_program(config, model, mesh, of_step(config, objective), plan)
    trainable = tuning.partition(model.params, model.mask)[0]
    rates = make_rates(model_flops(config, program, rows.splits), mesh)
    parameters = tuning.count(model.params)

    # ------------------------------------------------------------------ start or resume
    identity = identity_of(config, source, program, trainable, rows.splits, plan, references.digest)
    run = Run(json.loads(json.dumps(identity)), arguments)
    state, progress = start_or_resume(training, run, program, trainable, plan, rows.splits.stream, timing)
    del trainable, model  # nothing else may keep the first parameters alive
    program = unstacked(program)
    update = compile_steps(program, plan, timing)

    # ------------------------------------------------------------------ train
    cadence, improvement = make_cadence(training, plan), best_metric(training, config.finetuning)
    checkpointer = Checkpointer(output_dir, keep=training.save_total_limit)
    output = Output(output_dir, files, run, plan, cadence, timing, frozen_of(program.constants), checkpointer)
    hooks = make_hooks(program, plan, update, measures, output, rates, evaluates=bool(rows.splits.eval))
    start = Start(time.monotonic(), progress.step, progress.tokens)
    subscribers = callbacks.subscribers(training, output_dir, progress.step, plan.max_steps)
    timing.rest("startup")
    with trackers.reporting(config, output_dir, progress.step) as reports:
        try:
            with full_disk_explained():  # in here, as other processes are told the explanation
                schedule = schedule_of(config, plan)
                state, outcome = run_loop(
                    state, progress, cadence, schedule, hooks, [*subscribers, *reports], improvement, timing
                )
                checkpointer.close()
        except BaseException as error:
            shutdown.last_work(error, checkpointer.wait)  # a checkpoint may be nearly written
            raise
        if outcome == "preempted":
            raise Preempted(
                f"stopped by a signal at update {progress.step} and saved: the same command goes on from there\n"
                f"  {command_to_go_on()}"
            )

        # ------------------------------------------------------------------ finish
        state = best_state(config, program, state, progress)
        write_results(output, state, progress, start, parameters)
        written = finish(config, source, rows.splits, measures, whole(program, state), state.running)
        mark_finished(output_dir, training, run)
    log.info("wrote %s", output_dir)
    say_how_to_serve(config, output_dir)
    return written


def say_how_to_serve(config: Config, output_dir: Path) -> None:
    """What to type to serve an adapter, or why it must be merged first. A model that is whole needs no words."""
    if scores(config):
        log.info("to score with transformers, write a classifier: jtune export %s export_dir=FOLDER", output_dir)
    elif config.finetuning.finetuning_type == "lora" and processes.is_first():
        given = config.model.adapter_name_or_path
        before = given if config.finetuning.create_new_adapter else given[:-1]
        options = json.loads((output_dir / peft.CONFIG).read_bytes())
        log.info("%s", "\n".join(serving.adapter_lines(output_dir, options, before)))


# ---------------------------------------------------------------------- before anything is read


def check_before_compute(config: Config, arguments: Mapping[str, Any]) -> None:
    """Look at everything that can be wrong without a file of the model or the data."""
    training, output_dir = config.training, Path(config.training.output_dir)
    for note in config.notes:
        log.info("note: %s", note)
    check_schedule(training)
    if training.do_train:
        trackers.note_missing(config)
    if training.predict_with_generate:
        check_installed()
    check_folder(output_dir)
    exchange.from_first("start", partial(check_start, output_dir, training, arguments))
    preflight.check_processes(config, output_dir)


def find_devices(config: Config) -> Mesh:
    use_compile_cache(config.training.compile_cache_dir)
    mesh = mesh_of(config.training)
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "not split"
    spread = f" in {processes.count()} processes" if processes.count() > 1 else ""
    log.info("devices: %d x %s%s (%s)", mesh.size, jax.devices()[0].device_kind, spread, axes)
    return mesh


# ---------------------------------------------------------------------- data and model


class Rows(NamedTuple):
    """The data of a run, and how answers end in it."""

    template: Template
    splits: Splits
    endings: Endings | None  # of the model that is written; None: none is


def prepare_source(config: Config) -> Source:
    """The model before its weights are read. Of processes that share the hub's cache, the first downloads."""
    group = exchange.process_group(hub_cache(config))
    folder = group.first("fetching the model", partial(fetch_model, config.model))
    if not config.training.do_train and not rules_of(config.finetuning.stage).has_reference:
        return read_source(config, folder)
    group.first("fetching the second model", partial(fetch_second, config))
    return with_second(read_source(config, folder))


def hub_cache(config: Config) -> Path:
    """Where downloaded models are kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(config.model.cache_dir or HF_HUB_CACHE)


def prepare_rows(config: Config, source: Source) -> Rows:
    """The encoded sets, the same in all processes."""
    template = data_template(config, source.tokenizer)
    splits = load_data(config, source.tokenizer, source.vocab_size, exchange.process_group, template)
    preflight.check_data(splits)
    endings = None
    if config.training.do_train:
        endings = resolve_endings(config, template, source.tokenizer, source.config_json, source.folder)
    return Rows(template, splits, endings)


def prepare_model(config: Config, source: Source, rows: Rows, mesh: Mesh, *, reads_second: bool) -> Model:
    """The parameters on the mesh, the same in all processes; what trains is shown, and can be written.

    Args:
      reads_second: and those of the second model, if there is one.
    """
    model = load_model(config, source, mesh)
    preflight.check_weights(model.params)
    if source.second is not None and reads_second:
        second = load_second(source.second, mesh)
        preflight.check_weights(second.params)
        model = model._replace(second=second)
    replicated = unsplit(tuning.prepared_axes(model.params, source.decoder), model.params, mesh)
    if replicated:
        log.info("%s", describe_unsplit(replicated))
    if config.training.do_train:
        log.info("%s", tuning.describe_trainable(model.params, model.mask))
        assert rows.endings is not None
        check_writable(model.params, ModelFiles(config, source, model.mask, rows.endings))
    if config.model.print_param_status and processes.is_first():
        show(model.params, model.mask)
    return model


def model_folders(source: Source) -> dict[str, Path]:
    """The folders that a run reads weights from, by their roles."""
    folders = {"model": source.folder}
    folders |= {f"adapter {path}": Path(path) for path in source.config.model.adapter_name_or_path}
    if source.second is not None:
        folders |= {f"second {role}": folder for role, folder in model_folders(source.second).items()}
    return {role: folder for role, folder in folders.items() if folder.is_dir()}


# ---------------------------------------------------------------------- updates and step


def prepare_plan(config: Config, splits: Splits, mesh: Mesh) -> Plan:
    """The batches of all updates."""
    assert splits.train is not None
    plan = plan_updates(config, splits.train, batch_shards(mesh), splits.stream)
    results.describe_plan(plan)
    for shape in plan.shapes:
        check_row_length(mesh, shape.seq)
    return plan


def schedule_of(config: Config, plan: Plan):
    """The learning rate of each update."""
    training = config.training
    warmup = warmup_updates(plan.max_steps, training.warmup_steps, training.warmup_ratio)
    return make_schedule(
        training.lr_scheduler_type, training.learning_rate, warmup, plan.max_steps, training.lr_scheduler_kwargs
    )


def prepare_program(
    config: Config, model: Model, mesh: Mesh, objective: Objective | UnitObjective, plan: Plan
) -> Program:
    """The train step, with the remat policy that memory allows: the same in all processes."""
    program = make_program(config, model, mesh, objective)
    if objective != PLAIN:
        log.info("%s", describe_objective(objective))
    device = mesh.local_devices[0]
    usable = min(map(int, exchange.all_gather("memory", str(usable_memory(device)))))
    sizes = {(s.accum, s.batch, s.seq): plan.sizes(s) for s in plan.shapes}
    abstract = program._replace(constants=abstract_like(program.constants))
    policy = fitting_remat(config, abstract, sizes, device.device_kind, usable)
    return program._replace(module=with_remat(model.module, policy, mesh.devices.flat[0].platform))


def model_flops(config: Config, program: Program, splits: Splits) -> float:
    """FLOPs of a token in training."""
    assert splits.train is not None
    rows = segments_of(splits.train, rules_of(config.finetuning.stage))
    return program_flops(program, lengths=rows.lengths, label_share=rows.labelled.sum() / rows.lengths.sum())


# ---------------------------------------------------------------------- train and finish


class Start(NamedTuple):
    """Where this start of a run begins, for its rates."""

    time: float  # monotonic seconds
    step: int
    tokens: int


def whole(program: Program, state: TrainState) -> Any:
    """All parameters, as the module takes them."""
    return tuning.combine(state.trainable, frozen_of(program.constants))


def make_hooks(
    program: Program, plan: Plan, update, measures: Measures, output: Output, rates, *, evaluates: bool
) -> Hooks:
    """What the loop calls."""
    samples, training = measures.samples, output.files.config.training
    assert isinstance(program.mesh, Mesh)
    return Hooks(
        prepare=partial(place_batch, plan=plan, mesh=program.mesh),
        update=update,
        tokens=plan.tokens,
        epoch_at=plan.epoch_at,
        evaluate=(lambda state: measures.metrics(whole(program, state), state.running)) if evaluates else None,
        samples=(lambda state: samples(whole(program, state))) if samples else None,
        save=partial(output.save_checkpoint, only_model=training.save_only_model),
        save_to_stop=partial(output.save_checkpoint, only_model=False),
        poll=output.checkpointer.poll,
        rates=rates,
        explain=plan.explain,
        agree=arrays.agreement(program.mesh),
    )


def best_state(config: Config, program: Program, state: TrainState, progress: Progress) -> TrainState:
    """The state of the best evaluation where `load_best_model_at_end` asks for it, else the last."""
    training = config.training
    if not training.load_best_model_at_end or progress.best_step in (None, progress.step):
        return state
    best = Path(training.output_dir) / f"checkpoint-{progress.best_step}"
    metric = best_metric(training, config.finetuning).metric
    log.info("the best model is %s: %s %.4f", best, metric, progress.best_metric)
    return restore(best, program.state)


def write_results(output: Output, state: TrainState, progress: Progress, start: Start, parameters: int) -> None:
    """The model, `train_results.json`, `trainer_state.json` and the plots."""
    config, folder, plan = output.files.config, output.folder, output.plan
    with output.timing.spent("checkpoint"), writing_model(folder):
        output.save_model(folder, state)
    seconds = output.timing.total()
    log.info("time: %s", describe_timing(seconds))
    summary = results.train_summary(
        progress,
        began=(start.step, start.tokens),
        seconds=time.monotonic() - start.time,
        examples_per_update=plan.examples_per_update,
        epoch=plan.epoch_at(progress.step),
        parameters=parameters,
    )
    summary |= {"train_goodput": round(goodput(seconds), 4)}
    if config.finetuning.include_effective_tokens_per_second:
        summary["effective_tokens_per_sec"] = summary["train_tokens_per_second"]
    progress.log_history.append(summary | {"step": progress.step})
    with writing_model(folder):
        results.save_results(folder, "train", summary)
        output.save_trainer_state(folder, progress)
        name = config.training.run_name or str(folder)
        unit = "nats per token" if rules_of(config.finetuning.stage).learns_tokens else ""
        plot_losses(progress.log_history, folder / "training_loss.png", f"Training loss of {name}", unit)
        plot_measures(progress.log_history, folder, name)
