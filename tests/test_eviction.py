"Caches that drop: policies against loops (and kvpress, where it is installed), the layer against plain lists of tokens on random operations."
import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from hypothesis import given, settings, strategies as st

from reference import CONFIG, Absmax  # registers "test-absmax"
from ndkv.cache import NDCache, NDLayer
from ndkv.eviction import POLICIES, DropCell, EvictingCache, EvictingLayer, KeyNorm, SnapKV, observed
from ndkv.store import fork, load_cache, save_cache

D, H, G = 8, 2, 2


class First:
    "Score by the first channel of the key: no ties, no arithmetic."
    queries = 0
    def score(self, keys, values, positions, queries): return keys[..., 0]


POLICY = dict(POLICIES, first=First(), snapkv=SnapKV(3, 3))


def layer(policy="first", keep=.5, **kw): return EvictingLayer(POLICY[policy], keep, 0, (3, 3), "test-absmax", group=1, **dict(dict(window=6, sinks=2, block=4), **kw))


def feed(a, x, q=None):
    "One call, and then, as `observed` would, its queries."
    out = a.update(*x)
    if a.policy.queries: a.see(q, 1.)
    return out


def stored(a): return [t for s in a.stores for _, t in sorted(s.tensors.items())] + [torch.tensor([a.get_seq_length(), a.stores[0].packed.n])] + ([] if a.queries is None else [a.queries])


def same_bits(a, b): return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b))


# --- policies ------------------------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(n=st.integers(8, 40), w=st.integers(1, 6), seed=st.integers(0, 99))
def test_attention_policies_by_loops(n, w, seed):
    "Votes of the last queries, one softmax at a time."
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, G*H, w, D, generator=g, dtype=torch.float64), torch.randn(2, H, n, D, generator=g, dtype=torch.float64)
    votes = torch.zeros(2, H, n, dtype=torch.float64)
    for b in range(2):
        for h in range(G*H):
            for i in range(w):
                seen = n - w + i + 1
                votes[b, h // G, :seen] += (k[b, h // G, :seen] @ q[b, h, i]).softmax(0) / (w * G)
    smooth = torch.stack([votes[..., max(0, i-2):i+3].sum(-1) / 5 for i in range(n)], -1)
    assert torch.allclose(SnapKV(w, 5).score(k, k, None, q), smooth, atol=1e-12)
    if w == 1: assert torch.allclose(POLICIES["tova"].score(k, k, None, q), votes.mean(1, keepdim=True).expand_as(votes), atol=1e-12)
    assert torch.equal(KeyNorm().score(k, k, None, None).argmin(-1), k.square().sum(-1).argmax(-1))
    unit = k / k.square().sum(-1, keepdim=True).sqrt()
    like = (unit * unit.sum(2, keepdim=True)).sum(-1)            # cosine with the mean, times what all keys of a head share
    assert torch.equal(POLICIES["keydiff"].score(k, k, None, None).argsort(-1), (-like).argsort(-1))


def test_as_kvpress():
    "The presses of kvpress order tokens as our policies do."
    presses = pytest.importorskip("kvpress")
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(1, G*H, 40, D, generator=g), torch.randn(1, H, 40, D, generator=g), torch.randn(1, H, 40, D, generator=g)
    module = SimpleNamespace(config=SimpleNamespace(num_attention_heads=G*H, num_key_value_heads=H), head_dim=D)
    mask = torch.ones(40, 40).tril().bool()
    weights = (q @ k.repeat_interleave(G, 1).mT).masked_fill(~mask, -torch.inf).softmax(-1)
    press = lambda p: p.score(module, torch.zeros(1, 40, 4), k, v, weights, {})
    assert torch.allclose(press(presses.KnormPress()), POLICIES["keynorm"].score(k, v, None, None))
    assert torch.allclose(press(presses.KeyDiffPress()), POLICIES["keydiff"].score(k, v, None, None), atol=1e-6)
    assert torch.allclose(press(presses.TOVAPress())[..., :-1], POLICIES["tova"].score(k, v, None, q[:, :, -1:])[..., :-1], atol=1e-6)
    theirs, ours = press(presses.SnapKVPress(window_size=8, kernel_size=5))[..., :-8], SnapKV(8, 5).score(k, v, None, q[:, :, -8:])[..., :-8]
    assert torch.allclose(theirs[..., :-2], ours[..., :-2], atol=1e-6)  # theirs smooths without the window, ours with it


# --- the layer against lists of tokens -------------------------------------------------------------------------------------------------

class PlainEvicting:
    "For every row and head a list of (position, key, value, packed?), and what should happen to it."
    def __init__(self, B, keep, window, sinks, block):
        self.rows = {(b, h): [] for b in range(B) for h in range(H)}
        self.keep, self.window, self.sinks, self.block, self.L, self.covered = keep, window, sinks, block, 0, 0

    def flush(self, L):
        "Pack the blocks that end at or before L - window, all of them, then keep the best."
        end = self.sinks + max((L - self.window - self.sinks)//self.block*self.block, self.covered)
        if end == self.sinks + self.covered: return
        start, self.covered = self.sinks + self.covered, end - self.sinks
        room = min(self.covered, self.keep) if isinstance(self.keep, int) else int(self.keep * self.covered)
        for at, tokens in self.rows.items():
            tokens = [self.packed(*t) if start <= t[0] < end else t for t in tokens]
            best = sorted((t for t in tokens if t[3]), key=lambda t: -t[1][0].item())[:room]
            self.rows[at] = [t for t in tokens if not t[3] or any(t is b for b in best)]

    def packed(self, pos, k, v, _):
        code = lambda x: Absmax(1).decode(Absmax(1).encode(x.view(1, 1, 1, -1), pos), pos)[0, 0, 0]
        return pos, code(k), code(v), True

    def update(self, k, v):
        q = k.shape[2]
        self.flush(self.L)
        for (b, h), tokens in self.rows.items(): tokens += [(self.L + i, k[b, h, i], v[b, h, i], False) for i in range(q)]
        out = tuple(torch.stack([torch.stack([torch.stack([t[j] for t in self.rows[b, h]]) for h in range(H)]) for b in range(len(k))]) for j in (1, 2))
        self.L += q
        if q > self.block: self.flush(self.L)
        return out

    def crop(self, n):
        self.L -= n
        self.rows = {at: [t for t in tokens if t[0] < self.L] for at, tokens in self.rows.items()}

    def reorder(self, beams): self.rows = {(b, h): list(self.rows[beam, h]) for b, beam in enumerate(beams) for h in range(H)}


STEPS = st.lists(st.one_of(st.tuples(st.just("update"), st.integers(1, 20)), st.tuples(st.just("crop"), st.integers(0, 12)), st.tuples(st.just("reorder"), st.permutations([0, 1])),
                           st.tuples(st.just("copy"), st.sampled_from(["deepcopy", "pickle"]))), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(steps=STEPS, keep=st.sampled_from([0., .3, .5, 1., 5]), window=st.integers(0, 10), sinks=st.integers(0, 4), block=st.sampled_from([4, 8, 12]), memo=st.booleans())
def test_any_order(steps, keep, window, sinks, block, memo):
    "Any order of updates, crops, reorderings and copies reads what lists of tokens say, and the masks' sizes are what is read."
    a, plain, g = layer(keep=keep, window=window, sinks=sinks, block=block, memo=memo), PlainEvicting(2, keep, window, sinks, block), torch.Generator().manual_seed(0)
    for name, n in steps:
        if name == "update":
            x, size = torch.randn(2, 2, H, n, D, generator=g), a.get_mask_sizes(n)
            got, expected = a.update(*x), plain.update(*x)
            assert all(torch.equal(o, e) for o, e in zip(got, expected))
            assert size == (got[0].shape[2], plain.L - got[0].shape[2])
            assert a.positions[0, 0].tolist() == [t[0] for t in plain.rows[0, 0]]
        elif name == "crop":
            n = min(n, plain.L)
            if plain.covered and plain.L - n < sinks + plain.covered:
                before = stored(a)
                with pytest.raises(RuntimeError, match="dropped"): a.crop(-n)
                assert same_bits(before, stored(a))
            else: a.crop(-n), plain.crop(n)
        elif name == "reorder" and a.stores: a.reorder_cache(torch.tensor(n)), plain.reorder(n)
        elif name == "copy": a = copy.deepcopy(a) if n == "deepcopy" else pickle.loads(pickle.dumps(a))


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=8), policy=st.sampled_from(sorted(POLICY)), keep=st.sampled_from([.25, .5, 6]), memo=st.booleans())
def test_a_row_is_alone(sizes, policy, keep, memo):
    "A row of a batch reads and stores what it does in a batch of one; in float64, where no two scores are equal up to rounding."
    both, alone, g = layer(policy, keep, memo=memo), [layer(policy, keep, memo=memo) for _ in range(3)], torch.Generator().manual_seed(0)
    for n in sizes:
        x, q = torch.randn(2, 3, H, n, D, generator=g).double(), torch.randn(3, G*H, n, D, generator=g).double()
        out = feed(both, x, q)
        for row, a in enumerate(alone):
            one = feed(a, x[:, row:row+1], q[row:row+1])
            assert all(torch.allclose(o[row:row+1], p, atol=1e-6) for o, p in zip(out, one))
            assert torch.equal(both.positions[row:row+1], a.positions)


@settings(max_examples=60, deadline=None)
@given(before=st.lists(st.integers(1, 20), min_size=1, max_size=4), proposals=st.lists(st.integers(1, 12), min_size=1, max_size=4), kept=st.integers(1, 3), policy=st.sampled_from(sorted(POLICY)))
def test_crop_leaves_no_trace(before, proposals, kept, policy):
    "Proposals that are taken back are as if they had never come: bytes, queries, what is read next."
    a, b, g = layer(policy, block=12), layer(policy, block=12), torch.Generator().manual_seed(0)
    draw = lambda n: (torch.randn(2, 2, H, n, D, generator=g).double(), torch.randn(2, G*H, n, D, generator=g).double())
    for x in (a, b): x.activate_past_recording()
    for n in before:
        x, q = draw(n)
        for e in (a, b): feed(e, x, q)
    for n in proposals:
        x, q = draw(n + kept)
        feed(a, x, q), a.crop(-n)
        feed(b, x[:, :, :, :kept], q[:, :, :kept]), b.crop(0)
    for _ in range(2):
        x, q = draw(1)
        assert same_bits(feed(a, x, q), feed(b, x, q))
    assert same_bits(stored(a)[:-1], stored(b)[:-1])


def test_nothing_is_encoded_twice():
    log = []

    class Spy(Absmax):
        def encode(self, x, pos=0):
            log.extend(range(pos, pos + x.shape[2]))
            return super().encode(x, pos)
    a = layer("first")
    a._codec = lambda x, kind, bits: Spy(1)
    for _ in range(60): a.update(*torch.randn(2, 1, H, 1, D))
    assert sorted(log) == sorted(2 * list(range(2, 2 + (59 - 6 - 2)//4*4)))


# --- the cache in a model -----------------------------------------------------------------------------------------------------------------

KW = dict(method="test-rotation", window=16, sinks=4, block=8)
PROMPT = torch.randint(1, 61, (2, 70), generator=torch.Generator().manual_seed(0))


def generate(model, cache, ids=PROMPT, **kw):
    with observed(model): return model.generate(ids, do_sample=False, max_new_tokens=20, past_key_values=cache, **kw)


@pytest.mark.parametrize("policy", POLICIES)
def test_keeping_all_is_dropping_none(model, policy):
    assert torch.equal(generate(model, EvictingCache(CONFIG, 4, policy=policy, keep=1., **KW)), generate(model, NDCache(CONFIG, 4, **KW)))


@pytest.mark.parametrize("policy", POLICIES)
def test_generation(model, policy):
    "Batch, one by one, and with proposals taken back; half of the tokens held and counted."
    make = lambda **kw: EvictingCache(CONFIG, 4, policy=policy, keep=.5, **KW, **kw)
    cache = make()
    out = generate(model, cache)
    assert torch.equal(out, generate(model, make(memo=True)))
    for row in range(2): assert torch.equal(generate(model, make(), PROMPT[row:row+1]), out[row:row+1])
    r = cache.report()
    packed = cache.layers[0].stores[0].packed
    assert packed.n == r["packed_tokens"] == 64 and packed.held == 32 and cache.get_seq_length() == 89
    codes, index, queries = 32 * 2*2 * 2*2 * (8 + 2), 2 * 2*2 * 8, sum(l.queries.nbytes for l in cache.layers if l.queries is not None)
    assert cache.nbytes == codes + index + queries + 2*2*2*2 * (4 + 21) * 16 * 8
    assert r["bits_packed"] == pytest.approx(8 * (codes + index + queries) / (2*2*2*2 * 64 * 16))


@pytest.mark.parametrize("policy", ["keydiff", "snapkv"])
@pytest.mark.parametrize("memo", [False, True])
def test_saved_and_loaded(model, policy, memo, tmp_path):
    "A file brings back every byte, the map and the queries, and refuses another policy or a map that is not the entries'."
    make = lambda policy=policy, keep=.5: EvictingCache(CONFIG, 4, policy=policy, keep=keep, memo=memo, **KW)
    a = make()
    with torch.no_grad(), observed(model):
        for x, y in a.chunks(70): model(PROMPT[:, x:y], past_key_values=a)
        path = save_cache(a, tmp_path / "a.safetensors", model)
        b, c = load_cache(path, make(), model), fork(a)
        for other in (b, c): assert all(same_bits(stored(x), stored(y)) for x, y in zip(a.layers, other.layers))
        assert b.nbytes == a.nbytes
        more = [torch.cat([model(PROMPT[:, i:i+1], past_key_values=e).logits for i in range(30)], 1) for e in (a, b, c)]
    assert torch.allclose(more[0], more[1], atol=1e-9) and torch.allclose(more[0], more[2], atol=1e-9)
    with pytest.raises(ValueError, match="policy"): load_cache(path, make("recent"), model)
    with pytest.raises(ValueError, match="keep"): load_cache(path, make(keep=.25), model)
    (k, v), x = (s.packed for s in a.layers[0].stores), a.layers[0].stores[0].window
    assert k.covers(k.entries, x, k.n) == v.covers(v.entries, x, k.n) == k.n
    wrong = [k.entries | {"map": k.entries["map"] ^ 1}, k.entries | {"map": k.entries["map"][..., 1:]}, {"map": k.entries["map"]}, {n: t for n, t in k.entries.items() if n != "map"}]
    assert [k.covers(e, x, k.n) for e in wrong] == [-1] * 4 and v.covers({n: t[:, :, 1:] for n, t in v.entries.items()}, x, k.n) == -1


@pytest.mark.parametrize("bad, says", [
    (dict(policy="h2o"), "choose one of"), (dict(keep=1.5), "share"), (dict(keep=-1), "share"), (dict(keep=True), "share"), (dict(exact_new=False), "exact_new"), (dict(offload=True), "offload"),
    (dict(config=tf.MistralConfig(vocab_size=61, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=24)), "nothing to drop")])
def test_refused(bad, says):
    with pytest.raises(ValueError, match=says) as e: EvictingCache(**(dict(config=CONFIG) | bad))
    assert "\n" not in str(e.value)


def test_late_refusals(model):
    blind = EvictingCache(CONFIG, policy="tova", **KW)
    with torch.no_grad(), pytest.raises(ValueError, match="observed"):
        for a, b in blind.chunks(70): model(PROMPT[:, a:b], past_key_values=blind)
    with pytest.raises(ValueError, match="entry among 4 tokens"): NDLayer.update(EvictingLayer(POLICY["first"], .5, 0, (3, 3), "test-absmax", group=4, block=4), *torch.randn(2, 1, H, 3, D))
    cell = DropCell("exact", None, None, policy="recent", keep=.25)
    assert not cell.exact and isinstance(cell.cache(CONFIG), EvictingCache) and "bf16" in str(cell)
