"""A process that is killed while it works is started again, and pays for nothing twice."""
import asyncio, json, os, random, signal, sqlite3, subprocess, sys, threading, time
from collections import Counter
import pytest
from rlm._rlmpaper_compat import UsageSummary
from rlm.core import request_digest, rlm_iter, rlm_run
from rlm.lm import LMError
from rlm.testing import MessagesServer
from rlm.trace import CallStore, RunLog, TraceError, _recorded_calls, load_run, replay, resume
from common import HANG, block, environment, forks, first, is_turn, script, turn

MODEL, CONTEXT, QUERY = 'claude-sonnet-4-5', 'one two three ' * 50, 'What is in it?'
ROOT = [block('parts = [context[i:i+100] for i in range(0, 600, 100)]\nsaid = llm_query_batched([f"Part {i}: {o}" for i, o in enumerate(parts)])\nprint(len(said))'),
    block('kids = rlm_query_batched(["Child A: look", "Child B: look", "Child B: look"])\nprint(sorted(kids))'),
    block('last = llm_query("Last")\nprint(last)\n1/0'),
    'FINAL_VAR(last)']
CHILD = [block('x = llm_query_batched([context[:7] + " first", context[:7] + " second", "same", "same"])\nprint(len(x))'), 'FINAL(found)']

# A process that has everything imported forks one that works for each line it reads, and says how that one ended.
WORKER = '''
import json, os, sys
from rlm.core import rlm_run
from rlm.providers import ClaudetteLM, claudette_client
from rlm.trace import resume
import anthropic, rlm.limits, rlm.trace
claudette_client()
for line in sys.stdin:
    d = json.loads(line)
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(w); os.read(r, 1) # Until it may begin
        lm = ClaudetteLM(d['model'], base_url=d['url'], api_key='secret-key', max_tokens=d['life'])
        if d['how'] == 'resume': res = resume(d['log'], d['context'], model=lm, store=d['store'])
        else: res = rlm_run(d['query'], d['context'], model=lm, log=d['log'], store=d['store'])
        with open(d['out'], 'w') as f: json.dump(dict(answer=res.answer, calls=res.usage.total.total_calls), f)
        os._exit(0)
    os.close(r)
    print(pid, flush=True); sys.stdin.readline()
    os.close(w)
    print(os.waitpid(pid, 0)[1], flush=True)
'''

def as_msgs(body):
    "A request as the messages that it was made of."
    text = lambda c: ''.join(o['text'] for o in c)
    sp = [dict(role='system', content=text(body['system']))] if body.get('system') else []
    return sp + [dict(role=m['role'], content=text(m['content'])) for m in body['messages']]

class Bench:
    "A server, a process that forks workers, and what the server has seen."
    def __init__(self):
        self.server, self.life = MessagesServer(self.reply, keep=0), 1000
        self.proc = subprocess.Popen([sys.executable, '-c', WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
        self.begin()
    def begin(self, at=None, mode=None):
        "The next process. What a killed one had sent may arrive yet; `max_tokens` tells whose a request is."
        self.seen, self.at, self.mode, self.life = [], at, mode, self.life + 1
    def reply(self, body):
        msgs = as_msgs(body)
        if body['max_tokens'] != self.life: return 'too late'
        self.seen.append(request_digest(body['model'], msgs))
        if len(self.seen) == self.at:
            if self.mode == 'seen': os.kill(self.pid, signal.SIGKILL)
            else: asyncio.get_running_loop().call_soon(os.kill, self.pid, signal.SIGKILL) # After the answer is on its way
        if 'system' not in body: return f'reply {len(self.seen)}' if msgs[0]['content'] == 'same' else msgs[0]['content'].upper()
        turns = CHILD if 'Child' in msgs[1]['content'] else ROOT
        return turns[sum(m['role'] == 'assistant' for m in msgs)]
    def work(self, folder, how='run', store=True):
        "Let one process work to its end: its exit status and what it found."
        d = dict(model=MODEL, life=self.life, url=self.server.url, how=how, log=f'{folder}/run.jsonl', store=f'{folder}/calls.db' if store else None,
            context=CONTEXT, query=QUERY, out=f'{folder}/out.json')
        self.say(json.dumps(d))
        self.pid = int(self.proc.stdout.readline())
        self.say('go')
        killer = threading.Timer(HANG * 4, os.kill, [self.pid, signal.SIGKILL]); killer.start()
        status = int(self.proc.stdout.readline()); killer.cancel()
        return status, json.load(open(d['out'])) if status == 0 else None
    def say(self, line): self.proc.stdin.write(line + '\n'); self.proc.stdin.flush()
    def close(self): self.proc.stdin.close(); self.proc.wait(HANG); self.server.close()

@pytest.fixture(scope='module')
def bench():
    b = Bench()
    yield b
    b.close()

@pytest.fixture(scope='module')
def whole(bench, tmp_path_factory):
    "What a run asks that nobody kills: how often each request."
    folder = tmp_path_factory.mktemp('whole')
    bench.begin()
    status, res = bench.work(folder)
    assert (status, res['answer'], res['calls']) == (0, 'LAST', len(bench.seen))
    return Counter(bench.seen)

def recorded(folder):
    "How often the store holds each request; read with nothing but sqlite."
    path = folder/'calls.db'
    if not path.exists(): return Counter()
    with sqlite3.connect(path) as db:
        if not db.execute("SELECT count(*) FROM sqlite_master WHERE name='calls'").fetchone()[0]: return Counter()
        return Counter(o for o, in db.execute('SELECT request FROM calls'))

def check_log(folder):
    run = load_run(folder/'run.jsonl')
    assert run.answer == 'LAST' and run.stop == 'answer' and len(run.iterations) == 4 and not run.branches and len(run.children) == 3
    return run

POINTS = [(random.Random(i).randint(1, 29), random.Random(i).choice(['seen', 'sent']), ['run', 'resume'][i % 2]) for i in range(50)]

@forks
@pytest.mark.parametrize('at, mode, how', POINTS)
def test_killed(bench, whole, tmp_path, at, mode, how):
    bench.begin(at, mode)
    status, _ = bench.work(tmp_path)
    assert status == signal.SIGKILL
    kept, before = recorded(tmp_path), Counter(bench.seen)
    assert before.total() - kept.total() <= 12 # What is under way at a time: three children with four calls each
    bench.begin()
    if not (tmp_path/'run.jsonl').exists(): how = 'run' # Killed before it had a log
    status, res = bench.work(tmp_path, how)
    assert status == 0 and res['answer'] == 'LAST'
    assert Counter(bench.seen) == whole - kept # Nothing that was kept is asked again, and all else is
    assert res['calls'] == len(bench.seen)
    check_log(tmp_path)
    assert not any(b'secret-key' in o.read_bytes() or b'127.0.0.1' in o.read_bytes() for o in tmp_path.iterdir())

@forks
@pytest.mark.parametrize('at, how', [(1, 'run'), (4, 'resume'), (8, 'run'), (20, 'resume'), (27, 'resume'), (28, 'run'), (29, 'resume')])
def test_killed_without_a_store(bench, whole, tmp_path, at, how):
    bench.begin(at, 'seen')
    assert bench.work(tmp_path, store=False)[0] == signal.SIGKILL
    logged = Counter(request_digest(model, msgs) for _, model, msgs, _ in _recorded_calls(load_run(tmp_path/'run.jsonl')))
    assert logged.total() >= {1: 0, 4: 0, 8: 7, 20: 7, 27: 26, 28: 26, 29: 28}[at] # The turns that were over
    bench.begin()
    status, res = bench.work(tmp_path, how, store=False)
    assert status == 0 and res['answer'] == 'LAST' and Counter(bench.seen) == whole - logged
    check_log(tmp_path)

# Ways to end early, in one process

ASKED = []
def model(messages):
    ASKED.append(first(messages) if is_turn(messages) else messages[0]['content'])
    if not is_turn(messages): return messages[0]['content'].lower()
    return [block('a = llm_query("A")'), block('b = llm_query("B")\nprint(b)'), 'FINAL_VAR(b)'][turn(messages)]

@pytest.fixture(autouse=True)
def nothing_asked(): ASKED.clear()

def test_an_unfinished_iterator_is_gone_on_with(tmp_path):
    steps = rlm_iter('Q?', 'text', model=model, log=tmp_path/'x.jsonl')
    next(steps); steps.close()
    assert load_run(tmp_path/'x.jsonl').stop == 'interrupted' and len(ASKED) == 2
    assert resume(tmp_path/'x.jsonl', 'text', model=model).answer == 'b' and len(ASKED) == 5
    run = load_run(tmp_path/'x.jsonl')
    assert (run.stop, len(run.iterations), run.branches) == ('answer', 3, []) and run.usage.total.total_calls == 5

def test_ctrl_c_in_a_block(tmp_path):
    res = script('''
        import os, signal, sys
        from rlm import rlm_run, ScriptLM
        lm = ScriptLM(['```repl\\nx = llm_query("A")\\n```', 'a', '```repl\\ny = llm_query("B")\\nimport os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(600)\\n```', 'b'])
        try: rlm_run('Q?', 'text', model=lm, log=sys.argv[1])
        except KeyboardInterrupt as e: print(e.result.stop)
    ''', str(tmp_path/'x.jsonl'))
    assert res.stdout == 'interrupted\n', res.stderr
    run = load_run(tmp_path/'x.jsonl')
    assert run.stop == 'interrupted' and [o['cut'] for o in run._lines] == [False, True]
    assert [c.response for c in run.calls] == ['a', 'b'] and 'KeyboardInterrupt' in run.iterations[1].code_blocks[0].result.error

def test_a_model_that_fails_and_comes_back(tmp_path):
    down = [True]
    def flaky(messages):
        if down[0] and is_turn(messages) and turn(messages) == 2: raise LMError('the network is down')
        return model(messages)
    log, store = tmp_path/'x.jsonl', tmp_path/'c.db'
    with pytest.raises(LMError): rlm_run('Q?', 'text', model=flaky, log=log, store=store)
    assert load_run(log).stop == 'errors' and len(ASKED) == 4
    down.clear(); down.append(False)
    assert rlm_run('Q?', 'text', model=flaky, log=log, store=store).answer == 'b'
    assert len(ASKED) == 5 and len(load_run(log).iterations) == 3

def test_what_is_not_the_same_the_second_time_makes_a_branch(tmp_path):
    marks = iter('xyz')
    def marking(messages): return block('print(mark())') if not turn(messages) else 'FINAL(done)'
    kw = dict(model=marking, log=tmp_path/'y.jsonl', tools=dict(mark=lambda: next(marks)))
    steps = rlm_iter('Q?', 'text', **kw); next(steps); steps.close()
    assert rlm_run('Q?', 'text', **kw).answer == 'done'
    run = load_run(tmp_path/'y.jsonl')
    outs = [o[0].code_blocks[0].result.stdout for o in (run.iterations, *run.branches)]
    assert outs == ['y\n', 'x\n'] and len(run.iterations) == 2

def test_the_context_that_was_kept(tmp_path):
    log = RunLog(tmp_path/'x.jsonl', keep_context=True)
    steps = rlm_iter('Q?', 'text', model=model, log=log); next(steps); steps.close()
    assert resume(tmp_path/'x.jsonl', model=model).answer == 'b'
    assert replay(tmp_path/'x.jsonl').same

@pytest.mark.parametrize('change, says', [(dict(context='other'), 'not the context'), (dict(max_iters=4), 'max_iterations'), (dict(model=lambda m: ''), 'model')])
def test_another_run_is_not_gone_on_with(tmp_path, change, says):
    steps = rlm_iter('Q?', 'text', model=model, log=tmp_path/'x.jsonl'); next(steps); steps.close()
    before = (tmp_path/'x.jsonl').read_bytes()
    with pytest.raises(TraceError, match=says): resume(tmp_path/'x.jsonl', **dict(dict(context='text', model=model), **change))
    assert (tmp_path/'x.jsonl').read_bytes() == before

def test_compaction_comes_at_the_same_turn_again(tmp_path):
    "A reply from the log has its size, so that what was summarized is summarized again."
    log = tmp_path/'run.jsonl'
    def model(msgs): return 'Notes: x is 1.' if 'about to be shortened' in msgs[-1]['content'] else block('x = 1\nprint("o" * 400)') if turn(msgs) < 3 else 'FINAL(done)'
    steps = rlm_iter(QUERY, CONTEXT, model=model, max_iters=6, compaction=.006, log=log)
    turns = [next(steps) for _ in range(3)]
    steps.close()
    assert any('were replaced by these notes' in str(o.notes) for o in turns)
    res = resume(log, CONTEXT, model=model, compaction=.006)
    assert load_run(log).branches == [] and len(res.iterations) > 3

def test_the_numbers_of_blocks_are_no_part_of_a_request(tmp_path):
    "A prompt with a traceback in it is the same in a process that has run more blocks; two such prompts of one run are two."
    asked, error = [], 'import traceback\ntry: 1/0\nexcept Exception: said = traceback.format_exc()\n'
    def model(msgs):
        if not is_turn(msgs): asked.append(msgs[0]['content']); return f'reply {len(asked)}'
        if 'Child' in first(msgs): return [block('llm_query("leaf")'), 'FINAL(c)'][turn(msgs)]
        return [block(error + 'print(llm_query(said))'), block(error + 'print(llm_query(said))'), block(error + 'print(rlm_query("Child: " + said))'), 'FINAL(x)'][turn(msgs)]
    def go(**kw): return [it.code_blocks[0].result.stdout for it in rlm_run('Q?', 'text', model=model, **kw).iterations[:3]]
    assert go(store=tmp_path/'c.db') == ['reply 1\n', 'reply 2\n', 'c\n'] and len(asked) == 3
    assert go(store=tmp_path/'c.db') == ['reply 1\n', 'reply 2\n', 'c\n'] and len(asked) == 3

class Slow:
    "A store that notes how many use it at a time."
    def __init__(self): self.now, self.most, self.lock = 0, 0, threading.Lock()
    def use(self, *args):
        with self.lock: self.now += 1; self.most = max(self.most, self.now)
        time.sleep(.001)
        with self.lock: self.now -= 1
    lookup = record = use

def test_a_store_is_asked_by_as_many_as_may_call():
    store = Slow()
    res = rlm_run('Q?', 'text', store=store, limits=dict(max_concurrency=4),
        model=lambda m: m[0]['content'] if not is_turn(m) else [block('x = llm_query_batched([str(i) for i in range(200)])'), 'FINAL_VAR(x)'][turn(m)])
    assert res.value == [str(i) for i in range(200)] and store.most <= 4

def test_a_run_that_does_not_start_leaves_no_store_open(tmp_path):
    from rlm.trace import _open
    before = {id(o) for o in _open}
    with pytest.raises(ValueError, match='no context') as e: rlm_run('Q?', model=model, store=tmp_path/'c.db') # `e` keeps what the garbage collector would close
    assert e and not [o for o in list(_open) if id(o) not in before and isinstance(o, CallStore) and o._db]

# What it cost

KILLED = '''
import os, sys
from rlm.core import rlm_run
def model(msgs):
    if msgs[0]['role'] != 'system': return msgs[0]['content'].upper()
    return ['```repl\\nx = llm_query_batched([str(i) for i in range(8)])\\nstop()\\n```', '```repl\\ny = llm_query_batched([str(i) for i in range(8, 16)])\\n```', 'FINAL(done)'][sum(m['role'] == 'assistant' for m in msgs)]
log, store, how = sys.argv[1:]
res = rlm_run('Q?', 'text', model=model, log=log, store=store, tools=dict(stop=lambda: os._exit(9) if how == 'kill' else None))
print(res.usage.total.total_calls)
'''

def test_what_a_killed_turn_had_cost_is_in_the_log(tmp_path):
    args = str(tmp_path/'x.jsonl'), str(tmp_path/'c.db')
    for _ in range(2): assert script(KILLED, *args, 'kill').returncode == 9 # The second one pays for nothing
    assert script(KILLED, *args, 'no').stdout == '10\n'
    run = load_run(args[0])
    assert run.usage.total.total_calls == len(CallStore(args[1])) == 19
    assert run.usage == sum([it.usage for it in run.iterations] + [c.usage_summary for c in run.calls], UsageSummary()) # As the view counts its turns

def test_what_is_in_log_and_store_counts_once(tmp_path):
    kw = dict(model=model, log=tmp_path/'x.jsonl', store=tmp_path/'c.db')
    for _ in range(2):
        steps = rlm_iter('Q?', 'text', **kw); next(steps); steps.close()
        assert load_run(tmp_path/'x.jsonl').usage.total.total_calls == 2
    assert rlm_run('Q?', 'text', **kw).usage.total.total_calls == 3 and load_run(tmp_path/'x.jsonl').usage.total.total_calls == 5

def test_an_end_has_all_that_was_paid(tmp_path):
    "The turn that was under way is in the log, in the store, and in the sums of the log's end, and counts once."
    kw = dict(model=model, log=tmp_path/'x.jsonl', store=tmp_path/'c.db', on_event=lambda e: stop(e))
    def stop(e):
        if hold and (e.kind, e.phase) == ('block', 'start'): raise KeyboardInterrupt
    hold = True
    with pytest.raises(KeyboardInterrupt): rlm_run('Q?', 'text', **kw)
    run = load_run(tmp_path/'x.jsonl')
    assert run.stop == 'interrupted' and run.usage.total.total_calls == len(CallStore(tmp_path/'c.db')) == 1
    hold = False
    assert rlm_run('Q?', 'text', **kw).usage.total.total_calls == 4
    assert load_run(tmp_path/'x.jsonl').usage.total.total_calls == len(CallStore(tmp_path/'c.db')) == 5

def test_a_run_from_the_store_says_what_it_had_cost(tmp_path):
    first, again = (rlm_run('Q?', 'text', model=model, log=tmp_path/f'{i}.jsonl', store=tmp_path/'c.db') for i in range(2))
    assert again.usage.total.total_calls == 0 and load_run(again.log).usage == load_run(first.log).usage == first.usage
