"""Make README.md and plain HTML pages from the notebooks, with nbconvert.

    python tools/docs.py readme           write README.md from nbs/index.ipynb
    python tools/docs.py readme --check   exit 1 if README.md is not what would be written
    python tools/docs.py site             write _docs/, one page per notebook

Links between notebooks, and from a notebook to any file of the repo, are written relative to the notebook, so that they
work in Jupyter; here they are turned to where they lead from README.md or from the page.
"""
import argparse, difflib, os, re, shutil, sys
from html import escape, unescape
from pathlib import Path

import nbformat
from fastcore.nbio import nb2str, read_nb
from nbconvert import HTMLExporter, MarkdownExporter
from nbdev.config import nbpath2html
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
NBS, SITE, README = ROOT/'nbs', ROOT/'_docs', ROOT/'README.md'
LINK = re.compile(r'(\]\(|\b(?:href|src)=")([^)#"\s]+)')  # group 2: where a Markdown or an HTML link leads, without #anchor

STYLE = """
body { display: flex; margin: 0 auto; max-width: 75rem; font: 16px/1.5 system-ui, sans-serif; color: #222 }
nav { flex: 0 0 12rem; padding: 1.5rem 1rem; position: sticky; top: 0; align-self: flex-start }
nav a { display: block; padding: .15rem 0; text-decoration: none }
nav a.here { font-weight: bold }
main { flex: 1; min-width: 0; padding: 1rem }
pre { overflow-x: auto; padding: .6rem .8rem; margin: .6rem 0; line-height: 1.35; background: #f6f8fa }
.output pre { background: none; border-left: 3px solid #ccd }
table { border-collapse: collapse } td, th { border: 1px solid #ccd; padding: .2rem .6rem }
.anchor-link { visibility: hidden; text-decoration: none } :hover > .anchor-link { visibility: visible }
@media (max-width: 50rem) { body { display: block } nav { position: static } }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="stylesheet" href="{css}"></head>
<body><nav>{nav}</nav><main>{body}</main></body></html>
"""

def shown_cells(path, place):
    "The notebook at `path` as a reader sees it: no directives, no hidden cells; `place(file)` says where a link leads"
    def relink(m):
        file = Path(os.path.normpath(path.parent/m[2]))
        return m[1] + place(file) if file.exists() else m[0]
    nb = read_nb(path)
    for c in nb.cells:
        d = c.directives
        c.shown = c.cell_type != 'raw' and 'hide' not in d and d.get('include') != 'false'
        if d.get('echo') == 'false': c.metadata['transient'] = {'remove_source': True}
        if d.get('output') == 'false': c.outputs = []
        c.remove_directives()
        if c.cell_type == 'markdown': c.source = LINK.sub(relink, c.source)
    nb.cells = [c for c in nb.cells if c.pop('shown') and c.source.strip()]
    nb.metadata['language_info'] = {'name': 'python'}  # nbdev-clean drops it; the exporters name the code's language by it
    return nbformat.reads(nb2str(nb), as_version=4)

def squeeze(md):
    "`md` with no more than one empty line in a row, code fences left alone"
    parts = re.split(r'(^```.*?^```$)', md, flags=re.M|re.S)
    parts[::2] = [re.sub(r'\n{3,}', '\n\n', re.sub(r'^[ \t]+$', '', p, flags=re.M)) for p in parts[::2]]
    return ''.join(parts).strip() + '\n'

def readme_text():
    "The text of README.md, with outputs as indented blocks"
    nb = shown_cells(NBS/'index.ipynb', lambda file: os.path.relpath(file, ROOT))
    as_text = Config(NbConvertBase={'display_data_priority': ['text/markdown', 'text/plain']})
    return squeeze(MarkdownExporter(config=as_text).from_notebook_node(nb)[0])

def readme(check):
    "Write README.md, or with `check` say how it differs from what would be written"
    new = readme_text()
    if not check: return README.write_text(new, encoding='utf-8')
    old = README.read_text(encoding='utf-8') if README.exists() else ''
    if old == new: return
    sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), 'README.md', 'nbs/index.ipynb'))
    sys.exit('README.md is out of date: run `python tools/docs.py readme`')

def slug(text):
    "The anchor that GitHub and quarto give to a heading, from nbconvert's"
    return re.sub(r'[^\w-]', '', unescape(text).lower())

def html_body(nb):
    "The notebook `nb` as HTML, without the page around it"
    exporter = HTMLExporter(template_name='basic', exclude_input_prompt=True, exclude_output_prompt=True)
    anchors = r'(<h[1-6] id="|class="anchor-link" href="#)([^"]*)'
    return re.sub(anchors, lambda m: m[1] + slug(m[2]), exporter.from_notebook_node(nb)[0])

def title_of(path):
    "The first heading of the notebook at `path`"
    heads = (re.search(r'^# +(.+)', c.source, re.M) for c in read_nb(path).cells if c.cell_type == 'markdown')
    return next((m[1] for m in heads if m), path.stem)

def placer(pages, page):
    "A function that says where a link to a file leads from `page`; what is not a notebook is copied into the site"
    def place(file):
        to = pages.get(file) or SITE/file.relative_to(NBS if file.is_relative_to(NBS) else ROOT)
        if file not in pages and file.is_file():
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)
        return os.path.relpath(to, page.parent)
    return place

def broken_links(page):
    "The relative links of the HTML file `page` that lead to no file of the site, or to no anchor"
    for target, anchor in re.findall(r'<a [^>]*?href="(?![a-z]+:|//)([^"#]*)#?([^"]*)"', page.read_text(encoding='utf-8')):
        to = page.parent/target if target else page
        if not to.is_file() or anchor and f'id="{anchor}"' not in to.read_text(encoding='utf-8'):
            yield f'{page.relative_to(SITE)}: {target}{"#" if anchor else ""}{anchor}'

def site():
    "Write all pages into an emptied _docs/"
    shutil.rmtree(SITE, ignore_errors=True)
    found = [p for p in NBS.rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(NBS).parts)]
    found.sort(key=lambda p: (p != NBS/'index.ipynb', len(p.parts), p))
    pages = {p: SITE/nbpath2html(p.relative_to(NBS)) for p in found}
    titles = {p: title_of(p) for p in found}
    for p, page in pages.items():
        page.parent.mkdir(parents=True, exist_ok=True)
        rel = lambda to: os.path.relpath(to, page.parent)
        nav = ''.join(f'<a{" class=here" if q is p else ""} href="{rel(pages[q])}">{escape(titles[q])}</a>' for q in found)
        body = html_body(shown_cells(p, placer(pages, page)))
        page.write_text(PAGE.format(title=escape(titles[p]), css=rel(SITE/'style.css'), nav=nav, body=body), encoding='utf-8')
    (SITE/'style.css').write_text(STYLE + HtmlFormatter().get_style_defs('.highlight'), encoding='utf-8')
    broken = [link for page in pages.values() for link in broken_links(page)]
    if broken: sys.exit('Links that lead nowhere:\n' + '\n'.join(broken))
    print(f'{len(pages)} pages in {SITE.relative_to(ROOT)}/, start at {SITE.relative_to(ROOT)}/index.html')

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('readme').add_argument('--check', action='store_true', help='write nothing; exit 1 if out of date')
    commands.add_parser('site')
    args = parser.parse_args()
    if args.command == 'readme': readme(args.check)
    else: site()

if __name__ == '__main__': main()
