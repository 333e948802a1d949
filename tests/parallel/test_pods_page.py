"""The files that docs/pods.md shows: they parse, and what they say is what `initialize` reads."""

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from qwen3_jax.parallel.launchers import find_place

PAGE = (Path(__file__).parents[2] / "docs" / "pods.md").read_text("utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_jobset_is_one_whole_slice():
    jobset: Any = yaml.safe_load(snippets("yaml")[0])
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    x, y, z = (int(side) for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == x * y * z
    assert job["completions"] == job["parallelism"] and job["completionMode"] == "Indexed"
    assert container["command"] == ["python", "train.py"]


def test_the_names_in_a_gpu_pod_give_its_place():
    jobset, container = (yaml.safe_load(text) for text in snippets("yaml"))
    labels = {"jobset-name": jobset["metadata"]["name"], "replicatedjob-name": jobset["spec"]["replicatedJobs"][0]["name"]}
    labels |= {"replicatedjob-replicas": "1", "job-index": "0"}
    environ = {"JOB_COMPLETION_INDEX": "3"}
    for variable in container["env"]:
        label = re.search(r"jobset.sigs.k8s.io/([a-z-]+)", str(variable.get("valueFrom")))
        environ[variable["name"]] = labels[label[1]] if label else variable["value"]
    place = find_place(environ)
    assert (place.source, place.count, place.id, place.coordinator) == ("JobSet", 4, 3, "train-workers-0-0.train:8482")
    assert f"`{place.coordinator.partition(':')[0]}`" in PAGE


def test_the_shell_reads_the_scripts(tmp_path):
    scripts = snippets("bash")
    assert len(scripts) == 2 and scripts[0].startswith("#!/bin/bash\n#SBATCH")
    for script in scripts:
        (tmp_path / "script").write_text(script)
        done = subprocess.run(["bash", "-n", tmp_path / "script"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    # Options stand before the first command, or Slurm passes over them.
    lines = scripts[0].splitlines()
    assert [line.startswith("#SBATCH") for line in lines].index(True) == 1
    assert all(line.startswith("#SBATCH --") for line in lines[1 : lines.index("set -euo pipefail")])
