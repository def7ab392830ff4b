"""Pages and kernels beyond the sizes that the notebooks show."""
import os

import pytest
import torch
from hypothesis import given, settings, strategies as st

os.environ.setdefault('TRITON_INTERPRET', str(int(not torch.cuda.is_available())))
from ndkv.frames import rotation
from ndkv.kernels_decode import Layout, PackedAttention, attend_ref, from_pages, to_pages
from ndkv.kernels_encode import encode_pages

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
