"""The clients' side."""

import fedkdx_plugin as fedkdx
from wrist.task import Net, load

app = fedkdx.flower.client_app("FedKDX", model=Net, data=load)
