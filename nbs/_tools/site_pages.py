"""The notebooks, the modules exported from them, the rows and the figures as static pages that link to each other.

Nothing is executed and nothing is loaded from elsewhere: formulas become MathML, pictures are embedded. `broken` follows every link of the result.
"""
import ast
import base64
import html
import json
import re
import shutil
from html.parser import HTMLParser
import sys
from pathlib import Path
from urllib.parse import unquote

from execnb.nbio import read_nb
from latex2mathml.converter import convert
from nbconvert.filters.ansi import strip_ansi
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

sys.path.insert(0, str(Path(__file__).parent))
from wings import ROOT, WINGS, atlas, notebooks

AT = re.compile(r'# %% \.\./nbs/(?:\w+/)?([\w.]+)\.ipynb #(\w+)') # What an exported cell begins with

STYLE = '''
:root { --ink: #1a1a1a; --soft: #5b6470; --line: #d9dee3; --link: #00507a; --pale: #f5f7f9; --mark: #d55e00; }
* { box-sizing: border-box } html { scroll-behavior: smooth; scroll-padding-top: 1rem }
body { margin: 0; color: var(--ink); font: 16px/1.58 Georgia, 'DejaVu Serif', 'Times New Roman', serif; display: grid; grid-template-columns: 17.5rem minmax(0, 1fr) }
nav { position: sticky; top: 0; height: 100vh; overflow-y: auto; border-right: 1px solid var(--line); padding: 1.2rem .9rem 3rem 1.2rem; font: 13.5px/1.42 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif; background: var(--pale) }
nav h2 { border: 0; padding: 0; font-size: 11px; letter-spacing: .07em; text-transform: uppercase; color: var(--soft); margin: 1.3rem 0 .35rem }
nav ul { list-style: none; margin: 0; padding: 0 } nav li { margin: .16rem 0 } nav li li { padding-left: .9rem; font-size: 12.5px }
nav a { color: var(--ink) } nav .here > a { color: var(--mark); font-weight: 600 } nav .name { font-size: 19px; font-weight: 700 } nav small { color: var(--soft) }
main { padding: 1.6rem 2.6rem 4rem; max-width: 58rem; min-width: 0 }
a { color: var(--link); text-decoration: none } a:hover { text-decoration: underline } h1, h2, h3 { line-height: 1.22; font-family: 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif }
h1 { font-size: 2rem; margin: .3rem 0 .6rem } h2 { font-size: 1.4rem; margin: 2.4rem 0 .7rem; padding-top: .5rem; border-top: 1px solid var(--line) } h3 { font-size: 1.12rem; margin: 1.7rem 0 .5rem }
h1 .anchor, h2 .anchor, h3 .anchor { visibility: hidden; color: var(--line); padding-left: .4rem } :hover > .anchor { visibility: visible }
blockquote { margin: .5rem 0 1.2rem; padding-left: 1rem; border-left: 3px solid var(--line); color: var(--soft) }
pre, code { font: 13px/1.5 'DejaVu Sans Mono', Menlo, Consolas, monospace } code { background: var(--pale); padding: .08em .28em; border-radius: 3px } pre code { padding: 0; background: none }
pre { margin: 0; padding: .7rem .9rem; overflow-x: auto; background: var(--pale); border: 1px solid var(--line); border-radius: 4px } .out pre { background: white; border-style: dashed; color: #333 }
.cell { margin: .9rem 0; position: relative } .out { margin: .45rem 0 0 } .out img, figure img, p img { max-width: 100%; height: auto } figure { margin: 1rem 0 }
.tag { font: 11px/1 'Helvetica Neue', Arial, sans-serif; color: var(--soft); position: absolute; right: .4rem; top: -.7rem; padding: .15rem .35rem; background: white; border: 1px solid var(--line); border-radius: 3px } .where { font: 13px 'Helvetica Neue', Arial, sans-serif; color: var(--soft) }
table { border-collapse: collapse; font-size: 13.5px; margin: .8rem 0; display: block; overflow-x: auto } th, td { padding: .28rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top } th { border-bottom: 1.5px solid var(--soft) }
.math { margin: .9rem 0; overflow-x: auto; text-align: center } math { font-size: 1.06em } tr:target, .cell:target, pre span:target { background: #fdf0df } .rows td:nth-child(3) { font-variant-numeric: tabular-nums } .rows { font-size: 12.5px } .ends { display: flex; justify-content: space-between; margin-top: 3rem; border-top: 1px solid var(--line); padding-top: .8rem }
.linenos { color: #b3bac2; padding-right: .8rem; user-select: none } details { display: inline } details[open] { display: block } details summary { cursor: pointer; color: var(--soft) }
@media (max-width: 60rem) { body { display: block } nav { position: static; height: auto; border: 0 } main { padding: 1rem 1.1rem 3rem } }
'''


class Places:
    "What can be linked to: notebooks, public names and cells of modules, rows of results."
    def __init__(self):
        self.notebooks = {f.stem: read_nb(f) for f in notebooks()}
        self.files = {f.stem: str(f.relative_to(ROOT)) for f in notebooks()}
        self.titles = {n: next((l[2:] for c in nb.cells if c.cell_type == 'markdown' for l in c.source.splitlines() if l.startswith('# ')), n) for n, nb in self.notebooks.items()}
        self.module_of = {n: m for n, nb in self.notebooks.items() if (m := next((w[1] for c in nb.cells for w in [re.match(r'#\| default_exp ([\w.]+)', c.source)] if w), None))}
        self.modules = {m: (ROOT / 'ndkv' / f'{m}.py').read_text(encoding='utf8') for m in self.module_of.values()}
        self.rows = {f.stem: f.read_text(encoding='utf8').splitlines() for f in sorted((ROOT / 'results').glob('*.jsonl'))}
        self.cells, self.names = {}, {}
        for m, source in self.modules.items():
            for i, line in enumerate(source.splitlines(), 1):
                if w := AT.match(line): self.cells[w[1], w[2]] = m, i
            for node in ast.parse(source).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'): self.names.setdefault(node.name, (m, node.lineno))

    def row(self, name, line):
        "Page of one row, None where there is none."
        return f'results/{name}.html#L{line}' if 0 < int(line) <= len(self.rows.get(name, ())) else None

    def code(self, text):
        "Where a word in code font leads: a notebook, a module, a public name, a row."
        if w := re.fullmatch(r'(?:nbs/)?(?:\w+/)?(\w+?)(?:\.ipynb)?', text):
            if w[1] in self.notebooks and re.match(r'\d\d_', w[1]): return f'{w[1]}.html'
        if w := re.fullmatch(r'(?:results/)?(\w+)\.jsonl(?:#L(\d+))?', text):
            return self.row(w[1], w[2]) if w[2] else f'results/{w[1]}.html' if w[1] in self.rows else None
        if text.startswith('ndkv.') and text[5:] in self.modules: return f'modules/{text[5:]}.html'
        name = text.removesuffix('()').split('(')[0].split('.')[-1] if '.' in text or '(' in text else text
        if len(name) > 3 and name in self.names: return 'modules/{}.html#line-{}'.format(*self.names[name])

    def link(self, url):
        "A link of the repository as one of the site; None where it leads to a file that has no page."
        if re.match(r'[a-z]+:|#', url): return url
        path, _, anchor = url.partition('#')
        anchor = '#' + anchor if anchor else ''
        name = Path(path).name
        if path.endswith('.ipynb') and name[:-6] in self.notebooks: return f'{name[:-6]}.html{anchor}'
        if w := re.fullmatch(r'(?:\.\./)*results/(\w+)\.jsonl', path): return self.row(w[1], anchor[2:]) if anchor else f'results/{w[1]}.html'
        if '/generated/figures/' in path: return f'figures/{Path(path).stem}.svg'
        if w := re.fullmatch(r'(?:\.\./)*ndkv/(\w+)\.py', path): return f'modules/{w[1]}.html'


def mathml(text, display):
    "A formula as MathML; TeX in code font where it cannot be converted."
    try: out = convert(text.strip(), display='block' if display else 'inline')
    except Exception: return f'<code>{html.escape(text)}</code>'
    return out if '\\' not in out else convert(text.strip().replace(r'\langle', '⟨').replace(r'\rangle', '⟩'), display='block' if display else 'inline')


def slug(text):
    "An anchor of a heading."
    return re.sub(r'[^\w-]+', '-', html.unescape(re.sub('<[^>]+>', '', text))).strip('-').lower()


class Prose(IPythonRenderer):
    "Markdown of a notebook with formulas, anchors and links of the site."
    def __init__(self, places, up=''):
        super().__init__(escape=False)
        self.places, self.up, self.headings = places, up, []

    def block_math(self, body): return f'<div class="math">{mathml(body, True)}</div>'
    def inline_math(self, body): return mathml(body, False)

    def heading(self, text, level, **attrs):
        anchor = slug(text)
        while anchor in (h[1] for h in self.headings): anchor += '-'
        self.headings.append((level, anchor, re.sub('<[^>]+>', '', text)))
        return f'<h{level} id="{anchor}">{text}<a class="anchor" href="#{anchor}">#</a></h{level}>\n'

    def codespan(self, text):
        place = self.places.code(html.unescape(text))
        code = f'<code>{html.escape(html.unescape(text))}</code>'
        return f'<a href="{self.up}{place}">{code}</a>' if place else code

    def link(self, text, url, title=None):
        place = self.places.link(url)
        if place is None: return text
        inner = re.sub(r'</?a\b[^>]*>', '', text)
        return f'<a href="{html.escape(place if re.match("[a-z]+:|#", place) else self.up + place)}">{inner}</a>'

    def image(self, text, url, title=None):
        place = self.places.link(url) or url
        return f'<img alt="{html.escape(text)}" src="{html.escape(place)}">'


def outputs(cell, prose):
    "What a cell printed and drew."
    parts = []
    for out in cell.get('outputs', []):
        data, join = out.get('data', {}), ''.join
        if 'image/svg+xml' in data: parts.append(embedded('svg+xml', join(data['image/svg+xml']).encode()))
        elif 'image/png' in data: parts.append(embedded('png', base64.b64decode(join(data['image/png']))))
        elif 'text/markdown' in data: parts.append(MarkdownWithMath(prose).render(join(data['text/markdown'])))
        elif 'text/html' in data: parts.append(join(data['text/html']))
        elif text := strip_ansi(join(out.get('text', data.get('text/plain', '')))).rstrip(): parts.append(f'<pre>{html.escape(text)}</pre>')
    return ''.join(f'<div class="out">{p}</div>' for p in parts)


def embedded(kind, data):
    "A picture as part of the page."
    return f'<img alt="output of the cell above" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def cells(name, places):
    "The body of a notebook's page and its headings."
    prose, parts = Prose(places), []
    if name in places.module_of: parts.append(f'<p class="where">notebook <code>{places.files[name]}</code>, module <a href="modules/{places.module_of[name]}.html"><code>ndkv.{places.module_of[name]}</code></a></p>')
    for cell in places.notebooks[name].cells:
        if re.match(r'#\| (hide|default_exp)', cell.source) or 'nbdev_export' + '(' in cell.source or not cell.source.strip(): continue
        if cell.cell_type == 'markdown': parts.append(MarkdownWithMath(prose).render(cell.source))
        elif cell.cell_type == 'code':
            code = '\n'.join(l for l in cell.source.splitlines() if not l.startswith('#|')).strip()
            at = places.cells.get((name, cell.id))
            tag = f'<a class="tag" href="modules/{at[0]}.html#line-{at[1]}">exported to ndkv/{at[0]}.py</a>' if at else ''
            parts.append(f'<div class="cell" id="cell-{cell.id}">{tag}{highlight(code, PythonLexer(), HtmlFormatter(nowrap=False)) if code else ""}{outputs(cell, prose)}</div>')
    return '\n'.join(parts), prose.headings


def module(name, places):
    "A module with numbered lines; each cell leads back to its notebook."
    lines = highlight(places.modules[name], PythonLexer(), HtmlFormatter(nowrap=True)).splitlines()
    plain = places.modules[name].splitlines()
    out = []
    for i, (line, source) in enumerate(zip(lines, plain), 1):
        if w := AT.match(source): line = f'<a href="../{w[1]}.html#cell-{w[2]}">{line}</a>'
        out.append(f'<span id="line-{i}"><span class="linenos">{i:4}</span>{line}</span>')
    home = next(n for n, m in places.module_of.items() if m == name)
    return f'<h1>ndkv.{name}</h1><p class="where">exported from <a href="../{home}.html">{places.files[home]}</a>; edit the notebook, not the module</p><div class="highlight"><pre>' + '\n'.join(out) + '</pre></div>'


def rows(name, places):
    "All rows of a results file, or all runs, one a line of the table."
    runs = {json.loads(l)['run']: i for i, l in enumerate(places.rows.get('runs', []), 1)}
    parts = [f'<h1>results/{name}.jsonl</h1><table class="rows"><tr><th>line</th><th>what</th><th>value</th><th>where</th></tr>']
    for i, line in enumerate(places.rows[name], 1):
        row = json.loads(line)
        what, value = (row.pop('command', ''), '') if name == 'runs' else (row.pop('metric', ''), row.pop('value', ''))
        run = row.pop('run', None)
        source = '' if name == 'runs' or run not in runs else f' <a href="runs.html#L{runs[run]}">run {run}</a>'
        fields = ', '.join(f'{html.escape(k)} {html.escape(json.dumps(v, ensure_ascii=False) if not isinstance(v, str) else v)}' for k, v in row.items())
        parts.append(f'<tr id="L{i}"><td>{i}</td><td>{html.escape(str(what))}</td><td>{value}</td><td>{run + ": " if name == "runs" else ""}{fields}{source}</td></tr>')
    return '\n'.join(parts) + '</table>'


def row_links(places, found, most=6):
    "Links to the rows behind something; the later ones fold away."
    links = [f'<a href="{page}">{at}</a>' for at in found if (page := places.row(*re.fullmatch(r'(\w+)\.jsonl#L(\d+)', at).groups()))]
    more = f' <details><summary>{len(links) - most} more rows</summary>{", ".join(links[most:])}</details>' if len(links) > most else ''
    return ', '.join(links[:most]) + more if links else 'no rows'


def evidence(places):
    "Two pages: the figures with the rows they show, and the claims with rows and figures."
    from ndkv.book import Book, significant
    from ndkv.origins import FIGURES, drawn_from
    from ndkv.verdicts import claims
    book = Book(ROOT / 'results')
    shown = drawn_from(book)
    order = lambda found: sorted(found, key=lambda at: (at.split('#')[0], int(at.split('#L')[1])))
    drawn = ['<h1>Figures</h1><p>Each is a function of rows; <code>make verify</code> draws them again and compares.</p>']
    for name, draw in FIGURES.items():
        place = places.names.get(draw.__name__)
        by = f'<a href="modules/{place[0]}.html#line-{place[1]}"><code>{draw.__name__}</code></a>' if place else draw.__name__
        drawn.append(f'<h2 id="{name}">{name}</h2><figure><img alt="{html.escape(draw.__doc__)}" src="figures/{name}.svg"></figure><p>{html.escape(draw.__doc__)} Drawn by {by} from {row_links(places, order(shown["fig:" + name]))}</p>')
    listed = ['<h1>Claims</h1><table><tr><th>claim</th><th>value</th><th>target</th><th>met</th><th>rows</th><th>figures</th></tr>']
    for c in claims(book):
        at = [r.removeprefix('results/') for r in c['rows']]
        figures = ', '.join(f'<a href="figures.html#{n}">{n}</a>' for n in FIGURES if shown['fig:' + n] & set(at)) or '–'
        value = 'not run' if c['value'] is None else f"{c['value'] if isinstance(c['value'], int) else significant(c['value'])} {c['unit']}"
        listed.append(f'<tr id="{c["id"]}"><td><code>{c["id"]}</code><br>{html.escape(c["sentence"])}</td><td>{value}</td><td>{html.escape(c["target"])}</td><td>{"yes" if c["met"] else "<b>no</b>"}</td><td>{row_links(places, at, 3)}</td><td>{figures}</td></tr>')
    return '\n'.join(drawn), '\n'.join(listed) + '</table>'


def sidebar(places, here, headings, up):
    "Everything there is, the current page with its sections."
    def item(page, text):
        inner = ''.join(f'<li><a href="#{a}">{html.escape(t)}</a></li>' for level, a, t in headings if level == 2) if page == here else ''
        return f'<li{" class=here" if page == here else ""}><a href="{up}{page}">{text}</a>{"<ul>" + inner + "</ul>" if inner else ""}</li>'
    numbered = lambda n: f'<small>{n[:2]}</small> {html.escape(places.titles[n])}'
    wing = lambda w: ''.join(item(f'{n}.html', numbered(n)) for n, file in places.files.items() if file.startswith(f'nbs/{w}/'))
    reading = ''.join(f'<h2>{w}</h2><ul>{wing(w)}</ul>' for w in WINGS)
    files = ''.join(item(f'results/{n}.html', n) for n in places.rows)
    sources = ''.join(item(f'modules/{m}.html', m) for m in places.modules)
    paper = f'<li><a href="{up}paper.pdf">Paper (PDF)</a></li>' if (ROOT / 'paper' / 'main.pdf').exists() else ''
    return (f'<nav><a class="name" href="{up}index.html">ndkv</a>{reading}<h2>Evidence</h2><ul>{item("claims.html", "Claims")}{item("figures.html", "Figures")}{paper}</ul>'
            f'<h2>Rows</h2><ul>{files}</ul><h2>Modules</h2><ul>{sources}</ul></nav>')


def page(places, path, title, body, headings=(), ends=''):
    "One whole page."
    up = '../' * path.count('/')
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)} – ndkv</title>'
            f'<link rel="stylesheet" href="{up}style.css"></head>\n<body>{sidebar(places, path, headings, up)}\n<main>{body}{ends}</main></body></html>\n')


def build(out):
    "Write the whole site to the folder `out`."
    out, places = Path(out), Places()
    if out.exists(): shutil.rmtree(out)
    for folder in ('modules', 'results', 'figures'): (out / folder).mkdir(parents=True)
    (out / 'style.css').write_text(STYLE + HtmlFormatter(style='default').get_style_defs('.highlight') + '\n.highlight { background: none }\n')
    for svg in sorted((ROOT / 'paper' / 'generated' / 'figures').glob('*.svg')): shutil.copy(svg, out / 'figures')
    if (ROOT / 'paper' / 'main.pdf').exists(): shutil.copy(ROOT / 'paper' / 'main.pdf', out / 'paper.pdf')
    write = lambda path, *args: (out / path).write_text(page(places, path, *args), encoding='utf8')
    names = list(places.notebooks)
    for i, name in enumerate(names):
        body, headings = readme(places) if name == 'index' else cells(name, places)
        turn = lambda j, mark: f'<a href="{names[j]}.html">{mark.format(html.escape(places.titles[names[j]]))}</a>' if 0 <= j < len(names) else '<span></span>'
        write(f'{name}.html', places.titles[name], body, headings, f'<div class="ends">{turn(i - 1, "← {}")}{turn(i + 1, "{} →")}</div>')
    for name in places.modules: write(f'modules/{name}.html', f'ndkv.{name}', module(name, places))
    for name in places.rows: write(f'results/{name}.html', name, rows(name, places))
    drawn, listed = evidence(places)
    write('figures.html', 'Figures', drawn)
    write('claims.html', 'Claims', listed)
    return len(list(out.rglob('*.html')))


def readme(places):
    "The first page: README.md, which has the claims filled in, with the map of the notebooks before its first section."
    prose = Prose(places)
    text = re.sub(r'<!--.*?-->', '', (ROOT / 'README.md').read_text(encoding='utf8'), flags=re.S)
    top, section, rest = text.partition('\n## ')
    text = f'{top}\n## Notebooks\n\n{atlas("{stem}.ipynb")}{section}{rest}'
    return MarkdownWithMath(prose).render(text), prose.headings


class Links(HTMLParser):
    "Anchors and links of one page."
    def __init__(self):
        super().__init__()
        self.ids, self.links = set(), []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if 'id' in attrs: self.ids.add(attrs['id'])
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]


def broken(out):
    "Links that lead nowhere, as `page: link`; and how many were followed. Addresses on the web are not."
    out, pages = Path(out), {}
    for path in sorted(out.rglob('*.html')):
        pages[path.resolve()] = parser = Links()
        parser.feed(path.read_text(encoding='utf8'))
    faults, n = [], 0
    for path, parser in pages.items():
        for link in parser.links:
            if re.match(r'(https?|mailto|data):', link): continue
            n += 1
            file, _, anchor = unquote(link).partition('#')
            target = (path.parent / file).resolve() if file else path
            if not target.is_file() or anchor and target in pages and anchor not in pages[target].ids: faults.append(f'{path.relative_to(out.resolve())}: {link}')
    return faults, n
