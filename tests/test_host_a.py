"""What a block does to the process that it runs in: tracers, signals, scaffold, builtins, standard input, IPython's names, and more."""
import os, signal, subprocess, sys, textwrap, threading, time
import pytest
import rlm
from rlm import ScriptLM, exec_code, rlm_iter, rlm_run
from common import at, block, environment, on_both, posix

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
