"""Makes the logs in this folder, with scripted models: `ours.jsonl` by this library, `public.jsonl.gz` by `rlms` 0.1.3 in an environment of its own.

    python tests/data/make.py
"""
import gzip, json, subprocess, sys, tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONTEXT = ''.join(f'{i:03} The keeper of lamp {i % 7} wrote: “wind {i * 37 % 11}”.\n' for i in range(60))
QUESTION = 'Which lamp has the strongest wind?'

def fence(code): return f'```repl\n{code}\n```'

LOOK = fence('import re\nrows = [(int(a), int(b)) for a, b in re.findall(r"lamp (\\d).*?wind (\\d+)", context)]\nprint(len(rows), rows[:3])') + '\n' + \
    fence('most = max(b for a, b in rows)\nlamps = sorted({a for a, b in rows if b == most})\nprint(lamps["first"])') + '\n' + fence('try: print(most)\nexcept NameError: print("gone")')
ASK = fence('most = max(b for a, b in rows)\nlamps = sorted({a for a, b in rows if b == most})\nnames = llm_query_batched([f"Name lamp {a}" for a in lamps] + ["Name lamp 0"])\nprint(most, lamps, names)')
KID = fence('best = rlm_query("Pick one: " + ", ".join(names))\nprint(best)')
KID_LOOK = fence('words = context.split(", ")\nprint(len(words))')
TURNS = [LOOK, ASK, KID]

def reply(prompt, last, kid_last):
    "What the scripted model says, to a run, to its child, or to a plain sub-call."
    if isinstance(prompt, str) or len(prompt) == 1 and prompt[0]['role'] == 'user': return 'Lantern ' + (prompt if isinstance(prompt, str) else prompt[0]['content'])[-1]
    said = sum(m['role'] == 'assistant' for m in prompt)
    if not any(QUESTION in str(m['content']) for m in prompt): return [KID_LOOK, kid_last][said]
    return [*TURNS, last][said]

def ours():
    "Write `ours.jsonl` and its context."
    from rlm import ScriptLM, rlm_run
    from rlm.trace import RunLog
    for o in [HERE/'ours.jsonl', *HERE.glob('context-*')]: o.unlink(missing_ok=True)
    lm = ScriptLM(lambda msgs: reply(msgs, 'FINAL_VAR(best)', 'FINAL_VAR(words)'))
    assert rlm_run(QUESTION, CONTEXT, model=lm, log=RunLog(HERE/'ours.jsonl', keep_context=True)).answer.startswith('[')

def public(path):
    "Write the log of a run of rlms; in its own environment."
    import rlm.core.rlm as core
    from rlm.clients.base_lm import BaseLM
    from rlm.core.types import ModelUsageSummary, UsageSummary
    from rlm.logger import RLMLogger
    ready = '\nanswer["ready"] = True'
    class Fake(BaseLM):
        def completion(self, prompt): return reply(prompt, fence('answer["content"] = best' + ready), fence('answer["content"] = words[0]' + ready))
        async def acompletion(self, prompt): return self.completion(prompt)
        def get_usage_summary(self): return UsageSummary({self.model_name: self.get_last_usage()})
        def get_last_usage(self): return ModelUsageSummary(1, 10, 5)
    core.get_client = lambda backend, kwargs: Fake('script')
    log = RLMLogger(str(path.parent))
    core.RLM(backend='openai', backend_kwargs=dict(model_name='script'), max_iterations=6, max_depth=2, logger=log).completion(CONTEXT, QUESTION)
    lines, seen = [json.loads(o) for o in Path(log.log_file_path).read_text().splitlines()], {}
    def number(msgs): # The engine's own words are left out of the fixture: each other message is a number, the same for the same text
        for m in msgs:
            if m['role'] != 'assistant': m['content'] = f'message {seen.setdefault(m["content"], len(seen))}'
    def walk(its):
        for it in its:
            number(it['prompt'])
            for b in it['code_blocks']:
                b['result']['locals'].pop('f', None) # A file handle, with a path
                for c in b['result']['rlm_calls']: walk((c.get('metadata') or {}).get('iterations', []))
    walk([o for o in lines if o['type'] == 'iteration'])
    path.write_text('\n'.join(map(json.dumps, lines)) + '\n')

def main():
    ours()
    sys.path.insert(0, str(HERE.parents[1]/'bench'))
    from peer import peer_python
    with tempfile.TemporaryDirectory() as d:
        subprocess.run([peer_python(), '-E', '-s', __file__, f'{d}/public.jsonl'], check=True, cwd=d)
        with open(HERE/'public.jsonl.gz', 'wb') as f, gzip.GzipFile('', 'wb', mtime=0, fileobj=f) as z: z.write(Path(d, 'public.jsonl').read_bytes())

if __name__ == '__main__': public(Path(sys.argv[1])) if sys.argv[1:] else main()
