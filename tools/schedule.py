"""Fit a config's schedule to another length of the training."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config

from linsight.tools.config import ConfigError


def set_epochs(cfg: Config, epochs: int) -> None:
    """Train for another number of epochs: warm-up, decay and averages shrink or grow with it.

    Args:
        cfg: the config, which is changed.
        epochs: number of epochs.

    Raises:
        ConfigError: the config counts in iterations.
    """
    loop = cfg.get("train_cfg") or {}
    if "max_epochs" not in loop:
        raise ConfigError(
            "--epochs: the config counts in iterations; set train_cfg.max_iters, and begin and end "
            "in param_scheduler"
        )
    factor = epochs / loop["max_epochs"]
    loop["max_epochs"] = epochs
    loop["val_interval"] = max(1, round(loop.get("val_interval", 1) * min(1.0, factor)))
    schedules: Any = cfg.get("param_scheduler") or []
    for schedule in schedules if isinstance(schedules, list | tuple) else [schedules]:
        # mmengine takes a part of an epoch only where it converts epochs to iterations.
        parts = schedule.get("convert_to_iter_based", False)
        for key in ("begin", "end", "T_max", "total_iters"):
            if schedule.get(key):
                value = schedule[key] * factor
                schedule[key] = value if parts else max(key != "begin", round(value))
        if schedule.get("type") == "LinearLR" and not schedule.get("by_epoch", True):
            # Over a single iteration it would stay at its first rate.
            schedule["end"] = max(schedule["end"], schedule.get("begin", 0) + 2)
        if "milestones" in schedule:
            schedule["milestones"] = [max(1, round(m * factor)) for m in schedule["milestones"]]
    ema = (cfg.get("default_hooks") or {}).get("ema")
    if ema and factor < 1 and "decay" in ema:
        # It reaches back over the same share of the training as before.
        ema["decay"] = max(0.5, 1 - (1 - ema["decay"]) / factor)
