"""What a runner may be asked to do, on any machine that shares the folder: the functions that tasks name."""

import concurrent.futures

from llmos_jax.data.clean.exchange import finish, reduce
from llmos_jax.data.clean.objects import Objects
from llmos_jax.data.clean.output import write_shard
from llmos_jax.data.clean.reading import hash_files, read_files
from llmos_jax.data.clean.stage import run_stage
from llmos_jax.errors import DataError

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
        # The hash of each object is taken here, where it was written: damage of later is never taken for the result.
        result["objects"] = {name: objects.facts(name) for name in result.get("objects", ())}
        objects.write_json(task.result, result)
    return result


def all_finished(objects, tasks, threads):
    """Returns what `finished` does for each of `tasks`: all of what they wrote is read, by so many threads."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda task: finished(objects, task), tasks))


def finished(objects, task):
    """Returns the result of a Task that is done and whose objects are all there and whole, or None: it has to be run.

    A result that is marked `is_passing` holds for its run only: something could not be read that may be there next time.
    """
    if not objects.has(task.result):
        return None
    try:
        result = objects.read_json(task.result)
    except DataError:
        return None
    is_whole = not result.get("is_passing") and all(objects.is_whole(*item) for item in result["objects"].items())
    return result if is_whole else None
