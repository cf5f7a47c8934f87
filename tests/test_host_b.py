"What a block prints and shows: terminal codes, streams, child processes, figures and other outputs."
import json, os, shutil, subprocess, sys, threading, time, tracemalloc
import pytest
from hypothesis import given, strategies as st
from rlm import exec_code
from rlm.repl import CappedText
from common import HANG, at, on_both, posix, script

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

# Streams

STREAMS = {
    'a text wrapper': ('import io\nw = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", line_buffering=True)\nw.write("é\\n"); None', 'é\n', ''),
    'a text wrapper as stdout': ('import io\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8")\nprint("a")', 'a\n', ''),
    'a text wrapper as stderr': ('import io\nsys.stderr = io.TextIOWrapper(sys.stderr.buffer, encoding="latin-1")\nprint("a", file=sys.stderr)', '', 'a\n'),
    'a wrapper that is gone': ('import io, gc\ndef f(): io.TextIOWrapper(sys.stdout.buffer).write("a\\n")\nf(); gc.collect()\nprint("b")', 'a\nb\n', ''),
    'a buffered writer': ('import io\nw = io.BufferedWriter(sys.stdout.buffer)\nw.write(b"a"); w.flush(); w.close()\nprint("b")', None, ''),
    'codecs': ('import codecs\nw = codecs.getwriter("utf-8")(sys.stdout.buffer)\nw.write("é"); None', 'é', ''),
    'a detached one': ('import io\nw = io.TextIOWrapper(sys.stdout.detach(), encoding="utf-8")\nw.write("a"); w.flush()', 'a', ''),
    'reconfigure': ('sys.stdout.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)\nprint("a")', 'a\n', ''),
    'what it says of itself': ('print(sys.stdout.encoding, sys.stdout.errors, sys.stdout.closed, sys.stdout.name, sys.stdout.writable(), sys.stdout.readable(), sys.stdout.seekable())', 'utf-8 strict False <stdout> True False False\n', ''),
    'fileno': ('import io\ntry: sys.stdout.fileno()\nexcept io.UnsupportedOperation: print("none")', 'none\n', ''),
    'fileno of the buffer': ('import io\ntry: sys.stderr.buffer.fileno()\nexcept OSError: print("none")', 'none\n', ''),
    'seek': ('import io\ntry: sys.stdout.seek(0)\nexcept io.UnsupportedOperation: print("none")', 'none\n', ''),
    'truncate': ('import io\ntry: sys.stdout.truncate(0)\nexcept OSError: print("none")', 'none\n', ''),
    'reading': ('import io\ntry: sys.stdout.read()\nexcept OSError: print("none")', 'none\n', ''),
    'closing': ('import contextlib\nwith contextlib.closing(sys.stdout): print("a")\nprint("b", sys.stdout.closed)', 'a\nb False\n', ''),
    'with': ('with sys.stdout as f: f.write("a\\n")\nprint("b")', 'a\nb\n', ''),
    'closing the buffer': ('sys.stdout.buffer.close()\nsys.stdout.buffer.write(b"a"); None', 'a', ''),
    'redirected': ('import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as f: print("in")\nprint(f.getvalue(), end="")', 'in\n', ''),
    'redirected to the other': ('import contextlib\nwith contextlib.redirect_stdout(sys.stderr): print("b")', '', 'b\n'),
    'the first streams': ('print("b", file=sys.__stderr__)\nprint("a", file=sys.__stdout__)', 'a\n', 'b\n'),
    'bytes in parts': ('for b in "é€".encode(): sys.stdout.buffer.write(bytes([b]))\nNone', 'é€', ''),
    'a memoryview': ('import array\nsys.stdout.buffer.write(array.array("B", b"ab")); sys.stdout.buffer.write(memoryview(b"c")); None', 'abc', ''),
    'text to the buffer': ('try: sys.stdout.buffer.write("a")\nexcept TypeError: print("no")', 'no\n', ''),
    'another write': ('try: sys.stdout.write = None\nexcept AttributeError: print("no")', 'no\n', ''),
    'writelines': ('sys.stdout.buffer.writelines([b"a", b"b"])', 'ab', ''),
}

@on_both
@pytest.mark.parametrize('what', STREAMS)
def test_a_stream_is_the_blocks(what, off_main, capfd):
    code, out, err = STREAMS[what]
    ns, real = {}, (sys.stdout, sys.stderr)
    res = at(off_main, exec_code, f'import sys\n{code}', ns)
    assert res.error is None, res.stderr
    assert out is None or (res.stdout, res.stderr) == (out, err)
    ns.clear()
    assert [o.closed for o in real] == [False, False] and capfd.readouterr() == ('', '')
    assert at(off_main, exec_code, 'print("alive")', {}).stdout == 'alive\n'

def test_a_wrapper_that_is_kept_writes_to_the_block_that_runs(capfd):
    ns = {}
    exec_code('import io, sys\nw = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8", write_through=True)', ns)
    assert exec_code('w.write("two\\n"); None', ns).stdout == 'two\n'
    assert exec_code('w.close()', ns).error is None
    exec_code('import io, sys\nlate = io.TextIOWrapper(sys.stdout.buffer)\nlate.write("late"); None', ns)
    ns.clear()
    assert capfd.readouterr() == ('', '')

def test_a_handler_of_an_earlier_block_logs_into_the_one_that_runs():
    p = script('''
        from rlm import exec_code
        exec_code('import logging, sys; logging.basicConfig(stream=sys.stdout, format="%(message)s"); logging.getLogger("x").addHandler(logging.StreamHandler())', {})
        res = exec_code('import logging; logging.getLogger("x").warning("careful")', {})
        assert (res.stdout, res.stderr) == ('careful\\n', 'careful\\n'), res''')
    assert (p.returncode, p.stdout, p.stderr) == (0, '', '')

# Child processes

CHILDREN = {
    'system': ('import os\nos.system("echo out; echo err >&2; exit 3")', 'out\n768\n', 'err\n'),
    'run': ('import subprocess\nsubprocess.run(["sh", "-c", "echo out; echo err >&2"]).returncode', 'out\n0\n', 'err\n'),
    'call': ('import subprocess\nsubprocess.call("echo out", shell=True)', 'out\n0\n', ''),
    'check_call': ('import subprocess\nprint("a"); subprocess.check_call("echo out", shell=True); print("b")', 'a\nout\n0\nb\n'.replace('0\n', ''), ''),
    'Popen': ('import subprocess\np = subprocess.Popen("echo out", shell=True)\np.wait()', 'out\n0\n', ''),
    'captured': ('import subprocess\nsubprocess.run("echo out; echo err >&2", shell=True, stdout=subprocess.PIPE, text=True).stdout', "'out\\n'\n", 'err\n'),
    'check_output': ('import subprocess\nsubprocess.check_output("echo out; echo err >&2", shell=True)', "b'out\\n'\n", 'err\n'),
    'stderr to stdout': ('import subprocess\nsubprocess.run("echo err >&2", shell=True, stderr=subprocess.STDOUT).returncode', 'err\n0\n', ''),
    'to our streams': ('import subprocess, sys\nsubprocess.run("echo out; echo err >&2", shell=True, stdout=sys.stderr, stderr=sys.stdout.buffer).returncode', 'err\n0\n', 'out\n'),
    'devnull': ('import subprocess\nsubprocess.run("echo out", shell=True, stdout=subprocess.DEVNULL).returncode', '0\n', ''),
    'positional': ('import subprocess\nsubprocess.Popen("echo out", -1, None, None, None, None, None, True, True).wait()', 'out\n0\n', ''),
    'popen': ('import os\nos.popen("echo out; echo err >&2").read()', "'out\\n'\n", 'err\n'),
    'asyncio': ('import asyncio\nasync def f():\n  p = await asyncio.create_subprocess_shell("echo out")\n  return await p.wait()\nasyncio.run(f())', 'out\n0\n', ''),
    'stdin': ('import subprocess\nsubprocess.run("cat").returncode', '0\n', ''),
    'posix_spawn': ('import os\npid = os.posix_spawnp("sh", ["sh", "-c", "echo out"], os.environ)\nos.waitpid(pid, 0)[1]', 'out\n0\n', ''),
    'spawnlp': ('import os\nos.spawnlp(os.P_WAIT, "sh", "sh", "-c", "echo out; echo err >&2")', 'out\n0\n', 'err\n'),
    'fork': ('import os\npid = os.fork()\nif pid == 0:\n  print("out"); os.write(1, b"raw\\n"); os._exit(0)\nos.waitpid(pid, 0)[1]', 'out\nraw\n0\n', ''),
    'fork and exec': ('import os\npid = os.fork()\nif pid == 0: os.execlp("echo", "echo", "out")\nos.waitpid(pid, 0)[1]', 'out\n0\n', ''),
    'a child of a fork': ('import os\npid = os.fork()\nif pid == 0:\n  os.system("echo out"); os._exit(0)\nos.waitpid(pid, 0)[1]', None, ''),
    'multiprocessing': ('import multiprocessing as m\np = m.get_context("fork").Process(target=print, args=["out"])\np.start(); p.join(); p.exitcode', 'out\n0\n', ''),
    'multiprocessing, spawned': ('import multiprocessing as m\np = m.get_context("spawn").Process(target=print, args=["out"])\np.start(); p.join(); p.exitcode', 'out\n0\n', ''),
    'a terminal': ('import os, pty\npid, fd = pty.fork()\nif pid == 0: os.execlp("echo", "echo", "out")\nout = os.read(fd, 100)\nos.waitpid(pid, 0); out', "b'out\\r\\n'\n", ''),
    'much': ('import subprocess\nsubprocess.run("yes | head -c 3000000", shell=True).returncode', None, ''),
    'not found': ('import subprocess\ntry: subprocess.run(["/no/such/thing"])\nexcept FileNotFoundError: print("none")', 'none\n', ''),
    'a thread': ('import threading, os\nt = threading.Thread(target=os.system, args=["echo out"]); t.start(); t.join()', 'out\n', ''),
}

@posix
@on_both
@pytest.mark.parametrize('what', CHILDREN)
def test_what_a_child_prints_is_the_blocks(what, off_main, capfd):
    code, out, err = CHILDREN[what]
    fds = len(os.listdir('/dev/fd'))
    res = at(off_main, exec_code, code, {'__name__': '__main__'})
    assert res.error is None, res.stderr
    if out is not None: assert res.stdout == out
    assert res.stderr == err and capfd.readouterr() == ('', '')
    assert what not in ('much', 'a child of a fork') or len(res.stdout) > 3
    end = time.monotonic() + HANG
    while len(os.listdir('/dev/fd')) > fds + 2 and 'spawned' not in what: assert time.monotonic() < end, 'descriptors are left open'

@posix
def test_children_of_blocks_that_run_at_once_are_told_apart(capfd):
    code = 'import os, subprocess\nfor i in range(10): os.system(f"echo {me}"); subprocess.run(["echo", me])\nNone'
    res = {}
    threads = [threading.Thread(target=lambda me=me: res.update({me: exec_code(code, dict(me=me))})) for me in 'abc']
    for o in threads: o.start()
    for o in threads: o.join(120)
    assert {k: v.stdout for k, v in res.items()} == {k: f'{k}\n' * 20 for k in 'abc'}
    assert capfd.readouterr() == ('', '')

@posix
@pytest.mark.parametrize('how', ['subprocess.Popen(["sleep", "100"])', 'os.system("sleep 100 & echo $! > pid")', 'subprocess.run("sleep 100 & echo $! > pid", shell=True)'])
def test_a_process_in_the_background_does_not_hold_up_the_block(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ns = {}
    res = exec_code(f'import os, subprocess\np = {how}\nprint("on")', ns)
    assert res.stdout == 'on\n' and res.execution_time < 60
    pid = ns['p'].pid if hasattr(ns['p'], 'pid') else int((tmp_path / 'pid').read_text())
    os.kill(pid, 9)

@posix
def test_a_child_that_prints_for_ever_holds_nothing_up():
    res = exec_code('import subprocess\np = subprocess.Popen("yes", shell=True, start_new_session=True)\nfor i in range(100): print("mine")\nimport os; os.killpg(p.pid, 9); p.wait()', {}, max_output=1000)
    assert res.error is None and len(res.stdout) < 1100

@posix
def test_a_time_limit_ends_system():
    res = exec_code('import os; os.system("sleep 100")', {}, timeout=.3)
    assert 'BlockTimeout' in res.error and res.execution_time < 60

@posix
def test_children_of_the_host_are_its_own(capfd):
    exec_code('', {})
    os.system('echo host'); subprocess.run(['echo', 'host'])
    assert capfd.readouterr().out == 'host\nhost\n'

# Outputs

def has(name):
    import importlib.util
    return importlib.util.find_spec(name) is not None

draws = pytest.mark.skipif(not has('matplotlib'), reason='matplotlib is not installed')
tables = pytest.mark.skipif(not has('pandas'), reason='pandas is not installed')
TABLE = 'class Table:\n  def __repr__(self): return "a table"\n  def _repr_html_(self): return "<table></table>"\n'

def png_size(res, i=0):
    import base64, struct
    return struct.unpack('>II', base64.b64decode(res.outputs[i]['data']['image/png'])[16:24])

SHOWN = {
    'display': (TABLE + 'display(Table())', 'a table\n'),
    "IPython's display": (TABLE + 'from IPython.display import display\ndisplay(Table())', 'a table\n'),
    'IPython.display.display': (TABLE + 'import IPython.display as d\nd.display(Table())', 'a table\n'),
    'a last expression': (TABLE + 'Table()', 'a table\n'),
    'HTML': ('from IPython.display import HTML, display\ndisplay(HTML("<table></table>"))', '<IPython.core.display.HTML object>\n'),
    'raw': ('display({"text/html": "<table></table>", "text/plain": "a table"}, raw=True)', 'a table\n'),
}

@on_both
@pytest.mark.parametrize('what', SHOWN)
def test_what_is_shown_is_an_output(what, off_main):
    code, out = SHOWN[what]
    res = at(off_main, exec_code, code, {})
    assert (res.error, res.stdout) == (None, out), res.stderr
    assert [(o['output_type'], o['data']) for o in res.outputs] == [('display_data', {'text/html': '<table></table>', 'text/plain': out.strip()})]
    assert len(res.notes) == 1 and 'HTML' in res.notes[0] and 'shown to the person' in res.notes[0]
    back = type(res).from_dict(json.loads(json.dumps(res.to_dict())))
    assert back.outputs == res.outputs and back.to_dict() == res.to_dict()

def test_nothing_shown_leaves_no_trace_in_a_log():
    res = exec_code('print(1)\n[1, 2]', {})
    assert res.outputs == [] and 'outputs' not in res.to_dict() and res.notes == []

@tables
def test_a_table_as_a_last_expression():
    res = exec_code('import pandas as pd\npd.DataFrame(dict(a=[1, 2]))', {})
    assert '<table' in res.outputs[0]['data']['text/html'] and res.stdout == res.outputs[0]['data']['text/plain'] + '\n'
    assert 'DataFrame' in res.notes[0]

def test_many_and_large_outputs_are_capped_and_said():
    res = exec_code('for i in range(50): display({"text/html": str(i)}, raw=True)', {})
    assert len(res.outputs) == 20 and '30 more' in res.notes[-1]
    res = exec_code('display({"text/html": "x" * 3_000_000, "text/plain": "y" * 3_000_000}, raw=True)', {})
    assert 'text/html' not in res.outputs[0]['data'] and len(res.outputs[0]['data']['text/plain']) < 1_000_100 and 'Too large' in res.notes[0]

def test_a_form_that_fails_is_said_and_the_rest_is_shown():
    res = exec_code(TABLE + '  def _repr_png_(self): raise ValueError("no")\nTable()', {})
    assert res.error is None and 'text/html' in res.outputs[0]['data'] and any('_repr_png_' in o for o in res.notes)

def test_forms_of_classes_and_mocks_are_no_forms():
    res = exec_code('from unittest.mock import Mock\ndisplay(Mock())\n' + TABLE + 'Table', {})
    assert res.error is None and not any('HTML' in o for o in res.notes)

DRAWN = {
    'open at the end': ('plt.plot([1, 2]); None', 1), 'show': ('plt.plot([1, 2]); plt.show(); print(plt.get_fignums())', 1),
    'two': ('plt.figure(); plt.figure(); None', 2), 'show twice': ('plt.plot([1]); plt.show(); plt.plot([2]); plt.show()', 2),
    'closed': ('plt.plot([1]); plt.close()', 0), 'subplots': ('fig, ax = plt.subplots(2, 2); None', 1),
    'a last expression': ('fig, ax = plt.subplots()\nfig', 1), 'displayed': ('fig, ax = plt.subplots()\ndisplay(fig)', 1),
    'without pyplot': ('from matplotlib.figure import Figure\nFigure()', 1), 'before an error': ('plt.plot([1])\n1/0', 1),
    'another size': ('plt.figure(figsize=(3, 2)); None', 1),
}

@draws
@on_both
@pytest.mark.parametrize('what', DRAWN)
def test_figures(what, off_main):
    code, n = DRAWN[what]
    res = at(off_main, exec_code, f'import matplotlib.pyplot as plt\n{code}', {})
    assert (res.error is None) == ('error' not in what), res.stderr
    assert [list(o['data']) for o in res.outputs] == [['image/png']] * n
    size = (300, 200) if 'size' in what else (640, 480)
    for i in range(n):
        assert png_size(res, i) == size
        assert res.notes[i] == f'A figure (PNG, {size[0]} x {size[1]}) was shown to the person; you see only this line.'
    again = at(off_main, exec_code, 'import matplotlib.pyplot as plt\nplt.get_fignums()', {})
    assert again.stdout == '[]\n' and again.outputs == []

@draws
def test_figures_of_two_blocks_at_once_and_of_the_host_do_not_mix():
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    exec_code('', {})
    host = plt.figure(7)
    both, res = threading.Barrier(2), {}
    code = 'import matplotlib.pyplot as plt\nfor i in range(5):\n  plt.figure(figsize=(n, 1)); both.wait(60); plt.plot([i]); both.wait(60)\nprint(plt.get_fignums(), plt.gcf().get_figwidth()); both.wait(60); plt.close(1)'
    def run(n): res[n] = exec_code(code, dict(n=n, both=both))
    threads = [threading.Thread(target=run, args=[n]) for n in (2, 3)]
    for o in threads: o.start()
    for o in threads: o.join(120)
    for n in (2, 3):
        assert (res[n].error, res[n].stdout) == (None, f'[1, 2, 3, 4, 5] {n}.0\n'), res[n].stderr
        assert [png_size(res[n], i) for i in range(4)] == [(n * 100, 100)] * 4 and len(res[n].outputs) == 4
    assert plt.get_fignums() == [7] and plt.gcf() is host
    plt.close('all')

@draws
def test_no_window_and_no_import_of_ours():
    p = script('''
        import sys
        from rlm import exec_code
        res = exec_code("1", {})
        print(len(res.outputs), 'matplotlib' in sys.modules, 'tkinter' in sys.modules, 'IPython' in sys.modules, res.error)''')
    assert p.stdout.split() == ['0', 'False', 'False', 'False', 'None'], p.stderr
    p = script('''
        import sys
        from rlm import exec_code
        res = exec_code('import matplotlib.pyplot as plt\\nplt.plot([1]); plt.show()', {})
        print(len(res.outputs), 'tkinter' in sys.modules, res.error)''')
    assert p.stdout.split() == ['1', 'False', 'None'], p.stderr

# In a sandbox, and in a notebook

@posix
@pytest.mark.parametrize('kind', ['process', pytest.param('sandbox', marks=pytest.mark.skipif(shutil.which('bwrap') is None, reason='bubblewrap is not installed'))])
def test_a_sandbox_shows_the_same(kind):
    from kinds import new_ns
    with new_ns(kind) as ns:
        res = exec_code(TABLE + 'import os\nos.system("echo out; echo err >&2")\nprint("\\rbar", end="\\rBAR\\n")\ndisplay(Table())', ns)
        assert (res.error, res.stdout, res.stderr) == (None, 'out\nBAR\na table\n', 'err\n')
        assert res.outputs == [dict(output_type='display_data', data={'text/plain': 'a table'}, metadata={})] # HTML may hold script, and its author is not trusted
        assert len(res.notes) == 1 and 'HTML' in res.notes[0]
        assert len(exec_code('for i in range(50): display({"text/plain": str(i)}, raw=True)', ns).outputs) == 20

def test_outputs_that_are_made_up_are_not_taken():
    from rlm.output import known_outputs
    good = dict(output_type='display_data', data={'text/html': 'x'}, metadata={})
    for odd in (None, 5, 'text', {}, [None], [[]], [{'data': 5}], [{'data': {'text/html': 5}}], [{'data': {'text/html': 'x' * 2_000_000}}], [{'data': {5: 'x'}}]):
        assert known_outputs(odd) == []
    assert known_outputs([{'data': {'text/html': 'x', 'evil': 'y'}, 'metadata': {'a': 1}, 'more': 2}] * 100) == [good] * 20

IN_KERNEL = '''
from rlm import exec_code
import json
code = """
class Table:
  def __repr__(self): return "a table"
  def _repr_html_(self): return "<table></table>"
from IPython.display import display as show
show(Table())
display(Table())
Table()
"""
res = exec_code(code, {}, timeout=100)
print(json.dumps([res.stdout, [o['data'] for o in res.outputs], res.error]))
'''
PLOTS = '''
import os
code = "import matplotlib.pyplot as plt\\nplt.plot([1]); plt.show()\\nplt.plot([2]); None"
res = exec_code(code, globals())
os.system('true')
print(json.dumps([len(res.outputs), res.notes, res.error]))
'''

@posix
def test_a_notebook_shows_it_to_the_person():
    pytest.importorskip('ipykernel', reason='needs ipykernel')
    nbformat, nbclient = pytest.importorskip('nbformat', reason='needs nbformat'), pytest.importorskip('nbclient', reason='needs nbclient')
    cells = [IN_KERNEL] + ([PLOTS] if has('matplotlib') else [])
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(o) for o in cells])
    nbclient.NotebookClient(nb, timeout=120).execute()
    def said(i): return json.loads(''.join(o['text'] for o in nb.cells[i].outputs if o['output_type'] == 'stream'))
    def seen(i, mime): return sum(mime in o['data'] for o in nb.cells[i].outputs if o['output_type'] == 'display_data')
    table = {'text/html': '<table></table>', 'text/plain': 'a table'}
    assert said(0) == ['a table\n' * 3, [table] * 3, None] and seen(0, 'text/html') == 3
    if len(cells) == 2:
        assert said(1) == [2, ['A figure (PNG, 640 x 480) was shown to the person; you see only this line.'] * 2, None] and seen(1, 'image/png') == 2

def test_what_the_model_is_told():
    from rlm import ScriptLM, rlm_run
    show = '```repl\ndisplay({"text/html": "<b>"}, raw=True)\n```'
    bar = '```repl\nimport os\nfor i in range(1000): print(f"\\r{i}/999", end="")\nprint(); x = os.system("echo child")\n```'
    res = rlm_run('Who?', 'some text', model=ScriptLM([show, bar, 'FINAL(done)']))
    told = [str(it.prompt) for it in res.iterations]
    assert 'A value (HTML, 3 characters) was shown to the person' in told[1] and 'Nothing was printed' not in told[1]
    assert '999/999' in told[2] and '998/999' not in told[2]
    assert os.name == 'nt' or 'child' in told[2]
    assert [len(b.result.outputs) for it in res.iterations for b in it.code_blocks] == [1, 0]
