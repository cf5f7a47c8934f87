"""Recursive Language Models in notebooks: the namespace is the environment."""

__version__ = "0.1.0"

from rlm._rlmpaper_compat import ANSWER, NANO, PAPER, Protocol
from rlm.core import (LMError, LimitExceeded, Limits, RLMError, RLMResult, arlm_run, exec_code, llm_query, llm_query_batched, load_ns,
    rlm_iter, rlm_query, rlm_query_batched, rlm_run, save_ns)
from rlm.lm import ClaudetteLM, LM, OfflineLM, Reply, ScriptLM, get_lm
