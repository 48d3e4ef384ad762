"""Where the processes of a run are named: settings, environment variables, Slurm, Open MPI, TPU pods."""

import dataclasses
import ipaddress
import re
import socket
import zlib

from absl import logging

from llmos_jax.errors import ConfigError

# Slurm and MPI name no port: one in this range is derived from the job, so that two jobs on one host rarely meet.
_FIRST_PORT, _PORTS = 61_440, 4096
_TPU_PORT = 8482


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
    if coordinator is not None and processes is None and process_id is None and _ranks(environ):
        processes, process_id = _ranks(environ)  # started by srun or mpirun, with a coordinator of one's own choice
    elif all(value is None for value in given.values()):
        return None
    elif None in given.values():
        missing = ", ".join(name for name, value in given.items() if value is None)
        raise ConfigError(f"processes are named in part only: {missing} is missing; give all three, or none.")
    _split(coordinator, "distributed.coordinator")
    return Processes(coordinator, processes, process_id, None)


def _slurm(config, environ):
    """One task of a job step (`srun`)."""
    if "SLURM_STEP_NODELIST" not in environ or int(environ.get("SLURM_NTASKS", 1)) < 2:
        return None
    processes, process_id = _ranks(environ)
    is_one_node = int(environ.get("SLURM_STEP_NUM_NODES", 0)) == 1
    first = "127.0.0.1" if is_one_node else _first_node(environ["SLURM_STEP_NODELIST"])
    port = _FIRST_PORT + int(environ["SLURM_JOB_ID"]) % _PORTS
    # Several tasks on a node share its devices by their local number, unless Slurm has bound each to its own.
    tasks = re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    is_shared = int(tasks[0]) > 1 and not environ.get("SLURM_GPUS_PER_TASK") and environ.get("CUDA_VISIBLE_DEVICES")
    devices = [int(environ["SLURM_LOCALID"])] if is_shared else None
    return Processes(f"{first}:{port}", processes, process_id, None, devices)


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
    devices = [int(environ["OMPI_COMM_WORLD_LOCAL_RANK"])] if environ.get("CUDA_VISIBLE_DEVICES") else None
    return Processes(f"127.0.0.1:{_FIRST_PORT + zlib.crc32(job.encode()) % _PORTS}", processes, process_id, None, devices)


def _tpu(config, environ):
    """A host of a TPU slice, or of several: JAX asks the metadata server who the others are."""
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    is_many = "," in hosts or int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
    return Processes(None, None, None, None) if is_many or config.cluster == "tpu" else None


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
