"""jtune on Kubernetes: fills in jobset.yaml, prints it, and creates it.

    python scripts/k8s/jobset.py [--dry-run] --image IMAGE --hosts 2 --gpus 8 train CASE.yaml [key=value ...]
    python scripts/k8s/jobset.py [--dry-run] --image IMAGE --tpu tpu-v5p-slice --topology 4x4x4 --hosts 16 --chips 4 ...

IMAGE holds jtune. CASE.yaml and output_dir are paths in the pods: mount a volume with --claim that all of them can
write to. RESTARTS says how often the run is started again at most (default 20).
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
PORT = 29500
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    text = yaml.safe_dump(fill(yaml.safe_load((HERE / "jobset.yaml").read_text()), args), sort_keys=False)
    print(redact(text, args.command), end="", flush=True)
    if args.dry_run:
        return 0
    print("+ kubectl create -f -", file=sys.stderr, flush=True)
    return subprocess.run(["kubectl", "create", "-f", "-"], input=text, text=True).returncode


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print, and create nothing")
    parser.add_argument("--image", required=True)
    parser.add_argument("--name", default="jtune", help="of the JobSet (default jtune)")
    parser.add_argument("--hosts", type=int, default=1, help="pods; of one slice, with --tpu")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--gpus", type=int, help="GPUs of each host")
    kind.add_argument("--tpu", help="GKE's accelerator label, such as tpu-v5p-slice")
    parser.add_argument("--topology", help="of the slice, such as 4x4x4")
    parser.add_argument("--chips", type=int, default=4, help="TPU chips of each host (default 4)")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices (default 1)")
    parser.add_argument("--claim", action="append", default=[], metavar="CLAIM:PATH", help="a volume; repeatable")
    parser.add_argument("--secret", action="append", default=[], help="whose keys become variables (HF_TOKEN)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="train CASE.yaml [key=value ...]")
    args = parser.parse_args(argv)
    if not args.command:
        parser.error("no jtune command given, such as: train CASE.yaml")
    if args.tpu and not args.topology:
        parser.error("--tpu needs --topology")
    if args.slices > 1 and not args.tpu:
        parser.error("--slices are of TPUs; GPU hosts are counted by --hosts")
    if not os.environ.get("RESTARTS", "20").isdecimal():
        parser.error(f"RESTARTS={os.environ['RESTARTS']}: expected a whole number")
    for claim in args.claim:
        if not re.fullmatch(r"[^:]+:/.*", claim):
            parser.error(f"--claim {claim}: expected CLAIM:PATH, PATH from /")
    return args


def fill(manifest: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The manifest of what is asked for; filled in as data, so that nothing in an argument can leave its place."""
    manifest["metadata"]["name"] = args.name
    spec = manifest["spec"]
    spec["failurePolicy"]["maxRestarts"] = int(os.environ.get("RESTARTS", 20))
    (replicated,) = spec["replicatedJobs"]
    replicated["replicas"] = args.slices
    job = replicated["template"]["spec"]
    job["completions"] = job["parallelism"] = args.hosts
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    container["image"] = args.image
    container["args"] = [escape(word) for word in args.command]
    limits = container["resources"]["limits"]
    if args.tpu:
        # jax finds the other hosts by what GKE tells each pod. One slice is one node pool.
        limits["google.com/tpu"] = args.chips
        pod["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": args.tpu,
            "cloud.google.com/gke-tpu-topology": args.topology,
        }
        exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        manifest["metadata"]["annotations"] = exclusive
    else:
        limits["nvidia.com/gpu"] = args.gpus
        container["env"] += rendezvous(args.name, replicated["name"], args.hosts)
    container["env"] += flags("tpu" if args.tpu else "gpus" if args.gpus * args.hosts > 1 else "gpu")
    container["envFrom"] = [{"secretRef": {"name": secret}} for secret in args.secret]
    for i, claim in enumerate(args.claim):
        name, path = claim.split(":", 1)
        container["volumeMounts"].append({"name": f"claim-{i}", "mountPath": path})
        pod["volumes"].append({"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": name}})
    return manifest


def rendezvous(name: str, job: str, hosts: int) -> list[dict[str, Any]]:
    """Where the pods find each other, by the names that JobSet gives them. (jax could ask Kubernetes, but would need
    the package `kubernetes`, and a service account that may read pods and jobs.)
    """
    if hosts == 1:
        return []
    return [
        {"name": "JTUNE_COORDINATOR", "value": f"{name}-{job}-0-0.{name}:{PORT}"},
        {"name": "JTUNE_NUM_PROCESSES", "value": str(hosts)},
        {"name": "JTUNE_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}},
    ]


def flags(platform: str) -> list[dict[str, str]]:
    """The variables that ../xla_flags.sh sets for a platform."""
    names = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    script = f'source "$1" && xla_flags {platform} && for n in {" ".join(names)}; do echo "${{!n-}}"; done'
    command = ["bash", "-c", script, "bash", str(HERE.parent / "xla_flags.sh")]
    values = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [{"name": name, "value": escape(value)} for name, value in zip(names, values, strict=True) if value]


def redact(text: str, command: list[str]) -> str:
    """The manifest as it is shown: without the values of arguments whose name says that they are secret (--secret keeps
    them out of the JobSet altogether)."""
    secret = re.compile(r"(--)?[\w.-]*(token|secret|passw\w*|api_?key|credentials?|webhook)([_-][\w-]*)?", re.I)
    for word, following in zip(command, [*command[1:], ""]):
        name, equals, value = word.partition("=")
        value = value if equals else following if word.startswith("--") and not following.startswith("--") else ""
        if secret.fullmatch(name) and value:
            text = text.replace(value, "***")
    return text


def escape(word: str) -> str:
    """Kubernetes replaces $(NAME) in arguments and values, and $$ by $."""
    return word.replace("$", "$$")


if __name__ == "__main__":
    sys.exit(main())
