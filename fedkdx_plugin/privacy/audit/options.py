"""Options of an audit; this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from registry.errors import UserError
from registry.parameters import Params, option

ATTACKS = ("membership", "inversion", "identity")  # results.audits.ATTACKS, whose module loads more


@dataclass(frozen=True)
class AuditOptions(Params):
    """Options of an audit."""

    attacks: tuple[str, ...] = option(
        ATTACKS,
        "attacks to make, separated by commas: which windows were trained on, what windows an update gives away, who "
        "sent an update",
        choices=ATTACKS,
        flags="--attacks",
    )
    shadows: int = option(
        4,
        "shadow runs for membership inference, an even number from 4 on, each as long as the run itself; 0: none, "
        "and only the threshold on the loss",
        low=0,
        flags="--shadows",
    )
    inverted: int = option(3, "clients whose updates are inverted", low=1, flags="--inverted")
    steps: int = option(300, "steps of the optimisation that inverts an update", low=1, flags="--steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.attacks:
            raise UserError(f"--attacks: names none; choose from {', '.join(ATTACKS)}")
        if self.shadows % 2 or self.shadows == 2:
            raise UserError(
                f"--shadows {self.shadows}: shadow runs come in pairs that train on half of the windows each, and two "
                "pairs are the least; give 0, 4, 6, 8, ..."
            )
