"""Triton's interpreter with the checks that make a green run mean something; ``install()`` turns it on.

The stock interpreter computes bfloat16 on its raw bits, reads and writes outside a tensor without a word, gives 0 where
a masked load names no ``other``, rounds no TF32 operand, and runs programs in one order. Here

- every load, store and atomic must hit an element of the very argument its pointer came from, by that argument's shape
  and strides: a Q pointer that walks into K of a packed QKV is an error although the memory is there;
- a program that reads or writes what another program of the same launch writes, other than by atomics, is an error;
- a lane that a masked load leaves out holds NaN, or the largest integer, unless the load names ``other``;
- programs run from the last to the first;
- bfloat16 is held as float32 and rounded to nearest even after every operation; ``tl.dot`` rounds TF32 operands, and
  has the smallest shape that hardware has.

It is evidence of the mathematics: not of layouts, not of speed.
"""

import sys
from dataclasses import dataclass, field

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock

TensorHandle = stock.TensorHandle
INT_POISON = np.iinfo(np.int32).max


class KernelError(AssertionError):
    """What a kernel did that hardware would do silently. Arrives wrapped in triton's InterpreterError."""


# ---- bfloat16: float32 arrays whose values are bfloat16's


def _is_bf16(dtype: tl.dtype) -> bool:
    return dtype.scalar.name == "bf16"


def _to_bits(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16's 16 bits, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _tf32(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


# ---- memory: argument i lives at virtual address (i + 1) << 44, so that a pointer knows the argument it came from


@dataclass
class Argument:
    name: str
    tensor: torch.Tensor
    base: int  # virtual address of the tensor's first element
    starts: np.ndarray  # bool [storage bytes], True where an element of the tensor begins

    def __str__(self) -> str:
        return f"{self.name} (shape {list(self.tensor.shape)}, strides {list(self.tensor.stride())})"


@dataclass
class Storage:
    """Which program wrote and read each byte: 0 none, p + 1 program p, -1 several (reads), -2 by atomics (writes)."""

    writer: np.ndarray
    reader: np.ndarray


@dataclass
class Launch:
    kernel: str
    names: dict[int, str]  # data pointer -> the argument's name
    arguments: list[Argument] = field(default_factory=list)
    storages: dict[int, Storage] = field(default_factory=dict)
    program: int = 0

    def add(self, tensor: torch.Tensor) -> int:
        storage, size = tensor.untyped_storage(), tensor.element_size()
        self.storages.setdefault(storage.data_ptr(), Storage(*(np.zeros(storage.nbytes(), np.int32) for _ in range(2))))
        starts = np.zeros(storage.nbytes(), np.bool_)
        if tensor.numel():
            strides = [stride * size for stride in tensor.stride()]
            torch.from_numpy(starts).as_strided(tensor.shape, strides, tensor.storage_offset() * size).fill_(True)
        base = (len(self.arguments) + 1 << 44) + (1 << 43) + tensor.data_ptr() % 4096  # alignment stays
        self.arguments.append(Argument(self.names.get(tensor.data_ptr(), "an argument"), tensor, base, starts))
        return base

    def addresses(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int, kind: str) -> np.ndarray:
        """Real addresses of virtual ``pointers``, once ``mask`` is known to be in bounds and race-free."""
        virtual = pointers.astype(np.int64)
        mask = np.broadcast_to(mask.astype(np.bool_), virtual.shape)
        real = np.zeros(virtual.shape, np.int64)
        for index in np.unique((virtual >> 44)[mask]):
            if not 1 <= index <= len(self.arguments):
                raise KernelError(f"{self.here()}: {kind} through a pointer that left its tensor by terabytes")
            argument = self.arguments[index - 1]
            lanes = mask & (virtual >> 44 == index)
            tensor = argument.tensor
            offset = virtual[lanes] - argument.base + tensor.storage_offset() * tensor.element_size()
            outside = (offset < 0) | (offset + itemsize > len(argument.starts))
            outside |= ~argument.starts[np.where(outside, 0, offset)]
            if outside.any():
                raise KernelError(
                    f"{self.here()}: {kind} out of bounds of {argument} in {outside.sum()} of {outside.size} lanes, "
                    f"first at element {(virtual[lanes] - argument.base)[outside][0] // tensor.element_size()}"
                )
            self.check_race(argument, offset, kind)
            real[lanes] = offset + tensor.untyped_storage().data_ptr()
        return real.astype(np.uint64)

    def check_race(self, argument: Argument, offset: np.ndarray, kind: str) -> None:
        storage = self.storages[argument.tensor.untyped_storage().data_ptr()]
        me, atomic = self.program + 1, -2
        writer, reader = storage.writer[offset], storage.reader[offset]
        clash = (writer != 0) & (writer != (atomic if kind == "atomic" else me))
        if kind != "load":
            clash |= (reader != 0) & (reader != me)
        if clash.any():
            raise KernelError(f"{self.here()}: {kind} of {argument} races with another program")
        if kind == "load":
            storage.reader[offset] = np.where((reader == 0) | (reader == me), me, -1)
        else:
            storage.writer[offset] = atomic if kind == "atomic" else me

    def here(self) -> str:
        """Kernel, program and source line: the innermost frame outside of triton and this file."""
        frame = sys._getframe()
        while frame.f_back and (frame.f_code.co_filename == __file__ or "/triton/" in frame.f_code.co_filename):
            frame = frame.f_back
        return f"{self.kernel}, program {self.program}, {frame.f_code.co_filename}:{frame.f_lineno}"


_launch: Launch | None = None


class CheckedBuilder(stock.InterpreterBuilder):
    def __init__(self) -> None:
        super().__init__()
        self.codegen_fns["min_dot_size"] = lambda lhs, rhs: (1, 1, 16)

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        _, ny, nz = self.grid_dim
        last = self.grid_dim[0] * ny * nz - 1
        program = last - ((x * ny + y) * nz + z)
        assert _launch is not None
        _launch.program = program
        super().set_grid_idx(program // (ny * nz), program // nz % ny, program % nz)

    # memory

    def _checked(self, pointers, mask, kind):
        assert _launch is not None
        element = pointers.get_element_ty()
        itemsize = 2 if element == tl.bfloat16 else stock._get_np_dtype(element).itemsize
        addresses = _launch.addresses(pointers.data, mask.data, itemsize, kind)
        stored = tl.uint16 if element == tl.bfloat16 else element
        return TensorHandle(addresses, tl.pointer_type(stored)), element == tl.bfloat16

    def create_masked_load(self, ptrs, mask, other, *policy, **policies):
        addresses, is_bf16 = self._checked(ptrs, mask, "load")
        if is_bf16 and other is not None:
            other = TensorHandle(_to_bits(other.data), tl.uint16)
        loaded = super().create_masked_load(addresses, mask, other, *policy, **policies).data
        loaded = _from_bits(loaded) if is_bf16 else loaded
        if other is None and loaded.dtype != np.bool_ and not mask.data.all():
            poison = np.nan if loaded.dtype.kind == "f" else min(INT_POISON, np.iinfo(loaded.dtype).max)
            loaded = np.where(mask.data, loaded, loaded.dtype.type(poison))
        return TensorHandle(loaded, ptrs.get_element_ty())

    def create_masked_store(self, ptrs, value, mask, *policy, **policies):
        addresses, is_bf16 = self._checked(ptrs, mask, "store")
        if is_bf16:
            value = TensorHandle(_to_bits(value.data), tl.uint16)
        return super().create_masked_store(addresses, value, mask, *policy, **policies)

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        addresses, is_bf16 = self._checked(ptr, mask, "atomic")
        if is_bf16:
            raise NotImplementedError("atomics on bfloat16")
        return super().create_atomic_rmw(op, addresses, val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        addresses, _ = self._checked(ptr, TensorHandle(np.ones(ptr.data.shape, bool), tl.int1), "atomic")
        return super().create_atomic_cas(addresses, cmp, val, sem, scope)

    # arithmetic that the stock builder does on bits

    def cast_impl(self, src, dst_type):
        return TensorHandle(src.data.astype(stock._get_np_dtype(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if rounding_mode == ir.ROUNDING_MODE.RTZ:
            raise NotImplementedError("rounding toward zero")
        return self.cast_impl(src, dst_type)

    def create_bitcast(self, src, dst_type):
        if _is_bf16(src.dtype) or _is_bf16(dst_type):
            raise NotImplementedError("bitcast of bfloat16")
        return super().create_bitcast(src, dst_type)

    create_int_to_ptr = create_ptr_to_int = create_bitcast

    def create_fabs(self, arg):
        return self.unary_op(arg, np.abs)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        lhs, rhs = a.data, b.data
        if a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            lhs, rhs = _tf32(lhs), _tf32(rhs)
        product = np.matmul(lhs, rhs, dtype=np.float64 if d.data.dtype == np.float64 else np.float32)
        return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


def install() -> None:
    """Replaces triton's interpreter in this process. Must come before the first launch."""
    if isinstance(stock.interpreter_builder, CheckedBuilder):
        return
    stock.interpreter_builder = CheckedBuilder()
    stock.interpreter_semantic = TritonSemantic(stock.interpreter_builder)

    numpy_dtype, fits = stock._get_np_dtype, stock._validate_np_data_size
    numpy_dtypes = {"bf16": np.dtype(np.float32)}

    def cached_numpy_dtype(ty):
        name = ty.scalar.name
        return numpy_dtypes.get(name) or numpy_dtypes.setdefault(name, numpy_dtype(ty.scalar))

    stock._get_np_dtype = cached_numpy_dtype
    stock._validate_np_data_size = lambda data, ty: _is_bf16(ty) or fits(data, ty)
    check_handle = TensorHandle.__post_init__

    def round_bf16(self):
        check_handle(self)
        if _is_bf16(self.dtype) and self.data.dtype != np.bool_:
            self.data = _from_bits(_to_bits(self.data))

    TensorHandle.__post_init__ = round_bf16

    to_triton = stock._implicit_cvt

    def add_argument(arg):
        converted = to_triton(arg)
        if _launch is not None and hasattr(arg, "data_ptr"):
            converted.handle.data = np.array([_launch.add(stock._unwrap_tensor(arg))], np.uint64)
        return converted

    stock._implicit_cvt = add_argument

    launch, restore = stock.GridExecutor.__call__, stock.GridExecutor._restore_args_dev

    def checked_launch(self, *args, **kwargs):
        global _launch
        named = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        names = {arg.data_ptr(): name for name, arg in named if isinstance(arg, torch.Tensor)}
        _launch = Launch(self.fn.__name__, names)
        standard_library = stock._patch_lang(tl.sum.fn)
        try:
            with np.errstate(all="ignore"):  # -inf - -inf and overflow are part of the mathematics
                return launch(self, *args, **kwargs)
        finally:
            standard_library.restore()
            _launch = None

    def restore_from_copies(self, args_dev, args_hst, kwargs, kwargs_hst):
        """CPU tensors were not copied; copying them over themselves would touch all of a huge sparse storage."""
        if any(isinstance(arg, torch.Tensor) and arg.device.type != "cpu" for arg in (*args_dev, *kwargs.values())):
            restore(self, args_dev, args_hst, kwargs, kwargs_hst)

    # a device function would patch all of triton.language anew at each call, which is most of the time it takes
    stock.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    stock.GridExecutor.__call__ = checked_launch
    stock.GridExecutor._restore_args_dev = restore_from_copies
    # triton 3.6 calls int() on an array of one element, which numpy 2.5 refuses
    patch_tensor = stock._patch_lang_tensor

    def patch_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    stock._patch_lang_tensor = patch_index
