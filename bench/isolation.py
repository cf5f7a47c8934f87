"""What isolation costs: `Sandbox` and `VM`, beside the IPython subprocess environment of `rlms` 0.1.3 from PyPI, in one run.

    python bench/isolation.py                     the table, in about a minute
    python bench/isolation.py --kinds sandbox     without the virtual machine
    python bench/isolation.py --json FILE         also write all measured numbers
    python bench/isolation.py --peer-python PATH  use an interpreter that has rlms[ipython]

Run it with an interpreter that has this library. `rlms` and what its environment needs go into an environment of their own, which is made in the user's cache
directory the first time; that needs the network. The virtual machine needs an image (`rlm image build`), and runs under QEMU's own translation here, with no
hardware behind it. Each kind is measured in a fresh process. Figures are minima: what else the machine does only adds to them.

- Start: from the constructor to the reply of the first block, which prints a number. Of a VM, that is to resume a template; cold is to boot one, with no template.
- Session: another namespace in the same VM, to the reply of its first block.
- Empty block: from the call to its result, for a block of no code.
- Host call: from inside a block, a function of the host that returns a short str. For rlms that is `rlm_query` and its broker.
- 100 MB context: a str goes in, until a block has said how long it is.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path

from peer import peer_python

BIG, CALLS = 100 * 10**6, 100
STARTS, BLOCKS = 5, 200
CALL = f'''import time
for i in range(5): {{f}}("x")
t0 = time.perf_counter()
for i in range({CALLS}): {{f}}("x")
print((time.perf_counter() - t0) / {CALLS})'''

def timed(f):
    "(seconds, result) of a call."
    t0 = time.perf_counter()
    res = f()
    return time.perf_counter() - t0, res

# A side gives: make() -> environment; run(env, code) -> stdout; put(env, text); call, the name of the host's function; close(env)

class Ours:
    "A namespace of this library."
    call = 'ask'
    def __init__(self, kind):
        self.kind = kind
        if kind == 'vm': self.make = self.new_vm
    def make(self):
        from rlm.sandbox import Sandbox
        return self.bound(Sandbox())
    def new_vm(self):
        from rlm.vm import VM
        self.vm = VM(accel='tcg')
        return self.bound(self.vm.ns())
    def bound(self, ns):
        from rlm.repl import Scaffold
        ns.bind(Scaffold(dict(ask=lambda prompt: 'reply')))
        return ns
    def run(self, ns, code):
        from rlm import exec_code
        res = exec_code(code, ns)
        if res.error: raise RuntimeError(res.stderr)
        return res.stdout
    def put(self, ns, text): ns.bind_context(text)
    def close(self, ns):
        ns.close()
        if self.kind == 'vm': self.vm.close()

class Theirs:
    "The environment of rlms."
    call = 'rlm_query'
    def make(self):
        from rlm.core.types import RLMChatCompletion, UsageSummary
        from rlm.environments.ipython_repl import IPythonREPL
        reply = lambda prompt, model=None: RLMChatCompletion('m', prompt, 'reply', UsageSummary({}), 0.)
        return IPythonREPL(kernel_mode='subprocess', subcall_fn=reply)
    def run(self, env, code):
        res = env.execute_code(code)
        if res.stderr: raise RuntimeError(res.stderr)
        return res.stdout
    def put(self, env, text): env.load_context(text)
    def close(self, env): env.cleanup()

def first(side):
    "A new environment that has run a block."
    env = side.make()
    if side.run(env, 'print(6 * 7)').strip() != '42': raise RuntimeError('wrong result')
    return env

def common(side):
    "The figures that all kinds have: name -> seconds of each repeat."
    side.close(first(side)) # Imports, compiled files, a template
    raw = dict(start=[])
    for _ in range(STARTS):
        seconds, env = timed(lambda: first(side))
        raw['start'].append(seconds)
        side.close(env)
    env = first(side)
    raw['empty'] = [timed(lambda: side.run(env, ''))[0] for _ in range(BLOCKS)]
    raw['call'] = [float(side.run(env, CALL.format(f=side.call))) for _ in range(5)]
    def big(): side.put(env, text); return side.run(env, 'print(len(context))')
    raw['context'] = []
    for i in range(3):
        text = f'{i}' + 'The quick brown fox jumps over the lazy dog.\n' * (BIG // 45)
        seconds, said = timed(big)
        if said.strip() != str(len(text)): raise RuntimeError('wrong length')
        raw['context'].append(seconds)
    side.close(env)
    return raw

def of_vm():
    "What only a VM has: a boot with no template, in a cache folder of its own, and another session."
    from rlm import exec_code
    from rlm.image import find_image
    from rlm.vm import VM
    image = find_image()
    with tempfile.TemporaryDirectory() as folder:
        os.environ['XDG_CACHE_HOME'] = folder
        cold, vm = timed(lambda: VM(image, accel='tcg'))
        def session():
            with vm.ns() as ns: return exec_code('print(6 * 7)', ns).stdout
        first, said = timed(session)
        sessions = [timed(session)[0] for _ in range(10)]
        vm.close()
    if said != '42\n': raise RuntimeError('wrong result')
    return dict(cold=[cold + first], session=sessions)

def work(kind):
    "What a measuring process does."
    raw = common(Theirs() if kind == 'rlms' else Ours(kind))
    if kind == 'vm': raw |= of_vm()
    print(json.dumps(raw))

# The parent

def peer(path):
    "An interpreter that has rlms and what its IPython environment needs."
    python = peer_python(path)
    if subprocess.run([python, '-E', '-s', '-c', 'import ipykernel, jupyter_client, dill'], stderr=subprocess.DEVNULL).returncode:
        if path: sys.exit(f'{path} has no rlms[ipython]')
        print('Installing what rlms[ipython] needs ...', file=sys.stderr)
        cmd = [python, '-m', 'pip', 'install', '-qq', '--disable-pip-version-check', 'ipython>=8', 'jupyter_client>=8', 'ipykernel>=6', 'dill>=0.3.7']
        if subprocess.run(cmd).returncode: sys.exit('Could not install it; give an interpreter that has it with --peer-python')
    return python

def measured(kind, python):
    "The numbers of a kind, or None where it is not to be had here."
    flags, cwd = (['-E', '-s'], Path(__file__).resolve().parent) if kind == 'rlms' else ([], None)
    res = subprocess.run([python, *flags, str(Path(__file__).resolve()), 'work', kind], capture_output=True, text=True, cwd=cwd)
    if res.returncode: print(f'{kind} could not be measured here: {res.stderr.strip().splitlines()[-1]}', file=sys.stderr)
    return json.loads(res.stdout) if res.returncode == 0 else None

NAMES = dict(start='start to first result', cold='the same with no template', session='another session', empty='empty block', call='host call', context='100 MB context')
TARGETS = { # (kind, figure) -> words, function of (ours, rlms) that says whether it is met
    ('sandbox', 'start'): ('1/8', lambda a, b: a <= b / 8), ('sandbox', 'empty'): ('1/20', lambda a, b: a <= b / 20),
    ('vm', 'cold'): ('8 s', lambda a, b: a <= 8), ('vm', 'start'): ('1 s', lambda a, b: a <= 1), ('vm', 'empty'): ('8 ms', lambda a, b: a <= .008), ('vm', 'context'): ('4 s', lambda a, b: a <= 4)}

def shown(x): return f'{x:.2f} s' if x >= 1 else f'{x * 1e3:.1f} ms' if x >= .001 else f'{x * 1e3:.2f} ms'

def ratio(a, b):
    "Ours over theirs; as a fraction with 1 above the line where ours is less."
    return f'1/{b / a:.1f}' if b > a else f'{a / b:.1f}'

def report(raw):
    "Print the table."
    print(f'{"kind":9}{"case":28}{"ours":>10}{"rlms":>10}{"ratio":>8}{"target":>8}  met?')
    for kind in [o for o in raw if o != 'rlms' and raw[o]]:
        for figure, name in NAMES.items():
            if figure not in raw[kind]: continue
            a, b = min(raw[kind][figure]), min((raw.get('rlms') or {}).get(figure, [0]))
            words, met = TARGETS.get((kind, figure), ('', None))
            verdict = '' if met is None or '/' in words and not b else 'yes' if met(a, b) else 'NO'
            print(f'{kind:9}{name:28}{shown(a):>10}{shown(b) if b else "":>10}{ratio(a, b) if b else "":>8}{words:>8}  {verdict}')

def main():
    "Read the arguments, measure, print."
    p = argparse.ArgumentParser(description='What isolation costs, beside rlms.')
    p.add_argument('--kinds', nargs='+', default=['sandbox', 'vm'], choices=['sandbox', 'vm'], help='what to measure (default: both)')
    p.add_argument('--json', metavar='FILE', type=Path, help='write all numbers, in seconds')
    p.add_argument('--peer-python', metavar='PATH', help='an interpreter that has rlms[ipython]')
    args = p.parse_args()
    raw = dict(rlms=measured('rlms', peer(args.peer_python))) | {o: measured(o, sys.executable) for o in args.kinds}
    report(raw)
    if args.json: args.json.write_text(json.dumps(raw, indent=1) + '\n')

if __name__ == '__main__': work(sys.argv[2]) if sys.argv[1:2] == ['work'] else main()
