"""mmengine's runner, which reads checkpoints without running code."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import mmengine
import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce, is_main_process
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, CheckpointLoader, Runner, load_state_dict
from torch import nn

from ..backbones.checkpoint import CheckpointError
from ..backbones.graphs import release_graphs
from ..backbones.layers import PYTORCHS_BATCH_NORMS, synchronize_batch_norms
from .checkpoint import fetch_checkpoint
from .sharding import FullyShardedModel, is_sharded, shard_optimizer, write_shards


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

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register mmengine's default hooks, with :class:`AsyncRuntimeInfoHook` among them, and
        `hooks`."""
        super().register_default_hooks(
            {"runtime_info": {"type": "AsyncRuntimeInfoHook"}, **(hooks or {})}
        )

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model for distributed training; arguments are those of mmengine's method."""
        if not self.distributed:
            return super().wrap_model(model_wrapper_cfg, model)
        model_wrapper_cfg = {"type": "MMDistributedDataParallel", **(model_wrapper_cfg or {})}
        if model_wrapper_cfg["type"] == "MMDistributedDataParallel":
            model_wrapper_cfg = self._data_parallel_options() | model_wrapper_cfg
        elif model_wrapper_cfg["type"] == "FullyShardedModel":
            self._refuse_copied_averages()
        sync_bn = self.cfg.get("sync_bn")
        if sync_bn != "torch":
            return super().wrap_model(model_wrapper_cfg, model)
        on_gpu = get_device() != "cpu"
        model = synchronize_batch_norms(model, convert=on_gpu)
        kept = sum(type(m) in PYTORCHS_BATCH_NORMS for m in model.modules())
        if kept and not on_gpu:
            self.logger.warning(
                f"sync_bn: {kept} batch norms take the statistics of their own process, as "
                "PyTorch's SyncBatchNorm needs a GPU"
            )
        # mmengine's own conversion would replace the layers that have just been told.
        self.cfg.sync_bn = None
        try:
            return super().wrap_model(model_wrapper_cfg, model)
        finally:
            self.cfg.sync_bn = sync_bn

    def train(self) -> nn.Module:
        """Train, and free the model's CUDA graphs, for which the end of NCCL's group would wait."""
        try:
            return super().train()
        finally:
            release_graphs(self.model)

    def _refuse_copied_averages(self) -> None:
        """Refuse averages of the weights that copy the model, which PyTorch does not if sharded.

        Raises:
            ValueError: the config has one.
        """
        hooks = [*self.cfg.get("custom_hooks", ()), *self.cfg.get("default_hooks", {}).values()]
        for hook in hooks:
            kind = (hook or {}).get("type") == "EMAHook" and hook.get("ema_type")
            if kind not in (False, "FusedExponentialMovingAverage"):
                raise ValueError(
                    f"ema_type of EMAHook is {kind or 'ExponentialMovingAverage'!r}, which copies "
                    "the model, and a fully sharded one has no copies: set "
                    "ema_type='FusedExponentialMovingAverage'"
                )

    def _data_parallel_options(self) -> dict[str, Any]:
        """Arguments of DistributedDataParallel, unless the config gives others."""
        options = {
            # Batch norms either agree over all processes (`sync_bn`) or keep statistics apart.
            "broadcast_buffers": False,
            "find_unused_parameters": self.cfg.get("find_unused_parameters", False),
            # Gradients are reduced where they lie, and need no copies.
            "gradient_as_bucket_view": True,
        }
        return options if torch.cuda.is_available() else {**options, "device_ids": None}

    def _init_model_weights(self) -> None:
        # A sharded model has initialised its weights while they were whole.
        if not isinstance(self.model, FullyShardedModel):
            super()._init_model_weights()

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict | None = None,
        by_epoch: bool = True,
        backend_args: dict | None = None,
    ) -> None:
        """Write a checkpoint; arguments are those of mmengine's method.

        The checkpoint of a :class:`~linsight.heads.sharding.FullyShardedModel` is a folder.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        # To lay out the config's text takes longer than to write the weights of a small model.
        object.__setattr__(self.cfg, "_format_python_code", False)
        if not isinstance(self.model, FullyShardedModel):
            super().save_checkpoint(
                out_dir,
                filename,
                file_client_args,
                save_optimizer,
                save_param_scheduler,
                meta,
                by_epoch,
                backend_args,
            )
            return
        if "://" in out_dir:
            raise CheckpointError(
                f"a fully sharded training writes its checkpoints to local folders, and out_dir is "
                f"{out_dir}"
            )
        meta = {
            "epoch": self.epoch + by_epoch,
            "iter": self.iter + (not by_epoch),
            **(meta or {}),
            "cfg": self.cfg.pretty_text,
            "seed": self.seed,
            "experiment_name": self.experiment_name,
            "time": time.strftime("%Y%m%d_%H%M%S"),
            "mmengine_version": mmengine.__version__,
        }
        dataset: Any = self.train_dataloader.dataset
        if hasattr(dataset, "metainfo"):
            meta["dataset_meta"] = dataset.metainfo
        checkpoint = {
            "meta": meta,
            "state_dict": self.model.module.state_dict(),
            "message_hub": self.message_hub.state_dict(),
        }
        if save_optimizer:
            checkpoint["optimizer"] = cast(Any, self.optim_wrapper).state_dict()
        if save_param_scheduler and self.param_schedulers is not None:
            schedulers = cast(Any, self.param_schedulers)
            checkpoint["param_schedulers"] = [s.state_dict() for s in schedulers]
        self.call_hook("before_save_checkpoint", checkpoint=checkpoint)
        write_shards(checkpoint, Path(out_dir, filename))

    def load_or_resume(self) -> None:
        """Load or resume as the config asks, and resume what ``torchrun`` has started again.

        With ``--max-restarts`` a training whose process was killed goes on from the last checkpoint
        that it has written. If it has written none, it starts as it did the first time.
        """
        training = isinstance(self._train_loop, BaseLoop) and not self._has_loaded
        if training and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            last = Path(self.work_dir, "last_checkpoint")
            # Each node counts on its own, and may not count a restart for another node's sake.
            restarts = torch.tensor(int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
            all_reduce(restarts, op="max")
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not restarts:
                self.logger.warning(
                    "torchrun keeps the addresses of processes that have ended, and restarted ones "
                    "may fail on them: start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
                )
            if restarts and last.is_file():
                self._resume, self._load_from = True, None
            elif not restarts and is_main_process() and (self._load_from or not self._resume):
                # Another training has written it, which this one does not continue.
                last.unlink(missing_ok=True)
        super().load_or_resume()

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
        mesh = self.model.mesh if isinstance(self.model, FullyShardedModel) else None
        if prefix in ("", "http", "https"):
            checkpoint = fetch_checkpoint(filename, map_location, mesh)
        else:
            checkpoint = CheckpointLoader.load_checkpoint(filename, map_location)
        if mesh is not None and not is_sharded(Path(filename)) and "optimizer" in checkpoint:
            states = checkpoint["optimizer"]["state"]
            checkpoint["optimizer"]["state"] = shard_optimizer(states, mesh)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        state: dict[str, Any] = dict(checkpoint.get("state_dict", checkpoint))
        for pattern, replacement in revise_keys:
            state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
        model = self.model.module if is_model_wrapper(self.model) else self.model
        load_state_dict(model, state, strict)
        self._has_loaded = True
        self.logger.info(f"Load checkpoint from {filename}")
        return checkpoint
