"""The launchers: what the supervisor does with every exit code, and that the cluster scripts are well formed."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

# Stands for a whole gang: each call does the next line of a plan, in the run directory $RUN.
STAND_IN = """#!/bin/bash
line=$(head -n 1 "$RUN/plan"); sed -i 1d "$RUN/plan"; echo "$@" >>"$RUN/calls"
eval "$line"
"""


def supervise(directory, plan, *options, words=(), wait=True):
    (directory / "plan").write_text("\n".join(plan) + "\n")
    stand_in = directory / "stand_in"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    command = [sys.executable, "scripts/launch.py", f"--through={stand_in}", "--pause=0.05", *options, "--"]
    command += [f"--workdir={directory}", "--config=experiments/gpt.py:smoke", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"RUN": str(directory)})
    if not wait:
        return process
    _, text = process.communicate(timeout=60)
    assert "Traceback" not in text, text
    return process.returncode, text, (directory / "calls").read_text().count("\n")


def reach(step):
    return f"""echo '{{"step": {step}, "time_seconds": 1.0}}' >>"$RUN/metrics.jsonl"; exit 75"""


ERROR = json.dumps({"class": "CheckpointError", "what": "none is intact", "exit_code": 65, "process": 3})


@pytest.mark.parametrize(
    ("plan", "code", "calls"),
    [
        (["exit 0"], 0, 1),
        (["exit 42", "exit 42", "exit 42", "exit 42", "exit 42", "exit 0"], 0, 6),  # preempted is no failure
        (["exit 75", "exit 1", "kill -9 $$", "exit 0"], 0, 4),
        (["exit 75"] * 9, 75, 4),
        ([reach(1), "exit 75", "exit 75", reach(2), "exit 75", "exit 75", "exit 0"], 0, 7),  # a new step counts anew
        ([reach(7)] * 9, 75, 5),  # the same step again is none
        (["exit 78", "exit 0"], 78, 1),
        ([f"echo '{ERROR}' >&2; exit 65", "exit 0"], 65, 1),
        (["touch $RUN/DONE.json; exit 75", "exit 0"], 0, 1),  # trusted over exit codes
        (["mkdir -p $RUN/checkpoints/30; exit 75", *["exit 75"] * 9], 75, 5),
    ],
)
def test_what_follows_each_exit_code(plan, code, calls, tmp_path):
    got, text, called = supervise(tmp_path, plan)
    assert (got, called) == (code, calls), text
    if code == 65:
        assert "given up, starting again does not help: process 3: CheckpointError: none is intact" in text
    if code == 75:
        assert "given up after 3 restarts without a new step" in text


def test_pauses_grow_and_an_old_marker_is_not_trusted(tmp_path):
    marker = tmp_path / "DONE.json"
    marker.touch()
    os.utime(marker, (1, 1))
    _, text, _ = supervise(tmp_path, ["exit 75"] * 9)
    assert re.findall(r"starting again in ([\d.]+) s", text) == ["0.05", "0.1", "0.2"]


def test_the_whole_command_line_is_passed_on(tmp_path):
    supervise(tmp_path, ["exit 0"], words=["--config.train.steps=3", "--workdir=ignored"])
    call = shlex.split((tmp_path / "calls").read_text())
    assert call[1:4] == ["-m", "llmos_jax.main", f"--workdir={tmp_path}"] and "--config.train.steps=3" in call


def test_asked_to_stop_it_passes_that_on_and_waits(tmp_path):
    plan = ["trap 'echo saved >>$RUN/saved; exit 42' TERM; touch $RUN/up; while true; do sleep 0.05; done", "exit 0"]
    process = supervise(tmp_path, plan, wait=False)
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 42 and (tmp_path / "saved").exists()
    assert (tmp_path / "calls").read_text().count("\n") == 1
    process.stderr.close()


def test_a_command_may_ask_them_to_stop(tmp_path):
    """A cluster's launcher may not pass signals on: Slurm's srun ends its tasks."""
    plan = ["trap '' TERM; touch $RUN/up; while [ ! -e $RUN/asked ]; do sleep 0.05; done; exit 42"]
    process = supervise(tmp_path, plan, f"--stop=touch {tmp_path}/asked", wait=False)
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 42
    process.stderr.close()


def test_what_does_not_leave_is_killed(tmp_path):
    plan = ["trap '' TERM; touch $RUN/up; while true; do sleep 0.05; done"]
    process = supervise(tmp_path, plan, "--grace=0.1", wait=False)
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 75  # it has not saved
    assert "ended with -9" in process.stderr.read()
    process.stderr.close()


@pytest.mark.parametrize("path", ["scripts/slurm.sbatch", "scripts/tpu_pod"])
def test_shell_scripts_are_well_formed(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=os.path.dirname(sys.executable))
    if shellcheck:
        done = subprocess.run([shellcheck, "-S", "warning", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    assert os.access(path, os.X_OK)


def test_jobset_has_what_is_required():
    job = yaml.safe_load(pathlib.Path("scripts/jobset.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet") and job["metadata"]["name"]
    (replicated,) = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"] and spec["backoffLimit"] == 0
    # Exit codes that must not be tried again end the set; everything else starts it again.
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and set(rule["onExitCodes"]["values"]) == {78, 65}
    (policy,) = job["spec"]["failurePolicy"]["rules"]
    assert policy["action"] == "FailJobSet" and policy["onJobFailureReasons"] == ["PodFailurePolicy"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # what a pod failure policy demands
    (container,) = pod["containers"]
    assert container["image"] and container["resources"]["limits"]["google.com/tpu"]
    assert "--config.distributed.cluster=tpu" in container["args"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_tpu_pod_calls_gcloud(tmp_path):
    fake = tmp_path / "gcloud"
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$*" >>"$CALLS"\n[[ $* = *describe* ]] && echo "${STATE:-ACTIVE}"; true\n')
    fake.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "TPU_NAME": "pod", "TPU_ZONE": "z",
        "TPU_TYPE": "v5p-32", "TPU_VERSION": "v2-alpha-tpuv5", "TPU_SHARED": "10.0.0.2:/share",
    }  # fmt: skip

    def tpu_pod(*words):
        (tmp_path / "calls").write_text("")
        done = subprocess.run(["scripts/tpu_pod", *words], env=environment, capture_output=True, text=True, timeout=60)
        return done, (tmp_path / "calls").read_text()

    done, calls = tpu_pod("create", "--spot")
    assert done.returncode == 0 and "queued-resources create pod --node-id=pod --zone=z" in calls and "--spot" in calls
    environment["STATE"] = "FAILED"
    assert tpu_pod("create")[0].returncode == 75  # else it would wait for ever
    done, calls = tpu_pod("install")
    assert done.returncode == 0, done.stderr
    assert "tpu-vm scp" in calls and "--worker=all" in calls and "mount 10.0.0.2:/share /shared" in calls
    done, calls = tpu_pod("run", "--config=experiments/gpt.py:size=124m,data=a b", "--workdir=/shared/x")
    assert "scripts/launch.py" in calls and "--config.distributed.cluster=tpu" in calls and r"data=a\ b" in calls
    assert "--worker=0 --command=tail" in tpu_pod("watch")[1] and "kill -TERM" in tpu_pod("stop")[1]
    done, calls = tpu_pod("dance")
    assert done.returncode == 78 and "usage" in done.stderr and not calls
    del environment["TPU_NAME"]
    assert "name the slice" in tpu_pod("watch")[0].stderr
