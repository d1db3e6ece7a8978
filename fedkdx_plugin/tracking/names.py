"""Names of the trackers: importing this costs nothing."""

TRACKERS = ("tensorboard", "mlflow", "wandb")
