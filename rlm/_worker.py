"""The one REPL server of all namespaces that run their code elsewhere, and the frames in which both sides talk.

Written by hand, with the standard library alone: this file, `repl.py`, `output.py` and `_rlmpaper_compat.py` are all that has to lie inside. Blocks run on the main
thread, so that signals end what they wait for; a reader thread takes requests for data and replies to calls meanwhile."""
import builtins, contextvars, ctypes, errno, itertools, json, os, re, signal, struct, sys, threading
from array import array
from queue import SimpleQueue
from . import repl
from ._rlmpaper_compat import type_name
from .output import fit_outputs
from .repl import Block, Scaffold, outside_block

_sizes = struct.Struct('!II') # Bytes of JSON, bytes of payload
_strings = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.S) # Never backtracks; an open string goes to the end
_depth, _parts, _bits = 100, 2_000_000, 14_284 # Most levels and values of what the host accepts, and bits of an int: 4,300 digits, as Python reads at most
_stop = os._exit # Code may put anything in its place

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

class Wire:
    "Frames over two file descriptors. Sending only queues: a thread of its own writes, so that no interrupt cuts a frame in two."
    def __init__(self, rfd, wfd, cap=None): # The two are its own from here on, and not the same one; who has a `cap` does not trust the other side
        self.rfd, self.wfd, self.cap, self.out, self.dead, self.size = rfd, wfd, cap, SimpleQueue(), False, 0 # `size`, in bytes, is of the newest frame
        with outside_block(): threading.Thread(target=self._write, daemon=True, name='rlm-wire').start()
    def send(self, head, raw=b'', cap=None):
        "Queue one frame; TooLarge where it is over `cap`, what the header can say, or what a host takes."
        data = dumps(head)
        if not self.cap: measure(data)
        n, most = max(len(data), len(raw)), min(cap or 2**32 - 1, 2**32 - 1)
        if n > most: raise TooLarge(n, most)
        if self.dead: raise BrokenPipeError('the other side is gone')
        self.out.put((_sizes.pack(len(data), len(raw)) + data, raw))
    def close(self):
        "Send no more, and close the descriptor for it once what is queued is sent."
        self.dead = True
        self.out.put(())
    def _write(self):
        try:
            while parts := self.out.get():
                for part in map(memoryview, parts):
                    while part: part = part[os.write(self.wfd, part):]
        except OSError: self.dead = True # The other side is gone, and `recv` says so
        os.close(self.wfd)
    def _read(self, n): # Takes memory for what came, not for what was announced
        res = bytearray()
        while len(res) < n:
            part = os.read(self.rfd, min(n - len(res), 1 << 20))
            if not part: raise EOFError('the other side closed the stream')
            res += part
        return bytes(res)
    def recv(self):
        "The next frame: (dict, bytes). With a `cap`, nothing larger is read, and nothing odd is parsed."
        n, m = _sizes.unpack(self._read(8))
        if self.cap and max(n, m) > self.cap: raise FrameError(f'a frame of {n:,} + {m:,} bytes, where {self.cap:,} are allowed')
        data, raw, self.size = self._read(n), self._read(m), n + m
        head = parse(data) if self.cap else json.loads(data)
        if not isinstance(head, dict): raise FrameError('a frame without a header')
        return head, raw

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

_job = contextvars.ContextVar('rlm_job', default=0) # The request whose block this thread belongs to

class Worker:
    "One session: a namespace, and a host at the other end of the wire."
    def __init__(self, wire, cap):
        self.wire, self.cap, self.ns, self.jobs, self.calls, self.sent = wire, cap, {'__name__': '__main__'}, SimpleQueue(), {}, {}
        self.numbers, self.now, self.pid, self.extra = itertools.count(1), 0, os.getpid(), {}
        if hasattr(os, 'register_at_fork'): os.register_at_fork(after_in_child=self.forked)
    def forked(self):
        "In a child of the code's own: it has no host."
        self.wire.dead = True
        for fd in (self.wire.rfd, self.wire.wfd): os.close(fd)
    def run(self):
        "Serve until the host is gone."
        if hasattr(signal, 'SIGPIPE'): signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.signal(signal.SIGINT, lambda *args: None)
        with outside_block(): threading.Thread(target=self.read, daemon=True, name='rlm-reader').start()
        try:
            while True: self.work(*self.jobs.get())
        finally: _stop(1)
    def read(self):
        "The reader thread: until the host is gone."
        try:
            while True: self.take(*self.wire.recv())
        finally: _stop(0)
    def take(self, head, raw):
        "On the reader thread: a frame that came."
        op = head['op']
        if op == 'interrupt':
            if self.now == head['job']: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
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
    def answer(self, head, raw):
        "Do what a frame asks for, and reply."
        try: out, data = getattr(self, f'do_{head["op"]}')(head, raw) or ({}, b'')
        except Exception as e: out, data = dict(error=describe(e)), b''
        try: self.wire.send(dict(out, op='done', id=head['id']), data, self.cap)
        except BrokenPipeError: _stop(0)
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
        code = raw.decode('utf-8', 'surrogatepass')
        try: res = repl.exec_code(code, self.ns, lang=head['lang'], timeout=head['timeout'], max_output=head['max_output'])
        except KeyboardInterrupt as e: res = e.block
        final, notes = self.final(res.final_answer, res.notes)
        outputs, more = fit_outputs(res.outputs, self.cap // 8)
        out = dict(stdout=res.stdout, stderr=res.stderr, locals=res.locals, seconds=res.execution_time, final=final, error=res.error, notes=[*notes, *more])
        if len(outputs) > 0: out['outputs'] = outputs
        return out, b''
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

_calls = dict(x86_64=(0xC000003E, (41, 53), (248, 249, 250, 298, 321, 323, 425)), # As audit names the machine; the calls that make sockets; add_key,
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
    data = call_filter(*_calls[os.uname().machine])
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
