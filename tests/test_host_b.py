"What a block prints and shows: terminal codes, streams, child processes, figures and other outputs."
import io, json, os, subprocess, sys, textwrap, threading, time, tracemalloc
import pytest
from hypothesis import given, strategies as st
from rlm import exec_code
from rlm.output import Terminal
from rlm.repl import CappedText
from common import HANG, at, elsewhere, forks, on_both, posix, script

def shown(*parts, cap=200_000):
    text = CappedText(cap)
    for o in parts: text.write(o)
    return text.text()

# Terminal text

SCREENS = {
    'a bar': ([f'\r{i}/1000 {"#" * (i // 100)}' for i in range(1001)], '1000/1000 ##########'),
    'a bar and a line': ([f'\r{i:3}%' for i in range(101)] + ['\ndone\n'], '100%\ndone\n'),
    'what was shown before it': (['before\n', 'half ', '\rHALF', '\n'], 'before\nHALF\n'),
    'a shorter one over a longer': (['a long line\rshort'], 'shortg line'),
    'erased to its end': (['a long line\r\x1b[Kshort'], 'short'),
    'erased whole': (['a long line\x1b[2K\rshort\n'], 'short\n'),
    'erased to its start': (['abcdef\x1b[3D\x1b[1K'], '    ef'),
    'blanked': (['bar bar\r       \rafter\n'], 'after\n'),
    'backspaces': (['10%\b\b\b20%\b\b\b30%\n'], '30%\n'),
    'a backspace at the start': (['\b\bx'], 'x'),
    'colours': (['\x1b[1;31mError\x1b[0m: \x1b[38;5;12mblue\x1b[m\n'], 'Error: blue\n'),
    'a cut sequence': (['a\x1b', '[', '3', '1', 'm', 'b'], 'ab'),
    'a sequence that never ends': (['a\x1b[31'], 'a'),
    'a title': (['\x1b]0;title\x07a\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\'], 'alink'),
    'two bars': (['one 0\ntwo 0\x1b[A\r', 'one 9\n', '\rtwo 9\n'], 'one 9\ntwo 9\n'),
    'up and down': (['a\nb\nc\x1b[2A\rA\x1b[2B\rC\n'], 'A\nb\nC\n'),
    'cleared': (['a\nb\n\x1b[2J\x1b[Hnew\n'], 'new\n'),
    'erased below': (['a\nb\nc\x1b[2A\r\x1b[J' 'x'], 'x'),
    'saved and restored': (['ab\x1b7cd\x1b8X\x1b[s\n\x1b[uY'], 'abXY\n'),
    'a column': (['abc\x1b[1GX\x1b[5GY'], 'XbcY'.replace('cY', 'c Y')),
    'a far column': (['a\x1b[99999999999CX'], 'a' + ' ' * 999 + 'X'),
    'lines of another system': (['a\r\nb\r', '\nc\r\n'], 'a\nb\nc\n'),
    'characters inserted and deleted': (['abcd\r\x1b[2P\x1b[1@X'], 'Xcd'),
    'a hidden cursor': (['\x1b[?25lx\x1b[?25h'], 'x'),
    'an escape of nothing': (['a\x1b\x01b'], 'a\x01b'),
}

@pytest.mark.parametrize('what', SCREENS)
def test_what_a_terminal_would_show(what):
    parts, want = SCREENS[what]
    assert shown(*parts) == want
    if 'never ends' not in what: assert shown(*''.join(parts)) == want, 'in single characters'
    res = exec_code('import sys\nfor o in parts: sys.stderr.write(o), sys.stdout.write(o)\nNone', dict(parts=parts))
    assert (res.stdout, res.stderr) == (want, want)

@given(st.text(alphabet='ab \n\t\x07é\u4e2d\x0b'), st.integers(1, 60))
def test_plain_text_is_untouched(s, cap):
    assert shown(s) == s and shown('\r', s) == s or s == ''
    half = max(cap // 2, 1)
    if len(s) > 2 * half: assert shown(s, cap=cap) == shown('\x1b[m', s, cap=cap) == f'{s[:half]}\n... [{len(s) - 2 * half:,} characters cut] ...\n{s[-half:]}'

@given(st.text(alphabet='ab\n\r\b\x1b[]0;1KJmAHP@LM\\78cD', max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_where_a_chunk_ends_makes_no_difference(s, cuts):
    cuts = sorted({0, len(s), *(min(o, len(s)) for o in cuts)})
    assert shown(*(s[a:b] for a, b in zip(cuts, cuts[1:]))) == shown(s)

@pytest.mark.parametrize('name, part, n', [
    ('a bar', '\rstep of a bar that is long enough to be one', 50_000), ('lines', '\x1b[32mgreen\x1b[0m\n', 50_000), ('one line', '\rx' + 'y' * 1000, 5_000),
    ('a long line', '\x1b[0mabcdefgh', 50_000), ('no end', '\x1b]0', 20_000), ('insertions', 'a\r\x1b[1000@', 5_000), ('up', 'a\n\x1b[9A', 30_000),
    ('blocks', '\x1b[m' + 'x' * 2_000_000, 10)])
def test_much_of_it_takes_bounded_memory(name, part, n):
    text = CappedText(10_000)
    tracemalloc.start()
    try:
        for _ in range(n): text.write(part)
        most = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert most < 12_000_000 and len(text.text()) < 600_000

def test_time_is_linear():
    def seconds(n):
        t0 = time.process_time()
        shown(*(f'\r{i} of many' for i in range(n)))
        return time.process_time() - t0
    assert min(seconds(40_000) for _ in range(3)) < 8 * min(seconds(10_000) for _ in range(3))

def test_a_bar_in_the_middle_of_much_text():
    res = exec_code('for i in range(30_000): print("line", i)\nfor i in range(1001): print(f"\\r{i}/1000", end="")\nprint()\nfor i in range(30_000): print("more", i)', {}, max_output=1000)
    assert res.stdout.startswith('line 0\nline 1\n') and res.stdout.endswith('more 29999\n') and len(res.stdout) < 1100
    res = exec_code('print("a" * 990)\nfor i in range(1001): print(f"\\r{i}/1000", end="")\nprint()', {}, max_output=2000)
    assert res.stdout == 'a' * 990 + '\n1000/1000\n'

@posix
def test_bash_too():
    assert exec_code(r"printf 'a\rb\n\033[31mred\033[0m\n'", {}, lang='bash').stdout == 'b\nred\n'
