"""Recursive Language Models in notebooks: the namespace is the environment."""

__version__ = "0.1.0"

# Written by hand. Names come from their modules when they are first used, so that `import rlm` costs next to nothing.
import importlib

_names = {
    '_rlmpaper_compat': 'ANSWER NANO PAPER Protocol',
    'core': 'LimitExceeded Limits LMError RLMError RLMResult RunConfig arlm_run exec_code llm_query llm_query_batched load_ns rlm_iter '
        'rlm_query rlm_query_batched rlm_run save_ns',
    'errors': 'LMAuthError LMConnectionError LMModelError LMRefused',
    'lm': 'LM OfflineLM Reply ScriptLM get_lm',
    'providers': 'ClaudetteLM',
    'trace': 'CallStore RunLog load_run replay resume rewind',
    'display': 'show_run',
    'remote': 'NamespaceClosed SandboxError SessionLost',
    'sandbox': 'Sandbox',
    'vm': 'VM',
}
_where = {name: module for module, names in _names.items() for name in names.split()}
__all__ = sorted(_where)

def __getattr__(name):
    if name not in _where: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    globals()[name] = value = getattr(importlib.import_module(f'{__name__}.{_where[name]}'), name)
    return value

def __dir__(): return sorted({*globals(), *__all__})
