"""mmengine's runner, which reads checkpoints without running code."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import CheckpointLoader, Runner, load_state_dict
from torch import nn

from ..backbones.layers import synchronize_batch_norms
from .checkpoint import fetch_checkpoint


@RUNNERS.register_module()
class SafeRunner(Runner):
    """mmengine's runner for ``load_from`` and ``resume`` from files that may come from anywhere.

    ``linsight train`` and ``linsight test`` use it; a config gives it to other scripts by
    ``runner_type="SafeRunner"``. It reads ``.pth`` and ``.safetensors`` through
    :func:`~linsight.heads.checkpoint.read_checkpoint`, from local files and web addresses.
    mmengine reads places with another prefix, such as ``s3://``.

    With ``sync_bn="torch"`` in the config, batch norms take their statistics over all processes
    through :func:`~linsight.backbones.layers.synchronize_batch_norms`.
    """

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model for distributed training; arguments are those of mmengine's method."""
        sync_bn = self.cfg.get("sync_bn")
        if not self.distributed or sync_bn != "torch":
            return super().wrap_model(model_wrapper_cfg, model)
        model = synchronize_batch_norms(model)
        # mmengine's own conversion would replace the layers that have just been told.
        self.cfg.sync_bn = None
        try:
            return super().wrap_model(model_wrapper_cfg, model)
        finally:
            self.cfg.sync_bn = sync_bn

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | Callable = "cpu",
        strict: bool = False,
        revise_keys: Sequence[tuple[str, str]] = ((r"^module.", ""),),
    ) -> dict:
        """Load weights into the model; arguments and result are those of mmengine's method.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is damaged, holds code, or is of another model.
        """
        prefix = filename.partition("://")[0] if "://" in filename else ""
        if prefix in ("", "http", "https"):
            checkpoint = fetch_checkpoint(filename, map_location)
        else:
            checkpoint = CheckpointLoader.load_checkpoint(filename, map_location)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        state: dict[str, Any] = dict(checkpoint.get("state_dict", checkpoint))
        for pattern, replacement in revise_keys:
            state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
        model = self.model.module if is_model_wrapper(self.model) else self.model
        load_state_dict(model, state, strict)
        self._has_loaded = True
        self.logger.info(f"Load checkpoint from {filename}")
        return checkpoint
