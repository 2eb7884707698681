"""A model as EleutherAI's lm-evaluation-harness asks for one: how likely texts are, and what they are continued with.

Tokens, limits and ends of texts are those of the harness's own model for transformers (`lm_eval.models.huggingface`).
"""

import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn
from unittest import mock

import datasets
import numpy as np
from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from jtune.config import Config
from jtune.config.stages import RULES
from jtune.data import Encoded
from jtune.data.encode.arrow import IDS
from jtune.data.encode.encoded import IGNORED
from jtune.errors import ConfigError
from jtune.evaluation.loss import example_sums, prepare_evaluation
from jtune.generation import Sampling, generate
from jtune.generation.settings import end_ids, read_generation_config
from jtune.interop import hf
from jtune.loading.inference import Loaded, load
from jtune.sharding import batch_shards

log = logging.getLogger("jtune")

LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
OTHERWISE = 2048  # tokens, where config.json says nothing, as in the harness
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

Request = tuple[Any, list[int], list[int]]  # whatever, what is given, what is to be scored


def run_tasks(
    config: Config, tasks: Sequence[str], *, include_path: str | None = None, limit: float | None = None
) -> dict:
    """Evaluate the model of `config` on tasks of the harness.

    Nothing from the hub, and nothing in the folder of a model or a metric, runs as code (`refuse_code`).

    Args:
      include_path: a folder with more tasks, as YAML files of the harness. These may run code.
      limit: the first so many documents of each task; below 1 a share of them.

    Returns:
      The harness's own record; the figures of each task are in its `results`.

    Raises:
      ConfigError: there is no such task, or it cannot be had, or not without code from elsewhere.
      JtuneError: what is wrong with the model.
    """
    if include_path is not None:
        log.info("--include_path %s: its tasks may run code: Python that they name, and their templates", include_path)
    manager = TaskManager(include_path=include_path)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(f"--tasks: the harness has no {', '.join(unknown)}: `lm_eval ls tasks` lists what there is")
    lm = HarnessLM(load(config), config.training.per_device_eval_batch_size)
    evaluate: Any = simple_evaluate  # its decorator hides its arguments from type checkers
    try:
        with refuse_code():
            found = evaluate(lm, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False)
    except (Refused, ImportError, OSError, RuntimeError, ValueError) as error:
        if (fault := _explained(tasks, error)) is None:
            raise
        raise fault from error
    return found


class Refused(BaseException):
    """Code from elsewhere would run. No Exception: the harness drops those of a metric, and goes on without it."""


# What every way to code from elsewhere goes through: a repository's own classes, and any metric of `evaluate`.
# Scripts of data sets are not among them: `datasets` runs none since 4.0.
_ENTRANCES = (("transformers.dynamic_module_utils", "get_cached_module_file"),)
_ENTRANCES += (("evaluate.loading", "evaluation_module_factory"),)


@contextmanager
def refuse_code() -> Iterator[None]:
    """In here the libraries run no code of a hub's repository or of a folder, even if they are told to trust it.

    Raises:
      Refused: they would.
    """

    def refuse(name: Any, *args: Any, **options: Any) -> NoReturn:
        raise Refused(str(name))

    with ExitStack() as stack:
        for module, name in _ENTRANCES:
            if importlib.util.find_spec(module.partition(".")[0]) is not None:
                stack.enter_context(mock.patch.object(importlib.import_module(module), name, refuse))
        yield


def _explained(tasks: Sequence[str], error: BaseException) -> ConfigError | None:
    """What to say of tasks that cannot be had; None of other errors."""
    about, said = f"--tasks {','.join(tasks)}", str(error)
    away = "jtune runs none. Export the model, and run lm_eval on it"
    if isinstance(error, Refused):
        return ConfigError(f"{about}: the harness would run code from elsewhere ({said}): {away}")
    if isinstance(error, ValueError) and "confirm_run_unsafe_code" in said:
        return ConfigError(f"{about}: what the model writes would run as code: {away} with --confirm_run_unsafe_code")
    scripts = type(error) is RuntimeError and "scripts are no longer supported" in said
    if isinstance(error, ImportError | OSError) or scripts:
        return ConfigError(f"{about}: {(said.splitlines() or [type(error).__name__])[0]}")
    return None


class HarnessLM(TemplateLM):
    """The interface of the harness, over `jtune.generation` and the evaluation of `jtune.train`."""

    def __init__(self, loaded: Loaded, per_device_batch_size: int):
        super().__init__()
        self.model, self.params, self.tokenizer, self.folder, _ = loaded
        self.per_device_batch_size = per_device_batch_size
        self.ends = {self.eot_token_id, *end_ids(read_generation_config(self.folder))}
        source = hf.read_config(self.folder)
        self.max_length = next((source[name] for name in LENGTHS if source.get(name)), OTHERWISE)
        if self.model.config.learned_positions:  # an example is one token longer than what it predicts
            self.max_length = self.model.config.learned_positions - 1

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.folder)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """As the tokenizer does it, but never with two bos."""
        bos = self.tokenizer.bos_token
        special = not (bos and string.startswith(bos)) if add_special_tokens is None else add_special_tokens
        return self.tokenizer.encode(string, add_special_tokens=special)

    def _loglikelihood_tokens(self, requests: Sequence[Request], **progress: Any) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy decoding would give it.

        Requests share rows, in batches of one static shape (`jtune.data.eval_batches`).
        """
        ids = [(given + scored)[-self.max_length - 1 :] for _, given, scored in requests]
        labels = [[IGNORED] * (len(x) - len(scored)) + scored[-len(x) :] for x, (_, _, scored) in zip(ids, requests)]
        table = datasets.Dataset.from_dict(
            {"input_ids": ids, "labels": labels}, features=datasets.Features({"input_ids": IDS, "labels": IDS})
        )
        assert self.model.mesh is not None
        plan, step = prepare_evaluation(
            self.model,
            Encoded(table),
            self.model.mesh,
            stage=RULES["sft"],
            per_device_batch_size=self.per_device_batch_size,
            cutoff_len=self.max_length + 1,
        )
        sums = example_sums(lambda batch: step(self.params, batch), plan)
        scores = [(-float(nll), bool(right == count)) for nll, count, right in zip(sums.nll, sums.tokens, sums.correct)]
        for (pair, _, _), score in zip(requests, scores):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, score)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[Request] = []
        owner: list[int] = []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owner.append(i)
        scores = [score for score, _ in self._loglikelihood_tokens(windows)] if windows else []
        return np.bincount(owner, scores, len(requests)).tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}  # requests of the same kind are answered together
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        assert self.model.mesh is not None
        batch_size = self.per_device_batch_size * batch_shards(self.model.mesh)
        for indices in groups.values():
            sampling, until = self._how(requests[indices[0]].args[1])
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise ConfigError(f"max_gen_toks {sampling.max_new_tokens} leaves no room in {self.max_length} tokens")
            prompts = [self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in indices]
            found = generate(self.model, self.params, prompts, sampling, batch_size=batch_size)
            for i, ids in zip(indices, found):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                answers[i] = postprocess_generated_text(text, until, None)
                self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return [answers[i] for i in range(len(requests))]

    def _how(self, asked: Mapping[str, Any]) -> tuple[Sampling, list[str]]:
        """How tokens are chosen, and what texts end an answer; every word of the task is honoured or refused."""
        how: dict[str, Any] = dict(normalize_gen_kwargs(dict(asked)))
        until = handle_stop_sequences(how.pop("until", None), eos=self.tokenizer.decode([self.eot_token_id]))
        most, draws = how.pop("max_gen_toks"), how.pop("do_sample", False)
        chosen = {name: how.pop(name) for name in SAMPLED if how.get(name) is not None}
        if how:
            raise ConfigError(f"generation_kwargs of the task: not supported: {', '.join(how)}")
        if not draws or not chosen.get("temperature", 1.0):
            draws = False
            chosen.pop("temperature", None)
        return Sampling(max_new_tokens=most, do_sample=draws, eos_ids=tuple(sorted(self.ends)), **chosen), until
