"""The page of `rlm view` in a real Chromium: what is seen, clicked, typed and found, and that nothing in a log runs."""
import gzip, json, re, shutil
from pathlib import Path
import nbconvert, nbformat, pytest
from rlm import Limits, ScriptLM, rlm_run
from rlm.display import run_html, show_run, to_notebook, view_command, view_parser
from rlm.trace import TraceError, rewind
from common import block

sync_api = pytest.importorskip('playwright.sync_api', reason='the Python package playwright is not installed')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='there is no chromium on this machine')
ARGS = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
TRACES = sorted(Path(__file__).parents[2].glob('shared/data/trajectories/traces/*.jsonl.gz'))

@pytest.fixture(scope='module')
def chromium():
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()

class Opened:
    "A page, and all that it complained of or asked for."
    def __init__(self, chromium, path, html, **kw):
        self.context = chromium.new_context(**dict(viewport=dict(width=1100, height=800), color_scheme='light') | kw)
        self.page, self.said, self.asked = self.context.new_page(), [], []
        self.page.on('console', lambda m: self.said.append(f'{m.type}: {m.text}'))
        self.page.on('pageerror', lambda e: self.said.append(f'error: {e}'))
        self.page.on('dialog', lambda d: (self.said.append(f'dialog: {d.message}'), d.dismiss()))
        self.page.on('request', lambda r: self.asked.append(r.url))
        path.write_text(html, encoding='utf-8')
        self.page.goto(path.as_uri())
    def clean(self, asked=1): assert not self.said and len(self.asked) == asked and not self.page.evaluate('window.pwned'), (self.said, self.asked)

@pytest.fixture
def show(chromium, tmp_path):
    made = []
    def open_(html, **kw):
        made.append(Opened(chromium, tmp_path/f'{len(made)}.html', html, **kw))
        return made[-1].page
    yield open_
    for o in made: o.clean(); o.context.close()

def one_run():
    "A run with prose, a batch of sub-calls, a child with a child of its own, and an error."
    def below(msgs):
        if msgs[0]['role'] != 'system': return 'Yes, it does.'
        if len(msgs) > 2: return 'FINAL_VAR(x)'
        deeper = msgs[1]['content'].count('deeper') < 2
        return block('x = rlm_query("deeper " + context)' if deeper else 'x = llm_query("innermost question")')
    root = ScriptLM([block('print(len(context))\nasked = llm_query_batched([f"piece {i}?" for i in range(5)])'),
        block('kid = rlm_query("deep water")\nprint(kid)'), block('print("before")\n1 / 0'), 'FINAL_VAR(kid)'], price=(3, 15, 0, 0))
    return rlm_run('Is there **water**?', 'sea ' * 50, model=root, sub_model=ScriptLM(below, price=(1, 5, 0, 0)), limits=Limits(max_depth=4))

@pytest.fixture(scope='module')
def run(): return one_run()

def summaries(page, within='#turns >'): return page.locator(f'{within} details > summary')

def test_overview(show, run):
    page = show(run_html(run))
    assert page.title() == page.locator('.question').inner_text() == 'Is there **water**?' and page.locator('.answer').inner_text() == 'Yes, it does.'
    facts = dict(zip(page.locator('dt').all_inner_texts(), page.locator('dd').all_inner_texts()))
    assert facts['Tokens'] == f'{run.usage.total.total_tokens:,}' and facts['Cost'].startswith('$0.0')
    assert [facts[k] for k in ('Model', 'Ended by', 'Turns')] == ['script', 'answer', '4']
    assert summaries(page).count() == 4 and page.locator('#turns .error').inner_text() == 'ZeroDivisionError: division by zero'
    charts = page.locator('#chart svg')
    assert charts.count() == 3 and 'tokens by turn' in charts.first.get_attribute('aria-label') and page.locator('#chart svg').first.locator('g').count() == 4
    assert page.locator('#chart svg').first.locator('.failed').count() == 1

def test_fold_and_unfold(show, run):
    page = show(run_html(run))
    assert page.locator('.body').count() == 0   # nothing is drawn before it is wanted
    summaries(page).nth(0).click()
    code = page.locator('#turns .code').first
    code.wait_for()
    assert code.inner_text().startswith('print(len(context))') and page.locator('#turns .out').first.inner_text() == '200'
    assert code.locator('.f').first.inner_text() == 'print' and '5 sub-calls' in page.locator('.calls > summary').inner_text()
    summaries(page).nth(0).click()
    assert not code.is_visible()
    page.locator('#fold').click()
    assert page.locator('#turns > details[open]').count() == 4 and page.locator('#fold').inner_text() == 'Fold all'
    assert 'ZeroDivisionError' in page.locator('.err').inner_text() and 'before' in page.locator('#turns > details').nth(2).inner_text()
    page.locator('#fold').click()
    assert page.locator('#turns > details[open]').count() == 0

def test_children_nest(show, run):
    page = show(run_html(run))
    summaries(page).nth(1).click()
    where = '#turns'
    for depth in range(4):   # a child, its child, its child, and the innermost sub-call
        call = page.locator(f'{where} .call').first
        call.locator('> summary').click()
        assert ('sub-call' if depth == 3 else 'child run') in call.locator('> summary').inner_text()
        where += ' .call'
        if depth < 3: call.locator('.turn > summary').first.click()
    assert 'innermost question' in page.locator(f'{where} .msg').first.inner_text()

def test_keyboard(show, run):
    page = show(run_html(run))
    focused = lambda: page.evaluate('document.activeElement.textContent')
    page.keyboard.press('j'); assert focused().startswith('Turn 1')
    page.keyboard.press('j'); assert focused().startswith('Turn 2')
    page.keyboard.press('Enter')
    page.locator('#turns .turn .body').first.wait_for()
    page.keyboard.press('j'); assert focused().startswith('What the model was told')   # walks through what is unfolded
    page.keyboard.press('k'); page.keyboard.press('k'); assert focused().startswith('Turn 1')
    page.keyboard.press('/'); assert page.evaluate('document.activeElement.id') == 'q'
    page.keyboard.type('jk/'); assert page.locator('#q').input_value() == 'jk/'         # typed, and not obeyed

def test_search(show, run):
    page = show(run_html(run))
    page.fill('#q', 'INNERMOST question')
    sync_api.expect(page.locator('#hits')).not_to_be_empty()   # while typing, without Enter
    found = page.locator('#hits').inner_text()
    assert int(found.split()[0]) >= 2 and page.locator('.body').count() == 0
    page.keyboard.press('Enter')
    assert page.locator('#hits').inner_text().startswith('1 of ')
    marked = '[...CSS.highlights.get("hit")][0].toString()'
    assert page.evaluate(marked).lower() == 'innermost question'
    on_screen = 'r => r.top >= 0 && r.bottom <= innerHeight'
    rect = page.evaluate('[...CSS.highlights.get("hit")][0].getBoundingClientRect().toJSON()')
    assert page.evaluate(on_screen, rect)
    page.locator('#next').click(); assert page.locator('#hits').inner_text().startswith('2 of ')
    page.locator('#prev').click(); page.locator('#prev').click()
    last = page.locator('#hits').inner_text().split(' of ')
    assert last[0] == last[1]                                                          # round the corner
    page.fill('#q', 'no such thing (.*'); page.keyboard.press('Enter')
    assert page.locator('#hits').inner_text() == '0 hits' and page.locator('#next').is_disabled()
    page.keyboard.press('Escape')
    assert page.locator('#hits').inner_text() == '' and page.locator('#q').input_value() == ''

def test_every_hit_is_where_it_says(show, run):
    page = show(run_html(run))
    page.fill('#q', 'deep'); page.keyboard.press('Enter')
    n = int(page.locator('#hits').inner_text().split(' of ')[1])
    assert n > 5
    for _ in range(n):
        assert page.evaluate('[...CSS.highlights.get("hit")][0].toString()').lower() == 'deep'
        page.locator('#next').click()

def test_light_and_dark(show, run):
    ground = 'getComputedStyle(document.body).backgroundColor'
    light, dark = show(run_html(run)), show(run_html(run), color_scheme='dark')
    a, b = light.evaluate(ground), dark.evaluate(ground)
    assert a != b
    light.locator('#theme').click(); dark.locator('#theme').click()
    assert (light.evaluate(ground), dark.evaluate(ground)) == (b, a)

def test_phone_and_print(show, run):
    page = show(run_html([run, run]), viewport=dict(width=360, height=740))
    page.locator('#fold').click()
    for d in page.locator('#turns .call > summary, #turns .calls > summary').all(): d.click()
    assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
    page.emulate_media(media='print')
    assert not page.locator('.bar').is_visible() and page.locator('.code').first.is_visible()

def test_names_for_all_controls(show, run):
    page = show(run_html([run, run]))
    page.locator('#fold').click()
    tree = page.locator('body').aria_snapshot()
    for o in ('searchbox "Search everything, folded turns too"', 'button "Previous hit"', 'button "Light or dark"', 'button "Fold all" [pressed]',
        'navigation "Runs"', 'region "Turns"', 'group "Output"'): assert o in tree, tree
    assert not re.search(r'- (button|searchbox|img)( \[|:|$)', tree, re.M), tree           # none without a name

def test_several_runs(show, run, tmp_path):
    other = rlm_run('Another question?', 'x', model=ScriptLM([block('y = 1'), 'FINAL(zwei)']))
    page = show(run_html([run, other]))
    picks = page.locator('#runs button')
    assert picks.count() == 2 and 'Another question?' in picks.nth(1).inner_text() and picks.nth(0).get_attribute('aria-current') == 'true'
    page.fill('#q', 'zwei')
    picks.nth(1).click()
    assert page.locator('.question').inner_text() == 'Another question?' and summaries(page).count() == 2 and picks.nth(1).get_attribute('aria-current') == 'true'
    assert page.locator('#hits').inner_text() == '3 hits'   # in the run that is shown now: header, reply, answer

EVIL = ('window.pwned=1', '<script>window.pwned=1</script>', '</script><script>window.pwned=1</script>', '<img src=x onerror=window.pwned=1>',
    '"><svg onload=window.pwned=1>', '<!--<script>', ']]>',
    '[x](javascript:window.pwned=1)', '<a href="javascript:window.pwned=1">x</a>', '<iframe srcdoc="<script>parent.pwned=1</script>">',
    "');window.pwned=1//", '${window.pwned=1}', '{{js}}{{data}}',
    '\u2028window.pwned=1\u2029', '\ud800\udc00\ud800', '\x1b[31mred\x1b[0m', '\u202egnp.exe\u202c', '<base href="http://127.0.0.1:9/">',
    '<meta http-equiv="refresh" content="0;url=data:,x">',
    '<link rel=stylesheet href=http://127.0.0.1:9/x>', '<style>*{display:none}</style>', '\x00', '\ufeff', '\r\n', '\\u003c', '&lt;b&gt;', '%3Cscript%3E')

def evil_run(s, depth=2):
    "A trajectory that has `s` wherever there can be a text."
    kid = evil_run(s, depth - 1) if depth else None
    call = dict(root_model=s, prompt=s, response=s, error=s, usage_summary=dict(model_usage_summaries={s: {}}), execution_time=1.) | (dict(metadata=kid) if kid else {})
    res = dict(stdout=s, stderr=s, error=s, notes=[s], locals={s: s, '__proto__': s, 'constructor': s}, rlm_calls=[call] * 2)
    its = [dict(prompt=[dict(role=s, content=s)], response=f'{s}\n```repl\n{s}\n```\n{s}', code_blocks=[dict(code=s, result=res)], final_answer=s,
        iteration_time=1., notes=[s])] * 2
    return dict(run_metadata=dict(root_model=s, query=s, timestamp=s, stop=s, limit=s, __proto__=dict(pwned=1)), iterations=its)

def unfold(page): # All of it, to any depth
    page.evaluate('for (let d; d = document.querySelector("details:not([open])");) open(d)')

def test_hostile_logs_are_text(show):
    page = show(run_html([evil_run('\n'.join(EVIL)), *map(evil_run, EVIL)]))
    for i in range(len(EVIL) + 1):
        page.locator('#runs button').nth(i).click()
        unfold(page)
        page.locator('#chart g').first.click()
        s = ('\n'.join(EVIL) if i == 0 else EVIL[i - 1]).encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')   # a pair of halves is a character
        texts = page.locator('#turns .msg').evaluate_all('es => es.map(e => e.textContent.replace(/[\\ud800-\\udfff]/g, c => c))')
        assert len(texts) > 4 and page.evaluate('Object.prototype.pwned') is None
        if '\ufffd' not in s: assert set(texts) == {s}, (s, set(texts))                 # as it was, to the letter
        assert page.evaluate('document.querySelectorAll("main :is(script, img, a, iframe, link, style, base, meta, svg svg, form, object)").length') == 0
    page.fill('#q', '<img src=x onerror=window.pwned=1>'); page.keyboard.press('Enter')

def test_numbers_that_are_none(show):
    usage = dict(model_usage_summaries=dict(m=dict(total_calls=1, total_input_tokens=float('nan'), total_output_tokens=float('-inf'), total_cost=float('inf'))))
    call = dict(root_model='m', prompt='p', response='r', usage_summary=usage, execution_time=float('nan'))
    its = [dict(response='x', prompt='', iteration_time=o, code_blocks=[dict(code='c', result=dict(rlm_calls=[call]))]) for o in (float('nan'), float('inf'), 10**400, '1', [1])]
    page = show(run_html(json.loads(json.dumps(dict(run_metadata=dict(seconds=float('nan')), iterations=its)))))
    unfold(page)
    assert summaries(page).count() == 5 and page.locator('#chart svg').count() == 0

def test_hidden_characters_are_named(show):
    page = show(run_html(evil_run('a\u202eb\x1b[0m')))
    unfold(page)
    assert set(page.locator('#turns .msg').first.locator('.ctl').evaluate_all('es => es.map(e => e.dataset.name)')) == {'U+202E', 'U+001B'}
    assert page.locator('.msg .ctl').first.evaluate('e => getComputedStyle(e).unicodeBidi') == 'isolate'   # what it turns round ends with it

def test_the_policy_holds(chromium, tmp_path):
    html = run_html(evil_run('x'))
    for bad, says in (('<script>window.pwned=1</script>', 'script-src'), ('<img src="http://127.0.0.1:9/x">', 'default-src'),
        ('<svg onload="window.pwned=1"></svg>', 'script-src')):
        o = Opened(chromium, tmp_path/'bad.html', html.replace('<main>', f'{bad}<main>'))   # as if something had slipped through
        assert any(says in s for s in o.said) and not o.page.evaluate('window.pwned')
        with pytest.raises(sync_api.Error, match='TrustedHTML'): o.page.evaluate('document.body.innerHTML = "x"')
        o.context.close()

def test_output_of_a_notebook_runs_nothing(show):
    page = show('<!doctype html><meta charset=utf-8>' + ''.join(show_run(evil_run(s))._repr_html_() for s in ('\n'.join(EVIL), *EVIL)))
    page.evaluate('document.querySelectorAll("details").forEach(d => d.open = true)')
    assert set(page.evaluate('[...document.body.querySelectorAll("*")].map(e => e.tagName)')) == set('DETAILS SUMMARY BLOCKQUOTE PRE P I B SMALL'.split())

def test_exported_notebook_as_a_page_runs_nothing(show, tmp_path):
    def body(s): return nbconvert.HTMLExporter(template_name='basic').from_notebook_node(nbformat.read(to_notebook(evil_run(s), tmp_path/'run.ipynb'), 4))[0]
    page = show('<!doctype html><meta charset=utf-8>' + ''.join(map(body, ('\n'.join(EVIL), *EVIL))))
    page.evaluate('document.querySelectorAll("a").forEach(a => a.click())')                # those that nbconvert puts behind headings

def test_deep_children(show):
    run = dict(iterations=[dict(response='the bottom', prompt='x')])
    for i in range(40):
        call = dict(root_model='m', prompt=f'level {i}', response='r', metadata=dict(run, run_metadata={}))
        run = dict(iterations=[dict(response='go', prompt='x', code_blocks=[dict(code='f()', result=dict(rlm_calls=[call]))])])
    page = show(run_html(run))
    page.fill('#q', 'the bottom'); page.keyboard.press('Enter')
    assert page.locator('#hits').inner_text() == '1 of 1' and page.locator('details[open]').count() == 81
    assert page.evaluate('[...CSS.highlights.get("hit")][0].toString()') == 'the bottom'

def test_five_thousand_turns(show, tmp_path):
    def line(i): return dict(type='iteration', iteration=i + 1, prompt=[dict(role='user', content=f'turn {i}')], response=f'step {i}\n```repl\nf({i})\n```',
        code_blocks=[dict(code=f'f({i})', result=dict(stdout=f'line {i}\n' * 400))], iteration_time=i % 7)
    lines = [dict(type='metadata', root_model='m', query='long'), *map(line, range(5000))]
    log = tmp_path/'long.jsonl.gz'
    log.write_bytes(gzip.compress('\n'.join(map(json.dumps, lines)).encode(), 1))
    html = run_html(log, 5_000_000)
    assert len(html) < 8_000_000
    page = show(html)
    assert summaries(page).count() == 5000 and page.locator('.body').count() == 0 and page.locator('#chart g').count() == 200
    page.fill('#q', 'step 4711'); page.keyboard.press('Enter')
    assert page.locator('#hits').inner_text() == '1 of 1' and page.locator('#turns > details[open] .title').first.inner_text() == 'Turn 4712'
    assert 'characters are left out here; the whole is in long.jsonl.gz.' in page.locator('#turns > details[open] .cut').first.inner_text()

@pytest.mark.skipif(not TRACES, reason='the real trajectories are not on this machine')
def test_real_trajectories(show):
    page = show(run_html(TRACES))
    for i in range(len(TRACES)):
        page.locator('#runs button').nth(i).click()
        unfold(page)
        assert page.locator('#turns .code').count() and page.locator('.answer').first.inner_text() and page.evaluate('document.documentElement.scrollWidth <= innerWidth')

def test_command(show, tmp_path, capsys):
    log = tmp_path/'a.jsonl'
    rlm_run('How long?', 'abc', model=ScriptLM([block('n = len(context)'), 'FINAL_VAR(n)']), log=log)
    assert view_command(view_parser().parse_args([str(log), str(log)])) == 0
    out = Path(capsys.readouterr().out.strip())
    assert out == tmp_path/'runs.html' and show(out.read_text()).locator('#runs button').count() == 2

def test_a_file_that_is_no_page_is_not_replaced(tmp_path, capsys):
    log, page = tmp_path/'a.jsonl', tmp_path/'a.html'
    rlm_run('How long?', 'abc', model=ScriptLM([block('n = len(context)'), 'FINAL_VAR(n)']), log=log)
    page.write_text('<!doctype html>\n<p>mine')
    with pytest.raises(TraceError, match='is no page of ours'): view_command(view_parser().parse_args([str(log)]))
    assert page.read_text() == '<!doctype html>\n<p>mine'
    for more in (['-o', str(page)], []): assert view_command(view_parser().parse_args([str(log), *more])) == 0 and 'How long?' in page.read_text() # By name, and then as a page of ours

def test_forks_say_where_they_come_from(tmp_path):
    log = tmp_path/'a.jsonl'
    rlm_run('How long?', 'abc', model=ScriptLM([block('n = len(context)'), 'FINAL_VAR(n)']), log=log)
    forks = [rewind(log, 1, 'abc', model=ScriptLM(['FINAL(x)']), log=tmp_path/f'{o}.jsonl').log for o in 'bc']
    index = json.loads(re.search('id="index">(.*?)</script>', run_html([log, *forks]))[1])
    assert [o[1] for o in index] == ['2 turns · a.jsonl', '2 turns · from turn 1 of a.jsonl · b.jsonl', '2 turns · from turn 1 of a.jsonl · c.jsonl']
    assert 'From turn 1 of a.jsonl' in str(show_run(forks[0])) and 'From turn' not in str(show_run(log))

def test_header_and_turns_have_the_same_sums(tmp_path):
    kw = dict(model=ScriptLM(lambda m: 'x' if m[0]['role'] == 'user' else block('n = llm_query("a")') if len(m) < 3 else 'FINAL_VAR(n)'), store=tmp_path/'c.db')
    for name in ('a.jsonl', 'b.jsonl'): # The second one comes from the store
        rlm_run('How long?', 'abc', log=tmp_path/name, **kw)
        page = run_html(tmp_path/name)
        tree = json.loads(re.search('class="run">(.*?)</script>', page)[1])
        assert dict(tree['facts'])['Tokens'] == f'{sum(o["tokens"] for o in tree["turns"]):,}' != '0'

@pytest.mark.parametrize('prompt', [3, None, ['a', 3], {'a': 1}])
def test_a_context_of_a_child_may_be_anything(prompt):
    call = dict(prompt=prompt, response='r')
    assert str(prompt) in str(show_run(dict(iterations=[dict(code_blocks=[dict(code='x', result=dict(rlm_calls=[call]))])])))
