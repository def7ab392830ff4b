"""Compile the kernel of page codes for sm_90 without a GPU and count what one tile runs: `python tests/encode_sass.py 443322100 [k|v] [tile warps]`.

The widths of the runs (of 128 channels) are compiled in, so that only the branches that are taken are left.
"""
import importlib.util
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

from pages_sass import disassembled, instructions

TYPES = dict(X="*bf16", MOVED="*bf16", WIDTHS="*u8", ORDER="*u8", CODES="*u8", NORMS="*i8", OFFSET="*fp32", WEIGHTS="*fp32", LAST="*fp32",
             SPREAD="*fp32", H="i32", P="i32", n="i32", each="i32", sb="i32", sh="i32", st="i32") # the others are constants


def compiled(widths, kind, tile=64, warps=4):
    "The kernel with these widths of runs in place of those it reads."
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    import ndkv
    source = (Path(ndkv.__file__).parent / "kernels_encode_pages.py").read_text().replace("from .", "from ndkv.")
    reads = "_of_runs(WIDTHS, at, D), _of_runs(WEIGHTS"
    assert source.count(reads) == 1, "the kernel reads its widths in another way"
    source = source.replace(reads, f"({', '.join(f'tl.full([], {w}, tl.int32)' for w in widths)}), _of_runs(WEIGHTS")
    with tempfile.TemporaryDirectory() as d:
        file = Path(d) / "kernels_fixed.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location("kernels_fixed", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules["kernels_fixed"] = module # dataclasses look for it
        spec.loader.exec_module(module)
        kernel, keys = module._codes_kernel, kind == "k"
        types = TYPES if keys else TYPES | dict(ORDER="*i64")
        fixed = dict(D=128, DP=128, PAGE=128, T0=16, T1=48, TURN=keys, FOLLOWS=not keys, UNIT=7.5/256, STEP=.25, M=tile, XT=1, WIDE=False)
        aligned = [i for i, n in enumerate(kernel.arg_names) if TYPES.get(n, "").startswith("*") or n in ("sb", "sh", "st")]
        given = ASTSource(kernel, {n: types.get(n, "constexpr") for n in kernel.arg_names}, fixed,
                          {(i,): [["tt.divisibility", 16]] for i in aligned})
        return triton.compile(given, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, num_stages=1))


def counts(text, usage, tile=64, warps=4):
    "Of the loop over tiles."
    found, labels = instructions(text)
    end, start = max(((i, labels[to]) for i, (_, to) in enumerate(found) if to and labels[to] <= i), key=lambda b: b[0] - b[1])
    names = Counter(name.split(".")[0] for name, _ in found[start:end+1])
    each = (end - start + 1) / (tile*128 / (32*warps))
    return dict(an_element=round(each, 1), registers=int(re.search(r"REG:(\d+)", usage)[1]), local=names["LDL"] + names["STL"],
                products=names["HGMMA"])


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "Triton cannot compile while it interprets"
    kind, shape = (sys.argv[2:3] or ["k"])[0], tuple(map(int, sys.argv[3:5])) or (64, 4)
    for widths in sys.argv[1].split("/"):
        found = counts(*disassembled(compiled(list(map(int, widths)), kind, *shape)), *shape)
        print(widths, " ".join(f"{k}={v}" for k, v in found.items()))
