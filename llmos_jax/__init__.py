"""LLMOS-JAX: an operating system for large language models on JAX/XLA.

The public surface, imported lazily so that importing the package has no side effects and costs nothing.
"""

_PUBLIC = {
    "load": "llmos_jax.api",
    "load_settings": "llmos_jax.api",
    "import_checkpoint": "llmos_jax.api",
    "export_checkpoint": "llmos_jax.api",
    "run_training": "llmos_jax.api",
    "LanguageModel": "llmos_jax.serve.model",
    "evaluate_model": "llmos_jax.evaluate.likelihood",
    "Settings": "llmos_jax.train.settings",
    "SamplingConfig": "llmos_jax.serve.sample",
    "make_placement": "llmos_jax.compute.sharding",
    "MeshConfig": "llmos_jax.compute.mesh",
    "describe_devices": "llmos_jax.compute.devices",
    "prepare": "llmos_jax.data.prepare",
    "DataConfig": "llmos_jax.data.prepare",
    "load_prepare_settings": "llmos_jax.api",
    "run_preparation": "llmos_jax.api",
    "PrepareConfig": "llmos_jax.data.clean.pipeline",
    "open_dataset": "llmos_jax.data.clean.dataset",
    "read_metrics": "llmos_jax.train.metrics",
}
__all__ = [*sorted(_PUBLIC), "__version__"]
__version__ = "0.1.0"


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'llmos_jax' has no attribute {name!r}; public names: {', '.join(__all__)}")
    from llmos_jax.config import attribute

    return attribute(_PUBLIC[name], name)


def __dir__():
    return __all__
