"""What the tests that talk to `rlm.testing.MessagesServer` share: a client, a run, and what its requests must look like."""
import json
import claudette.asink # Takes seconds the first time: no limit of a test should have to wait for that
from common import HANG
from rlm import ClaudetteLM, rlm_run
from rlm.testing import MessagesServer

MODEL, KEY = 'claude-sonnet-4-6', 'loopback-key'

def lm(srv, stream=False, **kw):
    "The client for a server; long replies are streamed."
    kw = dict(api_key=KEY, max_tokens=20_000 if stream else 8_000, price=(3, 15, 3.75, .3)) | kw
    return ClaudetteLM(MODEL, base_url=srv.url, **kw)

def block(code, lang='repl', then=''):
    "A reply with one block."
    return f'Next.\n```{lang}\n{code}\n```\n{then}'

def ask(srv, context='some text', ns=None, stream=False, client=None, query='What is in it?', **kw):
    "A run against `srv`."
    return rlm_run(query, context, {} if ns is None else ns, model=lm(srv, stream, **(client or {})), **kw)

def text(content):
    "The text of a message or a system prompt."
    return content if isinstance(content, str) else ''.join(o.get('text', '') for o in content)

def conversation(body):
    "What a request sends: (role, text) pairs."
    return [('system', text(body.get('system', '')))] + [(m['role'], text(m['content'])) for m in body['messages']]

def last(body):
    "The last message's text."
    return text(body['messages'][-1]['content'])

def is_turn(body):
    "Does a request come from a run's turn? A plain sub-call has no system prompt."
    return bool(body.get('system'))

def marks(body):
    "How many breakpoints a request has."
    return json.dumps(body).count('"cache_control"')

def wire_prefix(body):
    "The blocks that the provider's cache compares, as bytes, without the breakpoints."
    blocks = [('system', o) for o in body['system']] + [(m['role'], o) for m in body['messages'] for o in m['content']]
    return [json.dumps([role, {k: v for k,v in o.items() if k != 'cache_control'}], sort_keys=True).encode() for role, o in blocks]

def check_growth(bodies):
    "Requests of one run, in order: each is the one before it, or that and two more messages; the roles take turns."
    for b in bodies:
        roles = [m['role'] for m in b['messages']]
        assert roles == (['user', 'assistant'] * len(roles))[:len(roles)] and len(roles) % 2
    for a, b in zip(bodies, bodies[1:]):
        x, y = wire_prefix(a), wire_prefix(b)
        assert y[:len(x)] == x
        assert len(y) - len(x) in (0, 2)

def runs_of(requests):
    "The requests of turns, by the run that they come from: its first message."
    res = {}
    for r in requests:
        if is_turn(r['body']): res.setdefault(text(r['body']['messages'][0]['content']), []).append(r)
    return list(res.values())

def tree(res):
    "A result and those of all runs below it."
    yield res
    for o in res.children: yield from tree(o)

def numbers(u):
    "What can be compared with the server: calls, plain input, output, read, written."
    t = u.total
    return t.total_calls, t.total_input_tokens, t.total_output_tokens, t.total_cache_read_tokens, t.total_cache_write_tokens
