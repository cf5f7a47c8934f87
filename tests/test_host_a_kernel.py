"""`ns=globals()` in a real kernel: the session's own names are the person's."""
import pytest

pytest.importorskip('ipykernel', reason='needs ipykernel')
pytest.importorskip('nbclient', reason='needs nbclient')
from test_kernel import kernel # The fixture

RUN = 'r = rlm_run("Q", "abc", globals(), ScriptLM([block({code!r}), block("n = 7", "FINAL_VAR(n)")]))\nb = r.iterations[0].code_blocks[0].result\n'

ENDS = ['exit()', 'quit()', 'exit(3)', 'import sys; sys.exit()', 'raise SystemExit', 'exit', 'import builtins; builtins.len = None', '[globals().pop(k, None) for k in ("In", "Out", "exit")]', 'In = Out = get_ipython = exit = 5', 'del context']
@pytest.mark.parametrize('code', ENDS)
def test_a_block_cannot_end_the_kernel(kernel, code):
    kernel.run('"first"; my_secret = 1')
    out = kernel.run(RUN.format(code=code) + 'r.value, type(In).__name__, type(exit).__name__, get_ipython() is not None')[1]
    assert out == "(7, 'list', 'ZMQExitAutocall', True)"
    assert kernel.run('len(In) > 3, context')[1] == "(True, 'abc')"

@pytest.mark.parametrize('name', ['In', 'Out', '_ih', '_oh', '_dh', '_i', '_i1', '_ii', '_'])
def test_a_block_does_not_see_the_cells(kernel, name):
    kernel.run('"a_secret_value"')
    kernel.run(RUN.format(code=f'print({name})'))
    assert kernel.run('b.error.split(":")[0], b.stdout')[1] == "('NameError', '')"

def test_a_block_ends_as_everywhere(kernel):
    kernel.run(RUN.format(code='exit(3)\nm = 1'))
    assert kernel.run('b.error, "m" in globals()')[1] == "('SystemExit: 3', False)"

def test_no_list_of_names_has_them(kernel):
    kernel.run('fresh = 1')
    code = RUN.format(code='print(SHOW_VARS())\nFINAL_VAR("there_is_none")') + 'import rlm.repl\nsaid = str(r.iterations[0].prompt) + b.stdout + b.stderr + str(b.locals) + str(rlm.repl.visible(globals()))\n'
    out = kernel.run(code + 'import re\n"fresh" in said, re.findall(r"\\b(In|Out|exit|quit|get_ipython|_ih|_oh)\\b", b.stdout + b.stderr + str(list(b.locals)) + str(list(rlm.repl.visible(globals()))))')[1]
    assert out == '(True, [])'

def test_input_is_an_eof_error(kernel):
    for ask in 'input("Name?")', 'import getpass; getpass.getpass()', 'import sys; sys.stdin.read()':
        kernel.run(RUN.format(code=ask))
        assert kernel.run('b.error.split(":")[0], "no person" in b.stderr')[1] == "('EOFError', True)"
