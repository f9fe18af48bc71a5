"""A strict mode for Triton's interpreter: what runs in it without complaint computes the right thing on a GPU as well.

The interpreter that comes with Triton (TRITON_INTERPRET=1) runs kernels on NumPy arrays and is lenient where a GPU is
not. Inside `strict_interpreter()`

- bf16 arithmetic is right: operands are widened to fp32 and the result rounded to nearest even. The stock interpreter
  keeps bf16 as uint16 and adds or multiplies the bit patterns;
- tf32 products drop all but 10 bits of their operands' mantissa: Triton hands over fp32, whose other bits tensor cores
  do not read;
- an access outside of every tensor argument raises `OutOfBoundsError`, as does one into the gap between two rows or
  columns of a strided argument. Every lane is checked, and what is there in memory is not touched;
- two programs that touch an element, one of them at least with a plain store, raise `RaceError`, whatever the order
  in which the interpreter happens to run them, and so does one store with two lanes on an element;
- a store through a tensor descriptor writes whole pieces of 16 bytes, as the hardware does: what lies behind a row's
  last column holds NaN afterwards, and it is an `OutOfBoundsError` if that is not padding of the same tensor's memory;
- lanes that a load masks off without `other` hold NaN (or the largest integer), not the convenient zero;
- a sum, difference or product of integers that does not fit their type raises `OverflowError`. The stock interpreter
  works it out as well, and drops it.

It needs no GPU and checks one launch at a time. What it cannot see: races between the threads of one program, and
compilers.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core  # noqa: F401  the functions of the language itself see it under this name
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

TensorHandle = interpreter.TensorHandle

_NOBODY, _SEVERAL = -1, -2  # instead of the number of a program


class OutOfBoundsError(IndexError):
    """A lane that is not masked off points outside of every tensor argument."""


class RaceError(RuntimeError):
    """Two programs, or two lanes of one store, meet in an element without an atomic."""


@contextlib.contextmanager
def strict_interpreter() -> Iterator[None]:
    """Make Triton's interpreter strict for as long as the context lasts."""
    builder = interpreter.interpreter_builder
    stock_builder, stock_executor = builder.__class__, interpreter.GridExecutor
    stock_reduce, stock_patch = interpreter.ReduceOps.generic_reduce, interpreter._patch_lang
    builder.__class__, interpreter.GridExecutor = _StrictBuilder, _StrictGridExecutor
    interpreter.ReduceOps.generic_reduce, interpreter._get_np_dtype = _reduce, _np_dtype
    builder.regions = []
    # Once, for all that sees the language under either name: every call of a function patches it all over again.
    patches = stock_patch(_reduce)
    # Triton 3.6 turns an array of one element into a number in a way that NumPy 2.4 and later refuse.
    patches.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
    patches.set_attr(tl.tensor, "__init__", _tensor)
    patches.set_attr(tl.block_type, "__init__", _block_type)
    patches.set_attr(TritonSemantic, "binary_op_sanitize_overflow_impl", _must_fit)
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    try:
        yield
    finally:
        interpreter._patch_lang = stock_patch
        patches.restore()
        builder.__class__, interpreter.GridExecutor = stock_builder, stock_executor
        interpreter.ReduceOps.generic_reduce, interpreter._get_np_dtype = stock_reduce, _new_np_dtype


@dataclass
class _Region:
    """The elements of one tensor argument, and who touched them in this launch."""

    name: str
    address: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    memory: tuple[int, int]  # where the tensor's storage begins and ends
    writer: np.ndarray  # of each element, in row-major order: a program, or _NOBODY, or _SEVERAL
    reader: np.ndarray
    atomic: np.ndarray

    @classmethod
    def of(cls, name: str, tensor: Any) -> _Region:
        touched = [np.full(tensor.numel(), _NOBODY, np.int64) for _ in range(3)]
        shape, strides, storage = tuple(tensor.shape), tuple(tensor.stride()), tensor.untyped_storage()
        memory = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        return cls(name, tensor.data_ptr(), tensor.element_size(), shape, strides, memory, *touched)

    @functools.cached_property
    def end(self) -> int:
        if 0 in self.shape:
            return self.address
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.address + (last + 1) * self.itemsize

    def elements(self, addresses: np.ndarray) -> np.ndarray:
        """The row-major number of the element at each address, -1 where there is none.

        Strides are taken from the largest down, which is unambiguous unless the tensor overlaps itself in more than
        one way (an expanded dimension, of stride 0, is fine).
        """
        inside = (addresses >= self.address) & (addresses < self.end)
        offset, misaligned = np.divmod(np.where(inside, addresses - self.address, 0), self.itemsize)
        weights = [math.prod(self.shape[k + 1 :]) for k in range(len(self.shape))]
        number = np.zeros_like(offset)
        for k in sorted(range(len(self.shape)), key=lambda k: -self.strides[k]):
            if self.strides[k] == 0:
                continue
            index = np.minimum(offset // self.strides[k], self.shape[k] - 1)
            offset = offset - index * self.strides[k]
            number += index * weights[k]
        return np.where(inside & (offset == 0) & (misaligned == 0), number, -1)


class _StrictGridExecutor(interpreter.GridExecutor):
    def _init_args_hst(self, args_dev: Any, kwargs: dict[str, Any]) -> Any:
        arguments, keywords = super()._init_args_hst(args_dev, kwargs)
        named = [*zip(self.arg_names, arguments, strict=False), *keywords.items()]
        tensors = [(name, getattr(value, "base", value)) for name, value in named]
        interpreter.interpreter_builder.regions = [_Region.of(n, t) for n, t in tensors if hasattr(t, "data_ptr")]
        return arguments, keywords


class _StrictBuilder(interpreter.InterpreterBuilder):
    regions: list[_Region]

    # ---- memory

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *options: Any, **keywords: Any) -> Any:
        self._touch("load", ptrs, mask)
        if other is None:
            element = ptrs.get_element_ty()
            other = TensorHandle(np.full(ptrs.data.shape, *_poison(element)), element)
        return super().create_masked_load(ptrs, mask, other, *options, **keywords)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *options: Any) -> Any:
        self._touch("store", ptrs, mask)
        return super().create_masked_store(ptrs, value, mask, *options)

    def create_descriptor_store(self, desc: Any, value: Any, indices: Any) -> Any:
        element = desc.base.dtype.element_ty
        piece = 16 * 8 // element.primitive_bitwidth
        *outer, columns = desc.shape
        padded = [*outer, TensorHandle(-(-columns.data // piece) * piece, columns.dtype)]
        ptrs, written = interpreter.TensorDescHandle(
            desc.base, padded, desc.strides, desc.block_shape, desc.padding
        ).materialize_pointers(indices)
        _, inside = desc.materialize_pointers(indices)
        behind = written & ~inside
        self._must_be_padding(desc.base.data.item(), ptrs.data[behind].astype(np.int64))
        poison = TensorHandle(np.full(ptrs.data.shape, *_poison(element)), element)
        super().create_masked_store(ptrs, poison, TensorHandle(behind, tl.int1), None, None)
        return self.create_masked_store(ptrs, value, TensorHandle(inside, tl.int1), None, None)

    def _must_be_padding(self, base: int, addresses: np.ndarray) -> None:
        """Raise if what a descriptor's store writes behind the last column is anything else."""
        if addresses.size == 0:
            return
        first, end = next(r.memory for r in self.regions if r.address == base)
        stray = (addresses < first) | (addresses >= end)
        for region in self.regions:
            stray |= region.elements(addresses) >= 0
        if stray.any():
            raise OutOfBoundsError(f"{self._where('store')} writes whole 16 bytes, {stray.sum()} lanes are no padding")

    def create_atomic_rmw(self, operation: Any, ptr: Any, value: Any, mask: Any, *options: Any) -> Any:
        self._touch("atomic", ptr, mask)
        return super().create_atomic_rmw(operation, ptr, value, mask, *options)

    def create_atomic_cas(self, ptr: Any, *operands: Any) -> Any:
        self._touch("atomic", ptr, None)
        return super().create_atomic_cas(ptr, *operands)

    def _touch(self, kind: str, ptrs: Any, mask: Any) -> None:
        addresses = np.asarray(ptrs.data)
        if mask is not None:
            addresses = np.broadcast_to(addresses, np.shape(mask.data))[mask.data]
        addresses = addresses.ravel().astype(np.int64)
        stray = np.ones(addresses.shape, bool)
        low, high = addresses.min(initial=2**63 - 1), addresses.max(initial=0)
        for region in self.regions:
            if high < region.address or low >= region.end:
                continue
            elements = region.elements(addresses)
            mine = stray & (elements >= 0)
            if mine.any():
                self._record(kind, region, elements[mine])
            stray &= ~mine
        if stray.any():
            nearest = self._nearest(int(addresses[stray][0]))
            raise OutOfBoundsError(f"{self._where(kind)}: {stray.sum()} lanes outside, {nearest}")

    def _record(self, kind: str, region: _Region, elements: np.ndarray) -> None:
        x, y, z = self.grid_idx
        program = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z
        others = {
            "load": (region.writer, region.atomic),
            "store": (region.writer, region.reader, region.atomic),
            "atomic": (region.writer, region.reader),
        }[kind]
        for who in others:
            met = (who[elements] != _NOBODY) & (who[elements] != program)
            if met.any():
                element = np.unravel_index(elements[met][0], region.shape or (1,))
                raise RaceError(
                    f"{self._where(kind)} meets another program in {region.name}{[int(i) for i in element]}"
                )
        if kind == "store" and np.unique(elements).size != elements.size:
            raise RaceError(f"{self._where(kind)} writes an element of {region.name} twice")
        who = {"load": region.reader, "store": region.writer, "atomic": region.atomic}[kind]
        who[elements] = np.where((who[elements] == _NOBODY) | (who[elements] == program), program, _SEVERAL)

    def _where(self, kind: str) -> str:
        return f"{kind} of program {self.grid_idx}"

    def _nearest(self, address: int) -> str:
        if not self.regions:
            return "with no tensor among the arguments"
        region = min(self.regions, key=lambda r: max(r.address - address, address - r.end, 0))
        offset = (address - region.address) / region.itemsize
        return f"the first {offset:g} elements from the start of {region.name}, of shape {list(region.shape)}"

    # ---- arithmetic

    def binary_op(self, lhs: Any, rhs: Any, op: Callable[..., np.ndarray]) -> Any:
        if not _any_bf16(lhs, rhs):
            return super().binary_op(lhs, rhs, op)
        return _narrow(op(_wide(lhs), _wide(rhs)))

    def create_minnumf(self, lhs: Any, rhs: Any) -> Any:
        """Of a number and NaN the number, as on a GPU; not so in Triton 3.6."""
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def unary_op(self, arg: Any, op: Callable[..., np.ndarray]) -> Any:
        return _narrow(op(_wide(arg))) if _any_bf16(arg) else super().unary_op(arg, op)

    def ternary_op(self, lhs: Any, rhs: Any, other: Any, op: Callable[..., np.ndarray]) -> Any:
        if op is np.where or not _any_bf16(lhs, rhs, other):  # a selection is right on bit patterns
            return super().ternary_op(lhs, rhs, other, op)
        return _narrow(op(_wide(lhs), _wide(rhs), _wide(other)))

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        return _narrow(_wide(x) * _wide(y) + _wide(z)) if _any_bf16(x, y, z) else super().create_fma(x, y, z)

    def create_rsqrt(self, arg: Any) -> Any:
        return _narrow(1 / np.sqrt(_wide(arg))) if _any_bf16(arg) else super().create_rsqrt(arg)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if a.dtype.scalar.primitive_bitwidth == 8:
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        left, right = _wide(a), _wide(b)
        if left.dtype == np.float32 and str(input_precision).rsplit(".", 1)[-1].lower() == "tf32":
            left, right = _cut_to_tf32(left), _cut_to_tf32(right)
        # A GPU sums every element alike; BLAS by its place in the tile, so that x x^T would not be symmetric.
        product = np.matmul(left.astype(np.float64), right.astype(np.float64))
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return super().cast_impl(src, dst_type)
        if target == tl.bfloat16:
            return _narrow(src.data.astype(np.float32))
        return TensorHandle(_wide(src).astype(interpreter._get_np_dtype(dst_type)), target)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        to_nearest = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if to_nearest and not (src.dtype.scalar.is_fp8() or dst_type.scalar.is_fp8()):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)


def _reduce(self: Any, inputs: Any) -> list[Any]:
    """A reduction by a function of the kernel's own, along one axis, all lanes at once: the stock interpreter calls the
    function element by element."""
    assert self.axis is not None
    assert not self.keep_dims
    steps = [
        tuple(self.to_tensor(np.take(t.handle.data, k, self.axis), t.dtype) for t in inputs)
        for k in range(inputs[0].handle.data.shape[self.axis])
    ]
    total, *others = steps
    for step in others:
        combined = self.combine_fn.fn(*total, *step)
        total = combined if isinstance(combined, tuple) else (combined,)
    return list(total)


def _must_fit(_: Any, lhs: Any, rhs: Any, operation: Callable[..., Any]) -> None:
    if lhs.dtype.int_bitwidth >= 64:
        return
    exact = getattr(operator, operation.__name__)(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
    if (exact < lhs.dtype.get_int_min_value()).any() or (exact > lhs.dtype.get_int_max_value()).any():
        raise OverflowError(f"{operation.__name__} of {lhs.dtype} gives up to {exact.flat[np.abs(exact).argmax()]}")


# What the language works out anew for every value takes longer than the arithmetic. Here it is looked up by type.

_new_tensor, _new_block_type, _new_np_dtype = tl.tensor.__init__, tl.block_type.__init__, interpreter._get_np_dtype
_tensors: dict[str, tuple[Any, ...]] = {}
_block_types: dict[tuple[str, tuple[int, ...]], tuple[Any, ...]] = {}
_np_dtypes: dict[str, np.dtype] = {}


def _tensor(self: Any, handle: Any, type: Any) -> None:
    if type.name not in _tensors:
        _new_tensor(self, handle, type)
        _tensors[type.name] = self.shape, self.numel
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _tensors[type.name]


def _block_type(self: Any, element_ty: Any, shape: Any) -> None:
    key = element_ty.name, tuple(getattr(size, "value", size) for size in shape)
    if key not in _block_types:
        _new_block_type(self, element_ty, shape)
        _block_types[key] = self.shape, self.numel, self.name
    self.element_ty = element_ty
    self.shape, self.numel, self.name = _block_types[key]


def _np_dtype(type: Any) -> np.dtype:
    name = type.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _new_np_dtype(type)
    return _np_dtypes[name]


def _any_bf16(*handles: Any) -> bool:
    return any(handle.dtype.scalar.name == "bf16" for handle in handles)


def _wide(handle: Any) -> np.ndarray:
    """The values of a handle, bf16 as fp32."""
    if not _any_bf16(handle):
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> Any:
    """A handle of bf16 rounded to nearest even from fp32; of booleans if those are given."""
    values = np.asarray(values)
    if values.dtype == np.bool_:
        return TensorHandle(values, tl.int1)
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _cut_to_tf32(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    return np.where(np.isfinite(values), (bits & 0xFFFFE000).view(np.float32), values)


def _poison(element: Any) -> tuple[Any, np.dtype]:
    """What an undefined lane holds, and its NumPy type."""
    dtype = interpreter._get_np_dtype(element)
    if element == tl.bfloat16:
        return 0x7FC0, dtype
    if np.issubdtype(dtype, np.floating):
        return np.nan, dtype
    return (True if dtype == np.bool_ else np.iinfo(dtype).max), dtype
