"""The text protocol: what the parsers and records make of anything at all. They never raise, take linear time, and give back what went in."""
import ast, functools, json, math, textwrap, time
import pytest
from hypothesis import assume, example, given, strategies as st
from rlm.answers import answer_source
from rlm.parsing import FALLBACK
from rlm._rlmpaper_compat import (ANSWER, NANO, PAPER, CodeBlock, FinalAnswer, ModelUsageSummary, QueryMetadata, REPLResult, RLMChatCompletion, RLMIteration,
    RLMMetadata, UsageSummary, add_message, bound_names, build_rlm_system_prompt, build_user_prompt, compact, cut_off, describe_context, find_code_blocks,
    find_fences, find_final_answer, format_execution_result, format_iteration, format_metadata, head_tail, jsonable, parse_final, preview, runnable)

PROTOCOLS = pytest.mark.parametrize('protocol', [PAPER, ANSWER, NANO], ids=lambda p: p.name)

def examples(*args): return lambda f: functools.reduce(lambda g, a: example(*a if isinstance(a, tuple) else [a])(g), args, f)

# Text that looks like a model's reply, and is not quite one

bits = st.sampled_from(['```', '````', '~~~', '`', '~', '```repl', '```python', '```PY', '```json', '~~~repl', '\n', '\n', '\n', '\r\n', '\r', ' ', '    ', '\t',
    'FINAL(', 'FINAL_VAR(', 'FINAL', ')', '(', '"', "'", '"""', "'''", '\\', 'x', 'x = 1', 'def f():', '"a) b"', '{', '}', '#', '\0', '\ud800', '\u2028', '\x0c', 'é'])
messy = st.lists(bits | st.text(max_size=5), max_size=40).map(''.join)

@given(messy)
@examples('```\n', 'FINAL(', 'FINAL()', 'FINAL_VAR(")', '', '\n', '```repl\n"""\n```\n"""\n```')
def test_parsers_never_raise(text):
    fs = find_fences(text)
    assert [f.start for f in fs] == sorted({f.start for f in fs}) and all(a.end <= b.start for a, b in zip(fs, fs[1:]))
    for f in fs:
        assert 0 <= f.start < f.end <= len(text)
        assert text[f.start:].lstrip(' \t')[:3] in ('```', '~~~')
        assert f.closed or f is fs[-1]
        assert f.lang == f.lang.lower() and not f.lang.strip('`~') != f.lang
    assert cut_off(text) == (len(fs) > 0 and not fs[-1].closed)
    assert find_code_blocks(text) == [f.code for f in runnable(text)]
    assert all(f.closed and f.lang in ('repl', *FALLBACK) for f in runnable(text))
    kind, body = parse_final(text) or ('', 'x')
    assert (body or kind == 'FINAL_VAR') and body == body.strip()
    if kind != 'FINAL': assert find_final_answer(text) is None
    else: assert find_final_answer(text, {}) == find_final_answer(text) or answer_source(body)[0] == 'code'
    assert isinstance(bound_names(text), set)

@given(st.text(alphabet='abc ()\n', max_size=30))
def test_what_stands_in_a_fence_is_no_answer(inside):
    text = f'FINAL(outside)\n\n~~~text\nFINAL(inside {inside})\nFINAL_VAR(y)\n~~~\n'
    assert parse_final(text) == ('FINAL', 'outside')

@given(messy, st.integers(1, 5))
def test_a_reply_with_an_open_block_runs_the_ones_before(code, n):
    assume('`' not in code and '~' not in code and '"""' not in code and "'''" not in code)
    text = ''.join(f'Some words.\n```repl\nx = {i}\n```\n' for i in range(n)) + f'```repl\n{code}'
    assert cut_off(text) and find_code_blocks(text) == [f'x = {i}' for i in range(n)]

# Round trip: code that is put into a fence comes out of it

names = st.sampled_from('a b context chunk_1 résumé'.split())
strings = st.lists(st.sampled_from(['text', '```', '```json', '```repl', '~~~', '    ```', '{"k": 1}', '', 'FINAL(x)', "it's", '`x`', '# no', '\\n']), min_size=1, max_size=6).map('\n'.join)
quoted = st.tuples(st.sampled_from(['', 'f', 'r', 'b']), st.sampled_from(['"""', "'''"]), strings).map(lambda o: f'{o[0].replace("f", "")}{o[1]}{o[2]}\n{o[1]}')
values = quoted | st.text(max_size=20).map(repr) | st.integers().map(str) | st.sampled_from(['"```"', "'~~~'", '[o for o in range(3)]', 'llm_query("?")', '"""```"""'])
lines = st.one_of(st.tuples(names, values).map(' = '.join), values.map('print({})'.format), st.text(alphabet='ab `~"\'#', max_size=20).map(lambda s: '# ' + s),
    st.just(''), st.tuples(names, values).map(lambda o: f'def {o[0]}():\n    x = {o[1]}\n    return x'), values.map('for o in [1]:\n\tprint({})'.format))
codes = st.lists(lines, min_size=1, max_size=8).map('\n'.join).filter(lambda s: '\r' not in s and not (s.startswith('\ufeff')))

def compiles(code):
    try: ast.parse(code)
    except (SyntaxError, ValueError): return False
    return True

openings = st.sampled_from(['```repl', '``` repl', '```REPL', '```repl title="x"', '```{repl}', '````repl', '~~~repl', '~~~~ Repl'])
prose = st.lists(st.sampled_from(['Next I look.', 'It`s `code`, or ``more``.', '- a list', '    indented', '', 'FINAL', '> ~~quoted~~', "I'd say \"so\""]), max_size=4).map('\n'.join)

@given(st.lists(st.tuples(openings, codes.filter(compiles)), min_size=1, max_size=4), prose, st.sampled_from(['\n', '\r\n']), st.booleans())
@example([('```repl', 'x = """\n```\n"""'), ('```repl', 'y = """\n```\n"""')], '', '\n', True)
@example([('```repl', 'x = """\n```\n"""\n'), ('```repl', '')], '', '\n', False)
def test_fenced_code_comes_back(blocks, words, newline, end):
    parts = [f'{words}\n{o}\n{code}\n{o[0] * (len(o) - len(o.lstrip(o[0])))}' for o, code in blocks]
    text = '\n'.join(parts) + ('\n' if end else '')
    assert find_code_blocks(text.replace('\n', newline)) == [code for _, code in blocks]
    assert not cut_off(text)

@given(codes.filter(compiles).filter(lambda s: '"""' not in s and "'''" not in s), st.sampled_from(['  ', '    ', '\t', '      ']))
def test_indented_fences_lose_their_indentation(code, blank):
    text = '1. First this:\n\n' + textwrap.indent(f'```repl\n{code}\n```', blank, lambda line: True)
    assert find_code_blocks(text) == [code]

@given(codes.filter(compiles))
def test_the_position_leads_to_the_block(code):
    text = f'Before.\n```repl\n{code}\n```\nAfter.'
    f, = runnable(text)
    assert text[f.start:f.end] == f'```repl\n{code}\n```\n'

@pytest.mark.parametrize('text, codes', [
    ('```repl\nx\n```\n```repl\ny\n```', ['x', 'y']),
    ('```repl\nx\n```\n```json\n{}\n```\n```python\nz\n```', ['x']),
    ('```python\nx\n```\n```py\ny\n```\n```Python3\nz\n```', ['x', 'y', 'z']),
    ('```text\n```repl\nx\n```', []),
    ('~~~repl\n```\nx\n```\n~~~', ['```\nx\n```']),
    ('````repl\n```\nx\n````', ['```\nx']),
    ('```repl\nx\n`````', ['x']),
    ('`````repl\nx\n```\n`````', ['x\n```']),
    ('```repl\nx\n~~~\n```', ['x\n~~~']),
    ('```repl\n```', ['']),
    ('```repl```', []), ('```repl x = 1```\n', []), ('see ```repl\nx\n```', ['x']), ('it ends with ``` so\nx\n```', []),
    ('```repl\nx\n  ```  \t\nafter', ['x']),
    ('- item\n  ```repl\n  if x:\n    y\n  ```', ['if x:\n  y']),
    ('```repl\nx = """unclosed\n```\nSo much.\n```repl\ny\n```', ['x = """unclosed', 'y']),
    ('```repl\nx = 1\n```\n```repl\ny = """', ['x = 1']),
    ('```json\n{"a": """\n```\n```repl\nx\n```', ['x']),
    ('```repl\ns = f"""\n```json\n{{}}\n```\n"""\nprint(s)\n```', ['s = f"""\n```json\n{{}}\n```\n"""\nprint(s)']),
    ('```repl\n# it\'s """ in a comment\n```\nThen.', ['# it\'s """ in a comment']),
    ("```repl\nx = 'it is \"\"\" here'\n```\nThen.\n```repl\ny\n```", ["x = 'it is \"\"\" here'", 'y']),
    ('```bash\nls\n```', []), ('```repl\n\ud800\n```', ['\ud800']), ('```repl\n\0\n```', ['\0'])])
def test_blocks(text, codes): assert find_code_blocks(text) == codes

def test_nano_runs_bash_in_order():
    fs = runnable('```python\na\n```\n~~~sh\nb\n~~~\n```BASH\nc\n```\n```json\nd\n```', NANO.langs, NANO.fallback)
    assert [(f.lang, f.code) for f in fs] == [('python', 'a'), ('sh', 'b'), ('bash', 'c')]

# Answers

plain = st.text(alphabet='ab 1\n{}[],:=.$', max_size=12)
bodies = st.recursive(plain | st.text(alphabet='ab() \n', max_size=8).map(lambda s: f' "{s}" ') | st.text(alphabet='ab() ', max_size=8).map(lambda s: f" '{s}' "),
    lambda b: st.tuples(plain, b, plain).map(lambda o: f'{o[0]}({o[1]}){o[2]}') | st.tuples(b, b).map(''.join), max_leaves=6)

@given(bodies, prose, st.sampled_from(['', ' and more', '.', ')', ') "', '\n\nThat is all (I hope).', ' FINAL(no)']), st.sampled_from(['', '  ', '\t']))
@examples(*[(o, '', '', '') for o in ('f(x) = (a+b)', '"a) b"', json.dumps({'a': [1, {'b': ')'}], 'c': '(('}, indent=2))])
def test_a_balanced_answer_comes_back_whole(body, words, after, blank):
    assume(body.strip() and not (after.startswith(')') and body.rstrip()[-1] in ':;=')) # `:))` may be a smile before the end
    assert parse_final(f'{words}\n{blank}FINAL({body}){after}') == ('FINAL', body.strip())

@given(st.lists(st.tuples(st.sampled_from(['FINAL', 'FINAL_VAR']), st.sampled_from(['a', 'b', 'c'])), min_size=1, max_size=6), prose)
def test_the_last_counts_and_a_variable_goes_first(calls, words):
    text = f'\n{words}\n'.join(f'{k}({v})' for k, v in calls)
    named = [v for k, v in calls if k == 'FINAL_VAR']
    assert parse_final(text) == (('FINAL_VAR', named[-1]) if named else ('FINAL', calls[-1][1]))

@pytest.mark.parametrize('text, answer', [
    ("FINAL(It's John's (own) book)", "It's John's (own) book"),
    ("FINAL(the boys' (own) dogs' (food))", "the boys' (own) dogs' (food)"),
    ('FINAL(a 5\'10" (tall) man)', 'a 5\'10" (tall) man'),
    ("FINAL('tis (so))", "'tis (so)"),
    ('FINAL("she said \\"(\\" and left") or so', 'she said "(" and left'),
    ("FINAL('''a) b''' (c))", "'''a) b''' (c)"),
    ('FINAL(:-) and so on)', ':-) and so on'),
    ('FINAL(a) b) c', 'a'),
    ('FINAL(1) first\nFINAL(2) second\n', '2'),
    ('So FINAL(1) it is', None), ('`FINAL(1)`', '1'), ('**FINAL(1)**', '1'), ('FINAL (1)', None), ('final(1)', None), ('FINALLY(1)', None),
    ('FINAL()', None), ('FINAL( )', None), ('FINAL(', None), ('FINAL(cut off', None), ('FINAL_VAR()', None), ('FINAL_VAR("")', None),
    ('FINAL(1)\r\nmore', '1'), ('\tFINAL(\r\n1\r\n)', '1'),
    ('FINAL(f(x) = (a+b)', 'f(x) = (a+b'),
    ('FINAL(first)\n```repl\nprint("FINAL(second)")\nFINAL(third)\n```', 'first'),
    ('```repl\nFINAL("inside")\n', None),
    ('FINAL([1, 2)\nis wrong', '[1, 2'),
    ('FINAL(a\n```\nb)\n```\nc)', None)])
def test_answers(text, answer):
    if answer is not None or '```\nb' not in text: assert find_final_answer(text, {}) == answer
    else: find_final_answer(text, {}) # Whatever it makes of a fence inside an answer

@pytest.mark.parametrize('form', ['x', '"x"', "'x'", '`x`', ' x ', '"x" ', '\nx\n', '("x")'[1:-1]])
@pytest.mark.parametrize('value', ['text', '', 0, None, [1], {'a': (2,)}, b'raw'], ids=repr)
def test_final_var_gives_the_variable(form, value):
    answer = find_final_answer(f'Done.\nFINAL_VAR({form})', dict(x=value))
    if value in ('', None): assert answer is None
    else: assert answer == str(value) and answer.value is value
    assert find_final_answer('FINAL_VAR(y)', dict(x=value)) is None

# Time: where it is not linear, these take minutes

MB = 400_000 # characters
HEAVY = dict(backticks='`' * MB, ticks='`\n' * (MB // 2), fences='```\n' * (MB // 4), openings='```x\n' * (MB // 5), blocks='```repl\n```\n' * (MB // 12), tildes='~~~\n' * (MB // 4),
    long_tildes='~' * MB + 'x', crlf='```repl\r\nx\r\n```\r\n' * (MB // 17), indented=(' ' * 1000 + '```\n') * (MB // 1004), blank=' ' * MB + '```x', strings='```repl\nx = """\n```\n' * (MB // 20),
    one_string='```repl\nx = """\n' + '```\n' * (MB // 4), finals='FINAL(\n' * (MB // 7), in_line='FINAL(' * (MB // 6), empty='FINAL()\n' * (MB // 8), full='FINAL(x)\n' * (MB // 9),
    variables='FINAL_VAR(\n' * (MB // 11), opened='FINAL(' + '(' * MB, pairs='FINAL(' + '()' * (MB // 2), quotes='FINAL(' + '"' * MB, mixed='FINAL(' + "'a\" " * (MB // 5),
    escaped='FINAL("' + '\\' * MB, closing='FINAL((' + ')  x\n' * (MB // 5), blanks='FINAL((' + ') ' * (MB // 2) + '((', tabs='FINAL(' + ')\t\t\t\t\t\t\t\tx' * (MB // 10),
    quoted_lines='FINAL("\n' * (MB // 8), mixed_finals="FINAL('(\n\"\"\" ' " * (MB // 16), long_lines=('x' * 99_999 + '\n') * 10)

@pytest.mark.parametrize('name', HEAVY)
def test_a_huge_reply_takes_seconds(name):
    text, t0 = HEAVY[name], time.perf_counter()
    runnable(text); cut_off(text); parse_final(text)
    assert time.perf_counter() - t0 < 20

def test_fences_in_a_string_do_not_parse_the_block_again_and_again(monkeypatch):
    "How much source is parsed, for a block with a long string full of fences, in characters."
    parsed, parse = [], ast.parse
    monkeypatch.setattr(ast, 'parse', lambda s, *a, **kw: parsed.append(len(s)) or parse(s, *a, **kw))
    text = '```repl\n' + 'x = 1\n' * 1000 + 'y = """\n' + '```\n' * 60 + '"""\n```\n'
    code, = find_code_blocks(text)
    assert code.endswith('"""') and sum(parsed) < 20 * len(text)

def test_many_variables_are_found_in_linear_time():
    t0 = time.perf_counter()
    assert len(bound_names('\n'.join(f'x{i} = {i}' for i in range(10_000)))) == 10_000
    assert time.perf_counter() - t0 < 30

# What the model is told of a context

class Evil:
    "Whatever one asks of it, it raises."
    def __repr__(self): raise RuntimeError('no repr')
    __str__ = __len__ = __iter__ = __bool__ = __repr__
    def __eq__(self, o): raise RuntimeError('no comparison')
    __getattr__ = __eq__
    __hash__ = object.__hash__
class EvilMeta(type):
    def __getattribute__(cls, k): raise RuntimeError('no attribute')
class OfEvilMeta(metaclass=EvilMeta): pass
class EvilDict(dict):
    def items(self): raise RuntimeError('no items')
    keys = values = __iter__ = __len__ = __getitem__ = items
class EvilList(list):
    def __iter__(self): raise RuntimeError('no items')
    __len__ = __getitem__ = __iter__
class EvilStr(str):
    def __len__(self): raise RuntimeError('no length')
    __str__ = __repr__ = __eq__ = __len__
    __hash__ = str.__hash__
class EvilBytes(bytes):
    def __len__(self): raise RuntimeError('no length')
class EvilClass:
    @property
    def __class__(self): raise RuntimeError('no class')
class Exiting:
    def __repr__(self): raise SystemExit(3)
def nameless(o=None):
    import types
    m = types.ModuleType('m'); del m.__name__
    return m
cycle = [1]; cycle.append(cycle)
ring = {}; ring['ring'] = ring
deep = 'x'
for _ in range(5000): deep = [deep]
EVIL = dict(evil=Evil(), evil_type=Evil, meta=OfEvilMeta(), meta_class=OfEvilMeta, dict=EvilDict(a=1), list=EvilList([1]), str=EvilStr('x'), bytes=EvilBytes(b'x'), cls=EvilClass(),
    nameless=nameless(), cycle=cycle, ring=ring, deep=deep, module=math, function=len, lambda_=lambda: 1, generator=(o for o in 'ab'), nan=float('nan'), inf=float('-inf'),
    surrogate='\ud800', huge=10**5000, memory=memoryview(b'ab'), complex=1j, range=range(10**18), ellipsis=..., set={1, 'a'}, frozen=frozenset('ab'), bytearray=bytearray(3),
    keys={1: 2, None: 3, (4,): 5, b'x': 6, Evil(): 7}, exit=Exiting(), closed=memoryview(b'a'), strkey={EvilStr('k'): 1})
EVIL['closed'].release()
evils = pytest.mark.parametrize('name', EVIL)
def wrapped(o): return [o, [o], (o, 'x'), {'content': o}, [{'content': o}], {'a': {'b': o}}]

@evils
def test_any_context_is_measured(name):
    for o in wrapped(EVIL[name]):
        meta = QueryMetadata(o)
        assert meta.context_total_length == sum(meta.context_lengths) >= 0
        json.dumps([meta.context_total_length, meta.context_lengths, meta.context_type])
        assert describe_context(meta) and build_rlm_system_prompt(meta)

class Name(str): "The name of something in EVIL, since hypothesis itself cannot bear these."
anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5) | st.sampled_from(list(EVIL)).map(Name),
    lambda o: st.lists(o, max_size=4) | st.dictionaries(st.text(max_size=3) | st.integers(), o, max_size=4) | st.tuples(o, o), max_leaves=10)
def filled(o):
    if isinstance(o, Name): return EVIL[o]
    return {k: filled(v) for k, v in o.items()} if isinstance(o, dict) else type(o)(map(filled, o)) if isinstance(o, (list, tuple)) else o

@given(anything)
def test_any_nest_of_contexts_is_measured(o):
    meta = QueryMetadata(filled(o))
    assert meta.context_total_length == sum(meta.context_lengths) >= 0 and describe_context(meta)

@given(st.recursive(st.text(max_size=9), lambda o: st.lists(o) | st.dictionaries(st.text(max_size=3), o), max_leaves=12))
def test_the_length_is_that_of_the_texts(o):
    def size(o): return len(o) if isinstance(o, str) else sum(map(size, o)) if isinstance(o, list) else sum(len(k) + size(v) for k, v in o.items())
    assume('content' not in json.dumps(o))
    top = sum(size(v) for v in o.values()) if isinstance(o, dict) else size(o)
    assert QueryMetadata(o).context_total_length == top

def test_shared_parts_are_not_walked_again_and_again():
    "Sixteen levels, each of which holds the next one twice."
    seen = []
    class Leaf:
        def __repr__(self): seen.append(1); return 'leaf'
    o = [Leaf()]
    for _ in range(16): o = [o, o]
    assert QueryMetadata(o).context_total_length == 4 * 2**16 and len(seen) < 100

@pytest.mark.parametrize('make', [lambda pd: pd.DataFrame(dict(a=range(10**6))), lambda pd: pd.Series(['x' * 50] * 10**5), lambda pd: pd.Index([1])], ids=['frame', 'series', 'index'])
def test_pandas(make):
    o = make(pytest.importorskip('pandas'))
    assert 0 < QueryMetadata(o).context_total_length < 10_000 and 'characters' in describe_context(QueryMetadata(o))

def test_numpy():
    np = pytest.importorskip('numpy')
    assert QueryMetadata(np.zeros(10**7)).context_total_length == len(repr(np.zeros(10**7)))

# Records

@evils
def test_anything_serializes(name):
    for o in wrapped(EVIL[name]):
        d = json.loads(json.dumps(jsonable(o), allow_nan=False))
        assert jsonable(d) == d

@given(anything)
def test_any_nest_serializes(o): json.loads(json.dumps(jsonable(filled(o)), allow_nan=False))

@given(st.recursive(st.none() | st.booleans() | st.integers(-2**60, 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(), lambda o: st.lists(o) | st.dictionaries(st.text(), o), max_leaves=20))
def test_json_stays_what_it_is(o): assert jsonable(o) == o

text, num = st.text(max_size=20), st.integers(0, 10**9)
secs = st.floats(0, 1e6)
usages = st.builds(ModelUsageSummary, num, num, num, st.none() | secs, num, num)
summaries = st.builds(UsageSummary, st.dictionaries(text, usages, max_size=3))
metas = st.none() | st.dictionaries(text, st.lists(text, max_size=2) | num, max_size=2)
calls = st.builds(RLMChatCompletion, text, text | st.lists(st.fixed_dictionaries(dict(role=text, content=text)), max_size=2), text, summaries, secs, metas, st.none() | text)
answers = st.none() | text.map(FinalAnswer) | st.lists(num, max_size=3).map(FinalAnswer)
results = st.builds(REPLResult, text, text, st.dictionaries(text, text, max_size=3), secs, st.lists(calls, max_size=2), answers, st.none() | text.filter(bool), st.lists(text, max_size=2))
blocks = st.builds(CodeBlock, text, results, st.sampled_from(['python', 'bash']))
iterations = st.builds(RLMIteration, text | st.lists(st.fixed_dictionaries(dict(role=text, content=text)), max_size=2), text, st.lists(blocks, max_size=2), answers, st.none() | secs,
    st.none() | summaries, st.lists(text, max_size=2))
runs = st.builds(RLMMetadata, text, num, num, text, metas.map(lambda o: o or {}), text, metas.map(lambda o: o or {}), st.none() | st.lists(text, max_size=2))

@given(st.one_of(usages, summaries, calls, results, blocks, iterations, runs))
def test_records_round_trip(o):
    "Through JSON, on UTF-8 as a file would have it."
    back = type(o).from_dict(json.loads(json.dumps(o.to_dict(), allow_nan=False).encode()))
    assert back == o and repr(back) and back.to_dict() == o.to_dict()

def test_records_of_anything():
    "As fields that people may fill with what they have."
    for o in EVIL.values():
        recs = [RLMChatCompletion('m', o, 'r', metadata={'x': o}), REPLResult('', '', {'x': o}, final_answer=o), RLMIteration([o], 'r', [], o), RLMMetadata('m', backend_kwargs={'x': o})]
        for r in recs: json.dumps(r.to_dict(), allow_nan=False)

@pytest.mark.parametrize('make', [lambda: REPLResult('o', 'e', {}), lambda: RLMIteration('p', 'r', []), lambda: CodeBlock('c', REPLResult('', '', {})), lambda: ModelUsageSummary(1, 2, 3),
    lambda: UsageSummary({}), lambda: RLMChatCompletion('m', 'p', 'r'), lambda: RLMMetadata('m')])
def test_first_fields_are_enough(make): assert make() == make() and repr(make()) and make().to_dict()

@given(st.lists(st.dictionaries(st.sampled_from('abc'), usages, max_size=3).map(UsageSummary), max_size=4))
def test_usage_adds_up(us):
    total = sum(us, UsageSummary())
    parts = [v for u in us for v in u.model_usage_summaries.values()]
    assert total.total.total_tokens == sum(o.total_tokens for o in parts) and total.total.total_calls == sum(o.total_calls for o in parts)
    if any(o.total_cost is None for o in parts): assert total.total_cost is None
    else: assert total.total_cost == pytest.approx(sum(o.total_cost for o in parts))
    assert [u.to_dict() for u in us] == [UsageSummary.from_dict(u.to_dict()).to_dict() for u in us] # Adding changes none of them

# What the model sees

@given(st.text(max_size=300), st.integers(1, 200))
def test_head_and_tail(s, n):
    cut = head_tail(s, n)
    if len(s) <= n: assert cut == s; return
    kept = max(n // 2, 1)
    assert cut.startswith(s[:kept]) and cut.endswith(s[-kept:]) and f'[{len(s) - 2 * kept:,} characters cut]' in cut and len(cut) < n + 60

@given(st.integers(0, 50_000), st.integers(0, 50_000), st.integers(300, 30_000), st.integers(1, 3))
def test_an_error_at_the_end_is_never_cut_away(out, err, n, blocks):
    error = 'ValueError: this is what went wrong, ' + 'z' * 50
    res = REPLResult('o' * out, 'e' * err + '\n' + error + '\n', {}, error=error)
    it = RLMIteration('p', 'r', [CodeBlock('x', res)] * blocks)
    for p in (PAPER, ANSWER, NANO):
        said = format_iteration(it, n, p)[1]['content']
        assert said.count(error) >= blocks, p.name
        assert len(said) < blocks * (2 * n + 2000)

@given(messy, messy, st.dictionaries(st.text(max_size=5), text, max_size=100), st.integers(1, 500))
def test_results_are_shown_whatever_they_are(out, err, names, n):
    res = REPLResult(out, err, names)
    for shown in (format_execution_result(res, n), format_metadata(res, n)): assert isinstance(shown, str) and shown
    assert json.loads(format_metadata(res, n))['variable_count'] == len(names)

@PROTOCOLS
@given(messy, st.lists(st.tuples(messy, messy, messy), max_size=3))
def test_turns_are_two_messages(protocol, response, blocks):
    it = RLMIteration('p', response, [CodeBlock(c, REPLResult(o, e)) for c, o, e in blocks])
    a, u = format_iteration(it, protocol=protocol)
    assert (a['role'], u['role']) == ('assistant', 'user') and a['content'].strip() and u['content'].strip()
    assert a['content'] == response or not response.strip()

@PROTOCOLS
@pytest.mark.parametrize('prompt', ['{}', '{0} {name!r}', '%s %(x)s', '{{}}', 'a { b', '<<environment>> {x}', '<<environment>><<environment>>', '', '\ud800'])
def test_custom_prompts_may_hold_anything(protocol, prompt):
    system, user = build_rlm_system_prompt(QueryMetadata('{x}'), protocol, system_prompt=prompt, tools={'{t}': '`{t}`: %d'})
    assert prompt.replace('<<environment>>', '') in system['content'] or '<<environment>>' in prompt and '<<environment>>' not in system['content']
    assert '`{t}`: %d' in system['content']

@PROTOCOLS
@given(names=st.sets(st.sampled_from(['llm_query', 'llm_query_batched', 'rlm_query', 'rlm_query_batched', 'SHOW_VARS', 'history'])))
def test_the_prompt_promises_what_there_is(protocol, names):
    system = build_rlm_system_prompt(QueryMetadata('x'), protocol, names=names, system_prompt='Go.')[0]['content']
    for o in ('llm_query', 'llm_query_batched', 'rlm_query', 'rlm_query_batched', 'SHOW_VARS'):
        assert (f'`{o}(' in system) == (o in names and o in protocol.promises), o

@PROTOCOLS
@given(n=st.integers(1, 40))
def test_turn_prompts_count_down(protocol, n):
    said = [build_user_prompt('Why {x}?', i, n, protocol)['content'] for i in range(n + 1)]
    assert [('Why {x}?' in o) for o in said] == [True] + [False] * n       # the question is stated once
    assert 'no final answer' in said[0] and 'run out of REPL iterations' in said[n]
    assert all(('left' in said[i] or 'last turn' in said[i]) == (n - i <= 2) for i in range(1, n))

@pytest.mark.parametrize('n', [0, 1, 1999, 2000, 2001, 10_000])
def test_preview_of_a_childs_prompt(n):
    s = ''.join(chr(97 + i % 26) for i in range(n))
    shown = preview(s)
    assert shown == s if n <= 2000 else shown.startswith(s[:1400]) and shown.endswith(s[-400:]) and f'{n:,}' in shown and len(shown) < 2200

@given(st.lists(st.sampled_from(['system', 'user', 'assistant']), max_size=12))
def test_messages_alternate(roles):
    msgs = []
    for i, r in enumerate(roles): add_message(msgs, dict(role=r, content=str(i)))
    assert all(a['role'] != b['role'] for a, b in zip(msgs, msgs[1:]))
    assert '\n\n'.join(m['content'] for m in msgs).split('\n\n') == [str(i) for i in range(len(roles))] or not roles

def test_compaction_keeps_what_the_run_needs():
    msgs = [dict(role=r, content=str(i)) for i, r in enumerate(['system', *['user', 'assistant'] * 5, 'user'])]
    short = compact(msgs, 'found it')
    assert short[:2] == msgs[:2] and short[-1] == msgs[-1] and [m['role'] for m in short] == ['system', 'user', 'assistant', 'user'] and len(msgs) == 12
