"""Other providers, through the real litellm, against an OpenAI-style server on loopback."""
import json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip('litellm', reason='litellm has requirements of its own; .ci/run tests it in an environment of its own')
from rlm import LMError, rlm_run
from rlm.lm import LitellmLM, LMAuthError, LMModelError, run_sync

HI = [dict(role='user', content='hi')]


class OpenAIStyle(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['content-length'])))
        status, replies = self.server.status, self.server.replies
        message = dict(role='assistant', content=replies.pop(0) if replies and status == 200 else '')
        done = dict(id='x', object='chat.completion', created=1, model=body['model'], choices=[dict(index=0, finish_reason='stop', message=message)],
            usage=dict(prompt_tokens=7, completion_tokens=3, total_tokens=10))
        data = json.dumps(done if status == 200 else dict(error=dict(message='no', type='t', code='c'))).encode()
        self.send_response(status)
        self.send_header('content-type', 'application/json')
        self.send_header('content-length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args): pass


@pytest.fixture
def server():
    srv = ThreadingHTTPServer(('127.0.0.1', 0), OpenAIStyle)
    srv.status, srv.replies = 200, []
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    yield srv
    srv.shutdown()
    srv.server_close()


def model(srv): return LitellmLM('openai/gpt-4o-mini', api_base=f'http://127.0.0.1:{srv.server_port}/v1', api_key='k', num_retries=0)


def test_a_run_is_answered_and_priced(server):
    server.replies = ['```repl\nn = llm_query("How many?")\n```', '7', 'FINAL_VAR(n)']
    res = rlm_run('How many?', 'text', model=model(server))
    assert res.answer == '7' and res.usage.total.total_calls == 3 and res.usage.total.total_input_tokens == 21
    assert res.cost == pytest.approx(3 * (7 * .15 + 3 * .6) / 1e6)


@pytest.mark.parametrize('status, kind', [(401, LMAuthError), (404, LMModelError), (500, LMError)])
def test_errors_have_their_type(server, status, kind):
    server.status = status
    with pytest.raises(kind) as e: run_sync(model(server)(HI))
    assert '\n' not in str(e.value)


def test_unknown_provider():
    with pytest.raises(LMError, match='Provider'): run_sync(LitellmLM('nosuch/model')(HI))
