"""The namespace in a process: its border, its end, and what it leaves behind."""
import gc, json, os, shutil, signal, subprocess, sys, textwrap, threading, time
import pytest
from hypothesis import given, strategies as st
from common import HANG, block, environment, forks, given_time, in_child, posix, script, tree, until
from kinds import new_ns
from rlm import ANSWER, PAPER, ScriptLM, exec_code, rlm_run
from rlm._worker import FrameError, TooLarge, Wire, filtered_calls, decode, encode, parse, plain
from rlm.lm import RLMError
from rlm.remote import NamespaceClosed
from rlm.repl import BlockTimeout, CodeThread
import rlm.sandbox as sandbox
from rlm.sandbox import Sandbox, SandboxError

pytestmark = posix
both = pytest.mark.parametrize('kind', ['process', 'sandbox'])
bwrap = pytest.mark.skipif(not shutil.which('bwrap'), reason='bubblewrap is not installed')

@pytest.fixture
def ns():
    with new_ns('process') as ns: yield ns

@pytest.fixture(params=['process', 'sandbox'])
def each(request):
    with new_ns(request.param) as ns: yield ns

def out(code, ns, **kw):
    res = exec_code(code, ns, **kw)
    assert res.error is None, res.stderr
    return res.stdout

def marked(word): # Processes with this word in their command line
    def has(pid):
        try: return word in open(f'/proc/{pid}/cmdline').read()
        except OSError: return False
    return [o for o in os.listdir('/proc') if o.isdigit() and has(o)]

def worker_pids(ns): # The process that the host started, and those below it
    found, todo = [], [str(ns._session.link.proc.pid)]
    while todo:
        found.append(pid := todo.pop())
        for p in os.listdir(f'/proc/{pid}/task'): todo += open(f'/proc/{pid}/task/{p}/children').read().split()
    return found

def gone(pids): # Or ended and not yet buried
    def lives(pid):
        try: return open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0] not in 'ZX'
        except OSError: return False
    return not any(map(lives, pids))

# The border

data = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda o: st.lists(o, max_size=4) | st.dictionaries(st.text(), o, max_size=4), max_leaves=20)

@given(data)
def test_data_comes_back(o):
    head, raw = encode(o)
    assert decode(parse(json.dumps(head).encode()), raw) == o

@given(st.binary() | st.text(alphabet='[]{}",:\\ 1au').map(str.encode))
def test_noise_is_parsed_or_refused(data):
    try: parse(data)
    except FrameError: pass

BOMBS = [b'[' * 10**6, b'"\\' * 10**6, b'"' * 10**6, b'{"a":' * 10**5, b'[' + b'1,' * 10**7 + b'1]', b'9' * 10**6, b'[]' * 10**5]
@pytest.mark.parametrize('data', BOMBS, ids=range(len(BOMBS)))
def test_bombs_are_refused(data):
    with pytest.raises(FrameError): parse(data)

@pytest.mark.parametrize('o', [(1,), {1}, {1: 2}, {'k': [object()]}, b'x', 1j, [print]], ids=['tuple', 'set', 'key', 'object', 'bytes', 'complex', 'function'])
def test_what_is_no_data(o):
    with pytest.raises(TypeError): plain(o)

def test_kinds_of_data():
    class S(str): pass
    class L(list): pass
    assert plain(dict(a=[1, 2.5, None, True, S('x')], b=L([{}]))) == dict(a=[1, 2.5, None, True, 'x'], b=[{}]) and type(plain(S('x'))) is str
    assert plain([(1, 2), {3}, iter('ab')], True) == [[1, 2], [3], ['a', 'b']]
    with pytest.raises(ValueError): plain(deep := [], True, 0)
    loop = []; loop.append(loop)
    with pytest.raises(ValueError, match='deep'): plain(loop)

def test_wire():
    (r1, w1), (r2, w2) = os.pipe(), os.pipe()
    a, b = Wire(r1, w2), Wire(r2, w1, cap=1000)
    a.send(dict(x=1), b'raw'); assert b.recv() == (dict(x=1), b'raw')
    b.send(dict(y='é\ud800'), b'x' * 10**6); assert a.recv() == (dict(y='é\ud800'), b'x' * 10**6)
    with pytest.raises(TooLarge) as e: a.send({}, b'x' * 1001, cap=1000)
    assert (e.value.size, e.value.cap) == (1001, 1000)
    a.send({}, b'x' * 1001)
    with pytest.raises(FrameError): b.recv()
    a.close()
    os.close(r1); os.close(r2); b.close()
    with pytest.raises(BrokenPipeError): a.send({})

@pytest.mark.parametrize('v', ['text \ud800\0', b'\x00\xff', bytearray(b'ab'), [1, {'a': None}], float('inf'), 10**100, '', {}], ids=repr)
def test_values(each, v):
    each['v'] = v
    assert out(f'inf = float("inf")\nprint(v == {v!r}, type(v).__name__)', each) == f'True {type(v).__name__}\n' and each['v'] == v

def test_what_does_not_come_out(ns):
    out('import math\ndef f(): pass\nt = (1, 2)\ns = {1: 2}\nclass C: pass\nc = C()\nbig = "x" * 70_000_000', ns)
    for name, word in dict(math='a module', f='a function', t='a tuple', s='a key of type int|a dict with a key', C='a type', c='a C').items():
        with pytest.raises(TypeError, match=f"'{name}' is or holds ({word})"): ns[name]
    assert ns.repr('t') == '(1, 2)' and ns.repr('big', 10).startswith("'xxxxxxxxx... [")
    with pytest.raises(TooLarge, match='70,000,000 bytes are more than the 67,'): ns['big']
    for o in ((1, 2), {1}, object(), [object()]):
        with pytest.raises(TypeError, match="'v' is or holds a"): ns['v'] = o
    with pytest.raises(TypeError): ns[3] = 'x'
    assert out('print(t)', ns) == '(1, 2)\n'

def test_an_honest_value_over_a_limit_costs_no_session(each):
    out('kept, huge, many, deep = 1, 10**5000, [0] * 2_100_000, []\nfor i in range(98): deep = [deep]', each)
    for name, error, words in (('huge', TypeError, "'huge' is or holds an int of more than 4,300 digits"), ('deep', TypeError, "'deep' .* nested too deep"),
            ('many', TooLarge, '2,100,000 values are more than the 2,000,000')):
        with pytest.raises(error, match=words): each[name]
        assert each['kept'] == 1
    for o in (10**5000, [{'a': -10**5000}]):
        with pytest.raises(TypeError, match="'v' is or holds an int of more than 4,300 digits"): each['v'] = o
    each['v'] = most = [10**4299, -2.5]
    assert each['v'] == most
    out('import sys\nsys.set_int_max_str_digits(0)', each)
    with pytest.raises(TypeError, match='4,300 digits'): each['huge']
    out('sys.set_int_max_str_digits(640)\nhuge = 10**1000', each)
    with pytest.raises(TypeError, match='640 digits'): each['huge']
    assert each['kept'] == 1

@pytest.mark.parametrize('make', ['[0] * 2_100_000', '[10**5000]', '[{}] * 1_000_001', '[0] * 1_999_995', '["x" * 16_000_000, ""] + ["é"] * 100_000'])
def test_an_answer_over_a_limit_is_its_text(ns, make):
    code = f'import sys\nsys.set_int_max_str_digits(0)\nkept, big = 1, {make}'
    res = rlm_run('q', 'c', ns, ScriptLM([block(code), "FINAL_VAR(big)"]), protocol=PAPER)
    assert res.stop == 'answer' and len(res.answer) > 5000 and res.value == res.answer and ns['kept'] == 1

def test_an_argument_over_a_limit():
    with Sandbox('process', host_methods=dict(f=len)) as ns:
        assert 'TooLarge: 2,10' in exec_code('kept = 1\nhost_call("f", [0] * 2_100_000)', ns).error and ns['kept'] == 1
        assert "TypeError: `host_call` cannot be given an int of more than" in exec_code('host_call("f", 10**5000)', ns).error and ns['kept'] == 1

class Unsayable(Exception):
    def __str__(self): raise ValueError('no text')

def fails(e): raise e

@pytest.mark.parametrize('f, said', [(lambda: 2**20_000, 'TypeError: the host returned an int of more than 4,300 digits'), (lambda: 1j, 'TypeError: the host returned a complex'),
    (lambda: (1 / 0 for i in 'a'), 'ZeroDivisionError: division by zero'), (lambda: fails(Unsayable()), 'Unsayable: its text could not be made'),
    (lambda: 'x' * 70_000_000, 'TooLarge: 70,000,0')], ids=range(5))
def test_whatever_goes_wrong_with_a_reply_reaches_the_caller(ns, f, said):
    res = rlm_run('q', 'c', ns, ScriptLM([block('f()'), 'FINAL(1)']), tools=dict(f=f))
    assert said in res.iterations[0].code_blocks[0].result.stderr

def test_what_goes_in_has_no_limit_of_parts(each):
    lines = ['line'] * 2_100_000
    res = rlm_run('q', lines, each, ScriptLM([block('print(len(context), context[-1])'), 'FINAL(1)']))
    assert res.iterations[0].code_blocks[0].result.stdout == '2100000 line\n' and '2,100,000 items with 8,400,000 characters' in str(res.messages)
    meta = each.context_metadata()
    assert meta.context_total_length == 8_400_000 and len(meta.context_lengths) == 2_100_000
    lines[:] = ['a', 'b' * 300, 'c' * 70_000]
    each.bind_context(lines)
    assert each.context_metadata().context_lengths == [1, 300, 70_000]

def test_a_mapping(ns):
    ns.update(a=1, b='two', c=[3])
    assert list(ns) == ['a', 'b', 'c'] and len(ns) == 3 and 'a' in ns and 'z' not in ns and 3 not in ns and ns.get('z', 5) == 5
    assert ns.pop('a') == 1 and ns.pop('a', None) is None and dict(ns) == dict(b='two', c=[3])
    del ns['b']
    with pytest.raises(KeyError): ns['b']
    with pytest.raises(KeyError): del ns['b']
    ns.clear(); assert not list(ns)
    assert ns == ns and ns != {} and 'open' in repr(ns)

def test_reads_while_a_block_runs(ns):
    ns['x'] = 1
    t = threading.Thread(target=exec_code, args=('import time\nwhile x == 1: time.sleep(.01)', ns)); t.start()
    until(lambda: ns._session.job)
    assert ns['x'] == 1
    with pytest.raises(RuntimeError, match='running in this namespace already'): exec_code('1', ns)
    ns['x'] = 2
    t.join(HANG); assert not t.is_alive()

def test_forks_of_the_code(each):
    assert 'True' in out('import os\npid = os.fork()\nprint(pid > 0)', each).split() # And what the child prints, if it is in time
    assert out('print(pid > 0)', each) == 'True\n'
    assert out('pid = os.fork()\nif pid == 0: os._exit(7)\nprint(os.waitpid(pid, 0)[1] >> 8)', each) == '7\n'

# Calls of the host

@both
def test_host_methods(kind):
    seen, gate = [], threading.Barrier(3)
    def meet(payload): gate.wait(HANG); seen.append(payload); return payload * 2
    def broken(payload): raise OSError('no such thing')
    kw = dict(host_methods=dict(meet=meet, broken=broken, odd=lambda payload: object(), big=lambda payload: 'x' * 2**27))
    if kind == 'sandbox' and not shutil.which('bwrap'): pytest.skip('bubblewrap is not installed')
    with Sandbox('bwrap' if kind == 'sandbox' else kind, **kw) as ns:
        code = 'from concurrent.futures import ThreadPoolExecutor as P\nwith P(3) as p: print(sorted(p.map(lambda i: host_call("meet", i), range(3))))'
        assert out(code, ns) == '[0, 2, 4]\n'
        assert sorted(seen) == [0, 1, 2]
        for args, error in (('"other"', "NameError: the host allows no method 'other'; it allows: meet, broken, odd, big"), ('"broken"', 'OSError: no such thing'),
                ('"odd"', 'TypeError: the host returned a object'), ('"big"', 'bytes are more than'), ('"meet", object()', 'TypeError: `host_call` cannot be given a object'),
                ('[1]', "NameError: the host allows no method"), ('', 'TypeError')):
            assert error in exec_code(f'host_call({args})', ns).error, args
        with ns.child() as c: assert 'no such thing' in exec_code('host_call("broken")', c).error

def test_slots_that_failed(ns):
    def reply(msgs):
        if msgs[-1]['content'] == 'bad': raise ValueError('not this one')
        return 'fine'
    code = 'r = llm_query_batched(["a", "bad", "b"])\nprint([o[:5] for o in r], type(r[1]).__name__, isinstance(r[1], str), repr(r[1].error))'
    res = rlm_run('Go', 'text', ns, model=tree([block(code), 'FINAL(x)']), sub_model=ScriptLM(reply))
    assert res.iterations[0].code_blocks[0].result.stdout.startswith("['fine', 'Error', 'fine'] SubcallError True ")

def test_a_call_that_is_given_up_is_cancelled(each):
    "The block is over in time; its sub-call does not go on, and its thread is free."
    going, ended = threading.Event(), threading.Event()
    async def slow(msgs):
        import asyncio
        going.set()
        try: await asyncio.sleep(600)
        finally: ended.set()
    def run(seconds): return rlm_run('Go', 'text', each, model=tree([block('llm_query("x")'), 'FINAL(a)']), sub_model=slow, limits=dict(block_timeout=seconds))
    res, _ = given_time(run, lambda res: going.is_set(), .5)
    assert res.answer == 'a' and 'stopped after' in res.iterations[0].code_blocks[0].result.error
    assert going.is_set() and ended.wait(HANG)

def test_killed_with_calls_open(each):
    n, ended = [], []
    async def slow(msgs):
        import asyncio
        n.append(1)
        try: await asyncio.sleep(600)
        finally: ended.append(1)
    def shoot():
        until(lambda: len(n) == 5)
        os.kill(int(worker_pids(each)[-1]), signal.SIGKILL)
    t = threading.Thread(target=shoot); t.start()
    replies = [block('x = 1\nllm_query_batched(list("abcde"))'), block('print(context, "x" in globals())'), 'FINAL(a)']
    res = rlm_run('Go', 'the text', each, model=tree(replies), sub_model=slow)
    t.join()
    first, second = (it.code_blocks[0].result for it in res.iterations[:2])
    assert first.error.startswith('SessionLost: its process ended with signal 9 (SIGKILL)')
    assert 'all variables that you made are gone. There again: `context`' in first.notes[0]
    assert (second.stdout, second.notes, res.answer) == ('the text False\n', [], 'a')
    assert until(lambda: len(ended) == 5) and len(first.llm_calls) == 5

def test_told_once_also_between_blocks(each):
    out('x = 1', each)
    os.kill(int(worker_pids(each)[-1]), signal.SIGKILL)
    until(lambda: each._session.lost)
    res = exec_code('print("x" in globals())', each)
    assert res.stdout == 'False\n' and len(res.notes) == 1 and not exec_code('1', each).notes

def test_late_calls_and_output(ns):
    code = '''
        import threading
        go, said = threading.Event(), []
        def f(): go.wait(); said.append(llm_query("late")); print("never shown")
        t = threading.Thread(target=f); t.start()'''
    res = rlm_run('Go', 'text', ns, model=tree([block(code), block('go.set(); t.join(); print(said)'), 'FINAL(a)']))
    a, b = (it.code_blocks[0].result for it in res.iterations[:2])
    assert b.stdout == "['LATE']\n" and not a.llm_calls and [c.prompt for c in b.llm_calls] == ['late']

# Its end

@both
def test_nothing_is_left(kind):
    with new_ns(kind) as ns:
        out('import subprocess; p = subprocess.Popen(["sleep", "3600"])', ns)
        pids = worker_pids(ns)
    assert len(pids) >= 2 and until(lambda: gone(pids))
    with pytest.raises(RuntimeError, match='closed'): exec_code('1', ns)
    ns = Sandbox('bwrap' if kind == 'sandbox' else kind)
    rlm_run('Go', 'text', ns, model=tree([block('x = llm_query("a")'), 'FINAL(a)']))
    pids = worker_pids(ns)
    del ns; gc.collect()
    until(lambda: gone(pids))

HOST = '''
import sys, time, threading
from rlm import exec_code
from rlm.sandbox import Sandbox
ns = Sandbox(sys.argv[1])
threading.Thread(target=exec_code, args=({code!r}, ns), daemon=True).start()
input()
'''
BUSY = 'import subprocess, sys, itertools\nsubprocess.Popen(["sleep", "{mark}"])\nsum(itertools.repeat(1))'

@pytest.mark.parametrize('end', ['kill', 'exit'])
@pytest.mark.parametrize('kind', ['process', 'bwrap', 'gvisor'])
def test_the_host_ends(kind, end):
    "Killed with -9 in the middle of a block that no signal ends, or done with its work: nothing goes on."
    if kind != 'process' and not shutil.which(dict(bwrap='bwrap', gvisor='runsc')[kind]): pytest.skip(f'{kind} is not installed')
    if kind == 'gvisor' and (os.geteuid() or not sandbox.group_places()): pytest.skip('gVisor needs root and control groups')
    mark = f'{os.getpid()}{time.time_ns() % 10**6}.5'
    before = set(marked('rlm._worker') + marked('runsc'))
    p = subprocess.Popen([sys.executable, '-c', HOST.format(code=BUSY.format(mark=mark)), kind], env=environment(), stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: marked(mark) if kind != 'gvisor' else set(marked('runsc')) - before)
    if end == 'kill': p.kill()
    else: p.stdin.write(b'\n'); p.stdin.flush()
    p.wait(HANG)
    until(lambda: not set(marked('rlm._worker') + marked('runsc')) - before)
    if kind == 'process': # What the code started is bound to nothing here
        for pid in marked(mark): os.kill(int(pid), signal.SIGKILL)
    else: until(lambda: not marked(mark))

@both
def test_the_thread_that_made_it_may_end(kind):
    with new_ns(kind): pass
    made = []
    t = threading.Thread(target=lambda: made.append(Sandbox('bwrap' if kind == 'sandbox' else kind))); t.start(); t.join()
    with made[0] as ns:
        for _ in range(20): assert out('print(1)', ns) == '1\n'

@forks
def test_a_fork_has_no_part_in_it(ns):
    out('x = 1', ns)
    def use():
        try: ns['x']
        except RuntimeError as e: return str(e)
    assert 'make a new one after a fork' in in_child(use)
    assert in_child(lambda: [Sandbox('process').kind, gc.collect() * 0]) == ['process', 0]
    assert out('print(x)', ns) == '1\n'

# Interrupts

def test_interrupt_keeps_the_state(each):
    out('x = 1', each)
    t = threading.Thread(target=lambda: (until(lambda: each._session.job), each.interrupt())); t.start()
    res = exec_code('print("begun"); import time; time.sleep(600)', each)
    assert res.error == 'KeyboardInterrupt' and res.stdout == 'begun\n' and out('print(x)', each) == '1\n'
    each.interrupt(); assert out('print(x)', each) == '1\n' # There is nothing to interrupt

def test_an_interrupt_that_comes_too_early(each):
    "A run is cancelled when its block is about to start: it does not go on without anyone who waits for it."
    each.bind(sandbox.repl.Scaffold())
    each.interrupt()
    assert exec_code('while True: pass', each).error == 'KeyboardInterrupt' and out('print(1)', each) == '1\n'
    each.interrupt(); each.unbind()
    assert out('print(2)', each) == '2\n'

def test_interrupted_from_another_thread(each):
    "As a run that is cancelled does it to its children."
    th = CodeThread()
    fut = th.submit(lambda: exec_code('x = 1\nwhile True: pass', each))
    until(lambda: each._session.job)
    fut.gate.interrupt()
    with pytest.raises(BlockTimeout): fut.result(HANG)
    th.close()
    assert out('print(x)', each) == '1\n'

def test_kill(each):
    out('x = 1', each)
    t = threading.Thread(target=lambda: (until(lambda: each._session.job), each.kill())); t.start()
    assert exec_code('while True: pass', each).error == 'SessionLost: it was killed'
    assert 'x' not in each

CTRL_C = '''
import os, signal, sys, threading
from rlm import exec_code
from rlm.sandbox import Sandbox
ns = Sandbox(sys.argv[1])
def press():
    while 'begun' not in ns: pass
    os.killpg(0, signal.SIGINT)
threading.Thread(target=press, daemon=True).start()
try: exec_code('import time\\nprint("out")\\nbegun = 1\\ntime.sleep(600)', ns)
except KeyboardInterrupt as e: print(repr(e.block.stdout), e.block.error, ns['begun'])
'''
@pytest.mark.parametrize('kind', ['process', pytest.param('bwrap', marks=bwrap)])
def test_ctrl_c(kind):
    "The whole group of processes is sent it, as by a terminal: it ends the block, and not the worker."
    p = script(CTRL_C, kind, start_new_session=True)
    assert p.stdout == "'out\\n' KeyboardInterrupt 1\n", p.stderr

# What it may do

@bwrap
def test_a_venv():
    numpy = pytest.importorskip('numpy')
    with Sandbox() as ns: assert out('import sys; print(sys.prefix)', ns) == f'{sys.base_prefix}\n'
    with Sandbox(venv=os.path.relpath(sys.prefix)) as ns:
        assert out('import numpy, sys; print(numpy.__file__, sys.prefix)', ns) == f'{numpy.__file__} {sys.prefix}\n'

@bwrap
def test_a_full_disk():
    with Sandbox(disk=8) as ns:
        assert 'No space left' in exec_code('x = 1\nwith open("/tmp/f", "wb") as f:\n    while True: f.write(bytes(2**20))', ns).error
        assert out('import os, tempfile; os.remove("/tmp/f"); print(x, tempfile.TemporaryFile().write(b"1"))', ns) == '1 1\n'

@bwrap
def test_without_control_groups(monkeypatch):
    "The limits are then those of each process, and of the number of processes."
    monkeypatch.setattr(sandbox, 'group_places', lambda: [])
    with Sandbox(memory=300, processes=20) as ns:
        assert exec_code('x = 1\ny = b"x" * (1 << 30)', ns).error == 'MemoryError'
        code = 'import os, time\nfor n in range(100):\n    try:\n        if os.fork() == 0: time.sleep(600)\n    except OSError: break\nprint(n, x)'
        assert 5 < int(out(code, ns).split()[0]) < 20

AS_OTHER = '''
import os
from rlm import exec_code
from rlm.sandbox import Sandbox
with Sandbox() as ns: print(os.getuid(), exec_code("import os; print(os.getuid(), os.listdir('/'))", ns).stdout)
'''
@bwrap
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which('setpriv'), reason='only root can become another user')
def test_as_a_user_without_rights(tmp_path_factory):
    python = next((o for o in (f'/usr/bin/python3.{n}' for n in (13, 12, 11)) if os.path.exists(o)), None)
    home = os.path.dirname(os.path.dirname(sandbox.__file__))
    cmd, env = ['setpriv', '--reuid', '12345', '--regid', '12345', '--clear-groups', python, '-c', AS_OTHER], dict(PYTHONPATH=home, PATH=os.environ['PATH'])
    p = python and subprocess.run(cmd, capture_output=True, text=True, cwd='/', env=env)
    if not python or 'No module' in p.stderr: pytest.skip('there is no Python that such a user can run this with')
    assert p.stdout.startswith("12345 12345 ["), p.stderr

@pytest.mark.parametrize('kind, name', [('bwrap', 'bubblewrap'), ('gvisor', 'runsc')])
def test_what_is_not_installed_is_said(kind, name, monkeypatch):
    monkeypatch.setattr(sandbox.shutil, 'which', lambda name: None)
    with pytest.raises(SandboxError, match=f'install {name}, such as by `apt install {name}`'): Sandbox(kind)

@bwrap
def test_a_bubblewrap_that_fails_is_heard(monkeypatch):
    monkeypatch.setattr(sandbox, '_view', lambda box, ours: ['--ro-bind', '/no-such-folder', '/usr'])
    with pytest.raises(SandboxError, match='no-such-folder'): Sandbox()
    with pytest.raises(ValueError, match='there is no kind'): Sandbox('jail')

def test_a_run_in_which_everything_is_lost(each):
    replies = [block('import os; rows = context.split(); os._exit(1)'),
        block('print(llm_query(context[:5]), "rows" in globals()); answer["content"] = len(context)'), block('answer["ready"] = True')]
    res = rlm_run('Go', 'the whole text', each, model=tree(replies), protocol=ANSWER, tools=dict(double=lambda x: 2 * x))
    assert (res.answer, res.stop) == ('14', 'answer')
    assert res.iterations[1].code_blocks[0].result.stdout == 'THE W False\n' and out('print(double(4))', each) == '8\n'
    assert 'all variables that you made are gone' in res.messages[3]['content'] and sum('are gone' in m['content'] for m in res.messages) == 1

@bwrap
def test_offline_end_to_end():
    with Sandbox() as ns:
        res = rlm_run('What is the code of the vault?', 'Noise. ' * 50_000 + 'The code of the vault is 731. ' + 'Noise. ' * 50_000, ns, model='offline')
        assert '731' in res.answer

def test_a_session_that_was_killed_between_two_questions(ns):
    "The next run has its own functions, the context is the one that it was, and a variable that is None is none of its copies."
    context, lm = ['a', 'b'], tree([block('print(llm_query("hi"))'), 'FINAL(1)'])
    rlm_run('First?', context, ns, model=lm)
    ns.kill()
    exec_code('mine = None', ns)
    res = rlm_run('Second?', context, ns, model=lm)
    ns.kill()
    last = rlm_run('Third?', context, ns, model=lm)
    assert [o.iterations[0].code_blocks[0].result.stdout for o in (res, last)] == ['HI\n'] * 2 and 'context_0' not in ns
    assert 'Earlier contexts' not in res.messages[1]['content'] + last.messages[1]['content']

def test_a_variable_that_is_none_is_not_the_context(ns):
    context, lm = ['a', 'b'], tree(['FINAL(1)'])
    rlm_run('First?', context, ns, model=lm)
    ns.kill()
    exec_code('mine = None', ns)
    rlm_run('Second?', context, ns, model=lm)
    assert ns['mine'] is None

def test_a_storm_of_interrupts(ns):
    "They end the block that runs, and nothing else: the session lives, and no deadline is left behind."
    over, done = threading.Event(), []
    def storm():
        while not over.is_set(): ns.interrupt()
    t = threading.Thread(target=storm, daemon=True); t.start()
    try:
        for _ in range(300): exec_code('x = 1', ns); done.append(ns._session.stop_at)
        res = exec_code('while True: pass', ns)
    finally: over.set(); t.join(HANG)
    assert done == [None] * 300 and res.error == 'KeyboardInterrupt' and ns['x'] == 1 and out('print(x)', ns) == '1\n'

def test_the_next_block_waits_for_one_that_is_being_interrupted(ns):
    t = threading.Thread(target=exec_code, args=('try:\n while True: pass\nfinally:\n for i in range(3_000_000): pass', ns), daemon=True); t.start()
    until(lambda: ns._session.job)
    ns.interrupt()
    assert out('print("next")', ns) == 'next\n'
    t.join(HANG)

def test_two_blocks_at_once_are_refused(ns):
    t = threading.Thread(target=exec_code, args=('while True: pass', ns), daemon=True); t.start()
    until(lambda: ns._session.job)
    with pytest.raises(RuntimeError, match='running in this namespace already'): exec_code('1', ns)
    ns.interrupt(); t.join(HANG)

# Calls that go past namespaces

@bwrap
@pytest.mark.skipif(os.uname().machine not in filtered_calls, reason='the filter does not know this processor')
def test_refused_calls():
    look = '''
        import ctypes, socket, subprocess
        def errno(*args):
            ctypes.set_errno(0)
            return libc.syscall(*args) and ctypes.get_errno()
        libc = ctypes.CDLL(None, use_errno=True)
        print([errno(o, 0, 0, 0, 0, 0) for o in refused] == [1] * len(refused), errno(1 << 30 | 41, 1, 1, 0))
        print([errno(makes, o, 3, 0) for makes in sockets for o in (40, 17, 38)], errno(sockets[0], 16, 3, 9))
        print([socket.socket(o).close() for o in (1, 2, 10)], len(socket.socketpair()), socket.if_nameindex()[0][1])
        print(subprocess.run(['python3', '-c', 'import socket; socket.socket(40)'], capture_output=True, text=True).stderr[-41:])'''
    with Sandbox() as ns:
        _, ns['sockets'], ns['refused'] = [list(o) if isinstance(o, tuple) else o for o in filtered_calls[os.uname().machine]]
        assert out(textwrap.dedent(look), ns) == '''True 1
[97, 97, 97, 97, 97, 97] 97
[None, None, None] 2 lo
Address family not supported by protocol

'''

# Options

BAD = [(dict(memory='1G'), TypeError, "`memory` must be a whole number, not '1G'"), (dict(disk='a'), TypeError, '`disk`'), (dict(memory=-5), ValueError, '`memory` must be from 1'),
    (dict(max_value='x'), TypeError, '`max_value`'), (dict(processes=0), ValueError, '`processes`'), (dict(max_value=0), ValueError, '`max_value`'), (dict(memory=True), TypeError, '`memory`'),
    (dict(disk=10**30), ValueError, '`disk`'), (dict(host_methods={'x': 3}), TypeError, "by name, but 'x' is 3"), (dict(host_methods=[len]), TypeError, '`host_methods` must be a dict'),
    (dict(kind=['bwrap']), ValueError, 'there is no kind')]

@pytest.mark.parametrize('options, error, words', BAD, ids=lambda o: str(o) if isinstance(o, dict) else '')
def test_bad_options_are_refused_at_the_start(options, error, words):
    with pytest.raises(error, match=words): Sandbox(**dict(dict(kind='process'), **options))

def test_closed():
    ns = Sandbox('process'); ns.close()
    for f in (lambda: ns['x'], lambda: exec_code('1', ns), lambda: ns.bind_context('c')):
        with pytest.raises(RLMError, match='this namespace is closed') as e: f()
        assert isinstance(e.value, RuntimeError) and isinstance(e.value, NamespaceClosed)

@pytest.mark.skipif(not shutil.which('runsc'), reason='runsc is not installed')
def test_gvisor_takes_away_what_a_killed_host_left(tmp_path, monkeypatch):
    if os.geteuid() or not sandbox.group_places(): pytest.skip('gVisor needs root and control groups')
    code = "import os, signal, rlm.sandbox as s\nns = s.Sandbox('gvisor')\nos.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, '-c', code], env=environment() | dict(TMPDIR=str(tmp_path)))
    (tmp_path/'rlm-my-work').mkdir(); (tmp_path/'rlm-gvisor-notes-1').mkdir()
    monkeypatch.setattr(sandbox.tempfile, 'tempdir', str(tmp_path))
    assert len(os.listdir(tmp_path)) == 3
    with Sandbox('gvisor') as ns, Sandbox('gvisor') as other: assert len(os.listdir(tmp_path)) == 4 and out('print(1)', ns) == out('print(1)', other) == '1\n'
    assert sorted(os.listdir(tmp_path)) == ['rlm-gvisor-notes-1', 'rlm-my-work']

@pytest.mark.parametrize('kind', ['process', 'bwrap'])
def test_packages_are_there_and_nothing_of_theirs_has_run(kind):
    "Without a venv the interpreter's own packages can be imported, but no .pth file was read; `exit` is there as in any Python."
    try: ns = Sandbox(kind)
    except SandboxError as e: pytest.skip(str(e))
    with ns:
        res = exec_code('import sys, site\nprint(sys.flags.no_site, [o for o in site.getsitepackages() if o not in sys.path])\nexit(3)', ns)
    assert (res.stdout, res.error) == ('1 []\n', 'SystemExit: 3')
