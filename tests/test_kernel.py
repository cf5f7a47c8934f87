"""In a real Jupyter kernel: cells that run, print, await, and are interrupted."""
import os, sys, time
import pytest
from common import HANG, environment

pytest.importorskip('ipykernel', reason='needs ipykernel')
nbformat, nbclient = pytest.importorskip('nbformat', reason='needs nbformat'), pytest.importorskip('nbclient', reason='needs nbclient')
KernelManager = pytest.importorskip('jupyter_client', reason='needs jupyter_client').KernelManager

SETUP = '''
import asyncio, threading, time
from rlm import ScriptLM, arlm_run, exec_code, llm_query, rlm_iter, rlm_run
def block(code, then=''): return f'Next.\\n```repl\\n{code}\\n```\\n{then}'
def script(): return ScriptLM([block('n = len(context)\\nprint("inside", n)'), block('r = llm_query_batched(["a", "b"])'), 'A', 'B', 'FINAL_VAR(r)'])
class Waits:
    def __init__(self, *replies): self.replies, self.n = replies, 0
    async def __call__(self, msgs):
        self.n += 1
        if self.n <= len(self.replies): return self.replies[self.n - 1]
        ready()
        await asyncio.sleep(600)
def ready(): open(FLAG, 'w').close()
'''

class Kernel:
    "A kernel with which one can talk cell by cell."
    def __init__(self, flag):
        self.flag, self.km = flag, KernelManager()
        self.km.kernel_spec.argv[0] = sys.executable
        self.km.start_kernel(env=environment() | dict(JUPYTER_PLATFORM_DIRS='1'))
        self.kc = self.km.client(); self.kc.start_channels()
        self.kc.wait_for_ready(timeout=HANG)
    def send(self, code): return self.kc.execute(code)
    def result(self, msg_id):
        "What a cell printed, its value, and its error."
        out, value, error = {'stdout': '', 'stderr': ''}, None, None
        while True:
            m = self.kc.get_iopub_msg(timeout=HANG)
            if m['parent_header'].get('msg_id') != msg_id: continue
            c = m['content']
            if m['msg_type'] == 'stream': out[c['name']] += c['text']
            elif m['msg_type'] == 'execute_result': value = c['data']
            elif m['msg_type'] == 'error': error = c
            elif m['msg_type'] == 'status' and c['execution_state'] == 'idle': break
        return out, value, error
    def run(self, code):
        out, value, error = self.result(self.send(code))
        assert error is None, '\n'.join(error['traceback'])
        return out['stdout'], value and value['text/plain'], out['stderr']
    def interrupt(self, code):
        "Run a cell, and interrupt it as soon as it is ready."
        self.flag.unlink(missing_ok=True)
        msg_id, end = self.send(code), time.monotonic() + HANG
        while not self.flag.exists():
            assert time.monotonic() < end, self.result(msg_id)
            time.sleep(.02)
        self.km.interrupt_kernel()
        return self.result(msg_id)
    def close(self): self.kc.stop_channels(); self.km.shutdown_kernel(now=True)

@pytest.fixture(scope='module')
def kernel(tmp_path_factory):
    flag = tmp_path_factory.mktemp('kernel') / 'ready'
    k = Kernel(flag)
    try:
        k.run(f'FLAG = {str(flag)!r}\n{SETUP}')
        yield k
    finally: k.close()

def test_a_notebook(tmp_path):
    "As nbclient executes it: calls, awaits, a result that shows itself, and the namespace that stays."
    cells = [SETUP.replace('FLAG', repr(str(tmp_path / 'x'))), 'res = rlm_run("What are they?", "abc", ns := {}, script())\nres.answer', 'res', 'res2 = await arlm_run("And now?", None, ns, script())\nres2.answer, ns["n"], len(ns["history"])',
        'both = await asyncio.gather(*[arlm_run("Q", "x" * i, model=script()) for i in range(10)])\n[r.ns["n"] for r in both]', 'for it in rlm_iter("Q", "abc", ns, script()): print(len(it.code_blocks), end=" ")',
        'print(exec_code("print(1)\\n2", ns).stdout, end="")', 'mine = 5\nr = rlm_run("Q", "abc", globals(), ScriptLM([block("mine += 1", "FINAL_VAR(mine)")]))\nr.value, mine, context']
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbclient.NotebookClient(nb, timeout=HANG, kernel_name='python3', resources=dict(metadata=dict(path=str(tmp_path)))).execute(env=environment())
    def said(i): return ''.join(o.get('text', '') or o.get('data', {}).get('text/plain', '') for o in nb.cells[i].outputs)
    assert said(1) == "\"['A', 'B']\"" and said(3) == "(\"['A', 'B']\", 3, 2)" and said(4) == str(list(range(10))) and said(5) == '1 1 0 ' and said(6) == '1\n2\n' and said(7) == "(6, 6, 'abc')"
    shown, = nb.cells[2].outputs
    assert "['A', 'B']" in shown['data']['text/markdown'] and '3 turns' in shown['data']['text/markdown']
    assert not any(o.get('name') == 'stderr' for c in nb.cells for o in c.outputs)

def test_the_output_of_blocks_is_not_the_cells(kernel):
    assert kernel.run('print("before"); res = rlm_run("Q", "abc", {}, script()); print("after")\nres.iterations[0].code_blocks[0].result.stdout') == ('before\nafter\n', "'inside 3\\n'", '')

def test_many_at_once(kernel):
    code = 'with __import__("concurrent.futures").futures.ThreadPoolExecutor(8) as ex: rs = list(ex.map(lambda i: rlm_run("Q", "x" * i, model=script()), range(16)))\n[r.ns["n"] for r in rs]'
    assert kernel.run(code)[:2] == ('', str(list(range(16))))

INTERRUPTS = {
    'code that sleeps': 'rlm_run("Q", "abc", ns, Waits(block("found = 1"), block("ready()\\nimport time\\ntime.sleep(600)")), tools=dict(ready=ready))',
    'code that loops': 'rlm_run("Q", "abc", ns, Waits(block("found = 1"), block("ready()\\nwhile True: pass")), tools=dict(ready=ready))',
    'a call': 'rlm_run("Q", "abc", ns, Waits(block("found = 1")))',
    'a sub-call': 'rlm_run("Q", "abc", ns, Waits(block("found = 1"), block("llm_query_batched([\'x\'] * 5)")))',
    'a child': 'rlm_run("Q", "abc", ns, Waits(block("found = 1"), block("rlm_query_batched([\'x\'] * 2)")))',
    'a step': 'for it in rlm_iter("Q", "abc", ns, Waits(block("found = 1"))): pass',
}

@pytest.mark.skipif(os.name == 'nt', reason='interrupts of kernels are messages there')
@pytest.mark.parametrize('what', INTERRUPTS)
def test_an_interrupted_cell(kernel, what):
    "The error is a KeyboardInterrupt with the partial result, and the next cell works in the same namespace."
    kernel.run('ns = dict(answer="mine")')
    _, _, error = kernel.interrupt(INTERRUPTS[what])
    assert error['ename'] == 'KeyboardInterrupt'
    n = 1 if what in ('a call', 'a step') else 2
    assert kernel.run('import sys\ne = sys.last_value\ne.result.stop, e.result.answer, len(e.result.iterations), e.result.ns is ns, ns["found"], ns["answer"]')[1] == f"('interrupted', None, {n}, True, 1, 'mine')"
    assert kernel.run('r = rlm_run("And?", None, ns, ScriptLM([block("found += 1", "FINAL_VAR(found)")]))\nr.answer, ns["answer"]')[1] == "('2', 'mine')"

# A cell with a top-level `await` cannot be interrupted in ipykernel 7.4, be it `await asyncio.sleep(600)`: nothing here to test.

def test_the_kernel_goes_on_after_all_that(kernel):
    assert kernel.run('print("well")\nimport threading\n1 + 1') == ('well\n', '2', '')
