"""The offline model through whole runs: needles in haystacks of every size, and questions about real text."""
import random
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from rlm import ANSWER, NANO, PAPER, rlm_run

NOISE = 'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. '
WORDS = 'amber basalt cedar delta ember fjord garnet harbor indigo juniper kestrel lagoon meadow nickel orchid pebble quartz raven'.split()


def needle_in_a_haystack(tokens, seed):
    "As niah_single_1 of RULER: a haystack of about 4 * `tokens` characters, the key, and the number that belongs to it."
    r = random.Random(f'{tokens} {seed}')
    key, number = '-'.join(r.sample(WORDS, 2)), str(r.randint(1_000_000, 9_999_999))
    sentences = (NOISE * (4 * tokens // len(NOISE))).split('. ')
    sentences.insert(int(len(sentences) * seed / 19), f'One of the special magic numbers for {key} is: {number}')
    return '. '.join(sentences), key, number


@pytest.mark.parametrize('tokens', [8_000, 128_000, 1_000_000])
def test_all_needles_are_found(tokens):
    missed = []
    for seed in range(20):
        text, key, number = needle_in_a_haystack(tokens, seed)
        answer, *_ = rlm_run(f'What is the special magic number for {key} mentioned in the provided text?', text, model='offline')
        if answer != number: missed.append((seed, number, answer))
    assert missed == []


@pytest.mark.parametrize('name', ['with', 'for', 'while', 'try', 'import', 'assert', 'del', 'global', 'raise', 'pass'])
def test_topics(name): assert rlm_run(f'Which topic describes the {name} statement?', topics, model='offline').answer == name


@pytest.mark.parametrize('protocol', [PAPER, ANSWER, NANO], ids=lambda p: p.name)
@pytest.mark.parametrize('wrap', [str, lambda s: [s], lambda s: {'a': s}, lambda s: [{'content': s}], lambda s: (s,), str.encode], ids=['str', 'list', 'dict', 'messages', 'tuple', 'bytes'])
def test_protocols_and_kinds_of_context(protocol, wrap):
    text = 'The mill stood empty for years. In 1907 Ida Holm bought the mill. She sold it again within a year.'
    assert '1907' in rlm_run('When did Ida Holm buy the mill?', wrap(text), model='offline', protocol=protocol).answer


def test_nothing_is_made_up():
    answer = rlm_run('What is the melting point of tungsten?', 'A short text about bees and their keeper.', model='offline').answer
    assert answer == 'No passage of the context answers this.'


def test_war_and_peace():
    path = Path(__file__).parents[2] / 'shared/data/texts/war-and-peace.txt'
    if not path.exists(): pytest.skip('the text of War and Peace is not here')
    book = path.read_text(encoding='utf-8')
    for at in range(0, len(book), len(book) // 8):
        text = f'{book[:at]}\nThe secret passphrase of the lighthouse keeper is BLUE-HERON-{at}.\n{book[at:]}'
        assert f'BLUE-HERON-{at}' in rlm_run('What is the secret passphrase of the lighthouse keeper?', text, model='offline').answer
