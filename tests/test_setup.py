"""The set-up commands: syntax, the choice of a Python, clear failures, nothing done twice."""

import os
import pathlib
import shutil
import subprocess

import pytest

SCRIPTS = [pathlib.Path(name) for name in ("scripts/environment.sh", "scripts/llmos", "scripts/test", ".ci/run")]


def bash(code, **environment):
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, env=environment, timeout=60)


def fake_python(folder, name, *, version_ok=True, has_venv=True):
    """A stand-in that answers the two questions that the search asks."""
    script = folder / name
    script.write_text(
        "#!/bin/bash\n"
        f'case "$2" in *version_info*) exit {0 if version_ok else 1};; *ensurepip*) exit {0 if has_venv else 1};; esac\n'
    )
    script.chmod(0o755)


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_syntax(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", "-x", "-S", "warning", path], capture_output=True).returncode == 0
    assert path.name == "environment.sh" or os.access(path, os.X_OK)


def search(folder, **environment):
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    return bash(
        f"source {pathlib.Path('scripts/environment.sh').absolute()}; find_python",
        PATH=f"{folder}:{tools}", HOME=str(folder), **environment,
    )  # fmt: skip


def test_the_tested_versions_come_first(tmp_path):
    for name in ("python3.13", "python3.12", "python3"):
        fake_python(tmp_path, name)
    assert search(tmp_path).stdout.strip() == "python3.12"


def test_old_ones_and_those_without_venv_are_passed_over(tmp_path):
    fake_python(tmp_path, "python3.11", has_venv=False)
    fake_python(tmp_path, "python3", version_ok=True)
    assert search(tmp_path).stdout.strip() == "python3"


def test_what_is_missing_is_said(tmp_path):
    fake_python(tmp_path, "python3", version_ok=False)
    done = search(tmp_path)
    assert done.returncode == 78 and "no Python >= 3.11 was found" in done.stderr


def test_missing_venv_is_said(tmp_path):
    fake_python(tmp_path, "python3.11", has_venv=False)
    done = search(tmp_path)
    assert done.returncode == 78 and "python3.11 lacks the venv module" in done.stderr


def test_a_named_python_is_the_only_one_tried(tmp_path):
    fake_python(tmp_path, "python3.11")
    done = search(tmp_path, LLMOS_PYTHON="/no/such/python")
    assert done.returncode == 78 and "LLMOS_PYTHON=/no/such/python" in done.stderr


def make_environment(folder):
    """A finished environment whose pip would fail if it were called."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text('#!/bin/bash\nif [ "$3" = --version ]; then exit 0; fi\necho "pip was called" >&2; echo 3.11; exit 1\n')
    python.chmod(0o755)
    source = f"source {pathlib.Path('scripts/environment.sh').absolute()}"
    stamp = bash(f"{source}; stamp test", **os.environ).stdout
    (folder / ".stamp-test").write_text(stamp)
    return f"export LLMOS_VENV={folder}; {source};"


def test_nothing_is_done_again(tmp_path):
    code = make_environment(tmp_path / "venv")
    for wanted in ("test", '""'):  # the environment of the tests serves plain runs, too
        done = bash(f"{code} hardware_extra() {{ :; }}; prepare_environment {wanted}; echo ready", **os.environ)
        assert done.stdout.strip() == "ready" and "installing" not in done.stderr


def test_a_changed_project_is_installed_again_and_a_failure_is_said(tmp_path):
    code = make_environment(tmp_path / "venv")
    (tmp_path / "venv" / ".stamp-test").write_text("other")
    done = bash(f"{code} hardware_extra() {{ :; }}; prepare_environment test; echo ready", **os.environ)
    assert done.returncode == 78 and "the installation failed" in done.stderr and "ready" not in done.stdout


@pytest.mark.parametrize(("chosen", "extras"), [({"LLMOS_EXTRAS": "gpu"}, "gpu"), ({"LLMOS_EXTRAS": ""}, ""), ({}, "tpu")])
def test_the_extra_of_the_hardware_can_be_chosen(chosen, extras):
    """A login node has no accelerator, and makes the environment of nodes that do."""
    code = f"source {pathlib.Path('scripts/environment.sh').absolute()}; has_google_vfio() {{ true; }}; hardware_extra"
    environment = {name: value for name, value in os.environ.items() if name != "LLMOS_EXTRAS"}
    assert bash(code, **environment | chosen).stdout.strip() == extras
