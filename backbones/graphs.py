"""CUDA graphs for the passes of any module: one call switches them on.

A model of many small layers keeps the host busy with launches while the GPU waits. A CUDA graph is
recorded once and then launched as a whole.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..kernels.runtime.dispatch import current_choice, runs_eagerly
from ..kernels.runtime.private import (
    call_forward,
    get_call,
    has_global_hooks,
    has_hooks,
    is_compiled_copy,
    set_call,
)
from .graph_passes import (
    InferencePass,
    LastStep,
    NotCapturable,
    Pass,
    Recorder,
    TrainingPass,
    describe,
)

Module = TypeVar("Module", bound=nn.Module)

logger = logging.getLogger(__name__)

# A recording costs about as much as this many passes.
_WORTH = 16
# So many recordings that were not worth it end the attempts.
_ATTEMPTS = 3
# Signatures that have been called once are remembered up to this number.
_REMEMBERED = 64


def capture_training(model: Module, shapes: int = 2) -> Module:
    """Let a model replay its training passes from CUDA graphs.

    ::

        model = linsight.capture_training(timm.create_model("rala_vit_small").cuda())

    The loop around the model stays as it is. In training mode, with gradients enabled, the second
    call with inputs of one signature (shapes, strides, dtypes, ``requires_grad``, autocast) records
    the forward and the backward pass, after two passes that leave weights, running statistics,
    attributes and random generators as they were; from then on the pair is replayed. Losses,
    scaling, accumulation and clipping of gradients, optimisers and averaged weights stay outside:
    results and gradients are copies, which no later pass overwrites, and parameters get their
    gradients as from the model itself, with their hooks. Dropout and drop path draw fresh numbers
    from PyTorch's generators, the same as without graphs.

    The model runs as without graphs on the CPU, in evaluation and under ``torch.no_grad()``. It
    does so too, and logs the reason once as a warning, where a replay would be wrong or cannot be
    recorded:

    - hooks of modules, gradient checkpointing, parameters that are tensors of another type;
    - a pass that waits for the GPU, draws random numbers on the host, writes to its inputs, sets
      attributes, or fills lists or dicts among them;
    - a forward pass while the backward pass of the one before may still come;
    - batch norms that take their statistics over processes by another backend than NCCL. With
      NCCL all processes must get inputs of the same shapes;
    - signatures beyond the number `shapes`.

    If a layer, a parameter's memory, a mode or any other attribute of a module changes, the passes
    are recorded anew. Settings of the whole process, such as
    ``torch.use_deterministic_algorithms``, are those at the time of recording.

    The model is changed in place, its weights and their names are not. Copies of it, and what is
    loaded from a pickle, run without graphs. ``DistributedDataParallel`` may wrap it before or
    after. Graphs keep memory for themselves: that of one training pass, and twice the gradients.
    :func:`release_graphs` frees them; with NCCL it must come before the group of processes ends.

    Args:
        model: any module that takes and returns tensors on one GPU, in tuples, lists and dicts.
        shapes: number of signatures that are recorded; others run without graphs.

    Returns:
        The model.

    Raises:
        ValueError: the model is compiled, or `shapes` is below 1.
    """
    _attach(model).training = _Passes(TrainingPass, _check_number(shapes), replaces=False)
    return model


def capture_inference(model: Module, shapes: int = 8) -> Module:
    """Let a model replay its inference from CUDA graphs, one per signature of its inputs.

    ::

        model = linsight.capture_inference(model.eval())
        with torch.inference_mode():
            logits = model(images)

    In evaluation mode, with gradients disabled, the second call with inputs of one signature
    (shapes, strides, dtypes, autocast) records the pass, and later ones replay it. Results are
    copies. Where it runs without graphs, what is noticed, and what is logged is as for
    :func:`capture_training`, which one model may have too.

    Args:
        model: any module that takes and returns tensors on one GPU, in tuples, lists and dicts.
        shapes: number of signatures whose graphs are kept; the least recently used one goes.

    Returns:
        The model.

    Raises:
        ValueError: the model is compiled, or `shapes` is below 1.
    """
    _attach(model).inference = _Passes(InferencePass, _check_number(shapes), replaces=True)
    return model


def release_graphs(model: nn.Module) -> None:
    """Free the CUDA graphs of a model and of its parts, which run without graphs from then on.

    Call it before ``torch.distributed.destroy_process_group``, which waits for ever for graphs in
    which NCCL communicates: those of batch norms that take their statistics over processes.

    Args:
        model: what :func:`capture_training` or :func:`capture_inference` was called with, or a
            module around it. One without graphs is left as it is.
    """
    for part in model.modules():
        graphs = get_call(part)
        if isinstance(graphs, _Graphs):
            set_call(part, None)
            for passes in (graphs.training, graphs.inference):
                if passes is not None and passes.recorder is not None:
                    passes.passes.clear()
                    passes.recorder.release()


def is_recording() -> bool:
    """Whether a pass is being recorded, or rehearsed for it: all later ones have its sizes."""
    return _Graphs.recording


def _check_number(shapes: int) -> int:
    if not isinstance(shapes, int) or shapes < 1:
        raise ValueError(f"shapes is {shapes!r}, expected 1 or more signatures to record")
    return shapes


def _attach(model: nn.Module) -> _Graphs:
    module = model.module if isinstance(model, DistributedDataParallel) else model
    call = get_call(module)
    if isinstance(call, _Graphs):
        return call
    if call is not None or is_compiled_copy(module):
        raise ValueError(
            f"{type(module).__name__} is compiled, and its calls are PyTorch's: compile it with "
            "mode='reduce-overhead' for graphs, or capture it without compile()"
        )
    graphs = _Graphs(module)
    set_call(module, graphs)
    return graphs


class _Passes:
    """The recorded passes of one kind, by signature.

    Args:
        make: makes a pass.
        most: the number of passes that are kept.
        replaces: whether a further one takes the place of the least recently used.
    """

    def __init__(self, make: Callable[..., Pass], most: int, replaces: bool) -> None:
        self.make, self.most, self.replaces = make, most, replaces
        self.passes: OrderedDict[Hashable, Any] = OrderedDict()
        self.called: OrderedDict[Hashable, None] = OrderedDict()
        self.refused: dict[Hashable, str] = {}
        self.wasted: dict[Hashable, int] = {}
        self.recorder: Recorder | None = None
        self.last = LastStep()

    def find(self, signature: Hashable) -> Any:
        """The pass of a signature, or None."""
        found = self.passes.get(signature)
        if found is not None:
            self.passes.move_to_end(signature)
        return found

    def is_due(self, signature: Hashable) -> bool:
        """Whether to record a signature now: its first call prepares kernels and libraries.

        Raises:
            NotCapturable: it was refused, or there is no room for it.
        """
        if signature in self.refused or len(self.refused) >= _ATTEMPTS:
            reasons = self.refused
            raise NotCapturable(reasons.get(signature) or next(iter(reasons.values())))
        if signature not in self.called:
            self.called[signature] = None
            if len(self.called) > _REMEMBERED:
                self.called.popitem(last=False)
            return False
        if len(self.passes) >= self.most and not self.replaces:
            raise NotCapturable(f"{self.most} shapes of inputs are recorded, and it gets another")
        return True

    def drop(self, signature: Hashable, change: str) -> None:
        """Forget a pass, because the module has changed."""
        if self.passes.pop(signature).replays < _WORTH:
            self.wasted[signature] = self.wasted.get(signature, 0) + 1
            if self.wasted[signature] == _ATTEMPTS:
                self.refused[signature] = f"the module changes again and again ({change})"

    def record(
        self,
        signature: Hashable,
        module: nn.Module,
        args: tuple,
        kwargs: dict,
        make_recorder: Callable[[], Recorder],
    ) -> Any:
        """Record a pass.

        Raises:
            NotCapturable: it cannot be recorded.
        """
        if len(self.passes) >= self.most:
            self.passes.popitem(last=False)
        if not self.passes or self.recorder is None:
            self.recorder = make_recorder()
        try:
            made = self.make(module, args, kwargs, self.recorder)
        except NotCapturable as error:
            self.refused[signature] = str(error)
            raise
        # Whatever fails here, the call that follows runs without graphs, and raises what is the
        # module's own fault.
        except Exception as error:
            # What went wrong comes first; then the recording that was cut off raises, too.
            cause: BaseException = error
            while cause.__context__ is not None:
                cause = cause.__context__
            line = (str(cause).splitlines() or [type(cause).__name__])[0]
            self.refused[signature] = f"CUDA could not record it: {line}"
            self.passes.clear()
            self.recorder.recover()
            raise NotCapturable(self.refused[signature]) from error
        self.passes[signature] = made
        return made


class _Graphs:
    """Takes the calls of a module, and replays those that it can.

    Args:
        module: the module.
    """

    make_recorder: Callable[[torch.device], Recorder] = Recorder
    # Nothing else is replayed or recorded within a recording.
    recording = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.training: _Passes | None = None
        self.inference: _Passes | None = None
        self.logged: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _Graphs.recording or not runs_eagerly():
            return call_forward(self.module, *args, **kwargs)
        training = torch.is_grad_enabled()
        passes = self.training if training else self.inference
        if passes is None or self.module.training != training:
            return call_forward(self.module, *args, **kwargs)
        try:
            tensors: list[Tensor] = []
            described = describe((args, kwargs), tensors)
            kind = self.make_recorder.device_type
            if not any(x.device.type == kind for x in tensors):
                return call_forward(self.module, *args, **kwargs)
            if kind == "cuda" and torch.cuda.is_current_stream_capturing():
                return call_forward(self.module, *args, **kwargs)
            signature = described, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            signature = *signature, current_choice()
            replay = self._replay_training if training else self._replay_inference
            return replay(passes, signature, args, kwargs, tensors)
        except NotCapturable as error:
            self._log(str(error))
        return call_forward(self.module, *args, **kwargs)

    def _replay_training(
        self, passes: _Passes, signature: Hashable, args: tuple, kwargs: dict, tensors: list[Tensor]
    ) -> Any:
        if passes.last.waits():
            raise NotCapturable("the backward pass of its last forward pass may still come")
        found = passes.find(signature)
        if found is not None:
            change = found.watch.find_change()
            if change is None:
                return found(tensors, passes.last.begin())
            passes.drop(signature, change)
        if not passes.is_due(signature):
            return call_forward(self.module, *args, **kwargs)
        found = self._record(passes, signature, args, kwargs, tensors[0].device)
        return found(tensors, passes.last.begin())

    def _replay_inference(
        self, passes: _Passes, signature: Hashable, args: tuple, kwargs: dict, tensors: list[Tensor]
    ) -> Any:
        found = passes.find(signature)
        if found is not None:
            # The GPU computes while the host compares.
            result = found(tensors)
            change = found.watch.find_change()
            if change is None:
                return result
            passes.drop(signature, change)
        if not passes.is_due(signature):
            return call_forward(self.module, *args, **kwargs)
        # Tensors made in inference mode could not be written to outside.
        with torch.inference_mode(False), torch.no_grad():
            found = self._record(passes, signature, args, kwargs, tensors[0].device)
        return found(tensors)

    def _record(
        self,
        passes: _Passes,
        signature: Hashable,
        args: tuple,
        kwargs: dict,
        device: torch.device,
    ) -> Any:
        obstacle = self._find_obstacle(device)
        if obstacle is not None:
            raise NotCapturable(obstacle)
        _Graphs.recording = True
        try:
            return passes.record(
                signature, self.module, args, kwargs, lambda: self.make_recorder(device)
            )
        finally:
            _Graphs.recording = False

    def _find_obstacle(self, device: torch.device) -> str | None:
        """Why the module as it is now cannot be recorded, or None."""
        parts = list(self.module.modules())
        if has_global_hooks() or any(map(has_hooks, parts)):
            return "hooks of modules do not run in a replay"
        if any(getattr(part, "grad_checkpointing", False) for part in parts):
            return "gradient checkpointing runs parts of the forward pass again"
        if any(not isinstance(get_call(part), (_Graphs, type(None))) for part in parts):
            return "a part of it is compiled"
        for name, x in (*self.module.named_parameters(), *self.module.named_buffers()):
            if type(x) not in (Tensor, nn.Parameter):
                return f"{name} is a {type(x).__name__}"
            if x.device != device:
                return f"{name} is on {x.device}, and the inputs are on {device}"
        shared = any(
            isinstance(part, nn.SyncBatchNorm) or getattr(part, "synchronized", False)
            for part in parts
        )
        if shared and dist.is_available() and dist.is_initialized():
            backend = dist.get_backend()
            if "nccl" not in backend:
                return f"its batch norms communicate through {backend}, which is not recorded"
        return None

    def _log(self, reason: str) -> None:
        if reason not in self.logged:
            self.logged.add(reason)
            name = type(self.module).__name__
            logger.warning("A pass of %s runs without CUDA graphs: %s", name, reason)
