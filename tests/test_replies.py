"""The corpus of replies: each file of `tests/data/replies/` is read as it says. See the README there for how to add one."""
import json
from collections import Counter
from pathlib import Path
import pytest
from rlm import LMError, ScriptLM, rlm_run
from rlm.lm import Reply
from rlm._rlmpaper_compat import ANSWER, NANO, PAPER, find_code_blocks
from rlm.parsing import read_reply
from common import block

FOLDER = Path(__file__).parent/'data'/'replies'
FILES = sorted(FOLDER.glob('*.txt'))
PROTOCOLS = dict(paper=PAPER, answer=ANSWER, nano=NANO)
CONTEXT = 'The capital is Paris. ' * 100

def read(path):
    "What the reply should be read as, and the reply."
    head, text = path.read_bytes().decode('utf-8', 'surrogatepass').split('\n-----\n', 1)
    return json.loads(head), text

def ask(about, reply, then, **kw):
    "A run whose first turn looks, whose second reply is from the corpus, and whose later ones are `then`."
    protocol = PROTOCOLS[about.get('protocol', 'paper')]
    look = block(about.get('setup', '') + f'\nprint(len({protocol.context_name}))', lang=protocol.langs[0])
    replies = iter([Reply(look), Reply(reply, stop_reason=about.get('stop'))])
    return rlm_run('Which is the capital?', CONTEXT, model=ScriptLM(lambda msgs: next(replies, then)), protocol=protocol, **kw)

each = pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)

@each
def test_a_turn(path):
    about, reply = read(path)
    nano = about.get('protocol') == 'nano'
    res = ask(about, reply, block('Final = "went on"', lang='python') if nano else 'FINAL(went on)')
    turn = res.iterations[1]
    assert turn.response == reply
    assert [b.code.rstrip() for b in turn.code_blocks] == about.get('blocks', [])
    answer = about.get('answer')
    assert (res.answer, len(res.iterations)) == (('went on', 3) if answer is None else (answer, 2)), turn.notes
    said = '' if answer is not None else res.iterations[2].prompt[-1]['content'].lower()
    for word in about.get('told', []): assert word in said

@each
def test_the_last_call(path):
    about, reply = read(path)
    if 'last' not in about: return
    res = ask(about, reply, 'unused', max_iters=1)
    assert (res.answer, res.stop) == (about['last'], 'max_iters')

@each
def test_a_subcall(path):
    about, reply = read(path)
    if 'subcall' not in about: return
    turns = iter([block('r = llm_query("?")'), 'FINAL(done)'])
    res = rlm_run('Q', CONTEXT, model=ScriptLM(lambda msgs: reply if len(msgs) == 1 else next(turns)))
    assert res.ns['r'] == about['subcall']

@each
def test_nothing_is_lost_in_the_first_turn(path):
    about, reply = read(path)
    assert ''.join(p.text for p in read_reply(reply)) == reply
    try: res = rlm_run('Q', CONTEXT, model=ScriptLM(lambda msgs: reply), max_iters=2)
    except LMError as e: assert 'no text' in str(e)
    else: assert res.iterations[0].response == reply

def test_every_family_is_there():
    families = Counter(read(p)[0]['family'] for p in FILES)
    assert len(FILES) >= 150 and len(families) >= 8 and min(families.values()) >= 5, families
