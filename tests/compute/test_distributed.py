"""Processes find each other, agree, and say clearly when they can't."""

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from llmos_jax import errors
from llmos_jax.compute import clusters, distributed, host
from llmos_jax.compute.distributed import DistributedConfig
from llmos_jax.compute.faults import Faults
from llmos_jax.compute.watchdog import Watchdog, WatchdogConfig
from llmos_jax.errors import ConfigError, Preempted, Stuck
from tests.gang import TINY

SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "gpu[007-010],other",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "PMIX_NAMESPACE": "prterun-host-77@1",
}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:4000", "JAX_PROCESS_COUNT": "2", "JAX_PROCESS_ID": "0"}


def find(environ, **settings):
    return clusters.find_processes(DistributedConfig(**settings), environ)


def test_one_process_is_the_default():
    assert find({}) is None
    assert find(EXPLICIT, cluster="none") is None
    assert find(EXPLICIT | {"JAX_PROCESS_COUNT": "1"}) is None
    assert find({"TPU_WORKER_HOSTNAMES": "one"}) is None
    assert find(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None


def test_where_processes_are_named():
    explicit = find(EXPLICIT)
    assert (explicit.coordinator, explicit.processes, explicit.process_id) == ("127.0.0.1:4000", 2, 0)
    assert explicit.bind_address == "127.0.0.1:4000"  # never all interfaces
    typed = find({}, coordinator="localhost:5", processes=3, process_id=2)
    assert (typed.coordinator, typed.processes, typed.process_id, typed.bind_address) == ("localhost:5", 3, 2, None)
    slurm = find(SLURM)
    assert (slurm.coordinator, slurm.processes, slurm.process_id) == (f"gpu007:{61440 + 4242 % 4096}", 4, 2)
    assert find(SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0"}).bind_address.startswith("127.0.0.1:")
    mpi = find(MPI)
    assert (mpi.processes, mpi.process_id) == (2, 1) and re.fullmatch(r"127\.0\.0\.1:6\d{4}", mpi.coordinator)
    across = find(MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, coordinator="10.0.0.1:7000")
    assert (across.coordinator, across.processes, across.process_id) == ("10.0.0.1:7000", 2, 1)
    for tpu in (find({"TPU_WORKER_HOSTNAMES": "a,b"}), find({"MEGASCALE_NUM_SLICES": "2"}), find({}, cluster="tpu")):
        assert tpu.coordinator is None and tpu.processes is None
        assert tpu.bind_address.endswith(":8482") and not tpu.bind_address.startswith(("[::]", "0.0.0.0"))


def slurm_task(tasks, local, **more):
    return SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": str(local), "JAX_PLATFORMS": ""} | more


def mpi_rank(count, local, **more):
    sizes = {"OMPI_COMM_WORLD_SIZE": str(count), "OMPI_COMM_WORLD_LOCAL_SIZE": str(count)}
    return MPI | sizes | {"OMPI_COMM_WORLD_RANK": str(local), "OMPI_COMM_WORLD_LOCAL_RANK": str(local)} | more


FOUR, EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


@pytest.mark.parametrize(
    ("environ", "own"),
    [
        (slurm_task("1(x4)", 0, **FOUR), None),  # all that it sees
        (slurm_task("4", 2, **FOUR), [2]),
        (slurm_task("2(x4)", 1, **EIGHT), [4, 5, 6, 7]),  # else half of them would idle
        (slurm_task("1(x3),2", 1, **FOUR, SLURM_NODEID="3"), [2, 3]),
        (slurm_task("4", 2, **FOUR, SLURM_GPUS_PER_TASK="1"), None),
        (slurm_task("4", 2, CUDA_VISIBLE_DEVICES="0", SLURM_GPUS_ON_NODE="4"), None),  # bound to its own by Slurm
        (slurm_task("4", 2, **FOUR) | {"JAX_PLATFORMS": "cpu"}, None),
        (slurm_task("4", 2, CUDA_VISIBLE_DEVICES="NoDevFiles"), None),
        (mpi_rank(2, 1, **EIGHT), [4, 5, 6, 7]),
        (mpi_rank(2, 1), [4, 5, 6, 7]),  # eight attached
        (mpi_rank(2, 1, CUDA_VISIBLE_DEVICES="1"), None),  # by a script around it
        (mpi_rank(2, 1, JAX_LOCAL_DEVICE_IDS="3"), None),
        (mpi_rank(2, 1) | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:70"}, [4, 5, 6, 7]),
    ],
)
def test_processes_of_a_host_share_its_gpus_evenly(environ, own, nvidia_smi):
    nvidia_smi(8)
    assert find(environ).local_devices == own


@pytest.mark.parametrize("environ", [slurm_task("3", 0, **FOUR), mpi_rank(3, 0), slurm_task("2", 0, SLURM_GPUS_ON_NODE="1")])
def test_gpus_that_can_not_be_shared_evenly_are_refused(environ, nvidia_smi):
    nvidia_smi(1 if "SLURM_GPUS_ON_NODE" in environ else 8)
    with pytest.raises(ConfigError, match=r"\d processes on this host can't share its \d GPU\(s\) evenly: start 1"):
        find(environ)


def test_an_accelerator_that_jax_can_not_use_is_not_passed_over(nvidia_smi, monkeypatch):
    import jax

    from llmos_jax.compute import devices

    nvidia_smi(2)
    devices.refuse_idle_accelerator()  # JAX_PLATFORMS=cpu asks for the CPU
    monkeypatch.setattr(type(jax.config), "jax_platforms", property(lambda self: None), raising=False)
    with pytest.raises(ConfigError, match=r"2 x NVIDIA GPU attached, .*llmos-jax\[gpu\]"):
        devices.refuse_idle_accelerator()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    devices.refuse_idle_accelerator()
    monkeypatch.setattr(host, "has_tpu", lambda: True)
    with pytest.raises(ConfigError, match=r"TPU attached, .*llmos-jax\[tpu\]"):
        devices.refuse_idle_accelerator()


def test_tpu_chips_are_found_as_old_and_new_hosts_show_them(tmp_path):
    assert not host.has_tpu(tmp_path)
    (tmp_path / "dev" / "accel").mkdir(parents=True)  # a laptop's NPU
    device = tmp_path / "sys/bus/pci/drivers/vfio-pci/0000:00:05.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    assert not host.has_tpu(tmp_path)
    (device / "vendor").write_text("0x1ae0\n")
    assert host.has_tpu(tmp_path)
    (device / "vendor").unlink()
    (tmp_path / "dev" / "accel0").touch()
    assert host.has_tpu(tmp_path)


@pytest.fixture
def metadata_server():
    """Returns what starts a stand-in for a Cloud TPU VM's metadata server, which answers {attribute: text}; its address."""
    servers = []

    def start(attributes):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                text = attributes.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
                is_asked_well = text is not None and self.headers["Metadata-Flavor"] == "Google"
                self.send_response(200 if is_asked_well else 404)
                self.end_headers()
                self.wfile.write((text or "").encode())

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


ONE, TWO = "unknown:unknown:10.0.0.1", "unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2"


@pytest.mark.parametrize(
    ("attributes", "is_many"),
    [
        ({"worker-network-endpoints": TWO, "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\n"}, True),
        ({"worker-network-endpoints": ONE, "tpu-env": "A: 'b'\nMEGASCALE_NUM_SLICES: '2'\n"}, True),
        ({"worker-network-endpoints": ONE, "tpu-env": "MEGASCALE_NUM_SLICES: '1'\n"}, False),
        ({}, False),  # Colab
    ],
)
def test_hosts_of_a_cloud_tpu_slice_are_named_by_its_metadata_server(attributes, is_many, metadata_server, monkeypatch):
    """No environment variable tells an ssh session on one that there are others."""
    environ = {"GCE_METADATA_IP": metadata_server(attributes)}
    assert find(environ) is None  # no TPU is attached: nobody is asked
    monkeypatch.setattr(host, "has_tpu", lambda: True)
    found = find(environ)
    assert (found is not None) == is_many
    if is_many:
        assert found.coordinator is None and found.bind_address.endswith(":8482")
    assert find(environ | {"TPU_SKIP_MDS_QUERY": "1"}) is None
    assert find({"GCE_METADATA_IP": "127.0.0.1:1"}) is None


def test_devices_of_processes_that_have_not_joined_are_refused(tmp_path, monkeypatch):
    import jax

    from llmos_jax import api

    settings, _ = api.load_settings("experiments/gpt.py:smoke")
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ConfigError, match=r"belong to 4 processes, but 1 have joined: set distributed.cluster=tpu"):
        api.run_training(settings, tmp_path)


def test_a_host_without_a_tpu_runtime_is_no_host_of_a_slice(tmp_path):
    done = subprocess.run(
        llmos(tmp_path, distributed__cluster="tpu"), env=os.environ | {"TPU_SKIP_MDS_QUERY": "1"}, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 78 and "JAX finds no TPU runtime on this host" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("environ", "settings", "words"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, {}, "named in part only: distributed.processes .* distributed.process_id"),
        (EXPLICIT | {"JAX_PROCESS_ID": "2"}, {}, "process number 2 of 2"),
        (EXPLICIT | {"JAX_PROCESS_COUNT": "two"}, {}, "JAX_PROCESS_COUNT='two' must be a whole number"),
        (EXPLICIT, {"coordinator": "nowhere"}, "'nowhere' must be HOST:PORT"),
        (EXPLICIT, {"coordinator": "no.such.host.invalid:80"}, "no.such.host.invalid can't be resolved"),
        (EXPLICIT, {"bind_address": "10.0.0.1"}, "distributed.bind_address='10.0.0.1' must be HOST:PORT"),
        ({}, {"cluster": "slurm"}, "distributed.cluster=slurm: its environment variables are not set"),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, {}, "Open MPI does not tell where rank 0 is"),
    ],
)
def test_what_can_not_work_is_refused(environ, settings, words):
    with pytest.raises(ConfigError, match=words):
        find(environ, **settings)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def gang(commands, *, timeout=150, **environ):
    """Runs one command per process, in processes that know of each other; returns [(exit code, stdout, stderr)]."""
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_PROCESS_COUNT": str(len(commands)), "XLA_FLAGS": ""}
    environment = os.environ | shared | environ
    processes = [
        subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(number)}, stdout=-1, stderr=-1, text=True)
        for number, command in enumerate(commands)
    ]
    try:
        return [(process.communicate(timeout=timeout), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


def llmos(directory, **overrides):
    chosen = TINY | {"distributed.connect_seconds": 60} | {name.replace("__", "."): value for name, value in overrides.items()}
    flags = [f"--config.{name}={value}" for name, value in chosen.items()]
    return [sys.executable, "-m", "llmos_jax.main", "--config=experiments/gpt.py:smoke", f"--workdir={directory}", *flags]


AGREEMENT = """
import json, pathlib, sys
from llmos_jax import errors
from llmos_jax.compute import distributed
distributed.start(distributed.DistributedConfig(connect_seconds=60))
me, folder, seen = distributed.index(), pathlib.Path(sys.argv[1]), {}
seen["exchanged"] = [distributed.exchange("a", {"from": me, "turn": turn}) for turn in range(2)]
seen["first"] = distributed.from_first("b", lambda: f"{me} was asked")
try:
    distributed.from_first("c", lambda: (_ for _ in ()).throw(errors.DataError("the disk is wet")))
except errors.DataError as error:
    seen["error"] = str(error)
def prepare():
    there = (folder / "made").exists()
    with open(folder / "made", "a") as stream:
        stream.write(f"{me} ")
    return there
seen["found it made"] = distributed.leaders_first(folder, prepare)
def fail():
    raise errors.ConfigError(f"{me} can't prepare")
try:
    distributed.leaders_first(folder, fail)
except errors.ConfigError as error:
    seen["leader failed"] = str(error)
distributed.check_shared(folder)
own = folder / str(me)
own.mkdir()
try:
    distributed.check_shared(own)
except errors.ConfigError as error:
    seen["not shared"] = str(error)
print(json.dumps(seen), flush=True)
distributed.leave(65)
"""


def test_agreement(tmp_path):
    """Everyone gets the same answers, in the order of the processes, whoever is first; errors are everyone's."""
    ended = gang([[sys.executable, "-c", AGREEMENT, tmp_path]] * 3)
    assert [code for _, code in ended] == [65, 65, 65], ended
    seen = [json.loads(out) for (out, _), _ in ended]
    for one in seen:
        assert one["exchanged"] == [[{"from": n, "turn": turn} for n in range(3)] for turn in range(2)]
        assert (one["first"], one["error"], one["leader failed"]) == ("0 was asked", "the disk is wet", "0 can't prepare")
        assert re.search("is not the same folder on all processes: 1 .*, 2 .* can't see", one["not shared"])
    assert [one["found it made"] for one in seen] == [False, True, True]
    assert (tmp_path / "made").read_text().split()[0] == "0"
    assert {entry.name for entry in tmp_path.iterdir()} == {"made", "0", "1", "2"}


def test_an_unreachable_coordinator_is_said_in_time(tmp_path):
    """Nobody listens there; and a coordinator to whom nobody comes."""
    address = f"127.0.0.1:{free_port()}"
    for number, words in ((1, f"the coordinator {address} can't be reached"), (0, "not all processes were connected")):
        environ = EXPLICIT | {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(number)}
        start = time.monotonic()
        done = subprocess.run(
            llmos(tmp_path, distributed__connect_seconds=4),
            env=os.environ | environ,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 75 and words in done.stderr and "distributed.connect_seconds" in done.stderr, done.stderr
        assert "Check failure" not in done.stderr and "Traceback" not in done.stderr
        assert time.monotonic() - start < 60  # 4 s and the time to start Python


def test_processes_that_differ_are_named(tmp_path):
    """Settings and code are compared before anything else is done: exit code 78 from all."""
    other = tmp_path / "code"
    other.mkdir()
    subprocess.run(["cp", "-r", "llmos_jax", other / "llmos_jax"], check=True)
    with open(other / "llmos_jax" / "types.py", "a") as stream:
        stream.write("# changed\n")
    same, changed = llmos(tmp_path / "run"), llmos(tmp_path / "run", optim__learning_rate=0.5)
    script = f"import sys; sys.path.insert(0, {str(other)!r}); from llmos_jax.main import console; console()"
    ended = gang([same, [sys.executable, "-c", script, *changed[3:]], same])
    for (_, text), code in ended:
        assert code == 78, text
        assert re.search(
            r"ConfigError: processes differ from process 0 \(process 1: code.llmos_jax: .* -> .*, "
            r"settings.optim.learning_rate: 0.01 -> 0.5\)",
            text,
        ), text
    assert not (tmp_path / "run").exists()


def test_a_directory_in_use_is_refused_by_all(tmp_path):
    """Only process 0 asks for the lease; the others are told."""
    from llmos_jax.train.lease import RunDirectoryLease

    with RunDirectoryLease(tmp_path):
        ended = gang([llmos(tmp_path)] * 2, LLMOS_SUPERVISED="1")
    for number, ((_, text), code) in enumerate(ended):
        assert code == 78 and "RunDirectoryLocked" in text and f"in use by process {os.getpid()}" in text, text
        (line,) = [line for line in text.splitlines() if line.startswith('{"class"')]
        told = json.loads(line)
        assert (told["class"], told["exit_code"], told["process"]) == ("RunDirectoryLocked", 78, number)
        assert told["where"].startswith("llmos_jax/") and "change the setting" in told["what_to_do"]


def watch(tmp_path, *, seconds=0.2, **limits):
    ends = []
    config = WatchdogConfig(floor_seconds=0.3, first_step_seconds=0.3, **limits)
    with Watchdog(config, tmp_path / "log.txt", end=ends.append) as watchdog:
        yield watchdog
        deadline = time.monotonic() + seconds
        while not ends and time.monotonic() < deadline:
            time.sleep(0.01)
    yield ends


def test_a_phase_without_progress_ends_the_process(tmp_path):
    watching = watch(tmp_path, seconds=20.0)
    watchdog = next(watching)
    watchdog.step = 12
    watchdog.mark("step")
    (error,) = next(watching)
    assert isinstance(error, Stuck) and error.exit_code == 75
    assert re.fullmatch(r"no progress for \d\.\d s in phase step at step 12 \(limit 0.3 s\)", str(error))
    log = (tmp_path / "log.txt").read_text()
    assert "stacks of all threads" in log and "test_distributed.py" in log


def test_phases_have_limits_of_their_own(tmp_path):
    watching = watch(tmp_path, seconds=1.0, compile_seconds=60.0)
    next(watching).mark("compile")
    assert next(watching) == []
    watchdog = Watchdog(WatchdogConfig(floor_seconds=5.0, steps=10.0), tmp_path / "log.txt")
    assert watchdog.limit_seconds("step") == WatchdogConfig().first_step_seconds and watchdog.limit_seconds("prepare") is None
    assert watchdog.limit_seconds("init") == WatchdogConfig().init_seconds  # it waits for other hosts' chips, perhaps for ever
    for _ in range(3):
        watchdog.measured(8.0, steps=4)  # 2 s a step, 4 of them waited for at once
    assert watchdog.limit_seconds("step") == 10 * 2.0 * 4
    assert watchdog.limit_seconds("data_wait") == WatchdogConfig().data_seconds


def test_faults_strike_once_per_run_directory(tmp_path, monkeypatch):
    struck = []
    monkeypatch.setattr(os, "kill", lambda pid, number: struck.append((pid, number)))
    for _ in range(2):
        faults = Faults(tmp_path, 1, "kill:p1:step3, sigterm:p0:step3,freeze:p1:step5")
        for step in range(1, 7):
            faults.strike(step)
    assert struck == [(os.getpid(), 9), (os.getpid(), 19)]
    Faults(tmp_path / "other", 0, "").strike(3)
    Faults(tmp_path, 1, "kill:p1:save8").strike(8)  # waits in the background until the save has begun
    assert len(struck) == 2
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir(parents=True)
    deadline = time.monotonic() + 60
    while len(struck) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert struck[2] == (os.getpid(), 9)
    for text in ("kill", "kill:p1", "explode:p1:step3", "kill:1:3"):
        with pytest.raises(ConfigError, match="LLMOS_FAULT"):
            Faults(tmp_path, 0, text)


def test_errors_are_described_for_supervisors():
    try:
        find(EXPLICIT | {"JAX_PROCESS_ID": "7"})
    except ConfigError as error:
        told = errors.describe(error, process=7)
    assert told["class"] == "ConfigError" and told["exit_code"] == 78 and told["process"] == 7
    assert re.fullmatch(r"llmos_jax/compute/clusters.py:\d+", told["where"]) and "process number 7 of 2" in told["what"]
    assert errors.describe(Preempted("x"))["exit_code"] == 42 and errors.describe(ValueError("a\nb"))["what"] == "a"
    assert errors.exit_code(ValueError()) == 1


def test_only_words_of_lost_peers_count_as_such(monkeypatch):
    import jax

    lost = "UNKNOWN: Gloo all-reduce failed: Read error [127.0.0.1]:5282: Connection reset by peer"
    assert not distributed.is_peer_loss(ValueError(lost))  # a run of one process has no peers
    monkeypatch.setattr(distributed, "count", lambda: 2)
    assert distributed.is_peer_loss(ValueError(lost)) and distributed.is_peer_loss(jax.errors.JaxRuntimeError(lost))
    assert not distributed.is_peer_loss(ValueError("train.steps must be a whole number"))
    assert not distributed.is_peer_loss(ConfigError(lost))
