"The package's metadata, read from settings.ini. Build settings and nbdev's paths are in pyproject.toml."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=['='])
parser.read('settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
lib = cfg['lib_name']

in_init = re.search(r'^__version__ *= *["\'](.+?)["\']', Path(lib, '__init__.py').read_text(encoding='utf-8'), re.M)
if in_init and in_init[1] != cfg['version']:
    raise SystemExit(f"settings.ini says version {cfg['version']}, {lib}/__init__.py says {in_init[1]}")

extras = {k: cfg[f'{k}_requirements'].split() for k in ('dev', 'solveit', 'providers', 'pdf')}
extras['all'] = sorted(set(sum(extras.values(), [])))

setup(
    name=lib,
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'].split(),
    license_expression=cfg['license'],
    author=cfg['author'],
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers', 'Natural Language :: English',
                 *(f'Programming Language :: Python :: {v}' for v in cfg['pythons'].split())],
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    packages=find_packages(include=[lib, f'{lib}.*']),
    package_data={lib: ['py.typed', '*.txt', '*.html', '*.css', '*.js', '*.json', 'data/*']},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f'{lib}={lib}._modidx:d']},
    zip_safe=False,
)
