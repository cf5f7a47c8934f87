"""Written by hand; it runs inside a virtual machine, as root and as process 1. It opens, ends and watches sessions as the host asks for it.

The host writes JSON lines to the control port and reads replies and events from it. A session is a fork of this process with a port, a uid, a control group,
and private /tmp, loopback and shared memory. What runs in a session can use its own port and nothing else of this file's."""
import ctypes, fcntl, json, os, random, resource, select, signal, socket, struct, sys, time
sys.path.insert(0, '/run/rlm')
import csv, collections, concurrent.futures, datetime, math, statistics, textwrap # What a model's code imports most is there at once
from rlm import _worker

GROUP, FIRST_UID, MB = '/sys/fs/cgroup/sessions', 100_000, 1 << 20
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
NEWNS, NEWIPC, NEWNET = 0x20000, 0x8000000, 0x40000000
libc = ctypes.CDLL(None, use_errno=True)

def call(name, *args):
    "A function of libc, or OSError."
    if getattr(libc, name)(*args) < 0: raise OSError(ctypes.get_errno(), f'{name}{args}: {os.strerror(ctypes.get_errno())}')

def mount(kind, path, flags=0, data='', source=None):
    call('mount', (source or kind).encode(), path.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())

def write(path, text):
    with open(path, 'w') as f: f.write(str(text))

def read(path):
    with open(path) as f: return f.read()

def ports():
    "Name of a port -> its device."
    home = '/sys/class/virtio-ports'
    return {read(f'{home}/{o}/name').strip(): f'/dev/{o}' for o in os.listdir(home)}

def prepare():
    "What has to be there once, before the first session."
    for name, to in dict(fd='/proc/self/fd', stdin='/proc/self/fd/0', stdout='/proc/self/fd/1', stderr='/proc/self/fd/2').items():
        if not os.path.lexists(f'/dev/{name}'): os.symlink(to, f'/dev/{name}')
    os.makedirs('/dev/shm', exist_ok=True)
    mount('cgroup2', '/sys/fs/cgroup')
    write('/sys/fs/cgroup/cgroup.subtree_control', '+memory +pids +cpu')
    os.mkdir(GROUP)
    write(f'{GROUP}/cgroup.subtree_control', '+memory +pids +cpu')
    total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    write(f'{GROUP}/memory.max', total - max(total // 8, 96 * MB)) # Near the end of all memory the guest would only reclaim and never get on
    for name, n in (('user/max_user_namespaces', 0), ('kernel/printk', '1 4 1 1'), ('kernel/dmesg_restrict', 1)): write(f'/proc/sys/{name}', n)
    os.setpriority(os.PRIO_PROCESS, 0, -15)

class DiskWorker(_worker.Worker):
    "A worker that takes a large payload from a disk."
    def take(self, head, raw):
        if path := head.pop('disk', None):
            with open(path, 'rb') as f: raw = f.read(head.pop('size'))
        super().take(head, raw)

def session(port, slot, o):
    "Be a session: in a forked child, while it is still root, and then not any more."
    write(f'{GROUP}/{slot}/cgroup.procs', 0)
    os.setsid()
    call('unshare', NEWNS | NEWIPC | (0 if o['network'] else NEWNET))
    mount('none', '/', MS_REC | MS_PRIVATE)
    mount('tmpfs', '/tmp', MS_NOSUID | MS_NODEV, f'mode=1777,size={o["memory"] // 2}m')
    for to in ('/var/tmp', '/dev/shm'): mount('none', to, MS_BIND, source='/tmp')
    if not o['network']: loopback()
    os.setpriority(os.PRIO_PROCESS, 0, 0)
    greet(port, bytes.fromhex(o['nonce']))
    for name, n in (('CORE', 0), ('NOFILE', 1024)): resource.setrlimit(getattr(resource, f'RLIMIT_{name}'), (n, n))
    os.setgroups([])
    os.setresgid(*[FIRST_UID + slot] * 3)
    os.setresuid(*[FIRST_UID + slot] * 3)
    call('prctl', 38, 1, 0, 0, 0) # PR_SET_NO_NEW_PRIVS
    os.environ.clear()
    os.environ.update(PATH='/usr/local/bin:/usr/bin:/bin', HOME='/tmp', LANG='C.UTF-8', TERM='dumb')
    os.chdir('/tmp')
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2): os.dup2(null, fd)
    DiskWorker(_worker.Wire(port, port), o['cap']).run()

def loopback():
    "The loopback of this session's own network."
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s: fcntl.ioctl(s, 0x8914, struct.pack('16sh14x', b'lo', 1)) # SIOCSIFFLAGS, IFF_UP

def greet(port, nonce):
    "Drop what an earlier session left in the line, and say that this one is there."
    got, end = b'', time.monotonic() + 10
    while not got.endswith(nonce):
        part = os.read(port, 1 << 16)
        if not part: # The host is not connected yet
            if time.monotonic() > end: raise EOFError('the host did not come')
            time.sleep(.001)
        got = (got + part)[-len(nonce) - len(part):]
    while nonce: nonce = nonce[os.write(port, nonce):]

class Agent:
    "The host's hand inside."
    def __init__(self):
        self.ports, self.pids, self.ending, self.waiting, self.line = ports(), {}, {}, [], b''
        self.ctl = os.open(self.ports['ctl'], os.O_RDWR)
        self.wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *a: None)
        signal.set_wakeup_fd(self.wake[1])
    def say(self, **msg):
        data = json.dumps(msg).encode() + b'\n'
        while data: data = data[os.write(self.ctl, data):]
    def run(self):
        "Serve until the host is gone, and then switch the machine off."
        self.say(event='ready', python=sys.version.split()[0])
        while True:
            busy = self.ending or self.waiting
            ready = select.select([self.ctl, self.wake[0]], [], [], .01 if busy else None)[0]
            if self.wake[0] in ready: os.read(self.wake[0], 4096)
            self.reap()
            self.waiting = [o for o in self.waiting if not o()]
            if self.ctl in ready and not self.take(): break
        os.sync()
        call('reboot', 0x4321fedc) # RB_POWER_OFF
    def take(self):
        "Requests that came; False where the host is gone."
        part = os.read(self.ctl, 1 << 16)
        *lines, self.line = (self.line + part).split(b'\n')
        for o in map(json.loads, lines):
            try: res = getattr(self, f'do_{o["op"]}')(o)
            except Exception as e: res = dict(error=f'{type(e).__name__}: {e}')
            if res is not None: self.say(id=o['id'], **res)
        return bool(part)
    def do_open(self, o):
        slot = o['slot']
        home = f'{GROUP}/{slot}'
        os.mkdir(home)
        for name, n in (('memory.max', o['memory'] * MB), ('pids.max', o['processes'])): write(f'{home}/{name}', n)
        port = os.open(self.ports[f's{slot}'], os.O_RDWR)
        pid = os.fork()
        if not pid: self.child(port, slot, o)
        os.close(port)
        self.pids[pid] = slot, o['nonce']
        return {}
    def child(self, port, slot, o):
        try:
            signal.set_wakeup_fd(-1)
            for fd in (self.ctl, *self.wake): os.close(fd)
            session(port, slot, o)
        except BaseException as e: os.write(2, f'session {slot}: {type(e).__name__}: {e}\n'.encode()) # On the machine's console
        finally: os._exit(1)
    def do_kill(self, o):
        if os.path.exists(f'{GROUP}/{o["slot"]}'): write(f'{GROUP}/{o["slot"]}/cgroup.kill', 1)
        return {}
    def do_wake(self, o):
        "The time and randomness of a machine that has just been resumed: all that come from one template would share them."
        time.clock_settime(time.CLOCK_REALTIME, o['time'])
        seed = bytes.fromhex(o['seed'])
        with open('/dev/random', 'wb') as f:
            fcntl.ioctl(f, 0x40085203, struct.pack('ii', 8 * len(seed), len(seed)) + seed) # RNDADDENTROPY
            fcntl.ioctl(f, 0x5207) # RNDRESEEDCRNG
        random.seed(seed)
        return {}
    def do_disk(self, o):
        "Give a session the disk with this serial number, as soon as it is there."
        end = time.monotonic() + 10
        def there():
            for name in os.listdir('/sys/block'):
                try: found = read(f'/sys/block/{name}/serial').strip() == o['serial']
                except OSError: continue
                if found and os.path.exists(f'/dev/{name}'):
                    os.chown(f'/dev/{name}', FIRST_UID + o['slot'], 0)
                    return self.say(id=o['id'], path=f'/dev/{name}') or True
            return time.monotonic() > end and (self.say(id=o['id'], error='the disk did not come') or True)
        self.waiting.append(there)
    def reap(self):
        "Bury the dead. A session is over when all of its processes are gone."
        while True:
            try: pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError: break
            if not pid: break
            if pid in self.pids:
                slot, nonce = self.pids.pop(pid)
                self.ending[slot] = nonce, os.waitstatus_to_exitcode(status)
                write(f'{GROUP}/{slot}/cgroup.kill', 1)
        for slot in [o for o in self.ending if 'populated 0' in read(f'{GROUP}/{o}/cgroup.events')]: self.bury(slot)
    def bury(self, slot):
        nonce, code = self.ending.pop(slot)
        events = dict(o.split() for o in read(f'{GROUP}/{slot}/memory.events').splitlines())
        os.rmdir(f'{GROUP}/{slot}')
        self.say(event='end', slot=slot, nonce=nonce, code=code, memory=int(events['oom_kill']) > 0)

if __name__ == '__main__':
    prepare()
    Agent().run()
