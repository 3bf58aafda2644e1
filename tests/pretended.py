"""A pretended GPU, for machines without one: a device of its own whose tensors lie in host memory.

It computes with the kernels of the CPU, and is strict about where tensors are, as CUDA is: tensors of two devices in an
operation, a generator of another device and NumPy's view of its memory are errors. Where the program asks whether a
device is "cuda", it goes the way of others. Importing this changes torch for the whole process, so tests on it have one
of their own (test_pretended.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
aten = torch.ops.aten
# operations that take indices from host memory as well
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# operations that take no number from host memory
WITHOUT_NUMBERS = {aten.embedding.default, aten.index_select.default, aten.gather.default, aten.scatter.src}


class _Backend:
    """torch.pretended."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda seed: None)
    synchronize = staticmethod(lambda device=None: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


_setup_privateuseone_for_python_backend(NAME, _Backend())
# a module's parameters become others in `Module.to`, and tied ones stay tied
torch.__future__.set_swap_module_params_on_conversion(True)


class OnGPU(Tensor):
    """A tensor that says it is on the GPU. held: its values"""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGPU:
        self: OnGPU = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        self.held = held
        return self

    def __repr__(self, **_: Any) -> str:
        return f"OnGPU({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """While it is entered, there is the device."""

    def __enter__(self) -> Pretended:
        self._before = torch._C._only_lift_cpu_tensors()
        # torch.tensor(..., device=...) copies to the device by an operation
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if OnGPU not in types and kwargs.get("device") is None:  # all of it is on the CPU
            return func(*args, **kwargs)
        return _computed(func, args, kwargs)


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on the device of its tensors."""
    if func is aten._fused_sdp_choice.default:
        return 0  # by the products
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    is_there = [isinstance(tensor, OnGPU) for tensor in tensors]
    device, copies = kwargs.get("device"), func in (aten.copy_.default, aten._to_copy.default)
    if any(is_there) and not all(is_there) and not copies:
        _check(func, args, kwargs)
    to_gpu = any(is_there) if device is None else torch.device(device).type == NAME
    if func is aten.copy_.default:
        to_gpu = isinstance(args[0], OnGPU)
    if kwargs.get("generator") is not None and to_gpu:
        raise RuntimeError(f"expected a generator of {NAME}, found one of {kwargs['generator'].device}: {func}")
    given, named = pytree.tree_map_only(OnGPU, lambda tensor: tensor.held, (args, kwargs))
    if device is not None:
        named["device"] = torch.device("cpu")
    if func is aten.histc.default:  # of whole numbers, which the CPU has not
        given = (given[0].double(), *given[1:])
    found = func(*given, **named)
    if to_gpu:
        found = pytree.tree_map_only(Tensor, OnGPU, found)
    if not any(is_there):
        return found
    if not to_gpu:
        return args[0] if func is aten.copy_.default else found
    return return_and_correct_aliasing(func, args, kwargs, found)


def _check(func: Any, args: Any, kwargs: Any) -> None:
    """Raise what CUDA raises for tensors of two devices."""
    if func in INDEXED and isinstance(args[0], OnGPU):
        args = (args[0], *args[2:])
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and not isinstance(leaf, OnGPU) and (leaf.ndim or func in WITHOUT_NUMBERS):
            raise RuntimeError(f"expected all tensors to be on the same device, found {NAME} and cpu: {func}")
