"""The host: cores, memory, disk, cache folder, and how its C allocator treats large blocks. Imports no JAX."""

import contextlib
import ctypes
import functools
import itertools
import logging
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading

from llmos_jax.errors import ConfigError

# prctl's option (linux/prctl.h).
_PR_SET_PDEATHSIG = 1
_GOOGLE_PCI_VENDOR = "0x1ae0"
_ANSWER_SECONDS = 60.0  # the first call of the driver on a host with many GPUs takes long
_HANDLERS = []  # native code holds no reference to what it calls
# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def cores():
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes():
    """Returns the memory this process may use: the host's, or its control group's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = pathlib.Path(file).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def peak_memory_bytes():
    """Returns the largest resident memory that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_disk_bytes(path):
    """Returns the free space of the file system that holds `path` or its nearest existing parent."""
    path = pathlib.Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def cache_directory(name):
    """Returns the folder `name` under `$LLMOS_CACHE` or `~/.cache/llmos`, made owner-only if it is missing.

    Raises ConfigError when it can't be made.
    """
    root = pathlib.Path(os.environ.get("LLMOS_CACHE") or pathlib.Path.home() / ".cache" / "llmos")
    folder = root / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"the cache {folder} can't be made ({error.strerror}): name another in $LLMOS_CACHE.") from None
    return folder


def cpu_model():
    """Returns the processor's name, as far as the system tells it."""
    return _cpu_facts().get("model name", "CPU")


@functools.cache
def has_avx512():
    """Returns whether the processor has vectors of 512 bits, as far as the system tells it: what is fast depends on them."""
    return "avx512f" in _cpu_facts().get("flags", "").split()


def _cpu_facts():
    """Returns {name: text} of the first core in /proc/cpuinfo; {} where there is none (not Linux)."""
    try:
        first, _, _ = pathlib.Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): text.strip() for name, _, text in pairs}


def visible_gpus(environ=os.environ):
    """Returns how many NVIDIA GPUs a process with this environment sees: those of CUDA_VISIBLE_DEVICES, else all attached."""
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:  # the first word that names no device ends the list: -1, NoDevFiles
        words = map(str.strip, named.split(","))
        return sum(1 for _ in itertools.takewhile(re.compile(r"\d|GPU-|MIG-").match, words))
    try:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0  # no driver, or none that answers: JAX could not use them
    return len(re.findall(r"^GPU \d+:", told.stdout, re.MULTILINE)) if told.returncode == 0 else 0


def share_of_gpus(visible, processes):
    """Returns how many of the `visible` GPUs each of the processes on a host gets; ConfigError when that is no whole number."""
    if visible % processes:
        divisors = [str(n) for n in range(1, visible + 1) if visible % n == 0]
        raise ConfigError(
            f"{processes} processes on this host can't share its {visible} GPU(s) evenly: start {', '.join(divisors)} of them, "
            "or have each see its own ones only (CUDA_VISIBLE_DEVICES, JAX_LOCAL_DEVICE_IDS)."
        )
    return visible // processes


def has_tpu(root="/"):
    """Whether TPU chips are attached to this host: device files of older hosts, or PCI devices given to user space."""
    root = pathlib.Path(root)
    if any(root.glob("dev/accel[0-9]*")):
        return True
    for vendor in root.glob("sys/bus/pci/drivers/vfio-pci/*/vendor"):
        with contextlib.suppress(OSError):  # unplugged just now
            if vendor.read_text().strip() == _GOOGLE_PCI_VENDOR:
                return True
    return False


def process_start(pid):
    """Returns when a process of this host was started, in clock ticks since boot; None when there is none.

    0 for a living one where the system does not tell (no /proc: macOS).
    """
    try:
        # Field 22 of stat, counted after the command name, which may hold spaces.
        return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        pass  # there is none, or no /proc: which of both is asked below
    if pathlib.Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return 0
    return 0


def pid_space():
    """Returns what hosts, their boots and containers differ by: within one, a process number stands for one process."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def process_age_seconds():
    """Returns how long ago this process was started; 0 where the system does not tell."""
    try:
        uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, uptime - process_start(os.getpid()) / os.sysconf("SC_CLK_TCK"))


def write_whole(path, text):
    """Writes a text file that others see whole or not at all, whoever else writes it and whenever this process dies."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def keep_heap():
    """Makes glibc keep freed memory for reuse; returns whether it does (nothing happens with other C libraries).

    XLA:CPU allocates and frees its temporaries in every step. glibc returns large blocks to the kernel, and every step
    pays for page faults again: a training step took 1.7 times as long. Call it before the first large allocation. Peak
    memory stays what it was; memory is not given back before the process ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def return_free_memory():
    """Gives what the C heap holds free back to the system (glibc; nothing happens with other C libraries).

    Compilation leaves hundreds of megabytes of small free blocks that no step's temporaries fit into: called after it, the
    peak of a small model's training was 0.85 GiB in place of 1.1.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library keeps what it keeps
        ctypes.CDLL(None).malloc_trim(0)


def end_process(code):
    """Ends this process at once: no exit handler runs, no thread is waited for, what was written is flushed."""
    # A thread that is stuck may hold a stream's lock for ever.
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(timeout=2.0)
    os._exit(code)


def _flush():
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader is gone
            stream.flush()
    logging.shutdown()


def on_abort(function):
    """Has `function()` called, which must end the process, when native code aborts it (SIGABRT).

    A handler of Python's own would never run: abort does not return to the interpreter. One that is laid below it does,
    on the thread that aborts, as soon as that gets the interpreter's lock.
    """
    _HANDLERS.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: function()))
    ctypes.CDLL(None).signal(signal.SIGABRT, _HANDLERS[-1])


def end_with_parent():
    """Has the system send SIGTERM to this process when its parent dies (Linux; nothing happens elsewhere)."""
    with contextlib.suppress(AttributeError, OSError):  # another system: it is left running, and the lease tells who it is
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
