"""Counts that say how dense the notebooks are; `make lint` prints them, and nothing fails on them.

    python nbs/_tools/style.py        a line for each wing
    python nbs/_tools/style.py all    and what stands out: long lines, functions of many tokens, long exported cells
"""
import ast
import io
import json
import sys
import tokenize
from statistics import median

from wings import WINGS, notebooks

WIDTH, TOKENS, LINES = 110, 400, 40 # columns of a line, tokens of a function, lines of an exported cell
SKIPPED = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER, tokenize.ENCODING}


def tokens(source):
    "Tokens of code; neither comments nor ends of lines."
    return sum(t.type not in SKIPPED for t in tokenize.generate_tokens(io.StringIO(source).readline))


def functions(source):
    "Functions of a cell with their tokens; those inside of others belong to them."
    out, rest = {}, list(ast.parse(source).body)
    while rest:
        node = rest.pop(0)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            out[node.name] = tokens('\n'.join(source.split('\n')[node.lineno - 1:node.end_lineno]))
        elif isinstance(node, ast.ClassDef): rest += node.body
    return out


def code(path):
    "Cells of code of a notebook, as (exported?, source without directives); and the words of its prose."
    cells = json.loads(path.read_text(encoding='utf8'))['cells']
    found = []
    for c in cells:
        source = ''.join(c['source'])
        if c['cell_type'] != 'code' or 'nbdev_export' + '(' in source or source.startswith('#| default_exp'): continue
        lines = source.split('\n')
        found.append((lines[0].startswith('#| export'), '\n'.join(l for l in lines if not l.startswith('#|')).strip('\n')))
    return found, sum(len(''.join(c['source']).split()) for c in cells if c['cell_type'] == 'markdown')


def count(path):
    "What one notebook has."
    cells, words = code(path)
    exported = [source for e, source in cells if e]
    lines = [l for _, source in cells for l in source.split('\n') if l.strip()]
    of_package = [l for source in exported for l in source.split('\n') if l.strip()]
    return dict(
        name=path.stem, words=words, lines=lines, exported=of_package, tokens=sum(map(tokens, exported)),
        cells=[len(s.split('\n')) for s in exported],
        wide=[l for l in lines if len(l) > WIDTH],
        large={f: n for s in exported for f, n in functions(s).items() if n > TOKENS},
        long=[len(s.split('\n')) for s in exported if len(s.split('\n')) > LINES])


def line(name, found):
    "The counts of some notebooks as one line."
    total = lambda key: sum(len(f[key]) for f in found)
    lines, exported, cells = total('lines'), total('exported'), [n for f in found for n in f['cells']]
    return (f'{name:8}{len(found):5}{lines:8}{exported/max(lines, 1):10.0%}{sum(f["tokens"] for f in found)/max(exported, 1):9.1f}'
            f'{median(cells) if cells else 0:9.0f}{sum(f["words"] for f in found)/max(lines, 1):8.1f}'
            f'{total("wide"):7}{total("large"):7}{total("long"):7}')


def main(what=''):
    print(f'{"wing":8}{"books":>5}{"lines":>8}{"exported":>10}{"tok/line":>9}{"cell":>9}{"words":>8}'
          f'{f">{WIDTH}":>7}{f">{TOKENS}t":>7}{f">{LINES}l":>7}')
    wings = {wing: [count(p) for p in notebooks() if p.parent.name == wing] for wing in WINGS}
    for wing, found in wings.items(): print(line(wing, found))
    print(line('all', [f for found in wings.values() for f in found]))
    if what != 'all': return
    for f in (f for found in wings.values() for f in found):
        if f['wide'] or f['large'] or f['long']:
            large = ', '.join(f'{name} {n}' for name, n in sorted(f['large'].items(), key=lambda x: -x[1]))
            print(f'{f["name"]}: {len(f["wide"])} lines over {WIDTH} columns; {len(f["long"])} exported cells over {LINES} lines {f["long"]}; {large}')


if __name__ == '__main__': main(*sys.argv[1:])
