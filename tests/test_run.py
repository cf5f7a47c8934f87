"""Whole runs, in every place that a run may be called from: threads, tasks, forks, scripts that are interrupted. All with scripted models."""
import asyncio, gc, json, multiprocessing, os, random, signal, subprocess, sys, textwrap, threading, time
from concurrent.futures import ThreadPoolExecutor
import pytest
from common import HANG, at, block, elsewhere, environment, first, forks, given_time, in_child, is_turn, on_both, posix, script, tree, turn, until
from rlm import LMError, LimitExceeded, RLMError, ScriptLM, arlm_run, exec_code, llm_query, llm_query_batched, rlm_iter, rlm_query, rlm_run
from rlm import stopping
from rlm._rlmpaper_compat import UsageSummary
from rlm.lm import FnLM

TWO_TURNS = [block('n = len(context)\nprint("found", n)'), block('m = n * 2', 'FINAL_VAR(m)')]
def counted(msgs): return TWO_TURNS[turn(msgs)]
def own(tag): return ScriptLM(lambda msgs: [block(f'import time\nfor i in range(20): print("{tag}", i); time.sleep(.0005)\nseen = llm_query("{tag}")'), 'FINAL_VAR(seen)'][turn(msgs)] if is_turn(msgs) else f'reply to {msgs[0]["content"]}')
def check_own(tag, res):
    assert (res.answer, res.stop) == (f'reply to {tag}', 'answer') and res.usage.total.total_calls == 3
    assert res.iterations[0].code_blocks[0].result.stdout == ''.join(f'{tag} {i}\n' for i in range(20))

def check_alive(ns=None, context='abc'):
    res = rlm_run('How long?', context, {} if ns is None else ns, model=counted)
    assert (res.answer, res.stop, res.usage.total.total_calls) == (str(2 * len(context)), 'answer', 2)

class Waits:
    "An async model that waits in every call but those that it is told not to; it counts who came and who was sent away."
    def __init__(self, *replies): self.replies, self.came, self.gone, self.free = replies, threading.Event(), threading.Event(), threading.Event()
    async def __call__(self, msgs):
        if is_turn(msgs) and turn(msgs) < len(self.replies): return self.replies[turn(msgs)]
        self.came.set()
        try:
            for _ in range(HANG * 500):
                if self.free.is_set(): return 'FINAL(late)'
                await asyncio.sleep(.02)
        except asyncio.CancelledError: self.gone.set(); raise

# Where a run is called from

def test_in_a_script():
    "From the import to the exit: the answer, nothing on stderr, and no thread holds up the end."
    p = script('''
        from rlm import ScriptLM, rlm_run
        res = rlm_run('How long?', 'abc', model=ScriptLM(['```repl\\nn = len(context)\\nprint("inside")\\nr = llm_query_batched(["a", "b"])\\n```', 'x', 'y', 'FINAL_VAR(n)']))
        print(res.answer, res.ns['r'])''')
    assert (p.returncode, p.stdout, p.stderr) == (0, "3 ['x', 'y']\n", '')

@pytest.mark.parametrize('where', ['module', 'function'])
def test_in_the_callers_own_namespace(where):
    "`ns=globals()`: what the script had is put back, what the code made is there."
    body = '''
        import rlm
        from rlm import ScriptLM, llm_query, rlm_run
        answer, mine = 'my own', [1]
        mine_llm = llm_query
        res = rlm_run('Q', 'text', ns, model=ScriptLM(['```repl\\nmine.append(2)\\nmade = len(context)\\nFINAL(made)\\n```']))
        assert res.ns is ns and res.answer == '4' and ns['made'] == 4, res
        assert (answer, mine, llm_query) == ('my own', [1, 2] if ns is globals() else [1], mine_llm)
        print('well', __name__)'''
    if where == 'module': p = script('ns = globals()\n' + textwrap.dedent(body))
    else: p = script('def f():\n  ns = dict(mine=[1])\n' + textwrap.indent(textwrap.dedent(body), '  ') + '\nf()')
    assert (p.returncode, p.stdout, p.stderr) == (0, 'well __main__\n', '')

def test_in_a_running_loop():
    "A plain call from a coroutine, as in a notebook; the loop goes on afterwards."
    async def main():
        ticks = []
        async def tick():
            while True: ticks.append(1); await asyncio.sleep(.001)
        t = asyncio.create_task(tick()); await asyncio.sleep(.01)
        res = rlm_run('How long?', 'abc', model=own('x'))
        code = exec_code('import asyncio\nasyncio.run(asyncio.sleep(0, True))', {}) # The loop is hidden from the block, and there again after it
        n = len(ticks); await asyncio.sleep(.05); t.cancel()
        return res, code, n < len(ticks) and asyncio.get_running_loop().is_running()
    res, code, went_on = asyncio.run(main())
    check_own('x', res)
    assert code.stdout == 'True\n' and went_on

def test_in_a_running_loop_the_code_may_use_asyncio():
    "Under `arlm_run` the code has a thread of its own, and so `asyncio.run` works in it."
    code = 'import asyncio\nasync def f(): await asyncio.sleep(0); return 5\nx = asyncio.run(f())'
    assert asyncio.run(arlm_run('Q', 'text', model=ScriptLM([block(code, 'FINAL_VAR(x)')]))).value == 5

def test_in_eight_threads():
    gate = threading.Barrier(8)
    def one(tag): gate.wait(HANG); return [rlm_run('Q', 'text', model=own(f'{tag}{i}')) for i in range(3)]
    with ThreadPoolExecutor(8) as ex: runs = list(ex.map(one, 'abcdefgh'))
    for tag, many in zip('abcdefgh', runs):
        for i, res in enumerate(many): check_own(f'{tag}{i}', res)

def test_twenty_tasks():
    async def all_of_them(): return await asyncio.gather(*[arlm_run('Q', 'text', model=own(f't{i}')) for i in range(20)])
    for i, res in enumerate(asyncio.run(all_of_them())): check_own(f't{i}', res)

def test_threads_and_tasks_and_the_main_thread_at_once():
    async def tasks(): return await asyncio.gather(*[arlm_run('Q', 'text', model=own(f't{i}')) for i in range(6)])
    with ThreadPoolExecutor(5) as ex:
        futs = [ex.submit(rlm_run, 'Q', 'text', model=own(f'x{i}')) for i in range(4)] + [ex.submit(asyncio.run, tasks())]
        check_own('main', rlm_run('Q', 'text', model=own('main')))
        for i, f in enumerate(futs[:4]): check_own(f'x{i}', f.result(HANG))
        for i, res in enumerate(futs[4].result(HANG)): check_own(f't{i}', res)

def test_one_model_shared_by_many_runs_mixes_no_usage():
    "Each run asks a number of sub-calls of its own."
    def reply(msgs):
        if not is_turn(msgs): return 'x'
        return block('n = int(context)\nr = llm_query_batched(["?"] * n)', 'FINAL_VAR(n)')
    shared = ScriptLM(reply, price=(1, 1, 1, 1))
    async def all_of_them(): return await asyncio.gather(*[arlm_run('Q', str(n), model=shared) for n in range(12)])
    results = asyncio.run(all_of_them())
    assert [r.usage.total.total_calls for r in results] == [n + 1 for n in range(12)]
    for r in results:
        parts = sum([it.usage for it in r.iterations] + [c.usage_summary for it in r.iterations for b in it.code_blocks for c in b.result.llm_calls], UsageSummary())
        assert parts.to_dict() == r.usage.to_dict() or parts.total.total_tokens == r.usage.total.total_tokens
        assert r.cost == pytest.approx(r.usage.total.total_tokens / 1e6)

def test_many_loops_one_after_another():
    "Each `asyncio.run` has a loop of its own, which is closed in the end."
    for i in range(5): check_own(f'l{i}', asyncio.run(arlm_run('Q', 'text', model=own(f'l{i}'))))

# A run within a run

@on_both
@pytest.mark.parametrize('how', ['tool', 'async tool', 'model', 'async model', 'code', 'on_event', 'sync in an async model'])
def test_a_run_within_a_run(how, off_main):
    "Its usage, its namespace and its output are its own."
    inner = ScriptLM([block('print("inner")\ny = 5', 'FINAL_VAR(y)')])
    def run_it(*_): return rlm_run('inner', 'text', {}, model=inner)
    async def arun_it(*_): return await arlm_run('inner', 'text', {}, model=inner)
    use = block('print("before"); r = tool(1).answer; print("after")\nz = 1', 'FINAL(str("done"))')
    kw, got = dict(model=ScriptLM([use])), []
    if how == 'tool': kw['tools'] = dict(tool=run_it)
    elif how == 'async tool': kw['tools'] = dict(tool=arun_it)
    elif how == 'code': kw['tools'] = dict(tool=lambda _: exec_code('from rlm import rlm_run\nres = rlm_run("q", "c", {}, model=inner)', g := dict(inner=inner)) and g['res'])
    else: kw['tools'] = dict(tool=lambda _: run_it())
    if how == 'model': kw['model'] = lambda msgs: got.append(run_it().answer) or block('z = 1', 'FINAL(str("done"))')
    if how == 'async model':
        async def model(msgs): got.append((await arun_it()).answer); return block('z = 1', 'FINAL(str("done"))')
        kw['model'] = model
    if how == 'sync in an async model':
        async def model(msgs): got.append(run_it().answer); return block('z = 1', 'FINAL(str("done"))')
        kw['model'] = model
    if how == 'on_event': kw['on_event'] = lambda e: got.append(run_it().answer) if (e.kind, e.phase) == ('block', 'start') and not got else None; inner = ScriptLM(lambda m: block('y = 5', 'FINAL_VAR(y)'))
    res = at(off_main, lambda: elsewhere(rlm_run, 'outer', 'text', **kw) if off_main else rlm_run('outer', 'text', **kw))
    assert (res.answer, res.ns['z'], 'y' in res.ns) == ('done', 1, False) and res.usage.total.total_calls == 1
    if 'tool' in how or how == 'code': assert res.iterations[0].code_blocks[0].result.stdout == 'before\nafter\n' and res.ns['r'] == '5'
    else: assert got[0] == '5'

def test_a_run_within_a_run_in_the_same_namespace_is_refused():
    "The inner one gets a clear error, the outer one goes on."
    ns = {}
    code = 'from rlm import rlm_run\ntry: rlm_run("inner", "text", globals(), model=lambda m: "FINAL(x)")\nexcept RuntimeError as e: said = str(e)\nz = 1'
    res = rlm_run('outer', 'text', ns, model=ScriptLM([block(code), block('r = llm_query("still mine?")', 'FINAL_VAR(z)'), 'yes']))
    assert res.answer == '1' and 'another run is at work in this namespace' in ns['said'] and '\n' not in ns['said'] and ns['context'] == 'text'
    check_alive(ns)

def test_two_runs_in_one_namespace_at_once():
    ns, model = {}, Waits(block('x = 1'))
    with ThreadPoolExecutor(1) as ex:
        fut = ex.submit(rlm_run, 'first', 'one', ns, model)
        assert model.came.wait(HANG)
        for f in (lambda: rlm_run('second', 'two', ns, counted), lambda: asyncio.run(arlm_run('second', 'two', ns, counted)), lambda: list(rlm_iter('second', 'two', ns, counted))):
            with pytest.raises(RuntimeError, match='another run is at work in this namespace') as e: f()
            assert '\n' not in str(e.value)
        assert ns['context'] == 'one' and 'context_0' not in ns
        model.free.set()
        assert fut.result(HANG).answer == 'late'
    assert len(ns['history']) == 1
    check_alive(ns)

def test_many_runs_rush_into_one_namespace():
    "One gets in; the others are refused, and the namespace has what the one did."
    for _ in range(10):
        ns, model, gate = {}, Waits(), threading.Barrier(6)
        def go(i):
            gate.wait(HANG)
            try: return rlm_run(f'q{i}', f'context {i}', ns, model)
            except RuntimeError as e: return e
            finally: ended.append(i)
        ended = []
        with ThreadPoolExecutor(6) as ex:
            futs = [ex.submit(go, i) for i in range(6)]
            until(lambda: len(ended) == 5); model.free.set()
            res = [f.result(HANG) for f in futs]
        assert sum(isinstance(r, RuntimeError) for r in res) == 5
        winner, = [i for i, r in enumerate(res) if not isinstance(r, RuntimeError)]
        assert ns['context'] == f'context {winner}' and [h['question'] for h in ns['history']] == [f'q{winner}']

# Iterating

def test_a_run_that_is_left_half_way_gives_the_namespace_back():
    ns = dict(answer='mine', llm_query=len)
    for it in rlm_iter('Q', 'text', ns, counted): break
    gc.collect()
    assert ns['n'] == 4 and (ns['answer'], ns['llm_query']) == ('mine', len)
    check_alive(ns)
    steps = rlm_iter('Q', 'text', ns, counted); next(steps)
    with pytest.raises(RuntimeError, match='another run'): rlm_run('Q', 'text', ns, counted)
    steps.close()
    assert (ns['answer'], ns['llm_query']) == ('mine', len)
    check_alive(ns)
    rlm_iter('Q', 'text', ns, counted) # Never begun
    check_alive(ns)

def test_a_person_may_change_things_between_the_turns():
    ns = {}
    steps = rlm_iter('Q', 'text', ns, counted)
    assert next(steps).code_blocks[0].result.stdout == 'found 4\n'
    ns['n'] = 100
    assert exec_code('n += 1', ns).error is None
    assert next(steps).final_answer == '202'
    with pytest.raises(StopIteration) as e: next(steps)
    assert e.value.value.answer == '202' and e.value.value.ns is ns

def test_steps_from_different_threads():
    steps, ns = [], {}
    it = rlm_iter('Q', 'text', ns, counted, limits=dict(block_timeout=HANG, timeout=HANG))
    for _ in range(2): steps.append(elsewhere(next, it))
    assert steps[-1].final_answer == '8'

def test_an_error_thrown_in_between_ends_the_run():
    ns = dict(answer='mine')
    steps = rlm_iter('Q', 'text', ns, counted); next(steps)
    with pytest.raises(ZeroDivisionError) as e: steps.throw(ZeroDivisionError('mine'))
    assert len(e.value.result.iterations) == 1 and ns['answer'] == 'mine'
    check_alive(ns)

# Cancelling

@pytest.fixture
def code_ended():
    "Asks whether all code that was begun in this test has ended, and its threads with it."
    def now(): return {t for t in threading.enumerate() if t.name == 'rlm-code'}
    before = now()
    return lambda: now() <= before

def cancelled(ready, **kw):
    "Start a run as a task, cancel it as soon as `ready()`, and give back what it raised."
    async def main():
        task = asyncio.create_task(arlm_run('Q', 'text', **kw))
        end = time.monotonic() + HANG
        while not ready():
            assert not task.done(), task.result()
            assert time.monotonic() < end
            await asyncio.sleep(.01)
        task.cancel()
        try: await asyncio.wait_for(asyncio.shield(task), HANG)
        except asyncio.CancelledError as e: return e
    e = asyncio.run(main())
    assert isinstance(e, asyncio.CancelledError)
    return e

LOOPS = dict(spin='while True: pass', print='while True: print("x" * 100)', calls='while True: llm_query("x")', batches='while True: llm_query_batched(["x"] * 20)',
    child='while True: rlm_query("child")', repr='class R:\n  def __repr__(self):\n    while True: pass\nR()')

@pytest.mark.parametrize('code', LOOPS)
def test_cancelled_while_code_loops(code, code_ended):
    mine = lambda: 1
    ns = dict(answer='mine', llm_query=mine, keep=[1])
    e = cancelled(lambda: 'started' in ns, ns=ns, model=tree([block('x = 1'), block('started = True\n' + LOOPS[code])], child=['FINAL(c)']))
    assert ns['x'] == 1 and ns['keep'] == [1]
    if hasattr(e, 'result'): assert e.result.stop == 'interrupted' and len(e.result.iterations) >= 1
    until(code_ended)
    assert (ns['answer'], ns['llm_query']) == ('mine', mine)
    check_alive(ns)

def test_cancelled_while_a_call_is_in_flight():
    ns, model = dict(answer='mine'), Waits(block('x = 1'))
    cancelled(model.came.is_set, ns=ns, model=model)
    assert model.gone.wait(HANG) and ns['x'] == 1 and ns['answer'] == 'mine'
    check_alive(ns)

@pytest.mark.parametrize('code', ['llm_query("x")', 'llm_query_batched(["x"] * 5)', 'rlm_query("child")', 'rlm_query_batched(["child"] * 3)',
    'import threading\nt = threading.Thread(target=llm_query, args=["x"]); t.start(); t.join()'])
def test_cancelled_while_code_waits_for_a_subcall(code, code_ended):
    ns, model = {}, Waits()
    async def ask(msgs): return block('x = 1\n' + code) if is_turn(msgs) and 'child' not in first(msgs) else await model(msgs)
    cancelled(model.came.is_set, ns=ns, model=ask)
    assert model.gone.wait(HANG) and ns['x'] == 1
    until(code_ended)
    check_alive(ns)

def test_cancelled_while_code_sleeps(code_ended):
    "The sleep cannot be ended; the task is over nevertheless."
    ns = dict(free=threading.Event(), answer='mine')
    cancelled(lambda: 'started' in ns, ns=ns, model=ScriptLM([block('started = True\nfree.wait(600)\nlate = True')]))
    assert ns['answer'] == 'mine'
    check_alive(ns)
    ns['free'].set()
    until(code_ended)
    assert 'late' not in ns and ns['answer'] == 'mine'
    check_alive(ns)

def test_cancelled_before_it_began():
    async def main():
        task = asyncio.create_task(arlm_run('Q', 'text', ns, counted)); task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
    ns = {}
    asyncio.run(main())
    check_alive(ns)

def test_a_timeout_around_a_run():
    "`asyncio.timeout` cancels it as well, and the others go on."
    async def main():
        async def slow():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(.3): await arlm_run('Q', 'text', model=ScriptLM([block('while True: pass')]))
        return (await asyncio.gather(slow(), *[arlm_run('Q', 'text', model=own(f'n{i}')) for i in range(5)]))[1:]
    for i, res in enumerate(asyncio.run(main())): check_own(f'n{i}', res)

def test_many_are_cancelled_at_random_times(code_ended):
    "Whatever they are just doing; afterwards every namespace works, and no call is left in flight."
    flying = []
    async def model(msgs):
        flying.append(1)
        try: await asyncio.sleep(random.random() / 100); return block('x = llm_query_batched(["a", "b"])\nfor i in range(3000): y = i') if is_turn(msgs) else 'r'
        finally: flying.pop()
    async def one(ns):
        task = asyncio.create_task(arlm_run('Q', 'text', ns, model, max_iters=50))
        await asyncio.sleep(random.random() / 3); task.cancel()
        try: await task
        except asyncio.CancelledError: return ns
    async def main(): return await asyncio.gather(*[one({}) for _ in range(40)])
    spaces = asyncio.run(main())
    until(lambda: not flying and code_ended())
    for ns in spaces:
        if ns is not None: check_alive(ns)

# Ctrl-C, for real

CTRL_C = '''
    import asyncio, os, sys, threading, time
    from rlm import ScriptLM, arlm_run, rlm_iter, rlm_query, rlm_query_batched, rlm_run
    def block(code): return f'```repl\\n{code}\\n```'
    def say(what): os.write(1, f'{what}\\n'.encode()) # Past the block that it is called from
    async def model(msgs):
        if msgs[0]['role'] == 'system' and 'child' not in msgs[1]['content']:
            if len(msgs) == 2: return block('found = 5')
            if CODE != 'llm' and len(msgs) == 4: return block('print("so far")\\n' + ('' if 'query' in CODE else 'say("ready")\\n') + CODE)
        elif IN_CHILD and msgs[0]['role'] == 'system': return block('say("ready")\\n' + IN_CHILD)
        if not IN_CHILD: say('ready')
        await asyncio.sleep(600)
    ns, kw = dict(mine=1, answer='mine'), dict(tools=dict(say=say))
'''
RUN = '''
    try: rlm_run('Q', 'text', ns, model, **kw)
    except KeyboardInterrupt as e:
        r = e.result
        assert r.ns is ns and ns['found'] == 5 and ns['mine'] == 1 and ns['answer'] == 'mine', ns
        say(f'partial {len(r.iterations)} {r.stop} {r.answer} {r.usage.total.total_calls}')
    res = rlm_run('And?', None, ns, ScriptLM([block('found += 1'), 'FINAL_VAR(found)']))
    say(f"next {res.answer} {len(ns['history'])}")
'''

def interrupted(body, code='llm', in_child='', times=1, **kw):
    "A script that gets SIGINT when it says that it is ready; gives its exit code and its output."
    text = f'CODE, IN_CHILD = {code!r}, {in_child!r}\n' + textwrap.dedent(CTRL_C) + textwrap.dedent(body)
    p = subprocess.Popen([sys.executable, '-c', text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True)
    killer = threading.Timer(HANG, os.killpg, [p.pid, signal.SIGKILL]); killer.start()
    try:
        lines = []
        for line in p.stdout:
            lines.append(line)
            if line == 'ready\n' and times: p.send_signal(signal.SIGINT); times -= 1
        return p.wait(), [o.strip() for o in lines if o != 'ready\n'], p.stderr.read()
    finally: killer.cancel()

WHERE = {
    'a sleep': ('import time\ntime.sleep(600)', '', 2), 'a loop': ('while True: pass', '', 2), 'a lock': ('import threading\nthreading.Event().wait()', '', 2), 'input': ('import os\nos.read(os.pipe()[0], 1)', '', 2),
    'a process': ('import subprocess\nsubprocess.run(["sleep", "600"])', '', 2), 'a call of the run': ('llm', '', 1), 'a sub-call': ('llm_query("x")', '', 2), 'a batch': ('llm_query_batched(["x"] * 20)', '', 2),
    'a child\'s call': ('rlm_query("child")', '', 2), 'children that loop': ('rlm_query_batched(["child"] * 3)', 'while True: pass', 2), 'children that sleep': ('rlm_query_batched(["child"] * 3)', 'import time\ntime.sleep(600)', 2),
    'a swallowing except': ('import time\ntry: time.sleep(600)\nexcept BaseException: print("ha")', '', 2),
}

@posix
@pytest.mark.parametrize('where', WHERE)
def test_ctrl_c_in_a_script(where):
    "The partial result is there, the namespace is whole, the next run works, and the script ends."
    code, in_child, turns = WHERE[where]
    status, out, err = interrupted(RUN, code, in_child)
    assert (status, err) == (0, '')
    assert out[0].startswith(f'partial {turns} interrupted None') and out[1:] == ['next 6 2']

@posix
@pytest.mark.parametrize('where', ['a sleep', 'a call of the run', "a child's call"])
def test_ctrl_c_that_nobody_catches_ends_the_script(where):
    status, out, err = interrupted("rlm_run('Q', 'text', ns, model, **kw)", *WHERE[where][:2])
    assert status in (-signal.SIGINT, 130) and out == [] and err.rstrip().split('\n')[-1].startswith('KeyboardInterrupt')

@posix
@pytest.mark.parametrize('where', ['a sleep', 'a loop', 'a call of the run', 'a sub-call'])
def test_ctrl_c_in_a_loop_of_ones_own(where):
    "`asyncio.run` turns it into a cancellation; the task sees the partial result."
    body = '''
    async def main():
        try: await arlm_run('Q', 'text', ns, model, **kw)
        except asyncio.CancelledError as e: say(f'partial {len(e.result.iterations)} {e.result.stop}'); raise
    try: asyncio.run(main())
    except KeyboardInterrupt: say(f"over {ns['found']}")'''
    status, out, err = interrupted(body, *WHERE[where][:2])
    assert (status, err) == (0, '')
    assert out == [f'partial {WHERE[where][2]} interrupted', 'over 5']

@posix
def test_ctrl_c_while_iterating():
    body = '''
    steps = rlm_iter('Q', 'text', ns, model, **kw)
    try:
        for it in steps: print('turn', it.code_blocks[0].result.error)
    except KeyboardInterrupt as e: print(e.result.stop, len(e.result.iterations), e.result.iterations[-1].code_blocks[0].result.stdout.strip())'''
    status, out, err = interrupted(body, 'import time\ntime.sleep(600)')
    assert (status, out, err) == (0, ['turn None', 'interrupted 2 so far'], '')

def test_a_keyboard_interrupt_that_code_raises_is_only_an_error():
    res = rlm_run('Q', 'text', model=ScriptLM([block('x = 1\nraise KeyboardInterrupt("ha")'), 'FINAL_VAR(x)']))
    assert (res.answer, res.stop) == ('1', 'answer') and res.iterations[0].code_blocks[0].result.error == 'KeyboardInterrupt: ha'

# Children

def children_of(n, f='rlm_query_batched'): return block(f'rs = {f}(["child {{}}".format(i) for i in range({n})])\nbad = [type(getattr(o, "error", None)).__name__ for o in rs]', 'FINAL_VAR(rs)')

def test_children_that_fail_leave_the_others_unharmed():
    def reply(msgs):
        if 'child' not in first(msgs): return children_of(8)
        i = int(first(msgs).split('child ')[1].split()[0])
        if i == 1: raise ValueError('no model for this')
        if i == 2: return 'Hm.'
        if i == 3: return block('1/0')
        if i == 4: return block('globals().clear(); import sys; sys.exit()', f'FINAL(c{i})')
        if i == 5: return 5
        return block(f'x = {i}', f'FINAL(c{i})')
    res = rlm_run('parent', 'text', model=ScriptLM(reply), max_iters=2)
    assert [str(o) for o in res.value if o[0] == 'c'] == ['c0', 'c4', 'c6', 'c7'] and len(res.value) == 8
    assert all(res.value[i].startswith('Error: ') and isinstance(res.value[i].error, RLMError) for i in (1, 5))
    assert res.value[1].error.result.stop == 'errors'
    assert res.usage.total.total_calls >= 9 and 'x' not in res.ns

def test_a_single_child_that_fails_raises_in_the_block():
    def reply(msgs):
        if 'child' in first(msgs): raise ValueError('no model for this')
        return block('try: rlm_query("child")\nexcept Exception as e: kind = type(e).__name__\nrlm_query("child")') if not turn(msgs) else 'FINAL_VAR(kind)'
    res = rlm_run('parent', 'text', model=ScriptLM(reply))
    assert res.answer == 'LMError' and 'no model for this' in res.iterations[0].code_blocks[0].result.error and 'repl.py' not in res.iterations[0].code_blocks[0].result.stderr

def test_too_many_children_in_a_batch():
    res = rlm_run('parent', 'text', model=tree([children_of(6)], child=['FINAL(c)']), limits=dict(max_children_per_batch=2))
    assert res.value[:2] == ['c', 'c'] and len(res.value) == 6 and len(res.children) == 2
    assert all(o.startswith('Error: max_children_per_batch exceeded') and isinstance(o.error, LimitExceeded) for o in res.value[2:])

@on_both
@pytest.mark.parametrize('how', ['loops', 'sleeps', 'swallows', 'waits', 'waits in a sub-call'])
def test_a_child_that_never_ends(how, off_main, monkeypatch):
    "The others are unharmed, the parent goes on, and it takes no longer than the child may."
    monkeypatch.setattr(stopping, 'grace', .2)
    code = dict(loops='while True: pass', sleeps='import time\ntime.sleep(600)', swallows='while go():\n  try:\n    x = 0\n    while go(): x += 1\n  except BaseException: pass').get(how)
    stop, model = threading.Event(), Waits()
    async def ask(msgs):
        if 'child' not in first(msgs) and is_turn(msgs): return children_of(3)
        if 'child 1' not in first(msgs): return 'FINAL(fine)'
        if code: return block(code)
        return block('llm_query("child 1, and wait")') if is_turn(msgs) and how != 'waits' else await model(msgs)
    def run(seconds): return at(off_main, rlm_run, 'parent', 'text', model=ask, limits=dict(per_child_timeout=seconds), tools=dict(go=lambda: not stop.is_set()))
    def ready(res): return not any('child timeout' in str(o) for o in res.value[::2]) and (model.came.is_set() or 'waits' not in how)
    try: res, _ = given_time(run, ready, .7)
    finally: stop.set()
    assert [str(o) for o in res.value[::2]] == ['fine', 'fine'] and res.value[1].startswith('Error: child timeout after ') and res.stop == 'answer'
    assert res.seconds < HANG
    if 'waits' in how: assert model.gone.wait(HANG)

@on_both
@pytest.mark.parametrize('code', ['llm_query("x")', 'llm_query_batched(["x"] * 5)', 'rlm_query("child")', 'rlm_query_batched(["child"] * 3)', 'while True: pass'])
def test_block_timeout_ends_what_the_block_waits_for(code, off_main):
    model, ns = Waits(), {}
    async def ask(msgs):
        if is_turn(msgs) and 'child' not in first(msgs): return [block('x = 1\n' + code), block('y = 2', 'FINAL_VAR(y)')][turn(msgs)]
        return await model(msgs)
    def run(seconds): return at(off_main, rlm_run, 'Q', 'text', ns, ask, limits=dict(block_timeout=seconds))
    def ready(res):
        late = res.iterations[1].code_blocks[0].result.error or ''
        return 'x' in ns and 'BlockTimeout' not in late and (model.came.is_set() or 'query' not in code)
    res, seconds = given_time(run, ready, .4)
    assert (res.answer, ns['x']) == ('2', 1) and f'BlockTimeout: stopped after {seconds:g} s' in res.iterations[0].code_blocks[0].result.error
    if 'query' in code: assert model.gone.wait(HANG)
    check_alive(ns)

def test_deep_recursion_with_one_place():
    "Five levels, batches of two at each, one call at a time: nobody waits for a place that a parent holds."
    def reply(msgs):
        if not is_turn(msgs): return 'leaf'
        return block('rs = rlm_query_batched([context + " deeper"] * 2)\nn = sum(int(o) if o.isdigit() else 1 for o in rs)', 'FINAL_VAR(n)')
    res = elsewhere(rlm_run, 'Q', 'go', model=ScriptLM(reply), limits=dict(max_depth=5, max_concurrency=1))
    assert res.value == 2**5 and res.usage.total.total_calls == 2**5 - 1 + 2**5

def test_a_childs_prompt_stands_once_in_its_messages():
    seen, long = [], 'Count the words. ' + 'word ' * 2000
    def reply(msgs):
        if 'parent' in first(msgs): return block('r = [rlm_query(p) for p in prompts]', 'FINAL_VAR(r)')
        seen.append(msgs)
        return block('n = len(context)', 'FINAL_VAR(n)' if turn(msgs) == 2 else '')
    res = rlm_run('parent', 'text', dict(prompts=['Short: ' + 'a' * 1900, long]), model=ScriptLM(reply))
    assert res.value == ['1907', str(len(long))]
    short, big = [''.join(m['content'] for m in o) for o in (seen[2], seen[5])]
    assert short.count('a' * 1900) == 1 and big.count('Count the words.') == 1 and len(big) < 8000 and f'{len(long):,}' in big

@pytest.mark.parametrize('depth', [1, 2, 3])
def test_model_and_tools_at_every_depth(depth):
    asked = []
    def model(msgs, name): asked.append((name, is_turn(msgs))); return block('r = rlm_query(context + "+", model=pick(len(context)))', 'FINAL_VAR(r)') if is_turn(msgs) else f'leaf of {name}'
    res = rlm_run('Q', 'x', model=FnLM(model, model='root'), limits=dict(max_depth=depth), tools=dict(pick=lambda n: f'model-{n}'))
    assert asked == [('root', True)] + [(f'model-{i}', True) for i in range(1, depth)] + [(f'model-{depth}', False)]
    assert res.answer == f'leaf of model-{depth}' and set(res.usage.model_usage_summaries) == {n for n, _ in asked}

# Threads that the code starts

@on_both
@pytest.mark.parametrize('f', ['llm_query', 'rlm_query'])
def test_subcalls_from_threads_of_the_code(f, off_main):
    code = f'''
        import threading
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(5) as ex: rs = list(ex.map({f}, [f"child {{i}}" for i in range(10)]))
        def one(): rs.append({f}("child on a thread")); print("there")
        t = threading.Thread(target=one); t.start(); t.join()'''
    res = at(off_main, rlm_run, 'parent', 'text', model=tree([block(code, 'FINAL_VAR(rs)')], child=['FINAL(c)']))
    assert res.value == (['c'] * 11 if f == 'rlm_query' else [f'CHILD {i}' for i in range(10)] + ['CHILD ON A THREAD'])
    b = res.iterations[0].code_blocks[0].result
    assert b.stdout == 'there\n' and len(b.llm_calls) == 11 and res.usage.total.total_calls == 12 and len(res.children) == (11 if f == 'rlm_query' else 0)

def test_limits_hold_for_threads_of_the_code():
    "A hundred calls from ten threads, and twenty may be made."
    made = []
    code = '''
        from concurrent.futures import ThreadPoolExecutor
        def one(i):
            try: return llm_query(str(i))
            except Exception as e: return type(e).__name__
        with ThreadPoolExecutor(10) as ex: rs = list(ex.map(one, range(100)))'''
    def reply(msgs): made.append(1); return block(code) if is_turn(msgs) else 'yes'
    res = rlm_run('Q', 'text', model=ScriptLM(reply), limits=dict(max_calls=21))
    assert len(made) == 21 and res.ns['rs'].count('yes') == 20 and res.ns['rs'].count('LimitExceeded') == 80 and res.stop == 'budget'

def test_concurrency_is_bounded_over_the_whole_tree():
    now, most, lock = [], [], threading.Lock()
    async def model(msgs):
        now.append(1); most.append(len(now))
        await asyncio.sleep(.005); now.pop()
        if not is_turn(msgs): return 'leaf'
        return block('r = llm_query_batched(["x"] * 10)', 'FINAL(c)') if 'child' in first(msgs) else children_of(5)
    res = rlm_run('parent', 'text', model=model, limits=dict(max_concurrency=3))
    assert res.value == ['c'] * 5 and max(most) == 3

def test_a_thread_that_outlives_its_run_is_refused():
    ns = dict(go=threading.Event(), out=[])
    code = '''
        import threading
        def late():
            go.wait(600)
            try: out.append(llm_query("late"))
            except Exception as e: out.append(str(e))
        t = threading.Thread(target=late, daemon=True); t.start()'''
    res = rlm_run('Q', 'text', ns, model=tree([block(code, 'FINAL(str("x"))')]))
    ns['go'].set(); ns['t'].join(HANG)
    assert ns['out'] == ['the run that this function belongs to is over'] and res.usage.total.total_calls == 1
    assert ns['llm_query']('for a person') == 'FOR A PERSON'

def test_a_pool_that_is_kept_over_turns_can_ask():
    code = ['from concurrent.futures import ThreadPoolExecutor\nex = ThreadPoolExecutor(1)\na = ex.submit(llm_query, "a").result()', 'b = ex.submit(llm_query, "b").result()\nex.shutdown()']
    res = rlm_run('Q', 'text', model=tree([block(code[0]), block(code[1], 'FINAL_VAR(b)')]))
    assert res.answer == 'B' and res.usage.total.total_calls == 4
    assert [len(it.code_blocks[0].result.llm_calls) for it in res.iterations] == [1, 1]

# Forks

pytestmark = pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')

def deep_run(ns=None):
    model = tree([block('r = rlm_query_batched(["child"] * 3) + llm_query_batched(["a", "b"])\nx = globals().get("x", 0) + 1', 'FINAL_VAR(r)')], child=['FINAL(c)'])
    return [str(o) for o in rlm_run('parent', 'text', ns if ns is not None else {}, model, limits=dict(timeout=HANG)).value]

@forks
@on_both
def test_a_run_in_a_forked_child(off_main):
    ns = {}
    assert deep_run(ns) == ['c', 'c', 'c', 'A', 'B']
    assert at(off_main, in_child, lambda: [deep_run(ns), elsewhere(deep_run), ns['x'], asyncio.run(arlm_run('Q', 'abc', model=counted)).answer]) == [['c', 'c', 'c', 'A', 'B']] * 2 + [2, '6']
    assert ns['x'] == 1 and deep_run(ns) == ['c', 'c', 'c', 'A', 'B']

@forks
def test_a_fork_while_other_runs_are_at_work():
    "Some are in a call, some in their code, some in a batch; the child's own run works, and theirs go on."
    model, go = Waits(block('x = 1')), threading.Event()
    with ThreadPoolExecutor(3) as ex:
        futs = [ex.submit(rlm_run, 'Q', 'text', {}, model), ex.submit(rlm_run, 'Q', 'text', dict(go=go), ScriptLM([block('while not go.is_set(): print("x")', 'FINAL(str("spun"))')])),
            ex.submit(asyncio.run, arlm_run('Q', 'text', dict(go=go), tree([block('while not go.is_set(): r = llm_query_batched(["a"] * 4)', 'FINAL(str("asked"))')])))]
        assert model.came.wait(HANG)
        got = [in_child(deep_run) for _ in range(5)]
        model.free.set(); go.set()
        assert [f.result(HANG).answer for f in futs] == ['late', 'spun', 'asked']
    assert got == [['c', 'c', 'c', 'A', 'B']] * 5

@forks
def test_a_fork_in_the_middle_of_a_block():
    "What the code forks may run things of its own, and ends without the parent's noticing."
    code = '''
        before = llm_query("before")
        got = in_child(lambda: [run(), llm_query("inside")])
        after = llm_query("after")'''
    res = rlm_run('Q', 'text', dict(in_child=in_child, run=deep_run), tree([block(code, 'FINAL_VAR(got)')]))
    assert res.value == [['c', 'c', 'c', 'A', 'B'], 'INSIDE'] and (res.ns['before'], res.ns['after']) == ('BEFORE', 'AFTER') and res.usage.total.total_calls == 3

def in_pool(i): return deep_run(), rlm_run('Q', 'x' * i, model=counted).answer

@forks
def test_a_pool_of_forked_processes():
    check_alive()
    with multiprocessing.get_context('fork').Pool(2) as pool: got = pool.map_async(in_pool, range(6)).get(HANG)
    assert got == [(['c', 'c', 'c', 'A', 'B'], str(2 * i)) for i in range(6)]

def test_spawned_processes():
    "Each imports the library by itself."
    p = script('''
        import concurrent.futures, multiprocessing
        from rlm import ScriptLM, rlm_run
        def one(i): return rlm_run('Q', 'x' * i, model=ScriptLM(['```repl\\nn = len(context)\\n```\\nFINAL_VAR(n)'])).value
        if __name__ == '__main__':
            with concurrent.futures.ThreadPoolExecutor(3) as ex: print(list(ex.map(one, range(3))))''')
    assert (p.stdout, p.stderr) == ('[0, 1, 2]\n', '')

# Namespaces over many questions

def test_fifty_questions_in_one_namespace():
    ns, sizes = {}, []
    def model(msgs):
        sizes.append(sum(len(m['content']) for m in msgs))
        q = first(msgs).rsplit('Question: ', 1)[1].split()[0]
        return block(f'def f{q}(): return {q} + len(context)\nlog = globals().get("log", []) + [{q}]\nall_of_them = [globals()[f"f{{i}}"]() for i in range({q} + 1)]', 'FINAL_VAR(all_of_them)') if not turn(msgs) else 'FINAL(x)'
    for q in range(50):
        res = rlm_run(f'{q} please', 'x' * (q + 1), ns, ScriptLM(model))
        assert res.value == [i + q + 1 for i in range(q + 1)] and res.usage.total.total_calls == 1 and len(res.iterations) == 1
    assert ns['log'] == list(range(50)) and [h['question'] for h in ns['history']] == [f'{q} please' for q in range(50)]
    assert ns['context'] == 'x' * 50 and all(ns[f'context_{i}'] == 'x' * (i + 1) for i in range(50))
    assert max(sizes) < 12_000
    assert rlm_run('50 please', None, ns, ScriptLM(model)).value[-1] == 100 # The newest context, once more

def test_questions_by_all_ways_in_one_namespace():
    ns = {}
    rlm_run('a', 'abc', ns, counted); asyncio.run(arlm_run('b', 'abcd', ns, counted)); list(rlm_iter('c', 'abcde', ns, counted)); elsewhere(rlm_run, 'd', None, ns, counted)
    assert [h['answer'] for h in ns['history']] == ['6', '8', '10', '10'] and ns['context'] == 'abcde'
    assert llm_query('hi', ns, model=lambda m: 'HI') == 'HI' and rlm_query('long', ns, model=counted) == '8' and ns['rlm_res'] == '8'
    check_alive(ns)

HOSTILE = {
    'clears all': 'globals().clear()',
    'clears what has no underscore': 'for k in [k for k in globals() if k[0] != "_"]: del globals()[k]',
    'deletes the scaffold': 'del llm_query, answer, FINAL, FINAL_VAR, SHOW_VARS, rlm_query, history',
    'overwrites the scaffold': 'llm_query = answer = FINAL = FINAL_VAR = SHOW_VARS = rlm_query = history = None',
    'deletes the context': 'del context',
    'deletes __rlm__': 'del __rlm__',
    'overwrites __rlm__': '__rlm__ = 5',
    'raises SystemExit': 'raise SystemExit',
    'swaps stdout': 'import sys, io; sys.stdout = io.StringIO(); 1/0',
    'an odd class': 'class M(type):\n  def __getattribute__(c, k): raise SystemExit\nclass C(metaclass=M): pass\no = C()',
    'an odd answer': 'class C:\n  def __str__(self): raise ValueError("no str")\nanswer["content"] = C(); answer["ready"] = True',
    'an array as ready': 'class A:\n  def __bool__(self): raise ValueError("ambiguous")\nanswer["content"] = 5; answer["ready"] = A()',
    'a chain of exceptions': 'e = None\nfor i in range(3000):\n  f = ValueError(i); f.__cause__ = e; e = f\nraise e',
    'a low recursion limit': 'import sys; sys.setrecursionlimit(220)',
    'calls in a finally': 'try: 1/0\nfinally: llm_query("x")',
    'wrong arguments': 'llm_query()',
    'prompts that are not str': 'llm_query_batched([1, None])',
    'one str as prompts': 'llm_query_batched("abc")',
    'an endless answer': 'class S(str): pass\nFINAL_VAR("nope")',
    'a huge output': 'print("x" * 10**7)',
}

@on_both
@pytest.mark.parametrize('what', HOSTILE)
def test_whatever_a_block_does_the_run_goes_on(what, off_main, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', sys.stdout) # Put back afterwards
    limit, ns = sys.getrecursionlimit(), dict(llm_query=len, answer='mine', keep=1)
    try: res = at(off_main, rlm_run, 'Q', 'text', ns, tree([block(HOSTILE[what]), block('r = llm_query("still there?")\nprint("alive")'), block('FINAL(r)')]))
    finally: sys.setrecursionlimit(limit)
    assert (res.answer, res.stop) == ('STILL THERE?', 'answer')
    assert res.iterations[1].code_blocks[0].result.stdout == 'alive\n'
    if what != 'clears all': assert ns['__rlm__'] is not None
    assert (ns['llm_query'], ns['answer']) == (len, 'mine')
    json.dumps([it.to_dict() for it in res.iterations])
    check_alive(ns)

@pytest.mark.parametrize('reply', ['', ' ', '\n', '```', '```repl', '```repl\n```', '\0', '\ud800', '```repl\n\ud800\n```', '```repl\nx = "\ud800"\n```', '```repl\n\0\n```', 'FINAL(', 'FINAL()', 'FINAL_VAR()', 'FINAL_VAR(")',
    'FINAL_VAR(nope)', 'FINAL_VAR(a b)', 'FINAL_VAR(__import__("os"))', "FINAL_VAR('); 1/0 #)", '`' * 10_000, 'x' * 10**6], ids=lambda s: s[:20].encode('unicode_escape').decode())
def test_whatever_the_model_says_the_run_goes_on(reply):
    res = rlm_run('Q', 'text', model=ScriptLM([reply, reply, block('x = 1'), reply, 'FINAL_VAR(x)']))
    assert res.answer == '1' and len(res.iterations) == 5 and res.messages[-1]['role'] == 'assistant'
    assert all(a['role'] != b['role'] for a, b in zip(res.messages, res.messages[1:])) and all(m['content'].strip() for m in res.messages)

@pytest.mark.parametrize('context', [None, 0, '', b'', [], {}, 1.5, object(), lambda: 1, ['a', 5, None], {'a': {'b': []}}, {1, 2}, range(10**12), (i for i in 'abc'), float('nan'), type, sys, 'x' * 10**7, bytearray(3)], ids=lambda o: type(o).__name__)
def test_any_context(context):
    "Bound by reference, whatever it is; only None stands for the one that is there."
    model = ScriptLM([block('kind = type(context).__name__', 'FINAL_VAR(kind)')])
    if context is None:
        with pytest.raises(ValueError, match='no context'): rlm_run('Q', context, ns := {}, model)
        return
    res = rlm_run('Q', context, model=model)
    assert res.answer == type(context).__name__ and res.ns['context'] is context and sum(len(m['content']) for m in res.messages) < 20_000

# What the loop's own thread must survive

KILLS = {
    'a model': "def bye(m): raise SystemExit(3)\n    kw = dict(model=bye)",
    'an async model': "async def bye(m): raise SystemExit(3)\n    kw = dict(model=bye)",
    'a model, by Ctrl-C': "def bye(m): raise KeyboardInterrupt\n    kw = dict(model=bye)",
    'an async tool': "async def tool(): raise SystemExit(3)\n    kw = dict(model=ScriptLM(['```repl\\ntool()\\n```', 'FINAL(x)']), tools=dict(tool=tool))",
    'on_event': "def watch(e): raise SystemExit(3)\n    kw = dict(model=ScriptLM(['```repl\\nllm_query(\"?\")\\n```', 'hm', 'FINAL(x)']), on_event=watch)",
    'on_subcall_start': "def watch(*a): raise SystemExit(3)\n    kw = dict(model=ScriptLM(['```repl\\nllm_query(\"?\")\\n```', 'hm', 'FINAL(x)']), on_subcall_start=watch)",
}

@pytest.mark.parametrize('who', KILLS)
def test_nobody_can_end_the_loop_that_all_runs_share(who):
    "A run may fail by it; the next one works. In a process of its own, since it may hang."
    p = script('''
    from rlm import ScriptLM, rlm_run
    %s
    try: rlm_run('Q', 'text', {}, **kw)
    except BaseException: pass
    print(rlm_run('Q', 'text', {}, ScriptLM(['```repl\\nr = llm_query("?")\\n```', 'hm', 'FINAL_VAR(r)'])).answer)''' % KILLS[who])
    assert p.stdout == 'hm\n'

def test_children_of_a_cancelled_run_say_so():
    asked = []
    async def model(msgs):
        if 'Count' not in first(msgs): return block('rlm_query_batched(["Count a", "Count b", "Count c"])')
        asked.append(1)
        await asyncio.Event().wait()
    async def main():
        task = asyncio.create_task(arlm_run('Q', 'text', model=model))
        while len(asked) < 3: await asyncio.sleep(.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as e: await task
        return e.value.result
    res = asyncio.run(asyncio.wait_for(main(), HANG))
    until(lambda: len(res.children) == 3)
    assert [o.stop for o in (res, *res.children)] == ['interrupted'] * 4
