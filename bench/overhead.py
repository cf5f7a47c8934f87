"""What the engine itself costs, beside `rlms` 0.1.3 from PyPI, in one run.

    python bench/overhead.py                     the table, in about a minute
    python bench/overhead.py --quick             fewer repeats
    python bench/overhead.py --json FILE         also write all measured numbers
    python bench/overhead.py --peer-python PATH  use an interpreter that has rlms

Run it with an interpreter that has this library. `rlms` goes into an environment of its own, which is made in the user's
cache directory the first time; that needs the network.

No model is asked: both engines get the same scripted replies, each in its own way of answering, from an async function here
and from a subclass of its client class there. Each case runs in a fresh process of the side's interpreter, once to warm up
and then several times; the table shows medians.

- One turn: one block that assigns and prints a number, and that number as the answer. Wall time of the whole call.
- 30 turns: 30 replies with such a block each; the last one gives the answer. Once more with a plain `def` as our model, which
  runs on a thread, as it may block; rlms always calls its client in place, so for it this is the same run again.
- Sub-calls: one block with one `llm_query_batched` of 200 prompts, each answered after 100 ms without use of the CPU, at most
  16 at a time on both sides. The ideal is 200/16 * 0.1 s = 1.25 s; whole calls take 13 rounds, so at least 1.3 s. The time of
  the batch alone is taken inside the block, by the same code on both sides.
- First request: from the call to the first request to the model, with a str of 100 MB as context.
- Import: time of the import statement in a fresh interpreter, without the interpreter's own start, with compiled modules.
- Memory: peak resident size of a process that holds a str of 1 GB and makes a one-turn run over it, less that of a process that
  only holds it. Ours includes the modules that the run imports. rlms gets 100 MB and has made a short run before, and its
  figure is multiplied by 10.

The times of whole runs of rlms include the shutdown of its socket server after each run, which takes up to half a second.
"""
import argparse, asyncio, json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path

from peer import peer_answer, peer_python

TURNS, CALLS, DELAY, WIDTH = 30, 200, .1, 16
IDEAL = CALLS / WIDTH * DELAY
MB, BIG, HUGE = 10**6, 100 * 10**6, 10**9
REPEATS = dict(one=9, turns=9, turns_def=9, batch=3, first=5) # Runs after the warm-up
BATCH = f'''import time
t0 = time.perf_counter()
replies = llm_query_batched([str(i) for i in range({CALLS})])
seconds = time.perf_counter() - t0
x = seconds if replies == [f"reply to {{i}}" for i in range({CALLS})] else "wrong replies"'''

# One run on either side

def ours_answer(say, context, turns, delay, plain):
    "One run of this library: `say()` for the turns, a fixed reply after `delay` seconds for each sub-call."
    import rlm
    def blocking(messages): return say()
    async def root(messages): return say()
    async def sub(messages):
        await asyncio.sleep(delay)
        return f'reply to {messages[-1]["content"]}'
    limits = dict(max_concurrency=WIDTH)
    model = blocking if plain else root
    return rlm.rlm_run('What is x?', context, {}, model=model, sub_model=sub, max_iters=turns, limits=limits).answer

def reply(side, code, last=False):
    "A reply with a block; the last one adds the answer, in the side's own protocol."
    if not last: return f'```repl\n{code}\n```'
    if side == 'ours': return f'```repl\n{code}\n```\nFINAL_VAR(x)'
    return f'```repl\n{code}\nanswer["content"] = x\nanswer["ready"] = True\n```'

def timed_run(side, codes, context='A short context.', plain=False):
    "Run the blocks `codes`, one a turn: (seconds of the whole run, seconds to the first request, answer)."
    replies, asked = iter([reply(side, o, o is codes[-1]) for o in codes]), []
    def say():
        asked.append(time.perf_counter())
        return next(replies)
    args = say, context, max(len(codes), 10), DELAY
    t0 = time.perf_counter()
    res = ours_answer(*args, plain) if side == 'ours' else peer_answer(*args)
    return time.perf_counter() - t0, asked[0] - t0, res

# The measurements: each runs in a process of its own, and what it returns is printed as JSON

def text(n):
    "A str of `n` ASCII characters in lines of 100, made without a temporary copy."
    return f'{"The quick brown fox jumps over the lazy dog near the harbour wall.":<99}\n' * (n // 100)

def measure(side, case, n):
    "Run `case` once to warm up and then `n` times: figure -> seconds of each run."
    codes = [BATCH] if case == 'batch' else [f'x = {i}\nprint(x)' for i in range(TURNS if case.startswith('turns') else 1)]
    context = text(BIG if case == 'first' else 100)
    runs = [timed_run(side, codes, context, case == 'turns_def') for _ in range(n + 1)][1:]
    if case == 'batch': return dict(batch=[o[0] for o in runs], batch_alone=[float(o[2]) for o in runs])
    if any(o[2] != str(len(codes) - 1) for o in runs): raise RuntimeError(f'wrong answers: {[o[2] for o in runs]}')
    return {case: [o[1] if case == 'first' else o[0] for o in runs]}

def peak(side, kind, n):
    "Peak resident MB of this process when it holds a context, and (`run`) has made a run over it."
    import resource
    if side == 'rlms': timed_run(side, ['x = 0']) # So that only what grows with the context is multiplied
    context = text(n)
    if kind == 'run' and timed_run(side, ['x = len(context)'], context)[2] != str(n): raise RuntimeError('wrong answer')
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / MB

def work(side, job, what, n):
    "What a measuring process does."
    print(json.dumps((peak if job == 'peak' else measure)(side, what, int(n))))

# The parent

class Side:
    "One of the two libraries, with its interpreter."
    def __init__(self, name, python, folder):
        """Compiled modules are kept in `folder` on both sides. The interpreter of rlms looks at no PYTHON* variable and at no
        user site, and starts in `bench`, so that it cannot find this library in the place of its own."""
        self.name, self.python, self.flags, self.cwd = name, python, ['-X', f'pycache_prefix={folder}'], None
        if name == 'rlms': self.flags, self.cwd = [*self.flags, '-E', '-s'], Path(__file__).resolve().parent
        self.env = {k: v for k,v in os.environ.items() if k != 'PYTHONDONTWRITEBYTECODE'}
    def says(self, *args):
        "What the interpreter prints."
        cmd = [self.python, *self.flags, *map(str, args)]
        res = subprocess.run(cmd, stdout=subprocess.PIPE, text=True, env=self.env, cwd=self.cwd)
        if res.returncode: sys.exit(f'{self.name} failed in {args}')
        return res.stdout
    def work(self, job, what, n):
        "The result of a measuring process."
        return json.loads(self.says(Path(__file__).resolve(), 'work', self.name, job, what, n))
    def imports(self, statement, n):
        "Seconds that `statement` takes in each of `n` fresh interpreters, after one to warm up."
        code = f'import time; t0 = time.perf_counter(); {statement}; print(time.perf_counter() - t0)'
        return [float(self.says('-P', '-c', code)) for _ in range(n + 1)][1:]
    def memory(self, n):
        "MB that a run needs beyond a context of `n` characters."
        return self.work('peak', 'run', n) - self.work('peak', 'hold', n)

def collect(ours, rlms, quick):
    "All numbers: figure -> side -> list. The sides take turns, case by case."
    raw, n = {}, 5 if quick else 11
    def put(side, figures):
        for k,v in figures.items(): raw.setdefault(k, {})[side.name] = v
    for case, times in REPEATS.items():
        for side in (ours, rlms): put(side, side.work('measure', case, 2 if quick else times))
    for side, name in ((ours, 'rlm_run'), (rlms, 'RLM')):
        put(side, {'import': side.imports('import rlm', n), 'from': side.imports(f'from rlm import {name}', n)})
    put(ours, dict(memory=[ours.memory(HUGE)]))
    put(rlms, dict(memory=[rlms.memory(BIG) * (HUGE // BIG)]))
    return raw

# Figure, its name, the target in words, and a function of (ours, rlms) that says whether it is met
ROWS = [
    ('one', 'one turn', '1/50', lambda a, b: a <= b / 50),
    ('turns', f'{TURNS} turns', '1/20', lambda a, b: a <= b / 20),
    ('turns_def', f'{TURNS} turns, model is a plain def', '1/20', lambda a, b: a <= b / 20),
    ('batch', f'{CALLS} sub-calls, whole run', f'{1.1 * IDEAL:.3f} s', lambda a, b: a <= 1.1 * IDEAL),
    ('batch_alone', f'{CALLS} sub-calls, batch alone', '', None),
    ('first', 'first request, 100 MB', '1/50', lambda a, b: a <= b / 50),
    ('import', 'import rlm', '1/2', lambda a, b: a <= b / 2),
    ('from', 'from rlm import rlm_run | RLM', '', None),
    ('memory', 'memory beyond 1 GB', '50 MB', lambda a, b: a < 50),
]

def shown(figure, x):
    "A number with its unit."
    if figure == 'memory': return f'{x:,.1f} MB'
    return f'{x:.3f} s' if x >= 1 else f'{x * 1e3:.2f} ms'

def ratio(a, b):
    "Ours over rlms; as a fraction with 1 above the line where ours is less."
    return f'1/{b / a:,.0f}' if b >= 10 * a > 0 else f'1/{b / a:.1f}' if b > 1.1 * a > 0 else f'{a / b:.2f}'

def report(raw):
    "Print the table."
    print(f'{"case":31}{"ours":>12}{"rlms":>14}{"ratio":>9}{"target":>10}  met?')
    for figure, name, target, met in ROWS:
        a, b = (statistics.median(raw[figure][o]) for o in ('ours', 'rlms'))
        theirs = shown(figure, b) + ('*' if figure == 'memory' else '')
        verdict = '' if met is None else 'yes' if met(a, b) else 'NO'
        print(f'{name:31}{shown(figure, a):>12}{theirs:>14}{ratio(a, b):>9}{target:>10}  {verdict}')
    a, b = (statistics.median(raw['batch'][o]) / IDEAL for o in ('ours', 'rlms'))
    print(f'\nSub-calls, whole run: ours takes {a:.3f} times the ideal of {IDEAL:.2f} s, rlms {b:.3f} times; the target is 1.1.')
    print('* Measured with 100 MB and multiplied by 10.')

def main():
    "Read the arguments, measure, print."
    p = argparse.ArgumentParser(description='What the engine itself costs, beside rlms.')
    p.add_argument('--quick', action='store_true', help='fewer repeats')
    p.add_argument('--json', metavar='FILE', type=Path, help='write all numbers: seconds, and MB for memory')
    p.add_argument('--peer-python', metavar='PATH', help='an interpreter that has rlms')
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours, rlms = Side('ours', sys.executable, folder), Side('rlms', peer_python(args.peer_python), folder)
        ours.says('-P', '-c', 'from rlm import rlm_run')
        about = 'import importlib.metadata as m, platform as p; print("rlms", m.version("rlms"), "on Python", p.python_version())'
        print(f'ours on Python {sys.version.split()[0]}, {rlms.says("-c", about).strip()}, {os.cpu_count()} CPUs\n', flush=True)
        raw = collect(ours, rlms, args.quick)
    report(raw)
    if args.json: args.json.write_text(json.dumps(raw, indent=1) + '\n')

if __name__ == '__main__': work(*sys.argv[2:]) if sys.argv[1:2] == ['work'] else main()
