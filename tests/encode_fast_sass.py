"""Compile the kernel of codes for a Hopper GPU for sm_90a without one, and count: `python tests/encode_fast_sass.py [k v s]`.

Prints for keys (k), values (v), keys that are turned where their basis is not (s): the size of the code, registers, accesses of
local memory, and of the loop over tiles: products, waits for products, barriers.
"""
import os
import re
import sys
from collections import Counter

from pages_sass import disassembled, instructions

TYPES = dict(X="*bf16", COS="*fp32", SIN="*fp32", PARTNER="*i32", ORDER="*u8", MOVED="*bf16", OFFSET="*fp32", WEIGHTS="*fp32", WIDTHS="*u8", LAST="*fp32",
             SPREAD="*fp32", CODES="*i32", NORMS="*i8", BASIS="*fp32", DIRECTION="*fp32") # the others are numbers


def compiled(kernel, warps, **fixed):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource
    names = kernel.arg_names
    types = {n: TYPES.get(n, "i32") for n in names} | dict.fromkeys(fixed, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in TYPES}
    source = GluonASTSource(kernel, types, {(names.index(n),): x for n, x in fixed.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps))


def counts(text, usage):
    found, labels = instructions(text)
    start, end = max(((labels[to], i) for i, (_, to) in enumerate(found) if to and labels[to] <= i), key=lambda b: b[1] - b[0])
    loop = Counter(name for name, _ in found[start:end+1])
    of = lambda start: sum(n for name, n in loop.items() if name.startswith(start))
    everywhere = Counter(name.split(".")[0] for name, _ in found)
    return dict(instructions=len(found), kilobytes=len(found)*16/1024, registers=int(re.search(r"REG:(\d+)", usage)[1]),
                local=everywhere["LDL"] + everywhere["STL"], products=of("HGMMA"), waits=of("WARPGROUP.DEPBAR"), barriers=of("BAR"))


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "Triton cannot compile while it interprets"
    from ndkv.kernels_encode_fast import _fast_codes
    shape = dict(D=128, DP=128, PAGE=128, T0=16, T1=48, UNIT=7.5/256, STEP=.25, C=2**.25)
    for kind in sys.argv[1] if sys.argv[1:] else "kv":
        made = compiled(_fast_codes, 4, **shape, TURN=kind == "k", SPIN=kind == "s", FOLLOWS=kind == "v")
        print(kind, " ".join(f"{k}={v}" for k, v in counts(*disassembled(made)).items()))
