"""Runs tasks by Apache Beam: on this machine, or on Dataflow, Flink or Spark whose workers see the same folder.

Beam only hands tasks out. They read and write the folder as they do in a process pool, with the same functions, so the
records are the same bytes; what a lost worker leaves half done is done again.
"""

import contextlib
import json
import threading

from llmos_jax import errors
from llmos_jax.config import to_plain
from llmos_jax.data.clean.objects import Objects, Task
from llmos_jax.data.clean.runner import progress
from llmos_jax.data.clean.tasks import all_finished, run_task

# Seconds between looks at what is done.
_LOOK = 1.0


class BeamRunner:
    """Runs each set of independent tasks as one pipeline: create, reshuffle, map.

    options: Beam's own; without any, Beam runs `workers` processes on this machine.
    """

    def __init__(self, root, options, workers):
        try:
            import apache_beam
        except ImportError:
            raise errors.ConfigError("runner=beam needs apache_beam: pip install 'llmos-jax[beam]'.") from None
        self._beam, self.root, self._workers, self._objects = apache_beam, root, workers, Objects(root)
        local = (f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing")
        self._options = list(options or local)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def run(self, tasks, label):
        """Returns the results of `tasks` in their order; raises the error of the first that failed."""
        from apache_beam.options.pipeline_options import PipelineOptions

        beam = self._beam
        results = all_finished(self._objects, tasks, self._workers)
        waiting = [task for task, result in zip(tasks, results, strict=True) if result is None]
        for task in waiting:  # damaged, or of another run
            self._objects.path(task.result).unlink(missing_ok=True)
        if waiting:
            texts = [json.dumps(to_plain(task)) for task in waiting]
            with _watched(self._objects, waiting, label), beam.Pipeline(options=PipelineOptions(self._options)) as pipeline:
                created = pipeline | label >> beam.Create(texts)
                created | f"{label}: spread" >> beam.Reshuffle() | f"{label}: run" >> beam.Map(_run_text, str(self.root))
        return [_result(self._objects, task) if result is None else result for task, result in zip(tasks, results, strict=True)]


@contextlib.contextmanager
def _watched(objects, tasks, label):
    """Shows the progress of tasks that run elsewhere: by the results that are there, which are looked for now and then."""
    is_over = threading.Event()

    def watch():
        waiting = tasks
        with progress(label, sum(task.size_bytes for task in tasks)) as advance:
            while waiting:
                ends = is_over.wait(_LOOK)
                done = {task.result for task in waiting if objects.has(task.result)}
                advance(sum(task.size_bytes for task in waiting if task.result in done))
                waiting = [] if ends else [task for task in waiting if task.result not in done]

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _run_text(text, root):
    """Runs a task; an error that retrying can't mend is written down for the one who waits, not raised."""
    task = Task(**json.loads(text))
    try:
        run_task(root, task)
    except errors.LlmosError as error:
        name = next(one.__name__ for one in type(error).__mro__ if hasattr(errors, one.__name__))
        Objects(root).write_json(_failure(task), {"class": name, "message": str(error)})


def _result(objects, task):
    if objects.has(task.result):
        return objects.read_json(task.result)
    if not objects.has(_failure(task)):
        raise errors.DataError(f"{objects.path(task.result)} was not written: do all workers see {objects.root}?")
    failure = objects.read_json(_failure(task))
    objects.path(_failure(task)).unlink()
    raise getattr(errors, failure["class"])(failure["message"])


def _failure(task):
    return f"failed/{task.result}"
