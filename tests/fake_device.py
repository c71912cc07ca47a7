# SPDX-License-Identifier: MIT
"""A pretend accelerator: device "fake", whose tensors are CPU tensors in a wrapper. No GPU is needed to see that no
operation mixes devices.

Under the mode `Accelerator` every operation unwraps its tensors, computes on the CPU and wraps what it returns. It
raises MixedDevices for an operation that is handed both wrapped tensors and bare ones of one dimension or more, as a
GPU would; an index may stay on the CPU, and so may either side of a copy.
"""
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
DEVICE = "fake:0"
PRODUCTS = {aten.mm.default, aten.mm.out, aten.addmm.default, aten.bmm.default}
NO_LAUNCH = {aten.empty.memory_format, aten.new_empty.default, aten.detach.default, aten.alias.default}
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
         aten.unique_dim.default, aten.equal.default, aten.bincount.default, aten.repeat_interleave.Tensor}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
MAY_MIX = {aten.index.Tensor, aten.index_put_.default, aten.copy_.default, aten._to_copy.default}

_setup_privateuseone_for_python_backend("fake")


class MixedDevices(AssertionError):
    """An operation was handed tensors of two devices."""


class Wrapped(torch.Tensor):
    """A tensor that says that it lies on the device; `held` is where it does."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype,
                                                   storage_offset=held.storage_offset(), device=DEVICE)

    def __init__(self, held: torch.Tensor):
        self.held = held

    def tolist(self):
        return self.cpu().tolist()

    def __getitem__(self, index):
        """A list is an index tensor; torch would make that one where no mode sees it."""
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts))

    def __repr__(self):
        return f"Wrapped({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise MixedDevices(f"{func} outside of the mode")


def tensors(value: object) -> Iterator[torch.Tensor]:
    """The tensors of an operation's arguments. (torch's pytree does the same, ten times slower.)"""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)


def unwrap(value: object) -> object:
    """Arguments with what the wrapped tensors hold."""
    if isinstance(value, (list, tuple)):
        return [unwrap(part) for part in value]
    return value.held if isinstance(value, Wrapped) else value


def wrap(value: object, wrapped: dict[int, Wrapped]) -> object:
    """Results on the device: what an operation wrote into stays the tensor that it was handed."""
    if isinstance(value, (list, tuple)):
        return type(value)(wrap(part, wrapped) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    return wrapped[id(value)] if id(value) in wrapped else Wrapped(value)


class Counter(TorchDispatchMode):
    """Counts what runs on devices of a kind, "fake" or a real one's. `operations`, by name; `launches`, those that are
    neither views nor empty memory; `waits`, those in which the host waits for it; `elsewhere`, products of matrices
    that run on another device."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.operations: dict[str, int] = {}
        self.launches = self.waits = self.elsewhere = 0

    def there(self, value: object) -> bool:
        return isinstance(value, torch.Tensor) and value.device.type == self.kind

    def on_device(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> bool:
        """Whether an operation runs there."""
        if func is aten.copy_.default:
            return self.there(args[0])
        if kwargs.get("device") is not None:
            return torch.device(kwargs["device"]).type == self.kind
        return any(map(self.there, tensors((args, *kwargs.values()))))

    def must_wait(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> bool:
        """Whether the host waits for the device: for a number, a shape, or a copy, unless it goes to the device and
        need not be waited for. An index on the CPU is copied, too."""
        if func in INDEXED and self.there(args[0]):
            return any(index is not None and index.dim() and (index.dtype in (torch.bool, torch.uint8)
                                                              or not self.there(index)) for index in args[1])
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            to = self.on_device(func, args, kwargs)
            return to != self.there(args[0]) and not (to and kwargs.get("non_blocking"))
        if func is aten.copy_.default:
            to, non_blocking = self.there(args[0]), (*args[2:], kwargs.get("non_blocking"))[0]
            return to != self.there(args[1]) and not (to and non_blocking)
        return func in WAITS and any(map(self.there, args))

    def count(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> bool:
        """Count an operation; return whether it runs on the device."""
        self.waits += bool(self.must_wait(func, args, kwargs))
        on_device = self.on_device(func, args, kwargs)
        if on_device:
            self.operations[str(func)] = self.operations.get(str(func), 0) + 1
            self.launches += not func.is_view and func not in NO_LAUNCH
        self.elsewhere += not on_device and func in PRODUCTS
        return on_device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count(func, args, kwargs or {})
        return func(*args, **kwargs or {})


class Accelerator(Counter):
    """Makes the device, and counts."""

    def __init__(self):
        super().__init__("fake")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = list(tensors((args, *kwargs.values())))
        wrapped = {id(value.held): value for value in given if isinstance(value, Wrapped)}
        bare = [value for value in given if not isinstance(value, Wrapped) and value.dim()]
        if wrapped and bare and func not in MAY_MIX:
            raise MixedDevices(f"{func}: {[tuple(value.shape) for value in bare]} on the CPU, "
                               f"{[tuple(value.shape) for value in wrapped.values()]} on the device")
        on_device = self.count(func, args, kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        found = func(*unwrap(args), **{name: unwrap(value) for name, value in kwargs.items()})
        return wrap(found, wrapped) if on_device else found
