"""The command line as a shell has it: real processes, a server on this machine in the place of a model."""
import json, os, subprocess, sys
import pytest
from common import HANG, environment
from kinds import KINDS, new_ns
from rlm.testing import MessagesServer
from wire import is_turn, last, text


def rlm(*args, stdin='', env=None, **kw):
    return subprocess.run([sys.executable, '-c', 'import sys; from rlm.cli import main; sys.exit(main())', *map(str, args)], input=stdin, capture_output=True, text=True, timeout=HANG, env=environment() | (env or {}), **kw)

def pdf(lines):
    "A PDF of one page with these lines."
    show = 'BT /F1 12 Tf 14 TL 72 720 Td ' + ' '.join(f'({o}) Tj T*' for o in lines) + ' ET'
    objs = ['<</Type/Catalog/Pages 2 0 R>>', '<</Type/Pages/Kids[3 0 R]/Count 1>>',
        '<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F1 5 0 R>>>>/Contents 4 0 R>>',
        f'<</Length {len(show)}>>stream\n{show}\nendstream', '<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>']
    body, at = '%PDF-1.4\n', []
    for i, o in enumerate(objs, 1): at.append(len(body)); body += f'{i} 0 obj\n{o}\nendobj\n'
    rows = ''.join(f'{o:010} 00000 n \n' for o in at)
    return f'{body}xref\n0 6\n0000000000 65535 f \n{rows}trailer<</Size 6/Root 1 0 R>>\nstartxref\n{len(body)}\n%%EOF\n'.encode()

PAPER_LINES = ['Bees keep their brood warm.', 'We measured 34.5 degrees in all nests.', 'One limit: a single summer.', 'Larger colonies need less food per bee.']

def brief_writer(body):
    "What a model does with a NANO run over a paper: a look, one child a line, from threads of its own, then the brief; a child looks with bash too."
    said = last(body)
    if not is_turn(body): return f'[{said.splitlines()[-1]}]'
    replies = sum(m['role'] == 'assistant' for m in body['messages'])
    child = 'one line of a paper' in text(body['messages'][0]['content'])
    if child: return ['```bash\nfor i in 1 2 3; do echo $i; done | wc -l\n```', '```python\nFinal = llm_query("Say it shorter:\\n" + prompt.splitlines()[0])\n```'][replies]
    return ['```python\nlines = [o.strip() for o in prompt.splitlines() if o.strip()]\nprint(len(lines))\n```',
        '''```python
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool: notes = list(pool.map(lambda o: rlm_query(o, role="one line of a paper"), lines))
Final = "Brief: " + " ".join(notes)
```'''][replies]

@pytest.mark.parametrize('kind', [o for o in KINDS if o != 'process'])
def test_a_brief_of_a_pdf(kind, tmp_path):
    "`rlm ask --ns KIND --protocol nano FILE.pdf` with a model of a local server, as `ollama/NAME`."
    with new_ns(kind): pass # Skips where there is none
    (tmp_path/'paper.pdf').write_bytes(pdf(PAPER_LINES))
    with MessagesServer(brief_writer) as srv:
        p = rlm('ask', '--ns', kind, '--protocol', 'nano', tmp_path/'paper.pdf', '-m', 'ollama/qwen', env=dict(OLLAMA_HOST=srv.url))
        assert (p.returncode, p.stderr) == (0, '')
        assert p.stdout == f'Brief: {" ".join(f"[{o}]" for o in PAPER_LINES)}\n'
        asked = [o['body'] for o in srv.requests]
        assert 'Write a brief' in text(asked[0]['messages'][0]['content']) and all(o['model'] == 'qwen' for o in asked)
        assert not any(o in json.dumps(asked[0]) for o in PAPER_LINES) # The model sees metadata, and what it asks for
        assert sum(map(is_turn, asked)) == 2 + 2 * 4 and len(asked) == 14

def test_a_log_and_a_store(tmp_path):
    "The second run with the same store asks nobody, and its log is replayed with the same outputs."
    (tmp_path/'a.txt').write_text('The mill was sold in 1907. ' * 50)
    reply = lambda body: 'In 1907.' if not is_turn(body) else ['```repl\nx = llm_query("When? " + context[:26])\nprint(x)\n```', 'FINAL_VAR(x)'][len(body['messages']) // 2]
    with MessagesServer(reply) as srv:
        go = lambda log: rlm('ask', 'When was it sold?', 'a.txt', '-m', 'ollama/qwen', '--log', log, '--store', 'calls.db', env=dict(OLLAMA_HOST=srv.url), cwd=tmp_path)
        first, n = go('one.jsonl'), len(srv.requests)
        second = go('two.jsonl')
        assert first.stdout == second.stdout == 'In 1907.\n' and n == len(srv.requests) == 3, (first, second)
        again = go('one.jsonl')
        assert again.returncode == 1 and 'finished; name another file' in again.stderr and len(again.stderr.splitlines()) == 1
    p = rlm('replay', 'two.jsonl', 'a.txt', cwd=tmp_path)
    assert p.returncode == 0 and '1 of 1 blocks are the same' in p.stdout
    p = rlm('replay', 'two.jsonl', cwd=tmp_path)
    assert p.returncode == 1 and p.stderr == 'rlm: the log does not hold the context: pass `context`\n'
    p = rlm('view', 'one.jsonl', 'two.jsonl', '-o', 'page.html', cwd=tmp_path)
    assert p.returncode == 0 and 'page.html' in p.stdout and 'When was it sold?' in (tmp_path/'page.html').read_text()

def test_help_names_all_commands():
    p = rlm('--help')
    assert p.returncode == 0 and all(o in p.stdout for o in ('ask', 'view', 'replay', 'image'))
    for o in ('ask', 'view', 'replay', 'image'): assert rlm(o, '-h').returncode == 0

def test_without_the_programs(tmp_path):
    "With no bubblewrap and no QEMU: one sentence that says what to install."
    for kind, says in (('sandbox', 'bubblewrap'), ('vm', 'qemu')):
        p = rlm('ask', 'Q?', '-', '-m', 'offline', '--ns', kind, stdin='some text', env=dict(PATH=str(tmp_path)))
        assert p.returncode == 1 and p.stdout == '' and len(p.stderr.splitlines()) == 1 and says in p.stderr and 'install' in p.stderr, p.stderr
    assert rlm('ask', 'What is said of bees?', '-', '-m', 'offline', stdin='Bees keep warm.', env=dict(PATH=str(tmp_path))).returncode == 0

def test_a_reader_that_has_gone(tmp_path):
    "`rlm ask ... | true` ends without a traceback, and a full disk is one sentence."
    env = environment()
    command = [sys.executable, '-c', 'import sys; from rlm.cli import main; sys.exit(main())', 'ask', 'What is said of bees?', '-', '-m', 'offline']
    with open('/dev/full', 'w') as full:
        p = subprocess.run(command, input='Bees keep warm.', stdout=full, stderr=subprocess.PIPE, text=True, env=env, timeout=HANG)
    assert p.returncode == 1 and 'No space left' in p.stderr and 'Traceback' not in p.stderr
    r, w = os.pipe(); os.close(r)
    p = subprocess.run(command, input='Bees keep warm.', stdout=w, stderr=subprocess.PIPE, text=True, env=env, timeout=HANG)
    os.close(w)
    assert p.returncode == 1 and 'Traceback' not in p.stderr and 'BrokenPipe' not in p.stderr

def test_odd_files(tmp_path):
    (tmp_path/'deep.json').write_text('[' * 200_000)
    p = rlm('ask', 'Q?', tmp_path/'deep.json', '-m', 'offline')
    assert p.returncode == 1 and 'is not JSON' in p.stderr and len(p.stderr.splitlines()) == 1

def test_the_context_can_be_kept(tmp_path):
    (tmp_path/'a.txt').write_text('Bees keep warm.')
    p = rlm('ask', 'What is said of bees?', 'a.txt', '-m', 'offline', '--log', 'run.jsonl', '--keep-context', cwd=tmp_path)
    assert p.returncode == 0 and rlm('replay', 'run.jsonl', cwd=tmp_path).returncode == 0
    assert rlm('ask', 'Q?', 'a.txt', '-m', 'offline', '--keep-context', cwd=tmp_path).stderr == 'rlm: --keep-context goes with --log\n'
