"""The algorithms in somebody's own Flower app: their data loader, their model, an ordinary Strategy and ClientApp.

- `models`: any PyTorch network as a `Model`.
- `plan`: what server and clients have in common, which every message carries.
- `windows`, `state`: a client's data, and what it keeps to itself, in Flower's context.
- `client`, `strategy`: the two ends.
"""
