"""What the tests share: threads, processes and forks that cannot hang the suite, and scripts for a model."""
import json, os, signal, subprocess, sys, textwrap, threading, time
import pytest
import rlm
from rlm import ScriptLM

HANG = 120 # Seconds after which something hangs; not even a busy machine is this slow. What must be cut short would take longer
forks = pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system has no fork')
posix = pytest.mark.skipif(not hasattr(signal, 'setitimer'), reason='this system has no interval timers')
on_both = pytest.mark.parametrize('off_main', [False, True], ids=['main', 'thread'])

def elsewhere(f, *args, **kw):
    "`f` on another thread, or AssertionError if it hangs."
    out = []
    def work():
        try: out.append((f(*args, **kw), None))
        except BaseException as e: out.append((None, e))
    t = threading.Thread(target=work, daemon=True); t.start(); t.join(HANG)
    assert out, 'it hangs'
    if out[0][1]: raise out[0][1]
    return out[0][0]

def at(off_main, f, *args, **kw): return elsewhere(f, *args, **kw) if off_main else f(*args, **kw)

def until(f):
    "Poll until `f()` is true."
    end = time.monotonic() + HANG
    while not (res := f()):
        assert time.monotonic() < end, 'it never happens'
        time.sleep(.01)
    return res

def given_time(f, ready, seconds):
    """What `f(seconds)` gives, and the seconds: with a limit so short that a busy machine may not get as far as the test has to, `ready` tells
    whether it got there, and if not it is tried again with more time."""
    while not ready(res := f(seconds)):
        seconds *= 3
        assert seconds < HANG, 'it never gets that far'
    return res, seconds

def environment(): return {k: v for k, v in os.environ.items() if k != 'PYTHONWARNINGS'} | dict(PYTHONPATH=os.path.dirname(os.path.dirname(rlm.__file__)))

def script(code, *args, timeout=HANG, **kw):
    "Run a script in a process of its own."
    return subprocess.run([sys.executable, '-c', textwrap.dedent(code), *args], capture_output=True, text=True, timeout=timeout, env=environment(), **kw)

def in_child(f):
    "What `f` returns in a forked child, as JSON."
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try: data = f()
        except BaseException as e: data = f'{type(e).__name__}: {e}'
        try: os.write(w, json.dumps(data).encode())
        finally: os._exit(0)
    os.close(w)
    with os.fdopen(r, 'rb') as out:
        killer = threading.Timer(HANG, os.kill, [pid, signal.SIGKILL]); killer.start()
        data = out.read(); os.waitpid(pid, 0); killer.cancel()
    return json.loads(data) if data else 'it hangs'

def block(code, then='', lang='repl'):
    "A reply with one block."
    return f'Next.\n```{lang}\n{textwrap.dedent(code).strip()}\n```\n{then}'

def first(msgs):
    "What a run's model is told first, or a sub-call's prompt."
    return msgs[1]['content'] if msgs[0]['role'] == 'system' else msgs[0]['content']

def is_turn(msgs): return msgs[0]['role'] == 'system'
def turn(msgs): return sum(m['role'] == 'assistant' for m in msgs)

def tree(root, **kids):
    """A model for a run and its children. `root` is a list of replies, and so is each of `kids`, by a word in the child's prompt; a plain sub-call
    is answered with its prompt in capitals. A reply may be a function of the messages."""
    def reply(msgs):
        if not is_turn(msgs): return msgs[-1]['content'].upper()
        todo = next((v for k, v in kids.items() if k in first(msgs)), root)
        res = todo[min(turn(msgs), len(todo) - 1)]
        return res(msgs) if callable(res) else res
    return ScriptLM(reply)
