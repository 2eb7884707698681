"""What an update minimises: the loss of a token, the noise that its input gets, and the reference that holds it back.

Shape suffixes: B batch, T tokens in a row, D embed.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtune import tuning
from jtune.config import FinetuningArguments, TrainingArguments
from jtune.losses.distill import distilled
from jtune.losses.token import TokenLoss, asft, dft, eaft, smoothed_nll, token_nll
from jtune.losses.units import UnitObjective


class Objective(NamedTuple):
    """What the train step is told to minimise.

    Attributes:
      name: the loss with its options, in words.
      token_loss: see `jtune.losses.token`.
      anchored: `token_loss` also takes the logits of a reference (`jtune.losses.reference`).
      reference: what that is, in words.
      eval_loss: what evaluation reports as the loss. Not that of the reference: there no second model is run.
      noise_alpha: strength of `embedding_noise`; 0: none.
    """

    name: str = "cross-entropy"
    token_loss: TokenLoss = token_nll
    anchored: bool = False
    reference: str = "the model as it is now, without its adapter"
    eval_loss: TokenLoss = token_nll
    noise_alpha: float = 0.0


PLAIN = Objective()


def objective_of(finetuning: FinetuningArguments, training: TrainingArguments) -> Objective:
    """The objective that the arguments ask for; at most one of them asks for another loss."""
    noise = training.neftune_noise_alpha or 0.0
    if finetuning.teacher_model:
        return distillation(finetuning)._replace(noise_alpha=noise)
    if finetuning.use_asft_loss:
        alpha = finetuning.asft_alpha
        return Objective(f"ASFT, alpha {alpha:g}", partial(asft, alpha=alpha), anchored=True, noise_alpha=noise)
    name, loss = PLAIN.name, PLAIN.token_loss
    if finetuning.use_dft_loss:
        name, loss = "DFT", dft
    elif finetuning.use_eaft_loss:
        name, loss = f"EAFT, alpha {finetuning.eaft_alpha:g}", partial(eaft, alpha=finetuning.eaft_alpha)
    elif training.label_smoothing_factor:
        factor = training.label_smoothing_factor
        name, loss = f"cross-entropy, labels smoothed by {factor:g}", partial(smoothed_nll, factor=factor)
    return Objective(name, loss, eval_loss=loss, noise_alpha=noise)


def distillation(args: FinetuningArguments) -> Objective:
    """The objective of a student: the divergence from its teacher, and cross-entropy as the arguments mix them.

    `distill_loss: js` with `distill_beta` 0 and 1 is the limit of its direction there, KL(teacher || student) and
    KL(student || teacher); the formula itself would be 0.
    """
    kind, beta, tau, weight = args.distill_loss, args.distill_beta, args.distill_temperature, args.distill_weight
    if kind == "js" and beta in (0, 1):
        kind = "reverse" if beta else "forward"
    named = {"forward": "KL(teacher, model)", "reverse": "KL(model, teacher)", "js": f"Jensen-Shannon, beta {beta:g}"}
    mixed = f"; {weight:.0%} of it, the rest is cross-entropy" if weight < 1 else ""
    loss = partial(distilled, divergence=kind, beta=beta, temperature=tau, weight=weight)
    return Objective(
        f"{named[kind]} at temperature {tau:g}{mixed}", loss, anchored=True, reference=str(args.teacher_model)
    )


def describe_objective(objective: Objective | UnitObjective) -> str:
    """
    >>> describe_objective(Objective(noise_alpha=5.0))
    'loss: cross-entropy; noise on the embeddings, alpha 5'
    """
    noise = f"; noise on the embeddings, alpha {objective.noise_alpha:g}" if objective.noise_alpha else ""
    anchor = ""
    if isinstance(objective, Objective) and objective.anchored:
        anchor = f"; the reference is {objective.reference}"
    return f"loss: {objective.name}{anchor}{noise}"


# ---------------------------------------------------------------------- noise


def embedding_noise(key: jax.Array, segment_ids_BT: jax.Array, features: int, alpha: float, dtype: Any) -> jax.Array:
    """NEFTune's noise (arXiv:2310.05914): uniform in `+-alpha / sqrt(L * D)`, `[B, T, D]` in `dtype`.

    L is the length of the example (segment) that a token belongs to, as in the paper, and not that of a row: what else
    lies in it changes nothing of its noise but the draw.
    """
    B, T = segment_ids_BT.shape
    lengths_BT = jax.vmap(lambda ids: jnp.bincount(ids, length=T + 1)[ids])(segment_ids_BT)
    bound_BT = alpha / jnp.sqrt(lengths_BT.astype(jnp.float32) * features)
    return jax.random.uniform(key, (B, T, features), dtype, -1, 1) * bound_BT[..., None].astype(dtype)


def step_key(objective: Objective | UnitObjective, params: Any, seed: int) -> jax.Array | None:
    """What a step's random draws follow from; None if it has none."""
    return jax.random.key(seed) if objective.noise_alpha or tuning.has_dropout(params) else None
