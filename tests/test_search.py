"Sweeps that are stopped, that fail and that lose a worker; recommendations that keep their promises."
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from conftest import ROOT
from ndkv.cli import app
from ndkv.codebooks import distortion, lloyd_max
from ndkv.data import EOT, train_tokenizer
from ndkv.equalised import VERSION as EQUALISED
from ndkv.models import ZOO, load_model, save_model, zoo_config
from ndkv.results import load_rows, validate
from ndkv.recommend import bit_path, recommend
from ndkv.search import cells_of, read_grid, sweep
from ndkv.tasks import filler

SIZE = dict(vocab_size=300, hidden_size=64, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
GRID = dict(models=['tiny'], methods=['bf16', 'rotation', 'int'], bits=[2, 3, 4], tasks=['prose', 'copy'], length=[160], n=2, window=[16], sinks=[2], block=[8])


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with a zoo of one model and a text."
    folder, rng = tmp_path_factory.mktemp('home'), random.Random(0)
    text = EOT.join(filler(rng, 900) for _ in range(12))
    (folder / 'data').mkdir()
    (folder / 'data' / 'prose.txt').write_text(text)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer([text], 300), eos_token=EOT, pad_token=EOT)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(zoo_config('llama', **SIZE))
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3)
    save_model(model, tokenizer, folder / 'zoo' / 'tiny')
    return folder


def go(home, out, grid=GRID, **kw): return sweep(grid, out, 'rows', home / 'data', home / 'zoo', bar=False, **kw)


def complete(out, grid=GRID):
    "Every cell is there, in one run, measured once, and the folder is sound."
    runs = {}
    for r in load_rows(out / 'rows.jsonl', clean_only=True): runs.setdefault(r['key'], set()).add(r['run'])
    _, n = validate(out)
    assert runs.keys() == cells_of(read_grid(grid)).keys() and all(len(r) == 1 for r in runs.values()) and n == len(set.union(*runs.values()))
    written = [json.loads(line) for line in (out / 'runs.jsonl').read_text().splitlines()]
    assert sum(1 + len(r.get('joined', ())) for r in written) == len(runs)


def test_a_sweep_is_never_run_twice(home, tmp_path, clean_code):
    first = go(home, tmp_path)
    assert len(first['done']) == 14 and not first['failed']
    complete(tmp_path)
    before = (tmp_path / 'rows.jsonl').read_bytes()
    assert sorted(go(home, tmp_path)['skipped']) == sorted(first['done'])
    assert (tmp_path / 'rows.jsonl').read_bytes() == before
    more = dict(GRID, bits=[2, 3, 4, [4, 2]])
    assert len(go(home, tmp_path, more)['done']) == 4
    complete(tmp_path, more)


def test_a_killed_sweep_goes_on(home, tmp_path, clean_code):
    code = f'''
        from pathlib import Path
        import torch; torch.set_num_threads(1)
        from ndkv.search import sweep
        sweep({GRID!r}, {str(tmp_path)!r}, 'rows', {str(home / "data")!r}, {str(home / "zoo")!r}, bar=False)
    '''
    job = subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], env=dict(os.environ, PYTHONPATH=str(ROOT)))
    end = time.time() + 60
    while time.time() < end and job.poll() is None and not ((tmp_path / 'rows.jsonl').exists() and len({r['key'] for r in load_rows(tmp_path / 'rows.jsonl')}) >= 3): time.sleep(.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    before = {r['key'] for r in load_rows(tmp_path / 'rows.jsonl')}
    assert 3 <= len(before) < 14
    report = go(home, tmp_path)
    assert set(report['skipped']) == before and len(report['done']) == 14 - len(before)
    complete(tmp_path)


@pytest.mark.parametrize('deaths', [1, 99])
def test_two_processes_one_killed(home, tmp_path, clean_code, monkeypatch, deaths):
    "No cell is lost or measured twice; a cell that kills every worker is recorded as failed."
    import ndkv.search as search
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    killed, poison, start = [], list(cells_of(read_grid(GRID)))[5], search._next

    def then_kill(todo, worker, crew): # a worker that was given this cell dies with it
        key = start(todo, worker, crew)
        if key == poison and len(killed) < deaths:
            os.kill(worker.process.pid, signal.SIGKILL)
            killed.append(worker.process.pid)
        return key
    monkeypatch.setattr(search, '_next', then_kill)
    report = go(home, tmp_path, workers=2)
    if deaths == 1:
        assert len(killed) == 1 and not report['failed'] and len(report['done']) == 14
        complete(tmp_path)
    else:
        assert len(killed) == 3 and report['failed'] == [poison] and len(report['done']) == 13
        assert 'died 3 times' in json.loads((tmp_path / 'rows.failed.json').read_text())[poison]['error']


def test_a_file_of_rows_for_each_model(home, tmp_path, clean_code):
    grid = dict(GRID, models=['tiny', 'tiny+key_bias'], methods=['bf16'], tasks=['prose'])
    assert len(sweep(grid, tmp_path, 'part_{model}', home / 'data', home / 'zoo', bar=False)['done']) == 2
    assert sorted(p.name for p in tmp_path.glob('*.jsonl')) == ['part_tiny.jsonl', 'runs.jsonl']
    assert len(sweep(grid, tmp_path, 'part_{model}', home / 'data', home / 'zoo', bar=False)['skipped']) == 2


def test_a_failed_cell_is_recorded_and_the_rest_go_on(home, tmp_path, clean_code):
    grid = dict(GRID, bits=[3, 9], tasks=['prose', 'verse'])
    report = go(home, tmp_path, grid)
    failed = json.loads((tmp_path / 'rows.failed.json').read_text())
    assert len(report['done']) == 3 and sorted(failed) == sorted(report['failed']) and len(failed) == 7 # 2 of prose at 9 bits, 5 of verse
    assert {'bits=(9, 9)' in f['error'] or "named 'verse'" in f['error'] for f in failed.values()} == {True}
    assert len(go(home, tmp_path, grid, retry=False)['skipped']) == 10
    (home / 'data' / 'verse.txt').write_text((home / 'data' / 'prose.txt').read_text())
    try: assert len(go(home, tmp_path, grid)['done']) == 3
    finally: (home / 'data' / 'verse.txt').unlink()
    assert len(json.loads((tmp_path / 'rows.failed.json').read_text())) == 4


def test_two_sweeps_into_one_file_are_refused(home, tmp_path, clean_code, monkeypatch):
    import ndkv.search as search
    seen = []

    def attempt(key, cell, where):
        with pytest.raises(ValueError, match='another sweep is writing'): go(home, tmp_path)
        seen.append(key)
        return None, 'x'
    monkeypatch.setattr(search, 'attempt', attempt)
    go(home, tmp_path, dict(GRID, methods=['bf16']))
    assert len(seen) == 2


def test_baselines_and_spectral_in_one_grid(home, tmp_path, clean_code):
    grid = dict(models=['tiny', 'tiny+key_outliers'], methods=['baselines', 'spectral'], bits=[3], tasks=['prose'], length=[160], n=1, window=[16], sinks=[4], block=[64], calibration='prose', calibration_windows=4)
    report = go(home, tmp_path, grid)
    failed = json.loads((tmp_path / 'rows.failed.json').read_text()) if report['failed'] else {}
    assert {f['cell']['method'] for f in failed.values()} <= {'quanto', 'hqq'}, [f['error'] for f in failed.values()]
    methods = Counter(r['method'] for r in load_rows(tmp_path) if r['metric'] == 'kl_mean' and r['model'] == 'tiny')
    assert methods['spectral'] == 1 and methods['oscar'] == 3 and methods['turboquant'] == 8


def test_pages_and_their_plan_in_one_grid(home, tmp_path, clean_code):
    "The same windows for both; rows say which format."
    grid = dict(models=['tiny'], methods=['pages', {'method': 'pages', 'tiers': False}, {'method': 'spectral', 'home': 64, 'trellis': 0}], bits=[3], tasks=['prose'], length=[330], n=1, window=[16], sinks=[4], block=[128], calibration='prose', calibration_windows=4)
    assert not go(home, tmp_path, grid)['failed']
    found = load_rows(tmp_path)
    rows = {(r['method'], r['metric']): r for r in found if r.get('tiers', True)}
    even = {r['metric']: r['value'] for r in found if not r.get('tiers', True)}
    assert even['bits'] <= 3 and even['kl_mean'] != rows['pages', 'kl_mean']['value']
    assert rows['pages', 'kl_mean']['value'] > 0 and rows['pages', 'bits']['value'] <= 3 and rows['spectral', 'bits']['value'] <= 3.02
    assert rows['pages', 'kl_mean']['version'] == 2 and rows['spectral', 'kl_mean']['home'] == '64'
    with pytest.raises(ValueError, match='choose tiers or tokens'): search_from_plan(home, dict(trellis=0))
    versions = {c['method']: c.get('version') for c in cells_of(read_grid(dict(models=['tiny'], methods=['equalised', 'rotation', 'int'], bits=[4]))).values()}
    assert versions == dict(equalised=EQUALISED, rotation=None, int=2)
    paid = cells_of(read_grid(dict(models=['tiny'], methods=['pages', {'method': 'pages', 'tokens': 4096}], bits=[1])))
    assert [c['version'] for c in paid.values()] == [2, 3] # bases are stored otherwise where they are paid


def search_from_plan(home, options):
    cell = next(iter(cells_of(read_grid(dict(models=['tiny'], methods=[{'method': 'pages'} | options], bits=[3], calibration='prose'))).values()))
    from ndkv.search import make_cell
    return make_cell(cell, dict(data=home / 'data', zoo=home / 'zoo'))


def test_a_profile_is_measured_once_for_all_that_need_it(home, tmp_path, clean_code, monkeypatch):
    from ndkv import search
    grid, calls, measure = dict(models=['tiny'], methods=['spectral'], bits=[3], tasks=['prose'], length=[160], n=1, window=[16], sinks=[4], block=[64], calibration='prose', calibration_windows=4), [], search.calibrate
    monkeypatch.setattr(search, 'calibrate', lambda *a, **kw: calls.append(1) or measure(*a, **kw))
    def values(out, grid):
        go(home, out, grid, profiles=tmp_path/'profiles')
        return [r['value'] for r in load_rows(out) if r['metric'] == 'kl_mean']
    first, again = values(tmp_path/'a', grid), values(tmp_path/'b', grid)
    assert first == again and len(calls) == 1
    values(tmp_path/'c', dict(grid, block=[32]))
    assert len(calls) == 2 and len(list((tmp_path/'profiles').glob('*.safetensors'))) == 2


def test_a_calibration_on_several_texts(home, tmp_path, clean_code):
    "Is that of `mix_profiles`, its windows shared; refused where a text is named twice or there are too few windows."
    from ndkv import search
    from ndkv.fisher import mix_profiles
    (home/'data'/'code.txt').write_text(Path(search.__file__).read_text()[:20000])
    cells = lambda **kw: next(iter(cells_of(read_grid(dict(models=['tiny'], methods=['spectral'], bits=[3], block=[64], calibration_windows=4) | kw)).values()))
    where = dict(data=home/'data', zoo=home/'zoo')
    mixed = search._profile(cells(calibration='prose + code'), where)
    parts = [search._profile(cells(calibration=k, calibration_windows=2), where) for k in ('prose', 'code')]
    want = mix_profiles(parts)
    assert [d['name'] for d in mixed.data] == ['prose', 'code'] and all(torch.equal(a, b) for i in want.prices for a, b in zip(mixed.prices[i], want.prices[i]))
    assert {p.name for p in search._texts_of(cells(calibration='prose + code', tasks=['prose']), home/'data')} == {'prose.txt', 'code.txt'}
    for bad, message in ((dict(calibration='prose + prose'), 'different texts'), (dict(calibration='prose + code', calibration_windows=1), 'as many at least')):
        with pytest.raises(ValueError, match=message): cells(**bad)


@pytest.mark.parametrize('bad, message', [
    ({}, 'names no models'), ({'models': ['tiny'], 'task': ['x']}, "unknown field 'task'"), ({'models': ['tiny'], 'methods': ['rot']}, "'rot' is unknown"),
])
def test_a_wrong_grid_is_refused_at_once(home, tmp_path, bad, message):
    with pytest.raises(ValueError, match=message): go(home, tmp_path, bad)
    assert not (tmp_path / 'rows.jsonl').exists()


def test_a_grid_is_a_yaml_file(home, tmp_path, clean_code):
    (tmp_path / 'grid.yaml').write_text('models: tiny\nmethods: [rotation, {method: rotation, codebook: uniform}]\nbits: [3, [4, 2]]\ntasks: prose\nlength: 160\nn: 1\nwindow: 16\nsinks: 2\nblock: 8\n')
    assert len(go(home, tmp_path / 'out', tmp_path / 'grid.yaml')['done']) == 4
    assert Counter(r.get('codebook') for r in load_rows(tmp_path / 'out') if r['metric'] == 'kl_max') == {None: 2, 'uniform': 2}
    (tmp_path / 'bad.yaml').write_text('models: [tiny')
    with pytest.raises(ValueError, match='not YAML'): go(home, tmp_path, tmp_path / 'bad.yaml')


FAMILIES = {name: lambda name=name: zoo_config(name, **{k: v for k, v in SIZE.items() if (name, k) not in {('qwen2', 'head_dim'), ('neox', 'head_dim'), ('neox', 'num_key_value_heads')}}) for name in ZOO}
FAMILIES['gpt2'] = lambda: GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=2, n_positions=512, bos_token_id=0, eos_token_id=0)


def evaluated(folder, home, tmp_path, *more):
    "What the command line says of a folder."
    return CliRunner().invoke(app, ['evaluate', str(folder), '--data', str(home / 'data' / 'prose.txt'), '--length', '224', '--windows', '2', '--out', str(tmp_path), *more])


@pytest.mark.parametrize('name', FAMILIES)
def test_any_folder_is_evaluated(home, tmp_path, clean_code, name):
    torch.manual_seed(0)
    _, tokenizer = load_model(home / 'zoo' / 'tiny')
    save_model(AutoModelForCausalLM.from_config(FAMILIES[name]()), tokenizer, tmp_path / name)
    done = evaluated(tmp_path / name, home, tmp_path / 'out', '--method', 'int', '--bits', '8,2')
    assert done.exit_code == 0 and 'rows of run' in done.output, (done.output, done.exception)
    rows = load_rows(tmp_path / 'out' / 'methods.jsonl')
    assert {r['model'] for r in rows} == {name} and {r['data'] for r in rows} == {'prose'}
    kl = {(r['k_bits'], r['v_bits']): r['value'] for r in rows if r['metric'] == 'kl_mean'}
    assert 0 <= kl[None, None] < kl[8, 8] < kl[2, 2]


def test_what_cannot_be_evaluated_says_why(home, tmp_path, clean_code):
    _, tokenizer = load_model(home / 'zoo' / 'tiny')
    save_model(AutoModelForCausalLM.from_config(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)), tokenizer, tmp_path / 'mamba')
    def said(folder, *more): return str(evaluated(folder, home, tmp_path / 'out', '--method', *more).exception)
    assert 'no keys and values' in said(tmp_path / 'mamba', 'rotation')
    assert 'complete model folder' in said(tmp_path / 'nothing', 'rotation')
    assert 'bf17: choose among' in said(home / 'zoo' / 'tiny', 'bf17')
    assert 'oscar needs --profile' in said(home / 'zoo' / 'tiny', 'oscar')
    (tmp_path / 'mamba' / 'tokenizer.json').unlink()
    (tmp_path / 'mamba' / 'tokenizer_config.json').unlink()
    assert 'complete model folder' in said(tmp_path / 'mamba', 'rotation')


@pytest.mark.parametrize('path', sorted((ROOT / 'results' / 'grids').glob('*.yaml')), ids=lambda p: p.stem)
def test_the_grids_of_this_repository(path):
    "They are read, name designs of ours, their twins and the public checkpoints, and need no text that is not known."
    from ndkv.answers import ASKED
    from ndkv.models import DESIGNS
    from ndkv.public import recipes
    from ndkv.curves import PUBLIC
    from ndkv.stress import TWINS
    from ndkv.tasks import TASKS
    grid = read_grid(path)
    texts = {'wiki_val', 'wiki_cal', 'wikitext2_valid', 'wiki_long_eval', 'novels_held_out', 'mixed_cal'} # the last two are written by ndkv.data
    assert cells_of(grid) and {m.partition('+')[0] for m in grid['models']} <= {*DESIGNS, *PUBLIC, *(r['title'] for r in recipes().values())} and {m.partition('+')[2] for m in grid['models']} <= {'', *TWINS}
    assert set(grid['tasks']) <= texts | {*TASKS, *ASKED} and {grid['calibration'], grid['haystack']} <= texts | {None}


def workers():
    "Process ids of Ray workers under this process that are measuring a cell."
    parent, found = {}, []
    for p in Path('/proc').iterdir():
        try:
            if p.name.isdigit():
                parent[int(p.name)] = int((p / 'stat').read_text().rsplit(')', 1)[1].split()[1])
                if b'ray::attempt' in (p / 'cmdline').read_bytes(): found.append(int(p.name))
        except OSError: pass

    def mine(pid): return pid == os.getpid() or pid in parent and mine(parent[pid])
    return [pid for pid in found if mine(pid)]


def test_ray_with_two_workers_one_killed(home, tmp_path, clean_code, monkeypatch):
    ray = pytest.importorskip('ray', reason='ray is not installed: pip install ray')
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]))
    monkeypatch.setenv('RAY_ENABLE_UV_RUN_RUNTIME_ENV', '0')
    ray.init(address='local', num_cpus=2, include_dashboard=False, log_to_driver=False)
    grid, killed = dict(GRID, bits=[2, 3, 4, [4, 2], [3, 2], 6, 8]), []
    import ndkv.search as search
    publish = search._publish

    def then_kill(files, out): # when the third cell has been written, one of the workers dies
        publish(files, out)
        if not killed and len({r['key'] for r in load_rows(out / 'rows.jsonl')}) == 3 and (pids := workers()):
            os.kill(pids[0], signal.SIGKILL)
            killed.append(pids[0])
    monkeypatch.setattr(search, '_publish', then_kill)
    try: report = go(home, tmp_path, grid, ray='local')
    finally: ray.shutdown()
    assert killed and not report['failed'] and len(report['done']) == 30
    complete(tmp_path, grid)


CHOICES = 2, 3, 4, 6


@pytest.mark.parametrize('seed', range(5))
def test_the_path_is_the_frontier(seed):
    g = torch.Generator().manual_seed(seed)
    s = {(l, x): torch.rand(1, generator=g).item() ** 4 for l in range(2) for x in (0, 1)}
    prices = {(p, b): b + .125 for p in s for b in CHOICES}
    D = {b: distortion(lloyd_max(b)) for b in CHOICES}
    kl, cost = (lambda q: sum(s[p] * D[b] for p, b in q.items())), (lambda q: sum(prices[p, b] for p, b in q.items()))
    every = [dict(zip(s, bits)) for bits in itertools.product(CHOICES, repeat=4)]
    for q in bit_path(s, prices, CHOICES): assert kl(q) <= min(kl(o) for o in every if cost(o) <= cost(q) + 1e-9) * (1 + 1e-9)


@pytest.mark.parametrize('wish', [dict(budget=3.), dict(budget=4.4), dict(max_kl=.01)])
def test_a_recommendation_keeps_its_promise(home, wish):
    model, _ = load_model(home / 'zoo' / 'tiny', dtype=torch.float32)
    ids = torch.randint(0, 300, (4, 140), generator=torch.Generator().manual_seed(0))
    found = recommend(model, ids, **wish, choices=CHOICES, method="equalised", window=16, sinks=2, block=32, bar=False)
    assert found.choice['bits'] <= wish.get('budget', 9) and found.choice['kl'] <= wish.get('max_kl', 9)
    assert found.choice in found.points and 'choice' in str(found) and found.command in str(found)
    bits = [p['bits'] for p in found.points]
    assert bits == sorted(bits) and found.points[0]['kl'] > found.points[-1]['kl']
    assert abs(found.uniform[0]['kl'] - found.points[0]['kl']) < 1e-9 # both ends are the same setting
