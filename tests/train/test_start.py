"""What a start does with what it finds in its output folder: go on, begin, or refuse."""

import itertools
import json
import os
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file
from small import case, curve, state, write_data, write_model

from jtune.cli.faults import report_fault
from jtune.cli.interrupt import repeated_interrupt
from jtune.cli.main import main
from jtune.config import load_config
from jtune.config.arguments import FIELDS
from jtune.data import Encoded
from jtune.errors import CheckpointError, ConfigError
from jtune.models import DecoderConfig
from jtune.models.config import Layer
from jtune.secrets import redact, remember, words_to_show
from jtune.train import results, resume_json
from jtune.train.checkpoint_folder import is_ours
from jtune.train.digest import data_fingerprint
from jtune.train.identity import (
    GROUPS,
    KINDS,
    Run,
    arguments_of,
    describe_course,
    differences,
    model_of,
    other_order,
)
from jtune.train.loop import Progress
from jtune.train.start import begin, check_start, mark_finished, start_point

QUICK = {"mesh_fsdp": -1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 6,
         "finetuning_type": "lora", "lora_target": "q_proj", "val_size": None, "eval_strategy": "no",
         "eval_steps": None, "save_steps": 2}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return write_model(folder / "model"), write_data(folder / "data")


def run(path, *overrides):
    return main(["train", str(path), *overrides])


@pytest.fixture
def cut(monkeypatch):
    """`cut(path, *overrides, after=4, signal=False)`: a run that is killed after so many updates, or told to stop."""

    def of(path, *overrides, after=4, signal=False):
        counter = itertools.count(1)

        def agree(stop):
            number = next(counter)
            if number == after and signal:
                return True
            if number > after:  # the checkpoint of that update is on disk
                raise KeyboardInterrupt
            return stop

        with monkeypatch.context() as patch:
            patch.setattr("jtune.commands.train.arrays.agreement", lambda mesh: agree)
            assert run(path, *overrides) == (75 if signal else 130)

    return of


def checkpoints(folder):
    return sorted(p.name for p in folder.glob("checkpoint-*"))


# ---------------------------------------------------------------------- which run it is


def test_every_argument_is_sorted_into_one_class():
    sorted_in = Counter(name for group in GROUPS for name in group.names)
    assert {name: sorted_in[name] for name in FIELDS if sorted_in[name] != 1} == {}, (
        "sort it in jtune/train/identity.py"
    )
    assert set(sorted_in) == set(FIELDS)


def test_another_order_of_rows_is_another_run():
    words = ["model_name_or_path=m", "dataset=d", "do_train=true"]
    assert other_order(load_config(words)) == []
    assert other_order(load_config([*words, "group_by_length=true"])) == ["by length"]
    assert other_order(load_config([*words, "group_by_length=true", "disable_shuffling=true"])) == []


def arguments(*words):
    return arguments_of(load_config(["model_name_or_path=m", "dataset=d", "do_train=true", *words]))


@pytest.mark.parametrize(
    ("then", "now", "refused"),
    [
        (["lora_alpha=32"], ["lora_alpha=16"], ["lora_alpha: 32 then, 16 now"]),
        ([], ["use_rslora=true"], ["use_rslora: False then, True now"]),
        (["lora_rank=4"], ["lora_rank=8"], ["lora_rank: 4 then, 8 now", "lora_alpha: 8 then, 16 now"]),
        ([], ["alpha_pattern={q_proj: 64}"], ["alpha_pattern: None then, {'q_proj': 64} now"]),
        (["quantization_bit=4"], ["quantization_bit=8"], ["quantization_bit: 4 then, 8 now"]),
        (["quantization_bit=4"], ["quantization_bit=4", "double_quantization=false"],
         ["double_quantization: True then, False now"]),
        (["template=llama3"], ["template=qwen"], ["template: llama3 then, qwen now"]),
        ([], ["use_dft_loss=true"], ["use_dft_loss: False then, True now"]),
        ([], ["optim=lion_32bit"], ["optim: adamw then, lion now"]),
        ([], ["adapter_name_or_path=a"], ["adapter_name_or_path: [] then, ['a'] now"]),
        (["stage=dpo", "pref_loss=hinge"], ["stage=dpo"], ["pref_loss: ['hinge'] then, ['sigmoid'] now"]),
        (["stage=dpo"], ["stage=dpo", "pref_bco_weight=1"], ["pref_bco_weight: 0.0 then, 1.0 now"]),
        # What changes nothing is no other run.
        (["stage=dpo"], ["stage=dpo", "pref_beta=0.2", "precompute_ref_log_probs=false", "lora_dropout=0.1"], []),
        (["ref_model=r", "pref_loss=hinge"], ["kto_chosen_weight=2"], []),
        (["stage=kto", "ref_model=r"], ["stage=kto", "ref_model=s"], []),  # they are compared by their weights
        (["lora_target=q_proj,v_proj"], ["lora_target=v_proj,q_proj"], []),
        (["optim=adamw_torch"], ["optim=paged_adamw_32bit"], []),
        (["finetuning_type=full", "lora_rank=4"], ["finetuning_type=full"], []),
        (["quantization_type=fp4"], [], []),
        (["adapter_name_or_path=a", "lora_alpha=64"], ["adapter_name_or_path=a"], []),
        ([], ["learning_rate=1", "output_dir=elsewhere", "logging_steps=1", "mesh_tensor=2", "hf_hub_token=x"], []),
    ],
)  # fmt: skip
def test_arguments_that_change_what_is_trained_make_another_run(then, now, refused):
    assert differences(Run({}, arguments(*then)), Run({}, arguments(*now))) == refused


def test_what_changes_the_course_is_named_with_both_values():
    then = Run({"updates": 4}, arguments("lr_scheduler_type=cosine"))
    now = Run({"updates": 8}, arguments("weight_decay=0.1", "neftune_noise_alpha=5"))
    assert describe_course(then, now) == (
        "lr_scheduler_type was cosine, is linear; weight_decay was 0.0, is 0.1; neftune_noise_alpha was None, is 5.0; "
        "number of updates was 4, is 8"
    )
    kto = Run({}, arguments("stage=kto")), Run({}, arguments("stage=kto", "kto_chosen_weight=2", "simpo_gamma=1"))
    assert describe_course(*kto) == "kto_chosen_weight was 1.0, is 2.0"
    assert describe_course(then, then) is None
    assert differences(then, now) == []
    assert not {name for name in now.arguments if KINDS[name] == "free"}


def test_checkpoints_of_older_code_are_not_compared_in_what_they_lack():
    old = Run({"data": "abc", "rows": [False, 64]}, {})
    later = {"base weights": "f00", "adapters": "LoRA of rank 8, scale 2", "model": {"norm_eps": 1e-6}}
    assert differences(old, Run({**old.identity, **later}, arguments())) == []
    assert differences(old, Run({**old.identity, "vocabulary": [9, []]}, {})) == ["vocabulary: None then, [9, []] now"]
    other = Run({**old.identity, **later, "model": {"norm_eps": 1e-5}}, {})
    assert differences(Run({**old.identity, **later}, {}), other) == ["model: norm_eps: 1e-06 then, 1e-05 now"]


def test_other_tags_margins_or_rejected_answers_are_other_data():
    def fingerprint(prefix="", **columns):
        return data_fingerprint(Encoded(datasets.Dataset.from_dict(columns), prefix=prefix))

    ids = [[1, 2], [3, 4]]
    answers = {"input_ids": ids, "labels": ids}
    assert fingerprint(**answers, kto_tags=[True, False]) != fingerprint(**answers, kto_tags=[True, True])
    pairs = {f"{side}_{name}": ids for side in ("chosen", "rejected") for name in ("input_ids", "labels")}
    plain = fingerprint("chosen_", **pairs)
    assert fingerprint("chosen_", **pairs, margin=[1.0, 2.0]) not in (
        plain,
        fingerprint("chosen_", **pairs, margin=[1.0, 3.0]),
    )
    assert fingerprint("chosen_", **pairs | {"rejected_input_ids": [[1, 2, 3], [3, 4]]}) != plain


def test_layers_have_the_digest_that_older_code_gave_them():
    """It knew of four options of a layer."""
    layers, sizes = (Layer(window=5), Layer(rope=None, sparse=True)), {"vocab_size": 64, "head_dim": 8}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, **sizes}
    decoder = DecoderConfig(**shape, num_attention_heads=4, num_key_value_heads=2, layers=layers)
    then = (
        {"window": 5, "rope": 0, "sparse": False, "linear": False},
        {"window": None, "rope": None, "sparse": True, "linear": False},
    )
    assert model_of(decoder)["layers"] == xxhash.xxh3_64_hexdigest(repr(then).encode())
    other = replace(decoder, layers=(Layer(window=5, chunked=True), layers[1]))
    assert model_of(other)["layers"] != model_of(decoder)["layers"]


def test_how_positions_turn_is_part_of_the_model():
    from small import CONFIG

    from jtune.models.families import decoder_config

    shape = {**CONFIG, "vocab_size": 64, "max_position_embeddings": 64}
    plain = model_of(decoder_config(shape))
    stretched = model_of(decoder_config({**shape, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}))
    assert plain["ropes.0.factor"] == 1.0
    assert {key for key in plain if plain[key] != stretched[key]} == {"ropes.0.kind", "ropes.0.factor"}


# ---------------------------------------------------------------------- decisions, on folders made by hand


class Folder:
    """An output folder with checkpoints of three kinds, and `start(...)`: what a start decides."""

    def __init__(self, path: Path):
        self.path, self.out = path, path / "out"
        self.out.mkdir()

    def config(self, *words):
        return load_config(["model_name_or_path=m", "dataset=d", "do_train=true", f"output_dir={self.out}", *words])

    def add(self, kind: str, *steps: int) -> None:
        for step in steps:
            folder = self.out / f"checkpoint-{step}"
            folder.mkdir()
            (folder / "adapter_config.json").write_text("{}")
            fields = {"global_step": step, "best_model_checkpoint": None}
            fields |= {"total_flos": 1.0} if kind == "foreign" else {}
            (folder / "trainer_state.json").write_text(json.dumps(fields))
            if kind == "whole":
                content = {
                    "identity": {"data": "a"},
                    "progress": Progress(step=step).to_dict(),
                    "step": step,
                    "digests": {},
                }
                (folder / "resume.json").write_bytes(resume_json.encode(content))

    def record(self, *words, data="a", finished=False) -> None:
        config = self.config(*words)
        write = mark_finished if finished else begin
        write(self.out, config.training, Run({"data": data}, arguments_of(config)))

    def start(self, *words, data="a") -> str | None:
        config = self.config(*words)
        now = Run({"data": data}, arguments_of(config))
        check_start(self.out, config.training, now.arguments)
        found = start_point(self.out, config.training, now)
        return found and found.name


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


OVER, FRESH = "overwrite_output_dir=true", "resume_from_checkpoint=false"


def test_a_run_that_was_cut_short_goes_on_also_with_overwrite_output_dir(folder):
    folder.add("whole", 2, 4)
    folder.record(OVER)
    assert folder.start(OVER) == "checkpoint-4"
    assert folder.start(OVER, "learning_rate=1") == "checkpoint-4"  # named, see `take_up`
    assert folder.start() == "checkpoint-4"
    assert folder.start(OVER, FRESH) is None
    assert checkpoints(folder.out) == []


@pytest.mark.parametrize("change", ["finished", "rows", "argument", "unknown"])
def test_another_run_and_one_that_has_finished_are_overwritten(change, folder):
    folder.add("whole", 2, 4)
    if change != "unknown":
        folder.record(OVER, finished=change == "finished")
    words = ["lora_alpha=7"] if change == "argument" else []
    assert folder.start(OVER, *words, data="b" if change == "rows" else "a") is None
    assert checkpoints(folder.out) == []


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"identity": {', "[" * 10**5, '{"identity": [], "arguments": {}, "finished": false}', "newer"],
)
def test_an_unfinished_run_goes_on_though_its_record_is_damaged(content, folder):
    folder.add("whole", 2, 4)
    folder.record(OVER)
    record = folder.out / "run.json"
    record.write_text(
        content if content != "newer" else record.read_text().replace("{", '{"of a later version": 1,', 1)
    )
    assert folder.start(OVER) == "checkpoint-4"
    (folder.out / "checkpoint-4" / "resume.json").write_text("{")
    assert folder.start(OVER) == "checkpoint-4"  # the one before it is read, and then found to be the newest
    for name in ("trainer_state.json", "all_results.json"):
        (folder.out / name).write_text("{}")
    if content != "newer":
        assert folder.start(OVER) is None  # it has finished
        assert checkpoints(folder.out) == []


@pytest.mark.parametrize("name", ["run.json", "trainer_log.jsonl", "all_results.json", "adapter_model.safetensors"])
def test_what_is_in_the_place_of_a_file_is_refused_before_anything_is_removed(name, folder):
    folder.add("whole", 2)
    folder.record(OVER, finished=True)
    (folder.out / name).unlink(missing_ok=True)
    (folder.out / name).mkdir()
    with pytest.raises(ConfigError, match=f"{name} is not a file"):
        folder.start(OVER)
    assert checkpoints(folder.out) == ["checkpoint-2"]


def test_a_link_to_a_checkpoint_is_removed_and_what_it_leads_to_is_not(folder):
    folder.add("whole", 2)
    (folder.out / "checkpoint-2").rename(folder.path / "elsewhere")
    (folder.out / "checkpoint-2").symlink_to(folder.path / "elsewhere")
    folder.record(OVER, finished=True)
    assert folder.start(OVER) is None
    assert checkpoints(folder.out) == []
    assert (folder.path / "elsewhere" / "resume.json").is_file()


def test_a_launcher_goes_on_with_what_it_has_begun(folder, monkeypatch):
    folder.add("whole", 2, 4)
    folder.record(OVER, FRESH)
    monkeypatch.setenv("JTUNE_RESTARTED", "1")
    assert folder.start(OVER, FRESH) == "checkpoint-4"
    folder.record(f"resume_from_checkpoint={folder.out / 'checkpoint-2'}")
    assert folder.start(f"resume_from_checkpoint={folder.out / 'checkpoint-2'}") == "checkpoint-4"
    folder.record(OVER, finished=True)
    assert folder.start(OVER) == "checkpoint-4"  # it ended, but another of its processes was lost on the way out
    assert folder.start(OVER, "learning_rate=1") is None  # an earlier one, that this one has not yet replaced


def test_nothing_is_removed_by_a_start_that_is_refused(folder):
    folder.add("whole", 2)
    folder.record()
    with pytest.raises(CheckpointError, match="lora_alpha: 16 then, 8 now"):
        folder.start("lora_alpha=8")
    with pytest.raises(ConfigError, match="resume_from_checkpoint is false"):
        folder.start(FRESH)
    assert checkpoints(folder.out) == ["checkpoint-2"]


def test_a_run_without_a_checkpoint_begins_again_by_itself(folder, capsys):
    folder.record()
    (folder.out / "adapter_config.json").write_text("{}")
    assert folder.start() is None
    folder.record()
    with pytest.raises(ConfigError, match=r"holds another run \(adapter_config.json\).*\n.*\n  data: a then, b now"):
        folder.start(data="b")
    folder.record(finished=True)
    with pytest.raises(ConfigError, match="holds another run"):
        folder.start()
    (folder.out / "run.json").write_text("{")  # damaged: nothing can be told
    with pytest.raises(ConfigError, match="holds another run"):
        folder.start()


def test_checkpoints_of_another_program_are_refused_or_left_alone(folder):
    folder.add("foreign", 3, 50)
    with pytest.raises(ConfigError) as error:
        folder.start()
    for said in (
        "checkpoint-3, checkpoint-50",
        "another output_dir",
        OVER,
        "adapter_name_or_path=",
        "checkpoint-50 to",
    ):
        assert said in str(error.value)
    assert folder.start(OVER) is None
    assert checkpoints(folder.out) == ["checkpoint-3", "checkpoint-50"]
    folder.record(OVER)  # the command that goes on says overwrite_output_dir=false
    assert folder.start() is None
    folder.add("whole", 4)
    assert folder.start() == "checkpoint-4"
    with pytest.raises(CheckpointError, match=r"is not a jtune checkpoint.*\n.*adapter_name_or_path="):
        folder.start(f"resume_from_checkpoint={folder.out / 'checkpoint-3'}")


def test_our_own_checkpoints_are_known_also_without_training_state(folder):
    folder.add("models", 2)
    folder.add("foreign", 3)
    folder.add("whole", 4)
    (folder.out / "checkpoint-5").mkdir()
    assert [is_ours(folder.out / f"checkpoint-{n}") for n in (2, 3, 4, 5)] == [True, False, True, False]
    with pytest.raises(CheckpointError, match="save_only_model"):
        folder.start(f"resume_from_checkpoint={folder.out / 'checkpoint-2'}")


def test_models_without_training_state_stay_until_their_number_comes(folder, caplog):
    folder.add("models", 2, 4)
    folder.record("save_only_model=true")
    assert folder.start("save_only_model=true") is None
    folder.record("save_only_model=true", OVER)
    assert folder.start("save_only_model=true", OVER) is None
    assert checkpoints(folder.out) == ["checkpoint-2", "checkpoint-4"]
    folder.record("save_only_model=true")
    with pytest.raises(ConfigError, match=r"holds another run \(checkpoint-2, checkpoint-4\)"):
        folder.start("save_only_model=true", data="b")
    with pytest.raises(CheckpointError, match="models without training state"):
        folder.start("resume_from_checkpoint=true")


# ---------------------------------------------------------------------- whole runs


def test_the_same_command_goes_on_though_it_says_overwrite(parts, tmp_path, cut, capsys):
    whole, path = (case(tmp_path / name, *parts, **QUICK, overwrite_output_dir=True) for name in ("whole", "cut"))
    assert run(whole) == 0
    cut(path, after=4)
    assert json.loads((tmp_path / "cut" / "out" / "run.json").read_text())["finished"] is False
    capsys.readouterr()
    assert run(path) == 0
    said = capsys.readouterr().out
    assert "going on (to start from the beginning: overwrite_output_dir=true resume_from_checkpoint=false)" in said
    assert re.search(r"resumed from \S+/checkpoint-4: 4 of 6 updates are done", said)
    ours, theirs = (load_file(tmp_path / n / "out" / "adapter_model.safetensors") for n in ("cut", "whole"))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert run(path) == 0  # finished: trained once more, as LLaMA-Factory does
    assert "removing 3 checkpoints of an earlier run" in capsys.readouterr().out


def test_a_change_of_the_adapter_is_refused_and_one_of_the_course_named(parts, tmp_path, cut, capsys):
    path = case(tmp_path, *parts, **QUICK)
    cut(path, after=4)
    capsys.readouterr()
    assert run(path, "lora_alpha=64", "learning_rate=5e-4") == 5
    said = capsys.readouterr()
    assert "lora_alpha: 16 then, 64 now\n  besides, learning_rate was 0.001, is 0.0005\n" in said.err
    assert "reading weights" not in said.out
    assert f"another way: adapter_name_or_path={tmp_path / 'out' / 'checkpoint-4'} and another output_dir" in said.err
    assert run(path, "learning_rate=5e-4", "max_grad_norm=0.5") == 0
    assert (
        "learning_rate was 0.001, is 0.0005; max_grad_norm was 1.0, is 0.5 from update 5 on" in capsys.readouterr().out
    )


def test_a_finished_run_goes_on_when_it_is_given_more_updates(parts, tmp_path, capsys):
    """As Trainer: the same batches from there on, the same state, and the schedule of the new length."""
    longer, path = (case(tmp_path / name, *parts, **QUICK, logging_steps=1) for name in ("longer", "again"))
    constant = "lr_scheduler_type=constant"
    assert run(longer, "max_steps=8", constant, "warmup_ratio=0") == 0
    assert run(path, constant, "warmup_ratio=0") == 0
    capsys.readouterr()
    assert run(path, constant, "warmup_ratio=0") == 0
    done = "all 6 updates are done already (to train further, raise num_train_epochs or max_steps; to train again,"
    assert done in capsys.readouterr().out
    assert run(path, "max_steps=8", constant, "warmup_ratio=0") == 0
    assert "number of updates was 6, is 8 from update 7 on" in capsys.readouterr().out
    ours, theirs = (load_file(tmp_path / n / "out" / "adapter_model.safetensors") for n in ("again", "longer"))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert run(path, "max_steps=10", "lr_scheduler_type=linear", "warmup_ratio=0") == 0
    logged = [record for record in state(tmp_path / "again" / "out")["log_history"] if "learning_rate" in record]
    assert [record["learning_rate"] for record in logged[8:]] == pytest.approx([0.2e-3, 0.1e-3])  # the last two of ten
    assert run(path, "max_steps=4", constant, "warmup_ratio=0") == 5
    assert "10 updates are done, and this run is to make 4 (num_train_epochs, max_steps)" in capsys.readouterr().err


def test_full_training_of_another_base_is_not_gone_on_with(parts, tmp_path, cut, capsys):
    path = case(tmp_path, *parts, **(QUICK | {"finetuning_type": "full", "lora_target": None}))
    cut(path, after=2)
    other = write_model(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    from safetensors.numpy import save_file

    save_file(
        tensors | {"model.norm.weight": np.float32(2) * tensors["model.norm.weight"]}, other / "model.safetensors"
    )
    capsys.readouterr()
    assert run(path, f"model_name_or_path={other}") == 5
    assert re.search(r"base weights: \w+ then, \w+ now", capsys.readouterr().err)


def test_told_to_stop_a_run_that_saves_only_models_saves_what_it_needs_to_go_on(parts, tmp_path, cut, capsys):
    whole, path = (case(tmp_path / name, *parts, **QUICK, save_only_model=True) for name in ("whole", "cut"))
    assert run(whole) == 0
    cut(path, after=3, signal=True)
    said = capsys.readouterr().err
    assert "stopped by a signal at update 3 and saved: the same command goes on from there" in said
    assert run(path) == 0
    assert "checkpoint-3: 3 of 6 updates are done" in capsys.readouterr().out
    assert curve(tmp_path / "cut" / "out", "step", "loss") == curve(tmp_path / "whole" / "out", "step", "loss")
    cut(whole, OVER, after=4)
    capsys.readouterr()
    assert run(whole) == 0
    said = capsys.readouterr().out
    assert "beginning from the beginning: checkpoint-2, checkpoint-4 hold models without training state" in said


def test_a_run_without_checkpoints_that_is_killed_while_it_writes_begins_again(parts, tmp_path, monkeypatch, capsys):
    path = case(tmp_path, *parts, **(QUICK | {"save_strategy": "no"}))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results, "save_results", killed)
        assert run(path) == 130
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert run(path) == 0
    assert "cut short before it saved a checkpoint: beginning again" in capsys.readouterr().out
    assert run(path) == 2  # finished


def test_another_programs_checkpoints_are_moved_aside_and_never_deleted(parts, tmp_path, capsys):
    path = case(tmp_path, *parts, **QUICK, save_total_limit=1)
    for step in (2, 5, 50):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    (tmp_path / "out" / "checkpoint-2.other").mkdir()
    assert run(path) == 2
    assert run(path, OVER) == 0
    said = capsys.readouterr().out
    assert "checkpoint-2 is another program's, and is now checkpoint-2.other1" in said
    names = ["checkpoint-2.other", "checkpoint-2.other1", "checkpoint-5", "checkpoint-50", "checkpoint-6"]
    assert checkpoints(tmp_path / "out") == names
    assert state(tmp_path / "out" / "checkpoint-2.other1") == {"global_step": 2}


def test_the_best_so_far_is_forgotten_where_it_cannot_be_compared_or_loaded(parts, tmp_path, cut, capsys):
    changes = {"val_size": 0.1, "eval_strategy": "steps", "eval_steps": 2, "save_only_model": True}
    path = case(tmp_path, *parts, **(QUICK | changes))
    cut(path, after=5, signal=True)
    capsys.readouterr()
    assert run(path, "save_only_model=false", "load_best_model_at_end=true") == 0
    said = capsys.readouterr().out
    assert re.search(r"update \d, is forgotten: \S+ is not there, or holds a model only", said)


# ---------------------------------------------------------------------- what is printed


def test_no_secret_is_shown(parts, tmp_path, cut, capsys):
    words = ["c.yaml", "--hf_hub_token", "hf_one", "hub-token=two", "--max_new_tokens", "5", "add_tokens=<a>"]
    assert words_to_show([*words, "--swanlab-api-key=three", "model=https://me:pw@host/x?sig=abc"]) == (
        ["c.yaml", "--max_new_tokens", "5", "add_tokens=<a>", "model=https://***@host/x?sig=***"],
        ["hf_hub_token", "hub_token", "swanlab_api_key"],
    )
    remember("hf_hub_token", "wordofmine")
    remember("template", "llama3llama3")
    assert redact("a wordofmine of llama3llama3") == "a *** of llama3llama3"
    assert report_fault("train", ConfigError("wordofmine")) == 2
    assert capsys.readouterr().err == "jtune train: ***\n"
    path = case(tmp_path, *parts, **QUICK, hf_hub_token="secret-in-yaml", overwrite_output_dir=True)
    cut(path, "ms_hub_token=secret-on-line", "--om_hub_token", "secret-as-flag", after=2, signal=True)
    assert run(path, "hf_hub_token", "secret-without-dashes") == 2
    said = "".join(capsys.readouterr())
    assert (
        f"jtune train {path} overwrite_output_dir=false\n(not shown, to be given again: ms_hub_token, om_hub_token)"
        in said
    )
    written = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert not re.search("secret-(in|on|as|without)", said)
    assert not re.search(b"secret-(in|on|as)", written)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_library_ignores_is_repeated():
    class Callback:
        def __del__(self):  # what is raised here, Python ignores
            os.kill(os.getpid(), 2)
            time.sleep(0.1)

    @repeated_interrupt()
    def work():
        Callback()
        time.sleep(10)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work()
    assert time.monotonic() - began < 5


def test_a_signal_that_is_lost_before_the_run_begins_ends_it(monkeypatch):
    def connect(**more):
        try:
            os.kill(os.getpid(), 2)
            time.sleep(0.1)
        except KeyboardInterrupt:
            pass  # as Python does with what a callback raises while jax is imported

    monkeypatch.setattr("jtune.distributed.connect.connect", connect)
    monkeypatch.setattr("jtune.cli.start.load", lambda words, command: time.sleep(10))
    began = time.monotonic()
    assert main(["train", "case.yaml"]) == 130
    assert time.monotonic() - began < 5
