"""Several processes are one program: the same losses and files, the same end, and no one left waiting."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from small import case, command, curve, environment, state, train, write_data, write_model

from jtune.commands import simulate
from jtune.data.batching.train import Order, Size, plan_batches
from jtune.distributed import connect, shutdown
from jtune.errors import ConfigError
from jtune.sharding import arrays, batch_sharding, make_mesh
from jtune.train import preflight

# ---------------------------------------------------------------------- in this process


def test_nothing_said_is_one_process():
    assert connect.find_address({}) is None
    assert connect.find_address({"NNODES": "1", "MASTER_ADDR": "h"}) is None
    own = {"JTUNE_COORDINATOR": "h:1", "JTUNE_NUM_PROCESSES": "1", "JTUNE_PROCESS_ID": "0"}
    assert connect.find_address(own) is None
    assert not connect.in_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})  # a pod that is no indexed job


def test_addresses_in_both_languages():
    own = {"JTUNE_COORDINATOR": "[fe80::1]:99", "JTUNE_NUM_PROCESSES": "4", "JTUNE_PROCESS_ID": "3"}
    assert connect.find_address(own) == ("[fe80::1]:99", 4, 3)
    theirs = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000", "NNODES": "2", "NODE_RANK": "0"}
    assert connect.find_address(theirs) == ("10.0.0.1:4000", 2, 0)
    assert connect.find_address(theirs | own) == ("[fe80::1]:99", 4, 3)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"JTUNE_COORDINATOR": "h:1", "JTUNE_PROCESS_ID": "0"}, "JTUNE_NUM_PROCESSES"),
        ({"JTUNE_COORDINATOR": "h", "JTUNE_NUM_PROCESSES": "2", "JTUNE_PROCESS_ID": "0"}, "host:port"),
        ({"JTUNE_COORDINATOR": "h:1", "JTUNE_NUM_PROCESSES": "2", "JTUNE_PROCESS_ID": "2"}, "0 to 1"),
        ({"JTUNE_COORDINATOR": "h:1", "JTUNE_NUM_PROCESSES": "two", "JTUNE_PROCESS_ID": "0"}, "whole number"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR"),
        ({"NNODES": "1:4", "NODE_RANK": "0", "MASTER_ADDR": "h"}, "NNODES=1:4"),
    ],
)
def test_half_an_address_is_refused(env, said):
    with pytest.raises(ConfigError, match=said):
        connect.find_address(env)


def test_slurm_is_found_by_jax(monkeypatch):
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    for name, value in (slurm | {"SLURM_NTASKS": "2"}).items():
        monkeypatch.setenv(name, value)
    assert connect.in_cluster(os.environ)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert not connect.in_cluster(os.environ)


def test_a_task_alone_on_its_node_takes_all_gpus_of_it():
    node = {"SLURM_GPUS_ON_NODE": "8"}
    assert connect.own_gpus(node | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}) == list(range(8))
    assert connect.own_gpus(node | {"SLURM_STEP_TASKS_PER_NODE": "1"}) == list(range(8))
    assert connect.own_gpus(node | {"SLURM_STEP_TASKS_PER_NODE": "8(x4)"}) is None
    assert connect.own_gpus(node | {"SLURM_STEP_TASKS_PER_NODE": "1,8"}) is None
    assert connect.own_gpus({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}) is None  # no GPUs
    assert connect.own_gpus({}) is None


class Rows:
    """Examples of known lengths, which remember who was read."""

    def __init__(self, count: int):
        self.lengths = np.arange(count, dtype=np.int32) % 13 + 3
        self.labelled, self.first_labelled = self.lengths - 1, np.zeros(count, np.int32)
        self.read: set[int] = set()

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        self.read.add(i)
        ids = np.full(self.lengths[i], i, np.int32)
        return {"input_ids": ids, "labels": ids}

    def segment(self, i):
        return self[i]


@pytest.mark.parametrize("packing", [False, True])
def test_the_parts_of_a_batch_are_the_batch_and_read_their_own_examples_only(packing):
    rows = Rows(100)
    plan = plan_batches(rows, Size(2, 4, 2), Order(0, True, 3), packing=packing, cutoff_len=32)
    for step in (0, plan.max_steps - 1):
        whole = plan.update(step)
        shape = plan.shape(step)
        cuts = [(0, shape.batch // 2), (shape.batch // 2, shape.batch)]
        rows.read.clear()
        halves, read = [], []
        for cut in cuts:
            halves.append(plan.update(step, cut))
            read.append(frozenset(rows.read))
            rows.read.clear()
        assert not read[0] & read[1]
        assert read[0] | read[1] == set(plan.examples(step).tolist())
        for key, x in whole.items():
            if x.ndim:
                np.testing.assert_array_equal(np.concatenate([h[key] for h in halves], axis=1), x)
            else:
                assert all(h[key] == x for h in halves)


def test_a_part_of_an_update_may_hold_nothing():
    rows = Rows(1)
    plan = plan_batches(rows, Size(1, 2, 1), Order(0, True, 1), packing=False, cutoff_len=32)
    halves = [plan.update(0, (i, i + 1)) for i in range(2)]
    assert sorted(int(h["segment_ids"].sum()) for h in halves) == [0, rows.lengths[0]]


def test_rows_of_a_process_put_together_are_the_array():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    sharding, x = batch_sharding(mesh, accumulated=True), np.arange(3 * 8 * 5).reshape(3, 8, 5)
    assert arrays.own_rows(sharding, x.shape, axis=1) == (0, 8)
    np.testing.assert_array_equal(arrays.put_rows(x, 0, x.shape, 1, sharding), x)
    # As a process would that holds the devices of the second half.
    parts = list(sharding.devices_indices_map(x.shape).values())[4:]
    first, stop = arrays.span([part[1] for part in parts], 8)
    assert (first, stop) == (4, 8)
    mine = x[:, first:stop]
    for part in parts:
        np.testing.assert_array_equal(mine[arrays.shifted(part, first, x.shape, 1)], x[part])


def test_the_odd_one_out_is_named():
    same = {"jax": "0.10.2", "python": "3.11.7"}
    assert preflight.differences([same, same]) == []
    assert preflight.differences([same, same | {"jax": "0.9"}, same]) == [
        "jax: process 1 has 0.9, the others have 0.10.2"
    ]
    assert preflight.differences([same, same | {"jax": "0.9"}]) == ["jax: process 1 has 0.9, process 0 has 0.10.2"]
    assert "process 2 has None" in preflight.differences([same, same, {"jax": "0.10.2"}])[0]


def test_simulated_processes_get_their_devices_and_numbers():
    env = simulate.environment({"XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=8"}, 5, 2, 4, 1)
    assert env["XLA_FLAGS"].startswith("--a=1 --xla_force_host_platform_device_count=4 ")
    assert connect.find_address(env) == ("127.0.0.1:5", 2, 1)
    with pytest.raises(ConfigError, match="2x4"):
        simulate.parse("2*4")


# ---------------------------------------------------------------------- processes that do not train

MEETING = """
import logging, sys, time
from jtune.cli.faults import report_fault
from jtune.errors import DataError
from jtune.distributed import connect, exchange, processes, shutdown
connect.connect(command="jtune train case.yaml")
print("connected", flush=True)
with shutdown.together(lambda error: report_fault("train", error)):
    assert exchange.all_gather("number", str(processes.index())) == [str(i) for i in range(processes.count())]
    {body}
"""


def meet(body: str, processes: int = 3, present=None, **env) -> list[subprocess.Popen]:
    port = simulate.free_port()
    env = {"JTUNE_HEARTBEAT_TIMEOUT": "10", **env}
    return [
        subprocess.Popen(
            [sys.executable, "-c", MEETING.format(body=body)],
            env=simulate.environment(os.environ, port, processes, 1, i) | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in (range(processes) if present is None else present)
    ]


def ends(running: list[subprocess.Popen], within: float = 90) -> tuple[list[int], list[str]]:
    """Exit statuses and what was said on stderr; nobody may be left waiting."""
    deadline = time.monotonic() + within
    try:
        said = [p.communicate(timeout=max(1, deadline - time.monotonic()))[1] for p in running]
    finally:
        for p in running:
            p.kill()
    return [p.returncode for p in running], said


@pytest.mark.slow
def test_what_one_process_fails_of_ends_all_with_its_status():
    body = "if processes.index() == 1: raise DataError('no such file')\n    time.sleep(60)"
    codes, said = ends(meet(body))
    assert codes == [3, 3, 3], said
    assert "no such file" in said[1]
    assert "process 1 stopped: no such file" in said[0]
    assert "no such file" not in said[2], "process 0 speaks for all"


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_tells_the_others_before_it_waits_for_them(failing):
    body = f"""
    if processes.index() == {failing}:
        error = DataError('no such file')
        print(time.time(), flush=True)
        shutdown.last_work(error, lambda: exchange.barrier('saved'))
        raise error
    time.sleep(120)"""
    running = meet(body.strip(), processes=2)
    for p in running:
        assert p.stdout.readline() == "connected\n"
    failed = float(running[failing].stdout.readline())
    codes, said = ends(running, within=60)
    assert codes == [3, 3], said
    assert time.time() - failed < 30
    assert f"process {failing} stopped: no such file" in said[0] or failing == 0
    assert "no such file" in said[0]


def test_in_one_process_last_work_is_done_and_what_it_fails_of_is_said(caplog, monkeypatch):
    monkeypatch.setattr(shutdown.log, "propagate", True)
    done = []
    shutdown.last_work(ValueError("first"), lambda: done.append(1))

    def fail(message):
        raise OSError(message)

    shutdown.last_work(ValueError("first"), lambda: fail("second"))
    shutdown.last_work(ValueError("first"), lambda: fail("first"))
    assert (done, caplog.messages) == ([1], ["second"])


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_though_they_wait_for_nothing(killed):
    running = meet("time.sleep(80)")
    for p in running:
        assert p.stdout.readline() == "connected\n"
    running[killed].kill()
    codes, said = ends(running, within=60)
    codes.pop(killed)
    assert codes == [70, 70], said
    assert "start it again on every host: jtune train case.yaml" in said[2]


@pytest.mark.slow
def test_peers_that_do_not_come_are_an_error():
    codes, said = ends(meet("", processes=2, present=[0], JTUNE_INIT_TIMEOUT="2"))
    assert codes == [3], said
    assert "process 0 of 2 waited 2 s for the others at 127.0.0.1" in said[0]


FALL_BACK = """
    import jax, jax.numpy as jnp, numpy as np
    from pathlib import Path
    from jax.sharding import NamedSharding, PartitionSpec as P
    from jtune.train import resume_json
    from jtune.train.checkpoint import Checkpointer
    from jtune.train.restore import restore_newest
    placed = NamedSharding(jax.make_mesh((2,), ("fsdp",)), P("fsdp"))
    x = jax.jit(lambda: jnp.arange(8.0), out_shardings=placed)()
    saver = Checkpointer(Path(sys.argv[1]))
    for step in (1, 2):
        saver.save(step, dict(x=x), dict(identity=dict()), lambda folder: None)
    saver.close()
    decode = resume_json.decode
    def fail_of_2(raw):
        found = decode(raw)
        if found["step"] == 2:
            raise ValueError("not what was written")
        return found
    if processes.index() == 1:
        resume_json.decode = fail_of_2
    restored = restore_newest(Path(sys.argv[1]), dict(x=jax.ShapeDtypeStruct((8,), jnp.float32, sharding=placed)))
    assert restored.path.name == "checkpoint-1", restored.path
    assert [int(v) for s in restored.state["x"].addressable_shards for v in s.data] == [
        4 * processes.index() + i for i in range(4)
    ]
"""


@pytest.mark.slow
def test_if_one_process_finds_a_checkpoint_damaged_all_take_the_one_before(tmp_path):
    codes, said = ends(meet(FALL_BACK.strip().replace("sys.argv[1]", repr(str(tmp_path))), processes=2))
    assert codes == [0, 0], said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2.damaged"]


# ---------------------------------------------------------------------- processes that train


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return write_model(folder / "model"), write_data(folder / "data")


METHODS = {"full": {"finetuning_type": "full"}, "lora": {"finetuning_type": "lora"}}
# Nothing here is about speed, and programs are compiled once for each process.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JTUNE_HEARTBEAT_TIMEOUT": "20"}


def small_case(folder: Path, parts, method: str) -> Path:
    """8 updates of 8 examples, a checkpoint every third."""
    return case(folder, *parts, max_steps=8, eval_steps=4, mesh_fsdp=-1, cutoff_len=64, **METHODS[method])


@pytest.fixture(scope="module")
def alone(parts, tmp_path_factory):
    """`alone(method)`: the output folder of the run in one process, made once."""
    made = {}

    def of(method):
        if method not in made:
            path = small_case(tmp_path_factory.mktemp("alone"), parts, method)
            done = train(path)
            assert done.returncode == 0, done.stdout + done.stderr
            made[method] = path.parent / "out"
        return made[method]

    return of


def start(path: Path, layout: str, *overrides: str, each=None) -> list[subprocess.Popen]:
    """The processes of a run, their output in files beside the YAML; `each(i)`: more options for Popen."""
    processes, devices = simulate.parse(layout)
    port = simulate.free_port()
    batch = f"per_device_train_batch_size={4 // (processes * devices)}"
    running = []
    for i in range(processes):
        env = simulate.environment(os.environ, port, processes, devices, i) | QUICK
        more = each(i) if each else {}
        words = [*command(path, batch, *overrides), *more.pop("words", ())]
        with open(path.parent / f"process-{i}.log", "w") as log:
            running.append(subprocess.Popen(words, env=env, stdout=log, stderr=log, **more))
    return running


def logs(path: Path) -> str:
    return "\n".join(p.read_text() for p in sorted(path.parent.glob("process-*.log")))


def finish(path: Path, running: list[subprocess.Popen], within: float = 240) -> list[int]:
    deadline = time.monotonic() + within
    try:
        return [p.wait(max(1, deadline - time.monotonic())) for p in running]
    except subprocess.TimeoutExpired:
        raise AssertionError("left waiting:\n" + logs(path)) from None
    finally:
        for p in running:
            p.kill()


def when(path: Path, running: list[subprocess.Popen], ready) -> None:
    deadline = time.monotonic() + 240
    while not ready() and time.monotonic() < deadline:
        assert all(p.poll() is None for p in running), logs(path)
        time.sleep(0.02)


def logged(folder: Path) -> int:
    file = folder / "trainer_log.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def assert_same_run(a: Path, b: Path) -> None:
    """Losses to 1e-5, the same updates, the same files and the same weights but for rounding."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "epoch", "eval_loss")
    ours, theirs = curve(a, *keys), curve(b, *keys)
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs):
        assert [v for v in x if v is not None] == pytest.approx([v for v in y if v is not None], rel=1e-5)
    assert state(a)["global_step"] == state(b)["global_step"]
    names = lambda folder: {p.name for p in folder.iterdir() if not p.name.startswith("checkpoint-")}
    assert names(a) == names(b)
    for name in ("config.json", "adapter_config.json", "tokenizer.json"):
        if (a / name).exists():
            assert json.loads((a / name).read_text()) == json.loads((b / name).read_text())
    for file in a.glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(b / file.name)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_simulated_processes_train_as_one_does(parts, alone, tmp_path):
    path = small_case(tmp_path, parts, "full")
    words = command(path, "per_device_train_batch_size=1", "--simulate", "2x2")
    done = subprocess.run(words, env=os.environ | QUICK, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 x cpu in 2 processes (fsdp 4)" in done.stdout
    assert "step 8/8" in done.stdout
    assert "step" not in done.stderr
    assert_same_run(alone("full"), tmp_path / "out")


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_70_and_fewer_devices_go_on(parts, alone, tmp_path):
    path = small_case(tmp_path, parts, "full")
    running = start(path, "2x2", "overwrite_output_dir=true", "hf_hub_token=secret-on-line")
    when(path, running, (tmp_path / "out" / "checkpoint-3").is_dir)
    running[1].kill()
    killed = time.monotonic()
    assert finish(path, running, within=100) == [70, -signal.SIGKILL], logs(path)
    assert time.monotonic() - killed < 60
    said = (tmp_path / "process-0.log").read_text()
    printed = re.search(r"start it again on every host: jtune train (.*)\n(.*)", said)
    assert printed[1] == f"{path} per_device_train_batch_size=1 overwrite_output_dir=true overwrite_output_dir=false"
    assert printed[2] == "(not shown, to be given again: hf_hub_token)"
    assert "secret-on-line" not in logs(path)
    done = train(path, *printed[1].split()[1:], "per_device_train_batch_size=2", devices=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from" in done.stdout
    assert_same_run(alone("full"), tmp_path / "out")


FAULTY = """
import errno, sys, time
from jtune.cli.main import main
from jtune.distributed import connect
from jtune.commands import train
from jtune.train import output
name, place, only_final = {fault!r}
module = {{"output": output, "train": train}}[place]
work = getattr(module, name)

def faulty(*args, **more):
    if name == "place_batch" and args[0] < 4 or only_final and "checkpoint" in args[0].name:
        return work(*args, **more)
    print("failed at", time.time(), flush=True)
    raise OSError(errno.ENOSPC, "No space left on device")

if connect.find_address(__import__("os").environ).process == {process}:
    setattr(module, name, faulty)
sys.argv = ["jtune", "train", *sys.argv[1:]]
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "process"),
    [(("save_model", "output", False), 0), (("place_batch", "train", False), 1), (("save_model", "output", True), 0)],
    ids=["while saving", "in the data, a save in the background", "in the final save"],
)
def test_what_one_process_fails_of_ends_the_other_within_seconds(parts, tmp_path, fault, process):
    path = small_case(tmp_path, parts, "full")
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(fault=fault, process=process))
    port, running = simulate.free_port(), []
    for i in range(2):
        env = simulate.environment(os.environ, port, 2, 1, i) | QUICK
        env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), env.get("PYTHONPATH", "")])
        words = [sys.executable, str(script), str(path), "per_device_train_batch_size=2"]
        with open(tmp_path / f"process-{i}.log", "w") as log:
            running.append(subprocess.Popen(words, env=env, stdout=log, stderr=log))
    codes = finish(path, running)
    ended = time.time()
    said = [(tmp_path / f"process-{i}.log").read_text() for i in range(2)]
    assert codes[0] == codes[1] > 0, logs(path)
    assert codes[0] != 70
    assert ended - float(said[process].split("failed at ")[1].split()[0]) < 30
    assert "No space left on device" in said[0]
    if process:
        assert "process 1 stopped: No space left on device" in said[0]


@pytest.mark.slow
def test_a_signal_to_one_process_saves_on_all_and_exits_with_75(parts, alone, tmp_path):
    path = small_case(tmp_path, parts, "lora")
    running = start(path, "4x1", "save_steps=100")
    when(path, running, lambda: logged(tmp_path / "out") >= 2)
    running[2].send_signal(signal.SIGTERM)
    assert finish(path, running) == [75] * 4, logs(path)
    assert "the same command goes on" in (tmp_path / "process-0.log").read_text()
    assert (tmp_path / "process-1.log").read_text().replace("[Gloo]", "").count("\n") < 20
    done = train(path)  # with one process of one device, and the same examples in every update
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from" in done.stdout
    assert_same_run(alone("lora"), tmp_path / "out")


@pytest.mark.slow
def test_preflight_names_the_process_that_was_started_otherwise(parts, tmp_path):
    path = small_case(tmp_path, parts, "lora")
    running = start(path, "2x1", each=lambda i: {"words": ["learning_rate=1"]} if i == 1 else {})
    assert finish(path, running) == [2, 2], logs(path)
    said = (tmp_path / "process-0.log").read_text()
    assert "learning_rate: process 1 has 1.0, process 0 has 0.001" in said
    assert "reading" not in said


@pytest.mark.slow
def test_preflight_sees_that_the_output_folder_is_not_shared(parts, tmp_path):
    path = small_case(tmp_path, parts, "lora")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    root = str(Path(__file__).parents[2])

    def each(i):
        return {"cwd": str(elsewhere if i else tmp_path)}

    os.environ["PYTHONPATH"], before = root, os.environ.get("PYTHONPATH")
    try:
        running = start(path, "2x1", "output_dir=here", each=each)
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    assert finish(path, running) == [3, 3], logs(path)
    assert "process 1 does not see what process 0 has written" in (tmp_path / "process-0.log").read_text()


# ---------------------------------------------------------------------- processes that share the encoding of rows


def encoded_in(path: Path, cache: str, *words: str, layout: str | None = "2x1") -> subprocess.CompletedProcess:
    """A run, in two processes or one, whose rows are encoded in the folder `cache` beside the YAML."""
    env = (os.environ if layout else environment()) | QUICK | {"HF_DATASETS_CACHE": str(path.parent / cache)}
    words = [*command(path, *words), *(["--simulate", layout] if layout else [])]
    return subprocess.run(words, env=env, capture_output=True, text=True)


def part_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*-of-*.arrow") if p.name[:5] == "cache"}


@pytest.mark.slow
def test_two_processes_encode_each_its_share_once_and_train_on_the_rows_of_one(parts, tmp_path):
    path = case(tmp_path, *parts, max_steps=2, eval_steps=2, mesh_fsdp=-1, preprocessing_batch_size=10)
    one = encoded_in(path, "one", "output_dir=" + str(tmp_path / "alone"), "per_device_train_batch_size=2", layout=None)
    assert one.returncode == 0, one.stdout + one.stderr
    share = "per_device_train_batch_size=1"
    two = encoded_in(path, "two", share)
    assert two.returncode == 0, two.stdout + two.stderr
    assert "Aligning dates: 0 + 120 rows by the processes that share" in two.stdout  # one batch
    assert "Encoding: 50 + 58 rows by the processes that share" in two.stdout
    assert "Encoding: 10 + 2 rows by the processes that share" in two.stdout  # the rows that are held out
    files = part_files(tmp_path / "one")
    assert len(files) == 1 + 11 + 2
    assert part_files(tmp_path / "two") == files
    keys = ("step", "loss", "eval_loss")
    for ours, theirs in zip(curve(tmp_path / "out", *keys), curve(tmp_path / "alone", *keys), strict=True):
        assert [x for x in ours if x is not None] == pytest.approx([x for x in theirs if x is not None], rel=1e-5)
    again = encoded_in(path, "two", share, "output_dir=" + str(tmp_path / "again"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Encoding" not in again.stdout + again.stderr
    assert curve(tmp_path / "again", *keys) == curve(tmp_path / "out", *keys)


@pytest.mark.slow
def test_a_row_that_cannot_be_read_ends_both_processes_and_is_named(parts, tmp_path):
    lines = [json.dumps({"instruction": f"Say {n}.", "output": "x"}).encode() for n in range(2500)]
    lines[2100] = b'{"instruction": "Say \xe9.", "output": "x"}'
    (tmp_path / "latin.jsonl").write_bytes(b"\n".join(lines))
    path = case(tmp_path, *parts, dataset=str(tmp_path / "latin.jsonl"), mesh_fsdp=-1)
    done = encoded_in(path, "cache")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "exit statuses of the processes: 3, 3" in done.stderr
    said = [line for line in done.stderr.splitlines() if "latin.jsonl:2101: not UTF-8 at byte 22 of the line" in line]
    assert [line.startswith("[process 1]") for line in sorted(said)] == [True, False]
    assert "process 0 stopped: " in next(line for line in said if line[0] == "[")  # the first reads for both
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_column_that_most_rows_lack_is_named_once_whoever_read_it(parts, tmp_path):
    lines = [json.dumps({"instruction": f"Say {n}.", "output": "x" if n < 900 else None}) for n in range(2500)]
    (tmp_path / "lacking.jsonl").write_text("\n".join(lines))
    done = encoded_in(case(tmp_path, *parts, dataset=str(tmp_path / "lacking.jsonl"), mesh_fsdp=-1), "cache")
    assert done.returncode == 3, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("lacking.jsonl:901: nothing in column 'output'") == 1


@pytest.mark.slow
def test_those_who_share_a_folder_share_the_work_and_wait_for_who_works_only(tmp_path):
    body = f"""
    from pathlib import Path
    exchange.HEARTBEAT_TIMEOUT = 3.0
    team = exchange.process_group(Path({str(tmp_path)!r}) / str(processes.index() // 2))
    assert team.members == ((0, 1), (0, 1), (2,))[processes.index()], team
    assert team.is_partial
    order = Path({str(tmp_path)!r}) / "order"
    def slowly():
        time.sleep(1 - processes.index() % 2)
        print(processes.index(), file=order.open("a"), flush=True)
    team.first("write", slowly)
    def work(place, of, beat):
        for _ in range(6 * (processes.index() != 0)):
            time.sleep(1)
            beat()
        return 10 * of + place
    made = team.share("work", str(processes.index() // 2), work)
    assert made == ([20, 21] if processes.index() < 2 else [10]), made
    assert team.share("differ", str(processes.index()), lambda place, of, beat: of) == [1]
    exchange.all_gather("all", "here")
    team.share("hang", "x", lambda place, of, beat: time.sleep(60 * (processes.index() == 1)) or 0)
    time.sleep(60)"""
    codes, said = ends(meet(body.strip()), within=60)
    assert codes == [70, 70, 70], said
    assert "process 1 timed out at 'jtune/group-" in said[0]
    order = (tmp_path / "order").read_text().split()
    assert order.index("0") < order.index("1")
    assert not list(tmp_path.glob("*/.host-*"))
