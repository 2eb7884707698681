"""Arguments of preference stages and of distillation: what contradicts itself is refused, what means less is noted."""

import pytest

from jtune.config import load_config
from jtune.config.preference import LOSSES, SMOOTHED, WITHOUT_REFERENCE
from jtune.errors import ConfigError

TRAIN = ["model_name_or_path=m", "dataset=a", "do_train=true"]
DPO, KTO, RM = "stage=dpo", "stage=kto", "stage=rm"


def complaint(words: str, command: str = "train") -> str:
    with pytest.raises(ConfigError) as error:
        load_config([*TRAIN, *words.split()], command=command)
    return str(error.value)


def notes(words: str, command: str = "train") -> list[str]:
    return [n.removeprefix("command line: ") for n in load_config([*TRAIN, *words.split()], command=command).notes]


@pytest.mark.parametrize("stage", [DPO, KTO, RM])
def test_a_plain_case_loads_without_notes(stage):
    assert notes(stage) == []
    assert notes(f"{stage} finetuning_type=full neftune_noise_alpha=5") == []
    assert notes(f"{stage} adapter_name_or_path=a create_new_adapter=true") == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"{DPO} pref_loss=sigmod", "pref_loss: there is no loss 'sigmod': did you mean sigmoid? There are sigmoid, h"),
        (f"{DPO} pref_loss=[sigmoid,x]", "pref_loss: there is no loss 'x': there are sigmoid"),
        (f"{DPO} pref_loss=[]", "pref_loss is empty: name a loss"),
        (f"{DPO} pref_loss=[sft,sft]", "names sft 2 times: name it once, with a weight in pref_loss_weights"),
        (f"{DPO} pref_loss_weights=[1,2]", "has 2 weights for the 1 losses of pref_loss, sigmoid: give one for each"),
        (f"{DPO} pref_loss=[sigmoid,sft] pref_loss_weights=[1,-1]", "must be at least 0, and not all 0, but they are"),
        (f"{DPO} pref_loss=[sigmoid,sft] pref_loss_weights=[0,0]", "and not all 0"),
        (f"{DPO} pref_loss=hinge dpo_label_smoothing=0.1", "dpo_label_smoothing: 0.1 is not in the formula of hinge"),
        (f"{DPO} pref_loss=robust dpo_label_smoothing=0.5", "divides by 0 in pref_loss: robust: set it below 0.5"),
        (f"{DPO} dpo_label_smoothing=0.7", "dpo_label_smoothing must be between 0 and 0.5, not 0.7"),
        (f"{DPO} pref_loss=simpo pref_bco_weight=1", "BCO compares with a reference, and pref_loss: simpo has none"),
        (f"{DPO} pref_beta=0", "pref_beta must be above 0"),
        (f"{DPO} ld_alpha=1.5", "ld_alpha must be between 0 and 1"),
        (f"{DPO} label_smoothing_factor=0.1", "leave it out, or set dpo_label_smoothing"),
        (f"{RM} label_smoothing_factor=0.1", "is only for stages pt and sft, not rm: leave it out"),
        (f"{DPO} use_dft_loss=true", "use_dft_loss is only for stage sft, not dpo"),
        (f"{DPO} ref_model_quantization_bit=4", "without ref_model the reference is the model that trains"),
        (f"{DPO} ref_adapter=start", "but none is given: set adapter_name_or_path, or leave ref_adapter out"),
        (f"{KTO} ref_adapter=start finetuning_type=full", "but finetuning_type: full has none: leave it out"),
        (
            f"{DPO} ref_adapter=start adapter_name_or_path=a create_new_adapter=true",
            "create_new_adapter merges it into the base, which is the reference already: leave ref_adapter out",
        ),
        (f"{DPO} ref_adapter=start adapter_name_or_path=a ref_model=r", "ref_model and ref_adapter: start are two ref"),
        (f"{DPO} ref_adapter=sart", "Did you mean start?"),
        (f"{DPO} precompute_ref_log_probs=true streaming=true max_steps=1", "streaming never has all of them"),
        (f"{DPO} pissa_init=true precompute_ref_log_probs=false", "leave out precompute_ref_log_probs: false"),
        (f"{DPO} pissa_init=true streaming=true max_steps=1", "leave one of them out"),
        (f"{DPO} teacher_model=t", "teacher_model is only for stages pt and sft, not dpo: leave it out, or set"),
        (f"{RM} teacher_model=t", "teacher_model is only for stages pt and sft, not rm: leave it out"),
        ("teacher_model=t label_smoothing_factor=0.1", "label_smoothing_factor and teacher_model: each is a loss"),
        ("teacher_model=t use_dft_loss=true", "choose one"),
        ("teacher_model=t distill_loss=forwards", "Did you mean forward?"),
        (f"{DPO} train_on_prompt=true", "train_on_prompt is only for stage sft: stage dpo learns the answers that are"),
        (f"{KTO} mask_history=true", "mask_history is only for stage sft: stage kto learns the answers that are comp"),
        (f"{RM} predict_with_generate=true", "predict_with_generate is only for stage sft, not rm"),
        (f"{RM} eval_samples=2 eval_dataset=b do_eval=true", "eval_samples shows answers, and stage rm trains a model"),
        (f"{DPO} do_predict=true eval_dataset=b", "do_predict is only for stages sft (answers) and rm (scores)"),
        (
            f"{DPO} eval_dataset=b eval_strategy=steps early_stopping_steps=2 metric_for_best_model=accuracy",
            "metric_for_best_model: there is no accuracy",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(words, said):
    assert said in complaint(words)


def test_options_of_rows_are_refused_where_only_rows_are_made():
    assert "only for stage sft" in complaint(f"{DPO} mask_history=true", command="data")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"{DPO} pref_loss=ipo", "pref_loss: ipo: LLaMA-Factory trains the sigmoid loss under this name, jtune"),
        (f"{DPO} pref_loss=simpo", "pref_loss: simpo: with pref_beta: 0.1, as DPO has it, answers hardly differ"),
        (f"{DPO} pref_loss=orpo ref_model=r", "ref_model is ignored: pref_loss: orpo has no reference"),
        (f"{DPO} pref_loss=orpo precompute_ref_log_probs=true", "precompute_ref_log_probs is ignored: pref_loss: orpo"),
        (f"{DPO} packing=true", "packing: pairs always share rows, without seeing each other, so this changes nothing "
         "else, and cutoff_len is one token less, as in LLaMA-Factory"),
        (f"{KTO} neat_packing=true", "neat_packing: answers always share rows, without seeing each other"),
        (f"{DPO} lora_dropout=0.1", "lora_dropout is not applied in stage dpo: the model and its reference are"),
        (f"{DPO} compute_accuracy=true", "compute_accuracy is ignored in stage dpo: rewards/accuracies is always"),
        (f"{RM} compute_accuracy=true", "compute_accuracy is ignored in stage rm: eval_accuracy is always measured"),
        (f"{KTO} per_device_train_batch_size=1", "per_device_train_batch_size: 1: KTO's divergence is estimated from"),
        (f"{DPO} adapter_name_or_path=a", "adapter_name_or_path: the reference is the base without this adapter, as in "
         "LLaMA-Factory: ref_adapter: start makes it the adapter as it is given"),
        (f"{DPO} simpo_gamma=0.3", "simpo_gamma is ignored without stage: dpo and pref_loss: simpo"),
        (f"{KTO} pref_loss=hinge", "pref_loss is ignored in stage kto: only stage dpo reads it"),
        (f"{RM} ref_model=r", "ref_model is ignored in stage rm: only stages dpo and kto read it"),
        ("pref_beta=0.2", "pref_beta is ignored in stage sft: only stages dpo and kto read it"),
        (f"{DPO} rm_center_coef=0.01", "rm_center_coef is ignored in stage dpo: only stage rm reads it"),
        (f"{DPO} kto_chosen_weight=2", "kto_chosen_weight is ignored in stage dpo: only stage kto reads it"),
        ("distill_weight=0.5", "distill_weight is ignored without teacher_model"),
        ("teacher_model=t distill_beta=0.2", "distill_beta is ignored without distill_loss: js"),
    ],
)  # fmt: skip
def test_what_means_less_than_it_says_is_noted(words, said):
    [note] = notes(words)
    assert note.startswith(said)


@pytest.mark.parametrize(
    "words",
    [
        f"{DPO} adapter_name_or_path=a ref_adapter=base",
        f"{DPO} adapter_name_or_path=a ref_adapter=start",
        f"{DPO} adapter_name_or_path=a ref_model=r ref_model_quantization_bit=4",
        f"{DPO} pref_loss=orpo adapter_name_or_path=a",
        f"{DPO} pref_loss=simpo pref_beta=2 simpo_gamma=1",
        f"{DPO} pref_loss=[robust,sft] pref_loss_weights=[1,0.5] dpo_label_smoothing=0.1 pref_ftx=0.1",
        f"{RM} lora_dropout=0.1 rm_center_coef=0.01",
        f"{RM} eval_dataset=b do_predict=true",
        f"{KTO} kto_chosen_weight=1.3 pref_beta=0.2 pref_ftx=0.1",
        "stage=pt teacher_model=t distill_loss=js distill_beta=0.2 distill_temperature=2 distill_weight=0.5",
    ],
)
def test_what_is_meant_is_not_talked_about(words):
    assert notes(words) == []


def test_each_loss_may_be_named():
    for name in LOSSES:
        smoothing = 0.1 if name in SMOOTHED else 0
        words = f"{DPO} pref_loss={name} pref_beta=1 dpo_label_smoothing={smoothing}"
        assert load_config([*TRAIN, *words.split()]).finetuning.pref_loss == (name,)
    assert {*SMOOTHED, *WITHOUT_REFERENCE} <= {*LOSSES}


@pytest.mark.parametrize(("stage", "applied"), [(DPO, 0.0), (KTO, 0.0), (RM, 0.1)])
def test_dropout_is_off_where_a_model_is_compared_with_its_reference(stage, applied):
    assert load_config([*TRAIN, stage, "lora_dropout=0.1"]).finetuning.lora_dropout == applied


@pytest.mark.parametrize(
    ("stage", "metric"),
    [(DPO, "rewards/accuracies"), (DPO, "eval_rewards/margins"), (KTO, "kl"), (RM, "accuracy"), (DPO, "loss")],
)
def test_the_best_model_may_be_chosen_by_what_the_stage_measures(stage, metric):
    words = f"{stage} eval_dataset=b eval_strategy=steps early_stopping_steps=2 metric_for_best_model={metric}"
    assert notes(words) == []


def test_other_commands_are_not_told_about_training():
    for command in ("chat", "export"):
        assert notes(f"{DPO} pref_loss=hinge lora_dropout=0.1 packing=true export_dir=o", command=command) == []
