"""What the input of a run costs: with the prompt cache, without it, and beside `rlms` 0.1.3 from PyPI.

    python bench/cost.py                     the table, in a few seconds
    python bench/cost.py --peer-python PATH  use an interpreter that has rlms

Run it with an interpreter that has this library. `rlms` goes into an environment of its own, which is made in the user's
cache directory the first time (that needs the network).

All runs ask the same server on this machine (`rlm.testing.MessagesServer`), over HTTP and through each library's own client
for Anthropic. It counts four characters as a token, and bills as the provider does: a prefix that a request marked is kept
from 1,024 tokens on; what is read from it costs a tenth, what is written to it a quarter more, at most 4 marks a request.

The model is a script. In each turn it prints the next 12,000 characters of the context, about 3,000 tokens, and in the last
turn it gives the answer too. Only the form of the blocks differs, by what each library runs. Figures are tokens of plain
input that would cost the same.
"""
import argparse, os, subprocess, sys

from peer import installed, peer_python

TURNS, CHARS = (2, 5, 20, 50), 12_000
MODEL, QUESTION, ANSWER = 'claude-sonnet-4-6', 'What does the ledger say?', 'All of it was printed.'
TARGETS = {2: 1., 20: .25} # Turns -> share of the uncached input that caching may cost

def context():
    "Numbered lines, enough for the longest run."
    return ''.join(f'{i:09,} | paid to the harbour master, for ropes\n' for i in range(max(TURNS) * CHARS // 40))

def script(turns, last):
    "A function of the request: each turn's block, and what ends the run after the last one."
    def reply(body):
        i = sum(o['role'] == 'assistant' for o in body['messages'])
        code = f'part = context[{i * CHARS}:{(i + 1) * CHARS}]\nprint(part)'
        return last(code) if i == turns - 1 else f'```repl\n{code}\n```'
    return reply

def end_ours(code): return f'```repl\n{code}\n```\nFINAL({ANSWER})'
def end_rlms(code): return f'```repl\n{code}\nanswer["content"] = {ANSWER!r}\nanswer["ready"] = True\n```'

# One run on either side; each returns the answer

def ask_ours(url, turns, cache):
    "A run of this library."
    import rlm
    lm = rlm.ClaudetteLM(MODEL, base_url=url, api_key='loopback')
    return rlm.rlm_run(QUESTION, context(), {}, model=lm, max_iters=turns, cache=cache).answer

def ask_rlms(url, turns):
    "A run of rlms, for the process that has it. Its client takes no address, but the one below it reads the environment."
    os.environ['ANTHROPIC_BASE_URL'] = url
    from rlm import RLM
    engine = RLM(backend='anthropic', backend_kwargs=dict(api_key='loopback', model_name=MODEL), max_iterations=turns)
    return engine.completion(context(), QUESTION).response

def ask_rlms_apart(python, url, turns):
    "`ask_rlms` in a process of the interpreter `python`, which never sees this library's path."
    res = subprocess.run([python, '-E', '-s', __file__, 'work', url, str(turns)], stdout=subprocess.PIPE, text=True)
    if res.returncode: sys.exit(f'rlms failed at {turns} turns')
    return res.stdout.strip()

def bill(ask, turns, last):
    "The server, after a run: its `billed` and `usage` say what that cost."
    from rlm.testing import MessagesServer
    with MessagesServer(script(turns, last)) as srv:
        answer = ask(srv.url, turns)
        if answer != ANSWER: sys.exit(f'a run of {turns} turns ended with {answer!r}')
    if len(srv.requests) != turns: sys.exit(f'a run of {turns} turns made {len(srv.requests)} requests')
    return srv

def measure(python, turns):
    "A row: turns, plain, written, read and billed tokens with caching, billed ones without, and those of rlms."
    ours, plain = (bill(lambda url, n, cache=cache: ask_ours(url, n, cache), turns, end_ours) for cache in (True, False))
    rlms = bill(lambda url, n: ask_rlms_apart(python, url, n), turns, end_rlms)
    u = ours.usage.total
    return turns, u.total_input_tokens, u.total_cache_write_tokens, u.total_cache_read_tokens, ours.billed, plain.billed, rlms.billed

def show(turns, plain, written, read, ours, uncached, rlms):
    "A row in words."
    target = TARGETS.get(turns)
    met = '' if target is None else f'{target:>8.2f}  {"yes" if ours <= target * uncached else "NO"}'
    tokens = ''.join(f'{o:>12,.0f}' for o in (plain, written, read, ours, uncached, rlms))
    return f'{turns:>5}{tokens}{ours / uncached:>11.3f}{ours / rlms:>11.3f}{met}'

def main():
    "Read the arguments, measure, print."
    p = argparse.ArgumentParser(description='What the input of a run costs, with and without the cache, and beside rlms.')
    p.add_argument('--peer-python', metavar='PATH', help='an interpreter that has rlms')
    python = peer_python(p.parse_args().peer_python)
    print(f'Input tokens billed, beside rlms {installed(python)}; about {CHARS // 4:,} tokens are added in each turn\n')
    names = ('plain', 'written', 'read', 'cached', 'uncached', 'rlms')
    print(f'turns{"".join(f"{o:>12}" for o in names)}{"/uncached":>11}{"/rlms":>11}{"target":>8}  met?')
    for turns in TURNS: print(show(*measure(python, turns)), flush=True)
    print('\n`plain`, `written` and `read` make up `cached`: plain + 1.25 written + 0.1 read. The target is for `/uncached`.')

if __name__ == '__main__': print(ask_rlms(sys.argv[2], int(sys.argv[3]))) if sys.argv[1:2] == ['work'] else main()
