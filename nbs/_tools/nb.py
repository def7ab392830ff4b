"""Notebook chores that nbdev 2.4 leaves to others: run and save, check, render the README.

    python nbs/_tools/nb.py run [NOTEBOOK ...]    execute, keep outputs (skipped cells keep the ones they had)
    python nbs/_tools/nb.py check                 notebooks clean, package and README in sync; nothing is written
    python nbs/_tools/nb.py lint                  numbers that were typed into the paper's prose
    python nbs/_tools/nb.py readme                write README.md from nbs/index.ipynb, nbs/README.md from the notebooks' titles
    python nbs/_tools/nb.py docs                  notebooks, modules, rows and figures as linked pages in _docs/
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import wings

ROOT, NBS = wings.ROOT, wings.NBS


def notebooks(names=()):
    "The notebooks called `names` (`40_cache`, `nbs/cache/40_cache.ipynb`), or all of them in reading order."
    found = wings.notebooks()
    if not names: return found
    wanted = {Path(n).name.removesuffix('.ipynb') for n in names}
    unknown = wanted - {f.stem for f in found}
    if unknown: sys.exit(f'no notebook called {sorted(unknown)[0]} in nbs/; there are: {" ".join(f.stem for f in found)}')
    return [f for f in found if f.stem in wanted]


def skipped(flags):
    "The rule of `nbdev_test`: which cells are not executed."
    def skip(cell):
        if cell.cell_type != 'code' or 'nbdev_export' + '(' in cell.source: return True
        directives = getattr(cell, 'directives_', {}) or {}
        if directives.get('eval:', [''])[0].lower() == 'false': return True
        return bool(flags & directives.keys())
    return skip


def run(path, force_flags=()):
    "Execute one notebook in its folder and write it back, cleaned, with the outputs of the cells that ran."
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    from nbdev.process import NBProcessor
    skip = skipped(set(get_config().tst_flags.split()) - set(force_flags))
    processed = NBProcessor(path, process=True).nb     # parses the `#|` directives, and strips them from the source
    os.chdir(path.parent)
    shell = CaptureShell(path)
    try: shell.run_all(processed, exc_stop=True, preproc=skip)
    except Exception: sys.exit(shell.prettytb(fname=path))
    nb = read_nb(path)
    for old, new in zip(nb.cells, processed.cells, strict=True):
        if old.cell_type == 'code' and not skip(new): # progress bars and warnings differ from run to run
            old['outputs'] = [o for o in new.get('outputs', []) if o.get('name') != 'stderr']
    clean_nb(nb)
    tmp = path.with_suffix('.tmp')
    write_nb(nb, tmp)
    os.replace(tmp, path)


def run_each(names, flags):
    "A fresh process for every notebook, so that none sees another's imports."
    for path in notebooks(names):
        print('running', path.relative_to(ROOT), flush=True)
        code = f'import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]; import nb; nb.run(nb.Path({str(path)!r}), {flags!r})'
        if subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=dict(os.environ, IN_TEST='1')).returncode:
            sys.exit(f'{path.relative_to(ROOT)}: a cell failed (see above); the notebook was left as it was')


def cell_markdown(cell):
    "One cell of the index as markdown: prose as it is, code fenced, text outputs beneath."
    source = cell.source.strip()
    if source.startswith('#| hide') or not source: return ''
    if cell.cell_type != 'code': return source
    code = '\n'.join(line for line in source.splitlines() if not line.startswith('#|'))
    parts = [f'```python\n{code.strip()}\n```']
    for out in cell.get('outputs', []):
        data = out.get('data', {})
        if 'text/markdown' in data: parts.append(''.join(data['text/markdown']).strip())
        else:
            text = ''.join(out.get('text', data.get('text/plain', ''))).rstrip()
            if text: parts.append('```text\n' + text + '\n```')
    return '\n\n'.join(parts)


def readme(root=ROOT):
    "The text of README.md: `nbs/index.ipynb` with the claims table put between its markers."
    sys.path.insert(0, str(root))
    from execnb.nbio import read_nb
    from ndkv.verdicts import readme_with_claims
    parts = [cell_markdown(c) for c in read_nb(root / 'nbs' / 'index.ipynb').cells]
    note = '<!-- Written by `make export` from nbs/index.ipynb; edit the notebook, not this file. -->'
    return readme_with_claims('\n\n'.join([note] + [p for p in parts if p]) + '\n', root / 'results')


def atlas():
    "The text of nbs/README.md."
    note = '<!-- Written by `make export` from the titles of the notebooks and `nbs/_tools/wings.py`. -->'
    return f'{note}\n\n# Notebooks\n\nWings, and notebooks in them, stand in reading order.\n\n{wings.atlas()}'


def differences(old, new, pattern):
    "Names of files that match `pattern` and differ between two trees, or are in one only."
    names = {p.relative_to(tree) for tree in (old, new) for p in tree.glob(pattern)}
    read = lambda p: p.read_bytes() if p.exists() else None
    return sorted(str(n) for n in names if read(old / n) != read(new / n))


def check():
    "Clean and export a copy of the tree, and compare: what differs is not clean or not in sync."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / 'copy'
        copy.mkdir()
        shutil.copy(ROOT / 'settings.ini', copy)
        for folder in ('nbs', 'ndkv'):
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns('__pycache__', '_tools', '.ipynb_checkpoints'))
        for tool in ('nbdev_clean', 'nbdev_export'):
            subprocess.run([Path(sys.executable).with_name(tool)], cwd=copy, check=True, stdout=subprocess.DEVNULL)
        problems = [f'nbs/{n}: not clean; run `make export`' for n in differences(NBS, copy / 'nbs', '**/*.ipynb')]
        problems += [f'ndkv/{n}: differs from its notebook; run `make export`' for n in differences(ROOT / 'ndkv', copy / 'ndkv', '**/*.py')]
    problems += [f'nbs/{n}: in no wing; move it into a folder of nbs/_tools/wings.py' for n in wings.strays()]
    for path, made, source in ((ROOT / 'README.md', readme(), 'nbs/index.ipynb and the claims'), (NBS / 'README.md', atlas(), 'the titles of the notebooks')):
        text = path.read_text(encoding='utf8') if path.exists() else ''
        if text != made: problems.append(f'{path.relative_to(ROOT)}: differs from {source}; run `make export`')
    print('\n'.join(problems) or f'notebooks clean, package and README in sync ({len(notebooks())} notebooks)')
    return bool(problems)


def docs():
    "The site in `_docs/`; fails on a link that leads nowhere."
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    import site_pages
    pages = site_pages.build(ROOT / '_docs')
    faults, n = site_pages.broken(ROOT / '_docs')
    print('\n'.join(faults) or f'{pages} pages in _docs/, {n} links lead somewhere; open _docs/index.html')
    return bool(faults)


def lint():
    "Fails on a measured number that the paper does not take from a macro."
    sys.path.insert(0, str(ROOT))
    from ndkv.report import lint_paper
    problems = lint_paper(ROOT)
    print('\n'.join(problems) or 'no number is typed into the paper')
    return bool(problems)


def main(command='', *args):
    flags = [a.removeprefix('--flags=') for a in args if a.startswith('--flags=')]
    names = [a for a in args if not a.startswith('--')]
    if command == 'run': return run_each(names, ' '.join(flags).split())
    if command == 'check': return check()
    if command == 'lint': return lint()
    if command == 'readme':
        (ROOT / 'README.md').write_text(readme(), encoding='utf8')
        (NBS / 'README.md').write_text(atlas(), encoding='utf8')
        return
    if command == 'docs': return docs()
    sys.exit(__doc__)


if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
