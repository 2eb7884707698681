"""What a run leaves in its output folder."""

from pathlib import Path
from typing import Any

from jtune.config import Config
from jtune.data import Plan
from jtune.distributed import processes
from jtune.interop import hf, peft
from jtune.interop.endings import Endings, write_generation, write_tokenizer
from jtune.models import DecoderConfig
from jtune.train.cadence import Cadence
from jtune.train.loop import Progress


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
        if processes.is_first():
            write_generation(folder, endings)
    if processes.is_first():
        write_tokenizer(folder, tokenizer)
