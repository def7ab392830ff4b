"""The page kernel on a CPU: its own Python source, with numpy in the place of Gluon and `emulate` in the place of the GPU.

`run_read_pages` executes every block of `_read_pages`: loads and stores go to the memory of the tensors that
are passed, programs of a warp go through `emulate`, which knows each instruction that the text for the GPU has.
"""
import types
from contextlib import contextmanager

import numpy as np


class Array(np.ndarray):
    "A numpy array with the conversions of a Gluon tensor."
    def to(self, dtype, bitcast=False): return np.asarray(self).view(dtype).view(Array) if bitcast else self.astype(dtype)


def _array(x, dtype=None): return np.array(x, dtype=dtype).view(Array)


class Pointer:
    "Bytes of a tensor and offsets into them, in elements of `size` bytes."
    def __init__(self, memory, dtype, at=0): self.memory, self.dtype, self.at = memory, np.dtype(dtype), at

    def __add__(self, n): return Pointer(self.memory, self.dtype, self.at + np.asarray(n, np.int64)*self.dtype.itemsize)

    def to(self, dtype): return Pointer(self.memory, np.uint8, self.at) # an address counts bytes

    def places(self, keep=...):
        at = np.asarray(self.at)[keep][..., None] + np.arange(self.dtype.itemsize)
        assert ((at >= 0) & (at < self.memory.size)).all(), "outside of the tensor"
        return at


class Gluon:
    "As much of `triton.experimental.gluon.language` as the kernel uses."
    int32, int64, float32 = np.int32, np.int64, np.float32

    def __init__(self, block): self.block = block
    def program_id(self, i): return _array(self.block[i], np.int32)
    def BlockedLayout(self, *layout): return None
    def arange(self, a, b, layout): return _array(np.arange(a, b), np.int32)
    def zeros(self, shape, dtype, layout): return _array(np.zeros(shape), dtype)
    def full(self, shape, x, dtype, layout): return _array(np.full(shape, x), dtype)
    def minimum(self, a, b): return np.minimum(a, b).view(Array)
    def maximum(self, a, b): return np.maximum(a, b).view(Array)
    def where(self, c, a, b): return np.where(c, a, b).view(Array)
    def static_range(self, *n): return range(*n)
    uint8 = np.uint8
    def SwizzledSharedLayout(self, *layout): return None
    def allocate_shared_memory(self, *what): # programs have it as `shared`
        there = types.SimpleNamespace(_keep_alive=lambda: None, store=lambda x: None)
        there.slice = lambda *at: there
        return there

    def load(self, p, mask=True, other=0):
        if not np.any(mask): return _array(np.full(np.shape(p.at), other), p.dtype)
        return np.ascontiguousarray(p.memory[p.places()]).view(p.dtype)[..., 0].view(Array)

    def store(self, p, x, mask=None):
        at, x = np.asarray(p.at), np.ascontiguousarray(np.broadcast_to(x, np.shape(p.at)), p.dtype)
        keep = np.ones(at.shape, bool) if mask is None else np.asarray(mask)
        p.memory[p.places(keep)] = x[keep].view(np.uint8).reshape(-1, p.dtype.itemsize)


def _blocks(grid): return ((i,) for i in range(grid[0]))


def run_read_pages(names, kernel, grid, *args):
    "Every block, one after another; results are written into the tensors."
    tensors = {id(a): (a.float() if str(a.dtype) == "torch.bfloat16" else a).numpy() for a in args if hasattr(a, "numpy")}
    tensors |= {id(a): a.as_strided((a.untyped_storage().nbytes() - a.storage_offset(),), (1,)).numpy() # pages that lie apart
                for a in args if str(getattr(a, "dtype", "")) == "torch.uint8" and not a.is_contiguous()}
    memory = {k: np.ascontiguousarray(v).reshape(-1).view(np.uint8) for k, v in tensors.items()}
    values = [Pointer(memory[id(a)], tensors[id(a)].dtype) if id(a) in tensors else a for a in args]
    lanes = 32 * args[-1]
    for block in _blocks(grid):
        shared = np.zeros(1 << 18, np.uint8)

        def run(inputs, key, part, index):
            L = names["programs"](key)[part][int(index)]
            assert len(L.inputs) == len(inputs), (part, L.inputs, len(inputs))
            outs = []
            for w in range(args[-1]):
                some = lambda x: np.ascontiguousarray(np.broadcast_to(np.asarray(x), lanes)[32*w:32*w + 32])
                regs = {n: (x.memory, some(x.at)) if isinstance(x, Pointer) else some(x).view(np.uint32)
                        for n, x in zip(L.inputs, inputs)}
                outs.append(names["emulate"](L, regs, shared))
            return tuple(_array(np.concatenate(o)).view(np.int32) for o in zip(*outs))

        def of_pair(pair, what, key, warps, layout, first, end):
            assert first <= pair < end
            return types.FunctionType(names["_rounds"].fn.__code__, mine)(*what, key, warps, layout, pair)

        mine = {**names, "gl": Gluon(block), "_run": run, "_of_pair": of_pair, "_program": names["assembly"]}
        types.FunctionType(kernel.fn.__code__, mine)(*values)


@contextmanager
def emulated(
    names:dict, # the namespace of `attend_pages`
):
    "Inside, `attend_pages` runs the Gluon kernel here."
    kept = {n: names[n] for n in ("_read_pages", "_is_fast")}

    class Launch:
        def __getitem__(self, grid):
            def launched(*args, **options):
                run_read_pages(names, kept["_read_pages"], grid, *args)
                return types.SimpleNamespace(n_spills=0)
            return launched

    names.update(_read_pages=Launch(), _is_fast=lambda plan, device: True)
    try: yield
    finally: names.update(kept)
