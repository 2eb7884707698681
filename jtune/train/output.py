"""The files of a trained model, and the state of the run beside them."""

from pathlib import Path
from typing import Any, NamedTuple

from jtune import tuning
from jtune.config import Config
from jtune.data import Plan, StreamPlan
from jtune.distributed import processes
from jtune.interop import hf, manifest, peft
from jtune.interop.endings import Endings, write_generation, write_tokenizer
from jtune.interop.value_head import forget_value_head, save_value_head
from jtune.loading.source import Source
from jtune.models.value_head import split_head
from jtune.train import results
from jtune.train.cadence import Cadence
from jtune.train.checkpoint import Checkpointer
from jtune.train.identity import Run
from jtune.train.loop import Progress
from jtune.train.state import TrainState
from jtune.train.timing import Timing
from jtune.tuning.unstack import restacked_shapes


class ModelFiles(NamedTuple):
    """All that the files of a model are written from, but for its parameters."""

    config: Config
    source: Source
    mask: Any  # tree of bool: what trains
    endings: Endings  # what is written of config.json and generation_config.json


def trainer_state(progress: Progress, *, plan: Plan, cadence: Cadence, batch_size: int) -> dict[str, Any]:
    """The content of `trainer_state.json`, with the fields of transformers' `TrainerState`."""
    return {
        "best_global_step": progress.best_step,
        "best_metric": progress.best_metric,
        "best_model_checkpoint": None if progress.best_step is None else f"checkpoint-{progress.best_step}",
        "epoch": plan.epoch_at(progress.step),
        "eval_steps": cadence.eval_steps,
        "global_step": progress.step,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": progress.log_history,
        "logging_steps": cadence.logging_steps,
        "max_steps": plan.max_steps,
        "num_input_tokens_seen": progress.tokens,
        "num_train_epochs": plan.num_epochs,
        "save_steps": cadence.save_steps,
        "stateful_callbacks": {},
        "train_batch_size": batch_size,
        "trial_name": None,
        "trial_params": None,
    }


def check_writable(params: Any, files: ModelFiles) -> None:
    """Form on shapes what `save_model` is to write.

    Raises:
      ConfigError: what trains and cannot be written, by the name of its module.
    """
    params, mask = split_head(params)[0], split_head(files.mask)[0]
    if files.config.finetuning.finetuning_type == "lora":
        peft.check_writable(params, mask, files.source.decoder, resized=files.source.resized)
    else:
        hf.check_writable(params, files.source.decoder, base_of(files))


def base_of(files: ModelFiles) -> Path | None:
    """The folder whose other tensors go with what is trained; None: nothing but its config.json is used."""
    return None if files.config.model.train_from_scratch else files.source.folder


def save_model(folder: Path, params: Any, files: ModelFiles) -> None:
    """Write the model as others load it: a PEFT adapter for lora, else a Hugging Face checkpoint; and the tokenizer.

    A value head has a file of its own, as in LLaMA-Factory. All processes call it, since each has a part of the
    parameters; the first writes.
    """
    model, finetuning, decoder = files.config.model, files.config.finetuning, files.source.decoder
    (params, head), (mask, _) = split_head(params), split_head(files.mask)
    if head is not None:
        save_value_head(head, folder)
    elif processes.is_first():
        forget_value_head(folder)
    if finetuning.finetuning_type == "lora":
        peft.save_adapter(
            params,
            mask,
            decoder,
            folder,
            base=model.model_name_or_path or "",
            use_rslora=finetuning.use_rslora,
            resized=files.source.resized,
        )
    else:
        size = model.export_size * 10**9
        hf.save_model(params, decoder, files.endings.source, folder, base=base_of(files), max_shard_bytes=size)
        if processes.is_first():
            write_generation(folder, files.endings)
    if processes.is_first():
        write_tokenizer(folder, files.source.tokenizer)


class Output(NamedTuple):
    """What a run writes while it trains: checkpoints, and the model and the state in each."""

    folder: Path
    files: ModelFiles
    run: Run
    plan: Plan
    cadence: Cadence
    timing: Timing
    frozen: Any  # what does not train, unstacked where layers are unrolled
    checkpointer: Checkpointer

    def save_model(self, folder: Path, state: TrainState) -> None:
        save_model(folder, tuning.combine(state.trainable, restacked_shapes(self.frozen)), self.files)
        if processes.is_first():
            source = self.files.source
            manifest.write(folder, manifest.describe(self.files.config, source.folder, self.run.identity))

    def save_trainer_state(self, folder: Path, progress: Progress) -> None:
        batch_size = self.files.config.training.per_device_train_batch_size
        state = trainer_state(progress, plan=self.plan, cadence=self.cadence, batch_size=batch_size)
        results.write_json(folder / "trainer_state.json", state)

    def save_checkpoint(self, state: TrainState, progress: Progress, *, only_model: bool) -> None:
        """Begin to write `checkpoint-N`; with `only_model` nothing to go on from is in it."""

        def write_files(folder: Path) -> None:
            self.save_model(folder, state)
            self.save_trainer_state(folder, progress)

        if progress.best_step is not None:
            self.checkpointer.best = self.folder / f"checkpoint-{progress.best_step}"
        meta = {**self.run._asdict(), "progress": progress.to_dict(), "seconds": self.timing.total()}
        if isinstance(self.plan, StreamPlan):
            meta["stream"] = self.plan.position(progress.step)
        self.checkpointer.save(progress.step, None if only_model else state, meta, write_files)
