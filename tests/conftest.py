import os, signal
from hypothesis import settings

for k in [o for o in os.environ if o.startswith(('RLM_', 'ANTHROPIC_'))]: del os.environ[k] # No test may find a model or pay for one
settings.register_profile('same', deadline=None, derandomize=True, database=None)
settings.register_profile('search', deadline=None, max_examples=2000, database=None, print_blob=True) # pytest --hypothesis-profile search
settings.load_profile('same')

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: # As a job in the background has it, and every process that a test starts would have it too
    signal.signal(signal.SIGINT, signal.default_int_handler)
