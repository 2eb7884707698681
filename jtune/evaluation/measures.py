"""How good the model of a run is: the losses of its evaluation sets, answers to them, and samples to look at."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jtune.config import Config, TrainingArguments
from jtune.data import Splits
from jtune.errors import DataError
from jtune.evaluation import predict
from jtune.evaluation.loss import make_loss
from jtune.evaluation.units import Reference, Sums, make_unit_measure, score_lines
from jtune.generation.settings import describe_sampling, read_generation_config, sampling_of
from jtune.loading.source import Source
from jtune.losses.objective import Objective
from jtune.losses.units import UnitObjective
from jtune.models import CausalLM
from jtune.sharding import batch_shards
from jtune.train import results
from jtune.train.callbacks.terminal import describe_sample

log = logging.getLogger("jtune")


class Measures(NamedTuple):
    """What is measured of a model, each a function of its parameters."""

    loss: Callable[[Any, Any], dict[str, float]]  # metrics of every evaluation set; also of `TrainState.running`
    answers: Callable[[Any, str], tuple[list[predict.Predicted], dict[str, float]]] | None  # predict_with_generate
    samples: Callable[[Any], list[dict[str, str]]] | None  # eval_samples
    scores: Callable[[Any], tuple[list[dict[str, float]], dict[str, float]]] | None = None  # of a reward model

    def metrics(self, params: Any, running: Any = None) -> dict[str, float]:
        """All figures of an evaluation.

        Args:
          running: of the run so far (`jtune.evaluation.units.make_unit_measure`).
        """
        losses = self.loss(params, running)
        return predict.joined(losses, self.answers(params, "eval")[1]) if self.answers else losses


def make_measures(
    config: Config,
    source: Source,
    splits: Splits,
    module: CausalLM,
    objective: Objective | UnitObjective,
    *,
    end_ids: Sequence[int],
    references: Mapping[str, Reference] = MappingProxyType({}),
) -> Measures:
    """The measures that the arguments ask for.

    Args:
      end_ids: tokens that end an answer, besides those of the tokenizer and of generation_config.json.
      references: see `jtune.evaluation.units.make_unit_measure`.
    """
    training, generating, tokenizer = config.training, config.generating, source.tokenizer
    mesh = module.mesh
    assert isinstance(mesh, Mesh)
    scores = None
    if isinstance(objective, UnitObjective):
        measure = make_unit_measure(module, splits.eval, mesh, config, objective, references)
        loss = lambda params, running: measure(params, "eval", running)[1]
        scores = (lambda params: _scored(*measure(params, "predict"))) if objective.scores else None
    else:
        _check_labelled(splits, training)
        of_tokens = make_loss(module, splits.eval, mesh, config, objective.eval_loss)
        loss = lambda params, running: of_tokens(params)
    answers = samples = None
    if training.predict_with_generate:
        stop_ids = (*predict.stop_ids(tokenizer), *end_ids)
        sampling = sampling_of(generating, read_generation_config(source.folder), stop_ids)
        log.info("answers: %s", describe_sampling(sampling))
        batch_size = training.per_device_eval_batch_size * batch_shards(mesh)
        how = {"seed": training.seed, "batch_size": batch_size}
        answers = predict.make_prediction(module, splits.eval, tokenizer, sampling, generating, **how)
    shown = next(iter(splits.eval.values()), splits.train)
    if training.eval_samples and shown is not None:
        samples = predict.make_samples(module, shown, training.eval_samples, tokenizer, generating)
    return Measures(loss, answers, samples, scores)


def _scored(sums: Mapping[str, Sums], metrics: dict[str, float]) -> tuple[list[dict[str, float]], dict[str, float]]:
    return score_lines(sums), metrics


def _check_labelled(splits: Splits, training: TrainingArguments) -> None:
    """Say how many rows have no answer: they are in no figure.

    Raises:
      DataError: none has one, and models are to be compared.
    """
    for name, encoded in splits.eval.items():
        without = int((encoded.labelled == 0).sum())
        if without:
            few = f"{without} of {len(encoded)} rows have no answer: they are answered, and loss, BLEU and ROUGE are"
            none = "no row has an answer: they are answered, and there is no loss, BLEU or ROUGE"
            log.warning("%s: %s", f"eval {name}".strip(), none if without == len(encoded) else f"{few} of the others")
    compared = training.load_best_model_at_end or training.save_strategy == "best"
    if compared and splits.eval and not any(encoded.labelled.any() for encoded in splits.eval.values()):
        raise DataError(
            "no row of the evaluation sets has an answer, by which models could be compared (load_best_model_at_end, "
            "save_strategy: best)"
        )


def log_samples(measures: Measures, params: Any) -> None:
    for line in measures.samples(params) if measures.samples else ():
        log.info("%s", describe_sample(line))


def finish(
    config: Config, source: Source, splits: Splits, measures: Measures, params: Any, running: Any = None
) -> dict[str, Any]:
    """Measure the finished model as `do_eval` and `do_predict` say; write and log the figures.

    Args:
      running: see `Measures.metrics`.

    Returns:
      The content of `all_results.json`.
    """
    training, output_dir = config.training, Path(config.training.output_dir)
    if training.do_eval and splits.eval:
        results.finish_evaluation(measures.metrics(params, running), output_dir)
    if measures.answers and training.do_predict:
        answers, metrics = measures.answers(params, "predict")
        skip = config.generating.skip_special_tokens
        results.finish_prediction(
            predict.lines(source.tokenizer, answers, skip_special_tokens=skip), metrics, output_dir
        )
    if measures.scores and training.do_predict:
        results.finish_prediction(*measures.scores(params), output_dir)
    return results.read_results(output_dir)
