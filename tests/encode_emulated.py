"""The Gluon kernels of `kernels_encode_fast` on a CPU: their own Python source, with numpy in the place of Gluon.

Shared memory, products and whole-warp instructions are there with their results, not with their time; layouts are not looked at.
"""
import types
from contextlib import contextmanager

import numpy as np
import torch
from triton.runtime.jit import JITFunction

from pages_emulated import Array, Pointer


class bfloat16: "Kept as float32, rounded."


class Values(Array):
    def to(self, dtype, bitcast=False):
        if dtype is not bfloat16: return super().to(dtype, bitcast)
        return values(torch.from_numpy(np.ascontiguousarray(self, np.float32)).bfloat16().float().numpy())

    def permute(self, order): return np.transpose(self, order).view(Values)
    def reshape(self, shape): return np.reshape(np.asarray(self), [int(n) for n in shape]).view(Values)


class Address(Pointer):
    def __add__(self, n): return Address(self.memory, self.dtype, self.at + np.asarray(n, np.int64)*self.dtype.itemsize)
    def __getitem__(self, k): return Address(self.memory, self.dtype, np.asarray(self.at)[k])


def values(x, dtype=None): return np.array(x, dtype=dtype).view(Values)


def chosen(x, y, selector):
    "`prmt.b32`: each byte one of eight, or its sign."
    both = [np.ascontiguousarray(v, np.int32).view(np.uint32).astype(np.uint64) for v in (x, y)]
    both, out = both[0] | both[1] << np.uint64(32), 0
    for i in range(4):
        n = selector >> 4*i & 15
        byte = both >> np.uint64(8*(n & 7)) & np.uint64(255)
        out = out | ((byte >> np.uint64(7))*np.uint64(255) if n & 8 else byte) << np.uint64(8*i)
    return out.astype(np.uint32).view(np.int32)


def transposed(x):
    "`movmatrix`: 8 × 8 numbers of 16 bits, two a lane."
    return np.ascontiguousarray(np.ascontiguousarray(x).view(np.uint16).reshape(-1, 8, 8).mT).view(np.int32)


class Shared:
    def __init__(self, shape, dtype): self.x = np.full([int(n) for n in shape], np.nan, np.float32 if dtype is bfloat16 else dtype)
    def load(self, layout): return values(self.x)
    def store(self, x): self.x[...] = x
    def _reinterpret(self, dtype, shape, layout): return self if tuple(map(int, shape)) == self.x.shape else Shared(shape, dtype)

    def index(self, i):
        part = object.__new__(Shared)
        part.x = self.x[int(i)]
        return part


class Gluon:
    "As much of `triton.experimental.gluon.language` as the kernels use."
    int8, uint8, int32, int64, float32, bfloat16 = np.int8, np.uint8, np.int32, np.int64, np.float32, bfloat16

    def __init__(self, block, grid): self.block, self.grid = block, grid
    def __getattr__(self, name):
        if not name.endswith("Layout"): raise AttributeError(name)
        return type(name, (), dict(__new__=lambda cls, *a: None, get_default_for=lambda *a: None))
    def program_id(self, i): return values(self.block[i], np.int32)
    def num_programs(self, i): return values(self.grid[i], np.int32)
    def arange(self, a, b, layout): return values(np.arange(a, b), np.int32)
    def full(self, shape, x, dtype, layout): return values(np.full([int(n) for n in shape], x), np.float32 if dtype is bfloat16 else dtype)
    def zeros(self, shape, dtype, layout): return self.full(shape, 0, dtype, layout)
    def allocate_shared_memory(self, dtype, shape, layout): return Shared(shape, dtype)
    def static_range(self, *n): return range(*map(int, n))
    def convert_layout(self, x, layout): return x
    def split(self, x): return x[..., 0], x[..., 1]
    def minimum(self, a, b): return np.minimum(a, b).view(Values)
    def maximum(self, a, b): return np.maximum(a, b).view(Values)
    def abs(self, x): return np.abs(x)
    def exp2(self, x): return np.exp2(x.astype(np.float32))
    def log2(self, x): return np.log2(x)
    def sqrt(self, x): return np.sqrt(x)
    def floor(self, x): return np.floor(x)
    def sum(self, x, axis): return np.sum(x, axis, dtype=x.dtype).view(Values)
    def associative_scan(self, x, axis, f): return np.cumsum(x, axis, dtype=x.dtype).view(Values)

    def where(self, c, a, b):
        out = np.where(c, a, b)
        wide = any(v.dtype == out.dtype for v in (a, b) if hasattr(v, "dtype"))
        return (out if wide else out.astype({np.float64: np.float32, np.int64: np.int32}.get(out.dtype.type, out.dtype))).view(Values)

    def load(self, p, mask=True, other=0):
        at = np.where(mask, p.at, 0)
        n = p.dtype.itemsize
        assert ((at >= 0) & (at + n <= p.memory.size)).all(), "outside of the tensor"
        got = np.ascontiguousarray(p.memory[at[..., None] + np.arange(n)]).view(p.dtype)[..., 0]
        return values(np.where(mask, got, other), p.dtype)

    def store(self, p, x, mask=True):
        at = np.asarray(p.at)
        keep, n = np.broadcast_to(mask, at.shape), p.dtype.itemsize
        assert ((at[keep] >= 0) & (at[keep] + n <= p.memory.size)).all(), "outside of the tensor"
        x = np.ascontiguousarray(np.broadcast_to(x, at.shape), p.dtype)
        p.memory[at[keep][:, None] + np.arange(n)] = x[keep].view(np.uint8).reshape(-1, n)

    def inline_asm_elementwise(self, text, constraints, args, **how):
        if "movmatrix" in text: return transposed(args[0]).reshape(np.shape(args[0])).view(Values)
        chosen4 = lambda s: chosen(chosen(*args[:2], s), chosen(*args[2:], s), 0x5410)
        if "not.b32" in text: return (~chosen4(0xfb)).view(Values)
        return (chosen4(0x40) if "0x0040" in text else chosen(*args, int(text.split(",")[-1].strip(" ;"), 16))).view(Values)


def run(module, kernel, grid, *args, **fixed):
    "Every block, one after another; results are written into the tensors."
    given, back, mine = {}, [], dict(vars(module))
    for name, x in zip(kernel.arg_names, args):
        if not torch.is_tensor(x): given[name] = values(x, np.int32); continue
        wide = x.float() if x.dtype == torch.bfloat16 else x # views of strided tensors: from the first element to the end of the storage
        if not x.is_contiguous():
            wide = x.as_strided((x.untyped_storage().nbytes()//x.element_size() - x.storage_offset(),), (1,)).float()
        there = np.ascontiguousarray(wide.numpy()).reshape(-1)
        given[name] = Address(there.view(np.uint8), there.dtype)
        back.append((x, there))

    def product(x, w, acc, use_acc=True, is_async=False): return ((acc if use_acc else 0) + x.x.astype(np.float64) @ w.x).astype(np.float32).view(Values)

    def copy(shared, p, mask): shared.x[...] = np.where(mask, mine["gl"].load(p, mask), shared.x)

    of_layouts = {n for n, f in mine.items() if type(f).__name__ == "ConstexprFunction" or n.startswith("_of_") or n in ("_loads", "_by_sequence")}
    mine |= {n: types.FunctionType(f.fn.__code__, mine, n, f.fn.__defaults__) for n, f in mine.items() if isinstance(f, JITFunction)}
    mine |= {n: lambda *a: None for n in of_layouts if not isinstance(vars(module)[n], JITFunction)}
    mine |= dict(async_copy=types.SimpleNamespace(async_copy_global_to_shared=copy, commit_group=lambda: None, wait_group=lambda n: None),
                 barrier=lambda: None, fence_async_shared=lambda: None, warpgroup_mma=product, warpgroup_mma_wait=lambda n, deps: deps[0],
                 range=lambda n: (values(i, np.int32) for i in range(int(n))))
    for x in range(grid[0]):
        for y in range(grid[1]):
            mine["gl"] = Gluon((x, y), grid)
            types.FunctionType(kernel.fn.__code__, mine)(**given, **fixed)
    for x, there in back:
        if x.is_contiguous(): x.copy_(torch.from_numpy(there).view(x.shape))


@contextmanager
def emulated(module, names):
    "Inside, the launches of `module` come here, and `names` (the namespace that asks) sends all it can."
    kernels = {n: f for n, f in vars(module).items() if n in ("_fast_codes", "_fast_order")}
    fits = names["fast_codes_fit"]

    class Launch:
        def __init__(self, kernel): self.kernel = kernel
        def __getitem__(self, grid): return lambda *args, num_warps, maxnreg=None, **fixed: run(module, self.kernel, grid, *args, **fixed)

    for n, f in kernels.items(): setattr(module, n, Launch(f))
    names["fast_codes_fit"] = lambda x, D: x.dtype == torch.bfloat16 and 16 <= D <= 128
    try: yield
    finally:
        for n, f in kernels.items(): setattr(module, n, f)
        names["fast_codes_fit"] = fits
