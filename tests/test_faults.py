"""Faults of the provider, over real HTTP, through whole runs."""
import asyncio, threading, time
from concurrent.futures import ThreadPoolExecutor
import pytest
from rlm import LMError, arlm_run
from rlm.lm import LMAuthError, LMConnectionError, LMModelError
from rlm.testing import TRANSIENT, Fault, MessagesServer, random_faults
from common import given_time
from wire import HANG, KEY, ask, block, check_growth, conversation, is_turn, last, lm, numbers

RUNS = 1000
SCRIPT = [block('a = len(context)\nprint("a is", a)'), block('b = a * 2\nprint("b is", b)'), block('c = b + 1', then='FINAL_VAR(c)')]
both = pytest.mark.parametrize('stream', [False, True], ids=['plain', 'streamed'])

def at(place, *faults):
    "Faults for the requests from number `place` on; before and after them all goes well."
    return [None] * place + list(faults)

def bodies(srv): return [r['body'] for r in srv.requests]

def check_whole(srv, res, extra):
    "A run of SCRIPT that ended as if nothing had happened; `extra` requests failed."
    assert (res.answer, res.stop, len(res.iterations)) == ('19', 'answer', 3)
    assert len(srv.requests) == 3 + extra
    check_growth(bodies(srv))
    said = [t for role, t in conversation(srv.requests[-1]['body']) if role == 'assistant']
    assert said == SCRIPT[:2]
    assert [m['content'] for m in res.messages if m['role'] == 'assistant'] == SCRIPT
    assert res.ns['c'] == 19

# What passes

def side_by_side(f, items):
    "Each of these has a pause in it, so they wait together."
    with ThreadPoolExecutor(len(items)) as ex: return list(ex.map(f, items))

@both
@pytest.mark.parametrize('fault', TRANSIENT)
def test_transient(fault, stream):
    "In the first, in the second and in the last request."
    def one(place):
        with MessagesServer(SCRIPT, faults=at(place, fault)) as srv: check_whole(srv, ask(srv, stream=stream), 1)
        return srv.requests[place]['fault']
    assert side_by_side(one, range(3)) == [fault] * 3

@pytest.mark.parametrize('events', [[0], [1, 2, 3, 5, 99]], ids=['at once', 'later'])
@pytest.mark.parametrize('kind', ['cut', 'short', 'garbage', 'error'])
def test_a_stream_breaks_after_some_events(kind, events):
    def one(n):
        with MessagesServer(SCRIPT, faults=at(1, Fault(kind, n))) as srv: check_whole(srv, ask(srv, stream=True), 1)
    side_by_side(one, events)

@both
def test_a_row_of_faults(stream):
    with MessagesServer(SCRIPT, faults=['429', '500', 'drop', None, 'cut', 'garbage', Fault('529', 0)]) as srv:
        check_whole(srv, ask(srv, stream=stream), 6)

@both
def test_retry_after_is_honoured(stream):
    "Without the header the first pause is a quarter of a second at most; a pause can only be too short, never too long, for this test."
    def one(kind):
        with MessagesServer(SCRIPT, faults=at(1, Fault(kind, .6))) as srv: check_whole(srv, ask(srv, stream=stream), 1)
        return srv.requests[2]['time'] - srv.requests[1]['time'] > .55
    assert all(side_by_side(one, ['429', '529', '500']))

@both
def test_retry_after_of_nothing(stream):
    with MessagesServer(SCRIPT, faults=[Fault('429', 0)] * 5) as srv: check_whole(srv, ask(srv, stream=stream), 5)

@both
def test_faults_in_subcalls(stream):
    "One of several prompts meets each kind of fault; all replies come, in order."
    n = 2 * len(TRANSIENT)
    prompts = block(f'rs = llm_query_batched([f"number {{i}}" for i in range({n})])\nprint(rs)', then='FINAL_VAR(rs)')
    def reply(body): return prompts if is_turn(body) else last(body).replace('number', 'reply')
    with MessagesServer(reply, faults=at(1, *TRANSIENT)) as srv: res = ask(srv, stream=stream)
    assert res.value == [f'reply {i}' for i in range(n)]
    assert len(srv.requests) == 1 + n + len(TRANSIENT)

@both
def test_usage_of_what_was_not_billed(stream):
    def one(fault):
        with MessagesServer(SCRIPT, faults=at(1, fault)) as srv: res = ask(srv, stream=stream)
        assert numbers(res.usage) == numbers(srv.usage)
    side_by_side(one, ['429', '500', '529', 'drop'])

def test_usage_of_a_stream_that_was_cut():
    "Its input is known, and it was billed. Its output is not: the provider sends that at the end."
    def one(fault):
        with MessagesServer(SCRIPT, faults=at(1, fault)) as srv: res = ask(srv, stream=True)
        calls, plain, out, read, written = numbers(srv.usage)
        ours = numbers(res.usage)
        assert (ours[0], ours[1], ours[3], ours[4]) == (calls, plain, read, written)
        assert ours[2] <= out
    side_by_side(one, ['cut', 'short', 'garbage', 'error'])

# Replies that arrive and are no good

@both
def test_no_text(stream):
    "An empty reply is a turn; the model is told to go on."
    with MessagesServer(SCRIPT, faults=at(1, 'empty')) as srv: res = ask(srv, stream=stream)
    assert (res.answer, len(res.iterations), res.iterations[1].response) == ('19', 4, '')
    assert 'no ```repl block' in last(srv.requests[2]['body'])
    check_growth(bodies(srv))

@both
def test_no_text_for_a_subcall(stream):
    with MessagesServer([block('r = llm_query("Hm?")', then='FINAL(str("asked"))'), '']) as srv: res = ask(srv, stream=stream)
    assert res.ns['r'] == '' and res.answer == 'asked'

@both
@pytest.mark.parametrize('place', [0, 1], ids=['first', 'middle'])
def test_cut_at_max_tokens_inside_a_block(place, stream):
    "The block does not run, and the model is told why; here it sends the same again."
    long = block('seen.append(1)\n' + '\n'.join(f'x{i} = {i}' for i in range(50)))
    script = [*SCRIPT[:place], long, *SCRIPT[place:]]
    with MessagesServer(script, faults=at(place, Fault('max_tokens', 30))) as srv:
        res = ask(srv, ns=(ns := {'seen': []}), stream=stream)
    assert not res.iterations[place].code_blocks and 'no closing fence' in last(srv.requests[place + 1]['body'])
    assert ns['seen'] == [1] and res.answer == '19' and len(res.iterations) == 5
    check_growth(bodies(srv))

@both
def test_cut_behind_a_block(stream):
    "What came whole runs."
    text = block('y = 1', then='And then I will go on to say a lot about what I found there.')
    with MessagesServer([text, *SCRIPT], faults=[Fault('max_tokens', 12)]) as srv: res = ask(srv, stream=stream)
    assert res.iterations[0].code_blocks[0].code == 'y = 1' and res.answer == '19'

@both
@pytest.mark.parametrize('answer', ['FINAL(The treaty was signed in 1848.\nIt was broken a year later, in 1849.)',
    'FINAL(The treaty was signed (in 1848)\nand it was broken a year later (in 1849), so the answer is no.)',
    'FINAL("She was happy :) when the ship came in, and then she left for good.")'], ids=['nothing', 'line', 'quoted'])
def test_cut_inside_an_answer(answer, stream):
    "Half an answer is none: the model is asked again."
    with MessagesServer([SCRIPT[0], answer], faults=at(1, Fault('max_tokens', 12))) as srv: res = ask(srv, stream=stream)
    assert res.answer.strip('"') == answer[6:-1].strip('"')
    assert len(srv.requests) == 3

@both
def test_the_model_is_told_that_its_reply_was_cut(stream):
    "A long thought that never came to its block: to say that there was no block would be half the truth."
    text = 'I will now think about this at great length, and the code comes at the end. ' * 9 + SCRIPT[1]
    with MessagesServer([SCRIPT[0], text, *SCRIPT[1:]], faults=at(1, Fault('max_tokens', 100))) as srv: res = ask(srv, stream=stream)
    assert res.answer == '19'
    told = last(srv.requests[2]['body'])
    assert 'cut' in told or 'too long' in told or 'shorter' in told

# A call that takes too long

@both
def test_a_stall_is_cancelled_by_the_limit(stream):
    "The time limit of the run ends the call that is under way, and the server sees that its client is gone."
    gone = threading.Event()
    async def reply(body):
        if len(body['messages']) == 1: return SCRIPT[0]
        try: await asyncio.sleep(600)
        finally: gone.set()
    def run(seconds):
        with MessagesServer(reply) as srv:
            res = ask(srv, stream=stream, limits=dict(timeout=seconds))
            if len(srv.requests) > 1: assert gone.wait(HANG)
        return res, srv
    (res, srv), _ = given_time(run, lambda o: len(o[1].requests) > 1, 1)
    assert (res.answer, res.stop, res.limit.limit, len(res.iterations)) == (None, 'timeout', 'timeout', 1)
    assert res.ns['a'] == 9 and len(srv.requests) == 2 and srv.requests[1]['status'] is None
    assert res.seconds < HANG
    assert numbers(res.usage) == numbers(srv.usage)

@both
def test_a_stall_in_a_subcall_is_cancelled_by_the_limit(stream):
    first = block('answer["content"] = "so far"\nr = llm_query_batched(["one", "two"])')
    def run(seconds):
        with MessagesServer([first], faults=at(1, 'stall', 'stall')) as srv: return ask(srv, stream=stream, limits=dict(timeout=seconds)), srv
    (res, srv), _ = given_time(run, lambda o: len(o[1].requests) > 2, 1)
    assert (res.answer, res.stop) == ('so far', 'timeout') and res.seconds < HANG
    assert [r['status'] for r in srv.requests] == [200, None, None]

@both
def test_a_stall_is_cancelled_by_the_client(stream):
    "A client's own timeout is a fault that passes: the request is sent again."
    def run(seconds):
        with MessagesServer(SCRIPT, faults=at(1, Fault('stall', 600))) as srv: return ask(srv, stream=stream, client=dict(timeout=seconds)), srv
    (res, srv), _ = given_time(run, lambda o: len(o[1].requests) == 4, 3) # One more would be a request that was slow by itself
    check_whole(srv, res, 1)

def test_what_was_used_before_a_stall_is_counted():
    "The first try was billed before it broke; the second is cancelled by the limit."
    def run(seconds):
        with MessagesServer(SCRIPT, faults=at(1, 'cut', 'stall')) as srv: return ask(srv, stream=True, limits=dict(timeout=seconds)), srv
    (res, srv), _ = given_time(run, lambda o: len(o[1].requests) == 3, 2)
    assert res.stop == 'timeout' and len(srv.requests) == 3
    assert numbers(res.usage)[1] + numbers(res.usage)[4] == numbers(srv.usage)[1] + numbers(srv.usage)[4]

# What does not pass

@both
def test_wrong_key(stream):
    "One request, one sentence, and no key in it."
    with MessagesServer(SCRIPT, api_key='another') as srv, pytest.raises(LMAuthError) as e: ask(srv, ns=(ns := {'mine': 1}), stream=stream)
    assert len(srv.requests) == 1 and srv.requests[0]['status'] == 401
    assert 'key' in str(e.value) and KEY not in str(e.value) and '\n' not in str(e.value)
    res = e.value.result
    assert (res.answer, res.iterations, res.stop) == (None, [], 'errors')
    assert res.ns is ns and ns['mine'] == 1

@both
@pytest.mark.parametrize('status', ['401', '403'])
def test_revoked_key(status, stream):
    "The turns so far are there, the namespace is whole, and the next run in it works."
    ns = {'llm_query': 'my own'}
    with MessagesServer(SCRIPT, faults=at(2, status)) as srv:
        with pytest.raises(LMAuthError) as e: ask(srv, ns=ns, stream=stream)
        res = e.value.result
        assert len(srv.requests) == 3 and len(res.iterations) == 2 and res.stop == 'errors' and res.answer is None
        assert [o.response for o in res.iterations] == SCRIPT[:2]
        assert res.ns is ns and (ns['a'], ns['b'], ns['context'], ns['llm_query']) == (9, 18, 'some text', 'my own')
        assert numbers(res.usage) == numbers(srv.usage)
        check_growth(bodies(srv))
        again = ask(srv, None, ns=ns, stream=stream)
    assert (again.answer, ns['llm_query']) == ('19', 'my own')

@both
def test_revoked_key_in_subcalls(stream):
    "Slots that failed hold errors; the run goes on until its own call fails."
    first = block('rs = llm_query_batched(["a", "b", "c"])\nbad = [type(o.error).__name__ for o in rs if o.startswith("Error: ")]')
    with MessagesServer([first], faults=at(1, '401', '401', '401', '401')) as srv, pytest.raises(LMAuthError) as e: ask(srv, stream=stream)
    ns = e.value.result.ns
    assert len(ns['rs']) == 3 and ns['bad'] == ['LMAuthError'] * 3 and len(srv.requests) == 5

@both
def test_revoked_key_in_a_child(stream):
    "What the child had used is counted, and its turns are kept with the parent's result."
    def reply(body):
        if 'piece' in last(body): return block('z = 1\nprint(z)')
        return block('r = rlm_query("a piece of it")', then='FINAL(nothing)') if len(body['messages']) == 1 else SCRIPT[0]
    with MessagesServer(reply, faults=at(2, '401')) as srv: res = ask(srv, stream=stream, max_iters=1)
    assert numbers(res.usage) == numbers(srv.usage)
    assert 'LMAuthError' in res.iterations[0].code_blocks[0].result.stderr
    assert [len(o.iterations) for o in res.children] == [1]

@both
def test_tries_are_used_up(stream):
    def one(fault):
        with MessagesServer(SCRIPT, faults=at(1, *[fault] * 9)) as srv, pytest.raises(LMError) as e:
            ask(srv, stream=stream, client=dict(retries=1))
        res = e.value.result
        assert len(srv.requests) == 3 and len(res.iterations) == 1 and res.ns['a'] == 9 and res.stop == 'errors'
        assert not isinstance(e.value, LMAuthError) and '\n' not in str(e.value)
        check_growth(bodies(srv))
    side_by_side(one, ['429', '500', '529', 'drop', 'cut', 'garbage'])

@both
def test_no_such_model(stream):
    with MessagesServer(SCRIPT, models=['another']) as srv, pytest.raises(LMModelError) as e: ask(srv, stream=stream)
    assert len(srv.requests) == 1 and e.value.result.iterations == []

@both
def test_server_goes_away(stream):
    "Nobody listens any more: a connection error, with the turns so far, and not after minutes."
    def reply(body):
        if len(body['messages']) > 1: threading.Thread(target=srv.close).start()
        return SCRIPT[len(body['messages']) // 2]
    with MessagesServer(reply) as srv:
        t0 = time.monotonic()
        with pytest.raises(LMConnectionError) as e: ask(srv, stream=stream, client=dict(retries=3))
    assert len(e.value.result.iterations) in (1, 2) and time.monotonic() - t0 < HANG

# Many runs

def test_many_runs_with_random_faults():
    "A fifth of all requests goes wrong, in any way that passes; every run ends with its own right answer."
    def reply(body):
        if not is_turn(body): return f'{len(last(body))} characters'
        return [block('n = len(context)\nprint(n)'), block('r = llm_query_batched([context, context * 2])', then='FINAL_VAR(r)')][len(body['messages']) // 2]
    async def all_of_them(srv):
        models, places = [lm(srv), lm(srv, True)], asyncio.Semaphore(48)
        async def one(i):
            async with places: return await arlm_run('How long?', 'x' * (i + 1), {}, models[i % 2])
        return await asyncio.gather(*[one(i) for i in range(RUNS)])
    with MessagesServer(reply, faults=random_faults(.2)) as srv: results = asyncio.run(all_of_them(srv))
    assert [o.value for o in results] == [[f'{i + 1} characters', f'{2 * i + 2} characters'] for i in range(RUNS)]
    assert all(o.stop == 'answer' and len(o.iterations) == 2 and o.usage.total.total_calls >= 4 for o in results)
    faults = [r['fault'] for r in srv.requests]
    assert len(faults) > 4 * RUNS and set(faults) == {None, *TRANSIENT}
