"""What a block does to the process that it runs in: tracers, signals, scaffold, builtins, standard input, IPython's names, and more."""
import os, signal, subprocess, sys, textwrap, threading, time
import pytest
import rlm
from rlm import ScriptLM, exec_code, rlm_iter, rlm_run
from common import at, block, elsewhere, environment, on_both, posix, turn

LONG = 180 # Seconds after which something hangs

def script(code):
    "What a process prints that runs `code`; it must end well."
    p = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, timeout=LONG, env=environment())
    assert p.returncode == 0, p.stderr
    return p.stdout

# Tracers

RUN = '''
import sys, threading
from rlm import ScriptLM, exec_code, rlm_run
def block(code, then=''): return f'Next.\\n```repl\\n{code}\\n```\\n{then}'
def reply(msgs):
    if 'sub-task' in str(msgs[:2]): return block("x = sum(range(10))", "FINAL_VAR(x)")
    return block("r = rlm_query_batched(['sub-task one', 'sub-task two'])\\nn = sum(range(100))", "FINAL_VAR(r)")
def run(): return rlm_run("Q", "abc", {}, ScriptLM(reply)).answer
'''
TRACERS = {
    'sys.settrace': ('sys.settrace(tracer)', 'sys.gettrace() is tracer', 'sys.settrace(None)'),
    'threading.settrace': ('threading.settrace(tracer); sys.settrace(tracer)', 'sys.gettrace() is tracer', 'threading.settrace(None); sys.settrace(None)'),
    'sys.setprofile': ('sys.setprofile(tracer); threading.setprofile(tracer)', 'sys.getprofile() is tracer', 'threading.setprofile(None); sys.setprofile(None)'),
}

@pytest.mark.parametrize('when', ['before', 'during'])
@pytest.mark.parametrize('how', TRACERS)
def test_a_tracer_over_a_run_with_children(how, when):
    "It neither hangs nor is lost, be it set before a run or after one with children."
    on, still, off = TRACERS[how]
    out = script(RUN + f'''
n = 0
def tracer(frame, event, arg):
    global n
    n += 1
    return tracer
{'run()' if when == 'during' else ''}
{on}
said = run()
for i in range(1000): pass
ok, seen = {still}, n
run()
more = n > seen
{off}
print(said, ok, more, seen > 1000)
''')
    assert out == "['45', '45'] True True True\n"

@on_both
def test_a_tracer_that_a_block_sets_is_gone_after_it(off_main):
    def go():
        was = sys.gettrace(), sys.getprofile()
        for how in 'settrace', 'setprofile':
            res = exec_code(f'import sys\ndef t(*a): return t\nsys.{how}(t)\nn = 1', ns := {})
            assert res.error is None and ns['n'] == 1
        return was == (sys.gettrace(), sys.getprofile())
    assert at(off_main, go)

# Signals and timers

DISARM = {
    'alarm(0)': 'signal.alarm(0)',
    'setitimer(0)': 'signal.setitimer(signal.ITIMER_REAL, 0)',
    'a later alarm': 'signal.alarm(1000)',
    'a later timer': 'signal.setitimer(signal.ITIMER_REAL, 1000, 1000)',
    'SIG_IGN': 'signal.signal(signal.SIGALRM, signal.SIG_IGN)',
    'a handler': 'signal.signal(signal.SIGALRM, lambda *a: None)',
    'a mask': 'signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])',
    'all masked': 'signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())',
    'all handlers': 'for n in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(n, lambda *a: None)',
    'the other one too': 'signal.signal(signal.SIGURG, signal.SIG_IGN); signal.alarm(0)',
}

def signals(): return [signal.getsignal(n) for n in signal.valid_signals()], signal.getitimer(signal.ITIMER_REAL)[0], signal.pthread_sigmask(signal.SIG_BLOCK, [])

@posix
@pytest.mark.parametrize('how', DISARM)
def test_a_time_limit_holds_whatever_the_code_does_to_signals(how):
    was = signals()
    res = exec_code(f'import signal, time\n{DISARM[how]}\nt = time.monotonic()\nwhile time.monotonic() - t < 100: pass', {}, timeout=.1)
    assert res.error.startswith('BlockTimeout') and res.execution_time < 50
    assert signals() == was

@posix
@pytest.mark.parametrize('how', [o for o in DISARM if o not in ('all masked', 'all handlers', 'the other one too')])
def test_a_time_limit_ends_a_sleep_too(how):
    res = exec_code(f'import signal, time\n{DISARM[how]}\ntime.sleep(100)', {}, timeout=.1)
    assert res.error.startswith('BlockTimeout') and res.execution_time < 50

LEFT = {
    'an alarm': 'signal.alarm(1)',
    'a soon timer with a handler': 'def f(*a): raise ValueError("late")\nsignal.signal(signal.SIGALRM, f)\nsignal.setitimer(signal.ITIMER_REAL, .0001, .0001)',
    'a SIGINT handler': 'signal.signal(signal.SIGINT, signal.SIG_IGN)',
    'a pending one': 'signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\nsignal.raise_signal(signal.SIGALRM)',
    'a profiling timer': 'signal.setitimer(signal.ITIMER_PROF, .5)',
}

@posix
@pytest.mark.parametrize('timeout', [None, 50])
@pytest.mark.parametrize('how', LEFT)
def test_nothing_left_behind_fires_later(how, timeout):
    out = script(f'''
        import signal, time
        from rlm import exec_code
        def state(): return [signal.getsignal(n) for n in signal.valid_signals()], [signal.getitimer(t)[0] for t in (0, 1, 2)], signal.pthread_sigmask(signal.SIG_BLOCK, [])
        was = state()
        exec_code("import signal\\n" + {LEFT[how]!r}, dict(), timeout={timeout})
        print(state() == was)
        t = time.process_time()
        while time.process_time() - t < 1.2: pass
        print(exec_code("6 * 7", dict()).stdout.strip())
    ''')
    assert out == 'True\n42\n'

@posix
def test_the_timer_of_the_caller_goes_on():
    fired = []
    old = signal.signal(signal.SIGALRM, lambda *a: fired.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1000)
        exec_code('import signal; signal.alarm(0)', {})
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
        exec_code('import signal; signal.alarm(0)', {}, timeout=50)
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
        signal.setitimer(signal.ITIMER_REAL, .05)
        exec_code('import time; time.sleep(.2)', {}, timeout=50)
        end = time.monotonic() + LONG
        while not fired and time.monotonic() < end: time.sleep(.01)
        assert fired
    finally: signal.setitimer(signal.ITIMER_REAL, 0); signal.signal(signal.SIGALRM, old)

# The scaffold

TAKEN = {
    'for': 'for context in range(3): pass', 'bound': 'context = 1', 'deleted': 'del context', 'with': 'with open(__import__("os").devnull) as context: pass',
    'imported': 'import json as context', 'a def': 'def context(): pass', 'globals': 'globals().clear()', 'history': 'history = 5', 'history deleted': 'history = 1; del history',
    'an earlier one': 'context_0 = 7', 'an earlier one deleted': 'del context_0', 'raises': 'context = 5\n1/0', 'FINAL': 'FINAL = None', 'llm_query': 'del llm_query',
}

@on_both
@pytest.mark.parametrize('how', TAKEN)
def test_a_context_that_a_block_loses_is_there_again(how, off_main):
    def go():
        ns, seen = {}, []
        look = lambda msgs: seen.append((ns['context'], ns['context_0'], [m['content'] for m in msgs])) or block('n = len(context)', 'FINAL_VAR(n)')
        rlm_run('Q', 'first', ns, ScriptLM([block('x = 1', 'FINAL(str(1))')]))
        res = rlm_run('Q', 'second!', ns, ScriptLM(lambda msgs: [block(TAKEN[how]), block(TAKEN[how]), look][turn(msgs)] if turn(msgs) < 2 else look(msgs)))
        (context, old, msgs), = seen
        assert (context, old) == ('second!', 'first') and res.value == 7
        assert sum('belongs to the REPL and was put back' in m for m in msgs) == 1
        assert rlm_run('Q', None, ns, ScriptLM([block('n = len(context)', 'FINAL_VAR(n)')])).value == 7
        return True
    assert at(off_main, go)

def test_the_caller_may_change_the_context_between_blocks():
    ns = {}
    for i, it in enumerate(rlm_iter('Q', 'abc', ns, ScriptLM([block('x = 1'), block('y = context'), block('z = context', 'FINAL_VAR(z)')]))):
        if i == 0: ns['context'] = 'mine'
    assert ns['y'] == ns['z'] == 'mine'

# Builtins and what else all share

BROKEN = {
    'len': 'builtins.len = None', 'a lambda': 'builtins.len = lambda o: 1/0', 'print': 'builtins.print = lambda *a, **kw: None', '__import__': 'builtins.__import__ = None',
    'deleted': 'del builtins.isinstance, builtins.len', 'all': 'builtins.__dict__.clear()', 'added': 'builtins.leak = 1', 'build_class': 'del builtins.__build_class__',
    'types': 'builtins.str = builtins.dict = builtins.Exception = int', 'in a sub-call': 'builtins.len = builtins.range = builtins.min = None\nllm_query("hi")',
    'in sub-calls': 'builtins.__dict__.clear()\nrlm_query_batched(["a", "b"])', '__builtins__': '__builtins__["len"] = 1 if type(__builtins__) is dict else setattr(__builtins__, "len", 1)',
    'recursion': 'import sys\nsys.setrecursionlimit(60)', 'warnings': 'import warnings\nwarnings.simplefilter("error")', 'hooks': 'import sys, threading\nsys.excepthook = sys.displayhook = threading.excepthook = None',
    'gc': 'import gc\ngc.disable()', 'sys.path': 'import sys\nsys.path.clear()', 'sys.modules': 'import sys\nfor k in ["json", "asyncio", "threading", "linecache"]: del sys.modules[k]',
    'all modules': 'import sys\nsys.modules.clear()', 'switch': 'import sys\nsys.setswitchinterval(100)', 'threads': 'import threading\nthreading.settrace(lambda *a: 1/0)',
    'locale': 'import locale\nlocale.setlocale(locale.LC_ALL, "C.UTF-8")', 'chdir': 'import os\nos.chdir("/")', 'path': 'import sys\nsys.path = None', 'meta_path': 'import sys\nsys.meta_path = []',
}

@pytest.mark.parametrize('off_main', [False, True], ids=['main', 'thread'])
@pytest.mark.parametrize('how', BROKEN)
def test_the_process_is_whole_after_a_block(how, off_main):
    out = script(f'''
        import builtins, gc, locale, sys, threading, warnings
        from rlm import ScriptLM, exec_code, llm_query, rlm_run
        def block(code, then=''): return f'Next.\\n```repl\\n{{code}}\\n```\\n{{then}}'
        def script(*replies): return ScriptLM([*replies, 'FINAL(ok)', 'FINAL(ok)', 'FINAL(ok)'])
        import rlm.aio; rlm.aio._get_loop()
        builtins.mine = 1
        sys.path.append('/mine')
        def state(): return ([(k, id(v)) for k, v in sorted(builtins.__dict__.items())], sys.excepthook, sys.displayhook, threading.excepthook, sys.getrecursionlimit(), gc.isenabled(),
            list(warnings.filters), sys.getswitchinterval(), locale.setlocale(locale.LC_ALL), threading.gettrace(), list(sys.path), id(sys.modules), list(sys.meta_path), 'json' in sys.modules)
        def go():
            global was
            code = 'import builtins\\n' + {BROKEN[how]!r}
            rlm_run('Q', 'abc', dict(), script(block('x = 1'), 'FINAL(warm)'))
            was = state()
            rlm_run('Q', 'abc', dict(), script(block(code)))
            print('whole', state() == was)
            res = rlm_run('Q', 'abc', dict(), script(block('import json\\nr = [len(context), llm_query("c")]', 'FINAL_VAR(r)'), 'C'))
            print(res.value)
        if {off_main}:
            t = threading.Thread(target=go); t.start(); t.join()
        else: go()
    ''')
    assert out == "whole True\n[3, 'C']\n"

# Standard input, and the end of a block

ASKS = {'input': 'input("Name? ")', 'input()': 'input()', 'read': 'sys.stdin.read()', 'readline': 'sys.stdin.readline()', 'a loop': 'for line in sys.stdin: print(line)',
    'list': 'list(sys.stdin)', 'next': 'next(sys.stdin)', 'buffer': 'sys.stdin.buffer.read()', '__stdin__': 'sys.__stdin__.read()', 'getpass': 'import getpass; getpass.getpass()',
    'from getpass': 'from getpass import getpass\ngetpass("Key: ")', 'builtins.input': 'import builtins; builtins.input()', 'in a thread': 'import concurrent.futures as c\nc.ThreadPoolExecutor().submit(input).result()'}
ENDS = {'exit': 'exit()', 'exit 3': 'exit(3)', 'quit': 'quit()', 'sys.exit': 'sys.exit("bye")', 'raise': 'raise SystemExit', 'close': 'sys.stdin.close()', 'with': 'with sys.stdin: pass'}

@on_both
@pytest.mark.parametrize('how', ASKS)
def test_a_question_to_nobody_is_an_eof_error_that_says_so(how, off_main):
    res = at(off_main, exec_code, f'import sys\n{ASKS[how]}', {})
    assert res.error.startswith('EOFError') and 'no person' in res.stderr, res

@on_both
@pytest.mark.parametrize('how', ENDS)
def test_the_end_of_a_block_is_not_the_end_of_the_hosts_input(how, off_main):
    out = script(f'''
        import io, sys
        sys.stdin = mine = io.StringIO('one\\ntwo\\nthree\\n')
        sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r})
        from common import at
        from rlm import exec_code
        res = at({off_main}, exec_code, 'import sys\\nx = 1\\n' + {ENDS[how]!r}, ns := dict())
        print(mine.closed, ns['x'], res.error is None or res.error.startswith('SystemExit'))
        print(input(), sys.stdin.readline().strip(), list(sys.stdin))
    ''')
    assert out == "False 1 True\none two ['three\\n']\n"

ALARMS = {
    'alarm': 'signal.alarm(1)\ntime.sleep(600)', 'a timer': 'signal.setitimer(signal.ITIMER_REAL, .05)\ntime.sleep(600)',
    'a virtual one': 'signal.setitimer(signal.ITIMER_VIRTUAL, .05, .05)\nwhile True: pass', 'a profiling one': 'signal.setitimer(signal.ITIMER_PROF, .05)\nwhile True: pass',
    'the default again': 'signal.signal(signal.SIGALRM, signal.SIG_DFL)\nsignal.alarm(1)\ntime.sleep(600)',
    'swallowed': 'signal.alarm(1)\ntry: time.sleep(600)\nexcept BaseException: raise ValueError("there was no handler")',
}

@posix
@pytest.mark.parametrize('how', ALARMS)
def test_an_alarm_without_a_handler_ends_the_block_and_not_the_host(how):
    out = script(f'''
        import signal
        from rlm import exec_code
        was = [signal.getsignal(n) for n in signal.valid_signals()]
        res = exec_code("import signal, time\\n" + {ALARMS[how]!r}, dict())
        print('there was no handler' in res.error, was == [signal.getsignal(n) for n in signal.valid_signals()])
        print(signal.getitimer(signal.ITIMER_REAL)[0], exec_code('6 * 7', dict()).stdout)
    ''')
    assert out == 'True True\n0.0 42\n\n'

@posix
def test_an_alarm_without_a_handler_off_the_main_thread_is_refused():
    res = elsewhere(exec_code, 'import signal, time\nsignal.alarm(0)\nsignal.alarm(1)', {})
    assert res.error.startswith('ValueError: SIGALRM has no handler')
    handled = 'import signal\nsignal.signal(signal.SIGALRM, lambda *a: None)'
    assert at(False, exec_code, handled + '\nsignal.alarm(1)\nsignal.alarm(0)', {}).error is None

@on_both
def test_the_default_timeout_of_sockets_and_callbacks_of_gc(off_main):
    import gc, socket
    was = gc.callbacks[:], gc.get_threshold()
    code = 'import gc, socket\nsocket.setdefaulttimeout(.001)\ngc.set_threshold(3)\ndef late(phase, info): raise ValueError\ngc.callbacks.insert(0, late)\ngc.callbacks.append(7)'
    assert at(off_main, exec_code, code, {}).error is None
    assert socket.getdefaulttimeout() is None and (gc.callbacks, gc.get_threshold()) == was
    assert at(off_main, exec_code, 'import gc\ncallbacks = gc.callbacks\ngc.callbacks.clear()\ngc.callbacks = None', {}).error is None
    assert gc.callbacks == was[0]

@posix
def test_an_alarm_that_a_block_on_a_thread_leaves_never_fires():
    out = script('''
        import signal, threading, time
        from rlm import exec_code
        def go():
            exec_code('import signal; signal.alarm(1)', dict())
            exec_code('import signal; signal.setitimer(signal.ITIMER_REAL, .9)', dict(), timeout=50)
        t = threading.Thread(target=go); t.start(); t.join()
        print(signal.getitimer(signal.ITIMER_REAL)[0])
        signal.alarm(1000)
        t = threading.Thread(target=go); t.start(); t.join()
        print(900 < signal.alarm(0) <= 1000)
    ''')
    assert out == '0.0\nTrue\n'
