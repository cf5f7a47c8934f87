"""Classes and functions that blocks have made, where Python looks for them by the name of their module: while the block runs and in later ones."""
import gc, inspect, pickle, sys, threading, typing, weakref
import pytest
from rlm import Limits, exec_code, load_ns, rlm_run, save_ns
from rlm.blockmain import BlockMain
from common import HANG, at, block, elsewhere, forks, on_both, posix, script, tree
from kinds import KINDS, new_ns

MADE = '''
import collections, copy, dataclasses, enum, functools, inspect, pickle, sys, typing
from typing import NamedTuple, Optional
LIMIT = 3

class Plain:
    "A class with a method."
    def __init__(self, x): self.x = x
    def __eq__(self, o): return type(o) is type(self) and o.x == self.x
    class Inner: pass

class Bare: pass

@dataclasses.dataclass
class Row:
    name: 'str'
    next: 'Optional[Row]' = None
    count: 'typing.ClassVar[int]' = 0

@dataclasses.dataclass(slots=True, frozen=True)
class Slotted:
    n: int

class Color(enum.Enum):
    RED = 1

class Flags(enum.Flag):
    A = enum.auto()
    B = enum.auto()

class Point(NamedTuple):
    x: 'int'
    y: 'Point | None' = None

Pair = collections.namedtuple('Pair', 'a b')
Shape = enum.Enum('Shape', 'ROUND SQUARE')
class Typed(typing.TypedDict):
    row: 'Row'

def triple(x): return 3 * x
def limited(x: 'Row') -> 'Point': return min(x, LIMIT)
async def later(): return 1
'''

USED = {
    'instances': '''
objects = [Plain(1), Row('a', Row('b')), Slotted(1), Color.RED, Flags.A | Flags.B, Point(1), Pair(1, 2), Shape.ROUND]
for n in range(pickle.HIGHEST_PROTOCOL + 1):
    if n < 2: objects = [o for o in objects if type(o) is not Slotted]
    back = pickle.loads(pickle.dumps(objects, n))
    assert back == objects and list(map(type, back)) == list(map(type, objects)), n
    assert pickle._loads(pickle._dumps(objects, n)) == objects
print('well')''',
    'classes and functions': '''
objects = [Plain, Plain.Inner, Bare, Row, Color, Point, Pair, Shape, triple, later]
assert all(pickle.loads(pickle.dumps(o)) is o for o in objects)
assert pickle.loads(pickle.dumps(functools.partial(triple, 2)))() == 6
assert pickle.loads(pickle.dumps(Plain(4).__eq__))(Plain(4))
print('well')''',
    'copies': '''
deep = copy.deepcopy([Row('a', Row('b')), Color.RED, Point(1), Plain(2), triple])
assert deep[0] == Row('a', Row('b')) and deep[1] is Color.RED and deep[3] == Plain(2) and deep[4] is triple
print('well')''',
    'hints': '''
assert typing.get_type_hints(Row) == dict(name=str, next=Optional[Row], count=typing.ClassVar[int]), typing.get_type_hints(Row)
assert typing.get_type_hints(Point)['y'] == Optional[Point] and typing.get_type_hints(Typed) == dict(row=Row)
assert typing.get_type_hints(limited) == {'x': Row, 'return': Point}
assert inspect.signature(Row, eval_str=True).parameters['next'].annotation == Optional[Row]
assert [f.name for f in dataclasses.fields(Row)] == ['name', 'next']
print('well')''',
    'sources': '''
assert inspect.getsource(Plain).startswith('class Plain:') and 'class Inner' in inspect.getsource(Plain)
assert inspect.getsource(Bare) == 'class Bare: pass\\n', inspect.getsource(Bare)
assert inspect.getsource(Row).splitlines()[-1] == "    count: 'typing.ClassVar[int]' = 0"
assert inspect.getsource(triple) == 'def triple(x): return 3 * x\\n' and str(inspect.signature(triple)) == '(x)'
assert inspect.getsource(Plain.Inner).strip() == 'class Inner: pass' and inspect.getdoc(Plain) == 'A class with a method.'
print('well')''',
    'a new class in this block': '''
class Fresh:
    other: 'Fresh'
assert type(pickle.loads(pickle.dumps(Fresh()))) is Fresh and typing.get_type_hints(Fresh) == dict(other=Fresh)
assert inspect.getsource(Fresh).startswith('class Fresh:\\n    other')
print('well')''',
    'its module': '''
import __main__
assert sys.modules[__name__] is __main__ and __main__.triple is triple and vars(__main__) is globals()
__main__.added = 5
assert added == 5 and 'Row' in dir(__main__) and getattr(__main__, 'nothing', None) is None
del __main__.added
assert 'added' not in globals() and repr(Row) == "<class '__main__.Row'>"
if __name__ == '__main__': print('well')''',
    'threads': '''
import concurrent.futures, threading
with concurrent.futures.ThreadPoolExecutor(2) as pool: back = list(pool.map(lambda o: pickle.loads(pickle.dumps(o)), [Plain(1), Color.RED]))
assert back == [Plain(1), Color.RED]
seen = []
t = threading.Thread(target=lambda: seen.append(typing.get_type_hints(Row)['next'])); t.start(); t.join()
assert seen == [Optional[Row]]
import asyncio
async def in_task(): return pickle.loads(pickle.dumps(Plain(3)))
assert await asyncio.gather(in_task(), asyncio.to_thread(pickle.dumps, Plain)) == [Plain(3), pickle.dumps(Plain)]
print('well')''',
    'a doctest': '''
import doctest
def twice(x):
    """
    >>> twice(2)
    4
    """
    return 2 * x
assert doctest.testmod().attempted == 1
print('well')''',
}

def well(code, ns, **kw):
    res = exec_code(code, ns, **kw)
    assert (res.stdout, res.error) == ('well\n', None), res.stderr

@on_both
@pytest.mark.parametrize('what', USED)
def test_in_the_same_block(what, off_main): at(off_main, well, MADE + USED[what], {})

@pytest.mark.parametrize('kind', KINDS)
def test_in_later_blocks(kind):
    with new_ns(kind) as ns:
        assert exec_code(MADE, ns).error is None
        for what in USED: well(USED[what], ns)

def test_on_a_thread_with_a_limit():
    exec_code(MADE, ns := {})
    for what in USED: elsewhere(well, USED[what], ns, timeout=HANG)

PYDANTIC = '''
from pydantic import BaseModel
from typing import Optional
import copy, pickle
class Leaf(BaseModel):
    n: 'int'
    up: 'Optional[Tree]' = None
class Tree(BaseModel):
    leaves: 'list[Leaf]'
'''

@on_both
def test_pydantic(off_main, tmp_path):
    pytest.importorskip('pydantic')
    use = "t = Tree(leaves=[dict(n='1')])\nassert pickle.loads(pickle.dumps(t)) == copy.deepcopy(t) == t and t.leaves[0].n == 1\nprint('well')"
    at(off_main, well, PYDANTIC + use, ns := {})
    at(off_main, well, use, ns)
    assert at(off_main, save_ns, ns, tmp_path/'ns') == []
    back = at(off_main, load_ns, tmp_path/'ns')
    at(off_main, well, 'assert t.model_dump() == dict(leaves=[dict(n=1, up=None)])\n' + use, back)

# Processes

POOLS = {
    'Pool': 'with multiprocessing.get_context(METHOD).Pool(2) as pool: out = pool.map(work, [Item(1), Item(2)])',
    'executor': 'with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context(METHOD)) as pool: out = list(pool.map(work, [Item(1), Item(2)]))',
    'Process': '''
context = multiprocessing.get_context(METHOD)
queue = context.Queue()
p = context.Process(target=put, args=(queue, [Item(1), Item(2)])); p.start()
out = queue.get()
p.join()''',
}
WORK = '''
import concurrent.futures, math, multiprocessing, pickle
from collections import namedtuple
FACTOR = 10
Item = namedtuple('Item', 'n')
class Result:
    def __init__(self, n): self.n = n
def scaled(n): return math.floor(n * FACTOR)
def work(item): return Result(scaled(item.n))
def put(queue, items): queue.put([work(o) for o in items])
'''
METHODS = ['fork', 'spawn', 'forkserver'] if hasattr(sys, 'getswitchinterval') and sys.platform != 'win32' else ['spawn']

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('pool', POOLS)
def test_processes(method, pool):
    code = f'METHOD = {method!r}\n{POOLS[pool]}\nassert [type(o) for o in out] == [Result] * 2 and [o.n for o in out] == [10, 20], out\nprint("well")'
    well(WORK + code, ns := {}, timeout=HANG)
    well(code, ns, timeout=HANG)
    elsewhere(well, code, ns, timeout=HANG)

@pytest.mark.parametrize('kind', KINDS[1:])
def test_processes_elsewhere(kind):
    with new_ns(kind) as ns:
        assert exec_code(WORK, ns).error is None
        for method in ('fork', 'spawn'):
            for pool in ('Pool', 'executor'):
                res = exec_code(f'METHOD = {method!r}\n{POOLS[pool]}\nprint([o.n for o in out])', ns, timeout=HANG)
                assert (res.stdout, res.error) == ('[10, 20]\n', None), (method, pool, res.stderr)

@forks
def test_a_function_that_a_pool_is_too_old_for():
    res = exec_code('import multiprocessing\npool = multiprocessing.get_context("fork").Pool(1)\ndef f(x): return x\ntry: pool.map(f, [1])\nexcept AttributeError as e: print(e)\npool.terminate()', {}, timeout=HANG)
    assert 'make the pool after it' in res.stdout and res.error is None

def test_a_spawned_process_runs_no_block_again(tmp_path):
    code = f'''
        with open({str(tmp_path/'runs')!r}, 'a') as f: f.write('script\\n')
        from rlm import exec_code
        if __name__ == '__main__':
            ns = dict()
            exec_code("import multiprocessing\\nfile = open({str(tmp_path/'runs')!r}, 'a')\\nfile.write('block\\\\n')\\nfile.flush()\\ndef f(x): return x + 1", ns)
            res = exec_code("with multiprocessing.get_context('spawn').Pool(1) as pool: print(pool.map(f, [1]))", ns)
            print(res.stdout, res.stderr)
    '''
    import subprocess, textwrap
    (tmp_path/'theirs.py').write_text(textwrap.dedent(code))
    from common import environment
    p = subprocess.run([sys.executable, str(tmp_path/'theirs.py')], capture_output=True, text=True, timeout=HANG, env=environment())
    assert p.stdout.strip() == '[2]', p.stderr
    assert (tmp_path/'runs').read_text() == 'script\nblock\n'

# Whose it is

def test_two_at_once_do_not_mix():
    barrier, spaces = threading.Barrier(2, timeout=HANG), [dict(), dict()]
    code = 'class C: pass\nwait()\nfor i in range(2000): assert type(pickle.loads(pickle.dumps(C()))) is C\nprint("well")'
    def one(ns):
        ns.update(wait=barrier.wait, pickle=pickle)
        well(code, ns)
    failed = []
    def guarded(ns):
        try: one(ns)
        except BaseException as e: failed.append(e)
    threads = [threading.Thread(target=guarded, args=[ns]) for ns in spaces]
    for t in threads: t.start()
    for t in threads: t.join(HANG)
    assert failed == [] and spaces[0]['C'] is not spaces[1]['C']

def test_a_child_run_has_its_own():
    use = 'class C: pass\nassert type(pickle.loads(pickle.dumps(C()))) is C'
    root = [block('import pickle\n' + use + '\nr = rlm_query("child")\n' + use.splitlines()[1]), 'FINAL_VAR(r)']
    res = rlm_run('Go', 'text', limits=Limits(max_depth=2), model=tree(root, child=[block('import pickle\nassert "C" not in vars(__import__("__main__"))\n' + use), 'FINAL(fine)']))
    assert res.answer == 'fine' and all(o.error is None for t in res.turns for o in t.blocks) if hasattr(res, 'turns') else res.answer == 'fine'

def test_the_callers_main_is_the_callers():
    out = script('''
        import pickle, sys, typing, __main__
        from rlm import exec_code
        class Row:
            up: 'Row'
            def __init__(self, n): self.n = n
            def __eq__(self, o): return self.n == o.n
        ns = dict(context=[Row(1), Row(2)])
        res = exec_code("import copy, pickle\\nassert pickle.loads(pickle.dumps(context)) == copy.deepcopy(context) == context\\nclass Mine: pass\\nprint('well')", ns)
        print(res.stdout, end='')
        print(sys.modules['__main__'] is __main__, 'Mine' in globals(), hasattr(__main__, 'Mine'), vars(__main__) is globals())
        print(typing.get_type_hints(Row)['up'] is Row, pickle.loads(pickle.dumps(Row(3))).n)
        exec_code("class Added: pass\\nprint(type(pickle.loads(pickle.dumps(Added()))) is Added)\\nx = __name__", globals())
        print(x, pickle.loads(pickle.dumps(Added)) is Added, type(__main__).__mro__[1].__name__)
    ''')
    assert out.stdout == 'well\nTrue False False True\nTrue 3\n__main__ True module\n', out.stdout + out.stderr

def test_nothing_is_kept():
    class Mark: pass
    before = len(sys.modules)
    ns = dict(mark=Mark())
    ref = weakref.ref(ns['mark'])
    exec_code('import pickle\nclass C: pass\ndef f(): pass\npickle.loads(pickle.dumps([C(), f]))', ns)
    del ns
    gc.collect()
    assert ref() is None and len(sys.modules) <= before + 1

@pytest.mark.parametrize('kind', KINDS[:1])
def test_saved_with_their_classes(kind, tmp_path):
    ns = {}
    exec_code(MADE + 'kept = [Plain(1), Row("a", Row("b")), Slotted(1), Color.RED, Point(1), triple]', ns)
    lost = save_ns(ns, tmp_path/'ns')
    assert {'kept', 'Plain', 'Bare', 'Row', 'Color', 'Point', 'triple', 'limited'}.isdisjoint(lost), lost
    back = load_ns(tmp_path/'ns')
    assert back['kept'][0].x == 1 and back['kept'][5](2) == 6
    well("assert pickle.loads(pickle.dumps(kept)) == kept and type(kept[0]) is Plain\nprint('well')", back)
    assert inspect.getsource(back['triple']) == 'def triple(x): return 3 * x'

def test_two_classes_of_one_name_keep_their_sources(tmp_path):
    one, two = {}, {}
    exec_code('class Same: n = 1', one)
    exec_code('class Same: n = 2', two)
    assert inspect.getsource(one['Same']) == 'class Same: n = 1' and inspect.getsource(two['Same']) == 'class Same: n = 2'
    assert save_ns(one, tmp_path/'ns') == [] and load_ns(tmp_path/'ns')['Same'].n == 1

@pytest.mark.parametrize('code', ['__name__ = 5\nclass C: pass', '__name__ = "other"\nclass C: pass', 'class C: __module__ = 3', 'import __main__\n__main__.__class__ = 3',
    'class M(type):\n  @property\n  def __qualname__(c): 1/0\n  def __eq__(c, o): 1/0\n  __hash__ = None\nclass C(metaclass=M): pass', 'import sys\ndel sys.modules["__main__"]'])
def test_odd_ones(code):
    exec_code(code, ns := {})
    well('print("well")', ns)
    well('class D: pass\nimport pickle\nassert pickle.loads(pickle.dumps(D)) is D\nprint("well")', {})
    assert isinstance(sys.modules['__main__'], BlockMain)
