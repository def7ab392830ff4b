"The kernels for a Hopper GPU: emulated on a CPU, compiled for it without one."
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ndkv.kernels_encode_fast as fast
import ndkv.kernels_encode_pages as plain_kernels
from encode_emulated import emulated
from ndkv.pages import PAGE, PageCodec, runs
from ndkv.profile import Rope
from ndkv.spectral import Home, klt


def make(D, rope, g, H=2):
    cov = torch.diag_embed(torch.logspace(0, -3, D, dtype=torch.float64)).expand(H, D, D)
    basis = klt(cov, torch.eye(D, dtype=torch.float64).expand(H, D, D), torch.randn(H, D, generator=g) * .1)
    widths = torch.randint(0, 9, (H, 3, len(runs(D))), generator=g).sort(-1, descending=True).values.sort(1, descending=True).values
    widths[0, :, 1] = widths[0, :, 0]
    home = Home(rope, PAGE, 4) if rope is not None else Home()
    keys = dict(basis=basis, widths=widths, home=home, direction=torch.randn(H, D, generator=g))
    codec = lambda kind, by: PageCodec(kind, by_kernel=by, **(keys if kind == "k" else dict(basis=basis, widths=widths)))
    return basis, [(codec(kind, False), codec(kind, True)) for kind in "kv"]


@pytest.mark.parametrize("D, B, P, rope", [(16, 5, 1, Rope(10000. ** -(torch.arange(0, 16, 2) / 16))), (24, 2, 2, Rope(10000. ** -(torch.arange(0, 16, 2) / 16), 1.2, "interleaved", 4)),
                                           (80, 1, 2, Rope(10000. ** -(torch.arange(0, 80, 2) / 80))), (64, 4, 1, None)])
def test_bytes_are_those_of_plain_torch(D, B, P, rope):
    "Norms, codes and orders of tiles that several pages share, of a basis that is turned, and of keys that are; norms beyond the base."
    g = torch.Generator().manual_seed(D)
    basis, pairs = make(D, rope, g)
    x = torch.randn(B, P*PAGE, 2, D, generator=g).transpose(1, 2) * torch.logspace(0, -1.5, D) + basis.mean[:, None]
    order = None
    with emulated(fast, vars(plain_kernels)):
        for plain, kernel in pairs: # values in the order of their keys
            a, b = plain.encode(x.bfloat16(), 4 + 3*PAGE, order), kernel.encode(x.bfloat16(), 4 + 3*PAGE, order)
            assert (plain.order(a) == plain.order(b)).double().mean() > .99 and (a["pages"] == b["pages"]).double().mean() > .97
            order = plain.order(a)
        x[0, :, 5::9] *= 1e3 # the others are then too small for the base of their page
        for plain, kernel in pairs:
            a, b = plain.encode(x.bfloat16(), 4 + 3*PAGE, order), kernel.encode(x.bfloat16(), 4 + 3*PAGE, order)
            assert torch.equal(plain.order(a), plain.order(b)) and (a["pages"] == b["pages"]).double().mean() > .97


SCRIPT = "encode_fast_sass.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests on a GPU run the kernels")
def test_compiled_code():
    "Products of whole warpgroups that are not waited for one by one, no local memory, and code that an instruction cache holds."
    command = [sys.executable, str(Path(__file__).parent / SCRIPT)]
    done = subprocess.run(command, env=dict(os.environ, TRITON_INTERPRET="0"), capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    found = [dict(p.split("=") for p in line.split()[1:]) for line in done.stdout.splitlines()]
    assert len(found) == 2 and all(int(f["local"]) == 0 and int(f["products"]) == 16 and int(f["waits"]) <= 2 and float(f["kilobytes"]) < 64 for f in found)
