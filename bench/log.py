"""What a log costs, beside `rlms` 0.1.3 from PyPI: bytes on disk, and seconds spent in the logger.

    python bench/log.py                     the table, in about half a minute
    python bench/log.py --peer-python PATH  use an interpreter that has rlms

Both engines run the same script: 30 turns over a str of 1 MB. In each turn a block prints 1,500 characters of the context and
asks four sub-calls about pieces of 1,000 characters; no model is asked. Each side runs in a process of its own interpreter,
three times, and the fastest counts. Seconds are those inside the logger's own methods: for rlms `log` and `log_metadata`, here
all that is done on events, which includes the digest of the context. rlms goes into an environment of its own, as in
`overhead.py`.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path

from peer import fake_client, peer_python

TURNS, SIZE = 30, 10**6
LINE = 'The quick brown fox jumps over the lazy dog near the harbour wall, and nobody knows why it does so.\n'
CODE = '''i = {i}
print(context[i*30000:i*30000+1500])
replies = llm_query_batched([f"What is in this piece? {{context[j*1000:j*1000+1000]}}" for j in range(i*4, i*4 + 4)])
x = len(replies)'''
TARGETS = [('bytes', 'at most 400 kB, and 1/50', lambda a, b: a <= 400_000 and a <= b / 50), ('seconds', 'at most 1/5', lambda a, b: a <= b / 5)]

def replies(last):
    "What the model says in each turn; `last` is how the side ends."
    for i in range(TURNS): yield f'Turn {i}.\n```repl\n{CODE.format(i=i)}\n{last if i == TURNS - 1 else ""}\n```'

class Timed:
    "Adds up the seconds that some methods of an object take."
    def __init__(self): self.seconds = 0.
    def wrap(self, o, *names):
        for name in names: setattr(o, name, self.timed(getattr(o, name)))
        return o
    def timed(self, f):
        def g(*args, **kwargs):
            t0 = time.perf_counter()
            try: return f(*args, **kwargs)
            finally: self.seconds += time.perf_counter() - t0
        return g

def ours(folder, context, clock):
    "One run of this library; its answer."
    from rlm import rlm_run
    from rlm.trace import RunLog
    class Log: # A RunLog with a clock
        def __init__(self): self.log = RunLog(f'{folder}/')
        def on_event(self, e): self.log.on_event(e)
    say = replies('FINAL(x)')
    async def root(messages): return next(say)
    async def sub(messages): return 'reply to ' + messages[-1]['content'][:20]
    return rlm_run('What is x?', context, {}, model=root, sub_model=sub, max_iters=TURNS, log=clock.wrap(Log(), 'on_event')).answer

def rlms(folder, context, clock):
    "One run of rlms; its answer."
    import rlm.core.rlm as core
    from rlm.logger import RLMLogger
    say = replies('answer["content"] = str(x)\nanswer["ready"] = True')
    client = fake_client(lambda: next(say), 0)
    core.get_client = lambda backend, kwargs: client
    log = clock.wrap(RLMLogger(str(folder)), 'log', 'log_metadata')
    return core.RLM(backend='openai', backend_kwargs=dict(model_name='fake'), max_iterations=TURNS, logger=log).completion(context, 'What is x?').response

def work(side, n=3):
    "What a measuring process does: prints the figures of its fastest run."
    context, best = LINE * (SIZE // len(LINE)), None
    for _ in range(n):
        with tempfile.TemporaryDirectory() as folder:
            clock, t0 = Timed(), time.perf_counter()
            answer = globals()[side](folder, context, clock)
            whole = time.perf_counter() - t0
            lines = [json.loads(o) for p in Path(folder).glob('*.jsonl') for o in p.read_text().splitlines()]
            turns = sum(o['type'] == 'iteration' for o in lines)
            if (answer, turns) != ('4', TURNS): raise RuntimeError(f'{side}: answer {answer!r} after {turns} turns in the log')
            size = sum(p.stat().st_size for p in Path(folder).iterdir())
        if best is None or clock.seconds < best['seconds']: best = dict(bytes=size, seconds=clock.seconds, whole=whole)
    print(json.dumps(best))

def measure(side, python):
    "The figures of a side, in a process of its own."
    flags = ['-E', '-s'] if side == 'rlms' else []
    res = subprocess.run([python, *flags, Path(__file__).resolve(), 'work', side], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parent)
    if res.returncode: sys.exit(f'{side} failed')
    return json.loads(res.stdout.splitlines()[-1])

def main():
    "Measure and print."
    p = argparse.ArgumentParser(description='What a log costs, beside rlms.')
    p.add_argument('--peer-python', metavar='PATH', help='an interpreter that has rlms')
    a, b = measure('ours', sys.executable), measure('rlms', peer_python(p.parse_args().peer_python))
    print(f'{TURNS} turns over {SIZE:,} characters, {os.cpu_count()} CPUs\n\n{"":9}{"ours":>14}{"rlms":>16}{"ratio":>9}  target')
    for k, target, met in TARGETS:
        x, y = (f'{o[k]:,}' if k == 'bytes' else f'{o[k] * 1e3:,.1f} ms' for o in (a, b))
        print(f'{k:9}{x:>14}{y:>16}{f"1/{b[k] / a[k]:,.0f}":>9}  {target}: {"met" if met(a[k], b[k]) else "NOT met"}')
    print(f'\nWhole runs: {a["whole"]:.2f} s and {b["whole"]:.2f} s.')

if __name__ == '__main__': work(*sys.argv[2:]) if sys.argv[1:2] == ['work'] else main()
