"Property tests of the trellis: windows from their definition, the search against exhaustion, widths in any order, and its answers to bad input."
import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from ndkv.codebooks import distortion, lloyd_max, shannon
from ndkv.trellis import Trellis, _circle, _viterbi, tables, trellis_distortion

few = settings(max_examples=25, deadline=None, derandomize=True)

SIZES = 256, 1024, 4096
widths_ = st.lists(st.integers(0, 4), min_size=1, max_size=40)
seeds = st.integers(0, 10**6)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randbytes(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def by_strings(trellis, packed):
    "Decode one vector by the definition, with strings of bits."
    string, end, out = ''.join(f'{byte:08b}' for byte in packed.tolist()), 0, []
    for b in trellis.bits:
        end += b
        out.append(trellis.table[b, int((string * 20)[:10*len(string) + end][-trellis.window:], 2)].item() if b else 0.)
    return torch.tensor(out)


def cost(trellis, u, packed, weight=1.):
    return (weight * (u - trellis.decode(packed)).double().square()).sum(-1)


def as_good(trellis, u, a, b):
    "The same strings, but where two err alike: then rounding decides, and a search in two passes may go on from either."
    other = (a != b).any(-1)
    return other.sum() <= 1 + .1 * len(u) and torch.allclose(cost(trellis, u[other], a[other]), cost(trellis, u[other], b[other]), rtol=.3, atol=1e-5)


# bytes and windows

@few
@given(widths_, st.sampled_from(SIZES), seeds)
def test_decode_is_a_window_a_channel(bits, states, seed):
    trellis = Trellis(bits, states)
    assert trellis.nbytes == math.ceil(sum(bits) / 8)
    packed = randbytes(3, trellis.nbytes, seed=seed)
    assert torch.equal(trellis.decode(packed), torch.stack([by_strings(trellis, p) for p in packed]))


@few
@given(widths_, st.sampled_from(SIZES[:2]), seeds)
def test_encode_gives_the_bytes_it_promises(bits, states, seed):
    trellis, u = Trellis(bits, states), randn(2, 3, len(bits), seed=seed)
    packed = trellis.encode(u)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, trellis.nbytes)
    assert 8*packed[0, 0].nbytes - 7 <= sum(bits) <= 8*packed[0, 0].nbytes or not sum(bits)
    decoded = trellis.decode(packed)
    assert decoded.dtype == torch.float32 and decoded.shape == u.shape
    assert (decoded[..., torch.tensor(bits) == 0] == 0).all()


@few
@given(st.lists(st.integers(1, 4), min_size=12, max_size=40), st.sampled_from(SIZES[:2]), seeds)
def test_no_byte_can_be_changed_for_the_better_on_the_whole(bits, states, seed):
    "One changed byte moves a few windows; the found strings beat nearly all of their neighbours."
    trellis, u = Trellis(bits, states), randn(20, len(bits), seed=seed)
    packed = trellis.encode(u)
    at = torch.randint(trellis.nbytes, (200, 20), generator=torch.Generator().manual_seed(seed))
    changed = packed.expand(200, 20, -1).clone().scatter_(-1, at[..., None], randbytes(200, 20, 1, seed=seed))
    better = cost(trellis, u, changed) < cost(trellis, u, packed) - 1e-5
    assert better.float().mean() < .02


@pytest.mark.parametrize('shape', [(20,), (0, 20), (1, 20), (3, 20), (2, 3, 20), (2, 0, 3, 20)])
def test_any_leading_shape(shape):
    trellis, u = Trellis([3, 2, 1, 0]*5), randn(*shape)
    packed = trellis.encode(u)
    assert packed.shape == (*shape[:-1], trellis.nbytes) and trellis.decode(packed).shape == shape
    flat = u.view(-1, 20)
    if len(flat): assert as_good(trellis, flat, torch.stack([trellis.encode(v) for v in flat]), packed.view(-1, trellis.nbytes))


@few
@given(widths_, st.integers(1, 70), seeds)
def test_a_vector_is_coded_by_itself(bits, n, seed):
    trellis, u = Trellis(bits, 256), randn(70, len(bits), seed=seed)
    packed = trellis.encode(u)
    assert as_good(trellis, u[:n], trellis.encode(u[:n]), packed[:n])
    assert as_good(trellis, u[-n:], trellis.encode(u.T.contiguous().T[-n:]), packed[-n:])
    assert torch.equal(trellis.decode(packed[:n]), trellis.decode(packed)[:n])


def test_blocks_and_threads_do_not_change_the_bytes(monkeypatch):
    trellis, u, threads = Trellis([4, 2, 1, 1]*16, 256), randn(300, 64), torch.get_num_threads()
    whole = trellis.encode(u)
    try:
        torch.set_num_threads(2)
        assert torch.equal(trellis.encode(u), whole)
    finally: torch.set_num_threads(threads)
    monkeypatch.setattr(Trellis, '_chunk', lambda self, device: 37)
    assert torch.equal(trellis.encode(u), whole)


# search

@few
@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.integers(3, 5), st.booleans(), seeds)
def test_viterbi_is_exhaustive(widths, L, tied, seed):
    n = len(widths)
    ts, x = randn(n, 2**L, seed=seed), randn(n, 8, seed=seed + 1)
    ends = list(itertools.accumulate(widths, initial=L))[1:]
    strings = torch.arange(2**ends[-1])
    every = torch.stack([(strings >> (ends[-1] - e)) % 2**L for e in ends])
    start = None
    if tied:
        first = int(torch.randint(2**L, (1,), generator=torch.Generator().manual_seed(seed)))
        every = every[:, (strings >> (ends[-1] - L) == first) & (strings % 2**L == first)]
        if not every.shape[1]: return
        start = torch.full((8,), first)
    path = _viterbi(x, ts, widths, start)
    error = lambda p: sum((x[i, :, None] - ts[i][p[i]])**2 for i in range(n))
    assert torch.allclose(error(path[..., None])[:, 0], error(every[:, None]).min(1).values, atol=1e-5)
    for a, b, w in zip(path, path[1:], widths[1:]): assert torch.equal((a << w) % 2**L, b - b % 2**w)


@few
@given(st.lists(st.integers(0, 4), min_size=1, max_size=7).filter(lambda b: sum(b) <= 8), st.sampled_from(SIZES), st.booleans(), seeds)
def test_short_strings_are_optimal(bits, states, weighted, seed):
    trellis, u = Trellis(bits, states), randn(9, len(bits), seed=seed)
    weight = randn(len(bits), seed=seed).abs() + .01 if weighted else None
    every = torch.arange(256**trellis.nbytes, dtype=torch.uint8).view(-1, 1)[:, :trellis.nbytes]
    price = 1. if weight is None else weight
    best = cost(trellis, u[:, None], every, price).min(1).values
    assert torch.allclose(cost(trellis, u, trellis.encode(u, weight), price), best, rtol=1e-4)


def test_passes_come_close_to_the_best_circle():
    u, ds = randn(12, 48), []
    for passes in (2, 3, 5):
        trellis = Trellis([2]*48, 256, passes)
        ds.append(cost(trellis, u, trellis.encode(u)).mean().item())
    x, t = u.T.contiguous(), trellis.table[2]
    best = torch.stack([(x - t[_viterbi(x, [t]*48, [2]*48, torch.full((12,), s))]).square().sum(0) for s in range(256)]).min(0).values.mean().item()
    assert best - 1e-4 <= ds[2] <= ds[1] <= ds[0] < 1.1*best


@few
@given(widths_, st.integers(1, 100))
def test_the_circle_is_cut_where_it_is_cheap(bits, margin):
    ids, widths, before, after = _circle(bits, margin)
    spare = -sum(bits) % 8
    assert sorted(ids) == [i for i, b in enumerate(bits + [spare]) if b] and widths == [(bits + [spare])[i] for i in ids]
    full = sum(widths)
    if full:
        assert full % 8 == 0 and sum(widths[:after]) >= min(margin, full) and sum(widths[-before:]) >= min(margin, full)
        assert sum(widths[:after-1]) < margin and sum(widths[len(widths)-before+1:]) < margin


# weights and gain

@few
@given(st.lists(st.integers(1, 4), min_size=20, max_size=40), seeds)
def test_weights_move_the_error(bits, seed):
    trellis, u = Trellis(bits, 256), randn(60, len(bits), seed=seed)
    weight = 16. ** randn(len(bits), seed=seed)
    assert cost(trellis, u, trellis.encode(u, weight), weight).mean() < cost(trellis, u, trellis.encode(u), weight).mean()
    assert torch.equal(trellis.encode(u, weight), trellis.encode(u, weight * 2.**70))
    assert torch.equal(trellis.encode(u, torch.full((len(bits),), 3e-20)), trellis.encode(u))


def test_channels_without_weight_are_free():
    trellis, u, weight = Trellis([2]*32, 256), randn(40, 32), torch.ones(32)
    weight[::2] = 0
    half = (u - trellis.decode(trellis.encode(u, weight))).square().mean(0)
    assert half[1::2].mean() < distortion(lloyd_max(2)) / 2 < half[::2].mean()


@few
@given(st.integers(-20, 20), seeds)
def test_gain_is_a_factor_on_what_is_decoded(power, seed):
    trellis, u = Trellis([2]*24, 256), randn(2, 5, 24, seed=seed)
    gain = 2. ** (power + torch.arange(5.))
    packed = trellis.encode(u)
    assert torch.equal(trellis.encode(u * 2.**power, gain=2.**power), packed)
    assert torch.equal(trellis.encode(u * gain[:, None], gain=gain), packed)


# tables

@pytest.mark.parametrize('states', SIZES)
def test_tables_are_antisymmetric(states):
    t = tables(states)
    assert t.shape == (5, states) and t.dtype == torch.float32 and (t[0] == 0).all()
    for b in range(1, 5):
        assert torch.allclose(t[b], -t[b].flip(0), atol=2e-3)
        assert shannon(b) < trellis_distortion(b, states) < distortion(lloyd_max(b))
    assert trellis_distortion(0, states) == 1


@pytest.mark.parametrize('states, limits', [(256, (.285, .0785, .0215, .006)), (1024, (.279, .0735, .0198, .0055)), (4096, (.277, .0725, .0194, .0053))])
def test_distortion_is_what_is_stored_and_below_the_target(states, limits):
    for b, limit in zip((1, 2, 3, 4), limits):
        assert trellis_distortion(b, states) < limit
        trellis, u = Trellis([b]*128, states), randn(64, 128, seed=states + b)
        y = trellis.decode(trellis.encode(u))
        e = (u - y).square().mean(1)
        assert abs(e.mean() - trellis_distortion(b, states)) < 4*e.std() / 8
        assert abs((y * (u - y)).mean()) < .03  # entries are means of what they stand for


@pytest.mark.parametrize('bits, limit', [([4]*32 + [3]*32 + [2]*32 + [1]*32, 1.04), ([4]*8 + [2]*40 + [1]*40 + [0]*40, 1.04), ([1]*32 + [4]*32 + [2]*64, 1.06), ([4, 3, 2, 1]*32, 1.15)])
def test_mixed_widths_cost_little(bits, limit):
    trellis, u, b = Trellis(bits, 256), randn(100, 128), torch.tensor(bits)
    weight, D = 4.**b, torch.tensor([trellis_distortion(i, 256) for i in range(5)])[b]
    assert .9 < cost(trellis, u, trellis.encode(u, weight), weight).mean() / (weight * D).sum() < limit


def test_other_tables():
    t = randn(5, 128)
    trellis, packed = Trellis([4, 0, 1]*8, 128, table=t), randbytes(3, 5)
    assert torch.equal(trellis.decode(packed), torch.stack([by_strings(trellis, p) for p in packed]))
    for bad in (t[:4], t[:, :64]):
        with pytest.raises(ValueError, match='does not fit'): Trellis([1], 128, table=bad)
    with pytest.raises(ValueError, match='does not fit'): Trellis([1], 64, table=t[:, :64])


# bad input

@pytest.mark.parametrize('bits', [[5], [-1], [1.5], [2, None], ['2'], [True], torch.tensor([1., 2.5]), torch.tensor([9])])
def test_widths_outside_0_to_4_are_refused(bits):
    with pytest.raises(ValueError, match='from 0 to 4') as e: Trellis(bits)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('states', [0, 1, 255, 512, 2048, 8192, '1024', None, True, 1024.5])
def test_unknown_states_are_refused(states):
    for make in (lambda: Trellis([1], states), lambda: tables(states), lambda: trellis_distortion(1, states)):
        with pytest.raises(ValueError, match='use one of') as e: make()
        assert '\n' not in str(e.value)


def test_bad_vectors_are_refused():
    trellis, u = Trellis([2]*16, 256), randn(4, 16)
    for bad, why in ((u[:, :15], '16'), (u.long(), 'int64'), (torch.tensor(1.), '16'), (torch.where(u > 0, math.inf, u), 'of 4 vectors .* hold NaN or Inf')):
        with pytest.raises(ValueError, match=why) as e: trellis.encode(bad)
        assert '\n' not in str(e.value)
    for weight in (torch.ones(15), -torch.ones(16), torch.zeros(16), torch.full((16,), math.nan)):
        with pytest.raises(ValueError, match='weight'): trellis.encode(u, weight)
    for gain in (0., -1., math.nan, torch.tensor([1., 0., 1., 1.])):
        with pytest.raises(ValueError, match='gain'): trellis.encode(u, gain=gain)
    for packed in (randbytes(4, 5), randbytes(4, 4).int(), torch.tensor(1, dtype=torch.uint8)):
        with pytest.raises(ValueError, match='decode'): trellis.decode(packed)
    for call in (lambda: Trellis([]), lambda: Trellis([1], passes=1), lambda: trellis_distortion(5), lambda: trellis_distortion(True)):
        with pytest.raises(ValueError): call()


@few
@given(st.floats(1, 1e30), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seeds)
def test_far_out_values_saturate(size, dtype, seed):
    trellis, u = Trellis([3]*16, 256), randn(4, 16, seed=seed).to(dtype)
    u[0, 0] = min(size, torch.finfo(dtype).max)
    packed = trellis.encode(u)
    assert torch.equal(packed[1:], trellis.encode(u[1:]))
    if u[0, 0] > 8: assert trellis.decode(packed)[0, 0] > 1.3
