"""Files from strangers: whatever is done to the bytes of a profile, a saved cache or a checkpoint, loading gives the very content that was written
or a ValueError of one line; never another exception, never something slightly different."""
import importlib
import json
import struct

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings, strategies as st

from ndkv.cache import NDCache
from ndkv.fisher import _load_sums, fisher
from ndkv.profile import MATRICES, MEANS, Profile, collect
from ndkv.store import load_cache, save_cache

importlib.import_module('reference')
fuzz = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

CONFIG = tf.LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256)
SHAPE = dict(bits=3, method="equalised", window=8, block=8)


def cache_content(c):
    return [c.get_seq_length()] + [(s.starts, s.end, {k: (str(t.dtype), t.tolist()) for k, t in s.tensors.items()}) for layer in c.layers for s in layer.stores]


def profile_content(p):
    stats = lambda s: (s.n, s.weighted, s.rope.scaling, s.rope.pairing, s.rope.start, s.rope.max_length, s.rope.inv_freq.tolist(), [getattr(s, f).tolist() for f in MEANS + MATRICES])
    return [p.model, p.data, p.skip, {i: stats(s) for i, s in p.layers.items()}, *({i: [t.tolist() for t in some] for i, some in kept.items()} for kept in (p.prices, p.forecasts))]


def sums_content(x):
    done, sums, state, more = x
    return done, {i: [t.tolist() for t in pair] for i, pair in sums.items()}, state.tolist(), {k: t.tolist() for k, t in more.items()}


class Targets(dict):
    def __repr__(self): return 'targets'


@pytest.fixture(scope='module')
def targets(tmp_path_factory):
    "name -> (bytes of a good file, function that loads a path into plain content)."
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp('good'), tf.LlamaForCausalLM(CONFIG).eval()
    text = torch.randint(0, 61, (4, 48))
    profile = collect(model, text, data='words', bar=False)
    profile.prices = fisher(model, text, window=8, block=8, bar=False, checkpoint=folder / 'sums')
    profile.save(folder / 'profile')
    with open(folder / 'sums', 'rb') as f:
        n = struct.unpack('<Q', f.read(8))[0]
        head = json.loads(json.loads(f.read(n))['__metadata__']['ndkv_fisher'])
    head.pop('sha256')
    cache = NDCache(CONFIG, **SHAPE)
    with torch.no_grad(): model(text[:2], past_key_values=cache)
    save_cache(cache, folder / 'cache', CONFIG)
    load = dict(profile=lambda p: profile_content(Profile.load(p)), cache=lambda p: cache_content(load_cache(p, NDCache(CONFIG, **SHAPE), CONFIG)), sums=lambda p: sums_content(_load_sums(p, head)))
    return Targets({name: ((folder / name).read_bytes(), f, f(folder / name), folder / f'bad-{name}') for name, f in load.items()})


def judge(target, data):
    good, load, content, path = target
    path.write_bytes(data)
    try: found = load(path)
    except ValueError as e:
        assert str(e).startswith(str(path)) and '\n' not in str(e) and len(str(e)) < 600
        return 'refused'
    assert found == content
    return 'same'


NAMES = pytest.mark.parametrize('name', ['profile', 'cache', 'sums'])


@NAMES
@fuzz
@given(data=st.data())
def test_bytes(targets, name, data):
    "Bytes flipped, cut out, put in, repeated, and files cut off, in the header and elsewhere."
    good = targets[name][0]
    head = 8 + struct.unpack('<Q', good[:8])[0]
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, 7) | st.integers(0, head - 1) | st.integers(0, len(good) - 1)) % max(len(bad), 1)
        kind = data.draw(st.sampled_from(['flip', 'flip', 'cut', 'remove', 'insert', 'repeat']))
        if kind == 'flip' and bad: bad[i] ^= data.draw(st.integers(1, 255))
        if kind == 'cut': del bad[i:]
        if kind == 'remove': del bad[i:i + data.draw(st.integers(1, 64))]
        if kind == 'insert': bad[i:i] = data.draw(st.binary(min_size=1, max_size=16))
        if kind == 'repeat': bad[i:i] = bad[i:i + data.draw(st.integers(1, 64))]
    judge(targets[name], bytes(bad))


def with_header(good, text, length=None):
    "The file with another header."
    n = struct.unpack('<Q', good[:8])[0]
    text = text if isinstance(text, bytes) else text.encode()
    return struct.pack('<Q', (len(text) if length is None else length) % 2**64) + text + good[8 + n:]


NUMBERS = st.integers(-2, 300) | st.sampled_from([2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -2**63, 10**30]) | st.floats()
JUNK = NUMBERS | st.none() | st.booleans() | st.text(max_size=4) | st.lists(NUMBERS, max_size=3) | st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2)
TYPES = ['F64', 'F32', 'F16', 'BF16', 'I64', 'I32', 'I16', 'I8', 'U8', 'BOOL', 'F8_E4M3', 'F4', 'C64', 'X']


def change_entry(data, header):
    "One tensor's entry: type, shape, place."
    key = data.draw(st.sampled_from(sorted(k for k in header if k != '__metadata__')))
    e, others = header[key], sorted(header)
    kind = data.draw(st.sampled_from(['dtype', 'shape', 'offsets', 'swap', 'overlap', 'shift', 'drop', 'rename', 'copy', 'field', 'junk', 'factor']))
    if kind == 'dtype': e['dtype'] = data.draw(st.sampled_from(TYPES))
    if kind == 'shape': e['shape'] = data.draw(st.lists(NUMBERS, max_size=6))
    if kind == 'factor' and e['shape']: e['shape'] = e['shape'][::-1] if data.draw(st.booleans()) else [1, *e['shape']]
    if kind == 'offsets': e['data_offsets'] = data.draw(st.lists(NUMBERS, min_size=0, max_size=3))
    other = header[data.draw(st.sampled_from(others))]
    if kind in ('swap', 'overlap') and 'data_offsets' in other:
        mine, e['data_offsets'] = e['data_offsets'], other['data_offsets']
        if kind == 'swap': other['data_offsets'] = mine
    if kind == 'shift': e['data_offsets'] = [x + data.draw(st.sampled_from([-8, -1, 1, 8])) for x in e['data_offsets']]
    if kind == 'drop': del header[key]
    if kind == 'rename': header[data.draw(st.sampled_from(others) | st.text(max_size=8))] = header.pop(key)
    if kind == 'copy': header[data.draw(st.text(max_size=8))] = dict(e)
    if kind == 'field': e[data.draw(st.sampled_from(['dtype', 'shape', 'data_offsets']) | st.text(max_size=4))] = data.draw(JUNK)
    if kind == 'junk': header[key] = data.draw(JUNK)


def change_metadata(data, header):
    "Our own JSON within the header: any field gone or replaced, at any depth."
    meta = header['__metadata__']
    kind = data.draw(st.sampled_from(['inside', 'inside', 'inside', 'text', 'more', 'gone', 'junk']))
    key = next(iter(meta))
    if kind == 'text': meta[key] = data.draw(st.text(max_size=20) | st.sampled_from(['null', '[]', '1', '{"format": 2}', '{"format": NaN}', '[' * 5000, '{"a":' * 5000, '9' * 5000]))
    if kind == 'more': meta[data.draw(st.text(max_size=4))] = data.draw(st.text(max_size=4))
    if kind == 'gone': del meta[key]
    if kind == 'junk': header['__metadata__'] = data.draw(JUNK)
    if kind == 'inside':
        try: inner = json.loads(meta[key])
        except (TypeError, ValueError, RecursionError): return # an earlier change has left no JSON
        if not inner or not isinstance(inner, (dict, list)): return
        spot = inner
        while True:
            k = data.draw(st.sampled_from(sorted(spot) if isinstance(spot, dict) else list(range(len(spot)))))
            if isinstance(spot[k], (dict, list)) and spot[k] and data.draw(st.booleans()): spot = spot[k]
            else: break
        if isinstance(spot, dict) and data.draw(st.booleans()): spot.pop(k)
        else: spot[k] = data.draw(JUNK)
        meta[key] = json.dumps(inner)


@NAMES
@fuzz
@given(data=st.data())
def test_headers(targets, name, data):
    "Headers that are JSON and lie: places that overlap or lie beyond the end, other types and shapes, other names, fields of any type."
    good = targets[name][0]
    header = json.loads(good[8:8 + struct.unpack('<Q', good[:8])[0]])
    for _ in range(data.draw(st.integers(1, 2))):
        if not isinstance(header.get('__metadata__'), dict) or not header['__metadata__'] or data.draw(st.booleans()):
            if len(header) > 1 and all(isinstance(v, dict) and ('shape' in v and isinstance(v['shape'], list) and isinstance(v.get('data_offsets'), list) or k == '__metadata__') for k, v in header.items()): change_entry(data, header)
        else: change_metadata(data, header)
    text = json.dumps(header)
    if data.draw(st.booleans()): text += ' ' * data.draw(st.integers(0, 9))
    judge(targets[name], with_header(good, text))


@NAMES
def test_extremes(targets, name):
    "Lengths of the header up to 2^64, deep JSON, duplicate names, other encodings, nothing at all."
    good = targets[name][0]
    n = struct.unpack('<Q', good[:8])[0]
    text = good[8:8 + n].decode()
    first = next(k for k in json.loads(text) if k != '__metadata__')
    for length in (0, 1, n - 1, n + 1, len(good), 2**24 + 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1): assert judge(targets[name], struct.pack('<Q', length) + good[8:]) == 'refused'
    for header in ('', ' ', '{}', '[]', 'null', '{', '[' * 10**5, '{"a":' * 10**5, '{"__metadata__":' + '[' * 10**5, '\0' * n, '\ufeff' + text, text.encode('utf-16'), text.replace('{', '{"x": 1e999,', 1),
                   text[:-1] + f', "{first}": {{"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}}}', text.replace(first, first + '\\u0000'), text.replace(first, '../' + first)):
        assert judge(targets[name], with_header(good, header)) == 'refused'
    for data in (b'', b'\0', b'\0' * 8, b'\xff' * 8, b'{}', good * 2, good[::-1], good[:8]): assert judge(targets[name], data) == 'refused'
    assert judge(targets[name], good) == 'same'
    assert judge(targets[name], with_header(good, json.dumps(json.loads(text), indent=1))) == 'same' # another spelling of the same header


@pytest.mark.parametrize('name', ['profile', 'cache'])
def test_tensors_beyond_the_file_take_no_memory(targets, name):
    "A header that announces terabytes is refused from its numbers."
    import resource
    good = targets[name][0]
    header = json.loads(good[8:8 + struct.unpack('<Q', good[:8])[0]])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for shape, end in (([2**40], 2**42), ([2**20, 2**20, 2**20], 2**62), ([2**62], 2**64 - 1)):
        for key in [k for k in header if k != '__metadata__'][:3]:
            bad = json.loads(json.dumps(header))
            bad[key] = dict(dtype='F32', shape=shape, data_offsets=[0, end])
            assert judge(targets[name], with_header(good, json.dumps(bad))) == 'refused'
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16 # KiB
