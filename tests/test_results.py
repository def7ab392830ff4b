"Provenance under stress: processes that die, processes that write at once, files that were cut or edited."
import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT, write_synthetic
from ndkv.results import Run, load_rows, merge, round6, validate, write_atomic


def python(code, **env):
    "A fresh interpreter that runs `code` with the package importable."
    env = dict(os.environ, PYTHONPATH=str(ROOT), **env)
    return subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], env=env, stdout=subprocess.PIPE, text=True)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_round6_is_close_and_idempotent(x):
    y = round6(x)
    assert math.isclose(x, y, rel_tol=5.1e-6, abs_tol=1e-300) or math.isinf(x * 10)
    assert round6(y) == y and json.loads(json.dumps(y)) == y


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_numbers_that_are_not_finite_never_reach_a_file(tmp_path, clean_code, bad):
    with pytest.raises(ValueError, match='result is'):
        with Run(tmp_path, command='x') as run: run.row(model='m', method='a', metric='kl_mean', value=bad)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_what_was_saved(tmp_path, clean_code):
    job = python(f'''
        import time
        from ndkv.results import Run
        with Run({str(tmp_path)!r}, command='long job', name='frontier') as run:
            for i in range(5): run.row(model='m', method='a', metric='kl_mean', value=i, head=i)
            run.save()
            for i in range(5, 9): run.row(model='m', method='a', metric='kl_mean', value=i, head=i)
            print('saved', flush=True)
            time.sleep(60)
    ''')
    assert job.stdout.readline() == 'saved\n'
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert validate(tmp_path, clean_only=True) == (5, 1)
    assert [r['value'] for r in load_rows(tmp_path)] == [0, 1, 2, 3, 4]


def test_two_writers_take_turns(tmp_path, clean_code):
    code = f'''
        from ndkv.results import Run
        for i in range(15):
            with Run({str(tmp_path)!r}, command='one of many', name='frontier') as run: run.row(model='m', method='a', metric='kl_mean', value=i)
    '''
    jobs = [python(code) for _ in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    assert validate(tmp_path) == (30, 30)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / 'x.txt', 'old')
    monkeypatch.setattr(os, 'replace', lambda *_: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError): write_atomic(path, 'new')
    assert path.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['x.txt']


@pytest.fixture
def rows(tmp_path, clean_code):
    write_synthetic(tmp_path)
    return tmp_path / 'frontier.jsonl'


@given(cut=st.integers(1, 60))
def test_a_cut_file_is_refused_with_its_line(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp('cut')
    (folder / 'runs.jsonl').write_text('{"run": "r1"}\n')
    line = '{"method": "a", "metric": "kl_mean", "model": "m", "run": "r1", "value": 1.5}\n'
    (folder / 'frontier.jsonl').write_text((line * 3)[:-cut])
    with pytest.raises(ValueError, match=r'frontier\.jsonl:3: line is cut off'): load_rows(folder)


@pytest.mark.parametrize('edit, message', [
    (lambda line: line.replace('"run": "', '"run": "x'), 'is not in runs.jsonl'),
    (lambda line: line.replace('"value": ', '"value": Infinity, "was": '), 'not a finite number'),
    (lambda line: line.replace('"value": ', '"value": "0.5", "was": '), 'not a finite number'),
    (lambda line: line.replace('"metric"', '"metrics"'), "has no 'metric'"),
    (lambda line: line.replace('{', '', 1), 'not a JSON object'),
    (lambda line: '[1, 2]\n', 'not a JSON object'),
])
def test_an_edited_line_is_named(rows, edit, message):
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text(''.join(lines[:6] + [edit(lines[6])] + lines[7:]))
    with pytest.raises(ValueError, match=rf'^frontier\.jsonl:7: .*{message}[^\n]*$'): validate(rows.parent)


def test_a_lost_run_a_lost_row_and_a_lost_file_are_noticed(rows):
    good, runs = rows.read_text(), rows.with_name('runs.jsonl')
    rows.write_text(good.split('\n', 1)[1])
    with pytest.raises(ValueError, match='wrote 64 rows, 63 are there'): validate(rows.parent)
    rows.write_text(good)
    runs.rename(runs.with_suffix('.old'))
    with pytest.raises(ValueError, match='no such results file'): validate(rows.parent)
    with pytest.raises(ValueError, match='no such results file or folder'): load_rows(rows.parent / 'none')


def test_runs_of_an_edited_tree_are_refused_for_the_paper(tmp_path, monkeypatch):
    monkeypatch.setenv('NDKV_COMMIT', 'abc')
    monkeypatch.delenv('NDKV_DIRTY', raising=False)
    write_synthetic(tmp_path)
    assert validate(tmp_path) == (64, 1)
    with pytest.raises(ValueError, match=r'frontier\.jsonl:1: run .* uncommitted changes'): validate(tmp_path, clean_only=True)


def test_merge_adds_once_and_checks_first(tmp_path, clean_code):
    a, b, home = tmp_path / 'a', tmp_path / 'b', tmp_path / 'home'
    write_synthetic(a), write_synthetic(b)
    assert merge(a, home) == 64 and merge(b, home) == 64
    assert validate(home, clean_only=True) == (128, 2)
    with pytest.raises(ValueError, match='already in'): merge(a, home)
    (b / 'frontier.jsonl').write_text((b / 'frontier.jsonl').read_text()[:-5])
    with pytest.raises(ValueError, match='cut off'): merge(b, tmp_path / 'other')
    assert not (tmp_path / 'other').exists() and validate(home) == (128, 2)
