"""What servers, proxies and gateways really send: a reply that means what it says, or one short sentence; at the root, in a sub-call and in each slot of a batch."""
import contextlib, json, os, socket, threading
import pytest
from common import block, first
from rlm import LMAuthError, LMConnectionError, LMModelError, LMRefused, ScriptLM, exec_code, get_lm, llm_query, llm_query_batched, rlm_run
from rlm.core import LMError
from rlm.lm import Reply, run_sync
from rlm.providers import ClaudetteLM
from rlm.testing import Fault, MessagesServer, RawResponse

HI = [dict(role='user', content='hi')]
PAGE = '<!DOCTYPE html><html><head><title>502 Bad Gateway</title><style>p { x }</style></head><body>' + '<p>sorry</p>' * 4500 + '</body></html>'
both = pytest.mark.parametrize('stream', [False, True], ids=['whole', 'streamed'])

def message(text='Paris', **kw):
    content = [dict(type='text', text=text)]
    return dict(id='m', type='message', role='assistant', model='m', content=content, stop_reason='end_turn', usage=dict(input_tokens=3, output_tokens=2)) | kw

def model(srv, stream=False, **kw):
    return ClaudetteLM('claude-sonnet-4-6', base_url=srv.url, **(dict(api_key='k', max_tokens=20_000 if stream else 1000) | kw))

def ask(srv, **kw): return run_sync(model(srv, **kw)(HI))

def check_sentence(e, srv=None):
    text = str(e)
    assert len(text) < 300 and '\n' not in text and '<' not in text and '>' not in text, text
    assert srv is None or srv.url in text

# (what is sent, the error's kind, words in it, is it asked again?)
ODD = {
    'HTML with 200': (RawResponse(PAGE, content_type='text/html'), LMError, 'HTML', False),
    'HTML that says it is JSON': (RawResponse(PAGE), LMError, 'broken', True),
    'HTML with 502': (RawResponse(PAGE, 502, 'text/html'), LMError, '502 Bad Gateway', True),
    'HTML with 404': (RawResponse('<html><body><h1>Not Found</h1></body></html>', 404, 'text/html'), LMConnectionError, 'base_url', False),
    'a long text with 500': (RawResponse('upstream connect error ' * 3000, 500, 'text/plain'), LMError, 'upstream', True),
    'a long JSON error with 400': (RawResponse(dict(type='error', error=dict(type='invalid_request_error', message='x ' * 27_000)), 400), LMError, '400', False),
    'another shape of error': (RawResponse(dict(error='model "m" not found'), 404), LMModelError, 'not found', False),
    'a list as the error': (RawResponse(['no'], 500), LMError, '500', True),
    'overloaded with 200': (RawResponse(dict(type='error', error=dict(type='overloaded_error', message='Overloaded'))), LMError, 'Overloaded', True),
    'rate limit with 200': (RawResponse(dict(type='error', error=dict(type='rate_limit_error', message='Slow down'))), LMError, 'Slow down', True),
    'a bad request with 200': (RawResponse(dict(type='error', error=dict(type='invalid_request_error', message='No'))), LMError, 'No', False),
    'an error as a str with 200': (RawResponse(dict(error='boom')), LMError, 'boom', False),
    'an array': (RawResponse([1, 2]), LMError, 'no message', False),
    'null': (RawResponse(b'null'), LMError, 'no message', False),
    'a number': (RawResponse(b'3'), LMError, 'no message', False),
    'a text': (RawResponse('pong', content_type='text/plain'), LMError, 'pong', False),
    'an empty object': (RawResponse({}), LMError, 'no message', False),
    'another protocol': (RawResponse(dict(object='chat.completion', choices=[dict(message=dict(content='Paris'))])), LMError, 'no message', False),
    'nothing': (RawResponse(b''), LMError, 'broken', True),
    'truncated JSON': (RawResponse(b'{"id": "m", "content": [{"ty'), LMError, 'broken', True),
    'no UTF-8': (RawResponse(b'{"id": "\xff\xfe"}'), LMError, 'broken', True),
    'a closed connection': (RawResponse(message(), closes=True), LMConnectionError, 'no connection', True),
    'a redirect to nowhere': (RawResponse(b'', 302), LMError, '302', False),
    'too large': (RawResponse(dict(type='error', error=dict(type='request_too_large', message='Request exceeds the maximum size')), 413), LMError, '413', False),
    'overloaded': (RawResponse(dict(type='error', error=dict(type='overloaded_error', message='Overloaded')), 529), LMError, '529', True),
    'forbidden': (RawResponse(PAGE, 403, 'text/html'), LMAuthError, 'key', False),
}

@pytest.mark.parametrize('name', ODD)
def test_an_odd_answer_is_a_short_sentence(name):
    odd, kind, words, again = ODD[name]
    with MessagesServer(lambda body: odd) as srv:
        with pytest.raises(kind) as e: ask(srv, retries=1)
        assert type(e.value) is kind and words in str(e.value) and len(srv.requests) == 1 + again
        check_sentence(e.value, srv)

@pytest.mark.parametrize('name', [k for k, v in ODD.items() if v[3]])
def test_what_may_pass_is_asked_again(name):
    with MessagesServer([ODD[name][0], 'Paris']) as srv: assert ask(srv).text == 'Paris' and len(srv.requests) == 2

@pytest.mark.parametrize('name', ODD)
def test_an_odd_answer_in_a_batch(name):
    odd = ODD[name][0]
    with MessagesServer(lambda body: odd if 'odd' in body['messages'][0]['content'][0]['text'] else 'fine') as srv:
        ns, lm = {}, model(srv, retries=0)
        res = llm_query_batched(['odd', 'even', 'odd'], ns, model=lm)
    assert res[1] == 'fine' and ns['batch_res'] is res
    for slot in (res[0], res[2]):
        assert slot.startswith('Error: ')
        check_sentence(slot)
    out = exec_code('print(res)', dict(res=res)).stdout
    assert len(out) < 800 and '<' not in out

@pytest.mark.parametrize('name', ['HTML with 200', 'an array', 'nothing', 'HTML with 502'])
def test_a_run_ends_with_the_sentence_and_keeps_what_it_had(name):
    with MessagesServer([block('x = 41'), ODD[name][0], ODD[name][0]]) as srv:
        ns = {}
        with pytest.raises(LMError) as e: rlm_run('Q', 'abc', ns, model(srv, retries=0))
    check_sentence(e.value, srv)
    assert ns['x'] == 41 and len(e.value.result.iterations) == 1 and e.value.result.stop == 'errors'

# Replies that are fine

def test_no_usage_is_unknown_and_no_crash():
    whole = message()
    del whole['usage']
    for usage in (whole, message(usage=None), message(usage={})):
        with MessagesServer([RawResponse(usage)]) as srv: r = ask(srv)
        assert r.text == 'Paris' and r.usage.total_calls == 1
        assert r.usage.total_cost is None and r.usage.total_input_tokens is None and r.usage.total_tokens is None

def test_a_run_without_usage(tmp_path):
    replies = iter([block('print(llm_query("a"))'), 'a', 'FINAL(Paris)'])
    def say(body):
        raw = message(next(replies))
        del raw['usage']
        return RawResponse(raw)
    with MessagesServer(say) as srv: res = rlm_run('Q', 'abc', model=model(srv), log=tmp_path/'run.jsonl', compaction=.9)
    assert res.answer == 'Paris' and res.cost is None and res.usage.total.total_tokens is None and res.usage.total.total_calls == 3
    assert 'an unknown number of tokens' in res.summary() and res._repr_html_()
    from rlm import load_run, replay
    run = load_run(tmp_path/'run.jsonl')
    assert run.usage.total.total_tokens is None and replay(run, 'abc').same

@pytest.mark.parametrize('limit', [dict(max_tokens=10_000), dict(max_cost=1.)], ids=['tokens', 'cost'])
def test_a_limit_that_cannot_be_kept_ends_the_run(limit):
    with MessagesServer(lambda body: RawResponse(message(block('1'), usage=None))) as srv:
        res = rlm_run('Q', 'abc', model=model(srv), limits=limit)
    assert res.stop == 'budget' and 'unknown' in str(res.limit) and len(srv.requests) == 1

@pytest.mark.parametrize('content', [None, [], [dict(type='thinking', thinking='hm', signature='s')], [dict(type='tool_use', id='t', name='python', input={})],
    [dict(type='of_tomorrow', value=3)], [dict(type='text', text=None)], [dict(type='text', text='')]], ids=['null', 'none', 'thinking', 'tool_use', 'unknown', 'text null', 'empty'])
def test_replies_without_text(content):
    raw = RawResponse(message(content=content, stop_reason='tool_use'))
    with MessagesServer([raw]) as srv: assert ask(srv).text == ''
    with MessagesServer([raw, raw, raw, 'FINAL(1)']) as srv:
        with pytest.raises(LMError, match='three replies in a row had no text .*tool_use'): rlm_run('Q', 'abc', model=model(srv))
        said = srv.requests[1]['body']['messages'][-1]['content'][0]['text']
        assert 'no text' in said and len(srv.requests) == 3
    with MessagesServer([raw, raw, block('print(1)'), raw, 'FINAL(Paris)']) as srv: assert rlm_run('Q', 'abc', model=model(srv)).answer == 'Paris'

def test_a_subcall_without_text_is_said():
    sub = ScriptLM(lambda msgs: '' if 'odd' in first(msgs) else '<think>hm</think>' if 'think' in first(msgs) else 'fine')
    res = rlm_run('Q', 'abc', model=ScriptLM([block('r = llm_query_batched(["odd", "even", "think"])\nprint(r)'), 'FINAL(1)']), sub_model=sub)
    assert "['', 'fine', '']" in res.iterations[0].code_blocks[0].result.stdout
    assert any('2 had no text' in o for o in res.iterations[0].code_blocks[0].result.notes)

CONTENTS = {
    'a str': ('FINAL(Paris)', 'FINAL(Paris)'),
    'two texts': ([dict(type='text', text='FINAL(Pa'), dict(type='text', text='ris)')], 'FINAL(Paris)'),
    'text, then a fence': ([dict(type='text', text='Look:'), dict(type='text', text='```repl\nx = 1\n```')], 'Look:\n```repl\nx = 1\n```'),
    'fence after fence': ([dict(type='text', text='```repl\nx = 1\n```'), dict(type='text', text='```repl\ny = 2\n```')], '```repl\nx = 1\n```\n```repl\ny = 2\n```'),
    'fence, then text': ([dict(type='text', text='~~~repl\nx = 1\n~~~'), dict(type='text', text='Done.')], '~~~repl\nx = 1\n~~~\nDone.'),
    'a citation': ([dict(type='text', text='It is '), dict(type='text', text='Paris', citations=[]), dict(type='text', text='.')], 'It is Paris.'),
    'thinking between': ([dict(type='text', text='First.'), dict(type='thinking', thinking='FINAL(London)', signature=''), dict(type='text', text='Then.')], 'First.\nThen.'),
    'a block of tomorrow': ([dict(type='of_tomorrow', text='FINAL(London)'), dict(type='text', text='Paris')], 'Paris'),
    'blanks': ([dict(type='text', text='  a  '), dict(type='text', text='\n\nb\n')], '  a  \n\nb\n'),
}

@pytest.mark.parametrize('name', CONTENTS)
def test_the_text_of_a_reply(name):
    content, text = CONTENTS[name]
    with MessagesServer([RawResponse(message(content=content))]) as srv: assert ask(srv).text == text

def test_blocks_that_arrive_apart_all_run():
    content = [dict(type='text', text='```repl\nx = 1\n```'), dict(type='text', text='```repl\ny = x + 1\nprint(y)\n```')]
    with MessagesServer([RawResponse(message(content=content)), 'FINAL(2)']) as srv: res = rlm_run('Q', 'abc', model=model(srv))
    assert [b.code for b in res.iterations[0].code_blocks] == ['x = 1', 'y = x + 1\nprint(y)'] and res.ns['y'] == 2

def test_stop_reason_null():
    with MessagesServer([RawResponse(message(stop_reason=None))]) as srv: assert ask(srv).stop_reason == 'end_turn'

@both
@pytest.mark.parametrize('why', ['max_tokens', 'model_context_window_exceeded'])
def test_cut_replies(why, stream):
    with MessagesServer([dict(text='FINAL(Par', stop_reason=why), block('print(1)'), 'FINAL(Paris)']) as srv:
        res = rlm_run('Q', 'abc', model=model(srv, stream))
    assert res.answer == 'Paris' and 'cut off' in res.iterations[0].notes[0]
    sub = ScriptLM([Reply('half', stop_reason=why)])
    res = rlm_run('Q', 'abc', model=ScriptLM([block('print(llm_query("a"))'), 'FINAL(1)']), sub_model=sub)
    shown = res.iterations[0].code_blocks[0].result
    assert any('end in the middle' in o for o in shown.notes) and shown.llm_calls[0].stop_reason == why

@both
def test_refusals(stream):
    no = dict(text="I can't help with that.", stop_reason='refusal')
    with MessagesServer([no]) as srv:
        with pytest.raises(LMRefused, match='refused to answer') as e: ask(srv, stream=stream)
        check_sentence(e.value)
        assert e.value.usage.total_output_tokens > 0 and e.value.reply.text == "I can't help with that."
    with MessagesServer([block('x = 41'), no]) as srv:
        with pytest.raises(LMRefused) as e: rlm_run('Q', 'abc', ns := {}, model(srv, stream))
        assert len(srv.requests) == 2 and e.value.result.iterations and ns['x'] == 41 and e.value.result.usage.total.total_calls == 2
    with MessagesServer([no, no]) as srv:
        res = rlm_run('Q', 'abc', model=ScriptLM([block('r = llm_query_batched(["a", "b"])\nprint(r[0])'), 'FINAL(1)']), sub_model=model(srv, stream))
        assert all(isinstance(o.error, LMRefused) and 'refused' in o for o in res.ns['r']) and res.usage.total.total_calls == 4
        shown = res.iterations[0].code_blocks[0].result.stdout
        assert shown.startswith('Error: ') and 'refused to answer' in shown

def test_a_refusal_of_a_function():
    res = rlm_run('Q', 'abc', model=ScriptLM([block('llm_query("a")'), 'FINAL(1)']), sub_model=lambda msgs: Reply('', stop_reason='refusal'))
    assert 'LMRefused' in res.iterations[0].code_blocks[0].result.stderr

def test_an_empty_refusal():
    with MessagesServer([RawResponse(message(content=[], stop_reason='refusal', stop_details=dict(type='refusal', category='cyber', explanation='This was about malware.')))]) as srv:
        with pytest.raises(LMRefused, match='about malware'): ask(srv)

# Streams

def sse(*events): return RawResponse(''.join(f'event: {e.get("type")}\ndata: {json.dumps(e)}\n\n' for e in events), content_type='text/event-stream')

def streamed(text='Paris', usage=True, stop='end_turn', ends=True, extra=()):
    start = message(content=[], stop_reason=None) if usage else message(content=[], stop_reason=None, usage=None)
    events = [dict(type='message_start', message=start), dict(type='ping'), *extra, dict(type='content_block_start', index=0, content_block=dict(type='text', text='')),
        dict(type='ping'), *[dict(type='content_block_delta', index=0, delta=dict(type='text_delta', text=o)) for o in text], dict(type='content_block_stop', index=0)]
    if ends: events += [dict(type='message_delta', delta=dict(stop_reason=stop, stop_sequence=None), usage=dict(output_tokens=5) if usage else None), dict(type='message_stop')]
    return events

STREAMS = {
    'pings': streamed(),
    'no usage': streamed(usage=False),
    'no reason': streamed(stop=None),
    'an event of tomorrow': streamed(extra=[dict(type='of_tomorrow', value=1)]),
    'thinking': streamed(extra=[dict(type='content_block_start', index=0, content_block=dict(type='thinking', thinking='', signature='')),
        dict(type='content_block_delta', index=0, delta=dict(type='thinking_delta', thinking='FINAL(London)')),
        dict(type='content_block_delta', index=0, delta=dict(type='signature_delta', signature='s')), dict(type='content_block_stop', index=0)]),
}

@pytest.mark.parametrize('name', STREAMS)
def test_streams(name):
    with MessagesServer([sse(*STREAMS[name])]) as srv: r = ask(srv, stream=True)
    assert (r.text, r.stop_reason) == ('Paris', 'end_turn')
    assert r.usage.total_output_tokens == (None if name == 'no usage' else 5)

BROKEN = {
    'overloaded': ([*streamed(ends=False), dict(type='error', error=dict(type='overloaded_error', message='Overloaded'))], 'Overloaded', True),
    'a bad request': ([dict(type='error', error=dict(type='invalid_request_error', message='No'))], 'No', False),
    'early end': (streamed(ends=False), 'ended early', True),
    'no events': ([], 'without a message', True),
}

@pytest.mark.parametrize('name', BROKEN)
def test_broken_streams(name):
    events, words, again = BROKEN[name]
    with MessagesServer([sse(*events), sse(*streamed())]) as srv:
        if again: assert ask(srv, stream=True).text == 'Paris'
        else:
            with pytest.raises(LMError, match=words): ask(srv, stream=True)
        assert len(srv.requests) == 1 + again
    with MessagesServer([sse(*events)]) as srv:
        with pytest.raises(LMError, match=words) as e: ask(srv, stream=True, retries=0)
        check_sentence(e.value, srv)

def test_a_page_for_a_stream():
    with MessagesServer([RawResponse(PAGE, content_type='text/html')]) as srv:
        with pytest.raises(LMError, match='without a message'): ask(srv, stream=True, retries=0)

# Key, address

@contextlib.contextmanager
def environ(**new):
    names = ('ANTHROPIC_API_KEY', 'ANTHROPIC_AUTH_TOKEN', 'ANTHROPIC_BASE_URL', 'OLLAMA_HOST', 'RLM_MODEL')
    with pytest.MonkeyPatch.context() as m:
        for k in names: m.delenv(k, raising=False)
        for k, v in new.items(): m.setenv(k, v)
        yield m

def test_key_and_address_at_each_call():
    with MessagesServer(lambda b: 'one', api_key='right') as one, MessagesServer(lambda b: 'two', api_key='new') as two:
        with environ(ANTHROPIC_API_KEY='wrong', ANTHROPIC_BASE_URL=one.url) as m:
            lm = get_lm('claude-sonnet-4-6')
            with pytest.raises(LMAuthError, match='refused the key'): llm_query('Q', {}, model=lm)
            with pytest.raises(LMAuthError): llm_query('Q', {}, model='claude-sonnet-4-6')
            m.setenv('ANTHROPIC_API_KEY', 'right')
            assert llm_query('Q', {}, model=lm) == llm_query('Q', {}, model='claude-sonnet-4-6') == 'one'
            n = len(one.requests)
            m.setenv('ANTHROPIC_BASE_URL', two.url); m.setenv('ANTHROPIC_API_KEY', 'new')
            assert llm_query('Q', {}, model=lm) == 'two' and len(one.requests) == n
            m.delenv('ANTHROPIC_API_KEY'); m.setenv('ANTHROPIC_AUTH_TOKEN', 'new')
            assert llm_query('Q', {}, model=lm) == 'two'
            m.delenv('ANTHROPIC_AUTH_TOKEN')
            with pytest.raises(LMAuthError, match='there is no API key'): llm_query('Q', {}, model=lm)

def test_a_key_between_two_turns():
    with MessagesServer([block('import os\nos.environ["ANTHROPIC_API_KEY"] = "second"'), 'FINAL(Paris)']) as srv, environ(ANTHROPIC_API_KEY='first', ANTHROPIC_BASE_URL=srv.url):
        srv.api_key = 'first'
        with pytest.raises(LMAuthError): rlm_run('Q', 'abc', model='claude-sonnet-4-6')

def test_own_key_and_address_are_kept():
    with MessagesServer(lambda b: 'own', api_key='own') as srv, environ(ANTHROPIC_API_KEY='other', ANTHROPIC_BASE_URL='http://127.0.0.1:9'):
        assert ask(srv, api_key='own').text == 'own'

def test_pools_are_bounded():
    from rlm.providers import _pool
    with MessagesServer(lambda b: 'x') as srv:
        for i in range(40): ask(srv, api_key=f'key {i}')
    assert _pool.cache_info().currsize <= 16

def test_ollama_at_each_call():
    with MessagesServer(lambda b: 'one') as one, MessagesServer(lambda b: 'two') as two, environ() as m:
        m.setenv('OLLAMA_HOST', one.url)
        lm = get_lm('ollama/qwen3')
        assert llm_query('Q', {}, model=lm) == 'one'
        m.setenv('OLLAMA_HOST', two.url.removeprefix('http://'))
        assert llm_query('Q', {}, model=lm) == 'two' and lm.price == (0, 0, 0, 0)
        m.setenv('RLM_MODEL', 'ollama/qwen3')
        assert llm_query('Q', {}) == 'two'

def test_dead_server():
    with MessagesServer([]) as srv: pass
    with pytest.raises(LMConnectionError, match='no connection') as e: ask(srv)
    check_sentence(e.value, srv)

# What goes over the wire

SURROGATES = ['\ud83d', 'a\udc80b', '\ud83d\ude00', 'x' * 10_000 + '\udfff']

@both
def test_lone_surrogates(stream, tmp_path):
    code = '\n'.join(f'print({o!a})' for o in SURROGATES[:2]) + '\nr = llm_query("cut \\ud83d")'
    with MessagesServer([block(code), 'Paris', 'FINAL_VAR(r)']) as srv:
        res = rlm_run('Q \ud83d', 'abc \udc80', model=model(srv, stream), log=tmp_path/'run.jsonl', store=tmp_path/'calls.db')
    assert res.answer == 'Paris'
    told = srv.requests[2]['body']['messages'][-1]['content'][0]['text']
    assert '\ufffd' in told and 'a\ufffdb' in told
    assert srv.requests[1]['body']['messages'][0]['content'][0]['text'] == 'cut \ufffd'
    from rlm import replay
    assert replay(tmp_path/'run.jsonl', 'abc \udc80').same

@pytest.mark.parametrize('text', SURROGATES, ids=['high', 'low', 'pair', 'long'])
def test_surrogates_from_a_server_and_a_script(text):
    with MessagesServer([RawResponse(message(text))]) as srv: got = ask(srv).text
    res = rlm_run('Q', 'abc', model=ScriptLM([block('print(1)'), f'FINAL({text} is it)']))
    assert res.answer == f'{text} is it' and isinstance(got, str)

# A model's name

CHUNK = 'It was the best of times, it was the worst of times. ' * 1600

def test_a_text_is_no_model_name():
    for f in (lambda m: llm_query('What?', {}, model=m), lambda m: rlm_run('Q', 'abc', model=m), lambda m: rlm_run('Q', 'abc', model=ScriptLM('FINAL(1)'), sub_model=m), get_lm):
        for chunk in (CHUNK, 'two words', 'x' * 5000, ''):
            with pytest.raises(TypeError, match="model's name") as e: f(chunk)
            assert len(str(e.value)) < 200 and '\n' not in str(e.value)

SUBCALLS = ['llm_query("What?", chunk)', 'llm_query_batched(["What?"], chunk)', 'rlm_query("What?", chunk)', 'rlm_query_batched(["What?"], chunk)']

def lms():
    f = lambda msgs, model: 'x'
    return dict(script=ScriptLM(lambda msgs: 'x'), function=f, claudette=ClaudetteLM('m', api_key='k', base_url='http://127.0.0.1:9'))

@pytest.mark.parametrize('sub', list(lms()))
@pytest.mark.parametrize('code', SUBCALLS)
def test_a_text_as_the_second_argument(code, sub):
    root = ScriptLM([block(code), 'FINAL(done)'])
    res = rlm_run('Q', 'abc', dict(chunk=CHUNK), root, sub_model=lms()[sub])
    shown = res.iterations[0].code_blocks[0].result
    assert shown.stderr.rstrip().splitlines()[-1].startswith("TypeError: `model`, the second argument of a sub-call, is a model's name")
    assert len(shown.stderr) < 600 and not shown.llm_calls

@pytest.mark.parametrize('code', ['llm_query_batched({"a": "x"})', 'rlm_query_batched({"a": "x"})'])
def test_a_dict_as_a_batch(code):
    res = rlm_run('Q', 'abc', model=ScriptLM([block(code), 'FINAL(done)']))
    assert 'TypeError: prompts must be a list of str, not a dict' in res.iterations[0].code_blocks[0].result.stderr

def test_a_script_of_one_reply():
    assert rlm_run('Q', 'abc', model=ScriptLM([block('1'), 'FINAL(42)'])).answer == '42'
    lm = ScriptLM('FINAL(42)')
    assert run_sync(lm(HI)).text == 'FINAL(42)'
    with pytest.raises(LMError, match='script of 1 replies is over'): run_sync(lm(HI))
    assert run_sync(ScriptLM(Reply('x'))(HI)).text == 'x'
