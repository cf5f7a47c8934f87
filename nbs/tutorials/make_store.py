"""Makes `harbour.db`, the store from which the tutorial runs.

    python nbs/tutorials/make_store.py

No language model has a part in it. The notebook is run as it stands, with the address of a server on this machine that speaks
the Messages API; what that server answers is written in this file. It has to be made anew whenever something in the prompts
of this library changes, since a store knows a request by its every character.
"""
import os, re
from pathlib import Path
import nbclient, nbformat
from rlm.testing import MessagesServer

HERE = Path(__file__).resolve().parent

def fence(code): return f'```repl\n{code.strip()}\n```'

LOOK = 'I look at how the log is built.\n' + fence('''
print(type(context), len(context))
print(context[:300])''')
READ = 'One entry a line, with the day in front. I have the entries read in groups of five.\n' + fence('''
entries = context.strip().split("\\n")
groups = ["\\n".join(entries[i:i+5]) for i in range(0, len(entries), 5)]
ask = "Which ships in these entries had trouble with their engine? One name a line, or NONE.\\n\\n"
replies = llm_query_batched([ask + o for o in groups])
print(replies)''')
COUNT = 'Now I count.\n' + fence('''
from collections import Counter
trouble = Counter(name for r in replies for name in r.split() if name != "NONE")
report = ", ".join(f"{k} {v}" for k, v in sorted(trouble.items()))
print(report)''')
AGAIN = '`trouble` is there from the last question, so nothing has to be read again.\n' + fence('''
came = {k: sum(k in o and "came in" in o for o in entries) for k in trouble}
often = [k for k, n in came.items() if n > 1]
print(came)
FINAL(", ".join(often))''')
STORM = 'The days of the storm are a story of their own; I hand them to a child.\n' + fence('''
days = "\\n".join(o for o in entries if o.split()[0] in ("7", "12", "13", "14"))
story = rlm_query("Who put the Fulmar on the rocks? Say it in one sentence.\\n\\n" + days)
print(story)''')
KID = fence('''
lines = context.split("\\n")[2:]
who = llm_query("Who is suspected here, and of what? One sentence.\\n\\n" + "\\n".join(lines))
print(who)''')

def reader(prompt):
    "What a plain sub-call is answered."
    if 'suspected' in prompt: return 'Mr Hale is suspected of having shown a false light at the lower station, by which the Fulmar steered.'
    lines = [o for o in prompt.split('\n') if re.search(r'engine (stopped|too hot|would not)|smoke from her engine', o)]
    return '\n'.join(re.search(r'[Tt]he (Alma|Bruna|Dorrit)', o)[1] for o in lines) or 'NONE'

def reply(body):
    "What the server answers."
    text = [''.join(b['text'] for b in m['content']) for m in body['messages']]
    if not body.get('system'): return reader(text[0])
    turn, start = len(text) // 2, text[0]
    if 'Question: Which ships' in start: return [LOOK, READ, COUNT, 'FINAL_VAR(report)'][turn]
    if 'Question: Which of them' in start: return [LOOK, AGAIN][turn]
    if 'Question: What happened' in start: return [LOOK, STORM, 'FINAL_VAR(story)'][turn]
    return [KID, 'FINAL_VAR(who)'][turn]

def main():
    (HERE/'harbour.db').unlink(missing_ok=True)
    with MessagesServer(reply) as server:
        os.environ['HARBOUR_MODEL'] = server.url
        nb = nbformat.read(HERE/'01_one_corpus_many_questions.ipynb', 4)
        nbclient.NotebookClient(nb, timeout=120, kernel_name='python3', resources=dict(metadata=dict(path=str(HERE)))).execute()
        print(f'{len(server.requests)} requests, {(HERE/"harbour.db").stat().st_size:,} bytes')

if __name__ == '__main__': main()
