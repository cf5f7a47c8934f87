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
