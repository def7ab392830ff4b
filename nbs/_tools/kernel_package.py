"""The page kernels as a package of the `kernels` hub format: modules of ndkv with what they import, and nothing else.

    python nbs/_tools/kernel_package.py OUT      # OUT/build/torch-cpu and OUT/build/torch-cuda
    python -c "import kernels; k = kernels.get_local_kernel('OUT')"   # k.Plan, k.attend_pages, k.PageCodec
"""
import ast
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FACE = dict(kernels_pages=("Plan", "attend_pages", "kernel_can_read"), pages=("PAGE", "PageCodec"), kernels_encode_pages=("Encoder",))


def needed(modules):
    "Names of modules and of all that they import from this package."
    found, rest = set(), list(modules)
    while rest:
        name = rest.pop()
        if name in found: continue
        found.add(name)
        for node in ast.walk(ast.parse((ROOT/"ndkv"/f"{name}.py").read_text(encoding="utf8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1: rest += [node.module] if node.module else [n.name for n in node.names]
            if isinstance(node, ast.ImportFrom) and node.module == "ndkv": rest += [n.name for n in node.names]
    return sorted(found)


def build(out):
    "A folder as `kernels` loads it."
    names = needed(FACE)
    version = re.search(r"^version = (\S+)", (ROOT/"settings.ini").read_text(), re.M)[1]
    face = "".join(f"from .{module} import {', '.join(members)}\n" for module, members in FACE.items())
    for backend in ("cpu", "cuda"):
        folder = Path(out)/"build"/f"torch-{backend}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in names:
            text = (ROOT/"ndkv"/f"{name}.py").read_text(encoding="utf8")
            text = re.sub(r"\bfrom ndkv import\b", "from . import", text) # the package has another name there
            (folder/f"{name}.py").write_text(re.sub(r"""\bfiles\(["']ndkv["']\)""", "files(__package__)", text), encoding="utf8")
        for data in (ROOT/"ndkv").glob("*.safetensors"): shutil.copy(data, folder)
        (folder/"__init__.py").write_text(f'"Pages of a quantized KV cache: written, and read by one new token."\n__version__ = "{version}"\n{face}', encoding="utf8")
        about = dict(name="ndkv", id=f"_ndkv_{backend}_{version.replace('.', '_')}", version=1, license="Apache-2.0", backend=dict(type=backend))
        (folder/"metadata.json").write_text(json.dumps(about | {"python-depends": []}, indent=1))
    return names


if __name__ == "__main__": print(*build(sys.argv[1]))
