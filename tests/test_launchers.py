"""The launchers: what the supervisor does with every exit code, and that the cluster scripts are well formed."""

import configparser
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


def wait_for(file):
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


SLOW_SAVER = "trap 'sleep 3; echo saved >>$RUN/saved; exit 42' TERM; touch $RUN/up; while true; do sleep 0.05; done"
DEAF = "trap 'touch $RUN/told' TERM; touch $RUN/up; while true; do sleep 0.05; done"


def test_asked_to_stop_it_passes_that_on_and_waits_for_a_slow_save(tmp_path):
    """A save takes longer than processes need to leave after a bad exit."""
    process = supervise(tmp_path, [SLOW_SAVER, "exit 0"], "--grace=0.1", wait=False)
    wait_for(tmp_path / "up")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 42 and (tmp_path / "saved").exists()
    assert (tmp_path / "calls").read_text().count("\n") == 1
    process.stderr.close()


def test_who_has_saved_first_does_not_hurry_the_others(tmp_path):
    plan = [SLOW_SAVER.replace("up", "$JAX_PROCESS_ID").replace("sleep 3", "sleep $((3 * JAX_PROCESS_ID))")] * 2
    process = supervise(tmp_path, plan, "--processes=2", "--grace=0.1", wait=False)
    wait_for(tmp_path / "0")
    wait_for(tmp_path / "1")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 42 and (tmp_path / "saved").read_text().count("saved") == 2
    process.stderr.close()


def test_a_process_that_dies_in_a_stop_ends_the_wait(tmp_path):
    plan = ["trap '[ $JAX_PROCESS_ID = 1 ] || exit 1' TERM; touch $RUN/$JAX_PROCESS_ID; while true; do sleep 0.05; done"] * 2
    process = supervise(tmp_path, plan, "--processes=2", "--grace=0.1", wait=False)
    wait_for(tmp_path / "0")
    wait_for(tmp_path / "1")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    process.stderr.close()


def test_a_command_may_ask_them_to_stop(tmp_path):
    """A cluster's launcher may not pass signals on: Slurm's srun ends its tasks."""
    plan = ["trap '' TERM; touch $RUN/up; while [ ! -e $RUN/asked ]; do sleep 0.05; done; exit 42"]
    process = supervise(tmp_path, plan, f"--stop=touch {tmp_path}/asked", wait=False)
    wait_for(tmp_path / "up")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 42
    process.stderr.close()


def test_what_does_not_leave_is_killed(tmp_path):
    process = supervise(tmp_path, [DEAF], "--stop-grace=0.6", wait=False)
    wait_for(tmp_path / "up")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 75  # it has not saved
    assert "ended with -9" in process.stderr.read()
    process.stderr.close()


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_ctrl_c_after_a_stop_kills(first, tmp_path):
    process = supervise(tmp_path, [DEAF], wait=False)
    wait_for(tmp_path / "up")
    process.send_signal(first)
    wait_for(tmp_path / "told")
    process.send_signal(signal.SIGTERM)  # says nothing new
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 75 and "ended with -9" in process.stderr.read()
    process.stderr.close()


def test_a_host_s_gpus_are_divided(tmp_path, nvidia_smi, monkeypatch):
    nvidia_smi(8)
    monkeypatch.delenv("JAX_PLATFORMS")
    plan = ["echo $JAX_LOCAL_DEVICE_IDS >>$RUN/ids"] * 2
    code, text, _ = supervise(tmp_path, plan, "--processes=2")
    assert code == 0 and sorted((tmp_path / "ids").read_text().split()) == ["0,1,2,3", "4,5,6,7"], text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,4")
    (tmp_path / "calls").write_text("")
    code, text, calls = supervise(tmp_path, plan, "--processes=2")
    assert (code, calls) == (78, 0) and "2 processes on this host can't share its 3 GPU(s) evenly" in text
    assert supervise(tmp_path, ["exit 0"] * 2, "--processes=2", "--devices=1")[0] == 0


def seconds_of(option, text):
    return float(re.search(rf"{option}[=:@ ]*(\d+)", text)[1])


def test_the_clusters_leave_time_to_save():
    """What kills comes after what waits: a large model takes minutes to end its step and to save."""
    assert seconds_of("--stop-grace", pathlib.Path("scripts/tpu_pod").read_text()) >= 1800
    assert seconds_of("terminationGracePeriodSeconds", pathlib.Path("scripts/jobset.yaml").read_text()) >= 1800
    slurm = pathlib.Path("scripts/slurm.sbatch").read_text()
    assert seconds_of("USR1", slurm) > seconds_of("--stop-grace", slurm) >= 600


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


def test_the_image_holds_what_the_jobset_starts(tmp_path):
    """The Dockerfile's folder is made by hand: what the JobSet's command names is found there, and installs."""
    lines = [line.split() for line in pathlib.Path("scripts/Dockerfile").read_text().splitlines()]
    for *sources, target in (words[1:] for words in lines if words[:1] == ["COPY"]):
        for source in map(pathlib.Path, sources):
            if source.is_dir():
                shutil.copytree(source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, tmp_path / target)
    (folder,) = [words[1] for words in lines if words[:1] == ["WORKDIR"]]
    job = yaml.safe_load(pathlib.Path("scripts/jobset.yaml").read_text())
    (container,) = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["workingDir"] == folder and container["command"] == ["python", "-m", "llmos_jax.main"]
    script = """
import sys
from llmos_jax import api, main
words, values, overrides = main._parse(["llmos", *sys.argv[1:]])
settings, _ = api.load_settings(values.config, overrides)
print(main.__file__, values.workdir, settings.model.layers)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script, *container["args"]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == [str(tmp_path / "llmos_jax/main.py"), "/shared/runs/gpt", "48"], done.stderr
    constraint = next(word for words in lines if words[:1] == ["RUN"] for word in words if word.startswith("constraints/"))
    declared = configparser.ConfigParser()
    declared.read(tmp_path / "setup.cfg")
    assert (tmp_path / constraint).is_file() and (tmp_path / "pyproject.toml").is_file()
    assert (tmp_path / declared["metadata"]["long_description"].removeprefix("file: ")).is_file()


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
    assert "LLMOS_EXTRAS=tpu llmos/scripts/llmos" in calls  # whatever the hosts' chips look like
    is_changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    assert ("what is changed since stays behind" in done.stderr) == bool(is_changed)
    done, calls = tpu_pod("run", "--config=experiments/gpt.py:size=124m,data=a b", "--workdir=/shared/x")
    assert "scripts/launch.py" in calls and "--config.distributed.cluster=tpu" in calls and r"data=a\ b" in calls
    assert "--worker=0 --command=tail" in tpu_pod("watch")[1] and "kill -TERM" in tpu_pod("stop")[1]
    done, calls = tpu_pod("dance")
    assert done.returncode == 78 and "usage" in done.stderr and not calls
    del environment["TPU_NAME"]
    assert "name the slice" in tpu_pod("watch")[0].stderr
