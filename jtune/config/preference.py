"""The losses of stage dpo by name, and the rules between the arguments of preference stages."""

# The names of LLaMA-Factory, then those that TRL adds; `jtune.losses` has their formulas.
LOSSES = (
    *("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo"),
    *("robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"),
    *("discopop", "sigmoid_norm", "sft"),
)
