"""What a run finds and leaves in its output folder."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from jtune.config import Config
from jtune.data import Plan
from jtune.errors import CheckpointError, ConfigError
from jtune.interop import hf, peft
from jtune.interop.endings import Endings, write_generation, write_tokenizer
from jtune.models import DecoderConfig
from jtune.sharding import hosts
from jtune.train.checkpoint import find_checkpoints, read_meta
from jtune.train.loop import Cadence, Progress

log = logging.getLogger("jtune")

# What a finished run leaves. Only a log, and no checkpoint: a run that was cut short before its first one.
_FINISHED = ("trainer_state.json", "adapter_config.json", "config.json", "all_results.json")


def resume_point(output_dir: Path, resume_from: str | bool | None, *, overwrite: bool, do_train: bool) -> Path | None:
    """The checkpoint to go on from, None to start from the beginning; the folder is made.

    As in LLaMA-Factory: an explicit `resume_from_checkpoint` wins; else a folder with checkpoints is resumed unless
    `overwrite_output_dir`; a folder with another run's files and no checkpoint is refused. Nothing is removed yet.
    A launcher that starts the same command again sets JTUNE_RESTARTED: the checkpoints are then this run's own, and
    `overwrite_output_dir` does not throw them away.

    Raises:
      ConfigError: the folder is taken, or cannot be written.
      CheckpointError: `resume_from` is not a complete checkpoint.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {output_dir} cannot be made: {error.strerror}") from error
    if not os.access(output_dir, os.W_OK):
        raise ConfigError(f"output_dir: {output_dir} cannot be written")
    if not do_train:
        return None
    found = find_checkpoints(output_dir)
    if isinstance(resume_from, str):
        path = Path(resume_from)
        read_meta(path)
        return path
    if resume_from:
        if not found:
            raise CheckpointError(f"resume_from_checkpoint: there is no checkpoint in {output_dir}")
        return found[-1]
    if overwrite and not (found and os.environ.get("JTUNE_RESTARTED")):
        return None
    if found and resume_from is False:
        raise ConfigError(
            f"resume_from_checkpoint is false, but {output_dir} holds checkpoints of an earlier run.\n"
            "Give another output_dir, or overwrite_output_dir=true to replace it."
        )
    if found:
        log.info("resuming from %s (to start from the beginning: overwrite_output_dir=true)", found[-1])
        return found[-1]
    left = [name for name in _FINISHED if (output_dir / name).exists()]
    if left:
        raise ConfigError(
            f"output_dir: {output_dir} holds another run ({', '.join(left)}) and no checkpoint to resume from.\n"
            "Give another output_dir, or overwrite_output_dir=true to replace it."
        )
    return None


def clear(output_dir: Path) -> None:
    """Forget an earlier run: its logs, and its checkpoints, which would be mistaken for this run's.

    To be called when nothing is left that may refuse to start: until then the earlier run is worth keeping.
    """
    if not hosts.is_first():
        return
    checkpoints = find_checkpoints(output_dir)
    if checkpoints:
        log.info("overwrite_output_dir: removing %d checkpoints of an earlier run in %s", len(checkpoints), output_dir)
    for path in checkpoints:
        shutil.rmtree(path)
    for name in (
        "trainer_log.jsonl",
        "trainer_state.json",
        "eval_samples.jsonl",
        "generated_predictions.jsonl",
        *(f"{kind}_results.json" for kind in ("all", "train", "eval", "predict")),
    ):
        (output_dir / name).unlink(missing_ok=True)


def check_same_run(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume when what the checkpoint says of data, batches and base model is not what this run has.

    Raises:
      CheckpointError: with each difference.
    """
    both = {key: (saved.get(key), now.get(key)) for key in {**saved, **now}}
    changed = [f"{key}: {then} then, {here} now" for key, (then, here) in both.items() if then != here]
    if changed:
        raise CheckpointError(
            f"{path} belongs to another run, or its inputs have changed:\n  " + "\n  ".join(changed) + "\n"
            "Resume with what it was started with, give another output_dir, or overwrite_output_dir=true."
        )


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


def check_writable(params: Any, mask: Any, config: Config, decoder: DecoderConfig, resized: bool) -> None:
    """Form on shapes what `save_model` is to write.

    Raises:
      ConfigError: what trains and cannot be written, by the name of its module.
    """
    if config.finetuning.finetuning_type == "lora":
        peft.check_writable(params, mask, decoder, resized=resized)
    else:
        hf.check_writable(params, decoder)


def save_model(
    folder: Path,
    params: Any,
    *,
    mask: Any,
    config: Config,
    decoder: DecoderConfig,
    endings: Endings,
    tokenizer: Any,
    resized: bool = False,
) -> None:
    """Write the model as others load it: a PEFT adapter for lora, else a Hugging Face checkpoint; and the tokenizer.

    All processes call it, since each has a part of the parameters; the first writes.

    Args:
      endings: what is written of config.json and generation_config.json.
      resized: the vocabulary is not the base's: an adapter holds the tables of rows, whether they train or not.
    """
    model, finetuning = config.model, config.finetuning
    if finetuning.finetuning_type == "lora":
        name = model.model_name_or_path or ""
        peft.save_adapter(params, mask, decoder, folder, base=name, use_rslora=finetuning.use_rslora, resized=resized)
    else:
        hf.save_model(params, decoder, endings.source, folder, max_shard_bytes=model.export_size * 10**9)
        if hosts.is_first():
            write_generation(folder, endings)
    if hosts.is_first():
        write_tokenizer(folder, tokenizer)
