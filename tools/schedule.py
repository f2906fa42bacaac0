"""Whether a config's schedule fits the length of the training, and how it is made to."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config
from mmengine.dist import get_world_size

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


def schedule_faults(cfg: Config, iterations: int, epoch: int) -> list[str]:
    """Sentences on a warm-up or an average of weights that outlasts half of the training.

    Args:
        cfg: the config.
        iterations: number of iterations of the training.
        epoch: number of iterations of an epoch.
    """
    faults = []
    schedules: Any = cfg.get("param_scheduler") or []
    for schedule in schedules if isinstance(schedules, list | tuple) else [schedules]:
        warms_up = schedule.get("type") == "LinearLR" and schedule.get("start_factor", 1 / 3) < 1
        end = schedule.get("end", 0) * (epoch if schedule.get("by_epoch", True) else 1)
        if warms_up and iterations / 2 < end < float("inf"):
            faults.append(
                f"the learning rate warms up for {end:g} of {iterations} iterations, so that "
                "little is learned: --epochs N fits the schedule to N epochs, or set the end of "
                "LinearLR in param_scheduler"
            )
    ema = (cfg.get("default_hooks") or {}).get("ema") or {}
    if "decay" in ema and "base_batch_size" in ema:
        batch = cfg.train_dataloader.batch_size * get_world_size()
        reach = 1 / (1 - ema["decay"] ** (batch / ema["base_batch_size"]))
        if reach > iterations / 2:
            faults.append(
                f"the averaged weights, which are validated and saved, reach back {reach:.0f} "
                f"iterations, and the training has {iterations}: they keep the first, random "
                f"weights; set default_hooks.ema.decay={1 - 20 / max(40, iterations):.3g} and "
                f"default_hooks.ema.base_batch_size={batch}, or default_hooks.ema=None"
            )
    return faults
