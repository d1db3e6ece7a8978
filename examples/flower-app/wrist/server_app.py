"""The server's side."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import fedkdx_plugin as fedkdx
from wrist.task import CLASSES, SHAPE, Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and print how well each client's own model does on its own test windows."""
    strategy = fedkdx.flower.Strategy(
        "FedKDX",
        model=Net,
        shape=SHAPE,
        classes=CLASSES,
        min_available_nodes=int(context.run_config["nodes"]),
        set={"gamma": 0.5},
        local_learning_rate=0.05,
    )
    result = strategy.start(grid=grid, num_rounds=int(context.run_config["rounds"]))
    accuracy = list(result.evaluate_metrics_clientapp.values())[-1]["accuracy"]
    student = strategy.model(result.arrays)  # a Net, which all clients share
    values = sum(parameter.numel() for parameter in student.parameters())
    print(f"accuracy {accuracy:.3f}; the shared student has {values} parameters")
