"One pass over a text: gradients by tiles against a doubled past, layers computed twice, interruptions."
import pytest
import torch

from ndkv.fisher import _Reader, _split_mask, calibrate, packed_mask
from ndkv.probe import draw, hooked
from ndkv.profile import MATRICES, MEANS, collect
from test_architectures import FAMILIES, load

SMALL = dict(window=8, sinks=2, block=8)
WITHOUT = "BART", "T5", "Falcon", "BLOOM" # encoder-decoders, and models without the attention interface, which are refused
READ = [f for f in FAMILIES if f not in WITHOUT]


def close(a, b, rtol=1e-3): torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item() + 1e-9)


def by_definition(model, ids, u):
    "layer -> gradients of keys and values by attention over a doubled past; of layers that share them, of each apart."
    leaves, packed = {}, packed_mask(ids.shape[1], **SMALL)
    def doubled(run, module, q, k, v, mask, **kw):
        leaves[module.layer_idx] = dk, dv = torch.zeros_like(k, requires_grad=True), torch.zeros_like(v, requires_grad=True)
        kw = {n: torch.cat([x, x], -1) if torch.is_tensor(x) and x.shape[-2:] == packed.shape else x for n, x in kw.items()}
        return run(module, q, torch.cat([k, k + dk], 2), torch.cat([v, v + dv], 2), _split_mask(mask, packed, q), **kw)
    logp = hooked(model, doubled)(input_ids=ids, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
    chosen = logp.gather(1, draw(logp.detach(), u.flatten())[0][:, None])
    grads = torch.autograd.grad(chosen.sum(), [x for pair in leaves.values() for x in pair], allow_unused=True)
    return dict(zip(leaves, zip(grads[::2], grads[1::2])))


@pytest.mark.parametrize("family", READ)
def test_tiles_have_the_gradients_of_the_definition(family, tmp_path, monkeypatch):
    "Of every family, with layers kept and computed twice."
    model, ids = load(family, tmp_path), torch.randint(2, 58, (2, 60), generator=torch.Generator().manual_seed(0))
    u = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(torch.Tensor, "is_set_to", lambda self, other: False) # each reading apart
    want = by_definition(model, ids, u)
    assert want
    for twice in (False, True):
        found, _, _ = _Reader(model, packed_mask(ids.shape[1], **SMALL), twice=twice)(ids, u)
        assert found.keys() == want.keys()
        for i in want:
            for a, b in zip(found[i], want[i]): close(a, torch.zeros_like(a) if b is None else b)


def text(n=6, length=64, seed=0): return torch.randint(3, 58, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["Qwen2", "Gemma 3", "gpt-oss", "Gemma 3n", "Zamba", "Falcon-H1"])
def test_one_pass_has_the_statistics_of_collect(family, tmp_path):
    model = load(family, tmp_path)
    both, alone = calibrate(model, text(), **SMALL, bar=False), collect(model, text(), skip=2, bar=False)
    assert both.layers.keys() == alone.layers.keys() == both.prices.keys() and both.data == [alone.data[0] | SMALL]
    for i, s in alone.layers.items():
        assert both.layers[i].n == s.n and both.layers[i].weighted == s.weighted
        for name in MEANS + MATRICES: close(getattr(both.layers[i], name), getattr(s, name))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_interrupted_and_resumed_to_the_last_bit(stop, tmp_path):
    "Statistics, prices, forecasts: whatever batch the interruption came in."
    model, path = load("Qwen2", tmp_path / "model"), tmp_path / "part"
    job = lambda **kw: calibrate(model, text(8, 160), window=8, sinks=2, block=8, bar=False, every=1, **kw)
    want, seen = job(), []
    def interrupt(module, args, kw):
        if kw["input_ids"].shape != (2, 160): return
        seen.append(1)
        if len(seen) == stop + 1: raise KeyboardInterrupt
    hook = model.model.register_forward_pre_hook(interrupt, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt): job(checkpoint=path)
    hook.remove()
    found = job(checkpoint=path)
    assert job(checkpoint=path).tokens == found.tokens # nothing is left to do
    for i, s in want.layers.items():
        for name in MEANS + MATRICES: assert torch.equal(getattr(found.layers[i], name), getattr(s, name)), name
        for kind in ("prices", "forecasts", "importance"):
            for a, b in zip(getattr(found, kind)[i], getattr(want, kind)[i], strict=True): assert torch.equal(a, b), kind
    with pytest.raises(ValueError, match="remove it or name another file"): calibrate(model, text(8, 160, 1), **SMALL, bar=False, checkpoint=path)


def test_what_the_first_batch_shows_is_refused_then(tmp_path):
    model, calls = load("Qwen2", tmp_path), []
    model.model.layers[1].self_attn.v_proj.weight.data[0] = torch.nan
    model.model.layers[0].mlp.register_forward_pre_hook(lambda m, args: calls.append(args[0].shape))
    with pytest.raises(ValueError, match="layer 1: .*NaN or Inf"): calibrate(model, text(20), **SMALL, bar=False)
    assert sum(shape[1] == 64 for shape in calls) == 1 # of ten


def test_draws_are_of_the_probabilities():
    "By whole runs of tokens: the token at which the sum passes u, never one without a probability; any size of the vocabulary."
    g = torch.Generator().manual_seed(0)
    for V in (5, 128, 129, 1000, 4096):
        logits, u = torch.randn(300, V, generator=g) * 3, torch.rand(300, generator=g)
        logits[:, ::2], u[0], u[1] = -torch.inf, 0, 1 - 2**-24
        tokens, p = draw(logits, u)
        sums, at, u = p.double().cumsum(-1), tokens[:, None], u.double()
        upto, chance = sums.gather(1, at)[:, 0], p.double().gather(1, at)[:, 0]
        assert (chance > 0).all() and (upto >= u - 1e-6).all() and (upto - chance <= u + 1e-6).all()
