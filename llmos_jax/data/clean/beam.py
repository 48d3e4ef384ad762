"""Runs tasks by Apache Beam: on this machine, or on Dataflow, Flink or Spark whose workers see the same folder.

Beam only hands tasks out. They read and write the folder as they do in a process pool, with the same functions, so the
records are the same bytes; what a lost worker leaves half done is done again.
"""

import json

from llmos_jax import errors
from llmos_jax.config import to_plain
from llmos_jax.data.clean.objects import Objects, Task
from llmos_jax.data.clean.tasks import finished, run_task


class BeamRunner:
    """Runs each set of independent tasks as one pipeline: create, reshuffle, map.

    options: Beam's own; without any, Beam runs `workers` processes on this machine.
    """

    def __init__(self, root, options, workers):
        try:
            import apache_beam
        except ImportError:
            raise errors.ConfigError("runner=beam needs apache_beam: pip install 'llmos-jax[beam]'.") from None
        self._beam, self.root = apache_beam, root
        local = (f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing")
        self._options = list(options or local)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def run(self, tasks, label):
        """Returns the results of `tasks` in their order; raises the error of the first that failed."""
        from apache_beam.options.pipeline_options import PipelineOptions

        beam, objects = self._beam, Objects(self.root)
        waiting = [json.dumps(to_plain(task)) for task in tasks if finished(objects, task) is None]
        if waiting:
            with beam.Pipeline(options=PipelineOptions(self._options)) as pipeline:
                created = pipeline | label >> beam.Create(waiting)
                created | f"{label}: spread" >> beam.Reshuffle() | f"{label}: run" >> beam.Map(_run_text, str(self.root))
        return [_result(objects, task) for task in tasks]


def _run_text(text, root):
    """Runs a task; an error that retrying can't mend is written down for the one who waits, not raised."""
    task = Task(**json.loads(text))
    try:
        run_task(root, task)
    except errors.LlmosError as error:
        Objects(root).write_json(_failure(task), {"class": type(error).__name__, "message": str(error)})


def _result(objects, task):
    result = finished(objects, task)
    if result is not None:
        return result
    if not objects.has(_failure(task)):
        raise errors.DataError(f"{objects.path(task.result)} was not written: do all workers see {objects.root}?")
    failure = objects.read_json(_failure(task))
    objects.path(_failure(task)).unlink()
    raise getattr(errors, failure["class"])(failure["message"])


def _failure(task):
    return f"failed/{task.result}"
