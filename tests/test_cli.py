"The command line from the outside: a model folder in, a table or JSON out; what cannot work is one line and an exit code."
import contextlib
import fcntl
import importlib
import io
import inspect
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from xml.etree import ElementTree

import pytest
import torch
import transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import test_architectures as architectures
from conftest import ROOT
from ndkv import assess, benches, cli
from ndkv.cache import NDCache
from ndkv.cli import app, main
from ndkv.equalised_pages import EqualisedPageCodec
from ndkv.profile import Profile
from ndkv.results import load_rows, validate

BODY = dict(vocab_size=8192, hidden_size=64, num_hidden_layers=2)
WORDS = 'The river runs past the old mill and under the bridge to the sea. ' * 20


def forbid(monkeypatch, *names):
    "Work that must not begin, wherever a command would begin it."
    for name in names:
        places = [m for m in (assess, benches, cli) if hasattr(m, name)]
        if '.' in name: # of a module that a command asks for when it runs
            module, name = name.split('.')
            places = [importlib.import_module(f'ndkv.{module}')]
        assert places, name
        for m in places: monkeypatch.setattr(m, name, lambda *a, **kw: pytest.fail('worked first'))


def run(*args):
    "Exit code, output, errors."
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: main(list(map(str, args)))
        except SystemExit as e: code = e.code or 0
    return code, out.getvalue(), err.getvalue()


def save(model, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / 'results' / 'zoo' / 'tokenizer').save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(**BODY, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    return save(LlamaForCausalLM(config), tmp_path_factory.mktemp('llama'))


def test_demo_on_a_folder(llama):
    code, out, err = run('demo', '--model', llama, '--prompt', WORDS, '--new-tokens', 8, '--window', 32)
    assert code == 0, err
    lines = {m[1]: m[2].split() for m in re.finditer(r'^(ordinary|ndkv \d bits) +(\d.*)$', out, re.M)}
    assert list(lines) == ['ordinary', 'ndkv 4 bits', 'ndkv 3 bits', 'ndkv 2 bits']
    assert lines['ordinary'][:2] == ['32', '1,024']
    bits = [float(lines[f'ndkv {b} bits'][0]) for b in (4, 3, 2)]
    size = [int(lines[name][1].replace(',', '')) for name in lines]
    kl = [float(lines[f'ndkv {b} bits'][3]) for b in (4, 3, 2)]
    assert bits == pytest.approx([sum(EqualisedPageCodec(kind, 32, 2, b).bits_per_element for kind in 'kv')/2 for b in (4, 3, 2)], abs=5e-4) and size == sorted(size, reverse=True) and 0 < kl[0] < kl[1] < kl[2]


def test_a_text_that_is_too_short_or_too_long(llama):
    code, out, err = run('demo', '--model', llama, '--prompt', 'hello')
    assert code == 1 and out == '' and 'before anything is packed' in err and err.count('\n') == 1
    code, out, err = run('demo', '--model', llama, '--prompt', WORDS, '--new-tokens', 4000)
    assert code == 1 and 'positions of the model' in err


def test_a_missing_and_a_truncated_checkpoint(llama, tmp_path):
    code, out, err = run('demo', '--model', tmp_path / 'none')
    assert code == 1 and out == '' and re.fullmatch(r'ndkv: cannot load .*\n', err)
    for path in llama.iterdir(): (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / 'model.safetensors'
    shard.write_bytes(shard.read_bytes()[:-1000])
    code, out, err = run('demo', '--model', tmp_path)
    assert code == 1 and out == '' and re.search(r'^ndkv: cannot load [^\n]*\n$', err)


def test_a_model_without_keys_and_values(tmp_path):
    model = MambaForCausalLM(MambaConfig(**BODY))
    code, out, err = run('demo', '--model', save(model, tmp_path))
    assert code == 1 and out == '' and 'MambaConfig' in err.splitlines()[-1]


def test_evaluate_and_train_ask_for_their_text(tmp_path):
    for command in ('evaluate', 'train'):
        code, out, err = run(command, '--data', tmp_path)
        assert code == 1 and out == '' and re.fullmatch(r'ndkv: .*: no such text; .*\n', err)


# --- every family of models: a table, or one line --------------------------------------------------------------------------------------

MORE = {"Qwen3.5": ("Qwen3_5", architectures.FAMILIES["Qwen3-Next"][1])}
NO_DEMO = {"T5": "no causal language model", "LLaVA": "no causal language model", "BART": "its decoder has 2"}
DEMO = [f for f in architectures.FAMILIES if f in architectures.NOTES or f in ("Llama", "GPT-2", "BLOOM", "Falcon", "OPT")] + list(MORE)


def fitted(fields):
    "A configuration for the tokenizer of the zoo, with room for a text."
    fields = {k: fitted(v) if isinstance(v, dict) else v for k, v in fields.items()}
    fields |= {k: 96 for k in ('sliding_window', 'attention_chunk_size') if k in fields} # more than a block
    return fields | {k: 8192 for k in ('vocab_size', 'vocab_size_per_layer_input') if k in fields} | {k: 2048 for k in ('max_position_embeddings', 'n_positions') if k in fields}


def family(name, folder):
    prefix, fields = (architectures.FAMILIES | MORE)[name]
    kind = architectures.KINDS.get(name, "ForCausalLM")
    text = name.startswith(("Gemma 3", "Gemma 4", "Llama 4", "Qwen3.5")) and name != "Gemma 3 VLM"
    torch.manual_seed(0)
    model = getattr(transformers, prefix + kind)(getattr(transformers, prefix + ("TextConfig" if text else "Config"))(**fitted(fields)))
    for p in model.parameters(): p.data *= 4 if p.dim() > 1 else 1
    return save(model, folder)


@pytest.mark.parametrize('name', DEMO)
def test_demo_of_every_family(name, tmp_path):
    "Layers without keys, layers that read the keys of others, latents: a row for the ordinary cache and one for each of ours, the latter smaller; or one line."
    code, out, err = run('demo', family(name, tmp_path), '--prompt', WORDS, '--new-tokens', 2, '--window', 8, '--json')
    if name in NO_DEMO:
        assert code == 1 and out == '' and re.fullmatch(r'ndkv: [^\n]{10,500}\n', err.splitlines(True)[-1]) and NO_DEMO[name] in err
        return
    rows = json.loads(out)
    ordinary, *ours = rows
    bits = (8, 6, 4) if name.startswith('DeepSeek') else (4, 3, 2)
    assert code == 0 and ordinary['bits'] == 32 and [r['cache'] for r in ours] == [f'ndkv {b} bits' for b in bits]
    sizes = [r['bytes_per_token'] for r in rows]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4 and all(b < r['bits'] < b + 2 for b, r in zip(bits, ours)) and all(r['kl_mean'] > 0 for r in ours)


def test_a_model_that_no_profile_describes_is_refused_before_the_work(tmp_path, monkeypatch):
    "DeepSeek: calibrate and inspect measure nothing, recommend searches nothing, evaluate takes the bits that it can."
    family('DeepSeek-V3', tmp_path)
    (tmp_path / 'text.txt').write_text(WORDS * 15)
    forbid(monkeypatch, 'measure_profile', 'search_bits', 'frontier', 'own_text')
    for args in (('calibrate',), ('calibrate', '--data', 'text.txt'), ('inspect',), ('recommend', '--budget', 3, '--data', 'text.txt'), ('evaluate', '--data', 'text.txt')):
        code, out, err = here(args[0], '.', *args[1:], cwd=tmp_path)
        assert code == 1 and out == '' and re.search('latents', err) and err.splitlines()[-1].startswith('ndkv: '), (args, err)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix in ('.part', '.tokens') or p.name == 'results') == []
    code, out, err = here('evaluate', '.', '--method', 'rotation', '--bits', '8,4', '--data', 'text.txt', '--length', 256, '--windows', 1, '--json', cwd=tmp_path)
    assert code == 0 and [c['v_bits'] for c in json.loads(out)] == [None]*3


@pytest.mark.parametrize('args, says', [
    (('calibrate', '--out', 'tiny'), 'is a folder'), (('calibrate', '--out', 'text.txt/x.safetensors'), 'cannot be written'), (('calibrate', '--push', 'nobody'), 'OWNER/NAME'), (('calibrate', '--push', 'a/b/c'), 'Repo id'),
    (('calibrate', '--push', 'someone/tiny'), 'hf auth login'), (('inspect', '--picture', 'text.txt/x.svg'), 'cannot be written'), (('inspect', '--picture', 'x.gif'), 'svg'), (('evaluate', '--out', 'text.txt'), 'cannot be written'),
    (('evaluate', '--method', 'rotation', '--bits', '9'), 'bits=(9'), (('evaluate', '--method', 'rotation', '--bits', '.5'), 'bits=(0.5'), (('recommend', '--budget', 1), 'give 2 or more'), (('sweep', 'grid.yaml', '--out', 'text.txt'), 'cannot be written'),
    (('bench', 'cpu', '--out', 'text.txt'), 'cannot be written'), (('demo', '--bits', '0'), 'bits=(0'), (('demo', '--bits', '4,9'), 'bits=(9')], ids=lambda x: ' '.join(map(str, x)) if isinstance(x, tuple) else '')
def test_what_cannot_end_well_does_not_begin(place, args, says, monkeypatch, tmp_path):
    "Places that cannot be written, budgets and bits that nothing has, a Hub that does not know us: said before anything is loaded or measured."
    (tmp_path / 'grid.yaml').write_text('{models: [tiny], methods: [rotation], bits: [2], tasks: [text.txt], length: [256], n: 2}')
    args = [tmp_path / a if a == 'grid.yaml' else a for a in args]
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    forbid(monkeypatch, 'measure_profile', 'measure', 'own_text', 'search_bits', 'search.sweep', 'generate')
    before = sorted(place.rglob('*'))
    model = () if args[0] in ('sweep', 'bench') else ('--model', 'tiny')
    data = () if args[0] in ('demo', 'bench', 'inspect') else ('--data', '.') if args[0] == 'sweep' else ('--data', 'text.txt')
    code, out, err = here(args[0], *args[1:], *model, *data, cwd=place)
    assert code == 1 and out == '' and says in err and re.fullmatch(r'ndkv: [^\n]{10,500}\n', err), err
    assert sorted(place.rglob('*')) == before


def test_spectra_are_whole(place, profile, tmp_path, monkeypatch):
    "A budget that does not pay for the norms of a model's heads is left out, and the others are written; a failure on the way writes nothing."
    from ndkv import evaluate
    plan = evaluate.plan
    def poor(p, bits, *a, **kw):
        if bits < 1: raise ValueError('do not even pay for the norms')
        return plan(p, bits, *a, **kw)
    monkeypatch.setattr(evaluate, 'plan', poor)
    args = ('spectra', 'tiny', '--profile', profile, '--data', 'text.txt', '--length', 256, '--out', tmp_path / 'rows')
    code, out, err = here(*args, cwd=place)
    assert code == 0, err
    assert load_rows(tmp_path / 'rows' / 'spectra.jsonl') and {r['k_bits'] for r in load_rows(tmp_path / 'rows' / 'ratedistortion.jsonl')} == {1., 1.5, 2., 3., 4.}
    def fails(*a, **kw): raise ValueError('no more')
    monkeypatch.setattr(assess, 'rates', fails)
    code, out, err = here(*args[:-1], tmp_path / 'none', cwd=place)
    assert code == 1 and not (tmp_path / 'none').exists()


# --- as processes, in a folder that holds nothing but a model and a text ---------------------------------------------------------------

COMMANDS = ['demo', 'claims', 'report', 'verify', 'calibrate', 'evaluate', 'spectra', 'sweep', 'bench', 'inspect', 'recommend', 'models', 'tasks', 'train']


def start(*args, cwd, **kw):
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'} | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', COLUMNS='120', HF_HUB_OFFLINE='1')
    return subprocess.Popen([sys.executable, '-c', 'from ndkv.cli import main; main()', *map(str, args)], cwd=cwd, env=env, text=True, **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | kw, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def here(*args, cwd):
    "The same as `process` without a process."
    before = os.getcwd()
    os.chdir(cwd)
    try: return run(*args)
    finally: os.chdir(before)


def process(*args, cwd):
    "Exit code, output, errors of a process of its own."
    p = start(*args, cwd=cwd)
    out, err = p.communicate(timeout=300)
    return p.returncode, out, err


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('place')
    torch.manual_seed(0)
    config = LlamaConfig(**BODY, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, bos_token_id=0, eos_token_id=0)
    save(LlamaForCausalLM(config), folder / 'tiny')
    (folder / 'text.txt').write_text(WORDS * 15)
    return folder


@pytest.fixture(scope='module')
def profile(place):
    "What `ndkv calibrate` writes."
    code, out, err = process('calibrate', 'tiny', '--data', 'text.txt', '--length', 320, '--windows', 4, '--json', cwd=place)
    assert code == 0 and err == '', err
    assert json.loads(out) == dict(profile='tiny.safetensors', layers=2, tokens=4*316, text=['text'], hub=None)
    assert sorted(p.name for p in place.iterdir()) == ['text.txt', 'tiny', 'tiny.safetensors'] # nothing else is left
    return 'tiny.safetensors'


def test_calibrated_profiles_work(place, profile):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(place / 'tiny')
    p = Profile.load(place / profile, model)
    assert p.prices.keys() == p.layers.keys()
    NDCache(model.config, bits=2, profile=str(place / profile))


def test_inspect(place, profile):
    code, out, err = process('inspect', 'tiny', '--profile', profile, '--data', 'text.txt', '--bits', 1.5, '--picture', 'tiny.svg', '--json', cwd=place)
    rows = json.loads(out)
    assert code == 0 and err == '' and [(r['layer'], r['kind']) for r in rows] == [(0, 'k'), (0, 'v'), (1, 'k'), (1, 'v')]
    assert all(len(r['head_bits']) == 2 and len(r['spectrum']) == 32 and r['spectrum'] == sorted(r['spectrum'], reverse=True) and 0 < r['rank'] <= 32 for r in rows)
    assert abs(sum(r['bits'] for r in rows) / 4 - 1.5) < .25
    assert ElementTree.parse(place / 'tiny.svg').getroot().tag.endswith('svg')
    code, out, err = here('inspect', '--model', 'tiny', '--data', 'text.txt', '--windows', 3, '--picture', 'tiny.png', cwd=place) # measures a small profile itself
    assert code == 0 and out.splitlines()[0].split() == 'layer sink outlier mean rank cost bits'.split() and out.splitlines()[-1] == 'drawn in tiny.png'
    assert len(re.findall(r'^[01] +(keys|values) ', out, re.M)) == 4 and (place / 'tiny.png').read_bytes()[:4] == b'\x89PNG'


def test_evaluate_methods(place, profile):
    args = ('evaluate', '--model', 'tiny', '--method', 'rotation', '--method', 'spectral', '--method', 'kivi', '--bits', '4,2', '--profile', profile, '--data', 'text.txt', '--length', 256, '--windows', 2)
    code, out, err = process(*args, '--json', cwd=place)
    assert code == 0 and err == '', err
    cells = {(c['method'], c['k_bits']): c for c in json.loads(out)}
    assert list(cells) == [('bf16', None), *((m, b) for m in ('rotation', 'spectral', 'kivi') for b in (4, 2))]
    for m in ('rotation', 'spectral', 'kivi'): assert cells['bf16', None]['kl_mean'] < cells[m, 4]['kl_mean'] < cells[m, 2]['kl_mean'] and cells[m, 2]['bits'] < cells[m, 4]['bits'] < 6
    assert not (place / 'results').exists()
    code, out, err = here(*args, '--out', 'results', '--name', 'mine', cwd=place)
    assert code == 0 and len(re.findall(r'^(bf16|rotation|spectral|kivi) ', out, re.M)) == 7
    rows = load_rows(place / 'results' / 'mine.jsonl')
    assert validate(place / 'results') == (len(rows), 1)
    for r in rows:
        if r['metric'] == 'kl_mean' and 'position' not in r: assert abs(r['value'] / cells[r['method'], r['k_bits']]['kl_mean'] - 1) < 1e-3


def test_recommend_prints_what_to_use(place, profile):
    code, out, err = process('recommend', 'tiny', '--profile', profile, '--data', 'text.txt', '--length', 300, '--windows', 2, '--budget', 2, cwd=place)
    assert code == 0 and err == '' and out.count('<- choice') == 1, err
    from transformers import AutoConfig
    line = out.splitlines()[-1].replace(repr(profile), repr(str(place / profile)))
    cache = eval(line, dict(NDCache=NDCache, model=type('M', (), dict(config=AutoConfig.from_pretrained(place / 'tiny')))))
    assert isinstance(cache, NDCache) and cache._mine[0].method == 'pages'
    code, out, err = here('recommend', 'tiny', '--data', 'text.txt', '--length', 300, '--windows', 2, '--budget', 3, '--json', cwd=place)
    found = json.loads(out)
    cache = eval(found['line'], dict(NDCache=NDCache, model=type('M', (), dict(config=AutoConfig.from_pretrained(place / 'tiny')))))
    assert code == 0 and cache._mine[0].method == 'pages' and found['choice']['bits'] <= 3


def test_sweep_in_a_process(place):
    (place / 'grid.yaml').write_text('{models: [tiny], methods: [rotation], bits: [2], tasks: [text.txt], length: [256], n: 2}')
    for way, done, skipped in ((process, 1, 0), (here, 0, 1)):
        code, out, err = way('sweep', 'grid.yaml', '--data', '.', '--out', 'swept', '--json', cwd=place)
        assert code == 0, err
        assert {k: len(v) for k, v in json.loads(out).items()} == dict(done=done, failed=0, skipped=skipped)


def test_demo_with_a_profile(place, profile):
    code, out, err = here('demo', 'tiny', '--profile', profile, '--bits', '3,1.5', '--prompt', WORDS, '--new-tokens', 8, '--window', 32, '--json', cwd=place)
    rows = json.loads(out)
    assert code == 0 and err == '' and [r['cache'] for r in rows] == ['ordinary', 'ndkv 3 bits', 'ndkv 1.5 bits']
    assert rows[0]['kl_mean'] is None and 0 < rows[1]['kl_mean'] < rows[2]['kl_mean'] and rows[2]['bytes_per_token'] < rows[1]['bytes_per_token'] < rows[0]['bytes_per_token']


def test_calibration_goes_on_after_a_kill(place):
    "SIGKILL or SIGINT after a first checkpoint; the next process ends with the profile of an undisturbed one."
    args = ('calibrate', 'tiny', '--length', 272, '--windows', 24, '--batch', 1)
    for name, stop in (('killed.safetensors', signal.SIGKILL), ('stopped.safetensors', signal.SIGINT)):
        p = start(*args, '--out', name, cwd=place)
        for _ in range(3000):
            if (place / (name + '.part')).exists() or p.poll() is not None: break
            time.sleep(.02)
        p.send_signal(stop)
        out, err = p.communicate(timeout=60)
        assert p.returncode == (-9 if stop == signal.SIGKILL else 1) and not (place / name).exists(), err
        if stop == signal.SIGINT: assert re.search(r'^ndkv: interrupted; .* goes on from there\n$', err, re.M) and 'Traceback' not in err
        kept = (place / (name + '.part.tokens')).read_bytes()
        code, out, err = here(*args, '--out', name, cwd=place)
        assert code == 0 and kept, err
    code, out, err = here(*args, '--out', 'whole.safetensors', cwd=place)
    assert code == 0
    a, b, c = (Profile.load(place / f'{name}.safetensors') for name in ('killed', 'stopped', 'whole'))
    for other in (a, b):
        assert other.data == c.data and other.tokens == c.tokens
        for i in c.layers: torch.testing.assert_close(other.layers[i].k_cov, c.layers[i].k_cov), torch.testing.assert_close(other.prices[i], c.prices[i])
    assert not list(place.glob('*.part*'))


def test_calibration_on_several_kinds_of_text(place):
    "Text, code and what the model writes, in one call; interrupted and taken up; bad calls are one line."
    (place / 'program.py').write_text('def add(a, b):\n    return a + b\n' * 400)
    args = ('calibrate', 'tiny', '--text', 'text.txt', '--text', 'program.py', '--text', 'own', '--length', 272, '--windows', 13, '--out', 'kinds.safetensors')
    code, out, err = here(*args, '--json', cwd=place)
    assert code == 0 and json.loads(out)['text'] == ['text', 'program', 'own text'], err
    found = Profile.load(place / 'kinds.safetensors')
    assert [d['windows'] for d in found.data] == [4, 4, 4] and found.forecasts and not list(place.glob('*.part*'))
    code, out, err = here('evaluate', 'tiny', '--method', 'spectral', '--profile', 'kinds.safetensors', '--bits', '2', '--data', 'text.txt', '--length', 512, '--windows', 1, '--json', cwd=place)
    assert code == 0 and json.loads(out)[0]['kl_mean'] > 0, err
    for more, line in ((('--text', 'text.txt'), 'named twice'), (('--windows', 2), '3 texts need as many'), (('--length', 256), 'packs no page'), (('--text', 'nowhere'), 'no such text')):
        code, out, err = here(*args, *more, cwd=place)
        assert code == 1 and out == '' and re.fullmatch(r'ndkv: [^\n]*\n', err) and line in err, err


def test_bench_calibrate(place, monkeypatch):
    from functools import partial
    monkeypatch.setattr(benches, 'calibrate_bench', partial(benches.calibrate_bench, windows=4, length=256))
    code, out, err = here('bench', 'calibrate', '--model', 'tiny', '--data', 'text.txt', '--out', 'timed', '--json', cwd=place)
    assert code == 0, err
    row, = (r for r in json.loads(out) if r['metric'] == 'calibrate_seconds')
    assert 0 < row['value'] < 60 and (row['model'], row['windows'], row['length']) == ('tiny', 4, 256) and validate(place / 'timed')[0] == len(json.loads(out))
    code, out, err = here('bench', 'calibrate', '--model', 'tiny', '--data', 'nothing', '--out', 'timed', cwd=place)
    assert code == 1 and re.fullmatch(r'ndkv: .*wiki_val.txt.xz: no such text; [^\n]*\n', err)


def test_exit_codes(place, profile, monkeypatch):
    "0 is fine, 1 a line about what a user can mend, 2 usage; never a traceback."
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    (place / 'damaged.safetensors').write_bytes((place / profile).read_bytes()[:-7] + b'garbage')
    (place / 'other').mkdir(exist_ok=True)
    save(LlamaForCausalLM(LlamaConfig(**BODY, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=32)), place / 'other')
    cases = {
        1: [('demo', 'nowhere/none'), ('demo', 'tiny', '--profile', 'none.safetensors'), ('demo', 'tiny', '--profile', 'damaged.safetensors', '--prompt', WORDS), ('demo', 'other', '--profile', profile, '--prompt', WORDS),
            ('demo', 'tiny', '--bits', '3,x', '--prompt', WORDS), ('demo', 'tiny', '--bits', '9', '--prompt', WORDS), ('inspect', 'tiny', '--profile', 'someone/nothing'), ('evaluate', 'tiny', '--method', 'magic', '--data', 'text.txt'),
            ('evaluate', 'tiny', '--method', 'spectral', '--data', 'text.txt'), ('evaluate', 'tiny', '--grid', 'bits', '--data', 'text.txt'), ('recommend', 'tiny', '--data', 'text.txt'), ('calibrate', 'tiny', '--text', 'none'),
            ('sweep', 'none.yaml'), ('bench', '--out', 'x'), ('bench', 'queue', '--out', 'x'), ('report',), ('verify',), ('claims',)],
        2: [('demo', '--new-tokens', '0'), ('calibrate', '--length', 'many'), ('evaluatee',), ('inspect', '--bits', '99'), ('recommend', '--budget'), ()],
    }
    if torch.cuda.is_available(): cases[1] = [c for c in cases[1] if c[0] != 'bench']
    for code, calls in cases.items():
        for args in calls:
            found, out, err = here(*args, cwd=place)
            assert found == code, (args, found, out, err)
            if code == 1: assert out == '' and re.fullmatch(r'ndkv: [^\n]{10,500}\n', err), (args, out, err)
    for args, code in ((('demo', 'nowhere/none'), 1), (('demo', '--new-tokens', '0'), 2)): # the codes reach the shell
        found, out, err = process(*args, cwd=place)
        assert found == code and 'Traceback' not in err


@pytest.mark.parametrize('what, device', [('cpu', 'a processor'), ('serve', 'a card'), ('queue', 'a card')])
def test_rows_name_the_device_that_computed(place, tmp_path, monkeypatch, what, device):
    "On a machine with a GPU: `bench cpu` runs beside it, `bench serve` and `bench queue` on it."
    from ndkv import results, throughput
    for name, found in dict(is_available=True, get_device_name='a card', reset_peak_memory_stats=None, max_memory_allocated=7).items(): monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    monkeypatch.setattr(results, '_cpu_name', lambda: 'a processor')
    monkeypatch.setattr('ndkv.benches.text_windows', lambda *args: torch.zeros(1, 6000))
    (tmp_path / 'wiki_val.txt.xz').touch()
    def stand_in(plain):
        def bench(run, *args, **kw):
            inspect.signature(plain).bind(run, *args, **kw)
            run.row(method='x', metric='tokens_per_s', model='m', value=1., dtype=str(kw.get('dtype')))
            return dict(x=1)
        return bench
    for name in ('cpu_bench', 'serve_bench', 'queue_bench', 'users_bench'): monkeypatch.setattr(throughput, name, stand_in(getattr(throughput, name)))
    code, out, err = here('bench', what, '--model', 'tiny', '--data', tmp_path, '--out', tmp_path / 'rows', cwd=place)
    assert code == 0, err
    run, = results.load_runs(tmp_path / 'rows').values()
    assert (run['device'], run['peak_gpu_bytes']) == (device, 7 if device == 'a card' else None)


def test_every_help_teaches():
    "Each command says what it does, has help for every option and an example that parses."
    import shlex
    import typer
    group = typer.main.get_command(app)
    assert sorted(group.commands) == sorted(COMMANDS)
    for name, command in group.commands.items():
        assert command.help and all(getattr(p, 'help', 1) for p in command.params), name
        examples = [line for line in command.epilog.split('\n\n')[1:]]
        assert examples and all(line.startswith(f'ndkv {name}') for line in examples)
        for line in examples: command.make_context(name, shlex.split(line.split('|')[0])[2:]) # refuses unknown options and wrong types
        code, out, err = run(name, '--help')
        assert code == 0 and 'ndkv ' + name in out and '\x1b' not in out and '╭' not in out


def test_terminal_and_pipe(llama):
    "Frames, colours and bars are for a terminal; a pipe gets text."
    args = ('demo', llama, '--prompt', WORDS, '--new-tokens', 4, '--window', 32, '--bits', '4')
    code, out, err = here(*args, cwd=llama)
    assert code == 0 and err == '' and not set('│┃━╭\x1b') & set(out)
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 120, 0, 0))
    p = start(*args, cwd=llama, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    seen = b''
    while True:
        try: part = os.read(mine, 4096)
        except OSError: break
        if not part: break
        seen += part
    assert p.wait() == 0
    text = seen.decode()
    assert '┃' in text and '\x1b[' in text and 'compare' in text # the bar of the comparison
