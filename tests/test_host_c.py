"""Code in this process: languages, await and asyncio, context variables, classes that other processes know, and sources that stay."""
import pytest
from rlm import exec_code, repl

HANG = 180 # Seconds after which something hangs

@pytest.mark.parametrize('lang', ['bash2', 'Python', '', 'julia', None, 3, ['sh']])
def test_an_unknown_language_is_never_python(lang):
    ns = {}
    with pytest.raises(ValueError, match='python, bash, sh'): exec_code('x = 1', ns, lang=lang)
    assert 'x' not in ns

def test_an_unknown_language_goes_to_no_worker():
    from rlm.remote import RemoteNS
    class Never(RemoteNS):
        def _open(self, *args, **kw): raise AssertionError('something was sent')
    ns = Never.__new__(Never)
    with pytest.raises(ValueError, match='python, bash, sh'): ns.exec_code('x = 1', lang='bash2')
    with pytest.raises(ValueError, match='python, bash, sh'): exec_code('x = 1', ns, lang='bash2')

def test_a_language_is_a_row(monkeypatch):
    def run_words(code, ns, block, timeout, cap):
        ns['words'] = code.split()
        print(len(ns['words']))
    monkeypatch.setitem(repl.languages, 'words', run_words)
    ns = {}
    res = exec_code('three little words', ns, lang='words')
    assert res.stdout == '3\n' and ns['words'] == ['three', 'little', 'words']
    with pytest.raises(ValueError, match='python, bash, sh, words'): exec_code('x', ns, lang='word')
    def run_forever(code, ns, block, timeout, cap):
        while True: pass
    monkeypatch.setitem(repl.languages, 'forever', run_forever)
    assert exec_code('', ns, lang='forever', timeout=.1).error.startswith('BlockTimeout')
