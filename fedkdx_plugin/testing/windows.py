"""Check that the windows of a client meet in a mean of losses alone, where it declares so (`--dp example`)."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from fedkdx_plugin.engine import dp_sgd
from fedkdx_plugin.engine.backends.sequential import Sequential
from fedkdx_plugin.engine.dp_sgd import WindowPrivacy
from fedkdx_plugin.engine.training import windows_of
from fedkdx_plugin.testing.case import AlgorithmCase, run
from fedkdx_plugin.testing.made import make_data
from fedkdx_plugin.testing.running import Checks, float64, require
from registry.errors import UserError
from registry.interface import Round

CHECKS = Checks()
SIZES = (12, 9)
ROWS = 5
CLOSE = 1e-9  # relative, in float64


@CHECKS
def check_windows(case: AlgorithmCase) -> None:
    """Require of clients with `windows_meet = ""` that windows are read in losses alone, which are means over them."""
    params = case.algorithm.Params(**case.params)
    try:
        dp_sgd.check({case.algorithm.__name__: (case.algorithm, params)})
        task = replace(case.task(), norm="group")
        case.algorithm.check(task, params)
    except UserError:
        return  # it declares nothing, or cannot do without batch norm
    with float64():
        federation = case.federation(
            make_data(SIZES), task, rounds=2, join_ratio=1.0, batch_size=4, dp_sgd=WindowPrivacy(1.0, 1.0)
        )
        try:
            run(federation)
        except UserError as error:
            require(False, f'declares windows_meet = "", but: {error}')
        backend, round = federation.backend, Round(2, 2)
        assert isinstance(backend, Sequential)
        client = backend.begin(0, federation.server.messages([0], round)[0], round)
        batch, context = windows_of(client).rows(slice(ROWS)), client.context()

        def loss(rows: slice) -> Tensor:
            return reduce(add, client.losses(client.nets, batch.rows(rows), context).values()).detach()

        whole = loss(slice(ROWS))
        mean = torch.stack([loss(slice(row, row + 1)) for row in range(ROWS)]).mean()
        close = torch.allclose(whole, mean, rtol=CLOSE, atol=CLOSE)
        require(
            close,
            f'declares windows_meet = "", but the loss of {ROWS} windows is {float(whole):.6g}, and the mean of their '
            f"losses {float(mean):.6g}: say how they meet",
        )
