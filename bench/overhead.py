"""What the engine itself costs, beside `rlms` 0.1.3 from PyPI, in one run.

    python bench/overhead.py                     the table, in about a minute
    python bench/overhead.py --quick             fewer repeats
    python bench/overhead.py --json FILE         also write all measured numbers
    python bench/overhead.py --peer-python PATH  use an interpreter that has rlms

Run it with an interpreter that has this library. `rlms` goes into an environment of its own, which is made in the user's
cache directory the first time (that needs the network).

No model is asked: both engines get the same scripted replies, each in its own way of answering, from an async function here
and from a subclass of its client class there. Each case runs in a fresh process of the side's interpreter, once to warm up
and then several times; the table shows medians.

- One turn: `x = 0` in a block, and x as the answer. Wall time of the whole call.
- 30 turns: 30 replies with a block of one assignment each.
- Sub-calls: one block with one `llm_query_batched` of 200 prompts, each answered after 100 ms without using the CPU, at most
  16 at a time. The ideal is 200/16 * 0.1 s = 1.25 s; whole calls cannot beat ceil(200/16) * 0.1 s = 1.3 s. The time of the
  batch alone is taken inside the block, by the same code on both sides.
- First request: from the call to the first request to the model, with a str of 100 MB as context.
- Import: time of the import statement in a fresh interpreter, without the interpreter's own start.
- Memory: peak resident size of a process that holds a str of 1 GB and makes a one-turn run over it, less that of a process that
  only holds the str. Ours counts the library itself too. rlms gets 100 MB, has made a short run before, and its figure is
  multiplied by 10.

The figures of rlms for whole runs include the half second in which it shuts down its socket server after every run.
"""
import argparse, asyncio, json, os, statistics, subprocess, sys, time
from pathlib import Path

from peer import installed, peer_answer, peer_python

TURNS, CALLS, DELAY, WIDTH = 30, 200, .1, 16
IDEAL = CALLS / WIDTH * DELAY
MB, BIG, HUGE = 10**6, 100 * 10**6, 10**9
REPEATS = dict(one=9, turns=7, batch=3, first=5) # Runs after the warm-up
BATCH = f'''import time
t0 = time.perf_counter()
replies = llm_query_batched([str(i) for i in range({CALLS})])
seconds = time.perf_counter() - t0
x = seconds if replies == [f"reply to {{i}}" for i in range({CALLS})] else "wrong replies"'''

# One run on either side

def ours_answer(say, context, turns, delay):
    "One run of this library, with `say()` for the turns and a fixed reply after `delay` seconds for each sub-call."
    import rlm
    async def root(messages): return say()
    async def sub(messages):
        await asyncio.sleep(delay)
        return f'reply to {messages[-1]["content"]}'
    limits = dict(max_concurrency=WIDTH)
    return rlm.rlm_run('What is x?', context, {}, model=root, sub_model=sub, max_iters=turns, limits=limits).answer

def block(side, code, last=False):
    "A reply with a block; `last` adds the answer, in the side's own protocol."
    if not last: return f'```repl\n{code}\n```'
    if side == 'ours': return f'```repl\n{code}\n```\nFINAL_VAR(x)'
    return f'```repl\n{code}\nanswer["content"] = x\nanswer["ready"] = True\n```'

def timed_run(side, codes, context='A short context.'):
    "Run the blocks `codes`, one a turn; the times of the whole run and to the first request, and the answer."
    replies = iter([block(side, o, last=i == len(codes) - 1) for i,o in enumerate(codes)])
    asked = []
    def say():
        asked.append(time.perf_counter())
        return next(replies)
    answer = ours_answer if side == 'ours' else peer_answer
    t0 = time.perf_counter()
    res = answer(say, context, max(len(codes), 10), DELAY)
    return time.perf_counter() - t0, asked[0] - t0, res

# The measurements: each runs in a process of its own and returns what is to be printed as JSON

def measure(side, case, n):
    "Run `case` once to warm up and then `n` times; the measured seconds, for each figure that the case gives."
    context = text(BIG) if case == 'first' else 'A short context.'
    codes = [BATCH] if case == 'batch' else [f'x = {i}' for i in range(TURNS if case == 'turns' else 1)]
    runs = [timed_run(side, codes, context) for _ in range(n + 1)][1:]
    if case == 'batch': return dict(batch=[o[0] for o in runs], batch_alone=[float(o[2]) for o in runs])
    if any(o[2] != str(len(codes) - 1) for o in runs): raise RuntimeError(f'{side} gave a wrong answer: {runs}')
    return {case: [o[1] if case == 'first' else o[0] for o in runs]}

def text(n):
    "A str of `n` ASCII characters in lines of 100, made without a temporary copy."
    return f'{"The quick brown fox jumps over the lazy dog near the harbour wall.":<99}\n' * (n // 100)

def peak(side, kind, n):
    "Peak resident MB of this process when it holds a context, and (`run`) has made a run over it."
    import resource
    if side == 'rlms': timed_run(side, ['x = 0']) # So that only what grows with the context is multiplied later
    context = text(n)
    if kind == 'run': timed_run(side, ['x = len(context)'], context)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / MB

def work(side, job, *args):
    "What a measuring process does: prints JSON."
    res = peak(side, args[0], int(args[1])) if job == 'peak' else measure(side, args[0], int(args[1]))
    print(json.dumps(res))

# The parent

def call(python, side, job, *args):
    "Run a measuring process and read its JSON. rlms never sees this library's path."
    flags = ['-E', '-s'] if side == 'rlms' else []
    res = subprocess.run([python, *flags, __file__, 'work', side, job, *map(str, args)], stdout=subprocess.PIPE, text=True)
    if res.returncode: sys.exit(f'{side} failed in: {job} {" ".join(map(str, args))}')
    return json.loads(res.stdout)

def import_times(python, side, statement, n):
    "Seconds that `statement` takes in each of `n` fresh interpreters, after one to warm up."
    code = f'import time; t0 = time.perf_counter(); {statement}; print(time.perf_counter() - t0)'
    cmd = [python, *(['-I'] if side == 'rlms' else []), '-c', code]
    return [float(subprocess.run(cmd, stdout=subprocess.PIPE, text=True, check=True).stdout) for _ in range(n + 1)][1:]

def memory(python, side, n, times=1):
    "MB that a run needs beyond a context of `n` characters, multiplied by `times`."
    return [(call(python, side, 'peak', 'run', n) - call(python, side, 'peak', 'hold', n)) * times]

def collect(pythons, quick):
    "All figures of both sides: figure -> side -> list of numbers. The sides take turns, case by case."
    raw = {}
    def put(side, figures):
        for k,v in figures.items(): raw.setdefault(k, {})[side] = v
    for case, n in REPEATS.items():
        for side, python in pythons.items(): put(side, call(python, side, 'measure', case, 2 if quick else n))
    for side, python in pythons.items():
        name, n = 'rlm_run' if side == 'ours' else 'RLM', 5 if quick else 11
        put(side, {'import': import_times(python, side, 'import rlm', n)})
        put(side, {'from': import_times(python, side, f'from rlm import {name}', n)})
    put('ours', dict(memory=memory(pythons['ours'], 'ours', HUGE)))
    put('rlms', dict(memory=memory(pythons['rlms'], 'rlms', BIG, HUGE // BIG)))
    return raw

# The table: figure, its name, the target in words, and whether (ours, rlms) meet it

ROWS = [
    ('one', 'one turn', '1/50', lambda a, b: a <= b / 50),
    ('turns', f'{TURNS} turns', '1/20', lambda a, b: a <= b / 20),
    ('batch', f'{CALLS} sub-calls, whole run', f'{1.1 * IDEAL:.3f} s', lambda a, b: a <= 1.1 * IDEAL),
    ('batch_alone', f'{CALLS} sub-calls, batch alone', '', None),
    ('first', 'first request, 100 MB', '1/50', lambda a, b: a <= b / 50),
    ('import', 'import rlm', '1/2', lambda a, b: a <= b / 2),
    ('from', 'from rlm import rlm_run | RLM', '', None),
    ('memory', 'memory beyond 1 GB', '50 MB', lambda a, b: a < 50),
]

def show(figure, x):
    "A number with its unit."
    if figure == 'memory': return f'{x:,.1f} MB'
    return f'{x:.3f} s' if x >= 1 else f'{x * 1e3:.2f} ms'

def ratio(a, b):
    "Ours over rlms, as a fraction with 1 above the line where ours is less."
    if a <= 0: return '0'
    return f'1/{b / a:,.0f}' if b >= 10 * a else f'1/{b / a:.1f}' if b > 1.05 * a else f'{a / b:.2f}'

def report(raw):
    "Print the table and what belongs to it."
    print(f'{"case":31}{"ours":>12}{"rlms":>12}{"ratio":>9}{"target":>9}  met?')
    for figure, name, target, met in ROWS:
        a, b = (statistics.median(raw[figure][o]) for o in ('ours', 'rlms'))
        mark = '*' if figure == 'memory' else ''
        verdict = '' if met is None else 'yes' if met(a, b) else 'NO'
        print(f'{name:31}{show(figure, a):>12}{show(figure, b) + mark:>12}{ratio(a, b):>9}{target:>9}  {verdict}')
    runs = {o: statistics.median(raw['batch'][o]) / IDEAL for o in raw['batch']}
    print(f'\nSub-calls: the ideal is {IDEAL:.2f} s; ours takes {runs["ours"]:.3f} times that, rlms {runs["rlms"]:.3f} times (target: 1.1).')
    print('* Measured with 100 MB and multiplied by 10.')

def versions(pythons):
    "Python's version on each side, in words."
    ask = 'import sys; print("{}.{}.{}".format(*sys.version_info))'
    v = {k: subprocess.run([o, '-c', ask], stdout=subprocess.PIPE, text=True, check=True).stdout.strip() for k,o in pythons.items()}
    return f'ours on Python {v["ours"]}, rlms {installed(pythons["rlms"])} on Python {v["rlms"]}, {os.cpu_count()} CPUs'

def main():
    "Read the arguments, measure, print."
    p = argparse.ArgumentParser(description='What the engine itself costs, beside rlms.')
    p.add_argument('--quick', action='store_true', help='fewer repeats')
    p.add_argument('--json', metavar='FILE', help='write the raw numbers: seconds, and MB for memory')
    p.add_argument('--peer-python', metavar='PATH', help='an interpreter that has rlms')
    args = p.parse_args()
    pythons = dict(ours=sys.executable, rlms=peer_python(args.peer_python))
    print(versions(pythons) + '\n', flush=True)
    raw = collect(pythons, args.quick)
    report(raw)
    if args.json: Path(args.json).write_text(json.dumps(raw, indent=1) + '\n')

if __name__ == '__main__': work(*sys.argv[2:]) if sys.argv[1:2] == ['work'] else main()
