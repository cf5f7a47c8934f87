"""Nothing that was paid for is lost, and nothing that is told is false."""
import collections, dataclasses, io, json, os, pickle, subprocess, sys, threading, types, warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
import pytest
from rlm import ANSWER, NANO, Limits, LMError, LimitExceeded, RLMError, RunConfig, ScriptLM, load_ns, rlm_run, save_ns
from rlm._rlmpaper_compat import PAPER, FinalAnswer, QueryMetadata, REPLResult, RLMChatCompletion, describe_context
from rlm.cli import main
from rlm.core import Event, RLMResult, SubcallError, request_digest
from rlm.display import run_html, to_notebook
from rlm.lm import LMAuthError, LMConnectionError, LMModelError
from rlm.repl import exec_code, summarize
from rlm.trace import CallStore, RunLog, TraceError, load_run, load_runs, replay, resume, rewind
from common import block, environment

WAITS = 300 # Seconds; only a hang takes that long
STARTS = [o for o in ('spawn', 'fork') if hasattr(os, 'fork') or o == 'spawn']

def dead(msgs): raise OSError('the wire is cut')

def dying(replies, n):
    "A model that fails after `n` calls."
    todo = iter(replies)
    left = [n]
    def reply(msgs):
        left[0] -= 1
        return next(todo) if left[0] >= 0 else dead(msgs)
    return reply

# What has a length

REPLIES = [block('a = llm_query("one")'), 'ONE', block('b = a')]

class Kept(collections.UserDict):
    "A store as somebody else writes it: false as long as it is empty."
    def lookup(self, scope, n, lm, msgs): return self.get((scope, n, request_digest(lm.name, msgs)))
    def record(self, scope, n, lm, msgs, reply): self[scope, n, request_digest(lm.name, msgs)] = reply
    def close(self): pass

@pytest.mark.parametrize('make', [lambda p: CallStore(p/'calls.db'), lambda p: Kept()], ids=['ours', 'theirs'])
def test_a_log_that_is_gone_on_with_fills_a_new_store(tmp_path, make):
    log, store = tmp_path/'run.jsonl', make(tmp_path)
    with pytest.raises(LMError): rlm_run('Go', 'abc', model=ScriptLM(dying(REPLIES, 3)), log=log)
    assert len(store) == 0
    more = iter([block('c = llm_query("two")'), 'TWO', 'FINAL_VAR(c)'])
    res = rlm_run('Go', 'abc', model=ScriptLM(lambda msgs: next(more)), log=log, store=store)
    assert res.answer == 'TWO' and len(store) == 3
    store.close()

def test_a_new_store_and_a_new_log(tmp_path):
    with CallStore(tmp_path/'calls.db') as store:
        rlm_run('Go', 'abc', model=ScriptLM(['FINAL(no)', block('x = 1'), 'FINAL(1)']), log=tmp_path/'run.jsonl', store=store)
        assert len(store) == 3

def test_resume_and_rewind_fill_a_new_store(tmp_path):
    log = tmp_path/'run.jsonl'
    with pytest.raises(LMError): rlm_run('Go', 'abc', model=ScriptLM(dying(REPLIES, 3)), log=log)
    with CallStore(tmp_path/'a.db') as store:
        rewind(log, 2, 'abc', model=ScriptLM(['FINAL(b)']), store=store)
        assert len(store) == 1
    with CallStore(tmp_path/'b.db') as store:
        resume(log, 'abc', model=ScriptLM(['FINAL(b)']), store=store)
        assert len(store) == 1

EMPTY = dict(frame=lambda: pytest.importorskip('pandas').DataFrame(), frame_full=lambda: pytest.importorskip('pandas').DataFrame(dict(a=[1, 2])),
    array=lambda: pytest.importorskip('numpy').zeros(0), array_full=lambda: pytest.importorskip('numpy').zeros((2, 3)),
    text=lambda: '', list=list, dict=dict, zero=lambda: 0, false=lambda: False, bytes=lambda: b'')

@pytest.mark.parametrize('name', EMPTY)
def test_a_context_need_not_be_true(tmp_path, name):
    o, ns = EMPTY[name](), {}
    turns = [block('x = [context]'), 'FINAL_VAR(x)'] # An empty text is no answer
    res = rlm_run('Go', o, ns, model=ScriptLM(turns), log=tmp_path/'run.jsonl', tools=dict(tool=o), on_event=lambda e: None)
    assert res.value[0] is o and ns['context'] is o and res.stop == 'answer'
    assert replay(tmp_path/'run.jsonl', o, {}).same
    res._repr_html_(); res._repr_markdown_(); res.summary()
    assert rlm_run('Again', o, ns, model=ScriptLM(turns)).value[0] is o
    to_notebook(res, tmp_path/'run.ipynb')
    save_ns(ns, tmp_path/'ns.pkl')
    assert type(load_ns(tmp_path/'ns.pkl')['context']) is type(o)

@pytest.mark.parametrize('name', ['frame', 'frame_full', 'array', 'array_full', 'list', 'dict', 'zero'])
def test_an_answer_need_not_be_true(name):
    o = EMPTY[name]()
    res = rlm_run('Go', 'abc', model=ScriptLM([block('FINAL(make())')]), tools=dict(make=lambda: o))
    assert res.value is o and res.stop == 'answer'
    assert pickle.loads(pickle.dumps(res)).answer == res.answer

class Namespace(dict):
    "Always false."
    def __bool__(self): return False

def test_a_namespace_need_not_be_true():
    ns = Namespace()
    assert rlm_run('Go', 'abc', ns, model=ScriptLM([block('x = 1'), 'FINAL(1)'])).ns is ns and ns['x'] == 1
    assert exec_code('y = 2', ns).error is None and ns['y'] == 2

# A protocol is never guessed

OWN = dataclasses.replace(PAPER, name='mine', context_name='data')
SAME_NAME = dataclasses.replace(PAPER, context_name='data')

@pytest.mark.parametrize('own', [OWN, SAME_NAME], ids=['own name', 'name of ours'])
def test_a_protocol_of_ones_own(tmp_path, own):
    log = tmp_path/'run.jsonl'
    res = rlm_run('Go', 'abc', model=ScriptLM([block('print(len(data))'), 'FINAL(3)']), protocol=own, log=log)
    for f in (lambda: replay(log, 'abc'), lambda: rewind(log, 1, 'abc', model=ScriptLM(['FINAL(1)'])), lambda: to_notebook(log, tmp_path/'a.ipynb', 'abc')):
        with pytest.raises(TraceError, match='pass `protocol`'): f()
    assert replay(log, 'abc', protocol=own).same and replay(res, 'abc').same
    assert rewind(log, 1, 'abc', model=ScriptLM(['FINAL(1)']), protocol=own).answer == '1'
    assert rewind(res, 1, 'abc', query='Go', model=ScriptLM(['FINAL(1)'])).answer == '1'
    source = to_notebook(log, tmp_path/'a.ipynb', 'abc', protocol=own).read_text()
    assert 'data' in source and 'replace(PAPER' in source

def test_a_protocol_by_name(tmp_path):
    log = tmp_path/'run.jsonl'
    rlm_run('Go', 'abc', model=ScriptLM([block('print(len(prompt))', lang='python'), block('Final = 3', lang='python')]), protocol=NANO, log=log)
    assert replay(log, 'abc').same and replay(log, 'abc', protocol='nano').same
    for bad in ('nona', '', 3):
        with pytest.raises(TraceError, match='must be a Protocol, or one of'): replay(log, 'abc', protocol=bad)

@pytest.mark.parametrize('lang', ['bash2', 'javascript', '', 'Python2'])
def test_a_block_of_an_unknown_language_does_not_run(tmp_path, lang):
    marks = []
    run = dict(run_metadata=dict(protocol='paper', query='q'), iterations=[dict(response='', code_blocks=[dict(code='mark()', lang=lang, result={})])])
    report = replay(run, 'abc', tools=dict(mark=lambda: marks.append(1)))
    assert not marks and not report.same and 'does not run here' in report.blocks[0].now.stderr
    cells = json.loads(to_notebook(run, tmp_path/'a.ipynb', 'abc').read_text())['cells']
    assert not [o for o in cells if o['cell_type'] == 'code' and 'mark()' in ''.join(o['source'])]

# What is no log, and what is several

NO_LOGS = ['{"text": "a"}\n{"text": "b"}\n', '{"messages": [{"role": "user", "content": "x"}]}\n', '{}\n', '{"prompt": "q", "completion": "a"}\n',
    '{"type": "event", "name": "x"}\n', '{"type": "metadata"}\n{"a": 1}\n']

@pytest.mark.parametrize('text', NO_LOGS)
def test_no_log(tmp_path, text):
    (tmp_path/'x.jsonl').write_text(text)
    for f in (load_run, load_runs, run_html, lambda p: replay(p, 'abc')):
        with pytest.raises(TraceError, match='is no log of a run.*`response` and `code_blocks`'): f(tmp_path/'x.jsonl')

def a_turn(i, text, **more): return dict(type='iteration', iteration=i, prompt=[dict(role='user', content='q')], response=text, code_blocks=[], final_answer=None, **more)

def forms():
    "Six runs of two turns in one file, as it may be written."
    runs = [f'run {k}' for k in range(6)]
    meta = dict(type='metadata', root_model='m')
    turns = {k: [a_turn(1, k), a_turn(2, k)] for k in runs}
    yield 'headers', [d for k in runs for d in (dict(run_context=dict(id=k)), *turns[k])]
    yield 'typed headers', [d for k in runs for d in (dict(type='run_context', run_context=k, task='t'), meta, *turns[k])]
    yield 'each line', [dict(d, run_context=k) for k in runs for d in turns[k]]
    yield 'each line and metadata', [dict(d, run_context=k) for k in runs for d in (meta, *turns[k])]
    yield 'the same context', [dict(d, run_context='here') for k in runs for d in (meta, *turns[k])]
    yield 'the same context, bare', [dict(d, run_context='here') for k in runs for d in turns[k]]
    yield 'mixed', [dict(turns[k][i], run_context=dict(id=k)) for i in (0, 1) for k in runs]
    yield 'one metadata line', [meta] + [dict(d, run_context=k) for k in runs for d in turns[k]]
    yield 'whole', [dict(run_context=k, run_metadata=dict(root_model='m'), iterations=turns[k]) for k in runs]

FORMS = dict(forms())

@pytest.mark.parametrize('form', FORMS)
def test_several_runs_in_a_file(tmp_path, form, capsys):
    path = tmp_path/'six.jsonl'
    path.write_text(''.join(json.dumps(d) + '\n' for d in FORMS[form]))
    runs = load_runs(path)
    assert [[it.response for it in o.iterations] for o in runs] == [[f'run {k}'] * 2 for k in range(6)]
    assert not any(o.branches for o in runs) and all('run_context' in o.info for o in runs)
    with pytest.raises(TraceError, match='holds 6 runs: `load_runs`'): load_run(path)
    assert run_html(path).count('class="run"') == 6
    assert main(['view', str(path), '-o', str(tmp_path/'a.html')]) == 0 and capsys.readouterr().out.strip() == str(tmp_path/'a.html')
    (tmp_path/'c.txt').write_text('abc')
    assert main(['replay', str(path), str(tmp_path/'c.txt')]) == 0 and capsys.readouterr().out.count('0 of 0 blocks') == 6
    assert main(['replay', str(path), str(tmp_path/'c.txt'), '--run', '6']) == 0 and capsys.readouterr().out.count('0 of 0 blocks') == 1
    assert main(['replay', str(path), str(tmp_path/'c.txt'), '--run', '7']) == 1 and 'holds 6 runs' in capsys.readouterr().err

def test_a_file_of_one_run_is_a_list_of_one(tmp_path):
    rlm_run('Go', 'abc', model=ScriptLM([block('x = 1'), 'FINAL(1)']), log=tmp_path/'run.jsonl')
    (tmp_path/'one.jsonl').write_text(json.dumps(a_turn(1, 'a', run_context='x')) + '\n')
    assert len(load_runs(tmp_path/'run.jsonl')) == 1 == len(load_runs(tmp_path/'one.jsonl'))
    assert load_run(tmp_path/'one.jsonl').info['run_context'] == 'x'

def test_a_sub_call_says_when(tmp_path):
    res = rlm_run('Go', 'abc', model=ScriptLM([block('print(llm_query("a"))'), 'A', 'FINAL(1)']), log=tmp_path/'run.jsonl')
    (now,), (logged,) = [c for it in res.iterations for b in it.code_blocks for c in b.result.llm_calls], load_run(tmp_path/'run.jsonl').calls
    assert now.started > 1.7e9 and logged.started == now.started and now.execution_time >= 0
    assert RLMChatCompletion.from_dict(dict(prompt='a', response='b')).started is None

# What leaves the process

def echo(o): return o
def fail_with(e): raise e
def fail_to_ask(prompt): return rlm_run('Go', prompt, model=ScriptLM(dead)).answer
def reach_a_limit(n): return rlm_run('Go', 'abc', model=ScriptLM([block('x = llm_query("a")')] * 9), limits=dict(max_calls=n))

@pytest.fixture(scope='module', params=STARTS)
def pool(request):
    with ProcessPoolExecutor(1, mp_context=get_context(request.param)) as p: yield p

def there_and_back(pool, o): return pool.submit(echo, o).result(WAITS)

def with_result(e):
    e.result = rlm_run('Go', 'abc', model=ScriptLM([block('x = 1'), 'FINAL(1)']))
    return e

ERRORS = [RLMError('a'), LMError('a', 3), LMAuthError('a'), LMModelError('a'), LMConnectionError('a'), LimitExceeded('max_calls', 3, 4), LimitExceeded('timeout', 1., 1.5),
    TraceError('a'), type('OddError', (RLMError,), {})('a')]

@pytest.mark.parametrize('e', ERRORS, ids=[type(o).__name__ for o in ERRORS])
def test_errors_leave_the_process(pool, e):
    e = with_result(e)
    e.lock = threading.Lock()
    back = there_and_back(pool, e)
    assert type(back).__name__ == type(e).__name__ and str(back) == str(e) and back.args == e.args and isinstance(back, RLMError)
    assert back.result.answer == '1' and back.result.ns['x'] == 1 and not hasattr(back, 'lock')
    for k in ('limit', 'allowed', 'spent', 'stop'): assert getattr(back, k, None) == getattr(e, k, None)
    with pytest.raises(type(back).__mro__[1] if type(e).__name__ == 'OddError' else type(e), match='a|exceeded'): pool.submit(fail_with, e).result(WAITS)

def test_an_interrupt_leaves_the_process():
    back = pickle.loads(pickle.dumps(with_result(KeyboardInterrupt('by hand'))))
    assert back.result.answer == '1'

def test_a_failed_call_in_a_pool_is_our_error(pool):
    with pytest.raises(LMError, match='the wire is cut') as e: pool.submit(fail_to_ask, 'abc').result(WAITS)
    assert e.value.result.stop == 'errors'
    res = pool.submit(reach_a_limit, 3).result(WAITS)
    assert res.stop == 'budget' and res.limit.limit == 'max_calls'

CODE = '''import math, json as j
from dataclasses import dataclass
from enum import Enum
@dataclass
class Point:
    x: int = 1
    def far(self): return math.hypot(self.x, _half(8))
class Kind(Enum):
    A = 1
class Deep(Point): pass
def _half(n): return n / 2
def twice(n, *, by: int=2)->int:
    "Twice."
    return n * by
def add(n):
    def inner(m): return n + m
    return inner
def fact(n): return 1 if n < 2 else n * fact(n - 1)
plus, square = add(3), lambda n: n * n
rows = [Point(3), Kind.A, Deep(3)]
same = [rows, rows]
gen = (o for o in "ab")
lock = __import__("threading").Lock()
FINAL(rows)'''

def check_session(ns):
    assert ns['rows'][0].far() == 5 and ns['rows'][1] is ns['Kind'].A and type(ns['rows'][0]) is ns['Point'] and isinstance(ns['rows'][2], ns['Point'])
    assert ns['same'][0] is ns['rows'] is ns['same'][1]
    assert (ns['twice'](4), ns['twice'](4, by=3), ns['plus'](4), ns['square'](5), ns['fact'](4)) == (8, 12, 7, 25, 24)
    assert ns['twice'].__doc__ == 'Twice.' and ns['twice'].__annotations__['return'] is int and ns['math'].pi > 3 and ns['j'] is json

def test_results_leave_the_process(pool):
    res = rlm_run('Go', 'abc', model=ScriptLM([block(CODE)]))
    assert res.stop == 'answer', res.iterations[0].code_blocks[0].result.stderr
    names = set(res.ns)
    back = pickle.loads(pickle.dumps(res))
    check_session(back.ns)
    assert set(res.ns) == names and back.answer == res.answer and back.value is back.ns['rows'] and sorted(back.lost) == ['gen', 'lock']
    assert back.usage == res.usage and len(back.iterations) == 1 and back.messages == res.messages and back.summary() == res.summary()
    back = there_and_back(pool, res)
    check_session(back.ns)
    assert sorted(back.lost) == ['gen', 'lock']

def test_whatever_else_leaves_the_process(pool, tmp_path):
    for o in (PAPER, ANSWER, NANO, Limits(max_calls=3), RunConfig(limits=dict(max_calls=3), protocol=NANO), REPLResult('a', 'b')): assert there_and_back(pool, o) == o
    e = there_and_back(pool, SubcallError(LimitExceeded('max_calls', 3, 3)))
    assert e == 'Error: max_calls exceeded: 3 of 3' and e.error.allowed == 3 and isinstance(e, SubcallError)
    e = there_and_back(pool, SubcallError(OSError(threading.Lock())))
    assert isinstance(e.error, RLMError) and e.startswith('Error: OSError')
    answer = there_and_back(pool, FinalAnswer([1]))
    assert answer == '[1]' and answer.value == [1]
    assert there_and_back(pool, FinalAnswer(threading.Lock())).value.startswith('<unlocked')
    with CallStore(tmp_path/'calls.db') as store:
        rlm_run('Go', 'abc', model=ScriptLM(['FINAL(no)', block('1'), 'FINAL(1)']), store=store)
        assert len(there_and_back(pool, store)) == 3
    log = there_and_back(pool, RunLog(tmp_path/'run.jsonl', keep_context=True))
    assert log.path == tmp_path/'run.jsonl' and log.keep_context
    res = rlm_run('Go', 'abc', model=ScriptLM([block('1'), 'FINAL(1)']), log=log, on_event=lambda e: events.append(e)) if (events := []) == [] else None
    assert [o.kind for o in there_and_back(pool, events)] == [o.kind for o in events]
    assert len(there_and_back(pool, load_run(tmp_path/'run.jsonl')).iterations) == 2 and res.log == tmp_path/'run.jsonl'

def test_a_store_with_a_relative_name_is_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with CallStore('calls.db') as store: data = pickle.dumps(store)
    monkeypatch.chdir('/')
    assert len(pickle.loads(data)) == 0

# Sessions

def test_a_session_is_saved_whole(tmp_path):
    ns = {}
    rlm_run('Go', 'abc', ns, model=ScriptLM([block(CODE)]))
    before = dict(ns)
    assert sorted(save_ns(ns, tmp_path/'ns.pkl')) == ['gen', 'lock']
    assert ns == before and list(ns) == list(before)
    back = load_ns(tmp_path/'ns.pkl')
    check_session(back)
    assert not save_ns(back, tmp_path/'again.pkl')
    check_session(load_ns(tmp_path/'again.pkl'))
    code = f'import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_truth, rlm; test_truth.check_session(rlm.load_ns({str(tmp_path/"ns.pkl")!r})); print("whole")'
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=WAITS, env=environment())
    assert p.stdout == 'whole\n', p.stderr

def test_a_session_is_no_larger_than_what_it_holds(tmp_path):
    ns, text = {}, os.urandom(2_600_000).hex()
    for q in range(4): rlm_run(f'Go {q}', text if q else text[:100], ns, model=ScriptLM([block(f'all{q} = [context, dict(a=context)]'), 'FINAL(1)']))
    save_ns(ns, tmp_path/'ns.pkl')
    assert len(text) <= (tmp_path/'ns.pkl').stat().st_size < 1.1 * len(text)
    back = load_ns(tmp_path/'ns.pkl')
    assert back['context'] is back['all3'][0] is back['all2'][1]['a'] and back['context'] == text

class Picky:
    def __reduce__(self): return _not_here, ()
def _not_here(): raise OSError('not here')

def test_what_cannot_be_read_is_named_and_the_rest_is_there(tmp_path):
    shared = ['x']
    save_ns(dict(a=shared, b=[Picky(), shared, ['y']], c=shared, d='end'), tmp_path/'ns.pkl')
    with pytest.warns(UserWarning, match=r'could not be brought back: b \(OSError: not here\)'): ns = load_ns(tmp_path/'ns.pkl')
    assert ns == dict(a=['x'], c=['x'], d='end') and ns['a'] is ns['c']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert load_ns(tmp_path/'ns.pkl', mine := {}) is mine and mine['d'] == 'end'

def test_old_sessions_load(tmp_path):
    (tmp_path/'ns.pkl').write_bytes(pickle.dumps(dict(a=pickle.dumps([1]), b=b'broken')))
    with pytest.warns(UserWarning, match='brought back: b'): assert load_ns(tmp_path/'ns.pkl') == dict(a=[1])
    (tmp_path/'ns.pkl').write_bytes(b'no pickle')
    with pytest.raises(RLMError, match='was not written by `save_ns`'): load_ns(tmp_path/'ns.pkl')

# Callbacks and warnings

def test_a_callback_that_raises_where_warnings_are_errors():
    def watch(e): raise OSError('odd')
    with warnings.catch_warnings():
        res = rlm_run('Go', 'abc', model=ScriptLM([block('import warnings; warnings.simplefilter("error")'), 'FINAL(1)']), on_event=watch)
    assert res.answer == '1' and res.stop == 'answer'

# Standard output of `rlm ask`

NOISE = """import os, subprocess, sys, threading, atexit, ctypes
os.system("echo noise"); subprocess.run([sys.executable, "-c", "print('noise')"])
os.write(1, b"noise\\n"); print("noise"); print("noise", file=sys.__stdout__)
ctypes.CDLL(None).puts(b"noise")
later = subprocess.Popen(["sh", "-c", "sleep 1; echo noise"])
atexit.register(print, "noise"); atexit.register(os.write, 1, b"noise\\n")
threading.Thread(target=os.write, args=(1, b"noise\\n")).start()
%s
FINAL("the answer")"""
RUN = """import sys
from rlm import ScriptLM
import rlm.lm, rlm.core, rlm.cli
reply = sys.argv.pop(1)
rlm.core.get_lm = lambda model: ScriptLM([reply])
sys.exit(rlm.cli.main())"""

@pytest.mark.skipif(os.name == 'nt', reason='the block is written for Unix')
@pytest.mark.parametrize('more', ['', 'os.close(1)', 'sys.stdout = open(os.devnull, "w")', 'sys.stdout.close()'])
@pytest.mark.parametrize('flags', [['--json'], []], ids=['json', 'plain'])
def test_only_the_answer_is_on_standard_output(tmp_path, flags, more):
    (tmp_path/'c.txt').write_text('abc')
    args = [sys.executable, '-c', RUN, block(NOISE % more), 'ask', *flags, 'What?', str(tmp_path/'c.txt')]
    p = subprocess.run(args, capture_output=True, text=True, timeout=WAITS, env=environment())
    assert p.returncode == 0, p.stderr
    assert (json.loads(p.stdout)['answer'] if flags else p.stdout.removesuffix('\n')) == 'the answer'

# How values are described

@dataclasses.dataclass
class Config:
    name: str
    rows: list

class Never:
    "Must not be looked at."
    def __repr__(self): raise AssertionError('it was read')
    __str__ = __len__ = __iter__ = __eq__ = __hash__ = __repr__

def said(o): return describe_context(QueryMetadata(o))

def test_tables_are_described():
    pd, np = pytest.importorskip('pandas'), pytest.importorskip('numpy')
    df = pd.DataFrame(dict(a=range(100_000), b=['some text'] * 100_000))
    assert '100,000 rows' in said(df) and 'a: int64' in said(df) and 'b: ' in said(df) and 'characters' in said(df) and '242' not in said(df)
    wide = pd.DataFrame({f'col{i}': [i] for i in range(500)})
    assert '500 columns' in said(wide) and 'col19' in said(wide) and 'col20' not in said(wide) and len(said(wide)) < 1000
    assert 'Series: 3 values, int64' in said(pd.Series([1, 2, 3])) and 'Index: 2 values' in said(pd.Index(['a', 'b'])) and '0 rows' in said(pd.DataFrame())
    assert 'shape (3, 4)' in said(np.zeros((3, 4))) and 'float64' in said(np.zeros((3, 4))) and '3.5' in said(np.float64(3.5))
    assert '2 items' in said(dict(x=df, y=wide)) and said(dict(x=df, y=wide)).count('DataFrame, ') == 2 and 'rows' in said([df, 'text', 3])
    assert 'shape (100000, 2)' in summarize(df) and 'a int64' in summarize(df)
    odd = pd.DataFrame({('x', 1): [Never()], 2: [None], 'z' * 5000: [b'x']})
    assert '1 row and' in said(odd) and len(said(odd)) < 2000 and len(summarize(odd)) < 1000
    twice = pd.DataFrame([[1, 2]], columns=['a', 'a'])
    assert 'a: int64, a: int64' in said(twice)
    grouped = pd.DataFrame(dict(a=[1]), index=pd.MultiIndex.from_tuples([(1, 2)]))
    assert '1 row and' in said(grouped) and 'MultiIndex' in said(grouped.index)

def test_big_tables_are_not_read():
    pd = pytest.importorskip('pandas')
    df = pd.DataFrame(dict(a=range(1000), b=[Never()] * 1000))
    assert '1,000 rows' in said(df) and 'object' in summarize(df)
    QueryMetadata([df, df]); QueryMetadata(dict(a=df))

def test_paths_are_described(tmp_path):
    for i in range(3): (tmp_path/f'{i}.txt').write_text('x' * 1000)
    os.mkfifo(tmp_path/'pipe') if hasattr(os, 'mkfifo') else None
    one, all_ = tmp_path/'0.txt', [tmp_path/f'{i}.txt' for i in range(4)]
    assert 'a path to a file of 1,000 bytes' in said(one) and '0.txt' in said(one)
    assert 'folder' in said(tmp_path) and 'is not there' in said(tmp_path/'none') and 'a path' in said(tmp_path/'pipe')
    assert '4 paths' in said(all_) and '3,000 bytes' in said(all_) and '1 is not there' in said(all_)
    assert '1,000 bytes' in summarize(one)

def test_other_values_are_described(tmp_path):
    import datetime
    assert 'Config' in said(Config('a' * 500, [1, 2])) and 'name: str' in said(Config('a' * 500, [1, 2])) and 'rows: list' in said(Config('', []))
    assert '2024-01-02' in said(datetime.datetime(2024, 1, 2)) and '2024-01-02' in said(datetime.date(2024, 1, 2))
    assert 'range(0, 10, 2)' in said(range(0, 10, 2)) and '5 items' in said(range(0, 10, 2)) and 'range' in said(range(10**30))
    g = (o for o in 'ab')
    assert 'generator' in said(g) and 'once' in said(g) and list(g) == ['a', 'b']
    with open(tmp_path/'f.txt', 'w+') as f: assert 'open file' in said(f) and 'f.txt' in said(f)
    assert 'closed' in said(f)
    assert 'StringIO' in said(io.StringIO('x')) and 'BytesIO' in said(io.BytesIO(b'x'))
    class Text(str): pass
    assert said(Text('abc')) == '`context` is a Text of 3 characters.'
    assert '2 str' in said(['a', 'b', 3, None]) and 'NoneType' in said(['a', 'b', 3, None])
    assert said(['a', 'b']) == '`context` is a list of 2 items with 2 characters in all; lengths of the items: 1, 1.'
    for o in ([Never()], dict(a=Never()), (Never(), 1)): said(o)
    for o in (Config(Never(), Never()), types.SimpleNamespace(a=1), object(), collections.deque([1]), threading.Lock(), 3, 2.5, None): assert said(o).startswith('`context` is a')
    meta = QueryMetadata(Config('a', []))
    assert [f.name for f in dataclasses.fields(meta)][:3] == ['context_lengths', 'context_total_length', 'context_type'] and meta.context_type == 'Config'

def test_the_model_is_told_of_a_table():
    pd, seen = pytest.importorskip('pandas'), []
    def model(msgs):
        seen.append(msgs[1]['content'])
        return 'FINAL(no)' if len(seen) == 1 else 'FINAL(1)'
    rlm_run('Go', pd.DataFrame(dict(a=range(100_000))), model=ScriptLM(model), max_iters=1)
    assert '100,000 rows' in seen[0]
