"""The provider's prompt cache: what is marked, what is read from it, and that the prefix never changes."""
from concurrent.futures import ThreadPoolExecutor
import pytest
from rlm import ANSWER, NANO, PAPER, rlm_run
from rlm.testing import MessagesServer, check_request
from wire import ask, block, check_growth, conversation, is_turn, last, lm, marks, numbers, runs_of, text, tree

LINES = 'a line of the log, one of many\\n'
PRINTS = f'print("{LINES}" * 100)'

def read(r): return r['usage']['cache_read_input_tokens']
def written(r): return r['usage']['cache_creation_input_tokens']
def plain(r): return r['usage']['input_tokens']

def check_reads(run):
    """Each turn reads all that an earlier turn of its run has written, and writes the rest; nothing is plain input. Only a
    second turn, of three messages, writes nothing: if the run ends with it, what it wrote would have been paid for in vain."""
    kept = read(run[0]) + written(run[0])
    for r in run[1:]:
        assert read(r) == kept > 0
        if len(r['body']['messages']) == 3: assert written(r) == 0 < plain(r)
        else: assert plain(r) == 0 < written(r)
        kept += written(r)

def turns(n, body, then='FINAL_VAR(x)'):
    "A script of n turns, by the number of the turn."
    i = len(body['messages']) // 2
    return block(f'x = {i}\n{PRINTS}', then=then if i == n - 1 else '')

@pytest.mark.parametrize('n', [3, 8])
@pytest.mark.parametrize('stream', [False, True], ids=['plain', 'streamed'])
def test_each_turn_reads_the_whole_prefix(n, stream):
    with MessagesServer(lambda body: turns(n, body), min_cache=1) as srv: res = ask(srv, stream=stream)
    assert res.answer == str(n - 1) and len(srv.requests) == n
    check_growth([r['body'] for r in srv.requests]); check_reads(srv.requests)
    assert all(1 <= marks(r['body']) <= 4 and not check_request(r['body']) for r in srv.requests)
    assert numbers(res.usage) == numbers(srv.usage) and res.usage.total.total_cache_read_tokens > 0

def test_from_the_providers_minimum_on():
    "With 1,024 tokens as the least that is kept: from the fourth turn on all is read that was sent before."
    with MessagesServer(lambda body: turns(6, body)) as srv: ask(srv)
    check_reads(srv.requests[2:])

def test_with_the_last_call():
    "When the turns are used up, the call for what there is has the same prefix."
    with MessagesServer(lambda body: 'FINAL(so be it)' if 'run out' in last(body) else turns(99, body), min_cache=1) as srv: res = ask(srv, max_iters=3)
    assert (res.answer, len(srv.requests)) == ('so be it', 4)
    check_growth([r['body'] for r in srv.requests]); check_reads(srv.requests)

@pytest.mark.parametrize('protocol', [PAPER, ANSWER, NANO], ids=lambda o: o.name)
def test_under_each_protocol(protocol):
    with MessagesServer(lambda body: block(PRINTS, protocol.langs[0]), min_cache=1) as srv: ask(srv, protocol=protocol, max_iters=4)
    assert len(srv.requests) == 5
    check_growth([r['body'] for r in srv.requests]); check_reads(srv.requests)

def test_odd_turns():
    "Errors, empty and blank replies, replies without code, two blocks, cut ones, scaffold put back: nothing that was sent changes."
    script = [block('1/0'), '', ' \n', 'Just words.', block('a = 1') + block('print(a)'), 'Cut.\n```repl\nprint(', block('llm_query = 3'), 'FINAL_VAR(nothing)',
        block('print("\ud83d\ude00 \u2028 é")'.encode('utf-16', 'surrogatepass').decode('utf-16')), block('a', then='FINAL_VAR(a)')]
    with MessagesServer(script, faults=[None, '500', None, 'drop', '529'], min_cache=1) as srv: res = ask(srv, max_iters=20)
    assert res.answer == '1' and len(srv.requests) == len(script) + 3
    check_growth([r['body'] for r in srv.requests])
    check_reads([r for r in srv.requests if r['status'] == 200 and not r['fault']])

def family(body):
    "A parent that asks sub-calls and children in each turn; the children have three turns and a sub-call each."
    if not is_turn(body): return 'noted'
    first, i = conversation(body)[1][1], len(body['messages']) // 2
    if 'piece' in first: return turns(3, body) if i != 1 else block(f'r = llm_query("word of " + context)\nx = 1\n{PRINTS}')
    return block(f'c = rlm_query_batched(["piece {i}a", "piece {i}b"])\ns = llm_query_batched(["one", "two"])\nx = {i}\n{PRINTS}', then='FINAL_VAR(c)' if i == 2 else '')

def test_subcalls_are_not_marked_and_children_are():
    with MessagesServer(family, min_cache=1) as srv: res = ask(srv)
    leaves = [r for r in srv.requests if not is_turn(r['body'])]
    assert res.value == ['2', '2'] and len(leaves) == 3 * (2 + 2) and len(res.children) == 6
    assert all(marks(r['body']) == 0 and read(r) == written(r) == 0 for r in leaves)
    runs = runs_of(srv.requests)
    assert sorted(map(len, runs)) == [3] * 7
    for run in runs: check_growth([r['body'] for r in run]); check_reads(run)
    assert all(o.usage.total.total_cache_read_tokens > 0 for o in tree(res))
    assert numbers(res.usage) == numbers(srv.usage)

def test_children_share_the_system_prompt():
    "At one depth it is the same text, so from the second child on it is read."
    with MessagesServer(family, min_cache=1) as srv: ask(srv, limits=dict(max_concurrency=1))
    firsts = [r for r in srv.requests if is_turn(r['body']) and len(r['body']['messages']) == 1][1:]
    assert len({text(r['body']['system']) for r in firsts}) == 1
    assert all(read(r) > 500 for r in firsts[1:])

def test_a_second_question_in_the_same_namespace():
    "It has a conversation of its own, whose first message tells what is there; a later turn reads all of it."
    ns = {}
    with MessagesServer(lambda body: turns(3, body), min_cache=1) as srv:
        ask(srv, ns=ns, query='The first?'); n = len(srv.requests)
        ask(srv, None, ns=ns, query='The second?')
        ask(srv, 'more text', ns=ns, query='The third?')
    for i in (0, n, 2 * n):
        part = srv.requests[i:i + n]
        check_growth([r['body'] for r in part]); check_reads(part)
    firsts = [conversation(srv.requests[i]['body'])[1][1] for i in (0, n, 2 * n)]
    assert 'also holds x' in firsts[1] and '`history`' in conversation(srv.requests[n]['body'])[0][1] and 'context_0' in firsts[2]

def test_variables_do_not_enter_the_system_prompt():
    "The second and the third question of one namespace have the same system prompt, so that is read from the cache at once."
    ns = {}
    with MessagesServer(lambda body: turns(2, body), min_cache=1) as srv:
        for q in ('The first?', 'The second?', 'The third?'): ask(srv, 'some text' if q == 'The first?' else None, ns=ns, query=q)
    a, b = (srv.requests[i] for i in (2, 4))
    assert text(a['body']['system']) == text(b['body']['system']) and read(b) > 500

def test_compaction_starts_a_new_prefix_once():
    def reply(body): return 'x went up to 2.' if 'shortened' in last(body) else turns(99, body)
    with MessagesServer(reply, min_cache=1) as srv: ask(srv, max_iters=5, compaction=.02)
    requests = srv.requests
    at = [i for i, r in enumerate(requests) if 'shortened' in last(r['body'])]
    assert at and len(requests) == 6 + len(at)
    check_growth([r['body'] for r in requests[:at[0]]]); check_reads(requests[:at[0] + 1])
    assert read(requests[at[0] + 1]) > 500 # The system prompt

def test_cache_off():
    with MessagesServer(family, min_cache=1) as srv: res = ask(srv, cache=False)
    assert all(marks(r['body']) == 0 and read(r) == written(r) == 0 for r in srv.requests)
    assert res.usage.total.total_cache_read_tokens == res.usage.total.total_cache_write_tokens == 0
    check_growth([r['body'] for r in max(runs_of(srv.requests), key=len)])

def billed(n, chars, cache):
    with MessagesServer(lambda body: block(f'x = 1\nprint("x" * {chars})', then='FINAL_VAR(x)' if len(body['messages']) // 2 == n - 1 else '')) as srv: ask(srv, cache=cache, max_iters=50)
    return srv.billed

@pytest.mark.parametrize('chars', [0, 2000, 12_000, 20_000])
def test_two_turns_cost_no_more_than_without_cache(chars): assert billed(2, chars, True) <= billed(2, chars, False)

@pytest.mark.parametrize('n, share', [(5, .75), (20, .25), (40, .2)])
def test_many_turns_cost_a_fraction(n, share): assert billed(n, 12_000, True) < share * billed(n, 12_000, False)

def test_runs_side_by_side_do_not_mix_their_usage():
    "Two runs at once, with one LM: each result has its own numbers, and together they are the server's."
    def reply(body):
        if not is_turn(body): return 'noted'
        n = 3 if 'alpha' in conversation(body)[1][1] else 6
        return block(f'r = llm_query_batched(["a", "b"])\nx = 1\n{PRINTS}', then='FINAL_VAR(x)' if len(body['messages']) // 2 == n - 1 else '')
    with MessagesServer(reply, min_cache=1) as srv, ThreadPoolExecutor(2) as ex:
        model = lm(srv)
        results = list(ex.map(lambda q: rlm_run(q, f'text of the {q}', {}, model=model), ['question alpha', 'question omega']))
    assert [numbers(o.usage)[0] for o in results] == [3 * 3, 6 * 3]
    for res, run in zip(results, sorted(runs_of(srv.requests), key=len)):
        got = [sum(f(r) for r in run) for f in (read, written)]
        assert list(numbers(res.usage)[3:]) == got
    total = [sum(o) for o in zip(*(numbers(o.usage) for o in results))]
    assert total == list(numbers(srv.usage))

def test_a_fault_does_not_spoil_the_prefix():
    "Every second request fails once; the same bytes are sent again."
    with MessagesServer(lambda body: turns(4, body), faults=[None, '500'] * 4, min_cache=1) as srv: res = ask(srv)
    assert res.answer == '3'
    check_growth([r['body'] for r in srv.requests])
    for a, b in zip(srv.requests, srv.requests[1:]): assert a['status'] == 200 or a['body'] == b['body']
    check_reads([r for r in srv.requests if r['status'] == 200])
