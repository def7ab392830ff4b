"Tasks with an answer: sets by recipe, prompts that never hold their own answer, batches in step, programs apart, pairs that stay pairs."
import hashlib
import json
import os
import random
import tempfile
import time
import zipfile
from dataclasses import replace
from decimal import Decimal

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

import ndkv.answers as module
from conftest import ROOT
from ndkv import search
from ndkv.answers import (ASKED, TASKSETS, adjusted_interval, agent_windows, answer_rows, answers, check_tasks, final_number, folded, gsm8k_question,
                          humaneval_question, paired_drop, runs, taskset, taskset_recipes, tokens_read)
from ndkv.cache import NDCache
from ndkv.cli import main
from ndkv.data import EOT, train_tokenizer
from ndkv.evaluate import NOISE, Cell
from ndkv.fisher import calibrate
from ndkv.cache import make_plan
from ndkv.models import ZOO, save_model
from ndkv.results import load_rows, validate
from ndkv.tasks import answer_scores, by_rows, common_prefix, filler, greedy_batch, repeated, shared_prefix
from ndkv.probe import Halves
from reference import in_float64
from test_tasks import CELL, tiny

SUMS = [dict(id=f'sum-{i}', prompt=f'A box holds {i} pens, another {i + 2}. How many pens?', expected=f'{2 * i + 2:,}',
             upstream_answer=f'{i} + {i + 2} = <<{i}+{i + 2}={2 * i + 2}>>{2 * i + 2}.\n#### {2 * i + 2}') for i in range(60)]
BEES = [dict(id=f'bee {i}', question=f'What do {i} bees make?', choices=['Honey.', 'Wool.', 'Stone.'], expected_index=0) for i in range(40)]
BOATS = [dict(id=f's {i}', activity_label='Rowing', ctx=f'{i} people row. they', endings=['sing [step] on.', 'eat the boat.', 'fly.', 'melt.'], expected_index=i % 4) for i in range(40)]
CODE = [dict(task_id=f'f/{i}', prompt=f'def add_{i}(x):\n    """Add {i}."""\n', canonical_solution=f'    return x + {i}\n',
             test=f'def check(f):\n    assert f(1) == {i + 1}', entry_point=f'add_{i}') for i in range(40)]
TALK = [dict(messages=[dict(role='user', content=f'Count {i} files.'), dict(role='user', content='Now.'), dict(role='assistant', content=f'{i} of ' * 300)]) for i in range(6)]
MADE_UP = dict(gsm8k=SUMS, truthfulqa=BEES, hellaswag=BOATS, humaneval=CODE, agent=TALK)


@pytest.fixture(scope='module')
def tokenizer():
    text = filler(random.Random(0), 3000) + ' Question: Answer: True False #### 0123456789 +-*/=() return def """ [role] user assistant'
    return PreTrainedTokenizerFast(tokenizer_object=train_tokenizer([text], 400), eos_token=EOT, pad_token=EOT)


def write_sets(folder, sets=MADE_UP):
    "A wheel for each made-up set; their recipes."
    known = {}
    for name, rows in sets.items():
        file = 'cases.json' if name == 'agent' else 'cases.jsonl'
        data = json.dumps(dict(cases=rows)).encode() if name == 'agent' else ''.join(json.dumps(r) + '\n' for r in rows).encode()
        with zipfile.ZipFile(folder / f'set_{name}-1.0-py3-none-any.whl', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr(f'sets/{name}/{file}', data)
        known[name] = dict(name=name, package=f'set-{name}==1.0', file=f'sets/{name}/{file}', bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return known


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    "A model of random weights ends no answer by itself."
    for name, kind in TASKSETS.items(): monkeypatch.setitem(TASKSETS, name, replace(kind, new_tokens=min(kind.new_tokens, 12)))


@pytest.fixture
def sets(tmp_path, monkeypatch):
    "A data folder with the made-up sets, which stand in place of the real ones."
    monkeypatch.setenv('NDKV_TASKSETS', str(tmp_path / 'nowhere'))
    (tmp_path / 'data' / 'tasksets').mkdir(parents=True)
    known = write_sets(tmp_path / 'data' / 'tasksets')
    monkeypatch.setattr(module, 'taskset_recipes', lambda file=None: known)
    return tmp_path / 'data'


# --- sets -------------------------------------------------------------------------------------------------------------------------------

def test_recipes_are_whole():
    found = taskset_recipes()
    assert found.keys() == set(ASKED)
    for r in found.values():
        assert {'name', 'title', 'asks', 'origin', 'licence', 'package', 'download', 'file', 'bytes', 'sha256'} == r.keys()
        assert len(r['sha256']) == 64 and r['package'].count('==') == 1 and r['licence']['spdx'] in ('MIT', 'Apache-2.0')


def test_recipes_that_are_missing_or_damaged(tmp_path, monkeypatch):
    file = tmp_path / 'results' / 'public' / 'tasks.json'
    monkeypatch.setattr(module, 'files', lambda name: tmp_path / name)
    with pytest.raises(ValueError, match='not here'): taskset_recipes()
    file.parent.mkdir(parents=True)
    file.write_text('[{"name": ')
    with pytest.raises(ValueError, match='is damaged'): taskset_recipes()


@pytest.mark.parametrize('where', ['given', 'beneath', 'home', 'unpacked'])
def test_sets_are_found_as_wheels_and_unpacked(where, tmp_path, monkeypatch):
    monkeypatch.setenv('NDKV_TASKSETS', str(tmp_path / 'home'))
    place = tmp_path / dict(given='data', beneath='data/tasksets', home='home', unpacked='data')[where]
    place.mkdir(parents=True)
    known = write_sets(place)
    if where == 'unpacked':
        for wheel in place.glob('*.whl'):
            with zipfile.ZipFile(wheel) as z: z.extractall(place)
            wheel.unlink()
    for name, rows in MADE_UP.items(): assert taskset(name, tmp_path / 'data', known) == rows


def bad(path, how):
    data = path.read_bytes()
    if how == 'short': path.write_bytes(data[:-40])
    if how == 'empty': path.write_bytes(b'')
    if how == 'noise': path.write_bytes(data[:60] + bytes(20) + data[80:])
    if how == 'another':
        with zipfile.ZipFile(path, 'w') as z: z.writestr('sets/gsm8k/cases.jsonl', 'x' * 10_000_000)
    if how == 'no file':
        with zipfile.ZipFile(path, 'w') as z: z.writestr('elsewhere', 'x')
    if how == 'version': path.rename(path.with_name('set_gsm8k-1.1-py3-none-any.whl'))


@pytest.mark.parametrize('how', ['short', 'empty', 'noise', 'another', 'no file', 'version'])
def test_another_file_is_no_set(how, sets):
    bad(sets / 'tasksets' / 'set_gsm8k-1.0-py3-none-any.whl', how)
    for f in (lambda: taskset('gsm8k', sets), lambda: check_tasks(['gsm8k'], sets)):
        with pytest.raises(ValueError) as e: f()
        assert '\n' not in str(e.value) and 'set' in str(e.value)


# --- questions --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('text, number', [('#### 18', 18), ('#### -1,430.50 and 7', '-1430.5'), ('so $3, then 4.', 4), ('####: no. 5 or 6', 6), ('.5', '.5'), ('5 = 3.', 3), ('', None)])
def test_final_numbers(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_exactly():
    judge = gsm8k_question(SUMS[0] | dict(expected='1,000,000,000,000,000,001')).judge
    assert judge('#### 1000000000000000001.0', False) and not judge('#### 1000000000000000000', False) and not judge('none', False)


@pytest.mark.parametrize('name', list(TASKSETS))
@pytest.mark.parametrize('n', [1, 2, 7, None])
def test_no_question_stands_behind_its_own_answer(name, n, tokenizer):
    questions = [TASKSETS[name].question(r) for r in MADE_UP[name]]
    groups, asked = folded(questions, tokenizer, 300, n), []
    for text, group in groups:
        used = len(tokenizer(text)['input_ids'])
        assert 200 < used <= 310
        assert not any(q.ask in text for q in group) and any(q.solved in text for q in questions)
        asked += group
    assert sorted(q.name for q in asked) == sorted(q.name for q in questions[:n]) and groups == folded(questions, tokenizer, 300, n)


def test_the_right_answer_has_no_place_of_its_own():
    places = [TASKSETS['truthfulqa'].question(r).right for r in BEES]
    assert len(set(places)) == 3 and max(map(places.count, range(3))) < 25
    for name in ('truthfulqa', 'hellaswag'):
        for r in MADE_UP[name]:
            q, answer = TASKSETS[name].question(r), r.get('choices') or r['endings']
            assert q.choices[q.right] == answer[r['expected_index']].replace('[step] ', '') and len(q.choices) == len(answer)


def test_the_code_of_an_answer_ends_with_its_function(tokenizer):
    stop = TASKSETS['humaneval'].stop
    for tail in ('def g():', 'class A:', '# done', 'print(1)', '@x', '```', 'if True:', 'from x import y'):
        text = '    if x:\n        return [\n    1,\n]\n\n    return x\n'
        assert module._text(tokenizer, [], [], stop) == '' and module.re.split(stop, text + '\n\n' + tail)[0].rstrip() == text.rstrip()


# --- programs ---------------------------------------------------------------------------------------------------------------------------

OUTSIDE = os.path.join(tempfile.gettempdir(), 'ndkv-must-not-be')
FINE = ['pass', 'import math, re, collections, itertools, random, string, datetime, heapq, hashlib', 'print("x" * 10_000_000)', 'x = open("own.txt", "w"); x.write("a"); x.close(); assert open("own.txt").read() == "a"',
        'assert __name__ == "__main__"', 'import os; assert set(os.environ) <= {"PATH", "LD_LIBRARY_PATH", "OPENBLAS_NUM_THREADS", "LC_CTYPE"}', 'assert "é" == chr(233)', 'import os; assert os.listdir() == []']


@pytest.mark.parametrize('program', FINE)
def test_plain_programs_run(program): assert runs(program, execute=True)


BAD = ['assert False', 'raise SystemExit', 'exit(0)', 'import os; os._exit(0)', 'def (', 'input()', 'import sys; sys.exit()', 'quit()', '\0', 'x = [0] * (1 << 40)', 'x = bytearray(3 << 30)',
       'f = lambda n: f(n + 1)\nf(0)', 'import socket; socket.socket()', 'import socket; socket.create_connection(("127.0.0.1", 80))', 'import urllib.request as u; u.urlopen("http://127.0.0.1")',
       'import os; os.fork()', 'import os; os.system("true")', 'import subprocess; subprocess.run(["true"])', 'import os; os.execv("/bin/true", ["true"])', 'import os; os.kill(os.getppid(), 9)',
       'import os; os.posix_spawn("/bin/true", ["true"], {})', 'import ctypes; ctypes.CDLL(None)', f'open({OUTSIDE!r}, "w")', 'open("../ndkv-must-not-be", "w")', f'import os; os.open({OUTSIDE!r}, os.O_CREAT)',
       'import os; open("a", "w").close(); os.remove("a")', 'import os; os.mkdir("x")', 'import os; os.chdir("/")', 'import os; os.symlink("/", "t")', 'import shutil; shutil.rmtree("none", ignore_errors=True)', 'import multiprocessing as m; m.Process(target=print).start()',
       'open("big", "wb").write(bytes(1 << 22)); open("big", "ab").write(bytes(1 << 22))', 'x = [open("/dev/null") for _ in range(100)]']


@pytest.mark.parametrize('program', BAD, ids=range(len(BAD)))
def test_these_programs_are_no_success(program):
    assert not runs(program, execute=True, memory=1 << 30)
    assert not os.path.exists(OUTSIDE)


@pytest.mark.parametrize('program', ['while True: pass', 'import time; time.sleep(60)', 'import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass', '10**10**10'])
def test_programs_end_in_time(program):
    start = time.time()
    assert not runs(program, seconds=1, execute=True) and time.time() - start < 20


def test_nothing_of_ours_is_open_to_a_program(tmp_path):
    with open(tmp_path / 'secret', 'w') as f:
        os.set_inheritable(f.fileno(), True)
        assert runs(f'import os\ntry: os.fstat({f.fileno()})\nexcept OSError: pass\nelse: assert not os.readlink("/proc/self/fd/{f.fileno()}").endswith("secret")', execute=True)


def test_nothing_runs_unasked(tokenizer, sets, tmp_path, monkeypatch):
    monkeypatch.setattr(module.subprocess, 'Popen', lambda *a, **k: pytest.fail('a program was run'))
    q = humaneval_question(CODE[0])
    for f in (lambda: runs('pass'), lambda: q.judge('    return x', False), lambda: answers(tiny(), tokenizer, CELL, 'humaneval', CODE, 200), lambda: check_tasks(['humaneval'], sets)):
        with pytest.raises(ValueError, match='add --execute'): f()


# --- one prefix, many rows ----------------------------------------------------------------------------------------------------------------

def test_common_prefixes():
    rng = random.Random(0)
    for _ in range(300):
        rows = [[rng.randrange(2) for _ in range(rng.randrange(1, 6))] for _ in range(rng.randrange(1, 5))]
        n = max(n for n in range(7) if all(len(r) > n and r[:n] == rows[0][:n] for r in rows))
        assert common_prefix(rows) == rows[0][:n]


def method_cell(name, model):
    "A cell of a method; codes of a plan are measured on noise."
    shape = dict(window=16, sinks=2, block=128 if name == 'pages' else 16)
    if name == 'exact': return Cell('bf16', None, None, **shape)
    if name not in ('pages', 'spectral'): return Cell(name, 2 if name == 'kivi' else 3, 2 if name == 'kivi' else 3, **shape, options=dict(span=16) if name == 'kivi' else {})
    profile = calibrate(model, torch.randint(0, 400, (4, 256)), **shape, enough=1, bar=False)
    return Cell(name, 2., 2., **shape, options=dict(codecs=make_plan(name, profile, 2., shape['block'], 2, 16, 400, model, **({} if name == 'pages' else dict(trellis=0)))))


@pytest.mark.parametrize('name', ['exact', 'equalised', 'rotation', 'kivi', 'spectral', 'pages'])
def test_repeated_rows_are_rows_that_were_fed(name):
    "A copy holds what rows fed one by one hold, codecs are the same objects, and what goes on in a copy does not come back."
    model, g = tiny(), torch.Generator().manual_seed(0)
    cell, ids = method_cell(name, model), torch.randint(0, 400, (1, 330), generator=g)
    more = torch.randint(0, 400, (3, 40), generator=g)
    with torch.inference_mode():
        def fed(cache, ids, at):
            for a in range(0, ids.shape[1], at): model(ids[:, a:a+at], past_key_values=cache)
            return cache
        one, three = fed(cell.cache(model.config), ids, 11), fed(cell.cache(model.config), ids.expand(3, -1), 11)
        held = [x.clone() for layer in one.layers for x in (layer.keys, layer.values)]
        copy = repeated(one, 3)
        if name != 'exact': assert copy.layers[0].stores[0].packed.codec is one.layers[0].stores[0].packed.codec
        a, b = (model(more, past_key_values=fed(c, more, 1)).logits.log_softmax(-1) for c in (copy, three))
        assert torch.allclose(a, b, atol=2e-2) and one.get_seq_length() == 330
        assert all(torch.equal(x, y) for x, y in zip(held, (x for layer in one.layers for x in (layer.keys, layer.values))))


@pytest.mark.parametrize('name, batch', [('llama', 1), ('llama', 5), *((name, 3) for name in ZOO)])
def test_texts_in_step_are_what_each_row_would_choose(name, batch):
    "Every chosen token is the likeliest one, or nearly, when the row is fed alone, token by token."
    model, g = in_float64(tiny(name)), torch.Generator().manual_seed(3)
    random_ids = lambda n: torch.randint(0, 400, (n,), generator=g).tolist()
    prefix, ends = random_ids(60), lambda new: len(new) > 4 and new[-1] % 7 == 0
    prompts = [prefix + random_ids(n) for n in (1, 3, 22, 9)]
    assert len(shared_prefix(prompts, CELL)) >= 60
    for cell in (CELL, NOISE):
        texts = greedy_batch(model, prompts, cell, 14, ends, batch, bar=False)
        for prompt, new in zip(prompts, texts, strict=True):
            cache, logits = cell.cache(model.config, **({} if cell.exact else dict(memo=False))), None
            assert 0 < len(new) <= 14 and not any(ends(new[:i]) for i in range(1, len(new))) and (ends(new) or len(new) == 14)
            with torch.inference_mode():
                for i, t in enumerate(prompt + new):
                    if i >= len(prompt): assert logits.max() - logits[t] < 1e-2 * logits.abs().max()
                    logits = model(torch.tensor([[t]]), past_key_values=cache).logits[0, -1]


def test_a_cache_that_cannot_be_repeated_is_fed_anew():
    "Such as those of other libraries, which keep codes where nobody looks: the prefix is fed in as many rows."
    class Other(DynamicCache): pass
    model, g = in_float64(tiny()), torch.Generator().manual_seed(4)
    cell = Cell('bf16', None, None, 16, 2, 8)
    object.__setattr__(cell, 'cache', lambda config, memo=True: Other(config=config))
    prompts = [list(range(60)) + torch.randint(0, 400, (n,), generator=g).tolist() for n in (3, 9, 4)]
    assert not by_rows(Other(config=model.config)) and by_rows(DynamicCache(config=model.config)) and by_rows(NDCache(model.config))
    mine, other = (greedy_batch(model, prompts, c, 6, bar=False) for c in (Cell('bf16', None, None, 16, 2, 8), cell))
    assert [len(x) for x in mine] == [len(x) for x in other] == [6, 6, 6]
    scores = [answer_scores(model, [(p, [5, 6]) for p in prompts], c, bar=False) for c in (Cell('bf16', None, None, 16, 2, 8), cell)]
    assert all(abs(a[0] - b[0]) < 1e-6 for a, b in zip(*scores))


def test_a_prefix_is_read_once(monkeypatch):
    "64 continuations cost one prefix, not 64, in fed tokens."
    fed, body = [], Halves.body
    monkeypatch.setattr(Halves, 'body', lambda self, ids, **kw: (fed.append(ids.numel()), body(self, ids, **kw))[1])
    prompts = [list(range(300)) + [i, i + 1] for i in range(64)]
    greedy_batch(tiny(), prompts, CELL, 3, batch=16, bar=False)
    assert sum(fed) == 300 + 64 * 4


# --- asking -------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['llama', 'mistral', 'gemma'])
def test_read_tokens_are_those_of_the_cache(name):
    "The formula against a cache that is fed token by token and asked what its layers hold."
    model, held = tiny(name), []
    cache = CELL.cache(model.config, memo=False)
    with torch.inference_mode():
        for p in range(130):
            model(torch.tensor([[p]]), past_key_values=cache)
            held.append([layer.stores[0].packed.n for layer in cache.layers])
    packed, read = tokens_read(model, CELL, [([0] * 71, [0] * 60)])
    want = sum(sum(h) / len(h) for h in held[70:]) / 60
    assert abs(packed - want) < 1e-9 and packed < read <= 101
    assert tokens_read(model, NOISE, [([0] * 71, [0] * 60)])[0] == 0


@pytest.mark.parametrize('name', list(TASKSETS))
def test_every_kind_is_asked(name, tokenizer):
    model = tiny()
    found = {c: answers(model, tokenizer, c, name, MADE_UP[name], 300, n=5, batch=3, execute=True, bar=False) for c in (NOISE, CELL)}
    for cell, a in found.items():
        assert len(a.right) == 5 and 200 < a.prompt < 400 and a.names == [TASKSETS[name].question(r).name for r in MADE_UP[name][:5]]
        rows = {r['metric']: r for r in answer_rows(cell, name, 300, a, found[NOISE])}
        assert rows['accuracy']['value'] == sum(a.right) / 5 and rows['accuracy']['outcomes'] == ''.join(str(int(r)) for r in a.right)
        assert ('accuracy_drop' in rows) == (cell is CELL) and ('answer_nll' in rows) == bool(a.nll)
        assert not any('texts' in r for r in rows.values())
        assert rows['read_packed_share']['value'] == 0 if cell is NOISE else .8 < rows['read_packed_share']['value'] < 1


def test_batches_do_not_change_losses(tokenizer):
    nll = [answers(tiny(), tokenizer, CELL, 'hellaswag', BOATS, 300, n=6, batch=b, bar=False).nll for b in (1, 24)]
    assert all(abs(a - b) < 5e-3 for a, b in zip(*nll))


def test_a_model_that_computes_nothing_is_refused(tokenizer):
    model = tiny()
    with torch.no_grad(): model.model.norm.weight.fill_(float('nan'))
    with pytest.raises(ValueError, match='no finite number'): answers(model, tokenizer, NOISE, 'truthfulqa', BEES, 300, n=2, bar=False)


def test_what_does_not_fit_is_refused(tokenizer):
    model = tiny()
    model.config.max_position_embeddings = 305
    with pytest.raises(ValueError, match='305 positions'): answers(model, tokenizer, NOISE, 'gsm8k', SUMS, 300, n=2, bar=False)
    with pytest.raises(ValueError, match='give a shorter length'): answers(model, tokenizer, NOISE, 'gsm8k', SUMS, 100_000, n=2, bar=False)


# --- pairs --------------------------------------------------------------------------------------------------------------------------------

def test_drops_are_paired():
    rng = random.Random(0)
    for n in (1, 2, 30, 164):
        a, b = ([rng.random() < p for _ in range(n)] for p in (.6, .5))
        d = paired_drop(a, b)
        assert d['value'] == pytest.approx(100 * (sum(a) - sum(b)) / n) and d['lost'] - d['gained'] == sum(a) - sum(b)
        assert d['ci_adjusted'][0] < d['ci_adjusted'][1] and ('ci' in d) == (n > 1)
        if n > 1: assert d['ci'][0] <= d['value'] <= d['ci'][1]
    with pytest.raises(ValueError): paired_drop([True], [True, False])


def test_pairs_make_the_interval_narrow():
    "Two caches that agree on all but a few questions: independent samples of this size could not tell."
    a = [i % 2 == 0 for i in range(164)]
    d = paired_drop(a, [x and i > 6 for i, x in enumerate(a)])
    assert d['lost'] == 4 and d['ci'][1] - d['ci'][0] < 6 < 2 * 1.96 * 100 * (.5 / 164) ** .5


def test_the_interval_covers():
    "The adjusted interval holds the true drop in about 95 of 100 draws; 90 are asked for."
    rng, hits = random.Random(1), 0
    for _ in range(300):
        pairs = rng.choices([(1, 1), (0, 0), (1, 0), (0, 1)], [.6, .33, .05, .02], k=164)
        low, high = adjusted_interval(pairs.count((1, 0)), pairs.count((0, 1)), 164)
        hits += low <= 3 <= high
    assert hits > 270


# --- sweeps -------------------------------------------------------------------------------------------------------------------------------

GRID = dict(models=['tiny'], methods=['bf16', 'rotation'], bits=[4, 2], tasks=['gsm8k', 'hellaswag', 'humaneval'], length=[300], n=4, batch=8, window=[16], sinks=[2], block=[16])


@pytest.fixture
def zoo(tmp_path, tokenizer):
    save_model(tiny(), tokenizer, tmp_path / 'zoo' / 'tiny')
    return tmp_path / 'zoo'


def test_a_sweep_asks_full_precision_once(sets, zoo, tmp_path, clean_code, monkeypatch):
    asked, plain = [], search.answers
    monkeypatch.setattr(search, 'answers', lambda m, t, c, task, *a, **kw: (asked.append((task, str(c))), plain(m, t, c, task, *a, **kw))[1])
    go = lambda: search.sweep(GRID, tmp_path / 'out', 'rows', sets, zoo, bar=False, execute=True)
    report = go()
    assert (len(report['done']), report['failed']) == (9, []) and len(asked) == len(set(asked)) == 9
    rows = load_rows(tmp_path / 'out' / 'rows.jsonl', clean_only=True)
    assert {r['data'] for r in rows} == {'gsm8k', 'hellaswag', 'humaneval'} and all(r['protocol'] == module.PROTOCOL and r['length'] == 300 for r in rows)
    drops = [r for r in rows if r['metric'] == 'accuracy_drop']
    digits = {(r['data'], r['k_bits']): r['outcomes'] for r in rows if r['metric'] == 'accuracy'}
    assert len(drops) == 6
    for r in drops:
        lost = sum(a > b for a, b in zip(digits[r['data'], None], digits[r['data'], r['k_bits']], strict=True))
        assert r['lost'] == lost and len(r['ci']) == len(r['ci_adjusted']) == 2
    assert go() == dict(done=[], failed=[], skipped=report['done'])
    validate(tmp_path / 'out')
    assert 'set_gsm8k' in json.dumps([json.loads(x)['data'] for x in (tmp_path / 'out' / 'runs.jsonl').read_text().splitlines()])


def test_full_precision_is_asked_once_for_all_processes(sets, zoo, tmp_path, clean_code, monkeypatch):
    "What one process has asked lies beside the profiles, without any text of the set; another model or another set asks anew."
    asked, plain = [], search.answers
    monkeypatch.setattr(search, 'answers', lambda m, t, c, *a, **kw: (asked.append(c.exact), plain(m, t, c, *a, **kw))[1])
    def go(method, bits, **kw):
        del asked[:]
        grid = GRID | dict(tasks=['gsm8k'], methods=[method], bits=bits) | kw
        assert not search.sweep(grid, tmp_path / 'out', 'rows', sets, zoo, bar=False, profiles=tmp_path / 'profiles')['failed']
        return asked
    assert go('bf16', [4]) == [True] and go('rotation', [4, 2]) == [False, False] and go('int', [8], n=3) == [False, True]
    kept = sorted((tmp_path / 'profiles').glob('answers-*.json'))
    assert len(kept) == 2 and not any('pens' in p.read_text() for p in kept)


def test_a_sweep_says_first_what_cannot_be(sets, zoo, tmp_path, clean_code):
    go = lambda grid, data=sets, **kw: search.sweep(GRID | grid, tmp_path / 'out', 'rows', data, zoo, bar=False, **kw)
    with pytest.raises(ValueError, match='add --execute'): go({})
    with pytest.raises(ValueError, match='pip download --no-deps'): go(dict(tasks=['gsm8k']), tmp_path / 'empty')
    assert not (tmp_path / 'out' / 'rows.jsonl').exists() and not list((tmp_path / 'out').glob('*.failed.json'))
    with pytest.raises(ValueError, match='choose one of'): search.find_text('gsm9k', sets)


def test_the_command_line_asks_first(sets, zoo, tmp_path, capsys, clean_code):
    grid = tmp_path / 'grid.yaml'
    grid.write_text(json.dumps(GRID | dict(methods=['bf16'], tasks=['humaneval'])))
    call = ['sweep', str(grid), '--out', str(tmp_path / 'out'), '--name', 'rows', '--data', str(sets), '--models', str(zoo)]
    with pytest.raises(SystemExit) as e: main(call)
    err = capsys.readouterr().err
    assert e.value.code and 'add --execute' in err and err.strip().count('\n') == 0
    try: main([*call, '--execute'])
    except SystemExit as e: assert not e.code
    assert {r['metric'] for r in load_rows(tmp_path / 'out' / 'rows.jsonl')} >= {'accuracy', 'read_packed_share', 'prompt_tokens'}
    assert json.loads((tmp_path / 'out' / 'runs.jsonl').read_text().splitlines()[0])['command'].endswith('--execute')


def test_conversations_are_a_text(sets, zoo, tmp_path, clean_code):
    grid = GRID | dict(tasks=['agent'], length=[200], n=3, bits=[2])
    assert len(search.sweep(grid, tmp_path / 'out', 'rows', sets, zoo, bar=False)['done']) == 2
    rows = {(r['method'], r['metric']): r for r in load_rows(tmp_path / 'out' / 'rows.jsonl') if 'position' not in r}
    assert rows['rotation', 'kl_mean']['value'] > 1e-4 > rows['bf16', 'kl_mean']['value'] and len(rows['rotation', 'kl_mean']['ci']) == 2
    assert .5 < rows['rotation', 'read_packed_share']['value'] < 1 and rows['bf16', 'read_packed_share']['value'] == 0


def test_windows_of_conversations(tokenizer):
    assert agent_windows(TALK + TALK, tokenizer, 100, None).shape == (6, 100)
    found = agent_windows(TALK, tokenizer, 100, 3)
    assert found.shape == (3, 100) and len(found.unique(dim=0)) == 3 and tokenizer.decode(found[0]).startswith('user: Count 0 files.\n\nNow.')
    with pytest.raises(ValueError, match='no conversation has'): agent_windows(TALK, tokenizer, 100_000)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / 'results' / 'zoo' / 'tokenizer')
    tokenizer.chat_template = "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    assert tokenizer.decode(agent_windows(TALK, tokenizer, 100, 1)[0]).startswith('<user>Count 0 files.')


def test_the_grid_of_the_paper_is_sound():
    cells = search.cells_of(search.read_grid(ROOT / 'results' / 'grids' / 'answers.yaml'))
    assert {c['task'] for c in cells.values()} == set(TASKSETS) and all(c['protocol'] == module.PROTOCOL and c['n'] >= 164 for c in cells.values())
    old = search.cells_of(search.read_grid(ROOT / 'results' / 'grids' / 'tasks.yaml'))
    assert not any('protocol' in c for c in old.values())
