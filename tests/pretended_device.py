"""A GPU that is not there: tensors on the CPU that say they lie on `cuda:0`, and behave so.

Inside `pretended_device()` the name `"cuda"` stands for this device. What is computed there is
computed by the CPU, but it refuses what CUDA refuses: tensors of the CPU beside its own (except
numbers of no dimension, in functions of single elements), its own tensors as indices of one of the
CPU, generators that lie elsewhere, and numpy. `tests/test_pretended_device.py` lists these rules.

Only calls of torch from Python are looked at, not the kernels that a GPU would run: its rounding,
its random numbers and its missing operators are not pretended.
"""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)
_RealGenerator = torch.Generator

_ELEMENTWISE = {
    *("add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "truediv", "rtruediv"),
    *("floordiv", "rfloordiv", "floor_divide", "true_divide", "mod", "rmod", "remainder", "fmod"),
    *("pow", "rpow", "radd", "rmul", "rdiv", "iadd", "isub", "imul", "itruediv", "ipow", "idiv"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "iand", "ior", "ixor"),
    *("logical_and", "logical_or", "logical_xor", "maximum", "minimum", "clamp", "where"),
    *("logaddexp", "lerp", "addcmul", "addcdiv", "masked_fill", "fill", "xlogy", "hypot", "atan2"),
}
"""Functions that take a CPU tensor of no dimension beside tensors of the device."""


class PretendedTensor(Tensor):
    """A tensor whose `device` is the pretended one."""

    device = property(lambda self: DEVICE)
    is_cpu = property(lambda self: False)
    is_cuda = property(lambda self: True)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class PretendedGenerator(_RealGenerator):
    """A generator that draws on the pretended device."""

    device = property(lambda self: DEVICE)


class _AnyGenerator(type):
    def __call__(cls, device="cpu"):
        return PretendedGenerator() if _is_there(device) else _RealGenerator(device)

    def __instancecheck__(cls, one):
        return isinstance(one, _RealGenerator)


class _Generator(metaclass=_AnyGenerator):
    """`torch.Generator` while there is a pretended device."""


class _Mode(TorchFunctionMode):
    """Sees also the calls that have no tensor of the device in them, such as `torch.zeros`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextmanager
def pretended_device():
    """The device, as `torch.device("cuda", 0)`, which is there until the block ends."""
    torch.Generator = _Generator
    try:
        with _Mode():
            yield DEVICE
    finally:
        torch.Generator = _RealGenerator


def _is_there(device):
    """Whether this names the pretended device."""
    return device is not None and torch.device(device).type == DEVICE.type


def _run(func, args, kwargs):
    """What a function of torch gives, or the error that it gives where tensors lie apart."""
    with torch._C.DisableTorchFunctionSubclass():
        rule = _RULES.get(func) or _RULES.get(getattr(func, "__name__", ""), _everything_else)
        return rule(func, args, kwargs)


def _everything_else(func, args, kwargs):
    tensors, name = list(_of_kind(Tensor, (args, kwargs))), getattr(func, "__name__", "")
    there = any(isinstance(tensor, PretendedTensor) for tensor in tensors)
    if there:
        _check_together(name, args, tensors)
    if kwargs.get("device") is not None:
        there = _is_there(kwargs["device"])
        kwargs = {**kwargs, "device": "cpu"} if there else kwargs
    for generator in _of_kind(_RealGenerator, (args, kwargs)):
        if isinstance(generator, PretendedGenerator) != there:
            want, got = ("cuda", "cpu") if there else ("cpu", "cuda")
            raise RuntimeError(f"Expected a '{want}' device type for generator but found '{got}'")
    return _moved(func(*args, **kwargs), there, tensors)


def _check_together(name, args, tensors):
    """Refuse tensors of the CPU beside those of the device."""
    bare = name.strip("_")
    alone = name == f"{bare}_" or bare in ("iadd", "isub", "imul", "itruediv", "ipow")  # in place
    for tensor in tensors:
        if not isinstance(tensor, PretendedTensor):
            a_number = tensor.dim() == 0 and bare in _ELEMENTWISE
            is_mask = bare == "masked_fill" and len(args) > 1 and tensor is args[1]
            if not a_number or is_mask or (alone and tensor is args[0]):
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two "
                    f"devices, {DEVICE} and cpu! (in {name})"
                )


def _of_kind(kind, values):
    """All of a kind in nested lists, tuples and dicts."""
    if isinstance(values, kind):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _of_kind(kind, value)
    elif isinstance(values, dict):
        yield from _of_kind(kind, list(values.values()))


def _moved(result, there, inputs=()):
    """`result` with its tensors on the device, or on the CPU."""
    if isinstance(result, Tensor) and isinstance(result, PretendedTensor) != there:
        if any(result is one for one in inputs):  # a move makes a copy
            result = result.clone()
        if there:
            result.__class__ = PretendedTensor
        elif isinstance(result, PretendedTensor):
            result = result.clone()
    elif isinstance(result, (list, tuple)):
        for part in result:
            _moved(part, there)
    return result


def _to(func, args, kwargs):
    own, *args = args
    there, places = isinstance(own, PretendedTensor), {}
    for where, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor):
            there = isinstance(value, PretendedTensor)
        elif isinstance(value, (str, torch.device)):
            there, places[where] = _is_there(value), "cpu"
    args = [places.get(where, value) for where, value in enumerate(args)]
    kwargs = {name: places.get(name, value) for name, value in kwargs.items()}
    return _moved(func(own, *args, **kwargs), there, [own])


def _cpu(func, args, kwargs):
    return _moved(args[0], False, args)


def _cuda(func, args, kwargs):
    return _moved(args[0], True, args)


def _no_numpy(func, args, kwargs):
    if isinstance(args[0], PretendedTensor):
        raise TypeError(
            f"can't convert {DEVICE} device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )
    return func(*args, **kwargs)


def _check_indices(own, indices):
    if isinstance(own, PretendedTensor):
        return
    for index in _of_kind(PretendedTensor, indices):
        if index.dim() > 0 or index.dtype == torch.bool:  # else it is read as a number
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )


def _get_item(func, args, kwargs):
    _check_indices(*args)
    return _moved(func(*args, **kwargs), isinstance(args[0], PretendedTensor))


def _set_item(func, args, kwargs):
    own, indices, value = args[:3]
    _check_indices(own, indices)
    with_tensors = any(
        index.dim() > 0 or index.dtype == torch.bool for index in _of_kind(Tensor, indices)
    )
    apart = isinstance(value, Tensor) and isinstance(value, PretendedTensor) != isinstance(
        own, PretendedTensor
    )
    if with_tensors and apart and value.dim() > 0:  # a slice copies from everywhere
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{DEVICE} and cpu! (in {func.__name__})"
        )
    return _moved(func(*args, **kwargs), isinstance(own, PretendedTensor))


def _where_the_first_lies(func, args, kwargs):
    return _moved(func(*args, **kwargs), isinstance(args[0], PretendedTensor), args)


def _iter(func, args, kwargs):
    rows = args[0].unbind(0)
    return iter(_moved(rows, isinstance(args[0], PretendedTensor)))


def _deepcopy(func, args, kwargs):
    own, memo = args
    if not isinstance(own, PretendedTensor):
        return func(*args, **kwargs)
    if id(own) not in memo:
        new = _moved(own.detach().clone(), True).requires_grad_(own.requires_grad)
        new.__dict__.update(own.__dict__)
        if own.grad is not None:
            new.grad = _moved(own.grad.clone(), True)
        memo[id(own)] = new
    return memo[id(own)]


def _from_data(func, args, kwargs):
    data = args[0] if args else kwargs["data"]
    there = isinstance(data, PretendedTensor)
    if kwargs.get("device") is not None:
        there = _is_there(kwargs["device"])
        kwargs = {**kwargs, "device": "cpu"} if there else kwargs
    return _moved(func(*args, **kwargs), there, [data])


def _gradients(func, args, kwargs):
    inputs = args[1] if len(args) > 1 else kwargs["inputs"]
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    found = func(*args, **kwargs)
    for gradient, one in zip(found, inputs, strict=True):
        _moved(gradient, isinstance(one, PretendedTensor))
    return found


def _format(func, args, kwargs):
    own, spec = args
    return format(own.item() if own.dim() == 0 else str(own), spec)


def _stays_the_same_weight(func, args, kwargs):
    """Whether `Module.to` puts new values into a weight; one that changes devices is a new one."""
    return isinstance(args[0], PretendedTensor) == isinstance(args[1], PretendedTensor)


def _repr(func, args, kwargs):
    own = args[0]
    if not isinstance(own, PretendedTensor):
        return func(*args, **kwargs)
    return f"tensor({own.tolist()}, device='{DEVICE}')"


_RULES = {
    torch.autograd.grad: _gradients,
    torch.tensor: _from_data,
    torch.as_tensor: _from_data,
    torch.asarray: _from_data,
    "to": _to,
    "cpu": _cpu,
    "cuda": _cuda,
    "numpy": _no_numpy,
    "__array__": _no_numpy,
    "__getitem__": _get_item,
    "__setitem__": _set_item,
    "index_put": _set_item,
    "index_put_": _set_item,
    "copy_": _where_the_first_lies,
    "expand_as": _where_the_first_lies,
    "view_as": _where_the_first_lies,
    "reshape_as": _where_the_first_lies,
    "__iter__": _iter,
    "__deepcopy__": _deepcopy,
    "__repr__": _repr,
    "__format__": _format,
    "_has_compatible_shallow_copy_type": _stays_the_same_weight,
}
