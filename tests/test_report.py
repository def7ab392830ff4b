"The report's parts: rows are found as a plain search finds them; nothing depends on which module came first."
import ast
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ndkv import origins, report, verdicts
from ndkv.book import KEYS, Book, Registry, joined, macro_name, rows_in, significant
from ndkv.comparisons import OTHERS
from ndkv.made_up import made_up_pages, made_up_rows, made_up_sweeps
from ndkv.page_costs import PAGE_CODES

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    'made_up book curves drawing figures speed_figures tables comparisons page_costs studies claims '
    'claims_compared verdicts numbers origins report').split()


@pytest.fixture(scope='module')
def book(tmp_path_factory):
    "All rows by formula in one folder."
    folder = tmp_path_factory.mktemp('results')
    made_up_rows(folder)
    made_up_sweeps(folder, OTHERS)
    made_up_pages(folder, ('llama', 'gemma'), PAGE_CODES)
    return Book(folder, clean_only=False)


@pytest.mark.parametrize('seed', range(4))
def test_rows_are_found_as_a_search_through_all_rows_finds_them(book, seed):
    draw = random.Random(seed)
    for _ in range(60):
        row = draw.choice(book.rows)
        fields = draw.sample([*KEYS, 'window', 'layer', 'home', 'tiers', 'profile'], draw.randrange(6))
        where = {k: row.get(k) for k in fields}
        if fields and draw.random() < .3: where[fields[0]] = draw.choice([None, 3, 3.0, True, 'none such'])
        slow = [r for r in book.rows if all(r.get(k) == v for k, v in where.items())]
        assert book.find(**where) == slow, where


def test_a_cell_has_one_answer_or_says_what_to_name(book):
    where = dict(file='frontier', method='rotation', metric='kl_mean', k_bits=3)
    with pytest.raises(ValueError, match="differ in 'sinks'; name it in the query"): book.cell(**where)
    with book.watch() as used: row = book.cell(window=0, **where)
    assert list(used.values()) == [row] and row['window'] == 0


def test_watching_inside_of_watching_counts_for_both(book):
    where = dict(file='frontier', method='rotation', metric='kl_mean', window=0)
    one, two = where | dict(k_bits=2), where | dict(k_bits=3)
    with book.watch() as outer:
        book.cell(**one)
        with book.watch() as inner: book.cell(**two)
    assert len(inner) == 1 and len(outer) == 2 and inner.keys() < outer.keys()


ORDER = '''
import importlib, json
for name in {names!r}: importlib.import_module('ndkv.' + name)
from ndkv import numbers, origins, report, verdicts
print(json.dumps([list(x) for x in (origins.FIGURES, report.TABLES, verdicts.CLAIMS, numbers.number)]))
'''


def test_figures_tables_claims_and_numbers_stand_in_one_order_whoever_is_imported_first():
    orders = []
    for names in (PARTS, ['claims_compared', 'page_costs', 'speed_figures', 'studies', 'origins']):
        env = dict(os.environ, PYTHONPATH=str(ROOT))
        code = [sys.executable, '-c', ORDER.format(names=names)]
        out = subprocess.run(code, env=env, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        orders.append(json.loads(out.stdout))
    assert orders[0] == orders[1]
    assert all(len(names) == len({*names}) for names in orders[0])


def test_a_part_imports_only_what_stands_before_it():
    for i, name in enumerate(PARTS):
        tree = ast.parse((ROOT / 'ndkv' / f'{name}.py').read_text(encoding='utf8'))
        found = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        found = [n for n in found if n.level or n.module.startswith('ndkv')]
        used = {(n.module or a.name).removeprefix('ndkv.') for n in found for a in n.names}
        assert not used & {*PARTS[i:]}, name


def test_a_name_is_given_once():
    a, b = Registry(), Registry()
    a('x')(len), b('x')(len)
    with pytest.raises(ValueError, match="'x' is defined already"): joined(a, b)
    with pytest.raises(ValueError, match="'x' is defined already"): a('x')(max)


def test_every_figure_and_table_is_made_of_these_rows_and_of_none(book, tmp_path):
    empty = Book(tmp_path)
    for b in (book, empty):
        texts, sources = report.texts_of(b)
        assert texts.keys() == {'numbers.tex', *(f'tables/{n}.tex' for n in report.TABLES)}
        assert all(t.count('\\begin{tabular}') == t.count('\\end{tabular}') for t in texts.values())
        places = {r['at'] for r in b.rows}
        assert all(places.issuperset(used) for used in sources.values())
    for name, text in texts.items():
        if name.startswith('tables/') and name not in ('tables/encoders.tex', 'tables/runs.tex'):
            assert 'notrun' in text or 'none' in text or '\\klRotation' in text, name
    assert origins.drawn_from(empty) == {name: set() for name in origins.drawn_from(book)}


def test_numbers_and_addresses_survive_printing():
    draw = random.Random(0)
    for _ in range(300):
        x = draw.choice([-1, 1]) * 10**draw.uniform(-9, 9)
        assert float(significant(x)) == float(f'{x:.2e}')
    text = r'\res{1}{results/a\_b.jsonl\#L7} and results/c.jsonl#L1'
    assert rows_in(text) == ['results/a_b.jsonl#L7', 'results/c.jsonl#L1']
    names = [*verdicts.CLAIMS]
    assert len({macro_name(n) for n in names}) == len(names) and all(macro_name(n).isalpha() for n in names)
