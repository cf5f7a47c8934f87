"""The library that `overhead.py` compares with: `rlms` from PyPI, in a virtual environment of its own.

`rlms` also imports as `rlm`, so it can never share an environment with this library. `peer_python` finds or makes that
environment, for the parent; `peer_answer` is one run of `rlms` with a scripted client, for the process inside it.
"""
import asyncio, os, shutil, subprocess, sys, venv
from pathlib import Path

VERSION = '0.1.3'
ASK_VERSION = 'import importlib.metadata as m; print(m.version("rlms"))'

def installed(python):
    "The version of rlms that `python` has, or None."
    if not Path(python).exists(): return None
    res = subprocess.run([python, '-E', '-s', '-c', ASK_VERSION], capture_output=True, text=True)
    return res.stdout.strip() if res.returncode == 0 else None

def venv_dir():
    "Where the environment is kept, by the versions of rlms and of Python."
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home()/'.cache')
    return cache/'rlm-bench'/f'rlms-{VERSION}-py{sys.version_info.major}.{sys.version_info.minor}'

def peer_python(path=None):
    "An interpreter that has rlms: `path`, or one in the user's cache, which is made where it is missing."
    if path:
        found = shutil.which(path)
        if not found or not installed(found): sys.exit(f'{path} is no Python interpreter with rlms in it')
        return os.path.abspath(found) # Not resolved: a link in a virtual environment is what makes it one
    root = venv_dir()
    python = str(root/('Scripts/python.exe' if os.name == 'nt' else 'bin/python'))
    if installed(python) == VERSION: return python
    print(f'Installing rlms {VERSION} into {root.parent.name}/{root.name} of the cache directory ...', file=sys.stderr)
    try:
        venv.create(root, clear=True, with_pip=True)
        subprocess.run([python, '-m', 'pip', 'install', '-qq', '--disable-pip-version-check', f'rlms=={VERSION}'], check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        sys.exit(f'Could not install rlms ({e}); give an interpreter that has it with --peer-python')
    return python

def fake_client(say, delay):
    "A client of rlms: `say()` for the turns, a fixed reply after `delay` seconds for each prompt of a batch."
    from rlm.clients.base_lm import BaseLM
    from rlm.core.types import ModelUsageSummary, UsageSummary
    class Fake(BaseLM):
        def completion(self, prompt): return say()
        async def acompletion(self, prompt):
            await asyncio.sleep(delay)
            return f'reply to {prompt}'
        def get_usage_summary(self): return UsageSummary({self.model_name: self.get_last_usage()})
        def get_last_usage(self): return ModelUsageSummary(1, 0, 0)
    return Fake('fake')

def peer_answer(say, context, turns, delay):
    "One run of rlms: no logger, nothing printed. Its batches have a fixed concurrency of 16."
    import rlm.core.rlm as core
    client = fake_client(say, delay)
    core.get_client = lambda backend, kwargs: client
    engine = core.RLM(backend='openai', backend_kwargs=dict(model_name='fake'), max_iterations=turns)
    return engine.completion(context, 'What is x?').response
