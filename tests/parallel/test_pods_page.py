"""The files that docs/pods.md shows: they parse, and what they say is what `initialize` reads."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen3_jax.parallel.launchers import find_place
from qwen3_jax.runs.resolve import resolve

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "pods.md").read_text("utf-8")


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
    assert job["parallelism"] == resolve(ROOT / container["command"][2]).run.mesh.processes


def test_the_jobset_starts_again_what_was_told_to_end():
    """What the run exits with is what the pods' rules read, and those are what the set's rules read by their place."""
    jobset: Any = yaml.safe_load(snippets("yaml")[0])
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    program, command, file, *words = container["command"]
    run = resolve(ROOT / file, words).run
    assert (program, command) == ("qwen3-jax", "train") and run.checkpoint.told_to_end > 0
    assert Path(run.output).is_relative_to(container["volumeMounts"][0]["mountPath"])
    assert [volume["name"] for volume in pod["volumes"]] == [container["volumeMounts"][0]["name"]]
    codes = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert [code["values"] for code in codes] == [[2], [run.checkpoint.told_to_end]]
    assert {code["containerName"] for code in codes} == {container["name"]}
    refused, told = jobset["spec"]["failurePolicy"]["rules"]
    (pattern,) = refused["onJobFailureMessagePatterns"]
    assert re.search(pattern, "failed with exit code 2 matching FailJob rule at index 0")
    assert not re.search(pattern, f"failed with exit code {run.checkpoint.told_to_end} matching FailJob rule at index 1")
    assert (refused["action"], told["action"]) == ("FailJobSet", "RestartJobSetAndIgnoreMaxRestarts")
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] > 30


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


@pytest.mark.parametrize("code, queued", [(0, False), (1, False), (75, True)])
def test_the_slurm_script_queues_again_what_was_told_to_end(tmp_path, code, queued):
    script = snippets("bash")[0]
    assert "#SBATCH --signal=TERM@" in script and "#SBATCH --requeue" in script and "checkpoint.told_to_end 75" in script
    (tmp_path / "srun").write_text(f"#!/bin/bash\nexit {code}\n")
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/queued\n')
    (tmp_path / "train.sbatch").write_text(script)
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", tmp_path / "train.sbatch"], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    assert (tmp_path / "queued").exists() == queued
    assert not queued or (tmp_path / "queued").read_text() == "requeue 7\n"
