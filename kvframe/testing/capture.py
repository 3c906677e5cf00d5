"""What `capturable` promises, as far as a CPU can tell.

A decode step of capturable stages is recorded as one CUDA graph and repeated. So within a step a stage reads nothing
from the device, changes what it remembers in place, and does the same operations each time. Kernels have versions for
both devices, and are taken at their word.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kvframe.composition import Policy
from kvframe.stages import SLOTS, Stage
from kvframe.testing.altered import altered
from kvframe.testing.broken import Broken
from kvframe.testing.cases import Case, make_call
from kvframe.types import Execution

# Called while something is made or a prompt is read, outside of what a graph repeats.
_OUTSIDE = {"init", "begin", "build", "build_block", "index", "row_index", "observe_prompt", "with_parts"}
_OUTSIDE |= {"host_bytes", "row_bytes", "codec", "capacity_in"}
# Calls of Python that give the host what is on the device.
_READS = {
    Tensor.item: "item()",
    Tensor.tolist: "tolist()",
    Tensor.numpy: "numpy()",
    Tensor.cpu: "cpu()",
    Tensor.__bool__: "bool()",
    Tensor.__int__: "int()",
    Tensor.__float__: "float()",
    Tensor.__index__: "a tensor as an index of Python",
}
# Operations whose result has a shape that depends on values, which the device has to be asked for.
_SHAPED_BY_VALUES = ("nonzero", "masked_select", "unique", "_unique", "bincount", "is_nonzero", "equal")


def steps_can_be_captured(policy: Policy, case: Case, execution: Execution) -> None:
    """Every stage that says `capturable` keeps to it in every step of a case."""
    watchers = {}
    for slot in SLOTS:
        stage = policy.stage(slot)
        if stage.capturable:
            watchers[slot] = _Watcher(stage)
    layer = case.layer(policy.swap(**{slot: watcher.stage for slot, watcher in watchers.items()}), execution)
    text = case.text(layer.layout)
    for call in case.calls():
        for watcher in watchers.values():
            watcher.watching = not call.is_prompt
        make_call(layer, text, case, call)


class _Watcher:
    """A stage whose methods are watched while they are called within a step."""

    def __init__(self, stage: Stage) -> None:
        self.watching = False
        self._original = stage
        self._operations: dict[str, list[str]] = {}
        # A method of the class `Stage` itself belongs to no step.
        names = [name for name in dir(type(stage)) if not name.startswith("_") and name not in _OUTSIDE]
        methods = [name for name in names if callable(getattr(type(stage), name)) and not hasattr(Stage, name)]
        self.stage = altered(stage, **{name: self._around(name) for name in methods})

    def _around(self, name: str) -> Callable[..., Any]:
        def watched(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self.watching:
                return original(*args, **kwargs)
            where = f"{type(self._original).__name__}.{name}"
            # What is handed in and belongs to the stage is its state; it comes last in every method that gets one.
            state = args[-1] if args else None
            before = leaves(state)
            operations: list[str] = []
            try:
                with _RefuseReads(where), _RecordOperations(where, operations):
                    made = original(*args, **kwargs)
                _require_in_place(where, before, leaves(state))
                self._require_same_operations(where, operations)
            except Broken as broken:
                raise Broken(str(broken), self._original) from None
            return made

        return watched

    def _require_same_operations(self, where: str, operations: list[str]) -> None:
        first = self._operations.setdefault(where, operations)
        if first != operations:
            differ = [number for number, (one, two) in enumerate(zip(first, operations)) if one != two]
            place = differ[0] if differ else min(len(first), len(operations))
            said = [each[place] if place < len(each) else "nothing more" for each in (first, operations)]
            raise Broken(
                f"{where} does {said[0]} as operation {place} of its first step and {said[1]} in a later one; "
                "decide with tensors what differs from step to step, not in Python"
            )


def leaves(state: Any, path: str = "state", depth: int = 6) -> dict[str, Any]:
    """Every tensor and every plain value of a state, by where it is; parts of parts up to a depth."""
    if depth == 0:
        return {}
    if isinstance(state, Tensor) or state is None or isinstance(state, bool | int | float | str | bytes):
        return {path: state}
    if attrs.has(type(state)):
        parts = [(f".{field.name}", getattr(state, field.name)) for field in attrs.fields(type(state))]
    elif isinstance(state, Mapping):
        parts = [(f"[{key!r}]", value) for key, value in state.items()]
    elif isinstance(state, Sequence):
        parts = [(f"[{number}]", value) for number, value in enumerate(state)]
    elif hasattr(state, "__dict__"):
        parts = [(f".{name}", value) for name, value in vars(state).items()]
    else:
        return {}
    return {place: leaf for name, part in parts for place, leaf in leaves(part, path + name, depth - 1).items()}


def _require_in_place(where: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    for place in before.keys() | after.keys():
        old, new = before.get(place), after.get(place)
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            if old is not new and (old.data_ptr() != new.data_ptr() or old.shape != new.shape):
                raise Broken(
                    f"{where} puts a new tensor into {place}, where a graph goes on with the old one; "
                    "update it in place, as with copy_ or add_"
                )
        elif isinstance(old, Tensor) or isinstance(new, Tensor) or old != new:
            raise Broken(
                f"{where} changes {place} from {_shown(old)} to {_shown(new)} in Python, which a graph does not "
                "repeat; keep it in a tensor that is updated in place"
            )


def _shown(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)


class _RefuseReads(TorchFunctionMode):
    """Raises Broken where Python asks for a value of a tensor."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = _READS.get(func)
        if func is Tensor.to and "cpu" in (str(value) for value in (*args[1:], *kwargs.values())):
            read = "to('cpu')"
        if read is not None and not _in_kernel():
            raise Broken(f"{self._where} reads a value from the device: {read}; decide with tensors instead")
        return func(*args, **kwargs)


class _RecordOperations(TorchDispatchMode):
    """Keeps the names of operations, and raises Broken where one has to wait for the device."""

    def __init__(self, where: str, operations: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._where = where
        self._operations = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if not _in_kernel():
            if name == "_local_scalar_dense":
                raise Broken(f"{self._where} reads a value from the device; decide with tensors instead")
            if name.startswith(_SHAPED_BY_VALUES) or _indexes_by_mask(name, args, kwargs):
                said = "indexing by a mask" if name.startswith("index") else name
                raise Broken(
                    f"{self._where} makes a tensor whose shape depends on values ({said}), so the host waits for the "
                    "device; use masks, torch.where or masked_fill"
                )
            self._operations.append(name)
        return func(*args, **kwargs)


def _indexes_by_mask(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        by_mask = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
        # One value for all is a masked fill, which needs no shape.
        return by_mask and (name == "index" or args[2].numel() > 1)
    return name == "repeat_interleave" and kwargs.get("output_size") is None


def _in_kernel() -> bool:
    """Is the call one of an operation that has a kernel of its own on a device, or of the layer that the kit made?"""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("kvframe_kernels", "kvframe.testing.cases")):
            return True
        if module.partition(".")[0] != "torch" and not module.startswith("kvframe.testing."):
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False
