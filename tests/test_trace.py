"""Logs, stores and replays: what is written is what was said, whoever else writes, and wherever the process ends."""
import asyncio, gzip, json, os, random, sqlite3, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from rlm import ANSWER, NANO, PAPER, ScriptLM, arlm_run, rlm_run
from rlm.lm import ClaudetteLM, FnLM, Reply, Usage
from rlm.testing import MessagesServer
from rlm.trace import CallStore, RunLog, TraceError, context_digest, load_run, replay, rewind, to_public
from common import block, elsewhere, first, forks, in_child, is_turn, posix, script, tree, turn

DATA = Path(__file__).with_name('data')
REAL = Path(os.environ.get('TRAJECTORIES', DATA.parents[2]/'shared'/'data'/'trajectories'))
FIXTURES = pytest.mark.parametrize('name', ['ours.jsonl', 'public.jsonl.gz'])

def raw(path): return [json.loads(o) for o in (gzip.open if path.suffix == '.gz' else open)(path, 'rb')]

# Reading

@FIXTURES
def test_fixtures_say_the_same(name):
    run = load_run(DATA/name)
    assert run.stop == 'answer' and len(run.iterations) == 4 and len(run.iterations[0].code_blocks) == 3
    assert run.iterations[0].code_blocks[1].result.error.startswith('TypeError')
    assert [c.response for c in run.calls[:6]] == [f'Lantern {i}' for i in (1, 2, 3, 5, 6, 0)]
    kid, = run.children
    assert kid.iterations[0].code_blocks[0].result.stdout == '6\n' and 'Lantern 1' in kid.answer

@FIXTURES
def test_fixtures_replay(name):
    theirs = name.startswith('public')
    report = replay(DATA/name, rollback=theirs)
    assert report.same, str(report)
    assert len(report.blocks) == (8 if theirs else 6)
    other = replay(DATA/name, rollback=not theirs)
    assert [b.where for b in other.blocks if not all(b.checks.values())] == ['1.3']

def test_the_whole_prompts_of_the_public_engine_are_rebuilt():
    run, lines = load_run(DATA/'public.jsonl.gz'), raw(DATA/'public.jsonl.gz')
    assert [run.messages(k) for k in range(1, 5)] == [o['prompt'] for o in lines if o['type'] == 'iteration']
    assert sum(len(it.prompt) for it in run.iterations) < sum(len(run.messages(k)) for k in range(1, 5)) / 2

@pytest.mark.skipif(not REAL.exists(), reason='the recorded trajectories are not here')
@pytest.mark.parametrize('key, blocks, without', [('d83aed93', 3, 3), ('3a476735', 7, 7), ('a1c3cdfe', 11, 8), ('5f4c2a91', 1, 1), ('ca262637', 2, 2), ('be4c96ee', 2, 2)])
def test_real_trajectories(key, blocks, without):
    path, = (REAL/'traces').glob(f'*{key}.jsonl.gz')
    context = (REAL/'contexts'/'gene_expression_hits.txt').read_text() if key == '5f4c2a91' else None
    report, plain = replay(path, context, rollback=True), replay(path, context)
    assert report.same and len(report.blocks) == blocks, str(report)
    assert plain.summary() == f'{without} of {blocks} blocks are the same'
    run = load_run(path)
    assert [run.messages(k) for k in range(1, len(run.iterations) + 1)] == [o['prompt'] for o in raw(path) if o['type'] == 'iteration']

def test_a_log_cut_at_any_byte_loses_one_line(tmp_path):
    data, path = (DATA/'ours.jsonl').read_bytes(), tmp_path/'x.jsonl'
    ends = [i + 1 for i,c in enumerate(data) if c == 10]
    for n in sorted({*random.Random(0).sample(range(1, len(data)), 60), *ends, *[o - 1 for o in ends]}):
        path.write_bytes(data[:n])
        whole = sum(o <= n + 1 for o in ends) # A line without its newline is whole too
        if not whole:
            with pytest.raises(TraceError, match='holds no turn'): load_run(path)
        else: assert len(load_run(path).iterations) == min(whole, len(ends) - 1) - 1

def test_a_packed_log_that_ends_early(tmp_path):
    data = (DATA/'public.jsonl.gz').read_bytes()
    for n in (len(data) - 4, len(data) - 8): (tmp_path/'x.gz').write_bytes(data[:n]); assert len(load_run(tmp_path/'x.gz').iterations) == 4
    (tmp_path/'x.gz').write_bytes(data[:-8] + b'\0' * 8)
    with pytest.raises(TraceError): load_run(tmp_path/'x.gz')

@pytest.mark.parametrize('line, says', [('{"type": "iteration", "code_blocks": [3]}', 'is no log of a run'), ('7', 'line 2 is no JSON object'),
    ('{"type": "iter\n{}', 'line 2 is damaged'), ('{"iteration": "x"}\n{"iteration": 3}', 'is no log of a run')])
def test_damage_says_where(tmp_path, line, says):
    (tmp_path/'x.jsonl').write_text('{"type": "metadata"}\n' + line + '\n')
    with pytest.raises(TraceError, match=says): load_run(tmp_path/'x.jsonl')

def test_minimal_logs():
    run = load_run(dict(iterations=[{}, dict(final_answer=['FINAL', 'x'], prompt='q')]))
    assert run.answer == 'x' and run.messages(2)[-1] == dict(role='user', content='q') and run.metadata.root_model == ''
    with pytest.raises(TraceError, match='no turn 3'): run.messages(3)

# Writing

ODD = 'odd \u2028 \x85 \0 \ud800 \U0001f600 "\\ end'
SCRIPTS = dict(
    plain=([block('print(len(context))'), 'FINAL(1)'], {}),
    empty=(['', block('1/0'), '   ', 'FINAL(x)'], {}),
    odd=([block(f'print({ODD!r}, llm_query({ODD!r}))'), f'FINAL({ODD})'], {}),
    over=([block('x = 1')] * 2 + ['FINAL(late)'], dict(max_iters=2)),
    answer=([block('answer["content"] = "a"; answer["ready"] = True')], dict(protocol=ANSWER)),
    nano=([block('print(prompt)', lang='python'), block('Final = [1]', lang='python')], dict(protocol=NANO)),
    typed=([block('FINAL("x")'), block('FINAL(3)')], dict(returns=int)),
    compact=([block('print("w " * 3000)')] * 2 + ['My notes.', block('print("v " * 300)'), 'FINAL(done)'], dict(compaction=.02)),
)

@pytest.mark.parametrize('name', SCRIPTS)
def test_the_log_says_what_the_model_was_sent(tmp_path, name):
    replies, options = SCRIPTS[name]
    sent, todo = [], iter(replies)
    def model(messages):
        if not is_turn(messages): return ODD
        sent.append([dict(m) for m in messages])
        return next(todo)
    res = rlm_run('Q?', 'some text', model=model, log=tmp_path/'x.jsonl', **options)
    run = load_run(tmp_path/'x.jsonl')
    assert [run.messages(k) for k in range(1, len(run.iterations) + 1)] == sent
    assert [o.to_dict() | dict(prompt=0) for o in run.iterations] == [o.to_dict() | dict(prompt=0) for o in res.iterations]
    assert (run.answer, run.stop, run.usage) == (res.answer, res.stop, res.usage)
    assert replay(run, 'some text').same
    public = load_run(to_public(run, tmp_path/'p.jsonl'))
    assert [public.messages(k) for k in range(1, len(sent) + 1)] == sent
    if name == 'compact': assert any(len(b) < len(a) for a, b in zip(sent, sent[1:]))

def test_size_grows_with_the_turns(tmp_path):
    sizes = []
    for n in (20, 40, 80):
        lm = ScriptLM([block(f'v = context[{i}:{i}+500]; print(v)') for i in range(n - 1)] + ['FINAL(done)'])
        rlm_run('Q?', 'abcde fghij ' * 100_000, model=lm, log=tmp_path/f'{n}.jsonl', max_iters=n)
        sizes.append((tmp_path/f'{n}.jsonl').stat().st_size)
    assert sizes[2] - sizes[1] < 2.4 * (sizes[1] - sizes[0]) < 400_000

def test_each_line_is_there_when_its_turn_is_over(tmp_path):
    counts = []
    def model(messages):
        counts.append(len(load_run(tmp_path/'x.jsonl').iterations))
        return block('print(1)') if turn(messages) < 3 else 'FINAL(1)'
    rlm_run('Q?', 'text', model=model, log=tmp_path/'x.jsonl')
    assert counts == [0, 1, 2, 3]

def test_trees(tmp_path):
    lm = tree([block('print(rlm_query_batched(["one", "two", "one"]))'), 'FINAL(root)'], one=[block('print(llm_query("leaf"))'), 'FINAL(1)'], two=[block('print(rlm_query("deep"))'), 'FINAL(2)'],
        deep=[block('print(llm_query("bottom"))'), 'FINAL(3)'])
    res = rlm_run('Q?', 'text', model=lm, log=tmp_path/'x.jsonl', limits=dict(max_depth=3))
    run = load_run(tmp_path/'x.jsonl')
    assert [o.answer for o in run.children] == ['1', '2', '1'] and run.usage == res.usage and run.children[1].children[0].calls[0].response == 'BOTTOM'
    ids = [o.info['run'] for o in [*run.children, *run.children[1].children]]
    assert len(set(ids)) == 4 and ids[3].startswith(ids[1] + '/')
    assert load_run(res).children[1].children[0].calls[0].response == 'BOTTOM'
    assert len(replay(run, 'text').blocks) == 5 and replay(run, 'text').same

def test_a_child_that_fails_is_in_the_log(tmp_path):
    lm = tree([block('print(rlm_query_batched(["one"]))'), 'FINAL(root)'], one=[block('print(1)')])
    rlm_run('Q?', 'text', model=lm, log=tmp_path/'x.jsonl', limits=dict(max_calls=4))
    call, = load_run(tmp_path/'x.jsonl').calls
    assert call.error and len(load_run(call.metadata).iterations) >= 2 and load_run(call.metadata).stop == 'budget'

def test_secrets_stay_out(tmp_path):
    with MessagesServer([block('print(llm_query("hello"))'), 'hi', 'FINAL(1)'], api_key='sk-very-secret') as s:
        lm = ClaudetteLM('test-model', base_url=s.url, api_key='sk-very-secret')
        rlm_run('Q?', 'text', model=lm, log=tmp_path/'x.jsonl', store=tmp_path/'c.db')
    found = b''.join(o.read_bytes() for o in tmp_path.iterdir())
    assert b'hello' in found and b'secret' not in found and s.url.encode() not in found

def test_runs_on_many_threads_share_a_log_and_a_store(tmp_path):
    log, store = RunLog(f'{tmp_path}/logs/'), CallStore(tmp_path/'c.db')
    def model(messages):
        q = first(messages)
        return q.split()[-1] if not is_turn(messages) else block('print(llm_query("say " + context))') if not turn(messages) else 'FINAL_VAR(context)'
    with ThreadPoolExecutor(8) as ex: res = list(ex.map(lambda i: rlm_run(f'Q{i}?', str(i), model=model, log=log, store=store), range(24)))
    runs = {o.info['query']: o for o in map(load_run, (tmp_path/'logs').iterdir())}
    assert len(runs) == 24 and all(runs[f'Q{i}?'].answer == str(i) == r.answer for i, r in enumerate(res))
    assert all(o.calls[0].response == o.answer for o in runs.values()) and len(store) == 24 * 3

def test_async_runs(tmp_path):
    async def model(messages): return block('x = llm_query("p")') if is_turn(messages) and not turn(messages) else 'FINAL(1)'
    async def both(): return await asyncio.gather(*[arlm_run('Q?', 'text', model=model, log=tmp_path/f'{i}.jsonl', store=tmp_path/'c.db') for i in range(4)])
    res = asyncio.run(both())
    assert all(load_run(o.log).answer == '1' for o in res) and len(CallStore(tmp_path/'c.db')) == 3

def test_a_session_of_questions(tmp_path):
    ns = {}
    rlm_run('One?', 'text', ns, model=ScriptLM([block('x = 41'), 'FINAL(1)']), log=RunLog(tmp_path/'', keep_context=True))
    before = {'x': 41, 'context': 'text'}
    rlm_run('Two?', None, ns, model=ScriptLM([block('print(x + 1, len(context))'), 'FINAL(2)']), log=tmp_path/'two.jsonl')
    assert replay(tmp_path/'two.jsonl', ns=before).same and not replay(tmp_path/'two.jsonl', 'text').same
    assert load_run(tmp_path/'two.jsonl').info['context']['sha256'] == context_digest('text')

def test_another_process_writes_the_same_log(tmp_path):
    code = '''
        import sys
        from rlm import rlm_run, ScriptLM
        from rlm.trace import TraceError
        try: print(rlm_run('Q?', 'text', model=ScriptLM(['FINAL(1)']), log=sys.argv[1]).answer)
        except TraceError as e: print('is being written' in str(e))
    '''
    said = []
    def model(messages): said.append(script(code, str(tmp_path/'x.jsonl')).stdout); return 'FINAL(1)' if len(said) > 1 else block('x = 1')
    rlm_run('Q?', 'text', model=model, log=tmp_path/'x.jsonl')
    assert said == ['True\n'] * 2 and load_run(tmp_path/'x.jsonl').stop == 'answer'

@forks
def test_forks_of_a_run(tmp_path):
    log, store = RunLog(tmp_path/'x.jsonl'), CallStore(tmp_path/'c.db')
    def model(messages): return block('pid = fork()') if is_turn(messages) and not turn(messages) else 'FINAL(1)'
    def fork(): # What a block may do: a child with all that the parent holds, which works on its own
        child = ScriptLM(['FINAL(c)', 'FINAL(c)'])
        return in_child(lambda: [rlm_run('In the child?', 'text', model=child, log=tmp_path/'child.jsonl', store=store).answer, len(store)])
    res = rlm_run('Q?', 'text', model=model, log=log, store=store, tools=dict(fork=fork))
    assert res.ns['pid'][0] == 'c' and load_run(tmp_path/'child.jsonl').stop == 'answer'
    assert [o['type'] for o in raw(tmp_path/'x.jsonl')] == ['metadata', 'iteration', 'iteration', 'metadata'] and len(store) == 4

# The store

WORKER = '''
    import sys
    from rlm import rlm_run
    from rlm.trace import CallStore
    asked = []
    def model(messages):
        asked.append(1)
        if messages[0]['role'] == 'user': return messages[0]['content'].upper()
        return 'FINAL_VAR(x)' if len(messages) > 2 else '```repl\\nx = llm_query_batched([f"p{i}" for i in range(40)])\\n```'
    with CallStore(sys.argv[1]) as store: res = rlm_run('Q?', 'text', model=model, store=store)
    print(len(res.value), len(set(res.value)), len(asked) + store.saved.total.total_calls)
'''

def test_processes_share_a_store(tmp_path):
    with ThreadPoolExecutor(4) as ex: res = list(ex.map(lambda i: script(WORKER, str(tmp_path/'c.db')), range(6)))
    assert {(o.stdout, o.stderr) for o in res} == {('40 40 42\n', '')}
    assert len(CallStore(tmp_path/'c.db')) == 42
    assert sqlite3.connect(tmp_path/'c.db').execute('PRAGMA integrity_check').fetchall() == [('ok',)]

@forks
def test_many_processes_make_a_store(tmp_path):
    def use(path, i):
        with CallStore(path) as store: store.record('', i, ScriptLM([]), [], Reply('x', Usage(1)))
    for r in range(40):
        pids, (go, begin) = [], os.pipe()
        for i in range(8):
            if (pid := os.fork()) == 0:
                try: os.close(begin); os.read(go, 1); use(tmp_path/f'{r}.db', i); os._exit(0)
                finally: os._exit(1)
            pids.append(pid)
        os.close(go); os.close(begin) # Now all begin at once
        assert [os.waitpid(o, 0)[1] for o in pids] == [0] * 8 and len(CallStore(tmp_path/f'{r}.db')) == 8

def test_a_busy_writer_is_waited_for(tmp_path):
    store = CallStore(tmp_path/'c.db')
    db = sqlite3.connect(tmp_path/'c.db', isolation_level=None, check_same_thread=False)
    db.execute('BEGIN IMMEDIATE')
    threading.Timer(.2, lambda: db.execute('COMMIT')).start()
    store.record('', 0, ScriptLM([]), [], Reply('x', Usage(1)))
    assert store.lookup('', 0, ScriptLM([]), []).text == 'x'

def test_replies_come_back_whole(tmp_path):
    store, lm = CallStore(tmp_path/'c.db'), ScriptLM([], name='m')
    reply, msgs = Reply(ODD, Usage(1, 2, 3, None, 4, 5), 'max_tokens', 'other name'), [dict(role='user', content=ODD)]
    store.record('/a.0', 1, lm, msgs, reply)
    store.close()
    assert store.lookup('/a.0', 1, lm, msgs) == reply == CallStore(tmp_path/'c.db').lookup('/a.0', 1, lm, msgs)
    for scope, n, model, content in (('', 1, 'm', ODD), ('/a.0', 0, 'm', ODD), ('/a.0', 1, 'n', ODD), ('/a.0', 1, 'm', 'x')):
        assert store.lookup(scope, n, ScriptLM([], name=model), [dict(role='user', content=content)]) is None

@pytest.mark.parametrize('at', [0, 30, 4096])
def test_a_corrupt_store_says_so(tmp_path, at):
    with CallStore(tmp_path/'c.db') as store:
        for i in range(50): store.record('', i, ScriptLM([]), [], Reply('x' * 2000))
    data = bytearray((tmp_path/'c.db').read_bytes()); data[at:at + 4000] = os.urandom(4000)
    (tmp_path/'c.db').write_bytes(data)
    with pytest.raises(TraceError, match='name another file'):
        broken = CallStore(tmp_path/'c.db')
        for i in range(50): broken.lookup('', i, ScriptLM([]), [])

def test_a_hit_does_not_count(tmp_path):
    def model(messages): return block('x = llm_query_batched(["a", "b", "a"])') if is_turn(messages) and not turn(messages) else 'FINAL(1)'
    kw = dict(model=FnLM(model, price=(1, 1, 1, 1)), store=tmp_path/'c.db')
    one = rlm_run('Q?', 'text', **kw)
    two = rlm_run('Q?', 'text', limits=dict(max_calls=1, max_cost=1e-9), **kw)
    assert one.usage.total.total_calls == 5 and two.answer == '1' and two.usage.total.total_calls == 0 and two.cost == 0

# What is no log and no store

FOREIGN = dict(note=b'my only note\n', half=b'no line end', binary=bytes(range(256)), array=b'[]', empty_array=b'[\n', object=b'{}\n', broken=b'{"type": "iter', csv=b'a,b\n1,2\n', gz=gzip.compress(b'x'))

@pytest.mark.parametrize('name', FOREIGN)
def test_a_file_that_is_no_log_is_left_as_it_is(tmp_path, name):
    path = tmp_path/'note.txt'; path.write_bytes(FOREIGN[name])
    with pytest.raises(TraceError, match='note.txt'): rlm_run('Q?', 'text', model=ScriptLM(['FINAL(1)']), log=path)
    assert path.read_bytes() == FOREIGN[name]

@pytest.mark.parametrize('about', [dict(query='Other?'), dict(query='Q?', stop='answer')])
def test_another_run_keeps_even_its_half_line(tmp_path, about):
    path = tmp_path/'x.jsonl'
    path.write_text(json.dumps(dict(type='metadata') | about) + '\n{"type": "iter')
    before = path.read_bytes()
    with pytest.raises(TraceError, match='holds a'): rlm_run('Q?', 'text', model=ScriptLM(['FINAL(1)']), log=path)
    assert path.read_bytes() == before

def test_half_a_first_line_is_begun_anew(tmp_path):
    (tmp_path/'x.jsonl').write_text('{"type": "metadata", "root_mo')
    assert rlm_run('Q?', 'text', model=ScriptLM(['FINAL(1)'] * 2), log=tmp_path/'x.jsonl').answer == '1' == load_run(tmp_path/'x.jsonl').answer

@posix
def test_a_pipe_or_a_device_is_no_log(tmp_path):
    os.mkfifo(tmp_path/'pipe')
    for path in (tmp_path/'pipe', Path('/dev/zero'), Path('/dev/full')):
        for f in (lambda: rlm_run('Q?', 'text', model=ScriptLM(['FINAL(1)']), log=path), lambda: load_run(path)):
            with pytest.raises(TraceError, match='is not a regular file'): elsewhere(f)

@pytest.mark.parametrize('option', ['log', 'store'])
def test_an_empty_name_is_no_file(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TraceError, match='is empty'): rlm_run('Q?', 'text', model=ScriptLM(['FINAL(1)']), **{option: ''})
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('made', ['CREATE TABLE notes (text)', 'CREATE TABLE calls (name, number)', 'PRAGMA application_id=7'])
def test_the_database_of_another_program_is_left_as_it_is(tmp_path, made):
    with sqlite3.connect(tmp_path/'x.db') as db: db.execute(made)
    db.close()
    before = (tmp_path/'x.db').read_bytes()
    with pytest.raises(TraceError, match='another program'): rlm_run('Q?', 'text', model=ScriptLM(['FINAL(1)']), store=tmp_path/'x.db')
    assert (tmp_path/'x.db').read_bytes() == before and [o.name for o in tmp_path.iterdir()] == ['x.db']

def test_a_store_without_a_mark_is_taken(tmp_path):
    with CallStore(tmp_path/'x.db') as store: store.record('', 0, ScriptLM([]), [], Reply('x', Usage(1)))
    db = sqlite3.connect(tmp_path/'x.db')
    assert db.execute('PRAGMA application_id').fetchone()[0]
    db.execute('PRAGMA application_id=0'); db.close()
    before = (tmp_path/'x.db').read_bytes()
    with CallStore(tmp_path/'x.db') as store: assert store.lookup('', 0, ScriptLM([]), []).text == 'x'
    assert (tmp_path/'x.db').read_bytes() == before # To read it changes nothing

@pytest.mark.parametrize('reply', ['{}', 'garbage', 'null', '[]', '3', '{"text": 3, "usage": {}, "stop_reason": "end_turn", "model": "m"}', '{"text": "x", "usage": {"total_calls": "y"}, "stop_reason": "", "model": "m"}',
    '{"text": "x", "usage": [], "stop_reason": "", "model": "m"}'])
def test_a_damaged_reply_names_its_store(tmp_path, reply):
    with CallStore(tmp_path/'c.db') as store:
        store.record('', 0, ScriptLM([]), [], Reply('x', Usage(1)))
        store._db.execute('UPDATE calls SET reply=?', [reply])
        with pytest.raises(TraceError, match='c.db holds a damaged reply'): store.lookup('', 0, ScriptLM([]), [])

def put(o, path, v):
    *way, last = path
    for k in way: o = o[k]
    if v is KeyError: del o[last]
    else: o[last] = v

BLOCK = 'code_blocks', 0
@pytest.mark.parametrize('path, v, says', [((*BLOCK, 'code'), 3, 'code_blocks 1: code'), (('prompt',), 3, 'prompt'), (('prompt', 0), None, 'prompt 1'), (('prompt', 0, 'content'), KeyError, 'content'),
    (('response',), None, 'response'), ((*BLOCK, 'result', 'stdout'), 3, 'stdout'), ((*BLOCK, 'result', 'rlm_calls'), {}, 'rlm_calls'), ((*BLOCK, 'result', 'rlm_calls', 0), 3, 'rlm_calls 1'),
    ((*BLOCK, 'result', 'rlm_calls', 0, 'response'), [], 'response'), ((*BLOCK, 'result', 'locals'), [], 'locals'), (('usage',), 3, 'usage'), (('usage',), dict(model_usage_summaries=dict(m=dict(total_calls='x'))), 'total_calls'), (('usage',), dict(model_usage_summaries=dict(m=dict(total_calls=None))), 'total_calls'),
    (('iteration',), 'x', 'iteration'), ((*BLOCK, 'lang'), 3, 'lang'), ((*BLOCK, 'result', 'notes'), 3, 'notes'), ((*BLOCK, 'result', 'rlm_calls', 0, 'metadata'), dict(iterations=[None]), 'iterations 1')])
def test_damaged_contents_are_named(tmp_path, path, v, says):
    lines = raw(DATA/'ours.jsonl')
    put(lines[3], path, v)
    (tmp_path/'x.jsonl').write_text(''.join(json.dumps(o) + '\n' for o in lines))
    with pytest.raises(TraceError, match=f'x.jsonl is no log of a run: line 4.*{says}'): load_run(tmp_path/'x.jsonl')
    with pytest.raises(TraceError, match=says): load_run(dict(run_metadata=None, iterations=lines[1:-1]))

@pytest.mark.parametrize('run, says', [(dict(run_metadata=None, iterations=[None]), 'iterations 1'), (dict(run_metadata=[], iterations=[]), 'run_metadata'), (dict(run_metadata=dict(limits=3), iterations=[]), 'limits'), (dict(iterations=3), 'iterations')])
def test_damaged_trajectories_are_named(run, says):
    with pytest.raises(TraceError, match=says): load_run(run)

FULL = '''
import resource, signal, sys, warnings
from rlm import rlm_run
asked = []
def model(msgs):
    asked.append(1)
    n = sum(m['role'] == 'assistant' for m in msgs)
    return f"```repl\\nprint({n} + len(context))\\n```" + 'x' * 9000 if n < 3 else 'FINAL(1)'
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY)) # A file cannot grow further, as on a full disk
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    try: print(rlm_run('Q?', 'text', model=model, log=sys.argv[1]).answer)
    except ValueError as e: print(type(e).__name__, str(e).partition('cannot')[2])
print(len(asked), [str(o.message).partition('x.jsonl ')[2] for o in said])
'''

@posix
@pytest.mark.parametrize('size, answer, asked, says', [(100, 'TraceError  be written (File too large); name another file', 0, []), (22_000, '1', 4, ['is incomplete from turn 2 on: File too large'])])
def test_a_full_disk(tmp_path, size, answer, asked, says):
    log = tmp_path/'x.jsonl'
    res = script(FULL, str(log), str(size))
    assert res.stdout == f'{answer}\n{asked} {says}\n', res.stderr
    if asked: assert load_run(log).stop is None and len(load_run(log).iterations) == 1 # Half a line at its end, which is mended
    else: assert not log.stat().st_size
    assert rlm_run('Q?', 'text', model=FnLM(lambda m: 'FINAL(2)', name='model'), log=log).answer == '2'

@posix
def test_a_context_that_cannot_be_kept_ends_the_run(tmp_path):
    res = script('''
        import resource, signal, sys
        from rlm import ScriptLM, rlm_run
        from rlm.trace import RunLog, TraceError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
        try: rlm_run('Q?', 'x' * 9999, model=ScriptLM([]), log=RunLog(sys.argv[1], keep_context=True))
        except TraceError as e: print(e)
    ''', str(tmp_path/'x.jsonl'))
    assert 'the context cannot be kept' in res.stdout and 'File too large' in res.stdout and res.stderr == ''
    assert [o.name for o in tmp_path.iterdir()] == ['x.jsonl'] and not (tmp_path/'x.jsonl').stat().st_size

# Going back

def test_a_branch_of_a_branch(tmp_path):
    def model(messages): return [block('x = 1'), block('x += 1'), block('print(x)'), 'FINAL_VAR(x)'][turn(messages)]
    rlm_run('Q?', 'text', model=model, log=tmp_path/'a.jsonl')
    one = rewind(tmp_path/'a.jsonl', 2, 'text', model=model, code='x += 10', log=tmp_path/'b.jsonl')
    two = rewind(one.log, 3, 'text', model=model, changes=dict(x=100), log=tmp_path/'c.jsonl')
    assert (one.answer, two.answer) == ('11', '100')
    assert [load_run(tmp_path/f'{o}.jsonl').info.get('parent', {}).get('turn') for o in 'abc'] == [None, 2, 3]
    assert load_run(tmp_path/'a.jsonl').answer == '2' and all(replay(tmp_path/f'{o}.jsonl', 'text').same for o in 'ab')

def test_going_back_pays_for_no_recorded_sub_call(tmp_path):
    asked = []
    def model(messages):
        if not is_turn(messages): asked.append(messages[0]['content']); return f'reply {len(asked)}'
        return [block('a = llm_query("p"); b = rlm_query("child")'), block('c = llm_query("q"); print(a, b, c)'), 'FINAL(done)'][turn(messages)]
    lm = FnLM(model, 'one')
    rlm_run('Q?', 'text', model=lm, log=tmp_path/'a.jsonl', limits=dict(max_depth=1))
    assert asked == ['p', 'child', 'q']
    rewind(tmp_path/'a.jsonl', 1, 'text', model=FnLM(model, 'two'), log=tmp_path/'b.jsonl', limits=dict(max_depth=1))
    assert asked == ['p', 'child', 'q', 'q']

def test_the_log_of_a_later_question_names_the_context_that_lies_elsewhere(tmp_path):
    from kinds import new_ns
    from rlm.trace import context_digest
    with new_ns('process') as ns:
        for i in 'ab': rlm_run('Q?', 'some text' if i == 'a' else None, ns, model=ScriptLM([block('1'), 'FINAL(1)']), log=tmp_path/f'{i}.jsonl')
    assert load_run(tmp_path/'b.jsonl').info['context'] == dict(type='str', length=9, sha256=context_digest('some text'))

@pytest.mark.parametrize('kw, says', [(dict(k='2'), '`k` must be an int'), (dict(k=True), '`k` must be an int'), (dict(k=1.), '`k` must be an int'), (dict(k=1, code=3), '`code` must be'), (dict(k=1, code={'1': 'x'}), '`code` must be'),
    (dict(k=1, code={1: 2}), '`code` must be'), (dict(k=1, changes=[1]), '`changes` must be'), (dict(k=0), 'no turn 0')])
def test_what_rewind_cannot_take(tmp_path, kw, says):
    with pytest.raises(TraceError, match=says): rewind(DATA/'ours.jsonl', model=ScriptLM([]), log=tmp_path/'x.jsonl', **kw)
    assert not list(tmp_path.iterdir())
