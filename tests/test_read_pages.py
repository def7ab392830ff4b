"""Pages read by kernels: the plain one in Triton's interpreter, the Gluon one by emulation and by its disassembly."""
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from ndkv import kernels_pages as kp
from ndkv.frames import Frame
from ndkv.pages import PAGE, PageCodec, allocate_strips, runs, strips_of
from ndkv.profile import Rope
from ndkv.spectral import Home
from pages_emulated import emulated

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") == "0" else "cpu"


def fast():
    "Inside, `attend_pages` takes the Gluon kernel: on a GPU the real one, else its emulation."
    return emulated(vars(kp)) if DEVICE == "cpu" else nullcontext()


def coded(codecs, k, v):
    "Entries of keys and of values, and their pages `[P, bytes]`."
    keys = codecs[0].encode(k, 4)
    entries = keys, codecs[1].encode(v, 4, codecs[0].order(keys))
    return entries, *(e["pages"][0, 0].contiguous() for e in entries)


def drawn(D, pages, seed, mean=1., rope="half", widths=None, heads=2, fall=-1.5):
    "Codecs of keys and values, keys after RoPE, values."
    torch.manual_seed(seed)
    bases = [torch.linalg.qr(torch.randn(heads, D, D))[0] for _ in "kv"]
    scale = torch.logspace(0, fall, D).expand(heads, D)
    means = [torch.randn(heads, D) * m / D**.5 for m in (mean, .3)]
    frames = [Frame(A, A.mT.contiguous(), m, scale) for A, m in zip(bases, means)]
    if widths is None: widths = allocate_strips([strips_of(f, torch.tensor([[5., 1., .3]]*heads)) for f in frames], 2.5)
    n = D//2 if rope != "partial" else D//4
    home = Home(Rope(1/10000**(torch.arange(n)/n), 1.3, "half" if rope == "partial" else rope), PAGE, 4) if rope else Home()
    codecs = PageCodec("k", frames[0], widths[0], home, torch.randn(heads, D)), PageCodec("v", frames[1], widths[1])
    z, v = ((torch.randn(1, heads, pages*PAGE, D) * scale[:, None]) @ A for A in bases)
    return codecs, home.leave(z, torch.arange(4, 4 + pages*PAGE), means[0]), v + means[1][:, None]


def worst(codecs, k, v, q, lens, tokens=(70, 33, 1), bfloat16=False, warps=4, **kw):
    "Largest relative error of `attend_pages` against decoding in float64; also that of decoded keys in bfloat16."
    entries, k_pages, v_pages = coded(codecs, k, v)
    P, (H, D), B = len(k_pages), codecs[0].widths.shape, len(lens)
    shuffled = torch.randperm(P)
    table, n = shuffled.int().repeat(B, 1), torch.tensor(tokens[:B], dtype=torch.int32)
    exact = *(torch.randn(B, H, max(tokens), d, dtype=torch.float32) for d in (D, codecs[1].D)), n
    back = shuffled.argsort()
    put = lambda x: x.to(DEVICE).contiguous()
    got = kp.attend_pages(kp.Plan(*codecs, P, device=torch.device(DEVICE), warps=warps), put(q), put(k_pages[back]), put(v_pages[back]),
                          put(table), put(torch.tensor(lens, dtype=torch.int32)), tuple(map(put, exact)), **kw).cpu()
    dk, dv = (c.decode(e, 4)[0].double() for c, e in zip(codecs, entries))
    errors = []
    for b in range(B):
        full = [torch.cat([d[:, :lens[b]*PAGE], e[b, :, :n[b]].double()], 1) for d, e in zip((dk, dv), exact)]
        attend = lambda k: (torch.einsum("hgd,hnd->hgn", q[b].view(H, -1, D).double(), k) / D**.5).softmax(-1) @ full[1]
        want = attend(full[0])
        error = lambda x: ((x - want.flatten(0, 1)).norm(dim=-1) / want.flatten(0, 1).norm(dim=-1)).max().item()
        errors.append((error(got[b]), error(attend(full[0].bfloat16().double()).flatten(0, 1))))
    return max(e for e, _ in errors) if not bfloat16 else tuple(map(max, zip(*errors)))


@pytest.mark.parametrize("D,G,rope", [(24, 3, None), (32, 4, "interleaved"), (32, 6, "partial"), (64, 1, "half")])
def test_plain_kernel(D, G, rope):
    assert worst(*drawn(D, 3, D, rope=rope, mean=float(rope is not None)), torch.randn(3, 2*G, D), (3, 1, 0), plain=True) < 1e-5


@pytest.mark.parametrize("plain", [True, False])
def test_sums_are_float32_whatever_the_default_dtype_is(plain):
    case, q = drawn(32, 3, 1), torch.randn(3, 8, 32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with fast(): error = worst(*case, q, (3, 1, 0), splits=2, plain=plain)
    finally: torch.set_default_dtype(torch.float32)
    assert error < (1e-5 if plain else 1e-3)


CASES = dict(usual={}, no_mean=dict(mean=0., rope=None), long_mean=dict(mean=300.), interleaved=dict(rope="interleaved"),
             partial=dict(rope="partial"), steep=dict(fall=-4.))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("G", [2, 6])
def test_kernel_emulated(name, G):
    case = drawn(64, 4, 3, **CASES[name])
    with fast(): assert worst(*case, 3*torch.randn(3, 2*G, 64), (4, 1, 0), splits=2) < 1e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_pages_are_read_on_the_second_gpu(monkeypatch):
    "Which is not the current one."
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", "cuda:1")
    assert torch.cuda.current_device() == 0 and worst(*drawn(64, 4, 3), 3*torch.randn(3, 8, 64), (4, 1, 0), splits=2) < 1e-3


@pytest.mark.parametrize("what", ["long value", "long key", "tiny values", "sharp", "zero query"])
def test_kernel_extremes(what):
    codecs, k, v = drawn(64, 3, 5)
    q = 3*torch.randn(2, 8, 64)
    if what == "long value": v[:, :, 5] *= 1000
    if what == "long key": k[:, :, 7] *= 30
    if what == "tiny values": v[:, :, :200] *= 1e-4
    if what == "sharp": q *= 4
    if what == "zero query": q[0, 0] = 0
    with fast(): error, rounded = worst(codecs, k, v, q, (3, 2), bfloat16=True)
    assert error < (rounded / 2 if what in ("long key", "sharp") else 2e-3), (error, rounded)


@pytest.mark.parametrize("seed", range(4))
def test_any_widths_emulated(seed):
    "Templates at random, heads that differ, heads with nothing in a tier, every head width that the kernel takes."
    D = (16, 48, 80, 128)[seed]
    torch.manual_seed(seed)
    widths = [torch.randint(0, 9, (2, 3, len(runs(D)))) * (torch.rand(2, 3, 1) < .8) for _ in "kv"]
    for w in widths: w[:, 2, 0] = 1
    with fast(): assert worst(*drawn(D, 3, seed, widths=widths), torch.randn(2, 8, D), (3, 2)) < 2e-3


def small_model(length, layers, **rope):
    "A model that reads packed pasts, ids, and a profile of it."
    from transformers import LlamaConfig, LlamaForCausalLM
    from ndkv import calibrate
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **rope, attn_implementation="ndkv_packed")).eval().to(DEVICE)
    ids = torch.randint(0, 61, (4, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return model, ids, calibrate(model, ids, window=16, enough=1, bar=False)


@torch.no_grad()
def test_what_is_known_of_a_layer_is_made_once_and_stays_in_range(monkeypatch):
    "Rotation tables that hold up to a length are not asked beyond it; steps share a plan."
    from ndkv import attention
    rope = dict(rope_type="dynamic", factor=2., rope_theta=1e4)
    model, ids, profile = small_model(400, 1, max_position_embeddings=512, rope_parameters=rope)
    cache, made, plan = attention.PagedCache(model.config, 3, profile, window=16), [], kp.Plan
    monkeypatch.setattr(kp, "Plan", lambda *a, **k: made.append(a[2]) or plan(*a, **k))
    with fast():
        for a, b in ((0, 300), (300, 301), (301, 302)): model(ids[:1, a:b], past_key_values=cache)
    assert made == [3]


def test_what_is_known_of_a_layer_is_made_on_the_cpu_whatever_the_default_device_is():
    "As codecs are; on `meta` nothing could be read back."
    codecs, plans = drawn(32, 4, 0)[0], []
    for device in ("cpu", "meta"):
        with torch.device(device): plans.append(kp.Plan(*codecs, 4))
    for a, b in zip(*(vars(p).items() for p in plans)):
        if torch.is_tensor(a[1]): assert torch.equal(a[1], b[1]), a[0]


@torch.no_grad()
def test_generation_reads_pages_by_the_kernel(monkeypatch):
    "A model's single tokens go through the kernel, chunks and cropped pasts too, with the predictions of decoded tiles."
    from ndkv import attention
    model, ids, profile = small_model(420, 2)
    def read():
        cache = attention.PagedCache(model.config, 3, profile, window=16)
        step = lambda a, b: model(ids[:2, a:b], past_key_values=cache).logits
        out = [step(0, 410), step(410, 411), step(411, 415), step(415, 416)]
        cache.crop(-130)
        return torch.cat([*out, step(286, 287)], 1), cache
    with monkeypatch.context() as m:
        m.setattr(kp, "kernel_can_read", lambda *a: False)
        want, cache = read()
    assert {s.packed.n for s in cache.layers[0].stores} == {256}
    calls, attend = [], kp.attend_pages
    monkeypatch.setattr(kp, "attend_pages", lambda *a, **k: calls.append(a[5].tolist()) or attend(*a, **k))
    with fast(): got, _ = read()
    assert len(calls) == 6 and calls[0] == [3, 3] and calls[-1] == [2, 2]
    torch.testing.assert_close(got, want, atol=3e-3*want.abs().max().item(), rtol=0)


@torch.no_grad()
def test_a_server_reads_pages_by_the_kernel(monkeypatch):
    "Slots of different lengths in one step, one of them without pages."
    from ndkv import Server
    model, ids, profile = small_model(320, 1)
    def step():
        server = Server(model, slots=3, length=400, bits=3, window=16, profile=profile)
        for name, n in (("a", 300), ("b", 30), ("c", 170)): server.add_request(ids[0, :n].tolist(), name, max_new_tokens=2)
        server.step()
        return server.logits.float().cpu()
    with monkeypatch.context() as m:
        m.setattr(kp, "kernel_can_read", lambda *a: False)
        want = step()
    with fast(): got = step()
    torch.testing.assert_close(got, want, atol=3e-3*want.abs().max().item(), rtol=0)
    assert not torch.equal(got, want)


def test_refuses_what_does_not_fit():
    codecs, k, v = drawn(32, 2, 1)
    _, k_pages, v_pages = coded(codecs, k, v)
    plan, table, lens = kp.Plan(*codecs, 2), torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    for q, pages, t in ((torch.randn(1, 3, 32), k_pages, table), (torch.randn(1, 4, 32), k_pages[:, 1:], table),
                        (torch.randn(1, 4, 32), k_pages, table.repeat(1, 2))):
        with pytest.raises(ValueError, match="attend_pages"): kp.attend_pages(plan, q, pages, v_pages, t, lens)


TWO = "654332211/443221110/332111000 543211100/332110000/211000000"
FOUR = "/".join(["4"*9]*3) # without a profile


@pytest.mark.parametrize("key", [f"128 128 1 16|{TWO}|{TWO}", f"128 128 {kp.OWN} 8|{FOUR}|{FOUR}"])
def test_sass_is_native_and_keeps_registers(key):
    "Compiled for sm_90a here: integer products are native; but for a few constants of the loop nothing is in local memory."
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=path)
    command = [sys.executable, HERE / "pages_sass.py", key]
    got = subprocess.run(command, env=env, capture_output=True, text=True)
    if "No module named 'triton.experimental'" in got.stderr: pytest.skip("this Triton has no Gluon")
    assert not got.returncode, got.stderr[-3000:]
    n = {k: int(x) for k, x in re.findall(r"(\w+)=(\d+)", got.stdout)}
    assert n["imma"] >= 60 and n["registers"] <= kp.REGISTERS, n
    assert n["local"] <= 40, n # of two thousand instructions


def test_parts_of_a_block_are_shared():
    "One warp, several, more warps than pages, several blocks: the same."
    codecs, k, v = drawn(32, 6, 5)
    q = torch.randn(1, 8, 32)
    for warps in (4, 8, 16):
        with fast(): assert worst(codecs, k, v, q, (6,), warps=warps, splits=2 if warps == 4 else 1) < 1e-3


def test_splits_fill_the_gpu():
    "As many blocks as multiprocessors where there is work for them, no more than there are pages."
    assert kp.best_splits(64, 256, 16, 132) == 2 and kp.best_splits(512, 32, 16, 132) == 1
    for programs in (1, 7, 64, 500):
        for pages in (1, 5, 33, 1000):
            s = kp.best_splits(programs, pages, 16, 132)
            assert 1 <= s <= -(-pages // 16)
