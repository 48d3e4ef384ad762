"""Where the processes of a run are named: settings, environment variables, Slurm, Open MPI, TPU pods."""

import dataclasses
import ipaddress
import re
import socket
import urllib.request
import zlib

from absl import logging

from llmos_jax.compute import host
from llmos_jax.errors import ConfigError

# Slurm and MPI name no port: one in this range is derived from the job, so that two jobs on one host rarely meet.
_FIRST_PORT, _PORTS = 61_440, 4096
_TPU_PORT = 8482
_METADATA_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Processes:
    """What the JAX distributed runtime must know; None stands for what it finds out by itself (TPU pods).

    coordinator: HOST:PORT of process 0. bind_address: HOST:PORT that process 0 listens on. local_devices: device numbers of
    this process, None: all that it sees.
    """

    coordinator: str | None
    processes: int | None
    process_id: int | None
    bind_address: str | None
    local_devices: list[int] | None = None


def find_processes(config, environ):
    """Returns the Processes that a DistributedConfig and the environment name, or None for a run of one process.

    Raises ConfigError when a part is missing, or does not go together.
    """
    finders = {"explicit": _explicit, "slurm": _slurm, "mpi": _mpi, "tpu": _tpu}
    if config.cluster == "none":
        return None
    if config.cluster != "auto":
        found = finders[config.cluster](config, environ)
        if found is None:
            raise ConfigError(f"distributed.cluster={config.cluster}: its environment variables are not set here.")
    else:
        found = next(filter(None, (find(config, environ) for find in finders.values())), None)
    if found is None:
        return None
    if found.processes is not None and not 0 <= found.process_id < found.processes:
        raise ConfigError(
            f"process number {found.process_id} of {found.processes}: distributed.process_id (or JAX_PROCESS_ID) counts from 0."
        )
    return None if found.processes == 1 else _with_bind_address(found, config, environ)


def _explicit(config, environ):
    given = {
        "distributed.coordinator (JAX_COORDINATOR_ADDRESS)": config.coordinator or environ.get("JAX_COORDINATOR_ADDRESS"),
        "distributed.processes (JAX_PROCESS_COUNT)": _number(config.processes, environ, "JAX_PROCESS_COUNT"),
        "distributed.process_id (JAX_PROCESS_ID)": _number(config.process_id, environ, "JAX_PROCESS_ID"),
    }
    coordinator, processes, process_id = given.values()
    devices = None
    if coordinator is not None and processes is None and process_id is None and _ranks(environ):
        processes, process_id = _ranks(environ)  # started by srun or mpirun, with a coordinator of one's own choice
        devices = _share_of_gpus(environ)
    elif all(value is None for value in given.values()):
        return None
    elif None in given.values():
        missing = ", ".join(name for name, value in given.items() if value is None)
        raise ConfigError(f"processes are named in part only: {missing} is missing; give all three, or none.")
    _split(coordinator, "distributed.coordinator")
    return Processes(coordinator, processes, process_id, None, devices)


def _slurm(config, environ):
    """One task of a job step (`srun`)."""
    if "SLURM_STEP_NODELIST" not in environ or int(environ.get("SLURM_NTASKS", 1)) < 2:
        return None
    processes, process_id = _ranks(environ)
    is_one_node = int(environ.get("SLURM_STEP_NUM_NODES", 0)) == 1
    first = "127.0.0.1" if is_one_node else _first_node(environ["SLURM_STEP_NODELIST"])
    port = _FIRST_PORT + int(environ["SLURM_JOB_ID"]) % _PORTS
    return Processes(f"{first}:{port}", processes, process_id, None, _share_of_gpus(environ))


def _mpi(config, environ):
    """One rank of Open MPI on one host; more hosts need a coordinator that is named."""
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) < 2:
        return None
    processes, process_id = _ranks(environ)
    if int(environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 0)) != processes:
        raise ConfigError(
            "Open MPI does not tell where rank 0 is: name distributed.coordinator=HOST:PORT (or JAX_COORDINATOR_ADDRESS)."
        )
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid") or "0"
    coordinator = f"127.0.0.1:{_FIRST_PORT + zlib.crc32(job.encode()) % _PORTS}"
    return Processes(coordinator, processes, process_id, None, _share_of_gpus(environ))


def _tpu(config, environ):
    """A host of a TPU slice, or of several: JAX finds out who the others are, in the environment or the metadata server."""
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    is_many = "," in hosts or int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
    if config.cluster == "tpu" or is_many or (not hosts and _is_many_by_metadata(environ)):
        return Processes(None, None, None, None)
    return None


def _is_many_by_metadata(environ):
    """Whether the metadata server of this Cloud TPU VM names more hosts than this one: there an ssh session is told nothing.

    GKE, which sets the environment, and hosts without TPU chips are not asked for.
    """
    if "TPU_SKIP_MDS_QUERY" in environ or not host.has_tpu():
        return False
    server = environ.get("GCE_METADATA_IP", "metadata.google.internal")

    def ask(name):
        address = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
        request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:
                return answer.read().decode()
        except OSError as error:  # Colab, or a TPU of one's own
            logging.info("no hosts of a TPU slice are named at %s (%s)", address, error)
            return ""

    slices = re.search(r"^\s*MEGASCALE_NUM_SLICES\s*:\s*'?(\d+)", ask("tpu-env"), re.MULTILINE)
    return "," in ask("worker-network-endpoints") or (slices is not None and int(slices[1]) > 1)


def _ranks(environ):
    """Returns (count, number) of the launchers that set both, or None."""
    for size, rank in (
        ("SLURM_NTASKS", "SLURM_PROCID"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        ("PMI_SIZE", "PMI_RANK"),
    ):
        if size in environ and rank in environ:
            return int(environ[size]), int(environ[rank])
    return None


def _local_ranks(environ):
    """Returns (count, number) of the processes that a launcher has started on this host."""
    for size, rank in (
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    ):
        if size in environ and rank in environ:
            return int(environ[size]), int(environ[rank])
    if "SLURM_LOCALID" not in environ:
        return 1, 0
    tasks = []  # of every node, from a text such as 2(x3),1
    for count, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1")):
        tasks += [int(count)] * int(nodes or 1)
    return tasks[min(int(environ.get("SLURM_NODEID") or 0), len(tasks) - 1)], int(environ["SLURM_LOCALID"])


def _share_of_gpus(environ):
    """Returns which of the GPUs that this process sees are its own, where all processes of a host see the same; None: all.

    Numbers count from the first one that it sees. ConfigError when they can't be shared evenly.
    """
    count, number = _local_ranks(environ)
    if count == 1 or environ.get("JAX_LOCAL_DEVICE_IDS") or environ.get("JAX_PLATFORMS") == "cpu":
        return None
    visible = host.visible_gpus(environ)
    on_node = int(environ.get("SLURM_GPUS_ON_NODE") or 0)
    is_bound = bool(environ.get("SLURM_GPUS_PER_TASK")) or visible < on_node
    if not is_bound and visible < count and "CUDA_VISIBLE_DEVICES" in environ and not on_node:
        is_bound = visible < host.visible_gpus({})  # by a script around this process
    if not visible or is_bound:
        return None
    share = host.share_of_gpus(visible, count)
    return list(range(number * share, (number + 1) * share))


def _first_node(nodes):
    """Returns the first host of a Slurm node list: node[001-004,7],other -> node001."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    return found[1] + (found[2] or "")


def _number(value, environ, name):
    if value is not None or not environ.get(name):
        return value
    if not environ[name].isdigit():
        raise ConfigError(f"{name}={environ[name]!r} must be a whole number.")
    return int(environ[name])


def _with_bind_address(found, config, environ):
    """Only process 0 listens: on the address that its name stands for, never on all of the host's."""
    bind = config.bind_address or environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    if bind is not None:
        _split(bind, "distributed.bind_address")
    elif found.coordinator is None:
        bind = f"{_bracketed(_own_address())}:{environ.get('JAX_COORDINATOR_PORT') or _TPU_PORT}"
    elif found.process_id == 0:
        name, port = _split(found.coordinator, "distributed.coordinator")
        try:
            address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][4][0]
        except OSError as error:
            raise ConfigError(f"distributed.coordinator={found.coordinator}: {name} can't be resolved ({error}).") from None
        bind = f"{_bracketed(address)}:{port}"
    if bind is not None and _is_public(bind.rpartition(":")[0].strip("[]")):
        logging.warning("the coordinator listens on %s, which is no private address, and authenticates nobody.", bind)
    return dataclasses.replace(found, bind_address=bind)


def _split(address, name):
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{name}={address!r} must be HOST:PORT.")
    return host.strip("[]"), int(port)


def _own_address():
    """Returns the address of the interface that leads outward; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 9))
        return probe.getsockname()[0]


def _bracketed(address):
    return f"[{address}]" if ":" in address else address


def _is_public(address):
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False  # a name: resolved by the runtime
    return parsed.is_unspecified or not (parsed.is_private or parsed.is_loopback or parsed.is_link_local)
