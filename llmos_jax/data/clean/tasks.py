"""What a runner may be asked to do, on any machine that shares the folder: the functions that tasks name."""

from llmos_jax.data.clean.exchange import finish, reduce
from llmos_jax.data.clean.objects import Objects
from llmos_jax.data.clean.output import write_shard
from llmos_jax.data.clean.reading import hash_files, read_files
from llmos_jax.data.clean.stage import run_stage

# Each takes the Objects and the arguments of its Task, and returns its JSON-able result.
FUNCTIONS = {
    "hash": hash_files,
    "read": read_files,
    "stage": run_stage,
    "reduce": reduce,
    "finish": finish,
    "write": write_shard,
}


def run_task(root, task):
    """Runs one Task in the folder `root` and returns its result; the result is written last, so what is there is whole."""
    objects = Objects(root)
    result = finished(objects, task)
    if result is None:
        result = FUNCTIONS[task.kind](objects, **task.arguments)
        objects.write_json(task.result, result)
    return result


def finished(objects, task):
    """Returns the result of a Task that is done and whose objects are still there, or None."""
    if not objects.has(task.result):
        return None
    result = objects.read_json(task.result)
    return result if all(map(objects.has, result.get("objects", ()))) else None
