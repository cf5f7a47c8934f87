"""The one REPL server of all namespaces that run their code elsewhere, and the frames in which both sides talk.

Written by hand, with the standard library alone: this file and the modules that `sandbox.worker_files` names are all that has to lie inside. Blocks run on the main
thread, so that signals end what they wait for; a reader thread takes requests for data and replies to calls meanwhile. After each block the worker looks at
itself (`Condition`): what cannot be put right is told to the host, which starts another session."""
import _frozen_importlib, builtins, codecs, contextvars, ctypes, encodings, errno, gc, itertools, json, operator, os, re, select, signal, struct, sys, threading, time, types
from array import array
from queue import SimpleQueue
from . import _rlmpaper_compat, aftermath, repl
from ._rlmpaper_compat import type_name
from .output import fit_outputs
from .repl import Block, Scaffold, outside_block

_sizes = struct.Struct('!II') # Bytes of JSON, bytes of payload
_number = struct.Struct('!I') # Stands before the sizes on the way in, so that it is noticed when code inside reads from the line
_strings = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.S) # Never backtracks; an open string goes to the end
_depth, _parts, _bits = 100, 2_000_000, 14_284 # Most levels and values of what the host accepts, and bits of an int: 4,300 digits, as Python reads at most
_stop, _os_read, _os_write, _os_fstat = os._exit, os.read, os.write, os.fstat # Code may put anything in their place
LINE_LOST = 97 # Exit code of a worker whose line to the host was closed or disturbed by the code that it ran

class FrameError(Exception): "What came is no frame, or a larger one than is allowed."

class TooLarge(ValueError):
    "A value is larger than may cross the border: `size` and `cap`, in `unit`."
    def __init__(self, size, cap, unit='bytes'):
        self.size, self.cap, self.unit = size, cap, unit
        super().__init__(f'{size:,} {unit} are more than the {cap:,} that may cross the border; take a part of it')

def measure(data, most=_parts):
    "JSON without its strings, or TooLarge where it has more values than the host takes."
    bare = _strings.sub(b'', data)
    if (n := sum(map(bare.count, (b',', b'[', b'{')))) > most: raise TooLarge(n, most, 'values')
    return bare

def parse(data):
    "JSON from a side that is not trusted: few levels, few values, so that a small text cannot become a huge object."
    try: bare = re.sub(rb'[^][{}]+', b'', measure(data))
    except TooLarge: raise FrameError('a frame of too many parts') from None
    for _ in range(_depth): bare = bare.replace(b'[]', b'').replace(b'{}', b'')
    if bare: raise FrameError('a frame that is nested too deep')
    try: return json.loads(data)
    except (ValueError, RecursionError) as e: raise FrameError(f'a frame that is no JSON: {e}') from None

def _file_of(fd): # What the kernel has under this number
    st = _os_fstat(fd)
    return st.st_dev, st.st_ino, st.st_mode

class Wire:
    "Frames over two file descriptors. Sending only queues: a thread of its own writes, so that no interrupt cuts a frame in two."
    def __init__(self, rfd, wfd, cap=None): # The two are its own from here on, and not the same one; who has a `cap` does not trust the other side
        self.rfd, self.wfd, self.cap, self.out, self.dead, self.size = rfd, wfd, cap, SimpleQueue(), False, 0 # `size`, in bytes, is of the newest frame
        self.sent, self.read, self.files, self.lost = 0, 0, (_file_of(rfd), _file_of(wfd)), None # `lost` is called where it can send no more
        with outside_block(): threading.Thread(target=self._write, daemon=True, name='rlm-wire').start()
    def send(self, head, raw=b'', cap=None):
        "Queue one frame; TooLarge where it is over `cap`, what the header can say, or what a host takes."
        data = dumps(head)
        if not self.cap: measure(data)
        n, most = max(len(data), len(raw)), min(cap or 2**32 - 1, 2**32 - 1)
        if n > most: raise TooLarge(n, most)
        if self.dead: raise BrokenPipeError('the other side is gone')
        self.out.put((_sizes.pack(len(data), len(raw)) + data, raw))
    def flush(self, seconds=1):
        "Wait until what is queued is sent, for this long at most."
        done = threading.Event()
        self.out.put(done)
        done.wait(seconds)
    def close(self):
        "Send no more, and close the descriptor for it once what is queued is sent."
        self.dead = True
        self.out.put(())
    def check(self):
        "OSError where code has closed a descriptor of the two, or put another file in its place."
        if (_file_of(self.rfd), _file_of(self.wfd)) != self.files: raise OSError(errno.EBADF, 'the line is another file')
    def _write(self):
        try:
            while parts := self.out.get():
                if type(parts) is tuple: self._put(*parts)
                else: parts.set() # Somebody waits until what came before is sent
        except OSError: self.dead = True # The other side is gone, and `recv` says so
        finally:
            if self.lost: self.lost()
        os.close(self.wfd)
    def _put(self, *parts): # One frame
        if self.cap: parts = (_number.pack(self.sent), *parts)
        else: self.check()
        self.sent = (self.sent + 1) % 2**32
        for part in map(memoryview, parts):
            while part: part = part[_os_write(self.wfd, part):]
    def _read(self, n): # Takes memory for what came, not for what was announced
        res = bytearray()
        while len(res) < n:
            part = _os_read(self.rfd, min(n - len(res), 1 << 20))
            if not part: raise EOFError('the other side closed the stream')
            res += part
        return bytes(res)
    def recv(self):
        "The next frame: (dict, bytes). With a `cap`, nothing larger is read, and nothing odd is parsed."
        if not self.cap: self._next_number()
        n, m = _sizes.unpack(self._read(8))
        if self.cap and max(n, m) > self.cap: raise FrameError(f'a frame of {n:,} + {m:,} bytes, where {self.cap:,} are allowed')
        data, raw, self.size = self._read(n), self._read(m), n + m
        head = parse(data) if self.cap else json.loads(data)
        if not isinstance(head, dict): raise FrameError('a frame without a header')
        return head, raw
    def _next_number(self): # A frame that somebody else took is missed
        if _number.unpack(self._read(4)) != (self.read,): raise FrameError('a frame is missing')
        self.read = (self.read + 1) % 2**32

def dumps(o): return json.dumps(o, separators=(',', ':')).encode()

def plain(o, loose=False, depth=_depth - 5): # Some levels are the frame's
    "A copy of `o` as JSON-like data; TypeError or ValueError where it is something else. `loose` makes lists of tuples, sets and iterators."
    t = type(o)
    if o is None or t in (bool, str, float): return o
    if issubclass(t, int) and int.bit_length(o) > _bits: raise ValueError('an int of more than 4,300 digits')
    for base in (str, int, float):
        if issubclass(t, base): return base.__str__(o) if base is str else base.__pos__(o)
    if not depth: raise ValueError('something that is nested too deep')
    if issubclass(t, dict):
        if odd := next((k for k in dict.keys(o) if not isinstance(k, str)), None): raise TypeError(f'a dict with a key of type {type_name(type(odd))}')
        return {str.__str__(k): plain(v, loose, depth - 1) for k, v in dict.items(o)}
    if issubclass(t, list): return [plain(v, loose, depth - 1) for v in list.__iter__(o)]
    if loose and (issubclass(t, (tuple, set, frozenset)) or hasattr(t, '__next__')): return [plain(v, loose, depth - 1) for v in o]
    raise TypeError(f'a {type_name(t)}')

def encode(o, name='it'):
    "A value for a frame: (fields of the header, payload). str and bytes go raw, the rest as JSON."
    if isinstance(o, str): return dict(kind='str'), str.encode(o, 'utf-8', 'surrogatepass')
    if isinstance(o, (bytes, bytearray)): return dict(kind=type(o).__mro__[-2].__name__), bytes(o)
    try: return dict(kind='data'), dumps(plain(o))
    except (TypeError, ValueError) as e:
        raise TypeError(f'{name!r} is or holds {e}: only str, bytes and what JSON can hold crosses the border; take its repr') from None

def decode(head, raw, loads=parse):
    "What `encode` encoded. `loads` is for JSON."
    kind = head.get('kind')
    if kind == 'str': return raw.decode('utf-8', 'surrogatepass')
    if kind == 'data': return loads(raw)
    return bytearray(raw) if kind == 'bytearray' else raw

class SubcallError(str):
    "What stands in the place of a reply that did not come. `error` is the exception."
    error = None

def describe(e):
    "An exception as data."
    try: text = str(e)
    except Exception as odd: text = f'its text could not be made ({type_name(type(odd))})' # Its class is anybody's
    return dict(type=type_name(type(e)), text=text, **(vars(e) if type(e) is TooLarge else {}))

def remake(d):
    "An exception from data that a trusted side sent: a builtin one, or one of that name."
    known = getattr(builtins, d['type'], None)
    if not (isinstance(known, type) and issubclass(known, Exception)): known = type(d['type'], (RuntimeError,), dict(__module__='builtins'))
    try: return known(d['text'])
    except TypeError: return RuntimeError(f"{d['type']}: {d['text']}")

def _reply(head): # What a call inside returns, from the host's reply
    if head.get('error'): raise remake(head['error'])
    res = head['value']
    for i, d in (head.get('failed') or {}).items(): # Slots of a batch whose call failed
        res[int(i)] = slot = SubcallError(res[int(i)])
        slot.error = remake(d)
    return res

class _Kqueue: # As `select.epoll`, where there is none
    def __init__(self): self.queue = select.kqueue()
    def register(self, fd, mask): self.queue.control([select.kevent(fd, select.KQ_FILTER_READ, select.KQ_EV_ADD)], 0)
    def unregister(self, fd): self.queue.control([select.kevent(fd, select.KQ_FILTER_READ, select.KQ_EV_DELETE)], 0)
    def poll(self): return [(o.ident, 0) for o in self.queue.control(None, 8, None)]

def _of_multiprocessing(): # Is this a child by `multiprocessing`? A bare fork runs the rest of its parent's block, and what that prints is said once
    module = sys.modules.get('multiprocessing.process')
    return module is not None and module.parent_process() is not None

class ChildOutput:
    """What is written to the descriptors 1 and 2, as child processes do: part of the output of the block that runs.

    Each block has pipes of its own: what a process that outlives its block writes is read on, so that it is not ended, and dropped."""
    def __init__(self):
        self.poll, self.lock, self.texts, self.open_now = getattr(select, 'epoll', _Kqueue)(), threading.RLock(), {}, {}
        self.next, self.left = {}, set() # Pipes of the next block, and those of blocks that are over
        self.null, self.forked = os.open(os.devnull, os.O_RDWR), False
        with outside_block(): threading.Thread(target=self._pump, daemon=True, name='rlm-children').start()
    def open(self, block):
        "From here on it is the output of `block`."
        block.stdout.write = lambda s: self._printed(block.stdout, 1, s)
        block.stderr.write = lambda s: self._printed(block.stderr, 2, s)
        for text in (block.stdout, block.stderr): text.text = lambda text=text: self._whole(text)
        if not self.next: self.ready()
        for r, (fd, w) in self.next.items():
            self.texts[r] = block.stdout if fd == 1 else block.stderr, codecs.getincrementaldecoder('utf-8')('replace')
            self.open_now[r] = fd
            os.dup2(w, fd)
            os.close(w)
        self.next = {}
    def _whole(self, text): # What was printed, that of child processes with it
        self._catch_up()
        return type(text).text(text)
    def _catch_up(self):
        pipes = tuple(self.open_now)
        if len(pipes) == 0 or self.forked: return
        look = select.poll() # One for each call: several threads may print
        for r in pipes: look.register(r, 1)
        for r, _ in look.poll(0): self._take(r)
    def close(self):
        "The block is over. What was written is in its text; what is written from now on is nobody's."
        with self.lock: self._close()
        self.ready()
    def _close(self):
        for r, fd in self.open_now.items():
            self.poll.unregister(r) # Before it is at its end, so that the other thread sleeps on
            os.dup2(self.null, fd)
            if self._take(r): self._forget(r)
            else: self._leave(r)
        self.open_now = {}
    def _leave(self, r): # Somebody may write there still
        self.texts[r] = None
        self.left.add(r)
        self.poll.register(r, 1)
    def _forget(self, r):
        del self.texts[r]
        os.close(r)
    def ready(self):
        "Make the pipes of the next block."
        try:
            for fd in (1, 2): self._pipe(fd)
        except OSError: pass # The code holds all descriptors that there may be: it has no children either
    def _pipe(self, fd):
        r, w = os.pipe()
        os.set_blocking(r, False)
        self.texts[r], self.next[r] = None, (fd, w)
        self.poll.register(r, 1)
    def _printed(self, text, fd, s): # By Python code: after what its children wrote before, and in a fork to where they write
        if self.forked and _of_multiprocessing(): return self._through(fd, s)
        self._catch_up()
        return type(text).write(text, s)
    def _through(self, fd, s):
        part = memoryview(s.encode('utf-8', 'replace'))
        while part: part = part[_os_write(fd, part):]
        return len(s)
    def _take(self, r, most=16): # Read what is there; True where nobody can write any more
        with self.lock:
            for _ in range(most):
                if r not in self.texts: return False # The other thread was here
                try: data = _os_read(r, 65536)
                except BlockingIOError: return False
                if not data: return True
                if self.texts[r]: self._add(*self.texts[r], data)
        return False
    def _add(self, text, decoder, data): type(text).write(text, decoder.decode(data))
    def _pump(self): # A thread: pipes must not fill up while the main thread waits for who writes to them
        try:
            while True:
                for r, _ in self.poll.poll(): self._pumped(r)
        finally: _stop(LINE_LOST) # Somebody closed it
    def _pumped(self, r):
        with self.lock:
            over = self._take(r, 1)
            if over and r in self.left:
                self.left.discard(r)
                self.poll.unregister(r)
                return self._forget(r)
        if over: time.sleep(.01) # The code has closed the descriptor 1 or 2 itself

def _code_names(f, seen): # Names that a function and those inside it look up
    todo = [f.__code__]
    while todo:
        code = todo.pop()
        seen.update(code.co_names)
        todo += [o for o in code.co_consts if type(o) is types.CodeType]

def _functions(module): # Of a module and of its classes
    own = [o for o in vars(module).values() if getattr(o, '__module__', None) == module.__name__]
    methods = [o for c in own if isinstance(c, type) for o in vars(c).values()]
    return [o for o in own + methods if type(o) is types.FunctionType]

_hooks = ('excepthook', 'unraisablehook', 'displayhook', 'breakpointhook') # Python itself looks them up, in `sys` and `threading`

def _watched(modules):
    "(owner, names, values) of all that the functions of these modules need: their own, and of other modules what they look up."
    res, names, others = [], set(_hooks), {}
    for m in modules:
        for f in _functions(m): _code_names(f, names)
        mine = {k: v for k, v in vars(m).items() if callable(v) or type(v) is types.ModuleType}
        res.append((m, tuple(mine), tuple(mine.values())))
        others.update({id(v): v for v in mine.values() if type(v) is types.ModuleType and v not in (*modules, builtins)})
    for m in modules:
        for c in [o for o in vars(m).values() if isinstance(o, type) and o.__module__ == m.__name__]:
            methods = {k: v for k, v in vars(c).items() if type(v) is types.FunctionType}
            res.append((c, tuple(methods), tuple(methods.values())))
    for m in others.values():
        used = {k: v for k, v in vars(m).items() if k in names and (callable(v) or type(v) is types.ModuleType)}
        res.append((m, tuple(used), tuple(used.values())))
    return [(owner, names, values, operator.itemgetter(*names)) for owner, names, values in res if len(names) > 1]

_least = dict(NOFILE=64, FSIZE=1 << 20, NPROC=8, AS=1 << 26, DATA=1 << 26, STACK=1 << 18) # Of what code may take from itself: with less there is no session

class Condition:
    """What a session needs to go on, as it was before any block ran. `fault` puts back what can be put back, and names what cannot.

    A name that is missing from `builtins` cannot: code that was defined before may have met any state of it."""
    def __init__(self, wire):
        self.wire, self.home, self.broken = wire, os.getcwd(), None
        self.builtins, self.names, self.values = vars(builtins), list(vars(builtins)), list(vars(builtins).values())
        self.watched = _watched([m for name, m in sys.modules.items() if name.startswith(f'{__package__}.')])
        self.modules, self.loaded = sys.modules, dict(sys.modules)
        self.lists = [(name, getattr(sys, name), list(getattr(sys, name))) for name in ('path', 'meta_path', 'path_hooks')]
        self.recursion, self.switch, self.on_int = sys.getrecursionlimit(), sys.getswitchinterval(), signal.getsignal(signal.SIGINT)
        self.search, self.limits = encodings.search_function, {}
        try: import resource
        except ImportError: return
        self.rlimit, self.set_rlimit = resource.getrlimit, resource.setrlimit
        self.limits = {getattr(resource, f'RLIMIT_{k}'): n for k, n in _least.items() if hasattr(resource, f'RLIMIT_{k}')}
        self.infinity, self.most = resource.RLIM_INFINITY, {k: resource.getrlimit(k) for k in self.limits}
    def after(self, _settrace=sys.settrace, _setprofile=sys.setprofile):
        "As soon as a block's code has ended, whatever it did: the engine finds what it needs, and can still say what the block did."
        _settrace(None)
        _setprofile(None)
        try: self.broken = self._builtins()
        except: self.broken = 'it fails at the simplest things' # Bare, since the name of any exception may be gone
        try: self.mend()
        except: self.broken = 'it fails at the simplest things'
    def fault(self):
        "What is not whole and cannot be made so, in words, or None."
        broken, self.broken = self.broken, None
        try: return broken or self._builtins() or self._limits() or self._tried()
        except: return 'it fails at the simplest things'
    def _builtins(self, _len=len, _list=list, _all=all, _map=map, _zip=zip, _is=operator.is_):
        now = self.builtins
        whole = _list(now)[:_len(self.names)] == self.names # One that was deleted and put back is the last
        if not whole or not _all(_map(_is, now.values(), self.values)): now.update(_zip(self.names, self.values))
        return None if whole else 'names of `builtins` were deleted'
    def mend(self):
        "Put back what code has changed and others need."
        self._modules()
        self._settings()
        if hasattr(signal, 'setitimer'): self._signals()
        try: os.getcwd()
        except OSError: os.chdir(self.home)
    def _modules(self):
        if sys.modules is not self.modules: sys.modules = self.modules
        if not self.loaded.keys() <= self.modules.keys(): self.modules.update({k: v for k, v in self.loaded.items() if k not in self.modules})
        for owner, names, values, look in self.watched:
            try: same = look(owner.__dict__) == values # Compares by identity first
            except KeyError: same = False
            if not same: self._put_back(owner, names, values)
    def _settings(self):
        for name, own, values in self.lists:
            now = getattr(sys, name, None)
            if now is not own or now[:len(values)] != values: self._add_missing(name, own, values)
        if sys.getrecursionlimit() < self.recursion: sys.setrecursionlimit(self.recursion)
        sys.setswitchinterval(self.switch)
        threading.settrace(None)
        threading.setprofile(None)
        try: codecs.lookup('utf-8')
        except LookupError: codecs.register(self.search)
    def _put_back(self, owner, names, values):
        for k, v in zip(names, values):
            if vars(owner).get(k) is not v: setattr(owner, k, v)
    def _add_missing(self, name, own, values): # What was there is there; what the code put before or behind it stays
        now = getattr(sys, name, None)
        if type(now) is not list: now = own
        now += [o for o in values if not any(o is p or type(p) is str and o == p for p in now)]
        setattr(sys, name, now)
    def _signals(self):
        if signal.getsignal(signal.SIGINT) is not self.on_int: signal.signal(signal.SIGINT, self.on_int)
        for o in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF): signal.setitimer(o, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGALRM))
        signal.set_wakeup_fd(-1)
    def _limits(self):
        for kind, least in self.limits.items():
            soft, hard = self.rlimit(kind)
            if soft != self.infinity and soft < least and not self._raised(kind, hard, least): return 'its limits are too low to go on'
    def _raised(self, kind, hard, least):
        most = self.most[kind][0]
        if most != self.infinity and most < least: return True # It never had more
        if hard != self.infinity and hard < least: return False
        self.set_rlimit(kind, (most if hard == self.infinity else min(hard, most) if most != self.infinity else hard, hard))
        return True
    def _tried(self):
        "Do a little of what a block does."
        exec(compile('x = 1', '<check>', 'exec'), space := {})
        if space['x'] != 1 or dumps([1]) != b'[1]': return 'it fails at the simplest things'
        codecs.lookup('utf-8')
        if sys.meta_path != self.lists[1][2]: self._imports()
        if not self._room(): return 'there is no memory left'
        if self._children() and not self._starts(): return 'no thread can be started any more'
    def _room(self):
        try: return bool(bytearray(1 << 18))
        except MemoryError: gc.collect()
        try: return bool(bytearray(1 << 18))
        except MemoryError: return False
    def _imports(self): # Somebody has put a finder there
        if not _frozen_importlib._find_spec('__phello__', None): raise ImportError('nothing can be imported')
    def _children(self):
        try: os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except (AttributeError, ChildProcessError): return False
        return True
    def _starts(self):
        try: threading._start_new_thread(int, ())
        except RuntimeError: return False
        return True

_job = contextvars.ContextVar('rlm_job', default=0) # The request whose block this thread belongs to

class Worker:
    "One session: a namespace, and a host at the other end of the wire."
    def __init__(self, wire, cap):
        self.wire, self.cap, self.ns, self.jobs, self.calls, self.sent = wire, cap, {'__name__': '__main__'}, SimpleQueue(), {}, {}
        self.numbers, self.now, self.pid, self.extra = itertools.count(1), 0, os.getpid(), {}
        self.block = self.children = self.condition = None # The block that runs; what its children write; what this process was like before any
        self.fresh, self.told = False, 0
        wire.lost = lambda: _stop(LINE_LOST)
        if hasattr(os, 'register_at_fork'): os.register_at_fork(after_in_child=self.forked)
    def forked(self):
        "In a child of the code's own: it has no host."
        self.wire.dead = True
        if self.children: self.children.forked = True
        for fd in (self.wire.rfd, self.wire.wfd): os.close(fd)
    def run(self):
        "Serve until the host is gone."
        if hasattr(signal, 'SIGPIPE'): signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.signal(signal.SIGINT, lambda *args: None)
        with outside_block(): threading.Thread(target=self.read, daemon=True, name='rlm-reader').start()
        self.prepare()
        try:
            while True: self.work(*self.jobs.get())
        finally: _stop(1)
    def prepare(self):
        "Before the first block: blocks tell where they write, and the process is remembered as it is."
        worker = self
        class ToldBlock(Block):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                worker.begun(self)
        def run(*args, _run=repl._run, _shielded=repl.shielded):
            try: return _run(*args)
            finally: _shielded(worker.condition.after)
        repl.Block, repl._run, os._exit = ToldBlock, run, self.leave
        aftermath.shares_process = False # What ends it is noted, and it is replaced
        if hasattr(select, 'poll'): self.children = ChildOutput()
        self.condition = Condition(self.wire)
    def begun(self, block):
        "A block is made: the first one after a request is the one that was asked for."
        if not self.fresh: return
        self.fresh, self.told, self.block = False, 0, block
        if self.children: self.children.open(block)
    def leave(self, status):
        "As `os._exit`; in the session's own process the host hears before what was printed."
        if os.getpid() == self.pid:
            self.say_so_far()
            self.wire.flush()
        _stop(status)
    def say_so_far(self):
        "Tell the host what the block has printed, if that is more than it knows: it has no more of it when the block is killed."
        block, job = self.block, self.now
        if block is None or not job: return
        n = block.stdout.n + block.stderr.n
        if n == self.told: return
        self.told = n
        try: self.wire.send(dict(op='so_far', id=0, job=job, stdout=block.stdout.text(), stderr=block.stderr.text()), cap=self.cap)
        except (TooLarge, BrokenPipeError): pass # The block goes on, and its end is told as ever
    def read(self):
        "The reader thread: until the host is gone."
        code = LINE_LOST
        try:
            while True: self.take(*self.wire.recv())
        except EOFError: code = 0
        finally: _stop(code)
    def take(self, head, raw):
        "On the reader thread: a frame that came."
        op = head['op']
        if op == 'interrupt':
            if self.now == head['job']: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            self.say_so_far()
        elif op == 'tick': # While the host waits for a block
            self.wire.check()
            self.say_so_far()
        elif op == 'reply':
            if box := self.calls.pop(head['id'], None): box.put(head)
        elif op in ('exec', 'metadata', 'repr'): self.jobs.put((head, raw))
        else: self.answer(head, raw)
    def work(self, head, raw):
        "On the main thread: what may run code of the model's."
        self.now = head['id']
        token = _job.set(self.now)
        try: self.answer(head, raw)
        finally: self.now = 0; _job.reset(token)
        if head['op'] == 'exec': self.tidy()
    def tidy(self):
        "After the reply, and before the next block: what that one left."
        if not self.children: return
        self.wire.flush() # The thread that writes could not begin while this one works
        self.children.close()
    def answer(self, head, raw):
        "Do what a frame asks for, and reply."
        try: out, data = getattr(self, f'do_{head["op"]}')(head, raw) or ({}, b'')
        except Exception as e: out, data = dict(error=describe(e)), b''
        try: self.wire.send(dict(out, op='done', id=head['id']), data, self.cap)
        except BrokenPipeError: _stop(LINE_LOST)
        except Exception as e: self.wire.send(dict(error=describe(e), op='done', id=head['id']))

    # Calls of the host
    def call(self, name, args, kwargs):
        "Call the host's function `name`, and wait for its reply."
        if os.getpid() != self.pid: raise RuntimeError(f'`{name}` works in the process of the session, and this is a fork of it')
        n, box = next(self.numbers), SimpleQueue()
        try: args, kwargs = plain(list(args), True), plain(kwargs, True)
        except (TypeError, ValueError) as e: raise TypeError(f'`{name}` cannot be given {e}: only what JSON can hold reaches the host') from None
        self.calls[n] = box
        try:
            self.wire.send(dict(op='call', id=n, job=_job.get(), name=name, args=args, kwargs=kwargs), cap=self.cap)
            return _reply(repl.interruptible(box.get))
        except BaseException: # Also when this block is interrupted: the host need not go on
            if self.calls.pop(n, None): self.wire.send(dict(op='cancel', id=n))
            raise
    def proxy(self, name, sig='', doc=''):
        "A function that the host runs."
        def f(*args, **kwargs): return repl.shielded(self.call, name, args, kwargs)
        f.__name__ = f.__qualname__ = name
        f.__module__, f.__doc__ = '__main__', f'{name}{sig}\n\n{doc}'.strip()
        return f

    # What the host asks for: each returns (fields, payload) or None
    def do_exec(self, head, raw):
        "Run a block."
        try: out = self.executed(raw.decode('utf-8', 'surrogatepass'), head)
        except Exception as e: out = dict(error=describe(e))
        return dict(out, fault=self.condition.fault()), b''
    def executed(self, code, head):
        "What a block did, as data."
        self.fresh = True
        try: res = repl.exec_code(code, self.ns, lang=head['lang'], timeout=head['timeout'], max_output=head['max_output'])
        except KeyboardInterrupt as e: res = e.block
        finally: self.block = None
        final, notes = self.final(res.final_answer, res.notes)
        outputs, more = fit_outputs(res.outputs, self.cap // 8)
        out = dict(stdout=res.stdout, stderr=res.stderr, locals=res.locals, seconds=res.execution_time, final=final, error=res.error, notes=[*notes, *more])
        if len(outputs) > 0: out['outputs'] = outputs
        return out
    def final(self, answer, notes):
        "An answer as data, if it is not too large, and the notes."
        if answer is None: return None, notes
        if len(answer) * 4 > self.cap and (n := len(answer.encode('utf-8', 'surrogatepass'))) > self.cap // 4:
            return None, [*notes, f'The answer has {n:,} bytes, and at most {self.cap // 4:,} are taken. Give a shorter one.']
        text = str(answer)
        try:
            value = plain(answer.value, True)
            if isinstance(value, str) and value == text: return dict(text=text), notes
            measure(data := dumps(value), _parts - 1000) # The rest of the frame has some too
            if len(data) <= self.cap // 4: return dict(text=text, value=value), notes
        except (TypeError, ValueError): pass # Its text stands for it
        return dict(text=text), notes
    def guarded(self, f):
        "The result of `f`, in which code of the objects' own may run."
        out = []
        err, hit = repl._guarded(lambda: out.append(f()), Block(0), None, None)
        if hit or err is not None: raise err if isinstance(err, Exception) else RuntimeError('it was interrupted')
        return out[0]
    def do_metadata(self, head, raw):
        m = self.guarded(lambda: repl.QueryMetadata(self.ns[head['name']]))
        code = next(o for o in 'BHIQ' if max(m.context_lengths, default=0) < 256 ** array(o).itemsize) # There may be millions
        return dict(value=dict(type=m.context_type, code=code)), array(code, m.context_lengths).tobytes()
    def do_repr(self, head, raw):
        text = self.guarded(lambda: repr(self.ns[head['name']]))
        n = head['chars']
        return dict(value=text if len(text) <= n else f'{text[:n]}... [{len(text) - n:,} characters cut]'), b''
    def do_get(self, head, raw):
        "A value, if the host will take it."
        res = encode(self.ns[head['name']], head['name'])
        if res[0]['kind'] == 'data': measure(res[1])
        return res
    def do_set(self, head, raw):
        "Set one value for some names; `sent` where they are contexts."
        value = decode(head, raw, json.loads)
        for name in head['names']: self.ns[name] = value
        if head['sent']: self.sent.update(dict.fromkeys(head['names'], value))
    def do_del(self, head, raw): del self.ns[head['name']]
    def do_has(self, head, raw): return dict(value=head['name'] in self.ns), b''
    def do_keys(self, head, raw): return dict(value=[k for k in list(self.ns) if type(k) is str and k[:2] != '__']), b''
    def do_visible(self, head, raw): return dict(value=repl.visible(self.ns)), b''
    def do_context(self, head, raw):
        "The newest context again, or another."
        name = head['name']
        old, value = self.sent.get(name), decode(head, raw, json.loads) if 'kind' in head else None
        if head['same']: # The caller's object is the one that it was, whatever it holds by now
            value = old if value is None else value
            self.ns.update({k: value for k in [k for k, v in self.ns.items() if v is old]})
        if value is not None: self.sent[name] = value
        return dict(value=repl.bind_context(self.ns, value, name)), b''
    def do_bind(self, head, raw):
        "Put a run's scaffold in place, the host's functions as proxies."
        functions = {k: self.proxy(k, *v) for k, v in head['functions'].items()}
        repl.bind(self.ns, Scaffold({**functions, **head['values'], **self.extra}, head['final_name'], head['keep_answer']))
    def do_unbind(self, head, raw): repl.unbind(self.ns)
    def do_rebind(self, head, raw): repl.rebind(self.ns, head['name'], decode(head, raw, json.loads))
    def do_start(self, head, raw):
        "The first request: what the host offers beside a run."
        if head.get('host_call'):
            self.extra = dict(host_call=self.proxy('host_call', '(method, payload=None)', 'Ask the host; it names the methods that it allows.'))
            self.ns.update(self.extra)

_keyctl = dict(x86_64=250, aarch64=219, riscv64=219, loongarch64=219, i686=288, armv7l=311, ppc64le=271, s390x=280) # Number of that system call

filtered_calls = dict(x86_64=(0xC000003E, (41, 53), (248, 249, 250, 298, 321, 323, 425)), # As audit names the machine; the calls that make sockets; add_key,
    aarch64=(0xC00000B7, (198, 199), (217, 218, 219, 241, 280, 282, 425))) # request_key, keyctl, perf_event_open, bpf, userfaultfd and io_uring_setup

def call_filter(arch, sockets, refused):
    "A seccomp program: sockets of few families, none of the calls in `refused`, and nothing by the way of another machine's calls."
    allow, no, no_family, load, ret = 0x7FFF0000, 0x50000 + errno.EPERM, 0x50000 + errno.EAFNOSUPPORT, 0x20, 0x06
    when = lambda n, res, op=0x15: [(op, 0, 1, n), (ret, 0, 0, res)] # Equal; 0x35 is not below
    unless = lambda n, res: [(0x15, 1, 0, n), (ret, 0, 0, res)]
    steps = [(load, 0, 0, 4), *unless(arch, no), (load, 0, 0, 0), *when(1 << 30, no, 0x35), *(o for n in refused for o in when(n, no))]
    steps += [(0x15, 2, 0, sockets[0]), (0x15, 1, 0, sockets[1]), (ret, 0, 0, allow), (load, 0, 0, 16)] # The family
    steps += [o for n in (1, 2, 10) for o in when(n, allow)] + unless(16, no_family) # UNIX, INET, INET6; NETLINK
    steps += [(load, 0, 0, 32), *unless(0, no_family), (ret, 0, 0, allow)] # Of netlink only what lists the interfaces
    return b''.join(struct.pack('=HBBI', *o) for o in steps)

def refuse_calls():
    "Take from this process, for good, the system calls that reach past namespaces."
    data = call_filter(*filtered_calls[os.uname().machine])
    code = ctypes.create_string_buffer(data, len(data))
    if ctypes.CDLL(None).prctl(22, 2, struct.pack('HP', len(data) // 8, ctypes.addressof(code)), 0, 0): raise OSError('the kernel takes no filter of system calls')

def confine(limits):
    "Give up what this process will not need: it dies with its parent, gains no rights, has none of the caller's keys, and has `limits` (name -> number)."
    if sys.platform == 'linux':
        libc = ctypes.CDLL(None)
        libc.prctl(1, int(signal.SIGKILL)) # PR_SET_PDEATHSIG
        libc.prctl(38, 1, 0, 0, 0) # PR_SET_NO_NEW_PRIVS
        libc.syscall(_keyctl[os.uname().machine], 1, None) # KEYCTL_JOIN_SESSION_KEYRING: no namespace hides the keys of the caller's
    if limits:
        import resource
        for name, n in limits.items():
            kind = getattr(resource, f'RLIMIT_{name}')
            most = resource.getrlimit(kind)[1]
            n = n if most == resource.RLIM_INFINITY else min(n, most)
            resource.setrlimit(kind, (n, n))

def serve(rfd, wfd, cap):
    "Be a session over these descriptors until the host is gone."
    Worker(Wire(rfd, wfd), cap).run()

def main():
    "Be a session over stdin and stdout; `argv` has a JSON dict: `cap` in bytes, `limits`, `calls` if some are to be refused, and the parent's `pid` where it can be seen."
    cfg = json.loads(sys.argv.pop())
    if sys.flags.no_site: # The packages are there all the same, but nothing of what their .pth files would run, which took most of a start
        import site
        sys.path += site.getsitepackages()
        site.setquit(); site.sethelper()
    confine(cfg['limits'])
    if cfg.get('calls'): refuse_calls()
    if cfg.get('pid', os.getppid()) != os.getppid(): _stop(0) # It died before it could be watched
    rfd, wfd, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2): os.dup2(null, fd)
    serve(rfd, wfd, cfg['cap'])
