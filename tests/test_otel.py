"""Runs as OpenTelemetry spans: names and parents are right, whatever thread something happens on."""
import pytest
from rlm import rlm_run
from rlm.lm import FnLM, LMError, Reply, Usage
from rlm.otel import _Spans, observer
from common import block, first, is_turn, script, tree, turn

pytest.importorskip('opentelemetry.sdk', reason='the SDK of OpenTelemetry is not installed')
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

@pytest.fixture
def memory(): return InMemorySpanExporter()

@pytest.fixture
def tracer(memory):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    return provider.get_tracer('test')

def kids(spans, parent): return [s for s in spans if s.parent and s.parent.span_id == parent.context.span_id]
def named(spans, name): return [s for s in spans if s.name.startswith(name)]

def test_children_on_many_threads(memory, tracer):
    names = [f'kid{i}' for i in range(8)]
    lm = tree([block(f'print(rlm_query_batched({names}))'), 'FINAL(done)'], kid=[block('print(llm_query_batched([context + "a", context + "b"]))'), 'FINAL(1)'])
    with tracer.start_as_current_span('request') as outer: rlm_run('Q?', 'text', model=lm, on_event=_Spans(tracer).on_event)
    spans = memory.get_finished_spans()
    top, = kids(spans, outer)
    tool, = [s for s in kids(spans, top) if s.name == 'execute_tool python']
    agents = named(kids(spans, tool), 'invoke_agent')
    assert top.name == 'invoke_agent rlm' and len(agents) == 8 and len({s.attributes['rlm.run'] for s in agents}) == 8
    for s in agents:
        inner, = named(kids(spans, s), 'execute_tool')
        assert len(named(kids(spans, s), 'chat')) == 2 and len(kids(spans, inner)) == 2
        assert s.start_time <= inner.start_time <= inner.end_time <= s.end_time
    assert len({s.context.trace_id for s in spans}) == 1 and len(spans) == 1 + 1 + 2 + 1 + 8 * 6

def test_tokens_and_names(memory, tracer):
    def model(messages): return Reply(block('x = llm_query("p")') if is_turn(messages) and not turn(messages) else 'FINAL(1)', Usage(1, 10, 5, .5, 100, 20), 'end_turn', 'big-1')
    res = rlm_run('Q?', 'text', model=FnLM(model, 'big'), on_event=_Spans(tracer).on_event)
    spans = memory.get_finished_spans()
    chats = named(spans, 'chat')
    for s in chats:
        a = s.attributes
        assert s.name == 'chat big' and s.kind == trace.SpanKind.CLIENT and a['gen_ai.request.model'] == 'big' and a['gen_ai.response.model'] == 'big-1'
        assert a['gen_ai.operation.name'] == 'chat' and a['gen_ai.provider.name'] == 'fn'
        assert (a['gen_ai.usage.input_tokens'], a['gen_ai.usage.output_tokens'], a['gen_ai.usage.cache_read.input_tokens'], a['gen_ai.usage.cache_creation.input_tokens']) == (130, 5, 100, 20)
    run, = named(spans, 'invoke_agent')
    assert len(chats) == 3 and run.attributes['gen_ai.usage.input_tokens'] == 390 and run.attributes['rlm.stop'] == 'answer'
    assert sum('finish_reasons' in str(dict(s.attributes)) for s in chats) == 2 and res.answer == '1'

def test_nothing_that_was_said_is_in_a_span(memory, tracer):
    lm = tree([block('print(llm_query("tell a secret"))'), 'FINAL(secret)'])
    rlm_run('A secret?', 'secret text', model=lm, on_event=_Spans(tracer).on_event)
    assert 'secret' not in ''.join(s.to_json() for s in memory.get_finished_spans())

def test_failures_end_what_was_open(memory, tracer):
    def model(messages):
        if is_turn(messages) and turn(messages) == 1: raise LMError('the network is down')
        return block('llm_query("x")\n1/0') if is_turn(messages) else 'reply'
    with pytest.raises(LMError): rlm_run('Q?', 'text', model=model, on_event=_Spans(tracer).on_event)
    bad = {s.name: s.attributes.get('error.type') for s in memory.get_finished_spans() if not s.status.is_ok}
    assert bad == {'execute_tool python': 'ZeroDivisionError', 'chat model': 'errors', 'invoke_agent rlm': 'errors'}

def test_a_failed_child_is_an_error(memory, tracer):
    lm = tree([block('print(rlm_query_batched(["kid"]))'), 'FINAL(1)'], kid=[block('x = 1')])
    rlm_run('Q?', 'text', model=lm, limits=dict(max_calls=4), on_event=_Spans(tracer).on_event)
    kid, = [s for s in named(memory.get_finished_spans(), 'invoke_agent') if 'rlm.run' in s.attributes]
    assert kid.attributes['error.type'] == 'RLMError' and kid.attributes['rlm.stop'] == 'budget'

def test_it_is_off_until_a_provider_is_set():
    code = '''
        import sys
        import rlm.otel, rlm.core
        assert 'opentelemetry' not in sys.modules and rlm.otel.observer() is None
        from opentelemetry import trace
        assert rlm.otel.observer() is None
        trace.set_tracer_provider(trace.NoOpTracerProvider())
        assert rlm.otel.observer() is None
        print('off')
    '''
    assert script(code).stdout == 'off\n'
