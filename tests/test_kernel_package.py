"A package of the `kernels` hub format holds all that it needs, and reads pages as ndkv does."
import json
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT/"nbs"/"_tools"))
import kernel_package # noqa: E402
from test_read_pages import drawn # noqa: E402

LOADER = """
import importlib.util, sys, torch
sys.modules["ndkv"] = None # an import of it fails
folder, given, out = sys.argv[1:]
try: import kernels
except ImportError: kernels = None
if kernels: k = kernels.get_local_kernel(__import__("pathlib").Path(folder))
else: # as kernels does
    path = f"{folder}/build/torch-cpu/__init__.py"
    spec = importlib.util.spec_from_file_location("ndkv_kernel", path, submodule_search_locations=[path.rpartition("/")[0]])
    k = sys.modules["ndkv_kernel"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(k)
frames, widths, rope, direction, q, keys, values, table, lens = torch.load(given, weights_only=False)
own = lambda f: sys.modules[k.__name__ + ".frames"].Frame(*f)
Rope, Home = (getattr(sys.modules[k.__name__ + m], n) for m, n in ((".profile", "Rope"), (".spectral", "Home")))
codecs = k.PageCodec("k", own(frames[0]), widths[0], Home(Rope(*rope), k.PAGE, 4), direction), k.PageCodec("v", own(frames[1]), widths[1])
torch.save(k.attend_pages(k.Plan(*codecs, 2), q, keys, values, table, lens), out)
print(bool(kernels), k.__file__)
"""


def test_the_package_needs_nothing_else(tmp_path):
    from ndkv import kernels_pages as kp
    names = kernel_package.build(tmp_path)
    assert "kernels_pages" in names and not {"cli", "report", "serving"} & {*names}
    about = json.loads((tmp_path/"build"/"torch-cuda"/"metadata.json").read_text())
    assert about["name"] == "ndkv" and about["backend"] == {"type": "cuda"} and about["python-depends"] == []
    codecs, k, v = drawn(32, 2, 0)
    keys = codecs[0].encode(k, 4)
    pages = [keys["pages"][0, 0], codecs[1].encode(v, 4, codecs[0].order(keys))["pages"][0, 0]]
    q, table, lens = torch.randn(1, 4, 32), torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    want = kp.attend_pages(kp.Plan(*codecs, 2), q, *pages, table, lens)
    parts = lambda f: (f.A, f.A_inv, f.mean, f.scale)
    rope = codecs[0].home.rope
    torch.save(([parts(c.basis) for c in codecs], [c.strips for c in codecs], (rope.inv_freq, rope.scaling, rope.pairing), codecs[0].direction.float(), q, *pages, table, lens),
               tmp_path/"given.pt")
    p = subprocess.run([sys.executable, "-c", LOADER, tmp_path, tmp_path/"given.pt", tmp_path/"got.pt"], capture_output=True, text=True, cwd=tmp_path)
    assert p.returncode == 0, p.stderr[-2000:]
    assert (torch.load(tmp_path/"got.pt") - want).abs().max() < 1e-4 * want.abs().max()
    assert str(tmp_path) in p.stdout


def test_another_module_is_not_forgotten(tmp_path):
    "The closure of imports is found in the source: taking one away leaves a package that cannot be imported."
    names = kernel_package.build(tmp_path)
    (tmp_path/"build"/"torch-cpu"/"frames.py").unlink()
    code = LOADER.split("frames, widths")[0]
    p = subprocess.run([sys.executable, "-c", code, tmp_path, "-", "-"], capture_output=True, text=True, cwd=tmp_path)
    assert "frames" in names and p.returncode != 0 and "frames" in p.stderr


@pytest.mark.parametrize("name", ["kernels_pages", "pages"])
def test_what_is_needed_is_within(name):
    assert {name, "frames", "codebooks"} <= {*kernel_package.needed([name])}
