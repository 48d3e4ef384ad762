"""The one training loop and its parts: state, step, optimizer, guard, checkpoints, metrics."""
