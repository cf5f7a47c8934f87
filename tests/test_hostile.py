"""Each hostile program on each kind of namespace does what the table in the docs says."""
import json
from contextlib import ExitStack
from pathlib import Path
import pytest
from common import posix
from hostile import CLAIMS, Host, PROGRAMS, attack, cell, new_ns, rows

pytestmark = posix
CELLS = [''.join(c['source']) for c in json.loads((Path(__file__).parent.parent/'nbs'/'62_sandbox.ipynb').read_text())['cells']]
SHOWN = rows(next(o for o in CELLS if o.startswith('| program')))

@pytest.mark.parametrize('kind', CLAIMS)
@pytest.mark.parametrize('program', PROGRAMS, ids=lambda p: p.name)
def test_hostile(program, kind):
    want = SHOWN.get((program.name, kind))
    if want is None and not any(k == kind for _, k in SHOWN): pytest.skip(f'the table has no column for {kind}')
    assert cell(program, kind) == want

def test_expected_states():
    for p in PROGRAMS:
        for kind in CLAIMS:
            if shown := SHOWN.get((p.name, kind)):
                assert shown == ('not contained' if p.needs not in CLAIMS[kind] else f'contained, {p.state}' if p.state else 'contained')

def test_they_can_tell():
    "A program that gets what it wants says so: the plain process claims none of this, and these do no harm there."
    harmless = ('reading files of the host', 'environment of the host', 'memory of the host', 'loopback of the host', 'local sockets of the host')
    with ExitStack() as stack:
        host, ns, other = Host(stack), *(stack.enter_context(new_ns('process')) for _ in '12')
        for p in PROGRAMS:
            if p.name in harmless: assert attack(p, host, ns, other).startswith('not contained: BREACH'), p.name
