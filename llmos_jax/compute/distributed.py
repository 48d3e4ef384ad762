"""The processes of one run: how they find each other, agree, and leave.

`start` joins the JAX distributed runtime when settings or environment name more than one process (`clusters.py` tells
where they are named). Agreements go through the runtime's key-value store, not through device collectives: they work
before devices do, name who is missing, and let signals through. Nothing here is authenticated: the coordinator listens
on a private or loopback address only.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import platform
import re
import socket
import sys
import threading
import time

from absl import logging

from llmos_jax import errors
from llmos_jax.compute import host
from llmos_jax.compute.clusters import find_processes
from llmos_jax.config import differences, fingerprint, library_versions, setting, to_plain
from llmos_jax.errors import ConfigError, LlmosError, PeerLost

# Set by a supervisor that reads errors as JSON lines and restarts what it started.
SUPERVISED = "LLMOS_SUPERVISED"
_ROOT = "llmos"
_VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# JAX's own heartbeat ends a process by SIGABRT, without a word on where: it must come after the watchdog's.
_BACKSTOP = 3
# How long a leaving process waits for the others to be told.
_FAREWELL_SECONDS = 3.0
_PEER_ERRORS = re.compile(
    r"gloo|nccl|connection (reset|closed|refused)|socket closed|broken pipe|coordination|heartbeat|barrier|unavailable|"
    r"deadline_exceeded|aborted|all-?reduce|all-?gather|collective",
    re.IGNORECASE,
)
# The runtime's state, once `start` has run, and how often each agreement was asked for.
_runtime, _counts = {}, {}


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other; everything may be left to the cluster or the environment."""

    cluster: str = setting(
        "auto",
        help="where processes are named; auto: settings, JAX_* variables, Slurm, Open MPI, TPU pods, in this order",
        choices=("auto", "none", "explicit", "slurm", "mpi", "tpu"),
    )
    coordinator: str | None = setting(None, help="HOST:PORT of process 0; none: JAX_COORDINATOR_ADDRESS or the cluster's")
    processes: int | None = setting(None, help="how many; none: JAX_PROCESS_COUNT or the cluster's", at_least=1)
    process_id: int | None = setting(None, help="which one this is; none: JAX_PROCESS_ID or the cluster's", at_least=0)
    bind_address: str | None = setting(None, help="HOST:PORT that process 0 listens on; none: the coordinator's, resolved")
    heartbeat_seconds: float = setting(30.0, help="silence after which a process counts as lost", at_least=1.0)
    connect_seconds: float = setting(300.0, help="longest wait for the other processes at start", at_least=1.0)


def count():
    """Returns how many processes the run has; 1 when `start` found no others."""
    return _runtime["state"].num_processes if _runtime else 1


def index():
    """Returns which process this is, from 0."""
    return _runtime["state"].process_id if _runtime else 0


def client():
    """Returns the coordination service's client, or None in a run of one process."""
    return _runtime["state"].client if _runtime else None


def start(config, environ=os.environ):
    """Joins the other processes of the run, if settings or environment name any; returns whether there are any.

    Ends the process with exit code 75 and a clear line when they are not all there within `connect_seconds`: JAX itself
    would wait in native code, and abort. Raises ConfigError when only a part of what is needed is named.
    """
    import jax

    if jax.distributed.is_initialized():
        _adopt_runtime()
        return count() > 1
    found = find_processes(config, environ)
    if found is None:
        return False
    if environ.get(SUPERVISED):
        host.end_with_parent()
    where = found.coordinator or "the cluster's coordinator"
    logging.info("process %s of %s: connecting to %s", found.process_id, found.processes, where)
    # A process is preempted by one signal handler at a time: the loop starts JAX's when there is something to save.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_enable_recoverability", False)  # with it a frozen process is never noticed
    with _deadline(config.connect_seconds, _not_all_there(found, config)):
        if found.coordinator and found.process_id:
            _wait_for_coordinator(found.coordinator, config.connect_seconds)
        with _explained(found):
            jax.distributed.initialize(
                coordinator_address=found.coordinator,
                num_processes=found.processes,
                process_id=found.process_id,
                local_device_ids=found.local_devices,
                cluster_detection_method=None if found.coordinator is None else "deactivate",
                initialization_timeout=int(config.connect_seconds) + 60,  # the deadline above comes first
                heartbeat_timeout_seconds=int(config.heartbeat_seconds * _BACKSTOP),
                shutdown_timeout_seconds=60,
                coordinator_bind_address=found.bind_address,
            )
    _adopt_runtime()
    host.on_abort(_end_after_abort)
    return count() > 1


def check_count():
    """Raises ConfigError when the devices belong to another number of processes than have joined: it would wait for ever."""
    import jax

    if jax.process_count() != count():
        raise ConfigError(
            f"the devices that JAX sees belong to {jax.process_count()} processes, but {count()} have joined: set "
            "distributed.cluster=tpu and start the same command on every host of the slice."
        )


def exchange(name, value):
    """Returns the JSON values that all processes gave under `name`, in the order of the processes.

    Every process must call it, in the same order. There is no time limit: others may prepare data for hours. A process that
    dies is the watchdog's to notice.
    """
    if count() == 1:
        return [value]
    store, place = client(), _place(name)
    store.key_value_set(f"{place}/in/{index():06d}", json.dumps(value))
    if index() == 0:
        values = _poll(lambda: _all_there(store.key_value_dir_get(f"{place}/in")))
        store.key_value_set(f"{place}/out", json.dumps(values))
        return values
    return json.loads(_poll(lambda: _try_get(store, f"{place}/out")))


def from_first(name, function):
    """Returns, on every process, what `function()` returned on process 0: a JSON value.

    An LlmosError that it raised there is raised on every process. Every process must call it, in the same order.
    """
    if count() == 1:
        return function()
    store, place = client(), _place(name)
    if index():
        answer = json.loads(_poll(lambda: _try_get(store, place)))
        if "error" in answer:
            kind = getattr(errors, answer["error"], PeerLost)
            raise kind(answer["message"])
        return answer["value"]
    try:
        value = function()
    except Exception as error:
        known = type(error).__name__ if isinstance(error, LlmosError) else "PeerLost"
        message = str(error) if isinstance(error, LlmosError) else f"process 0 failed: {type(error).__name__}: {error}"
        store.key_value_set(place, json.dumps({"error": known, "message": message}))
        raise
    store.key_value_set(place, json.dumps({"value": value}))
    return value


def barrier(name):
    """Returns when every process has called it."""
    exchange(name, None)


def leaders_first(directory, function):
    """Returns `function()`, called first by one process of every file system that holds `directory`, then by the others.

    So what it leaves in `directory` is made once, however many processes share it. An error of a leader is raised everywhere.
    """
    if count() == 1:
        return function()
    token = from_first("leaders/token", lambda: os.urandom(8).hex())
    mine = pathlib.Path(directory) / f".process-{token}-{index():06d}"
    mine.touch()
    barrier("leaders/marked")
    is_leader = min(mine.parent.glob(f".process-{token}-*")).name == mine.name
    barrier("leaders/seen")
    mine.unlink()
    result, failure = None, None
    if is_leader:
        try:
            result = function()
        except LlmosError as error:
            failure = error
    told = exchange("leaders/done", failure and [type(failure).__name__, str(failure)])
    if failure is not None:
        raise failure
    for kind, message in filter(None, told):
        raise getattr(errors, kind)(message)
    return result if is_leader else function()


def check_shared(directory):
    """Raises ConfigError on every process when `directory` is not one that all of them see, naming those that don't."""
    if count() == 1:
        return
    directory = pathlib.Path(directory)
    mark = directory / f".shared-{from_first('shared/token', lambda: os.urandom(8).hex())}"
    from_first("shared/mark", lambda: mark.touch())
    deadline = time.monotonic() + 5.0  # network file systems show new files late
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [f"{number} ({name})" for number, name in enumerate(exchange("shared/seen", _unseen(mark))) if name]
    from_first("shared/done", lambda: mark.unlink())
    if blind:
        raise ConfigError(
            f"--workdir={directory} is not the same folder on all processes: {', '.join(blind)} can't see what process 0 "
            "writes there: name a folder on a file system that all hosts share."
        )


def check_same(settings, data=None):
    """Raises ConfigError on every process when settings, code or libraries differ between them, naming who and what.

    `data`: what identifies the data, once it is known.
    """
    if count() == 1:
        return
    mine = {
        "settings": {name: value for name, value in to_plain(settings).items() if name != "distributed"},
        "code": {"llmos_jax": _code_hash()},
        "versions": _versions(),
        "data": None if data is None else fingerprint(data),
    }
    first = from_first("same", lambda: mine)
    told = exchange("same/differences", differences(first, json.loads(json.dumps(mine)))[:5])
    if any(told):
        named = "; ".join(f"process {number}: {', '.join(lines)}" for number, lines in enumerate(told) if lines)
        raise ConfigError(f"processes differ from process 0 ({named}): start all with the same settings, code and libraries.")


def device_rows(mesh):
    """Returns the sharding of an array with one row for every device of `mesh`, the first device's first."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def is_peer_loss(error):
    """Whether an exception of JAX, in a run of many processes, says that another process is gone."""
    import jax

    if count() == 1 or not isinstance(error, (jax.errors.JaxRuntimeError, ValueError, RuntimeError)):
        return False
    return bool(_PEER_ERRORS.search(str(error)))


def peer_lost(error):
    """Returns the PeerLost that stands for such an exception."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return PeerLost(f"another process of this run is gone ({lines[0][:200] if lines else type(error).__name__})")


def leave(code):
    """Ends this process of a run of many, at once, with `code`: no exit handler may wait for a process that is gone.

    On success every process waits for the others, so that none takes the coordinator away. After an error that all
    processes share, process 0 goes last for the same reason.
    """
    import jax

    if code == errors.EXIT_DONE:
        try:
            jax.distributed.shutdown()
        except Exception as error:  # the work is done and on disk: whoever is gone now takes nothing along
            logging.warning("at the end: %s", str(error).splitlines()[0])
    elif code != errors.EXIT_RETRYABLE:
        _say_farewell()
    host.end_process(code)


def report(error):
    """Prints an error as people read it, on standard error; to a supervisor as one JSON line after it."""
    text = str(error) if isinstance(error, LlmosError) else str(error).strip().split("\n")[0]
    print(f"{type(error).__name__}: {text}", file=sys.stderr)
    if os.environ.get(SUPERVISED):
        print(json.dumps(errors.describe(error, process=index())), file=sys.stderr, flush=True)


def start_preemption_service():
    """Has JAX take SIGTERM, and agree with the other processes on the point at which all stop."""
    if count() == 1:
        return
    import jax

    state = _runtime["state"]
    if state.preemption_sync_manager is not None:  # of an earlier run in this process, whose handler is gone
        state.preemption_sync_manager.shutdown()
        state.preemption_sync_manager = None
    jax.config.update("jax_enable_preemption_service", True)
    state.initialize_preemption_sync_manager()


def _adopt_runtime():
    # The one use of a private name: JAX publishes no way to its key-value store (Orbax reaches for it in the same way).
    from jax._src.distributed import global_state

    _runtime["state"] = global_state


def _end_after_abort():
    """JAX aborts a process whose coordinator is gone, whichever of its threads notices first: that is a lost peer, too."""
    report(PeerLost("native code has aborted this process (see above): another process of this run is gone, most likely"))
    host.end_process(errors.EXIT_RETRYABLE)


def _place(name):
    """Returns a fresh place in the store: the same on every process that has called as often."""
    number = _counts.setdefault(name, itertools.count())
    return f"{_ROOT}/{name}/{next(number)}"


def _poll(read):
    """Returns the first answer of `read()` that is not None; sleeps between, so that signals get through."""
    wait = 0.005
    while (answer := read()) is None:
        time.sleep(wait)
        wait = min(0.25, 1.5 * wait)
    return answer


def _all_there(entries):
    return [json.loads(value) for _, value in sorted(entries)] if len(entries) == count() else None


def _try_get(store, key):
    try:
        return store.key_value_try_get(key)
    except Exception as error:  # JaxRuntimeError or ValueError, by release
        if "NOT_FOUND" in str(error):
            return None
        raise


def _unseen(mark):
    return None if mark.exists() else socket.gethostname()


def _code_hash():
    package, total = pathlib.Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        total.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return total.hexdigest()[:16]


def _versions():
    return {"python": platform.python_version()} | library_versions(_VERSIONS)


def _not_all_there(found, config):
    me = f"process {found.process_id} of {found.processes}" if found.processes else "this process"
    return PeerLost(
        f"{me}: not all processes were connected through {found.coordinator or 'the cluster coordinator'} after "
        f"{config.connect_seconds:g} s (distributed.connect_seconds): start all of them, with the same coordinator and count."
    )


@contextlib.contextmanager
def _explained(found):
    """Turns JAX's word for a cluster that it finds nowhere into a ConfigError."""
    try:
        yield
    except ValueError as error:
        if found.coordinator is not None or "defined" not in str(error):
            raise
        raise ConfigError(
            "distributed.cluster=tpu: JAX finds no TPU runtime on this host: is it one of a slice, and is JAX's TPU support "
            "installed (pip install 'llmos-jax[tpu]')?"
        ) from error


@contextlib.contextmanager
def _deadline(seconds, error):
    """Ends the process with `error` when the block takes longer: what it waits in is native code."""

    def give_up():
        report(error)
        host.end_process(error.exit_code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _wait_for_coordinator(address, seconds):
    """Returns when something answers at `address`; PeerLost when nothing has after nearly `seconds`."""
    name, _, port = address.rpartition(":")
    deadline = time.monotonic() + 0.9 * seconds
    while True:
        try:
            socket.create_connection((name.strip("[]"), int(port)), timeout=min(5.0, seconds)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerLost(
                    f"the coordinator {address} can't be reached ({error.strerror or error}) after {seconds:g} s "
                    "(distributed.connect_seconds): start process 0 there, or correct distributed.coordinator."
                ) from None
        time.sleep(0.1)


def _say_farewell():
    with contextlib.suppress(Exception):  # whoever can't be told any more has left already
        store = client()
        store.key_value_set(f"{_ROOT}/farewell/{index():06d}", "")
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while index() == 0 and time.monotonic() < deadline:
            if len(store.key_value_dir_get(f"{_ROOT}/farewell")) == count():
                time.sleep(0.2)  # their last words are written; they need the coordinator no longer
                return
            time.sleep(0.02)
