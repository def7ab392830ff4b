"""Pages and kernels beyond the sizes that the notebooks show."""
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

os.environ.setdefault('TRITON_INTERPRET', str(int(not torch.cuda.is_available())))
from ndkv.frames import Frame, rotation
from ndkv.kernels_decode import Layout, PackedAttention, attend_ref, from_pages, to_pages
from ndkv.kernels_encode import encode_pages
from ndkv.kernels_prerope import PreRopeAttention
from ndkv.kernels_trellis import TrellisAttention, TrellisLayout
from ndkv.kernels_viterbi import on_its_device, search
from ndkv.profile import Rope
from ndkv.spectral import Home
from ndkv.trellis import Trellis

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
segments = st.lists(st.tuples(st.sampled_from([32, 64, 96]), st.sampled_from([2, 3, 4])), min_size=1, max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(segments, segments, st.sampled_from([128, 256]), st.integers(0, 10**6))
def test_pages_hold_what_they_were_given(k, v, page, seed):
    g, layout = torch.Generator().manual_seed(seed), Layout(k, v, page)
    codes = [torch.cat([torch.randint(2**b, (2, 2*page, n), generator=g) for n, b in s], -1).byte() for s in (k, v)]
    norms = torch.rand(2, 2, 2*page, generator=g).bfloat16()
    pages = to_pages(layout, *codes, *norms)
    assert pages.shape == (2, 2, layout.words)
    for a, b in zip(from_pages(layout, pages), [*codes, *norms]): assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize('k, v, page, says', [
    (((64, 5),), ((64, 4),), 128, '2, 3 or 4 bits'), (((40, 4),), ((64, 4),), 128, 'multiple of 16'), (((48, 3),), ((64, 4),), 128, '32 at 3 bits'),
    (((64, 2),), ((64, 2),), 64, '128 times'), (((64, 4),), ((64, 4),), 32, '64 times'), (((64, 4),), ((64, 4),), 96, '64 times'), (((64, 4),), ((64, 3),), 80, '3 bits only')])
def test_layouts_that_no_kernel_reads_are_refused(k, v, page, says):
    with pytest.raises(ValueError, match=says): Layout(k, v, page)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 16), st.sampled_from([(((64, 4),), 64), (((64, 2),), 128), (((64, 3),), 80), (((32, 4), (32, 3)), 128)]), st.integers(1, 4), st.data())
def test_kernels_agree_with_float64(seed, group, layout, splits, data):
    torch.manual_seed(seed)
    (segments, page), D, H, B, n = layout, 64, 1, 2, 2
    pa = PackedAttention(Layout(segments, segments, page), rotation(D, seed), rotation(D, seed + 1), H)
    pages = pa.encode(torch.randn(B, H, n*page, D), torch.randn(B, H, n*page, D))
    lens = torch.tensor([data.draw(st.integers(1, n*page)), n*page], dtype=torch.int32)
    q, table = torch.randn(B, H*group, D) * 10**data.draw(st.floats(-3, 1)), torch.randperm(B*n).view(B, n).int()
    store = torch.empty(B*n, H, pa.layout.words, dtype=torch.int16)
    store[table.long()] = pages.transpose(1, 2)
    got = pa(q.to(DEVICE), store.to(DEVICE), table.to(DEVICE), lens.to(DEVICE), splits=splits).cpu().double()
    want = attend_ref(q, *pa.decode(pages), torch.arange(n*page) < lens[:, None], D**-.5)
    assert (got - want).norm() < 3e-3 * want.norm()


@pytest.mark.parametrize('bits, page', [(4, 64), (2, 128), (3, 80)])
def test_launch_options_of_encoding_change_no_word(bits, page):
    torch.manual_seed(0)
    seg, table = ((64, bits),), torch.tensor([[2, 0, 1]], dtype=torch.int32, device=DEVICE)
    pa, x = PackedAttention(Layout(seg, seg, page), rotation(64), rotation(64, 1), 1), torch.randn(2, 1, 1, 3*page, 64, device=DEVICE).bfloat16()
    write = lambda **kw: encode_pages(pa, *x, torch.zeros(3, 1, pa.layout.words, dtype=torch.int16, device=DEVICE), table, **kw)
    want = write()
    assert want.any(1).any(1).all()
    for kw in (dict(each=1), dict(each=3, warps=2)):
        same = (write(**kw) == want).float().mean().item()
        assert same > .99, kw # but for codes at a tie


@pytest.mark.parametrize('size', [1e-4, 1., 1e4])
def test_sizes_do_not_matter(size):
    torch.manual_seed(0)
    pa = PackedAttention(Layout(((64, 4),), ((64, 4),), 64), rotation(64), rotation(64, 1), 1)
    k, v = torch.randn(1, 1, 64, 64) / size, torch.randn(1, 1, 64, 64) * size
    q = torch.randn(1, 4, 64) * size
    v[:, :, 5] = 0
    store = encode_pages(pa, k.to(DEVICE), v.to(DEVICE), torch.empty(1, 1, pa.layout.words, dtype=torch.int16, device=DEVICE), torch.zeros(1, 1, dtype=torch.int32, device=DEVICE))
    got = pa(q.to(DEVICE), store, torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), torch.tensor([64], dtype=torch.int32, device=DEVICE)).cpu().double()
    want = attend_ref(q, *(x.cpu() for x in pa.decode(store.transpose(0, 1)[None])), torch.ones(1, 64, dtype=torch.bool), 1/8)
    assert (got - want).norm() < 3e-3 * want.norm()


@pytest.fixture
def watched(monkeypatch):
    "Every address that an interpreted kernel touches must lie inside one of its arguments."
    if DEVICE == 'cuda': pytest.skip('needs the interpreter')
    import numpy as np
    from triton.runtime import interpreter
    spans, touched = [], []
    def inside(pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        at = np.asarray(pointers.data)[np.broadcast_to(np.asarray(mask, bool), np.asarray(pointers.data).shape)].astype(np.int64)
        touched.append(at.size)
        ok = np.zeros(at.shape, bool)
        for a, n in spans: ok |= (at >= a) & (at + size <= a + n)
        assert ok.all(), f'{(~ok).sum()} of {ok.size} addresses of {pointers.get_element_ty()} lie outside of every argument'
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, arguments = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    def init(self, args, kwargs):
        out = arguments(self, args, kwargs)
        spans[:] = [(t.data_ptr(), t.numel() * t.element_size()) for t in out[0] if isinstance(t, torch.Tensor)]
        return out
    monkeypatch.setattr(builder, 'create_masked_load', lambda self, p, m, *a: (inside(p, m.data), load(self, p, m, *a))[1])
    monkeypatch.setattr(builder, 'create_masked_store', lambda self, p, v, m, *a: (inside(p, m.data), store(self, p, v, m, *a))[1])
    monkeypatch.setattr(executor, '_init_args_hst', init)
    return touched


def _frame(H, D):
    A = torch.linalg.qr(torch.randn(H, D, D)).Q
    return Frame(A, A.mT.contiguous(), mean=torch.randn(H, D), scale=torch.linspace(1, .3, D).expand(H, D))


def _run(pa, H, D, group, pages=3, B=2, splits=2, device='cpu'):
    "Attention over random content, and its relative error."
    T = pages * pa.layout.page
    pages_of = pa.encode(torch.randn(B, H, T, D), torch.randn(B, H, T, D), 4)
    store, table = torch.empty(B*pages, H, pa.layout.words, dtype=torch.int16), torch.randperm(B*pages).view(B, pages).int()
    store[table.long()] = pages_of.transpose(1, 2)
    lens, q = torch.tensor([T - 7, 5], dtype=torch.int32), torch.randn(B, H*group, D)
    exact = (torch.randn(B, H, 9, D), torch.randn(B, H, 9, D), torch.tensor([9, 2], dtype=torch.int32))
    got = pa(*(t.to(device) for t in (q, store, table, lens)), exact=[t.to(device) for t in exact], splits=splits).cpu().double()
    k, v = (torch.cat([a, e.double()], 2) for a, e in zip(pa.decode(pages_of, 4), exact))
    live = torch.cat([torch.arange(T) < lens[:, None], torch.arange(9) < exact[2][:, None]], 1)
    want = attend_ref(q, k, v, live, D**-.5)
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize('group', [1, 3, 4, 16])
@pytest.mark.parametrize('block', [0, 16, 32, 64, 128])
def test_nothing_outside_is_touched(watched, group, block):
    torch.manual_seed(group + block)
    H, D = 2, 64
    home = Home(Rope(1e4**(-torch.arange(0, D, 2)/D)), block, 4) if block else None
    assert _run(PackedAttention(Layout(((32, 4), (16, 2)), ((64, 2),)), _frame(H, D), _frame(H, D), H, home), H, D, group) < 3e-3
    assert sum(watched) > 10000


@pytest.mark.parametrize('k, page', [(((64, 4),), 64), (((64, 3),), 80), (((64, 3),), 128), (((48, 2),), 128)])
def test_nothing_outside_is_touched_by_other_pages(watched, k, page):
    torch.manual_seed(0)
    assert _run(PackedAttention(Layout(k, k, page), _frame(1, 64), _frame(1, 64), 1), 1, 64, 3) < 3e-3


@pytest.mark.parametrize('block', [0, 64])
def test_trellis_kernel_touches_nothing_outside(watched, block):
    torch.manual_seed(0)
    home = Home(Rope(1e4**(-torch.arange(0, 64, 2)/64)), block, 4) if block else None
    assert _run(TrellisAttention(TrellisLayout(((32, 3), (32, 1)), ((64, 1),)), _frame(2, 64), _frame(2, 64), 2, home), 2, 64, 3) < 3e-3


def test_prerope_kernel_touches_nothing_outside(watched):
    torch.manual_seed(0)
    home = Home(Rope(1e4**(-torch.arange(0, 96, 2)/96)), 1, 4)
    assert _run(PreRopeAttention(Layout(((96, 2),), ((64, 2),), 128), _frame(2, 96), _frame(2, 96), 2, home), 2, 96, 3) < 3e-3


def test_search_touches_nothing_outside(watched):
    torch.manual_seed(0)
    t = Trellis([2, 1, 3, 0, 4, 2], 256)
    search(t, torch.randn(2, 6), torch.ones(6))
    assert sum(watched) > 1000


def test_tuning_keeps_what_helps_and_bench_finds_it(monkeypatch, tmp_path):
    "The search, on times that are made up: a case's own optimum is found, written, and read again."
    from ndkv import kernels_bench as kb
    from ndkv.results import Run
    seen = []
    class Fake:
        def __call__(self, *a, tuning=None, **k): seen.append(tuning)
    def clock(f, n, reps=21):
        f(0)
        t = seen[-1]
        if t.stages == 4: raise RuntimeError('too much shared memory')
        return 100. + abs(t.per_sm - 6) + 3*abs(t.run - 2) + 5*(t.rows != 64) - 2*(t.early == 2)
    monkeypatch.setattr(kb, 'prepare', lambda case: (Fake(), None, None, [None], None, None))
    monkeypatch.setattr(kb, 'graph_time', clock)
    case = next(c for c in kb.CASES if c.name == '4bit_uniform')
    with monkeypatch.context() as m: # a pretended Hopper, and no longer than needed: what starts a real GPU asks it, too
        m.setattr(torch.cuda, 'get_device_capability', lambda device=None: (9, 0))
        kb.tune([case], tmp_path)
        kb.tune([case], tmp_path) # again, from there: nothing changes
    t = kb.read_tuning(case, tmp_path/'kernel_table.json')
    assert kb.read_tuning(case, tmp_path/'kernel_table.json', 'sm_80').early == 0 # what was measured on another kind of GPU is left alone
    assert (t.per_sm, t.run, t.rows, t.early) == (6, 2, 64, 2) and len(json.loads((tmp_path/'kernel_table.json').read_text())) == 1
    assert any('error' in r for r in json.loads((tmp_path/'kernel_tuning.json').read_text()))

    for name, f in dict(copy_rate=lambda: 4e12, time_rivals=lambda c: ('sdpa', 240., 2e-3), measure_encode=lambda c, n: (50., 10**8)).items(): monkeypatch.setattr(kb, name, f)
    def measure(case, tuning):
        if case.name == '2bit': raise RuntimeError('no kernel image')
        return dict(time_us=80., bytes=10**8, error=1e-3)
    monkeypatch.setattr(kb, 'measure', measure)
    with Run(tmp_path, command='bench', name='kernels') as run, monkeypatch.context() as m:
        m.setattr(torch.cuda, 'is_available', lambda: True)
        m.setattr(torch.cuda, 'get_device_capability', lambda device=None: (9, 0))
        rows = kb.bench(kb.CASES, run)
        m.undo()
    assert {r['method'] for r in rows} == {c.name for c in kb.CASES} - {'2bit'}
    assert {r['metric'] for r in rows if r['method'] == 'encode_4bit'} == {'time_us', 'bandwidth_fraction', 'time_token_us', 'time_vector_us'}


@pytest.mark.skipif(DEVICE != 'cuda', reason='needs a GPU')
@pytest.mark.parametrize('group', [3, 4])
@pytest.mark.parametrize('block', [16, 32])
def test_short_blocks_on_a_gpu(group, block):
    "In a process of its own, because a fault takes the GPU's context with it."
    script = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_kernels import *; from test_kernels import _run, _frame
PackedAttention.short, H, D = True, 2, 64
home = Home(Rope(1e4**(-torch.arange(0, D, 2)/D)), {block}, 4)
assert _run(PackedAttention(Layout(((32, 4), (16, 2)), ((64, 2),)), _frame(H, D), _frame(H, D), H, home), H, D, {group}, device='cuda') < 3e-3
assert _run(PackedAttention(Layout(((64, 3),), ((64, 2),)), _frame(H, D), _frame(H, D), H, home), H, D, {group}, device='cuda') < 3e-3
"""
    run = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_kernels_are_launched_where_their_tensors_are(monkeypatch):
    "A model on several GPUs has one current device; what launches kernels takes that of its first tensor, and gives it back."
    from contextlib import contextmanager
    seen = []
    class There(torch.Tensor): device = torch.device("cuda:1")
    @contextmanager
    def current(device):
        seen.append(str(device))
        yield
        seen.append("back")
    monkeypatch.setattr(torch.cuda, "device", current)
    assert on_its_device(lambda self, x, y: seen.append("run") or 3)("self", There(), y=4) == 3
    assert on_its_device(lambda x: 5)(torch.zeros(1)) == 5
    assert seen == ["cuda:1", "run", "back"]
