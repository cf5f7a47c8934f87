"""Limits and the ledger: trees of runs at random, against what the server counted; then each limit by itself."""
import asyncio, json, re, threading, time, tracemalloc
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from rlm import LMError, Reply, ScriptLM, arlm_run, llm_query, rlm_run
from rlm.lm import FnLM, Usage
from rlm.testing import MessagesServer
from common import at, given_time
from wire import HANG, ask, block, conversation, is_turn, last, lm, numbers, text, tree

# Trees at random. A run's context says what its turns do, as JSON: {"turns": 2, "dies": false, "plan": [what the first turn does, ...]}.
# The model reads the number of turns in the first message, and writes the same code in each turn: do what the context says.
# A run that dies does so in its last turn, when the server refuses its request for good.

STEP = '''import json
if "todo" not in globals(): todo, out = json.loads(context)["plan"], []
for what, arg in todo.pop(0):
    f = dict(ask=llm_query_batched, child=rlm_query_batched)[what]
    prompts = arg if what == "ask" else [json.dumps(o) for o in arg]
    replies = f(prompts)
    pair(len(prompts), len(replies))
    out += replies
print(len(out))'''

leaves = st.lists(st.sampled_from(['a word', 'x' * 300, 'fail']), max_size=4)
asking = st.tuples(st.just('ask'), leaves)
def as_run(act, dies=st.booleans()):
    return st.builds(lambda p, d: dict(turns=len(p), dies=d, plan=p), st.lists(st.lists(act, min_size=1, max_size=2), min_size=1, max_size=2), dies)
def acts(kids): return asking | st.tuples(st.just('child'), st.lists(kids, max_size=3))
def plans(dies): return as_run(acts(st.recursive(as_run(asking, dies), lambda kids: as_run(acts(kids), dies), max_leaves=8)), st.just(False))
def line(n, dies=False): # A tree that goes n levels down
    return dict(turns=1, dies=dies and n == 0, plan=[[('ask', ['down']), ('child', [line(n - 1, dies)] * 2)] if n else [('ask', ['x'])]])

class World:
    "A server whose model carries out such trees, and what it saw."
    def __init__(self, delay=0.): self.pairs, self.now, self.peak, self.srv = [], 0, 0, MessagesServer(self.reply, delay=delay)
    async def reply(self, body):
        self.now += 1; self.peak = max(self.peak, self.now)
        try:
            await asyncio.sleep(.001) # So that calls overlap
            return self.say(body)
        finally: self.now -= 1
    def say(self, body):
        if last(body) == 'fail': raise ValueError('this one fails')
        if not is_turn(body): return 'leaf ' + last(body)[:40]
        turns, dies = re.search(r'\{"turns": (\d+), "dies": (\w+)', conversation(body)[1][1]).groups()
        at_end = len(body['messages']) // 2 + 1 >= int(turns)
        if at_end and dies == 'true': raise ValueError('this run dies')
        return block(STEP, then='FINAL_VAR(out)' if at_end else '')
    def run(self, plan, **limits):
        seen = []
        self.res = ask(self.srv, json.dumps(plan), query=json.dumps(plan)[:1500], limits=dict(max_depth=4) | limits, on_event=seen.append,
            tools={'pair': lambda a, b: self.pairs.append((a, b))}, client=dict(retries=0))
        self.depths = {e.depth for e in seen if e.kind in ('run', 'child')}
        return self.res
    def __enter__(self): return self
    def __exit__(self, *_): self.srv.close()

def own(res):
    "The usage of a run by its record: its turns, and the sub-calls of its blocks."
    return [it.usage for it in res.iterations] + [c.usage_summary for it in res.iterations for b in it.code_blocks for c in b.result.llm_calls]

def add(usages): return [sum(o) for o in zip(*map(numbers, usages))] or [0] * 5

def runs(requests): return [r for r in requests if r['status'] == 200 and is_turn(r['body']) and len(r['body']['messages']) == 1]

slow = settings(max_examples=max(30, settings.default.max_examples // 20), deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

@slow
@given(plans(st.booleans()))
@example(line(5)).via('deeper than max_depth')
@example(line(2, True)).via('all of the last level dies')
def test_totals_of_a_tree(plan):
    "The ledger has what the server billed, at the price; no list of replies is too short, whatever dies."
    with World() as w:
        res = w.run(plan)
        assert res.stop == 'answer' and numbers(res.usage) == numbers(w.srv.usage)
        assert all(a == b for a, b in w.pairs)
        assert max(w.depths) < 4
        assert res.cost == pytest.approx(sum(call_cost(r['usage']) for r in w.srv.requests if r['usage']))

@slow
@given(plans(st.just(False)))
@example(line(5)).via('deeper than max_depth')
def test_usage_of_children_adds_up(plan):
    "Each run's usage is that of its turns, its sub-calls and its children."
    with World() as w:
        res = w.run(plan)
        for o in tree(res): assert add(own(o)) == list(numbers(o.usage))
        assert len(runs(w.srv.requests)) == len(list(tree(res)))

LIMITS = st.fixed_dictionaries(dict(max_concurrency=st.sampled_from([1, 2, 3])), optional=dict(max_calls=st.integers(1, 12), max_tokens=st.integers(500, 9000),
    max_cost=st.floats(.001, .03), max_children_total=st.integers(1, 4), max_children_per_batch=st.integers(1, 2), max_depth=st.integers(1, 4)))

@slow
@given(plans(st.booleans()), LIMITS)
def test_limits_of_a_tree(plan, limits):
    "No limit is exceeded by more than the calls that were under way."
    with World() as w:
        res = w.run(plan, **limits)
        done = [r for r in w.srv.requests if r['status'] == 200]
        assert numbers(res.usage) == numbers(w.srv.usage)
        assert res.stop in ('answer', 'budget') and (res.stop == 'answer' or res.limit.limit in limits)
        assert all(a == b for a, b in w.pairs)
        assert w.peak <= limits['max_concurrency']
        assert len(w.srv.requests) <= limits.get('max_calls', 10**9)
        assert len(runs(done)) - 1 <= limits.get('max_children_total', 10**9)
        assert max(w.depths) < limits.get('max_depth', 4)
        tokens = sorted(sum(v for v in r['usage'].values()) for r in done)
        before = sum(tokens[:-limits['max_concurrency']]) # Without as many of the biggest calls as may have been under way
        assert before < limits.get('max_tokens', 10**9)
        if 'max_cost' in limits: assert res.cost - limits['max_concurrency'] * max(call_cost(r['usage']) for r in done) < limits['max_cost']

def call_cost(u): return (3 * u['input_tokens'] + 15 * u['output_tokens'] + 3.75 * u['cache_creation_input_tokens'] + .3 * u['cache_read_input_tokens']) / 1e6

@pytest.mark.parametrize('n', [1, 2, 3, 5, 8])
def test_max_calls_is_exact(n):
    "A batch uses up what is left; its other slots hold errors, and the run ends by the limit."
    first = block('rs = llm_query_batched([str(i) for i in range(6)])\nbad = sum(o.startswith("Error: max_calls exceeded") for o in rs)')
    with MessagesServer(lambda body: first if is_turn(body) else 'fine') as srv:
        res = ask(srv, limits=dict(max_calls=n, max_concurrency=4))
    assert len(srv.requests) == n == res.usage.total.total_calls
    assert len(res.ns['rs']) == 6 and (n == 8 or res.ns['bad'] == max(0, 7 - n))
    assert (res.stop, res.limit.limit, res.limit.allowed) == ('budget', 'max_calls', n)

def test_after_a_limit_no_call_is_made():
    "The call that goes over the limit is the last one, and what it asked for is still done."
    with MessagesServer(lambda body: block('n = n + 1 if "n" in globals() else 1')) as srv:
        res = ask(srv, limits=dict(max_tokens=10))
    assert len(srv.requests) == 1 and (res.stop, res.limit.limit) == ('budget', 'max_tokens')
    assert res.limit.spent == res.usage.total.total_tokens > 10

def test_a_limit_in_the_last_call():
    "Turns used up, then the budget: what was prepared is the answer."
    script = [block('answer["content"] = "half of it"'), 'FINAL(never asked)']
    with MessagesServer(script) as srv: res = ask(srv, max_iters=1, limits=dict(max_calls=1))
    assert (res.answer, res.stop, len(srv.requests)) == ('half of it', 'budget', 1)

# Children

def test_500_children_in_one_batch():
    "64 at a time, each with a block that asks a batch of its own: no deadlock (the time limit would end it), and no call more or less than there must be."
    def reply(body):
        if not is_turn(body): return last(body).upper()
        if 'piece' not in conversation(body)[1][1]: return block('rs = rlm_query_batched([f"piece {i}" for i in range(500)])', then='FINAL_VAR(rs)')
        return block('r = llm_query_batched([context, context])', then='FINAL_VAR(r)')
    with MessagesServer(reply, keep=10) as srv: res = ask(srv, limits=dict(max_concurrency=64, timeout=600))
    assert res.value == [str([f'PIECE {i}'] * 2) for i in range(500)]
    assert [o.usage.total.total_calls for o in res.children] == [3] * 500
    assert numbers(res.usage) == numbers(srv.usage) and res.usage.total.total_calls == 1 + 3 * 500

def wait_for_threads(name, before):
    "Until there are no more than `before` the test."
    end = time.monotonic() + HANG
    while left := [t for t in threading.enumerate() if t.name == name and t not in before]:
        assert time.monotonic() < end, f'{left} are left'
        time.sleep(.01)

def test_children_leave_no_threads():
    before = threading.enumerate()
    model = ScriptLM(lambda msgs: block('rs = rlm_query_batched(["a", "b", "c"])', then='FINAL_VAR(rs)') if 'parent' in msgs[1]['content'] else 'FINAL(x)')
    assert rlm_run('parent', 'text', model=model, max_iters=3).value == ['x'] * 3
    wait_for_threads('rlm-code', before)

@pytest.mark.parametrize('limits, good, words', [
    (dict(max_children_per_batch=2), 2, 'max_children_per_batch exceeded'), (dict(max_children_total=3, max_concurrency=1), 3, 'max_children_total exceeded')])
def test_children_past_a_limit(limits, good, words):
    "Never fewer results: a slot past the limit holds an error."
    model = ScriptLM(lambda msgs: block('rs = rlm_query_batched(list("abcde"))', then='FINAL_VAR(rs)') if 'parent' in msgs[1]['content'] else 'FINAL(x)')
    res = rlm_run('parent', 'text', model=model, limits=limits)
    assert len(res.value) == 5 and res.value[:good] == ['x'] * good and len(res.children) == good
    assert all(o.startswith(f'Error: {words}') for o in res.value[good:])

@pytest.mark.parametrize('depth', [1, 2, 3, 4])
def test_max_depth(depth):
    "The last level's rlm_query is a plain call, and its prompt does not promise children."
    def model(msgs):
        if msgs[0]['role'] != 'system': return 'bottom'
        assert ('rlm_query' in msgs[0]['content']) == (msgs[1]['content'].count('deeper') < depth - 1)
        return block('r = rlm_query(context + " deeper")', then='FINAL_VAR(r)')
    res = rlm_run('start', 'start', model=ScriptLM(model), limits=dict(max_depth=depth))
    assert (res.answer, len(list(tree(res)))) == ('bottom', depth)

def test_a_child_that_failed_is_among_the_children():
    "Its turns were paid for; the sum of the parts is the whole also then."
    def reply(body):
        if 'parent' in conversation(body)[1][1]: return block('rs = rlm_query_batched(["good", "bad"])', then='FINAL_VAR(rs)')
        if len(body['messages']) > 1 and 'bad' in conversation(body)[1][1]: raise ValueError('no more')
        return block('x = 1', then='FINAL(fine)' if 'good' in conversation(body)[1][1] else '')
    with MessagesServer(reply) as srv: res = ask(srv, query='parent')
    assert res.value[0] == 'fine' and res.value[1].startswith('Error: ')
    assert numbers(res.usage) == numbers(srv.usage)
    assert add(own(res)) == list(numbers(res.usage))
    assert len(res.children) == 2

# Prices

NO_PRICE = dict(price=None)
@pytest.mark.parametrize('options', [dict(model=FnLM(lambda m: 'FINAL(x)', **NO_PRICE)), dict(model=lambda m: 'FINAL(x)'),
    dict(model=ScriptLM(['FINAL(x)']), sub_model=FnLM(lambda m: 'x', **NO_PRICE))], ids=['model', 'function', 'sub_model'])
def test_unknown_price_at_the_start(options):
    ns = {}
    with pytest.raises(ValueError, match='price'): rlm_run('Q', 'text', ns, limits=dict(max_cost=1), **options)
    assert ns == {}

def test_unknown_price_at_a_call():
    "A sub-model that the code names is checked when it is called; nothing is sent to it."
    code = 'r = llm_query_batched(["one"], model="unheard-of")\ntry: llm_query("two", model="unheard-of")\nexcept ValueError as e: said = str(e)'
    with MessagesServer([block(code, then='FINAL(str("x"))')]) as srv:
        res = rlm_run('Q', 'text', model=lm(srv, price=None), limits=dict(max_cost=1))
    assert len(srv.requests) == 1 and res.answer == 'x'
    assert 'price' in res.ns['said'] and type(res.ns['r'][0].error) is ValueError

def test_a_price_that_gets_lost():
    "An LM has a price, but its replies say that their cost is unknown: max_cost must not pass in silence."
    model = FnLM(lambda m: Reply(block('x = 1'), Usage(1, 10**9, 10**9, None), model='m'), price=(3, 15, 3.75, .3))
    try: res = rlm_run('Q', 'text', model=model, limits=dict(max_cost=.01), max_iters=5)
    except (ValueError, LMError): return
    assert res.stop == 'budget' and len(res.iterations) == 1

def test_without_max_cost_an_unknown_price_is_none():
    assert rlm_run('Q', 'text', model=lambda m: block('x = 1', then='FINAL(x)')).cost is None

@pytest.mark.parametrize('limits', [dict(max_calls=0), dict(max_tokens=-1), dict(max_depth=0), dict(timeout=0), dict(max_cost=-.5), dict(block_timeout=0), dict(max_errors=0),
    dict(max_concurrency=0), dict(result_truncation_limit=0), dict(max_calls=1.5), dict(max_calls='3'), dict(max_depth=True), dict(timeout=float('nan')),
    dict(max_depth=None), dict(max_concurrency=None), dict(no_such_limit=3)], ids=str)
def test_limits_given_wrongly(limits):
    ns = {}
    with pytest.raises(ValueError, match=next(iter(limits))): rlm_run('Q', 'text', ns, model=ScriptLM([]), limits=limits)
    assert ns == {}

# Time

FOREVER = 'started = True\nwhile True: pass'

@pytest.mark.parametrize('seconds', [.2, 1.2])
@pytest.mark.parametrize('off_main', [False, True], ids=['main', 'thread'])
def test_block_timeout(seconds, off_main):
    "The block ends, the model is told after which time, and the run goes on."
    def go(seconds):
        script = ScriptLM([block(FOREVER), block('y = started', then='FINAL_VAR(y)')])
        return rlm_run('Q', 'text', ns, model=script, limits=dict(block_timeout=seconds))
    def ready(res):
        late = res.iterations[1].code_blocks[0].result.error or ''
        return 'started' in ns and 'BlockTimeout' not in late
    ns = {}
    res, seconds = given_time(lambda seconds: at(off_main, go, seconds), ready, seconds)
    assert res.answer == 'True' and f'stopped after {seconds:g} s' in res.iterations[0].code_blocks[0].result.error

def test_timeout_of_the_whole_run_in_a_block():
    def go(seconds):
        script = ScriptLM([block('answer["content"] = "a draft"'), block(FOREVER), 'FINAL(late)'])
        return rlm_run('Q', 'text', ns, model=script, limits=dict(timeout=seconds))
    ns, t0 = {}, time.monotonic()
    res, _ = given_time(go, lambda res: 'started' in ns, 1)
    assert (res.answer, res.stop, res.limit.limit, len(res.iterations)) == ('a draft', 'timeout', 'timeout', 2)
    assert 'stopped' in res.iterations[1].code_blocks[0].result.error and time.monotonic() - t0 < HANG

def test_timeout_of_the_whole_run_in_the_model():
    async def model(msgs):
        if len(msgs) > 2: await asyncio.sleep(600)
        return block('x = 1')
    res, _ = given_time(lambda seconds: rlm_run('Q', 'text', model=model, limits=dict(timeout=seconds)), lambda res: 'x' in res.ns, 1)
    assert (res.answer, res.stop, len(res.iterations), res.ns['x']) == (None, 'timeout', 1, 1) and res.seconds < HANG

@pytest.mark.parametrize('how', ['spins', 'waits', 'grandchild'])
def test_timeout_of_one_child(how):
    "The parent and the other children live on."
    async def model(msgs):
        first = msgs[1]['content'] if len(msgs) > 1 else msgs[0]['content']
        if 'parent' in first: return block('rs = rlm_query_batched(["quick", "slow", "quick"])', then='FINAL_VAR(rs)')
        if 'quick' in first: return 'FINAL(done)'
        if how == 'waits' or 'below' in first: await asyncio.sleep(600)
        return block(FOREVER if how == 'spins' else 'r = rlm_query("below")')
    def run(seconds): return rlm_run('parent', 'text', model=model, limits=dict(per_child_timeout=seconds, max_depth=3))
    res, _ = given_time(run, lambda res: not any('child timeout' in o for o in res.value[::2]), 2)
    assert res.stop == 'answer' and len(res.value) == 3 and res.value[::2] == ['done', 'done']
    assert re.match(r'Error: child timeout after [\d.]+s', res.value[1]) and res.seconds < HANG

def test_timeout_of_the_run_ends_children():
    "All levels below end with it, and their calls are cancelled."
    came, gone, before = [], [], threading.enumerate()
    async def model(msgs):
        if 'parent' in msgs[1]['content']: return block('rs = rlm_query_batched(list("abc"))', then='FINAL_VAR(rs)')
        came.append(1)
        try: await asyncio.sleep(600)
        except asyncio.CancelledError: gone.append(1); raise
    def run(seconds): came.clear(); gone.clear(); return rlm_run('parent', 'text', model=model, limits=dict(timeout=seconds))
    res, _ = given_time(run, lambda res: len(came) == 3, 1)
    assert res.stop == 'timeout' and gone == [1] * 3 and res.seconds < HANG
    wait_for_threads('rlm-code', before)

def test_a_batch_at_the_time_limit_has_all_its_slots():
    quick = []
    async def model(msgs):
        if len(msgs) == 1 and msgs[0]['content'] != 'quick': await asyncio.sleep(600)
        if len(msgs) == 1: quick.append(1)
        return 'fine' if len(msgs) == 1 else block('rs = []\nrs = llm_query_batched(["quick", "slow", "quick"])')
    def run(seconds): quick.clear(); return rlm_run('Q', 'text', model=model, limits=dict(timeout=seconds))
    res, _ = given_time(run, lambda res: len(quick) == 2, 1)
    calls = res.iterations[0].code_blocks[0].result.llm_calls
    assert res.stop == 'timeout' and len(calls) == 3 and [c.response for c in calls[::2]] == ['fine'] * 2

# Errors, truncation, stop words

def test_max_errors():
    "In a row: a good turn between them begins anew."
    bad, good = block('1/0'), block('x = 1')
    res = rlm_run('Q', 'text', model=ScriptLM([bad, bad, good, bad, bad, bad, good]), limits=dict(max_errors=3), max_iters=20)
    assert (res.stop, res.limit.limit, len(res.iterations), res.answer) == ('errors', 'max_errors', 6, None)

def test_max_errors_leaves_the_draft():
    res = rlm_run('Q', 'text', model=ScriptLM([block('answer["content"] = "a draft"\n1/0')]), limits=dict(max_errors=1))
    assert (res.stop, res.answer) == ('errors', 'a draft')

@pytest.mark.parametrize('f', ['llm_query(p)', 'llm_query_batched([p])[0]', 'rlm_query(p)', 'rlm_query_batched([p])[0]'])
def test_result_truncation_limit(f):
    "Head and tail, and how much was cut; for calls and for children."
    big = 'H' + 'x' * 5000 + 'T'
    def model(msgs): return big if len(msgs) == 1 else f'FINAL({big})' if 'child' in msgs[1]['content'] else block(f'p = "child"\nr = {f}', then='FINAL_VAR(r)')
    res = rlm_run('Q', 'text', model=ScriptLM(model), limits=dict(result_truncation_limit=100))
    assert len(res.answer) < 200 and (res.answer[0], res.answer[-1]) == ('H', 'T') and '4,902 characters cut' in res.answer

@pytest.mark.parametrize('limits, script, stop, answer, turns', [
    ({}, [block('x = 1'), 'FINAL(yes)'], 'answer', 'yes', 2),
    ({}, [block('x = 1')] * 3 + ['FINAL(at last)'], 'max_iters', 'at last', 4),
    ({}, [block('x = 1')] * 4, 'max_iters', None, 4),
    ({}, [block('x = 1')] * 3 + ['FINAL_VAR(nothing)'], 'max_iters', None, 4),
    ({}, [block('answer["content"] = 7')] + [block('x = 1')] * 3, 'max_iters', '7', 4),
    (dict(max_calls=2), [block('x = 1')] * 4, 'budget', None, 2),
    (dict(max_tokens=1), [block('answer["content"] = "d"')] * 4, 'budget', 'd', 1),
    (dict(max_errors=2), [block('x')] * 4, 'errors', None, 2)])
def test_stop_says_what_happened(limits, script, stop, answer, turns):
    res = rlm_run('Q', 'text', model=ScriptLM(script), limits=limits, max_iters=3)
    assert (res.stop, res.answer, len(res.iterations)) == (stop, answer, turns)
    assert bool(res.limit) == bool(limits) and (not limits or res.limit.limit in res.summary())
    assert tuple(res) == (res.answer, res.iterations, res.ns) and res.messages[-1]['role'] in ('user', 'assistant')

def test_the_ledger_of_a_person_is_new_after_a_run():
    "A run's limits end with it: its functions still work in the namespace."
    ns = {}
    rlm_run('Q', 'text', ns, model=ScriptLM(lambda m: block('x = 1') if len(m) > 1 else 'fine'), limits=dict(max_calls=1))
    assert ns['llm_query']('Still there?') == 'fine'

# Memory

def traced(code, turns, on_event=None):
    "What Python has allocated at the end of a run of `turns` turns, with its result, by tracemalloc."
    async def model(msgs): return Reply(block(code(len(msgs))))
    tracemalloc.start()
    try: return rlm_run('Q', 'text', model=FnLM(model), max_iters=turns, on_event=on_event), tracemalloc.get_traced_memory()[0]
    finally: tracemalloc.stop()

def test_memory_stays_flat():
    """Between turn 500 and turn 2,000, what Python has allocated (tracemalloc) grows by the text that is recorded in these
    turns (replies, code, output, messages) and by less than 6 kB a turn for the records around it, and no faster at the end."""
    grown, texts = {}, {}
    def size(it): # A reply and an output stand in the record and in the conversation; code also among the sources for tracebacks
        res = [b.result for b in it.code_blocks]
        return 3 * len(it.response) + 3 * sum(len(r.stdout) + len(r.stderr) for r in res) + sum(len(m['content']) for m in it.prompt)
    def watch(e):
        if (e.kind, e.phase) != ('turn', 'end'): return
        n = e.data['number']; texts[n] = size(e.data['iteration'])
        if n in (500, 1250, 2000): grown[n] = tracemalloc.get_traced_memory()[0]
    res, _ = traced(lambda n: f'x = {n}\nprint("the same words again " * 20, x)', 2000, watch)
    assert len(res.iterations) == 2001 and res.stop == 'max_iters'
    per_turn = [(grown[b] - grown[a] - sum(texts[i] for i in range(a + 1, b + 1))) / 750 for a, b in ((500, 1250), (1250, 2000))]
    assert max(per_turn) < 6000 and per_turn[1] < per_turn[0] + 1000, per_turn

def test_memory_does_not_grow_with_the_square_of_the_variables():
    "A new variable in each turn: the record of a turn must not hold a summary of all of them."
    (_, a), (_, b) = (traced(lambda n: f'x{n} = {n}', turns) for turns in (100, 400))
    assert b < 6 * a
