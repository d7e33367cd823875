"""A job on TPU slices of a GKE cluster, as a JobSet. Prints the manifest, or applies it with kubectl.

    python -m launch.gke --name palm-8b --image REGION-docker.pkg.dev/P/R/palmjax --accelerator tpu-v5p-slice \\
        --topology 4x4x4 --hosts 16 --slices 2 -- train gin/exp/palm_8b.gin --gin.MODEL_DIR=gs://bucket/run

One pod a host. GKE and JobSet give the pods their addresses and ranks, also across slices. A pod that fails ends the
attempt, and JobSet starts all of them again, up to `--max_restarts` times: they go on from the newest checkpoint. A pod
that ends by a mistake in the configuration or by the run's own guard ends the JobSet (JobSet 0.6 or newer).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from launch import command


def manifest(options: argparse.Namespace, arguments: Sequence[str], added: Mapping[str, str]) -> dict[str, Any]:
    """The JobSet. terminationGracePeriodSeconds is the time that a preempted run has to save."""
    container = {
        "name": "palmjax",
        "image": options.image,
        # Kubernetes would put a variable's value for $(NAME).
        "command": [part.replace("$(", "$$(") for part in command.palmjax(arguments, options.python)],
        "env": [{"name": key, "value": value} for key, value in {**command.AUTO, **added}.items()],
        "resources": {"limits": {"google.com/tpu": options.chips_per_host}},
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": options.accelerator,
            "cloud.google.com/gke-tpu-topology": options.topology,
        },
        "containers": [container],
    }
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    job = {
        "parallelism": options.hosts,
        "completions": options.hosts,
        "backoffLimit": 0,
        "completionMode": "Indexed",
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": container["name"],
                        "operator": "In",
                        "values": [code for code in command.FINAL if code],
                    },
                }
            ]
        },
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            "namespace": options.namespace,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "rules": [{"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "slice", "replicas": options.slices, "template": {"spec": job}}],
        },
    }


def as_yaml(value: Any, indent: int = 0) -> str:
    """Block YAML of dicts, lists, strings and integers; strings in JSON's quotes, which are YAML's too."""
    pad = "  " * indent
    if isinstance(value, Mapping):
        lines = []
        for key, inner in value.items():
            nested = isinstance(inner, Mapping | list) and inner
            lines.append(f"{pad}{key}:" + (f"\n{as_yaml(inner, indent + 1)}" if nested else f" {json.dumps(inner)}"))
        return "\n".join(lines)
    if isinstance(value, list):
        return "\n".join(f"{pad}- {as_yaml(inner, indent + 1).lstrip()}" for inner in value)
    return pad + json.dumps(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns kubectl's exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.gke", description="TPU slices of a GKE cluster.")
    parser.add_argument("--name", required=True, help="of the JobSet")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--image", required=True, help="a container image with palmjax installed")
    parser.add_argument("--accelerator", required=True, help="node label, such as tpu-v5p-slice or tpu-v6e-slice")
    parser.add_argument("--topology", required=True, help="of a slice, such as 4x4x4")
    parser.add_argument("--hosts", type=int, required=True, help="hosts (virtual machines) of a slice")
    parser.add_argument("--chips_per_host", type=int, default=4)
    parser.add_argument("--slices", type=int, default=1)
    command.add_max_restarts(parser, 100)
    parser.add_argument(
        "--grace", type=int, default=300, help="seconds to save in before a preempted pod is killed (300)"
    )
    parser.add_argument("--service_account", help="Kubernetes service account that may use MODEL_DIR's bucket")
    parser.add_argument("--python", default="python3", help="Python in the image (python3)")
    parser.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="may be given several times")
    options, arguments = command.parse(parser, argv)
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
        parser.error(
            f"--name {options.name}: lower-case letters, digits and dashes, at most 40, as Kubernetes wants it"
        )
    text = as_yaml(manifest(options, arguments, command.pairs(options.env, parser)))
    if options.dry_run:
        print(text)
        return 0
    return command.submit(["kubectl", "apply", "-f", "-"], text)


if __name__ == "__main__":
    raise SystemExit(main())
