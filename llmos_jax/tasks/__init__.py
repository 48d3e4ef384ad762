"""What to optimise: a task joins a model, a data source, a loss and its evaluations (`base.Task`)."""
