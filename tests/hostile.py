"""The one list of hostile programs, and the table of what they do to each kind of namespace.

`python tests/hostile.py` runs all of them on every kind that is here, and prints the table that stands in nbs/62_sandbox.ipynb."""
import ctypes, os, resource, secrets, socket, subprocess, sys, tempfile, textwrap, time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
import pytest
import kinds
from rlm import exec_code
from rlm.sandbox import Sandbox, SandboxError

# What a kind says that it keeps in bounds. A program that needs more is not run there: it could hurt this machine.
EACH = {'time', 'memory', 'end', 'frames'}
ALL = EACH | {'group', 'files', 'host', 'network', 'disk', 'userns'}
CLAIMS = dict(process=EACH, sandbox=ALL, gvisor=ALL, vm=ALL)

@contextmanager
def new_ns(kind):
    if kind != 'gvisor':
        with kinds.new_ns(kind) as ns: yield ns
        return
    try: ns = Sandbox(kind)
    except SandboxError as e: pytest.skip(str(e))
    with ns: yield ns

@dataclass
class Program:
    name: str
    needs: str # What must be kept in bounds
    code: str # Prints BREACH if it gets what it wants; `H` says what there is to get
    state: str # `kept` or `lost`, of the variables of the session; '' where either may be
    timeout: float = 120.
    check: object = lambda host, ns, other, res: None # Says what is wrong on the host, if it is not the program that can tell

class Host:
    "What there is to steal, to reach and to end on this machine."
    def __init__(self, stack):
        self.key, self.number = secrets.token_hex(16), f'{secrets.randbelow(10**6) + 10**6}.25'
        self.dir = stack.enter_context(tempfile.TemporaryDirectory())
        self.file = Path(self.dir)/'secret'; self.file.write_text(self.key); os.chmod(self.dir, 0o777)
        self.victim = subprocess.Popen(['sleep', '3600'], env=dict(PLANTED=self.key, PATH=os.environ['PATH']))
        stack.callback(lambda: (self.victim.kill(), self.victim.wait()))
        numbers = dict(x86_64=(248, 250), aarch64=(217, 219)).get(os.uname().machine) # Of add_key and keyctl
        self.keyctl, libc = numbers and numbers[1], ctypes.CDLL(None)
        if numbers and (n := libc.syscall(numbers[0], b'user', b'rlm-planted', self.key.encode(), len(self.key), -3)) > 0:
            stack.callback(libc.syscall, self.keyctl, 3, n)
        self.tcp = stack.enter_context(socket.create_server(('', 0)))
        self.local = stack.enter_context(socket.socket(socket.AF_UNIX)); self.local.bind(f'\0rlm-{self.key}'); self.local.listen()
    def data(self):
        ips = {o[4][0] for o in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
        return dict(key=self.key, file=str(self.file), dir=self.dir, pid=self.victim.pid, port=self.tcp.getsockname()[1], ips=sorted(ips),
            here=os.path.abspath(__file__), keyctl=self.keyctl, number=self.number)
    def running(self): # Is a process with the number in its command line there?
        return any(self.number.encode() in read(p) for p in Path('/proc').glob('[0-9]*/cmdline'))

def read(p):
    try: return p.read_bytes()
    except OSError: return b'' # It has ended

def tries(*lines): # Each line is tried; one that works is a breach
    return ''.join(f'try:\n{textwrap.indent(o, "    ")}\n    print("BREACH", {o!r})\nexcept OSError as e: pass\n' for o in lines)

WIRE = 'import gc\nw = next(o for o in gc.get_objects() if type(o).__name__ == "Worker")\n'

def not_bigger(host, ns, other, res): # A value that is too large says so and hurts nobody
    try: ns['big']
    except ValueError as e: return None if getattr(e, 'size', 0) == 100_000_000 else f'it says {e}'
    return 'all of it came out'

def left_over(host, ns, other, res):
    ns.close()
    end = time.monotonic() + 120
    look = f'import glob\nfor p in glob.glob("/proc/[0-9]*/cmdline"):\n    try: print({host.number!r} in open(p).read())\n    except OSError: pass'
    while host.running() or 'True' in exec_code(look, other, timeout=120).stdout:
        if time.monotonic() > end: return 'the child is still there'
        time.sleep(.05)

def differ(host, ns, other, res):
    draw = 'import random, os, uuid\nprint(random.random(), os.urandom(8).hex(), uuid.uuid4())'
    a, b = (exec_code(draw, o).stdout.split() for o in (ns, other))
    if set(a) & set(b) or len(a) != 3: return 'both sessions drew the same numbers'

def short(host, ns, other, res):
    if not 'characters cut' in res.stdout or len(res.stdout) > 201_000: return f'{len(res.stdout)} characters came out'

def failed(host, ns, other, res):
    if not res.error: return 'nothing was refused'

def quiet(host, ns, other, res):
    if res := exec_code('import time\ntime.sleep(.2)', ns).stdout: return f'the next block shows {res!r}'

PROGRAMS = [
    Program('endless loop', 'time', 'while True: pass', 'kept', 1),
    Program('sleep', 'time', 'import time; time.sleep(3600)', 'kept', 1),
    Program('C call that holds on', 'time', 'import itertools; sum(itertools.repeat(1))', 'lost', 1),
    Program('interrupts swallowed', 'time', 'import time\nwhile True:\n    try: time.sleep(3600)\n    except BaseException: pass', 'lost', 1),
    Program('signals ignored', 'time', 'import signal\nfor n in (2, 14, 15): signal.signal(n, signal.SIG_IGN)\nwhile True: pass', 'kept', 1),
    Program('one huge allocation', 'memory', 'x = b"x" * (6 << 30)\nprint("BREACH")', '', check=failed),
    Program('memory over many children', 'group', '''
        import os, select, signal
        r, w = os.pipe()
        for i in range(20):
            if os.fork() == 0:
                x = bytearray(200 << 20)
                for i in range(0, len(x), 4096): x[i] = 1
                os.write(w, b'x'); signal.pause()
        os.close(w); held = 0
        while select.select([r], [], [], 3)[0] and os.read(r, 1): held += 1
        if held * 200 > 2000: print('BREACH', held)''', ''),
    Program('fork bomb', 'group', 'import os\nwhile True:\n    try: os.fork()\n    except OSError: pass', '', 2),
    Program('fork bomb, counted', 'group', '''
        import os, time
        for n in range(5000):
            try:
                if os.fork() == 0: time.sleep(600); os._exit(0)
            except OSError: break
        else: print('BREACH')''', ''),
    Program('reading files of the host', 'files', 'import os\n' + tries(
        'open(H["file"]).read()', 'os.listdir(H["dir"])[0]', 'open("/etc/shadow").read()', 'open(H["here"]).read()'), 'kept'),
    Program('environment of the host', 'host', '''
        import glob
        for p in glob.glob('/proc/*/environ'):
            try: print('BREACH' * (H['key'].encode() in open(p, 'rb').read()))
            except OSError: pass''', 'kept'),
    Program('keys of the host', 'host', '''
        import ctypes
        if H['keyctl']:
            call, b = ctypes.CDLL(None).syscall, ctypes.create_string_buffer(100)
            n = call(H['keyctl'], 10, -3, b'user', b'rlm-planted', 0)
            if n > 0 and call(H['keyctl'], 11, n, b, 100) > 0: print('BREACH', b.value)''', 'kept'),
    Program('memory of the host', 'host', '''
        import glob
        def name(p):
            try: return open(p[:-3] + 'cmdline').read()
            except OSError: return ''
        print('BREACH' * any(name(p).startswith('sleep') for p in glob.glob('/proc/*/mem')))''', 'kept'),
    Program('signalling the host', 'host', 'import os\nfor pid in (H["pid"], os.getppid()):\n    try: os.kill(pid, 9)\n    except OSError: pass', ''),
    Program('killing all it can', 'host', 'import os, time\ntry: os.kill(-1, 9)\nexcept OSError: pass', ''),
    Program('loopback of the host', 'network', 'import socket\n' + tries(
        'socket.create_connection(("127.0.0.1", H["port"]), 1)', 'socket.create_connection(("10.0.2.2", H["port"]), 1)'), 'kept'),
    Program('local sockets of the host', 'network', 'import socket\n' + tries('socket.socket(socket.AF_UNIX).connect("\\0rlm-" + H["key"])'), 'kept'),
    Program('outside network', 'network', 'import socket\nprint([n for i, n in socket.if_nameindex()])\n' + tries(
        '[socket.create_connection((o, H["port"]), 1) for o in H["ips"] or 1/0]', 'socket.create_connection(("1.1.1.1", 443), 1)'), 'kept',
        check=lambda host, ns, other, res: None if res.stdout.strip() == "['lo']" or 'BREACH' in res.stdout else f'interfaces: {res.stdout}'),
    Program('hypervisor sockets', 'network', 'import socket\n' + tries(*(f'socket.socket({o})' for o in (40, 31, 38, 17))), 'kept'), # vsock, bluetooth, crypto, packet
    Program('DNS', 'network', 'import socket\n' + tries('socket.getaddrinfo("example.com", 80)'), 'kept'),
    Program('writing outside', 'files', 'import os, sys\nflags = os.O_WRONLY | os.O_CREAT\n' + tries('os.open(H["dir"] + "/x", flags)', 'os.open("/x", flags)',
        'os.open("/usr/x", flags)', 'os.open("/etc/x", flags)', 'os.open(sys.base_prefix + "/x", flags)', 'os.open("/dev/x", flags)'), 'kept'),
    Program('settings of the kernel', 'files', 'import os\n' + tries(
        *(f'os.open("/proc/{o}", os.O_WRONLY)' for o in ('sys/kernel/core_pattern', 'sys/kernel/hostname', 'sysrq-trigger'))), 'kept'),
    Program('filling the disk', 'disk', '''
        import os
        n, part = 0, bytes(1 << 20)
        for d in ('/tmp', '/dev/shm'):
            try:
                with open(d + '/fill', 'wb') as f:
                    while n < 4000: n += f.write(part) >> 20; f.flush()
            except OSError: pass
            if os.path.exists(d + '/fill'): os.remove(d + '/fill')
        if n >= 4000: print('BREACH')''', ''),
    Program('printing 1 GB', 'memory', 'for i in range(1000): print("x" * 1_000_000)', 'kept', check=short, timeout=120),
    Program('deep recursion', 'end', 'def f(): f()\nf()', 'kept', check=failed),
    Program('ending its process', 'end', 'import os; os._exit(3)', 'lost', check=failed),
    Program('segfault', 'end', 'import ctypes; ctypes.string_at(0)', 'lost', check=failed),
    Program('noise in the pipe', 'frames', 'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b"\\xff" * 64)\n    except OSError: pass', 'lost', 120),
    Program('a frame of 4 GB', 'frames', WIRE + 'import os, struct\n'
        'os.write(w.wire.wfd, struct.pack("!II", 2**32 - 1, 2**32 - 1) + bytes(1 << 16))', 'lost', 120, failed),
    Program('a frame nested deep', 'frames', WIRE + 'import os, struct\nd = b"[" * 1_000_000\n'
        'os.write(w.wire.wfd, struct.pack("!II", len(d), 0) + d)', 'lost', 5, failed),
    Program('a frame of many parts', 'frames', WIRE + 'import os, struct\nd = b"[" + b"{}," * 15_000_000 + b"0]"\n'
        'd = memoryview(struct.pack("!II", len(d), 0) + d)\n'
        'while d: d = d[os.write(w.wire.wfd, d):]', 'lost', 120, failed),
    Program('a forged result', 'frames', WIRE + 'w.wire.send(dict(op="done", id=w.now, stdout=7, locals=[3], final={"text": []}, notes=9))', 'lost', 120, failed),
    Program('a forged call', 'frames', WIRE + 'for f in ("eval", "FINAL", "exec_code", "__init__", "host_call"):\n'
        '    try: w.call(f, ["1"], {}); print("BREACH", f)\n    except NameError as e: pass', 'kept'),
    Program('a flood of calls', 'frames', WIRE + 'for i in range(100_000): w.wire.send(dict(op="call", id=i, job=w.now, name="f", args=[], kwargs={}))\n'
        'import time; time.sleep(600)', '', 5),
    Program('a flood of frames', 'frames', WIRE + 'for i in range(3000): w.wire.send(dict(op="done", id=0), bytes(2**20))\n'
        'import time; time.sleep(600)', 'lost', 120, failed),
    Program('builtins destroyed', 'end', 'import builtins; builtins.__dict__.clear()', 'lost', 2),
    Program('modules destroyed', 'end', 'import sys; sys.modules.clear()', '', 2),
    Program('a child left over', 'group', 'import subprocess; subprocess.Popen(["setsid", "sleep", H["number"]])', '', check=left_over),
    Program('a thread left over', 'end', 'import threading, time\ndef f():\n    for i in range(1000): print("late"); time.sleep(.01)\n'
        'threading.Thread(target=f).start()', 'kept', check=quiet),
    Program('nested user namespaces', 'userns', 'import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) == 0: print("BREACH")', 'kept'),
    Program('a result of 100 MB', 'memory', 'big = "x" * 100_000_000', 'kept', check=not_bigger),
    Program('the same random numbers', 'end', '', 'kept', check=differ),
]

def alive(ns, word): return exec_code(f'print({word!r})', ns, timeout=120).stdout == f'{word}\n'

def attack(program, host, ns, other):
    "Run a program; what it came to, in words."
    ns['kept'], ns['H'] = 'yes', host.data()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    res = exec_code(textwrap.dedent(program.code), ns, timeout=program.timeout)
    if 'BREACH' in res.stdout: return f'not contained: {res.stdout.strip()[-200:]}'
    if why := program.check(host, ns, other, res): return f'not contained: {why}'
    if host.victim.poll() is not None: return 'not contained: a process of the host has ended'
    if (grown := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) > 500_000: return f'not contained: the host grew by {grown} KB'
    if not alive(other, 'fine'): return 'not contained: the other session is gone'
    if not program.state: return 'contained'
    state = 'kept' if exec_code('print(kept)', ns, timeout=120).stdout == 'yes\n' else 'lost'
    if not alive(ns, 'back'): return 'not contained: no session after it'
    return f'contained, {state}'

def cell(program, kind):
    "What stands in the table for this program and kind."
    if program.needs not in CLAIMS[kind]: return 'not contained'
    with ExitStack() as stack:
        host, ns, other = Host(stack), stack.enter_context(new_ns(kind)), stack.enter_context(new_ns(kind))
        return attack(program, host, ns, other)

def table(kinds):
    "The table, from a run."
    yield f'| program | {" | ".join(kinds)} |'
    yield '|---' * (len(kinds) + 1) + '|'
    for p in PROGRAMS: yield f'| {p.name} | {" | ".join(cell(p, k) for k in kinds)} |'

def rows(text):
    "The cells of such a table: (program, kind) -> text."
    lines = [[o.strip() for o in l.strip('| \n').split('|')] for l in text.splitlines() if l.startswith('| ')]
    return {(l[0], kind): o for l in lines[1:] for kind, o in zip(lines[0][1:], l[1:])}

if __name__ == '__main__':
    for line in table(sys.argv[1:] or list(CLAIMS)): print(line, flush=True)
