"""Checks of options that do not go together with differential privacy, before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from dataset_utils.shards import UNKNOWN, ShardSet, scale_of
from fedkdx_plugin.configuration.choice import Choice
from fedkdx_plugin.configuration.config import Config
from fedkdx_plugin.engine import dp_sgd
from fedkdx_plugin.engine.participation import UNSEEN
from fedkdx_plugin.engine.precision import FULL
from fedkdx_plugin.engine.protection import SCALED, replies_with_states, sampling_of, uncovered
from fedkdx_plugin.privacy import accounting, example
from fedkdx_plugin.privacy.accounting import FIXED
from fedkdx_plugin.privacy.client import Plan
from fedkdx_plugin.privacy.example import Work
from fedkdx_plugin.privacy.options import CLIENT, DISTRIBUTED, EXAMPLE, NONE, Privacy
from registry.aggregation import MEAN
from registry.errors import UserError
from registry.interface import Task, private_names
from registry.messages import VARIANCE

FEDERATED, UNSCALED = "federated", "none"  # of --scale


def privacy(config: Config) -> Privacy:
    """Return the options of differential privacy. Raises UserError: one is missing, wrong or without --dp."""
    return Privacy.parse(config.dp, config.epsilon, config.delta, config.clip, config.dp_noise)


def check(config: Config, choices: Sequence[Choice]) -> None:
    """Raise UserError where options or algorithms do not go together with the privacy that is asked for."""
    asked = privacy(config)
    if asked.level == NONE:
        return
    accounting.require()
    if asked.level == EXAMPLE:
        _check_example(config, asked, choices)
        return
    refused = [f"{choice.name}, {reason}" for choice in choices if (reason := uncovered(choice.server))]
    if refused:
        alike = "them" if len(refused) > 1 else "it"
        raise UserError(f"--dp client: not with {'; nor with '.join(refused)}; leave {alike} out")
    for flag, reason in _against(config).items():
        raise UserError(f"{flag}: not with --dp client: {reason}")
    if asked.noise == DISTRIBUTED:
        _check_distributed(config, asked, choices)
    elif config.secure_aggregation:
        raise UserError(
            "--secure-aggregation: not with --dp-noise central, for which the server clips single replies; use "
            "--dp-noise distributed"
        )


def _check_example(config: Config, asked: Privacy, choices: Sequence[Choice]) -> None:
    """Raise UserError where options or algorithms do not go together with the privacy of single windows."""
    dp_sgd.check({choice.name: (choice.server, choice.params) for choice in choices})
    if asked.clip is None:
        raise UserError("--dp example: needs --clip NUMBER, the bound on a window's gradient, such as --clip 1")
    bad = {
        "--dp-noise distributed": (asked.noise == DISTRIBUTED, "each client adds its own noise anyway"),
        f"--class-weights {config.class_weights}": (
            config.class_weights != "none",
            "the weights say how many windows of each class a client has",
        ),
        f"--precision {config.precision}": (
            config.precision != FULL,
            "gradients window by window are taken, bounded and added up in float32, or a window could exceed its bound",
        ),
        "--backend stacked": (config.backend == "stacked", dp_sgd.NOT_STACKED),
        f"--engine {config.engine}": (config.engine != "local", example.BETWEEN_SITES),
    }
    for flag, (given, reason) in bad.items():
        if given:
            raise UserError(f"{flag}: not with --dp example: {reason}; leave it out")


def _against(config: Config) -> Mapping[str, str]:
    """Return the flags that a client-level guarantee cannot hold with, and why."""
    bad = {}
    if config.aggregate != MEAN:
        bad[f"--aggregate {config.aggregate}"] = "the noise is measured for a mean; leave one out"
    if config.max_share < 1:
        bad[f"--max-share {config.max_share:g}"] = "all clients count the same there; leave it out"
    if config.outliers:
        bad[f"--outliers {config.outliers:g}"] = (
            "who is set aside depends on the others' replies; updates are clipped anyway; leave it out"
        )
    if config.late or config.rare:
        bad[f"--{'late' if config.late else 'rare'}"] = (
            "the guarantee assumes that all clients can be selected in every round; leave it out"
        )
    return bad


def _check_distributed(config: Config, asked: Privacy, choices: Sequence[Choice]) -> None:
    """Raise UserError where clients cannot each add a share of the noise."""
    flag = "--dp-noise distributed"
    compressed = [choice.name for choice in choices if not replies_with_states(choice.server)]
    if compressed:
        raise UserError(
            f"{flag}: not with {', '.join(compressed)}, whose replies are compressed: rounding each share of the noise "
            "would change the sum; use --dp-noise central"
        )
    if asked.clip is None:
        raise UserError(f"{flag}: needs --clip NUMBER, as no client knows the median of all")
    if config.sampling != FIXED:
        raise UserError(f"{flag}: not with --sampling {config.sampling}, with which shares of the noise may be missing")
    for name in ("dropout", "stragglers", "corrupt"):
        if getattr(config, name):
            raise UserError(f"{flag}: not with --{name}, with which shares of the noise are missing; leave one out")
    if config.attackers:
        raise UserError(f"{flag}: not with --attackers, who would add no noise; use --dp-noise central")


def check_on(
    shards: ShardSet, task: Task, config: Config, choices: Sequence[Choice], groups: Mapping[str, Sequence[int]]
) -> None:
    """Raise UserError where data, models and the number of clients do not go together with the privacy asked for."""
    asked = privacy(config)
    if asked.level == NONE:
        return
    if asked.level == EXAMPLE:
        _check_example_on(shards, task, choices)
        away = groups.get(UNSEEN, ())
        windows = {id: Work(len(own.y), 1) for id, own in enumerate(shards.train) if id not in away}
        example.check_delta(windows, asked.delta)
        return
    check_scale(asked.level, scale_of(shards.manifest))
    for choice in choices:
        check_norm(choice, task)
    sampling = sampling_of(config.sampling, shards.num_clients - len(groups.get(UNSEEN, ())), config.join_ratio)
    Plan.of(asked, sampling, config.global_rounds)


def check_scale(level: str, scale: str) -> None:
    """Raise UserError where windows are scaled by what is told of others without noise.

    Args:
        level: whose data are protected (`--dp`).
        scale: how windows are scaled (`--scale`, or as shards state it).
    """
    if level == EXAMPLE and scale not in (UNSCALED, UNKNOWN):
        raise UserError(example.SCALED.format(scale))
    if level == CLIENT and scale == FEDERATED:
        raise UserError(SCALED)


def _check_example_on(shards: ShardSet, task: Task, choices: Sequence[Choice]) -> None:
    """Raise UserError where data or models do not go together with the privacy of single windows."""
    check_scale(EXAMPLE, scale_of(shards.manifest))
    for choice in choices:
        dp_sgd.check_networks(choice.server.Client.build(dataclasses.replace(task, params=choice.params)))


def check_norm(choice: Choice, task: Task) -> None:
    """Raise UserError where an algorithm would average statistics of batch norm, which noise would make useless."""
    task = dataclasses.replace(task, params=choice.params)
    nets = choice.server.Client.build(task)
    private = private_names(choice.server.Client, task, nets)
    names = (f"{net}.{name}" for net, module in nets.items() for name in module.state_dict())
    if any(name.endswith(VARIANCE) and name not in private for name in names):
        raise UserError(
            f"--dp client: {choice.name} averages statistics of batch norm, which noise would make useless; use --norm "
            "group or --bn local"
        )
