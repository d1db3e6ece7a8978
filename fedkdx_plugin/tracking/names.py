"""Names of the trackers, in a module that imports nothing."""

TRACKERS = ("tensorboard", "mlflow", "wandb")
