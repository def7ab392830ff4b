"A cache as plainly as it can be said, to compare NDCache with: lists of tokens, no counting backwards, nothing in place."
import copy

import torch
from transformers import LlamaConfig, LogitsProcessor
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from ndkv.cache import NDCache
from ndkv.methods import METHODS, Place, method
from ndkv.padding import NDHybridLayer, NDLayer, NDSlidingLayer
from ndkv.codec import NormDirectionCodec, unpack

CONFIG = LlamaConfig(vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                     max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=None)


class Absmax:
    "Coarse codes with a scale for `group` tokens of a channel, wrong when read at another position: a codec that needs all that the cache tells it."
    def __init__(self, group): self.group = group
    def gain(self, n, pos): return (1 + (torch.arange(n) + pos) % 7)[:, None]
    def encode(self, x, pos=0):
        x = (x * self.gain(x.shape[2], pos)).unflatten(2, (-1, self.group))
        scale = x.abs().amax(3, keepdim=True).clamp_min(1e-9) / 3
        return {"codes": (x / scale).round().to(torch.int8), "scale": scale}
    def decode(self, enc, pos=0, dtype=torch.float32):
        x = (enc["codes"] * enc["scale"]).flatten(2, 3)
        return (x / self.gain(x.shape[2], pos)).to(dtype)


@method("test-absmax")
def absmax(place, bits, group): return Absmax(group)


# --- what may be compared to the last bit, and what may not --------------------------------------------------------------------------
# A sum of float numbers depends on its order, and libraries choose the order by the processor and by the shapes of the operands. So the same
# computation may be compared bit for bit, and any other only within a tolerance; a choice (a code, a token, the order of a sort) that is made
# of such numbers may fall the other way at a tie and must not be compared at all, but what it was made of.

def in_float64(model):
    "The model in float64, its norms too, which `transformers` takes in float32: sums in other orders then differ by 1e-15."
    for module in list(model.modules()):
        for name, m in module.named_children():
            if type(m).__name__.endswith("RMSNorm") and hasattr(m, "variance_epsilon"): # as Llama's
                new = torch.nn.RMSNorm(len(m.weight), m.variance_epsilon)
                new.weight = m.weight
                setattr(module, name, new)
    return model.double().eval()


class Steady(NormDirectionCodec):
    "The rotation's codes, read by sums in float64 that are rounded to 2^-20 of the norm: the same to the last bit however a stream or a batch is cut."
    def decode(self, enc, pos=0, dtype=torch.float32):
        y = self.codebook.decode(unpack(enc["codes"], self.bits, self.d)).double() @ self.frame.A_inv.double().mT
        return ((y * 2**20).round() / 2**20 * enc["norm"].double()[..., None]).float().to(dtype)


@method("test-rotation")
def steady_rotation(place, bits):
    return Steady(place.head_dim, bits, frame=METHODS["rotation"](place, bits).frame)


class InPieces:
    "Any codec, a row and a group of tokens at a time: however a stream or a batch is cut, the same tokens are then the same computation."
    def __init__(self, codec): self.codec = codec
    def __getattr__(self, name): return getattr(self.__dict__["codec"], name) if "codec" in self.__dict__ else object.__getattribute__(self, name)

    def encode(self, x, pos=0):
        g = self.codec.group
        rows = [[self.codec.encode(row[:, :, i:i+g], pos + i) for i in range(0, x.shape[2], g)] for row in x.split(1)]
        return {name: torch.cat([torch.cat([p[name] for p in parts], 2) for parts in rows]) for name in rows[0][0]}

    def decode(self, enc, pos=0, dtype=torch.float32):
        (B, _, n), g = next(iter(enc.values())).shape[:3], self.codec.group
        piece = lambda b, i: self.codec.decode({name: t[b:b+1, :, i:i+1] for name, t in enc.items()}, pos + i*g, dtype)
        return torch.cat([torch.cat([piece(b, i) for i in range(n)], 2) for b in range(B)])


def other_codes(a, b):
    "Share of vectors that are read differently by more than rounding: where two codes err alike, rounding decides which is found."
    return ((a - b).norm(dim=-1) > 1e-3 * b.norm(dim=-1)).double().mean().item()


class Follow(LogitsProcessor):
    """Makes every choice of a first run again. In that run it notes the logits of each step; in the runs after `again()` the logits must agree
    with those up to `tol`, a share of their largest, and the noted ones are handed on, so that tokens, samples and beams are those of the first run.
    `flips` counts choices that the run's own logits would have made otherwise, at ties."""
    def __init__(self, tol=1e-3, heard=()): self.tol, self.heard, self.at, self.flips, self.worst = tol, list(heard), 0 if heard else None, 0, 0.

    def again(self):
        if self.at is not None: self.done()
        self.at = 0
        return self

    def done(self): assert self.at == len(self.heard), f"{self.at} steps after {len(self.heard)}"

    def __call__(self, ids, logits):
        if self.at is None:
            self.heard.append(logits.clone())
            return logits
        want = self.heard[self.at]
        seen = want.isfinite()
        assert torch.equal(seen, logits.isfinite())
        error = ((logits - want)[seen].abs().max() / want[seen].abs().max()).item()
        self.at, self.worst, self.flips = self.at + 1, max(self.worst, error), self.flips + int((logits.argmax(-1) != want.argmax(-1)).sum())
        assert error <= self.tol, f"step {self.at}: logits differ by {error:.1e} of their largest"
        return want.clone()


class PlainStore:
    "What a store should be: a list of `[x, packed?]`, one for each token ever seen and not cropped."
    def __init__(self, codec, window, sinks, block):
        self.codec, self.window, self.sinks, self.block, self.tokens = codec, window, sinks, block, []

    def flush(self, L):
        for start in range(self.sinks, L, self.block):
            if start + self.block > L - self.window or self.codec is None: break
            todo = [t for t in range(start, start + self.block) if not self.tokens[t][1]]
            if not todo: continue
            x = torch.stack([self.tokens[t][0] for t in todo], 2)
            x = self.codec.decode(self.codec.encode(x, todo[0]), todo[0], x.dtype)
            for i, t in enumerate(todo): self.tokens[t] = [x[:, :, i], True]

    def read(self): return [x for x, _ in self.tokens]

    def crop(self, n):
        self.tokens, g = self.tokens[:len(self.tokens) - n], getattr(self.codec, "group", 1)
        cut = self.sinks + (len(self.tokens) - self.sinks)//g*g
        for t in self.tokens[max(cut, 0):]: t[1] = False

    def apply(self, f): self.tokens = [[f(x), packed] for x, packed in self.tokens]


class PlainLayer:
    "Two stores, and what attention reads of them."
    recording = False # Assisted decoding waits with the end of a prompt

    def __init__(self, codecs, window, sinks, block, exact_new=True, sliding=10**6):
        self.stores = [PlainStore(c, window, sinks, block) for c in codecs]
        self.block, self.exact_new, self.sliding = block, exact_new, sliding

    def update(self, *new):
        L, q, out = len(self.stores[0].tokens), new[0].shape[2], []
        for s, x in zip(self.stores, new):
            s.flush(L)
            x = [[t, False] for t in x.unbind(2)]
            read = s.read() + [t for t, _ in x]
            s.tokens += x
            if q > self.block and not self.recording or not self.exact_new: s.flush(L + q)
            if not self.exact_new: read = s.read()
            out.append(torch.stack(read[L - min(L, self.sliding - 1):], 2))
        return out


class _InModel:
    """Plain layers where `transformers` expects a layer of a cache, one for each row of the batch, which is given that row's own tokens; the settings are
    copied from an `NDLayer`."""
    def __init__(self, mine):
        self.mine, self.rows, self.length, self.is_sliding = mine, [], 0, isinstance(mine, NDSlidingLayer) # rows: (plain layer, its columns)

    def _new_row(self, k, v):
        m = self.mine
        codecs = [b and METHODS[m.method](Place(m.layer, kind, x.shape[1], x.shape[-1], m.block, m.seed), b, **m.method_kw) for x, kind, b in zip((k, v), "kv", m.bits)]
        return PlainLayer(codecs, m.window, m.sinks, m.block, m.exact_new, getattr(m, "sliding_window", 10**6)), []

    def update(self, k, v, *args, told=None, **kwargs):
        B, q, first = len(k), k.shape[2], self.get_mask_sizes(k.shape[2])[1]
        if not self.rows: self.rows, self.is_initialized = [self._new_row(k, v) for _ in range(B)], True
        own = torch.ones(B, q, dtype=torch.bool) if told is None or told.own is None else told.own.expand(B, q)
        out = [x.new_zeros(*x.shape[:2], self.length - first + q, x.shape[3]) for x in (k, v)]
        for b, (plain, columns) in enumerate(self.rows):
            plain.recording, at = self.record_past, own[b].nonzero()[:, 0].tolist()
            if self.mine.exact_new:
                for o, x in zip(out, (k, v)): o[b, :, self.length - first:] = x[b]
            columns += [self.length + i for i in at]
            if not columns: continue
            got = plain.update(*(x[b:b+1, :, at] for x in (k, v)))
            for o, x in zip(out, got):
                for c, t in zip(reversed(columns), reversed(x[0].unbind(1))):
                    if c >= first: o[b, :, c - first] = t
        self.length += q
        return tuple(out)

    def _all(self, i):
        read = [plain.stores[i].read() for plain, _ in self.rows]
        like = next(x for r in read for x in r)
        out = like.new_zeros(len(self.rows), like.shape[1], self.length, like.shape[2])
        for b, (r, (_, columns)) in enumerate(zip(read, self.rows)):
            for c, t in zip(columns, r): out[b, :, c] = t
        return out

    keys = property(lambda self: self._all(0), lambda self, x: None)
    values = property(lambda self: self._all(1), lambda self, x: None)
    def lazy_initialization(self, *args, **kwargs): pass
    def activate_past_recording(self): self.record_past = True
    def get_seq_length(self): return self.length
    def get_max_length(self): return -1

    def get_mask_sizes(self, q):
        first = max(self.length - getattr(self.mine, "sliding_window", 10**6) + 1, 0)
        return self.length - first + q, first

    def crop(self, n):
        self.length += int(n)
        for plain, columns in self.rows:
            gone = sum(c >= self.length for c in columns)
            for s in plain.stores: s.crop(gone)
            del columns[len(columns) - gone:]

    def choose(self, rows): self.rows = [copy.deepcopy(self.rows[i]) for i in rows]
    def reorder_cache(self, beams): self.choose(beams.tolist())
    def batch_repeat_interleave(self, n): self.choose([b for b in range(len(self.rows)) for _ in range(n)])
    def batch_select_indices(self, i): self.choose(torch.arange(len(self.rows))[torch.as_tensor(i)].tolist())


class InModel(_InModel, DynamicLayer):
    is_croppable = True
    def __init__(self, mine):
        DynamicLayer.__init__(self)
        self.record_past = False
        _InModel.__init__(self, mine)


class InHybrid(_InModel, LinearAttentionAndFullAttentionLayer):
    def __init__(self, mine):
        LinearAttentionAndFullAttentionLayer.__init__(self, number_of_states=mine.number_of_states)
        _InModel.__init__(self, mine)

    def lazy_initialization(self, *args, **kwargs):
        if not args: LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reorder_cache(self, beams):
        LinearAttentionLayer.reorder_cache(self, beams)
        _InModel.reorder_cache(self, beams)


def plain(cache):
    "`cache`, an empty NDCache, with its layers replaced by plain ones that do the same."
    swap = lambda layer: InHybrid(layer) if isinstance(layer, NDHybridLayer) else InModel(layer) if isinstance(layer, NDLayer) else layer
    cache.layers = [swap(layer) for layer in cache.layers]
    assert isinstance(cache, NDCache) and not cache._mine
    return cache
