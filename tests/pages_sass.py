"""Compile the page kernel for sm_90a without a GPU, disassemble it, count: `python tests/pages_sass.py KEY [REGISTERS]`.

Prints instructions of a page, native integer products, those with both operands in shared memory, accesses of local memory.
"""
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TYPES = dict(Q="*bf16", ORDER="*i32", UNIT_="*fp32", TURNS="*fp32", TABLES="*fp16", OCTAVES="*fp32", LEVELS="*i32",
             HEADS="*i32", K="*u8", V="*u8", TABLE="*i32", LENS="*i32", TOP="*fp32", SUM="*fp32", OUT="*fp32",
             KEY="constexpr", W="constexpr") # the others are numbers


ALU = "LOP3", "PRMT", "SHF", "IADD3", "VIADD", "VIADDMNMX", "FMNMX", "SEL", "ISETP", "FSETP", "LEA", "PLOP3", "FSEL", "BMSK", "SGXT" # one every other clock


def compiled(key, registers=128):
    "The compiled kernel, and seconds. `key`: head_dim, channels of values, products of the mean, warps | widths of keys | of values."
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource
    from ndkv import kernels_pages as kp
    warps, names, started = int(key.split('|')[0].split()[3]), kp._read_pages.arg_names, time.time()
    types = {n: TYPES.get(n, "i32") for n in names}
    fixed = {(names.index("KEY"),): kp.signed(key), (names.index("W"),): warps}
    source = GluonASTSource(kp._read_pages, types, fixed)
    options = dict(num_warps=warps, maxnreg=registers)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options), time.time() - started


def disassembled(kernel):
    "SASS, and what it says about registers and stack."
    import triton
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as d:
        file = Path(d) / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return run(tools / "nvdisasm", "-c", file), run(tools / "cuobjdump", "-res-usage", file)


def instructions(text):
    "[(name, target of a branch or None)], {label: index of the instruction behind it}."
    found, labels = [], {}
    for line in text.splitlines():
        if m := re.match(r"\s*(\.L_x_\d+):", line): labels[m[1]] = len(found)
        elif m := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*);", line):
            to = re.search(r"\.L_x_\d+", m[2]) if m[1] == "BRA" else None
            found.append((m[1], to[0] if to else None))
    return found, labels


def counts(text, usage):
    "Of the loop over rounds; with one template every instruction of it runs once a page."
    found, labels = instructions(text)
    branches = [(i, labels[to]) for i, (_, to) in enumerate(found) if to]
    end, start = max(((i, to) for i, to in branches if to < i), key=lambda b: b[0] - b[1])
    names = [name.split(".")[0] for name, _ in found]
    loop = names[start:end + 1]
    return dict(page=len(loop), alu=sum(n in ALU for n in loop), imma=names.count("IMMA"), hgmma=names.count("HGMMA"),
                local=sum(n in ("LDL", "STL") for n in names), registers=int(re.search(r"REG:(\d+)", usage)[1]))


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "Triton cannot compile while it interprets"
    kernel, seconds = compiled(sys.argv[1], registers=int(sys.argv[2]) if len(sys.argv) > 2 else 128)
    print(" ".join(f"{k}={v}" for k, v in counts(*disassembled(kernel)).items()), f"milliseconds={1000*seconds:.0f}")
