"""The folders of `nbs/`, one for each question of a reader, in reading order; and the map of them."""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / 'nbs'

WINGS = dict( # Folder -> the question that it answers. A notebook exports nothing that needs a later one.
    start='What does a KV cache cost, and how do I begin?',
    codes='How does a vector become a few bits?',
    model='What does a model read, and which of its errors matter?',
    pages='How do the bits of many tokens lie in memory, and how are they read and written fast?',
    cache='How do codes become a cache that `transformers` uses?',
    serve='How does it answer many requests at a time?',
    lab='How good is it, how fast, and against what?',
    paper='What do the measurements say?',
)


def notebooks():
    "All notebooks in reading order: the index, then wing by wing."
    return [NBS / 'index.ipynb'] + [f for wing in WINGS for f in sorted((NBS / wing).glob('*.ipynb'))]


def strays():
    "Notebooks that are in no wing."
    return sorted(str(f.relative_to(NBS)) for f in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts and f not in set(notebooks()))


def head(path):
    "Title and subtitle of a notebook: its lines that begin with `# ` and `> `."
    text = '\n'.join(''.join(c['source']) for c in json.loads(path.read_text(encoding='utf8'))['cells'] if c['cell_type'] == 'markdown')
    found = [re.search(rf'^{mark} (.+)$', text, re.M) for mark in '#>']
    return [m[1].strip() if m else '' for m in found]


def atlas(link='{wing}/{stem}.ipynb'):
    "The wings with their notebooks, as markdown."
    parts = []
    for wing, question in WINGS.items():
        lines = [f'### {wing}\n\n{question}\n']
        for path in sorted((NBS / wing).glob('*.ipynb')):
            title, subtitle = head(path)
            lines.append(f'- [{path.stem[:2]} {title}]({link.format(wing=wing, stem=path.stem)}): {subtitle}')
        parts.append('\n'.join(lines))
    return '\n\n'.join(parts) + '\n'
