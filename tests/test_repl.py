"""Hostile and unlucky code: whatever a block does, `exec_code` returns a REPLResult, and the next block, the other runs and the host are unharmed."""
import ast, asyncio, gc, json, os, signal, subprocess, sys, textwrap, threading, time, tracemalloc
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
import pytest
from hypothesis import given, strategies as st
from common import HANG, at, elsewhere, forks, given_time, in_child, on_both, posix, script, until
from rlm import repl, stopping
from rlm._rlmpaper_compat import REPLResult
from rlm.repl import CodeThread, Scaffold, bind, exec_code, interruptible, shielded, show_vars, summarize, unbind

def run(code, ns=None, **kw): return exec_code(textwrap.dedent(code), {} if ns is None else ns, **kw)

def check_alive(ns=None, **kw):
    "A block is as good as ever."
    res = exec_code('print("alive")\n6 * 7', {} if ns is None else ns, **kw)
    assert (res.stdout, res.stderr, res.error) == ('alive\n42\n', '', None)

# What a block may raise

RAISES = {
    'import sys; sys.exit(3)': 'SystemExit: 3',
    'raise SystemExit': 'SystemExit',
    'raise KeyboardInterrupt': 'KeyboardInterrupt',
    'raise KeyboardInterrupt("mine")': 'KeyboardInterrupt: mine',
    'raise GeneratorExit': 'GeneratorExit',
    'raise StopIteration(5)': 'StopIteration: 5',
    'import asyncio; raise asyncio.CancelledError': 'CancelledError',
    'class E(BaseException): pass\nraise E("mine")': 'E: mine',
    'raise MemoryError': 'MemoryError',
    '[0] * 10**18': 'MemoryError',
    'raise': 'RuntimeError: No active exception to reraise',
    'raise 3': 'TypeError: exceptions must derive from BaseException',
    'def f(): return f()\nf()': 'RecursionError: maximum recursion depth exceeded',
    'x = []\nfor _ in range(10**5): x = [x]\nx': 'RecursionError: maximum recursion depth exceeded',
    'raise ExceptionGroup("both", [ValueError("a"), ExceptionGroup("c", [TypeError("b")])])': 'ExceptionGroup: both (2 sub-exceptions)',
    'raise BaseExceptionGroup("both", [SystemExit(1)])': 'BaseExceptionGroup: both (1 sub-exception)',
    'class E(Exception):\n  def __str__(self): raise SystemExit\nraise E': 'E',
    'class E(Exception):\n  def __str__(self): return 3\nraise E': 'E: <exception str() failed>',
    'class E(Exception):\n  def __repr__(self): 1/0\n  def __str__(self): 1/0\nraise E': 'E: <exception str() failed>',
    'class E(Exception): __module__ = 3\nraise E("x")': 'E: x',
    'class E(Exception): __qualname__ = "F\\n"\nraise E("x")': 'x',
    'e = ValueError("x"); e.__notes__ = 5; raise e': 'ValueError: x',
    'e = ValueError("x"); e.add_note("more"); raise e': 'ValueError: x',
    'e = ValueError("x"); e.__cause__ = e; raise e': 'ValueError: x',
    'e = ValueError("x"); f = ValueError("y"); e.__cause__, f.__cause__ = f, e; raise e': 'ValueError: x',
    'raise SyntaxError("x", ("file", None, None, None))': 'SyntaxError: x',
    'raise SyntaxError("x", ("file", "1", "2", 3))': 'SyntaxError: x',
    'raise NameError(name=3)': 'NameError',
    'raise ImportError(name=[], path={})': 'ImportError',
    'raise UnicodeDecodeError("utf-8", b"\\xff", 0, 1, "bad")': 'UnicodeDecodeError: ',
    'raise OSError(2, "no", object())': 'FileNotFoundError',
    'raise ValueError("\\ud800 \\0 \\x1b[31m")': 'ValueError: \ud800',
    'raise ValueError("a\\nb\\nc")': 'ValueError: a\nb\nc',
    'raise ValueError("z" * 10**6)': 'ValueError: zzz',
    'def f(n):\n  if n: f(n - 1)\n  1/0\nf(500)': 'ZeroDivisionError',
    'x = 1\nx +': 'SyntaxError: invalid syntax',
    'if True:\nx = 1': 'IndentationError: expected an indented block',
    'return 5': "SyntaxError: 'return' outside function",
    'await f()': "NameError: name 'f' is not defined",
    'x = "\ud800"': 'UnicodeEncodeError: ',
    'x = 1\0': 'SyntaxError: source code string cannot contain null bytes',
    '(' * 300 + ')' * 300: 'SyntaxError: too many nested parentheses',
    'def f(x, x): pass': "SyntaxError: duplicate argument 'x'",
    'del nothing': "NameError: name 'nothing' is not defined",
    'nothing': "NameError: name 'nothing' is not defined",
    'from nowhere import x': "ModuleNotFoundError: No module named 'nowhere'",
    'class R:\n  def __repr__(self): 1/0\nR()': 'ZeroDivisionError',
    'class R:\n  def __repr__(self): return 5\nR()': 'TypeError: __repr__ returned non-string',
    'class M(type):\n  def __call__(cls): raise SystemExit\nclass C(metaclass=M): pass\nC()': 'SystemExit',
    'assert False, "so"': 'AssertionError: so',
    '1 if 1 else 1/0\n10**5000': 'ValueError: Exceeds the limit',
}

def compiles(code):
    try: compile(code, '', 'exec', ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    except (SyntaxError, ValueError): return False
    return True

@on_both
@pytest.mark.parametrize('code', RAISES, ids=lambda s: s[:50].encode('unicode_escape').decode())
def test_what_code_raises_is_in_the_result(code, off_main):
    ns = {}
    res = at(off_main, exec_code, 'before = 1\nprint("out")\n' + code, ns)
    assert RAISES[code] in res.error and res.error == res.error.strip()
    assert 'ast.py' not in res.stderr and os.path.dirname(repl.__file__) not in res.stderr and 'exec_code' not in res.stderr
    assert (res.stdout, ns.get('before')) == (('out\n', 1) if compiles(code) else ('', None))
    assert str(res) and len(res.stderr) < 300_000
    at(off_main, check_alive, ns)

@on_both
@pytest.mark.parametrize('code', ['x = ' + '-' * 200_000 + '1', 'x = ' + '1' + ' + 1' * 200_000, 'x = ' + '[' * 150 + ']' * 150 + '[0]' * 100_000, 'x = 1\n' + 'if x:\n'.join(' ' * i for i in range(99)) + 'pass',
    'x = f' + '"{' * 200 + '1' + '}"' * 200, 'x = ' + 'lambda: ' * 50_000 + '1', 'x = 1' + ' if 1 else 1' * 50_000, 'x = y' + '.y' * 100_000], ids=lambda s: s[:12])
def test_code_too_deep_to_compile(code, off_main):
    res = at(off_main, exec_code, code, {})
    assert isinstance(res, REPLResult) and len(res.stderr) < 500_000
    at(off_main, check_alive)

@pytest.mark.parametrize('n', [10, 100, 3000])
@pytest.mark.parametrize('link', ['e.__cause__', 'e.__context__'])
def test_a_long_chain_of_exceptions(link, n):
    "Such as a loop that retries within its own `except` leaves behind."
    res = run(f'''
        last = ValueError("first")
        for i in range({n}):
            e = ValueError(f"number {{i}}"); {link} = last; last = e
        raise last''')
    assert res.error == f'ValueError: number {n - 1}' and len(res.stderr) <= 201_000
    check_alive()

def test_a_deep_group_of_exceptions():
    res = run('e = ValueError("core")\nfor _ in range(3000): e = ExceptionGroup("g", [e])\nraise e')
    assert res.error.startswith('ExceptionGroup') and len(res.stderr) <= 201_000

# What the traceback shows

def test_a_traceback_shows_the_blocks_own_lines():
    ns = {}
    run('def divide(a, b):\n    return a / b  # in the first block', ns)
    run('def half(a):\n    return divide(a, 0)  # in the second block', ns)
    res = run('x = 1\nhalf(x)  # in the third block', ns)
    assert [s in res.stderr for s in ('in the first block', 'in the second block', 'in the third block')] == [True] * 3
    assert res.stderr.startswith('Traceback (most recent call last):') and res.stderr.endswith('ZeroDivisionError: division by zero\n')
    assert res.stderr.count('  File ') == 3 and res.error == 'ZeroDivisionError: division by zero'

def test_a_traceback_through_a_library():
    res = run('import json\njson.loads("{")')
    assert 'json.loads("{")' in res.stderr and 'decoder.py' in res.stderr and 'JSONDecodeError' in res.error

def test_a_traceback_of_a_cause():
    res = run('def f(): raise KeyError("inner line")\ntry: f()\nexcept KeyError as e: raise ValueError("outer") from e')
    assert 'direct cause' in res.stderr and 'inner line' in res.stderr and 'repl.py' not in res.stderr

def test_sources_of_old_blocks_are_kept_for_a_while_and_not_for_ever():
    import linecache
    ns = {}
    run('def f():\n    return 1/0  # the line', ns)
    for _ in range(500): run('pass', ns)
    assert '# the line' in run('f()', ns).stderr
    for _ in range(600): run('pass', ns)
    assert 'ZeroDivisionError' in run('f()', ns).stderr
    assert sum(k.startswith('<block ') for k in linecache.cache) <= 1001

# Output

WRITES = {
    'print("a"); print("b", file=__import__("sys").stderr)': ('a\n', 'b\n'),
    'import sys; sys.stdout.write("a"); sys.stderr.write("b"); None': ('a', 'b'),
    'import sys; sys.stdout.writelines(["a", "b"]); sys.stdout.flush()': ('ab', ''),
    'import sys; sys.stdout.buffer.write("é".encode()); sys.stdout.buffer.flush()': ('é', ''),
    'import sys; print("a", end="", flush=True); sys.stdout.isatty()': ('aFalse\n', ''),
    'print("\\ud800")': ('\ud800\n', ''),
    'import sys; out = sys.stdout; sys.stdout = sys.stderr; print("b"); sys.stdout = out; print("a")': ('a\n', 'b\n'),
    'import io, contextlib\nwith contextlib.redirect_stdout(io.StringIO()) as f: print("in")\nprint("got", f.getvalue())': ('got in\n\n', ''),
    'import sys, contextlib\nwith contextlib.redirect_stdout(sys.stderr): print("b")\nprint("a")': ('a\n', 'b\n'),
    'import io, contextlib\nwith contextlib.redirect_stderr(io.StringIO()) as f: 1/0': ('', None),
    'import logging\nlog = logging.Logger("x"); log.addHandler(logging.StreamHandler()); log.warning("b")': ('', 'b\n'),
    'import traceback\ntry: 1/0\nexcept ZeroDivisionError: traceback.print_exc()': ('', None),
    'import threading\nfor c in "ab": t = threading.Thread(target=print, args=[c]); t.start(); t.join()': ('a\nb\n', ''),
    'from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as ex: list(ex.map(lambda i: print("x\\n", end=""), range(20)))': ('x\n' * 20 + '[' + ', '.join(['None'] * 20) + ']\n', ''),
    'import threading\nt = threading.Timer(0, print, ["a"]); t.start(); t.join()': ('a\n', ''),
    'import _thread, threading\ne = threading.Event()\n_thread.start_new_thread(lambda: e.set(), ()); e.wait()': ('True\n', ''),
    'class D:\n  def __del__(self): print("gone")\nd = D()\ndel d\nprint("a")': ('gone\na\n', ''),
    'import sys; sys.displayhook(5)': ('5\n', ''),
    'import pprint; pprint.pprint({"a": 1})': ("{'a': 1}\n", ''),
    'import atexit, asyncio\nasync def f(): print("a"); await asyncio.sleep(0); print("b")\nasyncio.run(f())': ('a\nb\n', ''),
    'def f():\n  print("in"); yield 1\nlist(f())': ('in\n[1]\n', ''),
    'help(len)': (None, ''),
    'import sys, io; sys.stdout = f = io.StringIO(); print("in"); sys.stdout = sys.__stdout__; print("a")': ('a\n', ''),
    'import sys; sys.stdout.write(b"a")': ('', None),
    'import sys; print(sys.stdout.encoding, file=sys.stderr)': ('', None),
    'import sys; sys.stdout.write("a"); sys.stdout.fileno': (None, ''),
}

@on_both
@pytest.mark.parametrize('code', WRITES, ids=lambda s: s[-50:])
def test_output_is_the_blocks(code, off_main, capfd):
    want_out, want_err = WRITES[code]
    res = at(off_main, exec_code, code, {})
    if want_out is not None: assert res.stdout == want_out or 'list(' in code and res.stdout.startswith(want_out[:40])
    if want_err is not None: assert res.stderr == want_err
    else: assert res.stderr
    assert capfd.readouterr() == ('', '')
    at(off_main, check_alive)

HOOKS = dict(warning=('import warnings\nwarnings.warn("careful")  # this line', 'UserWarning: careful'), thread=('import threading\ndef f(): return 1/0  # this line\n'
    't = threading.Thread(target=f); t.start(); t.join()', 'ZeroDivisionError'), unraisable=('class D:\n  def __del__(self): 1/0  # this line\nD(); None', 'ZeroDivisionError'))
@pytest.mark.parametrize('what', HOOKS)
def test_what_python_itself_reports_is_shown(what):
    "In a script: pytest has hooks of its own. The engine's lines are not shown."
    p = script('''
        import sys
        from rlm import exec_code
        code, words = sys.argv[1:]
        res = exec_code(code + "\\nprint('on')", {})
        assert (res.stdout, res.error) == ('on\\n', None)
        assert words in res.stderr and ('# this line' in res.stderr or 'Exception ignored' in res.stderr), res.stderr
        assert exec_code('1', {}).stderr == ''
        assert 'repl.py' not in res.stderr, res.stderr''', *HOOKS[what])
    assert (p.returncode, p.stdout, p.stderr) == (0, '', '')

LEAVES = {
    'a StringIO as stdout': 'import sys, io; sys.stdout = io.StringIO(); print("lost"); 1/0',
    'None as stdout': 'import sys; sys.stdout = None',
    'None as both': 'import sys; sys.stdout = sys.stderr = None',
    'stdout deleted': 'import sys; del sys.stdout',
    'both deleted': 'import sys; del sys.stdout, sys.stderr',
    'a closed stdout': 'import sys; sys.stdout.close()',
    'a closed stderr': 'import sys; sys.stderr.close()',
    'a closed file as stdout': 'import sys; sys.stdout = open("/dev/null", "w"); sys.stdout.close()',
    'an object as stdout': 'import sys; sys.stdout = object()',
    'redirect_stdout entered': 'import io, contextlib; c = contextlib.redirect_stdout(io.StringIO()); c.__enter__(); None',
    'stdout detached': 'import sys; sys.stdout.detach()',
    'the real stdout put back': 'import sys; sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__',
    'a wrapper of stdout': 'import sys\nclass T:\n  def __init__(s, f): s.f = f\n  def write(s, x): return s.f.write(x)\n  def flush(s): s.f.flush()\nsys.stdout = T(sys.stdout)',
    'a text wrapper of its buffer': 'import sys, io; sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8")',
    'fd 1 closed': 'import os; os.close(1)',
    'fds 0 to 2 closed': 'import os; os.closerange(0, 3)',
    'fd 1 onto null': 'import os; os.dup2(os.open(os.devnull, os.O_WRONLY), 1)',
    'an excepthook': 'import sys, threading; sys.excepthook = threading.excepthook = None',
    'a trace function': 'import sys; sys.settrace(lambda *a: 1/0); sys.setprofile(None)',
    'a low recursion limit': 'import sys; sys.setrecursionlimit(150)',
    'another directory': 'import os, tempfile; os.chdir(tempfile.mkdtemp()); os.rmdir(os.getcwd())',
    'no modules': 'import sys; [sys.modules.pop(k) for k in list(sys.modules) if k.startswith("rlm")]; None',
    'linecache cleared': 'import linecache; linecache.cache.clear()',
    'other builtins': 'import builtins; builtins.print = builtins.repr = None',
    'a non-daemon thread': 'import threading; e = threading.Event(); t = threading.Thread(target=e.wait, args=[1]); t.start()',
    'a thread that started': 'import threading; threading.Thread.start = None',
    'its own __builtins__': '__builtins__ = {}',
    'its own __name__': '__name__ = 5; __file__ = 6; __rlm__ = None',
    'an alarm handler': 'import signal; signal.signal(signal.SIGALRM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)',
    'a closed event loop': 'import asyncio; loop = asyncio.new_event_loop(); asyncio.set_event_loop(loop); loop.close()',
}
MESSY = '''
    import json, os, sys
    from rlm import exec_code
    code, path = sys.argv[1:]
    ns, say = {}, print # What a block does to builtins is the host's loss, and not tested here
    exec_code(code, ns)
    after = [(r.stdout, r.stderr, r.error) for o in (ns, {}) for r in [exec_code('import sys\\nw = sys.stdout.write\\nw("alive") and None', o), exec_code('w("well")\\n1/0', o)]]
    said = 'nothing'
    try: say('host', flush=True); said = 'printed'
    except Exception as e: said = type(e).__name__
    with open(path, 'w') as f: json.dump([[r[0], r[2]] for r in after] + [said], f)
'''

@posix
@pytest.mark.parametrize('what', LEAVES)
def test_what_a_block_leaves_behind(what, tmp_path):
    "The next blocks in the same namespace, and in others, print into their own results; the host's own print works as before."
    path = tmp_path / 'result'
    p = script(MESSY, LEAVES[what], str(path))
    assert path.exists(), p.stderr
    *blocks, host = json.loads(path.read_text())
    assert blocks == [['alive', None], ['well', 'ZeroDivisionError: division by zero']] * 2
    if 'stdout' in what and 'fd' not in what and 'real' not in what: assert (host, p.stdout) == ('printed', 'host\n')

# Bounded memory

def peak(f):
    tracemalloc.start()
    try: res = f(); return res, tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()

@pytest.mark.parametrize('code, n', [
    ('s = "x" * 10**6\nfor _ in range(2000): print(s)', 2000 * (10**6 + 1)),
    ('import sys\nw = sys.stdout.write\nfor _ in range(60_000): w("ab")', 120_000),
    ('import sys\nw = sys.stdout.write\nfor _ in range(150_000): w("")', 0),
    ('import sys\nw = sys.stdout.buffer.write\nfor _ in range(100): w(b"x" * 10**5)', 10**7)], ids=['lines', 'pieces', 'nothing', 'bytes'])
def test_huge_output_takes_bounded_memory(code, n):
    res, most = peak(lambda: exec_code(code, {}, max_output=10_000))
    assert res.error is None and most < (4_000_000 if n else 500_000)
    assert len(res.stdout) < 10_200 and (n < 10_000 or f'{n - 10_000:,} characters cut' in res.stdout)

@pytest.mark.parametrize('value', ['"x" * 10**7', 'b"x" * 10**7', 'list(range(10**6))', '["x" * 10**6] * 5'])
def test_a_huge_last_expression(value):
    res = exec_code(value, {}, max_output=1000)
    assert res.error is None and 'characters cut' in res.stdout and len(res.stdout) < 1200

def test_a_huge_traceback_keeps_its_end():
    res = exec_code('raise ValueError("a" * 10**6 + "the end")', {}, max_output=1000)
    assert res.stderr.rstrip().endswith('the end') and len(res.stderr) < 1200

@given(st.lists(st.text(st.characters(exclude_characters='\r\b\x1b'), max_size=30), max_size=30), st.integers(1, 60)) # Terminal codes are in test_host_b.py
def test_output_is_kept_head_and_tail(parts, cap):
    res = exec_code('import sys\nfor p in parts: sys.stdout.write(p)', dict(parts=parts), max_output=cap)
    whole, half = ''.join(parts), max(cap // 2, 1)
    if len(whole) <= 2 * half: assert res.stdout == whole
    else: assert res.stdout == f'{whole[:half]}\n... [{len(whole) - 2 * half:,} characters cut] ...\n{whole[-half:]}'

# Threads that outlive their block

@pytest.mark.parametrize('how', ['thread', 'timer', 'pool', 'thread of a thread', 'generator'])
def test_what_is_left_over_does_not_print_into_the_next_block(how):
    ns = dict(how=how)
    first = run('''
        import threading
        from concurrent.futures import ThreadPoolExecutor
        go, done = threading.Event(), threading.Event()
        def late():
            go.wait(600); print("late"); done.set()
        if how == 'thread': threading.Thread(target=late, daemon=True).start()
        elif how == 'timer': threading.Timer(0, late).start()
        elif how == 'pool': ThreadPoolExecutor(1).submit(late)
        elif how == 'thread of a thread': threading.Thread(target=lambda: threading.Thread(target=late, daemon=True).start(), daemon=True).start()
        else: threading.Thread(target=lambda: [late() for _ in 'x'], daemon=True).start()
        print("first")
        ''', ns)
    assert first.stdout == 'first\n' and first.error is None
    second = run('go.set()\nprint(done.wait(600))', ns)
    assert (second.stdout, second.stderr, second.error) == ('True\n', '', None)
    assert first.stdout == 'first\n'

def test_nor_into_the_hosts_output(capfd):
    ns = {}
    run('import threading\ngo = threading.Event()\ndef late(): go.wait(600); print("late")\nt = threading.Thread(target=late, daemon=True); t.start()', ns)
    ns['go'].set(); ns['t'].join(HANG)
    assert capfd.readouterr().out == ''

def test_a_pool_that_is_kept_over_blocks_still_works():
    ns = {}
    run('from concurrent.futures import ThreadPoolExecutor\nex = ThreadPoolExecutor(1)\nex.submit(int).result()', ns)
    res = run('print(ex.submit(lambda: 6 * 7).result())\nex.shutdown()', ns)
    assert res.stdout == '42\n' and res.error is None

def test_threads_of_the_host_are_not_caught():
    "What other threads print while a block runs is theirs."
    buf, go, done = [], threading.Event(), threading.Event()
    class Real:
        def write(self, s): buf.append(s)
        def flush(self): pass
    def host(): go.wait(HANG); print('from the host'); done.set()
    t = threading.Thread(target=host, daemon=True); t.start()
    real = sys.stdout
    sys.stdout = Real()
    try: res = exec_code('go.set()\nprint(done.wait(600))', dict(go=go, done=done))
    finally: sys.stdout = real
    assert res.stdout == 'True\n' and ''.join(buf) == 'from the host\n'


# Time limits

FOREVER = {
    'spin': 'while True: pass',
    'sum': 'import itertools\nsum(1 for _ in itertools.count())',
    'catch Exception': 'while True:\n  try:\n    while True: pass\n  except Exception: pass',
    'generator': 'def g():\n  while True: yield\nfor _ in g(): pass',
    'long repr': 'class R:\n  def __repr__(self):\n    while True: pass\nR()',
    'print': 'while True: print("x")',
    'with lock': 'import threading\nlock = threading.Lock()\nwhile True:\n  with lock: pass',
    'regex': 'import re\nwhile True: re.match("(a*)*b", "a" * 12)',
    'async': 'import asyncio\nasync def f():\n  while True: await asyncio.sleep(0)\nasyncio.run(f())',
}
SPIN = 'x = 0\n    while go: x += 1' # Begins with a statement: where a `try` begins with the loop, 3.12 may raise in the jump, outside of the `try`
SWALLOWS = {
    'except BaseException': f'while go:\n  try:\n    {SPIN}\n  except BaseException: pass',
    'bare except': 'while go:\n  try: x = 1; y = 2\n  except: x = 2',
    'finally': f'def f():\n  try:\n    {SPIN}\n  finally:\n    if go: f()\nf()',
    'finally again': f'while go:\n  try:\n    {SPIN}\n  finally: continue',
    'suppress': f'import contextlib\nwhile go:\n  with contextlib.suppress(BaseException):\n    {SPIN}',
    '__exit__': f'class C:\n  def __enter__(self): pass\n  def __exit__(self, *a): return True\nwhile go:\n  with C():\n    {SPIN}',
}
WAITS = {
    'sleep': 'import time\ntime.sleep(600)',
    'lock': 'import threading\nlock = threading.Lock()\nlock.acquire(); lock.acquire()',
    'event': 'import threading\nthreading.Event().wait()',
    'queue': 'import queue\nqueue.Queue().get()',
    'join': 'import threading, time\nt = threading.Thread(target=time.sleep, args=[600], daemon=True); t.start(); t.join()',
    'socket': 'import socket\na, b = socket.socketpair()\na.recv(1)',
    'pipe': 'import os\nr, w = os.pipe()\nos.read(r, 1)',
    'select': 'import select, socket\na, b = socket.socketpair()\nselect.select([a], [], [])',
    'process': 'import subprocess\nsubprocess.run(["sleep", "600"])',
    'future': 'from concurrent.futures import Future\nFuture().result()',
    'asyncio': 'import asyncio\nasyncio.run(asyncio.sleep(600))',
    'barrier': 'import threading\nthreading.Barrier(2).wait()',
}

def check_stopped(code, ns, seconds=.2, **kw):
    def run(seconds): return exec_code('started = 1\nprint("out")\n' + code, ns, timeout=seconds, **kw)
    t0 = time.monotonic()
    res, seconds = given_time(run, lambda res: res.stdout, seconds)
    assert time.monotonic() - t0 < HANG
    assert res.error.startswith('BlockTimeout: ') and f'{seconds:g} s' in res.error and res.error in res.stderr
    assert res.stdout.startswith('out\n') and ns['started'] == 1
    check_alive(ns, timeout=HANG)
    check_alive(ns)
    return res

@posix
@pytest.mark.parametrize('name', FOREVER)
def test_loops_end_on_the_main_thread(name): assert 'stopped' in check_stopped(FOREVER[name], {}).error

RECURSION = 'def f():\n  while go:\n    try: f()\n    except RecursionError: pass\nf()' # It lives where the stack ends, so that no handler can be called

def test_a_loop_at_the_end_of_the_stack_ends_on_any_thread():
    ns = dict(go=True)
    gc.disable() # hypothesis watches the collector: where the stack ends, that fails with a message
    try: res = elsewhere(exec_code, RECURSION, ns, timeout=.2)
    finally: ns['go'] = False; gc.enable()
    assert res.error == 'BlockTimeout: stopped after 0.2 s'

@pytest.mark.parametrize('name', FOREVER)
def test_loops_end_on_any_thread(name): assert 'stopped' in elsewhere(check_stopped, FOREVER[name], {}).error

@posix
@pytest.mark.parametrize('name', WAITS)
def test_waits_end_on_the_main_thread(name): assert 'stopped' in check_stopped(WAITS[name], {}).error

def release(ns):
    for k in ('lock',):
        if k in ns: ns[k].release()

@pytest.mark.parametrize('name', ['sleep', 'lock', 'socket', 'asyncio'])
def test_waits_on_another_thread_are_left_behind(name, monkeypatch):
    monkeypatch.setattr(stopping, 'grace', .2)
    ns = {}
    res = elsewhere(check_stopped, WAITS[name], ns)
    assert 'stopped' in res.error or 'its thread is still there' in res.error
    if name in ('sleep', 'lock', 'socket'): assert 'its thread is still there' in res.error
    release(ns)

@posix
@pytest.mark.parametrize('name', SWALLOWS)
def test_code_that_swallows_the_interrupt_on_the_main_thread(name, monkeypatch):
    monkeypatch.setattr(stopping, 'grace', .1)
    monkeypatch.setattr(sys, 'unraisablehook', lambda *args: None) # It may come while the collector works
    check_stopped(SWALLOWS[name], dict(go=True), .05)

@pytest.mark.parametrize('name', SWALLOWS)
def test_code_that_swallows_the_interrupt_on_a_thread(name, monkeypatch):
    "Control returns, whether the code was ended or not."
    monkeypatch.setattr(stopping, 'grace', .1)
    ns, thread = dict(go=True), CodeThread()
    elsewhere(check_stopped, SWALLOWS[name], ns, .05, thread=thread)
    ns['go'] = False; thread.close()

@posix
def test_the_interrupt_is_raised_once_where_it_is_heard(monkeypatch):
    "A block that cleans up after it is not interrupted again and again within the grace."
    res = exec_code('import time\ntry: time.sleep(600)\nexcept BaseException as e: print(type(e).__name__); raise', {}, timeout=.1)
    assert res.stdout == 'BlockTimeout\n' and 'BlockTimeout' in res.error



def test_an_interrupt_reaches_only_the_codes_own_steps():
    """Jobs that are interrupted again and again at any moment: what the engine does in the middle is done whole, each job ends with its value or by
    the interrupt, and nothing of it reaches the next job."""
    th, whole, ended, stop, now = CodeThread(), [], [], threading.Event(), [CodeThread().submit(int)]
    def engine(): n = len(whole); whole.append(n); [str(i) for i in range(20)]; whole[n] = 'done'
    def code(): [str(i) for i in range(500)]; shielded(engine); [str(i) for i in range(500)]
    def shoot():
        while not stop.is_set(): now[0].gate.interrupt()
    shooter, old = threading.Thread(target=shoot), sys.getswitchinterval()
    try:
        gc.disable(); sys.setswitchinterval(1e-6); shooter.start() # hypothesis watches the collector: an interrupt of that is lost, with a message
        while len(ended) < 1500 or len(set(ended)) < 2 and len(ended) < 10**5:
            now[0] = th.submit(lambda: interruptible(code))
            wait(now, HANG); ended.append(type(now[0].exception(0)))
            if len(ended) % 50 == 0: assert th.submit(lambda: interruptible(engine)).exception(HANG) is None
    finally: stop.set(); sys.setswitchinterval(old); gc.enable(); shooter.join(); th.close()
    assert set(ended) == {type(None), repl.BlockTimeout} and set(whole) == {'done'}

@posix
def test_the_hosts_own_alarm_survives():
    rang = []
    old = signal.signal(signal.SIGALRM, lambda *a: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 6000)
        exec_code('while True: pass', {}, timeout=.05)
        left, again = signal.getitimer(signal.ITIMER_REAL)
        assert 5000 < left < 6000 and again == 0 and not rang
        signal.setitimer(signal.ITIMER_REAL, .05)
        exec_code('import time\ntime.sleep(.01)', {}, timeout=HANG)
        end = time.monotonic() + HANG
        while not rang and time.monotonic() < end: time.sleep(.01)
        assert rang
    finally: signal.setitimer(signal.ITIMER_REAL, 0); signal.signal(signal.SIGALRM, old)

@posix
def test_a_limit_within_a_limit():
    "Code that runs code: the outer limit holds while the inner one is at work, and after it."
    from rlm import exec_code as inner
    res = exec_code('r = inner("while True: pass", {}, timeout=600)', dict(inner=inner), timeout=.2)
    assert res.execution_time < HANG
    def nested(seconds): return exec_code('r = inner("while True: pass", {}, timeout=.05)\nprint(r.error)\nwhile True: pass', dict(inner=inner), timeout=seconds)
    res, seconds = given_time(nested, lambda res: res.stdout, .4)
    assert res.stdout == 'BlockTimeout: stopped after 0.05 s\n' and f'stopped after {seconds:g} s' in res.error

def alive(pid):
    "Does this process run? One that has ended and was not waited for does not."
    return subprocess.run(['ps', '-o', 'stat=', '-p', pid], capture_output=True, text=True).stdout.strip()[:1] not in ('', 'Z')

def test_bash_is_ended_with_all_its_children(tmp_path):
    pids = tmp_path / 'pids'
    code = f'(exec sleep 600) & a=$!; (sleep 600 | sleep 600) & echo $a $! >{pids}; echo begun; wait'
    res, _ = given_time(lambda seconds: exec_code(code, {}, lang='bash', timeout=seconds), lambda res: res.stdout == 'begun\n', .3)
    assert 'BlockTimeout' in res.error
    until(lambda: not any(map(alive, pids.read_text().split())))
    for code, out, err in [('echo a; echo b >&2; exit 3', 'a\n', 'b\nexit code 3\n'), ('printf "\\xff\\xfe"', '\ufffd\ufffd', ''), ('cat', '', ''), ('kill -9 $$', '', 'exit code -9\n')]:
        res = exec_code(code, {}, lang='bash')
        assert (res.stdout, res.stderr, res.error) == (out, err, None)
    assert 'characters cut' in exec_code('yes | head -c 3000000', {}, lang='bash', max_output=1000).stdout

def test_bash_with_a_child_that_stays():
    "A daemon that holds on to stdout does not hold up the block."
    res = exec_code('sleep 600 & echo $!', {}, lang='bash')
    assert res.error is None and res.execution_time < HANG
    with suppress(ProcessLookupError): os.kill(int(res.stdout), signal.SIGKILL)

# Ctrl-C

@posix
@pytest.mark.parametrize('code', ['import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass', 'import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(600)'])
def test_a_real_ctrl_c_comes_through(code):
    ns = {}
    with pytest.raises(KeyboardInterrupt) as e: exec_code('x = 1\nprint("so far")\n' + code, ns)
    assert ns['x'] == 1 and e.value.block.stdout == 'so far\n' and 'KeyboardInterrupt' in e.value.block.error
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    check_alive(ns)

@posix
def test_a_real_ctrl_c_that_is_swallowed_still_counts():
    with pytest.raises(KeyboardInterrupt) as e: exec_code('import signal\ntry: signal.raise_signal(signal.SIGINT)\nexcept BaseException: print("ha")\nx = 1', ns := {})
    assert ns['x'] == 1 and e.value.block.stdout == 'ha\n' and e.value.block.error is None

@posix
def test_ctrl_c_from_another_thread_while_a_block_waits():
    begun = threading.Event()
    def press(): begun.wait(HANG); os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt): exec_code('import threading\nbegun.set()\nthreading.Event().wait(600)', dict(begun=begun), timeout=HANG)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)

@posix
def test_the_hosts_own_handler_is_asked_and_kept():
    heard = []
    old = signal.signal(signal.SIGINT, lambda *a: heard.append(1))
    try:
        with pytest.raises(KeyboardInterrupt): exec_code('import signal\nsignal.raise_signal(signal.SIGINT)', {})
        assert heard == [1] and signal.getsignal(signal.SIGINT).__name__ == '<lambda>'
    finally: signal.signal(signal.SIGINT, old)

# Namespaces

def test_a_plain_modules_semantics():
    ns = {}
    res = run('''
        from __future__ import annotations
        import dataclasses, enum, functools
        """a string in the middle"""
        @dataclasses.dataclass
        class Point:
            x: int = 0
            def far(self) -> float: return scale * self.x
        class Color(enum.Enum): RED = 1
        count = 0
        def bump():
            global count, made
            count += 1; made = 'here'
        def later(): return defined_later()
        _hidden, a, (b, *c) = 1, 2, [3, 4, 5]
        n: int = 5
        ''', ns)
    assert res.error is None and '_hidden' in ns and '_hidden' not in res.locals
    res = run('''
        scale = 3
        def defined_later(): return [count + i for i in range(2)]
        bump(); bump()
        del a
        if (m := n) > 1:
            Point(2).far(), later(), made, Color.RED.name
        [Point(2).far(), later(), made, Color.RED.name, [[scale for _ in c] for _ in c][0]]
        ''', ns)
    assert res.stdout == "[6, [2, 3], 'here', 'RED', [3, 3]]\n" and 'a' not in ns and res.error is None
    assert run('import inspect\nprint(inspect.getsource(bump).strip()[:11])', ns).stdout == 'def bump():\n'
    assert run('nonlocal_ = 1\nexec("y = nonlocal_ + 1")\neval("y")', ns).stdout == '2\n'
    assert run('print(locals() is globals(), vars() is globals())', ns).stdout == 'True True\n'

def test_state_before_an_exception_stays():
    ns = {}
    for kind in ('1/0', 'raise SystemExit', 'raise KeyboardInterrupt', 'raise GeneratorExit', 'x +'): run(f'seen = globals().get("seen", 0) + 1\n{kind}', ns)
    assert ns['seen'] == 4

ODD = {
    'metaclass': 'class M(type):\n  def __getattribute__(cls, k): raise RuntimeError(k)\nclass C(metaclass=M): pass\no = C()',
    'metaclass that exits': 'class M(type):\n  def __getattribute__(cls, k): raise SystemExit(k)\nclass C(metaclass=M): pass\no = C()',
    'metaclass property': 'class M(type):\n  @property\n  def __name__(cls): 1/0\n  @property\n  def __module__(cls): 1/0\nclass C(metaclass=M): pass\no = C()',
    'module without name': 'import types\nm = types.ModuleType("m"); del m.__name__',
    'module with getattr': 'import types\nm = types.ModuleType("m"); del m.__name__\nm.__getattr__ = lambda k: 1/0',
    'module with odd name': 'import types\nclass N:\n  def __format__(self, s): raise SystemExit\nm = types.ModuleType("m"); m.__name__ = N()',
    'getattr': 'class C:\n  def __getattr__(self, k): raise SystemExit\n  __getattribute__ = __getattr__\no = C()',
    'class': 'class C:\n  @property\n  def __class__(self): raise SystemExit\no = C()',
    'shape': 'class C:\n  __module__ = "numpy"\n  @property\n  def shape(self): raise SystemExit\no = C()',
    'shape that is odd': 'class C:\n  __module__ = "numpy"\n  class T(tuple):\n    def __iter__(self): raise SystemExit\n  shape = T([1])\no = C()',
    'str': 'class S(str):\n  def __len__(self): raise SystemExit\n  __repr__ = __str__ = __getitem__ = __format__ = __len__\no = S("x")',
    'dict': 'class D(dict):\n  def __len__(self): raise SystemExit\n  items = __iter__ = __len__\no = D(a=1)',
    'bool': 'class B:\n  def __bool__(self): raise SystemExit\n  __eq__ = __hash__ = __len__ = __bool__\no = B()',
    'name': 'C = type("a\\nb", (), {}); o = C(); f = lambda: 1; f.__name__ = "x" * 10**6',
    'keys': 'globals()[5] = 1; globals()[None] = 2; globals()[("a",)] = 3',
    'odd keys': 'class S(str):\n  def __getitem__(self, k): raise SystemExit\n  startswith = __len__ = __getitem__\nglobals()[S("odd")] = 1',
    'many names': 'globals().update({f"x{i}": i for i in range(20000)})',
    'generator': 'g = (1/0 for _ in "x"); next_ = iter([])',
    'weak': 'import weakref\nclass C: pass\np = weakref.proxy(C())',
    'huge': 'n = 10**20000; b = bytes(10**7); s = "x" * 10**7',
    'slots': 'class C: __slots__ = ()\no = C(); o2 = object()',
    'type': 'o = type; p = type(type); q = object; from abc import ABC; r = ABC',
}

@on_both
@pytest.mark.parametrize('with_scaffold', [False, True], ids=['bare', 'scaffold'])
@pytest.mark.parametrize('what', ODD)
def test_odd_objects_in_the_namespace(what, with_scaffold, off_main):
    "The summary of a namespace runs none of the objects' own code, and never fails."
    ns = {}
    if with_scaffold: bind(ns, Scaffold(final_name='Final'))
    for code in (ODD[what], 'y = 1', '1/0'):
        res = at(off_main, exec_code, code, ns)
        assert res.error == ('ZeroDivisionError: division by zero' if '/' in code and code == '1/0' else None), res.stderr
        assert all(isinstance(k, str) and isinstance(v, str) and len(v) < 1000 for k, v in res.locals.items())
        json.dumps(res.to_dict())
    assert 'y: int 1' in show_vars(ns)

# The scaffold

def scaffolded(**kw):
    ns = {}
    s = Scaffold({'llm_query': lambda p: f'reply to {p}', 'tool': 5}, **kw)
    bind(ns, s)
    return ns, s

BREAKS = {
    'overwrite': 'llm_query = 1; FINAL = None; FINAL_VAR = 2; SHOW_VARS = 3; tool = 6',
    'delete': 'del llm_query, FINAL, FINAL_VAR, SHOW_VARS, tool, answer',
    'clear': 'globals().clear()',
    'clear all': 'for k in list(globals()): del globals()[k]',
    'pop': 'globals().pop("__rlm__"); llm_query = 1',
    'rlm is None': '__rlm__ = None; llm_query = 1',
    'rlm is something': 'class X: pass\n__rlm__ = X(); llm_query = 1',
    'def': 'def llm_query(x): return x\nclass answer: pass',
    'import': 'from os import path as llm_query',
    'loop': 'for answer in range(3): pass\nfor FINAL in "ab": pass',
    'except': 'try: 1/0\nexcept Exception as llm_query: pass',
    'odd answer': 'class A(dict):\n  def __contains__(self, k): raise SystemExit\n  __getitem__ = get = keys = __iter__ = __contains__\nanswer = A(ready=True)',
    'equal to all': 'class E:\n  def __eq__(self, o): return True\n  def __bool__(self): raise SystemExit\nllm_query = E(); answer = E()',
    'scaffold itself': '__rlm__.bound.clear() if hasattr(__rlm__, "bound") else None; del llm_query',
}

@pytest.mark.parametrize('what', [k for k in BREAKS if k != 'scaffold itself'])
def test_the_scaffold_is_made_whole_again(what):
    ns, s = scaffolded()
    res = exec_code(BREAKS[what] + '\nmine = 1', ns)
    assert all(ns[k] is v for k, v in s.bound.items())
    assert exec_code('print(llm_query("x")); print(tool); SHOW_VARS()', ns).stdout.startswith('reply to x\n5\n')
    assert exec_code('FINAL(mine)', ns).final_answer == '1'
    unbind(ns)

def test_the_model_is_told_once():
    ns, _ = scaffolded()
    notes = [exec_code('llm_query = 1; FINAL = 2', ns).notes for _ in range(3)]
    assert '`llm_query`' in notes[0][0] and '`FINAL`' in notes[0][0] and notes[1:] == [[], []]

FINALS = {
    'a class': ('class C: pass\nFINAL(C)', 'C'),
    'str raises': ('class C:\n  def __str__(self): 1/0\nFINAL(C())', None),
    'str exits': ('class C:\n  def __str__(self): raise SystemExit\nFINAL(C())', None),
    'content raises': ('class C:\n  def __str__(self): 1/0\nanswer["content"] = C(); answer["ready"] = True', None),
    'content exits': ('class C:\n  def __str__(self): raise SystemExit\nanswer["content"] = C(); answer["ready"] = True', None),
    'an empty str': ('FINAL("")', ''),
    'an empty str by name': ('x = ""\nFINAL_VAR("x")', ''),
    'no content': ('answer.clear(); answer["ready"] = True', ''),
    'ready is an array': ('class Array:\n  def __bool__(self): raise ValueError("The truth value of an array with more than one element is ambiguous.")\nanswer["ready"] = Array()', None),
    'ready is odd': ('class B:\n  def __bool__(self): 1/0\nanswer["ready"] = B()', None),
    'cleared': ('answer.clear()', None),
    'a new dict': ('answer = {"content": 5, "ready": True}', '5'),
    'updated': ('answer.update(content=[1], ready=True)', '[1]'),
    'on a thread': ('import threading\nt = threading.Thread(target=FINAL, args=["x"]); t.start(); t.join()', 'x'),
    'twice': ('FINAL(1); FINAL(2)', '2'),
    'and then an error': ('FINAL(1)\n1/0', '1'),
    'printed': ('print(FINAL("x"))', 'x'),
    'None': ('FINAL(None)', 'None'),
    'by name': ('x = {1}\nFINAL_VAR("x")', '{1}'),
    'by value': ('x = {1}\nFINAL_VAR(x)', '{1}'),
    'no such name': ('FINAL_VAR("nope")', None),
    'answer by name': ('answer["content"] = "c"\nFINAL_VAR("answer")', 'c'),
    'huge number': ('FINAL(10**5000)', None),
    'lone surrogate': ('FINAL("\\ud800")', '\ud800'),
    'from __del__': ('class D:\n  def __del__(self): FINAL("d")\nD(); None', 'd'),
}

@on_both
@pytest.mark.parametrize('what', FINALS)
def test_answers_from_code(what, off_main):
    code, answer = FINALS[what]
    ns, s = scaffolded()
    res = at(off_main, exec_code, code, ns)
    assert (None if res.final_answer is None else str(res.final_answer)) == answer or what == 'a class' and 'C' in res.final_answer
    res = at(off_main, exec_code, 'y = 1', ns)
    assert res.error is None and res.final_answer is None and ns['y'] == 1 # An answer is its block's alone

@on_both
@pytest.mark.parametrize('code', ['answer["content"] = C(); answer["ready"] = True', 'answer["ready"] = C()', 'Final = D(a=1)'])
def test_an_answer_whose_text_never_comes(code, off_main, monkeypatch):
    "What is asked of the code's objects after the block is under a limit as well."
    monkeypatch.setattr(stopping, 'grace', .3)
    ns, s = scaffolded(final_name='Final')
    loop = 'def loop(*_):\n  while go: pass\nclass C: __str__ = __bool__ = loop\nclass D(dict): items = __iter__ = loop\n'
    ns['go'] = True
    res = elsewhere(exec_code, loop + code, ns, timeout=600) if off_main else exec_code(loop + code, ns, timeout=600)
    ns['go'] = False
    assert res.final_answer is None and 'BlockTimeout' in res.error and res.execution_time < HANG
    check_alive(ns)

@pytest.mark.parametrize('value', ['{1}', 'b"x"', 'object()', 'float("nan")', 'type("D", (dict,), dict(items=lambda s: 1/0, __iter__=lambda s: 1/0))(a=1)', '(x := [], x.append(x))[0]', 'lambda: 1', '"\\ud800"', '10**5000',
    'type("D", (dict,), dict(items=lambda s: exit()))(a=1)'])
def test_any_final_under_nano(value):
    "What JSON cannot hold is a note to the model, whatever it is."
    ns, s = scaffolded(final_name='Final')
    res = exec_code(f'Final = {value}', ns)
    assert res.error is None and (res.final_answer is not None or 'JSON' in res.notes[0])
    check_alive(ns)

# Many at once

def chatter(tag, n=50): return f'import time\nfor i in range({n}):\n  print("{tag}", i)\n  if i % 10 == 0: time.sleep(.001)\nx = "{tag}"\n"{tag}"'
def said(tag, n=50): return ''.join(f'{tag} {i}\n' for i in range(n)) + f"'{tag}'\n"

def test_eight_threads_at_once():
    gate = threading.Barrier(8)
    def one(tag): gate.wait(HANG); return [exec_code(chatter(f'{tag}{i}'), {}) for i in range(5)]
    with ThreadPoolExecutor(8) as ex: outs = list(ex.map(one, 'abcdefgh'))
    assert [[r.stdout for r in o] for o in outs] == [[said(f'{t}{i}') for i in range(5)] for t in 'abcdefgh']
    assert all(r.stderr == '' for o in outs for r in o)

def test_eight_threads_at_once_with_time_limits():
    gate = threading.Barrier(8)
    def one(tag):
        gate.wait(HANG)
        loop, _ = given_time(lambda seconds: exec_code(f'print("{tag}")\nwhile True: pass', {}, timeout=seconds), lambda res: res.stdout, .3)
        return exec_code(chatter(tag), {}, timeout=HANG), loop
    with ThreadPoolExecutor(8) as ex: outs = list(ex.map(one, 'abcdefgh'))
    assert [(a.stdout, b.stdout) for a, b in outs] == [(said(t), f'{t}\n') for t in 'abcdefgh']
    assert all(a.error is None and 'stopped' in b.error for a, b in outs)

def test_tasks_at_once():
    "Each on a thread of its own, and with the code in the task itself."
    async def one(tag):
        res = await asyncio.to_thread(exec_code, chatter(tag), {})
        await asyncio.sleep(0)
        return res.stdout, exec_code(chatter(tag), {}).stdout
    async def all_of_them(): return await asyncio.gather(*map(one, 'abcdef'))
    assert asyncio.run(all_of_them()) == [(said(t), said(t)) for t in 'abcdef']

REDIRECTS = dict(redirect_stdout='with contextlib.redirect_stdout(io.StringIO()) as f:', assigned='f = sys.stdout = io.StringIO()\nif True:')


def test_a_block_within_a_block():
    res = exec_code('print("a"); r = inner("print(1)", {}); print("b", repr(r.stdout))', dict(inner=exec_code))
    assert res.stdout == "a\nb '1\\n'\n"

def test_two_blocks_in_one_namespace_at_once():
    ns, gate = {}, threading.Barrier(4)
    def one(i): gate.wait(HANG); return exec_code(chatter(str(i)) + f'\nx{i} = {i}', ns)
    with ThreadPoolExecutor(4) as ex: outs = list(ex.map(one, range(4)))
    assert [o.error for o in outs] == [None] * 4 and {f'x{i}' for i in range(4)} <= set(ns)

def test_blocks_are_parsed_side_by_side():
    "Python 3.11 stumbles over parsers on several threads, where code that runs in the collector lets another thread go on."
    switch, threshold, gate = sys.getswitchinterval(), gc.get_threshold(), threading.Barrier(8)
    def watch(*a): sum(range(50)); list(map(str, range(50))); [i for i in range(100)]
    def one(i): gate.wait(HANG); return {exec_code('class A:\n  def f(self, x): return [y * (2 + x) for y in x if (lambda: 1)()]\n' * 20, {}).error for _ in range(80)}
    gc.callbacks.append(watch)
    try:
        gc.set_threshold(50); sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(8) as ex: assert set().union(*ex.map(one, range(8))) == {None}
    finally: gc.callbacks.remove(watch); gc.set_threshold(*threshold); sys.setswitchinterval(switch)

@pytest.mark.parametrize('n', [1, 3])
def test_a_code_thread_runs_its_jobs_in_order(n):
    th, seen = CodeThread(), []
    futs = [th.submit(lambda i=i: seen.append(i)) for i in range(20 * n)]
    assert all(f.result(HANG) is None for f in futs) and seen == list(range(20 * n))
    th.close(); th.close()
    assert th.submit(lambda: 5).result(HANG) == 5
    th.close()

# Forks

@forks
@posix
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@on_both
def test_code_in_a_forked_child(off_main):
    ns = {}
    exec_code('import threading\nx = 5\nlock = threading.Lock()', ns)
    busy, stop = threading.Event(), threading.Event()
    def noise(): exec_code('busy.set()\nwhile not stop.is_set(): print("x")', dict(busy=busy, stop=stop))
    t = threading.Thread(target=noise, daemon=True); t.start(); busy.wait(HANG)
    def child():
        a = exec_code('x += 1\nprint(x)', ns)
        b = exec_code('while True: pass', ns, timeout=.1)
        c = elsewhere(exec_code, 'while True: pass', ns, timeout=.1)
        d = exec_code('import os\npid = os.getpid()', ns)
        return [a.stdout, b.error, c.error, d.error]
    try: assert at(off_main, in_child, child) == ['6\n', 'BlockTimeout: stopped after 0.1 s', 'BlockTimeout: stopped after 0.1 s', None]
    finally: stop.set(); t.join(HANG)
    assert ns['x'] == 5 and exec_code('x', ns).stdout == '5\n'

# Wrong arguments

@pytest.mark.parametrize('args, words', [((5, {}), '`code` must be a str, not a int'), ((b'x', {}), '`code` must be a str'), (('x', None), '`ns` must be a dict'), (('x', []), '`ns` must be a dict'), ((None, {}), '`code`')])
def test_wrong_arguments(args, words):
    with pytest.raises(TypeError, match=words) as e: exec_code(*args)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('code', ['', ' ', '\n\n', '# only words', 'pass', ';', 'x = 1\r\ny = 2\r\n', 'x = 1\x0c\ny = 2', 'x = 1\\\n+ 2'])
def test_next_to_nothing(code):
    res = exec_code(code, {})
    assert isinstance(res, REPLResult) and (code == ';') == (res.error is not None)

@on_both
def test_an_error_whose_text_has_no_end(off_main, monkeypatch):
    monkeypatch.setattr(stopping, 'grace', .2)
    code = 'class E(Exception):\n def __str__(self):\n  while True: pass\nbegun = 1\nraise E'
    ns = {}
    res, _ = given_time(lambda seconds: at(off_main, exec_code, code, ns, timeout=seconds), lambda res: 'begun' in ns, .2)
    assert res.error.startswith('E') and 'E' in res.stderr and res.stdout == ''

def test_what_an_errors_text_prints_is_the_blocks(capsys):
    res = exec_code('class E(Exception):\n def __str__(self): print("said"); return "text"\nraise E', {})
    assert (res.stdout, res.error, capsys.readouterr().out) == ('said\n', 'E: text', '')

@posix
def test_bash_on_a_thread_ends_when_it_is_interrupted(tmp_path):
    thread, out = repl.CodeThread(), []
    t = threading.Thread(target=lambda: out.append(exec_code(f'echo $$ > {tmp_path}/pid; exec sleep 300', {}, lang='bash', thread=thread)), daemon=True); t.start()
    until(lambda: (tmp_path/'pid').exists() and (tmp_path/'pid').read_text().strip())
    thread.stop()
    until(lambda: out)
    assert out[0].error.startswith('BlockTimeout') and 'still there' not in out[0].error
    with pytest.raises(ProcessLookupError): os.kill(int((tmp_path/'pid').read_text()), 0)
    thread.close()
