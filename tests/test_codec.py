"Property tests of frames, codebooks, packing and the norm-direction codec, and their answers to bad input."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from ndkv.codebooks import Codebook, distortion, lloyd_max, shannon, uniform
from ndkv.codec import NormDirectionCodec, pack, packed_size, unit_rms, unpack
from ndkv.frames import Frame, apply_rope, hadamard, head_rows, rope_tables, rotation, undo_rope

few = settings(max_examples=30, deadline=None, derandomize=True)

bits_ = st.integers(1, 8)
even = st.integers(1, 80).map(lambda n: 2*n)
seeds = st.integers(0, 10**6)
HEAD_DIMS = 64, 80, 96, 112, 128, 192, 256, 576
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def full_frame(d, heads, seed):
    "A frame with a head axis, a mean and a scale."
    A = torch.linalg.qr(randn(heads, d, d, seed=seed)).Q * 2
    return Frame(A, A.mT / 4, mean=randn(heads, d, seed=seed + 1), scale=randn(heads, d, seed=seed + 2).abs() + .1)


# frames

@few
@given(even, seeds)
def test_rotation_keeps_inner_products(d, seed):
    f, x, y = rotation(d, seed), randn(5, d, seed=seed), randn(5, d, seed=seed + 1)
    assert f.is_orthogonal()
    assert torch.allclose((f.forward(x) * f.forward(y)).sum(-1), (x * y).sum(-1), atol=1e-4)
    assert torch.allclose(f.inverse(f.forward(x)), x, atol=1e-5)


@pytest.mark.parametrize('d', [-2, 0, 1, 3, 81, 127])
def test_odd_head_dim_is_refused(d):
    with pytest.raises(ValueError, match='even head_dim'): rotation(d)
    with pytest.raises(ValueError, match='even head_dim'): NormDirectionCodec(d)


def test_rotation_depends_on_the_seed_only():
    assert torch.equal(rotation(80, 3).A, rotation(80, 3).A)
    assert not torch.equal(rotation(80, 3).A, rotation(80, 4).A)
    assert torch.equal(hadamard(64), hadamard(64).T)


@few
@given(st.integers(1, 32), st.integers(0, 32), st.integers(0, 100_000), st.floats(.5, 2), seeds)
def test_rope_is_undone(pairs, rest, start, scaling, seed):
    x = randn(2, 3, 7, 2*pairs + rest, seed=seed)
    cos, sin = rope_tables(1e4 ** (-torch.arange(pairs) / pairs), torch.arange(start, start + 7), scaling)
    y = apply_rope(x, cos, sin)
    assert torch.allclose(undo_rope(y, cos, sin), x, atol=1e-5)
    assert torch.allclose(y[..., :2*pairs].norm(dim=-1), x[..., :2*pairs].norm(dim=-1) * scaling, rtol=1e-4)
    assert torch.equal(y[..., 2*pairs:], x[..., 2*pairs:])


# codebooks

@few
@given(bits_, seeds)
def test_nearest_level(bits, seed):
    for book in (lloyd_max(bits), uniform(bits)):
        u = randn(200, seed=seed) * 2
        best = (u[:, None].double() - book.levels.double()).abs().min(-1).values
        assert torch.allclose((u.double() - book.decode(book.encode(u)).double()).abs(), best, atol=1e-6)
        assert torch.equal(book.decode(torch.arange(2**bits)), book.levels)


@few
@given(bits_, seeds)
def test_lloyd_max_is_a_minimum(bits, seed):
    book = lloyd_max(bits)
    moved = (book.levels + randn(2**bits, seed=seed) * .05 * 2.**-bits).sort().values
    assert distortion(Codebook(moved)) > distortion(book) - 1e-9
    assert shannon(bits) < distortion(book) < distortion(lloyd_max(bits - 1) if bits > 1 else Codebook(torch.tensor([-9., 9.])))


@pytest.mark.parametrize('bits', [0, 9, -1, 2.5, '4', None, True])
def test_bits_outside_1_to_8_are_refused(bits):
    for make in (lloyd_max, uniform, lambda b: NormDirectionCodec(64, b), lambda b: packed_size(64, b),
                 lambda b: pack(torch.zeros(8, dtype=torch.uint8), b), lambda b: unpack(torch.zeros(8, dtype=torch.uint8), b, 8)):
        with pytest.raises(ValueError, match='from 1 to 8') as e: make(bits)
        assert '\n' not in str(e.value)


# packing

def pack_by_strings(codes, bits):
    "The layout from its definition, with strings of bits."
    codes = codes + [0] * (-len(codes) % 8)
    strings, out = [format(c, f'0{bits}b') for c in codes], []
    while strings[0]:
        c = 1 << (len(strings[0]).bit_length() - 1)
        heads, strings, n = [s[:c] for s in strings], [s[c:] for s in strings], len(codes)*c // 8
        out += [int(''.join(reversed(heads[j::n])), 2) for j in range(n)]
    return out


@few
@given(bits_, st.integers(1, 200), st.lists(st.integers(0, 3), max_size=2), seeds)
def test_pack_round_trip(bits, d, lead, seed):
    codes = torch.randint(2**bits, (*lead, d), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (*lead, packed_size(d, bits))
    assert torch.equal(unpack(packed, bits, d), codes)
    assert packed.nbytes == codes.numel() // d * math.ceil(d / 8) * bits
    for one, bytes_ in zip(codes.view(-1, d), packed.view(-1, packed_size(d, bits))):
        assert bytes_.tolist() == pack_by_strings(one.tolist(), bits)


@few
@given(bits_, st.integers(1, 20), seeds)
def test_every_byte_string_is_a_code(bits, eighths, seed):
    packed = torch.randint(256, (3, eighths*bits), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(pack(unpack(packed, bits, 8*eighths), bits), packed)


def test_pack_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match='below 8'): pack(torch.tensor([8], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match='uint8'): pack(torch.tensor([1]), 3)
    with pytest.raises(ValueError, match='which has 24'): unpack(torch.zeros(2, 25, dtype=torch.uint8), 3, 64)
    with pytest.raises(ValueError, match='uint8'): unpack(torch.zeros(2, 24), 3, 64)


# codec

@few
@given(even, bits_, st.sampled_from(['lloyd_max', 'uniform']), st.sampled_from(['ls', 'plain']), st.booleans(), seeds)
def test_decode_is_levels_through_the_frame(d, bits, book, norm, full, seed):
    frame = full_frame(d, 3, seed) if full else None
    codec = NormDirectionCodec(d, bits, frame, book, norm)
    enc = codec.encode(randn(2, 3, 5, d, seed=seed) * 3)
    levels = codec.codebook.decode(unpack(enc['codes'], bits, d))
    if full: levels = levels * head_rows(frame.scale)
    want = codec.frame.inverse(levels * enc['norm'].float()[..., None])
    assert torch.allclose(codec.decode(enc), want, atol=2e-5 * want.abs().max().item())
    assert codec.bits_per_element == 8 * sum(v.nbytes for v in enc.values()) / (30 * d)


@few
@given(even, bits_, dtypes, st.booleans(), seeds, st.data())
def test_a_slice_is_coded_as_in_the_whole(d, bits, dtype, full, seed, data):
    codec = NormDirectionCodec(d, bits, full_frame(d, 3, seed) if full else None)
    x = randn(2, 3, 67, d, seed=seed).to(dtype)
    whole = codec.encode(x)
    a = data.draw(st.integers(0, 66)); b = data.draw(st.integers(a + 1, 67)); step = data.draw(st.integers(1, 5))
    assert same({k: v[:, :, a:b:step] for k, v in whole.items()}, codec.encode(x[:, :, a:b:step]))
    assert same({k: v[1:] for k, v in whole.items()}, codec.encode(x[1:]))
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert same(whole, codec.encode(strided))


def test_threads_do_not_change_the_bytes():
    codec, x, threads = NormDirectionCodec(128, 3), randn(1, 4, 2000, 128), torch.get_num_threads()
    try:
        torch.set_num_threads(1); one = codec.encode(x)
        torch.set_num_threads(2); two = codec.encode(x)
    finally: torch.set_num_threads(threads)
    assert same(one, two)


@few
@given(even, bits_, st.sampled_from(['lloyd_max', 'uniform']), st.booleans(), seeds)
def test_least_squares_norm_is_never_worse(d, bits, book, full, seed):
    frame = full_frame(d, 3, seed) if full else None
    ls, plain = (NormDirectionCodec(d, bits, frame, book, norm) for norm in ('ls', 'plain'))
    x = randn(1, 3, 20, d, seed=seed)
    assert torch.equal(ls.encode(x)['codes'], plain.encode(x)['codes'])
    y = ls.frame.forward(x).double()
    error = lambda c: (c.frame.forward(c.decode(c.encode(x))) - y).square().sum(-1)
    assert (error(ls) <= error(plain) + 1e-6 * y.square().sum(-1)).all()


@few
@given(even, bits_, st.integers(-60, 60), seeds)
def test_powers_of_two_move_the_norm_only(d, bits, power, seed):
    codec, x = NormDirectionCodec(d, bits), randn(6, d, seed=seed)
    a, b = codec.encode(x), codec.encode(x * 2.**power)
    assert torch.equal(a['codes'], b['codes'])
    assert torch.equal(a['norm'].double() * 2.**power, b['norm'].double())


@few
@given(even, bits_, dtypes, seeds)
def test_zero_vectors_are_exact_and_harmless(d, bits, dtype, seed):
    codec, x = NormDirectionCodec(d, bits), randn(4, d, seed=seed).to(dtype)
    with_zero = torch.cat([x[:2], x.new_zeros(1, d), x[2:]])
    enc = codec.encode(with_zero)
    assert (codec.decode(enc, dtype=dtype)[2] == 0).all()
    assert same({k: v[[0, 1, 3, 4]] for k, v in enc.items()}, codec.encode(x))


@few
@given(even, bits_, dtypes, st.sampled_from([math.nan, math.inf, -math.inf]), st.sampled_from(['ls', 'plain']), seeds, st.data())
def test_nan_and_inf_are_refused(d, bits, dtype, value, norm, seed, data):
    x = randn(2, 3, 4, d, seed=seed).to(dtype)
    x[data.draw(st.integers(0, 1)), data.draw(st.integers(0, 2)), data.draw(st.integers(0, 3)), data.draw(st.integers(0, d - 1))] = value
    with pytest.raises(ValueError, match='1 of 24 vectors .* hold NaN or Inf; mend') as e: NormDirectionCodec(d, bits, norm=norm).encode(x)
    assert '\n' not in str(e.value)


def test_limits_of_the_number_formats():
    codec = NormDirectionCodec(128, 4)
    top = torch.full((2, 128), 65504., dtype=torch.float16) * torch.tensor([1, -1], dtype=torch.float16)[:, None]
    assert torch.isfinite(codec.decode(codec.encode(top), dtype=torch.float16)).all()
    assert torch.isfinite(codec.decode(codec.encode(top.float() * 1e33))).all()
    with pytest.raises(ValueError, match='too large for a float32 norm'): codec.encode(torch.full((1, 128), 3.4e38))
    tiny = codec.decode(codec.encode(torch.full((1, 128), 2.**-24, dtype=torch.float16)))
    assert torch.allclose(tiny, torch.full((1, 128), 2.**-24), rtol=.5)


def test_unit_rms_of_numbers_whose_squares_overflow():
    u, rms = unit_rms(randn(3, 64) * 1e30)
    assert torch.isfinite(u).all() and torch.allclose(u.square().mean(-1), torch.ones(3)) and (rms > 1e29).all()


@pytest.mark.parametrize('d', HEAD_DIMS)
def test_measured_distortion(d):
    x = randn(1000, d, seed=d)
    for bits in range(1, 9):
        codec = NormDirectionCodec(d, bits)
        error = ((codec.decode(codec.encode(x)) - x).square().sum() / x.square().sum()).item()
        assert .9 < error / distortion(lloyd_max(bits)), (d, bits, error)
        assert error < 1.01*distortion(lloyd_max(bits)) + 2**-16 / 3, (d, bits, error)  # the norm's rounding, at its worst just above a power of two


@pytest.mark.parametrize('shape', [(64,), (0, 64), (3, 64), (2, 3, 64), (2, 2, 5, 64), (1, 2, 3, 0, 64), (2, 1, 2, 1, 3, 64)])
def test_any_leading_shape(shape):
    codec, x = NormDirectionCodec(64, 3), randn(*shape)
    enc = codec.encode(x)
    assert enc['norm'].shape == shape[:-1] and enc['codes'].shape == (*shape[:-1], 24) and codec.decode(enc).shape == shape


@pytest.mark.parametrize('make, says', [
    (lambda: NormDirectionCodec(64).encode(torch.randn(2, 65)), 'does not end in head_dim 64'),
    (lambda: NormDirectionCodec(64).encode(torch.tensor(1.)), 'does not end in head_dim 64'),
    (lambda: NormDirectionCodec(64).encode(torch.ones(2, 64, dtype=torch.int8)), 'give float32, bfloat16 or float16'),
    (lambda: NormDirectionCodec(8, frame=full_frame(8, 3, 0)).encode(torch.randn(1, 2, 5, 8)), "the frame's 3 heads"),
    (lambda: NormDirectionCodec(64, frame=rotation(128)), 'make a frame of 64'),
    (lambda: NormDirectionCodec(64, codebook='nf4'), "choose one of"),
    (lambda: NormDirectionCodec(64, norm='l2'), "choose 'ls' or 'plain'"),
    (lambda: NormDirectionCodec(64, 4).decode(NormDirectionCodec(64, 3).encode(torch.randn(2, 64))), 'use the codec that encoded them'),
    (lambda: Codebook(torch.tensor([1., 0.])), 'in ascending order'),
    (lambda: Codebook(torch.arange(3.)), 'in ascending order'),
    (lambda: Frame(torch.eye(4), torch.eye(3)), 'square matrix and its inverse'),
    (lambda: Frame(torch.eye(4), torch.eye(4), scale=torch.ones(3)), 'one number a channel'),
])
def test_bad_input_gets_one_helpful_line(make, says):
    with pytest.raises(ValueError) as e: make()
    assert says in str(e.value) and '\n' not in str(e.value)


def test_tables_made_in_inference_mode_serve_training_code():
    codec, x = NormDirectionCodec(64, 5), randn(3, 64)
    with torch.inference_mode(): codec.decode(codec.encode(x))
    w = torch.ones(64, requires_grad=True)
    (codec.decode(codec.encode(x * w)) * w).sum().backward()
    assert torch.isfinite(w.grad).all()
