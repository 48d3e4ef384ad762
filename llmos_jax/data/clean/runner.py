"""Runs independent tasks: here, in a pool of processes, or anywhere that shares the folder; done ones are not run again."""

import concurrent.futures
import contextlib
import multiprocessing
import signal
import sys

import tqdm

from llmos_jax.compute import host
from llmos_jax.data.clean.objects import Objects
from llmos_jax.data.clean.tasks import all_finished, run_task
from llmos_jax.errors import DataError


class ProcessRunner:
    """Runs tasks on this machine: one worker in this process, more in a pool of their own processes."""

    def __init__(self, root, workers):
        self.root, self.workers, self._objects = root, workers, Objects(root)
        self._pool = None

    def __enter__(self):
        if self.workers > 1:
            # Spawned, not forked: the calling process may have threads (JAX's), which a fork would freeze.
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(self.workers, mp_context=context, initializer=_start_worker)
        return self

    def __exit__(self, *error):
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, tasks, label):
        """Returns the results of `tasks` in their order; the first error of any is raised."""
        results = all_finished(self._objects, tasks, self.workers)
        waiting = [number for number, result in enumerate(results) if result is None]
        with progress(label, sum(tasks[number].size_bytes for number in waiting)) as advance:
            for number, result in self._run([(number, tasks[number]) for number in waiting]):
                results[number] = result
                advance(tasks[number].size_bytes)
        return results

    def _run(self, numbered):
        if self._pool is None:
            for number, task in numbered:
                yield number, run_task(self.root, task)
            return
        # Large ones first, so that none is left alone at the end.
        numbered = sorted(numbered, key=lambda item: -item[1].size_bytes)
        futures = {self._pool.submit(run_task, self.root, task): number for number, task in numbered}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise DataError(
                "a worker process was killed, perhaps for want of memory: start again with fewer workers or smaller "
                "shards (workers, shard_bytes); finished work is kept."
            ) from None
        finally:
            for future in futures:
                future.cancel()


@contextlib.contextmanager
def progress(label, size_bytes):
    """Shows a bar with rate and remaining time while `advance(bytes)` is called; plain lines where no terminal is."""
    is_terminal = sys.stderr.isatty()
    bar = tqdm.tqdm(
        total=size_bytes, desc=label, unit="B", unit_scale=True, disable=not size_bytes, leave=is_terminal,
        mininterval=0.2 if is_terminal else 15.0, file=sys.stderr,
    )  # fmt: skip
    with bar:
        yield bar.update


def _start_worker():
    host.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    with contextlib.suppress(ImportError):
        import pyarrow

        pyarrow.set_cpu_count(1)  # the cores are shared out by processes
