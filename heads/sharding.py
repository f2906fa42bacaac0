"""Fully sharded training: PyTorch's FSDP2 as a model wrapper of mmengine, and its files."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from mmengine.dist import all_gather_object, barrier, broadcast, get_world_size, is_main_process
from mmengine.registry import MODEL_WRAPPERS
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor import empty as empty_dtensor

from linsight.backbones.checkpoint import CheckpointError
from linsight.backbones.norms import BATCH_NORMS

# The file of a sharded checkpoint that holds everything but the shards.
REST = "checkpoint.pth"


@MODEL_WRAPPERS.register_module()
class FullyShardedModel(nn.Module):
    """Each process keeps a part of every weight, gradient and optimiser state (FSDP2).

    ::

        model_wrapper_cfg = dict(type="FullyShardedModel", param_dtype="bfloat16")

    The weights of a block are gathered for its forward pass and again for its backward pass, in
    which layers find ordinary tensors (PyTorch FSDP, Zhao et al., arXiv:2304.11277). The weights
    outside of the blocks form one more group. Checkpoints are folders of shards, which a training
    resumes from on any number of processes.

    Args:
        module: the model, built alike in all processes; its weights become those of the first.
        param_dtype: the dtype in which weights are gathered and layers compute, such as
            ``"bfloat16"``. None keeps that of the weights, and leaves the dtype of the computation
            to ``AmpOptimWrapper``. Batch norms always keep the dtype of their weights, and
            gradients are summed in it.
        units: regular expression that matches the whole names of the modules to gather one by one.
            The default matches the blocks of timm's transformers, of its staged models and of its
            ResNets.

    Raises:
        ValueError: the dtype is unknown, or no module has a name that `units` matches.
    """

    def __init__(
        self,
        module: nn.Module,
        param_dtype: str | None = None,
        units: str = r"(.*\.)?(blocks|layer\d)\.\d+",
    ) -> None:
        super().__init__()
        dtypes = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if param_dtype not in dtypes:
            raise ValueError(
                f"model_wrapper_cfg.param_dtype is {param_dtype!r}, expected bfloat16, float16 or "
                "None"
            )
        dtype = dtypes[param_dtype]
        named = list(module.named_modules())
        if not any(re.fullmatch(units, name) for name, _ in named):
            raise ValueError(
                f"model_wrapper_cfg.units is {units!r}, and no module of the model has such a "
                f"name; the first are {', '.join(name for name, _ in named[1:8])}"
            )
        if hasattr(module, "init_weights"):
            cast(Any, module).init_weights()
        for value in module.state_dict().values():
            broadcast(value)
        self.mesh = init_device_mesh(next(module.parameters()).device.type, (get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32)
        exact = MixedPrecisionPolicy(cast_forward_inputs=False)
        # Modules come after those that contain them, and must be sharded before.
        for name, part in reversed(named):
            if dtype is not None and isinstance(part, BATCH_NORMS):
                self._shard(part, exact)
            elif re.fullmatch(units, name):
                self._shard(part, policy)
        self._shard(module, policy)
        distribute_on_load(module)
        self.module: Any = module

    def _shard(self, part: nn.Module, policy: MixedPrecisionPolicy) -> None:
        # By default PyTorch would leave the outermost group gathered after a forward pass, and
        # hooks that read or exchange the weights after a validation would meet both kinds.
        fully_shard(part, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.module(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """mmengine's training step of the model."""
        return self.module.train_step(data, optim_wrapper)

    def val_step(self, data: Any) -> list:
        """mmengine's validation step of the model."""
        return self.module.val_step(data)

    def test_step(self, data: Any) -> list:
        """mmengine's test step of the model."""
        return self.module.test_step(data)


def distribute_on_load(module: nn.Module) -> None:
    """Let a module with sharded weights load ordinary tensors, of which it takes its shards."""

    def distribute(part: nn.Module, state: dict, prefix: str, *rest: Any) -> None:
        for name, weight in part.named_parameters(recurse=False):
            value: Any = state.get(prefix + name)
            if isinstance(weight, DTensor) and _is_whole(value) and value.shape == weight.shape:
                state[prefix + name] = shard(value, weight.device_mesh)

    for part in module.modules():
        part.register_load_state_dict_pre_hook(distribute)


def shard(value: Tensor, mesh: DeviceMesh) -> DTensor:
    """This process's shard of a tensor that all processes have, cut as FSDP2 cuts weights."""
    value = value.to(mesh.device_type)
    return distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)


def is_sharded(checkpoint: Path) -> bool:
    """Whether a path is the folder of a sharded checkpoint."""
    return (checkpoint / REST).is_file()


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this process holds, outside of autograd."""
    return x.to_local() if isinstance(x, DTensor) else x.data


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, DTensor)


def shard_optimizer(state: Any, mesh: DeviceMesh) -> Any:
    """The state of an optimiser with its tensors sharded; scalars, such as counts, stay."""
    return _map(state, lambda _, x: shard(x, mesh) if _is_whole(x) and x.dim() else x)


def _map(node: Any, change: Callable[[str, Any], Any], path: str = "") -> Any:
    """A nested structure of dicts, lists and tuples with `change(path, leaf)` for each leaf."""
    if isinstance(node, Mapping):
        return {key: _map(value, change, f"{path}/{key}") for key, value in node.items()}
    if type(node) in (list, tuple):
        return type(node)(_map(value, change, f"{path}/{i}") for i, value in enumerate(node))
    return change(path, node)


def write_shards(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Write a checkpoint with sharded tensors as a folder, which appears whole or not at all.

    All processes call it. Each writes its shards through ``torch.distributed.checkpoint``, and the
    first also the rest, in which tensors without data stand for the sharded ones.

    Raises:
        CheckpointError: the folder cannot be written; what was there before is untouched.
    """
    shards: dict[str, DTensor] = {}

    def take_out(path: str, leaf: Any) -> Any:
        if isinstance(leaf, DTensor):
            shards[path] = leaf
            return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        return leaf.cpu() if isinstance(leaf, Tensor) else leaf

    rest = _map(checkpoint, take_out)
    beside = folder.with_name(f".{folder.name}.part")
    try:
        if is_main_process():
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        barrier()
        dcp.save(shards, storage_writer=FileSystemWriter(beside))
        if is_main_process():
            with open(beside / REST, "wb") as file:
                torch.save(rest, file)
                file.flush()
                os.fsync(file.fileno())
            # What has this name was left by a training that was killed before it named it in
            # last_checkpoint.
            if folder.is_dir():
                shutil.rmtree(folder)
            elif folder.exists():
                folder.unlink()
            os.replace(beside, folder)
    except (OSError, CheckpointException) as error:
        failures = getattr(error, "failures", None)
        cause = next(iter(failures.values()))[0] if failures else error
        raise CheckpointError(
            f"cannot write {folder}: {getattr(cause, 'strerror', None) or cause}; what was there "
            "before is untouched"
        ) from error
    barrier()


def read_shards(rest: Mapping[str, Any], folder: Path, mesh: DeviceMesh | None) -> dict[str, Any]:
    """Fill in the sharded tensors of a folder that `write_shards` has written.

    Args:
        rest: content of the folder's file `REST`.
        folder: the folder.
        mesh: the processes that share the tensors, each of which reads its shards; with None whole
            tensors are read.

    Raises:
        CheckpointError: the folder is damaged, or its index holds code.
    """
    shards: dict[str, Tensor] = {}

    def put_in(path: str, leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_meta):
            return leaf
        if mesh is None:
            shards[path] = torch.empty(leaf.shape, dtype=leaf.dtype)
        else:
            shards[path] = empty_dtensor(
                leaf.shape, dtype=leaf.dtype, device_mesh=mesh, placements=[Shard(0)]
            )
        return shards[path]

    content = _map(rest, put_in)
    fault = None
    try:
        reader = _DataReader(folder)
        # PyTorch would log a traceback of an index that is missing, before it raises its error.
        reader.read_metadata()
        with warnings.catch_warnings():
            # Without processes to share the tensors with, PyTorch says so at each call.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(shards, storage_reader=reader, no_dist=True)
    except (CheckpointException, OSError, EOFError, pickle.UnpicklingError, RuntimeError) as error:
        failures = getattr(error, "failures", None)
        cause = next(iter(failures.values()))[0] if failures else error
        fault = str(cause) or type(cause).__name__
    # Each process reads other files, and those whose files are whole must not wait for the rest.
    faults = [fault] if mesh is None else all_gather_object(fault)
    if any(faults):
        raise CheckpointError(
            f"checkpoint {folder} is incomplete or damaged: {next(filter(None, faults))}"
        )
    return content


class _DataReader(FileSystemReader):
    """torch's reader of shards, whose index is a pickle, with imports of data types alone."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path, ".metadata"), "rb") as file:
            return _DataUnpickler(file).load()


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _INDEX_NAMES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index asks for {module}.{name}")


_INDEX_NAMES = {
    "collections.OrderedDict",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "torch.Size",
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
