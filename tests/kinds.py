"""The kinds of namespace that the tests run on, each as a context manager; what is missing on this machine is skipped, with a reason."""
from contextlib import contextmanager
import pytest
from rlm.image import build_image
from rlm.sandbox import Sandbox, SandboxError
from rlm.vm import VM, VMError

KINDS = ['local', 'process', 'sandbox', 'vm']

@contextmanager
def new_ns(kind):
    if kind == 'local': yield {}
    elif kind == 'vm':
        with shared_vm().ns() as ns: yield ns
    else:
        try: ns = Sandbox(kind='process' if kind == 'process' else 'bwrap')
        except SandboxError as e: pytest.skip(str(e))
        with ns: yield ns

_vm = []
def shared_vm():
    "One machine for all tests: sessions are what is made anew."
    if not _vm:
        try: _vm.append(VM(build_image(), accel='tcg')) # Builds it the first time
        except VMError as e: pytest.skip(str(e))
    return _vm[0]
