"""Runs as notebooks: valid, run for real in a kernel, equal to what was recorded, and nothing of a log in them acts by itself."""
import re
from pathlib import Path
import nbclient, nbconvert, nbformat, pytest
from rlm import ANSWER, NANO, ScriptLM, rlm_run
from rlm.display import to_notebook
from rlm.trace import RunLog, TraceError, replay
from common import block

SHARED = Path(__file__).parents[2]/'shared/data/trajectories'
TRACES = sorted(SHARED.glob('traces/*.jsonl.gz'))

def shown(cell): # (printed and displayed text, name of the error)
    text = ''.join(o.text if o.output_type == 'stream' else o.data['text/plain'] + '\n' for o in cell.outputs if o.output_type == 'execute_result' or o.get('name') == 'stdout')
    return text, next((o.ename for o in cell.outputs if o.output_type == 'error'), None)

def read(path):
    nb = nbformat.read(path, 4)
    nbformat.validate(nb)
    assert (nb.nbformat, nb.nbformat_minor) == (4, 5) and len({c.id for c in nb.cells}) == len(nb.cells)
    return nb

def execute(path): # (cells as recorded, cells as they run now), the three at the head left out
    nb = read(path)
    was = [shown(c) for c in nb.cells if c.cell_type == 'code'][3:]
    nbclient.NotebookClient(nb, kernel_name='python3', timeout=600, resources=dict(metadata=dict(path=str(path.parent)))).execute()
    return was, [shown(c) for c in nb.cells if c.cell_type == 'code'][3:], nb

def below(msgs):
    if msgs[0]['role'] != 'system': return msgs[-1]['content'].upper()
    return 'FINAL_VAR(x)' if len(msgs) > 2 else block('x = llm_query("inner " + context)')

TURNS = ['Look.\n' + block('print(len(context), context[:3])\nreplies = llm_query_batched(["a", "b", "a"])\nreplies') +
    block('kid = rlm_query("task")\nprint(kid)'),
    'Fail.\n' + block('half = 1\nprint("before")\nundefined') + block('print(half)\nclass A:\n    n = 3\nA.n'),
    block('result = f"{kid}: é\\u2028 {len(replies)}"'), 'FINAL_VAR(result)']

@pytest.mark.parametrize('form', ['result', 'log'])
def test_it_runs_and_says_the_same(tmp_path, form):
    log = tmp_path/'logs'/'run.jsonl'
    res = rlm_run('What is it?', 'a text\r\nof two lines é', model=ScriptLM(TURNS), sub_model=ScriptLM(below), log=RunLog(log, keep_context=True))
    path = to_notebook(res if form == 'result' else log, tmp_path/'run.ipynb')
    was, now, nb = execute(path)
    assert was == now and [e for _, e in now] == [None, None, 'NameError', None, None, None]
    assert now[0][0].startswith('22 a t') and now[1][0] == 'INNER TASK\n' and now[3][0] == '1\n3\n' and now[-1][0] == res.answer + '\n'
    assert (next(tmp_path.glob('context-*.txt'))).read_bytes() == 'a text\r\nof two lines é'.encode()
    assert res.answer.split()[0] in ''.join(nb.cells[-1].source)

@pytest.mark.parametrize('context', ['text', b'\x00\xff', ['a', {'b': 1}], dict(a='x', b=[1.5, None]), 'half \ud800'])
def test_contexts_come_back_as_they_were(tmp_path, context):
    res = rlm_run('What?', context, model=ScriptLM([block('print(ascii(context))'), 'FINAL(x)']))
    was, now, _ = execute(to_notebook(res, tmp_path/'run.ipynb'))
    assert was == now and now[0][0] == ascii(context) + '\n'

def test_a_missing_context_is_asked_for(tmp_path):
    log = tmp_path/'run.jsonl'
    rlm_run('What?', 'abc', model=ScriptLM([block('print(len(context))'), 'FINAL(x)']), log=log)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match='no copy of the context, a str of length 3: load it in this cell'): execute(to_notebook(log, tmp_path/'run.ipynb'))
    was, now, _ = execute(to_notebook(log, tmp_path/'given.ipynb', 'abc'))
    assert was == now == [('3\n', None)]

def test_what_no_file_can_hold_is_asked_for(tmp_path):
    res = rlm_run('What?', {1: {2}}, model=ScriptLM([block('n = len(context)'), 'FINAL(x)']))
    with pytest.raises(nbclient.exceptions.CellExecutionError, match='load it in this cell'): execute(to_notebook(res, tmp_path/'run.ipynb'))

@pytest.mark.parametrize('protocol,replies', [(ANSWER, [block('answer["content"] = str(len(context))\nprint(answer["content"])\nanswer["ready"] = True')]),
    (NANO, [block('n = len(prompt)\nprint(n)', lang='python') + block('echo $((2+3))', lang='bash'), block('Final = [n]', lang='python')])], ids=['answer', 'nano'])
def test_other_protocols(tmp_path, protocol, replies):
    log = tmp_path/'run.jsonl'
    rlm_run('How long?', 'abcd', model=ScriptLM(replies), protocol=protocol, log=RunLog(log, keep_context=True))
    was, now, _ = execute(to_notebook(log, tmp_path/'run.ipynb'))
    assert was == now and now[0][0] == '4\n' and (protocol is ANSWER or now[1][0] == '5\n')

def test_failed_calls_fail_again(tmp_path):
    def sub(msgs):
        if 'bad' in msgs[-1]['content']: raise ValueError('no good')
        return 'fine'
    code = 'print(llm_query_batched(["ok", "bad"]))\ntry: llm_query("bad")\nexcept Exception as e: print("raised", e)'
    res = rlm_run('What?', 'abc', model=ScriptLM([block(code), 'FINAL(x)']), sub_model=sub)
    was, now, _ = execute(to_notebook(res, tmp_path/'run.ipynb'))
    assert was == now and now[0][0].startswith("['fine', \"Error: the model function") and '\nraised the model function' in now[0][0]

def test_one_line_makes_it_live(tmp_path):
    res = rlm_run('What?', 'One. The keeper was called Martha. Two.', model=ScriptLM([block('who = llm_query("Who was the keeper?\\n" + context)\nprint(who)'), 'FINAL_VAR(who)']),
        sub_model=ScriptLM(lambda m: 'recorded'))
    path = to_notebook(res, tmp_path/'run.ipynb')
    assert execute(path)[1][0][0] == 'recorded\n'
    live = re.sub(r'model = recorded ', "model = 'offline' ", path.read_text())
    assert live != path.read_text()
    path.write_text(live)
    assert 'Martha' in execute(path)[1][0][0]

HOSTILE = ('<script>window.pwned=1</script>', '<img src=x onerror=alert(1)>', '[x](javascript:alert(1))', '[a]: javascript:alert(1)\n[a]',
    '![x](http://127.0.0.1:9/x)', '$\\href{javascript:alert(1)}{x}$',
    '\x1b[31mred', '\u202eabc', '\ud800', '\u2028', '```\n<script>x</script>', '~~~', '"""', "'''\\", '\x00',
    '%%javascript\nalert(1)', '!touch pwned', 'x = !touch pwned', '%run pwned.py', 'print?', '{{x}}', '])\n__import__("os").system("touch pwned")')

@pytest.mark.parametrize('s', HOSTILE, ids=[ascii(o)[:24] for o in HOSTILE])
def test_hostile_logs(tmp_path, s):
    call = dict(root_model=s, prompt=s, response=s, error=s)
    res = dict(stdout=s, stderr=s, error=s, notes=[s], locals={s: s}, rlm_calls=[call])
    meta = dict(root_model=s, query=s, protocol=s, tools=[s], context=dict(type=s, length=3), limits=dict(result_truncation_limit=s))
    run = dict(run_metadata=meta, iterations=[dict(prompt=s, response=f'{s}\n\n{s}', final_answer=s, notes=[s],
        code_blocks=[dict(code=s, result=res), dict(code='print(llm_query)', result={})])])
    with pytest.raises(TraceError, match='pass `protocol`'): to_notebook(run, tmp_path/'run.ipynb', 'abc')
    nb = read(to_notebook(run, tmp_path/'run.ipynb', 'abc', protocol='paper'))
    body, _ = nbconvert.HTMLExporter(template_name='basic').from_notebook_node(nb)
    assert not re.search(r'<script>window|<img|href="javascript|src="http|<script>x', body)
    trusted = [c for c in nb.cells if c.cell_type == 'code']
    for c in trusted[:3]: compile(c.source, '', 'exec')     # What we wrote stays what we wrote
    nb.cells = [c for c in nb.cells if c.cell_type != 'code' or c.source != s] # The model's own code is the reader's decision; the rest runs
    nbclient.NotebookClient(nb, kernel_name='python3', timeout=600, resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    assert not (tmp_path/'pwned').exists() and '<bound method' in shown([c for c in nb.cells if c.cell_type == 'code'][-1])[0]

@pytest.mark.parametrize('code', ['!touch pwned', 'x = !touch pwned', 'a = 1\n!touch pwned', '%%bash\ntouch pwned', '%system touch pwned', ',print a', '/print a', 'print?'])
def test_commands_of_the_notebook_are_not_code(tmp_path, code):
    res = rlm_run('What?', 'abc', model=ScriptLM([block(code), 'FINAL(x)']))
    was, now, nb = execute(to_notebook(res, tmp_path/'run.ipynb'))
    assert not now and not (tmp_path/'pwned').exists() and [c.source for c in nb.cells if c.cell_type == 'raw'] == [code]

@pytest.mark.skipif(not TRACES, reason='the real trajectories are not on this machine')
@pytest.mark.parametrize('log', TRACES, ids=[o.name[-17:-9] for o in TRACES])
def test_real_trajectories_run_as_they_replay(tmp_path, log):
    context = None
    if log.name[-17:-9] == '5f4c2a91': context = (SHARED/'contexts'/'gene_expression_hits.txt').read_text()
    _, now, _ = execute(to_notebook(log, tmp_path/'run.ipynb', context))
    blocks = replay(log, context).blocks
    assert 0 <= len(now) - len(blocks) <= 1    # one more where the answer is a variable
    for b, (text, error) in zip(blocks, now): assert (text, error) == (b.now.stdout, b.now.error and b.now.error.partition(':')[0])
