"""Typed answers, tools, compaction, system prompts, callbacks, and the three protocols."""
import asyncio, dataclasses, enum, json, threading, warnings
from typing import Any, Literal, Optional, Union
import pytest
from pydantic import BaseModel, Field, field_validator
from rlm import ANSWER, NANO, PAPER, ScriptLM, arlm_run, rlm_run
from rlm.testing import MessagesServer
from wire import ask, block, conversation, last, numbers, tree

LOOK = block('print(context)')

def run(*replies, context='text', **kw):
    "A run with a script: replies, or one function of the messages."
    return rlm_run('Q', context, kw.pop('ns', {}), model=ScriptLM(replies[0] if callable(replies[0]) else list(replies)), **kw)

def told(res, i=-1):
    "What the model was told before reply `i`."
    return res.iterations[i].prompt[-1]['content']

# Typed answers

@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.

class Person(BaseModel):
    name: str
    age: int = Field(ge=0)
    tags: list[str] = []

class Team(BaseModel):
    lead: Person
    others: dict[str, Person] = {}

class Color(enum.Enum):
    RED, BLUE = 'red', 'blue'

ANN = dict(name='Ann', age=3, tags=['a'])
TEAM = Team(lead=Person(**ANN), others={'bob': Person(name='Bob', age=4)})

@pytest.mark.parametrize('type_, form, value', [
    (int, 'FINAL(42)', 42), (int, 'FINAL( -7 )', -7), (float, 'FINAL(0.5)', .5), (bool, 'FINAL(true)', True), (str, 'FINAL(42)', '42'), (str, 'FINAL(a "b" (c))', 'a "b" (c)'),
    (list[int], 'FINAL([1, 2,\n3])', [1, 2, 3]), (list, 'FINAL([])', []), (dict, 'FINAL({"a": [1]})', {'a': [1]}), (dict[str, int], 'FINAL({"a": 1})', {'a': 1}),
    (tuple[int, str], 'FINAL([1, "a"])', (1, 'a')), (set[int], 'FINAL([1, 1])', {1}), (Point, 'FINAL({"x": 1})', Point(1)), (Person, f'FINAL({json.dumps(ANN)})', Person(**ANN)),
    (Team, f'FINAL({TEAM.model_dump_json(indent=1)})', TEAM), (list[Person], f'FINAL({json.dumps([ANN])})', [Person(**ANN)]), (Literal['yes', 'no'], 'FINAL(yes)', 'yes'),
    (Literal[1, 2], 'FINAL(2)', 2), (Color, 'FINAL(blue)', Color.BLUE), (Optional[int], 'FINAL(null)', None), (Optional[int], 'FINAL(5)', 5), (Optional[str], 'FINAL(word)', 'word'),
    (Union[int, str], 'FINAL(12)', 12), (Union[int, str], 'FINAL(a dozen)', 'a dozen'), (Any, 'FINAL([1])', [1])], ids=str)
def test_written_answers(type_, form, value):
    "JSON, or plain words where the type takes them."
    res = run(LOOK, form, returns=type_)
    assert res.value == value and type(res.value) is type(value) and res.stop == 'answer' and isinstance(res.answer, str)

@pytest.mark.parametrize('type_, code, value', [
    (int, 'x = 6 * 7', 42), (str, 'x = "word"', 'word'), (list[int], 'x = [1, 2]', [1, 2]), (dict, 'x = {"a": None}', {'a': None}), (Person, f'x = {ANN}', Person(**ANN)),
    (Person, f'import json\nx = json.dumps({ANN})', Person(**ANN)), (Point, 'x = {"x": 1, "y": 2}', Point(1, 2.)), (Point, 'x = "{\\"x\\": 1}"', Point(1)), (Literal['a', 'b'], 'x = "b"', 'b'),
    (Optional[int], 'x = None', None), (list[Person], f'x = [{ANN}] * 2', [Person(**ANN)] * 2), (set[str], 'x = {"a"}', {'a'}), (tuple[int, ...], 'x = (1, 2)', (1, 2)), (float, 'x = 3', 3.)], ids=str)
@pytest.mark.parametrize('how', ['text', 'call', 'final', 'ready'])
def test_variables_as_answers(type_, code, value, how):
    "By FINAL_VAR in the text, by a call of it or of FINAL in a block, by the dict `answer`."
    more = dict(text='', call='\nFINAL_VAR("x")', final='\nFINAL(x)', ready='\nanswer["content"] = x; answer["ready"] = True')[how]
    res = run(LOOK, block(code + more, then='FINAL_VAR(x)' if how == 'text' else ''), returns=type_)
    assert res.value == value and type(res.value) is type(value) and res.stop == 'answer' and len(res.iterations) == 2

def test_an_object_of_the_class_itself():
    res = run(LOOK, block('x = Point(3)', then='FINAL_VAR(x)'), returns=Point, tools=dict(Point=Point))
    assert res.value == Point(3) and isinstance(res.value, Point)

@pytest.mark.parametrize('type_, wrong, right, words', [
    (int, 'FINAL(many)', 'FINAL(3)', 'integer'), (list[int], 'FINAL([1, "b"])', 'FINAL([1])', '1: '), (Person, 'FINAL({"name": "Ann"})', f'FINAL({json.dumps(ANN)})', 'age'),
    (Person, 'FINAL({"name": "Ann", "age": -1})', f'FINAL({json.dumps(ANN)})', 'greater than or equal to 0'), (Team, 'FINAL({"lead": {"name": 1, "age": 2}})', f'FINAL({TEAM.model_dump_json()})', 'lead.name'),
    (Literal['yes', 'no'], 'FINAL(maybe)', 'FINAL(no)', "'yes' or 'no'"), (Color, 'FINAL(green)', 'FINAL(red)', "'red' or 'blue'"), (dict, 'FINAL([1])', 'FINAL({})', 'object'), (Point, 'FINAL({"y": 1})', 'FINAL({"x": 1})', 'x')], ids=str)
def test_what_is_wrong_goes_back(type_, wrong, right, words):
    "In words that name the place and the rule; the next answer counts."
    res = run(LOOK, wrong, right, returns=type_)
    assert res.stop == 'answer' and len(res.iterations) == 3 and res.value is not None
    assert words in told(res) and 'does not fit' in told(res)

def test_wrong_to_the_end():
    res = run(LOOK, 'FINAL(a)', 'FINAL(b)', 'FINAL(c)', returns=int, max_iters=3)
    assert (res.answer, res.value, res.stop) == (None, None, 'max_iters') and any('does not fit' in n for n in res.iterations[-1].notes)

def test_right_in_the_last_call():
    assert run(LOOK, 'FINAL(7)', returns=int, max_iters=1).value == 7

def test_the_schema_is_in_the_prompt():
    seen = []
    def model(msgs): seen.append(msgs[0]['content']); return LOOK if len(seen) == 1 else f'FINAL({json.dumps(ANN)})'
    run(model, returns=Person)
    assert '"age"' in seen[0] and '"minimum": 0' in seen[0] and seen[0] == seen[1]

@pytest.mark.parametrize('type_', [object(), 'no such type', 3, [int, str], threading.Thread], ids=lambda o: type(o).__name__)
def test_what_is_no_type(type_):
    "An error at the start that says so: nothing is asked, and the namespace is as it was."
    ns, asked = {'mine': 1}, []
    def model(msgs): asked.append(1); return 'FINAL(1)'
    with pytest.raises((ValueError, TypeError), match='returns'): run(model, ns=ns, returns=type_)
    assert not asked and ns == {'mine': 1}

def test_a_validator_that_raises_something_else():
    "The answer is wrong, the run is not over."
    class Named(BaseModel):
        name: str
        @field_validator('name', mode='before')
        def strip(cls, v): return v.strip()
    res = run(LOOK, 'FINAL({"name": 5})', 'FINAL({"name": " Ann "})', returns=Named)
    assert res.value == Named(name='Ann') and len(res.iterations) == 3

def test_children_are_not_typed():
    "The type is that of the root's answer; a child answers in text."
    def model(msgs): return 'FINAL(not a number)' if 'piece' in msgs[1]['content'] else block('r = rlm_query("a piece")\nx = len(r)', then='FINAL_VAR(x)')
    res = run(model, returns=int)
    assert res.value == 12 and res.children[0].answer == 'not a number'

@pytest.mark.parametrize('form', [block('x = ""', then='FINAL_VAR(x)'), block('FINAL("")'), block('answer["content"] = ""; answer["ready"] = True')], ids=['text', 'call', 'ready'])
def test_an_empty_str_is_an_answer(form):
    res = run(LOOK, form, returns=str)
    assert (res.answer, res.value, res.stop, len(res.iterations)) == ('', '', 'answer', 2)

def test_typed_under_nano():
    look = block('print(prompt)', 'python')
    res = run(look, block('Final = {"name": "Ann"}', 'python'), block(f'Final = {ANN}', 'python'), returns=Person, protocol=NANO)
    assert res.value == Person(**ANN) and 'age' in told(res)

# Tools

def lookup(word:str, n:int=2)->list:
    "Find `word` in the index; braces {do} no harm."
    return [word] * n

async def fetch(url:str)->str:
    "Get a page."
    await asyncio.sleep(0)
    return f'page of {url}'

def system_prompt(tools, **kw):
    seen = []
    def model(msgs): seen.append(msgs[0]['content']); return block('x = 1', then='FINAL_VAR(x)')
    run(model, tools=tools, **kw)
    return seen[0]

def test_tools_stand_in_the_prompt():
    sp = system_prompt(dict(lookup=lookup, fetch=fetch, index={'a': 1}))
    for o in ('lookup(word: str, n: int = 2) -> list', 'Find `word` in the index; braces {do} no harm.', 'fetch(url: str) -> str', 'Get a page.', '`index`'): assert o in sp

@pytest.mark.parametrize('protocol', [PAPER, ANSWER, NANO], ids=lambda o: o.name)
def test_tools_are_called(protocol):
    code = 'x = lookup("a", n=3) + [fetch("u")] + [index["a"]]'
    res = run(block(code, protocol.langs[0]), block('Final = x', 'python') if protocol is NANO else 'FINAL_VAR(x)', tools=dict(lookup=lookup, fetch=fetch, index={'a': 1}), protocol=protocol)
    assert res.value == ['a', 'a', 'a', 'page of u', 1]

def test_a_tool_that_is_overwritten_comes_back():
    res = run(block('lookup = 5\nprint(lookup)'), block('lookup = 6'), block('del lookup'), block('x = lookup("a")', then='FINAL_VAR(x)'), tools=dict(lookup=lookup))
    assert res.value == ['a', 'a']
    assert [('lookup' in told(res, i) and 'put back' in told(res, i)) for i in (1, 2)] == [True, False]

def test_what_the_caller_had_comes_back_after_the_run():
    ns = {'lookup': 'mine', 'other': 'kept'}
    res = run(block('x = lookup("a")', then='FINAL_VAR(x)'), ns=ns, tools=dict(lookup=lookup))
    assert res.value == ['a', 'a'] and (ns['lookup'], ns['other']) == ('mine', 'kept')

def test_a_tool_that_raises():
    def boom(x): "Fail."; raise LookupError(f'no {x} here')
    async def aboom(x): "Fail too."; raise LookupError(f'no {x} there')
    res = run(block('before = 1\nboom("a")'), block('try: aboom("b")\nexcept LookupError as e: x = str(e)', then='FINAL_VAR(x)'), tools=dict(boom=boom, aboom=aboom))
    assert 'LookupError: no a here' in told(res) and res.ns['before'] == 1 and res.answer == "no b there"

@pytest.mark.parametrize('kind', [SystemExit, KeyboardInterrupt])
def test_a_tool_that_raises_an_exit(kind):
    def leave(): raise kind('out')
    res = run(block('leave()'), 'FINAL(still here)', tools=dict(leave=leave))
    assert res.answer == 'still here' and kind.__name__ in told(res)

@pytest.mark.parametrize('name', ['llm_query', 'rlm_query_batched', 'FINAL', 'FINAL_VAR', 'SHOW_VARS', 'answer', 'history', 'context', '__builtins__', '__rlm__', 'not a name', '', 'class'])
@pytest.mark.parametrize('where', ['tools', 'sub_tools'])
def test_names_that_a_tool_cannot_have(name, where):
    ns = {}
    with pytest.raises(ValueError, match='tool'): run('FINAL(x)', ns=ns, **{where: {name: lookup}})
    assert ns == {}

@pytest.mark.parametrize('name', ['prompt', 'Final'])
def test_names_that_a_tool_cannot_have_under_nano(name):
    with pytest.raises(ValueError, match='tool'): run('x', protocol=NANO, tools={name: lookup})

@pytest.mark.parametrize('sub_tools, has', [(None, ['lookup']), ({}, []), (dict(fetch=fetch), ['fetch'])], ids=['inherited', 'none', 'others'])
def test_tools_of_children(sub_tools, has):
    "And of their children."
    systems = {}
    def model(msgs):
        level = msgs[1]['content'].count('deeper'); systems[level] = msgs[0]['content']
        names = block('have = [o for o in ("lookup", "fetch") if o in globals()]\nr = rlm_query(context + " deeper")' if level < 2 else 'have = [o for o in ("lookup", "fetch") if o in globals()]', then='FINAL_VAR(have)')
        return names
    res = run(model, context='start', tools=dict(lookup=lookup), sub_tools=sub_tools, limits=dict(max_depth=3))
    assert [o.value for o in tree(res)] == [['lookup'], has, has]
    for i in (1, 2): assert [o for o in ('lookup', 'fetch') if f'`{o}(' in systems[i]] == has

def test_tools_from_threads_and_from_children_at_once():
    calls, lock = [], threading.Lock()
    def note(x):
        "Keep x."
        with lock: calls.append(x)
    def model(msgs):
        if 'piece' in msgs[1]['content']: return block('note(context)\ndone = "ok"', then='FINAL_VAR(done)')
        return block('from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as ex: list(ex.map(note, range(20)))\nr = rlm_query_batched([f"piece {i}" for i in range(20)])', then='FINAL_VAR(r)')
    res = run(model, tools=dict(note=note))
    assert res.value == ['ok'] * 20 and len(calls) == 40 and sorted(o for o in calls if isinstance(o, int)) == list(range(20))

def test_async_tools_under_arlm_run():
    "The caller's loop is free meanwhile, and the tool may wait as long as it likes."
    script = ScriptLM([block('x = [fetch(str(i)) for i in range(3)]', then='FINAL_VAR(x)')])
    assert asyncio.run(arlm_run('Q', 'text', {}, script, tools=dict(fetch=fetch))).value == [f'page of {i}' for i in range(3)]

def test_an_async_callable_object():
    class Fetch:
        "Get a page."
        async def __call__(self, url): return f'page of {url}'
    assert run(block('x = fetch("u")', then='FINAL_VAR(x)'), tools=dict(fetch=Fetch())).answer == 'page of u'

@pytest.mark.parametrize('tool', [print, int, dict, type('T', (), {}), len, lambda *a, **k: 1, None, float('nan'), [1] * 10**6, b'x'], ids=lambda o: str(type(o)))
def test_any_object_is_a_tool(tool): assert '`thing' in system_prompt(dict(thing=tool))

# Compaction

def test_compaction_of_a_long_run():
    "30 turns that each read a part of the numbers: the sum is right, fewer tokens are sent, and all that was said is in `history`."
    parts, context = 30, [list(range(i * 10, i * 10 + 10)) for i in range(30)]
    def reply(body):
        if 'shortened' in last(body): return f'So far the parts are added up in `total`; `i` is the number of those that are done. Notes {len(body["messages"])}.'
        return block('i = globals().get("i", 0); total = globals().get("total", 0) + sum(context[i]); i += 1\nprint("part", i, "x" * 3000)', then=f'FINAL_VAR(total)' if last(body).count(f'Turn {parts} ') else '')
    def go(compaction):
        ns = {}
        with MessagesServer(reply) as srv: return ask(srv, context, ns, max_iters=parts, cache=False, compaction=compaction), srv, ns
    (plain, a, _), (res, b, ns) = go(None), go(.05)
    assert res.value == plain.value == sum(range(300)) and res.stop == 'answer'
    notes = [it for it in res.iterations if any('replaced' in n for n in it.notes)]
    assert len(notes) >= 2 and len(res.iterations) == parts + len(notes)
    assert numbers(res.usage) == numbers(b.usage) and numbers(res.usage)[1] < numbers(plain.usage)[1] / 2
    assert max(len(json.dumps(r['body'])) // 4 for r in b.requests) < .05 * 200_000 + 3000
    turns = [m for h in ns['history'] for m in h.get('turns', [])]
    said = ' '.join(m['content'] for m in turns + res.messages)
    assert all(f'part {i} x' in said for i in range(1, parts))
    for r in b.requests: assert [m['role'] for m in r['body']['messages']][::2] == ['user'] * ((len(r['body']['messages']) + 1) // 2)
    after = next(r['body'] for r, q in zip(b.requests[1:], b.requests) if 'shortened' in last(q['body']))
    said = conversation(after)
    assert len(said) == 4 and 'What is in it?' in said[1][1] and 'total' in said[2][1] and 'part' in said[3][1]

def test_compaction_looks_at_what_is_about_to_be_sent():
    "A short call, and then an output that would fill the window."
    lm = ScriptLM([block('print("x" * 19_000)'), 'It printed many x.', 'FINAL(x)'])
    lm.window = 8000
    res = rlm_run('What?', 'text', model=lm, compaction=.8)
    assert res.answer == 'x' and res.iterations[0].usage.total.total_tokens < 4000 and 'were replaced by these notes' in res.iterations[1].notes[-1]

def test_compaction_keeps_the_earlier_questions():
    ns = {}
    def model(msgs):
        if 'shortened' in msgs[-1]['content']: return 'notes'
        return 'FINAL(done)' if 'My notes' in str(msgs[2:]) else block('print("y" * 9000)')
    lm = ScriptLM(model); lm.window = 4000
    for q in ('First?', 'Second?'): res = rlm_run(q, 'text' if q == 'First?' else None, ns, model=lm, compaction=.5)
    assert res.answer == 'done' and [(h['question'], 'turns' in h) for h in ns['history']] == [('First?', True), ('First?', False), ('Second?', True), ('Second?', False)]

def test_no_compaction_by_default():
    def model(msgs): assert 'shortened' not in msgs[-1]['content']; return block('print("y" * 9000)') if len(msgs) < 12 else 'FINAL(done)'
    lm = ScriptLM(model); lm.window = 100
    assert rlm_run('Q', 'text', model=lm).answer == 'done'

@pytest.mark.parametrize('share', [0, -1, 1.5, 80])
def test_compaction_given_wrongly(share):
    with pytest.raises(ValueError, match='compaction'): run('FINAL(x)', compaction=share)

# System prompts

@pytest.mark.parametrize('text', ['Use {braces} and {0} and %s and {{these}}. \\d+', 'Before <<environment>> and {after}.', 'Only words.'])
def test_a_system_prompt_of_ones_own(text):
    sp = system_prompt(dict(lookup=lookup), system_prompt=text, limits=dict(max_depth=1))
    for o in text.split('<<environment>>'): assert o in sp
    assert sp.count('<<environment>>') == 0 and sp.count('llm_query_batched(prompts') == 1 and 'lookup(word' in sp and 'rlm_query(' not in sp and 'FINAL_VAR(name)' in sp

def test_a_system_prompt_is_inherited():
    seen = []
    def model(msgs): seen.append(msgs[0]['content']); return 'FINAL(x)' if 'piece' in msgs[1]['content'] else block('r = rlm_query("piece")', then='FINAL_VAR(r)')
    run(model, system_prompt='My own {words}.')
    assert len(seen) == 2 and all(o.startswith('My own {words}.') for o in seen)

# Callbacks

def test_events_in_order():
    seen = []
    def model(msgs):
        if len(msgs) == 1: return 'reply'
        if 'piece' in msgs[1]['content']: return 'FINAL(small)'
        return block('a = llm_query("one")\nb = rlm_query("piece")') if len(msgs) == 2 else 'FINAL(end)'
    run(model, on_event=seen.append)
    turn = lambda depth, *inner: [('turn', 'start', depth), ('turn', 'reply', depth), *inner, ('turn', 'end', depth)]
    sub = [('subcall', 'start', 0), ('subcall', 'end', 0)]
    child = [('subcall', 'start', 0), ('child', 'start', 1), *turn(1), ('child', 'end', 1), ('subcall', 'end', 0)]
    assert [(e.kind, e.phase, e.depth) for e in seen] == [('run', 'start', 0), *turn(0, ('block', 'start', 0), *sub, *child, ('block', 'end', 0)), *turn(0), ('run', 'end', 0)]
    assert seen[-1].data['result'].answer == 'end' and [e.data['number'] for e in seen if e.kind == 'turn' and e.depth == 0] == [1, 1, 1, 2, 2, 2]
    calls = [e.data['call'] for e in seen if (e.kind, e.phase) == ('subcall', 'end')]
    assert [(c.prompt, c.response) for c in calls] == [('one', 'reply'), ('piece', 'small')]

def test_events_of_a_run_that_fails():
    "The end is told too."
    seen = []
    with pytest.raises(Exception): run(LOOK, on_event=seen.append)
    assert [(e.kind, e.phase) for e in seen][::len(seen) - 1] == [('run', 'start'), ('run', 'end')] and seen[-1].data['result'].stop == 'errors'

def test_subcall_callbacks():
    starts, ends = [], []
    def model(msgs):
        if msgs[-1]['content'] == 'bad': raise ValueError('no')
        if len(msgs) == 1: return 'fine'
        if 'piece' in msgs[1]['content']: return block('r = llm_query("below")', then='FINAL_VAR(r)')
        return block(f'a = llm_query_batched(["{"p" * 200}", "bad"], model="other")\nb = rlm_query("piece")', then='FINAL_VAR(b)')
    two = lambda messages, model: model_of(messages, model)
    def model_of(messages, name): return model(messages)
    res = rlm_run('Q', 'text', model=two, on_subcall_start=lambda *a: starts.append(a), on_subcall_complete=lambda *a: ends.append(a), limits=dict(max_concurrency=1))
    assert res.answer == 'fine'
    assert [(d, p) for d, _, p in starts] == [(1, 'p' * 80), (1, 'bad'), (1, 'piece'), (2, 'below')] and [m for _, m, _ in starts[:2]] == ['other'] * 2
    assert sorted(d for d, *_ in ends) == [1, 1, 1, 2] and all(isinstance(s, float) and s >= 0 for _, _, s, _ in ends)
    errors = [e for *_, e in ends if e]
    assert len(errors) == 1 and 'no' in errors[0]

@pytest.mark.parametrize('name', ['on_event', 'on_subcall_start', 'on_subcall_complete'])
@pytest.mark.parametrize('how', ['raises', 'wrong number of arguments'])
def test_a_callback_that_fails_is_a_warning(name, how):
    def boom(*args): raise RuntimeError('the watcher failed')
    def model(msgs): return 'fine' if len(msgs) == 1 else 'FINAL(x)' if 'piece' in msgs[1]['content'] else block('r = llm_query_batched(["a", "b"]) + [rlm_query("piece")]\nprint(r)', then='FINAL_VAR(r)')
    with pytest.warns(UserWarning, match=name): res = run(model, **{name: boom if how == 'raises' else lambda: None})
    assert res.value == ['fine', 'fine', 'x'] and res.stop == 'answer' and res.iterations[0].code_blocks[0].result.stderr == ''

def test_a_callback_prints_where_the_caller_does(capsys):
    "Not into the block that is running."
    res = run(lambda m: 'fine' if len(m) == 1 else block('print("mine")\nr = llm_query("a")', then='FINAL_VAR(r)'), on_subcall_start=lambda *a: print('the watcher'))
    assert res.iterations[0].code_blocks[0].result.stdout == 'mine\n' and 'the watcher' in capsys.readouterr().out

# The three protocols: three questions, in each protocol's own form, over the wire

NUMBERS = list(range(1, 41))
LOG = '\n'.join(f'{i:03} {"ERROR disk full" if i % 7 == 0 else "ok"}' for i in range(100))

def steps(question, name):
    "The code that a model would write; the last piece leaves the answer in `res`."
    if 'sum' in question: return [f'print(len({name}), {name}[:3])', f'res = sum({name})']
    if 'errors' in question: return [f'print({name}[:40])', f'found = [o for o in {name}.splitlines() if "ERROR" in o]\nprint(len(found))', 'res = len(found)']
    return [f'print(len({name}))', f'said = llm_query_batched([f"Which town? {{o}}" for o in {name}])\nprint(said)', 'res = {"towns": said}']

def scripted(protocol):
    "A model that speaks one protocol."
    def reply(body):
        if len(body['messages']) == 1 and not body.get('system'): return last(body).split()[-1].upper()
        codes, i = steps(conversation(body)[1][1], protocol.context_name), len(body['messages']) // 2
        end = i == len(codes) - 1
        if protocol is NANO: return block(codes[i] + ('\nFinal = res' if end else ''), 'python')
        if protocol is ANSWER: return block(codes[i] + ('\nanswer["content"] = res\nanswer["ready"] = True' if end else ''))
        return block(codes[i], then='FINAL_VAR(res)' if end else '')
    return reply

@pytest.mark.parametrize('protocol', [PAPER, ANSWER, NANO], ids=lambda o: o.name)
@pytest.mark.parametrize('question, context, value', [('What is the sum?', NUMBERS, 820), ('How many errors?', LOG, 15), ('Which towns?', ['to Riga', 'to Oslo'], {'towns': ['RIGA', 'OSLO']})], ids=['sum', 'errors', 'towns'])
def test_three_questions_under_three_protocols(question, context, value, protocol):
    with MessagesServer(scripted(protocol)) as srv: res = ask(srv, context, query=question, protocol=protocol)
    assert (res.value, res.stop, len(res.iterations)) == (value, 'answer', len(steps(question, 'x'))) and numbers(res.usage) == numbers(srv.usage)
    assert json.loads(res.answer) == value if protocol is NANO else res.answer == str(value)

@pytest.mark.parametrize('protocol', [PAPER, ANSWER], ids=lambda o: o.name)
@pytest.mark.parametrize('end', ['FINAL(7)', block('x = 7', then='FINAL_VAR(x)'), block('FINAL(7)'), block('x = 7\nFINAL_VAR("x")'), block('answer["content"] = 7; answer["ready"] = True'), block('answer.update(content=7, ready=True)')])
def test_paper_and_answer_take_both_forms(protocol, end): assert run(LOOK, end, protocol=protocol).answer == '7'

def test_nano_takes_only_its_own():
    "And a value that JSON cannot hold goes back."
    py = lambda code: block(code, 'python')
    res = run(py('x = 1'), 'FINAL(7)', py('Final = {1, 2}'), block('echo hello', 'bash'), py('Final = [1, 2]'), protocol=NANO, ns={'Final': 'old'})
    assert res.value == [1, 2] and len(res.iterations) == 5 and 'JSON' in told(res, 3) and '"prefix": "hello' in told(res, 4)

def test_children_speak_their_parents_protocol():
    def reply(body):
        if 'piece' in conversation(body)[1][1]: return block('Final = prompt.upper()', 'python')
        return block('r = rlm_query("a piece")\nFinal = r', 'python')
    with MessagesServer(reply) as srv: res = ask(srv, protocol=NANO)
    assert res.value == 'A PIECE' and len(res.children) == 1
