"""One list of what a run means, on every kind of namespace: a dict, a locked-down process, a virtual machine."""
import asyncio, os, threading
import pytest
from pydantic import BaseModel
from common import HANG, block, given_time, is_turn, tree, turn
from kinds import KINDS, new_ns
from rlm import ANSWER, NANO, LMError, ScriptLM, arlm_run, llm_query, llm_query_batched, load_ns, rlm_iter, rlm_run, save_ns

@pytest.fixture(params=KINDS)
def ns(request):
    with new_ns(request.param) as ns: yield ns

@pytest.fixture(params=KINDS)
def two(request):
    with new_ns(request.param) as a, new_ns(request.param) as b: yield a, b

def run(ns, replies, query='Go', context='some text', **kw):
    "A run from a list of replies; sub-calls are answered in capitals."
    return rlm_run(query, context, ns, model=replies if callable(replies) else tree(replies), **kw)

def blocks(res): return [b.result for it in res.iterations for b in it.code_blocks]

class Person(BaseModel): name: str; born: int

# Answers

@pytest.mark.parametrize('replies', [
    [block('x = len(context)'), 'FINAL(nine)'],
    [block('word = "nine"'), 'FINAL_VAR(word)'],
    [block('word = "nine"'), 'FINAL(word)'],
    [block('FINAL("nine")')],
    [block('print(FINAL("nine"))')],
    [block('word = "nine"\nFINAL_VAR("word")')],
    [block('word = "nine"', then='FINAL_VAR(word)')],
    [block('FINAL_VAR("none_such")'), block('FINAL("nine")')],
], ids=['text', 'var', 'name', 'call', 'printed', 'var in a block', 'same turn', 'missing first'])
def test_paper_answers(ns, replies):
    res = run(ns, replies)
    assert (res.answer, res.stop) == ('nine', 'answer')

@pytest.mark.parametrize('code', ['answer["content"] = "a"; answer["ready"] = True', 'answer.update(content="a", ready=True)', 'answer = {"content": "a", "ready": True}'])
def test_answer_protocol(ns, code): assert run(ns, [block(code)], protocol=ANSWER).answer == 'a'

def test_a_draft_is_the_fallback(ns):
    res = run(ns, [block('answer["content"] = "draft"')] * 2, max_iters=1, protocol=ANSWER)
    assert (res.answer, res.stop) == ('draft', 'max_iters')

def test_nano(ns):
    res = run(ns, [block('print(len(prompt))', lang='python'), block('Final = {"chars": len(prompt)}', lang='python')], protocol=NANO)
    assert res.value == {'chars': 9} and '"chars": 2' in res.messages[3]['content']
    res = run(ns, [block('Final = {1, 2}', lang='python'), block('Final = 1', lang='python')], protocol=NANO, context='other')
    assert res.answer == '1' and 'JSON can hold' in res.messages[3]['content']

def test_bash(ns):
    res = run(ns, [block('echo $((6 * 7)); echo oops >&2; exit 3', lang='bash'), block('Final = "done"', lang='python')], protocol=NANO)
    b = blocks(res)[0]
    assert (b.stdout, res.answer) == ('42\n', 'done') and 'oops' in b.stderr and 'exit code 3' in b.stderr

@pytest.mark.parametrize('value', ['text', 3, 2.5, True, [1, 'a'], {'k': [1, {'z': None}]}, 'é\n"\'\\', 'x' * 300_000], ids=lambda v: str(v)[:10])
def test_values(ns, value):
    res = run(ns, [block(f'v = {value!r}\nFINAL_VAR("v")')])
    assert res.value == value and res.answer == (value if isinstance(value, str) else str(value))

def test_a_value_that_is_no_data(ns):
    res = run(ns, [block('FINAL(range(3))')])
    assert res.answer == 'range(0, 3)'

# Contexts and sessions

@pytest.mark.parametrize('context', ['text é\0\u2028', b'\x00\xffbytes', ['a', 'b'], {'k': 'v'}, [{'content': 'c'}], 'x' * 2_000_000], ids=lambda c: type(c).__name__)
def test_contexts(ns, context):
    res = run(ns, [block(f'print(type(context).__name__, len(context), context == {context!r})' if len(context) < 99 else 'print(type(context).__name__, len(context), set(context) == {"x"})'),
        'FINAL(ok)'], context=context)
    assert blocks(res)[0].stdout == f'{type(context).__name__} {len(context)} True\n'
    assert f'`context` is a {type(context).__name__}' in res.messages[1]['content'] and ns['context'] == context

def test_a_session(ns):
    run(ns, [block('seen = context; rows = [1]'), 'FINAL(a)'], 'First?', 'text one')
    res = run(ns, [block('rows.append(2); print(rows, seen, context, context_0, len(history))'), 'FINAL(b)'], 'Second?', 'text two')
    assert blocks(res)[0].stdout == '[1, 2] text one text two text one 1\n'
    assert (ns['context'], ns['context_0'], ns['context_1'], ns['rows']) == ('text two', 'text one', 'text two', [1, 2])
    assert ns['history'] == [dict(question='First?', answer='a'), dict(question='Second?', answer='b')]
    assert 'Earlier contexts: `context_0`.' in res.messages[1]['content'] and 'rows' in res.messages[1]['content'] and '`history`' in res.messages[0]['content']
    third = run(ns, [block('print(context)'), 'FINAL(c)'], 'Third?', None)
    assert blocks(third)[0].stdout == 'text two\n'

def test_no_context(ns):
    with pytest.raises(ValueError, match='there is no context'): run(ns, ['FINAL(1)'], context=None)
    assert run(ns, [block('1'), 'FINAL(1)']).answer == '1'

def test_what_the_caller_had_comes_back(ns):
    ns['answer'], ns['llm_query'] = 'my own', 'mine too'
    assert run(ns, [block('print(llm_query("hi"), answer["ready"])'), 'FINAL(1)']).iterations[0].code_blocks[0].result.stdout == 'HI False\n'
    assert (ns['answer'], ns['llm_query']) == ('my own', 'mine too')

def test_overwritten_scaffold_is_put_back_and_told_once(ns):
    res = run(ns, [block('llm_query = 3'), block('llm_query = 4; del SHOW_VARS'), block('print(llm_query("still"))'), 'FINAL(1)'])
    assert [o.notes for o in blocks(res)] == [['`llm_query` belongs to the REPL and was put back; use another name.'],
        ['`SHOW_VARS` belongs to the REPL and was put back; use another name.'], []]
    assert blocks(res)[2].stdout == 'STILL\n'

def test_the_namespace_between_turns(ns):
    steps = rlm_iter('Double it', 'n', ns, model=ScriptLM([block('n = 2'), block('FINAL(2 * n)')]))
    next(steps)
    assert ns['n'] == 2
    ns['n'] = 21
    assert [it.final_answer for it in steps] == ['42']

def test_save_and_load(ns, tmp_path):
    run(ns, [block('rows = [1, 2]\ndef f(): pass'), 'FINAL(a)'])
    assert save_ns(ns, tmp_path / 'ns.pkl') == ([] if type(ns) is dict else ['f']) # Of a block in this process the source is there
    back = load_ns(tmp_path / 'ns.pkl')
    if type(ns) is dict: assert back.pop('f')() is None
    assert back == dict(context='some text', rows=[1, 2], history=[dict(question='Go', answer='a')])

# Code

def test_output_and_state(ns):
    res = run(ns, [block('import sys\nx = 1\nprint("out"); print("err", file=sys.stderr)\nclass C: y = 2\ndef f(): return g()\ndef g(): return x + C.y\nf()'),
        block('z = 5\nprint("before")\nraise ValueError("after")'), block('print(z)\nimport sys; sys.exit(3)'), block('x = ('), 'FINAL(1)'])
    a, b, c, d = blocks(res)
    assert (a.stdout, a.stderr, a.error) == ('out\n3\n', 'err\n', None)
    assert (b.stdout, b.error) == ('before\n', 'ValueError: after') and 'raise ValueError("after")' in b.stderr and 'repl.py' not in b.stderr and '_worker' not in b.stderr
    assert (c.stdout, c.error) == ('5\n', 'SystemExit: 3') and d.error.startswith('SyntaxError')
    assert b.locals['z'] == 'int 5' and 'C' in a.locals and a.execution_time > 0

def test_much_output(ns):
    res = run(ns, [block('print("a" * 3_000_000 + "end")'), 'FINAL(1)'])
    out = blocks(res)[0].stdout
    assert len(out) < 210_000 and 'characters cut' in out and out.endswith('end\n')

def test_show_vars(ns):
    res = run(ns, [block('rows = [1, 2]\nprint(SHOW_VARS())'), 'FINAL(1)'])
    assert 'rows: list, 2 items' in blocks(res)[0].stdout and 'llm_query' not in blocks(res)[0].stdout

def test_two_at_once(two):
    code = 'import time\nfor i in range(30): print("{0}"); time.sleep(.001)\nprint(llm_query("{0}"))'
    out = {}
    def go(name, ns): out[name] = blocks(run(ns, [block(code.format(name)), 'FINAL(1)']))[0].stdout
    ts = [threading.Thread(target=go, args=a) for a in zip('xy', two)]
    for t in ts: t.start()
    for t in ts: t.join(HANG)
    assert out == {n: f'{n}\n' * 30 + f'{n.upper()}\n' for n in 'xy'}

def test_one_run_at_a_time(ns):
    steps = rlm_iter('Go', 'text', ns, model=ScriptLM([block('x = 1'), 'FINAL(1)']))
    next(steps)
    with pytest.raises(RuntimeError, match='another run is at work'): run(ns, ['FINAL(2)'])
    assert [it.final_answer for it in steps] == ['1']

# Sub-calls

def test_queries(ns):
    def model(msgs):
        if is_turn(msgs): return [block('x = llm_query("one")\nys = llm_query_batched([x, "two", "fail"])\nprint(ys)\nFINAL([x, *ys[:2], str(ys[2]), isinstance(ys[2], str), llm_query_batched([])])')][turn(msgs)]
        if msgs[-1]['content'] == 'fail': raise OSError('no route')
        return msgs[-1]['content'].upper()
    res = run(ns, model)
    assert res.value[:3] == ['ONE', 'ONE', 'TWO'] and res.value[3].startswith('Error: ') and 'no route' in res.value[3] and res.value[4:] == [True, []]
    calls = blocks(res)[0].llm_calls
    assert [c.prompt for c in calls] == ['one', 'ONE', 'two', 'fail'] and calls[3].error and res.usage.total.total_calls == 4

@pytest.mark.parametrize('code', ['llm_query(3)', 'llm_query_batched("ab")', 'llm_query_batched([1])', 'rlm_query(None)', 'llm_query()'])
def test_wrong_prompts(ns, code):
    res = run(ns, [block(code), 'FINAL(1)'])
    assert blocks(res)[0].error.startswith('TypeError') and res.answer == '1'

def test_a_failing_query_can_be_caught(ns):
    def model(msgs):
        if not is_turn(msgs): raise OSError('no route')
        return [block('try: llm_query("a")\nexcept Exception as e: print(type(e).__name__, e)\nllm_query("b")'), 'FINAL(1)'][turn(msgs)]
    b = blocks(run(ns, model))[0]
    assert b.stdout.startswith('LMError ') and 'no route' in b.stdout and b.error.startswith('LMError')

def test_queries_from_threads(ns):
    code = '''from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool: out = list(pool.map(llm_query, [f"p{i}" for i in range(24)]))
print(out == [f"P{i}" for i in range(24)])'''
    b = blocks(run(ns, [block(code), 'FINAL(1)']))[0]
    assert b.stdout == 'True\n' and sorted(c.prompt for c in b.llm_calls) == sorted(f'p{i}' for i in range(24))

def test_children(ns):
    lm = tree([block('rs = rlm_query_batched(["Count abc", "Count abcd"])\nr = rlm_query("Count it", note="here")\nFINAL(rs + [r])')],
        Count=[block('mine = 1\nFINAL(len(context))')])
    res = rlm_run('Go', 'text', ns, model=lm)
    assert res.value == ['9', '10', str(len('Count it\n\nnote: here'))] and len(res.children) == 3
    assert type(res.children[0].ns) is type(ns) and 'mine' not in ns

def test_children_elsewhere(ns):
    lm = tree([block('FINAL(rlm_query("Count abc"))')], Count=[block('import os\nFINAL(os.getpid())')])
    res = rlm_run('Go', 'text', ns, model=lm, child_ns=dict)
    assert type(res.children[0].ns) is dict and res.answer == str(os.getpid())

def test_depth(ns):
    lm = tree([block('FINAL(rlm_query("Count abc"))')], Count=[block('FINAL(rlm_query("leaf"))')])
    assert rlm_run('Go', 'text', ns, model=lm).answer == 'LEAF'
    assert rlm_run('Go', 'text', ns, model=lm, limits=dict(max_depth=1)).answer == 'COUNT ABC'

def test_child_limits(ns):
    lm = tree([block('FINAL(rlm_query_batched(["Count a", "Count b", "Count c"]))')], Count=[block('FINAL(len(context))')])
    res = rlm_run('Go', 'text', ns, model=lm, limits=dict(max_children_per_batch=2))
    assert len(res.value) == 3 and res.value[2].startswith('Error: max_children_per_batch exceeded')

def test_many_children(ns):
    lm = tree([block('FINAL(rlm_query_batched([f"Count {i}" for i in range(20)]))')], Count=[block('FINAL(context)')])
    res = rlm_run('Go', 'text', ns, model=lm, limits=dict(max_concurrency=4))
    assert res.value == [f'Count {i}' for i in range(20)]

def test_nano_children(ns):
    lm = tree([block('Final = rlm_query("Sum it", unit="metres")', lang='python')], Sum=[block('echo hi', lang='bash'), block('Final = prompt.split()', lang='python')])
    res = rlm_run('Go', 'text', ns, model=lm, protocol=NANO, max_iters=30)
    assert 'metres' in res.answer and 'at most 15 turns' in res.children[0].messages[0]['content']

# Tools and types

def test_tools(ns):
    async def born(name): "Births by name."; return {'Ann': 1801}[name]
    def rows(n:int=2): return [{'i': i} for i in range(n)]
    res = run(ns, [block('print(born("Ann"), rows(n=3), rates["eur"])\nborn("Bob")'), block('FINAL(rows())')], tools=dict(born=born, rows=rows, rates=dict(eur=2)))
    b = blocks(res)[0]
    assert b.stdout == "1801 [{'i': 0}, {'i': 1}, {'i': 2}] 2\n" and b.error.startswith('KeyError') and res.value == [{'i': 0}, {'i': 1}]
    assert '`born(name)`: Births by name.' in res.messages[0]['content']

def test_typed(ns):
    res = run(ns, [block('1'), 'FINAL({"name": "Ann"})', block('FINAL(dict(name="Ann", born=1801))')], returns=Person)
    assert res.value == Person(name='Ann', born=1801) and 'born: Field required' in res.iterations[1].notes[0]

# Limits and ends

def test_block_timeout_keeps_the_state(ns):
    def go(seconds):
        ns['x'] = 0
        return run(ns, [block('x += 1\nwhile True: pass'), block('x += 1\nimport time; time.sleep(600)'), block('FINAL(x)')], limits=dict(block_timeout=seconds))
    res, _ = given_time(go, lambda res: res.answer == '2', .3)
    assert res.answer == '2' and all('BlockTimeout' in o.error for o in blocks(res)[:2])

def test_run_timeout(ns):
    def go(seconds): return run(ns, [block('answer["content"] = "draft"'), block('import time; time.sleep(600)')], limits=dict(timeout=seconds), protocol=ANSWER)
    res, _ = given_time(go, lambda res: len(res.iterations) > 1, 2)
    assert (res.stop, res.answer, res.limit.limit) == ('timeout', 'draft', 'timeout')

def test_max_calls_and_errors(ns):
    res = run(ns, [block('found = 1; print(llm_query("a"))')] * 9, limits=dict(max_calls=4))
    assert (res.stop, res.limit.spent, ns['found']) == ('budget', 4, 1)
    res = run(ns, [block('1/0')] * 9, limits=dict(max_errors=2), context='more')
    assert res.stop == 'errors' and len(res.iterations) == 2

def test_a_failing_model_loses_nothing(ns):
    with pytest.raises(LMError) as e: rlm_run('Go', 'text', ns, model=ScriptLM([block('found = 1')]))
    assert ns['found'] == 1 and len(e.value.result.iterations) == 1
    assert run(ns, [block('FINAL(found)')], context='more').answer == '1'

def test_cancelled(ns):
    async def main():
        at_work = asyncio.Event()
        loop = asyncio.get_running_loop()
        watch = lambda e: loop.call_soon_threadsafe(at_work.set) if (e.kind, e.phase) == ('block', 'start') else None
        task = asyncio.create_task(arlm_run('Go', 'text', ns, model=ScriptLM([block('found = 1\nwhile True: pass')]), on_event=watch))
        await asyncio.wait_for(at_work.wait(), HANG)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as e: await task
        return e.value.result
    res = asyncio.run(main())
    assert res.stop == 'interrupted'
    assert run(ns, [block('FINAL("again")')], context='more').answer == 'again'

def test_events(ns):
    seen = []
    lm = tree([block('FINAL(rlm_query("Count abc"))')], Count=[block('FINAL(llm_query("leaf"))')])
    rlm_run('Go', 'text', ns, model=lm, on_event=lambda e: seen.append((e.kind, e.phase, e.depth)))
    assert seen == [('run', 'start', 0), ('turn', 'start', 0), ('turn', 'reply', 0), ('block', 'start', 0), ('subcall', 'start', 0), ('child', 'start', 1), ('turn', 'start', 1),
        ('turn', 'reply', 1), ('block', 'start', 1), ('subcall', 'start', 1), ('subcall', 'end', 1), ('block', 'end', 1), ('turn', 'end', 1), ('child', 'end', 1),
        ('subcall', 'end', 0), ('block', 'end', 0), ('turn', 'end', 0), ('run', 'end', 0)]

def test_compaction_stays_in_history(ns):
    lm = tree([block('print("x" * 4000)'), 'What I know: x.', block('print(len(history), history[0]["question"])\n_ = FINAL(len(history[0]["turns"]))')])
    lm.window = 5200
    res = rlm_run('Go', 'text', ns, model=lm, compaction=.5)
    assert res.iterations[-1].code_blocks[0].result.stdout == '1 Go\n' and int(res.answer) >= 4

def test_functions_for_people(ns):
    up = ScriptLM(lambda msgs: msgs[-1]['content'].upper())
    assert llm_query('hi', ns, model=up) == 'HI' == ns['llm_res'] and llm_query_batched(['a', 'b'], ns, 'pair', model=up) == ['A', 'B'] == ns['pair']

def test_offline_end_to_end(ns):
    text = 'The mill stood empty for years. In 1907 Ida Holm bought the mill. She sold it again within a year.'
    assert '1907' in rlm_run('When did Ida Holm buy the mill?', text, ns, model='offline').answer
