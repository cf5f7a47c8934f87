"""The reader on anything at all: it never raises, loses and doubles nothing, and takes linear time."""
import random, time
import pytest
from hypothesis import given, settings, strategies as st
from rlm import LMError, rlm_run
from rlm.parsing import explain_unrun, find_code_blocks, find_final_answer, find_last_answers, read_reply, set_reasoning_aside, whole_answer

PIECES = ['```', '````', '~~~', '```repl', '```python', '```json', '``` repl', '```markdown', 'Look: ```repl', '```python import x', '`', '\n', '\n', '\n', '\r\n', ' ', '    ', '> ', '- ', '1. ', '**', '#',
    'FINAL(', 'FINAL_VAR(', 'FINAL: ', 'FINAL(1) a', '1) b)', ')', '(', '（', '"', "'", '"""', "'''", '\\', 'x = 1', 'print(1)', 'def f():', '<think>', '</think>', '<THINKING>', '[THINK]', '[/THINK]',
    '<code>', '</code>', '<tool_call>', '</tool_call>', '{"name": "a", "arguments": {}}', '[TOOL_CALLS]', '<|channel|>analysis<|message|>', '<|end|>', '<|im_end|>', '\u200b', '\ufeff', 'é', '\ud800', '\0']

@settings(max_examples=400)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=40).map(''.join))
def test_nothing_is_lost_or_doubled(text):
    parts = read_reply(text)
    assert ''.join(p.text for p in parts) == text
    assert all(a.end == b.start for a, b in zip(parts, parts[1:])) and all(p.text == text[p.start:p.end] for p in parts)
    find_code_blocks(text), find_last_answers(text), whole_answer(text), explain_unrun(text), set_reasoning_aside(text)
    answer = find_final_answer(text, dict(x=1))
    assert answer is None or answer.strip()

LINES = [*(o for o in PIECES if o.strip()), '`\n', '```x\n', 'FINAL(\n', 'FINAL_VAR(\n', 'FINAL("\n', 'FINAL(a (b\n', 'FINAL(1) a (b\n', 'FINAL(```repl\n', 'FINAL(\n```repl\nx\n```\n', 'a FINAL(', '`FINAL(\n', '<think>\n',
    '</think>\n', '<code>\n', '<code>x</code>\n', '{"name":\n', '[{"name":\n', '> ```repl\n', '```repl\nx = """\n```\n', '```repl\nprint(1)```', 'x```\n', '<tool_call>{"', '```repl\n</think>\n', '```repl\nx()\n```repl\n', '    ```python\n    x',
    '\n', ' \n', '> \n', '-\n', '* \n', '` ', 'Final =\n', 'Final = x   ', 'answer["content"] = x\n', '# FINAL\n', 'final answer: \n', '<|channel|> ']

def seconds(text):
    t0 = time.process_time()
    read_reply(text), explain_unrun(text), find_last_answers(text), whole_answer(text), find_final_answer(text, {})
    return time.process_time() - t0

@pytest.mark.parametrize('piece', LINES, ids=repr)
def test_four_times_the_text_takes_about_four_times_as_long(piece):
    small, large = (piece * (n // len(piece)) for n in (100_000, 400_000))
    assert seconds(large) < 12 * seconds(small) + 1

def test_ten_thousand_replies_of_random_bytes():
    rnd, asked = random.Random(0), 0
    def model(msgs):
        nonlocal asked
        asked += 1
        some = rnd.choices(PIECES, k=5) if rnd.random() < .5 else [rnd.randbytes(40).decode('latin-1')]
        return ''.join([*some, rnd.randbytes(20).decode('utf-8', 'replace')])
    while asked < 10_000:
        try: res = rlm_run('Q', 'text', model=model, max_iters=20)
        except LMError as e: assert 'no text' in str(e)
        else: assert res.stop in ('answer', 'max_iters')
