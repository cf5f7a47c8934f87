"""Code in this process: languages, await and asyncio, context variables, classes that other processes know, and sources that stay."""
import asyncio, contextvars, os
import pytest
from common import HANG, block, forks, in_child
from rlm import Limits, ScriptLM, arlm_run, exec_code, loops, repl, rlm_iter, rlm_run, sources

@pytest.mark.parametrize('lang', ['bash2', 'Python', '', 'julia', None, 3, ['sh']])
def test_an_unknown_language_is_never_python(lang):
    ns = {}
    with pytest.raises(ValueError, match='python, bash, sh'): exec_code('x = 1', ns, lang=lang)
    assert 'x' not in ns

def test_an_unknown_language_goes_to_no_worker():
    from rlm.remote import RemoteNS
    class Never(RemoteNS):
        def _open(self, *args, **kw): raise AssertionError('something was sent')
    ns = Never.__new__(Never)
    with pytest.raises(ValueError, match='python, bash, sh'): ns.exec_code('x = 1', lang='bash2')
    with pytest.raises(ValueError, match='python, bash, sh'): exec_code('x = 1', ns, lang='bash2')

def test_a_language_is_a_row(monkeypatch):
    def run_words(code, ns, block, timeout, cap):
        ns['words'] = code.split()
        print(len(ns['words']))
    monkeypatch.setitem(repl.languages, 'words', run_words)
    ns = {}
    res = exec_code('three little words', ns, lang='words')
    assert res.stdout == '3\n' and ns['words'] == ['three', 'little', 'words']
    with pytest.raises(ValueError, match='python, bash, sh, words'): exec_code('x', ns, lang='word')
    def run_forever(code, ns, block, timeout, cap):
        while True: pass
    monkeypatch.setitem(repl.languages, 'forever', run_forever)
    assert exec_code('', ns, lang='forever', timeout=.1).error.startswith('BlockTimeout')

# await and asyncio, in every kind of host

AWAITS = {
    'await': ('import asyncio\nasync def f(): await asyncio.sleep(0); return 41\nx = await f()\nx + 1', '42\n'),
    'await at the end': ('import asyncio\nasync def f(): await asyncio.sleep(0); return 42\nawait f()', '42\n'),
    'a task': ('import asyncio\nasync def f(): print("inside"); return 42\nt = asyncio.create_task(f())\nawait t', 'inside\n42\n'),
    'async for': ('async def g():\n    for i in range(3): yield i\nasync for o in g(): print(o)', '0\n1\n2\n'),
    'async with': ('from contextlib import asynccontextmanager\n@asynccontextmanager\nasync def c(): yield 5\nasync with c() as o: print(o)', '5\n'),
    'comprehensions': ('async def g():\n    for i in range(3): yield i\nasync def f(o): return o * 2\n[o async for o in g()], [await f(o) for o in (1, 2)]', '([0, 1, 2], [2, 4])\n'),
    'gather': ('import asyncio\nasync def f(o): await asyncio.sleep(.001); print("f", o); return o\nprint(await asyncio.gather(f(1), f(2)))', 'f 1\nf 2\n[1, 2]\n'),
    'to_thread': ('import asyncio\nawait asyncio.to_thread(print, "there")', 'there\n'),
    'run': ('import asyncio\nasync def f(): await asyncio.sleep(0); print("in"); return 42\nasyncio.run(f())', 'in\n42\n'),
    'run twice': ('import asyncio\nasync def f(): return 1\nasyncio.run(f()) + asyncio.run(f())', '2\n'),
    'get_event_loop': ('import asyncio\nasync def f(): return 42\nloop = asyncio.get_event_loop()\nloop.run_until_complete(f())', '42\n'),
    'run, then get_event_loop is closed': ('import asyncio\nasync def f(): return 42\nloop = asyncio.get_event_loop()\nloop.close()', ''),
    'new_event_loop': ('import asyncio\nasync def f(): return 42\nloop = asyncio.new_event_loop()\nasyncio.set_event_loop(loop)\nprint(loop.run_until_complete(f()))\nloop.close()', '42\n'),
    'nest_asyncio': ('import asyncio, nest_asyncio\nnest_asyncio.apply()\nasync def f(): return 42\nasyncio.run(f())', '42\n'),
    'Runner': ('import asyncio\nasync def f(): return 42\nwith asyncio.Runner() as r: print(r.run(f()))', '42\n'),
}

def in_main(f): return f()
def in_worker(f):
    import concurrent.futures
    with concurrent.futures.ThreadPoolExecutor(1) as ex: return ex.submit(f).result(HANG)
def in_loop(f):
    async def inside():
        loop = asyncio.get_running_loop()
        res = f()
        assert asyncio.get_running_loop() is loop and asyncio.get_event_loop() is loop
        await asyncio.sleep(0)
        return res
    return asyncio.run(inside())
def in_code_thread(f, thread=None): return f(thread=repl.CodeThread())

@forks
def test_a_fork_leaves_the_loops_of_other_threads_alone():
    "A thread forks while the loop of another one is at rest; what wakes that loop still does."
    ns = {}
    code = 'import asyncio\nasync def f():\n    await asyncio.to_thread(print, "there")\nawait asyncio.wait_for(f(), None)'
    def many(): return [exec_code(code, ns).stdout for _ in range(3)]
    assert in_code_thread(lambda thread: exec_code(code, ns, thread=thread).stdout) == 'there\n'
    assert many() == ['there\n'] * 3
    assert in_worker(lambda: in_child(lambda: 'child')) == 'child'
    waits_on = [o.loop for o in loops._own_loops if o.loop is not None and not o.loop.is_closed()]
    assert waits_on and many() == ['there\n'] * 3
    for loop in waits_on:
        if loop.is_closed() or not hasattr(loop._selector, 'fileno') or not os.path.exists('/proc/self/fdinfo'): continue
        lines = open(f'/proc/self/fdinfo/{loop._selector.fileno()}').read().splitlines()
        assert str(loop._ssock.fileno()) in [o.split()[1] for o in lines if o.startswith('tfd:')]

hosts = pytest.mark.parametrize('host', [in_main, in_worker, in_loop, in_code_thread])

@hosts
@pytest.mark.parametrize('timeout', [None, HANG])
def test_asyncio_in_blocks(host, timeout):
    before = asyncio.run
    def all_of_them(**kw):
        ns = {}
        return [exec_code(code, ns, timeout=timeout, **kw) for code, _ in AWAITS.values()]
    for (name, (code, out)), res in zip(AWAITS.items(), host(all_of_them)):
        assert (name, res.error, res.stdout, res.stderr) == (name, None, out, '')
    assert asyncio.run is before

WAITS = {
    'await': 'import asyncio\nawait asyncio.sleep(1000)',
    'run': 'import asyncio\nasyncio.run(asyncio.sleep(1000))',
    'busy': 'import asyncio\nasync def f():\n    while True: await asyncio.sleep(0)\nawait f()',
    'gather': 'import asyncio\nawait asyncio.gather(*[asyncio.sleep(1000) for _ in range(3)])',
}

@hosts
@pytest.mark.parametrize('name', WAITS)
def test_a_time_limit_ends_what_awaits(host, name):
    def both(**kw):
        ns = {}
        return exec_code(WAITS[name], ns, timeout=.2, **kw), exec_code('import asyncio\nawait asyncio.sleep(0, 5)', ns, timeout=HANG, **kw)
    res, then = host(both)
    assert res.error == 'BlockTimeout: stopped after 0.2 s' and (then.stdout, then.error) == ('5\n', None)

@hosts
def test_tasks_left_over_are_cancelled(host):
    code = 'import asyncio\nseen = []\nasync def f():\n    try: await asyncio.sleep(1000)\n    except asyncio.CancelledError: seen.append(1); raise\nts = [asyncio.create_task(f()) for _ in range(2)]\nawait asyncio.sleep(0)'
    def both(**kw):
        ns = {}
        return exec_code(code, ns, timeout=HANG, **kw), exec_code('seen', ns, timeout=HANG, **kw)
    res, then = host(both)
    assert res.error is None and res.stderr == '2 tasks were still under way at the end of the block, and cancelled.\n' and (then.stdout, then.stderr) == ('[1, 1]\n', '')

def test_what_raises_in_await_is_the_blocks_error():
    res = exec_code('async def f(): return 1/0\nawait f()', {})
    assert res.error == 'ZeroDivisionError: division by zero' and 'asyncio' not in res.stderr and 'await f()' in res.stderr
    assert exec_code('import sys\nasync def f(): sys.exit(3)\nawait f()', {}).error == 'SystemExit: 3'
    assert exec_code('def f(): await g()', {}).error.startswith('SyntaxError')

@hosts
def test_a_context_variable_set_with_await_stays(host):
    def both(**kw):
        ns = {}
        exec_code('import asyncio, contextvars\nv = contextvars.ContextVar("v")\nv.set(3)\nawait asyncio.sleep(0)\nv.set(4)', ns, **kw)
        return exec_code('v.get()', ns, **kw)
    assert host(both).stdout == '4\n'

# In a real kernel

KERNEL = '''
import asyncio, contextvars
from contextvars import ContextVar
from rlm import Limits, ScriptLM, arlm_run, rlm_run
unpatched = asyncio.run, asyncio.get_event_loop, type(asyncio.get_running_loop()).run_until_complete
def block(code): return f"Next.\\n```repl\\n{code}\\n```\\n"
def script(code): return ScriptLM([block(code), "FINAL_VAR(x)"])
RUN = "import asyncio\\nasync def f(): await asyncio.sleep(0); return 42\\nx = asyncio.run(f())"
LOOP = "import asyncio\\nasync def f(): await asyncio.sleep(0); return 42\\nx = asyncio.get_event_loop().run_until_complete(f())"
NEST = "import nest_asyncio\\nnest_asyncio.apply()\\n" + RUN
AWAIT = "import asyncio\\nasync def f(): await asyncio.sleep(0); return 42\\nx = await f()"
ALL = [RUN, LOOP, NEST, AWAIT]
'''

@pytest.fixture(scope='module')
def kernel(tmp_path_factory):
    from test_kernel import Kernel
    k = Kernel(tmp_path_factory.mktemp('kernel') / 'ready')
    try:
        k.run(KERNEL)
        yield k
    finally: k.close()

def test_asyncio_in_a_kernel(kernel):
    assert kernel.run('[rlm_run("Q", "abc", {}, script(o)).value for o in ALL]')[1:] == ('[42, 42, 42, 42]', '')
    assert kernel.run('[(await arlm_run("Q", "abc", {}, script(o))).value for o in ALL]')[1:] == ('[42, 42, 42, 42]', '')
    assert kernel.run('[r.value for r in await asyncio.gather(*[arlm_run("Q", "abc", {}, script(o)) for o in ALL * 5])] == [42] * 20')[1:] == ('True', '')
    assert kernel.run('unpatched == (asyncio.run, asyncio.get_event_loop, type(asyncio.get_running_loop()).run_until_complete)')[1] == 'True'
    assert kernel.run('c = asyncio.sleep(0)\ntry: asyncio.run(c)\nexcept RuntimeError as e: print(e)\nc.close()')[0] == 'asyncio.run() cannot be called from a running event loop\n'
    assert kernel.run('loop = asyncio.get_running_loop()\nawait asyncio.sleep(.01)\nasyncio.get_event_loop() is loop')[1] == 'True'

def test_a_cell_that_awaits_in_a_block_is_interrupted(kernel):
    kernel.run('def ready(): open(FLAG, "w").close()'.replace('FLAG', repr(str(kernel.flag))))
    for code in ('await asyncio.sleep(1000)', 'asyncio.run(asyncio.sleep(1000))'):
        _, _, error = kernel.interrupt(f'rlm_run("Q", "abc", ns := {{}}, script("import asyncio\\nready()\\n{code}"), tools=dict(ready=ready))')
        assert error['ename'] == 'KeyboardInterrupt'
        assert kernel.run('await asyncio.sleep(0, 5)')[1] == '5' and kernel.run('rlm_run("Q", "abc", {}, script(AWAIT)).value')[1] == '42'

# Context variables of the caller

seen_by = contextvars.ContextVar('seen_by', default='nobody')

def watched(host):
    "What each kind of code saw of `seen_by`, in a run by `host(name)`."
    seen = {}
    def note(kind): seen.setdefault(kind, set()).add(seen_by.get())
    def tool(): note('tool')
    async def async_tool(): note('async tool')
    def model(msgs):
        if msgs[0]['role'] != 'system': note('sub-call'); return 'said'
        if 'a child' in msgs[1]['content']:
            note('child')
            return block('tool()\nanswer = 1') + 'FINAL(done)' if len(msgs) < 3 else 'FINAL(done)'
        note('model')
        code = '\n'.join(['import threading', 'tool()', 'async_tool()', 'llm_query("x")', 'llm_query_batched(["y", "z"])', 'rlm_query("a child")',
            'rlm_query_batched(["a child 2", "a child 3"])', 't = threading.Thread(target=tool)', 't.start()', 't.join()', 'x = 1'])
        return block(code) if len(msgs) < 3 else 'FINAL_VAR(x)'
    def on_event(*args, **kw): note('event')
    options = dict(model=model, tools=dict(tool=tool, async_tool=async_tool), on_event=on_event, limits=Limits(max_depth=2))
    seen_by.set('the caller')
    res = host(options)
    assert all(b.result.error is None for it in res.iterations for b in it.code_blocks), res.iterations
    return seen

def by_run(options): return rlm_run('Q', 'abc', {}, **options)
def by_arun(options): return asyncio.run(arlm_run('Q', 'abc', {}, **options))
def by_iter(options):
    steps = rlm_iter('Q', 'abc', {}, **options)
    while True:
        try: next(steps)
        except StopIteration as e: return e.value
def by_run_in_a_loop(options):
    async def inside(): return by_run(options)
    return asyncio.run(inside())

@pytest.mark.parametrize('host', [by_run, by_arun, by_iter, by_run_in_a_loop])
def test_the_callers_context_is_seen_everywhere(host):
    seen = contextvars.copy_context().run(watched, host)
    assert seen == {k: {'the caller'} for k in ('model', 'tool', 'async tool', 'sub-call', 'child', 'event')}

def test_runs_at_once_have_their_own_context():
    seen = []
    def tool(): seen.append(seen_by.get())
    async def one(i):
        seen_by.set(i)
        await arlm_run('Q', 'abc', {}, ScriptLM([block('tool()\nx = 1'), 'FINAL_VAR(x)']), tools=dict(tool=tool))
    async def all_of_them(): await asyncio.gather(*[one(i) for i in range(10)])
    asyncio.run(all_of_them())
    assert sorted(seen) == list(range(10))

# Sources

def test_the_source_of_a_living_function_stays():
    import gc, inspect, linecache
    ns = {}
    exec_code('def kept(x):\n    return x + 1\nclass C:\n    def method(self): return 1', ns)
    exec_code('def dropped(x):\n    return x + 2', ns)
    gone = ns.pop('dropped').__code__.co_filename
    gc.collect()
    for i in range(2200): exec_code(f'x = {i}', ns)
    assert inspect.getsource(ns['kept']) == 'def kept(x):\n    return x + 1\n'
    assert inspect.getsource(ns['C'].method).strip() == 'def method(self): return 1'
    assert gone not in linecache.cache
    n = len(sources._files)
    for i in range(1500): exec_code(f'def again(x): return {i}', ns)
    for i in range(1500): exec_code('pass', ns)
    assert len(sources._files) <= max(n, 1010) and 'return 1499' in inspect.getsource(ns['again'])
