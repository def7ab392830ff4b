"The repository as a whole: what is committed, what is generated, what the command line promises."
import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from conftest import ROOT
from ndkv import report
from ndkv.verdicts import claims
from ndkv.cli import main

sys.path.insert(0, str(ROOT / 'nbs' / '_tools'))
import nb
import wings

TEXT = {'.py', '.ipynb', '.md', '.tex', '.sty', '.bib', '.txt', '.ini', '.json', '.jsonl', '.sh', '.toml', '.in', ''}


def command(*args, cwd=ROOT):
    "Run `ndkv` in this process (a fresh one spends seconds on imports); the same answer as `subprocess.run`."
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: main(list(args))
        except SystemExit as e: code = e.code or 0
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def files():
    "What git knows or would add; everything that is not ignored."
    names = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / n for n in names.split('\0') if n and (ROOT / n).is_file()]


def texts():
    return [(f, f.read_text(encoding='utf8')) for f in files() if f.suffix in TEXT and f.stat().st_size < 4_000_000]


def test_no_file_is_larger_than_16_megabytes():
    assert [str(f) for f in files() if f.stat().st_size > 16 * 2**20] == []


def test_no_path_of_somebodys_machine():
    pattern = re.compile(r'(?<![\w.])/(?:root|home|Users|work|tmp|mnt|scratch)/[\w.-]+|file:///')
    found = [f'{f.relative_to(ROOT)}: {m[0]}' for f, text in texts() if f.name != 'test_repository.py' and (m := pattern.search(text))]
    assert found == []


def test_nothing_is_left_to_be_done():
    words = 'TO' + 'DO', 'FIX' + 'ME', 'NotImplemented' + 'Error'
    assert [f'{f.relative_to(ROOT)}: {w}' for f, text in texts() for w in words if re.search(rf'\b{w}\b', text)] == []


def test_readme_is_rendered_from_the_index():
    assert (ROOT / 'README.md').read_text(encoding='utf8') == nb.readme()


def test_notebooks_start_and_end_as_they_should():
    for path in nb.notebooks():
        cells = json.loads(path.read_text())['cells']
        source = [''.join(c['source']) for c in cells]
        assert re.match(r'# .+', source[0]), path.name
        if path.stem == 'index': continue
        assert re.search(r'^> .+', source[0] + '\n' + source[1], re.M), f'{path.name}: no subtitle'
        exports = any(s.startswith(('#| export', '#| exporti')) for s in source)
        assert any(s.startswith('#| default_exp ') for s in source) or not exports, f'{path.name}: no module'
        assert 'nbdev_export()' in source[-1] and source[-1].startswith('#| hide'), f'{path.name}: last cell'


def test_the_map_names_every_notebook():
    assert wings.strays() == [] and (wings.NBS / 'README.md').read_text(encoding='utf8') == nb.atlas()
    assert all(f'({f.parent.name}/{f.name})' in nb.atlas() for f in wings.notebooks()[1:])


def imported(tree):
    "Modules of this package that are imported when a module is: not those that a function asks for."
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom): continue
        if node.level == 1: yield from [node.module] if node.module else [n.name for n in node.names]
        elif node.module == 'ndkv': yield from (n.name for n in node.names)
        elif (node.module or '').startswith('ndkv.'): yield node.module[5:]


def test_no_module_needs_one_of_a_later_notebook():
    place = {}
    for i, path in enumerate(wings.notebooks()):
        for c in json.loads(path.read_text(encoding='utf8'))['cells']:
            if m := re.match(r'#\| default_exp (\w+)', ''.join(c['source'])): place[m[1]] = i
    assert len(place) > 60
    trees = {m: ast.parse((ROOT / 'ndkv' / f'{m}.py').read_text(encoding='utf8')) for m in place}
    assert [f'{m} imports {n}' for m, tree in trees.items() for n in imported(tree) if place.get(n, -1) >= place[m]] == []


def test_constraints_are_exact_and_satisfy_the_package():
    lines = [l for l in (ROOT / 'constraints.txt').read_text().splitlines() if l and not l.startswith('#')]
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+', l) for l in lines)
    pins = {l.split('==')[0].lower().replace('-', '_'): l.split('==')[1] for l in lines}
    settings = (ROOT / 'settings.ini').read_text()
    for key in ('requirements', 'dev_requirements'):
        for text in re.search(rf'^{key} = (.*)$', settings, re.M)[1].split():
            want = Requirement(text)
            assert want.specifier.contains(pins[want.name.lower().replace('-', '_')]), text


def test_the_package_imports_no_notebook_tools_and_draws_only_in_the_report():
    code = ('import sys, pkgutil, importlib, ndkv\n'
            'for m in pkgutil.iter_modules(ndkv.__path__, "ndkv."): importlib.import_module(m.name)\n'
            'print([m for m in ("nbdev", "fastcore", "matplotlib", "seaborn", "pandas", "IPython") if m in sys.modules])')
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    assert subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True).stdout == '[]\n'


def test_make_help_names_every_promised_target():
    out = subprocess.run(['make', 'help'], cwd=ROOT, capture_output=True, text=True).stdout
    for target in 'reproduce test verify export lint compile demo train evaluate paper'.split(): assert f'make {target} ' in out, target


def test_claims_as_json():
    out = command('claims', '--json')
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout)
    assert {'reference_ppl', 'kl_rotation_2bit', 'kl_rotation_3bit', 'kl_rotation_4bit'} <= {c['id'] for c in found}
    for c in found:
        assert list(c) == ['id', 'value', 'unit', 'target', 'met', 'rows']
        assert isinstance(c['met'], bool) and isinstance(c['unit'], str) and isinstance(c['target'], str)
        assert c['value'] is None and c['rows'] == [] and not c['met'] or isinstance(c['value'], (int, float)) and c['rows']
        assert all(re.fullmatch(r'results/[\w.-]+\.jsonl#L\d+', r) for r in c['rows'])


def test_a_fresh_report_verifies_in_a_fresh_process(small_repository):
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    code = 'from ndkv.cli import main; main()'
    out = subprocess.run([sys.executable, '-c', code, 'verify'], cwd=small_repository, env=env, capture_output=True, text=True)
    assert (out.returncode, out.stderr) == (0, '') and 'follow from results/' in out.stdout


DIGIT = re.compile(r'("value": \d*\.?\d*)(\d)')


def change_last_digit(path, line):
    "Another last digit in the value of one row, as a slip of the hand would leave it."
    lines = path.read_text().splitlines(keepends=True)
    lines[line - 1], n = DIGIT.subn(lambda m: m[1] + str((int(m[2]) + 1) % 10), lines[line - 1], count=1)
    assert n == 1
    path.write_text(''.join(lines))


@pytest.mark.parametrize('line', [1, 9, 17, 25, 40, 64])
def test_one_changed_digit_fails_and_is_located(small_repository, line):
    change_last_digit(small_repository / 'results' / 'frontier.jsonl', line)
    out = command('verify', cwd=small_repository)
    assert out.returncode == 1 and 'run `ndkv report`' in out.stderr
    assert f'paper/generated/ledger.txt:{line}' in out.stdout
    assert f'results/frontier.jsonl#L{line}' in out.stdout
    assert 'committed:' in out.stdout and 'regenerated:' in out.stdout


def test_a_changed_claim_is_found_in_readme_numbers_and_figure(small_repository):
    rows = (small_repository / 'results' / 'frontier.jsonl').read_text().splitlines()
    line = next(i for i, r in enumerate(map(json.loads, rows), 1) if r.get('k_bits') == 3 and r['window'] == 128 and r['metric'] == 'kl_mean')
    text = rows[line - 1].replace('"value": 0.0125', '"value": 0.0225')
    (small_repository / 'results' / 'frontier.jsonl').write_text('\n'.join(rows[:line - 1] + [text] + rows[line:]) + '\n')
    faults = report.verify(small_repository)
    named = {f.split('\n')[0].split(':')[0].split(' ')[0] for f in faults}
    expected = {'paper/generated/ledger.txt', 'paper/generated/numbers.tex', 'paper/generated/tables/quality.tex', 'paper/generated/tables/claims.tex', 'README.md', 'results/history.json'} # the changed value misses its target
    if not report.unpinned(ROOT): expected |= {'paper/generated/figures/frontier.pdf', 'paper/generated/figures/frontier.svg'}
    assert named == expected
    assert all(f'results/frontier.jsonl#L{line}' in f for f in faults if not any(w in f for w in ('claims.tex', 'figures', 'history')))


def test_an_edited_or_missing_generated_file_is_found(small_repository):
    generated = small_repository / 'paper' / 'generated'
    (generated / 'tables' / 'quality.tex').write_text((generated / 'tables' / 'quality.tex').read_text().replace('0.0125', '0.0115'))
    (generated / 'numbers.tex').unlink()
    (generated / 'tables' / 'extra.tex').write_text('x')
    named = [f.split('\n')[0] for f in report.verify(small_repository)]
    assert any(n.startswith('paper/generated/tables/quality.tex:') for n in named)
    assert any(n.startswith('paper/generated/numbers.tex is missing') for n in named)
    assert any(n.startswith('paper/generated/tables/extra.tex is made by nothing') for n in named)


def test_a_number_typed_into_the_paper_is_found(small_repository):
    paper = small_repository / 'paper' / 'main.tex'
    paper.write_text(paper.read_text().replace(r'\klRotationThreeBit', '0.0125', 1))
    assert any("'0.0125' is typed into the prose" in f for f in report.verify(small_repository))


@pytest.mark.parametrize('damage, message', [
    (lambda text: text[:-10], r'frontier\.jsonl:64: line is cut off'),
    (lambda text: text.replace('"run": "', '"run": "x', 1), r"frontier\.jsonl:1: run 'x.*' is not in runs\.jsonl"),
    (lambda text: text.replace('"value": ', '"value": NaN, "was": ', 1), r'frontier\.jsonl:1: value is NaN'),
])
def test_damaged_results_are_one_line_and_exit_code_1(small_repository, damage, message):
    path = small_repository / 'results' / 'frontier.jsonl'
    path.write_text(damage(path.read_text()))
    before = {p: p.read_bytes() for p in (small_repository / 'paper').rglob('*') if p.is_file()}
    for what in ('verify', 'report', 'claims'):
        out = command(what, cwd=small_repository)
        assert out.returncode == 1 and out.stdout == ''
        assert re.fullmatch(rf'ndkv: {message}.*\n', out.stderr), out.stderr
    assert {p: p.read_bytes() for p in (small_repository / 'paper').rglob('*') if p.is_file()} == before


def test_rows_of_uncommitted_code_do_not_enter_the_paper(small_repository, monkeypatch):
    runs = small_repository / 'results' / 'runs.jsonl'
    runs.write_text(runs.read_text().replace('"dirty": false', '"dirty": true'))
    out = command('report', cwd=small_repository)
    assert out.returncode == 1 and 'uncommitted changes' in out.stderr


def test_missing_rows_leave_a_mark_and_a_claim_that_is_not_met(small_repository):
    for path in (small_repository / 'results').iterdir(): path.unlink()
    report.report(small_repository)
    assert r'\notrun{}' in (small_repository / 'paper/generated/tables/quality.tex').read_text()
    assert all(not c['met'] and c['value'] is None for c in claims(small_repository / 'results'))
    assert report.verify(small_repository) == []


def test_outside_a_checkout_the_command_says_so(tmp_path):
    out = command('verify', cwd=tmp_path)
    assert out.returncode == 1 and 'not inside a checkout' in out.stderr and out.stderr.count('\n') == 1


@pytest.mark.parametrize('args', [['verfy'], ['claims', '--jsn'], ['demo', '--new-tokens', 'many']])
def test_wrong_usage_is_exit_code_2(args):
    assert command(*args).returncode == 2
