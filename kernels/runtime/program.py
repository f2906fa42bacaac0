"""A call whose signature came before repeats its launches, without the Python that chose them.

An operator's Python looks up plans, makes tensors and passes views of them to its kernels: 30 to
60 us of the host, around kernels of 5 to 30 us. All of that depends on the call's signature alone.
So the first call of a signature is recorded as a `Program`: new tensors, launches with addresses
relative to tensors, and what PyTorch computes between them. Later calls run the program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .dispatch import PLAIN_TENSORS, SCALARS
from .launch import Launch, observe_launches
from .private import (
    MachineCode,
    empty_strided_cuda,
    get_device,
    get_stream,
    start_machine_code,
)

# The signatures that a function remembers: as many as plans.
MOST_PROGRAMS = 4096
# The alignment in bytes of tensors that share an allocation.
ALIGNMENT = 256
_aten = torch.ops.aten
_MAKES_EMPTY = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
}


def cache_launches(run: Callable) -> Callable:
    """Make a function that launches kernels cheap to repeat.

    Args:
        run: takes tensors and hashable values, or lists of them, by position, and returns a
            tensor or a tuple of tensors and None. The signature of a call decides what it does:
            shapes, strides, dtypes and alignments of tensors, and all other values. It changes
            nothing but tensors.

    Returns:
        A function of the same arguments and results.
    """
    programs: dict[tuple, Program | None] = {}

    @wraps(run)
    def call(*args: Any) -> Any:
        signature = describe_call(args)
        if signature is None:
            return run(*args)
        if signature in programs:
            program = programs[signature]
            return run(*args) if program is None else program(args)
        if len(programs) >= MOST_PROGRAMS:
            programs.clear()
        recorder = _Recorder(args)
        with recorder, observe_launches(recorder.add_launch):
            results = run(*args)
        programs[signature] = recorder.make_program(results)
        return results

    return call


def describe_call(args: tuple) -> tuple | None:
    """The signature of a call; None if a tensor is not plain, or not on the current device."""
    signature: list = []
    device = None
    for x in args:
        kind = type(x)
        if kind not in PLAIN_TENSORS:
            if kind not in SCALARS and isinstance(x, Tensor):
                return None
            # PyTorch gives a registered operator lists, which cannot be looked up.
            signature.append(tuple(x) if kind is list else x)
            continue
        index = x.get_device()
        if device is None:
            device = index
            if x.is_meta or (index >= 0 and index != get_device()):
                return None
            signature.append(index)
        elif index != device:
            return None
        # Machine code differs by which addresses are multiples of 16 bytes.
        signature += (x.shape, x.stride(), x.dtype, x.data_ptr() & 15)
    return None if device is None else tuple(signature)


@dataclass(frozen=True)
class Part:
    """A tensor that begins `offset` elements after the tensor in a slot, or has other strides."""

    slot: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def take_from(self, tensors: list[Tensor]) -> Tensor:
        whole = tensors[self.slot]
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)


@dataclass(frozen=True)
class Operation:
    """An operation of PyTorch between the launches.

    Args:
        operator: what is called.
        args, options: its arguments, with slots and parts for tensors.
        is_result: whether its result takes the next slot.
    """

    operator: Callable
    args: tuple
    options: dict[str, Any]
    is_result: bool

    def run(self, tensors: list[Tensor]) -> None:
        args = [x.take_from(tensors) if type(x) is Part else x for x in self.args]
        result = self.operator(*args, **self.options)
        if self.is_result:
            tensors.append(result)


@dataclass(frozen=True)
class Program:
    """What a function does at one signature.

    A slot holds one of the program's tensors: the arguments that it uses, then the new tensors,
    then the results of operations.

    Args:
        device: the index of the GPU; -1 is the CPU, where Triton's interpreter runs.
        inputs: the positions of the arguments that are tensors.
        new: shape, strides and dtype of each new tensor.
        steps: operations, and launches: what to start, for each tensor its slot and the bytes to
            where it begins, and the other arguments. The interpreter needs the dtypes as well.
        results: a slot, a part of a slot, or None, for each result.
        single: whether the function returns one tensor, and not a tuple.
    """

    device: int
    inputs: tuple[int, ...]
    new: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
    steps: list[Operation | tuple]
    results: list[int | Part | None]
    single: bool

    def __call__(self, args: tuple) -> Any:
        """Make the results of a call with arguments of the program's signature."""
        tensors = [args[i] for i in self.inputs]
        if self.device < 0:
            self._interpret(tensors)
        else:
            tensors += [empty_strided_cuda(*new) for new in self.new]
            at = [x.data_ptr() for x in tensors]
            stream = get_stream(self.device)
            for step in self.steps:
                if isinstance(step, Operation):
                    step.run(tensors)
                    if step.is_result:
                        at.append(tensors[-1].data_ptr())
                    continue
                code, places, numbers = step
                arguments = (*[at[slot] + offset for slot, offset in places], *numbers)
                start_machine_code(*code, arguments, stream)
        if self.single:  # without a list, whose making is a call of its own
            x = self.results[0]
            return tensors[x] if isinstance(x, int) else x and x.take_from(tensors)
        return tuple(
            [tensors[x] if isinstance(x, int) else x and x.take_from(tensors) for x in self.results]
        )

    def _interpret(self, tensors: list[Tensor]) -> None:
        tensors += [torch.empty_strided(*new[:2], dtype=new[2]) for new in self.new]
        for step in self.steps:
            if isinstance(step, Operation):
                step.run(tensors)
                continue
            kernel, how, places, numbers = step
            # Tensors of one element, if there is one, that begin at the launch's places.
            views = [
                (x if x.dtype == dtype else x.view(dtype)).as_strided(
                    (min(x.numel(), 1),), (1,), x.storage_offset() + offset // dtype.itemsize
                )
                for x, offset, dtype in [(tensors[slot], *place) for slot, *place in places]
            ]
            kernel[how.grid](*views, *numbers, **how.constants)


class _NotRepeatable(Exception):
    """A call does what its signature does not decide, or what a program cannot hold."""


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class _Recorder(TorchDispatchMode):
    """Watches one call with the arguments `args`, and makes its program."""

    def __init__(self, args: tuple) -> None:
        super().__init__()
        self.inputs = [i for i, x in enumerate(args) if isinstance(x, Tensor)]
        self.arguments: list[Tensor] = [args[i] for i in self.inputs]
        self.storages = [_address(x) for x in self.arguments]
        self.known = set(self.storages)
        self.new: list[Tensor] = []
        self.steps: list[tuple] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result: Any = operator(*args, **kwargs)
        if operator.overloadpacket in _MAKES_EMPTY:
            self.new.append(result)
            self.known.add(_address(result))
            return result
        results = result if isinstance(result, (tuple, list)) else (result,)
        is_view = all(isinstance(x, Tensor) and _address(x) in self.known for x in results)
        if operator._schema.is_mutable or not is_view:
            self.steps.append((operator, args, kwargs, None if is_view else result))
            self.known.update(_address(x) for x in results if isinstance(x, Tensor))
        return result

    def add_launch(self, kernel: Any, how: Launch, code: MachineCode | None, args: tuple) -> None:
        """Take a launch down, with the machine code that it started on a GPU."""
        self.steps.append((how, kernel, code, args))

    def make_program(self, results: Any) -> Program | None:
        """The program of the call that was watched; None if it cannot be repeated."""
        single = isinstance(results, Tensor)
        try:
            return self._make_program([results] if single else list(results), single)
        except _NotRepeatable:
            return None

    def _make_program(self, results: list[Tensor | None], single: bool) -> Program:
        addresses = [x.data_ptr() for x in self.arguments if x.numel()]
        if len(set(addresses)) < len(addresses):
            raise _NotRepeatable  # Another call may have two tensors where this one has one twice.
        self.wholes: list[Tensor | None] = list(self.arguments)
        self.places: dict[int, tuple[int, int]] = {}
        new = self._place_new_tensors(results)
        steps = [self._make_step(step) for step in self.steps]
        device = self.arguments[0].get_device()
        parts = [None if x is None else self._find_part(x) for x in results]
        return Program(device, tuple(self.inputs), new, steps, parts, single)

    def _place_new_tensors(self, results: list[Tensor | None]) -> list[tuple]:
        """Give the new tensors their slots; return how they are made."""
        used = [x for x in results if x is not None]
        for _, args, options, _ in self.steps:
            if isinstance(options, dict):
                used += [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
        apart = {_address(x) for x in used}
        new = []
        for x in self.new:
            if _address(x) in apart:
                self.places[_address(x)] = len(self.wholes), 0
                self.wholes.append(x)
                new.append((tuple(x.shape), x.stride(), x.dtype))
        # What only kernels see lies in one allocation, which the host makes once.
        scratch = 0
        for x in self.new:
            if _address(x) not in apart:
                self.places[_address(x)] = len(self.wholes), scratch
                scratch += -(-x.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
        if scratch:
            new.append(((scratch,), (1,), torch.uint8))
            self.wholes.append(None)
        return new

    def _make_step(self, step: tuple) -> Operation | tuple:
        how, kernel, code, args = step
        if not isinstance(how, Launch):
            return self._make_operation(*step)
        count = sum(isinstance(x, Tensor) for x in args)
        places = [self._find(x) for x in args[:count]]
        numbers = (*args[count:], *how.sizes)
        if not args[0].is_cuda:
            # What is empty has the place of the first argument (`_find`), and so its dtype.
            dtypes = [(x if x.numel() else self.arguments[0]).dtype for x in args[:count]]
            places = [(*place, dtype) for place, dtype in zip(places, dtypes, strict=True)]
            return kernel, how, places, numbers
        if code is None:
            raise _NotRepeatable
        return code.start, places, code.choose(numbers, count)

    def _make_operation(
        self, operator: Any, args: tuple, options: dict, result: Tensor | None
    ) -> Operation:
        if any(isinstance(x, Tensor) for x in options.values()) or any(
            isinstance(y, Tensor) for x in args if isinstance(x, (tuple, list)) for y in x
        ):
            raise _NotRepeatable
        args = tuple(self._whole_part(x) if isinstance(x, Tensor) else x for x in args)
        if result is not None:
            if not isinstance(result, Tensor):
                raise _NotRepeatable
            self.places[_address(result)] = len(self.wholes), 0
            self.wholes.append(result)
        return Operation(operator, args, options, result is not None)

    def _find(self, x: Tensor) -> tuple[int, int]:
        """The slot in which a tensor begins, and the bytes before it."""
        if not x.numel():
            return 0, 0  # It is never read.
        storage = _address(x)
        if storage in self.places:
            slot, offset = self.places[storage]
            return slot, offset + x.data_ptr() - storage
        # Arguments may be parts of one tensor, and how far apart the signature does not tell.
        found = [
            (slot, x.data_ptr() - self.arguments[slot].data_ptr())
            for slot, address in enumerate(self.storages)
            if address == storage
        ]
        exact = [place for place in found if place[1] == 0]
        if len(exact or found) != 1:
            raise _NotRepeatable
        return (exact or found)[0]

    def _find_part(self, x: Tensor) -> int | Part:
        same = [slot for slot, whole in enumerate(self.wholes) if whole is x]
        if same:
            return same[0]
        slot, offset = self._find(x)
        whole = self.wholes[slot]
        if whole is None or whole.dtype != x.dtype or not x.numel():
            raise _NotRepeatable
        if offset == 0 and x.shape == whole.shape and x.stride() == whole.stride():
            return slot
        return Part(slot, offset // x.dtype.itemsize, x.shape, x.stride())

    def _whole_part(self, x: Tensor) -> Part:
        part = self._find_part(x)
        return Part(part, 0, x.shape, x.stride()) if isinstance(part, int) else part
